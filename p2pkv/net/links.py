"""Links to peers: websockets that carry messages, and know nothing of what they say but that a `Hello` tells who it is from.

On a new websocket both ends prove first that they belong to the cluster; who can't is refused, and nothing is reported. After
that each link reports `LinkOpened`, then a `MessageReceived` for each message, then `LinkLost`; the first and the last exactly
once. A short message goes out at once when none waits before it; any other is enqueued for the task that writes. A peer that
doesn't read fast enough loses its link and holds nobody up. A peer that sends what is no message is told so in a `Goodbye` and
disconnected; the others don't notice.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest

from p2pkv.core.events import DialFailed, LinkLost, LinkOpened, MessageReceived
from p2pkv.core.ids import Address, LinkId
from p2pkv.core.messages import Goodbye, Hello, Message
from p2pkv.errors import DialRefusedError, ErrorCode, Failure, RemoteProtocolError
from p2pkv.net.dial_rules import DialRules
from p2pkv.net.driver import EventSink
from p2pkv.net.logs import logger
from p2pkv.net.proof import Prover
from p2pkv.net.websockets import (
    WEBSOCKET_ERRORS,
    Connect,
    Websocket,
    connect_tcp,
    dial_websocket,
    end_name,
    first_reason,
)
from p2pkv.wire.codec import peer_codec
from p2pkv.wire.limits import MAX_MESSAGE_NBYTES
from p2pkv.wire.proof import Who

PEER_PATH = "/peer"
STALL_S = 5.0
"""A peer that takes longer for one message loses its link: it is as good as dead to those who wait for the next one."""
FLUSH_S = 0.5
"""A link that is closed may spend so long on what was sent before and on the closing handshake; leaving takes 2 s in all."""
QUEUE_MESSAGES = 1024
"""Of one link's outgoing queue: a snapshot of a million entries makes 500. A full queue closes the link."""
QUEUE_NBYTES = 4 * MAX_MESSAGE_NBYTES
"""The same in bytes: four of the longest messages."""
POLICY_VIOLATION = 1008
"""RFC 6455, section 7.4.1."""

_log = logger("links")


class _Link:
    """One open websocket, and what is queued for it."""

    def __init__(self, link: LinkId, websocket: Websocket, proven: Who) -> None:
        self.id = link
        self.peer = end_name(websocket.remote)
        self._proven = proven
        self.scope = trio.CancelScope()
        self.loss = "cancelled"
        self._websocket = websocket
        self._into_queue, self._queue = trio.open_memory_channel[bytes](QUEUE_MESSAGES)
        self._queued_nbytes = 0
        self._is_closing = False

    def send(self, message: Message) -> None:
        """Send `message` or enqueue it, unless the link is closing."""
        if self._is_closing:
            return
        data = peer_codec().encode(message)
        if not self._queued_nbytes and self._websocket.send_now(data):
            return
        self._queued_nbytes += len(data)
        try:
            self._into_queue.send_nowait(data)
            is_full = self._queued_nbytes > QUEUE_NBYTES
        except trio.WouldBlock:
            is_full = True
        if is_full:
            self._abort("it doesn't read what it is sent")

    def close(self, reason: str) -> None:
        """Send what is queued, then close, within `FLUSH_S`. The first reason given is the one reported."""
        if not self._is_closing:
            self._is_closing = True
            self.loss = reason
            self._into_queue.close()
            self.scope.deadline = trio.current_time() + FLUSH_S

    def _abort(self, reason: str) -> None:
        self.close(reason)
        self.scope.cancel()

    async def write(self) -> None:
        """Send what is queued until `close`, then end the websocket."""
        try:
            async for data in self._queue:
                with trio.move_on_after(STALL_S) as stall:
                    await self._websocket.send_message(data)
                if stall.cancelled_caught:
                    self._abort(f"it didn't take a message within {STALL_S:g} s")
                self._queued_nbytes -= len(data)
            await self._websocket.aclose()
        except ConnectionClosed as closed:
            self.close(_closed_reason(closed))

    async def read(self, report: EventSink) -> None:
        """Report what comes in, until the websocket ends or the peer breaks the protocol."""
        try:
            await self._websocket.take_each(partial(self._take, report))
        except ConnectionClosed as closed:
            self.close(_closed_reason(closed))

    def _take(self, report: EventSink, data: str | bytes) -> None:
        if self._is_closing:
            return
        try:
            message = _decode(data)
            if isinstance(message, Hello) and _who(message) != self._proven:
                raise RemoteProtocolError("its Hello is another's than it has proven to be")
        except RemoteProtocolError as error:
            _log.warning("a peer broke the protocol", link=self.id, peer=self.peer, reason=str(error))
            self.send(Goodbye(Failure(ErrorCode.PROTOCOL_ERROR, str(error))))
            self.close(f"it broke the protocol: {error}")
            return
        report(MessageReceived(self.id, message))


class PeerLinks:
    """All links of a node, dialed and accepted.

    Args:
        prover: Proves that this node belongs to the cluster, and finds out who else does.
        dial_rules: Which addresses may be dialed.
        connect: Makes the connections to them.
    """

    def __init__(self, prover: Prover, dial_rules: DialRules, connect: Connect = connect_tcp) -> None:
        self._prover = prover
        self._dial_rules = dial_rules
        self._connect = connect
        self._links: dict[LinkId, _Link] = {}
        self._ids = count(1)
        self._link_lost = trio.Event()

    async def dial(self, address: Address, report: EventSink) -> None:
        """Open a link to `address` and keep it until it is lost; reports `DialFailed`, or `LinkOpened` and all that follows."""
        failure: str | None = None
        is_open = False
        try:
            places = await self._dial_rules.permitted(address)
            async with dial_websocket(places, PEER_PATH, connect=self._connect) as websocket:
                proven = await self._prove(websocket, self._prover.prove_to_acceptor)
                if proven is not None:
                    is_open = True
                    await self._keep(websocket, proven, address, report)
        except* (*WEBSOCKET_ERRORS, DialRefusedError) as errors:
            failure = first_reason(errors)
        if not is_open:
            _log.debug("dial failed", address=str(address), reason=failure)
            report(DialFailed(address, failure or "it isn't of this cluster"))

    async def accept(self, request: WebSocketRequest, report: EventSink) -> None:
        """Accept a peer's websocket and keep the link until it is lost, reporting all that happens to it."""
        websocket = await request.accept()
        assert isinstance(websocket, Websocket), "the door made it"
        proven = await self._prove(websocket, self._prover.prove_to_dialer)
        if proven is not None:
            await self._keep(websocket, proven, None, report)

    def send(self, link: LinkId, message: Message) -> None:
        """Send `message` or enqueue it; on a link that is lost already, nothing happens. A full queue closes the link."""
        if link in self._links:
            self._links[link].send(message)

    def close(self, link: LinkId, reason: str) -> None:
        """Close `link`, if it isn't lost already, after what was sent on it."""
        if link in self._links:
            self._links[link].close(reason)

    async def close_all(self, reason: str) -> None:
        """Close every link after what was sent on it; takes `FLUSH_S` at most."""
        for link in self._links.values():
            link.close(reason)
        while self._links:
            await self._link_lost.wait()

    async def _prove(self, websocket: Websocket, prove: Callable[[WebSocketConnection], Awaitable[Who]]) -> Who | None:
        """Who is at the other end; None when it was refused, or refuses us."""
        peer = end_name(websocket.remote)
        try:
            return await prove(websocket)
        except RemoteProtocolError as error:
            _log.warning("a peer was refused", peer=peer, reason=str(error))
            with trio.move_on_after(FLUSH_S):
                await websocket.aclose(POLICY_VIOLATION, "refused")
        except ConnectionClosed as closed:
            _log.warning("a proof was broken off", peer=peer, reason=_closed_reason(closed))
        return None

    async def _keep(self, websocket: Websocket, proven: Who, dialed: Address | None, report: EventSink) -> None:
        link = _Link(next(self._ids), websocket, proven)
        self._links[link.id] = link
        report(LinkOpened(link.id, dialed))
        try:
            with link.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(link.write)
                    await link.read(report)
        finally:
            del self._links[link.id]
            self._link_lost.set()
            self._link_lost = trio.Event()
            _log.info("link lost", link=link.id, peer=link.peer, reason=link.loss)
            report(LinkLost(link.id, link.loss))


def _who(hello: Hello) -> Who:
    return Who(hello.me.instance, hello.me.generation, hello.versions)


def _decode(data: str | bytes) -> Message:
    if isinstance(data, str):
        raise RemoteProtocolError("a text message; peers speak msgpack")
    return peer_codec().decode(data)


def _closed_reason(closed: ConnectionClosed) -> str:
    reason = closed.reason
    return "the connection broke" if reason is None else f"it closed the link: {reason.reason or reason.name}"
