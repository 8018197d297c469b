"""`p2pkv bench` between running nodes: it measures, touches nobody's chunks, and leaves nothing behind however it ends."""

import fcntl
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

from tests.live.command_line import COMMAND, PROMPT, free_port
from tests.live.doors import CPU, SLOW, Cluster, NodeProcess, command, open_cluster, states, until

pytestmark = pytest.mark.live

TINY = ("--chunks", "3", "--chunk-size", "64KiB", "--rounds", "2")
LONG = ("--chunks", "20", "--chunk-size", "1MiB", "--rounds", "1")
"""From the slow node: twenty seconds there."""
KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> list[NodeProcess]:
    nodes = cluster.start(a=(), slow=SLOW, full=("max_local_cpu_size: 0.001",))
    until(lambda: all(list(states(node).values()) == ["alive"] * 3 for node in nodes))
    nodes[0].store(PROMPT)
    return nodes


def held(node: NodeProcess, name: str | None = None) -> tuple[int, int]:
    """Chunks and bytes at an instance, as a node knows it."""
    members = node.get("/members").json()["members"]
    (locations,) = [member["locations"] for member in members if member["instance"] == (name or node.name)]
    return locations[CPU]["chunks"], locations[CPU]["bytes"]


def running(node: NodeProcess) -> list[dict[str, Any]]:
    return [event for event in node.get("/events").json()["events"] if event["state"] == "running"]


def start_bench(*arguments: str) -> "Popen[str]":
    return Popen([*COMMAND, "bench", *arguments], stdout=PIPE, stderr=PIPE, text=True)


def test_it_measures_and_leaves_both_instances_as_they_were(nodes: list[NodeProcess]) -> None:
    a, slow, _ = nodes
    before = held(a), held(slow)
    assert before[0][0] == 3
    code, report = a.command("bench", "a", "slow", *TINY)
    assert (code, report["whole"], report["chunks"], report["chunk_bytes"]) == (0, True, 3, 65_536)
    rows = {(row["what"], row["unit"]): row for row in report["rows"]}
    assert {name: (row["count"], row["lanes"]) for name, row in rows.items()} == {
        ("3 chunks, a -> slow", "ms"): (2, ["tcp"]),
        ("3 chunks, a -> slow", "GiB/s"): (2, ["tcp"]),
        ("3 chunks, slow -> a", "ms"): (2, ["tcp"]),
        ("3 chunks, slow -> a", "GiB/s"): (2, ["tcp"]),
        ("12 tokens, a -> slow", "ms"): (20, ["tcp"]),
        ("12 tokens, slow -> a", "ms"): (20, ["tcp"]),
        ("/lookup of 48 tokens", "ms"): (20, []),
        ("/lookup of 12 tokens", "ms"): (20, []),
    }
    assert all(0 < row["least"] <= row["median"] <= row["most"] for row in rows.values())
    times, rates = rows["3 chunks, slow -> a", "ms"], rows["3 chunks, slow -> a", "GiB/s"]
    assert rates["most"] * times["least"] == pytest.approx(3 * 65_536 / 2**30 * 1000)
    assert (held(a), held(slow)) == before
    assert a.post("/lookup", tokens=PROMPT).json()["layout_info"] == {"a": [CPU, 40]}


def test_people_get_a_table(nodes: list[NodeProcess]) -> None:
    code, printed, told = command("bench", "slow", "a", *TINY[:-1], "1")
    assert (code, told) == (0, "")
    head, names, *rows = printed.splitlines()
    assert head == "slow <-> a: 3 chunks of 64.0 KiB, 192 KiB"
    assert names.split() == ["WHAT", "MEDIAN", "LEAST", "MOST", "UNIT", "TIMES", "LANE"]
    assert len(rows) == 8


@pytest.mark.parametrize(("source", "target"), [("a", "full"), ("full", "a")])
def test_where_it_would_have_to_evict_it_refuses(nodes: list[NodeProcess], source: str, target: str) -> None:
    a, _, full = nodes
    before = held(a), held(full)
    code, printed, told = command("bench", source, target, "--chunks", "16", "--chunk-size", "64KiB")
    assert (code, printed) == (1, "")
    assert "full has 1.0 MiB free and this takes 1.1 MiB" in told
    assert "evict" in told
    assert (held(a), held(full)) == before
    assert not running(a)


@pytest.mark.long
def test_ctrl_c_in_the_middle_of_a_move_leaves_nothing_behind(nodes: list[NodeProcess]) -> None:
    a, slow, _ = nodes
    before = held(a), held(slow)
    with start_bench("slow", "a", *LONG) as bench:
        until(lambda: bool(running(slow)), within_s=20)
        assert held(slow)[1] > 20 * 2**20
        bench.send_signal(signal.SIGINT)
        printed, told = bench.communicate(timeout=20)
    assert (bench.returncode, told) == (0, "")
    assert printed.splitlines()[1:] == ["nothing was measured", "cut short by a signal"]
    assert not running(slow)
    assert (held(a), held(slow)) == before


@pytest.mark.long
def test_what_a_killed_bench_has_left_the_next_one_clears(nodes: list[NodeProcess]) -> None:
    slow = nodes[1]
    before = held(slow)
    with start_bench("slow", "a", *LONG) as bench:
        until(lambda: bool(running(slow)), within_s=20)
        bench.kill()
    (move,) = running(slow)
    slow.delete(f"/events/{move['event_id']}")
    until(lambda: not running(slow))
    assert held(slow)[1] > 20 * 2**20
    with start_bench("slow", "a", *LONG) as bench:
        until(lambda: bool(running(slow)), within_s=20)
        bench.send_signal(signal.SIGTERM)
        _, told = bench.communicate(timeout=20)
    assert (bench.returncode, told) == (0, "")
    assert held(slow) == before


@pytest.mark.long
@pytest.mark.parametrize("lost", ["source", "target"])
def test_when_an_end_is_lost_the_other_is_cleared(cluster: Cluster, nodes: list[NodeProcess], lost: str) -> None:
    a, slow, _ = nodes
    (node,) = cluster.start(**{lost: SLOW})
    until(lambda: states(slow).get(lost) == states(a).get(lost) == "alive")
    before = held(a), held(slow)
    ends = (lost, "a") if lost == "source" else ("slow", lost)
    with start_bench(*ends, *LONG, "--via", a.http_url) as bench:
        until(lambda: any(event["new_position"][0] == ends[1] for event in running(a)), within_s=20)
        node.kill()
        printed, told = bench.communicate(timeout=40)
    assert (bench.returncode, printed) == (1, "")
    assert told.startswith("Error: ")
    assert "left behind" not in told
    assert (held(a), held(slow)) == before


@pytest.mark.long
def test_when_the_asked_node_is_lost_both_ends_are_cleared(cluster: Cluster, nodes: list[NodeProcess]) -> None:
    a, slow, _ = nodes
    (asked,) = cluster.start(asked=())
    until(lambda: states(slow).get("asked") == states(asked).get("slow") == states(asked).get("a") == "alive")
    before = held(a), held(slow)
    with start_bench("slow", "a", "--chunks", "8", *LONG[2:], "--via", asked.http_url) as bench:
        until(lambda: bool(running(slow)), within_s=20)
        asked.kill()
        printed, told = bench.communicate(timeout=60)
    assert (bench.returncode, printed) == (3, "")
    assert told.startswith(f"Error: no node answers at {asked.http_url}")
    assert "left behind" not in told
    until(lambda: (held(a), held(slow)) == before)


def test_two_from_one_source_would_clear_each_others_chunks(cluster: Cluster, nodes: list[NodeProcess]) -> None:
    with (cluster.folder / "p2pkv" / "a" / "bench.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, printed, told = command("bench", "a", "slow", *TINY)
    assert (code, printed, told) == (1, "", "Error: another p2pkv bench from a is running\n")


def test_what_cannot_be_measured_is_said(nodes: list[NodeProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = nodes[0]
    for arguments, code, part in (
        (("a", "a"), 2, "one instance"),
        (("a", "nobody"), 1, "No instance is named 'nobody'; known are a, "),
        (("a", "slow", "--chunk-size", "1MB"), 2, "no size"),
        (("a", "slow", "--chunk-size", "8B"), 2, "--chunk-size is from 32 B"),
        (("a", "slow", "--chunks", "65536", "--chunk-size", "32B", "--rounds", "0"), 2, "--rounds"),
        (("a", "slow", "--via", f"http://localhost:{free_port()}"), 3, "no node answers"),
    ):
        ended = command("bench", *arguments)
        assert ended[:2] == (code, ""), arguments
        assert part in ended[2]
    tmp_path.chmod(0o700)
    monkeypatch.setenv("P2PKV_RUNTIME_DIR", str(tmp_path))
    code, printed, told = command("bench", "a", "slow", "--via", a.http_url)
    assert (code, printed) == (3, "")
    assert "a has no node of this user on this host" in told


def test_without_torch_it_says_what_to_install(nodes: list[NodeProcess]) -> None:
    program = "import sys; sys.modules['torch'] = None; from p2pkv.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", program, "bench", "a", "slow"], capture_output=True, text=True, timeout=30, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "install p2pkv[engines]" in ended.stderr


@pytest.mark.long
def test_what_is_at_a_target_of_another_host_is_brought_home(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target has another runtime directory, so that its engine socket isn't found: as on another host."""
    lines = (f"cluster_key: {KEY}",)
    with open_cluster() as cluster:
        (here,) = cluster.start(here=lines)
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("P2PKV_RUNTIME_DIR", str(runtime_dir))
            contact = here.ws_url.removeprefix("ws://")
            (there,) = cluster.start(there=(*lines, *SLOW, f"contacts: ['{contact}']", "controller_http_url: localhost:1"))
        token = json.loads(command("token", "--config", str(here.config), "--json")[1])["token"]
        monkeypatch.setenv("P2PKV_TOKEN", token)
        for node in (here, there):
            node.headers["authorization"] = f"Bearer {token}"

        def chunks(node: NodeProcess) -> int:
            members = node.request("GET", "/members").json()["members"]
            return sum(each["locations"][CPU]["chunks"] for each in members if each["instance"] == node.name)

        def is_coming_back() -> bool:
            events = here.request("GET", "/events").json()["events"]
            return any(event["state"] == "running" and event["old_position"][0] == "there" for event in events)

        until(lambda: len(here.request("GET", "/members").json()["members"]) == 2)
        arguments = ("here", "there", "--chunks", "3", "--chunk-size", "1MiB", "--rounds", "1", "--via", here.http_url)
        with start_bench(*arguments) as bench:
            until(is_coming_back, within_s=20)
            assert chunks(there) == 3
            bench.send_signal(signal.SIGINT)
            printed, told = bench.communicate(timeout=40)
        assert (bench.returncode, told) == (0, "")
        assert "3 chunks, here -> there" in printed
        assert (chunks(here), chunks(there)) == (0, 0)
