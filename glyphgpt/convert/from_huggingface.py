"""From Hugging Face's transformers: folders that hold a GPT-2, published or of one's own.

Only config.json, the tokenizer's JSON and safetensors are read; nothing in them is executed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from glyphgpt.checkpoint import Arrays, Checkpoint, Metadata, TrainState, save_checkpoint
from glyphgpt.cli import printable
from glyphgpt.convert.nanogpt import new_file, our_name
from glyphgpt.convert.to_huggingface import ACTIVATIONS, CONFIG, TOKENIZER, TRANSPOSED, WEIGHTS, vocabulary
from glyphgpt.data.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer
from glyphgpt.errors import UserError
from glyphgpt.files import BEST, LAST
from glyphgpt.settings import ConvertSettings, ModelConfig, Network

Meaning = tuple[dict[str, int], list[str] | None]
"""The id of each token, and the merges that make them of bytes."""

INDEX = "model.safetensors.index.json"
MASKS = (".attn.bias", ".attn.masked_bias")
"""Constants that older versions saved among the weights."""

DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "resid_pdrop": 0.1,
    "activation_function": "gelu_new", "tie_word_embeddings": True, "bias": True,
}  # fmt: skip
"""Of its GPT-2's config; `bias` is our own."""
FIXED: dict[str, Any] = {
    "model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
}  # fmt: skip
"""What our network can be, of what a config may ask for."""
OUR_ACTIVATIONS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu"}


def checkpoint(place: Path, settings: ConvertSettings) -> str:
    """Turn a folder with a GPT-2 into a checkpoint of ours, with the same logits; return what to say.

    Raises:
        UserError: it is none, or one that our network cannot compute.
    """
    out = new_file(settings.out, "--out=out/gpt2/best.safetensors", settings)
    found = read(place, Path(settings.data_dir))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(found, out)
    parameters, kind = sum(array.size for array in found.model.values()), found.metadata.tokenizer["kind"]
    return f"{out}: {parameters:,} parameters, {kind} tokens; sample it: python sample.py {out}"


def is_there(place: Path) -> bool:
    """Tell whether a path names a model of Hugging Face's, and not a run or a checkpoint of ours."""
    if place.is_dir():
        return (place / CONFIG).exists() and not any((place / name).exists() for name in (BEST, LAST))
    try:
        with safe_open(place, framework="numpy") as file:
            return "glyphgpt" not in (file.metadata() or {}) and (place.parent / CONFIG).exists()
    except (OSError, SafetensorError):
        return False


def read(place: Path, data_dir: Path) -> Checkpoint:
    """Read a folder with a GPT-2, or its safetensors file, as a checkpoint of ours.

    Raises:
        UserError: it is none, or one that our network cannot compute.
    """
    if not place.exists():
        raise UserError(f"{place}: no such file or folder")
    folder = place if place.is_dir() else place.parent
    config = read_hf_config(folder / CONFIG)
    tokenizer = tokenizer_of(folder, config["vocab_size"], data_dir)
    weights = read_weights(weight_files(folder) if place.is_dir() else [place])
    if config["tie_embeddings"] and "head.weight" in weights:  # transformers, too, ties only what is the same
        config["tie_embeddings"] = np.array_equal(weights["head.weight"], weights.get("token_embedding.weight", ()))
    if config["tie_embeddings"]:
        weights.pop("head.weight", None)
    if not config["bias"]:  # written by us: there they are zeros
        weights = {name: array for name, array in weights.items() if not name.endswith(".bias") or array.any()}
    metadata = Metadata(
        model=config, tokenizer=tokenizer.to_dict(), settings={}, data="", val_loss=None, state=TrainState(), scaler={}
    )  # fmt: skip
    checkpoint = Checkpoint(metadata, weights, path=place)
    _ = checkpoint.config  # checks the weights
    return checkpoint


def read_hf_config(path: Path) -> dict[str, Any]:
    """Read a config.json in our terms.

    Raises:
        UserError: it asks for what our network cannot compute.
    """
    hf_config = DEFAULTS | read_json(path)
    for name, ours in FIXED.items():
        if hf_config.get(name, ours) != ours:
            raise UserError(f"{path}: {name} is {printable(str(hf_config[name]))}; only {ours} can be converted")
    if hf_config["activation_function"] not in list(OUR_ACTIVATIONS):  # a list, lest one ask for a hash of anything
        name, known = printable(str(hf_config["activation_function"])), " and ".join(OUR_ACTIVATIONS)
        raise UserError(f"{path}: activation_function is {name}; only {known} can be converted")
    config = Network().model_dump() | {
        "vocab_size": hf_config["vocab_size"],
        "block_size": hf_config["n_positions"],
        "n_embd": hf_config["n_embd"],
        "n_layer": hf_config["n_layer"],
        "n_head": hf_config["n_head"],
        "dropout": hf_config["resid_pdrop"],
        "bias": hf_config["bias"],
        "activation": OUR_ACTIVATIONS[hf_config["activation_function"]],
        "tie_embeddings": hf_config["tie_word_embeddings"],
    }
    try:
        config = ModelConfig.model_validate(config).model_dump()
    except ValidationError as error:
        problems = [".".join(map(str, problem["loc"])) or problem["msg"] for problem in error.errors()]
        raise UserError(f"{path}: cannot be converted: {', '.join(problems)}") from error
    if hf_config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UserError(f"{path}: n_inner is {printable(str(config['n_inner']))}; only 4 x n_embd can be converted")
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights.

    Raises:
        UserError: there are none.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        shards = read_json(folder / INDEX).get("weight_map")
        if isinstance(shards, dict) and all(
            isinstance(name, str) and Path(name).name == name for name in shards.values()
        ):
            return [folder / name for name in sorted(set(shards.values()))]
        raise UserError(f"{folder / INDEX}: does not tell which files hold the weights")
    raise UserError(f"{folder / WEIGHTS}: no such file; save the model with transformers: model.save_pretrained(...)")


def read_weights(paths: list[Path]) -> Arrays:
    """Read safetensors files as float32, in our names and our way round.

    Raises:
        UserError: they are damaged, or hold what is no weight of GPT-2.
    """
    weights: Arrays = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:  # numpy knows no bfloat16
                for theirs in file.keys():  # noqa: SIM118
                    if theirs.endswith(MASKS):
                        continue
                    name = our_name(
                        theirs if theirs.startswith(("transformer.", "lm_head.")) else f"transformer.{theirs}"
                    )
                    tensor = file.get_tensor(theirs)
                    if name in weights or not tensor.is_floating_point():
                        raise KeyError(theirs)
                    array = tensor.float().numpy()
                    weights[name] = array.T if name.endswith(TRANSPOSED) else array
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}: holds {printable(theirs)}, which is no weight of a GPT-2") from error
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"{path}: damaged or cut short; fetch or save it again") from error
    return weights


def tokenizer_of(folder: Path, vocab_size: int, data_dir: Path) -> Tokenizer:
    """Return our tokenizer whose ids mean the same as the folder's own.

    Raises:
        UserError: there is none.
    """
    try:
        theirs = read_vocabulary(folder)
        for ours in candidates(theirs, vocab_size, data_dir):
            if ours.vocab_size == vocab_size and theirs in (None, meaning(vocabulary(ours, data_dir))):
                return ours
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: its tokenizer's files are damaged") from error
    raise UserError(
        f"{folder}: its {vocab_size:,} tokens are neither GPT-2's, nor characters or bytes as written by us"
    )


def candidates(theirs: Meaning | None, vocab_size: int, data_dir: Path) -> Iterator[Tokenizer]:
    """Yield the tokenizers that a vocabulary may be; where there is none, it may be GPT-2's."""
    if vocab_size == GPT2Tokenizer.vocab_size:
        yield GPT2Tokenizer(data_dir)
    if theirs and vocab_size == ByteTokenizer.vocab_size:
        yield ByteTokenizer()
    if theirs and all(len(token) == 1 for token in theirs[0]):
        characters = "".join(sorted(theirs[0]))
        characters.encode()  # surrogates are no characters: a ValueError
        yield CharTokenizer(characters)


def read_vocabulary(folder: Path) -> Meaning | None:
    """Read the tokenizer that stands beside a model; None if there is none."""
    if (folder / TOKENIZER).exists():
        return meaning(read_json(folder / TOKENIZER)["model"])
    if not (folder / "vocab.json").exists():
        return None
    try:
        merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(
            f"{folder / 'merges.txt'}: cannot be read, but vocab.json is there: {error.strerror}"
        ) from error
    return read_json(folder / "vocab.json"), [line for line in merges if line and not line.startswith("#version")]


def meaning(model: dict[str, Any]) -> Meaning:
    """Return what a tokenizer.json's model says of ids and merges, which are text or, lately, pairs."""
    merges = model.get("merges")
    if merges is None:
        return model["vocab"], None
    return model["vocab"], [" ".join(pair) if isinstance(pair, list) else pair for pair in merges]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        UserError: it is missing, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON that can be read") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content
