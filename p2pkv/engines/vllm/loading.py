"""Loads of a worker: what the node holds, into blocks that vLLM has set aside, between steps.

Rules:
    A load ends: with what was there, or at its deadline. From then on nothing of it is written any more: each piece is written
    under the load's lock, once the load is seen not to have ended.
    What wasn't loaded is reported by its blocks, and vLLM computes it.
"""

import time
from collections.abc import Callable
from threading import Event, Lock

import torch

from p2pkv.engines.vllm.crew import Crew
from p2pkv.engines.vllm.layout import PagedLayout
from p2pkv.engines.vllm.link import NodeLink
from p2pkv.engines.vllm.orders import LoadOrder
from p2pkv.engines.vllm.tally import Count, Duration, Tally
from p2pkv.errors import P2pkvError

THREADS = 4
"""Loads that run at once; one is bound by memory, which two or three saturate."""


class _LoadEndedError(Exception):
    """Raised into the reading of a load that has ended."""


class _Load:
    """One load; its thread writes, and the step's thread ends it."""

    def __init__(self, order: LoadOrder, deadline: float) -> None:
        self.order = order
        self.deadline = deadline
        self.loaded_end = order.start
        self.is_done = False
        self._is_ended = False
        self._lock = Lock()

    def write(self, paged: PagedLayout, first: int, kv: torch.Tensor) -> None:
        with self._lock:
            if self._is_ended:
                raise _LoadEndedError
            end = min(first + kv.shape[2], len(self.order.tokens))
            if first < end:
                with torch.inference_mode():  # vLLM's caches are written in this mode only
                    paged.scatter(self.order.block_ids, first, kv[:, :, : end - first])
                self.loaded_end = end

    def end(self) -> int:
        """From now on nothing is written; up to which token it was."""
        with self._lock:
            self._is_ended = True
            return self.loaded_end


class Loads:
    """Runs loads in threads; the thread of the steps starts them and collects the ends.

    Args:
        link: The way to the node.
        paged: vLLM's caches.
        deadline_s: A load that takes longer has failed.
        tally: Counts.
        bell: Set when a load is over.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        link: NodeLink,
        paged: PagedLayout,
        deadline_s: float,
        tally: Tally,
        bell: Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._paged = paged
        self._deadline_s = deadline_s
        self._tally = tally
        self._bell = bell
        self._clock = clock
        self._crew = Crew("load", THREADS)
        self._running: dict[str, _Load] = {}

    def start(self, order: LoadOrder) -> None:
        """Start a load; `ended` tells when it is over."""
        load = _Load(order, self._clock() + self._deadline_s)
        self._running[order.request_id] = load
        self._crew.submit(lambda: self._run(load))

    def ended(self) -> tuple[set[str], set[int]]:
        """The requests whose loads have ended since the last call, and the blocks of theirs that have to be computed."""
        requests, blocks = set[str](), set[int]()
        now = self._clock()
        for name, load in list(self._running.items()):
            if not load.is_done and now < load.deadline:
                continue
            del self._running[name]
            requests.add(name)
            order, loaded_end = load.order, load.end()
            self._tally.add(Count.LOADED_TOKENS, loaded_end - order.start)
            if loaded_end < len(order.tokens):
                self._tally.add(Count.LOAD_ERRORS)
                last = -(-len(order.tokens) // self._paged.block_size)
                blocks.update(order.block_ids[loaded_end // self._paged.block_size : last])
        return requests, blocks

    def close(self) -> None:
        """End all loads."""
        for load in self._running.values():
            load.end()
        self._crew.close()
        self._link.close()

    def _run(self, load: _Load) -> None:
        order = load.order
        try:
            with self._tally.timed(Duration.LOAD):
                self._link.use(
                    lambda cache: cache.retrieve_into(
                        order.tokens,
                        lambda first, kv: load.write(self._paged, first, kv),
                        order.identity,
                        start=order.start,
                    )
                )
        except (P2pkvError, _LoadEndedError):
            return  # `ended` sees what is missing; the link has said why
        finally:
            load.is_done = True
            self._bell.set()
