"""The folder of a run: check it, lock it, resume from it, save to it, and log what happens."""

import math
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tomli_w
from tqdm import tqdm

from glyphgpt.checkpoint import Checkpoint, TrainState, load_checkpoint, read_metadata, save_checkpoint
from glyphgpt.cli import command, is_path
from glyphgpt.data.dataset import Dataset
from glyphgpt.errors import BROKEN_PIPE_STATUS, UsageError, UserError, is_broken_pipe, shorten, warn
from glyphgpt.files import (
    BEST,
    CONFIG,
    LAST,
    META,
    PLOT,
    READY,
    REPORT,
    finish_replacement,
    locked,
    replace_files,
    write_atomic,
)
from glyphgpt.inference.score import Score
from glyphgpt.reports.plot import read_metrics
from glyphgpt.runtime import Runtime, StopRequest, torchrun_id
from glyphgpt.settings import PATHS, Mode, ModelConfig, Optimization, TrainSettings
from glyphgpt.training.evaluation import check_vocabulary
from glyphgpt.training.metrics import Metrics, overfitting

LOG_SECONDS = 15  # longest time between log lines if no progress bar is shown
RECENT_UPDATES = 20  # whose durations determine the utilization of a GPU


@dataclass(frozen=True)
class StepMetrics:
    """Measurements of one update."""

    loss: float
    """Loss of the batch before the update, in nats per token."""
    grad_norm: float
    """Norm of the gradients before clipping."""
    learning_rate: float


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and the command that continues it."""

    text: str
    resume: str


def outcome(settings: TrainSettings, state: TrainState, folder: Path) -> Outcome:
    """Return how a run ended, or where it was interrupted."""
    resume = command("train.py", "--resume", folder)
    if state.step >= settings.max_steps:
        return Outcome(f"all {settings.max_steps:,} steps done", f"{resume} --max_steps={2 * state.step or 1000}")
    if out_of_patience(settings, state):
        evaluations = f"{settings.patience} evaluation{'s' * (settings.patience > 1)}"
        text = f"stopped early at step {state.step:,}: no better loss in {evaluations}"
        return Outcome(text, f"{resume} --patience=0")
    return Outcome(f"interrupted at step {state.step:,} of {settings.max_steps:,}", resume)


def run_finished(settings: TrainSettings, state: TrainState) -> bool:
    """Return whether a run has done all steps, or has stopped early."""
    return state.step >= settings.max_steps or out_of_patience(settings, state)


def out_of_patience(settings: TrainSettings, state: TrainState) -> bool:
    """Return whether the validation loss has not improved for `patience` evaluations."""
    return 0 < settings.patience <= state.evaluations_since_improvement


def resume_after_restart(settings: TrainSettings, runtime: Runtime) -> TrainSettings:
    """Complete an interrupted replacement of files, and resume if torchrun has restarted the job of this run."""
    folder, same_job = Path(settings.out_dir), False
    if runtime.is_main:
        if (folder / READY).exists():
            with locked(folder, "--out_dir=ANOTHER"):
                finish_replacement(folder)
        job = torchrun_id()
        with suppress(UserError):
            same_job = bool(job) and read_metadata(folder / LAST).torchrun == job
    (restarted,) = runtime.sum(float(same_job))  # the main process decides for all
    if not restarted:
        return settings
    mode: dict[str, Any] = {"resume": True, "overwrite": False}
    if settings.minutes:  # the settings were chosen before the restart
        mode |= {"minutes": 0.0}
        saved = {k: v for k, v in read_metadata(folder / LAST).settings.items() if k not in Mode.model_fields}
        settings = TrainSettings.model_validate(settings.model_dump() | saved)
    return settings.model_copy(update=mode)


def check_new(settings: TrainSettings) -> None:
    """Check that a new run does not replace another one unasked.

    Raises:
        UsageError: It would.
    """
    folder = Path(settings.out_dir)
    if not (settings.resume or settings.overwrite) and any((folder / name).exists() for name in (BEST, LAST)):
        resume = f"continue it: {command('train.py', '--resume', folder)}; or " if (folder / LAST).exists() else ""
        raise UsageError(f"{folder} already holds a run; {resume}add --overwrite to replace it, or --out_dir=ANOTHER")


def check_train_length(settings: TrainSettings, dataset: Dataset) -> None:
    """Check that the training split fills a window.

    Raises:
        UserError: It is shorter than one window.
    """
    train, block_size = dataset.train.tokens, settings.block_size
    if train <= block_size:
        raise UserError(
            f"{dataset.folder}: its {train:,} training tokens do not fill a window of block_size + 1 = "
            f"{block_size + 1:,}; lower block_size to at most {train - 1:,}, or prepare a longer text"
        )


def check_lengths(settings: TrainSettings, dataset: Dataset) -> None:
    """Check that the training split fills a window; warn if the validation split does not, or if records are longer.

    Raises:
        UserError: The training split is shorter than one window.
    """
    check_train_length(settings, dataset)
    val, block_size = dataset.val.tokens, settings.block_size
    if val <= block_size:
        warn(f"the validation split has only {val:,} tokens, fewer than block_size = {block_size:,}: its loss is noisy")
    if (ends := dataset.train.record_ends) is not None and (sizes := np.diff(ends)).max() > block_size:
        warn(
            f"{np.sum(sizes > block_size):,} of {len(sizes):,} records are longer than block_size = {block_size:,}: "
            f"later parts of them are learned without what precedes; the longest needs block_size = {sizes.max():,}"
        )


def diverged(step: int, problem: str, when: str) -> UserError:
    """Return the error for numbers that are not finite."""
    return UserError(
        f"step {step:,}: {problem}: not finite, so training stopped {when}; the checkpoints are unchanged; "
        "lower learning_rate or raise warmup_steps, then continue with --resume"
    )


class Run:
    """A run's folder and its messages. Only the main process writes and prints."""

    def __init__(self, settings: TrainSettings, runtime: Runtime, *, seconds_at_peak: float = 0.0) -> None:
        """Create the run without touching its folder.

        Args:
            seconds_at_peak: Duration of a training step at the peak speed of the GPUs, or 0 if it is not known.
        """
        self.settings, self.runtime = settings, runtime
        self.folder = Path(settings.out_dir)
        self.stop = StopRequest()
        self.tokens_per_step, self.seconds_at_peak = settings.tokens_per_step, seconds_at_peak
        self.times = deque[float](maxlen=RECENT_UPDATES + 1)  # of the last updates
        self.has_files = settings.resume
        """Whether the folder's files are those of this run, and not of an earlier one."""
        self.log_time = time.perf_counter()
        self.wandb_id = ""
        self.whole_split_loss: float | None = None
        """Loss of the best model on the whole validation split, if the run ended with that evaluation."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other trainings out of the folder.

        Raises:
            UsageError: Another process uses the folder, or it holds a dataset.
            UserError: There is no run to resume, or the folder cannot be written to.
        """
        if is_path(str(self.folder / META)):
            raise UsageError(f"{self.folder} is a dataset; choose another --out_dir")
        if self.settings.resume and not (self.folder / LAST).exists():
            instead = "use --overwrite" if (self.folder / BEST).exists() else "leave --resume out"
            raise UserError(f"{self.folder}: no run to resume here; {instead} to start a new one")
        with locked(self.folder, "--out_dir=ANOTHER") if self.runtime.is_main else nullcontext():
            yield

    def load_last(self) -> Checkpoint | None:
        """Return the checkpoint to resume from, or None for a new run. Write nothing.

        Raises:
            UsageError: The folder holds a run, and neither resume nor overwrite is set.
            UserError: The checkpoint cannot be read.
        """
        check_new(self.settings)
        checkpoint = None
        if self.settings.resume:
            checkpoint = load_checkpoint(self.folder / LAST)
            self.wandb_id = checkpoint.metadata.wandb_id
        self.runtime.barrier()  # every process has looked before one writes
        return checkpoint

    def check_resumable(self, checkpoint: Checkpoint, config: ModelConfig, dataset: Dataset) -> None:
        """Check that a checkpoint fits the network and the dataset; warn if settings or data have changed.

        Raises:
            UsageError: max_steps is less than the steps done.
            UserError: The network or the vocabulary differs.
        """
        done = checkpoint.metadata.state.step
        if self.settings.max_steps < done:
            raise UsageError(
                f"{self.folder} has done {done:,} steps already; max_steps must be at least {done}, not "
                f"{self.settings.max_steps}"
            )
        check_vocabulary(checkpoint, dataset)
        for name in ModelConfig.model_fields.keys() - {"dropout"}:
            saved, wanted = getattr(checkpoint.config, name), getattr(config, name)
            if saved != wanted:
                resume = command("train.py", "--resume", self.folder)
                raise UserError(
                    f"{checkpoint.path}: {name} is {saved} there, but {wanted} in the settings; resume the run with "
                    f"its own settings: {resume}"
                )
        defaults = {key: field.default for key, field in TrainSettings.model_fields.items()}
        was, now = defaults | checkpoint.metadata.settings, self.settings.model_dump()
        decisive = {"dropout", *Optimization.model_fields} - {"max_steps"}  # a run may be resumed with more steps
        changed = [
            f"{key} {shorten(was.get(key))} -> {value}"
            for key, value in now.items()
            if key in decisive and was.get(key) != value
        ]
        if changed and self.runtime.is_main:
            warn(f"settings have changed since the run began: {', '.join(changed)}")
        if checkpoint.metadata.data != dataset.meta.fingerprint and self.runtime.is_main:
            warn(f"{dataset.folder} has changed since the run began; the run continues, but not exactly")

    def log_start(self, parameters: int, train_tokens: int, rows_per_epoch: int, step: int) -> None:
        """Print one line that describes the run, and another one if it resumes after some steps."""
        settings, runtime = self.settings, self.runtime
        sequences = settings.max_steps * settings.batch_size * settings.gradient_accumulation_steps
        epochs = sequences / rows_per_epoch
        processes = f", {runtime.world_size} processes" if runtime.world_size > 1 else ""
        self.log(
            f"{self.folder}: {parameters:,} parameters on {runtime.device}, "
            f"{str(runtime.dtype).removeprefix('torch.')}{processes}; {self.tokens_per_step:,} tokens a step, "
            f"{settings.max_steps:,} steps = {epochs:.2f} epochs over {train_tokens:,} tokens"
        )
        if step:
            self.log(f"resumed after step {step:,} of {settings.max_steps:,}")

    @contextmanager
    def recording(self, state: TrainState) -> Iterator[None]:
        """Open the metrics and the progress bar, and handle signals as requests to stop."""
        self.start_time = time.perf_counter() - state.seconds
        hidden = None if self.runtime.is_main else True  # None hides the bar where there is no terminal
        self.bar = tqdm(total=self.settings.max_steps, initial=state.step, unit="step", disable=hidden)
        self.metrics = Metrics(self.settings, wandb_id=self.wandb_id, silent=not self.runtime.is_main)
        with closing(self.metrics), self.stop.listening(), self.bar:
            if self.settings.resume:
                self.write_config(self.folder)
                self.metrics.open(keep_steps=state.step)
            yield

    def change_settings(self, settings: TrainSettings) -> None:
        """Continue with another number of steps."""
        self.settings = settings
        self.bar.total = settings.max_steps
        self.log(f"the machine's speed has changed: now {settings.max_steps:,} steps")
        if self.has_files:
            self.write_config(self.folder)

    def seconds(self) -> float:
        """Return the time spent on this run, in this process and in those before it."""
        return round(time.perf_counter() - self.start_time, 3)

    def log_step(self, step: int, metrics: StepMetrics) -> None:
        """Show an update on the progress bar, and write a row of metrics every `log_every` steps."""
        speed = (self.bar.format_dict["rate"] or 0.0) * self.tokens_per_step
        self.times.append(time.perf_counter())
        utilization = self.utilization()
        shown = "".join(f", {value:.0%} MFU" for value in utilization.values())
        self.bar.set_postfix_str(f"loss {metrics.loss:.3f}, {speed:,.0f} tokens/s{shown}", refresh=False)
        self.bar.update()
        if self.bar.disable and time.perf_counter() - self.log_time > LOG_SECONDS:
            self.log(f"step {step:,}: training loss {metrics.loss:.3f}")
        if step % self.settings.log_every == 0:
            self.write_metrics("train", step, metrics, **utilization)

    def utilization(self) -> dict[str, float]:
        """Return the model FLOPs utilization of the last updates as "mfu", if it is known.

        It is the fraction of the GPUs' peak speed that the products of the forward and the backward pass take
        (Chowdhery et al. 2022, PaLM, appendix B).
        """
        if not self.seconds_at_peak or len(self.times) < 2:
            return {}
        step = median(after - before for before, after in pairwise(self.times))
        return {"mfu": round(self.seconds_at_peak / step, 4)}

    def write_metrics(self, kind: str, step: int, metrics: StepMetrics | Score, **more: float) -> None:
        """Write a row of metrics."""
        tokens = step * self.tokens_per_step
        self.metrics.write(kind, step, **asdict(metrics), **more, tokens=tokens, seconds=self.seconds())

    def log_best(self, step: int, score: Score) -> None:
        """Write a row of metrics with the best model's score on the whole validation split, and print the score."""
        self.write_metrics("best", step, score)
        self.whole_split_loss = score.loss
        self.log(f"the best model on the whole validation split: {score}")

    def save(self, checkpoints: dict[str, Checkpoint]) -> None:
        """Write checkpoints by file name, in this order. The first ones of a new run replace an earlier run.

        The earlier run stays complete until all files of the new one can take its place.

        Raises:
            UserError: A file could not be written; the previous file of that name is unchanged.
        """
        if self.has_files:
            for name, checkpoint in checkpoints.items():
                save_checkpoint(checkpoint, self.folder / name)
            return
        with replace_files(self.folder, stale=(*({BEST} - checkpoints.keys()), REPORT, PLOT)) as new:
            for name, checkpoint in checkpoints.items():
                save_checkpoint(checkpoint, new / name)
            self.metrics.write_held(new)
            self.write_config(new)
        self.metrics.open(keep_steps=math.inf)
        self.has_files = True

    def write_config(self, folder: Path) -> None:
        """Write the settings with which this run can be resumed or repeated from any working directory."""
        if self.runtime.is_main:
            settings = self.settings.model_dump(exclude=set(Mode.model_fields))
            absolute = {key: str(Path(settings[key]).absolute()) for key in PATHS if settings[key]}
            write_atomic(folder / CONFIG, tomli_w.dumps(settings | absolute).encode())

    def log(self, text: str) -> None:
        """Print a text above the progress bar. If nobody reads the output any more, request a stop."""
        self.log_time = time.perf_counter()
        if self.runtime.is_main:
            try:
                tqdm.write(text)
            except OSError as error:
                if is_broken_pipe(error):
                    self.stop.stop_on_broken_pipe()

    def log_end(self, state: TrainState, stopped_by: signal.Signals | None) -> None:
        """Print how the run ended and what to do next; `stopped_by` is the signal that interrupted it."""
        end = outcome(self.settings, state, self.folder)
        if stopped_by:
            self.log(f"{end.text} by {stopped_by.name}, saved; resume it: {end.resume}")
            return
        self.log(f"{end.text}; best validation loss {self.whole_split_loss or state.best_loss:.4f}")
        with suppress(UserError):  # damaged metrics; the reports warn of them
            if self.runtime.is_main and (notice := overfitting(read_metrics(self.folder))):
                self.log(notice)
        self.log(f"sample it: {command('sample.py', self.folder)}")
        self.log(f"continue training: {end.resume}")

    def exit_status(self, stopped_by: signal.Signals | None) -> int:
        """Return the exit status: 0, or that of the signal or the broken pipe that stopped the run."""
        if stopped_by:
            return 128 + stopped_by
        return BROKEN_PIPE_STATUS if self.stop.broken_pipe else 0
