"""What a node must bear at its HTTP ports: requests that are broken, half, too much, or ask for another protocol."""

import json
import re
from collections.abc import Callable
from random import Random

import trio

from p2pkv.core.ids import Address
from p2pkv.net.http.app import ROUTES
from p2pkv.net.http.server import MAX_HEADER_NBYTES
from tests.live.hostile.attack import END_S, PEEK_S, Tally, Target, connected, half_close, receive, send
from tests.live.hostile.control import request as control_request
from tests.live.hostile.damage import damaged, damaged_json
from tests.live.hostile.websocket import broken_frames, handshake

STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ?[^\r\n]*\r\n")
PATHS = {call.name: (method, path) for method, path, call in ROUTES}
H2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LONG_IN_EVERY = 5000
NO_SUCH_CODING = 501
"""For a transfer coding that nobody knows: RFC 9112, section 6.1."""


async def strike_http(rng: Random, target: Target, tally: Tally) -> None:
    """A client of HTTP: what is a request is answered, in our shape and never as a bug; what isn't ends the connection."""
    address = rng.choice(target.http)
    async with connected(address) as stream:
        if rng.random() < 0.5:
            await _ask(rng, address, stream, tally)
        else:
            await _disturb(rng, address, stream, tally)


async def _ask(rng: Random, address: Address, stream: trio.SocketStream, tally: Tally) -> None:
    """Whole requests, one after the other or at once; each has its answer, until one ends the connection."""
    answers = _Answers(stream)
    for _ in range(rng.randint(1, 4)):
        requests = [_request(rng, address) for _ in range(rng.choice([1, 1, 1, 2, 5]))]
        if not await send(stream, b"".join(requests), bytewise=len(requests) == 1 and rng.random() < 0.02):
            break
        for _ in requests:
            status = await answers.next_status()
            if status is None:
                return
            tally.frames += 1
            tally.outcomes[str(status)] += 1


def _request(rng: Random, address: Address) -> bytes:
    """A request whose end is where it says, and whose path, method, headers and body may be any."""
    name, values = control_request(rng)
    method, path = PATHS.get(name, ("POST", "/watch"))
    if rng.random() < 0.2:
        method = rng.choice(["GET", "POST", "DELETE", "PUT", "OPTIONS", "PATCH", "TRACE", "BREW"])
    if rng.random() < 0.1:
        path = rng.choice(
            ["/", "/docs", "/openapi.json", "//", "/%00", "/events/%ff", "/events/" + "x" * 3000, "/move?x=1", "/..", "*"]
        )
    if method != "POST" and rng.random() < 0.5:
        path += rng.choice(
            ["?instance=a", "?instance=a&instance=b", "?cursor=%00&instance=b", "?x", "?=&=", "?instance=" + "%41" * 2000]
        )
    body = b""
    if method == "POST" and rng.random() < 0.95:
        body = (json.dumps(values) if rng.random() < 0.2 else damaged_json(rng, values)).encode()
    if rng.random() < 1 / LONG_IN_EVERY:
        body = b" " * (17 * 2**20)
    headers = [f"Host: {address}"]
    if rng.random() < 0.9:
        headers.append("Content-Type: application/json")
    if rng.random() < 0.2:
        headers.append(
            rng.choice(
                [
                    "Origin: http://evil.example",
                    "Sec-Fetch-Site: cross-site",
                    "Content-Type: text/plain",
                    "Accept: nothing/*;q=x",
                    "Content-Encoding: gzip",
                    "Authorization: Bearer \xe9",
                    "Cookie: " + "a=b;" * 500,
                    "X-\x7e: \t",
                    "Range: bytes=9-1,x",
                ]
            )
        )
    head = f"{method} {path} HTTP/1.1\r\n" + "\r\n".join(headers)
    if body and rng.random() < 0.2:
        return f"{head}\r\nTransfer-Encoding: chunked\r\n\r\n".encode("latin-1") + _chunked(rng, body)
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode("latin-1") + body


def _chunked(rng: Random, body: bytes) -> bytes:
    """A body in chunks of random sizes."""
    chunks = bytearray()
    while body:
        size = rng.choice([1, 2, 100, len(body)])
        piece, body = body[:size], body[size:]
        chunks += b"%x%b\r\n%b\r\n" % (len(piece), rng.choice([b"", b";x=1", b" "]), piece)
    return bytes(chunks + b"0\r\n" + rng.choice([b"", b"X: trailer\r\n"]) + b"\r\n")


async def _disturb(rng: Random, address: Address, stream: trio.SocketStream, tally: Tally) -> None:
    """One thing that is no request; the node may wait for its rest, so nothing must come, but what comes must be right."""
    await send(stream, _disturbance(rng, address), bytewise=rng.random() < 0.02)
    tally.frames += 1
    if rng.random() < 0.2:
        return
    if rng.random() < 0.3:
        await half_close(stream)
    answers = _Answers(stream)
    with trio.move_on_after(PEEK_S):
        status = await answers.next_status()
        tally.outcomes[f"disturbed: {status}"] += 1


def _disturbance(rng: Random, address: Address) -> bytes:
    valid = _request(rng, address)
    head, _, body = valid.partition(b"\r\n\r\n")
    upgrade = handshake(address, rng.choice(["/", "/control", "/livez"]))
    h2c = b"GET /livez HTTP/1.1\r\nHost: %b\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n" % str(address).encode()
    kinds: list[Callable[[], bytes]] = [
        lambda: damaged(rng, valid),
        lambda: damaged(rng, head) + b"\r\n\r\n" + body,
        lambda: valid[: rng.randrange(len(valid))],
        lambda: rng.randbytes(rng.randint(1, 5000)),
        lambda: head + b"\r\nX: " + b"x" * rng.choice([MAX_HEADER_NBYTES, 10 * MAX_HEADER_NBYTES]) + b"\r\n\r\n",
        lambda: head + b"\r\nX: 1" * rng.randint(100, 3000) + b"\r\n\r\n" + body,
        lambda: (
            head
            + rng.choice([b"\r\nContent-Length: 5", b"\r\nContent-Length: -1", b"\r\nTransfer-Encoding: chunked"])
            + b"\r\n\r\n"
            + body
        ),
        lambda: (
            head + b"\r\nTransfer-Encoding: " + rng.choice([b"gzip", b"chunked, chunked", b"\x0bchunked"]) + b"\r\n\r\n" + body
        ),
        lambda: (
            head
            + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
            + rng.choice([b"fffffffffffffffff\r\n", b"-1\r\n", b"zz\r\n", b"5\r\nab"])
        ),
        lambda: head + b"\r\nExpect: " + rng.choice([b"100-continue", b"the unexpected"]) + b"\r\n\r\n",
        lambda: valid.replace(b"\r\n", b"\n"),
        lambda: valid.replace(b"HTTP/1.1", rng.choice([b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.11", b"http/1.1", b""])),
        lambda: valid.replace(
            b"Host: ", rng.choice([b"Host: evil.example:1, ", b"Hos: ", b"Host: x\r\nHost: ", b"Host:\r\n "])
        ),
        lambda: b"\r\n" * rng.randint(1, 2000) + valid,
        lambda: b"CONNECT " + str(address).encode() + b" HTTP/1.1\r\nHost: x\r\n\r\n\x16\x03\x01" + rng.randbytes(50),
        lambda: b"\x16\x03\x01\x02\x00\x01" + rng.randbytes(500),
        lambda: upgrade + broken_frames(rng),
        lambda: damaged(rng, upgrade),
        lambda: (
            h2c + b"HTTP2-Settings: " + rng.choice([b"!!", b"", b"AAMAAABkAARAAAAAAAIAAAAA"]) + b"\r\n\r\n" + _h2_frames(rng)
        ),
        lambda: H2_PREFACE + _h2_frames(rng),
        lambda: damaged(rng, H2_PREFACE) + _h2_frames(rng),
    ]
    return rng.choice(kinds)()


def _h2_frames(rng: Random) -> bytes:
    """HTTP/2 frames that begin well and go on badly."""
    frames = bytearray(H2_PREFACE if rng.random() < 0.3 else b"")
    frames += bytes(3) + b"\x04\x00" + bytes(4)  # SETTINGS, empty
    for _ in range(rng.randrange(8)):
        payload = rng.randbytes(rng.randrange(60))
        claimed = len(payload) if rng.random() < 0.8 else rng.getrandbits(24)
        stream = rng.choice([0, 1, 3, 2, 2**31 - 1, 2**32 - 1])
        frames += claimed.to_bytes(3) + bytes([rng.randrange(12), rng.getrandbits(8)]) + stream.to_bytes(4) + payload
    return bytes(frames)


class _Answers:
    """The answers that come on a connection; each is checked."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._received = b""

    async def next_status(self) -> int | None:
        """The status of the next answer; None when the node has ended the connection, or speaks another protocol."""
        with trio.fail_after(END_S):
            while (match := STATUS.match(self._received)) is None or b"\r\n\r\n" not in self._received:
                if self._received and not b"HTTP/1.".startswith(self._received[:7]):
                    return None
                if not await self._receive_more():
                    return None
            status = int(match[1])
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            if status < 200:
                return await self.next_status()
            nbytes = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            body = b""
            if nbytes is not None:
                while len(self._received) < int(nbytes[1]):
                    if not await self._receive_more():
                        return None
                body, self._received = self._received[: int(nbytes[1])], self._received[int(nbytes[1]) :]
        assert status < 500 or status == NO_SUCH_CODING, (status, body)
        if status >= 400 and body:
            answer = json.loads(body)
            assert answer["detail"], answer
            assert answer["error"] not in ("", "internal_error"), answer
        return status

    async def _receive_more(self) -> bool:
        data = await receive(self._stream)
        self._received += data
        return bool(data)
