"""`p2pkv top` on running nodes: once, in terminals of all sizes, and when the node that it asks is lost."""

import json
import signal
from collections.abc import Iterator

import pytest

from tests.live.command_line import PROMPT, free_port
from tests.live.doors import CPU, SLOW, Cluster, NodeProcess, command, open_cluster, states, until
from tests.live.terminal import open_terminal

pytestmark = pytest.mark.live

LEAVES_SCREEN = "\x1b[?1049l"


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[NodeProcess]]:
    with open_cluster() as cluster:
        yield start_pair(cluster)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """For tests that end nodes."""
    with open_cluster() as cluster:
        yield cluster


def start_pair(cluster: Cluster) -> list[NodeProcess]:
    nodes = cluster.start(a=(f"http_port: {free_port()}",), b=SLOW)
    for node in nodes:
        until(lambda node=node: states(node) == {"a": "alive", "b": "alive"})  # type: ignore[misc]
    return nodes


def test_where_no_terminal_is_one_picture_is_printed(nodes: list[NodeProcess]) -> None:
    a, _ = nodes
    a.store(PROMPT)
    until(lambda: a.command("top")[1]["members"][0]["locations"][CPU]["chunks"] == 3)
    code, printed, told = command("top", "--via", a.http_url)
    assert (code, told) == (0, "")
    head, *rows, empty, events = printed.splitlines()
    assert head.split() == [*["INSTANCE", "STATE", "LOCATION", "CHUNKS", "HELD", "LIMIT", "FULL", "MEMBER", "FOR", "HEARD"]]
    assert [row.split()[:6] for row in rows] == [["a", "alive", CPU, "3", "12.0", "KiB"], ["b", "alive", CPU, "0", "0", "B"]]
    assert (empty, events) == ("", "no moves lately")


def test_a_move_under_way_and_its_end_are_in_the_picture(nodes: list[NodeProcess]) -> None:
    a, b = nodes
    prompt = list(range(16 * 800))
    b.store(prompt)
    move = a.post("/move", old_position=["b", CPU], new_position=["a", CPU], tokens=prompt, wait_s=0).json()
    code, picture = a.command("top")
    assert (code, picture["instance"], set(picture)) == (0, "a", {"instance", "at", "members", "events"})
    (event,) = picture["events"]
    assert (event["event_id"], event["state"], event["chunks"]["found"]) == (move["event_id"], "running", 800)
    assert all(member["joined_at"] <= member["heard_at"] <= picture["at"] + 1 for member in picture["members"])
    a.delete(f"/events/{move['event_id']}")
    row = command("top", "--once", "--via", a.http_url)[1].splitlines()[-1].split()
    assert (row[:5], row[-1]) == (["cancelled", "move", "b", "a", "0/800"], move["event_id"])


def test_a_terminal_shows_it_again_and_again_until_q(nodes: list[NodeProcess]) -> None:
    a, _ = nodes
    a.post("/clear", instance_id="a", location=CPU)
    with open_terminal("top", "--via", a.http_url, "--interval", "0.2") as terminal:
        terminal.until_shown("2 of 2 alive .* every 0.2 s")
        terminal.until_shown(r"a +alive +LocalCPUBackend +0 ")
        a.store(PROMPT)
        terminal.until_shown(r"a +alive +LocalCPUBackend +3 +12.0 KiB +5.0 GiB +<1 %")
        terminal.press("xq")
        assert terminal.until_ended() == 0
    assert terminal.raw.count("\x1b[2J") == 0  # nothing is ever cleared, so nothing flickers
    assert terminal.raw.endswith(LEAVES_SCREEN)
    assert "Traceback" not in terminal.raw


@pytest.mark.parametrize(("columns", "lines"), [(24, 8), (5, 3), (1, 1)])
def test_a_small_terminal_shows_what_fits(nodes: list[NodeProcess], columns: int, lines: int) -> None:
    with open_terminal("top", "--interval", "0.1", columns=columns, lines=lines) as terminal:
        terminal.until_shown("p2pkv top" if columns >= 24 else "…")
        if columns >= 24:
            terminal.until_shown("INSTANCE  STATE")
        terminal.until_shown("…")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.until_ended() == 0
    assert terminal.raw.endswith(LEAVES_SCREEN)
    assert "Traceback" not in terminal.raw


@pytest.mark.long
def test_when_its_node_is_lost_the_next_member_is_asked(cluster: Cluster) -> None:
    a, b = start_pair(cluster)
    environ = {"P2PKV_CONTROLLER_HTTP_URL": a.http_url.removeprefix("http://")}
    with open_terminal("top", "--interval", "0.2", environ=environ) as terminal:
        terminal.until_shown(f"asked a at {a.http_url}")
        a.kill()
        terminal.until_shown(f"asked b at {b.http_url}")
        terminal.until_shown("a +dead")
        terminal.press("q")
        assert terminal.until_ended() == 0


@pytest.mark.long
def test_a_node_that_was_named_is_tried_until_it_is_back(cluster: Cluster) -> None:
    (a,) = cluster.start(a=(f"http_port: {free_port()}",))
    with open_terminal("top", "--interval", "0.2", "--via", a.http_url) as terminal:
        terminal.until_shown(f"asked a at {a.http_url}")
        a.kill()
        terminal.until_shown(f"no answer for .*, trying again: no node answers at {a.http_url}")
        terminal.until_shown("a +alive")  # what it said last stays
        cluster.start(a=(f"http_port: {a.http_url.rpartition(':')[2]}",))
        terminal.until_shown(f"asked a at {a.http_url}")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.until_ended() == 0
    assert terminal.raw.endswith(LEAVES_SCREEN)


def test_with_no_node_at_the_beginning_it_ends(cluster: Cluster) -> None:
    for arguments in ((), ("--json",), ("--via", f"http://localhost:{free_port()}")):
        code, printed, told = command("top", *arguments)
        assert (code, printed) == (3, "")
        assert told.startswith("Error: no node answers at ")
    assert command("top", "--interval", "0")[0] == 2


def test_a_read_only_client_may_watch(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "0123456789abcdef0123456789abcdef"
    (node,) = cluster.start(a=(f"cluster_key: {key}",))
    code, _, told = command("top", "--via", node.http_url)
    assert code == 1
    assert told.startswith("Error: ")
    code, printed, _ = command("token", "--config", str(node.config), "--read-only", "--json")
    monkeypatch.setenv("P2PKV_TOKEN", json.loads(printed)["token"])
    code, picture = node.command("top")
    assert (code, [member["instance"] for member in picture["members"]]) == (0, ["a"])
