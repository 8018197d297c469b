"""The coordinator's part of moves: pass a user's request to the source, and know how the event goes on.

A plan that isn't there within `PLAN_S` is given up: the user hears `instance_unreachable`, and should the source plan it
after all, it is told to cancel, unless it was asked for with a key: then whoever asked may ask again.
From the plan on the two ends finish alone. The source pushes each change of the event; what is lost is asked for again, of
the target too when the source is gone. An event that nobody can tell of any more ends here by its deadline.
"""

from dataclasses import dataclass, field, replace
from math import inf
from random import Random

from p2pkv.core.config import MachineConfig
from p2pkv.core.effects import EventChanged
from p2pkv.core.events import CancelRequested, EventAsked, MoveRequested
from p2pkv.core.history import History
from p2pkv.core.ids import EventId, Generation, InstanceId, Parties, Position, RequestId, make_event_id, parse_event_id
from p2pkv.core.membership import Membership
from p2pkv.core.messages import CancelRequest, EventReport, EventRequest, PlanAnswer, PlanRequest
from p2pkv.core.moves.target import TargetMoves
from p2pkv.core.outbox import Outbox
from p2pkv.core.records import EventRecord, EventState
from p2pkv.errors import ErrorCode, Failure

PLAN_S = 5.0
RESEND_S = 1.0
ASK_S = 2.0
"""For a party to tell of an event: it answers from memory."""
DEADLINE_GRACE_S = 15.0
"""After a move's deadline, for its source's last word to arrive by way of the target."""
WAITING_MAX = 8192
"""Plans and questions that wait for an answer at once; each is a user's open request."""


@dataclass(slots=True)
class _Plan:
    request: RequestId | None
    message: PlanRequest
    source_generation: Generation | None
    give_up_at: float
    resend_at: float


@dataclass(slots=True)
class _Question:
    """Users who want to know of an event, and the parties that haven't answered yet.

    `hearsay` is what its source tells, or how it ended as others tell; the latter counts when the source knows nothing.
    """

    ask: CancelRequest | EventRequest
    requests: list[RequestId]
    waiting_for: dict[InstanceId, None]
    give_up_at: float
    hearsay: EventRecord | None = None


@dataclass(slots=True)
class _Watch:
    """A move asked for here that hasn't ended, as far as is known."""

    parties: Parties
    source_generation: Generation | None
    ends_at: float
    ask_at: float
    is_late: bool = True
    """Nobody has been told of it here: its plan was given up, or asked for by an earlier boot."""


@dataclass(slots=True)
class Coordinator:
    """Plans that wait for their source, questions that wait for a party, and events of moves asked for here."""

    config: MachineConfig
    membership: Membership
    history: History
    outbox: Outbox
    rng: Random
    targets: TargetMoves
    _plans: dict[EventId, _Plan] = field(default_factory=dict)
    _questions: dict[EventRequest | CancelRequest, _Question] = field(default_factory=dict)
    _watches: dict[EventId, _Watch] = field(default_factory=dict)

    # --- users' requests --------------------------------------------------------------------------------------------------

    def move(self, event: MoveRequested, now: float) -> None:
        """Ask the source for a plan."""
        message = PlanRequest(
            event_id=self.new_event_id(event.old_position, event.new_position),
            old_position=event.old_position,
            new_position=event.new_position,
            operation=event.operation,
            selection=event.selection,
            tokens=event.tokens,
            identity=event.identity,
            model=event.model,
            idempotency_key=event.idempotency_key,
        )
        problem = self.plan(message, event.request, now)
        if problem is not None:
            self.outbox.fail(event.request, problem)

    def new_event_id(self, old: Position, new: Position) -> EventId:
        """The id of a move that is coordinated here."""
        return make_event_id(Parties(old.instance, new.instance, self.config.instance), self.rng)

    def plan(self, message: PlanRequest, request: RequestId | None, now: float) -> Failure | None:
        """Ask the source for a plan; the failure says why it can't be asked. `request` is None for what nobody asks for."""
        source = message.old_position.instance
        if (problem := self.membership.unreachable(source)) is not None:
            return problem
        if len(self._plans) >= WAITING_MAX:
            return Failure(ErrorCode.INSTANCE_UNREACHABLE, f"{WAITING_MAX} moves wait for their plan; try again later.")
        generation = self._generation_of(source)
        plan = _Plan(request, message, generation, give_up_at=now + PLAN_S, resend_at=now + RESEND_S)
        self._plans[message.event_id] = plan
        self.outbox.send(source, message)
        return None

    def is_planning(self, event_id: EventId) -> bool:
        """Whether a move's source has been asked for its plan and hasn't answered yet."""
        return event_id in self._plans

    def ask(self, event: EventAsked, now: float) -> None:
        """Tell of an event: from memory when it has ended or is one's own, else ask its parties."""
        known = self.history.get(event.event_id)
        parties = parse_event_id(event.event_id)
        is_own = parties is not None and parties.source == self.config.instance
        if parties is None or (known is not None and (is_own or known.state.is_final)):
            self._answer_from_memory(event.request, event.event_id)
        else:
            self._question(
                event.request, EventRequest(event.event_id), (parties.source, parties.target, parties.coordinator), now
            )

    def cancel(self, event: CancelRequested, now: float) -> None:
        """Ask the source to end a move."""
        parties = parse_event_id(event.event_id)
        if parties is None:
            self._answer_from_memory(event.request, event.event_id)
        elif (problem := self.membership.unreachable(parties.source)) is not None:
            self.outbox.fail(event.request, problem)
        else:
            self._question(event.request, CancelRequest(event.event_id), (parties.source,), now)

    def _question(
        self, request: RequestId, ask: CancelRequest | EventRequest, parties: tuple[InstanceId, ...], now: float
    ) -> None:
        waiting = self._questions.get(ask)
        if waiting is not None:
            waiting.requests.append(request)
            return
        others = {} if isinstance(ask, CancelRequest) else {self.config.instance: None}
        reachable = [
            name for name in dict.fromkeys(parties) if name not in others and self.membership.unreachable(name) is None
        ]
        if not reachable:
            self._answer_from_memory(request, ask.event_id)
        elif len(self._questions) >= WAITING_MAX:
            detail = f"{WAITING_MAX} questions wait for an answer; try again later."
            self.outbox.refuse(request, ErrorCode.INSTANCE_UNREACHABLE, detail)
        else:
            self._questions[ask] = _Question(ask, [request], dict.fromkeys(reachable), give_up_at=now + ASK_S)
            for name in reachable:
                self.outbox.send(name, ask)

    def _answer_from_memory(self, request: RequestId, event_id: EventId, hearsay: EventRecord | None = None) -> None:
        known = self.history.get(event_id) or hearsay
        if known is not None:
            self.outbox.answer(request, known)
        else:
            detail = f"No event {event_id!r} is known. Events are kept for an hour after their end."
            self.outbox.refuse(request, ErrorCode.UNKNOWN_EVENT, detail)

    # --- messages ---------------------------------------------------------------------------------------------------------

    def planned(self, answer: PlanAnswer, sender: InstanceId, now: float) -> None:
        """The source has planned the move, or says why not. A plan that comes too late is cancelled."""
        plan = self._plans.get(answer.event_id)
        parties = parse_event_id(answer.event_id)
        if parties is None or parties.source != sender:
            return
        if plan is None:
            watch = self._watches.get(answer.event_id)
            if answer.event is not None and not answer.has_key and (watch is None or watch.is_late):
                self.outbox.send(sender, CancelRequest(answer.event_id))
            return
        del self._plans[answer.event_id]
        if answer.event is not None and plan.request is not None and _is_repeat(plan.message, answer.event):
            first = parse_event_id(answer.event.event_id)
            if first is not None and first.coordinator == self.config.instance:
                self._put(answer.event, first, now)
            self.outbox.answer(plan.request, self.history.get(answer.event.event_id) or answer.event)
            return
        if answer.event is None or answer.event.event_id != answer.event_id:
            problem = answer.failure or Failure(ErrorCode.PROTOCOL_ERROR, f"Instance {sender!r} sent a plan without an event.")
            self._fail(plan.request, problem)
            return
        self._put(answer.event, parties, now)
        if (watch := self._watches.get(answer.event_id)) is not None:
            watch.is_late = False
        if plan.request is not None:
            self.outbox.answer(plan.request, self.history.get(answer.event_id) or answer.event)

    def _fail(self, request: RequestId | None, problem: Failure) -> None:
        if request is not None:
            self.outbox.fail(request, problem)

    def reported(self, report: EventReport, sender: InstanceId, now: float) -> None:
        """A party tells of an event. The source's word counts; the others' only while the source is gone."""
        parties = parse_event_id(report.event_id)
        if parties is None or sender not in (parties.source, parties.target, parties.coordinator):
            return
        questions = [ask for ask in (EventRequest(report.event_id), CancelRequest(report.event_id)) if ask in self._questions]
        is_party = self.config.instance in (parties.coordinator, parties.target)
        if not questions and not is_party:
            return
        is_source_gone = self._is_source_gone(report.event_id, parties.source)
        if report.event is not None and report.event.event_id == report.event_id:
            is_trusted = sender == parties.source or (is_source_gone and report.event.state.is_final)
            if sender == parties.source and report.event_id in self._plans:
                self.planned(PlanAnswer(report.event_id, report.event, failure=None), sender, now)
            elif is_trusted and (is_party or report.event.state.is_final):
                self._put(report.event, parties, now)
        elif is_source_gone and sender == parties.target and report.event_id in self._watches:
            self._give_up(report.event_id, f"Source {parties.source!r} was lost before anything had reached the target.", now)
        for question in [self._questions[ask] for ask in questions]:
            question.waiting_for.pop(sender, None)
            if report.event is not None and (sender == parties.source or report.event.state.is_final):
                question.hearsay = report.event
            if sender == parties.source and report.event is not None:
                question.waiting_for.clear()
            if not question.waiting_for:
                self._resolve(question)

    def _is_source_gone(self, event_id: EventId, source: InstanceId) -> bool:
        """Whether the boot of `source` that planned this event, as far as is known, can't tell of it any more."""
        watch = self._watches.get(event_id)
        is_another = watch is not None and watch.source_generation != self._generation_of(source)
        return is_another or self.membership.unreachable(source) is not None

    def _generation_of(self, instance: InstanceId) -> Generation | None:
        record = self.membership.record_of(instance)
        return None if record is None else record.generation

    def _resolve(self, question: _Question) -> None:
        del self._questions[question.ask]
        hearsay = None if question.waiting_for else question.hearsay
        for request in question.requests:
            self._answer_from_memory(request, question.ask.event_id, hearsay)

    def _put(self, record: EventRecord, parties: Parties, now: float) -> None:
        """Keep what is told of an event; if it was asked for here, watch it until it has ended, also if its plan came late."""
        if self.history.put(record, now):
            self.outbox.add(EventChanged(record))
            if parties.coordinator == self.config.instance and record.event_id not in self._watches:
                ends_at = now + self.config.move_deadline_s + DEADLINE_GRACE_S
                generation = self._generation_of(parties.source)
                self._watches[record.event_id] = _Watch(parties, generation, ends_at=ends_at, ask_at=now + RESEND_S)
        if record.state.is_final:
            self._watches.pop(record.event_id, None)

    def _give_up(self, event_id: EventId, detail: str, now: float) -> None:
        """Nobody can tell of this event any more: it ends here."""
        known = self.history.get(event_id)
        watch = self._watches.pop(event_id)
        if known is not None and not known.state.is_final:
            wall = now + self.config.wall_offset_s
            error = Failure(ErrorCode.INSTANCE_UNREACHABLE, detail)
            counts = replace(known.chunks, failed=known.chunks.found, moved=0, already_there=0, shared_kept=0)
            self._put(replace(known, state=EventState.FAILED, chunks=counts, finished_at=wall, error=error), watch.parties, now)

    # --- time -------------------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """This node goes: whoever waits for an answer gets one."""
        detail = f"Instance {self.config.instance!r} left the cluster before there was an answer; ask another node."
        waiting = [plan.request for plan in self._plans.values()]
        waiting += [request for question in self._questions.values() for request in question.requests]
        for request in waiting:
            self._fail(request, Failure(ErrorCode.LEAVING, detail))
        self._plans.clear()
        self._questions.clear()

    def wakeup_at(self) -> float:
        """When `wake` has something to do."""
        plans = min((min(plan.give_up_at, plan.resend_at) for plan in self._plans.values()), default=inf)
        questions = min((question.give_up_at for question in self._questions.values()), default=inf)
        watches = min((min(watch.ends_at, watch.ask_at) for watch in self._watches.values()), default=inf)
        return min(plans, questions, watches)

    def wake(self, now: float) -> None:
        """Give up what has waited too long, and ask again for what may have been lost."""
        for event_id, plan in list(self._plans.items()):
            source = plan.message.old_position.instance
            is_lost = plan.source_generation != self._generation_of(source) or self.membership.unreachable(source) is not None
            if is_lost or now >= plan.give_up_at:
                del self._plans[event_id]
                if plan.message.idempotency_key is None:  # else a retry, maybe through another node, counts on it
                    self.outbox.send(source, CancelRequest(event_id))
                detail = f"Instance {source!r} was lost before it planned the move."
                if not is_lost:
                    detail = f"Instance {source!r} didn't plan the move within {PLAN_S:g} s."
                self._fail(plan.request, Failure(ErrorCode.INSTANCE_UNREACHABLE, detail))
            elif now >= plan.resend_at:
                plan.resend_at = now + RESEND_S
                self.outbox.send(source, plan.message)
        for question in [each for each in self._questions.values() if now >= each.give_up_at]:
            self._resolve(question)
        for event_id, watch in list(self._watches.items()):
            if now >= watch.ends_at:
                self._give_up(event_id, "Neither end told of it by its deadline.", now)
            elif now >= watch.ask_at:
                self._look_after(event_id, watch, now)

    def _look_after(self, event_id: EventId, watch: _Watch, now: float) -> None:
        watch.ask_at = now + RESEND_S
        parties = watch.parties
        known = self.history.get(event_id)
        if (known is not None and known.state.is_final) or parties.source == self.config.instance:
            del self._watches[event_id]
        elif not self._is_source_gone(event_id, parties.source):
            self.outbox.send(parties.source, EventRequest(event_id))
        elif self.targets.is_open(event_id):
            return
        elif self.membership.unreachable(parties.target) is None and parties.target != self.config.instance:
            self.outbox.send(parties.target, EventRequest(event_id))
        else:
            self._give_up(event_id, f"Source {parties.source!r} was lost during the move.", now)


def _is_repeat(message: PlanRequest, event: EventRecord) -> bool:
    """Whether `event`, with which a source answered a plan, is the one that its key stood for already."""
    is_another = event.event_id != message.event_id and message.idempotency_key is not None
    return is_another and (event.old_position, event.new_position) == (message.old_position, message.new_position)
