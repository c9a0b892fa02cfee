"""What the attacks of bench/faults.py share: a scratch folder, runs to compare with, processes, and counts."""

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
"""Of a run."""
PATIENCE = 120
"""Seconds that any process may take."""

# A server that has imported torch once forks each process in an instant; nothing else of it is shared.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "train", "sample", "prepare"])


@dataclass
class Tally:
    """How often an attack was tried, and what went wrong."""

    tried: int = 0
    troubles: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    """What else was counted."""
    remarks: list[str] = field(default_factory=list)
    """What else was measured."""

    def add(self, trouble: str) -> None:
        """Count one try; `trouble` says what went wrong, and is empty where nothing did."""
        self.tried += 1
        if trouble:
            self.troubles.append(trouble)

    def note(self, what: str) -> None:
        """Count something else."""
        self.notes[what] = self.notes.get(what, 0) + 1

    def __str__(self) -> str:
        """Tell the figures."""
        notes = ", ".join([*self.remarks, *(f"{what}: {count}" for what, count in sorted(self.notes.items()))])
        return f"{self.tried - len(self.troubles):,} of {self.tried:,}" + (f" ({notes})" if notes else "")


class Arena:
    """A scratch folder with a small data set, and an undisturbed run on it."""

    def __init__(self, scratch: Path, seed: int) -> None:
        """Prepare the text."""
        torch.set_num_threads(1)  # tiny networks gain nothing from more
        self.scratch, self.random = scratch, random.Random(seed)
        self.data_dir = scratch / "data"
        self._runs = 0
        file = self.write_text("small", 6000)
        self.text = file.read_text(encoding="utf-8")
        self.prepare(file, "small")

    def write_text(self, name: str, characters: int, seed: int = 0) -> Path:
        """Write a text with enough pattern to learn."""
        chosen, text = random.Random(seed), ""
        while len(text) < characters:
            text += chosen.choice(WORDS) + " "
        path = self.scratch / f"{name}.txt"
        path.write_text(text[:characters], encoding="utf-8")
        return path

    def prepare(self, text: Path, name: str) -> None:
        """Prepare a text."""
        program = Program(self, "prepare.py", self.preparation(text, name))
        if program.wait():
            raise RuntimeError(program.errors())

    def preparation(self, text: Path, name: str) -> list[str]:
        """Return the command line that prepares a text."""
        return [str(text), f"--name={name}", f"--data_dir={self.data_dir}", "--overwrite"]

    def new_run(self) -> Path:
        """Return a folder for a run that nobody has used."""
        self._runs += 1
        return self.scratch / f"run-{self._runs}"

    def flags(self, out_dir: Path, **changes: object) -> list[str]:
        """Return the command line of a run of half a second, restless enough that nothing comes out right by luck."""
        settings = {
            "dataset": "small", "data_dir": self.data_dir, "out_dir": out_dir, "dtype": "float32", "device": "cpu",
            "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "position": "rotary", "ngram": 2,
            "ngram_rows": 20, "batch_size": 4, "max_steps": STEPS, "optimizer": "muon", "learning_rate": 0.03,
            "warmup_steps": 5, "schedule": "constant", "dropout": 0.1, "eval_every": 10, "eval_tokens": 200,
            "save_every": 1, "sample_tokens": 5, "log_every": 1, "plot": False,
        }  # fmt: skip
        return [f"--{key}={value}" for key, value in {**settings, **changes}.items()]

    def settings(self, out_dir: Path, **changes: object) -> TrainSettings:
        """Return the same as settings."""
        pairs = (flag[2:].split("=", 1) for flag in self.flags(out_dir, **changes))
        return TrainSettings.model_validate(dict(pairs))

    def train(self, out_dir: Path, **changes: object) -> "Program":
        """Start a training, which goes on where the folder holds a run."""
        return Program(self, "train.py", self.flags(out_dir, **self.whatever_is_there(out_dir), **changes))

    def whatever_is_there(self, out_dir: Path) -> dict[str, bool]:
        """Return the flag with which a user would go on after a mishap; a best model alone is of step 0."""
        if (out_dir / LAST).exists() or (out_dir / READY / LAST).exists():
            return {"resume": True}
        return {"overwrite": True} if (out_dir / BEST).exists() else {}

    @cached_property
    def straight(self) -> Path:
        """The folder of a run that nothing disturbed."""
        out_dir = self.new_run()
        started = time.perf_counter()
        program = self.train(out_dir)
        if program.wait():
            raise RuntimeError(program.errors())
        self.seconds = time.perf_counter() - started
        return out_dir

    @property
    def size(self) -> int:
        """Bytes of a run's last checkpoint."""
        return (self.straight / LAST).stat().st_size

    def finished(self, out_dir: Path) -> str:
        """Train a run to its end, and say what differs from the undisturbed one."""
        program = self.train(out_dir)
        if status := program.wait():
            return f"going on ended with {status}: {program.errors()}"
        return difference(self.straight, out_dir)

    def moment(self, out_dir: Path) -> float:
        """Return a random moment of a run, in seconds from its start, or from going on with what the folder holds."""
        assert self.straight
        done = metrics(out_dir)[-1:] if (out_dir / "metrics.jsonl").exists() else []
        share = done[0]["step"] / STEPS if done else 0
        return self.random.uniform(0, self.seconds * (1 - 0.7 * share))  # three tenths are the start


class Program:
    """One of the scripts as a process of its own, as from a command line."""

    def __init__(
        self,
        arena: Arena,
        script: str,
        words: list[str],
        *,
        before: Callable[..., None] | None = None,
        **arguments: Any,
    ) -> None:
        """Start it; `before` is called in the process, with the arguments, before the script runs."""
        self.log = arena.scratch / f"log-{time.monotonic_ns()}"
        self._process = FORKS.Process(target=as_script, args=(script, words, self.log, before, arguments))
        self._process.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process.pid
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal once the script has begun, if it still runs."""
        while not Path(f"{self.log}.err").exists() and self.running():
            time.sleep(0.001)
        if self.running():
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end, and return its status, negative where a signal ended it."""
        self._process.join(PATIENCE)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"still running after {PATIENCE} s: {self.errors()}")
        return self._process.exitcode

    def errors(self) -> str:
        """Return what it wrote on standard error."""
        return Path(f"{self.log}.err").read_text(encoding="utf-8", errors="replace")

    def running(self) -> bool:
        """Tell whether it has not ended yet."""
        return self._process.is_alive()

    def complaint(self, expect: int | None = None) -> str:
        """Wait for its end, and say what is wrong with it: a failure is one clear line and status 1 or 2."""
        status, said = self.wait(), self.errors()
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        wanted = (0, 1, 2) if expect is None else (expect,)
        if "Traceback" in said or status not in wanted or len(lines) != (status != 0):
            return f"status {status}: {said[-2000:]}"
        return ""


def as_script(script: str, words: list[str], log: Path, before: Callable[..., None] | None, arguments: Any) -> None:
    """Run a script in this process, as Python itself would."""
    try:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if before:
            before(**arguments)
        sys.argv = [script, *words]
        torch.set_num_threads(1)
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except KeyboardInterrupt:  # before the script's first line of its own; Python itself would end so
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def difference(one: Path, other: Path) -> str:
    """Say what differs between two runs, but for times; nothing, if weights, metrics and samples are the same bits."""
    for name in (BEST, LAST):
        first, second = (checkpoints.load_checkpoint(folder / name) for folder in (one, other))
        for part in ("model", "optimizer"):
            arrays, others = getattr(first, part), getattr(second, part)
            if arrays.keys() != others.keys() or any(arrays[key].tobytes() != others[key].tobytes() for key in arrays):
                return f"{name}: another {part}"
        progress = [checkpoint.metadata.state.model_dump(exclude={"seconds"}) for checkpoint in (first, second)]
        if progress[0] != progress[1]:
            return f"{name}: other progress"
    rows = [metrics(folder) for folder in (one, other)]
    samples = [(folder / SAMPLES).read_bytes() for folder in (one, other)]
    return "other metrics" if rows[0] != rows[1] else "other samples" if samples[0] != samples[1] else ""


def metrics(folder: Path, *, times: bool = False) -> list[dict[str, Any]]:
    """Return the whole lines of a run's metrics, without their times unless these are asked for."""
    whole = (folder / "metrics.jsonl").read_text(encoding="utf-8").rpartition("\n")[0]
    rows = map(json.loads, whole.splitlines())
    return [{key: value for key, value in row.items() if times or key != "seconds"} for row in rows]


def lost(out_dir: Path) -> str:
    """Say what a mishap has cost a run that saves at each step: a checkpoint that does not load, or steps before."""
    there = [name for name in (BEST, LAST) if (out_dir / name).exists()]
    try:
        steps = {name: checkpoints.load_checkpoint(out_dir / name).metadata.state.step for name in there}
    except UserError as failure:
        return str(failure)
    told = metrics(out_dir)[-1:] if (out_dir / "metrics.jsonl").exists() else []
    safe = told[0]["step"] - 1 if told else 0  # was saved before the step that was told of
    return f"step {safe} was saved, and is gone" if safe > steps.get(LAST, 0) else ""


def trouble(work: Callable[[], object], tally: Tally) -> str:
    """Do something in this process; say what came that would have been a traceback."""
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), np.errstate(all="ignore"):
            work()
    except (UserError, SystemExit):
        tally.note("refused")
        return ""
    except Exception as error:  # whatever it is, a user would have seen it
        return f"{type(error).__name__}: {error}"
    tally.note("taken")
    return ""


def peak_memory() -> int:
    """Return the most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
