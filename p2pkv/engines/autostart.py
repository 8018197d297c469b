"""Starting an instance's node from an engine: detached, once, and only when none runs."""

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from p2pkv.engines.connection import REPLY_S, EngineConnection
from p2pkv.errors import NodeUnreachableError
from p2pkv.rendezvous import Place, is_living

START_S = 30.0
"""A node is ready within 1.5 s; the rest is for machines where everything starts at once."""

_POLL_S = 0.05


def connect_or_start(place: Place, config: Path, reply_s: float = REPLY_S) -> EngineConnection:
    """Connect to the node of `place`; if none runs, start one from `config`, which outlives this process.

    Several processes that do so at once start one node.

    Raises:
        NodeUnreachableError: It ended at its start, or wasn't ready within `START_S`. Its log says why.
    """
    deadline = time.monotonic() + START_S
    connection = _try_connect(place, reply_s)
    if connection is not None:
        return connection
    with _sole_starter(place, deadline):
        child = None
        while (connection := _try_connect(place, reply_s)) is None:
            if not is_living(place):
                if child is None:
                    child = _start(place, config)
                elif _has_ended(child):
                    raise NodeUnreachableError(f"the node of {place.instance} ended at its start; see {place.log}")
            _wait(deadline, f"the node of {place.instance} wasn't ready within {START_S:g} s; see {place.log}")
    return connection


def _try_connect(place: Place, reply_s: float) -> EngineConnection | None:
    try:
        return EngineConnection.open(place.engine_socket, reply_s)
    except NodeUnreachableError:
        return None


@contextmanager
def _sole_starter(place: Place, deadline: float) -> Iterator[None]:
    for folder in (place.folder.parent, place.folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(place.folder / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        while not _try_lock(descriptor):
            _wait(deadline, f"another process has been starting the node of {place.instance} for {START_S:g} s")
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(deadline: float, problem: str) -> None:
    if time.monotonic() >= deadline:
        raise NodeUnreachableError(problem)
    time.sleep(_POLL_S)


def _start(place: Place, config: Path) -> int:
    """Start a node in a session of its own, so that no signal for this program's terminal reaches it."""
    log_flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "p2pkv", "node", "--config", str(config)],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(place.log), log_flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )


def _has_ended(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] == child
    except ChildProcessError:  # somebody else's `wait` has seen it end
        return True
