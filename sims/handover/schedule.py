"""One way through the graph: as text that replays it, and as a story for people."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from traceback import extract_tb

from p2pkv.core.effects import Effect, SendMessage
from sims.handover.ends import Heard
from sims.handover.graph import EARLY_S, Bounds, Choice, Graph, Way
from sims.handover.kinds import CHUNKS, KINDS, NAMES, Kind
from sims.handover.tables import BROKEN, Fetch
from sims.ledger import PromiseBrokenError
from sims.mutants import MUTANTS
from sims.story import brief


class ScheduleError(Exception):
    """A search or a replay can't be made as it was asked for; the text says why."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """What was chosen in a run of a kind within bounds: an index into the choices that there were, each time.

    As text it is `KIND:BOUNDS:INDEXES`, the last two joined by dots.
    """

    kind: str
    bounds: Bounds
    indexes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind}:{'.'.join(map(str, self.bounds))}:{'.'.join(map(str, self.indexes))}"

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """The schedule that `text` stands for.

        Raises:
            ScheduleError: It stands for none.
        """
        try:
            kind, bounds, indexes = text.split(":")
            parsed = cls(kind, Bounds(*_numbers(bounds)), _numbers(indexes))
        except (TypeError, ValueError) as error:
            raise ScheduleError(f"{text!r} isn't a schedule, which looks like crossing:1.1.1.1:0.3.2") from error
        if kind not in KINDS:
            raise ScheduleError(f"there is no kind {kind!r}; there are {', '.join(KINDS)}")
        return parsed


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(".")) if text else ()
    if any(number < 0 for number in numbers):
        raise ValueError(text)
    return numbers


def schedule_of(graph: Graph, kind: str, choices: Sequence[Choice]) -> Schedule:
    """The schedule of `choices` from the start."""
    state, indexes = graph.start, []
    for choice in choices:
        indexes.append(graph.in_order(graph.choices(state)).index(choice))
        try:
            state = graph.after(state, choice)
        except BROKEN:
            break
    return Schedule(kind, graph.start.bounds, tuple(indexes))


def replay(schedule: Schedule, mutant: str | None = None) -> list[str]:
    """The story of a schedule, and of what it breaks, as it is run anew.

    Raises:
        ScheduleError: It has no such choice.
    """
    kind = KINDS[schedule.kind]
    with kind.as_it_runs(), MUTANTS[mutant].applied() if mutant else nullcontext():
        graph = Graph(kind, schedule.bounds)
        state, choices = graph.start, []
        for place, index in enumerate(schedule.indexes, 1):
            possible = graph.in_order(graph.choices(state))
            if index >= len(possible):
                raise ScheduleError(f"choice {place} is {index}, and there are only {len(possible)}")
            choices.append(possible[index])
            try:
                state = graph.after(state, choices[-1])
            except BROKEN:
                break
        return list(transcript(graph, choices))


def transcript(graph: Graph, choices: Sequence[Choice]) -> Iterator[str]:
    """A run, line by line: what happened, what was ordered then, and at last what it broke."""
    names = _Names(graph.kind)
    yield from names.beginning()
    state = graph.start
    for number, choice in enumerate(choices, 1):
        yield f"{number:>3}. {names.applied(_headline(graph, choice))}"
        for index, due in graph.due(state, choice):
            for effect in graph.tables.step(state.ends[index], due).effects:
                yield f"       {NAMES[index]} {names.applied(_ordered(effect))}"
        try:
            state = graph.after(state, choice)
        except BROKEN as failure:
            yield f"BROKEN: {names.applied(_why(failure))}"
            return
    if not graph.is_over(state):
        return
    try:
        graph.check_end(state)
    except BROKEN as failure:
        yield f"BROKEN, as all has ended: {names.applied(_why(failure))}"
    else:
        yield "all has ended, and every promise was kept"


class _Names:
    """Short names for what a kind is about."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._short = {event_id: f"move{index}" for index, event_id in enumerate(kind.event_ids(), 1)}
        for index, chunk in enumerate(CHUNKS, 1):
            self._short |= {brief(chunk.key): f"chunk{index}", chunk.key.hex(): f"chunk{index}"}

    def applied(self, text: str) -> str:
        """`text` with them."""
        for name, short in self._short.items():
            text = text.replace(name, short)
        return text

    def beginning(self) -> Iterator[str]:
        """What there is at first."""
        yield f"chunk1 and chunk2, which hangs on it, are held by {', '.join(self._kind.holders)}"
        for index, wish in enumerate(self._kind.wishes, 1):
            chunks = "chunk1" if wish.chunk_count == 1 else "both"
            yield f"move{index}: {wish.operation} {chunks} from {wish.source} to {wish.target}, asked for at {wish.coordinator}"


def _headline(graph: Graph, choice: Choice) -> str:
    match choice.way:
        case Way.CRASHES:
            return f"{NAMES[choice.number]} CRASHES"
        case Way.IS_EARLY:
            return f"{NAMES[choice.number]} has waited {EARLY_S[choice.extent]:g} s, TOO SOON"
        case Way.TIME:
            return "nothing else is left to happen: time passes, until something is due"
    item = graph.tables.items[choice.number]
    if isinstance(item, Fetch):
        brings = "brings" if choice.way is Way.HAPPENS else f"BREAKS after {choice.extent} of"
        return f"{item.name} <- {item.order.source} a lane {brings} {brief(item.order.chunks)}"
    how = {Way.HAPPENS: "", Way.REPEATS: " (and COMES AGAIN)", Way.IS_LOST: " IS LOST"}[choice.way]
    if isinstance(item.happening, Heard):
        return f"{item.name} <- {item.sender} {brief(item.happening.message)}{how}"
    return f"{item.name} {brief(item.happening)}"


def _ordered(effect: Effect) -> str:
    if isinstance(effect, SendMessage):
        return f"-> {NAMES[effect.link]} {brief(effect.message)}"
    return brief(effect)


def _why(failure: BaseException) -> str:
    if isinstance(failure, PromiseBrokenError):
        return str(failure)
    return f"{type(failure).__name__}: {str(failure) or extract_tb(failure.__traceback__)[-1].line}"
