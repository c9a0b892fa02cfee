"""Split a stream of documents into segments of the training and validation splits, and encode them in threads."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from glyphgpt.data.records import Documents
from glyphgpt.data.tokenizers import Tokenizer, Tokens, encode_documents


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
            yield Segment(split, start, segment, is_last=True)
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
        pending.append((segment, executor.submit(encode_documents, segment.documents, tokenizer)))
        if len(pending) > 2 * (os.cpu_count() or 1):
            oldest, tokens = pending.popleft()
            yield oldest, tokens.result()
    for segment, tokens in pending:
        yield segment, tokens.result()
