"""How well this node itself does: a slow observer takes its own slowness for others' deaths.

    Each sign that this node is slow adds to a score, each probe that is answered takes one off; at score s its probes take
    s + 1 times as long. What counts: a probe that failed where nobody could be asked; each nack that didn't come where somebody
    was, since most are well; a suspicion of oneself that had to be refuted; an event loop that came late.

Source: Lifeguard, section IV-A (LHA-Probe), and its table of events. The event loop's lag is ours: a Python process that an
engine's copies hold up knows it before anyone else does.
"""


class LocalHealth:
    """The score, from 0, which is well, to `worst`."""

    def __init__(self, worst: int) -> None:
        self._worst = worst
        self.score = 0

    @property
    def factor(self) -> int:
        """By how much this node's probes are stretched."""
        return self.score + 1

    def probe_answered(self) -> None:
        """A probe was answered, directly or by way of others."""
        self._add(-1)

    def probe_failed(self, *, asked_count: int, nack_count: int) -> None:
        """A probe failed. Those of the others that say that they hear nothing either say thereby that this node is well."""
        self._add(asked_count - nack_count if asked_count else 1)

    def refuted(self) -> None:
        """Somebody suspected this node."""
        self._add(1)

    def lagged(self) -> None:
        """This node did something late."""
        self._add(1)

    def _add(self, points: int) -> None:
        self.score = min(self._worst, max(0, self.score + points))
