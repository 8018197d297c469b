"""What a web page, a stranger on this host, and an address that a peer tells of come up against, at whole nodes."""

import stat
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from p2pkv import NodeConfig, open_node
from p2pkv.core.records import MemberState
from p2pkv.node import Node
from tests.live.command_line import free_port, write_config
from tests.live.doors import client_of, command

pytestmark = pytest.mark.live

KEY = "the key of a cluster that has one of its own"
UPGRADE = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
}
CHANGING = ("/move", "/clear")
ASKING = ("/lookup", "/full_lookup", "/health", "/check_finish", "/query_instance", "/query_worker_info")


@pytest.fixture
async def node(home: Path) -> AsyncIterator[Node]:
    async with open_node(NodeConfig.from_yaml(write_config(home, "a"))) as node:
        yield node


def doors(node: Node) -> dict[str, dict[str, str]]:
    """URLs of everything that listens for HTTP or websockets, with the headers that each needs."""
    assert node.addresses.shared is not None
    urls: dict[str, dict[str, str]] = {f"{base}/members": {} for base in (node.addresses.http, node.addresses.shared)}
    return urls | {f"http://{node.addresses.ws}/{path}": UPGRADE for path in ("control", "peer")}


async def status(url: str, headers: dict[str, str]) -> int:
    async with client_of(url) as http, http.stream("GET", url, headers=headers) as answer:
        return int(answer.status_code)


# --- web pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"host": "evil.example:9000"}, 421),
        ({"host": "localhost:1"}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost:1"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
async def test_a_foreign_page_is_refused_at_every_door(node: Node, headers: dict[str, str], expected: int) -> None:
    for url, needed in doors(node).items():
        assert await status(url, {**needed, **headers}) == expected, url


async def test_the_nodes_own_pages_are_not_foreign_at_any_door(node: Node) -> None:
    assert node.addresses.shared is not None
    for origin in (node.addresses.http, node.addresses.shared, f"http://{node.addresses.ws}"):
        for site in ("same-origin", "none"):
            for url, needed in doors(node).items():
                expected = 101 if needed else 200
                assert await status(url, {**needed, "origin": origin, "sec-fetch-site": site}) == expected, url


async def test_a_body_must_be_called_json_and_no_other_origin_is_ever_allowed(node: Node) -> None:
    async with client_of(node.addresses.http) as http:
        for path in (*CHANGING, *ASKING):
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
                answer = await http.post(path, content=b"{}", headers={"content-type": kind})
                assert (answer.status_code, answer.json()["error"]) == (422, "invalid_request")
                assert "application/json" in answer.json()["detail"]
            asked = await http.options(path, headers={"access-control-request-method": "POST"})
            for headers in (answer.headers, asked.headers):
                assert not [name for name in headers if name.startswith("access-control-")]
                assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
                assert headers["x-content-type-options"] == "nosniff"


async def test_get_reaches_nothing_that_changes_anything(node: Node) -> None:
    async with client_of(node.addresses.http) as http:
        paths = (await http.get("/openapi.json")).json()["paths"]
        posts = {path for path, methods in paths.items() if "post" in methods}
        assert posts >= {*CHANGING, *ASKING}
        for path in posts:
            assert (await http.get(path)).status_code == 405
        assert (await http.get("/events")).json() == {"events": []}


# --- this host ------------------------------------------------------------------------------------------------------------


async def test_all_that_a_node_leaves_on_this_host_is_its_users_alone(node: Node, runtime_dir: Path) -> None:
    place = runtime_dir / "p2pkv" / "a"
    assert sorted(path.name for path in place.iterdir() if path.is_socket()) == ["engine.sock", "lane.sock", "shared.sock"]
    for path in (place, place.parent, *place.glob("*.sock")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


async def test_without_a_configured_key_the_first_node_makes_one_for_its_user_alone(runtime_dir: Path, home: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(runtime_dir)}
    async with opened(write_config(home, "a"), write_config(home, "b"), environs=[environ] * 2) as (a, b):
        await until_alive(a, "a", "b")
        await until_alive(b, "a", "b")
        key = runtime_dir / "p2pkv" / "p2pkv" / "~key"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert len(key.read_bytes()) >= 32


# --- other hosts ----------------------------------------------------------------------------------------------------------


def test_beyond_loopback_a_node_does_not_start_without_a_key_and_the_word_that_nothing_is_encrypted(home: Path) -> None:
    for half, missing in (
        ((), ("cluster_key_file", "insecure_network: true")),
        (("insecure_network: true",), ("cluster_key_file",)),
        ((f"cluster_key: {KEY}",), ("insecure_network: true",)),
    ):
        code, printed, told = command("node", "--config", str(write_config(home, "a", *half, "bind_host: 0.0.0.0")))
        assert (code, printed) == (2, "")
        assert all(word in told for word in ("bind_host: 0.0.0.0 is beyond loopback", *missing)), told
        assert KEY not in told


@asynccontextmanager
async def opened(*configs: Path, environs: list[dict[str, str]]) -> AsyncIterator[list[Node]]:
    async with AsyncExitStack() as stack:
        pairs = zip(configs, environs, strict=True)
        yield [await stack.enter_async_context(open_node(NodeConfig.from_yaml(path), environ)) for path, environ in pairs]


def alive(node: Node) -> set[str]:
    return {member.instance for member in node.driver.machine.members() if member.state is MemberState.ALIVE}


async def until_alive(node: Node, *names: str) -> None:
    with trio.fail_after(5):
        while alive(node) != set(names):  # noqa: ASYNC110 - a whole node has no event for it
            await trio.sleep(0.02)


async def test_only_contacts_and_allowed_networks_are_dialed_whoever_tells_of_an_address(
    runtime_dir: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instances b, c and d, at addresses of their own, know a and hear of each other there."""
    monkeypatch.delenv("P2PKV_CONTROLLER_HTTP_URL")
    common = (f"cluster_key: {KEY}", f"controller_http_url: localhost:{free_port()}")
    configs = [write_config(home, "a", *common)]
    contact = f"contacts: ['127.0.0.1:{NodeConfig.from_yaml(configs[0]).lmcache_worker_port}']"
    for name, host, networks in (
        ("b", "127.0.0.2", "10.0.0.0/8"),
        ("c", "127.0.0.3", "127.0.0.1/32"),
        ("d", "127.0.0.4", "10.0.0.0/8, 127.0.0.0/8"),
    ):
        lines = (f"bind_host: {host}", f"allowed_peer_networks: [{networks}]")
        configs.append(write_config(home, name, *common, contact, *lines))
    environs = [{"P2PKV_RUNTIME_DIR": str(runtime_dir / name)} for name in "abcd"]
    async with opened(*configs, environs=environs) as (a, b, c, d):
        await until_alive(a, "a", "b", "c", "d")
        await until_alive(d, "a", "b", "c", "d")
        await until_alive(b, "a", "b", "d")
        await until_alive(c, "a", "c", "d")
        logged = ""
        refused = [f"{host} is neither a contact nor in allowed_peer_networks" for host in ("127.0.0.2", "127.0.0.3")]
        with trio.fail_after(5):
            while not all(each in logged for each in refused):
                await trio.sleep(0.05)
                logged += "".join(capsys.readouterr())
