"""Which addresses a node dials: what it was told by name, and networks; never what a peer makes up."""

from ipaddress import ip_network

import pytest

from p2pkv.core.ids import Address
from p2pkv.errors import DialRefusedError
from p2pkv.net.dial_rules import LOOPBACK, DialRules, _ipv4_networks, _ipv6_networks, networks_of


async def test_addresses_of_allowed_networks_may_be_dialed_and_no_others() -> None:
    rules = DialRules([ip_network("10.0.0.0/24"), ip_network("fd00::/64")])
    for host in ("10.0.0.9", "fd00::9"):
        assert await rules.permitted(Address(host, 8002)) == [Address(host, 8002)]
    for host in ("10.0.1.9", "127.0.0.1", "::1", "fd00:0:0:1::9", "0.0.0.0", "::ffff:10.0.0.9", "169.254.169.254"):
        with pytest.raises(DialRefusedError, match="is neither a contact nor in allowed_peer_networks"):
            await rules.permitted(Address(host, 8002))


async def test_contacts_may_always_be_dialed_as_long_as_they_are_contacts() -> None:
    rules = DialRules([])
    rules.contacts_are([Address("10.0.1.9", 8002)])
    assert await rules.permitted(Address("10.0.1.9", 1)) == [Address("10.0.1.9", 1)]
    rules.contacts_are([])
    with pytest.raises(DialRefusedError):
        await rules.permitted(Address("10.0.1.9", 8002))


async def test_a_name_stands_for_addresses_that_are_judged_and_then_dialed() -> None:
    assert Address("127.0.0.1", 8002) in await DialRules(LOOPBACK).permitted(Address("localhost", 8002))
    with pytest.raises(DialRefusedError):
        await DialRules([ip_network("10.0.0.0/24")]).permitted(Address("localhost", 8002))


@pytest.mark.parametrize("host", ["no-such-name.invalid", "a" * 255, "ä..b", "1.2.3.4.5"])
async def test_a_name_that_stands_for_nothing_is_refused(host: str) -> None:
    with pytest.raises(DialRefusedError, match="can't be resolved"):
        await DialRules(LOOPBACK).permitted(Address(host, 8002))


async def test_a_loopback_nodes_network_is_loopback() -> None:
    assert await networks_of(["127.0.0.1", "localhost"]) == [network for network in LOOPBACK if network.version == 4]


def test_networks_are_read_as_the_kernel_shows_them() -> None:
    routes = (
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"  # the default route
        "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        "eth0\t0000000A\t010200C0\t0003\t0\t0\t0\t000000FF\t0\t0\t0\n"  # beyond a gateway
    )
    assert _ipv4_networks(routes) == [ip_network("192.0.2.0/24")]
    addresses = "fd000000000000000000000000000002 02 40 00 80     eth0\n00000000000000000000000000000001 01 80 10 80       lo\n"
    assert _ipv6_networks(addresses) == [ip_network("fd00::/64"), ip_network("::1/128")]
    assert _ipv4_networks("") == _ipv6_networks("") == []
