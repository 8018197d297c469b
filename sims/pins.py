"""What is pinned where, as far as answers and messages prove it: the witness for S7 and T11.

Only what is certain is kept. A pin counts from its answer on, for chunks that were there when it was asked for. An unpin counts
from when it is asked for, and no pin is certain that it may have crossed.
"""

from dataclasses import dataclass
from math import inf

from p2pkv.core.ids import InstanceId
from p2pkv.core.keys import ChunkKey
from sims.ledger import Ledger
from sims.network import Clock

UNPIN_S = 25.0
"""For so long an unpin without an answer may take effect: until its last repeat, plus the longest that a node stands still."""


@dataclass(frozen=True, slots=True)
class _Pin:
    proven_at: float
    until: float


@dataclass(slots=True)
class Unpin:
    """One unpin, which takes effect between `asked_at` and `ended_at`."""

    instance: InstanceId
    keys: frozenset[ChunkKey]
    ended_at: float


class Pins:
    """All pins that are certain."""

    def __init__(self, clock: Clock, ledger: Ledger) -> None:
        self._clock = clock
        self._ledger = ledger
        self._pins: dict[tuple[InstanceId, ChunkKey], _Pin] = {}
        self._unpins: list[Unpin] = []

    def is_pinned(self, key: ChunkKey, instance: InstanceId) -> bool:
        """Whether `instance` must keep `key`."""
        pin = self._pins.get((instance, key))
        return pin is not None and pin.until > self._clock.now

    def pinned(self, keys: list[ChunkKey], instance: InstanceId, *, asked_at: float, ttl_s: float) -> int:
        """`instance` answers that it has pinned these chunks; returns of how many that is certain."""
        there = [key for key in keys if (self._ledger.open_since(key, instance) or inf) <= asked_at]
        return sum(self._add(key, instance, asked_at, asked_at + ttl_s) for key in there)

    def handed_over(self, keys: dict[ChunkKey, None], source: InstanceId, target: InstanceId, *, sent_at: float) -> int:
        """`target` owns these chunks now, by a Take sent at `sent_at`; returns how many pins have come along for certain."""
        known = {key: pin for key in keys if (pin := self._pins.get((source, key))) is not None and pin.proven_at <= sent_at}
        return sum(self._add(key, target, self._clock.now, pin.until) for key, pin in known.items())

    def _add(self, key: ChunkKey, instance: InstanceId, since: float, until: float) -> bool:
        """A pin took effect after `since`; whether no unpin did."""
        if any(each.instance == instance and key in each.keys and each.ended_at >= since for each in self._unpins):
            return False
        known = self._pins.get((instance, key))
        self._pins[instance, key] = _Pin(self._clock.now, until if known is None else max(known.until, until))
        return True

    def unpin_asked(self, keys: list[ChunkKey], instance: InstanceId) -> Unpin:
        """A user wants the pins of these chunks to end; its `ended_at` is for when that is answered."""
        for key in keys:
            self.gone(key, instance)
        self._unpins.append(Unpin(instance, frozenset(keys), self._clock.now + UNPIN_S))
        return self._unpins[-1]

    def gone(self, key: ChunkKey, instance: InstanceId) -> None:
        """`instance` doesn't own it any more."""
        self._pins.pop((instance, key), None)

    def ended(self, instance: InstanceId) -> None:
        """`instance` is gone."""
        self._pins = {place: pin for place, pin in self._pins.items() if place[0] != instance}
