"""Which tokens the model reads together: the rows of training batches, and the blocks of an evaluation.

In a text, a training row is a window: a range of consecutive tokens. In a text of records, each of which lies between
two end-of-text tokens, a row holds whole records, drawn from the whole text; only a record that is longer than the
context is divided.

The order of rows is a pure function of (seed, step), so a checkpoint stores no data state, and a resumed run sees the
same data, also with another number of processes.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from glyphgpt.data.dataset import Split
from glyphgpt.data.tokenizers import Tokens, token_dtype

Ints = NDArray[np.int64]
AHEAD = 32
"""Records among which a row looks for those that fill it."""
Row = Sequence[range]
"""Ranges of tokens that are read one after the other."""


class WindowRows:
    """Training rows of a text: adjacent windows in random order, from another phase in each epoch."""

    def __init__(self, tokens: int, block_size: int, seed: int) -> None:
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.per_epoch = max(1, (tokens - block_size) // block_size)
        """Rows in an epoch: as many as leave a choice of block_size phases, but at least 1."""

    def take(self, first: int, count: int) -> list[Row]:
        """Return `count` rows from row `first` on, counted over all epochs, with block_size + 1 tokens each."""
        return [[range(start, start + self.block_size + 1)] for start in self.starts(first, count).tolist()]

    def starts(self, first: int, count: int) -> Ints:
        """Return the starts of `count` windows from window `first` on, int64 of shape (count,)."""
        epochs, positions = np.divmod(np.arange(first, first + count), self.per_epoch)
        starts = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            phase, order = window_order(self.tokens, self.block_size, self.seed, int(epoch))
            starts[in_epoch] = phase + self.block_size * order[positions[in_epoch]].astype(np.int64)
        return starts


@lru_cache(maxsize=2)  # a batch may extend into the next epoch
def window_order(tokens: int, block_size: int, seed: int, epoch: int) -> tuple[int, Tokens]:
    """Return an epoch's phase, which is the start of window 0, and the indices of its windows in training order.

    The windows are adjacent and shuffled. Each reads block_size + 1 tokens, of which the last is only a target.
    """
    windows = WindowRows(tokens, block_size, seed).per_epoch
    rng = np.random.default_rng((seed, epoch))
    phase = int(rng.integers(tokens - windows * block_size))
    order: Tokens = np.arange(windows).astype(token_dtype(windows))  # compact, since large texts have many windows
    rng.shuffle(order)
    return phase, order


class RecordRows:
    """Training rows of a text of records: whole records, combined so that they fill the rows, anew in each epoch."""

    def __init__(self, ends: Ints, block_size: int, seed: int) -> None:
        """Divide the text at its end-of-text tokens, whose positions `ends` are."""
        self.block_size, self.seed = block_size, seed
        self.starts, self.sizes = divide_records(ends, block_size, overlap=True)
        self.combined = lru_cache(maxsize=2)(self._combined)  # a batch may extend into the next epoch
        self.per_epoch = len(self.combined(0)[1]) - 1
        """Rows of the first epoch. Of another, a few may be left out, or repeated if it has fewer."""

    def take(self, first: int, count: int) -> list[Row]:
        """Return `count` rows from row `first` on, counted over all epochs, with block_size + 1 tokens at most."""
        return [self._row(*divmod(number, self.per_epoch)) for number in range(first, first + count)]

    def _row(self, epoch: int, number: int) -> Row:
        order, firsts = self.combined(epoch)
        number %= len(firsts) - 1
        chosen = order[firsts[number] : firsts[number + 1]]
        starts, sizes = self.starts[chosen].tolist(), self.sizes[chosen].tolist()
        row = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        return [*row[:-1], range(row[-1].start, row[-1].stop + 1)]  # with the end of the last record

    def _combined(self, epoch: int) -> tuple[Ints, Ints]:
        """Return the numbers of the records, row by row, and where each row begins in them, and the end.

        A row takes the next record, in random order, and then whichever of the next AHEAD ones fit. If the best fit was
        chosen, records of one size would share rows, and the model would infer their sizes from their neighbors.
        """
        rng = np.random.default_rng((self.seed, epoch))
        sizes, rank = self.sizes.tolist(), rng.permutation(len(self.sizes)).tolist()
        waiting = iter(rng.permutation(len(sizes)).tolist())
        ahead = list(islice(waiting, AHEAD))
        rows: list[list[int]] = []
        while ahead:
            row, room, place = list[int](), self.block_size, 0
            while place < len(ahead):
                if sizes[ahead[place]] <= room:
                    room -= sizes[ahead[place]]
                    row.append(ahead.pop(place))
                    ahead += islice(waiting, 1)
                else:
                    place += 1
            rows.append(sorted(row, key=rank.__getitem__))
        shuffled = [rows[number] for number in rng.permutation(len(rows))]
        return np.array(list(chain.from_iterable(shuffled))), np.cumsum([0, *map(len, shuffled)])


TrainingRows = WindowRows | RecordRows


def training_rows(split: Split, block_size: int, seed: int) -> TrainingRows:
    """Return the training rows of a split."""
    if split.record_ends is None:
        return WindowRows(split.tokens, block_size, seed)
    return RecordRows(split.record_ends, block_size, seed)


def evaluation_blocks(split: Split, block_size: int) -> tuple[Ints, Ints]:
    """Return the starts of blocks which together predict every token but the first once, and their sizes.

    A block of size n predicts n tokens, block_size at most; it has no others in view. Records are blocks of their own,
    except long ones, which are several.
    """
    ends = np.array([0, split.tokens - 1]) if split.record_ends is None else split.record_ends
    return divide_records(ends, block_size)


def divide_records(ends: Ints, block_size: int, *, overlap: bool = False) -> tuple[Ints, Ints]:
    """Return the starts and the sizes, at most block_size, of the parts of all records, most of which are one part.

    A record begins with the end-of-text token that ends the one before it.

    Args:
        overlap: Whether all parts of a long record are of size block_size, so that the last two overlap.
    """
    starts, sizes = ends[:-1], np.diff(ends)
    parts = -(-sizes // block_size)
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)  # of each part in its record
    starts, sizes = np.repeat(starts, parts), np.repeat(sizes, parts)
    offsets = number * block_size
    if overlap:
        offsets = np.minimum(offsets, np.maximum(sizes - block_size, 0))
    return starts + offsets, np.minimum(sizes - offsets, block_size)
