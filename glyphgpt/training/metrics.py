"""Logs of a run: metrics.jsonl, samples.jsonl, and optional experiment trackers."""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

from glyphgpt.errors import UserError, format_os_error, optional_import, warn, wrap_write_errors
from glyphgpt.files import BEST, write_atomic
from glyphgpt.settings import TrainSettings

METRICS = "metrics.jsonl"
"""Rows of measurements. `kind` is "train" (loss of the batch), "val" (loss of the validation split, or of a sample of
it) or "best" (loss of the best model on the whole split, at the end)."""
SAMPLES = "samples.jsonl"
"""Rows with a `step` and the `text` that the model generated then."""
AVERAGED_ROWS = 10
"""Rows of training whose losses are averaged to find overfitting."""
NOISE = 0.01
"""Rise of the validation loss, in nats per token, that is not overfitting yet."""

Row = dict[str, Any]


class Tracker(Protocol):
    """An experiment tracker, which receives rows of metrics."""

    def write(self, row: Row) -> None:
        """Log one row; its `step` is the number of updates done."""
        ...

    def close(self) -> None:
        """Finish the log."""
        ...


class JsonlWriter:
    """A file with one JSON object per line, each with a `step` and written at once."""

    def __init__(self, path: Path, *, keep_steps: float) -> None:
        """Open the file, and drop rows after step `keep_steps`, which a resumed run writes again."""
        self._path = path
        rows = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        write_atomic(path, b"".join(row for row in rows if _step_of(row) <= keep_steps))
        self._file = path.open("ab")

    def write(self, row: Row) -> None:
        """Append a row.

        Raises:
            UserError: The file could not be written.
        """
        with wrap_write_errors(self._path):
            self._file.write(encode_row(row))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # a row could not be written; `write` has reported that
            self._file.close()


def encode_row(row: Row) -> bytes:
    """Return a row as a line of JSON; numbers that are not finite become null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(plain).encode() + b"\n"


def _step_of(line: bytes) -> float:
    """Return a row's step, or infinity for a truncated line."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        step = None
    return step if isinstance(step, int) else math.inf


def read_rows(path: Path, check: Callable[[Any], Row]) -> list[Row]:
    """Read a file of rows, except a truncated last one; numbers that are not finite become None.

    `check` returns a row, or raises a KeyError or TypeError if it is not one.

    Raises:
        UserError: The file is missing, cannot be read, or was not written by train.py.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [check(json.loads(line, parse_constant=lambda _: None)) for line in lines]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no {path.stem} there; name the folder of a run") from error
    except OSError as error:
        raise UserError(format_os_error(error)) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not as train.py writes it") from error


def read_samples(folder: Path) -> list[Row]:
    """Read the samples of a run, which may have none.

    Raises:
        UserError: The file cannot be read, or was not written by train.py.
    """
    return read_rows(folder / SAMPLES, check_sample) if (folder / SAMPLES).exists() else []


def check_sample(row: Any) -> Row:
    """Check a row of samples, and return it.

    Raises:
        KeyError, TypeError: The row lacks a key, or a value has the wrong type.
    """
    if not (isinstance(row["step"], int) and isinstance(row["text"], str)):
        raise TypeError
    return dict(row)


def training_loss(rows: list[Row], step: int) -> float | None:
    """Return the mean training loss of the last AVERAGED_ROWS rows up to a step, or None if there are none."""
    losses = [row["loss"] for row in rows if row["kind"] == "train" and row.get("loss") and row["step"] <= step]
    return mean(losses[-AVERAGED_ROWS:]) if losses else None


def overfitting(rows: list[Row]) -> str:
    """Return in words how training and validation part in a run's metrics, and what to do; "" if they do not."""
    val = [row for row in rows if row["kind"] == "val" and row.get("loss")]
    if not val:
        return ""
    best, last = min(val, key=lambda row: row["loss"]), val[-1]
    before, after = training_loss(rows, best["step"]), training_loss(rows, last["step"])
    rise = last["loss"] - best["loss"]
    if rise <= max(NOISE, 2 * last.get("standard_error", 0)) or before is None or after is None or after >= before:
        return ""
    return (
        f"overfitting: since step {best['step']:,} the validation loss rose from {best['loss']:.3f} to "
        f"{last['loss']:.3f}, while the training loss fell from {before:.3f} to {after:.3f}; {BEST} is the model of "
        f"that step; better are more text, about {best['step']:,} steps, or more weight_decay and ngram_weight_decay"
    )


class TensorBoard:
    """A tracker that writes TensorBoard events."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Open an event file in the run's folder, and hide earlier events from `first_step` on."""
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, row: Row) -> None:
        """Log each number under its name."""
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A tracker that logs to Weights & Biases."""

    def __init__(self, folder: Path, settings: TrainSettings, wandb_id: str) -> None:
        """Start a run with the folder's name, or continue the one with this id.

        Raises:
            UserError: It cannot start, for example without a login or a network.
        """
        import wandb  # noqa: PLC0415  (optional; `check_trackers` has imported it before)

        try:
            self._run = wandb.init(
                project=settings.wandb_project,
                name=folder.name,
                dir=folder,
                config=settings.model_dump(),
                id=wandb_id or None,
                resume="allow",
            )
        except Exception as error:  # errors of wandb, its server, and the system
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"Weights & Biases cannot start: {reason}; log in (wandb login), leave --wandb out, or have it write "
                "to the disk only: WANDB_MODE=offline"
            ) from error
        self.id: str = self._run.id

    def write(self, row: Row) -> None:
        """Log each number under its name."""
        self._run.log(numbers(row), step=int(row["step"]))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def check_trackers(settings: TrainSettings) -> None:
    """Check that the trackers in the settings are installed, before the run starts.

    Raises:
        UsageError: One of them is not.
    """
    if settings.tensorboard:
        with optional_import("tensorboard", "tensorboard = true"):
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401, PLC0415
    if settings.wandb:
        with optional_import("wandb", "wandb = true"):
            import wandb  # noqa: F401, PLC0415


def numbers(row: Row) -> Row:
    """Return a row's measurements with names such as "val/loss"."""
    return {f"{row['kind']}/{key}": value for key, value in row.items() if key not in ("kind", "step")}


class Metrics:
    """metrics.jsonl, samples.jsonl, and the trackers in the settings.

    A new run keeps its rows in memory until it owns its folder. `write_held` then writes them among the files that
    replace those of an earlier run, and `open` opens the files for later rows.
    """

    def __init__(self, settings: TrainSettings, *, wandb_id: str = "", silent: bool = False) -> None:
        """Start Weights & Biases, the only tracker that can fail to start. Write no file; if `silent`, do nothing.

        Raises:
            UserError: Weights & Biases cannot start.
        """
        self._settings, self._silent = settings, silent
        self._folder = Path(settings.out_dir)
        self._held: dict[str, list[Row]] = {METRICS: [], SAMPLES: []}
        self._files: dict[str, JsonlWriter] = {}
        self._trackers: list[Tracker] = []
        self.wandb_id = wandb_id
        if settings.wandb and not silent:
            tracker = WeightsAndBiases(self._folder, settings, wandb_id)
            self.wandb_id = tracker.id
            self._trackers.append(tracker)

    def write_held(self, folder: Path) -> None:
        """Write the rows so far to files in a folder."""
        for name, rows in self._held.items():
            write_atomic(folder / name, b"".join(map(encode_row, rows)))

    def open(self, *, keep_steps: float) -> None:
        """Open the files in the run's folder, and drop rows after step `keep_steps`, which will be written again."""
        if self._silent:
            return
        self._files = {name: JsonlWriter(self._folder / name, keep_steps=keep_steps) for name in self._held}
        if self._settings.tensorboard:
            first = 0 if math.isinf(keep_steps) else int(keep_steps) + 1
            tensorboard = TensorBoard(self._folder, first_step=first)
            for row in self._held[METRICS]:
                tensorboard.write(row)
            self._trackers.append(tensorboard)

    def write(self, kind: str, step: int, **values: float) -> None:
        """Write one row, and log it to the trackers; drop a tracker that fails."""
        row = {"kind": kind, "step": step, **values}
        self._write(METRICS, row)
        for tracker in list(self._trackers):
            try:
                tracker.write(row)
            except Exception as error:  # a server or a full disk must not stop training
                self._trackers.remove(tracker)
                warn(f"{type(tracker).__name__} failed and is not used any more: {error}")

    def write_sample(self, step: int, text: str) -> None:
        """Write a generated text."""
        self._write(SAMPLES, {"step": step, "text": text})

    def _write(self, name: str, row: Row) -> None:
        if self._files:
            self._files[name].write(row)
        elif not self._silent:
            self._held[name].append(row)

    def close(self) -> None:
        """Close the files, and finish the trackers."""
        for file in self._files.values():
            file.close()
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                warn(f"{type(tracker).__name__} could not be finished: {error}")
