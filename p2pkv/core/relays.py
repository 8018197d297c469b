"""What this node tries out for others: they ask whether it reaches a member that they don't.

    Who has a link asks the member itself. Who has none dials, or has dialed since it lost it. The answer is `reached`,
    `refused` for a dial that failed, or after a while `silent`; `reached` may still follow that.
    An instance that isn't known here, or as another boot, is `silent`; one that has ended here, `refused`.

Source: SWIM, section 3.1 (ping-req); Lifeguard, section IV-A (nack), at 80 % of the timeout as in memberlist.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from p2pkv.core.ids import InstanceId
from p2pkv.core.messages import Nonce, ProbeAnswer
from p2pkv.core.outbox import Outbox
from p2pkv.core.records import Reach

RELAYS_MAX = 1024
"""As many as there may be members that ask at once; what is asked beyond stays unanswered."""


@dataclass(slots=True)
class Relay:
    """One question of one asker; `nonce` is of the Ping that this node sent."""

    asker: InstanceId
    asked_nonce: Nonce
    instance: InstanceId
    nonce: Nonce
    nack_at: float
    ends_at: float


class Relays:
    """All questions that are still open: one an asker and instance."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._relays: dict[tuple[InstanceId, InstanceId], Relay] = {}

    def open(self, relay: Relay) -> bool:
        """Try for an asker; its earlier question of the same instance is forgotten. Whether there is room for it."""
        key = relay.asker, relay.instance
        if key not in self._relays and len(self._relays) >= RELAYS_MAX:
            return False
        self._relays[key] = relay
        return True

    def pong(self, instance: InstanceId, nonce: Nonce) -> None:
        """A Ping was answered."""
        self._answer(lambda relay: relay.instance == instance and relay.nonce == nonce, Reach.REACHED)

    def met(self, instance: InstanceId) -> None:
        """An instance has a link now."""
        self._answer(lambda relay: relay.instance == instance, Reach.REACHED)

    def refused(self, instance: InstanceId) -> None:
        """A dial of an instance failed that has no link."""
        self._answer(lambda relay: relay.instance == instance, Reach.REFUSED)

    def _answer(self, is_meant: Callable[[Relay], bool], reach: Reach) -> None:
        for key, relay in list(self._relays.items()):
            if is_meant(relay):
                del self._relays[key]
                self._outbox.send(relay.asker, ProbeAnswer(nonce=relay.asked_nonce, reach=reach))

    def postpone(self, seconds: float) -> None:
        """Their time didn't run meanwhile."""
        for relay in self._relays.values():
            relay.nack_at += seconds
            relay.ends_at += seconds

    def wakeup_at(self) -> float:
        """When `wake` has something to do."""
        return min((min(relay.nack_at, relay.ends_at) for relay in self._relays.values()), default=inf)

    def wake(self, now: float) -> None:
        """Say of what nothing was heard in time that it is silent, and forget what nobody waits for any more."""
        for key, relay in list(self._relays.items()):
            if now >= relay.nack_at:
                relay.nack_at = inf
                self._outbox.send(relay.asker, ProbeAnswer(nonce=relay.asked_nonce, reach=Reach.SILENT))
            if now >= relay.ends_at:
                del self._relays[key]
