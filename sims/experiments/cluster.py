"""The virtual world of the scenarios, as experiments use it: more members, nothing but what it says to each other, counted.

The machines, the clock and the network are the same. Left out is what grows with each message and has no bearing on figures:
the digest of all that happened, and the promises about moves, which experiments don't make.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from p2pkv.core.effects import Effect, MemberChanged, SendMessage
from p2pkv.core.events import Event, MessageReceived
from p2pkv.core.ids import Generation, InstanceId
from p2pkv.core.messages import Message
from p2pkv.core.records import MemberState
from p2pkv.core.timers import TimersOf, lan
from p2pkv.wire.codec import peer_codec
from sims.scenario import Faults, Operations, Scenario
from sims.world import Node, World

STEP_S = 0.05
"""How often it is looked whether something has come about that no single event shows."""
PATIENCE_S = 120.0
"""What hasn't come about by then, never does."""
NO_OPERATIONS = Operations(stores=0, reads=0, moves=0, copies=0)
CHUNKS = 4096
"""Each has room for all that experiments store."""


@dataclass(frozen=True, slots=True)
class Sighted:
    """`observer` has come to think `member`, of that boot, `state`; `is_right` says whether that boot runs no longer."""

    at: float
    observer: InstanceId
    member: InstanceId
    generation: Generation
    state: MemberState
    is_right: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """A boot that began to run, or ended: what the others are to learn, as of when."""

    at: float
    member: InstanceId
    generation: Generation
    is_end: bool


OnHandled = Callable[[Node, Event, InstanceId | None], None]
"""Hears of each event after a machine has handled it, and of who sent it if it's a message."""


class Cluster(World):
    """Members in a virtual network, and what they send.

    Attributes:
        sent: Messages since `count_anew`, by type.
        sent_nbytes: Their bytes, as the peers' codec has them, without the websocket's own.
        sightings: Whom any member came to think alive, dead or left, in order.
        on_handled: Whoever wants to look at machines after each event.
        is_hasty: Who stood still does what was due meanwhile before it looks at what has come in, as no shell of ours does.
    """

    def __init__(self, seed: str, nodes: int, *, faults: Faults | None = None, timers_of: TimersOf = lan) -> None:
        self.sent: Counter[type[Message]] = Counter()
        self.sent_nbytes: Counter[type[Message]] = Counter()
        self.sightings: list[Sighted] = []
        self.on_handled: OnHandled | None = None
        self._sightings_of: dict[tuple[InstanceId, Generation], list[Sighted]] = defaultdict(list)
        self.is_hasty = False
        self._counted_from = 0.0
        self._last_message: Message | None = None
        self._last_nbytes = 0
        scenario = Scenario(
            description="an experiment",
            instances=nodes,
            capacity=CHUNKS,
            operations=NO_OPERATIONS,
            faults=faults or Faults(),
        )
        super().__init__(seed, scenario, timers_of=timers_of)

    @property
    def running(self) -> list[Node]:
        """All that run, those that stand still included."""
        return [node for node in self.nodes.values() if node.is_up]

    # --- time -------------------------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.run(until=self.clock.now + seconds)

    def run_until(self, is_so: Callable[[], bool], *, step_s: float = STEP_S, at_most_s: float = PATIENCE_S) -> float | None:
        """Let time pass until something is so; returns how long that took, None when it never came about."""
        began_at = self.clock.now
        while not is_so():
            if self.clock.now - began_at >= at_most_s:
                return None
            self.run(step_s)
        return self.clock.now - began_at

    def join(self) -> float | None:
        """Let all find each other; returns how long that took."""
        return self.run_until(self.agrees)

    def agrees(self) -> bool:
        """Whether all that run count on all that run, and on nobody else, and have a link to each."""
        boots = {node.name: node.machine.config.generation for node in self.running}
        for node in self.running:
            records = [each for each in node.machine.members() if each.state.is_living]
            has_all = all(each.state is MemberState.ALIVE and boots.get(each.instance) == each.generation for each in records)
            if len(records) != len(boots) or not has_all or len(node.links) < len(boots) - 1:
                return False
        return True

    # --- what is done to members ------------------------------------------------------------------------------------------

    def begins(self, name: InstanceId) -> Turn:
        """Start a member that has ended, as another boot."""
        self.start(name)
        return self._turn(name, is_end=False)

    def crashes(self, name: InstanceId) -> Turn:
        """End a member without a word."""
        self.crash(name)
        return self._turn(name, is_end=True)

    def leaves(self, name: InstanceId) -> Turn:
        """Ask a member to leave."""
        self.leave(name)
        return self._turn(name, is_end=True)

    def stops(self, name: InstanceId, seconds: float) -> Turn:
        """Let a member stand still, for so long that it's to be taken for dead."""
        self.stall(name, seconds)
        return self._turn(name, is_end=True)

    def _turn(self, name: InstanceId, *, is_end: bool) -> Turn:
        return Turn(self.clock.now, name, self.nodes[name].machine.config.generation, is_end)

    # --- what was seen ----------------------------------------------------------------------------------------------------

    def count_anew(self) -> None:
        """Count messages from now on."""
        self.sent.clear()
        self.sent_nbytes.clear()
        self._counted_from = self.clock.now

    def sent_a_second(self) -> tuple[float, float]:
        """Bytes and messages a second and running member, since `count_anew`."""
        over = (self.clock.now - self._counted_from) * len(self.running)
        assert over > 0, "no time has passed"
        return self.sent_nbytes.total() / over, self.sent.total() / over

    def known_s(self, turn: Turn, observers: Iterable[InstanceId]) -> list[float | None]:
        """How long it took each of `observers` to learn of it; None for one that never did."""
        first: dict[InstanceId, float] = {}
        for each in self._sightings_of[turn.member, turn.generation]:
            if each.state.is_living != turn.is_end and each.at >= turn.at:
                first.setdefault(each.observer, each.at - turn.at)
        return [first.get(observer) for observer in observers]

    def false_deaths(self) -> list[Sighted]:
        """Whoever was declared dead, or to have left, and ran."""
        return [each for each in self.sightings if not each.state.is_living and not each.is_right]

    def _record(self, node: Node, what: "Event | Effect | str") -> None:
        match what:
            case SendMessage(message=message):
                if message is not self._last_message:  # most go to everybody
                    self._last_message, self._last_nbytes = message, len(peer_codec().encode(message))
                self.sent[type(message)] += 1
                self.sent_nbytes[type(message)] += self._last_nbytes
            case MemberChanged(member=record):
                member = self.nodes[record.instance]
                runs = member.is_up and not member.is_leaving and member.machine.config.generation == record.generation
                sighted = Sighted(
                    self.clock.now, node.name, record.instance, record.generation, record.state, is_right=not runs
                )
                self.sightings.append(sighted)
                self._sightings_of[record.instance, record.generation].append(sighted)

    def _check(self, _node: Node) -> None:
        return

    def _go_on(self, node: Node) -> None:
        if self.is_hasty and node.wake_at <= self.clock.now:
            self._wake(node, node.wake_at)
        super()._go_on(node)

    def _handle(self, node: Node, event: Event) -> None:
        sender = None
        if isinstance(event, MessageReceived) and event.link in node.links:
            sender = node.links[event.link][0].name  # asked before: handling it may close the link
        super()._handle(node, event)
        if self.on_handled is not None:
            self.on_handled(node, event, sender)
