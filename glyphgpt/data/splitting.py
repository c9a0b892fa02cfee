"""Assign the parts of a text to the training, validation and test splits, and encode the splits in threads."""

import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

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


@dataclass(frozen=True)
class Draw:
    """A random assignment of numbered documents or blocks to splits.

    Of every 1 / (val_fraction + test_fraction) consecutive ones, one is drawn for validation or for the test, so that
    these come from all parts of the text.
    """

    val_fraction: float
    test_fraction: float
    seed: int

    def split_of(self, number: int) -> str:
        """Return the split of a document or block: "train", "val" or "test"."""
        return self.drawn(number, number + 1).get(number, "train")

    def drawn(self, first: int, last: int) -> dict[int, str]:
        """Return those of the numbers from `first` up to `last` that are not for training, with their splits."""
        fraction, splits = self.val_fraction + self.test_fraction, dict[int, str]()
        for group in range(max(0, math.floor(first * fraction) - 1), math.floor(last * fraction) + 2):
            start, end = math.ceil(group / fraction), math.ceil((group + 1) / fraction)
            if start < end and first <= (number := start + random_integer(self.seed, group, end - start)) < last:
                tests = [math.floor(n * self.test_fraction / fraction) for n in (group, group + 1)]
                splits[number] = "test" if tests[1] > tests[0] else "val"
        return splits


@lru_cache(maxsize=64)  # consecutive numbers share a group
def random_integer(seed: int, group: int, limit: int) -> int:
    """Return an integer in [0, limit) that depends on a seed and a group."""
    return int(np.random.default_rng((seed, group)).integers(limit))


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
        drawn = draw.drawn(first, first + len(documents))
        parts: dict[str, Documents] = {}
        for position, document in enumerate(documents):
            # Only the first document continues an earlier one.
            parts.setdefault(drawn.get(first + position, "train"), [""] if position else []).append(document)
        yield from parts.items()
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
        chosen = draw.split_of(number)
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
    index = 0
    while count > len(documents[index]):
        count -= len(documents[index])
        index += 1
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
