"""What a user sees when something goes wrong: one clear line and an exit status, never a traceback."""

import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

BROKEN_PIPE_STATUS = 128 + 13  # SIGPIPE, as shells report it


class UserError(Exception):
    """Something the user can mend; its message says what is wrong and what to do. One line per problem."""

    status = 1


class UsageError(UserError):
    """A wrong command line or setting."""

    status = 2


def start_script() -> None:
    """Prepare the process for a script, before anything large is imported."""
    open_standard_streams()
    exit_on_ctrl_c()


def open_standard_streams() -> None:
    """Connect standard streams that are closed, as daemons and schedulers start processes, to the null device.

    Python has None for them, and the next file opened, a checkpoint say, would get the number of one of them, and with
    it whatever a library prints there.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        with suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


@contextmanager
def exit_on_error(broken_pipe_status: int = BROKEN_PIPE_STATUS) -> Iterator[None]:
    """Turn failures within a script into one line each on standard error, and its exit status.

    `broken_pipe_status` is the status where nobody reads the output any more.
    """
    open_standard_streams()
    modes = {sys.stdin: "surrogateescape", sys.stdout: "backslashreplace", sys.stderr: "backslashreplace"}
    for stream, errors in modes.items():  # Windows' consoles default to other encodings
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors, line_buffering=True)  # logs grow line by line
    status: int | str | None
    try:
        with raise_on_ctrl_c():
            yield
            sys.stdout.flush()
        return
    except SystemExit as end:
        status = end.code
    except UserError as failure:
        status = print_error(failure)
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        status = broken_pipe_status if is_broken_pipe(error) else print_error(UserError(format_os_error(error)))
    except MemoryError:
        status = print_error(UserError("out of memory; make something smaller"))
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        status = print_error(UserError("the system allows no more threads or processes; raise its limit (ulimit -u)"))
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # reported already
            discard_output(stream)
    sys.exit(status)


def is_broken_pipe(error: OSError) -> bool:
    """Return whether an error is of standard output or error whose reader, `head` say, has gone; silence these then."""
    lost = isinstance(error, BrokenPipeError) and [s for s in (sys.stdout, sys.stderr) if not has_reader(s)]
    for stream in lost or ():
        discard_output(stream)
    return bool(lost)


def has_reader(stream: Any) -> bool:
    """Return whether what is written to a stream still goes anywhere."""
    with suppress(OSError, AttributeError):  # a stream without a number; Windows has no poll
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return not poll.poll(0)  # asked for nothing, it reports errors and hang-ups only
    return os.name != "nt"


def discard_output(stream: Any) -> None:
    """Discard what is still to be written to a stream that takes nothing any more, so that Python does not try."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def exit_on_ctrl_c() -> None:
    """Have Ctrl-C end the process at once and without a word.

    Otherwise there would be a traceback of what Python happened to import, or to clear up at its end.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # shells have background jobs ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def raise_on_ctrl_c() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt in here, and after it end the process."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        exit_on_ctrl_c()


@contextmanager
def wrap_write_errors(path: Path) -> Iterator[None]:
    """Name the file of which something could not be written.

    Raises:
        UserError: something was not.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}") from error


def print_error(failure: UserError) -> int:
    """Print each of a failure's lines, and return the exit status that it asks for."""
    with suppress(OSError):
        sys.stderr.write("".join(f"error: {line}\n" for line in str(failure).splitlines()))
    return failure.status


def warn(message: str) -> None:
    """Print one line of warning on standard error, if that takes it."""
    with suppress(OSError):
        print(f"warning: {message}", file=sys.stderr)


@contextmanager
def optional_import(package: str, purpose: str, module: str = "") -> Iterator[None]:
    """Report in one line that an optional package, whose `module` may have another name, cannot be imported in here.

    Raises:
        UsageError: it is not installed, or it is but broken; says which `purpose` needs it.
    """
    try:
        yield
    except Exception as error:  # a package that was built for another one's version may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == (module or package):
            raise UsageError(f"{purpose} needs {package}: pip install {package}") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{purpose} needs {package}, which is installed but cannot be imported ({reason}); "
            f"install it again: pip install --force-reinstall {package}"
        ) from error


def format_os_error(error: OSError) -> str:
    """Tell an operating system's error in one line: the file, then the reason."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason
