"""The calls of the reference engine: OpenAI's and vLLM's requests as work for the model's one thread, errors as replies."""
# flake8: noqa: ASYNC124 - the framework runs what is not async in a thread

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

import structlog
import trio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from p2pkv.core.keys import Identity
from p2pkv.engines.reference.answering import CompletionResponse
from p2pkv.engines.reference.engine import Completion, Piece, ReferenceEngine
from p2pkv.engines.reference.openai import (
    CompletionReply,
    CompletionRequest,
    DetokenizeReply,
    DetokenizeRequest,
    ErrorDetail,
    ErrorReply,
    HealthReply,
    ModelCard,
    ModelsReply,
    TokenizeReply,
    TokenizeRequest,
)
from p2pkv.errors import InvalidRequestError

WAITING_LIMIT = 64
"""Requests that may wait for the model, at some 0.1 s each; more are refused with 503 rather than kept for longer."""

T = TypeVar("T")


class EngineFront:
    """The calls, over one engine.

    Attributes:
        engine: Answers; only ever used in the one worker thread.
        names: All names under which its model is served, its own last.
    """

    def __init__(self, engine: ReferenceEngine, served_model_names: Sequence[str]) -> None:
        self.engine = engine
        self.names = tuple(dict.fromkeys([*served_model_names, engine.model.name]))
        self._started_at = int(time.time())
        self._one_thread = trio.CapacityLimiter(1)

    async def complete(self, body: CompletionRequest) -> CompletionResponse:
        """Answer a prompt greedily, as one object or as server-sent events."""
        self._check_model(body.model)
        tokens = await self._in_thread(partial(self.engine.read_prompt, body.prompt, body.max_tokens))
        return CompletionResponse(body, tokens, partial(self._compute, body, tokens))

    async def tokenize(self, body: TokenizeRequest) -> TokenizeReply:
        """Token ids of a text."""
        self._check_model(body.model)
        tokens = await self._in_thread(partial(self.engine.tokenize, body.prompt, add_special_tokens=body.add_special_tokens))
        model = self.engine.model
        token_strs = [model.tokenizer.id_to_token(token) for token in tokens] if body.return_token_strs else None
        return TokenizeReply(count=len(tokens), max_model_len=model.max_tokens, tokens=tokens, token_strs=token_strs)

    async def detokenize(self, body: DetokenizeRequest) -> DetokenizeReply:
        """Text of token ids."""
        self._check_model(body.model)
        return DetokenizeReply(prompt=await self._in_thread(partial(self.engine.detokenize, body.tokens)))

    async def models(self) -> ModelsReply:
        """The names to ask for."""
        model = self.engine.model
        card = partial(ModelCard, created=self._started_at, root=model.name, max_model_len=model.max_tokens)
        return ModelsReply(data=[card(id=name) for name in self.names])

    async def health(self) -> HealthReply:
        """Whether the engine serves, and how its cache is."""
        return HealthReply(cache_problem=self.engine.cache_problem)

    async def _compute(self, body: CompletionRequest, tokens: list[int], emit: Callable[[Piece], None]) -> Completion:
        """Complete `tokens`, once it is their turn; ends soon after a cancellation."""
        work = partial(
            self.engine.complete,
            tokens,
            max_tokens=body.max_tokens,
            stop=body.stop,
            identity=Identity(cache_salt=body.cache_salt),
            emit=emit,
            checkpoint=trio.from_thread.check_cancelled,
        )
        return await trio.to_thread.run_sync(work, limiter=self._one_thread)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise HTTPException(404, f"The model `{name}` does not exist; served are {', '.join(self.names)}.")

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Do some short `work` in the model's thread, if not too many wait for it already."""
        if self._one_thread.statistics().tasks_waiting >= WAITING_LIMIT:
            raise HTTPException(503, f"{WAITING_LIMIT} requests wait for the model already; try again soon.")
        return await trio.to_thread.run_sync(work, limiter=self._one_thread)


def build_app(front: EngineFront) -> FastAPI:
    """The calls of `front` as an application, with every error in OpenAI's shape."""
    app = FastAPI(title="p2pkv reference engine", docs_url=None, redoc_url=None, responses={"4XX": {"model": ErrorReply}})
    app.post("/v1/completions", response_model=CompletionReply)(front.complete)
    app.post("/tokenize")(front.tokenize)
    app.post("/detokenize")(front.detokenize)
    app.get("/v1/models")(front.models)
    app.get("/health")(front.health)
    app.add_exception_handler(InvalidRequestError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(Exception, _answer_bug)
    return app


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    match error:
        case HTTPException(status_code=status, detail=message):
            pass
        case RequestValidationError():
            status, message = 400, "; ".join(_problem(found) for found in error.errors()[:5])
        case _:
            status, message = 400, str(error)
    return _error(status, message)


async def _answer_bug(request: Request, bug: Exception) -> JSONResponse:
    structlog.get_logger(room="engine").error("call failed", path=request.url.path, exc_info=bug)
    return _error(500, "this is a bug in the engine; its log has the traceback")


def _error(status: int, message: str) -> JSONResponse:
    name = HTTPStatus(status).phrase.title().replace(" ", "")
    detail = ErrorDetail(message=message, type=f"{name.removesuffix('Error')}Error", param=None, code=status)
    return JSONResponse(ErrorReply(error=detail).model_dump(), status_code=status)


def _problem(found: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in found["loc"][1:])
    if not place or found["type"] == "json_invalid":
        return "the body must be a JSON object, sent with 'Content-Type: application/json'"
    return f"{place}: {found['msg']}"
