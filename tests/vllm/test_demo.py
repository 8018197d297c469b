"""The demo with vLLM leaves nothing, however it ends; all that it shows is `./dev demo --vllm` itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

DEMO = [sys.executable, "-m", "p2pkv", "demo", "--vllm"]
NODE_S = 240.0
"""An engine starts its node when it has loaded its model."""


def processes_of(temporary: Path) -> list[str]:
    """Command lines of all processes that were started with a file in `temporary`, or work in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, place = (process / "cmdline").read_bytes(), (process / "cwd").readlink()
        except OSError:
            continue  # it has ended
        if os.fsencode(temporary) in command or place.is_relative_to(temporary):
            found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_an_interrupted_demo_leaves_no_engine_and_no_node(runtime_dir: Path) -> None:
    environ = {**os.environ, "TMPDIR": str(runtime_dir)}
    with subprocess.Popen(DEMO, env=environ, stdout=subprocess.DEVNULL, start_new_session=True) as demo:
        deadline = time.monotonic() + NODE_S
        while not any(" p2pkv node " in command for command in processes_of(runtime_dir)):
            assert demo.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        demo.send_signal(signal.SIGINT)
        demo.wait(60)
    assert processes_of(runtime_dir) == []
    assert list(runtime_dir.iterdir()) == []
