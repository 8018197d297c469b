"""Moves where nothing goes wrong on the way (protocol rules P, F, T): who holds what, and what the event says."""

from dataclasses import replace
from typing import Any

import pytest

from p2pkv.core.chunks import PAGE_NBYTES
from p2pkv.core.effects import FetchChunks, ReleaseReason
from p2pkv.core.events import EngineAttached, MoveRequested
from p2pkv.core.ids import Location, parse_event_id
from p2pkv.core.messages import MANIFEST_PAGE_CHUNKS, TAKE_BATCH_KEYS, FetchReport, ManifestPage, Offer, Take, TakeAnswer
from p2pkv.core.moves.fetching import HANDOFF_BATCH
from p2pkv.core.records import ChunkCounts, EventState, Lane, Operation, Selection
from p2pkv.errors import ErrorCode
from tests.core.builders import IDENTITY, NAMESPACE, at, chunks_of, config_of, keys_of, pack, prompt
from tests.core.cluster import CLIENT, Cluster

DONE, PARTIAL, FAILED, RUNNING = EventState.DONE, EventState.PARTIAL, EventState.FAILED, EventState.RUNNING
MOVED, EVICTED = ReleaseReason.MOVED, ReleaseReason.EVICTED
SYSTEM = prompt(8)
"""A system prompt that conversations begin with."""


def pair(tokens: bytes = b"", capacity: int = 1000) -> Cluster:
    """`a`, which holds a prompt, and `b`, with room for `capacity` chunks each."""
    cluster = Cluster("a", "b", cpu_limit_nbytes=capacity * PAGE_NBYTES)
    if tokens:
        cluster.store("a", tokens)
    return cluster


# --- done -----------------------------------------------------------------------------------------------------------------


def test_after_a_move_the_target_holds_all_and_the_source_nothing() -> None:
    cluster = pair(prompt(10))
    event = cluster.move("a", "b", prompt(10))
    assert (event.state, event.chunks, event.num_tokens) == (DONE, ChunkCounts(found=3, moved=3), 10)
    assert (event.lane, event.nbytes, event.error) == (Lane.HANDOFF, NAMESPACE.shard_nbytes(10), None)
    assert (cluster.held_tokens("a", prompt(10)), cluster.held_tokens("b", prompt(10))) == (0, 10)
    assert cluster.freed("a", MOVED) == list(reversed(keys_of(prompt(10)))), "suffix first"
    cluster.assert_at_rest()


def test_an_event_has_the_times_that_people_read() -> None:
    cluster = pair(prompt(4))
    cluster.hold(FetchChunks)
    event_id = cluster.begin("a", "b", prompt(4))
    started_at = cluster.now
    cluster.run(3.0)
    cluster.release()
    event = cluster.event("a", event_id)
    wall_offset_s = config_of("a").wall_offset_s
    assert event.started_at == started_at + wall_offset_s
    assert event.finished_at == started_at + 3.0 + wall_offset_s


def test_a_third_node_may_coordinate_and_all_three_know_the_end() -> None:
    cluster = Cluster("a", "b", "c")
    cluster.store("a", prompt(10))
    event_id = cluster.begin("a", "b", prompt(10), by="c")
    assert [cluster.event(name, event_id).state for name in "abc"] == [DONE, DONE, DONE]
    assert cluster.event("c", event_id).coordinator == "c"
    parties = parse_event_id(event_id)
    assert parties is not None
    assert (parties.source, parties.target, parties.coordinator) == ("a", "b", "c")


def test_a_move_may_be_asked_for_at_its_target() -> None:
    cluster = pair(prompt(10))
    event_id = cluster.begin("a", "b", prompt(10), by="b")
    assert cluster.event("b", event_id).state is DONE
    cluster.assert_at_rest()


def test_after_a_move_everyone_sees_it() -> None:
    cluster = Cluster("a", "b", "c")
    cluster.store("a", prompt(10))
    cluster.run(0.1)
    (held,) = cluster.nodes["c"].machine.lookup(prompt(10), None, IDENTITY)
    assert (held.instance, held.num_tokens) == ("a", 10)
    cluster.move("a", "b", prompt(10))
    cluster.run(0.1)
    for node in cluster.nodes.values():
        (held,) = node.machine.lookup(prompt(10), "tiny", IDENTITY)
        assert (held.instance, held.num_tokens) == ("b", 10)
    assert cluster.nodes["c"].machine.lookup(prompt(10), "unknown", IDENTITY) == ()


def test_a_copy_leaves_the_source_as_it_was() -> None:
    cluster = pair(prompt(10))
    event = cluster.move("a", "b", prompt(10), operation=Operation.COPY)
    assert (event.state, event.chunks) == (DONE, ChunkCounts(found=3, moved=3))
    assert (cluster.held_tokens("a", prompt(10)), cluster.held_tokens("b", prompt(10))) == (10, 10)
    assert cluster.sent("a", Take) == []
    cluster.assert_at_rest()


@pytest.mark.parametrize("operation", Operation)
def test_what_is_there_already_is_not_carried_again(operation: Operation) -> None:
    cluster = pair(prompt(10))
    cluster.store("b", prompt(4))
    event = cluster.move("a", "b", prompt(10), operation=operation)
    assert (event.state, event.chunks) == (DONE, ChunkCounts(found=3, moved=2, already_there=1))
    assert event.nbytes == NAMESPACE.shard_nbytes(6)
    assert cluster.has("a", prompt(10)) == [operation is Operation.COPY] * 3
    cluster.assert_at_rest()


def test_a_repeated_move_finds_nothing_and_a_repeated_copy_carries_nothing() -> None:
    cluster = pair(prompt(10))
    cluster.move("a", "b", prompt(10), operation=Operation.COPY)
    again = cluster.move("a", "b", prompt(10), operation=Operation.COPY)
    assert (again.state, again.chunks, again.nbytes) == (DONE, ChunkCounts(found=3, already_there=3), 0)
    assert again.lane is None
    cluster.move("a", "b", prompt(10))
    nothing = cluster.move("a", "b", prompt(10))
    assert (nothing.state, nothing.chunks, nothing.num_tokens) == (DONE, ChunkCounts(), 0)


def test_moving_to_the_same_position_changes_nothing_and_says_so() -> None:
    cluster = pair(prompt(10))
    event = cluster.move("a", "a", prompt(10))
    assert (event.state, event.chunks, event.num_tokens) == (DONE, ChunkCounts(found=3, already_there=3), 10)
    assert cluster.held_tokens("a", prompt(10)) == 10
    assert cluster.sent("a", Offer) == []
    cluster.assert_at_rest()


def test_nothing_held_is_done_with_nothing() -> None:
    cluster = pair()
    event = cluster.move("a", "b", prompt(10))
    assert (event.state, event.chunks, event.num_tokens, event.finished_at) == (DONE, ChunkCounts(), 0, event.started_at)


# --- what a move takes (P4) -----------------------------------------------------------------------------------------------


def test_a_move_takes_what_lies_wholly_inside_its_tokens() -> None:
    cluster = pair(prompt(10))
    event = cluster.move("a", "b", prompt(9))
    assert (event.num_tokens, event.chunks) == (8, ChunkCounts(found=2, shared_kept=2)), "the tail hangs on them"
    assert (cluster.has("a", prompt(10)), cluster.has("b", prompt(10))) == ([True, True, True], [True, True, False])


def test_partly_filled_chunks_on_the_way_go_along() -> None:
    cluster = pair(prompt(6))
    cluster.store("a", prompt(10))
    event = cluster.move("a", "b", prompt(10))
    assert (event.num_tokens, event.chunks) == (10, ChunkCounts(found=4, moved=4))
    assert cluster.held_tokens("a", prompt(6)) == 0


def test_all_takes_everything_and_empty_tokens_nothing() -> None:
    cluster = pair(prompt(10))
    cluster.store("a", prompt(5, first=50))
    assert cluster.move("a", "b", b"").chunks.found == 0
    event = cluster.move("a", "b", selection=Selection.ALL)
    assert (event.state, event.chunks, event.num_tokens) == (DONE, ChunkCounts(found=5, moved=5), 15)
    assert cluster.nodes["a"].resident == {}


def test_of_two_models_the_longest_prefix_counts_unless_one_is_named() -> None:
    cluster = pair(prompt(10))
    other = replace(NAMESPACE, model="other")
    cluster.ask("a", lambda request: EngineAttached(request, CLIENT, other, 0))
    cluster.store("a", prompt(6))
    assert cluster.move("a", "b", prompt(10), model="other", operation=Operation.COPY).num_tokens == 6
    assert cluster.move("a", "b", prompt(10), model="nobody's").num_tokens == 0
    assert cluster.move("a", "b", selection=Selection.ALL, model="other", operation=Operation.COPY).num_tokens == 6
    assert cluster.move("a", "b", prompt(10)).num_tokens == 10


def test_what_another_move_is_handing_over_is_left_out() -> None:
    cluster = Cluster("a", "b", "c")
    cluster.store("a", prompt(10))
    cluster.hold(Take)
    cluster.begin("a", "b", prompt(10))
    event = cluster.move("a", "c", prompt(10))
    assert (event.state, event.chunks.found) == (DONE, 0)
    assert cluster.held_tokens("a", prompt(10)) == 0, "engines don't see it either"
    cluster.release()
    assert cluster.held_tokens("b", prompt(10)) == 10


def test_of_two_moves_of_the_same_chunks_one_gets_them_and_the_other_says_so() -> None:
    cluster = Cluster("a", "b", "c")
    cluster.store("a", prompt(10))
    cluster.hold(FetchChunks)
    first, second = cluster.begin("a", "b", prompt(10)), cluster.begin("a", "c", prompt(10))
    cluster.release()
    assert cluster.event("a", first).chunks == ChunkCounts(found=3, moved=3)
    assert (cluster.event("a", second).state, cluster.event("a", second).chunks) == (FAILED, ChunkCounts(found=3, failed=3))
    assert [cluster.held_tokens(name, prompt(10)) for name in "abc"] == [0, 10, 0]
    cluster.assert_at_rest()


def test_two_moves_that_cross_lose_nothing() -> None:
    cluster = pair(prompt(10))
    cluster.store("b", prompt(10))
    cluster.hold(FetchReport)
    events = [cluster.begin("a", "b", prompt(10)), cluster.begin("b", "a", prompt(10))]
    cluster.release()
    lower, higher = sorted(events)
    assert (cluster.event("a", lower).state, cluster.event("a", higher).state) == (DONE, FAILED)
    assert (cluster.held_tokens("a", prompt(10)), cluster.held_tokens("b", prompt(10))) == (0, 10)
    cluster.assert_at_rest()


# --- shared chunks (T3) ---------------------------------------------------------------------------------------------------


def test_a_system_prompt_that_others_hang_on_stays_too() -> None:
    cluster = pair()
    one, other = SYSTEM + pack(100, 101), SYSTEM + pack(200, 201)
    cluster.store("a", one)
    cluster.store("a", other)
    event = cluster.move("a", "b", one)
    assert (event.state, event.chunks) == (DONE, ChunkCounts(found=3, moved=1, shared_kept=2))
    assert cluster.has("a", one) == [True, True, False]
    assert (cluster.held_tokens("a", other), cluster.held_tokens("b", one)) == (10, 10)
    cluster.assert_at_rest()


def test_the_last_conversation_takes_its_system_prompt_along() -> None:
    cluster = pair()
    one, other = SYSTEM + pack(100, 101), SYSTEM + pack(200, 201)
    cluster.store("a", one)
    cluster.store("a", other)
    cluster.move("a", "b", one)
    event = cluster.move("a", "b", other)
    assert event.chunks == ChunkCounts(found=3, moved=1, already_there=2)
    assert cluster.nodes["a"].resident == {}


def test_a_chunk_that_gets_a_child_during_the_hand_over_stays() -> None:
    """The engine stores a prompt that hangs on what is on its way out; a Take is open."""
    cluster = pair(SYSTEM)
    cluster.hold(Take, times=1)
    event_id = cluster.begin("a", "b", SYSTEM)
    cluster.store("a", SYSTEM + pack(100, 101))
    cluster.release()
    event = cluster.event("a", event_id)
    assert (event.state, event.chunks) == (DONE, ChunkCounts(found=2, shared_kept=2))
    assert cluster.held_tokens("a", SYSTEM + pack(100, 101)) == 10
    assert cluster.held_tokens("b", SYSTEM) == 8
    cluster.assert_at_rest()


def test_an_engine_that_stores_an_outgoing_chunk_keeps_it() -> None:
    """T8: the attempt is closed, its late answer ignored, and the chunk is shared."""
    cluster = pair(prompt(12))
    cluster.hold(Take, times=1)
    event_id = cluster.begin("a", "b", prompt(12))
    assert cluster.held_tokens("a", prompt(12)) == 0
    assert cluster.store("a", prompt(8)) == 8
    cluster.release()
    event = cluster.event("a", event_id)
    assert (event.state, event.chunks) == (DONE, ChunkCounts(found=3, moved=1, shared_kept=2))
    assert [take.attempt for take in cluster.sent("a", Take)] == [1, 2]
    assert (cluster.held_tokens("a", prompt(12)), cluster.held_tokens("b", prompt(12))) == (8, 12)
    cluster.assert_at_rest()


def test_an_engine_that_stores_what_a_move_has_brought_owns_it() -> None:
    cluster = pair(prompt(8))
    cluster.hold(Take)
    event_id = cluster.begin("a", "b", prompt(8))
    assert cluster.held_tokens("b", prompt(8)) == 0, "what is fetched belongs to nobody"
    assert cluster.store("b", prompt(8)) == 8
    cluster.cancel("a", event_id)
    cluster.release()
    assert cluster.event("a", event_id).chunks == ChunkCounts(found=2, moved=2)
    assert (cluster.held_tokens("a", prompt(8)), cluster.held_tokens("b", prompt(8))) == (0, 8)
    cluster.assert_at_rest()


def test_a_prefix_that_is_moved_away_while_its_suffix_is_written_does_no_harm() -> None:
    cluster = pair(SYSTEM)
    lent = cluster.lend("a", SYSTEM + pack(100))
    cluster.move("a", "b", SYSTEM)
    cluster.commit("a", lent)
    assert cluster.held_tokens("b", SYSTEM) == 8
    cluster.assert_at_rest()


def test_an_engine_is_not_lent_what_a_move_is_bringing() -> None:
    cluster = pair(prompt(8))
    cluster.hold(FetchChunks)
    cluster.begin("a", "b", prompt(8))
    lent = cluster.lend("b", prompt(12))
    assert [shard.start for shard in lent.shards] == [8]
    cluster.commit("b", lent)
    cluster.release()
    assert cluster.held_tokens("b", prompt(12)) == 12


def test_what_an_engine_is_writing_at_the_target_is_not_fetched() -> None:
    cluster = pair(prompt(8))
    lent = cluster.lend("b", prompt(4))
    event = cluster.move("a", "b", prompt(8))
    assert (event.state, event.chunks) == (PARTIAL, ChunkCounts(found=2, moved=1, failed=1))
    cluster.commit("b", lent)
    assert cluster.move("a", "b", prompt(8)).chunks == ChunkCounts(found=1, already_there=1)


def test_what_an_engine_stores_during_the_fetch_is_there_already() -> None:
    cluster = pair(prompt(8))
    lent = cluster.lend("b", prompt(4))
    cluster.hold(FetchChunks)
    event_id = cluster.begin("a", "b", prompt(8))
    cluster.commit("b", lent)
    cluster.release()
    assert cluster.event("a", event_id).chunks == ChunkCounts(found=2, moved=1, already_there=1)


# --- room (F3, F4) --------------------------------------------------------------------------------------------------------


def test_a_full_target_refuses_before_a_byte_moves() -> None:
    cluster = pair(prompt(12), capacity=3)
    held = prompt(8, first=50)
    cluster.run(1.0)
    cluster.store("b", held)
    event = cluster.move("a", "b", prompt(12))
    assert (event.state, event.chunks) == (FAILED, ChunkCounts(found=3, failed=3))
    assert event.error is not None
    assert event.error.code is ErrorCode.STORE_FULL
    assert cluster.effects("b", FetchChunks) == []
    assert (cluster.held_tokens("a", prompt(12)), cluster.held_tokens("b", held)) == (12, 8)
    cluster.assert_at_rest()


def test_what_comes_evicts_what_is_colder() -> None:
    cluster = pair(capacity=3)
    cold = prompt(8, first=50)
    cluster.store("b", cold)
    cluster.run(1.0)
    cluster.store("a", prompt(12))
    assert cluster.move("a", "b", prompt(12)).state is DONE
    assert cluster.freed("b", EVICTED) == list(reversed(keys_of(cold)))


def test_room_that_is_promised_to_one_move_is_not_given_to_another() -> None:
    cluster = Cluster("a", "b", "c", cpu_limit_nbytes=4 * PAGE_NBYTES)
    cluster.store("a", prompt(12))
    cluster.store("c", prompt(12, first=50))
    cluster.hold(FetchChunks)
    first = cluster.begin("a", "b", prompt(12))
    second = cluster.move("c", "b", prompt(12, first=50))
    assert second.error is not None
    assert second.error.code is ErrorCode.STORE_FULL
    cluster.release()
    assert cluster.event("a", first).state is DONE


def test_room_that_is_promised_to_a_move_is_not_lent_to_an_engine() -> None:
    chunk_count = HANDOFF_BATCH.descriptors + 2
    tokens = prompt(4 * chunk_count)
    cluster = pair(tokens, capacity=chunk_count)
    cluster.hold(FetchChunks, times=1)
    event_id = cluster.begin("a", "b", tokens)
    lent = cluster.lend("b", prompt(4, first=5000))
    assert lent.failure is not None
    assert lent.failure.code is ErrorCode.STORE_FULL
    cluster.release()
    assert cluster.event("a", event_id).state is DONE


@pytest.mark.parametrize("step", [FetchChunks, FetchReport, Take, TakeAnswer])
def test_what_a_move_is_about_is_evicted_at_neither_end_before_it_ends(step: type) -> None:
    """P6, F4, T9: not what the source gives, nor what the target had before, nor what it took."""
    cluster = pair(prompt(12), capacity=3)
    cluster.store("b", prompt(4))
    cluster.hold(step)
    event_id = cluster.begin("a", "b", prompt(12))
    for name in "ab":
        assert cluster.store(name, prompt(12, first=50)) == 0
    cluster.release()
    assert cluster.event("a", event_id).chunks == ChunkCounts(found=3, moved=2, already_there=1)
    for name in "ab":
        assert cluster.store(name, prompt(12, first=50)) == 12, "nothing is leased any more"


def test_what_was_there_already_is_not_evicted_either() -> None:
    cluster = pair(prompt(12), capacity=3)
    cluster.move("a", "b", prompt(12), operation=Operation.COPY)
    cluster.hold(FetchReport)
    event_id = cluster.begin("a", "b", prompt(12))
    assert cluster.store("b", prompt(12, first=50)) == 0
    cluster.release()
    assert cluster.event("a", event_id).chunks == ChunkCounts(found=3, already_there=3)


# --- large moves ----------------------------------------------------------------------------------------------------------


def test_a_manifest_comes_in_pages() -> None:
    tokens = prompt(4 * (2 * MANIFEST_PAGE_CHUNKS + 1))
    cluster = pair(tokens)
    event = cluster.move("a", "b", tokens)
    assert (event.state, event.chunks.moved) == (DONE, 2 * MANIFEST_PAGE_CHUNKS + 1)
    assert [len(page.chunks) for page in cluster.sent("a", ManifestPage)] == [MANIFEST_PAGE_CHUNKS, 1]


def test_a_large_move_is_handed_over_in_several_attempts() -> None:
    chunk_count = TAKE_BATCH_KEYS + 6
    tokens = prompt(4 * chunk_count)
    cluster = Cluster("a", "b", cpu_limit_nbytes=2000 * PAGE_NBYTES, descriptor_limit=2000)
    cluster.store("a", tokens)
    event = cluster.move("a", "b", tokens)
    assert (event.state, event.chunks) == (DONE, ChunkCounts(found=chunk_count, moved=chunk_count))
    takes = cluster.sent("a", Take)
    assert [(take.attempt, len(take.released)) for take in takes] == [(1, TAKE_BATCH_KEYS), (2, 6)]
    keys = [chunk.key for chunk in chunks_of(tokens)]
    assert takes[1].released == tuple(reversed(keys[:6])), "what is handed over last is the prefix"
    assert [len(fetch.chunks) for fetch in cluster.effects("b", FetchChunks)] == [240] * 4 + [70]
    cluster.assert_at_rest()


def test_a_chunk_of_many_shards_is_a_batch_of_its_own() -> None:
    wide = replace(NAMESPACE, kv_heads=HANDOFF_BATCH.descriptors, world_size=HANDOFF_BATCH.descriptors)
    cluster = Cluster("a", "b", namespace=wide)
    cluster.store("a", prompt(8))
    event = cluster.move("a", "b", prompt(8))
    assert (event.state, event.chunks.moved) == (DONE, 2)
    assert [len(fetch.chunks) for fetch in cluster.effects("b", FetchChunks)] == [1, 1]


# --- refusals (P3) --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "code"),
    [
        (at("nobody"), at("b"), ErrorCode.UNKNOWN_INSTANCE),
        (at("a"), at("nobody"), ErrorCode.UNKNOWN_INSTANCE),
        (at("a", Location.LOCAL_DISK), at("b"), ErrorCode.UNKNOWN_LOCATION),
        (at("a"), at("b", Location.LOCAL_DISK), ErrorCode.UNKNOWN_LOCATION),
        (at("dead"), at("b"), ErrorCode.INSTANCE_UNREACHABLE),
        (at("a"), at("dead"), ErrorCode.INSTANCE_UNREACHABLE),
    ],
)
@pytest.mark.parametrize("by", ["a", "c"])
def test_a_move_between_what_isnt_there_is_refused(source: object, target: object, code: ErrorCode, by: str) -> None:
    cluster = Cluster("a", "b", "c", "dead")
    cluster.store("a", prompt(10))
    cluster.crash("dead")
    cluster.run(3.0)
    request = cluster.ask(
        by,
        lambda each: MoveRequested(each, source, target, Operation.MOVE, Selection.TOKENS, prompt(10), IDENTITY, None),  # type: ignore[arg-type]
    )
    assert cluster.failure_of(request) is code
    assert cluster.nodes[by].machine.events() == ()
    assert cluster.held_tokens("a", prompt(10)) == 10
    cluster.assert_at_rest()


@pytest.mark.parametrize(
    ("difference", "named"),
    [
        ({"dtype": "float16"}, "dtype float32 / float16"),
        ({"world_size": 2}, "world_size 1 / 2"),
        ({"weights": "others"}, "weights"),
    ],
)
def test_caches_that_cant_be_exchanged_are_refused_by_name(difference: dict[str, Any], named: str) -> None:
    cluster = pair(prompt(10))
    other = replace(NAMESPACE, **difference)
    cluster.crash("b")
    cluster.boot("b", namespace=other)
    cluster.run(1.0)
    request = cluster.start("a", "b", prompt(10))
    assert cluster.failure_of(request) is ErrorCode.NAMESPACE_MISMATCH
    failure = cluster.answers[request].failure
    assert failure is not None
    assert named in failure.detail
    assert "(source / target)" in failure.detail


def test_a_target_cut_into_other_chunks_refuses_the_offer() -> None:
    cluster = pair(prompt(10))
    cluster.crash("b")
    cluster.boot("b", namespace=replace(NAMESPACE, model="other", chunk_size=8), chunk_size=8)
    cluster.run(1.0)
    event = cluster.move("a", "b", prompt(10))
    assert (event.state, event.chunks) == (FAILED, ChunkCounts(found=3, failed=3))
    assert event.error is not None
    assert event.error.code is ErrorCode.NAMESPACE_MISMATCH


def test_without_a_lane_nothing_moves() -> None:
    cluster = pair(prompt(10))
    cluster.boot("c", handoff=None)
    cluster.run(1.0)
    cluster.store("c", prompt(4, first=50))
    event = cluster.move("c", "b", prompt(4, first=50))
    assert (event.state, event.chunks) == (FAILED, ChunkCounts(found=1, failed=1))
    assert event.error is not None
    assert event.error.code is ErrorCode.TRANSFER_FAILED
    cluster.assert_at_rest()


def test_what_an_engine_stored_meanwhile_stays_until_the_move_has_ended() -> None:
    tokens = prompt(4 * 300)
    cluster = pair(tokens, capacity=360)
    cluster.hold(FetchChunks)
    event_id = cluster.begin("a", "b", tokens)
    cluster.store("b", tokens)  # the 60 chunks of the second batch
    cluster.lose(TakeAnswer)
    cluster.release()
    for first in (5000, 6000):  # 60 chunks each, of which only the second 60 need more room than there is
        assert cluster.store("b", prompt(4 * 60, first)) == 4 * 60
    cluster.heal()
    cluster.run(1.5)
    event = cluster.event("a", event_id)
    assert (event.state, event.chunks.moved, event.chunks.already_there) == (DONE, 240, 60)
    assert cluster.held_tokens("b", tokens) == 4 * 300
    cluster.assert_at_rest()
