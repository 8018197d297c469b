"""Addresses to dial: contacts, learned ones, and those of members whose link is lost; with backoff and bounds."""

from collections.abc import Collection, Container
from dataclasses import dataclass
from math import inf
from random import Random

from p2pkv.core.effects import OpenLink
from p2pkv.core.ids import Address, InstanceId
from p2pkv.core.outbox import Outbox

DIALS_MAX = 2048
"""Twice the members that a cluster may have; what is learned beyond is ignored."""
FIRST_RETRY_S = 0.1
RETRY_FACTOR = 3.0
LAST_RETRY_S = 5.0
GROWING_RETRIES = 4
"""Retries after 0.1, 0.3, 0.9, 2.7 and then every 5 s: three within a lost member's probe, which takes 1 s."""
JITTER_S = 0.05
"""So that two ends that lost a link seldom dial each other in the same millisecond."""
HASTE_S = 0.2
"""Between two dials of one address, however often others say that it is worth one."""
LEARNED_TRIES = 5
"""An address that only hearsay gave is forgotten after so many failures."""


@dataclass(slots=True)
class _Dial:
    is_contact: bool
    due_at: float
    dialed_at: float = -inf
    failures: int = 0
    is_busy: bool = False
    instance: InstanceId | None = None


class Dials:
    """Who is to be dialed when. An address is busy from `OpenLink` until its dial failed or its link is closed."""

    def __init__(self, outbox: Outbox, rng: Random, own: Address) -> None:
        self._outbox = outbox
        self._rng = rng
        self._own: dict[Address, None] = {own: None}
        self._dials: dict[Address, _Dial] = {}

    def add(self, address: Address, *, is_contact: bool, now: float) -> None:
        """Dial `address` soon, unless it is one's own."""
        known = self._dials.get(address)
        if known is not None:
            known.due_at = min(known.due_at, max(now, known.dialed_at + HASTE_S))
            known.is_contact |= is_contact
        elif address not in self._own and len(self._dials) < DIALS_MAX:
            self._dials[address] = _Dial(is_contact=is_contact, due_at=now)

    def contacts_are(self, addresses: Collection[Address], now: float) -> None:
        """Dial these as long as it takes; those that were contacts before are no more than learned from now on."""
        for address, dial in self._dials.items():
            dial.is_contact = address in addresses
        for address in addresses:
            self.add(address, is_contact=True, now=now)

    def reached(self, address: Address, instance: InstanceId) -> None:
        """`instance` is behind `address`: no need to dial while it is linked."""
        known = self._dials.get(address)
        if known is not None:
            known.instance = instance
            known.failures = 0

    def is_own(self, address: Address) -> None:
        """This node itself is behind `address`."""
        self._own[address] = None
        self._dials.pop(address, None)

    def failed(self, address: Address, now: float) -> None:
        """Nobody fit for us is behind `address`: wait longer than the last time."""
        known = self._dials.get(address)
        if known is None:
            return
        wait_s = min(LAST_RETRY_S, FIRST_RETRY_S * RETRY_FACTOR ** min(known.failures, GROWING_RETRIES))
        known.failures += 1
        known.is_busy = False
        known.due_at = now + wait_s + self._rng.uniform(0, JITTER_S)
        if known.failures >= LEARNED_TRIES and not known.is_contact and known.instance is None:
            del self._dials[address]

    def closed(self, address: Address, now: float) -> None:
        """The link that this dial led to is closed."""
        known = self._dials.get(address)
        if known is not None:
            known.is_busy = False
            known.due_at = now + self._rng.uniform(0, JITTER_S)

    def forget(self, address: Address) -> None:
        """Whoever was there won't come back; a contact is dialed on."""
        known = self._dials.get(address)
        if known is not None and not known.is_contact:
            del self._dials[address]

    def wakeup_at(self) -> float:
        """When the next dial is due."""
        return min((dial.due_at for dial in self._waiting().values()), default=inf)

    def wake(self, now: float) -> None:
        """Dial what is due."""
        for address, dial in self._waiting().items():
            if now >= dial.due_at:
                dial.is_busy, dial.dialed_at = True, now
                self._outbox.add(OpenLink(address=address))

    def _waiting(self) -> dict[Address, _Dial]:
        linked: Container[InstanceId] = self._outbox.links
        return {address: dial for address, dial in self._dials.items() if not dial.is_busy and dial.instance not in linked}
