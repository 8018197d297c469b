"""What `p2pkv bench` is told and what it tells, without a node."""

import pytest
import typer

from p2pkv.commands.bench_report import Report, Row, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1", 1), ("512B", 512), ("32MiB", 32 * 2**20), ("1.5 GiB", 3 * 2**29), ("4KiB", 4096)]
)
def test_sizes_are_read_with_their_units(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "MiB", "32MB", "-1", "0", "1e3", "0.1B"])
def test_what_is_no_size_is_wrong_usage(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="32MiB"):
        parse_size(text)


def report(is_whole: bool = True) -> Report:
    moved, unreached = Row("4 chunks, a -> b", "ms"), Row("/lookup", "ms")
    for value, lane in ((30.0, "tcp"), (10.0, "handoff"), (1234.0, "tcp")):
        moved.add(value, lane)
    return Report("a", "b", 4, 2**20, (moved, unreached), is_whole)


def test_a_report_has_the_spread_of_what_was_measured() -> None:
    head, names, row = report().text().splitlines()
    assert head == "a <-> b: 4 chunks of 1.0 MiB, 4.0 MiB"
    assert names.split() == ["WHAT", "MEDIAN", "LEAST", "MOST", "UNIT", "TIMES", "LANE"]
    assert row.split("  ")[0] == "4 chunks, a -> b"
    assert row.split()[-7:] == ["30", "10", "1234", "ms", "3", "tcp,", "handoff"]


def test_a_report_as_json_has_the_same() -> None:
    row = {"what": "4 chunks, a -> b", "unit": "ms", "median": 30.0, "least": 10.0, "most": 1234.0, "count": 3}
    assert report().fields() == {
        "source": "a",
        "target": "b",
        "chunks": 4,
        "chunk_bytes": 2**20,
        "whole": True,
        "rows": [{**row, "lanes": ["tcp", "handoff"]}],
    }


def test_a_bench_that_was_cut_short_says_so() -> None:
    assert report(is_whole=False).text().endswith("\ncut short by a signal")
    nothing = Report("a", "b", 4, 2**20, (Row("x", "ms"),), is_whole=False)
    assert nothing.text().splitlines()[1:] == ["nothing was measured", "cut short by a signal"]
    assert nothing.fields()["rows"] == []
