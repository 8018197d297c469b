"""For how long a suspect may refute: the more others suspect it too, the shorter.

    A suspicion of one origin gets the longest time. Each of another origin, up to K, confirms it and brings the time down to
    the shortest, steeply at first: Max - (Max - Min) * log(C + 1) / log(K + 1) with C confirmations.

Source: Lifeguard, section IV-B (LHA-Suspicion). What a suspicion leads to when its time is over, `liveness` decides.
"""

from math import log

from p2pkv.core.ids import InstanceId
from p2pkv.core.timers import Timers


class Suspicion:
    """One member's, of one incarnation."""

    def __init__(self, origin: InstanceId, timers: Timers, now: float) -> None:
        self.since = now
        self.origin = origin
        self._timers = timers
        self._origins: dict[InstanceId, None] = {origin: None}

    def confirm(self, origin: InstanceId) -> bool:
        """Another suspects it; whether that counts, and is worth passing on: one's second word doesn't, nor one beyond K."""
        if origin in self._origins or len(self._origins) > self._timers.confirmations:
            return False
        self._origins[origin] = None
        return True

    @property
    def due_at(self) -> float:
        """When its time to refute is over."""
        longest, shortest, wanted = self._timers.suspicion_max_s, self._timers.suspicion_min_s, self._timers.confirmations
        if not wanted:
            return self.since + shortest
        share = log(len(self._origins)) / log(wanted + 1)
        return self.since + longest - share * (longest - shortest)
