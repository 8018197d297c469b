"""One node's mind: what happened goes in, what to do comes out. No I/O, no clock, no randomness of its own.

It only joins the parts and routes: membership decides who is there, `moves` what becomes of moves, `serving` what engines get,
`commands` what users order of one instance, `gossip` what the others learn, `holdings` what is held.

The shell owns clock, sockets and memory (`net/driver`); the simulator is another shell (`sims`).
"""

from dataclasses import replace
from math import inf
from random import Random
from typing import assert_never

from p2pkv.core import messages
from p2pkv.core.commands import Commands
from p2pkv.core.config import MachineConfig
from p2pkv.core.directory import Held, PromptFingerprints
from p2pkv.core.effects import Effect, Stop
from p2pkv.core.events import (
    CancelRequested,
    ChunksDamaged,
    ChunksFound,
    ClearRequested,
    DialFailed,
    EngineAttached,
    EngineClearRequested,
    EngineLost,
    Event,
    EventAsked,
    FetchEnded,
    LeaveRequested,
    LinkLost,
    LinkOpened,
    LookupRequested,
    MessageReceived,
    MoveRequested,
    PinRequested,
    ReadEnded,
    RetrieveRequested,
    RouteRefused,
    ShardsSealed,
    SiblingsFound,
    StoreRequested,
)
from p2pkv.core.gossip import Gossip
from p2pkv.core.history import History
from p2pkv.core.holdings import Holdings
from p2pkv.core.ids import EventId, InstanceId, LinkId, WallTime
from p2pkv.core.keys import Identity, TokenBytes
from p2pkv.core.membership import Membership
from p2pkv.core.messages import Message
from p2pkv.core.moves.coordinator import Coordinator
from p2pkv.core.moves.source import SourceMoves
from p2pkv.core.moves.source_move import LaneGrant
from p2pkv.core.moves.target import TargetMoves
from p2pkv.core.outbox import Outbox
from p2pkv.core.peer_fetch import PeerFetches
from p2pkv.core.peers import Joined, Lost
from p2pkv.core.prompt import prompt_of
from p2pkv.core.records import EventRecord, MemberRecord
from p2pkv.core.rows import InventoryEntry
from p2pkv.core.serving import Serving
from p2pkv.errors import ErrorCode, Failure

STALL_S = 0.1
"""A wake-up that comes later than this was held up by this node itself: an engine's copies, a garbage collection, a stop."""
LEAVE_MARGIN = 0.5
"""Of `leave_s` for open hand-overs; the rest is for saying goodbye and for the shell to end."""


class Machine:
    """All of a node's decisions."""

    def __init__(self, config: MachineConfig, rng: Random, now: float) -> None:
        self.config = config
        self._outbox = Outbox(config.instance)
        self._holdings = Holdings(config, self._outbox)
        self._history = History()
        self._membership = Membership(config, self._outbox, rng, now)
        parts = (config, self._holdings, self._membership, self._history, self._outbox)
        self._sources = SourceMoves(*parts, rng)
        self._targets = TargetMoves(*parts, self._sources.keep)
        self._coordinator = Coordinator(config, self._membership, self._history, self._outbox, rng, self._targets)
        self._serving = Serving(config, self._holdings, self._outbox, self._sources.keep)
        self._gossip = Gossip(self._holdings, self._membership, self._outbox, config.views_nbytes, now)
        self._peer_fetches = PeerFetches(
            config,
            self._serving,
            self._membership,
            self._gossip,
            self._coordinator,
            self._history,
            self._targets.tcp_rate,
            self._outbox,
        )
        self._commands = Commands(self._holdings, self._membership, self._outbox, rng)
        self._started_at = self._settled_at = now
        self._leave_by = inf
        self._members_due_at: float | None = None
        self.is_leaving = False
        self._gossip.describe()

    # --- the contract -----------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """One thing happened."""
        self._notice_stall(now)
        if not self._is_report(event):
            self._members_due_at = None
        self._dispatch(event, now)
        return self._settle(now)

    def _is_report(self, event: Event) -> bool:
        """A member's Status or Ping: they put membership's deadlines off, if anything, and are most of what comes in."""
        if not isinstance(event, MessageReceived) or not isinstance(event.message, messages.Status | messages.Ping):
            return False
        return self._membership.instance_of(event.link) is not None

    def wakeup_at(self) -> float:
        """When `wake` may have something to do; inf when never. A deadline that was put off since may still be told."""
        if self._members_due_at is None:
            self._members_due_at = self._membership.wakeup_at()
        return min(
            self._leave_by,
            self._gossip.wakeup_at(),
            self._commands.wakeup_at(),
            self._members_due_at,
            self._sources.wakeup_at(),
            self._targets.wakeup_at(),
            self._coordinator.wakeup_at(),
            self._serving.wakeup_at(),
            self._history.forgets_at(),
        )

    def wake(self, now: float) -> list[Effect]:
        """Do what is due."""
        self._notice_stall(now)
        self._members_due_at = None
        self._membership.wake(now)
        self._sources.wake(now)
        self._targets.wake(now)
        self._coordinator.wake(now)
        self._serving.wake(now)
        self._history.forget_old(now)
        self._gossip.wake(now)
        self._commands.wake(now)
        return self._settle(now)

    def _notice_stall(self, now: float) -> None:
        """Something has been due for long, and nothing was done meanwhile: this node itself stood still."""
        if now - self._settled_at > STALL_S:
            lag_s = now - max(self._settled_at, self.wakeup_at())
            if lag_s > STALL_S:
                self._membership.stalled(lag_s)

    def check_invariants(self) -> None:
        """Assert what must hold between any two events: for simulator, tests and fixtures."""
        self._holdings.check_invariants()
        self._sources.check_invariants()
        self._targets.check_invariants()
        self._serving.check_invariants()
        self._peer_fetches.check_invariants()
        assert not self._outbox.to_self

    def check_at_rest(self, now: float) -> None:
        """Assert what must hold when no move is open and no engine is at work: nothing is leased, promised, or on its way."""
        self._peer_fetches.check_at_rest()
        for book in self._holdings.books.values():
            assert not book.promised
            for residency in book:
                assert residency.slot is None, f"{residency} isn't at rest"
                assert not residency.is_leased(now), f"{residency} isn't at rest"

    # --- questions --------------------------------------------------------------------------------------------------------

    def lookup(self, tokens: TokenBytes, model: str | None, identity: Identity) -> tuple[Held, ...]:
        """Each position's longest prefix of a prompt, as the view of the cluster has it.

        Args:
            tokens: Prompt token ids, little-endian int32.
            model: Only caches of this model; None for any.
            identity: What the request adds to the namespace.

        Returns:
            By instance and location; positions that hold nothing are left out.
        """
        alive = [record for record in self._membership.records() if record.state.is_living]
        namespaces = dict.fromkeys(each for record in alive for each in record.namespaces if model in (None, each.model))
        prompts = [PromptFingerprints(prompt_of(each, identity, tokens)) for each in namespaces]
        return self._gossip.longest_prefixes(prompts, [record.instance for record in alive])

    def is_view_complete(self) -> bool:
        """Whether all that living members hold is in view here: whom a `lookup` doesn't name then, holds nothing."""
        return self._gossip.is_complete([record.instance for record in self._membership.records() if record.state.is_living])

    def members(self) -> tuple[MemberRecord, ...]:
        """All members, oneself included, by name; one's own locations as they are at this moment."""
        locations = self._holdings.statuses()
        records = self._membership.records()
        return tuple(replace(each, locations=locations) if each is self._membership.me else each for each in records)

    def unreachable(self, instance: InstanceId) -> Failure | None:
        """Why nothing can be asked of an instance; None when it is alive, as far as is known here."""
        return self._membership.unreachable(instance)

    def met_at(self, instance: InstanceId) -> tuple[WallTime, WallTime] | None:
        """When an instance joined, and when it was last heard, as far as is known here; for oneself, start and last event."""
        is_me = instance == self.config.instance
        met = (self._started_at, self._settled_at) if is_me else self._membership.met_at(instance)
        return None if met is None else (met[0] + self.config.wall_offset_s, met[1] + self.config.wall_offset_s)

    def inventory_of(self, instance: InstanceId) -> tuple[InventoryEntry, ...]:
        """What an instance holds, as far as is known here, in order of fingerprints; empty for one that isn't known."""
        return tuple(sorted(self._gossip.entries_of(instance), key=lambda each: (each.fingerprint, each.location)))

    def event(self, event_id: EventId) -> EventRecord | None:
        """An event as it is known here, without asking anyone."""
        return self._history.get(event_id)

    def events(self) -> tuple[EventRecord, ...]:
        """All events known here, newest first."""
        return self._history.newest_first()

    def lane_grant(self, event_id: EventId) -> LaneGrant | None:
        """What a lane may be given for a move from here; None when there is no such move."""
        return self._sources.lane_grant(event_id)

    # --- events -----------------------------------------------------------------------------------------------------------

    def _dispatch(self, event: Event, now: float) -> None:
        match event:
            case SiblingsFound():
                self._membership.found(event.addresses, now)
            case LinkOpened():
                self._membership.link_opened(event.link, event.dialed, now)
            case DialFailed():
                self._membership.dial_failed(event.address, now)
            case LinkLost():
                self._membership.link_lost(event.link, now)
            case MessageReceived():
                self._receive(event.link, event.message, now)
            case MoveRequested():
                self._request_move(event, now)
            case EventAsked():
                self._coordinator.ask(event, now)
            case CancelRequested():
                self._coordinator.cancel(event, now)
            case ClearRequested():
                self._commands.clear(event, now)
            case PinRequested():
                self._commands.pin(event, now)
            case LeaveRequested():
                self._leave(now)
            case EngineAttached():
                self._serving.attach(event)
            case LookupRequested():
                self._peer_fetches.look_up(event, now)
            case StoreRequested():
                self._serving.store(event, now)
            case ShardsSealed():
                self._serving.sealed(event, now)
            case RetrieveRequested():
                self._serving.retrieve(event, now)
            case EngineClearRequested():
                self._serving.clear(event, now)
            case ReadEnded():
                self._serving.read_ended(event)
            case EngineLost():
                self._serving.engine_lost(event)
            case FetchEnded():
                self._targets.fetch_ended(event, now)
            case RouteRefused():
                self._targets.route_refused(event, now)
            case ChunksFound() | ChunksDamaged():
                self._holdings.follow_store(event, now)
            case _:
                assert_never(event)

    def _request_move(self, event: MoveRequested, now: float) -> None:
        if self.is_leaving:
            detail = f"Instance {self.config.instance!r} is leaving the cluster; ask another node."
            self._outbox.refuse(event.request, ErrorCode.LEAVING, detail)
        else:
            self._coordinator.move(event, now)

    def _leave(self, now: float) -> None:
        if not self.is_leaving:
            self.is_leaving = True
            self._leave_by = now + self.config.leave_s * LEAVE_MARGIN
            self._peer_fetches.is_leaving = True
            self._sources.leave(now)
            self._targets.leave(now)

    # --- messages ---------------------------------------------------------------------------------------------------------

    def _receive(self, link: LinkId, message: Message, now: float) -> None:
        if not self._membership.heard(link, now):
            return
        match message:
            case messages.Hello():
                self._membership.hello(link, message, now)
            case messages.Goodbye():
                self._membership.goodbye(link, message.failure, now)
            case messages.Ping():
                self._membership.ping(link, message)
            case _:
                sender = self._membership.instance_of(link)
                if sender is None:
                    detail = f"{type(message).__name__} came before Hello."
                    self._membership.refuse(link, ErrorCode.PROTOCOL_ERROR, detail, now)
                else:
                    self._receive_from(sender, message, now)

    def _receive_from(self, sender: InstanceId, message: Message, now: float) -> None:
        """A message from a member, or from oneself."""
        match message:
            case (
                messages.Pong() | messages.ProbeRequest() | messages.ProbeAnswer() | messages.Rumours() | messages.MemberTable()
            ):
                self._membership.receive(sender, message, now)
            case messages.Leaving():
                self._membership.leaving(sender, message, now)
            case messages.Status():
                self._membership.status(sender, message)
                self._gossip.status(sender, message, now)
            case (
                messages.InventoryRequest()
                | messages.InventoryDelta()
                | messages.InventoryDigest()
                | messages.RangeRequest()
                | messages.InventoryPage()
            ):
                self._gossip.receive(sender, message, now)
            case messages.ClearRequest() | messages.PinRequest():
                self._commands.carry_out(message, sender, now)
            case messages.CommandAnswer():
                self._commands.answered(message, sender)
            case messages.PlanRequest():
                self._sources.plan(message, sender, now)
            case messages.ManifestRequest():
                self._sources.page(message, sender)
            case messages.FetchReport():
                self._sources.report(message, sender, now)
            case messages.TakeAnswer():
                self._sources.taken(message, sender, now)
            case messages.CancelRequest():
                record = self._sources.cancel(message.event_id, now)
                self._outbox.send(sender, messages.EventReport(event_id=message.event_id, event=record))
            case messages.Offer():
                self._targets.offer(message, sender, now)
            case messages.ManifestPage():
                self._targets.page(message, sender, now)
            case messages.Take():
                self._targets.take(message, sender, now)
            case messages.PlanAnswer():
                self._coordinator.planned(message, sender, now)
            case messages.EventRequest():
                record = self._history.get(message.event_id)
                self._outbox.send(sender, messages.EventReport(event_id=message.event_id, event=record))
            case messages.EventReport():
                self._coordinator.reported(message, sender, now)
                self._targets.closed(message.event, message.event_id, sender, now)
            case messages.Hello() | messages.Goodbye() | messages.Ping():
                raise AssertionError("handled before the sender is looked up")
            case _:
                assert_never(message)

    # --- after each event -------------------------------------------------------------------------------------------------

    def _settle(self, now: float) -> list[Effect]:
        """Follow up on what the event led to, until nothing is left to follow."""
        while self._outbox.to_self or self._membership.news:
            if self._membership.news:
                self._follow(self._membership.news.popleft(), now)
            else:
                self._receive_from(self.config.instance, self._outbox.to_self.popleft(), now)
        self._peer_fetches.follow(now)
        self._gossip.follow(now)
        if self._leave_by < inf and (now >= self._leave_by or not self._sources.has_open):
            self._stop(now)
        self._settled_at = now
        return self._outbox.take_effects()

    def _follow(self, news: Joined | Lost, now: float) -> None:
        match news:
            case Joined():
                self._gossip.joined(news.instance, now)
            case Lost():
                self._sources.target_lost(news.instance, now)
                self._targets.source_lost(news.instance, now)
            case _:
                assert_never(news)

    def _stop(self, now: float) -> None:
        """What could be finished is: say goodbye."""
        self._leave_by = inf
        self._sources.give_up(now)
        self._coordinator.leave()
        self._membership.leave()
        self._outbox.add(Stop(None))
