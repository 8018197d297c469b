"""No web page may command a node: which requests a browser sent on behalf of a page that isn't ours.

A browser always tells the truth in these three headers, and other clients have no reason to send the last two:

- `Host` must be a loopback name with one of our ports, so that a name which an attacker points at 127.0.0.1 gets nowhere. Where
  this node can be reached from beyond loopback, its names there are its own too, and so is any IP address: nobody can point one
  elsewhere.
- `Origin`, where present, must be our own pages'.
- `Sec-Fetch-Site`, where present, must be `same-origin`, or `none` (typed in by the user).
"""

from collections.abc import Collection
from dataclasses import dataclass

from p2pkv.config import is_address, is_loopback

OUR_FETCH_SITES = ("same-origin", "none")
MISDIRECTED = 421
FORBIDDEN = 403


@dataclass(frozen=True, slots=True)
class Refusal:
    """How to refuse a request: the HTTP status, and a sentence."""

    status: int
    reason: str


def refuse_browser(
    *, host: str | None, origin: str | None, fetch_site: str | None, ports: Collection[int], hosts: Collection[str] = ()
) -> Refusal | None:
    """Why a request that carries these headers is refused; None when it may go on.

    Args:
        host: `Host`.
        origin: `Origin`; None when absent.
        fetch_site: `Sec-Fetch-Site`; None when absent.
        ports: All ports that this node's doors listen on.
        hosts: What this node is called beyond loopback; empty when it can't be reached from there.
    """
    if host is None or not _is_ours(host, ports, hosts):
        return Refusal(MISDIRECTED, "The Host header names no address of this node; ask it by an address that it shows.")
    if origin is not None and not (origin.startswith("http://") and _is_ours(origin.removeprefix("http://"), ports, hosts)):
        return Refusal(FORBIDDEN, "Web pages of other origins may not talk to this node.")
    if fetch_site is not None and fetch_site not in OUR_FETCH_SITES:
        return Refusal(FORBIDDEN, "Web pages of other sites may not talk to this node.")
    return None


def _is_ours(authority: str, ports: Collection[int], hosts: Collection[str]) -> bool:
    bracketed, _, port = authority.lower().rpartition(":")
    name = bracketed.removeprefix("[").removesuffix("]")
    is_our_name = is_loopback(name) or (bool(hosts) and (is_address(name) or name in map(str.lower, hosts)))
    return is_our_name and port in map(str, ports)
