"""What a CPU decodes with, held to the network that was trained."""

from dataclasses import asdict
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch

from conftest import MODERN, SWITCHES, decoder_of, tiny_model
from glyphgpt.checkpoint import check_weights, weight_shapes
from glyphgpt.settings import ModelConfig
from glyphgpt.training.torch_state import model_arrays
from model import GPT

FORMS = [dict(zip(SWITCHES, values, strict=True)) for values in product(*SWITCHES.values())]
FORMS.append({"position": "sinusoidal", "init": "zero", "tie_embeddings": False})  # which sets the waves' scale


def shaken(**form: Any) -> GPT:
    """A model whose every weight matters."""
    model = tiny_model(**form)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(str(value) for value in form.values()))
def test_logits_are_those_of_the_network(form: dict[str, Any]) -> None:
    model = shaken(**form)
    decoder = decoder_of(model)
    tokens = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(tokens)
    for chunks in ([8], [3, 5], [4, 2, 1, 1], [1] * 8):
        cache = decoder.new_cache(3)
        for start, end in pairwise([0, *np.cumsum(chunks).tolist()]):
            seen = decoder.next_logits(tokens[:, start:end].numpy(), cache)
            assert seen.dtype == np.float32
            np.testing.assert_allclose(seen, wanted[:, end - 1], atol=3e-5)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(str(value) for value in form.values()))
def test_weight_shapes_are_those_of_the_network(form: dict[str, Any]) -> None:
    model = tiny_model(**form)
    config = ModelConfig(**asdict(model.config))
    assert weight_shapes(config) == {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "change",
    [{"n_layer": 3}, {"n_head": 3}, {"n_head": 0}, {"n_embd": 10**30}, {"n_embd": "16"}, {"vocab_size": 12},
     {"norm": "layernorm"}, {"position": "elsewhere"}, {"ngram": 2}, {"token_shift": False}, {"extra": 1}],
    ids=str,
)  # fmt: skip
def test_a_config_that_does_not_fit_the_weights_is_refused(change: dict[str, Any]) -> None:
    model = tiny_model(**MODERN)
    with pytest.raises(ValueError):  # whatever pydantic says
        check_weights({**asdict(model.config), **change}, model_arrays(model))


def test_weights_of_another_precision_are_refused() -> None:
    model = tiny_model()
    weights = {name: array.astype(np.float16) for name, array in model_arrays(model).items()}
    with pytest.raises(ValueError, match="float32"):
        check_weights(asdict(model.config), weights)
