"""The TCP lane over real sockets: who proves himself gets the bytes that his move names, whole and checked; nobody else any."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial

import pytest
import trio
from xxhash import xxh3_128_digest

from p2pkv.core.chunks import Chunk
from p2pkv.core.ids import Address
from p2pkv.core.keys import ChunkKey
from p2pkv.errors import ErrorCode, Failure, RouteRefusedError
from p2pkv.net import lanes, tcp_lane, tcp_source, tcp_target
from p2pkv.net.descriptors import send_frame
from p2pkv.net.dial_rules import LOOPBACK, DialRules
from p2pkv.net.lanes import expect, send
from p2pkv.net.tcp_lane import LANES_AT_ONCE, RateLimit
from p2pkv.net.tcp_source import serve_tcp
from p2pkv.net.tcp_target import TcpFetcher
from p2pkv.store.cpu import CpuStore
from p2pkv.store.memory import READ_ONLY_SEALS
from p2pkv.store.prefaulted import PrefaultedMemory
from p2pkv.wire.lane import Fetch, ShardHeader, Turn, lane_codec
from tests.live.lane_ends import EVENT, NBYTES, TICKET, Source, chunk_of, open_descriptors, order_of, prove_as_source

pytestmark = pytest.mark.live

MIB = 2**20


@pytest.fixture
def store() -> Iterator[CpuStore]:
    store = CpuStore()
    yield store
    store.close()


@asynccontextmanager
async def serving(source: Source, limit: RateLimit | None = None) -> AsyncIterator[Address]:
    """Where `source` serves."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_tcp, listener, source.grants.get, source.store, limit)
        yield Address("127.0.0.1", listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()


@pytest.fixture
async def source() -> AsyncIterator[Source]:
    source = Source()
    yield source
    source.store.close()


@pytest.fixture
async def address(source: Source) -> AsyncIterator[Address]:
    async with serving(source) as address:
        yield address


async def fetch(
    store: CpuStore, address: Address, chunks: Sequence[Chunk], ticket: bytes = TICKET, streams: int = 1
) -> tuple[list[ChunkKey], Failure | None]:
    fetched: list[ChunkKey] = []
    with trio.fail_after(10):
        failure = await TcpFetcher(store, DialRules(LOOPBACK), streams).fetch(order_of(address, chunks, ticket), fetched)
    return fetched, failure


def content(store: CpuStore, key: ChunkKey) -> list[bytes]:
    return [os.pread(shard.descriptor, shard.nbytes, 0) for shard in store.shards(key)]


async def settles(count: int) -> None:
    """The lanes' other ends close in their own time."""
    with trio.fail_after(2):
        while len(open_descriptors()) > count:  # noqa: ASYNC110 - a descriptor's end is nobody's event
            await trio.sleep(0.001)


# --- bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk_count", "worker_count", "nbytes"), [(1, 1, 1), (240, 1, NBYTES), (3, 80, NBYTES), (3, 2, 5 * MIB + 1), (1, 1, MIB)]
)
async def test_all_shards_arrive_as_they_were(
    source: Source, address: Address, store: CpuStore, chunk_count: int, worker_count: int, nbytes: int
) -> None:
    chunks = [chunk_of(number, worker_count, nbytes) for number in range(chunk_count)]
    source.hold(*chunks)
    source.grant(*chunks)
    before = len(open_descriptors())
    assert await fetch(store, address, chunks) == ([chunk.key for chunk in chunks], None)
    for chunk in chunks:
        store.admit(EVENT, chunk.key)
        assert content(store, chunk.key) == content(source.store, chunk.key)
    assert store.statistics().resident_nbytes == source.store.statistics().resident_nbytes
    await settles(before + chunk_count * worker_count)


@pytest.mark.parametrize(("streams", "chunk_count"), [(4, 1), (4, 3), (4, 10), (16, 240)])
async def test_chunks_are_dealt_among_streams(
    source: Source, address: Address, store: CpuStore, streams: int, chunk_count: int
) -> None:
    chunks = [chunk_of(number) for number in range(chunk_count)]
    source.hold(*chunks)
    source.grant(*chunks)
    fetched, failure = await fetch(store, address, chunks, streams=streams)
    assert failure is None
    assert sorted(fetched) == [chunk.key for chunk in chunks]
    for chunk in chunks:
        store.admit(EVENT, chunk.key)
        assert content(store, chunk.key) == content(source.store, chunk.key)


async def test_streams_that_find_no_place_leave_their_chunks_to_the_others(
    source: Source, address: Address, store: CpuStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_source, "CONNECTIONS_MAX", 2)
    async with serving(source) as narrow:
        chunks = [chunk_of(number) for number in range(20)]
        source.hold(*chunks)
        source.grant(*chunks)
        fetched, failure = await fetch(store, narrow, chunks, streams=8)
    assert (len(fetched), failure) == (20, None)


async def test_fetches_beside_each_other_share_the_streams_there_are(
    source: Source, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_target, "LANES_AT_ONCE", 3)
    chunks = [chunk_of(number) for number in range(20)]
    source.hold(*chunks)
    source.grant(*chunks)
    store = CpuStore()
    fetcher = TcpFetcher(store, DialRules(LOOPBACK), 4)
    fetched: list[list[ChunkKey]] = [[], [], [], []]
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for index, each in enumerate(fetched):
                nursery.start_soon(fetcher.fetch, order_of(address, chunks[5 * index : 5 * index + 5]), each)
    assert [len(each) for each in fetched] == [5, 5, 5, 5]
    store.close()


async def test_a_checksum_travels_with_its_shard(source: Source, address: Address, store: CpuStore) -> None:
    chunk = chunk_of(7)
    source.hold(chunk)
    source.grant(chunk)
    await fetch(store, address, [chunk])
    store.admit(EVENT, chunk.key)
    with trio.fail_after(2):
        while source.store.shards(chunk.key)[0].checksum is None:  # noqa: ASYNC110 - its thread may end after the target's
            await trio.sleep(0.001)
    checksums = [each.shards(chunk.key)[0].checksum for each in (source.store, store)]
    assert checksums == [xxh3_128_digest(b"\7" * NBYTES)] * 2


async def test_a_known_checksum_is_sent_as_it_is(source: Source, address: Address, store: CpuStore) -> None:
    chunk = chunk_of(7)
    source.hold(chunk)
    source.grant(chunk)
    source.store.shards(chunk.key)[0].checksum = bytes(16)
    fetched, failure = await fetch(store, address, [chunk])
    assert fetched == []
    assert failure is not None
    assert "checksum" in failure.detail


async def test_what_the_source_no_longer_holds_is_said_and_the_rest_comes(
    source: Source, address: Address, store: CpuStore
) -> None:
    kept, gone, secret = chunk_of(1), chunk_of(2), chunk_of(3)
    source.hold(kept, secret)
    source.grant(kept, gone)
    fetched, failure = await fetch(store, address, [gone, secret, kept])
    assert fetched == [kept.key]
    assert failure is not None
    assert failure.code is ErrorCode.TRANSFER_FAILED
    assert "2 of 3 chunks are held there no longer" in failure.detail
    assert store.statistics().staged_count == 1


async def test_more_targets_than_lanes_wait_for_their_turn(
    source: Source, address: Address, store: CpuStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_source, "TURN_S", 0.001)
    chunk = chunk_of(1, nbytes=MIB)
    source.hold(chunk)
    source.grant(chunk)
    async with trio.open_nursery() as nursery:
        for _ in range(LANES_AT_ONCE * 3):
            nursery.start_soon(fetch, CpuStore(), address, [chunk])
    assert await fetch(store, address, [chunk]) == ([chunk.key], None)


async def test_two_hundred_fetches_leak_neither_descriptors_nor_threads(
    source: Source, address: Address, store: CpuStore
) -> None:
    chunks = [chunk_of(1), chunk_of(2)]
    source.hold(chunks[0])
    source.grant(*chunks)
    await fetch(store, address, chunks)
    store.drop(EVENT, chunks[0].key)
    descriptor_count, thread_count = len(open_descriptors()), threading.active_count()
    for _ in range(200):
        fetched, _ = await fetch(store, address, chunks)
        assert fetched == [chunks[0].key]
        store.drop(EVENT, chunks[0].key)
    assert store.statistics().descriptor_count == 0
    assert threading.active_count() <= thread_count + 2
    await settles(descriptor_count)


# --- memory that was faulted in ahead -------------------------------------------------------------------------------------

WARM_NBYTES = 3 * MIB + 5


@pytest.fixture
async def warm_store() -> AsyncIterator[CpuStore]:
    """A store that keeps memory for two shards of `WARM_NBYTES` ready, and frees all of it."""
    before = len(open_descriptors())
    prefaulted = PrefaultedMemory(7 * MIB)
    store = CpuStore(prefaulted)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(prefaulted.keep_ready)
        for number in range(2):
            store.lend_warm(EVENT, chunk_of(number).key, 0, WARM_NBYTES)
            store.drop(EVENT, chunk_of(number).key)
        await is_ready(store)
        yield store
        nursery.cancel_scope.cancel()
    store.close()
    await settles(before)


async def is_ready(store: CpuStore) -> None:
    with trio.fail_after(5):
        while store.statistics().prefaulted_nbytes < 2 * WARM_NBYTES:  # noqa: ASYNC110 - memory tells nobody that it is ready
            await trio.sleep(0.001)


async def test_shards_arrive_as_they_were_in_memory_that_was_faulted_in_ahead(
    warm_store: CpuStore, source: Source, address: Address
) -> None:
    chunks = [chunk_of(number, nbytes=WARM_NBYTES) for number in range(1, 4)]
    source.hold(*chunks)
    source.grant(*chunks)
    assert await fetch(warm_store, address, chunks) == ([chunk.key for chunk in chunks], None)
    for chunk in chunks:
        warm_store.admit(EVENT, chunk.key)
        assert content(warm_store, chunk.key) == content(source.store, chunk.key)
        seals = fcntl.fcntl(warm_store.descriptors(chunk.key)[0], fcntl.F_GET_SEALS)
        assert seals & READ_ONLY_SEALS == READ_ONLY_SEALS
    await is_ready(warm_store)  # for the next ones


@pytest.mark.parametrize("broken", ["checksum", "header", "end", "absence"])
async def test_a_shard_that_fails_in_memory_faulted_in_ahead_is_freed(warm_store: CpuStore, broken: str) -> None:
    whole = shard(1, b"x" * WARM_NBYTES)
    gone = ShardHeader(chunk_of(1).key, 0, 0).encode()
    answer = {"checksum": whole[:-1] + b"?", "header": b"?" + whole[1:], "end": whole[:MIB], "absence": gone}[broken]
    descriptor_count = warm_store.statistics().descriptor_count
    async with cheat(answer, then_ends=True) as address:
        fetched, failure = await fetch(warm_store, address, [chunk_of(1, nbytes=WARM_NBYTES)])
    assert (fetched, warm_store.statistics().staged_count) == ([], 0)
    assert failure is not None
    await is_ready(warm_store)
    assert warm_store.statistics().descriptor_count == descriptor_count


async def test_a_cancelled_fetch_frees_memory_that_was_faulted_in_ahead(warm_store: CpuStore) -> None:
    answer = shard(1, b"x" * WARM_NBYTES)[:MIB]
    async with cheat(answer) as address, trio.open_nursery() as nursery:
        order = order_of(address, [chunk_of(1, nbytes=WARM_NBYTES)])
        nursery.start_soon(TcpFetcher(warm_store, DialRules(LOOPBACK), 1).fetch, order, [])
        with trio.fail_after(2):
            while not warm_store.statistics().staged_count:  # noqa: ASYNC110 - the store tells nobody
                await trio.sleep(0.001)
        await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert warm_store.statistics().staged_count == 0
    await is_ready(warm_store)


# --- rate -----------------------------------------------------------------------------------------------------------------


async def test_all_lanes_together_keep_to_the_rate(source: Source) -> None:
    chunk = chunk_of(1, nbytes=4 * MIB)
    source.hold(chunk)
    source.grant(chunk)
    async with serving(source, RateLimit(40 * MIB)) as address:
        started_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(fetch, CpuStore(), address, [chunk])
        assert 0.3 < trio.current_time() - started_at < 0.8  # 16 MiB at 40 MiB/s: 0.4 s, of which 0.05 s are caught up


def test_a_rate_is_kept_exactly_by_whoever_waits_as_told() -> None:
    limit = RateLimit(1000.0)
    waits_s = [limit.reserve(100) for _ in range(20)]
    assert waits_s[0] == 0.0
    assert waits_s[-1] == pytest.approx(1.9 - tcp_lane.CATCH_UP_S, abs=0.02)


# --- strangers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knows_move", [True, False])
async def test_without_the_ticket_the_lane_closes_without_a_word(
    source: Source, address: Address, store: CpuStore, knows_move: bool
) -> None:
    source.hold(chunk_of(1))
    if knows_move:
        source.grant(chunk_of(1))
    with pytest.raises(RouteRefusedError, match="of 'a' can't be used: it closed the lane"):
        await fetch(store, address, [chunk_of(1)], ticket=b"x" * 32)
    assert store.statistics().staged_count == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "not..a.name", "x" * 255, "8.8.8.8"])
async def test_nobody_listening_no_such_host_and_a_forbidden_one_are_refused_routes(store: CpuStore, host: str) -> None:
    with pytest.raises(RouteRefusedError, match="can't be used"):
        await fetch(store, Address(host, 1), [chunk_of(1)])


async def is_closed(stream: trio.SocketStream) -> None:
    with trio.fail_after(2), suppress(trio.BrokenResourceError):  # reset, where not all was read
        while await stream.receive_some():
            pass


@pytest.mark.parametrize(
    "said",
    [b"", b"\1", b"\x05\0\0\0xy", b"\x08\0\0\0nonsense", b"\xff\xff\0\0", b"GET / HTTP/1.1\r\n\r\n"],
    ids=["silence", "half a length", "half a frame", "nonsense", "a long frame", "http"],
)
async def test_who_says_nothing_or_nonsense_is_closed_and_others_are_served(
    source: Source, address: Address, store: CpuStore, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(lanes, "STALL_S", 0.05)
    source.hold(chunk_of(1))
    source.grant(chunk_of(1))
    async with await trio.open_tcp_stream(address.host, address.port) as stream:
        if said:
            await stream.send_all(said)
        await is_closed(stream)
    assert await fetch(store, address, [chunk_of(1)]) == ([chunk_of(1).key], None)


async def test_a_request_before_the_proof_ends_the_connection(source: Source, address: Address) -> None:
    source.hold(chunk_of(1))
    source.grant(chunk_of(1))
    async with await trio.open_tcp_stream(address.host, address.port) as stream:
        await send_frame(stream.socket, lane_codec().encode(Fetch((chunk_of(1).key,))))
        await is_closed(stream)


async def test_connections_beyond_the_limit_are_closed_at_once(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    async with trio.open_nursery() as nursery:
        streams = [await trio.open_tcp_stream(address.host, address.port) for _ in range(tcp_source.CONNECTIONS_MAX)]
        for stream in streams:
            with trio.fail_after(2):
                await stream.receive_some()  # its challenge: it has a place
        async with await trio.open_tcp_stream(address.host, address.port) as late:
            with trio.fail_after(2):
                assert not await late.receive_some()
        for stream in streams:
            nursery.start_soon(stream.aclose)


# --- a source that cheats, stalls or dies ---------------------------------------------------------------------------------


@asynccontextmanager
async def cheat(answer: bytes, ticket: bytes = TICKET, *, then_ends: bool = False) -> AsyncIterator[Address]:
    """A source that proves itself with `ticket`, sends `answer` as its shards, and falls silent, or ends."""

    async def serve(stream: trio.SocketStream) -> None:
        await prove_as_source(stream.socket, ticket)
        await expect(stream.socket, Fetch)
        await send(stream.socket, Turn(has_come=True))
        await stream.send_all(answer)
        if then_ends:
            await stream.aclose()
        await trio.sleep_forever()

    async def serve_quietly(stream: trio.SocketStream) -> None:
        with suppress(*lanes.LANE_ERRORS, trio.BrokenResourceError):  # who is lied to may end it first
            await serve(stream)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve_quietly, [listener])
        yield Address("127.0.0.1", listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()


def shard(number: int, payload: bytes = b"x" * NBYTES, worker: int = 0) -> bytes:
    header = ShardHeader(chunk_of(number).key, worker, len(payload)).encode()
    return header + payload + xxh3_128_digest(payload)


GOOD = shard(1)
BAD_ANSWERS = {
    "other bytes": (shard(2)[:-20] + b"y" + shard(2)[-19:], "another checksum"),
    "other checksum": (shard(2)[:-1] + b"?", "another checksum"),
    "shorter": (shard(2, b"x" * (NBYTES - 1)), "wasn't asked for"),
    "longer": (shard(2, b"x" * (NBYTES + 1)), "wasn't asked for"),
    "huge": (ShardHeader(chunk_of(2).key, 0, 2**64 - 1).encode(), "wasn't asked for"),
    "other chunk": (shard(3), "wasn't asked for"),
    "other worker": (shard(2, worker=1), "wasn't asked for"),
    "the same again": (GOOD, "wasn't asked for"),
    "half a header": (shard(2)[:10], "too little came"),
    "half a shard": (shard(2)[:1000], "too little came"),
    "no checksum": (shard(2)[:-16], "too little came"),
    "silence": (b"", "too little came"),
}


@pytest.mark.parametrize(("answer", "words"), BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
async def test_what_was_not_asked_for_ends_the_lane_and_what_came_whole_stays(
    store: CpuStore, monkeypatch: pytest.MonkeyPatch, answer: bytes, words: str
) -> None:
    monkeypatch.setattr(tcp_lane, "STALL_S", 0.05)
    async with cheat(GOOD + answer) as address:
        before = len(open_descriptors())
        fetched, failure = await fetch(store, address, [chunk_of(1), chunk_of(2)])
        assert failure is not None
        assert failure.code is ErrorCode.TRANSFER_FAILED
        assert words in failure.detail
        assert fetched == [chunk_of(1).key]
        assert store.statistics().staged_count == 1
        await settles(before + 2)  # the chunk that came, and the cheat's end of the lane


async def test_a_chunk_that_came_in_part_is_dropped(store: CpuStore) -> None:
    gone = ShardHeader(chunk_of(1).key, 0, 0).encode()
    async with cheat(GOOD + gone) as address:
        fetched, failure = await fetch(store, address, [chunk_of(1, worker_count=2)])
    assert fetched == []
    assert failure is not None
    assert store.statistics().descriptor_count == 0


async def test_a_source_without_the_ticket_is_not_believed(store: CpuStore) -> None:
    async with cheat(GOOD, ticket=b"x" * 32) as address:
        with pytest.raises(RouteRefusedError, match="doesn't hold the move's ticket"):
            await fetch(store, address, [chunk_of(1)])


@asynccontextmanager
async def source_process(chunks: Sequence[Chunk], nbytes_per_s: int) -> AsyncIterator[tuple[Address, trio.Process]]:
    """A source as a process of its own."""
    arguments = [len(chunks), chunks[0].shard_nbytes[0], nbytes_per_s]
    command = [sys.executable, "-m", "tests.live.lane_source", *map(str, arguments)]
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(trio.run_process, command, stdout=subprocess.PIPE, capture_stdout=False, check=False)
        )
        assert process.stdout is not None
        with trio.fail_after(10):
            port = int(await process.stdout.receive_some())
        yield Address("127.0.0.1", port), process
        process.kill()


@pytest.mark.parametrize(("sent", "words"), [(signal.SIGKILL, ""), (signal.SIGSTOP, "too little came")])
async def test_a_source_that_dies_or_stops_ends_the_lane_and_what_came_whole_stays(
    store: CpuStore, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, words: str
) -> None:
    monkeypatch.setattr(tcp_lane, "STALL_S", 0.3)
    chunks = [chunk_of(number, nbytes=2 * MIB) for number in range(8)]
    fetched: list[ChunkKey] = []
    failures: list[Failure | None] = []
    async with source_process(chunks, nbytes_per_s=20 * MIB) as (address, process):

        async def fetch_all() -> None:
            failures.append(await TcpFetcher(store, DialRules(LOOPBACK), 1).fetch(order_of(address, chunks), fetched))

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetch_all)
                while not fetched:  # noqa: ASYNC110 - the lane tells nobody how far it is
                    await trio.sleep(0.001)
                process.send_signal(sent)
    assert failures[0] is not None
    assert words in failures[0].detail
    assert 1 <= len(fetched) < len(chunks)
    assert store.statistics().staged_count == len(fetched)


async def test_a_cancelled_fetch_wakes_its_thread_and_drops_what_is_not_whole(store: CpuStore) -> None:
    fetched: list[ChunkKey] = []
    before = len(open_descriptors())
    async with cheat(GOOD + shard(2)[:1000]) as address, trio.open_nursery() as nursery:
        order = order_of(address, [chunk_of(1), chunk_of(2)])
        nursery.start_soon(TcpFetcher(store, DialRules(LOOPBACK), 1).fetch, order, fetched)
        with trio.fail_after(2):
            while store.statistics().staged_count < 2:  # noqa: ASYNC110 - the store tells nobody
                await trio.sleep(0.001)
        cancelled_at = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - cancelled_at < 0.1
    assert fetched == [chunk_of(1).key]
    assert store.statistics().staged_count == 1
    await settles(before + 1)


@asynccontextmanager
async def asking(address: Address, chunk: Chunk) -> AsyncIterator[trio.SocketStream]:
    """A target that has asked for `chunk`, whose turn has come, and that has read nothing of it yet."""
    async with await trio.open_tcp_stream(address.host, address.port) as stream:
        await lanes.prove_to_source(stream.socket, order_of(address, [chunk]))
        await send(stream.socket, Fetch((chunk.key,)))
        assert (await expect(stream.socket, Turn)).has_come
        yield stream


async def test_a_cancelled_source_wakes_its_thread_from_a_wait_for_the_rate(source: Source) -> None:
    chunk = chunk_of(1, nbytes=4 * MIB)
    source.hold(chunk)
    source.grant(chunk)
    async with AsyncExitStack() as served:
        address = await served.enter_async_context(serving(source, RateLimit(100_000)))
        async with asking(address, chunk) as stream:
            assert await stream.receive_some(1)
            cancelled_at = trio.current_time()
            await served.aclose()
            assert trio.current_time() - cancelled_at < 0.1


async def test_a_target_that_takes_nothing_ends_its_lane(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_lane, "STALL_S", 0.1)
    chunk = chunk_of(1, nbytes=64 * MIB)
    source.hold(chunk)
    source.grant(chunk)
    async with serving(source) as address, asking(address, chunk):
        before = len(open_descriptors())
        with trio.fail_after(2):
            while len(open_descriptors()) >= before:  # noqa: ASYNC110 - a descriptor's end is nobody's event
                await trio.sleep(0.01)
