"""EngineCache against real node processes, as an engine would use it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from p2pkv import NodeConfig
from p2pkv.core.keys import Media
from p2pkv.engines import EngineCache, Identity, KVLayout
from p2pkv.errors import InvalidRequestError, NamespaceMismatchError, NodeUnreachableError, StoreFullError
from p2pkv.rendezvous import place_of, read_card, runtime_directory
from p2pkv.wire.frames import MAX_FRAME_DESCRIPTORS
from tests.live.command_line import wait_gone

pytestmark = pytest.mark.live

CHUNK = 4
LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=4, dtype="float32")
LIMIT_NBYTES = 4 * 2**20
LARGE = KVLayout(layers=2, kv_heads=2, head_dim=8192, dtype="float32")
"""1 MiB a chunk of four tokens, less one token's worth in a partly filled one: four chunks fill the node's limit."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_config(folder: Path, instance: str) -> Path:
    path = folder / f"{instance}.yaml"
    path.write_text(
        f"lmcache_instance_id: {instance}\n"
        f"lmcache_worker_port: {free_port()}\n"
        f"controller_http_url: localhost:{free_port()}\n"
        f"chunk_size: {CHUNK}\n"
        f"max_local_cpu_size: {LIMIT_NBYTES / 2**30}\n"
    )
    return path


def node_pid(instance: str) -> int:
    place = place_of(runtime_directory(os.environ), "p2pkv", instance)
    deadline = time.monotonic() + 5
    while (card := read_card(place)) is None:  # it is published once all doors are open
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return card.pid


def stop(instance: str) -> None:
    """End a node that `attach` started, and wait until it has gone."""
    pid = node_pid(instance)
    os.kill(pid, signal.SIGTERM)
    wait_gone(pid)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A runtime directory for this module's nodes."""
    with TemporaryDirectory(prefix="p2pkv-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("P2PKV_RUNTIME_DIR", folder)
        yield Path(folder)


@pytest.fixture(scope="module")
def config(place: Path) -> Iterator[Path]:
    """The yaml of a node that runs, started by the first that attached."""
    path = write_config(place, "a")
    with EngineCache.attach(path, model="m", layout=LAYOUT):
        pass
    yield path
    stop("a")


def kv_of(tokens: list[int], layout: KVLayout = LAYOUT) -> torch.Tensor:
    return torch.rand(layout.shape(len(tokens)))


@pytest.fixture
def cache(config: Path, request: pytest.FixtureRequest) -> Iterator[EngineCache]:
    """A cache that shares nothing with other tests'."""
    with EngineCache.attach(config, model=request.node.name, layout=LAYOUT) as cache:
        yield cache


# --- store, lookup, retrieve ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 23])
def test_a_prompt_comes_back_bit_by_bit(cache: EngineCache, count: int) -> None:
    tokens = list(range(count))
    kv = kv_of(tokens)
    assert cache.retrieve(tokens) == (0, None)
    assert cache.store(tokens, kv) == count
    assert cache.lookup(tokens) == count
    held, got = cache.retrieve(tokens)
    assert held == count
    assert got is not None
    assert torch.equal(got, kv)


@pytest.mark.parametrize(("asked", "expected"), [([*range(10), 99], 10), ([*range(6), 99], 6), ([0, 1, 99], 2), ([99], 0)])
def test_the_longest_shared_prefix_is_found_inside_chunks_too(cache: EngineCache, asked: list[int], expected: int) -> None:
    tokens = list(range(10))
    kv = kv_of(tokens)
    cache.store(tokens, kv)
    assert cache.lookup(asked) == expected
    held, got = cache.retrieve(asked)
    assert held == expected
    assert expected == 0 or (got is not None and torch.equal(got, kv[:, :, :expected]))


def test_a_longer_prompt_adds_only_what_is_missing(cache: EngineCache) -> None:
    tokens = list(range(12))
    kv = kv_of(tokens)
    assert cache.store(tokens[:8], kv[:, :, :8]) == 8
    changed = kv.clone()
    changed[:, :, :8] = 0
    assert cache.store(tokens, changed) == 12
    held, got = cache.retrieve(tokens)
    assert held == 12
    assert got is not None
    assert torch.equal(got, kv)


def test_a_prompt_of_more_chunks_than_a_frame_carries(cache: EngineCache) -> None:
    tokens = list(range(CHUNK * (2 * MAX_FRAME_DESCRIPTORS + 3) + 1))
    kv = kv_of(tokens)
    assert cache.store(tokens, kv) == len(tokens)
    held, got = cache.retrieve(tokens)
    assert held == len(tokens)
    assert got is not None
    assert torch.equal(got, kv)


def test_tokens_may_be_any_sequence_of_integers_and_kv_may_have_any_strides(cache: EngineCache) -> None:
    by_head = torch.rand(2, 2, 2, 5, 4).transpose(2, 3)
    assert cache.store(torch.arange(5), by_head) == 5
    for tokens in (range(5), (0, 1, 2, 3, 4), torch.arange(5, dtype=torch.int32)):
        _, got = cache.retrieve(tokens)
        assert got is not None
        assert torch.equal(got, by_head)


@pytest.mark.parametrize(("start", "asked"), [(0, 11), (1, 11), (4, 11), (7, 9), (10, 11), (11, 11)])
def test_a_prompt_is_read_from_any_token_on_without_a_copy(cache: EngineCache, start: int, asked: int) -> None:
    tokens = list(range(11))
    kv = kv_of(tokens)
    cache.store(tokens, kv)
    got = torch.zeros_like(kv)

    def take(first: int, piece: torch.Tensor) -> None:
        got[:, :, first : first + piece.shape[2]] = piece

    assert cache.retrieve_into([*tokens[:asked], 99], take, start=start) == asked
    assert torch.equal(got[:, :, start:asked], kv[:, :, start:asked])
    assert not got[:, :, :start].any()
    assert not got[:, :, asked:].any()


def test_reading_from_where_nothing_is_held_takes_nothing(cache: EngineCache) -> None:
    cache.store([0, 1], kv_of([0, 1]))
    taken: list[int] = []
    for start in (1, 2, 3, 6):
        assert cache.retrieve_into([0, 99, 2, 3, 4, 5, 6], lambda first, _: taken.append(first), start=start) == start
    assert not taken


def test_a_reader_that_gives_up_ends_its_lease(config: Path) -> None:
    tokens = list(range(3 * CHUNK))
    with EngineCache.attach(config, model="giving up", layout=LARGE) as cache:
        cache.store(tokens, kv_of(tokens, LARGE))

        def refuse(first: int, piece: torch.Tensor) -> None:
            raise TimeoutError

        with pytest.raises(TimeoutError):
            cache.retrieve_into(tokens, refuse)
        others = [token + 100 for token in tokens]
        assert cache.store(others, kv_of(others, LARGE)) == len(others)  # there is no room for both


def test_a_prompt_can_be_stored_from_a_chunk_on(cache: EngineCache) -> None:
    tokens = list(range(11))
    kv = kv_of(tokens)
    assert cache.store(tokens[:CHUNK], kv[:, :, :CHUNK]) == CHUNK
    assert cache.store(tokens, kv[:, :, CHUNK:], start=CHUNK) == 11
    _, got = cache.retrieve(tokens)
    assert got is not None
    assert torch.equal(got, kv)
    with pytest.raises(InvalidRequestError, match="no chunk begins at token 3"):
        cache.store(tokens, kv[:, :, 3:], start=3)


def test_an_empty_prompt_holds_nothing(cache: EngineCache) -> None:
    assert cache.store([], kv_of([])) == 0
    assert cache.lookup([]) == 0
    assert cache.retrieve([]) == (0, None)


def test_tenants_do_not_see_each_others_chunks(cache: EngineCache) -> None:
    cache.store([1, 2], kv_of([1, 2]), identity=Identity(cache_salt="one"))
    assert cache.lookup([1, 2], identity=Identity(cache_salt="one")) == 2
    for other in (None, Identity(cache_salt="two"), Identity(cache_salt="one", lora="l")):
        assert cache.lookup([1, 2], identity=other) == 0


def test_media_may_be_given_as_plain_tuples(cache: EngineCache) -> None:
    plain = Identity(media=[(0, 2, b"digest")])  # type: ignore[arg-type]
    cache.store([1, 2], kv_of([1, 2]), identity=plain)
    assert cache.lookup([1, 2], identity=Identity(media=(Media(0, 2, b"digest"),))) == 2


def test_kv_that_does_not_fit_is_refused_and_nothing_is_stored(cache: EngineCache) -> None:
    with pytest.raises(InvalidRequestError, match="kv is"):
        cache.store([1, 2], kv_of([1, 2, 3]))
    assert cache.lookup([1, 2]) == 0


def test_what_does_not_fit_is_cut_off_at_the_end_and_what_fits_nowhere_raises(config: Path) -> None:
    tokens = list(range(6 * CHUNK))
    kv = kv_of(tokens, LARGE)
    with EngineCache.attach(config, model="large", layout=LARGE) as cache:
        held = cache.store(tokens, kv)
        assert 0 < held < len(tokens)
        assert held % CHUNK == 0
        count, got = cache.retrieve(tokens)
        assert count == held
        assert got is not None
        assert torch.equal(got, kv[:, :, :held])
    huge = KVLayout(layers=2, kv_heads=2, head_dim=65536, dtype="float32")
    with EngineCache.attach(config, model="huge", layout=huge) as cache, pytest.raises(StoreFullError):
        cache.store([1, 2, 3, 4], kv_of([1, 2, 3, 4], huge))


def test_a_model_is_cleared_and_others_are_not(config: Path, cache: EngineCache) -> None:
    tokens = list(range(10))
    with EngineCache.attach(config, model="another", layout=LAYOUT) as other:
        for each in (cache, other):
            each.store(tokens, kv_of(tokens))
        assert cache.clear() == 10
        assert (cache.lookup(tokens), cache.clear(), other.lookup(tokens)) == (0, 0, 10)


# --- workers --------------------------------------------------------------------------------------------------------------


def test_a_chunk_is_held_once_both_workers_have_stored_their_heads(config: Path) -> None:
    tokens = list(range(6))
    kv = kv_of(tokens)
    halves = kv[:, :, :, :1], kv[:, :, :, 1:]
    workers = [
        EngineCache.attach(config, model="both", layout=LAYOUT, world_size=2, worker_id=worker_id) for worker_id in (0, 1)
    ]
    assert workers[0].store(tokens, halves[0]) == 0
    assert workers[0].lookup(tokens) == 0
    assert workers[1].store(tokens, halves[1]) == 6
    for worker, half in zip(workers, halves, strict=True):
        _, got = worker.retrieve(tokens)
        assert got is not None
        assert torch.equal(got, half)
        worker.close()


def test_the_latent_of_mla_is_stored_once_and_read_by_all(config: Path) -> None:
    mla = KVLayout(layers=2, kv_heads=1, head_dim=8, dtype="bfloat16", planes=1)
    kv = torch.rand(mla.shape(5)).bfloat16()
    with (
        EngineCache.attach(config, model="mla", layout=mla, world_size=2, worker_id=0) as first,
        EngineCache.attach(config, model="mla", layout=mla, world_size=2, worker_id=1) as second,
    ):
        assert first.store(range(5), kv) == 5
        _, got = second.retrieve(range(5))
        assert got is not None
        assert torch.equal(got, kv)
        assert second.store(range(5), kv) == 5


@pytest.mark.parametrize(
    ("layout", "workers"), [(KVLayout(2, 2, 4, "float3"), (1, 0)), (KVLayout(2, 3, 4, "float32"), (2, 0)), (LAYOUT, (2, 2))]
)
def test_an_engine_that_cannot_be_served_is_told_so_at_once(config: Path, layout: KVLayout, workers: tuple[int, int]) -> None:
    world_size, worker_id = workers
    with pytest.raises((NamespaceMismatchError, InvalidRequestError)):
        EngineCache.attach(config, model="m", layout=layout, world_size=world_size, worker_id=worker_id)


# --- threads, forks, and the node's life ----------------------------------------------------------------------------------


def test_threads_share_a_cache(cache: EngineCache) -> None:
    def use(number: int) -> bool:
        tokens = [number, *range(10)]
        kv = kv_of(tokens)
        cache.store(tokens, kv)
        held, got = cache.retrieve(tokens)
        return held == 11 and got is not None and torch.equal(got, kv)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(64)))


def test_a_forked_process_gets_a_connection_of_its_own(cache: EngineCache) -> None:
    cache.store([1, 2], kv_of([1, 2]))
    child = os.fork()
    if child == 0:
        os._exit(0 if [cache.lookup([1, 2, number]) for number in range(50)] == [2] * 50 else 1)
    assert [cache.lookup([1, number]) for number in range(3, 53)] == [1] * 50
    assert os.waitpid(child, 0)[1] == 0


def test_what_was_stored_outlives_the_engine_and_no_descriptor_stays_behind(config: Path) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    with EngineCache.attach(config, model="outlive", layout=LAYOUT) as cache:
        cache.store(range(9), kv_of(list(range(9))))
    assert set(Path("/proc/self/fd").iterdir()) == before
    with EngineCache.attach(config, model="outlive", layout=LAYOUT) as cache:
        assert cache.lookup(range(9)) == 9


def test_a_node_is_no_descendant_of_the_engine_that_started_it(place: Path) -> None:
    path = write_config(place, "orphan")
    with EngineCache.attach(path, model="m", layout=LAYOUT):
        ancestor = node_pid("orphan")
        while ancestor:
            ancestor = parent_of(ancestor)
            assert ancestor != os.getpid()
    stop("orphan")


def test_without_autostart_a_missing_node_is_an_error(place: Path) -> None:
    path = write_config(place, "nobody")
    with pytest.raises(NodeUnreachableError, match="no node listens"):
        EngineCache.attach(path, model="m", layout=LAYOUT, autostart=False)
    with pytest.raises(NodeUnreachableError, match="no node listens"):
        EngineCache.attach(NodeConfig.from_yaml(path), model="m", layout=LAYOUT)


ATTACH_AND_TELL = """
import sys
from p2pkv.engines import EngineCache, KVLayout
with EngineCache.attach(sys.argv[1], model="m", layout=KVLayout(2, 2, 4, "float32")) as cache:
    print(cache.lookup([1]))
"""


def test_two_engines_that_start_at_once_start_one_node(place: Path) -> None:
    path = write_config(place, "twins")
    engines = [subprocess.Popen([sys.executable, "-c", ATTACH_AND_TELL, str(path)], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        assert [engine.communicate(timeout=60)[0] for engine in engines] == [b"0\n", b"0\n"]
        log = place_of(place, "p2pkv", "twins").log.read_text()
        assert log.count("p2pkv ready") == 1
        assert "already runs" not in log
    finally:
        pid = node_pid("twins")
        os.kill(pid, signal.SIGTERM)
        wait_gone(pid)


def test_a_killed_node_costs_one_call_and_the_next_starts_another(place: Path) -> None:
    path = write_config(place, "mortal")
    with EngineCache.attach(path, model="m", layout=LAYOUT) as cache:
        assert cache.store([1, 2], kv_of([1, 2])) == 2
        pid = node_pid("mortal")
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)
        with pytest.raises(NodeUnreachableError):
            cache.lookup([1, 2])
        assert cache.lookup([1, 2]) == 0
    stop("mortal")


def test_a_node_that_cannot_start_is_reported_with_its_log(place: Path) -> None:
    path = write_config(place, "crippled")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", NodeConfig.from_yaml(path).lmcache_worker_port))
        taken.listen()
        with pytest.raises(NodeUnreachableError, match=r"ended at its start; see .*crippled/node.log"):
            EngineCache.attach(path, model="m", layout=LAYOUT)
    assert place_of(place, "p2pkv", "crippled").log.read_text()
