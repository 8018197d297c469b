"""Websockets, from the port to the handshake: the door that routes them by path, and dialing one.

What the other end does wrong until then, and in frames later, ends its connection and nothing else. (trio sets TCP_NODELAY on
its sockets by itself.)
"""

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from functools import partial

import trio
import wsproto.utilities
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    HandshakeError,
    WebSocketConnection,
    WebSocketRequest,
    wrap_client_stream,
    wrap_server_stream,
)

from p2pkv.browser_guard import Refusal, refuse_browser
from p2pkv.core.ids import Address
from p2pkv.net.logs import logger
from p2pkv.wire.limits import MAX_MESSAGE_NBYTES

DIAL_S = 1.5
"""Connecting and the websocket's handshake together. Three of them fit into the 5 s in which a dead member must be noticed."""
ACCEPT_S = 5.0
"""A connection that hasn't asked for a websocket by then is closed."""
MAX_CONNECTIONS = 1024
"""Open at once; more are closed unread. A full mesh of 1,024 members, which is also the most that a `Hello` can name."""
RECEIVE_NBYTES = 64 * 1024
"""Of one read; trio-websocket's own 4 KiB would make 2,000 reads of the longest message."""

WEBSOCKET_ERRORS = (
    ConnectionClosed,
    HandshakeError,
    wsproto.utilities.ProtocolError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    OSError,
    UnicodeError,
)
"""All that the other end can make trio-websocket raise; UnicodeError is for a `Host` that is no text."""

WebsocketHandler = Callable[[WebSocketRequest], Awaitable[None]]
"""Accepts the request and keeps the websocket until it is done with it."""

_log = logger("websockets")


async def serve_websockets(
    listener: trio.SocketListener,
    routes: Mapping[str, WebsocketHandler],
    ports: Collection[int],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve websockets by their path until cancelled; a path without a route gets 404.

    Args:
        listener: Bound and listening.
        routes: By path, without a query.
        ports: All that this node's doors listen on, for the browser guard.
        task_status: Told when connections are taken.
    """
    places = trio.Semaphore(MAX_CONNECTIONS)
    serve = partial(_serve_stream, routes=routes, ports=ports, places=places)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, [listener])
        task_status.started()


@asynccontextmanager
async def dial_websocket(address: Address, path: str) -> AsyncIterator[WebSocketConnection]:
    """A websocket to `path` at `address`, open within `DIAL_S`; its connection is closed on exit, without a handshake.

    Raises:
        ExceptionGroup: Of `WEBSOCKET_ERRORS`.
    """
    async with trio.open_nursery() as nursery:
        with trio.fail_after(DIAL_S) as limit:
            async with await trio.open_tcp_stream(address.host, address.port) as stream:
                websocket = await wrap_client_stream(
                    nursery, stream, str(address), path, max_message_size=MAX_MESSAGE_NBYTES, receive_buffer_size=RECEIVE_NBYTES
                )
                limit.deadline = math.inf
                yield websocket
                nursery.cancel_scope.cancel()


def first_reason(errors: BaseExceptionGroup[BaseException]) -> str:
    """What went wrong first, as text."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ConnectionRejected):
        return f"it refused with HTTP status {error.status_code}"
    return str(error) or type(error).__name__


async def _serve_stream(
    stream: trio.SocketStream, *, routes: Mapping[str, WebsocketHandler], ports: Collection[int], places: trio.Semaphore
) -> None:
    try:
        places.acquire_nowait()
    except trio.WouldBlock:
        _log.warning("too many connections", limit=MAX_CONNECTIONS)
        await trio.aclose_forcefully(stream)
        return
    try:
        async with stream, trio.open_nursery() as nursery:
            with trio.fail_after(ACCEPT_S):
                request = await wrap_server_stream(
                    nursery, stream, max_message_size=MAX_MESSAGE_NBYTES, receive_buffer_size=RECEIVE_NBYTES
                )
            await _route(request, routes, ports)
            nursery.cancel_scope.cancel()
    except* WEBSOCKET_ERRORS as errors:
        _log.info("a connection ended", reason=first_reason(errors))
    finally:
        places.release()


async def _route(request: WebSocketRequest, routes: Mapping[str, WebsocketHandler], ports: Collection[int]) -> None:
    refusal = _refusal(request, ports)
    handler = routes.get(request.path.partition("?")[0])
    if refusal is None and handler is not None:
        await handler(request)
        return
    refusal = refusal or Refusal(404, "there is no such websocket here")
    _log.info("a websocket was refused", path=request.path, status=refusal.status, reason=refusal.reason)
    with trio.fail_after(ACCEPT_S):
        await request.reject(refusal.status, body=refusal.reason.encode())


def _refusal(request: WebSocketRequest, ports: Collection[int]) -> Refusal | None:
    headers = {name: value.decode("latin-1") for name, value in request.headers}
    return refuse_browser(
        host=request._event.host,  # noqa: SLF001 - the one header that trio-websocket leaves out of `headers`
        origin=headers.get(b"origin"),
        fetch_site=headers.get(b"sec-fetch-site"),
        ports=ports,
    )
