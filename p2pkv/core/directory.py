"""Who holds which prefix, as far as the views of inventories tell.

Answers "the longest contiguous prefix, for each holder" from fingerprints alone: full chunks along the key chain, then every
length that a partly filled chunk after them could have. Matches that diverge inside a chunk only their owner finds
(`residency`). A wrong answer costs a miss, never wrong bytes.

All holders' rows lie in one table (`rows`), so a lookup costs much the same whether one holds the prompt or a hundred. Who is
dead isn't asked for: its rows stay, unseen, until its member is forgotten.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pkv.core.ids import InstanceId, Location
from p2pkv.core.inventory import EntrySet
from p2pkv.core.keys import TOKEN_NBYTES, Fingerprint, fingerprint, full_chunk_keys, tail_keys
from p2pkv.core.prompt import Prompt
from p2pkv.core.rows import HOLDERS_MAX, HolderId, Rows

SEGMENT_CHUNKS = 512
"""Chunks of a prompt that are looked for at a time: who misses one of them isn't asked about the next."""
_LOCATIONS = tuple(Location)


@dataclass(frozen=True, slots=True)
class Held:
    """A prefix of a prompt held at one position: `num_tokens` tokens."""

    instance: InstanceId
    location: Location
    num_tokens: int


class PromptFingerprints:
    """A prompt's fingerprints, worked out once for all holders."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._keys = full_chunk_keys(prompt.root, prompt.tokens, prompt.chunk_size)
        self.full: list[Fingerprint] = [fingerprint(key) for key in self._keys]
        self._tails: dict[int, list[tuple[int, Fingerprint]]] = {}

    @property
    def chunk_size(self) -> int:
        """Tokens of a full chunk."""
        return self._prompt.chunk_size

    def longest_prefix(self, held: Collection[Fingerprint]) -> int:
        """Tokens of the longest contiguous prefix among `held`."""
        full_count = 0
        for each in self.full:
            if each not in held:
                break
            full_count += 1
        tail = next((count for count, each in reversed(self.tail_after(full_count)) if each in held), 0)
        return full_count * self.chunk_size + tail

    def tail_after(self, full_count: int) -> list[tuple[int, Fingerprint]]:
        """Each partly filled chunk that may follow on so many full ones, shortest first: its tokens, its fingerprint."""
        if full_count not in self._tails:
            parent = self._keys[full_count - 1] if full_count else self._prompt.root
            begin = full_count * self.chunk_size * TOKEN_NBYTES
            rest = self._prompt.tokens[begin : begin + (self.chunk_size - 1) * TOKEN_NBYTES]
            self._tails[full_count] = [(count, fingerprint(key)) for count, key in tail_keys(parent, rest)]
        return self._tails[full_count]


class Directory:
    """What others hold: rows by fingerprint, and whose they are."""

    def __init__(self) -> None:
        self.rows = Rows()
        self._holders: dict[InstanceId, HolderId] = {}
        self._free: list[HolderId] = []

    def holder(self, instance: InstanceId) -> HolderId:
        """The number of an instance in `rows`, from now on until `forget`."""
        if instance not in self._holders:
            self._holders[instance] = self._free.pop() if self._free else len(self._holders)
            assert self._holders[instance] < HOLDERS_MAX, "members are fewer"
        return self._holders[instance]

    def clear(self, instance: InstanceId) -> None:
        """An instance holds nothing any more, or nobody knows what."""
        self.rows.drop(self.holder(instance))

    def forget(self, instance: InstanceId) -> None:
        """An instance is gone for good."""
        if instance in self._holders:
            self.clear(instance)
            self._free.append(self._holders.pop(instance))

    def longest_prefixes(self, prompts: Sequence[PromptFingerprints], instances: Collection[InstanceId]) -> list[Held]:
        """For each position of these instances that holds any of `prompts`, the longest prefix there."""
        holders = {self._holders[each]: each for each in instances if each in self._holders}
        positions = np.array([2 * holder + index for holder in holders for index in range(2)], np.intp)
        positions = positions[self.rows.may_hold(positions)]
        longest = np.zeros(len(positions), np.int64)
        for prompt in prompts if len(positions) else ():
            longest = np.maximum(longest, self._longest(prompt, positions))
        return [
            Held(holders[position // 2], _LOCATIONS[position % 2], num_tokens)
            for position, num_tokens in zip(positions.tolist(), longest.tolist(), strict=True)
            if num_tokens
        ]

    def _longest(self, prompt: PromptFingerprints, positions: NDArray[np.intp]) -> NDArray[np.int64]:
        """Tokens of the prefix at each position."""
        full_counts = np.zeros(len(positions), np.int64)
        going = np.arange(len(positions))
        for begin in range(0, len(prompt.full), SEGMENT_CHUNKS):
            held = self._held(prompt.full[begin : begin + SEGMENT_CHUNKS], positions[going])
            counts = np.where(held.all(axis=0), len(held), held.argmin(axis=0))
            full_counts[going] += counts
            going = going[counts == len(held)]
            if not len(going):
                break
        tokens = full_counts * prompt.chunk_size
        for full_count in np.unique(full_counts).tolist():
            if tail := prompt.tail_after(full_count):
                here = np.flatnonzero(full_counts == full_count)
                held = self._held([each for _, each in reversed(tail)], positions[here])
                lengths = np.array([count for count, _ in reversed(tail)], np.int64)
                tokens[here] += np.where(held.any(axis=0), lengths[held.argmax(axis=0)], 0)
        return tokens

    def _held(self, fingerprints: list[Fingerprint], positions: NDArray[np.intp]) -> NDArray[np.bool_]:
        holder_count = len(self._holders) + len(self._free)
        return self.rows.held(np.array(fingerprints, np.uint64), holder_count)[:, positions]


def prefixes_in(entries: EntrySet, instance: InstanceId, prompts: Sequence[PromptFingerprints]) -> list[Held]:
    """The same for one's own inventory."""
    found = []
    for location, held in entries.at.items():
        longest = max((prompt.longest_prefix(held) for prompt in prompts), default=0) if held else 0
        if longest:
            found.append(Held(instance, location, longest))
    return found
