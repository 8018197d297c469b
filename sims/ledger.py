"""Who owned which chunk, from when to when, and why no longer: the witness for the promises M1, M2 and M5.

The ledger sees only effects, never a machine's inside, so a machine that fools itself doesn't fool it.
"""

from dataclasses import dataclass

from p2pkv.core.ids import InstanceId
from p2pkv.core.keys import ChunkKey


class PromiseBrokenError(AssertionError):
    """A promise of design section 6 doesn't hold; the text says which, where and when."""


@dataclass(slots=True)
class Ownership:
    """One stretch of time in which an instance owned a chunk."""

    instance: InstanceId
    since: float
    until: float | None = None
    ended_by: str = ""


class Ledger:
    """All ownerships of all chunks."""

    def __init__(self) -> None:
        self._ownerships: dict[ChunkKey, list[Ownership]] = {}
        self.ends: dict[str, int] = {}
        self.crashes: list[tuple[InstanceId, float]] = []

    def gained(self, key: ChunkKey, instance: InstanceId, now: float) -> None:
        """`instance` owns `key` from now on."""
        if self.open_since(key, instance) is not None:
            raise PromiseBrokenError(f"t={now:.4f}: {instance} admits {key.hex()} twice")
        self._ownerships.setdefault(key, []).append(Ownership(instance, now))

    def lost(self, key: ChunkKey, instance: InstanceId, now: float, reason: str) -> None:
        """`instance` owns `key` no longer."""
        for ownership in self._ownerships.get(key, []):
            if ownership.instance == instance and ownership.until is None:
                ownership.until, ownership.ended_by = now, reason
                self.ends[reason] = self.ends.get(reason, 0) + 1
                return
        raise PromiseBrokenError(f"t={now:.4f}: {instance} releases {key.hex()}, which it doesn't own")

    def crashed(self, instance: InstanceId, now: float) -> None:
        """`instance` ended: it owns nothing any more."""
        self.crashes.append((instance, now))
        for key in list(self._ownerships):
            if self.open_since(key, instance) is not None:
                self.lost(key, instance, now, "crashed")

    def open_since(self, key: ChunkKey, instance: InstanceId) -> float | None:
        """Since when `instance` owns `key` now; None when it doesn't."""
        ownerships = self._ownerships.get(key, [])
        return next((each.since for each in ownerships if each.instance == instance and each.until is None), None)

    def owned_after(self, key: ChunkKey, instance: InstanceId, moment: float) -> bool:
        """Whether `instance` owned `key` at `moment`, or at any time since."""
        ownerships = self._ownerships.get(key, [])
        return any(each.instance == instance and (each.until is None or each.until >= moment) for each in ownerships)

    def owners_after(self, key: ChunkKey, moment: float) -> list[InstanceId]:
        """Everyone who owned `key` at `moment`, or at any time since."""
        ownerships = self._ownerships.get(key, [])
        return [each.instance for each in ownerships if each.until is None or each.until >= moment]

    def last_end(self, key: ChunkKey, instance: InstanceId) -> str:
        """Why `instance` lost `key` the last time."""
        ends = [each.ended_by for each in self._ownerships.get(key, []) if each.instance == instance and each.until is not None]
        return ends[-1] if ends else ""
