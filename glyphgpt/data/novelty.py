"""Novelty: how much of a text stands word for word in another one.

The short text is hashed, and the long one, which may have any size, is read once past these hashes. All windows of a
length are found (with 64-bit hashes, by Karp & Rabin 1987), not only a sample of them.
"""

import codecs
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
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
HASH_BASE = 0x9E3779B97F4A7C15
INVERSE_BASE = pow(HASH_BASE, -1, 2**64)
FILTER_BITS = 20  # of a hash: a table of them rules out nearly all windows of the long text

Points = NDArray[np.uint32]
NO_CHARACTER: Points = np.array([0x110000], np.uint32)
Places = NDArray[np.int64]
UInt64s = NDArray[np.uint64]


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
    """Where the longest run stands in the long text, in characters; -1 if there is none."""


class Hashes:
    """The hashes of all windows of a text: the sum over i of (1 + point i) * HASH_BASE^i, modulo 2^64."""

    def __init__(self, points: Points) -> None:
        """Prepare to hash windows of any length."""
        self.points = points
        terms = (points.astype(np.uint64) + np.uint64(1)) * powers(HASH_BASE, len(points))
        self.sums = np.concatenate((np.zeros(1, np.uint64), terms.cumsum(dtype=np.uint64)))
        self.factors = powers(INVERSE_BASE, len(points))  # make a hash independent of where its window starts

    def windows(self, length: int, starts: Places | None = None) -> UInt64s:
        """Return the hashes of the windows of `length` that start at these places, by default of all."""
        if starts is None:
            count = self.count(length)
            return (self.sums[length : length + count] - self.sums[:count]) * self.factors[:count]
        return (self.sums[starts + length] - self.sums[starts]) * self.factors[starts]

    def count(self, length: int) -> int:
        """Return the number of windows of this length."""
        return max(0, len(self.points) - length + 1)


def powers(base: int, count: int) -> UInt64s:
    """Return the powers 0 to count - 1 of a number, modulo 2^64."""
    return _powers(base, 1 << count.bit_length())[:count]


@lru_cache(maxsize=8)
def _powers(base: int, count: int) -> UInt64s:
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.multiply.accumulate(factors)


class Windows:
    """The windows of one length in some texts, and which of them stand in a long text."""

    def __init__(self, texts: Sequence[Hashes], length: int) -> None:
        """Hash the windows; at least one text must be that long."""
        self.texts, self.length = texts, length
        hashes = np.concatenate([text.windows(length) for text in texts])
        self.known, self.index = np.unique(hashes, return_inverse=True)
        self.found = np.zeros(len(self.known), bool)
        self.filter = np.zeros(1 << FILTER_BITS, bool)
        self.filter[self.known >> np.uint64(64 - FILTER_BITS)] = True

    def search(self, part: Hashes, starts: Places | None) -> Places:
        """Return which of these windows of a part of the long text, by default of all, stand in the texts."""
        if starts is not None:
            starts = starts[starts < part.count(self.length)]
        hashes = part.windows(self.length, starts)
        maybe = np.flatnonzero(self.filter[hashes >> np.uint64(64 - FILTER_BITS)])
        index = np.searchsorted(self.known, hashes[maybe])
        same = self.known[np.minimum(index, len(self.known) - 1)] == hashes[maybe]
        self.found[index[same]] = True
        return maybe[same] if starts is None else starts[maybe[same]]

    def covered_characters(self) -> int:
        """Return how many characters of the texts lie in windows that were found."""
        found, total = self.found[self.index], 0
        for text in self.texts:
            count = text.count(self.length)
            steps = np.zeros(len(text.points) + 1, np.int64)
            steps[:count] += found[:count]
            steps[self.length : self.length + count] -= found[:count]
            total += int((steps.cumsum() > 0).sum())
            found = found[count:]
        return total


class LongestRun:
    """The longest run of some texts that was found in a long text so far."""

    def __init__(self, texts: Sequence[Hashes]) -> None:
        """Begin with none."""
        self.most = max((len(text.points) for text in texts), default=0)
        self.windows = lru_cache(maxsize=8)(partial(Windows, texts))
        self.text, self.place = "", -1

    def search(self, part: Hashes, first: int, starts: Places | None) -> None:
        """Look for longer runs that start at these places, by default at any, of a part of the long text.

        Runs longer by 1, 2, 4, 8, ... characters are tried until there is none, then longer by half as many each time.
        """
        step, growing = 1, True
        while step:
            length = len(self.text) + step
            if found := length <= self.most and (places := self.windows(length).search(part, starts)).size > 0:
                start = int(places[0])
                self.text = part.points[start : start + length].tobytes().decode("utf-32-le", "surrogatepass")
                self.place, starts = first + start, places
            growing &= found
            step = step * 2 if growing else step // 2


class Search:
    """A search for some texts in a long text, which is read in parts."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Hash the texts."""
        hashes = [Hashes(code_points(text)) for text in texts]
        self.characters, self.longest = sum(map(len, texts)), LongestRun(hashes)
        lengths = [length for length in sorted(LENGTHS) if length <= self.longest.most]
        self.windows = {length: Windows(hashes, length) for length in lengths}

    def read(self, part: Hashes, first: int) -> None:
        """Look for the texts in a part of the long text that starts at character `first`."""
        starts = starts_of_longer = None
        for length, windows in self.windows.items():
            starts = windows.search(part, starts)  # a window stands there only if the shorter ones do
            if length <= len(self.longest.text) + 1:
                starts_of_longer = starts
        self.longest.search(part, first, starts_of_longer)

    def copied(self) -> Copied:
        """Return what was found."""
        covered = {length: windows.covered_characters() for length, windows in self.windows.items()}
        fractions = {length: covered.get(length, 0) / max(1, self.characters) for length in LENGTHS}
        return Copied(self.characters, fractions, self.longest.text, self.longest.place)


def find_copied(groups: Sequence[Sequence[str]], long_text: Iterable[Points]) -> list[Copied]:
    """Return what of each group of texts stands in a long text, which is given in parts."""
    searches = [Search(texts) for texts in groups]
    for part, first in overlapping(long_text, max([0, *(search.longest.most - 1 for search in searches)])):
        for search in searches:
            search.read(part, first)
    return [search.copied() for search in searches]


def copied_fraction(texts: Sequence[str], length: int, long_text: Iterable[Points]) -> float:
    """Return the fraction of some texts that lies in runs of `length` characters or more that stand in a long text."""
    hashes = [Hashes(code_points(text)) for text in texts]
    if all(text.count(length) == 0 for text in hashes):
        return 0.0
    windows = Windows(hashes, length)
    for part, _ in overlapping(long_text, length - 1):
        windows.search(part, None)
    return windows.covered_characters() / sum(map(len, texts))


def overlapping(parts: Iterable[Points], overlap: int) -> Iterator[tuple[Hashes, int]]:
    """Yield the hashes of each part, with `overlap` points before it, and the index of its first point."""
    rest, first = np.zeros(0, np.uint32), 0
    for part in parts:
        points = np.concatenate((rest, part))
        yield Hashes(points), first
        rest = points[max(0, len(points) - overlap) :]
        first += len(points) - len(rest)


def read_points(split: Split, tokenizer: Tokenizer, description: str, most: float = math.inf) -> Iterator[Points]:
    """Yield the code points of a split, in parts, with a progress bar.

    Of a split with more than `most` tokens, it yields parts from evenly spaced places, with NO_CHARACTER between them.
    """
    table: Any = code_points(tokenizer.characters) if isinstance(tokenizer, CharTokenizer) else None
    parts = -(-split.tokens // CHUNK_TOKENS)
    chosen = max(1, int(min(split.tokens, most) / split.tokens * parts))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for number in tqdm(range(chosen), description, unit="part", leave=False, delay=1, disable=None):
        start = number * parts // chosen * CHUNK_TOKENS
        tokens = split.slice(start, min(start + CHUNK_TOKENS, split.tokens))
        yield code_points(decoder.decode(tokenizer.decode_bytes(tokens))) if table is None else table[tokens]
        if chosen < parts:
            yield NO_CHARACTER
