"""`python -m sims.chaos`: five real nodes under random moves, copies, pins, evictions, kills and pauses.

Exit codes: 0 every promise was kept, 1 one was broken, 2 wrong usage.
"""

import json
import secrets
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sims.chaos.run import NODES, Report, run_chaos

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
JOURNAL_LINES = 200


@app.command()
def main(
    *,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long; a round that has begun is ended.")] = 3.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what is drawn; left out: a new one.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Have five real nodes of this host move, copy, evict and fail, and check that nothing is lost.

    A seed draws the same deeds, but processes and threads take turns as they like: it doesn't replay a run.
    """
    seed = secrets.randbelow(2**31) if seed is None else seed
    console = Console(highlight=False, stderr=as_json)
    console.print(f"seed {seed}: {NODES} nodes for {minutes:g} min")

    def tell(report: Report) -> None:
        console.print(
            f"round {report.rounds}, {report.seconds:.0f} s: {report.held:,} chunks held, {report.excused:,} excused, "
            f"{len(report.violations)} violations"
        )

    report = run_chaos(minutes * 60, seed, tell)
    if as_json:
        print(json.dumps(report.as_fields()))
    else:
        show(report, console)
    raise typer.Exit(1 if report.violations else 0)


def show(report: Report, console: Console) -> None:
    """Print what was done and found."""
    table = Table(title=f"seed {report.seed}, {report.rounds} rounds, {report.seconds:.0f} s", title_justify="left")
    table.add_column("what")
    table.add_column("times", justify="right")
    for name, times in sorted(report.counts.items()):
        table.add_row(name, f"{times:,}")
    for name, times in sorted(report.event_states.items()):
        table.add_row(f"events: {name}", f"{times:,}")
    table.add_row("guarded chunks: held", f"{report.held:,}")
    table.add_row("guarded chunks: ended with a killed node, maybe", f"{report.excused:,}")
    table.add_row("guarded chunks: lost, or another promise broken", f"{len(report.violations):,}")
    console.print(table)
    weights = Table("node", "MiB", "descriptors beyond chunks", "threads", title="after the first round / the last one")
    for name, last in report.last.items():
        first = report.first.get(name, last)
        memory = f"{first.memory_mib:.0f} / {last.memory_mib:.0f}"
        weights.add_row(name, memory, f"{first.descriptors} / {last.descriptors}", f"{first.threads} / {last.threads}")
    console.print(weights)
    if report.violations:
        console.print("\n".join(report.journal[-JOURNAL_LINES:]), soft_wrap=True, markup=False)
    for violation in report.violations:
        console.print(f"VIOLATION: {violation}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    app()
