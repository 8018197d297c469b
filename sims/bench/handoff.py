"""`handoff`: 32 chunks of 32 MiB from one instance to another on one host, beside a plain copy and bare descriptors."""

import array
import mmap
import os
import socket
import time
from collections.abc import Sequence

import httpx2
import numpy as np
import torch

from p2pkv.engines import EngineCache, KVLayout
from sims.bench.processes import NodeProcess, open_bench
from sims.bench.report import Row

CHUNK_COUNT = 32
CHUNK_SIZE = 256
LAYOUT = KVLayout(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16")
"""Llama-3.1-8B's: 128 KiB a token, 32 MiB a chunk."""
CHUNK_NBYTES = 32 * 2**20
ROUNDS = 10
TOKENS = list(range(CHUNK_COUNT * CHUNK_SIZE))
POSITION = "LocalCPUBackend"


def run() -> Sequence[Row]:
    """Move the same gigabyte there and back, `ROUNDS` times each."""
    with open_bench() as bench:
        nodes = [bench.start(name, max_local_cpu_size=4) for name in ("bench1", "bench2")]
        store(nodes[0], TOKENS)
        moves, reads = [], []
        with httpx2.Client(base_url=nodes[0].http, trust_env=False, timeout=30) as client:
            wait_for_pair(client)
            for round_index in range(2 * ROUNDS):
                old, new = nodes if round_index % 2 == 0 else nodes[::-1]
                moves.append(move(client, old.instance, new.instance, TOKENS) * 1000)
            for node in (nodes[1], nodes[0]):
                move(client, nodes[0].instance if node is nodes[1] else nodes[1].instance, node.instance, TOKENS)
                reads.append(_read(node) * 1000)
    total = f"{CHUNK_COUNT} x {CHUNK_NBYTES >> 20} MiB"
    return (
        Row(f"move of {total}, request to done", "ms", tuple(moves), "<= 100"),
        Row("retrieve all of it afterwards, into one fresh tensor", "ms", tuple(reads)),
        Row(f"one copy of {total} into fresh memfds", "ms", tuple(_copy() * 1000 for _ in range(3))),
        Row(f"{CHUNK_COUNT} bare descriptors over a socket pair", "ms", tuple(_pass_bare() * 1000 for _ in range(ROUNDS))),
    )


def store(node: NodeProcess, tokens: Sequence[int]) -> None:
    """Have `node` hold `CHUNK_COUNT` chunks of these tokens."""
    with EngineCache.attach(node.config, model="bench", layout=LAYOUT, autostart=False) as cache:
        one = torch.randn(LAYOUT.layers, 2, CHUNK_SIZE, LAYOUT.kv_heads, LAYOUT.head_dim).to(torch.bfloat16)
        held = cache.store(tokens, one.repeat(1, 1, CHUNK_COUNT, 1, 1))
        assert held == len(tokens), f"only {held} tokens were stored"


def wait_for_pair(client: httpx2.Client) -> None:
    """Wait until the node of `client` knows another one."""
    deadline = time.monotonic() + 10
    while sum(member["state"] == "alive" for member in client.get("/members").json()["members"]) < 2:
        assert time.monotonic() < deadline, "the nodes didn't find each other"
        time.sleep(0.05)


def move(client: httpx2.Client, old: str, new: str, tokens: Sequence[int]) -> float:
    """Move them all; seconds from the request to `done`."""
    body = {"old_position": [old, POSITION], "new_position": [new, POSITION], "tokens": tokens, "wait_s": 30}
    began = time.perf_counter()
    reply = client.post("/move", json=body).json()
    took_s = time.perf_counter() - began
    assert (reply["state"], reply["num_tokens"]) == ("done", len(tokens)), reply
    return took_s


def _read(node: NodeProcess) -> float:
    with EngineCache.attach(node.config, model="bench", layout=LAYOUT, autostart=False) as cache:
        began = time.perf_counter()
        count, _ = cache.retrieve(TOKENS)
        assert count == len(TOKENS)
        return time.perf_counter() - began


def _copy() -> float:
    source = np.ones(CHUNK_NBYTES, np.uint8)
    began = time.perf_counter()
    for _ in range(CHUNK_COUNT):
        descriptor = os.memfd_create("bench", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, CHUNK_NBYTES)
        with mmap.mmap(descriptor, CHUNK_NBYTES) as mapped:
            target = np.frombuffer(mapped, np.uint8)
            np.copyto(target, source)
            del target
        os.close(descriptor)
    return time.perf_counter() - began


def _pass_bare() -> float:
    descriptors = [os.memfd_create("bench", os.MFD_CLOEXEC) for _ in range(CHUNK_COUNT)]
    near, far = socket.socketpair()
    began = time.perf_counter()
    near.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])
    _, ancillary, _, _ = far.recvmsg(1, socket.CMSG_SPACE(4 * CHUNK_COUNT))
    took_s = time.perf_counter() - began
    received = array.array("i", ancillary[0][2])
    for descriptor in (*descriptors, *received):
        os.close(descriptor)
    near.close()
    far.close()
    return took_s
