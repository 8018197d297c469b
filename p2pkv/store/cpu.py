"""LocalCPUBackend's bytes: one memfd for each shard, staged or resident.

The core decides what is held, and for how long; this keeps the descriptors and closes each of them exactly once. Memory that
was outside this process is closed, never used again: somebody may still map it.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from mmap import mmap

from p2pkv.core.ids import StageId
from p2pkv.core.keys import ChunkKey
from p2pkv.errors import ForeignMemoryError, SealRefusedError
from p2pkv.store import memory
from p2pkv.store.prefaulted import PrefaultedMemory


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """What a store holds.

    Attributes:
        resident_count: Chunks that are held.
        resident_nbytes: Their memory, in whole pages.
        staged_count: Chunks of which at least one shard is staged.
        staged_nbytes: Memory of the staged shards, in whole pages.
        prefaulted_nbytes: Memory that is kept ready for shards to come, in whole pages.
        descriptor_count: Open descriptors: one a shard, and those of what is kept ready.
    """

    resident_count: int
    resident_nbytes: int
    staged_count: int
    staged_nbytes: int
    prefaulted_nbytes: int
    descriptor_count: int


@dataclass(slots=True)
class Shard:
    """One worker's part of a chunk.

    Attributes:
        descriptor: Of its memory; the store's.
        nbytes: Of its payload, which its memory rounds up to pages.
        is_sealed: Whether its bytes are final.
        checksum: xxh3_128 of its payload; None until it is known. Whoever computes it may write it here, also when the chunk
            has been released meanwhile.
    """

    descriptor: int
    nbytes: int
    is_sealed: bool
    checksum: bytes | None = None

    @property
    def charged_nbytes(self) -> int:
        """Its memory, in whole pages."""
        return memory.page_rounded(self.nbytes)


_Shards = dict[int, Shard]
"""By worker."""


class CpuStore:
    """Memfds by chunk key and worker. Every call is short and belongs on the event loop; nothing here waits.

    Args:
        prefaulted: Where lanes' memory comes from while there is some; closed with the store.
        close: Closes a descriptor that isn't needed any more, at once or soon.
    """

    def __init__(self, prefaulted: PrefaultedMemory | None = None, close: Callable[[int], None] = os.close) -> None:
        self._prefaulted = prefaulted or PrefaultedMemory(0)
        self._close_descriptor = close
        self._staged: dict[tuple[StageId, ChunkKey], _Shards] = {}
        self._resident: dict[ChunkKey, _Shards] = {}

    def lend(self, stage: StageId, key: ChunkKey, worker: int, nbytes: int) -> int:
        """Stage fresh memory for an engine to write.

        Returns:
            Its descriptor, which stays the store's. Whoever gets it may write until `seal`.
        """
        descriptor = memory.create(nbytes)
        self._stage(stage, key, worker, Shard(descriptor, nbytes, is_sealed=False))
        return descriptor

    def lend_warm(self, stage: StageId, key: ChunkKey, worker: int, nbytes: int) -> tuple[int, mmap | None]:
        """Stage memory for a lane to write: faulted in ahead if there is such, else fresh.

        Returns:
            Its descriptor, as from `lend`; and where it was faulted in, its map, the caller's, who closes it before `seal`.
        """
        warm = self._prefaulted.take(nbytes)
        if warm is None:
            return self.lend(stage, key, worker, nbytes), None
        self._stage(stage, key, worker, Shard(warm.descriptor, nbytes, is_sealed=False))
        return warm.descriptor, warm.map

    def seal(self, stage: StageId, key: ChunkKey, worker: int, checksum: bytes | None = None) -> None:
        """Make a lent shard read-only for good. It stays staged, refused or not, until it is admitted or dropped.

        Args:
            stage: To whom it was lent.
            key: Its chunk.
            worker: Which shard.
            checksum: Of what was written, if it is known.

        Raises:
            SealRefusedError: It is still mapped, was never wholly written, or isn't staged any more.
        """
        shard = self._staged.get((stage, key), {}).get(worker)
        if shard is None:
            raise SealRefusedError("it was taken back: its lease has expired")
        memory.seal(shard.descriptor)
        shard.is_sealed = True
        shard.checksum = checksum

    def adopt(
        self, stage: StageId, key: ChunkKey, worker: int, descriptor: int, nbytes: int, checksum: bytes | None = None
    ) -> None:
        """Stage memory that is sealed already, by another process or after it was read from disk.

        Args:
            stage: Who brings it.
            key: The chunk it is a shard of.
            worker: Which shard.
            descriptor: The store's from now on, also when it is refused.
            nbytes: Payload that was announced.
            checksum: Of the payload, if it is known.

        Raises:
            ForeignMemoryError: It isn't sealed memory of that size. It was closed.
        """
        try:
            memory.check_foreign(descriptor, nbytes)
        except ForeignMemoryError:
            os.close(descriptor)
            raise
        self._stage(stage, key, worker, Shard(descriptor, nbytes, is_sealed=True, checksum=checksum))

    def admit(self, stage: StageId, key: ChunkKey) -> None:
        """Make a staged chunk resident. All its shards are sealed; a resident chunk of the same key is closed."""
        shards = self._staged[stage, key]
        assert all(shard.is_sealed for shard in shards.values()), f"chunk {key.hex()} is not sealed"
        self._close(self._resident.pop(key, {}))
        self._resident[key] = self._staged.pop((stage, key))

    def drop(self, stage: StageId, key: ChunkKey, worker: int | None = None) -> None:
        """Close a staged chunk, or only one worker's shard. What isn't staged (any more) needs no dropping."""
        shards = self._staged.get((stage, key), {})
        workers = list(shards) if worker is None else [worker]
        self._close({each: shards.pop(each) for each in workers if each in shards})
        if not shards:
            self._staged.pop((stage, key), None)

    def release(self, keys: Iterable[ChunkKey]) -> None:
        """Close resident chunks. Who maps them keeps their memory alive until he unmaps it."""
        for key in keys:
            self._close(self._resident.pop(key))

    def shards(self, key: ChunkKey) -> tuple[Shard, ...]:
        """A resident chunk's shards, in order of workers; their descriptors stay the store's."""
        return _in_order(self._resident[key])

    def staged(self, stage: StageId, key: ChunkKey) -> tuple[Shard, ...]:
        """A staged chunk's shards, in order of workers; their descriptors stay the store's."""
        return _in_order(self._staged[stage, key])

    def descriptors(self, key: ChunkKey) -> tuple[int, ...]:
        """Descriptors of a resident chunk's shards, in order of workers; they stay the store's."""
        return tuple(shard.descriptor for shard in self.shards(key))

    def statistics(self) -> StoreStatistics:
        """What is held now."""
        resident = list(_each(self._resident.values()))
        staged = list(_each(self._staged.values()))
        return StoreStatistics(
            resident_count=len(self._resident),
            resident_nbytes=sum(shard.charged_nbytes for shard in resident),
            staged_count=len(self._staged),
            staged_nbytes=sum(shard.charged_nbytes for shard in staged),
            prefaulted_nbytes=self._prefaulted.nbytes,
            descriptor_count=len(resident) + len(staged) + self._prefaulted.descriptor_count,
        )

    def close(self) -> None:
        """Close everything."""
        for shards in (*self._staged.values(), *self._resident.values()):
            self._close(shards)
        self._staged.clear()
        self._resident.clear()
        self._prefaulted.close()

    def _stage(self, stage: StageId, key: ChunkKey, worker: int, shard: Shard) -> None:
        shards = self._staged.setdefault((stage, key), {})
        if worker in shards:
            self._close_descriptor(shards[worker].descriptor)
        shards[worker] = shard

    def _close(self, shards: _Shards) -> None:
        for shard in shards.values():
            self._close_descriptor(shard.descriptor)


def _in_order(shards: _Shards) -> tuple[Shard, ...]:
    return tuple(shards[worker] for worker in sorted(shards))


def _each(chunks: Iterable[_Shards]) -> Iterator[Shard]:
    return (shard for shards in chunks for shard in shards.values())
