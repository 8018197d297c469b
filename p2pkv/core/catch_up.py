"""What peers that lag get of one's own inventory, and at what pace: tails of the log, digests, and pages of a snapshot.

All of it comes out of one budget of bytes a second, apart from the changes that go to everyone as they happen (`gossip`): those
go at once, and wait for one answer on their link at most. Each peer has one question of a kind waiting, its last one; those for
tails and digests, which are short, go first. So a peer that asks without end gets its turn, and no more.
"""

from collections.abc import Callable
from math import inf

from p2pkv.core.ids import InstanceId
from p2pkv.core.inventory import InventoryLog
from p2pkv.core.messages import InventoryDelta, InventoryDigest, InventoryPage, InventoryRequest, RangeRequest
from p2pkv.core.outbox import Outbox

CATCH_UP_NBYTES_PER_S = 8 * 2**20
"""A view of a million chunks in 1.5 s; of what a loopback websocket between Python processes takes a tenth."""


class CatchUps:
    """Answers what peers ask about one's own inventory."""

    def __init__(self, inventory: InventoryLog, outbox: Outbox, flush: Callable[[], None]) -> None:
        self._inventory = inventory
        self._outbox = outbox
        self._flush = flush
        self._requests: dict[InstanceId, InventoryRequest] = {}
        self._ranges: dict[InstanceId, RangeRequest] = {}
        self._paid_at = -inf

    def ask(self, peer: InstanceId, request: InventoryRequest | RangeRequest, now: float) -> None:
        """A peer lacks something; it is answered now if the budget allows, else in its turn."""
        if isinstance(request, RangeRequest):
            self._ranges[peer] = request
        else:
            self._requests[peer] = request
        self.wake(now)

    def wakeup_at(self) -> float:
        """When `wake` has something to do."""
        return self._paid_at if self._requests or self._ranges else inf

    def wake(self, now: float) -> None:
        """Answer whose turn it is, as far as the budget goes. A peer that is gone meanwhile costs nothing."""
        while (self._requests or self._ranges) and now >= self._paid_at:
            waiting: dict[InstanceId, InventoryRequest] | dict[InstanceId, RangeRequest] = self._requests or self._ranges
            peer = next(iter(waiting))
            answers = self._answers(waiting.pop(peer)) if peer in self._outbox.links else []
            for answer in answers:
                self._outbox.send(peer, answer)
            nbytes = sum(map(_nbytes, answers))
            self._paid_at = max(self._paid_at, now) + nbytes / CATCH_UP_NBYTES_PER_S

    def _answers(self, request: InventoryRequest | RangeRequest) -> list[InventoryDelta | InventoryDigest | InventoryPage]:
        inventory = self._inventory
        if isinstance(request, InventoryRequest):
            tail = inventory.tail(request.generation, request.sequence)
            if tail is not None:  # an empty one tells that nothing is missing
                return [*tail] or [InventoryDelta(inventory.generation, inventory.sequence + 1, b"")]
            self._flush()  # a digest or page is of this moment, and counts only for who has all changes up to it
            return [inventory.digest()]
        if request.generation != inventory.generation or request.first > request.last:
            return []
        self._flush()
        return [inventory.page(request.first, request.last)]


def _nbytes(answer: InventoryDelta | InventoryDigest | InventoryPage) -> int:
    """About what it takes on the wire."""
    match answer:
        case InventoryDelta():
            data = answer.changes
        case InventoryDigest():
            data = answer.ranges
        case InventoryPage():
            data = answer.entries
    return 128 + len(data)
