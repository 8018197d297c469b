"""`vllm`: p2pkv in real vLLM on the CPU, with a tiny model: what it costs, and what it brings."""

from collections.abc import Callable, Sequence
from pathlib import Path

from sims.bench.report import Row
from sims.bench.vllm import first_token, overhead, replay
from sims.bench.vllm.engines import Fleet, open_fleet


def run(only: str | None = None, trace: Path | None = None) -> Sequence[Row]:
    """Measure the sections, in an order that starts the fewest engines.

    Args:
        only: `overhead`, `ttft` or `replay`; None for all.
        trace: What is replayed; None to leave the replay out.
    """
    steps: list[tuple[str, Callable[[Fleet], Sequence[Row]]]] = [
        ("overhead", overhead.measure),
        ("ttft", first_token.measure),
    ]
    if trace is not None:
        requests = replay.read_trace(trace)
        steps.insert(0, ("replay", lambda fleet: replay.measure_plain(fleet, requests)))
        steps.insert(2, ("replay", lambda fleet: replay.measure_connected(fleet, requests)))
    elif only == "replay":
        raise SystemExit("say --trace FILE: docs/performance.md tells where the trace comes from")
    with open_fleet() as fleet:
        return [row for section, measure in steps if only in (None, section) for row in measure(fleet)]
