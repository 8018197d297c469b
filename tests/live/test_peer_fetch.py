"""`peer_fetch` at nodes that run: what an engine misses comes from a peer that holds it, if that is sooner than computing."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest
import torch

from p2pkv import NodeConfig
from p2pkv.engines import EngineCache, Identity
from p2pkv.errors import InvalidRequestError
from tests.live.command_line import LAYOUT
from tests.live.doors import SLOW, Cluster, NodeProcess, open_cluster, states, until

pytestmark = pytest.mark.live

FETCHING = "peer_fetch: true"
SLOW_ENGINE = 100.0
"""Tokens a second, of an engine that waits for anything rather than compute."""
MIB_TOKENS = 4096
"""Of `LAYOUT`, whose tokens take 256 bytes each: so many a second come from a `SLOW` node."""

_firsts = count(0, 100_000)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> dict[str, NodeProcess]:
    """Three that hold, one of them slow; two that fetch, one of them over TCP only; and one that doesn't fetch."""
    far = (FETCHING, "same_host_handoff: false")
    started = cluster.start(a=(), c=(), slow=SLOW, near=(FETCHING,), far=far, plain=())
    for node in started:
        until(lambda node=node: set(states(node).values()) == {"alive"} and len(states(node)) >= len(started))  # type: ignore[misc]
    return {node.name: node for node in started}


def attach(node: NodeProcess, prefill_tokens_per_s: float | None = None) -> EngineCache:
    config = NodeConfig.from_yaml(node.config)
    return EngineCache.attach(config, model="tiny", layout=LAYOUT, prefill_tokens_per_s=prefill_tokens_per_s)


def new_prompt(length: int) -> list[int]:
    """A prompt that begins like no other."""
    first = next(_firsts)
    return list(range(first, first + length))


def store(node: NodeProcess, tokens: list[int], seen_by: NodeProcess) -> torch.Tensor:
    """Have `node` hold a prompt, and wait until the other has heard of it."""
    kv = torch.rand(LAYOUT.shape(len(tokens)))
    with attach(node) as cache:
        assert cache.store(tokens, kv) == len(tokens)
    until(lambda: seen_by.post("/lookup", tokens=tokens).json()["layout_info"].get(node.name, [0, 0])[1] == len(tokens))
    return kv


def copies_of(node: NodeProcess, num_tokens: int) -> list[dict[str, Any]]:
    """Events of copies to a node, of prompts of this length; newest first."""
    events = node.get("/events").json()["events"]
    return [each for each in events if each["new_position"][0] == node.name and each["num_tokens"] == num_tokens]


def ended_copy(node: NodeProcess, num_tokens: int) -> dict[str, Any]:
    """The one event of copies to a node, of prompts of this length, once it has ended: what it brings is held before that."""
    until(lambda: all(each["state"] == "done" for each in copies_of(node, num_tokens)))
    (event,) = copies_of(node, num_tokens)
    return event


# --- what is fetched ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "lane"), [("near", "handoff"), ("far", "tcp")])
def test_a_lookup_brings_what_a_peer_holds_bit_by_bit(nodes: dict[str, NodeProcess], target: str, lane: str) -> None:
    tokens = new_prompt(37)
    kv = store(nodes["a"], tokens, seen_by=nodes[target])
    with attach(nodes[target], SLOW_ENGINE) as cache:
        assert cache.lookup([*tokens, 7]) == 37
        held, got = cache.retrieve(tokens)
    assert held == 37
    assert got is not None
    assert torch.equal(got, kv)
    event = ended_copy(nodes[target], 37)
    assert (event["copy"], event["old_position"][0], event["lane"], event["coordinator"]) == (True, "a", lane, target)
    assert event["chunks"]["moved"] == 3


def test_a_retrieve_alone_brings_it_too(nodes: dict[str, NodeProcess]) -> None:
    tokens = new_prompt(21)
    kv = store(nodes["c"], tokens, seen_by=nodes["near"])
    with attach(nodes["near"]) as cache:
        held, got = cache.retrieve(tokens)
    assert held == 21
    assert got is not None
    assert torch.equal(got, kv)


def test_only_what_is_missing_is_fetched(nodes: dict[str, NodeProcess]) -> None:
    tokens = new_prompt(64)
    kv = store(nodes["a"], tokens, seen_by=nodes["near"])
    with attach(nodes["near"]) as cache:
        cache.store(tokens[:32], kv[:, :, :32])
        assert cache.lookup(tokens) == 64
    event = ended_copy(nodes["near"], 64)
    assert (event["chunks"]["moved"], event["chunks"]["already_there"]) == (2, 2)


def test_many_lookups_at_once_lead_to_one_copy(nodes: dict[str, NodeProcess]) -> None:
    tokens = new_prompt(400)
    store(nodes["a"], tokens, seen_by=nodes["near"])
    with attach(nodes["near"]) as cache, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(cache.lookup, [tokens] * 16)) == [400] * 16
    assert len(copies_of(nodes["near"], 400)) == 1


def test_the_named_source_is_asked(nodes: dict[str, NodeProcess]) -> None:
    tokens = new_prompt(50)
    for holder in ("a", "c"):
        store(nodes[holder], tokens, seen_by=nodes["near"])
    with attach(nodes["near"]) as cache:
        assert cache.peek(tokens, source="c").is_fetching
        until(lambda: not cache.peek(tokens, source="c").is_fetching)
        assert cache.peek(tokens).num_tokens == 50
    (event,) = copies_of(nodes["near"], 50)
    assert event["old_position"][0] == "c"


@pytest.mark.parametrize("source", ["nobody", "near"])
def test_a_source_that_cannot_be_asked_leaves_it_to_the_view(nodes: dict[str, NodeProcess], source: str) -> None:
    tokens = new_prompt(20)
    store(nodes["a"], tokens, seen_by=nodes["near"])
    with attach(nodes["near"]) as cache:
        assert cache.lookup(tokens, source=source) == 20


def test_a_source_that_is_no_name_is_refused(nodes: dict[str, NodeProcess]) -> None:
    with attach(nodes["near"]) as cache, pytest.raises(InvalidRequestError, match="can't name an instance"):
        cache.peek([1], source="a/b")


# --- what is not ----------------------------------------------------------------------------------------------------------


def test_without_the_key_nothing_is_fetched(nodes: dict[str, NodeProcess]) -> None:
    tokens = new_prompt(40)
    store(nodes["a"], tokens, seen_by=nodes["plain"])
    with attach(nodes["plain"]) as cache:
        assert (cache.lookup(tokens, source="a"), cache.retrieve(tokens)) == (0, (0, None))
    assert nodes["plain"].get("/events").json()["events"] == []


def test_what_is_sooner_computed_is_not_fetched_over_tcp(nodes: dict[str, NodeProcess]) -> None:
    tokens = new_prompt(60)
    store(nodes["a"], tokens, seen_by=nodes["far"])
    with attach(nodes["far"], 1e6) as cache:
        assert cache.lookup(tokens) == 0
    assert copies_of(nodes["far"], 60) == []


def test_nobody_gets_what_is_another_tenants(nodes: dict[str, NodeProcess]) -> None:
    tokens = new_prompt(33)
    store(nodes["a"], tokens, seen_by=nodes["near"])
    with attach(nodes["near"]) as cache:
        assert cache.lookup(tokens, Identity(cache_salt="other")) == 0


# --- how long it is waited for --------------------------------------------------------------------------------------------


def test_nobody_waits_longer_than_computing_takes_and_what_comes_later_counts(nodes: dict[str, NodeProcess]) -> None:
    tokens = new_prompt(2 * MIB_TOKENS)
    store(nodes["slow"], tokens, seen_by=nodes["far"])
    with attach(nodes["far"], 2.0 * len(tokens)) as cache:
        began_at = time.monotonic()
        assert cache.lookup(tokens) == 0
        assert 0.5 <= time.monotonic() - began_at < 1.0
        assert not cache.peek(tokens).is_fetching
        until(lambda: cache.peek(tokens).num_tokens == len(tokens))


def test_a_holder_that_dies_in_the_middle_costs_no_more_than_the_wait(cluster: Cluster, nodes: dict[str, NodeProcess]) -> None:
    (slow,), far = cluster.start(dying=SLOW), nodes["far"]
    tokens = new_prompt(4 * MIB_TOKENS)
    kv = store(slow, tokens, seen_by=far)
    with attach(far, float(len(tokens))) as cache, ThreadPoolExecutor(1) as pool:
        cache.store(tokens[:20], kv[:, :, :20])
        began_at = time.monotonic()
        found = pool.submit(cache.lookup, tokens)
        until(lambda: bool(copies_of(far, len(tokens))))
        slow.kill()
        assert found.result() == 20
        assert time.monotonic() - began_at < 1.3
        held, got = cache.retrieve(tokens[:20])
    assert held == 20
    assert got is not None
    assert torch.equal(got, kv[:, :, :20])
