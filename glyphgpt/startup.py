"""The start of a script. `import glyphgpt.startup` is its first import, and `run` its last line.

Importing torch takes a second or two. This module is imported before it and reads the command line at once, if one of
the scripts is the main program, so that help and usage errors appear within half a second.
"""

import ctypes
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from glyphgpt.errors import BROKEN_PIPE_STATUS, exit_on_ctrl_c, exit_on_error, open_standard_streams

USAGE = {
    "prepare.py": "python prepare.py RECIPE | FILE ... | FOLDER ... | - [--key=value ...]",
    "train.py": "python train.py [CONFIG.toml | RUN ...] [--key=value ...]",
    "sample.py": "python sample.py RUN | CHECKPOINT [--key=value ...]",
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


_start_time = time.perf_counter()

_parsed: dict[str, tuple[Any, list[str]]] = {}
"""The command line of the main program, from the start of its imports until `run`."""


def seconds_since_start() -> float:
    """Return the time since this module was imported, which is the program's first import."""
    return time.perf_counter() - _start_time


def parse_command_line(script: str) -> tuple[Any, list[str]]:
    """Return the settings and the plain words of a script's command line.

    Raises:
        UsageError: The command line is wrong; one line per problem.
    """
    from glyphgpt import cli, settings  # noqa: PLC0415  (slow; `start` sets up Ctrl-C first)

    classes = {
        "prepare.py": settings.PrepareSettings,
        "train.py": settings.TrainSettings,
        "sample.py": settings.SampleSettings,
    }
    description = sys.modules["__main__"].__doc__ or ""
    return cli.parse(classes[script], sys.argv[1:], USAGE[script], description, files=script == "train.py")


def run(script: str, main: Callable[..., None], broken_pipe_status: int = BROKEN_PIPE_STATUS) -> None:
    """Call a script's main function with its settings and plain words; print errors as one line each."""
    with exit_on_error(broken_pipe_status):
        settings, words = _parsed.pop(script) if script in _parsed else parse_command_line(script)
        main(settings, *words)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system; see mallopt(3).

    Otherwise each training step on a CPU, and each chunk of a large text, requests the same thousands of pages again,
    which takes up to a third of its time.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # other C libraries do not have mallopt
            libc = ctypes.CDLL(None)
            libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)  # bytes
            _ = libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # glibc before 2.35


def start() -> None:
    """Set up the process, and read the command line if one of the scripts is the main program."""
    program = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
    if program.name in USAGE and program.parent == Path(__file__).resolve().parent.parent:
        open_standard_streams()
        exit_on_ctrl_c()
        keep_freed_memory()
        with exit_on_error():
            _parsed[program.name] = parse_command_line(program.name)


start()
