"""Files and folders: atomic writes, replacement of several files together, locks; and the names of a run's files."""

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

BEST = "best.safetensors"
LAST = "last.safetensors"
META = "meta.json"  # of a dataset; the others are files of a run
CONFIG = "config.toml"
REPORT = "report.html"
PLOT = "metrics.png"

LOCK = ".lock"
NEW, READY = ".new", ".ready"
"""Subfolders of a folder whose files are being replaced: NEW holds unfinished new files, READY finished ones."""
STALE = ".stale"
"""Suffix of an empty file in these subfolders: `NAME.stale` marks the file NAME for deletion."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` at the end, so that a partial file never exists at `path`.

    Raises:
        UserError: The file could not be written; the file that was at `path` is unchanged.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with wrap_write_errors(path, "; the previous file is unchanged" if os.path.exists(path) else ""):  # noqa: PTH110
            yield unfinished
            unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def write_atomic(path: Path, content: bytes) -> None:
    """Write a small file through `atomic_path`.

    Raises:
        UserError: The file could not be written; the file that was at `path` is unchanged.
    """
    with atomic_path(path) as unfinished:
        unfinished.write_bytes(content)


def swap_dirs(folder: Path, new: Path, old: Path) -> None:
    """Move `folder` to `old` if it exists, then `new` to `folder`; if the second move fails, undo the first."""
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:  # including a Ctrl-C between the two
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise


@contextmanager
def replace_files(folder: Path, stale: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary folder whose files replace those in `folder` at the end; files named in `stale` are deleted.

    Nothing in `folder` changes before all new files are complete. If the process is killed during the renames,
    `finish_replacement` completes them. Other files in `folder` stay.
    """
    new, ready = folder / NEW, folder / READY
    shutil.rmtree(new, ignore_errors=True)
    with wrap_write_errors(folder):
        new.mkdir()
    copy_mode(folder, new)
    try:
        yield new
        with wrap_write_errors(folder):
            for name in stale:
                (new / f"{name}{STALE}").touch()
            new.rename(ready)
            finish_replacement(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def finish_replacement(folder: Path) -> None:
    """Complete a `replace_files` that was killed during its renames, if there was one."""
    ready = folder / READY
    for file in sorted(ready.glob("*")):
        if file.name.endswith(STALE):
            with suppress(OSError):  # if it is missing or is a folder, the new files still replace the others
                (folder / file.name.removesuffix(STALE)).unlink()
            file.unlink()
        else:
            file.replace(folder / file.name)
    with suppress(FileNotFoundError):
        ready.rmdir()


def copy_mode(source: Path, target: Path) -> None:
    """Copy the permissions of a file or folder to another, where the file system has permissions."""
    with suppress(OSError):
        target.chmod(source.stat().st_mode & (0o777 if target.is_dir() else 0o666))


def fsync_file(handle: int) -> None:
    """Flush an open file to the disk, where the file system supports it.

    Raises:
        OSError: The file could not be written.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def fsync_dir(folder: Path) -> None:
    """Flush a folder's renames to the disk, where the system supports it."""
    with suppress(OSError):  # Windows cannot open folders; some file systems refuse
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):
            os.fsync(handle)
        os.close(handle)


@contextmanager
def locked(folder: Path, instead: str) -> Iterator[None]:
    """Hold a folder's lock, which the system releases however the process ends; create the folder if it is missing.

    Raises:
        UsageError: Another process holds the lock; `instead` is the flag to suggest.
        UserError: The folder cannot be written to.
    """
    with wrap_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    with wrap_write_errors(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # filelock falls back to another method without flock
        try:
            lock.acquire()
        except Timeout as error:
            raise UsageError(f"{folder}: in use by another process; wait until it ends, or use {instead}") from error
    try:
        yield
    finally:
        lock.release()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
