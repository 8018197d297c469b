"""What one node says to another. `wire/codec` turns these into msgpack and back, and refuses what doesn't fit the types.

Any of them may be lost, repeated, late, or a lie: `machine` and the parts below it decide what that means.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le, Len

from p2pkv.core.chunks import Chunk
from p2pkv.core.ids import Address, EventId, Generation, Incarnation, InstanceId, Location, Position
from p2pkv.core.keys import ChunkKey, Fingerprint, Identity, Namespace, TokenBytes
from p2pkv.core.records import Count, EventRecord, Lane, MemberRecord, MemberState, Operation, Pinning, Reach, Selection
from p2pkv.errors import Failure

PROTOCOL_VERSION = 2
MANIFEST_PAGE_CHUNKS = 64
"""About 70 KiB a page: 64 times 1 KiB of tokens. A websocket in Python masks that in 2 ms."""
TAKE_BATCH_KEYS = 1024
INVENTORY_PAGE_ENTRIES = 4096
"""48 KiB: of a delta, and of a page of a snapshot."""
CHANGE_NBYTES = 12
"""Fingerprint (8 bytes); then tokens - 1 (16 bits), whether it went, location (a bit each), 14 bits of 0; little-endian."""
RANGE_NBYTES = 16
"""Of an `InventoryDigest`: count and additive hash, 8 bytes each, little-endian."""
RANGE_BITS_MAX = 10
MEMBERS_MAX = 1024
RUMOURS_MAX = 64

Nonce = Annotated[int, Ge(0), Le(2**64 - 1)]
Ticket = Annotated[bytes, Len(32, 32)]


# --- membership -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message on a link, from both ends: who I am, and whom I know."""

    versions: Annotated[tuple[int, ...], Len(1, 16)]
    cluster: InstanceId
    me: MemberRecord
    members: Annotated[tuple[MemberRecord, ...], Len(0, MEMBERS_MAX)]


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The last message on a link: why it closes."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Leaving:
    """I am leaving the cluster for good; my chunks leave with me."""

    generation: Generation


@dataclass(frozen=True, slots=True)
class Rumour:
    """What is said of one incarnation of one boot of an instance. An alive one is reached at `ws`; `origin` found it out."""

    instance: InstanceId
    generation: Generation
    incarnation: Incarnation
    state: MemberState
    ws: Address
    origin: InstanceId


@dataclass(frozen=True, slots=True)
class Rumours:
    """What is new about members."""

    rumours: Annotated[tuple[Rumour, ...], Len(1, RUMOURS_MAX)]


@dataclass(frozen=True, slots=True)
class MemberTable:
    """All members as I know them, myself included: the push of a push-pull, or, as its answer, the pull."""

    is_answer: bool
    rumours: Annotated[tuple[Rumour, ...], Len(1, MEMBERS_MAX + 1)]


@dataclass(frozen=True, slots=True)
class Status:
    """My own record as it is now, and how far my inventory has got: sent to every peer each second, and when it changes.

    `entry_count` and `entry_sum` (fingerprints with their locations, added modulo 2**64) are at `sequence`: a view that
    has the same sequence but other figures is wrong and asks for an `InventoryDigest`.
    """

    me: MemberRecord
    sequence: Count
    entry_count: Count
    entry_sum: Annotated[int, Ge(0), Le(2**64 - 1)]


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there?"""

    nonce: Nonce


@dataclass(frozen=True, slots=True)
class Pong:
    """I am."""

    nonce: Nonce


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """I don't hear this boot of an instance: do you? Answered with a `ProbeAnswer`."""

    nonce: Nonce
    instance: InstanceId
    generation: Generation


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """What came of your `ProbeRequest`."""

    nonce: Nonce
    reach: Reach


# --- inventory ------------------------------------------------------------------------------------------------------------


Changes = Annotated[bytes, Len(0, CHANGE_NBYTES * INVENTORY_PAGE_ENTRIES)]
"""Entries that came or went, `CHANGE_NBYTES` each, as `rows` has them: a view of many members hasn't time for objects."""


@dataclass(frozen=True, slots=True)
class InventoryRequest:
    """Send me the changes after `sequence` of `generation`; when that isn't yours or is too old, an `InventoryDigest`."""

    generation: Generation
    sequence: Count


@dataclass(frozen=True, slots=True)
class InventoryDelta:
    """The changes `first_sequence`, `first_sequence + 1`, ... of my log."""

    generation: Generation
    first_sequence: Annotated[int, Ge(1)]
    changes: Changes


@dataclass(frozen=True, slots=True)
class InventoryDigest:
    """What I held at `sequence`, in outline: count and additive hash of each of 2**n equal ranges of fingerprints."""

    generation: Generation
    sequence: Count
    ranges: Annotated[bytes, Len(RANGE_NBYTES, RANGE_NBYTES << RANGE_BITS_MAX)]


@dataclass(frozen=True, slots=True)
class RangeRequest:
    """Send me what you hold from fingerprint `first` to `last`, or as much of it as a page holds."""

    generation: Generation
    first: Fingerprint
    last: Fingerprint


@dataclass(frozen=True, slots=True)
class InventoryPage:
    """All that I held at `sequence` from fingerprint `first` to `last`."""

    generation: Generation
    sequence: Count
    first: Fingerprint
    last: Fingerprint
    entries: Changes


# --- moves ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Coordinator to source: make this move. A repeat of an `event_id` is answered like the first.

    `reader` is the namespace, by digest, of an engine that waits for the chunks: no others are of use to it, and what it waits
    for is in use. None for what users ask for. A repeat of an `idempotency_key` for the same is answered with that one's event,
    whatever its id.
    """

    event_id: EventId
    old_position: Position
    new_position: Position
    operation: Operation
    selection: Selection
    tokens: TokenBytes
    identity: Identity
    model: Annotated[str, Len(1, 512)] | None
    reader: Annotated[bytes, Len(16, 16)] | None = None
    idempotency_key: Annotated[str, Len(1, 256)] | None = None


@dataclass(frozen=True, slots=True)
class PlanAnswer:
    """Source to coordinator: the event, or why there is none. `has_key`: it was asked for with an `idempotency_key`."""

    event_id: EventId
    event: EventRecord | None
    failure: Failure | None
    has_key: bool = False


@dataclass(frozen=True, slots=True)
class Offer:
    """Source to target: fetch these chunks from me.

    Attributes:
        event_id: Of the move.
        source_generation: The source's boot; a later one knows nothing of this move.
        target_generation: The target's boot as the source knows it; another one refuses.
        operation: Move or copy.
        old_position: Where the chunks are.
        new_position: Where they shall be.
        namespaces: All that the manifest's chunks belong to.
        ticket: Secret that opens the transfer lane for this move.
        chunk_count: Chunks in the whole manifest.
        num_tokens: Of the move, as its event says.
        charged_nbytes: What the whole manifest counts against a limit.
        idle_s: Seconds since the source last used any of them; only what is colder may be evicted for them.
        deadline_s: Seconds from now until the move ends whatever happens.
        chunks: The manifest's first page, prefix first.
    """

    event_id: EventId
    source_generation: Generation
    target_generation: Generation
    operation: Operation
    old_position: Position
    new_position: Position
    namespaces: Annotated[tuple[Namespace, ...], Len(0, 64)]
    ticket: Ticket
    chunk_count: Count
    num_tokens: Count
    charged_nbytes: Count
    idle_s: Annotated[float, Ge(0)]
    deadline_s: Annotated[float, Ge(0)]
    chunks: Annotated[tuple[Chunk, ...], Len(0, MANIFEST_PAGE_CHUNKS)]


@dataclass(frozen=True, slots=True)
class ManifestRequest:
    """Target to source: the page of the manifest that begins at chunk `first_index`."""

    event_id: EventId
    first_index: Count


@dataclass(frozen=True, slots=True)
class ManifestPage:
    """Source to target: chunks `first_index`, `first_index + 1`, ... of the manifest."""

    event_id: EventId
    first_index: Count
    chunks: Annotated[tuple[Chunk, ...], Len(1, MANIFEST_PAGE_CHUNKS)]


@dataclass(frozen=True, slots=True)
class FetchReport:
    """Target to source, each second and at each change: how far I have got. It renews the move's leases.

    Attributes:
        event_id: Of the move.
        is_complete: All that I can fetch is here and verified.
        fetched_count: Chunks that came over the lane.
        already_there_count: Chunks that I held before.
        failed_count: Chunks that I can't get, known when complete.
        nbytes: Payload bytes that came over the lane.
        lane: What carried them; None when nothing was.
        failure: Why some failed; with nothing fetched, why I refuse.
    """

    event_id: EventId
    is_complete: bool
    fetched_count: Count
    already_there_count: Count
    failed_count: Count
    nbytes: Count
    lane: Lane | None
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class Pin:
    """This chunk is pinned for so much longer; inf: until it is unpinned."""

    key: ChunkKey
    ttl_s: Annotated[float, Gt(0)]


@dataclass(frozen=True, slots=True)
class Take:
    """Source to target: own these, suffix first. The source frees `released` on the answer and keeps `shared`.

    A repeat of an attempt is answered like the first. `pins` are those of its chunks, as of the time of sending.
    """

    event_id: EventId
    attempt: Annotated[int, Ge(1)]
    source_generation: Generation
    target_generation: Generation
    released: Annotated[tuple[ChunkKey, ...], Len(0, TAKE_BATCH_KEYS)]
    shared: Annotated[tuple[ChunkKey, ...], Len(0, TAKE_BATCH_KEYS)]
    pins: Annotated[tuple[Pin, ...], Len(0, TAKE_BATCH_KEYS)] = ()


@dataclass(frozen=True, slots=True)
class TakeAnswer:
    """Target to source: what I own now of that attempt (`taken`: fetched by this move; `already_there`), and what is `gone`."""

    event_id: EventId
    attempt: Annotated[int, Ge(1)]
    taken: Annotated[tuple[ChunkKey, ...], Len(0, TAKE_BATCH_KEYS)]
    already_there: Annotated[tuple[ChunkKey, ...], Len(0, TAKE_BATCH_KEYS)]
    gone: Annotated[tuple[ChunkKey, ...], Len(0, TAKE_BATCH_KEYS)]


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """To the source: end this move if no chunk has been handed over yet. Answered with an `EventReport`."""

    event_id: EventId


@dataclass(frozen=True, slots=True)
class EventRequest:
    """What is known of this event? Answered with an `EventReport`."""

    event_id: EventId


@dataclass(frozen=True, slots=True)
class EventReport:
    """An event as the sender knows it; None when it knows none of that id."""

    event_id: EventId
    event: EventRecord | None


# --- commands -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClearRequest:
    """Forget everything at this location of yours that isn't pinned. A repeat of a `nonce` is answered like the first."""

    nonce: Nonce
    location: Location


@dataclass(frozen=True, slots=True)
class PinRequest:
    """Pin what you hold there of a prompt for `ttl_s`, or end its pins in `ttl_s`. Repeats as of `ClearRequest`."""

    nonce: Nonce
    location: Location
    pinning: Pinning
    ttl_s: Annotated[float, Ge(0)]
    tokens: TokenBytes
    identity: Identity
    model: Annotated[str, Len(1, 512)] | None


@dataclass(frozen=True, slots=True)
class CommandAnswer:
    """How many tokens a command was about, or why it wasn't carried out."""

    nonce: Nonce
    token_count: Count
    failure: Failure | None


LivenessMessage = Rumours | MemberTable | Pong | ProbeRequest | ProbeAnswer
MembershipMessage = Hello | Goodbye | Leaving | Status | Ping | LivenessMessage
InventoryMessage = InventoryRequest | InventoryDelta | InventoryDigest | RangeRequest | InventoryPage
SourceMessage = PlanRequest | ManifestRequest | FetchReport | TakeAnswer | CancelRequest
TargetMessage = Offer | ManifestPage | Take
CoordinatorMessage = PlanAnswer | EventRequest | EventReport
Command = ClearRequest | PinRequest
CommandMessage = Command | CommandAnswer
Message = MembershipMessage | InventoryMessage | SourceMessage | TargetMessage | CoordinatorMessage | CommandMessage
