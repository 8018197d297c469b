"""The directory against a walk over every length of the prompt."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.core import directory as directories
from p2pkv.core.directory import Directory, Held, PromptFingerprints, prefixes_in
from p2pkv.core.ids import InstanceId, Location
from p2pkv.core.inventory import EntrySet
from p2pkv.core.keys import fingerprint
from p2pkv.core.rows import InventoryEntry, pack, unpack
from tests.core.builders import CPU, chunks_of, entry, keys_of, prompt, sought
from tests.core.builders import pack as pack_tokens

DISK = Location.LOCAL_DISK
short_prompts = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=10).map(lambda ids: pack_tokens(*ids))


def entries_of(*prompts: bytes, location: Location = CPU) -> list[InventoryEntry]:
    chunks = (chunk for tokens in prompts for chunk in chunks_of(tokens))
    return list(dict.fromkeys(entry(chunk.fingerprint, chunk.token_count, location) for chunk in chunks))


def directory_of(inventories: dict[InstanceId, Iterable[InventoryEntry]]) -> Directory:
    directory = Directory()
    for instance, entries in inventories.items():
        changes = b"".join(pack(each, present=True) for each in entries)
        directory.rows.apply(directory.holder(instance), *unpack(changes))
    return directory


@pytest.mark.parametrize("segment_chunks", [1, 512])
@given(st.lists(short_prompts, max_size=5), st.sets(st.integers(0, 20)), short_prompts)
def test_the_longest_prefix_is_the_longest_whose_chunks_are_all_held(
    segment_chunks: int, stored: list[bytes], lost: set[int], tokens: bytes
) -> None:
    entries = [each for index, each in enumerate(entries_of(*stored)) if index not in lost]
    held = {each.fingerprint for each in entries}
    lengths = range(1, len(tokens) // 4 + 1)
    whole = [length for length in lengths if all(fingerprint(key) in held for key in keys_of(tokens[: length * 4]))]
    expected = [Held("a", CPU, max(whole))] if whole else []
    prompts = [PromptFingerprints(sought(tokens))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directories, "SEGMENT_CHUNKS", segment_chunks)
        assert directory_of({"a": entries}).longest_prefixes(prompts, ["a"]) == expected
    assert prefixes_in(EntrySet(entries), "a", prompts) == expected


def test_each_position_is_listed_with_its_longest_prefix_and_misses_are_left_out() -> None:
    directory = directory_of(
        {
            "b": [*entries_of(prompt(4)), *entries_of(prompt(10), location=DISK)],
            "a": entries_of(prompt(6)),
            "c": [],
            "d": entries_of(prompt(8, first=50)),
        }
    )
    prompts = [PromptFingerprints(sought(prompt(10)))]
    assert directory.longest_prefixes(prompts, ["a", "b", "c", "d", "unknown"]) == [
        Held("a", CPU, 6),
        Held("b", CPU, 4),
        Held("b", DISK, 10),
    ]
    assert directory.longest_prefixes(prompts, ["b"]) == [Held("b", CPU, 4), Held("b", DISK, 10)]


def test_of_several_namespaces_the_longest_counts() -> None:
    other_root = b"r" * 16
    prompts = [PromptFingerprints(sought(prompt(10), root=other_root)), PromptFingerprints(sought(prompt(10)))]
    directory = directory_of({"a": entries_of(prompt(7))})
    assert directory.longest_prefixes(prompts, ["a"]) == [Held("a", CPU, 7)]
    assert directory.longest_prefixes([], ["a"]) == []
    assert directory.longest_prefixes(prompts, []) == []


def test_who_is_forgotten_leaves_nothing_to_who_gets_its_number() -> None:
    directory = directory_of({"a": entries_of(prompt(6)), "b": entries_of(prompt(4))})
    number = directory.holder("a")
    directory.forget("a")
    directory.forget("nobody")
    assert directory.holder("c") == number
    assert directory.longest_prefixes([PromptFingerprints(sought(prompt(10)))], ["a", "b", "c"]) == [Held("b", CPU, 4)]
