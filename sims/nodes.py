"""The second level: real nodes over streams in memory, under a clock that jumps. A minute passes in seconds.

The first level (`sims/world`) runs real machines and nothing else of a node. Here the shell is real too: driver, peer links,
proofs, websockets, the wire's codecs, the store with its memfds, and the handoff lane over the host's unix sockets. Virtual are
the time, and the network that the links run over. Left out are the doors for engines and users; they ask the driver.

A seed replays the same run as far as trio allows: its scheduler is told to run what is ready in an order drawn from the seed,
which is how Hypothesis has it; nothing here waits for a thread.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from random import Random

import structlog
import trio

from p2pkv.core.chunks import PAGE_NBYTES
from p2pkv.core.config import MachineConfig
from p2pkv.core.effects import ENGINE_STAGE, Effect, Lent
from p2pkv.core.events import EngineAttached, Event, MessageReceived, ShardsSealed, StoreRequested
from p2pkv.core.ids import Address, Generation, InstanceId, Location, StageId
from p2pkv.core.keys import ChunkKey, Identity, TokenBytes, fingerprint
from p2pkv.core.machine import Machine
from p2pkv.core.messages import PROTOCOL_VERSION
from p2pkv.core.records import HandoffAddress, MemberState
from p2pkv.net.access import DoorGuard
from p2pkv.net.descriptors import open_unix_listener
from p2pkv.net.dial_rules import DialRules
from p2pkv.net.driver import Driver
from p2pkv.net.handoff import HandoffFetcher, serve_handoffs
from p2pkv.net.joining import keep_joining
from p2pkv.net.links import PEER_PATH, PeerLinks
from p2pkv.net.proof import Prover
from p2pkv.net.websockets import serve_websockets
from p2pkv.store.cpu import CpuStore
from p2pkv.wire.proof import Who
from sims.engine import NAMESPACE, payload
from sims.ledger import PromiseBrokenError
from sims.streams import StreamNetwork
from sims.world import LEASE_S, LEAVE_S, MOVE_DEADLINE_S

HOST = "virtual"
CHUNKS_MAX = 4096
"""Each has room for all that is ever stored, so nothing is evicted: a chunk that is freed has moved."""
DELAY_S = (0.0002, 0.002)
KEY = bytes(32)
STEP_S = 0.05
"""How often it is looked whether something has come about."""


@dataclass(slots=True)
class Node:
    """One boot of one instance."""

    name: InstanceId
    driver: Driver
    store: "WatchedStore"
    scope: trio.CancelScope
    client: int

    @property
    def machine(self) -> "WatchedMachine":
        """Its machine."""
        assert isinstance(self.driver.machine, WatchedMachine)
        return self.driver.machine


class WatchedMachine(Machine):
    """A machine that checks itself after every event, and tells of it."""

    def __init__(self, config: MachineConfig, rng: Random, now: float, cluster: "NodeCluster") -> None:
        super().__init__(config, rng, now)
        self._cluster = cluster

    def handle(self, event: Event, now: float) -> list[Effect]:
        """As a machine's."""
        ordered = super().handle(event, now)
        message = type(event.message).__name__ if isinstance(event, MessageReceived) else ""
        self._cluster.handled(f"{now:.9f} {self.config.instance} {type(event).__name__} {message}")
        self.check_invariants()
        return ordered

    def wake(self, now: float) -> list[Effect]:
        """As a machine's."""
        ordered = super().wake(now)
        self.check_invariants()
        return ordered


class WatchedStore(CpuStore):
    """A store that tells who holds what: the witness for M1 and M5.

    Attributes:
        is_lost: Its process has been killed: what is done to it while its tasks end never happened.
    """

    def __init__(self, name: InstanceId, cluster: "NodeCluster") -> None:
        super().__init__()
        self.is_lost = False
        self._name = name
        self._cluster = cluster

    def admit(self, stage: StageId, key: ChunkKey) -> None:
        """As a store's; the bytes must be those of the key."""
        super().admit(stage, key)
        if os.pread(self.descriptors(key)[0], len(payload(key)), 0) != payload(key):
            raise PromiseBrokenError(f"M5: {self._name} admits bytes as {key.hex()} that aren't right")
        if not self.is_lost:
            self._cluster.holders.setdefault(key, {})[self._name] = None

    def release(self, keys: Iterable[ChunkKey]) -> None:
        """As a store's; another must hold each, as nothing is evicted."""
        released = tuple(keys)
        for key in () if self.is_lost else released:
            self._cluster.holders[key].pop(self._name)
            if not self._cluster.holders[key]:
                raise PromiseBrokenError(f"M1: {self._name} frees {key.hex()}, and nobody else holds it")
        super().release(released)


class NodeCluster:
    """Nodes that run in one nursery, and what is done to them.

    Attributes:
        nodes: The living, by name.
        network: Between them.
        holders: Who of them holds a chunk.
        event_count: Events that their machines handled.
        lost_with_holder: Chunks that ended with the last who held them.
    """

    def __init__(self, seed: str, count: int, folder: Path, nursery: trio.Nursery) -> None:
        self.seed = seed
        self.addresses = {f"n{index}": Address(HOST, 1 + index) for index in range(count)}
        names = {address: name for name, address in self.addresses.items()}
        self.network = StreamNetwork(Random(f"{seed}:network"), names, lambda *_: DELAY_S)
        self.nodes: dict[InstanceId, Node] = {}
        self.holders: dict[ChunkKey, dict[InstanceId, None]] = {}
        self.event_count = 0
        self.lost_with_holder = 0
        self._folder = folder
        self._nursery = nursery
        self._generations: Counter[InstanceId] = Counter()
        self._trace = blake2b(digest_size=16)

    def handled(self, what: str) -> None:
        """A machine has handled an event."""
        self.event_count += 1
        self._trace.update(what.encode())

    def trace(self) -> str:
        """Digest of all that machines have handled, and when."""
        return self._trace.hexdigest()

    # --- what is done to nodes --------------------------------------------------------------------------------------------

    async def start(self, name: InstanceId) -> Node:
        """Boot an instance; it is ready to be asked."""
        self._generations[name] += 1
        node: Node = await self._nursery.start(self.run, name, self._generations[name])
        self.nodes[name] = node
        await node.driver.request(partial(EngineAttached, client=node.client, namespace=NAMESPACE, worker=0))
        return node

    def kill(self, name: InstanceId) -> None:
        """End an instance without a word; its streams break, and what it holds is gone."""
        node = self.nodes.pop(name)
        self.network.end(name)
        node.store.is_lost = True
        for holders in self.holders.values():
            was_held = bool(holders)
            holders.pop(name, None)
            self.lost_with_holder += was_held and not holders
        node.scope.cancel()

    async def store(self, name: InstanceId, tokens: TokenBytes) -> None:
        """Have an instance's engine store a prompt."""
        node, start = self.nodes[name], 0
        while True:
            ask = partial(StoreRequested, client=node.client, identity=Identity(), tokens=tokens, first_token=start)
            lent = await node.driver.request(ask)
            assert isinstance(lent, Lent)
            for shard in lent.shards:
                descriptor = node.store.lend(ENGINE_STAGE, shard.key, lent.worker, shard.nbytes)
                os.pwrite(descriptor, payload(shard.key).ljust(shard.nbytes, b"\0"), 0)
                node.store.seal(ENGINE_STAGE, shard.key, lent.worker)
            if not lent.shards:
                return
            keys = tuple(shard.key for shard in lent.shards)
            await node.driver.request(partial(ShardsSealed, client=node.client, lease=lent.lease, sealed=keys))
            start = lent.next_token

    async def run(self, name: InstanceId, generation: Generation, task_status: trio.TaskStatus[Node]) -> None:
        """Run one boot of an instance until it is killed."""
        lane = self._folder / f"{name}.{generation}"
        machine = WatchedMachine(
            self._config(name, generation, lane), Random(f"{self.seed}:{name}:{generation}"), trio.current_time(), self
        )
        store, rules = WatchedStore(name, self), DialRules(())
        rules.contacts_are(self.addresses.values())
        prover = Prover(KEY, HOST, Who(name, generation, (PROTOCOL_VERSION,)), door=PEER_PATH)
        links = PeerLinks(prover, rules, partial(self.network.connect, name))
        driver = Driver(machine, memories={Location.LOCAL_CPU: store}, links=links, fetcher=HandoffFetcher(store, HOST))
        guard = DoorGuard(frozenset(address.port for address in self.addresses.values()), frozenset((HOST,)))
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(driver.run)
                listener = trio.SocketListener(open_unix_listener(lane))
                await nursery.start(serve_handoffs, listener, machine.lane_grant, store)
                routes = {PEER_PATH: partial(links.accept, report=driver.handle)}
                await nursery.start(serve_websockets, self.network.listen(name), routes, guard)
                nursery.start_soon(keep_joining, driver, self._find_others)
                task_status.started(Node(name, driver, store, nursery.cancel_scope, driver.new_client()))
        finally:
            store.close()

    async def _find_others(self) -> list[Address]:
        await trio.lowlevel.checkpoint()
        return list(self.addresses.values())

    def _config(self, name: InstanceId, generation: Generation, lane: Path) -> MachineConfig:
        return MachineConfig(
            instance=name,
            generation=generation,
            cluster=HOST,
            ws=self.addresses[name],
            http="",
            transfer=None,
            handoff=HandoffAddress(HOST, str(lane)),
            zone="",
            chunk_size=NAMESPACE.chunk_size,
            cpu_limit_nbytes=CHUNKS_MAX * PAGE_NBYTES,
            descriptor_limit=CHUNKS_MAX,
            move_deadline_s=MOVE_DEADLINE_S,
            lease_s=LEASE_S,
            leave_s=LEAVE_S,
            peer_fetch=False,
            wall_offset_s=0.0,
        )

    # --- what can be seen -------------------------------------------------------------------------------------------------

    def counts_on(self, observer: InstanceId, member: InstanceId) -> bool:
        """Whether one takes another for living, whichever boot of it."""
        records = self.nodes[observer].machine.members()
        return any(each.instance == member and each.state.is_living for each in records)

    def agrees_on_members(self) -> bool:
        """Whether all living know the living, in their latest boots, and no others."""
        boots = [(name, self._generations[name], MemberState.ALIVE) for name in sorted(self.nodes)]
        known = [
            [(each.instance, each.generation, each.state) for each in node.machine.members() if each.state.is_living]
            for node in self.nodes.values()
        ]
        return all(each == boots for each in known)

    def agrees_on_chunks(self) -> bool:
        """Whether each living one knows of each exactly what it holds."""
        for owner in self.nodes:
            held = sorted(fingerprint(key) for key, holders in self.holders.items() if owner in holders)
            for node in self.nodes.values():
                if [each.fingerprint for each in node.machine.inventory_of(owner)] != held:
                    return False
        return True

    def open_events(self) -> list[str]:
        """Events that go on, as far as any living one knows."""
        return [each.event_id for node in self.nodes.values() for each in node.machine.events() if not each.state.is_final]


async def passes(is_so: Callable[[], bool], *, at_most_s: float) -> float | None:
    """Wait until something is so; how long it took, None when it never came about."""
    began_at = trio.current_time()
    while not is_so():
        if trio.current_time() - began_at > at_most_s:
            return None
        await trio.sleep(STEP_S)
    return trio.current_time() - began_at


@contextmanager
def in_order_of(seed: str) -> Iterator[None]:
    """Tasks that are ready run in an order that the seed draws, and nodes log nothing, meanwhile."""
    scheduler = vars(trio._core._run)  # noqa: SLF001 - trio has this for Hypothesis, and no public name for it
    before = scheduler["_ALLOW_DETERMINISTIC_SCHEDULING"], scheduler["_r"]
    logs = structlog.get_config() if structlog.is_configured() else None
    scheduler["_ALLOW_DETERMINISTIC_SCHEDULING"], scheduler["_r"] = True, Random(f"{seed}:scheduler")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
    try:
        yield
    finally:
        scheduler["_ALLOW_DETERMINISTIC_SCHEDULING"], scheduler["_r"] = before
        structlog.reset_defaults()
        if logs is not None:
            structlog.configure(**logs)
