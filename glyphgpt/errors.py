"""What a user sees when something goes wrong: one clear line and an exit status, never a traceback."""

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Failure(Exception):
    """Something the user can mend; its message says what is wrong and what to do. One line per problem."""

    status = 1


class UsageError(Failure):
    """A wrong command line or setting."""

    status = 2


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn failures within a script into one line each on standard error, and its exit status."""
    modes = {sys.stdin: "surrogateescape", sys.stdout: "backslashreplace", sys.stderr: "backslashreplace"}
    for stream, errors in modes.items():  # Windows' consoles default to other encodings
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors, line_buffering=True)  # logs grow line by line
    status: int | str | None
    try:
        with interruptible():
            yield
            sys.stdout.flush()
        return
    except SystemExit as end:
        status = end.code
    except Failure as failure:
        status = report(failure)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        status = 0
    except OSError as error:
        status = report(Failure(describe(error)))
    except MemoryError:
        status = report(Failure("out of memory; make something smaller"))
    try:
        sys.stdout.flush()
    except OSError:  # told already; lest Python complain about it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def end_at_ctrl_c() -> None:
    """Have Ctrl-C end the process at once and without a word.

    Otherwise there would be a traceback of what Python happened to import, or to clear up at its end.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # shells have background jobs ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def interruptible() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt in here, and after it end the process."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        end_at_ctrl_c()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file of which something could not be written.

    Raises:
        Failure: something was not.
    """
    try:
        yield
    except OSError as error:
        raise Failure(f"{path}: could not be written: {error.strerror or error}") from error


def report(failure: Failure) -> int:
    """Print each of a failure's lines, and return the exit status that it asks for."""
    sys.stderr.write("".join(f"error: {line}\n" for line in str(failure).splitlines()))
    return failure.status


def warn(message: str) -> None:
    """Print one line of warning on standard error."""
    print(f"warning: {message}", file=sys.stderr)


def describe(error: OSError) -> str:
    """Tell an operating system's error in one line: the file, then the reason."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason
