"""Tell a run in one page: curves, samples over time, settings, the network's shapes, and how to go on.

    python -m glyphgpt.reports.run_report out/quick                      into out/quick/report.html
    python -m glyphgpt.reports.run_report out/quick --out=quick.html

train.py writes its own run's at its end. The page needs no network: it opens in any browser, from a file.
"""

import json
import math
import shlex
import sys
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from glyphgpt.checkpoint import BEST, LAST, read_metadata
from glyphgpt.cli import ACTIONS, groups, parse, read_toml, resolve
from glyphgpt.errors import UsageError, exit_on_error
from glyphgpt.files import write_atomic
from glyphgpt.reports.plot import read_metrics
from glyphgpt.reports.summary import LETTERS, ModelSummary
from glyphgpt.reports.templates import render
from glyphgpt.settings import PATHS, ReportSettings, TrainSettings
from glyphgpt.training.metrics import SAMPLES, Row, read_rows

PAGE = "report.html"
USAGE = "python -m glyphgpt.reports.run_report RUN [--out=FILE.html]"
COLUMNS = ("step", "tokens", "seconds", "loss", "learning_rate", "grad_norm", "tokens_a_second")
POINTS = 1000
"""The most that a curve has, so that the page of a long run stays small."""

T = TypeVar("T")


def main() -> None:
    """Write the page of the run that the command line names."""
    settings, words = parse(ReportSettings, sys.argv[1:], USAGE, __doc__ or "", files=False)
    if len(words) != 1:
        raise UsageError(f"name one run: {USAGE}")
    path = Path(settings.out or Path(words[0]) / PAGE)
    write(Path(words[0]), path)
    print(f"{path}: written")


def write(run: Path, path: Path) -> None:
    """Write a run's page.

    Raises:
        UserError: the run has no metrics, some file of it cannot be read, or the page cannot be written.
    """
    write_atomic(path, render(PAGE, content(run)).encode())


def content(run: Path) -> dict[str, Any]:
    """Return all that the page shows.

    Raises:
        UserError: the run has no metrics, or some file of it cannot be read.
    """
    rows = read_metrics(run)
    samples = read_rows(run / SAMPLES, checked) if (run / SAMPLES).exists() else []  # older runs have none
    config = str(run / "config.toml")
    settings = resolve(TrainSettings, [(config, read_toml(config))])
    info = next((read_metadata(run / name) for name in (LAST, BEST) if (run / name).exists()), None)
    step = max(info.state.step if info else 0, rows[-1]["step"])
    evaluations = [row for row in rows if row["kind"] == "val" and row.get("loss") is not None]
    vocab_size = info.model.get("vocab_size") if info else None
    walk = None
    if isinstance(vocab_size, int) and 0 < vocab_size <= 10**6:
        walk = ModelSummary(settings, vocab_size, settings.batch_size)
    ended, commands = ending(run, settings, step, evaluations)
    return {
        "name": str(run),
        "ended": ended,
        "commands": commands,
        "figures": figures(settings, rows, evaluations, step=step, walk=walk),
        "rows": {kind: columns([row for row in rows if row["kind"] == kind]) for kind in ("train", "val")},
        "samples": [{"about": about(row["step"], evaluations), "text": row["text"]} for row in thinned(samples)],
        "settings": tables(settings),
        "walk": shapes(walk) if walk else None,
    }


def checked(row: Any) -> Row:
    """Return a row of samples.

    Raises:
        KeyError, TypeError: it is none.
    """
    if not (isinstance(row["step"], int) and isinstance(row["text"], str)):
        raise TypeError
    return dict(row)


def ending(run: Path, settings: TrainSettings, step: int, evaluations: list[Row]) -> tuple[str, list[tuple[str, str]]]:
    """Say how a run ended, as far as its files tell, and which commands go on from there, each with its purpose."""
    losses = [row["loss"] for row in evaluations]
    since_best = len(losses) - 1 - losses.index(min(losses)) if losses else 0
    resume = f"python train.py --resume {shlex.quote(str(run))}"
    if step >= settings.max_steps:
        ended, further = f"All {settings.max_steps:,} steps are done.", f"{resume} --max_steps={2 * step or 1000}"
    elif 0 < settings.patience <= since_best:
        ended = f"Stopped early, at step {step:,}: no better loss in {settings.patience} evaluations."
        further = f"{resume} --patience=0"
    else:
        ended, further = f"Not at its end: step {step:,} of {settings.max_steps:,}.", resume
    return ended, [("Sample it", f"python sample.py {shlex.quote(str(run))}"), ("Train it further", further)]


def figures(
    settings: TrainSettings, rows: list[Row], evaluations: list[Row], *, step: int, walk: ModelSummary | None
) -> list[tuple[str, str, str]]:
    """Return the headline figures: what, how much, and a note."""
    best: Row = min(evaluations, key=lambda row: row["loss"], default={"step": 0})
    tokens = settings.batch_size * settings.gradient_accumulation_steps * settings.block_size
    speeds = [row["tokens_a_second"] for row in rows if "tokens_a_second" in row]
    return [
        ("Best validation loss", number(best.get("loss"), ".4f"), f"nats per token, at step {best['step']:,}"),
        ("Bits per character", number(best.get("bits_per_character"), ".3f"), "at the same step"),
        ("Perplexity", number(best.get("perplexity"), ",.2f"), "of a token, at the same step"),
        ("Steps", f"{step:,}", f"of {settings.max_steps:,}"),
        ("Tokens", f"{step * tokens:,}", f"{tokens:,} a step"),
        ("Time", duration(rows[-1]["seconds"]), "with evaluations and samples"),
        ("Tokens a second", number(median(speeds) if speeds else None, ",.0f"), "median, of training alone"),
        ("Parameters", number(walk.parameters if walk else None, ","), f"in {settings.n_layer} blocks"),
    ]


def number(value: float | None, form: str) -> str:
    """Return a number in its form, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """Return a time for readers.

    >>> duration(5.62), duration(192), duration(7300)
    ('5.6 s', '3 min 12 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def thinned(rows: list[T]) -> list[T]:
    """Return every k-th, so that at most POINTS are left, counted from the end: the last is always there."""
    return rows[:: -max(1, math.ceil(len(rows) / POINTS))][::-1]


def columns(rows: list[Row]) -> dict[str, list[float | None]]:
    """Return the quantities of rows, each in a list of its own."""
    return {name: [row.get(name) for row in thinned(rows)] for name in COLUMNS}


def about(step: int, evaluations: list[Row]) -> str:
    """Say what a sample is of."""
    loss = next((f", validation loss {row['loss']:.4f}" for row in evaluations if row["step"] == step), "")
    return f"step {step:,}{loss}"


def tables(settings: TrainSettings) -> list[dict[str, Any]]:
    """Return the settings under their headings, values written as in TOML."""
    found = []
    for heading, fields in groups(TrainSettings):
        rows = [
            {
                "key": key,
                "value": json.dumps(getattr(settings, key), ensure_ascii=False),
                "default": json.dumps(field.default, ensure_ascii=False),
                "meaning": " ".join((field.description or "").split()),
            }
            for key, field in fields.items()
            if key not in ACTIONS and key not in PATHS
        ]
        if rows:
            found.append({"heading": heading, "rows": rows})
    return found


def shapes(walk: ModelSummary) -> dict[str, Any]:
    """Return the walk through the network as the page lays it out."""
    parts = [
        ("before the blocks", walk.before_blocks()),
        (f"each of {walk.network.n_layer} blocks", walk.block()),
        ("after the blocks", walk.after_blocks()),
    ]
    return {
        "letters": LETTERS,
        "parts": [
            {
                "title": title,
                "rows": [
                    (
                        stage.name,
                        stage.letters,
                        " × ".join(map(str, walk.sizes(stage))),
                        f"{stage.parameters:,}" if stage.parameters else "",
                        f"{stage.multiply_adds:,}" if stage.multiply_adds else "",
                    )
                    for stage in stages
                ],
            }
            for title, stages in parts
        ],
        "all": (f"{walk.parameters:,}", f"{walk.multiply_adds:,}"),
        "costs": walk.costs(),
    }


if __name__ == "__main__":
    with exit_on_error():
        main()
