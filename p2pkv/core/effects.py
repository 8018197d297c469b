"""What a node shall do, as orders: everything that `Machine` gives back. The shell performs them in order, without awaiting.

Bytes go through a *stage* before anyone owns them. `Answer(Lent)` asks the shell to make fresh memory under the stage
`ENGINE_STAGE`, `FetchChunks` fills the stage named like its move; `AdmitStaged` turns a stage's bytes into a resident chunk,
`DropStaged` frees them, `ReleaseChunks` frees resident ones. Each names the location, in memory or on disk.
"""

from dataclasses import dataclass
from enum import StrEnum

from p2pkv.core.chunks import Chunk
from p2pkv.core.ids import Address, EventId, InstanceId, LinkId, Location, RequestId, StageId
from p2pkv.core.keys import ChunkKey, Namespace
from p2pkv.core.messages import Message, Ticket
from p2pkv.core.records import EventRecord, MemberRecord, Route
from p2pkv.errors import Failure

ENGINE_STAGE: StageId = "engine"


class ReleaseReason(StrEnum):
    """Why a resident chunk is freed."""

    EVICTED = "evicted"
    MOVED = "moved"
    CLEARED = "cleared"
    DAMAGED = "damaged"
    """Its bytes can't be read back as they were written."""


@dataclass(frozen=True, slots=True)
class OpenLink:
    """Dial a node. Ends in `LinkOpened` or `DialFailed`."""

    address: Address


@dataclass(frozen=True, slots=True)
class CloseLink:
    """Close a link after what was sent on it. Ends in `LinkLost`."""

    link: LinkId
    reason: str


@dataclass(frozen=True, slots=True)
class SendMessage:
    """Enqueue a message; a full queue closes the link."""

    link: LinkId
    message: Message


@dataclass(frozen=True, slots=True)
class Found:
    """Answer to `LookupRequested`: tokens of the longest prefix held here. `is_fetching`: more are coming; ask again soon."""

    num_tokens: int
    is_fetching: bool


@dataclass(frozen=True, slots=True)
class LentShard:
    """One shard for an engine to write: tokens `start ... start + token_count` of its prompt."""

    key: ChunkKey
    start: int
    token_count: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Lent:
    """Answer to `StoreRequested`.

    Attributes:
        lease: Names the lent shards when they are committed; empty when none are lent.
        worker: Whose shards they are.
        shards: Fresh memory that the engine writes, unmaps, and commits, prefix first.
        next_token: Ask again from here once these are committed; the prompt's length when nothing is left to do.
        held_tokens: Longest prefix held now.
        failure: Why no more could be lent; None when all that is missing was.
    """

    lease: str
    worker: int
    shards: tuple[LentShard, ...]
    next_token: int
    held_tokens: int
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class RetrievedShard:
    """One shard to read: the first `used_count` of the `token_count` tokens of a chunk that begins at `start`."""

    key: ChunkKey
    start: int
    used_count: int
    token_count: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Retrieved:
    """Answer to `RetrieveRequested`: shards in prefix order, leased until `ReadEnded`; no shards and no lease for a miss."""

    lease: str
    worker: int
    location: Location
    num_tokens: int
    shards: tuple[RetrievedShard, ...]


AnswerValue = EventRecord | Found | Lent | Retrieved | int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a request: a value, or a failure."""

    request: RequestId
    value: AnswerValue
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class EventChanged:
    """An event that this node takes part in has changed."""

    event: EventRecord


@dataclass(frozen=True, slots=True)
class MemberChanged:
    """A member was learned, is suspected or no longer, died, left, or came back."""

    member: MemberRecord


@dataclass(frozen=True, slots=True)
class InventoryDoubted:
    """What an instance says that it holds isn't believed, or not kept: something for the log."""

    instance: InstanceId
    reason: str


@dataclass(frozen=True, slots=True)
class FetchChunks:
    """Bring these chunks by this route into the stage named like the move. Ends in one `FetchEnded` or `RouteRefused`.

    `location` is where the stage is; `namespaces` are those of the chunks.
    """

    event_id: EventId
    source: InstanceId
    route: Route
    ticket: Ticket
    chunks: tuple[Chunk, ...]
    location: Location
    namespaces: tuple[Namespace, ...]


@dataclass(frozen=True, slots=True)
class CancelFetch:
    """Stop the fetch of this move; its `FetchEnded` still comes."""

    event_id: EventId


@dataclass(frozen=True, slots=True)
class AdmitStaged:
    """Make a staged chunk resident."""

    stage: StageId
    location: Location
    key: ChunkKey


@dataclass(frozen=True, slots=True)
class DropStaged:
    """Free a staged chunk, or only one worker's shard of it."""

    stage: StageId
    location: Location
    key: ChunkKey
    worker: int | None = None


@dataclass(frozen=True, slots=True)
class ReleaseChunks:
    """Free resident chunks."""

    location: Location
    keys: tuple[ChunkKey, ...]
    reason: ReleaseReason


@dataclass(frozen=True, slots=True)
class Stop:
    """The node's work is over: None after leaving, else why it can't go on."""

    failure: Failure | None


Effect = (
    OpenLink
    | CloseLink
    | SendMessage
    | Answer
    | EventChanged
    | MemberChanged
    | InventoryDoubted
    | FetchChunks
    | CancelFetch
    | AdmitStaged
    | DropStaged
    | ReleaseChunks
    | Stop
)
