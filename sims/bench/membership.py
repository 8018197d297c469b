"""`membership`: 25 real nodes, some killed and some stopped: how long until all others know; serf's agents beside them.

Each line that a node or an agent writes is stamped as it arrives here, so both are measured alike; and how much of a core each
takes when nothing happens.
"""

import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sims.bench.processes import free_port
from sims.bench.report import Row

NODES = 25
KILLS = 20
STOPS = 5
IDLE_S = 20.0
START_S = 120.0
KNOWN_S = 60.0
"""Nobody takes longer to notice an end, or something is wrong."""


@dataclass
class Member:
    """A process of a cluster, and what it has said of others: when each was last called living, and when dead."""

    name: str
    command: list[str]
    process: "subprocess.Popen[bytes] | None" = None
    living: dict[str, float] = field(default_factory=dict)
    dead: dict[str, float] = field(default_factory=dict)
    rest: bytes = b""


@dataclass(frozen=True, slots=True)
class Program:
    """How a member of one kind is started, and how it speaks of others.

    Attributes:
        name: Of the program.
        living: Finds in a line who is said to live.
        dead: Finds in a line who is said to be dead.
        commands: For each member's name, its command.
    """

    name: str
    living: re.Pattern[bytes]
    dead: re.Pattern[bytes]
    commands: dict[str, list[str]]


class Cluster:
    """Members, their output read and stamped by a thread."""

    def __init__(self, program: Program, environ: dict[str, str]) -> None:
        self.members = {name: Member(name, command) for name, command in program.commands.items()}
        self._program = program
        self._environ = environ
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._ends = False
        self._reader = threading.Thread(target=self._read)

    def start_all(self) -> None:
        """Start all, and wait until each knows all others."""
        self._reader.start()
        for member in self.members.values():
            self.start(member)
            time.sleep(0.2)
        self.wait(lambda: all(self.knows_all(member) for member in self.members.values()), START_S, "they all know each other")

    def start(self, member: Member) -> None:
        """Start one, which knows nobody."""
        member.living.clear()
        member.dead.clear()
        member.process = subprocess.Popen(  # noqa: S603 - our own command
            member.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=self._environ
        )
        assert member.process.stdout is not None
        os.set_blocking(member.process.stdout.fileno(), False)
        with self._lock:
            self._selector.register(member.process.stdout, selectors.EVENT_READ, member)

    def knows_all(self, member: Member) -> bool:
        """Whether it holds all others for living."""
        return all(self.is_living(member, other) for other in self.members if other != member.name)

    @staticmethod
    def is_living(member: Member, other: str) -> bool:
        """Whether it said last of another that it lives."""
        return member.living.get(other, 0.0) > member.dead.get(other, 0.0)

    def strike(self, victim: Member, blow: signal.Signals) -> list[float]:
        """Kill or stop one; seconds until each of the others has said so, once all have. It is back with all afterwards."""
        assert victim.process is not None
        others = [member for member in self.members.values() if member is not victim]
        began = time.monotonic()
        victim.process.send_signal(blow)
        self.wait(lambda: not any(self.is_living(other, victim.name) for other in others), KNOWN_S, f"{victim.name} is missed")
        known = [other.dead[victim.name] - began for other in others]
        if blow is signal.SIGSTOP:
            victim.process.send_signal(signal.SIGCONT)
        else:
            victim.process.wait()
            self.start(victim)
        self.wait(
            lambda: self.knows_all(victim) and all(self.is_living(other, victim.name) for other in others),
            START_S,
            f"{victim.name} is back",
        )
        return known

    def wait(self, is_true: Callable[[], bool], within_s: float, what: str) -> None:
        """Wait until something is true."""
        ends_at = time.monotonic() + within_s
        while not is_true():
            if time.monotonic() > ends_at:
                raise SystemExit(f"{self._program.name}: not within {within_s:g} s that {what}")
            time.sleep(0.02)

    def close(self) -> None:
        """End all."""
        self._ends = True
        for member in self.members.values():
            if member.process is not None:
                member.process.kill()
                member.process.wait()
        self._reader.join()
        self._selector.close()

    def _read(self) -> None:
        while not self._ends:
            with self._lock:
                ready = self._selector.select(0)
            if not ready:
                time.sleep(0.002)
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if not data:
                    with self._lock:
                        self._selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
                    continue
                self._take(key.data, data, time.monotonic())

    def _take(self, member: Member, data: bytes, now: float) -> None:
        *lines, member.rest = (member.rest + data).split(b"\n")
        for line in lines:
            for said, pattern in ((member.living, self._program.living), (member.dead, self._program.dead)):
                if found := pattern.search(line):
                    said[found[1].decode()] = now


def run(*, nodes: int = NODES, kills: int = KILLS, stops: int = STOPS, idle_s: float = IDLE_S) -> Sequence[Row]:
    """Both clusters, one after the other; serf's only where the program is installed."""
    names = [f"m{index:02}" for index in range(nodes)]
    rows: list[Row] = []
    with _folder() as folder:
        environ = {**os.environ, "P2PKV_RUNTIME_DIR": str(folder)}
        rows += _measure(_p2pkv(names, folder), environ, kills, stops, idle_s)
        if shutil.which("serf"):
            rows += _measure(_serf(names), environ, kills, stops, idle_s)
        else:
            print("serf isn't installed (Debian: apt install serf): only p2pkv is measured", file=sys.stderr)
    return rows


def _measure(program: Program, environ: dict[str, str], kills: int, stops: int, idle_s: float) -> list[Row]:
    cluster = Cluster(program, environ)
    try:
        cluster.start_all()
        time.sleep(idle_s / 2)
        idle = _cpu_shares(cluster, idle_s)
        members = list(cluster.members.values())
        killed = [cluster.strike(members[1 + index % (len(members) - 1)], signal.SIGKILL) for index in range(kills)]
        stopped = [cluster.strike(members[1 + index % (len(members) - 1)], signal.SIGSTOP) for index in range(stops)]
    finally:
        cluster.close()
    rows = [Row(f"{program.name}: of a core, idle, each", "%", tuple(100 * share for share in idle), "< 3")]
    for what, seconds, target in (("killed", killed, "p99 < 2"), ("stopped", stopped, "p99 < 10")):
        if seconds:
            rows.append(Row(f"{program.name}: {what}, known by all", "s", tuple(max(each) for each in seconds), target))
    return rows


def _cpu_shares(cluster: Cluster, seconds: float) -> list[float]:
    before = {name: _cpu_s(member) for name, member in cluster.members.items()}
    time.sleep(seconds)
    return [(_cpu_s(member) - before[name]) / seconds for name, member in cluster.members.items()]


def _cpu_s(member: Member) -> float:
    assert member.process is not None
    fields = Path(f"/proc/{member.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _p2pkv(names: list[str], folder: Path) -> Program:
    http = free_port()
    commands = {}
    for name in names:
        config = folder / f"{name}.yaml"
        keys = (f"lmcache_instance_id: {name}", "lmcache_worker_port: 0", f"controller_http_url: localhost:{http}")
        config.write_text("\n".join(keys) + "\n")
        commands[name] = [sys.executable, "-m", "p2pkv", "node", "--config", str(config)]
    said = rb"""instance['"]?[=:]\s*['"]?(m\d+)['"]?\W+state['"]?[=:]\s*['"]?%s\b"""
    return Program("p2pkv", re.compile(said % b"alive"), re.compile(said % b"dead"), commands)


def _serf(names: list[str]) -> Program:
    first, commands = free_port(), {}
    for name in names:
        bind = first if name == names[0] else free_port()
        command = ["serf", "agent", f"-node={name}", f"-bind=127.0.0.1:{bind}", f"-rpc-addr=127.0.0.1:{free_port()}"]
        commands[name] = command if name == names[0] else [*command, f"-retry-join=127.0.0.1:{first}", "-retry-interval=1s"]
    said = rb"EventMember%s: (m\d+) "
    return Program("serf", re.compile(said % b"Join"), re.compile(said % b"Failed"), commands)


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="p2pkv-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
