"""Chunks on disk: moves between an instance's own locations and anybody's disk, what a restart finds, what is damaged."""

from typing import TypedDict

import pytest

from p2pkv.core.chunks import PAGE_NBYTES, Chunk
from p2pkv.core.directory import Held
from p2pkv.core.effects import FetchChunks, ReleaseReason
from p2pkv.core.events import ChunksDamaged, ChunksFound, ClearRequested, KeptChunk, PinRequested
from p2pkv.core.ids import Location
from p2pkv.core.records import ChunkCounts, EventState, HandoffAddress, Lane, Operation, Pinning, Selection, WithinInstance
from p2pkv.core.residency import Room, room_of
from p2pkv.errors import ErrorCode
from tests.core.builders import CPU, IDENTITY, NAMESPACE, at, chunks_of, pack, prompt
from tests.core.cluster import Cluster

DISK = Location.LOCAL_DISK
FILE_NBYTES = room_of(chunks_of(prompt(4))[0], DISK).nbytes


class Ends(TypedDict):
    """Locations of a move's ends."""

    old: Location
    new: Location


TO_DISK: Ends = {"old": CPU, "new": DISK}
FROM_DISK: Ends = {"old": DISK, "new": CPU}
PROMPT = prompt(10)
"""Three chunks, the last one partly filled."""


@pytest.fixture
def cluster() -> Cluster:
    return Cluster("a", "b", disk_limit_nbytes=100 * FILE_NBYTES)


def on_disk(cluster: Cluster, name: str = "a") -> None:
    """Have `name` hold the prompt on disk, and nothing else."""
    cluster.store(name, PROMPT)
    assert cluster.move(name, name, PROMPT, **TO_DISK).state is EventState.DONE


def seen_by(cluster: Cluster, name: str) -> tuple[Held, ...]:
    cluster.run(1.0)
    return cluster.nodes[name].machine.lookup(PROMPT, None, IDENTITY)


def test_a_file_is_charged_with_the_longest_header_in_whole_pages() -> None:
    chunk = Chunk(b"k" * 16, b"p" * 16, b"n" * 16, 0, pack(1), (1, PAGE_NBYTES))
    assert room_of(chunk, DISK) == Room((3 + 4) * PAGE_NBYTES, descriptors=0)


@pytest.mark.parametrize("by", ["a", "b"])
def test_a_move_from_memory_to_disk_and_back_leaves_each_chunk_in_one_place(cluster: Cluster, by: str) -> None:
    cluster.store("a", PROMPT)
    event = cluster.move("a", "a", PROMPT, by=by, **TO_DISK)
    assert (event.state, event.lane, event.num_tokens) == (EventState.DONE, Lane.LOCAL, 10)
    assert event.chunks == ChunkCounts(found=3, moved=3)
    assert cluster.has("a", PROMPT) == [False] * 3
    assert cluster.has_on_disk("a", PROMPT) == [True] * 3
    assert cluster.held_tokens("a", PROMPT) == 0
    back = cluster.move("a", "a", PROMPT, by=by, **FROM_DISK)
    assert back.chunks == ChunkCounts(found=3, moved=3)
    assert cluster.has_on_disk("a", PROMPT) == [False] * 3
    assert cluster.held_tokens("a", PROMPT) == 10
    assert cluster.event(by, back.event_id) == back
    cluster.assert_at_rest()


def test_a_move_within_an_instance_needs_no_lane(cluster: Cluster) -> None:
    on_disk(cluster)
    cluster.move("a", "a", PROMPT, **FROM_DISK)
    orders = cluster.effects("a", FetchChunks)
    assert [(order.route, order.location) for order in orders] == [(WithinInstance(CPU), DISK), (WithinInstance(DISK), CPU)]
    assert all(order.namespaces == (NAMESPACE,) for order in orders)


def test_a_copy_to_disk_is_held_in_both_places_and_a_second_one_says_so(cluster: Cluster) -> None:
    cluster.store("a", PROMPT)
    assert cluster.move("a", "a", PROMPT, operation=Operation.COPY, **TO_DISK).chunks == ChunkCounts(found=3, moved=3)
    again = cluster.move("a", "a", PROMPT, operation=Operation.COPY, **TO_DISK)
    assert again.chunks == ChunkCounts(found=3, already_there=3)
    assert cluster.has("a", PROMPT) == cluster.has_on_disk("a", PROMPT) == [True] * 3
    moved = cluster.move("a", "a", PROMPT, **TO_DISK)
    assert moved.chunks == ChunkCounts(found=3, already_there=3)
    assert cluster.has("a", PROMPT) == [False] * 3
    cluster.assert_at_rest()


@pytest.mark.parametrize("new", [CPU, DISK])
def test_what_is_on_disk_moves_to_another_instance(cluster: Cluster, new: Location) -> None:
    on_disk(cluster)
    event = cluster.move("a", "b", old=DISK, new=new, selection=Selection.ALL)
    assert (event.state, event.lane) == (EventState.DONE, Lane.HANDOFF)
    assert cluster.nodes["a"].on_disk == {}
    assert (cluster.has if new is CPU else cluster.has_on_disk)("b", PROMPT) == [True] * 3
    (order,) = cluster.effects("b", FetchChunks)
    assert isinstance(order.route, HandoffAddress)
    assert order.location is new
    cluster.assert_at_rest()


def test_lookups_name_the_location(cluster: Cluster) -> None:
    on_disk(cluster)
    assert seen_by(cluster, "b") == (Held("a", DISK, 10),)
    cluster.move("a", "a", prompt(4), operation=Operation.COPY, **FROM_DISK)
    assert set(seen_by(cluster, "b")) == {Held("a", DISK, 10), Held("a", CPU, 4)}


def test_a_crash_costs_memory_only_and_the_next_boot_tells_of_its_disk(cluster: Cluster) -> None:
    on_disk(cluster)
    other = prompt(4, first=50)
    cluster.store("a", other)
    cluster.crash("a")
    cluster.boot("a")
    assert seen_by(cluster, "b") == (Held("a", DISK, 10),)
    assert cluster.held_tokens("a", other) == 0
    assert cluster.move("a", "b", PROMPT, **FROM_DISK).state is EventState.DONE
    assert cluster.held_tokens("b", PROMPT) == 10


def test_what_a_boot_finds_and_has_no_room_for_goes_longest_unused_first() -> None:
    cluster = Cluster("a", disk_limit_nbytes=2 * FILE_NBYTES)
    chunks = chunks_of(prompt(12))
    node = cluster.nodes["a"]
    node.on_disk = {chunk.key: chunk for chunk in chunks}
    kept = tuple(KeptChunk(chunk, idle_s) for chunk, idle_s in zip(reversed(chunks), (30.0, 20.0, 10.0), strict=True))
    cluster.happen(node, ChunksFound(DISK, (NAMESPACE,), kept))
    assert cluster.freed("a", ReleaseReason.EVICTED) == [chunks[2].key]
    assert cluster.has_on_disk("a", prompt(12)) == [True, True, False]


def test_a_full_disk_evicts_its_coldest_and_never_what_is_pinned(cluster: Cluster) -> None:
    cluster = Cluster("a", disk_limit_nbytes=2 * FILE_NBYTES)
    first, second, third = (prompt(4, first=100 * number) for number in range(3))
    for each in (first, second, third):
        cluster.store("a", each)
        cluster.run(1.0)
    cluster.move("a", "a", first, **TO_DISK)
    cluster.ask("a", lambda request: PinRequested(request, at("a", DISK), Pinning.PIN, 60.0, first, IDENTITY, None))
    cluster.run(1.0)
    cluster.move("a", "a", second, **TO_DISK)
    cluster.run(1.0)
    assert cluster.move("a", "a", third, **TO_DISK).state is EventState.FAILED  # what it would displace was used later
    assert [cluster.has_on_disk("a", each) for each in (first, second, third)] == [[True], [True], [False]]
    cluster.store("a", third)  # used again
    assert cluster.move("a", "a", third, **TO_DISK).state is EventState.DONE
    assert [cluster.has_on_disk("a", each) for each in (first, second, third)] == [[True], [False], [True]]


def test_without_room_on_disk_a_move_fails_by_name_before_anything_is_written() -> None:
    cluster = Cluster("a", disk_limit_nbytes=2 * FILE_NBYTES)
    cluster.store("a", PROMPT)
    event = cluster.move("a", "a", PROMPT, **TO_DISK)
    assert event.state is EventState.FAILED
    assert event.error is not None
    assert event.error.code is ErrorCode.STORE_FULL
    assert cluster.effects("a", FetchChunks) == []
    assert cluster.held_tokens("a", PROMPT) == 10
    cluster.assert_at_rest()


def test_what_couldnt_be_written_stays_in_memory(cluster: Cluster) -> None:
    cluster.store("a", PROMPT)
    cluster.lane_brings = 1
    event = cluster.move("a", "a", PROMPT, **TO_DISK)
    assert event.state is EventState.PARTIAL
    assert event.chunks.found == event.chunks.failed + event.chunks.moved + event.chunks.shared_kept == 3
    held = zip(cluster.has("a", PROMPT), cluster.has_on_disk("a", PROMPT), strict=True)
    assert all(in_memory or is_on_disk for in_memory, is_on_disk in held)
    cluster.assert_at_rest()


def test_moves_of_one_prompt_to_disk_and_back_at_once_lose_nothing(cluster: Cluster) -> None:
    cluster.store("a", PROMPT)
    cluster.move("a", "a", PROMPT, operation=Operation.COPY, **TO_DISK)
    cluster.hold(FetchChunks)
    moves = [cluster.begin("a", "a", PROMPT, **how) for how in (TO_DISK, FROM_DISK)]
    cluster.release()
    cluster.run(1.0)
    assert all(cluster.event("a", each).state.is_final for each in moves)
    held = zip(cluster.has("a", PROMPT), cluster.has_on_disk("a", PROMPT), strict=True)
    assert all(in_memory or is_on_disk for in_memory, is_on_disk in held)
    cluster.assert_at_rest()


@pytest.mark.parametrize("way", ["cancel", "leave"])
def test_a_move_within_an_instance_that_ends_early_changes_nothing(cluster: Cluster, way: str) -> None:
    cluster.store("a", PROMPT)
    cluster.hold(FetchChunks)
    event_id = cluster.begin("a", "a", PROMPT, **TO_DISK)
    if way == "cancel":
        cluster.cancel("a", event_id)
        cluster.release()
        cluster.assert_at_rest()
        assert cluster.event("a", event_id).state is EventState.CANCELLED
    else:
        cluster.leave("a")
        cluster.release()
        assert cluster.event("a", event_id).state is EventState.FAILED
    assert cluster.has("a", PROMPT) == [True] * 3
    assert cluster.has_on_disk("a", PROMPT) == [False] * 3


def test_a_move_within_an_instance_carries_pins_and_shares_what_others_hang_on(cluster: Cluster) -> None:
    cluster.store("a", PROMPT)
    cluster.store("a", prompt(4) + pack(77, 78))
    cluster.ask("a", lambda request: PinRequested(request, at("a"), Pinning.PIN, 60.0, prompt(4), IDENTITY, None))
    event = cluster.move("a", "a", PROMPT, **TO_DISK)
    assert event.chunks == ChunkCounts(found=3, moved=2, shared_kept=1)
    assert cluster.has("a", PROMPT) == [True, False, False]
    cluster.ask("a", lambda request: ClearRequested(request, at("a", DISK)))
    assert cluster.has_on_disk("a", PROMPT) == [True, False, False]


def test_what_is_damaged_is_owned_no_longer(cluster: Cluster) -> None:
    on_disk(cluster)
    key = chunks_of(PROMPT)[1].key
    cluster.happen(cluster.nodes["a"], ChunksDamaged(DISK, (key, b"?" * 16)))
    assert cluster.freed("a", ReleaseReason.DAMAGED) == [key]
    assert seen_by(cluster, "b") == (Held("a", DISK, 4),)
    assert cluster.move("a", "b", PROMPT, **FROM_DISK).num_tokens == 4


def test_what_is_damaged_in_the_middle_of_its_move_counts_as_failed(cluster: Cluster) -> None:
    on_disk(cluster)
    key = chunks_of(PROMPT)[2].key
    cluster.damaged[key] = None
    cluster.hold(FetchChunks)
    event_id = cluster.begin("a", "b", PROMPT, **FROM_DISK)
    cluster.happen(cluster.nodes["a"], ChunksDamaged(DISK, (key,)))
    cluster.release()
    event = cluster.event("a", event_id)
    assert (event.state, event.chunks) == (EventState.PARTIAL, ChunkCounts(found=3, moved=2, failed=1))
    cluster.assert_at_rest()


def test_a_disk_alone_takes_and_gives_but_serves_no_engine() -> None:
    cluster = Cluster("a", disk_limit_nbytes=100 * FILE_NBYTES)
    cluster.boot("shelf", cpu_limit_nbytes=0)
    cluster.run(0.5)
    cluster.store("a", PROMPT)
    assert cluster.move("a", "shelf", PROMPT, **TO_DISK).state is EventState.DONE
    assert cluster.has_on_disk("shelf", PROMPT) == [True] * 3
    assert cluster.move("shelf", "a", PROMPT, **FROM_DISK).state is EventState.DONE
    assert cluster.held_tokens("a", PROMPT) == 10
