"""A user's idempotency key (protocol rule P7): a retry, through any node, is the move that was asked for first."""

import pytest

from p2pkv.core.effects import FetchChunks
from p2pkv.core.events import CancelRequested
from p2pkv.core.history import EVENTS_MAX, KEPT_S, History
from p2pkv.core.ids import EventId, InstanceId
from p2pkv.core.messages import EventReport, PlanAnswer, PlanRequest
from p2pkv.core.moves.repeats import Repeats
from p2pkv.core.records import EventState, Operation, Selection
from p2pkv.errors import ErrorCode
from tests.core.builders import IDENTITY, at, event_record, prompt
from tests.core.cluster import Cluster, How

TOKENS = prompt(12)


def three() -> Cluster:
    cluster = Cluster("a", "b", "c")
    cluster.store("a", TOKENS)
    return cluster


def ask(cluster: Cluster, by: InstanceId, key: str = "k", tokens: bytes = TOKENS, **how: object) -> EventId:
    wanted: How = {"by": by, "operation": Operation.COPY, "idempotency_key": key, **how}  # type: ignore[typeddict-item]
    return cluster.begin("a", "b", tokens, **wanted)


@pytest.mark.parametrize("by", ["a", "b", "c"])
def test_a_retry_through_any_node_is_the_same_event(by: InstanceId) -> None:
    cluster = three()
    first = ask(cluster, "c")
    assert cluster.event("a", first).state is EventState.DONE
    assert ask(cluster, by) == first
    assert [each.event_id for each in cluster.nodes["a"].machine.events()] == [first]


@pytest.mark.parametrize("by", ["a", "b", "c"])
def test_a_retry_while_the_move_goes_on_is_the_same_event(by: InstanceId) -> None:
    cluster = three()
    cluster.hold(FetchChunks)
    first = ask(cluster, "c")
    assert ask(cluster, by) == first
    assert cluster.event("a", first).state is EventState.RUNNING


def test_another_key_is_another_event_and_so_is_none() -> None:
    cluster = three()
    events = {ask(cluster, "c"), ask(cluster, "c", key="other"), cluster.begin("a", "b", TOKENS, by="c")}
    assert len(events) == 3


@pytest.mark.parametrize("difference", [{"tokens": prompt(8)}, {"operation": Operation.MOVE}, {"model": "m"}])
def test_a_key_that_was_used_for_something_else_is_refused(difference: dict[str, object]) -> None:
    cluster = three()
    first = ask(cluster, "c")
    wanted: How = {"by": "b", "operation": Operation.COPY, "idempotency_key": "k"}
    tokens = difference.pop("tokens", TOKENS)
    request = cluster.start("a", "b", tokens, **{**wanted, **difference})  # type: ignore[arg-type]
    failure = cluster.answers[request].failure
    assert failure is not None
    assert failure.code is ErrorCode.INVALID_REQUEST
    assert first in failure.detail


def test_after_a_cancel_the_same_key_tries_again() -> None:
    cluster = three()
    cluster.hold(FetchChunks)
    first = ask(cluster, "c")
    cluster.ask("c", lambda request: CancelRequested(request, first))
    assert cluster.event("a", first).state is EventState.CANCELLED
    assert ask(cluster, "c") != first


def test_a_request_that_was_given_up_cancels_nothing_that_its_retry_was_told_of() -> None:
    cluster = Cluster("a", "b", "c", "d")
    cluster.store("a", TOKENS)
    cluster.hold(FetchChunks)
    cluster.lose(PlanAnswer, 3)
    cluster.lose(EventReport, 3)
    given_up = cluster.start("a", "b", TOKENS, by="c", idempotency_key="k")
    cluster.run(2.5)
    told = cluster.begin("a", "b", TOKENS, by="d", idempotency_key="k")
    cluster.lose(PlanRequest, 2)
    cluster.lose(EventReport, 50)
    cluster.run(3.0)
    assert cluster.failure_of(given_up) is ErrorCode.INSTANCE_UNREACHABLE
    cluster.heal()
    cluster.release()
    cluster.run(2.0)
    assert cluster.event("a", told).state is EventState.DONE


def test_a_coordinator_that_was_restarted_follows_the_event_of_a_retry() -> None:
    cluster = three()
    cluster.hold(FetchChunks)
    first = ask(cluster, "c")
    cluster.crash("c")
    cluster.boot("c")
    cluster.run(1.0)
    assert ask(cluster, "c") == first
    cluster.release()
    cluster.run(3.0)
    assert cluster.event("c", first).state is EventState.DONE


def test_a_key_is_forgotten_with_its_event() -> None:
    cluster = three()
    first = ask(cluster, "c")
    cluster.run(KEPT_S + 60)
    assert ask(cluster, "c") != first


def test_keys_of_forgotten_events_take_no_room() -> None:
    history = History()
    repeats = Repeats(history)
    for number in range(5 * EVENTS_MAX):
        name = f"move~a~b~c~{number:016x}"
        history.put(event_record(name, EventState.DONE), 0.0)
        repeats.add(
            PlanRequest(
                name,
                at("a"),
                at("b"),
                Operation.COPY,
                Selection.TOKENS,
                TOKENS,
                IDENTITY,
                model=None,
                idempotency_key=f"k{number}",
            )
        )
    assert len(repeats._uses) <= 2 * EVENTS_MAX
