"""Many seeds of one scenario, over several processes, and what they add up to."""

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context
from time import perf_counter

from sims.mutants import MUTANTS
from sims.run import Outcome, run_seed
from sims.scenario import load_scenario


@dataclass(slots=True)
class Totals:
    """The outcomes of all seeds together; `failures` says what broke, by seed, `took_s` how long all of it took."""

    scenario: str
    seed_count: int = 0
    virtual_s: float = 0.0
    event_count: int = 0
    lost_count: int = 0
    repeated_count: int = 0
    states: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    paths: Counter[str] = field(default_factory=Counter)
    known_s: list[float] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    took_s: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Add a seed that kept every promise."""
        self.virtual_s += outcome.virtual_s
        self.event_count += outcome.event_count
        self.lost_count += outcome.lost_count
        self.repeated_count += outcome.repeated_count
        self.states += outcome.states
        self.ends += outcome.ends
        self.paths += outcome.paths
        self.known_s += outcome.known_s


def run_one(scenario: str, seed: str, mutant: str | None) -> Outcome:
    """Run one seed, with a mutant of the core if one is named. What `run_seed` raises, this raises."""
    with MUTANTS[mutant].applied() if mutant else nullcontext():
        return run_seed(seed, load_scenario(scenario))


def run_batch(
    scenario: str,
    seeds: Iterable[int],
    *,
    processes: int,
    mutant: str | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Totals:
    """Run `seeds` of a scenario; a seed that fails doesn't stop the others. `progress` is called after each."""
    totals, began_at = Totals(scenario), perf_counter()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        seed_of = {pool.submit(run_one, scenario, str(seed), mutant): str(seed) for seed in seeds}
        for future in as_completed(seed_of):
            totals.seed_count += 1
            failure = future.exception()
            if failure is None:
                totals.add(future.result())
            else:
                totals.failures[seed_of[future]] = f"{type(failure).__name__}: {failure}"
            progress()
    totals.took_s = perf_counter() - began_at
    totals.failures = dict(sorted(totals.failures.items(), key=lambda each: int(each[0])))
    return totals
