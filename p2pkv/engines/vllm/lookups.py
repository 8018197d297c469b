"""Lookups that never hold up the scheduler: asked in a thread, and a miss when they take too long."""

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from p2pkv.core.keys import Identity
from p2pkv.engines.cache import Lookup as Found
from p2pkv.engines.vllm.crew import Crew
from p2pkv.engines.vllm.identity import Bypass
from p2pkv.engines.vllm.link import NodeLink
from p2pkv.engines.vllm.tally import Count, Duration, Tally
from p2pkv.errors import P2pkvError

FETCH_POLL_S = 0.005
"""Between two questions whether a fetch from a peer has ended; a handoff takes about so long."""


@dataclass(slots=True)
class Lookup:
    """One question, and its answer once that is known.

    Attributes:
        tokens: All tokens that the request has, int32.
        identity: Whose chunks to look for; None until the thread has made it out.
        asked_at: When.
        source: An instance that is said to hold the prompt.
        held: How many of the tokens the node holds; None until that is known or given up.
    """

    tokens: "array[int]"
    identity: Identity | Bypass | None
    asked_at: float
    source: str | None = None
    held: int | None = None


class Lookups:
    """Asks the node, one lookup after the other.

    Args:
        link: The way to the node.
        deadline_s: A lookup that takes longer is a miss.
        tally: Counts.
        clock: Seconds, monotonic.
    """

    def __init__(self, link: NodeLink, deadline_s: float, tally: Tally, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._deadline_s = deadline_s
        self._tally = tally
        self._clock = clock
        self._crew = Crew("lookup")
        self._began_at: float | None = None
        self._crew.submit(self._attach)

    def ask(
        self,
        tokens: "array[int]",
        identity: Identity | Bypass | None,
        identify: Callable[[], Identity | Bypass],
        source: str | None = None,
    ) -> Lookup:
        """Start a lookup; where the node doesn't answer at the moment, it's a miss at once.

        Args:
            tokens: The request's.
            identity: The request's, if that is known.
            identify: Makes out the identity, where it isn't; called in the thread.
            source: An instance that is said to hold the prompt; None to let the node find one, with `peer_fetch`.
        """
        now = self._clock()
        self._tally.add(Count.LOOKUPS)
        lookup = Lookup(tokens, identity, now, source)
        began_at = self._began_at
        is_stuck = began_at is not None and now - began_at > self._deadline_s
        if is_stuck or self._link.is_paused:
            lookup.held = 0
        if not is_stuck:
            self._crew.submit(lambda: self._answer(lookup, identify))
        return lookup

    def answer(self, lookup: Lookup) -> int | None:
        """How many tokens are held; None while that isn't known and there is time left."""
        held = lookup.held
        if held is None and self._clock() - lookup.asked_at >= self._deadline_s:
            self._tally.add(Count.MISSED_DEADLINES)
            held = lookup.held = 0
        return held

    def close(self) -> None:
        """Ask no more."""
        self._crew.close()

    def _attach(self) -> None:
        with self._busy(), suppress(P2pkvError):  # the link has said so
            self._link.use(lambda _: None)

    def _answer(self, lookup: Lookup, identify: Callable[[], Identity | Bypass]) -> None:
        with self._busy():
            if lookup.identity is None:
                lookup.identity = identify()
            if lookup.held is None:
                lookup.held = self._look_up(lookup, lookup.identity)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._began_at = self._clock()
        try:
            yield
        finally:
            self._began_at = None

    def _look_up(self, lookup: Lookup, identity: Identity | Bypass) -> int:
        """How many tokens are held, at the deadline if they are still being fetched."""
        if isinstance(identity, Bypass):
            return 0
        try:
            with self._tally.timed(Duration.LOOKUP):
                found = self._peek(lookup, identity)
                while found.is_fetching and lookup.held is None and self._clock() - lookup.asked_at < self._deadline_s:
                    time.sleep(FETCH_POLL_S)
                    found = self._peek(lookup, identity)
                return found.num_tokens
        except P2pkvError:  # the link has said so
            return 0

    def _peek(self, lookup: Lookup, identity: Identity) -> Found:
        return self._link.use(lambda cache: cache.peek(lookup.tokens, identity, source=lookup.source))
