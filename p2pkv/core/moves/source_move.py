"""One open move at its source: plain data that `source` and `handover` work on."""

from dataclasses import dataclass, field
from math import inf

from p2pkv.core.chunks import Chunk
from p2pkv.core.ids import InstanceId, Location
from p2pkv.core.keys import ChunkKey
from p2pkv.core.messages import PlanRequest
from p2pkv.core.moves.tables import SourceState
from p2pkv.core.records import EventRecord
from p2pkv.errors import Failure


@dataclass(slots=True)
class SourceMove:
    """One move whose source is this instance.

    `remaining` counts the manifest's chunks that no attempt has named yet: those at its front. `released` and `shared` are the
    open attempt's keys, which began at `attempt_from`. `kept` are those that an engine has stored again meanwhile.
    """

    plan: PlanRequest
    record: EventRecord
    manifest: tuple[Chunk, ...]
    ticket: bytes
    target_generation: int
    idle_s: float
    deadline: float
    silent_by: float
    resend_at: float
    remaining: int
    state: SourceState = SourceState.OFFERED
    attempt: int = 0
    attempt_from: int = 0
    answer_by: float = inf
    kept: dict[ChunkKey, None] = field(default_factory=dict)
    released: dict[ChunkKey, None] = field(default_factory=dict)
    shared: dict[ChunkKey, None] = field(default_factory=dict)
    problem: Failure | None = None

    @property
    def target(self) -> InstanceId:
        """Who gets the chunks."""
        return self.plan.new_position.instance


@dataclass(frozen=True, slots=True)
class LaneGrant:
    """What a lane that proves `ticket` may be given: these chunks, from `location`."""

    ticket: bytes
    keys: frozenset[ChunkKey]
    location: Location
