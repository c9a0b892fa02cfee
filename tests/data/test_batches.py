"""Rows are read from shards in memory or on disk."""

import numpy as np
import pytest
import torch

from glyphgpt.data import batches
from glyphgpt.data.batches import PADDING, Reader, inputs_and_targets
from glyphgpt.data.dataset import Split
from glyphgpt.data.rows import Row

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("resident", [True, False])
def test_rows_hold_the_tokens_of_their_ranges(
    monkeypatch: pytest.MonkeyPatch, dtype: type[np.unsignedinteger], resident: bool
) -> None:
    tokens = (np.arange(100) * 7919 % np.iinfo(dtype).max).astype(dtype)
    split = Split((tokens[:10], tokens[10:13], tokens[13:]), characters=100)
    monkeypatch.setattr(batches, "CPU_RESIDENT_BYTES", split.tokens * tokens.itemsize - (not resident))
    reader = Reader(split, CPU)
    rows: list[Row] = [[range(90, 100)], [range(5)], [range(9, 12), range(1), range(40, 46)]]
    batch = reader.read(rows, 10)
    assert batch.dtype == torch.int64
    expected = [[int(tokens[i]) for part in row for i in part] for row in rows]
    assert batch.tolist() == [row + [PADDING] * (10 - len(row)) for row in expected]
    inputs, targets = inputs_and_targets(batch)
    assert inputs.shape == targets.shape == (3, 9)
    assert (inputs.min().item(), targets.min().item()) == (0, PADDING)
    reader.prefetch(rows[:2], 10)
    assert reader.read(rows, 10).equal(batch), "other rows were prefetched"
    reader.prefetch(rows, 11)
    assert reader.read(rows, 10).equal(batch), "another length was prefetched"
    reader.prefetch(rows, 10)
    assert reader.read(rows, 10).equal(batch)
    monkeypatch.setattr(Split, "slice", None)
    assert reader.read(rows, 10).equal(batch), "already prefetched"
    if resident:
        assert reader.read(rows[:2], 10).equal(batch[:2])
    else:
        with pytest.raises(TypeError):
            reader.read(rows[:2], 10)
