"""How a command reaches a node: over HTTP, at the first address where one answers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from p2pkv.cluster_key import access_token
from p2pkv.config import NodeConfig, parse_address
from p2pkv.core.ids import Address
from p2pkv.errors import ConfigError, ErrorCode, Failure, NodeUnreachableError, P2pkvError, failure_error
from p2pkv.rendezvous import living_cards, runtime_directory

DEFAULT_SHARED_ADDRESS = Address("localhost", 9000)
DEFAULT_CLUSTER = "p2pkv"
CONNECT_S = 2.0
ANSWER_S = 30.0
"""A node answers a move within its `wait_s`, at most 5 s here, and the 5 s that planning may take."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a node answered.

    Attributes:
        status: Of HTTP.
        body: The JSON object; of an error, its `detail` and `error`.
    """

    status: int
    body: dict[str, Any]

    @property
    def is_success(self) -> bool:
        """Whether the call did what it should."""
        return self.status < 400


class NodeClient:
    """Calls to the node at one address."""

    def __init__(self, http: httpx2.Client) -> None:
        self._http = http

    @property
    def url(self) -> str:
        """Where it calls."""
        return str(self._http.base_url).rstrip("/")

    def ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        """Make one call that should succeed, and give its answer's fields.

        Raises:
            NodeUnreachableError: As `call`.
            P2pkvError: The node refused; a `FailureError` where it said why in a code of ours.
        """
        reply = self.call(method, path, body)
        if not reply.is_success:
            raise _refusal(reply)
        return reply.body

    def call(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Reply:
        """Make one call.

        Raises:
            NodeUnreachableError: Nothing answered there, or something that is no node.
        """
        try:
            response = self._http.request(method, path, json=body)
            answer = response.json()
        except httpx2.TransportError as error:
            raise NodeUnreachableError(f"no node answers at {self._http.base_url}: {error}") from error
        except ValueError as error:
            raise _stranger(self._http.base_url) from error
        if not isinstance(answer, dict):
            raise _stranger(self._http.base_url)
        return Reply(response.status_code, answer)


@contextmanager
def open_client(via: str | None, environ: Mapping[str, str], *, answer_s: float = ANSWER_S) -> Iterator[NodeClient]:
    """A client of the node at `via`, or else of the first that answers: on the shared port, then in the runtime directory.

    Args:
        via: URL of a node's HTTP door.
        environ: Where the node is, if `via` doesn't say so, and what it wants to be shown.
        answer_s: How long each call waits for its answer, in seconds.

    Raises:
        ConfigError: The runtime directory, or the configuration that says where the node is and what it wants to be shown,
            can't be used.
        NodeUnreachableError: Nothing answers at any of these.
    """
    token = access_token(environ)
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    url = via or _find_node(environ)
    try:
        # No proxy: a node is reached directly or not at all.
        timeout = httpx2.Timeout(answer_s, connect=min(CONNECT_S, answer_s))
        http = httpx2.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False)
    except httpx2.InvalidURL as error:
        raise NodeUnreachableError(f"{url} is no address of a node: {error}") from error
    with http:
        yield NodeClient(http)


def _refusal(reply: Reply) -> P2pkvError:
    detail = str(reply.body.get("detail", reply.body))
    try:
        return failure_error(Failure(ErrorCode(reply.body.get("error", "")), detail))
    except ValueError:  # the door's own, such as a page's
        return P2pkvError(detail)


def _stranger(url: httpx2.URL) -> NodeUnreachableError:
    return NodeUnreachableError(f"what answers at {url} is no node")


def _find_node(environ: Mapping[str, str]) -> str:
    tried = []
    for url in _addresses(environ):
        try:
            answer = httpx2.get(f"{url}/livez", timeout=CONNECT_S, trust_env=False)
            if answer.status_code == 200 and answer.json() == {}:
                return url
        except (httpx2.TransportError, ValueError):  # nobody is there, or a stranger
            pass
        tried.append(url)
    raise NodeUnreachableError(f"no node answers at {', '.join(tried)}; start one, or name one with --via http://host:port")


def _addresses(environ: Mapping[str, str]) -> Iterator[str]:
    shared, cluster = _shared_port(environ)
    yield f"http://{shared}"
    for card in living_cards(runtime_directory(environ), cluster):
        yield card.http


def _shared_port(environ: Mapping[str, str]) -> tuple[Address, str]:
    """The shared port and the name of the cluster, as a variable says, or the configuration that one names."""
    if environ.get("P2PKV_CONFIG_FILE") or environ.get("LMCACHE_CONFIG_FILE"):
        config = NodeConfig.of_client(environ)
        return config.controller_http_url, config.cluster
    named = environ.get("P2PKV_CONTROLLER_HTTP_URL")
    try:
        shared = parse_address(named) if named else DEFAULT_SHARED_ADDRESS
    except ValueError as error:
        raise ConfigError(f"P2PKV_CONTROLLER_HTTP_URL: {error}") from error
    return shared, environ.get("P2PKV_CLUSTER") or DEFAULT_CLUSTER
