"""Members crash, leave and join, one blow a second: how soon all others know, and whether anyone is wrongly given up."""

from random import Random

from sims.experiments.cluster import Cluster, Turn
from sims.experiments.figures import Figure, Findings, spread
from sims.experiments.membership import KILLED_S
from sims.world import Node

CALM_S = 5.0
BLOW_EVERY_S = 1.0
BACK_S = 10.5
"""From a member's end until it is started again, as another boot: between two blows, so that it has met whom it judges."""
JUDGED_S = 8.0
"""After a blow, who of those that saw it knows: before it is undone."""


class Churn:
    """Blows on a cluster, and what came of them."""

    def __init__(self, cluster: Cluster, rng: Random) -> None:
        self.known_s: dict[str, list[float]] = {"crashed": [], "left": [], "joined": []}
        self.unknown_count = 0
        self._cluster = cluster
        self._rng = rng

    def strike(self) -> None:
        """One member crashes or leaves; it is back some time later."""
        name = self._rng.choice([node.name for node in self._cluster.running if not node.is_leaving])
        if self._rng.random() < 0.5:
            self._follow("crashed", self._cluster.crashes(name))
        else:
            self._follow("left", self._cluster.leaves(name))
        self._cluster.clock.after(BACK_S, lambda: self._follow("joined", self._cluster.begins(name)))

    def _follow(self, what: str, turn: Turn) -> None:
        observers = [node for node in self._cluster.running if node.name != turn.member]
        self._cluster.clock.after(JUDGED_S, lambda: self._judge(what, turn, observers))

    def _judge(self, what: str, turn: Turn, observers: list[Node]) -> None:
        """Count who knows, of those that have run all the while."""
        names = [node.name for node in observers if node.is_up and not node.is_leaving]
        for known_s in self._cluster.known_s(turn, names):
            if known_s is None:
                self.unknown_count += 1
            else:
                self.known_s[what].append(known_s)


def churn(seed: int, nodes: int, seconds: float) -> Findings:
    """Strike a cluster once a second for that long, and see what they know."""
    found = Findings("churn", nodes, seed)
    cluster = Cluster(str(seed), nodes)
    cluster.join()
    cluster.run(CALM_S)
    cluster.count_anew()
    blows = Churn(cluster, Random(f"{seed}:churn"))
    for _ in range(int(seconds / BLOW_EVERY_S)):
        blows.strike()
        cluster.run(BLOW_EVERY_S)
    nbytes, messages = cluster.sent_a_second()
    agreed_s = cluster.run_until(cluster.agrees)
    cluster.run(BACK_S + JUDGED_S)
    known_count = sum(map(len, blows.known_s.values()))
    found.figures += [
        Figure("share that learnt", known_count / (known_count + blows.unknown_count), at_least=1.0),
        *spread("a crash known by one", blows.known_s["crashed"], "s", p99_below=KILLED_S),
        *spread("a leave known by one", blows.known_s["left"], "s"),
        *spread("a join known by one", blows.known_s["joined"], "s"),
        Figure("running ones declared dead", len(cluster.false_deaths()), at_most=0.0),
        Figure("bytes a second and node", nbytes, "B"),
        Figure("messages a second and node", messages),
        Figure("from the last blow until all agree", agreed_s, "s"),
    ]
    return found
