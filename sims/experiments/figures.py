"""What an experiment found: figures, each beside the target that it is to reach, as a table for people and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figure:
    """One number.

    Attributes:
        name: What it is.
        value: The number; None where there was nothing to measure.
        unit: Of what, for people; empty for a plain count.
        below: It is to be lower than that.
        at_most: It is to be that at the most.
        at_least: It is to be that at the least.
    """

    name: str
    value: float | None
    unit: str = ""
    below: float | None = None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def target(self) -> str | None:
        """What it is to reach, in words; None when there is no such bar."""
        bars = (("<", self.below), ("≤", self.at_most), ("≥", self.at_least))
        return " and ".join(f"{sign} {_number(bar)}" for sign, bar in bars if bar is not None) or None

    @property
    def is_met(self) -> bool | None:
        """Whether it reaches its target; None without one."""
        if self.target is None:
            return None
        if self.value is None:
            return False
        is_low = (self.below is None or self.value < self.below) and (self.at_most is None or self.value <= self.at_most)
        return is_low and (self.at_least is None or self.value >= self.at_least)


@dataclass(frozen=True, slots=True)
class Sample:
    """What figures were made of, for a picture: how long it took each that came to know of something.

    Attributes:
        name: Of what.
        values: Seconds.
        expected_count: How many were to come to know.
    """

    name: str
    values: tuple[float, ...]
    expected_count: int


@dataclass(slots=True)
class Findings:
    """All figures of one run of an experiment.

    Attributes:
        experiment: Its name.
        nodes: How many members it had.
        seed: Of the run.
        figures: In the order of the table.
        samples: For pictures: how long it took each.
        trace: Digest of all that happened, where one is taken; equal for equal runs.
        about: What has to be known about them all, for people; empty where the real machines ran.
        curves: For pictures: by name, a value for each round, from the beginning on.
    """

    experiment: str
    nodes: int
    seed: int
    figures: list[Figure] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    trace: str | None = None
    about: str = ""
    curves: dict[str, list[float]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float | None:
        """The value of the figure of that name."""
        return next(figure.value for figure in self.figures if figure.name == name)

    @property
    def missed(self) -> list[Figure]:
        """Figures that don't reach their targets."""
        return [figure for figure in self.figures if figure.is_met is False]


def as_json(findings: Findings) -> str:
    """One JSON object with everything."""
    figures = [
        {"name": each.name, "value": each.value, "unit": each.unit, "target": each.target, "met": each.is_met}
        for each in findings.figures
    ]
    return json.dumps(
        {
            "experiment": findings.experiment,
            "nodes": findings.nodes,
            "seed": findings.seed,
            "about": findings.about,
            "figures": figures,
            "curves": findings.curves,
        }
    )


def show(findings: Findings) -> None:
    """Print the table."""
    title = f"{findings.experiment}, {findings.nodes} members, seed {findings.seed}"
    title += f" ({findings.about})" if findings.about else ""
    table = Table("figure", "value", "target", "met", title=title, title_justify="left")
    for each in findings.figures:
        value = "-" if each.value is None else f"{_number(each.value)} {each.unit}".rstrip()
        met = {None: "", True: "yes", False: "NO"}[each.is_met]
        table.add_row(each.name, value, each.target or "", met)
    Console(highlight=False).print(table)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The least value that `share` of all don't exceed; None of none."""
    return sorted(values)[max(0, ceil(share * len(values)) - 1)] if values else None


def spread(name: str, values: Sequence[float], unit: str, *, p99_below: float | None = None) -> list[Figure]:
    """Median, 99th percentile and largest of `values`."""
    return [
        Figure(f"{name}, p50", percentile(values, 0.5), unit),
        Figure(f"{name}, p99", percentile(values, 0.99), unit, below=p99_below),
        Figure(f"{name}, max", max(values, default=None), unit),
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:,.3g}"
