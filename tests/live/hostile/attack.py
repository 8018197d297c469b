"""How doors are attacked: many connections at a time, each a strike of its own random generator, every frame counted."""

import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random

import trio

from p2pkv.core.ids import Address

IN_FLIGHT = 16
"""Strikes at the same time: enough to keep a node busy, and fewer than any door has places."""
END_S = 15.0
"""An end or answer that must come comes by then. The longest that a door waits is 10 s, for the rest of a frame."""
PEEK_S = 0.05
"""So long is waited for what may come or not."""
VANISH = struct.pack("ii", 1, 0)
"""`struct linger`: closed with a reset, as by a process that was killed."""


@dataclass(frozen=True)
class Target:
    """Where the attacked node's doors are, and what an attacker may know of its cluster.

    Attributes:
        instance: Its name.
        bystander: The name of the node that must not notice.
        cluster: Theirs.
        peer_key: The cluster's subkey for proofs.
        ws: Of its websocket doors.
        http: Ports of its HTTP doors, its own and the shared one.
        transfer: Where its TCP lanes are.
        engine_socket: Where engines attach.
        lane_socket: Where descriptors are handed over.
    """

    instance: str
    bystander: str
    cluster: str
    peer_key: bytes = field(repr=False)
    ws: Address
    http: tuple[Address, ...]
    transfer: Address
    engine_socket: Path
    lane_socket: Path


@dataclass
class Tally:
    """What was done so far.

    Attributes:
        frames: Sent in full, and answered, or followed by the connection's end; or by a vanishing of ours.
        strikes: Begun.
        outcomes: How often what was answered, by its name.
    """

    frames: int = 0
    strikes: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)


Strike = Callable[[Random, Target, Tally], Awaitable[None]]
"""One connection or a few, and what is wrong on them. It fails if the node answers otherwise than it should."""


async def attack(strike: Strike, target: Target, tally: Tally, *, frames: int, seed: str) -> None:
    """Strike again and again until `tally` has so many frames. A failure names the seed of the strike that found it."""
    numbers = count(tally.strikes)

    async def keep_striking() -> None:
        while tally.frames < frames:
            tally.strikes += 1
            strike_seed = f"{seed}:{next(numbers)}"
            with noting(f"the strike that found it: Random({strike_seed!r})"):
                await strike(Random(strike_seed), target, tally)

    async with trio.open_nursery() as nursery:
        for _ in range(IN_FLIGHT):
            nursery.start_soon(keep_striking)


@contextmanager
def noting(note: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


@asynccontextmanager
async def connected(place: Address | Path) -> AsyncIterator[trio.SocketStream]:
    """A connection to a door; on exit it vanishes."""
    if isinstance(place, Path):
        connection = trio.socket.socket(socket.AF_UNIX)
    else:
        connection = trio.socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, VANISH)
    with connection:
        await connection.connect(str(place) if isinstance(place, Path) else (place.host, place.port))
        yield trio.SocketStream(connection)


async def send(stream: trio.SocketStream, data: bytes, *, bytewise: bool = False) -> bool:
    """Send something, in one piece or byte by byte; whether the node still took it."""
    step = 1 if bytewise else max(1, len(data))
    try:
        for position in range(0, len(data), step):
            await stream.send_all(data[position : position + step])
    except trio.BrokenResourceError:
        return False
    return True


async def receive(stream: trio.SocketStream) -> bytes:
    """What comes next; nothing at the end, however the connection ended."""
    try:
        return bytes(await stream.receive_some(65536))
    except trio.BrokenResourceError:
        return b""


async def expect_end(stream: trio.SocketStream) -> bytes:
    """All that still comes until the node ends the connection, which it must."""
    heard = bytearray()
    with trio.fail_after(END_S):
        while data := await receive(stream):
            heard += data
    return bytes(heard)


async def half_close(stream: trio.SocketStream) -> None:
    """Say that nothing more will come."""
    with suppress(OSError, trio.BrokenResourceError):  # the node was faster
        await stream.send_eof()
