"""Handing chunks over: the attempts by which a move's source gives away what its target holds.

Each attempt names up to `TAKE_BATCH_KEYS` chunks from the manifest's end, suffix first, so that whatever stops it leaves a
prefix. What it releases is `Outgoing` until the answer for that very attempt: then it is freed or restored. What it shares
stays here as well, since other chunks hang on it. Pins go along.
"""

from dataclasses import replace

from p2pkv.core.config import MachineConfig
from p2pkv.core.holdings import Holdings
from p2pkv.core.keys import ChunkKey
from p2pkv.core.messages import TAKE_BATCH_KEYS, Pin, Take, TakeAnswer
from p2pkv.core.moves.source_move import SourceMove
from p2pkv.core.outbox import Outbox
from p2pkv.core.records import ChunkCounts
from p2pkv.core.residency import Outgoing, Residencies, Residency, Writing

TAKE_ANSWER_S = 10.0
"""The target answers a Take at once; one that is stopped for longer keeps what it took, and the source keeps it too."""


class Handover:
    """Opens, answers and closes the attempts of moves."""

    def __init__(self, config: MachineConfig, holdings: Holdings, outbox: Outbox) -> None:
        self._generation = config.generation
        self._holdings = holdings
        self._outbox = outbox

    def open_attempt(self, move: SourceMove, now: float) -> bool:
        """Hand over the next batch; False when nothing is left to hand over."""
        move.attempt += 1
        move.attempt_from = move.remaining
        book = self._book(move)
        while move.remaining and len(move.released) + len(move.shared) < TAKE_BATCH_KEYS:
            move.remaining -= 1
            key = move.manifest[move.remaining].key
            residency = book.get(key)
            if residency is None or residency.slot is not None:
                continue
            if self._stays(residency, move):
                move.shared[key] = None
            else:
                residency.slot = Outgoing(move.plan.event_id, move.attempt)
                move.released[key] = None
        if not move.released and not move.shared:
            return False
        move.answer_by = now + TAKE_ANSWER_S
        self.send(move, now)
        return True

    def send(self, move: SourceMove, now: float) -> None:
        """Send the open attempt, for the first time or again."""
        take = Take(
            event_id=move.plan.event_id,
            attempt=move.attempt,
            source_generation=self._generation,
            target_generation=move.target_generation,
            released=tuple(move.released),
            shared=tuple(move.shared),
            pins=self._pins(move, now),
        )
        self._outbox.send(move.target, take)

    def _pins(self, move: SourceMove, now: float) -> tuple[Pin, ...]:
        named = (self._book(move).get(key) for key in (*move.released, *move.shared))
        pinned = (residency for residency in named if residency is not None and residency.is_pinned(now))
        return tuple(Pin(residency.chunk.key, residency.pinned_until - now) for residency in pinned)

    def answered(self, move: SourceMove, answer: TakeAnswer) -> ChunkCounts:
        """Close the open attempt by its answer: free what the target owns, restore the rest.

        Returns:
            The move's counts with this attempt's in them.
        """
        book = self._book(move)
        already_there = dict.fromkeys(answer.already_there)
        owned = already_there | dict.fromkeys(answer.taken)
        kept = sum(key in owned for key in move.shared)
        moved = there = 0
        for key in move.released:
            residency = self._close(move, key, book)
            if residency is None or key not in owned:
                continue
            if self._stays(residency, move):
                kept += 1
                continue
            self._holdings.free_moved(book, residency)
            there += key in already_there
            moved += key not in already_there
        move.released, move.shared = {}, {}
        counts = move.record.chunks
        return replace(
            counts,
            moved=counts.moved + moved,
            already_there=counts.already_there + there,
            shared_kept=counts.shared_kept + kept,
        )

    def close_attempt(self, move: SourceMove) -> None:
        """What the open attempt released belongs here as before; answers for it come too late from now on."""
        book = self._book(move)
        for key in move.released:
            self._close(move, key, book)
        move.released, move.shared = {}, {}

    def _close(self, move: SourceMove, key: ChunkKey, book: Residencies) -> Residency | None:
        residency = book.get(key)
        if residency is None or residency.slot != Outgoing(move.plan.event_id, move.attempt):
            return None
        residency.slot = None
        return residency

    def _stays(self, residency: Residency, move: SourceMove) -> bool:
        """Whether an engine stored it again, or a chunk hangs on it that is, or is about to be, owned and stays here."""
        key = residency.chunk.key
        return key in move.kept or any(
            isinstance(child.slot, Writing)
            or (child.is_owned and not (isinstance(child.slot, Outgoing) and child.slot.move == move.plan.event_id))
            for child in self._book(move).children(key)
        )

    def _book(self, move: SourceMove) -> Residencies:
        return self._holdings.books[move.plan.old_position.location]
