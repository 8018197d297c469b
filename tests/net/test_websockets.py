"""The websocket door: what never becomes a websocket keeps no place, and a message costs what it contains."""

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio_websocket import ConnectionClosed, HandshakeError, WebSocketConnection, WebSocketRequest

from p2pkv.core.ids import Address
from p2pkv.net import websockets
from p2pkv.net.access import DoorGuard
from p2pkv.net.ports import listen_on
from p2pkv.net.websockets import PARTS_AT_ONCE, dial_websocket, serve_websockets

BINARY, TEXT, CONTINUATION, LAST = 2, 1, 0, 0x80


accepted_websockets: list[WebSocketConnection] = []


async def echo(request: WebSocketRequest) -> None:
    websocket = await request.accept()
    accepted_websockets.append(websocket)
    try:
        while True:
            await websocket.send_message(await websocket.get_message())
    except ConnectionClosed:
        pass
    finally:
        accepted_websockets.remove(websocket)


@asynccontextmanager
async def listening() -> AsyncIterator[Address]:
    with listen_on("127.0.0.1", 0, key="test") as bound:
        address = Address("127.0.0.1", bound.getsockname()[1])
        async with trio.open_nursery() as nursery:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(bound))
            await nursery.start(serve_websockets, listener, {"/": echo}, DoorGuard(frozenset({address.port})))
            yield address
            nursery.cancel_scope.cancel()


def fragment(head: int, payload: bytes) -> bytes:
    """A frame as a client sends it, masked with zeros."""
    return bytes([head, 0x80 | len(payload)]) + bytes(4) + payload


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nHost: local", b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"]
)
@pytest.mark.parametrize("is_reset", [False, True])
async def test_a_connection_that_ends_before_its_handshake_gives_its_place_back(
    monkeypatch: pytest.MonkeyPatch, sent: bytes, is_reset: bool
) -> None:
    monkeypatch.setattr(websockets, "MAX_CONNECTIONS", 1)
    async with listening() as address:
        with trio.fail_after(websockets.ACCEPT_S / 2):
            stream = await trio.open_tcp_stream(address.host, address.port)
            await stream.send_all(sent)
            if is_reset:
                stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, struct.pack("ii", 1, 0))
            await stream.aclose()
            await until_served(address)


async def until_served(address: Address) -> None:
    while True:
        try:
            async with dial_websocket([address], "/") as websocket:
                await websocket.send_message("here")
                assert await websocket.get_message() == "here"
                return
        except* websockets.WEBSOCKET_ERRORS:
            pass
        await trio.sleep(0.01)


async def test_a_door_that_ends_before_its_handshake_is_noticed_at_once() -> None:
    with listen_on("127.0.0.1", 0, key="test") as bound:
        address = Address("127.0.0.1", bound.getsockname()[1])

        async def accept_and_close(listener: trio.SocketListener) -> None:
            async with await listener.accept() as stream:
                await stream.receive_some()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_and_close, trio.SocketListener(trio.socket.from_stdlib_socket(bound)))
            with trio.fail_after(websockets.DIAL_S / 2), pytest.RaisesGroup(HandshakeError):
                async with dial_websocket([address], "/"):
                    pass


@pytest.mark.parametrize("kind", [BINARY, TEXT])
async def test_a_message_in_many_pieces_is_the_same_message(kind: int) -> None:
    pieces = [b"%d" % number if number % 3 else b"" for number in range(5 * PARTS_AT_ONCE)]
    async with listening() as address, dial_websocket([address], "/") as websocket:
        for _ in range(2):
            frames = [fragment(kind if number == 0 else CONTINUATION, piece) for number, piece in enumerate(pieces)]
            await websocket._stream.send_all(b"".join(frames) + fragment(LAST | CONTINUATION, b"."))
            with trio.fail_after(5):
                message = await websocket.get_message()
            whole = b"".join(pieces) + b"."
            assert message == (whole if kind == BINARY else whole.decode())


@pytest.mark.parametrize("piece", [b"", b"x"])
async def test_few_pieces_of_a_message_are_kept_apart(piece: bytes) -> None:
    async with listening() as address, dial_websocket([address], "/") as websocket:
        await websocket._stream.send_all(fragment(BINARY, b"") + fragment(CONTINUATION, piece) * 10 * PARTS_AT_ONCE)
        with trio.fail_after(5):
            await websocket.ping(b"all taken")
        (accepted,) = accepted_websockets
        assert len(accepted._message_parts) < PARTS_AT_ONCE + 10
