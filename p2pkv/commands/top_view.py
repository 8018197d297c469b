"""What `p2pkv top` shows of a cluster: rows of text, made from what a node has answered and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from p2pkv.core.records import EventState

UNFINISHED = frozenset(state.value for state in EventState if not state.is_final)
LATELY_S = 600.0
ENDED_MAX = 20
"""Events that ended longer ago, or before so many others, aren't shown."""
GAP = 2
"""Spaces between two columns."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The cluster at one moment, as one node saw it.

    Attributes:
        url: Where the node was asked.
        instance: Which node answered.
        at: When, in Unix seconds of this host.
        members: As `/members` gives them, each with `joined_at` and `heard_at`, Unix seconds or None.
        events: As `/events` gives them: those under way, and those that ended lately.
    """

    url: str
    instance: str
    at: float
    members: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]

    def fields(self) -> dict[str, object]:
        """For `--json`."""
        return {"instance": self.instance, "at": self.at, "members": list(self.members), "events": list(self.events)}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its head.
        worth: Where there is no room for all, the ones of least worth go.
        is_number: Its cells stand at the right.
    """

    name: str
    worth: int
    is_number: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Columns, and rows that have a cell in each."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    def fitted(self, width: int) -> "Table":
        """As many of the columns as `width` characters have room for, at least one; which go first, their worth says."""
        kept = sorted(range(len(self.columns)), key=lambda index: -self.columns[index].worth)
        while len(kept) > 1 and sum(map(self._width, kept)) + GAP * (len(kept) - 1) > width:
            kept.pop()
        kept.sort()
        return Table(
            tuple(self.columns[index] for index in kept), tuple(tuple(row[index] for index in kept) for row in self.rows)
        )

    def _width(self, column: int) -> int:
        return max(len(self.columns[column].name), *(len(row[column]) for row in self.rows), 0)


MEMBER_COLUMNS = (
    Column("INSTANCE", 9),
    Column("STATE", 8),
    Column("LOCATION", 3),
    Column("CHUNKS", 5, is_number=True),
    Column("HELD", 7, is_number=True),
    Column("LIMIT", 4, is_number=True),
    Column("FULL", 6, is_number=True),
    Column("MEMBER FOR", 1, is_number=True),
    Column("HEARD", 2, is_number=True),
)
EVENT_COLUMNS = (
    Column("STATE", 9),
    Column("KIND", 3),
    Column("FROM", 8),
    Column("TO", 7),
    Column("CHUNKS", 6, is_number=True),
    Column("CARRIED", 5, is_number=True),
    Column("LANE", 2),
    Column("RATE", 4, is_number=True),
    Column("TOOK", 1, is_number=True),
    Column("EVENT", 0),
)


def member_table(snapshot: Snapshot) -> Table:
    """A row for each member's location, and one for a member without any."""
    return Table(MEMBER_COLUMNS, tuple(row for member in snapshot.members for row in _member_rows(member, snapshot.at)))


def _member_rows(member: Mapping[str, Any], now: float) -> list[tuple[str, ...]]:
    name, state = member["instance"], member["state"]
    times = (_ago(member["joined_at"], now), _ago(member["heard_at"], now))
    rows: list[tuple[str, ...]] = [
        (
            *(name, state, location, str(held["chunks"])),
            *(size_text(held["bytes"]), size_text(held["limit"]), share_text(held["bytes"], held["limit"])),
            *times,
        )
        for location, held in sorted(member["locations"].items())
    ]
    return rows or [(name, state, "-", "-", "-", "-", "-", *times)]


def event_table(snapshot: Snapshot) -> Table:
    """A row for each event, those under way first, then those that ended last."""
    return Table(EVENT_COLUMNS, tuple(_event_row(event, snapshot.at) for event in snapshot.events))


def _event_row(event: Mapping[str, Any], now: float) -> tuple[str, ...]:
    chunks, rate = event["chunks"], rate_of(event, now)
    settled = chunks["moved"] + chunks["already_there"] + chunks["shared_kept"]
    return (
        event["state"],
        "copy" if event["copy"] else event["kind"],
        event["old_position"][0],
        event["new_position"][0],
        f"{settled}/{chunks['found']}",
        size_text(event["bytes"]),
        event["lane"] or "-",
        "-" if rate is None else f"{size_text(rate)}/s",
        time_text(_seconds_of(event, now)),
        event["event_id"],
    )


def recent(events: Sequence[Mapping[str, Any]], now: float) -> list[Mapping[str, Any]]:
    """Of all that a node knows, what is under way, oldest first, then what ended lately, newest first."""
    under_way = [event for event in events if event["state"] in UNFINISHED]
    ended = [event for event in events if event["state"] not in UNFINISHED and now - (event["finished_at"] or now) <= LATELY_S]
    return [
        *sorted(under_way, key=lambda event: event["started_at"]),
        *sorted(ended, key=lambda event: -(event["finished_at"] or now))[:ENDED_MAX],
    ]


def rate_of(event: Mapping[str, Any], now: float) -> float | None:
    """Bytes a second from an event's beginning to its end, or until now; None when nothing was carried or no time has passed.

    Over TCP bytes are counted by batches of 256 MiB: from one second to the next the count says nothing.
    """
    seconds = _seconds_of(event, now)
    return event["bytes"] / seconds if event["bytes"] and seconds > 0 else None


def _seconds_of(event: Mapping[str, Any], now: float) -> float:
    """How long it has gone on; never less than none, though the source's clock may differ from ours."""
    seconds = now - event["started_at"] if event["seconds"] is None else event["seconds"]
    return float(max(seconds, 0.0))


def _ago(at: float | None, now: float) -> str:
    return "-" if at is None else time_text(max(now - at, 0.0))


def shares_of_height(height: int, members: int, events: int) -> tuple[int, int]:
    """How many rows of members and of events go into `height` lines: events get a third, and what members leave."""
    member_rows = min(members, max(height - min(events, height // 3), 0))
    return member_rows, min(events, max(height - member_rows, 0))


def size_text(nbytes: float) -> str:
    """Bytes for people: `512 B`, `1.5 MiB`."""
    unit = 0
    while nbytes >= 1024 and unit < len(_UNITS) - 1:
        nbytes, unit = nbytes / 1024, unit + 1
    return f"{nbytes:.0f} {_UNITS[unit]}" if unit == 0 or nbytes >= 100 else f"{nbytes:.1f} {_UNITS[unit]}"


def share_text(part: int, whole: int) -> str:
    """How much of `whole` that is; what is there at all is never 0 %."""
    if not whole:
        return "-"
    return "<1 %" if 0 < part < whole / 100 else f"{part * 100 // whole} %"


def time_text(seconds: float) -> str:
    """A duration for people, in its two largest units: `0.02 s`, `42 s`, `3 min 7 s`, `2 h 5 min`, `4 d 1 h`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
