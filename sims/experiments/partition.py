"""Two halves that can't hear each other for a minute: how long after it until all agree again, on members and on inventory.

Meanwhile each half goes on storing, so that there is something to catch up with.
"""

from sims.experiments.cluster import Cluster
from sims.experiments.figures import Figure, Findings
from sims.experiments.prompts import held_count, store

CALM_S = 5.0
STORED = 8
"""Chunks that each stores while they are apart."""
HEALED_S = 10.0
"""Bar: by then all agree again."""


def partition(seed: int, nodes: int, seconds: float) -> Findings:
    """Cut a cluster in two for that long, and heal it."""
    found = Findings("partition", nodes, seed)
    cluster = Cluster(str(seed), nodes)
    cluster.join()
    cluster.run(CALM_S)
    names = list(cluster.nodes)
    halves = names[: nodes // 2], names[nodes // 2 :]
    for one in halves[0]:
        for other in halves[1]:
            cluster.network.cut(one, other, seconds=seconds)
    healed_at = cluster.clock.now + seconds
    split_s = cluster.run_until(lambda: _is_split(cluster, halves), at_most_s=seconds)
    for number, name in enumerate(names):
        store(cluster, name, number, STORED)
    cluster.clock.run(until=healed_at)
    wrong = [each for each in cluster.false_deaths() if (each.observer in halves[0]) == (each.member in halves[0])]
    cluster.count_anew()
    members_s = cluster.run_until(cluster.agrees)
    both_s = cluster.run_until(lambda: _know_all(cluster) and cluster.agrees())
    nbytes, _ = cluster.sent_a_second()
    found.figures += [
        Figure("apart: all of the other half given up", split_s, "s"),
        Figure("apart: one's own half declared dead", len(wrong), at_most=0.0),
        Figure("healed: all agree on members", members_s, "s", at_most=HEALED_S),
        Figure(
            "healed: all agree on inventory too",
            None if both_s is None else cluster.clock.now - healed_at,
            "s",
            at_most=HEALED_S,
        ),
        Figure("healed: bytes a second and node until then", nbytes, "B"),
    ]
    return found


def _is_split(cluster: Cluster, halves: tuple[list[str], list[str]]) -> bool:
    """Whether each half has given up all of the other."""
    for half in halves:
        for name in half:
            living = [each.instance for each in cluster.nodes[name].machine.members() if each.state.is_living]
            if any(each not in half for each in living):
                return False
    return True


def _know_all(cluster: Cluster) -> bool:
    """Whether everyone knows what everyone holds."""
    holds = {node.name: len(node.resident) for node in cluster.running}
    return all(held_count(node, name) == count for node in cluster.running for name, count in holds.items())
