"""Stores of a worker: out of vLLM's blocks into the node, beside the steps.

Two threads in a row: one copies a request's KV out of its blocks, piece by piece, the other gives the pieces to the node. So
blocks are free again as soon as they are copied, however slow the node is; and between the two lie at most so many bytes.

Rules:
    What has no room in the buffer within `ROOM_WAIT_S`, or waits for its turn longer than `TURN_WAIT_S`, isn't stored; nor is
    what follows it of the same request. Nobody waits longer.
    Blocks are read under the order's lock, once the order is seen not to have been cancelled: after `cancel` nothing is read.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Condition, Event, Lock

import torch

from p2pkv.engines.vllm.crew import Crew
from p2pkv.engines.vllm.layout import PagedLayout
from p2pkv.engines.vllm.link import NodeLink
from p2pkv.engines.vllm.orders import StoreOrder
from p2pkv.engines.vllm.tally import Count, Duration, Tally
from p2pkv.errors import P2pkvError

PIECE_NBYTES = 32 * 2**20
"""Of one copy and one exchange with the node: some milliseconds. At least one chunk."""
ROOM_WAIT_S = 1.0
"""How long a piece waits for room in the buffer: the node takes hundreds of MiB in that time, unless it is stopped."""
TURN_WAIT_S = 2.0
"""How long an ended request's blocks are kept for an order whose turn doesn't come."""
ORDERS_MAX = 256
"""Orders that haven't been read; vLLM runs as many requests at once by default."""
FLUSH_S = 2.0
"""How long the end of vLLM waits for what has been copied to be stored."""


class _Job:
    """One order."""

    def __init__(self, order: StoreOrder, ordered_at: float, fence: Callable[[], None]) -> None:
        self.order = order
        self.ordered_at = ordered_at
        self.fence = fence
        self.is_read = False
        self.is_refused = False
        self.is_cancelled = False
        self.lock = Lock()

    def cancel(self) -> None:
        """After this nothing more is read from the blocks; a copy under way is waited for."""
        with self.lock:
            self.is_cancelled = True


@dataclass(frozen=True, slots=True)
class _Piece:
    job: _Job
    start: int
    kv: torch.Tensor

    @property
    def end(self) -> int:
        return self.start + self.kv.shape[2]


class Stores:
    """Runs stores in threads; the thread of the steps orders them and asks what has been read.

    Args:
        link: The way to the node.
        paged: vLLM's caches.
        buffer_nbytes: Bytes that may be on their way from the blocks to the node; one piece always may.
        is_only_worker: Whether a chunk is held as soon as this worker has stored it.
        tally: Counts.
        bell: Set when an order's blocks have been read.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        link: NodeLink,
        paged: PagedLayout,
        buffer_nbytes: float,
        *,
        is_only_worker: bool,
        tally: Tally,
        bell: Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._paged = paged
        self._buffer_nbytes = buffer_nbytes
        self._is_only_worker = is_only_worker
        self._tally = tally
        self._bell = bell
        self._clock = clock
        self._reader, self._sender = Crew("store-read"), Crew("store-send")
        self._jobs: dict[str, deque[_Job]] = {}
        self._room = Condition()
        self._buffered_nbytes = 0

    def start(self, order: StoreOrder) -> None:
        """Order a store of what the step that has just been given to the device computes."""
        if sum(map(len, self._jobs.values())) >= ORDERS_MAX:
            self._tally.add(Count.DROPPED_STORES)
            return
        job = _Job(order, self._clock(), self._paged.fence())
        self._jobs.setdefault(order.request_id, deque()).append(job)
        self._reader.submit(lambda: self._read(job))

    def is_reading(self, request_id: str) -> bool:
        """Whether blocks of this request, which has ended, are still to be read; orders whose turn doesn't come are dropped."""
        jobs = self._jobs.get(request_id, deque())
        while jobs and (jobs[0].is_read or self._clock() - jobs[0].ordered_at > TURN_WAIT_S):
            jobs.popleft().cancel()
        if not jobs:
            self._jobs.pop(request_id, None)
        return bool(jobs)

    def cancel(self, request_id: str) -> None:
        """Blocks of this request are about to be overwritten: read no more of them."""
        for job in self._jobs.pop(request_id, ()):
            job.cancel()

    def prune(self) -> None:
        """Forget the orders that have been read."""
        for request_id, jobs in list(self._jobs.items()):
            while jobs and jobs[0].is_read:
                jobs.popleft()
            if not jobs:
                del self._jobs[request_id]

    def close(self) -> None:
        """Read no more, and store what has been read, but for at most `FLUSH_S`."""
        for request_id in list(self._jobs):
            self.cancel(request_id)
        self._reader.close(FLUSH_S)
        self._sender.close(FLUSH_S)
        self._link.close()

    # --- in the threads ---------------------------------------------------------------------------------------------------

    def _read(self, job: _Job) -> None:
        try:
            job.fence()
            for start, end in self._cuts(job.order):
                if not self._is_worth_reading(job, (end - start) * self._paged.token_nbytes):
                    self._refuse(job)
                    return
                with job.lock:
                    if job.is_cancelled:
                        self._refuse(job)
                        return
                    with torch.inference_mode():  # the mode that vLLM's caches were made in
                        piece = _Piece(job, start, self._paged.gather(job.order.block_ids, start, end))
                with self._room:
                    self._buffered_nbytes += piece.kv.nbytes
                self._sender.submit(partial(self._send, piece))
        finally:
            job.is_read = True
            self._bell.set()

    def _is_worth_reading(self, job: _Job, nbytes: int) -> bool:
        """Whether a piece would be sent; waits for room, a little."""
        if job.is_cancelled or job.is_refused or self._link.is_paused:
            return False
        with self._room:
            return self._room.wait_for(
                lambda: not self._buffered_nbytes or self._buffered_nbytes + nbytes <= self._buffer_nbytes, ROOM_WAIT_S
            )

    def _cuts(self, order: StoreOrder) -> list[tuple[int, int]]:
        step = max(PIECE_NBYTES // (order.chunk_size * self._paged.token_nbytes), 1) * order.chunk_size
        total = len(order.tokens)
        return [(start, min(start + step, total)) for start in range(order.start, total, step)]

    def _refuse(self, job: _Job) -> None:
        if not job.is_refused:
            job.is_refused = True
            self._tally.add(Count.DROPPED_STORES)

    def _send(self, piece: _Piece) -> None:
        job, order = piece.job, piece.job.order
        try:
            if job.is_refused:
                return
            with self._tally.timed(Duration.STORE):
                held = self._link.use(
                    lambda cache: cache.store(order.tokens[: piece.end], piece.kv, order.identity, start=piece.start)
                )
            if self._is_only_worker and held < piece.end:
                self._refuse(job)
            else:
                self._tally.add(Count.STORED_TOKENS, piece.end - piece.start)
        except P2pkvError:  # the link has said so
            self._refuse(job)
        finally:
            with self._room:
                self._buffered_nbytes -= piece.kv.nbytes
                self._room.notify()
