"""A change of one inventory, until all know: seconds, rounds, and bytes for what has to be said.

A round is one message on the way from the owner: who hears it from the owner itself has it in the first. Owners change one
after another, each storing one chunk, then each storing many at once.
"""

from p2pkv.core.events import Event, MessageReceived
from p2pkv.core.ids import InstanceId
from p2pkv.core.messages import (
    Goodbye,
    Hello,
    InventoryDelta,
    InventoryPage,
    Leaving,
    MemberTable,
    Ping,
    Pong,
    ProbeAnswer,
    ProbeRequest,
    Rumours,
    Status,
)
from sims.experiments.cluster import Cluster
from sims.experiments.figures import Figure, Findings, Sample, percentile, spread
from sims.experiments.prompts import CHANGE_NBYTES, held_count, store
from sims.world import Node

OWNERS = 20
CHUNKS = (1, 64)
CALM_S = 5.0
WAIT_S = 1.5
"""For one change; longer than any is to take."""
ALL_KNOW_S = 1.2
"""Bar: 99.99 % know by then, which in a hundred members is all."""
OVERHEAD = 1.5
"""Bar: so many times the payload of what was delivered may be sent."""
ROUNDS = {10: 4.0, 100: 5.0, 1000: 7.0, 10_000: 8.0}
"""Bars by number of members."""
OF_MEMBERSHIP = {Hello, Goodbye, Leaving, MemberTable, Ping, Pong, ProbeAnswer, ProbeRequest, Rumours, Status}
"""Sent without any change too."""


class Change:
    """One owner's change, on its way."""

    def __init__(self, cluster: Cluster, owner: InstanceId, chunks: int) -> None:
        self.known_s: dict[InstanceId, float] = {}
        self.rounds: dict[InstanceId, int] = {owner: 0}
        self.duplicate_count = 0
        self._cluster = cluster
        self._owner = owner
        self._wanted = held_count(cluster.nodes[owner], owner) + chunks
        self._began_at = cluster.clock.now
        cluster.on_handled = self._handled

    def _handled(self, node: Node, event: Event, sender: InstanceId | None) -> None:
        if not isinstance(event, MessageReceived) or sender is None:
            return
        if node.name in self.rounds:
            self.duplicate_count += isinstance(event.message, InventoryDelta | InventoryPage)
        elif held_count(node, self._owner) >= self._wanted:
            self.known_s[node.name] = self._cluster.clock.now - self._began_at
            self.rounds[node.name] = self.rounds[sender] + 1


def convergence(seed: int, nodes: int, _seconds: float) -> Findings:
    """Let owners change their inventories, one after another."""
    found = Findings("convergence", nodes, seed)
    cluster = Cluster(str(seed), nodes)
    cluster.join()
    cluster.run(CALM_S)
    number = 0
    for chunks in CHUNKS:
        changes: list[Change] = []
        cluster.count_anew()
        for owner in list(cluster.nodes)[:OWNERS]:
            number += 1
            changes.append(Change(cluster, owner, chunks))
            store(cluster, owner, number, chunks)
            cluster.run(WAIT_S)
        found.figures += _figures(cluster, changes, chunks)
        found.samples.append(_sample(cluster, changes, chunks))
    return found


def _name(chunks: int) -> str:
    return f"{chunks} chunk{'s' if chunks > 1 else ''}"


def _sample(cluster: Cluster, changes: list[Change], chunks: int) -> Sample:
    known_s = tuple(each for change in changes for each in change.known_s.values())
    return Sample(_name(chunks), known_s, len(changes) * (len(cluster.nodes) - 1))


def _figures(cluster: Cluster, changes: list[Change], chunks: int) -> list[Figure]:
    nodes = len(cluster.nodes)
    name = _name(chunks)
    learnt = sum(len(change.known_s) for change in changes)
    all_s = [max(change.known_s.values()) for change in changes if len(change.known_s) == nodes - 1]
    all_rounds = [float(max(change.rounds.values())) for change in changes]
    sent_nbytes = sum(nbytes for kind, nbytes in cluster.sent_nbytes.items() if kind not in OF_MEMBERSHIP)
    return [
        Figure(f"{name}: share that learnt", learnt / (len(changes) * (nodes - 1)), at_least=1.0),
        *spread(f"{name}: known by all", all_s, "s", p99_below=ALL_KNOW_S),
        Figure(f"{name}: rounds until all know, p50", percentile(all_rounds, 0.5)),
        Figure(f"{name}: rounds until all know, p99", percentile(all_rounds, 0.99), at_most=ROUNDS.get(nodes)),
        Figure(f"{name}: bytes sent for it", sent_nbytes / len(changes), "B"),
        Figure(f"{name}: times the payload", sent_nbytes / (learnt * chunks * CHANGE_NBYTES), at_most=OVERHEAD),
        Figure(f"{name}: duplicates", sum(change.duplicate_count for change in changes)),
    ]
