"""The book of one location against sets that are searched from end to end."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.core.chunks import PAGE_NBYTES, Chunk
from p2pkv.core.ids import Location
from p2pkv.core.inventory import InventoryLog
from p2pkv.core.residency import Incoming, Outgoing, Residencies, Residency, Room, Slot, Writing, room_of
from tests.core.builders import CHUNK_SIZE, CPU, NAMESPACE, ROOT, chunks_of, pack, prompt, sought

short_prompts = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=10).map(lambda ids: pack(*ids))
slots = st.sampled_from([None, None, None, Incoming("m", is_verified=True), Outgoing("m", 1)])


def book_of(capacity: int = 1000) -> Residencies:
    return Residencies(CPU, Room(capacity * PAGE_NBYTES, capacity), InventoryLog(generation=1))


@dataclass(frozen=True)
class Stored:
    """A chunk in the book, and all tokens up to its end, which the book doesn't know."""

    residency: Residency
    path: bytes

    @property
    def is_held(self) -> bool:
        return self.residency.slot is None


def store(book: Residencies, tokens: bytes, slot: Slot = None) -> list[Stored]:
    """Enter the chunks of a prompt that aren't there, all in one slot."""
    found = []
    for chunk in chunks_of(tokens):
        if book.get(chunk.key) is None:
            found.append(Stored(book.enter(chunk, slot, now=0.0), tokens[: chunk.end * 4]))
    return found


@dataclass(frozen=True)
class Library:
    book: Residencies
    stored: list[Stored]

    def is_reachable(self, one: Stored) -> bool:
        """Whether it and all full chunks before it are held."""
        ends = range(CHUNK_SIZE, one.residency.chunk.start + 1, CHUNK_SIZE)
        return one.is_held and all(
            any(each.is_held and each.path == one.path[: end * 4] for each in self.stored) for end in ends
        )


@st.composite
def libraries(draw: st.DrawFn) -> Library:
    library = Library(book_of(), [])
    for tokens in draw(st.lists(short_prompts, max_size=6)):
        library.stored.extend(store(library.book, tokens, draw(slots)))
    return library


@given(libraries(), short_prompts)
def test_a_match_is_the_longest_prefix_token_by_token(library: Library, tokens: bytes) -> None:
    matches = library.book.match(sought(tokens))
    longest = 0
    for one in filter(library.is_reachable, library.stored):
        shared = next(count for count in range(10, -1, -1) if one.path[: count * 4] == tokens[: count * 4])
        if shared > one.residency.chunk.start:
            longest = max(longest, min(shared, one.residency.chunk.end, len(tokens) // 4))
    assert (matches[-1].end if matches else 0) == longest
    assert [match.residency.chunk.start for match in matches] == [CHUNK_SIZE * index for index in range(len(matches))]


@given(libraries(), short_prompts)
def test_within_is_all_that_lies_inside_the_tokens_along_the_prefix(library: Library, tokens: bytes) -> None:
    found = library.book.within(sought(tokens))
    expected = {one.residency.chunk.key for one in library.stored if library.is_reachable(one) and tokens.startswith(one.path)}
    assert {residency.chunk.key for residency in found} == expected
    assert len(found) == len(expected)
    ends = [residency.chunk.end for residency in found]
    assert ends == sorted(ends), "prefix first"


def test_half_a_chunk_can_be_used() -> None:
    book = book_of()
    store(book, prompt(8))
    matches = book.match(sought(prompt(6) + pack(77)))
    assert [(match.residency.chunk.start, match.used_count) for match in matches] == [(0, 4), (4, 2)]


def test_a_short_prompt_is_found_again_by_a_longer_one() -> None:
    book = book_of()
    store(book, prompt(6))
    assert book.match(sought(prompt(12)))[-1].end == 6


@given(st.lists(short_prompts, max_size=6), st.data())
def test_room_and_inventory_follow_every_change(prompts: list[bytes], data: st.DataObject) -> None:
    inventory = InventoryLog(generation=1)
    book = Residencies(CPU, Room(1000 * PAGE_NBYTES, 1000), inventory)
    stored = [one.residency for tokens in prompts for one in store(book, tokens, data.draw(slots))]
    for residency in stored:
        change = data.draw(st.sampled_from(["own", "remove", "touch", "nothing"]))
        if change == "own" and not residency.is_owned:
            book.own(residency, 1.0)
        elif change == "remove":
            book.remove(residency)
        elif change == "touch":
            book.touch(residency, 1.0)
    book.check_invariants()
    held = [residency for residency in stored if book.get(residency.chunk.key) is residency]
    assert sorted(residency.chunk.key for residency in book) == sorted(residency.chunk.key for residency in held)
    assert book.used == Room(PAGE_NBYTES * len(held), len(held))
    assert len(book) == len(held)
    assert len(inventory.entries) == sum(residency.is_owned for residency in held)


def test_what_is_used_goes_to_the_end_of_the_order() -> None:
    book = book_of()
    first, second = (one.residency for one in store(book, prompt(8)))
    book.touch(first, 5.0)
    assert list(book) == [second, first]
    assert first.used_at == 5.0


def test_promises_and_use_are_not_free() -> None:
    book = book_of(10)
    store(book, prompt(8))
    book.promised["m"] = Room(3 * PAGE_NBYTES, 3)
    assert book.free() == Room(5 * PAGE_NBYTES, 5)


def test_shards_are_charged_in_whole_pages() -> None:
    chunk = Chunk(b"k" * 16, b"p" * 16, b"n" * 16, 0, pack(1), (1, PAGE_NBYTES, PAGE_NBYTES + 1))
    assert chunk.charged_nbytes == 4 * PAGE_NBYTES
    assert room_of(chunk, Location.LOCAL_CPU) == Room(4 * PAGE_NBYTES, 3)


def test_children_are_those_of_one_parent() -> None:
    book = book_of()
    root, child = store(book, prompt(8))
    (other,) = store(book, prompt(4) + pack(9))
    children = list(book.children(root.residency.chunk.key))
    assert children == [child.residency, other.residency]
    book.remove(child.residency)
    book.remove(other.residency)
    assert list(book.children(root.residency.chunk.key)) == []


def test_only_leases_that_havent_expired_count() -> None:
    (stored,) = store(book_of(), prompt(4))
    stored.residency.leases["reader"] = 10.0
    assert stored.residency.is_leased(9.9)
    assert not stored.residency.is_leased(10.0)


def test_a_pin_lasts_until_its_end_and_is_never_made_shorter() -> None:
    (stored,) = store(book_of(), prompt(4))
    assert not stored.residency.is_pinned(0.0)
    for until in (5.0, 10.0, 7.0):
        stored.residency.pin(until)
    assert stored.residency.is_pinned(9.9)
    assert not stored.residency.is_pinned(10.0)


@given(libraries(), st.data())
def test_pins_keep_what_is_pinned_and_all_that_it_hangs_on(library: Library, data: st.DataObject) -> None:
    pinned = [one for one in library.stored if data.draw(st.booleans())]
    for one in pinned:
        one.residency.pin(data.draw(st.sampled_from([1.0, 3.0])))
    lasting = [one for one in pinned if one.residency.is_pinned(2.0)]
    kept = [one for one in library.stored if one in lasting or any(hangs_on(each, one) for each in lasting)]
    assert library.book.pinned(2.0).keys() == {one.residency.chunk.key for one in kept}


def hangs_on(one: Stored, other: Stored) -> bool:
    """Whether `other` is one of the full chunks before `one`."""
    is_full = other.residency.chunk.token_count == CHUNK_SIZE
    return is_full and other.path != one.path and one.path.startswith(other.path)


def test_how_full_a_book_is_tells_of_pins() -> None:
    book = book_of(10)
    _root, pinned, _suffix = (one.residency for one in store(book, prompt(12)))
    assert book.fullness(0.0) == f"{3 * PAGE_NBYTES} of {10 * PAGE_NBYTES} bytes are used"
    pinned.pin(until=1.0)
    assert book.fullness(0.0).endswith(f"are used, {2 * PAGE_NBYTES} of them by what is pinned")


def test_what_is_being_written_or_brought_is_not_owned() -> None:
    (stored,) = store(book_of(), prompt(4), Writing())
    assert not stored.residency.is_owned
    assert stored.residency.tokens == prompt(4)


@pytest.mark.parametrize(
    ("chunk", "problem"),
    [
        (chunks_of(prompt(8))[1], None),
        (Chunk(b"k" * 16, ROOT, b"n" * 16, 0, b"12345", (8,)), "5 bytes of tokens don't fit chunks of 4 tokens"),
        (Chunk(b"k" * 16, ROOT, b"n" * 16, 0, prompt(5), (40,)), "20 bytes of tokens don't fit"),
        (Chunk(b"k" * 16, ROOT, b"n" * 16, 2, prompt(4), (32,)), "it starts at token 2, not at a multiple of 4"),
        (Chunk(b"k" * 16, ROOT, b"n" * 16, 0, prompt(4), (32,)), "its key doesn't follow from its parent and tokens"),
        (Chunk(chunks_of(prompt(4))[0].key, ROOT, b"n" * 16, 0, prompt(4), (31,)), "its shards have (31,) bytes"),
        (Chunk(chunks_of(prompt(4))[0].key, ROOT, b"n" * 16, 0, prompt(4), (64, 64)), "its shards have (64, 64) bytes"),
    ],
)
def test_a_chunk_from_outside_is_checked(chunk: Chunk, problem: str | None) -> None:
    found = chunk.problem(NAMESPACE)
    assert found == problem or str(found).startswith(str(problem))
