"""The report of a run: an HTML page with curves, samples, commands to continue, settings and the model summary.

    python -m glyphgpt.reports.run_report out/quick                      writes out/quick/report.html
    python -m glyphgpt.reports.run_report out/quick --out=quick.html

train.py writes this page at the start of a run, after evaluations, and at the end; until then an open page renews
itself. The page is self-contained and opens in any browser.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from glyphgpt.checkpoint import Metadata, TrainState, find_checkpoint, read_metadata
from glyphgpt.cli import command, groups, parse, read_toml, resolve
from glyphgpt.data.dataset import Dataset, find_dataset, load_dataset, read_meta
from glyphgpt.data.novelty import LENGTHS, find_copied, read_points
from glyphgpt.data.tokenizers import decode
from glyphgpt.errors import UsageError, UserError, exit_on_error, warn
from glyphgpt.files import BEST, CONFIG, LAST, REPORT, write_atomic
from glyphgpt.reports.plot import read_metrics
from glyphgpt.reports.summary import SHAPE_LETTERS, ModelSummary
from glyphgpt.reports.templates import render
from glyphgpt.settings import PATHS, Mode, ReportSettings, TrainSettings
from glyphgpt.training.metrics import METRICS, Row, overfitting, read_samples, training_loss
from glyphgpt.training.run import outcome

USAGE = "python -m glyphgpt.reports.run_report RUN [--out=FILE.html]"
COLUMNS = ("step", "tokens", "seconds", "loss", "learning_rate", "grad_norm", "tokens_per_second")
LIVE_TIME, NOVELTY_TIME = 0.02, 0.05
"""Fractions of a run's time for writing its report during the run, and for finding what its last sample copied."""
COMPARED_CHARACTERS, MOST_SECONDS = 10_000_000, 10
"""Characters of the training text in which a second suffices to find what was copied, and the most seconds for it."""
VAL_TOKENS = 20_000
"""Tokens of the validation text for which the same is found."""
MAX_POINTS = 1000
"""Maximum number of points of a curve, and of samples, which bounds the size of the page."""

T = TypeVar("T")


def main() -> None:
    """Write the report of the run that the command line names."""
    settings, words = parse(ReportSettings, sys.argv[1:], USAGE, __doc__ or "", files=False)
    if len(words) != 1:
        raise UsageError(f"name one run: {USAGE}")
    run = Path(words[0])
    path = Path(settings.out or run / REPORT)
    write_report(run, path, dataset=dataset_of(run))
    print(f"{path}: written")


def dataset_of(run: Path) -> Dataset | None:
    """Return the dataset of a run, or None if it cannot be read or has changed."""
    try:
        settings = run_settings(run)
        folder = find_dataset(settings.dataset, Path(settings.data_dir))
        if read_metadata(find_checkpoint(run)).data == read_meta(folder).fingerprint:
            return load_dataset(folder, Path(settings.data_dir))
    except UserError:
        pass
    return None


def run_settings(run: Path) -> TrainSettings:
    """Return the settings of a run.

    Raises:
        UserError: The run has no config, or it cannot be read.
    """
    config = str(run / CONFIG)
    return resolve(TrainSettings, [(config, read_toml(config))])


class LiveReport:
    """The report of a run, which is written again and again during the run, in at most LIVE_TIME of its time.

    A failure is only a warning: the run is saved.
    """

    def __init__(self, run: Path, log: Callable[[str], None], *, enabled: bool) -> None:
        """Prepare to write; nothing is ever written unless `enabled`."""
        self.run, self.log, self.enabled = run, log, enabled
        self.next_time = 0.0
        """Earliest time of the next page."""

    def begin(self) -> None:
        """Write the first page, and log its path."""
        if self._write(running=True):
            self.log(f"report: {self.run / REPORT}, renewed during the run")

    def renew(self) -> None:
        """Write the page again unless that has just been done."""
        if time.monotonic() >= self.next_time:
            self._write(running=True)

    def finish(self, dataset: Dataset | None) -> None:
        """Write the last page, and log its path; with the dataset, the page says what the last sample copied."""
        if self._write(running=False, dataset=dataset):
            self.log(f"report: {self.run / REPORT}")

    def _write(self, *, running: bool, dataset: Dataset | None = None) -> bool:
        """Write the page; return whether that succeeded."""
        started = time.monotonic()
        try:
            if self.enabled:
                write_report(self.run, self.run / REPORT, running=running, dataset=dataset)
        except (UserError, OSError) as error:
            warn(str(error))
            self.enabled = False
        now = time.monotonic()
        self.next_time = now + (now - started) / LIVE_TIME
        return self.enabled


def write_report(run: Path, path: Path, *, running: bool = False, dataset: Dataset | None = None) -> None:
    """Write the report of a run, which may still be running.

    Raises:
        UserError: The run has no metrics, one of its files cannot be read, or the page cannot be written.
    """
    write_atomic(path, render(REPORT, page_data(run, running=running, dataset=dataset)).encode())


def page_data(run: Path, *, running: bool = False, dataset: Dataset | None = None) -> dict[str, Any]:
    """Return the data of a run's page.

    Args:
        running: Whether the run is not finished.
        dataset: The run's dataset. Without it, the page does not say how much of the last sample is copied.

    Raises:
        UserError: The run has no metrics, or one of its files cannot be read.
    """
    has_rows = not (run / METRICS).is_file() or (run / METRICS).stat().st_size > 0  # none before the first step
    rows = read_metrics(run) if has_rows else []
    samples = read_samples(run)
    settings = run_settings(run)
    metadata = next((read_metadata(run / name) for name in (LAST, BEST) if (run / name).exists()), None)
    state = metadata.state if metadata else TrainState()
    state.step = max(state.step, *(row["step"] for row in rows[-1:]), 0)
    evaluations = [row for row in rows if row["kind"] == "val" and row.get("loss") is not None]
    summary = model_summary(settings, metadata)
    end = outcome(settings, state, run)
    status = progress(settings, rows, state.step) if running else end.text
    return {
        "name": str(run),
        "outcome": ". ".join(f"{text[0].upper()}{text[1:]}" for text in (status, overfitting(rows)) if text) + ".",
        "running": running,
        "written": time.time(),
        "interval": step_seconds(rows) * min(settings.eval_every, settings.max_steps),
        "commands": [("Sample", command("sample.py", run)), ("Continue training", end.resume)],
        "highlights": highlights(settings, rows, evaluations, step=state.step, summary=summary),
        "rows": {kind: columns([row for row in rows if row["kind"] == kind]) for kind in ("train", "val")},
        "samples": [{"caption": caption(row["step"], evaluations), "text": row["text"]} for row in subsample(samples)],
        "novelty": novelty(samples[-1]["text"], rows, dataset) if samples and dataset else "",
        "settings": settings_tables(settings),
        "summary": summary_tables(summary) if summary else None,
    }


def step_seconds(rows: list[Row]) -> float:
    """Return the mean time of a step, evaluations included, or 0 before the first row."""
    return rows[-1]["seconds"] / max(1, rows[-1]["step"]) if rows else 0.0


def progress(settings: TrainSettings, rows: list[Row], step: int) -> str:
    """Return how far an unfinished run is."""
    left = (settings.max_steps - step) * step_seconds(rows)
    time_left = f", about {format_duration(left)} left" if rows else ""
    return f"running: step {step:,} of {settings.max_steps:,}{time_left}"


def model_summary(settings: TrainSettings, metadata: Metadata | None) -> ModelSummary | None:
    """Return the summary of a run's network, or None if no checkpoint has a valid vocabulary size."""
    vocab_size = metadata.model.get("vocab_size") if metadata else None
    if isinstance(vocab_size, int) and 0 < vocab_size <= 10**6:
        return ModelSummary(settings, vocab_size, settings.batch_size)
    return None


def highlights(
    settings: TrainSettings, rows: list[Row], evaluations: list[Row], *, step: int, summary: ModelSummary | None
) -> list[tuple[str, str, str]]:
    """Return the numbers at the top of the page: name, value and note."""
    best: Row = min(evaluations, key=lambda row: row["loss"], default={"step": 0})
    step_of_best = best["step"]
    train_loss = training_loss(rows, step_of_best)
    comparable = evaluations and train_loss and not settings.label_smoothing
    gap = best["loss"] - train_loss if comparable and train_loss else None
    if rows and rows[-1]["kind"] == "best":  # the same model on the whole validation split
        best = rows[-1]
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return [
        ("Best validation loss", format_number(best.get("loss"), ".4f"), f"nats per token, at step {step_of_best:,}"),
        ("Bits per character", format_number(best.get("bits_per_character"), ".3f"), "at the same step"),
        ("Gap to training loss", format_number(gap, "+.4f"), "validation minus training, at the same step"),
        ("Steps", f"{step:,}", f"of {settings.max_steps:,}"),
        ("Tokens", f"{step * settings.tokens_per_step:,}", f"{settings.tokens_per_step:,} per step"),
        ("Time", format_duration(rows[-1]["seconds"] if rows else 0), "including evaluations and samples"),
        ("Tokens per second", format_number(median(speeds) if speeds else None, ",.0f"), "median, without evaluations"),
        ("Parameters", format_number(summary.parameters if summary else None, ","), f"in {settings.n_layer} blocks"),
    ]


def format_number(value: float | None, spec: str) -> str:
    """Return a formatted number, or a dash for None."""
    return "–" if value is None else format(value, spec)


def format_duration(seconds: float) -> str:
    """Return a duration in readable units.

    >>> format_duration(5.62), format_duration(192), format_duration(7300)
    ('5.6 s', '3 min 12 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def subsample(rows: list[T]) -> list[T]:
    """Return every k-th row, counted from the last one; k is the smallest that leaves at most MAX_POINTS rows."""
    return rows[:: -max(1, math.ceil(len(rows) / MAX_POINTS))][::-1]


def columns(rows: list[Row]) -> dict[str, list[float | None]]:
    """Return a list of values for each of COLUMNS."""
    return {name: [row.get(name) for row in subsample(rows)] for name in COLUMNS}


def caption(step: int, evaluations: list[Row]) -> str:
    """Return the caption of a sample."""
    loss = next((f", validation loss {row['loss']:.4f}" for row in evaluations if row["step"] == step), "")
    return f"step {step:,}{loss}"


def novelty(sample: str, rows: list[Row], dataset: Dataset) -> str:
    """Return how much of a sample is copied from the training text, or "" if finding that out takes too much time."""
    train, val, tokenizer = dataset.train, dataset.val, dataset.tokenizer
    seconds = min(MOST_SECONDS, NOVELTY_TIME * rows[-1]["seconds"]) if rows else 0
    if train.characters > COMPARED_CHARACTERS * seconds:
        return ""
    val_text = decode(tokenizer, val.slice(0, min(val.tokens, VAL_TOKENS)))
    texts = read_points(train, tokenizer, "reading the training text")
    in_sample, in_val = (
        f"{copied.fractions[LENGTHS[0]]:.0%} (the longest has {len(copied.longest)} characters)"
        for copied in find_copied(([sample], [val_text]), texts)
    )
    return (
        f"Share of the last sample in runs of {LENGTHS[0]} or more characters that also occur in the training text: "
        f"{in_sample}; of the validation text, for comparison: {in_val}."
    )


def settings_tables(settings: TrainSettings) -> list[dict[str, Any]]:
    """Return a table of the settings under each heading, with values as in TOML."""
    tables = []
    for heading, fields in groups(TrainSettings):
        rows = [
            {
                "key": key,
                "value": json.dumps(getattr(settings, key), ensure_ascii=False),
                "default": json.dumps(field.default, ensure_ascii=False),
                "meaning": " ".join((field.description or "").split()),
            }
            for key, field in fields.items()
            if key not in Mode.model_fields and key not in PATHS
        ]
        if rows:
            tables.append({"heading": heading, "rows": rows})
    return tables


def summary_tables(summary: ModelSummary) -> dict[str, Any]:
    """Return the sections, totals and costs of the model summary, with numbers as text."""
    return {
        "shape_letters": SHAPE_LETTERS,
        "sections": [
            {
                "heading": heading,
                "rows": [
                    (
                        layer.name,
                        layer.symbolic_shape,
                        " × ".join(map(str, layer.shape)) or "1",
                        f"{layer.parameters:,}" if layer.parameters else "",
                        f"{layer.macs:,}" if layer.macs else "",
                    )
                    for layer in layers
                ],
            }
            for heading, _, layers in summary.sections
        ],
        "totals": (f"{summary.parameters:,}", f"{summary.macs:,}"),
        "costs": summary.costs(),
    }


if __name__ == "__main__":
    with exit_on_error():
        main()
