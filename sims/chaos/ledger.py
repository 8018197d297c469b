"""Which chunks must still be held by somebody, whatever has happened to nodes and moves since the last look.

A chunk that was held and pinned at an instance may since have gone, by moves, to the targets of those, and from there on.
One of all these holds it if none of them was killed, as what is pinned isn't evicted (promise M1). Where one was killed, the
chunk may have ended with it: it is excused.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from p2pkv.core.ids import InstanceId
from p2pkv.core.keys import Fingerprint


@dataclass(slots=True)
class Look:
    """What came of one look at all inventories, in chunks at an instance that held them.

    Attributes:
        held: Held still, there or where moves may have taken them.
        excused: Not held; a killed instance may have had them.
        lost: Not held, and nobody was killed who may have had them; each with those instances.
    """

    held: int = 0
    excused: int = 0
    lost: dict[Fingerprint, tuple[InstanceId, ...]] = field(default_factory=dict)


class Ledger:
    """What was held where at the last look, and what has happened since."""

    def __init__(self) -> None:
        self._pinned: dict[Fingerprint, frozenset[InstanceId]] = {}
        self._moves: dict[Fingerprint, dict[tuple[InstanceId, InstanceId], None]] = {}
        self._moves_of_all: dict[tuple[InstanceId, InstanceId], None] = {}
        self._killed: dict[InstanceId, None] = {}

    def moved(self, fingerprints: Iterable[Fingerprint] | None, source: InstanceId, target: InstanceId) -> None:
        """A move of these chunks, or of everything, was asked for; however it ends, they may be at either end now."""
        if fingerprints is None:
            self._moves_of_all[source, target] = None
            return
        for fingerprint in fingerprints:
            self._moves.setdefault(fingerprint, {})[source, target] = None

    def killed(self, instance: InstanceId) -> None:
        """An instance ended without a word, and what it held with it."""
        self._killed[instance] = None

    def look(self, held: Mapping[InstanceId, frozenset[Fingerprint]]) -> Look:
        """Compare what must be held with what is, when no move is under way."""
        result = Look()
        for fingerprint, instances in self._pinned.items():
            for instance in sorted(instances):
                reached = self._reached(fingerprint, instance)
                if any(fingerprint in held.get(each, ()) for each in reached):
                    result.held += 1
                elif any(each in self._killed for each in reached):
                    result.excused += 1
                else:
                    result.lost[fingerprint] = tuple(reached)
        return result

    def begin(self, pinned: Mapping[Fingerprint, frozenset[InstanceId]]) -> None:
        """From now on these are held and pinned there; what was before doesn't count any more."""
        self._pinned = dict(pinned)
        self._moves, self._moves_of_all, self._killed = {}, {}, {}

    def _reached(self, fingerprint: Fingerprint, instance: InstanceId) -> list[InstanceId]:
        """Where a chunk may be that was held at `instance`: there, and wherever moves lead from there, in whatever order."""
        moves = {**self._moves.get(fingerprint, {}), **self._moves_of_all}
        reached = [instance]
        for each in reached:  # grows meanwhile
            reached += [target for source, target in moves if source == each and target not in reached]
        return reached
