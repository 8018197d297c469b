"""What `p2pkv bench` has measured, for people and as JSON; and the sizes that it is told."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import typer

from p2pkv.commands.output import table
from p2pkv.commands.top_view import size_text

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(B|KiB|MiB|GiB)?")
_UNIT_NBYTES = {None: 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_size(text: str) -> int:
    """`32MiB` in bytes.

    Raises:
        typer.BadParameter: It isn't a size.
    """
    found = _SIZE.fullmatch(text)
    nbytes = int(float(found[1]) * _UNIT_NBYTES[found[2]]) if found else 0
    if nbytes < 1:
        raise typer.BadParameter(f"{text!r} is no size; write a number with B, KiB, MiB or GiB, as 32MiB")
    return nbytes


@dataclass(slots=True)
class Row:
    """One thing, measured several times.

    Attributes:
        name: What it is.
        unit: Of the values.
        values: In order.
        lanes: By which the bytes went, each lane once.
    """

    name: str
    unit: str
    values: list[float] = field(default_factory=list)
    lanes: list[str] = field(default_factory=list)

    def add(self, value: float, lane: str | None = None) -> None:
        """It was measured once more."""
        self.values.append(value)
        if lane is not None and lane not in self.lanes:
            self.lanes.append(lane)


@dataclass(frozen=True, slots=True)
class Report:
    """All that was measured between two instances.

    Attributes:
        source: Where the chunks were stored.
        target: Where they were moved, and back from.
        chunk_count: Chunks of a large move.
        chunk_nbytes: Bytes of each of them.
        rows: What was measured; those without values weren't reached.
        is_whole: False when Ctrl-C cut it short.
    """

    source: str
    target: str
    chunk_count: int
    chunk_nbytes: int
    rows: Sequence[Row]
    is_whole: bool

    def fields(self) -> dict[str, object]:
        """For `--json`."""
        rows = [
            {"what": row.name, "unit": row.unit, **_spread(row.values), "count": len(row.values), "lanes": row.lanes}
            for row in self.rows
            if row.values
        ]
        return {
            "source": self.source,
            "target": self.target,
            "chunks": self.chunk_count,
            "chunk_bytes": self.chunk_nbytes,
            "whole": self.is_whole,
            "rows": rows,
        }

    def text(self) -> str:
        """For people."""
        chunks, chunk = self.chunk_count, size_text(self.chunk_nbytes)
        head = f"{self.source} <-> {self.target}: {chunks} chunks of {chunk}, {size_text(chunks * self.chunk_nbytes)}"
        rows = [
            (row.name, *map(number_text, _spread(row.values).values()), row.unit, len(row.values), ", ".join(row.lanes))
            for row in self.rows
            if row.values
        ]
        cut_short = "" if self.is_whole else "\ncut short by a signal"
        if not rows:
            return f"{head}\nnothing was measured{cut_short}"
        return f"{head}\n{table(('WHAT', 'MEDIAN', 'LEAST', 'MOST', 'UNIT', 'TIMES', 'LANE'), rows)}{cut_short}"


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


def number_text(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
