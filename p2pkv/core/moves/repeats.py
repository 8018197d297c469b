"""Which move a user's idempotency key stands for, at the move's source: so a retry finds it through any node.

A key stands for its move as long as the event is known. When that failed or was cancelled, the key is free again: a retry is
there to try again. A source that starts anew has forgotten its keys; repeating a move changes nothing anyway (M3).
"""

from dataclasses import dataclass
from hashlib import blake2b

from p2pkv.core.history import EVENTS_MAX, History
from p2pkv.core.ids import EventId
from p2pkv.core.messages import PlanRequest
from p2pkv.core.records import EventRecord, EventState
from p2pkv.errors import ErrorCode, Failure


@dataclass(frozen=True, slots=True)
class _Use:
    event_id: EventId
    wanted: bytes


class Repeats:
    """Moves that were asked for with a key.

    Args:
        history: Knows their events.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._uses: dict[str, _Use] = {}

    def find(self, request: PlanRequest) -> EventRecord | Failure | None:
        """The event that the request's key stands for, or why the key can't be used for it; None when it is new."""
        use = None if request.idempotency_key is None else self._uses.get(request.idempotency_key)
        event = None if use is None else self._history.get(use.event_id)
        if use is None or event is None or event.state in (EventState.FAILED, EventState.CANCELLED):
            return None
        if use.wanted != _wanted(request):
            detail = f"idempotency_key {request.idempotency_key!r} was used for another move, {use.event_id!r}."
            return Failure(ErrorCode.INVALID_REQUEST, detail)
        return event

    def add(self, request: PlanRequest) -> None:
        """From now on the request's key, if it has one, stands for its event."""
        if request.idempotency_key is None:
            return
        if len(self._uses) >= 2 * EVENTS_MAX:  # half of them at least stand for what is forgotten
            self._uses = {key: use for key, use in self._uses.items() if self._history.get(use.event_id) is not None}
        self._uses[request.idempotency_key] = _Use(request.event_id, _wanted(request))


def _wanted(request: PlanRequest) -> bytes:
    """Digest of what is asked for, whoever asks."""
    fields = (request.old_position, request.new_position, request.operation, request.selection, request.identity, request.model)
    return blake2b(repr(fields).encode() + request.tokens, digest_size=16).digest()
