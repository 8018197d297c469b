"""The engine socket: where engines on this host store and retrieve, over a unix socket that carries memory as descriptors.

Each connection is one worker of an engine, and one task. What is held, lent or refused is the core's decision; this door makes
the memory that is lent, seals what is committed, and passes descriptors. An engine that breaks the protocol is disconnected
with a reason, and so is one of another user; the others don't notice.
"""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Protocol, assert_never

import trio

from p2pkv.core import effects
from p2pkv.core.effects import ENGINE_STAGE
from p2pkv.core.events import (
    EngineAttached,
    EngineClearRequested,
    EngineLost,
    LookupRequested,
    ReadEnded,
    RetrieveRequested,
    ShardsSealed,
    StoreRequested,
)
from p2pkv.core.ids import StageId
from p2pkv.core.keys import TOKEN_NBYTES, ChunkKey, Namespace
from p2pkv.errors import ErrorCode, Failure, FailureError, RemoteProtocolError, SealRefusedError
from p2pkv.net.descriptors import is_own_user, receive_frame, send_frame
from p2pkv.net.driver import Driver
from p2pkv.net.logs import logger
from p2pkv.wire.engine import (
    ENGINE_PROTOCOL_VERSION,
    Attach,
    Attached,
    Cleared,
    ClearRequest,
    Commit,
    EngineReply,
    EngineRequest,
    Lent,
    LookupReply,
    LookupRequest,
    ReadDone,
    Refused,
    Retrieved,
    RetrieveRequest,
    Stored,
    StoreRequest,
    reply_codec,
    request_codec,
)
from p2pkv.wire.frames import MAX_FRAME_DESCRIPTORS

CONNECTIONS_MAX = 256
"""Workers of an instance's engine, and what else attaches for a moment; one more is turned away. Each may have a frame of 8 MiB
under way."""

LEASES_MAX = 64
"""Uncommitted leases of one engine, one for each of its threads that stores: expired ones are remembered too."""

_log = logger("engine_door")


class LendingMemory(Protocol):
    """What this door needs of the store."""

    def lend(self, stage: StageId, key: ChunkKey, worker: int, nbytes: int) -> int:
        """Stage fresh memory for an engine to write; the descriptor stays the store's."""

    def seal(self, stage: StageId, key: ChunkKey, worker: int) -> None:
        """Make lent memory read-only, or raise `SealRefusedError`."""

    def descriptors(self, key: ChunkKey) -> tuple[int, ...]:
        """Descriptors of a resident chunk's shards, in order of workers; they stay the store's."""


class EngineDoor:
    """Serves engines on a listening unix socket.

    Args:
        driver: Takes the engines' requests.
        memory: The store that the driver's effects go to.
        chunk_size: Tokens in a full chunk; the node adds it to every engine's namespace.
        cache_epoch: Stands for the weights where an engine doesn't name them.
    """

    def __init__(self, driver: Driver, memory: LendingMemory, *, chunk_size: int, cache_epoch: str) -> None:
        self._driver = driver
        self._memory = memory
        self._chunk_size = chunk_size
        self._cache_epoch = cache_epoch
        self._connection_count = 0
        self._last_lent: _LastLent = {}

    async def serve(  # noqa: ASYNC128 - `serve_listeners` says that it has started
        self,
        listener: trio.socket.SocketType,
        *,
        task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled; then the listener and all connections are closed."""
        await trio.serve_listeners(self._serve_connection, [trio.SocketListener(listener)], task_status=task_status)

    async def _serve_connection(self, stream: trio.SocketStream) -> None:
        self._connection_count += 1
        try:
            async with stream:
                await self._converse(stream.socket)
        except OSError as error:
            _log.info("engine connection broke", reason=str(error))
        finally:
            self._connection_count -= 1

    async def _converse(self, connection: trio.socket.SocketType) -> None:
        try:
            if not is_own_user(connection):
                raise RemoteProtocolError("the engine runs as another user")
            if self._connection_count > CONNECTIONS_MAX:
                raise RemoteProtocolError(f"{CONNECTIONS_MAX} engine connections are open already")
            if (request := await _receive(connection)) is None:
                return
            if not isinstance(request, Attach):
                raise RemoteProtocolError(f"the first request is to be an Attach, not a {type(request).__name__}")
            await self._serve_engine(connection, request)
        except RemoteProtocolError as error:
            _log.warning("engine disconnected", reason=str(error))
            await _send(connection, Refused(Failure(ErrorCode.PROTOCOL_ERROR, f"Disconnected: {error}.")))

    async def _serve_engine(self, connection: trio.socket.SocketType, attach: Attach) -> None:
        if attach.version != ENGINE_PROTOCOL_VERSION:
            raise RemoteProtocolError(
                f"the engine speaks version {attach.version} of this protocol, this node version {ENGINE_PROTOCOL_VERSION}"
            )
        namespace = Namespace(
            model=attach.model,
            weights=self._cache_epoch if attach.weights is None else attach.weights,
            dtype=attach.dtype,
            layers=attach.layers,
            planes=attach.planes,
            kv_heads=attach.kv_heads,
            head_dim=attach.head_dim,
            chunk_size=self._chunk_size,
            world_size=attach.world_size,
        )
        client = self._driver.new_client()
        try:
            await self._driver.request(partial(EngineAttached, client=client, namespace=namespace, worker=attach.worker))
        except FailureError as error:
            await _send(connection, Refused(error.failure))
            return
        if attach.world_size > 1 and attach.worker == 0:
            _log.warning("max_local_cpu_size is the instance's: its workers share it", workers=attach.world_size)
        engine = _Engine(self._driver, self._memory, client, self._last_lent)
        try:
            await _send(connection, Attached(namespace, self._driver.machine.config.peer_fetch))
            while (request := await _receive(connection)) is not None:
                await engine.answer(request, connection)
        finally:
            engine.forget()
            self._driver.handle(EngineLost(client))


_LastLent = dict[tuple[ChunkKey, int], str]
"""Under which lease a shard, by key and worker, was lent last: an older lease has expired, and must not touch it."""


class _Engine:
    """One attached worker, and the memory that it has been lent."""

    def __init__(self, driver: Driver, memory: LendingMemory, client: int, last_lent: _LastLent) -> None:
        self._driver = driver
        self._memory = memory
        self._client = client
        self._last_lent = last_lent
        self._leases: dict[str, tuple[tuple[ChunkKey, int], ...]] = {}

    async def answer(self, request: EngineRequest, connection: trio.socket.SocketType) -> None:
        """Do what is asked and send the reply, if it has one."""
        try:
            match request:
                case LookupRequest():
                    await _send(connection, await self._look_up(request))
                case StoreRequest():
                    await _send(connection, *await self._store(request))
                case Commit():
                    await _send(connection, await self._commit(request.lease))
                case RetrieveRequest():
                    await _send(connection, *await self._retrieve(request))
                case ClearRequest():
                    await _send(connection, await self._clear())
                case ReadDone():
                    self._driver.handle(ReadEnded(self._client, request.lease))
                case Attach():
                    raise RemoteProtocolError("it has attached already")
                case _:
                    assert_never(request)
        except FailureError as error:
            await _send(connection, Refused(error.failure))

    def forget(self) -> None:
        """It is gone, and its leases with it."""
        for lease in list(self._leases):
            self._end_lease(lease)

    async def _look_up(self, request: LookupRequest) -> LookupReply:
        _check_tokens(request.tokens)
        answer = await self._driver.request(
            partial(
                LookupRequested,
                client=self._client,
                identity=request.identity,
                tokens=request.tokens,
                source=request.source,
                prefill_tokens_per_s=request.prefill_tokens_per_s,
            )
        )
        assert isinstance(answer, effects.Found)
        return LookupReply(answer.num_tokens, answer.is_fetching)

    async def _store(self, request: StoreRequest) -> tuple[Lent, list[int]]:
        _check_tokens(request.tokens)
        if len(self._leases) >= LEASES_MAX:
            raise RemoteProtocolError(f"{LEASES_MAX} leases aren't committed")
        answer = await self._driver.request(
            partial(
                StoreRequested,
                client=self._client,
                identity=request.identity,
                tokens=request.tokens,
                first_token=request.first_token,
            )
        )
        assert isinstance(answer, effects.Lent)
        lent = tuple((shard.key, answer.worker) for shard in answer.shards)
        if lent:
            self._leases[answer.lease] = lent
            self._last_lent.update(dict.fromkeys(lent, answer.lease))
        descriptors = [self._memory.lend(ENGINE_STAGE, shard.key, answer.worker, shard.nbytes) for shard in answer.shards]
        return Lent(answer.lease, answer.shards, answer.next_token, answer.held_tokens, answer.failure), descriptors

    async def _commit(self, lease: str) -> Stored:
        if lease not in self._leases:
            raise RemoteProtocolError("a commit of a lease that the engine doesn't have")
        sealed, reasons = [], []
        for key, worker in self._leases[lease]:
            try:
                if self._last_lent.get((key, worker)) != lease:
                    raise SealRefusedError("its lease had expired, and it was lent anew")
                self._memory.seal(ENGINE_STAGE, key, worker)
                sealed.append(key)
            except SealRefusedError as error:
                reasons.append(str(error))
            await trio.lowlevel.checkpoint()  # a seal takes 0.3 ms
        self._end_lease(lease)
        held = await self._driver.request(partial(ShardsSealed, client=self._client, lease=lease, sealed=tuple(sealed)))
        assert isinstance(held, int)
        failure = Failure(ErrorCode.INVALID_REQUEST, f"{len(reasons)} shards were refused: {reasons[0]}.") if reasons else None
        return Stored(held, failure)

    async def _retrieve(self, request: RetrieveRequest) -> tuple[Retrieved, list[int]]:
        _check_tokens(request.tokens)
        answer = await self._driver.request(
            partial(RetrieveRequested, client=self._client, identity=request.identity, tokens=request.tokens)
        )
        assert isinstance(answer, effects.Retrieved)
        wanted = (shard for shard in answer.shards if shard.start >= request.first_token)
        shards = tuple(islice(wanted, MAX_FRAME_DESCRIPTORS))
        descriptors = [self._memory.descriptors(shard.key)[answer.worker] for shard in shards]
        return Retrieved(answer.lease, answer.num_tokens, shards), descriptors

    async def _clear(self) -> Cleared:
        count = await self._driver.request(partial(EngineClearRequested, client=self._client))
        assert isinstance(count, int)
        return Cleared(count)

    def _end_lease(self, lease: str) -> None:
        for shard in self._leases.pop(lease):
            if self._last_lent.get(shard) == lease:
                del self._last_lent[shard]


def _check_tokens(tokens: bytes) -> None:
    if len(tokens) % TOKEN_NBYTES:
        raise RemoteProtocolError(f"{len(tokens)} bytes of tokens aren't whole int32 numbers")


async def _receive(connection: trio.socket.SocketType) -> EngineRequest | None:
    """The next request; None when the engine has closed the connection."""
    frame = await receive_frame(connection)
    if frame is None:
        return None
    with frame:
        if frame.descriptors:
            raise RemoteProtocolError("an engine passes no descriptors")
        return request_codec().decode(frame.payload)


async def _send(connection: trio.socket.SocketType, reply: EngineReply, descriptors: Sequence[int] = ()) -> None:
    await send_frame(connection, reply_codec().encode(reply), descriptors)
