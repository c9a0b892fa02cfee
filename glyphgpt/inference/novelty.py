"""Novelty: how much of a text stands word for word in another one.

The short text is hashed, and the long one, which may have any size, is read past these hashes once or a few times. All
windows of a length are found (with 64-bit hashes, by Karp & Rabin 1987), not only a sample of them.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from glyphgpt.data.dataset import Split
from glyphgpt.data.tokenizers import CharTokenizer, Tokenizer, code_points

LENGTHS = (20, 50, 100)
"""Lengths of copied runs, in characters, whose share of the text is reported."""
CHUNK_TOKENS = 2**20
"""Tokens of the long text that are read at once."""
TRIALS = 8
"""Lengths that are tried in one reading of the long text, to find the longest copied run."""
HASH_BASE = 0x9E3779B97F4A7C15
FILTER_BITS = 20  # of a hash: a table of them rules out nearly all windows of the long text

Points = NDArray[np.uint32]
Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Copied:
    """What of some texts stands in a long text."""

    characters: int
    """Number of characters of the texts."""
    fractions: dict[int, float]
    """For each of LENGTHS, the fraction of the characters that lie in copied runs of this length or more."""
    longest: str
    """The longest copied run."""
    place: int
    """Where the longest run stands in the long text, in characters."""


class Windows:
    """The hashes of all windows of one length in some texts, and where each was found in a long text."""

    def __init__(self, texts: Sequence[Points], length: int) -> None:
        """Hash the windows."""
        self.length = length
        self.hashes = [window_hashes(text, length) for text in texts]
        self.known: Hashes = np.unique(np.concatenate(self.hashes))
        self.places = np.full(len(self.known), -1)
        self.filter = np.zeros(1 << FILTER_BITS, bool)
        self.filter[self.known >> np.uint64(64 - FILTER_BITS)] = True

    def search(self, points: Points, start: int) -> None:
        """Look for the windows in a part of the long text that starts at character `start`."""
        hashes = window_hashes(points, self.length)
        candidates = np.flatnonzero(self.filter[hashes >> np.uint64(64 - FILTER_BITS)])
        index = np.searchsorted(self.known, hashes[candidates])
        index[index == len(self.known)] = 0
        same = self.known[index] == hashes[candidates] if len(self.known) else np.zeros(0, bool)
        self.places[index[same]] = candidates[same] + start

    def place(self, text: int, position: int) -> int:
        """Return where the window at a position of a text stands in the long text, or -1."""
        return int(self.places[np.searchsorted(self.known, self.hashes[text][position])])

    def found(self) -> list[NDArray[np.bool_]]:
        """Return for each text which of its windows stand in the long text."""
        return [self.places[np.searchsorted(self.known, hashes)] >= 0 for hashes in self.hashes]


def window_hashes(points: Points, length: int) -> Hashes:
    """Return a hash of each window of `length` of the points (N,), (N - length + 1,) or empty.

    The hash of two adjacent parts is that of the first times a power, plus that of the second; so windows of 2, 4, 8,
    ... points are combined to any length.
    """
    count = max(0, len(points) - length + 1)
    result: Hashes = np.zeros(count, np.uint64)
    part, size, covered, power = points.astype(np.uint64) + np.uint64(1), 1, 0, HASH_BASE
    while size <= length:
        if length & size:
            result = result * np.uint64(power) + part[covered : covered + count]
            covered += size
        part = part[: max(0, len(part) - size)] * np.uint64(power) + part[size:]
        power = power**2 % 2**64
        size *= 2
    return result


def find_copied(texts: Sequence[str], long_text: Callable[[], Iterable[Points]]) -> Copied:
    """Return what of some texts stands in a long text, which is read several times, in parts of code points."""
    points = [code_points(text) for text in texts]
    total, highest = sum(map(len, points)), max(map(len, points), default=0)
    lengths = [*LENGTHS, *(LENGTHS[-1] * 2**i for i in range(1, 20))]
    tried = search_all(points, [n for n in lengths if n <= highest], long_text)
    fractions = {n: covered_characters(points, tried[n]) / total if n in tried else 0.0 for n in LENGTHS}
    low, high = 0, highest + 1  # the longest run has at least `low` characters, and less than `high`
    trials = sorted(tried)
    while True:
        low = max([low, *(n for n in trials if any_found(tried[n]))])
        high = min([high, *(n for n in trials if n > low)])
        if high - low <= 1:
            break
        trials = sorted({int(n) for n in np.linspace(low, high, TRIALS + 2)[1:-1]} - {low}) or [low + 1]
        tried |= search_all(points, trials, long_text)
    return Copied(total, fractions, *longest_run(texts, tried.get(low)))


def longest_run(texts: Sequence[str], windows: Windows | None) -> tuple[str, int]:
    """Return the first window that was found, and where it stands in the long text."""
    if windows:
        for number, found in enumerate(windows.found()):
            if found.any():
                position = int(np.argmax(found))
                return texts[number][position : position + windows.length], windows.place(number, position)
    return "", -1


def any_found(windows: Windows) -> bool:
    """Return whether a window of the texts stands in the long text."""
    return bool((windows.places >= 0).any())


def search_all(
    points: Sequence[Points], lengths: Sequence[int], long_text: Callable[[], Iterable[Points]]
) -> dict[int, Windows]:
    """Look for all windows of these lengths in one reading of the long text."""
    tried = {length: Windows(points, length) for length in lengths}
    rest, start = np.zeros(0, np.uint32), 0
    for part in long_text() if lengths else ():
        rest = np.concatenate((rest, part))
        for windows in tried.values():
            windows.search(rest, start)
        kept = min(len(rest), max(lengths) - 1)  # windows may begin in one part and end in the next
        start += len(rest) - kept
        rest = rest[len(rest) - kept :]
    return tried


def covered_characters(points: Sequence[Points], windows: Windows) -> int:
    """Return how many characters of the texts lie in windows that were found."""
    total = 0
    for text, found in zip(points, windows.found(), strict=True):
        steps = np.zeros(len(text) + 1, np.int64)
        steps[: len(found)] += found
        steps[windows.length : windows.length + len(found)] -= found
        total += int((steps.cumsum() > 0).sum())
    return total


def read_points(split: Split, tokenizer: Tokenizer, description: str) -> Iterator[Points]:
    """Yield the code points of a split, in parts, with a progress bar."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    table: Any = code_points(tokenizer.characters) if isinstance(tokenizer, CharTokenizer) else None
    with tqdm(total=split.tokens, unit="token", desc=description, leave=False, delay=1, disable=None) as progress:
        for start in range(0, split.tokens, CHUNK_TOKENS):
            tokens = split.slice(start, min(start + CHUNK_TOKENS, split.tokens))
            if table is None:
                yield code_points(decoder.decode(b"".join(tokenizer.token_bytes(int(token)) for token in tokens)))
            else:
                yield table[tokens]
            progress.update(len(tokens))
