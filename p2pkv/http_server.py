"""Hypercorn's trio worker, made to bear what its connections do.

Hypercorn lets an exception of one connection end the whole server: stray bytes after a websocket's handshake would stop a node.
Here such a connection is closed, and a log line says why. Bugs in our own calls don't get this far: they are answered with 500.

Nor does Hypercorn limit how many connections are open. It keeps each for `KEEP_ALIVE_S` after its client has gone, and for ever
where more of a body came than its call took, or where HTTP/2 broke off.
"""

import socket
from contextlib import suppress
from typing import Any

import structlog
import trio
from hypercorn import protocol
from hypercorn.config import Config
from hypercorn.events import Closed, Event, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio import run, serve, tcp_server
from hypercorn.trio.task_group import TaskGroup, _handle
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import AppWrapper, ASGIReceiveEvent, Scope

__all__ = ["config_for", "serve"]

KEEP_ALIVE_S = 20.0
"""A connection without a request, or with one whose headers don't end, is closed after this."""

MAX_CONNECTIONS = 512
"""Open at once at one port; more are closed unread. Each costs a descriptor, of which chunks need most."""

_log = structlog.get_logger(room="http")


class _Config(Config):
    """Hypercorn's configuration for one port, and the port's places."""

    def __init__(self) -> None:
        super().__init__()
        self.places = trio.Semaphore(MAX_CONNECTIONS)


def config_for(listener: socket.socket) -> Config:
    """Hypercorn's configuration to serve `listener`, which becomes the server's."""
    config = _Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.accesslog = config.errorlog = None
    config.include_server_header = False
    config.keep_alive_timeout = KEEP_ALIVE_S
    return config


class _Inbox:
    """What comes for one call. Hypercorn's own would let a call wait, at its end, until it has read all of its body."""

    def __init__(self, limit: int) -> None:
        self._into, self._waiting = trio.open_memory_channel[ASGIReceiveEvent](limit)
        self._end: ASGIReceiveEvent | None = None

    async def put(self, event: ASGIReceiveEvent) -> None:
        """Wait until there is room; but none is needed for the end, nor for what comes after it."""
        if event["type"] in ("http.disconnect", "websocket.disconnect"):
            self._end = event
            self._into.close()
            return
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._into.send(event)

    async def receive(self) -> ASGIReceiveEvent:
        """What has waited longest."""
        try:
            return await self._waiting.receive()
        except trio.EndOfChannel:
            assert self._end is not None
            return self._end

    def close(self) -> None:
        """The call has ended, and takes nothing more."""
        self._waiting.close()


class _Calls(TaskGroup):
    """The calls of one connection, and whatever else runs for it."""

    async def spawn_app(self, app: AppWrapper, config: Config, scope: Scope, send: Any) -> Any:
        """Start a call; how to tell it what comes for it."""
        inbox = _Inbox(config.max_app_queue_size)

        async def call(*arguments: Any) -> None:
            try:
                await app(*arguments)
            finally:
                inbox.close()

        self.spawn(_handle, call, config, scope, inbox.receive, send, trio.to_thread.run_sync, trio.from_thread.run)
        return inbox.put


class _Http11(H11Protocol):
    """HTTP/1.1 and nothing else."""

    async def _check_protocol(self, event: object) -> None:
        """A request that asks for HTTP/2 is answered as it came."""


class _ContainedServer(TCPServer):
    """One connection."""

    _is_read = False

    async def run(self) -> None:
        """Serve it until it ends, by whatever."""
        assert isinstance(self.config, _Config)
        try:
            self.config.places.acquire_nowait()
        except trio.WouldBlock:
            _log.warning("too many connections", limit=MAX_CONNECTIONS)
            await trio.aclose_forcefully(self.stream)
            return
        try:
            await super().run()
        except* Exception as errors:  # noqa: BLE001 - whatever it is, it is this connection's
            _log.warning("a connection broke", reason=repr(errors.exceptions[0]))
        finally:
            self.config.places.release()

    async def protocol_send(self, event: Event) -> None:
        """Send, or close, or note whether a request is open."""
        if isinstance(event, Updated) and self._is_read:
            return  # no request will come that could be waited for
        try:
            await super().protocol_send(event)
        except trio.BusyResourceError:  # another task closes the connection at this moment
            await self.protocol.handle(Closed())

    async def _read_data(self) -> None:
        await super()._read_data()
        self._is_read = True
        await self.idle_task.stop()


protocol.H11Protocol = _Http11  # type: ignore[attr-defined]
run.TCPServer = _ContainedServer  # type: ignore[attr-defined]
tcp_server.TaskGroup = _Calls  # type: ignore[attr-defined]
