"""The kinds of pairs of moves that are searched, up to the names of instances.

The first move goes from `a` to `b`. For the second there are six ways between three instances, of which those from `c` to `a`
and from `b` to `c` make the same chain; so there are five kinds of pairs, and each is here. Beside them: a prefix that goes
alone, a copy, a cancel, an engine that stores what moves, and coordinators elsewhere.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from random import Random

from p2pkv.core.chunks import Chunk
from p2pkv.core.events import CancelRequested, StoreRequested
from p2pkv.core.ids import EventId, InstanceId, Location, Parties, Position, make_event_id
from p2pkv.core.keys import TOKEN_NBYTES, Identity
from p2pkv.core.messages import PlanRequest
from p2pkv.core.moves import fetching, handover
from p2pkv.core.records import Operation, Selection
from p2pkv.core.residency import Room
from sims.engine import NAMESPACE
from sims.handover.ends import CLIENT, Happening, MoveAsked, chunks_of
from sims.mutant import replaced

NAMES: tuple[InstanceId, ...] = ("a", "b", "c")
PREFIX_NBYTES = NAMESPACE.chunk_size * TOKEN_NBYTES
"""Of the prompt's tokens: those of its first chunk."""
TOKENS = bytes([1, 0, 0, 0] * 4 + [2, 0, 0, 0] * 4)
CHUNKS: tuple[Chunk, ...] = tuple(chunks_of(TOKENS))
"""Two, of one prompt: the second hangs on the first."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A move that a user asks for: of both chunks, or of the first `chunk_count`."""

    source: InstanceId
    target: InstanceId
    coordinator: InstanceId
    operation: Operation = Operation.MOVE
    chunk_count: int = 2

    @property
    def parties(self) -> tuple[InstanceId, ...]:
        """Who takes part in it."""
        return (self.source, self.target, self.coordinator)

    def plan(self, index: int) -> PlanRequest:
        """What its coordinator asks its source for."""
        return PlanRequest(
            event_id=make_event_id(Parties(self.source, self.target, self.coordinator), Random(f"move {index}")),
            old_position=Position(self.source, Location.LOCAL_CPU),
            new_position=Position(self.target, Location.LOCAL_CPU),
            operation=self.operation,
            selection=Selection.TOKENS,
            tokens=TOKENS[: PREFIX_NBYTES * self.chunk_count],
            identity=Identity(),
            model=None,
        )


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of run.

    Attributes:
        description: One line for people.
        holders: Who holds both chunks at first.
        wishes: The moves.
        is_cancelled: Whether a user asks the first move's coordinator to cancel it, at any time.
        storing: At whom an engine stores the prompt, at any time.
        storing_nbytes: How much of its tokens.
        is_by_ones: Whether a batch of a lane, and a Take, have one chunk each, so that two chunks take two of them. In life
            240 and 1,024 do the same.
    """

    description: str
    holders: Sequence[InstanceId]
    wishes: Sequence[Wish]
    is_cancelled: bool = False
    storing: InstanceId | None = None
    storing_nbytes: int = 2 * PREFIX_NBYTES
    is_by_ones: bool = False

    @contextmanager
    def as_it_runs(self) -> Iterator[None]:
        """The core's batches are as this kind wants them meanwhile."""
        with ExitStack() as stack:
            if self.is_by_ones:
                stack.enter_context(replaced(fetching, "HANDOFF_BATCH", lambda _: Room(nbytes=2**40, descriptors=1)))
                stack.enter_context(replaced(handover, "TAKE_BATCH_KEYS", lambda _: 1))
            yield

    def plans(self) -> list[PlanRequest]:
        """Its moves."""
        return [wish.plan(index) for index, wish in enumerate(self.wishes)]

    def asked(self) -> list[tuple[InstanceId, Happening]]:
        """What users and engines ask for, each at any time."""
        plans = self.plans()
        asked: list[tuple[InstanceId, Happening]] = [
            (wish.coordinator, MoveAsked(plan)) for wish, plan in zip(self.wishes, plans, strict=True)
        ]
        if self.is_cancelled:
            asked.append((self.wishes[0].coordinator, CancelRequested(0, plans[0].event_id)))
        if self.storing is not None:
            asked.append((self.storing, StoreRequested(0, CLIENT, Identity(), TOKENS[: self.storing_nbytes], 0)))
        return asked

    def event_ids(self) -> list[EventId]:
        """Its moves' events, in their order."""
        return [plan.event_id for plan in self.plans()]


KINDS = {
    "twice": Kind("two moves of the same chunks the same way", "a", (Wish("a", "b", "a"), Wish("a", "b", "a"))),
    "crossing": Kind("two moves cross, and both ends hold the chunks", "ab", (Wish("a", "b", "a"), Wish("b", "a", "b"))),
    "back": Kind("there and back again", "a", (Wish("a", "b", "a"), Wish("b", "a", "b"))),
    "chain": Kind("from one to the next, and on", "a", (Wish("a", "b", "a"), Wish("b", "c", "b"))),
    "fork": Kind("from one to two others", "a", (Wish("a", "b", "a"), Wish("a", "c", "a"))),
    "join": Kind("from two to one", "ac", (Wish("a", "b", "a"), Wish("c", "b", "c"))),
    "prefix": Kind("a prefix one way, all another", "a", (Wish("a", "b", "a", chunk_count=1), Wish("a", "c", "a"))),
    "copied": Kind("a copy and a move the same way", "a", (Wish("a", "b", "a", Operation.COPY), Wish("a", "b", "a"))),
    "cancelled": Kind("a move, asked for at a third instance and cancelled", "a", (Wish("a", "b", "c"),), is_cancelled=True),
    "storing": Kind("a move, and its source's engine stores the prompt", "a", (Wish("a", "b", "b"),), storing="a"),
    "storing_prefix": Kind(
        "the same, but only the first chunk of it", "a", (Wish("a", "b", "a"),), storing="a", storing_nbytes=PREFIX_NBYTES
    ),
    "storing_there": Kind("a move, and its target's engine stores the prompt", "a", (Wish("a", "b", "a"),), storing="b"),
    "by_ones": Kind("as `crossing`, chunk by chunk", "ab", (Wish("a", "b", "a"), Wish("b", "a", "b")), is_by_ones=True),
    "still": Kind("a move to where it is, and one away from there", "a", (Wish("a", "a", "a"), Wish("a", "b", "a"))),
    "far": Kind("from one to the next and on, asked for in the middle", "a", (Wish("a", "b", "b"), Wish("b", "c", "b"))),
}
