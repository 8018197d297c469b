"""What happens in a scenario: engines store and read, users move, copy and cancel, and blows fall on instances."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from random import Random

from p2pkv.core.effects import AnswerValue
from p2pkv.core.events import CancelRequested, MoveRequested, PinRequested
from p2pkv.core.ids import EventId, InstanceId, Location, Position
from p2pkv.core.keys import TOKEN_NBYTES, Identity, TokenBytes
from p2pkv.core.records import EventRecord, Operation, Pinning, Selection
from sims.engine import chain, within
from sims.layout import Layout
from sims.scenario import Scenario
from sims.sightings import Phase, Role, Sighting
from sims.world import JOIN_S, LEAVE_S, STALL_MAX_S, Answered, World

PATIENCE_S = 5.0
"""A blow that waits for a move longer than this falls on anyone."""
PIN_S = (0.5, 8.0)
STOP_S = (12.0, 18.0)
SLOW_STANDS_S, SLOW_RUNS_S = (0.1, 2.0), (0.01, 1.0)
"""How long a slow instance stands still, and then runs, each time."""
GROUP_CUT_S = (1.0, 15.0)
"""Some groups are back before the others think them dead, some long after."""
CLOG_S = 1.5
"""The longest that a clogged link holds a message up: three times what a probe waits."""
PHASES = [phase for phase in Phase if phase is not Phase.ENDED]

Strike = Callable[[InstanceId, list[InstanceId]], None]
"""What a blow does to an instance; the list names others in the move that it waited for."""


@dataclass(slots=True)
class _Blow:
    """Something done to an instance: the one that plays `role` in the first move that reaches `phase`."""

    strike: Strike
    role: Role
    phase: Phase


class Workload:
    """Puts everything that will happen into the clock's queue."""

    def __init__(self, world: World, scenario: Scenario) -> None:
        self.prompts: list[TokenBytes] = []
        self._world = world
        self._scenario = scenario
        self._rng = Random(f"{world.seed}:workload")
        self._names = list(world.nodes)
        self._waiting: list[_Blow] = []
        world.promises.sightings.on_phase = self._phase_seen
        self._make_prompts()
        self._schedule_operations()
        self._schedule_blows()

    def _make_prompts(self) -> None:
        """Token ids of which many share beginnings."""
        prompts = self._scenario.prompts
        for _ in range(prompts.count):
            family, own = self._rng.randrange(prompts.families), 1000 + self._rng.randrange(100)
            length = self._rng.randint(*prompts.tokens)
            shared = self._rng.randint(0, length)
            self.prompts.append(family.to_bytes(4, "little") * shared + own.to_bytes(4, "little") * (length - shared))

    def _schedule_operations(self) -> None:
        counts = self._scenario.operations
        operations: list[Callable[[], None]] = [self._store] * counts.stores + [self._read] * counts.reads
        operations += [self._look_up] * counts.lookups
        operations += [partial(self._move, Operation.MOVE)] * counts.moves + [
            partial(self._move, Operation.COPY)
        ] * counts.copies
        operations += [self._pin] * counts.pins + [self._unpin] * counts.unpins
        self._rng.shuffle(operations)
        for index, operation in enumerate(operations):
            share = index / len(operations) if counts.one_by_one else self._rng.random()
            self._world.clock.after(share * self._scenario.duration_s, operation)

    def _schedule_blows(self) -> None:
        blows = self._scenario.blows
        counts: list[tuple[Strike, int]] = [
            (self._crash, blows.crashes),
            (self._leave, blows.leaves),
            (self._cut, blows.cuts),
            (self._stall, blows.stalls),
            (self._stop, blows.stops),
            (self._clog, blows.clogs),
            (self._slow, blows.slows),
            (self._deafen, blows.deafs),
            (self._set_back, blows.set_backs),
            (self._cut_group, blows.group_cuts),
            (self._deafen_group, blows.group_deafs),
        ]
        for strike in (strike for strike, count in counts for _ in range(count)):
            blow = _Blow(strike, self._rng.choice(list(Role)), self._rng.choice(PHASES))
            self._world.clock.after(self._rng.uniform(0, self._scenario.duration_s - PATIENCE_S), partial(self._due, blow))

    def _name(self) -> InstanceId:
        return self._rng.choice(self._names)

    # --- operations -------------------------------------------------------------------------------------------------------

    def _store(self) -> None:
        self._world.engines[self._name()].store(self._rng.choice(self.prompts))

    def _read(self) -> None:
        self._world.engines[self._name()].read(self._rng.choice(self.prompts))

    def _look_up(self) -> None:
        self._world.engines[self._name()].look_up(self._rng.choice(self.prompts))

    def _move(self, operation: Operation) -> None:
        old = Position(self._name(), Location.LOCAL_CPU)
        new = Position(self._name(), Location.LOCAL_CPU)
        counts = self._scenario.operations
        selection = Selection.ALL if self._rng.random() < counts.all_share else Selection.TOKENS
        tokens = self._rng.choice(self.prompts)
        is_cancelled = self._rng.random() < counts.cancelled_share
        self._world.promises.sightings.counts[f"{operation} asked for"] += 1

        def answered(value: object, _failure: object) -> None:
            if isinstance(value, EventRecord) and is_cancelled:
                self._world.clock.after(2 * self._world.network.delay(), partial(self._cancel, value.event_id))

        self._world.request(
            self._world.nodes[self._name()],
            lambda request: MoveRequested(request, old, new, operation, selection, tokens, Identity(), model=None),
            answered,
        )

    def _cancel(self, event_id: EventId) -> None:
        self._world.request(self._world.nodes[self._name()], partial(CancelRequested, event_id=event_id), lambda *_: None)

    def _pin(self) -> None:
        name, tokens, asked_at = self._name(), self._rng.choice(self.prompts), self._world.clock.now
        ttl_s = self._rng.choice([inf, self._rng.uniform(*PIN_S)])

        def answered(value: AnswerValue, _failure: object) -> None:
            if isinstance(value, int):
                keys = chain(tokens[: value * TOKEN_NBYTES])[1:]
                count = self._world.promises.pins.pinned(keys, name, asked_at=asked_at, ttl_s=ttl_s)
                self._world.promises.sightings.counts["pinned"] += count

        self._ask_pin(name, Pinning.PIN, ttl_s, tokens, answered)

    def _unpin(self) -> None:
        name, tokens = self._name(), self._rng.choice(self.prompts)
        unpin = self._world.promises.pins.unpin_asked(within(tokens), name)

        def answered(value: AnswerValue, _failure: object) -> None:
            if isinstance(value, int):
                unpin.ended_at = self._world.clock.now
                self._world.promises.sightings.counts["unpinned"] += value > 0

        self._ask_pin(name, Pinning.UNPIN, 0.0, tokens, answered)

    def _ask_pin(self, name: InstanceId, pinning: Pinning, ttl_s: float, tokens: TokenBytes, answered: Answered) -> None:
        position = Position(name, Location.LOCAL_CPU)
        self._world.request(
            self._world.nodes[self._name()],
            lambda request: PinRequested(request, position, pinning, ttl_s, tokens, Identity(), model=None),
            answered,
        )

    # --- blows ------------------------------------------------------------------------------------------------------------

    def _due(self, blow: _Blow) -> None:
        """From now on the blow waits for its move; half of them don't."""
        if self._rng.random() < 0.5:
            blow.strike(self._name(), [])
        else:
            self._waiting.append(blow)
            self._world.clock.after(PATIENCE_S, partial(self._lose_patience, blow))

    def _lose_patience(self, blow: _Blow) -> None:
        if blow in self._waiting:
            self._waiting.remove(blow)
            blow.strike(self._name(), [])

    def _phase_seen(self, _event_id: EventId, seen: Sighting) -> None:
        for blow in [each for each in self._waiting if each.phase is seen.phase]:
            self._waiting.remove(blow)
            name = getattr(seen.parties, blow.role.value)
            others = [each for each in (seen.parties.source, seen.parties.target) if each != name]
            self._world.clock.after(self._world.network.delay() / 2, partial(blow.strike, name, others))

    def _crash(self, name: InstanceId, _others: list[InstanceId]) -> None:
        if self._world.nodes[name].is_up:
            self._world.promises.sightings.counts["instance crashed"] += 1
            self._world.crash(name)
            self._world.clock.after(self._rng.uniform(*self._scenario.blows.back_s), partial(self._start, name))

    def _leave(self, name: InstanceId, _others: list[InstanceId]) -> None:
        self._world.promises.sightings.counts["instance asked to leave"] += 1
        self._world.leave(name)
        self._world.clock.after(LEAVE_S + self._rng.uniform(*self._scenario.blows.back_s), partial(self._start, name))

    def _start(self, name: InstanceId) -> None:
        """Start an instance again; one that hasn't left yet because it stood still, a little later."""
        if self._world.nodes[name].is_leaving:
            self._world.clock.after(LEAVE_S, partial(self._start, name))
        elif not self._world.nodes[name].is_up:
            self._world.start(name)

    def _cut(self, name: InstanceId, others: list[InstanceId]) -> None:
        other = self._rng.choice(others or [each for each in self._names if each != name])
        self._world.network.cut(name, other, seconds=self._rng.uniform(0.1, 10.0))

    def _stall(self, name: InstanceId, _others: list[InstanceId]) -> None:
        self._world.stall(name, self._rng.uniform(0.1, STALL_MAX_S))

    def _stop(self, name: InstanceId, _others: list[InstanceId]) -> None:
        self._world.stall(name, self._rng.uniform(*STOP_S))

    def _clog(self, name: InstanceId, _others: list[InstanceId]) -> None:
        self._world.network.clog(name, CLOG_S)

    def _slow(self, name: InstanceId, _others: list[InstanceId]) -> None:
        """An instance stands still and runs, until nothing goes wrong any more."""
        stands_s, runs_s = self._rng.uniform(*SLOW_STANDS_S), self._rng.uniform(*SLOW_RUNS_S)
        if self._world.clock.now + stands_s < JOIN_S + self._scenario.duration_s:
            self._world.stall(name, stands_s)
            self._world.clock.after(stands_s + runs_s, partial(self._slow, name, []))

    def _deafen(self, name: InstanceId, others: list[InstanceId]) -> None:
        other = self._rng.choice(others or [each for each in self._names if each != name])
        self._world.network.deafen(name, other, seconds=self._rng.uniform(0.1, 10.0))

    def _set_back(self, name: InstanceId, others: list[InstanceId]) -> None:
        if self._world.nodes[name].is_up:
            self._world.set_clock_back(name)
            self._crash(name, others)

    def _cut_group(self, name: InstanceId, _others: list[InstanceId]) -> None:
        layout = self._layout()
        inside, seconds = layout.groups[layout.group_of(name)], self._rng.uniform(*GROUP_CUT_S)
        for one in inside:
            for other in self._names:
                if other not in inside:
                    self._world.network.cut(one, other, seconds=seconds)

    def _deafen_group(self, name: InstanceId, _others: list[InstanceId]) -> None:
        layout = self._layout()
        group, seconds = layout.group_of(name), self._rng.uniform(*GROUP_CUT_S)
        for receiver in layout.groups[group]:
            for sender in layout.groups[layout.nearest(group)]:
                self._world.network.deafen(receiver, sender, seconds=seconds)

    def _layout(self) -> Layout:
        assert self._scenario.layout is not None, "blows on groups come with a layout"
        return self._scenario.layout
