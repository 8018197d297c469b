"""Slow members, as Lifeguard's authors had them: how often does anyone who is well get declared dead for it?

Some members stand still again and again, for random times, and run in between for as short a time as it takes to send and hear
a little: a host without enough processor time. Everything that comes meanwhile waits for them. With the most of them, two
other cores run the same course:

    without Lifeguard: no health score (`health_max` 0), every suspicion lasts the shortest time (`confirmations` 0), and no
        suspect hears of it first (`_warn` does nothing).
    plain SWIM: also without what is ours for the same purpose. Who was late holds that against the others, fires timers before
        it looks at what has come in, and declares dead whom it hears.

Source: Lifeguard (Dadgar, Phillips, Currey), section V. There members stood still for fixed times D and ran for fixed times I,
a grid of both; here each draws its own, over the same range.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from math import exp, log
from random import Random

from p2pkv.core.ids import InstanceId
from p2pkv.core.liveness import Liveness
from p2pkv.core.membership import Membership
from p2pkv.core.peers import Member
from p2pkv.core.timers import Timers, lan
from sims.experiments.cluster import Cluster
from sims.experiments.figures import Figure, Findings
from sims.mutant import Method, replaced

SLOW = (1, 2, 4, 8, 16)
FEW = 4
"""With so many slow ones nobody who is well may be declared dead."""
TIMES_FEWER = 50.0
STANDS_S = (0.128, 16.384)
RUNS_S = (0.001, 1.0)
"""Shortest and longest; drawn so that each doubling is as likely."""
CALM_S = 5.0


# --- the cores that are compared ------------------------------------------------------------------------------------------


def warns_no_suspect(_right: Method) -> Method:
    """A suspect hears of it by the rumours that all get."""

    def warn(_self: Liveness, _member: Member) -> None:
        return

    return warn


def blames_others(_right: Method) -> Method:
    """A node that was late itself holds it against the others."""

    def stalled(_self: Membership, _lag_s: float) -> None:
        return

    return stalled


def disbelieves_its_ears(_right: Method) -> Method:
    """A node declares dead whom it hears."""

    def is_heard(_self: Liveness, _member: Member, _now: float) -> bool:
        return False

    return is_heard


@cache
def no_lifeguard(n: int) -> Timers:
    """`lan`, where every suspicion lasts the shortest time and nobody minds his own health."""
    return replace(lan(n), health_max=0, confirmations=0)


@contextmanager
def without_lifeguard() -> Iterator[None]:
    """Beside `no_lifeguard`: no word to the suspect."""
    with replaced(Liveness, "_warn", warns_no_suspect):
        yield


@contextmanager
def plain_swim() -> Iterator[None]:
    """Beside `no_lifeguard` and a hasty cluster: nor anything of ours."""
    with ExitStack() as stack:
        stack.enter_context(without_lifeguard())
        stack.enter_context(replaced(Membership, "stalled", blames_others))
        stack.enter_context(replaced(Liveness, "_is_heard", disbelieves_its_ears))
        yield


# --- the course -----------------------------------------------------------------------------------------------------------


def lifeguard(seed: int, nodes: int, seconds: float) -> Findings:
    """Run the course with ever more slow members, and at last with the other cores."""
    found = Findings("lifeguard", nodes, seed)
    counts = [each for each in SLOW if each < nodes // 2]
    ours = 0
    for slow in counts:
        ours = false_deaths(Cluster(f"{seed}:{slow}", nodes), slow, seconds)
        found.figures.append(Figure(f"{slow} slow: well ones declared dead", ours, at_most=0.0 if slow <= FEW else None))
    slow = counts[-1]
    with without_lifeguard():
        bare = false_deaths(Cluster(f"{seed}:{slow}", nodes, timers_of=no_lifeguard), slow, seconds)
    with plain_swim():
        hasty = Cluster(f"{seed}:{slow}", nodes, timers_of=no_lifeguard)
        hasty.is_hasty = True
        plain = false_deaths(hasty, slow, seconds)
    found.figures += [
        Figure(f"{slow} slow: the same, without Lifeguard", bare),
        Figure(f"{slow} slow: the same, plain SWIM", plain),
        Figure(f"{slow} slow: times fewer than plain SWIM", plain / max(1, ours), at_least=TIMES_FEWER),
    ]
    return found


def false_deaths(cluster: Cluster, slow: int, seconds: float) -> int:
    """How often anyone declared a member dead that is well, while so many are slow."""
    cluster.join()
    cluster.run(CALM_S)
    rng = Random(f"{cluster.seed}:slow")
    slow_ones = rng.sample(list(cluster.nodes), slow)
    until = cluster.clock.now + seconds
    for name in slow_ones:
        _stand(cluster, rng, name, until)
    cluster.clock.run(until=until)
    return sum(each.member not in slow_ones for each in cluster.false_deaths())


def _stand(cluster: Cluster, rng: Random, name: InstanceId, until: float) -> None:
    """A member stands still for some time, then runs for some, and so on."""
    stands_s, runs_s = _drawn(rng, STANDS_S), _drawn(rng, RUNS_S)
    cluster.stall(name, stands_s)
    if cluster.clock.now + stands_s + runs_s < until:
        cluster.clock.after(stands_s + runs_s, partial(_stand, cluster, rng, name, until))


def _drawn(rng: Random, bounds: tuple[float, float]) -> float:
    return exp(rng.uniform(*map(log, bounds)))
