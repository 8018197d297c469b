"""`vllm serve` binds its worker to a core; the connector's threads there, and the node, aren't."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from p2pkv.engines.vllm.loading import THREADS
from p2pkv.rendezvous import living_cards
from sims.bench.vllm.engines import CONNECTOR
from tests.vllm.connected import wait_until
from tests.vllm.engines import Server

ALLOWED = os.sched_getaffinity(0)
CORE = min(ALLOWED)
OURS = THREADS + 2
"""Those that load, and the two that store."""


def worker_of(server: Server) -> int:
    """The process that computes."""
    [pid] = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.read_bytes().startswith(b"VLLM::Worker") and os.getsid(int(path.parent.name)) == server.process.pid
    ]
    return pid


def cores_of_threads(pid: int) -> list[set[int]]:
    return [os.sched_getaffinity(int(path.name)) for path in Path(f"/proc/{pid}/task").iterdir()]


@pytest.mark.skipif(len(ALLOWED) < 2, reason="bound or not is the same on one core")
def test_only_the_models_own_threads_keep_to_its_core(
    configure: Callable[..., Path], serve: Callable[..., Server], runtime_dir: Path
) -> None:
    configure("a")
    own_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # for the worker, as is usual; other tests here say 0
    server = serve(kv_transfer=CONNECTOR, environ={**own_process, "VLLM_CPU_OMP_THREADS_BIND": str(CORE)})
    server.complete(list(range(2, 300)))
    worker = worker_of(server)
    assert os.sched_getaffinity(worker) == {CORE}
    wait_until(lambda: len(living_cards(runtime_dir, "p2pkv")) == 1)
    [node] = living_cards(runtime_dir, "p2pkv")
    assert os.sched_getaffinity(node.pid) == ALLOWED
    wait_until(lambda: len(cores_of_threads(worker)) == OURS + cores_of_threads(worker).count({CORE}))
    assert cores_of_threads(worker).count(ALLOWED) == OURS  # no more: the one that started the node has ended
