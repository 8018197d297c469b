"""One open move at its target: plain data that `target` and `fetching` work on."""

from dataclasses import dataclass, field

from p2pkv.core.chunks import Chunk
from p2pkv.core.ids import EventId, InstanceId
from p2pkv.core.keys import ChunkKey, Namespace
from p2pkv.core.messages import Offer, TakeAnswer
from p2pkv.core.moves.tables import TargetState
from p2pkv.core.records import Lane, Route
from p2pkv.errors import Failure


@dataclass(slots=True)
class TargetMove:
    """One move whose target is this instance.

    `pending` are chunks still to fetch, prefix first, by the first of `routes`, the rest of which are for when that is refused;
    `batch` is being fetched, since `batch_at`; `fetched` came over `lane`; `present` were here before, or came by another move;
    `awaited` are being fetched by another. A move that has ended while its fetch goes on waits for the fetch's end; then,
    `is_source_lost` decides what becomes of the bytes.
    """

    offer: Offer
    source: InstanceId
    namespaces: dict[bytes, Namespace]
    started_at: float
    deadline: float
    report_at: float
    state: TargetState = TargetState.COLLECTING
    manifest: dict[ChunkKey, Chunk] = field(default_factory=dict)
    pending: list[Chunk] = field(default_factory=list)
    routes: list[Route] = field(default_factory=list)
    batch: tuple[Chunk, ...] = ()
    batch_at: float = 0.0
    lane: Lane | None = None
    fetched: dict[ChunkKey, None] = field(default_factory=dict)
    present: dict[ChunkKey, None] = field(default_factory=dict)
    awaited: dict[ChunkKey, Chunk] = field(default_factory=dict)
    nbytes: int = 0
    problem: Failure | None = None
    answer: TakeAnswer | None = None
    is_source_lost: bool = False

    @property
    def is_fetching(self) -> bool:
        """Whether a fetch is under way."""
        return bool(self.batch)

    @property
    def event_id(self) -> EventId:
        """Of the move."""
        return self.offer.event_id
