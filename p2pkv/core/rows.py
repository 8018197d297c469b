"""Which position holds which chunk, in 12 bytes a row, for millions of rows.

A row is a fingerprint (8 bytes) and a tag (4 bytes): holder, location, and the chunk's tokens. Rows lie in *blocks*, sorted by
fingerprint, so that all holders of a chunk lie together. A change goes to its block's *tail*; what a tail says overrules the
rows before it, and it is merged in when it is an eighth of them: so a change costs the same among a thousand rows and among ten
million, and none moves more than one block.

Changes travel as they lie here: `pack` and `unpack` are also the wire's form of an entry. Not decided here: who is a holder,
and what is true of it (`directory`, `inventory`).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pkv.core.ids import Location
from p2pkv.core.keys import Fingerprint
from p2pkv.core.messages import CHANGE_NBYTES

Fingerprints = NDArray[np.uint64]
Tags = NDArray[np.uint32]
HolderId = int

FINGERPRINT_MAX = 2**64 - 1
HOLDERS_MAX = 2**14
"""As many as a tag has bits for: 16 times the members that a cluster may have."""
ROW_NBYTES = 14
"""Of a row in a block, its share of the block's tail included."""
BLOCK_ROWS = 2**16
"""Merging a tail into a block of this size takes a millisecond or two, in which the node does nothing else."""
TAIL_ROWS_MIN = 512
"""Up to here a tail costs less than a merge."""
TAIL_PARTS_MAX = 64
"""Batches of changes in a tail that aren't sorted yet: each costs some hundred bytes, whatever is in it."""

_TOKENS, _GONE, _POSITION_SHIFT, _HOLDER_SHIFT = np.uint32(2**16 - 1), np.uint32(2**16), np.uint32(17), np.uint32(18)
_SAID = np.uint32(2**18 - 1)
"""The bits of a tag that an owner says; the holder is whose link it came over."""
_CHANGE = struct.Struct("<QI")
_DTYPE = np.dtype([("fingerprint", "<u8"), ("tag", "<u4")])
_LOCATIONS = tuple(Location)
_SALTS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)
"""Of `hash_sum`, for each location: a chunk that goes from one to the other changes it."""

assert _CHANGE.size == CHANGE_NBYTES


@dataclass(frozen=True, slots=True)
class InventoryEntry:
    """One chunk that its holder has: a full one or a shorter one, of 65,536 tokens at most."""

    fingerprint: Fingerprint
    location: Location
    token_count: int


def pack(entry: InventoryEntry, *, present: bool) -> bytes:
    """An entry that came (`present`) or went."""
    location = _LOCATIONS.index(entry.location)
    return _CHANGE.pack(entry.fingerprint, location << 17 | (not present) << 16 | entry.token_count - 1)


def unpack(changes: bytes) -> tuple[Fingerprints, Tags]:
    """Rows of no holder yet; what is left over at the end, and bits of a tag that mean nothing, are ignored."""
    rows = np.frombuffer(changes, _DTYPE, count=len(changes) // CHANGE_NBYTES)
    return rows["fingerprint"].astype(np.uint64), rows["tag"].astype(np.uint32) & _SAID


def packed(fingerprints: Fingerprints, tags: Tags) -> bytes:
    """What `unpack` takes apart."""
    rows = np.empty(len(fingerprints), _DTYPE)
    rows["fingerprint"], rows["tag"] = fingerprints, tags & _SAID
    return rows.tobytes()


def entries_in(fingerprints: Fingerprints, tags: Tags) -> list[InventoryEntry]:
    """Rows, as everybody else has them."""
    said = zip(fingerprints.tolist(), (tags & _SAID).tolist(), strict=True)
    return [InventoryEntry(each, _LOCATIONS[tag >> 17], (tag & 0xFFFF) + 1) for each, tag in said]


def are_gone(tags: Tags) -> NDArray[np.bool_]:
    """Which changes say that a chunk went."""
    gone: NDArray[np.bool_] = (tags & _GONE) != 0
    return gone


def hash_sum(fingerprints: Fingerprints, tags: Tags) -> int:
    """An additive hash, modulo 2**64: equal for equal sets of rows, in whatever order."""
    return int((fingerprints ^ _SALTS[tags >> _POSITION_SHIFT & np.uint32(1)]).sum(dtype=np.uint64))


def _latest(fingerprints: Fingerprints, tags: Tags) -> tuple[Fingerprints, Tags]:
    """Sorted by fingerprint, only the last of what there is about each chunk at each position."""
    order = np.argsort(fingerprints, kind="stable")  # takes what is in order already as it is
    fingerprints, tags = fingerprints[order], tags[order]
    is_next_same = fingerprints[1:] == fingerprints[:-1]
    if not is_next_same.any():
        return fingerprints, tags
    is_shared = np.zeros(len(fingerprints), np.bool_)
    is_shared[1:] |= is_next_same
    is_shared[:-1] |= is_next_same
    shared = np.flatnonzero(is_shared)
    order = shared[np.lexsort((tags[shared] >> _POSITION_SHIFT, fingerprints[shared]))]
    tags[shared] = tags[order]
    is_kept = np.ones(len(fingerprints), np.bool_)
    is_same_position = tags[1:] >> _POSITION_SHIFT == tags[:-1] >> _POSITION_SHIFT
    is_kept[:-1] = ~(is_next_same & is_same_position)
    return fingerprints[is_kept], tags[is_kept]


class _Block:
    """Rows of neighbouring fingerprints, and the changes since they were merged."""

    __slots__ = ("_is_tail_sorted", "_parts", "change_count", "fingerprints", "tags")

    def __init__(self, fingerprints: Fingerprints, tags: Tags) -> None:
        self.fingerprints = fingerprints
        self.tags = tags
        self.change_count = 0
        self._parts: list[tuple[Fingerprints, Tags]] = []
        self._is_tail_sorted = False

    def add(self, fingerprints: Fingerprints, tags: Tags) -> None:
        self._parts.append((fingerprints, tags))
        self._is_tail_sorted = False
        self.change_count += len(fingerprints)
        if self.change_count > max(TAIL_ROWS_MIN, len(self.fingerprints) // 8):
            self.merge()
        elif len(self._parts) > TAIL_PARTS_MAX:
            self.tail()

    def tail(self) -> tuple[Fingerprints, Tags]:
        """The latest change of each chunk at each position."""
        if not self._is_tail_sorted:
            fingerprints = np.concatenate([_NO_FINGERPRINTS, *(part for part, _ in self._parts)])
            tags = np.concatenate([_NO_TAGS, *(part for _, part in self._parts)])
            self._parts = [_latest(fingerprints, tags)]
            self._is_tail_sorted = True
            self.change_count = len(self._parts[0][0])
        return self._parts[0]

    def merge(self) -> None:
        fingerprints, tags = self.tail()
        fingerprints, tags = np.concatenate([self.fingerprints, fingerprints]), np.concatenate([self.tags, tags])
        fingerprints, tags = _latest(fingerprints, tags)
        is_here = ~are_gone(tags)
        self.replace(fingerprints[is_here], tags[is_here])

    def replace(self, fingerprints: Fingerprints, tags: Tags) -> None:
        self.fingerprints, self.tags = fingerprints, tags
        self._parts, self.change_count, self._is_tail_sorted = [], 0, False

    def merged(self) -> tuple[Fingerprints, Tags]:
        if self.change_count:
            self.merge()
        return self.fingerprints, self.tags

    def split(self) -> "tuple[Fingerprint, _Block] | None":
        """Give the upper half away: where it begins, and a block of it. All holders of a chunk stay together."""
        fingerprints, tags = self.merged()
        middle = fingerprints[len(fingerprints) // 2]
        cut = int(fingerprints.searchsorted(middle) or fingerprints.searchsorted(middle, "right"))
        if cut == len(fingerprints):
            return None
        self.replace(fingerprints[:cut].copy(), tags[:cut].copy())
        return int(fingerprints[cut]), _Block(fingerprints[cut:].copy(), tags[cut:].copy())


_NO_FINGERPRINTS: Fingerprints = np.empty(0, np.uint64)
_NO_TAGS: Tags = np.empty(0, np.uint32)


class Rows:
    """All rows of all holders."""

    def __init__(self) -> None:
        self._blocks = [_Block(_NO_FINGERPRINTS, _NO_TAGS)]
        self._starts: Fingerprints = np.zeros(1, np.uint64)
        """Each block's first fingerprint: it has those up to the next one's."""
        self._has_had_rows = np.zeros(2 * HOLDERS_MAX, np.bool_)
        """By position; until its holder's rows are all dropped."""

    def __len__(self) -> int:
        """Rows and changes that are kept."""
        return sum(len(block.fingerprints) + block.change_count for block in self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return len(self) * CHANGE_NBYTES

    def _cut(self, ordered: Fingerprints) -> Iterator[tuple[_Block, slice]]:
        """Which part of these fingerprints, in order, each block has."""
        cuts = [0, *ordered.searchsorted(self._starts[1:]).tolist(), len(ordered)]
        for block, begin, end in zip(self._blocks, cuts, cuts[1:], strict=False):
            if begin < end:
                yield block, slice(begin, end)

    def apply(self, holder: HolderId, fingerprints: Fingerprints, tags: Tags) -> None:
        """Changes of one holder, in the order in which they came."""
        order = np.argsort(fingerprints, kind="stable")
        fingerprints, tags = fingerprints[order], tags[order] | np.uint32(holder << 18)
        self._has_had_rows[tags >> _POSITION_SHIFT] = True
        for block, part in self._cut(fingerprints):
            block.add(fingerprints[part], tags[part])
        for block in [each for each in self._blocks if len(each.fingerprints) > BLOCK_ROWS]:
            self._split(block)

    def _split(self, block: _Block) -> None:
        """Until no part of it is too large."""
        while len(block.fingerprints) > BLOCK_ROWS and (upper := block.split()) is not None:
            index = int(self._starts.searchsorted(np.uint64(upper[0])))
            self._starts = np.insert(self._starts, index, np.uint64(upper[0]))
            self._blocks.insert(index, upper[1])
            self._split(upper[1])

    def of(self, holder: HolderId, first: Fingerprint = 0, last: Fingerprint = FINGERPRINT_MAX) -> tuple[Fingerprints, Tags]:
        """A holder's rows from fingerprint `first` to `last`, in their order."""
        found = [(_NO_FINGERPRINTS, _NO_TAGS)]
        for block in self._blocks_of(first, last):
            fingerprints, tags = block.merged()
            begin = fingerprints.searchsorted(np.uint64(first))
            end = fingerprints.searchsorted(np.uint64(last), "right")
            is_theirs = tags[begin:end] >> _HOLDER_SHIFT == holder
            found.append((fingerprints[begin:end][is_theirs], tags[begin:end][is_theirs]))
        return np.concatenate([each for each, _ in found]), np.concatenate([each for _, each in found])

    def drop(self, holder: HolderId, first: Fingerprint = 0, last: Fingerprint = FINGERPRINT_MAX) -> None:
        """Forget a holder's rows from fingerprint `first` to `last`."""
        if (first, last) == (0, FINGERPRINT_MAX):
            self._has_had_rows[2 * holder : 2 * holder + 2] = False
        for block in self._blocks_of(first, last):
            fingerprints, tags = block.merged()
            is_kept = tags >> _HOLDER_SHIFT != holder
            is_kept |= (fingerprints < np.uint64(first)) | (fingerprints > np.uint64(last))
            if not is_kept.all():
                block.replace(fingerprints[is_kept], tags[is_kept])

    def _blocks_of(self, first: Fingerprint, last: Fingerprint) -> list[_Block]:
        begin = int(self._starts.searchsorted(np.uint64(first), "right")) - 1
        return self._blocks[begin : int(self._starts.searchsorted(np.uint64(last), "right"))]

    def may_hold(self, positions: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which positions can have rows at all; most instances have no chunks on disk."""
        return self._has_had_rows[positions]

    def held(self, fingerprints: Fingerprints, holder_count: int) -> NDArray[np.bool_]:
        """Who holds each of these chunks: a row for each chunk, a column for each position (`2 * holder + location`)."""
        table = np.zeros((len(fingerprints), 2 * holder_count), np.bool_)
        order = np.argsort(fingerprints)
        ordered = fingerprints[order]
        for block, part in self._cut(ordered):
            cells, _ = _cells(table, order[part], ordered[part], (block.fingerprints, block.tags))
            table.reshape(-1)[cells] = True
            if block.change_count:
                cells, tags = _cells(table, order[part], ordered[part], block.tail())
                table.reshape(-1)[cells] = ~are_gone(tags)
        return table


def _cells(
    table: NDArray[np.bool_], chunks: NDArray[np.intp], sought: Fingerprints, rows: tuple[Fingerprints, Tags]
) -> tuple[NDArray[np.intp], Tags]:
    """All rows of some chunks: which cells of the table they are about, and their tags."""
    fingerprints, tags = rows
    begins = fingerprints.searchsorted(sought)
    counts = fingerprints.searchsorted(sought, "right") - begins
    before = counts.cumsum() - counts
    found = tags[np.arange(counts.sum()) + np.repeat(begins - before, counts)]
    return np.repeat(chunks * table.shape[1], counts) + (found >> _POSITION_SHIFT), found
