"""Who owned which chunk, from when to when, and why no longer: the witness for the promises M1, M2 and M5.

The ledger sees only effects, never a machine's inside, so a machine that fools itself doesn't fool it.
"""

from collections import Counter
from dataclasses import dataclass

from p2pkv.core.ids import InstanceId
from p2pkv.core.keys import ChunkKey


class PromiseBrokenError(AssertionError):
    """A rule of `docs/protocol.md` doesn't hold; the text says which, where and when.

    Attributes:
        about: The event id and the chunk keys (in hex) that it is about, for the story.
    """

    def __init__(self, what: str, about: tuple[str, ...] = ()) -> None:
        super().__init__(what)
        self.about = about


@dataclass(slots=True)
class Ownership:
    """One stretch of time in which an instance owned a chunk."""

    instance: InstanceId
    since: float
    until: float | None = None
    ended_by: str = ""


class Ledger:
    """All ownerships of all chunks; `ends` counts why they ended."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self._ownerships: dict[ChunkKey, list[Ownership]] = {}

    def gained(self, key: ChunkKey, instance: InstanceId, now: float) -> None:
        """`instance` owns `key` from now on."""
        if self._current(key, instance) is not None:
            raise PromiseBrokenError(f"t={now:.4f}: {instance} admits {key.hex()} twice", (key.hex(),))
        self._ownerships.setdefault(key, []).append(Ownership(instance, now))

    def lost(self, key: ChunkKey, instance: InstanceId, now: float, reason: str) -> None:
        """`instance` owns `key` no longer."""
        ownership = self._current(key, instance)
        if ownership is None:
            raise PromiseBrokenError(f"t={now:.4f}: {instance} releases {key.hex()}, which it doesn't own", (key.hex(),))
        ownership.until, ownership.ended_by = now, reason
        self.ends[reason] += 1

    def ended(self, instance: InstanceId, now: float, reason: str) -> None:
        """`instance` is gone: it owns nothing any more."""
        for key in self._ownerships:
            if self._current(key, instance) is not None:
                self.lost(key, instance, now, reason)

    def _current(self, key: ChunkKey, instance: InstanceId) -> Ownership | None:
        ownerships = self._ownerships.get(key, [])
        return next((each for each in ownerships if each.instance == instance and each.until is None), None)

    def open_since(self, key: ChunkKey, instance: InstanceId) -> float | None:
        """Since when `instance` owns `key` now; None when it doesn't."""
        ownership = self._current(key, instance)
        return None if ownership is None else ownership.since

    def held_by(self, instance: InstanceId) -> frozenset[ChunkKey]:
        """All that `instance` owns now."""
        return frozenset(key for key in self._ownerships if self._current(key, instance) is not None)

    def owned_after(self, key: ChunkKey, instance: InstanceId, moment: float) -> bool:
        """Whether `instance` owned `key` at `moment`, or at any time since."""
        ownerships = self._ownerships.get(key, [])
        return any(each.instance == instance and (each.until is None or each.until >= moment) for each in ownerships)

    def is_accounted_for(self, key: ChunkKey, since: float) -> bool:
        """Whether anyone owns `key`, or has lost it since then by anything but handing it over."""
        ownerships = self._ownerships.get(key, [])
        return any(each.until is None or (each.until >= since and each.ended_by != "moved") for each in ownerships)

    def last_end(self, key: ChunkKey, instance: InstanceId) -> str:
        """Why `instance` lost `key` the last time."""
        ends = [each.ended_by for each in self._ownerships.get(key, []) if each.instance == instance and each.until is not None]
        return ends[-1] if ends else ""
