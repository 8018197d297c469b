"""The search: every state that a kind of run can come to, each once, the nearest first.

As it goes in breadth, the schedule that it tells of a broken promise is a shortest one.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter

from sims.handover.graph import Bounds, Choice, Graph, State
from sims.handover.kinds import KINDS
from sims.handover.schedule import Schedule, ScheduleError, schedule_of, transcript
from sims.handover.tables import BROKEN
from sims.mutants import MUTANTS

STATES_MAX = 20_000_000
"""About 6 GB. A kind that has more needs smaller bounds."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to.

    Attributes:
        kind: What was searched.
        state_count: States that there are.
        transition_count: Ways from one to another.
        depth: The longest way from the start that is a shortest one to where it leads.
        end_count: States in which all has ended.
        step_count: What real machines were asked: each of their own states, with each thing that happened there.
        seconds: How long it took.
        schedule: What broke something; None when nothing did.
        story: The same for people.
    """

    kind: str
    state_count: int
    transition_count: int
    depth: int
    end_count: int
    step_count: int
    seconds: float
    schedule: Schedule | None = None
    story: tuple[str, ...] = ()


def search(kind: str, bounds: Bounds, mutant: str | None = None) -> Found:
    """Go through all states of a kind of run, until a promise is broken."""
    with KINDS[kind].as_it_runs(), MUTANTS[mutant].applied() if mutant else nullcontext():
        return _Search(kind, bounds).run()


class _Search:
    """One search; `came_from` has, for each state that is known, one that it was first come to from."""

    def __init__(self, kind: str, bounds: Bounds) -> None:
        self.kind = kind
        self.graph = Graph(KINDS[kind], bounds)
        self.came_from: dict[State, State | None] = {self.graph.start: None}
        self.transition_count = self.end_count = self.depth = 0
        self._began_at = perf_counter()

    def run(self) -> Found:
        """Search."""
        graph, came_from = self.graph, self.came_from
        level = [graph.start]
        while level:
            following: list[State] = []
            for state in level:
                if graph.is_over(state):
                    self.end_count += 1
                    try:
                        graph.check_end(state)
                    except BROKEN:
                        return self._broken(self._choices_to(state))
                for choice in graph.choices(state):
                    self.transition_count += 1
                    try:
                        after = graph.after(state, choice)
                    except BROKEN:
                        return self._broken([*self._choices_to(state), choice])
                    if after not in came_from:
                        came_from[after] = state
                        following.append(after)
            if len(came_from) > STATES_MAX:
                raise ScheduleError(f"{self.kind} has more than {STATES_MAX:,} states within these bounds; choose smaller ones")
            level = following
            self.depth += bool(level)
        return self._found()

    def _choices_to(self, state: State) -> list[Choice]:
        """A shortest way to a state."""
        choices: list[Choice] = []
        while (before := self.came_from[state]) is not None:
            choices.append(next(each for each in self.graph.choices(before) if self._leads_to(before, each, state)))
            state = before
        return choices[::-1]

    def _leads_to(self, state: State, choice: Choice, other: State) -> bool:
        try:
            return self.graph.after(state, choice) == other
        except BROKEN:
            return False

    def _broken(self, choices: list[Choice]) -> Found:
        schedule = schedule_of(self.graph, self.kind, choices)
        return self._found(schedule, tuple(transcript(self.graph, choices)))

    def _found(self, schedule: Schedule | None = None, story: tuple[str, ...] = ()) -> Found:
        return Found(
            kind=self.kind,
            state_count=len(self.came_from),
            transition_count=self.transition_count,
            depth=self.depth,
            end_count=self.end_count,
            step_count=self.graph.tables.step_count,
            seconds=perf_counter() - self._began_at,
            schedule=schedule,
            story=story,
        )
