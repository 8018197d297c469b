"""The exhaustive search of the hand-over: it finds nothing in the core, and finds what is put there."""

import pytest
from typer.testing import CliRunner

from sims.handover.command import DEFAULT_BOUNDS, app
from sims.handover.ends import End, brought_back, digest, kept
from sims.handover.graph import Bounds, Graph, Way
from sims.handover.kinds import CHUNKS, KINDS, NAMES
from sims.handover.schedule import Schedule, ScheduleError, replay
from sims.handover.search import search
from sims.mutants import MUTANTS

NOTHING_WRONG = Bounds(losses=0, repeats=0, crashes=0, early=0)
ONE_CRASH = Bounds(losses=0, repeats=0, crashes=1, early=0)
ALL_BUT_EARLY, EARLY = DEFAULT_BOUNDS
SEARCHED = {name: mutant for name, mutant in MUTANTS.items() if mutant.kind is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_every_order_keeps_every_promise(kind: str) -> None:
    found = search(kind, NOTHING_WRONG)
    assert found.story == ()
    assert found.end_count
    assert found.transition_count > found.state_count > 30


@pytest.mark.parametrize("kind", ["crossing", "chain", "storing"])
def test_a_crash_anywhere_breaks_no_promise(kind: str) -> None:
    found = search(kind, ONE_CRASH)
    assert found.story == ()
    assert found.end_count > search(kind, NOTHING_WRONG).end_count


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_a_repeat_and_a_crash_anywhere_break_no_promise(kind: str) -> None:
    assert search(kind, ALL_BUT_EARLY).story == ()


@pytest.mark.long
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("by_ones", "far")])
def test_a_time_that_is_over_too_soon_breaks_no_promise(kind: str) -> None:
    assert search(kind, EARLY).story == ()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if SEARCHED[name].early else ()) for name in SEARCHED]
)
def test_the_mutant_is_caught_and_its_schedule_replays(name: str) -> None:
    mutant = SEARCHED[name]
    assert mutant.kind is not None
    found = search(mutant.kind, EARLY if mutant.early else ALL_BUT_EARLY, name)
    assert found.schedule is not None
    assert found.story[-1].startswith("BROKEN")
    again = Schedule.parse(str(found.schedule))
    assert again == found.schedule
    assert replay(again, name) == list(found.story)


def test_what_a_mutant_breaks_the_core_does_not() -> None:
    found = search("chain", NOTHING_WRONG, "frees_at_once")
    assert found.schedule is not None
    told = replay(found.schedule)
    assert not any("BROKEN" in line for line in told)
    assert told[:-1] == list(found.story)[: len(told) - 1]


def test_a_schedule_is_a_shortest_one() -> None:
    found = search("chain", NOTHING_WRONG, "frees_at_once")
    assert found.schedule is not None
    # the move is asked for, offered, fetched in two steps, and reported: then the source hands over
    assert len(found.schedule.indexes) == 5


@pytest.mark.parametrize("text", ["", "chain", "chain:1.1.1:0", "chain:1.1.1.1:x", "chained:1.1.1.1:0", "chain:1.1.1.1:0.-1"])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError):
        Schedule.parse(text)


def test_a_choice_that_there_isnt_is_refused() -> None:
    with pytest.raises(ScheduleError, match="choice 2 is 99"):
        replay(Schedule("chain", NOTHING_WRONG, (0, 99)))


def test_an_end_is_kept_as_it_is() -> None:
    end = End("a", NAMES, CHUNKS)
    plain = digest(end)
    for _, happening in KINDS["chain"].asked()[:1]:
        end.happen(happening)
    assert digest(end) != plain
    again = brought_back(kept(end))
    assert digest(again) == digest(end)
    assert again.due_s() == end.due_s() > 0


def test_nothing_goes_wrong_more_often_than_it_may() -> None:
    graph = Graph(KINDS["twice"], Bounds(losses=1, repeats=0, crashes=0, early=0))
    state = graph.start
    lost = 0
    while choices := graph.choices(state):
        worst = next((each for each in choices if each.way is Way.IS_LOST), choices[0])
        assert {each.way for each in choices} <= {Way.HAPPENS, Way.IS_LOST, Way.TIME}
        lost += worst.way is Way.IS_LOST
        state = graph.after(state, worst)
    assert lost == 1
    assert graph.is_over(state)
    graph.check_end(state)


# --- as its users meet it -------------------------------------------------------------------------------------------------


def test_the_command_searches_and_says_how_much_there_was() -> None:
    ran = CliRunner().invoke(app, ["--exhaustive", "--kind", "still", "--losses", "0", "--processes", "1"])
    assert ran.exit_code == 0, ran.output
    assert "every promise kept" in ran.stdout


def test_the_command_tells_of_a_mutant_and_how_to_replay_it() -> None:
    ran = CliRunner().invoke(app, ["--exhaustive", "--kind", "chain", "--mutant", "frees_at_once", "--processes", "1"])
    assert ran.exit_code == 1
    assert "a -> b Take(event_id=move1" in ran.stdout
    schedule = ran.stdout.split("--replay ")[1].split()[0]
    told = CliRunner().invoke(app, ["--replay", schedule, "--mutant", "frees_at_once"])
    assert told.exit_code == 1
    assert "BROKEN: T6: a frees chunk2" in told.stdout


def test_the_command_lists_its_kinds() -> None:
    listed = CliRunner().invoke(app, [])
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in KINDS)


@pytest.mark.parametrize(
    "arguments", [["--exhaustive", "--kind", "none"], ["--exhaustive", "--mutant", "none"], ["--replay", "none"]]
)
def test_what_the_command_doesnt_know_is_wrong_usage(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2
