"""What a run tells while it trains: metrics.jsonl, samples.jsonl, and optional trackers."""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from glyphgpt.errors import Failure, UsageError, describe, writing
from glyphgpt.folder import write_whole
from glyphgpt.settings import TrainSettings

METRICS = "metrics.jsonl"
"""Rows of numbers; `kind` is "train" (loss of that step's batch) or "val" (loss of the whole validation split)."""
SAMPLES = "samples.jsonl"
"""Rows of a `step` and the `text` that the model wrote then."""

Row = dict[str, Any]


class Tracker(Protocol):
    """Takes rows of metrics."""

    def write(self, row: Row) -> None:
        """Take one row; its `step` is the number of updates done."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class RowsFile:
    """A file of rows: one JSON object a line, with the `step` that it is of, each written at once."""

    def __init__(self, path: Path, *, keep_steps: int) -> None:
        """Open the file; rows after step `keep_steps`, which a resumed run writes again, are dropped."""
        self._path = path
        rows = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        write_whole(path, b"".join(row for row in rows if _step_of(row) <= keep_steps))
        self._file = path.open("ab")

    def write(self, row: Row) -> None:
        """Append a row; JSON has no word for numbers that are not finite, so they become null.

        Raises:
            Failure: it could not be written.
        """
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        with writing(self._path):
            self._file.write(json.dumps(plain).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # of a row that could not be written, which was told
            self._file.close()


def _step_of(line: bytes) -> float:
    """Return a row's step; a line that was cut counts as the far future."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        step = None
    return step if isinstance(step, int) else math.inf


def read_rows(path: Path, check: Callable[[Any], Row]) -> list[Row]:
    """Read a file of rows, but for a last one that was cut; what is not finite becomes None.

    `check` returns a row, or raises a KeyError or TypeError where it is none.

    Raises:
        Failure: the file is not there, cannot be read, or is not as train.py writes it.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [check(json.loads(line, parse_constant=lambda _: None)) for line in lines]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Failure(f"{path}: no {path.stem} there; name the folder of a run") from error
    except OSError as error:
        raise Failure(describe(error)) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Failure(f"{path}: not as train.py writes it") from error


class TensorBoard:
    """Writes rows as TensorBoard events."""

    def __init__(self, folder: Path, *, keep_steps: int) -> None:
        """Open an event file in the run's folder; events after `keep_steps` are hidden."""
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        self._writer = SummaryWriter(str(folder), purge_step=keep_steps + 1)

    def write(self, row: Row) -> None:
        """Write each number under its name."""
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class WeightsAndBiases:
    """Logs rows to Weights & Biases."""

    def __init__(self, folder: Path, settings: TrainSettings) -> None:
        """Start a run named as the folder."""
        import wandb  # noqa: PLC0415

        self._run = wandb.init(
            project=settings.wandb_project, name=folder.name, dir=folder, config=settings.model_dump()
        )

    def write(self, row: Row) -> None:
        """Log each number under its name."""
        self._run.log(numbers(row), step=int(row["step"]))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def check_trackers(settings: TrainSettings) -> None:
    """Make sure, before a run begins, that the trackers which it asks for are installed.

    Raises:
        UsageError: one is not.
    """
    try:
        if settings.tensorboard:
            import tensorboard  # noqa: F401, PLC0415
        if settings.wandb:
            import wandb  # noqa: F401, PLC0415
    except ImportError as error:
        raise UsageError(f"{error.name} = true needs: pip install 'glyphgpt[{error.name}]'") from error


def numbers(row: Row) -> Row:
    """Return a row's measurements, named by kind and key, as in "val/loss"."""
    return {f"{row['kind']}/{key}": value for key, value in row.items() if key not in ("kind", "step")}


class Metrics:
    """Every tracker that the settings ask for, as one, and the file of samples."""

    def __init__(self, settings: TrainSettings, *, keep_steps: int, silent: bool = False) -> None:
        """Open them, or none if `silent`; rows after step `keep_steps` are to come again."""
        self._trackers: list[Tracker] = []
        self._samples: RowsFile | None = None
        if silent:
            return
        folder = Path(settings.out_dir)
        self._samples = RowsFile(folder / SAMPLES, keep_steps=keep_steps)
        self._trackers.append(RowsFile(folder / METRICS, keep_steps=keep_steps))
        if settings.tensorboard:
            self._trackers.append(TensorBoard(folder, keep_steps=keep_steps))
        if settings.wandb:
            self._trackers.append(WeightsAndBiases(folder, settings))

    def write(self, kind: str, step: int, **values: float) -> None:
        """Write one row."""
        row = {"kind": kind, "step": step, **values}
        for tracker in self._trackers:
            tracker.write(row)

    def write_sample(self, step: int, text: str) -> None:
        """Write what the model wrote."""
        if self._samples:
            self._samples.write({"step": step, "text": text})

    def close(self) -> None:
        """Finish them all."""
        if self._samples:
            self._samples.close()
        for tracker in self._trackers:
            tracker.close()
