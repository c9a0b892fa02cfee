"""Training windows: each is visited once per epoch, in an order that depends only on the seed and the position."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as tries
from hypothesis import strategies as st

from glyphgpt.data import batches
from glyphgpt.data.batches import Windows, epoch_order, window_starts, windows_per_epoch
from glyphgpt.data.dataset import Split

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
    windows = windows_per_epoch(tokens, block_size)
    starts = window_starts(tokens, block_size, seed, epoch * windows, windows)
    ordered = np.sort(starts)
    assert ordered[0] >= 0
    assert ordered[-1] + block_size + 1 <= tokens
    assert set(np.diff(ordered)) <= {block_size}
    assert windows == len(starts) >= (tokens - 1) // block_size - 1


@pytest.mark.parametrize("tokens", [9, 15, 16, 17, 23, 24, 100, 103])
def test_every_token_is_a_target_in_some_epoch(tokens: int) -> None:
    block_size = 8
    starts = window_starts(tokens, block_size, 0, 0, 200 * windows_per_epoch(tokens, block_size))
    assert set((starts[:, None] + np.arange(1, block_size + 1)).flat) == set(range(1, tokens))


@tries(deadline=None, max_examples=100)
@given(size=sizes(), seed=SEEDS, first=st.integers(0, 10**6))
def test_window_starts_do_not_depend_on_how_many_are_requested(size: tuple[int, int], seed: int, first: int) -> None:
    twelve = window_starts(*size, seed, first, 12).tolist()
    halves = [window_starts(*size, seed, first + offset, 6) for offset in (0, 6)]
    singles = [window_starts(*size, seed, first + offset, 1) for offset in reversed(range(12))]
    epoch_order.cache_clear()
    assert np.concatenate(halves).tolist() == np.concatenate(singles[::-1]).tolist() == twelve
    assert window_starts(*size, seed, first, 12).tolist() == twelve


def test_seeds_and_epochs_differ() -> None:
    tokens, block_size = 1000, 7
    windows = windows_per_epoch(tokens, block_size)
    orders = {
        tuple(window_starts(tokens, block_size, seed, epoch * windows, windows))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25
    assert len({order[0] % block_size for order in orders}) > 1
    assert all(list(order) != sorted(order) for order in orders)


def test_a_split_may_hold_a_single_window() -> None:
    assert windows_per_epoch(9, 8) == 1
    assert window_starts(9, 8, 1337, 0, 5).tolist() == [0] * 5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("resident", [True, False])
def test_windows_hold_the_tokens_from_each_start(
    monkeypatch: pytest.MonkeyPatch, dtype: type[np.unsignedinteger], resident: bool
) -> None:
    tokens = (np.arange(100) * 7919 % np.iinfo(dtype).max).astype(dtype)
    split = Split((tokens[:10], tokens[10:13], tokens[13:]), characters=100)
    monkeypatch.setattr(batches, "CPU_RESIDENT_BYTES", split.tokens * tokens.itemsize - (not resident))
    windows = Windows(split, torch.device("cpu"))
    starts = np.array([90, 0, 9, 12])
    rows = windows.read(starts, 10)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [tokens[start : start + 10].tolist() for start in starts]
    windows.prefetch(starts[:2], 10)
    assert windows.read(starts, 10).equal(rows), "other starts were prefetched"
    windows.prefetch(starts, 10)
    assert windows.read(starts, 9).equal(rows[:, :9]), "another length was prefetched"
    assert windows.read(starts, 10).equal(rows)
    monkeypatch.setattr(Split, "slice", None)
    assert windows.read(starts, 10).equal(rows), "already prefetched"
    if resident:
        assert windows.read(starts[:2], 10).equal(rows[:2])
    else:
        with pytest.raises(TypeError):
            windows.read(starts[:2], 10)
