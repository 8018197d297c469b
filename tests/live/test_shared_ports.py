"""The ports that all nodes of a host serve together, while nodes come, stand still, and are killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import httpx2
import pytest
import trio
from trio_websocket import open_websocket_url

from p2pkv import NodeConfig, open_node
from p2pkv.core.records import MemberState
from p2pkv.net import shared_ports
from p2pkv.net.descriptors import open_unix_listener, send_frame
from p2pkv.rendezvous import claim, living_cards, place_of

pytestmark = pytest.mark.live

SEED = Path(__file__).parents[2] / "topology/pair"
THREADS = 4


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


# --- processes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One request of many: when it began, how long it took, and how it ended."""

    began_at: float
    seconds: float
    error: str | None


class Host:
    """A host's nodes as processes, from files like the seed's with free ports."""

    def __init__(self, folder: Path) -> None:
        self.http, self.rendezvous = free_port(), free_port()
        self._folder = folder
        self._nodes: list[subprocess.Popen[str]] = []

    def start(self, number: int) -> subprocess.Popen[str]:
        """Start instance `number` and wait until it is ready."""
        text = (SEED / "instance1.yaml").read_text().replace("lmcache_instance_1", f"lmcache_instance_{number}")
        text = re.sub(r"\b80\d\d\b", lambda _: str(free_port()), text).replace("localhost:9001", f"localhost:{self.rendezvous}")
        path = self._folder / f"instance{number}.yaml"
        path.write_text(f'{text}\ncontroller_http_url: "localhost:{self.http}"\n')
        environ = {**os.environ, "P2PKV_RUNTIME_DIR": str(self._folder)}
        command = [sys.executable, "-m", "p2pkv", "node", "--config", str(path)]
        node = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
        self._nodes.append(node)
        assert node.stdout is not None
        line = node.stdout.readline()
        assert line.endswith(f" shared=http://localhost:{self.http}\n"), line or node.communicate()[1]
        return node

    def ask(self) -> Request:
        """One request over a connection of its own to the HTTP port."""
        began_at, error = time.monotonic(), None
        connection = HTTPConnection("localhost", self.http, timeout=5)
        try:
            connection.request("GET", "/members")
            if (status := connection.getresponse().status) != 200:
                error = f"status {status}"
        except (OSError, HTTPException) as failed:
            error = repr(failed)
        connection.close()
        return Request(began_at, time.monotonic() - began_at, error)

    def ask_often(self, count: int, meanwhile: Callable[[], None]) -> list[Request]:
        """`count` requests, `THREADS` at a time, with something done in the middle."""
        with ThreadPoolExecutor(THREADS) as pool:
            pending = [pool.submit(self.ask) for _ in range(count)]
            pending[count // 3].result()
            meanwhile()
            return [each.result() for each in pending]

    def end(self) -> None:
        """Kill what still runs."""
        for node in self._nodes:
            node.kill()
            node.communicate()


@pytest.fixture
def host(runtime_dir: Path) -> Iterator[Host]:
    host = Host(runtime_dir)
    yield host
    host.end()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_the_node_that_bound_the_port_costs_only_what_it_had_in_hand(host: Host, number: signal.Signals) -> None:
    first = host.start(1)
    host.start(2)
    ended_at = []

    def end() -> None:
        ended_at.append(time.monotonic())
        first.send_signal(number)

    requests = host.ask_often(1000, end)
    failed = [request for request in requests if request.error is not None]
    assert len(failed) <= THREADS
    if number is signal.SIGKILL:
        assert all(request.began_at <= ended_at[0] for request in failed), failed


def test_a_node_that_stands_still_holds_up_no_request(host: Host) -> None:
    first, second = host.start(1), host.start(2)
    for stopped in (first, second):
        stopped.send_signal(signal.SIGSTOP)
        requests = host.ask_often(60, lambda: None)
        stopped.send_signal(signal.SIGCONT)
        assert [request for request in requests if request.error is not None or request.seconds > 2] == []


def test_a_node_that_comes_later_serves_the_port_too_even_alone(host: Host) -> None:
    first, second = host.start(1), host.start(2)
    first.send_signal(signal.SIGSTOP)
    began_at = time.monotonic()
    host.start(3)
    assert time.monotonic() - began_at < 5  # of which the stopped sibling costs half a second
    first.kill()
    second.kill()
    second.wait()
    assert [request.error for request in host.ask_often(30, lambda: None)] == [None] * 30


async def test_the_rendezvous_answers_as_long_as_a_node_lives(host: Host) -> None:
    first = await trio.to_thread.run_sync(host.start, 1)
    await trio.to_thread.run_sync(host.start, 2)
    first.kill()
    first.wait()
    with trio.fail_after(5):
        for _ in range(10):
            async with open_websocket_url(f"ws://localhost:{host.rendezvous}/peer") as websocket:
                assert await websocket.get_message()


# --- within one process ---------------------------------------------------------------------------------------------------


@pytest.fixture
def environ(runtime_dir: Path) -> dict[str, str]:
    return {"P2PKV_RUNTIME_DIR": str(runtime_dir)}


@pytest.fixture
def shared() -> str:
    return f"localhost:{free_port()}"


def config_of(instance: str, shared: str, **more: object) -> NodeConfig:
    keys = {"lmcache_instance_id": instance, "lmcache_worker_port": free_port(), "controller_http_url": shared, **more}
    return NodeConfig.model_validate(keys)


async def answers(url: str) -> bool:
    async with httpx2.AsyncClient(trust_env=False, timeout=2) as client:
        try:
            return bool((await client.get(f"{url}/livez")).json() == {})
        except (httpx2.TransportError, ValueError):
            return False


async def until(is_true: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(10):
        while not await is_true():  # noqa: ASYNC110 - a whole node has no event for each of its facts
            await trio.sleep(0.02)


async def test_nodes_that_start_together_all_serve_the_ports(runtime_dir: Path, environ: dict[str, str], shared: str) -> None:
    rendezvous = f"localhost:{free_port()}"

    async def start(instance: str) -> None:
        async with open_node(config_of(instance, shared, controller_url=rendezvous), environ):
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for instance in "abc":
            nursery.start_soon(start, instance)

        async def have_all_cards() -> bool:
            return len(living_cards(runtime_dir, "p2pkv")) == 3

        await until(have_all_cards)
        cards = living_cards(runtime_dir, "p2pkv")
        assert [(card.shared, card.rendezvous) for card in cards] == [(f"http://{shared}", rendezvous)] * 3
        nursery.cancel_scope.cancel()


async def test_a_stranger_on_the_port_is_a_warning_and_its_successor_a_node(
    runtime_dir: Path, environ: dict[str, str], shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_ports, "RETRY_S", 0.1)
    stranger = socket.create_server(("127.0.0.1", int(shared.rpartition(":")[2])))
    async with open_node(config_of("a", shared), environ) as node:
        assert node.addresses.shared is None
        assert await answers(node.addresses.http)
        stranger.close()
        await until(partial(answers, f"http://{shared}"))
        assert [card.shared for card in living_cards(runtime_dir, "p2pkv")] == [f"http://{shared}"]


@asynccontextmanager
async def sibling(runtime_dir: Path, passed: int, keys: list[str]) -> AsyncIterator[None]:
    """A sibling that passes this descriptor under these keys."""

    async def answer(stream: trio.SocketStream) -> None:
        await send_frame(stream.socket, json.dumps(keys).encode(), [passed])

    place = place_of(runtime_dir, "p2pkv", "sibling")
    with claim(place):
        async with trio.open_nursery() as nursery:
            listener = trio.SocketListener(open_unix_listener(place.shared_socket))
            await nursery.start(trio.serve_listeners, answer, [listener])
            yield
            nursery.cancel_scope.cancel()


@contextmanager
def wrong_descriptor(kind: str, port: int, runtime_dir: Path) -> Iterator[int]:
    """Anything but a socket that listens on `port`."""
    match kind:
        case "another port":
            passed = socket.create_server(("127.0.0.1", 0))
        case "not listening":
            passed = socket.socket()
        case "datagrams":
            passed = socket.socket(type=socket.SOCK_DGRAM)
            passed.bind(("127.0.0.1", port))
        case "unix":
            passed = socket.socket(socket.AF_UNIX)
            passed.bind(str(runtime_dir / "unix"))
            passed.listen()
        case _:
            with Path(os.devnull).open("rb") as file:
                yield file.fileno()
            return
    with passed:
        yield passed.fileno()


@pytest.mark.parametrize("kind", ["another port", "not listening", "datagrams", "unix", "no socket"])
async def test_only_the_very_port_is_taken_from_a_sibling(
    runtime_dir: Path, environ: dict[str, str], shared: str, kind: str
) -> None:
    with wrong_descriptor(kind, int(shared.rpartition(":")[2]), runtime_dir) as passed:
        async with sibling(runtime_dir, passed, ["controller_http_url"]), open_node(config_of("a", shared), environ) as node:
            assert node.addresses.shared == f"http://{shared}"
            await until(partial(answers, f"http://{shared}"))


@pytest.mark.parametrize("keys", [[], ["controller_http_url", "controller_url"], [1]])
async def test_a_sibling_that_names_other_than_it_passes_is_not_believed(
    runtime_dir: Path, environ: dict[str, str], shared: str, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_ports, "SETTLE_S", 0.0)
    with socket.create_server(("127.0.0.1", int(shared.rpartition(":")[2]))) as holder:
        async with sibling(runtime_dir, holder.fileno(), keys), open_node(config_of("a", shared), environ) as node:
            assert node.addresses.shared is None


async def test_a_sibling_that_does_not_answer_holds_up_a_start_for_a_moment_only(
    runtime_dir: Path, environ: dict[str, str], shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_ports, "RETRY_S", 0.1)
    place = place_of(runtime_dir, "p2pkv", "sibling")
    holder = socket.create_server(("127.0.0.1", int(shared.rpartition(":")[2])))
    with claim(place), open_unix_listener(place.shared_socket):
        began_at = trio.current_time()
        async with open_node(config_of("a", shared), environ) as node:
            assert trio.current_time() - began_at < 4
            assert node.addresses.shared is None
            holder.close()
            await until(partial(answers, f"http://{shared}"))


async def test_nodes_of_two_directories_meet_through_the_rendezvous(runtime_dir: Path, shared: str) -> None:
    here, there = ({"P2PKV_RUNTIME_DIR": str(runtime_dir / name)} for name in ("1", "2"))
    keys = {"controller_url": f"localhost:{free_port()}", "cluster_key": "k" * 32}
    first, second = config_of("a", shared, **keys), config_of("b", f"localhost:{free_port()}", **keys)
    async with open_node(first, here) as a, open_node(second, there):

        async def are_joined() -> bool:
            return "b" in {member.instance for member in a.driver.machine.members() if member.state is MemberState.ALIVE}

        await until(are_joined)
