"""Nodes as processes that a module's tests share, and what can be asked at each of their doors."""

import json
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import httpx2
import pytest
import torch
import trio
from trio_websocket import WebSocketConnection
from typer.testing import CliRunner

from p2pkv.cli import app
from p2pkv.config import NodeConfig, parse_address
from p2pkv.engines import EngineCache, Identity, KVLayout
from p2pkv.net.websockets import dial_websocket
from tests.live.command_line import COMMAND, LAYOUT, free_port, read_ready, write_config

CPU, DISK = "LocalCPUBackend", "LocalDiskBackend"
SLOW = ("same_host_handoff: false", "transfer_rate_limit: 1")
"""Of a node that sends a mebibyte a second, also to nodes of its host."""


def client_of(url: str, **options: Any) -> httpx2.AsyncClient:
    """A client of one node; no door here is TLS's, and to load the certificates that nobody needs takes longer than a call."""
    return httpx2.AsyncClient(base_url=url, trust_env=False, verify=False, timeout=15, **options)


class NodeProcess:
    """A running `p2pkv node`, and clients of its doors."""

    def __init__(self, config: Path, process: "Popen[str]") -> None:
        self.config = config
        self.name, self.http_url, self.ws_url, self.transfer, self.shared_url = read_ready(process).groups()
        self.headers: dict[str, str] = {}
        self._process = process
        self._http = httpx2.Client(base_url=self.http_url, trust_env=False, verify=False, timeout=15)

    def request(self, method: str, path: str, body: object = None) -> httpx2.Response:
        return self._http.request(method, path, json=body, headers=self.headers)

    def get(self, path: str, **query: str) -> httpx2.Response:
        return self._http.get(path, params=query or None)  # none keep what `path` has

    def post(self, path: str, **fields: object) -> httpx2.Response:
        return self._http.post(path, json=fields)

    def delete(self, path: str) -> httpx2.Response:
        return self._http.delete(path)

    def control(self, *messages: dict[str, object]) -> list[dict[str, Any]]:
        """The answers to messages on one `/control` socket, as they come."""
        return trio.run(self._ask, messages)

    @asynccontextmanager
    async def open_control(self) -> AsyncIterator[WebSocketConnection]:
        """A `/control` socket."""
        headers = [(name.encode(), value.encode()) for name, value in self.headers.items()]
        async with dial_websocket([parse_address(self.ws_url.removeprefix("ws://"))], "/control", headers) as websocket:
            yield websocket

    async def _ask(self, messages: tuple[dict[str, object], ...]) -> list[dict[str, Any]]:
        with trio.fail_after(15):
            async with self.open_control() as websocket:
                for message in messages:
                    await websocket.send_message(json.dumps(message))
                return [json.loads(await websocket.get_message()) for _ in messages]

    def command(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """The exit code and the JSON of a command that asks this node."""
        code, printed, _ = command(*arguments, "--json", "--via", self.http_url)
        return code, json.loads(printed)

    def store(self, tokens: list[int], *, model: str = "tiny", salt: str = "", layout: KVLayout = LAYOUT) -> None:
        """Have an engine of this instance hold a prompt."""
        with EngineCache.attach(NodeConfig.from_yaml(self.config), model=model, layout=layout) as cache:
            cache.store(tokens, torch.rand(layout.shape(len(tokens))), identity=Identity(cache_salt=salt))

    def kill(self) -> None:
        """End the process without a word."""
        self._process.kill()
        self._process.wait()

    def suspend(self) -> None:
        """Have the process stand still."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process, which is waited for, and the client."""
        self._http.close()
        self._process.terminate()
        self._process.communicate(timeout=10)


def command(*arguments: str) -> tuple[int, str, str]:
    """A command in this process, which spares its start: exit code, stdout and stderr."""
    ended = CliRunner().invoke(app, arguments)
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended.exit_code, ended.stdout, ended.stderr


def until(is_true: Callable[[], bool], within_s: float = 5) -> None:
    deadline = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def states(node: NodeProcess) -> dict[str, str]:
    return {member["instance"]: member["state"] for member in node.get("/members").json()["members"]}


class Cluster:
    """Nodes that meet nobody else's, in the environment that leads commands and engines to them."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.folder = folder
        self._stack = stack

    def adopt(self, end: Callable[[], object]) -> None:
        """Have something ended with the cluster."""
        self._stack.callback(end)

    def start(self, **keys: tuple[str, ...]) -> list[NodeProcess]:
        """Start a node for each name, with these lines in its yaml, one after the other."""
        nodes = []
        for name, lines in keys.items():
            config = write_config(self.folder, name, *lines)
            log = self._stack.enter_context((self.folder / f"{name}.log").open("w"))
            process = Popen([*COMMAND, "node", "--config", str(config)], stdout=PIPE, stderr=log, text=True)
            self._stack.callback(process.kill)
            nodes.append(NodeProcess(config, process))
            self._stack.callback(nodes[-1].close)
        return nodes


@contextmanager
def open_cluster() -> Iterator[Cluster]:
    """An empty cluster; its nodes end, and its files go, on exit."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="p2pkv-")))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("P2PKV_RUNTIME_DIR", str(folder))
        patch.setenv("P2PKV_CONTROLLER_HTTP_URL", f"localhost:{free_port()}")
        yield Cluster(stack, folder)
