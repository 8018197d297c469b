"""One half's way to the node: attached when it can be, and left alone for a while when it couldn't."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

from p2pkv.engines.cache import EngineCache
from p2pkv.engines.vllm.crew import log
from p2pkv.errors import NodeUnreachableError, P2pkvError, RemoteProtocolError

PAUSE_S = 1.0
"""How long a node that couldn't be reached is left alone."""
PAUSE_MAX_S = 30.0
"""Each failure in a row doubles the pause, up to this: a node that ends at its start costs a second of a core each time."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class KnownNode:
    """What a half knows of the node that it is attached to, or was attached to last.

    Attributes:
        instance: Its name.
        generation: Which boot of it; None where `enable_controller` is off, for it doesn't say so then.
        chunk_size: Tokens in a full chunk.
    """

    instance: str
    generation: int | None
    chunk_size: int


class NodeLink:
    """Any thread may use it.

    Attributes:
        known: What is known of the node; None as long as it has never been reached.

    Args:
        attach: Attaches to the node, and starts it if it must; may take as long as that takes.
        know: Tells of the node, after each attach.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        attach: Callable[[], EngineCache],
        know: Callable[[EngineCache], KnownNode],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._attach = attach
        self._know = know
        self._clock = clock
        self._lock = Lock()
        self._attaching = Lock()
        self._cache: EngineCache | None = None
        self._failure_count = 0
        self._resume_at = 0.0
        self._is_closed = False
        self.known: KnownNode | None = None

    @property
    def is_paused(self) -> bool:
        """Whether the node is being left alone: a call now would fail at once."""
        return self._cache is None and self._clock() < self._resume_at

    def use(self, action: Callable[[EngineCache], Result]) -> Result:
        """Do something with the node's cache.

        Raises:
            NodeUnreachableError: The node is gone or being left alone, or another thread is attaching to it.
            P2pkvError: As `action`, or as `EngineCache.attach`.
        """
        cache = self._attached()
        try:
            return action(cache)
        except (NodeUnreachableError, RemoteProtocolError) as error:
            self._lose(cache, error)
            raise

    def close(self) -> None:
        """Detach for good. Calls that other threads are in end with `NodeUnreachableError`."""
        with self._lock:
            self._is_closed = True
            cache, self._cache = self._cache, None
        if cache is not None:
            cache.close()

    def _attached(self) -> EngineCache:
        cache = self._cache
        if cache is not None:
            return cache
        if self._is_closed or self.is_paused or not self._attaching.acquire(blocking=False):
            raise NodeUnreachableError("the node couldn't be reached a moment ago")
        try:
            return self._attach_now()
        finally:
            self._attaching.release()

    def _attach_now(self) -> EngineCache:
        try:
            cache = self._attach()
        except P2pkvError as error:
            self._pause(error)
            raise
        try:
            self.known = self._know(cache)
        except P2pkvError as error:
            cache.close()
            self._pause(error)
            raise
        with self._lock:
            if not self._is_closed:
                self._cache = cache
        if self._is_closed:
            cache.close()
            raise NodeUnreachableError("this link is closed")
        if self._failure_count:
            log.warning("p2pkv: the node is back")
        self._failure_count = 0
        return cache

    def _lose(self, cache: EngineCache, error: P2pkvError) -> None:
        with self._lock:
            if self._cache is not cache:  # another thread has said so
                return
            self._cache = None
        cache.close()
        self._pause(error)

    def _pause(self, error: P2pkvError) -> None:
        if not self._failure_count and not self._is_closed:
            log.warning("p2pkv: going on without the node: %s", error)
        self._resume_at = self._clock() + min(PAUSE_S * 2**self._failure_count, PAUSE_MAX_S)
        self._failure_count += 1
