"""Hypercorn's trio worker, made to bear what a single connection does.

Hypercorn lets an exception of one connection end the whole server: an `Upgrade: h2c` with broken settings, or stray bytes after
a websocket's handshake, would stop a node. Here such a connection is closed, and a log line says why. Bugs in our own calls
don't get this far: they are answered with 500.
"""

import socket

import structlog
from hypercorn.config import Config
from hypercorn.trio import run, serve
from hypercorn.trio.tcp_server import TCPServer

__all__ = ["config_for", "serve"]

KEEP_ALIVE_S = 20.0
"""A connection without a request, or with one whose headers don't end, is closed after this."""


def config_for(listener: socket.socket) -> Config:
    """Hypercorn's configuration to serve `listener`, which becomes the server's."""
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.accesslog = config.errorlog = None
    config.include_server_header = False
    config.keep_alive_timeout = KEEP_ALIVE_S
    return config


class _ContainedServer(TCPServer):
    """One connection."""

    async def run(self) -> None:
        """Serve it until it ends, by whatever."""
        try:
            await super().run()
        except* Exception as errors:  # noqa: BLE001 - whatever it is, it is this connection's
            structlog.get_logger(room="http").warning("a connection broke", reason=repr(errors.exceptions[0]))


run.TCPServer = _ContainedServer  # type: ignore[attr-defined]
