"""One machine among peers that the test plays, word for word: for what no honest machine would say."""

from collections.abc import Callable
from itertools import count
from random import Random
from typing import TypeVar, Unpack

from p2pkv.core import effects
from p2pkv.core.effects import ENGINE_STAGE, Answer, Effect, Found, Lent
from p2pkv.core.events import (
    DialFailed,
    EngineAttached,
    Event,
    LinkLost,
    LinkOpened,
    LookupRequested,
    MessageReceived,
    ShardsSealed,
    StoreRequested,
)
from p2pkv.core.ids import Address, Generation, InstanceId, LinkId, RequestId
from p2pkv.core.keys import Identity, Namespace, TokenBytes, fingerprint
from p2pkv.core.machine import Machine
from p2pkv.core.messages import PROTOCOL_VERSION, Goodbye, Hello, Message, Status
from p2pkv.core.records import MemberRecord, MemberState
from p2pkv.errors import ErrorCode, Failure
from tests.core.builders import IDENTITY, NAMESPACE, Limits, address_of, config_of, member

T = TypeVar("T")
ME: InstanceId = "me"
CLIENT = 1


def hello(me: MemberRecord, *members: MemberRecord) -> Hello:
    """What a peer of the right cluster and version introduces itself with."""
    return Hello(versions=(PROTOCOL_VERSION,), cluster="test", me=me, members=members)


class Solo:
    """A machine, its time, and all that it was ever told to do.

    After each event its invariants hold, and what it was told to keep is what it says it owns.
    """

    def __init__(self, generation: Generation = 1, **limits: Unpack[Limits]) -> None:
        self.now = 1000.0
        self.machine = Machine(config_of(ME, generation, **limits), Random("solo"), self.now)
        self.done: list[Effect] = []
        self._resident: dict[bytes, None] = {}
        self._numbers = count(1)

    def happen(self, event: Event) -> list[Effect]:
        """One event; returns what the machine orders."""
        return self._perform(self.machine.handle(event, self.now))

    def run(self, seconds: float) -> list[Effect]:
        """Let time pass; returns what the machine orders meanwhile."""
        end, ordered = self.now + seconds, []
        while (due_at := self.machine.wakeup_at()) <= end:
            self.now = max(self.now, due_at)
            ordered += self._perform(self.machine.wake(self.now))
            assert self.machine.wakeup_at() > self.now, "it wants to be woken again at once"
        self.now = end
        return ordered

    def _perform(self, ordered: list[Effect]) -> list[Effect]:
        self.done += ordered
        for effect in ordered:
            if isinstance(effect, effects.AdmitStaged):
                self._resident[effect.key] = None
            elif isinstance(effect, effects.ReleaseChunks):
                for key in effect.keys:
                    del self._resident[key]
        self.machine.check_invariants()
        owned = {each.fingerprint for each in self.machine.inventory_of(ME)}
        assert owned == {fingerprint(key) for key in self._resident}, "it owns what it doesn't hold, or the reverse"
        return ordered

    # --- peers ------------------------------------------------------------------------------------------------------------

    def open(self, dialed: Address | None = None) -> LinkId:
        """A link opens: dialed by the machine, or by the peer."""
        link = next(self._numbers)
        self.happen(LinkOpened(link, dialed))
        return link

    def join(
        self, name: InstanceId, generation: Generation = 1, *namespaces: Namespace, dialed: Address | None = None
    ) -> LinkId:
        """A peer joins."""
        link = self.open(dialed)
        self.say(link, hello(member(name, generation, *namespaces)))
        return link

    def say(self, link: LinkId, message: Message) -> list[Effect]:
        """A peer says something."""
        return self.happen(MessageReceived(link, message))

    def lose(self, link: LinkId) -> list[Effect]:
        """A link breaks."""
        return self.happen(LinkLost(link, "broken"))

    def say_refused(self, name: InstanceId) -> list[Effect]:
        """A dial of an instance is refused."""
        return self.happen(DialFailed(address_of(name), "refused"))

    def heard(self, link: LinkId, kind: type[T]) -> list[T]:
        """All messages of one type that the peer behind `link` was ever sent."""
        sends = (send for send in self.effects(effects.SendMessage) if send.link == link)
        return [send.message for send in sends if isinstance(send.message, kind)]

    def effects(self, kind: type[T]) -> list[T]:
        """All orders of one kind."""
        return [effect for effect in self.done if isinstance(effect, kind)]

    def is_closed(self, link: LinkId) -> bool:
        """Whether the machine has closed a link."""
        return link in [close.link for close in self.effects(effects.CloseLink)]

    def state_of(self, name: InstanceId) -> MemberState | None:
        """What is known of an instance."""
        record = self.record_of(name)
        return None if record is None else record.state

    def record_of(self, name: InstanceId) -> MemberRecord | None:
        """An instance's record."""
        return next((record for record in self.machine.members() if record.instance == name), None)

    # --- users and engines ------------------------------------------------------------------------------------------------

    def ask(self, make: Callable[[RequestId], Event]) -> RequestId:
        """Ask for something."""
        request = next(self._numbers)
        self.happen(make(request))
        return request

    def answer(self, request: RequestId) -> Answer | None:
        """The answer to a request, if it is there; there is never a second one."""
        answers = [answer for answer in self.effects(Answer) if answer.request == request]
        assert len(answers) <= 1, "a request is answered once"
        return answers[0] if answers else None

    def failure_or_none(self, request: RequestId) -> Failure | None:
        """How an answered request failed, if it did."""
        answer = self.answer(request)
        assert answer is not None
        return answer.failure

    def failure(self, request: RequestId) -> Failure:
        """How a request failed."""
        failure = self.failure_or_none(request)
        assert failure is not None
        return failure

    def attach(self, client: int = CLIENT, namespace: Namespace = NAMESPACE, worker: int = 0) -> RequestId:
        """An engine's worker attaches."""
        return self.ask(lambda request: EngineAttached(request, client, namespace, worker))

    def lend(self, tokens: TokenBytes, first_token: int = 0, *, client: int = CLIENT, identity: Identity = IDENTITY) -> Lent:
        """An engine asks for memory to store a prompt."""
        answer = self.answer(self.ask(lambda request: StoreRequested(request, client, identity, tokens, first_token)))
        assert answer is not None
        assert isinstance(answer.value, Lent)
        return answer.value

    def commit(self, lent: Lent, *, client: int = CLIENT) -> RequestId:
        """An engine commits all that it was lent."""
        keys = tuple(shard.key for shard in lent.shards)
        return self.ask(lambda request: ShardsSealed(request, client, lent.lease, keys))

    def store(self, tokens: TokenBytes, *, client: int = CLIENT, identity: Identity = IDENTITY) -> int:
        """An engine stores a prompt; returns the tokens that are held then."""
        lent = self.lend(tokens, client=client, identity=identity)
        if not lent.shards:
            return lent.held_tokens
        answer = self.answer(self.commit(lent, client=client))
        assert answer is not None
        assert isinstance(answer.value, int)
        return answer.value

    def held_tokens(self, tokens: TokenBytes, *, client: int = CLIENT, identity: Identity = IDENTITY) -> int:
        """What an engine finds of a prompt."""
        answer = self.answer(self.ask(lambda request: LookupRequested(request, client, identity, tokens, None, None)))
        assert answer is not None
        assert isinstance(answer.value, Found)
        return answer.value.num_tokens


def status(me: MemberRecord) -> Status:
    """A Status of somebody who holds nothing."""
    return Status(me=me, sequence=0, entry_count=0, entry_sum=0)


def dialed(solo: Solo) -> list[Address]:
    """All that were dialed so far."""
    return [dial.address for dial in solo.effects(effects.OpenLink)]


def goodbye_of(solo: Solo, link: LinkId) -> ErrorCode:
    """Why a link was refused, and closed."""
    (goodbye,) = solo.heard(link, Goodbye)
    assert solo.is_closed(link), "a Goodbye is the last word"
    return goodbye.failure.code


def staged_keys(ordered: list[Effect]) -> list[bytes]:
    """Keys that engines' memory became resident chunks under."""
    return [each.key for each in ordered if isinstance(each, effects.AdmitStaged) and each.stage == ENGINE_STAGE]
