"""The handoff lane: chunks change hands on one host by passing their descriptors, and no byte is copied.

The target connects to the source's unix socket; both run as one user, and prove to each other that they hold the move's ticket.
The source passes only what its open move names and its store holds at that moment. The target takes only what it asked for, and
the store checks each descriptor (sealed for good, exact size, really allocated): that stands for a checksum, as nothing moved.
"""

import os
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from p2pkv.core.chunks import Chunk
from p2pkv.core.effects import FetchChunks
from p2pkv.core.ids import Location, StageId
from p2pkv.core.keys import ChunkKey
from p2pkv.core.records import HandoffAddress
from p2pkv.errors import ErrorCode, Failure, ForeignMemoryError, RemoteProtocolError, UnreadableShardError
from p2pkv.net.descriptors import is_own_user, send_frame
from p2pkv.net.disk_fetch import LoadedShards
from p2pkv.net.lanes import (
    LANE_ERRORS,
    Grants,
    admit_target,
    decode,
    expect_frame,
    next_frame,
    prove_to_source,
    reason_of,
    refusing,
    send,
)
from p2pkv.net.logs import logger
from p2pkv.wire.frames import MAX_FRAME_DESCRIPTORS, Frame
from p2pkv.wire.lane import MAX_FETCH_KEYS, Descriptors, Fetch, PassedShard, lane_codec

LANES_AT_ONCE = 32
"""Targets served at the same time; more wait for their turn. Each is done within milliseconds."""
ADOPT_STRIDE = 32
"""Descriptors checked between two looks at the event loop: about 1 ms."""

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
    disk: LoadedShards | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Pass descriptors to targets that hold the ticket of an open move, until cancelled; those of what is on `disk` too."""
    serve = partial(_serve_target, grants=grants, memory=memory, disk=disk, turns=trio.Semaphore(LANES_AT_ONCE))
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, [listener])
        task_status.started()


async def _serve_target(
    stream: trio.SocketStream, *, grants: Grants, memory: ResidentMemory, disk: LoadedShards | None, turns: trio.Semaphore
) -> None:
    try:
        async with stream, turns:
            if not is_own_user(stream.socket):
                raise RemoteProtocolError("the target runs as another user")
            event_id = await admit_target(stream.socket, grants)
            while (frame := await next_frame(stream.socket)) is not None:
                with frame:
                    fetch = decode(frame, Fetch)
                grant = grants(event_id)
                allowed = [key for key in fetch.keys if grant is not None and key in grant.keys]
                if grant is not None and grant.location is Location.LOCAL_DISK and disk is not None:
                    await _pass_loaded(stream.socket, allowed, disk)
                else:
                    await _pass(stream.socket, allowed, memory)
    except LANE_ERRORS as error:
        _log.warning("a lane was closed", reason=reason_of(error))


async def _pass(connection: trio.socket.SocketType, keys: Iterable[ChunkKey], memory: ResidentMemory) -> None:
    shards = [PassedShard(key, worker) for key in keys for worker in range(len(_descriptors(memory, key)))]
    for start in range(0, len(shards) or 1, MAX_FRAME_DESCRIPTORS):
        batch = shards[start : start + MAX_FRAME_DESCRIPTORS]
        held = {shard.key: _descriptors(memory, shard.key) for shard in batch}  # anew: while a frame goes out, chunks may go
        passed = tuple(shard for shard in batch if held[shard.key])
        is_last = start + MAX_FRAME_DESCRIPTORS >= len(shards)
        payload = lane_codec().encode(Descriptors(passed, is_last))
        await send_frame(connection, payload, [held[shard.key][shard.worker] for shard in passed])


async def _pass_loaded(connection: trio.socket.SocketType, keys: Iterable[ChunkKey], disk: LoadedShards) -> None:
    """Load shards from disk and pass them, one a frame, so that one is in memory here at a time."""
    for key in keys:
        for worker in range(disk.shard_count(key)):
            try:
                shard = await disk.load(key, worker)
            except UnreadableShardError as error:
                _log.warning("a chunk on disk isn't passed", reason=str(error))
                break
            try:
                payload = lane_codec().encode(Descriptors((PassedShard(key, worker),), is_last=False))
                await send_frame(connection, payload, [shard.descriptor])
            finally:
                os.close(shard.descriptor)
    await send_frame(connection, lane_codec().encode(Descriptors((), is_last=True)))


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
        """As `Fetcher.fetch`."""
        haul = _Haul(order, self._memory, fetched)
        batches = [order.chunks[start : start + MAX_FETCH_KEYS] for start in range(0, len(order.chunks), MAX_FETCH_KEYS)]
        try:
            async with _open_lane(order, self._host_id, _request(batches[0])) as connection:
                await haul.take(connection, batches[0])
                for batch in batches[1:]:
                    await send(connection, _request(batch))
                    await haul.take(connection, batch)
        except LANE_ERRORS as error:
            haul.problems.append(reason_of(error))
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

    async def take(self, connection: trio.socket.SocketType, chunks: Sequence[Chunk]) -> None:
        """Take what comes of `chunks`, which were asked for."""
        wanted = {chunk.key: chunk for chunk in chunks}
        fetched_before = len(self._fetched)
        is_last = False
        while not is_last:
            with await expect_frame(connection) as frame:
                answer = decode(frame, Descriptors)
                await self._adopt(answer, frame, wanted)
            is_last = answer.is_last
        missing = len(wanted) - (len(self._fetched) - fetched_before)
        if missing:
            self.problems.append(f"{missing} of {len(wanted)} chunks are held there no longer")

    async def _adopt(self, answer: Descriptors, frame: Frame, wanted: dict[ChunkKey, Chunk]) -> None:
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


def _request(chunks: Sequence[Chunk]) -> Fetch:
    return Fetch(tuple(chunk.key for chunk in chunks))


@asynccontextmanager
async def _open_lane(order: FetchChunks, host_id: str, first_request: Fetch) -> AsyncIterator[trio.socket.SocketType]:
    lane = f"The handoff lane of {order.source!r}"
    with refusing(lane):
        stream = await _connect(order, host_id)
    async with stream:
        with refusing(lane):
            await prove_to_source(stream.socket, order, first_request)
        yield stream.socket


async def _connect(order: FetchChunks, host_id: str) -> trio.SocketStream:
    if not isinstance(order.route, HandoffAddress) or order.route.host_id != host_id:
        raise RemoteProtocolError("it is on another host")
    path = Path(order.route.path)
    if not path.is_socket() or path.stat().st_uid != os.geteuid():
        raise RemoteProtocolError("it is no socket of this user")
    stream = await trio.open_unix_socket(path)
    if not is_own_user(stream.socket):
        await trio.aclose_forcefully(stream)
        raise RemoteProtocolError("another user answers there")
    return stream
