"""Mutants of what a move's two ends, and those who hear of it, keep to; `mutants` lists them with all others."""

from dataclasses import replace
from math import inf

from p2pkv.core.chunks import Chunk
from p2pkv.core.events import FetchEnded
from p2pkv.core.history import History
from p2pkv.core.ids import InstanceId
from p2pkv.core.machine import Machine
from p2pkv.core.messages import Take, TakeAnswer
from p2pkv.core.moves.fetching import Fetching
from p2pkv.core.moves.source import SourceMoves
from p2pkv.core.moves.source_move import SourceMove
from p2pkv.core.moves.target import TargetMoves
from p2pkv.core.moves.target_move import TargetMove
from p2pkv.core.records import EventRecord
from p2pkv.core.residency import NO_ROOM, Outgoing, Room
from sims.mutant import Method


def takes_what_goes_out(right: Method) -> Method:
    """The target says that it holds what another move is taking away from it."""

    def own(self: TargetMoves, move: TargetMove, take: Take, now: float) -> TakeAnswer:
        answer: TakeAnswer = right(self, move, take, now)
        book = self._fetching.book(move)
        residencies = ((key, book.get(key)) for key in answer.gone)
        here = tuple(key for key, each in residencies if each is not None and isinstance(each.slot, Outgoing))
        gone = tuple(key for key in answer.gone if key not in here)
        return replace(answer, already_there=(*answer.already_there, *here), gone=gone)

    return own


def takes_for_no_move(right: Method) -> Method:
    """The target says that it took what it was handed by a move that it doesn't know, or not any more."""

    def take(self: TargetMoves, handed: Take, sender: InstanceId, now: float) -> None:
        if self.is_open(handed.event_id):
            right(self, handed, sender, now)
        else:
            keys = (*handed.released, *handed.shared)
            answer = TakeAnswer(event_id=handed.event_id, attempt=handed.attempt, taken=keys, already_there=(), gone=())
            self._outbox.send(sender, answer)

    return take


def leaves_unleased(right: Method) -> Method:
    """The target lets go at once what it took, before its move has ended."""

    def own(self: TargetMoves, move: TargetMove, take: Take, now: float) -> TakeAnswer:
        answer: TakeAnswer = right(self, move, take, now)
        for key in (*answer.taken, *answer.already_there):
            residency = self._fetching.book(move).get(key)
            assert residency is not None, "it is owned"
            residency.leases.pop(move.event_id, None)
        return answer

    return own


def owns_at_once(right: Method) -> Method:
    """The target owns what it has fetched without waiting for a Take."""

    def ended(self: Fetching, move: TargetMove, event: FetchEnded, now: float) -> None:
        right(self, move, event, now)
        self.own_fetched(move, now)

    return ended


def fetches_what_comes(_right: Method) -> Method:
    """The target fetches what another move is bringing, or has brought, as well."""

    def next_batch(self: Fetching, move: TargetMove) -> tuple[list[Chunk], Room]:
        batch = [move.pending.pop(0)] if move.pending else []
        return batch, sum(map(self.book(move).room_of, batch), NO_ROOM)

    return next_batch


def keeps_what_it_fetched(_right: Method) -> Method:
    """The target keeps what it has fetched and doesn't own after the end of its move."""

    def drop_fetched(_self: Fetching, _move: TargetMove, _now: float) -> None:
        return

    return drop_fetched


def never_gives_up(_right: Method) -> Method:
    """The source waits for its target without a deadline."""

    def gives_up_at(_self: SourceMoves, _move: SourceMove) -> float:
        return inf

    return gives_up_at


def overstays(right: Method) -> Method:
    """An instance that leaves waits for its open moves as long as they take."""

    def leave(self: Machine, now: float) -> None:
        right(self, now)
        self._leave_by = 1e9

    return leave


def forgets_ends(right: Method) -> Method:
    """An event is forgotten as soon as it has ended."""

    def put(self: History, record: EventRecord, now: float) -> bool:
        is_news: bool = right(self, record, now)
        if record.state.is_final and record.event_id in self._records:
            self._forget(record.event_id)
        return is_news

    return put
