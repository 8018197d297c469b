"""Gossip Glomers' broadcast challenge, on inventories: 25 nodes, 100 ms a link, something new to tell a hundred times a second.

Source: https://fly.io/dist-sys/3d/ and /3e/, whose workload Maelstrom makes: of 100 operations a second one half are
broadcasts, the other half reads, which cost no messages. Here a broadcast is a chunk that is stored, and a read asks a node's
view. As there, messages between nodes are counted, over all operations, and the latency is until a value shows up everywhere.
"""

from random import Random

from p2pkv.core.events import Event, ShardsSealed
from p2pkv.core.ids import InstanceId
from sims.experiments.cluster import Cluster
from sims.experiments.figures import Figure, Findings, percentile
from sims.experiments.prompts import held_count, store
from sims.scenario import Faults
from sims.world import Node

LINK_S = 0.1
OPERATIONS_A_SECOND = 100
CALM_S = 5.0
SETTLE_S = 5.0
"""After the last operation, for what is still on its way."""
MESSAGES, MEDIAN_S, MAX_S = 20.0, 0.4, 0.6
"""Bars, the sharper one of 3d (30 messages, 0.4 s, 0.6 s) and 3e (20 messages, 1 s, 2 s): both at once."""


class Values:
    """All that was told, by owner and number, and who knows how much of it."""

    def __init__(self, cluster: Cluster) -> None:
        self.told_at: dict[InstanceId, list[float]] = {name: [] for name in cluster.nodes}
        self.latencies_s: list[float] = []
        self._cluster = cluster
        self._known: dict[InstanceId, dict[InstanceId, int]] = {name: dict.fromkeys(cluster.nodes, 0) for name in cluster.nodes}
        self._left: dict[tuple[InstanceId, int], int] = {}
        cluster.on_handled = self._handled

    def _handled(self, node: Node, event: Event, _sender: InstanceId | None) -> None:
        now = self._cluster.clock.now
        if isinstance(event, ShardsSealed):
            self.told_at[node.name].append(now)
            self._left[node.name, len(self.told_at[node.name])] = len(self._cluster.nodes) - 1
        known = self._known[node.name]
        for owner, told_at in self.told_at.items():
            if owner != node.name and known[owner] < len(told_at):
                count = held_count(node, owner)
                for number in range(known[owner] + 1, count + 1):
                    self._learnt(owner, number, now)
                known[owner] = count

    def _learnt(self, owner: InstanceId, number: int, now: float) -> None:
        self._left[owner, number] -= 1
        if not self._left[owner, number]:
            self.latencies_s.append(now - self.told_at[owner][number - 1])


def broadcast(seed: int, nodes: int, seconds: float) -> Findings:
    """Run the workload for that long."""
    found = Findings("broadcast", nodes, seed)
    cluster = Cluster(str(seed), nodes, faults=Faults(delay_s=(LINK_S, LINK_S)))
    cluster.join()
    cluster.run(CALM_S)
    rng = Random(f"{seed}:broadcast")
    values = Values(cluster)
    operations, broadcasts = int(seconds * OPERATIONS_A_SECOND), 0
    cluster.count_anew()
    for _ in range(operations):
        if rng.random() < 0.5:
            broadcasts += 1
            store(cluster, rng.choice(list(cluster.nodes)), broadcasts)
        cluster.run(1 / OPERATIONS_A_SECOND)
    sent = cluster.sent.total()
    cluster.run(SETTLE_S)
    found.figures += [
        Figure("share that showed up everywhere", len(values.latencies_s) / broadcasts, at_least=1.0),
        Figure("messages an operation", sent / operations, below=MESSAGES),
        Figure("messages a broadcast", sent / broadcasts),
        Figure("latency, p50", percentile(values.latencies_s, 0.5), "s", below=MEDIAN_S),
        Figure("latency, max", max(values.latencies_s, default=None), "s", below=MAX_S),
    ]
    return found
