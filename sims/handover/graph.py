"""All that can happen to a few ends, one thing at a time: the graph that the search walks.

A state is three ends, what is on its way to them, what the witness has seen, and how often something may still go wrong.

What makes it small enough, and what that leaves out:
    - States that are alike are one, however they came about (`ends.digest`); and a machine is asked once for each of its own
      states and each thing that can happen there (`tables`). That leaves out nothing.
    - A message takes no time, so clocks stand still while anything is on its way; when nothing is, the next thing that is due
      anywhere happens. What is sent again while it is on its way already is a repeat, and a deadline that passes then is one
      that is too soon: both are among the things that may go wrong, and counted.
    - A crash is the end of an instance; it doesn't come back, nor is anyone thought dead who isn't, and there is room enough.
    - Who takes no part in any move, doesn't crash: nobody would notice.
"""

from collections.abc import Sequence
from enum import Enum, auto
from math import inf
from typing import NamedTuple

from p2pkv.core.events import FetchEnded
from p2pkv.core.ids import InstanceId
from p2pkv.core.keys import ChunkKey
from p2pkv.core.moves.handover import TAKE_ANSWER_S
from p2pkv.core.moves.target import DEADLINE_GRACE_S
from p2pkv.errors import ErrorCode, Failure
from sims.handover.ends import LEASE_S, MOVE_DEADLINE_S, End, PeerLost, TimeOver, TimePassed
from sims.handover.kinds import CHUNKS, NAMES, Kind
from sims.handover.tables import Due, Fetch, Tables
from sims.handover.witness import MoveSeen, Seen, Witness
from sims.ledger import PromiseBrokenError

DOWN = -1
"""In place of an end that has crashed."""
BROKE = Failure(ErrorCode.TRANSFER_FAILED, "The lane closed.")
EARLY_S = (TAKE_ANSWER_S, LEASE_S, MOVE_DEADLINE_S + DEADLINE_GRACE_S)
"""By how much a time may be over too soon: so that a Take's answer, the other end's word, the move itself is given up. That a
message is sent again too soon is a repeat."""
_INDEX = {name: index for index, name in enumerate(NAMES)}


class Bounds(NamedTuple):
    """How often something may go wrong in one run.

    Attributes:
        losses: A message, or what a lane was to bring, is lost.
        repeats: A message comes twice.
        crashes: An instance ends without a word.
        early: At one instance a time is over while others still have things to do.
    """

    losses: int
    repeats: int
    crashes: int
    early: int


class State(NamedTuple):
    """One state of it all: ends by number, what is on its way, in order of numbers, what was seen, and what may go wrong."""

    ends: tuple[int, ...]
    items: tuple[int, ...]
    seen: int
    bounds: Bounds


class Way(Enum):
    """How something goes on."""

    HAPPENS = auto()
    REPEATS = auto()
    IS_LOST = auto()
    CRASHES = auto()
    IS_EARLY = auto()
    TIME = auto()


class Choice(NamedTuple):
    """One thing that can happen next.

    Attributes:
        way: What kind of thing.
        number: Of the item, or the index of the instance, that it is about.
        extent: Chunks that a lane brings before it breaks, or the index of the time that is over.
    """

    way: Way
    number: int = 0
    extent: int = 0


class Graph:
    """All states of one kind of run within its bounds, made as they are asked for."""

    def __init__(self, kind: Kind, bounds: Bounds) -> None:
        self.kind = kind
        self.tables = Tables()
        self._parties = [index for index, name in enumerate(NAMES) if any(name in wish.parties for wish in kind.wishes)]
        self._choices_about: dict[tuple[int, Bounds], tuple[Choice, ...]] = {}
        self._crashes_of = {index: Choice(Way.CRASHES, index) for index in self._parties}
        held = {name: CHUNKS if name in kind.holders else () for name in NAMES}
        ends = tuple(self.tables.number_of(End(name, NAMES, held[name])) for name in NAMES)
        owned = tuple((name, frozenset(chunk.key for chunk in held[name])) for name in NAMES)
        seen = self.tables.seens.of(Seen(owned, tuple(MoveSeen(event_id) for event_id in kind.event_ids())))
        items = tuple(sorted(self.tables.items.of(Due(name, happening)) for name, happening in kind.asked()))
        self.start = State(ends, items, seen, bounds)

    # --- choices ----------------------------------------------------------------------------------------------------------

    def choices(self, state: State) -> list[Choice]:
        """All that can happen next; nothing when all has ended."""
        bounds = state.bounds
        choices: list[Choice] = []
        before = -1
        for number in state.items:
            if number != before:  # of two that are alike either will do
                choices += self._about(number, bounds)
            before = number
        if bounds.crashes:
            choices += [self._crashes_of[index] for index in self._parties if state.ends[index] != DOWN]
        if not state.items:
            return choices if self.is_over(state) else [*choices, Choice(Way.TIME)]
        if bounds.early:
            for index in self._parties:
                due_s = inf if state.ends[index] == DOWN else self.tables.due_s[state.ends[index]]
                choices += [Choice(Way.IS_EARLY, index, extent) for extent, seconds in enumerate(EARLY_S) if due_s <= seconds]
        return choices

    def _about(self, number: int, bounds: Bounds) -> tuple[Choice, ...]:
        """What can become of an item."""
        known = self._choices_about.get((number, bounds))
        if known is None:
            item, choices = self.tables.items[number], [Choice(Way.HAPPENS, number)]
            if isinstance(item, Fetch) and bounds.losses:
                choices += [Choice(Way.IS_LOST, number, count) for count in range(len(item.order.chunks))]
            elif isinstance(item, Due) and item.sender is not None:
                choices += [Choice(Way.IS_LOST, number)] if bounds.losses else []
                choices += [Choice(Way.REPEATS, number)] if bounds.repeats else []
            known = self._choices_about[number, bounds] = tuple(choices)
        return known

    def is_over(self, state: State) -> bool:
        """Whether nothing will happen any more, unless something goes wrong."""
        return not state.items and all(end == DOWN or self.tables.due_s[end] == inf for end in state.ends)

    def in_order(self, choices: Sequence[Choice]) -> list[Choice]:
        """The same in every run, whatever else was searched before: numbers differ, what they stand for doesn't."""
        is_item = (Way.HAPPENS, Way.REPEATS, Way.IS_LOST)

        def order(choice: Choice) -> tuple[int, str, int]:
            about = repr(self.tables.items[choice.number]) if choice.way in is_item else str(choice.number)
            return choice.way.value, about, choice.extent

        return sorted(choices, key=order)

    def after(self, state: State, choice: Choice) -> State:
        """The state after a choice.

        Raises:
            AssertionError: A promise or an invariant is broken by it.
            KeyError: A machine has lost track of a move.
        """
        ends, items, seen, bounds = state
        way, number = choice.way, choice.number
        if way is Way.HAPPENS:
            return self._happens(State(ends, _without(items, number), seen, bounds), number)
        if way is Way.REPEATS:
            return self._happens(State(ends, items, seen, bounds._replace(repeats=bounds.repeats - 1)), number)
        if way is Way.IS_LOST:
            less = State(ends, _without(items, number), seen, bounds._replace(losses=bounds.losses - 1))
            item = self.tables.items[number]
            return self._carries(less, item, choice.extent) if isinstance(item, Fetch) else less
        if way is Way.CRASHES:
            return self._crashes(State(ends, items, seen, bounds._replace(crashes=bounds.crashes - 1)), number)
        if way is Way.IS_EARLY:
            state = State(ends, items, seen, bounds._replace(early=bounds.early - 1))
        for index, due in self.due(state, choice):
            state = self._step(state, index, due)
        return state

    def _step(self, state: State, index: int, due: int) -> State:
        """Something happens to one instance."""
        step = self.tables.step(state.ends[index], due)
        seen = self.tables.seen_after(state.seen, step)
        ends = (*state.ends[:index], step.end, *state.ends[index + 1 :])
        items = state.items
        if step.items:
            arriving = [number for number in step.items if ends[_INDEX[self.tables.items[number].name]] != DOWN]
            items = tuple(sorted((*items, *arriving)))
        return State(ends, items, seen, state.bounds)

    def _happens(self, state: State, number: int) -> State:
        """What was on its way happens."""
        item = self.tables.items[number]
        if isinstance(item, Fetch):
            return self._carries(state, item, len(item.order.chunks))
        if isinstance(item.happening, PeerLost):  # and with it the link, and what is still on that
            link = (item.name, item.happening.instance)
            items = tuple(each for each in state.items if not self._is_on(each, link))
            state = State(state.ends, items, state.seen, state.bounds)
        return self._step(state, _INDEX[item.name], number)

    def _is_on(self, number: int, link: tuple[InstanceId, InstanceId]) -> bool:
        item = self.tables.items[number]
        return isinstance(item, Due) and (item.name, item.sender) == link

    def _carries(self, state: State, fetch: Fetch, most: int) -> State:
        """A lane brings up to `most` chunks, as far as its source grants and has them."""
        order, seen = fetch.order, self.tables.seens[state.seen]
        source = state.ends[_INDEX[order.source]]
        is_open = source != DOWN and (fetch.name, order.event_id) not in seen.cancelled
        granted = self.tables.granted(source, order.event_id) if is_open else ()
        owned = dict(seen.owned)[order.source]
        brought: list[ChunkKey] = []
        for chunk in order.chunks[:most]:
            if chunk.key not in granted or chunk.key not in owned:
                break
            brought.append(chunk.key)
        failure = None if len(brought) == len(order.chunks) else BROKE
        witness = Witness(seen)
        witness.carried(fetch.name, order.event_id, brought)
        ended = self.tables.items.of(Due(fetch.name, FetchEnded(order.event_id, tuple(brought), failure)))
        return State(state.ends, tuple(sorted((*state.items, ended))), self.tables.seens.of(witness.seen()), state.bounds)

    def _crashes(self, state: State, index: int) -> State:
        """What comes to it is lost; what it has sent arrives until its peers know."""
        name, ends = NAMES[index], (*state.ends[:index], DOWN, *state.ends[index + 1 :])
        items = [number for number in state.items if self.tables.items[number].name != name]
        items += [self.tables.items.of(Due(NAMES[each], PeerLost(name))) for each in self._parties if ends[each] != DOWN]
        return State(ends, tuple(sorted(items)), self.tables.seen_after_crash(state.seen, name), state.bounds)

    def due(self, state: State, choice: Choice) -> list[tuple[int, int]]:
        """What a choice lets happen, each time at whom (by index) what (by number): at one, at all, or at nobody."""
        items = self.tables.items
        match choice.way:
            case Way.HAPPENS | Way.REPEATS:
                item = items[choice.number]
                return [(_INDEX[item.name], choice.number)] if isinstance(item, Due) else []
            case Way.IS_EARLY:
                return [(choice.number, items.of(Due(NAMES[choice.number], TimeOver(EARLY_S[choice.extent]))))]
            case Way.TIME:
                up = [index for index, end in enumerate(state.ends) if end != DOWN]
                passed = TimePassed(min(self.tables.due_s[state.ends[index]] for index in up))
                return [(index, items.of(Due(NAMES[index], passed))) for index in up]
            case Way.IS_LOST | Way.CRASHES:
                return []

    # --- ends of runs -----------------------------------------------------------------------------------------------------

    def check_end(self, state: State) -> None:
        """Check what must hold when nothing can happen any more.

        Raises:
            PromiseBrokenError: A move hasn't ended, or something is left over, or a chunk is lost.
        """
        seen = self.tables.seens[state.seen]
        for number in state.ends:
            if number != DOWN and (left := self.tables.left_over(number)) is not None:
                raise PromiseBrokenError(left)
        if seen.staged:
            raise PromiseBrokenError(f"E3: bytes are left that nobody will ever own: {seen.staged}")
        lost = {chunk.key for chunk in CHUNKS} - seen.ended - {key for _, keys in seen.owned for key in keys}
        if lost:
            raise PromiseBrokenError(f"M1: nobody owns {', '.join(key.hex() for key in lost)} any more")


def _without(items: tuple[int, ...], number: int) -> tuple[int, ...]:
    index = items.index(number)
    return items[:index] + items[index + 1 :]
