"""Whole nodes over real sockets notice that one is killed, and that one stands still (protocol rules L10, L13, L14)."""

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from p2pkv import open_node
from p2pkv.core.records import MemberState
from p2pkv.node import Node
from tests.live.test_two_nodes import config_of, free_port, state_of, until

pytestmark = pytest.mark.live

WATCHERS = ("a", "b", "c", "d")
VICTIM = "v"


@pytest.fixture
def environ(runtime_dir: Path) -> dict[str, str]:
    return {"P2PKV_RUNTIME_DIR": str(runtime_dir)}


@asynccontextmanager
async def cluster(runtime_dir: Path, environ: dict[str, str]) -> AsyncIterator[tuple[list[Node], trio.Process]]:
    """Some nodes, and one that is a process of its own; all know each other."""
    keys = {
        "lmcache_instance_id": VICTIM,
        "lmcache_worker_port": free_port(),
        "controller_http_url": f"localhost:{free_port()}",
    }
    yaml = runtime_dir / "victim.yaml"
    yaml.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    command = [sys.executable, "-m", "p2pkv", "node", "--config", str(yaml)]
    async with AsyncExitStack() as nodes:
        watchers = [await nodes.enter_async_context(open_node(config_of(name), environ)) for name in WATCHERS]
        async with trio.open_nursery() as nursery:
            run = partial(trio.run_process, command, env={**os.environ, **environ}, check=False, stdout=None)
            process: trio.Process = await nursery.start(run)
            try:
                await until(lambda: all(state_of(node, VICTIM) is MemberState.ALIVE for node in watchers), within_s=15)
                yield watchers, process
            finally:
                process.kill()


@pytest.mark.parametrize(
    ("blow", "within_s"), [(signal.SIGKILL, 2.0), pytest.param(signal.SIGSTOP, 10.0, marks=pytest.mark.long)]
)
async def test_an_end_is_known_by_all_in_time(
    runtime_dir: Path, environ: dict[str, str], blow: signal.Signals, within_s: float
) -> None:
    async with cluster(runtime_dir, environ) as (watchers, process):
        process.send_signal(blow)
        await until(lambda: all(state_of(node, VICTIM) is MemberState.DEAD for node in watchers), within_s)
        assert all(state_of(node, name) is MemberState.ALIVE for node in watchers for name in WATCHERS)


@pytest.mark.long
async def test_who_stood_still_is_alive_again_when_it_goes_on(runtime_dir: Path, environ: dict[str, str]) -> None:
    async with cluster(runtime_dir, environ) as (watchers, process):
        process.send_signal(signal.SIGSTOP)
        await until(lambda: any(state_of(node, VICTIM) is MemberState.SUSPECT for node in watchers), within_s=5)
        process.send_signal(signal.SIGCONT)
        await until(lambda: all(state_of(node, VICTIM) is MemberState.ALIVE for node in watchers), within_s=3)
