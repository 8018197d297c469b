"""Rounds of chaos, and after each of them a look at everything."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from random import Random

from p2pkv.core.ids import InstanceId
from p2pkv.core.keys import Fingerprint
from sims.bench.processes import open_bench
from sims.chaos.ledger import Ledger
from sims.chaos.nodes import AT, STORE_GIB, Members, Weight
from sims.chaos.prompts import Prompt, filler, guarded_prompts, kv_of
from sims.chaos.workload import Round

NODES = 5
OVER_TCP = 1
"""So many of the nodes never pass descriptors."""
GUARDED = 40
ROUND_S = 20.0
KILLS, STOPS = (0, 2), (0, 2)
EVICT_ROUNDS = 2
"""At the end, so many times what a node can hold is stored there."""


@dataclass(slots=True)
class Report:
    """What was done and found.

    Attributes:
        counts: Of deeds, by their end.
        event_states: Of all moves and copies, after their round.
        held: Looks at a guarded chunk that found it.
        excused: Those that didn't, after a kill of an instance that may have had it.
        first: What each process took after the first round.
        last: The same after the last one.
        violations: What must not be. Empty: all promises were kept.
        journal: What was done in the last round to what was lost; all of it, if something else is wrong.
    """

    seed: int
    rounds: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    event_states: Counter[str] = field(default_factory=Counter)
    held: int = 0
    excused: int = 0
    first: dict[InstanceId, Weight] = field(default_factory=dict)
    last: dict[InstanceId, Weight] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    journal: list[str] = field(default_factory=list)

    def as_fields(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def run_chaos(seconds: float, seed: int, tell: Callable[[Report], None]) -> Report:
    """Rounds until `seconds` have passed, or a promise is broken; `tell` is told after each."""
    report = Report(seed)
    with _members() as members:
        began_at = time.monotonic()
        ledger, rng = Ledger(), Random(f"{seed}:guards")
        guarded = guarded_prompts(GUARDED, rng)
        while time.monotonic() - began_at < seconds and not report.violations:
            ledger.begin(_guard(members, guarded, rng))
            round_ = Round(members, ledger, guarded, f"{seed}:{report.rounds}")
            round_.run(ROUND_S, kills=rng.randint(*KILLS), stops=rng.randint(*STOPS))
            _look(members, ledger, round_, report)
            report.seconds = time.monotonic() - began_at
            tell(report)
        if not report.violations:
            _evict(members, guarded, rng, report)
    return report


@contextmanager
def _members() -> Iterator[Members]:
    names = [f"n{number + 1}" for number in range(NODES)]
    with open_bench() as bench:
        members = Members(bench, names, names[-OVER_TCP:])
        try:
            members.settle()
            yield members
        finally:
            members.close()


def _guard(members: Members, guarded: Sequence[Prompt], rng: Random) -> dict[Fingerprint, frozenset[InstanceId]]:
    """Have each guarded prompt held and pinned somewhere, and tell where its chunks are."""
    pinned: dict[Fingerprint, set[InstanceId]] = {}
    names = list(members.all)
    for prompt in guarded:
        holders = [
            name for name in rng.sample(names, len(names)) if _pinned_tokens(members, prompt, name) == len(prompt.tokens)
        ]
        if not holders:
            holders = [rng.choice(names)]
            with members.attach(holders[0]) as cache:
                cache.store(prompt.tokens, prompt.kv())
            if _pinned_tokens(members, prompt, holders[0]) < len(prompt.tokens):
                continue
        for fingerprint in prompt.fingerprints(members.namespace):
            pinned.setdefault(fingerprint, set()).update(holders)
    return {fingerprint: frozenset(instances) for fingerprint, instances in pinned.items()}


def _pinned_tokens(members: Members, prompt: Prompt, name: InstanceId) -> int:
    _, answer = members.call(name, "/pin", instance_id=name, location=AT, tokens=list(prompt.tokens))
    return int(answer.get("num_tokens", 0))


def _look(members: Members, ledger: Ledger, round_: Round, report: Report) -> None:
    """When all is quiet again: does everything that must be held exist, and has every event ended?"""
    report.rounds += 1
    report.counts += round_.counts
    report.violations += round_.violations
    try:
        members.settle()
    except TimeoutError as error:
        report.violations.append(str(error))
        return
    look = ledger.look({name: members.inventory(name) for name in members.all})
    report.held += look.held
    report.excused += look.excused
    lost = look.lost or None
    report.journal = [str(entry) for entry in round_.journal if lost is None or any(map(entry.concerns, lost))]
    report.violations += [f"chunk {each:016x} is lost, which {', '.join(at)} may have had" for each, at in look.lost.items()]
    for event_id in round_.events:
        event = members.event(event_id)
        report.event_states["forgotten with those who knew it" if event is None else event["state"]] += 1
        if event is None and not round_.counts["nodes killed"]:
            report.violations.append(f"event {event_id} is forgotten, and nobody was killed")
        if event is not None and event["finished_at"] is None:
            report.violations.append(f"event {event_id} hasn't ended: {event}")
    report.violations += [f"{name} has ended by itself" for name in members.ended()]
    report.violations += members.bugs()
    report.last = {name: members.weight(name) for name in members.all}
    report.first = report.first or report.last


def _evict(members: Members, guarded: Sequence[Prompt], rng: Random, report: Report) -> None:
    """Nothing is leased, pinned or half moved any more: each node takes in more than it can hold."""
    for name in members.all:
        for prompt in guarded:
            members.call(name, "/unpin", instance_id=name, location=AT, tokens=list(prompt.tokens))
        stored = 0
        with members.attach(name) as cache:
            while stored < EVICT_ROUNDS * STORE_GIB * 2**30:
                prompt = filler(rng)
                held = cache.store(prompt.tokens, prompt.kv())
                stored += kv_of(prompt.tokens).nbytes
                if held < len(prompt.tokens):
                    report.violations.append(f"{name} took only {held} of {len(prompt.tokens)} tokens at the end")
                    return
