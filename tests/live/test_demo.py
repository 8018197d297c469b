"""The demo, as a user runs it: everything it checks is true, and nothing of it is left, however it ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = [sys.executable, "-m", "p2pkv", "demo"]


def processes_of(temporary: Path) -> list[str]:
    """Command lines of all processes that were started with a file in `temporary`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if os.fsencode(temporary) in command:
            found.append(command.decode(errors="replace"))
    return found


@pytest.mark.long
def test_everything_that_the_demo_checks_is_true(runtime_dir: Path) -> None:
    environ = {**os.environ, "TMPDIR": str(runtime_dir)}
    done = subprocess.run([*DEMO, "--json"], env=environ, capture_output=True, timeout=110, check=False)
    report = json.loads(done.stdout)
    assert report["ok"], report
    assert len(report["checks"]) == 19
    assert done.returncode == 0
    assert processes_of(runtime_dir) == []
    assert list(runtime_dir.glob("p2pkv-demo-*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_running(runtime_dir: Path, number: signal.Signals) -> None:
    environ = {**os.environ, "TMPDIR": str(runtime_dir)}
    with subprocess.Popen(DEMO, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True) as demo:
        assert demo.stdout is not None
        assert any(line.startswith("p2pkv ready") for line in demo.stdout)
        assert processes_of(runtime_dir)
        demo.send_signal(number)
        demo.communicate(timeout=30)
    assert processes_of(runtime_dir) == []
    assert list(runtime_dir.glob("p2pkv-demo-*")) == []
