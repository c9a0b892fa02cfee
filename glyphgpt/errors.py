"""Errors as users see them: one line on standard error and an exit status, never a traceback."""

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
    """A problem that the user can solve. The message says what is wrong and what to do, one line per problem."""

    status = 1


class UsageError(UserError):
    """A wrong command line or setting."""

    status = 2


@contextmanager
def exit_on_error(broken_pipe_status: int = BROKEN_PIPE_STATUS) -> Iterator[None]:
    """Print the errors of a script as one line each and exit with their status.

    `broken_pipe_status` is the exit status after the reader of the output, `head` for example, has gone.
    """
    open_standard_streams()
    handlers = {sys.stdin: "surrogateescape", sys.stdout: "backslashreplace", sys.stderr: "backslashreplace"}
    for stream, errors in handlers.items():  # Windows consoles default to other encodings
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors, line_buffering=True)  # logs grow line by line
    status: int | str | None
    try:
        with raise_on_ctrl_c():
            yield
            sys.stdout.flush()
        return
    except SystemExit as error:
        status = error.code
    except UserError as error:
        status = print_error(error)
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        status = broken_pipe_status if is_broken_pipe(error) else print_error(UserError(format_os_error(error)))
    except MemoryError:
        status = print_error(UserError("out of memory; use a smaller model, batch or text"))
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


def open_standard_streams() -> None:
    """Connect closed standard streams to the null device.

    Daemons and schedulers may start a process with closed streams. Python's streams are then None, and the next file
    that is opened, a checkpoint for example, gets the file descriptor of standard output, which libraries print to.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        with suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # returns the lowest free descriptor, which is `number`
        setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def is_broken_pipe(error: OSError) -> bool:
    """Return whether an error means that nobody reads standard output or error any more; then discard their output."""
    broken = isinstance(error, BrokenPipeError) and [s for s in (sys.stdout, sys.stderr) if not has_reader(s)]
    for stream in broken or ():
        discard_output(stream)
    return bool(broken)


def has_reader(stream: Any) -> bool:
    """Return whether a stream's output is still read."""
    with suppress(OSError, AttributeError):  # a stream without a descriptor; Windows has no poll
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return not poll.poll(0)  # without requested events, it reports only errors and hang-ups
    return os.name != "nt"


def discard_output(stream: Any) -> None:
    """Connect a broken output stream to the null device, so that Python's final flush does not fail."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def exit_on_ctrl_c() -> None:
    """Let Ctrl-C end the process at once, without a traceback of whatever Python is importing or cleaning up."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # shells make background jobs ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def raise_on_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in this context, and end the process at once after it."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        exit_on_ctrl_c()


@contextmanager
def wrap_write_errors(path: Path, note: str = "") -> Iterator[None]:
    """Turn a failed write into an error that names the file, followed by `note`.

    Raises:
        UserError: An OSError occurred in this context.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}{note}") from error


def print_error(error: UserError) -> int:
    """Print each line of an error, and return its exit status."""
    with suppress(OSError):
        sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))
    return error.status


def warn(message: str) -> None:
    """Print one line of warning on standard error, if it can be written."""
    with suppress(OSError):
        print(f"warning: {message}", file=sys.stderr)


@contextmanager
def optional_import(package: str, purpose: str, module: str = "") -> Iterator[None]:
    """Turn a failed import of an optional package into a one-line error; `module` is its import name if it differs.

    Raises:
        UsageError: The package that `purpose` needs is not installed, or its installation is broken.
    """
    try:
        yield
    except Exception as error:  # a package built for another version of its dependency may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == (module or package):
            raise UsageError(f"{purpose} needs {package}: pip install {package}") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{purpose} needs {package}, which is installed but cannot be imported ({reason}); "
            f"reinstall it: pip install --force-reinstall {package}"
        ) from error


def format_os_error(error: OSError) -> str:
    """Return an operating system's error as one line: the file, then the reason."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def sanitize(value: object) -> str:
    r"""Return a value as one printable line, with control characters and undecodable bytes escaped.

    >>> print(sanitize(b"caf\xe9\n.txt".decode("utf-8", "surrogateescape")))
    caf\xe9\n.txt
    """
    return "".join(c if c.isprintable() else escape_character(c) for c in str(value))


def escape_character(character: str) -> str:
    """Return the escape sequence of a character, which Python and bash ($'...') both understand."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # the surrogate that Python uses for a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if 0x80 <= code < 0x100 else character.encode("unicode_escape").decode()


def shorten(value: object, length: int = 100) -> str:
    """Return a sanitized value; if it is longer than `length`, return only its start and its end.

    >>> shorten("abcdefghij", 4)
    'ab...ij'
    """
    text, half = sanitize(value), length // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"
