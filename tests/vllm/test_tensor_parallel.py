"""`vllm serve` of two tensor-parallel workers, a shard each: all in, or not announced."""

import os
from collections.abc import Callable
from pathlib import Path

import httpx2

from p2pkv.core.keys import Identity
from p2pkv.engines import EngineCache
from tests.live.command_line import AT
from tests.vllm.connected import PATIENT, TINY, prompt_of, wait_until
from tests.vllm.engines import Server

WORKERS = range(2)
ANSWER_TOKENS = 8


def attach(config: Path, model: Path, worker: int) -> EngineCache:
    return EngineCache.attach(config, model=str(model), layout=TINY, world_size=len(WORKERS), worker_id=worker)


def move(tokens: list[int]) -> int:
    body = {"old_position": ["a", AT], "new_position": ["b", AT], "tokens": tokens, "wait_s": 20}
    reply = httpx2.post(f"http://{os.environ['P2PKV_CONTROLLER_HTTP_URL']}/move", json=body, timeout=30, trust_env=False)
    return int(reply.json().get("num_tokens", 0))


def test_both_shards_are_stored_moved_and_loaded_and_one_of_them_alone_is_not(
    tiny_model: Path, configure: Callable[..., Path], serve: Callable[..., Server]
) -> None:
    prompt = prompt_of(300, seed=30)

    def start() -> Server:
        server = serve("--tensor-parallel-size", "2", kv_transfer=PATIENT, environ={"VLLM_CPU_OMP_THREADS_BIND": "0|1"})
        wait_until(lambda: server.complete([1], max_tokens=1)["kv_transfer_params"] is not None)  # the node is there
        return server

    def ask(server: Server, salt: str | None = None) -> tuple[list[int], float]:
        """The answer, and how many of the prompt's tokens were loaded for it."""
        before = server.prompt_tokens().get("external_kv_transfer", 0)
        salted = {} if salt is None else {"cache_salt": salt}
        [choice] = server.complete(prompt, max_tokens=ANSWER_TOKENS, ignore_eos=True, **salted)["choices"]
        return choice["token_ids"], server.prompt_tokens()["external_kv_transfer"] - before

    config_a = configure("a")
    first = start()
    computed, loaded = ask(first)
    assert loaded == 0
    with attach(config_a, tiny_model, 0) as cache:
        wait_until(lambda: cache.peek([*prompt, *computed[:-1]]).num_tokens == len(prompt) + ANSWER_TOKENS - 1)
    first.process.terminate()
    first.process.wait()

    config_b = configure("b")
    second = start()
    wait_until(lambda: move(prompt) == len(prompt))
    assert ask(second) == (computed, len(prompt))

    with attach(config_b, tiny_model, 0) as one, attach(config_b, tiny_model, 1) as other:
        shards = [shard for cache in (one, other) if (shard := cache.retrieve(prompt)[1]) is not None]
        assert [tuple(shard.shape) for shard in shards] == [TINY.of_worker(2).shape(len(prompt))] * 2
        one.store(prompt, shards[0], Identity("half"))
        assert one.peek(prompt, Identity("half")).num_tokens == 0
        assert ask(second, "half") == (computed, 0)
        one.store(prompt, shards[0], Identity("spoiled"))
        other.store(prompt, shards[1] * 0, Identity("spoiled"))
        answer, loaded = ask(second, "spoiled")
        assert (answer != computed, loaded) == (True, len(prompt))
