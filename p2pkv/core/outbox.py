"""Where the parts of a machine put their effects and messages, in order.

A message to oneself (this node coordinates a move of its own) doesn't leave: it waits in `to_self` and the machine handles it
before it returns. A message to an instance without a link is dropped: every message may be lost, and its sender repeats it.
"""

from collections import deque

from p2pkv.core.effects import Answer, AnswerValue, Effect, SendMessage
from p2pkv.core.ids import InstanceId, LinkId, RequestId
from p2pkv.core.messages import Message
from p2pkv.errors import ErrorCode, Failure


class Outbox:
    """Effects of one `handle` or `wake`, collected."""

    def __init__(self, me: InstanceId) -> None:
        self.me = me
        self.links: dict[InstanceId, LinkId] = {}
        self.to_self: deque[Message] = deque()
        self._effects: list[Effect] = []

    def add(self, effect: Effect) -> None:
        """Order something."""
        self._effects.append(effect)

    def send(self, instance: InstanceId, message: Message) -> None:
        """Send `message` to `instance`, oneself included, if there is a link to it."""
        if instance == self.me:
            self.to_self.append(message)
        elif (link := self.links.get(instance)) is not None:
            self.send_on(link, message)

    def send_on(self, link: LinkId, message: Message) -> None:
        """Send `message` on one certain link."""
        self.add(SendMessage(link=link, message=message))

    def answer(self, request: RequestId, value: AnswerValue) -> None:
        """End a request well."""
        self.add(Answer(request=request, value=value))

    def refuse(self, request: RequestId, code: ErrorCode, detail: str) -> None:
        """End a request with a failure."""
        self.fail(request, Failure(code, detail))

    def fail(self, request: RequestId, failure: Failure) -> None:
        """End a request with a failure that is there already."""
        self.add(Answer(request=request, value=None, failure=failure))

    def take_effects(self) -> list[Effect]:
        """All effects since the last call."""
        effects, self._effects = self._effects, []
        return effects
