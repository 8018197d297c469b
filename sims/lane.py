"""The virtual lane: carries a move's chunks from its source to its target, one after the other, and fails as faults say.

It gives what the source's grant names and the source holds, verifies each chunk, and ends in one `FetchEnded`.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2pkv.core.effects import FetchChunks
from p2pkv.core.events import FetchEnded
from p2pkv.core.keys import ChunkKey
from p2pkv.errors import ErrorCode, Failure

if TYPE_CHECKING:
    from sims.world import Node, World

CHUNK_SHARE = 0.05
"""Time that one chunk takes, as a share of a message's: a batch lasts long enough for much to happen in it."""
BROKE = Failure(ErrorCode.TRANSFER_FAILED, "The lane closed.")
DAMAGED = Failure(ErrorCode.TRANSFER_FAILED, "A chunk came damaged.")


@dataclass(slots=True)
class Lane:
    """One fetch under way."""

    world: "World"
    target: "Node"
    order: FetchChunks
    fetched: list[ChunkKey] = field(default_factory=list)
    failure: Failure | None = None

    def open(self) -> None:
        """Begin to carry."""
        delay_s = self.world.network.delay(self.order.source, self.target.name)
        self.world.clock.after(delay_s, lambda: self._carry(0))

    def _carry(self, index: int) -> None:
        world, target = self.world, self.target
        source = world.nodes[self.order.source]
        stands_until = max(source.stands_until, target.stands_until)
        if not target.is_up:
            return
        if stands_until > world.clock.now:
            world.clock.at(stands_until, lambda: self._carry(index))
            return
        if index == len(self.order.chunks):
            self._end(self.failure)
            return
        key = self.order.chunks[index].key
        grant = source.machine.lane_grant(self.order.event_id) if source.is_up else None
        data = source.resident.get(key)
        is_granted = grant is not None and grant.ticket == self.order.ticket and key in grant.keys
        is_broken = world.network.happens(world.network.faults.lane_failure) or world.network.is_cut(source.name, target.name)
        if data is None or not is_granted or is_broken or self.order.event_id in target.cancelled:
            self._end(BROKE)
            return
        if world.network.happens(world.network.faults.corruption):
            self.failure = DAMAGED
        else:
            target.staged[self.order.event_id, key] = data
            self.fetched.append(key)
        world.clock.after(CHUNK_SHARE * world.network.delay(source.name, target.name), lambda: self._carry(index + 1))

    def _end(self, failure: Failure | None) -> None:
        self.target.cancelled.pop(self.order.event_id, None)
        self.world.happen(self.target, FetchEnded(self.order.event_id, tuple(self.fetched), failure))
