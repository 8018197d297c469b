"""Engines set up in other ways, each started by its test: vLLM has one connector a process."""

from pathlib import Path
from typing import Any

import pytest

from p2pkv.engines.vllm.crew import log
from sims.bench.vllm.engines import CONNECTOR
from tests.vllm.connected import CHUNK, PATIENT, Engine, engine_on, instance, prompt_of, wait_until
from tests.vllm.engines import in_process


def test_preempted_requests_resume_with_the_same_answers(tiny_model: Path) -> None:
    options: dict[str, Any] = {"max_num_batched_tokens": 256, "max_num_seqs": 8, "max_model_len": 512}
    prompts = [prompt_of(150 + number, seed=20) for number in range(6)]
    with engine_on(tiny_model, CHUNK, enable_prefix_caching=False, num_gpu_blocks_override=24, **options) as engine:
        alone = [list(engine.ask([prompt], "alone", 100)[0].outputs[0].token_ids) for prompt in prompts]
        for salt in (None, None, "alone"):  # computed, then loaded while there is no room, then with all of it held
            outputs = engine.ask(prompts, salt, 100)
            assert [list(output.outputs[0].token_ids) for output in outputs] == alone
        preemptions = sum(metric.value for metric in engine.llm.get_metrics() if metric.name == "vllm:num_preemptions")
        assert preemptions > 0
        assert engine.metric("loaded_tokens") > 0


def test_bfloat16_beside_vllms_own_prefix_cache(tiny_model: Path) -> None:
    with engine_on(tiny_model, 256, dtype="bfloat16", block_size=128) as engine:
        for count in (11, 300, 1500):
            prompt = prompt_of(count, seed=21)
            computed, _ = engine.answer(prompt)
            with engine.attach("bfloat16") as cache:
                wait_until(lambda: cache.lookup(prompt) == len(prompt))  # noqa: B023
            assert engine.answer(prompt) == (computed, count)  # vLLM has the whole blocks, the node the rest
            assert engine.llm.reset_prefix_cache()
            assert engine.answer(prompt) == (computed, count)
        prompt[1000] += 1
        assert engine.answer(prompt)[1] == 1000
        assert engine.prompt_tokens("local_cache_hit") == 256 + 1408 + 896


def test_beside_another_connector(tiny_model: Path, tmp_path: Path) -> None:
    example = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    example_config = {"kv_connector_extra_config": {"shared_storage_path": str(tmp_path)}}
    both = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [PATIENT, {**example, **example_config}]},
    }
    with engine_on(tiny_model, CHUNK, both, enable_prefix_caching=False) as engine:
        prompt = prompt_of(300, seed=22)
        computed, _ = engine.answer(prompt)
        engine.wait_until_held(prompt)
        assert engine.answer(prompt) == (computed, 300)
        assert list(tmp_path.iterdir())  # the other one has stored it too


@pytest.mark.parametrize("kind", ["no config", "unknown key", "load failures"])
def test_where_it_cannot_work_vllm_serves_as_without_it(tiny_model: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kv_transfer: dict[str, Any] = dict(CONNECTOR)
    reason = "neither is set"
    if kind == "unknown key":
        kv_transfer["kv_connector_extra_config"] = {"p2pkv.modell": "m"}
        reason = "is p2pkv.model meant?"
    if kind == "load failures":
        kv_transfer = {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"connectors": [CONNECTOR]},
        }
        reason = "kv_load_failure_policy"
    with instance(CHUNK):
        if kind == "no config":
            monkeypatch.delenv("P2PKV_CONFIG_FILE")
        warnings: list[str] = []
        monkeypatch.setattr(log, "warning", lambda text, *values: warnings.append(text % values))
        with in_process(tiny_model, kv_transfer=kv_transfer, enable_prefix_caching=False) as llm:
            engine = Engine(llm, tiny_model)
            first, _ = engine.answer(prompt_of(100, seed=23))
            assert engine.answer(prompt_of(100, seed=23)) == (first, 0)
        [warning] = warnings
        assert reason in warning
