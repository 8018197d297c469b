"""The nodes that chaos befalls: processes that are killed, stopped and started again."""

import re
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from p2pkv import NodeConfig
from p2pkv.core.ids import InstanceId
from p2pkv.core.keys import Fingerprint
from p2pkv.engines import EngineCache
from sims.bench.processes import Bench, NodeProcess, resident_nbytes
from sims.chaos.prompts import CHUNK_SIZE, LAYOUT

AT = "LocalCPUBackend"
MODEL = "chaos"
STORE_GIB = 1 / 64
"""16 MiB: a thousand chunks."""
MOVE_DEADLINE_S = 30
LEASE_S = 5
SETTLE_S = 90.0
"""Until all nodes see each other and no move is under way: a move ends by its deadline, and the coordinator waits 15 s more."""
POLL_S = 0.2
ANSWER_S = 30.0
BUG = re.compile(r"Traceback|internal_error|a bug of")

Settings = dict[str, int | float | str]


@dataclass(slots=True)
class Member:
    """An instance, and the process that it has now.

    Attributes:
        is_stopped: Whether it stands still.
        config: What its engines attach by, whatever ports its process has.
        uses: Held by whoever kills, stops or starts it.
    """

    name: InstanceId
    settings: Settings
    node: NodeProcess
    config: NodeConfig
    is_stopped: bool = False
    uses: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class Weight:
    """What a process takes: MiB of memory without chunks, descriptors beyond those of its chunks, threads."""

    memory_mib: float
    descriptors: int
    threads: int


class Members:
    """All of them, and their doors."""

    def __init__(self, bench: Bench, names: Iterable[InstanceId], over_tcp: Iterable[InstanceId]) -> None:
        self._bench = bench
        self._client = httpx2.Client(trust_env=False, timeout=ANSWER_S)
        self.all: dict[InstanceId, Member] = {}
        for name in names:
            settings: Settings = {
                "chunk_size": CHUNK_SIZE,
                "max_local_cpu_size": STORE_GIB,
                "move_deadline_s": MOVE_DEADLINE_S,
                "lease_s": LEASE_S,
                "same_host_handoff": str(name not in over_tcp).lower(),
            }
            node = bench.start(name, **settings)  # type: ignore[arg-type]
            self.all[name] = Member(name, settings, node, NodeConfig.from_yaml(node.config))
        with self.attach(next(iter(self.all))) as cache:
            self.namespace = cache.namespace

    def close(self) -> None:
        """Let go of the doors; the bench ends the nodes."""
        self._client.close()

    # --- blows ------------------------------------------------------------------------------------------------------------

    def kill(self, name: InstanceId) -> None:
        """End one without a word."""
        self._bench.kill(self.all[name].node)

    def start(self, name: InstanceId) -> None:
        """Start one that was killed, which has nothing."""
        member = self.all[name]
        member.node = self._bench.start(name, **member.settings)  # type: ignore[arg-type]

    def stop(self, name: InstanceId) -> None:
        """Have one stand still."""
        self.all[name].is_stopped = True
        self.all[name].node.process.send_signal(signal.SIGSTOP)

    def resume(self, name: InstanceId) -> None:
        """Have it go on."""
        self.all[name].node.process.send_signal(signal.SIGCONT)
        self.all[name].is_stopped = False

    # --- doors ------------------------------------------------------------------------------------------------------------

    def call(self, name: InstanceId, path: str, **body: object) -> tuple[int, dict[str, Any]]:
        """Status and fields of an answer.

        Raises:
            httpx2.TransportError: It was killed, or stands still.
        """
        answer = self._client.post(f"{self.all[name].node.http}{path}", json=body)
        return answer.status_code, answer.json()

    def get(self, name: InstanceId, path: str) -> dict[str, Any]:
        """Fields of an answer."""
        answer = self._client.get(f"{self.all[name].node.http}{path}")
        answer.raise_for_status()
        fields: dict[str, Any] = answer.json()
        return fields

    def attach(self, name: InstanceId) -> EngineCache:
        """An engine of an instance; nothing is started for it."""
        return EngineCache.attach(self.all[name].config, model=MODEL, layout=LAYOUT, autostart=False)

    def cancel(self, name: InstanceId, event_id: str) -> str:
        """What became of an event that was to be cancelled, as a state or an error."""
        answer = self._client.delete(f"{self.all[name].node.http}/events/{event_id}").json()
        return str(answer.get("state") or answer["error"])

    def event(self, event_id: str) -> dict[str, Any] | None:
        """An event as any node tells of it; None when nobody knows it any more."""
        answer = self._client.get(f"{next(iter(self.all.values())).node.http}/events/{event_id}")
        if answer.status_code == httpx2.codes.NOT_FOUND:
            return None
        answer.raise_for_status()
        fields: dict[str, Any] = answer.json()
        return fields

    def inventory(self, name: InstanceId) -> frozenset[Fingerprint]:
        """What an instance says itself that it holds."""
        found: list[Fingerprint] = []
        cursor = ""
        while True:
            page = self.get(name, f"/inventory?instance={name}{cursor}")
            found += [int(item["fingerprint"], 16) for item in page["items"]]
            if page["next"] is None:
                return frozenset(found)
            cursor = f"&cursor={page['next']}"

    def settle(self) -> None:
        """Wait until all see all others alive and no move is under way.

        Raises:
            TimeoutError: That took too long.
        """
        ends_at = time.monotonic() + SETTLE_S
        while waiting := [name for name in self.all if not self._is_settled(name)]:
            if time.monotonic() > ends_at:
                raise TimeoutError(f"not within {SETTLE_S:g} s that {', '.join(waiting)} see all others, and no move under way")
            time.sleep(POLL_S)

    def _is_settled(self, name: InstanceId) -> bool:
        try:
            states = {each["instance"]: each["state"] for each in self.get(name, "/members")["members"]}
            is_moving = any(event["finished_at"] is None for event in self.get(name, "/events")["events"])
        except httpx2.TransportError:
            return False
        return states == dict.fromkeys(self.all, "alive") and not is_moving

    # --- health -----------------------------------------------------------------------------------------------------------

    def ended(self) -> list[InstanceId]:
        """Those whose process has ended by itself."""
        return [member.name for member in self.all.values() if member.node.process.poll() is not None]

    def bugs(self) -> list[str]:
        """Lines of logs that tell of a bug."""
        logs = [(name, self._bench.folder / f"{name}.log") for name in self.all]
        return [f"{name}: {line}" for name, log in logs for line in log.read_text().splitlines() if BUG.search(line)]

    def weight(self, name: InstanceId) -> Weight:
        """What an instance's process takes now."""
        node = self.all[name].node
        place = Path(f"/proc/{node.process.pid}")
        chunk_count = len(self.inventory(name))
        threads = re.search(r"^Threads:\s+(\d+)", (place / "status").read_text(), re.MULTILINE)
        assert threads is not None, "the kernel says so of every process"
        descriptors = len(list((place / "fd").iterdir())) - chunk_count
        return Weight(resident_nbytes(node) / 2**20, descriptors, int(threads[1]))
