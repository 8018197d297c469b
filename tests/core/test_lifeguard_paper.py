"""Lifeguard, sentence by sentence: each test names its section, and says where we differ and why.

Source: Dadgar, Phillips, Currey, "Lifeguard: Local Health Awareness for More Accurate Failure Detection", arXiv 1707.00788.
"""

from dataclasses import fields
from inspect import getsource
from math import log

import pytest

from p2pkv.core.health import LocalHealth
from p2pkv.core.messages import Ping, Pong, ProbeAnswer, ProbeRequest, Rumour, Rumours
from p2pkv.core.records import MemberState, Reach
from p2pkv.core.suspicion import Suspicion
from p2pkv.core.timers import CONFIRMATIONS, HEALTH_MAX, Timers, TimersOf, lan, local, wan
from tests.core.builders import address_of, member
from tests.core.solo import ME, Solo, status

ALIVE, SUSPECT, DEAD = MemberState.ALIVE, MemberState.SUSPECT, MemberState.DEAD


def suspect(name: str, origin: str, incarnation: int = 0) -> Rumours:
    """Somebody suspects `name`."""
    return Rumours((Rumour(name, 1, incarnation, SUSPECT, ws=address_of(name), origin=origin),))


# --- IV-A: LHA-Probe ------------------------------------------------------------------------------------------------------


def test_iv_a_the_score_goes_up_and_down_between_0_and_s() -> None:
    health = LocalHealth(HEALTH_MAX)
    health.probe_answered()
    assert (health.score, health.factor) == (0, 1)
    for _ in range(20):
        health.refuted()
    assert (health.score, health.factor) == (8, 9)
    health.probe_answered()
    assert health.score == 7


def test_iv_a_a_failed_probe_a_missed_nack_a_refutation_and_a_lag_count_against_one() -> None:
    """Where we differ: as in memberlist a failed probe counts itself only where nobody was asked, and the event loop counts."""
    health = LocalHealth(HEALTH_MAX)
    health.probe_failed(asked_count=0, nack_count=0)
    assert health.score == 1
    health.probe_failed(asked_count=3, nack_count=1)
    assert health.score == 3
    health.probe_failed(asked_count=3, nack_count=3)
    assert health.score == 3, "the others hear nothing either: it isn't us"
    health.refuted()
    health.lagged()
    assert health.score == 5


def test_iv_a_health_may_be_turned_off() -> None:
    health = LocalHealth(0)
    health.refuted()
    assert health.factor == 1


def test_iv_a_a_slow_nodes_probes_take_s_plus_1_times_as_long() -> None:
    solo = Solo()
    link = solo.join("a")
    for incarnation in range(HEALTH_MAX):  # it is suspected again and again: it must be slow
        solo.say(link, suspect(ME, "z", 100 * incarnation + 50))
    solo.run(1.0)
    (ping,) = solo.heard(link, Ping)
    for _ in range(89):
        solo.run(0.1)
        solo.say(link, status(member("a")))
    assert solo.heard(link, Ping) == [ping, ping], "asked again after 4.5 s instead of 0.5 s"
    assert solo.state_of("a") is ALIVE
    solo.run(0.2)
    assert solo.heard(link, Ping)[-1] != ping, "9 s instead of 1 s until the next"
    assert solo.state_of("a") is SUSPECT


def test_iv_a_who_is_asked_says_in_time_that_it_hears_nothing() -> None:
    solo = Solo()
    links = {name: solo.join(name) for name in ("a", "b")}
    timers = lan(3)
    solo.say(links["b"], ProbeRequest(nonce=5, instance="a", generation=1))
    solo.run(timers.nack_share * timers.probe_timeout_s - 0.01)
    assert solo.heard(links["b"], ProbeAnswer) == []
    solo.run(0.02)
    assert solo.heard(links["b"], ProbeAnswer) == [ProbeAnswer(5, Reach.SILENT)]
    solo.say(links["a"], Pong(solo.heard(links["a"], Ping)[0].nonce))
    assert solo.heard(links["b"], ProbeAnswer)[1:] == [ProbeAnswer(5, Reach.REACHED)], "late is better than never"
    solo.run(2.0)
    assert len(solo.heard(links["b"], ProbeAnswer)) == 2


@pytest.mark.parametrize("request_", [ProbeRequest(5, "stranger", 1), ProbeRequest(5, "a", 2), ProbeRequest(5, ME, 1)])
def test_iv_a_of_whom_one_doesnt_know_one_hears_nothing(request_: ProbeRequest) -> None:
    solo = Solo()
    link = solo.join("b")
    solo.join("a")
    solo.say(link, request_)
    assert solo.heard(link, ProbeAnswer) == [ProbeAnswer(5, Reach.SILENT)]


@pytest.mark.parametrize(("lags", "probes"), [(0, 6), (3, 2)])
def test_iv_a_a_lag_of_ones_own_event_loop_stretches_probes(lags: int, probes: int) -> None:
    """Where we differ: Lifeguard infers slowness from what doesn't arrive; a Python process measures it."""
    solo = Solo()
    link = solo.join("a")
    for _ in range(lags):
        solo.now = solo.machine.wakeup_at() + lan(2).lag_s + 0.01
        solo.run(0.0)
    solo.done.clear()
    for _ in range(60):
        solo.say(link, status(member("a")))
        solo.run(0.1)
        for ping in solo.heard(link, Ping)[-1:]:
            solo.say(link, Pong(ping.nonce))
    assert len(solo.heard(link, Ping)) == probes


# --- IV-B: LHA-Suspicion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confirmations", range(CONFIRMATIONS + 2))
def test_iv_b_the_time_shrinks_with_the_logarithm_of_the_confirmations(confirmations: int) -> None:
    timers = lan(100)
    suspicion = Suspicion("z", timers, 10.0)
    for number in range(confirmations):
        suspicion.confirm(f"i{number}")
    longest, shortest, k = timers.suspicion_max_s, timers.suspicion_min_s, timers.confirmations
    expected = max(shortest, longest - (longest - shortest) * log(confirmations + 1) / log(k + 1))
    assert suspicion.due_at - 10.0 == pytest.approx(expected)


def test_iv_b_only_independent_suspicions_confirm_and_the_first_k_are_passed_on() -> None:
    suspicion = Suspicion("a", lan(100), 0.0)
    assert [suspicion.confirm(origin) for origin in ("a", "b", "b", "c", "d", "e")] == [False, True, False, True, True, False]


def test_iv_b_where_there_is_nobody_to_confirm_the_time_is_the_shortest() -> None:
    assert Suspicion("a", lan(2), 0.0).due_at == lan(2).suspicion_min_s


def test_iv_b_confirmations_travel() -> None:
    solo = Solo()
    links = {name: solo.join(name) for name in "abcdef"}
    for origin in ("x", "y", "y"):
        solo.say(links["b"], suspect("a", origin))
    solo.run(0.9)
    rumours = [rumour for link in links.values() for said in solo.heard(link, Rumours) for rumour in said.rumours]
    assert {rumour.origin for rumour in rumours if rumour.state is SUSPECT} == {"x", "y"}


def test_iv_b_k_others_make_a_silent_member_dead_in_the_shortest_time() -> None:
    solo = Solo()
    links = {name: solo.join(name) for name in "abcdef"}
    solo.lose(links["a"])
    for origin in "bcde":
        solo.say(links["b"], suspect("a", origin))
    solo.run(lan(7).suspicion_min_s - 0.1)
    assert solo.state_of("a") is SUSPECT
    solo.run(0.2)
    assert solo.state_of("a") is DEAD


# --- IV-C: Buddy System ---------------------------------------------------------------------------------------------------


def test_iv_c_a_suspect_is_told_before_it_is_pinged() -> None:
    solo = Solo()
    links = {name: solo.join(name) for name in ("a", "b")}
    solo.say(links["b"], suspect("a", "b"))
    told = suspect("a", "b")
    assert solo.heard(links["a"], Rumours)[-1] == told, "at once, and ..."
    solo.done.clear()
    solo.run(3.0)
    to_suspect = [each for each in solo.heard(links["a"], object) if isinstance(each, Ping | Rumours)]
    pings = [index for index, each in enumerate(to_suspect) if isinstance(each, Ping)]
    assert pings
    assert all(to_suspect[index - 1] == told for index in pings), "... with each ping"


# --- the presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [lan, wan, local])
@pytest.mark.parametrize("n", [1, 2, 3, 10, 100, 1000])
def test_every_preset_makes_sense_at_every_size(preset: TimersOf, n: int) -> None:
    timers = preset(n)
    assert timers.probe_interval_s >= 2 * timers.probe_timeout_s, "those who are asked have as long as it had itself"
    assert 0 < timers.nack_share < 1
    assert timers.suspicion_max_s > timers.suspicion_min_s > timers.probe_interval_s
    assert timers.silence_s + timers.probe_interval_s < timers.close_silent_s < timers.suspicion_max_s
    assert 0 <= timers.confirmations <= max(0, n - 2)
    assert timers.retransmits >= 1
    assert timers.remember_s > timers.suspicion_max_s


def test_the_memberlist_figures_at_a_hundred_members() -> None:
    assert (lan(100).retransmits, local(100).retransmits) == (12, 6)
    assert [lan(n).push_pull_s for n in (32, 33, 100, 1000)] == [30.0, 60.0, 90.0, 180.0]
    assert wan(100).suspicion_min_s == 60.0
    assert lan(100).silence_s + lan(100).probe_interval_s + lan(100).suspicion_min_s < 10.0, "a silent one, known dead by all"


def test_every_parameter_says_what_it_does_and_where_it_comes_from() -> None:
    source = getsource(Timers)
    for field in fields(Timers):
        _, _, after = source.partition(f"    {field.name}: ")
        doc = after.partition("\n")[2].lstrip()
        assert doc.startswith('"""'), field.name
        doc = doc[3:].partition('"""')[0]
        assert any(origin in doc for origin in ("SWIM", "Lifeguard", "memberlist", "Ours")), field.name
