"""Moves on a bad day (protocol rules T, E and P2): messages lost, repeated, late; ends that die, leave or stand still.

Whatever happens: no chunk is lost, the event ends, and nothing stays leased, promised or staged.
"""

import pytest

from p2pkv.core.chunks import PAGE_NBYTES
from p2pkv.core.effects import CancelFetch, FetchChunks, ReleaseReason
from p2pkv.core.messages import (
    CancelRequest,
    EventReport,
    FetchReport,
    ManifestPage,
    ManifestRequest,
    MemberTable,
    Message,
    Offer,
    PlanAnswer,
    PlanRequest,
    ProbeAnswer,
    Rumours,
    Take,
    TakeAnswer,
)
from p2pkv.core.moves.coordinator import PLAN_S
from p2pkv.core.moves.handover import TAKE_ANSWER_S
from p2pkv.core.records import ChunkCounts, EventState, MemberState, Operation
from p2pkv.errors import ErrorCode
from tests.core.builders import LEASE_S, LEAVE_S, MOVE_DEADLINE_S, keys_of, prompt
from tests.core.cluster import Cluster

DONE, PARTIAL, FAILED, CANCELLED = EventState.DONE, EventState.PARTIAL, EventState.FAILED, EventState.CANCELLED
PENDING, RUNNING = EventState.PENDING, EventState.RUNNING
TOKENS = prompt(12)
NONE, ALL = [False] * 3, [True] * 3
EVERY_MESSAGE = [PlanRequest, PlanAnswer, Offer, FetchReport, Take, TakeAnswer, EventReport]


def trio() -> Cluster:
    """`a` holds a prompt, `b` has room, `c` will be asked to move it."""
    cluster = Cluster("a", "b", "c")
    cluster.store("a", TOKENS)
    return cluster


def begin(cluster: Cluster, operation: Operation = Operation.MOVE) -> str:
    return cluster.begin("a", "b", TOKENS, by="c", operation=operation)


def error_of(cluster: Cluster, event_id: str, at: str = "a") -> ErrorCode | None:
    error = cluster.event(at, event_id).error
    return None if error is None else error.code


def where(cluster: Cluster) -> tuple[list[bool], list[bool]]:
    return cluster.has("a", TOKENS), cluster.has("b", TOKENS)


# --- messages lost and repeated -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY_MESSAGE)
def test_a_lost_message_is_made_good(kind: type[Message]) -> None:
    cluster = trio()
    cluster.lose(kind, times=1)
    request = cluster.start("a", "b", TOKENS, by="c")
    cluster.run(4.0)
    event_id = cluster.event_of(request).event_id
    assert [cluster.event(name, event_id).state for name in "abc"] == [DONE, DONE, DONE]
    assert where(cluster) == (NONE, ALL)
    cluster.assert_at_rest()


@pytest.mark.parametrize("kind", [ManifestRequest, ManifestPage])
def test_a_lost_page_is_asked_for_again(kind: type[Message]) -> None:
    tokens = prompt(4 * 70)
    cluster = Cluster("a", "b")
    cluster.store("a", tokens)
    cluster.lose(kind, times=1)
    event_id = cluster.begin("a", "b", tokens)
    cluster.run(2.0)
    assert cluster.event("a", event_id).state is DONE


@pytest.mark.parametrize("kind", EVERY_MESSAGE)
def test_a_repeated_message_changes_nothing(kind: type[Message]) -> None:
    cluster = trio()
    cluster.repeat(kind)
    event_id = begin(cluster)
    assert cluster.event("c", event_id).state is DONE
    assert cluster.event("a", event_id).chunks == ChunkCounts(found=3, moved=3)
    assert where(cluster) == (NONE, ALL)
    cluster.heal()
    cluster.run(2.0)
    cluster.assert_at_rest()


@pytest.mark.parametrize("kind", [Offer, Take, FetchReport, TakeAnswer, PlanRequest, PlanAnswer])
def test_a_message_that_comes_long_after_the_end_changes_nothing(kind: type[Message]) -> None:
    cluster = trio()
    cluster.hold(kind, times=1)
    request = cluster.start("a", "b", TOKENS, by="c")
    cluster.run(4.0)
    event_id = cluster.event_of(request).event_id
    before = cluster.event("a", event_id)
    assert before.state is DONE
    cluster.release()
    cluster.run(2.0)
    assert cluster.event("a", event_id) == before
    assert where(cluster) == (NONE, ALL)
    cluster.assert_at_rest()


def test_a_late_offer_of_an_ended_move_doesnt_bring_it_back() -> None:
    """The target has evicted nothing and fetched nothing, and lets go of everything once it is told."""
    cluster = trio()
    event_id = begin(cluster)
    (offer,) = cluster.sent("a", Offer)
    cluster.deliver("a", "b", offer)
    assert cluster.event("b", event_id).state is DONE
    assert len(cluster.effects("b", FetchChunks)) == 1
    cluster.assert_at_rest()


# --- plans (P2) -----------------------------------------------------------------------------------------------------------


def test_a_plan_that_doesnt_come_is_given_up_and_no_event_is_left() -> None:
    cluster = trio()
    cluster.lose(PlanRequest)
    request = cluster.start("a", "b", TOKENS, by="c")
    cluster.run(PLAN_S - 0.1)
    assert request not in cluster.answers
    assert len(cluster.sent("c", PlanRequest)) == PLAN_S
    cluster.run(0.2)
    assert cluster.failure_of(request) is ErrorCode.INSTANCE_UNREACHABLE
    assert cluster.nodes["c"].machine.events() == ()
    assert cluster.sent("c", CancelRequest) != []


def test_a_plan_is_given_up_as_soon_as_its_source_is_dead() -> None:
    cluster = trio()
    cluster.stop("a")
    request = cluster.start("a", "b", TOKENS, by="c")
    cluster.crash("a")
    cluster.run(2.0)
    assert cluster.failure_of(request) is ErrorCode.INSTANCE_UNREACHABLE


def test_a_plan_that_comes_too_late_is_cancelled() -> None:
    cluster = trio()
    cluster.hold(PlanRequest)
    cluster.hold(FetchChunks)
    request = cluster.start("a", "b", TOKENS, by="c")
    cluster.run(PLAN_S)
    assert cluster.failure_of(request) is ErrorCode.INSTANCE_UNREACHABLE
    cluster.release()
    (event,) = cluster.nodes["a"].machine.events()
    assert event.state is CANCELLED
    assert where(cluster) == (ALL, NONE)
    cluster.assert_at_rest()


# --- the lane -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", Operation)
def test_a_lane_that_breaks_gives_a_partial_move_of_the_prefix(operation: Operation) -> None:
    cluster = trio()
    cluster.lane_brings = 1
    event_id = begin(cluster, operation)
    event = cluster.event("a", event_id)
    is_copy = operation is Operation.COPY
    assert (event.state, event.chunks) == (PARTIAL, ChunkCounts(found=3, moved=is_copy, shared_kept=not is_copy, failed=2))
    assert error_of(cluster, event_id) is ErrorCode.TRANSFER_FAILED
    assert where(cluster) == (ALL, [True, False, False])
    cluster.assert_at_rest()


def test_a_lane_that_brings_nothing_fails_the_move() -> None:
    cluster = trio()
    cluster.lane_brings = 0
    event_id = begin(cluster)
    assert cluster.event("a", event_id).chunks == ChunkCounts(found=3, failed=3)
    assert cluster.event("c", event_id).state is FAILED
    assert where(cluster) == (ALL, NONE)
    cluster.assert_at_rest()


def test_a_damaged_chunk_is_never_admitted() -> None:
    """M5, as far as the core goes: what the lane doesn't name as fetched stays out."""
    cluster = trio()
    cluster.damaged[keys_of(TOKENS)[2]] = None
    event_id = begin(cluster)
    event = cluster.event("a", event_id)
    assert (event.state, event.chunks) == (PARTIAL, ChunkCounts(found=3, shared_kept=2, failed=1))
    assert where(cluster) == (ALL, [True, True, False])
    cluster.assert_at_rest()


# --- the target dies (E5) -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [Offer, FetchChunks, FetchReport, Take, TakeAnswer])
def test_a_dead_target_loses_nothing(step: type[Message]) -> None:
    cluster = trio()
    cluster.hold(step)
    event_id = begin(cluster)
    cluster.crash("b")
    cluster.run(5.0)
    assert cluster.event("c", event_id).state is FAILED
    assert error_of(cluster, event_id) is ErrorCode.INSTANCE_UNREACHABLE
    assert cluster.has("a", TOKENS) == ALL
    assert cluster.held_tokens("a", TOKENS) == 12
    cluster.assert_at_rest()


def test_a_target_that_dies_with_the_answer_sent_has_it_counted() -> None:
    cluster = trio()
    event_id = begin(cluster)
    cluster.crash("b")
    cluster.run(5.0)
    assert cluster.event("c", event_id).state is DONE
    assert cluster.has("a", TOKENS) == NONE, "the target owned them, and took them along"


def test_a_restarted_target_answers_for_nothing() -> None:
    cluster = trio()
    cluster.hold(Take)
    event_id = begin(cluster)
    cluster.crash("b")
    cluster.boot("b")
    cluster.run(0.5)
    assert cluster.event("c", event_id).state is FAILED
    assert where(cluster) == (ALL, NONE)
    cluster.assert_at_rest()


def test_a_target_that_stands_still_fails_the_move_and_keeps_nothing_back() -> None:
    cluster = trio()
    cluster.hold(TakeAnswer)
    event_id = begin(cluster)
    assert where(cluster) == (ALL, ALL)
    cluster.run(TAKE_ANSWER_S + 1.0)
    assert cluster.event("a", event_id).chunks == ChunkCounts(found=3, failed=3)
    assert error_of(cluster, event_id) is ErrorCode.INSTANCE_UNREACHABLE
    cluster.release()
    assert where(cluster) == (ALL, ALL), "the worst case is a duplicate"
    assert cluster.freed("a", ReleaseReason.MOVED) == []
    cluster.assert_at_rest()


@pytest.mark.parametrize("operation", Operation)
def test_a_target_that_says_nothing_for_a_lease_fails_the_move(operation: Operation) -> None:
    cluster = trio()
    cluster.lose(FetchReport)
    event_id = begin(cluster, operation)
    cluster.run(LEASE_S + 0.1)
    assert cluster.event("a", event_id).chunks == ChunkCounts(found=3, failed=3)
    assert error_of(cluster, event_id) is ErrorCode.INSTANCE_UNREACHABLE
    assert cluster.has("a", TOKENS) == ALL
    cluster.heal()
    cluster.run(2.0)
    cluster.assert_at_rest()


# --- the source dies (E4) -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [FetchReport, Take])
def test_when_the_source_dies_after_the_fetch_the_target_owns_it_and_writes_the_end(step: type[Message]) -> None:
    cluster = trio()
    cluster.hold(step)
    event_id = begin(cluster)
    cluster.crash("a")
    cluster.run(6.0)
    for name in "bc":
        event = cluster.event(name, event_id)
        assert (event.state, event.chunks) == (DONE, ChunkCounts(found=3, moved=3))
    assert cluster.held_tokens("b", TOKENS) == 12
    cluster.assert_at_rest()


def test_when_the_source_dies_during_the_fetch_what_had_come_is_owned() -> None:
    cluster = trio()
    cluster.hold(FetchChunks)
    event_id = begin(cluster)
    cluster.nodes["a"].machine.lane_grant(event_id)
    cluster.crash("a")
    cluster.run(4.0)
    assert cluster.effects("b", CancelFetch) == [CancelFetch(event_id)]
    cluster.release()
    cluster.run(2.0)
    assert (cluster.event("c", event_id).state, cluster.event("c", event_id).chunks) == (FAILED, ChunkCounts(found=3, failed=3))
    assert error_of(cluster, event_id, "b") is ErrorCode.INSTANCE_UNREACHABLE
    cluster.assert_at_rest()


def test_when_the_source_dies_with_the_first_batch_there_that_is_owned() -> None:
    cluster = Cluster("a", "b")
    tokens = prompt(4 * 245)
    cluster.store("a", tokens)
    cluster.hold(FetchChunks)
    event_id = cluster.begin("a", "b", tokens)
    first = cluster.held.popleft()
    first()
    cluster.pump()
    assert len(cluster.held) == 1
    cluster.crash("a")
    cluster.run(4.0)
    cluster.release()
    event = cluster.event("b", event_id)
    assert (event.state, event.chunks) == (PARTIAL, ChunkCounts(found=245, moved=240, failed=5))
    assert cluster.held_tokens("b", tokens) == 960
    cluster.assert_at_rest()


def test_when_the_source_dies_while_its_manifest_comes_nothing_was_moved() -> None:
    cluster = Cluster("a", "b")
    tokens = prompt(4 * 70)
    cluster.store("a", tokens)
    cluster.lose(ManifestPage)
    event_id = cluster.begin("a", "b", tokens)
    cluster.crash("a")
    cluster.run(4.0)
    assert cluster.event("b", event_id).state is FAILED
    cluster.assert_at_rest()


def test_when_the_source_dies_before_the_target_heard_of_it_the_coordinator_ends_the_event() -> None:
    cluster = trio()
    cluster.lose(Offer)
    event_id = begin(cluster)
    cluster.crash("a")
    cluster.run(6.0)
    event = cluster.event("c", event_id)
    assert (event.state, event.chunks) == (FAILED, ChunkCounts(found=3, failed=3))
    assert error_of(cluster, event_id, "c") is ErrorCode.INSTANCE_UNREACHABLE


def test_when_both_ends_die_the_coordinator_ends_the_event() -> None:
    cluster = trio()
    cluster.hold(FetchChunks)
    event_id = begin(cluster)
    cluster.crash("a")
    cluster.crash("b")
    cluster.run(6.0)
    assert cluster.event("c", event_id).state is FAILED


def test_a_target_that_coordinates_itself_waits_for_its_own_end() -> None:
    cluster = trio()
    cluster.hold(FetchChunks)
    event_id = cluster.begin("a", "b", TOKENS, by="b")
    cluster.crash("a")
    cluster.run(6.0)
    assert cluster.event("b", event_id).state is RUNNING
    cluster.release()
    assert cluster.event("b", event_id).state is FAILED
    cluster.run(3.0)
    cluster.assert_at_rest()


def test_two_ends_that_lose_each_other_leave_a_duplicate_at_worst() -> None:
    cluster = trio()
    cluster.hold(TakeAnswer)
    for third in (ProbeAnswer, Rumours, MemberTable):
        cluster.lose(third)
    event_id = begin(cluster)
    cluster.cut("a", "b")
    cluster.run(19.0)  # a probe, and a suspicion that nobody shares
    assert cluster.states("a")["b"] is cluster.states("b")["a"] is MemberState.DEAD
    assert [cluster.event(name, event_id).state for name in "abc"] == [FAILED, DONE, FAILED], "the source's word counts"
    assert where(cluster) == (ALL, ALL)
    cluster.heal()
    cluster.mend()
    cluster.run(6.0)
    cluster.assert_at_rest()
    assert cluster.move("a", "b", TOKENS).chunks == ChunkCounts(found=3, already_there=3)


# --- the coordinator dies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [Offer, FetchChunks, FetchReport, Take, TakeAnswer])
def test_the_two_ends_finish_without_their_coordinator(step: type[Message]) -> None:
    cluster = trio()
    cluster.hold(step)
    event_id = begin(cluster)
    cluster.crash("c")
    cluster.release()
    assert [cluster.event(name, event_id).state for name in "ab"] == [DONE, DONE]
    assert where(cluster) == (NONE, ALL)
    cluster.assert_at_rest()


def test_a_coordinator_that_hears_nothing_gives_up_after_both_deadlines() -> None:
    cluster = trio()
    cluster.hold(Offer)
    event_id = begin(cluster)
    for name in "ab":
        cluster.cut("c", name)
    cluster.lose(EventReport)
    cluster.run(MOVE_DEADLINE_S + 16.0)
    assert cluster.event("c", event_id).state is FAILED
    cluster.heal()
    cluster.mend()
    cluster.run(6.0)
    assert cluster.event("a", event_id).state is FAILED


# --- cancel (T10) ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [Offer, FetchChunks, FetchReport])
@pytest.mark.parametrize("by", ["a", "b", "c"])
def test_a_cancel_before_the_first_take_undoes_all(step: type[Message], by: str) -> None:
    cluster = trio()
    cluster.hold(step)
    event_id = begin(cluster)
    request = cluster.cancel(by, event_id)
    assert cluster.event_of(request).state is CANCELLED
    assert cluster.event("a", event_id).chunks == ChunkCounts(found=3, failed=3)
    assert error_of(cluster, event_id) is ErrorCode.CANCELLED
    cluster.release()
    cluster.run(2.0)
    assert where(cluster) == (ALL, NONE)
    cluster.assert_at_rest()


def test_a_cancelled_copy_counts_nothing_as_copied() -> None:
    """The first batch has come; the target drops it."""
    cluster = Cluster("a", "b")
    tokens = prompt(4 * 245)
    cluster.store("a", tokens)
    cluster.hold(FetchChunks)
    event_id = cluster.begin("a", "b", tokens, operation=Operation.COPY)
    cluster.held.popleft()()
    cluster.pump()
    assert cluster.event("a", event_id).nbytes > 0
    cluster.cancel("a", event_id)
    cluster.release()
    assert cluster.nodes["b"].resident == {}
    assert cluster.event("a", event_id).chunks == ChunkCounts(found=245, failed=245)
    cluster.assert_at_rest()


def test_a_cancel_after_the_first_take_comes_too_late() -> None:
    cluster = trio()
    cluster.hold(TakeAnswer)
    event_id = begin(cluster)
    request = cluster.cancel("c", event_id)
    assert cluster.event_of(request).state is RUNNING
    cluster.release()
    assert cluster.event("c", event_id).state is DONE


def test_a_cancel_of_what_has_ended_says_how_it_ended() -> None:
    cluster = trio()
    event_id = begin(cluster)
    assert cluster.event_of(cluster.cancel("c", event_id)).state is DONE


def test_a_cancel_that_cant_reach_the_source_says_so() -> None:
    cluster = trio()
    event_id = begin(cluster)
    cluster.crash("a")
    cluster.run(4.0)
    assert cluster.failure_of(cluster.cancel("c", event_id)) is ErrorCode.INSTANCE_UNREACHABLE
    assert cluster.failure_of(cluster.cancel("c", "nonsense")) is ErrorCode.UNKNOWN_EVENT


# --- deadlines (E6) -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", Operation)
def test_a_move_ends_by_its_deadline(operation: Operation) -> None:
    cluster = trio()
    cluster.hold(FetchChunks)
    event_id = begin(cluster, operation)
    cluster.run(MOVE_DEADLINE_S - 0.1)
    assert cluster.event("c", event_id).state is RUNNING
    cluster.run(0.2)
    assert cluster.event("c", event_id).state is FAILED
    assert error_of(cluster, event_id) is ErrorCode.DEADLINE_EXCEEDED
    cluster.release()
    assert where(cluster) == (ALL, NONE)
    cluster.assert_at_rest()


def test_a_target_that_is_never_told_of_the_end_ends_by_a_deadline_of_its_own() -> None:
    cluster = trio()
    cluster.lose(Take)
    cluster.lose(EventReport)
    begin(cluster)
    cluster.run(TAKE_ANSWER_S + 1.0)
    with pytest.raises(AssertionError):
        cluster.nodes["b"].machine.check_at_rest(cluster.now)
    cluster.run(MOVE_DEADLINE_S)
    assert where(cluster) == (ALL, NONE)
    cluster.assert_at_rest()


# --- leaving (E7) ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [Offer, FetchChunks, FetchReport])
def test_a_source_that_leaves_ends_what_it_hasnt_begun_to_hand_over(step: type[Message]) -> None:
    cluster = trio()
    cluster.hold(step)
    event_id = begin(cluster)
    cluster.leave("a")
    cluster.run(LEAVE_S)
    assert cluster.nodes["a"].stop is not None
    event = cluster.event("c", event_id)
    assert (event.state, error_of(cluster, event_id, "c")) == (FAILED, ErrorCode.LEAVING)


def test_a_source_that_leaves_finishes_its_open_attempt() -> None:
    cluster = trio()
    cluster.hold(TakeAnswer)
    event_id = begin(cluster)
    cluster.leave("a")
    assert cluster.nodes["a"].stop is None
    cluster.release()
    assert cluster.event("c", event_id).state is DONE
    assert cluster.nodes["a"].stop is not None


def test_a_source_that_leaves_waits_for_no_answer_longer_than_it_may() -> None:
    cluster = trio()
    cluster.hold(TakeAnswer)
    event_id = begin(cluster)
    cluster.leave("a")
    cluster.run(LEAVE_S)
    assert cluster.nodes["a"].stop is not None
    assert (cluster.event("c", event_id).state, error_of(cluster, event_id, "c")) == (FAILED, ErrorCode.LEAVING)
    assert cluster.has("b", TOKENS) == ALL


def test_a_source_that_leaves_hands_over_no_second_batch() -> None:
    tokens = prompt(4 * 1030)
    cluster = Cluster("a", "b", cpu_limit_nbytes=2000 * 4096, descriptor_limit=2000)
    cluster.store("a", tokens)
    cluster.hold(TakeAnswer)
    event_id = cluster.begin("a", "b", tokens, by="b")
    cluster.leave("a")
    cluster.release()
    event = cluster.event("b", event_id)
    assert (event.state, event.chunks) == (PARTIAL, ChunkCounts(found=1030, moved=1024, failed=6))


@pytest.mark.parametrize("step", [Offer, FetchChunks, FetchReport, Take])
def test_a_target_that_leaves_takes_nothing(step: type[Message]) -> None:
    cluster = trio()
    cluster.hold(step)
    event_id = begin(cluster)
    cluster.leave("b")
    cluster.release()
    cluster.run(5.0)
    assert cluster.event("c", event_id).state is FAILED
    assert cluster.has("a", TOKENS) == ALL
    cluster.assert_at_rest()


def test_a_leaving_node_starts_no_moves_and_takes_none() -> None:
    cluster = trio()
    cluster.store("c", prompt(4, first=50))
    cluster.hold(TakeAnswer)
    cluster.begin("a", "b", TOKENS)
    cluster.leave("a")
    assert cluster.failure_of(cluster.start("a", "b", TOKENS)) is ErrorCode.LEAVING
    assert cluster.failure_of(cluster.start("a", "b", TOKENS, by="c")) is ErrorCode.LEAVING
    refused = cluster.move("c", "a", prompt(4, first=50))
    assert refused.state is FAILED
    assert refused.error is not None
    assert refused.error.code is ErrorCode.LEAVING
    cluster.leave("a")
    cluster.release()
    assert cluster.states("b")["a"].value == "left"


def test_a_prefix_under_which_an_engine_is_writing_stays() -> None:
    cluster = Cluster("a", "b")
    cluster.store("a", prompt(8))
    lent = cluster.lend("a", prompt(12))
    cluster.move("a", "b", prompt(8))
    assert cluster.commit("a", lent) == 12


def test_a_fetch_evicts_for_its_own_batch_only() -> None:
    cluster = Cluster("a", "b", cpu_limit_nbytes=300 * PAGE_NBYTES)
    cold = prompt(4 * 60, first=5000)
    cluster.store("b", cold)
    cluster.run(1.0)
    cluster.store("a", prompt(4 * 300))
    cluster.hold(FetchChunks)
    cluster.begin("a", "b", prompt(4 * 300))
    assert cluster.held_tokens("b", cold) > 0
