"""What is given to the closing thread is closed in order, off the event loop, and none of it is left over."""

import os
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from p2pkv.store import memory
from p2pkv.store.closing import WAITING_MAX, ClosingThread
from p2pkv.store.cpu import CpuStore

KEY = b"k" * 16


def open_count() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def closed_in(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Names of the threads that closed, by descriptor, in order; they close as ever."""
    threads: dict[int, str] = {}
    close = os.close

    def noting_close(descriptor: int) -> None:
        threads[descriptor] = threading.current_thread().name
        close(descriptor)

    monkeypatch.setattr("p2pkv.store.closing.os.close", noting_close)
    return threads


async def test_what_a_store_releases_is_closed_in_order_and_in_another_thread(closed_in: dict[int, str]) -> None:
    closing = ClosingThread()
    store = CpuStore(close=closing.close_soon)
    lent = [store.lend("engine", KEY, worker, 100) for worker in range(20)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(closing.keep_closing)
        store.drop("engine", KEY)
        assert store.statistics().descriptor_count == 0
        with trio.fail_after(5):
            while lent[-1] not in closed_in:  # noqa: ASYNC110 - the thread tells nobody
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert [each for each in closed_in if each in lent] == lent
    assert threading.current_thread().name not in {closed_in[each] for each in lent}


async def test_a_cancelled_thread_is_waited_for_and_what_it_never_saw_is_closed_at_the_end() -> None:
    before = open_count()
    closing = ClosingThread()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(closing.keep_closing)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(10):
            closing.close_soon(memory.create(2**20))
        nursery.cancel_scope.cancel()
    store = CpuStore(close=closing.close_soon)
    store.lend("engine", KEY, 0, 100)
    store.close()
    closing.close_waiting()
    assert open_count() == before


def test_only_so_many_wait() -> None:
    before = open_count()
    closing = ClosingThread()
    for _ in range(WAITING_MAX + 10):
        closing.close_soon(memory.create(1))
    assert open_count() == before + WAITING_MAX
    closing.close_waiting()
    assert open_count() == before
