"""Fixtures of tests that run `p2pkv` as processes."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.command_line import COMMAND, PROMPT, Run, call_json, free_port, read_ready, store, write_config


@pytest.fixture
def home(tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for configurations, whose nodes meet nobody else's, not on the shared port either."""
    monkeypatch.setenv("P2PKV_RUNTIME_DIR", str(runtime_dir))
    monkeypatch.setenv("P2PKV_CONTROLLER_HTTP_URL", f"localhost:{free_port()}")
    return tmp_path


@pytest.fixture
def run(home: Path) -> Iterator[Run]:
    """Starts `p2pkv` in the background; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def pair(home: Path, run: Run) -> tuple[Path, Path]:
    """Configurations of two running nodes that know each other; a holds `PROMPT`."""
    configs = write_config(home, "a"), write_config(home, "b")
    for node in [run("node", "--config", str(config)) for config in configs]:
        read_ready(node)
    deadline = time.monotonic() + 5
    while len(call_json("members")["members"]) < 2:  # type: ignore[arg-type]  # it is a list
        assert time.monotonic() < deadline
    store(configs[0], PROMPT)
    return configs
