"""Plot the metrics of runs: loss against steps, tokens and time; learning rate, gradient norm and throughput.

    python -m glyphgpt.reports.plot out/quick                        writes out/quick/metrics.png
    python -m glyphgpt.reports.plot out/one out/two --out=both.png   compares runs

train.py plots its run at the end if matplotlib is installed: pip install matplotlib
"""

import io
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from glyphgpt.cli import parse
from glyphgpt.errors import UsageError, UserError, exit_on_error, optional_import, shorten
from glyphgpt.files import PLOT, write_atomic
from glyphgpt.settings import PlotSettings
from glyphgpt.training.metrics import METRICS, Row, read_rows

USAGE = "python -m glyphgpt.reports.plot RUN [RUN ...] [--out=FILE.png]"
PANELS = [
    ("step", "loss"), ("tokens", "loss"), ("seconds", "loss"),
    ("step", "learning_rate"), ("step", "grad_norm"), ("seconds", "tokens_per_second"),
]  # fmt: skip
"""The x and y axis of each panel."""


def main() -> None:
    """Plot the runs that the command line names."""
    settings, words = parse(PlotSettings, sys.argv[1:], USAGE, __doc__ or "", files=False)
    if not words:
        raise UsageError(f"name one or more runs: {USAGE}")
    if len(words) > 1 and not settings.out:
        raise UsageError("a plot of several runs needs a file: --out=FILE.png")
    path = Path(settings.out or Path(words[0]) / PLOT)
    write_plot([Path(word) for word in words], path)
    print(f"{path}: written")


def write_plot(runs: Sequence[Path], path: Path) -> None:
    """Write a plot of runs as a PNG file.

    Raises:
        UserError: matplotlib is not installed, a run has no metrics, or the file could not be written.
    """
    with optional_import("matplotlib", "a plot"):
        import matplotlib  # noqa: F401, PLC0415  (optional, and slow to import)
        from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(15, 8), layout="constrained")
    panels = list(figure.subplots(2, 3).flat)
    for number, run in enumerate(runs):
        rows = read_metrics(run)
        label = shorten(run).replace("$", r"\$")  # otherwise matplotlib reads a formula
        for axes, (x, y) in zip(panels, PANELS, strict=True):
            plot_run(axes, rows, x, y, color=f"C{number}", label=label)
    for axes, (x, y) in zip(panels, PANELS, strict=True):
        axes.set_xlabel(x)
        axes.set_ylabel(y.replace("_", " "))
        axes.grid(alpha=0.3)
    panels[0].legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    write_atomic(path, png.getvalue())


def plot_run(axes: Any, rows: list[Row], x: str, y: str, *, color: str, label: str) -> None:
    """Plot y against x for one run: a thin line for training, markers for validation."""
    for kind, style in (("train", {"alpha": 0.4, "linewidth": 1}), ("val", {"marker": "o", "markersize": 3})):
        points = [(row[x], row[y]) for row in rows if row["kind"] == kind and row.get(y) is not None]
        name = f"{'validation' if kind == 'val' else 'training'}, {label}"
        if points:
            axes.plot(*zip(*points, strict=True), color=color, label=name, **style)


def read_metrics(run: Path) -> list[Row]:
    """Read a run's metrics, and add `tokens_per_second` to each training row that follows another.

    Raises:
        UserError: The file is missing, empty, or not as train.py writes it.
    """
    rows = read_rows(run / METRICS, check_metrics)
    if not rows:
        raise UserError(f"{run / METRICS}: empty; train first")
    for before, row in pairwise(rows):
        seconds = row["seconds"] - before["seconds"]
        if before["kind"] == row["kind"] == "train" and seconds > 1e-4:  # times are rounded to 1 ms
            row["tokens_per_second"] = (row["tokens"] - before["tokens"]) / seconds
    return rows


def check_metrics(row: Any) -> Row:
    """Check a row of metrics, and return it.

    Raises:
        KeyError, TypeError: The row lacks a key, or a value has the wrong type.
    """
    numbers = [row["step"], row["tokens"], row["seconds"]]  # the others may be missing or None
    numbers += [value for key, value in row.items() if key != "kind" and value is not None]
    if row["kind"] not in ("train", "val", "best") or not all(map(is_plottable, numbers)):
        raise TypeError
    return dict(row)


def is_plottable(value: object) -> bool:
    """Return whether a value is a number of a size that can be plotted."""
    return isinstance(value, int | float) and abs(value) < 1e300


if __name__ == "__main__":
    with exit_on_error():
        main()
