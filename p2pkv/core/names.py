"""Who gets a name that two want: its holder, as long as it answers.

A newcomer with a newer generation waits while the holder's link is asked by a `Ping`; the Ping's nonce is the newcomer's link.
A `Pong`, and the newcomer is refused. `CHALLENGE_S` without one, or the end of the holder's link, and the newest of those that
wait gets the name.
When another link to the holder takes its link's place meanwhile, the Ping may be lost with the old one: it is asked anew.
"""

from math import inf

from p2pkv.core.ids import InstanceId, LinkId
from p2pkv.core.messages import Hello, Nonce, Ping
from p2pkv.core.outbox import Outbox
from p2pkv.core.peers import Link
from p2pkv.core.records import MemberRecord
from p2pkv.core.roster import Roster

CHALLENGE_S = 1.0
"""For the holder of a name to answer, before a newcomer of the same name gets it."""


def why_refused(name: InstanceId, cluster: str, known: MemberRecord | None) -> str:
    """Why a newcomer doesn't get its name, and what to do about it.

    Args:
        name: Its name.
        cluster: Where it wanted to have it.
        known: The last that is known of that name; None where it is this node's own.
    """
    if known is None or known.state.is_living:
        return f"{name!r} is alive in cluster {cluster!r}. Choose another name, or stop that instance."
    return (
        f"Cluster {cluster!r} remembers a later boot of {name!r} than this one, which has ended: this host's clock was set "
        "back, and the number of that boot, which the runtime directory keeps, is gone. Set the clock right, choose another "
        "name, or start again when that boot is forgotten."
    )


class Names:
    """The newcomers that wait for a name. They are kept with their links, so that one that is closed waits no longer."""

    def __init__(self, roster: Roster, outbox: Outbox) -> None:
        self._roster = roster
        self._outbox = outbox

    def challenge(self, newcomer: Link, hello: Hello, holder: LinkId, now: float) -> None:
        """A newcomer waits for what the holder of its name says."""
        newcomer.challenge, newcomer.challenged_until = hello, now + CHALLENGE_S
        self._outbox.send_on(holder, Ping(nonce=newcomer.link))

    def holder_relinked(self, instance: InstanceId, link: LinkId, now: float) -> None:
        """The holder of a name has another link now."""
        for newcomer, hello in self._waiting_for(instance):
            self.challenge(newcomer, hello, link, now)

    def answered(self, instance: InstanceId, nonce: Nonce) -> tuple[Link, Hello] | None:
        """The newcomer whose challenge the holder of its name has answered; None when it is none's, or not the holder's."""
        newcomer = self._roster.links.get(nonce)
        if newcomer is None or newcomer.challenge is None or newcomer.challenge.me.instance != instance:
            return None
        return newcomer, newcomer.challenge

    def settle(self, instance: InstanceId) -> list[tuple[Link, Hello]]:
        """The holder is gone: all that waited for its name, the newest last, which wait no longer."""
        waiting = self._waiting_for(instance)
        for newcomer, _ in waiting:
            newcomer.challenge, newcomer.challenged_until = None, inf
        return waiting

    def _waiting_for(self, instance: InstanceId) -> list[tuple[Link, Hello]]:
        waiting = [(link, link.challenge) for link in self._roster.links.values() if link.challenge is not None]
        return sorted((each for each in waiting if each[1].me.instance == instance), key=lambda each: each[1].me.generation)
