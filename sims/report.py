"""What a batch added up to, as a table for people and as JSON for programs."""

import json
from collections import Counter
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from p2pkv.core.records import Operation
from sims.batch import Totals

SHOWN_FAILURES = 10


def as_json(totals: Totals) -> str:
    """One JSON object with everything."""
    return json.dumps(
        asdict(totals) | {name: dict(sorted(getattr(totals, name).items())) for name in ("states", "ends", "paths")}
    )


def show(totals: Totals, mutant: str | None) -> None:
    """Print the table, and for failures how to replay them."""
    console = Console(highlight=False)
    table = Table(title=f"{totals.scenario}, {totals.seed_count} seeds", title_justify="left", show_header=False)
    table.add_row("virtual time", f"{totals.virtual_s:,.0f} s")
    table.add_row("events handled", f"{totals.event_count:,}")
    table.add_row("messages lost / repeated", f"{totals.lost_count:,} / {totals.repeated_count:,}")
    asked = (totals.paths[f"{operation} asked for"] for operation in Operation)
    table.add_row("moves / copies asked for", " / ".join(f"{count:,}" for count in asked))
    table.add_row("those planned, by end", _counts(totals.states))
    ended = (totals.paths[f"instance {how}"] for how in ("crashed", "asked to leave"))
    table.add_row("instances crashed / asked to leave", " / ".join(f"{count:,}" for count in ended))
    table.add_row("ownerships ended", _counts(totals.ends))
    if totals.known_s:
        table.add_row("ends known, p50 / p99 / last", " / ".join(f"{each:.2f} s" for each in _spread(totals.known_s)))
    table.add_row("seeds failed", str(len(totals.failures)))
    if totals.took_s:
        table.add_row("took", f"{totals.took_s:,.0f} s")
    console.print(table)
    for seed, failure in list(totals.failures.items())[:SHOWN_FAILURES]:
        console.print(f"seed {seed}: {failure}", soft_wrap=True, markup=False)
        replay = f"./dev sim {totals.scenario} --seed {seed}" + (f" --mutant {mutant}" if mutant else "")
        console.print(f"  its story: {replay}", markup=False)
    if len(totals.failures) > SHOWN_FAILURES:
        console.print(f"... and {len(totals.failures) - SHOWN_FAILURES} more: {', '.join(totals.failures)}", soft_wrap=True)


def show_paths(totals: Totals) -> None:
    """Print which paths the seeds went down, and how often."""
    table = Table("path", "times", title="paths", title_justify="left")
    for name, count in sorted(totals.paths.items()):
        table.add_row(name, f"{count:,}")
    Console(highlight=False).print(table)


def _spread(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100], ordered[-1]


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common()) or "none"
