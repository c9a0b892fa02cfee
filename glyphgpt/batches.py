"""Which windows of the text make up a step, and how they get to the device.

The order is a pure function of (seed, step), so there is no state to save: a resumed run, or one on another
number of processes, sees the same data.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glyphgpt.shards import Split

RESIDENT_BYTES = 1 << 30  # a split up to this size on disk is kept on the device whole


def windows_per_epoch(tokens: int, block_size: int) -> int:
    """Return how many windows an epoch visits: so many that their common phase can vary by a block or more."""
    return max(1, (tokens - block_size) // block_size)


@lru_cache(maxsize=2)  # a batch may reach into the next epoch
def epoch_starts(tokens: int, block_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return where each window of an epoch starts, in the order of training.

    Windows lie side by side from a random phase on, and come in a random order; each needs block_size + 1
    tokens, the last one as target only.
    """
    windows = windows_per_epoch(tokens, block_size)
    random = np.random.default_rng((seed, epoch))
    phase = random.integers(tokens - windows * block_size)
    return phase + block_size * random.permutation(windows)


def window_starts(tokens: int, block_size: int, seed: int, first: int, count: int) -> NDArray[np.int64]:
    """Return the starts of windows first ... first + count - 1 of training, counted over all epochs."""
    epochs, places = np.divmod(np.arange(first, first + count), windows_per_epoch(tokens, block_size))
    starts = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        starts[here] = epoch_starts(tokens, block_size, seed, int(epoch))[places[here]]
    return starts


class Windows:
    """Cuts windows out of a split, as token ids on the device."""

    def __init__(self, split: Split, device: torch.device) -> None:
        """Move the split to the device if it is small; else windows are read from disk as they are needed."""
        self.split, self.device = split, device
        self._resident: Tensor | None = None
        if split.tokens * split.dtype.itemsize <= RESIDENT_BYTES:
            # torch has few operations on 16-bit and 32-bit unsigned integers
            dtype = np.uint8 if split.dtype == np.uint8 else np.int32
            self._resident = torch.from_numpy(split.slice(0, split.tokens).astype(dtype)).to(device)

    def at(self, starts: NDArray[np.int64], length: int) -> Tensor:
        """Return the `length` tokens from each start on, int64 of shape (len(starts), length)."""
        if self._resident is None:
            cut = [self.split.slice(start, start + length) for start in starts]
            rows = torch.from_numpy(np.stack(cut).astype(np.int64))
            if self.device.type == "cuda":
                rows = rows.pin_memory()
            return rows.to(self.device, non_blocking=True)
        index = torch.from_numpy(starts).to(self.device)[:, None] + torch.arange(length, device=self.device)
        return self._resident[index].long()
