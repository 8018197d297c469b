"""The connector in vLLM itself: the answer never depends on what the cache held, nor on what became of it."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pkv.core.keys import Identity
from p2pkv.engines import EngineCache, Lookup
from p2pkv.engines.cache import Take, Tokens
from p2pkv.engines.vllm.orders import WorkerReport
from tests.live.command_line import wait_gone
from tests.vllm.connected import ANSWER_TOKENS, CHUNK, TINY, Engine, engine_on, node_pid, prompt_of, wait_until


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    """Prompts of more than 256 tokens are computed in several steps; vLLM itself keeps nothing."""
    options: dict[str, Any] = {"enable_prefix_caching": False, "max_num_batched_tokens": 256, "max_num_seqs": 16}
    with engine_on(tiny_model, CHUNK, **options) as engine:
        yield engine


# --- the same answer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 11, 32, 79, 80, 200, 256, 1500])
def test_a_prompt_that_was_loaded_gives_the_answer_that_was_computed(engine: Engine, count: int) -> None:
    prompt = prompt_of(count, seed=1)
    computed, cached = engine.answer(prompt)
    assert cached == 0
    engine.wait_until_held(prompt)
    assert engine.answer(prompt) == (computed, count if count > 1 else 0)


@pytest.mark.parametrize(("count", "shared"), [(300, 100), (300, 161), (1200, 700), (40, 9), (40, 5)])
def test_a_prompt_that_begins_like_another_loads_what_they_share(engine: Engine, count: int, shared: int) -> None:
    first = prompt_of(count, seed=2)
    prompt = first[:shared] + prompt_of(90, seed=3)[1:]
    computed, _ = engine.answer(prompt, salt="alone")
    engine.answer(first)
    engine.wait_until_held(first)
    assert engine.answer(prompt) == (computed, shared if shared > 8 else 0)


def test_a_conversation_goes_on_from_what_was_generated(engine: Engine) -> None:
    prompt = prompt_of(150, seed=4)
    answer, _ = engine.answer(prompt)
    held = [*prompt, *answer[:-1]]  # the last token's KV is never computed
    engine.wait_until_held(held)
    question = [*prompt, *answer, 5, 6, 7]
    assert engine.answer(question)[1] == len(held)
    assert engine.answer(question)[0] == engine.answer(question, salt="alone")[0]


def test_a_spoiled_chunk_changes_the_answer(engine: Engine) -> None:
    prompt = prompt_of(600, seed=5)
    right, _ = engine.answer(prompt)
    engine.wait_until_held(prompt)
    with engine.attach() as cache:
        _, kv = cache.retrieve(prompt)
        assert kv is not None
        kv[:, :, 240:320] = 0
        cache.store(prompt, kv, identity=Identity("spoiled"))
    wrong, cached = engine.answer(prompt, salt="spoiled")
    assert cached == len(prompt)
    assert wrong != right


def test_eight_prompts_at_once(engine: Engine) -> None:
    prompts = [prompt_of(90 + 61 * number, seed=6) for number in range(8)]
    computed = [list(output.outputs[0].token_ids) for output in engine.ask(prompts)]
    for prompt in prompts:
        engine.wait_until_held(prompt)
    outputs = engine.ask(prompts)
    assert [list(output.outputs[0].token_ids) for output in outputs] == computed
    assert [output.num_cached_tokens for output in outputs] == [len(prompt) for prompt in prompts]


# --- whose, and whether ---------------------------------------------------------------------------------------------------


def test_tenants_with_different_salts_share_nothing(engine: Engine) -> None:
    prompt = prompt_of(120, seed=7)
    engine.answer(prompt, salt="one")
    engine.wait_until_held(prompt, salt="one")
    assert engine.answer(prompt, salt="two")[1] == 0
    assert engine.answer(prompt)[1] == 0
    assert engine.answer(prompt, salt="one")[1] == len(prompt)


def test_the_client_is_told_where_its_prompt_is_kept_and_may_ask_not_to_keep_it(engine: Engine) -> None:
    kept, skipped = prompt_of(120, seed=8), prompt_of(121, seed=8)
    [output] = engine.ask([kept])
    told = output.kv_transfer_params
    assert (told["instance"], told["num_tokens"]) == ("a", 120 + ANSWER_TOKENS - 1)
    assert told["generation"] > 0
    [output] = engine.ask([skipped], skip_save=True)
    assert output.kv_transfer_params is None
    engine.wait_until_held(kept)
    with engine.attach() as cache:
        assert cache.lookup(skipped) < 2  # they begin with the same token
    assert engine.ask([kept], **told)[0].num_cached_tokens == 120  # what it was told, given back


def test_after_a_reset_of_the_connector_everything_is_computed(engine: Engine) -> None:
    prompt = prompt_of(130, seed=9)
    computed, _ = engine.answer(prompt, salt="reset")
    engine.wait_until_held(prompt, salt="reset")
    scheduler = engine.core.scheduler
    assert scheduler.reset_prefix_cache(reset_connector=True)
    assert engine.answer(prompt, salt="reset") == (computed, 0)
    scheduler.connector._scheduler._identities._mark = ()  # for the other tests


def test_a_reset_before_the_workers_are_known_holds_too(engine: Engine) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from p2pkv.engines.vllm.connector import P2PKVConnector

    prompt = prompt_of(140, seed=16)
    engine.answer(prompt)
    engine.wait_until_held(prompt)
    scheduler, own = engine.core.scheduler, engine.core.scheduler.connector
    late = P2PKVConnector(scheduler.vllm_config, KVConnectorRole.SCHEDULER, scheduler.kv_cache_config)
    assert late.reset_cache()
    late.set_xfer_handshake_metadata({0: WorkerReport(TINY, None)})
    half = late._scheduler
    assert half is not None
    wait_until(lambda: half._link.known is not None)
    scheduler.connector = late
    try:
        assert engine.answer(prompt)[1] == 0
    finally:
        scheduler.connector = own
        late.shutdown()


# --- what goes wrong ------------------------------------------------------------------------------------------------------


def test_what_is_gone_by_the_time_it_is_loaded_is_computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(900, seed=10)
    computed, _ = engine.answer(prompt, salt="alone")
    engine.answer(prompt[:500])
    engine.wait_until_held(prompt[:500])
    errors = engine.metric("load_errors")
    monkeypatch.setattr(EngineCache, "peek", lambda cache, tokens, identity, *, source: Lookup(len(tokens), is_fetching=False))
    assert engine.answer(prompt)[0] == computed
    assert engine.metric("load_errors") == errors + 1
    monkeypatch.undo()
    engine.wait_until_held(prompt)
    monkeypatch.setattr(EngineCache, "peek", lambda cache, tokens, identity, *, source: Lookup(len(tokens), is_fetching=False))
    assert engine.answer(prompt_of(300, seed=11))[0] == engine.answer(prompt_of(300, seed=11), salt="none of it")[0]


def test_a_node_that_dies_while_a_prompt_is_loaded_costs_nothing_but_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(700, seed=12)
    computed, _ = engine.answer(prompt)
    engine.wait_until_held(prompt)
    retrieve_into = EngineCache.retrieve_into

    def die(cache: EngineCache, tokens: Tokens, take: Take, identity: Identity | None = None, *, start: int = 0) -> int:
        pid = node_pid()
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)
        return retrieve_into(cache, tokens, take, identity, start=start)

    monkeypatch.setattr(EngineCache, "retrieve_into", die)
    assert engine.answer(prompt)[0] == computed
    monkeypatch.undo()
    assert engine.answer(prompt)[0] == computed
    wait_until(lambda: engine.answer(prompt)[1] == len(prompt))  # there is a node again, and it has been stored there


def test_a_stopped_node_makes_a_miss_and_holds_up_nothing(engine: Engine) -> None:
    prompt, other = prompt_of(400, seed=13), prompt_of(401, seed=13)
    computed, _ = engine.answer(prompt)
    expected, _ = engine.answer(other, salt="alone")
    engine.wait_until_held(prompt)
    pid = node_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        started_at = time.monotonic()
        assert engine.answer(prompt) == (computed, 0)
        assert engine.answer(other) == (expected, 0)
        took_s = time.monotonic() - started_at
    finally:
        os.kill(pid, signal.SIGCONT)
    assert took_s < 10
    wait_until(lambda: engine.answer(prompt) == (computed, len(prompt)), within_s=30)


def test_a_node_that_stops_while_a_prompt_is_loaded_is_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(500, seed=14)
    computed, _ = engine.answer(prompt)
    wait_until(lambda: engine.answer(prompt)[1] == len(prompt), within_s=30)
    pid = node_pid()
    retrieve_into = EngineCache.retrieve_into

    def stop(cache: EngineCache, tokens: Tokens, take: Take, identity: Identity | None = None, *, start: int = 0) -> int:
        os.kill(pid, signal.SIGSTOP)
        return retrieve_into(cache, tokens, take, identity, start=start)

    monkeypatch.setattr(EngineCache, "retrieve_into", stop)
    try:
        assert engine.answer(prompt)[0] == computed
    finally:
        os.kill(pid, signal.SIGCONT)
    monkeypatch.undo()
    wait_until(lambda: engine.answer(prompt) == (computed, len(prompt)), within_s=30)


def test_an_aborted_request_leaves_nothing_behind(engine: Engine) -> None:
    from vllm import SamplingParams

    llm_engine = engine.llm.llm_engine
    prompt = prompt_of(900, seed=15)
    engine.answer(prompt)
    engine.wait_until_held(prompt)
    for steps in range(6):  # while it is looked up, loaded, computed, and answered
        llm_engine.add_request(f"aborted-{steps}", {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=50))
        for _ in range(steps):
            llm_engine.step()
        llm_engine.abort_request([f"aborted-{steps}"])
    engine.settle()
    scheduler = engine.core.scheduler
    assert not scheduler.requests
    assert not scheduler.connector._scheduler._tracked
    assert scheduler.kv_cache_manager.usage == 0
