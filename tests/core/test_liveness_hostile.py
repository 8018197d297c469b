"""Lies about who lives: whatever members say, it costs no more than it must, and nobody's name or life is theirs to give."""

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pkv.core.effects import MemberChanged, OpenLink, SendMessage
from p2pkv.core.messages import LivenessMessage, MemberTable, Pong, ProbeAnswer, ProbeRequest, Rumour, Rumours
from p2pkv.core.records import MemberState, Reach
from tests.core.builders import address_of, member
from tests.core.solo import ME, Solo, status

PEERS = ("a", "b", "c")
NAMES = st.sampled_from([*PEERS, ME, "stranger"])
GENERATIONS = st.sampled_from([0, 1, 2, 2**63 - 1])
RUMOURS = st.builds(
    Rumour,
    NAMES,
    GENERATIONS,
    st.sampled_from([0, 1, 2, 2**20, 2**20 + 1, 2**62 - 1]),
    st.sampled_from(MemberState),
    ws=st.sampled_from([address_of(name) for name in ("a", ME, "stranger")]),
    origin=NAMES,
)
SAID = (
    st.builds(Rumours, st.lists(RUMOURS, min_size=1, max_size=5).map(tuple))
    | st.builds(MemberTable, st.booleans(), st.lists(RUMOURS, min_size=1, max_size=5).map(tuple))
    | st.builds(ProbeRequest, st.integers(0, 3), NAMES, GENERATIONS)
    | st.builds(ProbeAnswer, st.integers(0, 3), st.sampled_from(Reach))
    | st.builds(Pong, st.integers(0, 9))
)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(PEERS), SAID, st.sampled_from([0.0, 0.1, 1.0])), max_size=25))
def test_whatever_members_say_only_the_unheard_can_die_of_it(said: list[tuple[str, LivenessMessage, float]]) -> None:
    solo = Solo()
    links = {name: solo.join(name) for name in PEERS}
    for peer, message, seconds in said:
        ordered = solo.say(links[peer], message)
        assert sum(isinstance(each, SendMessage) for each in ordered) <= 8, "an answer, and a word to each suspect that is new"
        solo.run(seconds)
        for name, link in links.items():
            solo.say(link, status(member(name)))
    assert {record.instance for record in solo.machine.members()} == {*PEERS, ME}
    assert all(record.state.is_living for record in solo.machine.members())
    assert all(record.generation == 1 for record in solo.machine.members())
    assert all(change.member.state.is_living for change in solo.effects(MemberChanged))
    mine = solo.record_of(ME)
    assert mine is not None
    assert mine.incarnation <= 2**20 * (1 + len(said) * 5)


def test_strangers_told_of_again_and_again_cost_a_few_dials_a_second() -> None:
    solo = Solo()
    link = solo.join("a")
    about = Rumour("stranger", 1, 0, MemberState.ALIVE, ws=address_of("stranger"), origin="stranger")
    for _ in range(300):
        solo.say(link, Rumours((about,)))
        if any(isinstance(each, OpenLink) for each in solo.run(0.01)):
            solo.say_refused("stranger")
    assert 0 < len(solo.effects(OpenLink)) <= 10 * 3, "ten a second at most (L4)"
