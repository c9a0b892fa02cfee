"""The order of training windows, and reading them from a split onto the device.

A window is a range of consecutive tokens. The order of windows is a pure function of (seed, step), so a checkpoint
stores no data state, and a resumed run sees the same data, also with another number of processes.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glyphgpt.data.dataset import Split
from glyphgpt.data.tokenizers import Tokens, token_dtype

CPU_RESIDENT_BYTES, GPU_RESIDENT_BYTES = 1 << 24, 1 << 30
"""Size on disk up to which a split is copied to the device; copying a large one for a CPU takes a second."""


def windows_per_epoch(tokens: int, block_size: int) -> int:
    """Return the number of windows in an epoch: as many as leave a choice of block_size phases, but at least 1."""
    return max(1, (tokens - block_size) // block_size)


@lru_cache(maxsize=2)  # a batch may extend into the next epoch
def epoch_order(tokens: int, block_size: int, seed: int, epoch: int) -> tuple[int, Tokens]:
    """Return an epoch's phase, which is the start of window 0, and the indices of its windows in training order.

    The windows are adjacent and shuffled. Each reads block_size + 1 tokens, of which the last is only a target.
    """
    windows = windows_per_epoch(tokens, block_size)
    rng = np.random.default_rng((seed, epoch))
    phase = int(rng.integers(tokens - windows * block_size))
    order: Tokens = np.arange(windows).astype(token_dtype(windows))  # compact, since large texts have many windows
    rng.shuffle(order)
    return phase, order


def window_starts(tokens: int, block_size: int, seed: int, first: int, count: int) -> NDArray[np.int64]:
    """Return the starts of `count` windows from window `first` on, counted over all epochs, int64 of shape (count,)."""
    epochs, positions = np.divmod(np.arange(first, first + count), windows_per_epoch(tokens, block_size))
    starts = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        phase, order = epoch_order(tokens, block_size, seed, int(epoch))
        starts[in_epoch] = phase + block_size * order[positions[in_epoch]].astype(np.int64)
    return starts


class Windows:
    """Reads windows of a split as token ids on the device."""

    def __init__(self, split: Split, device: torch.device) -> None:
        """Copy a small split to the device; windows of a large one are read from disk on demand."""
        self.split, self.device = split, device
        self._resident: Tensor | None = None
        self._executor = ThreadPoolExecutor(1)
        self._prefetched: tuple[NDArray[np.int64], int, Future[Tensor]] | None = None
        limit = CPU_RESIDENT_BYTES if device.type == "cpu" else GPU_RESIDENT_BYTES
        if split.tokens * split.dtype.itemsize <= limit:
            # torch supports few operations on 16-bit and 32-bit unsigned integers
            dtype = np.uint8 if split.dtype == np.uint8 else np.int32
            self._resident = torch.from_numpy(split.slice(0, split.tokens).astype(dtype)).to(device)

    def read(self, starts: NDArray[np.int64], length: int) -> Tensor:
        """Return the `length` tokens from each start, int64 of shape (len(starts), length)."""
        if self._resident is not None:
            index = torch.from_numpy(starts).to(self.device)[:, None] + torch.arange(length, device=self.device)
            return self._resident[index].long()
        if self._prefetched and self._prefetched[1] == length and np.array_equal(self._prefetched[0], starts):
            rows = self._prefetched[2].result()
        else:
            rows = self._read_from_disk(starts, length)
        if self.device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)

    def prefetch(self, starts: NDArray[np.int64], length: int) -> None:
        """Start to read the windows of the next call of `read` in another thread."""
        if self._resident is None:
            self._prefetched = starts, length, self._executor.submit(self._read_from_disk, starts, length)

    def _read_from_disk(self, starts: NDArray[np.int64], length: int) -> Tensor:
        rows = np.stack([self.split.slice(start, start + length) for start in starts])
        return torch.from_numpy(rows.astype(np.int64))
