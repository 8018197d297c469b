"""A completion on its way to its client: as one object when it is done, or as server-sent events while it is written.

The model waits for no reader. A client that goes away, or falls too far behind, ends the computation.
"""

import secrets
import time
from collections.abc import Awaitable, Callable

import structlog
import trio
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from p2pkv.engines.reference.engine import Completion, Piece
from p2pkv.engines.reference.openai import (
    Choice,
    CompletionChunk,
    CompletionReply,
    CompletionRequest,
    PromptTokensDetails,
    StreamOptions,
    Usage,
)

UNREAD_LIMIT = 1024
"""Pieces that may wait for their reader, some 3 s of an answer, besides the megabytes that the system holds for it. One that is
so far behind has stopped, or reads more slowly than it is worth keeping the model's thread busy for."""

Compute = Callable[[Callable[[Piece], None]], Awaitable[Completion]]
"""Computes the completion; calls its argument, in another thread, with each piece of it."""


class CompletionResponse(Response):
    """The answer to one request, computed while it is sent.

    Args:
        request: What was asked.
        prompt_tokens: Its prompt.
        compute: The work. Cancelled when the client has gone.
    """

    def __init__(self, request: CompletionRequest, prompt_tokens: list[int], compute: Compute) -> None:
        super().__init__()
        self._request = request
        self._prompt_tokens = prompt_tokens
        self._compute = compute
        self._id = f"cmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._options = request.stream_options or StreamOptions()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_gone, receive, nursery.cancel_scope)
            if self._request.stream:
                await self._stream(send)
            else:
                await self._reply(await self._compute(lambda _: None))(scope, receive, send)
            nursery.cancel_scope.cancel()

    def _reply(self, done: Completion) -> Response:
        choice = Choice(
            text=done.text,
            finish_reason=done.finish_reason,
            stop_reason=done.stop_reason,
            token_ids=done.answer_tokens if self._request.return_token_ids else None,
            prompt_token_ids=done.prompt_tokens if self._request.return_token_ids else None,
        )
        reply = CompletionReply(
            id=self._id, created=self._created, model=self._request.model, choices=(choice,), usage=_usage(done)
        )
        return Response(reply.model_dump_json(), media_type="application/json")

    async def _stream(self, send: Send) -> None:
        """Send the pieces as they come, then why the answer ended, then the usage if asked for."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        to_reader, pieces = trio.open_memory_channel[Piece](UNREAD_LIMIT)

        def emit(piece: Piece) -> None:
            trio.from_thread.run_sync(to_reader.send_nowait, piece)

        done = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_pieces, pieces, send)
            with to_reader:
                try:
                    done = await self._compute(emit)
                except trio.WouldBlock:
                    structlog.get_logger(room="engine").warning("a reader fell behind and was cut off", unread=UNREAD_LIMIT)
                    nursery.cancel_scope.cancel()
        if done is None:
            return  # without an end, so that the client can tell
        end = Choice(text="", finish_reason=done.finish_reason, stop_reason=done.stop_reason, token_ids=self._token_ids(()))
        await _send_event(send, self._chunk(end))
        if self._options.include_usage:
            await _send_event(send, self._chunk(usage=_usage(done)))
        await _send_event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_pieces(self, pieces: trio.MemoryReceiveChannel[Piece], send: Send) -> None:
        prompt_token_ids = self._token_ids(tuple(self._prompt_tokens))
        async for piece in pieces:
            choice = Choice(text=piece.text, token_ids=self._token_ids(piece.tokens), prompt_token_ids=prompt_token_ids)
            await _send_event(send, self._chunk(choice))
            prompt_token_ids = None  # they come with the first piece only

    def _chunk(self, *choices: Choice, usage: Usage | None = None) -> str:
        chunk = CompletionChunk(id=self._id, created=self._created, model=self._request.model, choices=choices, usage=usage)
        return chunk.model_dump_json(exclude=None if self._options.include_usage else {"usage"})

    def _token_ids(self, tokens: tuple[int, ...]) -> tuple[int, ...] | None:
        return tokens if self._request.return_token_ids else None


def _usage(done: Completion) -> Usage:
    prompt_count, answer_count = len(done.prompt_tokens), len(done.answer_tokens)
    return Usage(
        prompt_tokens=prompt_count,
        completion_tokens=answer_count,
        total_tokens=prompt_count + answer_count,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=done.cached_count),
    )


async def _cancel_when_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _send_event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
