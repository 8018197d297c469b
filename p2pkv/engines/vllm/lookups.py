"""Lookups that never hold up the scheduler: asked in a thread, and a miss when the node takes too long to answer.

One that awaits a fetch from a peer is asked again and again in a thread of its own, so it holds up no other either. The node
says how long the fetch is worth waiting for; if it falls silent meanwhile, what was held by then counts.
"""

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from p2pkv.core.keys import Identity
from p2pkv.engines.vllm.crew import Crew
from p2pkv.engines.vllm.identity import Bypass
from p2pkv.engines.vllm.link import NodeLink
from p2pkv.engines.vllm.tally import Count, Duration, Tally
from p2pkv.errors import P2pkvError

FETCH_POLL_S = 0.005
"""Between two questions whether a fetch from a peer has ended; a handoff takes about so long."""

FETCH_SILENCE_S = 0.2
"""A node that fetches may be silent for so long: on busy cores it was for more than 50 ms in a copy of 1,500 tokens in four. A
fetch is awaited for that long anyway (`core.peer_fetch`)."""


@dataclass(slots=True)
class Lookup:
    """One question, and its answer once that is known.

    Attributes:
        tokens: All tokens that the request has, int32.
        identity: Whose chunks to look for; None until the thread has made it out.
        asked_at: When.
        source: An instance that is said to hold the prompt.
        seen: How many of the tokens the node held when it last said so, and when that was; None until it has.
        held: How many of the tokens the node holds; None until that is known or given up.
    """

    tokens: "array[int]"
    identity: Identity | Bypass | None
    asked_at: float
    source: str | None = None
    seen: tuple[int, float] | None = None
    held: int | None = None


class Lookups:
    """Asks the node, one lookup after the other; those that await a fetch in turns.

    Args:
        link: The way to the node.
        deadline_s: If the node takes longer to answer, it's a miss; during a fetch it may take `FETCH_SILENCE_S`.
        tally: Counts.
        clock: Seconds, monotonic.
    """

    def __init__(self, link: NodeLink, deadline_s: float, tally: Tally, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._deadline_s = deadline_s
        self._tally = tally
        self._clock = clock
        self._crew = Crew("lookup")
        self._fetch_crew = Crew("fetch")
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
        if lookup.held is None and self._is_late(lookup):
            self._tally.add(Count.MISSED_DEADLINES)
            lookup.held = 0 if lookup.seen is None else lookup.seen[0]
        return lookup.held

    def _is_late(self, lookup: Lookup) -> bool:
        if lookup.seen is None:
            return self._clock() - lookup.asked_at >= self._deadline_s
        return self._clock() - lookup.seen[1] >= max(self._deadline_s, FETCH_SILENCE_S)

    def close(self) -> None:
        """Ask no more."""
        self._crew.close()
        self._fetch_crew.close()

    def _attach(self) -> None:
        with self._busy(), suppress(P2pkvError):  # the link has said so
            self._link.use(lambda _: None)

    def _answer(self, lookup: Lookup, identify: Callable[[], Identity | Bypass]) -> None:
        with self._busy():
            if lookup.identity is None:
                lookup.identity = identify()
            if isinstance(lookup.identity, Bypass):
                lookup.held = 0
            elif lookup.held is None:
                with self._tally.timed(Duration.LOOKUP):
                    self._look_up(lookup, lookup.identity)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._began_at = self._clock()
        try:
            yield
        finally:
            self._began_at = None

    def _look_up(self, lookup: Lookup, identity: Identity) -> None:
        try:
            found = self._link.use(lambda cache: cache.peek(lookup.tokens, identity, source=lookup.source))
        except P2pkvError:  # the link has said so
            lookup.held = 0
            return
        lookup.seen = (found.num_tokens, self._clock())
        if found.is_fetching:
            self._fetch_crew.submit(lambda: self._look_up_again(lookup, identity))
        else:
            lookup.held = found.num_tokens

    def _look_up_again(self, lookup: Lookup, identity: Identity) -> None:
        """Unless nobody waits for it any more."""
        assert lookup.seen is not None, "it was looked up before"
        time.sleep(max(0.0, lookup.seen[1] + FETCH_POLL_S - self._clock()))
        if lookup.held is None and not self._is_late(lookup):
            self._look_up(lookup, identity)
