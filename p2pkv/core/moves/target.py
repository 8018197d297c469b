"""The target's end of its moves: collect the manifest, fetch, take.

Rules (`docs/protocol.md` numbers them):
    An offer is accepted whole or refused before a byte moves (`fetching`).
    Bytes belong to nobody here until a Take names them (a move), all are here (a copy), or the source is lost.
    A Take is answered by facts: what is verified here is owned from then on, what is owned already is said so, the rest is
    gone. The same attempt always gets the same answer.

Not decided here: which bytes are right (the lane verifies before it says `fetched`), what the source frees (`source`).
"""

from collections import defaultdict
from math import inf

from p2pkv.core.chunks import Chunk
from p2pkv.core.config import MachineConfig
from p2pkv.core.effects import CancelFetch, EventChanged
from p2pkv.core.events import FetchEnded, RouteRefused
from p2pkv.core.history import History
from p2pkv.core.holdings import Holdings
from p2pkv.core.ids import EventId, InstanceId, parse_event_id
from p2pkv.core.keys import ChunkKey, namespace_digest
from p2pkv.core.membership import Membership
from p2pkv.core.messages import FetchReport, ManifestPage, ManifestRequest, Offer, Take, TakeAnswer
from p2pkv.core.moves.fetching import Fetching
from p2pkv.core.moves.plan import unknown_location
from p2pkv.core.moves.tables import TARGET, TargetInput, TargetState
from p2pkv.core.moves.target_move import TargetMove
from p2pkv.core.moves.tcp_rate import TcpRate
from p2pkv.core.outbox import Outbox
from p2pkv.core.records import ChunkCounts, EventRecord, Operation, end_state
from p2pkv.core.residency import Incoming, Keep, Outgoing
from p2pkv.errors import ErrorCode, Failure

REPORT_S = 1.0
"""Between reports: often enough to renew a lease of 30 s through any loss that a link survives."""
DEADLINE_GRACE_S = 5.0
"""How much longer the target waits than the source, whose word ends the move."""
OPEN_MOVES_MAX = 4096
"""As at the source."""
MANIFEST_CHUNKS_MAX = 65_536
"""About 70 MB of manifest; more chunks than any limit on descriptors lets an instance hold."""


class TargetMoves:
    """All open moves whose target is this instance."""

    def __init__(
        self,
        config: MachineConfig,
        holdings: Holdings,
        membership: Membership,
        history: History,
        outbox: Outbox,
        keep: Keep,
    ) -> None:
        self._config = config
        self._holdings = holdings
        self._history = history
        self._outbox = outbox
        self._keep = keep
        self._fetching = Fetching(config, holdings, membership, outbox)
        self._open: dict[EventId, TargetMove] = {}
        self.is_leaving = False

    # --- offer and manifest -----------------------------------------------------------------------------------------------

    def offer(self, offer: Offer, sender: InstanceId, now: float) -> None:
        """The source offers chunks: begin to collect the manifest, or refuse."""
        if not self._is_between(offer.event_id, sender):
            return
        known = self._open.get(offer.event_id)
        if known is not None:
            self._report(known, now)
            return
        problem = self._offer_problem(offer)
        if problem is not None:
            self._refuse(offer, sender, problem)
            return
        move = TargetMove(
            offer=offer,
            source=sender,
            namespaces={namespace_digest(namespace): namespace for namespace in offer.namespaces},
            started_at=now,
            deadline=now + min(offer.deadline_s, self._config.move_deadline_s) + DEADLINE_GRACE_S,
            report_at=now + REPORT_S,
        )
        self._open[offer.event_id] = move
        self._collect(move, offer.chunks, now)

    def _is_between(self, event_id: EventId, sender: InstanceId) -> bool:
        parties = parse_event_id(event_id)
        return parties is not None and parties.source == sender and parties.target == self._config.instance

    def _offer_problem(self, offer: Offer) -> Failure | None:
        me = self._config.instance
        if self.is_leaving:
            return Failure(ErrorCode.LEAVING, f"Instance {me!r} is leaving the cluster and takes no more chunks.")
        if offer.target_generation != self._config.generation:
            return Failure(ErrorCode.INSTANCE_UNREACHABLE, f"Instance {me!r} has been restarted; try again.")
        if offer.new_position.location not in self._holdings.books:
            return unknown_location(offer.new_position, self._holdings.books)
        if len(self._open) >= OPEN_MOVES_MAX:
            return Failure(ErrorCode.INSTANCE_UNREACHABLE, f"{OPEN_MOVES_MAX} moves to {me!r} are open; try again later.")
        if not 0 < offer.chunk_count <= MANIFEST_CHUNKS_MAX:
            detail = f"A move takes 1 to {MANIFEST_CHUNKS_MAX} chunks, not {offer.chunk_count}. Move fewer at a time."
            return Failure(ErrorCode.INVALID_REQUEST, detail)
        return next((problem for each in offer.namespaces if (problem := self._holdings.learn(each)) is not None), None)

    def _refuse(self, offer: Offer, source: InstanceId, problem: Failure) -> None:
        report = FetchReport(
            event_id=offer.event_id,
            is_complete=True,
            fetched_count=0,
            already_there_count=0,
            failed_count=offer.chunk_count,
            nbytes=0,
            lane=None,
            failure=problem,
        )
        self._outbox.send(source, report)

    def page(self, page: ManifestPage, sender: InstanceId, now: float) -> None:
        """A page of a manifest came; one that doesn't follow on what is known is asked for again in time."""
        move = self._open_from(page.event_id, sender)
        if move is not None and move.state is TargetState.COLLECTING and page.first_index == len(move.manifest):
            self._collect(move, page.chunks, now)

    def _collect(self, move: TargetMove, chunks: tuple[Chunk, ...], now: float) -> None:
        for chunk in chunks:
            namespace = move.namespaces.get(chunk.namespace)
            problem = "its namespace wasn't offered" if namespace is None else chunk.problem(namespace)
            if problem is None and (chunk.key in move.manifest or len(move.manifest) == move.offer.chunk_count):
                problem = "it stands there twice, or is one too many"
            parent = move.manifest.get(chunk.parent)
            if problem is None and chunk.start != (0 if parent is None else parent.end):
                problem = "it doesn't follow on its parent"
            if problem is not None:
                self._abandon(move, f"chunk {len(move.manifest)} of the manifest is wrong: {problem}")
                return
            move.manifest[chunk.key] = chunk
        if len(move.manifest) < move.offer.chunk_count:
            self._outbox.send(move.source, ManifestRequest(event_id=move.event_id, first_index=len(move.manifest)))
        elif sum(chunk.charged_nbytes for chunk in move.manifest.values()) != move.offer.charged_nbytes:
            self._abandon(move, "the sizes in the manifest don't add up to what was offered")
        else:
            self._begin_fetch(move, now)

    def _abandon(self, move: TargetMove, reason: str) -> None:
        del self._open[move.event_id]
        failure = Failure(ErrorCode.PROTOCOL_ERROR, f"Instance {move.source!r} broke the protocol: {reason}.")
        self._refuse(move.offer, move.source, failure)

    @property
    def tcp_rate(self) -> TcpRate:
        """How fast bytes come here over TCP."""
        return self._fetching.tcp_rate

    def is_open(self, event_id: EventId) -> bool:
        """Whether this end of a move is under way."""
        return event_id in self._open

    # --- fetch ------------------------------------------------------------------------------------------------------------

    def _begin_fetch(self, move: TargetMove, now: float) -> None:
        problem = self._fetching.promise(move, now)
        if problem is not None:
            del self._open[move.event_id]
            self._refuse(move.offer, move.source, problem)
            return
        move.state = TARGET[move.state][TargetInput.COLLECTED]
        self._fetch_on(move, now)

    def _fetch_on(self, move: TargetMove, now: float) -> None:
        is_copy = move.offer.operation is Operation.COPY
        is_over = not self._fetching.fetch_next(move, now) and not move.awaited
        if is_over and is_copy and self._fetching.miss(move):
            is_over = not self._fetching.fetch_next(move, now) and not move.awaited
        if is_over:
            move.state = TARGET[move.state][TargetInput.FETCHED]
            if is_copy:
                self._fetching.own_fetched(move, now)
        self._report(move, now)

    def fetch_ended(self, event: FetchEnded, now: float) -> None:
        """The lane has brought a batch, or failed to."""
        move = self._open[event.event_id]
        self._fetching.ended(move, event, now)
        self._resume_others(move, now)
        self._go_on(move, now)

    def route_refused(self, event: RouteRefused, now: float) -> None:
        """The lane couldn't be opened: try the next one."""
        move = self._open[event.event_id]
        self._fetching.refused(move, event)
        self._resume_others(move, now)
        self._go_on(move, now)

    def _resume_others(self, ended: TargetMove, now: float) -> None:
        """A move's fetch has ended: others that wait for what it was to bring go on, before that may be dropped."""
        for move in [each for each in self._open.values() if each.awaited and each is not ended]:
            self._fetching.look_again(move)
            if move.state is TargetState.FETCHING and not move.is_fetching and (move.pending or not move.awaited):
                self._fetch_on(move, now)

    def _go_on(self, move: TargetMove, now: float) -> None:
        if move.state is TargetState.ENDED:
            self._settle(move, now)
        else:
            self._fetch_on(move, now)

    def _report(self, move: TargetMove, now: float) -> None:
        move.report_at = now + REPORT_S
        is_complete = move.state is TargetState.COMPLETE
        here_count = len(move.fetched) + len(move.present)
        report = FetchReport(
            event_id=move.event_id,
            is_complete=is_complete,
            fetched_count=len(move.fetched),
            already_there_count=len(move.present),
            failed_count=move.offer.chunk_count - here_count if is_complete else 0,
            nbytes=move.nbytes,
            lane=move.lane,
            failure=move.problem,
        )
        self._outbox.send(move.source, report)

    # --- take -------------------------------------------------------------------------------------------------------------

    def take(self, take: Take, sender: InstanceId, now: float) -> None:
        """The source hands chunks over: own what is verified here, and say what isn't here."""
        if not self._is_between(take.event_id, sender):
            return
        move = self._open_from(take.event_id, sender)
        if move is not None and move.answer is not None and take.attempt <= move.answer.attempt:
            if take.attempt == move.answer.attempt:  # the source has closed the earlier ones
                self._outbox.send(sender, move.answer)
            return
        is_open = move is not None and TargetInput.TAKEN in TARGET[move.state]
        if move is None or not is_open or self.is_leaving or take.target_generation != self._config.generation:
            gone = (*take.released, *take.shared)
            answer = TakeAnswer(event_id=take.event_id, attempt=take.attempt, taken=(), already_there=(), gone=gone)
        else:
            self._claim(move, take, now)
            answer = self._own(move, take, now)
            move.answer = answer
        self._outbox.send(sender, answer)

    def _claim(self, move: TargetMove, take: Take, now: float) -> None:
        """Keep what moves of higher ids are taking away from here: of two that cross, the lower id's goes on."""
        named = (self._fetching.book(move).get(key) for key in (*take.released, *take.shared) if key in move.manifest)
        claimed: dict[EventId, list[ChunkKey]] = defaultdict(list)
        for residency in filter(None, named):
            if isinstance(residency.slot, Outgoing) and residency.slot.move > take.event_id:
                claimed[residency.slot.move].append(residency.chunk.key)
        self._keep(claimed, now)

    def _own(self, move: TargetMove, take: Take, now: float) -> TakeAnswer:
        book = self._fetching.book(move)
        pinned_until = {pin.key: now + pin.ttl_s for pin in take.pins}
        taken, already_there, gone = [], [], []
        for key in (*take.released, *take.shared):
            residency = book.get(key) if key in move.manifest else None
            if residency is not None:
                self._fetching.own_verified(move, residency, now)
            if residency is None or residency.slot is not None:
                gone.append(key)
                continue
            residency.leases[move.event_id] = move.deadline  # anew if it came by another move, or an engine, meanwhile
            residency.pin(pinned_until.get(key, -inf))
            if key in move.fetched:
                taken.append(key)
            else:
                already_there.append(key)
        return TakeAnswer(
            event_id=move.event_id,
            attempt=take.attempt,
            taken=tuple(taken),
            already_there=tuple(already_there),
            gone=tuple(gone),
        )

    # --- ends -------------------------------------------------------------------------------------------------------------

    def closed(self, record: EventRecord | None, event_id: EventId, sender: InstanceId, now: float) -> None:
        """The source's last word on a move, or its word that it knows none: what was not taken is dropped."""
        move = self._open_from(event_id, sender)
        if move is not None and (record is None or record.state.is_final):
            self._close(move, now)

    def source_lost(self, instance: InstanceId, now: float) -> None:
        """An instance died or is another boot of itself: what was verified of its moves belongs here now."""
        for move in [each for each in self._open.values() if each.source == instance and each.state is not TargetState.ENDED]:
            move.is_source_lost = True
            self._close(move, now)

    def leave(self, now: float) -> None:
        """Take no more chunks; what isn't taken yet stays with its source."""
        self.is_leaving = True
        for move in [each for each in self._open.values() if each.state is not TargetState.ENDED]:
            self._close(move, now)

    def _close(self, move: TargetMove, now: float) -> None:
        move.state = TARGET[move.state][TargetInput.CLOSED]
        move.pending.clear()
        if move.is_fetching:
            self._outbox.add(CancelFetch(move.event_id))
        else:
            self._settle(move, now)

    def _settle(self, move: TargetMove, now: float) -> None:
        """The move has ended and no fetch goes on: its bytes are owned if their source is lost, else dropped."""
        del self._open[move.event_id]
        if move.is_source_lost:
            self._fetching.own_fetched(move, now)
            self._put_last_record(move, now)
        else:
            self._fetching.drop_fetched(move, now)
        self._fetching.release_leases(move)

    def _put_last_record(self, move: TargetMove, now: float) -> None:
        """The source can't write the event's end any more, so the target does."""
        parties = parse_event_id(move.event_id)
        assert parties is not None, "checked when it was offered"
        self._fetching.miss(move)
        offer, moved, there = move.offer, len(move.fetched), len(move.present)
        failed = offer.chunk_count - moved - there
        detail = (
            f"Source {move.source!r} was lost during the move; {moved + there} of {offer.chunk_count} chunks are at the target."
        )
        error = Failure(ErrorCode.INSTANCE_UNREACHABLE, detail)
        record = EventRecord(
            event_id=move.event_id,
            state=end_state(found=offer.chunk_count, failed=failed),
            old_position=offer.old_position,
            new_position=offer.new_position,
            operation=offer.operation,
            chunks=ChunkCounts(found=offer.chunk_count, moved=moved, already_there=there, failed=failed),
            num_tokens=offer.num_tokens,
            nbytes=move.nbytes,
            lane=move.lane,
            started_at=move.started_at + self._config.wall_offset_s,
            finished_at=now + self._config.wall_offset_s,
            coordinator=parties.coordinator,
            error=error if failed else None,
        )
        if self._history.put(record, now):
            self._outbox.add(EventChanged(record))

    def wakeup_at(self) -> float:
        """When `wake` has something to do."""
        waiting = (each for each in self._open.values() if each.state is not TargetState.ENDED)
        return min((min(move.deadline, move.report_at) for move in waiting), default=inf)

    def wake(self, now: float) -> None:
        """Drop what the source has forgotten to end, and report what may have been lost."""
        for move in [each for each in self._open.values() if each.state is not TargetState.ENDED]:
            if now >= move.deadline:
                self._close(move, now)
            elif now >= move.report_at:
                if move.state is TargetState.COLLECTING:
                    self._outbox.send(move.source, ManifestRequest(event_id=move.event_id, first_index=len(move.manifest)))
                self._report(move, now)

    def _open_from(self, event_id: EventId, source: InstanceId) -> TargetMove | None:
        move = self._open.get(event_id)
        return move if move is not None and move.source == source and move.state is not TargetState.ENDED else None

    def check_invariants(self) -> None:
        """Assert what must hold between any two events."""
        for book in self._holdings.books.values():
            assert all(event_id in self._open for event_id in book.promised)
            for residency in book:
                if isinstance(residency.slot, Incoming):
                    move = self._open[residency.slot.move]
                    assert residency.slot.is_verified or move.is_fetching
                    assert not residency.slot.is_verified or residency.chunk.key in move.fetched
