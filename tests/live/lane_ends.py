"""The source's end of lanes, for tests: a store, its open moves, and chunks that are full of their own number."""

import os
from collections.abc import Sequence
from pathlib import Path

import trio

from p2pkv.core.chunks import Chunk
from p2pkv.core.effects import FetchChunks
from p2pkv.core.ids import EventId, Location
from p2pkv.core.moves.source_move import LaneGrant
from p2pkv.core.records import Route
from p2pkv.net.lanes import expect, send
from p2pkv.store import memory
from p2pkv.store.cpu import CpuStore
from p2pkv.wire.lane import LaneChallenge, LaneEnd, LaneOpen, LaneOpened, lane_mac

EVENT, TICKET = "move~a~b~a~0123456789abcdef", b"t" * 32
NBYTES = 5000


def chunk_of(number: int, worker_count: int = 1, nbytes: int = NBYTES) -> Chunk:
    key = number.to_bytes(16, "big")
    return Chunk(
        key=key, parent=b"p" * 16, namespace=b"n" * 16, start=0, tokens=b"\1\0\0\0", shard_nbytes=(nbytes,) * worker_count
    )


def order_of(route: Route, chunks: Sequence[Chunk], ticket: bytes = TICKET) -> FetchChunks:
    return FetchChunks(EVENT, "a", route, ticket, tuple(chunks), Location.LOCAL_CPU, ())


def open_descriptors() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


async def prove_as_source(connection: trio.socket.SocketType, ticket: bytes) -> None:
    """The source's part of a lane's opening, whoever the target is."""
    nonce = bytes(16)
    await send(connection, LaneChallenge(nonce))
    opening = await expect(connection, LaneOpen)
    mac = lane_mac(ticket, LaneEnd.SOURCE, source_nonce=nonce, target_nonce=opening.nonce, event_id=EVENT)
    await send(connection, LaneOpened(mac))


class Source:
    """A source's store and its open moves."""

    def __init__(self) -> None:
        self.store = CpuStore()
        self.grants: dict[EventId, LaneGrant] = {}

    def hold(self, *chunks: Chunk) -> None:
        for chunk in chunks:
            for worker, nbytes in enumerate(chunk.shard_nbytes):
                descriptor = self.store.lend("engine", chunk.key, worker, nbytes)
                os.pwrite(descriptor, chunk.key[-1:] * memory.page_rounded(nbytes), 0)
                self.store.seal("engine", chunk.key, worker)
            self.store.admit("engine", chunk.key)

    def grant(self, *chunks: Chunk) -> None:
        self.grants[EVENT] = LaneGrant(TICKET, frozenset(chunk.key for chunk in chunks), Location.LOCAL_CPU)
