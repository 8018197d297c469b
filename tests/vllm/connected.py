"""vLLM with the connector in this process, and an instance for it."""

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from p2pkv.core.keys import Identity
from p2pkv.engines import EngineCache, KVLayout
from p2pkv.engines.autostart import connect_or_start
from p2pkv.rendezvous import place_of, read_card, runtime_directory
from sims.bench.vllm.engines import CONNECTOR
from tests.live.command_line import free_port
from tests.vllm.engines import end_nodes, in_process

ANSWER_TOKENS = 16
TINY = KVLayout(layers=4, kv_heads=2, head_dim=64, dtype="float32")
"""Of the tiny model."""
CHUNK = 80
"""With blocks of 32 tokens hardly a chunk ends where a block does."""
PATIENT = {**CONNECTOR, "kv_connector_extra_config": {"p2pkv.lookup_deadline_s": 2.0}}
"""On a machine that does something else beside the tests, a lookup may take more than the usual 50 ms."""


class Engine:
    """vLLM with the connector, and what it was last asked."""

    def __init__(self, llm: Any, model: Path) -> None:
        self.llm = llm
        self.model = model

    def ask(
        self, prompts: Sequence[list[int]], salt: str | None = None, count: int = ANSWER_TOKENS, **params: Any
    ) -> list[Any]:
        """Answer all at once, greedily."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, extra_args={"kv_transfer_params": params})
        salted = {} if salt is None else {"cache_salt": salt}
        asked = [{"prompt_token_ids": prompt, **salted} for prompt in prompts]
        outputs = list(self.llm.generate(asked, sampling, use_tqdm=False))
        self.settle()
        return outputs

    @property
    def core(self) -> Any:
        """What runs the steps."""
        return self.llm.llm_engine.engine_core.engine_core

    def settle(self) -> None:
        """Take the steps that `vllm serve` takes by itself, until all blocks are free."""
        wait_until(lambda: not self.core.scheduler.has_requests() or (self.core.step_fn() and False))

    def answer(self, prompt: list[int], salt: str | None = None, **params: Any) -> tuple[list[int], int]:
        """The answer's tokens, and how many of the prompt's were in a cache."""
        [output] = self.ask([prompt], salt, **params)
        return list(output.outputs[0].token_ids), output.num_cached_tokens

    def attach(self, dtype: str = "float32") -> EngineCache:
        """The node's cache, as the connector has it."""
        return EngineCache.attach(os.environ["P2PKV_CONFIG_FILE"], model=str(self.model), layout=replace(TINY, dtype=dtype))

    def wait_until_held(self, tokens: list[int], salt: str | None = None) -> None:
        """Wait until the node holds all of `tokens`: stores go on beside the steps."""
        with self.attach() as cache:
            wait_until(lambda: cache.lookup(tokens, Identity(salt or "")) == len(tokens))

    def metric(self, name: str) -> float:
        return float(sum(metric.value for metric in self.llm.get_metrics() if metric.name == f"vllm:p2pkv_{name}"))

    def prompt_tokens(self, source: str) -> float:
        """How many prompts' tokens have come from there: `local_compute`, `local_cache_hit`, `external_kv_transfer`."""
        seen = [metric for metric in self.llm.get_metrics() if metric.name == "vllm:prompt_tokens_by_source"]
        return float(next(metric.value for metric in seen if metric.labels["source"] == source))


def wait_until(is_over: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not is_over():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def prompt_of(count: int, *, seed: int) -> list[int]:
    rng = random.Random(f"{seed}:{count}")
    return [0, *(rng.randrange(2, 960) for _ in range(count - 1))]


def node_pid() -> int:
    card = read_card(place_of(runtime_directory(os.environ), "p2pkv", "a"))
    assert card is not None
    return card.pid


@contextmanager
def instance(chunk_size: int) -> Iterator[Path]:
    """A runtime directory and the yaml of an instance whose node no engine has started yet."""
    with TemporaryDirectory(prefix="p2pkv-") as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "a.yaml"
        path.write_text(
            f"lmcache_instance_id: a\nlmcache_worker_port: {free_port()}\ncontroller_http_url: localhost:{free_port()}\n"
            f"chunk_size: {chunk_size}\nmax_local_cpu_size: 0.25\n"
        )
        patch.setenv("P2PKV_RUNTIME_DIR", folder)
        patch.setenv("P2PKV_CONFIG_FILE", str(path))
        place = place_of(Path(folder), "p2pkv", "a")
        yield path
        if place.folder.exists():  # an engine has begun to start a node, and may have ended before that was there
            connect_or_start(place, path).close()
            wait_until(lambda: read_card(place) is not None)
        end_nodes(Path(folder))


@contextmanager
def engine_on(model: Path, chunk_size: int, kv_transfer: dict[str, Any] = PATIENT, **options: Any) -> Iterator[Engine]:
    with instance(chunk_size), in_process(model, kv_transfer=kv_transfer, **options) as llm:
        engine = Engine(llm, model)
        engine.wait_until_held([])  # the node runs
        yield engine
