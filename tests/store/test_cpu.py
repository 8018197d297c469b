import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pkv.errors import ForeignMemoryError, SealRefusedError
from p2pkv.store import memory
from p2pkv.store.cpu import CpuStore, StoreStatistics

KEY, OTHER_KEY = b"k" * 16, b"o" * 16
NOTHING = StoreStatistics(
    resident_count=0, resident_nbytes=0, staged_count=0, staged_nbytes=0, prefaulted_nbytes=0, descriptor_count=0
)


def open_descriptors() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


@pytest.fixture
def store() -> Iterator[CpuStore]:
    """A store that must have closed every descriptor after `close`."""
    before = open_descriptors()
    store = CpuStore()
    yield store
    store.close()
    assert store.statistics() == NOTHING
    assert open_descriptors() == before


def lend_written(store: CpuStore, key: bytes, worker: int = 0, content: bytes = b"\x01") -> int:
    descriptor = store.lend("engine", key, worker, 100)
    os.pwrite(descriptor, content * 4096, 0)
    return descriptor


def foreign(nbytes: int) -> int:
    descriptor = memory.create(nbytes)
    os.pwrite(descriptor, b"\x02" * nbytes, 0)
    memory.seal(descriptor)
    return descriptor


def test_a_chunk_is_lent_sealed_admitted_read_and_released(store: CpuStore) -> None:
    for worker in (1, 0):
        lend_written(store, KEY, worker, content=bytes([worker + 1]))
        store.seal("engine", KEY, worker)
    assert store.statistics() == StoreStatistics(
        resident_count=0, resident_nbytes=0, staged_count=1, staged_nbytes=8192, prefaulted_nbytes=0, descriptor_count=2
    )
    store.admit("engine", KEY)
    assert [os.pread(each, 1, 0) for each in store.descriptors(KEY)] == [b"\x01", b"\x02"]
    assert store.statistics() == StoreStatistics(
        resident_count=1, resident_nbytes=8192, staged_count=0, staged_nbytes=0, prefaulted_nbytes=0, descriptor_count=2
    )
    store.release([KEY])
    assert store.statistics() == NOTHING


def test_a_chunks_shards_are_known_by_payload_and_checksum(store: CpuStore) -> None:
    lend_written(store, KEY, worker=1)
    store.seal("engine", KEY, 1, checksum=b"c" * 16)
    store.adopt("engine", KEY, 0, foreign(4097), 4097)
    store.admit("engine", KEY)
    assert [(shard.nbytes, shard.charged_nbytes, shard.checksum) for shard in store.shards(KEY)] == [
        (4097, 8192, None),
        (100, 4096, b"c" * 16),
    ]


def test_unsealed_memory_is_never_admitted(store: CpuStore) -> None:
    lend_written(store, KEY)
    with pytest.raises(AssertionError):
        store.admit("engine", KEY)


def test_a_refused_seal_leaves_memory_that_can_only_be_dropped(store: CpuStore) -> None:
    store.lend("engine", KEY, 0, 5000)
    with pytest.raises(SealRefusedError):
        store.seal("engine", KEY, 0)
    store.drop("engine", KEY)
    assert store.statistics() == NOTHING


def test_what_was_dropped_cannot_be_sealed(store: CpuStore) -> None:
    lend_written(store, KEY)
    store.drop("engine", KEY, worker=0)
    with pytest.raises(SealRefusedError, match="taken back"):
        store.seal("engine", KEY, 0)


def test_dropping_one_worker_keeps_the_other_shard(store: CpuStore) -> None:
    for worker in (0, 1):
        lend_written(store, KEY, worker)
    store.drop("engine", KEY, worker=0)
    store.seal("engine", KEY, 1)
    assert store.statistics().descriptor_count == 1


def test_dropping_what_is_not_staged_is_no_error(store: CpuStore) -> None:
    store.drop("engine", KEY)
    store.drop("engine", KEY, worker=3)
    assert store.statistics() == NOTHING


def test_stages_are_apart(store: CpuStore) -> None:
    lend_written(store, KEY)
    store.adopt("move", KEY, 0, foreign(100), 100)
    store.drop("engine", KEY)
    store.admit("move", KEY)
    assert os.pread(store.descriptors(KEY)[0], 1, 0) == b"\x02"


def test_staging_twice_closes_the_older_memory(store: CpuStore) -> None:
    store.adopt("move", KEY, 0, foreign(100), 100)
    store.adopt("move", KEY, 0, foreign(5000), 5000)
    assert store.statistics().staged_nbytes == 8192
    assert store.statistics().descriptor_count == 1


def test_admitting_a_key_again_closes_the_older_chunk(store: CpuStore) -> None:
    for stage in ("one", "two"):
        store.adopt(stage, KEY, 0, foreign(100), 100)
        store.admit(stage, KEY)
    assert store.statistics().descriptor_count == 1


def test_a_refused_descriptor_is_closed_and_nothing_is_staged(store: CpuStore) -> None:
    descriptor = foreign(100)
    with pytest.raises(ForeignMemoryError):
        store.adopt("move", KEY, 0, descriptor, 9999)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert store.statistics() == NOTHING


def test_a_reader_keeps_its_memory_after_the_release(store: CpuStore) -> None:
    store.adopt("move", KEY, 0, foreign(100), 100)
    store.admit("move", KEY)
    reader = os.dup(store.descriptors(KEY)[0])
    store.release([KEY])
    assert os.pread(reader, 1, 0) == b"\x02"
    os.close(reader)


def test_close_frees_staged_and_resident_chunks(store: CpuStore) -> None:
    lend_written(store, OTHER_KEY)
    store.adopt("move", KEY, 0, foreign(100), 100)
    store.admit("move", KEY)
