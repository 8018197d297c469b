"""Requests over `/control` to one node that knows no other: answers, refusals, order, and what ends a connection."""

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx2
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock
from trio_websocket import ConnectionClosed

from p2pkv.core.records import EventState
from p2pkv.net import control
from p2pkv.net.calls import CALLS
from p2pkv.net.http.app import ROUTES, build_app
from p2pkv.net.validation import MAX_BODY_NBYTES
from tests.net.controlled import HERE, PORT, Client, ControlledNode, open_controlled_node


@pytest.fixture
async def node() -> AsyncIterator[ControlledNode]:
    async with open_controlled_node() as node:
        yield node


@pytest.fixture
async def client(node: ControlledNode) -> Client:
    return await node.connect()


def move(**fields: object) -> dict[str, object]:
    return {"type": "move", "old_position": HERE, "new_position": HERE, "tokens": [1, 2], **fields}


# --- answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_id", [1, -5, 2**70, 1.5, 1e300, "x", "", "ä" * 1000, True, False, None])
async def test_an_answer_has_the_id_of_its_request(client: Client, request_id: object) -> None:
    answer = await client.ask(id=request_id, type="livez")
    assert answer == {"id": request_id, "type": "livez"}
    assert type(answer["id"]) is type(request_id)


async def test_a_move_answers_with_its_event(client: Client) -> None:
    answer = await client.ask(id=1, **move())
    assert answer == {"id": 1, "type": "move", "event_id": answer["event_id"], "num_tokens": 0, "state": "done"}
    event = await client.ask(id=2, type="event", event_id=answer["event_id"])
    assert (event["id"], event["type"], event["event_id"]) == (2, "event", answer["event_id"])
    assert await client.ask(id=3, type="events") == {"id": 3, "type": "events", "events": [without_envelope(event)]}


async def test_every_call_over_http_is_a_type_here(client: Client) -> None:
    assert {call.name for _, _, call in ROUTES} == set(CALLS)
    detail = (await client.ask(id=1, type="nothing"))["detail"]
    assert set(detail.partition("types are ")[2].removesuffix(".").split(", ")) == {*CALLS, "watch"}


async def test_requests_run_at_the_same_time(node: ControlledNode, client: Client) -> None:
    node.machine.withheld.add("slow")
    await client.send(id="slow", type="event", event_id="slow")
    assert (await client.ask(id="quick", type="livez"))["id"] == "quick"


async def test_a_hundred_clients_get_their_own_answers(node: ControlledNode) -> None:
    async def talk(name: int) -> None:
        client = await node.connect()
        for number in range(10):
            await client.send(id=f"{name}.{number}", type="lookup", tokens=[name, number])
        assert {(await client.receive())["id"] for _ in range(10)} == {f"{name}.{number}" for number in range(10)}

    async with trio.open_nursery() as nursery:
        for name in range(100):
            nursery.start_soon(talk, name)


async def test_too_many_requests_at_once_are_refused_one_by_one(node: ControlledNode, client: Client) -> None:
    node.machine.withheld.add("slow")
    for number in range(control.MAX_IN_FLIGHT):
        await client.send(id=number, type="event", event_id="slow")
    answer = await client.ask(id="more", type="livez")
    assert (answer["id"], answer["type"], answer["error"]) == ("more", "error", "instance_unreachable")
    assert (await (await node.connect()).ask(id=1, type="livez"))["type"] == "livez"


async def test_answered_requests_make_room_for_others(client: Client) -> None:
    for number in range(3 * control.MAX_IN_FLIGHT):
        assert (await client.ask(id=number, type="livez"))["type"] == "livez"


async def test_the_longest_token_list_is_taken(client: Client) -> None:
    answer = await client.ask(id=1, **move(tokens=[2**31 - 1] * 2**20))
    assert (answer["type"], answer["state"]) == ("move", "done")


# --- refusals -------------------------------------------------------------------------------------------------------------

WRONG_BODIES: list[tuple[str, dict[str, object]]] = [
    ("move", move(old_position=["b", HERE[1]])),
    ("move", move(new_position=["b", HERE[1]])),
    ("move", move(new_position=["no/name", HERE[1]])),
    ("move", move(new_position=["a", "Nowhere"])),
    ("move", move(old_position="a")),
    ("move", move(old_position=["a"])),
    ("move", move(tokens=[-1])),
    ("move", move(tokens=[True])),
    ("move", move(tokens=["x"] * 10_000)),
    ("move", move(tokens=[0] * (2**20 + 1))),
    ("move", move(all=True)),
    ("move", move(copy=True, should_copy=False)),
    ("move", move(wait_s=-1)),
    ("move", move(colour="red")),
    ("move", {"type": "move"}),
    ("lookup", {"tokens": None}),
    ("lookup", {"tokens": [10**400]}),
    ("lookup", {f"field{number}": 0 for number in range(10_000)}),
    ("pin", {"instance_id": "b", "location": HERE[1], "tokens": [1]}),
    ("pin", {"instance_id": "a", "location": "Nowhere", "tokens": [1]}),
    ("unpin", {"instance_id": "a", "location": HERE[1], "tokens": [1], "ttl_s": 0}),
    ("compress", {"instance_id": "a", "location": HERE[1], "method": "cachegen", "tokens": [1]}),
    ("decompress", {}),
    ("check_finish", {"event_id": "xxx"}),
    ("check_finish", {"event_id": ""}),
    ("check_finish", {"event_id": 5}),
]


@pytest.mark.parametrize(("call", "body"), WRONG_BODIES, ids=range(len(WRONG_BODIES)))
async def test_both_doors_refuse_the_same_with_the_same_words(
    node: ControlledNode, client: Client, call: str, body: dict[str, object]
) -> None:
    fields = {name: value for name, value in body.items() if name != "type"}
    refused = await client.ask(id=1, **{**fields, "type": call})
    transport = httpx2.ASGITransport(build_app(node.driver), raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url=f"http://localhost:{PORT}") as http:
        answer = await http.post(f"/{call}", json=fields)
    assert answer.status_code >= 400
    assert refused["type"] == "error"
    assert without_envelope(refused) == answer.json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nonsense",
        "[]",
        "null",
        "5",
        "{}",
        '{"id": 1}',
        '{"type": "livez"}',
        '{"id": [], "type": "livez"}',
        '{"id": {}, "type": "livez"}',
        '{"id": NaN, "type": "livez"}',
        '{"id": 1e999, "type": "livez"}',
        '{"id": 1, "type": 5}',
        '{"id": 1, "type": "livez"} {}',
        '{"id": "\\ud800", "type": "livez"}',
        "[" * 100_000,
        json.dumps({"id": 1, "type": "x" * 5000}),
        "ä" * (MAX_BODY_NBYTES // 2 + 1),
    ],
)
async def test_what_has_no_readable_envelope_is_refused_without_an_id(client: Client, text: str) -> None:
    await client.websocket.send_message(text)
    answer = await client.receive()
    assert (answer["id"], answer["type"], answer["error"]) == (None, "error", "invalid_request")
    assert answer["detail"]
    assert (await client.ask(id=2, type="livez"))["type"] == "livez"


@pytest.mark.parametrize("fields", [{"type": "nothing"}, {"type": "livez", "more": 1}, {"type": "move"}, {"type": "event"}])
async def test_a_request_that_is_wrong_is_refused_with_its_id(client: Client, fields: dict[str, object]) -> None:
    answer = await client.ask(id="mine", **fields)
    assert (answer["id"], answer["type"], answer["error"]) == ("mine", "error", "invalid_request")


async def test_a_thousand_messages_of_garbage_do_no_harm(client: Client) -> None:
    garbage = ["{", "[]", '{"id": 1}', '{"id": 7, "type": "move", "tokens": {}}', "\x00", '{"id": 1, "type": "livez", "x": []}']
    for number in range(1000):
        await client.websocket.send_message(garbage[number % len(garbage)])
    for _ in range(1000):
        assert (await client.receive())["error"] == "invalid_request"
    assert (await client.ask(id=1, type="livez"))["type"] == "livez"


async def test_a_bug_is_answered_without_its_internals(
    node: ControlledNode, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    del node.driver.machine  # whatever a call does now fails in a way that nobody foresaw
    answer = await client.ask(id=1, type="members")
    assert (answer["error"], answer["detail"]) == ("internal_error", "This is a bug of the node. Its log has the traceback.")
    assert "AttributeError" in "".join(capsys.readouterr())
    assert (await client.ask(id=2, type="livez"))["type"] == "livez"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
FIELDS = {"id": JSON, "type": st.sampled_from([*CALLS, "watch", "x"]) | JSON}
MORE_FIELDS = {
    "event_id": JSON,
    "tokens": JSON,
    "old_position": JSON,
    "new_position": JSON,
    "wait_s": JSON,
    "instance_id": JSON,
}


@given(
    st.lists(
        st.text() | JSON.map(json.dumps) | st.fixed_dictionaries(FIELDS, optional=MORE_FIELDS).map(json.dumps), max_size=10
    )
)
async def test_whatever_text_comes_is_answered_once(messages: list[str]) -> None:
    async with open_controlled_node() as node:
        client = await node.connect()
        for message in messages:
            await client.websocket.send_message(message)
        answers = [await client.receive() for _ in messages]
        assert all("id" in answer and answer.get("error") != "internal_error" for answer in answers)
        assert (await client.ask(id="last", type="livez")) == {"id": "last", "type": "livez"}


# --- ends -----------------------------------------------------------------------------------------------------------------


async def ending(client: Client) -> tuple[int, str | None]:
    """How the node closes the connection, after what it sends before."""
    with trio.fail_after(60):
        while (closed := client.websocket.closed) is None:
            with suppress(ConnectionClosed):
                await client.websocket.get_message()
    return closed.code, closed.reason


async def upgrade(stream: trio.abc.Stream) -> bytes:
    """Ask for a websocket by hand; the status that comes."""
    await stream.send_all(
        b"GET /control HTTP/1.1\r\nHost: localhost:9000\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    with trio.fail_after(10):
        return bytes(await stream.receive_some())[:12]


async def test_a_binary_message_ends_the_connection_with_a_reason(client: Client) -> None:
    await client.websocket.send_message(b'{"id": 1, "type": "livez"}')
    assert await ending(client) == (1003, "Send JSON as text messages.")


async def test_a_message_beyond_the_limit_ends_the_connection_with_a_reason(node: ControlledNode, client: Client) -> None:
    other = await node.connect()
    await client.websocket.send_message(" " * (MAX_BODY_NBYTES + 1))
    code, reason = await ending(client)
    assert (code, str(MAX_BODY_NBYTES) in str(reason)) == (1009, True)
    assert (await other.ask(id=1, type="livez"))["type"] == "livez"


async def test_frames_that_break_the_protocol_end_only_their_connection(
    node: ControlledNode, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = await node.connect_stream()
    client = await node.connect()
    assert await upgrade(stream) == b"HTTP/1.1 101"
    await stream.send_all(b"\xff" * 100)
    with trio.fail_after(10):
        while await stream.receive_some():
            pass
    await trio.testing.wait_all_tasks_blocked()
    assert "PROTOCOL_ERROR" in "".join(capsys.readouterr())
    assert (await client.ask(id=1, type="livez"))["type"] == "livez"


async def test_pings_are_answered_and_silence_is_no_reason_to_end(client: Client, autojump_clock: MockClock) -> None:
    await trio.sleep(600)
    with trio.fail_after(1):
        await client.websocket.ping()
    assert (await client.ask(id=1, type="livez"))["type"] == "livez"


async def test_a_leaving_node_answers_and_says_goodbye(node: ControlledNode, client: Client) -> None:
    await client.send(id=1, type="livez")
    await trio.testing.wait_all_tasks_blocked()
    await node.door.close_all("this node leaves")
    assert (await client.receive())["type"] == "livez"
    assert await ending(client) == (1001, "this node leaves")


async def test_what_a_client_asked_before_it_went_away_is_done_all_the_same(node: ControlledNode, client: Client) -> None:
    await client.send(id=1, **move())
    await client.websocket.aclose()
    await trio.testing.wait_all_tasks_blocked()
    assert [event.state for event in node.driver.machine.events()] == [EventState.DONE]


async def test_so_many_sockets_are_open_at_once_and_then_others_again(node: ControlledNode) -> None:
    clients = [await node.connect() for _ in range(control.MAX_SOCKETS)]
    assert await upgrade(await node.connect_stream()) == b"HTTP/1.1 503"
    await clients[0].websocket.aclose()
    assert (await (await node.connect()).ask(id=1, type="livez"))["type"] == "livez"


def without_envelope(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name not in ("id", "type")}
