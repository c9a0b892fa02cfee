"""Draw how runs went: losses against steps, tokens and time, learning rate, throughput, gradients.

    python -m glyphgpt.reports.plot out/quick                        into out/quick/metrics.png
    python -m glyphgpt.reports.plot out/one out/two --out=both.png   several runs together

train.py draws its own run at its end where matplotlib is installed: pip install matplotlib
"""

import io
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from glyphgpt.cli import parse, printable
from glyphgpt.errors import UsageError, UserError, exit_on_error, optional_import
from glyphgpt.files import PLOT, write_atomic
from glyphgpt.settings import PlotSettings
from glyphgpt.training.metrics import METRICS, Row, read_rows

USAGE = "python -m glyphgpt.reports.plot RUN [RUN ...] [--out=FILE.png]"
PANELS = [
    ("step", "loss"), ("tokens", "loss"), ("seconds", "loss"),
    ("step", "learning_rate"), ("step", "grad_norm"), ("seconds", "tokens_a_second"),
]  # fmt: skip
"""What each panel shows: a quantity against another."""


def main() -> None:
    """Draw the runs that the command line names."""
    settings, words = parse(PlotSettings, sys.argv[1:], USAGE, __doc__ or "", files=False)
    if not words:
        raise UsageError(f"name a run: {USAGE}")
    if len(words) > 1 and not settings.out:
        raise UsageError("say where to draw several runs: --out=FILE.png")
    path = Path(settings.out or Path(words[0]) / PLOT)
    draw([Path(word) for word in words], path)
    print(f"{path}: drawn")


def is_available() -> bool:
    """Return whether matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401, PLC0415  (optional)
    except Exception:  # not installed, or broken
        return False
    return True


def draw(runs: Sequence[Path], path: Path) -> None:
    """Draw runs into a PNG file.

    Raises:
        UserError: matplotlib is not installed, or a run has no metrics.
    """
    with optional_import("matplotlib", "drawing"):
        import matplotlib  # noqa: F401, PLC0415  (optional, and slow to import)
        from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(15, 8), layout="constrained")
    panels = list(figure.subplots(2, 3).flat)
    for number, run in enumerate(runs):
        rows = read_metrics(run)
        for axes, (x, y) in zip(panels, PANELS, strict=True):
            draw_run(axes, rows, x, y, color=f"C{number}", label=printable(str(run)).replace("$", r"\$"))  # no formula
    for axes, (x, y) in zip(panels, PANELS, strict=True):
        axes.set_xlabel(x)
        axes.set_ylabel(y.replace("_", " "))
        axes.grid(alpha=0.3)
    panels[0].legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    write_atomic(path, picture.getvalue())


def draw_run(axes: Any, rows: list[Row], x: str, y: str, *, color: str, label: str) -> None:
    """Draw one quantity of a run against another: thin as it was in training, bold as validated."""
    for kind, style in (("train", {"alpha": 0.4, "linewidth": 1}), ("val", {"marker": "o", "markersize": 3})):
        points = [(row[x], row[y]) for row in rows if row["kind"] == kind and row.get(y) is not None]
        name = f"{'validation' if kind == 'val' else 'training'}, {label}"
        if points:
            axes.plot(*zip(*points, strict=True), color=color, label=name, **style)


def read_metrics(run: Path) -> list[Row]:
    """Read a run's metrics, with the `tokens_a_second` of training between rows of it.

    Raises:
        UserError: there are none, or they are not as train.py writes them.
    """
    rows = read_rows(run / METRICS, check_metrics)
    if not rows:
        raise UserError(f"{run / METRICS}: empty; train first")
    for before, row in pairwise(rows):
        seconds = row["seconds"] - before["seconds"]
        if before["kind"] == row["kind"] == "train" and seconds > 1e-4:  # they are told to a thousandth
            row["tokens_a_second"] = (row["tokens"] - before["tokens"]) / seconds
    return rows


def check_metrics(row: Any) -> Row:
    """Return a row of metrics.

    Raises:
        KeyError, TypeError: it is none.
    """
    measured = (row[key] for key in row if key != "kind" and row[key] is not None)
    numbers = [row["step"], row["tokens"], row["seconds"], *measured]
    if row["kind"] not in ("train", "val") or not all(map(is_number, numbers)):
        raise TypeError
    return dict(row)


def is_number(value: object) -> bool:
    """Tell whether a value is a number to count with, and to draw."""
    return isinstance(value, int | float) and abs(value) < 1e300


if __name__ == "__main__":
    with exit_on_error():
        main()
