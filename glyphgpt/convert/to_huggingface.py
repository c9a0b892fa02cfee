"""To Hugging Face's transformers (https://github.com/huggingface/transformers): a folder that its Auto classes load.

GPT-2's own form goes into its GPT-2. Forms with rotary positions go into the architecture there that is the same
network under other names: GPT-NeoX with LayerNorm, Arcee with RMSNorm, Apertus with normalised queries and keys too.
What no architecture there can compute is refused. Logits are the same but for rounding; with rotary positions this
grows with the context, for transformers works angles out in float32, and model.py in float64.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from glyphgpt.checkpoint import Arrays, write_safetensors
from glyphgpt.convert.exporting import add_missing_weights, bake_sinusoids, byte_symbols, rename_weights
from glyphgpt.convert.nanogpt import NANOGPT_TO_OURS
from glyphgpt.data.downloads import GPT2_ENCODER, GPT2_MERGES, fetch
from glyphgpt.data.tokenizers import CharTokenizer, Tokenizer
from glyphgpt.errors import UsageError, UserError, wrap_write_errors
from glyphgpt.files import swap_dirs
from glyphgpt.inference.loading import open_checkpoint
from glyphgpt.inference.numpy_gpt import EPSILON
from glyphgpt.settings import ConvertSettings, ModelConfig

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unknown>"
"""Stands for no token, on purpose: transformers then refuses a character that the vocabulary lacks."""

ACTIVATIONS = {"gelu": "gelu_new", "gelu_erf": "gelu", "relu2": "relu2"}
TRANSPOSED = ("attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.down.weight")
"""What its GPT-2 holds the other way round."""

GPT2 = {ours: theirs for theirs, ours in NANOGPT_TO_OURS.items()} | {
    "blocks": "transformer.h"
}  # nanoGPT's names come from there
NEOX = {
    "token_embedding": "gpt_neox.embed_in", "blocks": "gpt_neox.layers", "attention_norm": "input_layernorm",
    "attention.qkv": "attention.query_key_value", "attention.out": "attention.dense",
    "mlp_norm": "post_attention_layernorm", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
    "norm": "gpt_neox.final_layer_norm", "head": "embed_out",
}  # fmt: skip
ARCEE = {
    "token_embedding": "model.embed_tokens", "blocks": "model.layers", "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj", "norm": "model.norm", "head": "lm_head",
}  # fmt: skip
APERTUS = ARCEE | {
    "attention_norm": "attention_layernorm", "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm", "mlp_norm": "feedforward_layernorm",
}  # fmt: skip
"""Each architecture's names of our modules."""


def folder(place: Path, settings: ConvertSettings) -> str:
    """Turn a run, or a checkpoint, into a folder for transformers; return what to say.

    Raises:
        UsageError: no place to write is named, or something is there already.
        UserError: the checkpoint cannot be used, or no architecture there can compute its network.
    """
    if not settings.out:
        raise UsageError("say where to write: --out=out/huggingface")
    checkpoint, tokenizer = open_checkpoint(place, Path(settings.data_dir))
    config = checkpoint.config
    for there, what, instead in unsupported(config):
        if there:
            raise UserError(
                f"{checkpoint.path}: transformers has no architecture with {what}; train with {instead} to write it"
            )
    hf_config, weights = convert(config, checkpoint.model)
    ends = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text, "pad_token_id": None}
    with new_folder(Path(settings.out), overwrite=settings.overwrite) as new:
        write_json(new / CONFIG, hf_config | ends)
        write_json(new / "generation_config.json", ends)
        write_json(new / TOKENIZER, tokenizer_json(tokenizer, Path(settings.data_dir)))
        write_json(new / "tokenizer_config.json", tokenizer_config(tokenizer, config))
        write_safetensors(new / WEIGHTS, weights, {"format": "pt"})
    return (
        f"{settings.out}: {hf_config['architectures'][0]}, {config.vocab_size:,} tokens; "
        f"load it: AutoModelForCausalLM.from_pretrained({settings.out!r})"
    )


def unsupported(config: ModelConfig) -> Iterator[tuple[bool, str, str]]:
    """Yield whether a form has something that no architecture there has, what it is, and what to train with instead."""
    rotary, rms = config.position == "rotary", config.norm == "rmsnorm"
    yield config.ngram > 1, f"n-gram tables (ngram = {config.ngram})", "ngram = 1"
    yield config.token_shift, "token_shift", "token_shift = false"
    yield rms and not rotary, f"norm = 'rmsnorm' and position = '{config.position}'", "position = 'rotary'"
    yield config.qk_norm and not rms, "qk_norm and norm = 'layernorm'", "qk_norm = false"
    yield config.qk_norm and config.bias, "qk_norm and biases", "bias = false"


def convert(config: ModelConfig, weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Return config and weights of the architecture that is a form's network."""
    if config.position != "rotary":
        return gpt2(config, weights)
    return neox(config, weights) if config.norm == "layernorm" else arcee(config, weights)


def gpt2(config: ModelConfig, weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Its GPT-2: learned positions and LayerNorm; fixed waves are a learned table there."""
    bias = config.bias
    if config.position == "sinusoidal":
        config, weights = bake_sinusoids(config, weights)
    filled = add_missing_weights(config, weights, bias=True)
    names = {name: array.T if name.endswith(TRANSPOSED) else array for name, array in filled.items()}
    hf_config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": ACTIVATIONS[config.activation],
        "layer_norm_epsilon": EPSILON["layernorm"],
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "bias": bias,  # transformers has always biases, and ignores this; it tells us on the way back
        "dtype": "float32",
    }
    return hf_config, rename_weights(names, GPT2)


def neox(config: ModelConfig, weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Its GPT-NeoX: rotary positions and LayerNorm; each head's query, key and value stand together."""
    filled = add_missing_weights(config, weights, bias=True)
    for name in [name for name in filled if ".attention.qkv." in name]:
        heads = filled[name].reshape(3, config.n_head, config.n_embd // config.n_head, -1)
        filled[name] = heads.swapaxes(0, 1).reshape(filled[name].shape)
    hf_config = {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "layer_norm_eps": EPSILON["layernorm"],
        "use_parallel_residual": False,
        "rotary_pct": 1.0,  # before 5 too
        "attention_bias": True,
        "hidden_dropout": config.dropout,
    }
    return shared(config) | hf_config, rename_weights(filled, NEOX)


def arcee(config: ModelConfig, weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Its Arcee, or with normalised queries and keys its Apertus: rotary positions and RMSNorm, whose gains are 1."""
    parts: Arrays = {}
    for name, array in add_missing_weights(config, weights, norm="layernorm", bias=False).items():
        if ".attention.qkv." in name:
            parts |= {name.replace("qkv", part): third for part, third in zip("qkv", np.split(array, 3), strict=True)}
        else:
            parts[name] = array
    hf_config: dict[str, Any] = {"rms_norm_eps": EPSILON["rmsnorm"], "num_key_value_heads": config.n_head}
    if not config.qk_norm:
        hf_config |= {"model_type": "arcee", "architectures": ["ArceeForCausalLM"], "mlp_bias": config.bias}
        return shared(config) | hf_config, rename_weights(parts, ARCEE)
    gain = np.ones(config.n_embd // config.n_head, np.float32)
    parts |= {f"blocks.{layer}.attention.{x}_norm.weight": gain for layer in range(config.n_layer) for x in "qk"}
    hf_config |= {"model_type": "apertus", "architectures": ["ApertusForCausalLM"]}
    return shared(config) | hf_config, rename_weights(parts, APERTUS)


def shared(config: ModelConfig) -> dict[str, Any]:
    """Return what the configs of its newer architectures have in common."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.block_size,
        "hidden_act": ACTIVATIONS[config.activation],
        "attention_bias": config.bias,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        "rope_theta": 10000.0,  # this and the next as transformers before 5 reads them
        "rope_scaling": None,
        "dtype": "float32",
    }


def tokenizer_json(tokenizer: Tokenizer, data_dir: Path) -> dict[str, Any]:
    """Return a tokenizer in the format of Hugging Face's tokenizers library, with the very same ids.

    A text that spells GPT-2's end-of-text mark is ordinary text, as it is here: tokenizer_config.json says so.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    end = {"id": tokenizer.end_of_text, "content": END_OF_TEXT, "special": True, "normalized": False,
           "single_word": False, "lstrip": False, "rstrip": False}  # fmt: skip
    characters = isinstance(tokenizer, CharTokenizer)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end] if tokenizer.end_of_text else [],
        "normalizer": None,
        "pre_tokenizer": each if characters else byte_level,
        "post_processor": None,
        "decoder": {"type": "Fuse"} if characters else byte_level,
        "model": vocabulary(tokenizer, data_dir),
    }


def vocabulary(tokenizer: Tokenizer, data_dir: Path) -> dict[str, Any]:
    """Return the part of tokenizer.json that tells what each id means: whole characters, or bytes with their merges."""
    if isinstance(tokenizer, CharTokenizer):
        return {"type": "WordLevel", "vocab": ids_of(tokenizer.characters), "unk_token": UNKNOWN}
    ids, merges = ids_of(byte_symbols()), []
    if tokenizer.kind == "gpt2":
        ids = json.loads(fetch(GPT2_ENCODER, data_dir).read_bytes())
        merges = fetch(GPT2_MERGES, data_dir).read_text(encoding="utf-8").splitlines()[1:]  # after the version
    return {"type": "BPE", "vocab": ids, "merges": merges}


def ids_of(letters: str) -> dict[str, int]:
    """Number the letters of a text from 0."""
    return {letter: token for token, letter in enumerate(letters)}


def tokenizer_config(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """Return what transformers asks of a tokenizer beyond tokenizer.json."""
    ends = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "split_special_tokens": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False,
    } | (ends if tokenizer.end_of_text else {})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as transformers does."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


@contextmanager
def new_folder(place: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a hidden folder to write to, that becomes `place` at the end, whole.

    Raises:
        UsageError: something is there already, which `overwrite` does not allow to replace.
        UserError: it could not be written.
    """
    if place.exists() and not overwrite:
        raise UsageError(f"{place} is there already; add --overwrite to replace it, or choose another --out")
    if place.exists() and not ((place / CONFIG).is_file() and (place / WEIGHTS).is_file()):
        raise UsageError(f"{place} is no model of Hugging Face's, so it is not replaced; choose another --out")
    with wrap_write_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as hidden:
            new, old = Path(hidden) / "new", Path(hidden) / "old"
            new.mkdir()
            yield new
            swap_dirs(place, new, old)
