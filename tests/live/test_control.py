"""`/control` and `open_client` between three real nodes: a holds a prompt, b takes it, c is asked."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from trio_websocket import ConnectionClosed

from p2pkv import NodeConfig, open_node
from p2pkv.client import Client, open_client
from p2pkv.engines import EngineCache, KVLayout
from p2pkv.errors import NodeUnreachableError, UnknownLocationError, UnknownNameError
from p2pkv.net.control import STALL_S
from p2pkv.net.websockets import dial_websocket
from p2pkv.node import Node
from tests.net import controlled

pytestmark = pytest.mark.live

CPU = "LocalCPUBackend"
LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=8, dtype="float32", planes=2)
PROMPT = list(range(100, 1124))
CHUNK_COUNT = 64
IN_ORDER = ["running", "done"]


class Trio:
    """Instances a, b and c, which know each other; a holds `PROMPT`."""

    def __init__(self, nodes: list[Node]) -> None:
        self.a, self.b, self.c = nodes

    @asynccontextmanager
    async def control(self, node: Node) -> AsyncIterator["Control"]:
        async with dial_websocket([node.addresses.ws], "/control") as websocket:
            yield Control(websocket)


class Control(controlled.Client):
    """One `/control` websocket of a real node."""

    receive_s = 10.0

    async def receive_until_final(self, event_id: str) -> list[dict[str, Any]]:
        """All pushes up to the end of an event."""
        pushes: list[dict[str, Any]] = []
        while not pushes or pushes[-1]["state"] in ("pending", "running"):
            push = await self.receive()
            if push["type"] == "event" and push["event_id"] == event_id:
                pushes.append(push)
        return pushes


def move(source: str, target: str, **fields: object) -> dict[str, object]:
    return {"type": "move", "old_position": [source, CPU], "new_position": [target, CPU], "tokens": PROMPT, **fields}


def store(node: Node) -> None:
    with EngineCache.attach(node.config, model="tiny", layout=LAYOUT) as cache:
        assert cache.store(PROMPT, torch.rand((LAYOUT.layers, LAYOUT.planes, len(PROMPT), 2, 8))) == len(PROMPT)


async def until_alive(client: Client, *names: str) -> None:
    with trio.fail_after(5):
        while {member.instance for member in await client.members() if member.state == "alive"} != set(names):  # noqa: ASYNC110 - a client has no event for it
            await trio.sleep(0.02)


async def until_held_by(client: Client, instance: str) -> None:
    """Wait until it is known that the prompt is at this instance, and nowhere else."""
    with trio.fail_after(3):
        while (await client.lookup(PROMPT)).layout_info != {instance: (CPU, len(PROMPT))}:  # noqa: ASYNC110 - a client has no event for it
            await trio.sleep(0.02)


@pytest.fixture
async def nodes(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Trio]:
    monkeypatch.setenv("P2PKV_RUNTIME_DIR", str(runtime_dir))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        shared = probe.getsockname()[1]
    keys = {"lmcache_worker_port": 0, "chunk_size": 16, "controller_http_url": f"localhost:{shared}"}
    async with AsyncExitStack() as stack:
        configs = [NodeConfig.model_validate({**keys, "lmcache_instance_id": name}) for name in "abc"]
        nodes = [await stack.enter_async_context(open_node(config)) for config in configs]
        for node in nodes:
            async with open_client(node.addresses.http) as client:
                await until_alive(client, "a", "b", "c")
        await trio.to_thread.run_sync(store, nodes[0])
        async with open_client(nodes[2].addresses.http) as client:
            await until_held_by(client, "a")
        yield Trio(nodes)


@pytest.fixture
async def client(nodes: Trio) -> AsyncIterator[Client]:
    """A client of c, which has no part in what it is asked for but coordinating it."""
    async with open_client(nodes.c.addresses.http) as client:
        yield client


# --- the websocket --------------------------------------------------------------------------------------------------------


async def test_a_watch_of_all_sees_every_state_of_a_move(nodes: Trio) -> None:
    async with nodes.control(nodes.a) as watching, nodes.control(nodes.a) as asking:
        assert await watching.ask(id="w", type="watch") == {"id": "w", "type": "watch"}
        answer = await asking.ask(id=1, **move("a", "b"))
        assert (answer["id"], answer["type"], answer["num_tokens"]) == (1, "move", len(PROMPT))
        pushes = await watching.receive_until_final(answer["event_id"])
    states = [push["state"] for push in pushes]
    assert list(dict.fromkeys(states)) == IN_ORDER
    assert pushes[-1]["chunks"] == {"found": 64, "moved": 64, "already_there": 0, "shared_kept": 0, "failed": 0}
    moved = [push["chunks"]["moved"] for push in pushes]
    assert moved == sorted(moved)


async def test_a_move_goes_there_and_back_through_a_third_node(nodes: Trio) -> None:
    async with nodes.control(nodes.c) as control:
        for number, (source, target) in enumerate([("a", "b"), ("b", "a")] * 3):
            answer = await control.ask(id=number, **move(source, target, wait_s=5))
            assert (answer["id"], answer["state"], answer["num_tokens"]) == (number, "done", len(PROMPT))


async def test_an_event_is_watched_to_its_end_through_a_node_that_has_no_part_in_it(nodes: Trio) -> None:
    async with nodes.control(nodes.a) as asking, nodes.control(nodes.c) as watching:
        event_id = (await asking.ask(id=1, **move("a", "b")))["event_id"]
        assert (await watching.ask(id=2, type="watch", event_id=event_id))["type"] == "watch"
        states = [push["state"] for push in await watching.receive_until_final(event_id)]
    assert states == sorted(states, key=IN_ORDER.index)
    assert states[-1] == "done"


async def test_many_requests_of_one_socket_are_answered_each_by_its_id(nodes: Trio) -> None:
    async with nodes.control(nodes.c) as control:
        await control.send(id="move", **move("a", "b", copy=True, wait_s=5))
        for number in range(50):
            await control.send(id=number, type="lookup", tokens=PROMPT)
        answers = {answer["id"]: answer for answer in [await control.receive() for _ in range(51)]}
    assert set(answers) == {"move", *range(50)}
    assert answers["move"]["state"] == "done"
    assert all(answers[number]["layout_info"]["a"] == [CPU, len(PROMPT)] for number in range(50))


async def test_a_client_that_does_not_read_is_disconnected_while_others_go_on(nodes: Trio) -> None:
    async with await connect_with_little_room(nodes.a) as stuck:
        assert await upgrade(stuck, nodes.a, "X-Nothing: x") == b"HTTP/1.1 101"
        with trio.fail_after(STALL_S + 15), pytest.raises(trio.BrokenResourceError):
            await send_for_ever(stuck)
        async with nodes.control(nodes.a) as control:
            assert (await control.ask(id=1, **move("a", "b", wait_s=5)))["state"] == "done"


async def connect_with_little_room(node: Node) -> trio.SocketStream:
    """A connection whose client has next to no buffer for what it doesn't read."""
    connection = trio.socket.socket()
    connection.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)
    await connection.connect((node.addresses.ws.host, node.addresses.ws.port))
    return trio.SocketStream(connection)


async def upgrade(stream: trio.SocketStream, node: Node, header: str) -> bytes:
    """Ask for the websocket by hand; the status that comes."""
    await stream.send_all(
        f"GET /control HTTP/1.1\r\nHost: {node.addresses.ws}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{header}\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
    )
    with trio.fail_after(5):
        return bytes(await stream.receive_some())[:12]


async def send_for_ever(stream: trio.SocketStream) -> None:
    request = b'{"id":1,"type":"members"}'
    frame = b"\x81" + bytes([0x80 | len(request), 0, 0, 0, 0]) + request
    while True:
        await stream.send_all(frame * 10)


def fourth(nodes: Trio) -> NodeConfig:
    """Of an instance d that joins the others."""
    shared = str(nodes.a.config.controller_http_url)
    keys = {"lmcache_instance_id": "d", "lmcache_worker_port": 0, "chunk_size": 16, "controller_http_url": shared}
    return NodeConfig.model_validate(keys)


@asynccontextmanager
async def open_leaver(nodes: Trio) -> AsyncIterator[tuple[Node, trio.Event]]:
    """A fourth node, and the event that makes it leave."""
    departure = trio.Event()

    async def stay(task_status: trio.TaskStatus[Node]) -> None:
        async with open_node(fourth(nodes)) as node:
            task_status.started(node)
            await departure.wait()

    async with trio.open_nursery() as nursery:
        yield await nursery.start(stay), departure
        departure.set()


async def test_a_leaving_node_says_goodbye(nodes: Trio) -> None:
    async with open_leaver(nodes) as (node, departure), nodes.control(node) as control:
        departure.set()
        with pytest.raises(ConnectionClosed) as closed:
            await control.receive()
    assert closed.value.reason is not None
    assert (closed.value.reason.code, closed.value.reason.reason) == (1001, "this node leaves")


@pytest.mark.parametrize("header", ["Origin: http://evil.example", "Sec-Fetch-Site: cross-site"])
async def test_a_foreign_web_page_gets_no_websocket(nodes: Trio, header: str) -> None:
    async with await connect_with_little_room(nodes.a) as stream:
        assert await upgrade(stream, nodes.a, header) == b"HTTP/1.1 403"


# --- the client -----------------------------------------------------------------------------------------------------------


async def test_a_client_moves_waits_and_sees_where_it_is(client: Client) -> None:
    event = await client.move(("a", CPU), ("b", CPU), tokens=PROMPT)
    assert event.num_tokens == len(PROMPT)
    with trio.fail_after(5):
        done = await client.wait(event.event_id)
    assert (done.event_id, done.state, done.chunks.moved, done.error) == (event.event_id, "done", CHUNK_COUNT, None)
    assert await client.event(event.event_id) == done
    assert done in await client.events()
    await until_held_by(client, "b")
    assert (await client.full_lookup(PROMPT)).layout_info == {"b": [(CPU, len(PROMPT))]}
    assert (await client.health("b")).error_codes == {"0": 0}
    assert (await client.cancel(event.event_id)).state == "done"
    assert (await client.clear(("b", CPU))).num_tokens == len(PROMPT)


async def test_a_client_follows_all_events(client: Client) -> None:
    async with client.watch() as changes:
        event = await client.move(("a", CPU), ("b", CPU), everything=True)
        seen = [await anext(changes)]
        while seen[-1].state != "done":
            seen.append(await anext(changes))
    assert {change.event_id for change in seen} == {event.event_id}
    assert [change.state for change in seen] == sorted((change.state for change in seen), key=IN_ORDER.index)


async def test_a_watch_of_one_event_ends_with_it(client: Client) -> None:
    event = await client.move(("a", CPU), ("b", CPU), tokens=PROMPT, copy=True)
    with trio.fail_after(5):
        async with client.watch(event.event_id) as changes:
            states = [change.state async for change in changes]
    assert states[-1] == "done"


@pytest.mark.parametrize("watched", [True, False])
async def test_a_client_that_gets_no_websocket_asks_instead(
    nodes: Trio, client: Client, monkeypatch: pytest.MonkeyPatch, *, watched: bool
) -> None:
    monkeypatch.setattr("p2pkv.net.control.MAX_SOCKETS", 0)
    if watched:
        async with client.watch() as changes:
            event = await client.move(("a", CPU), ("b", CPU), tokens=PROMPT)
            with trio.fail_after(5):
                while (change := await anext(changes)).state != "done":
                    pass
        assert change.event_id == event.event_id
    else:
        event = await client.move(("a", CPU), ("b", CPU), tokens=PROMPT)
        with trio.fail_after(5):
            assert (await client.wait(event.event_id)).state == "done"


async def test_waiting_goes_on_when_the_websocket_is_lost(nodes: Trio, client: Client) -> None:
    event = await client.move(("a", CPU), ("b", CPU), tokens=PROMPT)
    async with client.watch(event.event_id) as changes:
        assert changes._websocket is not None
        await changes._websocket.aclose()
        with trio.fail_after(5):
            states = [change.state async for change in changes]
    assert states[-1] == "done"


REFUSALS: list[tuple[Callable[[Client], Any], type[Exception]]] = [
    (lambda client: client.move(("a", CPU), ("x", CPU), tokens=PROMPT), UnknownNameError),
    (lambda client: client.move(("a", "Nowhere"), ("b", CPU), tokens=PROMPT), UnknownLocationError),
    (lambda client: client.event("nothing"), UnknownNameError),
    (lambda client: client.wait("nothing"), UnknownNameError),
    (lambda client: client.cancel("nothing"), UnknownNameError),
    (lambda client: client.health("x"), UnknownNameError),
]


@pytest.mark.parametrize(("ask", "error"), REFUSALS, ids=range(len(REFUSALS)))
async def test_refusals_are_the_errors_that_python_callers_know(
    client: Client, ask: Callable[[Client], Any], error: type[Exception]
) -> None:
    with pytest.raises(error), trio.fail_after(5):
        await ask(client)


async def test_a_place_where_no_node_answers_is_told_on_entry() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", "nonsense", "http://"):
        with pytest.raises(NodeUnreachableError), trio.fail_after(5):
            async with open_client(url):
                pass


async def test_a_node_that_leaves_is_told_to_who_follows_all(nodes: Trio) -> None:
    async with open_leaver(nodes) as (node, departure), open_client(node.addresses.http) as client, client.watch() as changes:
        departure.set()
        with pytest.raises(NodeUnreachableError, match="watch again"), trio.fail_after(5):
            await anext(changes)
