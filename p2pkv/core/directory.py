"""Who holds which prefix, as far as the views of inventories tell.

Answers "the longest contiguous prefix, for each holder" from fingerprints alone: full chunks along the key chain, then every
length that a partly filled chunk after them could have. Matches that diverge inside a chunk only their owner finds
(`residency`). A wrong answer costs a miss, never wrong bytes.
"""

from dataclasses import dataclass

from p2pkv.core.ids import InstanceId, Location
from p2pkv.core.inventory import EntrySet
from p2pkv.core.keys import TOKEN_NBYTES, Fingerprint, fingerprint, full_chunk_keys, tail_keys
from p2pkv.core.prompt import Prompt


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
        self._full = [fingerprint(key) for key in self._keys]
        self._tails: dict[int, list[tuple[int, Fingerprint]]] = {}

    def longest_prefix(self, held: dict[Fingerprint, int]) -> int:
        """Tokens of the longest contiguous prefix among `held`."""
        full_count = 0
        for each in self._full:
            if each not in held:
                break
            full_count += 1
        tail = next((count for count, each in reversed(self._tail_after(full_count)) if each in held), 0)
        return full_count * self._prompt.chunk_size + tail

    def _tail_after(self, full_count: int) -> list[tuple[int, Fingerprint]]:
        if full_count not in self._tails:
            parent = self._keys[full_count - 1] if full_count else self._prompt.root
            begin = full_count * self._prompt.chunk_size * TOKEN_NBYTES
            rest = self._prompt.tokens[begin : begin + (self._prompt.chunk_size - 1) * TOKEN_NBYTES]
            self._tails[full_count] = [(count, fingerprint(key)) for count, key in tail_keys(parent, rest)]
        return self._tails[full_count]


def longest_prefixes(prompts: list[PromptFingerprints], inventories: list[tuple[InstanceId, EntrySet]]) -> tuple[Held, ...]:
    """For each position that holds any of `prompts` (one prompt in several namespaces), the longest prefix there."""
    found = []
    for instance, entries in inventories:
        for location, held in entries.at.items():
            longest = max((prompt.longest_prefix(held) for prompt in prompts), default=0) if held else 0
            if longest:
                found.append(Held(instance=instance, location=location, num_tokens=longest))
    return tuple(sorted(found, key=lambda each: (each.instance, each.location)))
