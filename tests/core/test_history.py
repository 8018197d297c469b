"""Events as a node remembers them (protocol rules E1 and E8)."""

from dataclasses import replace

from p2pkv.core.history import EVENTS_MAX, KEPT_S, History
from p2pkv.core.records import EventState
from tests.core.builders import event_id, event_record

RUNNING, DONE, FAILED = EventState.RUNNING, EventState.DONE, EventState.FAILED


def test_the_newest_come_first() -> None:
    history = History()
    for started_at in (2.0, 3.0, 1.0):
        history.put(event_record(event_id("a", "b", "a"), started_at=started_at), now=0.0)
    assert [record.started_at for record in history.newest_first()] == [3.0, 2.0, 1.0]


def test_what_is_said_twice_is_no_news() -> None:
    history, record = History(), event_record(event_id("a", "b", "a"))
    assert history.put(record, now=0.0)
    assert not history.put(record, now=1.0)
    assert history.put(replace(record, nbytes=1), now=1.0)
    assert history.get(record.event_id) == replace(record, nbytes=1)


def test_nothing_reopens_what_has_ended() -> None:
    history, record = History(), event_record(event_id("a", "b", "a"), DONE)
    history.put(record, now=0.0)
    assert not history.put(replace(record, state=RUNNING), now=1.0)
    assert history.get(record.event_id) == record


def test_an_end_may_be_corrected_but_not_kept_longer_for_it() -> None:
    history, record = History(), event_record(event_id("a", "b", "a"), FAILED)
    history.put(record, now=0.0)
    assert history.put(replace(record, state=DONE), now=10.0)
    assert history.forgets_at() == KEPT_S


def test_an_event_is_kept_for_an_hour_after_its_end() -> None:
    history, record = History(), event_record(event_id("a", "b", "a"))
    history.put(record, now=0.0)
    assert history.forgets_at() == float("inf")
    history.put(replace(record, state=DONE), now=100.0)
    history.forget_old(100.0 + KEPT_S - 1)
    assert history.get(record.event_id) is not None
    history.forget_old(100.0 + KEPT_S)
    assert history.get(record.event_id) is None
    assert history.newest_first() == ()


def test_when_there_are_too_many_the_oldest_ended_goes_early() -> None:
    history = History()
    running = event_record(event_id("a", "b", "a"))
    ended = [event_record(event_id("a", "b", "a"), DONE) for _ in range(EVENTS_MAX)]
    for record in (running, *ended):
        assert history.put(record, now=0.0)
    assert history.get(running.event_id) == running
    assert history.get(ended[0].event_id) is None
    assert len(history.newest_first()) == EVENTS_MAX


def test_when_too_many_go_on_no_more_are_remembered() -> None:
    history = History()
    first = event_record(event_id("a", "b", "a"))
    history.put(first, now=0.0)
    for _ in range(EVENTS_MAX - 1):
        history.put(event_record(event_id("a", "b", "a")), now=0.0)
    assert not history.put(event_record(event_id("a", "b", "a")), now=0.0)
    assert history.put(replace(first, state=DONE), now=0.0), "those that are known go on"
