"""Who is in the cluster (protocol rules L1 to L5, L8, L9; of two also L13, L14): one machine, and peers that say anything."""

from dataclasses import replace

import pytest

from p2pkv.core.effects import CloseLink, MemberChanged, OpenLink
from p2pkv.core.events import DialFailed, SiblingsFound
from p2pkv.core.ids import Address
from p2pkv.core.membership import HANDSHAKE_S
from p2pkv.core.messages import (
    MEMBERS_MAX,
    Hello,
    InventoryRequest,
    Leaving,
    Message,
    Ping,
    Pong,
    Rumour,
    Rumours,
    Status,
)
from p2pkv.core.records import MemberRecord, MemberState
from p2pkv.core.timers import lan
from p2pkv.errors import ErrorCode
from tests.core.builders import NAMESPACE, address_of, member
from tests.core.cluster import Cluster
from tests.core.solo import ME, Solo, dialed, goodbye_of, hello, status

ALIVE, SUSPECT, DEAD, LEFT = MemberState.ALIVE, MemberState.SUSPECT, MemberState.DEAD, MemberState.LEFT
TIMERS = lan(2)
DEAD_AFTER_S = TIMERS.probe_interval_s + TIMERS.suspicion_min_s
"""From a link's end, where nobody else can be asked."""


def alive(record: MemberRecord) -> Rumours:
    """Someone passes on what a member says of itself."""
    about = (record.instance, record.generation, record.incarnation)
    return Rumours((Rumour(*about, ALIVE, ws=record.ws, origin=record.instance),))


# --- L1, L2: the handshake ------------------------------------------------------------------------------------------------


def test_every_link_begins_with_a_hello_of_ones_own() -> None:
    solo = Solo(generation=7)
    solo.join("a")
    link = solo.open()
    (said,) = solo.heard(link, Hello)
    assert (said.me.instance, said.me.generation, said.cluster) == (ME, 7, "test")
    assert [record.instance for record in said.members] == ["a"]


def test_who_says_hello_is_a_member() -> None:
    solo = Solo()
    solo.join("a")
    assert solo.state_of("a") is ALIVE
    assert solo.effects(MemberChanged) == [MemberChanged(member("a"))]


def test_a_new_member_is_asked_for_its_inventory() -> None:
    solo = Solo()
    link = solo.join("a", 5)
    assert solo.heard(link, InventoryRequest) == [InventoryRequest(generation=5, sequence=0)]


@pytest.mark.parametrize(
    "said",
    [
        replace(hello(member("a")), cluster="another"),
        replace(hello(member("a")), versions=(99,)),
        Pong(nonce=1),
        status(member("a")),
        alive(member("a")),
    ],
)
def test_what_doesnt_belong_is_refused_with_a_reason(said: Message) -> None:
    solo = Solo()
    link = solo.open()
    solo.say(link, said)
    assert goodbye_of(solo, link) is ErrorCode.PROTOCOL_ERROR
    assert solo.state_of("a") is None


def test_a_newer_peer_that_still_speaks_our_version_is_welcome() -> None:
    solo = Solo()
    solo.say(solo.open(), replace(hello(member("a")), versions=(2, 1)))
    assert solo.state_of("a") is ALIVE


def test_a_second_hello_ends_the_link() -> None:
    solo = Solo()
    link = solo.join("a")
    solo.say(link, hello(member("a")))
    assert goodbye_of(solo, link) is ErrorCode.PROTOCOL_ERROR


def test_after_a_refusal_nothing_from_that_link_counts() -> None:
    solo = Solo()
    link = solo.open()
    solo.say(link, Pong(nonce=1))
    assert solo.say(link, hello(member("a"))) == []
    assert solo.lose(link) == []
    assert solo.state_of("a") is None


def test_a_link_without_a_hello_is_closed() -> None:
    solo = Solo()
    link = solo.open()
    solo.run(HANDSHAKE_S - 0.01)
    assert not solo.is_closed(link)
    solo.run(0.02)
    assert solo.is_closed(link)


def test_the_others_notice_nothing_of_a_stranger() -> None:
    solo = Solo()
    friend = solo.join("a")
    solo.say(solo.open(), replace(hello(member("b")), cluster="another"))
    assert not solo.is_closed(friend)
    solo.run(0.1)
    assert solo.heard(friend, Rumours) == [alive(member("a"))]
    assert solo.say(friend, Ping(nonce=3)) != []


def test_a_ping_is_answered() -> None:
    solo = Solo()
    link = solo.join("a")
    solo.say(link, Ping(nonce=77))
    assert solo.heard(link, Pong) == [Pong(nonce=77)]


def test_members_that_others_tell_of_are_only_dialed() -> None:
    solo = Solo()
    link = solo.open()
    solo.say(link, hello(member("a"), member("b"), member(ME, 99)))
    solo.say(link, alive(member("c")))
    solo.run(0.1)
    assert [record.instance for record in solo.machine.members()] == ["a", ME]
    assert dialed(solo) == [address_of("b"), address_of("c")]


def test_hearsay_of_what_is_known_already_is_no_news() -> None:
    solo = Solo()
    link = solo.join("a")
    other = solo.join("b", 5)
    solo.lose(other)
    solo.happen(DialFailed(address_of("b"), "refused"))
    solo.done.clear()
    solo.say(link, alive(member("b", 5)))
    solo.run(0.05)
    assert dialed(solo) == []
    solo.say(link, alive(member("b", 6)))
    solo.run(0.01)
    assert dialed(solo) == [address_of("b")], "a newer boot is worth a dial"


def test_everyone_is_told_of_a_new_member_once() -> None:
    solo = Solo()
    first = solo.join("a")
    second = solo.join("b")
    solo.run(0.1)
    assert [alive(member("b")).rumours[0] in said.rumours for said in solo.heard(first, Rumours)] == [True]
    solo.say(second, status(replace(member("b"), incarnation=1)))
    for _ in range(10):
        solo.run(1.0)
        for link, name in ((first, "a"), (second, "b")):
            for ping in solo.heard(link, Ping):
                solo.say(link, Pong(ping.nonce))
            solo.say(link, status(member(name)))
    assert len(solo.heard(first, Rumours)) == lan(3).retransmits // 2


def test_a_cluster_has_a_limit() -> None:
    solo = Solo()
    for number in range(MEMBERS_MAX):
        solo.lose(solo.join(f"i{number}"))
    link = solo.join("one-too-many")
    assert goodbye_of(solo, link) is ErrorCode.PROTOCOL_ERROR
    newcomers = solo.join("i0", 2)
    assert not solo.is_closed(newcomers)
    (said,) = solo.heard(solo.open(), Hello)
    assert len(said.members) == MEMBERS_MAX


# --- L5: two links to one instance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kept"), [("zoe", "dialed"), ("ann", "accepted")])
@pytest.mark.parametrize("first", ["dialed", "accepted"])
def test_of_crossing_dials_the_one_of_the_lower_name_stays(name: str, kept: str, first: str) -> None:
    assert "ann" < ME < "zoe"
    solo = Solo()
    links = {}
    for which in (first, "accepted" if first == "dialed" else "dialed"):
        links[which] = solo.join(name, dialed=address_of(name) if which == "dialed" else None)
    assert {which: solo.is_closed(link) for which, link in links.items()} == {
        "dialed": kept != "dialed",
        "accepted": kept != "accepted",
    }
    assert len(solo.effects(MemberChanged)) == 1, "one joining, whatever the links"
    solo.say(links[kept], Ping(nonce=1))
    assert solo.heard(links[kept], Pong) == [Pong(nonce=1)]


def test_when_both_dial_at_once_both_keep_the_same_link() -> None:
    cluster = Cluster("a", "b")
    for name in ("a", "b"):
        cluster.crash(name)
    for name in ("a", "b"):
        cluster.boot(name)
    cluster.done.clear()
    cluster.run(10.0)
    assert [len(cluster.effects(name, OpenLink)) for name in ("a", "b")] == [1, 1]
    assert [len(cluster.nodes[name].links) for name in ("a", "b")] == [1, 1]
    assert cluster.states("a") == cluster.states("b") == {"a": ALIVE, "b": ALIVE}


@pytest.mark.parametrize("dialed_by_me", [False, True])
def test_of_two_links_of_one_dialer_the_later_stays(*, dialed_by_me: bool) -> None:
    solo = Solo()
    addresses = (address_of("a"), Address("alias", 1)) if dialed_by_me else (None, None)
    first, second = (solo.join("a", dialed=address) for address in addresses)
    assert (solo.is_closed(first), solo.is_closed(second)) == (True, False)


def test_the_end_of_the_other_link_is_no_loss() -> None:
    solo = Solo()
    first, _second = solo.join("a"), solo.join("a")
    assert solo.lose(first) == []
    solo.run(1.0)
    assert solo.state_of("a") is ALIVE


# --- L3, L4, L8, L13, L14: death ------------------------------------------------------------------------------------------


def die(solo: Solo, name: str, link: int) -> None:
    """A link breaks, and every redial is refused."""
    solo.lose(link)
    for _ in range(TIMERS.refusals):
        solo.run(1.0)
        solo.happen(DialFailed(address_of(name), "refused"))
    solo.run(0.01)


def test_a_member_is_dead_when_its_redials_fail() -> None:
    solo = Solo()
    die(solo, "a", solo.join("a"))
    assert solo.state_of("a") is DEAD
    assert dialed(solo)[:3] == [address_of("a")] * 3


def test_a_member_is_dead_within_five_seconds_though_no_redial_ever_ends() -> None:
    solo = Solo()
    link = solo.join("a")
    solo.say(link, status(member("a")))
    solo.lose(link)
    assert DEAD_AFTER_S < 5.0
    solo.run(DEAD_AFTER_S)
    assert solo.state_of("a") is DEAD
    assert [each.member.state for each in solo.effects(MemberChanged)] == [ALIVE, SUSPECT, DEAD]


def test_a_member_that_was_dialed_long_ago_is_dead_in_time_too() -> None:
    """A dial that has been due for long, unneeded while the member was linked, is no sign of a stall."""
    solo = Solo()
    solo.happen(SiblingsFound((address_of("ann"),)))
    solo.run(0.1)
    link = solo.join("ann")
    solo.happen(DialFailed(address_of("ann"), "crossed"))
    for _ in range(100):
        solo.run(1.0)
        solo.say(link, status(member("ann")))
    solo.lose(link)
    solo.run(DEAD_AFTER_S)
    assert solo.state_of("ann") is DEAD


def test_a_member_whose_link_comes_back_never_died() -> None:
    solo = Solo()
    solo.lose(solo.join("a"))
    solo.run(DEAD_AFTER_S - 0.1)
    solo.join("a")
    solo.run(1.0)
    assert [each.member.state for each in solo.effects(MemberChanged)] == [ALIVE, SUSPECT, ALIVE]


def test_a_silent_link_is_closed_and_its_member_redialed() -> None:
    solo = Solo()
    link = solo.join("a")
    solo.run(TIMERS.close_silent_s - 0.1)
    solo.say(link, Ping(nonce=1))
    solo.run(TIMERS.close_silent_s - 0.1)
    assert not solo.is_closed(link)
    solo.run(0.2)
    assert solo.is_closed(link)
    assert solo.state_of("a") is SUSPECT
    solo.run(0.1)
    assert dialed(solo) == [address_of("a")]
    solo.run(DEAD_AFTER_S)
    assert solo.state_of("a") is DEAD


def test_a_dead_member_comes_back_with_a_hello() -> None:
    solo = Solo()
    die(solo, "a", solo.join("a"))
    other = solo.join("b")
    solo.join("a")
    assert solo.state_of("a") is ALIVE
    solo.run(0.5)
    assert alive(member("a")).rumours[0] in solo.heard(other, Rumours)[-1].rumours


def test_a_dead_member_is_dialed_on_and_then_forgotten() -> None:
    solo = Solo()
    die(solo, "a", solo.join("a"))
    for _ in range(int(TIMERS.remember_s / 10)):
        solo.happen(DialFailed(address_of("a"), "refused"))
        before = len(dialed(solo))
        solo.run(9.0)
        assert len(dialed(solo)) == before + 1
    solo.run(TIMERS.remember_s / 10)
    assert solo.state_of("a") is None
    assert solo.machine.inventory_of("a") == ()
    solo.done.clear()
    solo.happen(DialFailed(address_of("a"), "refused"))
    solo.run(60.0)
    assert dialed(solo) == []


def test_a_stall_of_ones_own_kills_nobody() -> None:
    solo = Solo()
    link = solo.join("a")
    solo.join("b")
    solo.run(1.0)
    solo.now += 30.0
    solo.machine.wake(solo.now)
    solo.say(link, Ping(nonce=1))
    assert [solo.state_of(name) for name in ("a", "b")] == [ALIVE, ALIVE]
    solo.run(TIMERS.close_silent_s + DEAD_AFTER_S - 1.5)
    assert solo.effects(CloseLink) != [], "silence counts again"


def test_a_stall_is_noticed_by_the_first_event_after_it() -> None:
    solo = Solo()
    link = solo.join("a")
    silent = solo.join("b")
    solo.now += 30.0
    solo.say(link, Ping(nonce=1))
    solo.run(1.0)
    assert not solo.is_closed(silent)


def test_a_lost_member_gets_its_time_after_a_stall_too() -> None:
    solo = Solo()
    solo.lose(solo.join("a"))
    solo.run(1.0)
    solo.now += 30.0
    solo.run(DEAD_AFTER_S - 1.5)
    assert solo.state_of("a") is SUSPECT
    solo.run(1.0)
    assert solo.state_of("a") is DEAD


# --- L9 and records -------------------------------------------------------------------------------------------------------


def test_a_member_that_leaves_has_left_and_is_not_redialed() -> None:
    solo = Solo()
    link = solo.join("a", 3)
    solo.say(link, Leaving(generation=3))
    assert solo.is_closed(link)
    assert solo.state_of("a") is LEFT
    solo.run(60.0)
    assert dialed(solo) == []


def test_who_has_left_isnt_brought_back_by_a_last_hello() -> None:
    solo = Solo()
    solo.say(solo.join("a"), Leaving(generation=1))
    link = solo.open()
    solo.say(link, hello(replace(member("a"), state=LEFT)))
    assert goodbye_of(solo, link) is ErrorCode.LEAVING
    assert solo.state_of("a") is LEFT


def test_a_leaving_of_another_boot_says_nothing() -> None:
    solo = Solo()
    solo.say(solo.join("a", 3), Leaving(generation=2))
    assert solo.state_of("a") is ALIVE


def test_a_member_describes_itself_anew() -> None:
    solo = Solo()
    link = solo.join("a")
    newer = replace(member("a", 1, NAMESPACE), incarnation=2)
    solo.say(link, status(newer))
    assert solo.record_of("a") == newer
    older = replace(newer, incarnation=1, zone="elsewhere")
    liar = replace(newer, instance="b", incarnation=9)
    another_boot = replace(newer, generation=2, incarnation=9)
    for record in (older, liar, another_boot):
        solo.say(link, status(record))
    assert solo.record_of("a") == newer
    assert solo.record_of("b") is None


def test_nobody_declares_himself_dead() -> None:
    solo = Solo()
    link = solo.join("a")
    solo.say(link, status(replace(member("a"), incarnation=1, state=DEAD)))
    assert solo.state_of("a") is ALIVE


def test_everyone_gets_a_status_each_second() -> None:
    solo = Solo()
    link = solo.join("a")
    solo.run(2.5)
    assert len(solo.heard(link, Status)) == 3


def test_what_is_new_about_oneself_is_a_new_incarnation_told_at_once() -> None:
    solo = Solo()
    link = solo.join("a")
    solo.attach()
    (said,) = solo.heard(link, Status)
    assert said.me.namespaces == (NAMESPACE,)
    assert said.me.incarnation > solo.heard(link, Hello)[0].me.incarnation
