"""What p2pkv costs where it finds nothing: prompts that never repeat, each looked up in vain and stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import quantiles

from sims.bench.report import Row
from sims.bench.vllm.asking import ask, ask_all, random_tokens
from sims.bench.vllm.engines import CONNECTED, PLAIN, Engine, Fleet, read_stat

SEATS = (PLAIN[0], CONNECTED[0])
"""On the same core: cores of a virtual machine aren't alike, and other work may be on one of them only."""
CONCURRENCY = 8
PROMPT_TOKENS = 300
ANSWER_TOKENS = (32, 96)
"""Evenly spread: with one length for all, eight prompts are computed together and then eight answers, or not, as it happens."""
REQUESTS = 32
ROUNDS = 10


def measure(fleet: Fleet) -> Sequence[Row]:
    """Each engine in turn, `ROUNDS` times; who is first changes from round to round."""
    without, connected = fleet.use(SEATS)
    node = Path(f"/proc/{fleet.node(str(SEATS[1].instance)).process.pid}/stat")
    for engine in (without, connected):
        _round(engine, "warm")
    before = connected.counts()
    rounds: list[tuple[_Round, _Round]] = []
    for index in range(ROUNDS):
        if index % 2:
            ours, theirs = _round(connected, f"with:{index}", node), _round(without, f"without:{index}")
        else:
            theirs, ours = _round(without, f"without:{index}"), _round(connected, f"with:{index}", node)
        rounds.append((theirs, ours))
    grown = {name: value - before[name] for name, value in connected.counts().items()}
    assert grown["lookups_total"] == ROUNDS * REQUESTS
    assert grown["hit_tokens_total"] == 0
    return (
        *_rows(
            f"{CONCURRENCY} at a time, prompts of {PROMPT_TOKENS} tokens, answers of {ANSWER_TOKENS[0]} to {ANSWER_TOKENS[1]}",
            "tokens/s",
            [(theirs.tokens_per_s, ours.tokens_per_s) for theirs, ours in rounds],
            ">= 0.97",
        ),
        *_rows(
            "time between two tokens, p99", "ms", [(theirs.gap_p99_ms, ours.gap_p99_ms) for theirs, ours in rounds], "<= 1.05"
        ),
        *_rows(
            "processor time, of the node too", "ms/token", [(theirs.processor_ms, ours.processor_ms) for theirs, ours in rounds]
        ),
        Row("stores given up, of two a request", "", (grown["dropped_stores_total"],)),
        Row(f"lookups that missed their deadline, of {ROUNDS * REQUESTS}", "", (grown["missed_deadlines_total"],)),
    )


@dataclass(frozen=True, slots=True)
class _Round:
    """What one engine did in one round.

    Attributes:
        tokens_per_s: Prompts' and answers' tokens.
        gap_p99_ms: Between two tokens of an answer.
        processor_ms: For each token, by all processes; unlike the others hardly changed by other work on the same cores.
    """

    tokens_per_s: float
    gap_p99_ms: float
    processor_ms: float


def _round(engine: Engine, seed: str, node: Path | None = None) -> _Round:
    least, most = ANSWER_TOKENS
    lengths = [least + (most - least) * index // (REQUESTS - 1) for index in range(REQUESTS)]
    Random("lengths").shuffle(lengths)
    requests = [
        partial(ask, engine, random_tokens(PROMPT_TOKENS, f"{seed}:{index}"), length) for index, length in enumerate(lengths)
    ]
    began_s = _processor_s(engine, node)
    answers, took_s = ask_all(requests, CONCURRENCY)
    processor_s = _processor_s(engine, node) - began_s
    tokens = REQUESTS * PROMPT_TOKENS + sum(lengths)
    gaps_s = [gap_s for answer in answers for gap_s in answer.gaps_s]
    return _Round(tokens / took_s, quantiles(gaps_s, n=100)[-1] * 1000, processor_s / tokens * 1000)


def _processor_s(engine: Engine, node: Path | None) -> float:
    stat = None if node is None else read_stat(node)
    return engine.processor_s() + (0 if stat is None else stat.processor_s)


def _rows(what: str, unit: str, pairs: Sequence[tuple[float, float]], target: str = "") -> Sequence[Row]:
    without, connected = zip(*pairs, strict=True)
    ratios = tuple(ours / theirs for theirs, ours in pairs)
    return (
        Row(f"without p2pkv: {what}", unit, without),
        Row(f"with p2pkv: {what}", unit, connected),
        Row(f"with / without: {what}", "", ratios, target),
    )
