"""What `p2pkv top` makes of a node's answers, without a node."""

from typing import Any

import pytest

from p2pkv.commands.top_view import (
    ENDED_MAX,
    LATELY_S,
    Column,
    Snapshot,
    Table,
    event_table,
    member_table,
    rate_of,
    recent,
    share_text,
    shares_of_height,
    size_text,
    time_text,
)

NOW = 1_000_000.0


def event(
    name: str = "e", state: str = "done", started: float = -10, finished: float | None = -6, **fields: Any
) -> dict[str, Any]:
    """An event whose times are seconds from `NOW`."""
    chunks = {"found": 4, "moved": 1, "already_there": 1, "shared_kept": 1, "failed": 1}
    known = {
        "event_id": name,
        "kind": "move",
        "state": state,
        "copy": False,
        "chunks": chunks,
        "bytes": 8 * 2**20,
        "lane": "tcp",
        "old_position": ["a", "LocalCPUBackend"],
        "new_position": ["b", "LocalCPUBackend"],
        "started_at": NOW + started,
        "finished_at": None if finished is None else NOW + finished,
        "seconds": None if finished is None else finished - started,
    }
    return {**known, **fields}


def member(name: str, state: str = "alive", **locations: tuple[int, int, int]) -> dict[str, Any]:
    held = {
        location: {"chunks": chunks, "bytes": nbytes, "limit": limit} for location, (chunks, nbytes, limit) in locations.items()
    }
    return {"instance": name, "state": state, "locations": held, "joined_at": NOW - 3700, "heard_at": NOW - 0.25}


def snapshot(members: list[dict[str, Any]], events: list[dict[str, Any]]) -> Snapshot:
    return Snapshot("http://a", "a", NOW, members, events)


def test_each_location_of_a_member_has_a_row_and_who_stores_nothing_has_one_too() -> None:
    both = member("a", LocalDiskBackend=(1, 2**30, 2**31), LocalCPUBackend=(3, 2**20, 2**30))
    table = member_table(snapshot([both, member("controller-9000")], []))
    times = ("1 h 1 min", "0.25 s")
    assert table.rows == (
        ("a", "alive", "LocalCPUBackend", "3", "1.0 MiB", "1.0 GiB", "<1 %", *times),
        ("a", "alive", "LocalDiskBackend", "1", "1.0 GiB", "2.0 GiB", "50 %", *times),
        ("controller-9000", "alive", "-", "-", "-", "-", "-", *times),
    )
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_what_is_not_known_of_a_member_is_a_dash() -> None:
    unknown = {**member("a", "dead"), "joined_at": None, "heard_at": None}
    assert member_table(snapshot([unknown], [])).rows[0][-2:] == ("-", "-")


def test_an_event_has_its_progress_and_its_mean_rate() -> None:
    (ended, running) = event_table(snapshot([], [event(), event("f", "running", -4, None, lane=None, copy=True)])).rows
    assert ended == ("done", "move", "a", "b", "3/4", "8.0 MiB", "tcp", "2.0 MiB/s", "4 s", "e")
    assert running == ("running", "copy", "a", "b", "3/4", "8.0 MiB", "-", "2.0 MiB/s", "4 s", "f")


def test_a_rate_needs_bytes_and_time_and_survives_a_clock_that_is_ahead() -> None:
    assert rate_of(event(started=-10, finished=-8), NOW) == 4 * 2**20
    assert rate_of(event(bytes=0), NOW) is None
    assert rate_of(event(state="running", started=5, finished=None), NOW) is None
    assert event_table(snapshot([], [event(state="running", started=5, finished=None)])).rows[0][-2] == "0 s"


def test_what_is_under_way_comes_first_and_what_ended_long_ago_not_at_all() -> None:
    old = event("old", finished=-LATELY_S - 1)
    events = [event("last", finished=-1), event("first", finished=-9), old, event("new", "running", -1, None)]
    assert [each["event_id"] for each in recent([*events, event("long", "pending", -99, None)], NOW)] == [
        *("long", "new", "last", "first")
    ]
    assert len(recent([event(str(index)) for index in range(ENDED_MAX + 5)], NOW)) == ENDED_MAX


@pytest.mark.parametrize(
    ("width", "names"), [(100, "a bb ccc"), (10, "a bb ccc"), (9, "a bb"), (5, "a bb"), (4, "bb"), (0, "bb")]
)
@pytest.mark.parametrize("rows", [(), (("1", "2", "3"),)])
def test_columns_of_least_worth_go_where_there_is_no_room(width: int, names: str, rows: tuple[tuple[str, ...], ...]) -> None:
    """The heads take 1, 2 and 3 characters, with 2 between two of them."""
    shown = Table((Column("a", 2), Column("bb", 3), Column("ccc", 1)), rows).fitted(width)
    assert [column.name for column in shown.columns] == names.split()
    assert [len(row) for row in shown.rows] == [len(names.split())] * len(rows)


@pytest.mark.parametrize(
    ("height", "members", "events", "shares"),
    [(30, 2, 5, (2, 5)), (9, 20, 20, (6, 3)), (9, 20, 1, (8, 1)), (9, 2, 20, (2, 7)), (1, 3, 3, (1, 0)), (-5, 3, 3, (0, 0))],
)
def test_members_and_events_share_the_height(height: int, members: int, events: int, shares: tuple[int, int]) -> None:
    assert shares_of_height(height, members, events) == shares


def test_numbers_are_written_for_people() -> None:
    assert [size_text(nbytes) for nbytes in (0, 1023, 1024, 1.5 * 2**20, 200 * 2**30, 2**60)] == [
        *("0 B", "1023 B", "1.0 KiB", "1.5 MiB", "200 GiB", "1048576 TiB")
    ]
    assert [share_text(part, 1000) for part in (0, 1, 10, 999, 1000)] == ["0 %", "<1 %", "1 %", "99 %", "100 %"]
    assert share_text(1, 0) == "-"
    assert [time_text(seconds) for seconds in (0.004, 9.94, 10, 187, 7500, 349_200)] == [
        *("0.004 s", "9.9 s", "10 s", "3 min 7 s", "2 h 5 min", "4 d 1 h")
    ]


def test_json_has_what_the_picture_shows() -> None:
    taken = snapshot([member("a")], [event()])
    assert taken.fields() == {"instance": "a", "at": NOW, "members": [member("a")], "events": [event()]}
