"""What the calls answer, field by field, and how it follows from the core's records."""

import secrets
from dataclasses import dataclass

from p2pkv.core.records import EventRecord, MemberRecord, Operation
from p2pkv.core.rows import InventoryEntry


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """Any refusal: a sentence for people, a code for programs."""

    detail: str
    error: str


@dataclass(frozen=True, slots=True)
class MoveReply:
    """A move that has ended well, or goes on: `state` says which."""

    event_id: str
    num_tokens: int
    state: str


@dataclass(frozen=True, slots=True)
class LookupReply:
    """For each holder its best location and the prefix held there, in tokens. Not `complete`: holders may be missing."""

    event_id: str
    layout_info: dict[str, tuple[str, int]]
    complete: bool


@dataclass(frozen=True, slots=True)
class FullLookupReply:
    """For each holder all its locations, each with the prefix held there, in tokens. `complete` as in `LookupReply`."""

    event_id: str
    layout_info: dict[str, list[tuple[str, int]]]
    complete: bool


@dataclass(frozen=True, slots=True)
class HealthReply:
    """An error code for each worker; 0 means well."""

    event_id: str
    error_codes: dict[str, int]


@dataclass(frozen=True, slots=True)
class QueryInstanceReply:
    """The instance at an address."""

    event_id: str
    res: str


@dataclass(frozen=True, slots=True)
class WorkerInfoReply:
    """A worker: its instance's websocket door and transfer address, when it joined and when it was last heard."""

    instance_id: str
    worker_id: int
    ip: str
    port: int
    peer_init_url: str | None
    registration_time: float | None
    last_heartbeat_time: float | None


@dataclass(frozen=True, slots=True)
class QueryWorkerInfoReply:
    """An instance's workers."""

    event_id: str
    worker_infos: list[WorkerInfoReply]


@dataclass(frozen=True, slots=True)
class ChangedReply:
    """How many tokens a change of what is held was about."""

    event_id: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class InventoryItemReply:
    """A chunk: its fingerprint as 16 hexadecimal digits, where it is held, and how many tokens it covers."""

    fingerprint: str
    location: str
    tokens: int


@dataclass(frozen=True, slots=True)
class InventoryReply:
    """A page of what an instance holds; `next` is the cursor of the next one, null after the last."""

    items: list[InventoryItemReply]
    next: str | None


@dataclass(frozen=True, slots=True)
class CheckFinishReply:
    """The state of an event."""

    status: str


@dataclass(frozen=True, slots=True)
class ChunksReply:
    """What became of a move's chunks."""

    found: int
    moved: int
    already_there: int
    shared_kept: int
    failed: int


@dataclass(frozen=True, slots=True)
class EventReply:
    """A move's event. Times are Unix seconds; what isn't known is null."""

    event_id: str
    kind: str
    state: str
    old_position: tuple[str, str]
    new_position: tuple[str, str]
    copy: bool
    chunks: ChunksReply
    num_tokens: int
    bytes: int
    lane: str | None
    started_at: float
    finished_at: float | None
    seconds: float | None
    coordinator: str
    error: ErrorReply | None


@dataclass(frozen=True, slots=True)
class EventsReply:
    """Events known to this node, newest first."""

    events: list[EventReply]


@dataclass(frozen=True, slots=True)
class LocationReply:
    """How full a location is; `bytes` and `limit` in bytes."""

    chunks: int
    bytes: int
    limit: int


@dataclass(frozen=True, slots=True)
class MemberReply:
    """One instance, as this node knows it."""

    instance: str
    state: str
    generation: int
    incarnation: int
    ws: str
    http: str
    transfer: str | None
    zone: str
    models: list[str]
    locations: dict[str, LocationReply]


@dataclass(frozen=True, slots=True)
class MembersReply:
    """Every instance known to the node of `instance`, by name: on a port that nodes share, that tells which one answered."""

    members: list[MemberReply]
    instance: str


@dataclass(frozen=True, slots=True)
class EmptyReply:
    """All is well."""


def call_id(call: str) -> str:
    """An `event_id` for a call that begins no move: LMCache's clients expect one of each, and nobody can ask about it."""
    return f"{call}~{secrets.token_hex(8)}"


def event_reply(event: EventRecord) -> EventReply:
    """An event as the calls show it."""
    chunks, error = event.chunks, event.error
    return EventReply(
        event_id=event.event_id,
        kind="move",
        state=event.state,
        old_position=(event.old_position.instance, event.old_position.location),
        new_position=(event.new_position.instance, event.new_position.location),
        copy=event.operation is Operation.COPY,
        chunks=ChunksReply(
            found=chunks.found,
            moved=chunks.moved,
            already_there=chunks.already_there,
            shared_kept=chunks.shared_kept,
            failed=chunks.failed,
        ),
        num_tokens=event.num_tokens,
        bytes=event.nbytes,
        lane=event.lane,
        started_at=event.started_at,
        finished_at=event.finished_at,
        seconds=None if event.finished_at is None else event.finished_at - event.started_at,
        coordinator=event.coordinator,
        error=None if error is None else ErrorReply(detail=error.detail, error=error.code),
    )


def inventory_item(entry: InventoryEntry) -> InventoryItemReply:
    """A chunk as `/inventory` shows it."""
    return InventoryItemReply(fingerprint=f"{entry.fingerprint:016x}", location=entry.location, tokens=entry.token_count)


def member_reply(member: MemberRecord) -> MemberReply:
    """A member as `/members` shows it."""
    return MemberReply(
        instance=member.instance,
        state=member.state,
        generation=member.generation,
        incarnation=member.incarnation,
        ws=f"ws://{member.ws}",
        http=member.http,
        transfer=None if member.transfer is None else str(member.transfer),
        zone=member.zone,
        models=sorted({namespace.model for namespace in member.namespaces}),
        locations={
            status.location: LocationReply(chunks=status.chunk_count, bytes=status.nbytes, limit=status.limit_nbytes)
            for status in member.locations
        },
    )
