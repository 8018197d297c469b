"""The promises M1, M2, M3, M5 and M6 (`docs/protocol.md`), checked from outside on every effect."""

from dataclasses import dataclass, field

from p2pkv.core.ids import EventId, InstanceId
from p2pkv.core.keys import ChunkKey
from p2pkv.core.messages import ManifestPage, Message, Offer
from p2pkv.core.moves.handover import TAKE_ANSWER_S
from p2pkv.core.records import EventRecord, EventState, Operation
from sims.ledger import Ledger, PromiseBrokenError
from sims.network import Clock


@dataclass(slots=True)
class _Seen:
    """What was seen of one event from outside."""

    first_at: float
    keys: dict[ChunkKey, None] = field(default_factory=dict)
    last: EventRecord | None = None


class Promises:
    """Watches effects and messages; raises `PromiseBrokenError` at the first broken promise."""

    def __init__(self, clock: Clock) -> None:
        self.ledger = Ledger()
        self.states: dict[EventState, int] = {}
        self._clock = clock
        self._seen: dict[EventId, _Seen] = {}

    def _broken(self, promise: str, what: str) -> PromiseBrokenError:
        return PromiseBrokenError(f"{promise} at t={self._clock.now:.4f}: {what}")

    def _event(self, event_id: EventId) -> _Seen:
        return self._seen.setdefault(event_id, _Seen(first_at=self._clock.now))

    def sent(self, sender: InstanceId, receiver: InstanceId, message: Message) -> None:
        """A message left; offers and pages tell what a move is about."""
        if isinstance(message, Offer | ManifestPage):
            self._event(message.event_id).keys.update(dict.fromkeys(chunk.key for chunk in message.chunks))

    def admitted(self, key: ChunkKey, instance: InstanceId, *, is_right: bool) -> None:
        """Bytes became a resident chunk."""
        if not is_right:
            raise self._broken("M5", f"{instance} admits wrong bytes as {key.hex()}")
        self.ledger.gained(key, instance, self._clock.now)

    def released(self, key: ChunkKey, instance: InstanceId, *, is_moved: bool) -> None:
        """A resident chunk was freed: evicted, or because another owns it."""
        if is_moved:
            owners = self.ledger.owners_after(key, self._clock.now - TAKE_ANSWER_S)
            if not [owner for owner in owners if owner != instance]:
                raise self._broken("M1", f"{instance} frees {key.hex()}, which nobody else has owned")
        self.ledger.lost(key, instance, self._clock.now, "moved" if is_moved else "evicted")

    def crashed(self, instance: InstanceId) -> None:
        """An instance ended."""
        self.ledger.crashed(instance, self._clock.now)

    def event_changed(self, instance: InstanceId, record: EventRecord) -> None:
        """A node says how an event goes on; its source's word counts."""
        seen = self._event(record.event_id)
        if instance != record.old_position.instance:
            return
        if seen.last is not None and seen.last.state.is_final and not self._source_crashed(seen):
            raise self._broken("M6", f"{record.event_id} goes on after its end")
        seen.last = record
        if not record.state.is_final:
            return
        self.states[record.state] = self.states.get(record.state, 0) + 1
        counts = record.chunks
        if counts.found != counts.moved + counts.already_there + counts.shared_kept + counts.failed:
            raise self._broken("M2", f"{record.event_id} counts don't add up: {counts}")
        if record.old_position == record.new_position and (counts.already_there != counts.found or record.nbytes):
            raise self._broken("M3", f"{record.event_id} moved something to where it was")
        if record.state is EventState.DONE:
            self._check_done(record, seen)

    def _check_done(self, record: EventRecord, seen: _Seen) -> None:
        """M2: the target holds all, and after a move the source holds none but the shared."""
        source, target = record.old_position.instance, record.new_position.instance
        for key in seen.keys:
            if not self.ledger.owned_after(key, target, seen.first_at):
                raise self._broken("M2", f"{record.event_id} is done, but {target} never held {key.hex()}")
            if self.ledger.open_since(key, target) is None and self.ledger.last_end(key, target) == "evicted":
                raise self._broken("M2", f"{record.event_id} is done, but {target} has evicted {key.hex()} already")
        if record.operation is Operation.MOVE:
            kept = [key for key in seen.keys if (self.ledger.open_since(key, source) or self._clock.now) < seen.first_at]
            if len(kept) > record.chunks.shared_kept:
                raise self._broken("M2", f"{record.event_id} is done, but {source} keeps {len(kept)}: {record.chunks}")

    def check_all_ended(self, deadline_s: float) -> None:
        """M6, when everything has come to rest: each event has ended, or its source has."""
        for event_id, seen in self._seen.items():
            if seen.last is None or (not seen.last.state.is_final and not self._source_crashed(seen)):
                raise self._broken("M6", f"{event_id} has not ended after {self._clock.now - seen.first_at:.0f} s of {deadline_s:.0f}")

    def _source_crashed(self, seen: _Seen) -> bool:
        source = seen.last.old_position.instance if seen.last is not None else ""
        return any(name == source and at >= seen.first_at for name, at in self.ledger.crashes)
