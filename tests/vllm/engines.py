"""vLLM as its users run it, on the tiny model: in this process, or as `vllm serve`."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from p2pkv.rendezvous import living_cards
from tests.live.command_line import free_port

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
"""The name under which the tiny model is served: the walk-through's commands say it."""
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_SERVER_DEV_MODE": "1",
}
"""Nothing leaves this host, and the KV cache is 1 GiB. The last offers `POST /reset_prefix_cache`."""
READY_S = 240.0
"""It takes 45 s on two idle cores."""
END_S = 30.0
LOG_TAIL_NCHARS = 4000
CONNECTOR = {"kv_connector": "P2PKVConnector", "kv_role": "kv_both"}
"""What a user writes into `--kv-transfer-config`."""


@contextmanager
def in_process(model: Path, *, kv_transfer: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` whose scheduler, worker and connector halves are all in this process; one at a time.

    Args:
        model: Its folder.
        kv_transfer: Fields of `KVTransferConfig`, such as `CONNECTOR`.
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


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`.

    Attributes:
        url: Of its HTTP port.
        process: The parent of its processes.
        log: What all of them write.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

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

    def prompt_tokens(self) -> dict[str, int]:
        """Where all prompts' tokens came from so far: `local_compute`, `local_cache_hit`, `external_kv_transfer`."""
        text = httpx2.get(f"{self.url}/metrics", timeout=10, trust_env=False).text
        found = {}
        for line in text.splitlines():
            if line.startswith("vllm:prompt_tokens_by_source_total{"):
                found[line.split('source="')[1].split('"')[0]] = int(float(line.rsplit(" ", 1)[1]))
        return found

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-LOG_TAIL_NCHARS:]


@contextmanager
def served(
    model: Path,
    log: Path,
    *arguments: str,
    kv_transfer: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """`vllm serve` on a free port of the loopback interface, ready; ended by SIGTERM.

    Args:
        model: Its folder.
        log: Where its processes write.
        arguments: More of its command line; of an option given twice the last counts.
        kv_transfer: What `--kv-transfer-config` says, such as `CONNECTOR`.
        environment: More of its environment, such as `VLLM_CPU_OMP_THREADS_BIND` for one of two engines.
    """
    port = free_port()
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "2048"),
        *("--block-size", "32", "--enforce-eager"),
        *(() if kv_transfer is None else ("--kv-transfer-config", json.dumps(kv_transfer))),
        *arguments,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | SETTINGS | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, so that no process of a failed start is left behind
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _await_ready(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        finally:
            _kill_group(process)


def _await_ready(server: Server) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        assert server.process.poll() is None, f"vLLM ended with {server.process.returncode}:\n{server.tail()}"
        assert time.monotonic() < deadline, f"vLLM isn't ready after {READY_S} s:\n{server.tail()}"
        try:
            if httpx2.get(f"{server.url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            pass  # it isn't listening yet
        time.sleep(0.2)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # as it should be: all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end_nodes(runtime_dir: Path) -> None:
    """End the nodes that engines started there: they outlive the engines."""
    for card in living_cards(runtime_dir, "p2pkv"):
        os.kill(card.pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while any(other.pid == card.pid for other in living_cards(runtime_dir, "p2pkv")):
            assert time.monotonic() < deadline, f"node {card.instance} doesn't end"
            time.sleep(0.05)
