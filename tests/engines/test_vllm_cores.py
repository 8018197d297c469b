"""Where the connector's threads and its node run, in processes that are bound to cores as vLLM binds its workers."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from p2pkv.engines.autostart import connect_or_start
from p2pkv.engines.vllm.crew import Crew
from p2pkv.rendezvous import place_of, read_card
from tests.live.command_line import wait_gone, write_config

ALLOWED = os.sched_getaffinity(0)
CORE = min(ALLOWED)
GNU_OPENMP = str(Path(torch.__file__).parent / "lib" / "libgomp.so.1")

pytestmark = pytest.mark.skipif(len(ALLOWED) < 2, reason="bound or not is the same on one core")


@dataclass(frozen=True)
class Seen:
    """The cores of a worker's first thread, those of a crew's thread after a large copy, and how many threads that started."""

    first: set[int]
    crew: set[int]
    started: int


def look() -> Seen:
    """In the worker."""
    seen: SimpleQueue[Seen] = SimpleQueue()

    def copy() -> None:
        before = len(list(Path("/proc/self/task").iterdir()))
        torch.ones(2**22).index_select(0, torch.arange(2**21))  # twice as much as torch needs to share it out
        after = len(list(Path("/proc/self/task").iterdir()))
        seen.put(Seen(os.sched_getaffinity(os.getpid()), os.sched_getaffinity(0), after - before))

    crew = Crew("test")
    crew.submit(copy)
    crew.close(10)
    return seen.get(timeout=10)


def start_node(config: Path, runtime_dir: Path) -> set[int]:
    """In the worker: the cores of the node that a crew starts."""
    place = place_of(runtime_dir, "p2pkv", "a")
    crew = Crew("test")
    crew.submit(lambda: connect_or_start(place, config).close())
    crew.close(30)
    deadline = time.monotonic() + 5
    while (card := read_card(place)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    try:
        return os.sched_getaffinity(card.pid)
    finally:
        os.kill(card.pid, signal.SIGTERM)
        wait_gone(card.pid)


def look_as_bound_by_hand() -> Seen:
    """In the worker: an operator, or vLLM for a NUMA node, has chosen its cores."""
    os.sched_setaffinity(0, {CORE})
    return look()


@pytest.fixture
def worker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessPoolExecutor]:
    """A process that is started with more of an environment: by `multiprocessing`, as vLLM starts its workers."""
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


BOUND = [
    {"OMP_NUM_THREADS": "2", "OMP_PROC_BIND": "true", "OMP_PLACES": f"{{{CORE}}}"},
    {"OMP_NUM_THREADS": "2", "GOMP_CPU_AFFINITY": str(CORE), "LD_PRELOAD": GNU_OPENMP},
]
"""As vLLM has OpenMP bind a worker, without any preloaded and with GNU's, which then is in the node as well."""


@pytest.mark.parametrize("worker", BOUND, indirect=True)
def test_threads_leave_a_bound_workers_core_and_copy_alone(worker: ProcessPoolExecutor) -> None:
    assert worker.submit(look).result(60) == Seen(first={CORE}, crew=ALLOWED, started=0)


@pytest.mark.live
@pytest.mark.long
@pytest.mark.parametrize("worker", BOUND, indirect=True)
def test_a_node_that_a_bound_worker_starts_runs_on_all_cores(
    worker: ProcessPoolExecutor, tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2PKV_RUNTIME_DIR", str(runtime_dir))
    assert worker.submit(start_node, write_config(tmp_path, "a"), runtime_dir).result(60) == ALLOWED


@pytest.mark.parametrize("worker", [{}], indirect=True)
def test_cores_that_openmp_did_not_choose_are_kept(worker: ProcessPoolExecutor) -> None:
    seen = worker.submit(look_as_bound_by_hand).result(60)
    assert (seen.first, seen.crew) == ({CORE}, {CORE})


def test_a_process_that_vllm_did_not_start_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    os.sched_setaffinity(0, {CORE})
    try:
        assert look().crew == {CORE}
    finally:
        os.sched_setaffinity(0, ALLOWED)
