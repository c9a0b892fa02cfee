"""Assign the parts of a text to the training, validation and test splits, and encode the splits in threads."""

import math
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, compress

import numpy as np
from numpy.typing import NDArray

from glyphgpt.data.records import Documents
from glyphgpt.data.tokenizers import Tokenizer, Tokens
from glyphgpt.errors import UserError

BLOCKS = 200
"""Blocks of a text for --split=blocks, unless they would be smaller than LEAST_BLOCK or larger than LARGEST_BLOCK."""
LEAST_BLOCK, LARGEST_BLOCK = 1000, 20_000
FEWEST_BLOCKS = 8
"""Blocks that each split has about, in a short text."""
LONGEST_RECORD = 1 << 24
"""The most characters of a record, which memory must hold."""
JOINED_CHARACTERS = 1 << 18
"""Blocks of the same split are processed together up to this many characters."""
PAGE = 1024
"""Random numbers that are drawn together."""


@dataclass(frozen=True)
class Draw:
    """A random assignment of numbered documents or blocks to splits.

    Of every 1 / (val_fraction + test_fraction) consecutive ones, one is drawn for validation or for the test, so that
    these come from all parts of the text.
    """

    val_fraction: float
    test_fraction: float
    seed: int

    def splits(self, first: int, last: int) -> NDArray[np.str_]:
        """Return the splits, "train", "val" or "test", of the documents or blocks from `first` up to `last`."""
        fraction = self.val_fraction + self.test_fraction
        groups = np.arange(max(0, math.floor(first * fraction) - 1), math.floor(last * fraction) + 2)
        starts, ends = np.ceil(groups / fraction), np.ceil((groups + 1) / fraction)
        numbers = np.floor(starts + random_fractions(self.seed, groups) * (ends - starts))
        tests = np.floor(np.stack([groups, groups + 1]) * self.test_fraction / fraction)
        is_inside = (starts < ends) & (first <= numbers) & (numbers < last)
        splits = np.full(last - first, "train")
        splits[numbers[is_inside].astype(np.int64) - first] = np.where(tests[1] > tests[0], "test", "val")[is_inside]
        return splits


def random_fractions(seed: int, groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each of several consecutive groups, which depends on the seed and the group."""
    pages = range(int(groups[0]) // PAGE, int(groups[-1]) // PAGE + 1)
    return np.concatenate([random_page(seed, page) for page in pages])[groups - pages[0] * PAGE]


@lru_cache(maxsize=2)  # consecutive numbers share a page
def random_page(seed: int, page: int) -> NDArray[np.float64]:
    """Return PAGE random numbers in [0, 1)."""
    return np.random.default_rng((seed, page)).random(PAGE)


def split_records(text: str, separator: str) -> list[str]:
    r"""Return the records of a text, without line ends before and after them; empty ones are left out.

    >>> split_records("emma\r\n\nava\n", "\n")
    ['emma', 'ava']
    """
    return strip_records(text.split(separator) if separator else [text])


def strip_records(records: list[str]) -> list[str]:
    """Return records without line ends before and after them; empty ones are left out."""
    return [stripped for record in records if (stripped := record.strip("\r\n"))]


def read_records(stream: Iterator[Documents], separator: str, seen: set[int] | None = None) -> Iterator[Documents]:
    """Yield the records of a stream as documents: what separators divide, or the documents if it is "".

    If there is a set `seen`, it collects hashes of the records, and those whose hash it has already are left out.

    Raises:
        UserError: A record is too long.
    """
    rest = ""
    for first, *others in stream:
        *documents, last = rest + first, *others
        *parts, rest = last.split(separator) if separator else [last]
        records = [record for document in documents for record in split_records(document, separator)]
        yield ["", *drop_repeated([*records, *strip_records(parts)], seen)]
        if len(rest) > LONGEST_RECORD:
            raise UserError(f"a record has more than {LONGEST_RECORD:,} characters; choose another --records")
    yield ["", *drop_repeated(split_records(rest, separator), seen)]


def drop_repeated(records: list[str], seen: set[int] | None) -> list[str]:
    """Return the records whose hashes are not in a set yet, and add them to it; or all records if there is no set."""
    if seen is None:
        return records
    new = []
    for record in records:
        if (key := hash(record)) not in seen:
            seen.add(key)
            new.append(record)
    return new


def assign_documents(stream: Iterator[Documents], draw: Draw, first: int = 0) -> Iterator[tuple[str, Documents]]:
    """Yield the documents with their splits; of each list, those of a split together.

    Args:
        first: Number of the first document.
    """
    for documents in stream:
        splits = draw.splits(first, first + len(documents))
        for split in ("train", "val", "test"):
            chosen = (splits == split).tolist()
            begins = [] if chosen[0] else [""]  # only the first document continues an earlier one
            if any(chosen):
                yield split, [*begins, *compress(documents, chosen)]
        first += len(documents) - 1


def number_blocks(stream: Iterator[Documents], size: int) -> Iterator[tuple[int, Documents]]:
    """Yield the parts of blocks with their numbers. A block ends with the line that holds its character `size`.

    Lines longer than a block are divided.
    """
    number, room = 0, size
    boundary: Documents = []
    for documents in stream:
        for index, document in enumerate(documents):
            boundary = [""] if index else boundary
            rest = document
            while rest:
                line_end = rest.find("\n", max(0, room - 1), room + size)
                end = line_end + 1 if line_end >= 0 else room + size
                yield number, [*boundary, rest[:end]]
                room -= len(rest[:end])
                finished = line_end >= 0 or room <= -size
                rest, boundary = rest[end:], []
                if finished:
                    number, room = number + 1, size


def block_size(characters: int, fraction: float) -> int:
    """Return the characters of a block of a text of about this length, whose smallest split is this fraction of it."""
    size = min(max(characters // BLOCKS, LEAST_BLOCK), LARGEST_BLOCK)
    return max(1, min(size, int(characters * fraction / FEWEST_BLOCKS)))


def assign_blocks(numbered: Iterator[tuple[int, Documents]], draw: Draw) -> Iterator[tuple[str, Documents]]:
    """Yield numbered blocks with their splits; neighbors of the same split, up to JOINED_CHARACTERS, together.

    Where blocks of a split do not follow each other in the text, a document begins.
    """
    split, joined, size = "", [""], 0
    last: dict[str, int] = {}  # number of each split's last block
    for number, (first, *others) in numbered:
        chosen = str(draw.splits(number, number + 1)[0])
        if chosen != split or size > JOINED_CHARACTERS:
            if size:
                yield split, joined
            split, joined, size = chosen, [""], 0
        if number > last.setdefault(chosen, number) + 1:
            joined.append("")
        last[chosen] = number
        joined[-1] += first
        joined += others
        size += len(first) + count_characters(others)
    if size:
        yield split, joined


@dataclass(frozen=True)
class Segment:
    """A part of a split whose tokens do not depend on the text before and after it."""

    split: str
    start: int
    """Characters of the split before the segment."""
    documents: Documents
    is_last: bool
    """Whether the segment is the last of its split."""


def split_text(
    stream: Iterator[Documents], sizes: dict[str, int], tokenizer: Tokenizer, split: str, start: int
) -> Iterator[Segment]:
    """Yield the segments of all splits, which have `sizes` characters, from character `start` of `split` on."""
    splits = list(sizes)
    skip = sum(sizes[name] for name in splits[: splits.index(split)]) + start
    pending = [""]
    for documents in stream:
        if (size := count_characters(documents)) < skip:
            skip -= size
            continue
        first, *others = split_at(documents, skip)[1] if skip else documents
        skip = 0
        pending = [*pending[:-1], pending[-1] + first, *others]
        while (missing := sizes[split] - start) <= count_characters(pending):
            segment, pending = split_at(pending, missing)
            closing = [] if tokenizer.separator is None else [""]  # after which the last record ends
            yield Segment(split, start, [*segment, *closing], is_last=True)
            if split == splits[-1]:
                return
            split, start = splits[splits.index(split) + 1], 0
        if size := count_characters(pending[:-1]) + tokenizer.split_point(pending[-1]):
            segment, pending = split_at(pending, size)
            yield Segment(split, start, segment, is_last=False)
            start += size


def split_at(documents: Documents, count: int) -> tuple[Documents, Documents]:
    """Split documents after `count` characters; a boundary between documents at this point goes to the second part.

    >>> split_at(["ab", "cde", "f"], 3)
    (['ab', 'c'], ['de', 'f'])
    >>> split_at(["ab", "cde", "f"], 2)
    (['ab'], ['', 'cde', 'f'])
    """
    ends = list(accumulate(map(len, documents)))
    index = bisect_left(ends, count)
    count -= ends[index] - len(documents[index])
    return [*documents[:index], documents[index][:count]], [documents[index][count:], *documents[index + 1 :]]


def count_characters(documents: Documents) -> int:
    """Return the number of characters of all documents."""
    return sum(map(len, documents))


def encode_segments(
    segments: Iterator[Segment], tokenizer: Tokenizer, executor: Executor
) -> Iterator[tuple[Segment, Tokens]]:
    """Yield each segment and its tokens in order, while the executor's threads encode the next segments."""
    pending: deque[tuple[Segment, Future[Tokens]]] = deque()
    for segment in segments:
        pending.append((segment, executor.submit(tokenizer.encode_documents, segment.documents)))
        if len(pending) > 2 * (os.cpu_count() or 1):
            oldest, tokens = pending.popleft()
            yield oldest, tokens.result()
    for segment, tokens in pending:
        yield segment, tokens.result()
