"""The scheduler half: which requests' KV the node holds, what is loaded into whose blocks, and what is stored when.

Rules:
    Nothing here waits for the node: lookups are asked in a thread, all else is orders for the workers.
    A request is loaded at most once for each time that it is scheduled afresh; if that fails, it is computed.
    A prompt is stored when its prefill is complete, what was generated when the request ends. What was found is not stored
    again, but for the partly filled last chunk, which keeps a prompt findable, and movable, by its own tokens.
    Only what vLLM has computed, or loaded with success, is stored: nothing of a request that hasn't run since it got its
    blocks.
    A request's blocks are kept from reuse until the workers have read what they were ordered to store of it.
    What is known of a request goes when it ends.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from p2pkv.core.ids import is_instance_id
from p2pkv.core.keys import Identity
from p2pkv.engines.vllm.identity import Bypass, Identities
from p2pkv.engines.vllm.link import NodeLink
from p2pkv.engines.vllm.lookups import Lookup, Lookups
from p2pkv.engines.vllm.orders import ConnectorMetadata, LoadOrder, StoreOrder
from p2pkv.engines.vllm.tally import Count, Tally

SKIP_SAVE = ("skip_save", "lmcache.skip_save")
"""Of a request's `kv_transfer_params`: nothing of it is stored. The second is LMCache's."""

WORTHWHILE_TOKENS = 8
"""A shorter match is computed, unless it is all that is missing: most prompts share their begin token with some other, and a
load takes some milliseconds. The last token is computed in any case."""


@dataclass(slots=True)
class _Tracked:
    """A request that vLLM hasn't finished.

    Attributes:
        request: vLLM's own record of it, which changes.
        identity: Whose chunks its are; None until a thread has made it out.
        is_stored: Whether its KV is to be kept.
        lookup: The last one asked.
        asked_for: How often it had been preempted then.
        match_start: Tokens that vLLM had of its own when the last match was reported.
        loaded_for: How often it had been preempted when it was last loaded; None when it never was.
        has_run: Whether it was scheduled since it got its blocks.
        ordered_end: Its tokens up to here are being stored, or are held.
        has_orders: Whether a worker may be reading its blocks.
    """

    request: Any
    identity: Identity | Bypass | None
    is_stored: bool
    lookup: Lookup | None = None
    asked_for: int = 0
    match_start: int = 0
    loaded_for: int | None = None
    has_run: bool = False
    ordered_end: int = 0
    has_orders: bool = False


class SchedulerHalf:
    """Works on vLLM's requests and scheduler outputs, but needs nothing of vLLM's to be imported.

    Args:
        link: The way to the node.
        lookup_deadline_s: A lookup that takes longer is a miss.
        block_size: Tokens in a block of vLLM's.
        reads: Whether requests are to be loaded.
        writes: Whether they are to be stored.
        tally: Counts.
    """

    def __init__(
        self,
        link: NodeLink,
        lookup_deadline_s: float,
        *,
        block_size: int,
        reads: bool = True,
        writes: bool = True,
        tally: Tally,
    ) -> None:
        self._link = link
        self._lookups = Lookups(link, lookup_deadline_s, tally)
        self._block_size = block_size
        self._reads = reads
        self._writes = writes
        self._tally = tally
        self._identities = Identities()
        self._tracked: dict[str, _Tracked] = {}
        self._prefilling: dict[str, _Tracked] = {}
        self._loads: list[LoadOrder] = []
        self._stores: list[StoreOrder] = []
        self._finished: list[str] = []

    def forget(self) -> None:
        """Nothing that was stored until now is to be found again, and nothing that was computed until now is stored."""
        self._identities.forget()
        self._stores = []
        for tracked in self._tracked.values():
            tracked.identity = Bypass.FORGOTTEN

    def close(self) -> None:
        """End the threads."""
        self._lookups.close()
        self._link.close()

    # --- load -------------------------------------------------------------------------------------------------------------

    def new_request(self, request: Any) -> None:
        """A request has come in."""
        identity = self._identities.quick(request)
        if isinstance(identity, Bypass):
            self._tally.add(Count.BYPASSES)
        tracked = _Tracked(request, identity, is_stored=self._writes and not _is_save_skipped(request.kv_transfer_params))
        self._tracked[request.request_id] = self._prefilling[request.request_id] = tracked

    def matched_tokens(self, request: Any, computed_count: int) -> tuple[int | None, bool]:
        """How many tokens beyond the first `computed_count` the node holds, and whether they are loaded between steps.

        None while that isn't known; vLLM then asks again with its next step.
        """
        tracked = self._tracked.get(request.request_id)
        if tracked is None or not self._reads or isinstance(tracked.identity, Bypass) or request.skip_reading_prefix_cache:
            return 0, False
        if tracked.loaded_for == request.num_preemptions:
            return 0, False
        if tracked.lookup is None or tracked.asked_for != request.num_preemptions:
            tracked.asked_for = request.num_preemptions
            tracked.lookup = self._lookups.ask(
                _tokens_of(request, request.num_tokens),
                tracked.identity,
                lambda: self._identities.identify(request),
                _source_of(request.kv_transfer_params),
            )
        held = self._lookups.answer(tracked.lookup)
        if held is None:
            return None, False
        tracked.match_start = computed_count
        new_count = min(held, request.num_tokens) - computed_count
        is_worth_it = new_count >= WORTHWHILE_TOKENS or (new_count > 1 and held >= request.num_tokens)
        return (new_count, True) if is_worth_it else (0, False)

    def allocated(self, request: Any, block_ids: list[int], external_count: int) -> None:
        """VLLM has given a request its blocks; `external_count` tokens are to be loaded, and none if it's 0."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or external_count == 0:
            return
        identity = _known_identity(tracked)
        assert identity is not None, "a match was reported before the identity was known"
        end = tracked.match_start + external_count
        tokens = _tokens_of(request, end)
        self._loads.append(LoadOrder(request.request_id, tokens, identity, tuple(block_ids), tracked.match_start))
        self._tally.add(Count.HIT_TOKENS, external_count)
        tracked.loaded_for = request.num_preemptions

    def load_failed(self, request_ids: Iterable[str]) -> None:
        """Of what these requests found, not all was there when it was loaded: it is stored again."""
        for tracked in filter(None, map(self._tracked.get, request_ids)):
            if tracked.lookup is not None:
                tracked.lookup.held = 0

    # --- store ------------------------------------------------------------------------------------------------------------

    def orders(
        self,
        scheduled_counts: Mapping[str, int],
        preempted: set[str],
        block_ids: Callable[[str], tuple[list[int], ...] | None],
    ) -> ConnectorMetadata:
        """The orders that go to the workers with this step.

        Args:
            scheduled_counts: Tokens that this step computes, by request.
            preempted: Requests that lost their blocks since the last step.
            block_ids: The blocks of a scheduled request, for each of vLLM's KV groups.
        """
        for request_id in preempted & self._tracked.keys():
            self._preempt(request_id)
        for request_id in [name for name in self._prefilling if name in scheduled_counts]:
            tracked = self._prefilling[request_id]
            tracked.has_run = True
            prompt_count = tracked.request.num_prompt_tokens
            if tracked.request.num_computed_tokens + scheduled_counts[request_id] >= prompt_count:
                del self._prefilling[request_id]
                groups = block_ids(request_id)
                if groups is not None:
                    self._order_store(tracked, prompt_count, groups[0])
        metadata = ConnectorMetadata(
            loads=tuple(self._loads),
            stores=tuple(self._stores),
            preempted=tuple(sorted(preempted)),
            finished=tuple(self._finished),
            is_idle=not scheduled_counts,
        )
        self._loads, self._stores, self._finished = [], [], []
        return metadata

    def finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended: whether its blocks are to be kept until the workers have read them, and what its client is told.

        Args:
            request: The request.
            block_ids: Its blocks; vLLM may free them if it isn't told to keep them.
        """
        tracked = self._tracked.pop(request.request_id, None)
        self._prefilling.pop(request.request_id, None)
        if tracked is None:
            return False, None
        if tracked.has_run:
            # Steps that are still under way have counted their tokens already.
            computed_count = min(request.num_tokens, request.num_computed_tokens - request.num_in_flight_tokens)
            self._order_store(tracked, computed_count, block_ids)
        if tracked.has_orders:
            self._finished.append(request.request_id)
        return tracked.has_orders, self._parameters(tracked.ordered_end)

    def _preempt(self, request_id: str) -> None:
        tracked = self._tracked[request_id]
        tracked.has_run = tracked.has_orders = False
        tracked.ordered_end = 0
        self._prefilling[request_id] = tracked

    def _order_store(self, tracked: _Tracked, end: int, block_ids: list[int]) -> None:
        """Have the workers keep a request's tokens up to `end`, but for those that are being kept or held already."""
        identity, node = _known_identity(tracked), self._link.known
        if identity is None or node is None or not tracked.is_stored or end <= tracked.ordered_end:
            return
        held = 0 if tracked.lookup is None else tracked.lookup.held or 0
        start = max(tracked.ordered_end, min(held, end)) // node.chunk_size * node.chunk_size
        if start < end and end <= len(block_ids) * self._block_size:
            name, tokens = tracked.request.request_id, _tokens_of(tracked.request, end)
            self._stores.append(StoreOrder(name, tokens, identity, tuple(block_ids), start, node.chunk_size))
            tracked.has_orders = True
        tracked.ordered_end = end

    def _parameters(self, token_count: int) -> dict[str, Any] | None:
        node = self._link.known
        if node is None or token_count == 0:
            return None
        return {"instance": node.instance, "generation": node.generation, "num_tokens": token_count}


def _known_identity(tracked: _Tracked) -> Identity | None:
    identity = tracked.identity
    if identity is None and tracked.lookup is not None:
        identity = tracked.lookup.identity
    return identity if isinstance(identity, Identity) else None


def _tokens_of(request: Any, end: int) -> "array[int]":
    return array("i", request.all_token_ids[:end])


def _source_of(parameters: Mapping[str, Any] | None) -> str | None:
    """The instance that a router says holds the prompt: what another engine's answer had in its `kv_transfer_params`."""
    source = None if parameters is None else parameters.get("instance")
    return source if isinstance(source, str) and is_instance_id(source) else None


def _is_save_skipped(parameters: Mapping[str, Any] | None) -> bool:
    return parameters is not None and any(parameters.get(name) is True for name in SKIP_SAVE)
