"""Changes to a text that the user asked for: line ends, Unicode forms, rare characters, and repeated lines.

A change maps a stream of documents (glyphgpt/data/text.py) to another stream, however the text is divided into parts.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator

from glyphgpt.data.records import Documents
from glyphgpt.data.tokenizers import REPLACEMENT, Tokenizer
from glyphgpt.settings import PrepareSettings

SHORT = {"lines": 20, "passages": 50}
"""Lines and passages with fewer characters may be repeated."""
SEPARATORS = {"lines": r"\n", "passages": r"(?:\r?\n){2,}"}
"""What separates lines, and passages: empty lines."""
LONGEST = 1 << 20
"""A line or passage that is longer is cut there."""


class Cleaner:
    """Changes streams as the settings ask. What repeats a line or passage of an earlier stream counts as repeated."""

    def __init__(self, settings: PrepareSettings) -> None:
        """Begin with no stream."""
        self.settings = settings
        self.repeated = Repeated(settings.deduplicate) if settings.deduplicate in SHORT else None

    def clean(self, stream: Iterator[Documents]) -> Iterator[Documents]:
        """Yield the changed documents of a stream."""
        if self.settings.newlines == "lf":
            stream = rewrite(stream, boundary_of_line_ends, unix_line_ends)
        if self.settings.normalize == "nfc":
            stream = rewrite(stream, boundary_of_characters, lambda text: unicodedata.normalize("NFC", text))
        if self.repeated:
            stream = rewrite(stream, self.repeated.boundary, self.repeated.drop)
        return stream


def rewrite(
    stream: Iterator[Documents], boundary: Callable[[str], int], change: Callable[[str], str]
) -> Iterator[Documents]:
    """Yield the documents after a change to their text.

    Args:
        boundary: Returns how many characters of a text can be changed without what follows.
    """
    rest = ""  # of the last document
    for first, *others in stream:
        *finished, last = rest + first, *others
        end = boundary(last)
        rest = last[end:]
        yield [*map(change, finished), change(last[:end])]
    if rest:
        yield [change(rest)]


def boundary_of_line_ends(text: str) -> int:
    r"""Return the length of a text without \r at its end, which \n may follow."""
    return len(text.removesuffix("\r"))


def unix_line_ends(text: str) -> str:
    r"""Return a text with \n in place of \r\n and \r."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def boundary_of_characters(text: str) -> int:
    """Return the index of the last character that does not combine with those before it."""
    for index in range(len(text) - 1, -1, -1):
        is_vowel_or_final = "\u1160" <= text[index] <= "\u11ff"  # of a Korean syllable
        if not is_vowel_or_final and unicodedata.category(text[index])[0] != "M":
            return index
    return 0


class Repeated:
    """Drops lines or passages that have occurred before. It remembers a hash of each."""

    def __init__(self, kind: str) -> None:
        """Begin with none; `kind` is "lines" or "passages"."""
        self.separator = re.compile(f"({SEPARATORS[kind]})")
        self.next_part = re.compile(f"{SEPARATORS[kind]}(?=[^\\r\\n])")
        self.short = SHORT[kind]
        self.seen: set[int] = set()

    def boundary(self, text: str) -> int:
        """Return where the last line or passage begins."""
        starts = [match.end() for match in self.next_part.finditer(text)]
        return starts[-1] if starts else len(text) if len(text) >= LONGEST else 0

    def drop(self, text: str) -> str:
        """Return a text without its repeated lines or passages, and what separates them from the next ones."""
        parts = [*self.separator.split(text), ""]
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return "".join(part + separator for part, separator in pairs if not self.is_repeated(part.strip("\r\n")))

    def is_repeated(self, part: str) -> bool:
        """Return whether a line or passage has occurred before, and remember it."""
        if len(part) < self.short:
            return False
        key = hash(part)
        is_known = key in self.seen
        self.seen.add(key)
        return is_known


def replace_unknown(stream: Iterator[Documents], tokenizer: Tokenizer) -> Iterator[Documents]:
    """Yield the documents with REPLACEMENT for each character that has no token."""
    for documents in stream:
        yield [
            text.translate(dict.fromkeys(map(ord, tokenizer.unknown_characters(text)), REPLACEMENT))
            for text in documents
        ]
