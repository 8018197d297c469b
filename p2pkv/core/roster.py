"""Who is there, as far as this node knows: itself, its links, the members it has met. What becomes of them, others decide."""

from p2pkv.core.config import MachineConfig
from p2pkv.core.ids import InstanceId, LinkId
from p2pkv.core.messages import Rumour
from p2pkv.core.peers import Link, Member
from p2pkv.core.records import MemberRecord, MemberState

LIVING = tuple(state for state in MemberState if state.is_living)
"""Looked up for each member at each deadline: three times as fast as asking each state."""


class Roster:
    """What membership's parts share."""

    def __init__(self, config: MachineConfig) -> None:
        self.me = MemberRecord(
            instance=config.instance,
            generation=config.generation,
            incarnation=0,
            state=MemberState.ALIVE,
            ws=config.ws,
            http=config.http,
            transfer=config.transfer,
            handoff=config.handoff,
            zone=config.zone,
            namespaces=(),
            locations=(),
        )
        self.links: dict[LinkId, Link] = {}
        self.members: dict[InstanceId, Member] = {}

    def living(self) -> list[Member]:
        """All others that are to be counted on."""
        return [member for member in self.members.values() if member.record.state in LIVING]

    def linked(self, *, without: InstanceId | None = None) -> list[InstanceId]:
        """Those of them that a message can be sent to now, but for one."""
        return [
            member.record.instance for member in self.living() if member.link is not None and member.record.instance != without
        ]

    def heard_at(self, member: Member) -> float:
        """When something last came in on a member's link; when that was lost, if it is."""
        return member.lost_at if member.link is None else self.links[member.link].heard_at

    def word_of_me(self) -> Rumour:
        """One's own word about oneself."""
        me = self.me
        return Rumour(me.instance, me.generation, me.incarnation, me.state, ws=me.ws, origin=me.instance)

    def word_of(self, member: Member) -> Rumour:
        """What this node has to say of a member."""
        record = member.record
        if member.suspicion is not None:
            origin = member.suspicion.origin
        else:
            origin = self.me.instance if record.state is MemberState.DEAD else record.instance
        return Rumour(record.instance, record.generation, member.incarnation, record.state, ws=record.ws, origin=origin)
