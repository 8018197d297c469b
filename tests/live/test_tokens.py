"""Tokens at every door of a cluster with a key, and that nothing secret ever gets out."""

import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import httpx2
import pytest
import torch
import trio
from trio_websocket import open_websocket_url

from p2pkv import NodeConfig, open_node
from p2pkv.client import open_client
from p2pkv.cluster_key import ClusterKey, Purpose
from p2pkv.core.events import Event, MessageReceived
from p2pkv.core.messages import Offer
from p2pkv.engines import EngineCache, KVLayout
from p2pkv.errors import AccessDeniedError
from p2pkv.net.dial_rules import LOOPBACK, DialRules
from p2pkv.net.links import PEER_PATH, PeerLinks
from p2pkv.net.ports import listen_on
from p2pkv.net.proof import Prover
from p2pkv.node import Node
from p2pkv.wire.proof import Who
from tests.live.command_line import call as command
from tests.live.command_line import write_config

pytestmark = pytest.mark.live

SECRET = "nobody may ever see this key of a cluster"
KEY = ClusterKey("p2pkv", SECRET.encode())
FULL, READ_ONLY = KEY.token(Purpose.FULL_ACCESS), KEY.token(Purpose.READ_ONLY_ACCESS)
CPU = "LocalCPUBackend"
MOVE: dict[str, object] = {"old_position": ["a", CPU], "new_position": ["b", CPU], "tokens": [1, 2, 3]}
LAYOUT = KVLayout(layers=1, kv_heads=1, head_dim=8, dtype="float32", planes=2)
UPGRADE = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
}
Body = dict[str, object] | None
Start = Callable[..., AbstractAsyncContextManager[Node]]


def free_port() -> int:
    with listen_on("127.0.0.1", 0, key="test") as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def start(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Gives nodes, running as long as one is in their context."""
    monkeypatch.setenv("P2PKV_RUNTIME_DIR", str(runtime_dir))
    shared = free_port()

    def start_node(name: str, **keys: object) -> AbstractAsyncContextManager[Node]:
        values = {"lmcache_instance_id": name, "lmcache_worker_port": free_port(), "chunk_size": 4, **keys}
        return open_node(
            NodeConfig.model_validate({"controller_http_url": f"localhost:{shared}", "cluster_key": SECRET, **values})
        )

    return start_node


async def ask(
    node: Node, method: str, path: str, token: str | None, body: Body = None
) -> tuple[int, dict[str, object], httpx2.Headers]:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    async with httpx2.AsyncClient(base_url=node.addresses.http, trust_env=False) as client:
        answer = await client.request(method, path, json=body, headers=headers)
        return answer.status_code, answer.json(), answer.headers


async def test_http_wants_a_token_and_says_how_to_send_one(start: Start) -> None:
    async with start("a") as node:
        for method, path, body in (("GET", "/members", None), ("POST", "/move", MOVE), ("GET", "/nothing", None)):
            for token in (None, "wrong", FULL[:-1], READ_ONLY + "0", SECRET):
                status, answer, headers = await ask(node, method, path, token, body)
                assert (status, answer["error"], headers["www-authenticate"]) == (401, "unauthorized", "Bearer")
                assert "Authorization: Bearer" in str(answer["detail"])


async def test_who_watches_over_processes_needs_none(start: Start) -> None:
    async with start("a") as node:
        for path in ("/livez", "/readyz"):
            assert (await ask(node, "GET", path, None))[:2] == (200, {})


async def test_the_read_only_token_reads_and_the_full_one_does_all(start: Start) -> None:
    async with start("a") as node:
        reading: tuple[tuple[str, str, Body], ...] = (
            ("GET", "/members", None),
            ("GET", "/events", None),
            ("GET", "/inventory?instance=a&location=LocalCPUBackend", None),
            ("POST", "/lookup", {"tokens": [1]}),
            ("POST", "/health", {"instance_id": "a"}),
        )
        for method, path, body in reading:
            assert [(await ask(node, method, path, token, body))[0] for token in (READ_ONLY, FULL)] == [200, 200]
        changing: tuple[tuple[str, str, Body, int], ...] = (
            ("POST", "/move", MOVE, 404),  # there is no b
            ("POST", "/clear", {"instance_id": "a", "location": CPU}, 200),
            ("DELETE", "/events/move~a~b~a~0123456789abcdef", None, 404),
        )
        for method, path, body, status in changing:
            refused, answer, _ = await ask(node, method, path, READ_ONLY, body)
            assert (refused, answer["error"]) == (403, "forbidden")
            assert (await ask(node, method, path, FULL, body))[0] == status


async def test_a_cluster_without_a_key_of_the_users_wants_no_token(start: Start) -> None:
    async with start("a", cluster_key=None) as node:
        assert (await ask(node, "POST", "/move", None, MOVE))[0] == 404
        assert (await ask(node, "GET", "/members", "anything"))[0] == 200


async def test_the_control_websocket_wants_the_same_header(start: Start) -> None:
    async with start("a") as node:
        url = f"ws://{node.addresses.ws}/control"
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": FULL}):
            async with httpx2.AsyncClient(trust_env=False) as client:
                answer = await client.get(f"http://{node.addresses.ws}/control", headers={**UPGRADE, **headers})
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        async with open_websocket_url(url, extra_headers=[(b"authorization", f"Bearer {READ_ONLY}".encode())]) as websocket:
            for request_id, kind in enumerate(("members", "move")):
                await websocket.send_message(json.dumps({"id": request_id, "type": kind, **(MOVE if kind == "move" else {})}))
            answers = [json.loads(await websocket.get_message()) for _ in range(2)]
        by_id = {answer["id"]: answer for answer in answers}
        assert by_id[0]["type"] == "members"
        assert (by_id[1]["type"], by_id[1]["error"]) == ("error", "forbidden")


async def test_clients_take_their_token_from_the_environment(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start("a") as node:
        with pytest.raises(AccessDeniedError):
            async with open_client(node.addresses.http):
                pass
        monkeypatch.setenv("P2PKV_TOKEN", READ_ONLY)
        async with open_client(node.addresses.http) as client:
            assert [member.instance for member in await client.members()] == ["a"]
            with pytest.raises(AccessDeniedError):
                await client.move(("a", CPU), ("b", CPU), [1])


async def test_commands_take_it_from_there_too_or_derive_it(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start("a") as node:
        config = write_config(tmp_path, "a", f"cluster_key: {SECRET}")

        async def run(*arguments: str, **environ: str) -> tuple[int, str]:
            for name in ("P2PKV_TOKEN", "P2PKV_CLUSTER_KEY", "P2PKV_CONFIG_FILE"):
                monkeypatch.delenv(name, raising=False)
            for name, value in environ.items():
                monkeypatch.setenv(name, value)
            ended = await trio.to_thread.run_sync(lambda: command(*arguments))
            return ended.returncode, ended.stdout + ended.stderr

        via = ("members", "--via", node.addresses.http)
        assert await run("token", "--config", str(config)) == (0, f"{FULL}\n")
        assert await run("token", "--config", str(config), "--read-only") == (0, f"{READ_ONLY}\n")
        refused = await run(*via)
        assert refused[0] == 1
        assert "This cluster wants a token" in refused[1]
        for environ in ({"P2PKV_TOKEN": READ_ONLY}, {"P2PKV_CLUSTER_KEY": SECRET}, {"P2PKV_CONFIG_FILE": str(config)}):
            assert (await run(*via, **environ))[0] == 0


async def test_nothing_secret_is_logged_shown_or_written(
    start: Start, runtime_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start("a") as a, start("b") as b:
        tickets = tap_tickets(b, monkeypatch)
        shown = [repr(a.config), repr(b.addresses)]
        await trio.to_thread.run_sync(store_at, a)
        with trio.fail_after(5):
            while "b" not in (answer := str((await ask(a, "GET", "/members", FULL))[1])):  # noqa: ASYNC110 - no event for it
                await trio.sleep(0.05)
        shown.append(answer)
        assert (await ask(a, "POST", "/move", FULL, {**MOVE, "tokens": list(range(8))}))[1]["state"] == "done"
        assert len(tickets) == 1
        for path in ("/members", "/events", "/openapi.json", "/inventory?instance=b&location=LocalCPUBackend"):
            for token in (FULL, READ_ONLY, "wrong"):
                shown.append(str(await ask(b, "GET", path, token)))
        thief = PeerLinks(Prover(bytes(32), "p2pkv", Who("thief", 1, (1,)), PEER_PATH), DialRules(LOOPBACK))
        told: list[Event] = []
        await thief.dial(a.addresses.ws, told.append)
        shown += map(repr, told)
        shown += [path.read_text(errors="replace") for path in runtime_dir.rglob("*") if path.is_file()]
        logged = capsys.readouterr()
        assert "a peer was refused" in logged.out + logged.err
        everything = "\n".join([*shown, logged.out, logged.err])
        for secret in (SECRET.encode(), *map(KEY.subkey, Purpose), *tickets):
            for text in (secret.hex(), repr(secret)[2:-1]):
                assert text not in everything


def tap_tickets(node: Node, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The tickets of all moves that `node` is the target of, as they arrive."""
    tickets: list[bytes] = []
    handle = node.driver.handle

    def listen(event: Event) -> None:
        if isinstance(event, MessageReceived) and isinstance(event.message, Offer) and event.message.ticket not in tickets:
            tickets.append(event.message.ticket)
        handle(event)

    monkeypatch.setattr(node.driver, "handle", listen)
    return tickets


def store_at(node: Node) -> None:
    with EngineCache.attach(node.config, model="tiny", layout=LAYOUT) as cache:
        assert cache.store(list(range(8)), torch.rand((1, 2, 8, 1, 8))) == 8
