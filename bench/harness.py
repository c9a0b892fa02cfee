"""The harness of bench/faults.py: a workspace with a reference run, the scripts as processes, checks, and tallies.

A check returns a description of the failure, or an empty string if it passes.
"""

import json
import multiprocessing
import os
import random
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glyphgpt import checkpoint as checkpoints
from glyphgpt.errors import UserError
from glyphgpt.files import BEST, LAST, READY
from glyphgpt.settings import TrainSettings
from glyphgpt.training.metrics import SAMPLES

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["to be", "or not", "the king", "my lord,", "good night.\n", "exit", "Ophelia:", "why?"]
STEPS = 60
"""Updates of a run."""
TIMEOUT = 120
"""Seconds after which a process that still runs is a failure."""

# The server imports torch once and forks each process from itself, which saves the import; nothing else is shared.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "train", "sample", "prepare"])


@dataclass
class Tally:
    """The number of trials of a fault, and their failures."""

    trials: int = 0
    failures: list[str] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    """Counts of what happened in the trials, for the table."""
    measurements: list[str] = field(default_factory=list)
    """Text for the table."""

    def add_trial(self, failure: str) -> None:
        """Count a trial, which passed if `failure` is empty."""
        self.trials += 1
        if failure:
            self.failures.append(failure)

    def count(self, outcome: str) -> None:
        """Count an outcome."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def __str__(self) -> str:
        details = [*self.measurements, *(f"{outcome}: {count}" for outcome, count in sorted(self.outcomes.items()))]
        passed = f"{self.trials - len(self.failures):,} of {self.trials:,}"
        return passed + (f" ({', '.join(details)})" if details else "")


class Workspace:
    """A scratch folder with a small dataset, the runs trained on it, and a reference run without faults."""

    def __init__(self, scratch: Path, seed: int) -> None:
        """Write and prepare the text."""
        torch.set_num_threads(1)  # tiny networks gain nothing from more
        self.scratch, self.rng = scratch, random.Random(seed)
        self.data_dir = scratch / "data"
        self._run_count = 0
        file = self.write_text("small", 6000)
        self.text = file.read_text(encoding="utf-8")
        self.prepare(file, "small")

    def write_text(self, name: str, characters: int, seed: int = 0) -> Path:
        """Write a text with enough structure to learn."""
        rng, text = random.Random(seed), ""
        while len(text) < characters:
            text += rng.choice(WORDS) + " "
        path = self.scratch / f"{name}.txt"
        path.write_text(text[:characters], encoding="utf-8")
        return path

    def prepare(self, text: Path, name: str, *flags: str) -> None:
        """Prepare a text as a dataset."""
        program = Program(self, "prepare.py", [*self.prepare_args(text, name), *flags])
        if program.wait():
            raise RuntimeError(program.stderr())

    def prepare_args(self, text: Path, name: str) -> list[str]:
        """Return the arguments with which prepare.py prepares a text."""
        return [str(text), f"--name={name}", f"--data_dir={self.data_dir}", "--overwrite"]

    def new_run_dir(self) -> Path:
        """Return the path of an unused run folder."""
        self._run_count += 1
        return self.scratch / f"run-{self._run_count}"

    def train_args(self, out_dir: Path, **changes: object) -> list[str]:
        """Return the arguments of a run of half a second, with a learning rate at which every difference shows."""
        settings = {
            "dataset": "small", "data_dir": self.data_dir, "out_dir": out_dir, "dtype": "float32", "device": "cpu",
            "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "position": "rotary", "ngram": 2,
            "ngram_rows": 20, "batch_size": 4, "max_steps": STEPS, "optimizer": "muon", "learning_rate": 0.03,
            "warmup_steps": 5, "schedule": "constant", "dropout": 0.1, "eval_every": 10, "eval_tokens": 200,
            "save_every": 1, "sample_tokens": 5, "log_every": 1,
        }  # fmt: skip
        return [f"--{key}={value}" for key, value in {**settings, **changes}.items()]

    def train_settings(self, out_dir: Path, **changes: object) -> TrainSettings:
        """Return the settings of the same run."""
        pairs = (flag[2:].split("=", 1) for flag in self.train_args(out_dir, **changes))
        return TrainSettings.model_validate(dict(pairs))

    def train(self, out_dir: Path, **changes: object) -> "Program":
        """Start train.py, which resumes the run if the folder holds one."""
        return Program(self, "train.py", self.train_args(out_dir, **self.restart_flag(out_dir), **changes))

    def restart_flag(self, out_dir: Path) -> dict[str, bool]:
        """Return the flag with which a user restarts an interrupted run; a best model alone is that of step 0."""
        if (out_dir / LAST).exists() or (out_dir / READY / LAST).exists():
            return {"resume": True}
        return {"overwrite": True} if (out_dir / BEST).exists() else {}

    @cached_property
    def reference_run(self) -> Path:
        """The folder of a run without faults; `seconds` is its duration."""
        out_dir = self.new_run_dir()
        started = time.perf_counter()
        program = self.train(out_dir)
        if program.wait():
            raise RuntimeError(program.stderr())
        self.seconds = time.perf_counter() - started
        return out_dir

    @property
    def checkpoint_bytes(self) -> int:
        """The size of a run's last checkpoint."""
        return (self.reference_run / LAST).stat().st_size

    def finish_and_compare(self, out_dir: Path) -> str:
        """Check that the run trains to its end with the same result as the reference run."""
        program = self.train(out_dir)
        if status := program.wait():
            return f"the restart ended with status {status}: {program.stderr()}"
        return compare_runs(self.reference_run, out_dir)

    def random_delay(self, out_dir: Path) -> float:
        """Return random seconds, at most the duration of the run, or of what remains of the run in the folder."""
        assert self.reference_run
        rows = read_metrics(out_dir)[-1:] if (out_dir / "metrics.jsonl").exists() else []
        done = rows[0]["step"] / STEPS if rows else 0
        return self.rng.uniform(0, self.seconds * (1 - 0.7 * done))  # the start takes three tenths


class Program:
    """A script in a process of its own, as from a command line."""

    def __init__(
        self,
        workspace: Workspace,
        script: str,
        args: list[str],
        *,
        before: Callable[..., None] | None = None,
        **before_args: Any,
    ) -> None:
        """Start the script; its process first calls `before` with the keyword arguments."""
        self.log = workspace.scratch / f"log-{time.monotonic_ns()}"
        self._process = FORKSERVER.Process(target=run_script, args=(script, args, self.log, before, before_args))
        self._process.start()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal once the script has begun, if it still runs."""
        while not Path(f"{self.log}.err").exists() and self.running():
            time.sleep(0.001)
        if self.running():
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for the exit, and return its status: minus the signal if a signal ended the process."""
        self._process.join(TIMEOUT)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"still running after {TIMEOUT} s: {self.stderr()}")
        return self._process.exitcode

    def stderr(self) -> str:
        """Return the standard error so far."""
        return Path(f"{self.log}.err").read_text(encoding="utf-8", errors="replace")

    def running(self) -> bool:
        """Return whether the process still runs."""
        return self._process.is_alive()

    def check_exit(self, expected: int | None = None) -> str:
        """Check that the status is the expected one, or 0, 1 or 2, and that a failed script prints one error line."""
        status, stderr = self.wait(), self.stderr()
        error_lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
        allowed = (0, 1, 2) if expected is None else (expected,)
        if "Traceback" in stderr or status not in allowed or len(error_lines) != (status != 0):
            return f"status {status}: {stderr[-2000:]}"
        return ""


def run_script(
    script: str, args: list[str], log: Path, before: Callable[..., None] | None, before_args: dict[str, Any]
) -> None:
    """Run a script in this process as Python would, with standard output and error in files."""
    try:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if before:
            before(**before_args)
        sys.argv = [script, *args]
        torch.set_num_threads(1)
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except KeyboardInterrupt:  # before the script handles it; Python ends a process in the same way
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def compare_runs(expected: Path, actual: Path) -> str:
    """Check that two runs have the same bits of weights, optimizer state, metrics and samples; times may differ."""
    for name in (BEST, LAST):
        first, second = (checkpoints.load_checkpoint(folder / name) for folder in (expected, actual))
        for part in ("model", "optimizer"):
            arrays, others = getattr(first, part), getattr(second, part)
            if arrays.keys() != others.keys() or any(arrays[key].tobytes() != others[key].tobytes() for key in arrays):
                return f"{name}: different {part}"
        states = [checkpoint.metadata.state.model_dump(exclude={"seconds"}) for checkpoint in (first, second)]
        if states[0] != states[1]:
            return f"{name}: different training state"
    if read_metrics(expected) != read_metrics(actual):
        return "different metrics"
    return "" if (expected / SAMPLES).read_bytes() == (actual / SAMPLES).read_bytes() else "different samples"


def read_metrics(folder: Path, *, times: bool = False) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics, without an incomplete last line, and without times unless requested."""
    complete = (folder / "metrics.jsonl").read_text(encoding="utf-8").rpartition("\n")[0]
    rows = map(json.loads, complete.splitlines())
    return [{key: value for key, value in row.items() if times or key != "seconds"} for row in rows]


def check_checkpoints(out_dir: Path) -> str:
    """Check that every checkpoint loads, and that none is older than the last one known to be saved.

    The run must save at each step. A row of metrics for a step shows that the step before it was saved.
    """
    names = [name for name in (BEST, LAST) if (out_dir / name).exists()]
    try:
        steps = {name: checkpoints.load_checkpoint(out_dir / name).metadata.state.step for name in names}
    except UserError as error:
        return str(error)
    rows = read_metrics(out_dir)[-1:] if (out_dir / "metrics.jsonl").exists() else []
    saved = rows[0]["step"] - 1 if rows else 0
    return f"step {saved} was saved, and is lost" if saved > steps.get(LAST, 0) else ""


def check_call(function: Callable[[], object], tally: Tally) -> str:
    """Call a function, and check that it succeeds or raises an error for the user, and nothing else."""
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), np.errstate(all="ignore"):
            function()
    except (UserError, SystemExit):
        tally.count("rejected")
        return ""
    except Exception as error:  # any other exception would show the user a traceback
        return f"{type(error).__name__}: {error}"
    tally.count("accepted")
    return ""


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
