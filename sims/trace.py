"""A trace of a real service's requests, and instances with small stores that serve it.

The format is that of `conversation_trace.jsonl` of the FAST'25 release of kvcache-ai/Mooncake. A line is a request: `timestamp`
in ms, `input_length` in tokens, and `hash_ids`, an id for each 512 tokens of the prompt; equal ids mean equal prefixes.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from p2pkv.core.ids import Location
from p2pkv.core.inventory import InventoryLog
from p2pkv.core.rows import InventoryEntry
from sims.errors import ExperimentError

CHUNK_TOKENS = 512
GENERATION = 1_800_000_000_000
"""As large as real ones, milliseconds since 1970: it is in every message."""


@dataclass(frozen=True, slots=True)
class Request:
    """One line: when it came, its prompt's tokens, and its chunks; the last one may be partly filled."""

    at: float
    tokens: int
    chunk_ids: tuple[int, ...]

    def tokens_of(self, chunk_count: int) -> int:
        """Tokens in so many of its first chunks."""
        return min(chunk_count * CHUNK_TOKENS, self.tokens)


def read_trace(path: Path) -> list[Request]:
    """All requests, in order.

    Raises:
        ExperimentError: It is no such trace, or can't be read.
    """
    requests: list[Request] = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path} can't be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            said = json.loads(line)
            at, tokens, chunk_ids = said["timestamp"] / 1000, int(said["input_length"]), tuple(map(int, said["hash_ids"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ExperimentError(f"line {number} of {path} is no request: {error!r}") from error
        is_cut = tokens > 0 and len(chunk_ids) == -(-tokens // CHUNK_TOKENS)
        if not is_cut or (requests and at < requests[-1].at):
            raise ExperimentError(
                f"line {number} of {path} has chunks that aren't {CHUNK_TOKENS} tokens each, or is out of order"
            )
        requests.append(Request(at, tokens, chunk_ids))
    if not requests:
        raise ExperimentError(f"{path} is empty")
    return requests


def hashed(text: str) -> int:
    """A fingerprint of anything, the same in each run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Instance:
    """What one instance holds: the chunks of the prompts that it computed last, prefixes longer than suffixes.

    Attributes:
        inventory: What it tells the others.
    """

    def __init__(self, capacity: int) -> None:
        self.inventory = InventoryLog(GENERATION)
        self._capacity = capacity
        self._held: OrderedDict[int, InventoryEntry] = OrderedDict()
        """By chunk id, the coldest first."""

    def prefix_of(self, chunk_ids: Sequence[int]) -> int:
        """How many of a prompt's first chunks are held."""
        return sum(1 for _ in takewhile(self._held.__contains__, chunk_ids))

    def store(self, request: Request) -> tuple[list[int], list[int]]:
        """Hold all chunks of a prompt, or as many as there is room for; returns what came, and what went for it."""
        chunk_ids = request.chunk_ids[: self._capacity]
        came = [each for each in chunk_ids if each not in self._held]
        self._use([each for each in chunk_ids if each in self._held])
        went = [self._evict() for _ in range(len(self._held) + len(came) - self._capacity)]
        for index, chunk_id in enumerate(chunk_ids):
            if chunk_id not in self._held:
                tokens = request.tokens_of(index + 1) - index * CHUNK_TOKENS
                self._held[chunk_id] = InventoryEntry(hashed(f"chunk {chunk_id}"), Location.LOCAL_CPU, tokens)
                self.inventory.add(self._held[chunk_id])
        self._use(chunk_ids)
        return came, went

    def _use(self, chunk_ids: Sequence[int]) -> None:
        """They are the warmest now, the first of them most of all."""
        for each in reversed(chunk_ids):
            self._held.move_to_end(each)

    def _evict(self) -> int:
        chunk_id, entry = self._held.popitem(last=False)
        self.inventory.remove(entry)
        return chunk_id
