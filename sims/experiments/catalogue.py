"""All experiments by name, and the size at which each is meant to run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sims.errors import ExperimentError
from sims.experiments.broadcast import broadcast
from sims.experiments.churn import churn
from sims.experiments.convergence import convergence
from sims.experiments.figures import Findings
from sims.experiments.lifeguard import lifeguard
from sims.experiments.membership import membership
from sims.experiments.nodes import nodes
from sims.experiments.partition import partition
from sims.experiments.replay import replay
from sims.experiments.scale import relayed_convergence, scale

NODES_MIN, NODES_MAX = 3, 128
MODELLED_MAX = 20_000
"""In what is only modelled; memory is what ends it."""

Measure = Callable[[int, int, float], Findings]


@dataclass(frozen=True, slots=True)
class Experiment:
    """One experiment.

    Attributes:
        description: One line for people.
        measure: Makes the figures, given a seed, how many members, and how long.
        nodes: How many members there are if nobody says.
        nodes_min: With fewer it shows nothing.
        nodes_max: No more of them can be made.
        beyond: Makes the figures of more members than that, up to `MODELLED_MAX`, from a model.
        seconds: Virtual seconds of whatever it is about if nobody says; None when its length is fixed.
    """

    description: str
    measure: Measure
    nodes: int = 100
    nodes_min: int = 6
    nodes_max: int = NODES_MAX
    beyond: Measure | None = None
    seconds: float | None = None

    def run(self, seed: int, nodes: int | None = None, seconds: float | None = None) -> Findings:
        """Make the figures.

        Raises:
            ExperimentError: There are too few members, or too many.
        """
        nodes = nodes or self.nodes
        if nodes < self.nodes_min:
            raise ExperimentError(f"this experiment needs at least {self.nodes_min} members")
        measure = self.measure if nodes <= self.nodes_max else self.beyond
        if measure is None:
            raise ExperimentError(f"this experiment has at most {self.nodes_max} members: each has a link to each")
        return measure(seed, nodes, seconds or self.seconds or 0.0)


@dataclass(frozen=True, slots=True)
class TraceExperiment:
    """One experiment on a trace of requests.

    Attributes:
        description: One line for people.
        measure: Makes the figures, given the trace, and how many members, one size after another.
        sizes: How many members there are if nobody says.
    """

    description: str
    measure: Callable[[Path, Sequence[int]], Findings]
    sizes: tuple[int, ...]

    def run(self, trace: Path | None, nodes: int | None = None) -> Findings:
        """Make the figures.

        Raises:
            ExperimentError: There is no trace, or it isn't one.
        """
        if trace is None:
            raise ExperimentError("this experiment needs --trace FILE, a trace of requests like Mooncake's")
        return self.measure(trace, self.sizes if nodes is None else (nodes,))


EXPERIMENTS = {
    "membership": Experiment("members end, with and without a sign: who knows when, and what all send", membership),
    "lifeguard": Experiment("some members are slow: who that is well is declared dead for it", lifeguard, seconds=300.0),
    "partition": Experiment("two halves can't hear each other for a while: how long until all agree", partition, seconds=60.0),
    "churn": Experiment("members crash, leave and join, one blow a second", churn, seconds=120.0),
    "nodes": Experiment(
        "real nodes over streams in memory: one is killed, one link is cut",
        nodes,
        nodes=5,
        nodes_min=3,
        seconds=60.0,
    ),
    "convergence": Experiment(
        f"an inventory changes: rounds, seconds and bytes until all know; above {NODES_MAX} members a model",
        convergence,
        beyond=relayed_convergence,
    ),
    "broadcast": Experiment("Gossip Glomers' broadcast, 100 ms links", broadcast, nodes=25, seconds=20.0),
    "scale": Experiment(
        "thousands of members, modelled: relayed logs, a sparse view, a rendezvous directory",
        scale,
        nodes=10_000,
        nodes_max=MODELLED_MAX,
    ),
}
TRACE_EXPERIMENTS = {
    "replay": TraceExperiment(
        "a trace of real requests over 8, 64 and 512 instances: hits, and what they tell each other", replay, sizes=(8, 64, 512)
    ),
}
