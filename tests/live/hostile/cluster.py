"""The attacked node and a bystander, as processes; what is read of them, and who watches that nobody else is harmed."""

import json
import os
import re
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import pytest
import torch
import trio

from p2pkv import NodeConfig
from p2pkv.cluster_key import Purpose, user_key
from p2pkv.core.ids import Address
from p2pkv.engines import EngineCache
from p2pkv.net.websockets import dial_websocket
from p2pkv.rendezvous import place_of, runtime_directory, user_folder
from tests.live.command_line import AT, COMMAND, LAYOUT, PROMPT, free_port, read_ready, write_config
from tests.live.hostile.attack import Target

ATTACKED, BYSTANDER = "a", "b"
LIMIT_GIB = 0.25
ANSWER_S = 5.0
"""A node that is attacked answers within so long; an idle one takes 2 ms. Others give up a node that is silent for 5 s."""
WATCH_EVERY_S = 0.5
"""Between two looks."""


@dataclass(frozen=True)
class Readings:
    """What the attacked node has of the system.

    Attributes:
        rss_anon_nbytes: Memory of its own, without files and chunks.
        descriptors: Open, but for those of chunks that it holds.
        threads: Of its process.
    """

    rss_anon_nbytes: int
    descriptors: int
    threads: int


class Cluster:
    """Two nodes that know each other; the attacked one holds `PROMPT`."""

    def __init__(self, folder: Path, nodes: dict[str, subprocess.Popen[str]], configs: dict[str, Path]) -> None:
        self._folder = folder
        self._nodes = nodes
        self._configs = configs
        self._log_starts = dict.fromkeys(nodes, 0)
        self._kv = torch.rand(LAYOUT.shape(len(PROMPT)))
        ready = read_ready(nodes[ATTACKED]), read_ready(nodes[BYSTANDER])
        self.urls = {each[1]: each[2] for each in ready}
        place = place_of(runtime_directory(os.environ), "p2pkv", ATTACKED)
        key = user_key(user_folder(os.environ, "p2pkv"), "p2pkv").subkey(Purpose.PEER_PROOF)
        self.target = Target(
            instance=ATTACKED,
            bystander=BYSTANDER,
            cluster="p2pkv",
            peer_key=key,
            ws=_address(ready[0][3]),
            http=(_address(ready[0][2]), _address(ready[0][5])),
            transfer=_address(ready[0][4]),
            engine_socket=place.engine_socket,
            lane_socket=place.lane_socket,
        )

    def attach(self, instance: str) -> EngineCache:
        """An engine's cache at one of the nodes."""
        return EngineCache.attach(NodeConfig.from_yaml(self._configs[instance]), model="tiny", layout=LAYOUT)

    def store(self) -> None:
        """Have the attacked node hold `PROMPT`."""
        with self.attach(ATTACKED) as cache:
            assert cache.store(PROMPT, self._kv) == len(PROMPT)

    def check_held(self, instance: str) -> None:
        """`PROMPT` is there, bit by bit."""
        with self.attach(instance) as cache:
            held, kv = cache.retrieve(PROMPT)
            assert held == len(PROMPT)
            assert kv is not None
            assert torch.equal(kv, self._kv)

    def begin_logs(self) -> None:
        """Forget what has been logged so far."""
        self._log_starts = {instance: len(self.log_of(instance)) + start for instance, start in self._log_starts.items()}

    def log_of(self, instance: str) -> str:
        """What a node has logged since then."""
        return (self._folder / f"{instance}.log").read_text(errors="replace")[self._log_starts[instance] :]

    async def readings(self) -> Readings:
        """Of the attacked node, now."""
        process = Path("/proc") / str(self._nodes[ATTACKED].pid)
        status = (process / "status").read_text()
        figures = {name: int(figure) for name, figure in re.findall(r"(\w+):\s+(\d+)", status)}
        async with self.client(ATTACKED) as http:
            members = (await http.get("/members")).json()["members"]
        (held,) = (member["locations"][AT]["chunks"] for member in members if member["instance"] == ATTACKED)
        descriptors = len(list((process / "fd").iterdir())) - held
        return Readings(figures["RssAnon"] * 1024, descriptors, figures["Threads"])

    def client(self, instance: str) -> httpx2.AsyncClient:
        """An HTTP client of a node, which waits for `ANSWER_S` at most."""
        return httpx2.AsyncClient(base_url=self.urls[instance], trust_env=False, timeout=ANSWER_S)

    async def move(self, source: str, target: str) -> None:
        """Move `PROMPT` for real, asked of the source."""
        async with self.client(source) as http:
            body = {"old_position": [source, AT], "new_position": [target, AT], "tokens": PROMPT}
            move = (await http.post("/move", json=body, timeout=10)).json()
        assert (move.get("num_tokens"), move.get("state")) == (len(PROMPT), "done"), move

    def check_running(self) -> None:
        """Both nodes run, and have logged no bug."""
        for instance, node in self._nodes.items():
            log = self.log_of(instance)
            assert node.poll() is None, log[-5000:]
            bugs = [line for line in log.splitlines() if "traceback" in line.lower()]
            assert not bugs, bugs[:3]

    async def wait_linked(self, within_s: float) -> None:
        """Wait until each node has the other alive."""
        with trio.fail_after(within_s):
            while not (await self.sees(ATTACKED, BYSTANDER) and await self.sees(BYSTANDER, ATTACKED)):  # noqa: ASYNC110 - no event
                await trio.sleep(0.05)

    async def sees(self, instance: str, other: str) -> bool:
        async with self.client(instance) as http:
            members = (await http.get("/members")).json()["members"]
        return any(member["instance"] == other and member["state"] == "alive" for member in members)


class Watch:
    """Who must not notice: an HTTP client and a `/control` client of the attacked node, its engine, and the other node."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.looks = 0
        self.longest_livez_s = 0.0
        self._looked = trio.Event()

    async def wait_look(self) -> None:
        """Wait until it has looked once more."""
        await self._looked.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look again and again; fails when something isn't as it should be."""
        with await trio.to_thread.run_sync(self._cluster.attach, ATTACKED) as cache:
            async with dial_websocket([self._cluster.target.ws], "/control") as control:
                while True:
                    await self._livez()
                    await control.send_message(json.dumps({"id": self.looks, "type": "livez"}))
                    with trio.fail_after(ANSWER_S):
                        assert json.loads(await control.get_message()) == {"id": self.looks, "type": "livez"}
                    with trio.fail_after(ANSWER_S):
                        assert await trio.to_thread.run_sync(cache.lookup, PROMPT) == len(PROMPT)
                    assert await self._cluster.sees(BYSTANDER, ATTACKED)
                    assert await self._cluster.sees(ATTACKED, BYSTANDER)
                    self.looks += 1
                    self._looked.set()
                    self._looked = trio.Event()
                    if self.looks == 1:
                        task_status.started()
                    await trio.sleep(WATCH_EVERY_S)

    async def _livez(self) -> None:
        began_at = time.monotonic()
        async with self._cluster.client(ATTACKED) as http:
            assert (await http.get("/livez")).status_code == 200
        self.longest_livez_s = max(self.longest_livez_s, time.monotonic() - began_at)


@asynccontextmanager
async def watched(cluster: Cluster) -> AsyncIterator[Watch]:
    """Watch before something else happens, while it does, and afterwards."""
    watch = Watch(cluster)
    async with trio.open_nursery() as nursery:
        await nursery.start(watch.run)
        yield watch
        await watch.wait_look()
        nursery.cancel_scope.cancel()


@contextmanager
def open_cluster() -> Iterator[Cluster]:
    """Start the two nodes; whatever still runs at the end is killed."""
    with TemporaryDirectory(prefix="p2pkv-") as name, pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        folder = Path(name)
        patch.setenv("P2PKV_RUNTIME_DIR", name)
        patch.setenv("XDG_RUNTIME_DIR", name)
        shared = f"controller_http_url: localhost:{free_port()}"
        configs = {
            instance: write_config(folder, instance, shared, f"max_local_cpu_size: {LIMIT_GIB}", "move_deadline_s: 86400")
            for instance in (ATTACKED, BYSTANDER)
        }
        nodes = {instance: stack.enter_context(_started(config)) for instance, config in configs.items()}
        cluster = Cluster(folder, nodes, configs)
        cluster.store()
        yield cluster


@contextmanager
def _started(config: Path) -> Iterator[subprocess.Popen[str]]:
    """A node that logs to a file: a pipe that nobody reads would stop it."""
    with config.with_suffix(".log").open("w") as log:
        node = subprocess.Popen([*COMMAND, "node", "--config", str(config)], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield node
        finally:
            node.kill()
            node.communicate()


def _address(url: str) -> Address:
    host, _, port = url.rpartition("/")[2].rpartition(":")
    return Address(host, int(port))
