"""Users' commands to one instance, given to any node: passed on, carried out there once, answered.

A command is repeated until its answer comes; the instance that carries it out remembers its latest answers, so that a repeat
changes nothing. No answer within `COMMAND_S`: `instance_unreachable`, and it may have been carried out or not.
"""

from dataclasses import dataclass
from math import inf
from random import Random

from p2pkv.core.events import ClearRequested
from p2pkv.core.holdings import Holdings
from p2pkv.core.ids import InstanceId, Position, RequestId
from p2pkv.core.membership import Membership
from p2pkv.core.messages import ClearAnswer, ClearRequest, Nonce
from p2pkv.core.moves.plan import unknown_location
from p2pkv.core.outbox import Outbox
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
    command: ClearRequest
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
        self._answers: dict[tuple[InstanceId, Nonce], ClearAnswer] = {}

    def clear(self, event: ClearRequested, now: float) -> None:
        """Have everything at a position forgotten."""
        instance = event.position.instance
        problem = self._membership.unreachable(instance)
        if problem is None and len(self._waiting) >= WAITING_MAX:
            problem = Failure(ErrorCode.INSTANCE_UNREACHABLE, f"{WAITING_MAX} commands wait for an answer; try again later.")
        if problem is not None:
            self._outbox.fail(event.request, problem)
            return
        command = ClearRequest(nonce=self._rng.getrandbits(64), location=event.position.location)
        self._waiting[command.nonce] = _Waiting(event.request, instance, command, now + COMMAND_S, now + RESEND_S)
        self._outbox.send(instance, command)

    def carry_out(self, command: ClearRequest, sender: InstanceId) -> None:
        """A node passes a user's command on."""
        answer = self._answers.get((sender, command.nonce))
        if answer is None:
            answer = self._answers[sender, command.nonce] = self._clear(command)
            if len(self._answers) > ANSWERS_KEPT:
                del self._answers[next(iter(self._answers))]
        self._outbox.send(sender, answer)

    def _clear(self, command: ClearRequest) -> ClearAnswer:
        book = self._holdings.books.get(command.location)
        if book is None:
            position = Position(self._membership.me.instance, command.location)
            return ClearAnswer(command.nonce, 0, unknown_location(position, self._holdings.books))
        return ClearAnswer(command.nonce, self._holdings.clear(book), None)

    def answered(self, answer: ClearAnswer, sender: InstanceId) -> None:
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
