"""Inspection of a text: what it consists of, and what in it may disturb training.

An Inspector reads a text once, in parts. It counts all characters and lines, and examines the first EXAMINED characters
for problems and repeated lines.
"""

import re
import unicodedata
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from glyphgpt.data.cleaning import SHORT
from glyphgpt.data.dataset import Found, Place, Split, TextReport
from glyphgpt.data.novelty import LENGTHS, copied_fraction, read_points
from glyphgpt.data.tokenizers import CharacterCounts, Tokenizer, decode

EXAMINED, COMPARED = 5_000_000, 10_000_000
"""Characters that are examined, and tokens of the training text that are compared with the validation text."""
RAREST = 12
"""Number of the rarest characters that are listed."""
FEW = 10
"""Occurrences of a character below which a model learns next to nothing about it."""
LONG_LINE = 10_000
"""Characters of a line that is worth a notice."""

LONE_RETURN = re.compile(r"\r(?!\n)")
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]")
"""Characters that show nothing: soft hyphens, joiners, marks of direction, line separators."""
MOJIBAKE = re.compile(
    "\u00c3[\u0080-\u00bf]|\u00c2[\u0080-\u00bf]|\u00e2(?:\u0080.|\u20ac.)"
    "|[\u00d0\u00d1][\u0080-\u00bf]{1,2}[\u00d0\u00d1]"
)
"""What UTF-8 looks like after it was decoded as Latin-1 or Windows-1252: é, quotation marks, Cyrillic letters."""

SCRIPTS = {
    "ARABIC", "ARMENIAN", "BENGALI", "CJK", "CYRILLIC", "DEVANAGARI", "GEORGIAN", "GREEK", "HANGUL", "HEBREW",
    "HIRAGANA", "KATAKANA", "LATIN", "TAMIL", "THAI",
}  # fmt: skip
"""Scripts that are told apart."""

LEAK_LENGTH = LENGTHS[1]
"""Characters of a run of validation text that hardly occurs twice by chance."""
VAL_PIECES, PIECE_TOKENS = 100, 2000
"""Pieces of a longer validation text in which leaks are looked for."""
HASHED_TOKENS = 1 << 22
"""Tokens of records that are hashed at once."""


class Inspector:
    """Inspects a text that is read part by part."""

    def __init__(self) -> None:
        """Begin with no text."""
        self.characters = CharacterCounts()
        self.first_places: dict[int, Place] = {}  # by code point
        self.problems: dict[str, Found] = {}
        self.file, self.line = "", 1
        self.examined = self.longest_line = self.repeated = 0
        self.seen_lines: set[int] = set()  # hashes
        self.line_start = ""  # the beginning of a line whose end is in the next part
        self.ends_in_line = False  # whether the text so far ends within a line
        self.held = ""  # a carriage return at the end of the last part

    def add(self, text: str, file: str) -> None:
        """Inspect the next part of the text, which is in this file."""
        if file != self.file:
            self.finish_file()
            self.file, self.line = file, 1
        text = self.held + text
        self.held = "\r" if text.endswith("\r") else ""
        self.add_part(text.removesuffix(self.held))

    def add_part(self, text: str) -> None:
        """Inspect a part that does not end within a line end."""
        lines_before = self.newlines()
        line, index = self.line, 0
        for first, point in sorted((text.index(chr(point)), point) for point in self.characters.add(text)):
            line, index = line + text.count("\n", index, first), first
            self.first_places[point] = Place(file=self.file, line=line)
        if self.examined < EXAMINED:
            self.examine(text)
        else:
            self.line_start = ""
        self.line += self.newlines() - lines_before
        self.ends_in_line = not text.endswith("\n") if text else self.ends_in_line

    def newlines(self) -> int:
        """Return the number of newlines in the text so far."""
        return int(self.characters.counts[ord("\n")])

    def finish_file(self) -> None:
        """Inspect the end of a file."""
        if self.held:
            self.add_part(self.held)
        if self.line_start:
            self.examine_line(self.line_start, self.line)
        self.held = self.line_start = ""

    def place(self, text: str, index: int) -> Place:
        """Return the place of a character of the current part."""
        return Place(file=self.file, line=self.line + text.count("\n", 0, index))

    def examine(self, text: str) -> None:
        """Look for problems and repeated lines."""
        self.examined += len(text)
        if "\r" in text:
            windows, all_returns = text.count("\r\n"), text.count("\r")
            self.note("\\r\\n", windows, text, text.find("\r\n"))
            lone = next((match.start() for match in LONE_RETURN.finditer(text)), 0)
            self.note("\\r", all_returns - windows, text, lone)
        if not text.isascii():
            for what, pattern in (("invisible", INVISIBLE), ("mojibake", MOJIBAKE)):
                found = [match.start() for match in pattern.finditer(text)]
                self.note(what, len(found), text, min(found, default=0))
            if not unicodedata.is_normalized("NFC", text):
                lines = [line for line in text.split("\n") if not unicodedata.is_normalized("NFC", line)]
                self.note("nfd", len(lines), text, text.find(lines[0]) if lines else 0)
        *lines, rest = (self.line_start + text).split("\n")
        for number, line in enumerate(lines):
            self.examine_line(line, self.line + number)
        self.line_start = rest

    def note(self, what: str, count: int, text: str, index: int) -> None:
        """Note that something occurs `count` times in the current part, first at an index."""
        if count:
            known = self.problems.get(what)
            place = known.place if known else self.place(text, index)
            self.problems[what] = Found(what=what, count=count + (known.count if known else 0), place=place)

    def examine_line(self, line: str, number: int) -> None:
        """Measure a line, and compare it with the earlier ones."""
        if len(line) > self.longest_line:
            self.longest_line = len(line)
            if len(line) > LONG_LINE:
                place = Place(file=self.file, line=number)
                self.problems["long"] = Found(what="long", count=len(line), place=place)
        if len(line) >= SHORT["lines"]:
            key = hash(line)
            self.repeated += len(line) if key in self.seen_lines else 0
            self.seen_lines.add(key)

    def report(self) -> TextReport:
        """Return the results."""
        self.finish_file()
        counts = self.characters.counts
        points = np.flatnonzero(counts)
        rarest = points[np.argsort(counts[points], kind="stable")][:RAREST].tolist()
        kinds = Counter[str]()
        for point in points.tolist():
            kinds[kind_of(chr(point))] += int(counts[point])
        return TextReport(
            characters=int(counts.sum()),
            lines=self.newlines() + self.ends_in_line,
            kinds=dict(kinds.most_common()),
            rare=int((counts[points] < FEW).sum()),
            rarest=[Found(what=chr(p), count=int(counts[p]), place=self.first_places[p]) for p in rarest],
            examined=self.examined,
            problems=list(self.problems.values()),
            longest_line=self.longest_line,
            repeated=self.repeated / max(1, self.examined),
        )


def leaked_fraction(train: Split, val: Split, tokenizer: Tokenizer) -> float:
    """Return the fraction of the validation text that occurs in the training text too.

    Counted are runs of LEAK_LENGTH characters or more, or whole records if they are a larger part. Of a longer training
    text, COMPARED tokens from all parts are compared; then the fraction is a lower bound.
    """
    starts, length = [0], val.tokens
    if length > VAL_PIECES * PIECE_TOKENS:
        starts = np.linspace(0, val.tokens - PIECE_TOKENS, VAL_PIECES, dtype=int).tolist()
        length = PIECE_TOKENS
    pieces = [decode(tokenizer, val.slice(start, start + length)) for start in starts]
    points = read_points(train, tokenizer, "comparing the splits", most=COMPARED)
    in_records = 0.0 if train.record_ends is None else repeated_records(train, val)
    return max(in_records, copied_fraction(pieces, LEAK_LENGTH, points))


def repeated_records(train: Split, val: Split) -> float:
    """Return the fraction of the validation tokens that are in records which occur in the training split too."""
    hashes, sizes = record_hashes(val)
    is_repeated = np.isin(hashes, record_hashes(train)[0])
    return float(sizes[is_repeated].sum() / sizes.sum())


def record_hashes(split: Split) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return a hash of each record of a split, and its size in tokens."""
    ends = split.record_ends
    assert ends is not None
    sizes = np.diff(ends)
    factors = np.random.default_rng(0).integers(2**63, size=int(sizes.max()), dtype=np.uint64)  # by place in a record
    hashes = np.empty(len(sizes), dtype=np.uint64)
    first = 0
    while first < len(sizes):  # memory holds some of the records at a time
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + HASHED_TOKENS, side="right")) - 1)
        tokens = split.slice(ends[first], ends[last]).astype(np.uint64) + np.uint64(1)
        starts = ends[first:last] - ends[first]
        places = np.arange(len(tokens)) - np.repeat(starts, sizes[first:last])
        hashes[first:last] = np.add.reduceat(tokens * factors[places], starts)
        first = last
    return hashes, sizes


def kind_of(character: str) -> str:
    """Return the kind of a character; for letters, their script."""
    category = unicodedata.category(character)
    if character in "\t\n\r" or category[0] == "Z":
        return "white space"
    if category[0] == "L":
        script = re.split("[ -]", unicodedata.name(character, ""))[0]
        return f"{script.title() if script != 'CJK' else script} letters" if script in SCRIPTS else "other letters"
    names = {"M": "combining marks", "N": "digits", "P": "punctuation", "S": "symbols"}
    return names.get(category[0], "control characters" if category == "Cc" else "other characters")
