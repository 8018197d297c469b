"""Memory is ready in the sizes that were taken last, never more than the limit, and none of it is left over."""

import errno
import fcntl
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from p2pkv.core.chunks import PAGE_NBYTES
from p2pkv.errors import SealRefusedError
from p2pkv.store import memory
from p2pkv.store.cpu import CpuStore
from p2pkv.store.prefaulted import COUNT_MAX, LEAST_NBYTES, STRIDE_NBYTES, PrefaultedMemory, WarmMemory

MIB = 2**20
KEY = b"k" * 16


@asynccontextmanager
async def kept_ready(limit_nbytes: int) -> AsyncIterator[PrefaultedMemory]:
    """Memory that is being kept ready, all of which must have gone after `close`."""
    before = set(Path("/proc/self/fd").iterdir())
    prefaulted = PrefaultedMemory(limit_nbytes)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(prefaulted.keep_ready)
        yield prefaulted
        nursery.cancel_scope.cancel()
    prefaulted.close()
    assert (prefaulted.nbytes, prefaulted.descriptor_count) == (0, 0)
    assert set(Path("/proc/self/fd").iterdir()) == before


async def until(is_true: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while not is_true():  # noqa: ASYNC110 - memory tells nobody that it is ready
            await trio.sleep(0.001)


def take(prefaulted: PrefaultedMemory, *sizes: int) -> int:
    """Take and free these, and count those that were ready."""
    taken = [warm for nbytes in sizes if (warm := prefaulted.take(nbytes)) is not None]
    for warm in taken:
        warm.close()
    return len(taken)


async def test_nothing_is_kept_for_who_takes_nothing() -> None:
    async with kept_ready(8 * MIB) as prefaulted:
        await trio.testing.wait_all_tasks_blocked()
        assert prefaulted.nbytes == 0


async def test_what_was_taken_is_ready_the_next_time_with_all_its_pages_and_its_size_sealed() -> None:
    async with kept_ready(8 * MIB) as prefaulted:
        assert prefaulted.take(3 * MIB + 5) is None
        await until(lambda: prefaulted.nbytes == 3 * MIB + PAGE_NBYTES)
        assert prefaulted.descriptor_count == 2
        warm = prefaulted.take(3 * MIB + 1)
        assert warm is not None
        assert os.fstat(warm.descriptor).st_blocks * memory.BLOCK_NBYTES == len(warm.map) == 3 * MIB + PAGE_NBYTES
        assert fcntl.fcntl(warm.descriptor, fcntl.F_GET_SEALS) & memory.READ_ONLY_SEALS == memory.SIZE_SEALS
        assert bytes(warm.map[:5]) == bytes(5)
        warm.close()


async def test_as_much_is_ready_as_was_taken_last_within_the_limit() -> None:
    async with kept_ready(4 * MIB) as prefaulted:
        most = 0

        def is_full() -> bool:
            nonlocal most
            most = max(most, prefaulted.nbytes)
            return prefaulted.nbytes == 4 * MIB

        take(prefaulted, *[MIB] * 10)
        await until(is_full)
        await trio.testing.wait_all_tasks_blocked()
        assert take(prefaulted, *[MIB] * 10) == 4
        await until(is_full)
        assert most == 4 * MIB


async def test_memory_of_other_sizes_makes_room_for_those_taken_later() -> None:
    async with kept_ready(4 * MIB) as prefaulted:
        take(prefaulted, MIB, MIB, MIB, MIB)
        await until(lambda: prefaulted.nbytes == 4 * MIB)
        take(prefaulted, 2 * MIB)
        await until(lambda: prefaulted.nbytes == 4 * MIB and prefaulted.descriptor_count == 6)
        assert take(prefaulted, 2 * MIB, MIB, MIB) == 3


@pytest.mark.parametrize("nbytes", [1, LEAST_NBYTES - PAGE_NBYTES, 4 * MIB + 1])
async def test_what_is_too_small_to_pay_or_beyond_the_limit_is_not_kept(nbytes: int) -> None:
    async with kept_ready(4 * MIB) as prefaulted:
        assert take(prefaulted, nbytes, nbytes) == 0
        await trio.testing.wait_all_tasks_blocked()
        assert prefaulted.nbytes == 0


async def test_descriptors_are_bounded_however_much_is_taken() -> None:
    async with kept_ready(2 * COUNT_MAX * LEAST_NBYTES) as prefaulted:
        take(prefaulted, *[LEAST_NBYTES] * (2 * COUNT_MAX))
        await until(lambda: prefaulted.descriptor_count == 2 * COUNT_MAX)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert prefaulted.descriptor_count == 2 * COUNT_MAX


async def test_nothing_is_done_once_all_is_ready() -> None:
    async with kept_ready(4 * MIB) as prefaulted:
        take(prefaulted, MIB)
        await until(lambda: prefaulted.nbytes == MIB)
        with trio.fail_after(1):
            await trio.testing.wait_all_tasks_blocked(0.05)  # nobody runs for so long, or this fails


async def test_a_filling_that_is_cancelled_leaves_nothing() -> None:
    async with kept_ready(64 * STRIDE_NBYTES) as prefaulted:
        take(prefaulted, 64 * STRIDE_NBYTES)
        await trio.sleep(0.002)
        assert prefaulted.nbytes == 0


async def test_without_memory_it_says_so_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, start: int, nbytes: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    before = set(Path("/proc/self/fd").iterdir())
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    prefaulted = PrefaultedMemory(MIB)
    take(prefaulted, MIB)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        await prefaulted.keep_ready()
    assert set(Path("/proc/self/fd").iterdir()) == before


async def test_what_a_store_seals_was_unmapped_and_never_comes_back() -> None:
    async with kept_ready(MIB) as prefaulted:
        store = CpuStore(prefaulted)
        assert store.lend_warm("move", KEY, 0, MIB)[1] is None
        store.drop("move", KEY)
        await until(lambda: prefaulted.nbytes == MIB)
        assert store.statistics().prefaulted_nbytes == MIB
        assert store.statistics().descriptor_count == 2
        descriptor, warm = store.lend_warm("move", KEY, 0, MIB)
        assert warm is not None
        with pytest.raises(SealRefusedError):
            store.seal("move", KEY, 0)
        warm.close()
        store.seal("move", KEY, 0)
        inode = os.fstat(descriptor).st_ino
        store.drop("move", KEY)
        await until(lambda: prefaulted.nbytes == MIB)
        again = prefaulted.take(MIB)
        assert again is not None
        assert os.fstat(again.descriptor).st_ino != inode
        again.close()
        await until(lambda: prefaulted.nbytes == MIB)
        store.close()
        assert store.statistics().descriptor_count == 0


def test_memory_is_faulted_in_where_the_kernel_has_no_call_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pkv.store.prefaulted._MADV_POPULATE_WRITE", 12345)  # refused, as by kernels before 5.14
    warm = WarmMemory.create(MIB)
    warm.fault_in(0)
    assert os.fstat(warm.descriptor).st_blocks * memory.BLOCK_NBYTES == MIB
    warm.close()
