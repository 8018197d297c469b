"""The handoff lane: chunks change hands on one host by passing their descriptors, and no byte is copied.

The target connects to the source's unix socket; both run as one user, and prove to each other that they hold the move's ticket.
The source passes only what its open move names and its store holds at that moment. The target takes only what it asked for, and
the store checks each descriptor (sealed for good, exact size, really allocated): that stands for a checksum, as nothing moved.
"""

import hmac
import os
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from p2pkv.core.chunks import Chunk
from p2pkv.core.effects import FetchChunks
from p2pkv.core.ids import EventId, StageId
from p2pkv.core.keys import ChunkKey
from p2pkv.core.moves.source_move import LaneGrant
from p2pkv.errors import ErrorCode, Failure, ForeignMemoryError, RemoteProtocolError
from p2pkv.net.descriptors import is_own_user, receive_frame, send_frame
from p2pkv.net.logs import logger
from p2pkv.wire.frames import MAX_FRAME_DESCRIPTORS, Frame
from p2pkv.wire.lane import (
    MAX_FETCH_KEYS,
    NONCE_NBYTES,
    Descriptors,
    Fetch,
    LaneChallenge,
    LaneEnd,
    LaneMessage,
    LaneOpen,
    LaneOpened,
    PassedShard,
    lane_codec,
    lane_mac,
)

STALL_S = 10.0
"""An end that says nothing for so long has lost its turn. Passing 250 descriptors takes a millisecond; the rest is for a host
that is so busy that the other process doesn't run."""
LANES_AT_ONCE = 32
"""Targets served at the same time; more wait for their turn. Each is done within milliseconds."""
ADOPT_STRIDE = 32
"""Descriptors checked between two looks at the event loop: about 1 ms."""

Grants = Callable[[EventId], LaneGrant | None]
"""What the open moves of this source allow; `Machine.lane_grant`."""

M = TypeVar("M", bound=LaneMessage)
_log = logger("handoff")


class ResidentMemory(Protocol):
    """What the source's end needs of the store."""

    def descriptors(self, key: ChunkKey) -> tuple[int, ...]:
        """Descriptors of a resident chunk's shards, in order of workers; they stay the store's. KeyError for any other."""


class AdoptingMemory(Protocol):
    """What the target's end needs of the store."""

    def adopt(self, stage: StageId, key: ChunkKey, worker: int, descriptor: int, nbytes: int) -> None:
        """Check and stage a descriptor from outside, which is the store's in every case; raises `ForeignMemoryError`."""

    def drop(self, stage: StageId, key: ChunkKey, worker: int | None = None) -> None:
        """Free what is staged of a chunk."""


# --- the source's end -----------------------------------------------------------------------------------------------------


async def serve_handoffs(
    listener: trio.SocketListener,
    grants: Grants,
    memory: ResidentMemory,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Pass descriptors to targets that hold the ticket of an open move, until cancelled."""
    serve = partial(_serve_target, grants=grants, memory=memory, turns=trio.Semaphore(LANES_AT_ONCE))
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, [listener])
        task_status.started()


async def _serve_target(stream: trio.SocketStream, *, grants: Grants, memory: ResidentMemory, turns: trio.Semaphore) -> None:
    try:
        async with stream, turns:
            if not is_own_user(stream.socket):
                raise RemoteProtocolError("the target runs as another user")
            event_id = await _admit_target(stream.socket, grants)
            while (frame := await _next_frame(stream.socket)) is not None:
                with frame:
                    fetch = _decode(frame, Fetch)
                grant = grants(event_id)
                allowed = [key for key in fetch.keys if grant is not None and key in grant.keys]
                await _pass(stream.socket, allowed, memory)
    except (OSError, RemoteProtocolError, trio.TooSlowError) as error:
        _log.warning("a lane was closed", reason=_reason(error))


async def _admit_target(connection: trio.socket.SocketType, grants: Grants) -> EventId:
    nonce = secrets.token_bytes(NONCE_NBYTES)
    await _send(connection, LaneChallenge(nonce))
    opening = await _expect(connection, LaneOpen)
    grant = grants(opening.event_id)
    ticket = secrets.token_bytes(32) if grant is None else grant.ticket  # an unknown move looks like a wrong ticket
    proof = partial(lane_mac, ticket, source_nonce=nonce, target_nonce=opening.nonce, event_id=opening.event_id)
    if not hmac.compare_digest(proof(LaneEnd.TARGET), opening.mac):
        raise RemoteProtocolError("the target holds no ticket of an open move")
    await _send(connection, LaneOpened(proof(LaneEnd.SOURCE)))
    return opening.event_id


async def _pass(connection: trio.socket.SocketType, keys: Iterable[ChunkKey], memory: ResidentMemory) -> None:
    shards = [PassedShard(key, worker) for key in keys for worker in range(len(_descriptors(memory, key)))]
    for start in range(0, len(shards) or 1, MAX_FRAME_DESCRIPTORS):
        batch = shards[start : start + MAX_FRAME_DESCRIPTORS]
        held = {shard.key: _descriptors(memory, shard.key) for shard in batch}  # anew: while a frame goes out, chunks may go
        passed = tuple(shard for shard in batch if held[shard.key])
        is_last = start + MAX_FRAME_DESCRIPTORS >= len(shards)
        await _send(connection, Descriptors(passed, is_last), [held[shard.key][shard.worker] for shard in passed])


def _descriptors(memory: ResidentMemory, key: ChunkKey) -> tuple[int, ...]:
    try:
        return memory.descriptors(key)
    except KeyError:
        return ()


# --- the target's end -----------------------------------------------------------------------------------------------------


class HandoffFetcher:
    """Fetches chunks from other nodes of this host.

    Args:
        memory: Where they are staged.
        host_id: This host's boot id.
    """

    def __init__(self, memory: AdoptingMemory, host_id: str) -> None:
        self._memory = memory
        self._host_id = host_id

    async def fetch(self, order: FetchChunks, fetched: list[ChunkKey]) -> Failure | None:
        """Stage the chunks of `order`, appending each key to `fetched` when the chunk is whole.

        Cancelled or failed, it leaves the whole chunks staged, and nothing of the others.

        Returns:
            Why some of them didn't come; None when all did.
        """
        haul = _Haul(order, self._memory, fetched)
        try:
            async with _open_lane(order, self._host_id) as connection:
                for start in range(0, len(order.chunks), MAX_FETCH_KEYS):
                    await haul.fetch(connection, order.chunks[start : start + MAX_FETCH_KEYS])
        except (OSError, RemoteProtocolError, trio.TooSlowError) as error:
            haul.problems.append(_reason(error))
        finally:
            haul.drop_halves()
        if not haul.problems:
            return None
        return Failure(ErrorCode.TRANSFER_FAILED, f"The handoff from {order.source!r} failed: {haul.problems[0]}.")


class _Haul:
    """What comes in of one order."""

    def __init__(self, order: FetchChunks, memory: AdoptingMemory, fetched: list[ChunkKey]) -> None:
        self.problems: list[str] = []
        self._stage = order.event_id
        self._memory = memory
        self._fetched = fetched
        self._staged_workers: defaultdict[ChunkKey, set[int]] = defaultdict(set)

    async def fetch(self, connection: trio.socket.SocketType, chunks: Sequence[Chunk]) -> None:
        """Ask for `chunks` and take what comes."""
        wanted = {chunk.key: chunk for chunk in chunks}
        fetched_before = len(self._fetched)
        await _send(connection, Fetch(tuple(wanted)))
        is_last = False
        while not is_last:
            with await _expect_frame(connection) as frame:
                answer = _decode(frame, Descriptors)
                await self._take(answer, frame, wanted)
            is_last = answer.is_last
        missing = len(wanted) - (len(self._fetched) - fetched_before)
        if missing:
            self.problems.append(f"{missing} of {len(wanted)} chunks are held there no longer")

    async def _take(self, answer: Descriptors, frame: Frame, wanted: dict[ChunkKey, Chunk]) -> None:
        if len(frame.descriptors) != len(answer.shards):
            raise RemoteProtocolError(f"{len(frame.descriptors)} descriptors came for {len(answer.shards)} shards")
        for index, shard in enumerate(answer.shards):
            chunk, staged = wanted.get(shard.key), self._staged_workers[shard.key]
            if chunk is None or shard.worker >= len(chunk.shard_nbytes) or shard.worker in staged:
                raise RemoteProtocolError("it passed a shard that wasn't asked for")
            try:
                nbytes = chunk.shard_nbytes[shard.worker]
                self._memory.adopt(self._stage, shard.key, shard.worker, frame.descriptors.pop(0), nbytes)
            except ForeignMemoryError as error:
                self.problems.append(str(error))
                continue
            staged.add(shard.worker)
            if len(staged) == len(chunk.shard_nbytes):
                self._fetched.append(shard.key)
            if index % ADOPT_STRIDE == ADOPT_STRIDE - 1:
                await trio.lowlevel.checkpoint()

    def drop_halves(self) -> None:
        """Free what came of chunks that didn't come whole."""
        for key in self._staged_workers.keys() - set(self._fetched):
            self._memory.drop(self._stage, key)


@asynccontextmanager
async def _open_lane(order: FetchChunks, host_id: str) -> AsyncIterator[trio.socket.SocketType]:
    if order.lane.host_id != host_id:
        raise RemoteProtocolError("it runs on another host, and this version has no lane between hosts")
    path = Path(order.lane.path)
    if not path.is_socket() or path.stat().st_uid != os.geteuid():
        raise RemoteProtocolError("its lane is no socket of this user")
    async with await trio.open_unix_socket(path) as stream:
        if not is_own_user(stream.socket):
            raise RemoteProtocolError("it runs as another user")
        await _prove_to_source(stream.socket, order)
        yield stream.socket


async def _prove_to_source(connection: trio.socket.SocketType, order: FetchChunks) -> None:
    challenge = await _expect(connection, LaneChallenge)
    nonce = secrets.token_bytes(NONCE_NBYTES)
    proof = partial(lane_mac, order.ticket, source_nonce=challenge.nonce, target_nonce=nonce, event_id=order.event_id)
    await _send(connection, LaneOpen(order.event_id, nonce, proof(LaneEnd.TARGET)))
    opened = await _expect(connection, LaneOpened)
    if not hmac.compare_digest(proof(LaneEnd.SOURCE), opened.mac):
        raise RemoteProtocolError("it doesn't hold the move's ticket")


# --- both ends ------------------------------------------------------------------------------------------------------------


async def _send(connection: trio.socket.SocketType, message: LaneMessage, descriptors: Sequence[int] = ()) -> None:
    await send_frame(connection, lane_codec().encode(message), descriptors)


async def _expect(connection: trio.socket.SocketType, kind: type[M]) -> M:
    with await _expect_frame(connection) as frame:
        return _decode(frame, kind)


async def _expect_frame(connection: trio.socket.SocketType) -> Frame:
    frame = await _next_frame(connection)
    if frame is None:
        raise RemoteProtocolError("it closed the lane")
    return frame


async def _next_frame(connection: trio.socket.SocketType) -> Frame | None:
    with trio.fail_after(STALL_S):
        return await receive_frame(connection)


def _decode(frame: Frame, kind: type[M]) -> M:
    message = lane_codec().decode(frame.payload)
    if not isinstance(message, kind):
        raise RemoteProtocolError(f"a {type(message).__name__} came instead of a {kind.__name__}")
    return message


def _reason(error: Exception) -> str:
    return f"nothing came for {STALL_S:g} s" if isinstance(error, trio.TooSlowError) else str(error)
