"""`python -m sims`: run scenarios over many seeds, tell the story of one, or make an experiment's figures.

Exit codes: 0 every promise was kept and every target reached, 1 something broke or missed its target, 2 wrong usage.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from math import ceil
from os import cpu_count
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sims import plots, report
from sims.batch import Totals, run_batch
from sims.errors import ExperimentError
from sims.experiments import figures
from sims.experiments.catalogue import EXPERIMENTS, MODELLED_MAX, NODES_MIN, TRACE_EXPERIMENTS
from sims.handover import command as handover
from sims.ledger import PromiseBrokenError
from sims.mutants import MUTANTS
from sims.protocol_parts import all_parts
from sims.run import run_seed
from sims.scenario import Scenario, ScenarioError, load_scenario, scenario_names
from sims.story import Recorder

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A scenario or experiment; left out: list them.", show_default=False)
    ] = None,
    *,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 100,
    moves: Annotated[
        int | None,
        typer.Option(min=1, help="As many seeds as ask for so many moves and copies together.", show_default=False),
    ] = None,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Only this one: show all it led to, or the story of what broke. An experiment has one, 0."),
    ] = None,
    mutant: Annotated[
        str | None, typer.Option(metavar="MUTANT", help="Run with a core that breaks a rule; see the list.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="How many at once.")] = cpu_count() or 1,
    nodes: Annotated[
        int | None,
        typer.Option(min=NODES_MIN, max=MODELLED_MAX, help="How many members an experiment has.", show_default=False),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=5, help="How long an experiment lasts, in virtual time.", show_default=False)
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Requests that `replay` replays.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", dir_okay=False, help="Draw an experiment's picture too.", show_default=False),
    ] = None,
) -> None:
    """Run a scenario over many seeds, every promise checked after every event; or make an experiment's figures."""
    if name is None:
        list_all()
        return
    if name == "protocol":
        typer.echo(all_parts())
        return
    if name in EXPERIMENTS or name in TRACE_EXPERIMENTS:
        make_figures(name, experiment_of(name, seed or 0, nodes, seconds, trace), as_json=as_json, plot=plot)
        return
    if plot is not None:
        refuse("a scenario has no picture; experiments have.")
    try:
        scenario = load_scenario(name)
    except ScenarioError as error:
        refuse(str(error))
    if mutant is not None and mutant not in MUTANTS:
        refuse(f"there is no mutant {mutant!r}; there are {', '.join(MUTANTS)}.")
    if seed is not None:
        tell(name, scenario, seed, mutant)
        return
    count = seeds if moves is None else seeds_for(moves, scenario)
    run_all(name, range(first_seed, first_seed + count), mutant, processes, as_json=as_json)


def run_all(name: str, seeds: range, mutant: str | None, processes: int, *, as_json: bool) -> None:
    """Run seeds of a scenario and print what they add up to; exit with 1 if one breaks a promise."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=len(seeds))
        totals = run_batch(name, seeds, processes=processes, mutant=mutant, progress=lambda: progress.advance(task))
    if as_json:
        typer.echo(report.as_json(totals))
    else:
        report.show(totals, mutant)
    if totals.failures:
        raise typer.Exit(1)


def list_all() -> None:
    """Print the scenarios and the mutants, a line each."""
    console = Console(highlight=False)
    scenarios = Table("scenario", "what happens", title="./dev sim NAME", title_justify="left")
    for name in scenario_names():
        scenarios.add_row(name, load_scenario(name).description)
    mutants = Table("mutant", "rule", "what it does wrong", title="./dev sim NAME --mutant MUTANT", title_justify="left")
    for name, mutant in MUTANTS.items():
        mutants.add_row(name, mutant.rule, mutant.description)
    experiments = Table("experiment", "what is measured", title="./dev sim NAME", title_justify="left")
    for name, experiment in EXPERIMENTS.items():
        experiments.add_row(name, experiment.description)
    for name, of_trace in TRACE_EXPERIMENTS.items():
        experiments.add_row(f"{name} --trace FILE", of_trace.description)
    experiments.add_row("handover --exhaustive", "two moves at once: every order of what can happen, within bounds")
    experiments.add_row("protocol", "nothing: prints what docs/protocol.md has of states and mutants")
    console.print(scenarios, experiments, mutants)


def seeds_for(moves: int, scenario: Scenario) -> int:
    """How many seeds of a scenario ask for so many moves and copies together."""
    each = scenario.operations.moves + scenario.operations.copies
    if not each:
        refuse("this scenario asks for no moves.")
    return ceil(moves / each)


def refuse(why: str) -> NoReturn:
    """Say what is wrong with the command line, and exit with 2."""
    typer.echo(f"Error: {why}", err=True)
    raise typer.Exit(2)


def experiment_of(
    name: str, seed: int, nodes: int | None, seconds: float | None, trace: Path | None
) -> Callable[[], figures.Findings]:
    """What makes an experiment's findings."""
    if name in TRACE_EXPERIMENTS:
        return lambda: TRACE_EXPERIMENTS[name].run(trace, nodes)
    return lambda: EXPERIMENTS[name].run(seed, nodes, seconds)


def make_figures(name: str, run: Callable[[], figures.Findings], *, as_json: bool, plot: Path | None) -> None:
    """Run an experiment, print its figures, and draw them if asked to; exit with 1 if one misses its target."""
    try:
        if plot is not None:
            plots.check_can_plot(name)
        findings = run()
    except ExperimentError as error:
        refuse(str(error))
    except PromiseBrokenError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(figures.as_json(findings))
    else:
        figures.show(findings)
    if plot is not None:
        try:
            plots.plot(findings, plot)
        except OSError as error:
            refuse(str(error))
    if findings.missed:
        raise typer.Exit(1)


def tell(name: str, scenario: Scenario, seed: int, mutant: str | None) -> None:
    """Run one seed and show what it led to; if something breaks, tell what led to that."""
    recorder, totals = Recorder(), Totals(name, seed_count=1)
    with MUTANTS[mutant].applied() if mutant else nullcontext():
        try:
            totals.add(run_seed(str(seed), scenario, recorder))
        except Exception as failure:
            for line in recorder.story(failure):
                typer.echo(line)
            if not isinstance(failure, PromiseBrokenError):
                raise
            typer.echo(f"Error: {failure}", err=True)
            raise typer.Exit(1) from failure
    report.show(totals, mutant)
    report.show_paths(totals)


def run() -> None:
    """The one name that has options of its own is a command of its own."""
    if sys.argv[1:2] == ["handover"]:
        handover.app(sys.argv[2:], prog_name="sims handover")
    else:
        app()


if __name__ == "__main__":
    run()
