"""Whole nodes without a shell: real machines over a virtual network, stores, lanes and engines; checked after every event."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf
from random import Random

from p2pkv.core import effects
from p2pkv.core.chunks import PAGE_NBYTES
from p2pkv.core.config import MachineConfig
from p2pkv.core.effects import AnswerValue, Effect
from p2pkv.core.events import DialFailed, Event, LeaveRequested, LinkLost, LinkOpened, MessageReceived, SiblingsFound
from p2pkv.core.ids import Address, EventId, Generation, InstanceId, LinkId, RequestId, StageId
from p2pkv.core.keys import ChunkKey
from p2pkv.core.machine import Machine
from p2pkv.core.messages import Goodbye, Hello, Message
from p2pkv.core.records import HandoffAddress, MemberState
from p2pkv.core.timers import TimersOf, lan
from p2pkv.errors import Failure
from sims.engine import NAMESPACE, Engine, payload
from sims.lane import Lane
from sims.ledger import PromiseBrokenError
from sims.lives import Witness
from sims.network import Clock, Network
from sims.promises import Promises
from sims.scenario import Scenario

JOIN_S = 2.0
MOVE_DEADLINE_S = 60.0
LEASE_S = 10.0
LEAVE_S = 2.0
SET_BACK_S = 3600.0
STALL_MAX_S = 15.0
"""A node that stands still can't keep a deadline; it gets that much more."""

Answered = Callable[[AnswerValue, Failure | None], None]
Recorder = Callable[[float, InstanceId, "Event | Effect | str"], None]


@dataclass(slots=True)
class Node:
    """One boot of one instance: a machine, the bytes it holds, and its links."""

    name: InstanceId
    address: Address
    machine: Machine
    is_up: bool = True
    stands_until: float = 0.0
    stood_until: float = -inf
    leaves_by: float = inf
    wake_at: float = inf
    missed: deque[Event] = field(default_factory=deque)
    resident: dict[ChunkKey, bytes] = field(default_factory=dict)
    staged: dict[tuple[StageId, ChunkKey], bytes] = field(default_factory=dict)
    links: dict[LinkId, "tuple[Node, LinkId]"] = field(default_factory=dict)
    cancelled: dict[EventId, None] = field(default_factory=dict)
    answers: dict[RequestId, Answered] = field(default_factory=dict)

    @property
    def is_leaving(self) -> bool:
        """Whether it was asked to leave and still runs."""
        return self.is_up and self.leaves_by < inf


class World:
    """A cluster. `nodes` holds the latest boot of each instance, `engines` what is attached to it."""

    def __init__(self, seed: str, scenario: Scenario, recorder: Recorder | None = None, *, timers_of: TimersOf = lan) -> None:
        self.seed = seed
        self.clock = Clock()
        self.network = Network(self.clock, Random(f"{seed}:network"), scenario.faults, scenario.layout)
        deadline_s = MOVE_DEADLINE_S + (STALL_MAX_S if scenario.blows.stalls or scenario.blows.slows else 0.0)
        self.promises = Promises(self.clock, move_deadline_s=deadline_s, lease_s=LEASE_S)
        self.nodes: dict[InstanceId, Node] = {}
        self.engines: dict[InstanceId, Engine] = {}
        self.event_count = 0
        self.false_death_count = 0
        self.witness = Witness(self, scenario.lives)
        self._addresses = {name: Address("virtual", 1 + index) for index, name in enumerate(scenario.names)}
        self._name_at = {address: name for name, address in self._addresses.items()}
        self._set_back_s = dict.fromkeys(self._addresses, 0.0)
        self._layout = scenario.layout
        self._capacity = scenario.capacity
        self._peer_fetch = scenario.peer_fetch
        self._log_changes = scenario.log_changes
        self._timers_of = timers_of
        self._numbers = 0
        self._trace = blake2b(digest_size=16)
        self._recorder = recorder
        for name in self._addresses:
            self.start(name)

    def trace(self) -> str:
        """Digest of all that has happened: equal for equal runs."""
        return self._trace.hexdigest()

    def _record(self, node: Node, what: "Event | Effect | str") -> None:
        self._trace.update(f"{self.clock.now:.9f} {node.name} {what!r}\n".encode())
        if self._recorder is not None:
            self._recorder(self.clock.now, node.name, what)

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    # --- nodes ------------------------------------------------------------------------------------------------------------

    def start(self, name: InstanceId) -> None:
        """Boot an instance and its engine."""
        config = MachineConfig(
            instance=name,
            generation=self._generation(name),
            cluster="simulated",
            ws=self._addresses[name],
            http="",
            transfer=None,
            handoff=HandoffAddress(host_id="virtual", path=name),
            zone="" if self._layout is None else self._layout.group_of(name),
            chunk_size=NAMESPACE.chunk_size,
            cpu_limit_nbytes=self._capacity * PAGE_NBYTES,
            descriptor_limit=2 * self._capacity,
            move_deadline_s=MOVE_DEADLINE_S,
            lease_s=LEASE_S,
            leave_s=LEAVE_S,
            peer_fetch=self._peer_fetch,
            log_changes=self._log_changes,
            wall_offset_s=-self._set_back_s[name],
            timers_of=self._timers_of,
        )
        machine = Machine(config, Random(f"{self.seed}:{name}:{config.generation}"), self.clock.now)
        node = Node(name=name, address=self._addresses[name], machine=machine)
        self.nodes[name], self.engines[name] = node, Engine(self, node)
        self.engines[name].attach()
        self.happen(node, SiblingsFound(tuple(self._addresses.values())))

    def _generation(self, name: InstanceId) -> Generation:
        """By its wall clock, whose milliseconds are the numbers here, and above the last one, which its host has kept."""
        last = self.nodes[name].machine.config.generation if name in self.nodes else 0
        by_clock = self._number() - int(1000 * self._set_back_s[name])
        self.promises.sightings.counts["booted by a clock set back"] += last >= by_clock
        return max(by_clock, last + 1)

    def set_clock_back(self, name: InstanceId) -> None:
        """From its next boot on, an instance's wall clock is an hour late, or one more."""
        self._set_back_s[name] += SET_BACK_S

    def crash(self, name: InstanceId) -> None:
        """End an instance without a word; its links break."""
        self.witness.crashed(self.nodes[name])
        self._end(self.nodes[name], "crashed")

    def leave(self, name: InstanceId) -> None:
        """Ask an instance to leave; it has `LEAVE_S`, however long it stands still."""
        node = self.nodes[name]
        node.leaves_by = max(self.clock.now, node.stands_until) + LEAVE_S
        self.happen(node, LeaveRequested())

    def stall(self, name: InstanceId, seconds: float) -> None:
        """Let an instance stand still: what happens to it meanwhile, happens when it goes on."""
        node = self.nodes[name]
        self.witness.stands(node, seconds)
        node.stands_until = node.stood_until = max(node.stands_until, self.clock.now + seconds)

    def _end(self, node: Node, how: str) -> None:
        node.is_up = False
        self._record(node, how)
        self.promises.ended(node.name, how)
        for link in list(node.links):
            self._close(node, link, how)

    def happen(self, node: Node, event: Event) -> None:
        """One event at one node, once it goes on if it stands still, after all that it has missed."""
        if node.missed or node.stands_until > self.clock.now:
            node.missed.append(event)
            self.clock.at(node.stands_until, lambda: self._go_on(node))
        else:
            self._handle(node, event)

    def _go_on(self, node: Node) -> None:
        while node.missed and node.stands_until <= self.clock.now:
            self._handle(node, node.missed.popleft())

    def _handle(self, node: Node, event: Event) -> None:
        """Hand an event to the machine, perform what follows, check everything."""
        if not node.is_up:
            return
        self.event_count += 1
        self._record(node, event)
        self.promises.happened(node.name, event)
        self._perform(node, node.machine.handle(event, self.clock.now))

    def request(self, node: Node, make: Callable[[RequestId], Event], answered: Answered) -> None:
        """Ask a node for something; `answered` hears of it, unless the node ends first."""
        request = self._number()
        node.answers[request] = answered
        self.happen(node, make(request))

    def _perform(self, node: Node, ordered: list[Effect]) -> None:
        for effect in ordered:
            self._record(node, effect)
            self.promises.ordered(node.name, effect)
            self.witness.ordered(node, effect)
            self._perform_one(node, effect)
        if node.is_up:
            self._check(node)
            wake_at = node.machine.wakeup_at()
            if wake_at < node.wake_at:
                node.wake_at = wake_at
                self.clock.at(wake_at, lambda: self._wake(node, wake_at))

    def _wake(self, node: Node, wake_at: float) -> None:
        if not node.is_up or node.wake_at != wake_at:
            return
        if node.stands_until > self.clock.now:
            self.clock.at(node.stands_until, lambda: self._wake(node, wake_at))
            return
        node.wake_at = inf
        self.promises.woke()
        self._perform(node, node.machine.wake(self.clock.now))

    # --- checks -----------------------------------------------------------------------------------------------------------

    def _check(self, node: Node) -> None:
        held = len(node.resident) + len(node.staged)
        if held > self._capacity:
            raise PromiseBrokenError(f"S4 at t={self.clock.now:.4f}: {node.name} holds {held} chunks of {self._capacity}")
        if self.clock.now > node.leaves_by:
            raise PromiseBrokenError(f"E7 at t={self.clock.now:.4f}: {node.name} hasn't left within {LEAVE_S} s")
        node.machine.check_invariants()

    # --- effects ----------------------------------------------------------------------------------------------------------

    def _perform_one(self, node: Node, effect: Effect) -> None:
        match effect:
            case effects.OpenLink():
                peer = self._name_at.get(effect.address, node.name)
                self.network.reliably(lambda: self._dial(node, effect.address), node.name, peer)
            case effects.CloseLink():
                self._close(node, effect.link, effect.reason)
            case effects.SendMessage():
                self._send(node, effect.link, effect.message)
            case effects.Answer():
                assert effect.request in node.answers, f"{node.name} answers {effect.request} twice"
                node.answers.pop(effect.request)(effect.value, effect.failure)
            case effects.FetchChunks():
                Lane(self, node, effect).open()
            case effects.CancelFetch():
                node.cancelled[effect.event_id] = None
            case effects.AdmitStaged():
                data = node.staged.pop((effect.stage, effect.key), b"")
                is_right = data == payload(effect.key)
                self.promises.admitted(effect.key, node.name, effect.stage, is_right=is_right)
                node.resident[effect.key] = data
            case effects.DropStaged():
                node.staged.pop((effect.stage, effect.key), None)
            case effects.ReleaseChunks():
                self.promises.released(effect.keys, node.name, effect.reason)
                for key in effect.keys:
                    del node.resident[key]
            case effects.Stop():
                assert effect.failure is None, f"{node.name} stops: {effect.failure}"
                self._end(node, "left")
            case effects.MemberChanged():
                member = self.nodes[effect.member.instance]
                is_alive = member.is_up and member.machine.config.generation == effect.member.generation
                self.false_death_count += is_alive and effect.member.state is MemberState.DEAD
            case effects.EventChanged() | effects.InventoryDoubted():
                pass

    # --- links ------------------------------------------------------------------------------------------------------------

    def _dial(self, node: Node, address: Address) -> None:
        peer = next((each for each in self.nodes.values() if each.address == address), None)
        if not node.is_up:
            return
        if peer is None or not peer.is_up or self.network.is_cut(node.name, peer.name):
            self.happen(node, DialFailed(address, "refused"))
            return
        near, far = self._number(), self._number()
        node.links[near], peer.links[far] = (peer, far), (node, near)
        self.happen(node, LinkOpened(near, address))
        self.happen(peer, LinkOpened(far, None))

    def _close(self, node: Node, link: LinkId, reason: str) -> None:
        other = node.links.pop(link, None)
        if other is None:
            return
        peer, far = other
        self.network.reliably(lambda: self.happen(node, LinkLost(link, reason)), node.name, node.name)
        self.network.reliably(lambda: self._break(peer, far, node.name), node.name, peer.name)

    def _break(self, node: Node, link: LinkId, peer: InstanceId) -> None:
        """The end of a link reaches its other end, unless nothing passes between them."""
        if not self.network.is_deaf(node.name, peer) and node.links.pop(link, None) is not None:
            self.happen(node, LinkLost(link, "closed by the peer"))

    def _send(self, node: Node, link: LinkId, message: Message) -> None:
        if link not in node.links:
            return
        peer, far = node.links[link]

        def arrive() -> None:
            if far in peer.links:
                self.happen(peer, MessageReceived(far, message))
            else:
                self._break(node, link, peer.name)

        if self.network.is_deaf(peer.name, node.name):
            self.network.lost_count += 1
        elif isinstance(message, Hello | Goodbye):
            self.network.reliably(arrive, node.name, peer.name)
        else:
            self.network.carelessly(arrive, node.name, peer.name)
