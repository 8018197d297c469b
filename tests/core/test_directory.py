"""The directory against a walk over every length of the prompt."""

from hypothesis import given
from hypothesis import strategies as st

from p2pkv.core.directory import Held, PromptFingerprints, longest_prefixes
from p2pkv.core.ids import Location
from p2pkv.core.inventory import EntrySet
from p2pkv.core.keys import fingerprint
from tests.core.builders import CPU, chunks_of, entry, keys_of, pack, prompt, sought

short_prompts = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=10).map(lambda ids: pack(*ids))


def entries_of(*prompts: bytes, location: Location = CPU) -> EntrySet:
    chunks = (chunk for tokens in prompts for chunk in chunks_of(tokens))
    return EntrySet(entry(chunk.fingerprint, chunk.token_count, location) for chunk in chunks)


@given(st.lists(short_prompts, max_size=5), st.sets(st.integers(0, 20)), short_prompts)
def test_the_longest_prefix_is_the_longest_whose_chunks_are_all_held(
    stored: list[bytes], lost: set[int], tokens: bytes
) -> None:
    entries = entries_of(*stored)
    for index, each in enumerate(list(entries)):
        if index in lost:
            entries.remove(each)
    held = entries.at[CPU]
    lengths = range(1, len(tokens) // 4 + 1)
    whole = [length for length in lengths if all(fingerprint(key) in held for key in keys_of(tokens[: length * 4]))]
    assert PromptFingerprints(sought(tokens)).longest_prefix(held) == max(whole, default=0)


def test_each_position_is_listed_with_its_longest_prefix_and_misses_are_left_out() -> None:
    tokens = prompt(10)
    both = entries_of(prompt(4))
    for each in entries_of(prompt(10), location=Location.LOCAL_DISK):
        both.add(each)
    inventories = [("b", both), ("a", entries_of(prompt(6))), ("c", EntrySet()), ("d", entries_of(prompt(8, first=50)))]
    assert longest_prefixes([PromptFingerprints(sought(tokens))], inventories) == (
        Held("a", CPU, 6),
        Held("b", CPU, 4),
        Held("b", Location.LOCAL_DISK, 10),
    )


def test_of_several_namespaces_the_longest_counts() -> None:
    other_root = b"r" * 16
    prompts = [PromptFingerprints(sought(prompt(10), root=other_root)), PromptFingerprints(sought(prompt(10)))]
    assert longest_prefixes(prompts, [("a", entries_of(prompt(7)))]) == (Held("a", CPU, 7),)
    assert longest_prefixes([], [("a", entries_of(prompt(7)))]) == ()
