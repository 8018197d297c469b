"""The worker half: carries out the orders that come with each step, beside the steps."""

from threading import Event

from p2pkv.engines.vllm.loading import Loads
from p2pkv.engines.vllm.orders import ConnectorMetadata
from p2pkv.engines.vllm.storing import Stores

REST_S = 0.002
"""Of a step that computes nothing. While vLLM waits it takes one such step after the other and hardly lets go of the
interpreter's lock: without the rest, loads took 30 times and lookups 6 times as long."""


class WorkerHalf:
    """Only the thread of the steps calls it, in this order within a step.

    Args:
        loads: Runs loads; None when this worker's caches can't be used.
        stores: Runs stores; None likewise.
        block_size: Tokens in a block.
        bell: Set when a load or the reading for a store is over.
    """

    def __init__(self, loads: Loads | None, stores: Stores | None, block_size: int, bell: Event | None = None) -> None:
        self._loads = loads
        self._stores = stores
        self._block_size = block_size
        self._bell = Event() if bell is None else bell
        self._ending: set[str] = set()
        self._received: set[str] = set()
        self._failed_blocks: set[int] = set()

    def before_step(self, orders: ConnectorMetadata) -> None:
        """Blocks of preempted requests are overwritten from here on."""
        if self._stores is not None:
            for request_id in orders.preempted:
                self._stores.cancel(request_id)

    def start_loads(self, orders: ConnectorMetadata) -> None:
        """Start this step's loads."""
        for order in orders.loads:
            if self._loads is None:
                self._received.add(order.request_id)
                self._failed_blocks.update(order.block_ids[order.start // self._block_size :])
            else:
                self._loads.start(order)

    def start_stores(self, orders: ConnectorMetadata) -> None:
        """The step has been computed, or given to the device: start its stores."""
        if self._stores is not None:
            self._stores.prune()
            for order in orders.stores:
                self._stores.start(order)
        self._ending.update(orders.finished)

    def rest(self, orders: ConnectorMetadata) -> None:
        """Let the threads go on, in a step that computes nothing."""
        if orders.is_idle and self._bell.wait(REST_S):
            self._bell.clear()

    def ended(self) -> tuple[set[str], set[str]]:
        """Ended requests whose blocks nobody reads any more, and requests whose loads have ended."""
        read = {name for name in self._ending if self._stores is None or not self._stores.is_reading(name)}
        self._ending -= read
        received = self._received
        if self._loads is not None:
            received, blocks = self._loads.ended()
            self._failed_blocks |= blocks
        self._received = set()
        return read, received

    def take_failed_blocks(self) -> set[int]:
        """The blocks whose load has failed since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def close(self) -> None:
        """End everything."""
        if self._loads is not None:
            self._loads.close()
        if self._stores is not None:
            self._stores.close()
