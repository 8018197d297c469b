"""Every call and reply of the interface, field by field, over HTTP and `/control`, at nodes that run as processes.

Instance a holds what a test has stored, b takes it, `slow` sends a mebibyte a second. Each test has prompts of its own.
"""

import json
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import httpx2
import pytest
import trio

from tests.live.doors import CPU, SLOW, Cluster, NodeProcess, open_cluster, states, until

pytestmark = pytest.mark.live

_numbers = count(1)
UNFINISHED = ("pending", "running")
LONG = 800
"""Chunks of 4 KiB: `slow` takes 3 s for them."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> list[NodeProcess]:
    nodes = cluster.start(a=("zone: left",), b=(), slow=SLOW)
    for node in nodes:
        until(lambda node=node: states(node) == dict.fromkeys(("a", "b", "slow"), "alive"))  # type: ignore[misc]
    return nodes


@pytest.fixture
def a(nodes: list[NodeProcess]) -> NodeProcess:
    return nodes[0]


@pytest.fixture
def b(nodes: list[NodeProcess]) -> NodeProcess:
    return nodes[1]


@pytest.fixture
def slow(nodes: list[NodeProcess]) -> NodeProcess:
    return nodes[2]


def new_prompt(length: int = 40) -> list[int]:
    """A prompt that no other test has."""
    return [next(_numbers), *range(1000, 999 + length)]


def positions(source: str, target: str) -> dict[str, object]:
    return {"old_position": [source, CPU], "new_position": [target, CPU]}


def layout_of(node: NodeProcess, tokens: list[int], **fields: object) -> dict[str, list[object]]:
    layout: dict[str, list[object]] = node.post("/lookup", tokens=tokens, **fields).json()["layout_info"]
    return layout


def until_layout(node: NodeProcess, tokens: list[int], expected: dict[str, list[object]], **fields: object) -> None:
    until(lambda: layout_of(node, tokens, **fields) == expected, within_s=2)


def moved(answer: httpx2.Response, num_tokens: int, state: str = "done") -> str:
    """The event of a move that was answered so, and with nothing else."""
    assert answer.status_code == 200, answer.text
    event_id = answer.json()["event_id"]
    assert answer.json() == {"event_id": event_id, "num_tokens": num_tokens, "state": state}
    assert isinstance(event_id, str)
    return event_id


def counts(**chunks: int) -> dict[str, int]:
    return {"found": 0, "moved": 0, "already_there": 0, "shared_kept": 0, "failed": 0, **chunks}


# --- moves ----------------------------------------------------------------------------------------------------------------


def test_a_move_is_answered_at_its_end_and_its_event_has_these_fields_everywhere(nodes: list[NodeProcess]) -> None:
    a, b, _ = nodes
    prompt = new_prompt()
    a.store(prompt)
    before = time.time()
    event_id = moved(b.post("/move", **positions("a", "b"), tokens=prompt), 40)
    after = time.time()
    event = b.get(f"/events/{event_id}").json()
    assert event == {
        "event_id": event_id,
        "kind": "move",
        "state": "done",
        **positions("a", "b"),
        "copy": False,
        "chunks": counts(found=3, moved=3),
        "num_tokens": 40,
        "bytes": event["bytes"],
        "lane": "handoff",
        "started_at": event["started_at"],
        "finished_at": event["finished_at"],
        "seconds": event["seconds"],
        "coordinator": "b",
        "error": None,
    }
    assert event["bytes"] == 40 * 256
    assert all(isinstance(event[name], float) for name in ("started_at", "finished_at", "seconds"))
    assert before - 0.1 <= event["started_at"] <= event["finished_at"] <= after + 0.1
    assert event["seconds"] == pytest.approx(event["finished_at"] - event["started_at"])
    for node in nodes:
        assert node.get(f"/events/{event_id}").json() == event
        assert node.post("/check_finish", event_id=event_id).json() == {"status": "done"}


def test_after_done_every_lookup_agrees_within_two_seconds(nodes: list[NodeProcess]) -> None:
    prompt = new_prompt()
    nodes[0].store(prompt)
    moved(nodes[1].post("/move", **positions("a", "b"), tokens=prompt), 40)
    done_at = time.monotonic()
    for node in nodes:
        until_layout(node, prompt, {"b": [CPU, 40]})
    assert time.monotonic() - done_at < 2


def test_a_move_to_the_same_position_is_done_and_everything_is_there_already(a: NodeProcess, b: NodeProcess) -> None:
    prompt = new_prompt()
    a.store(prompt)
    for node in (a, b):
        event_id = moved(node.post("/move", **positions("a", "a"), tokens=prompt), 40)
        assert node.get(f"/events/{event_id}").json()["chunks"] == counts(found=3, already_there=3)
    assert layout_of(a, prompt) == {"a": [CPU, 40]}


def test_a_repeated_copy_finds_everything_there(a: NodeProcess) -> None:
    prompt = new_prompt()
    a.store(prompt)
    moved(a.post("/move", **positions("a", "b"), tokens=prompt, copy=True), 40)
    again = moved(a.post("/move", **positions("a", "b"), tokens=prompt, copy=True), 40)
    assert a.get(f"/events/{again}").json()["chunks"] == counts(found=3, already_there=3)


@pytest.mark.parametrize("fields", [{"tokens": [7, 7, 7]}, {"tokens": []}, {}])
def test_what_identifies_nothing_that_is_held_is_done_with_nothing(a: NodeProcess, fields: dict[str, object]) -> None:
    prompt = new_prompt()
    a.store(prompt)
    event_id = moved(a.post("/move", **positions("a", "b"), **fields), 0)
    event = a.get(f"/events/{event_id}").json()
    assert (event["chunks"], event["bytes"]) == (counts(), 0)
    assert layout_of(a, prompt) == {"a": [CPU, 40]}


def test_all_takes_everything_at_the_old_position(a: NodeProcess, slow: NodeProcess) -> None:
    a.post("/clear", instance_id="slow", location=CPU)
    prompts = [new_prompt(), new_prompt(20)]
    for prompt in prompts:
        slow.store(prompt)
    moved(a.post("/move", **positions("slow", "b"), all=True), 60)
    for prompt in prompts:
        until_layout(a, prompt, {"b": [CPU, len(prompt)]})


@pytest.mark.parametrize("flag", ["copy", "should_copy"])
def test_a_copy_under_either_name_leaves_the_source_as_it_is(a: NodeProcess, flag: str) -> None:
    prompt = new_prompt()
    a.store(prompt)
    event_id = moved(a.post("/move", **positions("a", "b"), tokens=prompt, **{flag: True}), 40)
    assert a.get(f"/events/{event_id}").json()["copy"] is True
    until_layout(a, prompt, {"a": [CPU, 40], "b": [CPU, 40]})


def test_of_several_models_the_longest_prefix_is_taken_unless_one_is_named(a: NodeProcess) -> None:
    prompt = new_prompt()
    a.store(prompt[:20], model="one")
    a.store(prompt, model="other")
    until_layout(a, prompt, {"a": [CPU, 20]}, model="one")
    moved(a.post("/move", **positions("a", "b"), tokens=prompt, model="one"), 20)
    until_layout(a, prompt, {"b": [CPU, 20]}, model="one")
    until_layout(a, prompt, {"a": [CPU, 40]}, model="other")
    assert layout_of(a, prompt, model="nobody's") == {}
    moved(a.post("/move", **positions("a", "b"), tokens=prompt), 40)
    until_layout(a, prompt, {"b": [CPU, 40]})


def test_a_salt_names_another_cache(a: NodeProcess) -> None:
    prompt = new_prompt()
    a.store(prompt, salt="tenant")
    moved(a.post("/move", **positions("a", "b"), tokens=prompt), 0)
    moved(a.post("/move", **positions("a", "b"), tokens=prompt, cache_salt="tenant"), 40)
    until_layout(a, prompt, {"b": [CPU, 40]}, cache_salt="tenant")
    assert layout_of(a, prompt) == {}


def test_a_move_that_takes_longer_is_answered_as_it_is_and_what_is_not_known_is_null(a: NodeProcess, slow: NodeProcess) -> None:
    prompt = new_prompt(LONG * 16)
    slow.store(prompt)
    asked_at = time.monotonic()
    answer = a.post("/move", **positions("slow", "b"), tokens=prompt, wait_s=0.2)
    assert time.monotonic() - asked_at < 2
    event_id = moved(answer, LONG * 16, state=answer.json()["state"])
    event = a.get(f"/events/{event_id}").json()
    assert event["state"] in UNFINISHED
    assert (event["finished_at"], event["seconds"], event["error"]) == (None, None, None)
    assert a.post("/check_finish", event_id=event_id).json()["status"] in UNFINISHED
    cancelled = a.delete(f"/events/{event_id}")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
    assert set(cancelled.json()) == set(event)
    assert layout_of(slow, prompt) == {"slow": [CPU, LONG * 16]}


def test_a_move_that_goes_on_is_answered_as_running(a: NodeProcess, slow: NodeProcess) -> None:
    prompt = new_prompt(LONG * 16)
    slow.store(prompt)
    answer = a.post("/move", **positions("slow", "b"), tokens=prompt, wait_s=0)
    a.delete(f"/events/{answer.json()['event_id']}")
    moved(answer, LONG * 16, state="running")


def test_a_repeated_request_with_its_key_is_the_same_event_through_any_node(nodes: list[NodeProcess]) -> None:
    prompt = new_prompt()
    nodes[0].store(prompt)
    body = {**positions("a", "b"), "tokens": prompt, "copy": True, "idempotency_key": "k"}
    first, *again = [node.post("/move", **body) for node in (*nodes, *nodes)]
    assert (first.status_code, first.json()["state"]) == (200, "done")
    assert [each.json() for each in again] == [first.json()] * len(again)
    other = nodes[1].post("/move", **{**body, "tokens": prompt[:8]})
    assert (other.status_code, other.json()["error"]) == (422, "invalid_request")
    assert first.json()["event_id"] in other.json()["detail"]


# --- the other calls ------------------------------------------------------------------------------------------------------


def test_lookups_tell_each_holders_prefix_at_its_best_or_at_every_location(nodes: list[NodeProcess]) -> None:
    prompt = new_prompt()
    nodes[0].store(prompt)
    nodes[1].store(prompt[:16])
    for node in nodes:
        until_layout(node, prompt, {"a": [CPU, 40], "b": [CPU, 16]})
        for path, held in (
            ("/lookup", {"a": [CPU, 40], "b": [CPU, 16]}),
            ("/full_lookup", {"a": [[CPU, 40]], "b": [[CPU, 16]]}),
        ):
            answer = node.post(path, tokens=prompt).json()
            assert answer == {"event_id": answer["event_id"], "layout_info": held, "complete": True}
            nothing = node.post(path, tokens=[0], model="tiny", cache_salt="x").json()
            assert nothing == {"event_id": nothing["event_id"], "layout_info": {}, "complete": True}


def test_health_has_an_error_code_for_each_worker(nodes: list[NodeProcess]) -> None:
    for node in nodes:
        for name in ("a", "b", "slow"):
            answer = node.post("/health", instance_id=name).json()
            assert answer == {"event_id": answer["event_id"], "error_codes": {"0": 0}}


def test_an_address_names_its_first_instance(nodes: list[NodeProcess]) -> None:
    for node in nodes:
        assert node.post("/query_instance", ip="127.0.0.1", event_id="mine").json() == {"event_id": "mine", "res": "a"}
        answer = node.post("/query_instance", ip="localhost").json()
        assert answer == {"event_id": answer["event_id"], "res": "a"}


@pytest.mark.parametrize("fields", [{}, {"worker_ids": [0]}])
def test_workers_are_told_with_these_fields(nodes: list[NodeProcess], fields: dict[str, object]) -> None:
    host, port = nodes[0].ws_url.removeprefix("ws://").split(":")
    for node in nodes:
        answer = node.post("/query_worker_info", instance_id="a", **fields).json()
        assert set(answer) == {"event_id", "worker_infos"}
        (info,) = answer["worker_infos"]
        times = {name: info[name] for name in ("registration_time", "last_heartbeat_time")}
        assert info == {
            "instance_id": "a",
            "worker_id": 0,
            "ip": host,
            "port": int(port),
            "peer_init_url": nodes[0].transfer,
            **times,
        }
        assert all(isinstance(each, float) and 0 <= time.time() - each < 600 for each in times.values())
    assert nodes[0].post("/query_worker_info", instance_id="a", worker_ids=[]).json()["worker_infos"] == []


def test_clear_tells_how_many_tokens_it_forgot(a: NodeProcess, slow: NodeProcess) -> None:
    a.post("/clear", instance_id="slow", location=CPU)
    prompt = new_prompt()
    slow.store(prompt)
    for num_tokens in (40, 0):
        cleared = a.post("/clear", instance_id="slow", location=CPU).json()
        assert cleared == {"event_id": cleared["event_id"], "num_tokens": num_tokens}
    until_layout(a, prompt, {})


def test_members_are_told_with_their_doors_and_locations(nodes: list[NodeProcess]) -> None:
    nodes[0].store(new_prompt(), model="tiny")
    for node in nodes:
        until(lambda node=node: "tiny" in node.get("/members").json()["members"][0]["models"])  # type: ignore[misc]
        answer = node.get("/members").json()
        assert answer["instance"] == node.name
        first, *others = answer["members"]
        assert [other["instance"] for other in others] == ["b", "slow"]
        assert first == {
            "instance": "a",
            "state": "alive",
            "generation": first["generation"],
            "incarnation": first["incarnation"],
            "ws": nodes[0].ws_url,
            "http": nodes[0].http_url,
            "transfer": nodes[0].transfer,
            "zone": "left",
            "models": first["models"],
            "locations": first["locations"],
        }
        assert {type(first["generation"]), type(first["incarnation"])} == {int}
        (location,) = first["locations"].items()
        assert location == (CPU, {"chunks": location[1]["chunks"], "bytes": location[1]["bytes"], "limit": 5 * 2**30})
        assert 0 < location[1]["chunks"] <= location[1]["bytes"] / 4096


def test_an_inventory_lists_chunks_by_fingerprint_and_a_cursor_goes_on(a: NodeProcess, b: NodeProcess) -> None:
    a.store(new_prompt())
    pages = [a.get("/inventory", instance="a").json(), a.get("/inventory", instance="a", location=CPU).json()]
    assert pages[0] == pages[1]
    assert set(pages[0]) == {"items", "next"}
    assert pages[0]["next"] is None
    items = pages[0]["items"]
    assert [set(item) for item in items] == [{"fingerprint", "location", "tokens"}] * len(items)
    assert {item["location"] for item in items} == {CPU}
    assert [item["fingerprint"] for item in items] == sorted(item["fingerprint"] for item in items)
    assert all(0 < item["tokens"] <= 16 and len(bytes.fromhex(item["fingerprint"])) == 8 for item in items)
    rest = a.get("/inventory", instance="a", cursor=f"{items[0]['fingerprint']}@{CPU}").json()
    assert rest == {"items": items[1:], "next": None}
    until(lambda: b.get("/inventory", instance="a").json()["items"] == items)


def test_events_are_listed_newest_first(a: NodeProcess) -> None:
    event_ids = [moved(a.post("/move", **positions("a", "b"), tokens=[0, 0, 0]), 0) for _ in range(3)]
    answer = a.get("/events").json()
    assert set(answer) == {"events"}
    assert [event["event_id"] for event in answer["events"]][:3] == event_ids[::-1]
    assert answer["events"][0] == a.get(f"/events/{event_ids[-1]}").json()


def test_a_node_lives_is_ready_and_describes_itself(nodes: list[NodeProcess]) -> None:
    for node in nodes:
        for path in ("/livez", "/readyz"):
            assert (node.get(path).status_code, node.get(path).json()) == (200, {})
        paths = node.get("/openapi.json").json()["paths"]
        assert {"/move", "/lookup", "/events/{event_id}", "/members", "/inventory"} <= set(paths)


def test_the_shared_port_answers_the_same(a: NodeProcess) -> None:
    prompt = new_prompt()
    a.store(prompt)
    with httpx2.Client(base_url=a.shared_url, trust_env=False, verify=False, timeout=10) as shared:
        moved(shared.post("/move", json={**positions("a", "b"), "tokens": prompt}), 40)
        assert [member["instance"] for member in shared.get("/members").json()["members"]] == ["a", "b", "slow"]


# --- /control -------------------------------------------------------------------------------------------------------------


def without_ids(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("id", "type", "event_id")}


def test_every_call_is_a_type_with_the_same_fields(a: NodeProcess, slow: NodeProcess) -> None:
    prompt = new_prompt()
    a.store(prompt)
    event_id = moved(a.post("/move", **positions("a", "b"), tokens=prompt, copy=True), 40)
    until_layout(a, prompt, {"a": [CPU, 40], "b": [CPU, 40]})
    a.post("/clear", instance_id="slow", location=CPU)
    posts: dict[str, dict[str, object]] = {
        "lookup": {"tokens": prompt},
        "full_lookup": {"tokens": prompt},
        "check_finish": {"event_id": event_id},
        "health": {"instance_id": "a"},
        "query_instance": {"ip": "localhost"},
        "query_worker_info": {"instance_id": "a", "worker_ids": []},
        "clear": {"instance_id": "slow", "location": CPU},
        "move": {**positions("a", "a"), "tokens": prompt},
    }
    calls = [(kind, fields, a.post(f"/{kind}", **fields)) for kind, fields in posts.items()]
    named: dict[str, object] = {"event_id": event_id}
    calls += [
        ("events", {}, a.get("/events")),
        ("event", named, a.get(f"/events/{event_id}")),
        ("inventory", {"instance": "b", "location": CPU}, a.get("/inventory", instance="b", location=CPU)),
        ("livez", {}, a.get("/livez")),
        ("readyz", {}, a.get("/readyz")),
        ("cancel", named, a.delete(f"/events/{event_id}")),
    ]
    for kind, fields, over_http in reversed(calls):  # from the back: a move makes an event
        (answer,) = a.control({"id": kind, "type": kind, **fields})
        assert (answer["id"], answer["type"]) == (kind, kind)
        assert without_ids(answer) == without_ids(over_http.json()), kind
    (members,) = a.control({"id": 0, "type": "members"})
    assert [member["instance"] for member in members["members"]] == ["a", "b", "slow"]


def test_a_move_is_answered_at_once_and_others_meanwhile(slow: NodeProcess, a: NodeProcess) -> None:
    prompt = new_prompt(LONG * 16)
    slow.store(prompt)
    move = {"type": "move", **positions("slow", "b"), "tokens": prompt}
    asked_at = time.monotonic()
    (answer,) = a.control({"id": 1, **move})
    assert time.monotonic() - asked_at < 2
    assert answer == {
        "id": 1,
        "type": "move",
        "event_id": answer["event_id"],
        "num_tokens": LONG * 16,
        "state": answer["state"],
    }
    assert answer["state"] in UNFINISHED
    first, second = a.control(
        {"id": "waits", **move, "copy": True, "wait_s": 0.5}, {"id": "doesn't", "type": "lookup", "tokens": [1]}
    )
    assert (first["id"], second["id"]) == ("doesn't", "waits")
    for event_id in (answer["event_id"], second["event_id"]):
        a.delete(f"/events/{event_id}")


@pytest.mark.parametrize("request_id", [1, "one", 1.5, True, None])
def test_an_id_is_any_scalar_and_comes_back(a: NodeProcess, request_id: object) -> None:
    for kind, answered in (("livez", {"type": "livez"}), ("lookup", {"type": "error", "error": "invalid_request"})):
        (answer,) = a.control({"id": request_id, "type": kind})
        answer.pop("detail", None)
        assert answer == {"id": request_id, **answered}
        assert type(answer["id"]) is type(request_id)


async def test_a_watch_pushes_whole_events_as_they_change(nodes: list[NodeProcess]) -> None:
    a = nodes[0]
    prompt = new_prompt()
    await trio.to_thread.run_sync(a.store, prompt)
    move = {"id": 2, "type": "move", **positions("a", "b"), "tokens": prompt}
    messages: list[dict[str, Any]] = []
    with trio.fail_after(10):
        async with a.open_control() as websocket:
            for request in ({"id": 1, "type": "watch"}, move):
                await websocket.send_message(json.dumps(request))
            while not messages or messages[-1].get("state") != "done":
                messages.append(json.loads(await websocket.get_message()))
    assert messages[0] == {"id": 1, "type": "watch"}
    pushes = [message for message in messages if message["type"] == "event"]
    assert pushes[-1] == {"type": "event", **a.get(f"/events/{pushes[-1]['event_id']}").json()}
    assert all(set(push) == set(pushes[-1]) for push in pushes)
