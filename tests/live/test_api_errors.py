"""Every error of the interface, through every door that can give it: HTTP, `/control` and the command line.

Instance a holds a prompt, b holds one of another layout, `tiny` has no room, `gone` has left.
"""

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
from trio_websocket import ConnectionRejected

from p2pkv import NodeConfig, open_node
from p2pkv.cluster_key import ClusterKey, Purpose
from p2pkv.core.events import LeaveRequested
from p2pkv.engines import KVLayout
from p2pkv.net.websockets import dial_websocket
from p2pkv.node import Node
from tests.live.command_line import PROMPT, write_config
from tests.live.doors import CPU, DISK, Cluster, NodeProcess, client_of, command, open_cluster, states, until

pytestmark = pytest.mark.live

OTHER_LAYOUT = KVLayout(layers=3, kv_heads=2, head_dim=8, dtype="float32", planes=2)
TOKENS = ",".join(map(str, PROMPT))
TOKENS_MAX = 1_048_576
SECRET = "the key of the cluster that wants tokens"
KEY = ClusterKey("other", SECRET.encode())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> list[NodeProcess]:
    return cluster.start(a=(), b=(), tiny=("max_local_cpu_size: 0.000001",))


@pytest.fixture(scope="module")
def tiny(nodes: list[NodeProcess]) -> NodeProcess:
    return nodes[2]


@pytest.fixture(scope="module")
def a(cluster: Cluster, nodes: list[NodeProcess]) -> NodeProcess:
    a, b, _ = nodes
    trio.run(come_and_go, a, write_config(cluster.folder, "gone"))
    until(lambda: states(a) == {**dict.fromkeys(("a", "b", "tiny"), "alive"), "gone": "left"})
    a.store(PROMPT)
    b.store(PROMPT, layout=OTHER_LAYOUT)
    until(lambda: a.get("/members").json()["members"][1]["models"] == ["tiny"])
    return a


async def come_and_go(a: NodeProcess, config: Path) -> None:
    async with open_node(NodeConfig.from_yaml(config)):
        await trio.to_thread.run_sync(until, lambda: states(a).get("gone") == "alive")


def move(source: str, target: str, old: str = CPU, new: str = CPU, **fields: object) -> dict[str, object]:
    return {"old_position": [source, old], "new_position": [target, new], "tokens": PROMPT, **fields}


def move_command(source: str, target: str, *more: str) -> tuple[str, ...]:
    return ("move", f"{source}/{CPU}", f"{target}/{CPU}", "--tokens", TOKENS, *more)


@dataclass(frozen=True)
class Refusal:
    """A call that is refused, and how.

    Attributes:
        kind: Of the call, its path over HTTP and its type on `/control`.
        fields: Of the call.
        arguments: The same as a command; none where no command asks this.
        status: Of HTTP.
        error: The code.
        named: A word of the sentence that says what is wrong.
        exit_code: Of the command.
    """

    kind: str
    fields: dict[str, object]
    arguments: tuple[str, ...]
    status: int
    error: str
    named: str
    exit_code: int = 1


REFUSALS = [
    Refusal("health", {"instance_id": "x"}, ("health", "x"), 404, "unknown_instance", "'x'"),
    Refusal("move", move("x", "b"), move_command("x", "b"), 404, "unknown_instance", "'x'"),
    Refusal("move", move("a", "x"), move_command("a", "x"), 404, "unknown_instance", "'x'"),
    Refusal("clear", {"instance_id": "x", "location": CPU}, ("clear", f"x/{CPU}"), 404, "unknown_instance", "'x'"),
    Refusal("query_worker_info", {"instance_id": "x"}, (), 404, "unknown_instance", "'x'"),
    Refusal("query_instance", {"ip": "10.1.1.1"}, (), 404, "unknown_instance", "10.1.1.1"),
    Refusal("clear", {"instance_id": "a", "location": "X"}, ("clear", "a/X"), 404, "unknown_location", "'X'"),
    Refusal("clear", {"instance_id": "a", "location": DISK}, ("clear", f"a/{DISK}"), 404, "unknown_location", DISK),
    Refusal("move", move("a", "b", old="X"), ("move", "a/X", f"b/{CPU}"), 404, "unknown_location", "'X'"),
    Refusal("check_finish", {"event_id": "x"}, ("event", "x"), 404, "unknown_event", "'x'"),
    Refusal("health", {"instance_id": "gone"}, ("health", "gone"), 503, "instance_unreachable", "'gone'"),
    Refusal("move", move("gone", "a"), move_command("gone", "a"), 503, "instance_unreachable", "'gone'"),
    Refusal("move", move("a", "gone"), move_command("a", "gone"), 503, "instance_unreachable", "'gone'"),
    Refusal("move", move("a", "b"), move_command("a", "b"), 409, "namespace_mismatch", "layers"),
    Refusal("lookup", {"tokens": [-1]}, ("lookup", "--tokens", "-1"), 422, "invalid_request", "tokens[0]", exit_code=2),
    Refusal("move", move("a", "b", all=True), move_command("a", "b", "--all"), 422, "invalid_request", "all", exit_code=2),
    Refusal("lookup", {"tokens": [], "model": ""}, ("lookup", "--model", ""), 422, "invalid_request", "model", exit_code=2),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=[f"{each.kind}-{each.error}-{n}" for n, each in enumerate(REFUSALS)])
def test_an_error_is_the_same_at_every_door(a: NodeProcess, refusal: Refusal) -> None:
    over_http = a.post(f"/{refusal.kind}", **refusal.fields)
    body = over_http.json()
    assert (over_http.status_code, body["error"]) == (refusal.status, refusal.error)
    assert set(body) == {"detail", "error"}
    assert refusal.named in body["detail"]
    (answer,) = a.control({"id": 5, "type": refusal.kind, **refusal.fields})
    assert answer == {"id": 5, "type": "error", **body}
    if refusal.arguments:
        assert a.command(*refusal.arguments) == (refusal.exit_code, body)
        code, printed, told = command(*refusal.arguments, "--via", a.http_url)
        assert (code, printed, told) == (refusal.exit_code, "", f"Error: {body['detail']}\n")


@pytest.mark.parametrize(("method", "kind"), [("GET", "event"), ("DELETE", "cancel")])
def test_an_event_that_nobody_knows_is_told_by_its_name(a: NodeProcess, method: str, kind: str) -> None:
    answer = a.request(method, "/events/move~a~b~a~0")
    body = answer.json()
    assert (answer.status_code, body["error"]) == (404, "unknown_event")
    assert a.control({"id": 1, "type": kind, "event_id": "move~a~b~a~0"}) == [{"id": 1, "type": "error", **body}]
    assert a.command(kind, "move~a~b~a~0") == (1, body)


# --- moves that fail ------------------------------------------------------------------------------------------------------


def test_a_move_that_fails_while_it_is_waited_for_tells_of_the_error_and_the_event(a: NodeProcess) -> None:
    answer = a.post("/move", **move("a", "tiny"))
    body = answer.json()
    event_id = body["event_id"]
    told = {"event_id": event_id, "num_tokens": 40, "state": "failed", "error": "store_full", "detail": body["detail"]}
    assert (answer.status_code, body) == (507, told)
    event = a.get(f"/events/{event_id}").json()
    assert (event["state"], event["error"]) == ("failed", {"error": "store_full", "detail": body["detail"]})
    assert event["chunks"] == {"found": 3, "moved": 0, "already_there": 0, "shared_kept": 0, "failed": 3}
    (refused,) = a.control({"id": 1, "type": "move", "wait_s": 5, **move("a", "tiny")})
    assert refused == {**told, "id": 1, "type": "error", "event_id": refused["event_id"]}
    for wait in ((), ("--wait",)):
        code, body = a.command(*move_command("a", "tiny", *wait))
        assert (code, body) == (1, {**told, "event_id": body["event_id"]})
        code, printed, shown = command(*move_command("a", "tiny", *wait), "--via", a.http_url)
        assert (code, printed, shown) == (1, "", f"Error: {told['detail']}\n")
    assert a.post("/lookup", tokens=PROMPT).json()["layout_info"]["a"] == [CPU, 40]


def test_a_move_that_fails_after_its_answer_is_no_error_of_the_call(a: NodeProcess, tiny: NodeProcess) -> None:
    tiny.suspend()
    answer = a.post("/move", **move("a", "tiny"), wait_s=0)
    tiny.resume()
    assert (answer.status_code, answer.json()["num_tokens"]) == (200, 40)
    until(lambda: bool(a.post("/check_finish", event_id=answer.json()["event_id"]).json() == {"status": "failed"}))


# --- requests that are none -----------------------------------------------------------------------------------------------


def refusal_of(answer: httpx2.Response) -> tuple[int, str, str]:
    body = answer.json()
    assert set(body) == {"detail", "error"}
    return answer.status_code, body["error"], body["detail"]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("move", move("a", "b", colour="red")),
        ("lookup", {"tokens": [1], "colour": "red"}),
        ("full_lookup", {"tokens": [1], "colour": "red"}),
        ("check_finish", {"event_id": "x", "colour": "red"}),
        ("health", {"instance_id": "a", "colour": "red"}),
        ("clear", {"instance_id": "x", "location": CPU, "colour": "red"}),
        ("query_instance", {"ip": "x", "colour": "red"}),
        ("query_worker_info", {"instance_id": "a", "colour": "red"}),
    ],
)
def test_a_field_that_nobody_knows_is_refused_by_name(a: NodeProcess, kind: str, fields: dict[str, object]) -> None:
    status, error, detail = refusal_of(a.post(f"/{kind}", **fields))
    assert (status, error) == (422, "invalid_request")
    assert "colour" in detail
    (answer,) = a.control({"id": 1, "type": kind, **fields})
    assert answer == {"id": 1, "type": "error", "error": error, "detail": detail}


@pytest.mark.parametrize("path", ["/members", "/events", "/livez", "/readyz", "/inventory?instance=a", "/events/x"])
def test_a_field_that_nobody_knows_is_refused_in_a_query_too(a: NodeProcess, path: str) -> None:
    status, error, detail = refusal_of(a.get(f"{path}{'&' if '?' in path else '?'}colour=red"))
    assert (status, error) == (422, "invalid_request")
    assert "colour" in detail


def test_more_tokens_than_a_request_takes_are_refused_at_every_door(a: NodeProcess, tmp_path: Path) -> None:
    tokens = [0] * (TOKENS_MAX + 1)
    status, error, detail = refusal_of(a.post("/lookup", tokens=tokens))
    assert (status, error) == (422, "invalid_request")
    assert str(TOKENS_MAX) in detail
    (answer,) = a.control({"id": 1, "type": "lookup", "tokens": tokens})
    assert answer == {"id": 1, "type": "error", "error": error, "detail": detail}
    file = tmp_path / "tokens"
    file.write_text(str(tokens))
    assert a.command("lookup", "--tokens-file", str(file)) == (2, {"error": error, "detail": detail})
    assert a.post("/lookup", tokens=tokens[1:]).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/events/", 404, "not_found"),
        ("GET", "/move", 405, "method_not_allowed"),
        ("PUT", "/members", 405, "method_not_allowed"),
        ("OPTIONS", "/move", 405, "method_not_allowed"),
        ("GET", "/inventory", 422, "invalid_request"),
        ("POST", "/move", 422, "invalid_request"),
    ],
)
def test_the_frameworks_own_refusals_have_the_same_shape(
    a: NodeProcess, method: str, path: str, status: int, error: str
) -> None:
    assert refusal_of(a.request(method, path))[:2] == (status, error)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"type": 5}', '{"type": "nothing"}', '{"id": [], "type": "livez"}'])
async def test_a_message_that_is_no_request_is_an_error_of_the_same_shape(a: NodeProcess, text: str) -> None:
    with trio.fail_after(5):
        async with a.open_control() as websocket:
            await websocket.send_message(text)
            answer = json.loads(await websocket.get_message())
    assert answer == {"id": None, "type": "error", "error": "invalid_request", "detail": answer["detail"]}
    assert answer["detail"]


# --- a node that leaves, and one with a bug -------------------------------------------------------------------------------


@pytest.fixture
async def node(a: NodeProcess, tmp_path: Path) -> AsyncIterator[Node]:
    """A node whose inside the test can reach."""
    async with open_node(NodeConfig.from_yaml(write_config(tmp_path, "within"))) as node:
        yield node


async def answers(node: Node, kind: str, fields: dict[str, object], *arguments: str) -> tuple[httpx2.Response, Any, Any]:
    """What a call is answered over HTTP and on `/control`, and as a command: exit code and JSON."""
    with trio.fail_after(10):
        async with client_of(node.addresses.http) as http:
            over_http = await http.post(f"/{kind}", json=fields)
        async with dial_websocket([node.addresses.ws], "/control") as websocket:
            await websocket.send_message(json.dumps({"id": 1, "type": kind, **fields}))
            on_control = json.loads(await websocket.get_message())
        told = await trio.to_thread.run_sync(lambda: command(*arguments, "--json", "--via", node.addresses.http))
    return over_http, on_control, (told[0], json.loads(told[1]))


async def test_a_node_that_leaves_takes_no_moves_and_says_so_at_every_door(node: Node) -> None:
    node.driver.handle(LeaveRequested())
    over_http, on_control, as_command = await answers(node, "move", move("a", "within"), *move_command("a", "within"))
    assert (over_http.status_code, over_http.json()["error"]) == (503, "leaving")
    assert on_control == {"id": 1, "type": "error", **over_http.json()}
    assert as_command == (1, over_http.json())
    async with client_of(node.addresses.http) as http:
        assert refusal_of(await http.get("/readyz"))[:2] == (503, "leaving")
        assert ((live := await http.get("/livez")).status_code, live.json()) == (200, {})


async def test_a_bug_is_told_as_one_without_its_internals_and_the_node_goes_on(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(node.driver.machine, "lookup", None)
        over_http, on_control, as_command = await answers(node, "lookup", {"tokens": [1]}, "lookup", "--tokens", "1")
    assert (over_http.status_code, over_http.json()["error"]) == (500, "internal_error")
    assert "TypeError" not in over_http.text
    assert on_control == {"id": 1, "type": "error", **over_http.json()}
    assert as_command == (1, over_http.json())
    over_http, *_ = await answers(node, "lookup", {"tokens": [1]}, "lookup", "--tokens", "1")
    assert over_http.status_code == 200


# --- access ---------------------------------------------------------------------------------------------------------------


def test_who_shows_no_token_or_only_the_reading_one_is_refused_at_every_door(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    (keyed,) = cluster.start(keyed=("cluster: other", f"cluster_key: {SECRET}"))
    clear: dict[str, object] = {"instance_id": "keyed", "location": CPU}
    for token, status, error in ((None, 401, "unauthorized"), (KEY.token(Purpose.READ_ONLY_ACCESS), 403, "forbidden")):
        monkeypatch.delenv("P2PKV_TOKEN", raising=False)
        if token is not None:
            keyed.headers = {"authorization": f"Bearer {token}"}
            monkeypatch.setenv("P2PKV_TOKEN", token)
        answer = keyed.request("POST", "/clear", clear)
        assert refusal_of(answer)[:2] == (status, error)
        assert keyed.command("clear", f"keyed/{CPU}") == (1, answer.json())
        if token is None:  # the websocket itself is refused
            is_401 = pytest.RaisesExc(ConnectionRejected, check=lambda rejected: rejected.status_code == 401)
            with pytest.RaisesGroup(is_401, flatten_subgroups=True):
                keyed.control({"id": 1, "type": "livez"})
        else:
            (told,) = keyed.control({"id": 1, "type": "clear", **clear})
            assert told == {"id": 1, "type": "error", **answer.json()}
