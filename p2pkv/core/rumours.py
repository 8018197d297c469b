"""What is said of members, whose word counts, and how it spreads.

    A word is about one boot of an instance and one incarnation of it. Only the instance itself makes incarnations, so a higher
    one is its own word, and overrules what was said of lower ones. Of one incarnation: `suspect` overrules `alive`, `dead`
    both, `left` all.
    A word of another boot overrules nothing: an older one is over, a newer one must introduce itself.
    A rumour is passed on as often as the budget says, those passed on least first, and replaces any older one of its instance.

Source: SWIM, sections 4.1 (dissemination) and 4.2 (order of words). Where we differ: `dead` is of an incarnation too and can be
refuted, as in memberlist, since a partition's dead come back; and rumours have rounds and a byte budget of their own instead of
riding on probes, for on a stream a probe carries no more than what was sent before it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from p2pkv.core.ids import Incarnation, InstanceId
from p2pkv.core.messages import RUMOURS_MAX, Rumour
from p2pkv.core.records import MemberState
from p2pkv.core.timers import Timers

INCARNATIONS_MAX = 2**20
"""An incarnation that is further ahead of the last one known is a forgery and says nothing. An instance makes one a second at
most: these are 12 days of one that was out of sight."""
RUMOUR_NBYTES = 96
"""Of a rumour without its names: field names, numbers, and msgpack's headers."""
RANKS = {MemberState.LEFT: 0, MemberState.DEAD: 0, MemberState.SUSPECT: 1, MemberState.ALIVE: 2}
"""Of rumours passed on equally often, an end goes first: moves wait for it. One's own refutation goes before all."""

_STRENGTH = {MemberState.ALIVE: 0, MemberState.SUSPECT: 1, MemberState.DEAD: 2, MemberState.LEFT: 3}


def overrules(told: Rumour, state: MemberState, incarnation: Incarnation) -> bool:
    """Whether what is told of the same boot counts against `state` as of `incarnation`."""
    if told.incarnation > incarnation + INCARNATIONS_MAX:
        return False
    if told.incarnation > incarnation:
        return True
    return told.incarnation == incarnation and _STRENGTH[told.state] > _STRENGTH[state]


def nbytes_of(rumour: Rumour) -> int:
    """About how long it is on the wire."""
    return RUMOUR_NBYTES + len(rumour.instance) + len(rumour.ws.host) + len(rumour.origin)


@dataclass(slots=True)
class _Spread:
    rumour: Rumour
    number: int
    sent_count: int = 0


class Dissemination:
    """The rumours that this node still passes on: one an instance at most."""

    def __init__(self, me: InstanceId) -> None:
        self._me = me
        self._spreading: dict[InstanceId, _Spread] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._spreading)

    def spread(self, rumour: Rumour) -> None:
        """Pass this on, instead of what was said before of its instance."""
        self._number += 1
        self._spreading[rumour.instance] = _Spread(rumour, self._number)

    def take(self, timers: Timers) -> tuple[Rumour, ...]:
        """What goes into the next message; it counts as passed on once."""
        taken: list[_Spread] = []
        left_nbytes = timers.rumours_nbytes
        for each in sorted(self._spreading.values(), key=self._order):
            nbytes = nbytes_of(each.rumour)
            if nbytes <= left_nbytes and len(taken) < RUMOURS_MAX:
                left_nbytes -= nbytes
                taken.append(each)
        self._sent(taken, timers.retransmits)
        return tuple(each.rumour for each in taken)

    def _order(self, each: _Spread) -> tuple[bool, int, int, int]:
        is_mine = each.rumour.instance == self._me
        return not is_mine, each.sent_count, RANKS[each.rumour.state], -each.number

    def _sent(self, taken: Iterable[_Spread], retransmits: int) -> None:
        for each in taken:
            each.sent_count += 1
            if each.sent_count >= retransmits:
                del self._spreading[each.rumour.instance]
