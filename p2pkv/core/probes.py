"""One question whether a member lives, put to itself and then to others.

    A member has `probe_timeout_s` for its Pong. Then others are asked to try, and the member is asked again; until
    the probe's end any answer will do. A member without a link can't be asked: the others are at once.
    Who was asked and hears nothing either says so (a nack), or that its dial was refused.
    A probe that ends without an answer makes its member a suspect; `liveness` does that.

Source: SWIM, section 3.1; Lifeguard, section IV-A, for nacks and for stretching both times by one's own health (memberlist
stretches the interval alone).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from p2pkv.core.ids import InstanceId
from p2pkv.core.messages import Nonce
from p2pkv.core.records import Reach


@dataclass(slots=True)
class Probe:
    """One member's, under way. `asked` are the others, and what they have answered."""

    instance: InstanceId
    nonce: Nonce
    asks_at: float
    ends_at: float
    asked: dict[InstanceId, Reach | None] = field(default_factory=dict)

    @property
    def due_at(self) -> float:
        """When it goes on."""
        return min(self.asks_at, self.ends_at)

    def ask(self, helpers: Iterable[InstanceId]) -> None:
        """The others are asked, once."""
        self.asks_at = inf
        self.asked.update(dict.fromkeys(helpers))

    def answered(self, helper: InstanceId, reach: Reach) -> bool:
        """One of the others answers; whether it was asked. A second answer counts when the member was reached after all."""
        if helper not in self.asked:
            return False
        self.asked[helper] = reach
        return True

    @property
    def nack_count(self) -> int:
        """Others that have answered."""
        return sum(reach is not None for reach in self.asked.values())

    def refusal_count(self) -> int | None:
        """Others whose dials were refused; None as long as any of them has said, or may yet say, anything else."""
        return len(self.asked) if all(reach is Reach.REFUSED for reach in self.asked.values()) else None

    def postpone(self, seconds: float) -> None:
        """Its time didn't run meanwhile."""
        self.asks_at += seconds
        self.ends_at += seconds
