"""vLLM as its users run it, on the tiny model: in this process, or as `vllm serve`."""

import gc
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from p2pkv.rendezvous import living_cards
from sims.bench.vllm.engines import Engine, await_ready, end_engine, start_engine
from tests.live.command_line import free_port

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
"""The name under which the tiny model is served: the walk-through's commands say it."""
OPTIONS = ("--served-model-name", MODEL, "--max-model-len", "2048")


@contextmanager
def in_process(model: Path, *, kv_transfer: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` whose scheduler, worker and connector halves are all in this process; one at a time.

    Args:
        model: Its folder.
        kv_transfer: Fields of `KVTransferConfig`, such as those of `CONNECTOR`.
        options: More arguments of `LLM`, or others in the place of ours.
    """
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    usual: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 2048,
        "block_size": 32,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
        "kv_transfer_config": None if kv_transfer is None else KVTransferConfig(**kv_transfer),
    }
    llm = LLM(str(model), **(usual | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


class Server(Engine):
    """A running `vllm serve`, and what is asked of it."""

    def complete(self, prompt: str | list[int], *, max_tokens: int = 16, **fields: Any) -> dict[str, Any]:
        """Answer `prompt` greedily; `["choices"][0]["token_ids"]` are the answer's tokens."""
        body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "return_token_ids": True,
            **fields,
        }
        return self.post("/v1/completions", body)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON that it answers with 200."""
        reply = httpx2.post(f"{self.url}{path}", json=body, timeout=60, trust_env=False)
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json() if reply.content else {}
        return answer


@contextmanager
def served(
    model: Path,
    log: Path,
    *options: str,
    kv_transfer: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
) -> Iterator[Server]:
    """`vllm serve` on a free port, as `start_engine` starts it, ready; `environ` comes on top of this process's own."""
    started = start_engine(
        free_port(), model, log, *OPTIONS, *options, kv_transfer=kv_transfer, environ={**os.environ, **(environ or {})}
    )
    server = Server(started.port, started.process, started.log)
    try:
        await_ready(server)
        yield server
    finally:
        end_engine(server)


def end_nodes(runtime_dir: Path) -> None:
    """End the nodes that engines started there: they outlive the engines."""
    for card in living_cards(runtime_dir, "p2pkv"):
        os.kill(card.pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while any(other.pid == card.pid for other in living_cards(runtime_dir, "p2pkv")):
            assert time.monotonic() < deadline, f"node {card.instance} doesn't end"
            time.sleep(0.05)
