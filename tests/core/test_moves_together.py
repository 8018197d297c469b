"""Moves of the same chunks at once (promise M4): to one target, in opposite directions, one after the other's heels."""

from itertools import permutations

import pytest

from p2pkv.core.effects import FetchChunks
from p2pkv.core.events import CancelRequested
from p2pkv.core.ids import EventId, InstanceId
from p2pkv.core.messages import FetchReport, Take, TakeAnswer
from p2pkv.core.records import ChunkCounts, EventState, Operation, Selection
from tests.core.builders import pack, prompt
from tests.core.cluster import Cluster

DONE, PARTIAL, FAILED, CANCELLED = EventState.DONE, EventState.PARTIAL, EventState.FAILED, EventState.CANCELLED
MOVE, COPY = Operation.MOVE, Operation.COPY
TOKENS = prompt(10)


def holding(*names: InstanceId, holders: str) -> Cluster:
    cluster = Cluster(*names)
    for holder in holders:
        cluster.store(holder, TOKENS)
    return cluster


def held_by(cluster: Cluster) -> str:
    return "".join(name for name, node in cluster.nodes.items() if node.is_up and cluster.held_tokens(name, TOKENS) == 10)


def cancel(cluster: Cluster, event_id: EventId, by: InstanceId) -> None:
    cluster.ask(by, lambda request: CancelRequested(request, event_id))


# --- to one target --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first_is", "second_is"), [(MOVE, MOVE), (MOVE, COPY), (COPY, MOVE), (COPY, COPY)])
def test_a_second_move_to_the_same_target_waits_for_the_first_ones_fetch(first_is: Operation, second_is: Operation) -> None:
    cluster = holding("a", "b", "c", holders="ab")
    fetches = cluster.hold(FetchChunks)
    first = cluster.begin("a", "c", TOKENS, operation=first_is)
    second = cluster.begin("b", "c", TOKENS, operation=second_is)
    assert fetches.seen == 1
    cluster.release()
    assert cluster.event("a", first).chunks == ChunkCounts(found=3, moved=3)
    assert (cluster.event("b", second).state, cluster.event("b", second).chunks) == (
        DONE,
        ChunkCounts(found=3, already_there=3),
    )
    stayed = ("a" if first_is is COPY else "") + ("b" if second_is is COPY else "")
    assert held_by(cluster) == stayed + "c"
    cluster.assert_at_rest()


def test_what_the_first_ones_fetch_does_not_bring_the_second_fetches() -> None:
    cluster = holding("a", "b", "c", holders="ab")
    cluster.hold(FetchChunks)
    first, second = cluster.begin("a", "c", TOKENS), cluster.begin("b", "c", TOKENS, operation=COPY)
    cluster.lane_brings = 1
    cluster.release()
    assert cluster.event("a", first).state is PARTIAL
    assert cluster.event("b", second).chunks == ChunkCounts(found=3, moved=1, already_there=1, failed=1)
    cluster.assert_at_rest()


def test_when_the_first_is_cancelled_the_second_has_what_it_brought() -> None:
    cluster = holding("a", "b", "c", holders="ab")
    cluster.hold(FetchChunks)
    cluster.hold(Take)
    first, second = cluster.begin("a", "c", TOKENS), cluster.begin("b", "c", TOKENS)
    cancel(cluster, first, by="a")
    cluster.release()
    assert cluster.event("a", first).state is CANCELLED
    assert cluster.event("b", second).state is DONE
    assert held_by(cluster) == "ac"
    cluster.assert_at_rest()


def test_when_the_first_ends_after_its_fetch_what_the_second_counts_on_stays() -> None:
    cluster = holding("a", "b", "c", holders="ab")
    cluster.hold(FetchReport)
    first = cluster.begin("a", "c", TOKENS)
    second = cluster.begin("b", "c", TOKENS)
    cancel(cluster, first, by="a")
    cluster.release()
    assert (cluster.event("a", first).state, cluster.event("b", second).state) == (CANCELLED, DONE)
    assert held_by(cluster) == "ac"
    cluster.assert_at_rest()


def test_when_the_first_ones_source_dies_during_its_fetch_the_second_goes_on() -> None:
    cluster = holding("a", "b", "c", holders="ab")
    cluster.hold(FetchChunks)
    cluster.begin("a", "c", TOKENS)
    second = cluster.begin("b", "c", TOKENS)
    cluster.crash("a")
    cluster.run(4.0)
    cluster.release()
    cluster.run(4.0)
    assert cluster.event("b", second).state is DONE
    assert held_by(cluster) == "c"
    cluster.assert_at_rest()


def test_two_moves_that_each_wait_for_a_part_of_the_other_both_end() -> None:
    cluster = Cluster("a", "b", "c")
    one, other = prompt(10), pack(7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
    for name in "ab":
        cluster.store(name, one)
        cluster.store(name, other)
    cluster.hold(FetchChunks)
    events = [
        ("a", cluster.begin("a", "c", one)),
        ("b", cluster.begin("b", "c", other)),
        ("a", cluster.begin("a", "c", other)),
        ("b", cluster.begin("b", "c", one)),
    ]
    cluster.release()
    assert [cluster.event(name, event_id).state for name, event_id in events] == [DONE] * 4
    assert [cluster.held_tokens(name, tokens) for name in "abc" for tokens in (one, other)] == [0, 0, 0, 0, 10, 10]
    cluster.assert_at_rest()


def test_the_same_move_twice_at_once_moves_once() -> None:
    cluster = holding("a", "b", holders="a")
    cluster.hold(FetchChunks)
    events = [cluster.begin("a", "b", TOKENS) for _ in range(2)]
    cluster.release()
    states = sorted(cluster.event("a", event_id).state for event_id in events)
    assert states == [DONE, FAILED]
    assert held_by(cluster) == "b"
    cluster.assert_at_rest()


LONG = prompt(4 * 4 * 240)
"""Of four batches by handoff."""


def awaiting_long() -> tuple[Cluster, EventId]:
    """A move of four batches, whose first two chunks another one is fetching; both fetches wait."""
    cluster = Cluster("a", "b", "c", cpu_limit_nbytes=2**30, descriptor_limit=10**5)
    cluster.store("a", prompt(8))
    cluster.store("b", LONG)
    cluster.hold(FetchChunks)
    cluster.begin("a", "c", prompt(8))
    return cluster, cluster.begin("b", "c", LONG)


def test_a_move_that_waits_for_another_fetches_one_batch_at_a_time() -> None:
    cluster, event_id = awaiting_long()
    cluster.held.rotate(-1)
    cluster.held.popleft()()
    assert len([fetch for fetch in cluster.effects("c", FetchChunks) if fetch.event_id == event_id]) == 2
    assert len(cluster.held) == 2
    cluster.release()
    assert cluster.event("b", event_id).chunks == ChunkCounts(found=960, moved=958, already_there=2)
    cluster.assert_at_rest()


def test_a_move_that_waits_for_another_can_be_cancelled_between_its_batches() -> None:
    cluster, event_id = awaiting_long()
    cluster.held.rotate(-1)
    cluster.held.popleft()()
    cancel(cluster, event_id, by="b")
    cluster.release()
    assert cluster.event("b", event_id).state is CANCELLED
    cluster.assert_at_rest()


def test_a_copy_fetches_again_what_its_target_has_given_away_meanwhile() -> None:
    cluster = Cluster("a", "b", "c")
    cluster.store("a", prompt(12))
    cluster.store("c", prompt(8))
    cluster.hold(FetchChunks, 1)
    event_id = cluster.begin("a", "c", prompt(12), operation=COPY)
    assert cluster.move("c", "b", prompt(8)).state is DONE
    cluster.release()
    assert cluster.event("a", event_id).state is DONE
    assert cluster.held_tokens("c", prompt(12)) == 12


# --- in opposite directions, and in chains --------------------------------------------------------------------------------


@pytest.mark.parametrize("held_first", [Take, TakeAnswer, FetchReport])
def test_of_two_moves_that_cross_the_lower_id_goes_on(held_first: type) -> None:
    cluster = holding("a", "b", holders="ab")
    cluster.hold(held_first)
    lower, higher = sorted([cluster.begin("a", "b", TOKENS), cluster.begin("b", "a", TOKENS)])
    cluster.release()
    cluster.run(1.0)
    winner, loser = ("a", "b") if lower.startswith("move~a") else ("b", "a")
    assert (cluster.event(winner, lower).state, cluster.event(loser, higher).state) == (DONE, FAILED)
    assert held_by(cluster) == loser
    cluster.assert_at_rest()


def test_the_lower_id_goes_on_if_it_is_offered_while_the_higher_hands_over() -> None:
    cluster = holding("a", "b", "c", holders="ab")
    cluster.hold(TakeAnswer)
    higher = cluster.begin("b", "c", TOKENS)
    lower = cluster.begin("a", "b", TOKENS)
    assert lower < higher
    cluster.release()
    assert cluster.event("a", lower).state is DONE
    assert cluster.event("b", higher).chunks == ChunkCounts(found=3, shared_kept=3)
    assert held_by(cluster) == "bc"
    cluster.assert_at_rest()


@pytest.mark.parametrize("firsts", [(0, 100), (100, 0)])
def test_a_chunk_that_is_claimed_from_one_move_is_not_taken_by_the_next(firsts: tuple[int, int]) -> None:
    cluster = Cluster("a", "b", "c", "d")
    prompts = [prompt(4, first) for first in firsts]
    for name in "ab":
        for tokens in prompts:
            cluster.store(name, tokens)
    cluster.hold(FetchReport)
    lower = cluster.begin("a", "b", selection=Selection.ALL)
    report = cluster.held.popleft()
    cluster.heal()
    cluster.hold(TakeAnswer)
    higher = [cluster.begin("b", "c", prompts[0]), cluster.begin("b", "d", selection=Selection.ALL)]
    assert lower < min(higher)
    report()
    cluster.pump()
    cluster.release()
    assert cluster.event("a", lower).state is DONE
    assert [cluster.held_tokens("b", tokens) for tokens in prompts] == [4, 4]
    cluster.assert_at_rest()


@pytest.mark.parametrize("ends", list(permutations("abc", 2)))
def test_moves_round_in_a_circle_leave_at_least_one_and_all_end(ends: tuple[InstanceId, InstanceId]) -> None:
    cluster = holding("a", "b", "c", holders="abc")
    cluster.hold(Take)
    events = [(source, cluster.begin(source, target, TOKENS)) for source, target in (("a", "b"), ("b", "c"), ("c", "a"), ends)]
    cluster.release()
    cluster.run(1.0)
    assert all(cluster.event(source, event_id).state.is_final for source, event_id in events)
    assert any(cluster.event(source, event_id).state is DONE for source, event_id in events)
    assert held_by(cluster)
    cluster.assert_at_rest()
