"""Folders that are written to: files that are never there in part, and one process at a time."""

import errno
import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from glyphgpt.errors import UsageError, wrap_write_errors

LOCK = ".lock"
NEW, READY = ".new", ".ready"
"""Folders within one whose files are being replaced: while the new ones are made, and once all of them are there."""
STALE = ".stale"
"""Ends the name of a mark that stands, among the new files, for one to delete."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a place beside `path` for a new file that is renamed in the end, so that it is never there in part.

    Raises:
        UserError: it could not be written; what stood there is untouched.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with wrap_write_errors(path):
            yield unfinished
            unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def write_atomic(path: Path, content: bytes) -> None:
    """Write a small file in this way.

    Raises:
        UserError: it could not be written; what stood there is untouched.
    """
    with atomic_path(path) as unfinished:
        unfinished.write_bytes(content)


def swap_dirs(folder: Path, new: Path, old: Path) -> None:
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
def replace_files(folder: Path, stale: Sequence[str]) -> Iterator[Path]:
    """Yield a place for new files that take their places in `folder` together, once all of them are there.

    Until then nothing in the folder changes. If the process is killed while they are being renamed,
    `finish_replacement` completes that. Files whose names are in `stale` are deleted; other files stay.
    """
    new, ready = folder / NEW, folder / READY
    shutil.rmtree(new, ignore_errors=True)
    with wrap_write_errors(folder):
        new.mkdir()
    copy_mode(folder, new)
    try:
        yield new
        with wrap_write_errors(folder):
            for name in stale:  # a name without a file stands for one to delete
                (new / f"{name}{STALE}").touch()
            new.rename(ready)
            finish_replacement(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def finish_replacement(folder: Path) -> None:
    """Put files that `replace_files` has made into their places, if it was killed in the middle of that."""
    ready = folder / READY
    for file in sorted(ready.glob("*")):
        if file.name.endswith(STALE):
            with suppress(OSError):  # missing, or a folder of that name: no reason to lose the new files
                (folder / file.name.removesuffix(STALE)).unlink()
            file.unlink()
        else:
            file.replace(folder / file.name)
    with suppress(FileNotFoundError):
        ready.rmdir()


def copy_mode(of: Path, to: Path) -> None:
    """Make a file or folder as open as another; some file systems have no permissions to change."""
    with suppress(OSError):
        to.chmod(of.stat().st_mode & (0o777 if to.is_dir() else 0o666))


def fsync_file(handle: int) -> None:
    """Have an open file written to the disk itself, or only to the system where the file system knows no more.

    Raises:
        OSError: it could not be written.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def fsync_dir(folder: Path) -> None:
    """Make renames in a folder durable, where the system can."""
    with suppress(OSError):  # Windows opens no folders; some file systems refuse
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):
            os.fsync(handle)
        os.close(handle)


@contextmanager
def locked(folder: Path, instead: str) -> Iterator[None]:
    """Make a folder if need be, and keep other processes out of it.

    However this process ends, the system lets go of the lock.

    Raises:
        UsageError: another process has it; `instead` is what to use then.
        UserError: nothing can be written there.
    """
    with wrap_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    with wrap_write_errors(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a file system without flock: it finds another way
        try:
            lock.acquire()
        except Timeout as error:
            raise UsageError(f"{folder}: in use by another process; wait for its end, or use {instead}") from error
    try:
        yield
    finally:
        lock.release()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
