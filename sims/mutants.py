"""Mutants: for each rule of `docs/protocol.md` that keeps a promise, a core without it. The simulator must catch them all.

A mutant replaces one method, or one function where it is used, while `applied`.
"""

from dataclasses import replace
from math import inf
from typing import Any

from p2pkv.core import holdings
from p2pkv.core.events import FetchEnded
from p2pkv.core.health import LocalHealth
from p2pkv.core.history import History
from p2pkv.core.holdings import Holdings
from p2pkv.core.ids import EventId, InstanceId
from p2pkv.core.inventory import InventoryView
from p2pkv.core.keys import ChunkKey
from p2pkv.core.liveness import Liveness
from p2pkv.core.machine import Machine
from p2pkv.core.messages import InventoryDelta, InventoryDigest, InventoryPage, Pin, PlanRequest, Take, TakeAnswer
from p2pkv.core.moves.fetching import Fetching
from p2pkv.core.moves.handover import Handover
from p2pkv.core.moves.plan import find_manifest
from p2pkv.core.moves.source import SourceMoves
from p2pkv.core.moves.source_move import SourceMove
from p2pkv.core.moves.tables import SourceInput, SourceState
from p2pkv.core.moves.target import TargetMoves
from p2pkv.core.moves.target_move import TargetMove
from p2pkv.core.peer_fetch import PeerFetches
from p2pkv.core.records import ChunkCounts, EventRecord, EventState, Operation
from p2pkv.core.residency import Outgoing, Residencies, Residency, Room
from p2pkv.core.suspicion import Suspicion
from p2pkv.errors import ErrorCode, Failure
from sims.mutant import Method, Mutant
from sims.mutants_of_ends import (
    fetches_what_comes,
    forgets_ends,
    keeps_what_it_fetched,
    leaves_unleased,
    never_gives_up,
    overstays,
    owns_at_once,
    takes_for_no_move,
    takes_what_goes_out,
)
from sims.mutants_of_lives import confuses_boots, counts_no_confirmations, feels_always_well, refutes_nothing

# --- the source -----------------------------------------------------------------------------------------------------------


def frees_at_once(right: Method) -> Method:
    """The source frees what it hands over without waiting for an answer."""

    def open_attempt(self: Handover, move: SourceMove, now: float) -> bool:
        is_open: bool = right(self, move, now)
        for key in move.released:
            residency = self._book(move).get(key)
            assert residency is not None, "it has just been released"
            self._holdings.free_moved(self._book(move), residency)
        return is_open

    return open_attempt


def frees_what_is_gone(right: Method) -> Method:
    """The source frees what the target says is gone."""

    def answered(self: Handover, move: SourceMove, answer: TakeAnswer) -> ChunkCounts:
        counts: ChunkCounts = right(self, move, replace(answer, taken=(*answer.taken, *answer.gone)))
        return counts

    return answered


def frees_on_closing(_right: Method) -> Method:
    """The source frees, rather than restores, what an attempt without an answer released."""

    def close_attempt(self: Handover, move: SourceMove) -> None:
        book = self._book(move)
        for key in move.released:
            residency = book.get(key)
            if residency is not None and residency.slot == Outgoing(move.plan.event_id, move.attempt):
                self._holdings.free_moved(book, residency)
        move.released, move.shared = {}, {}

    return close_attempt


def never_restores(_right: Method) -> Method:
    """The source leaves what an attempt without an answer released as if it still were on its way out."""

    def close_attempt(_self: Handover, move: SourceMove) -> None:
        move.released, move.shared = {}, {}

    return close_attempt


def takes_late_answers(right: Method) -> Method:
    """The source takes an answer for a closed attempt for that of the open one."""

    def taken(self: SourceMoves, answer: TakeAnswer, sender: InstanceId, now: float) -> None:
        move = self._open.get(answer.event_id)
        right(self, answer if move is None else replace(answer, attempt=move.attempt), sender, now)

    return taken


def orphans_children(_right: Method) -> Method:
    """The source frees chunks on which others still hang."""

    def stays(_self: Handover, residency: Residency, move: SourceMove) -> bool:
        return residency.chunk.key in move.kept

    return stays


def ignores_engines(_right: Method) -> Method:
    """The source hands over what an engine has stored meanwhile."""

    def keep(_self: SourceMoves, _keys_by_move: dict[EventId, list[ChunkKey]], _now: float) -> None:
        return

    return keep


def cancels_late(right: Method) -> Method:
    """The source lets a move be cancelled after its first Take."""

    def cancel(self: SourceMoves, event_id: EventId, now: float) -> EventRecord | None:
        move = self._open.get(event_id)
        if move is not None and move.state is SourceState.TAKING:
            self._end(move, EventState.CANCELLED, Failure(ErrorCode.CANCELLED, "It was cancelled."), now)
        record: EventRecord | None = right(self, event_id, now)
        return record

    return cancel


def always_done(_right: Method) -> Method:
    """The source says `done` whatever has failed."""

    def finish(self: SourceMoves, move: SourceMove, _by: SourceInput, now: float) -> None:
        self._end(move, EventState.DONE, None, now)

    return finish


def hands_over_copies(right: Method) -> Method:
    """The source gives away what was only to be copied."""

    def finish(self: SourceMoves, move: SourceMove, by: SourceInput, now: float) -> None:
        if move.plan.operation is Operation.COPY and move.state is SourceState.TAKING and not move.attempt:
            self._hand_over(move, now)
        else:
            right(self, move, by, now)

    return finish


def moves_in_place(right: Method) -> Method:
    """The source frees what it was asked to move to where it is."""

    def begin(self: SourceMoves, request: PlanRequest, coordinator: InstanceId, now: float) -> EventRecord | Failure:
        record: EventRecord | Failure = right(self, request, coordinator, now)
        book = self._holdings.books.get(request.old_position.location)
        if request.old_position == request.new_position and book is not None:
            for residency in find_manifest(request, book, self._holdings.namespaces).residencies:
                self._holdings.free_moved(book, residency)
        return record

    return begin


def keeps_leases(right: Method) -> Method:
    """The source keeps its leases after the end of the move."""

    def end(self: SourceMoves, move: SourceMove, state: EventState, error: Failure | None, now: float) -> None:
        right(self, move, state, error, now)
        for chunk in move.manifest:
            residency = self._holdings.books[move.plan.old_position.location].get(chunk.key)
            if residency is not None:
                residency.leases[move.plan.event_id] = move.deadline

    return end


def waits_for_ever(_right: Method) -> Method:
    """The source waits for a lost target to come back, without a deadline."""

    def target_lost(self: SourceMoves, instance: InstanceId, _now: float) -> None:
        for move in self._open.values():
            if move.target == instance:
                move.deadline = move.silent_by = move.answer_by = inf

    return target_lost


def leaves_pins_behind(_right: Method) -> Method:
    """The source hands over what is pinned as if it weren't."""

    def pins(_self: Handover, _move: SourceMove, _now: float) -> tuple[Pin, ...]:
        return ()

    return pins


# --- the target -----------------------------------------------------------------------------------------------------------


def takes_without_owning(_right: Method) -> Method:
    """The target says that it took what it was handed, and doesn't."""

    def own(_self: TargetMoves, move: TargetMove, take: Take, _now: float) -> TakeAnswer:
        taken = (*take.released, *take.shared)
        return TakeAnswer(event_id=move.event_id, attempt=take.attempt, taken=taken, already_there=(), gone=())

    return own


def trusts_the_lane(right: Method) -> Method:
    """The target takes what the lane couldn't verify for verified."""

    def ended(self: Fetching, move: TargetMove, event: FetchEnded, now: float) -> None:
        keys = tuple(residency.chunk.key for residency in self._incoming(move, is_verified=False))
        right(self, move, replace(event, fetched=keys), now)

    return ended


def drops_from_a_lost_source(_right: Method) -> Method:
    """The target drops what it has verified when its source is lost."""

    def source_lost(self: TargetMoves, instance: InstanceId, now: float) -> None:
        for move in [each for each in self._open.values() if each.source == instance]:
            self._close(move, now)

    return source_lost


def flies_twice(_right: Method) -> Method:
    """A lookup starts a flight for what another one is bringing."""

    def flight_with(_self: PeerFetches, _miss: object) -> None:
        return None

    return flight_with


def awaits_flights(right: Method) -> Method:
    """A lookup is told to wait for a flight as long as it is under way."""

    def is_coming(self: PeerFetches, miss: Any, now: float) -> bool:
        is_awaited: bool = right(self, miss, now)
        return is_awaited or self._flight_with(miss) is not None

    return is_coming


# --- what is held ---------------------------------------------------------------------------------------------------------


def makes_no_room(_right: Method) -> Method:
    """An instance holds more than its limit, rather than evicting or refusing."""

    def make_room(_self: Holdings, _book: Residencies, _need: Room, **_limits: float) -> bool:
        return True

    return make_room


def evicts_what_is_leased(_right: Method) -> Method:
    """An instance evicts what is leased."""

    def is_leased(_self: Residency, _now: float) -> bool:
        return False

    return is_leased


def evicts_what_is_pinned(_right: Method) -> Method:
    """An instance evicts what is pinned."""

    def is_pinned(_self: Residency, _now: float) -> bool:
        return False

    return is_pinned


def evicts_prefixes_first(_right: Method) -> Method:
    """An instance evicts what others still hang on."""

    def find_victims(book: Residencies, need: Room, *, now: float, colder_than: float = inf) -> list[Residency] | None:
        victims, free = [], book.free()
        for residency in sorted(book, key=lambda each: each.chunk.start):
            is_needed = residency.slot is not None or residency.is_leased(now) or residency.is_pinned(now)
            is_kept = is_needed or residency.used_at >= colder_than
            if not need.fits(free) and not is_kept:
                victims.append(residency)
                free += book.room_of(residency.chunk)
        return victims if need.fits(free) else None

    return find_victims


def ignores_gaps(right: Method) -> Method:
    """A view of an inventory applies changes after others that it has missed."""

    def apply_delta(self: InventoryView, delta: InventoryDelta) -> bool:
        if delta.generation == self.generation:
            self.sequence = max(self.sequence, delta.first_sequence - 1)
        is_applied: bool = right(self, delta)
        return is_applied

    return apply_delta


def takes_any_page(right: Method) -> Method:
    """A view of an inventory takes a page for what is held at another moment."""

    def apply_page(self: InventoryView, page: InventoryPage) -> bool:
        is_applied: bool = right(self, replace(page, sequence=self.sequence))
        return is_applied

    return apply_page


def trusts_ranges(_right: Method) -> Method:
    """A view of an inventory goes on from a digest without fetching what differs."""

    def compare(self: InventoryView, digest: InventoryDigest) -> None:
        if digest.generation == self.generation and digest.sequence >= self.sequence:
            self.sequence, self.awaits_digest = digest.sequence, False

    return compare


_OF_MOVES = (
    Mutant("T6", "calm", Handover, "open_attempt", frees_at_once, kind="chain"),
    Mutant("T6", "moves", Handover, "answered", frees_what_is_gone, kind="twice"),
    Mutant("T7", "engines", Handover, "close_attempt", frees_on_closing, kind="twice"),
    Mutant("T7", "engines", Handover, "close_attempt", never_restores, kind="twice"),
    Mutant("T7", "engines", SourceMoves, "taken", takes_late_answers, kind="storing_prefix"),
    Mutant("T3", "moves", Handover, "_stays", orphans_children, kind="prefix"),
    Mutant("T8", "engines", SourceMoves, "keep", ignores_engines, kind="storing"),
    Mutant("T10", "moves", SourceMoves, "cancel", cancels_late, kind="cancelled"),
    Mutant("T11", "crowded", Handover, "_pins", leaves_pins_behind),
    Mutant("E1", "moves", SourceMoves, "_finish", always_done, kind="twice"),
    Mutant("F9", "moves", SourceMoves, "_finish", hands_over_copies, kind="copied"),
    Mutant("P5", "calm", SourceMoves, "_begin", moves_in_place, kind="still"),
    Mutant("P6", "moves", SourceMoves, "_end", keeps_leases, kind="twice"),
    Mutant("E5", "apart", SourceMoves, "target_lost", waits_for_ever, kind="still"),
    Mutant("T4", "calm", TargetMoves, "_own", takes_without_owning, kind="twice"),
    Mutant("F6", "moves", Fetching, "ended", trusts_the_lane, kind="twice"),
    Mutant("E4", "crashes", TargetMoves, "source_lost", drops_from_a_lost_source, kind="twice"),
    Mutant("T1", "crossing", TargetMoves, "_own", takes_what_goes_out, kind="crossing"),
    Mutant("T5", "apart", TargetMoves, "take", takes_for_no_move, kind="twice", early=1),
    Mutant("T9", "crowded", TargetMoves, "_own", leaves_unleased),
    Mutant("F7", "moves", Fetching, "ended", owns_at_once, kind="twice"),
    Mutant("F4", "moves", Fetching, "_next_batch", fetches_what_comes, kind="twice"),
    Mutant("E3", "moves", Fetching, "drop_fetched", keeps_what_it_fetched, kind="cancelled"),
    Mutant("E6", "apart", SourceMoves, "_gives_up_at", never_gives_up, kind="still", early=1),
    Mutant("E7", "crossing", Machine, "_leave", overstays),
    Mutant("E8", "moves", History, "put", forgets_ends, kind="cancelled"),
)
MUTANTS = {
    mutant.wrong.__name__: mutant
    for mutant in (
        *_OF_MOVES,
        Mutant("S4", "crowded", Holdings, "make_room", makes_no_room),
        Mutant("S5", "crowded", Residency, "is_leased", evicts_what_is_leased),
        Mutant("S5", "crowded", holdings, "find_victims", evicts_prefixes_first),
        Mutant("S7", "crowded", Residency, "is_pinned", evicts_what_is_pinned),
        Mutant("I2", "moves", InventoryView, "apply_delta", ignores_gaps),
        Mutant("I3", "short_log", InventoryView, "compare", trusts_ranges),
        Mutant("I4", "short_log", InventoryView, "apply_page", takes_any_page),
        Mutant("R4", "peer_fetch", PeerFetches, "_flight_with", flies_twice),
        Mutant("L11", "half_lost", Liveness, "_told_of_me", refutes_nothing),
        Mutant("L13", "silent", Suspicion, "confirm", counts_no_confirmations),
        Mutant("L12", "clogged", LocalHealth, "_add", feels_always_well),
        Mutant("L6", "restarts", Liveness, "_told", confuses_boots),
        Mutant("R5", "peer_fetch", PeerFetches, "_is_coming", awaits_flights),
    )
}
