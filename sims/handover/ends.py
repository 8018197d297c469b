"""One instance's part in moves, as the search drives it: real machines, of which membership and gossip are left out.

An `End` is a `Machine` with the real parts that decide who owns what: holdings, both ends of moves, the coordinator, what
engines are served by, and the machine's own routing of messages. Who lives, it is told; inventories go to nobody. Its clock
stands still, unless time passes for it.
"""

import pickle
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from hashlib import blake2b
from io import BytesIO
from random import Random
from typing import Any

from p2pkv.core.chunks import PAGE_NBYTES, Chunk
from p2pkv.core.config import MachineConfig
from p2pkv.core.effects import Effect
from p2pkv.core.events import CancelRequested, EngineAttached, FetchEnded, ShardsSealed, StoreRequested
from p2pkv.core.history import History
from p2pkv.core.holdings import Holdings
from p2pkv.core.ids import Address, InstanceId, Location
from p2pkv.core.inventory import EntrySet, InventoryLog
from p2pkv.core.keys import TOKEN_NBYTES, Namespace, TokenBytes, chunk_key, namespace_digest, token_count
from p2pkv.core.machine import Machine
from p2pkv.core.membership import Membership
from p2pkv.core.messages import Message, PlanRequest
from p2pkv.core.moves.coordinator import Coordinator
from p2pkv.core.moves.source import SourceMoves
from p2pkv.core.moves.target import TargetMoves
from p2pkv.core.moves.tcp_rate import TcpRate
from p2pkv.core.outbox import Outbox
from p2pkv.core.peers import Lost
from p2pkv.core.records import HandoffAddress, LocationStatus, MemberRecord, MemberState
from p2pkv.core.residency import Residencies
from p2pkv.core.serving import Serving
from sims.engine import NAMESPACE, ROOT
from sims.ledger import PromiseBrokenError

GENERATION = 1
CHUNKS_MAX = 8
"""Room for four times what there is: nothing has to be evicted."""
LEASE_S, MOVE_DEADLINE_S, LEAVE_S = 12.0, 20.0, 2.0
"""Just long enough that a Take's answer, a silent target and a move have deadlines at different times, in this order."""
LONGEST_S = 4 * MOVE_DEADLINE_S
"""By then all has ended: two moves, one after the other, and what their ends and coordinators wait longer."""
CLIENT = 1


# --- what can happen to an end --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heard:
    """A message came from another instance."""

    sender: InstanceId
    message: Message


@dataclass(frozen=True, slots=True)
class MoveAsked:
    """A user wants this move, and asks here."""

    plan: PlanRequest


@dataclass(frozen=True, slots=True)
class PeerLost:
    """Membership has found out that an instance is dead."""

    instance: InstanceId


@dataclass(frozen=True, slots=True)
class TimePassed:
    """So much later nothing else has happened here."""

    seconds: float


@dataclass(frozen=True, slots=True)
class TimeOver:
    """What was to wait so long waits no longer, though for others no time has passed: from now on it is as early as before.

    That the clock doesn't stay ahead makes ends that have nothing left to wait for alike again.
    """

    seconds: float


Happening = Heard | MoveAsked | PeerLost | TimePassed | TimeOver | CancelRequested | StoreRequested | ShardsSealed | FetchEnded


# --- the end itself -------------------------------------------------------------------------------------------------------


class Lives(Membership):
    """What a machine asks membership, answered from what it was told."""

    def __init__(self, me: MemberRecord, others: Sequence[MemberRecord]) -> None:
        self._records = {record.instance: record for record in (me, *others)}
        self._name = me.instance

    @property
    def me(self) -> MemberRecord:
        """As membership's."""
        return self._records[self._name]

    def record_of(self, instance: InstanceId) -> MemberRecord | None:
        """As membership's."""
        return self._records.get(instance)

    def lost(self, instance: InstanceId) -> None:
        """An instance is dead."""
        self._records[instance] = replace(self._records[instance], state=MemberState.DEAD)


class Tickets(Random):
    """All tickets are alike: that a lane wants the right one is shown elsewhere. It has no state that would tell ends apart."""

    def randbytes(self, n: int) -> bytes:
        """As a generator's."""
        return bytes(n)


def record_of(name: InstanceId) -> MemberRecord:
    """What all know of an instance."""
    return MemberRecord(
        instance=name,
        generation=GENERATION,
        incarnation=0,
        state=MemberState.ALIVE,
        ws=Address("virtual", 1),
        http="",
        transfer=None,
        handoff=HandoffAddress("virtual", name),
        zone="",
        namespaces=(NAMESPACE,),
        locations=(LocationStatus(Location.LOCAL_CPU, 0, 0, CHUNKS_MAX * PAGE_NBYTES),),
    )


def config_of(name: InstanceId) -> MachineConfig:
    """Its fixed facts."""
    known = record_of(name)
    return MachineConfig(
        instance=name,
        generation=GENERATION,
        cluster="simulated",
        ws=known.ws,
        http=known.http,
        transfer=known.transfer,
        handoff=known.handoff,
        zone=known.zone,
        chunk_size=NAMESPACE.chunk_size,
        cpu_limit_nbytes=CHUNKS_MAX * PAGE_NBYTES,
        descriptor_limit=CHUNKS_MAX,
        move_deadline_s=MOVE_DEADLINE_S,
        lease_s=LEASE_S,
        leave_s=LEAVE_S,
        peer_fetch=False,
        wall_offset_s=0.0,
    )


def chunks_of(tokens: TokenBytes) -> list[Chunk]:
    """A prompt of full chunks, cut."""
    chunks, parent, step = [], ROOT, NAMESPACE.chunk_size * TOKEN_NBYTES
    for begin in range(0, len(tokens), step):
        part = tokens[begin : begin + step]
        nbytes = (NAMESPACE.shard_nbytes(token_count(part)),)
        chunks.append(Chunk(chunk_key(parent, part), parent, namespace_digest(NAMESPACE), begin // TOKEN_NBYTES, part, nbytes))
        parent = chunks[-1].key
    return chunks


class End(Machine):
    """One boot of one instance. Its links are numbered as the instances are."""

    def __init__(self, name: InstanceId, names: Sequence[InstanceId], held: Sequence[Chunk]) -> None:
        config = self.config = config_of(name)
        self.now = 0.0
        outbox = self._outbox = Outbox(name)
        outbox.links = {other: link for link, other in enumerate(names) if other != name}
        self._holdings = Holdings(config, outbox)
        self._history = History()
        self._lives = self._membership = Lives(record_of(name), [record_of(other) for other in names if other != name])
        parts = (config, self._holdings, self._membership, self._history, outbox)
        self._sources = SourceMoves(*parts, Tickets())
        self._targets = TargetMoves(*parts, self._sources.keep)
        self._coordinator = Coordinator(config, self._membership, self._history, outbox, Tickets(), self._targets)
        self._serving = Serving(config, self._holdings, outbox, self._sources.keep)
        self._serving.attach(EngineAttached(0, CLIENT, NAMESPACE, worker=0))
        outbox.take_effects()
        book = self._holdings.books[Location.LOCAL_CPU]
        for chunk in reversed(held):
            book.enter(chunk, None, self.now)

    # --- what happens -----------------------------------------------------------------------------------------------------

    def happen(self, happening: Happening) -> list[Effect]:
        """One thing happens; what follows is checked for contradictions."""
        match happening:
            case Heard():
                self._receive_from(happening.sender, happening.message, self.now)
            case MoveAsked():
                self._coordinator.plan(happening.plan, None, self.now)
            case PeerLost():
                self._lives.lost(happening.instance)
                del self._outbox.links[happening.instance]
                self._follow(Lost(happening.instance), self.now)
            case TimePassed():
                self.now += happening.seconds
                if self.now > LONGEST_S:
                    raise PromiseBrokenError(f"M6: {self.config.instance} has something to do after {LONGEST_S:g} s")
                self._wake(self.now)
            case TimeOver():
                self._wake(self.now + happening.seconds)
            case _:
                self._dispatch(happening, self.now)
        while self._outbox.to_self:
            self._receive_from(self.config.instance, self._outbox.to_self.popleft(), self.now)
        self._holdings.check_invariants()
        self._sources.check_invariants()
        self._targets.check_invariants()
        self._serving.check_invariants()
        return self._outbox.take_effects()

    def _wake(self, now: float) -> None:
        self._sources.wake(now)
        self._targets.wake(now)
        self._coordinator.wake(now)
        self._serving.wake(now)

    # --- what can be asked ------------------------------------------------------------------------------------------------

    def due_s(self) -> float:
        """In how many seconds something is due here; inf for never."""
        parts = (self._sources, self._targets, self._coordinator, self._serving)
        return min(part.wakeup_at() for part in parts) - self.now

    def left_over(self) -> str | None:
        """What is still going on, or held back, when nothing can happen any more; None when nothing is, as it must be."""
        unended = [record.event_id for record in self.events() if not record.state.is_final]
        if unended:
            return f"M6: {self.config.instance} never hears of the end of {', '.join(unended)}"
        for book in self._holdings.books.values():
            held_back = [each for each in book if each.slot is not None or each.is_leased(self.now)]
            if held_back or book.promised:
                return f"P6: {self.config.instance} holds back {held_back} {book.promised} after the end of all moves"
            count = len(book)
            if not self._holdings.make_room(book, book.limit, now=self.now) or len(book):
                return f"S5: {self.config.instance} can't evict its {count} chunks after the end of all moves"
        return None


# --- keeping and comparing ------------------------------------------------------------------------------------------------


def _inventory(generation: int, entries: EntrySet) -> InventoryLog:
    log = InventoryLog(generation)
    log.entries = entries
    return log


_REDUCED: dict[type, Callable[[Any], tuple[Callable[..., object], tuple[object, ...]]]] = {
    MachineConfig: lambda each: (config_of, (each.instance,)),
    Namespace: lambda _: (_namespace, ()),
    InventoryLog: lambda each: (_inventory, (each.generation, each.entries)),
    Tickets: lambda _: (Tickets, ()),
}
"""Fixed facts aren't kept, and of an inventory not the changes that led there, as nobody follows them."""


def _namespace() -> Namespace:
    return NAMESPACE


def kept(end: End) -> bytes:
    """An end as it is now, to be brought back by `brought_back`."""
    buffer = BytesIO()
    pickler = pickle.Pickler(buffer, protocol=5)
    pickler.dispatch_table = _REDUCED
    pickler.dump(end)
    return buffer.getvalue()


def brought_back(kept_end: bytes) -> End:
    """An end as it was."""
    end: End = pickle.loads(kept_end)  # noqa: S301 - our own bytes, from this very process
    return end


_FIXED = (MachineConfig, Random, InventoryLog, TcpRate)
"""What never changes here, follows from something else, or decides nothing."""


def digest(end: End) -> bytes:
    """Equal for ends that behave alike: all that they consist of, but for what is fixed or follows from the rest."""
    return blake2b(repr(_plain(end, set())).encode(), digest_size=16).digest()


def _plain(value: object, seen: set[type]) -> object:
    match value:
        case None | bool() | int() | float() | bytes() | str():
            return value
        case Chunk():
            return value.key
        case Namespace():
            return value.model
        case tuple() | list() | deque():
            return [_plain(each, seen) for each in value]
        case Enum():
            return value.name
        case Residencies():
            slots = [_plain(each, seen) for each in value]
            return slots, _plain(value.promised, seen)
        case dict():
            return sorted((repr(_plain(key, seen)), _plain(each, seen)) for key, each in value.items())
        case _ if isinstance(value, _FIXED) or callable(value):
            return None
    if is_dataclass(value):
        return type(value).__name__, [_plain(getattr(value, field.name), seen) for field in fields(value)]
    if type(value) in seen:  # a part, of which an end has one, met on another way
        return None
    seen.add(type(value))
    return type(value).__name__, [(name, _plain(each, seen)) for name, each in sorted(vars(value).items())]
