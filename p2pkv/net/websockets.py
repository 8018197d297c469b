"""Websockets, from the port to the handshake: the door that routes them by path, and dialing one.

What the other end does wrong until then, and in frames later, ends its connection and nothing else. (trio sets TCP_NODELAY on
its sockets by itself.)
"""

import fcntl
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NoReturn

import trio
import wsproto.utilities
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    Endpoint,
    HandshakeError,
    WebSocketConnection,
    WebSocketRequest,
)
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import AcceptConnection, BytesMessage, Request, TextMessage

from p2pkv.browser_guard import Refusal
from p2pkv.core.ids import Address
from p2pkv.net.access import DoorGuard
from p2pkv.net.logs import logger
from p2pkv.net.names import connect
from p2pkv.net.validation import MAX_BODY_NBYTES
from p2pkv.wire.limits import MAX_MESSAGE_NBYTES

DIAL_S = 1.5
"""Connecting and the websocket's handshake together. A dial that takes longer says no more than a suspicion does anyway."""
ACCEPT_S = 5.0
"""A connection that hasn't asked for a websocket by then is closed."""
MAX_CONNECTIONS = 1024
"""Open at once; more are closed unread. A full mesh of 1,024 members, which is also the most that a `Hello` can name."""
RECEIVE_NBYTES = 64 * 1024
"""Of one read; trio-websocket's own 4 KiB would make 2,000 reads of the longest message."""
MAX_ACCEPTED_NBYTES = max(MAX_MESSAGE_NBYTES, MAX_BODY_NBYTES)
"""The longest message that any of the websockets here takes; each refuses itself what is too long for it."""

SEND_NOW_NBYTES = 4096
"""A longer message waits its turn."""
_SIOCOUTQNSD = 0x894B
"""`ioctl`: the bytes of a TCP socket that aren't sent yet (linux/sockios.h)."""

PARTS_AT_ONCE = 1024
"""Of one message, so many parts are kept before they are joined. The longest message in reads of `RECEIVE_NBYTES` has 256."""

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

Connect = Callable[[Sequence[Address]], Awaitable[tuple[Address, trio.abc.Stream]]]
"""Connects to the first of several addresses of one host that takes a connection, and says which one it is; raises OSError."""

_log = logger("websockets")


async def connect_tcp(places: Sequence[Address]) -> tuple[Address, trio.abc.Stream]:
    """As `names.connect`, within `DIAL_S`."""
    return await connect(places, within_s=DIAL_S)


async def serve_websockets(
    listener: trio.abc.Listener[trio.abc.Stream],
    routes: Mapping[str, WebsocketHandler],
    guard: DoorGuard,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve websockets by their path until cancelled; a path without a route gets 404.

    Args:
        listener: Bound and listening; of TCP, or of whatever else carries bytes in order.
        routes: By path, without a query.
        guard: Of this node's doors; whoever isn't a foreign web page gets to the routes.
        task_status: Told when connections are taken.
    """
    places = trio.Semaphore(MAX_CONNECTIONS)
    serve = partial(_serve_stream, routes=routes, guard=guard, places=places)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, [listener])
        task_status.started()


@asynccontextmanager
async def dial_websocket(
    places: Sequence[Address], path: str, headers: Sequence[tuple[bytes, bytes]] = (), *, connect: Connect = connect_tcp
) -> AsyncIterator["Websocket"]:
    """A websocket to `path`, open within `DIAL_S`; its connection is closed on exit, without a handshake.

    Args:
        places: Addresses of one host, to be tried in turn; at least one.
        path: Of the door.
        headers: Sent along.
        connect: Makes the connection.

    Raises:
        ExceptionGroup: Of `WEBSOCKET_ERRORS`.
    """
    async with trio.open_nursery() as nursery:
        with trio.fail_after(DIAL_S) as limit:
            place, connected = await connect(places)
            async with connected as stream:
                websocket = Websocket(
                    stream,
                    WSConnection(ConnectionType.CLIENT),
                    host=str(place),
                    path=path,
                    client_extra_headers=list(headers),
                    max_message_size=MAX_MESSAGE_NBYTES,
                    receive_buffer_size=RECEIVE_NBYTES,
                )
                nursery.start_soon(websocket.read)
                await websocket.wait_open()
                limit.deadline = math.inf
                yield websocket
                nursery.cancel_scope.cancel()


def limit_messages(websocket: WebSocketConnection, nbytes: int) -> None:
    """From now on a message of more than `nbytes` closes `websocket`. What has come in of one message counts too."""
    websocket._max_message_size = nbytes  # noqa: SLF001 - trio-websocket has it fixed before it knows who is there


def first_reason(errors: BaseExceptionGroup[BaseException]) -> str:
    """What went wrong first, as text."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ConnectionRejected):
        return f"it refused with HTTP status {error.status_code}"
    return str(error) or type(error).__name__


def end_name(end: Endpoint | str) -> str:
    """One end of a websocket, for people."""
    return end if isinstance(end, str) else f"{end.address}:{end.port}"


class Websocket(WebSocketConnection):
    """A websocket that ends at once if its handshake can't be completed, and whose messages cost what they contain.

    trio-websocket would wait on, and would keep each fragment of a message, however many there are and however empty. A message
    that it sends, or takes in, also needs several turns of the event loop: `send_now` and `take_each` need none.
    """

    _is_shaken = False
    _joined_count = 0
    _take: Callable[[str | bytes], None] | None = None

    async def read(self) -> None:
        """Take what comes, until the connection ends.

        Raises:
            HandshakeError: It ended before the websocket was asked for, or, dialed, before it was granted.
        """
        await self._reader_task()
        if not self._is_shaken:
            raise HandshakeError("it ended before the handshake")

    async def wait_open(self) -> None:
        """Wait until a dialed websocket is granted."""
        await self._open_handshake.wait()

    async def wait_request(self) -> WebSocketRequest:
        """Wait until an accepted connection has asked for a websocket."""
        return await self._get_request()

    def send_now(self, data: bytes) -> bool:
        """Send a short message at once, if the connection takes it whole without waiting; False when nothing was sent."""
        stream = self._stream
        is_ready = self._wsproto.state is ConnectionState.OPEN and not self._stream_lock.locked()
        if not is_ready or len(data) > SEND_NOW_NBYTES or not isinstance(stream, trio.SocketStream):
            return False
        frame = self._wsproto.send(BytesMessage(data))
        connection = stream.socket.fileno()
        try:
            if any(fcntl.ioctl(connection, _SIOCOUTQNSD, bytes(4))):
                return False
            sent = os.write(connection, frame)
        except OSError:
            return False  # what is wrong, whoever sends and waits is told
        if sent < len(frame):
            raise AssertionError("a socket that had nothing to send took part of a short message")
        return True

    async def take_each(self, take: Callable[[str | bytes], None]) -> NoReturn:
        """Give each message to `take` as it comes in.

        Raises:
            ConnectionClosed: The websocket has ended.
        """
        while True:
            take(await self.get_message())
            waiting = self._recv_channel.statistics()
            if not waiting.current_buffer_used and not waiting.tasks_waiting_send:
                self._take = take

    async def _handle_request_event(self, event: Request) -> None:
        self._is_shaken = True
        await super()._handle_request_event(event)

    async def _handle_accept_connection_event(self, event: AcceptConnection) -> None:
        self._is_shaken = True
        await super()._handle_accept_connection_event(event)

    async def _handle_message_event(self, event: BytesMessage | TextMessage) -> None:
        if self._take is not None and event.message_finished and not self._message_parts:
            self._take(event.data if isinstance(event.data, str) else bytes(event.data))
            await trio.lowlevel.checkpoint()
            return
        if event.message_finished:
            self._take = None  # what comes next mustn't overtake this one, which waits for `take_each`
        await super()._handle_message_event(event)
        parts: list[Any] = self._message_parts  # all bytes, or all text
        if len(parts) <= 1:
            self._joined_count = 0  # a message has ended, or begun
        if len(parts) - self._joined_count == PARTS_AT_ONCE:
            joined = parts[0][:0].join(parts[self._joined_count :])
            parts[self._joined_count :] = [joined] if joined else []
            self._joined_count = len(parts)


async def _serve_stream(
    stream: trio.abc.Stream, *, routes: Mapping[str, WebsocketHandler], guard: DoorGuard, places: trio.Semaphore
) -> None:
    try:
        places.acquire_nowait()
    except trio.WouldBlock:
        _log.warning("too many connections", limit=MAX_CONNECTIONS)
        await trio.aclose_forcefully(stream)
        return
    try:
        async with stream, trio.open_nursery() as nursery:
            websocket = Websocket(
                stream,
                WSConnection(ConnectionType.SERVER),
                max_message_size=MAX_ACCEPTED_NBYTES,
                receive_buffer_size=RECEIVE_NBYTES,
            )
            nursery.start_soon(websocket.read)
            with trio.fail_after(ACCEPT_S):
                request = await websocket.wait_request()
            await _route(request, routes, guard)
            nursery.cancel_scope.cancel()
    except* WEBSOCKET_ERRORS as errors:
        _log.info("a connection ended", reason=first_reason(errors))
    finally:
        places.release()


async def _route(request: WebSocketRequest, routes: Mapping[str, WebsocketHandler], guard: DoorGuard) -> None:
    refusal = guard.refuse_page(headers_of(request))
    handler = routes.get(request.path.partition("?")[0])
    if refusal is None and handler is not None:
        await handler(request)
        return
    refusal = refusal or Refusal(404, "there is no such websocket here")
    _log.info("a websocket was refused", path=request.path, status=refusal.status, reason=refusal.reason)
    with trio.fail_after(ACCEPT_S):
        await request.reject(refusal.status, body=refusal.reason.encode())


def headers_of(request: WebSocketRequest) -> dict[bytes, str]:
    """The headers of the request for a websocket, by their names in lower case."""
    headers = {name: value.decode("latin-1") for name, value in request.headers}
    headers[b"host"] = request._event.host  # noqa: SLF001 - the one header that trio-websocket leaves out of `headers`
    return headers
