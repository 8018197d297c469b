"""`tcp`: 32 chunks of 32 MiB between two instances over loopback TCP, beside a bare transfer of the same bytes."""

import mmap
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import httpx2

from sims.bench.handoff import CHUNK_COUNT, CHUNK_NBYTES, TOKENS, move, store, wait_for_pair
from sims.bench.processes import open_bench
from sims.bench.report import Row, print_rows

ROUNDS = 5
GIB = 2**30
CUBIC, SYSTEM = b"cubic", b"system"
WARM, FRESH = "warm memory", "fresh memfds"
MADV_POPULATE_WRITE = 23


def run() -> Sequence[Row]:
    """Everything once a round, so that all of it meets the same machine."""
    rates: dict[str, list[float]] = {}

    def note(what: str, took_s: float) -> None:
        rates.setdefault(what, []).append(CHUNK_COUNT * CHUNK_NBYTES / GIB / took_s)

    with open_bench() as bench, _bare_sender() as port:
        one, other = [bench.start(name, max_local_cpu_size=2.5, same_host_handoff="false") for name in ("bench1", "bench2")]
        with httpx2.Client(base_url=one.http, trust_env=False, timeout=60) as client:
            wait_for_pair(client)
            for round_index in range(ROUNDS):
                tokens = [token + round_index * len(TOKENS) for token in TOKENS]
                store(one, tokens)
                note("move, request to done", move(client, one.instance, other.instance, tokens))
                note("move back, checksums known", move(client, other.instance, one.instance, tokens))
                for congestion in (CUBIC, SYSTEM):
                    for memory in (WARM, FRESH):
                        note(f"bare, {congestion.decode()}, into {memory}", _receive_bare(port, congestion, memory))
    rows = [Row(what, "GiB/s", tuple(values)) for what, values in rates.items()]
    moves, _, *bares = rows
    ratios = [tuple(ours / theirs for ours, theirs in zip(moves.values, bare.values, strict=True)) for bare in bares]
    return (*rows, *(Row(f"move / {bare.name}", "", ratio, ">= 0.7") for bare, ratio in zip(bares, ratios, strict=True)))


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
