"""The promises, checked from outside on every step: who owns what is known from effects and messages alone.

It is the ledger of `sims/ledger` without its history: what has to be remembered of the past is kept for each move, so that two
runs that come to the same place are one. All of it is values; each step makes new ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from p2pkv.core.effects import (
    ENGINE_STAGE,
    AdmitStaged,
    Answer,
    CancelFetch,
    DropStaged,
    Effect,
    EventChanged,
    Lent,
    ReleaseChunks,
    ReleaseReason,
    SendMessage,
)
from p2pkv.core.events import FetchEnded, StoreRequested
from p2pkv.core.ids import EventId, InstanceId, Parties, StageId, parse_event_id
from p2pkv.core.keys import ChunkKey, TokenBytes
from p2pkv.core.messages import Message, Offer, Take, TakeAnswer
from p2pkv.core.records import EventRecord, EventState, Operation
from sims.handover.ends import Happening, Heard, PeerLost, chunks_of
from sims.handover.kinds import CHUNKS
from sims.ledger import PromiseBrokenError

Keys = frozenset[ChunkKey]
NONE: Keys = frozenset()


@dataclass(frozen=True, slots=True)
class MoveSeen:
    """What has been seen of a move.

    Attributes:
        event_id: Its name.
        keys: Its manifest; None before it is planned.
        held: Chunks of it that its target has owned at any time since.
        kept: Those that its source has owned all the time since.
        fetched: Those that its target has verified and neither owns nor has dropped.
        attempt: The last that its source has sent a Take for.
        released: What that Take releases.
        is_answered: Whether its source has had an answer to it.
        is_copy: Whether it is one, as far as is known.
        is_source_lost: Whether its target knows that its source is dead.
        end: How it has ended, by its source's word.
    """

    event_id: EventId
    keys: Keys | None = None
    held: Keys = NONE
    kept: Keys = NONE
    fetched: Keys = NONE
    attempt: int = 0
    released: Keys = NONE
    is_answered: bool = False
    is_copy: bool = False
    is_source_lost: bool = False
    end: EventState | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What has been seen of a run.

    Attributes:
        owned: By each instance.
        staged: At whom, for whom, which bytes wait.
        cancelled: Fetches that were cancelled: at whom, of what.
        ended: What an instance owned that has crashed.
        moves: All moves.
    """

    owned: tuple[tuple[InstanceId, Keys], ...]
    moves: tuple[MoveSeen, ...]
    staged: frozenset[tuple[InstanceId, StageId, ChunkKey]] = frozenset()
    cancelled: frozenset[tuple[InstanceId, EventId]] = frozenset()
    ended: Keys = NONE


class Witness:
    """Follows one run, step by step."""

    def __init__(self, seen: Seen) -> None:
        self._owned = dict(seen.owned)
        self._moves = {move.event_id: move for move in seen.moves}
        self._staged = seen.staged
        self._cancelled = seen.cancelled
        self._ended = seen.ended

    def seen(self) -> Seen:
        """What it has seen by now."""
        return Seen(tuple(self._owned.items()), tuple(self._moves.values()), self._staged, self._cancelled, self._ended)

    def _broken(self, rule: str, what: str, *about: str) -> PromiseBrokenError:
        return PromiseBrokenError(f"{rule}: {what}", about)

    def _note(self, event_id: EventId, **changes: Any) -> None:
        self._moves[event_id] = replace(self._moves[event_id], **changes)

    # --- what happens -----------------------------------------------------------------------------------------------------

    def crashed(self, name: InstanceId) -> None:
        """An instance is gone, with all that it owned."""
        self._ended |= self._owned[name]
        self._owned[name] = NONE
        self._staged = frozenset(each for each in self._staged if each[0] != name)

    def carried(self, name: InstanceId, stage: StageId, keys: Sequence[ChunkKey]) -> None:
        """A lane has brought bytes."""
        self._staged |= {(name, stage, key) for key in keys}

    def stepped(self, name: InstanceId, happening: Happening, effects: Sequence[Effect]) -> None:
        """Something happened at an instance, and led to this."""
        may_free = self._may_free(name, happening)
        lost = happening.instance if isinstance(happening, PeerLost) else None
        for move in [each for each in self._moves.values() if _parties(each.event_id).source == lost]:
            if _parties(move.event_id).target == name:
                self._note(move.event_id, is_source_lost=True)
        if isinstance(happening, FetchEnded):
            move = self._moves[happening.event_id]
            self._note(move.event_id, fetched=move.fetched | set(happening.fetched))
            self._cancelled -= {(name, move.event_id)}
        for effect in effects:
            match effect:
                case AdmitStaged():
                    self._check_may_own(name, effect.stage, effect.key, happening)
                    self._admitted(name, effect.stage, effect.key)
                case DropStaged():
                    self._dropped(name, effect.stage, effect.key, lost)
                case CancelFetch():
                    self._cancelled |= {(name, effect.event_id)}
                case ReleaseChunks():
                    for key in effect.keys:
                        self._freed(name, key, effect.reason, may_free)
                case SendMessage():
                    self._sent(name, effect.message)
                case EventChanged():
                    self._changed(name, effect.event)
                case Answer(value=Lent() as lent):  # an engine writes before it commits
                    self.carried(name, ENGINE_STAGE, [shard.key for shard in lent.shards])

    def _may_free(self, name: InstanceId, happening: Happening) -> Keys:
        """T6: what may be freed on this, and on nothing else."""
        if isinstance(happening, StoreRequested):
            self._stored(name, happening.tokens)
        if not isinstance(happening, Heard) or not isinstance(happening.message, TakeAnswer):
            return NONE
        answer = happening.message
        move = self._moves[answer.event_id]
        if move.is_answered or answer.attempt != move.attempt or move.end is not None:
            return NONE
        self._note(move.event_id, is_answered=True)
        return move.released & {*answer.taken, *answer.already_there}

    def _stored(self, name: InstanceId, tokens: TokenBytes) -> None:
        """T8: what an engine stores at a source is in use there: no answer to a Take that has released it counts any more."""
        stored = {chunk.key for chunk in chunks_of(tokens)}
        for move in list(self._moves.values()):
            if _parties(move.event_id).source == name and stored & move.released:
                self._note(move.event_id, is_answered=True)

    # --- who owns what ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _goes_to(name: InstanceId, key: ChunkKey, move: MoveSeen) -> bool:
        return _parties(move.event_id).target == name and key in (move.keys or NONE)

    def _check_may_own(self, name: InstanceId, stage: StageId, key: ChunkKey, happening: Happening) -> None:
        """F7: what a move has brought is owned when it is taken, when its source is lost, or when an engine stores it.

        What another one counts on too may be owned for that one (F12).
        """
        if any(move.event_id != stage and self._goes_to(name, key, move) for move in self._moves.values()):
            return
        match happening:
            case Heard(message=Take() as take):
                may_own = stage == take.event_id and key in (*take.released, *take.shared)
            case FetchEnded(event_id=event_id):
                move = self._moves[event_id]
                may_own = stage == event_id and (move.is_copy or move.is_source_lost)
            case PeerLost(instance=instance):
                may_own = _parties(stage).source == instance
            case StoreRequested():
                may_own = True
            case _:
                may_own = stage == ENGINE_STAGE
        if not may_own:
            raise self._broken("F7", f"{name} owns {key.hex()}, which it has only fetched", stage, key.hex())

    def _admitted(self, name: InstanceId, stage: StageId, key: ChunkKey) -> None:
        if (name, stage, key) not in self._staged:
            raise self._broken("M5", f"{name} admits {key.hex()}, whose bytes it hasn't", stage, key.hex())
        if key in self._owned[name]:
            raise self._broken("M5", f"{name} admits {key.hex()} twice", key.hex())
        self._staged -= {(name, stage, key)}
        self._owned[name] |= {key}
        for move in list(self._moves.values()):
            if move.event_id == stage:
                self._note(move.event_id, fetched=move.fetched - {key})
            if _parties(move.event_id).target == name and move.keys is not None and key in move.keys:
                self._note(move.event_id, held=move.held | {key})

    def _dropped(self, name: InstanceId, stage: StageId, key: ChunkKey, lost: InstanceId | None) -> None:
        self._staged -= {(name, stage, key)}
        move = self._moves.get(stage)
        if move is None:
            return
        if _parties(stage).source == lost and key in move.fetched:
            raise self._broken("E4", f"{name} drops {key.hex()}, verified, as its source is lost", stage, key.hex())
        self._note(stage, fetched=move.fetched - {key})

    def _freed(self, name: InstanceId, key: ChunkKey, reason: ReleaseReason, may_free: Keys) -> None:
        if reason is not ReleaseReason.MOVED:
            raise self._broken("S5", f"{name} has {reason} {key.hex()}, and has room enough", key.hex())
        if key not in may_free:
            raise self._broken("T6", f"{name} frees {key.hex()} without an answer that it is owned elsewhere", key.hex())
        if any(chunk.parent == key and chunk.key in self._owned[name] for chunk in CHUNKS):
            raise self._broken("T3", f"{name} frees {key.hex()} and keeps what hangs on it", key.hex())
        self._owned[name] -= {key}
        if key not in self._ended and not any(key in owned for owned in self._owned.values()):
            raise self._broken("M1", f"{name} frees {key.hex()}, and nobody else owns it", key.hex())
        for move in list(self._moves.values()):
            if _parties(move.event_id).source == name:
                self._note(move.event_id, kept=move.kept - {key})

    # --- what is said -----------------------------------------------------------------------------------------------------

    def _sent(self, name: InstanceId, message: Message) -> None:
        match message:
            case Offer():
                self._offered(message)
            case Take():
                self._took(name, message)
            case TakeAnswer():
                move = self._moves[message.event_id]
                for key in (*message.taken, *message.already_there):
                    if key not in move.held:
                        about = (message.event_id, key.hex())
                        raise self._broken("T4", f"{name} says that it took {key.hex()}, and never owned it", *about)

    def _offered(self, offer: Offer) -> None:
        if self._moves[offer.event_id].keys is not None:
            return
        keys = frozenset(chunk.key for chunk in offer.chunks)
        source, target = offer.old_position.instance, offer.new_position.instance
        kept, held, is_copy = keys & self._owned[source], keys & self._owned[target], offer.operation is Operation.COPY
        self._note(offer.event_id, keys=keys, kept=kept, held=held, is_copy=is_copy)

    def _took(self, name: InstanceId, take: Take) -> None:
        move = self._moves[take.event_id]
        if take.attempt == move.attempt:
            return
        for key in (*take.released, *take.shared):
            if key not in self._owned[name]:
                raise self._broken("T1", f"{name} hands over {key.hex()}, which it doesn't own", take.event_id, key.hex())
        self._note(take.event_id, attempt=take.attempt, released=frozenset(take.released), is_answered=False)

    def _changed(self, name: InstanceId, record: EventRecord) -> None:
        """A node says how an event goes on; its source's word counts."""
        move = self._moves[record.event_id]
        if name != record.old_position.instance:
            return
        if move.end is not None:
            raise self._broken("E1", "it goes on after its end", record.event_id)
        if not record.state.is_final:
            return
        counts = record.chunks
        if counts.found != counts.moved + counts.already_there + counts.shared_kept + counts.failed:
            raise self._broken("E1", f"its counts don't add up: {counts}", record.event_id)
        if record.old_position == record.new_position and (counts.already_there != counts.found or record.nbytes):
            raise self._broken("M3", "something was moved to where it was", record.event_id)
        if record.state is EventState.CANCELLED and move.attempt:
            raise self._broken("T10", "it was cancelled after a Take", record.event_id)
        if record.operation is Operation.COPY and move.attempt:
            raise self._broken("F9", "what is only copied was handed over", record.event_id)
        if record.state is EventState.DONE:
            if missing := (move.keys or NONE) - move.held:
                about = [key.hex() for key in missing]
                raise self._broken("M2", f"it is done, but its target never held {', '.join(about)}", record.event_id, *about)
            if record.operation is Operation.MOVE and len(move.kept) > counts.shared_kept:
                raise self._broken("M2", f"it is done, but {name} keeps {len(move.kept)}: {counts}", record.event_id)
        self._note(record.event_id, end=record.state)


def _parties(event_id: EventId) -> Parties:
    parties = parse_event_id(event_id)
    assert parties is not None, "it was made as one"
    return parties
