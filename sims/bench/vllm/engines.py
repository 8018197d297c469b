"""`vllm serve` with a tiny model, with p2pkv and without: two at a time, each on a core of its own where that matters.

`start_engine`, `await_ready` and `end_engine` are also how tests/vllm has one.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2

from p2pkv.demo.vllm import ENVIRONMENT
from p2pkv.engines.reference.model import save_tiny_llama
from sims.bench.processes import Bench, NodeProcess, free_port, open_bench

PROGRAM = Path(__file__).parents[3] / ".venv-vllm" / "bin" / "vllm"
MODEL = "tiny"
BLOCK_SIZE = 32
"""The smallest that vLLM's attention on CPUs takes."""
CACHE_TOKENS = 8192
"""Of each engine's own KV cache: two of the longest prompts, or twice what eight requests of `overhead` hold."""
MAX_TOKENS = 4096
"""Of a prompt with its answer; all that the tiny model takes."""
STORE_GIB = 1
"""Of each node: nothing is evicted in a run."""
READY_S = 300.0
"""It takes 45 s on an idle core, a minute where two start together."""
END_S = 30.0
LOG_TAIL_NCHARS = 4000
USUAL_OPTIONS = ("--host", "127.0.0.1", "--dtype", "float32", "--block-size", str(BLOCK_SIZE), "--enforce-eager")
BENCH_OPTIONS = (
    *("--served-model-name", MODEL, "--max-model-len", str(MAX_TOKENS)),
    *("--num-gpu-blocks-override", str(CACHE_TOKENS // BLOCK_SIZE)),
)
CONNECTOR: dict[str, object] = {"kv_connector": "P2PKVConnector", "kv_role": "kv_both"}
"""What a user writes into `--kv-transfer-config`."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Which engine: the core that its worker computes on, and the instance that it belongs to.

    Attributes:
        core: 0 or 1.
        instance: None for one without p2pkv.
    """

    core: int
    instance: str | None


PLAIN = (Seat(0, None), Seat(1, None))
CONNECTED = (Seat(0, "bench1"), Seat(1, "bench2"))
SHARING = (Seat(0, "bench3"), Seat(1, "bench3"))
FETCHING = (Seat(0, "fetching1"), Seat(1, "fetching2"))
"""With `peer_fetch`, and in a cluster of their own: the others' nodes live on, and hold much."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A running `vllm serve`.

    Attributes:
        port: Of its HTTP door on loopback.
        process: The parent of its processes.
        log: What all of them write.
    """

    port: int
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def url(self) -> str:
        """Of its HTTP door."""
        return f"http://127.0.0.1:{self.port}"

    def metrics(self, prefix: str) -> dict[str, float]:
        """What `/metrics` shows under names that begin like this: by the name's rest, with its source if it has one."""
        text = httpx2.get(f"{self.url}/metrics", timeout=10, trust_env=False).text
        found: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith(prefix):
                name, value = line.removeprefix(prefix).rsplit(" ", 1)
                source = name.partition('source="')[2].partition('"')[0]
                found[source or name.partition("{")[0]] = float(value)
        return found

    def prompt_tokens(self) -> dict[str, float]:
        """Where prompts' tokens came from so far: `local_compute`, `local_cache_hit`, `external_kv_transfer`."""
        return self.metrics("vllm:prompt_tokens_by_source_total")

    def counts(self) -> dict[str, float]:
        """What p2pkv has counted so far."""
        return self.metrics("vllm:p2pkv_")

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-LOG_TAIL_NCHARS:]

    def processor_s(self) -> float:
        """Processor time that its processes have taken so far."""
        stats = [read_stat(path) for path in Path("/proc").glob("[0-9]*/stat")]
        return sum(stat.processor_s for stat in stats if stat is not None and stat.session == self.process.pid)


@dataclass(frozen=True, slots=True)
class Stat:
    """What the kernel says of a process: the session that it is in, and the processor time that it has taken."""

    session: int
    processor_s: float


def read_stat(path: Path) -> Stat | None:
    """Read `/proc/PID/stat`; None when the process has ended."""
    try:
        fields = path.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Stat(int(fields[3]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))


class Fleet:
    """Engines and nodes of one benchmark; a start takes a minute, so what still runs is used again."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._engines: dict[Seat, Engine] = {}
        self._nodes: dict[str, NodeProcess] = {}
        self._model = bench.folder / MODEL
        save_tiny_llama(self._model)

    def use(self, seats: Sequence[Seat]) -> list[Engine]:
        """These engines, ready, and no others."""
        for seat in [seat for seat in self._engines if seat not in seats]:
            end_engine(self._engines.pop(seat))
        for seat in seats:
            if seat not in self._engines:
                self._engines[seat] = self._start(seat)
        for seat in seats:
            await_ready(self._engines[seat])
        return [self._engines[seat] for seat in seats]

    def node(self, instance: str) -> NodeProcess:
        """The node of an instance."""
        if instance not in self._nodes:
            is_fetching = any(seat.instance == instance for seat in FETCHING)
            cluster = "fetching" if is_fetching else "bench"
            self._nodes[instance] = self._bench.start(
                instance, max_local_cpu_size=STORE_GIB, cluster=cluster, peer_fetch=is_fetching
            )
        return self._nodes[instance]

    def _start(self, seat: Seat) -> Engine:
        environ = {**self._bench.environ, "VLLM_CPU_OMP_THREADS_BIND": str(seat.core)}
        if seat.instance is not None:
            environ["P2PKV_CONFIG_FILE"] = str(self.node(seat.instance).config)
        port = free_port()
        return start_engine(
            port,
            self._model,
            self._bench.folder / f"vllm-{port}.log",
            *BENCH_OPTIONS,
            kv_transfer=None if seat.instance is None else CONNECTOR,
            environ=environ,
        )


@contextmanager
def open_fleet() -> Iterator[Fleet]:
    """A fleet without engines; those that it starts go with the block."""
    if not PROGRAM.exists():
        raise SystemExit(f"{PROGRAM} is missing: ./dev vllm-env installs vLLM for CPUs there, in a few minutes and 2.5 GB")
    with open_bench() as bench:
        fleet = Fleet(bench)
        try:
            yield fleet
        finally:
            fleet.use(())


def start_engine(
    port: int,
    model: Path,
    log: Path,
    *options: str,
    kv_transfer: Mapping[str, object] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Engine:
    """Start `vllm serve` on loopback; it isn't ready yet.

    Args:
        port: Of its HTTP door.
        model: Its folder.
        log: Where its processes write.
        options: More of its command line; of an option given twice the last counts.
        kv_transfer: What `--kv-transfer-config` says, such as `CONNECTOR`.
        environ: Its environment, but for `ENVIRONMENT`.
    """
    command = [str(PROGRAM), "serve", str(model), "--port", str(port), *USUAL_OPTIONS, *options]
    if kv_transfer is not None:
        command += ["--kv-transfer-config", json.dumps(kv_transfer)]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command,
            env={**environ, **ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, so that no process of a failed start is left behind
        )
    return Engine(port, process, log)


def await_ready(engine: Engine) -> None:
    """Wait until it answers; it must within `READY_S`."""
    deadline = time.monotonic() + READY_S
    while True:
        if engine.process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"vLLM didn't start:\n{engine.tail()}")
        with suppress(httpx2.TransportError):  # it isn't listening yet
            if httpx2.get(f"{engine.url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)


def end_engine(engine: Engine) -> None:
    """End it as a user would, and what is left of it by force."""
    engine.process.terminate()
    try:
        engine.process.wait(END_S)
    finally:
        with suppress(ProcessLookupError):  # as it should be: all of them have ended
            os.killpg(engine.process.pid, signal.SIGKILL)
        engine.process.wait()
