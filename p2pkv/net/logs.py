"""The node's log: what happens to members, links and moves, on stderr. The core logs nothing; the shell tells its story."""

import sys
from typing import cast

import structlog
from structlog.typing import FilteringBoundLogger


def logger(room: str) -> FilteringBoundLogger:
    """The log of one room of the shell."""
    return cast("FilteringBoundLogger", structlog.get_logger(room=room))


def configure_logs() -> None:
    """Write to stderr, unless the program that this node lives in has configured structlog its own way."""
    if structlog.is_configured():
        return
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "room", "event"]),  # escapes peers' words
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
