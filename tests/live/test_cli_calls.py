"""The commands that ask a node something, and `p2pkv controller`, as their users call them."""

import json
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path

import httpx2
import pytest
import torch
from typer.main import get_command

from p2pkv import NodeConfig
from p2pkv.cli import app
from p2pkv.engines import EngineCache, KVLayout
from tests.live.command_line import AT, COMMAND, PROMPT, Run, call, call_json, free_port, read_ready, write_config

pytestmark = pytest.mark.live

LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=16, dtype="float32", planes=2)
LONG_PROMPT = list(range(12_800))
"""800 chunks of 8 KiB: four batches of a fetch, a second and a half each at 1 MiB/s."""
TOKENS = ",".join(map(str, PROMPT))


@pytest.mark.parametrize("name", sorted(get_command(app).commands))  # type: ignore[attr-defined]  # it is a group
def test_the_help_of_each_command_shows_how_to_call_it(name: str) -> None:
    shown = call(name, "--help")
    assert shown.returncode == 0
    assert f"For example:\n    p2pkv {name}" in shown.stdout


# --- calls ----------------------------------------------------------------------------------------------------------------


def test_clear_forgets_a_position_through_any_node(pair: tuple[Path, Path]) -> None:
    by_name = {member["instance"]: member["http"] for member in call_json("members")["members"]}  # type: ignore[attr-defined]
    cleared = call("clear", f"a/{AT}", "--via", by_name["b"])
    assert (cleared.returncode, cleared.stdout) == (0, "40 tokens cleared\n")
    assert call_json("clear", f"a/{AT}")["num_tokens"] == 0
    assert call("clear", "a").returncode == 2
    assert call("clear", f"c/{AT}").returncode == 1
    assert call_json("clear", "a/Disk", exit_code=1)["error"] == "unknown_location"


def test_health_says_who_is_alive(pair: tuple[Path, Path]) -> None:
    healthy = call("health", "b")
    assert (healthy.returncode, healthy.stdout) == (0, "alive, 1 worker\n")
    assert call_json("health", "a")["error_codes"] == {"0": 0}
    unknown = call("health", "c")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "'c'" in unknown.stderr


def test_events_are_listed_newest_first(pair: tuple[Path, Path]) -> None:
    assert call("events").stdout == "no events\n"
    moves = [call_json("move", *places, "--tokens", TOKENS) for places in ((f"a/{AT}", f"b/{AT}"), (f"b/{AT}", f"a/{AT}"))]
    head, *lines = call("events").stdout.splitlines()
    assert head.split() == ["EVENT", "STATE", "KIND", "FROM", "TO", "TOKENS"]
    assert [line.split()[:2] for line in lines] == [[move["event_id"], "done"] for move in reversed(moves)]
    assert lines[0].split()[2:] == ["move", f"b/{AT}", f"a/{AT}", "40"]
    listed: list[dict[str, object]] = call_json("events")["events"]  # type: ignore[assignment]
    assert [event["event_id"] for event in listed] == [move["event_id"] for move in reversed(moves)]


def test_a_move_that_has_ended_is_not_cancelled(pair: tuple[Path, Path]) -> None:
    moved = call_json("move", f"a/{AT}", f"b/{AT}", "--tokens", TOKENS)
    assert call_json("cancel", str(moved["event_id"]), exit_code=1)["state"] == "done"
    assert call_json("cancel", "xxx", exit_code=1)["error"] == "unknown_event"


# --- long moves -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_move(home: Path, run: Run) -> list[str]:
    """The arguments of a move that takes six seconds."""
    limits = ("same_host_handoff: false", "transfer_rate_limit: 1")
    configs = [write_config(home, name, *limits) for name in ("a", "b")]
    for node in [run("node", "--config", str(config)) for config in configs]:
        read_ready(node)
    with EngineCache.attach(NodeConfig.from_yaml(configs[0]), model="tiny", layout=LAYOUT) as cache:
        kv = torch.zeros((LAYOUT.layers, LAYOUT.planes, len(LONG_PROMPT), LAYOUT.kv_heads, LAYOUT.head_dim))
        assert cache.store(LONG_PROMPT, kv) == len(LONG_PROMPT)
    file = home / "prompt.json"
    file.write_text(json.dumps(LONG_PROMPT))
    return ["move", f"a/{AT}", f"b/{AT}", "--tokens-file", str(file), "--wait"]


@pytest.mark.long
def test_a_long_move_shows_in_a_terminal_how_far_it_is(slow_move: list[str]) -> None:
    terminal, inner = pty.openpty()
    move = subprocess.Popen([*COMMAND, *slow_move], stdout=subprocess.PIPE, stderr=inner, text=True)
    os.close(inner)
    shown = b""
    while part := read_available(terminal):
        shown += part
    os.close(terminal)
    assert re.search(rb"moving .* of 800 chunks, [1-9] MiB carried", shown), shown
    assert move.communicate()[0].endswith(": done, 12800 tokens\n")
    assert move.returncode == 0


def read_available(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""


def test_a_cancelled_move_ends_for_who_cancels_and_for_who_waits(slow_move: list[str], run: Run) -> None:
    waiting = run(*slow_move, "--json")
    url = f"http://{os.environ['P2PKV_CONTROLLER_HTTP_URL']}/events"
    deadline = time.monotonic() + 10
    while not (events := httpx2.get(url, trust_env=False).json()["events"]):
        assert time.monotonic() < deadline
    cancelled = call("cancel", events[0]["event_id"])
    assert cancelled.returncode == 0
    assert cancelled.stdout.startswith(f"{events[0]['event_id']}: cancelled\n")
    printed, shown = waiting.communicate(timeout=20)
    assert (waiting.returncode, shown) == (1, "")  # and without a terminal nothing is shown meanwhile
    assert json.loads(printed)["state"] == "cancelled"


# --- controller -----------------------------------------------------------------------------------------------------------


def test_a_controller_stores_nothing_and_instances_join_at_its_port(home: Path, run: Run) -> None:
    port, monitor = free_port(), free_port()
    controller = run("controller", "--host", "127.0.0.1", "--port", str(port), "--monitor-port", str(monitor))
    ready = read_ready(controller)
    assert ready[1] == f"controller-{port}"
    assert ready[5] == f"http://127.0.0.1:{port}"
    config = write_config(home, "a", f"controller_url: 127.0.0.1:{monitor}", "enable_controller: false")
    read_ready(run("node", "--config", str(config)))
    via = ("--via", f"http://127.0.0.1:{port}")
    deadline = time.monotonic() + 5
    while (healthy := call("health", "a", *via)).returncode != 0:
        assert time.monotonic() < deadline, healthy.stderr
    locations = {member["instance"]: member["locations"] for member in call_json("members", *via)["members"]}  # type: ignore[attr-defined]
    assert locations[f"controller-{port}"] == {}
    assert set(locations["a"]) == {AT}
    controller.send_signal(signal.SIGTERM)
    assert controller.wait(5) == 0


def test_a_controller_beyond_loopback_says_what_that_takes(home: Path) -> None:
    refused = call("controller", "--host", "192.0.2.1")
    assert refused.returncode == 2
    assert "cluster_key" in refused.stderr
    assert "Traceback" not in refused.stderr
