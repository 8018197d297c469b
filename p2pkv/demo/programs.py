"""The demo's processes: started as a user would start them, ready by a deadline, and all gone at the end."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from p2pkv.errors import P2pkvError
from p2pkv.rendezvous import living_cards

READY_S = 90.0
"""A node is ready in 1.5 s, an engine when torch is loaded: 5 s, or a minute where everything starts from a cold disk."""
END_S = 5.0
"""A node leaves within 2 s."""
POLL_S = 0.05
LOG_TAIL_LINES = 15
CLUSTER = "p2pkv"
"""The default of `cluster`, which the demo's files don't name."""


class ProgramError(P2pkvError):
    """A program of the demo didn't start. The text has the end of its log."""


@dataclass(frozen=True, slots=True)
class Program:
    """One running process of ours."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


class Programs:
    """Starts `p2pkv ...` processes; as a context manager it ends them all, and any node that an engine started again.

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

    def start(self, name: str, arguments: Sequence[str]) -> Program:
        """Start `p2pkv` with `arguments`, in a session of its own: Ctrl-C reaches it through us, in order."""
        log = self._folder / f"{name}.log"
        foreign = ("P2PKV_", "LMCACHE_")
        environ = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        with log.open("wb") as stderr, _interrupts_put_off():
            process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-m", "p2pkv", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**environ, "P2PKV_RUNTIME_DIR": str(self._runtime)},
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
                what = "ended at its start" if readable else f"wasn't ready within {READY_S:g} s"
                tail = program.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
                raise ProgramError("\n  ".join([f"{program.name} {what}:", *tail]))
            line += data
        return line.decode(errors="replace").strip()

    def end_all(self) -> dict[str, int]:
        """End what runs still, the youngest first, by force after `END_S`; the exit codes, by name."""
        codes = {}
        while self._running:
            program = self._running[-1]
            codes[program.name] = _end(program.process)
            self._running.pop()
        self._end_restarted_nodes()
        return codes

    def _end_restarted_nodes(self) -> None:
        deadline = time.monotonic() + END_S
        for card in living_cards(self._runtime, CLUSTER):
            with suppress(ProcessLookupError):
                os.kill(card.pid, signal.SIGTERM)
        while living_cards(self._runtime, CLUSTER) and time.monotonic() < deadline:
            time.sleep(POLL_S)


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


def _end(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(END_S)
    finally:
        if process.stdout is not None:
            process.stdout.close()
