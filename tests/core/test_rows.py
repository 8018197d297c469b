"""Rows against a set of tuples."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.core import rows
from p2pkv.core.ids import Location
from p2pkv.core.rows import FINGERPRINT_MAX, InventoryEntry, Rows, are_gone, entries_in, hash_sum, pack, packed, unpack
from tests.core.builders import entry

HOLDERS = 3
SPREAD = 2**64 // 32
"""Fingerprints are spread over all their range, as hashes are."""
entries = st.builds(
    InventoryEntry, st.integers(0, 31).map(lambda index: index * SPREAD), st.sampled_from(Location), st.sampled_from([1, 65536])
)
steps = st.tuples(st.integers(0, HOLDERS - 1), st.lists(st.tuples(st.booleans(), entries), max_size=6))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows go through all that millions do."""
    monkeypatch.setattr(rows, "BLOCK_ROWS", 6)
    monkeypatch.setattr(rows, "TAIL_ROWS_MIN", 3)
    monkeypatch.setattr(rows, "TAIL_PARTS_MAX", 2)


Twin = dict[tuple[int, int, Location], int]


def check(found: Rows, twin: Twin) -> None:
    fingerprints = [index * SPREAD for index in range(32)]
    table = found.held(np.array(fingerprints, np.uint64), HOLDERS)
    for holder, (index, location) in product(range(HOLDERS), enumerate(Location)):
        held = {each for each in fingerprints if (holder, each, location) in twin}
        assert {each for each, is_held in zip(fingerprints, table[:, 2 * holder + index], strict=True) if is_held} == held
        assert not held or found.may_hold(np.array([2 * holder + index])).all()
    for holder in range(HOLDERS):
        listed = {(each.fingerprint, each.location): each.token_count for each in entries_in(*found.of(holder))}
        assert listed == {key[1:]: tokens for key, tokens in twin.items() if key[0] == holder}


@pytest.mark.usefixtures("small_blocks")
@given(st.lists(steps, max_size=30), st.integers(0, 31), st.integers(0, 31))
def test_rows_are_what_was_said_last_of_each_chunk_at_each_position(
    changes: list[tuple[int, list[tuple[bool, InventoryEntry]]]], one: int, other: int
) -> None:
    found, twin = Rows(), Twin()
    for holder, batch in changes:
        for is_present, each in batch:
            if is_present:
                twin[holder, each.fingerprint, each.location] = each.token_count
            else:
                twin.pop((holder, each.fingerprint, each.location), None)
        found.apply(holder, *unpack(b"".join(pack(each, present=is_present) for is_present, each in batch)))
    check(found, twin)
    first, last = min(one, other) * SPREAD, max(one, other) * SPREAD
    assert {each.fingerprint for each in entries_in(*found.of(1, first, last))} == {
        each for holder, each, _ in twin if holder == 1 and first <= each <= last
    }
    found.drop(1, first, last)
    check(found, {key: tokens for key, tokens in twin.items() if key[0] != 1 or not first <= key[1] <= last})
    found.drop(1)
    check(found, {key: tokens for key, tokens in twin.items() if key[0] != 1})


@pytest.mark.usefixtures("small_blocks")
def test_a_chunk_that_many_hold_stays_in_one_block() -> None:
    found = Rows()
    for holder in range(20):
        found.apply(holder, *unpack(pack(entry(7 * SPREAD), present=True) + pack(entry(holder), present=True)))
    table = found.held(np.array([7 * SPREAD], np.uint64), 20)
    assert table.sum() == 20


def test_changes_travel_as_they_lie() -> None:
    each = InventoryEntry(FINGERPRINT_MAX, Location.LOCAL_DISK, 65536)
    came, went = pack(each, present=True), pack(each, present=False)
    assert came == b"\xff" * 8 + b"\xff\xff\x02\x00"
    assert went == b"\xff" * 8 + b"\xff\xff\x03\x00"
    fingerprints, tags = unpack(came + went + b"rest")
    assert are_gone(tags).tolist() == [False, True]
    assert entries_in(fingerprints, tags) == [each, each]
    assert packed(fingerprints, tags) == came + went


def test_bits_that_mean_nothing_name_no_holder() -> None:
    _, tags = unpack(b"\0" * 8 + b"\xff" * 4)
    found = Rows()
    found.apply(1, np.zeros(1, np.uint64), tags & np.uint32(2**16 - 1))
    assert tags[0] == 2**18 - 1
    assert len(found.of(1)[0]) == 1


def test_the_sum_is_of_a_set_and_tells_locations_apart() -> None:
    def sum_of(*several: InventoryEntry) -> int:
        return hash_sum(*unpack(b"".join(pack(each, present=True) for each in several)))

    one, other, moved = entry(7), entry(2**63 + 1), entry(7, location=Location.LOCAL_DISK)
    assert sum_of(one, other) == sum_of(other, one) != sum_of(moved, other)
    assert sum_of() == 0


def test_a_position_without_rows_is_known_for_one() -> None:
    found, of_two = Rows(), np.arange(4)
    found.apply(1, *unpack(pack(entry(7, location=Location.LOCAL_DISK), present=True)))
    assert found.may_hold(of_two).tolist() == [False, False, False, True]
    found.drop(1, 0, 7)
    assert found.may_hold(of_two).any(), "others of its rows may be left"
    found.drop(1)
    assert not found.may_hold(of_two).any()
