"""Pictures of experiments: each that has one draws a PNG, and leaves no global state behind."""

import sys
from pathlib import Path

import pytest
from matplotlib import rcParams
from typer.testing import CliRunner, Result

from sims.__main__ import app
from sims.errors import ExperimentError
from sims.experiments.catalogue import EXPERIMENTS
from sims.experiments.convergence import convergence
from sims.experiments.figures import Figure, Findings, Sample
from sims.plots import PICTURES, plot
from tests.sims.test_tool import sims

SHARES = [Sample("killed", (0.1, 0.02, 3.0), 4), Sample("silent", (), 4)]
COUNTS = [Figure("1 slow: well ones declared dead", 0), Figure("16 slow: the same, plain SWIM", 11), Figure("other", 5)]


def invoke(*arguments: str) -> Result:
    """The tool in this process, which is quicker."""
    return CliRunner().invoke(app, arguments)


def check_is_picture(path: Path) -> None:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert (width, height) == (960, 540)
    assert len(data) > 8_000, "an empty frame is smaller"


@pytest.mark.parametrize("name", PICTURES)
def test_each_picture_is_drawn_without_a_display(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    settings = rcParams.copy()
    plot(Findings(name, 6, 0, COUNTS, SHARES), tmp_path / "picture.png")
    check_is_picture(tmp_path / "picture.png")
    assert rcParams.copy() == settings
    assert "matplotlib.pyplot" not in sys.modules, "its figures are global"


def test_a_model_is_drawn_by_rounds(tmp_path: Path) -> None:
    found = Findings("scale", 300, 0, curves={"300 members: share that knows after each round": [0.01, 0.2, 0.9, 1.0]})
    plot(found, tmp_path / "picture.png")
    check_is_picture(tmp_path / "picture.png")


def test_a_picture_is_the_same_for_the_same_findings(tmp_path: Path) -> None:
    found = Findings("membership", 6, 0, [], SHARES)
    for name in ("one", "other"):
        plot(found, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_an_experiment_brings_what_its_picture_shows() -> None:
    found = convergence(0, 6, 0)
    assert [(sample.name, len(sample.values), sample.expected_count) for sample in found.samples] == [
        ("1 chunk", 30, 30),
        ("64 chunks", 30, 30),
    ]
    assert max(found.samples[0].values) == found["1 chunk: known by all, max"]


def test_an_experiment_without_a_picture_is_refused_before_it_runs(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"no picture of 'churn'.*membership"):
        plot(Findings("churn", 6, 0), tmp_path / "none.png")
    refused = invoke("churn", "--plot", str(tmp_path / "none.png"))
    assert refused.exit_code == 2
    assert "no picture of 'churn'" in refused.stderr
    assert not list(tmp_path.iterdir())
    assert set(PICTURES) < set(EXPERIMENTS)


def test_a_scenario_has_no_picture() -> None:
    refused = invoke("calm", "--plot", "calm.png")
    assert refused.exit_code == 2
    assert "experiments have" in refused.stderr


def test_the_tool_draws_beside_the_table(tmp_path: Path) -> None:
    drawn = sims("convergence", "--nodes", "6", "--plot", str(tmp_path / "c.png"))
    assert drawn.returncode == 1, "the payload's bar isn't reached today"
    assert "rounds until all know" in drawn.stdout
    check_is_picture(tmp_path / "c.png")


def test_a_file_that_cant_be_written_is_told(tmp_path: Path) -> None:
    refused = invoke("convergence", "--nodes", "6", "--plot", str(tmp_path / "nowhere" / "c.png"))
    assert refused.exit_code == 2
    assert "nowhere" in refused.stderr
