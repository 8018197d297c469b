"""Serving the HTTP shim: Hypercorn on sockets that the node listens on, behind the guard of its doors."""

import socket

import trio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from p2pkv.errors import ErrorCode
from p2pkv.http_server import config_for, serve
from p2pkv.net.access import UNAUTHORIZED, DoorGuard
from p2pkv.net.driver import Driver
from p2pkv.net.http.app import build_app
from p2pkv.net.http.errors import error_reply

MAX_HEADER_NBYTES = 16 * 1024
UNREAD_LIMIT_MS = 1000
"""A client that takes nothing of its answer for so long is cut off: Hypercorn waits for it even when it is cancelled."""

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)


class Guarded:
    """An ASGI application that lets through to another what `guard` doesn't refuse, and hardens its answers."""

    def __init__(self, application: ASGIApp, guard: DoorGuard) -> None:
        self._application = application
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return

        async def send_hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *SECURITY_HEADERS]}
            await send(message)

        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._guard.refuse_page(headers) or self._guard.access(headers).refuse_http(scope["method"], scope["path"])
        application = self._application
        if refusal is not None and refusal.status == UNAUTHORIZED:
            application = error_reply(UNAUTHORIZED, error=ErrorCode.UNAUTHORIZED, detail=refusal.reason)
            application.headers["www-authenticate"] = "Bearer"
        elif refusal is not None:
            application = error_reply(refusal.status, error=ErrorCode.FORBIDDEN, detail=refusal.reason)
        await application(scope, receive, send_hardened)


def guarded_app(driver: Driver, guard: DoorGuard) -> ASGIApp:
    """The shim of the node that `driver` drives, behind its guard.

    Args:
        driver: Of this node.
        guard: Of this node's doors.
    """
    return Guarded(build_app(driver), guard)


async def serve_http(application: ASGIApp, listener: socket.socket, *, task_status: trio.TaskStatus[None]) -> None:
    """Serve the shim at one port until cancelled.

    Args:
        application: As `guarded_app` gives it; it may serve several ports.
        listener: A listening TCP socket, which becomes the server's.
        task_status: Told when requests are taken.
    """
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_LIMIT_MS)
    config = config_for(listener)
    config.h11_max_incomplete_size = config.h2_max_header_list_size = MAX_HEADER_NBYTES
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, application, config)
        task_status.started()
