"""A Bloom filter of fingerprints: which chunks a whole zone holds, in ten bits each, and now and then one that it doesn't.

A fingerprint is a hash already: its two halves give all probes. Bloom, not xor or binary fuse, which take a fifth less: what
a zone stores between two filters can be added by whoever has the first one, and members' filters of one size add up to their
zone's; the others would be built anew each time. None can take a chunk out: what is evicted stays a hit until the next filter.

Source: Bloom, "Space/Time Trade-offs in Hash Coding with Allowable Errors", 1970; Kirsch and Mitzenmacher, "Less Hashing, Same
Performance", 2006.
"""

from math import exp, log

import numpy as np
from numpy.typing import NDArray

from p2pkv.core.rows import Fingerprints

BITS_A_CHUNK = 10.0


class Bloom:
    """A filter with room for so many chunks."""

    def __init__(self, chunks: int, bits_a_chunk: float = BITS_A_CHUNK) -> None:
        self.bit_count = max(64, round(chunks * bits_a_chunk))
        self.probe_count = max(1, round(bits_a_chunk * log(2)))
        self._bytes = np.zeros(-(-self.bit_count // 8), np.uint8)
        assert self.bit_count < 2**32, "probes have 32 bits"

    @property
    def nbytes(self) -> int:
        """Bytes of all bits."""
        return self._bytes.nbytes

    def false_hit_rate(self, chunks: int) -> float:
        """What theory says of a filter with so many chunks in it."""
        return (1 - exp(-self.probe_count * chunks / self.bit_count)) ** self.probe_count

    def add(self, fingerprints: Fingerprints) -> None:
        """Put chunks in."""
        for bits in self._probes(fingerprints):
            np.bitwise_or.at(self._bytes, bits >> np.uint64(3), np.uint8(1) << (bits & np.uint64(7)).astype(np.uint8))

    def has(self, fingerprints: Fingerprints) -> NDArray[np.bool_]:
        """Which of these are in it: always those that are, now and then another."""
        found = np.ones(len(fingerprints), np.bool_)
        for bits in self._probes(fingerprints):
            found &= (self._bytes[bits >> np.uint64(3)] >> (bits & np.uint64(7)).astype(np.uint8) & np.uint8(1)).astype(
                np.bool_
            )
        return found

    def _probes(self, fingerprints: Fingerprints) -> list[Fingerprints]:
        low, step = fingerprints & np.uint64(2**32 - 1), fingerprints >> np.uint64(32) | np.uint64(1)
        probes = []
        for index in range(self.probe_count):
            hashed = low + np.uint64(index) * step & np.uint64(2**32 - 1)
            probes.append(hashed * np.uint64(self.bit_count) >> np.uint64(32))
        return probes
