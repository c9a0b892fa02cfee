"""Inject faults into glyphgpt, check that it keeps its invariants, and add a table to bench/RESULTS.md.

    python bench/faults.py                               every fault; two and a half hours, one of them random-sequences
    python bench/faults.py --faults=kill,corruption --scale=0.1

Needs the `dev` extra, and Linux or macOS. A fault is, for example, a kill, a full disk, a corrupt file or a hostile
input. A row of the table counts the trials of one fault that passed. If a trial fails, the output shows the failure,
and the exit status is 1. Training uses one CPU thread, so a run that is interrupted and restarted must end with the
same bits as one without faults. tests/bench/test_faults.py runs a few trials of each fault.
"""

import argparse
import errno
import io
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

import hostile
from glyphgpt import checkpoint as checkpoints
from glyphgpt.files import LAST, NEW, READY
from harness import ROOT, STEPS, TIMEOUT, Program, Tally, Workspace, check_checkpoints, compare_runs, read_metrics

RESULTS = ROOT / "bench" / "RESULTS.md"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def kill(workspace: Workspace, trials: int) -> Tally:
    """SIGKILL a training at one to three random times, and restart it: the same bits as the reference run."""
    tally = Tally()
    for _ in tqdm(range(trials), desc="kill", leave=False):
        out_dir = workspace.new_run_dir()
        for _ in range(workspace.rng.randint(1, 3)):
            program = workspace.train(out_dir)
            time.sleep(workspace.random_delay(out_dir))
            program.send(signal.SIGKILL)
            tally.count("killed" if program.wait() == -signal.SIGKILL else "finished before")
        tally.add_trial(check_checkpoints(out_dir) or workspace.finish_and_compare(out_dir))
        shutil.rmtree(out_dir)
    return tally


def stop_signals(workspace: Workspace, trials: int) -> Tally:
    """Send SIGINT, SIGTERM or SIGHUP at a random time, sometimes twice: saved, and the same bits after a restart."""
    tally = Tally()
    for trial in tqdm(range(trials), desc="signals", leave=False):
        out_dir, number = workspace.new_run_dir(), SIGNALS[trial % 3]
        program = workspace.train(out_dir)
        time.sleep(workspace.random_delay(out_dir))
        program.send(number)
        if trial % 9 >= 6:
            time.sleep(workspace.rng.uniform(0, 0.03))
            program.send(number)
        failure = check_stopped(program, number, tally) or check_checkpoints(out_dir)
        tally.add_trial(failure or workspace.finish_and_compare(out_dir))
        shutil.rmtree(out_dir)
    return tally


def check_stopped(program: Program, number: signal.Signals, tally: Tally) -> str:
    """Check how a program ended after a signal.

    The status is 128 + the signal if the program handled it; minus the signal if the system ended the program, before
    its handler was installed or at the second signal; and 0 if the program had finished.
    """
    status, stderr = program.wait(), program.stderr()
    tally.count({0: "finished before", 128 + number: "stopped"}.get(status, "ended at once"))
    if "Traceback" in stderr or "error: " in stderr or status not in (0, 128 + number, -number):
        return f"{number.name}: status {status}: {stderr[-2000:]}"
    return ""


def start_python(workspace: Workspace, *args: str, **environment: str) -> "subprocess.Popen[str]":
    """Start Python in a process group of its own, as a terminal does, with an empty compiler cache."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(workspace.scratch / f"cache-{time.monotonic_ns()}")}
    return subprocess.Popen(
        [sys.executable, *args], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        encoding="utf-8", cwd=ROOT,
        env={**os.environ, **cache, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def early_signals(workspace: Workspace, trials: int) -> Tally:
    """Send Ctrl-C to a process group while the program imports torch, compiles or takes its first steps."""
    tally = Tally()
    for trial in tqdm(range(trials), desc="early signals", leave=False):
        out_dir, compiled = workspace.new_run_dir(), trial % 2 == 1
        process = start_python(workspace, "train.py", *workspace.train_args(out_dir, compile=compiled))
        time.sleep(workspace.rng.uniform(0.2, 15 if compiled else 4))  # Python itself starts in the first 0.2 s
        os.killpg(process.pid, signal.SIGINT)
        stderr, status = process.communicate(timeout=TIMEOUT)[1], process.returncode
        tally.count({0: "finished before", 130: "stopped"}.get(status, "ended at once"))
        failure = check_checkpoints(out_dir)
        if "Traceback" in stderr or status not in (0, 130, -signal.SIGINT):
            failure = f"status {status}: {stderr[-2000:]}"
        elif not failure and compiled:  # compiled code computes other bits than the reference run
            failure = workspace.train(out_dir).check_exit()
        elif not failure:
            failure = workspace.finish_and_compare(out_dir)
        tally.add_trial(failure)
        shutil.rmtree(out_dir, ignore_errors=True)
    return tally


def lost_process(workspace: Workspace, trials: int) -> Tally:
    """SIGKILL one of two worker processes: the run ends within a minute and names the cause, and restarts exactly."""
    tally, seconds = Tally(), []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    reference = workspace.new_run_dir()
    if start_python(workspace, *torchrun, *workspace.train_args(reference)).wait(TIMEOUT):
        raise RuntimeError("the reference run of two processes failed")
    for _ in tqdm(range(trials), desc="lost process", leave=False):
        out_dir = workspace.new_run_dir()
        process = start_python(workspace, *torchrun, *workspace.train_args(out_dir, max_steps=10**6))
        while not (out_dir / LAST).exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(workspace.rng.uniform(0, 0.5))
        worker = workspace.rng.choice(child_pids(process.pid))
        os.kill(worker, signal.SIGKILL)
        killed = time.perf_counter()
        stderr = process.communicate(timeout=TIMEOUT)[1]
        seconds.append(time.perf_counter() - killed)
        failure = check_checkpoints(out_dir)
        if process.returncode == 0 or "error: lost another process of this run" not in stderr or seconds[-1] > 60:
            failure = f"status {process.returncode} after {seconds[-1]:.0f} s: {stderr[-3000:]}"
        step = checkpoints.load_checkpoint(out_dir / LAST).metadata.state.step
        if not failure and step <= STEPS:
            restart = start_python(workspace, *torchrun, *workspace.train_args(out_dir, resume=True))
            failed = restart.wait(TIMEOUT)
            failure = restart.communicate(timeout=TIMEOUT)[1] if failed else compare_runs(reference, out_dir)
            tally.count("compared with the reference run")
        tally.add_trial(failure)
        shutil.rmtree(out_dir)
    tally.measurements.append(f"the slowest ended after {max(seconds):.1f} s")
    return tally


def child_pids(pid: int) -> list[int]:
    """Return the ids of the processes that a process has started."""
    finished = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(word) for word in finished.stdout.split()]


class FailingCalls:
    """Makes one call of this process that writes to a folder raise an OSError."""

    def __init__(self, folder: str, failing_call: int, error: int, count_file: str) -> None:
        """Replace the functions that write; `failing_call` counts from 1, and `count_file` receives the count."""
        self.folder, self.failing_call, self.error, self.count_file = folder, failing_call, error, count_file
        self.calls = 0
        for name in ("mkdir", "replace", "rename", "unlink", "chmod", "fsync", "open"):
            setattr(os, name, self.wrap(getattr(os, name)))
        self.original_open = io.open
        setattr(io, "open", self.open)  # noqa: B010  (pathlib calls it)
        self.original_save_file = getattr(checkpoints, "save_file")  # noqa: B009
        setattr(checkpoints, "save_file", self.save_file)  # noqa: B010

    def count_call(self, path: object) -> None:
        """Count a call on a path in the folder or on a file descriptor, and raise the error if its turn has come."""
        if not isinstance(path, int) and not str(path).startswith(self.folder):
            return
        self.calls += 1
        with self.original_open(self.count_file, "w") as file:
            file.write(str(self.calls))
        if self.calls == self.failing_call:
            raise OSError(self.error, os.strerror(self.error), None if isinstance(path, int) else str(path))

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of os that counts its calls."""

        def wrapper(path: Any, *args: Any, **kwargs: Any) -> Any:
            self.count_call(path)
            return function(path, *args, **kwargs)

        return wrapper

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Open a file; if it is opened for writing, count the call, and later each write."""
        writes = any(letter in mode for letter in "wax+")
        if writes:
            self.count_call(path)
        file = self.original_open(path, mode, *args, **kwargs)
        return CountingFile(file, self) if writes and str(path).startswith(self.folder) else file

    def save_file(self, tensors: Any, path: Path, metadata: Any) -> None:
        """Write the tensors of a checkpoint; a failure leaves half of the file."""
        self.original_save_file(tensors, path, metadata)
        size = path.stat().st_size
        try:
            self.count_call(path)
        except OSError:
            os.truncate(path, size // 2)
            raise


class CountingFile:
    """A file that counts its writes and flushes as calls of a FailingCalls."""

    def __init__(self, file: Any, calls: FailingCalls) -> None:
        """Wrap an open file."""
        self._file, self._calls = file, calls

    def write(self, content: Any) -> Any:
        """Write, or fail."""
        self._calls.count_call(0)
        return self._file.write(content)

    def flush(self) -> None:
        """Flush, or fail."""
        self._calls.count_call(0)
        self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "CountingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def fail_call(**kwargs: Any) -> None:
    """Make one call of this process that writes fail."""
    FailingCalls(**kwargs)


def failed_writes(workspace: Workspace, trials: int) -> Tally:
    """Make each call that writes fail once, with each of four errors: what was saved stays, and restarts exactly."""
    tally, few_steps, count_file = Tally(), {"max_steps": 6, "eval_every": 3}, workspace.scratch / "calls"

    def start(out_dir: Path, failing_call: int, error: int) -> Program:
        fault = {"folder": str(out_dir), "failing_call": failing_call, "error": error, "count_file": str(count_file)}
        return Program(workspace, "train.py", workspace.train_args(out_dir, **few_steps), before=fail_call, **fault)

    reference = workspace.new_run_dir()
    start(reference, 0, 0).wait()
    calls = range(1, int(count_file.read_text(encoding="utf-8")) + 1)
    faults = [(call, error) for call in calls for error in (errno.ENOSPC, errno.EROFS, errno.ENOENT, errno.EIO)]
    chosen = workspace.rng.sample(faults, min(trials, len(faults)))
    for call, error in tqdm(chosen, desc="failed writes", leave=False):
        out_dir = workspace.new_run_dir()
        failure = start(out_dir, call, error).check_exit() or check_checkpoints(out_dir)
        tally.count(errno.errorcode[error])
        if not failure:
            restart = workspace.train(out_dir, **few_steps)
            failure = restart.check_exit(expected=0) or compare_runs(reference, out_dir)
        tally.add_trial(failure and f"call {call}, {errno.errorcode[error]}: {failure}")
        shutil.rmtree(out_dir, ignore_errors=True)
    tally.measurements.append(f"{len(calls)} calls that write")
    return tally


def limit_file_size(size: int) -> None:
    """Make the system refuse to write any file of this process beyond a size, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_disk(workspace: Workspace, trials: int) -> Tally:
    """Limit files to a random size, or remove the folder during training: one error, and an exact restart."""
    tally = Tally()
    for trial in tqdm(range(trials), desc="full disk", leave=False):
        out_dir, disk_full = workspace.new_run_dir(), trial % 2 == 1
        if disk_full:
            args, size = workspace.train_args(out_dir), workspace.rng.randint(0, workspace.checkpoint_bytes)
            program = Program(workspace, "train.py", args, before=limit_file_size, size=size)
        else:
            program = workspace.train(out_dir)
            time.sleep(workspace.random_delay(out_dir))
            removed = out_dir.with_name("removed")
            if out_dir.exists():
                out_dir.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)
        failure = program.check_exit() or check_checkpoints(out_dir) or workspace.finish_and_compare(out_dir)
        tally.add_trial(failure and f"{'disk full' if disk_full else 'folder removed'}: {failure}")
        shutil.rmtree(out_dir, ignore_errors=True)
    return tally


DTYPES = ("auto", "float32", "bfloat16", "float16")
SMALLER = {
    "gpt2": {"batch_size": 1, "gradient_accumulation_steps": 2, "block_size": 128, "max_steps": 4},
    "nanogpt_gpu": {"batch_size": 6, "max_steps": 6},
}
"""Changes to the configs that are too large for a CPU; the other configs only take fewer steps."""


def configs(workspace: Workspace, trials: int) -> Tally:
    """SIGKILL each committed config, compiled if it says so, on two threads, in each dtype: the same bits again."""
    tally, references = Tally(), {}
    files = sorted((ROOT / "config").glob("*.toml"))
    few_steps = {"dataset": "small", "data_dir": workspace.data_dir, "device": "cpu", "save_every": 1}
    few_steps |= {"max_steps": 12, "log_every": 1, "eval_every": 10**6, "eval_tokens": 500}
    few_steps |= {"report": False}
    environment = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_CACHE_DIR": str(workspace.scratch / "compiled")}

    def start(file: Path, out_dir: Path, **changes: object) -> "subprocess.Popen[str]":
        settings = {**few_steps, **SMALLER.get(file.stem, {}), "out_dir": out_dir, **changes}
        flags = [f"--{key}={value}" for key, value in settings.items()]
        return start_python(workspace, "train.py", str(file), *flags, **environment)

    for trial in tqdm(range(trials), desc="configs", leave=False):
        file, dtype, out_dir = files[trial % len(files)], DTYPES[trial // len(files) % 4], workspace.new_run_dir()
        if (file, dtype) not in references:
            references[file, dtype] = workspace.new_run_dir()
            if failure := check_success(start(file, references[file, dtype], dtype=dtype)):
                tally.add_trial(f"{file.stem}, {dtype}: {failure}")
                continue
        process, steps = start(file, out_dir, dtype=dtype), workspace.rng.randint(1, 3)
        while process.poll() is None:
            if (out_dir / LAST).exists() and (rows := read_metrics(out_dir)) and rows[-1]["step"] > steps:
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.001)
        process.communicate()
        step = checkpoints.read_metadata(out_dir / LAST).state.step
        tally.count(f"at step {step}" if process.returncode else "finished before")
        failure = check_success(start(file, out_dir, dtype=dtype, resume=True))
        failure = failure or compare_runs(references[file, dtype], out_dir)
        tally.add_trial(failure and f"{file.stem}, {dtype}: {failure}")
        shutil.rmtree(out_dir)
    return tally


def check_success(process: "subprocess.Popen[str]") -> str:
    """Check that a program exits with status 0."""
    stderr = process.communicate(timeout=10 * TIMEOUT)[1]
    return f"status {process.returncode}: {stderr[-2000:]}" if process.returncode else ""


def wait_for_path(path: Path, running: Callable[[], bool]) -> None:
    """Wait until a path exists, or the program that creates it has ended."""
    while not path.exists() and running():
        time.sleep(0.001)


def overwrite(workspace: Workspace, trials: int) -> Tally:
    """SIGKILL a run that overwrites another: the folder holds the whole old run or the whole new one."""
    tally, changes = Tally(), {"seed": 7}
    new_reference = workspace.new_run_dir()
    workspace.train(new_reference, **changes).wait()
    for _ in tqdm(range(trials), desc="overwrite", leave=False):
        out_dir = workspace.new_run_dir()
        shutil.copytree(workspace.reference_run, out_dir)
        old = {file.name: file.read_bytes() for file in out_dir.iterdir()}
        program = Program(workspace, "train.py", workspace.train_args(out_dir, overwrite=True, **changes))
        if workspace.rng.random() < 0.8:  # in most trials, kill shortly before the replacement
            wait_for_path(out_dir / NEW, program.running)
        time.sleep(workspace.rng.uniform(0, 0.05))
        program.send(signal.SIGKILL)
        program.wait()
        if (out_dir / READY).exists() or old[LAST] != (out_dir / LAST).read_bytes():
            tally.count("new")
            failure = check_checkpoints(out_dir) or workspace.train(out_dir, **changes).check_exit(expected=0)
            tally.add_trial(failure or compare_runs(new_reference, out_dir))
        else:
            tally.count("old")
            changed = [name for name, content in old.items() if (out_dir / name).read_bytes() != content]
            tally.add_trial(f"changed: {', '.join(changed)}" if changed else "")
        shutil.rmtree(out_dir)
    return tally


def move_run(workspace: Workspace, trials: int) -> Tally:
    """Kill a run, copy or move its folder, and resume it there from any directory: exact, and the original stays."""
    tally = Tally()
    reference = workspace.reference_run
    for trial in tqdm(range(trials), desc="move run", leave=False):
        out_dir, target, copy = workspace.new_run_dir(), workspace.new_run_dir() / "deeper" / "run", trial % 2 == 1
        program = workspace.train(out_dir)
        wait_for_path(out_dir / LAST, program.running)
        time.sleep(workspace.rng.uniform(0, 0.5) * workspace.seconds)
        program.send(signal.SIGKILL)
        program.wait()
        original = {file.name: file.read_bytes() for file in out_dir.iterdir() if file.is_file()}
        target.parent.mkdir(parents=True)
        (shutil.copytree if copy else shutil.move)(out_dir, target)
        tally.count("copied" if copy else "moved")
        directory = workspace.rng.choice([target, target.parent, workspace.scratch, Path("/")])
        path = os.path.relpath(target, directory) if workspace.rng.random() < 0.5 else str(target)
        args = workspace.rng.choice([[f"{path}/config.toml", "--resume"], ["--resume", path]])
        failure = Program(workspace, "train.py", args, before=os.chdir, path=directory).check_exit(expected=0)
        if copy and original != {file.name: file.read_bytes() for file in out_dir.iterdir() if file.is_file()}:
            failure = "the original was changed"
        if not copy and out_dir.exists():
            failure = "the old folder was written to"
        tally.add_trial(failure or compare_runs(reference, target))
        shutil.rmtree(target.parent.parent)
    return tally


def close_streams(streams: list[int]) -> None:
    """Close standard streams of this process, as daemons do."""
    sys.stdin, sys.stdout, sys.stderr = (
        None if number in streams else stream for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr))
    )
    for number in streams:
        os.close(number)


def closed_streams(workspace: Workspace, trials: int) -> Tally:
    """Close standard streams before a training, or the reader of its output at a random time: nothing is lost."""
    tally = Tally()
    for trial in tqdm(range(trials), desc="closed streams", leave=False):
        out_dir = workspace.new_run_dir()
        args = workspace.train_args(out_dir)
        if trial % 2:
            streams = workspace.rng.sample(range(3), workspace.rng.randint(1, 3))
            program = Program(workspace, "train.py", args, before=close_streams, streams=streams)
            failure = program.check_exit(expected=0)
            tally.count("streams closed")
        else:
            read_end, write_end = os.pipe()
            process = subprocess.Popen(
                [sys.executable, "train.py", *args], stdout=write_end, stderr=subprocess.PIPE, text=True,
                cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            os.close(write_end)
            while not (out_dir / LAST).exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(workspace.rng.uniform(0, 0.3))
            os.close(read_end)
            stderr, status = process.communicate(timeout=TIMEOUT)[1], process.returncode
            tally.count({0: "finished before", 141: "reader closed"}.get(status, f"status {status}"))
            failure = f"status {status}: {stderr[-2000:]}" if stderr or status not in (0, 141) else ""
        tally.add_trial(failure or check_checkpoints(out_dir) or workspace.finish_and_compare(out_dir))
        shutil.rmtree(out_dir)
    return tally


OPTIONAL_CALLS = ("chmod", "fchmod", "fsync", "utime", "get_terminal_size")


def refuse_calls(calls: list[str], error: int) -> None:
    """Make every call of these functions of os fail, as on file systems that do not support them."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    for call in calls:
        setattr(os, call, refuse)


def optional_calls(workspace: Workspace, trials: int) -> Tally:
    """Make calls that training can do without fail throughout: the same bits, and no error."""
    tally = Tally()
    errors = [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL]
    for _ in tqdm(range(trials), desc="optional calls", leave=False):
        out_dir, error = workspace.new_run_dir(), workspace.rng.choice(errors)
        calls = workspace.rng.sample(OPTIONAL_CALLS, workspace.rng.randint(1, len(OPTIONAL_CALLS)))
        calls = [call for call in calls if call != "fsync" or error != errno.EPERM]  # fsync never returns EPERM
        args = workspace.train_args(out_dir)
        program = Program(workspace, "train.py", args, before=refuse_calls, calls=calls, error=error)
        failure = program.check_exit(expected=0)
        tally.count(errno.errorcode[error])
        tally.add_trial(f"{calls}: {failure}" if failure else compare_runs(workspace.reference_run, out_dir))
        shutil.rmtree(out_dir)
    return tally


def concurrent_runs(workspace: Workspace, trials: int) -> Tally:
    """Start two trainings in one folder: one is refused, and the other ends like the reference run."""
    tally = Tally()
    for _ in tqdm(range(trials), desc="concurrent runs", leave=False):
        out_dir = workspace.new_run_dir()
        first = workspace.train(out_dir)
        time.sleep(workspace.rng.choice((0, workspace.random_delay(out_dir))))
        second = Program(workspace, "train.py", workspace.train_args(out_dir))
        failure = first.check_exit() + second.check_exit()
        statuses = sorted((first.wait(), second.wait()))
        if statuses != [0, 2]:
            failure += f"statuses {statuses}"
        tally.add_trial(failure or compare_runs(workspace.reference_run, out_dir))
    return tally


def concurrent_prepare(workspace: Workspace, trials: int) -> Tally:
    """Prepare a dataset again while training reads it: training uses the whole old or new text, or is refused."""
    tally = Tally()
    texts = [workspace.write_text(f"text-{seed}", 6000, seed) for seed in (1, 2)]
    references = []
    for text in texts:
        workspace.prepare(text, "changing")
        references.append(workspace.new_run_dir())
        workspace.train(references[-1], dataset="changing").wait()
    for trial in tqdm(range(trials), desc="concurrent prepare", leave=False):
        out_dir, text = workspace.new_run_dir(), texts[1 - trial % 2]
        preparation = Program(workspace, "prepare.py", workspace.prepare_args(text, "changing"))
        time.sleep(workspace.rng.uniform(0, 0.15))
        training = workspace.train(out_dir, dataset="changing")
        failure, status = training.check_exit() or preparation.check_exit(expected=0), training.wait()
        tally.count("refused" if status else "trained")
        if not failure and status == 0 and all(compare_runs(reference, out_dir) for reference in references):
            failure = "the run is that of neither text"
        tally.add_trial(failure)
    return tally


def random_sequences(workspace: Workspace, minutes: int) -> Tally:
    """Put runs through random sequences of faults and restarts, for some minutes."""
    tally = Tally()
    end = time.monotonic() + 60 * minutes
    with tqdm(total=minutes, desc="random sequences", unit="min", leave=False) as bar:
        while time.monotonic() < end:
            tally.add_trial(check_sequence(workspace, tally))
            bar.update(round(minutes - (end - time.monotonic()) / 60, 2) - bar.n)
    return tally


EVENTS = ("kill", "stop", "full disk", "sample", "move", "corruption", "prepare")


def check_sequence(workspace: Workspace, tally: Tally) -> str:
    """Check that a run survives a random sequence of events, and ends like the reference run."""
    out_dir, events = workspace.new_run_dir(), []
    for _ in range(workspace.rng.randint(1, 12)):
        events.append(workspace.rng.choice(EVENTS))
        tally.count(events[-1])
        if failure := check_event(workspace, events[-1], out_dir) or check_checkpoints(out_dir):
            return f"{', '.join(events)}: {failure}"
    failure = workspace.finish_and_compare(out_dir)
    return failure and f"{', '.join(events)}, finish: {failure}"


def check_event(workspace: Workspace, event: str, out_dir: Path) -> str:
    """Check the programs' reaction to an event of a run; some events need a checkpoint, and do nothing without one."""
    if event in ("kill", "stop"):
        program, number = workspace.train(out_dir), workspace.rng.choice(SIGNALS)
        time.sleep(workspace.random_delay(out_dir))
        program.send(signal.SIGKILL if event == "kill" else number)
        killed = event == "kill" and program.wait() in (0, -signal.SIGKILL)
        return "" if killed else check_stopped(program, number, Tally())
    if event == "full disk":
        args = workspace.train_args(out_dir, **workspace.restart_flag(out_dir))
        size = workspace.rng.randint(0, workspace.checkpoint_bytes)
        return Program(workspace, "train.py", args, before=limit_file_size, size=size).check_exit()
    if event == "prepare":
        workspace.prepare(workspace.scratch / "small.txt", "small")
        return ""
    return check_checkpoint_event(workspace, event, out_dir) if (out_dir / LAST).exists() else ""


def check_checkpoint_event(workspace: Workspace, event: str, out_dir: Path) -> str:
    """Check the programs' reaction to an event of a run that has a checkpoint."""
    if event == "sample":
        args = [str(out_dir), "--max_new_tokens=20", "--device=cpu"]
        return Program(workspace, "sample.py", args).check_exit(expected=0)
    if event == "move":  # move the run away and copy it back
        moved = workspace.new_run_dir()
        out_dir.rename(moved)
        shutil.copytree(moved, out_dir)
        shutil.rmtree(moved)
        return ""
    return check_corruption(workspace, out_dir / LAST)


def check_corruption(workspace: Workspace, path: Path) -> str:
    """Check that training refuses a checkpoint with one changed bit and leaves it as it is; then repair it."""
    intact = path.read_bytes()
    corrupt = bytearray(intact)
    corrupt[workspace.rng.randrange(len(intact))] ^= 1
    path.write_bytes(corrupt)
    failure = workspace.train(path.parent).check_exit(expected=1)
    if path.read_bytes() != corrupt:
        failure = failure or "a corrupt checkpoint was changed"
    path.write_bytes(intact)
    return failure


def long_run(workspace: Workspace, steps: int) -> Tally:
    """Train for many steps, evaluations and saves: memory, open files and speed stay constant."""
    out_dir, tally = workspace.new_run_dir(), Tally()
    intervals = {"max_steps": steps, "eval_every": max(1, steps // 400), "save_every": max(1, steps // 1000)}
    args = workspace.train_args(out_dir, **intervals, log_every=max(1, steps // 2000))
    program = Program(workspace, "train.py", args)
    usage: list[tuple[int, int]] = []  # KiB, open files
    with tqdm(total=steps, desc="long run", leave=False) as bar:
        while program.running():
            time.sleep(1)
            if (out_dir / "metrics.jsonl").exists() and (rows := read_metrics(out_dir)):
                bar.update(rows[-1]["step"] - bar.n)
                status = Path(f"/proc/{program.pid}/status")
                if resident := re.search(r"VmRSS:\s+(\d+)", status.read_text() if status.exists() else ""):
                    usage.append((int(resident[1]), len(list(Path(f"/proc/{program.pid}/fd").iterdir()))))
    if failure := program.check_exit(expected=0):
        tally.add_trial(failure)
        return tally
    rows = [row for row in read_metrics(out_dir, times=True) if row["kind"] == "train"]
    tenth = len(rows) // 10
    first_speed, last_speed = (
        median((b["step"] - a["step"]) / (b["seconds"] - a["seconds"]) for a, b in pairwise(part))
        for part in (rows[tenth : 2 * tenth], rows[-tenth:])
    )
    (first_memory, first_files), (last_memory, last_files) = usage[len(usage) // 10], usage[-1]
    grown = f"memory grew from {first_memory:,} to {last_memory:,} KiB"
    tally.add_trial("" if last_memory < 1.05 * first_memory else grown)
    tally.add_trial("" if last_files <= first_files else f"open files grew from {first_files} to {last_files}")
    slower = f"{first_speed:.0f} steps a second fell to {last_speed:.0f}"
    tally.add_trial("" if last_speed >= 0.95 * first_speed else slower)
    tally.measurements.append(
        f"{first_memory >> 10} to {last_memory >> 10} MiB, {first_files} to {last_files} open files, "
        f"{last_speed / first_speed:.2f} of the speed"
    )
    return tally


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    description: str
    run: Callable[[Workspace, int], Tally]
    trials: int
    """At --scale=1; minutes of random-sequences, and steps of long-run."""


FAULTS = {
    "kill": Fault("SIGKILL at one to three random times, then restart", kill, 200),
    "signals": Fault("SIGINT, SIGTERM or SIGHUP at a random time, sometimes twice", stop_signals, 100),
    "early-signals": Fault("Ctrl-C while the program starts or compiles", early_signals, 40),
    "lost-process": Fault("SIGKILL of one of two worker processes of torchrun", lost_process, 20),
    "failed-writes": Fault(
        "each call that writes fails: disk full, read-only, missing, I/O error", failed_writes, 10**4
    ),
    "full-disk": Fault("the system refuses to write, or the folder is removed", full_disk, 100),
    "overwrite": Fault("SIGKILL of a run that overwrites another", overwrite, 100),
    "move-run": Fault("a killed run is copied or moved, and resumed there", move_run, 100),
    "closed-streams": Fault("closed standard streams, and readers of the output that close", closed_streams, 100),
    "optional-calls": Fault("chmod, fsync and other optional calls fail throughout", optional_calls, 100),
    "configs": Fault("SIGKILL of each committed config, on two threads, in each dtype", configs, 32),
    "concurrent-runs": Fault("two trainings started in one folder", concurrent_runs, 50),
    "concurrent-prepare": Fault("a dataset is prepared again while training reads it", concurrent_prepare, 50),
    "corruption": Fault("checkpoints truncated, or with a changed byte", hostile.corruption, 1000),
    "forged-checkpoints": Fault("changed checkpoints with a valid checksum", hostile.forged_checkpoints, 2000),
    "forged-datasets": Fault("changed datasets with valid checksums", hostile.forged_datasets, 2000),
    "random-bytes": Fault("random bytes prepared", hostile.random_bytes, 10_000),
    "random-unicode": Fault("random Unicode through every tokenizer", hostile.random_unicode, 10_000),
    "random-links": Fault("folders of random links, named in five ways", hostile.random_links, 100),
    "random-toml": Fault("random TOML files", hostile.random_toml, 10_000),
    "random-command-lines": Fault("random command lines", hostile.random_command_lines, 10_000),
    "unusual-prompts": Fault("unusual prompts", hostile.unusual_prompts, len(hostile.PROMPTS)),
    "long-run": Fault("many steps, evaluations and saves", long_run, 200_000),
    "random-sequences": Fault("random sequences of faults and restarts", random_sequences, 60),
}


def main() -> None:
    """Run the chosen faults, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", default=",".join(FAULTS), help="names (default: all, %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of trials (default 1)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="random seed (default: from the time)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file for the table (default %(default)s)")
    options = parser.parse_args()
    names = options.faults.split(",")
    if unknown := set(names) - FAULTS.keys():
        parser.error(f"unknown faults: {', '.join(sorted(unknown))}")
    rows, failures = [], 0
    for name in names:
        fault = FAULTS[name]
        with tempfile.TemporaryDirectory() as scratch:
            started = time.perf_counter()
            tally = fault.run(Workspace(Path(scratch), options.seed), max(1, round(fault.trials * options.scale)))
            seconds = time.perf_counter() - started
        rows.append(f"| {fault.description} | {tally} | {seconds:.0f} s |")
        print(rows[-1], *tally.failures[:5], sep="\n  ", flush=True)
        failures += len(tally.failures)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    heading = f"## Faults, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    machine = f"{os.cpu_count()} cores, {platform.system()}, commit {commit.stdout.strip()}, seed {options.seed}."
    table = ["| fault | passed | time |", "| --- | --- | --- |", *rows]
    with options.results.open("a", encoding="utf-8") as file:
        file.write("\n".join(["", heading, "", machine, "", *table, ""]))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
