"""Closes memory in a thread: 32 MiB take 6 ms to free, for which pings and engines would wait."""

import os
from collections import deque

import trio

WAITING_MAX = 256
"""Descriptors that wait at most; more are closed on the spot. A quarter of the 1024 that a node has beside its shards. Their
memory is freed at 5 GiB/s, faster than other can be written."""


class ClosingThread:
    """Closes descriptors in order and soon. All but the thread belongs on the event loop."""

    def __init__(self) -> None:
        self._waiting: deque[int] = deque()
        self._some_wait = trio.Event()
        self._one_thread = trio.CapacityLimiter(1)

    def close_soon(self, descriptor: int) -> None:
        """Close it in the thread. It is the caller's no more."""
        if len(self._waiting) == WAITING_MAX:
            os.close(descriptor)
            return
        self._waiting.append(descriptor)
        self._some_wait.set()

    async def keep_closing(self) -> None:
        """Close what comes, until cancelled. What it has begun it ends; the rest is left to `close_waiting`."""
        while True:
            await self._some_wait.wait()
            self._some_wait = trio.Event()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.close_waiting, limiter=self._one_thread)

    def close_waiting(self) -> None:
        """Close what waits, here and now: for who ends, once `keep_closing` has."""
        while self._waiting:
            os.close(self._waiting.popleft())  # without the GIL
