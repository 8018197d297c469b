"""What the ends make of what happens, and what the witness makes of that: each asked once, then known.

A machine is a function of its state and of what happens to it, and so is the witness. There are few states of one end, and many
of all of them together, so nearly always the answer is in a table. States are kept once and numbered.
"""

from collections.abc import Container, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from p2pkv.core.effects import Answer, Effect, FetchChunks, Lent, SendMessage
from p2pkv.core.events import ShardsSealed
from p2pkv.core.ids import EventId, InstanceId
from p2pkv.core.keys import ChunkKey
from sims.handover.ends import CLIENT, End, Happening, Heard, brought_back, digest, kept
from sims.handover.kinds import NAMES
from sims.handover.witness import Seen, Witness
from sims.ledger import PromiseBrokenError

T = TypeVar("T", bound=Hashable)

BROKEN = (AssertionError, KeyError)
"""A broken promise and a broken invariant are AssertionErrors; a machine that has lost track of a move stumbles over it."""


@dataclass(frozen=True, slots=True)
class Due:
    """Something that is about to happen to an instance; `sender` is who has sent it, if it is a message."""

    name: InstanceId
    happening: Happening
    sender: InstanceId | None = None


@dataclass(frozen=True, slots=True)
class Fetch:
    """A lane to an instance, about to carry."""

    name: InstanceId
    order: FetchChunks


Item = Due | Fetch
"""What is on its way."""


class Numbers(Generic[T]):
    """Things by number, each once."""

    def __init__(self) -> None:
        self._things: list[T] = []
        self._number: dict[T, int] = {}

    def __getitem__(self, number: int) -> T:
        return self._things[number]

    def of(self, thing: T) -> int:
        """The number of a thing."""
        number = self._number.get(thing)
        if number is None:
            number = self._number[thing] = len(self._things)
            self._things.append(thing)
        return number


@dataclass(frozen=True, slots=True)
class Step:
    """Something that happened at an end, and what it led to.

    Attributes:
        number: Of the step.
        due: What happened to whom.
        end: The end's state after it.
        effects: What was ordered.
        items: What is on its way by that.
        failure: What broke, if anything did.
    """

    number: int
    due: Due
    end: int
    effects: tuple[Effect, ...] = ()
    items: tuple[int, ...] = ()
    failure: AssertionError | KeyError | None = None


class Tables:
    """Ends, steps, and what the witness has seen, of one search. `due_s`: in how long something is due at each end."""

    def __init__(self) -> None:
        self.items: Numbers[Item] = Numbers()
        self.seens: Numbers[Seen] = Numbers()
        self.due_s: list[float] = []
        self._digests: Numbers[bytes] = Numbers()
        self._kept: list[bytes] = []
        self._steps: dict[tuple[int, int], Step] = {}
        self._seen_after: dict[tuple[int, int], int | PromiseBrokenError] = {}
        self._seen_after_crash: dict[tuple[int, InstanceId], int] = {}
        self._left_over: dict[int, str | None] = {}
        self._grants: dict[tuple[int, EventId], Container[ChunkKey]] = {}

    @property
    def step_count(self) -> int:
        """What machines were asked."""
        return len(self._steps)

    def number_of(self, end: End) -> int:
        """The number of an end as it is now."""
        number = self._digests.of(digest(end))
        if number == len(self._kept):
            self._kept.append(kept(end))
            self.due_s.append(end.due_s())
        return number

    def end(self, number: int) -> End:
        """An end in that state, to do anything with."""
        return brought_back(self._kept[number])

    def step(self, end_number: int, due_number: int) -> Step:
        """What an end makes of what is due to it."""
        step = self._steps.get((end_number, due_number))
        if step is None:
            due, end = self.items[due_number], self.end(end_number)
            assert isinstance(due, Due), "a lane brings something, and only then something is due"
            try:
                effects = tuple(end.happen(due.happening))
            except BROKEN as failure:
                step = Step(self.step_count, due, end_number, failure=failure)
            else:
                items = tuple(self.items.of(item) for item in _items_of(due.name, effects))
                step = Step(self.step_count, due, self.number_of(end), effects, items)
            self._steps[end_number, due_number] = step
        return step

    def seen_after(self, seen: int, step: Step) -> int:
        """What the witness has seen after a step.

        Raises:
            AssertionError: A promise or an invariant is broken by the step.
            KeyError: A machine has lost track of a move.
        """
        after = self._seen_after.get((seen, step.number))
        if after is None:
            if step.failure is not None:
                raise step.failure
            witness = Witness(self.seens[seen])
            try:
                witness.stepped(step.due.name, step.due.happening, step.effects)
                after = self.seens.of(witness.seen())
            except PromiseBrokenError as failure:
                after = failure
            self._seen_after[seen, step.number] = after
        if isinstance(after, PromiseBrokenError):
            raise after
        return after

    def seen_after_crash(self, seen: int, name: InstanceId) -> int:
        """What the witness has seen after an instance has crashed."""
        after = self._seen_after_crash.get((seen, name))
        if after is None:
            witness = Witness(self.seens[seen])
            witness.crashed(name)
            after = self._seen_after_crash[seen, name] = self.seens.of(witness.seen())
        return after

    def left_over(self, number: int) -> str | None:
        """What an end still has to do, or holds back; nothing, as it must be when all has ended."""
        if number not in self._left_over:
            self._left_over[number] = self.end(number).left_over()
        return self._left_over[number]

    def granted(self, number: int, event_id: EventId) -> Container[ChunkKey]:
        """Which chunks an end gives to a move's lane."""
        granted = self._grants.get((number, event_id))
        if granted is None:
            grant = self.end(number).lane_grant(event_id)
            granted = self._grants[number, event_id] = () if grant is None else grant.keys
        return granted


def _items_of(name: InstanceId, effects: Sequence[Effect]) -> Iterator[Item]:
    """What an end has set on its way."""
    for effect in effects:
        match effect:
            case SendMessage():
                yield Due(NAMES[effect.link], Heard(name, effect.message), sender=name)
            case FetchChunks():
                yield Fetch(name, effect)
            case Answer(value=Lent() as lent) if lent.shards:
                yield Due(name, ShardsSealed(0, CLIENT, lent.lease, tuple(shard.key for shard in lent.shards)))
