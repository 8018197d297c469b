"""Events of moves, as this node knows them: its own as source, those it coordinates, those it received as target.

The source alone writes an event's state, so what it says replaces what was known; a target's word counts when the source's
generation is dead. Events are kept an hour after their end, and at most `EVENTS_MAX` of them.
"""

from p2pkv.core.ids import EventId
from p2pkv.core.records import EventRecord

KEPT_S = 3600.0
EVENTS_MAX = 10_000
"""About 10 MB of records. Past it the oldest ended ones go early."""


class History:
    """All events known here, oldest first."""

    def __init__(self) -> None:
        self._records: dict[EventId, EventRecord] = {}
        self._ended_at: dict[EventId, float] = {}

    def get(self, event_id: EventId) -> EventRecord | None:
        """What is known of an event."""
        return self._records.get(event_id)

    def newest_first(self) -> tuple[EventRecord, ...]:
        """All of them, newest first."""
        return tuple(sorted(self._records.values(), key=lambda each: (each.started_at, each.event_id), reverse=True))

    def put(self, record: EventRecord, now: float) -> bool:
        """Keep `record` in place of what was known.

        Returns:
            False when that is no news, would reopen what has ended, or finds no place among `EVENTS_MAX` that go on.
        """
        known = self._records.get(record.event_id)
        if known == record or (known is not None and known.state.is_final and not record.state.is_final):
            return False
        if known is None and len(self._records) >= EVENTS_MAX:
            if not self._ended_at:
                return False
            self._forget(next(iter(self._ended_at)))
        self._records[record.event_id] = record
        if record.state.is_final:
            self._ended_at.setdefault(record.event_id, now)
        return True

    def forgets_at(self) -> float:
        """When the next event will have been kept long enough; inf when none has ended."""
        oldest = next(iter(self._ended_at.values()), None)
        return float("inf") if oldest is None else oldest + KEPT_S

    def forget_old(self, now: float) -> None:
        """Drop what was kept long enough."""
        while self.forgets_at() <= now:
            self._forget(next(iter(self._ended_at)))

    def _forget(self, event_id: EventId) -> None:
        del self._ended_at[event_id]
        del self._records[event_id]
