"""Serving the HTTP shim: Hypercorn on sockets that the node has bound, behind the guard against browsers."""

import socket
from collections.abc import Collection, Sequence

import trio
from hypercorn.config import Config
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from p2pkv.browser_guard import refuse_browser
from p2pkv.http_server import serve
from p2pkv.net.driver import Driver
from p2pkv.net.http.app import build_app
from p2pkv.net.http.errors import FORBIDDEN, error_reply

KEEP_ALIVE_S = 20.0
"""A connection without a request, or with one whose headers don't end, is closed after this."""
MAX_HEADER_NBYTES = 16 * 1024
UNREAD_LIMIT_MS = 1000
"""A client that takes nothing of its answer for so long is cut off: Hypercorn waits for it even when it is cancelled."""

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)


class BrowserGuard:
    """An ASGI application that lets through to another what no foreign web page has sent, and hardens its answers."""

    def __init__(self, application: ASGIApp, ports: Collection[int]) -> None:
        self._application = application
        self._ports = ports

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
        refusal = refuse_browser(
            host=headers.get(b"host"),
            origin=headers.get(b"origin"),
            fetch_site=headers.get(b"sec-fetch-site"),
            ports=self._ports,
        )
        application = self._application
        if refusal is not None:
            application = error_reply(refusal.status, error=FORBIDDEN, detail=refusal.reason)
        await application(scope, receive, send_hardened)


async def serve_http(
    driver: Driver,
    listeners: Sequence[socket.socket],
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """Serve the shim until cancelled.

    Args:
        driver: Of this node.
        listeners: Bound TCP sockets, which become the server's.
        task_status: Told when requests are taken.
    """
    ports = frozenset(listener.getsockname()[1] for listener in listeners)
    for listener in listeners:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_LIMIT_MS)
    config = Config()
    config.bind = [f"fd://{listener.detach()}" for listener in listeners]
    config.accesslog = config.errorlog = None
    config.include_server_header = False
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.h11_max_incomplete_size = config.h2_max_header_list_size = MAX_HEADER_NBYTES
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, BrowserGuard(build_app(driver), ports), config)
        task_status.started()
