"""The source's end of TCP lanes: it serves chunks to targets on any host.

Whoever connects must prove within `STALL_S` that it holds the ticket of an open move, and gets only what that move names.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import trio

from p2pkv.core.ids import Location
from p2pkv.core.keys import ChunkKey
from p2pkv.errors import RemoteProtocolError, UnreadableShardError
from p2pkv.net.disk_fetch import LoadedShards
from p2pkv.net.lanes import LANE_ERRORS, STALL_S, Grants, admit_target, expect, reason_of, send
from p2pkv.net.logs import logger
from p2pkv.net.tcp_lane import LANES_AT_ONCE, RateLimit, TcpLane, open_tcp_lane
from p2pkv.wire.frames import close_all
from p2pkv.wire.lane import Fetch, ShardHeader, Turn

CONNECTIONS_MAX = 256
"""Open at once, proven or not; one more is closed unread. Each costs a descriptor, and at most 16 KiB until it is served."""
TURN_S = 3.0
"""Between two words to a target that waits for its turn, so that it knows that this end lives: a third of `STALL_S`."""

_log = logger("tcp")


class ResidentShard(Protocol):
    """What the source needs to know of a shard; see `Shard`."""

    checksum: bytes | None

    @property
    def descriptor(self) -> int:
        """Of its sealed memory."""

    @property
    def nbytes(self) -> int:
        """Of its payload."""


class ResidentMemory(Protocol):
    """What the source needs of the store."""

    def shards(self, key: ChunkKey) -> Sequence[ResidentShard]:
        """A resident chunk's shards, in order of workers; KeyError for any other. The descriptors stay the store's."""


async def serve_tcp(
    listener: trio.SocketListener,
    grants: Grants,
    memory: ResidentMemory,
    limit: RateLimit | None,
    *,
    disk: LoadedShards | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Send chunks to targets that hold the ticket of an open move, until cancelled.

    Args:
        listener: At the transfer address.
        grants: What the open moves allow.
        memory: Where the chunks in memory are.
        limit: How fast all lanes together may send; None for no limit.
        disk: Where those on disk are, if any are; one shard a lane is loaded at a time.
        task_status: Told when connections are taken.
    """
    source = _Source(grants, memory, limit, disk)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, source.serve, [listener])
        task_status.started()


class _Source:
    """What all lanes of a source share."""

    def __init__(self, grants: Grants, memory: ResidentMemory, limit: RateLimit | None, disk: LoadedShards | None) -> None:
        self._grants = grants
        self._disk = disk
        self._memory = memory
        self._limit = limit
        self._places = trio.Semaphore(CONNECTIONS_MAX)
        self._turns = trio.Semaphore(LANES_AT_ONCE)
        self._threads = trio.CapacityLimiter(LANES_AT_ONCE)

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one target."""
        try:
            async with stream:
                with self._place():
                    await self._serve(stream.socket)
        except* LANE_ERRORS as errors:
            _log.warning("a lane was closed", reason=reason_of(errors))

    async def _serve(self, connection: trio.socket.SocketType) -> None:
        with trio.fail_after(STALL_S):
            event_id = await admit_target(connection, self._grants)
            fetch = await expect(connection, Fetch)
        await self._take_turn(connection)
        try:
            await send(connection, Turn(has_come=True))
            grant = self._grants(event_id)
            async with open_tcp_lane(connection, self._threads, self._limit) as lane:
                for key in fetch.keys:
                    if grant is not None and key in grant.keys:
                        await (self._send_file if grant.location is Location.LOCAL_DISK else self._send_chunk)(lane, key)
                    else:
                        await self._send_nothing(lane, key)
        finally:
            self._turns.release()

    async def _send_nothing(self, lane: TcpLane, key: ChunkKey) -> None:
        await lane.run(lane.send, ShardHeader(key, worker=0, nbytes=0).encode())

    async def _send_file(self, lane: TcpLane, key: ChunkKey) -> None:
        """Send a chunk from disk; when a shard of it can't be read, the target hears that it isn't held."""
        count = 0 if self._disk is None else self._disk.shard_count(key)
        for worker in range(count):
            assert self._disk is not None, "it has shards"
            try:
                shard = await self._disk.load(key, worker)
            except UnreadableShardError as error:
                _log.warning("a chunk on disk isn't sent", reason=str(error))
                await self._send_nothing(lane, key)
                return
            try:
                await lane.run(lane.send_shard, ShardHeader(key, worker, shard.nbytes), shard.descriptor, shard.checksum)
            finally:
                os.close(shard.descriptor)
        if not count:
            await self._send_nothing(lane, key)

    async def _send_chunk(self, lane: TcpLane, key: ChunkKey) -> None:
        shards = self._shards(key)
        if not shards:
            await self._send_nothing(lane, key)
        with _held(shard.descriptor for shard in shards) as descriptors:
            for worker, (shard, descriptor) in enumerate(zip(shards, descriptors, strict=True)):
                header = ShardHeader(key, worker, shard.nbytes)
                shard.checksum = await lane.run(lane.send_shard, header, descriptor, shard.checksum)

    async def _take_turn(self, connection: trio.socket.SocketType) -> None:
        while True:
            with trio.move_on_after(TURN_S):
                await self._turns.acquire()
                return
            await send(connection, Turn(has_come=False))

    def _shards(self, key: ChunkKey) -> Sequence[ResidentShard]:
        try:
            return self._memory.shards(key)
        except KeyError:
            return ()

    @contextmanager
    def _place(self) -> Iterator[None]:
        try:
            self._places.acquire_nowait()
        except trio.WouldBlock:
            raise RemoteProtocolError(f"{CONNECTIONS_MAX} lanes are open already") from None
        try:
            yield
        finally:
            self._places.release()


@contextmanager
def _held(descriptors: Iterable[int]) -> Iterator[list[int]]:
    """Duplicates, which keep memory and numbers while threads use them, though the store may close its own."""
    held: list[int] = []
    try:
        held.extend(map(os.dup, descriptors))
        yield held
    finally:
        close_all(held)
