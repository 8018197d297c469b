"""The worker half on caches laid out as vLLM's, with a real node through `EngineCache`."""

import os
import signal
import socket
import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import pytest
import torch

from p2pkv.core.keys import Identity
from p2pkv.engines import EngineCache, KVLayout
from p2pkv.engines.vllm import storing
from p2pkv.engines.vllm.layout import PagedLayout, keys_transposed
from p2pkv.engines.vllm.link import KnownNode, NodeLink
from p2pkv.engines.vllm.loading import Loads
from p2pkv.engines.vllm.orders import ConnectorMetadata, LoadOrder, StoreOrder
from p2pkv.engines.vllm.storing import Stores
from p2pkv.engines.vllm.tally import Tally
from p2pkv.engines.vllm.working import WorkerHalf
from p2pkv.rendezvous import place_of, read_card, runtime_directory
from tests.live.command_line import wait_gone

pytestmark = pytest.mark.live

CHUNK = 256
BLOCKS = 64
LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=4, dtype="float32")
TOKEN_NBYTES = 2 * 2 * 2 * 4 * 4
LIMIT_NBYTES = 2**20
"""Of the node: 8192 tokens."""
REPLY_S = 0.5
LOAD_DEADLINE_S = 1.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Node:
    """A node that runs, and can be stopped."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "a.yaml"
        self.config.write_text(
            f"lmcache_instance_id: a\nlmcache_worker_port: {free_port()}\ncontroller_http_url: localhost:{free_port()}\n"
            f"chunk_size: {CHUNK}\nmax_local_cpu_size: {LIMIT_NBYTES / 2**30}\n"
        )
        with self.attach("start"):
            place = place_of(runtime_directory(os.environ), "p2pkv", "a")
            deadline = time.monotonic() + 5
            while (card := read_card(place)) is None:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        self.pid = card.pid

    def attach(self, model: str, world_size: int = 1, worker_id: int = 0) -> EngineCache:
        return EngineCache.attach(
            self.config, model=model, layout=LAYOUT, world_size=world_size, worker_id=worker_id, reply_s=REPLY_S
        )

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


@pytest.fixture(scope="module")
def shared_node() -> Iterator[Node]:
    with TemporaryDirectory(prefix="p2pkv-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("P2PKV_RUNTIME_DIR", folder)
        node = Node(Path(folder))
        yield node
        node.signal(signal.SIGTERM)
        wait_gone(node.pid)


@pytest.fixture
def node(shared_node: Node) -> Iterator[Node]:
    yield shared_node
    shared_node.signal(signal.SIGCONT)


class Worker:
    """A worker half, the caches that it works on, and the steps that it is taken through."""

    def __init__(self, attach: Callable[[], EngineCache], *, block_size: int, kv_heads: int = 2, is_only: bool = True) -> None:
        self.caches = [torch.rand(BLOCKS, kv_heads, block_size, 8) for _ in range(2)]
        self.paged = PagedLayout(self.caches, [keys_transposed(cache) for cache in self.caches], block_size)
        self.tally, bell = Tally(), Event()
        self.counts: dict[str, int] = {}
        link = partial(NodeLink, attach, lambda cache: KnownNode("a", 1, cache.namespace.chunk_size))
        self.loads = Loads(link(), self.paged, LOAD_DEADLINE_S, self.tally, bell)
        self.stores = Stores(link(), self.paged, 4 * CHUNK * TOKEN_NBYTES, is_only_worker=is_only, tally=self.tally, bell=bell)
        self.half = WorkerHalf(self.loads, self.stores, block_size, bell)

    def step(self, orders: ConnectorMetadata) -> tuple[set[str], set[str], set[int]]:
        self.half.before_step(orders)
        self.half.start_loads(orders)
        self.half.start_stores(orders)
        self.half.rest(orders)
        read, received = self.half.ended()
        return read, received, self.half.take_failed_blocks()

    def until(self, is_over: Callable[[], bool], within_s: float = 5.0) -> None:
        deadline = time.monotonic() + within_s
        while not is_over():
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def store(self, tokens: "array[int]", blocks: tuple[int, ...], start: int = 0, name: str = "r") -> None:
        """Store, and take the steps until the request's blocks are read and the node has it."""
        order = StoreOrder(name, tokens, Identity(), blocks, start, CHUNK)
        read, _, _ = self.step(ConnectorMetadata(stores=(order,), finished=(name,), is_idle=True))
        while not read:
            read, _, _ = self.step(ConnectorMetadata(is_idle=True))
        assert read == {name}
        self.until(lambda: not self.stores._buffered_nbytes)

    def load(self, tokens: "array[int]", blocks: tuple[int, ...], start: int = 0) -> set[int]:
        """Load, and take the steps until that has ended; the blocks that failed."""
        order = LoadOrder("r", tokens, Identity(), blocks, start)
        _, received, failed = self.step(ConnectorMetadata(loads=(order,), is_idle=True))
        while not received:
            assert not failed
            _, received, failed = self.step(ConnectorMetadata(is_idle=True))
        assert received == {"r"}
        return failed

    def kv(self, blocks: tuple[int, ...], start: int, end: int) -> torch.Tensor:
        return self.paged.gather(blocks, start, end)

    def count(self, name: str) -> int:
        data = self.tally.take()
        for key, number in {} if data is None else data["counts"].items():
            self.counts[key] = self.counts.get(key, 0) + number
        return self.counts.get(name, 0)


@pytest.fixture
def worker(node: Node, request: pytest.FixtureRequest) -> Iterator[Worker]:
    worker = Worker(lambda: node.attach(request.node.name), block_size=32)
    yield worker
    worker.half.close()


def prompt(count: int, first: int = 0) -> "array[int]":
    return array("i", range(first, first + count))


def blocks_for(count: int, block_size: int, first: int = 0, step: int = 1) -> tuple[int, ...]:
    return tuple(range(first, first + step * -(-count // block_size), step))


# --- what is stored comes back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [32, 48, 128])
@pytest.mark.parametrize(("count", "start_block"), [(11, 0), (256, 0), (700, 0), (700, 1), (700, 4)])
def test_what_was_stored_is_loaded_bit_by_bit_into_other_blocks(
    node: Node, request: pytest.FixtureRequest, block_size: int, count: int, start_block: int
) -> None:
    worker = Worker(lambda: node.attach(request.node.name), block_size=block_size)
    source, target = blocks_for(count, block_size), blocks_for(count, block_size, first=63, step=-1)
    stored = worker.kv(source, 0, count)
    worker.store(prompt(count), source)
    before = worker.kv(target, 0, count)
    start = start_block * block_size
    assert worker.load(prompt(count), target, start) == set()
    assert torch.equal(worker.kv(target, start, count), stored[:, :, start:])
    assert start == 0 or torch.equal(worker.kv(target, 0, start), before[:, :, :start])
    assert (worker.count("stored_tokens"), worker.count("loaded_tokens")) == (count, count - start)
    worker.half.close()


def test_a_long_prompt_goes_in_pieces(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "PIECE_NBYTES", CHUNK * TOKEN_NBYTES)
    source, target = blocks_for(1000, 32), blocks_for(1000, 32, first=32)
    worker.store(prompt(1000), source)
    assert worker.load(prompt(1000), target) == set()
    assert torch.equal(worker.kv(target, 0, 1000), worker.kv(source, 0, 1000))


def test_what_was_generated_is_added_from_its_chunk_on(worker: Worker) -> None:
    source, target = blocks_for(600, 32), blocks_for(600, 32, first=32)
    worker.store(prompt(300), source)
    worker.store(prompt(600), source, start=256)
    assert worker.load(prompt(600), target) == set()
    assert torch.equal(worker.kv(target, 0, 600), worker.kv(source, 0, 600))


def test_both_workers_shards_make_a_chunk(node: Node) -> None:
    workers = [
        Worker(partial(node.attach, "both", 2, worker_id), block_size=32, kv_heads=1, is_only=False) for worker_id in (0, 1)
    ]
    source, target = blocks_for(300, 32), blocks_for(300, 32, first=32)
    workers[0].store(prompt(300), source)
    assert workers[0].load(prompt(300), target) == set(target)
    workers[1].store(prompt(300), source)
    for worker in workers:
        assert worker.load(prompt(300), target) == set()
        assert torch.equal(worker.kv(target, 0, 300), worker.kv(source, 0, 300))
        assert worker.count("dropped_stores") == 0
        worker.half.close()


# --- what can't be loaded is named ----------------------------------------------------------------------------------------


def test_the_blocks_that_were_not_loaded_whole_are_named(worker: Worker) -> None:
    blocks = blocks_for(700, 32)
    worker.store(prompt(300), blocks)
    assert worker.load(prompt(700), blocks, start=64) == set(blocks[9:])  # token 300 lies in block 9
    assert worker.load(prompt(700, first=1), blocks, start=64) == set(blocks[2:])
    assert worker.count("load_errors") == 2


def test_a_load_ends_at_its_deadline_and_writes_nothing_afterwards(node: Node, worker: Worker) -> None:
    source, target = blocks_for(700, 32), blocks_for(700, 32, first=32)
    worker.store(prompt(700), source)
    assert worker.load(prompt(700), target) == set()  # so that it is attached
    worker.paged.scatter(target, 0, torch.zeros(LAYOUT.shape(700)))
    node.signal(signal.SIGSTOP)
    started_at = time.monotonic()
    assert worker.load(prompt(700), target) == set(target)
    assert time.monotonic() - started_at < LOAD_DEADLINE_S + 0.5
    node.signal(signal.SIGCONT)
    time.sleep(REPLY_S)
    assert not worker.kv(target, 0, 700).any()


def test_a_piece_that_comes_after_the_end_is_not_written(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = blocks_for(700, 32), blocks_for(700, 32, first=32)
    worker.store(prompt(700), source)
    worker.paged.scatter(target, 0, torch.zeros(LAYOUT.shape(700)))
    is_first_written, may_go_on = Event(), Event()
    scatter = PagedLayout.scatter

    def slow(paged: PagedLayout, block_ids: tuple[int, ...], start: int, kv: torch.Tensor) -> None:
        scatter(paged, block_ids, start, kv)
        if not is_first_written.is_set():
            is_first_written.set()
            assert may_go_on.wait(5)

    monkeypatch.setattr(PagedLayout, "scatter", slow)
    worker.step(ConnectorMetadata(loads=(LoadOrder("r", prompt(700), Identity(), target, 0),)))
    assert is_first_written.wait(5)
    [load] = worker.loads._running.values()
    load._is_ended = True  # as `end` does, which would wait for the piece under way
    may_go_on.set()
    worker.until(lambda: load.is_done)
    assert worker.half.ended() == (set(), {"r"})
    assert worker.half.take_failed_blocks() == set(target[8:])
    assert torch.equal(worker.kv(target, 0, 256), worker.kv(source, 0, 256))
    assert not worker.kv(target, 256, 700).any()


def test_a_worker_whose_caches_cannot_be_used_fails_loads_at_once_and_keeps_no_blocks() -> None:
    half = WorkerHalf(None, None, block_size=32)
    blocks = blocks_for(100, 32)
    orders = ConnectorMetadata(
        loads=(LoadOrder("a", prompt(100), Identity(), blocks, 64),),
        stores=(StoreOrder("b", prompt(100), Identity(), blocks, 0, CHUNK),),
        finished=("b",),
    )
    half.before_step(orders)
    half.start_loads(orders)
    half.start_stores(orders)
    assert half.ended() == ({"b"}, {"a"})
    assert half.take_failed_blocks() == set(blocks[2:])
    assert half.ended() == (set(), set())
    half.close()


# --- blocks are kept only as long as they must be -------------------------------------------------------------------------


def test_an_ended_request_is_told_of_once(worker: Worker) -> None:
    worker.store(prompt(100), blocks_for(100, 32))
    assert worker.step(ConnectorMetadata()) == (set(), set(), set())
    assert worker.step(ConnectorMetadata(finished=("stored nothing",))) == ({"stored nothing"}, set(), set())


def test_of_a_preempted_request_nothing_is_read_any_more(node: Node, worker: Worker) -> None:
    blocks = blocks_for(1000, 32)
    worker.store(prompt(CHUNK, first=10_000), blocks)  # so that it is attached
    node.signal(signal.SIGSTOP)
    filling = StoreOrder("filling", prompt(1024, first=20_000), Identity(), blocks_for(1024, 32), 0, CHUNK)
    worker.step(ConnectorMetadata(stores=(filling,)))
    worker.until(lambda: worker.stores._buffered_nbytes > 0)
    order = StoreOrder("preempted", prompt(1000), Identity(), blocks, 0, CHUNK)
    worker.step(ConnectorMetadata(stores=(order,)))  # waits for room in the buffer
    worker.step(ConnectorMetadata(preempted=("preempted",)))
    worker.paged.scatter(blocks, 0, torch.zeros(LAYOUT.shape(1000)))
    node.signal(signal.SIGCONT)
    worker.until(lambda: not worker.stores._buffered_nbytes and worker.count("dropped_stores") > 0)
    assert worker.load(prompt(1000), blocks) == set(blocks)


def test_a_stopped_node_keeps_no_blocks_and_holds_up_no_step(node: Node, worker: Worker) -> None:
    blocks = blocks_for(1000, 32)
    worker.store(prompt(CHUNK, first=10_000), blocks)
    node.signal(signal.SIGSTOP)
    names = [f"r{number}" for number in range(12)]
    orders = tuple(
        StoreOrder(name, prompt(1000, first=1000 * number), Identity(), blocks, 0, CHUNK) for number, name in enumerate(names)
    )
    read: set[str] = set()
    times = [time.monotonic()]
    metadata = ConnectorMetadata(stores=orders, finished=tuple(names))
    while len(read) < len(names):
        read |= worker.step(metadata)[0]
        metadata = ConnectorMetadata(is_idle=True)
        times.append(time.monotonic())
        assert times[-1] - times[0] < storing.TURN_WAIT_S + storing.ROOM_WAIT_S
    assert max(after - before for before, after in pairwise(times)) < 0.25
    assert worker.count("dropped_stores") >= len(names) - 4


def test_a_node_without_room_is_given_no_more(worker: Worker) -> None:
    blocks = blocks_for(2000, 32)
    for number in range(6):
        worker.store(prompt(2000, first=10_000 * number), blocks)
    assert worker.count("stored_tokens") == 12_000  # the oldest are evicted
    longest = 9000 // 32 + 1
    order = StoreOrder("long", prompt(9000, first=100_000), Identity(), tuple([*blocks] * 5)[:longest], 0, CHUNK)
    worker.step(ConnectorMetadata(stores=(order,)))
    worker.until(lambda: worker.count("dropped_stores") > 0)
