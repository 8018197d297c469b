"""The handoff lane over real unix sockets: who proves himself gets the descriptors that his move names, and nobody else any."""

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from p2pkv.core.chunks import Chunk
from p2pkv.core.effects import FetchChunks
from p2pkv.core.keys import ChunkKey
from p2pkv.core.records import HandoffAddress
from p2pkv.errors import ErrorCode, Failure, RouteRefusedError
from p2pkv.net import lanes
from p2pkv.net.descriptors import open_unix_listener, receive_frame, send_frame
from p2pkv.net.handoff import HandoffFetcher, serve_handoffs
from p2pkv.store import memory
from p2pkv.store.cpu import CpuStore
from p2pkv.wire.lane import (
    Descriptors,
    Fetch,
    LaneMessage,
    PassedShard,
    lane_codec,
)
from tests.live.lane_ends import EVENT, NBYTES, TICKET, Source, chunk_of, open_descriptors, order_of, prove_as_source

pytestmark = pytest.mark.live

HOST = "this-boot"


@pytest.fixture
def store() -> Iterator[CpuStore]:
    store = CpuStore()
    yield store
    store.close()


class HandoffSource(Source):
    """Where it hands over, too."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def order(self, chunks: Sequence[Chunk], ticket: bytes = TICKET, host_id: str = HOST) -> FetchChunks:
        return order_of(HandoffAddress(host_id, str(self.path)), chunks, ticket)


@pytest.fixture
async def source(runtime_dir: Path) -> AsyncIterator[HandoffSource]:
    source = HandoffSource(runtime_dir / "lane.sock")
    listener = trio.SocketListener(open_unix_listener(source.path))
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_handoffs, listener, source.grants.get, source.store)
        yield source
        nursery.cancel_scope.cancel()
    source.store.close()


async def fetch(store: CpuStore, order: FetchChunks) -> tuple[list[ChunkKey], Failure | None]:
    fetched: list[ChunkKey] = []
    with trio.fail_after(5):
        failure = await HandoffFetcher(store, HOST).fetch(order, fetched)
    return fetched, failure


@pytest.mark.parametrize(("chunk_count", "worker_count"), [(1, 1), (32, 1), (100, 2), (240, 1), (3, 80), (1, 251), (2, 300)])
async def test_all_shards_change_hands_and_no_descriptor_is_lost(
    source: HandoffSource, store: CpuStore, chunk_count: int, worker_count: int
) -> None:
    chunks = [chunk_of(number, worker_count) for number in range(chunk_count)]
    source.hold(*chunks)
    source.grant(*chunks)
    before = len(open_descriptors())
    fetched, failure = await fetch(store, source.order(chunks))
    assert failure is None
    assert fetched == [chunk.key for chunk in chunks]
    assert store.statistics().descriptor_count == chunk_count * worker_count
    for chunk in chunks:
        store.admit(EVENT, chunk.key)
        mine, theirs = store.descriptors(chunk.key), source.store.descriptors(chunk.key)
        assert [os.fstat(each).st_ino for each in mine] == [os.fstat(each).st_ino for each in theirs]
    store.close()
    with trio.fail_after(2):
        while len(open_descriptors()) > before:  # noqa: ASYNC110 - the source's end closes in its own time
            await trio.sleep(0.001)


async def test_what_the_source_no_longer_holds_is_said_and_the_rest_comes(source: HandoffSource, store: CpuStore) -> None:
    kept, gone = chunk_of(1), chunk_of(2)
    source.hold(kept)
    source.grant(kept, gone)
    fetched, failure = await fetch(store, source.order([kept, gone]))
    assert fetched == [kept.key]
    assert failure is not None
    assert failure.code is ErrorCode.TRANSFER_FAILED
    assert "1 of 2 chunks are held there no longer" in failure.detail


async def test_chunks_outside_the_move_are_not_passed(source: HandoffSource, store: CpuStore) -> None:
    granted, secret = chunk_of(1), chunk_of(2)
    source.hold(granted, secret)
    source.grant(granted)
    fetched, failure = await fetch(store, source.order([secret]))
    assert fetched == []
    assert failure is not None
    assert store.statistics().descriptor_count == 0


@pytest.mark.parametrize("knows_move", [True, False])
async def test_without_the_ticket_the_lane_closes_without_a_word(
    source: HandoffSource, store: CpuStore, knows_move: bool
) -> None:
    source.hold(chunk_of(1))
    if knows_move:
        source.grant(chunk_of(1))
    with pytest.raises(RouteRefusedError, match=r"closed the lane|Connection reset"):
        await fetch(store, source.order([chunk_of(1)], ticket=b"x" * 32))


async def test_another_host_a_wrong_path_and_no_listener_are_refused_routes(
    source: HandoffSource, store: CpuStore, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    orders = [
        source.order([chunk_of(1)], host_id="another-boot"),
        order_of(HandoffAddress(HOST, str(tmp_path / "nothing")), [chunk_of(1)]),
        order_of(HandoffAddress(HOST, str(tmp_path / "file")), [chunk_of(1)]),
        order_of(HandoffAddress(HOST, "nul\0byte"), [chunk_of(1)]),
    ]
    for order in orders:
        with pytest.raises(RouteRefusedError, match="The handoff lane of 'a' can't be used"):
            await fetch(store, order)


async def test_a_target_that_says_nothing_or_nonsense_is_closed_and_others_are_served(
    source: HandoffSource, store: CpuStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "STALL_S", 0.05)
    source.hold(chunk_of(1))
    source.grant(chunk_of(1))
    for payload in (None, b"nonsense", lane_codec().encode(Fetch((b"k" * 16,)))):
        async with await trio.open_unix_socket(str(source.path)) as stream:
            if payload is not None:
                await send_frame(stream.socket, payload)
            with trio.fail_after(2):
                while await stream.receive_some():
                    pass
    fetched, failure = await fetch(store, source.order([chunk_of(1)]))
    assert (fetched, failure) == ([chunk_of(1).key], None)


# --- a source that cheats -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def cheat(path: Path, answers: Sequence[tuple[LaneMessage, list[int]]], ticket: bytes = TICKET) -> AsyncIterator[None]:
    """A source that proves itself with `ticket` and answers every `Fetch` with `answers`, then falls silent."""

    async def serve(stream: trio.SocketStream) -> None:
        await prove_as_source(stream.socket, ticket)
        await receive_frame(stream.socket)
        for message, descriptors in answers:
            await send_frame(stream.socket, lane_codec().encode(message), descriptors)
        await trio.sleep_forever()

    async def serve_quietly(stream: trio.SocketStream) -> None:
        with suppress(OSError):
            await serve(stream)

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve_quietly, [trio.SocketListener(open_unix_listener(path))])
        yield
        nursery.cancel_scope.cancel()


@pytest.fixture
def sealed() -> Iterator[int]:
    descriptor = memory.create(NBYTES)
    os.pwrite(descriptor, b"x" * memory.page_rounded(NBYTES), 0)
    memory.seal(descriptor)
    yield descriptor
    os.close(descriptor)


async def expect_failure(store: CpuStore, path: Path, chunks: Sequence[Chunk], words: str) -> list[ChunkKey]:
    before = len(open_descriptors())
    order = order_of(HandoffAddress(HOST, str(path)), chunks)
    fetched, failure = await fetch(store, order)
    assert failure is not None
    assert words in failure.detail
    assert store.statistics().staged_count == len(fetched)
    await trio.testing.wait_all_tasks_blocked()
    assert len(open_descriptors()) <= before + len(fetched) + 2  # the cheat's own connection may still be open
    return fetched


def passed(number: int, worker: int = 0) -> PassedShard:
    return PassedShard(chunk_of(number).key, worker)


async def test_a_source_without_the_ticket_is_not_believed(store: CpuStore, runtime_dir: Path) -> None:
    async with cheat(runtime_dir / "s", [], ticket=b"x" * 32):
        with pytest.raises(RouteRefusedError, match="doesn't hold the move's ticket"):
            await fetch(store, order_of(HandoffAddress(HOST, str(runtime_dir / "s")), [chunk_of(1)]))


@pytest.mark.parametrize(
    "shards", [(passed(2),), (passed(1, worker=1),), (passed(1), passed(1))], ids=["other chunk", "other worker", "twice"]
)
async def test_shards_that_were_not_asked_for_end_the_lane(
    store: CpuStore, runtime_dir: Path, sealed: int, shards: tuple[PassedShard, ...]
) -> None:
    async with cheat(runtime_dir / "s", [(Descriptors(shards, is_last=True), [sealed] * len(shards))]):
        await expect_failure(store, runtime_dir / "s", [chunk_of(1)], "wasn't asked for")


@pytest.mark.parametrize("count", [0, 2])
async def test_another_number_of_descriptors_ends_the_lane(store: CpuStore, runtime_dir: Path, sealed: int, count: int) -> None:
    async with cheat(runtime_dir / "s", [(Descriptors((passed(1),), is_last=True), [sealed] * count)]):
        assert await expect_failure(store, runtime_dir / "s", [chunk_of(1)], f"{count} descriptors came") == []


async def test_memory_that_is_not_sealed_fails_its_chunk_only(store: CpuStore, runtime_dir: Path, sealed: int) -> None:
    unsealed = memory.create(NBYTES)
    answer = Descriptors((passed(1), passed(2), passed(3)), is_last=True)
    async with cheat(runtime_dir / "s", [(answer, [sealed, unsealed, sealed])]):
        fetched = await expect_failure(store, runtime_dir / "s", [chunk_of(1), chunk_of(2), chunk_of(3)], "isn't sealed")
    os.close(unsealed)
    assert fetched == [chunk_of(1).key, chunk_of(3).key]


async def test_a_chunk_that_came_in_part_is_dropped(store: CpuStore, runtime_dir: Path, sealed: int) -> None:
    async with cheat(runtime_dir / "s", [(Descriptors((passed(1),), is_last=True), [sealed])]):
        assert await expect_failure(store, runtime_dir / "s", [chunk_of(1, worker_count=2)], "held there no longer") == []


async def test_a_source_that_stalls_ends_the_lane_and_what_came_stays(
    store: CpuStore, runtime_dir: Path, sealed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "STALL_S", 0.05)
    async with cheat(runtime_dir / "s", [(Descriptors((passed(1),), is_last=False), [sealed])]):
        fetched = await expect_failure(store, runtime_dir / "s", [chunk_of(1), chunk_of(2)], "nothing came for")
    assert fetched == [chunk_of(1).key]


async def test_a_cancelled_fetch_keeps_whole_chunks_and_drops_the_others(
    store: CpuStore, runtime_dir: Path, sealed: int
) -> None:
    answer = Descriptors((passed(1), passed(2)), is_last=False)
    fetched: list[ChunkKey] = []
    chunks = (chunk_of(1), chunk_of(2, worker_count=2))
    order = order_of(HandoffAddress(HOST, str(runtime_dir / "s")), chunks)
    async with cheat(runtime_dir / "s", [(answer, [sealed, sealed])]):
        with trio.move_on_after(2) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(HandoffFetcher(store, HOST).fetch, order, fetched)
                while store.statistics().staged_count < 2:  # noqa: ASYNC110 - the store tells nobody
                    await trio.sleep(0.001)
                scope.cancel()
    assert fetched == [chunk_of(1).key]
    assert store.statistics().staged_count == 1
