"""The files that words of a command line name (files, folders, patterns, standard input), and names in messages.

Each file is found once, whatever links lead to it, so the same files are found however they are named. Links to folders
are followed; a file below a named folder goes by its own name where it has one there. What is left out is counted.
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

from glyphgpt.errors import UsageError

STANDARD_INPUT = "standard input"
STANDARD_INPUTS = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
SHOWN = 3
LONGEST = 200  # characters of a name in a list
ESCAPED = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[nrt])")

DANGLING = "links that lead nowhere"
AGAIN = "read already"
UNREADABLE = "cannot be read"
SPECIAL = "neither files nor folders"

Identity = tuple[int, int]


class FileFinder:
    """Finds the files of several words, each file once."""

    def __init__(self) -> None:
        """Begin with no files."""
        self.files: list[Path | None] = []
        """In the order of the words, within a word sorted; None is standard input."""
        self._seen: set[Identity] = set()
        self._left_out: dict[str, dict[Path, None]] = {}

    def add(self, word: str) -> None:
        """Find the files of a word: itself, all below a folder but for hidden ones, or all that match a pattern.

        Raises:
            UsageError: there are none.
        """
        if word in STANDARD_INPUTS:
            if None in self.files:
                raise UsageError("standard input (-) can be read only once")
            self.files.append(None)
            return
        path, shown = Path(word), sanitize(word) or "''"
        explicit = bool(word) and os.path.lexists(path)
        if explicit and not os.path.exists(path):  # noqa: PTH110  (Path.exists raises where the way there is closed)
            raise UsageError(
                f"{shown}: this link leads to {sanitize(path.readlink())}, where there is nothing"
                if path.is_symlink()
                else f"{shown}: {UNREADABLE}"
            )
        matches = [path] if explicit else self._matching(path) if word else []
        if not matches:
            raise UsageError(f"{shown}: no such file or folder")
        files = [match for match in matches if not is_folder(match)]
        for _, children in self._walk(filter(is_folder, matches)):
            files += [child for child in children if not is_folder(child)]
        found, again = self._readable(files, special=explicit and not is_folder(path))
        self._seen.update(found)
        self.files += sorted(found.values())
        if not found and not again:
            if explicit and not is_folder(path):
                raise UsageError(f"{shown}: neither a file nor a folder")
            others = f" that can be read; left out: {self.left_out()}" if self._left_out else ""
            raise UsageError(f"{shown}: this {'folder' if explicit else 'pattern'} holds no files{others}")

    def left_out(self) -> str:
        """Return what was left out and why, in a bounded line; empty if nothing was."""
        counted = {f"{len(paths):,} {reason}": list_names(list(paths)) for reason, paths in self._left_out.items()}
        return ", ".join(f"{count} ({names})" for count, names in counted.items())

    def _leave_out(self, reason: str, path: Path) -> None:
        self._left_out.setdefault(reason, {})[path] = None

    def _readable(self, files: Iterable[Path], *, special: bool) -> tuple[dict[Identity, Path], bool]:
        """Return which files are to be read, each by the name through the fewest links, and whether some are already.

        `special` is whether pipes and terminals are to be read too.
        """
        found: dict[Identity, Path] = {}
        again = False
        for file in dict.fromkeys(files):
            try:
                status = file.stat()
            except OSError:
                self._leave_out(DANGLING if file.is_symlink() else UNREADABLE, file)
                continue
            key = (status.st_dev, status.st_ino)
            stream = stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode)
            if not (stat.S_ISREG(status.st_mode) or (special and stream)):
                self._leave_out(SPECIAL, file)
            elif key in self._seen:
                again = True
                self._leave_out(AGAIN, file)
            elif key in found:
                found[key], other = sorted((found[key], file), key=nearness)
                self._leave_out(AGAIN, other)
            else:
                found[key] = file
        return found, again

    def _matching(self, pattern: Path) -> list[Path]:
        """Return what matches a pattern, as glob.glob does, but each folder once, so that loops of links end."""
        found = [Path(pattern.anchor)]
        for part in pattern.parts[bool(pattern.anchor) :]:
            if part == "**":
                found = [folder for folder, _ in self._walk(filter(is_folder, found))]
            elif glob.has_magic(part):
                children = [child for folder in filter(is_folder, found) for child in self._children(folder)]
                found = [child for child in children if matches_part(child.name, part)]
            else:
                found = [folder / part for folder in found if os.path.lexists(folder / part)]
        return found

    def _walk(self, tops: Iterable[Path]) -> Iterator[tuple[Path, list[Path]]]:
        """Yield folders, and all below them that are not hidden, each once, with what they hold.

        Links are followed last, so that folders go by their own names.
        """
        folders, links = deque(sorted(tops, key=nearness)), deque[Path]()
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
                self._leave_out(AGAIN, folder)

    def _children(self, folder: Path) -> list[Path]:
        """Return what a folder holds, sorted."""
        try:
            return sorted(folder.iterdir())
        except OSError:
            self._leave_out(UNREADABLE, folder)
            return []


def find_files(words: Sequence[str]) -> FileFinder:
    """Find the files that words name.

    Raises:
        UsageError: a word names none.
    """
    finder = FileFinder()
    for word in words:
        finder.add(word)
    return finder


def is_stream(path: str | Path) -> bool:
    """Return whether a path is standard input, a pipe or a terminal: what is there only once, without its own name."""
    path = Path(path)
    return str(path) in STANDARD_INPUTS or (path.exists() and not path.is_file() and not path.is_dir())


def is_folder(path: Path) -> bool:
    """Return whether a path leads to a folder; one that leads nowhere does not."""
    return os.path.isdir(path)  # noqa: PTH112  (Path.is_dir raises where the way there is closed)


def nearness(path: Path) -> tuple[int, int, tuple[str, ...]]:
    """Return a key that sorts paths through fewer links first, then shorter ones."""
    return sum(part.is_symlink() for part in (path, *path.parents)), len(path.parts), path.parts


def matches_part(name: str, part: str) -> bool:
    """Return whether a name matches a part of a pattern; hidden names match only a part that begins with a dot."""
    return fnmatch(name, part) and (part.startswith(".") or not name.startswith("."))


def sanitize(name: str | Path) -> str:
    r"""Return a name as printable text on one line: bytes that are not UTF-8 and control characters are escaped.

    >>> print(sanitize(b"caf\xe9\n.txt".decode("utf-8", "surrogateescape")))
    caf\xe9\n.txt
    """
    return "".join(c if c.isprintable() else escape(c) for c in str(name))


def escape(character: str) -> str:
    """Return a character that is not printable as bash and Python write it."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as Python has it in names
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if 0x80 <= code < 0x100 else character.encode("unicode_escape").decode()


def list_names(names: Sequence[str | Path], shown: int = SHOWN) -> str:
    """Return the first names of a list, sanitized and shortened, and how many more there are.

    >>> list_names(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    texts = [sanitize(name) for name in names[:shown]]
    texts = [text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}" for text in texts]
    return ", ".join(texts) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


def shell_word(name: str | Path) -> str:
    r"""Return a name, which may be sanitized already, as bash reads it, for commands that users copy.

    >>> print(shell_word(b"my caf\xe9.txt".decode("utf-8", "surrogateescape")), shell_word("my own.txt"))
    $'my caf\xe9.txt' 'my own.txt'
    """
    text = sanitize(name)
    if text.startswith("-"):
        text = f"./{text}"  # lest a program take it for an option
    return "$'" + text.replace("'", "\\'") + "'" if ESCAPED.search(text) else shlex.quote(text)
