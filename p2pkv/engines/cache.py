"""What an engine uses: its instance's chunks as tensors, through the node's unix socket."""

import os
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from time import sleep
from types import TracebackType
from typing import Self

import torch

from p2pkv.config import NodeConfig
from p2pkv.core.ids import is_instance_id
from p2pkv.core.keys import MAX_TOKENS, Identity, Media, Namespace, TokenBytes, pack_tokens
from p2pkv.engines.autostart import connect_or_start
from p2pkv.engines.connection import REPLY_S, EngineConnection
from p2pkv.engines.layout import KVLayout, open_shard, write_shard
from p2pkv.errors import (
    ErrorCode,
    Failure,
    InvalidRequestError,
    NodeUnreachableError,
    P2pkvError,
    RemoteProtocolError,
    failure_error,
)
from p2pkv.rendezvous import place_of, runtime_directory
from p2pkv.wire.engine import (
    ENGINE_PROTOCOL_VERSION,
    Attach,
    Attached,
    Cleared,
    ClearRequest,
    Commit,
    Lent,
    LookupReply,
    LookupRequest,
    ReadDone,
    Retrieved,
    RetrieveRequest,
    Stored,
    StoreRequest,
)

POLL_FIRST_S, POLL_LONGEST_S = 0.01, 0.1
"""Between two questions whether a fetch has ended. A handoff takes 5 ms; each question costs the node a fraction of one."""

Tokens = Sequence[int] | torch.Tensor
"""A prompt's token ids from its beginning: a sequence of integers (an `array("i")` is the quickest), or a 1-dimensional integer
tensor."""

Take = Callable[[int, torch.Tensor], None]
"""Gets a prompt's KV piece by piece: the position of the piece's first token, and `[layers, planes, tokens, kv_heads of this
worker, head_dim]`, which is the node's memory and gone when the call returns."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """So many tokens are held here; `is_fetching`: more are on their way, so it is worth asking again in some milliseconds."""

    num_tokens: int
    is_fetching: bool


class EngineCache:
    """The KV cache of one worker of an instance's engine; `attach` gives one.

    Any thread may use it; copying goes on outside the lock that orders the exchanges with the node. A forked process gets a
    connection of its own. Each method, besides what it says itself, raises `NodeUnreachableError` when the node is gone or
    silent (the next call connects anew), and `InvalidRequestError` when the tokens aren't a prompt.
    """

    def __init__(
        self,
        connect: Callable[[], EngineConnection],
        attach: Attach,
        layout: KVLayout,
        prefill_tokens_per_s: float | None = None,
    ) -> None:
        self._connect = connect
        self._attach = attach
        self._layout = layout
        self._prefill_tokens_per_s = prefill_tokens_per_s
        self._process = os.getpid()
        self._lock = Lock()
        self._connection: EngineConnection | None = None
        self._greeting: Attached | None = None  # the last
        self._is_closed = False

    @classmethod
    def attach(
        cls,
        config: str | os.PathLike[str] | NodeConfig,
        *,
        model: str,
        layout: KVLayout,
        world_size: int = 1,
        worker_id: int = 0,
        weights: str | None = None,
        prefill_tokens_per_s: float | None = None,
        autostart: bool = True,
        reply_s: float = REPLY_S,
    ) -> Self:
        """Attach a worker of an engine to its instance's node.

        Args:
            config: The instance's yaml, or what was read from it. Only with a file can a node be started.
            model: The model's name: engines that say the same share chunks.
            layout: Of the whole model's KV cache.
            world_size: Tensor-parallel workers of the engine.
            worker_id: Which of them this is, from 0.
            weights: Digest of the weights; None to take the instance's `cache_epoch` for it.
            prefill_tokens_per_s: How fast this engine computes KV, 1 or more: `peer_fetch` weighs fetching against it. None
                lets the node guess.
            autostart: Start the node if none runs. It outlives this process.
            reply_s: How long a call waits for each of the node's replies, in seconds.

        Raises:
            ConfigError: The configuration has problems.
            NodeUnreachableError: No node runs, and none could be started.
            FailureError: The node can't serve this engine; which kind says why.
        """
        node = config if isinstance(config, NodeConfig) else NodeConfig.from_yaml(Path(config))
        place = place_of(runtime_directory(os.environ), node.cluster, node.lmcache_instance_id)
        if autostart and not isinstance(config, NodeConfig):
            connect = partial(connect_or_start, place, Path(config).absolute(), reply_s)
        else:
            connect = partial(EngineConnection.open, place.engine_socket, reply_s)
        attach = Attach(
            version=ENGINE_PROTOCOL_VERSION,
            model=model,
            weights=weights,
            dtype=layout.dtype,
            layers=layout.layers,
            planes=layout.planes,
            kv_heads=layout.kv_heads,
            head_dim=layout.head_dim,
            world_size=world_size,
            worker=worker_id,
        )
        cache = cls(connect, attach, layout.of_worker(world_size), prefill_tokens_per_s)
        cache._attached()
        return cache

    @property
    def namespace(self) -> Namespace:
        """What this engine's chunks are kept under, with what the node added to it at the last attach."""
        assert self._greeting is not None, "`attach` hasn't returned yet"
        return self._greeting.namespace

    def lookup(self, tokens: Tokens, identity: Identity | None = None, *, source: str | None = None) -> int:
        """How many tokens of the prompt are held here, from its beginning; it need not end where a chunk does.

        With `peer_fetch`, what a peer holds is fetched first, for as long as that is sooner than computing it: this waits.

        Args:
            tokens: The prompt.
            identity: What this request adds to the namespace.
            source: As for `peek`.
        """
        request = self._lookup_request(tokens, identity, source)
        pause_s = POLL_FIRST_S
        while (found := self._attached().ask(request, LookupReply)).is_fetching:
            sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_LONGEST_S)
        return found.num_tokens

    def peek(self, tokens: Tokens, identity: Identity | None = None, *, source: str | None = None) -> Lookup:
        """As `lookup`, for who has other work meanwhile: says what is held now and whether to ask again; never waits.

        Args:
            tokens: The prompt.
            identity: What this request adds to the namespace.
            source: An instance that is said to hold the prompt: with `peer_fetch` it is fetched from there if it can be
                reached, whatever the node has heard of it. None to let the node find the best one.

        Raises:
            InvalidRequestError: `source` can't name an instance.
        """
        found = self._attached().ask(self._lookup_request(tokens, identity, source), LookupReply)
        return Lookup(found.num_tokens, found.is_fetching)

    def _lookup_request(self, tokens: Tokens, identity: Identity | None, source: str | None) -> LookupRequest:
        if source is not None and not is_instance_id(source):
            raise _invalid(f"{source!r} can't name an instance")
        return LookupRequest(_complete(identity), _packed(tokens), source, self._prefill_tokens_per_s)

    def store(self, tokens: Tokens, kv: torch.Tensor, identity: Identity | None = None, *, start: int = 0) -> int:
        """Keep a prompt's KV cache; what is held already isn't copied again.

        Args:
            tokens: The prompt.
            kv: Of its tokens from `start` on: `[layers, planes, len(tokens) - start, kv_heads of this worker, head_dim]` in
                the layout's dtype, any strides, any device. Only read, and the caller's again on return.
            identity: What this request adds to the namespace.
            start: First token to keep, where a chunk begins. The chunks before it should be held: without them nobody finds
                these.

        Returns:
            How many tokens of the prompt are held now. Fewer than all when there was no room for the rest; when other workers'
            shards are missing still, those tokens don't count yet.

        Raises:
            InvalidRequestError: `kv` doesn't fit the tokens or the layout, or no chunk begins at `start`.
            StoreFullError: There is no room, and nothing of the prompt is held.
        """
        packed, complete = _packed(tokens), _complete(identity)
        token_count = len(tokens)
        self._layout.check(kv, token_count - start)
        connection = self._attached()
        if start % self.namespace.chunk_size:
            raise _invalid(f"no chunk begins at token {start}, with {self.namespace.chunk_size} tokens in each")
        held, next_token = 0, start
        while next_token < token_count:
            with connection.exchange(StoreRequest(complete, packed, next_token), Lent) as (lent, descriptors):
                for shard, descriptor in zip(lent.shards, descriptors, strict=True):
                    first = shard.start - start
                    write_shard(descriptor, kv[:, :, first : first + shard.token_count])
            held, failure = lent.held_tokens, lent.failure
            if lent.shards:
                stored = connection.ask(Commit(lent.lease), Stored)
                held, failure = stored.held_tokens, stored.failure or failure
            if failure is not None and not held:
                raise failure_error(failure)
            if failure is not None or lent.next_token <= next_token:
                break
            next_token = lent.next_token
        return held

    def retrieve(self, tokens: Tokens, identity: Identity | None = None) -> tuple[int, torch.Tensor | None]:
        """Copy out the longest prefix of the prompt that is held here; it need not end where a chunk does.

        With `peer_fetch` it does a `lookup` first, which may wait.

        Args:
            tokens: The prompt.
            identity: What this request adds to the namespace.

        Returns:
            How many tokens, and their KV: a fresh tensor on the CPU, the caller's, `[layers, planes, that many, kv_heads of
            this worker, head_dim]`. `(0, None)` when nothing is held.
        """
        self._attached()
        if self._greeting is not None and self._greeting.peer_fetch:
            self.lookup(tokens, identity)
        kv: torch.Tensor | None = None
        done = 0
        with closing(self._pieces(tokens, identity, 0)) as pieces:
            for total, first, piece in pieces:
                if kv is None:
                    kv = torch.empty(self._layout.shape(total), dtype=self._layout.torch_dtype)
                done = min(first + piece.shape[2], kv.shape[2])
                kv[:, :, first:done].copy_(piece[:, :, : done - first])
                if done == kv.shape[2]:  # more may be held by now
                    break
        return (done, kv[:, :, :done]) if kv is not None else (0, None)

    def retrieve_into(self, tokens: Tokens, take: Take, identity: Identity | None = None, *, start: int = 0) -> int:
        """Read the prompt's KV from token `start` on, as far as it is held here, without a copy in between.

        Args:
            tokens: The prompt.
            take: Called with each piece, in order. What it raises ends the reading.
            identity: What this request adds to the namespace.
            start: First token that is wanted.

        Returns:
            Up to which token it was taken; at most `start` when nothing from there on is held.
        """
        done = start
        with closing(self._pieces(tokens, identity, start)) as pieces:
            for _, first, piece in pieces:
                skipped = max(start - first, 0)
                if skipped < piece.shape[2]:
                    take(first + skipped, piece[:, :, skipped:])
                    done = first + piece.shape[2]
        return done

    def _pieces(
        self, tokens: Tokens, identity: Identity | None, start: int
    ) -> Generator[tuple[int, int, torch.Tensor], None, None]:
        """What is held, from the chunk of token `start` on: tokens held in all, position of the piece, piece.

        A piece is the node's memory, valid until the next one is asked for.
        """
        packed, complete = _packed(tokens), _complete(identity)
        connection = self._attached()
        done = start - start % self.namespace.chunk_size
        while True:
            with connection.exchange(RetrieveRequest(complete, packed, done), Retrieved) as (retrieved, descriptors):
                try:
                    for shard, descriptor in zip(retrieved.shards, descriptors, strict=True):
                        if shard.start != done:
                            raise RemoteProtocolError(f"the node sent tokens from {shard.start} on, where {done} was next")
                        with open_shard(descriptor, self._layout, shard.token_count) as kv:
                            yield retrieved.num_tokens, shard.start, kv[:, :, : shard.used_count]
                        done += shard.used_count
                finally:
                    if retrieved.lease:
                        with suppress(NodeUnreachableError):  # then the lease ends with the connection
                            connection.tell(ReadDone(retrieved.lease))
            if done >= retrieved.num_tokens or not retrieved.shards:  # no shards: the rest was evicted meanwhile
                return

    def clear(self) -> int:
        """Have the instance forget what it holds of this model and layout, but for what is pinned or being handed over.

        Returns:
            How many tokens were forgotten: those of all chunks.
        """
        return self._attached().ask(ClearRequest(), Cleared).num_tokens

    def close(self) -> None:
        """Detach; what was stored stays. A call that another thread is in ends with `NodeUnreachableError`."""
        if self._process != os.getpid():
            self._leave_parent()
        with self._lock:
            self._is_closed = True
            if self._connection is not None:
                self._connection.shut_down()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _attached(self) -> EngineConnection:
        """The connection of this process, made if there is none. A caller keeps to it: leases are the connection's."""
        if self._process != os.getpid():
            self._leave_parent()
        with self._lock:
            if self._is_closed:
                raise NodeUnreachableError("this EngineCache is closed")
            if self._connection is None or self._connection.is_closed:
                connection = self._connect()
                try:
                    self._greeting = connection.ask(self._attach, Attached)
                except P2pkvError:
                    connection.close()
                    raise
                self._connection = connection
            return self._connection

    def _leave_parent(self) -> None:
        """In a forked process: the parent's connection stays its own, and its locks may be held by threads that aren't here."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._lock = Lock()
        self._process = os.getpid()


def _packed(tokens: Tokens) -> TokenBytes:
    try:
        if len(tokens) > MAX_TOKENS:
            raise _invalid(f"{len(tokens)} tokens are more than {MAX_TOKENS}")
        if isinstance(tokens, torch.Tensor):
            return pack_tokens(tokens.tolist())
        return pack_tokens(tokens if isinstance(tokens, array) else list(tokens))  # bytes would be taken raw
    except (TypeError, ValueError) as error:
        raise _invalid(f"these tokens are no prompt: {error}") from error


def _complete(identity: Identity | None) -> Identity:
    """`identity` with its media as the wire has them; engines may give plain tuples."""
    if identity is None:
        return Identity()
    media: Iterable[Media | tuple[int, int, bytes]] = identity.media
    return replace(identity, media=tuple(item if isinstance(item, Media) else Media(*item) for item in media))


def _invalid(detail: str) -> InvalidRequestError:
    return InvalidRequestError(Failure(ErrorCode.INVALID_REQUEST, detail))
