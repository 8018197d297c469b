"""Inventories: a view is exactly what its owner held at some moment, but for what it says is missing, and always catches up."""

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.core import inventory
from p2pkv.core.ids import Location
from p2pkv.core.inventory import EntrySet, InventoryLog, InventoryView
from p2pkv.core.messages import (
    CHANGE_NBYTES,
    INVENTORY_PAGE_ENTRIES,
    RANGE_NBYTES,
    InventoryDelta,
    InventoryDigest,
    InventoryPage,
    InventoryRequest,
    RangeRequest,
    Status,
)
from p2pkv.core.rows import FINGERPRINT_MAX, InventoryEntry, Rows, entries_in, hash_sum, pack, unpack
from tests.core.builders import entry, member

GENERATION = 3
HOLDER = 1
STEP = 2**64 // 64
"""Fingerprints are spread over all their range, as hashes are."""
entries = st.builds(
    lambda index, location: entry(index * STEP, location=location), st.integers(0, 63), st.sampled_from(Location)
)
Part = InventoryDelta | InventoryDigest | InventoryPage
Question = InventoryRequest | RangeRequest


class Reader:
    """A view, and a shell for it that asks what it lacks."""

    def __init__(self) -> None:
        self.rows = Rows()
        self.view = InventoryView(GENERATION, self.rows, HOLDER)

    @property
    def entries(self) -> set[InventoryEntry]:
        return set(entries_in(*self.rows.of(HOLDER)))

    def take(self, part: Part) -> bool:
        match part:
            case InventoryDelta():
                return self.view.apply_delta(part)
            case InventoryDigest():
                self.view.compare(part)
                return True
            case InventoryPage():
                return self.view.apply_page(part)

    def question(self, status: Status) -> Question | None:
        if self.view.is_refuted(status):
            self.view.awaits_digest = True
        if self.view.lags(status):
            return self.view.request()
        return self.view.range_request() if self.view.missing else None

    def catch_up(self, log: InventoryLog) -> int:
        """Ask until nothing is left to ask; returns how many parts came."""
        for part_count in count():
            question = self.question(status_of(log))
            if question is None:
                return part_count
            for part in answer(log, question):
                assert self.take(part)
        raise AssertionError("it counts for ever")


def status_of(log: InventoryLog) -> Status:
    return Status(member("owner", log.generation), log.sequence, len(log.entries), log.entries.sum)


def answer(log: InventoryLog, question: Question) -> list[Part]:
    if isinstance(question, RangeRequest):
        return [log.page(question.first, question.last)]
    tail = log.tail(question.generation, question.sequence)
    return [log.digest()] if tail is None else [*tail]


def tail_of(log: InventoryLog, sequence: int) -> InventoryDelta:
    tail = log.tail(GENERATION, sequence)
    assert tail is not None
    (delta,) = tail
    return delta


def filled(entry_count: int, step: int = STEP) -> InventoryLog:
    log = InventoryLog(GENERATION, inventory.LOG_CHANGES)
    for index in range(entry_count):
        log.add(entry(index * step))
    return log


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few entries go through all that a million do."""
    monkeypatch.setattr(inventory, "LOG_CHANGES", 3)
    monkeypatch.setattr(inventory, "RANGE_ENTRIES", 4)
    monkeypatch.setattr(inventory, "INVENTORY_PAGE_ENTRIES", 4)
    monkeypatch.setattr(inventory, "UNSORTED_CHANGES", 5)


# --- sets -----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), entries)))
def test_a_set_of_entries_is_a_set_with_the_sum_of_its_rows(changes: list[tuple[bool, InventoryEntry]]) -> None:
    twin: set[InventoryEntry] = set()
    found = EntrySet()
    for is_added, each in changes:
        assert (found.add(each) if is_added else found.remove(each)) == ((each in twin) != is_added)
        (twin.add if is_added else twin.discard)(each)
    assert set(found) == twin
    assert len(found) == len(twin)
    assert found.sum == hash_sum(*unpack(b"".join(pack(each, present=True) for each in twin)))


# --- convergence ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@given(st.data())
def test_a_view_never_guesses_and_always_catches_up(data: st.DataObject) -> None:
    """Changes go out once; whatever is said is lost, repeated and reordered; the log is short and the pages are small."""
    log, reader = InventoryLog(GENERATION, inventory.LOG_CHANGES), Reader()
    history = {0: set(log.entries)}
    on_the_way: list[Part | Status] = []
    for _ in range(data.draw(st.integers(0, 20))):
        before = log.sequence
        for each in data.draw(st.lists(entries, max_size=5)):
            (log.add if data.draw(st.booleans()) else log.remove)(each)
            history[log.sequence] = set(log.entries)
        on_the_way += [*(log.tail(GENERATION, before) or ()), status_of(log)]
        for _ in range(data.draw(st.integers(0, 3))):
            part = data.draw(st.sampled_from(on_the_way))
            if not isinstance(part, Status):
                reader.take(part)
            elif (question := reader.question(part)) is not None:
                on_the_way += answer(log, question)
            check(reader, history)
    reader.catch_up(log)
    assert (reader.view.sequence, reader.entries) == (log.sequence, set(log.entries))
    assert reader.view.is_whole
    assert not reader.view.is_refuted(status_of(log))


def check(reader: Reader, history: dict[int, set[InventoryEntry]]) -> None:
    def known(held: set[InventoryEntry]) -> set[InventoryEntry]:
        return {each for each in held if not any(first <= each.fingerprint <= last for first, last in reader.view.missing)}

    assert known(reader.entries) == known(history[reader.view.sequence])


def test_a_gap_is_asked_for_not_jumped() -> None:
    log, reader = filled(5), Reader()
    late = tail_of(log, 2)
    assert not reader.take(late)
    assert (reader.view.sequence, reader.entries) == (0, set())
    assert reader.view.request() == InventoryRequest(GENERATION, 0)
    reader.catch_up(log)
    assert reader.entries == set(log.entries)


def test_a_delta_that_overlaps_what_is_known_adds_only_the_rest() -> None:
    log, reader = filled(5), Reader()
    reader.catch_up(log)
    log.remove(entry(0))
    log.add(entry(9))
    overlapping = tail_of(log, 3)
    assert reader.take(overlapping)
    assert reader.take(overlapping)
    assert reader.entries == set(log.entries)
    assert not reader.view.is_refuted(status_of(log))


def test_nothing_is_recorded_for_what_changes_nothing() -> None:
    log = filled(1)
    log.add(entry(0))
    log.remove(entry(8))
    assert (log.sequence, log.tail(GENERATION, 1)) == (1, [])


def test_a_long_tail_comes_in_several_deltas() -> None:
    log, reader = filled(INVENTORY_PAGE_ENTRIES + 1, step=1), Reader()
    parts = log.tail(GENERATION, 0)
    assert parts is not None
    assert [len(part.changes) for part in parts] == [INVENTORY_PAGE_ENTRIES * CHANGE_NBYTES, CHANGE_NBYTES]
    assert all(map(reader.take, parts))
    assert reader.entries == set(log.entries)


@pytest.mark.parametrize(("generation", "sequence"), [(2, 1), (3, 99)])
def test_another_boot_or_the_future_gets_no_tail(generation: int, sequence: int) -> None:
    assert filled(2).tail(generation, sequence) is None


# --- past the log ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_only_ranges_that_differ_are_fetched_in_pages() -> None:
    log, reader = filled(64), Reader()
    assert reader.catch_up(log) > 64 // 4
    for index in range(4):
        log.remove(entry(index * STEP))
    assert log.tail(GENERATION, reader.view.sequence) is None
    assert reader.catch_up(log) == 2, "a digest, and a page for one range of 32"
    assert reader.entries == set(log.entries)


@pytest.mark.usefixtures("small")
def test_changes_go_on_while_pages_come() -> None:
    log, reader = filled(64), Reader()
    reader.take(log.digest())
    reader.view.awaits_digest = False
    for index in range(64):
        if not reader.view.missing:
            break
        before = log.sequence
        log.remove(entry(index * STEP))
        log.add(entry((63 - index) * STEP, location=Location.LOCAL_DISK))
        assert all(map(reader.take, log.tail(GENERATION, before) or ()))
        assert reader.take(log.page(*reader.view.missing[0]))
    assert reader.view.is_whole
    assert reader.entries == set(log.entries)
    assert not reader.view.is_refuted(status_of(log))


@pytest.mark.usefixtures("small")
def test_a_page_of_another_moment_doesnt_count() -> None:
    log, reader = filled(8), Reader()
    reader.take(log.digest())
    early = log.page(0, FINGERPRINT_MAX)
    log.add(entry(9 * STEP))
    late = log.page(*reader.view.missing[0])
    assert not reader.take(late), "it has a change that hasn't come yet"
    reader.catch_up(log)
    assert not reader.take(early)
    assert reader.entries == set(log.entries)


def test_an_owner_that_never_gets_on_isnt_listened_to() -> None:
    log, reader = filled(8), Reader()
    reader.take(log.digest())
    held = pack(entry(5), present=True)
    for last, data in [
        (0, b""),  # one fingerprint of 2**64
        (2**63, held),
        (4, held),  # beyond its end
        (FINGERPRINT_MAX, pack(entry(5), present=False)),
    ]:
        assert not reader.take(InventoryPage(GENERATION, log.sequence, 0, last, data))
    assert not reader.take(InventoryPage(GENERATION, log.sequence, 1, FINGERPRINT_MAX, held))
    assert not reader.take(InventoryPage(GENERATION + 1, log.sequence, 0, FINGERPRINT_MAX, held))
    assert reader.entries == set()
    assert reader.take(InventoryPage(GENERATION, log.sequence, 0, FINGERPRINT_MAX, held))


@pytest.mark.parametrize("ranges", [bytes(3 * RANGE_NBYTES), bytes(RANGE_NBYTES + 1)])
def test_what_is_no_digest_changes_nothing(ranges: bytes) -> None:
    log, reader = filled(8), Reader()
    reader.catch_up(log)
    for digest in (
        InventoryDigest(GENERATION, log.sequence, ranges),
        InventoryDigest(GENERATION + 1, log.sequence, bytes(RANGE_NBYTES)),
        InventoryDigest(GENERATION, log.sequence - 1, bytes(RANGE_NBYTES)),
    ):
        reader.take(digest)
    assert reader.entries == set(log.entries)
    assert reader.view.is_whole


# --- mismatches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instead", [[], [7]])
def test_a_view_that_differs_at_equal_sequence_forgets_what_differs(instead: list[int]) -> None:
    """Equal counts don't hide it."""
    log, reader = filled(3), Reader()
    changes = [pack(entry(each), present=True) for each in (0, STEP, *instead)]
    reader.take(InventoryDelta(GENERATION, 1, b"".join(changes)))
    reader.view.sequence = log.sequence
    assert reader.view.is_refuted(status_of(log))
    assert reader.question(status_of(log)) == InventoryRequest(generation=0, sequence=0), "which asks for a digest"
    assert not reader.view.is_whole
    reader.take(log.digest())
    assert reader.entries == set(), "a wrong view answers misses, not guesses"
    reader.catch_up(log)
    assert reader.entries == set(log.entries)
    assert not reader.view.is_refuted(status_of(log))


def test_a_late_status_and_one_of_another_boot_say_nothing() -> None:
    log, reader = filled(2), Reader()
    late = status_of(log)
    log.add(entry(8))
    reader.catch_up(log)
    assert reader.question(late) is None
    assert reader.question(status_of(InventoryLog(generation=4))) is None


def test_a_delta_of_another_boot_is_not_applied() -> None:
    reader = Reader()
    assert not reader.take(InventoryDelta(GENERATION + 1, 1, pack(entry(1), present=True)))
    assert reader.entries == set()
