"""What nodes tell each other about moves and members: facts that travel, that doors show, and that nobody changes in place."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from annotated_types import Ge, Len

from p2pkv.core.ids import Address, EventId, Generation, Incarnation, InstanceId, Location, Position, WallTime
from p2pkv.core.keys import Namespace
from p2pkv.errors import Failure

Count = Annotated[int, Ge(0)]
Text = Annotated[str, Len(0, 512)]


class Operation(StrEnum):
    """A move releases the source after the target holds it; a copy does not."""

    MOVE = "move"
    COPY = "copy"


class Selection(StrEnum):
    """Which chunks a move takes: the prefix that its tokens name, or everything at the old position."""

    TOKENS = "tokens"
    ALL = "all"


class Pinning(StrEnum):
    """A user's pin keeps chunks from eviction until it is ended, or by itself after a time."""

    PIN = "pin"
    UNPIN = "unpin"


class EventState(StrEnum):
    """Where a move is. The last four are final; none is seen pending, as a request is answered when it is planned."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    PARTIAL = "partial"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing changes any more."""
        return self not in (EventState.PENDING, EventState.RUNNING)


class Lane(StrEnum):
    """How the bytes travelled: descriptors passed on one host, a TCP stream, or within one instance."""

    HANDOFF = "handoff"
    TCP = "tcp"
    LOCAL = "local"


@dataclass(frozen=True, slots=True)
class ChunkCounts:
    """What became of a move's chunks. After the end `found` is the sum of the other four.

    Attributes:
        found: In the manifest.
        moved: Carried to the target, which owns them; a move has released them at the source.
        already_there: The target held them before; a move has released them at the source.
        shared_kept: The target owns them, and the source keeps them too: a chunk outside the move still hangs on them.
        failed: Where they were before.
    """

    found: Count = 0
    moved: Count = 0
    already_there: Count = 0
    shared_kept: Count = 0
    failed: Count = 0

    @property
    def unsettled(self) -> int:
        """Those of which nothing has become yet; at the end they are the failed ones."""
        return self.found - self.moved - self.already_there - self.shared_kept


def end_state(*, found: int, failed: int) -> EventState:
    """How a move ends that has got as far as it can, when `failed` of the `found` chunks are where they were."""
    if not failed:
        return EventState.DONE
    return EventState.FAILED if failed == found else EventState.PARTIAL


@dataclass(frozen=True, slots=True)
class EventRecord:
    """A move's event, as `/events/{id}` shows it. The source alone writes its state."""

    event_id: EventId
    state: EventState
    old_position: Position
    new_position: Position
    operation: Operation
    chunks: ChunkCounts
    num_tokens: Count
    nbytes: Count
    lane: Lane | None
    started_at: WallTime
    finished_at: WallTime | None
    coordinator: InstanceId
    error: Failure | None


class MemberState(StrEnum):
    """What is known of an instance. A suspect hasn't answered, and has time to refute that; everything still counts on it."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"

    @property
    def is_living(self) -> bool:
        """Whether it is to be counted on."""
        return self is MemberState.ALIVE or self is MemberState.SUSPECT


class Reach(StrEnum):
    """What came of trying to reach a member: an answer, nothing, or nobody there to take a dial."""

    REACHED = "reached"
    SILENT = "silent"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class LocationStatus:
    """How full a location is."""

    location: Location
    chunk_count: Count
    nbytes: Count
    limit_nbytes: Count


@dataclass(frozen=True, slots=True)
class HandoffAddress:
    """Where an instance hands descriptors over: a unix socket at `path` on the host with this boot id."""

    host_id: Text
    path: Annotated[str, Len(1, 512)]


@dataclass(frozen=True, slots=True)
class WithinInstance:
    """Both ends are one instance: the source's chunks are at its own `location`."""

    location: Location


Route = WithinInstance | HandoffAddress | Address
"""How to get at a source's chunks: without a lane, by handoff, or over TCP."""


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """One instance, as it describes itself.

    Attributes:
        instance: Its name.
        generation: Which boot of it.
        incarnation: Which version of its own record within this generation.
        state: As far as the teller knows.
        ws: Its websocket door.
        http: URL of its own HTTP shim.
        transfer: Where it serves chunks over TCP; None when it doesn't.
        handoff: Where it hands descriptors over; None when it doesn't.
        zone: Where it stands, in the operator's words.
        namespaces: What its engines attached with, and what it holds.
        locations: How full it is.
    """

    instance: InstanceId
    generation: Generation
    incarnation: Incarnation
    state: MemberState
    ws: Address
    http: Text
    transfer: Address | None
    handoff: HandoffAddress | None
    zone: Text
    namespaces: Annotated[tuple[Namespace, ...], Len(0, 64)]
    locations: Annotated[tuple[LocationStatus, ...], Len(0, 8)]
