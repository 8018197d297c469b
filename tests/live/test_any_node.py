"""Every call about any instance, asked of any node: living, dead, gone and unknown ones, and one that stores nothing."""

import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import httpx2
import pytest
import torch
import trio

from p2pkv import NodeConfig, open_node
from p2pkv.engines import EngineCache, KVLayout
from p2pkv.node import Node

pytestmark = pytest.mark.live

CPU, DISK = "LocalCPUBackend", "LocalDiskBackend"
LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=8, dtype="float32", planes=2)
PROMPT = list(range(100, 140))

Configure = Callable[..., NodeConfig]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def configure(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Makes configurations of nodes that find each other, on ports that nothing uses."""
    monkeypatch.setenv("P2PKV_RUNTIME_DIR", str(runtime_dir))
    shared = free_port()

    def configure_node(name: str, **keys: object) -> NodeConfig:
        values = {"lmcache_instance_id": name, "lmcache_worker_port": 0, "chunk_size": 16, **keys}
        return NodeConfig.model_validate({"controller_http_url": f"localhost:{shared}", **values})

    return configure_node


class Asked:
    """A node, and a client of it."""

    def __init__(self, node: Node, http: httpx2.AsyncClient) -> None:
        self.node = node
        self._http = http

    async def get(self, path: str, **query: str) -> httpx2.Response:
        return await self._http.get(path, params=query)

    async def post(self, path: str, **fields: object) -> httpx2.Response:
        return await self._http.post(path, json=fields)

    async def store(self, tokens: list[int], *, world_size: int = 1) -> None:
        """Have engines of this instance, one a worker, hold a prompt."""
        for worker in range(world_size):
            await trio.to_thread.run_sync(partial(self._store, tokens, world_size, worker))

    def _store(self, tokens: list[int], world_size: int, worker: int) -> None:
        attach = partial(EngineCache.attach, self.node.config, model="tiny", layout=LAYOUT)
        with attach(world_size=world_size, worker_id=worker) as cache:
            heads = LAYOUT.kv_heads // world_size
            cache.store(tokens, torch.rand((LAYOUT.layers, LAYOUT.planes, len(tokens), heads, LAYOUT.head_dim)))

    async def until_states(self, expected: dict[str, str], within_s: float = 5) -> None:
        """Wait until this node knows so much."""

        async def are_known() -> bool:
            members = (await self.get("/members")).json()["members"]
            return expected.items() <= {member["instance"]: member["state"] for member in members}.items()

        await until(are_known, within_s)

    async def until_held(self, instance: str, count: int) -> None:
        """Wait until this node knows that an instance holds so many chunks."""

        async def is_held() -> bool:
            return len((await self.get("/inventory", instance=instance)).json()["items"]) == count

        await until(is_held)


async def until(is_true: Callable[[], Awaitable[bool]], within_s: float = 5) -> None:
    with trio.fail_after(within_s):
        while not await is_true():  # noqa: ASYNC110 - a whole node has no event for each of its facts
            await trio.sleep(0.02)


@asynccontextmanager
async def opened(*configs: NodeConfig) -> AsyncIterator[list[Asked]]:
    """Nodes that all know each other."""
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(open_node(config)) for config in configs]
        clients = [httpx2.AsyncClient(base_url=node.addresses.http, trust_env=False, timeout=10) for node in nodes]
        asked = [Asked(node, await stack.enter_async_context(http)) for node, http in zip(nodes, clients, strict=True)]
        for each in asked:
            await each.until_states({config.lmcache_instance_id: "alive" for config in configs})
        yield asked


def refusal(answer: httpx2.Response) -> tuple[int, str]:
    body = answer.json()
    assert set(body) == {"detail", "error"}
    return answer.status_code, body["error"]


# --- what is answered -----------------------------------------------------------------------------------------------------


async def test_any_node_tells_of_any_instance(configure: Configure) -> None:
    async with opened(configure("a"), configure("b")) as nodes:
        await nodes[0].store(PROMPT)
        for asked in nodes:
            await asked.until_held("a", 3)
            health = (await asked.post("/health", instance_id="a")).json()
            assert health == {"event_id": health["event_id"], "error_codes": {"0": 0}}
            looked_up = (await asked.post("/full_lookup", tokens=PROMPT)).json()
            assert looked_up == {"event_id": looked_up["event_id"], "layout_info": {"a": [[CPU, 40]]}, "complete": True}
            page = (await asked.get("/inventory", instance="a", location=CPU)).json()
            assert [item["location"] for item in page["items"]] == [CPU] * 3
            assert sorted(item["tokens"] for item in page["items"]) == [8, 16, 16]
            assert all(len(bytes.fromhex(item["fingerprint"])) == 8 for item in page["items"])
            assert page["next"] is None
            assert (await asked.get("/inventory", instance="b", location=CPU)).json() == {"items": [], "next": None}


async def test_any_node_clears_any_position(configure: Configure) -> None:
    async with opened(configure("a"), configure("b")) as (a, b):
        await a.store(PROMPT)
        cleared = (await b.post("/clear", instance_id="a", location=CPU)).json()
        assert cleared == {"event_id": cleared["event_id"], "num_tokens": 40}
        assert (await b.post("/clear", instance_id="a", location=CPU)).json()["num_tokens"] == 0
        for asked in (a, b):
            await asked.until_held("a", 0)
            assert (await asked.post("/lookup", tokens=PROMPT)).json()["layout_info"] == {}


async def test_workers_are_told_with_their_doors_and_times(configure: Configure) -> None:
    async with opened(configure("a"), configure("b")) as (a, b):
        await a.store(PROMPT, world_size=2)
        await b.until_held("a", 3)
        for asked in (a, b):
            assert (await asked.post("/health", instance_id="a")).json()["error_codes"] == {"0": 0, "1": 0}
            infos = (await asked.post("/query_worker_info", instance_id="a")).json()["worker_infos"]
            assert [info["worker_id"] for info in infos] == [0, 1]
            for info in infos:
                assert 0 <= time.time() - info["last_heartbeat_time"] < 5
                assert 0 <= info["last_heartbeat_time"] - info["registration_time"] < 60
                addresses = a.node.addresses
                assert (info["ip"], info["port"]) == (addresses.ws.host, addresses.ws.port)
                assert info["peer_init_url"] == str(addresses.transfer)
            (second,) = (await asked.post("/query_worker_info", instance_id="a", worker_ids=[1])).json()["worker_infos"]
            assert (second["instance_id"], second["worker_id"]) == ("a", 1)
            assert refusal(await asked.post("/query_worker_info", instance_id="a", worker_ids=[0, 2])) == (
                422,
                "invalid_request",
            )


@pytest.mark.parametrize("ip", ["127.0.0.1", "localhost", "LOCALHOST"])
async def test_an_address_names_its_first_instance(configure: Configure, ip: str) -> None:
    async with opened(configure("b"), configure("c", advertise_host="localhost")) as nodes:
        for asked in nodes:
            assert (await asked.post("/query_instance", ip=ip, event_id="mine")).json() == {"event_id": "mine", "res": "b"}


async def test_an_address_without_instance_is_told(configure: Configure) -> None:
    async with opened(configure("a")) as (a,):
        for ip in ("10.0.0.1", "::1", "nobody", ""):
            assert refusal(await a.post("/query_instance", ip=ip)) == (404, "unknown_instance")


async def test_an_inventory_comes_in_pages_that_changes_do_not_upset(configure: Configure) -> None:
    async with opened(configure("a"), configure("b")) as (a, b):
        prompts = [[number, *range(16 * 300 - 1)] for number in range(4)]
        for prompt in prompts:
            await a.store(prompt)

        async def pages(asked: Asked) -> list[list[str]]:
            found: list[list[str]] = []
            cursor: dict[str, str] = {}
            while True:
                page = (await asked.get("/inventory", instance="a", **cursor)).json()
                found.append([item["fingerprint"] for item in page["items"]])
                if page["next"] is None:
                    return found
                cursor = {"cursor": page["next"]}

        async def are_all_known() -> bool:
            return sum(map(len, await pages(b))) == 1200

        await until(are_all_known)
        for asked in (a, b):
            first, second = await pages(asked)
            assert (len(first), len(second)) == (1000, 200)
            assert first + second == sorted({*first, *second})
        cursor = (await a.get("/inventory", instance="a")).json()["next"]
        await a.post("/clear", instance_id="a", location=CPU)
        assert (await a.get("/inventory", instance="a", cursor=cursor)).json() == {"items": [], "next": None}
        assert refusal(await a.get("/inventory", instance="a", cursor="1000")) == (422, "invalid_request")


# --- who can't be asked ---------------------------------------------------------------------------------------------------

Ask = Callable[[Asked, str], Awaitable[httpx2.Response]]

ABOUT_AN_INSTANCE: dict[str, Ask] = {
    "health": lambda asked, name: asked.post("/health", instance_id=name),
    "clear": lambda asked, name: asked.post("/clear", instance_id=name, location=CPU),
    "pin": lambda asked, name: asked.post("/pin", instance_id=name, location=CPU, tokens=PROMPT),
    "unpin": lambda asked, name: asked.post("/unpin", instance_id=name, location=CPU, tokens=PROMPT),
    "inventory": lambda asked, name: asked.get("/inventory", instance=name),
    "move": lambda asked, name: asked.post("/move", old_position=[name, CPU], new_position=["a", CPU], tokens=PROMPT),
}


@pytest.mark.parametrize("name", ["nobody", "no such name", "", "." * 3])
async def test_unknown_instances_are_refused_by_name(configure: Configure, name: str) -> None:
    async with opened(configure("a"), configure("b")) as nodes:
        for asked in nodes:
            for ask in ABOUT_AN_INSTANCE.values():
                assert refusal(await ask(asked, name)) == (404, "unknown_instance")
            assert refusal(await asked.post("/query_worker_info", instance_id=name)) == (404, "unknown_instance")


async def test_unknown_locations_are_refused_by_name(configure: Configure) -> None:
    async with opened(configure("a"), configure("b")) as nodes:
        for asked in nodes:
            for location in ("Disk", DISK):
                assert refusal(await asked.post("/clear", instance_id="a", location=location)) == (404, "unknown_location")
                assert refusal(await asked.get("/inventory", instance="a", location=location)) == (404, "unknown_location")


async def test_an_instance_that_left_is_unreachable_and_its_times_are_still_told(configure: Configure) -> None:
    async with opened(configure("a")) as (a,):
        async with opened(configure("b")):
            await a.until_states({"b": "alive"})
        await a.until_states({"b": "left"})
        for ask in ABOUT_AN_INSTANCE.values():
            assert refusal(await ask(a, "b")) == (503, "instance_unreachable")
        (info,) = (await a.post("/query_worker_info", instance_id="b")).json()["worker_infos"]
        assert info["last_heartbeat_time"] >= info["registration_time"]


async def test_a_killed_instance_is_unreachable_and_holds_nothing(configure: Configure, tmp_path: Path) -> None:
    async with opened(configure("a"), configure("b")) as nodes:
        config = configure("c")
        yaml = tmp_path / "c.yaml"
        keys = ("lmcache_instance_id", "lmcache_worker_port", "chunk_size", "controller_http_url")
        yaml.write_text("".join(f"{key}: {getattr(config, key)}\n" for key in keys))
        command = [sys.executable, "-m", "p2pkv", "node", "--config", str(yaml)]
        async with trio.open_nursery() as nursery:
            run = partial(trio.run_process, command, env=dict(os.environ), check=False, capture_stdout=True)
            process: trio.Process = await nursery.start(run)
            for asked in nodes:
                await asked.until_states({"c": "alive"}, within_s=20)
            await nodes[0].store(PROMPT)
            moved = await nodes[1].post("/move", old_position=["a", CPU], new_position=["c", CPU], tokens=PROMPT)
            assert moved.json()["state"] == "done"
            process.send_signal(signal.SIGKILL)
        for asked in nodes:
            await asked.until_states({"c": "dead"})
            for ask in ABOUT_AN_INSTANCE.values():
                assert refusal(await ask(asked, "c")) == (503, "instance_unreachable")
            assert (await asked.post("/full_lookup", tokens=PROMPT)).json()["layout_info"] == {}
            assert (await asked.post("/query_instance", ip="127.0.0.1")).json()["res"] == "a"


async def test_a_node_without_storage_coordinates_and_refuses_to_hold(configure: Configure) -> None:
    async with opened(configure("a"), configure("b"), configure("controller", local_cpu=False)) as (a, _, controller):
        await a.store(PROMPT)
        moved = await controller.post("/move", old_position=["a", CPU], new_position=["b", CPU], tokens=PROMPT)
        assert (moved.json()["num_tokens"], moved.json()["state"]) == (40, "done")
        assert (await controller.get(f"/events/{moved.json()['event_id']}")).json()["coordinator"] == "controller"
        refused = await a.post("/move", old_position=["b", CPU], new_position=["controller", CPU], tokens=PROMPT)
        assert (refused.status_code, refused.json()["error"]) == (404, "unknown_location")
        assert refusal(await a.get("/inventory", instance="controller", location=CPU)) == (404, "unknown_location")
        assert (await a.get("/inventory", instance="controller")).json() == {"items": [], "next": None}
        await a.until_held("b", 3)
