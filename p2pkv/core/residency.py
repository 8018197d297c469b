"""The book of one location: which chunks are held there, in what state, and what room they take.

A *residency* is one chunk at this location. Its slot says what is going on with it:

    None                 owned: looked up, gossiped, evicted, planned
    Writing              an engine is writing its shards; becomes owned when all are sealed
    Incoming(move)       a move brings it; `is_verified` once the bytes are here; owned when taken
    Outgoing(move, n)    owned, but being handed over in attempt `n`: lookups and new plans leave it out

Everything here takes up room from the moment it is entered, so `used` never exceeds `limit`: that is the hard limit.
What the inventory lists is exactly what is owned. The order of residencies is that of their last use: eviction walks it from
the front.

Not decided here: who may go (`eviction`), what a move does (`moves`), where the bytes are (the store).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf

from p2pkv.core.chunks import Chunk
from p2pkv.core.ids import EventId, Location
from p2pkv.core.inventory import InventoryLog
from p2pkv.core.keys import TOKEN_NBYTES, ChunkKey, TokenBytes
from p2pkv.core.prompt import Prompt
from p2pkv.core.rows import InventoryEntry
from p2pkv.core.siblings import Siblings


@dataclass(frozen=True, slots=True)
class Room:
    """What chunks take up: bytes in whole pages, and in memory a descriptor for each shard."""

    nbytes: int
    descriptors: int

    def __add__(self, other: "Room") -> "Room":
        return Room(self.nbytes + other.nbytes, self.descriptors + other.descriptors)

    def __sub__(self, other: "Room") -> "Room":
        return Room(self.nbytes - other.nbytes, self.descriptors - other.descriptors)

    def fits(self, free: "Room") -> bool:
        """Whether it goes into `free`."""
        return self.nbytes <= free.nbytes and self.descriptors <= free.descriptors


NO_ROOM = Room(0, 0)


def room_of(chunk: Chunk, location: Location) -> Room:
    """What `chunk` takes up at `location`."""
    if location is Location.LOCAL_DISK:
        return Room(chunk.charged_file_nbytes, descriptors=0)
    return Room(chunk.charged_nbytes, len(chunk.shard_nbytes))


@dataclass(slots=True)
class Writing:
    """An engine's workers are writing the shards: who has been lent one, under which lease, and who has committed."""

    lent: dict[int, str] = field(default_factory=dict)
    sealed: dict[int, None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Incoming:
    """`move` brings the bytes; they are staged once `is_verified`."""

    move: EventId
    is_verified: bool = False


@dataclass(frozen=True, slots=True)
class Outgoing:
    """`move` hands it over in `attempt`."""

    move: EventId
    attempt: int


Slot = Writing | Incoming | Outgoing | None
Keep = Callable[[dict[EventId, list[ChunkKey]], float], None]
"""Has these moves leave here what they are taking away; the second argument is now."""


@dataclass(slots=True)
class Residency:
    """One chunk at one location.

    Attributes:
        chunk: What it is.
        slot: What is going on with it.
        used_at: When it was last stored, read or taken.
        leases: Who needs it not to be evicted, and until when.
        pinned_until: When a user's pin ends; inf until it is unpinned.
    """

    chunk: Chunk
    slot: Slot
    used_at: float
    leases: dict[str, float] = field(default_factory=dict)
    pinned_until: float = -inf

    @property
    def tokens(self) -> TokenBytes:
        """The chunk's own token ids."""
        return self.chunk.tokens

    @property
    def is_owned(self) -> bool:
        """Whether losing it would lose a chunk of this instance."""
        return self.slot is None or isinstance(self.slot, Outgoing)

    def is_leased(self, now: float) -> bool:
        """Whether anyone still needs it."""
        return any(expires_at > now for expires_at in self.leases.values())

    def is_pinned(self, now: float) -> bool:
        """Whether a user wants it to stay."""
        return self.pinned_until > now

    def pin(self, until: float) -> None:
        """Pin it; of several pins the one that ends last counts."""
        self.pinned_until = max(self.pinned_until, until)


_NO_SIBLINGS: Siblings[Residency] = Siblings()


@dataclass(frozen=True, slots=True)
class Match:
    """A residency that a prompt goes through from token `start` on, and how many of its tokens the prompt shares."""

    residency: Residency
    start: int
    used_count: int

    @property
    def end(self) -> int:
        """Tokens of the prompt up to here."""
        return self.start + self.used_count


class Residencies:
    """All residencies of one location, in order of their last use."""

    def __init__(self, location: Location, limit: Room, inventory: InventoryLog) -> None:
        self.location = location
        self.limit = limit
        self.used = NO_ROOM
        self.promised: dict[EventId, Room] = {}
        self._inventory = inventory
        self._by_key: dict[ChunkKey, Residency] = {}
        self._children: dict[ChunkKey, Siblings[Residency]] = {}

    def __iter__(self) -> Iterator[Residency]:
        return iter(self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: ChunkKey) -> Residency | None:
        """The residency of `key`, in whatever state."""
        return self._by_key.get(key)

    def children(self, key: ChunkKey) -> Iterator[Residency]:
        """Residencies whose parent is `key`, in byte order of their tokens."""
        return iter(self._children.get(key, _NO_SIBLINGS))

    def free(self) -> Room:
        """What is neither used nor promised to a move; negative while promises wait for evictions."""
        return self.limit - self.used - sum(self.promised.values(), NO_ROOM)

    def room_of(self, chunk: Chunk) -> Room:
        """What `chunk` takes up here."""
        return room_of(chunk, self.location)

    def pinned(self, now: float) -> dict[ChunkKey, Residency]:
        """What pins keep here: what is pinned, and the prefixes that it hangs on."""
        kept: dict[ChunkKey, Residency] = {}
        for residency in self:
            held = residency if residency.is_pinned(now) else None
            while held is not None and held.chunk.key not in kept:
                kept[held.chunk.key] = held
                held = self._by_key.get(held.chunk.parent)
        return kept

    def fullness(self, now: float) -> str:
        """How full it is, for people who were refused."""
        pinned_nbytes = sum(self.room_of(each.chunk).nbytes for each in self.pinned(now).values())
        pinned = f", {pinned_nbytes} of them by what is pinned" if pinned_nbytes else ""
        return f"{self.used.nbytes} of {self.limit.nbytes} bytes are used{pinned}"

    def enter(self, chunk: Chunk, slot: Slot, now: float) -> Residency:
        """Enter a chunk that isn't here. The caller has made room."""
        residency = Residency(chunk=chunk, slot=slot, used_at=now)
        self._by_key[chunk.key] = residency
        self._children.setdefault(chunk.parent, Siblings()).add(residency)
        self.used += self.room_of(chunk)
        if residency.is_owned:
            self._inventory.add(self._entry(chunk))
        return residency

    def own(self, residency: Residency, now: float) -> None:
        """What was written or fetched belongs to this instance from now on."""
        residency.slot = None
        self._inventory.add(self._entry(residency.chunk))
        self.touch(residency, now)

    def remove(self, residency: Residency) -> None:
        """Strike a residency out; its room is free."""
        chunk = residency.chunk
        del self._by_key[chunk.key]
        siblings = self._children[chunk.parent]
        siblings.remove(residency)
        if not siblings:
            del self._children[chunk.parent]
        self.used -= self.room_of(chunk)
        if residency.is_owned:
            self._inventory.remove(self._entry(chunk))

    def touch(self, residency: Residency, now: float) -> None:
        """It was used: it goes to the end of the order. Touch suffixes before their prefixes."""
        residency.used_at = now
        self._by_key[residency.chunk.key] = self._by_key.pop(residency.chunk.key)

    def match(self, prompt: Prompt) -> list[Match]:
        """The prompt's longest contiguous prefix that is owned and not outgoing, token by token in its last chunk."""
        matches: list[Match] = []
        parent, start, tokens, chunk_size = prompt.root, 0, prompt.tokens, prompt.chunk_size
        while start * TOKEN_NBYTES < len(tokens):
            rest = tokens[start * TOKEN_NBYTES : (start + chunk_size) * TOKEN_NBYTES]
            siblings = self._children.get(parent, _NO_SIBLINGS)
            close = siblings.by_closeness(rest)
            best = next(((each, count) for each, count in close if self._is_usable(each, prompt)), None)
            if best is None:
                break
            matches.append(Match(residency=best[0], start=start, used_count=best[1]))
            if best[1] < chunk_size:
                break
            parent, start = best[0].chunk.key, start + chunk_size
        return matches

    def within(self, prompt: Prompt) -> list[Residency]:
        """Owned chunks that lie wholly inside the prompt, along the longest contiguous prefix, prefix first.

        Partly filled chunks on the way count too: whatever of this prompt was stored earlier, when it was shorter. The prefix's
        own length is the greatest `end`.
        """
        found: list[Residency] = []
        parent, start, tokens, chunk_size = prompt.root, 0, prompt.tokens, prompt.chunk_size
        while True:
            rest = tokens[start * TOKEN_NBYTES : (start + chunk_size) * TOKEN_NBYTES]
            siblings = self._children.get(parent, _NO_SIBLINGS)
            inside = [each for each in siblings.prefixes_of(rest) if self._is_usable(each, prompt)]
            found += reversed(inside)
            full = next((each for each in inside if each.chunk.token_count == chunk_size), None)
            if full is None:
                return found
            parent, start = full.chunk.key, full.chunk.end

    def _is_usable(self, residency: Residency, prompt: Prompt) -> bool:
        return residency.slot is None and residency.chunk.namespace == prompt.namespace

    def _entry(self, chunk: Chunk) -> InventoryEntry:
        return InventoryEntry(fingerprint=chunk.fingerprint, location=self.location, token_count=chunk.token_count)

    def check_invariants(self) -> None:
        """Assert what must hold between any two events."""
        assert self.used.fits(self.limit), f"{self.location}: {self.used} used of {self.limit}"
        assert self.used == sum((self.room_of(each.chunk) for each in self), NO_ROOM)
        owned = {each.chunk.fingerprint for each in self if each.is_owned}
        listed = self._inventory.entries.at[self.location].keys()
        assert owned == listed, f"{self.location}: the inventory isn't what is owned"
