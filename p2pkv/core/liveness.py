"""Who of the members lives: probes, suspicions, rumours, and what they lead to.

    Each period one member is probed, in turn. Out of turn is probed whose link closed, and whose link is silent.
    A member whose link closed, and that this node and all it asks are refused to dial, is dead at once.
    Any other that doesn't answer a probe is a suspect. It is told so itself, before all others (the buddy system), and refutes
    by a newer incarnation, which its next `Status` may be too. In time, it is alive again; otherwise it is dead.
    Nobody declares dead whom it hears itself: such a suspect gets its time anew, and a rumour of its end is one more suspicion.
    A rumour changes what is known of a member only, never who is one: whom it brings up, or back, is dialed.
    Each node now and then exchanges all that it knows with another; the deaths it hears of there are suspicions.

Source: SWIM, sections 3 and 4; Lifeguard, section IV; memberlist, state.go, for push-pull. Ours: closed and silent links as
evidence, and hearing as a veto, since a member's words come over a link of its own that proves whose they are.
What this file does not do: links, handshakes and names are `membership`'s, and so is what an end leads to.
"""

from collections.abc import Callable
from dataclasses import replace
from math import inf
from random import Random
from typing import assert_never

from p2pkv.core.dials import Dials
from p2pkv.core.effects import MemberChanged
from p2pkv.core.health import LocalHealth
from p2pkv.core.ids import Address, Incarnation, InstanceId
from p2pkv.core.messages import (
    MEMBERS_MAX,
    LivenessMessage,
    MemberTable,
    Nonce,
    Ping,
    Pong,
    ProbeAnswer,
    ProbeRequest,
    Rumour,
    Rumours,
)
from p2pkv.core.outbox import Outbox
from p2pkv.core.peers import Member
from p2pkv.core.probes import Probe
from p2pkv.core.records import MemberState, Reach
from p2pkv.core.relays import Relay, Relays
from p2pkv.core.roster import Roster
from p2pkv.core.rotation import Rotation
from p2pkv.core.rumours import INCARNATIONS_MAX, Dissemination, overrules
from p2pkv.core.suspicion import Suspicion
from p2pkv.core.timers import Timers, TimersOf

NONCE_BITS = 64
Ended = Callable[[Member, MemberState, float], None]
"""What is done about a member that is dead or has left, as of when."""


class Liveness:
    """This node's part in finding out who lives."""

    def __init__(
        self, roster: Roster, dials: Dials, outbox: Outbox, rng: Random, timers_of: TimersOf, ended: Ended, now: float
    ) -> None:
        self._roster = roster
        self._dials = dials
        self._outbox = outbox
        self._rng = rng
        self._timers_of = timers_of
        self._ended = ended
        self.health = LocalHealth(self.timers.health_max)
        self._rotation = Rotation(rng)
        self._probes: dict[InstanceId, Probe] = {}
        self._relays = Relays(outbox)
        self._news = Dissemination(roster.me.instance)
        self._turn_at = now + self.timers.probe_interval_s
        self._gossip_at = now
        self._push_pull_at = now + self._some_of(self.timers.push_pull_s)

    @property
    def timers(self) -> Timers:
        """Those of a cluster of this size."""
        return self._timers_of(1 + len(self._roster.living()))

    def _some_of(self, seconds: float) -> float:
        """Not all at the same moment: a node's first time comes somewhere in the last half."""
        return self._rng.uniform(seconds / 2, seconds)

    # --- what membership tells --------------------------------------------------------------------------------------------

    def met(self, member: Member, *, was: MemberState | None) -> None:
        """A member has a link; `was` is what it was held for before, None when it wasn't known."""
        instance = member.record.instance
        self._rotation.add(instance)
        if self._probes.pop(instance, None) is not None:
            self.health.probe_answered()
        self._relays.met(instance)
        if was is not MemberState.ALIVE and was is not MemberState.SUSPECT:
            self._spread(self._roster.word_of(member))
        if was is not None and was is not MemberState.ALIVE:  # others may hold it for that too: its refutation must travel
            word = replace(self._roster.word_of(member), state=was, origin=self._roster.me.instance)
            self._outbox.send(instance, Rumours((word,)))

    def lost(self, member: Member, now: float) -> None:
        """A living member's link closed: that is evidence."""
        self._probe(member, now)

    def gone(self, instance: InstanceId) -> None:
        """A member has ended, or is forgotten."""
        self._rotation.remove(instance)
        self._probes.pop(instance, None)

    def left(self, member: Member) -> None:
        """A member said itself that it leaves."""
        self._spread(self._roster.word_of(member))

    def dial_failed(self, address: Address, now: float) -> None:
        """Nobody answered at `address`."""
        for member in list(self._roster.members.values()):
            if member.record.ws == address and member.link is None:
                member.failed_dials += 1
                self._relays.refused(member.record.instance)
                self._judge_refusals(member, now)

    def vouched(self, member: Member, incarnation: Incarnation) -> None:
        """A member lives as of this incarnation of its own making."""
        member.incarnation = incarnation
        if member.suspicion is not None:
            member.suspicion = None
            self._set_state(member, MemberState.ALIVE)

    def stalled(self, lag_s: float) -> None:
        """This node itself was late by `lag_s`: nobody's time ran meanwhile."""
        if lag_s >= self.timers.lag_s:
            self.health.lagged()
        for probe in self._probes.values():
            probe.postpone(lag_s)
        for member in self._roster.living():
            if member.suspicion is not None:
                member.suspicion.since += lag_s
        self._relays.postpone(lag_s)

    # --- messages ---------------------------------------------------------------------------------------------------------

    def receive(self, sender: InstanceId, message: LivenessMessage, now: float) -> None:
        """A member says something about members."""
        match message:
            case Pong():
                self._relays.pong(sender, message.nonce)
                probe = self._probes.get(sender)
                if probe is not None and probe.nonce == message.nonce:
                    self._answered(probe)
            case ProbeRequest():
                self._asked(sender, message, now)
            case ProbeAnswer():
                self._helped(sender, message, now)
            case Rumours():
                for rumour in message.rumours:
                    self._told(sender, rumour, now)
            case MemberTable():
                self._told_all(sender, message, now)
            case _:
                assert_never(message)

    # --- probes -----------------------------------------------------------------------------------------------------------

    def _probe(self, member: Member, now: float) -> None:
        """Find out whether a member lives, if that isn't under way."""
        instance = member.record.instance
        probe = self._probes.get(instance)
        if probe is None:
            timers, factor = self.timers, self.health.factor
            probe = self._probes[instance] = Probe(
                instance=instance,
                nonce=self._rng.getrandbits(NONCE_BITS),
                asks_at=now + factor * timers.probe_timeout_s,
                ends_at=now + factor * timers.probe_interval_s,
            )
            self._ping(member, probe.nonce)
        if member.link is None:
            self._ask_others(probe, member)

    def _ping(self, member: Member, nonce: Nonce) -> None:
        """Ask a member itself; a suspect hears of that first."""
        if member.suspicion is not None:
            self._warn(member)
        self._outbox.send(member.record.instance, Ping(nonce=nonce))

    def _warn(self, member: Member) -> None:
        """Tell a suspect what it has to refute."""
        self._outbox.send(member.record.instance, Rumours((self._roster.word_of(member),)))

    def _ask_others(self, probe: Probe, member: Member) -> None:
        if probe.asks_at == inf:
            return
        others = self._roster.linked(without=probe.instance)
        helpers = self._rng.sample(others, min(len(others), self.timers.indirect_count))
        probe.ask(helpers)
        for helper in helpers:
            self._outbox.send(helper, ProbeRequest(probe.nonce, probe.instance, member.record.generation))
        self._ping(member, probe.nonce)

    def _answered(self, probe: Probe) -> None:
        del self._probes[probe.instance]
        self.health.probe_answered()

    def _helped(self, helper: InstanceId, answer: ProbeAnswer, now: float) -> None:
        probe = next((each for each in self._probes.values() if each.nonce == answer.nonce), None)
        if probe is None or not probe.answered(helper, answer.reach):
            return
        if answer.reach is Reach.REACHED:
            self._answered(probe)
        else:
            self._judge_refusals(self._roster.members[probe.instance], now)

    def _judge_refusals(self, member: Member, now: float) -> None:
        """A member whose link closed is dead when it can't be dialed, by this node or by any that it has asked."""
        if member.link is not None or not member.record.state.is_living or not member.failed_dials:
            return
        probe = self._probes.get(member.record.instance)
        if probe is not None and probe.asked:
            others = probe.refusal_count()
        else:
            others = None if self._roster.linked(without=member.record.instance) else 0
        if others is not None and member.failed_dials + others >= self.timers.refusals:
            self._die(member, now)

    def _fail(self, probe: Probe, now: float) -> None:
        del self._probes[probe.instance]
        self.health.probe_failed(asked_count=len(probe.asked), nack_count=probe.nack_count)
        self._suspect(self._roster.members[probe.instance], self._roster.me.instance, now)

    def _asked(self, asker: InstanceId, request: ProbeRequest, now: float) -> None:
        """Somebody doesn't hear a member, which may be oneself."""
        member = self._roster.members.get(request.instance)
        if member is None or member.record.generation != request.generation:
            self._outbox.send(asker, ProbeAnswer(request.nonce, Reach.SILENT))
        elif not member.record.state.is_living or (member.link is None and member.failed_dials):
            self._outbox.send(asker, ProbeAnswer(request.nonce, Reach.REFUSED))
        else:
            timers, nonce = self.timers, self._rng.getrandbits(NONCE_BITS)
            nack_at = now + timers.nack_share * timers.probe_timeout_s
            relay = Relay(asker, request.nonce, request.instance, nonce, nack_at, ends_at=now + timers.probe_interval_s)
            if self._relays.open(relay):
                self._ping(member, nonce)

    # --- suspicions -------------------------------------------------------------------------------------------------------

    def _suspect(self, member: Member, origin: InstanceId, now: float) -> None:
        """`origin` doesn't hear a member that is held to live."""
        if member.suspicion is None:
            member.suspicion = Suspicion(origin, self.timers, now)
            self._set_state(member, MemberState.SUSPECT)
            self._warn(member)
        elif not member.suspicion.confirm(origin):
            return
        self._spread(replace(self._roster.word_of(member), origin=origin))

    def _set_state(self, member: Member, state: MemberState) -> None:
        if member.record.state is not state:
            member.record = replace(member.record, state=state)
            self._outbox.add(MemberChanged(member.record))

    def _silence_s(self) -> float:
        return self.health.factor * self.timers.silence_s

    def _is_heard(self, member: Member, now: float) -> bool:
        return member.link is not None and now - self._roster.heard_at(member) < self._silence_s()

    def _judge(self, member: Member, now: float) -> None:
        """A suspect hasn't refuted in time."""
        if self._is_heard(member, now):
            member.suspicion = None
            self._suspect(member, self._roster.me.instance, now)
        else:
            self._die(member, now)

    def _die(self, member: Member, now: float) -> None:
        self._ended(member, MemberState.DEAD, now)
        self._spread(self._roster.word_of(member))

    # --- rumours ----------------------------------------------------------------------------------------------------------

    def _spread(self, rumour: Rumour) -> None:
        self._news.spread(rumour)

    def _told(self, sender: InstanceId, rumour: Rumour, now: float) -> None:
        member = self._roster.members.get(rumour.instance)
        if rumour.instance == self._roster.me.instance:
            self._told_of_me(sender, rumour)
        elif member is None or rumour.generation > member.record.generation:
            if rumour.state.is_living:
                self._dials.add(rumour.ws, is_contact=False, now=now)
        elif rumour.generation == member.record.generation:
            self._told_of(sender, member, rumour, now)

    def _told_of_me(self, sender: InstanceId, rumour: Rumour) -> None:
        """Refute it, whatever it is, by a newer incarnation; and who told it, hears that first."""
        me = self._roster.me
        is_mine = rumour.generation == me.generation and rumour.incarnation <= me.incarnation + INCARNATIONS_MAX
        if not is_mine or rumour.state is MemberState.ALIVE or me.state is not MemberState.ALIVE:
            return
        if rumour.incarnation >= me.incarnation:
            self._roster.me = replace(me, incarnation=rumour.incarnation + 1)
            self.health.refuted()
            self._spread(self._roster.word_of_me())
        self._outbox.send(sender, Rumours((self._roster.word_of_me(),)))

    def _told_of(self, sender: InstanceId, member: Member, rumour: Rumour, now: float) -> None:
        """Something is said of a member's very boot."""
        state = member.record.state
        if rumour.state is state is MemberState.SUSPECT and rumour.incarnation == member.incarnation:
            self._suspect(member, rumour.origin, now)
        if not overrules(rumour, state, member.incarnation):
            if not state.is_living and rumour.state is MemberState.SUSPECT:  # who still waits for its answer may stop
                self._outbox.send(sender, Rumours((self._roster.word_of(member),)))
            return
        if not state.is_living and rumour.state.is_living:
            member.incarnation = rumour.incarnation
            self._dials.add(member.record.ws, is_contact=False, now=now)
            self._spread(rumour)
        elif rumour.state is MemberState.ALIVE:
            self.vouched(member, rumour.incarnation)
            self._spread(rumour)
        elif rumour.state is MemberState.SUSPECT or self._is_heard(member, now):
            if rumour.incarnation > member.incarnation:
                self.vouched(member, rumour.incarnation)
            self._suspect(member, rumour.origin, now)
        else:
            member.incarnation = rumour.incarnation
            self._ended(member, rumour.state, now)
            self._spread(rumour)

    def _told_all(self, sender: InstanceId, table: MemberTable, now: float) -> None:
        for rumour in table.rumours:
            is_death = rumour.state is MemberState.DEAD and rumour.instance in self._roster.members
            self._told(sender, replace(rumour, state=MemberState.SUSPECT, origin=sender) if is_death else rumour, now)
        if not table.is_answer:
            self._tell_all(sender, is_answer=True)

    def _tell_all(self, instance: InstanceId, *, is_answer: bool) -> None:
        words = [self._roster.word_of(member) for member in self._roster.members.values()]
        self._outbox.send(instance, MemberTable(is_answer, (self._roster.word_of_me(), *words[:MEMBERS_MAX])))

    # --- time -------------------------------------------------------------------------------------------------------------

    def wakeup_at(self) -> float:
        """When `wake` has something to do."""
        living = self._roster.living()
        silence_s = self.health.factor * self._timers_of(1 + len(living)).silence_s
        return min(
            self._turn_at,
            self._push_pull_at,
            self._gossip_at if len(self._news) else inf,
            self._relays.wakeup_at(),
            min((probe.due_at for probe in self._probes.values()), default=inf),
            min((member.suspicion.due_at for member in living if member.suspicion is not None), default=inf),
            min((self._silent_at(member, silence_s) for member in living), default=inf),
        )

    def _silent_at(self, member: Member, silence_s: float) -> float:
        """When a member's link will have been silent for so long that it is asked why."""
        if member.link is None or member.record.instance in self._probes:
            return inf
        return self._roster.heard_at(member) + silence_s

    def wake(self, now: float) -> None:
        """Do what is due."""
        self._relays.wake(now)
        for probe in list(self._probes.values()):
            if now >= probe.ends_at:
                self._fail(probe, now)
            elif now >= probe.asks_at:
                self._ask_others(probe, self._roster.members[probe.instance])
        silence_s = self._silence_s()
        for member in self._roster.living():
            if member.suspicion is not None and now >= member.suspicion.due_at:
                self._judge(member, now)
            elif now >= self._silent_at(member, silence_s):
                self._probe(member, now)
        if now >= self._turn_at:
            self._turn_at = now + self.health.factor * self.timers.probe_interval_s
            instance = self._rotation.next(self._probes)
            if instance is not None:
                self._probe(self._roster.members[instance], now)
        if now >= self._gossip_at and len(self._news):
            self._gossip(now)
        if now >= self._push_pull_at:
            self._push_pull(now)

    def _gossip(self, now: float) -> None:
        timers, others = self.timers, self._roster.linked()
        self._gossip_at = now + timers.gossip_interval_s
        for instance in self._rng.sample(others, min(len(others), timers.gossip_fanout)):
            if rumours := self._news.take(timers):
                self._outbox.send(instance, Rumours(rumours))

    def _push_pull(self, now: float) -> None:
        self._push_pull_at = now + self._some_of(2 * self.timers.push_pull_s)
        others = self._roster.linked()
        if others:
            self._tell_all(self._rng.choice(others), is_answer=False)
