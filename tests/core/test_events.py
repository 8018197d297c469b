"""Events asked of any node (protocol rules E2 and E8): who knows, who is believed, and for how long."""

import pytest

from p2pkv.core.effects import EventChanged, FetchChunks
from p2pkv.core.events import EventAsked, MoveRequested
from p2pkv.core.history import KEPT_S
from p2pkv.core.ids import EventId
from p2pkv.core.messages import CancelRequest, EventReport, EventRequest, PlanAnswer, PlanRequest, Take
from p2pkv.core.moves.coordinator import ASK_S, PLAN_S, WAITING_MAX
from p2pkv.core.records import EventState, Operation, Selection
from p2pkv.errors import ErrorCode, Failure
from tests.core.builders import IDENTITY, at, event_id, event_record, prompt
from tests.core.cluster import Cluster
from tests.core.solo import ME, Solo

DONE, FAILED, RUNNING, CANCELLED = EventState.DONE, EventState.FAILED, EventState.RUNNING, EventState.CANCELLED
TOKENS = prompt(12)


def four() -> Cluster:
    """`a` holds a prompt that `c` will move to `b`; `d` has nothing to do with it."""
    cluster = Cluster("a", "b", "c", "d")
    cluster.store("a", TOKENS)
    return cluster


# --- in a cluster ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_any_node_answers_for_an_event_that_has_ended(name: str) -> None:
    cluster = four()
    name_of_event = cluster.begin("a", "b", TOKENS, by="c")
    assert cluster.event_of(cluster.ask_event(name, name_of_event)) == cluster.event("a", name_of_event)


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_any_node_answers_for_an_event_that_goes_on(name: str) -> None:
    cluster = four()
    cluster.hold(FetchChunks)
    name_of_event = cluster.begin("a", "b", TOKENS, by="c")
    assert cluster.event_of(cluster.ask_event(name, name_of_event)) == cluster.event("a", name_of_event)
    assert cluster.event("a", name_of_event).state is RUNNING


def test_a_source_that_is_dead_is_spoken_for_by_the_target() -> None:
    cluster = four()
    cluster.hold(Take)
    name_of_event = cluster.begin("a", "b", TOKENS, by="c")
    cluster.crash("a")
    cluster.run(4.0)
    cluster.crash("c")
    cluster.run(4.0)
    assert cluster.event_of(cluster.ask_event("d", name_of_event)).state is DONE


def test_an_event_is_kept_for_an_hour_everywhere_and_then_forgotten() -> None:
    cluster = Cluster("a", "b", "c")
    cluster.store("a", TOKENS)
    name_of_event = cluster.begin("a", "b", TOKENS)
    cluster.ask_event("c", name_of_event)
    cluster.run(KEPT_S - 10.0)
    for name in "abc":
        assert cluster.event(name, name_of_event).state is DONE
    cluster.run(20.0)
    for name in "abc":
        assert cluster.nodes[name].machine.event(name_of_event) is None
    assert cluster.failure_of(cluster.ask_event("c", name_of_event)) is ErrorCode.UNKNOWN_EVENT


def test_events_are_listed_newest_first() -> None:
    cluster = four()
    first = cluster.begin("a", "b", TOKENS)
    cluster.run(1.0)
    second = cluster.begin("b", "a", TOKENS)
    assert [event.event_id for event in cluster.nodes["a"].machine.events()] == [second, first]


@pytest.mark.parametrize(
    "nonsense", ["nonsense", "move~a~b~c~0", "move~..~b~c~0123456789abcdef", "copy~a~b~c~0123456789abcdef"]
)
def test_what_is_no_event_id_is_unknown(nonsense: str) -> None:
    cluster = Cluster("a", "b")
    assert cluster.failure_of(cluster.ask_event("a", nonsense)) is ErrorCode.UNKNOWN_EVENT
    assert cluster.sent("a", EventRequest) == []


def test_an_event_that_nobody_knows_is_unknown() -> None:
    cluster = four()
    for name in "abcd":
        assert cluster.failure_of(cluster.ask_event(name, event_id("a", "b", "c"))) is ErrorCode.UNKNOWN_EVENT
        assert cluster.failure_of(cluster.ask_event(name, event_id("x", "y", "z"))) is ErrorCode.UNKNOWN_EVENT


def test_a_cancel_of_what_the_source_doesnt_know_is_unknown() -> None:
    cluster = four()
    assert cluster.failure_of(cluster.cancel("d", event_id("a", "b", "c"))) is ErrorCode.UNKNOWN_EVENT


def test_who_doesnt_answer_in_time_isnt_waited_for() -> None:
    cluster = four()
    cluster.hold(FetchChunks)
    name_of_event = cluster.begin("a", "b", TOKENS, by="c")
    cluster.lose(EventReport)
    request = cluster.ask_event("c", name_of_event)
    cluster.run(ASK_S - 0.1)
    assert request not in cluster.answers
    cluster.run(0.2)
    assert cluster.event_of(request).event_id == name_of_event


def test_two_who_ask_at_once_cost_one_question() -> None:
    cluster = four()
    cluster.hold(FetchChunks)
    name_of_event = cluster.begin("a", "b", TOKENS, by="c")
    cluster.hold(EventReport)
    requests = [cluster.ask_event("d", name_of_event) for _ in range(3)]
    assert len(cluster.sent("d", EventRequest)) == 3, "one for each party"
    cluster.release()
    assert {cluster.event_of(request).event_id for request in requests} == {name_of_event}


# --- a coordinator among liars --------------------------------------------------------------------------------------------


class Coordinator(Solo):
    """A machine that is asked for a move from `a` to `b`, both of which the test plays."""

    def __init__(self) -> None:
        super().__init__()
        self.source = self.join("a")
        self.target = self.join("b")
        self.stranger = self.join("z")

    def ask_for_move(self) -> tuple[int, EventId]:
        request = self.ask(
            lambda each: MoveRequested(each, at("a"), at("b"), Operation.MOVE, Selection.TOKENS, TOKENS, IDENTITY, None)
        )
        return request, self.heard(self.source, PlanRequest)[-1].event_id

    def plan(self) -> EventId:
        """A move that the source has planned."""
        _, name = self.ask_for_move()
        self.say(self.source, PlanAnswer(name, event_record(name), None))
        return name

    def report(self, link: int, name: EventId, state: EventState) -> None:
        self.say(link, EventReport(name, event_record(name, state)))


def test_only_the_source_answers_for_a_plan() -> None:
    machine = Coordinator()
    request, name = machine.ask_for_move()
    machine.say(machine.target, PlanAnswer(name, event_record(name), None))
    machine.say(machine.source, PlanAnswer("nonsense", event_record(name), None))
    assert machine.answer(request) is None
    machine.say(machine.source, PlanAnswer(name, event_record(name), None))
    assert machine.failure_or_none(request) is None


@pytest.mark.parametrize("event", [None, event_record(event_id("a", "b", ME))])
def test_a_plan_without_its_event_is_a_failure(event: None) -> None:
    machine = Coordinator()
    request, name = machine.ask_for_move()
    machine.say(machine.source, PlanAnswer(name, event, None))
    assert machine.failure(request).code is ErrorCode.PROTOCOL_ERROR
    assert machine.machine.events() == ()


def test_a_plans_failure_is_the_users() -> None:
    machine = Coordinator()
    request, name = machine.ask_for_move()
    failure = Failure(ErrorCode.UNKNOWN_LOCATION, "no such place")
    machine.say(machine.source, PlanAnswer(name, None, failure))
    assert machine.failure(request) == failure
    assert machine.say(machine.source, PlanAnswer(name, None, failure)) == []


def test_a_plan_that_is_answered_twice_isnt_cancelled() -> None:
    machine = Coordinator()
    name = machine.plan()
    machine.say(machine.source, PlanAnswer(name, event_record(name), None))
    assert machine.heard(machine.source, CancelRequest) == []


def test_a_plan_that_nobody_waits_for_is_cancelled() -> None:
    machine = Coordinator()
    name = event_id("a", "b", ME)
    machine.say(machine.source, PlanAnswer(name, event_record(name), None))
    assert machine.heard(machine.source, CancelRequest) == [CancelRequest(name)]


def test_while_the_source_lives_only_its_word_counts() -> None:
    machine = Coordinator()
    name = machine.plan()
    machine.report(machine.target, name, DONE)
    machine.report(machine.stranger, name, FAILED)
    machine.say(machine.source, EventReport(name, event_record(event_id("a", "b", ME), DONE)))
    machine.report(machine.source, event_id("a", "z", "b"), DONE)
    machine.say(machine.source, EventReport("nonsense", None))
    assert [event.state for event in machine.machine.events()] == [RUNNING]
    machine.report(machine.source, name, DONE)
    assert [event.state for event in machine.machine.events()] == [DONE]


def test_every_change_is_told_once() -> None:
    machine = Coordinator()
    name = machine.plan()
    for state in (RUNNING, DONE, DONE, RUNNING):
        machine.report(machine.source, name, state)
    assert [change.event.state for change in machine.effects(EventChanged)] == [RUNNING, DONE]


def test_an_event_is_asked_for_each_second_until_it_has_ended() -> None:
    machine = Coordinator()
    name = machine.plan()
    machine.run(3.5)
    assert machine.heard(machine.source, EventRequest) == [EventRequest(name)] * 3
    machine.report(machine.source, name, DONE)
    machine.run(1.0)
    assert len(machine.heard(machine.source, EventRequest)) == 3


def test_there_is_a_limit_to_plans_that_are_waited_for() -> None:
    machine = Coordinator()
    for _ in range(WAITING_MAX):
        machine.ask_for_move()
        machine.done.clear()
    request = machine.ask(
        lambda each: MoveRequested(each, at("a"), at("b"), Operation.MOVE, Selection.TOKENS, TOKENS, IDENTITY, None)
    )
    assert machine.failure(request).code is ErrorCode.INSTANCE_UNREACHABLE
    machine.run(PLAN_S)
    assert len([answer for answer in machine.done if hasattr(answer, "failure")]) == WAITING_MAX + 1


def test_there_is_a_limit_to_questions() -> None:
    machine = Coordinator()
    for _ in range(WAITING_MAX):
        machine.ask(lambda each: EventAsked(each, event_id("a", "b", "z")))
    machine.done.clear()
    request = machine.ask(lambda each: EventAsked(each, event_id("a", "b", "z")))
    assert machine.failure(request).code is ErrorCode.INSTANCE_UNREACHABLE


def test_an_event_that_was_cancelled_stays_so() -> None:
    machine = Coordinator()
    name = machine.plan()
    machine.report(machine.source, name, CANCELLED)
    machine.say(machine.source, PlanAnswer(name, event_record(name), None))
    assert [event.state for event in machine.machine.events()] == [CANCELLED]


def test_a_node_that_leaves_answers_who_still_waits() -> None:
    cluster = Cluster("a", "b")
    cluster.lose(PlanRequest)
    request = cluster.start("b", "a", prompt(4), by="a")
    cluster.leave("a")
    cluster.run(2.0)
    assert cluster.nodes["a"].stop is not None
    failure = cluster.answers[request].failure
    assert failure is not None
    assert failure.code is ErrorCode.LEAVING


def test_a_bystander_answers_for_a_running_event_and_keeps_nothing_of_it() -> None:
    cluster = Cluster("a", "b", "c", "d")
    cluster.store("a", prompt(12))
    cluster.hold(FetchChunks)
    name = cluster.begin("a", "b", prompt(12), by="c")
    request = cluster.ask_event("d", name)
    cluster.release()
    cluster.run(3.0)
    assert cluster.answers[request].failure is None
    assert cluster.nodes["d"].machine.events() == ()


def test_a_source_that_restarts_at_once_hides_the_end_from_nobody() -> None:
    cluster = Cluster("a", "b", "c", "d")
    cluster.store("a", prompt(12))
    cluster.lose(Take)
    name = cluster.begin("a", "b", prompt(12), by="c")
    cluster.crash("a")
    cluster.boot("a")
    cluster.run(5.0)
    assert cluster.event("b", name).state is EventState.DONE
    assert cluster.event("c", name).state is EventState.DONE
    for bystander in "ad":
        request = cluster.ask_event(bystander, name)
        cluster.run(3.0)
        assert cluster.answers[request].failure is None, bystander
