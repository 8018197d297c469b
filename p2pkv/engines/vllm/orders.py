"""What the scheduler half tells the worker halves with each step; it travels pickled."""

from array import array
from dataclasses import dataclass

from p2pkv.core.keys import Identity
from p2pkv.engines.layout import KVLayout


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Fill a request's blocks with what the node holds.

    Attributes:
        request_id: vLLM's name of the request.
        tokens: The request's tokens, from the first to the last one to be loaded; int32.
        identity: Whose chunks they are.
        block_ids: The request's blocks, from the first token's on.
        start: First token to load, where a block begins; what comes before it is in the blocks.
    """

    request_id: str
    tokens: "array[int]"
    identity: Identity
    block_ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class StoreOrder:
    """Keep what is in a request's blocks once this step has been computed.

    Attributes:
        request_id: vLLM's name of the request.
        tokens: The request's tokens, from the first to the last one to be kept; int32.
        identity: Whose chunks they will be.
        block_ids: The request's blocks, from the first token's on.
        start: First token to keep, where a chunk begins; what comes before it was found or kept.
        chunk_size: Tokens in a full chunk.
    """

    request_id: str
    tokens: "array[int]"
    identity: Identity
    block_ids: tuple[int, ...]
    start: int
    chunk_size: int


@dataclass(frozen=True, slots=True)
class ConnectorMetadata:
    """One step's orders.

    Attributes:
        loads: To be started in this step.
        stores: To be started once this step has been computed.
        preempted: Requests whose blocks may be overwritten from this step on.
        finished: Requests that have ended; their blocks aren't reused until the worker says that it has read them.
        is_idle: Whether this step computes nothing: vLLM only waits for lookups, loads or stores.
    """

    loads: tuple[LoadOrder, ...] = ()
    stores: tuple[StoreOrder, ...] = ()
    preempted: tuple[str, ...] = ()
    finished: tuple[str, ...] = ()
    is_idle: bool = False


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker half found when vLLM's caches were registered.

    Attributes:
        layout: Of the whole model's KV cache; None when it can't be used.
        refusal: Why it can't; None when it can.
    """

    layout: KVLayout | None
    refusal: str | None

    def aggregate(self, other: "WorkerReport") -> "WorkerReport":
        """One report for both workers: one that can't is one too many."""
        return self if self.refusal is not None else other
