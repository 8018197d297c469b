"""Three nodes in network namespaces of their own, joined by veth through a bridge: a cluster of three hosts, with a key.

Nothing of it is on this host's own network. The namespaces go when the test ends, and the interfaces with them.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from p2pkv.cluster_key import Purpose, configured_key
from p2pkv.config import NodeConfig
from p2pkv.engines import EngineCache, KVLayout

pytestmark = pytest.mark.live

HUB = f"p2pkv-{os.getpid()}-hub"
NAMES = ("a", "b", "c")
CPU = "LocalCPUBackend"
CHUNK_TOKENS = 64
LAYOUT = KVLayout(layers=4, kv_heads=4, head_dim=64, dtype="float32", planes=2)  # 8 KiB a token, 512 KiB a chunk
PROMPT = list(range(16 * CHUNK_TOKENS))
RATE_MIB = 2
"""MiB/s of transfers: the whole prompt, 8 MiB, takes 4 s."""
CLONE_NEWNET = 0x40000000


def ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True, timeout=10)


def enter(namespace: str) -> None:
    """Put the calling thread into a network namespace, for good."""
    with Path(f"/run/netns/{namespace}").open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"can't enter {namespace}")


class Hosts:
    """The hub, and behind it a host each for a, b and c; what runs on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configs: dict[str, NodeConfig] = {}
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self._client = ThreadPoolExecutor(1, initializer=enter, initargs=(HUB,))

    def address(self, name: str) -> str:
        return f"10.231.7.{NAMES.index(name) + 1}"

    def namespace(self, name: str) -> str:
        return HUB.replace("hub", name)

    def build(self, stack: ExitStack) -> None:
        for namespace in (HUB, *map(self.namespace, NAMES)):
            try:
                ip("netns", "add", namespace)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces can't be made here: {error.stderr.strip()}")
            stack.callback(ip, "netns", "delete", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", HUB, "link", "add", "name", "bridge", "type", "bridge")
        ip("-n", HUB, "address", "add", "10.231.7.254/24", "dev", "bridge")
        ip("-n", HUB, "link", "set", "bridge", "up")
        for name in NAMES:
            end = ("peer", "name", "eth", "netns", self.namespace(name))
            ip("-n", HUB, "link", "add", "name", name, "type", "veth", *end)
            ip("-n", HUB, "link", "set", "dev", name, "master", "bridge", "up")
            ip("-n", self.namespace(name), "address", "add", f"{self.address(name)}/24", "dev", "eth")
            ip("-n", self.namespace(name), "link", "set", "eth", "up")
        stack.callback(self._client.shutdown)

    def start(self, name: str, stack: ExitStack, **keys: object) -> None:
        """Run a node that knows b's address and the key, and nothing else of the others."""
        key = self.folder / "key"
        if not key.exists():
            key.touch(0o600)
            key.write_text("the key of this test's three hosts\n")
        values: dict[str, object] = {
            "lmcache_instance_id": name,
            "lmcache_worker_port": 8002,
            "http_port": 8080,
            "chunk_size": CHUNK_TOKENS,
            "bind_host": self.address(name),
            "cluster_key_file": str(key),
            "insecure_network": True,
            "contacts": [] if name == "b" else [f"{self.address('b')}:8002"],
            "same_host_handoff": False,  # the three share a kernel, so it would work
            "transfer_rate_limit": RATE_MIB,
            **keys,
        }
        config = self.folder / f"{name}.yaml"
        config.write_text("".join(f"{field}: {value}\n" for field, value in values.items()))
        self.configs[name] = NodeConfig.from_yaml(config, {})
        self.runtime(name).mkdir(mode=0o700)
        log = stack.enter_context((self.folder / f"{name}.log").open("w"))
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("P2PKV_", "LMCACHE_"))}
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace(name), sys.executable, "-m", "p2pkv", "node", "--config", str(config)],
            env={**environ, "P2PKV_RUNTIME_DIR": str(self.runtime(name))},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self.processes[name] = stack.enter_context(process)
        stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"p2pkv ready instance={name} http=http://{self.address(name)}:8080")

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait(10)

    def runtime(self, name: str) -> Path:
        return self.folder / f"run-{name}"

    def call(self, name: str, method: str, path: str, body: dict[str, object] | None = None) -> dict[str, Any]:
        """Ask a node, from the hub."""
        key = configured_key(self.configs[name])
        assert key is not None
        headers = {"authorization": f"Bearer {key.token(Purpose.FULL_ACCESS)}"}
        url = f"http://{self.address(name)}:8080{path}"

        def ask() -> dict[str, Any]:
            answer: dict[str, Any] = httpx2.request(method, url, json=body, headers=headers, trust_env=False, timeout=15).json()
            return answer

        return self._client.submit(ask).result()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture
def hosts(runtime_dir: Path) -> Iterator[Hosts]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("making network namespaces takes root and iproute2")
    with ExitStack() as stack:
        hosts = Hosts(runtime_dir)
        hosts.build(stack)
        for name in ("b", "a", "c"):
            hosts.start(name, stack)
        yield hosts


def until(is_true: Callable[[], bool], within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(hosts: Hosts, name: str) -> list[str]:
    members = hosts.call(name, "GET", "/members")["members"]
    return [member["instance"] for member in members if member["state"] == "alive"]


def store(hosts: Hosts, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PKV_RUNTIME_DIR", str(hosts.runtime(name)))
    with EngineCache.attach(hosts.configs[name], model="tiny", layout=LAYOUT) as cache:
        shape = (LAYOUT.layers, LAYOUT.planes, len(PROMPT), LAYOUT.kv_heads, LAYOUT.head_dim)
        assert cache.store(PROMPT, torch.rand(shape)) == len(PROMPT)


def held(hosts: Hosts, name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("P2PKV_RUNTIME_DIR", str(hosts.runtime(name)))
    with EngineCache.attach(hosts.configs[name], model="tiny", layout=LAYOUT, autostart=False) as cache:
        return cache.lookup(PROMPT)


def move_to_c(hosts: Hosts, tokens: list[int]) -> str:
    body = {"old_position": ["a", CPU], "new_position": ["c", CPU], "tokens": tokens, "wait_s": 0}
    event_id = hosts.call("b", "POST", "/move", body)["event_id"]
    assert isinstance(event_id, str)
    return event_id


def test_a_move_between_hosts_goes_over_tcp_and_one_that_loses_its_target_loses_nothing(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        until(lambda name=name: alive(hosts, name) == list(NAMES))  # type: ignore[misc]
    store(hosts, "a", monkeypatch)

    event_id = move_to_c(hosts, PROMPT[: 2 * CHUNK_TOKENS])
    until(lambda: hosts.call("b", "GET", f"/events/{event_id}")["state"] not in ("pending", "running"))
    event = hosts.call("b", "GET", f"/events/{event_id}")
    assert (event["state"], event["lane"], event["num_tokens"]) == ("done", "tcp", 2 * CHUNK_TOKENS)
    assert event["bytes"] == 2 * 512 * 2**10
    assert held(hosts, "c", monkeypatch) == 2 * CHUNK_TOKENS

    event_id = move_to_c(hosts, PROMPT)
    until(lambda: hosts.call("b", "GET", f"/events/{event_id}")["state"] == "running")
    time.sleep(1)  # of the four seconds that the rest takes
    hosts.kill("c")
    until(lambda: hosts.call("b", "GET", f"/events/{event_id}")["state"] not in ("pending", "running"), within_s=30)
    event = hosts.call("b", "GET", f"/events/{event_id}")
    assert event["state"] == "failed"
    assert event["error"]["error"] == "instance_unreachable"
    assert "'c'" in event["error"]["detail"]
    until(lambda: alive(hosts, "b") == ["a", "b"])
    assert held(hosts, "a", monkeypatch) == len(PROMPT)


def test_a_host_with_another_key_joins_nobody_and_is_told_nothing(hosts: Hosts) -> None:
    until(lambda: alive(hosts, "a") == list(NAMES))
    hosts.kill("c")
    other = hosts.folder / "other"
    other.touch(0o600)
    other.write_text("another key, which is long enough too\n")
    shutil.rmtree(hosts.runtime("c"))
    with ExitStack() as stack:
        hosts.start("c", stack, cluster_key_file=str(other))
        until(lambda: "it closed the link: refused" in hosts.log("c"))
        assert alive(hosts, "c") == ["c"]
        assert "its proof is wrong" in hosts.log("b")
    assert not any(
        word in hosts.log("c") for word in ("instance='a'", "instance='b'", str(hosts.configs["a"].cluster_key_file))
    )
