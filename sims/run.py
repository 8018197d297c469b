"""One seed of one scenario, from the first boot until everything has come to rest."""

from collections import Counter
from dataclasses import dataclass

from p2pkv.core.records import EventState
from sims.ledger import PromiseBrokenError
from sims.rest import check_at_rest, is_at_rest
from sims.scenario import Scenario
from sims.workload import Workload
from sims.world import JOIN_S, MOVE_DEADLINE_S, Recorder, World

REST_S = MOVE_DEADLINE_S + 30.0
"""A move's deadline, and what target and coordinator wait longer."""
REST_STEP_S = 0.5
QUIET_S = 2.0
"""After everything has ended, until all lookups agree (api: within 2 s)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one seed led to.

    Attributes:
        seed: Which.
        trace: Digest of everything that happened.
        virtual_s: How long it took, in virtual time.
        event_count: Events that machines handled.
        lost_count: Messages that never arrived.
        repeated_count: Messages that arrived twice.
        states: Moves by end state; `orphaned` for those whose source ended first.
        ends: How ownerships of chunks ended.
        paths: What else was seen, by name.
        known_s: How long it took until an end was known, for each that saw one.
    """

    seed: str
    trace: str
    virtual_s: float
    event_count: int
    lost_count: int
    repeated_count: int
    states: Counter[str]
    ends: Counter[str]
    paths: Counter[str]
    known_s: tuple[float, ...]


def run_seed(seed: str, scenario: Scenario, recorder: Recorder | None = None) -> Outcome:
    """Run one seed to its end and check every promise on the way.

    Args:
        seed: Names the run.
        scenario: What happens in it.
        recorder: Hears of every event and effect.

    Raises:
        PromiseBrokenError: A promise doesn't hold.
        AssertionError: A machine contradicts itself.
    """
    world = World(seed, scenario, recorder)
    world.clock.run(until=JOIN_S)
    workload = Workload(world, scenario)
    world.clock.run(until=JOIN_S + scenario.duration_s)
    world.network.heal()
    rest_by = world.clock.now + REST_S
    is_quiet = False
    while not is_quiet and world.clock.now < rest_by:
        world.clock.run(until=world.clock.now + REST_STEP_S)
        if is_at_rest(world):
            world.clock.run(until=world.clock.now + QUIET_S)
            is_quiet = is_at_rest(world)  # what got lost before may still lead to something: a probe that fails, a redial
    check_at_rest(world, workload.prompts)
    records = [seen.record for seen in world.promises.sightings.moves.values()]
    states = Counter("orphaned" if record is None or not record.state.is_final else record.state.value for record in records)
    if scenario.all_done and states.keys() != {EventState.DONE}:
        raise PromiseBrokenError(f"every move of this scenario ends done, but these ended: {dict(states)}")
    return Outcome(
        seed=seed,
        trace=world.trace(),
        virtual_s=world.clock.now,
        event_count=world.event_count,
        lost_count=world.network.lost_count,
        repeated_count=world.network.repeated_count,
        states=states,
        ends=world.promises.ledger.ends,
        paths=world.promises.sightings.counts + world.witness.counts,
        known_s=tuple(world.witness.known_s),
    )
