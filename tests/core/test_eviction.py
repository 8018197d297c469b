"""Eviction: least recently used first, suffixes before their prefixes, and never more or other than it may."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from p2pkv.core.chunks import PAGE_NBYTES
from p2pkv.core.eviction import find_victims
from p2pkv.core.inventory import InventoryLog
from p2pkv.core.residency import Incoming, Outgoing, Residencies, Residency, Room, Slot, Writing
from tests.core.builders import CPU, chunks_of, pack, prompt

short_prompts = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=14).map(lambda ids: pack(*ids))
slots: st.SearchStrategy[Slot] = st.sampled_from([None] * 8 + [Incoming("m"), Outgoing("m", 1), Writing()])


def pages(count: int) -> Room:
    return Room(count * PAGE_NBYTES, count)


@dataclass(frozen=True)
class Shelf:
    book: Residencies
    now: float
    colder_than: float

    def may_go(self, residency: Residency) -> bool:
        """Whether it may go by itself, its children aside."""
        is_needed = residency.is_leased(self.now) or residency.is_pinned(self.now)
        return residency.slot is None and not is_needed and residency.used_at < self.colder_than

    def evictable(self) -> dict[bytes, Residency]:
        """All that could go: whatever may go, and under which nothing stays."""
        found = {residency.chunk.key: residency for residency in self.book if self.may_go(residency)}
        while blocked := [key for key in found if any(child.chunk.key not in found for child in self.book.children(key))]:
            for key in blocked:
                del found[key]
        return found


@st.composite
def shelves(draw: st.DrawFn) -> Shelf:
    chunks = {chunk.key: chunk for tokens in draw(st.lists(short_prompts, max_size=6)) for chunk in chunks_of(tokens)}
    book = Residencies(CPU, pages(len(chunks) + draw(st.integers(0, 2))), InventoryLog(generation=1))
    for moment, chunk in enumerate(draw(st.permutations(list(chunks.values())))):
        residency = book.enter(chunk, draw(slots), float(moment))
        if draw(st.integers(0, 9)) == 0:
            residency.leases["reader"] = draw(st.sampled_from([50.0, 200.0]))
        if draw(st.integers(0, 9)) == 0:
            residency.pin(draw(st.sampled_from([50.0, 200.0, float("inf")])))
    return Shelf(book, now=100.0, colder_than=draw(st.sampled_from([float("inf"), 3.0])))


@given(shelves(), st.integers(0, 20))
def test_victims_make_just_enough_room_of_what_may_go(shelf: Shelf, need: int) -> None:
    victims = find_victims(shelf.book, pages(need), now=shelf.now, colder_than=shelf.colder_than)
    free = shelf.book.free().descriptors
    evictable = shelf.evictable()
    assert (victims is None) == (need > free + len(evictable))
    for index, victim in enumerate(victims or []):
        assert victim.chunk.key in evictable
        gone = [each.chunk.key for each in (victims or [])[:index]]
        assert all(child.chunk.key in gone for child in shelf.book.children(victim.chunk.key)), "suffixes first"
    if victims is not None:
        assert len(victims) == max(0, need - free)


def shelf_of(*prompts: bytes) -> Residencies:
    """Unrelated prompts of one chunk, in order of their last use."""
    book = Residencies(CPU, pages(len(prompts)), InventoryLog(generation=1))
    for moment, tokens in enumerate(prompts):
        book.enter(chunks_of(tokens)[0], None, float(moment))
    return book


def test_the_least_recently_used_go_first() -> None:
    book = shelf_of(*(prompt(4, first=10 * index) for index in range(5)))
    second = list(book)[1]
    book.touch(second, 9.0)
    victims = find_victims(book, pages(3), now=10.0)
    assert victims == list(book)[:3]
    assert second not in victims


def test_a_prefix_waits_for_its_suffixes_even_when_it_is_colder() -> None:
    book = Residencies(CPU, pages(3), InventoryLog(generation=1))
    prefix, suffix = (book.enter(chunk, None, 0.0) for chunk in chunks_of(prompt(8)))
    other = book.enter(chunks_of(prompt(4, first=50))[0], None, 1.0)
    assert find_victims(book, pages(1), now=2.0) == [suffix]
    assert find_victims(book, pages(2), now=2.0) == [suffix, other]
    assert find_victims(book, pages(3), now=2.0) == [suffix, other, prefix]


def test_a_pinned_chunk_and_its_prefix_stay_however_cold() -> None:
    book = Residencies(CPU, pages(3), InventoryLog(generation=1))
    _prefix, pinned, suffix = (book.enter(chunk, None, 0.0) for chunk in chunks_of(prompt(12)))
    pinned.pin(until=5.0)
    assert find_victims(book, pages(1), now=2.0) == [suffix]
    assert find_victims(book, pages(2), now=2.0) is None
    assert find_victims(book, pages(2), now=5.0) == [suffix, pinned]


def test_what_comes_evicts_only_what_is_colder() -> None:
    book = shelf_of(prompt(4), prompt(4, first=50))
    assert find_victims(book, pages(1), now=9.0, colder_than=1.0) == list(book)[:1]
    assert find_victims(book, pages(2), now=9.0, colder_than=1.0) is None


def test_promised_room_is_not_given_away() -> None:
    book = shelf_of(prompt(4), prompt(4, first=50))
    book.promised["m"] = pages(1)
    assert find_victims(book, pages(1), now=9.0) == list(book)
    assert find_victims(book, pages(2), now=9.0) is None


def test_descriptors_are_a_limit_like_bytes() -> None:
    book = shelf_of(prompt(4), prompt(4, first=50))
    assert find_victims(book, Room(0, 1), now=9.0) == list(book)[:1]
    assert find_victims(book, Room(1, 0), now=9.0) == list(book)[:1]
    assert find_victims(book, Room(0, 0), now=9.0) == []
