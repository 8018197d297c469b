"""Hypercorn as we run it: what one connection does is over with that connection, and takes nothing along."""

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from starlette.types import ASGIApp, Receive, Scope, Send

from p2pkv import http_server
from p2pkv.net.http.server import serve_http

pytestmark = pytest.mark.live

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


async def answering(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers, a little later."""
    assert scope["type"] == "http"  # it has no lifespan, and is asked for one
    await trio.sleep(0.001)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def serving(application: ASGIApp = answering) -> AsyncIterator[int]:
    """The port at which it is served."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_http, application, listener)
        yield port
        nursery.cancel_scope.cancel()


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with serving() as port:
        yield port


@asynccontextmanager
async def gives_back() -> AsyncIterator[None]:
    """What happens inside leaves no descriptor open, and no task running, at either end."""
    before = descriptors_and_tasks()
    yield
    with trio.fail_after(2):
        while descriptors_and_tasks() != before:  # noqa: ASYNC110 - a descriptor's end is nobody's event
            await trio.sleep(0.01)


def descriptors_and_tasks() -> tuple[int, int]:
    return len(list(Path("/proc/self/fd").iterdir())), trio.lowlevel.current_statistics().tasks_living


async def answer_of(stream: trio.SocketStream) -> bytes:
    with trio.fail_after(2):
        return b"".join([part async for part in stream])


@pytest.mark.parametrize("sent", [b"", b"GET / HT", GET, GET * 3])
async def test_a_client_that_has_gone_keeps_nothing(port: int, sent: bytes) -> None:
    async with gives_back():
        for linger_s in (None, 0):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(sent)
            if linger_s is not None:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, linger_s))
            await stream.aclose()


async def test_a_body_that_nobody_reads_keeps_nothing(port: int) -> None:
    async with gives_back(), await trio.open_tcp_stream("127.0.0.1", port) as stream:
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        await stream.send_all(head + b"1\r\nx\r\n" * 100)
        assert (await answer_of(stream)).endswith(b"ok")


@pytest.mark.parametrize(
    "sent",
    [
        LAST.replace(b"\r\nConnection: close", b"\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk"),
        LAST.replace(b"\r\nConnection: close", b"\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\nHTTP2-Settings: !!"),
    ],
    ids=["right", "broken"],
)
async def test_who_asks_for_http_2_is_answered_in_http_1(port: int, sent: bytes) -> None:
    async with gives_back(), await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(sent)
        assert (await answer_of(stream)).startswith(b"HTTP/1.1 200")


async def test_who_speaks_http_2_keeps_nothing(port: int) -> None:
    async with gives_back(), await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4\0" + bytes(4) + b"\xff" * 64)
        assert (await answer_of(stream)).startswith(b"HTTP/1.1 ")


async def test_one_connection_too_many_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 1)
    async with serving() as port:
        async with await trio.open_tcp_stream("127.0.0.1", port) as first:
            await first.send_all(GET)
            assert await first.receive_some(12) == b"HTTP/1.1 200"
            async with await trio.open_tcp_stream("127.0.0.1", port) as second:
                assert await answer_of(second) == b""
        await trio.testing.wait_all_tasks_blocked(0.05)
        async with await trio.open_tcp_stream("127.0.0.1", port) as third:
            await third.send_all(LAST)
            assert (await answer_of(third)).endswith(b"ok")


async def test_a_body_that_breaks_while_it_is_answered_is_no_bug_of_the_call() -> None:
    ended_count = 0

    async def answering_in_two(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal ended_count
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"o", "more_body": True})
        await receive()
        await send({"type": "http.response.body", "body": b"k"})
        ended_count += 1

    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with serving(answering_in_two) as port, gives_back():
        for _ in range(20):  # trio decides at random which of two tasks is first
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(head)
                while not (await stream.receive_some()).endswith(b"o"):
                    pass
                await stream.send_all(b"1\r\nx\r\nzz\r\n")
                await answer_of(stream)
    assert ended_count == 20
