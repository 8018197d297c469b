"""A node that watches its own event loop: `python -m sims.bench.ticking --config FILE`.

After its ready line it answers each line on stdin with the longest time, in milliseconds since the line before, by which a task
that is due every millisecond was late.
"""

import os
import sys
import time

import trio

from p2pkv.commands.node import ready_line
from p2pkv.config import NodeConfig
from p2pkv.node import open_node

TICK_S = 0.001


class _Ticker:
    def __init__(self) -> None:
        self._longest_s = 0.0

    async def run(self) -> None:
        while True:
            due_at = time.perf_counter() + TICK_S
            await trio.sleep(TICK_S)
            self._longest_s = max(self._longest_s, time.perf_counter() - due_at)

    def take(self) -> float:
        longest_s, self._longest_s = self._longest_s, 0.0
        return longest_s


async def _main(config: str) -> None:
    ticker = _Ticker()
    async with open_node(NodeConfig.from_yaml(config)) as node, trio.open_nursery() as nursery:
        nursery.start_soon(ticker.run)
        print(ready_line(node), flush=True)
        async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as questions:
            async for _ in questions:
                print(f"{ticker.take() * 1000:.3f}", flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_main, sys.argv[2])
