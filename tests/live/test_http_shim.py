"""The HTTP shim on real sockets, between two nodes with real chunks."""

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx2
import pytest
import torch
import trio

from p2pkv import NodeConfig, open_node
from p2pkv.engines import EngineCache, KVLayout
from p2pkv.net.access import DoorGuard
from p2pkv.net.http.server import guarded_app, serve_http
from p2pkv.node import Node

pytestmark = pytest.mark.live

CPU = "LocalCPUBackend"
LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=8, dtype="float32", planes=2)
PROMPT = list(range(100, 140))


Configure = Callable[..., NodeConfig]


@pytest.fixture
def configure(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Makes configurations of nodes that find each other, on ports that nothing uses."""
    monkeypatch.setenv("P2PKV_RUNTIME_DIR", str(runtime_dir))
    shared = free_port()

    def configure_node(name: str, **keys: object) -> NodeConfig:
        values = {"lmcache_instance_id": name, "lmcache_worker_port": free_port(), "chunk_size": 16, **keys}
        return NodeConfig.model_validate({"controller_http_url": f"localhost:{shared}", **values})

    return configure_node


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
async def pair(configure: Configure) -> AsyncIterator[tuple[Node, Node]]:
    """Instances a and b; a was there first."""
    async with open_node(configure("a")) as first, open_node(configure("b")) as second:
        yield first, second


@pytest.fixture
async def alone(configure: Configure) -> AsyncIterator[Node]:
    async with open_node(configure("a")) as node:
        yield node


async def store(node: Node, tokens: list[int], layout: KVLayout = LAYOUT, model: str = "tiny") -> int:
    """Keep a prompt's KV cache at `node`; the count of tokens held."""

    def attach_and_store() -> int:
        with EngineCache.attach(node.config, model=model, layout=layout) as cache:
            shape = (layout.layers, layout.planes, len(tokens), layout.kv_heads, layout.head_dim)
            return cache.store(tokens, torch.rand(shape))

    return await trio.to_thread.run_sync(attach_and_store)


def client_of(url: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=url, trust_env=False, timeout=10)


async def until(ask: Callable[[], Awaitable[bool]]) -> None:
    """Ask again until the answer is yes: views agree, and members tell of themselves, within 2 s."""
    with trio.fail_after(3):
        while True:
            if await ask():
                return
            await trio.sleep(0.02)


async def until_known(http: httpx2.AsyncClient, name: str) -> None:
    async def is_alive() -> bool:
        members = (await http.get("/members")).json()["members"]
        return any(member["instance"] == name and member["state"] == "alive" for member in members)

    await until(is_alive)


async def until_layout(http: httpx2.AsyncClient, tokens: list[int], expected: dict[str, list[object]]) -> None:
    async def is_expected() -> bool:
        return bool((await http.post("/lookup", json={"tokens": tokens})).json()["layout_info"] == expected)

    await until(is_expected)


async def until_held(http: httpx2.AsyncClient, expected: dict[str, int]) -> None:
    async def is_expected() -> bool:
        members = (await http.get("/members")).json()["members"]
        return {member["instance"]: member["locations"][CPU]["chunks"] for member in members} == expected

    await until(is_expected)


async def test_a_move_carries_the_prompt_and_every_view_follows(pair: tuple[Node, Node]) -> None:
    first, second = pair
    assert await store(first, PROMPT) == 40
    async with client_of(first.addresses.http) as at_first, client_of(second.addresses.http) as at_second:
        await until_known(at_second, "a")
        await until_layout(at_second, PROMPT, {"a": [CPU, 40]})
        answer = await at_second.post("/move", json={"old_position": ["a", CPU], "new_position": ["b", CPU], "tokens": PROMPT})
        assert answer.status_code == 200
        move = answer.json()
        assert (move["num_tokens"], move["state"]) == (40, "done")
        for http in (at_first, at_second):
            await until_layout(http, PROMPT, {"b": [CPU, 40]})
            event = (await http.get(f"/events/{move['event_id']}")).json()
            assert event["chunks"] == {"found": 3, "moved": 3, "already_there": 0, "shared_kept": 0, "failed": 0}
            assert (event["state"], event["lane"], event["coordinator"]) == ("done", "handoff", "b")
            assert event["bytes"] > 0
            await until_held(http, {"a": 0, "b": 3})


async def test_a_copy_leaves_the_source_as_it_is(pair: tuple[Node, Node]) -> None:
    first, _ = pair
    await store(first, PROMPT)
    async with client_of(first.addresses.http) as http:
        await until_known(http, "b")
        body = {"old_position": ["a", CPU], "new_position": ["b", CPU], "tokens": PROMPT, "copy": True}
        assert (await http.post("/move", json=body)).json()["state"] == "done"
        await until_layout(http, PROMPT, {"a": [CPU, 40], "b": [CPU, 40]})


async def test_everything_at_a_position_moves_when_asked_for(pair: tuple[Node, Node]) -> None:
    first, _ = pair
    await store(first, PROMPT)
    await store(first, [7] * 20)
    async with client_of(first.addresses.http) as http:
        await until_known(http, "b")
        body = {"old_position": ["a", CPU], "new_position": ["b", CPU]}
        assert (await http.post("/move", json=body)).json()["num_tokens"] == 0
        assert (await http.post("/move", json={**body, "all": True})).json()["num_tokens"] == 60


async def test_a_full_target_refuses_with_its_reason_and_loses_nothing(configure: Configure) -> None:
    async with open_node(configure("a")) as first, open_node(configure("b", max_local_cpu_size=1e-6)):
        await store(first, PROMPT)
        async with client_of(first.addresses.http) as http:
            await until_known(http, "b")
            answer = await http.post("/move", json={"old_position": ["a", CPU], "new_position": ["b", CPU], "tokens": PROMPT})
            assert answer.status_code == 507
            body = answer.json()
            assert set(body) == {"detail", "error", "event_id", "num_tokens", "state"}
            assert (body["error"], body["num_tokens"], body["state"]) == ("store_full", 40, "failed")
            await until_layout(http, PROMPT, {"a": [CPU, 40]})


async def test_caches_of_other_layouts_do_not_move(pair: tuple[Node, Node]) -> None:
    first, second = pair
    await store(first, PROMPT)
    await store(second, PROMPT, KVLayout(layers=3, kv_heads=2, head_dim=8, dtype="float32", planes=2))
    async with client_of(first.addresses.http) as http:
        await until_known(http, "b")
        answer = await http.post("/move", json={"old_position": ["a", CPU], "new_position": ["b", CPU], "tokens": PROMPT})
        assert (answer.status_code, answer.json()["error"]) == (409, "namespace_mismatch")


async def test_a_move_need_not_be_waited_for(pair: tuple[Node, Node]) -> None:
    first, _ = pair
    await store(first, PROMPT)
    async with client_of(first.addresses.http) as http:
        await until_known(http, "b")
        body = {"old_position": ["a", CPU], "new_position": ["b", CPU], "tokens": PROMPT, "wait_s": 0}
        move = (await http.post("/move", json=body)).json()
        assert move["num_tokens"] == 40

        async def is_done() -> bool:
            answer = await http.post("/check_finish", json={"event_id": move["event_id"]})
            return bool(answer.json() == {"status": "done"})

        await until(is_done)


async def test_a_dead_instance_is_told_apart_from_an_unknown_one(alone: Node, configure: Configure) -> None:
    async with client_of(alone.addresses.http) as http:
        async with open_node(configure("b")):
            await until_known(http, "b")
        body = {"old_position": ["b", CPU], "new_position": ["a", CPU], "tokens": PROMPT}
        answer = await http.post("/move", json=body)
        assert (answer.status_code, answer.json()["error"]) == (503, "instance_unreachable")


# --- the server -----------------------------------------------------------------------------------------------------------


async def connect(node: Node) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", int(node.addresses.http.rpartition(":")[2]))


async def read_all(stream: trio.SocketStream) -> bytes:
    with trio.fail_after(5):
        return b"".join([part async for part in stream])


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n\0\0\0",
        b"GARBAGE\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"POST /lookup HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ],
    ids=["zeros", "garbage", "headers", "length"],
)
async def test_what_is_no_http_is_disconnected_and_the_node_goes_on(alone: Node, request_bytes: bytes) -> None:
    async with await connect(alone) as stream:
        await stream.send_all(request_bytes)
        assert (await read_all(stream)).startswith(b"HTTP/1.1 4")
    async with client_of(alone.addresses.http) as http:
        assert (await http.get("/livez")).status_code == 200


@pytest.mark.parametrize(
    ("upgrade", "rest"),
    [
        (b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: !!\r\n", b""),
        (
            (
                b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            ),
            b"\x00\xff garbage",
        ),
    ],
    ids=["h2c", "websocket"],
)
async def test_a_broken_upgrade_ends_its_own_connection_only(alone: Node, upgrade: bytes, rest: bytes) -> None:
    port = int(alone.addresses.http.rpartition(":")[2])
    for _ in range(3):
        stream = await connect(alone)
        await stream.send_all(b"GET /livez HTTP/1.1\r\nHost: localhost:%d\r\n%b\r\n%b" % (port, upgrade, rest))
        with trio.move_on_after(2):
            await read_all(stream)
        await stream.aclose()
    async with client_of(alone.addresses.http) as http:
        assert (await http.get("/livez")).status_code == 200


async def test_a_client_that_goes_away_in_its_body_harms_nobody(alone: Node) -> None:
    port = alone.addresses.http.rpartition(":")[2].encode()
    async with await connect(alone) as stream:
        await stream.send_all(
            b"POST /lookup HTTP/1.1\r\nHost: localhost:"
            + port
            + b"\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
    async with client_of(alone.addresses.http) as http:
        assert (await http.get("/livez")).status_code == 200


async def test_the_server_ends_at_once_whatever_its_clients_do(alone: Node) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_http, guarded_app(alone.driver, DoorGuard(frozenset({port}))), listener)
        streams = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3)]
        host = f"Host: localhost:{port}\r\n".encode()
        await streams[0].send_all(b"GET /livez HTTP/1.1\r\n" + host)
        await streams[1].send_all(
            b"POST /move HTTP/1.1\r\n" + host + b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        async with client_of(f"http://localhost:{port}") as http:
            await http.get("/livez")
            began_at = trio.current_time()
            nursery.cancel_scope.cancel()
    assert trio.current_time() - began_at < 0.5
    for stream in streams:
        await stream.aclose()
