"""What an instance holds, as a log with a single writer, and the views that others keep of it.

The owner numbers its changes 1, 2, 3, ... within its generation. A view applies exactly the next change or none. Past a gap it
asks for the tail; past the log's end, or when `(count, sum)` differ at equal sequence, for a *digest*: count and sum of each
range of fingerprints. The ranges that differ it forgets, and fetches in pages; the others stay. Changes go on meanwhile.

A page counts only at the very sequence that the view is at: its owner sends what came before it first. A view is a hint: the
owner checks full keys before anything moves.

Source: scuttlebutt-style reconciliation (van Renesse et al., "Efficient Reconciliation and Flow Control for Anti-Entropy
Protocols", 2008), reduced to one writer a log; ranges as in negentropy and iroh-docs, one level deep. Not decided here: when to
send what (`gossip`, `catch_up`), who is alive (`membership`).
"""

import struct
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise

import numpy as np

from p2pkv.core.ids import Generation, Location
from p2pkv.core.keys import Fingerprint
from p2pkv.core.messages import (
    CHANGE_NBYTES,
    INVENTORY_PAGE_ENTRIES,
    RANGE_BITS_MAX,
    RANGE_NBYTES,
    InventoryDelta,
    InventoryDigest,
    InventoryPage,
    InventoryRequest,
    RangeRequest,
    Status,
)
from p2pkv.core.rows import (
    Fingerprints,
    HolderId,
    InventoryEntry,
    Rows,
    Tags,
    are_gone,
    hash_sum,
    pack,
    packed,
    unpack,
)

LOG_CHANGES = 16_384
"""Changes kept for peers that lag: 20 s of a node that stores 400 chunks and evicts as many a second. Past it, a digest."""
VIEW_ENTRIES = 2**21
"""Entries of one view at most: more than any limit on descriptors lets an instance hold."""
RANGE_ENTRIES = 1024
"""About so many in one range of a digest: a change costs 12 KiB then, and the digest of a million entries 16 KiB."""
UNSORTED_CHANGES = 1024
"""Of one's own, until they go to where pages are cut from."""
_ME: HolderId = 0
_SUM_MODULUS = 2**64
_LOCATION_SALT = {Location.LOCAL_CPU: 0x9E3779B97F4A7C15, Location.LOCAL_DISK: 0xC2B2AE3D27D4EB4F}
_RANGE = struct.Struct("<QQ")


class EntrySet:
    """Entries of one inventory, with their count and an additive hash: equal for equal sets, however they came about."""

    def __init__(self, entries: Iterable[InventoryEntry] = ()) -> None:
        self.at: dict[Location, dict[Fingerprint, int]] = {location: {} for location in Location}
        self.sum = 0
        for entry in entries:
            self.add(entry)

    def __len__(self) -> int:
        return sum(len(held) for held in self.at.values())

    def __iter__(self) -> Iterator[InventoryEntry]:
        for location, held in self.at.items():
            for fingerprint, token_count in held.items():
                yield InventoryEntry(fingerprint=fingerprint, location=location, token_count=token_count)

    def add(self, entry: InventoryEntry) -> bool:
        """Put `entry` in; False when it was there. Two keys of one fingerprint (odds: 2**-64) count once."""
        held = self.at[entry.location]
        if entry.fingerprint in held:
            return False
        held[entry.fingerprint] = entry.token_count
        self.sum = (self.sum + _entry_hash(entry)) % _SUM_MODULUS
        return True

    def remove(self, entry: InventoryEntry) -> bool:
        """Take `entry` out; False when it wasn't there."""
        if self.at[entry.location].pop(entry.fingerprint, None) is None:
            return False
        self.sum = (self.sum - _entry_hash(entry)) % _SUM_MODULUS
        return True


def _entry_hash(entry: InventoryEntry) -> int:
    return entry.fingerprint ^ _LOCATION_SALT[entry.location]


def _outline(fingerprints: Fingerprints, tags: Tags, bits: int) -> bytes:
    """Count and sum of each of 2**`bits` ranges, as a digest has them; `fingerprints` are in order."""
    starts = np.arange(1, 1 << bits, dtype=np.uint64) << np.uint64(64 - bits) if bits else np.empty(0, np.uint64)
    cuts = [0, *fingerprints.searchsorted(starts).tolist(), len(fingerprints)]
    parts = (slice(begin, end) for begin, end in pairwise(cuts))
    return b"".join(_RANGE.pack(part.stop - part.start, hash_sum(fingerprints[part], tags[part])) for part in parts)


class InventoryLog:
    """One's own inventory: what is held now, and the latest changes that led there."""

    def __init__(self, generation: Generation, changes_max: int = LOG_CHANGES) -> None:
        self.generation = generation
        self.sequence = 0
        self.entries = EntrySet()
        self._changes: deque[bytes] = deque(maxlen=changes_max)
        self._sorted = Rows()
        self._unsorted: list[bytes] = []

    def add(self, entry: InventoryEntry) -> None:
        """Record that `entry` is held."""
        if self.entries.add(entry):
            self._record(pack(entry, present=True))

    def remove(self, entry: InventoryEntry) -> None:
        """Record that `entry` is held no longer."""
        if self.entries.remove(entry):
            self._record(pack(entry, present=False))

    def _record(self, change: bytes) -> None:
        self.sequence += 1
        self._changes.append(change)
        self._unsorted.append(change)
        if len(self._unsorted) >= UNSORTED_CHANGES:
            self._sort()

    def _sort(self) -> None:
        self._sorted.apply(_ME, *unpack(b"".join(self._unsorted)))
        self._unsorted.clear()

    def tail(self, generation: Generation, sequence: int) -> list[InventoryDelta] | None:
        """The changes after `sequence`; None when the log doesn't reach so far back, or that is no sequence of it."""
        first_kept = self.sequence - len(self._changes)
        if generation != self.generation or not first_kept <= sequence <= self.sequence:
            return None
        rest = islice(self._changes, sequence - first_kept, None)
        deltas = []
        while changes := tuple(islice(rest, INVENTORY_PAGE_ENTRIES)):
            deltas.append(InventoryDelta(self.generation, first_sequence=sequence + 1, changes=b"".join(changes)))
            sequence += len(changes)
        return deltas

    def digest(self) -> InventoryDigest:
        """All that is held, in outline: ranges of about `RANGE_ENTRIES`."""
        self._sort()
        bits = min(RANGE_BITS_MAX, (len(self.entries) // RANGE_ENTRIES).bit_length())
        return InventoryDigest(self.generation, self.sequence, _outline(*self._sorted.of(_ME), bits))

    def page(self, first: Fingerprint, last: Fingerprint) -> InventoryPage:
        """What is held from fingerprint `first` to `last`, or as far as a page reaches."""
        self._sort()
        fingerprints, tags = self._sorted.of(_ME, first, last)
        if len(fingerprints) > INVENTORY_PAGE_ENTRIES:
            last = int(fingerprints[INVENTORY_PAGE_ENTRIES]) - 1
            count = int(fingerprints.searchsorted(np.uint64(last), "right"))
            fingerprints, tags = fingerprints[:count], tags[:count]
        return InventoryPage(self.generation, self.sequence, first, last, packed(fingerprints, tags))


class InventoryView:
    """Another instance's inventory as far as it has told us.

    Attributes:
        generation: Of the owner's boot.
        sequence: Up to which its changes are applied.
        missing: Ranges of fingerprints, first to last, that still have to be fetched. What is known of them is no more than a
            part, so nothing is said about count and sum.
        awaits_digest: Nothing but the owner's digest says where to go on.
    """

    def __init__(self, generation: Generation, rows: Rows, holder: HolderId) -> None:
        self.generation = generation
        self.sequence = 0
        self.missing: deque[tuple[Fingerprint, Fingerprint]] = deque()
        self.awaits_digest = False
        self._rows = rows
        self._holder = holder
        self._count = 0
        self._sum = 0

    @property
    def is_whole(self) -> bool:
        """Whether it has all that the owner held at `sequence`."""
        return not self.missing and not self.awaits_digest

    @property
    def entry_count(self) -> int:
        """Entries, as the owner's words add up; while some are missing, about."""
        return self._count

    def request(self) -> InventoryRequest:
        """Asks for the changes since; or for a digest, as no boot has the generation 0."""
        return InventoryRequest(0, 0) if self.awaits_digest else InventoryRequest(self.generation, self.sequence)

    def range_request(self) -> RangeRequest:
        """Asks for the first range that is `missing`."""
        return RangeRequest(self.generation, *self.missing[0])

    def apply_delta(self, delta: InventoryDelta) -> bool:
        """Apply the changes that follow on what is known.

        Returns:
            Whether the view has all up to the delta's end now. False means a gap, or another generation.
        """
        if delta.generation != self.generation or delta.first_sequence > self.sequence + 1:
            return False
        fingerprints, tags = unpack(delta.changes[(self.sequence + 1 - delta.first_sequence) * CHANGE_NBYTES :])
        if len(fingerprints):
            self._rows.apply(self._holder, fingerprints, tags)
            gone = are_gone(tags)
            self._count += len(gone) - 2 * int(gone.sum())
            self._sum += hash_sum(fingerprints[~gone], tags[~gone]) - hash_sum(fingerprints[gone], tags[gone])
            self._sum %= _SUM_MODULUS
            self.sequence += len(fingerprints)
        return True

    def compare(self, digest: InventoryDigest) -> None:
        """Forget the ranges that differ from what the owner holds; they are `missing` from now on."""
        bits = (len(digest.ranges) // RANGE_NBYTES).bit_length() - 1
        is_outline = len(digest.ranges) == RANGE_NBYTES << bits
        if digest.generation != self.generation or digest.sequence < self.sequence or not is_outline:
            return
        ours = tuple(_RANGE.iter_unpack(_outline(*self._rows.of(self._holder), bits)))
        self.sequence, self.awaits_digest = digest.sequence, False
        self.missing.clear()
        self._count = 0
        for index, (mine, theirs) in enumerate(zip(ours, _RANGE.iter_unpack(digest.ranges), strict=True)):
            if mine == theirs:
                self._count += mine[0]
            else:
                first, last = index << 64 - bits, (index + 1 << 64 - bits) - 1
                if self.missing and self.missing[-1][1] == first - 1:
                    first = self.missing.pop()[0]
                self.missing.append((first, last))
        for first, last in self.missing:
            self._rows.drop(self._holder, first, last)
        if not self.missing:
            self._add_up()

    def apply_page(self, page: InventoryPage) -> bool:
        """Take a part of the first range that is missing.

        Returns:
            False: it isn't what was asked for, or of another moment; it has to be asked for again.
        """
        if not self.missing or page.generation != self.generation or page.sequence != self.sequence or self.awaits_digest:
            return False
        first, last = self.missing[0]
        fingerprints, tags = unpack(page.entries)
        is_end = page.last == last
        is_full = 2 * len(fingerprints) >= INVENTORY_PAGE_ENTRIES  # else an owner could send pages for ever
        is_inside = not len(fingerprints) or (int(fingerprints.min()) >= first and int(fingerprints.max()) <= page.last)
        if page.first != first or page.last > last or not (is_end or is_full) or not is_inside or are_gone(tags).any():
            return False
        self._rows.drop(self._holder, first, page.last)
        self._rows.apply(self._holder, fingerprints, tags)
        self.missing.popleft()
        if not is_end:
            self.missing.appendleft((page.last + 1, last))
        self._count += len(fingerprints)
        if not self.missing:
            self._add_up()
        return True

    def _add_up(self) -> None:
        fingerprints, tags = self._rows.of(self._holder)
        self._count, self._sum = len(fingerprints), hash_sum(fingerprints, tags)

    def lags(self, status: Status) -> bool:
        """Whether the owner's `status` tells of changes that aren't known here."""
        return status.me.generation == self.generation and (status.sequence > self.sequence or self.awaits_digest)

    def is_refuted(self, status: Status) -> bool:
        """Whether the view is wrong: it should be what the owner held at `status`, and isn't."""
        is_equal = (status.me.generation, status.sequence) == (self.generation, self.sequence)
        return is_equal and self.is_whole and (status.entry_count, status.entry_sum) != (self._count, self._sum)
