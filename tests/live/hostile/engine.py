"""What a node must bear at its engine socket: engines that lie, and processes that are none."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from random import Random

import trio

from p2pkv.core.keys import Identity
from p2pkv.errors import ErrorCode, RemoteProtocolError
from p2pkv.net.descriptors import receive_frame
from p2pkv.wire.engine import (
    ENGINE_PROTOCOL_VERSION,
    Attach,
    Attached,
    Commit,
    EngineReply,
    EngineRequest,
    Lent,
    LookupRequest,
    ReadDone,
    Refused,
    RetrieveRequest,
    StoreRequest,
    reply_codec,
    request_codec,
)
from p2pkv.wire.frames import encode_frame, rights
from p2pkv.wire.limits import MAX_MESSAGE_NBYTES
from tests.live.hostile.attack import END_S, Tally, Target, connected, half_close, send
from tests.live.hostile.damage import damaged, damaged_message, lying_frame
from tests.live.hostile.draw import Draw
from tests.live.hostile.peer import LONG_IN_EVERY

SMALL = Attach(
    ENGINE_PROTOCOL_VERSION, "hostile", None, "int8", layers=1, planes=1, kv_heads=1, head_dim=1, world_size=1, worker=0
)
"""A page a chunk: what these engines store is little, as nobody's chunks are to be evicted for it."""
PROMPTS = tuple(bytes([number, 0, 0, 0]) * length for number in range(8) for length in (1, 16, 33))
TOO_LARGE = 2**29
"""Bytes of one token: more than the attacked node's limit, so that nothing is evicted for it."""
IDENTITIES = Identity(), Identity(cache_salt="other")


class _Ended(Exception):  # noqa: N818 - no error: what a test waits for
    """The node ended the connection."""


async def strike_engine(rng: Random, target: Target, tally: Tally) -> None:
    """A process at the engine socket: each request is answered or refused by name, and what is none ends the connection."""
    async with connected(target.engine_socket) as stream:
        conversation = _Conversation(stream, tally)
        try:
            if rng.random() < 0.8:
                await conversation.ask(_attach(rng))
                for _ in range(rng.randint(1, 25)):
                    await conversation.ask(_request(rng, conversation.leases))
            await _break(rng, conversation)
        except _Ended:
            tally.frames += 1
            tally.outcomes["ended"] += 1


class _Conversation:
    """One connection to the engine socket."""

    def __init__(self, stream: trio.SocketStream, tally: Tally) -> None:
        self.stream = stream
        self.leases: list[str] = []
        self._tally = tally

    async def ask(self, request: EngineRequest) -> None:
        """Send a valid request, and take its answer if it has one."""
        if not await send(self.stream, encode_frame(request_codec().encode(request))):
            raise _Ended
        if not isinstance(request, ReadDone):
            reply = await self.take()
            if isinstance(reply, Lent) and reply.lease:
                self.leases.append(reply.lease)
            if isinstance(request, Attach) and not isinstance(reply, Attached):
                raise _Ended
        self._tally.frames += 1

    async def take(self) -> EngineReply:
        """The next answer, whose descriptors are closed."""
        try:
            with trio.fail_after(END_S):
                frame = await receive_frame(self.stream.socket)
        except ConnectionError:
            frame = None
        if frame is None:
            raise _Ended
        with frame:
            reply = reply_codec().decode(frame.payload)
            self._tally.outcomes[reply.failure.code if isinstance(reply, Refused) else type(reply).__name__] += 1
            return reply


async def _break(rng: Random, conversation: _Conversation) -> None:
    """What is no request: it is refused as a broken protocol, and the connection ends."""
    valid = request_codec().encode(_request(rng, conversation.leases))
    stream = conversation.stream
    must_refuse = False
    match rng.randrange(6):
        case 0:
            await send(stream, lying_frame(rng, valid), bytewise=rng.random() < 0.2)
        case 1:
            await send(stream, damaged(rng, encode_frame(valid)), bytewise=rng.random() < 0.2)
        case 2:
            await send_descriptors(rng, stream, encode_frame(valid))
        case 3 if rng.random() < 1 / LONG_IN_EVERY:
            await send(stream, encode_frame(bytes(MAX_MESSAGE_NBYTES)))
        case _:
            payload = damaged_message(rng, valid)
            must_refuse = not _is_request(payload)
            await send(stream, encode_frame(payload), bytewise=rng.random() < 0.2)
    if rng.random() < 0.2:
        raise _Ended  # by us, in the middle
    await half_close(stream)
    if must_refuse:
        reply = await conversation.take()
        assert isinstance(reply, Refused), reply
        assert reply.failure.code is ErrorCode.PROTOCOL_ERROR, reply
    while True:
        await conversation.take()


def _is_request(payload: bytes) -> bool:
    try:
        request_codec().decode(payload)
    except RemoteProtocolError:
        return False
    return True


async def send_descriptors(rng: Random, stream: trio.SocketStream, data: bytes) -> None:
    """A frame along with what no engine passes: files of all kinds, some of them in the frame's middle."""
    with _descriptors(rng) as descriptors:
        cut = rng.randrange(len(data))
        try:
            for part in (data[:cut], data[cut:]):
                if part:
                    await stream.socket.sendmsg([part], rights(rng.choices(descriptors, k=rng.choice([0, 1, 3, 253]))))
        except OSError:
            pass  # the node was faster


@contextmanager
def _descriptors(rng: Random) -> Iterator[list[int]]:
    """One of each kind."""
    with ExitStack() as stack:
        pair = [stack.enter_context(end) for end in socket.socketpair()]
        reading, writing = os.pipe()
        memory = os.memfd_create("hostile")
        os.ftruncate(memory, rng.choice([0, 1, 4096, 2**40]))
        opened = [reading, writing, memory, os.open("/dev/zero", os.O_RDWR), os.open("/", os.O_RDONLY), os.open("/", os.O_PATH)]
        for descriptor in opened:
            stack.callback(os.close, descriptor)
        yield [*opened, *(end.fileno() for end in pair)]


def _attach(rng: Random) -> Attach:
    """An engine with a small layout, or one that none has: larger than all that the node may hold."""
    if rng.random() < 0.8:
        return replace(SMALL, model=f"hostile-{rng.randrange(4)}")
    pools = {"version": (ENGINE_PROTOCOL_VERSION,), "dtype": ("float32", "int3"), "layers": (4096,), "kv_heads": (65536,)}
    drawn: Attach = Draw(rng, pools, (), pooled=0.9).value(Attach)
    return drawn if drawn.layers * drawn.kv_heads * drawn.head_dim > TOO_LARGE else replace(drawn, dtype="int3")


def _request(rng: Random, leases: list[str]) -> EngineRequest:
    """A valid request: of an engine that knows its leases, or, sometimes, of one that doesn't."""
    known = rng.random() < 0.95
    pools = {
        "lease": (leases[-1] if leases and known else "lease~0",),
        "tokens": (*PROMPTS, b"") if known else (b"x",),
        "identity": IDENTITIES,
        "first_token": (0, 1, 16, 2**20),
    }
    kinds = [LookupRequest, StoreRequest, RetrieveRequest, ReadDone]
    kinds += [Commit, Attach] if not known else [Commit] if leases else []
    request: EngineRequest = Draw(rng, pools, ("x",), pooled=1.0).value(rng.choice(kinds))
    if isinstance(request, Commit) and known:
        leases.pop()
    return request
