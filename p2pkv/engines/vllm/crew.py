"""Threads for what must not hold up a step of vLLM."""

import logging
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

from p2pkv.engines.vllm.cores import leave_bound_cores

log = logging.getLogger("vllm.p2pkv")
"""Below vLLM's own logger, so that its format and level are ours too."""


class Crew:
    """A few threads that do what they are given, oldest first. They don't hold up the end of the process.

    Where vLLM has bound its worker to cores, they leave these to the model.

    Args:
        name: Of the threads.
        size: How many.
    """

    def __init__(self, name: str, size: int = 1) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [Thread(target=self._work, name=f"p2pkv-{name}-{number}", daemon=True) for number in range(size)]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], None]) -> None:
        """Have `task` done; the caller sees to it that no more are waiting than it can bear."""
        self._tasks.put(task)

    def close(self, wait_s: float = 0.0) -> None:
        """End the threads once they have done what they were given, and wait for that at most `wait_s` seconds each."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(wait_s)

    def _work(self) -> None:
        leave_bound_cores()
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:
                log.exception("a bug of p2pkv: this task failed, vLLM goes on")
