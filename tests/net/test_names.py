"""Names of hosts, as a name server that is slow, wrong or rich in answers has them."""

import socket
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import trio
import trio.abc
import trio.testing

from p2pkv.core.ids import Address
from p2pkv.net.names import dialable, is_of_this_host, resolve

Endpoints = Sequence[tuple[int, tuple[Any, ...]]]


class NameServer(trio.abc.HostnameResolver):
    """Knows these names and no others; one without addresses it never answers for."""

    def __init__(self, names: Mapping[str, Sequence[str]]) -> None:
        self._names = names

    async def getaddrinfo(
        self,
        host: bytes | None,
        port: Any,
        family: int = 0,
        type: int = 0,  # noqa: A002 - as trio calls it
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        assert host is not None
        addresses = self._names.get(host.decode())
        if addresses is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        if not addresses:
            await trio.sleep_forever()
        return [
            (socket.AF_INET6, type, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, type, 6, "", (address, port))
            for address in addresses
        ]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        raise NotImplementedError


@pytest.fixture
async def names() -> None:
    names = {"many": ["fd00::1", "10.0.0.2", "10.0.0.1", "10.0.0.2"], "silent": []}
    trio.socket.set_custom_hostname_resolver(NameServer(names))


async def test_a_name_stands_for_all_its_hosts_each_once_ipv4_first(names: None) -> None:
    found = await resolve(Address("many", 9001))
    assert [endpoint.address for endpoint in found] == [
        Address("10.0.0.1", 9001),
        Address("10.0.0.2", 9001),
        Address("fd00::1", 9001),
    ]


async def test_what_cannot_be_resolved_stands_for_nobody(names: None, autojump_clock: trio.testing.MockClock) -> None:
    assert await resolve(Address("unknown", 1)) == []
    assert await resolve(Address("a" * 64 + ".example", 1)) == []
    began_at = trio.current_time()
    assert await resolve(Address("silent", 1)) == []
    assert trio.current_time() - began_at == pytest.approx(2.0)


async def test_names_are_looked_up_together_and_hosts_stay_as_they_are(
    names: None, autojump_clock: trio.testing.MockClock
) -> None:
    asked = [Address("silent", 1), Address("10.1.1.1", 2), Address("localhost", 3), Address("silent", 4), Address("many", 5)]
    began_at = trio.current_time()
    found = await dialable(asked)
    assert trio.current_time() - began_at == pytest.approx(2.0)
    hosts = ["10.1.1.1", "localhost", "10.0.0.1", "10.0.0.2", "fd00::1"]
    assert [address.host for address in found] == hosts
    assert [address.port for address in found] == [2, 3, 5, 5, 5]


async def test_own_addresses_are_told_from_others_even_when_the_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (here,) = await resolve(Address("127.0.0.1", taken.getsockname()[1]))
        assert is_of_this_host(here)
    (there,) = await resolve(Address("192.0.2.1", 1))  # reserved for documentation
    assert not is_of_this_host(there)
