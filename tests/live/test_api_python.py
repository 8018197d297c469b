"""The interface's examples in Python, line by line, at nodes that run."""

import contextlib
import os
import signal
import textwrap
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from p2pkv.client import open_client
from p2pkv.engines import EngineCache, Identity, KVLayout
from p2pkv.rendezvous import NodeCard, is_living, place_of, read_card, runtime_directory
from tests.live.command_line import free_port, wait_gone
from tests.live.doors import open_cluster

pytestmark = pytest.mark.live

OPEN_NODE = """
from p2pkv import NodeConfig, open_node              # a node inside a trio program
async with open_node(NodeConfig.from_yaml("instance1.yaml")) as node: ...
"""
OPEN_CLIENT = """
from p2pkv.client import open_client                 # remote control of any node, async (trio)
async with open_client("http://localhost:9000") as client:
    event = await client.move(("a", "LocalCPUBackend"), ("b", "LocalCPUBackend"), tokens=[...], copy=False)
    done = await client.wait(event.event_id)
"""
ENGINE = """
from p2pkv.engines import EngineCache, KVLayout      # what an engine uses: synchronous, any thread, over the unix socket
layout = KVLayout(layers=4, kv_heads=2, head_dim=64, dtype="float32", planes=2)
with EngineCache.attach("instance1.yaml", model="tiny", layout=layout, world_size=1, worker_id=0) as cache:
    cache.store(tokens, kv, identity=None)
    cache.lookup(tokens)
    n, kv = cache.retrieve(tokens)
"""
LAYOUT = KVLayout(layers=4, kv_heads=2, head_dim=64, dtype="float32", planes=2)
TOKENS = list(range(20))
PROMPT = list(range(100, 140))


def write_files(folder: Path, *names: str) -> None:
    for number, name in enumerate(names, 1):
        text = f"lmcache_instance_id: {name}\nlmcache_worker_port: {free_port()}\nchunk_size: 16\n"
        (folder / f"instance{number}.yaml").write_text(text)


@pytest.fixture(scope="module", autouse=True)
def folder() -> Iterator[None]:
    """The current folder has the files of instances a and b; nodes that `attach` has started end with the module."""
    with open_cluster() as cluster, contextlib.chdir(cluster.folder):
        write_files(cluster.folder, "a", "b")
        yield
        for name in "ab":
            if (card := card_of(name)) is not None:
                os.kill(card.pid, signal.SIGTERM)
                wait_gone(card.pid)


def card_of(name: str) -> NodeCard | None:
    """Where a living node's doors are, once it has opened them."""
    place = place_of(runtime_directory(os.environ), "p2pkv", name)
    return read_card(place) if is_living(place) else None


def coroutine(example: str, result: str) -> Callable[[], Awaitable[Any]]:
    """A function of the lines of an example that give this name its value."""
    names: dict[str, Any] = {}
    exec(f"async def run():\n{textwrap.indent(example, '    ')}\n    return {result}", names)
    run: Callable[[], Awaitable[Any]] = names["run"]
    return run


async def test_a_node_runs_inside_a_trio_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, "alone")
    monkeypatch.chdir(tmp_path)
    node = await coroutine(OPEN_NODE, "node")()
    assert node.config.lmcache_instance_id == "alone"


def test_an_engine_keeps_and_finds_its_cache_and_the_node_outlives_it() -> None:
    stored = torch.rand(LAYOUT.shape(len(TOKENS)))
    names: dict[str, Any] = {"tokens": TOKENS, "kv": stored}
    exec(ENGINE, names)
    assert names["n"] == len(TOKENS)
    assert torch.equal(names["kv"], stored)
    with EngineCache.attach("instance1.yaml", model="tiny", layout=LAYOUT, autostart=False) as cache:
        assert cache.store(TOKENS, stored) == len(TOKENS)
        assert cache.lookup([*TOKENS[:18], 99]) == 18
        assert cache.retrieve([99]) == (0, None)


def test_an_identity_goes_with_all_three() -> None:
    tokens = list(range(1000, 1020))  # of nobody else
    stored = torch.rand(LAYOUT.shape(len(tokens)))
    identity = Identity(cache_salt="tenant", lora="adapter", media=[(0, 2, b"digest")])  # type: ignore[arg-type]
    with EngineCache.attach("instance1.yaml", model="tiny", layout=LAYOUT) as cache:
        assert cache.store(tokens, stored, identity=identity) == len(tokens)
        assert cache.lookup(tokens, identity=identity) == len(tokens)
        count, found = cache.retrieve(tokens, identity=identity)
        assert count == len(tokens)
        assert found is not None
        assert torch.equal(found, stored)
        assert (cache.lookup(tokens), cache.retrieve(tokens)) == (0, (0, None))


async def test_a_client_moves_and_waits() -> None:
    def attach_both() -> None:
        for number in (2, 1):
            with EngineCache.attach(f"instance{number}.yaml", model="tiny", layout=LAYOUT) as cache:
                if number == 1:
                    cache.store(PROMPT, torch.rand(LAYOUT.shape(len(PROMPT))))

    await trio.to_thread.run_sync(attach_both)
    with trio.fail_after(5):
        for name in "ab":
            while (card := card_of(name)) is None:  # noqa: ASYNC110 - it is written once all doors are open
                await trio.sleep(0.02)
            async with open_client(card.http) as client:
                while len(await client.members()) < 2:  # noqa: ASYNC110 - a client has no event for it
                    await trio.sleep(0.02)
    shared = os.environ["P2PKV_CONTROLLER_HTTP_URL"]
    example = OPEN_CLIENT.replace("localhost:9000", shared).replace("[...]", str(PROMPT))
    with trio.fail_after(10):
        done = await coroutine(example, "done")()
    assert (done.state, done.num_tokens, done.chunks.moved) == ("done", len(PROMPT), 3)
