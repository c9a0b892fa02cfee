"""Attack glyphgpt, count what it withstands, and add a table to bench/RESULTS.md.

    python bench/faults.py                               every attack; about two and a half hours, one of them the day
    python bench/faults.py --attacks=kill,cuts --scale=0.1

Needs the `dev` extra, and Linux or macOS. Training runs on one CPU thread, so that "the same bits" is a fair demand; a
server forks the processes, so that they need not import torch each time. A row tells how many tries went as they
should; exit status 1 says that some did not, and what went wrong with them. tests/bench/test_faults.py makes a few of
each.
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
from attack import PATIENCE, ROOT, STEPS, Arena, Program, Tally, difference, lost, metrics
from glyphgpt import checkpoint as checkpoints
from glyphgpt.files import LAST, NEW, READY

RESULTS = ROOT / "bench" / "RESULTS.md"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def kill(arena: Arena, count: int) -> Tally:
    """SIGKILL a training at random moments, up to three times, and go on: the same bits as an undisturbed run."""
    tally = Tally()
    for _ in tqdm(range(count), desc="kill", leave=False):
        out_dir = arena.new_run()
        for _ in range(arena.random.randint(1, 3)):
            program = arena.train(out_dir)
            time.sleep(arena.moment(out_dir))
            program.send(signal.SIGKILL)
            tally.note("killed" if program.wait() == -signal.SIGKILL else "had ended before")
        tally.add(lost(out_dir) or arena.finished(out_dir))
        shutil.rmtree(out_dir)
    return tally


def signals(arena: Arena, count: int) -> Tally:
    """SIGINT, SIGTERM or SIGHUP at a random moment, some twice: saved, and going on gives the same bits."""
    tally = Tally()
    for number in tqdm(range(count), desc="signals", leave=False):
        out_dir, wanted = arena.new_run(), SIGNALS[number % 3]
        program = arena.train(out_dir)
        time.sleep(arena.moment(out_dir))
        program.send(wanted)
        twice = number % 9 >= 6
        if twice:
            time.sleep(arena.random.uniform(0, 0.03))
            program.send(wanted)
        tally.add(stopped_well(program, wanted, tally) or lost(out_dir) or arena.finished(out_dir))
        shutil.rmtree(out_dir)
    return tally


def stopped_well(program: Program, number: signal.Signals, tally: Tally) -> str:
    """Say what is wrong with how a signalled program ended.

    Its status is 128 + the signal if it took the signal itself, minus the signal if the system ended it, before it
    began to listen or the second time, and 0 if it was done.
    """
    status, said = program.wait(), program.errors()
    tally.note({0: "had ended before", 128 + number: "stopped"}.get(status, "ended at once"))
    if "Traceback" in said or "error: " in said or status not in (0, 128 + number, -number):
        return f"{number.name}: status {status}: {said[-2000:]}"
    return ""


def command_line(arena: Arena, *words: str, **environment: str) -> "subprocess.Popen[str]":
    """Start Python as a user does, in a process group of its own, as a terminal would."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(arena.scratch / f"cache-{time.monotonic_ns()}")}  # cold
    return subprocess.Popen(
        [sys.executable, *words], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        encoding="utf-8", cwd=ROOT,
        env={**os.environ, **cache, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def early_signals(arena: Arena, count: int) -> Tally:
    """Ctrl-C, to all processes of the terminal, while a program starts, imports torch, compiles and begins."""
    tally = Tally()
    for number in tqdm(range(count), desc="early signals", leave=False):
        out_dir, compiled = arena.new_run(), number % 2 == 1
        process = command_line(arena, "train.py", *arena.flags(out_dir, compile=compiled))
        time.sleep(arena.random.uniform(0.2, 15 if compiled else 4))  # before, it is Python itself that starts
        os.killpg(process.pid, signal.SIGINT)
        said, status = process.communicate(timeout=PATIENCE)[1], process.returncode
        tally.note({0: "had ended before", 130: "stopped"}.get(status, "ended at once"))
        if "Traceback" in said or status not in (0, 130, -signal.SIGINT):
            tally.add(f"status {status}: {said[-2000:]}")
        elif compiled:  # whose bits are others
            tally.add(lost(out_dir) or arena.train(out_dir).complaint())
        else:
            tally.add(lost(out_dir) or arena.finished(out_dir))
        shutil.rmtree(out_dir, ignore_errors=True)
    return tally


def lost_process(arena: Arena, count: int) -> Tally:
    """SIGKILL one of two processes: the others end within a minute and say why, and going on is exact."""
    tally, seconds = Tally(), []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    straight = arena.new_run()
    if command_line(arena, *torchrun, *arena.flags(straight)).wait(PATIENCE):
        raise RuntimeError("two processes did not get through undisturbed")
    for _ in tqdm(range(count), desc="lost process", leave=False):
        out_dir = arena.new_run()
        process = command_line(arena, *torchrun, *arena.flags(out_dir, max_steps=10**6))
        while not (out_dir / LAST).exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(arena.random.uniform(0, 0.5))
        victim = arena.random.choice(children(process.pid))
        os.kill(victim, signal.SIGKILL)
        killed = time.perf_counter()
        said = process.communicate(timeout=PATIENCE)[1]
        seconds.append(time.perf_counter() - killed)
        found = lost(out_dir)
        if process.returncode == 0 or "error: lost another process of this run" not in said or seconds[-1] > 60:
            found = f"status {process.returncode} after {seconds[-1]:.0f} s: {said[-3000:]}"
        step = checkpoints.load_checkpoint(out_dir / LAST).metadata.state.step
        if not found and step <= STEPS:
            again = command_line(arena, *torchrun, *arena.flags(out_dir, resume=True))
            found = again.communicate(timeout=PATIENCE)[1] if again.wait(PATIENCE) else difference(straight, out_dir)
            tally.note("compared with an undisturbed run")
        tally.add(found)
        shutil.rmtree(out_dir)
    tally.remarks.append(f"the slowest ended after {max(seconds):.1f} s")
    return tally


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(word) for word in listed.stdout.split()]


class Saboteur:
    """Makes one call that writes below a folder fail, the `at`-th of the process, as the system would."""

    def __init__(self, folder: str, at: int, error: int, witness: str) -> None:
        """Stand between the program and the system; `witness` is a file that counts the calls."""
        self.folder, self.at, self.error, self.witness, self.calls = folder, at, error, witness, 0
        for name in ("mkdir", "replace", "rename", "unlink", "chmod", "fsync", "open"):
            setattr(os, name, self.watched(getattr(os, name)))
        self.really_open = io.open
        setattr(io, "open", self.open)  # noqa: B010  (what pathlib calls)
        self.really_save = getattr(checkpoints, "save_file")  # noqa: B009
        setattr(checkpoints, "save_file", self.save_file)  # noqa: B010

    def strike(self, path: object) -> None:
        """Count a call, and fail if it is the one."""
        if not isinstance(path, int) and not str(path).startswith(self.folder):
            return
        self.calls += 1
        with self.really_open(self.witness, "w") as file:
            file.write(str(self.calls))
        if self.calls == self.at:
            raise OSError(self.error, os.strerror(self.error), None if isinstance(path, int) else str(path))

    def watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of os that counts."""

        def counted(path: Any, *rest: Any, **named: Any) -> Any:
            self.strike(path)
            return call(path, *rest, **named)

        return counted

    def open(self, path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        """Open a file; opening to write counts, and so does each write."""
        writes = any(letter in mode for letter in "wax+")
        if writes:
            self.strike(path)
        file = self.really_open(path, mode, *rest, **named)
        return Written(file, self) if writes and str(path).startswith(self.folder) else file

    def save_file(self, tensors: Any, path: Path, about: Any) -> None:
        """Write a checkpoint's tensors; a failure leaves half of them."""
        self.really_save(tensors, path, about)
        size = path.stat().st_size
        try:
            self.strike(path)
        except OSError:
            os.truncate(path, size // 2)
            raise


class Written:
    """A file whose writes count."""

    def __init__(self, file: Any, saboteur: Saboteur) -> None:
        """Stand before a file."""
        self._file, self._saboteur = file, saboteur

    def write(self, content: Any) -> Any:
        """Write, or fail."""
        self._saboteur.strike(0)
        return self._file.write(content)

    def flush(self) -> None:
        """Flush, or fail."""
        self._saboteur.strike(0)
        self._file.flush()

    def __getattr__(self, name: str) -> Any:
        """Do all else as the file does."""
        return getattr(self._file, name)

    def __enter__(self) -> "Written":
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self._file.close()


def sabotage(**plan: Any) -> None:
    """Make a call of this process fail."""
    Saboteur(**plan)


def failed_writes(arena: Arena, count: int) -> Tally:
    """Make each call that writes fail in turn, with a disk full, read-only, gone or broken: what was saved stays."""
    tally, few, witness = Tally(), {"max_steps": 6, "eval_every": 3}, arena.scratch / "witness"

    def attempt(out_dir: Path, at: int, error: int) -> Program:
        plan = {"folder": str(out_dir), "at": at, "error": error, "witness": str(witness)}
        return Program(arena, "train.py", arena.flags(out_dir, **few), before=sabotage, **plan)

    straight = arena.new_run()
    attempt(straight, 0, 0).wait()
    calls = range(1, int(witness.read_text(encoding="utf-8")) + 1)
    plan = [(at, error) for at in calls for error in (errno.ENOSPC, errno.EROFS, errno.ENOENT, errno.EIO)]
    for at, error in tqdm(arena.random.sample(plan, min(count, len(plan))), desc="failed writes", leave=False):
        out_dir = arena.new_run()
        program = attempt(out_dir, at, error)
        found = program.complaint() or lost(out_dir)
        tally.note(errno.errorcode[error])
        if not found:
            again = arena.train(out_dir, **few)
            found = again.complaint(expect=0) or difference(straight, out_dir)
        tally.add(found and f"call {at}, {errno.errorcode[error]}: {found}")
        shutil.rmtree(out_dir, ignore_errors=True)
    tally.remarks.append(f"{len(calls)} calls that write")
    return tally


def limit_files(size: int) -> None:
    """Let this process write no file beyond a size, as a full disk would."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_disks(arena: Arena, count: int) -> Tally:
    """Let the system itself refuse to write, at any size, or take the folder away while training runs."""
    tally = Tally()
    for number in tqdm(range(count), desc="full disks", leave=False):
        out_dir = arena.new_run()
        if number % 2:
            program = Program(
                arena, "train.py", arena.flags(out_dir), before=limit_files, size=arena.random.randint(0, arena.size)
            )
        else:
            program = arena.train(out_dir)
            time.sleep(arena.moment(out_dir))
            gone = out_dir.with_name("gone")
            if out_dir.exists():
                out_dir.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        found = program.complaint() or lost(out_dir) or arena.finished(out_dir)
        tally.add(found and f"{'disk full' if number % 2 else 'folder taken away'}: {found}")
        shutil.rmtree(out_dir, ignore_errors=True)
    return tally


PRECISIONS = ("auto", "float32", "bfloat16", "float16")
LIGHTER = {
    "gpt2": {"batch_size": 1, "gradient_accumulation_steps": 2, "block_size": 128, "max_steps": 4},
    "nanogpt_gpu": {"batch_size": 6, "max_steps": 6},
}
"""What of a config is more than a CPU can do; the others run as they are, for fewer steps."""


def configs(arena: Arena, count: int) -> Tally:
    """SIGKILL each committed config, compiled if it says so, on two threads, in each precision: the same bits again."""
    tally, straight = Tally(), {}
    files = sorted((ROOT / "config").glob("*.toml"))
    few = {"dataset": "small", "data_dir": arena.data_dir, "device": "cpu", "save_every": 1, "eval_every": 10**6}
    few |= {"max_steps": 12, "log_every": 1, "eval_tokens": 500, "report": False, "plot": False}
    cache = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_CACHE_DIR": str(arena.scratch / "compiled")}

    def start(file: Path, out_dir: Path, **changes: object) -> "subprocess.Popen[str]":
        settings = {**few, **LIGHTER.get(file.stem, {}), "out_dir": out_dir, **changes}
        flags = [f"--{key}={value}" for key, value in settings.items()]
        return command_line(arena, "train.py", str(file), *flags, **cache)

    for number in tqdm(range(count), desc="configs", leave=False):
        file, dtype, out_dir = files[number % len(files)], PRECISIONS[number // len(files) % 4], arena.new_run()
        if (file, dtype) not in straight:
            straight[file, dtype] = arena.new_run()
            if said := finished_badly(start(file, straight[file, dtype], dtype=dtype)):
                tally.add(f"{file.stem}, {dtype}: {said}")
                continue
        process, steps = start(file, out_dir, dtype=dtype), arena.random.randint(1, 3)
        while process.poll() is None:
            if (out_dir / LAST).exists() and (rows := metrics(out_dir)) and rows[-1]["step"] > steps:
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.001)
        process.communicate()
        tally.note(
            f"at step {checkpoints.read_metadata(out_dir / LAST).state.step}" if process.returncode else "had ended"
        )
        found = finished_badly(start(file, out_dir, dtype=dtype, resume=True)) or difference(
            straight[file, dtype], out_dir
        )
        tally.add(found and f"{file.stem}, {dtype}: {found}")
        shutil.rmtree(out_dir)
    return tally


def finished_badly(process: "subprocess.Popen[str]") -> str:
    """Wait for a program, and return what it wrote on standard error if it failed; at most the end of it."""
    said = process.communicate(timeout=10 * PATIENCE)[1]
    return f"status {process.returncode}: {said[-2000:]}" if process.returncode else ""


def wait_for(path: Path, running: Callable[[], bool]) -> None:
    """Wait until a file or folder is there, or the program that makes it has ended."""
    while not path.exists() and running():
        time.sleep(0.001)


def overwriting(arena: Arena, count: int) -> Tally:
    """SIGKILL a run that overwrites another: the folder holds all of the old one, or all of the new one."""
    tally, new = Tally(), {"seed": 7}
    straight = {1337: arena.straight, 7: arena.new_run()}
    arena.train(straight[7], **new).wait()
    for _ in tqdm(range(count), desc="overwriting", leave=False):
        out_dir = arena.new_run()
        shutil.copytree(arena.straight, out_dir)
        before = {file.name: file.read_bytes() for file in out_dir.iterdir()}
        program = Program(arena, "train.py", arena.flags(out_dir, overwrite=True, **new))
        if arena.random.random() < 0.8:  # most when it is about to happen
            wait_for(out_dir / NEW, program.running)
        time.sleep(arena.random.uniform(0, 0.05))
        program.send(signal.SIGKILL)
        program.wait()
        if (out_dir / READY).exists() or before[LAST] != (out_dir / LAST).read_bytes():
            tally.note("new")
            tally.add(lost(out_dir) or arena.train(out_dir, **new).complaint(0) or difference(straight[7], out_dir))
        else:
            tally.note("old")
            changed = [name for name, content in before.items() if (out_dir / name).read_bytes() != content]
            tally.add(", ".join(changed) and f"changed: {', '.join(changed)}")
        shutil.rmtree(out_dir)
    return tally


def copies(arena: Arena, count: int) -> Tally:
    """Kill a run, copy or move its folder, and resume it there from any directory: exact, the original untouched."""
    tally, straight = Tally(), arena.straight
    for number in tqdm(range(count), desc="copies", leave=False):
        out_dir, other = arena.new_run(), arena.new_run() / "deeper" / "run"
        program = arena.train(out_dir)
        wait_for(out_dir / LAST, program.running)
        time.sleep(arena.random.uniform(0, 0.5) * arena.seconds)
        program.send(signal.SIGKILL)
        program.wait()
        before = {file.name: file.read_bytes() for file in out_dir.iterdir() if file.is_file()}
        other.parent.mkdir(parents=True)
        (shutil.copytree if number % 2 else shutil.move)(out_dir, other)
        tally.note("copied" if number % 2 else "moved")
        directory = arena.random.choice([other, other.parent, arena.scratch, Path("/")])
        place = os.path.relpath(other, directory) if arena.random.random() < 0.5 else str(other)
        words = arena.random.choice([[f"{place}/config.toml", "--resume"], ["--resume", place]])
        found = Program(arena, "train.py", words, before=os.chdir, path=directory).complaint(expect=0)
        if number % 2 and before != {file.name: file.read_bytes() for file in out_dir.iterdir() if file.is_file()}:
            found = "the original was touched"
        if not number % 2 and out_dir.exists():
            found = "something was written where the run had been"
        tally.add(found or difference(straight, other))
        shutil.rmtree(other.parent.parent)
    return tally


def close_streams(numbers: list[int]) -> None:
    """Close standard streams of this process, as daemons do."""
    sys.stdin, sys.stdout, sys.stderr = (
        None if number in numbers else stream for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr))
    )
    for number in numbers:
        os.close(number)


def streams(arena: Arena, count: int) -> Tally:
    """Close some standard streams before a training, or its output's reader at a random moment: nothing is lost."""
    tally = Tally()
    for number in tqdm(range(count), desc="streams", leave=False):
        out_dir = arena.new_run()
        if number % 2:
            closed = arena.random.sample(range(3), arena.random.randint(1, 3))
            words = arena.flags(out_dir)
            found = Program(arena, "train.py", words, before=close_streams, numbers=closed).complaint(expect=0)
            tally.note("closed")
        else:
            reading, writing = os.pipe()
            process = subprocess.Popen(
                [sys.executable, "train.py", *arena.flags(out_dir)], stdout=writing, stderr=subprocess.PIPE, text=True,
                cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            os.close(writing)
            while not (out_dir / LAST).exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(arena.random.uniform(0, 0.3))
            os.close(reading)
            said, status = process.communicate(timeout=PATIENCE)[1], process.returncode
            tally.note({0: "had ended before", 141: "reader gone"}.get(status, f"status {status}"))
            found = f"status {status}: {said[-2000:]}" if said or status not in (0, 141) else ""
        tally.add(found or lost(out_dir) or arena.finished(out_dir))
        shutil.rmtree(out_dir)
    return tally


COSMETIC = ("chmod", "fchmod", "fsync", "utime", "get_terminal_size")


def refuse(calls: list[str], error: int) -> None:
    """Have calls fail that only make things nicer, as on file systems that lack them."""

    def refusal(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    for call in calls:
        setattr(os, call, refusal)


def cosmetic_calls(arena: Arena, count: int) -> Tally:
    """Have calls that are not the purpose fail all the time: the same bits, and no complaint."""
    tally = Tally()
    for _ in tqdm(range(count), desc="cosmetic calls", leave=False):
        out_dir, error = arena.new_run(), arena.random.choice([errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
        calls = arena.random.sample(COSMETIC, arena.random.randint(1, len(COSMETIC)))
        calls = [call for call in calls if call != "fsync" or error != errno.EPERM]  # which is no answer of fsync
        words = arena.flags(out_dir)
        found = Program(arena, "train.py", words, before=refuse, calls=calls, error=error).complaint(expect=0)
        tally.note(errno.errorcode[error])
        tally.add((found and f"{calls}: {found}") or difference(arena.straight, out_dir))
        shutil.rmtree(out_dir)
    return tally


def rivals(arena: Arena, count: int) -> Tally:
    """Start two trainings into one folder at once: one is refused, and the other is as if it had been alone."""
    tally = Tally()
    for _ in tqdm(range(count), desc="rivals", leave=False):
        out_dir = arena.new_run()
        pair = [arena.train(out_dir)]
        time.sleep(arena.random.choice((0, arena.moment(out_dir))))
        pair.append(Program(arena, "train.py", arena.flags(out_dir)))
        found = "".join(program.complaint() for program in pair)
        statuses = sorted(program.wait() for program in pair)
        if statuses != [0, 2]:
            found += f"statuses {statuses}"
        tally.add(found or difference(arena.straight, out_dir))
    return tally


def moving_data(arena: Arena, count: int) -> Tally:
    """Prepare a data set anew while training reads it: training is that on the old or on the new text, or refused."""
    tally = Tally()
    texts = {name: arena.write_text(name, 6000, seed) for name, seed in (("one", 1), ("other", 2))}
    runs = {}
    for name, text in texts.items():
        arena.prepare(text, "moving")
        runs[name] = arena.new_run()
        arena.train(runs[name], dataset="moving").wait()
    for number in tqdm(range(count), desc="moving data", leave=False):
        out_dir, text = arena.new_run(), texts["one" if number % 2 else "other"]
        preparing = Program(arena, "prepare.py", arena.preparation(text, "moving"))
        time.sleep(arena.random.uniform(0, 0.15))
        program = arena.train(out_dir, dataset="moving")
        found, status = program.complaint() or preparing.complaint(expect=0), program.wait()
        tally.note("refused" if status else "trained")
        if not found and status == 0 and all(difference(run, out_dir) for run in runs.values()):
            found = "another run than on either text"
        tally.add(found)
    return tally


def random_day(arena: Arena, count: int) -> Tally:
    """For so many minutes: train, kill, stop, go on, sample, copy, damage, fill the disk, prepare again, at random."""
    tally = Tally()
    ends = time.monotonic() + 60 * count
    with tqdm(total=count, desc="random day", unit="min", leave=False) as bar:
        while time.monotonic() < ends:
            tally.add(random_life(arena, tally))
            bar.update(round(count - (ends - time.monotonic()) / 60, 2) - bar.n)
    return tally


def random_life(arena: Arena, tally: Tally) -> str:
    """Lead one run through mishaps to its end; say what was lost or wrong, after the events that led to it."""
    out_dir, events = arena.new_run(), []
    for _ in range(arena.random.randint(1, 12)):
        events.append(arena.random.choice(["kill", "stop", "full disk", "sample", "copy", "damage", "prepare"]))
        tally.note(events[-1])
        if found := mishap(arena, events[-1], out_dir) or lost(out_dir):
            return f"{', '.join(events)}: {found}"
    found = arena.finished(out_dir)
    return found and f"{', '.join(events)}, finish: {found}"


def mishap(arena: Arena, event: str, out_dir: Path) -> str:
    """Let something happen to a run; say what went wrong that should not."""
    if event in ("kill", "stop"):
        program, number = arena.train(out_dir), arena.random.choice(SIGNALS)
        time.sleep(arena.moment(out_dir))
        program.send(signal.SIGKILL if event == "kill" else number)
        killed = event == "kill" and program.wait() in (0, -signal.SIGKILL)
        return "" if killed else stopped_well(program, number, Tally())
    if event == "full disk":
        words, size = arena.flags(out_dir, **arena.whatever_is_there(out_dir)), arena.random.randint(0, arena.size)
        return Program(arena, "train.py", words, before=limit_files, size=size).complaint()
    if event == "prepare":
        arena.prepare(arena.scratch / "small.txt", "small")
        return ""
    return with_run(arena, event, out_dir) if (out_dir / LAST).exists() else ""


def with_run(arena: Arena, event: str, out_dir: Path) -> str:
    """Do something with a run that is there; say what went wrong."""
    if event == "sample":
        return Program(arena, "sample.py", [str(out_dir), "--max_new_tokens=20", "--device=cpu"]).complaint(expect=0)
    whole = (out_dir / LAST).read_bytes()
    if event == "copy":  # move the run elsewhere and back
        kept = arena.new_run()
        out_dir.rename(kept)
        shutil.copytree(kept, out_dir)
        shutil.rmtree(kept)
        return ""
    damaged = bytearray(whole)
    damaged[arena.random.randrange(len(whole))] ^= 1
    (out_dir / LAST).write_bytes(damaged)
    found = arena.train(out_dir).complaint(expect=1)
    if (out_dir / LAST).read_bytes() != damaged:
        found = found or "a damaged checkpoint was touched"
    (out_dir / LAST).write_bytes(whole)
    return found


def long_run(arena: Arena, count: int) -> Tally:
    """Train so many steps with evaluations and saves: memory and open files stay flat, and the speed is kept."""
    out_dir, tally = arena.new_run(), Tally()
    often = {"max_steps": count, "eval_every": max(1, count // 400), "save_every": max(1, count // 1000)}
    program = Program(arena, "train.py", arena.flags(out_dir, **often, log_every=max(1, count // 2000)))
    looks: list[tuple[int, int]] = []  # KiB, open files
    with tqdm(total=count, desc="long run", leave=False) as bar:
        while program.running():
            time.sleep(1)
            if (out_dir / "metrics.jsonl").exists() and (rows := metrics(out_dir)):
                bar.update(rows[-1]["step"] - bar.n)
                with_status = Path(f"/proc/{program.pid}/status")
                if found := re.search(r"VmRSS:\s+(\d+)", with_status.read_text() if with_status.exists() else ""):
                    looks.append((int(found[1]), len(list(Path(f"/proc/{program.pid}/fd").iterdir()))))
    if complaint := program.complaint(expect=0):
        tally.add(complaint)
        return tally
    rows = [row for row in metrics(out_dir, times=True) if row["kind"] == "train"]
    tenth = len(rows) // 10
    first, last = (
        median((b["step"] - a["step"]) / (b["seconds"] - a["seconds"]) for a, b in pairwise(part))
        for part in (rows[tenth : 2 * tenth], rows[-tenth:])
    )
    early, late = looks[len(looks) // 10], looks[-1]
    tally.add("" if late[0] < 1.05 * early[0] else f"memory grew from {early[0]:,} to {late[0]:,} KiB")
    tally.add("" if late[1] <= early[1] else f"open files grew from {early[1]} to {late[1]}")
    tally.add("" if last >= 0.95 * first else f"{first:.0f} steps a second became {last:.0f}")
    tally.remarks.append(
        f"{early[0] >> 10} to {late[0] >> 10} MiB, {early[1]} to {late[1]} files, {last / first:.2f} of the speed"
    )
    return tally


@dataclass(frozen=True)
class Attack:
    """A row of the table."""

    name: str
    run: Callable[[Arena, int], Tally]
    count: int
    """Of tries in the long run."""


ATTACKS = {
    "kill": Attack("SIGKILL at a random moment, one to three times, then resume", kill, 200),
    "signals": Attack("SIGINT, SIGTERM or SIGHUP at a random moment, some twice", signals, 100),
    "early-signals": Attack("Ctrl-C while the program starts or compiles", early_signals, 40),
    "lost-process": Attack("SIGKILL of one of two processes under torchrun", lost_process, 20),
    "failed-writes": Attack("each write call in turn fails: disk full, read-only, gone, broken", failed_writes, 10**4),
    "full-disks": Attack("the system refuses to write, or the folder is taken away", full_disks, 100),
    "overwriting": Attack("SIGKILL of a run that overwrites another", overwriting, 100),
    "copies": Attack("a killed run copied or moved, and resumed there", copies, 100),
    "streams": Attack("closed standard streams, and readers that go away", streams, 100),
    "cosmetic-calls": Attack("chmod, fsync and others refused throughout", cosmetic_calls, 100),
    "configs": Attack("each committed config as it is, on two threads, in each precision", configs, 32),
    "rivals": Attack("two trainings started into one folder", rivals, 50),
    "moving-data": Attack("prepare while training reads", moving_data, 50),
    "cuts": Attack("checkpoints cut at random lengths, and with random bytes changed", hostile.cuts, 1000),
    "checkpoints": Attack("checkpoints forged with a right checksum", hostile.forged_checkpoints, 2000),
    "data-sets": Attack("data sets forged with right checksums", hostile.forged_data_sets, 2000),
    "bytes": Attack("arbitrary bytes prepared", hostile.arbitrary_bytes, 10_000),
    "unicode": Attack("arbitrary Unicode through every tokenizer", hostile.arbitrary_unicode, 10_000),
    "links": Attack("folders of random links, named in five ways", hostile.links, 100),
    "toml": Attack("arbitrary TOML", hostile.arbitrary_toml, 10_000),
    "command-lines": Attack("arbitrary command lines", hostile.arbitrary_command_lines, 10_000),
    "prompts": Attack("odd prompts", hostile.prompts, len(hostile.PROMPTS)),
    "long-run": Attack("so many steps with evaluations and saves", long_run, 200_000),
    "day": Attack("a random day, minutes", random_day, 60),
}


def main() -> None:
    """Run the attacks asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="which (default: all, %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many tries (default 1)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="of all choices (default: the time)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to add the table (default %(default)s)")
    options = parser.parse_args()
    chosen = options.attacks.split(",")
    if unknown := set(chosen) - ATTACKS.keys():
        parser.error(f"no such attack: {', '.join(sorted(unknown))}")
    rows, troubles = [], 0
    for name in chosen:
        attack = ATTACKS[name]
        with tempfile.TemporaryDirectory() as scratch:
            started = time.perf_counter()
            tally = attack.run(Arena(Path(scratch), options.seed), max(1, round(attack.count * options.scale)))
            seconds = time.perf_counter() - started
        rows.append(f"| {attack.name} | {tally} | {seconds:.0f} s |")
        print(rows[-1], *tally.troubles[:5], sep="\n  ", flush=True)
        troubles += len(tally.troubles)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    head = f"## Faults, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    about = f"{os.cpu_count()} cores, {platform.system()}, commit {commit.stdout.strip()}, seed {options.seed}."
    table = ["| attack | withstood | took |", "| --- | --- | --- |", *rows]
    with options.results.open("a", encoding="utf-8") as file:
        file.write("\n".join(["", head, "", about, "", *table, ""]))
    sys.exit(1 if troubles else 0)


if __name__ == "__main__":
    main()
