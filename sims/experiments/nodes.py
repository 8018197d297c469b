"""A minute in the life of real nodes: they join, store and move; one is killed and comes back, one link is cut and heals.

All of `sims/nodes` is at work. After every event each machine checks itself; whoever frees a chunk that nobody else holds, and
whoever admits wrong bytes, ends the run at once.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random

import trio
from trio.testing import MockClock

from p2pkv.core.events import MoveRequested
from p2pkv.core.ids import InstanceId, Location, Position
from p2pkv.core.keys import Identity, TokenBytes
from p2pkv.core.records import EventRecord, Operation, Selection
from p2pkv.errors import FailureError
from sims.experiments.figures import Figure, Findings
from sims.ledger import PromiseBrokenError
from sims.nodes import NodeCluster, in_order_of, passes
from sims.world import MOVE_DEADLINE_S

PROMPTS, TOKENS_MAX = 12, 30
MOVES, MOVES_AT_DEATH = 40, 12
AROUND_S = (-0.02, 0.005)
"""The latter are asked for so long before it, or after: a move takes some 10 ms."""
CALM_S = 2.0
KILLED_AT, BACK_AT, CUT_AT, CUT_SHARE = 0.2, 0.4, 0.55, 0.2
"""As shares of the time in which moves are asked for."""
KILLED_S, AGREE_S = 2.0, 10.0
"""Bars: all know by then."""


def nodes(seed: int, count: int, seconds: float) -> Findings:
    """Run it all, and give what was seen.

    Raises:
        PromiseBrokenError: A promise doesn't hold.
    """
    with in_order_of(str(seed)), tempfile.TemporaryDirectory(prefix="p2pkv-nodes-") as folder, first_of_many():
        clock = MockClock(autojump_threshold=0)
        return trio.run(partial(_Course(seed, count, seconds).run, Path(folder)), clock=clock)


@contextmanager
def first_of_many() -> Iterator[None]:
    """A broken promise that comes out of nurseries comes out alone."""
    broken: BaseException | None = None
    try:
        yield
    except* PromiseBrokenError as several:
        broken = several
    while isinstance(broken, BaseExceptionGroup):
        broken = broken.exceptions[0]
    if broken is not None:
        raise broken


class _Course:
    """One run."""

    def __init__(self, seed: int, count: int, seconds: float) -> None:
        self._seconds = seconds
        self._rng = Random(f"{seed}:course")
        self._found = Findings("nodes", count, seed)
        self._names = [f"n{index}" for index in range(count)]
        self._prompts = [self._prompt() for _ in range(PROMPTS)]
        self._ends: Counter[str] = Counter()
        self._event_ids: list[str] = []
        self._killed_s: float | None = None
        self._wrong_count = 0

    def _prompt(self) -> TokenBytes:
        family, own = self._rng.randrange(3), 1000 + self._rng.randrange(100)
        length = self._rng.randint(4, TOKENS_MAX)
        shared = self._rng.randint(0, length)
        return family.to_bytes(4, "little") * shared + own.to_bytes(4, "little") * (length - shared)

    async def run(self, folder: Path) -> Findings:
        """From the first boot until all have come to rest."""
        async with trio.open_nursery() as nursery:
            cluster = NodeCluster(str(self._found.seed), len(self._names), folder, nursery)
            for name in self._names:
                await cluster.start(name)
            joined_s = await passes(cluster.agrees_on_members, at_most_s=AGREE_S)
            for index, tokens in enumerate(self._prompts):
                await cluster.store(self._names[index % len(self._names)], tokens)
            await trio.sleep(CALM_S)
            async with trio.open_nursery() as course:
                for index in range(MOVES):
                    course.start_soon(self._move, cluster, self._drawn_time(index), *self._drawn_move())
                course.start_soon(self._kill, cluster)
                course.start_soon(self._cut, cluster)
            ended_s = await passes(lambda: not cluster.open_events(), at_most_s=MOVE_DEADLINE_S)
            members_s = await passes(cluster.agrees_on_members, at_most_s=AGREE_S)
            chunks_s = await passes(cluster.agrees_on_chunks, at_most_s=AGREE_S)
            self._add_figures(cluster, joined_s, ended_s, members_s, chunks_s)
            nursery.cancel_scope.cancel()
        return self._found

    def _drawn_time(self, index: int) -> float:
        """When a move is asked for; some fall together with the death."""
        if index >= MOVES_AT_DEATH:
            return self._rng.uniform(0, self._seconds)
        return KILLED_AT * self._seconds + self._rng.uniform(*AROUND_S)

    def _drawn_move(self) -> tuple[InstanceId, MoveRequested]:
        coordinator, old, new = (self._rng.choice(self._names) for _ in range(3))
        operation = self._rng.choice([Operation.MOVE, Operation.MOVE, Operation.MOVE, Operation.COPY])
        ends = Position(old, Location.LOCAL_CPU), Position(new, Location.LOCAL_CPU)
        tokens = self._rng.choice(self._prompts)
        return coordinator, MoveRequested(0, *ends, operation, Selection.TOKENS, tokens, Identity(), model=None)

    async def _move(self, cluster: NodeCluster, after_s: float, coordinator: InstanceId, asked: MoveRequested) -> None:
        await trio.sleep(after_s)
        if coordinator not in cluster.nodes:
            return
        driver = cluster.nodes[coordinator].driver
        fields = (asked.old_position, asked.new_position, asked.operation, asked.selection, asked.tokens, asked.identity)
        try:
            record = await driver.request(lambda request: MoveRequested(request, *fields, model=None))
        except FailureError as error:
            self._ends[f"refused: {error.failure.code.value}"] += 1
            return
        assert isinstance(record, EventRecord)
        self._event_ids.append(record.event_id)

    async def _kill(self, cluster: NodeCluster) -> None:
        await trio.sleep(KILLED_AT * self._seconds)
        victim = self._rng.choice(self._names)
        cluster.kill(victim)
        self._killed_s = await passes(
            lambda: not any(cluster.counts_on(name, victim) for name in cluster.nodes), at_most_s=MOVE_DEADLINE_S
        )
        await trio.sleep((BACK_AT - KILLED_AT) * self._seconds)
        await cluster.start(victim)

    async def _cut(self, cluster: NodeCluster) -> None:
        await trio.sleep(CUT_AT * self._seconds)
        one, other = self._rng.sample(self._names, 2)
        seconds = CUT_SHARE * self._seconds
        cluster.network.cut(one, other, seconds=seconds)
        ends_at = trio.current_time() + seconds
        while trio.current_time() < ends_at:
            living = list(cluster.nodes)
            self._wrong_count += sum(not cluster.counts_on(each, name) for each in living for name in living)
            await trio.sleep(0.5)

    def _add_figures(
        self,
        cluster: NodeCluster,
        joined_s: float | None,
        ended_s: float | None,
        members_s: float | None,
        chunks_s: float | None,
    ) -> None:
        for event_id in self._event_ids:
            known = [node.machine.event(event_id) for node in cluster.nodes.values()]
            states = sorted({record.state.value for record in known if record is not None})
            self._ends["/".join(states) or "forgotten with its parties"] += 1
        lost = sum(not holders for holders in cluster.holders.values()) - cluster.lost_with_holder
        self._found.figures += [
            Figure("all joined", joined_s, "s", at_most=AGREE_S),
            *(Figure(f"moves: {state}", number) for state, number in sorted(self._ends.items())),
            Figure("killed: known by all", self._killed_s, "s", below=KILLED_S),
            Figure("one link cut: living ones thought dead", self._wrong_count, at_most=0),
            Figure("afterwards: all events have ended", ended_s, "s", at_most=MOVE_DEADLINE_S),
            Figure("afterwards: all agree on members", members_s, "s", at_most=AGREE_S),
            Figure("afterwards: all agree on inventory too", chunks_s, "s", at_most=AGREE_S),
            Figure("chunks that ended with a killed node", cluster.lost_with_holder),
            Figure("chunks lost otherwise", lost, at_most=0),
            Figure("events handled", cluster.event_count),
            Figure("virtual time", trio.current_time(), "s"),
        ]
        self._found.trace = cluster.trace()
