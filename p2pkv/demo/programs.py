"""The demo's processes: started as a user would start them, ready by a deadline, and all gone at the end."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import httpx2

from p2pkv.errors import P2pkvError

READY_S = 90.0
"""A node is ready in 1.5 s, an engine when torch is loaded: 5 s, or a minute where everything starts from a cold disk."""
END_S = 15.0
"""A node leaves within 2 s, vLLM within 5."""
PROBE_S = 5.0
REST_S = 2.0
"""Python's resource tracker, which outlives the processes that it cleans up after, needs 0.1 s."""
RESOURCE_TRACKER = b"multiprocessing.resource_tracker"
POLL_S = 0.05
LOG_TAIL_LINES = 15
RUNTIME_VARIABLE = "P2PKV_RUNTIME_DIR"
FOREIGN = ("P2PKV_", "LMCACHE_", "VLLM_")
"""Settings of the user's that the demo's programs shouldn't have."""


class ProgramError(P2pkvError):
    """A program of the demo didn't start. The text has the end of its log."""


@dataclass(frozen=True, slots=True)
class Program:
    """One running process of ours; those that it starts are in its process group."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


class Programs:
    """Starts processes; as a context manager it ends them all, and the nodes that engines have started.

    Args:
        folder: For their logs.
        runtime: Their `P2PKV_RUNTIME_DIR`.
    """

    def __init__(self, folder: Path, runtime: Path) -> None:
        self._folder = folder
        self._runtime = runtime
        self._running: list[Program] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with _interrupts_put_off():
            self.end_all()

    # --- start ---

    def start(self, name: str, arguments: Sequence[str]) -> Program:
        """Start `p2pkv` with `arguments`; `ready_line` waits for it."""
        return self._start(name, [sys.executable, "-m", "p2pkv", *arguments], {}, subprocess.PIPE, cwd=None)

    def start_server(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Program:
        """Start another program, in the folder of the logs; `wait_until_healthy` waits for it.

        Args:
            name: What it is called here.
            command: The program and its arguments.
            environment: What it has in its environment besides ours.
        """
        return self._start(name, command, environment, None, cwd=self._folder)

    def _start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], stdout: int | None, *, cwd: Path | None
    ) -> Program:
        """Start something in a session of its own: Ctrl-C reaches it through us, in order. Its log has what no pipe takes."""
        log = self._folder / f"{name}.log"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
        with log.open("ab") as written, _interrupts_put_off():
            process = subprocess.Popen(  # noqa: S603 - our own command
                command,
                stdin=subprocess.DEVNULL,
                stdout=written if stdout is None else stdout,
                stderr=written,
                env={**inherited, **environment, RUNTIME_VARIABLE: str(self._runtime)},
                cwd=cwd,
                start_new_session=True,
            )
            program = Program(name, process, log)
            self._running.append(program)
        return program

    def ready_line(self, program: Program) -> str:
        """Wait until `program` says that it is ready.

        Raises:
            ProgramError: It ended instead, or took longer than `READY_S`.
        """
        pipe = program.process.stdout
        assert pipe is not None
        deadline = time.monotonic() + READY_S
        line = b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(pipe.fileno(), 4096) if readable else b""
            if not data:
                _fail(program, READY_S, has_ended=bool(readable))
            line += data
        return line.decode(errors="replace").strip()

    def wait_until_healthy(self, program: Program, url: str, within_s: float) -> None:
        """Wait until what `program` serves at `url` is answered with 200.

        Raises:
            ProgramError: It ended instead, or took longer than `within_s`.
        """
        deadline = time.monotonic() + within_s
        while not _is_healthy(url):
            has_ended = program.process.poll() is not None
            if has_ended or time.monotonic() >= deadline:
                _fail(program, within_s, has_ended=has_ended)
            time.sleep(POLL_S)

    # --- end ---

    def kill(self, program: Program, pids: Iterable[int]) -> None:
        """End `program` and all its `pids` at once, as a crash would."""
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        self.end(program)

    def end(self, program: Program) -> int:
        """End `program`, by force after `END_S`; its exit code."""
        code = _end(program.process)
        self._running.remove(program)
        return code

    def end_all(self) -> dict[str, int]:
        """End what runs still, the youngest first, by force after `END_S`; the exit codes, by name."""
        codes = {}
        while self._running:
            program = self._running[-1]
            codes[program.name] = self.end(program)
        self.end_nodes_of_engines()
        return codes

    def end_nodes_of_engines(self) -> bool:
        """End the nodes that our engines have started, and that outlive them; whether no force was needed."""
        for pid in self._others():
            _signal(pid, signal.SIGTERM)
        stubborn = _wait_for_end(self._others, END_S)
        for pid in stubborn:
            _signal(pid, signal.SIGKILL)
        return not stubborn

    def _others(self) -> list[int]:
        """Processes that have our runtime directory from one of ours, and that aren't in our list."""
        ours = {os.getpid(), *(program.process.pid for program in self._running)}
        variable = f"{RUNTIME_VARIABLE}={self._runtime}".encode()
        return [pid for pid in _processes() if pid not in ours and variable in _read(pid, "environ").split(b"\0")]


@contextmanager
def _interrupts_put_off() -> Iterator[None]:
    """Let SIGINT and SIGTERM act only at the exit: a process that has just been started isn't in our list yet."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def _fail(program: Program, within_s: float, *, has_ended: bool) -> NoReturn:
    what = "ended at its start" if has_ended else f"wasn't ready within {within_s:g} s"
    tail = program.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    raise ProgramError("\n  ".join([f"{program.name} {what}:", *tail]))


def _is_healthy(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=PROBE_S, trust_env=False).status_code == 200
    except httpx2.TransportError:  # it isn't listening yet
        return False


def pids_of(program: Program) -> list[int]:
    """`program` and all that it has started, but its node, which is in a session of its own, and Python's resource tracker.

    That one, when the others have been killed, removes the shared memory that they would leave behind.
    """
    return [pid for pid in _group(program.process) if RESOURCE_TRACKER not in _read(pid, "cmdline")]


def _end(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(END_S)
    finally:
        for pid in _wait_for_end(lambda: _group(process), REST_S):
            _signal(pid, signal.SIGKILL)
        if process.stdout is not None:
            process.stdout.close()


def _wait_for_end(running: Callable[[], list[int]], within_s: float) -> list[int]:
    """Wait until none is running; those that are after `within_s`."""
    deadline = time.monotonic() + within_s
    while (pids := running()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return pids


def _processes() -> list[int]:
    return [int(process.name) for process in Path("/proc").glob("[0-9]*")]


def _group(process: subprocess.Popen[bytes]) -> list[int]:
    """What runs in the process group of `process`."""
    found = []
    for pid in _processes():
        state, _, group = (_read(pid, "stat").rpartition(b")")[2].split() or [b"Z", b"", b""])[:3]
        if state != b"Z" and int(group) == process.pid:
            found.append(pid)
    return found


def _read(pid: int, what: str) -> bytes:
    """A file of a process; empty if it has ended, or is another user's."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
