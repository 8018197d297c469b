"""Real nodes for a benchmark: processes on loopback, in a runtime directory of their own, ended with the benchmark."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_S = 30.0
END_S = 10.0


@dataclass(frozen=True, slots=True)
class NodeProcess:
    """One node: its process, its configuration, and what its ready line said."""

    instance: str
    process: "subprocess.Popen[str]"
    config: Path
    http: str
    ready_s: float


class Bench:
    """A folder and its nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {**os.environ, "P2PKV_RUNTIME_DIR": str(folder / "run")}
        self._nodes: list[NodeProcess] = []
        (folder / "run").mkdir(mode=0o700)

    def start(self, instance: str, *, program: Sequence[str] = ("p2pkv", "node"), **keys: object) -> NodeProcess:
        """Start a node, or another `program` that is one, and wait until it is ready; further configuration by `keys`."""
        settings = {
            "lmcache_instance_id": instance,
            "lmcache_worker_port": free_port(),
            "controller_http_url": f"localhost:{free_port()}",
            **keys,
        }
        config = self.folder / f"{instance}.yaml"
        config.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
        began = time.perf_counter()
        with (self.folder / f"{instance}.log").open("a") as log:
            process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-m", *program, "--config", str(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environ,
            )
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("p2pkv ready"):
            raise SystemExit(f"{instance} didn't start:\n{(self.folder / f'{instance}.log').read_text()}")
        fields = dict(word.split("=", 1) for word in line.split()[2:])
        node = NodeProcess(instance, process, config, fields["http"], time.perf_counter() - began)
        self._nodes.append(node)
        return node

    def stop(self, node: NodeProcess) -> None:
        """End a node as a user would."""
        with node.process:  # closes its pipes
            node.process.terminate()
            node.process.wait(END_S)
        self._nodes.remove(node)

    def kill(self, node: NodeProcess) -> None:
        """End a node without a word."""
        with node.process:
            node.process.kill()
            node.process.wait(END_S)
        self._nodes.remove(node)

    def stop_all(self) -> None:
        """End all nodes that still run."""
        for node in list(self._nodes):
            self.stop(node)


@contextmanager
def open_bench() -> Iterator[Bench]:
    """A bench whose nodes, folder and runtime directory go with the block."""
    folder = Path(tempfile.mkdtemp(prefix="p2pkv-bench-"))
    bench = Bench(folder)
    before = os.environ.get("P2PKV_RUNTIME_DIR")
    os.environ["P2PKV_RUNTIME_DIR"] = bench.environ["P2PKV_RUNTIME_DIR"]
    try:
        yield bench
    finally:
        try:
            bench.stop_all()
        finally:
            if before is None:
                del os.environ["P2PKV_RUNTIME_DIR"]
            else:
                os.environ["P2PKV_RUNTIME_DIR"] = before
            shutil.rmtree(folder)


def resident_nbytes(node: NodeProcess) -> int:
    """Memory that a node's process has, without chunks: those are shared memory."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{node.process.pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


def free_port() -> int:
    """A port of loopback that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
