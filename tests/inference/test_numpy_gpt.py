"""The NumPy network has the logits of model.py, for every combination of switches."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from conftest import NETWORKS, decoder_of, random_model

OTHER = {"position": "sinusoidal", "init": "zero", "tie_embeddings": False}  # init changes the embedding scale


@pytest.mark.parametrize("network", [*NETWORKS, OTHER], ids=lambda network: "-".join(map(str, network.values())))
def test_logits_equal_those_of_the_torch_model(network: dict[str, Any]) -> None:
    model = random_model(**network)
    decoder = decoder_of(model)
    tokens = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens)
    for chunks in ([8], [3, 5], [4, 2, 1, 1], [1] * 8):
        cache = decoder.new_cache(3)
        for start, end in pairwise([0, *np.cumsum(chunks).tolist()]):
            logits = decoder.next_logits(tokens[:, start:end].numpy(), cache)
            assert logits.dtype == np.float32
            np.testing.assert_allclose(logits, expected[:, end - 1], atol=3e-5)
