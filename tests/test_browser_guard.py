"""Which requests a browser may send us, as its headers tell."""

import pytest

from p2pkv.browser_guard import refuse_browser

PORTS = frozenset({9000, 8002})


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1:8002", "[::1]:9000", "LOCALHOST:9000"])
def test_our_own_names_and_ports_pass(host: str) -> None:
    assert refuse_browser(host=host, origin=None, fetch_site=None, ports=PORTS) is None


@pytest.mark.parametrize(
    "host", [None, "", "localhost", "localhost:9001", "evil.example:9000", "localhost.evil.example:9000", "127.0.0.1:9000.evil"]
)
def test_any_other_host_is_misdirected(host: str | None) -> None:
    refusal = refuse_browser(host=host, origin=None, fetch_site=None, ports=PORTS)
    assert refusal is not None
    assert refusal.status == 421


BEYOND = frozenset({"0.0.0.0", "Node-A.example"})


@pytest.mark.parametrize("host", ["localhost:9000", "0.0.0.0:8002", "node-a.EXAMPLE:9000", "10.0.0.1:9000", "[fd00::1]:8002"])
def test_beyond_loopback_a_nodes_own_names_pass_too_and_any_address(host: str) -> None:
    assert refuse_browser(host=host, origin=f"http://{host}", fetch_site=None, ports=PORTS, hosts=BEYOND) is None


@pytest.mark.parametrize(
    "host", ["10.0.0.1:9001", "evil.example:9000", "10.0.0.1.evil.example:9000", "10.0.0.1", ":9000", "[]:9000"]
)
def test_beyond_loopback_any_other_name_or_port_is_misdirected(host: str) -> None:
    refusal = refuse_browser(host=host, origin=None, fetch_site=None, ports=PORTS, hosts=BEYOND)
    assert refusal is not None
    assert refusal.status == 421


@pytest.mark.parametrize("host", ["10.0.0.1:9000", "[fd00::1]:9000"])
def test_on_loopback_an_address_beyond_it_is_misdirected(host: str) -> None:
    assert refuse_browser(host=host, origin=None, fetch_site=None, ports=PORTS) is not None


@pytest.mark.parametrize(("origin", "fetch_site"), [("http://localhost:9000", "same-origin"), (None, "none"), (None, None)])
def test_our_own_pages_pass(origin: str | None, fetch_site: str | None) -> None:
    assert refuse_browser(host="localhost:9000", origin=origin, fetch_site=fetch_site, ports=PORTS) is None


@pytest.mark.parametrize(
    ("origin", "fetch_site"),
    [
        ("http://evil.example", None),
        ("null", None),
        ("https://localhost:9000", None),
        ("http://localhost:3000", None),
        ("", None),
        (None, "cross-site"),
        (None, "same-site"),
        ("http://localhost:9000", "cross-site"),
    ],
)
def test_any_other_page_is_forbidden(origin: str | None, fetch_site: str | None) -> None:
    refusal = refuse_browser(host="localhost:9000", origin=origin, fetch_site=fetch_site, ports=PORTS)
    assert refusal is not None
    assert refusal.status == 403
