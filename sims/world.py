"""Whole nodes without a shell: real machines over a virtual network, stores, lanes and engines; invariants after every event."""

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf
from random import Random

from p2pkv.core import effects
from p2pkv.core.config import MachineConfig
from p2pkv.core.effects import ENGINE_STAGE, AnswerValue, Effect, Lent, ReleaseReason
from p2pkv.core.events import (
    DialFailed,
    EngineAttached,
    Event,
    FetchEnded,
    LinkLost,
    LinkOpened,
    MessageReceived,
    ShardsSealed,
    SiblingsFound,
    StoreRequested,
)
from p2pkv.core.ids import Address, EventId, InstanceId, LinkId, RequestId, StageId
from p2pkv.core.keys import ChunkKey, Identity, Namespace, TokenBytes, token_count
from p2pkv.core.machine import Machine
from p2pkv.core.messages import Goodbye, Hello, Message
from p2pkv.core.records import LaneAddress, MemberState
from p2pkv.errors import ErrorCode, Failure
from sims.network import Clock, Faults, Network
from sims.promises import Promises

NAMESPACE = Namespace(
    model="simulated",
    weights="0",
    dtype="float32",
    layers=1,
    planes=2,
    kv_heads=1,
    head_dim=1,
    chunk_size=4,
    world_size=1,
)
PAGE_NBYTES = 4096
MOVE_DEADLINE_S = 60.0
LEASE_S = 10.0

Answered = Callable[[AnswerValue, Failure | None], None]
MachineType = type[Machine]


def payload(key: ChunkKey) -> bytes:
    """The right bytes of a chunk; any others under its key are wrong."""
    return blake2b(key, digest_size=8).digest()


@dataclass(slots=True)
class Node:
    """One boot of one instance: a machine, the bytes it holds, and its links."""

    name: InstanceId
    address: Address
    machine: Machine
    is_up: bool = True
    wake_at: float = inf
    resident: dict[ChunkKey, bytes] = field(default_factory=dict)
    staged: dict[tuple[StageId, ChunkKey], bytes] = field(default_factory=dict)
    links: dict[LinkId, "tuple[Node, LinkId]"] = field(default_factory=dict)
    cancelled: dict[EventId, None] = field(default_factory=dict)
    answers: dict[RequestId, Answered] = field(default_factory=dict)


class World:
    """A cluster. `nodes` holds the latest boot of each instance."""

    def __init__(
        self, seed: str, names: list[InstanceId], *, faults: Faults, capacity: int, machine_type: MachineType = Machine
    ) -> None:
        self.seed = seed
        self.rng = Random(f"{seed}:world")
        self.clock = Clock()
        self.network = Network(self.clock, Random(f"{seed}:network"), faults)
        self.promises = Promises(self.clock)
        self.addresses = {name: Address("virtual", 1 + index) for index, name in enumerate(names)}
        self.nodes: dict[InstanceId, Node] = {}
        self.event_count = 0
        self._capacity = capacity
        self._machine_type = machine_type
        self._numbers = 0
        self._trace = blake2b(digest_size=16)
        for name in names:
            self.start(name)

    def trace(self) -> str:
        """Digest of all that has happened: equal for equal runs."""
        return self._trace.hexdigest()

    # --- nodes ------------------------------------------------------------------------------------------------------------

    def start(self, name: InstanceId) -> None:
        """Boot an instance."""
        config = MachineConfig(
            instance=name,
            generation=self._number(),
            cluster="simulated",
            ws=self.addresses[name],
            http="",
            transfer="",
            lane=LaneAddress(host_id="virtual", path=name),
            zone="",
            chunk_size=NAMESPACE.chunk_size,
            cache_epoch="0",
            cpu_limit_nbytes=self._capacity * PAGE_NBYTES,
            descriptor_limit=2 * self._capacity,
            move_deadline_s=MOVE_DEADLINE_S,
            lease_s=LEASE_S,
            leave_s=2.0,
            wall_offset_s=0.0,
        )
        machine = self._machine_type(config, Random(f"{self.seed}:{name}:{config.generation}"), self.clock.now)
        node = Node(name=name, address=self.addresses[name], machine=machine)
        self.nodes[name] = node
        self.happen(node, EngineAttached(request=self._number(), client=0, namespace=NAMESPACE, worker=0))
        self.happen(node, SiblingsFound(tuple(self.addresses.values())))

    def crash(self, name: InstanceId) -> None:
        """End an instance without a word; its links break."""
        node = self.nodes[name]
        node.is_up = False
        self.promises.crashed(name)
        for link in list(node.links):
            self._close(node, link, "crash")

    def happen(self, node: Node, event: Event) -> None:
        """One event at one node: handle it, perform what follows, check everything."""
        if not node.is_up:
            return
        self.event_count += 1
        self._trace.update(f"{self.clock.now:.9f} {node.name} {event!r}\n".encode())
        self._perform(node, node.machine.handle(event, self.clock.now))

    def request(self, node: Node, make: Callable[[RequestId], Event], answered: Answered) -> None:
        """Ask a node for something; `answered` hears of it, unless the node ends first."""
        request = self._number()
        node.answers[request] = answered
        self.happen(node, make(request))

    def _perform(self, node: Node, ordered: list[Effect]) -> None:
        for effect in ordered:
            self._trace.update(f"{effect!r}\n".encode())
            self._perform_one(node, effect)
        self._check(node)
        wake_at = node.machine.wakeup_at()
        if wake_at < node.wake_at:
            node.wake_at = wake_at
            self.clock.at(wake_at, lambda: self._wake(node, wake_at))

    def _wake(self, node: Node, wake_at: float) -> None:
        if node.is_up and node.wake_at == wake_at:
            node.wake_at = inf
            self._perform(node, node.machine.wake(self.clock.now))

    def _check(self, node: Node) -> None:
        node.machine.check_invariants()
        assert len(node.resident) <= self._capacity, f"{node.name} holds more than its limit"

    def check_at_rest(self) -> None:
        """When all has come to rest: nothing is leased, staged or promised, and all lookups agree with what is held."""
        up = [node for node in self.nodes.values() if node.is_up]
        for node in up:
            node.machine.check_at_rest(self.clock.now)
            assert not node.staged, f"{node.name} has staged bytes that nobody will ever own"
            known = [(each.instance, each.generation, each.state) for each in node.machine.members()]
            expected = [(each.name, each.machine.config.generation, MemberState.ALIVE) for each in up]
            assert known == sorted(expected), f"{node.name} knows {known}, there are {expected}"
            for other in up:
                seen, held = node.machine.inventory_of(other.name), other.machine.inventory_of(other.name)
                assert seen == held, f"{node.name} sees {len(seen)} chunks at {other.name}, which holds {len(held)}"

    # --- effects ----------------------------------------------------------------------------------------------------------

    def _perform_one(self, node: Node, effect: Effect) -> None:
        match effect:
            case effects.OpenLink():
                self.network.reliably(lambda: self._dial(node, effect.address))
            case effects.CloseLink():
                self._close(node, effect.link, effect.reason)
            case effects.SendMessage():
                self._send(node, effect.link, effect.message)
            case effects.Answer():
                answered = node.answers.pop(effect.request, None)
                if answered is not None:
                    answered(effect.value, effect.failure)
            case effects.EventChanged():
                self.promises.event_changed(node.name, effect.event)
            case effects.FetchChunks():
                self.clock.at(self.clock.now + self.network.delay(), lambda: self._fetch(node, effect))
            case effects.CancelFetch():
                node.cancelled[effect.event_id] = None
            case effects.AdmitStaged():
                data = node.staged.pop((effect.stage, effect.key))
                self.promises.admitted(effect.key, node.name, is_right=data == payload(effect.key))
                node.resident[effect.key] = data
            case effects.DropStaged():
                node.staged.pop((effect.stage, effect.key), None)
            case effects.ReleaseChunks():
                for key in effect.keys:
                    del node.resident[key]
                    self.promises.released(key, node.name, is_moved=effect.reason is ReleaseReason.MOVED)
            case effects.Stop():
                self.crash(node.name)
            case effects.MemberChanged():
                pass

    def _dial(self, node: Node, address: Address) -> None:
        peer = next((each for each in self.nodes.values() if each.address == address), None)
        if peer is None or not peer.is_up or not node.is_up:
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
        self.network.reliably(lambda: self.happen(node, LinkLost(link, reason)))
        self.network.reliably(lambda: self._close_far(peer, far))

    def _close_far(self, peer: Node, far: LinkId) -> None:
        if peer.links.pop(far, None) is not None:
            self.happen(peer, LinkLost(far, "closed by the peer"))

    def _send(self, node: Node, link: LinkId, message: Message) -> None:
        if link not in node.links:
            return
        peer, far = node.links[link]
        self.promises.sent(node.name, peer.name, message)

        def arrive() -> None:
            if far in peer.links:
                self.happen(peer, MessageReceived(far, message))

        if isinstance(message, Hello | Goodbye):
            self.network.reliably(arrive)
        else:
            self.network.carelessly(arrive)

    def _fetch(self, node: Node, fetch: effects.FetchChunks) -> None:
        """The lane: what the source grants and holds, verified; a part of it when the lane or the bytes are damaged."""
        source = self.nodes[fetch.source]
        grant = source.machine.lane_grant(fetch.event_id) if source.is_up else None
        fetched: list[ChunkKey] = []
        failure = None
        if not node.is_up:
            return
        for chunk in fetch.chunks:
            held = source.resident.get(chunk.key)
            is_granted = grant is not None and grant.ticket == fetch.ticket and chunk.key in grant.keys
            breaks = self.network.rng.random() < self.network.faults.lane_failure
            if held is None or not is_granted or breaks or fetch.event_id in node.cancelled:
                failure = Failure(ErrorCode.TRANSFER_FAILED, "The lane closed.")
                break
            if self.network.rng.random() < self.network.faults.corruption:
                failure = Failure(ErrorCode.TRANSFER_FAILED, "A chunk came damaged.")
                continue
            node.staged[fetch.event_id, chunk.key] = held
            fetched.append(chunk.key)
        self.happen(node, FetchEnded(fetch.event_id, tuple(fetched), failure))

    # --- engines ----------------------------------------------------------------------------------------------------------

    def store(self, name: InstanceId, tokens: TokenBytes, first_token: int = 0) -> None:
        """An engine stores a prompt; now and then it dies before it commits."""
        node = self.nodes[name]
        make = lambda request: StoreRequested(request, 0, Identity(), tokens, first_token)  # noqa: E731
        self.request(node, make, lambda value, _: self._write(node, tokens, value))

    def _write(self, node: Node, tokens: TokenBytes, lent: AnswerValue) -> None:
        if not isinstance(lent, Lent) or not lent.shards:
            return
        for shard in lent.shards:
            node.staged[ENGINE_STAGE, shard.key] = payload(shard.key)
        if self.rng.random() < 0.02:
            return
        keys = tuple(shard.key for shard in lent.shards)

        def commit() -> None:
            self.request(node, lambda request: ShardsSealed(request, 0, lent.lease, keys), lambda *_: None)
            if lent.next_token < token_count(tokens) and lent.failure is None:
                self.store(node.name, tokens, lent.next_token)

        self.clock.at(self.clock.now + self.network.delay(), commit)

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers
