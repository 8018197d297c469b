"""The machine as a whole: its contract with the shell, and what it promises whatever happens."""

import os
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from hashlib import blake2b
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from p2pkv.core.directory import Held
from p2pkv.core.effects import FetchChunks, InventoryDoubted, MemberChanged, SendMessage, Stop
from p2pkv.core.events import EngineAttached, LeaveRequested, LinkLost
from p2pkv.core.gossip import ASK_AGAIN_S, FLUSH_S, REST_S, STATUS_S
from p2pkv.core.messages import (
    CHANGE_NBYTES,
    RANGE_NBYTES,
    EventReport,
    FetchReport,
    InventoryDelta,
    InventoryDigest,
    InventoryPage,
    InventoryRequest,
    Leaving,
    Offer,
    Ping,
    PlanAnswer,
    PlanRequest,
    Pong,
    RangeRequest,
    Status,
    Take,
    TakeAnswer,
)
from p2pkv.core.moves.handover import TAKE_ANSWER_S
from p2pkv.core.records import MemberState, Operation, Selection
from p2pkv.core.rows import FINGERPRINT_MAX, ROW_NBYTES, pack, unpack
from tests.core.builders import (
    CHUNK_SIZE,
    CPU,
    IDENTITY,
    LEASE_S,
    LEAVE_S,
    NAMESPACE,
    chunks_of,
    entry,
    event_id,
    member,
    prompt,
)
from tests.core.cluster import CLIENT, Cluster
from tests.core.solo import ME, Solo

# --- time -----------------------------------------------------------------------------------------------------------------


def test_there_is_always_a_next_deadline_and_waking_early_does_nothing() -> None:
    solo = Solo()
    solo.join("a")
    solo.run(1.5)
    due_at = solo.machine.wakeup_at()
    assert solo.now < due_at < inf
    assert solo.machine.wake(solo.now) == []
    assert solo.machine.wakeup_at() == due_at


def test_a_status_and_a_probe_each_second_is_all_that_an_idle_pair_says() -> None:
    cluster = Cluster("a", "b")
    cluster.run(1.0)
    cluster.done.clear()
    cluster.run(10 * STATUS_S)
    said = Counter(type(effect.message) for _, effect in cluster.done if isinstance(effect, SendMessage))
    assert said == {Status: 20, Ping: 20, Pong: 20}


def test_what_was_forgotten_may_still_happen() -> None:
    """Events of links that the machine has closed are no surprise."""
    solo = Solo()
    assert solo.happen(LinkLost(99, "never opened here")) == []
    assert solo.say(99, Leaving(generation=1)) == []


# --- whatever happens -----------------------------------------------------------------------------------------------------

KINDS = [PlanRequest, PlanAnswer, Offer, FetchChunks, FetchReport, Take, TakeAnswer, EventReport, Status, InventoryDelta]
NAMES = ["a", "b", "c"]
PROMPTS = [prompt(3), prompt(4), prompt(10), prompt(12), prompt(9, first=2), prompt(6, first=50)]


def misbehave(cluster: Cluster, data: st.DataObject) -> None:
    """One thing that users, engines or the network may do, but for crashes."""
    name, other = data.draw(st.sampled_from(NAMES)), data.draw(st.sampled_from(NAMES))
    tokens = data.draw(st.sampled_from(PROMPTS))
    events = cluster.nodes[name].machine.events()
    match data.draw(
        st.sampled_from(["store", "store", "move", "move", "copy", "all", "ask", "cancel", "rule", "time", "release"])
    ):
        case "store":
            cluster.store(name, tokens)
        case "move":
            cluster.start(name, other, tokens, by=data.draw(st.sampled_from(NAMES)))
        case "copy":
            cluster.start(name, other, tokens, operation=Operation.COPY)
        case "all":
            cluster.start(name, other, selection=Selection.ALL)
        case "ask" if events:
            cluster.ask_event(other, data.draw(st.sampled_from(events)).event_id)
        case "cancel" if events:
            cluster.cancel(other, data.draw(st.sampled_from(events)).event_id)
        case "rule":
            kind, times = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(1, 3))
            rules = [cluster.hold] if kind is FetchChunks else [cluster.lose, cluster.hold, cluster.repeat]
            data.draw(st.sampled_from(rules))(kind, times)
        case "time":
            cluster.run(data.draw(st.sampled_from([0.02, 1.0, 11.0])))
        case "release":
            cluster.release()


@given(st.data())
def test_whatever_happens_nothing_is_lost_and_everything_ends(data: st.DataObject) -> None:
    cluster = Cluster(*NAMES)
    stored: dict[bytes, None] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        misbehave(cluster, data)
        stored.update((key, None) for node in cluster.nodes.values() for key in node.resident)
    cluster.release()
    cluster.heal()
    cluster.run(LEASE_S + TAKE_ANSWER_S)
    held = {key for node in cluster.nodes.values() for key in node.resident}
    assert held == set(stored), "a chunk is lost"
    for node in cluster.nodes.values():
        for event in node.machine.events():
            counts = event.chunks
            assert event.state.is_final or node.name not in (event.old_position.instance, event.coordinator)
            assert (
                not event.state.is_final
                or counts.found == counts.moved + counts.already_there + counts.shared_kept + counts.failed
            )
        for other in cluster.nodes.values():
            assert node.machine.inventory_of(other.name) == other.machine.inventory_of(other.name)
    assert cluster.answers.keys() == cluster.asked.keys(), "each request is answered, once"
    cluster.assert_at_rest()


def story() -> str:
    """Digest of all that a few busy machines order."""
    cluster = Cluster("a", "b", "c", "d")
    for number in range(6):
        cluster.store("a", prompt(10 + number, first=10 * number))
    cluster.lose(TakeAnswer, times=1)
    for number in range(6):
        cluster.start("a", "bcd"[number % 3], prompt(10 + number, first=10 * number), by="abcd"[number % 4])
    cluster.run(5.0)
    cluster.crash("b")
    cluster.run(5.0)
    cluster.leave("c")
    cluster.run(5.0)
    return blake2b(repr(cluster.done).encode()).hexdigest()


def test_what_a_machine_orders_doesnt_depend_on_how_python_hashes() -> None:
    digests = set()
    for hash_seed in ("0", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", "from tests.core.test_machine import story; print(story())"]
        digests.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert digests == {story() + "\n"}


# --- questions ------------------------------------------------------------------------------------------------------------


def test_a_lookup_sees_the_living_and_only_what_they_have_told() -> None:
    cluster = Cluster("a", "b", "c")
    cluster.store("a", prompt(10))
    cluster.store("b", prompt(6))
    cluster.run(1.0)
    seen = cluster.nodes["c"].machine.lookup(prompt(12), None, IDENTITY)
    assert seen == (Held("a", CPU, 10), Held("b", CPU, 6))
    cluster.crash("a")
    cluster.run(4.0)
    assert cluster.nodes["c"].machine.lookup(prompt(12), None, IDENTITY) == (Held("b", CPU, 6),)
    cluster.boot("a")
    cluster.run(1.0)
    assert cluster.nodes["c"].machine.lookup(prompt(12), None, IDENTITY) == (Held("b", CPU, 6),)


def test_what_is_held_here_is_seen_at_once() -> None:
    solo = Solo()
    solo.attach()
    solo.store(prompt(6))
    assert solo.machine.lookup(prompt(12), "tiny", IDENTITY) == (Held(ME, CPU, 6),)
    assert solo.machine.lookup(prompt(12), "huge", IDENTITY) == ()
    assert solo.held_tokens(prompt(12)) == 6


def test_members_are_listed_by_name_with_how_full_they_are() -> None:
    solo = Solo()
    solo.join("z")
    solo.attach()
    solo.store(prompt(10))
    me, z = solo.machine.members()
    assert (me.instance, z.instance) == (ME, "z")
    (status,) = me.locations
    assert (status.location, status.chunk_count, status.nbytes) == (CPU, 3, 3 * 4096)


def test_what_isnt_known_is_none_or_empty() -> None:
    solo = Solo()
    assert solo.machine.event(event_id("a", "b", "c")) is None
    assert solo.machine.lane_grant(event_id("a", "b", "c")) is None
    assert solo.machine.inventory_of("nobody") == ()
    assert solo.machine.events() == ()


# --- inventories ----------------------------------------------------------------------------------------------------------


def status_of(name: str, sequence: int, entry_count: int, entry_sum: int) -> Status:
    return Status(me=member(name), sequence=sequence, entry_count=entry_count, entry_sum=entry_sum)


def delta(first_sequence: int, *fingerprints: int) -> InventoryDelta:
    changes = b"".join(pack(entry(each), present=True) for each in fingerprints)
    return InventoryDelta(generation=1, first_sequence=first_sequence, changes=changes)


def page_of(sequence: int, *fingerprints: int) -> InventoryPage:
    entries = b"".join(pack(entry(each), present=True) for each in fingerprints)
    return InventoryPage(generation=1, sequence=sequence, first=0, last=FINGERPRINT_MAX, entries=entries)


def test_changes_are_told_together_and_soon() -> None:
    solo = Solo()
    link = solo.join("a")
    solo.attach()
    solo.store(prompt(4))
    solo.store(prompt(8))
    assert solo.heard(link, InventoryDelta) == []
    solo.run(FLUSH_S)
    (told,) = solo.heard(link, InventoryDelta)
    fingerprints, _ = unpack(told.changes)
    assert fingerprints.tolist() == [chunk.fingerprint for chunk in chunks_of(prompt(8))]


def test_a_gap_is_asked_for() -> None:
    solo = Solo()
    link = solo.join("a")
    solo.say(link, delta(1, 10))
    solo.say(link, delta(3, 30))
    assert solo.heard(link, InventoryRequest)[1:] == [InventoryRequest(generation=1, sequence=1)]
    assert solo.machine.inventory_of("a") == (entry(10),)
    solo.say(link, delta(2, 20, 30))
    assert solo.machine.inventory_of("a") == (entry(10), entry(20), entry(30))


def test_a_view_that_lags_or_differs_is_asked_for() -> None:
    solo = Solo()
    link = solo.join("a")
    assert not solo.machine.is_view_complete()
    solo.run(ASK_AGAIN_S)
    solo.say(link, status_of("a", sequence=2, entry_count=2, entry_sum=1))
    assert solo.heard(link, InventoryRequest) == 2 * [InventoryRequest(generation=1, sequence=0)]
    solo.say(link, delta(1, 10, 20))
    assert solo.machine.is_view_complete()
    solo.say(link, status_of("a", sequence=2, entry_count=3, entry_sum=1))
    assert solo.heard(link, InventoryRequest)[2:] == [InventoryRequest(generation=0, sequence=0)]
    assert [each.instance for each in solo.effects(InventoryDoubted)] == ["a"]
    assert not solo.machine.is_view_complete()
    ranges = struct.pack("<QQ", 3, 7)
    solo.say(link, InventoryDigest(generation=1, sequence=2, ranges=ranges))
    assert solo.machine.inventory_of("a") == (), "a wrong view answers misses, not guesses"
    assert solo.heard(link, RangeRequest) == [RangeRequest(generation=1, first=0, last=FINGERPRINT_MAX)]
    solo.say(link, page_of(2, 10, 20, 30))
    assert solo.machine.inventory_of("a") == (entry(10), entry(20), entry(30))
    assert solo.machine.is_view_complete()


def test_who_holds_nothing_says_so_at_once() -> None:
    solo = Solo(generation=1)
    link = solo.join("a")
    solo.say(link, InventoryRequest(generation=1, sequence=0))
    assert solo.heard(link, InventoryDelta) == [InventoryDelta(generation=1, first_sequence=1, changes=b"")]
    assert not solo.machine.is_view_complete()
    solo.say(link, delta(1))
    assert solo.machine.is_view_complete(), "a second earlier than its first status comes"


def test_an_inventory_that_is_never_right_is_fetched_ever_more_seldom() -> None:
    solo = Solo()
    link = solo.join("a")
    solo.say(link, delta(1, 10))
    for _ in range(300):
        solo.say(link, status_of("a", sequence=1, entry_count=2, entry_sum=1))
        solo.say(link, InventoryDigest(generation=1, sequence=1, ranges=struct.pack("<QQ", 2, 1)))
        solo.say(link, page_of(1, 10))
        solo.run(1.0)
    assert 7 <= len(solo.effects(InventoryDoubted)) <= 10, "after 1, 2, 4, ... 64, 64 s"


def test_what_takes_more_memory_than_it_may_is_given_up_whole_and_said_to_be_missing() -> None:
    solo = Solo(views_nbytes=100 * ROW_NBYTES)
    a, b = solo.join("a"), solo.join("b")
    solo.say(b, delta(1, *range(20)))
    assert solo.machine.is_view_complete() is False, "nothing of a yet"
    solo.say(a, delta(1, *range(60)))
    assert solo.machine.is_view_complete()
    solo.say(a, delta(61, *range(100, 160)))
    assert [each.instance for each in solo.effects(InventoryDoubted)] == ["a"]
    assert (len(solo.machine.inventory_of("a")), len(solo.machine.inventory_of("b"))) == (0, 20)
    assert not solo.machine.is_view_complete()
    solo.say(a, delta(121, 1))
    assert solo.machine.inventory_of("a") == ()
    asked = len(solo.heard(a, InventoryRequest))
    for _ in range(int(REST_S) + 1):
        solo.say(a, status_of("a", sequence=121, entry_count=30, entry_sum=1))
        solo.say(b, status_of("b", sequence=20, entry_count=20, entry_sum=0))
        solo.run(1.0)
    assert solo.heard(a, InventoryRequest)[asked:] != [], "there is room for it now"


def test_who_asks_without_end_gets_its_turn_and_no_more() -> None:
    solo = Solo()
    one, other = solo.join("a"), solo.join("b")
    solo.attach()
    solo.store(prompt(8))
    for _ in range(1000):
        solo.say(one, InventoryRequest(generation=0, sequence=0))
    solo.say(other, InventoryRequest(generation=0, sequence=0))
    solo.run(0.01)
    assert len(solo.heard(one, InventoryDigest)) == 2
    assert len(solo.heard(other, InventoryDigest)) == 1


def test_a_dead_members_inventory_is_out_of_sight_and_comes_back_with_it() -> None:
    cluster = Cluster("a", "b")
    cluster.store("a", prompt(8))
    cluster.run(1.0)
    held = (Held("a", CPU, 8),)
    assert cluster.nodes["b"].machine.lookup(prompt(8), None, IDENTITY) == held
    cluster.cut("a", "b")
    cluster.run(5.0)
    assert cluster.states("b")["a"] is MemberState.DEAD
    assert cluster.nodes["b"].machine.lookup(prompt(8), None, IDENTITY) == ()
    cluster.lose(InventoryDelta)
    cluster.lose(InventoryPage)
    cluster.mend()
    cluster.run(30.0)
    assert cluster.nodes["b"].machine.lookup(prompt(8), None, IDENTITY) == held, "nothing had to be sent"


def test_a_request_is_answered_with_what_is_missing() -> None:
    solo = Solo()
    link = solo.join("a")
    solo.attach()
    solo.store(prompt(8))
    solo.say(link, InventoryRequest(generation=1, sequence=1))
    (told,) = solo.heard(link, InventoryDelta)
    assert (told.first_sequence, len(told.changes)) == (2, CHANGE_NBYTES)
    solo.run(0.1)
    solo.say(link, InventoryRequest(generation=99, sequence=1))
    solo.run(0.1)
    (digest,) = solo.heard(link, InventoryDigest)
    assert (digest.sequence, len(digest.ranges)) == (2, RANGE_NBYTES)
    solo.say(link, RangeRequest(generation=1, first=0, last=FINGERPRINT_MAX))
    (page,) = solo.heard(link, InventoryPage)
    assert (page.sequence, len(page.entries)) == (2, 2 * CHANGE_NBYTES)


def test_who_joins_last_soon_knows_all_chunks_of_all_others() -> None:
    names, chunk_count = ("a", "b", "c", "d"), 600
    cluster = Cluster(*names, log_changes=50)
    for index, name in enumerate(names):
        cluster.store(name, prompt(CHUNK_SIZE * chunk_count, first=10**6 * index))
    joined = cluster.boot("e")
    cluster.run(2.0)
    for name in names:
        assert len(joined.machine.inventory_of(name)) == chunk_count
        assert joined.machine.inventory_of(name) == cluster.nodes[name].machine.inventory_of(name)
    assert joined.machine.is_view_complete()


# --- leaving --------------------------------------------------------------------------------------------------------------


def test_a_node_that_leaves_says_goodbye_and_stops() -> None:
    cluster = Cluster("a", "b")
    cluster.leave("a")
    stop = cluster.nodes["a"].stop
    assert stop == Stop(None)
    assert cluster.states("b") == {"a": MemberState.LEFT, "b": MemberState.ALIVE}
    assert cluster.nodes["a"].machine.is_leaving
    cluster.run(LEAVE_S)
    assert [each.member.state for each in cluster.effects("b", MemberChanged)] == [MemberState.ALIVE, MemberState.LEFT]


def test_leaving_twice_is_leaving_once() -> None:
    solo = Solo()
    solo.happen(LeaveRequested())
    assert solo.happen(LeaveRequested()) == []
    solo.run(LEAVE_S)
    assert solo.effects(Stop) == [Stop(None)]


def test_who_left_may_come_back_as_another_boot() -> None:
    cluster = Cluster("a", "b")
    cluster.leave("a")
    cluster.boot("a")
    cluster.run(1.0)
    assert cluster.states("b")["a"] is MemberState.ALIVE


def test_a_model_that_attaches_later_is_told_to_all_at_once() -> None:
    cluster = Cluster("a", "b")
    other = replace(NAMESPACE, model="other")
    cluster.ask("a", lambda request: EngineAttached(request, CLIENT, other, 0))
    assert cluster.nodes["b"].machine.members()[0].namespaces == (NAMESPACE, other)
