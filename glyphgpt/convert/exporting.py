"""What every way out has in common: a checkpoint taken apart, and its parts in the form that others want."""

from typing import Any

import numpy as np

from glyphgpt.checkpoint import Arrays, weight_shapes
from glyphgpt.inference.numpy_gpt import sinusoids
from glyphgpt.settings import ModelConfig


def bake_sinusoids(config: ModelConfig, weights: Arrays) -> tuple[ModelConfig, Arrays]:
    """Convert sinusoidal positions to a learned table, scaled embeddings, and a head that is not scaled."""
    embedding = weights["token_embedding.weight"]
    learned = {
        "token_embedding.weight": embedding * np.float32(config.embedding_scale),
        "position.embedding.weight": sinusoids(0, config.block_size, config.n_embd),
        "head.weight": weights.get("head.weight", embedding),
    }
    return config.model_copy(update={"position": "learned", "tie_embeddings": False}), weights | learned


def add_missing_weights(config: ModelConfig, weights: Arrays, **changes: Any) -> Arrays:
    """Add the gains of 1 and the biases of 0 that the weights of a changed form would have and these have not."""
    shapes = weight_shapes(config.model_copy(update=changes))
    missing = {name: shape for name, shape in shapes.items() if name not in weights}
    return weights | {name: np.full(shape, name.endswith(".weight"), np.float32) for name, shape in missing.items()}


def rename_weights(weights: Arrays, names: dict[str, str]) -> Arrays:
    """Return the weights under the names that others have for our modules.

    >>> list(rename_weights({"blocks.3.mlp.up.weight": np.zeros(1)}, {"blocks": "h", "mlp.up": "mlp.c_fc"}))
    ['h.3.mlp.c_fc.weight']
    """
    result: Arrays = {}
    for name, array in weights.items():
        module, _, kind = name.rpartition(".")
        block = ""
        if module.startswith("blocks."):
            _, layer, module = module.split(".", 2)
            block = f"{names['blocks']}.{layer}."
        result[f"{block}{names[module]}.{kind}"] = array
    return result


def byte_symbols() -> str:
    """Return the letter that stands for each of the 256 bytes: itself where it is printable Latin-1, else a later one.

    That is how GPT-2 wrote its vocabulary (https://github.com/openai/gpt-2/blob/master/src/encoder.py).

    >>> "".join(byte_symbols()[byte] for byte in b"a b")
    'aĠb'
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0x100)} - {0xAD}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))
