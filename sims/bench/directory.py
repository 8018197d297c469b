"""`directory`: what a view of a hundred members costs, in memory and in time, beside a plain dict of sets in the same run."""

import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import TypeVar

from p2pkv.core.directory import Directory, PromptFingerprints
from p2pkv.core.ids import Location
from p2pkv.core.inventory import InventoryView
from p2pkv.core.keys import Identity, Namespace, pack_tokens
from p2pkv.core.messages import INVENTORY_PAGE_ENTRIES, InventoryDelta
from p2pkv.core.prompt import prompt_of
from p2pkv.core.rows import InventoryEntry, pack
from p2pkv.wire.codec import peer_codec
from sims.bench.report import Row, print_rows

HOLDERS, CHUNKS, PROMPT_CHUNKS, CHUNK_SIZE = 100, 10_000, 512, 256
NAMESPACE = Namespace("bench", "0", "bfloat16", 32, 2, 8, 128, CHUNK_SIZE, 1)
LOOKUPS = 200
UPDATES, DELTA_CHANGES = 400_000, 2048
REQUEST_CHANGES = 30
"""Of a message that tells of one request's chunks, and of those evicted for them (`./dev sim replay`)."""
GENERATION = 1
T = TypeVar("T")


def run() -> Sequence[Row]:
    """Fill a directory and its naive twin with a million rows, look a prompt up that all hold, change one view."""
    rng = random.Random("directory")
    tokens = pack_tokens(rng.randrange(2**31) for _ in range(PROMPT_CHUNKS * CHUNK_SIZE))
    prompt = PromptFingerprints(prompt_of(NAMESPACE, Identity(), tokens))
    names = [f"i{index}" for index in range(HOLDERS)]
    held = {name: prompt.full + [rng.getrandbits(64) for _ in range(CHUNKS - PROMPT_CHUNKS)] for name in names}
    directory, views = Directory(), dict[str, InventoryView]()

    def fill() -> None:
        for name in names:
            views[name] = InventoryView(GENERATION, directory.rows, directory.holder(name))
            for delta in _deltas(held[name], first_sequence=1):
                assert views[name].apply_delta(delta)

    def fill_naive() -> dict[int, set[str]]:
        naive: dict[int, set[str]] = {}
        for name in names:
            for each in held[name]:
                naive.setdefault(each, set()).add(name)
        return naive

    ours_nbytes, _ = _kept_nbytes(fill)
    naive_nbytes, naive = _kept_nbytes(fill_naive)
    rows = HOLDERS * CHUNKS
    assert {each.num_tokens for each in directory.longest_prefixes([prompt], names)} == {PROMPT_CHUNKS * CHUNK_SIZE}
    what = f"{PROMPT_CHUNKS} chunks, {HOLDERS} holders of all of them, {rows:,} rows"
    ours_ms = [_ms(lambda: directory.longest_prefixes([prompt], names)) for _ in range(LOOKUPS)]
    naive_ms = [_ms(lambda: _naive_prefixes(naive, prompt)) for _ in range(LOOKUPS)]
    per_second, decoded = _updates(views["i0"], rng, DELTA_CHANGES)
    _, small = _updates(views["i1"], rng, REQUEST_CHANGES)
    return (
        Row("memory a chunk and holder", "B", (ours_nbytes / rows,), "<= 16"),
        Row("... dict of sets", "B", (naive_nbytes / rows,)),
        Row(f"longest prefix of {what}", "ms", tuple(ours_ms), "<= 2"),
        Row("... dict of sets", "ms", tuple(naive_ms)),
        Row("processor time of 200,000 updates of one view, of a second", "%", tuple(per_second), "<= 30"),
        Row("... from the bytes of their messages on", "%", tuple(decoded), "<= 30"),
        Row(f"... the same in messages of {REQUEST_CHANGES}", "%", tuple(small)),
    )


def _deltas(fingerprints: Sequence[int], *, first_sequence: int, count: int = DELTA_CHANGES) -> list[InventoryDelta]:
    """They come: so many a message, as of a busy owner."""
    assert count <= INVENTORY_PAGE_ENTRIES
    changes = [pack(InventoryEntry(each, Location.LOCAL_CPU, CHUNK_SIZE), present=True) for each in fingerprints]
    starts = range(0, len(changes), count)
    return [InventoryDelta(GENERATION, first_sequence + start, b"".join(changes[start : start + count])) for start in starts]


def _kept_nbytes(fill: Callable[[], T]) -> tuple[int, T]:
    """Memory that is still there afterwards."""
    tracemalloc.start()
    filled = fill()
    nbytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return nbytes, filled


def _ms(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def _naive_prefixes(naive: dict[int, set[str]], prompt: PromptFingerprints) -> dict[str, int]:
    lengths: dict[str, int] = {}
    going = set(naive.get(prompt.full[0], ()))
    for each in prompt.full:
        going &= naive.get(each, set())
        lengths |= dict.fromkeys(going, lengths.get(next(iter(going), ""), 0) + CHUNK_SIZE)
    return lengths


def _updates(view: InventoryView, rng: random.Random, count: int) -> tuple[list[float], list[float]]:
    """Of each 200,000: processor time of applying them, and of decoding them too, in percent of a second."""
    codec = peer_codec()
    applied, decoded = [], []
    for _ in range(UPDATES // 200_000):
        fingerprints = [rng.getrandbits(64) for _ in range(200_000)]
        messages = [codec.encode(delta) for delta in _deltas(fingerprints, first_sequence=view.sequence + 1, count=count)]
        began = time.process_time()
        deltas = [codec.decode(each) for each in messages]
        middle = time.process_time()
        for delta in deltas:
            assert isinstance(delta, InventoryDelta)
            assert view.apply_delta(delta)
        ended = time.process_time()
        applied.append((ended - middle) * 100)
        decoded.append((ended - began) * 100)
    return applied, decoded


if __name__ == "__main__":
    print_rows("directory", run(), as_json="--json" in sys.argv[1:])
