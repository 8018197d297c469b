"""What a benchmark has measured: rows with the median and the spread, as a table or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from rich.console import Console
from rich.table import Table

from p2pkv.commands.bench_report import number_text


@dataclass(frozen=True, slots=True)
class Row:
    """One thing measured several times.

    Attributes:
        name: What it is.
        unit: Of the values.
        values: One a round.
        target: The largest (or, for ratios and rates, the smallest) median wanted; None where there is none.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    target: str = ""

    @property
    def median(self) -> float:
        """Half of the values are below."""
        return median(self.values)


def print_rows(title: str, rows: Sequence[Row], *, as_json: bool) -> None:
    """Print a benchmark's rows."""
    if as_json:
        print(json.dumps({"bench": title, "rows": [{**asdict(row), "median": row.median} for row in rows]}))
        return
    table = Table(title=title, title_justify="left")
    for column in ("what", "median", "least", "most", "rounds", "unit", "target"):
        table.add_column(column, justify="left" if column in ("what", "unit", "target") else "right")
    for row in rows:
        numbers = map(number_text, (row.median, min(row.values), max(row.values)))
        table.add_row(row.name, *numbers, str(len(row.values)), row.unit, row.target)
    Console().print(table)
