"""A virtual engine of one instance: stores prompts and reads them back, and now and then hangs or dies before it commits."""

from collections.abc import Container
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING

from p2pkv.core.effects import ENGINE_STAGE, AnswerValue, Found, Lent, Retrieved
from p2pkv.core.events import (
    EngineAttached,
    EngineLost,
    LookupRequested,
    ReadEnded,
    RetrieveRequested,
    ShardsSealed,
    StoreRequested,
)
from p2pkv.core.keys import TOKEN_NBYTES, ChunkKey, Identity, Namespace, TokenBytes, chunk_key, root_key, token_count
from p2pkv.errors import Failure
from sims.ledger import PromiseBrokenError

if TYPE_CHECKING:
    from sims.world import Node, World

NAMESPACE = Namespace(
    model="simulated",
    weights="0",
    dtype="float32",
    layers=1,
    planes=2,
    kv_heads=1,
    head_dim=1,
    chunk_size=4,
    world_size=1,
)
HANG_S = 12.0
"""Longer than any lease: what it commits then, it has lost."""
POLL_S = 0.01
WAIT_MAX_S = 2.0
"""For flights: ten times what is waited for one, as another may bring what has changed meanwhile."""
ROOT = root_key(NAMESPACE, Identity())


def payload(key: ChunkKey) -> bytes:
    """The right bytes of a chunk; any others under its key are wrong."""
    return blake2b(key, digest_size=8).digest()


def chain(tokens: TokenBytes) -> list[ChunkKey]:
    """The root and the keys of a prompt's chunks, the partly filled last one included."""
    keys = [ROOT]
    step = NAMESPACE.chunk_size * TOKEN_NBYTES
    for begin in range(0, len(tokens), step):
        keys.append(chunk_key(keys[-1], tokens[begin : begin + step]))
    return keys


def within(tokens: TokenBytes) -> list[ChunkKey]:
    """Keys of all chunks, partly filled ones included, that may lie wholly inside a prompt."""
    keys = []
    step = NAMESPACE.chunk_size * TOKEN_NBYTES
    for parent, begin in zip(chain(tokens), range(0, len(tokens), step), strict=False):
        part = tokens[begin : begin + step]
        keys += [chunk_key(parent, part[:length]) for length in range(TOKEN_NBYTES, len(part) + 1, TOKEN_NBYTES)]
    return keys


def longest_prefix(tokens: TokenBytes, held: Container[ChunkKey]) -> int:
    """Tokens of the longest prefix of which every chunk is in `held`, the last one at any length."""
    key, end = ROOT, 0
    while len(part := tokens[end * TOKEN_NBYTES :][: NAMESPACE.chunk_size * TOKEN_NBYTES]):
        lengths = range(len(part), 0, -TOKEN_NBYTES)
        length = next((length for length in lengths if chunk_key(key, part[:length]) in held), 0)
        key, end = chunk_key(key, part), end + length // TOKEN_NBYTES
        if length < NAMESPACE.chunk_size * TOKEN_NBYTES:
            break
    return end


@dataclass(slots=True)
class Engine:
    """What is attached to one boot of an instance."""

    world: "World"
    node: "Node"
    client: int = -1

    def attach(self) -> None:
        """Attach to the node, for the first time or after a death."""
        self.client += 1
        attached = partial(EngineAttached, client=self.client, namespace=NAMESPACE, worker=0)
        self.world.request(self.node, attached, lambda *_: None)

    def store(self, tokens: TokenBytes, first_token: int = 0) -> None:
        """Store a prompt from `first_token` on."""
        client = self.client
        self.world.promises.knows_chain(chain(tokens))
        self.world.request(
            self.node,
            lambda request: StoreRequested(request, client, Identity(), tokens, first_token),
            lambda value, _: self._write(client, tokens, value),
        )

    def _write(self, client: int, tokens: TokenBytes, lent: AnswerValue) -> None:
        if not isinstance(lent, Lent) or not lent.shards:
            return
        keys = tuple(shard.key for shard in lent.shards)
        for key in keys:
            self.node.staged[ENGINE_STAGE, key] = payload(key)
        network = self.world.network

        def commit() -> None:
            self.world.request(self.node, lambda request: ShardsSealed(request, client, lent.lease, keys), lambda *_: None)
            if lent.next_token < token_count(tokens) and lent.failure is None:
                self.store(tokens, lent.next_token)

        if not network.happens(network.faults.engine_failure):
            self.world.clock.after(network.delay(), commit)
        elif network.happens(0.5):
            self.world.clock.after(network.delay(), self._die)
        else:
            self.world.clock.after(HANG_S, commit)

    def _die(self) -> None:
        self.world.happen(self.node, EngineLost(self.client))
        self.attach()

    def look_up(self, tokens: TokenBytes) -> None:
        """Look a prompt up until no more of it is coming, and read what is there then."""
        began_at, client, counts = self.world.clock.now, self.client, self.world.promises.sightings.counts

        def ask() -> None:
            if client == self.client:
                lookup = partial(LookupRequested, client=client, identity=Identity(), tokens=tokens, source=None)
                self.world.request(self.node, partial(lookup, prefill_tokens_per_s=None), answered)

        def answered(found: AnswerValue, _failure: Failure | None) -> None:
            assert isinstance(found, Found)
            waited_s = self.world.clock.now - began_at
            if found.is_fetching and waited_s > WAIT_MAX_S:
                raise PromiseBrokenError(f"R5: an engine of {self.node.name} has waited {waited_s:.1f} s for a flight")
            if found.is_fetching:
                self.world.clock.after(POLL_S, ask)
            else:
                counts["lookup waited"] += waited_s > 0
                counts["lookup waited in vain"] += waited_s > 0 and found.num_tokens < token_count(tokens)
                self.read(tokens)

        ask()

    def read(self, tokens: TokenBytes) -> None:
        """Read the longest prefix of a prompt that is held, and take some time over it."""
        client = self.client
        self.world.request(
            self.node,
            lambda request: RetrieveRequested(request, client, Identity(), tokens),
            lambda value, _: self._read(client, value),
        )

    def _read(self, client: int, found: AnswerValue) -> None:
        if not isinstance(found, Retrieved) or not found.shards:
            return
        for shard in found.shards:
            if self.node.resident.get(shard.key) != payload(shard.key):
                about = (shard.key.hex(),)
                raise PromiseBrokenError(
                    f"M5: {self.node.name} gives an engine {shard.key.hex()}, whose bytes aren't right", about
                )
        self.world.clock.after(self.world.network.delay(), lambda: self.world.happen(self.node, ReadEnded(client, found.lease)))
