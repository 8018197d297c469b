"""`agreement`: 25 real nodes with 10,000 chunks each: from the last one's join until all know what all hold; their memory.

Chunks are a token long and take a page. All nodes but the last are full, and agree, when that one starts; it stores its own as
soon as it is ready. A node agrees when it finds the whole of the newcomer's prompt at the newcomer, and says that its view of
all members is complete. In the end each is asked for each one's prompt.
"""

import time
from collections.abc import Sequence
from itertools import product

import httpx2
import torch

from p2pkv.engines import EngineCache, KVLayout
from sims.bench.processes import NodeProcess, open_bench, resident_nbytes
from sims.bench.report import Row

NODES, CHUNKS = 25, 10_000
LAYOUT = KVLayout(layers=1, kv_heads=1, head_dim=1, dtype="float32")
AGREE_S = 120.0
"""They agree by then, or something is wrong."""
POLL_S = 0.05
REQUEST_S = 30.0


def run(*, nodes: int = NODES, chunks: int = CHUNKS) -> Sequence[Row]:
    """Start and fill all but one; then let the last one join and store."""
    names = [f"m{index:02}" for index in range(nodes)]
    prompts = {name: list(range(index * chunks, (index + 1) * chunks)) for index, name in enumerate(names)}
    torch.zeros(1)  # its first tensor takes time that no node shall be charged with
    with open_bench() as bench, httpx2.Client(trust_env=False, timeout=REQUEST_S) as client:
        running: list[NodeProcess] = []
        for name in names[:-1]:
            running.append(bench.start(name, chunk_size=1, max_local_cpu_size=1))
            _store(running[-1], prompts[name])
        for name in names[:-1]:
            _wait_until_known(client, running, name, chunks, prompts[name])
        last = bench.start(names[-1], chunk_size=1, max_local_cpu_size=1)
        ready_at = time.perf_counter()
        _store(last, prompts[last.instance])
        stored_at = time.perf_counter()
        running.append(last)
        _wait_until_known(client, running, last.instance, chunks, prompts[last.instance])
        agreed_at = time.perf_counter()
        for node, name in product(running, names):
            assert _knows(client, node, name, chunks, prompts[name]), f"{node.instance} doesn't know all that {name} holds"
        memory = tuple(resident_nbytes(node) / 1e6 for node in running)
    return (
        Row(f"the last of {nodes} joins, until all agree on {nodes * chunks:,} entries", "s", (agreed_at - ready_at,), "<= 10"),
        Row(f"... of that, until it has stored its own {chunks:,}", "s", (stored_at - ready_at,)),
        Row("resident memory of a node (anonymous and file pages, without chunks)", "MB", memory),
    )


def _store(node: NodeProcess, tokens: list[int]) -> None:
    with EngineCache.attach(node.config, model="bench", layout=LAYOUT, autostart=False) as cache:
        assert cache.store(tokens, torch.zeros(LAYOUT.shape(len(tokens)))) == len(tokens)


def _wait_until_known(client: httpx2.Client, nodes: Sequence[NodeProcess], owner: str, chunks: int, tokens: list[int]) -> None:
    """Wait until each of `nodes` knows all that `owner` holds, and says that it lacks nothing of others."""
    ends_at = time.perf_counter() + AGREE_S
    for node in nodes:
        while not _knows(client, node, owner, chunks, tokens):
            if time.perf_counter() > ends_at:
                raise SystemExit(f"{node.instance} doesn't know within {AGREE_S:g} s what {owner} holds")
            time.sleep(POLL_S)


def _knows(client: httpx2.Client, node: NodeProcess, owner: str, chunks: int, tokens: list[int]) -> bool:
    answer = client.post(f"{node.http}/lookup", json={"tokens": tokens}).raise_for_status().json()
    _, held = answer["layout_info"].get(owner, ("", 0))
    return answer["complete"] is True and held == chunks
