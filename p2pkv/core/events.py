"""What happens to a node, in the past tense: everything that `Machine.handle` takes."""

from dataclasses import dataclass

from p2pkv.core.chunks import Chunk
from p2pkv.core.ids import Address, EventId, InstanceId, LinkId, Location, Position, RequestId
from p2pkv.core.keys import ChunkKey, Identity, Namespace, TokenBytes
from p2pkv.core.messages import Message
from p2pkv.core.records import Operation, Pinning, Selection
from p2pkv.errors import Failure

ClientId = int
"""One attached engine connection, numbered by the shell; never reused in one process."""


# --- links ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SiblingsFound:
    """All addresses of nodes to join through, as of now: contacts, and nodes of this host."""

    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class LinkOpened:
    """A websocket is open. `dialed` is the address of the `OpenLink` that asked for it; None when the peer dialed."""

    link: LinkId
    dialed: Address | None


@dataclass(frozen=True, slots=True)
class DialFailed:
    """An `OpenLink` came to nothing."""

    address: Address
    reason: str


@dataclass(frozen=True, slots=True)
class LinkLost:
    """A link that was open is closed, by us, by the peer, or by the network."""

    link: LinkId
    reason: str


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A valid message came in on a link."""

    link: LinkId
    message: Message


# --- users' requests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MoveRequested:
    """A user asks this node to coordinate a move. Answered with an `EventRecord` once the source has planned it."""

    request: RequestId
    old_position: Position
    new_position: Position
    operation: Operation
    selection: Selection
    tokens: TokenBytes
    identity: Identity
    model: str | None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class EventAsked:
    """A user asks for an event. Answered with an `EventRecord`."""

    request: RequestId
    event_id: EventId


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """A user wants a move to end. Answered with its `EventRecord`, cancelled or not."""

    request: RequestId
    event_id: EventId


@dataclass(frozen=True, slots=True)
class ClearRequested:
    """A user wants everything at a position to be forgotten. Answered with the count of tokens that were held."""

    request: RequestId
    position: Position


@dataclass(frozen=True, slots=True)
class PinRequested:
    """A user pins a prompt at a position, or ends its pin, in `ttl_s` (inf: never). Answered with the count of its tokens."""

    request: RequestId
    position: Position
    pinning: Pinning
    ttl_s: float
    tokens: TokenBytes
    identity: Identity
    model: str | None


@dataclass(frozen=True, slots=True)
class LeaveRequested:
    """The node shall leave the cluster and stop. Ends in the effect `Stop`."""


# --- engines --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineAttached:
    """An engine's worker attached with this namespace. Answered with None, or a failure when it can't be served."""

    request: RequestId
    client: ClientId
    namespace: Namespace
    worker: int


@dataclass(frozen=True, slots=True)
class LookupRequested:
    """An engine asks how much of a prompt is held here. Answered with a `Found`.

    Attributes:
        source: An instance that is said to hold it; None when the view is to say who does.
        prefill_tokens_per_s: How fast the engine computes; None when it doesn't say.
    """

    request: RequestId
    client: ClientId
    identity: Identity
    tokens: TokenBytes
    source: InstanceId | None
    prefill_tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class StoreRequested:
    """An engine wants a prompt's chunks from token `first_token` on to be held. Answered with a `Lent`."""

    request: RequestId
    client: ClientId
    identity: Identity
    tokens: TokenBytes
    first_token: int


@dataclass(frozen=True, slots=True)
class ShardsSealed:
    """The engine committed a lease; `sealed` are the shards that could be sealed. Answered with the count of tokens now held.

    Shards of the lease that aren't in `sealed` are dropped.
    """

    request: RequestId
    client: ClientId
    lease: str
    sealed: tuple[ChunkKey, ...]


@dataclass(frozen=True, slots=True)
class RetrieveRequested:
    """An engine wants to read a prompt's longest held prefix. Answered with a `Retrieved`."""

    request: RequestId
    client: ClientId
    identity: Identity
    tokens: TokenBytes


@dataclass(frozen=True, slots=True)
class EngineClearRequested:
    """An engine wants all chunks of its namespace to be forgotten. Answered with the count of tokens that were held."""

    request: RequestId
    client: ClientId


@dataclass(frozen=True, slots=True)
class ReadEnded:
    """The engine has copied what it retrieved under this lease."""

    client: ClientId
    lease: str


@dataclass(frozen=True, slots=True)
class EngineLost:
    """An engine's connection closed."""

    client: ClientId


# --- the shell's own work -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FetchEnded:
    """A `FetchChunks` is over. `fetched` are staged and verified; the rest failed for the reason given."""

    event_id: EventId
    fetched: tuple[ChunkKey, ...]
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class RouteRefused:
    """A `FetchChunks` got nowhere: its route can't be used, and nothing was fetched."""

    event_id: EventId
    failure: Failure


@dataclass(frozen=True, slots=True)
class KeptChunk:
    """A chunk that an earlier boot has left at a location, and for how long it hasn't been used."""

    chunk: Chunk
    idle_s: float


@dataclass(frozen=True, slots=True)
class ChunksFound:
    """The store has found at its start what earlier boots have left, in order of their last use, longest ago first."""

    location: Location
    namespaces: tuple[Namespace, ...]
    chunks: tuple[KeptChunk, ...]


@dataclass(frozen=True, slots=True)
class ChunksDamaged:
    """Resident chunks turn out not to be as they were written."""

    location: Location
    keys: tuple[ChunkKey, ...]


Event = (
    SiblingsFound
    | LinkOpened
    | DialFailed
    | LinkLost
    | MessageReceived
    | MoveRequested
    | EventAsked
    | CancelRequested
    | ClearRequested
    | PinRequested
    | LeaveRequested
    | EngineAttached
    | LookupRequested
    | StoreRequested
    | ShardsSealed
    | RetrieveRequested
    | EngineClearRequested
    | ReadEnded
    | EngineLost
    | FetchEnded
    | RouteRefused
    | ChunksFound
    | ChunksDamaged
)
