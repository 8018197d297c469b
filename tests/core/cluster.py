"""A few machines joined by a network that does exactly what a test tells it: no chance, no time on the way.

Messages are delivered in the order in which they were sent, at the moment at which they were sent. A rule loses, holds back or
repeats those of one type; a lane may bring only a part; a node may crash, be stopped, or be cut off. After every event each
machine's invariants hold, and the bytes that it was told to keep are those that it says it owns.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from itertools import count
from random import Random
from typing import TypedDict, TypeVar, Unpack

from p2pkv.core import effects
from p2pkv.core.chunks import Chunk
from p2pkv.core.effects import ENGINE_STAGE, Answer, Effect, FetchChunks, Found, Lent, ReleaseReason
from p2pkv.core.events import (
    CancelRequested,
    ChunksFound,
    DialFailed,
    EngineAttached,
    Event,
    EventAsked,
    FetchEnded,
    KeptChunk,
    LeaveRequested,
    LinkLost,
    LinkOpened,
    LookupRequested,
    MessageReceived,
    MoveRequested,
    RouteRefused,
    ShardsSealed,
    SiblingsFound,
    StoreRequested,
)
from p2pkv.core.ids import Address, EventId, InstanceId, LinkId, Location, RequestId, StageId
from p2pkv.core.keys import ChunkKey, Namespace, TokenBytes, fingerprint
from p2pkv.core.machine import Machine
from p2pkv.core.messages import Message
from p2pkv.core.records import EventRecord, MemberState, Operation, Route, Selection
from p2pkv.errors import ErrorCode, Failure
from tests.core.builders import IDENTITY, NAMESPACE, Limits, address_of, at, chunks_of, config_of

T = TypeVar("T")
CLIENT = 1
"""The connection of an engine's first worker; the others follow."""
STEPS_MAX = 100_000
"""Of one test: more means that a machine asks to be woken again and again without getting anywhere."""


class How(TypedDict, total=False):
    """What a test may want otherwise in a move."""

    by: InstanceId
    operation: Operation
    selection: Selection
    model: str
    old: Location
    new: Location
    idempotency_key: str


class Way(Enum):
    """What becomes of a message."""

    LOST = auto()
    HELD = auto()
    REPEATED = auto()


@dataclass(slots=True)
class Rule:
    """What becomes of the next `left` messages, or fetches, of one type."""

    kind: type
    way: Way
    left: int
    seen: int = 0


@dataclass(slots=True)
class Node:
    """One boot of one instance, and the chunks whose bytes it has: in memory, on disk, and in neither yet."""

    name: InstanceId
    machine: Machine
    namespace: Namespace
    is_up: bool = True
    is_stopped: bool = False
    backlog: deque[Event] = field(default_factory=deque)
    links: dict[LinkId, "tuple[Node, LinkId]"] = field(default_factory=dict)
    resident: dict[ChunkKey, None] = field(default_factory=dict)
    on_disk: dict[ChunkKey, Chunk] = field(default_factory=dict)
    staged: dict[tuple[StageId, ChunkKey], Chunk | None] = field(default_factory=dict)
    stop: effects.Stop | None = None


class Cluster:
    """Machines that are all linked to each other, each with an engine attached."""

    def __init__(self, *names: InstanceId, namespace: Namespace = NAMESPACE, **limits: Unpack[Limits]) -> None:
        self.now = 1000.0
        self.nodes: dict[InstanceId, Node] = {}
        self.asked: dict[RequestId, InstanceId] = {}
        self.answers: dict[RequestId, Answer] = {}
        self.done: list[tuple[InstanceId, Effect]] = []
        self.held: deque[Callable[[], None]] = deque()
        self.lane_brings = 10**9
        self.refused_routes: tuple[type[Route], ...] = ()
        self.damaged: dict[ChunkKey, None] = {}
        self._namespace = namespace
        self._limits = limits
        self._queue: deque[Callable[[], None]] = deque()
        self._rules: list[Rule] = []
        self._cut: dict[frozenset[InstanceId], None] = {}
        self._numbers = count(100)
        self._steps = 0
        for name in names:
            self.boot(name)
        self.run(0.5)

    # --- what a test does to the network ----------------------------------------------------------------------------------

    def lose(self, kind: type, times: int = 10**9) -> Rule:
        """The next messages of this type never arrive."""
        return self._rule(kind, Way.LOST, times)

    def hold(self, kind: type, times: int = 10**9) -> Rule:
        """The next messages of this type, or fetches, wait for `release`."""
        return self._rule(kind, Way.HELD, times)

    def repeat(self, kind: type, times: int = 10**9) -> Rule:
        """The next messages of this type arrive twice."""
        return self._rule(kind, Way.REPEATED, times)

    def heal(self) -> None:
        """No rule holds any more."""
        self._rules.clear()

    def release(self) -> None:
        """What was held arrives now, later ones of its kind too."""
        self._rules = [rule for rule in self._rules if rule.way is not Way.HELD]
        self._queue.extend(self.held)
        self.held.clear()
        self.pump()

    def _rule(self, kind: type, way: Way, times: int) -> Rule:
        rule = Rule(kind, way, times)
        self._rules.append(rule)
        return rule

    def cut(self, one: InstanceId, other: InstanceId) -> None:
        """Their links break, and dials between them fail."""
        self._cut[frozenset((one, other))] = None
        node = self.nodes[one]
        for link in [link for link, (peer, _) in node.links.items() if peer.name == other]:
            self._close(node, link, "cut")
        self.pump()

    def mend(self) -> None:
        """Everyone can reach everyone."""
        self._cut.clear()

    # --- what a test does to nodes ----------------------------------------------------------------------------------------

    def boot(self, name: InstanceId, namespace: Namespace | None = None, **limits: Unpack[Limits]) -> Node:
        """Start an instance, a new boot if it was there before, as all others are unless said otherwise.

        What it had on disk it finds there again.
        """
        old = self.nodes.get(name)
        generation = 1 if old is None else old.machine.config.generation + 1
        all_limits: Limits = {**self._limits, **limits}
        machine = Machine(config_of(name, generation, **all_limits), Random(f"{name}:{generation}"), self.now)
        node = self.nodes[name] = Node(name, machine, namespace or self._namespace)
        if all_limits.get("disk_limit_nbytes"):
            node.on_disk = {} if old is None else old.on_disk
            kept = tuple(KeptChunk(chunk, idle_s=60.0) for chunk in node.on_disk.values())
            self.happen(node, ChunksFound(Location.LOCAL_DISK, (node.namespace,), kept))
        for worker in range(node.namespace.world_size):
            self.ask(name, partial(_engine_attached, node.namespace, worker))
        others = tuple(address_of(each) for each in self.nodes if each != name)
        self.happen(node, SiblingsFound(others))
        self.pump()
        return node

    def crash(self, name: InstanceId) -> None:
        """An instance ends without a word; its links break."""
        node = self.nodes[name]
        node.is_up = False
        for link in list(node.links):
            self._close(node, link, "crash")
        self.pump()

    def stop(self, name: InstanceId) -> None:
        """An instance stands still: its links stay, and what is sent to it waits."""
        self.nodes[name].is_stopped = True

    def go_on(self, name: InstanceId) -> None:
        """A stopped instance goes on, with what has arrived meanwhile."""
        node = self.nodes[name]
        node.is_stopped = False
        while node.backlog:
            self.happen(node, node.backlog.popleft())
        self.pump()

    def happen(self, node: Node, event: Event) -> None:
        """One event at one node."""
        if node.is_up:
            self._perform(node, node.machine.handle(event, self.now))

    # --- what users and engines do ----------------------------------------------------------------------------------------

    def ask(self, name: InstanceId, make: Callable[[RequestId], Event]) -> RequestId:
        """Ask a node something; its answer, when it is there, is in `answers`."""
        request = next(self._numbers)
        self.asked[request] = name
        self.happen(self.nodes[name], make(request))
        self.pump()
        return request

    def start(self, source: InstanceId, target: InstanceId, tokens: TokenBytes = b"", **how: Unpack[How]) -> RequestId:
        """Ask a node, the source unless `how` says otherwise, for a move."""
        return self.ask(
            how.get("by", source),
            lambda request: MoveRequested(
                request=request,
                old_position=at(source, how.get("old", Location.LOCAL_CPU)),
                new_position=at(target, how.get("new", Location.LOCAL_CPU)),
                operation=how.get("operation", Operation.MOVE),
                selection=how.get("selection", Selection.TOKENS),
                tokens=tokens,
                identity=IDENTITY,
                model=how.get("model"),
                idempotency_key=how.get("idempotency_key"),
            ),
        )

    def begin(self, source: InstanceId, target: InstanceId, tokens: TokenBytes = b"", **how: Unpack[How]) -> EventId:
        """`start`, and the id of the event that it was answered with."""
        return self.event_of(self.start(source, target, tokens, **how)).event_id

    def move(self, source: InstanceId, target: InstanceId, tokens: TokenBytes = b"", **how: Unpack[How]) -> EventRecord:
        """`begin`, and the event as its source knows it when nothing is on the way any more."""
        return self.event(source, self.begin(source, target, tokens, **how))

    def event_of(self, request: RequestId) -> EventRecord:
        """The event that a request was answered with."""
        value = self.answers[request].value
        assert isinstance(value, EventRecord), self.answers[request]
        return value

    def failure_of(self, request: RequestId) -> ErrorCode:
        """How a request failed."""
        failure = self.answers[request].failure
        assert failure is not None, self.answers[request]
        return failure.code

    def event(self, name: InstanceId, event_id: EventId) -> EventRecord:
        """An event as `name` knows it without asking."""
        event = self.nodes[name].machine.event(event_id)
        assert event is not None, f"{name} doesn't know {event_id}"
        return event

    def cancel(self, name: InstanceId, event_id: EventId) -> RequestId:
        """Ask `name` to cancel a move."""
        return self.ask(name, lambda request: CancelRequested(request, event_id))

    def ask_event(self, name: InstanceId, event_id: EventId) -> RequestId:
        """Ask `name` for an event."""
        return self.ask(name, lambda request: EventAsked(request, event_id))

    def leave(self, name: InstanceId) -> None:
        """Ask `name` to leave the cluster."""
        self.happen(self.nodes[name], LeaveRequested())
        self.pump()

    def store(self, name: InstanceId, tokens: TokenBytes) -> int:
        """All workers of an engine store a prompt; returns the tokens that are held then."""
        for worker in range(self.nodes[name].namespace.world_size):
            lent = self.lend(name, tokens, worker=worker)
            while lent.shards:
                self.commit(name, lent)
                if lent.failure is not None:
                    break
                lent = self.lend(name, tokens, lent.next_token, worker=worker)
        return self.held_tokens(name, tokens)

    def lend(self, name: InstanceId, tokens: TokenBytes, first_token: int = 0, *, worker: int = 0) -> Lent:
        """An engine's worker asks for memory to store a prompt, and has it."""
        request = self.ask(name, lambda each: StoreRequested(each, CLIENT + worker, IDENTITY, tokens, first_token))
        lent = self.answers[request].value
        assert isinstance(lent, Lent)
        self.nodes[name].staged.update(dict.fromkeys((ENGINE_STAGE, shard.key) for shard in lent.shards))
        return lent

    def commit(self, name: InstanceId, lent: Lent) -> int:
        """An engine commits what it was lent; returns the tokens that are held then."""
        keys = tuple(shard.key for shard in lent.shards)
        request = self.ask(name, lambda request: ShardsSealed(request, CLIENT + lent.worker, lent.lease, keys))
        held = self.answers[request].value
        assert isinstance(held, int)
        return held

    # --- what a test sees -------------------------------------------------------------------------------------------------

    def held_tokens(self, name: InstanceId, tokens: TokenBytes) -> int:
        """What an engine at `name` finds of a prompt."""
        return self.look_up(name, tokens).num_tokens

    def look_up(
        self,
        name: InstanceId,
        tokens: TokenBytes,
        *,
        source: InstanceId | None = None,
        prefill_tokens_per_s: float | None = None,
    ) -> Found:
        """What an engine at `name` is told of a prompt; whatever that leads to has been delivered."""
        request = self.ask(name, lambda each: LookupRequested(each, CLIENT, IDENTITY, tokens, source, prefill_tokens_per_s))
        found = self.answers[request].value
        assert isinstance(found, Found)
        return found

    def has(self, name: InstanceId, tokens: TokenBytes) -> list[bool]:
        """For each chunk of a prompt, whether `name` has its bytes as a resident chunk."""
        return [chunk.key in self.nodes[name].resident for chunk in chunks_of(tokens, self._namespace)]

    def has_on_disk(self, name: InstanceId, tokens: TokenBytes) -> list[bool]:
        """For each chunk of a prompt, whether `name` has its bytes as a resident chunk on disk."""
        return [chunk.key in self.nodes[name].on_disk for chunk in chunks_of(tokens, self._namespace)]

    def states(self, name: InstanceId) -> dict[InstanceId, MemberState]:
        """Members as `name` sees them."""
        return {record.instance: record.state for record in self.nodes[name].machine.members()}

    def effects(self, name: InstanceId, kind: type[T]) -> list[T]:
        """What `name` was told to do, of one kind, from the beginning."""
        return [effect for each, effect in self.done if each == name and isinstance(effect, kind)]

    def sent(self, name: InstanceId, kind: type[T]) -> list[T]:
        """All messages of one type that `name` has sent, lost ones included."""
        messages = (send.message for send in self.effects(name, effects.SendMessage))
        return [message for message in messages if isinstance(message, kind)]

    def freed(self, name: InstanceId, reason: ReleaseReason) -> list[ChunkKey]:
        """Chunks that `name` has freed for this reason."""
        releases = self.effects(name, effects.ReleaseChunks)
        return [key for release in releases if release.reason is reason for key in release.keys]

    def assert_at_rest(self) -> None:
        """Nothing is leased, promised, staged, or on its way at any node that is up."""
        for node in self.nodes.values():
            if node.is_up:
                node.machine.check_at_rest(self.now)
                assert not node.staged, node.name

    # --- time -------------------------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        self.pump()
        while True:
            awake = [node for node in self.nodes.values() if node.is_up and not node.is_stopped]
            due_at = min((node.machine.wakeup_at() for node in awake), default=end)
            if due_at > end:
                break
            self.now = max(self.now, due_at)
            for node in awake:
                if node.machine.wakeup_at() <= self.now:
                    self._perform(node, node.machine.wake(self.now))
                    assert node.machine.wakeup_at() > self.now, f"{node.name} wants to be woken again at once"
            self.pump()
        self.now = end

    def pump(self) -> None:
        """Deliver all that is on the way."""
        while self._queue:
            self._steps += 1
            assert self._steps < STEPS_MAX, "it never comes to rest"
            self._queue.popleft()()

    def deliver(self, sender: InstanceId, receiver: InstanceId, message: Message) -> None:
        """A message arrives that `sender` sent long ago, or never."""
        node = self.nodes[receiver]
        link = next(link for link, (peer, _) in node.links.items() if peer.name == sender)
        self._tell(node, MessageReceived(link, message))
        self.pump()

    # --- effects ----------------------------------------------------------------------------------------------------------

    def _perform(self, node: Node, ordered: list[Effect]) -> None:
        for effect in ordered:
            self.done.append((node.name, effect))
            self._perform_one(node, effect)
        node.machine.check_invariants()
        owned = {(each.location, each.fingerprint) for each in node.machine.inventory_of(node.name)}
        held = {(Location.LOCAL_CPU, fingerprint(key)) for key in node.resident}
        held.update((Location.LOCAL_DISK, fingerprint(key)) for key in node.on_disk)
        assert owned == held, f"{node.name} owns what it doesn't hold, or the reverse"

    def _perform_one(self, node: Node, effect: Effect) -> None:
        match effect:
            case effects.OpenLink():
                self._later(partial(self._dial, node, effect.address))
            case effects.CloseLink():
                self._later(partial(self._close, node, effect.link, effect.reason))
            case effects.SendMessage():
                self._carry(type(effect.message), partial(self._arrive, node, effect.link, effect.message))
            case effects.Answer():
                assert effect.request not in self.answers, "a request is answered once"
                self.answers[effect.request] = effect
            case effects.FetchChunks():
                self._carry(FetchChunks, partial(self._fetch, node, effect))
            case effects.AdmitStaged():
                chunk = node.staged.pop((effect.stage, effect.key))
                if effect.location is Location.LOCAL_CPU:
                    node.resident[effect.key] = None
                else:
                    assert chunk is not None, "a lane brought it"
                    node.on_disk[effect.key] = chunk
            case effects.DropStaged():
                node.staged.pop((effect.stage, effect.key), None)
            case effects.ReleaseChunks():
                for key in effect.keys:
                    del (node.resident if effect.location is Location.LOCAL_CPU else node.on_disk)[key]
            case effects.Stop():
                node.stop = effect
                self._later(partial(self.crash, node.name))
            case effects.CancelFetch() | effects.EventChanged() | effects.MemberChanged() | effects.InventoryDoubted():
                pass

    def _later(self, action: Callable[[], None]) -> None:
        self._queue.append(action)

    def _carry(self, kind: type, action: Callable[[], None]) -> None:
        rule = next((each for each in self._rules if each.kind is kind and each.left), None)
        if rule is None:
            self._later(action)
            return
        rule.left -= 1
        rule.seen += 1
        if rule.way is Way.HELD:
            self.held.append(action)
        elif rule.way is Way.REPEATED:
            self._later(action)
            self._later(action)

    def _dial(self, node: Node, address: Address) -> None:
        peer = next((each for each in self.nodes.values() if address_of(each.name) == address), None)
        if peer is None or not peer.is_up or not node.is_up or frozenset((node.name, peer.name)) in self._cut:
            self._tell(node, DialFailed(address, "refused"))
            return
        near, far = next(self._numbers), next(self._numbers)
        node.links[near], peer.links[far] = (peer, far), (node, near)
        self._tell(node, LinkOpened(near, address))
        self._tell(peer, LinkOpened(far, None))

    def _close(self, node: Node, link: LinkId, reason: str) -> None:
        if link not in node.links:
            return
        peer, far = node.links.pop(link)
        del peer.links[far]
        self._tell(node, LinkLost(link, reason))
        self._tell(peer, LinkLost(far, "closed by the peer"))

    def _arrive(self, node: Node, link: LinkId, message: Message) -> None:
        if link in node.links:
            peer, far = node.links[link]
            self._tell(peer, MessageReceived(far, message))

    def _tell(self, node: Node, event: Event) -> None:
        """An event from outside; a stopped node hears of it when it goes on."""
        if node.is_stopped:
            node.backlog.append(event)
        else:
            self.happen(node, event)

    def _fetch(self, node: Node, order: FetchChunks) -> None:
        """The lane gives what the source grants and holds, at most `lane_brings` chunks, and damaged ones not at all."""
        if isinstance(order.route, self.refused_routes):
            self._tell(node, RouteRefused(order.event_id, Failure(ErrorCode.TRANSFER_FAILED, "Nobody opens.")))
            return
        source = self.nodes[order.source]
        grant = source.machine.lane_grant(order.event_id) if source.is_up else None
        fetched: list[ChunkKey] = []
        for chunk in order.chunks:
            is_granted = grant is not None and grant.ticket == order.ticket and chunk.key in grant.keys
            is_held = grant is not None and chunk.key in (
                source.resident if grant.location is Location.LOCAL_CPU else source.on_disk
            )
            is_right = is_held and chunk.key not in self.damaged
            if is_granted and is_right and len(fetched) < self.lane_brings:
                node.staged[order.event_id, chunk.key] = chunk
                fetched.append(chunk.key)
        is_whole = len(fetched) == len(order.chunks)
        failure = None if is_whole else Failure(ErrorCode.TRANSFER_FAILED, "The lane closed.")
        self._tell(node, FetchEnded(order.event_id, tuple(fetched), failure))


def _engine_attached(namespace: Namespace, worker: int, request: RequestId) -> EngineAttached:
    return EngineAttached(request, CLIENT + worker, namespace, worker)
