"""Reading rows of a split (glyphgpt/data/rows.py) onto the device."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glyphgpt.data.dataset import Split
from glyphgpt.data.rows import Row
from glyphgpt.gpu import to_device

CPU_RESIDENT_BYTES, GPU_RESIDENT_BYTES = 1 << 24, 1 << 30
"""Size on disk up to which a split is copied to the device; copying a large one for a CPU takes a second."""
PADDING = -1
"""Fills rows that are shorter than the others; as a target it is ignored."""


class Reader:
    """Reads rows of a split as token ids on the device."""

    def __init__(self, split: Split, device: torch.device) -> None:
        """Copy a small split to the device; rows of a large one are read from disk on demand."""
        self.split, self.device = split, device
        self._resident: Tensor | None = None
        self._executor = ThreadPoolExecutor(1)
        self._prefetched: tuple[list[Row], int, Future[Tensor]] | None = None
        limit = CPU_RESIDENT_BYTES if device.type == "cpu" else GPU_RESIDENT_BYTES
        if split.tokens * split.dtype.itemsize <= limit:
            # torch supports few operations on 16-bit and 32-bit unsigned integers
            dtype = np.uint8 if split.dtype == np.uint8 else np.int32
            self._resident = torch.from_numpy(split.slice(0, split.tokens).astype(dtype)).to(device)

    def read(self, rows: list[Row], length: int) -> Tensor:
        """Return the tokens of each row, int64 of shape (len(rows), length), where shorter rows end with PADDING."""
        if self._resident is not None:
            index = torch.from_numpy(stack([[np.arange(r.start, r.stop) for r in row] for row in rows], length))
            index = to_device(index, self.device)
            tokens = self._resident[index].long()
            is_full = all(sum(map(len, row)) == length for row in rows)
            return tokens if is_full else tokens.masked_fill(index == PADDING, PADDING)
        if self._prefetched and self._prefetched[:2] == (rows, length):
            batch = self._prefetched[2].result()
        else:
            batch = self._read_from_disk(rows, length)
        return to_device(batch, self.device)

    def prefetch(self, rows: list[Row], length: int) -> None:
        """Start to read the rows of the next call of `read` in another thread."""
        if self._resident is None:
            self._prefetched = rows, length, self._executor.submit(self._read_from_disk, rows, length)

    def _read_from_disk(self, rows: list[Row], length: int) -> Tensor:
        return torch.from_numpy(stack([[self.split.slice(r.start, r.stop) for r in row] for row in rows], length))


def inputs_and_targets(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens that the model reads and those that it predicts, (B, T) each, of rows (B, T + 1)."""
    return batch[:, :-1].clamp(min=0), batch[:, 1:]


def stack(rows: list[list[NDArray[Any]]], length: int) -> NDArray[np.int64]:
    """Return rows, whose parts are joined, as one array (len(rows), length), filled with PADDING."""
    batch = np.full((len(rows), length), PADDING, dtype=np.int64)
    for parts, target in zip(rows, batch, strict=True):
        joined = np.concatenate(parts)
        target[: joined.size] = joined
    return batch
