"""The demo's processes: told to be ready or why they aren't, and none is left, whatever session it is in."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pkv.demo import programs as programs_module
from p2pkv.demo.programs import ProgramError, Programs, pids_of
from tests.live.command_line import free_port

READY_S = 20.0


@pytest.fixture
def programs(runtime_dir: Path) -> Iterator[Programs]:
    with Programs(runtime_dir, runtime_dir) as programs:
        yield programs


def pid_in(file: Path) -> int:
    deadline = time.monotonic() + READY_S
    while not file.exists() or not file.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(file.read_text())


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_server_is_waited_for(programs: Programs) -> None:
    port = free_port()
    server = programs.start_server("server", [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)], {})
    programs.wait_until_healthy(server, f"http://127.0.0.1:{port}/", READY_S)
    assert programs.end(server) != 0  # SIGTERM
    assert has_ended(server.process.pid)


def test_a_server_that_ends_at_its_start_or_stays_silent_says_what_it_wrote(programs: Programs) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}/"
    ended = programs.start_server("ended", ["sh", "-c", "echo $REASON; exit 3"], {"REASON": "no room"})
    with pytest.raises(ProgramError, match=r"ended ended at its start:\n  no room"):
        programs.wait_until_healthy(ended, nowhere, READY_S)
    silent = programs.start_server("silent", ["sleep", "60"], {})
    with pytest.raises(ProgramError, match=r"silent wasn't ready within 0\.1 s"):
        programs.wait_until_healthy(silent, nowhere, 0.1)


def test_the_users_own_settings_reach_no_program(
    programs: Programs, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("P2PKV_CONFIG_FILE", "LMCACHE_CHUNK_SIZE", "VLLM_PORT"):
        monkeypatch.setenv(name, "1")
    told = programs.start_server("told", ["env"], {"LMCACHE_CONFIG_FILE": "instance1.yaml"})
    assert told.process.wait(READY_S) == 0
    ours = {line for line in told.log.read_text().splitlines() if line.startswith(("P2PKV_", "LMCACHE_", "VLLM_"))}
    assert ours == {f"P2PKV_RUNTIME_DIR={runtime_dir}", "LMCACHE_CONFIG_FILE=instance1.yaml"}


def test_a_killed_program_takes_its_children_along_but_not_its_node(programs: Programs, runtime_dir: Path) -> None:
    script = "sleep 60 & echo $! >child; setsid sh -c 'echo $$ >node; exec sleep 60' & wait"
    engine = programs.start_server("engine", ["sh", "-c", script], {})
    child, node = pid_in(runtime_dir / "child"), pid_in(runtime_dir / "node")
    assert set(pids_of(engine)) == {engine.process.pid, child}
    programs.kill(engine, pids_of(engine))
    assert has_ended(child)
    assert not has_ended(node)
    assert programs.end_nodes_of_engines()
    assert has_ended(node)


def test_what_stays_when_told_to_end_is_ended_by_force(
    programs: Programs, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs_module, "END_S", 0.3)
    script = "setsid sh -c 'trap \"\" TERM; echo $$ >node; while :; do sleep 0.1; done' & wait"
    engine = programs.start_server("engine", ["sh", "-c", script], {})
    node = pid_in(runtime_dir / "node")
    assert programs.end(engine) != 0
    assert not programs.end_nodes_of_engines()
    deadline = time.monotonic() + READY_S
    while not has_ended(node):
        assert time.monotonic() < deadline
        time.sleep(0.01)
