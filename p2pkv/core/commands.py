"""Users' commands to one instance, given to any node: passed on, carried out there once, answered.

A command is repeated until its answer comes; the instance that carries it out remembers its latest answers, so that a repeat
changes nothing. No answer within `COMMAND_S`: `instance_unreachable`, and it may have been carried out or not.
"""

from dataclasses import dataclass
from math import inf
from random import Random
from typing import assert_never

from p2pkv.core.events import ClearRequested, PinRequested
from p2pkv.core.holdings import Holdings
from p2pkv.core.ids import InstanceId, Position, RequestId
from p2pkv.core.membership import Membership
from p2pkv.core.messages import ClearRequest, Command, CommandAnswer, Nonce, PinRequest
from p2pkv.core.moves.plan import find_prefix, unknown_location
from p2pkv.core.outbox import Outbox
from p2pkv.core.records import Pinning
from p2pkv.core.residency import Residencies
from p2pkv.errors import ErrorCode, Failure

COMMAND_S = 5.0
RESEND_S = 1.0
WAITING_MAX = 1024
"""Commands that wait for their answer at once; each is a user's open request."""
ANSWERS_KEPT = 4096
"""More than `WAITING_MAX` commands of a few nodes, each repeated for `COMMAND_S`."""


@dataclass(slots=True)
class _Waiting:
    request: RequestId
    instance: InstanceId
    command: Command
    give_up_at: float
    resend_at: float


class Commands:
    """Commands given here, and those carried out here."""

    def __init__(self, holdings: Holdings, membership: Membership, outbox: Outbox, rng: Random) -> None:
        self._holdings = holdings
        self._membership = membership
        self._outbox = outbox
        self._rng = rng
        self._waiting: dict[Nonce, _Waiting] = {}
        self._answers: dict[tuple[InstanceId, Nonce], CommandAnswer] = {}

    def clear(self, event: ClearRequested, now: float) -> None:
        """Have everything at a position forgotten."""
        command = ClearRequest(nonce=self._rng.getrandbits(64), location=event.position.location)
        self._give(command, event.position.instance, event.request, now)

    def pin(self, event: PinRequested, now: float) -> None:
        """Have a prompt pinned at a position, or its pin ended."""
        command = PinRequest(
            nonce=self._rng.getrandbits(64),
            location=event.position.location,
            pinning=event.pinning,
            ttl_s=event.ttl_s,
            tokens=event.tokens,
            identity=event.identity,
            model=event.model,
        )
        self._give(command, event.position.instance, event.request, now)

    def _give(self, command: Command, instance: InstanceId, request: RequestId, now: float) -> None:
        problem = self._membership.unreachable(instance)
        if problem is None and len(self._waiting) >= WAITING_MAX:
            problem = Failure(ErrorCode.INSTANCE_UNREACHABLE, f"{WAITING_MAX} commands wait for an answer; try again later.")
        if problem is not None:
            self._outbox.fail(request, problem)
            return
        self._waiting[command.nonce] = _Waiting(request, instance, command, now + COMMAND_S, now + RESEND_S)
        self._outbox.send(instance, command)

    def carry_out(self, command: Command, sender: InstanceId, now: float) -> None:
        """A node passes a user's command on."""
        answer = self._answers.get((sender, command.nonce))
        if answer is None:
            answer = self._answers[sender, command.nonce] = self._do(command, now)
            if len(self._answers) > ANSWERS_KEPT:
                del self._answers[next(iter(self._answers))]
        self._outbox.send(sender, answer)

    def _do(self, command: Command, now: float) -> CommandAnswer:
        book = self._holdings.books.get(command.location)
        if book is None:
            position = Position(self._membership.me.instance, command.location)
            return CommandAnswer(command.nonce, 0, unknown_location(position, self._holdings.books))
        match command:
            case ClearRequest():
                token_count = self._holdings.clear(book, now)
            case PinRequest():
                token_count = self._pin(command, book, now)
            case _:
                assert_never(command)
        return CommandAnswer(command.nonce, token_count, None)

    def _pin(self, command: PinRequest, book: Residencies, now: float) -> int:
        """Pin, or unpin, what a move of the same tokens would take; returns how many tokens of the prompt that reaches."""
        namespaces, until = self._holdings.namespaces, now + command.ttl_s
        found = find_prefix(book, namespaces, tokens=command.tokens, identity=command.identity, model=command.model)
        if command.pinning is Pinning.PIN:
            for residency in found.residencies:
                residency.pin(until)
            return found.num_tokens
        pinned = [residency for residency in found.residencies if residency.is_pinned(now)]
        for residency in pinned:
            residency.pinned_until = min(residency.pinned_until, until)
        return max((residency.chunk.end for residency in pinned), default=0)

    def answered(self, answer: CommandAnswer, sender: InstanceId) -> None:
        """The instance has carried the command out, or says why not."""
        waiting = self._waiting.get(answer.nonce)
        if waiting is None or waiting.instance != sender:
            return
        del self._waiting[answer.nonce]
        if answer.failure is not None:
            self._outbox.fail(waiting.request, answer.failure)
        else:
            self._outbox.answer(waiting.request, answer.token_count)

    def wakeup_at(self) -> float:
        """When `wake` has something to do."""
        return min((min(each.give_up_at, each.resend_at) for each in self._waiting.values()), default=inf)

    def wake(self, now: float) -> None:
        """Give up what has waited too long, and repeat what may have been lost."""
        for nonce, waiting in list(self._waiting.items()):
            if now >= waiting.give_up_at:
                del self._waiting[nonce]
                detail = f"Instance {waiting.instance!r} didn't answer within {COMMAND_S:g} s; it may have done it or not."
                self._outbox.refuse(waiting.request, ErrorCode.INSTANCE_UNREACHABLE, detail)
            elif now >= waiting.resend_at:
                waiting.resend_at = now + RESEND_S
                self._outbox.send(waiting.instance, waiting.command)
