"""What both kinds of lane share: how one opens, by proof of the move's ticket, and how the way to a source's chunks is chosen.

A lane is a connection of its own from a move's target to its source. Until the target has proved that it holds the ticket of an
open move, nothing but a few small frames is read from it.
"""

import hmac
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import trio

from p2pkv.core.effects import FetchChunks
from p2pkv.core.ids import EventId
from p2pkv.core.keys import ChunkKey
from p2pkv.core.moves.source_move import LaneGrant
from p2pkv.core.records import HandoffAddress
from p2pkv.errors import DialRefusedError, Failure, RemoteProtocolError, RouteRefusedError
from p2pkv.net.descriptors import receive_frame, send_frame
from p2pkv.net.driver import Fetcher
from p2pkv.wire.frames import Frame
from p2pkv.wire.lane import (
    MAX_FRAME_NBYTES,
    NONCE_NBYTES,
    LaneChallenge,
    LaneEnd,
    LaneMessage,
    LaneOpen,
    LaneOpened,
    lane_codec,
    lane_mac,
)

STALL_S = 10.0
"""An end that says nothing for so long has lost its turn. What is waited for takes milliseconds; the rest is for a host that is
so busy that the other process doesn't run."""

LANE_ERRORS = (OSError, RemoteProtocolError, trio.TooSlowError)
"""All that the other end, or the way to it, can make an open lane raise."""

Grants = Callable[[EventId], LaneGrant | None]
"""What the open moves of this source allow; `Machine.lane_grant`."""

M = TypeVar("M", bound=LaneMessage)


# --- ways -----------------------------------------------------------------------------------------------------------------


class RouteFetcher:
    """Fetches each order by the lane that its route names."""

    def __init__(self, *, handoff: Fetcher, tcp: Fetcher) -> None:
        self._handoff = handoff
        self._tcp = tcp

    async def fetch(self, order: FetchChunks, fetched: list[ChunkKey]) -> Failure | None:
        """As `Fetcher.fetch`."""
        fetcher = self._handoff if isinstance(order.route, HandoffAddress) else self._tcp
        return await fetcher.fetch(order, fetched)


@contextmanager
def refusing(lane: str) -> Iterator[None]:
    """What goes wrong inside means that `lane` can't be used: `RouteRefusedError` with a sentence that says so."""
    try:
        yield
    except (*LANE_ERRORS, DialRefusedError) as error:
        raise RouteRefusedError(f"{lane} can't be used: {reason_of(error)}.") from error


# --- proof ----------------------------------------------------------------------------------------------------------------


async def admit_target(connection: trio.socket.SocketType, grants: Grants) -> EventId:
    """The source's part: the move whose ticket the target has proved to hold.

    Raises:
        RemoteProtocolError: It holds none of an open move.
    """
    nonce = secrets.token_bytes(NONCE_NBYTES)
    await send(connection, LaneChallenge(nonce))
    opening = await expect(connection, LaneOpen)
    grant = grants(opening.event_id)
    ticket = secrets.token_bytes(32) if grant is None else grant.ticket  # an unknown move looks like a wrong ticket
    proof = partial(lane_mac, ticket, source_nonce=nonce, target_nonce=opening.nonce, event_id=opening.event_id)
    if not hmac.compare_digest(proof(LaneEnd.TARGET), opening.mac):
        raise RemoteProtocolError("the target holds no ticket of an open move")
    await send(connection, LaneOpened(proof(LaneEnd.SOURCE)))
    return opening.event_id


async def prove_to_source(
    connection: trio.socket.SocketType, order: FetchChunks, first_request: LaneMessage | None = None
) -> None:
    """The target's part; the source proves itself too.

    Args:
        connection: To the source.
        order: What is to be fetched.
        first_request: Sent behind the proof, to save the way there and back; whoever is at the other end may read it.

    Raises:
        RemoteProtocolError: It doesn't hold the ticket, or doesn't believe that this end does.
    """
    challenge = await expect(connection, LaneChallenge)
    nonce = secrets.token_bytes(NONCE_NBYTES)
    proof = partial(lane_mac, order.ticket, source_nonce=challenge.nonce, target_nonce=nonce, event_id=order.event_id)
    await send(connection, LaneOpen(order.event_id, nonce, proof(LaneEnd.TARGET)))
    if first_request is not None:
        await send(connection, first_request)
    opened = await expect(connection, LaneOpened)
    if not hmac.compare_digest(proof(LaneEnd.SOURCE), opened.mac):
        raise RemoteProtocolError("it doesn't hold the move's ticket")


# --- messages -------------------------------------------------------------------------------------------------------------


async def send(connection: trio.socket.SocketType, message: LaneMessage) -> None:
    """Send a message that carries no descriptors."""
    await send_frame(connection, lane_codec().encode(message))


async def expect(connection: trio.socket.SocketType, kind: type[M]) -> M:
    """The next message, which is to be a `kind`."""
    with await expect_frame(connection) as frame:
        return decode(frame, kind)


async def expect_frame(connection: trio.socket.SocketType) -> Frame:
    """The next frame, which the caller closes."""
    frame = await next_frame(connection)
    if frame is None:
        raise RemoteProtocolError("it closed the lane")
    return frame


async def next_frame(connection: trio.socket.SocketType) -> Frame | None:
    """The next frame, which the caller closes; None when the other end has closed the lane."""
    with trio.fail_after(STALL_S):
        return await receive_frame(connection, MAX_FRAME_NBYTES)


def decode(frame: Frame, kind: type[M]) -> M:
    """The message in a frame, which is to be a `kind`."""
    message = lane_codec().decode(frame.payload)
    if not isinstance(message, kind):
        raise RemoteProtocolError(f"a {type(message).__name__} came instead of a {kind.__name__}")
    return message


def reason_of(error: BaseException) -> str:
    """Why a lane ended, as part of a sentence."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"nothing came for {STALL_S:g} s" if isinstance(error, trio.TooSlowError) else str(error)
