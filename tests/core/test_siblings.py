"""Siblings against a list that is searched from end to end."""

from hypothesis import given
from hypothesis import strategies as st

from p2pkv.core.chunks import Chunk
from p2pkv.core.siblings import Siblings, shared_nbytes
from tests.core.builders import chunks_of, pack

short_tokens = st.lists(st.sampled_from([0, 1, 256]), max_size=4).map(lambda ids: pack(*ids))
families = st.lists(short_tokens.filter(len), unique=True, max_size=8)


def siblings_of(family: list[bytes]) -> tuple[Siblings[Chunk], list[Chunk]]:
    chunks = [chunks_of(tokens)[0] for tokens in family]
    siblings = Siblings[Chunk]()
    for chunk in chunks:
        siblings.add(chunk)
    return siblings, chunks


def shared_count(one: bytes, other: bytes) -> int:
    counts = range(min(len(one), len(other)) // 4, -1, -1)
    return next(count for count in counts if one[: count * 4] == other[: count * 4])


@given(short_tokens, short_tokens)
def test_shared_tokens_are_whole_tokens(one: bytes, other: bytes) -> None:
    assert shared_nbytes(one, other) == 4 * shared_count(one, other)


@given(families, short_tokens)
def test_the_closest_come_first(family: list[bytes], tokens: bytes) -> None:
    siblings, chunks = siblings_of(family)
    found = list(siblings.by_closeness(tokens))
    counts = [count for _, count in found]
    assert {chunk.key: count for chunk, count in found} == {
        chunk.key: shared_count(chunk.tokens, tokens) for chunk in chunks if shared_count(chunk.tokens, tokens)
    }
    assert counts == sorted(counts, reverse=True)


@given(families, short_tokens)
def test_prefixes_come_longest_first(family: list[bytes], tokens: bytes) -> None:
    siblings, _ = siblings_of(family)
    expected = sorted((each for each in family if tokens.startswith(each)), key=len, reverse=True)
    assert [chunk.tokens for chunk in siblings.prefixes_of(tokens)] == expected


@given(families, st.data())
def test_what_was_removed_is_gone_and_the_rest_stays_in_order(family: list[bytes], data: st.DataObject) -> None:
    siblings, chunks = siblings_of(family)
    gone = data.draw(st.lists(st.sampled_from(chunks), unique=True)) if chunks else []
    for chunk in gone:
        siblings.remove(chunk)
    rest = sorted(chunk.tokens for chunk in chunks if chunk not in gone)
    assert [chunk.tokens for chunk in siblings] == rest
    assert len(siblings) == len(rest)
