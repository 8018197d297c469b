"""The calls over HTTP: their methods and paths, and what OpenAPI says of them."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response

from p2pkv.net import calls
from p2pkv.net.calls import Call
from p2pkv.net.driver import Driver
from p2pkv.net.http.bodies import documentation, read_request
from p2pkv.net.http.errors import add_error_handlers
from p2pkv.net.replies import ErrorReply

ROUTES: tuple[tuple[str, str, Call[Any, Any]], ...] = (
    ("POST", "/move", calls.MOVE),
    ("POST", "/lookup", calls.LOOKUP),
    ("POST", "/full_lookup", calls.FULL_LOOKUP),
    ("POST", "/health", calls.HEALTH),
    ("POST", "/query_instance", calls.QUERY_INSTANCE),
    ("POST", "/query_worker_info", calls.QUERY_WORKER_INFO),
    ("POST", "/clear", calls.CLEAR),
    ("POST", "/pin", calls.PIN),
    ("POST", "/unpin", calls.UNPIN),
    ("POST", "/compress", calls.COMPRESS),
    ("POST", "/decompress", calls.DECOMPRESS),
    ("GET", "/inventory", calls.INVENTORY),
    ("POST", "/check_finish", calls.CHECK_FINISH),
    ("GET", "/events", calls.EVENTS),
    ("GET", "/events/{event_id}", calls.EVENT),
    ("DELETE", "/events/{event_id}", calls.CANCEL),
    ("GET", "/members", calls.MEMBERS),
    ("GET", "/livez", calls.LIVEZ),
    ("GET", "/readyz", calls.READYZ),
)
"""A POST's fields are its JSON body; others have theirs in path and query."""


def build_app(driver: Driver) -> FastAPI:
    """The shim of the node that `driver` drives. It serves no pages: those that show an API load foreign scripts."""
    app = FastAPI(
        title="p2pkv",
        description="Moves KV caches between LLM engines. The same calls on every node.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={422: {"model": ErrorReply}, "4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}},
    )
    for method, path, call in ROUTES:
        app.add_api_route(
            path,
            _endpoint(driver, call),
            methods=[method],
            name=call.name,
            description=call.summary,
            response_model=call.reply,
            openapi_extra=documentation(method, path, call.body_adapter),
        )
    add_error_handlers(app)
    return app


def _endpoint(driver: Driver, call: Call[Any, Any]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        reply = await call.run(driver, await read_request(request, call.body_adapter))
        return Response(call.reply_adapter.dump_json(reply), media_type="application/json")

    return endpoint
