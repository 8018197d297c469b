"""Which addresses this node dials: those that the user or this host's runtime directory named, and those in allowed networks.

Members tell of each other's addresses, and one of them may lie, or be wrong: without a rule it could have every node of the
cluster knock on any port of any host. Names are resolved here, and what they stand for is judged and then dialed: no name can
stand for one address when it is judged and for another when it is dialed.
"""

import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path

from p2pkv.core.ids import Address
from p2pkv.errors import DialRefusedError
from p2pkv.net.logs import logger
from p2pkv.net.names import resolve

Network = IPv4Network | IPv6Network

LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
IPV4_ROUTES, IPV6_ADDRESSES = Path("/proc/net/route"), Path("/proc/net/if_inet6")
WARNED_MAX = 1024
"""Refused addresses that are remembered, so that each is warned of once."""

_log = logger("dial_rules")


class DialRules:
    """The rules of one node.

    Args:
        networks: Where members may be dialed.
    """

    def __init__(self, networks: Iterable[Network]) -> None:
        self._networks = tuple(networks)
        self._contacts: frozenset[str] = frozenset()
        self._warned: set[Address] = set()

    def contacts_are(self, addresses: Iterable[Address]) -> None:
        """These hosts may be dialed, whatever their network."""
        self._contacts = frozenset(address.host for address in addresses)

    def may_dial(self, host: str) -> bool:
        """Whether the host at an IP address may be dialed."""
        if host in self._contacts:
            return True
        address = ip_address(host)
        return any(address in network for network in self._networks)

    async def permitted(self, address: Address) -> list[Address]:
        """What to dial to reach `address`: IP addresses, in order of preference, at least one.

        Raises:
            DialRefusedError: There are none, or none that may be dialed.
        """
        if address.host in self._contacts:
            return [address]
        found = [endpoint.address for endpoint in await resolve(address)]
        if not found:
            raise DialRefusedError(f"{address.host} can't be resolved")
        permitted = [place for place in found if self.may_dial(place.host)]
        if not permitted:
            refused = f"{', '.join(place.host for place in found)} is neither a contact nor in allowed_peer_networks"
            self._warn(address, refused)
            raise DialRefusedError(refused)
        return permitted

    def _warn(self, address: Address, reason: str) -> None:
        if address not in self._warned and len(self._warned) < WARNED_MAX:
            self._warned.add(address)
            networks = ", ".join(map(str, self._networks))
            _log.warning("an address isn't dialed", address=str(address), reason=reason, allowed_peer_networks=networks)


async def networks_of(hosts: Iterable[str]) -> list[Network]:
    """The networks that this host's own addresses among `hosts` lie in, as its interfaces know them."""
    addresses = {endpoint.address.host for host in hosts for endpoint in await resolve(Address(host, 1))}
    known = [*LOOPBACK, *_ipv4_networks(_read(IPV4_ROUTES)), *_ipv6_networks(_read(IPV6_ADDRESSES))]
    return [network for network in known if any(ip_address(address) in network for address in addresses)]


def _read(path: Path) -> str:
    """One of the kernel's tables; without IPv6 it has not all of them."""
    return path.read_text(encoding="ascii") if path.exists() else ""


def _ipv4_networks(table: str) -> list[IPv4Network]:
    """The networks that are reached without a gateway, from `/proc/net/route`, where numbers have the machine's byte order."""
    networks = []
    for line in table.splitlines()[1:]:
        _, destination, gateway, *_, mask, _, _, _ = line.split()
        if int(gateway, 16) == 0 and int(mask, 16) != 0:
            place, netmask = (IPv4Address(socket.htonl(int(number, 16))) for number in (destination, mask))
            networks.append(IPv4Network(f"{place}/{netmask}"))
    return networks


def _ipv6_networks(table: str) -> list[IPv6Network]:
    """The networks of this host's addresses, from `/proc/net/if_inet6`."""
    fields = (line.split() for line in table.splitlines())
    return [IPv6Network((bytes.fromhex(place), int(length, 16)), strict=False) for place, _, length, *_ in fields]
