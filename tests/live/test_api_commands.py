"""What every command keeps to: where it looks for a node, what it prints as JSON, and its exit codes."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
import trio
from typer.main import get_command

from p2pkv import NodeConfig, open_node
from p2pkv.cli import app
from p2pkv.core.ids import Location
from tests.live.command_line import COMMAND, PROMPT, Run, free_port, store, write_config
from tests.live.doors import CPU, SLOW, Cluster, NodeProcess, client_of, command, open_cluster, states, until

pytestmark = pytest.mark.live

TOKENS = ",".join(map(str, PROMPT))
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]  # it is a group
SERVERS = {"node", "controller", "up", "engine"}
"""They print one ready line for programs, or none; the rest is their log."""
WITHOUT_NODE = SERVERS | {"demo", "token"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> list[NodeProcess]:
    nodes = cluster.start(a=(), slow=SLOW)
    for node in nodes:
        until(lambda node=node: states(node) == {"a": "alive", "slow": "alive"})  # type: ignore[misc]
    return nodes


@pytest.fixture
def a(nodes: list[NodeProcess]) -> NodeProcess:
    return nodes[0]


def options(name: str) -> set[str]:
    return {option for parameter in COMMANDS[name].params for option in parameter.opts}


# --- options --------------------------------------------------------------------------------------------------------------


def test_every_command_of_the_interface_is_there() -> None:
    promised = "node controller up engine demo move lookup members events event cancel pin unpin clear health top bench"
    assert set(promised.split()) <= set(COMMANDS)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - SERVERS))
def test_a_command_that_prints_takes_json_and_one_that_asks_a_node_takes_via(name: str) -> None:
    assert "--json" in options(name)
    assert ("--via" in options(name)) == (name not in WITHOUT_NODE)


def test_the_controller_is_at_lmcaches_ports_unless_it_is_told_others() -> None:
    defaults = {parameter.opts[0]: parameter.default for parameter in COMMANDS["controller"].params}
    assert (defaults["--host"], defaults["--port"], defaults["--monitor-port"]) == ("localhost", 9000, 9001)


def test_every_answer_is_one_json_object_with_the_fields_of_the_call(a: NodeProcess) -> None:
    a.store(PROMPT)
    move = ("move", f"a/{CPU}", f"slow/{CPU}", "--tokens", TOKENS)
    code, moved = a.command(*move, "--copy", "--wait")
    assert (code, moved) == (0, {"event_id": moved["event_id"], "num_tokens": 40, "state": "done"})
    fields = {
        ("lookup", "--tokens", TOKENS): {"event_id", "layout_info", "complete"},
        ("members",): {"members", "instance"},
        ("events",): {"events"},
        ("event", moved["event_id"]): set(a.get(f"/events/{moved['event_id']}").json()),
        ("health", "slow"): {"event_id", "error_codes"},
        ("clear", f"slow/{CPU}"): {"event_id", "num_tokens"},
        ("top",): {"instance", "at", "members", "events"},
        ("bench", "a", "slow", "--chunks", "1", "--chunk-size", "4KiB", "--rounds", "1"): {
            *("source", "target", "chunks", "chunk_bytes", "whole", "rows")
        },
    }
    for arguments, names in fields.items():
        code, printed, told = command(*arguments, "--json", "--via", a.http_url)
        assert (code, set(json.loads(printed)), told) == (0, names, ""), arguments
        assert printed.count("\n") == 1


# --- the ready line -------------------------------------------------------------------------------------------------------


def test_the_ready_line_is_all_that_a_node_prints(home: Path, run: Run) -> None:
    http, transfer = free_port(), free_port()
    lines = (f"http_port: {http}", f"distributed_url: localhost:{transfer}", "enable_controller: false", "remote_url: lm://x:1")
    config = write_config(home, "n", *lines)
    ws = NodeConfig.from_yaml(config).lmcache_worker_port
    doors = f"http=http://127.0.0.1:{http} ws=ws://127.0.0.1:{ws} transfer=localhost:{transfer}"
    node = run("node", "--config", str(config))
    assert node.stdout is not None
    assert node.stdout.readline() == f"p2pkv ready instance=n {doors} shared=-\n"
    node.send_signal(signal.SIGINT)
    printed, logged = node.communicate(timeout=10)
    assert (node.returncode, printed) == (0, "")
    assert "remote_url has no meaning here" in logged


# --- where a node is looked for -------------------------------------------------------------------------------------------


def asked(*arguments: str) -> str:
    """The node that answers."""
    code, printed, told = command("members", "--json", *arguments)
    assert code == 0, told
    instance: str = json.loads(printed)["instance"]
    return instance


def test_a_node_is_asked_by_its_address_or_at_the_shared_port_or_found_in_the_runtime_directory(
    nodes: list[NodeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in nodes:
        assert asked("--via", node.http_url) == node.name
    for url in (nodes[0].http_url.removeprefix("http://"), nodes[0].http_url):
        monkeypatch.setenv("P2PKV_CONTROLLER_HTTP_URL", url)
        assert asked() == "a"
    monkeypatch.setenv("P2PKV_CONTROLLER_HTTP_URL", f"localhost:{free_port()}")
    assert asked() in ("a", "slow")
    monkeypatch.setenv("P2PKV_CLUSTER", "another")
    assert command("members")[0] == 3


@pytest.mark.parametrize("name", ["P2PKV_CONFIG_FILE", "LMCACHE_CONFIG_FILE"])
def test_the_file_that_a_variable_names_says_where_the_shared_port_is(
    a: NodeProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("P2PKV_CONTROLLER_HTTP_URL")
    monkeypatch.setenv("P2PKV_RUNTIME_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv(name, str(write_config(tmp_path, "mine", f"controller_http_url: {a.http_url}")))
    assert asked() == "a"


def test_a_shared_port_that_is_no_address_is_wrong_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PKV_CONTROLLER_HTTP_URL", "localhost:port")
    code, printed, told = command("members")
    assert (code, printed) == (2, "")
    assert told.startswith("Error: P2PKV_CONTROLLER_HTTP_URL: must be host:port")


# --- exit codes -----------------------------------------------------------------------------------------------------------


def test_0_is_done_and_so_is_an_empty_lookup(a: NodeProcess) -> None:
    assert command("lookup", "--tokens", "1,2", "--via", a.http_url) == (0, "no instance holds any of it\n", "")
    assert a.command("lookup", "--tokens", "1,2")[0] == 0


def test_0_is_ctrl_c_while_a_move_goes_on(nodes: list[NodeProcess], tmp_path: Path) -> None:
    a, slow = nodes
    prompt = list(range(16 * 800))
    slow.store(prompt)
    file = tmp_path / "tokens"
    file.write_text(str(prompt))
    move = ("move", f"slow/{CPU}", f"a/{CPU}", "--tokens-file", str(file), "--wait", "--via", a.http_url)

    def moves() -> list[str]:
        events = a.get("/events").json()["events"]
        return [event["event_id"] for event in events if event["num_tokens"] == len(prompt)]

    with Popen([*COMMAND, *move], stdout=PIPE, stderr=PIPE, text=True) as waiting:
        until(lambda: bool(moves()))
        time.sleep(1.2)  # the call itself waits for a second, then the command does
        waiting.send_signal(signal.SIGINT)
        printed, told = waiting.communicate(timeout=10)
    assert (waiting.returncode, printed, told) == (0, "", "")
    (event_id,) = moves()
    assert a.delete(f"/events/{event_id}").json()["state"] == "cancelled"


async def test_1_is_a_move_that_ends_partial(runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three chunks arrives with another checksum than its source tells."""
    monkeypatch.setenv("P2PKV_RUNTIME_DIR", str(runtime_dir))
    monkeypatch.setenv("P2PKV_CONTROLLER_HTTP_URL", f"localhost:{free_port()}")
    async with AsyncExitStack() as stack:
        configs = [write_config(tmp_path, name, *lines) for name, lines in (("p", SLOW), ("q", ()))]
        source, _ = [await stack.enter_async_context(open_node(NodeConfig.from_yaml(config))) for config in configs]
        await trio.to_thread.run_sync(store, configs[0], PROMPT)
        memory: Any = source.driver._memories[Location.LOCAL_CPU]
        _, second, _ = memory._resident
        memory.shards(second)[0].checksum = bytes(16)
        with trio.fail_after(5):
            while len(source.driver.machine.members()) < 2:  # noqa: ASYNC110 - a whole node has no event for it
                await trio.sleep(0.02)
        move = ("move", f"p/{CPU}", f"q/{CPU}", "--tokens", TOKENS, "--json", "--via", source.addresses.http)
        code, printed, _ = await trio.to_thread.run_sync(lambda: command(*move))
        assert code == 1
        answer = json.loads(printed)
        assert answer == {"event_id": answer["event_id"], "num_tokens": 40, "state": "partial"}
        async with client_of(source.addresses.http) as http:
            event = (await http.get(f"/events/{answer['event_id']}")).json()
        assert event["chunks"]["failed"] == 2
        assert event["error"]["error"] == "transfer_failed"


def test_2_is_wrong_usage_and_3_no_node(a: NodeProcess) -> None:
    for arguments in (("nothing",), ("move", "a", "b"), ("lookup", "--tokens", "x"), ("events", "--colour"), ("event",)):
        assert command(*arguments)[0] == 2, arguments
    for via in (f"http://localhost:{free_port()}", "nonsense", a.ws_url.replace("ws://", "http://")):
        code, printed, told = command("members", "--via", via)
        assert (code, printed) == (3, ""), told
        assert told.startswith("Error: ")
