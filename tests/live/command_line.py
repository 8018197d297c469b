"""`p2pkv` called as its users call it, for tests: configurations, processes, and what they print."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from p2pkv import NodeConfig
from p2pkv.engines import EngineCache, KVLayout

COMMAND = (sys.executable, "-m", "p2pkv")
LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=8, dtype="float32", planes=2)
PROMPT = list(range(100, 140))
AT = "LocalCPUBackend"
READY = re.compile(r"p2pkv ready instance=(\S+) http=(http://\S+) ws=(ws://\S+) transfer=(\S+:\d+) shared=(\S+)\n")

Run = Callable[..., subprocess.Popen[str]]
"""Starts `p2pkv` in the background."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def write_config(home: Path, name: str, *lines: str) -> Path:
    path = home / f"{name}.yaml"
    path.write_text(
        "\n".join([f"lmcache_instance_id: {name}", f"lmcache_worker_port: {free_port()}", "chunk_size: 16", *lines])
    )
    return path


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=30, check=False)


def call_json(*arguments: str, exit_code: int = 0) -> dict[str, object]:
    ended = call(*arguments, "--json")
    assert ended.returncode == exit_code, ended.stderr
    answer: dict[str, object] = json.loads(ended.stdout)
    return answer


def read_ready(process: subprocess.Popen[str]) -> re.Match[str]:
    assert process.stdout is not None
    line = process.stdout.readline()
    ready = READY.fullmatch(line)
    assert ready, line or process.communicate()[1]
    return ready


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> tuple[int, str, float]:
    """The exit code, what else was printed, and the seconds it took."""
    began_at = time.monotonic()
    process.send_signal(number)
    rest, _ = process.communicate(timeout=10)
    return process.returncode, rest, time.monotonic() - began_at


def wait_gone(pid: int) -> None:
    """Wait until a process has ended that needn't be a child of ours."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        assert poll.poll(10_000)
    finally:
        os.close(process)


def store(config: Path, tokens: list[int]) -> None:
    with EngineCache.attach(NodeConfig.from_yaml(config), model="tiny", layout=LAYOUT) as cache:
        cache.store(tokens, torch.rand(LAYOUT.layers, LAYOUT.planes, len(tokens), LAYOUT.kv_heads, LAYOUT.head_dim))
