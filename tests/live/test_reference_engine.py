"""What all is for: an engine's answer doesn't change when its prompt's KV cache was moved there from another instance."""

import random
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from p2pkv.config import NodeConfig
from p2pkv.core.keys import Identity
from p2pkv.demo.programs import Programs
from p2pkv.demo.setting import INSTANCES, Ports, write_yamls
from p2pkv.engines import EngineCache
from p2pkv.engines.huggingface import layout_of
from p2pkv.engines.reference.engine import ReferenceEngine
from p2pkv.engines.reference.model import ReferenceModel, load_model, make_tiny_llama

ANSWER_TOKENS = 32
SMALL: dict[str, Any] = {
    "vocab_size": 960,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # with the usual 0.02 an answer is one token again and again
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class Pair:
    """Two nodes that run, and what an engine needs to attach to each."""

    configs: tuple[Path, Path]
    ports: Ports
    runtime: Path

    def move(self, tokens: list[int]) -> int:
        """Move a prompt from instance 1 to instance 2; the tokens moved."""
        old, new = ([instance, "LocalCPUBackend"] for instance in INSTANCES)
        body = {"old_position": old, "new_position": new, "tokens": tokens}
        reply = httpx2.post(f"http://localhost:{self.ports.shared}/move", json=body, timeout=10, trust_env=False)
        assert reply.status_code == 200, reply.text
        assert reply.json()["state"] == "done"
        return int(reply.json()["num_tokens"])


def free_ports() -> Ports:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(8)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        numbers = [int(one.getsockname()[1]) for one in sockets]
    a, b, c, d, e, f, shared, monitor = numbers
    return Ports(engines=(a, b), workers=(c, d), transfers=(e, f), shared=shared, monitor=monitor)


def attach(config: Path | NodeConfig, model: ReferenceModel) -> EngineCache:
    return EngineCache.attach(config, model=model.name, layout=layout_of(model.network.config), weights=model.weights)


def prompt_of(token_count: int, *, seed: int) -> list[int]:
    rng = random.Random(f"{seed}:{token_count}")
    return [0, *(rng.randrange(2, 960) for _ in range(token_count - 1))]


def saved_model(config: PreTrainedConfig, folder: Path) -> Path:
    """A model with random weights, as Hugging Face saves it, in `folder`."""
    torch.manual_seed(11)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    make_tiny_llama().tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return make_tiny_llama()


@pytest.fixture
def place(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A setting in which nothing runs yet."""
    monkeypatch.setenv("P2PKV_RUNTIME_DIR", str(runtime_dir))
    ports = free_ports()
    return Pair(write_yamls(runtime_dir, ports), ports, runtime_dir)


@pytest.fixture
def pair(place: Pair) -> Iterator[Pair]:
    with Programs(place.runtime, place.runtime) as programs:
        nodes = [
            programs.start(f"node{number}", ["node", "--config", str(config)]) for number, config in enumerate(place.configs)
        ]
        for node in nodes:
            programs.ready_line(node)
        yield place


def test_a_moved_cache_gives_the_answer_that_no_cache_gives(pair: Pair, model: ReferenceModel) -> None:
    plain = ReferenceEngine(model, None)
    with attach(pair.configs[0], model) as first_cache, attach(pair.configs[1], model) as second_cache:
        first, second = ReferenceEngine(model, first_cache), ReferenceEngine(model, second_cache)
        for token_count in (5, 12, 255, 256, 257, 600, 1500):
            prompt = prompt_of(token_count, seed=1)
            expected = plain.complete(prompt, max_tokens=ANSWER_TOKENS)
            assert first.complete(prompt, max_tokens=ANSWER_TOKENS) == expected
            assert pair.move(prompt) == token_count
            moved = second.complete(prompt, max_tokens=ANSWER_TOKENS)
            assert moved.cached_count == token_count - 1
            assert (moved.answer_tokens, moved.text) == (expected.answer_tokens, expected.text)
            assert first_cache.lookup(prompt) == 0
        assert first.cache_problem is second.cache_problem is None


@pytest.mark.parametrize(("moved_count", "shared_count", "new_count"), [(600, 300, 100), (12, 12, 9)])
def test_a_prompt_that_begins_like_a_moved_one_uses_what_they_share(
    pair: Pair, model: ReferenceModel, moved_count: int, shared_count: int, new_count: int
) -> None:
    moved = prompt_of(moved_count, seed=2)
    prompt = moved[:shared_count] + prompt_of(new_count + 1, seed=3)[1:]
    with attach(pair.configs[0], model) as first, attach(pair.configs[1], model) as second:
        ReferenceEngine(model, first).complete(moved, max_tokens=1)
        pair.move(moved)
        done = ReferenceEngine(model, second).complete(prompt, max_tokens=ANSWER_TOKENS)
        assert second.lookup(prompt) == len(prompt)
    assert done.cached_count == shared_count
    assert done.answer_tokens == ReferenceEngine(model, None).complete(prompt, max_tokens=ANSWER_TOKENS).answer_tokens


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, dtype=torch.bfloat16),
        LlamaConfig(**{**SMALL, "eos_token_id": [1, 2]}, tie_word_embeddings=True),
        Qwen2Config(**SMALL),
        MistralConfig(**SMALL, sliding_window=None),
    ],
    ids=["llama-bfloat16", "llama-tied", "qwen2", "mistral"],
)
def test_a_model_from_a_folder_answers_the_same_from_a_moved_cache(
    pair: Pair, config: PreTrainedConfig, tmp_path: Path
) -> None:
    model = load_model(saved_model(config, tmp_path / "model"))
    plain = ReferenceEngine(model, None)
    with attach(pair.configs[0], model) as first_cache, attach(pair.configs[1], model) as second_cache:
        first, second = ReferenceEngine(model, first_cache), ReferenceEngine(model, second_cache)
        for token_count in (2, 12, 256, 300):
            prompt = prompt_of(token_count, seed=8)
            expected = plain.complete(prompt, max_tokens=ANSWER_TOKENS)
            assert first.complete(prompt, max_tokens=ANSWER_TOKENS) == expected
            assert pair.move(prompt) == token_count
            moved = second.complete(prompt, max_tokens=ANSWER_TOKENS)
            assert moved == replace(expected, cached_count=token_count - 1)
        assert first.cache_problem is second.cache_problem is None


@pytest.mark.long
def test_a_model_whose_cache_cannot_be_kept_is_served_without_and_says_why(place: Pair, tmp_path: Path) -> None:
    folder = saved_model(MistralConfig(**SMALL, sliding_window=8), tmp_path / "windowed")
    port = place.ports.engines[0]
    with Programs(place.runtime, place.runtime) as programs:
        command = ["engine", "--config", str(place.configs[0]), "--port", str(port), "--model", str(folder)]
        assert programs.ready_line(programs.start("engine", command)).endswith(" model=windowed")
        with httpx2.Client(base_url=f"http://localhost:{port}", timeout=30, trust_env=False) as http:
            assert http.get("/health").json()["cache_problem"].startswith("sliding_window: ")
            answer = http.post("/v1/completions", json={"model": "windowed", "prompt": prompt_of(40, seed=9)}).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_spoiled_chunk_changes_the_answer(pair: Pair, model: ReferenceModel) -> None:
    prompt = prompt_of(600, seed=4)
    spoiled = Identity(cache_salt="spoiled")
    with attach(pair.configs[0], model) as cache:
        engine = ReferenceEngine(model, cache)
        right = engine.complete(prompt, max_tokens=ANSWER_TOKENS)
        _, kv = cache.retrieve(prompt)
        assert kv is not None
        kv[:, :, 256:512] = 0
        cache.store(prompt, kv, identity=spoiled)
        wrong = engine.complete(prompt, max_tokens=ANSWER_TOKENS, identity=spoiled)
    assert wrong.cached_count == 599
    assert wrong.answer_tokens != right.answer_tokens


def test_tenants_with_different_salts_share_nothing(pair: Pair, model: ReferenceModel) -> None:
    prompt = prompt_of(40, seed=5)
    with attach(pair.configs[0], model) as cache:
        engine = ReferenceEngine(model, cache)
        engine.complete(prompt, max_tokens=1, identity=Identity(cache_salt="a"))
        assert engine.complete(prompt, max_tokens=1, identity=Identity(cache_salt="b")).cached_count == 0
        assert engine.complete(prompt, max_tokens=1, identity=Identity(cache_salt="a")).cached_count == 39


def test_a_dead_node_fails_no_completion_and_is_used_again_when_it_is_back(place: Pair, model: ReferenceModel) -> None:
    prompt = prompt_of(40, seed=6)
    config = place.configs[0]
    command = ["node", "--config", str(config)]
    expected = ReferenceEngine(model, None).complete(prompt, max_tokens=ANSWER_TOKENS)
    with Programs(place.runtime, place.runtime) as programs:
        node = programs.start("node", command)
        programs.ready_line(node)
        with attach(NodeConfig.from_yaml(config), model) as cache:
            engine = ReferenceEngine(model, cache)
            engine.complete(prompt, max_tokens=1)
            node.process.send_signal(signal.SIGKILL)
            node.process.wait(5)
            assert engine.complete(prompt, max_tokens=ANSWER_TOKENS) == expected
            problem = engine.cache_problem
            assert problem is not None
            programs.ready_line(programs.start("node-again", command))
            assert engine.complete(prompt, max_tokens=ANSWER_TOKENS) == expected
            assert engine.cache_problem is None
            assert engine.complete(prompt, max_tokens=ANSWER_TOKENS).cached_count == 39


def test_a_full_store_fails_no_completion(place: Pair, model: ReferenceModel) -> None:
    config = place.configs[0]
    chunk_gib = 256 * 4096 / 2**30
    config.write_text(config.read_text().replace("max_local_cpu_size: 5", f"max_local_cpu_size: {1.5 * chunk_gib}"))
    prompt = prompt_of(600, seed=7)
    with Programs(place.runtime, place.runtime) as programs:
        programs.ready_line(programs.start("node", ["node", "--config", str(config)]))
        with attach(config, model) as cache:
            engine = ReferenceEngine(model, cache)
            done = engine.complete(prompt, max_tokens=ANSWER_TOKENS)
            assert done == ReferenceEngine(model, None).complete(prompt, max_tokens=ANSWER_TOKENS)
            assert engine.cache_problem is not None
            assert "room" in engine.cache_problem
            assert engine.complete(prompt, max_tokens=1).cached_count == 256


@pytest.mark.long
def test_the_engine_starts_its_node_and_ends_at_a_signal_while_it_computes(place: Pair) -> None:
    config, port = place.configs[0], place.ports.engines[0]
    with Programs(place.runtime, place.runtime) as programs:
        engine = programs.start(
            "engine", ["engine", "--config", str(config), "--port", str(port), "--served-model-name", "llama"]
        )
        line = programs.ready_line(engine)
        assert line == f"p2pkv engine ready instance={INSTANCES[0]} url=http://127.0.0.1:{port} model=llama"
        with httpx2.Client(base_url=f"http://localhost:{port}", timeout=30, trust_env=False) as http:
            usage = http.post("/v1/completions", json={"model": "llama", "prompt": "Where the cache lives"}).json()["usage"]
            again = http.post("/v1/completions", json={"model": "llama", "prompt": "Where the cache lives"}).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == 0
            assert again["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
            assert http.get("/health").json() == {"cache_problem": None}
            with pytest.raises(httpx2.ReadTimeout):
                http.post("/v1/completions", json={"model": "llama", "prompt": "On", "max_tokens": 4000}, timeout=0.3)
        engine.process.send_signal(signal.SIGTERM)
        assert engine.process.wait(10) == 0  # within 0.4 s on an idle machine
