"""What members would say to each other if they relayed each other's logs, and what that takes on the wire.

Nothing in p2pkv sends these. They are dataclasses as in `p2pkv/core/messages.py`, so that the peers' own codec says how long
they are. What is repeated in a message lies packed in one field, as the changes of an `InventoryDelta` do:

    head: an origin's boot (a hash of instance and generation, 8 bytes) and the sequence that its log has got to (4).
    want: which of the other's heads (2 bytes), and the sequence from which on (4).
    part: an origin's boot (8), the first sequence (4), and how many changes follow (2).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from p2pkv.core.messages import CHANGE_NBYTES, INVENTORY_PAGE_ENTRIES
from p2pkv.wire.codec import Codec

HEAD_NBYTES, WANT_NBYTES, PART_NBYTES = 12, 6, 14
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RelayDigest:
    """First: the logs in which I have learnt something of late, and a hash of how far I have got in all."""

    root: int
    heads: bytes


@dataclass(frozen=True, slots=True)
class RelayAnswer:
    """Second, where there is anything to say: what I want of yours, and mine that you haven't named."""

    wants: bytes
    heads: bytes


@dataclass(frozen=True, slots=True)
class RelayedChanges:
    """Third and fourth: parts of logs that were asked for; the third also asks."""

    wants: bytes
    parts: bytes
    changes: bytes


@cache
def relay_codec() -> Codec[RelayDigest | RelayAnswer | RelayedChanges]:
    """The codec of the three."""
    return Codec(RelayDigest | RelayAnswer | RelayedChanges)


@cache
def _nbytes(message: RelayDigest | RelayAnswer | RelayedChanges) -> int:
    return len(relay_codec().encode(message))


def digests_nbytes(heads: Counts) -> int:
    """Bytes of digests with so many heads each."""
    counts, times = np.unique(heads, return_counts=True)
    sizes = [_nbytes(RelayDigest(2**64 - 1, bytes(HEAD_NBYTES * count))) for count in counts.tolist()]
    return int(np.dot(sizes, times))


def answers_nbytes(wants: Counts, heads: Counts) -> int:
    """Bytes of answers; one with nothing in it isn't sent."""
    pairs, times = np.unique(np.stack([wants, heads], axis=1), axis=0, return_counts=True)
    sizes = [
        _nbytes(RelayAnswer(bytes(WANT_NBYTES * want), bytes(HEAD_NBYTES * head))) if want or head else 0
        for want, head in pairs.tolist()
    ]
    return int(np.dot(sizes, times))


def changes_nbytes(wants: Counts, parts: Counts, *, changes_a_part: int) -> int:
    """Bytes of relayed changes, in as many messages as it takes; one with nothing in it isn't sent."""
    pairs, times = np.unique(np.stack([wants, parts], axis=1), axis=0, return_counts=True)
    sizes = [_parted_nbytes(want, part, changes_a_part) for want, part in pairs.tolist()]
    return int(np.dot(sizes, times))


def _parted_nbytes(want: int, part: int, changes_a_part: int) -> int:
    """Of what one says to one at once: no message has more changes than an `InventoryDelta`."""
    at_most = max(1, INVENTORY_PAGE_ENTRIES // changes_a_part)
    nbytes = 0
    while want or part:
        here = min(part, at_most)
        changes = bytes(CHANGE_NBYTES * here * changes_a_part)
        nbytes += _nbytes(RelayedChanges(bytes(WANT_NBYTES * want), bytes(PART_NBYTES * here), changes))
        want, part = 0, part - here
    return nbytes
