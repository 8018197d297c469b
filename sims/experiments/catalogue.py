"""All experiments by name, and the size at which each is meant to run."""

from collections.abc import Callable
from dataclasses import dataclass

from sims.experiments.broadcast import broadcast
from sims.experiments.churn import churn
from sims.experiments.convergence import convergence
from sims.experiments.figures import Findings
from sims.experiments.lifeguard import lifeguard
from sims.experiments.membership import membership
from sims.experiments.nodes import nodes
from sims.experiments.partition import partition

NODES_MIN, NODES_MAX = 3, 128


@dataclass(frozen=True, slots=True)
class Experiment:
    """One experiment.

    Attributes:
        description: One line for people.
        measure: Makes the figures, given a seed, how many members, and how long.
        nodes: How many members there are if nobody says.
        nodes_min: With fewer it shows nothing.
        seconds: Virtual seconds of whatever it is about if nobody says; None when its length is fixed.
    """

    description: str
    measure: Callable[[int, int, float], Findings]
    nodes: int = 100
    nodes_min: int = 6
    seconds: float | None = None

    def run(self, seed: int, nodes: int | None = None, seconds: float | None = None) -> Findings:
        """Make the figures."""
        return self.measure(seed, nodes or self.nodes, seconds or self.seconds or 0.0)


EXPERIMENTS = {
    "membership": Experiment("members end, with and without a sign: who knows when, and what all send", membership),
    "lifeguard": Experiment("some members are slow: who that is well is declared dead for it", lifeguard, seconds=300.0),
    "partition": Experiment("two halves can't hear each other for a while: how long until all agree", partition, seconds=60.0),
    "churn": Experiment("members crash, leave and join, one blow a second", churn, seconds=120.0),
    "convergence": Experiment("an inventory changes: rounds, seconds and bytes until all know", convergence),
    "nodes": Experiment(
        "real nodes over streams in memory: one is killed, one link is cut",
        nodes,
        nodes=5,
        nodes_min=3,
        seconds=60.0,
    ),
    "broadcast": Experiment("Gossip Glomers' broadcast, 100 ms links", broadcast, nodes=25, seconds=20.0),
}
