"""Fetching from a peer what an engine misses (protocol rules R1 to R6): from whom, when, and for how long it is awaited."""

from dataclasses import replace

import pytest

from p2pkv.core.chunks import PAGE_NBYTES
from p2pkv.core.effects import FetchChunks, Found
from p2pkv.core.events import EngineAttached, ShardsSealed
from p2pkv.core.ids import Address, InstanceId
from p2pkv.core.keys import Namespace
from p2pkv.core.messages import EventReport, FetchReport, InventoryDelta, PlanAnswer, PlanRequest, TakeAnswer
from p2pkv.core.moves.tcp_rate import FIRST_BYTES_PER_S, KEPT_S
from p2pkv.core.peer_fetch import FLIGHTS_MAX, LEAST_PATIENCE_S, RETRY_S, TCP_SETUP_S, WISHES_MAX
from p2pkv.core.records import EventRecord, EventState, HandoffAddress, Lane, Operation
from tests.core.builders import NAMESPACE, at, pack, prompt
from tests.core.cluster import CLIENT, Cluster

PROMPT = prompt(12)
TRANSFER = Address("elsewhere", 3)
OTHER_HOST = HandoffAddress(host_id="another", path="/lane")


def fetching(*names: InstanceId) -> Cluster:
    """Nodes that fetch from each other by handoff."""
    return Cluster(*names, peer_fetch=True)


def holding(*names: InstanceId) -> Cluster:
    """The same; a holds `PROMPT`, and all know it."""
    cluster = fetching(*names)
    store(cluster, "a")
    return cluster


def store(cluster: Cluster, name: InstanceId, tokens: bytes = PROMPT) -> None:
    cluster.store(name, tokens)
    cluster.run(0.1)


def plans(cluster: Cluster, name: InstanceId) -> list[PlanRequest]:
    """What flights to `name` have asked for; an event's repeats count once."""
    return list({each.event_id: each for each in cluster.sent(name, PlanRequest)}.values())


def flight(cluster: Cluster, name: InstanceId) -> EventRecord:
    """The event of the only flight to `name`."""
    (plan,) = plans(cluster, name)
    return cluster.event(name, plan.event_id)


# --- what is fetched (R1, R2) ---------------------------------------------------------------------------------------------


def test_what_is_missed_is_copied_from_the_peer_that_holds_it() -> None:
    cluster = holding("a", "b")
    assert cluster.look_up("b", PROMPT) == Found(0, is_fetching=True)
    assert cluster.look_up("b", PROMPT) == Found(12, is_fetching=False)
    event = flight(cluster, "b")
    assert (event.operation, event.state, event.old_position, event.new_position) == (
        Operation.COPY,
        EventState.DONE,
        at("a"),
        at("b"),
    )
    assert event.coordinator == "b"
    assert all(cluster.has("a", PROMPT))
    cluster.assert_at_rest()


def test_a_node_that_is_not_to_fetch_does_not() -> None:
    cluster = Cluster("a", "b")
    store(cluster, "a")
    assert cluster.look_up("b", PROMPT, source="a") == Found(0, is_fetching=False)
    assert plans(cluster, "b") == []


def test_only_what_is_missing_is_fetched() -> None:
    cluster = holding("a", "b")
    cluster.store("b", prompt(4))
    assert cluster.look_up("b", PROMPT) == Found(4, is_fetching=True)
    assert cluster.look_up("b", PROMPT) == Found(12, is_fetching=False)
    assert (flight(cluster, "b").chunks.moved, flight(cluster, "b").chunks.already_there) == (2, 1)


@pytest.mark.parametrize("asked", [prompt(8), prompt(12), prompt(12) + pack(7)])
def test_nothing_is_fetched_when_nobody_has_more(asked: bytes) -> None:
    cluster = holding("a", "b")
    cluster.store("b", PROMPT)
    assert not cluster.look_up("b", asked).is_fetching
    assert plans(cluster, "b") == []


def test_the_longest_prefix_is_fetched() -> None:
    cluster = fetching("a", "b", "c")
    store(cluster, "a", prompt(8))
    store(cluster, "c", PROMPT)
    assert cluster.look_up("b", PROMPT).is_fetching
    assert flight(cluster, "b").old_position == at("c")


def test_a_peer_of_this_host_comes_before_one_that_has_as_much() -> None:
    cluster = fetching("b", "z")
    cluster.boot("a", transfer=TRANSFER, handoff=OTHER_HOST)
    cluster.run(0.5)
    for holder in ("a", "z"):
        store(cluster, holder)
    assert cluster.look_up("b", PROMPT, prefill_tokens_per_s=1.0).is_fetching
    assert flight(cluster, "b").old_position == at("z")


def test_only_the_engines_very_namespace_is_of_use() -> None:
    other = replace(NAMESPACE, weights="1")
    cluster = holding("a", "b")
    for name in ("a", "b"):
        attach(cluster, name, other)
    store_as_other(cluster, "a", prompt(40))
    assert cluster.look_up("b", prompt(40)) == Found(0, is_fetching=True)
    assert cluster.look_up("b", prompt(40)) == Found(12, is_fetching=False)


def attach(cluster: Cluster, name: InstanceId, namespace: Namespace) -> None:
    """Attach a second engine."""
    cluster.ask(name, lambda request: EngineAttached(request, CLIENT + 1, namespace, 0))
    cluster.run(0.1)


def store_as_other(cluster: Cluster, name: InstanceId, tokens: bytes) -> None:
    """Have the second engine hold a prompt."""
    lent = cluster.lend(name, tokens, worker=1)
    keys = tuple(shard.key for shard in lent.shards)
    cluster.ask(name, lambda request: ShardsSealed(request, CLIENT + 1, lent.lease, keys))
    assert cluster.held_tokens(name, tokens) == len(PROMPT) / 4
    cluster.run(0.1)


def test_what_an_engine_waits_for_displaces_what_it_does_not() -> None:
    cluster = Cluster("a", "b", peer_fetch=True, cpu_limit_nbytes=3 * PAGE_NBYTES)
    store(cluster, "a")
    cluster.run(100.0)
    cluster.store("b", prompt(12, first=500))
    cluster.run(20.0)  # leases end; what b holds was used since a's was
    assert cluster.look_up("b", PROMPT).is_fetching
    assert cluster.look_up("b", PROMPT) == Found(12, is_fetching=False)


# --- the named source (R2) ------------------------------------------------------------------------------------------------


def test_a_named_source_is_asked_before_the_view_has_heard_of_it() -> None:
    cluster = fetching("a", "b", "c")
    store(cluster, "c")
    cluster.lose(InventoryDelta)
    cluster.store("a", PROMPT)
    assert cluster.look_up("b", PROMPT, source="a").is_fetching
    assert cluster.look_up("b", PROMPT, source="a") == Found(12, is_fetching=False)
    assert flight(cluster, "b").old_position == at("a")


@pytest.mark.parametrize("source", ["nobody", "b", "dead"])
def test_a_source_that_cannot_be_asked_leaves_it_to_the_view(source: InstanceId) -> None:
    cluster = holding("a", "b", "dead")
    cluster.crash("dead")
    cluster.run(5.0)
    assert cluster.look_up("b", PROMPT, source=source).is_fetching
    assert flight(cluster, "b").old_position == at("a")


def test_a_named_source_that_holds_less_is_not_asked_again_at_once() -> None:
    cluster = fetching("a", "b")
    store(cluster, "a", prompt(8))
    assert cluster.look_up("b", PROMPT, source="a") == Found(0, is_fetching=True)
    assert cluster.look_up("b", PROMPT, source="a") == Found(8, is_fetching=False)
    cluster.run(RETRY_S)
    assert cluster.look_up("b", PROMPT, source="a").is_fetching


# --- worth it (R3) --------------------------------------------------------------------------------------------------------

BREAK_EVEN = len(PROMPT) / 4 / (TCP_SETUP_S + len(PROMPT) / 4 * 16 / FIRST_BYTES_PER_S)
"""Tokens a second of an engine that computes `PROMPT` as fast as it comes over TCP."""


def apart(**limits: int) -> Cluster:
    """Nodes a and b on two hosts."""
    cluster = Cluster("a", peer_fetch=True, transfer=TRANSFER, **limits)  # type: ignore[arg-type]  # limits are integers
    cluster.boot("b", handoff=OTHER_HOST)
    cluster.run(0.5)
    return cluster


@pytest.mark.parametrize(("speed", "is_worth_it"), [(0.99 * BREAK_EVEN, True), (1.01 * BREAK_EVEN, False), (None, False)])
def test_over_tcp_it_must_be_sooner_than_computing(speed: float | None, *, is_worth_it: bool) -> None:
    cluster = apart()
    store(cluster, "a")
    assert cluster.look_up("b", PROMPT, prefill_tokens_per_s=speed) == Found(0, is_fetching=is_worth_it)
    assert len(plans(cluster, "b")) == is_worth_it


def test_on_one_host_it_is_always_worth_it() -> None:
    assert holding("a", "b").look_up("b", PROMPT, prefill_tokens_per_s=1e9).is_fetching


def test_a_peer_without_a_way_to_it_is_no_holder() -> None:
    cluster = Cluster("a", peer_fetch=True)
    cluster.boot("b", handoff=OTHER_HOST)
    cluster.run(0.5)
    store(cluster, "a")
    assert not cluster.look_up("b", PROMPT, prefill_tokens_per_s=1.0).is_fetching


def test_a_slow_network_is_learned_from_this_nodes_own_fetches() -> None:
    large = replace(NAMESPACE, head_dim=2**20)
    cluster = Cluster("a", peer_fetch=True, transfer=TRANSFER, namespace=large, cpu_limit_nbytes=2**40)
    cluster.boot("b", handoff=OTHER_HOST)
    cluster.run(0.5)
    second = prompt(12, first=500)
    for tokens in (PROMPT, second):
        store(cluster, "a", tokens)
    assert cluster.look_up("b", prompt(4), prefill_tokens_per_s=5.0).is_fetching, "64 MiB at 1 GiB/s, against 0.8 s"
    for _ in range(20):
        cluster.hold(FetchChunks)
        name = cluster.begin("a", "b", second)
        cluster.run(10.0)
        cluster.release()
        assert cluster.move("b", "a", second).lane is Lane.TCP
        assert cluster.event("a", name).state is EventState.DONE
    cluster.run(0.1)
    assert not cluster.look_up("b", PROMPT, prefill_tokens_per_s=5.0).is_fetching, "128 MiB at 19 MiB/s, against 1.6 s"
    cluster.run(KEPT_S)
    assert cluster.look_up("b", PROMPT, prefill_tokens_per_s=5.0).is_fetching, "the network may have recovered"


# --- one flight (R4) ------------------------------------------------------------------------------------------------------


def test_lookups_of_one_prompt_wait_for_one_flight() -> None:
    cluster = holding("a", "b")
    cluster.hold(FetchChunks)
    for _ in range(3):
        assert cluster.look_up("b", PROMPT) == Found(0, is_fetching=True)
    cluster.release()
    assert cluster.look_up("b", PROMPT) == Found(12, is_fetching=False)
    assert len(plans(cluster, "b")) == 1


def test_a_prompt_that_begins_alike_waits_too_and_then_fetches_the_rest() -> None:
    cluster = holding("a", "b")
    longer = prompt(8) + prompt(8, first=100)
    store(cluster, "a", longer)
    cluster.hold(FetchChunks)
    assert cluster.look_up("b", PROMPT).is_fetching
    assert cluster.look_up("b", longer).is_fetching
    assert len(plans(cluster, "b")) == 1
    cluster.release()
    assert cluster.look_up("b", longer) == Found(8, is_fetching=True)
    assert cluster.look_up("b", longer) == Found(16, is_fetching=False)
    assert len(plans(cluster, "b")) == 2


def test_a_flight_that_brings_less_than_hoped_for_is_not_joined_by_another() -> None:
    cluster = holding("a", "b", "c")
    for name in ("b", "c"):
        store(cluster, name, prompt(4))
    cluster.hold(FetchReport)
    assert cluster.look_up("b", PROMPT, source="c").is_fetching
    assert cluster.look_up("b", PROMPT) == Found(4, is_fetching=False)
    assert flight(cluster, "b").state is EventState.RUNNING


def test_a_prompt_that_differs_from_what_is_missing_on_has_a_flight_of_its_own() -> None:
    cluster = holding("a", "b")
    other = prompt(4) + prompt(8, first=100)
    store(cluster, "a", other)
    cluster.store("b", prompt(4))
    cluster.hold(FetchChunks)
    assert cluster.look_up("b", PROMPT).is_fetching
    assert cluster.look_up("b", other).is_fetching
    assert len(plans(cluster, "b")) == 2


def test_what_a_users_copy_is_bringing_is_not_fetched_twice() -> None:
    cluster = holding("a", "b")
    cluster.hold(FetchChunks)
    cluster.start("a", "b", prompt(8), operation=Operation.COPY)
    assert cluster.look_up("b", PROMPT).is_fetching
    cluster.release()
    cluster.run(1.0)
    fetched = [chunk.key for fetch in cluster.effects("b", FetchChunks) for chunk in fetch.chunks]
    assert len(fetched) == len(set(fetched)) == 3
    assert cluster.look_up("b", PROMPT) == Found(12, is_fetching=False)


def test_no_more_flights_are_started_than_the_limit() -> None:
    cluster = fetching("a", "b")
    prompts = [prompt(4, first=10 * number) for number in range(FLIGHTS_MAX + 1)]
    for tokens in prompts:
        store(cluster, "a", tokens)
    cluster.hold(FetchChunks)
    assert [cluster.look_up("b", tokens).is_fetching for tokens in prompts] == [True] * FLIGHTS_MAX + [False]
    cluster.release()
    assert cluster.look_up("b", prompts[-1]).is_fetching


def test_no_more_prompts_are_waited_for_than_the_limit() -> None:
    cluster = holding("a", "b")
    cluster.hold(FetchChunks)
    prompts = [PROMPT + pack(number) for number in range(WISHES_MAX + 1)]
    assert [cluster.look_up("b", tokens).is_fetching for tokens in prompts] == [True] * WISHES_MAX + [False]


# --- how long it is waited for (R5) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("speed", "patience_s"), [(None, LEAST_PATIENCE_S), (10.0, 1.2)])
def test_nobody_waits_longer_than_computing_takes_and_what_comes_later_counts(speed: float | None, patience_s: float) -> None:
    cluster = holding("a", "b")
    cluster.hold(FetchChunks)
    assert cluster.look_up("b", PROMPT, prefill_tokens_per_s=speed).is_fetching
    cluster.run(patience_s - 0.01)
    assert cluster.look_up("b", PROMPT, prefill_tokens_per_s=speed).is_fetching
    cluster.run(0.02)
    assert cluster.look_up("b", PROMPT, prefill_tokens_per_s=speed) == Found(0, is_fetching=False)
    assert cluster.look_up("b", prompt(8)) == Found(0, is_fetching=False), "another that wants it has no longer patience"
    cluster.run(2 * RETRY_S)
    assert cluster.look_up("b", PROMPT) == Found(0, is_fetching=False), "it is under way still"
    cluster.release()
    assert cluster.look_up("b", PROMPT) == Found(12, is_fetching=False)
    assert len(plans(cluster, "b")) == 1


def test_who_waits_for_anothers_flight_waits_as_long_as_the_other() -> None:
    cluster = holding("a", "b")
    cluster.hold(FetchChunks)
    assert cluster.look_up("b", PROMPT).is_fetching
    cluster.run(LEAST_PATIENCE_S / 2)
    assert cluster.look_up("b", prompt(8)).is_fetching
    cluster.run(LEAST_PATIENCE_S / 2 + 0.01)
    assert cluster.look_up("b", prompt(8)) == Found(0, is_fetching=False)


# --- when it fails (R6) ---------------------------------------------------------------------------------------------------


def assert_not_tried_again_at_once(cluster: Cluster) -> None:
    """The flight has failed just now; the next one goes well."""
    cluster.run(RETRY_S - 0.1)
    assert cluster.look_up("b", PROMPT) == Found(0, is_fetching=False)
    assert len(plans(cluster, "b")) == 1
    cluster.run(0.2)
    assert cluster.look_up("b", PROMPT) == Found(0, is_fetching=True)
    assert cluster.look_up("b", PROMPT) == Found(12, is_fetching=False)
    cluster.assert_at_rest()


def test_a_flight_whose_lane_breaks_is_not_tried_again_at_once() -> None:
    cluster = holding("a", "b")
    cluster.lane_brings = 0
    assert cluster.look_up("b", PROMPT).is_fetching
    assert cluster.look_up("b", PROMPT) == Found(0, is_fetching=False)
    assert flight(cluster, "b").state is EventState.FAILED
    cluster.lane_brings = 10**9
    assert_not_tried_again_at_once(cluster)


def test_a_plan_that_is_refused_ends_the_flight() -> None:
    cluster = holding("a", "b")
    rule = cluster.lose(PlanAnswer)
    cluster.lose(EventReport, 1)
    cluster.hold(PlanRequest, 1)
    assert cluster.look_up("b", PROMPT).is_fetching
    (plan,) = plans(cluster, "b")
    rule.left = 0
    failure = cluster.nodes["b"].machine.unreachable("nobody")
    cluster.deliver("a", "b", PlanAnswer(plan.event_id, None, failure))
    assert cluster.look_up("b", PROMPT) == Found(0, is_fetching=False)
    assert cluster.nodes["b"].machine.event(plan.event_id) is None


def test_a_source_that_never_plans_costs_no_more_than_the_wait() -> None:
    cluster = holding("a", "b")
    cluster.lose(PlanRequest)
    assert cluster.look_up("b", PROMPT).is_fetching
    cluster.run(LEAST_PATIENCE_S)
    assert cluster.look_up("b", PROMPT) == Found(0, is_fetching=False)
    cluster.run(5.0 - LEAST_PATIENCE_S)
    cluster.heal()
    assert_not_tried_again_at_once(cluster)


def test_a_view_that_promised_too_much_is_not_believed_again_at_once() -> None:
    cluster = holding("a", "b", "c")
    cluster.lose(InventoryDelta)
    cluster.move("a", "c", PROMPT)
    assert cluster.look_up("b", PROMPT, source="a").is_fetching
    assert cluster.look_up("b", PROMPT, source="a") == Found(0, is_fetching=False)
    assert (flight(cluster, "b").state, flight(cluster, "b").num_tokens) == (EventState.DONE, 0)


def test_what_a_lane_brought_before_it_broke_counts() -> None:
    cluster = holding("a", "b")
    cluster.lane_brings = 2
    assert cluster.look_up("b", PROMPT).is_fetching
    assert cluster.look_up("b", PROMPT) == Found(8, is_fetching=False)
    assert flight(cluster, "b").state is EventState.PARTIAL
    cluster.run(RETRY_S)
    assert cluster.look_up("b", PROMPT) == Found(8, is_fetching=True)
    assert cluster.look_up("b", PROMPT) == Found(12, is_fetching=False)


def test_a_holder_that_dies_in_the_middle_ends_the_flight() -> None:
    cluster = holding("a", "b", "c")
    cluster.hold(FetchChunks)
    assert cluster.look_up("b", PROMPT).is_fetching
    cluster.crash("a")
    cluster.run(LEAST_PATIENCE_S)
    assert cluster.look_up("b", PROMPT) == Found(0, is_fetching=False)
    cluster.release()
    cluster.run(5.0)
    store(cluster, "c")
    cluster.run(RETRY_S)
    assert cluster.look_up("b", PROMPT).is_fetching
    cluster.assert_at_rest()


def test_a_node_that_leaves_starts_no_flight() -> None:
    cluster = holding("a", "b", "c")
    cluster.store("b", prompt(8, first=500))
    cluster.hold(TakeAnswer)
    cluster.start("b", "c", prompt(8, first=500))  # an open attempt keeps it from leaving at once
    cluster.leave("b")
    cluster.run(0.1)
    assert not cluster.look_up("b", PROMPT).is_fetching
    assert plans(cluster, "b") == []
