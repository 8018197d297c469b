"""What the two ends of a lane say to each other, over a unix socket that carries memory as descriptors, or over TCP.

    source                                target
    LaneChallenge(nonce)             ->
                                     <-   LaneOpen(event_id, nonce, mac)
    LaneOpened(mac)                  ->
                                     <-   Fetch(keys)                         over TCP once, by handoff any number of times
    Descriptors(shards, is_last)     ->                                       by handoff: one or more for each `Fetch`

    Turn(has_come=False)             ->                                       over TCP: every few seconds until others are done
    Turn(has_come=True)              ->                                       then no frames any more, but
    header ‖ payload ‖ checksum      ->                                       each shard of each key, as asked and by worker,
    header of 0 bytes                ->                                       or this for a key that isn't held

Each proves with a MAC over both fresh nonces that it holds the move's ticket; the ticket itself never travels here.
"""

import hmac
import struct
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Self

from annotated_types import Ge, Le, Len

from p2pkv.core.ids import EventId
from p2pkv.core.keys import ChunkKey
from p2pkv.core.messages import Ticket
from p2pkv.wire.codec import Codec
from p2pkv.wire.frames import MAX_FRAME_DESCRIPTORS

NONCE_NBYTES = 16
MAX_FETCH_KEYS = MAX_FRAME_DESCRIPTORS
"""Of one `Fetch`: as many chunks of one shard as one frame can answer. Chunks of more shards take several frames."""
MAX_FRAME_NBYTES = 16 * 1024
"""Of a lane's frame, as whoever connects may send one. The longest is `Descriptors`: 250 shards of 34 bytes."""
CHECKSUM_NBYTES = 16
"""Of xxh3_128, big-endian as its authors write it."""

LaneNonce = Annotated[bytes, Len(NONCE_NBYTES, NONCE_NBYTES)]
Mac = Annotated[bytes, Len(32, 32)]


class LaneEnd(Enum):
    """Who makes a MAC, so that neither end can send the other's back."""

    SOURCE = b"p2pkv-lane-source"
    TARGET = b"p2pkv-lane-target"


def lane_mac(ticket: Ticket, end: LaneEnd, *, source_nonce: LaneNonce, target_nonce: LaneNonce, event_id: EventId) -> Mac:
    """HMAC-SHA256 that proves to the other end of a lane that this one holds the move's ticket."""
    return hmac.digest(ticket, end.value + source_nonce + target_nonce + event_id.encode(), "sha256")


@dataclass(frozen=True, slots=True)
class LaneChallenge:
    """Source to target, at once: prove yourself over this."""

    nonce: LaneNonce


@dataclass(frozen=True, slots=True)
class LaneOpen:
    """Target to source: I come for this move. Answered with `LaneOpened`, or with the end of the connection and no word."""

    event_id: EventId
    nonce: LaneNonce
    mac: Mac


@dataclass(frozen=True, slots=True)
class LaneOpened:
    """Source to target: I am the one."""

    mac: Mac


@dataclass(frozen=True, slots=True)
class Fetch:
    """Target to source: give me these chunks. Answered with one or more `Descriptors`, over TCP with `Turn` and the bytes."""

    keys: Annotated[tuple[ChunkKey, ...], Len(1, MAX_FETCH_KEYS)]


@dataclass(frozen=True, slots=True)
class PassedShard:
    """One descriptor: which chunk's, and which worker's shard."""

    key: ChunkKey
    worker: Annotated[int, Ge(0), Le(1023)]


@dataclass(frozen=True, slots=True)
class Descriptors:
    """Source to target: the descriptors of `shards` ride along, in this order.

    When `is_last` has come, what was asked for and didn't come isn't held any more, or was never part of this move.
    """

    shards: Annotated[tuple[PassedShard, ...], Len(0, MAX_FRAME_DESCRIPTORS)]
    is_last: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """Source to target, over TCP: other lanes are served before this one; or, when its turn has come, the shards follow."""

    has_come: bool


LaneMessage = LaneChallenge | LaneOpen | LaneOpened | Fetch | Descriptors | Turn


@cache
def lane_codec() -> Codec[LaneMessage]:
    """The codec of the lane; made once, on first use."""
    return Codec(LaneMessage)


# --- shards over TCP ------------------------------------------------------------------------------------------------------

_SHARD_HEADER = struct.Struct("<16sHQ")
SHARD_HEADER_NBYTES = _SHARD_HEADER.size


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What stands before a shard's payload.

    Attributes:
        key: Of its chunk.
        worker: Whose part of the chunk it is.
        nbytes: Payload that follows, and then its checksum. 0, with worker 0: the chunk isn't held, and nothing follows.
    """

    key: ChunkKey
    worker: int
    nbytes: int

    def encode(self) -> bytes:
        """Its `SHARD_HEADER_NBYTES` bytes."""
        return _SHARD_HEADER.pack(self.key, self.worker, self.nbytes)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Self:
        """Read `SHARD_HEADER_NBYTES` bytes, whatever they say: all of them are a header."""
        return cls(*_SHARD_HEADER.unpack(data))
