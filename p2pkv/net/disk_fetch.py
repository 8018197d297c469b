"""Fetches with a disk of this instance at an end: from memory to disk and back, and what a lane brings for the disk.

Bytes pass through memory on their way: what a lane brings waits there until it is written, a batch at a time, and at most
`BATCHES_AT_ONCE` batches. This is beside the limit of LocalCPUBackend.
"""

import errno
from collections.abc import Sequence
from typing import Protocol

import trio

from p2pkv.core.chunks import Chunk
from p2pkv.core.effects import FetchChunks
from p2pkv.core.ids import Location, StageId
from p2pkv.core.keys import ChunkKey, Namespace, namespace_digest
from p2pkv.core.records import WithinInstance
from p2pkv.errors import ErrorCode, Failure, UnreadableShardError
from p2pkv.net.driver import Fetcher

BATCHES_AT_ONCE = 2
"""One comes in while another is written."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class MemoryShard(Protocol):
    """A shard in sealed memory; see `Shard`."""

    descriptor: int
    nbytes: int
    checksum: bytes | None


class ShardMemory(Protocol):
    """What is needed of the store in memory; see `CpuStore`."""

    def shards(self, key: ChunkKey) -> Sequence[MemoryShard]:
        """A resident chunk's shards, in order of workers; KeyError for any other."""

    def staged(self, stage: StageId, key: ChunkKey) -> Sequence[MemoryShard]:
        """A staged chunk's shards, in order of workers."""

    def adopt(self, stage: StageId, key: ChunkKey, worker: int, descriptor: int, nbytes: int, checksum: bytes | None) -> None:
        """Stage sealed memory, which is the store's from now on."""

    def drop(self, stage: StageId, key: ChunkKey) -> None:
        """Free what is staged of a chunk."""


class LoadedShards(Protocol):
    """What lanes need of the store on disk; see `DiskStore`."""

    def shard_count(self, key: ChunkKey) -> int:
        """Shards of a resident chunk; 0 of any other."""

    async def load(self, key: ChunkKey, worker: int) -> MemoryShard:
        """One of them in fresh sealed memory, the caller's; raises `UnreadableShardError`."""


class FileMemory(LoadedShards, Protocol):
    """What is needed of the store on disk; see `DiskStore`."""

    async def write(
        self, stage: StageId, chunk: Chunk, namespace: Namespace, worker: int, descriptor: int, checksum: bytes | None
    ) -> bytes:
        """Stage a shard of sealed memory as a file, and return its checksum; raises `OSError`."""

    def drop(self, stage: StageId, key: ChunkKey) -> None:
        """Remove what is staged of a chunk."""


class DiskFetcher:
    """Fetches what has the disk at an end, and leaves the rest to the lanes.

    Args:
        memory: Chunks in memory.
        disk: Chunks on disk.
        lanes: Brings chunks from other instances into memory.
    """

    def __init__(self, memory: ShardMemory, disk: FileMemory, lanes: Fetcher) -> None:
        self._memory = memory
        self._disk = disk
        self._lanes = lanes
        self._turns = trio.Semaphore(BATCHES_AT_ONCE)

    async def fetch(self, order: FetchChunks, fetched: list[ChunkKey]) -> Failure | None:
        """As `Fetcher.fetch`."""
        if isinstance(order.route, WithinInstance) and order.location is Location.LOCAL_CPU:
            return await self._load(order, fetched)
        if isinstance(order.route, WithinInstance):
            return await self._write(order, fetched)
        if order.location is Location.LOCAL_CPU:
            return await self._lanes.fetch(order, fetched)
        async with self._turns:
            return await self._receive(order, fetched)

    async def _load(self, order: FetchChunks, fetched: list[ChunkKey]) -> Failure | None:
        """From disk to memory."""
        problem = None
        for chunk in order.chunks:
            try:
                for worker in range(len(chunk.shard_nbytes)):
                    shard = await self._disk.load(chunk.key, worker)
                    stage = (order.event_id, chunk.key, worker)
                    self._memory.adopt(*stage, shard.descriptor, shard.nbytes, shard.checksum)
                fetched.append(chunk.key)
            except UnreadableShardError as error:
                problem = problem or Failure(ErrorCode.TRANSFER_FAILED, f"A chunk can't be read from disk: {error}.")
            finally:
                if chunk.key not in fetched:
                    self._memory.drop(order.event_id, chunk.key)
        return problem

    async def _write(self, order: FetchChunks, fetched: list[ChunkKey]) -> Failure | None:
        """From memory to disk."""
        for chunk in order.chunks:
            try:
                shards = self._memory.shards(chunk.key)
            except KeyError:
                return Failure(ErrorCode.TRANSFER_FAILED, "A chunk isn't held in memory any more.")
            if (problem := await self._write_chunk(order, chunk, shards, fetched)) is not None:
                return problem
        return None

    async def _receive(self, order: FetchChunks, fetched: list[ChunkKey]) -> Failure | None:
        """From another instance to disk."""
        received: list[ChunkKey] = []
        try:
            problem = await self._lanes.fetch(order, received)
            came = set(received)
            for chunk in order.chunks if came else ():
                if chunk.key in came:
                    shards = self._memory.staged(order.event_id, chunk.key)
                    failure = await self._write_chunk(order, chunk, shards, fetched)
                    if failure is not None:
                        return failure
                    self._memory.drop(order.event_id, chunk.key)
        finally:
            for chunk in order.chunks:
                self._memory.drop(order.event_id, chunk.key)
        return problem

    async def _write_chunk(
        self,
        order: FetchChunks,
        chunk: Chunk,
        shards: Sequence[MemoryShard],
        fetched: list[ChunkKey],
    ) -> Failure | None:
        stage = order.event_id
        namespace = next(each for each in order.namespaces if namespace_digest(each) == chunk.namespace)
        try:
            for worker, shard in enumerate(shards):
                shard.checksum = await self._disk.write(stage, chunk, namespace, worker, shard.descriptor, shard.checksum)
            fetched.append(chunk.key)
        except OSError as error:
            code = ErrorCode.STORE_FULL if error.errno in _FULL else ErrorCode.TRANSFER_FAILED
            return Failure(code, f"A chunk can't be written to {Location.LOCAL_DISK.value}: {error.strerror}.")
        finally:
            if chunk.key not in fetched:
                self._disk.drop(stage, chunk.key)
        return None
