"""How soon members learn of an end, what they send meanwhile and when nothing happens, and whom they wrongly think dead.

    Idle: nothing happens. Bytes and messages a second.
    Killed: members crash one after another; their links close.
    Silent: members stand still one after another; their links stay open.
    Half lost: every other message is lost, and members crash.

An end counts from when it happens until the last of those that are well has declared it.
"""

from collections.abc import Callable
from itertools import chain

from sims.experiments.cluster import Cluster, Turn
from sims.experiments.figures import Figure, Findings, Sample, spread
from sims.scenario import Faults

VICTIMS = 10
CALM_S = 20.0
"""After joining, until rumours of that have died down."""
IDLE_S = 10.0
SMALLER = (10, 20, 40)
IDLE_NBYTES = {10: 15_000.0, 20: 25_000.0, 40: 50_000.0, 100: 120_000.0}
"""Bars for bytes a second by number of members: those of chitchat's own test, at 300 ms rounds."""
KILLED_S, SILENT_S, HALF_LOST_S = 2.0, 10.0, 15.0
"""Bars: all know by then."""
PAUSE_S = 2.0
HALF_LOST_DELAY_S = (0.0002, 0.1)
NO_DEATH_S = 30.0
"""For at least so long nobody well may be declared dead while every other message is lost."""

Blow = Callable[[str], Turn]


def membership(seed: int, nodes: int, _seconds: float) -> Findings:
    """Measure all four."""
    found = Findings("membership", nodes, seed)
    for count in [each for each in SMALLER if each < nodes]:
        found.figures += idle(Cluster(f"{seed}:idle", count), count)
    cluster = Cluster(f"{seed}:killed", nodes)
    found.figures += idle(cluster, nodes)
    _add(found, *ends(cluster, "killed", cluster.crashes, KILLED_S))
    cluster = joined(f"{seed}:silent", nodes)
    silent_s = 2 * (VICTIMS * PAUSE_S + SILENT_S)
    _add(found, *ends(cluster, "silent", lambda name: cluster.stops(name, silent_s), SILENT_S))
    lossy = joined(f"{seed}:half lost", nodes)
    lossy.network.faults = Faults(loss=0.5, delay_s=HALF_LOST_DELAY_S)
    _add(found, *ends(lossy, "killed, half lost", lossy.crashes, HALF_LOST_S, then_s=NO_DEATH_S))
    return found


def _add(found: Findings, figures: list[Figure], sample: Sample) -> None:
    found.figures += figures
    found.samples.append(sample)


def joined(seed: str, nodes: int) -> Cluster:
    """A cluster in which all have found each other."""
    cluster = Cluster(seed, nodes)
    cluster.join()
    return cluster


def idle(cluster: Cluster, nodes: int) -> list[Figure]:
    """What a new cluster sends once all have found each other and nothing happens."""
    joined_s = cluster.join()
    cluster.run(CALM_S)
    cluster.count_anew()
    cluster.run(IDLE_S)
    nbytes, messages = cluster.sent_a_second()
    return [
        Figure(f"{nodes} members: all joined", joined_s, "s"),
        Figure(f"{nodes} members, idle: bytes a second and node", nbytes, "B", below=IDLE_NBYTES.get(nodes)),
        Figure(f"{nodes} members, idle: messages a second and node", messages),
    ]


def ends(cluster: Cluster, name: str, blow: Blow, bar_s: float, *, then_s: float = 0.0) -> tuple[list[Figure], Sample]:
    """Let blows fall on members one after another, and see who learns of it and when."""
    names = list(cluster.nodes)
    victims = names[1 :: max(1, len(names) // VICTIMS)][: min(VICTIMS, len(names) // 3)]
    well = [each for each in names if each not in victims]
    struck: list[Turn] = []
    cluster.count_anew()
    for victim in victims:
        struck.append(blow(victim))
        cluster.run(PAUSE_S)
    cluster.run(max(then_s, 2 * bar_s))
    nbytes, _ = cluster.sent_a_second()
    learnt = [[each for each in cluster.known_s(turn, well) if each is not None] for turn in struck]
    by_all = [max(known_s) for known_s in learnt if len(known_s) == len(well)]
    wrong = [each for each in cluster.false_deaths() if each.member in well]
    sample = Sample(name, tuple(chain(*learnt)), len(struck) * len(well))
    figures = [
        Figure(f"{name}: share that learnt", len(sample.values) / sample.expected_count, at_least=1.0),
        *spread(f"{name}: known by one", sample.values, "s"),
        *spread(f"{name}: known by all", by_all, "s", p99_below=bar_s),
        Figure(f"{name}: live ones declared dead", len(wrong), at_most=0.0),
        Figure(f"{name}: bytes a second and node meanwhile", nbytes, "B"),
    ]
    return figures, sample
