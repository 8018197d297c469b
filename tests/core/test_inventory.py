"""Inventories: a view is always exactly what its owner held at some moment, and catches up whatever the network did."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.core.ids import Location
from p2pkv.core.inventory import LOG_CHANGES, VIEW_ENTRIES, EntrySet, InventoryLog, InventoryView
from p2pkv.core.messages import (
    INVENTORY_PAGE_ENTRIES,
    InventoryChange,
    InventoryDelta,
    InventoryEntry,
    InventoryPage,
    InventoryRequest,
    Status,
)
from tests.core.builders import entry, member

entries = st.builds(entry, st.integers(0, 5), location=st.sampled_from(Location))


def status_of(log: InventoryLog) -> Status:
    return Status(
        me=member("owner", log.generation),
        sequence=log.sequence,
        entry_count=len(log.entries),
        entry_sum=log.entries.sum,
    )


def apply(view: InventoryView, part: InventoryDelta | InventoryPage) -> bool:
    if isinstance(part, InventoryPage):
        view.apply_page(part)
        return True
    return view.apply_delta(part)


def answer(log: InventoryLog, view: InventoryView, request: InventoryRequest | None) -> None:
    if request is not None:
        for part in log.since(request.generation, request.sequence):
            apply(view, part)


def filled(count: int) -> InventoryLog:
    log = InventoryLog(generation=3)
    for number in range(count):
        log.add(entry(number))
    return log


# --- sets -----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), entries)))
def test_a_set_of_entries_is_a_set(changes: list[tuple[bool, InventoryEntry]]) -> None:
    twin: set[InventoryEntry] = set()
    found = EntrySet()
    for is_added, each in changes:
        assert (found.add(each) if is_added else found.remove(each)) == ((each in twin) != is_added)
        (twin.add if is_added else twin.discard)(each)
    assert set(found) == twin
    assert len(found) == len(twin)
    assert found.sum == EntrySet(sorted(twin, key=repr)).sum


def test_the_sum_tells_locations_apart() -> None:
    cpu, disk = (EntrySet([entry(7, location=location)]) for location in (Location.LOCAL_CPU, Location.LOCAL_DISK))
    assert len({cpu.sum, disk.sum, EntrySet().sum}) == 3


# --- convergence ----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_view_never_guesses_and_always_catches_up(data: st.DataObject) -> None:
    """Changes go out once; deltas and statuses are lost, repeated and reordered."""
    log, view = InventoryLog(generation=3), InventoryView(generation=3)
    history = {0: set(log.entries)}
    on_the_way: list[InventoryDelta | InventoryPage | Status] = []
    for _ in range(data.draw(st.integers(0, 12))):
        each = data.draw(entries)
        before = log.sequence
        (log.add if data.draw(st.booleans()) else log.remove)(each)
        history[log.sequence] = set(log.entries)
        on_the_way += [*log.since(3, before), status_of(log)]
        for _ in range(data.draw(st.integers(0, 3))):
            part = data.draw(st.sampled_from(on_the_way))
            if isinstance(part, Status):
                request = view.lags(part)
                if request is not None:
                    on_the_way += log.since(request.generation, request.sequence)
            else:
                apply(view, part)
            assert set(view.entries) == history[view.sequence]
    answer(log, view, view.lags(status_of(log)))
    assert (view.sequence, set(view.entries)) == (log.sequence, set(log.entries))
    assert view.lags(status_of(log)) is None


def test_a_gap_is_asked_for_not_jumped() -> None:
    log, view = filled(5), InventoryView(generation=3)
    (late,) = log.since(3, 2)
    assert not apply(view, late)
    assert (view.sequence, len(view.entries)) == (0, 0)
    answer(log, view, view.request())
    assert set(view.entries) == set(log.entries)


def test_a_delta_that_overlaps_what_is_known_adds_only_the_rest() -> None:
    log, view = filled(5), InventoryView(generation=3)
    answer(log, view, view.request())
    log.remove(entry(0))
    log.add(entry(9))
    (overlapping,) = log.since(3, 3)
    assert apply(view, overlapping)
    assert apply(view, overlapping)
    assert set(view.entries) == set(log.entries)


def test_nothing_is_recorded_for_what_changes_nothing() -> None:
    log = filled(1)
    log.add(entry(0))
    log.remove(entry(8))
    assert (log.sequence, log.since(3, 1)) == (1, [])


def test_a_long_tail_comes_in_several_deltas() -> None:
    log, view = filled(INVENTORY_PAGE_ENTRIES + 1), InventoryView(generation=3)
    parts = log.since(3, 0)
    assert [type(part) for part in parts] == [InventoryDelta, InventoryDelta]
    assert all(apply(view, part) for part in parts)
    assert set(view.entries) == set(log.entries)


# --- snapshots ------------------------------------------------------------------------------------------------------------


def pages_of(log: InventoryLog) -> list[InventoryPage]:
    return [part for part in log.since(generation=0, sequence=0) if isinstance(part, InventoryPage)]


def apply_all(view: InventoryView, pages: Iterable[InventoryPage]) -> None:
    for page in pages:
        view.apply_page(page)


def test_past_a_truncated_log_comes_a_snapshot() -> None:
    log, view = InventoryLog(generation=3), InventoryView(generation=3)
    for _ in range(LOG_CHANGES // 2 + 1):
        log.add(entry(1))
        log.remove(entry(1))
    log.add(entry(2))
    assert isinstance(log.since(3, 2)[0], InventoryPage)
    assert isinstance(log.since(3, 3)[0], InventoryDelta)
    answer(log, view, view.request())
    assert (view.sequence, list(view.entries)) == (log.sequence, [entry(2)])


@pytest.mark.parametrize(("generation", "sequence"), [(2, 1), (3, 99)])
def test_another_boot_or_the_future_gets_a_snapshot(generation: int, sequence: int) -> None:
    log = filled(2)
    assert log.since(generation, sequence) == pages_of(log)


def test_an_empty_inventory_is_a_snapshot_too() -> None:
    view = InventoryView(generation=3)
    view.entries.add(entry(1))
    apply_all(view, pages_of(InventoryLog(generation=3)))
    assert len(view.entries) == 0


def test_pages_may_come_in_any_order_and_twice() -> None:
    log, view = filled(2 * INVENTORY_PAGE_ENTRIES + 5), InventoryView(generation=3)
    first, second, third = pages_of(log)
    apply_all(view, (third, first, third))
    assert (view.sequence, len(view.entries)) == (0, 0), "half a snapshot is none"
    view.apply_page(second)
    assert (view.sequence, set(view.entries)) == (log.sequence, set(log.entries))


def test_pages_of_two_snapshots_are_never_mixed() -> None:
    log, view = filled(INVENTORY_PAGE_ENTRIES + 5), InventoryView(generation=3)
    old = pages_of(log)
    log.remove(entry(0))
    new = pages_of(log)
    apply_all(view, (old[0], new[1], old[0]))
    assert len(view.entries) == 0
    view.apply_page(new[0])
    assert set(view.entries) == set(log.entries)


def test_a_snapshot_older_than_the_view_is_ignored() -> None:
    log, view = filled(2), InventoryView(generation=3)
    old = pages_of(log)
    log.add(entry(9))
    answer(log, view, view.request())
    apply_all(view, old)
    assert set(view.entries) == set(log.entries)


def test_a_page_that_cant_be_is_ignored() -> None:
    view = InventoryView(generation=3)
    page = InventoryPage(generation=3, sequence=1, page_index=0, page_count=1, entries=(entry(1),))
    too_many = VIEW_ENTRIES // INVENTORY_PAGE_ENTRIES + 1
    for index, count, generation in [(1, 1, 3), (0, too_many, 3), (0, 1, 4)]:
        view.apply_page(
            InventoryPage(generation=generation, sequence=1, page_index=index, page_count=count, entries=page.entries)
        )
    assert len(view.entries) == 0
    view.apply_page(page)
    assert len(view.entries) == 1


# --- mismatches -----------------------------------------------------------------------------------------------------------


def test_a_view_that_differs_at_equal_sequence_starts_afresh() -> None:
    log, view = filled(3), InventoryView(generation=3)
    answer(log, view, view.request())
    view.entries.remove(entry(1))
    request = view.lags(status_of(log))
    assert (view.sequence, len(view.entries)) == (0, 0), "a wrong view answers misses, not guesses"
    assert request is not None
    assert request.generation != log.generation, "which asks for a snapshot"
    answer(log, view, request)
    assert set(view.entries) == set(log.entries)


def test_equal_counts_dont_hide_a_mismatch() -> None:
    log, view = filled(3), InventoryView(generation=3)
    answer(log, view, view.request())
    view.entries.remove(entry(1))
    view.entries.add(entry(7))
    assert view.lags(status_of(log)) is not None


def test_a_late_status_and_one_of_another_boot_say_nothing() -> None:
    log, view = filled(2), InventoryView(generation=3)
    late = status_of(log)
    log.add(entry(8))
    answer(log, view, view.request())
    assert view.lags(late) is None
    assert view.lags(status_of(InventoryLog(generation=4))) is None


def test_a_delta_of_another_boot_is_not_applied() -> None:
    view = InventoryView(generation=3)
    delta = InventoryDelta(generation=4, first_sequence=1, changes=(InventoryChange(present=True, entry=entry(1)),))
    assert not view.apply_delta(delta)
    assert len(view.entries) == 0
