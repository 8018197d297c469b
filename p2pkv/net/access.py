"""Who is served at the doors for clients, HTTP and `/control`.

No foreign web page is; and where the user has configured a cluster key, only who shows one of its tokens: the full one, which
allows every call, or the read-only one, which allows those that change nothing.
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from p2pkv.browser_guard import FORBIDDEN, Refusal, refuse_browser

UNAUTHORIZED = 401
OPEN_CALLS = frozenset({"livez", "readyz"})
"""For who watches over processes, and has no business with their caches."""
READING_CALLS = OPEN_CALLS | {
    "check_finish",
    "event",
    "events",
    "full_lookup",
    "health",
    "inventory",
    "lookup",
    "members",
    "query_instance",
    "query_worker_info",
    "watch",
}
"""Calls that change nothing, by name; a call that isn't here needs the full token."""
READING_METHODS = frozenset({"GET", "HEAD"})


class Access(Enum):
    """What a client may do."""

    NONE = auto()
    READ_ONLY = auto()
    FULL = auto()

    def refuse(self, call: str) -> Refusal | None:
        """Why a call of this name is refused; None when it may be made."""
        if self is Access.FULL or call in OPEN_CALLS:
            return None
        if self is Access.NONE:
            detail = "This cluster wants a token: send it as 'Authorization: Bearer TOKEN'; `p2pkv token` prints it."
            return Refusal(UNAUTHORIZED, detail)
        if call in READING_CALLS:
            return None
        return Refusal(FORBIDDEN, "The read-only token doesn't allow this call; show the full one.")

    def refuse_http(self, method: str, path: str) -> Refusal | None:
        """The same for a request over HTTP, whose method may say that it changes nothing."""
        refusal = self.refuse(path.strip("/"))
        return None if self is Access.READ_ONLY and method in READING_METHODS else refusal


@dataclass(frozen=True, slots=True)
class AccessTokens:
    """The two tokens of a cluster."""

    full: str = field(repr=False)
    read_only: str = field(repr=False)

    def access(self, authorization: str | None) -> Access:
        """What `Authorization` allows, in the same time whatever it is."""
        scheme, _, shown = (authorization or "").partition(" ")
        is_full, is_read_only = (
            hmac.compare_digest(shown.encode(), token.encode()) and scheme.lower() == "bearer"
            for token in (self.full, self.read_only)
        )
        return Access.FULL if is_full else Access.READ_ONLY if is_read_only else Access.NONE


@dataclass(frozen=True, slots=True)
class DoorGuard:
    """What is asked of every request before it is served.

    Attributes:
        ports: All that this node's doors listen on.
        hosts: What this node is called beyond loopback; empty when it can't be reached from there.
        tokens: What clients must show; None where they needn't.
    """

    ports: frozenset[int]
    hosts: frozenset[str] = frozenset()
    tokens: AccessTokens | None = None

    def refuse_page(self, headers: Mapping[bytes, str]) -> Refusal | None:
        """Why a request with these headers, names in lower case, isn't taken from its sender; None when it is."""
        return refuse_browser(
            host=headers.get(b"host"),
            origin=headers.get(b"origin"),
            fetch_site=headers.get(b"sec-fetch-site"),
            ports=self.ports,
            hosts=self.hosts,
        )

    def access(self, headers: Mapping[bytes, str]) -> Access:
        """What a client that sends these headers may do."""
        return Access.FULL if self.tokens is None else self.tokens.access(headers.get(b"authorization"))
