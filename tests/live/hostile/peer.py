"""What a node must bear from who knocks at `/peer`: strangers who can't prove to be of the cluster, and members who lie."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random
from typing import cast, get_args

import trio
from trio_websocket import WebSocketConnection

from p2pkv.core.ids import Address, Location, Parties, make_event_id
from p2pkv.core.messages import PROTOCOL_VERSION, ClearRequest, Goodbye, Hello, Leaving, Message, Ping, PlanRequest, Pong
from p2pkv.core.records import HandoffAddress, MemberRecord, MemberState, Selection
from p2pkv.errors import ErrorCode, RemoteProtocolError
from p2pkv.net.links import PEER_PATH, POLICY_VIOLATION
from p2pkv.net.proof import Prover
from p2pkv.wire.codec import peer_codec
from p2pkv.wire.limits import MAX_MESSAGE_NBYTES
from p2pkv.wire.proof import MAX_PROOF_NBYTES, NONCE_NBYTES, Who
from tests.live.hostile.attack import END_S, Tally, Target, connected, expect_end, half_close, send
from tests.live.hostile.damage import damaged, damaged_message
from tests.live.hostile.draw import Draw
from tests.live.hostile.websocket import (
    BINARY,
    CONTINUATION,
    PING,
    TEXT,
    EndedError,
    RawWebsocket,
    broken_frames,
    frame,
    handshake,
)

LIARS = tuple(f"liar-{number}" for number in range(48))
"""Few names for many connections: they come and go, and get into each other's way."""
ODD_LIAR = "liar-odd"
"""Its generations are any: after a high one, all others of the same name are refused."""
TOO_LONG_FOR_A_PROOF, BROKEN, NO_TEXT = 1009, 1002, 1007
LONG_IN_EVERY = 2000
"""A message beyond the limit costs as much as a thousand others; one in so many is enough."""


# --- before the proof -----------------------------------------------------------------------------------------------------


async def strike_unproven(rng: Random, target: Target, tally: Tally) -> None:
    """A stranger at `/peer`: he hears one number and a refusal, whatever he tries."""
    async with connected(target.ws) as stream:
        if rng.random() < 0.25:
            await strike_handshake(rng, target.ws, PEER_PATH, stream, tally)
            return
        try:
            websocket = await RawWebsocket.open(stream, target.ws, PEER_PATH)
            await (_prove_wrongly if rng.random() < 0.25 else _try_to_pass)(rng, websocket, target, tally)
            return
        except EndedError as error:
            ended = error
        tally.frames += 1
        tally.outcomes[f"closed {ended.code}"] += 1
        assert ended.code in (None, POLICY_VIOLATION, TOO_LONG_FOR_A_PROOF, BROKEN, NO_TEXT), ended


async def strike_handshake(rng: Random, address: Address, path: str, stream: trio.SocketStream, tally: Tally) -> None:
    """A request for a websocket that is none, or none that is granted."""
    valid = handshake(address, path)
    kinds: list[Callable[[], bytes]] = [
        partial(damaged, rng, valid),
        lambda: valid[: rng.randrange(len(valid))],
        lambda: valid.replace(b"GET", rng.choice([b"POST", b"get", b"PRI", b"G\0T", b"DELETE"])),
        lambda: valid.replace(
            path.encode(), rng.choice([b"/", b"/nothing", b"*", b"/" + b"x" * 9000, b"//a", b"/%00", b"/\xff"])
        ),
        lambda: valid.replace(str(address).encode(), rng.choice([b"evil.example", b"\xff\xfe", b"", b"localhost", b"a" * 300])),
        lambda: valid.replace(b"HTTP/1.1", rng.choice([b"HTTP/1.0", b"HTTP/2", b"HTTP/9.9", b"", b"HTCPCP/1.0"])),
        lambda: valid.replace(b"Key: AAAA", rng.choice([b"Key: \xe9", b"Key: ", b"K: ", b"Key: AAAA\r\nX: "])),
        lambda: valid.replace(b"Version: 13", rng.choice([b"Version: 12", b"V: 13", b"Version: 13, 8", b"Version:"])),
        lambda: valid.replace(b"Upgrade: websocket", b"Upgrade: " + rng.choice([b"h2c", b"", b"websocket, h2c", b"\x01"])),
        lambda: (
            valid[:-2]
            + rng.choice([b"Origin: http://evil.example", b"Sec-Fetch-Site: cross-site", b"X" * 20_000 + b": 1"])
            + b"\r\n\r\n"
        ),
        lambda: valid[:-2] + b"Content-Length: 9\r\n\r\n" + rng.randbytes(9),
        lambda: valid[:-2] + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n",
        lambda: valid[:-2] + b'Sec-WebSocket-Protocol: \xe9, a\r\nSec-WebSocket-Extensions: permessage-deflate; x="\r\n\r\n',
        lambda: valid[:-2] + b"X: 1\r\n" * rng.randint(100, 1500) + b"\r\n",
        lambda: valid * 3,
        lambda: valid + broken_frames(rng),
        lambda: rng.randbytes(rng.randint(1, 3000)),
    ]
    request = rng.choice(kinds)()
    await send(stream, request, bytewise=rng.random() < 0.1)
    tally.frames += 1
    if rng.random() < 0.3:
        return
    await half_close(stream)
    heard = await expect_end(stream)
    tally.outcomes[heard[:12].decode(errors="replace") or "ended"] += 1
    assert not heard or heard[:10] in (b"HTTP/1.1 1", b"HTTP/1.1 4"), heard[:100]


async def _try_to_pass(rng: Random, websocket: RawWebsocket, target: Target, tally: Tally) -> None:
    challenge = await websocket.get_message()
    assert len(challenge) == NONCE_NBYTES
    if rng.random() < 0.2:
        await send_empty_fragments(rng, websocket)
        tally.frames += 1
    lengths = (MAX_PROOF_NBYTES + 1, 2**16, 2**40, 2**63 - 1)
    texts = (b"", challenge, challenge * 2, b"x" * 64, bytes(MAX_PROOF_NBYTES))
    kinds: list[Callable[[], bytes]] = [
        lambda: broken_frames(rng),
        lambda: frame(BINARY, rng.randbytes(rng.randrange(400)), nbytes=rng.choice(lengths)),
        lambda: frame(rng.choice([TEXT, BINARY]), rng.choice(texts)),
        lambda: frame(BINARY, peer_codec().encode(_senseless(rng, target))),
        lambda: frame(BINARY, rng.randbytes(rng.choice([64, 64, rng.randrange(2 * MAX_PROOF_NBYTES)]))),
    ]
    data = rng.choice(kinds)()
    await websocket.send(data, bytewise=rng.random() < 0.1)
    if rng.random() < 0.2:
        tally.frames += 1
        return
    await half_close(websocket.stream)
    raise await websocket.expect_end()


class _Damaging:
    """A dialer's websocket on which one of its steps gets damaged."""

    def __init__(self, rng: Random, websocket: RawWebsocket) -> None:
        self._rng = rng
        self._steps_left = rng.randrange(2)
        self._websocket = websocket

    async def get_message(self) -> bytes:
        return await self._websocket.get_message()

    async def send_message(self, message: bytes) -> None:
        is_damaged = self._steps_left == 0
        self._steps_left -= 1
        await self._websocket.send_message(damaged(self._rng, message) if is_damaged else message)


async def _prove_wrongly(rng: Random, websocket: RawWebsocket, target: Target, tally: Tally) -> None:
    """An insider's proof with an error in it."""
    prover = prover_of(_who(rng, target), target)
    others = replace(prover, key=bytes(32)), replace(prover, cluster="other"), replace(prover, door="/control")
    await prove(_Damaging(rng, websocket), rng.choice([prover, *others]))
    tally.outcomes["damage that didn't show"] += 1


async def send_empty_fragments(rng: Random, websocket: RawWebsocket) -> None:
    """The beginning of a message that has no content and no end."""
    nonce = rng.randbytes(8)
    first = frame(BINARY, b"", is_last=False)
    rest = frame(CONTINUATION, b"", is_last=False) * rng.choice([1, 10, 3000])
    await websocket.send(first + rest + frame(PING, nonce))
    with trio.fail_after(END_S):
        assert await websocket.get_pong() == nonce


# --- after it -------------------------------------------------------------------------------------------------------------


async def strike_proven(rng: Random, target: Target, tally: Tally) -> None:
    """A member that lies: its messages are valid and senseless, until one may be neither."""
    async with connected(target.ws) as stream:
        answers = list[Message]()
        try:
            websocket = await RawWebsocket.open(stream, target.ws, PEER_PATH)
            who = _who(rng, target)
            await prove(websocket, prover_of(who, target))
            hello = _hello(rng, target, who)
            if rng.random() < 0.95:
                await websocket.send_message(peer_codec().encode(hello))
            for _ in range(rng.randint(1, 8)):
                messages = [_senseless(rng, target, hello.me) for _ in range(rng.randint(1, 25))]
                await websocket.send(b"".join(frame(BINARY, peer_codec().encode(message)) for message in messages))
                await _until_taken(rng, websocket, answers)
                tally.frames += len(messages)
            if rng.random() < 0.5:
                must_end = await _break_the_link(rng, websocket, target)
                await _until_taken(rng, websocket, answers)
                tally.frames += 1
                assert not must_end
        except EndedError:  # also when another liar of this name takes its place
            tally.frames += 1
            farewell = next((answer.failure.code for answer in answers if isinstance(answer, Goodbye)), None)
            tally.outcomes[f"ended: {farewell}"] += 1
        tally.outcomes.update(type(answer).__name__ for answer in answers)


async def prove(websocket: "RawWebsocket | _Damaging", prover: Prover) -> None:
    """Prove to be of the cluster, as one that has its key can; EndedError when the node refuses, or this end gives up first."""
    try:
        await prover.prove_to_acceptor(cast(WebSocketConnection, websocket))
    except RemoteProtocolError as error:
        raise EndedError(None, str(error)) from error


async def _until_taken(rng: Random, websocket: RawWebsocket, answers: list[Message]) -> None:
    """Wait until the node has handled all that it was sent, or EndedError; `answers` gets what comes until then."""
    nonce = rng.getrandbits(60)
    await websocket.send_message(peer_codec().encode(Ping(nonce)))
    with trio.fail_after(END_S):
        while answers[-1:] != [Pong(nonce)]:
            answers.append(peer_codec().decode(await websocket.get_message()))


async def _break_the_link(rng: Random, websocket: RawWebsocket, target: Target) -> bool:
    """Send what may be no message; whether it must end the link."""
    message = peer_codec().encode(_senseless(rng, target))
    must_end = False
    if rng.random() < 1 / LONG_IN_EVERY:
        data = frame(BINARY, bytes(MAX_MESSAGE_NBYTES + rng.randrange(2)))
    elif rng.random() < 0.2:
        data = broken_frames(rng)
    elif rng.random() < 0.2:
        data = fragments(rng, message)
    else:
        message = damaged_message(rng, message)
        data = frame(BINARY, message)
        must_end = not _is_message(message)
    await websocket.send(data, bytewise=len(data) < 3000 and rng.random() < 0.1)
    return must_end


def _is_message(data: bytes) -> bool:
    try:
        peer_codec().decode(data)
    except RemoteProtocolError:
        return False
    return True


def fragments(rng: Random, message: bytes, opcode: int = BINARY) -> bytes:
    """A message in pieces, many of them empty."""
    data = bytearray()
    position = 0
    while position < len(message):
        size = rng.choice([0, 0, 1, 2, rng.randrange(100)])
        data += frame(CONTINUATION if data else opcode, message[position : position + size], is_last=False)
        position += size
    return bytes(data + frame(CONTINUATION if data else opcode, b""))


# --- who lies, and what ---------------------------------------------------------------------------------------------------


def prover_of(who: Who, target: Target) -> Prover:
    """Proves that `who` is of the target's cluster."""
    return Prover(target.peer_key, target.cluster, who, door=PEER_PATH)


def new_generation() -> int:
    """As an instance that boots now has it."""
    return time.time_ns() // 1_000_000


def _who(rng: Random, target: Target) -> Who:
    """A liar or the attacked node itself; not the bystander, for the proof says who has the key, not who is who."""
    instance, generation = rng.choice(LIARS), new_generation()
    if rng.random() < 0.05:
        instance = rng.choice([ODD_LIAR, target.instance])
        generation = rng.choice([generation, 0, 1, 2**63 - 1, rng.getrandbits(63)])
    return Who(instance, generation, (PROTOCOL_VERSION,) if rng.random() < 0.97 else (99,))


def _hello(rng: Random, target: Target, who: Who) -> Hello:
    hello: Hello = _draw(rng, target).value(Hello)
    me = replace(hello.me, instance=who.instance, generation=who.generation, state=MemberState.ALIVE)
    cluster = target.cluster if rng.random() < 0.97 else "other"
    return replace(hello, versions=who.versions, cluster=cluster, me=me)


def _senseless(rng: Random, target: Target, me: MemberRecord | None = None) -> Message:
    """A valid message that no honest member would send now, and that a member may not do harm with by right."""
    draw = _draw(rng, target, me)
    while True:
        message: Message = draw.value(rng.choice(get_args(Message)))
        if isinstance(message, Hello | Goodbye | Leaving) and rng.random() < 0.95:
            continue  # they end a link: seldom, so that the others are heard too
        if not _is_by_right(message, target):
            return message


def _is_by_right(message: Message, target: Target) -> bool:
    """Whether a member may do harm so: clear chunks, move them away, or tell a node that has just started to stop."""
    match message:
        case Goodbye(failure=failure):
            return failure.code is ErrorCode.INSTANCE_ID_IN_USE
        case ClearRequest(location=location):
            return location is Location.LOCAL_CPU
        case PlanRequest(old_position=position, selection=Selection.ALL):
            return position.instance in (target.instance, target.bystander)
    return False


def _draw(rng: Random, target: Target, me: MemberRecord | None = None) -> Draw:
    names = (*LIARS[:4], rng.choice(LIARS), target.instance, target.bystander, "nobody")
    event_ids = [
        make_event_id(Parties(*rng.choices(names, k=3)), rng),
        "move~nobody~nobody~nobody~0123456789abcdef",
        "move~a~b",
        "\0" * 200,
    ]
    nowhere = Address("127.0.0.1", 1), Address("192.0.2.1", 8002), Address("nowhere.invalid", 1), target.ws
    pools: dict[str, tuple[object, ...]] = {
        "event_id": tuple(event_ids),
        "instance": names,
        "coordinator": names,
        "cluster": (target.cluster,),
        "ws": nowhere,
        "transfer": (None, *nowhere),
        "handoff": (None, HandoffAddress("host", "/nowhere")),
    }
    if me is not None:
        pools["me"] = (me,)
    return Draw(rng, pools, names)
