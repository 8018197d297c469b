"""Every key of an instance's yaml at a node that runs: its default, what it changes, and what a wrong value is told."""

import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import trio

from p2pkv import NodeConfig, open_node
from p2pkv.cluster_key import Purpose, configured_key
from p2pkv.core.ids import Address
from p2pkv.core.keys import Identity, pack_tokens
from p2pkv.engines import EngineCache, KVLayout
from p2pkv.lmcache_keys import MEANINGLESS_KEYS
from p2pkv.net.descriptors import receive_frame, send_frame
from p2pkv.net.websockets import dial_websocket
from p2pkv.node import Node
from p2pkv.rendezvous import place_of, runtime_directory
from p2pkv.wire.engine import ENGINE_PROTOCOL_VERSION, Attach, StoreRequest, request_codec
from tests.live.command_line import Run, free_port, read_ready
from tests.live.doors import CPU, SLOW, client_of, command

pytestmark = pytest.mark.live

LAYOUT = KVLayout(layers=1, kv_heads=2, head_dim=8, dtype="float32", planes=2)
PROMPT = list(range(300))
KEY = "the key of a cluster that has one of its own"
ATTACH = Attach(
    ENGINE_PROTOCOL_VERSION,
    model="tiny",
    weights=None,
    dtype="float32",
    layers=1,
    planes=2,
    kv_heads=2,
    head_dim=8,
    world_size=1,
    worker=0,
)
MIB_TOKENS = 8192
"""Of `LAYOUT`, whose tokens take 128 bytes each."""

Write = Callable[..., Path]


@pytest.fixture
def write(home: Path) -> Write:
    """Writes the yaml of an instance: its name, any free port, and these lines."""

    def write_yaml(name: str, *lines: str) -> Path:
        path = home / f"{name}.yaml"
        path.write_text("\n".join([f"lmcache_instance_id: {name}", "lmcache_worker_port: 0", *lines]))
        return path

    return write_yaml


@asynccontextmanager
async def opened(*paths: Path) -> AsyncIterator[list[Node]]:
    """Nodes of these files, not waited for to meet."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_node(NodeConfig.from_yaml(path))) for path in paths]


@asynccontextmanager
async def joined(*paths: Path) -> AsyncIterator[list[Node]]:
    """The same, and they know each other."""
    async with opened(*paths) as nodes:
        for node in nodes:
            await until(partial(knows, node, *(each.config.lmcache_instance_id for each in nodes)))
        yield nodes


async def until(is_true: Callable[[], Any], within_s: float = 5) -> None:
    with trio.fail_after(within_s):
        while not await is_true():  # noqa: ASYNC110 - a whole node has no event for each of its facts
            await trio.sleep(0.02)


async def ask(node: Node, method: str, path: str, **fields: object) -> Any:
    key = configured_key(node.config)
    headers = {} if key is None else {"authorization": f"Bearer {key.token(Purpose.FULL_ACCESS)}"}
    async with client_of(node.addresses.http, headers=headers) as http:
        return (await http.request(method, path, json=fields or None)).json()


async def members(node: Node) -> dict[str, dict[str, Any]]:
    return {member["instance"]: member for member in (await ask(node, "GET", "/members"))["members"]}


async def knows(node: Node, *names: str) -> bool:
    return {name for name, member in (await members(node)).items() if member["state"] == "alive"} >= set(names)


async def move(node: Node, tokens: list[int], source: str = "a", target: str = "b", **fields: object) -> Any:
    places = {"old_position": [source, CPU], "new_position": [target, CPU]}
    return await ask(node, "POST", "/move", **places, tokens=tokens, **fields)


async def store(node: Node, tokens: list[int], model: str = "tiny") -> int:
    def attach_and_store() -> int:
        with EngineCache.attach(node.config, model=model, layout=LAYOUT) as cache:
            return cache.store(tokens, torch.zeros(LAYOUT.shape(len(tokens))))

    return await trio.to_thread.run_sync(attach_and_store)


async def chunk_sizes(node: Node) -> list[int]:
    items = (await ask(node, "GET", f"/inventory?instance={node.config.lmcache_instance_id}"))["items"]
    return sorted(item["tokens"] for item in items)


# --- what is wrong --------------------------------------------------------------------------------------------------------

WRONG = {
    "chunk_size": ("0", "greater than or equal to 1"),
    "local_cpu": ("maybe", "valid boolean"),
    "max_local_cpu_size": ("-1", "greater than 0"),
    "max_prefaulted_size": ("-1", "greater than or equal to 0"),
    "local_disk": ("relative/path", "must be file:///path of a directory"),
    "max_local_disk_size": ("-1", "greater than or equal to 0"),
    "cache_policy": ("FIFO", "'LRU'"),
    "cache_epoch": ("-1", "greater than or equal to 0"),
    "enable_controller": ("maybe", "valid boolean"),
    "controller_url": ("nowhere", "must be host:port"),
    "controller_http_url": ("localhost:0", "must be host:port"),
    "lmcache_worker_port": ("65536", "less than or equal to 65535"),
    "distributed_url": ("localhost", "must be host:port"),
    "http_port": ("0", "greater than or equal to 1"),
    "cluster": ("a/b", "must be 1 to 64 letters"),
    "contacts": ("[nowhere]", "must be host:port"),
    "bind_host": ("'a b'", "must be a host name or an IP address"),
    "advertise_host": ("'a b'", "must be a host name or an IP address"),
    "cluster_key": ("short", "must be a text of 32 to 4096 bytes"),
    "same_host_handoff": ("maybe", "valid boolean"),
    "transfer_rate_limit": ("0", "greater than or equal to 1"),
    "transfer_streams": ("17", "must be auto, or a number from 1 to 16"),
    "leave_s": ("0", "greater than 0"),
    "allowed_peer_networks": ("[10.0.0.1/8]", "must be a network"),
    "insecure_network": ("maybe", "valid boolean"),
    "move_deadline_s": ("0", "greater than 0"),
    "lease_s": ("-1", "greater than 0"),
    "peer_fetch": ("maybe", "valid boolean"),
    "zone": ("5", "valid string"),
    "gossip": ("{probe_s: 1}", "unknown key"),
}
"""For each key a wrong value, and what is said of it."""
NOT_YET = {
    "tls_cert": "/cert",
    "tls_key": "/key",
    "tls_ca": "/ca",
}


def test_all_wrong_values_are_told_at_once_by_key_and_the_node_does_not_start(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("P2PKV_CONTROLLER_HTTP_URL")
    path = home / "a.yaml"
    lines = ["lmcache_instance_id: 'a b'", "chunksize: 16", "tls_sert: /cert"]
    path.write_text("\n".join(lines + [f"{key}: {value}" for key, (value, _) in WRONG.items()]))
    code, printed, stderr = command("node", "--config", str(path))
    assert (code, printed) == (2, "")
    head, *lines = stderr.splitlines()
    assert head == f"Error: {path} has {len(WRONG) + 3} problems:"
    told = dict(line.strip().split(": ", 1) for line in lines)
    for key, (_, sentence) in WRONG.items():
        assert [text for name, text in told.items() if name.partition("[")[0] == key and sentence in text], key
    assert "must be 1 to 64 letters" in told["lmcache_instance_id"]
    assert told["chunksize"] == "unknown key; did you mean chunk_size?"
    assert told["tls_sert"] == "unknown key; did you mean tls_cert?"


def test_what_is_required_is_asked_for(home: Path) -> None:
    path = home / "a.yaml"
    path.write_text("chunk_size: 16\n")
    code, _, told = command("node", "--config", str(path))
    assert code == 2
    for key in ("lmcache_instance_id", "lmcache_worker_port"):
        assert f"{key}: is required" in told


def test_what_this_version_does_not_have_yet_is_refused_by_key(write: Write) -> None:
    path = write("a", *(f"{key}: {value}" for key, value in NOT_YET.items()))
    code, printed, told = command("node", "--config", str(path))
    assert (code, printed) == (2, "")
    for key in NOT_YET:
        assert f"{key}: this version doesn't have it yet; leave it out" in told


@pytest.mark.parametrize(("lines", "limit_gib"), [((), 0.25), (("max_prefaulted_size: 0",), 0), (("local_cpu: false",), 0)])
def test_memory_is_faulted_in_ahead_unless_it_is_switched_off(write: Write, lines: tuple[str, ...], limit_gib: float) -> None:
    assert NodeConfig.from_yaml(write("a", *lines), {}).prefaulted_limit_nbytes == limit_gib * 2**30


async def test_what_these_keys_have_as_their_default_may_be_written(write: Write) -> None:
    lines = (
        "local_disk: off",
        "max_local_disk_size: 0",
        "transfer_streams: auto",
        "transfer_rate_limit: null",
    )
    async with opened(write("a", *lines, "cache_policy: LRU")) as (a,):
        assert await ask(a, "GET", "/readyz") == {}


# --- what holds without a word --------------------------------------------------------------------------------------------


async def test_the_defaults_are_those_of_the_table(write: Write, runtime_dir: Path) -> None:
    path = write("a")
    config = NodeConfig.from_yaml(path, {})
    assert (config.controller_http_url, config.controller_url, config.contacts) == (Address("localhost", 9000), None, ())
    assert (config.leave_s, config.move_deadline_s, config.lease_s, config.cache_epoch) == (2, 600, 30, 0)
    async with joined(path, write("b")) as (a, b):
        await store(a, PROMPT)
        assert await chunk_sizes(a) == [44, 256]
        member = (await members(b))["a"]
        assert (member["zone"], member["locations"][CPU]["limit"]) == ("", 5 * 2**30)
        addresses = a.addresses
        assert (addresses.ws.host, addresses.transfer.host) == ("127.0.0.1", "127.0.0.1")
        assert addresses.http.startswith("http://127.0.0.1:")
        assert addresses.shared == f"http://{os.environ['P2PKV_CONTROLLER_HTTP_URL']}"
        assert (runtime_dir / "p2pkv" / "a" / "card.json").exists()
        moved = await move(b, PROMPT)
        assert (await ask(b, "GET", f"/events/{moved['event_id']}"))["lane"] == "handoff"


async def test_peer_fetch_brings_what_an_engine_misses(write: Write) -> None:
    async with joined(write("a"), write("b"), write("c", "peer_fetch: true")) as (a, b, c):
        await store(a, PROMPT)
        for node in (b, c):
            await until(partial(finds, node, PROMPT, "a"))
        assert [await retrieved(node, PROMPT) for node in (b, c)] == [0, 300]


async def finds(node: Node, tokens: list[int], holder: str) -> bool:
    return holder in (await ask(node, "POST", "/lookup", tokens=tokens))["layout_info"]


async def retrieved(node: Node, tokens: list[int]) -> int:
    def attach_and_retrieve() -> int:
        with EngineCache.attach(node.config, model="tiny", layout=LAYOUT) as cache:
            return cache.retrieve(tokens)[0]

    return await trio.to_thread.run_sync(attach_and_retrieve)


# --- what is held ---------------------------------------------------------------------------------------------------------


async def test_a_chunk_has_so_many_tokens(write: Write) -> None:
    async with opened(write("a", "chunk_size: 128")) as (a,):
        await store(a, PROMPT)
        assert await chunk_sizes(a) == [44, 128, 128]


async def test_an_instance_without_local_cpu_has_no_location(write: Write) -> None:
    async with opened(write("a", "local_cpu: false")) as (a,):
        assert (await members(a))["a"]["locations"] == {}
        assert (await move(a, PROMPT, "a", "a"))["error"] == "unknown_location"


async def test_the_limit_holds_and_what_was_used_last_stays(write: Write) -> None:
    """Room for three chunks of 32 KiB."""
    async with opened(write("a", f"max_local_cpu_size: {3 * 2**15 / 2**30}")) as (a,):
        prompts = [[number] * 256 for number in range(4)]
        for prompt in (*prompts[:3], prompts[0], prompts[3]):  # what is stored again is used
            assert await store(a, prompt) == 256
        location = (await members(a))["a"]["locations"][CPU]
        assert location == {"chunks": 3, "bytes": 3 * 2**15, "limit": 3 * 2**15}
        held = [(await ask(a, "POST", "/lookup", tokens=prompt))["layout_info"] for prompt in prompts]
        assert held == [{"a": [CPU, 256]}, {}, {"a": [CPU, 256]}, {"a": [CPU, 256]}]


async def test_chunks_of_different_epochs_never_mix(write: Write) -> None:
    async with joined(write("a"), write("b", "cache_epoch: 1")) as nodes:
        for node in nodes:
            await store(node, PROMPT)
        refused = await move(nodes[0], PROMPT)
        assert refused["error"] == "namespace_mismatch"


async def test_of_several_workers_it_is_said_that_the_limit_is_the_instances(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    async with opened(write("a")) as (a,):
        attach = partial(EngineCache.attach, a.config, model="tiny", layout=LAYOUT, world_size=2, worker_id=0)
        (await trio.to_thread.run_sync(attach)).close()
    assert "max_local_cpu_size" in "".join(capsys.readouterr())


# --- where it is reached, and whom it meets -------------------------------------------------------------------------------


async def test_ports_are_as_they_are_given(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    http, ws, transfer, shared, rendezvous = (free_port() for _ in range(5))
    monkeypatch.delenv("P2PKV_CONTROLLER_HTTP_URL")
    path = write(
        "a",
        f"http_port: {http}",
        f"distributed_url: localhost:{transfer}",
        f"controller_http_url: http://localhost:{shared}",
        f"controller_url: localhost:{rendezvous}",
    )
    path.write_text(path.read_text().replace("lmcache_worker_port: 0", f"lmcache_worker_ports: [{ws}]"))
    async with opened(path) as (a,):
        assert a.addresses.http == f"http://127.0.0.1:{http}"
        assert a.addresses.ws == Address("127.0.0.1", ws)
        assert a.addresses.transfer == Address("localhost", transfer)
        assert a.addresses.shared == f"http://localhost:{shared}"
        for port in (http, ws, transfer, shared, rendezvous):
            await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
        for port in (http, shared):
            async with client_of(f"http://localhost:{port}") as http_client:
                assert (await http_client.get("/livez")).json() == {}
        for port in (ws, rendezvous):
            async with dial_websocket([Address("127.0.0.1", port)], "/control") as websocket:
                await websocket.send_message('{"id": 1, "type": "livez"}')
                assert json.loads(await websocket.get_message()) == {"id": 1, "type": "livez"}


async def test_doors_are_where_bind_host_says_and_told_as_advertise_host_says(write: Write) -> None:
    async with opened(write("a", "bind_host: 127.0.0.2"), write("b", "advertise_host: localhost")) as (a, _):
        assert (a.addresses.ws.host, a.addresses.transfer.host) == ("127.0.0.2", "127.0.0.2")
        assert a.addresses.http.startswith("http://127.0.0.2:")
        with pytest.raises(OSError, match=r"127\.0\.0\.1"):
            await trio.open_tcp_stream("127.0.0.1", a.addresses.ws.port)
        await until(partial(knows, a, "b"))
        member = (await members(a))["b"]
        assert member["ws"].startswith("ws://localhost:")
        assert member["http"].startswith("http://localhost:")
        assert member["transfer"].startswith("localhost:")


async def test_nodes_of_other_clusters_never_join_whatever_leads_them_there(write: Write) -> None:
    async with joined(write("a", "cluster: one"), write("c", "cluster: one")) as (a, _):
        other = write("b", "cluster: two", f"contacts: ['{a.addresses.ws}']")
        async with opened(other) as (b,), joined(write("d", "cluster: one")):
            await until(partial(knows, a, "d"))
            assert set(await members(a)) == {"a", "c", "d"}
            assert set(await members(b)) == {"b"}


async def test_without_a_rendezvous_a_node_is_found_by_contacts_only(write: Write) -> None:
    async with joined(write("a"), write("b")) as (a, b), opened(write("c", "enable_controller: false")) as (c,):
        assert c.addresses.shared is None
        async with opened(write("d", "enable_controller: false", f"contacts: ['localhost:{a.addresses.ws.port}']")) as (d,):
            await until(partial(knows, d, "a", "b"))
            await until(partial(knows, b, "d"))
            assert set(await members(c)) == {"c"}


async def test_a_key_from_the_yaml_and_one_from_a_file_are_the_same_and_others_stay_out(write: Write, home: Path) -> None:
    file = home / "key"
    file.touch(0o600)
    file.write_text(f"{KEY}\n")
    members_of_it = (write("a", f"cluster_key: {KEY}"), write("b", f"cluster_key_file: {file}"))
    others = (write("c", f"cluster_key: another {KEY}"), write("d"))
    async with joined(*members_of_it) as (a, _), opened(*others) as strangers:
        async with joined(write("e", f"cluster_key: {KEY}")):
            await until(partial(knows, a, "e"))
        for stranger in strangers:
            assert list(await members(stranger)) == [stranger.config.lmcache_instance_id]


# --- moves ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("without", ["a", "b"])
async def test_without_same_host_handoff_bytes_go_over_tcp(write: Write, without: str) -> None:
    paths = [write(name, "same_host_handoff: false" if name == without else "") for name in "ab"]
    async with joined(*paths) as (a, _):
        await store(a, PROMPT)
        moved = await move(a, PROMPT)
        assert (await ask(a, "GET", f"/events/{moved['event_id']}"))["lane"] == "tcp"


def lanes_to(node: Node) -> list[str]:
    """Connections that the node's transfer address has accepted, as the kernel tells of them."""
    local = f":{node.addresses.transfer.port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [address for _, address, _, state, *_ in rows if address.endswith(local) and state == "01"]


async def test_a_fetch_has_as_many_streams_as_are_asked_for(write: Write) -> None:
    async with joined(write("a", *SLOW), write("b", "transfer_streams: 3")) as (a, _):
        prompt = list(range(4 * MIB_TOKENS))
        await store(a, prompt)
        await move(a, prompt, wait_s=0)
        with trio.fail_after(5):
            while len(lanes_to(a)) < 3:  # noqa: ASYNC110 - the kernel tells nobody
                await trio.sleep(0.01)
        await trio.sleep(0.1)
        assert len(lanes_to(a)) == 3


async def test_transfers_keep_to_the_rate(write: Write) -> None:
    async with joined(write("a", SLOW[0], "transfer_rate_limit: 2"), write("b")) as (a, _):
        prompt = list(range(MIB_TOKENS))
        await store(a, prompt)
        moved = await move(a, prompt)
        event = await ask(a, "GET", f"/events/{moved['event_id']}")
        assert (event["state"], event["bytes"]) == ("done", 2**20)
        assert 0.4 < event["seconds"] < 2


async def test_a_move_ends_by_its_deadline_and_loses_nothing(write: Write) -> None:
    async with joined(write("a", *SLOW, "move_deadline_s: 0.5"), write("b")) as (a, b):
        prompt = list(range(4 * MIB_TOKENS))
        await store(a, prompt)
        asked_at = trio.current_time()
        ended = await move(a, prompt)
        assert (ended["state"], ended["error"]) == ("failed", "deadline_exceeded")
        assert 0.4 < trio.current_time() - asked_at < 2
        assert (await ask(a, "POST", "/lookup", tokens=prompt))["layout_info"] == {"a": [CPU, len(prompt)]}
        assert (await members(b))["b"]["locations"][CPU]["chunks"] == 0


async def test_a_node_that_leaves_takes_no_longer_than_it_may(write: Write) -> None:
    async with opened(write("b")) as (b,):
        async with joined(write("a", *SLOW, "leave_s: 0.5")) as (a,):
            await until(partial(knows, a, "b"))
            prompt = list(range(4 * MIB_TOKENS))
            await store(a, prompt)
            moving = await move(a, prompt, wait_s=0)
            left_at = trio.current_time()
        assert trio.current_time() - left_at < 1.5
        event = await ask(b, "GET", f"/events/{moving['event_id']}")
        assert (event["state"], event["error"]["error"]) == ("failed", "leaving")


async def test_memory_that_an_engine_does_not_give_back_is_freed_at_the_leases_end(write: Write, runtime_dir: Path) -> None:
    async with opened(write("a", "lease_s: 1")) as (a,):

        async def is_lent() -> bool:
            return bool((await members(a))["a"]["locations"][CPU]["bytes"] > 0)

        async def is_freed() -> bool:
            return not await is_lent()

        engine = await trio.open_unix_socket(str(place_of(runtime_dir, "p2pkv", "a").engine_socket))
        async with engine:
            for request in (ATTACH, StoreRequest(Identity(), pack_tokens(PROMPT), first_token=0)):
                await send_frame(engine.socket, request_codec().encode(request))
                reply = await receive_frame(engine.socket)
                assert reply is not None
                with reply:
                    lent_at = trio.current_time()
            assert await is_lent()
            await until(is_freed)
            assert trio.current_time() - lent_at > 0.9


# --- the environment ------------------------------------------------------------------------------------------------------


def test_variables_override_the_file_that_a_variable_names(write: Write, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a", "chunk_size: 16", "zone: file", "cluster: file")
    path.write_text(path.read_text().replace("lmcache_worker_port: 0", "lmcache_worker_ports: [0]"))
    monkeypatch.setenv("P2PKV_CONFIG_FILE", str(path))
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "32")
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "1")
    monkeypatch.setenv("P2PKV_MAX_LOCAL_CPU_SIZE", "2")
    monkeypatch.setenv("P2PKV_ZONE", "variable")
    monkeypatch.setenv("P2PKV_CLUSTER", "variable")
    ready = read_ready(run("node"))
    (member,) = httpx2.get(f"{ready[2]}/members", trust_env=False, verify=False).json()["members"]
    assert (member["instance"], member["zone"], member["locations"][CPU]["limit"]) == ("a", "variable", 2 * 2**30)
    assert (runtime_directory(os.environ) / "variable" / "a").exists()
    with EngineCache.attach(path, model="tiny", layout=LAYOUT) as cache:
        cache.store(PROMPT[:40], torch.zeros(LAYOUT.shape(40)))
    items = httpx2.get(f"{ready[2]}/inventory?instance=a", trust_env=False, verify=False).json()["items"]
    assert sorted(item["tokens"] for item in items) == [8, 32]


def test_a_wrong_variable_is_told_by_its_own_name(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "many")
    monkeypatch.setenv("P2PKV_ZONEE", "here")
    code, _, told = command("node", "--config", str(write("a")))
    assert code == 2
    assert "LMCACHE_CHUNK_SIZE: should be a valid integer" in told
    assert "P2PKV_ZONEE: unknown key; did you mean P2PKV_ZONE?" in told


async def test_every_key_of_lmcache_is_taken_and_what_has_no_meaning_warns(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("a", *(f"{key}: 1" for key in MEANINGLESS_KEYS), "max_local_disk_size: 10")
    path.write_text(path.read_text().replace("lmcache_worker_port: 0", f"lmcache_worker_ports: [{free_port()}, 1]"))
    async with opened(path):
        logged = "".join(capsys.readouterr())
    for key, reason in MEANINGLESS_KEYS.items():
        assert f"{key} has no meaning here: {reason}" in logged
    assert "lmcache_worker_ports: one websocket port serves all workers" in logged
