"""`tcp`: 32 chunks of 32 MiB between two instances over loopback TCP, beside a bare transfer of the same bytes."""

import mmap
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection

import httpx2

from sims.bench.handoff import CHUNK_COUNT, CHUNK_NBYTES, TOKENS, move, store, wait_for_pair
from sims.bench.processes import Bench, open_bench
from sims.bench.report import Row, print_rows

ROUNDS = 5
GIB = 2**30
CUBIC, SYSTEM = b"cubic", b"system"
WARM, FRESH = "warm memory", "fresh memfds"
MADV_POPULATE_WRITE = 23
MOVE = "move, request to done"
PREFAULTED = {"0.25 GiB faulted in ahead (the default)": 0.25, "all faulted in ahead": CHUNK_COUNT * CHUNK_NBYTES / GIB}
"""Both pairs' names, and their `max_prefaulted_size`."""
REFILL_S = 2.0
"""Until a node has faulted in 1 GiB again, twice as long as it takes on two quiet cores."""


def run() -> Sequence[Row]:
    """Everything once a round, so that all of it meets the same machine."""
    rates: dict[str, list[float]] = {}

    def note(what: str, took_s: float) -> None:
        rates.setdefault(what, []).append(CHUNK_COUNT * CHUNK_NBYTES / GIB / took_s)

    with open_bench() as bench, _bare_sender() as port, ExitStack() as clients:
        pairs = [_Pair(bench, clients, name, size) for name, size in PREFAULTED.items()]
        for round_index in range(-1, ROUNDS):  # the first one teaches the nodes the shards' size
            tokens = [token + (round_index + 1) * len(TOKENS) for token in TOKENS]
            for pair in pairs:
                forth_s, back_s = pair.move_forth_and_back(tokens)
                if round_index >= 0:
                    note(f"{MOVE}, {pair.name}", forth_s)
                    note(f"move back, checksums known, {pair.name}", back_s)
            if round_index < 0:
                continue
            for congestion in (CUBIC, SYSTEM):
                for memory in (WARM, FRESH):
                    note(f"bare, {congestion.decode()}, into {memory}", _receive_bare(port, congestion, memory))
    rows = [Row(what, "GiB/s", tuple(values)) for what, values in rates.items()]
    moves, bares = ([row for row in rows if row.name.startswith(kind)] for kind in ("move", "bare"))
    ratios = [
        Row(f"{ours.name} / {bare.name}", "", tuple(a / b for a, b in zip(ours.values, bare.values, strict=True)), ">= 0.7")
        for ours in moves
        for bare in bares
        if bare.name.startswith(f"bare, {CUBIC.decode()}") or ours.name.startswith(MOVE)
    ]
    return (*rows, *ratios)


class _Pair:
    """Two instances that move over TCP, and how much memory each keeps faulted in ahead."""

    def __init__(self, bench: Bench, clients: ExitStack, name: str, prefaulted_gib: float) -> None:
        self.name = name
        self._nodes = [
            bench.start(
                f"bench-{prefaulted_gib:g}-{number}",
                cluster=f"bench-{prefaulted_gib:g}",
                max_local_cpu_size=2.5,
                max_prefaulted_size=prefaulted_gib,
                same_host_handoff="false",
            )
            for number in (1, 2)
        ]
        self._client = clients.enter_context(httpx2.Client(base_url=self._nodes[0].http, trust_env=False, timeout=60))
        wait_for_pair(self._client)

    def move_forth_and_back(self, tokens: Sequence[int]) -> tuple[float, float]:
        """Store these and move them to the other instance and back; seconds for each move."""
        one, other = self._nodes
        store(one, tokens)
        forth_s = move(self._client, one.instance, other.instance, tokens)
        time.sleep(REFILL_S)
        back_s = move(self._client, other.instance, one.instance, tokens)
        time.sleep(REFILL_S)
        return forth_s, back_s


# --- the bare transfer ----------------------------------------------------------------------------------------------------


@contextmanager
def _bare_sender() -> Iterator[int]:
    """A process that sends the same bytes to whoever connects to the port."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=_send_bare, args=(far,), daemon=True)
    process.start()
    try:
        yield near.recv()
    finally:
        process.terminate()
        process.join()


def _send_bare(parent: Connection) -> None:
    content = mmap.mmap(-1, CHUNK_NBYTES)
    content.write(os.urandom(CHUNK_NBYTES))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        parent.send(listener.getsockname()[1])
        while True:
            connection, _ = listener.accept()
            with connection:
                if connection.recv(len(CUBIC)) == CUBIC:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CUBIC)
                for _ in range(CHUNK_COUNT):
                    connection.sendall(content)


def _receive_bare(port: int, congestion: bytes, memory: str) -> float:
    warm = mmap.mmap(-1, CHUNK_NBYTES)
    warm.madvise(MADV_POPULATE_WRITE)
    descriptors = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        began = time.perf_counter()
        connection.sendall(congestion[: len(CUBIC)])
        for _ in range(CHUNK_COUNT):
            if memory == WARM:
                _receive(connection, warm)
                continue
            descriptors.append(os.memfd_create("bench", os.MFD_CLOEXEC))
            os.ftruncate(descriptors[-1], CHUNK_NBYTES)
            with mmap.mmap(descriptors[-1], CHUNK_NBYTES) as mapped:
                _receive(connection, mapped)
        took_s = time.perf_counter() - began
    for descriptor in descriptors:
        os.close(descriptor)
    return took_s


def _receive(connection: socket.socket, mapped: mmap.mmap) -> None:
    with memoryview(mapped) as view:
        received = 0
        while received < len(view):
            with view[received:] as rest:
                count = connection.recv_into(rest, 0, socket.MSG_WAITALL)
            assert count, "the sender has ended"
            received += count


if __name__ == "__main__":
    print_rows("tcp", run(), as_json="--json" in sys.argv[1:])
