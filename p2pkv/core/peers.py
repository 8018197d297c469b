"""Links and members as membership keeps them, and what it has to tell the other parts."""

from dataclasses import dataclass
from math import inf

from p2pkv.core.ids import Address, InstanceId, LinkId
from p2pkv.core.messages import Hello
from p2pkv.core.records import MemberRecord


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
    """One instance that has said Hello."""

    record: MemberRecord
    link: LinkId | None
    joined_at: float
    lost_at: float = inf
    failed_dials: int = 0
