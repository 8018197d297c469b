"""`small`: moves of a 12-token prompt between two instances of one host, over HTTP and over the websocket."""

import json
import socket
import sys
import time
from collections.abc import Sequence
from http.client import HTTPConnection
from statistics import quantiles
from typing import Self
from urllib.parse import urlsplit

import httpx2
import torch
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, Event, Message, Request, TextMessage

from p2pkv.engines import EngineCache, KVLayout
from p2pkv.net.control import CONTROL_PATH
from sims.bench.handoff import POSITION, wait_for_pair
from sims.bench.processes import NodeProcess, open_bench
from sims.bench.report import Row, print_rows

MOVES = 300
"""There and back; of each door."""
TOKENS = list(range(12))
LAYOUT = KVLayout(layers=4, kv_heads=2, head_dim=64, dtype="float32")


def run() -> Sequence[Row]:
    """Move it there and back over one connection, then over the other; each from the request to `done`."""
    with open_bench() as bench:
        nodes = [bench.start(name) for name in ("bench1", "bench2")]
        with httpx2.Client(base_url=nodes[0].http, trust_env=False) as client:
            wait_for_pair(client)
            members = client.get("/members").json()["members"]
        with EngineCache.attach(nodes[0].config, model="bench", layout=LAYOUT, autostart=False) as cache:
            assert cache.store(TOKENS, torch.zeros(LAYOUT.shape(len(TOKENS)))) == len(TOKENS)
        over_http = _moves_over_http(nodes)
        over_websocket = _moves_over_websocket(nodes, members[0]["ws"])
    return (
        *_rows("over HTTP, one connection", over_http, "<= 8"),
        *_rows("over the websocket", over_websocket, "<= 4"),
    )


def _moves_over_http(nodes: Sequence[NodeProcess]) -> list[float]:
    connection = HTTPConnection(urlsplit(nodes[0].http).netloc, timeout=10)
    took = []
    for index in range(MOVES):
        body = json.dumps(_request(nodes, index))
        began = time.perf_counter()
        connection.request("POST", "/move", body, {"Content-Type": "application/json"})
        reply = json.load(connection.getresponse())
        took.append(time.perf_counter() - began)
        _check(reply)
    connection.close()
    return took


def _moves_over_websocket(nodes: Sequence[NodeProcess], door: str) -> list[float]:
    took = []
    with _Socket(door) as socket_:
        for index in range(MOVES):
            message = json.dumps({"id": index, "type": "move", **_request(nodes, index)})
            began = time.perf_counter()
            reply = json.loads(socket_.ask(message))
            took.append(time.perf_counter() - began)
            _check(reply)
    return took


def _request(nodes: Sequence[NodeProcess], index: int) -> dict[str, object]:
    old, new = nodes if index % 2 == 0 else reversed(nodes)
    positions = {"old_position": [old.instance, POSITION], "new_position": [new.instance, POSITION]}
    return {**positions, "tokens": TOKENS, "wait_s": 5}


def _check(reply: dict[str, object]) -> None:
    assert (reply.get("state"), reply.get("num_tokens")) == ("done", len(TOKENS)), reply


def _rows(what: str, seconds: Sequence[float], target: str) -> Sequence[Row]:
    took = tuple(second * 1000 for second in seconds)
    return (
        Row(f"12-token move, request to done, {what}", "ms", took, target),
        Row(f"... the slowest of a hundred (p99), {what}", "ms", (quantiles(took, n=100)[-1],)),
    )


class _Socket:
    """A blocking websocket: an event loop in the client would add 0.4 ms to each answer."""

    def __init__(self, door: str) -> None:
        where = urlsplit(door)
        assert where.hostname is not None
        self._websocket = WSConnection(ConnectionType.CLIENT)
        self._connection = socket.create_connection((where.hostname, where.port), timeout=10)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.sendall(self._websocket.send(Request(host=where.netloc, target=CONTROL_PATH)))
        assert isinstance(self._next_event(), AcceptConnection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, message: str) -> str:
        self._connection.sendall(self._websocket.send(Message(message)))
        parts = []
        while True:
            event = self._next_event()
            assert isinstance(event, TextMessage), event
            parts.append(event.data)
            if event.message_finished:
                return "".join(parts)

    def _next_event(self) -> Event:
        while (event := next(self._websocket.events(), None)) is None:
            self._websocket.receive_data(self._connection.recv(65_536))
        return event


if __name__ == "__main__":
    print_rows("small", run(), as_json="--json" in sys.argv[1:])
