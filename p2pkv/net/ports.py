"""Binding the ports of a node's doors, with an error that names the port and the key that chose it."""

import errno
import socket

from p2pkv.core.ids import Address
from p2pkv.errors import ConfigError, PortInUseError
from p2pkv.net.names import Endpoint

BACKLOG = 128
"""Connections that wait to be accepted: a second's worth of a busy HTTP door."""


def listen_on(host: str, port: int, *, key: str) -> socket.socket:
    """A listening TCP socket, which a process that starts after this one ended can have again at once.

    Args:
        host: A name or address of this host; a name's IPv4 address is preferred.
        port: 0 for any free one.
        key: Of the configuration, for the error.

    Raises:
        PortInUseError: It is taken.
        ConfigError: It can't be bound for another reason.
    """
    return listen_at(_endpoint(host, port, key), key=key)


def listen_at(endpoint: Endpoint, *, key: str) -> socket.socket:
    """As `listen_on`, at an address that is resolved."""
    bound = socket.socket(endpoint.family, socket.SOCK_STREAM)
    host, port = endpoint.place[:2]
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(endpoint.place)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(f"{key}: port {port} of {host} is in use; stop what uses it, or choose another") from error
        raise ConfigError(f"{key}: port {port} of {host} can't be bound: {error.strerror}") from error
    return bound


def address_of(bound: socket.socket, host: str) -> Address:
    """What to tell others: `host`, with the port that `bound` has."""
    return Address(host=host, port=bound.getsockname()[1])


def _endpoint(host: str, port: int, key: str) -> Endpoint:
    try:
        family, _, _, _, place = min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except OSError as error:
        raise ConfigError(f"{key}: {host} can't be used: {error.strerror}") from error
    return Endpoint(family, place)  # type: ignore[arg-type]  # only IP has TCP sockets
