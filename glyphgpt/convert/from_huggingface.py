"""Import from Hugging Face's transformers: folders that hold a GPT-2, published or exported by glyphgpt.

Only config.json, the tokenizer's JSON and safetensors are read. Nothing in them is executed.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from glyphgpt.checkpoint import Arrays, Checkpoint
from glyphgpt.convert.common import make_checkpoint, output_path, read_merges, rename_weight, write_checkpoint
from glyphgpt.convert.nanogpt import NANOGPT_TO_OURS
from glyphgpt.convert.to_huggingface import (
    ACTIVATIONS,
    CONFIG_FILE,
    SEPARATOR_KEY,
    TOKENIZER_FILE,
    TRANSPOSED,
    WEIGHTS_FILE,
    tokenizer_model,
)
from glyphgpt.data.tokenizers import (
    END_OF_TEXT,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    RecordTokenizer,
    Tokenizer,
    bytes_to_unicode,
)
from glyphgpt.errors import UserError, shorten
from glyphgpt.files import BEST, LAST
from glyphgpt.settings import ConvertSettings, ModelConfig, Network

Vocabulary = tuple[dict[str, int], list[str] | None]
"""The id of each token, and the BPE merges, if there are any."""

INDEX_FILE = "model.safetensors.index.json"
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")
"""Endings of the names of constants that older versions of transformers saved with the weights."""

GPT2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "resid_pdrop": 0.1,
    "activation_function": "gelu_new", "tie_word_embeddings": True, "bias": True,
}  # fmt: skip
"""Defaults of transformers' GPT2Config, but `bias` is our own addition."""
REQUIRED: dict[str, Any] = {
    "model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
}  # fmt: skip
"""The only values of these keys that our network can compute."""
OUR_ACTIVATIONS = {hf_name: ours for ours, hf_name in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu"}
HF_NAMES = {
    "vocab_size": "vocab_size", "block_size": "n_positions", "n_embd": "n_embd", "n_layer": "n_layer",
    "n_head": "n_head", "dropout": "resid_pdrop", "bias": "bias", "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
"""Names of settings here and in GPT2Config."""


def convert_model(path: Path, settings: ConvertSettings) -> str:
    """Convert a folder with a GPT-2 to a checkpoint with the same logits; return a message for the user.

    Raises:
        UserError: The folder does not hold a GPT-2, or our network cannot compute that model.
    """
    out = output_path(settings, "out/gpt2/best.safetensors")
    return write_checkpoint(read_model(path, Path(settings.data_dir)), out)


def is_huggingface_model(path: Path) -> bool:
    """Return whether a path is a folder or safetensors file of Hugging Face, and not a run or checkpoint of ours."""
    if path.is_dir():
        return (path / CONFIG_FILE).exists() and not any((path / name).exists() for name in (BEST, LAST))
    try:
        with safe_open(path, framework="numpy") as file:
            return "glyphgpt" not in (file.metadata() or {}) and (path.parent / CONFIG_FILE).exists()
    except (OSError, SafetensorError):
        return False


def read_model(path: Path, data_dir: Path) -> Checkpoint:
    """Read a folder with a GPT-2, or its safetensors file, as a checkpoint.

    Raises:
        UserError: The folder does not hold a GPT-2, or our network cannot compute that model.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    folder = path if path.is_dir() else path.parent
    config = read_hf_config(folder / CONFIG_FILE)
    tokenizer = read_tokenizer(folder, config["vocab_size"], data_dir)
    weights = read_weights(weight_files(folder) if path.is_dir() else [path])
    if config["tie_embeddings"] and "head.weight" in weights:  # like transformers, tie weights only if they are equal
        config["tie_embeddings"] = np.array_equal(weights["head.weight"], weights.get("token_embedding.weight", ()))
    if config["tie_embeddings"]:
        weights.pop("head.weight", None)
    if not config["bias"]:  # glyphgpt exported it, with zeros as biases
        weights = {name: weight for name, weight in weights.items() if not name.endswith(".bias") or weight.any()}
    checkpoint = make_checkpoint(config, weights, tokenizer.to_dict(), path=path)
    _ = checkpoint.config  # checks the weights
    return checkpoint


def read_hf_config(path: Path) -> dict[str, Any]:
    """Read a config.json as a config of our network.

    Raises:
        UserError: The file cannot be read, or our network cannot compute that model.
    """
    hf_config = GPT2_DEFAULTS | read_json(path)
    for name, value in REQUIRED.items():
        if hf_config.get(name, value) != value:
            raise UserError(f"{path}: {name} is {shorten(hf_config[name])}; only {value} can be converted")
    activation = hf_config["activation_function"]
    if activation not in list(OUR_ACTIVATIONS):  # a list, because the value may not be hashable
        supported = " and ".join(OUR_ACTIVATIONS)
        raise UserError(f"{path}: activation_function is {shorten(activation)}; only {supported} can be converted")
    config = Network().model_dump() | {ours: hf_config[hf_name] for ours, hf_name in HF_NAMES.items()}
    try:
        config = ModelConfig.model_validate(config | {"activation": OUR_ACTIVATIONS[activation]}).model_dump()
    except ValidationError as error:
        problems = [
            f"{HF_NAMES[str(problem['loc'][0])]} = {shorten(repr(problem['input']))}"
            if problem["loc"]
            else str(problem["ctx"]["error"])  # from ModelConfig.check
            for problem in error.errors()
        ]
        raise UserError(f"{path}: cannot be converted: {', '.join(problems)}") from error
    if hf_config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UserError(f"{path}: n_inner is {shorten(hf_config['n_inner'])}; only 4 x n_embd can be converted")
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights.

    Raises:
        UserError: The folder has no weights, or its index is damaged.
    """
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.exists():
        save = "save the model with transformers: model.save_pretrained(...)"
        raise UserError(f"{folder / WEIGHTS_FILE}: no such file; {save}")
    shards = read_json(index).get("weight_map")
    if isinstance(shards, dict) and all(isinstance(name, str) and Path(name).name == name for name in shards.values()):
        return [folder / name for name in sorted(set(shards.values()))]
    raise UserError(f"{index}: does not name the files that hold the weights")


def read_weights(paths: list[Path]) -> Arrays:
    """Read safetensors files as float32, with our names and layout.

    Raises:
        UserError: A file is damaged, or a tensor is not a weight of a GPT-2.
    """
    weights: Arrays = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:  # NumPy has no bfloat16
                for hf_name in file.keys():  # noqa: SIM118
                    if hf_name.endswith(CAUSAL_MASKS):
                        continue
                    prefix = "" if hf_name.startswith(("transformer.", "lm_head.")) else "transformer."
                    name = rename_weight(prefix + hf_name, NANOGPT_TO_OURS)
                    tensor = file.get_tensor(hf_name)
                    if name in weights or not tensor.is_floating_point():
                        raise KeyError(hf_name)
                    weight = tensor.float().numpy()
                    weights[name] = weight.T if name.endswith(TRANSPOSED) else weight
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}: holds {shorten(hf_name)}, which is not a weight of a GPT-2") from error
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"{path}: damaged or truncated; download or save it again") from error
    return weights


def read_tokenizer(folder: Path, vocab_size: int, data_dir: Path) -> Tokenizer:
    """Return our tokenizer that has the same ids as the folder's.

    Raises:
        UserError: The folder's tokenizer is damaged, or none of ours equals it.
    """
    try:
        vocabulary, separator = read_vocabulary(folder), read_separator(folder)
        for base in candidate_tokenizers(vocabulary, vocab_size, data_dir):
            tokenizer = base if separator is None else RecordTokenizer(base, separator)
            ours = parse_vocabulary(tokenizer_model(base, data_dir))
            if tokenizer.vocab_size == vocab_size and vocabulary in (None, ours):
                return tokenizer
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: its tokenizer's files are damaged") from error
    raise UserError(
        f"{folder}: its {vocab_size:,} tokens are neither GPT-2's, nor BPE, bytes or characters as in our exports"
    )


def candidate_tokenizers(vocabulary: Vocabulary | None, vocab_size: int, data_dir: Path) -> Iterator[Tokenizer]:
    """Yield our tokenizers that may match a vocabulary. A model without tokenizer files may use GPT-2's."""
    if vocab_size == GPT2Tokenizer.vocab_size:
        yield GPT2Tokenizer(data_dir)
    if vocabulary:
        yield ByteTokenizer()
    if vocabulary and (tokens := from_symbols(vocabulary[0])):
        with suppress(UserError):  # its merges are not those that lead to its tokens
            tokenizer = BPETokenizer(tokens)
            tokenizer.merges()
            yield tokenizer
    if vocabulary and all(len(token) == 1 for token in vocabulary[0]):
        characters = "".join(sorted(vocabulary[0]))
        characters.encode()  # raises a ValueError for surrogates
        yield CharTokenizer(characters)


def from_symbols(ids: dict[str, int]) -> list[bytes]:
    """Return the tokens by id of a byte-level BPE whose last token separates documents; none if it is not one."""
    if not isinstance(ids, dict) or not all(isinstance(token, int) for token in ids.values()):
        return []
    byte_of = {symbol: byte for byte, symbol in enumerate(bytes_to_unicode())}
    *tokens, last = sorted(ids, key=ids.__getitem__) or [""]
    is_byte_level = last == END_OF_TEXT and byte_of.keys() <= ids.keys() and byte_of.keys() >= set("".join(tokens))
    return [bytes(map(byte_of.__getitem__, token)) for token in tokens] if is_byte_level else []


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Read the vocabulary of a folder's tokenizer; return None if there is none."""
    if (folder / TOKENIZER_FILE).exists():
        return parse_vocabulary(read_json(folder / TOKENIZER_FILE)["model"])
    if not (folder / "vocab.json").exists():
        return None
    merges = folder / "merges.txt"
    try:
        return read_json(folder / "vocab.json"), read_merges(merges)
    except OSError as error:
        raise UserError(f"{merges}: cannot be read, but {folder} has a vocab.json: {error.strerror}") from error


def read_separator(folder: Path) -> str | None:
    """Return what separates records, if an export of ours has them."""
    path = folder / "tokenizer_config.json"
    separator = read_json(path).get(SEPARATOR_KEY) if path.exists() else None
    return separator if isinstance(separator, str) else None


def parse_vocabulary(model: dict[str, Any]) -> Vocabulary:
    """Return the vocabulary of a tokenizer.json's model. Its merges are lines or, in newer files, pairs."""
    merges = model.get("merges")
    if merges is None:
        return model["vocab"], None
    return model["vocab"], [" ".join(pair) if isinstance(pair, list) else pair for pair in merges]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file is missing, or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: does not hold a JSON object")
    return content
