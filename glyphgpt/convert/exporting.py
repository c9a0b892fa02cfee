"""What every way out has in common: a checkpoint taken apart, and its parts in the form that others want."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from glyphgpt import checkpoint as checkpoints
from glyphgpt.checkpoint import Arrays, Checkpoint
from glyphgpt.data.tokenizers import Tokenizer, tokenizer_from_dict
from glyphgpt.errors import UserError
from glyphgpt.inference.numpy_gpt import Form, check_form, expected_shapes


def load(place: Path, data_dir: Path) -> tuple[Checkpoint, Form, Tokenizer]:
    """Load a checkpoint, or a run's best, with its form and its tokenizer.

    Raises:
        UserError: it is none, or its parts do not belong together.
    """
    checkpoint = checkpoints.load_checkpoint(checkpoints.find_checkpoint(place), with_optimizer=False)
    checkpoint.check_weights()
    tokenizer = tokenizer_from_dict(checkpoint.metadata.tokenizer, data_dir)
    try:
        form = check_form(checkpoint.metadata.model, checkpoint.model)
    except ValueError as error:  # pydantic's errors are ValueErrors too
        raise UserError(f"{checkpoint.path}: its config and its weights do not belong together") from error
    if tokenizer.vocab_size != form.vocab_size:
        raise UserError(f"{checkpoint.path}: its tokenizer and its network differ in their vocabularies")
    return checkpoint, form, tokenizer


def bake_sinusoids(form: Form, weights: Arrays) -> tuple[Form, Arrays]:
    """Write sinusoidal positions as a learned table, with the embeddings scaled, and a head that is not."""
    pair = 10000.0 ** (-2 * np.arange(form.n_embd // 2) / form.n_embd)
    angle = np.outer(np.arange(form.block_size), pair)  # (T, C / 2)
    waves = np.stack((np.sin(angle), np.cos(angle)), axis=-1).reshape(form.block_size, -1)  # (T, C)
    embedding, scale = weights["token_embedding.weight"], math.sqrt(form.n_embd) if form.small_embeddings else 1
    learned = {
        "token_embedding.weight": embedding * np.float32(scale),
        "position.embedding.weight": waves.astype(np.float32),
        "head.weight": weights.get("head.weight", embedding),
    }
    return form.model_copy(update={"position": "learned", "tie_embeddings": False}), weights | learned


def add_missing_weights(form: Form, weights: Arrays, **changes: Any) -> Arrays:
    """Add the gains of 1 and the biases of 0 that the weights of a changed form would have and these have not."""
    shapes = expected_shapes(form.model_copy(update=changes))
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
