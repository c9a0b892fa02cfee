"""Folders that are written to: files that are never there in part, and one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from glyphgpt.errors import UsageError, writing

LOCK = ".lock"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a place beside `path` for a new file that is renamed in the end, so that it is never there in part.

    Raises:
        Failure: it could not be written; what stood there is untouched.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with writing(path):
            yield unfinished
            unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file in this way.

    Raises:
        Failure: it could not be written; what stood there is untouched.
    """
    with whole(path) as unfinished:
        unfinished.write_bytes(content)


def exchange(folder: Path, new: Path, old: Path) -> None:
    """Put a folder made at `new` in its place; what stood there goes to `old`, or back if anything comes between."""
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:  # a Ctrl-C between the two as well
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise


@contextmanager
def locked(folder: Path, instead: str) -> Iterator[None]:
    """Make a folder if need be, and keep other processes out of it.

    However this process ends, the system lets go of the lock.

    Raises:
        UsageError: another process has it; `instead` is what to use then.
        Failure: nothing can be written there.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    with writing(folder):
        try:
            lock.acquire()
        except Timeout as error:
            raise UsageError(f"{folder}: in use by another process; wait for its end, or use {instead}") from error
    try:
        yield
    finally:
        lock.release()
