"""What a run tells while it trains: metrics.jsonl, and optional trackers."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from glyphgpt.errors import UsageError, writing
from glyphgpt.folder import write_whole
from glyphgpt.settings import TrainSettings

METRICS = "metrics.jsonl"

Row = dict[str, Any]


class Tracker(Protocol):
    """Takes rows of metrics."""

    def write(self, row: Row) -> None:
        """Take one row; its `step` is the number of updates done."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each written at once.

    `kind` is "train" (loss of that step's batch) or "val" (loss of the whole validation split).
    """

    def __init__(self, folder: Path, *, keep_steps: int) -> None:
        """Open the file; rows after step `keep_steps`, which a resumed run writes again, are dropped."""
        self._path = folder / METRICS
        rows = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        write_whole(self._path, b"".join(row for row in rows if _step_of(row) <= keep_steps))
        self._file = self._path.open("ab")

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
    """Every tracker that the settings ask for, as one."""

    def __init__(self, settings: TrainSettings, *, keep_steps: int, silent: bool = False) -> None:
        """Open them, or none if `silent`; rows after step `keep_steps` are to come again."""
        self._trackers: list[Tracker] = []
        if silent:
            return
        folder = Path(settings.out_dir)
        self._trackers.append(MetricsFile(folder, keep_steps=keep_steps))
        if settings.tensorboard:
            self._trackers.append(TensorBoard(folder, keep_steps=keep_steps))
        if settings.wandb:
            self._trackers.append(WeightsAndBiases(folder, settings))

    def write(self, kind: str, step: int, **values: float) -> None:
        """Write one row."""
        row = {"kind": kind, "step": step, **values}
        for tracker in self._trackers:
            tracker.write(row)

    def close(self) -> None:
        """Finish them all."""
        for tracker in self._trackers:
            tracker.close()
