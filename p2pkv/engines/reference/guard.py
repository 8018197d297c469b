"""Who may talk to the engine's door: programs of this host, in bodies of a limited size; no web page."""

from collections.abc import Collection

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from p2pkv.browser_guard import refuse_browser
from p2pkv.engines.reference.openai import ErrorDetail, ErrorReply

MAX_BODY_NBYTES = 4 * 2**20
"""A prompt of 4,096 tokens takes some 20 KiB; parsing this much stalls the event loop for less than 0.1 s."""


class DoorGuard:
    """An ASGI application that lets through to another what is no browser's, and no larger than it should be."""

    def __init__(self, application: ASGIApp, ports: Collection[int]) -> None:
        self._application = application
        self._ports = ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        application = self._application
        if scope["type"] == "http":
            headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
            application = self._refusal(scope["method"], headers) or application
        await application(scope, receive, send)

    def _refusal(self, method: str, headers: dict[bytes, str]) -> ASGIApp | None:
        """The answer that refuses such a request; None when it may go on."""
        refusal = refuse_browser(
            host=headers.get(b"host"),
            origin=headers.get(b"origin"),
            fetch_site=headers.get(b"sec-fetch-site"),
            ports=self._ports,
        )
        if refusal is not None:
            return _error(refusal.status, "ForbiddenError", refusal.reason)
        return _size_refusal(method, headers)


def _size_refusal(method: str, headers: dict[bytes, str]) -> ASGIApp | None:
    length = headers.get(b"content-length", "")
    if method != "GET" and not length.isdecimal():
        return _error(411, "LengthRequiredError", "send a body with its Content-Length")
    if length.isdecimal() and int(length) > MAX_BODY_NBYTES:
        return _error(413, "ContentTooLargeError", f"the body has {length} bytes, at most {MAX_BODY_NBYTES} are taken")
    return None


def _error(status: int, kind: str, message: str) -> JSONResponse:
    reply = ErrorReply(error=ErrorDetail(message=message, type=kind, param=None, code=status))
    return JSONResponse(reply.model_dump(), status_code=status)
