"""What this instance holds, over all its locations, and the few ways in which that changes.

Each change of a residency that touches bytes goes through here, so that book, inventory and the effects for the store never
disagree.
"""

from math import inf
from typing import assert_never

from p2pkv.core.chunks import Chunk
from p2pkv.core.config import MachineConfig
from p2pkv.core.effects import AdmitStaged, DropStaged, ReleaseChunks, ReleaseReason
from p2pkv.core.events import ChunksDamaged, ChunksFound
from p2pkv.core.eviction import find_victims
from p2pkv.core.ids import Location, StageId
from p2pkv.core.inventory import InventoryLog
from p2pkv.core.keys import Namespace, namespace_digest
from p2pkv.core.outbox import Outbox
from p2pkv.core.records import LocationStatus
from p2pkv.core.residency import Residencies, Residency, Room
from p2pkv.errors import ErrorCode, Failure

NAMESPACES_MAX = 64
"""Models, dtypes and layouts that one instance has ever served or been given: they travel in its member record."""


class Holdings:
    """Books of all locations, the inventory they make up, and the namespaces that chunks belong to."""

    def __init__(self, config: MachineConfig, outbox: Outbox) -> None:
        self.inventory = InventoryLog(config.generation, config.log_changes)
        limit = Room(config.cpu_limit_nbytes, config.descriptor_limit)
        self.books: dict[Location, Residencies] = {}
        if config.cpu_limit_nbytes:
            self.books[Location.LOCAL_CPU] = Residencies(Location.LOCAL_CPU, limit, self.inventory)
        if config.disk_limit_nbytes:
            limit = Room(config.disk_limit_nbytes, descriptors=0)
            self.books[Location.LOCAL_DISK] = Residencies(Location.LOCAL_DISK, limit, self.inventory)
        self.namespaces: dict[bytes, Namespace] = {}
        self._outbox = outbox
        self._chunk_size = config.chunk_size

    def learn(self, namespace: Namespace) -> Failure | None:
        """Make `namespace` known; the failure says why no chunk of it can be held here."""
        digest = namespace_digest(namespace)
        if digest in self.namespaces:
            return None
        if (problem := namespace.problem()) is not None:
            return Failure(ErrorCode.NAMESPACE_MISMATCH, f"Model {namespace.model!r}: {problem}.")
        if namespace.chunk_size != self._chunk_size:
            detail = (
                f"Model {namespace.model!r} is cut into chunks of {namespace.chunk_size} tokens, here of {self._chunk_size}."
            )
            return Failure(ErrorCode.NAMESPACE_MISMATCH, detail)
        if len(self.namespaces) >= NAMESPACES_MAX:
            return Failure(
                ErrorCode.STORE_FULL, f"This instance serves {NAMESPACES_MAX} namespaces already; restart it to forget them."
            )
        self.namespaces[digest] = namespace
        return None

    def statuses(self) -> tuple[LocationStatus, ...]:
        """How full each location is."""
        return tuple(
            LocationStatus(
                location=location,
                chunk_count=len(self.inventory.entries.at[location]),
                nbytes=book.used.nbytes,
                limit_nbytes=book.limit.nbytes,
            )
            for location, book in self.books.items()
        )

    def can_make_room(self, book: Residencies, need: Room, *, now: float, colder_than: float = inf) -> bool:
        """Whether `need` is free or evictable. Nothing changes."""
        return find_victims(book, need, now=now, colder_than=colder_than) is not None

    def make_room(self, book: Residencies, need: Room, *, now: float, colder_than: float = inf) -> bool:
        """Evict until `need` is free; False, and nothing evicted, when that can't be done."""
        victims = find_victims(book, need, now=now, colder_than=colder_than)
        if victims is None:
            return False
        for residency in victims:
            book.remove(residency)
        self._release(book, victims, ReleaseReason.EVICTED)
        return True

    def own_staged(self, book: Residencies, residency: Residency, *, stage: StageId, now: float) -> None:
        """Bytes that wait in `stage` belong to this instance from now on."""
        book.own(residency, now)
        self._outbox.add(AdmitStaged(stage=stage, location=book.location, key=residency.chunk.key))

    def drop_staged(self, book: Residencies, residency: Residency, *, stage: StageId) -> None:
        """Bytes that wait in `stage`, and the room for them, aren't wanted any more."""
        book.remove(residency)
        self._outbox.add(DropStaged(stage, book.location, residency.chunk.key))

    def free_moved(self, book: Residencies, residency: Residency) -> None:
        """Another position owns this chunk now: free it here."""
        book.remove(residency)
        self._release(book, [residency], ReleaseReason.MOVED)

    def clear(self, book: Residencies, now: float, namespace: bytes | None = None) -> int:
        """Forget all that is owned, not being handed over and not kept by pins; returns how many tokens that were.

        `namespace`, a digest, spares those of all others.
        """
        pinned = book.pinned(now)
        cleared = [
            residency
            for residency in book
            if residency.slot is None and residency.chunk.key not in pinned and namespace in (None, residency.chunk.namespace)
        ]
        for residency in cleared:
            book.remove(residency)
        self._release(book, cleared, ReleaseReason.CLEARED)
        return sum(residency.chunk.token_count for residency in cleared)

    def follow_store(self, event: ChunksFound | ChunksDamaged, now: float) -> None:
        """The store tells what it holds that isn't known here, or what it holds no longer."""
        book = self.books[event.location]
        match event:
            case ChunksFound():
                self._find(event, book, now)
            case ChunksDamaged():
                damaged = [residency for key in event.keys if (residency := book.get(key)) is not None and residency.is_owned]
                for residency in damaged:
                    book.remove(residency)
                self._release(book, damaged, ReleaseReason.DAMAGED)
            case _:
                assert_never(event)

    def _find(self, event: ChunksFound, book: Residencies, now: float) -> None:
        """Own what earlier boots have left, as far as it fits: the limit may be lower now. The last used are kept."""
        for namespace in event.namespaces:
            self.learn(namespace)
        spare, kept = book.free(), []
        for each in reversed(event.chunks):
            room = book.room_of(each.chunk)
            if each.chunk.namespace in self.namespaces and room.fits(spare):
                spare -= room
                kept.append(each)
        for each in reversed(kept):
            book.enter(each.chunk, None, now - each.idle_s)
        left = tuple(each.chunk.key for each in event.chunks if book.get(each.chunk.key) is None)
        if left:
            self._outbox.add(ReleaseChunks(location=book.location, keys=left, reason=ReleaseReason.EVICTED))

    def _release(self, book: Residencies, freed: list[Residency], reason: ReleaseReason) -> None:
        if freed:
            keys = tuple(residency.chunk.key for residency in freed)
            self._outbox.add(ReleaseChunks(location=book.location, keys=keys, reason=reason))

    def namespaces_of(self, chunks: tuple[Chunk, ...]) -> tuple[Namespace, ...]:
        """The namespaces that `chunks` belong to, in order of their first chunk."""
        digests = dict.fromkeys(chunk.namespace for chunk in chunks)
        return tuple(self.namespaces[digest] for digest in digests)

    def check_invariants(self) -> None:
        """Assert what must hold between any two events."""
        for book in self.books.values():
            book.check_invariants()
            assert all(residency.chunk.namespace in self.namespaces for residency in book)
