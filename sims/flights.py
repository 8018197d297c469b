"""What nodes fetch for their engines, seen from outside: the witness for F4 and R4."""

from dataclasses import dataclass

from p2pkv.core.chunks import Chunk
from p2pkv.core.ids import EventId, InstanceId
from p2pkv.core.keys import TOKEN_NBYTES, ChunkKey, TokenBytes, token_count
from p2pkv.core.messages import PlanRequest
from p2pkv.core.moves.coordinator import PLAN_S
from p2pkv.core.peer_fetch import RETRY_S
from p2pkv.core.records import EventRecord
from sims.engine import NAMESPACE, longest_prefix
from sims.ledger import Ledger, PromiseBrokenError
from sims.network import Clock


@dataclass(slots=True)
class _Flight:
    """A flight that may be under way; `num_tokens` is what its source says that it brings, None before its plan is known."""

    source: InstanceId
    tokens: TokenBytes
    asked_at: float
    num_tokens: int | None = None


class Flights:
    """Flights by who asked for them, and chunks that are being fetched, of living boots alone."""

    def __init__(self, clock: Clock, ledger: Ledger) -> None:
        self._clock = clock
        self._ledger = ledger
        self._flights: dict[InstanceId, dict[EventId, _Flight]] = {}
        self._fetched: dict[InstanceId, dict[ChunkKey, EventId]] = {}

    def ended(self, instance: InstanceId) -> None:
        """An instance is gone."""
        self._flights.pop(instance, None)
        self._fetched.pop(instance, None)

    # --- flights ----------------------------------------------------------------------------------------------------------

    def asked(self, instance: InstanceId, plan: PlanRequest) -> None:
        """R4: nobody asks for a chunk that a flight is bringing, as far as its plan is known, nor for a flight's prompt."""
        flights = self._flights.setdefault(instance, {})
        if plan.reader is None or plan.event_id in flights:
            return
        now = self._clock.now
        held = longest_prefix(plan.tokens, self._ledger.held_by(instance))
        chunk_end = min(held - held % NAMESPACE.chunk_size + NAMESPACE.chunk_size, token_count(plan.tokens))
        begin = plan.tokens[: chunk_end * TOKEN_NBYTES]
        for event_id, flight in flights.items():
            is_known = flight.num_tokens is not None
            is_awaited = is_known or now < flight.asked_at + PLAN_S + RETRY_S
            is_brought = flight.tokens.startswith(begin) and (flight.num_tokens or 0) >= chunk_end
            if is_brought or (flight.tokens == plan.tokens and is_awaited):
                raise PromiseBrokenError(
                    f"R4 at t={now:.4f}: {instance} has two flights for a chunk", (event_id, plan.event_id)
                )
        flights[plan.event_id] = _Flight(plan.old_position.instance, plan.tokens, now)

    def told(self, instance: InstanceId, record: EventRecord) -> None:
        """An instance knows how an event goes on."""
        flight = self._flights.get(instance, {}).get(record.event_id)
        if flight is not None and record.state.is_final:
            del self._flights[instance][record.event_id]
        elif flight is not None and self._clock.now < flight.asked_at + PLAN_S:
            flight.num_tokens = record.num_tokens

    def refused(self, instance: InstanceId, event_id: EventId) -> None:
        """An instance was told that there is no plan."""
        self._flights.get(instance, {}).pop(event_id, None)

    def lost(self, instance: InstanceId, source: InstanceId) -> None:
        """An instance waits no longer for the plans of another."""
        flights = self._flights.get(instance, {})
        for event_id in [each for each, flight in flights.items() if flight.source == source and flight.num_tokens is None]:
            del flights[event_id]

    # --- chunks -----------------------------------------------------------------------------------------------------------

    def fetch_begins(self, instance: InstanceId, event_id: EventId, chunks: tuple[Chunk, ...]) -> None:
        """F4: no chunk is fetched that is being fetched already."""
        fetched = self._fetched.setdefault(instance, {})
        for key in (chunk.key for chunk in chunks):
            if key in fetched:
                about = (event_id, fetched[key], key.hex())
                raise PromiseBrokenError(f"F4 at t={self._clock.now:.4f}: {instance} fetches {key.hex()} twice at once", about)
            fetched[key] = event_id

    def fetch_ended(self, instance: InstanceId, event_id: EventId) -> None:
        """A fetch is over."""
        fetched = self._fetched.get(instance, {})
        for key in [key for key, move in fetched.items() if move == event_id]:
            del fetched[key]
