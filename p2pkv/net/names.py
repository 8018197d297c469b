"""Names of hosts: resolved off the event loop and within a deadline, as a name server may take its time, and dialed."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import trio

from p2pkv.config import is_loopback
from p2pkv.core.ids import Address
from p2pkv.net.logs import logger

RESOLVE_S = 2.0
"""A name server of the same network answers in milliseconds; a node that waits for one longer starts without."""

_log = logger("names")


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """A resolved address: what a socket can be bound to, and what it then says that it is bound to.

    Attributes:
        family: AF_INET or AF_INET6, in order of preference.
        place: Host and port, and for AF_INET6 two numbers more.
    """

    family: int
    place: tuple[str, int] | tuple[str, int, int, int]

    @property
    def address(self) -> Address:
        """The same, for people and for other nodes."""
        return Address(host=self.place[0], port=self.place[1])


async def resolve(address: Address) -> list[Endpoint]:
    """All that `address` stands for, in order of preference; empty when that can't be found out within `RESOLVE_S`."""
    reason = f"no answer within {RESOLVE_S:g} s"
    with trio.move_on_after(RESOLVE_S):
        try:
            found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            return sorted({Endpoint(family, place) for family, _, _, _, place in found})  # type: ignore[arg-type]  # IP only
        except (OSError, UnicodeError) as error:  # UnicodeError: no host can have such a name
            reason = str(error)
    _log.warning("a name can't be resolved", host=address.host, reason=reason)
    return []


def is_of_this_host(endpoint: Endpoint) -> bool:
    """Whether a socket can be bound there, whatever has the port."""
    with socket.socket(endpoint.family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((endpoint.place[0], 0, *endpoint.place[2:]))
        except OSError:
            return False
    return True


async def connect(places: Sequence[Address], *, within_s: float) -> tuple[Address, trio.SocketStream]:
    """The first of `places` that takes a connection within its share of the time, and that connection.

    Args:
        places: IP addresses of one host, to be tried in turn; at least one.
        within_s: For all of them; the last takes what the caller's deadline leaves it.

    Raises:
        OSError: The last one takes none.
    """
    for place in places[:-1]:
        with trio.move_on_after(within_s / len(places)):
            try:
                return place, await trio.open_tcp_stream(place.host, place.port)
            except OSError as error:
                _log.debug("the next address is tried", address=str(place), reason=str(error))
    return places[-1], await trio.open_tcp_stream(places[-1].host, places[-1].port)


async def dialable(addresses: Sequence[Address]) -> list[Address]:
    """What to dial to reach all that are behind `addresses`: hosts as they are, and all that names stand for."""
    found = [[address] for address in addresses]

    async def look_up(index: int) -> None:
        found[index] = [endpoint.address for endpoint in await resolve(addresses[index])]

    async with trio.open_nursery() as nursery:
        for index, address in enumerate(addresses):
            if not is_loopback(address.host):
                nursery.start_soon(look_up, index)
    return list(chain.from_iterable(found))
