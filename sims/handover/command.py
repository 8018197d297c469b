"""`./dev sim handover`: the exhaustive search of the hand-over, and the replay of what it found.

Exit codes: 0 every promise was kept, 1 one was broken, 2 wrong usage.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from os import cpu_count
from time import perf_counter
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from sims.handover.graph import Bounds
from sims.handover.kinds import KINDS
from sims.handover.schedule import Schedule, ScheduleError, replay
from sims.handover.search import Found, search
from sims.mutants import MUTANTS

DEFAULT_BOUNDS = (Bounds(losses=1, repeats=1, crashes=1, early=0), Bounds(losses=0, repeats=0, crashes=1, early=1))
"""All that may go wrong on the way together with a crash, and a time that is over too soon together with one. All four at once
have some fifty times as many states: half an hour."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(name="handover")
def main(
    *,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Search every kind of pair of moves.")] = False,
    kind: Annotated[list[str] | None, typer.Option(metavar="KIND", help="Only this one; may be said again.")] = None,
    losses: Annotated[int | None, typer.Option(min=0, max=9, help="Messages that get lost, at most.")] = None,
    repeats: Annotated[int | None, typer.Option(min=0, max=9, help="Messages that come twice, at most.")] = None,
    crashes: Annotated[int | None, typer.Option(min=0, max=2, help="Instances that end without a word, at most.")] = None,
    early: Annotated[int | None, typer.Option(min=0, max=9, help="Times that are over too soon, at most.")] = None,
    mutant: Annotated[str | None, typer.Option(metavar="MUTANT", help="With a core that breaks a rule.")] = None,
    schedule: Annotated[str | None, typer.Option("--replay", metavar="SCHEDULE", help="Tell what this one leads to.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="How many kinds at once.")] = cpu_count() or 1,
) -> None:
    """Let a few real machines come to every state that two moves can bring them to, and check every promise in each.

    Without bounds: one loss, one repeat and one crash, and then one crash and one time that is over too soon.
    """
    if mutant is not None and mutant not in MUTANTS:
        refuse(f"there is no mutant {mutant!r}; there are {', '.join(MUTANTS)}.")
    if schedule is not None:
        tell(schedule, mutant)
        return
    if not exhaustive:
        list_kinds()
        return
    if unknown := [each for each in kind or () if each not in KINDS]:
        refuse(f"there is no kind {unknown[0]!r}; there are {', '.join(KINDS)}.")
    asked = (losses, repeats, crashes, early)
    bounds = DEFAULT_BOUNDS if asked == (None,) * 4 else (Bounds(*(each or 0 for each in asked)),)
    show_all(kind or list(KINDS), bounds, mutant, processes)


def refuse(why: str) -> NoReturn:
    """Say what is wrong with the command line, and exit with 2."""
    typer.echo(f"Error: {why}", err=True)
    raise typer.Exit(2)


def list_kinds() -> None:
    """Print what can be searched."""
    table = Table("kind", "what is searched", title="./dev sim handover --exhaustive [--kind KIND]", title_justify="left")
    for name, kind in KINDS.items():
        table.add_row(name, kind.description)
    Console(highlight=False).print(table)


def tell(text: str, mutant: str | None) -> None:
    """Replay a schedule; exit with 1 if it breaks anything."""
    try:
        story = replay(Schedule.parse(text), mutant)
    except ScheduleError as error:
        refuse(str(error))
    for line in story:
        typer.echo(line)
    if story[-1].startswith("BROKEN"):
        raise typer.Exit(1)


def show_all(kinds: list[str], bounds: tuple[Bounds, ...], mutant: str | None, processes: int) -> None:
    """Search, a line for each kind and bounds; stop at what breaks a promise, tell how that came about, and exit with 1."""
    began_at = perf_counter()
    states = transitions = steps = 0
    for within, found in results(kinds, bounds, mutant, processes):
        typer.echo(line_of(within, found))
        if found.schedule is not None:
            for line in found.story:
                typer.echo(line)
            more = f" --mutant {mutant}" if mutant else ""
            typer.echo(f"again: ./dev sim handover --replay {found.schedule}{more}")
            raise typer.Exit(1)
        states += found.state_count
        transitions += found.transition_count
        steps += found.step_count
    typer.echo(
        f"{len(kinds)} kinds: {states:,} states, {transitions:,} transitions, {steps:,} steps of real machines, "
        f"every promise kept, {perf_counter() - began_at:.0f} s"
    )


def results(kinds: list[str], bounds: tuple[Bounds, ...], mutant: str | None, processes: int) -> Iterator[tuple[Bounds, Found]]:
    """What the searches come to, in their order."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        asked = [(within, pool.submit(search, kind, within, mutant)) for within, kind in product(bounds, kinds)]
        try:
            for within, future in asked:
                yield within, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def line_of(bounds: Bounds, found: Found) -> str:
    """One search in one line."""
    wrong = ", ".join(f"{count} {what}" for what, count in bounds._asdict().items() if count) or "nothing"
    counts = f"{found.state_count:>9,} states {found.transition_count:>10,} transitions, depth {found.depth:>2}"
    return f"{found.kind:<15} {counts}, {found.end_count:>5,} ends {found.seconds:>6.1f} s  ({wrong})"
