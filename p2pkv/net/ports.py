"""Binding the ports of a node's doors, with an error that names the port and the key that chose it."""

import errno
import socket

from p2pkv.core.ids import Address
from p2pkv.errors import ConfigError, PortInUseError

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
    return _bound(host, port, key=key, is_listening=True)


def reserve(host: str, port: int, *, key: str) -> socket.socket:
    """A TCP socket that keeps the port from others and doesn't listen: connecting there is refused. As `listen_on`."""
    return _bound(host, port, key=key, is_listening=False)


def address_of(bound: socket.socket, host: str) -> Address:
    """What to tell others: `host`, with the port that `bound` has."""
    return Address(host=host, port=bound.getsockname()[1])


def _bound(host: str, port: int, *, key: str, is_listening: bool) -> socket.socket:
    try:
        family, _, _, _, place = min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"{key}: {host} can't be used: {error.strerror}") from error
    try:
        if is_listening:  # then old connections don't keep the port; where nobody listens, two nodes could have it at once
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(place)
        if is_listening:
            bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(f"{key}: port {port} of {host} is in use; stop what uses it, or choose another") from error
        raise ConfigError(f"{key}: port {port} of {host} can't be bound: {error.strerror}") from error
    return bound
