"""The HTTP calls of one node that knows no other: replies, refusals, and what web pages may not do. No sockets."""

import json
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import httpx2
import pytest
import trio
import trio.testing

from p2pkv.core.config import MachineConfig
from p2pkv.core.events import LeaveRequested
from p2pkv.core.ids import Address, Location
from p2pkv.core.keys import MAX_TOKENS
from p2pkv.core.machine import Machine
from p2pkv.net.access import DoorGuard
from p2pkv.net.dial_rules import DialRules
from p2pkv.net.driver import Driver
from p2pkv.net.handoff import HandoffFetcher
from p2pkv.net.http.app import build_app
from p2pkv.net.http.server import Guarded
from p2pkv.net.links import PEER_PATH, PeerLinks
from p2pkv.net.proof import Prover
from p2pkv.net.requests import PIN_MAX_S
from p2pkv.net.validation import MAX_BODY_NBYTES
from p2pkv.store.cpu import CpuStore
from p2pkv.wire.proof import Who

HERE = ["a", "LocalCPUBackend"]
PORT = 9000


@pytest.fixture
async def driver() -> AsyncIterator[Driver]:
    config = MachineConfig(
        instance="a",
        generation=7,
        cluster="p2pkv",
        ws=Address("127.0.0.1", 8002),
        http=f"http://127.0.0.1:{PORT}",
        transfer=Address("127.0.0.1", 8004),
        handoff=None,
        zone="here",
        chunk_size=256,
        cpu_limit_nbytes=2**20,
        descriptor_limit=100,
        move_deadline_s=60.0,
        lease_s=30.0,
        leave_s=2.0,
        peer_fetch=False,
        wall_offset_s=0.0,
    )
    store = CpuStore()
    machine = Machine(config, Random("http"), trio.current_time())
    prover = Prover(bytes(32), "p2pkv", Who("a", 7, (1,)), door=PEER_PATH)
    driver = Driver(
        machine,
        memories={Location.LOCAL_CPU: store},
        links=PeerLinks(prover, DialRules(())),
        fetcher=HandoffFetcher(store, "host"),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run)
        yield driver
        nursery.cancel_scope.cancel()
    store.close()


@pytest.fixture
async def http(driver: Driver) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(Guarded(build_app(driver), DoorGuard(frozenset({PORT}))), raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url=f"http://localhost:{PORT}") as client:
        yield client


class Parts:
    """A body in parts; None stands for one that never comes."""

    def __init__(self, parts: list[bytes] | list[bytes | None]) -> None:
        self._parts = iter(parts)

    def __aiter__(self) -> "Parts":
        return self

    async def __anext__(self) -> bytes:
        try:
            part = next(self._parts)
        except StopIteration:
            raise StopAsyncIteration from None
        if part is None:
            await trio.sleep_forever()
        return part or b""


async def refused(http: httpx2.AsyncClient, path: str, body: Any, *, status: int = 422, error: str = "invalid_request") -> str:
    """The sentence with which `body` was refused."""
    content = body if isinstance(body, bytes | Parts) else json.dumps(body).encode()
    answer = await http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"] == error
    assert set(answer.json()) == {"detail", "error"}
    return str(answer.json()["detail"])


def move_body(**fields: object) -> dict[str, object]:
    return {"old_position": HERE, "new_position": HERE, "tokens": [1, 2], **fields}


# --- what is answered -----------------------------------------------------------------------------------------------------


async def test_a_move_to_the_same_position_is_done_at_once(http: httpx2.AsyncClient) -> None:
    answer = await http.post("/move", json=move_body())
    assert answer.status_code == 200
    assert answer.json() == {"event_id": answer.json()["event_id"], "num_tokens": 0, "state": "done"}


@pytest.mark.parametrize("flags", [{"copy": True}, {"should_copy": True}, {"copy": True, "should_copy": True}])
async def test_a_copy_is_asked_for_by_either_name(http: httpx2.AsyncClient, flags: dict[str, bool]) -> None:
    move = (await http.post("/move", json=move_body(**flags))).json()
    assert (await http.get(f"/events/{move['event_id']}")).json()["copy"] is True


async def test_an_event_has_every_field_of_the_interface(http: httpx2.AsyncClient) -> None:
    move = (await http.post("/move", json=move_body())).json()
    event = (await http.get(f"/events/{move['event_id']}")).json()
    assert event == {
        "event_id": move["event_id"],
        "kind": "move",
        "state": "done",
        "old_position": HERE,
        "new_position": HERE,
        "copy": False,
        "chunks": {"found": 0, "moved": 0, "already_there": 0, "shared_kept": 0, "failed": 0},
        "num_tokens": 0,
        "bytes": 0,
        "lane": event["lane"],
        "started_at": event["started_at"],
        "finished_at": event["finished_at"],
        "seconds": event["finished_at"] - event["started_at"],
        "coordinator": "a",
        "error": None,
    }
    assert (await http.get("/events")).json() == {"events": [event]}
    assert (await http.post("/check_finish", json={"event_id": move["event_id"]})).json() == {"status": "done"}
    assert (await http.delete(f"/events/{move['event_id']}")).json() == event


async def test_a_lookup_of_what_nobody_holds_is_empty(http: httpx2.AsyncClient) -> None:
    answer = await http.post("/lookup", json={"tokens": [1, 2, 3], "model": "m", "cache_salt": "s"})
    assert answer.status_code == 200
    assert answer.json() == {"event_id": answer.json()["event_id"], "layout_info": {}, "complete": True}


async def test_members_are_listed_with_their_doors_and_locations(http: httpx2.AsyncClient) -> None:
    (member,) = (await http.get("/members")).json()["members"]
    assert member == {
        "instance": "a",
        "state": "alive",
        "generation": 7,
        "incarnation": member["incarnation"],
        "ws": "ws://127.0.0.1:8002",
        "http": f"http://127.0.0.1:{PORT}",
        "transfer": "127.0.0.1:8004",
        "zone": "here",
        "models": [],
        "locations": {"LocalCPUBackend": {"chunks": 0, "bytes": 0, "limit": 2**20}},
    }


async def test_a_leaving_node_lives_but_takes_no_moves(http: httpx2.AsyncClient, driver: Driver) -> None:
    assert (await http.get("/readyz")).json() == {}
    driver.handle(LeaveRequested())
    ready = await http.get("/readyz")
    assert (ready.status_code, ready.json()["error"]) == (503, "leaving")
    live = await http.get("/livez")
    assert (live.status_code, live.json()) == (200, {})


async def test_the_longest_token_list_is_taken(http: httpx2.AsyncClient) -> None:
    answer = await http.post("/move", json=move_body(tokens=[2**31 - 1] * MAX_TOKENS))
    assert (answer.status_code, answer.json()["state"]) == (200, "done")


async def test_every_call_is_documented_with_its_body_and_its_errors(http: httpx2.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    calls = {
        f"{method.upper()} {path}": call for path, methods in document["paths"].items() for method, call in methods.items()
    }
    assert set(calls) == {
        "POST /move",
        "POST /lookup",
        "POST /full_lookup",
        "POST /health",
        "POST /clear",
        "POST /pin",
        "POST /unpin",
        "POST /compress",
        "POST /decompress",
        "POST /query_instance",
        "POST /query_worker_info",
        "POST /check_finish",
        "GET /events",
        "GET /events/{event_id}",
        "DELETE /events/{event_id}",
        "GET /members",
        "GET /inventory",
        "GET /livez",
        "GET /readyz",
    }
    body = calls["POST /move"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["required"]) == {"old_position", "new_position"}
    assert body["additionalProperties"] is False
    for call in calls.values():
        errors = {
            call["responses"][status]["content"]["application/json"]["schema"]["$ref"] for status in ("422", "4XX", "5XX")
        }
        assert errors == {"#/components/schemas/ErrorReply"}


# --- what is refused ------------------------------------------------------------------------------------------------------


async def test_unknown_instances_locations_and_events_are_named(http: httpx2.AsyncClient) -> None:
    other = ["b", "LocalCPUBackend"]
    for body in (move_body(old_position=other), move_body(new_position=other), move_body(new_position=["no/name", HERE[1]])):
        await refused(http, "/move", body, status=404, error="unknown_instance")
    for location in ("LocalDiskBackend", "localcpubackend", ""):
        await refused(http, "/move", move_body(new_position=["a", location]), status=404, error="unknown_location")
    await refused(http, "/check_finish", {"event_id": "xxx"}, status=404, error="unknown_event")
    for method in ("GET", "DELETE"):
        answer = await http.request(method, "/events/xxx")
        assert (answer.status_code, answer.json()["error"]) == (404, "unknown_event")


@pytest.mark.parametrize(
    "tokens", [[-1], [2**31], [1.0], ["1"], [True], [None], [[1]], "1", 5, None, {"0": 1}, [10**400], ["x"] * 100_000]
)
async def test_tokens_are_a_list_of_small_whole_numbers(http: httpx2.AsyncClient, tokens: object) -> None:
    assert "tokens" in await refused(http, "/move", move_body(tokens=tokens))
    assert "tokens" in await refused(http, "/lookup", {"tokens": tokens})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"old_position": ["a"]}, "old_position[1]"),
        ({"old_position": ["a", "LocalCPUBackend", "x"]}, "old_position"),
        ({"new_position": "a"}, "new_position"),
        ({"new_position": [1, "LocalCPUBackend"]}, "new_position[0]"),
        ({"copy": 1}, "copy"),
        ({"all": "true"}, "all"),
        ({"all": True}, "either tokens or all"),
        ({"copy": True, "should_copy": False}, "copy and should_copy contradict"),
        ({"wait_s": -1}, "wait_s"),
        ({"wait_s": 601}, "wait_s"),
        ({"wait_s": float("nan")}, "wait_s"),
        ({"model": 5}, "model"),
        ({"model": "m" * 513}, "model"),
        ({"cache_salt": "s" * 1025}, "cache_salt"),
        ({"colour": "red"}, "colour"),
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": "k" * 257}, "idempotency_key"),
    ],
)
async def test_fields_that_are_wrong_or_unknown_are_named(
    http: httpx2.AsyncClient, fields: dict[str, object], named: str
) -> None:
    assert named in await refused(http, "/move", move_body(**fields))


@pytest.mark.parametrize("path", ["/pin", "/unpin"])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"ttl_s": 0}, "ttl_s"),
        ({"ttl_s": -1.5}, "ttl_s"),
        ({"ttl_s": PIN_MAX_S + 1}, "ttl_s"),
        ({"ttl_s": float("nan")}, "ttl_s"),
        ({"ttl_s": float("inf")}, "ttl_s"),
        ({"ttl_s": "60"}, "ttl_s"),
        ({"tokens": None}, "tokens"),
        ({"location": 5}, "location"),
        ({"model": ""}, "model"),
        ({"all": True}, "all"),
    ],
)
async def test_what_is_wrong_with_a_pin_is_named(
    http: httpx2.AsyncClient, path: str, fields: dict[str, object], named: str
) -> None:
    body = {"instance_id": HERE[0], "location": HERE[1], "tokens": [1, 2]}
    for ttl_s in (None, 1, 0.001, PIN_MAX_S):
        answer = await http.post(path, json={**body, "ttl_s": ttl_s})
        assert (answer.status_code, answer.json()["num_tokens"]) == (200, 0)
        assert answer.json()["event_id"].startswith(path.strip("/"))
    assert named in await refused(http, path, {**body, **fields})
    for left_out in body:
        assert left_out in await refused(http, path, {name: value for name, value in body.items() if name != left_out})


@pytest.mark.parametrize("path", ["/compress", "/decompress"])
async def test_what_is_not_offered_says_so(http: httpx2.AsyncClient, path: str) -> None:
    lmcaches = {"instance_id": "a", "location": HERE[1], "method": "cachegen", "tokens": [1, 2]}
    for body in (lmcaches, {**lmcaches, "instance_id": "nobody"}, {}):
        assert "compresses none" in await refused(http, path, body, status=501, error="not_implemented")
    assert "colour" in await refused(http, path, {**lmcaches, "colour": "red"})


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"{}", b'{"tokens": [1,]}', b"\xff", b"[" * 100_000, b'{"a":1}' * 2]
)
async def test_bodies_that_are_no_such_object_are_refused(http: httpx2.AsyncClient, body: bytes) -> None:
    for path in ("/move", "/lookup", "/check_finish"):
        await refused(http, path, body)


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
async def test_a_body_that_is_not_called_json_is_refused(http: httpx2.AsyncClient, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    answer = await http.post("/lookup", content=b'{"tokens": []}', headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (422, "invalid_request")
    assert "application/json" in answer.json()["detail"]


async def test_a_json_body_may_name_its_charset(http: httpx2.AsyncClient) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await http.post("/lookup", content=b'{"tokens": []}', headers=headers)).status_code == 200


@pytest.mark.parametrize("query", ["more=1", "instance=a&more=1", "instance=a&instance=a", ""])
async def test_fields_in_a_query_are_checked_like_those_in_a_body(http: httpx2.AsyncClient, query: str) -> None:
    answer = await http.get(f"/inventory?{query}")
    assert (answer.status_code, answer.json()["error"]) == (422, "invalid_request")


async def test_one_token_too_many_is_refused(http: httpx2.AsyncClient) -> None:
    assert str(MAX_TOKENS) in await refused(http, "/lookup", {"tokens": [0] * (MAX_TOKENS + 1)})


async def test_millions_of_tokens_are_refused_before_they_are_parsed(http: httpx2.AsyncClient) -> None:
    body = b'{"tokens": [' + b"1," * 8_000_000 + b"1]}"
    assert len(body) < MAX_BODY_NBYTES
    assert await refused(http, "/lookup", body) == f"A request takes at most {MAX_TOKENS} tokens."


async def test_thousands_of_fields_are_refused_before_they_are_parsed(http: httpx2.AsyncClient) -> None:
    body = json.dumps({f"field{number}": number for number in range(10_000)}).encode()
    assert await refused(http, "/lookup", body) == "The request has too many fields."


async def test_a_body_beyond_the_limit_is_not_kept(http: httpx2.AsyncClient) -> None:
    assert str(MAX_BODY_NBYTES) in await refused(http, "/lookup", Parts([b"1," * 2**15] * 1024))


async def test_a_body_that_never_ends_is_given_up(http: httpx2.AsyncClient, autojump_clock: trio.testing.MockClock) -> None:
    assert await refused(http, "/lookup", Parts([b"{", None])) == "The body wasn't complete after 30 s."


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/events/", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/redoc", 404, "not_found"),
        ("GET", "/move", 405, "method_not_allowed"),
        ("POST", "/members", 405, "method_not_allowed"),
    ],
)
async def test_the_frameworks_own_refusals_look_like_ours(
    http: httpx2.AsyncClient, method: str, path: str, status: int, error: str
) -> None:
    answer = await http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()) == {"detail", "error"}
    assert answer.json()["error"] == error


async def test_a_bug_is_answered_without_its_internals(
    http: httpx2.AsyncClient, driver: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    del driver.machine  # whatever a handler does now fails in a way that nobody foresaw
    answer = await http.get("/members")
    assert answer.status_code == 500
    assert answer.json() == {"detail": "This is a bug of the node. Its log has the traceback.", "error": "internal_error"}
    assert "AttributeError" in "".join(capsys.readouterr())


# --- web pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example:9000"}, 421),
        ({"host": "localhost"}, 421),
        ({"host": "localhost:9001"}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
async def test_what_a_foreign_page_sends_is_refused(http: httpx2.AsyncClient, headers: dict[str, str], status: int) -> None:
    for method, path in (("GET", "/members"), ("POST", "/move"), ("GET", "/nothing"), ("GET", "/openapi.json")):
        answer = await http.request(method, path, headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (status, "forbidden")


@pytest.mark.parametrize(
    "headers", [{"host": "127.0.0.1:9000"}, {"origin": "http://localhost:9000", "sec-fetch-site": "same-origin"}]
)
async def test_our_own_pages_and_names_are_not_foreign(http: httpx2.AsyncClient, headers: dict[str, str]) -> None:
    assert (await http.get("/members", headers=headers)).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/nothing", "/events/xxx"])
async def test_every_answer_tells_browsers_to_do_nothing_with_it(http: httpx2.AsyncClient, path: str) -> None:
    headers = (await http.get(path)).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "access-control-allow-origin" not in headers
