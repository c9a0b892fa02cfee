"""Shared code of the converters: output paths, new checkpoints, and other programs' weights and vocabularies."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from glyphgpt.checkpoint import Arrays, Checkpoint, Metadata, TrainState, save_checkpoint, weight_shapes
from glyphgpt.cli import command
from glyphgpt.data.tokenizers import BPETokenizer, bytes_to_unicode
from glyphgpt.errors import UsageError
from glyphgpt.inference.numpy_gpt import sinusoids
from glyphgpt.settings import ConvertSettings, ModelConfig


def output_path(settings: ConvertSettings, example: str) -> Path:
    """Return the path to write.

    Raises:
        UsageError: `out` is not set, or it exists and `overwrite` is not set.
    """
    if not settings.out:
        raise UsageError(f"the output has no path; add one, for example --out={example}")
    if Path(settings.out).exists() and not settings.overwrite:
        raise UsageError(f"{settings.out} exists already; add --overwrite to replace it, or choose another --out")
    return Path(settings.out)


def make_checkpoint(
    config: dict[str, Any], weights: Arrays, tokenizer: dict[str, Any], *, step: int = 0, path: Path = Path()
) -> Checkpoint:
    """Return a checkpoint without settings, dataset and optimizer state; `path` is the file that it was read from."""
    metadata = Metadata(
        model=config, tokenizer=tokenizer, settings={}, data="", val_loss=None, state=TrainState(step=step), scaler={}
    )  # fmt: skip
    return Checkpoint(metadata, weights, path=path)


def write_checkpoint(checkpoint: Checkpoint, out: Path) -> str:
    """Write a converted checkpoint; return a message for the user."""
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(checkpoint, out)
    parameters = sum(weight.size for weight in checkpoint.model.values())
    tokens = f"{checkpoint.metadata.model['vocab_size']:,} {checkpoint.metadata.tokenizer['kind']} tokens"
    return f"{out}: {parameters:,} parameters, {tokens}; sample it: {command('sample.py', out)}"


def rename_weight(name: str, names: dict[str, str]) -> str:
    """Translate the name of a weight; `names` maps the names of modules and of the list of blocks.

    >>> rename_weight("blocks.3.mlp.up.weight", {"blocks": "h", "mlp.up": "mlp.c_fc"})
    'h.3.mlp.c_fc.weight'

    Raises:
        KeyError: `names` does not have the module.
    """
    block = re.match(r"(\D+)\.(\d+)\.", name)
    prefix = f"{names[block[1]]}.{block[2]}." if block else ""
    module, _, kind = name[block.end() if block else 0 :].rpartition(".")
    return f"{prefix}{names[module]}.{kind}"


def bake_sinusoids(config: ModelConfig, weights: Arrays) -> tuple[ModelConfig, Arrays]:
    """Convert sinusoidal positions to a learned table, scaled token embeddings and an unscaled output head."""
    embedding = weights["token_embedding.weight"]
    learned = {
        "token_embedding.weight": embedding * np.float32(config.embedding_scale),
        "position.embedding.weight": sinusoids(0, config.block_size, config.n_embd),
        "head.weight": weights.get("head.weight", embedding),
    }
    return config.model_copy(update={"position": "learned", "tie_embeddings": False}), weights | learned


def add_missing_weights(config: ModelConfig, weights: Arrays, **changes: Any) -> Arrays:
    """Add gains of 1 and biases of 0, so that the weights are those of the config with these changes."""
    shapes = weight_shapes(config.model_copy(update=changes))
    missing = {name: shape for name, shape in shapes.items() if name not in weights}
    return weights | {name: np.full(shape, name.endswith(".weight"), np.float32) for name, shape in missing.items()}


def split_qkv(config: ModelConfig, weights: Arrays) -> Arrays:
    """Replace attention.qkv by attention.q, .k and .v; with qk_norm, add gains of 1 as attention.q_norm and .k_norm."""
    result = {name: weight for name, weight in weights.items() if ".attention.qkv." not in name}
    for name in [name for name in weights if name not in result]:
        thirds = zip("qkv", np.split(weights[name], 3), strict=True)
        result |= {name.replace("qkv", part): third for part, third in thirds}
        if config.qk_norm:
            gain = np.ones(config.head_size, np.float32)
            result |= {name.replace("qkv", f"{part}_norm"): gain for part in "qk"}
    return result


def in_symbols(token: bytes) -> str:
    """Return a token as GPT-2's vocabulary represents it."""
    symbols = bytes_to_unicode()
    return "".join(symbols[byte] for byte in token)


def merges_in_symbols(tokenizer: BPETokenizer) -> list[str]:
    """Return the merges of a BPE as lines in GPT-2's format."""
    return [f"{in_symbols(first)} {in_symbols(second)}" for first, second in tokenizer.merges()]


def read_merges(path: Path) -> list[str]:
    """Read the merges of a BPE vocabulary from a file in GPT-2's format, without its version line.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line for line in lines if line and not line.startswith("#version")]
