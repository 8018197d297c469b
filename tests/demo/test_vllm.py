"""What the demo with vLLM types is what the seed types; all of it together is `./dev demo --vllm`."""

import json
import os
import shlex
from itertools import chain
from pathlib import Path

import pytest

from p2pkv.demo import VllmWalkthrough, run_demo
from p2pkv.demo import vllm as demo_vllm
from p2pkv.demo.vllm import arguments_of, counts_by_source, variables_of

SEED = """\
CUDA_VISIBLE_DEVICES=1 LMCACHE_CONFIG_FILE=instance2.yaml vllm serve meta-llama/Llama-3.1-8B-Instruct --max-model-len 4096 \
--gpu-memory-utilization 0.8 --port 8001 --kv-transfer-config '{"kv_connector":"LMCacheConnectorV1", "kv_role":"kv_both"}'"""


@pytest.mark.parametrize("cores", [{0}, {0, 1}, {2, 5, 7}])
def test_the_command_is_the_seeds_with_the_connectors_name_swapped(cores: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    variables = [f"{name}={value}" for name, value in variables_of(1, Path("/somewhere/instance2.yaml")).items()]
    typed = [*variables, "vllm", *chain(*arguments_of(8001))]
    seed = shlex.split(SEED.replace("LMCacheConnectorV1", "P2PKVConnector"))
    begin = typed.index(seed[0])
    assert typed[begin : begin + len(seed)] == seed
    core = {} if len(cores) == 1 else {f"VLLM_CPU_OMP_THREADS_BIND={sorted(cores)[1]}"}
    assert set(typed[:begin]) == set(core)


def test_tokens_are_counted_by_where_they_came_from() -> None:
    lines = [
        'vllm:prompt_tokens_by_source_total{engine="0",model_name="a/b",source="local_compute"} 12.0',
        'vllm:prompt_tokens_by_source_total{engine="0",model_name="a/b",source="external_kv_transfer"} 1.2e+01',
    ]
    assert counts_by_source(lines) == {"local_compute": 12, "external_kv_transfer": 12}


async def test_without_vllm_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_vllm, "VLLM", tmp_path / "vllm")
    assert await run_demo(VllmWalkthrough, as_json=True) == 1
    report = json.loads(capsys.readouterr().out)
    assert "./dev demo --vllm" in report["problem"]
    assert (report["ok"], report["checks"]) == (False, [])
