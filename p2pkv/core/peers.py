"""Links and members as membership keeps them, and what it has to tell the other parts."""

from dataclasses import dataclass
from math import inf

from p2pkv.core.ids import Address, Incarnation, InstanceId, LinkId
from p2pkv.core.messages import Hello
from p2pkv.core.records import MemberRecord
from p2pkv.core.suspicion import Suspicion


@dataclass(frozen=True, slots=True)
class Joined:
    """An instance is linked: for the first time, again, or as another boot of itself."""

    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Lost:
    """An instance died, left, or gave way to another boot of itself."""

    instance: InstanceId


@dataclass(slots=True)
class Link:
    """One websocket: who is at its other end, once it has said Hello, and a newcomer's Hello that waits for its name."""

    link: LinkId
    dialed: Address | None
    opened_at: float
    heard_at: float
    instance: InstanceId | None = None
    challenge: Hello | None = None
    challenged_until: float = inf


@dataclass(slots=True)
class Member:
    """One instance that has said Hello.

    Attributes:
        record: Its last word about itself, and the state that it is in as far as is known.
        link: To it; None when it is lost.
        incarnation: The highest that it has made, by its own word or by hearsay; `record` may be of an earlier one.
        joined_at: When it was met.
        lost_at: When its link was lost, or it ended.
        failed_dials: Since then.
        suspicion: What it has to refute while it is a suspect.
    """

    record: MemberRecord
    link: LinkId | None
    incarnation: Incarnation
    joined_at: float
    lost_at: float = inf
    failed_dials: int = 0
    suspicion: Suspicion | None = None
