"""`vllm serve` as its users call it: scheduler and worker are processes of their own, and the node outlives them."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sims.bench.vllm.engines import CONNECTOR
from tests.vllm.connected import PATIENT, prompt_of
from tests.vllm.engines import Server


def wait_for(server: Server, name: str, at_least: float) -> None:
    deadline = time.monotonic() + 20
    while server.counts()[name] < at_least:
        assert time.monotonic() < deadline, f"{server.counts()}\n{server.tail()}"
        time.sleep(0.1)


def wait_until_attached(server: Server) -> int:
    """Until the node that it starts is used: what is computed before that isn't kept. Returns how many tokens are."""
    deadline = time.monotonic() + 20
    told = None
    while told is None:
        assert time.monotonic() < deadline, server.tail()
        told = server.complete(prompt_of(4, seed=1000), max_tokens=1)["kv_transfer_params"]
    return int(told["num_tokens"])


def test_the_name_alone_suffices_and_what_was_kept_outlives_the_engine(
    configure: Callable[..., Path], serve: Callable[..., Server]
) -> None:
    configure("a")
    prompt, other = prompt_of(300, seed=1), prompt_of(200, seed=2)
    first = serve(kv_transfer=CONNECTOR)
    kept_before = wait_until_attached(first)
    computed = first.complete(prompt, max_tokens=24)
    told: dict[str, Any] = computed["kv_transfer_params"]
    assert (told["instance"], told["num_tokens"]) == ("a", 323)
    skipped = first.complete(other, kv_transfer_params={"skip_save": True})
    assert skipped["kv_transfer_params"] is None
    wait_for(first, "stored_tokens_total", kept_before + 323)
    assert first.prompt_tokens()["external_kv_transfer"] == 0
    os.killpg(first.process.pid, signal.SIGKILL)
    first.process.wait()

    second = serve(kv_transfer=PATIENT)
    loaded = second.complete(prompt, max_tokens=24, kv_transfer_params=told)
    assert loaded["choices"][0]["token_ids"] == computed["choices"][0]["token_ids"]
    assert loaded["kv_transfer_params"] == told  # the node is the same as before, generation and all
    assert second.prompt_tokens() == {"local_compute": 0, "local_cache_hit": 0, "external_kv_transfer": 300}
    again = second.complete(other)
    assert again["choices"][0]["token_ids"] == skipped["choices"][0]["token_ids"]
    assert second.prompt_tokens()["external_kv_transfer"] == 300
    seen = second.counts()
    assert seen["loaded_tokens_total"] == 300
    assert seen["load_seconds_count"] == 1
    assert seen["load_errors_total"] == seen["missed_deadlines_total"] == 0
