"""Who is thought to live, and who does: the witness for L10 to L16.

An instance is *well* while it runs, isn't clogged, and hasn't stood still lately. That a well one thinks another dead is an
error, that anyone suspects it a nuisance; a scenario says how many there may be. When one has crashed, or stands still, all
must know in time.
"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pkv.core.effects import Effect, MemberChanged, SendMessage
from p2pkv.core.ids import Generation, InstanceId
from p2pkv.core.messages import Rumour, Rumours
from p2pkv.core.records import MemberRecord, MemberState
from sims.ledger import PromiseBrokenError
from sims.scenario import Lives

if TYPE_CHECKING:
    from sims.world import Node, World

LATELY_S = 5.0
"""For so long after it stood still, what an instance hears, and what others think of it, may be of that time."""


@dataclass(frozen=True, slots=True)
class _End:
    """Since when a boot can't be heard."""

    at: float
    generation: Generation


class Witness:
    """Watches a world. `known_s` has, for each end and each that saw it, how long it took."""

    def __init__(self, world: "World", lives: Lives) -> None:
        self.counts: Counter[str] = Counter()
        self.known_s: list[float] = []
        self._world = world
        self._lives = lives
        self._ends: dict[InstanceId, _End] = {}
        self._suspected: dict[Rumour, None] = {}

    def crashed(self, node: "Node") -> None:
        """An instance ends without a word."""
        self._ended(node, self._lives.dead_known_s)

    def stands(self, node: "Node", seconds: float) -> None:
        """An instance stands still, for that long."""
        within_s = self._lives.silent_known_s
        if node.is_up and within_s is not None and seconds > within_s:
            self._ended(node, within_s)

    def _ended(self, node: "Node", within_s: float | None) -> None:
        end = self._ends[node.name] = _End(self._world.clock.now, node.machine.config.generation)
        if within_s is not None:
            self._world.clock.after(within_s, lambda: self._check_known(node.name, end))

    def _check_known(self, name: InstanceId, end: _End) -> None:
        for node in self._world.nodes.values():
            record = next((each for each in node.machine.members() if each.instance == name), None)
            has_watched = node.name != name and node.is_up and node.stood_until < end.at
            is_living = record is not None and record.generation == end.generation and record.state.is_living
            if has_watched and is_living:
                now = self._world.clock.now
                raise PromiseBrokenError(f"L10 at t={now:.4f}: {node.name} still counts on {name}, {now - end.at:.1f} s gone")

    def ordered(self, node: "Node", effect: Effect) -> None:
        """A machine ordered something."""
        match effect:
            case MemberChanged(member=record) if record.state is MemberState.DEAD:
                self._declared_dead(node, record)
            case SendMessage(message=Rumours(rumours=rumours)):
                for rumour in rumours:
                    if rumour.state is MemberState.SUSPECT and rumour not in self._suspected:
                        self._suspected[rumour] = None
                        self._suspects(node, rumour)

    def _declared_dead(self, node: "Node", record: MemberRecord) -> None:
        end = self._ends.get(record.instance)
        if self._is_well(record.instance, record.generation):
            is_well = self._is_well(node.name, node.machine.config.generation)
            self.counts["well one declared dead" if is_well else "well one declared dead by one that stood still"] += 1
            self._check("false deaths", self.counts["well one declared dead"], self._lives.false_deaths, node, record)
        elif end is not None and end.generation == record.generation and node.stood_until < end.at:
            self.known_s.append(self._world.clock.now - end.at)

    def _suspects(self, node: "Node", rumour: Rumour) -> None:
        if self._is_well(rumour.instance, rumour.generation):
            self.counts["well one suspected"] += 1
            count = self.counts["well one suspected"]
            self._check("false suspicions", count, self._lives.false_suspicions, node, rumour)

    def _is_well(self, name: InstanceId, generation: Generation) -> bool:
        node = self._world.nodes[name]
        has_stood = self._world.clock.now < node.stood_until + LATELY_S
        is_hindered = has_stood or self._world.network.is_clogged(name)
        return node.is_up and node.machine.config.generation == generation and not is_hindered

    def _check(self, what: str, count: int, most: int | None, node: "Node", about: MemberRecord | Rumour) -> None:
        if most is not None and count > most:
            raise PromiseBrokenError(
                f"L12 at t={self._world.clock.now:.4f}: {node.name} thinks {about.instance} {about.state}; "
                f"{count} {what} are more than {most}"
            )
