"""Which windows of the text make up a step, and how they get to the device.

The order is a pure function of (seed, step), so there is no state to save: a resumed run, or one on another
number of processes, sees the same data.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glyphgpt.data.dataset import Split
from glyphgpt.data.tokenizers import Tokens, token_dtype

RESIDENT_BYTES = 1 << 30  # a split up to this size on disk is kept on the device whole


def windows_per_epoch(tokens: int, block_size: int) -> int:
    """Return how many windows an epoch visits: so many that their common phase can vary by a block or more."""
    return max(1, (tokens - block_size) // block_size)


@lru_cache(maxsize=2)  # a batch may reach into the next epoch
def epoch_order(tokens: int, block_size: int, seed: int, epoch: int) -> tuple[int, Tokens]:
    """Return an epoch's phase, and the numbers of its windows in the order of training.

    Windows lie side by side from a random phase on, and come in a random order; each needs block_size + 1
    tokens, the last one as target only.
    """
    windows = windows_per_epoch(tokens, block_size)
    random = np.random.default_rng((seed, epoch))
    phase = int(random.integers(tokens - windows * block_size))
    order: Tokens = np.arange(windows).astype(token_dtype(windows))  # large texts have many windows
    random.shuffle(order)
    return phase, order


def window_starts(tokens: int, block_size: int, seed: int, first: int, count: int) -> NDArray[np.int64]:
    """Return the starts of windows first ... first + count - 1 of training, counted over all epochs."""
    epochs, places = np.divmod(np.arange(first, first + count), windows_per_epoch(tokens, block_size))
    starts = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        phase, order = epoch_order(tokens, block_size, seed, int(epoch))
        starts[here] = phase + block_size * order[places[here]].astype(np.int64)
    return starts


class Windows:
    """Cuts windows out of a split, as token ids on the device."""

    def __init__(self, split: Split, device: torch.device) -> None:
        """Move the split to the device if it is small; else windows are read from disk as they are needed."""
        self.split, self.device = split, device
        self._resident: Tensor | None = None
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[NDArray[np.int64], int, Future[Tensor]] | None = None
        if split.tokens * split.dtype.itemsize <= RESIDENT_BYTES:
            # torch has few operations on 16-bit and 32-bit unsigned integers
            dtype = np.uint8 if split.dtype == np.uint8 else np.int32
            self._resident = torch.from_numpy(split.slice(0, split.tokens).astype(dtype)).to(device)

    def at(self, starts: NDArray[np.int64], length: int) -> Tensor:
        """Return the `length` tokens from each start on, int64 of shape (len(starts), length)."""
        if self._resident is not None:
            index = torch.from_numpy(starts).to(self.device)[:, None] + torch.arange(length, device=self.device)
            return self._resident[index].long()
        if self._ahead and self._ahead[1] == length and np.array_equal(self._ahead[0], starts):
            rows = self._ahead[2].result()
        else:
            rows = self._read(starts, length)
        if self.device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)

    def prefetch(self, starts: NDArray[np.int64], length: int) -> None:
        """Begin to read in another thread what `at` will be asked for next."""
        if self._resident is None:
            self._ahead = starts, length, self._reader.submit(self._read, starts, length)

    def _read(self, starts: NDArray[np.int64], length: int) -> Tensor:
        """Read windows from disk, int64 of shape (len(starts), length)."""
        return torch.from_numpy(
            np.stack([self.split.slice(start, start + length) for start in starts]).astype(np.int64)
        )
