"""`together`: 100 moves at once over loopback TCP, beside one move of the same bytes."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx2
import torch

from p2pkv.engines import EngineCache
from sims.bench.handoff import CHUNK_NBYTES, CHUNK_SIZE, LAYOUT, POSITION, wait_for_pair
from sims.bench.processes import NodeProcess, open_bench
from sims.bench.report import Row

MOVES = 100
CHUNKS_EACH = 2
ROUNDS = 4
STORE_GIB = 8
WAIT_S = 300
GIB = 2**30
PROMPTS = [[first * 1_000_000 + token for token in range(CHUNKS_EACH * CHUNK_SIZE)] for first in range(MOVES)]


def run() -> Sequence[Row]:
    """There as one move and back as a hundred, or the other way round, in turns."""
    one_s, together_s = [], []
    with (
        open_bench() as bench,
        httpx2.Client(trust_env=False, timeout=WAIT_S, limits=httpx2.Limits(max_connections=MOVES)) as client,
    ):
        nodes = [bench.start(f"bench{number}", max_local_cpu_size=STORE_GIB, same_host_handoff="false") for number in (1, 2)]
        client.base_url = nodes[0].http
        wait_for_pair(client)
        _store_all(nodes[0])
        for round_index in range(2 * ROUNDS):
            old, new = nodes if round_index % 2 == 0 else nodes[::-1]
            if round_index % 4 in (0, 3):
                one_s.append(_one_move(client, old, new))
            else:
                together_s.append(_moves_together(client, old, new))
    total_gib = MOVES * CHUNKS_EACH * CHUNK_NBYTES / GIB
    return (
        Row(f"one move of {total_gib:.1f} GiB, request to done", "GiB/s", tuple(total_gib / each for each in one_s)),
        Row(f"{MOVES} moves of it at once, until the last is done", "GiB/s", tuple(total_gib / each for each in together_s)),
        Row("time for them / for the one", "", tuple(a / b for a, b in zip(together_s, one_s, strict=True)), "<= 1.2"),
    )


def _store_all(node: NodeProcess) -> None:
    kv = torch.randn(LAYOUT.shape(CHUNKS_EACH * CHUNK_SIZE)).to(torch.bfloat16)
    with EngineCache.attach(node.config, model="bench", layout=LAYOUT, autostart=False) as cache:
        for prompt in PROMPTS:
            assert cache.store(prompt, kv) == len(prompt)


def _one_move(client: httpx2.Client, old: NodeProcess, new: NodeProcess) -> float:
    began = time.perf_counter()
    _move(client, old, new, all=True)
    return time.perf_counter() - began


def _moves_together(client: httpx2.Client, old: NodeProcess, new: NodeProcess) -> float:
    with ThreadPoolExecutor(MOVES) as pool:
        began = time.perf_counter()
        list(pool.map(lambda prompt: _move(client, old, new, tokens=prompt), PROMPTS))
        return time.perf_counter() - began


def _move(client: httpx2.Client, old: NodeProcess, new: NodeProcess, **what: object) -> None:
    body = {"old_position": [old.instance, POSITION], "new_position": [new.instance, POSITION], "wait_s": WAIT_S, **what}
    reply = client.post("/move", json=body).json()
    assert reply["state"] == "done", reply
