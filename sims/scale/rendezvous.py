"""A rendezvous directory: which few members keep the list of a chunk's holders, worked out by anyone from the members alone.

Each member's weight for a chunk is a hash of both; the heaviest keep it. When a member goes, only what it kept goes elsewhere.

Source: Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", 1998 (highest random weight).
"""

import numpy as np
from numpy.typing import NDArray

from p2pkv.core.rows import Fingerprints

KEEPERS = 3
BATCH_WEIGHTS = 2**18
"""Worked out at a time: 2 MiB, which stay in a core's own cache."""

Hashes = NDArray[np.uint64]
Indexes = NDArray[np.intp]


def keepers(chunks: Fingerprints, members: Hashes, count: int = KEEPERS) -> Indexes:
    """Who keeps each chunk: a row for each chunk, the `count` heaviest members in order, as indexes into `members`."""
    kept_by = np.empty((len(chunks), count), np.intp)
    step = max(1, BATCH_WEIGHTS // len(members))
    for begin in range(0, len(chunks), step):
        weights = _weights(chunks[begin : begin + step], members)
        rows = np.arange(len(weights))
        for place in range(count):
            heaviest = weights.argmax(axis=1)
            kept_by[begin : begin + step, place] = heaviest
            weights[rows, heaviest] = 0
    return kept_by


def _weights(chunks: Fingerprints, members: Hashes) -> Hashes:
    """Of each member for each chunk: both mixed as SplitMix64 finishes."""
    mixed = chunks[:, None] ^ members
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
