"""Training rows: an epoch visits all of a text once, in an order that depends only on the seed and the position."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as tries
from hypothesis import strategies as st

from glyphgpt.data.dataset import Split
from glyphgpt.data.rows import RecordRows, WindowRows, evaluation_blocks, training_rows, window_order

SEEDS = st.integers(0, 2**63)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Draw a number of tokens and a block size that fits into them."""
    block_size = draw(st.integers(1, 40))
    return block_size + 1 + draw(st.integers(0, 400)), block_size


@tries(deadline=None, max_examples=200)
@given(size=sizes(), seed=SEEDS, epoch=st.integers(0, 3))
@example(size=(2, 1), seed=0, epoch=0)
@example(size=(9, 8), seed=0, epoch=0)
@example(size=(16, 8), seed=0, epoch=0)
def test_an_epoch_visits_every_window_once(size: tuple[int, int], seed: int, epoch: int) -> None:
    tokens, block_size = size
    rows = WindowRows(tokens, block_size, seed)
    windows = rows.per_epoch
    starts = rows.starts(epoch * windows, windows)
    assert rows.take(epoch * windows, windows) == [[range(s, s + block_size + 1)] for s in starts]
    ordered = np.sort(starts)
    assert ordered[0] >= 0
    assert ordered[-1] + block_size + 1 <= tokens
    assert set(np.diff(ordered)) <= {block_size}
    assert windows == len(starts) >= (tokens - 1) // block_size - 1


@pytest.mark.parametrize("tokens", [9, 15, 16, 17, 23, 24, 100, 103])
def test_every_token_is_a_target_in_some_epoch(tokens: int) -> None:
    block_size = 8
    rows = WindowRows(tokens, block_size, 0)
    starts = rows.starts(0, 200 * rows.per_epoch)
    assert set((starts[:, None] + np.arange(1, block_size + 1)).flat) == set(range(1, tokens))


@tries(deadline=None, max_examples=100)
@given(size=sizes(), seed=SEEDS, first=st.integers(0, 10**6))
def test_starts_do_not_depend_on_how_many_are_requested(size: tuple[int, int], seed: int, first: int) -> None:
    twelve = WindowRows(*size, seed).starts(first, 12).tolist()
    halves = [WindowRows(*size, seed).starts(first + offset, 6) for offset in (0, 6)]
    singles = [WindowRows(*size, seed).starts(first + offset, 1) for offset in reversed(range(12))]
    window_order.cache_clear()
    assert np.concatenate(halves).tolist() == np.concatenate(singles[::-1]).tolist() == twelve
    assert WindowRows(*size, seed).starts(first, 12).tolist() == twelve


def test_seeds_and_epochs_differ() -> None:
    tokens, block_size = 1000, 7
    windows = WindowRows(tokens, block_size, 0).per_epoch
    orders = {
        tuple(WindowRows(tokens, block_size, seed).starts(epoch * windows, windows))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25
    assert len({order[0] % block_size for order in orders}) > 1
    assert all(list(order) != sorted(order) for order in orders)


def test_a_split_may_hold_a_single_window() -> None:
    rows = WindowRows(9, 8, 1337)
    assert rows.per_epoch == 1
    assert rows.starts(0, 5).tolist() == [0] * 5


END = 99


@st.composite
def records(draw: st.DrawFn) -> Split:
    """Draw a split of records of different tokens, in shards."""
    lengths = draw(st.lists(st.integers(1, 25), min_size=1, max_size=60))
    numbers = itertools.count(100)
    tokens = [END]
    for length in lengths:
        tokens += [*itertools.islice(numbers, length), END]
    middle = draw(st.integers(0, len(tokens)))
    shards = np.array(tokens[:middle], np.uint16), np.array(tokens[middle:], np.uint16)
    return Split(tuple(shard for shard in shards if shard.size), sum(lengths), END)


@tries(deadline=None, max_examples=200)
@given(split=records(), block_size=st.integers(1, 40), seed=SEEDS)
def test_an_epoch_visits_every_record_once(split: Split, block_size: int, seed: int) -> None:
    rows = training_rows(split, block_size, seed)
    seen = list[int]()
    for row in rows.take(0, rows.per_epoch):
        tokens = np.concatenate([split.slice(part.start, part.stop) for part in row]).tolist()
        assert 2 <= len(tokens) <= block_size + 1
        if tokens[0] == END == tokens[-1]:
            for one, other in itertools.pairwise(tokens):
                assert END in (one, other) or other == one + 1, "a record follows another without its end"
        else:
            assert len(tokens) == block_size + 1, "a part of a long record has a row of its own"
        seen += tokens[1:]
    predicted = split.slice(1, split.tokens).tolist()
    assert set(seen) == set(predicted)
    ends = split.record_ends
    assert ends is not None
    if np.diff(ends).max() <= block_size:
        assert sorted(seen) == sorted(predicted), "only parts of long records may overlap"


@tries(deadline=None, max_examples=50)
@given(split=records(), block_size=st.integers(1, 40), first=st.integers(0, 500))
def test_rows_of_records_do_not_depend_on_how_many_are_requested(split: Split, block_size: int, first: int) -> None:
    six = training_rows(split, block_size, 1).take(first, 6)
    rows = training_rows(split, block_size, 1)
    assert [rows.take(first + offset, 1)[0] for offset in reversed(range(6))] == six[::-1]


def test_records_meet_others_in_each_epoch_and_fill_the_rows() -> None:
    sizes = np.random.default_rng(0).integers(5, 30, size=300)
    rows = RecordRows(np.cumsum([0, *sizes]), 40, seed=0)
    epochs = [rows.take(epoch * rows.per_epoch, rows.per_epoch) for epoch in range(20)]
    neighbors = {(one.start, other.start) for row in itertools.chain(*epochs) for one, other in itertools.pairwise(row)}
    assert len(neighbors) > 2000
    assert len({tuple(row[0].start for row in epoch) for epoch in epochs}) == 20
    firsts = [len(row[0]) for row in itertools.chain(*epochs) if len(row) > 1]
    lasts = [len(row[-1]) - 1 for row in itertools.chain(*epochs) if len(row) > 1]
    assert abs(np.mean(firsts) - np.mean(lasts)) < 1, "no size prefers a place in the row"
    assert rows.per_epoch < 1.1 * sizes.sum() / 40


def test_records_of_a_row_say_little_of_their_neighbors_sizes() -> None:
    sizes = np.random.default_rng(0).integers(3, 16, size=3000)
    rows = RecordRows(np.cumsum([0, *sizes]), 128, seed=0)
    pairs = [(len(a), len(b)) for row in rows.take(0, rows.per_epoch) for a, b in itertools.pairwise(row)]
    assert abs(np.corrcoef(np.array(pairs).T)[0, 1]) < 0.1


@tries(deadline=None, max_examples=100)
@given(split=records(), block_size=st.integers(1, 40), is_text=st.booleans())
def test_evaluation_blocks_predict_every_token_once(split: Split, block_size: int, is_text: bool) -> None:
    split = Split(split.shards, split.characters) if is_text else split
    starts, sizes = evaluation_blocks(split, block_size)
    predicted = [start + i for start, size in zip(starts, sizes, strict=True) for i in range(1, size + 1)]
    assert predicted == list(range(1, split.tokens))
    assert sizes.max() <= block_size
    for start, size in zip(starts, sizes, strict=True):
        assert is_text or END not in split.slice(start + 1, start + size), "a block extends over two records"
