"""What both halves count, between two times that vLLM asks."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from threading import Lock
from time import perf_counter
from typing import TypedDict

SECONDS_MAX = 4096
"""Durations of one kind that are kept until vLLM asks, which it does at each step; later ones aren't kept."""


class Count(StrEnum):
    """What is counted."""

    LOOKUPS = "lookups"
    HIT_TOKENS = "hit_tokens"
    MISSED_DEADLINES = "missed_deadlines"
    BYPASSES = "bypasses"
    LOADED_TOKENS = "loaded_tokens"
    LOAD_ERRORS = "load_errors"
    STORED_TOKENS = "stored_tokens"
    DROPPED_STORES = "dropped_stores"


class Duration(StrEnum):
    """What is timed."""

    LOOKUP = "lookup"
    LOAD = "load"
    STORE = "store"


class TallyData(TypedDict):
    """Plain numbers, which travel from the workers to the API server."""

    counts: dict[str, int]
    seconds: dict[str, list[float]]


class Tally:
    """Any thread may count."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, count: Count, number: int = 1) -> None:
        """Count `number` more."""
        with self._lock:
            self._counts[count.value] += number

    @contextmanager
    def timed(self, duration: Duration) -> Iterator[None]:
        """Time what is done within, however it ends."""
        started_at = perf_counter()
        try:
            yield
        finally:
            with self._lock:
                kept = self._seconds[duration.value]
                if len(kept) < SECONDS_MAX:
                    kept.append(perf_counter() - started_at)

    def take(self) -> TallyData | None:
        """What was counted since the last time; None when nothing was."""
        with self._lock:
            if not self._counts and not self._seconds:
                return None
            data = TallyData(counts=dict(self._counts), seconds=dict(self._seconds))
            self._counts.clear()
            self._seconds.clear()
            return data
