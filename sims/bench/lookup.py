"""`lookup`: how soon a node says who holds a prompt, and how long it does nothing else meanwhile."""

import json
import sys
import time
from collections.abc import Sequence
from http.client import HTTPConnection
from urllib.parse import urlsplit

import httpx2
import torch

from p2pkv.engines import EngineCache, KVLayout
from sims.bench.handoff import POSITION, wait_for_pair
from sims.bench.processes import NodeProcess, open_bench
from sims.bench.report import Row, print_rows

LONG, SHORT = 131_072, 512
ROUNDS = {LONG: 40, SHORT: 400}
PROMPTS = 4
"""Held by each of the two instances, `LONG` tokens each: 4,096 chunks in view."""
LAYOUT = KVLayout(layers=1, kv_heads=1, head_dim=8, dtype="float32")
VIEW_S = 10.0


def run() -> Sequence[Row]:
    """Ask a node that holds one half of the prompts, and knows who holds the other."""
    with open_bench() as bench:
        asked = bench.start("bench1", program=("sims.bench.ticking",))
        other = bench.start("bench2")
        with httpx2.Client(base_url=asked.http, trust_env=False) as client:
            wait_for_pair(client)
        prompts = [[first * 2**20 + index for index in range(LONG)] for first in range(2 * PROMPTS)]
        _store(asked, prompts[:PROMPTS])
        _store(other, prompts[PROMPTS:])
        connection = HTTPConnection(urlsplit(asked.http).netloc, timeout=10)
        _wait_for_view(connection, prompts)
        return [row for count in (SHORT, LONG) for row in _measure(asked, connection, prompts, count)]


def _store(node: NodeProcess, prompts: Sequence[Sequence[int]]) -> None:
    with EngineCache.attach(node.config, model="bench", layout=LAYOUT, autostart=False) as cache:
        for tokens in prompts:
            assert cache.store(tokens, torch.zeros(LAYOUT.shape(len(tokens)))) == len(tokens)


def _wait_for_view(connection: HTTPConnection, prompts: Sequence[Sequence[int]]) -> None:
    deadline = time.monotonic() + VIEW_S
    while not all(_lookup(connection, tokens)[1] == len(tokens) for tokens in prompts):
        assert time.monotonic() < deadline, "the other node's chunks didn't come into view"


def _measure(
    node: NodeProcess, connection: HTTPConnection, prompts: Sequence[Sequence[int]], token_count: int
) -> Sequence[Row]:
    took, stalls = [], []
    for index in range(ROUNDS[token_count]):
        _longest_stall(node)
        seconds, held = _lookup(connection, prompts[index % len(prompts)][:token_count])
        assert held == token_count
        took.append(seconds * 1000)
        stalls.append(_longest_stall(node))
    what = f"lookup of {token_count:,} tokens"
    return (
        Row(f"{what}, over HTTP, one connection", "ms", tuple(took), "<= 3" if token_count == SHORT else "<= 40"),
        Row(f"... the longest time for which the node did nothing else, {what}", "ms", tuple(stalls), "<= 10"),
    )


def _lookup(connection: HTTPConnection, tokens: Sequence[int]) -> tuple[float, int]:
    """Seconds until the answer, and the tokens held by whoever holds most."""
    body = json.dumps({"tokens": tokens})
    began = time.perf_counter()
    connection.request("POST", "/lookup", body, {"Content-Type": "application/json"})
    reply = json.load(connection.getresponse())
    took_s = time.perf_counter() - began
    held = dict(reply["layout_info"].values())
    return took_s, held.get(POSITION, 0)


def _longest_stall(node: NodeProcess) -> float:
    """Of the node's event loop since this was asked last, in milliseconds."""
    assert node.process.stdin is not None
    assert node.process.stdout is not None
    node.process.stdin.write("\n")
    node.process.stdin.flush()
    return float(node.process.stdout.readline())


if __name__ == "__main__":
    print_rows("lookup", run(), as_json="--json" in sys.argv[1:])
