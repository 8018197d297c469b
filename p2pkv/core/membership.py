"""Who is in the cluster: links, handshakes and names, over a full mesh of persistent links.

    Every link begins with a `Hello` from both ends. Only an instance that has said Hello itself is a member; those that others
    tell of are only addresses to dial.
    A living member without a link is redialed by both ends. Whether a member lives, `liveness` finds out; one that has died is
    dialed on, seldom, and shown for a while: a Hello brings it back.
    A newer generation replaces an older one at once. A name whose holder still answers is refused to a newcomer (`names`).
    Two links to one instance (both ends dialed): the one that the lower name dialed stays; both ends decide alike.

Everything else asks `record_of`, `linked`, `records`, and reads `news`.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import replace
from math import inf
from random import Random

from p2pkv.core.config import MachineConfig
from p2pkv.core.dials import Dials
from p2pkv.core.effects import CloseLink, MemberChanged, Stop
from p2pkv.core.ids import Address, Generation, InstanceId, LinkId
from p2pkv.core.keys import Namespace
from p2pkv.core.liveness import Liveness
from p2pkv.core.messages import (
    MEMBERS_MAX,
    PROTOCOL_VERSION,
    Goodbye,
    Hello,
    Leaving,
    LivenessMessage,
    Ping,
    Pong,
    Status,
)
from p2pkv.core.names import Names, why_refused
from p2pkv.core.outbox import Outbox
from p2pkv.core.peers import Joined, Link, Lost, Member
from p2pkv.core.records import LocationStatus, MemberRecord, MemberState
from p2pkv.core.roster import LIVING, Roster
from p2pkv.errors import ErrorCode, Failure

HANDSHAKE_S = 2.0
"""From a link's opening to its Hello; a loopback round trip takes 1 ms, a stall of a busy Python process 0.5 s."""
JOINING_S = 10.0
"""A node obeys `instance_id_in_use` in its first seconds only: later, a confused peer can't stop it."""
GENERATIONS_MAX = 365 * 24 * 3600 * 1000
"""A generation that is further ahead of one's own clock than a year of milliseconds comes from a clock gone wrong, and would
keep its name from all later boots (Cassandra: MAX_GENERATION_DIFFERENCE)."""


class Membership:
    """This instance, its links, and the members it knows."""

    def __init__(self, config: MachineConfig, outbox: Outbox, rng: Random, now: float) -> None:
        self.news: deque[Joined | Lost] = deque()
        self._cluster = config.cluster
        self._wall_offset_s = config.wall_offset_s
        self._outbox = outbox
        self._dials = Dials(outbox, rng, config.ws)
        self._roster = Roster(config)
        self._links = self._roster.links
        self._members = self._roster.members
        self._names = Names(self._roster, outbox)
        self._liveness = Liveness(self._roster, self._dials, outbox, rng, config.timers_of, self._end, now)
        self._started_at = now

    # --- questions --------------------------------------------------------------------------------------------------------

    @property
    def me(self) -> MemberRecord:
        """One's own record."""
        return self._roster.me

    def record_of(self, instance: InstanceId) -> MemberRecord | None:
        """What is known of an instance, oneself included."""
        if instance == self.me.instance:
            return self.me
        member = self._members.get(instance)
        return None if member is None else member.record

    def unreachable(self, instance: InstanceId) -> Failure | None:
        """Why nothing can be asked of an instance; None when it lives, as far as is known."""
        record = self.record_of(instance)
        if record is None:
            detail = f"No instance {instance!r} is known in this cluster. `p2pkv members` lists those that are."
            return Failure(ErrorCode.UNKNOWN_INSTANCE, detail)
        if not record.state.is_living:
            detail = f"Instance {instance!r} is {record.state.value}. Start it again, or name another."
            return Failure(ErrorCode.INSTANCE_UNREACHABLE, detail)
        return None

    def records(self) -> tuple[MemberRecord, ...]:
        """All members, oneself included, by name."""
        records = [self.me, *(member.record for member in self._members.values())]
        return tuple(sorted(records, key=lambda record: record.instance))

    def met_at(self, instance: InstanceId) -> tuple[float, float] | None:
        """When a member joined, and when it was last heard; None for oneself, and for one that isn't known."""
        member = self._members.get(instance)
        if member is None:
            return None
        return member.joined_at, self._roster.heard_at(member)

    def instance_of(self, link: LinkId) -> InstanceId | None:
        """Who is at the other end of a link; None before its Hello."""
        known = self._links.get(link)
        return None if known is None else known.instance

    def linked(self) -> list[InstanceId]:
        """Instances that a message can be sent to now."""
        return list(self._outbox.links)

    # --- oneself ----------------------------------------------------------------------------------------------------------

    def describe(self, namespaces: tuple[Namespace, ...], locations: tuple[LocationStatus, ...]) -> None:
        """Say what this instance serves and holds; a change is a new incarnation of its record."""
        if (namespaces, locations) != (self.me.namespaces, self.me.locations):
            incarnation = self.me.incarnation + 1
            self._roster.me = replace(self.me, incarnation=incarnation, namespaces=namespaces, locations=locations)

    def leave(self) -> None:
        """Tell everyone that this instance leaves, and close all links."""
        self._roster.me = replace(self.me, state=MemberState.LEFT)
        for instance in self.linked():
            self._outbox.send(instance, Leaving(generation=self.me.generation))
        for link in self._links:
            self._outbox.add(CloseLink(link=link, reason="this node leaves"))

    # --- links ------------------------------------------------------------------------------------------------------------

    def found(self, addresses: Collection[Address], now: float) -> None:
        """All addresses to join through, from the configuration and from this host, as of now."""
        self._dials.contacts_are(addresses, now)

    def link_opened(self, link: LinkId, dialed: Address | None, now: float) -> None:
        """A websocket is open: introduce oneself."""
        self._links[link] = Link(link=link, dialed=dialed, opened_at=now, heard_at=now)
        known = tuple(member.record for member in self._roster.living())
        hello = Hello(versions=(PROTOCOL_VERSION,), cluster=self._cluster, me=self.me, members=known[:MEMBERS_MAX])
        self._outbox.send_on(link, hello)

    def dial_failed(self, address: Address, now: float) -> None:
        """Nobody answered at `address`."""
        self._dials.failed(address, now)
        self._liveness.dial_failed(address, now)

    def link_lost(self, link: LinkId, now: float) -> None:
        """A link is gone. Its member, if it has no other, is redialed: at once, unless the link was refused as it opened."""
        lost = self._links.pop(link, None)
        if lost is None:
            return
        self._unlink(lost, now)
        if lost.dialed is not None and now - lost.opened_at < HANDSHAKE_S:
            self._dials.failed(lost.dialed, now)
        elif lost.dialed is not None:
            self._dials.closed(lost.dialed, now)

    def _unlink(self, lost: Link, now: float) -> None:
        member = self._members.get(lost.instance) if lost.instance is not None else None
        if lost.instance is None or member is None or member.link != lost.link:
            return
        member.link = None
        del self._outbox.links[lost.instance]
        if member.record.state.is_living:
            member.lost_at = now
            member.failed_dials = 0
            self._dials.add(member.record.ws, is_contact=False, now=now)
            self._dials.reached(member.record.ws, lost.instance)
            self._liveness.lost(member, now)
        self._give_name(lost.instance, now)

    def stalled(self, lag_s: float) -> None:
        """This node itself was late by `lag_s`: nobody else's silence is held against them for that time."""
        for link in self._links.values():
            link.opened_at += lag_s
            link.heard_at += lag_s
            link.challenged_until += lag_s
        self._liveness.stalled(lag_s)

    def heard(self, link: LinkId, now: float) -> bool:
        """Something came in on a link; False when that link is forgotten already, or who is behind it waits for its name."""
        known = self._links.get(link)
        if known is not None:
            known.heard_at = now
        return known is not None and known.challenge is None

    def refuse(self, link: LinkId, code: ErrorCode, detail: str, now: float) -> None:
        """Say why, and close the link: who is behind it is of no use to us, or broke the protocol."""
        self._outbox.send_on(link, Goodbye(failure=Failure(code, detail)))
        self._drop(link, detail, now)

    def _drop(self, link: LinkId, reason: str, now: float) -> None:
        """Close a link and forget it at once; its `LinkLost` is no news any more."""
        self._outbox.add(CloseLink(link=link, reason=reason))
        dropped = self._links.pop(link)
        self._unlink(dropped, now)
        if dropped.dialed is not None:
            self._dials.failed(dropped.dialed, now)

    # --- messages ---------------------------------------------------------------------------------------------------------

    def hello(self, link: LinkId, hello: Hello, now: float) -> None:
        """The other end introduces itself."""
        peer = self._links[link]
        if peer.instance is not None:
            self.refuse(link, ErrorCode.PROTOCOL_ERROR, "A second Hello on one link.", now)
        elif PROTOCOL_VERSION not in hello.versions:
            detail = f"You speak protocol versions {hello.versions}, {self.me.instance!r} speaks {PROTOCOL_VERSION}."
            self.refuse(link, ErrorCode.PROTOCOL_ERROR, detail, now)
        elif hello.cluster != self._cluster:
            detail = f"You belong to cluster {hello.cluster!r}, {self.me.instance!r} to {self._cluster!r}."
            self.refuse(link, ErrorCode.PROTOCOL_ERROR, detail, now)
        elif hello.me.state is not MemberState.ALIVE:
            self.refuse(link, ErrorCode.LEAVING, f"Instance {hello.me.instance!r} has left.", now)
        elif hello.me.generation > self._latest_generation(now):
            self.refuse(link, ErrorCode.PROTOCOL_ERROR, f"Your clock is a year ahead of {self.me.instance!r}'s.", now)
        elif hello.me.instance == self.me.instance:
            self._met_own_name(peer, hello, now)
        elif len(self._members) >= MEMBERS_MAX and hello.me.instance not in self._members:
            self.refuse(link, ErrorCode.PROTOCOL_ERROR, f"This cluster has {MEMBERS_MAX} members already.", now)
        else:
            self._met(peer, hello, now)

    def _latest_generation(self, now: float) -> Generation:
        """The latest that a boot may have now, if this node's clock is right."""
        return max(self.me.generation, int(1000 * (now + self._wall_offset_s))) + GENERATIONS_MAX

    def _met_own_name(self, peer: Link, hello: Hello, now: float) -> None:
        if hello.me.generation == self.me.generation:
            if peer.dialed is not None:
                self._dials.is_own(peer.dialed)
            self._drop(peer.link, "it is this node itself", now)
        elif hello.me.generation > self.me.generation:
            self._refuse_name(peer.link, hello, now)

    def _refuse_name(self, link: LinkId, hello: Hello, now: float) -> None:
        member = self._members.get(hello.me.instance)
        detail = why_refused(hello.me.instance, self._cluster, None if member is None else member.record)
        self.refuse(link, ErrorCode.INSTANCE_ID_IN_USE, detail, now)

    def _met(self, peer: Link, hello: Hello, now: float) -> None:
        member = self._members.get(hello.me.instance)
        if member is not None and hello.me.generation < member.record.generation:
            self._refuse_name(peer.link, hello, now)
        elif member is not None and hello.me.generation > member.record.generation and member.link is not None:
            self._names.challenge(peer, hello, member.link, now)
        else:
            self._accept(peer, hello, now)

    def _accept(self, peer: Link, hello: Hello, now: float) -> None:
        record = replace(hello.me, state=MemberState.ALIVE)
        known = self._members.get(record.instance)
        if known is not None and known.record.generation != record.generation:
            known.record = replace(known.record, state=MemberState.DEAD)  # that boot is over: nobody is to look for it
            self._lose(known, now)
            known = None
        was = None if known is None else known.record.state
        if known is not None and known.link is not None and not self._supersedes(peer, self._links[known.link]):
            self._reached(peer, record)
            self._drop(peer.link, "another link to the same instance serves", now)
            return
        is_news = was is None or not was.is_living
        old_link = None if known is None else known.link
        peer.instance = record.instance
        member = self._members[record.instance] = Member(
            record=record,
            link=peer.link,
            incarnation=record.incarnation if known is None else max(record.incarnation, known.incarnation),
            joined_at=now if is_news or known is None else known.joined_at,
        )
        self._outbox.links[record.instance] = peer.link
        self._reached(peer, record)
        if old_link is not None:
            self._drop(old_link, "another link to the same instance serves", now)
            self._names.holder_relinked(record.instance, peer.link, now)
        for other in hello.members:
            self._learn(other, now)
        self.news.append(Joined(record.instance))
        if was is not MemberState.ALIVE:
            self._outbox.add(MemberChanged(record))
        self._liveness.met(member, was=was)

    def _reached(self, peer: Link, record: MemberRecord) -> None:
        for address in (peer.dialed, record.ws):
            if address is not None:
                self._dials.reached(address, record.instance)

    def _supersedes(self, new: Link, old: Link) -> bool:
        """Of two links to one instance: whether the new one stays. The lower name's does; of one dialer's, the later.

        Nobody dials whom they have a link to: a link that comes long after the old one means that the old one is lost at the
        other end, though nobody could tell us.
        """
        lower_is_me = new.instance is None and self.me.instance < (old.instance or "")
        dialed_by_lower = (new.dialed is not None) == lower_is_me
        is_long_after = new.opened_at - old.opened_at > HANDSHAKE_S
        return is_long_after or dialed_by_lower or (new.dialed is None) == (old.dialed is None)

    def _learn(self, record: MemberRecord, now: float) -> None:
        """A Hello tells of a member: an address to dial, no more."""
        known = self._members.get(record.instance)
        if record.instance != self.me.instance and (known is None or record.generation > known.record.generation):
            self._dials.add(record.ws, is_contact=False, now=now)

    def status(self, instance: InstanceId, status: Status) -> None:
        """A member describes itself anew."""
        member = self._members[instance]
        known, told = member.record, status.me
        if (told.instance, told.generation) == (known.instance, known.generation) and told.incarnation > known.incarnation:
            member.record = replace(told, state=known.state)
            if told.incarnation > member.incarnation:
                self._liveness.vouched(member, told.incarnation)

    def leaving(self, instance: InstanceId, message: Leaving, now: float) -> None:
        """A member says that it leaves."""
        member = self._members[instance]
        if message.generation == member.record.generation:
            self._end(member, MemberState.LEFT, now)
            self._liveness.left(member)

    def receive(self, instance: InstanceId, message: LivenessMessage, now: float) -> None:
        """A member says something about who lives."""
        if isinstance(message, Pong) and (refused := self._names.answered(instance, message.nonce)) is not None:
            newcomer, hello = refused
            self._refuse_name(newcomer.link, hello, now)
        else:
            self._liveness.receive(instance, message, now)

    def goodbye(self, link: LinkId, failure: Failure, now: float) -> None:
        """The other end refuses us. In our first seconds a name in use is a reason to stop."""
        if failure.code is ErrorCode.INSTANCE_ID_IN_USE and now - self._started_at < JOINING_S:
            self._outbox.add(Stop(failure))
        self._drop(link, f"the peer refused: {failure.detail}", now)

    def ping(self, link: LinkId, message: Ping) -> None:
        """Answer it."""
        self._outbox.send_on(link, Pong(nonce=message.nonce))

    # --- time -------------------------------------------------------------------------------------------------------------

    def wakeup_at(self) -> float:
        """When `wake` has something to do."""
        close_silent_s = self._liveness.timers.close_silent_s
        links = (self._closes_at(link, close_silent_s) for link in self._links.values())
        members = (self._forgotten_at(member) for member in self._members.values() if member.record.state not in LIVING)
        of_its_own = min(self._dials.wakeup_at(), self._liveness.wakeup_at())
        return min(of_its_own, min(links, default=inf), min(members, default=inf))

    def _closes_at(self, link: Link, close_silent_s: float) -> float:
        if link.challenge is not None:
            return link.challenged_until
        return link.opened_at + HANDSHAKE_S if link.instance is None else link.heard_at + close_silent_s

    def _forgotten_at(self, member: Member) -> float:
        return inf if member.record.state.is_living else member.lost_at + self._liveness.timers.remember_s

    def wake(self, now: float) -> None:
        """Dial what is due, close what is silent, find out who lives, forget who is long dead."""
        close_silent_s = self._liveness.timers.close_silent_s
        for link in list(self._links.values()):
            if link.link not in self._links:  # dropped by what one of the others led to
                continue
            if link.challenge is not None and now >= link.challenged_until:
                self._give_name(link.challenge.me.instance, now)
            elif link.instance is None and link.challenge is None and now >= link.opened_at + HANDSHAKE_S:
                self._drop(link.link, f"no Hello within {HANDSHAKE_S:g} s", now)
            elif link.instance is not None and now >= link.heard_at + close_silent_s:
                self._drop(link.link, f"silent for {close_silent_s:g} s", now)
        self._liveness.wake(now)
        for instance, member in list(self._members.items()):
            if now >= self._forgotten_at(member):
                self._dials.forget(member.record.ws)
                self._liveness.gone(instance)
                del self._members[instance]
        self._dials.wake(now)

    def _give_name(self, instance: InstanceId, now: float) -> None:
        """The holder of a name is gone, or doesn't answer: the newest of the newcomers that wait for it gets it."""
        waiting = self._names.settle(instance)
        for link, hello in waiting[:-1]:
            self._refuse_name(link.link, hello, now)
        for link, hello in waiting[-1:]:
            self._accept(link, hello, now)

    def _end(self, member: Member, state: MemberState, now: float) -> None:
        member.record, member.suspicion = replace(member.record, state=state), None
        self._outbox.add(MemberChanged(member.record))
        self._lose(member, now)
        member.lost_at = now
        if state is MemberState.LEFT:
            self._dials.forget(member.record.ws)

    def _lose(self, member: Member, now: float) -> None:
        if member.link is not None:
            self._drop(member.link, f"{member.record.instance!r} is gone", now)
        self._liveness.gone(member.record.instance)
        self.news.append(Lost(member.record.instance))
