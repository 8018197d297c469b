"""What an instance holds, as a log with a single writer, and the views that others keep of it.

The owner numbers its changes 1, 2, 3, ... within its generation. A view applies exactly the next change or none: a gap, a
truncated log or a mismatch of `(count, sum)` at equal sequence ends in a fresh snapshot, never in a guess. A view is a hint:
the owner checks full keys before anything moves.

Source: scuttlebutt-style reconciliation (van Renesse et al., "Efficient Reconciliation and Flow Control for Anti-Entropy
Protocols", 2008), reduced to one writer a log. Not decided here: when to send what (`membership`), who is alive.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from p2pkv.core.ids import Generation, Location
from p2pkv.core.keys import Fingerprint
from p2pkv.core.messages import (
    INVENTORY_PAGE_ENTRIES,
    InventoryChange,
    InventoryDelta,
    InventoryEntry,
    InventoryPage,
    InventoryRequest,
    Status,
)

LOG_CHANGES = 16_384
"""Changes kept for peers that lag: 20 s of a node that stores 400 chunks and evicts as many a second. Past it, a snapshot."""
VIEW_ENTRIES = 2**21
"""Entries of one view at most: more than any limit on descriptors lets an instance hold."""
_SUM_MODULUS = 2**64
_LOCATION_SALT = {Location.LOCAL_CPU: 0x9E3779B97F4A7C15, Location.LOCAL_DISK: 0xC2B2AE3D27D4EB4F}


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


class InventoryLog:
    """One's own inventory: what is held now, and the latest changes that led there."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.sequence = 0
        self.entries = EntrySet()
        self._changes: deque[InventoryChange] = deque(maxlen=LOG_CHANGES)

    def add(self, entry: InventoryEntry) -> None:
        """Record that `entry` is held."""
        if self.entries.add(entry):
            self._record(InventoryChange(present=True, entry=entry))

    def remove(self, entry: InventoryEntry) -> None:
        """Record that `entry` is held no longer."""
        if self.entries.remove(entry):
            self._record(InventoryChange(present=False, entry=entry))

    def _record(self, change: InventoryChange) -> None:
        self.sequence += 1
        self._changes.append(change)

    def since(self, generation: Generation, sequence: int) -> list[InventoryDelta | InventoryPage]:
        """What a view at `(generation, sequence)` lacks: the missing tail, or a snapshot when the log is shorter."""
        first_kept = self.sequence - len(self._changes)
        if generation != self.generation or not first_kept <= sequence <= self.sequence:
            return self._snapshot()
        tail = islice(self._changes, sequence - first_kept, None)
        deltas: list[InventoryDelta | InventoryPage] = []
        while changes := tuple(islice(tail, INVENTORY_PAGE_ENTRIES)):
            deltas.append(InventoryDelta(generation=self.generation, first_sequence=sequence + 1, changes=changes))
            sequence += len(changes)
        return deltas

    def _snapshot(self) -> list[InventoryDelta | InventoryPage]:
        entries = tuple(self.entries)
        page_count = max(1, -(-len(entries) // INVENTORY_PAGE_ENTRIES))
        return [
            InventoryPage(
                generation=self.generation,
                sequence=self.sequence,
                page_index=index,
                page_count=page_count,
                entries=entries[index * INVENTORY_PAGE_ENTRIES : (index + 1) * INVENTORY_PAGE_ENTRIES],
            )
            for index in range(page_count)
        ]


class InventoryView:
    """Another instance's inventory as far as it has told us."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.sequence = 0
        self.entries = EntrySet()
        self._pages: dict[int, InventoryPage] = {}

    def request(self) -> InventoryRequest:
        """What to ask the owner for to catch up."""
        return InventoryRequest(generation=self.generation, sequence=self.sequence)

    def apply_delta(self, delta: InventoryDelta) -> bool:
        """Apply the changes that follow on what is known.

        Returns:
            Whether the view has all up to the delta's end now. False means a gap, another generation, or a view grown beyond
            `VIEW_ENTRIES`, which no honest owner needs.
        """
        if delta.generation != self.generation or delta.first_sequence > self.sequence + 1:
            return False
        for change in delta.changes[self.sequence + 1 - delta.first_sequence :]:
            if change.present:
                self.entries.add(change.entry)
            else:
                self.entries.remove(change.entry)
            self.sequence += 1
        return len(self.entries) <= VIEW_ENTRIES

    def apply_page(self, page: InventoryPage) -> None:
        """Collect one page of a snapshot; the last one makes it the view. Pages of an older sequence are ignored."""
        known = next(iter(self._pages.values()), None)
        if (
            page.generation != self.generation
            or page.sequence < self.sequence
            or page.page_count > VIEW_ENTRIES // INVENTORY_PAGE_ENTRIES
            or page.page_index >= page.page_count
        ):
            return
        if known is not None and (page.sequence, page.page_count) != (known.sequence, known.page_count):
            if page.sequence < known.sequence:
                return
            self._pages.clear()
        self._pages[page.page_index] = page
        if len(self._pages) == page.page_count:
            self.entries = EntrySet(entry for each in self._pages.values() for entry in each.entries)
            self.sequence = page.sequence
            self._pages.clear()

    def lags(self, status: Status) -> InventoryRequest | None:
        """What to ask for after the owner's `status`: None when the view is right.

        Equal sequence but another count or sum means that the view is wrong: it starts afresh.
        """
        if status.me.generation != self.generation or status.sequence < self.sequence:
            return None
        if status.sequence > self.sequence:
            return self.request()
        if (status.entry_count, status.entry_sum) != (len(self.entries), self.entries.sum):
            self.sequence = 0
            self.entries = EntrySet()
            self._pages.clear()
            return InventoryRequest(generation=0, sequence=0)
        return None
