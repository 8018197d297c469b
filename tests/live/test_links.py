"""Links between peers over real sockets: what is sent arrives, and whoever misbehaves harms only himself."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest

from p2pkv.core.events import DialFailed, Event, LinkLost, LinkOpened, MessageReceived
from p2pkv.core.ids import Address, LinkId, Location, Position
from p2pkv.core.keys import Identity
from p2pkv.core.messages import Goodbye, Hello, Message, Ping, PlanRequest, Pong
from p2pkv.core.records import MemberRecord, MemberState, Operation, Selection
from p2pkv.errors import ErrorCode, RemoteProtocolError
from p2pkv.net import links, websockets
from p2pkv.net.access import DoorGuard
from p2pkv.net.dial_rules import LOOPBACK, DialRules
from p2pkv.net.links import PEER_PATH, PeerLinks
from p2pkv.net.ports import listen_on
from p2pkv.net.proof import Prover
from p2pkv.net.websockets import dial_websocket, serve_websockets
from p2pkv.wire.codec import peer_codec
from p2pkv.wire.limits import MAX_MESSAGE_NBYTES
from p2pkv.wire.proof import Who

pytestmark = pytest.mark.live

OLD, NEW = Position("a", Location.LOCAL_CPU), Position("b", Location.LOCAL_CPU)
LONG = PlanRequest("event", OLD, NEW, Operation.MOVE, Selection.TOKENS, bytes(2**22), Identity(), model=None)
HANDSHAKE = (
    b"GET /peer HTTP/1.1\r\nHost: %b\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


def prover_of(instance: str, key: bytes = bytes(32)) -> Prover:
    return Prover(key, "test", Who(instance, 1, (1,)), door=PEER_PATH)


class Peer:
    """One end: its links, and what they have reported."""

    def __init__(self, prover: Prover | None = None) -> None:
        self.links = PeerLinks(prover or prover_of("peer"), DialRules(LOOPBACK))
        self.events: list[Event] = []
        self.address = Address("127.0.0.1", 1)
        self._news = trio.Event()

    def report(self, event: Event) -> None:
        self.events.append(event)
        self._news.set()
        self._news = trio.Event()

    async def wait_for(self, is_it: Callable[[Event], bool]) -> Event:
        with trio.fail_after(3):
            while True:
                for event in self.events:
                    if is_it(event):
                        return event
                await self._news.wait()

    async def wait_link(self) -> LinkId:
        event = await self.wait_for(lambda event: isinstance(event, LinkOpened))
        assert isinstance(event, LinkOpened)
        return event.link

    async def wait_lost(self) -> LinkLost:
        event = await self.wait_for(lambda event: isinstance(event, LinkLost))
        assert isinstance(event, LinkLost)
        return event

    async def wait_message(self, message: Message) -> None:
        await self.wait_for(lambda event: isinstance(event, MessageReceived) and event.message == message)

    def messages(self) -> list[Message]:
        return [event.message for event in self.events if isinstance(event, MessageReceived)]


@asynccontextmanager
async def listening() -> AsyncIterator[Peer]:
    peer = Peer()
    with listen_on("127.0.0.1", 0, key="test") as bound:
        peer.address = Address("127.0.0.1", bound.getsockname()[1])
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(bound))
        async with trio.open_nursery() as nursery:
            routes = {PEER_PATH: partial(peer.links.accept, report=peer.report)}
            await nursery.start(serve_websockets, listener, routes, DoorGuard(frozenset({peer.address.port})))
            yield peer
            nursery.cancel_scope.cancel()


@pytest.fixture
async def server() -> AsyncIterator[Peer]:
    async with listening() as peer:
        yield peer


@pytest.fixture
async def client(server: Peer, nursery: trio.Nursery) -> Peer:
    peer = Peer()
    nursery.start_soon(peer.links.dial, server.address, peer.report)
    await peer.wait_link()
    await server.wait_link()
    return peer


@asynccontextmanager
async def stranger(server: Peer) -> AsyncIterator[WebSocketConnection]:
    """Somebody who belongs to the cluster, and then does as he likes."""
    async with dial_websocket([server.address], PEER_PATH) as websocket:
        await prover_of("stranger").prove_to_acceptor(websocket)
        yield websocket


async def _binary(websocket: WebSocketConnection) -> bytes:
    message = await websocket.get_message()
    assert isinstance(message, bytes)
    return message


async def test_messages_arrive_both_ways_and_in_order(server: Peer, client: Peer) -> None:
    there, back = await client.wait_link(), await server.wait_link()
    for nonce in range(100):
        client.links.send(there, Ping(nonce))
        server.links.send(back, Pong(nonce))
    await server.wait_for(lambda event: event == MessageReceived(back, Ping(99)))
    await client.wait_for(lambda event: event == MessageReceived(there, Pong(99)))
    assert server.messages() == [Ping(nonce) for nonce in range(100)]
    assert client.messages() == [Pong(nonce) for nonce in range(100)]


async def test_short_messages_do_not_overtake_long_ones(server: Peer, client: Peer) -> None:
    page = replace(LONG, tokens=bytes(2**18))
    link = await server.wait_link()
    for nonce in range(100):  # often, as trio draws which of two tasks goes first
        sent: list[Message] = [page, Ping(3 * nonce), page, Ping(3 * nonce + 1), Ping(3 * nonce + 2)]
        client.events.clear()
        for message in sent:
            server.links.send(link, message)
        await client.wait_message(sent[-1])
        assert client.messages() == sent


async def test_short_messages_that_a_slow_reader_has_no_room_for_wait_and_arrive(server: Peer) -> None:
    """Its end's buffers fill; from then on messages queue, and none is lost, torn or out of order."""
    count = links.QUEUE_MESSAGES // 2
    page = replace(LONG, tokens=bytes(websockets.SEND_NOW_NBYTES // 2))
    async with stranger(server) as websocket:
        link = await server.wait_link()
        sent: list[Message] = [LONG]
        for index in range(count):
            sent += [replace(page, event_id=str(index))]
        for message in sent:
            server.links.send(link, message)
        received: list[Message] = []
        with trio.fail_after(10):
            while len(received) < len(sent):
                received.append(peer_codec().decode(await _binary(websocket)))
        assert received == sent


async def test_what_comes_right_behind_the_proof_is_reported_in_order(server: Peer) -> None:
    async with stranger(server) as websocket:
        for nonce in range(20):
            await websocket.send_message(peer_codec().encode(Ping(nonce)))
        link = await server.wait_link()
        await server.wait_for(lambda event: event == MessageReceived(link, Ping(19)))
        assert server.messages() == [Ping(nonce) for nonce in range(20)]


async def test_nothing_after_garbage_is_reported(server: Peer) -> None:
    async with stranger(server) as websocket:
        for said in (peer_codec().encode(Ping(1)), peer_codec().encode(Ping(2)), b"garbage", peer_codec().encode(Ping(3))):
            await websocket.send_message(said)
        await server.wait_lost()
    assert server.messages() == [Ping(1), Ping(2)]


async def test_only_the_end_that_dialed_is_told_the_address(server: Peer, client: Peer) -> None:
    assert client.events[0] == LinkOpened(await client.wait_link(), server.address)
    assert server.events[0] == LinkOpened(await server.wait_link(), None)


async def test_the_longest_message_passes(server: Peer, client: Peer) -> None:
    client.links.send(await client.wait_link(), LONG)
    await server.wait_for(lambda event: isinstance(event, MessageReceived))
    assert server.messages() == [LONG]


async def test_a_closed_link_delivers_what_was_sent_before(server: Peer, client: Peer) -> None:
    link = await client.wait_link()
    for nonce in range(10):
        client.links.send(link, Ping(nonce))
    client.links.close(link, "enough")
    client.links.send(link, Ping(99))
    await server.wait_lost()
    assert server.messages() == [Ping(nonce) for nonce in range(10)]
    assert await client.wait_lost() == LinkLost(link, "enough")


async def test_each_end_reports_one_opening_and_one_loss_in_that_order(server: Peer, client: Peer) -> None:
    client.links.close(await client.wait_link(), "enough")
    client.links.close(await client.wait_link(), "twice")
    for peer in (client, server):
        await peer.wait_lost()
        assert [type(event) for event in peer.events] == [LinkOpened, LinkLost]


async def test_closing_all_waits_until_all_are_lost(server: Peer, client: Peer) -> None:
    await server.links.close_all("leaving")
    assert isinstance(server.events[-1], LinkLost)
    await client.wait_lost()


async def test_orders_for_a_lost_link_do_nothing(server: Peer) -> None:
    server.links.send(99, Ping(1))
    server.links.close(99, "never was")
    assert server.events == []


async def test_nobody_there_is_a_failed_dial() -> None:
    peer = Peer()
    with listen_on("127.0.0.1", 0, key="test") as free:
        address = Address("127.0.0.1", free.getsockname()[1])
    await peer.links.dial(address, peer.report)
    assert [type(event) for event in peer.events] == [DialFailed]


async def test_an_address_elsewhere_is_not_even_dialed() -> None:
    peer = Peer()
    address = Address("192.0.2.1", 8002)  # RFC 5737: nobody's
    await peer.links.dial(address, peer.report)
    assert peer.events == [DialFailed(address, "192.0.2.1 is neither a contact nor in allowed_peer_networks")]


async def test_somebody_who_never_answers_is_a_failed_dial_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websockets, "DIAL_S", 0.05)
    peer = Peer()
    with listen_on("127.0.0.1", 0, key="test") as silent:
        await peer.links.dial(Address("127.0.0.1", silent.getsockname()[1]), peer.report)
    assert [type(event) for event in peer.events] == [DialFailed]


async def test_a_door_that_refuses_is_a_failed_dial() -> None:
    peer = Peer()
    with listen_on("127.0.0.1", 0, key="test") as bound:
        address = Address("127.0.0.1", bound.getsockname()[1])
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(bound))
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_websockets, listener, {}, DoorGuard(frozenset({address.port})))
            await peer.links.dial(address, peer.report)
            nursery.cancel_scope.cancel()
    assert peer.events == [DialFailed(address, "it refused with HTTP status 404")]


@pytest.mark.parametrize(
    "garbage", [b"", b"\xc1", b"\x80", b"\xdd\xff\xff\xff\xff", peer_codec().encode(Ping(1)) + b"\x00", "text"]
)
async def test_garbage_gets_a_goodbye_and_the_others_do_not_notice(server: Peer, client: Peer, garbage: bytes | str) -> None:
    async with stranger(server) as websocket:
        await websocket.send_message(garbage)
        with trio.fail_after(2):
            data = await websocket.get_message()
        assert isinstance(data, bytes)
        goodbye = peer_codec().decode(data)
        assert isinstance(goodbye, Goodbye)
        assert goodbye.failure.code is ErrorCode.PROTOCOL_ERROR
        with trio.fail_after(2), pytest.raises(ConnectionClosed):
            await websocket.get_message()
    assert "broke the protocol" in (await server.wait_lost()).reason
    client.links.send(await client.wait_link(), Ping(5))
    await server.wait_for(lambda event: isinstance(event, MessageReceived))
    assert server.messages() == [Ping(5)]


async def test_a_message_that_is_too_long_closes_the_link(server: Peer) -> None:
    async with stranger(server) as websocket:
        await websocket.send_message(bytes(MAX_MESSAGE_NBYTES + 1))
        await server.wait_lost()
    assert server.messages() == []


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff" * 100,
        b"GET /peer HTTP/1.1\r\n\r\n",
        b"POST /peer HTTP/1.1\r\nHost: localhost\r\n\r\n",
        HANDSHAKE % b"\xff\xfe",
        b"A" * 100_000,
    ],
)
async def test_what_is_no_websocket_ends_its_own_connection_only(server: Peer, client: Peer, garbage: bytes) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", server.address.port) as stream:
        with trio.fail_after(2):
            try:
                await stream.send_all(garbage)
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
    client.links.send(await client.wait_link(), Ping(5))
    await server.wait_for(lambda event: isinstance(event, MessageReceived))


async def test_broken_websocket_frames_end_their_link_only(server: Peer) -> None:
    async with stranger(server) as websocket:
        await server.wait_link()
        await websocket._stream.send_all(b"\xff" * 64)
        await server.wait_lost()


async def test_who_has_another_key_is_refused_with_that_word_and_nothing_is_reported(server: Peer) -> None:
    async with dial_websocket([server.address], PEER_PATH) as websocket:
        with pytest.raises(ConnectionClosed, match="reason=refused"):
            await prover_of("thief", b"another key").prove_to_acceptor(websocket)
    assert server.events == []


async def test_a_node_with_another_key_has_only_failed_to_dial(server: Peer) -> None:
    thief = Peer(prover_of("thief", b"another key"))
    await thief.links.dial(server.address, thief.report)
    assert [type(event) for event in thief.events] == [DialFailed]
    assert server.events == []


async def test_a_door_that_proves_nothing_is_told_nothing(client: Peer) -> None:
    heard: list[object] = []

    async def impostor(request: WebSocketRequest) -> None:
        websocket = await request.accept()
        with pytest.raises(RemoteProtocolError):
            await prover_of("impostor", b"another key").prove_to_dialer(websocket)
        await websocket.send_message(bytes(64))
        with pytest.raises(ConnectionClosed):
            heard.append(await websocket.get_message())

    with listen_on("127.0.0.1", 0, key="test") as bound:
        address = Address("127.0.0.1", bound.getsockname()[1])
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(bound))
        async with trio.open_nursery() as nursery:
            routes = {PEER_PATH: impostor}
            await nursery.start(serve_websockets, listener, routes, DoorGuard(frozenset({address.port})))
            victim = Peer()
            await victim.links.dial(address, victim.report)
            nursery.cancel_scope.cancel()
    assert victim.events == [DialFailed(address, "it isn't of this cluster")]
    assert heard == []


@pytest.mark.parametrize(
    ("instance", "generation", "versions"), [("b", 1, (1,)), ("stranger", 2, (1,)), ("stranger", 1, (1, 2))]
)
async def test_a_hello_from_another_than_was_proven_ends_the_link(
    server: Peer, instance: str, generation: int, versions: tuple[int, ...]
) -> None:
    me = MemberRecord(instance, generation, 0, MemberState.ALIVE, Address("h", 1), "http://h:2", None, None, "", (), ())
    async with stranger(server) as websocket:
        await websocket.send_message(peer_codec().encode(Hello(versions, "test", me, ())))
        assert "another's than it has proven to be" in (await server.wait_lost()).reason
    assert server.messages() == []


async def test_a_peer_that_vanishes_is_a_lost_link(server: Peer) -> None:
    async with stranger(server) as websocket:
        await server.wait_link()
        await trio.aclose_forcefully(websocket._stream)
        await server.wait_lost()


async def test_a_peer_that_does_not_read_loses_its_link_and_sending_never_waits(server: Peer) -> None:
    async with stranger(server):
        link = await server.wait_link()
        for _ in range(links.QUEUE_NBYTES // 2**22 + 2):
            server.links.send(link, LONG)
        assert await server.wait_lost() == LinkLost(link, "it doesn't read what it is sent")


async def test_too_many_messages_close_the_link_too(server: Peer, client: Peer) -> None:
    link = await server.wait_link()
    server.links.send(link, LONG)  # what is short and comes first wouldn't queue
    for nonce in range(links.QUEUE_MESSAGES + 2):
        server.links.send(link, Ping(nonce))
    await server.wait_lost()
    await client.wait_lost()


async def test_a_peer_that_takes_too_long_for_one_message_loses_its_link(server: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "STALL_S", 0.05)
    async with stranger(server):
        link = await server.wait_link()
        for _ in range(links.QUEUE_NBYTES // 2**22 - 1):  # more than fits into the sockets' buffers
            server.links.send(link, LONG)
        assert "didn't take a message" in (await server.wait_lost()).reason


@pytest.mark.parametrize("path", ["/", "/control", "/peers"])
async def test_an_unknown_path_is_404(server: Peer, path: str) -> None:
    request = HANDSHAKE % str(server.address).encode()
    assert await first_line(server, request.replace(b"/peer", path.encode())) == "HTTP/1.1 404 "


async def test_a_query_does_not_change_the_route(server: Peer) -> None:
    request = HANDSHAKE % str(server.address).encode()
    assert await first_line(server, request.replace(b"/peer", b"/peer?x=1")) == "HTTP/1.1 101 Switching Protocols"


async def test_a_foreign_host_is_421(server: Peer) -> None:
    assert await first_line(server, HANDSHAKE % b"evil.example") == "HTTP/1.1 421 "


@pytest.mark.parametrize("header", [b"Origin: http://evil.example", b"Sec-Fetch-Site: cross-site"])
async def test_a_foreign_page_is_403(server: Peer, header: bytes) -> None:
    assert await first_line(server, HANDSHAKE % (str(server.address).encode() + b"\r\n" + header)) == "HTTP/1.1 403 "


async def first_line(server: Peer, request: bytes) -> str:
    async with await trio.open_tcp_stream("127.0.0.1", server.address.port) as stream:
        await stream.send_all(request)
        with trio.fail_after(2):
            return (await stream.receive_some()).split(b"\r\n")[0].decode()


async def test_more_connections_than_the_limit_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websockets, "MAX_CONNECTIONS", 1)
    async with (
        listening() as server,
        stranger(server),
        await trio.open_tcp_stream("127.0.0.1", server.address.port) as second,
    ):
        with trio.fail_after(2):
            assert await second.receive_some() == b""
