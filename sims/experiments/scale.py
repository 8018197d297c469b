"""Clusters of up to tens of thousands, as `docs/scale.md` would have them: models, none of which is built in p2pkv.

    Relayed logs: members tell each other what others have changed, three others each round (`sims/scale/epidemic`).
    Sparse view: one member's rows of its own zone, and a filter of each other zone (`sims/scale/filters`).
    Directory: a few members for each chunk keep the list of its holders (`sims/scale/rendezvous`).

A change's payload is its 12 bytes in the log. Bytes for changes are those beyond what is sent when nothing changes.
"""

from collections.abc import Sequence

import numpy as np

from p2pkv.core.messages import CHANGE_NBYTES
from p2pkv.core.rows import FINGERPRINT_MAX, ROW_NBYTES, Fingerprints, Rows
from sims.experiments.convergence import ALL_KNOW_S, OVERHEAD, ROUNDS
from sims.experiments.figures import Figure, Findings, percentile, spread
from sims.scale.epidemic import FANOUT, ROUND_S, Epidemic, Spread
from sims.scale.filters import Bloom
from sims.scale.relayed import Counts, answers_nbytes, changes_nbytes, digests_nbytes
from sims.scale.rendezvous import KEEPERS, keepers

SIZES = (10, 100, 1000, 10_000)
LOSSES = (0.0, 0.1)
NEARLY_ALL = 0.9999
CHUNKS = (1, 30, 64)
"""Changed at a time. A request of a real trace changes 15 to 45: stored, and evicted for them (`replay`)."""
ABOUT = "a model of what isn't built"
ZONE = 100
HELD = 1000
"""Chunks that each member of a sparse view's cluster holds, no two the same."""
ABSENT = 20_000
"""Chunks that nobody holds, looked for in each filter; also as prefixes of two."""
NEW_SHARE = 0.1
"""So many more are added to a filter before the next one is built."""
LISTED = 40_000
"""Chunks in the directory."""
DEAD_SHARE = 0.01


def scale(seed: int, nodes: int, _seconds: float) -> Findings:
    """Spread changes in clusters up to that size, then look at one member's sparse view, and at the directory."""
    found = Findings("scale", nodes, seed, about=ABOUT)
    for size in sorted({*(each for each in SIZES if each < nodes), nodes}):
        for loss in LOSSES:
            _relay(found, size, loss)
    _sparse_view(found, np.random.default_rng([seed, nodes, 1]))
    _directory(found, np.random.default_rng([seed, nodes, 2]))
    return found


def relayed_convergence(seed: int, nodes: int, _seconds: float) -> Findings:
    """What `convergence` measures with real machines, from the model: for more members than can all have links to all."""
    found = Findings("convergence", nodes, seed, about=f"relayed logs: {ABOUT}")
    for loss in LOSSES:
        _relay(found, nodes, loss)
    return found


# --- relayed logs ---------------------------------------------------------------------------------------------------------


def _relay(found: Findings, size: int, loss: float) -> None:
    """Figures and the curve of one run."""
    name = f"{size:,} members" + (f", {loss:.0%} lost" if loss else "")
    ran = Epidemic(size, np.random.default_rng([found.seed, size, round(100 * loss)]), loss=loss).run()
    found.curves[f"{name}: share that knows after each round"] = ran.mean_shares()
    found.figures += _spread_figures(name, ran, bars=not loss)
    found.figures += _nbytes_figures(name, ran, bars=not loss)


def _spread_figures(name: str, ran: Spread, *, bars: bool) -> list[Figure]:
    nearly_all, all_of_them = ran.rounds_until(NEARLY_ALL), ran.rounds_until(1.0)
    nearly_s = percentile(nearly_all, 0.99)
    return [
        Figure(f"{name}: share that learnt", ran.share_that_learnt, at_least=1.0),
        *spread(f"{name}: rounds until 99.99 % know", nearly_all, ""),
        Figure(
            f"{name}: seconds until 99.99 % know, p99",
            None if nearly_s is None else nearly_s * ROUND_S,
            "s",
            at_most=ALL_KNOW_S if bars and ran.nodes == 100 else None,
        ),
        Figure(f"{name}: rounds until all know, p50", percentile(all_of_them, 0.5)),
        Figure(
            f"{name}: rounds until all know, p99",
            percentile(all_of_them, 0.99),
            at_most=ROUNDS.get(ran.nodes) if bars else None,
        ),
        Figure(f"{name}: rounds until all know, max", max(all_of_them, default=None)),
    ]


def _nbytes_figures(name: str, ran: Spread, *, bars: bool) -> list[Figure]:
    over_s = ran.nodes * ran.round_count * ROUND_S
    idle_nbytes = digests_nbytes(np.zeros(FANOUT * ran.nodes * ran.round_count, np.int64))
    sent_nbytes = {chunks: _sent_nbytes(ran, chunks) for chunks in CHUNKS}
    named_count = sum(int(each.sum()) for each in (*ran.said.digest_heads, *ran.said.answer_heads))
    given_count = sum(int(each.sum()) for each in (*ran.said.back_parts, *ran.said.last_parts))
    return [
        Figure(f"{name}: bytes a second and node, nothing changes", idle_nbytes / over_s, "B"),
        Figure(f"{name}: times that a change is named to a member", named_count / ran.learnt_count),
        Figure(f"{name}: times that a change is sent to a member", given_count / ran.learnt_count),
        *(
            Figure(
                f"{name}: {chunks} chunk{'s' if chunks > 1 else ''}: times the payload",
                (nbytes - idle_nbytes) / (ran.learnt_count * chunks * CHANGE_NBYTES),
                at_most=OVERHEAD if bars else None,
            )
            for chunks, nbytes in sent_nbytes.items()
        ),
    ]


def _sent_nbytes(ran: Spread, chunks: int) -> int:
    """What all have sent, if each change was of so many chunks."""
    said = ran.said
    nothing: list[Counts] = [np.zeros_like(each) for each in said.last_parts]
    return (
        digests_nbytes(_all(said.digest_heads))
        + answers_nbytes(_all(said.answer_wants), _all(said.answer_heads))
        + changes_nbytes(_all(said.back_wants), _all(said.back_parts), changes_a_part=chunks)
        + changes_nbytes(_all(nothing), _all(said.last_parts), changes_a_part=chunks)
    )


def _all(counts: Sequence[Counts]) -> Counts:
    return np.concatenate(counts)


# --- a sparse view --------------------------------------------------------------------------------------------------------


def _drawn(rng: np.random.Generator, count: int) -> Fingerprints:
    return rng.integers(0, FINGERPRINT_MAX, count, np.uint64, endpoint=True)


def _sparse_view(found: Findings, rng: np.random.Generator) -> None:
    """One member's: rows of its zone, filters of all others; looked through for what is there, and for what isn't."""
    zones = max(2, found.nodes // ZONE)
    zone_chunks = ZONE * HELD
    rows = Rows()
    for holder in range(ZONE):
        rows.apply(holder, _drawn(rng, HELD), np.zeros(HELD, np.uint32))
    absent, second = _drawn(rng, ABSENT), _drawn(rng, ABSENT)
    filters_nbytes = missed = hits = pairs = hits_later = 0
    for _ in range(zones - 1):
        held, new = _drawn(rng, zone_chunks), _drawn(rng, round(NEW_SHARE * zone_chunks))
        bloom = Bloom(zone_chunks)
        bloom.add(held)
        is_hit = bloom.has(absent)
        hits += int(is_hit.sum())
        pairs += int(bloom.has(second[is_hit]).sum())
        bloom.add(new)
        missed += int((~bloom.has(held)).sum() + (~bloom.has(new)).sum())
        hits_later += int(bloom.has(absent).sum())
        filters_nbytes += bloom.nbytes
    looked = ABSENT * (zones - 1)
    rate, rate_later = bloom.false_hit_rate(zone_chunks), bloom.false_hit_rate(zone_chunks + len(new))
    what = f"sparse view, {zones:,} zones of {ZONE:,} members, {HELD:,} chunks each"
    full_nbytes = zones * zone_chunks * ROW_NBYTES
    found.figures += [
        Figure(f"{what}: bytes", len(rows) * ROW_NBYTES + filters_nbytes, "B"),
        Figure(f"{what}: bytes of a full view", full_nbytes, "B"),
        Figure(f"{what}: bits a chunk in a filter", 8 * filters_nbytes / (zone_chunks * (zones - 1))),
        Figure(f"{what}: false misses", missed, at_most=0.0),
        Figure(f"{what}: false hits", 100 * hits / looked, "%"),
        Figure(f"{what}: false hits, by the formula", 100 * rate, "%"),
        Figure(f"{what}: false hits of prefixes of two chunks", 100 * pairs / looked, "%"),
        Figure(f"{what}: false hits of prefixes of two chunks, by the formula", 100 * rate**2, "%"),
        Figure(f"{what}: false hits when {NEW_SHARE:.0%} are new", 100 * hits_later / looked, "%"),
        Figure(f"{what}: false hits when {NEW_SHARE:.0%} are new, by the formula", 100 * rate_later, "%"),
    ]


# --- the directory --------------------------------------------------------------------------------------------------------


def _directory(found: Findings, rng: np.random.Generator) -> None:
    """Who keeps what, and what changes when some die."""
    nodes = found.nodes
    chunks, members = _drawn(rng, LISTED), _drawn(rng, nodes)
    before = keepers(chunks, members)
    loads = np.bincount(before.ravel(), minlength=nodes)
    living = np.sort(rng.permutation(nodes)[max(1, round(DEAD_SHARE * nodes)) :])
    after = living[keepers(chunks, members[living])]
    is_dead = ~np.isin(before, living)
    is_changed = ~(after[:, :, None] == before[:, None, :]).any(axis=2)
    dead_share = 1 - len(living) / nodes
    what = f"directory, {KEEPERS} of {nodes:,} members a chunk"
    found.figures += [
        Figure(f"{what}: chunks that a member keeps, in the mean", float(loads.mean())),
        Figure(f"{what}: most that one keeps, times the mean", float(loads.max() / loads.mean())),
        Figure(f"{what}: variance of that, times the mean (by chance: 1)", float(loads.var() / loads.mean())),
        Figure(f"{what}: {dead_share:.1%} die: places that they had", 100 * float(is_dead.mean()), "%"),
        Figure(f"{what}: {dead_share:.1%} die: places that change", 100 * float(is_changed.mean()), "%"),
        Figure(
            f"{what}: {dead_share:.1%} die: places that change without need", int(is_changed.sum() - is_dead.sum()), at_most=0.0
        ),
        Figure(f"{what}: {dead_share:.1%} die: chunks that lose all keepers", 100 * float(is_dead.all(axis=1).mean()), "%"),
        Figure(f"{what}: {dead_share:.1%} die: chunks that lose all keepers, by the formula", 100 * dead_share**KEEPERS, "%"),
    ]
