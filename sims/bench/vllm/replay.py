"""A replay of conversations of a real service, scaled to the tiny model, over two engines in turn.

The trace is `conversation_trace.jsonl` of the FAST'25 release of kvcache-ai/Mooncake. A line is a request: `input_length` and
`output_length` in tokens, and `hash_ids`, an id for each 512 tokens of the prompt; equal ids mean equal prefixes.

Of all conversations one in `ONE_IN` is taken, whole, so that as many tokens repeat as in the trace; of each block of 512 tokens
`BLOCK_TOKENS` are made, from its id alone. Requests come in the trace's order, `CONCURRENCY` at a time, not at its times.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sims.bench.report import Row
from sims.bench.vllm.asking import ask, ask_all, random_tokens
from sims.bench.vllm.engines import CONNECTED, FETCHING, MAX_TOKENS, PLAIN, SHARING, Engine, Fleet, Seat

TRACE_BLOCK_TOKENS = 512
BLOCK_TOKENS = 16
ONE_IN = 50
CONCURRENCY = 8
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the trace, scaled.

    Attributes:
        prompt: Its tokens.
        answer_tokens: How many are to be answered.
        block_ids: Of the prompt's blocks; the last may be partly filled.
    """

    prompt: list[int]
    answer_tokens: int
    block_ids: tuple[int, ...]


def read_trace(path: Path) -> list[Request]:
    """The requests that are replayed."""
    with path.open() as lines:
        return [_scaled(line) for line in map(json.loads, lines) if _is_taken(line["hash_ids"])]


def measure_plain(fleet: Fleet, requests: Sequence[Request]) -> Sequence[Row]:
    """Without p2pkv, and what a cache that never forgets and is everywhere would have held."""
    total = sum(len(request.prompt) for request in requests)
    share = _infinite_hit_tokens(requests) / total
    what = f"{len(requests)} requests, {total:,} prompt tokens"
    return (
        Row(f"replay, {what}: hits of an infinite cache", "of prompt tokens", (share,)),
        *_replay(fleet, PLAIN, requests, "without p2pkv"),
    )


def measure_connected(fleet: Fleet, requests: Sequence[Request]) -> Sequence[Row]:
    """With p2pkv: an instance for each engine, one for both, and an instance for each that fetches from the other."""
    return (
        *_replay(fleet, CONNECTED, requests, "with p2pkv"),
        *_replay(fleet, SHARING, requests, "with p2pkv, both engines on one instance"),
        *_replay(fleet, FETCHING, requests, "with p2pkv and peer_fetch"),
    )


def _is_taken(block_ids: Sequence[int]) -> bool:
    """Whether this conversation is one of those replayed; the first block is the same in all, the second tells them apart."""
    digest = hashlib.sha256(str(block_ids[:2][-1]).encode()).digest()
    return int.from_bytes(digest[:8], "big") % ONE_IN == 0


def _scaled(line: dict[str, object]) -> Request:
    lengths = [line["input_length"], line["output_length"]]
    prompt_tokens, answer_tokens = (max(1, round(int(str(length)) * BLOCK_TOKENS / TRACE_BLOCK_TOKENS)) for length in lengths)
    prompt_tokens = min(prompt_tokens, MAX_TOKENS - answer_tokens)
    hash_ids = line["hash_ids"]
    assert isinstance(hash_ids, list)
    block_ids = tuple(hash_ids[: -(-prompt_tokens // BLOCK_TOKENS)])
    tokens = [token for block_id in block_ids for token in random_tokens(BLOCK_TOKENS, f"block:{block_id}")]
    return Request(tokens[:prompt_tokens], answer_tokens, block_ids)


def _infinite_hit_tokens(requests: Sequence[Request]) -> int:
    seen: set[int] = set()
    hit_tokens = 0
    for request in requests:
        known = next(
            (index for index, block_id in enumerate(request.block_ids) if block_id not in seen), len(request.block_ids)
        )
        hit_tokens += min(known * BLOCK_TOKENS, len(request.prompt))
        seen.update(request.block_ids)
    return hit_tokens


def _replay(fleet: Fleet, seats: Sequence[Seat], requests: Sequence[Request], how: str) -> Sequence[Row]:
    engines = fleet.use(seats)
    for index, engine in enumerate(engines):
        ask(engine, random_tokens(MAX_TOKENS // 4, f"warm:{how}:{index}"), 16)
    before, late_before = _prompt_tokens(engines), _late_count(engines)
    asked = [
        partial(ask, engines[index % len(engines)], request.prompt, request.answer_tokens)
        for index, request in enumerate(requests)
    ]
    answers, took_s = ask_all(asked, CONCURRENCY)
    after = _prompt_tokens(engines)
    total = sum(len(request.prompt) for request in requests)
    return (
        Row(f"{how}: two engines in turn, {CONCURRENCY} at a time", "requests/s", (len(requests) / took_s,)),
        Row(f"{how}: time to first token", "ms", tuple(answer.first_token_s * 1000 for answer in answers)),
        *(Row(f"{how}: {name}", "of prompt tokens", ((after[name] - before[name]) / total,)) for name in SOURCES),
        Row(f"{how}: lookups that missed their deadline, of {len(requests)}", "", (_late_count(engines) - late_before,)),
    )


def _prompt_tokens(engines: Sequence[Engine]) -> dict[str, float]:
    seen = [engine.prompt_tokens() for engine in engines]
    return {name: sum(tokens[name] for tokens in seen) for name in SOURCES}


def _late_count(engines: Sequence[Engine]) -> float:
    return sum(engine.counts().get("missed_deadlines_total", 0) for engine in engines)
