"""`p2pkv` as its users call it: processes, exit codes, what stands on stdout, and what on stderr."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from p2pkv import NodeConfig
from tests.live.command_line import AT, PROMPT, READY, Run, call, call_json, end, free_port, read_ready, write_config

pytestmark = pytest.mark.live

# --- node -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_node_says_that_it_is_ready_and_leaves_on_a_signal(home: Path, run: Run, number: signal.Signals) -> None:
    config = write_config(home, "a")
    node = run("node", "--config", str(config))
    ready = read_ready(node)
    assert ready[1] == "a"
    assert ready[3] == f"ws://127.0.0.1:{NodeConfig.from_yaml(config).lmcache_worker_port}"
    assert ready[5] == f"http://{os.environ['P2PKV_CONTROLLER_HTTP_URL']}"
    code, rest, seconds = end(node, number)
    assert (code, rest) == (0, "")
    assert seconds < 2


def test_a_node_is_small_and_loads_nothing_of_engines_or_clients(home: Path, run: Run) -> None:
    node = run("node", "--config", str(write_config(home, "a")))
    read_ready(node)
    status = Path(f"/proc/{node.pid}/status").read_text()
    assert int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) < 80 * 1024
    maps = Path(f"/proc/{node.pid}/maps").read_text()
    assert not {library for library in ("torch", "transformers") if library in maps}
    source = "import sys, p2pkv.cli, p2pkv.commands.node; print([m for m in ('torch', 'httpx2') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_variable_can_name_the_configuration(home: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(write_config(home, "a")))
    assert read_ready(run("node"))[1] == "a"


def test_wrong_configurations_list_all_problems_and_exit_with_2(home: Path) -> None:
    ended = call("node", "--config", str(write_config(home, "a", "chunk_sise: 1", "max_local_cpu_size: -1")))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "chunk_sise: unknown key; did you mean chunk_size?" in ended.stderr
    assert "max_local_cpu_size" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_in_use_is_named_and_exits_with_2(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = call("node", "--config", str(write_config(home, "a", f"http_port: {taken.getsockname()[1]}")))
    assert ended.returncode == 2
    assert "http_port" in ended.stderr


def test_a_second_node_of_one_name_is_refused_with_1(home: Path, run: Run) -> None:
    config = write_config(home, "a")
    read_ready(run("node", "--config", str(config)))
    ended = call("node", "--config", str(config))
    assert ended.returncode == 1
    assert "'a'" in ended.stderr
    assert "Traceback" not in ended.stderr


# --- calls ----------------------------------------------------------------------------------------------------------------


def test_a_move_is_made_looked_up_and_told_of(pair: tuple[Path, Path]) -> None:
    tokens = ",".join(map(str, PROMPT))
    moved = call_json("move", f"a/{AT}", f"b/{AT}", "--tokens", tokens, "--wait")
    assert (moved["num_tokens"], moved["state"]) == (40, "done")
    event = call_json("event", str(moved["event_id"]))
    assert (event["state"], event["copy"]) == ("done", False)
    deadline = time.monotonic() + 2
    while (layout := call_json("lookup", "--tokens", tokens)["layout_info"]) != {"b": [AT, 40]}:
        assert time.monotonic() < deadline, layout


def test_what_people_read_says_the_same(pair: tuple[Path, Path], home: Path) -> None:
    file = home / "tokens.json"
    file.write_text(json.dumps(PROMPT))
    moved = call("move", f"a/{AT}", f"b/{AT}", "--tokens-file", str(file), "--copy")
    assert moved.returncode == 0
    event_id, rest = moved.stdout.split(": ")
    assert rest == "done, 40 tokens\n"
    event = call("event", event_id).stdout
    assert f"copy of 40 tokens from a/{AT} to b/{AT} by handoff" in event
    members = call("members").stdout.splitlines()
    assert members[0].split() == ["INSTANCE", "STATE", "LOCATION", "CHUNKS", "HELD", "HTTP"]
    assert [line.split()[:3] for line in members[1:]] == [["a", "alive", AT], ["b", "alive", AT]]
    assert call("lookup", "--tokens-file", str(file)).stdout.splitlines()[1].split() == ["a", AT, "40"]
    assert call("lookup", "--tokens", "1,2").stdout == "no instance holds any of it\n"


def test_failures_of_a_call_exit_with_1_and_say_why(pair: tuple[Path, Path]) -> None:
    failed = call("move", f"a/{AT}", f"c/{AT}", "--tokens", "100,101")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "'c'" in failed.stderr
    assert call_json("event", "xxx", exit_code=1)["error"] == "unknown_event"


def test_wrong_usage_exits_with_2(pair: tuple[Path, Path], home: Path) -> None:
    positions = (f"a/{AT}", f"b/{AT}")
    for arguments in (
        ("nothing",),
        ("move", "a", f"b/{AT}"),
        ("move", *positions, "--tokens", "1,x"),
        ("move", *positions, "--tokens", "-1"),
        ("move", *positions, "--tokens", "1", "--tokens-file", str(home / "a.yaml")),
        ("move", *positions, "--tokens-file", str(home / "missing")),
        ("move", *positions, "--tokens", "1", "--all"),
        ("up", str(home / "missing")),
    ):
        ended = call(*arguments)
        assert ended.returncode == 2, arguments
        assert ended.stderr
        assert "Traceback" not in ended.stderr


def test_where_no_node_answers_the_exit_code_is_3(home: Path) -> None:
    for via in ((), ("--via", f"http://localhost:{free_port()}"), ("--via", "nonsense"), ("--via", "http://localhost:99999")):
        ended = call("members", *via)
        assert ended.returncode == 3, ended.stderr
        assert "Traceback" not in ended.stderr


# --- up -------------------------------------------------------------------------------------------------------------------


def test_up_runs_a_folder_restarts_what_dies_and_ends_all(home: Path, run: Run) -> None:
    for name in ("a", "b"):
        write_config(home, name)
    cluster = run("up", str(home))
    assert cluster.stdout is not None
    ready = [cluster.stdout.readline() for _ in range(2)]
    assert sorted(line.partition(" | ")[0] for line in ready) == ["a", "b"]
    assert all(READY.fullmatch(line.partition(" | ")[2]) for line in ready)

    (victim,) = [pid for pid in children_of(cluster.pid) if str(home / "a.yaml") in command_of(pid)]
    os.kill(victim, signal.SIGKILL)
    again = cluster.stdout.readline()
    assert again.startswith("a | p2pkv ready instance=a")

    children = children_of(cluster.pid)
    assert len(children) == 2
    code, rest, seconds = end(cluster)
    assert (code, rest) == (0, "")
    assert seconds < 4
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_up_names_every_problem_of_every_file_before_it_starts_any(home: Path) -> None:
    write_config(home, "a", "chunk_sise: 1")
    write_config(home, "b", "bind_host: 0.0.0.0")
    ended = call("up", str(home))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "chunk_sise" in ended.stderr
    assert "bind_host" in ended.stderr


def test_up_of_an_empty_folder_is_wrong_usage(home: Path) -> None:
    ended = call("up", str(home))
    assert ended.returncode == 2
    assert "*.yaml" in ended.stderr


def children_of(pid: int) -> list[int]:
    lists = [children.read_text() for children in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for child in " ".join(lists).split()]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
