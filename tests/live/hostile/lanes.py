"""What a node must bear at its lanes, over a unix socket and over TCP: who holds no ticket, and who holds one and lies."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import get_args

import trio

from p2pkv.core.ids import Address, EventId, Location, Parties, Position, make_event_id
from p2pkv.core.keys import ChunkKey, Identity
from p2pkv.core.messages import PROTOCOL_VERSION, FetchReport, Hello, Message, Offer, PlanRequest, Status, Ticket
from p2pkv.core.records import LocationStatus, MemberRecord, MemberState, Operation, Selection
from p2pkv.net.descriptors import receive_frame
from p2pkv.net.lanes import LANE_ERRORS
from p2pkv.net.links import PEER_PATH
from p2pkv.wire.codec import peer_codec
from p2pkv.wire.frames import encode_frame
from p2pkv.wire.lane import (
    MAX_FRAME_NBYTES,
    NONCE_NBYTES,
    Descriptors,
    Fetch,
    LaneChallenge,
    LaneEnd,
    LaneMessage,
    LaneOpen,
    LaneOpened,
    Turn,
    lane_codec,
    lane_mac,
)
from p2pkv.wire.proof import Who
from tests.live.hostile.attack import END_S, Tally, Target, connected, expect_end, half_close, receive, send
from tests.live.hostile.damage import damaged, damaged_message, lying_frame
from tests.live.hostile.draw import Draw
from tests.live.hostile.engine import send_descriptors
from tests.live.hostile.peer import new_generation, prove, prover_of
from tests.live.hostile.websocket import BINARY, RawWebsocket, frame

THIEF = "thief"
"""A member that has a copy planned for itself, and uses its ticket for mischief."""
REPORT_S = 0.5
"""Between two reports of the copy: without them the source would end it."""


@dataclass(frozen=True)
class Grant:
    """What a member knows of a move that it is the target of."""

    event_id: EventId
    ticket: Ticket = field(repr=False)
    keys: tuple[ChunkKey, ...]


@asynccontextmanager
async def open_grant(target: Target, tokens: bytes) -> AsyncIterator[Grant]:
    """A copy of `tokens` from the attacked node to a member that never says that it is done."""
    generation = new_generation()
    room = LocationStatus(Location.LOCAL_CPU, 0, 0, 2**30)
    nowhere = Address("127.0.0.1", 1)
    me = MemberRecord(THIEF, generation, 0, MemberState.ALIVE, nowhere, "http://nowhere", None, None, "", (), (room,))
    event_id = make_event_id(Parties(target.instance, THIEF, THIEF), Random(generation))
    old, new = (Position(instance, Location.LOCAL_CPU) for instance in (target.instance, THIEF))
    async with connected(target.ws) as stream, trio.open_nursery() as nursery:
        websocket = await RawWebsocket.open(stream, target.ws, PEER_PATH)

        async def tell(message: Message) -> None:
            await websocket.send(frame(BINARY, peer_codec().encode(message)))

        async def keep_reporting() -> None:
            while True:
                await tell(FetchReport(event_id, False, 0, 0, 0, 0, None, None))
                await tell(Status(me, 0, 0, 0))
                await trio.sleep(REPORT_S)

        async def keep_reading() -> None:
            while True:
                await websocket.get_message()

        await prove(websocket, prover_of(Who(THIEF, generation, (PROTOCOL_VERSION,)), target))
        await tell(Hello((PROTOCOL_VERSION,), target.cluster, me, ()))
        await tell(PlanRequest(event_id, old, new, Operation.COPY, Selection.TOKENS, tokens, Identity(), None))
        with trio.fail_after(END_S):
            while not isinstance(offer := peer_codec().decode(await websocket.get_message()), Offer):
                pass
        nursery.start_soon(keep_reporting)
        nursery.start_soon(keep_reading)
        yield Grant(event_id, offer.ticket, tuple(chunk.key for chunk in offer.chunks))
        nursery.cancel_scope.cancel()


async def strike_handoff(rng: Random, target: Target, tally: Tally, grant: Grant) -> None:
    """A process at the handoff lane."""
    await _strike(rng, target.lane_socket, tally, grant)


async def strike_tcp(rng: Random, target: Target, tally: Tally, grant: Grant) -> None:
    """The same at the transfer address."""
    await _strike(rng, target.transfer, tally, grant)


async def _strike(rng: Random, place: Address | Path, tally: Tally, grant: Grant) -> None:
    """Who has no ticket hears a challenge and no more; who has one gets what its move names and no more."""
    async with connected(place) as stream:
        challenge = await _take(stream)
        assert isinstance(challenge, LaneChallenge)
        is_open = rng.random() < 0.3
        try:
            if is_open:
                await _open(rng, stream, challenge, grant)
                for _ in range(rng.randint(0, 5)):
                    await _fetch(rng, stream, grant, tally)
                    if not isinstance(place, Path):
                        return  # shards follow, and nothing is listened to any more
            heard = await _break(rng, stream, challenge, grant, tally)
            assert is_open or not heard, heard
        except LANE_ERRORS:
            tally.frames += 1
            tally.outcomes["ended"] += 1


async def _open(rng: Random, stream: trio.SocketStream, challenge: LaneChallenge, grant: Grant) -> None:
    """As the move's target would."""
    opening = _opening(rng, challenge, grant)
    await send(stream, encode_frame(lane_codec().encode(opening)))
    opened = await _take(stream)
    assert isinstance(opened, LaneOpened), opened


async def _fetch(rng: Random, stream: trio.SocketStream, grant: Grant, tally: Tally) -> None:
    """Ask for chunks of the move, repeated, in any order, and among them for some that aren't its."""
    keys = tuple(rng.choice([rng.choice(grant.keys), rng.randbytes(16)]) for _ in range(rng.randint(1, 20)))
    await send(stream, encode_frame(lane_codec().encode(Fetch(keys))))
    answer = await _take(stream)
    while isinstance(answer, Turn) and not answer.has_come:
        answer = await _take(stream)
    tally.frames += 1
    tally.outcomes[type(answer).__name__] += 1
    assert not isinstance(answer, Descriptors) or {shard.key for shard in answer.shards} <= set(grant.keys)
    if isinstance(answer, Turn) and rng.random() < 0.7:
        await receive(stream)  # some of the bytes, and then nobody takes the rest


async def _break(rng: Random, stream: trio.SocketStream, challenge: LaneChallenge, grant: Grant, tally: Tally) -> bytes:
    """What ends a lane: no proof, somebody else's, or what is no message; all that is heard then."""
    opening = _opening(rng, challenge, grant)
    drawn = Draw(rng, {"event_id": (grant.event_id, "move~a~b~c~0123456789abcdef")}, ()).value(
        rng.choice(get_args(LaneMessage))
    )
    wrong = rng.choice(
        [
            drawn,
            replace(opening, mac=rng.randbytes(32)),
            replace(opening, event_id="nothing"),
            replace(opening, nonce=bytes(16)),
        ]
    )
    payload = lane_codec().encode(wrong)
    match rng.randrange(6):
        case 0:
            await send(stream, lying_frame(rng, payload), bytewise=rng.random() < 0.2)
        case 1:
            await send(stream, damaged(rng, encode_frame(payload)), bytewise=rng.random() < 0.2)
        case 2:
            await send(stream, encode_frame(damaged_message(rng, payload)), bytewise=rng.random() < 0.2)
        case 3:
            await send(stream, encode_frame(bytes(MAX_FRAME_NBYTES + rng.randrange(2))))
        case 4 if isinstance(stream.socket.getsockname(), str | bytes):
            await send_descriptors(rng, stream, encode_frame(payload))
        case _:
            await send(stream, encode_frame(payload) * rng.choice([1, 1, 5]))
    tally.frames += 1
    if rng.random() < 0.2:
        return b""
    await half_close(stream)
    return await expect_end(stream)


def _opening(rng: Random, challenge: LaneChallenge, grant: Grant) -> LaneOpen:
    nonce = rng.randbytes(NONCE_NBYTES)
    mac = lane_mac(grant.ticket, LaneEnd.TARGET, source_nonce=challenge.nonce, target_nonce=nonce, event_id=grant.event_id)
    return LaneOpen(grant.event_id, nonce, mac)


async def _take(stream: trio.SocketStream) -> LaneMessage:
    with trio.fail_after(END_S):
        taken = await receive_frame(stream.socket)
    if taken is None:
        raise ConnectionResetError("the node ended the lane")
    with taken:
        return lane_codec().decode(taken.payload)
