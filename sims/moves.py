"""The scenario `moves`: engines store, users move and copy and cancel, the network misbehaves, one instance crashes."""

from dataclasses import dataclass
from random import Random

from p2pkv.core.events import CancelRequested, MoveRequested
from p2pkv.core.ids import EventId, InstanceId, Location, Position
from p2pkv.core.keys import Identity, TokenBytes
from p2pkv.core.machine import Machine
from p2pkv.core.records import EventRecord, EventState, Operation, Selection
from sims.network import Faults
from sims.world import MOVE_DEADLINE_S, World

QUIET_S = 3.0
"""After faults end and all events have: for statuses and inventories to agree (api: within 2 s)."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A workload and what it has to bear.

    Attributes:
        instances: How many.
        capacity: Chunks that each can hold.
        operations: Stores, moves, copies and cancels in all.
        duration_s: Virtual time in which they happen.
        faults: Of network and lanes, while they happen.
        crashes: Instances that end without a word and come back.
    """

    instances: int = 3
    capacity: int = 40
    operations: int = 60
    duration_s: float = 20.0
    faults: Faults = Faults(loss=0.05, repeat=0.05, delay_s=(0.0002, 0.2), lane_failure=0.02, corruption=0.01)
    crashes: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one seed led to."""

    seed: str
    trace: str
    events: int
    states: dict[EventState, int]
    ends: dict[str, int]
    lost_messages: int
    repeated_messages: int


class _Workload:
    def __init__(self, world: World, scenario: Scenario) -> None:
        self.world = world
        self.rng = Random(f"{world.seed}:workload")
        self.names = list(world.nodes)
        self.event_ids: list[EventId] = []
        self.prompts = [self._prompt() for _ in range(8)]
        for _ in range(scenario.operations):
            world.clock.at(self.rng.uniform(0, scenario.duration_s), self._operate)
        for _ in range(scenario.crashes):
            world.clock.at(self.rng.uniform(0, scenario.duration_s), self._crash)

    def _prompt(self) -> TokenBytes:
        """Token ids of which many share beginnings."""
        family = self.rng.randrange(3)
        length = self.rng.randint(1, 30)
        shared = self.rng.randint(0, length)
        own = self.rng.randrange(100)
        return b"".join((family if index < shared else 1000 + own).to_bytes(4, "little") for index in range(length))

    def _name(self) -> InstanceId:
        return self.rng.choice(self.names)

    def _operate(self) -> None:
        draw = self.rng.random()
        if draw < 0.45:
            self.world.store(self._name(), self.rng.choice(self.prompts))
        elif draw < 0.93 or not self.event_ids:
            self._move()
        else:
            event_id = self.rng.choice(self.event_ids)
            self.world.request(self.world.nodes[self._name()], lambda each: CancelRequested(each, event_id), lambda *_: None)

    def _move(self) -> None:
        old = Position(self._name(), Location.LOCAL_CPU)
        new = Position(self._name(), Location.LOCAL_CPU)
        operation = Operation.COPY if self.rng.random() < 0.25 else Operation.MOVE
        selection = Selection.ALL if self.rng.random() < 0.1 else Selection.TOKENS
        tokens = self.rng.choice(self.prompts)

        def answered(value: object, _failure: object) -> None:
            if isinstance(value, EventRecord):
                self.event_ids.append(value.event_id)

        self.world.request(
            self.world.nodes[self._name()],
            lambda each: MoveRequested(each, old, new, operation, selection, tokens, Identity(), None),
            answered,
        )

    def _crash(self) -> None:
        name = self._name()
        if self.world.nodes[name].is_up:
            self.world.crash(name)
            back_at = self.world.clock.now + self.rng.uniform(0.05, 8.0)
            self.world.clock.at(back_at, lambda: self.world.start(name))


def run_moves(seed: str, scenario: Scenario, machine_type: type[Machine] = Machine) -> Outcome:
    """Run one seed to its end and check every promise on the way.

    Raises:
        PromiseBrokenError: A promise doesn't hold.
        AssertionError: A machine contradicts itself.
    """
    names = [f"i{index}" for index in range(scenario.instances)]
    world = World(seed, names, faults=scenario.faults, capacity=scenario.capacity, machine_type=machine_type)
    world.clock.run(until=2.0)
    _Workload(world, scenario)
    world.clock.run(until=2.0 + scenario.duration_s)
    world.network.faults = Faults()
    world.clock.run(until=world.clock.now + MOVE_DEADLINE_S + 20.0)
    world.promises.check_all_ended(MOVE_DEADLINE_S)
    world.clock.run(until=world.clock.now + QUIET_S)
    world.check_at_rest()
    return Outcome(
        seed=seed,
        trace=world.trace(),
        events=world.event_count,
        states=dict(world.promises.states),
        ends=dict(world.promises.ledger.ends),
        lost_messages=world.network.lost_count,
        repeated_messages=world.network.repeated_count,
    )
