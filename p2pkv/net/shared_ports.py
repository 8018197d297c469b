"""The ports that all nodes of a host serve together: one listening socket each, whose descriptor they pass to each other.

The first node binds a port. Others get that very socket through the unix socket of whoever has it, and all accept from its one
queue. So the port answers while any of them lives, and one that stands still holds nobody up. (With `SO_REUSEPORT` each has a
queue of its own, and what the kernel puts into a stopped process's queue hangs.)

    answer = keys of the ports, a JSON list, in one frame that carries their listening sockets in the same order

A node asks those that live before it binds, and again while one that is just starting may have what it looks for. A port that
can't be had, as a stranger has it, is tried again now and then.
"""

import json
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import trio

from p2pkv.core.ids import Address
from p2pkv.errors import ConfigError, RemoteProtocolError
from p2pkv.net.descriptors import is_own_user, receive_frame, send_frame
from p2pkv.net.logs import logger
from p2pkv.net.names import Endpoint, is_of_this_host, resolve
from p2pkv.net.ports import listen_at
from p2pkv.wire.frames import Frame

ANSWER_S = 0.5
"""For a sibling to pass what it has, which takes it a millisecond; a stopped one holds nobody up for longer."""
SETTLE_S = 2.0
"""For a sibling that is just starting, and has bound a port, to be able to pass it: the rest of its start takes 0.2 s."""
PAUSE_S = 0.05
RETRY_S = 5.0
"""Between attempts at a port that others have; a dead member of the cluster is noticed as late."""

_log = logger("shared_ports")


class Door(Protocol):
    """Serves a listening socket, which becomes its own, until cancelled."""

    async def __call__(  # noqa: ASYNC114 - each door's own function is listed there
        self, listener: socket.socket, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Serve `listener`."""


class SharedPorts:
    """One node's part in them; a context that closes its listening sockets on exit.

    Args:
        wanted: Where the ports are, by the key of the configuration that says so.
        siblings: Finds the sockets of the other nodes that live now; any of them may not answer.
    """

    def __init__(self, wanted: Mapping[str, Address], siblings: Callable[[], Iterable[Path]]) -> None:
        self._wanted = dict(wanted)
        self._siblings = siblings
        self._held: dict[str, socket.socket] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for listener in self._held.values():
            listener.close()

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Of all wanted ports, held or not yet."""
        return tuple(self._wanted.values())

    def held(self, key: str) -> Address | None:
        """Where this node serves the port that `key` names; None when it doesn't."""
        return self._wanted[key] if key in self._held else None

    # --- getting them -----------------------------------------------------------------------------------------------------

    async def acquire(self) -> dict[str, str]:
        """Get the ports that are missing, from siblings or by binding them; takes `SETTLE_S` and a little at most.

        Returns:
            Why a port can't be had now, by its key.
        """
        problems: dict[str, str] = {}
        missing: dict[str, Endpoint] = {}
        for key in self._wanted.keys() - self._held.keys():
            here = [endpoint for endpoint in await resolve(self._wanted[key]) if is_of_this_host(endpoint)]
            if here:
                missing[key] = here[0]
            else:
                problems[key] = f"{key}: {self._wanted[key].host} is no address of this host"
        settled_at = trio.current_time() + SETTLE_S
        while missing:
            have_all_answered = await self._ask_siblings(missing)
            missing = {key: endpoint for key, endpoint in missing.items() if key not in self._held}
            refusals = {key: self._bind(key, endpoint) for key, endpoint in missing.items()}
            missing = {key: endpoint for key, endpoint in missing.items() if key not in self._held}
            if have_all_answered or trio.current_time() > settled_at:
                return problems | {key: refusals[key] for key in missing}
            await trio.sleep(PAUSE_S)
        return problems

    async def _ask_siblings(self, missing: Mapping[str, Endpoint]) -> bool:
        """Take what siblings have of `missing`; whether each of them has answered."""
        answers: list[bool] = []

        async def ask(path: Path) -> None:
            answers.append(await self._ask(path, missing))

        async with trio.open_nursery() as nursery:
            for path in self._siblings():
                nursery.start_soon(ask, path)
        return all(answers)

    async def _ask(self, path: Path, missing: Mapping[str, Endpoint]) -> bool:
        reason = f"no answer within {ANSWER_S:g} s"
        with trio.move_on_after(ANSWER_S):
            try:
                async with await trio.open_unix_socket(path) as stream:
                    frame = await receive_frame(stream.socket) if is_own_user(stream.socket) else None
                if frame is not None:
                    with frame:
                        self._take(frame, missing)
                    return True
                reason = "it closed the connection"
            except (OSError, RemoteProtocolError) as error:
                reason = str(error)
        _log.debug("a sibling passes no ports", path=str(path), reason=reason)
        return False

    def _take(self, frame: Frame, missing: Mapping[str, Endpoint]) -> None:
        """Keep those of a sibling's sockets that are what is missing."""
        for key, descriptor in zip(_keys_of(frame), frame.descriptors, strict=True):
            if key in missing and key not in self._held:
                passed = socket.fromfd(descriptor, missing[key].family, socket.SOCK_STREAM)
                if _listens_at(passed, missing[key]):
                    self._hold(key, passed)
                else:
                    passed.close()

    def _bind(self, key: str, endpoint: Endpoint) -> str:
        """Bind a port that no sibling has; why that can't be done, if it can't."""
        try:
            self._hold(key, listen_at(endpoint, key=key))
        except ConfigError as error:
            return str(error)
        return ""

    def _hold(self, key: str, listener: socket.socket) -> None:
        listener.setblocking(False)  # else `dup` makes it blocking, for siblings too: their `accept` would stop all they do
        self._held[key] = listener

    # --- having them ------------------------------------------------------------------------------------------------------

    async def pass_on(
        self, listener: trio.socket.SocketType, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Pass what is held to every sibling that connects to `listener`, until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._answer, [trio.SocketListener(listener)])
            task_status.started()

    async def _answer(self, stream: trio.SocketStream) -> None:
        if not is_own_user(stream.socket):
            return
        try:
            await send_frame(
                stream.socket, json.dumps(list(self._held)).encode(), [each.fileno() for each in self._held.values()]
            )
        except OSError as error:
            _log.debug("a sibling didn't take the ports", reason=str(error))

    async def serve(
        self,
        doors: Mapping[str, Door],
        changed: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve what is held, and what can be had later, until cancelled.

        Args:
            doors: What serves a port, by its key.
            changed: Told when a port was got later.
            task_status: Told when all that is held now is served.
        """
        async with trio.open_nursery() as nursery:
            served = await self._open(doors, nursery)
            task_status.started()
            while self._wanted.keys() != self._held.keys():
                await trio.sleep(RETRY_S)
                await self.acquire()
                new = {key: door for key, door in doors.items() if key not in served}
                if later := await self._open(new, nursery):
                    served |= later
                    changed()

    async def _open(self, doors: Mapping[str, Door], nursery: trio.Nursery) -> set[str]:
        """Open those of `doors` whose ports are held."""
        opened = doors.keys() & self._held.keys()
        for key in sorted(opened):
            await nursery.start(doors[key], self._held[key].dup())
        return opened


def _keys_of(frame: Frame) -> list[str]:
    """The keys of a sibling's ports, one for each descriptor.

    Raises:
        RemoteProtocolError: It is something else.
    """
    try:
        keys = json.loads(frame.payload)
    except ValueError as error:
        raise RemoteProtocolError("the answer is no JSON") from error
    if not isinstance(keys, list) or len(keys) != len(frame.descriptors) or not all(isinstance(key, str) for key in keys):
        raise RemoteProtocolError("the answer names other than the sockets that came with it")
    return keys


def _listens_at(passed: socket.socket, endpoint: Endpoint) -> bool:
    """Whether what a sibling passed really is a listening TCP socket of this address."""
    options = (socket.SO_DOMAIN, socket.SO_PROTOCOL, socket.SO_ACCEPTCONN)
    try:
        facts = [passed.getsockopt(socket.SOL_SOCKET, option) for option in options]
        return facts == [endpoint.family, socket.IPPROTO_TCP, 1] and passed.getsockname() == endpoint.place
    except OSError:  # it is no socket at all
        return False
