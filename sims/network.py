"""A virtual network under a virtual clock: everything that happens is one entry of one queue, so a seed replays it all."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random


@dataclass(frozen=True, slots=True)
class Faults:
    """What the network does to messages, and lanes to transfers.

    Attributes:
        loss: Share of messages that never arrive.
        repeat: Share of messages that arrive twice.
        delay_s: Shortest and longest time on the way. Each message draws its own, so a long one lets others overtake it.
        lane_failure: Share of fetches that bring a part and then fail.
        corruption: Share of chunks whose bytes a lane damages; its check must find them.
    """

    loss: float = 0.0
    repeat: float = 0.0
    delay_s: tuple[float, float] = (0.0002, 0.002)
    lane_failure: float = 0.0
    corruption: float = 0.0


@dataclass(order=True, slots=True)
class _Entry:
    at: float
    number: int
    action: Callable[[], None] = field(compare=False)


class Clock:
    """Virtual time: a queue of actions, run in order of time, and of arrival among equals."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[_Entry] = []
        self._count = 0

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Run `action` at time `when`, or now if that is past."""
        self._count += 1
        heapq.heappush(self._queue, _Entry(max(when, self.now), self._count, action))

    def run(self, until: float) -> None:
        """Run all that is due up to `until`, and stand there."""
        while self._queue and self._queue[0].at <= until:
            entry = heapq.heappop(self._queue)
            self.now = entry.at
            entry.action()
        self.now = until


class Network:
    """Delivers actions with loss, repeats and reorder, as `faults` says at that moment."""

    def __init__(self, clock: Clock, rng: Random, faults: Faults) -> None:
        self.clock = clock
        self.rng = rng
        self.faults = faults
        self.lost_count = 0
        self.repeated_count = 0

    def delay(self) -> float:
        """A time on the way."""
        return self.rng.uniform(*self.faults.delay_s)

    def reliably(self, action: Callable[[], None]) -> None:
        """Deliver once, as fast as anything can: link events and the handshake, which a stream delivers first or not at all."""
        self.clock.at(self.clock.now + self.faults.delay_s[0], action)

    def carelessly(self, action: Callable[[], None]) -> None:
        """Deliver never, once, or twice."""
        draw = self.rng.random()
        if draw < self.faults.loss:
            self.lost_count += 1
            return
        self.clock.at(self.clock.now + self.delay(), action)
        if draw > 1 - self.faults.repeat:
            self.repeated_count += 1
            self.clock.at(self.clock.now + self.delay(), action)
