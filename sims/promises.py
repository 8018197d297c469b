"""The promises and safety rules of `docs/protocol.md`, checked from outside: on every effect, every message, and at rest.

Whatever is asserted here is known from effects and messages only; a machine's own `check_invariants` is one more net.
"""

from collections import defaultdict, deque
from collections.abc import Iterable
from itertools import pairwise

from p2pkv.core.effects import (
    Answer,
    Effect,
    EventChanged,
    FetchChunks,
    InventoryDoubted,
    MemberChanged,
    OpenLink,
    ReleaseReason,
    Retrieved,
    SendMessage,
)
from p2pkv.core.events import EngineLost, Event, FetchEnded, MessageReceived, ReadEnded, RouteRefused, StoreRequested
from p2pkv.core.ids import Address, EventId, InstanceId
from p2pkv.core.keys import ChunkKey
from p2pkv.core.messages import Message, PlanAnswer, PlanRequest, Take, TakeAnswer
from p2pkv.core.records import EventRecord, EventState, Operation
from sims.flights import Flights
from sims.ledger import Ledger, PromiseBrokenError
from sims.network import Clock
from sims.pins import Pins
from sims.sightings import Sighting, Sightings

DIALS_A_SECOND = 10
"""Of one instance to one address: twice what a link that is lost as soon as it opens leads to."""


class Promises:
    """Watches a cluster; raises `PromiseBrokenError` at the first rule that is broken."""

    def __init__(self, clock: Clock, *, move_deadline_s: float, lease_s: float) -> None:
        self.ledger = Ledger()
        self.pins = Pins(clock, self.ledger)
        self.flights = Flights(clock, self.ledger)
        self.sightings = Sightings(clock)
        self._clock = clock
        self._move_deadline_s = move_deadline_s
        self._lease_s = lease_s
        self._dials: defaultdict[tuple[InstanceId, Address], deque[float]] = defaultdict(lambda: deque(maxlen=DIALS_A_SECOND))
        self._may_free: dict[ChunkKey, float] = {}
        self._reading: dict[tuple[InstanceId, str], tuple[float, frozenset[ChunkKey]]] = {}
        self._given_up: dict[tuple[InstanceId, InstanceId], None] = {}
        self._is_storing = False
        self._children: defaultdict[ChunkKey, list[ChunkKey]] = defaultdict(list)

    def knows_chain(self, keys: list[ChunkKey]) -> None:
        """Chunks that follow on each other, the root first."""
        for parent, key in pairwise(keys):
            if key not in self._children[parent]:
                self._children[parent].append(key)

    def _broken(self, rule: str, what: str, *about: str) -> PromiseBrokenError:
        return PromiseBrokenError(f"{rule} at t={self._clock.now:.4f}: {what}", about)

    # --- what goes in -----------------------------------------------------------------------------------------------------

    def woke(self) -> None:
        """A machine is about to do what is due: no message lets it free anything."""
        self._may_free = {}

    def happened(self, instance: InstanceId, event: Event) -> None:
        """Something is about to happen to a machine."""
        self.sightings.happened(instance, event)
        self._may_free = {}
        self._is_storing = isinstance(event, StoreRequested)
        match event:
            case MessageReceived(message=TakeAnswer() as answer):
                attempt = self.sightings.answered(instance, answer)
                if attempt is not None:
                    owned = (*answer.taken, *answer.already_there)
                    self._may_free = {key: attempt.sent_at for key in owned if key in attempt.released}
            case MessageReceived(message=PlanAnswer(event=None) as refusal):
                self.flights.refused(instance, refusal.event_id)
            case FetchEnded() | RouteRefused():
                self.flights.fetch_ended(instance, event.event_id)
            case ReadEnded():
                self._reading.pop((instance, event.lease), None)
            case EngineLost():
                self._stop_reading(instance)

    def ended(self, instance: InstanceId, how: str) -> None:
        """An instance crashed or left: all that it owned is gone with it."""
        self.ledger.ended(instance, self._clock.now, how)
        self.pins.ended(instance)
        self.flights.ended(instance)
        self.sightings.ended(instance, how)
        self._stop_reading(instance)

    def _stop_reading(self, instance: InstanceId) -> None:
        self._reading = {each: read for each, read in self._reading.items() if each[0] != instance}

    # --- what comes out ---------------------------------------------------------------------------------------------------

    def ordered(self, instance: InstanceId, effect: Effect) -> None:
        """A machine ordered something."""
        self.sightings.ordered(instance, effect)
        match effect:
            case SendMessage():
                self._sent(instance, effect.message)
            case OpenLink():
                self._dialed(instance, effect.address)
            case FetchChunks():
                self.flights.fetch_begins(instance, effect.event_id, effect.chunks)
            case InventoryDoubted():
                raise self._broken("I2", f"{instance} doubts the inventory of {effect.instance}: {effect.reason}")
            case MemberChanged(member=member) if not member.state.is_living:
                self.flights.lost(instance, member.instance)
                self._given_up[instance, member.instance] = None
            case EventChanged():
                self.flights.told(instance, effect.event)
                self._changed(instance, effect.event)
            case Answer(value=Retrieved() as retrieved) if retrieved.lease:
                keys = frozenset(shard.key for shard in retrieved.shards)
                self._reading[instance, retrieved.lease] = (self._clock.now + self._lease_s, keys)

    def _dialed(self, instance: InstanceId, address: Address) -> None:
        """L4: whom one can't reach, one dials ever more seldom."""
        dials = self._dials[instance, address]
        if len(dials) == dials.maxlen and dials[0] > self._clock.now - 1.0:
            raise self._broken("L4", f"{instance} dials {address} more than {DIALS_A_SECOND} times in a second")
        dials.append(self._clock.now)

    def _sent(self, sender: InstanceId, message: Message) -> None:
        match message:
            case PlanRequest():
                self.flights.asked(sender, message)
            case Take():
                seen = self.sightings.moves[message.event_id]
                if seen.record is None or seen.record.operation is not Operation.MOVE:
                    raise self._broken("F9", f"{sender} hands over what is only copied", message.event_id)
                is_first = seen.attempts[message.attempt].sent_at == self._clock.now
                for key in (*message.released, *message.shared) if is_first else ():
                    if self.ledger.open_since(key, sender) is None:
                        raise self._broken(
                            "T1", f"{sender} hands over {key.hex()}, which it doesn't own", message.event_id, key.hex()
                        )
            case TakeAnswer():
                seen = self.sightings.moves[message.event_id]
                attempt = seen.attempts[message.attempt]
                taken_at = attempt.sent_at
                owned = dict.fromkeys((*message.taken, *message.already_there))
                for key in owned:
                    if not self.ledger.owned_after(key, sender, taken_at):
                        raise self._broken(
                            "T4", f"{sender} says that it took {key.hex()}, and doesn't own it", message.event_id, key.hex()
                        )
                if not attempt.is_taken:  # the answer's repeats say nothing of pins: some may have ended since
                    attempt.is_taken = True
                    released = {key: None for key in owned if key in attempt.released}
                    moved = self.pins.handed_over(released, seen.parties.source, sender, sent_at=attempt.sent_at)
                    self.sightings.counts["pin moved along"] += moved

    def admitted(self, key: ChunkKey, instance: InstanceId, stage: str, *, is_right: bool) -> None:
        """Bytes became a resident chunk; `is_right` says whether they were there, and whether they are those of the key."""
        if not is_right:
            raise self._broken(
                "M5", f"{instance} admits bytes as {key.hex()} that aren't here or aren't right", stage, key.hex()
            )
        self.ledger.gained(key, instance, self._clock.now)
        seen = self.sightings.moves.get(stage)
        if seen is not None and not self._may_own(key, instance, seen):
            raise self._broken("F7", f"{instance} owns {key.hex()}, which it has only fetched", stage, key.hex())
        self.sightings.counts["owned after the source's end"] += seen is not None and seen.is_orphan

    def _may_own(self, key: ChunkKey, instance: InstanceId, seen: Sighting) -> bool:
        """F7: what a move has brought is owned when it is taken, when an engine stores it, or when its source is lost.

        What another one counts on too may be owned for that one (F12).
        """
        others = (each for each in self.sightings.moves.values() if each is not seen and each.parties.target == instance)
        is_awaited = any(key in each.keys for each in others)
        is_move = seen.record is not None and seen.record.operation is Operation.MOVE
        is_taken = any(key in attempt.released or key in attempt.shared for attempt in seen.attempts.values())
        is_lost = seen.is_source_lost or (instance, seen.parties.source) in self._given_up
        return not is_move or is_awaited or is_taken or is_lost or self._is_storing

    def released(self, keys: Iterable[ChunkKey], instance: InstanceId, reason: ReleaseReason) -> None:
        """Resident chunks were freed: evicted, or because another owns them."""
        for key in keys:
            if reason is ReleaseReason.MOVED and key not in self._may_free:
                raise self._broken(
                    "T6", f"{instance} frees {key.hex()} without an answer that it is owned elsewhere", key.hex()
                )
            if reason is ReleaseReason.EVICTED:
                self._check_eviction(key, instance)
            if any(self.ledger.open_since(child, instance) is not None for child in self._children.get(key, ())):
                rule = "T3" if reason is ReleaseReason.MOVED else "S5"
                raise self._broken(rule, f"{instance} frees {key.hex()} and keeps what hangs on it", key.hex())
            self.ledger.lost(key, instance, self._clock.now, reason.value)
            self.pins.gone(key, instance)
            if reason is ReleaseReason.MOVED and not self.ledger.is_accounted_for(key, self._may_free[key]):
                raise self._broken("M1", f"{instance} frees {key.hex()}, and nobody owns it any more", key.hex())

    def _check_eviction(self, key: ChunkKey, instance: InstanceId) -> None:
        """S5: nothing that is leased, pinned or in a move."""
        if self.pins.is_pinned(key, instance):
            raise self._broken("S7", f"{instance} evicts {key.hex()}, which is pinned", key.hex())
        for (reader, lease), (until, read) in self._reading.items():
            if reader == instance and key in read and until > self._clock.now:
                raise self._broken("S6", f"{instance} evicts {key.hex()}, which an engine reads under {lease}", key.hex())
        since = self.ledger.open_since(key, instance)
        for event_id, seen in self.sightings.moves.items():
            is_planned = seen.parties.source == instance and seen.is_open and key in seen.keys
            if is_planned and since is not None and since < seen.planned_at:
                raise self._broken("P6", f"{instance} evicts {key.hex()} in the middle of its move", event_id, key.hex())

    # --- events -----------------------------------------------------------------------------------------------------------

    def _changed(self, instance: InstanceId, record: EventRecord) -> None:
        """A node says how an event goes on; its source's word counts."""
        seen = self.sightings.moves[record.event_id]
        if instance != seen.parties.source:
            return
        if seen.words_after_end:
            raise self._broken("E1", "it goes on after its end", record.event_id)
        if not record.state.is_final:
            return
        counts = record.chunks
        if self._clock.now > seen.planned_at + self._move_deadline_s:
            raise self._broken("M6", f"it ended {self._clock.now - seen.planned_at:.1f} s after its plan", record.event_id)
        if counts.found != counts.moved + counts.already_there + counts.shared_kept + counts.failed:
            raise self._broken("E1", f"its counts don't add up: {counts}", record.event_id)
        if record.old_position == record.new_position and (counts.already_there != counts.found or record.nbytes):
            raise self._broken("M3", "something was moved to where it was", record.event_id)
        if record.state is EventState.CANCELLED and seen.attempts:
            raise self._broken("T10", "it was cancelled after a Take", record.event_id)
        if record.state is EventState.DONE:
            self._check_done(record, seen)

    def _check_done(self, record: EventRecord, seen: Sighting) -> None:
        """M2: the target holds all, and after a move the source holds none but the shared."""
        source, target = seen.parties.source, seen.parties.target
        for key in seen.keys:
            if not self.ledger.owned_after(key, target, seen.planned_at):
                raise self._broken("M2", f"it is done, but {target} never held {key.hex()}", record.event_id, key.hex())
            if self.ledger.open_since(key, target) is None and self.ledger.last_end(key, target) == ReleaseReason.EVICTED:
                raise self._broken(
                    "M2", f"it is done, but {target} has evicted {key.hex()} already", record.event_id, key.hex()
                )
        if record.operation is Operation.MOVE:
            kept = [key for key in seen.keys if (self.ledger.open_since(key, source) or self._clock.now) < seen.planned_at]
            if len(kept) > record.chunks.shared_kept:
                raise self._broken("M2", f"it is done, but {source} keeps {len(kept)}: {record.chunks}", record.event_id)

    # --- at rest ----------------------------------------------------------------------------------------------------------

    def open_moves(self) -> list[EventId]:
        """Moves whose source still has to end them."""
        return [event_id for event_id, seen in self.sightings.moves.items() if seen.is_open]

    def check_at_rest(self) -> None:
        """M6, and E4: a source's end costs nothing that its target has verified."""
        if unended := self.open_moves():
            raise self._broken("M6", "it never ended", *unended)
        for seen in [*self.sightings.moves.values(), *self.sightings.past]:
            target = seen.parties.target
            for key, fetched_at in seen.fetched.items() if seen.is_orphan and not seen.is_target_lost else ():
                if not self.ledger.owned_after(key, target, fetched_at):
                    raise self._broken("E4", f"{target} drops what it has verified of its lost source", key.hex())
