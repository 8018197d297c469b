"""`node`: how quickly a node is ready, and how much memory it takes when nothing happens."""

import time
from collections.abc import Sequence
from pathlib import Path

from sims.bench.processes import open_bench, resident_nbytes
from sims.bench.report import Row

STARTS = 5
SETTLE_S = 3.0
HEAVY = ("torch", "transformers")


def run() -> Sequence[Row]:
    """Start a node `STARTS` times; measure the memory of each when it has settled."""
    ready, memory = [], []
    with open_bench() as bench:
        for _ in range(STARTS):
            node = bench.start("bench1")
            ready.append(node.ready_s)
            time.sleep(SETTLE_S)
            memory.append(resident_nbytes(node) / 1e6)
            mapped = [name for name in HEAVY if f"/{name}/" in Path(f"/proc/{node.process.pid}/maps").read_text()]
            assert not mapped, f"the node has loaded {mapped}"
            bench.stop(node)
    return (
        Row("process start to ready line", "s", tuple(ready), "<= 1.5"),
        Row("resident memory, idle (anonymous and file pages)", "MB", tuple(memory), "<= 80"),
    )
