"""Names of things: instances, locations, positions, links, events.

An `event_id` embeds the three parties of a move, so that any node can ask them for it:
`move~SOURCE~TARGET~COORDINATOR~16 hex digits`. `~` can't occur in an instance id and needs no escaping in a URL.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Annotated

from annotated_types import Ge, Len, Lt, Predicate

_INSTANCE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
EVENT_ID_MAX_LENGTH = 4 + 3 * 64 + 16 + 4


def is_instance_id(name: str) -> bool:
    """Whether `name` may name an instance or a cluster: 1-64 of letters, digits, `.`, `_`, `-`, and not only dots."""
    return _INSTANCE_ID.fullmatch(name) is not None and name.strip(".") != ""


InstanceId = Annotated[str, Predicate(is_instance_id)]
Generation = Annotated[int, Ge(0), Lt(2**63)]
"""Which boot of an instance: milliseconds of its wall clock at start, higher than any it had before."""
Incarnation = Annotated[int, Ge(0), Lt(2**62)]
"""Which version of its own record an instance has made, within a generation; also SWIM's: a newer one refutes a suspicion."""
LinkId = int
"""One connection to a peer, numbered by the shell; never reused in one process."""
RequestId = int
"""One request through a door, numbered by the shell; its `Answer` carries it back."""
EventId = Annotated[str, Len(1, EVENT_ID_MAX_LENGTH)]
StageId = Annotated[str, Len(1, EVENT_ID_MAX_LENGTH)]
"""Who put bytes into the store that nobody owns yet: a move's event id, or an engine's lease id."""
WallTime = Annotated[float, Ge(0), Lt(1e11)]
"""Seconds since the Unix epoch. Shown to people, never used for a deadline."""


class Location(StrEnum):
    """Where an instance keeps chunks."""

    LOCAL_CPU = "LocalCPUBackend"
    LOCAL_DISK = "LocalDiskBackend"


@dataclass(frozen=True, slots=True)
class Position:
    """A location of an instance: the two ends of a move are positions."""

    instance: InstanceId
    location: Location


@dataclass(frozen=True, slots=True)
class Address:
    """Where a websocket door listens."""

    host: Annotated[str, Len(1, 255)]
    port: Annotated[int, Ge(1), Lt(65536)]

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Parties:
    """Who takes part in a move, as its event id says."""

    source: InstanceId
    target: InstanceId
    coordinator: InstanceId


def make_event_id(parties: Parties, rng: Random) -> EventId:
    """A new event id that names `parties`."""
    return f"move~{parties.source}~{parties.target}~{parties.coordinator}~{rng.getrandbits(64):016x}"


def parse_event_id(event_id: EventId) -> Parties | None:
    """The parties of a move's event id; None when it isn't one."""
    parts = event_id.split("~")
    if len(parts) != 5 or parts[0] != "move" or not all(is_instance_id(name) for name in parts[1:4]):
        return None
    if re.fullmatch(r"[0-9a-f]{16}", parts[4]) is None:
        return None
    return Parties(source=parts[1], target=parts[2], coordinator=parts[3])
