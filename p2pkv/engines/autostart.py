"""Starting an instance's node from an engine: detached, once, and only when none runs."""

import fcntl
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from p2pkv.engines.connection import REPLY_S, EngineConnection
from p2pkv.errors import NodeUnreachableError
from p2pkv.rendezvous import Place, is_living

START_S = 30.0
"""A node is ready within 1.5 s; the rest is for machines where everything starts at once."""

OPENMP_BINDINGS = ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""What has an OpenMP bind the thread that loads it to cores, whichever OpenMP it is."""

_POLL_S = 0.05

_LAUNCHER = """
import os, sys
if pid := os.fork():
    print(pid)
else:
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1), os.dup2(log, 2)
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Starts a node and ends, so that the node is nobody's child: when vLLM ends, it ends all that descend from it."""


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
    with _sole_starter(place, deadline), ExitStack() as started:
        node = None
        while (connection := _try_connect(place, reply_s)) is None:
            if not is_living(place):
                if node is None:
                    node = _start(place, config)
                    started.callback(os.close, node)
                elif _has_ended(node):
                    raise _ended(place)
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
    """Start a node in a session of its own, so that no signal for this program's terminal reaches it.

    It isn't bound to the engine's cores: the OpenMP that vLLM preloads would see to that, in every process.

    Returns:
        A descriptor of its process; the caller closes it.

    Raises:
        NodeUnreachableError: It has ended already.
    """
    launch = [sys.executable, "-ISc", _LAUNCHER, str(place.log)]
    node = [sys.executable, "-m", "p2pkv", "node", "--config", str(config)]
    said = subprocess.run(  # noqa: S603 - our own command
        [*launch, *node],
        env={name: value for name, value in os.environ.items() if name not in OPENMP_BINDINGS},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
        check=True,
    ).stdout
    try:
        return os.pidfd_open(int(said))
    except ProcessLookupError as error:
        raise _ended(place) from error


def _ended(place: Place) -> NodeUnreachableError:
    return NodeUnreachableError(f"the node of {place.instance} ended at its start; see {place.log}")


def _has_ended(node: int) -> bool:
    poll = select.poll()  # unlike `select`, it takes any descriptor
    poll.register(node, select.POLLIN)
    return bool(poll.poll(0))
