"""SWIM, sentence by sentence: each test names its section, and says where we differ and why.

Source: Das, Gupta, Motivala, "SWIM: Scalable Weakly-consistent Infection-style Process Group Membership Protocol", DSN 2002.
"""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from p2pkv.core.dials import HASTE_S
from p2pkv.core.effects import SendMessage
from p2pkv.core.messages import MemberTable, Ping, Pong, ProbeAnswer, ProbeRequest, Rumour, Rumours, Status
from p2pkv.core.records import MemberState, Reach
from p2pkv.core.rotation import Rotation
from p2pkv.core.rumours import INCARNATIONS_MAX, Dissemination, nbytes_of, overrules
from p2pkv.core.timers import lan
from tests.core.builders import address_of, member
from tests.core.cluster import Cluster
from tests.core.solo import ME, Solo, dialed, status

ALIVE, SUSPECT, DEAD, LEFT = MemberState.ALIVE, MemberState.SUSPECT, MemberState.DEAD, MemberState.LEFT


def say(name: str, state: MemberState, incarnation: int = 0, *, generation: int = 1, origin: str = "z") -> Rumour:
    """Someone's word about `name`."""
    return Rumour(name, generation, incarnation, state, ws=address_of(name), origin=origin)


def rumours_to(solo: Solo, link: int) -> list[Rumour]:
    """All that a peer was ever told of members."""
    return [rumour for each in solo.heard(link, Rumours) for rumour in each.rumours]


# --- 3.1: the failure detector --------------------------------------------------------------------------------------------


def test_3_1_a_member_is_selected_each_period_and_a_ping_is_sent_to_it() -> None:
    solo = Solo()
    link = solo.join("a")
    for _ in range(10):
        solo.say(link, status(member("a")))
        solo.run(lan(2).probe_interval_s)
        solo.say(link, Pong(solo.heard(link, Ping)[-1].nonce))
    assert len(solo.heard(link, Ping)) == 10


def joined(solo: Solo, *names: str) -> dict[str, int]:
    return {name: solo.join(name) for name in names}


def silence(solo: Solo, links: dict[str, int], silent: str, seconds: float) -> None:
    """All but one go on talking, and answer pings."""
    answered = {name: len(solo.heard(link, Ping)) for name, link in links.items()}
    for _ in range(round(seconds / 0.1)):
        solo.run(0.1)
        for name, link in links.items():
            if name != silent:
                for ping in solo.heard(link, Ping)[answered[name] :]:
                    solo.say(link, Pong(ping.nonce))
                answered[name] = len(solo.heard(link, Ping))
                solo.say(link, status(member(name)))


def asked_about(solo: Solo, links: dict[str, int], silent: str, helper: str) -> ProbeRequest:
    """One falls silent, until another is asked about it."""
    while not (requests := solo.heard(links[helper], ProbeRequest)):
        silence(solo, links, silent, 0.1)
    return requests[0]


def test_3_1_without_an_ack_k_others_are_asked_to_ping_it() -> None:
    solo = Solo()
    links = joined(solo, "a", "b", "c", "d", "e")
    silence(solo, links, "a", 2.5)
    asked = [request for name, link in links.items() if name != "a" for request in solo.heard(link, ProbeRequest)]
    assert len(asked) == lan(6).indirect_count == 3
    assert {(request.instance, request.generation) for request in asked} == {("a", 1)}


def test_3_1_who_is_asked_pings_and_passes_the_ack_on() -> None:
    solo = Solo()
    links = joined(solo, "a", "b")
    solo.say(links["b"], ProbeRequest(nonce=7, instance="a", generation=1))
    (ping,) = solo.heard(links["a"], Ping)
    assert solo.heard(links["b"], ProbeAnswer) == []
    solo.say(links["a"], Pong(ping.nonce))
    assert solo.heard(links["b"], ProbeAnswer) == [ProbeAnswer(nonce=7, reach=Reach.REACHED)]


def test_3_1_an_ack_by_way_of_another_is_as_good_as_one_of_its_own() -> None:
    solo = Solo()
    links = joined(solo, "a", "b")
    request = asked_about(solo, links, "a", "b")
    solo.say(links["b"], ProbeAnswer(request.nonce, Reach.REACHED))
    silence(solo, links, "a", 0.4)
    assert solo.state_of("a") is ALIVE


@pytest.mark.parametrize("reach", [Reach.SILENT, Reach.REFUSED, None])
def test_3_1_without_any_ack_at_the_periods_end_it_has_failed(reach: Reach | None) -> None:
    """Where we differ: 4.2 comes in, so it is a suspect first. A dial refused says nothing while there is a link."""
    solo = Solo()
    links = joined(solo, "a", "b")
    request = asked_about(solo, links, "a", "b")
    if reach is not None:
        solo.say(links["b"], ProbeAnswer(request.nonce, reach))
    silence(solo, links, "a", 0.5)
    assert solo.state_of("a") is SUSPECT


def test_3_1_a_stranger_to_a_probe_answers_for_nobody() -> None:
    solo = Solo()
    links = joined(solo, "a", "b", "c")
    request = asked_about(solo, links, "a", "b")
    solo.say(links["a"], ProbeAnswer(request.nonce, Reach.REFUSED))
    solo.say(links["b"], ProbeAnswer(request.nonce + 1, Reach.REACHED))
    solo.say(links["c"], Pong(request.nonce))
    silence(solo, links, "a", 0.5)
    assert solo.state_of("a") is SUSPECT


# --- where we differ from 3.1: a closed link is evidence ------------------------------------------------------------------


def test_a_closed_link_starts_a_redial_and_indirect_probes_at_once() -> None:
    solo = Solo()
    links = joined(solo, "a", "b", "c", "d")
    solo.lose(links["a"])
    asked = [name for name in "bcd" if solo.heard(links[name], ProbeRequest)]
    assert len(asked) == 3
    solo.run(0.05)
    assert dialed(solo) == [address_of("a")]


def test_who_was_refused_by_all_that_tried_is_dead_without_a_suspicion() -> None:
    cluster = Cluster("a", "b", "c", "d")
    cluster.crash("a")
    cluster.run(0.2)
    assert [cluster.states(name)["a"] for name in "bcd"] == [DEAD] * 3
    assert not any(rumour.state is SUSPECT for name in "bcd" for said in cluster.sent(name, Rumours) for rumour in said.rumours)


def test_a_member_that_another_still_reaches_lives() -> None:
    """Two that lost sight of each other, and a third that sees both: for as long as it takes."""
    cluster = Cluster("a", "b", "c")
    cluster.cut("a", "b")
    for _ in range(60):
        cluster.run(1.0)
        assert set(cluster.states("a").values()) == set(cluster.states("b").values()) == {ALIVE}
    cluster.mend()
    cluster.run(6.0)
    assert all(len(node.links) == 2 for node in cluster.nodes.values())


def test_who_was_refused_answers_so_at_once() -> None:
    solo = Solo()
    links = joined(solo, "a", "b", "c")
    solo.lose(links["a"])
    solo.say(links["b"], ProbeRequest(nonce=1, instance="a", generation=1))
    assert solo.heard(links["b"], ProbeAnswer) == []
    solo.run(0.1)
    solo.say_refused("a")
    solo.say(links["c"], ProbeRequest(nonce=2, instance="a", generation=1))
    answers = [each for name in "bc" for each in solo.heard(links[name], ProbeAnswer)]
    assert answers == [ProbeAnswer(1, Reach.REFUSED), ProbeAnswer(2, Reach.REFUSED)]


# --- 4.1: dissemination ---------------------------------------------------------------------------------------------------


def test_4_1_a_rumour_is_passed_on_lambda_log_n_times() -> None:
    timers = lan(100)
    news = Dissemination(ME)
    news.spread(say("a", DEAD))
    taken = [news.take(timers) for _ in range(timers.retransmits + 1)]
    assert timers.retransmits == 4 * 3, "4 * ceil(log10(101))"
    assert taken == [(say("a", DEAD),)] * timers.retransmits + [()]


def test_4_1_what_was_passed_on_least_goes_first() -> None:
    news = Dissemination(ME)
    news.spread(say("a", ALIVE))
    first = nbytes_of(say("a", ALIVE))
    narrow = replace(lan(100), rumours_nbytes=first)
    news.take(narrow)
    news.spread(say("b", ALIVE))
    assert news.take(narrow) == (say("b", ALIVE),)


def test_4_1_ends_go_before_suspicions_and_ones_own_word_before_all() -> None:
    news = Dissemination(ME)
    for rumour in (say("a", ALIVE), say("b", SUSPECT), say("c", DEAD), say(ME, ALIVE)):
        news.spread(rumour)
    assert [rumour.instance for rumour in news.take(lan(100))] == [ME, "c", "b", "a"]


def test_4_1_a_message_has_a_budget_of_bytes() -> None:
    news = Dissemination(ME)
    for number in range(1000):
        news.spread(say(f"i{number:03}", ALIVE))
    timers = lan(1000)
    seen: Counter[str] = Counter()
    while rumours := news.take(timers):
        assert sum(map(nbytes_of, rumours)) <= timers.rumours_nbytes
        seen.update(rumour.instance for rumour in rumours)
    assert set(seen.values()) == {timers.retransmits}
    assert len(seen) == 1000
    assert len(news) == 0


def test_4_1_a_newer_word_takes_an_older_ones_place() -> None:
    news = Dissemination(ME)
    news.spread(say("a", SUSPECT, 1))
    news.spread(say("a", ALIVE, 2))
    assert news.take(lan(3)) == (say("a", ALIVE, 2),)


# --- 4.2: suspicion, and which word counts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "known", "counts"),
    [
        ((ALIVE, 2), (SUSPECT, 1), True),
        ((ALIVE, 1), (SUSPECT, 1), False),
        ((ALIVE, 2), (ALIVE, 1), True),
        ((ALIVE, 1), (ALIVE, 1), False),
        ((SUSPECT, 2), (SUSPECT, 1), True),
        ((SUSPECT, 1), (SUSPECT, 1), False),
        ((SUSPECT, 1), (ALIVE, 1), True),
        ((SUSPECT, 0), (ALIVE, 1), False),
        ((DEAD, 1), (ALIVE, 1), True),
        ((DEAD, 1), (SUSPECT, 1), True),
    ],
)
def test_4_2_the_order_of_words(told: tuple[MemberState, int], known: tuple[MemberState, int], *, counts: bool) -> None:
    assert overrules(say("a", *told), *known) is counts


@pytest.mark.parametrize(
    ("told", "known", "counts"),
    [
        ((DEAD, 0), (ALIVE, 1), False),
        ((ALIVE, 2), (DEAD, 1), True),
        ((LEFT, 1), (DEAD, 1), True),
        ((DEAD, 1), (LEFT, 1), False),
    ],
)
def test_4_2_where_we_differ_the_dead_may_come_back(
    told: tuple[MemberState, int], known: tuple[MemberState, int], *, counts: bool
) -> None:
    """In the paper Confirm overrides every incarnation. But a partition's dead are alive, and must be able to say so."""
    assert overrules(say("a", *told), *known) is counts


@pytest.mark.parametrize("state", [SUSPECT, DEAD, LEFT])
def test_4_2_a_suspected_member_refutes_with_a_higher_incarnation(state: MemberState) -> None:
    solo = Solo()
    links = joined(solo, "a", "b")
    mine = solo.machine.members()[-1]
    assert mine.instance == ME
    solo.say(links["a"], Rumours((say(ME, state, mine.incarnation + 3, origin="b"),)))
    assert say(ME, ALIVE, mine.incarnation + 4, origin=ME) in rumours_to(solo, links["a"]), "who told it, hears it at once"
    solo.run(1.0)
    assert say(ME, ALIVE, mine.incarnation + 4, origin=ME) in rumours_to(solo, links["b"])
    assert solo.heard(links["b"], Status)[-1].me.incarnation >= mine.incarnation + 4


def test_4_2_only_a_member_itself_raises_its_incarnation() -> None:
    solo = Solo()
    links = joined(solo, "a", "b")
    solo.say(links["b"], Rumours((say("a", SUSPECT, 5),)))
    solo.run(1.0)
    assert {rumour.incarnation for rumour in rumours_to(solo, links["b"]) if rumour.instance == "a"} <= {0, 5}


def test_4_2_a_suspect_that_refutes_is_alive() -> None:
    solo = Solo()
    links = joined(solo, "a", "b")
    solo.say(links["b"], Rumours((say("a", SUSPECT),)))
    assert solo.state_of("a") is SUSPECT
    solo.say(links["b"], Rumours((say("a", ALIVE, 1, origin="a"),)))
    assert solo.state_of("a") is ALIVE


def test_4_2_a_suspects_own_newer_status_refutes_too() -> None:
    """Where we differ: an incarnation is a version of one's record as well, so any newer word of its own will do."""
    solo = Solo()
    links = joined(solo, "a", "b")
    solo.say(links["b"], Rumours((say("a", SUSPECT),)))
    solo.say(links["a"], status(member("a")))
    assert solo.state_of("a") is SUSPECT
    solo.say(links["a"], status(replace(member("a"), incarnation=1)))
    assert solo.state_of("a") is ALIVE


def test_4_2_a_suspect_that_doesnt_refute_is_dead() -> None:
    solo = Solo()
    links = joined(solo, "a", "b")
    silence(solo, links, "a", lan(3).silence_s + lan(3).probe_interval_s + lan(3).suspicion_max_s + 0.3)
    assert solo.state_of("a") is DEAD
    assert say("a", DEAD, origin=ME) in rumours_to(solo, links["b"])


def test_4_2_where_we_differ_nobody_declares_dead_whom_it_hears() -> None:
    solo = Solo()
    links = joined(solo, "a", "b")
    solo.say(links["b"], Rumours((say("a", DEAD),)))
    assert solo.state_of("a") is SUSPECT
    silence(solo, links, "nobody", 3 * lan(3).suspicion_max_s)
    assert solo.state_of("a") is SUSPECT
    silence(solo, links, "a", lan(3).suspicion_max_s + 2 * lan(3).silence_s)
    assert solo.state_of("a") is DEAD


def test_4_2_where_we_differ_who_suspects_one_that_is_known_dead_is_told_so() -> None:
    solo = Solo()
    links = joined(solo, "a", "b")
    silence(solo, links, "a", 2 * lan(3).suspicion_max_s)
    assert solo.state_of("a") is DEAD
    told = [each.message for each in solo.say(links["b"], Rumours((say("a", SUSPECT),))) if isinstance(each, SendMessage)]
    assert [rumour.state for message in told if isinstance(message, Rumours) for rumour in message.rumours] == [DEAD]
    assert not [each for each in solo.say(links["b"], Rumours((say("a", DEAD),))) if isinstance(each, SendMessage)]


# --- 4.3: time-bounded completeness ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_4_3_every_member_is_probed_within_two_rounds(seed: int) -> None:
    rotation = Rotation(Random(str(seed)))
    names = [f"i{number}" for number in range(20)]
    for name in names:
        rotation.add(name)
    turns = [rotation.next({}) for _ in range(400)]
    for name in names:
        at = [index for index, each in enumerate(turns) if each == name]
        assert len(at) == 20
        assert max(later - earlier for earlier, later in pairwise(at)) <= 2 * len(names) - 1


def test_4_3_a_newcomer_has_its_turn_in_this_round_and_who_is_gone_has_none() -> None:
    rotation = Rotation(Random("x"))
    for name in "abc":
        rotation.add(name)
    first = rotation.next({})
    rotation.add("d")
    rotation.remove("c")
    assert sorted(filter(None, (rotation.next({}) for _ in range(2 + (first == "c"))))) == sorted({*"abd"} - {first})
    assert rotation.next({"a": 0, "b": 0, "d": 0}) is None
    assert Rotation(Random("x")).next({}) is None


# --- 5, and memberlist: push-pull, the dead, other boots ------------------------------------------------------------------


def test_two_exchange_all_that_they_know_now_and_then() -> None:
    solo = Solo()
    links = joined(solo, "a", "b")
    silence(solo, links, "nobody", lan(3).push_pull_s)
    tables = [table for link in links.values() for table in solo.heard(link, MemberTable)]
    assert [table.is_answer for table in tables] == [False] * len(tables)
    assert tables
    assert {rumour.instance for rumour in tables[0].rumours} == {ME, "a", "b"}
    solo.say(links["a"], MemberTable(is_answer=False, rumours=(say("a", ALIVE), say("new", ALIVE))))
    assert solo.heard(links["a"], MemberTable)[-1].is_answer
    solo.run(0.05)
    assert dialed(solo) == [address_of("new")]


def test_a_death_in_a_table_is_a_suspicion() -> None:
    """memberlist, mergeState: a table may be older than the last refutation."""
    solo = Solo()
    links = joined(solo, "a", "b")
    solo.lose(links["a"])
    solo.say(links["b"], MemberTable(is_answer=True, rumours=(say("a", DEAD),)))
    assert solo.state_of("a") is SUSPECT


def test_a_death_by_hearsay_counts_where_one_hears_nothing_either() -> None:
    solo = Solo()
    links = joined(solo, "a", "b")
    solo.lose(links["a"])
    solo.say(links["b"], Rumours((say("a", DEAD),)))
    assert solo.state_of("a") is DEAD


def test_who_is_said_to_be_back_is_dialed_at_once() -> None:
    solo = Solo()
    links = joined(solo, "a", "b")
    solo.lose(links["a"])
    solo.say(links["b"], Rumours((say("a", DEAD),)))
    while not dialed(solo):
        solo.run(0.01)
    solo.run(HASTE_S)
    solo.say_refused("a")
    before = len(dialed(solo))
    solo.say(links["b"], Rumours((say("a", ALIVE, 1, origin="a"),)))
    assert solo.state_of("a") is DEAD, "hearsay makes nobody a member, and brings nobody back"
    solo.run(0.01)
    assert dialed(solo)[before:] == [address_of("a")]


def test_who_comes_back_is_told_what_it_was_held_for() -> None:
    """Others may hold it for dead too; its refutation is what they wait for."""
    solo = Solo()
    links = joined(solo, "a", "b")
    solo.lose(links["a"])
    solo.say(links["b"], Rumours((say("a", DEAD),)))
    again = solo.join("a")
    assert rumours_to(solo, again)[0] == say("a", DEAD, origin=ME)


@pytest.mark.parametrize("state", list(MemberState))
@pytest.mark.parametrize("generation", [0, 2])
def test_a_word_of_another_boot_changes_nothing(state: MemberState, generation: int) -> None:
    solo = Solo()
    links = joined(solo, "a", "b")
    solo.lose(links["a"])
    solo.say(links["b"], Rumours((say("a", state, 9, generation=generation), say(ME, state, 9, generation=2 * generation))))
    assert solo.state_of("a") is ALIVE
    record = solo.record_of(ME)
    assert record is not None
    assert record.incarnation < 9


def test_a_forged_incarnation_says_nothing() -> None:
    solo = Solo()
    links = joined(solo, "a", "b")
    far = 2**62 - 1
    solo.say(links["b"], Rumours((say("a", DEAD, far), say("a", SUSPECT, INCARNATIONS_MAX + 1), say(ME, DEAD, far))))
    assert solo.state_of("a") is ALIVE
    record = solo.record_of(ME)
    assert record is not None
    assert record.incarnation < INCARNATIONS_MAX


def test_rumours_of_strangers_cost_no_more_than_a_dial() -> None:
    solo = Solo()
    links = joined(solo, "a")
    for state in MemberState:
        solo.say(links["a"], Rumours(tuple(say(f"{state}{number}", state) for number in range(64))))
    assert [record.instance for record in solo.machine.members()] == ["a", ME]
    assert rumours_to(solo, links["a"]) == []
