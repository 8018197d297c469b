"""What engines ask of their instance: lend memory to store a prompt's chunks, and lease what they read.

Rules:
    A prompt is stored prefix first. What is held already is touched, not stored again; what an engine stores while it is on its
    way out stays (`keep`); what a move is bringing is left to the move until its bytes are here, and owned from then on.
    A chunk is owned when all its shards are sealed. Shards that nobody commits within `lease_s`, or whose engine is gone, are
    dropped; a late commit of them is refused.
    An engine reads under a lease, so that what it reads isn't evicted; the lease ends by itself.

Not decided here: memory itself, and whether it could be sealed (the store).
"""

from collections import defaultdict
from dataclasses import dataclass
from math import inf

from p2pkv.core.chunks import Chunk
from p2pkv.core.config import MachineConfig
from p2pkv.core.effects import ENGINE_STAGE, DropStaged, Lent, LentShard, Retrieved, RetrievedShard
from p2pkv.core.events import (
    ClientId,
    EngineAttached,
    EngineClearRequested,
    EngineLost,
    ReadEnded,
    RetrieveRequested,
    ShardsSealed,
    StoreRequested,
)
from p2pkv.core.holdings import Holdings
from p2pkv.core.ids import EventId, Location
from p2pkv.core.keys import (
    TOKEN_NBYTES,
    ChunkKey,
    Namespace,
    chunk_key,
    namespace_digest,
    token_count,
)
from p2pkv.core.outbox import Outbox
from p2pkv.core.prompt import Prompt, prompt_of
from p2pkv.core.residency import Incoming, Keep, Match, Outgoing, Residencies, Residency, Writing
from p2pkv.errors import ErrorCode, Failure

LEND_SHARDS = 64
LEND_NBYTES = 256 * 2**20
"""Of one `Lent`: what an engine writes in a fraction of a second, far below any lease, so that a long prompt needs little room
at a time. One shard is lent whatever its size."""


@dataclass(frozen=True, slots=True)
class _Client:
    namespace: Namespace
    shard: int


@dataclass(slots=True)
class _Lease:
    """What one engine writes or reads: shards that it was lent, and chunks that may not be evicted meanwhile."""

    client: ClientId
    prompt: Prompt
    expires_at: float
    leased: list[Residency]
    lent: dict[ChunkKey, None]


class Serving:
    """The attached engines, and their leases."""

    def __init__(self, config: MachineConfig, holdings: Holdings, outbox: Outbox, keep: Keep) -> None:
        self._config = config
        self._holdings = holdings
        self._outbox = outbox
        self._keep = keep
        self._clients: dict[ClientId, _Client] = {}
        self._leases: dict[str, _Lease] = {}
        self._assembling: dict[ChunkKey, float] = {}
        self._lease_count = 0

    @property
    def _book(self) -> Residencies:
        return self._holdings.books[Location.LOCAL_CPU]

    # --- attach and lookup ------------------------------------------------------------------------------------------------

    def attach(self, event: EngineAttached) -> None:
        """An engine's worker says what it is."""
        namespace, worker = event.namespace, event.worker
        if Location.LOCAL_CPU not in self._holdings.books:
            detail = f"Instance {self._config.instance!r} stores nothing; attach to one that does."
            self._outbox.refuse(event.request, ErrorCode.UNKNOWN_LOCATION, detail)
            return
        problem = self._holdings.learn(namespace)
        if problem is None and not 0 <= worker < namespace.world_size:
            detail = f"There is no worker {worker} among {namespace.world_size}; they count from 0."
            problem = Failure(ErrorCode.INVALID_REQUEST, detail)
        if problem is not None:
            self._outbox.fail(event.request, problem)
            return
        shard = worker if namespace.shard_count() > 1 else 0
        self._clients[event.client] = _Client(namespace, shard)
        self._outbox.answer(event.request, None)

    def namespace_of(self, client: ClientId) -> Namespace:
        """What an engine attached with."""
        return self._clients[client].namespace

    def held_tokens(self, prompt: Prompt) -> int:
        """Tokens of the longest prefix that is held here, token by token."""
        return _end_of(self._book.match(prompt))

    # --- store ------------------------------------------------------------------------------------------------------------

    def store(self, event: StoreRequested, now: float) -> None:
        """Lend memory for the chunks of a prompt that are missing from `first_token` on."""
        client = self._clients[event.client]
        prompt = prompt_of(client.namespace, event.identity, event.tokens)
        chunks = _chunks_of(client.namespace, prompt)
        self._use(chunks, now)
        matches = self._book.match(prompt)
        name, lease = self._new_lease(event.client, prompt, matches, now)
        shards: list[LentShard] = []
        next_token, failure = token_count(event.tokens), None
        for chunk in chunks:
            if chunk.end <= event.first_token or not self._is_missing(chunk, client):
                continue
            if len(shards) == LEND_SHARDS or sum(shard.nbytes for shard in shards) > LEND_NBYTES:
                next_token = chunk.start
                break
            failure = self._lend(chunk, client, name, now)
            if failure is not None:
                next_token = chunk.start
                break
            lease.lent[chunk.key] = None
            shards.append(LentShard(chunk.key, chunk.start, chunk.token_count, chunk.shard_nbytes[client.shard]))
        if not shards:
            self._end_lease(name)
        answer = Lent(name if shards else "", client.shard, tuple(shards), next_token, _end_of(matches), failure)
        self._outbox.answer(event.request, answer)

    def _use(self, chunks: list[Chunk], now: float) -> None:
        """These chunks are used: last to be evicted, kept if a move was taking them away, owned if one was bringing them."""
        kept: dict[EventId, list[ChunkKey]] = defaultdict(list)
        for chunk in reversed(chunks):
            residency = self._book.get(chunk.key)
            if residency is None:
                continue
            if isinstance(residency.slot, Outgoing):
                kept[residency.slot.move].append(chunk.key)
            if isinstance(residency.slot, Incoming) and residency.slot.is_verified:
                self._holdings.own_staged(self._book, residency, stage=residency.slot.move, now=now)
            elif residency.is_owned:
                self._book.touch(residency, now)
        self._keep(kept, now)

    def _is_missing(self, chunk: Chunk, client: _Client) -> bool:
        """Whether nobody has, brings, or writes this client's shard of it."""
        residency = self._book.get(chunk.key)
        if residency is None:
            return True
        writing = residency.slot
        return isinstance(writing, Writing) and client.shard not in writing.lent and client.shard not in writing.sealed

    def _lend(self, chunk: Chunk, client: _Client, lease: str, now: float) -> Failure | None:
        residency = self._book.get(chunk.key)
        if residency is None:
            if not self._holdings.make_room(self._book, self._book.room_of(chunk), now=now):
                detail = f"No room for {chunk.charged_nbytes} bytes: {self._book.fullness(now)}, and none can go now."
                return Failure(ErrorCode.STORE_FULL, detail)
            residency = self._book.enter(chunk, Writing(), now)
        if isinstance(residency.slot, Writing):
            residency.slot.lent[client.shard] = lease
        self._assembling.pop(chunk.key, None)
        self._assembling[chunk.key] = now + self._config.lease_s
        return None

    def sealed(self, event: ShardsSealed, now: float) -> None:
        """An engine committed what it was lent: own the chunks that are complete by that, drop what couldn't be sealed."""
        lease = self._leases.get(event.lease)
        if lease is None or lease.client != event.client or not lease.lent:
            detail = f"Lease {event.lease!r} has ended: it wasn't committed within {self._config.lease_s:g} s. Store again."
            self._outbox.refuse(event.request, ErrorCode.DEADLINE_EXCEEDED, detail)
            return
        client = self._clients[event.client]
        for key in reversed([key for key in lease.lent if key in event.sealed]):
            residency = self._book.get(key)
            if residency is None or not isinstance(residency.slot, Writing):
                continue
            del residency.slot.lent[client.shard], lease.lent[key]
            residency.slot.sealed[client.shard] = None
            if len(residency.slot.sealed) == client.namespace.shard_count():
                del self._assembling[key]
                self._holdings.own_staged(self._book, residency, stage=ENGINE_STAGE, now=now)
        for residency in reversed(lease.leased):
            if self._book.get(residency.chunk.key) is residency and residency.is_owned:  # a move may have taken it away
                self._book.touch(residency, now)
        self._end_lease(event.lease)
        self._outbox.answer(event.request, _end_of(self._book.match(lease.prompt)))

    # --- retrieve ---------------------------------------------------------------------------------------------------------

    def retrieve(self, event: RetrieveRequested, now: float) -> None:
        """Lease the longest prefix held here for reading."""
        client = self._clients[event.client]
        prompt = prompt_of(client.namespace, event.identity, event.tokens)
        matches = self._book.match(prompt)
        name = ""
        if matches:
            name, _lease = self._new_lease(event.client, prompt, matches, now)
            for match in reversed(matches):
                self._book.touch(match.residency, now)
        shards = (
            RetrievedShard(
                key=match.residency.chunk.key,
                start=match.start,
                used_count=match.used_count,
                token_count=match.residency.chunk.token_count,
                nbytes=match.residency.chunk.shard_nbytes[client.shard],
            )
            for match in matches
        )
        answer = Retrieved(name, client.shard, self._book.location, _end_of(matches), tuple(shards))
        self._outbox.answer(event.request, answer)

    def clear(self, event: EngineClearRequested, now: float) -> None:
        """Forget all chunks of the engine's namespace that may go."""
        namespace = namespace_digest(self._clients[event.client].namespace)
        self._outbox.answer(event.request, self._holdings.clear(self._book, now, namespace))

    def read_ended(self, event: ReadEnded) -> None:
        """An engine needs what it read no longer."""
        lease = self._leases.get(event.lease)
        if lease is not None and lease.client == event.client:
            self._end_lease(event.lease)

    # --- leases -----------------------------------------------------------------------------------------------------------

    def _new_lease(self, client: ClientId, prompt: Prompt, matches: list[Match], now: float) -> tuple[str, _Lease]:
        name = f"lease-{self._lease_count}"
        self._lease_count += 1
        expires_at = now + self._config.lease_s
        lease = _Lease(client, prompt, expires_at, [match.residency for match in matches], {})
        for residency in lease.leased:
            residency.leases[name] = expires_at
        self._leases[name] = lease
        return name, lease

    def _end_lease(self, name: str) -> None:
        """Nothing is leased under `name` any more; shards that weren't committed are dropped."""
        lease = self._leases.pop(name)
        for leased in lease.leased:
            leased.leases.pop(name, None)
        shard = self._clients[lease.client].shard
        for key in lease.lent:
            residency = self._book.get(key)
            if residency is None or not isinstance(residency.slot, Writing) or residency.slot.lent.get(shard) != name:
                continue
            del residency.slot.lent[shard]
            self._outbox.add(DropStaged(ENGINE_STAGE, self._book.location, key, worker=shard))
            if not residency.slot.lent and not residency.slot.sealed:
                del self._assembling[key]
                self._book.remove(residency)

    def engine_lost(self, event: EngineLost) -> None:
        """An engine's connection closed: its leases end, what it stored stays."""
        for name in [name for name, lease in self._leases.items() if lease.client == event.client]:
            self._end_lease(name)
        self._clients.pop(event.client, None)

    def wakeup_at(self) -> float:
        """When the next lease ends; all are equally long, so the first is the oldest."""
        lease = next(iter(self._leases.values()), None)
        return min(inf if lease is None else lease.expires_at, next(iter(self._assembling.values()), inf))

    def wake(self, now: float) -> None:
        """End leases that nobody ended, and drop chunks whose other workers never stored their shards."""
        for name in [name for name, lease in self._leases.items() if lease.expires_at <= now]:
            self._end_lease(name)
        for key in [key for key, expires_at in self._assembling.items() if expires_at <= now]:
            residency = self._book.get(key)
            del self._assembling[key]
            if residency is not None and isinstance(residency.slot, Writing):
                self._holdings.drop_staged(self._book, residency, stage=ENGINE_STAGE)

    def check_invariants(self) -> None:
        """Assert what must hold between any two events."""
        book = self._holdings.books.get(Location.LOCAL_CPU, ())
        writing = {residency.chunk.key for residency in book if isinstance(residency.slot, Writing)}
        assert writing == self._assembling.keys(), "chunks are being written that nobody will ever drop"


def _chunks_of(namespace: Namespace, prompt: Prompt) -> list[Chunk]:
    """A prompt cut into chunks, prefix first, the partly filled last one included."""
    chunks, parent = [], prompt.root
    step = prompt.chunk_size * TOKEN_NBYTES
    for begin in range(0, len(prompt.tokens), step):
        part = prompt.tokens[begin : begin + step]
        shard_nbytes = (namespace.shard_nbytes(token_count(part)),) * namespace.shard_count()
        chunk = Chunk(chunk_key(parent, part), parent, prompt.namespace, begin // TOKEN_NBYTES, part, shard_nbytes)
        chunks.append(chunk)
        parent = chunk.key
    return chunks


def _end_of(matches: list[Match]) -> int:
    return matches[-1].end if matches else 0
