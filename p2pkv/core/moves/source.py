"""The source's end of its moves: plan, offer, hand over, free.

Rules (`docs/protocol.md` numbers them):
    A chunk is freed only on the target's answer for the attempt that is open. On anything else - `gone`, no answer, the
    target's end, a deadline - it is restored, and late answers are ignored (`handover`).
    Only this end writes the event's state; it ends by its deadline.

Not decided here: what may be moved (`plan`), what the target does (`target`).
"""

from dataclasses import replace
from math import inf
from random import Random

from p2pkv.core.config import MachineConfig
from p2pkv.core.effects import EventChanged
from p2pkv.core.history import History
from p2pkv.core.holdings import Holdings
from p2pkv.core.ids import EventId, InstanceId, Parties, parse_event_id
from p2pkv.core.keys import ChunkKey
from p2pkv.core.membership import Membership
from p2pkv.core.messages import (
    MANIFEST_PAGE_CHUNKS,
    EventReport,
    FetchReport,
    ManifestPage,
    ManifestRequest,
    Offer,
    PlanAnswer,
    PlanRequest,
    TakeAnswer,
)
from p2pkv.core.moves.handover import Handover
from p2pkv.core.moves.plan import Manifest, find_manifest, namespace_problem, unknown_location
from p2pkv.core.moves.repeats import Repeats
from p2pkv.core.moves.source_move import LaneGrant, SourceMove
from p2pkv.core.moves.tables import SOURCE, SourceInput, SourceState
from p2pkv.core.outbox import Outbox
from p2pkv.core.records import ChunkCounts, EventRecord, EventState, Operation, end_state
from p2pkv.core.residency import Outgoing
from p2pkv.errors import ErrorCode, Failure

RESEND_S = 1.0
"""A message that may be lost is repeated after this: twice the slowest answer seen on a busy machine."""
OPEN_MOVES_MAX = 4096
"""Each holds its manifest, about 1 KiB a chunk."""


class SourceMoves:
    """All open moves whose source is this instance."""

    def __init__(
        self, config: MachineConfig, holdings: Holdings, membership: Membership, history: History, outbox: Outbox, rng: Random
    ) -> None:
        self._config = config
        self._holdings = holdings
        self._membership = membership
        self._history = history
        self._outbox = outbox
        self._rng = rng
        self._handover = Handover(config, holdings, outbox)
        self._repeats = Repeats(history)
        self._open: dict[EventId, SourceMove] = {}
        self.is_leaving = False

    # --- plan and offer ---------------------------------------------------------------------------------------------------

    def plan(self, request: PlanRequest, coordinator: InstanceId, now: float) -> None:
        """Answer the coordinator, and begin the move if there is anything to move."""
        answer: EventRecord | Failure | None = self._history.get(request.event_id) or self._repeats.find(request)
        if answer is None:
            answer = self._begin(request, coordinator, now)
        if isinstance(answer, Failure):
            self._outbox.send(coordinator, PlanAnswer(event_id=request.event_id, event=None, failure=answer))
        else:
            has_key = request.idempotency_key is not None
            planned = PlanAnswer(event_id=request.event_id, event=answer, failure=None, has_key=has_key)
            self._outbox.send(coordinator, planned)

    def _begin(self, request: PlanRequest, coordinator: InstanceId, now: float) -> EventRecord | Failure:
        old, new = request.old_position, request.new_position
        if (
            parse_event_id(request.event_id) != Parties(self._config.instance, new.instance, coordinator)
            or old.instance != self._config.instance
        ):
            return Failure(ErrorCode.PROTOCOL_ERROR, f"The event id {request.event_id!r} doesn't name this move's parties.")
        if self.is_leaving:
            return Failure(ErrorCode.LEAVING, f"Instance {old.instance!r} is leaving the cluster and starts no more moves.")
        if len(self._open) >= OPEN_MOVES_MAX:
            return Failure(
                ErrorCode.INSTANCE_UNREACHABLE, f"{OPEN_MOVES_MAX} moves from {old.instance!r} are open; try again later."
            )
        book = self._holdings.books.get(old.location)
        if book is None:
            return unknown_location(old, self._holdings.books)
        if (problem := self._membership.unreachable(new.instance)) is not None:
            return problem
        target = self._membership.record_of(new.instance)
        assert target is not None, "it is reachable"
        target_locations = [status.location for status in target.locations]
        if new.location not in target_locations:
            return unknown_location(new, target_locations)
        manifest = find_manifest(request, book, self._holdings.namespaces)
        namespaces = self._holdings.namespaces_of(manifest.chunks)
        is_same = old == new
        if not is_same and (mismatch := namespace_problem(namespaces, target)) is not None:
            return mismatch
        found = len(manifest.residencies)
        is_over = is_same or not found
        wall = now + self._config.wall_offset_s
        record = EventRecord(
            event_id=request.event_id,
            state=EventState.DONE if is_over else EventState.RUNNING,
            old_position=old,
            new_position=new,
            operation=request.operation,
            chunks=ChunkCounts(found=found, already_there=found if is_same else 0),
            num_tokens=manifest.num_tokens,
            nbytes=0,
            lane=None,
            started_at=wall,
            finished_at=wall if is_over else None,
            coordinator=coordinator,
            error=None,
        )
        if not is_over:
            self._open_move(request, record, manifest, target.generation, now)
        self._keep(record, now)
        self._repeats.add(request)
        return record

    def _open_move(
        self, request: PlanRequest, record: EventRecord, manifest: Manifest, target_generation: int, now: float
    ) -> None:
        deadline = now + self._config.move_deadline_s
        for residency in manifest.residencies:
            residency.leases[request.event_id] = deadline
        move = SourceMove(
            plan=request,
            record=record,
            manifest=manifest.chunks,
            ticket=self._rng.randbytes(32),
            target_generation=target_generation,
            idle_s=0.0 if request.reader is not None else now - max(residency.used_at for residency in manifest.residencies),
            deadline=deadline,
            silent_by=now + self._config.lease_s,
            resend_at=now + RESEND_S,
            remaining=len(manifest.residencies),
        )
        self._open[request.event_id] = move
        self._offer(move, now)

    def _offer(self, move: SourceMove, now: float) -> None:
        offer = Offer(
            event_id=move.plan.event_id,
            source_generation=self._config.generation,
            target_generation=move.target_generation,
            operation=move.plan.operation,
            old_position=move.plan.old_position,
            new_position=move.plan.new_position,
            namespaces=self._holdings.namespaces_of(move.manifest),
            ticket=move.ticket,
            chunk_count=len(move.manifest),
            num_tokens=move.record.num_tokens,
            charged_nbytes=sum(chunk.charged_nbytes for chunk in move.manifest),
            idle_s=move.idle_s,
            deadline_s=move.deadline - now,
            chunks=move.manifest[:MANIFEST_PAGE_CHUNKS],
        )
        self._outbox.send(move.target, offer)

    def page(self, request: ManifestRequest, sender: InstanceId) -> None:
        """Send the target a page of its manifest."""
        move = self._open_with(request.event_id, sender)
        if move is not None and request.first_index < len(move.manifest):
            chunks = move.manifest[request.first_index : request.first_index + MANIFEST_PAGE_CHUNKS]
            page = ManifestPage(event_id=request.event_id, first_index=request.first_index, chunks=chunks)
            self._outbox.send(sender, page)

    def lane_grant(self, event_id: EventId) -> LaneGrant | None:
        """What the lane may hand over for this move; None when it isn't open."""
        move = self._open.get(event_id)
        if move is None:
            return None
        return LaneGrant(move.ticket, frozenset(chunk.key for chunk in move.manifest), move.plan.old_position.location)

    # --- the target's progress --------------------------------------------------------------------------------------------

    def report(self, report: FetchReport, sender: InstanceId, now: float) -> None:
        """The target says how far it has got; what can't be true is ignored."""
        move = self._open_with(report.event_id, sender)
        if move is None:
            self._remind(report.event_id, sender)
            return
        if report.fetched_count + report.already_there_count > len(move.manifest):
            return
        move.silent_by = now + self._config.lease_s
        entered = SOURCE[move.state].get(SourceInput.FETCHED if report.is_complete else SourceInput.PROGRESS)
        if entered is None:
            return
        move.state = entered
        move.problem = report.failure
        is_copy = move.plan.operation is Operation.COPY
        counts = move.record.chunks
        if is_copy and report.is_complete:
            counts = replace(counts, moved=report.fetched_count, already_there=report.already_there_count)
        move.record = replace(move.record, nbytes=report.nbytes, lane=report.lane, chunks=counts)
        if entered is SourceState.TAKING:
            if is_copy or not report.fetched_count + report.already_there_count:
                self._finish(move, SourceInput.FINISHED, now)
            else:
                self._hand_over(move, now)
        self._tell_progress(move, now)

    def _remind(self, event_id: EventId, sender: InstanceId) -> None:
        """The target missed the end of a move: tell it, or tell it that nothing is known."""
        self._outbox.send(sender, EventReport(event_id=event_id, event=self._history.get(event_id)))

    def taken(self, answer: TakeAnswer, sender: InstanceId, now: float) -> None:
        """The target says what it owns."""
        move = self._open_with(answer.event_id, sender)
        if move is None or move.state is not SourceState.TAKING or answer.attempt != move.attempt:
            return
        counts = self._handover.answered(move, answer)
        move.state = SOURCE[move.state][SourceInput.ANSWERED]
        move.record = replace(move.record, chunks=counts)
        self._hand_over(move, now)
        self._tell_progress(move, now)

    def keep(self, keys_by_move: dict[EventId, list[ChunkKey]], now: float) -> None:
        """An engine, or a move of a lower id, wants these chunks here while they are on their way out: close their attempts.

        What those attempts named is handed over anew, but these chunks stay here too, as shared ones.
        """
        moves = [self._open[event_id] for event_id in keys_by_move]
        kept = dict.fromkeys(key for keys in keys_by_move.values() for key in keys)
        for move in moves:  # all of them, before one takes what another had
            self._handover.close_attempt(move)
            move.kept.update(kept)
            move.remaining = move.attempt_from
        for move in moves:
            self._hand_over(move, now)

    def _hand_over(self, move: SourceMove, now: float) -> None:
        move.resend_at = now + RESEND_S
        if self.is_leaving or not self._handover.open_attempt(move, now):
            self._finish(move, SourceInput.FINISHED, now)

    # --- ends -------------------------------------------------------------------------------------------------------------

    def cancel(self, event_id: EventId, now: float) -> EventRecord | None:
        """End a move of which nothing was handed over yet; returns its event, cancelled or not, None when it isn't known."""
        move = self._open.get(event_id)
        if move is not None and SourceInput.CANCELLED in SOURCE[move.state]:
            move.state = SOURCE[move.state][SourceInput.CANCELLED]
            self._end(move, EventState.CANCELLED, Failure(ErrorCode.CANCELLED, "It was cancelled."), now)
        return self._history.get(event_id)

    def target_lost(self, instance: InstanceId, now: float) -> None:
        """An instance died, left, or is another boot of itself: end the moves to it, restore what it hasn't answered for."""
        for move in [each for each in self._open.values() if each.target == instance]:
            self._fail(move, ErrorCode.INSTANCE_UNREACHABLE, f"Instance {instance!r} was lost during the move.", now)

    def leave(self, now: float) -> None:
        """Start no more moves, and end those of which nothing was handed over; the others finish their open attempt."""
        self.is_leaving = True
        self._end_for_leaving([move for move in self._open.values() if move.state is not SourceState.TAKING], now)

    def give_up(self, now: float) -> None:
        """There is no time left to finish anything: restore what is being handed over."""
        self._end_for_leaving(list(self._open.values()), now)

    def _end_for_leaving(self, moves: list[SourceMove], now: float) -> None:
        for move in moves:
            self._fail(move, ErrorCode.LEAVING, f"Instance {self._config.instance!r} left the cluster during the move.", now)

    @property
    def has_open(self) -> bool:
        """Whether any move is under way."""
        return bool(self._open)

    def wakeup_at(self) -> float:
        """When `wake` has something to do."""
        return min((min(self._gives_up_at(move), move.resend_at) for move in self._open.values()), default=inf)

    def wake(self, now: float) -> None:
        """End what has waited too long, and repeat what may have been lost."""
        for move in list(self._open.values()):
            if now >= self._gives_up_at(move):
                if now >= move.deadline:
                    detail = f"It didn't end within {self._config.move_deadline_s:g} s."
                    self._fail(move, ErrorCode.DEADLINE_EXCEEDED, detail, now)
                else:
                    self._fail(move, ErrorCode.INSTANCE_UNREACHABLE, f"Instance {move.target!r} stopped answering.", now)
            elif now >= move.resend_at:
                move.resend_at = now + RESEND_S
                if move.state is SourceState.OFFERED:
                    self._offer(move, now)
                elif move.state is SourceState.TAKING:
                    self._handover.send(move, now)

    def _gives_up_at(self, move: SourceMove) -> float:
        return min(move.deadline, move.answer_by if move.state is SourceState.TAKING else move.silent_by)

    def _fail(self, move: SourceMove, code: ErrorCode, detail: str, now: float) -> None:
        move.problem = Failure(code, detail)
        self._finish(move, SourceInput.FAILED, now)

    def _finish(self, move: SourceMove, by: SourceInput, now: float) -> None:
        """End with what was achieved."""
        move.state = SOURCE[move.state][by]
        counts = move.record.chunks
        detail = f"{counts.unsettled} of {counts.found} chunks are no longer where the plan found them, or in another move."
        problem = move.problem or Failure(ErrorCode.TRANSFER_FAILED, detail)
        state = end_state(found=counts.found, failed=counts.unsettled)
        self._end(move, state, None if state is EventState.DONE else problem, now)

    def _end(self, move: SourceMove, state: EventState, error: Failure | None, now: float) -> None:
        self._handover.close_attempt(move)
        del self._open[move.plan.event_id]
        book = self._holdings.books[move.plan.old_position.location]
        for chunk in move.manifest:
            residency = book.get(chunk.key)
            if residency is not None:
                residency.leases.pop(move.plan.event_id, None)
        counts = move.record.chunks
        record = replace(
            move.record,
            state=state,
            chunks=replace(counts, failed=counts.unsettled),
            finished_at=now + self._config.wall_offset_s,
            error=error,
        )
        self._put(record, now)
        if move.target != record.coordinator or move.target == self._config.instance:
            self._outbox.send(move.target, EventReport(event_id=record.event_id, event=record))

    def _open_with(self, event_id: EventId, target: InstanceId) -> SourceMove | None:
        move = self._open.get(event_id)
        return move if move is not None and move.target == target else None

    def _tell_progress(self, move: SourceMove, now: float) -> None:
        """Last of a step, so that what the target waits for goes first, and nothing is told that the end says anyway."""
        if move.plan.event_id in self._open:
            self._put(move.record, now)

    def _put(self, record: EventRecord, now: float) -> None:
        if self._keep(record, now) and record.coordinator != self._config.instance:
            self._outbox.send(record.coordinator, EventReport(event_id=record.event_id, event=record))

    def _keep(self, record: EventRecord, now: float) -> bool:
        """Write it down; whether it is news."""
        is_news = self._history.put(record, now)
        if is_news:
            self._outbox.add(EventChanged(record))
        return is_news

    def check_invariants(self) -> None:
        """Assert what must hold between any two events."""
        for book in self._holdings.books.values():
            for residency in book:
                if isinstance(residency.slot, Outgoing):
                    move = self._open[residency.slot.move]
                    assert residency.slot.attempt == move.attempt
                    assert residency.chunk.key in move.released
