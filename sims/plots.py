"""Pictures of experiments, where a picture says more than a table; `./dev sim NAME --plot FILE.png` draws them.

Only this module knows matplotlib, and imports it when a picture is asked for. It draws without a display, and leaves nothing
behind: no `pyplot`, whose figures are global.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sims.errors import ExperimentError
from sims.experiments.figures import Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES, DOTS_AN_INCH = (8.0, 4.5), 120


def check_can_plot(experiment: str) -> None:
    """Whether an experiment has a picture, before it runs for minutes.

    Raises:
        ExperimentError: It has none, or matplotlib isn't installed.
    """
    if experiment not in PICTURES:
        raise ExperimentError(f"there is no picture of {experiment!r}; there are of {', '.join(PICTURES)}")
    try:
        import matplotlib.figure  # noqa: F401 - only whether it can be
    except ImportError as error:
        raise ExperimentError("a picture needs matplotlib, which ./dev installs") from error


def plot(findings: Findings, path: Path) -> None:
    """Draw the picture of an experiment's findings into a PNG file.

    Raises:
        ExperimentError: There is none of this experiment.
        OSError: The file can't be written.
    """
    check_can_plot(findings.experiment)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_AN_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(f"{findings.experiment}, {findings.nodes} members, seed {findings.seed}")
    PICTURES[findings.experiment](axes, findings)
    figure.savefig(path, format="png")


def draw_shares(axes: "Axes", findings: Findings) -> None:
    """A curve for each sample: the share of all that were to learn of it, and had, by that time; a model's by rounds."""
    for name, shares in findings.curves.items():
        axes.plot(range(len(shares)), shares, label=name)
    for sample in findings.samples:
        times = sorted(sample.values)
        shares = [number / sample.expected_count for number in range(1, len(times) + 1)]
        axes.step([0.0, *times], [0.0, *shares], where="post", label=f"{sample.name} ({sample.expected_count:,})")
    if findings.samples:
        axes.set_xscale("symlog", linthresh=_shortest(findings))
    axes.set_xlim(left=0.0)
    axes.set_ylim(0.0, 1.02)
    axes.set_xlabel("rounds" if findings.curves else "seconds after it happened")
    axes.set_ylabel("share that knows")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower right")


def _shortest(findings: Findings) -> float:
    """Where the axis of time begins to count decades: below that is nothing to see."""
    return min((value for sample in findings.samples for value in sample.values if value > 0), default=1.0)


def draw_counts(axes: "Axes", findings: Findings) -> None:
    """A bar for each figure that counts deaths of well members."""
    counted = [each for each in findings.figures if " slow: " in each.name and "times fewer" not in each.name]
    bars = axes.barh([each.name for each in counted], [each.value or 0.0 for each in counted])
    axes.bar_label(bars, padding=3)
    axes.invert_yaxis()  # in the order of the table
    axes.set_xlim(0.0, 1.1 * max(1.0, *(each.value or 0.0 for each in counted)))
    axes.set_xlabel("deaths declared of members that were well")


PICTURES: dict[str, Callable[["Axes", Findings], None]] = {
    "convergence": draw_shares,
    "membership": draw_shares,
    "scale": draw_shares,
    "lifeguard": draw_counts,
}
