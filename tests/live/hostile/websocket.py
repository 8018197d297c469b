"""A websocket made by hand: it can send any frame, also such as no library would."""

import struct
from random import Random
from typing import Self

import trio

from p2pkv.core.ids import Address
from tests.live.hostile.attack import END_S, receive, send

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
CONTINUATION = 0


class EndedError(Exception):
    """The node ended the websocket."""

    def __init__(self, code: int | None, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


def handshake(address: Address, path: str) -> bytes:
    """A valid request for a websocket."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    ).encode()


def frame(
    opcode: int, payload: bytes, *, is_last: bool = True, is_masked: bool = True, reserved: int = 0, nbytes: int | None = None
) -> bytes:
    """A frame as a client sends it. Its mask is zero, which leaves the payload as it is.

    Args:
        opcode: What it is.
        payload: What it carries.
        is_last: Whether it ends its message.
        is_masked: False breaks the protocol.
        reserved: Of the three reserved bits, others than 0 break the protocol.
        nbytes: What it claims to carry, if not its payload.
    """
    nbytes = len(payload) if nbytes is None else nbytes
    mask_bit, mask = (0x80, bytes(4)) if is_masked else (0, b"")
    head = struct.pack("!B", is_last << 7 | reserved << 4 | opcode)
    if nbytes < 126:
        return head + struct.pack("!B", mask_bit | nbytes) + mask + payload
    if nbytes < 2**16:
        return head + struct.pack("!BH", mask_bit | 126, nbytes) + mask + payload
    return head + struct.pack("!BQ", mask_bit | 127, nbytes) + mask + payload


class RawWebsocket:
    """The client's end, on an open connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._received = b""

    @classmethod
    async def open(cls, stream: trio.SocketStream, address: Address, path: str) -> Self:
        """Shake hands; EndedError when the node doesn't."""
        websocket = cls(stream)
        await websocket.send(handshake(address, path))
        status = await websocket._take_until(b"\r\n\r\n")
        assert status.startswith(b"HTTP/1.1 101 "), status
        return websocket

    async def send(self, data: bytes, *, bytewise: bool = False) -> None:
        """Send any bytes; EndedError when the node has ended the websocket."""
        if not await send(self.stream, data, bytewise=bytewise):
            raise EndedError(None, "")

    async def expect_end(self) -> EndedError:
        """How the node ends the websocket, which it must."""
        try:
            with trio.fail_after(END_S):
                while True:
                    await self.get_message()
        except EndedError as ended:
            return ended

    async def send_message(self, message: bytes) -> None:
        """Send a binary message."""
        await self.send(frame(BINARY, message))

    async def get_message(self) -> bytes:
        """The next message, text as its bytes; EndedError when there is none any more."""
        return await self._next((TEXT, BINARY))

    async def get_pong(self) -> bytes:
        """What the next pong carries; other frames before it are dropped."""
        return await self._next((PONG,))

    async def _next(self, opcodes: tuple[int, ...]) -> bytes:
        while True:
            first, second = await self._take(2)
            nbytes = second
            if second >= 126:
                (nbytes,) = struct.unpack("!H" if second == 126 else "!Q", await self._take(2 if second == 126 else 8))
            payload = await self._take(nbytes)
            if first & 0x0F == CLOSE:
                code = struct.unpack("!H", payload[:2])[0] if payload else None
                raise EndedError(code, payload[2:].decode())
            if first & 0x0F in opcodes:
                return payload

    async def _take(self, nbytes: int) -> bytes:
        while len(self._received) < nbytes:
            await self._receive_more()
        taken, self._received = self._received[:nbytes], self._received[nbytes:]
        return taken

    async def _take_until(self, end: bytes) -> bytes:
        while end not in self._received:
            await self._receive_more()
        taken, _, self._received = self._received.partition(end)
        return taken

    async def _receive_more(self) -> None:
        data = await receive(self.stream)
        if not data:
            raise EndedError(None, "")
        self._received += data


def broken_frames(rng: Random) -> bytes:
    """What ends any websocket: frames that RFC 6455 forbids."""
    payload = rng.randbytes(rng.randrange(40))
    return rng.choice(
        [
            frame(rng.choice([3, 7, 11, 15]), payload),
            frame(TEXT, payload, is_masked=False),
            frame(BINARY, payload, reserved=rng.randint(1, 7)),
            frame(PING, payload, is_last=False),
            frame(PING, bytes(126)),
            frame(CONTINUATION, payload),
            frame(TEXT, b"a", is_last=False) + frame(TEXT, b"b"),
            frame(TEXT, b"\xff\xfe"),
            frame(TEXT, b"\xe2\x82"),
            frame(CLOSE, b"\x03"),
            frame(CLOSE, struct.pack("!H", rng.choice([0, 999, 1004, 1005, 1006, 5000, 65535])) + b"x"),
            frame(CLOSE, struct.pack("!H", 1000) + b"\xff"),
            frame(BINARY, b"", nbytes=2**63),
            b"\x82\xfe\x00\x01" + bytes(4) + b"x",
            b"\x82\xff" + struct.pack("!Q", 5) + bytes(4) + b"xxxxx",
        ]
    )
