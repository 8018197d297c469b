"""Who gets a name that two want (protocol rules L6, L7)."""

import pytest

from p2pkv.core.effects import Stop
from p2pkv.core.events import SiblingsFound
from p2pkv.core.ids import Address
from p2pkv.core.membership import GENERATIONS_MAX, HANDSHAKE_S, JOINING_S
from p2pkv.core.messages import (
    Goodbye,
    Hello,
    InventoryRequest,
    Ping,
    Pong,
    ProbeRequest,
)
from p2pkv.core.names import CHALLENGE_S
from p2pkv.errors import ErrorCode, Failure
from tests.core.builders import WALL_OFFSET_S, member
from tests.core.solo import ME, Solo, dialed, goodbye_of, hello, status


def test_meeting_oneself_is_not_joining() -> None:
    solo = Solo()
    solo.happen(SiblingsFound((Address("localhost", 1),)))
    solo.run(0.1)
    link = solo.open(Address("localhost", 1))
    (said,) = solo.heard(link, Hello)
    solo.say(link, said)
    solo.done.clear()
    solo.run(60.0)
    assert [record.instance for record in solo.machine.members()] == [ME]
    assert dialed(solo) == [], "one's own address isn't dialed again"


def test_someone_dialed_in_from_oneself_is_dropped() -> None:
    solo = Solo()
    link = solo.join(ME)
    assert solo.is_closed(link)


def test_a_newer_holder_of_ones_own_name_is_refused() -> None:
    solo = Solo(generation=3)
    link = solo.join(ME, 4)
    assert goodbye_of(solo, link) is ErrorCode.INSTANCE_ID_IN_USE


def test_an_older_holder_of_ones_own_name_decides_itself() -> None:
    solo = Solo(generation=3)
    link = solo.join(ME, 2)
    assert not solo.is_closed(link)
    solo.say(link, Goodbye(failure=Failure(ErrorCode.INSTANCE_ID_IN_USE, "mine")))
    (stop,) = solo.effects(Stop)
    assert stop.failure == Failure(ErrorCode.INSTANCE_ID_IN_USE, "mine")


def test_a_node_obeys_name_in_use_only_while_it_joins() -> None:
    solo = Solo()
    solo.run(JOINING_S)
    link = solo.join("a")
    solo.say(link, Goodbye(failure=Failure(ErrorCode.INSTANCE_ID_IN_USE, "mine")))
    assert solo.effects(Stop) == []
    assert solo.is_closed(link)


def test_another_refusal_ends_only_the_link() -> None:
    solo = Solo()
    link = solo.join("a")
    solo.say(link, Goodbye(failure=Failure(ErrorCode.PROTOCOL_ERROR, "no")))
    assert solo.effects(Stop) == []
    assert solo.is_closed(link)


def test_the_name_of_a_living_instance_is_refused_to_a_newcomer() -> None:
    solo = Solo()
    holder = solo.join("a", 1)
    newcomer = solo.join("a", 2)
    (ping,) = solo.heard(holder, Ping)
    solo.say(holder, Pong(ping.nonce))
    assert goodbye_of(solo, newcomer) is ErrorCode.INSTANCE_ID_IN_USE
    record = solo.record_of("a")
    assert record is not None
    assert record.generation == 1


def test_what_a_newcomer_says_while_its_name_is_decided_is_lost_not_held_against_it() -> None:
    solo = Solo()
    solo.join("a", 1)
    newcomer = solo.join("a", 2)
    assert solo.say(newcomer, InventoryRequest(generation=1, sequence=0)) == []
    assert not solo.is_closed(newcomer)


def test_the_name_of_a_silent_instance_goes_to_the_newcomer() -> None:
    solo = Solo()
    holder = solo.join("a", 1)
    newcomer = solo.join("a", 2)
    solo.run(CHALLENGE_S)
    assert solo.is_closed(holder)
    assert not solo.is_closed(newcomer)
    record = solo.record_of("a")
    assert record == member("a", 2)
    assert solo.heard(newcomer, InventoryRequest) == [InventoryRequest(generation=2, sequence=0)]


def test_a_name_is_free_at_once_when_its_holders_link_breaks() -> None:
    solo = Solo()
    holder = solo.join("a", 1)
    newcomer = solo.join("a", 2)
    solo.lose(holder)
    assert solo.record_of("a") == member("a", 2)
    assert not solo.is_closed(newcomer)


def test_a_holder_whose_link_is_replaced_while_its_name_is_decided_is_asked_again() -> None:
    """The first Ping went out on a link that both ends give up in favour of another, so nobody answers it there."""
    solo = Solo()
    old = solo.join("a", 1)
    newcomer = solo.join("a", 2)
    solo.run(CHALLENGE_S - 0.01)
    new = solo.join("a", 1)
    assert solo.is_closed(old)
    solo.run(CHALLENGE_S - 0.01)
    assert Ping(nonce=newcomer) in solo.heard(new, Ping)
    solo.say(new, Pong(nonce=newcomer))
    assert not solo.is_closed(new)
    assert [goodbye.failure.code for goodbye in solo.heard(newcomer, Goodbye)] == [ErrorCode.INSTANCE_ID_IN_USE]


def test_a_late_challenge_wakes_nobody_before_its_time() -> None:
    """The newcomer's Hello came so late that the challenge outlasts the handshake's deadline."""
    solo = Solo()
    holder = solo.join("a", 1)
    newcomer = solo.open()
    solo.run(HANDSHAKE_S - 0.1)
    solo.say(holder, status(member("a", 1)))
    solo.say(newcomer, hello(member("a", 2)))
    solo.run(CHALLENGE_S - 0.01)
    assert not solo.is_closed(newcomer)
    solo.run(0.02)
    assert solo.record_of("a") == member("a", 2)


@pytest.mark.parametrize("nonce_offset", [0, 1])
def test_only_the_holder_answers_for_its_name(nonce_offset: int) -> None:
    solo = Solo()
    holder = solo.join("a", 1)
    other = solo.join("b", 1)
    newcomer = solo.join("a", 2)
    solo.say(other if nonce_offset == 0 else holder, Pong(newcomer + nonce_offset))
    solo.say(other, Pong(other))
    assert not solo.is_closed(newcomer)


def test_nobody_is_asked_about_a_boot_that_another_has_replaced() -> None:
    solo = Solo()
    solo.join("a", 1)
    others = [solo.join("b"), solo.join("c")]
    solo.join("a", 2)
    for _ in range(4):
        solo.run(CHALLENGE_S / 4)
        for name, link in zip("bc", others, strict=True):
            solo.say(link, status(member(name)))
    assert solo.record_of("a") == member("a", 2)
    assert [request.generation for link in others for request in solo.heard(link, ProbeRequest)] == []


def test_a_newer_boot_takes_over_from_a_dead_one_at_once() -> None:
    solo = Solo()
    solo.lose(solo.join("a", 1))
    newcomer = solo.join("a", 2)
    assert not solo.is_closed(newcomer)
    assert solo.record_of("a") == member("a", 2)


def test_an_older_boot_is_refused() -> None:
    solo = Solo()
    solo.join("a", 5)
    link = solo.join("a", 4)
    assert goodbye_of(solo, link) is ErrorCode.INSTANCE_ID_IN_USE


def test_an_older_boot_than_one_that_has_ended_is_told_of_its_clock() -> None:
    solo = Solo()
    solo.lose(solo.join("a", 5))
    solo.run(60.0)
    link = solo.join("a", 4)
    (goodbye,) = solo.heard(link, Goodbye)
    assert goodbye.failure.code is ErrorCode.INSTANCE_ID_IN_USE
    assert "remembers a later boot of 'a'" in goodbye.failure.detail
    assert "Set the clock right" in goodbye.failure.detail


def test_a_boot_from_a_clock_gone_wrong_is_refused() -> None:
    solo = Solo()
    latest = int(1000 * (solo.now + WALL_OFFSET_S)) + GENERATIONS_MAX
    assert goodbye_of(solo, solo.join("a", latest + 1)) is ErrorCode.PROTOCOL_ERROR
    assert solo.record_of("a") is None
    solo.join("a", latest)
    assert solo.record_of("a") == member("a", latest)


def test_a_challenge_gets_its_time_after_a_stall_too() -> None:
    solo = Solo()
    holder = solo.join("a", 1)
    newcomer = solo.join("a", 2)
    solo.now += 30.0
    solo.say(holder, Pong(newcomer))
    assert goodbye_of(solo, newcomer) is ErrorCode.INSTANCE_ID_IN_USE


@pytest.mark.parametrize("generations", [(2, 3), (3, 2)])
def test_of_two_newcomers_that_wait_for_a_silent_holders_name_the_newest_gets_it(generations: tuple[int, int]) -> None:
    solo = Solo()
    solo.join("a", 1)
    links = {generation: solo.join("a", generation) for generation in generations}
    solo.run(3.0)
    record = solo.record_of("a")
    assert record is not None
    assert record.generation == 3
    assert solo.is_closed(links[2])
    assert not solo.is_closed(links[3])
