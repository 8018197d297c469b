"""The engine's answers over real connections: they come while they are written, and end when their reader goes away."""

import json
import socket
from collections.abc import AsyncIterator

import httpx2
import pytest
import trio

from p2pkv.engines.reference.engine import ReferenceEngine
from p2pkv.engines.reference.front import EngineFront
from p2pkv.engines.reference.model import make_tiny_llama
from p2pkv.engines.reference.server import serve_front

LONG = {"model": "p2pkv/tiny-llama", "prompt": "Where the cache lives", "max_tokens": 4000}
SHORT = {**LONG, "max_tokens": 1}
SOON_S = 2.0
"""Far less than the 10 s and more that the long answer takes."""


@pytest.fixture
async def client(nursery: trio.Nursery) -> AsyncIterator[httpx2.AsyncClient]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    await nursery.start(serve_front, EngineFront(ReferenceEngine(make_tiny_llama(), None), []), listener)
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
        yield client


async def ask(client: httpx2.AsyncClient, **fields: object) -> trio.SocketStream:
    """Send a request on a connection of its own, and leave the answer there."""
    port = client.base_url.port
    assert port is not None
    body = json.dumps({**LONG, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
    connection = await trio.open_tcp_stream("127.0.0.1", port)
    await connection.send_all(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


async def test_the_first_words_come_before_the_last_are_computed(client: httpx2.AsyncClient) -> None:
    received = b""
    with trio.fail_after(SOON_S):
        async with await ask(client, stream=True) as connection:
            while b'"text":' not in received:
                received += await connection.receive_some()
    assert b"[DONE]" not in received


async def test_a_whole_stream_ends_with_done(client: httpx2.AsyncClient) -> None:
    async with client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 20, "stream": True}) as reply:
        lines = [line async for line in reply.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert (await client.post("/v1/completions", json=SHORT)).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_the_model(client: httpx2.AsyncClient, stream: bool) -> None:
    async with await ask(client, stream=stream):
        await trio.sleep(0.3)  # the answer has begun, which without a stream can't be seen
    with trio.fail_after(SOON_S):
        assert (await client.post("/v1/completions", json=SHORT)).status_code == 200
