"""The story of a broken run: every event and effect that a failure is about, one line each, short enough to read."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum

from p2pkv.core.chunks import Chunk
from p2pkv.core.effects import Effect, SendMessage
from p2pkv.core.events import Event, MessageReceived
from p2pkv.core.ids import Address, InstanceId, Position
from p2pkv.core.keys import Namespace
from p2pkv.core.records import EventRecord, MemberRecord
from sims.ledger import PromiseBrokenError

LAST_LINES = 40
"""Of a failure that names no move and no chunk, the last that happened anywhere."""
HEX_DIGITS = 8
ITEMS = 6


@dataclass(slots=True)
class Entry:
    """Something that happened at an instance, or that it ordered."""

    at: float
    instance: InstanceId
    what: Event | Effect | str

    def __str__(self) -> str:
        match self.what:
            case MessageReceived(message=message):
                shown = f"<- {brief(message)}"
            case SendMessage(message=message):
                shown = f"   -> {brief(message)}"
            case str():
                shown = self.what.upper()
            case _:
                is_effect = isinstance(self.what, Effect)
                shown = f"{'   ' if is_effect else ''}{brief(self.what)}"
        return f"{self.at:9.4f} {self.instance:>4} {shown}"


class Recorder:
    """Keeps all that happened in one run."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def __call__(self, at: float, instance: InstanceId, what: Event | Effect | str) -> None:
        """Keep one event or effect."""
        self._entries.append(Entry(at, instance, what))

    def story(self, failure: BaseException) -> Iterator[str]:
        """What led to `failure`: all about its move or chunk, and every end of an instance; else the last that happened."""
        about = failure.about if isinstance(failure, PromiseBrokenError) else ()
        if not about:
            yield from map(str, deque(self._entries, LAST_LINES))
            return
        for entry in self._entries:
            if isinstance(entry.what, str) or mentions(entry.what, about):
                yield str(entry)


def mentions(value: object, about: tuple[str, ...]) -> bool:
    """Whether `value` has any of these event ids or keys (in hex) in it, however deep."""
    match value:
        case str():
            return value in about
        case bytes():
            return value.hex() in about
        case tuple() | list():
            return any(mentions(each, about) for each in value)
        case _ if is_dataclass(value):
            return any(mentions(getattr(value, field.name), about) for field in fields(value))
    return False


def brief(value: object) -> str:
    """`value` as text, with long bytes and tuples cut short."""
    match value:
        case Enum():
            return str(value.value)
        case float():
            return f"{value:.4f}"
        case bytes():
            return value.hex() if len(value) <= HEX_DIGITS // 2 else f"{value[: HEX_DIGITS // 2].hex()}..({len(value)})"
        case tuple():
            more = [f"..({len(value)})"] if len(value) > ITEMS else []
            return f"[{', '.join([*map(brief, value[:ITEMS]), *more])}]"
        case Position() | Address():
            return "/".join(map(brief, (getattr(value, field.name) for field in fields(value))))
        case MemberRecord():
            return f"{value.instance}.{value.generation}.{value.incarnation} {value.state}"
        case EventRecord():
            return f"{value.event_id} {value.state} {brief(value.chunks)} {brief(value.error)}"
        case Chunk():
            return f"{brief(value.key)}@{value.start}+{value.token_count}"
        case Namespace():
            return value.model
        case _ if is_dataclass(value):
            shown = (f"{field.name}={brief(getattr(value, field.name))}" for field in fields(value))
            return f"{type(value).__name__}({', '.join(shown)})"
    return str(value)
