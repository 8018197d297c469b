"""The target's end of TCP lanes: chunks come from a source on any host, and each shard is checked as it arrives.

Nothing is kept but what was asked for, in its exact size, with the checksum that it was sent with. Anything else ends the lane;
whole chunks that came before stay. While a shard comes, the one before it is unmapped and sealed.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from mmap import mmap
from typing import Protocol

import trio

from p2pkv.core.chunks import Chunk
from p2pkv.core.effects import FetchChunks
from p2pkv.core.ids import Address, StageId
from p2pkv.core.keys import ChunkKey
from p2pkv.errors import ErrorCode, Failure, RouteRefusedError
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


@dataclass(frozen=True, slots=True)
class _Received:
    """A shard whose bytes are all there, and right.

    Attributes:
        chunk: Whose.
        worker: Which shard.
        checksum: Of its payload.
        warm: Its map, still to be closed, if it has one.
    """

    chunk: Chunk
    worker: int
    checksum: bytes
    warm: mmap | None


class TcpFetcher:
    """Fetches chunks over TCP.

    Args:
        memory: Where they are staged.
        dial_rules: Which transfer addresses may be dialed.
        streams: Among which an order's chunks are dealt, as far as so many lanes are free.
    """

    def __init__(self, memory: ReceivingMemory, dial_rules: DialRules, streams: int) -> None:
        self._memory = memory
        self._dial_rules = dial_rules
        self._streams = streams
        self._turns = trio.Semaphore(LANES_AT_ONCE)
        self._threads = trio.CapacityLimiter(2 * LANES_AT_ONCE)  # of each lane, one receives and one unmaps

    async def fetch(self, order: FetchChunks, fetched: list[ChunkKey]) -> Failure | None:
        """As `Fetcher.fetch`. An order has at most as many chunks as a `Fetch` has keys."""
        problems: list[str] = []
        try:
            async with AsyncExitStack() as held:
                connections = await self._connections(order, held)
                async with trio.open_nursery() as nursery:
                    for index, connection in enumerate(connections):
                        part = order.chunks[index :: len(connections)]  # so that prefixes come first
                        nursery.start_soon(self._fetch_part, connection, order.event_id, part, fetched, problems)
        finally:
            for chunk in order.chunks:
                if chunk.key not in fetched:
                    self._memory.drop(order.event_id, chunk.key)
        missing_count = len(order.chunks) - len(fetched)
        if not missing_count:
            return None
        problem = problems[0] if problems else f"{missing_count} of {len(order.chunks)} chunks are held there no longer"
        return Failure(ErrorCode.TRANSFER_FAILED, f"The transfer from {order.source!r} failed: {problem}.")

    async def _connections(self, order: FetchChunks, held: AsyncExitStack) -> list[trio.socket.SocketType]:
        """Connections to the source, each with its turn; one at least, which is waited for.

        Raises:
            RouteRefusedError: None can be opened.
        """
        await self._turns.acquire()
        held.callback(self._turns.release)
        count = 1
        while count < min(self._streams, len(order.chunks)):
            try:
                self._turns.acquire_nowait()
            except trio.WouldBlock:
                break
            held.callback(self._turns.release)
            count += 1
        opened: list[trio.socket.SocketType] = []
        refusals: list[RouteRefusedError] = []

        async def open_one() -> None:
            try:
                stream = await _open_stream(order, self._dial_rules)
            except RouteRefusedError as error:
                refusals.append(error)
            else:
                held.push_async_callback(stream.aclose)
                opened.append(stream.socket)

        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(open_one)
        if not opened:
            raise refusals[0]
        return opened

    async def _fetch_part(
        self,
        connection: trio.socket.SocketType,
        stage: StageId,
        chunks: Sequence[Chunk],
        fetched: list[ChunkKey],
        problems: list[str],
    ) -> None:
        received, to_seal = trio.open_memory_channel[_Received](0)  # so that nothing stays in it
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._seal, to_seal, stage, fetched)
            async with received:
                try:
                    await _wait_for_turn(connection, chunks)
                    async with open_tcp_lane(connection, self._threads) as lane:
                        for chunk in chunks:
                            await self._receive_chunk(lane, chunk, stage, received)
                except* LANE_ERRORS as errors:  # here, as what has come is still to be sealed
                    problems.append(reason_of(errors))

    async def _receive_chunk(
        self, lane: TcpLane, chunk: Chunk, stage: StageId, received: trio.MemorySendChannel[_Received]
    ) -> None:
        """Receive a chunk's shards, or as many as come before the source says that it holds the chunk no longer."""
        for worker, nbytes in enumerate(chunk.shard_nbytes):
            descriptor, warm = self._memory.lend_warm(stage, chunk.key, worker, nbytes)
            with ExitStack() as unsent:
                if warm is not None:
                    unsent.enter_context(warm)
                checksum = await lane.run(lane.receive_shard, ShardHeader(chunk.key, worker, nbytes), descriptor, warm)
                if checksum is None:
                    return
                await received.send(_Received(chunk, worker, checksum, warm))
                unsent.pop_all()

    async def _seal(self, to_seal: trio.MemoryReceiveChannel[_Received], stage: StageId, fetched: list[ChunkKey]) -> None:
        async for shard in to_seal:
            if shard.warm is not None:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(shard.warm.close, limiter=self._threads)
            await trio.lowlevel.checkpoint_if_cancelled()  # whose move is over, his memory may be gone
            self._memory.seal(stage, shard.chunk.key, shard.worker, shard.checksum)
            if shard.worker == len(shard.chunk.shard_nbytes) - 1:
                fetched.append(shard.chunk.key)


async def _open_stream(order: FetchChunks, dial_rules: DialRules) -> trio.SocketStream:
    assert isinstance(order.route, Address)
    lane = f"The transfer address {order.route} of {order.source!r}"
    with refusing(lane), trio.fail_after(STALL_S):
        _, stream = await connect(await dial_rules.permitted(order.route), within_s=STALL_S)
    try:
        with refusing(lane):
            await prove_to_source(stream.socket, order)
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream


async def _wait_for_turn(connection: trio.socket.SocketType, chunks: Sequence[Chunk]) -> None:
    await send(connection, Fetch(tuple(chunk.key for chunk in chunks)))
    while not (await expect(connection, Turn)).has_come:
        pass
