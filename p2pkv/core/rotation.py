"""Whose turn it is to be probed: each member once, in an order drawn by lot, before any comes a second time.

A dead member is so found within 2 n - 1 periods at the latest, and a newcomer's place is drawn among those still to come.

Source: SWIM, section 4.3. We insert at a random place of what is left of the round, as the paper does.
"""

from collections.abc import Container
from random import Random

from p2pkv.core.ids import InstanceId


class Rotation:
    """One observer's order. Members that aren't to be probed when their turn comes are passed over."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._members: dict[InstanceId, None] = {}
        self._round: list[InstanceId] = []

    def add(self, instance: InstanceId) -> None:
        """A member to probe, in this round already."""
        if instance not in self._members:
            self._members[instance] = None
            self._round.insert(self._rng.randint(0, len(self._round)), instance)

    def remove(self, instance: InstanceId) -> None:
        """A member that isn't probed any more."""
        if instance in self._members:
            del self._members[instance]
            self._round = [each for each in self._round if each != instance]

    def next(self, busy: Container[InstanceId]) -> InstanceId | None:
        """Who is next, leaving out those that are being probed already; None when nobody is left."""
        for _ in range(len(self._members) + len(self._round)):
            if not self._round:
                self._round = list(self._members)
                self._rng.shuffle(self._round)
            instance = self._round.pop()
            if instance not in busy:
                return instance
        return None
