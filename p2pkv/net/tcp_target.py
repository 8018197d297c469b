"""The target's end of TCP lanes: chunks come from a source on any host, and each shard is checked as it arrives.

Nothing is kept but what was asked for, in its exact size, with the checksum that it was sent with. Anything else ends the lane;
whole chunks that came before stay.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from mmap import mmap
from typing import Protocol

import trio

from p2pkv.core.chunks import Chunk
from p2pkv.core.effects import FetchChunks
from p2pkv.core.ids import Address, StageId
from p2pkv.core.keys import ChunkKey
from p2pkv.errors import ErrorCode, Failure
from p2pkv.net.dial_rules import DialRules
from p2pkv.net.lanes import LANE_ERRORS, STALL_S, expect, prove_to_source, reason_of, refusing, send
from p2pkv.net.names import connect
from p2pkv.net.tcp_lane import LANES_AT_ONCE, TcpLane, open_tcp_lane
from p2pkv.wire.lane import Fetch, ShardHeader, Turn


class ReceivingMemory(Protocol):
    """What the target needs of the store."""

    def lend_warm(self, stage: StageId, key: ChunkKey, worker: int, nbytes: int) -> tuple[int, mmap | None]:
        """Stage memory to write; the descriptor stays the store's, the map of memory that was faulted in ahead doesn't."""

    def seal(self, stage: StageId, key: ChunkKey, worker: int, checksum: bytes) -> None:
        """Make it read-only, and keep its checksum with it."""

    def drop(self, stage: StageId, key: ChunkKey, worker: int | None = None) -> None:
        """Free what is staged of a chunk."""


class TcpFetcher:
    """Fetches chunks over TCP.

    Args:
        memory: Where they are staged.
        dial_rules: Which transfer addresses may be dialed.
    """

    def __init__(self, memory: ReceivingMemory, dial_rules: DialRules) -> None:
        self._memory = memory
        self._dial_rules = dial_rules
        self._turns = trio.Semaphore(LANES_AT_ONCE)
        self._threads = trio.CapacityLimiter(LANES_AT_ONCE)

    async def fetch(self, order: FetchChunks, fetched: list[ChunkKey]) -> Failure | None:
        """As `Fetcher.fetch`. An order has at most as many chunks as a `Fetch` has keys."""
        problem = None
        try:
            async with self._turns, _open_connection(order, self._dial_rules) as connection:
                await _wait_for_turn(connection, order)
                async with open_tcp_lane(connection, self._threads) as lane:
                    for chunk in order.chunks:
                        await self._receive_chunk(lane, chunk, order.event_id, fetched)
        except* LANE_ERRORS as errors:
            problem = reason_of(errors)
        missing_count = len(order.chunks) - len(fetched)
        if not missing_count:
            return None
        problem = problem or f"{missing_count} of {len(order.chunks)} chunks are held there no longer"
        return Failure(ErrorCode.TRANSFER_FAILED, f"The transfer from {order.source!r} failed: {problem}.")

    async def _receive_chunk(self, lane: TcpLane, chunk: Chunk, stage: StageId, fetched: list[ChunkKey]) -> None:
        try:
            for worker, nbytes in enumerate(chunk.shard_nbytes):
                descriptor, warm = self._memory.lend_warm(stage, chunk.key, worker, nbytes)
                with warm or nullcontext():  # the lane closes it; this is for one that was cancelled before
                    checksum = await lane.run(lane.receive_shard, ShardHeader(chunk.key, worker, nbytes), descriptor, warm)
                if checksum is None:
                    return
                self._memory.seal(stage, chunk.key, worker, checksum)
            fetched.append(chunk.key)
        finally:
            if fetched[-1:] != [chunk.key]:
                self._memory.drop(stage, chunk.key)


@asynccontextmanager
async def _open_connection(order: FetchChunks, dial_rules: DialRules) -> AsyncIterator[trio.socket.SocketType]:
    assert isinstance(order.route, Address)
    lane = f"The transfer address {order.route} of {order.source!r}"
    with refusing(lane), trio.fail_after(STALL_S):
        _, stream = await connect(await dial_rules.permitted(order.route), within_s=STALL_S)
    async with stream:
        with refusing(lane):
            await prove_to_source(stream.socket, order)
        yield stream.socket


async def _wait_for_turn(connection: trio.socket.SocketType, order: FetchChunks) -> None:
    await send(connection, Fetch(tuple(chunk.key for chunk in order.chunks)))
    while not (await expect(connection, Turn)).has_come:
        pass
