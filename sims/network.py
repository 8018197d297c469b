"""A virtual network under a virtual clock: everything that happens is one entry of one queue, so a seed replays it all."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from p2pkv.core.ids import InstanceId
from sims.layout import Layout, Way
from sims.scenario import Faults

NO_WAY = Way(delay_s=(0.0, 0.0))


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

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Run `action` that much later."""
        self.at(self.now + seconds, action)

    def run(self, until: float) -> None:
        """Run all that is due up to `until`, and stand there."""
        while self._queue and self._queue[0].at <= until:
            entry = heapq.heappop(self._queue)
            self.now = entry.at
            entry.action()
        self.now = until


class Network:
    """Delivers actions with loss, repeats and reorder, as `faults` says at that moment, over the ways of a layout.

    Ends are always named the sender first. Without a layout all are equally near.
    """

    def __init__(self, clock: Clock, rng: Random, faults: Faults, layout: Layout | None = None) -> None:
        self.faults = faults
        self.lost_count = 0
        self.repeated_count = 0
        self._clock = clock
        self._rng = rng
        self._layout = layout
        self._is_lossy = layout is not None
        self._cut_until: dict[tuple[InstanceId, InstanceId], float] = {}
        self._clogged_s: dict[InstanceId, float] = {}

    def delay(self, *ends: InstanceId) -> float:
        """A time on the way between two instances; on that of nobody in particular without them."""
        by_faults_s = self._rng.uniform(*self.faults.delay_s)
        return by_faults_s if self._layout is None or not ends else by_faults_s + self._rng.uniform(*self._way(*ends).delay_s)

    def _way(self, one: InstanceId, other: InstanceId) -> Way:
        return NO_WAY if self._layout is None or one == other else self._layout.way(one, other)

    def happens(self, share: float) -> bool:
        """Whether chance, `share` of the time, strikes now."""
        return self._rng.random() < share

    def cut(self, one: InstanceId, other: InstanceId, *, seconds: float) -> None:
        """Nothing passes between these two for that long."""
        self.deafen(one, other, seconds=seconds)
        self.deafen(other, one, seconds=seconds)

    def deafen(self, receiver: InstanceId, sender: InstanceId, *, seconds: float) -> None:
        """Nothing reaches `receiver` from `sender` for that long; the other way round it does."""
        self._cut_until[sender, receiver] = self._clock.now + seconds

    def is_deaf(self, receiver: InstanceId, sender: InstanceId) -> bool:
        """Whether nothing from `sender` reaches `receiver` now."""
        return self._clock.now < self._cut_until.get((sender, receiver), 0.0)

    def is_cut(self, one: InstanceId, other: InstanceId) -> bool:
        """Whether nothing passes now in one direction or the other: nobody then opens a connection."""
        return self.is_deaf(one, other) or self.is_deaf(other, one)

    def is_whole(self) -> bool:
        """Whether nobody is cut off from anybody now."""
        return all(until <= self._clock.now for until in self._cut_until.values())

    def reliably(self, action: Callable[[], None], sender: InstanceId, receiver: InstanceId) -> None:
        """Deliver once, as fast as anything can: link events and the handshake, which a stream delivers first or not at all."""
        self._clock.after(self.faults.delay_s[0] + self._way(sender, receiver).delay_s[0], action)

    def clog(self, name: InstanceId, seconds: float) -> None:
        """From now on, what comes to an instance or from it takes up to that much longer."""
        self._clogged_s[name] = seconds

    def is_clogged(self, name: InstanceId) -> bool:
        """Whether what comes to an instance or from it takes longer."""
        return name in self._clogged_s

    def heal(self) -> None:
        """From now on nothing goes wrong but what is cut: nothing is lost, and no way takes longer than it has to."""
        self.faults = Faults()
        self._is_lossy = False
        self._clogged_s.clear()

    def carelessly(self, action: Callable[[], None], sender: InstanceId, receiver: InstanceId) -> None:
        """Deliver never, once, or twice."""
        draw = self._rng.random()
        lost_on_the_way = self._way(sender, receiver).loss if self._is_lossy else 0.0
        if draw < self.faults.loss + lost_on_the_way:
            self.lost_count += 1
            return
        clogged_s = max(self._clogged_s.get(each, 0.0) for each in (sender, receiver))
        held_up_s = self._rng.uniform(0, clogged_s) if clogged_s else 0.0
        self._clock.after(held_up_s + self.delay(sender, receiver), action)
        if draw > 1 - self.faults.repeat:
            self.repeated_count += 1
            self._clock.after(self.delay(sender, receiver), action)
