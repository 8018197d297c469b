"""What can be seen of each move from outside: by messages, effects and events alone, never by a machine's inside.

The promises are checked against it, blows wait for its phases, and `counts` shows which paths a run went down.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from p2pkv.core.effects import Answer, Effect, EventChanged, FetchChunks, SendMessage
from p2pkv.core.events import Event, FetchEnded, StoreRequested
from p2pkv.core.ids import EventId, InstanceId, Parties, parse_event_id
from p2pkv.core.keys import ChunkKey
from p2pkv.core.messages import FetchReport, InventoryDigest, InventoryPage, ManifestPage, Message, Offer, Take, TakeAnswer
from p2pkv.core.records import EventRecord, EventState
from p2pkv.errors import ErrorCode
from sims.engine import chain
from sims.network import Clock


class Phase(IntEnum):
    """How far a move has got, as far as anyone outside can tell."""

    PLANNED = 0
    FETCHING = 1
    FETCHED = 2
    TAKING = 3
    TAKEN = 4
    ENDED = 5


class Role(StrEnum):
    """What an instance is to a move."""

    SOURCE = "source"
    TARGET = "target"
    COORDINATOR = "coordinator"


@dataclass(slots=True)
class Attempt:
    """One Take, from its first sending on; taken at its first answer, void once an engine has stored anything of it."""

    sent_at: float
    released: dict[ChunkKey, None]
    shared: dict[ChunkKey, None]
    is_taken: bool = False
    is_answered: bool = False
    is_void: bool = False


@dataclass(slots=True)
class Sighting:
    """What was seen of one move.

    Attributes:
        parties: As its event id says.
        planned_at: When its source first spoke of it.
        phase: How far it has got.
        keys: Its manifest, as far as it was told.
        attempts: By number.
        fetched: What the lane brought to the target, and when.
        record: The source's last word.
        words_after_end: How often the source has spoken after its last word.
        is_source_lost: The source's boot has ended since.
        is_orphan: It ended before the move did.
        is_target_lost: The target ended before the move did.
    """

    parties: Parties
    planned_at: float
    phase: Phase = Phase.PLANNED
    keys: dict[ChunkKey, None] = field(default_factory=dict)
    attempts: dict[int, Attempt] = field(default_factory=dict)
    fetched: dict[ChunkKey, float] = field(default_factory=dict)
    record: EventRecord | None = None
    words_after_end: int = 0
    is_source_lost: bool = False
    is_orphan: bool = False
    is_target_lost: bool = False

    @property
    def is_open(self) -> bool:
        """Whether its source still has to end it."""
        return not self.is_source_lost and (self.record is None or not self.record.state.is_final)

    @property
    def last_attempt(self) -> Attempt | None:
        """The latest Take."""
        return self.attempts[max(self.attempts)] if self.attempts else None

    def roles(self, instance: InstanceId) -> list[Role]:
        """What `instance` is to it."""
        return [role for role in Role if getattr(self.parties, role.value) == instance]


PhaseSeen = Callable[[EventId, Sighting], None]


class Sightings:
    """All moves ever seen. `on_phase` hears of each that enters another phase; `counts` of paths, for people and tests."""

    def __init__(self, clock: Clock) -> None:
        self.counts: Counter[str] = Counter()
        self.on_phase: PhaseSeen = lambda *_: None
        self.moves: dict[EventId, Sighting] = {}
        self.past: list[Sighting] = []
        self._clock = clock

    def _of_source(self, event_id: EventId) -> Sighting:
        """The move that its source speaks of: for the first time, again, or as a boot that knows nothing of an earlier's."""
        seen = self.moves.get(event_id)
        if seen is None or seen.is_source_lost:
            parties = parse_event_id(event_id)
            assert parties is not None, f"{event_id!r} isn't an event id"
            self.past += [] if seen is None else [seen]
            self.moves[event_id] = seen = Sighting(parties, self._clock.now)
            self.on_phase(event_id, seen)
        return seen

    def _enter(self, event_id: EventId, phase: Phase) -> None:
        seen = self.moves.get(event_id)
        if seen is not None and phase > seen.phase:
            seen.phase = phase
            self.on_phase(event_id, seen)

    def ordered(self, instance: InstanceId, effect: Effect) -> None:
        """A machine ordered something."""
        match effect:
            case SendMessage(message=message):
                self._sent(message)
            case FetchChunks(event_id=event_id):
                self._enter(event_id, Phase.FETCHING)
            case EventChanged(event=record):
                self._changed(instance, record)
            case Answer(failure=failure) if failure is not None:
                self.counts[f"request refused: {failure.code}"] += 1

    def _sent(self, message: Message) -> None:
        match message:
            case Offer() | ManifestPage():
                keys = dict.fromkeys(chunk.key for chunk in message.chunks)
                self._of_source(message.event_id).keys.update(keys)
                self.counts["manifest page"] += isinstance(message, ManifestPage)
            case InventoryDigest() | InventoryPage():
                self.counts["past the log"] += 1
            case FetchReport(is_complete=True):
                self._enter(message.event_id, Phase.FETCHED)
            case Take():
                self._took(message)
            case TakeAnswer():
                self._enter(message.event_id, Phase.TAKEN)
                self.counts["gone answer"] += bool(message.gone)

    def _took(self, take: Take) -> None:
        seen = self._of_source(take.event_id)
        self._enter(take.event_id, Phase.TAKING)
        if take.attempt in seen.attempts:
            self.counts["take repeated"] += 1
            return
        before = seen.last_attempt
        if before is not None:
            self.counts["later attempt"] += 1
            if not before.is_answered:
                self.counts["attempt closed unanswered"] += 1
        seen.attempts[take.attempt] = Attempt(self._clock.now, dict.fromkeys(take.released), dict.fromkeys(take.shared))

    def _changed(self, instance: InstanceId, record: EventRecord) -> None:
        parties = parse_event_id(record.event_id)
        if parties is None or instance != parties.source:
            return
        seen = self._of_source(record.event_id)
        seen.words_after_end += not seen.is_open
        seen.record = record
        if not record.state.is_final:
            return
        self._enter(record.event_id, Phase.ENDED)
        last = seen.last_attempt
        self.counts["attempt closed unanswered"] += last is not None and not last.is_answered
        self.counts["shared kept"] += bool(record.chunks.shared_kept)
        self.counts["already there"] += bool(record.chunks.already_there)
        if record.state is not EventState.DONE and record.error is not None:
            self.counts[f"move ended: {record.error.code}"] += 1
            self.counts["refused before a byte moved"] += record.error.code is ErrorCode.STORE_FULL and not record.nbytes

    def answered(self, instance: InstanceId, answer: TakeAnswer) -> Attempt | None:
        """The source got an answer; returns the open attempt that it answers, None when it comes too late."""
        seen = self.moves.get(answer.event_id)
        attempt = seen.attempts.get(answer.attempt) if seen is not None else None
        if seen is None or seen.parties.source != instance or attempt is None:
            return None
        if not seen.is_open or attempt.is_answered or attempt.is_void or attempt is not seen.last_attempt:
            self.counts["answer to a closed attempt"] += 1
            return None
        attempt.is_answered = True
        return attempt

    def happened(self, instance: InstanceId, event: Event) -> None:
        """Something is about to happen to a machine."""
        match event:
            case FetchEnded(event_id=event_id, fetched=fetched):
                self.moves[event_id].fetched.update(dict.fromkeys(fetched, self._clock.now))
                self.counts["lane failed"] += event.failure is not None
            case StoreRequested(tokens=tokens):
                self._stored(instance, chain(tokens))

    def _stored(self, instance: InstanceId, keys: list[ChunkKey]) -> None:
        """An engine stores these chunks, whatever is going on with them."""
        for seen in self.moves.values():
            attempt = seen.last_attempt
            if attempt is None or attempt.is_answered or not seen.is_open or seen.parties.source != instance:
                continue
            if any(key in attempt.released for key in keys):
                attempt.is_void = True
                self.counts["engine stored outgoing"] += 1

    def ended(self, instance: InstanceId, how: str) -> None:
        """An instance is gone, in the middle of whatever it took part in."""
        for seen in [*self.moves.values(), *self.past]:
            if seen.is_open:
                for role in seen.roles(instance):
                    self.counts[f"{role} {how} while {seen.phase.name.lower()}"] += 1
            if seen.parties.source == instance:
                seen.is_orphan |= seen.is_open
                seen.is_source_lost = True
            if seen.parties.target == instance:
                seen.is_target_lost = True
