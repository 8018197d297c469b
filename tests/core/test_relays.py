"""What one tries out for others: bounded, in time, and answered once (protocol rule L10)."""

from p2pkv.core.messages import Ping, ProbeAnswer, ProbeRequest
from p2pkv.core.outbox import Outbox
from p2pkv.core.records import Reach
from p2pkv.core.relays import RELAYS_MAX, Relay, Relays
from p2pkv.core.timers import lan
from tests.core.builders import member
from tests.core.solo import Solo, status

NACK_S = lan(3).nack_share * lan(3).probe_timeout_s


def test_a_stall_of_ones_own_is_no_reason_for_a_nack() -> None:
    solo = Solo()
    links = {name: solo.join(name) for name in ("a", "b")}
    solo.say(links["b"], ProbeRequest(nonce=1, instance="a", generation=1))
    solo.now += 30.0
    solo.say(links["b"], status(member("b")))
    solo.run(0.01)
    assert solo.heard(links["b"], ProbeAnswer) == []
    solo.run(NACK_S)
    assert solo.heard(links["b"], ProbeAnswer) == [ProbeAnswer(1, Reach.SILENT)]


def test_a_repeated_question_takes_the_first_ones_place() -> None:
    solo = Solo()
    links = {name: solo.join(name) for name in ("a", "b")}
    for nonce in (1, 2):
        solo.say(links["b"], ProbeRequest(nonce, instance="a", generation=1))
    assert len(solo.heard(links["a"], Ping)) == 2
    solo.run(NACK_S)
    assert solo.heard(links["b"], ProbeAnswer) == [ProbeAnswer(2, Reach.SILENT)]


def test_a_lost_member_that_says_hello_again_is_reached() -> None:
    solo = Solo()
    links = {name: solo.join(name) for name in ("a", "b")}
    solo.lose(links["a"])
    solo.say(links["b"], ProbeRequest(nonce=1, instance="a", generation=1))
    solo.join("a")
    assert solo.heard(links["b"], ProbeAnswer) == [ProbeAnswer(1, Reach.REACHED)]


def test_there_is_a_limit_to_what_is_tried_at_a_time() -> None:
    relays = Relays(Outbox("me"))
    opened = [
        relays.open(Relay(f"i{number}", 1, "a", nonce=number, nack_at=1.0, ends_at=2.0)) for number in range(RELAYS_MAX + 2)
    ]
    assert opened == [True] * RELAYS_MAX + [False] * 2
    assert relays.open(Relay("i0", 2, "a", nonce=0, nack_at=1.0, ends_at=2.0)), "it had one before"
    relays.wake(2.0)
    assert relays.wakeup_at() == float("inf")
