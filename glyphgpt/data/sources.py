"""Find the files that command-line words name (files, folders, glob patterns, standard input), and format file names.

Each file is found once, whatever links lead to it, so the result does not depend on how the files are named. Links to
folders are followed, but a path without links is preferred. Skipped files are counted for a warning.
"""

import glob
import os
import re
import shlex
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from glyphgpt.errors import UsageError, sanitize, shorten

STANDARD_INPUT = "standard input"
STANDARD_INPUTS = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
LIST_LENGTH = 3  # names in a list
MAX_NAME_LENGTH = 200  # characters of such a name
ESCAPED = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[nrt])")

# Reasons to skip a file
BROKEN_LINK = "broken link"
DUPLICATE = "duplicate"
UNREADABLE = "unreadable path"
SPECIAL = "special file"

Identity = tuple[int, int]  # device and inode


class FileFinder:
    """Finds the files that command-line words name, each file once."""

    def __init__(self) -> None:
        self.files: list[Path | None] = []
        """In the order of the words, and sorted within a word; None is standard input."""
        self._seen: set[Identity] = set()
        self._skipped: dict[str, dict[Path, None]] = {}  # by reason

    def find(self, word: str) -> None:
        """Add a file, all files below a folder except hidden ones, all matches of a pattern, or standard input.

        Raises:
            UsageError: The word names no readable file.
        """
        if word in STANDARD_INPUTS:
            if None in self.files:
                raise UsageError("standard input (-) can be read only once")
            self.files.append(None)
            return
        path, name = Path(word), sanitize(word) or "''"
        exists = bool(word) and os.path.lexists(path)
        if exists and not os.path.exists(path):  # noqa: PTH110  (Path.exists raises if a parent is inaccessible)
            problem = f"broken link to {sanitize(path.readlink())}" if path.is_symlink() else "cannot be read"
            raise UsageError(f"{name}: {problem}")
        matches = [path] if exists else self._glob(path) if word else []
        if not matches:
            raise UsageError(f"{name}: no such file or folder")
        is_single = exists and not is_folder(path)
        files = [match for match in matches if not is_folder(match)]
        for _, children in self._walk(filter(is_folder, matches)):
            files += [child for child in children if not is_folder(child)]
        found, has_duplicates = self._select(files, allow_streams=is_single)
        self._seen.update(found)
        self.files += sorted(found.values())
        if not found and not has_duplicates:
            if is_single:
                raise UsageError(f"{name}: neither a file nor a folder")
            skipped = f"; skipped: {self.describe_skipped()}" if self._skipped else ""
            raise UsageError(f"{name}: no files {'in this folder' if exists else 'match this pattern'}{skipped}")

    def describe_skipped(self) -> str:
        """Return one line with the number of skipped files for each reason, and some of their names, or ""."""
        return ", ".join(
            f"{len(paths):,} {reason}{'s' * (len(paths) > 1)} ({list_names(list(paths))})"
            for reason, paths in self._skipped.items()
        )

    def _skip(self, reason: str, path: Path) -> None:
        self._skipped.setdefault(reason, {})[path] = None

    def _select(self, files: Iterable[Path], *, allow_streams: bool) -> tuple[dict[Identity, Path], bool]:
        """Return the new files under their preferred paths, and whether some files were found by an earlier word.

        `allow_streams` is whether pipes and terminals count as files.
        """
        found: dict[Identity, Path] = {}
        has_duplicates = False
        for file in dict.fromkeys(files):
            try:
                status = file.stat()
            except OSError:
                self._skip(BROKEN_LINK if file.is_symlink() else UNREADABLE, file)
                continue
            identity = (status.st_dev, status.st_ino)
            is_pipe = stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode)
            if not (stat.S_ISREG(status.st_mode) or (allow_streams and is_pipe)):
                self._skip(SPECIAL, file)
            elif identity in self._seen:
                has_duplicates = True
                self._skip(DUPLICATE, file)
            elif identity in found:
                found[identity], duplicate = sorted((found[identity], file), key=path_preference)
                self._skip(DUPLICATE, duplicate)
            else:
                found[identity] = file
        return found, has_duplicates

    def _glob(self, pattern: Path) -> list[Path]:
        """Return the paths that match a pattern, as glob.glob does, but visit each folder once, so that loops end."""
        paths = [Path(pattern.anchor)]
        for part in pattern.parts[bool(pattern.anchor) :]:
            if part == "**":
                paths = [folder for folder, _ in self._walk(filter(is_folder, paths))]
            elif glob.has_magic(part):
                children = [child for folder in filter(is_folder, paths) for child in self._children(folder)]
                paths = [child for child in children if matches_part(child.name, part)]
            else:
                paths = [folder / part for folder in paths if os.path.lexists(folder / part)]
        return paths

    def _walk(self, tops: Iterable[Path]) -> Iterator[tuple[Path, list[Path]]]:
        """Yield each folder at or below `tops` once, with its children; hidden files and folders are left out.

        Links are followed last, so that a folder is found by a path without links if there is one.
        """
        folders, links = deque(sorted(tops, key=path_preference)), deque[Path]()
        seen: dict[Identity, Path] = {}
        while folders or links:
            folder = (folders or links).popleft()
            status = folder.stat()
            first = seen.setdefault((status.st_dev, status.st_ino), folder)
            if first is folder:
                children = [child for child in self._children(folder) if not child.name.startswith(".")]
                for child in filter(is_folder, children):
                    (links if child.is_symlink() else folders).append(child)
                yield folder, children
            elif first != folder:
                self._skip(DUPLICATE, folder)

    def _children(self, folder: Path) -> list[Path]:
        """Return the files and folders in a folder, sorted."""
        try:
            return sorted(folder.iterdir())
        except OSError:
            self._skip(UNREADABLE, folder)
            return []


def find_files(words: Sequence[str]) -> FileFinder:
    """Find the files that the words name.

    Raises:
        UsageError: A word names no readable file.
    """
    finder = FileFinder()
    for word in words:
        finder.find(word)
    return finder


def is_stream(path: str | Path) -> bool:
    """Return whether a path is standard input, a pipe or a terminal, which can be read only once."""
    path = Path(path)
    return str(path) in STANDARD_INPUTS or (path.exists() and not path.is_file() and not path.is_dir())


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder or a link to one."""
    return os.path.isdir(path)  # noqa: PTH112  (Path.is_dir raises if a parent is inaccessible)


def path_preference(path: Path) -> tuple[int, int, tuple[str, ...]]:
    """Return a sort key that puts paths through fewer links first, then shorter paths."""
    return sum(part.is_symlink() for part in (path, *path.parents)), len(path.parts), path.parts


def matches_part(name: str, part: str) -> bool:
    """Return whether a name matches one part of a pattern; a hidden name matches only a part that starts with a dot."""
    return fnmatch(name, part) and (part.startswith(".") or not name.startswith("."))


def list_names(names: Sequence[str | Path], length: int = LIST_LENGTH) -> str:
    """Return the first `length` names of a list, sanitized and shortened, and the number of the others.

    >>> list_names(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    shown = [shorten(name, MAX_NAME_LENGTH) for name in names[:length]]
    return ", ".join(shown) + (f" and {len(names) - length:,} more" if len(names) > length else "")


def shell_word(name: str | Path) -> str:
    r"""Return a name, sanitized or not, as a word of a bash command that the user can copy.

    >>> print(shell_word(b"my caf\xe9.txt".decode("utf-8", "surrogateescape")), shell_word("my own.txt"))
    $'my caf\xe9.txt' 'my own.txt'
    """
    word = sanitize(name)
    if word.startswith("-"):
        word = f"./{word}"  # otherwise a program would read it as an option
    return "$'" + word.replace("'", "\\'") + "'" if ESCAPED.search(word) else shlex.quote(word)
