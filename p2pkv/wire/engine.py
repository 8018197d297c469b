"""What an engine and its node say to each other over the node's unix socket.

A conversation is request, reply, request, reply; `ReadDone` alone has no reply. The first request is `Attach`. Memory travels
as descriptors, one for each of a reply's `shards` and in their order: `Lent` for the engine to write, `Retrieved` to read. A
long prompt takes several rounds, because a frame carries only so many.
"""

from dataclasses import dataclass
from functools import cache
from typing import Annotated

from annotated_types import Ge, Le, Len

from p2pkv.core.effects import LentShard, RetrievedShard
from p2pkv.core.ids import InstanceId
from p2pkv.core.keys import MAX_TOKENS, DtypeName, Identity, Namespace, TokenBytes
from p2pkv.errors import Failure
from p2pkv.wire.codec import Codec
from p2pkv.wire.frames import MAX_FRAME_DESCRIPTORS

ENGINE_PROTOCOL_VERSION = 1

LeaseId = Annotated[str, Len(0, 256)]
"""Names memory in use; empty when there is none."""
TokenCount = Annotated[int, Ge(0), Le(MAX_TOKENS)]


# --- engine to node -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attach:
    """Who I am. Answered with `Attached`.

    Attributes:
        version: `ENGINE_PROTOCOL_VERSION` of the engine's side.
        model: The model's name.
        weights: Digest of the weights; None to take the node's `cache_epoch` for it.
        dtype: Of the KV cache.
        layers: Layers of the whole model.
        planes: 2 for keys and values, 1 for MLA.
        kv_heads: KV heads of the whole model.
        head_dim: Elements of a head.
        world_size: Tensor-parallel workers.
        worker: Which of them this connection belongs to.
    """

    version: int
    model: Annotated[str, Len(1, 512)]
    weights: Annotated[str, Len(0, 128)] | None
    dtype: DtypeName
    layers: Annotated[int, Ge(1), Le(4096)]
    planes: Annotated[int, Ge(1), Le(2)]
    kv_heads: Annotated[int, Ge(1), Le(65536)]
    head_dim: Annotated[int, Ge(1), Le(65536)]
    world_size: Annotated[int, Ge(1), Le(1024)]
    worker: Annotated[int, Ge(0), Le(1023)]


@dataclass(frozen=True, slots=True)
class LookupRequest:
    """How long a prefix of `tokens` is held here? Answered with `LookupReply`.

    Attributes:
        identity: What the request adds to the namespace.
        tokens: The prompt.
        source: An instance that is said to hold it, where `peer_fetch` shall look first; None to look everywhere.
        prefill_tokens_per_s: How fast the engine computes KV, to weigh a fetch against; None to let the node guess.
    """

    identity: Identity
    tokens: TokenBytes
    source: InstanceId | None = None
    prefill_tokens_per_s: Annotated[float, Ge(1), Le(1e9)] | None = None


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """Lend me memory for what is missing of `tokens` from `first_token` on. Answered with `Lent`."""

    identity: Identity
    tokens: TokenBytes
    first_token: TokenCount


@dataclass(frozen=True, slots=True)
class Commit:
    """The shards of this lease are written and unmapped. Answered with `Stored`."""

    lease: LeaseId


@dataclass(frozen=True, slots=True)
class RetrieveRequest:
    """Give me the longest held prefix of `tokens`, from `first_token` on. Answered with `Retrieved`."""

    identity: Identity
    tokens: TokenBytes
    first_token: TokenCount


@dataclass(frozen=True, slots=True)
class ClearRequest:
    """Forget all chunks of my namespace. Answered with `Cleared`."""


@dataclass(frozen=True, slots=True)
class ReadDone:
    """I have copied what I retrieved under this lease. Not answered."""

    lease: LeaseId


# --- node to engine -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attached:
    """Welcome; this is your namespace, with what the node adds to it, and whether lookups fetch from peers."""

    namespace: Namespace
    peer_fetch: bool = False


@dataclass(frozen=True, slots=True)
class LookupReply:
    """So many tokens are held here. `is_fetching`: more are on their way; ask again soon, until it says no."""

    num_tokens: TokenCount
    is_fetching: bool = False


@dataclass(frozen=True, slots=True)
class Lent:
    """Memory to write, one descriptor a shard.

    Attributes:
        lease: To commit them under; empty when none are lent.
        shards: What goes where, prefix first.
        next_token: Ask again from here after the commit; the prompt's length when nothing is left to do.
        held_tokens: Longest prefix held now.
        failure: Why no more could be lent; None when all that is missing was, or will be from `next_token` on.
    """

    lease: LeaseId
    shards: Annotated[tuple[LentShard, ...], Len(0, MAX_FRAME_DESCRIPTORS)]
    next_token: TokenCount
    held_tokens: TokenCount
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class Stored:
    """The lease is over.

    Attributes:
        held_tokens: Longest prefix held now.
        failure: Why some of the lease's shards were refused and dropped; None when none were.
    """

    held_tokens: TokenCount
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class Retrieved:
    """Memory to read, one descriptor a shard.

    Attributes:
        lease: To be given back with `ReadDone`; empty when there is nothing to read.
        num_tokens: Longest prefix held now.
        shards: What it is made of from the asked token on, prefix first; ask again for what is missing at the end.
    """

    lease: LeaseId
    num_tokens: TokenCount
    shards: Annotated[tuple[RetrievedShard, ...], Len(0, MAX_FRAME_DESCRIPTORS)]


@dataclass(frozen=True, slots=True)
class Cleared:
    """So many tokens are forgotten: of all chunks that are neither pinned nor being handed over."""

    num_tokens: Annotated[int, Ge(0)]


@dataclass(frozen=True, slots=True)
class Refused:
    """No, and why. After a `protocol_error` the node closes the connection."""

    failure: Failure


EngineRequest = Attach | LookupRequest | StoreRequest | Commit | RetrieveRequest | ReadDone | ClearRequest
EngineReply = Attached | LookupReply | Lent | Stored | Retrieved | Cleared | Refused


@cache
def request_codec() -> Codec[EngineRequest]:
    """The codec of what engines say; made once, on first use."""
    return Codec(EngineRequest)


@cache
def reply_codec() -> Codec[EngineReply]:
    """The codec of what the node says; made once, on first use."""
    return Codec(EngineReply)
