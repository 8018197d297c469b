"""Hostile input at every door of a real node, while others use it: nothing but its own connection notices.

A long run: `--hostile-frames 100000 -o faulthandler_timeout=0`; `docs/performance.md` has the figures of one.
"""

import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from p2pkv.core.keys import pack_tokens
from tests.live.command_line import PROMPT
from tests.live.hostile.attack import Strike, Tally, Target, attack
from tests.live.hostile.cluster import ATTACKED, BYSTANDER, Cluster, Readings, Watch, open_cluster, watched
from tests.live.hostile.control import strike_control
from tests.live.hostile.engine import strike_engine
from tests.live.hostile.http import strike_http
from tests.live.hostile.lanes import open_grant, strike_handoff, strike_tcp
from tests.live.hostile.peer import strike_proven, strike_unproven

pytestmark = pytest.mark.live

MIB = 2**20
GROWTH_NBYTES = 32 * MIB
"""Of memory, after the first fifth of the frames: two bodies of the longest request, which malloc may keep for the next."""
SPARE_THREADS = 40
"""trio has so many at most, and keeps each for 10 s after its work: names that liars tell are looked up in threads."""
SETTLE_S = 30.0
"""After the last frame all is given back by then; the slowest is a body that doesn't come, 30 s after its request."""
LONG_RUN_FRAMES = 10_000
"""From here on a run tells its figures."""
DOORS = (
    "/peer before the proof",
    "/control",
    "HTTP",
    "engine socket",
    "handoff lane",
    "transfer address",
    "/peer after the proof",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster() as cluster:
        yield cluster


@asynccontextmanager
async def strike_at(door: str, target: Target) -> AsyncIterator[Strike]:
    """How a door is struck at; for lanes, by one who has a ticket."""
    match door:
        case "/peer before the proof":
            yield strike_unproven
        case "/peer after the proof":
            yield strike_proven
        case "/control":
            yield strike_control
        case "HTTP":
            yield strike_http
        case "engine socket":
            yield strike_engine
        case _:
            async with open_grant(target, pack_tokens(PROMPT)) as grant:
                yield partial(strike_handoff if door == "handoff lane" else strike_tcp, grant=grant)


@pytest.mark.parametrize("door", DOORS)
async def test_hostile_frames_harm_nobody(
    cluster: Cluster, door: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    frames: int = request.config.getoption("--hostile-frames")
    seed = f"{request.config.getoption('--hostile-seed')}:{door}"
    await cluster.wait_linked(within_s=10)
    cluster.begin_logs()
    tally = Tally()
    try:
        async with watched(cluster) as watch, strike_at(door, cluster.target) as strike:
            quiet = await cluster.readings()
            began_at = time.monotonic()
            await attack(strike, cluster.target, tally, frames=frames // 5, seed=seed)
            warm = await settled(cluster, quiet)
            await attack(strike, cluster.target, tally, frames=frames, seed=seed)
            seconds = time.monotonic() - began_at
            after = await settled(cluster, quiet)
    finally:
        cluster.check_running()
    if frames >= LONG_RUN_FRAMES:
        with capsys.disabled():
            sys.stdout.write(figures(door, tally, seconds, warm, after, watch))
    assert tally.frames >= frames
    assert after.rss_anon_nbytes - warm.rss_anon_nbytes < GROWTH_NBYTES
    await check_use(cluster)


async def settled(cluster: Cluster, quiet: Readings) -> Readings:
    """Wait until the node has given back what the attack took of it."""
    with trio.fail_after(SETTLE_S):
        while True:
            now = await cluster.readings()
            if now.descriptors <= quiet.descriptors and now.threads <= quiet.threads + SPARE_THREADS:
                return now
            await trio.sleep(0.1)


async def check_use(cluster: Cluster) -> None:
    """Everything works for everybody: chunks are read as they were stored, and move there and back."""
    await cluster.wait_linked(within_s=1)
    cluster.check_held(ATTACKED)
    await cluster.move(ATTACKED, BYSTANDER)
    cluster.check_held(BYSTANDER)
    await cluster.move(BYSTANDER, ATTACKED)
    cluster.check_held(ATTACKED)


def figures(door: str, tally: Tally, seconds: float, warm: Readings, after: Readings, watch: Watch) -> str:
    """What a long run tells."""
    outcomes = ", ".join(f"{outcome} {count}" for outcome, count in tally.outcomes.most_common())
    return (
        f"\n{door}: {tally.frames} frames on {tally.strikes} connections in {seconds:.0f} s, watched {watch.looks} times, "
        f"/livez within {watch.longest_livez_s:.2f} s\n    {warm}\n    {after}\n    {outcomes}\n"
    )
