"""The two ends of a move as tables: `{state: {what happened: next state}}`.

What isn't in the table didn't happen, as far as the move is concerned: the network repeats, delays and reorders, so a report
for an ended move or an answer for a closed attempt is a failed lookup, not an error. The rules behind each row are those of
`docs/protocol.md`.
"""

from enum import Enum, auto


class SourceState(Enum):
    """Of the end that gives."""

    OFFERED = auto()
    """Planned, leased, offered; the target hasn't said a word yet."""
    FETCHING = auto()
    """The target pulls."""
    TAKING = auto()
    """The target holds all it could get; it is handed over, attempt by attempt."""
    ENDED = auto()


class SourceInput(Enum):
    """What can happen to it."""

    PROGRESS = auto()
    """The target reports, and isn't complete."""
    FETCHED = auto()
    """The target reports that it is complete."""
    ANSWERED = auto()
    """The target answered the open attempt, and more is to be handed over."""
    FINISHED = auto()
    """Nothing is left to hand over."""
    CANCELLED = auto()
    """A user wants it to end."""
    FAILED = auto()
    """The target refused, is lost, or a deadline passed."""


class TargetState(Enum):
    """Of the end that gets."""

    COLLECTING = auto()
    """Offered; pages of the manifest are on their way."""
    FETCHING = auto()
    """Room is promised; the bytes are on their way."""
    COMPLETE = auto()
    """All that could be fetched is here; a copy owns it, a move waits to be told to take it."""
    ENDED = auto()


class TargetInput(Enum):
    """What can happen to it."""

    COLLECTED = auto()
    """The manifest is complete and room was promised."""
    FETCHED = auto()
    """The last fetch is over."""
    TAKEN = auto()
    """The source handed chunks over."""
    CLOSED = auto()
    """The source's last word came, or the source is lost, or a deadline passed."""


SOURCE: dict[SourceState, dict[SourceInput, SourceState]] = {
    SourceState.OFFERED: {
        SourceInput.PROGRESS: SourceState.FETCHING,
        SourceInput.FETCHED: SourceState.TAKING,
        SourceInput.CANCELLED: SourceState.ENDED,
        SourceInput.FAILED: SourceState.ENDED,
    },
    SourceState.FETCHING: {
        SourceInput.PROGRESS: SourceState.FETCHING,
        SourceInput.FETCHED: SourceState.TAKING,
        SourceInput.CANCELLED: SourceState.ENDED,
        SourceInput.FAILED: SourceState.ENDED,
    },
    SourceState.TAKING: {
        SourceInput.ANSWERED: SourceState.TAKING,
        SourceInput.FINISHED: SourceState.ENDED,
        SourceInput.FAILED: SourceState.ENDED,
    },
    SourceState.ENDED: {},
}

TARGET: dict[TargetState, dict[TargetInput, TargetState]] = {
    TargetState.COLLECTING: {
        TargetInput.COLLECTED: TargetState.FETCHING,
        TargetInput.CLOSED: TargetState.ENDED,
    },
    TargetState.FETCHING: {
        TargetInput.FETCHED: TargetState.COMPLETE,
        TargetInput.CLOSED: TargetState.ENDED,
    },
    TargetState.COMPLETE: {
        TargetInput.TAKEN: TargetState.COMPLETE,
        TargetInput.CLOSED: TargetState.ENDED,
    },
    TargetState.ENDED: {},
}
