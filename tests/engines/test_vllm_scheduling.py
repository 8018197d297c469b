"""The scheduler half on requests and steps of the shape that vLLM gives it, with a node whose answers a test decides."""

import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from p2pkv.core.keys import Identity
from p2pkv.engines import EngineCache, Lookup
from p2pkv.engines.vllm.link import PAUSE_S, KnownNode, NodeLink
from p2pkv.engines.vllm.lookups import FETCH_POLL_S
from p2pkv.engines.vllm.orders import ConnectorMetadata, LoadOrder
from p2pkv.engines.vllm.scheduling import SchedulerHalf
from p2pkv.engines.vllm.tally import Tally
from p2pkv.errors import NodeUnreachableError

BLOCK = 4
CHUNK = 8
DEADLINE_S = 0.05


class Node:
    """Holds so many tokens of any prompt, as an `EngineCache` tells it; `coming` ones more when it was asked often enough."""

    def __init__(self) -> None:
        self.held = 0
        self.is_gone = False
        self.may_answer = Event()
        self.may_answer.set()
        self.asked: list[tuple[list[int], Identity]] = []
        self.sources: list[str | None] = []
        self.coming = 0
        self.fetching_count = 0
        self.now = 0.0

    def peek(self, tokens: "array[int]", identity: Identity, *, source: str | None) -> Lookup:
        self.asked.append((list(tokens), identity))
        self.sources.append(source)
        assert self.may_answer.wait(5)
        if self.is_gone:
            raise NodeUnreachableError("it is gone")
        is_fetching = self.fetching_count > 0 and len(tokens) > self.held
        self.fetching_count -= is_fetching
        return Lookup(min(self.held + (0 if is_fetching else self.coming), len(tokens)), is_fetching)

    def attach(self) -> EngineCache:
        if self.is_gone:
            raise NodeUnreachableError("it is gone")
        return cast("EngineCache", self)

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class Request:
    """What the half reads of a `vllm.v1.request.Request`."""

    request_id: str
    all_token_ids: list[int]
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    num_preemptions: int = 0
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: list[Any] = field(default_factory=list)
    prompt_embeds: torch.Tensor | None = None
    prompt_is_token_ids: list[bool] | None = None
    resumable: bool = False
    skip_reading_prefix_cache: bool = False
    kv_transfer_params: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_prompt_tokens or len(self.all_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


class Scheduler:
    """Does with the half what vLLM's scheduler does, as far as one request goes."""

    def __init__(self, node: Node, **options: bool) -> None:
        self.tally = Tally()
        link = NodeLink(node.attach, lambda _: KnownNode("a", 7, CHUNK), lambda: node.now)
        self.half = SchedulerHalf(link, DEADLINE_S, block_size=BLOCK, tally=self.tally, **options)
        while link.known is None and not node.is_gone:
            time.sleep(0.001)

    def add(self, token_count: int, name: str = "r", **facts: Any) -> Request:
        request = Request(name, list(range(token_count)), **facts)
        self.half.new_request(request)
        return request

    def match(self, request: Request, computed: int = 0) -> tuple[int, bool]:
        """What is matched once the half knows."""
        while True:
            count, is_async = self.half.matched_tokens(request, computed)
            if count is not None:
                return count, is_async
            time.sleep(0.001)

    def load(self, request: Request, computed: int = 0) -> LoadOrder:
        count, is_async = self.match(request, computed)
        assert is_async
        self.half.allocated(request, blocks_of(request), count)
        self.half.allocated(request, blocks_of(request), 0)  # vLLM's second call, once the load is over
        [order] = self.step().loads
        request.num_computed_tokens = min(computed + count, request.num_tokens - 1)
        return order

    def step(self, *computed: tuple[Request, int], preempted: tuple[str, ...] = ()) -> ConnectorMetadata:
        """A step that computes so many tokens of these requests."""
        requests = {request.request_id: request for request, _ in computed}
        metadata = self.half.orders(
            {request.request_id: count for request, count in computed},
            set(preempted),
            lambda name: (blocks_of(requests[name]),),
        )
        for request, count in computed:
            request.num_computed_tokens += count
        return metadata

    def finish(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        return self.half.finished(request, blocks_of(request))


def blocks_of(request: Request) -> list[int]:
    return [10 + number for number in range(-(-(request.num_tokens + 1) // BLOCK))]


def generate(request: Request, count: int) -> None:
    """So many tokens come out; the last one's KV is not computed yet."""
    request.all_token_ids += range(100, 100 + count)
    request.num_computed_tokens = request.num_tokens - 1


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.may_answer.set()


@pytest.fixture
def scheduler(node: Node) -> Iterator[Scheduler]:
    scheduler = Scheduler(node)
    yield scheduler
    scheduler.half.close()


# --- lookup ---------------------------------------------------------------------------------------------------------------


def test_a_hit_is_what_the_node_holds_beyond_what_vllm_has(node: Node, scheduler: Scheduler) -> None:
    node.held = 10
    assert scheduler.match(scheduler.add(20, "a")) == (10, True)
    assert scheduler.match(scheduler.add(10, "b"), computed=8) == (2, True)
    assert scheduler.match(scheduler.add(20, "c"), computed=12) == (0, False)
    assert scheduler.match(scheduler.add(7, "d")) == (7, True)
    assert scheduler.match(scheduler.add(9, "e"), computed=8) == (0, False)  # the last one is computed in any case


def test_a_source_that_a_router_names_is_asked_for_and_its_fetch_awaited(node: Node, scheduler: Scheduler) -> None:
    node.coming, node.fetching_count = 10, 3
    assert scheduler.match(scheduler.add(20, kv_transfer_params={"instance": "b", "num_tokens": 10})) == (10, True)
    assert node.sources == ["b"] * 4


def test_a_fetch_is_awaited_as_long_as_the_node_says(node: Node, scheduler: Scheduler) -> None:
    node.held, node.coming, node.fetching_count = 10, 10, round(3 * DEADLINE_S / FETCH_POLL_S)
    started_at = time.monotonic()
    assert scheduler.match(scheduler.add(20)) == (20, True)
    assert time.monotonic() - started_at >= 3 * DEADLINE_S
    data = scheduler.tally.take()
    assert data is not None
    assert "missed_deadlines" not in data["counts"]


def test_where_the_node_stops_during_a_fetch_what_was_held_is_a_hit_all_the_same(node: Node, scheduler: Scheduler) -> None:
    node.held, node.coming, node.fetching_count = 10, 10, 1_000_000
    request = scheduler.add(20)
    assert scheduler.half.matched_tokens(request, 0) == (None, False)
    while len(node.asked) < 3:
        time.sleep(0.001)
    node.may_answer.clear()
    assert scheduler.match(request) == (10, True)
    node.may_answer.set()
    data = scheduler.tally.take()
    assert data is not None
    assert data["counts"]["missed_deadlines"] == 1


def test_a_lookup_that_awaits_a_fetch_holds_up_no_other(node: Node, scheduler: Scheduler) -> None:
    node.held, node.coming, node.fetching_count = 10, 10, 1_000_000
    awaiting = [scheduler.add(20, str(number)) for number in range(8)]
    for request in awaiting:
        assert scheduler.half.matched_tokens(request, 0) == (None, False)
    assert scheduler.match(scheduler.add(10, "other")) == (10, True)


@pytest.mark.parametrize("parameters", [None, {}, {"instance": 7}, {"instance": "../x"}])
def test_what_names_no_instance_is_no_source(node: Node, scheduler: Scheduler, parameters: dict[str, object] | None) -> None:
    scheduler.match(scheduler.add(20, kv_transfer_params=parameters))
    assert node.sources == [None]


@pytest.mark.parametrize(("held", "matched"), [(7, 0), (8, 8)])
def test_what_is_sooner_computed_than_loaded_is_no_hit(node: Node, scheduler: Scheduler, held: int, matched: int) -> None:
    node.held = held
    assert scheduler.match(scheduler.add(20)) == (matched, matched > 0)


def test_a_lookup_is_asked_once_however_often_vllm_asks(node: Node, scheduler: Scheduler) -> None:
    request = scheduler.add(20)
    for _ in range(3):
        assert scheduler.match(request) == (0, False)
    assert node.asked == [(list(range(20)), Identity())]


def test_a_lookup_that_takes_too_long_is_a_miss_and_so_are_those_behind_it(node: Node, scheduler: Scheduler) -> None:
    node.held = 20
    node.may_answer.clear()
    request = scheduler.add(20, "slow")
    assert scheduler.half.matched_tokens(request, 0) == (None, False)
    assert scheduler.match(request) == (0, False)
    lookups = scheduler.half._lookups
    while lookups._began_at is None or lookups._clock() - lookups._began_at <= lookups._deadline_s:
        time.sleep(0.001)  # its thread may have begun late
    assert scheduler.match(scheduler.add(20, "behind")) == (0, False)
    node.may_answer.set()
    while scheduler.half._lookups._began_at is not None:
        time.sleep(0.001)
    assert scheduler.match(scheduler.add(20, "later")) == (20, True)
    data = scheduler.tally.take()
    assert data is not None
    assert data["counts"]["missed_deadlines"] == 1


def test_a_node_that_is_gone_is_left_alone_for_a_while(node: Node, scheduler: Scheduler) -> None:
    node.held, node.is_gone = 20, True
    assert scheduler.match(scheduler.add(20, "a")) == (0, False)
    assert scheduler.half.matched_tokens(scheduler.add(20, "b"), 0) == (0, False)
    node.is_gone = False
    assert scheduler.half.matched_tokens(scheduler.add(20, "c"), 0) == (0, False)
    assert len(node.asked) == 1
    node.now += PAUSE_S
    assert scheduler.match(scheduler.add(20, "d")) == (20, True)


@pytest.mark.parametrize(
    "facts",
    [{"prompt_embeds": torch.zeros(1)}, {"resumable": True}, {"skip_reading_prefix_cache": True}, {"cache_salt": "s" * 1025}],
)
def test_what_cannot_be_told_apart_is_not_looked_up(node: Node, scheduler: Scheduler, facts: dict[str, Any]) -> None:
    node.held = 20
    assert scheduler.half.matched_tokens(scheduler.add(20, **facts), 0) == (0, False)
    assert not node.asked


# --- load -----------------------------------------------------------------------------------------------------------------


def test_a_load_names_tokens_blocks_and_where_it_begins(node: Node, scheduler: Scheduler) -> None:
    node.held = 18
    request = scheduler.add(20, cache_salt="tenant")
    order = scheduler.load(request, computed=8)
    assert order == LoadOrder("r", array("i", range(18)), Identity("tenant"), tuple(blocks_of(request)), 8)


def test_a_load_that_failed_is_not_tried_again_and_what_is_computed_is_stored(node: Node, scheduler: Scheduler) -> None:
    node.held = 20
    request = scheduler.add(20)
    scheduler.load(request)
    request.num_computed_tokens = 0
    scheduler.half.load_failed(["r", "ended meanwhile"])
    assert scheduler.match(request) == (0, False)
    [order] = scheduler.step((request, 20)).stores
    assert order.start == 0  # the node hasn't what it said


def test_a_preempted_request_is_looked_up_anew_with_what_it_has_generated(node: Node, scheduler: Scheduler) -> None:
    node.held = 25
    request = scheduler.add(20)
    scheduler.load(request)
    scheduler.step((request, 1))
    generate(request, 5)
    request.num_preemptions, request.num_computed_tokens = 1, 0
    assert scheduler.step(preempted=("r",)).preempted == ("r",)
    assert scheduler.load(request).tokens == array("i", request.all_token_ids)


def test_a_load_that_vllm_did_not_choose_is_not_ordered(node: Node, scheduler: Scheduler) -> None:
    node.held = 20
    request = scheduler.add(20)
    scheduler.match(request)
    scheduler.half.allocated(request, blocks_of(request), 0)  # inside a MultiConnector
    assert not scheduler.step((request, 20)).loads


# --- store ----------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_stored_with_the_step_that_completes_its_prefill(scheduler: Scheduler) -> None:
    request = scheduler.add(20)
    scheduler.match(request)
    assert not scheduler.step((request, 8)).stores
    [order] = scheduler.step((request, 12)).stores
    assert (order.start, order.tokens, order.block_ids) == (0, array("i", range(20)), tuple(blocks_of(request)))
    generate(request, 1)
    assert not scheduler.step((request, 1)).stores


@pytest.mark.parametrize(("held", "start"), [(0, 0), (7, 0), (8, 8), (17, 16), (20, 16)])
def test_what_was_found_is_not_stored_again_but_for_the_last_chunk(
    node: Node, scheduler: Scheduler, held: int, start: int
) -> None:
    node.held = held
    request = scheduler.add(20)
    scheduler.match(request)
    [order] = scheduler.step((request, 20)).stores
    assert (order.start, len(order.tokens)) == (start, 20)


def test_a_prompt_of_whole_chunks_that_was_found_is_not_stored(node: Node, scheduler: Scheduler) -> None:
    node.held = 16
    request = scheduler.add(16)
    scheduler.load(request)
    assert not scheduler.step((request, 1)).stores
    assert scheduler.finish(request) == (False, {"instance": "a", "generation": 7, "num_tokens": 16})


def test_what_was_generated_is_stored_at_the_end_and_its_blocks_are_kept_until_then(scheduler: Scheduler) -> None:
    request = scheduler.add(20)
    scheduler.match(request)
    scheduler.step((request, 20))
    generate(request, 10)
    assert scheduler.finish(request) == (True, {"instance": "a", "generation": 7, "num_tokens": 29})
    orders = scheduler.step()
    [order] = orders.stores
    assert (order.start, order.tokens) == (16, array("i", request.all_token_ids[:29]))
    assert orders.finished == ("r",)
    assert not scheduler.half._tracked
    assert not scheduler.half._prefilling


def test_tokens_of_steps_under_way_are_not_stored(scheduler: Scheduler) -> None:
    request = scheduler.add(20)
    scheduler.match(request)
    scheduler.step((request, 12))
    request.num_in_flight_tokens = 4
    scheduler.finish(request)
    [order] = scheduler.step().stores
    assert len(order.tokens) == 8


def test_of_a_request_that_never_ran_nothing_is_stored(node: Node, scheduler: Scheduler) -> None:
    node.held = 20
    waiting, loading = scheduler.add(20, "waiting"), scheduler.add(20, "loading")
    scheduler.match(waiting)
    scheduler.load(loading)
    assert scheduler.finish(waiting) == (False, None)
    assert scheduler.finish(loading) == (False, None)  # its blocks are kept by vLLM until the load has ended
    assert scheduler.step() == ConnectorMetadata(is_idle=True)


def test_a_preempted_request_is_stored_whole_when_it_has_ended(node: Node, scheduler: Scheduler) -> None:
    request = scheduler.add(20)
    scheduler.match(request)
    scheduler.step((request, 20))
    generate(request, 3)
    request.num_computed_tokens, request.num_preemptions = 0, 1
    scheduler.step(preempted=("r",))
    assert scheduler.match(request) == (0, False)
    [again] = scheduler.step((request, 23)).stores
    assert (again.start, len(again.tokens)) == (0, 20)
    scheduler.finish(request)
    assert len(scheduler.step().stores[0].tokens) == 23


def test_of_a_request_that_ends_while_it_is_preempted_nothing_is_stored(scheduler: Scheduler) -> None:
    request = scheduler.add(20)
    scheduler.match(request)
    scheduler.step((request, 20))
    request.num_computed_tokens = 0
    scheduler.step(preempted=("r",))
    assert scheduler.finish(request) == (False, None)


@pytest.mark.parametrize(
    "facts",
    [{"kv_transfer_params": {"skip_save": True}}, {"kv_transfer_params": {"lmcache.skip_save": True}}, {"resumable": True}],
)
def test_what_is_not_to_be_saved_is_not(scheduler: Scheduler, facts: dict[str, Any]) -> None:
    request = scheduler.add(20, **facts)
    scheduler.match(request)
    assert not scheduler.step((request, 20)).stores
    assert scheduler.finish(request) == (False, None)


def test_a_producer_asks_nothing_and_a_consumer_stores_nothing(node: Node) -> None:
    node.held = 20
    producer, consumer = Scheduler(node, reads=False), Scheduler(node, writes=False)
    request = producer.add(20)
    assert producer.half.matched_tokens(request, 0) == (0, False)
    assert len(producer.step((request, 20)).stores) == 1
    request = consumer.add(20)
    assert consumer.match(request) == (20, True)
    assert not consumer.step((request, 20)).stores
    for scheduler in (producer, consumer):
        scheduler.half.close()


# --- identity -------------------------------------------------------------------------------------------------------------


def test_an_identity_that_takes_time_is_made_out_beside_the_scheduler(node: Node, scheduler: Scheduler) -> None:
    node.held = 20
    picture = SimpleNamespace(
        data={"pixels": torch.ones(3)}, modality="image", mm_position=SimpleNamespace(offset=2, length=5, is_embed=None)
    )
    order = scheduler.load(scheduler.add(20, mm_features=[picture]))
    [media] = order.identity.media
    assert (media.offset, media.length) == (2, 5)
    assert node.asked[0][1] == order.identity


def test_after_a_reset_nothing_is_found_and_nothing_that_was_computed_before_is_stored(
    node: Node, scheduler: Scheduler
) -> None:
    before = scheduler.add(20, "before")
    scheduler.match(before)
    scheduler.half.forget()
    assert not scheduler.step((before, 20)).stores
    assert scheduler.finish(before) == (False, None)
    after = scheduler.add(20, "after")
    scheduler.match(after)
    assert node.asked[1][1] != node.asked[0][1]
    assert scheduler.step((after, 20)).stores[0].identity == node.asked[1][1]


def test_until_the_node_is_known_nothing_is_stored(node: Node) -> None:
    node.is_gone = True
    scheduler = Scheduler(node)
    request = scheduler.add(20)
    assert scheduler.match(request) == (0, False)
    assert not scheduler.step((request, 20)).stores
    assert scheduler.finish(request) == (False, None)
    scheduler.half.close()
