"""Which chunks go when room is needed: least recently used first, suffixes before their prefixes.

Never one that is leased, pinned, in a move, being written, or that a resident child still hangs on; for an incoming move only
what is colder than what comes. When that isn't enough the answer is None and the caller refuses: a limit is hard.
"""

from math import inf

from p2pkv.core.keys import ChunkKey
from p2pkv.core.residency import Residencies, Residency, Room


def find_victims(book: Residencies, need: Room, *, now: float, colder_than: float = inf) -> list[Residency] | None:
    """The residencies to evict so that `need` is free, promises to moves included.

    Args:
        book: The location.
        need: Room wanted on top of what is used and promised.
        now: For leases and pins.
        colder_than: Only what was last used before this may go.

    Returns:
        Victims in the order to evict them, empty when there is room already; None when it can't be made. Nothing was evicted.
    """
    victims: dict[ChunkKey, Residency] = {}
    free = book.free()
    while not need.fits(free):
        found = len(victims)
        for residency in book:
            if residency.used_at >= colder_than or need.fits(free):
                break
            key = residency.chunk.key
            is_needed = residency.slot is not None or residency.is_leased(now) or residency.is_pinned(now)
            if key in victims or is_needed:
                continue
            if all(child.chunk.key in victims for child in book.children(key)):
                victims[key] = residency
                free += book.room_of(residency.chunk)
        if len(victims) == found:
            return None
    return list(victims.values())
