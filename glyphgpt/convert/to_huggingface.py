"""Export to Hugging Face's transformers (https://github.com/huggingface/transformers), as folders for its Auto classes.

A network with learned or sinusoidal positions becomes a GPT-2. A network with rotary positions becomes a GPT-NeoX
(LayerNorm), an Arcee (RMSNorm) or an Apertus (RMSNorm and normalized queries and keys). A network that no architecture
of transformers computes is refused.

The logits are equal up to rounding. With rotary positions the rounding errors grow with the context, because
transformers computes the angles in float32, and model.py in float64.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glyphgpt.checkpoint import Arrays, write_safetensors
from glyphgpt.convert.common import (
    add_missing_weights,
    bake_sinusoids,
    in_symbols,
    merges_in_symbols,
    output_path,
    read_merges,
    rename_weight,
    split_qkv,
)
from glyphgpt.convert.nanogpt import NANOGPT_TO_OURS
from glyphgpt.data.downloads import GPT2_ENCODER, GPT2_MERGES, fetch
from glyphgpt.data.tokenizers import END_OF_TEXT, BPETokenizer, CharTokenizer, Tokenizer, bytes_to_unicode
from glyphgpt.errors import UsageError, UserError, wrap_write_errors
from glyphgpt.files import swap_dirs
from glyphgpt.inference.loading import open_checkpoint
from glyphgpt.inference.numpy_gpt import EPSILON
from glyphgpt.settings import ConvertSettings, ModelConfig

CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"
UNKNOWN = "<unknown>"
"""A token that no vocabulary has, so that transformers refuses unknown characters."""

ACTIVATIONS = {"gelu": "gelu_new", "gelu_erf": "gelu", "relu2": "relu2"}
"""Names of activations here and in transformers."""
TRANSPOSED = ("attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.down.weight")
"""Weights that transformers' GPT-2 stores transposed."""

OURS_TO_GPT2 = {ours: gpt2 for gpt2, ours in NANOGPT_TO_OURS.items()}
OURS_TO_NEOX = {
    "token_embedding": "gpt_neox.embed_in", "blocks": "gpt_neox.layers", "attention_norm": "input_layernorm",
    "attention.qkv": "attention.query_key_value", "attention.out": "attention.dense",
    "mlp_norm": "post_attention_layernorm", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
    "norm": "gpt_neox.final_layer_norm", "head": "embed_out",
}  # fmt: skip
OURS_TO_ARCEE = {
    "token_embedding": "model.embed_tokens", "blocks": "model.layers", "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj", "norm": "model.norm", "head": "lm_head",
}  # fmt: skip
OURS_TO_APERTUS = OURS_TO_ARCEE | {
    "attention_norm": "attention_layernorm", "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm", "mlp_norm": "feedforward_layernorm",
}  # fmt: skip
"""Names of modules here and in an architecture."""


SEPARATOR_KEY = "record_separator"
"""Key of tokenizer_config.json for what separates records, which transformers does not need."""


def export_folder(path: Path, settings: ConvertSettings) -> str:
    """Export a checkpoint, or a run's best one, to a folder for transformers; return a message for the user.

    Raises:
        UsageError: The output has no path, or exists and may not be replaced.
        UserError: The checkpoint cannot be read, or no architecture of transformers computes its network.
    """
    out = output_path(settings, "out/huggingface")
    checkpoint, tokenizer = open_checkpoint(path, Path(settings.data_dir))
    config = checkpoint.config
    for present, feature, remedy in unsupported(config):
        if present:
            raise UserError(
                f"{checkpoint.path}: transformers has no architecture with {feature}; train with {remedy} to export it"
            )
    if config.position != "rotary":
        hf_config, weights = to_gpt2(config, checkpoint.model)
    elif config.norm == "layernorm":
        hf_config, weights = to_neox(config, checkpoint.model)
    else:
        hf_config, weights = to_arcee(config, checkpoint.model)
    ends = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text, "pad_token_id": None}
    with replace_folder(out) as new:
        write_json(new / CONFIG_FILE, hf_config | ends)
        write_json(new / "generation_config.json", ends)
        write_json(new / TOKENIZER_FILE, tokenizer_json(tokenizer, Path(settings.data_dir)))
        write_json(new / "tokenizer_config.json", tokenizer_config(tokenizer, config))
        write_safetensors(new / WEIGHTS_FILE, weights, {"format": "pt"})
    return (
        f"{out}: {hf_config['architectures'][0]}, {config.vocab_size:,} tokens; "
        f"load it: AutoModelForCausalLM.from_pretrained({str(out)!r})"
    )


def unsupported(config: ModelConfig) -> Iterator[tuple[bool, str, str]]:
    """Yield each feature that no architecture has: whether the network has it, its description, and the remedy."""
    rotary, rms = config.position == "rotary", config.norm == "rmsnorm"
    yield config.ngram > 1, f"n-gram tables (ngram = {config.ngram})", "ngram = 1"
    yield config.token_shift, "token_shift", "token_shift = false"
    yield rms and not rotary, f"norm = 'rmsnorm' and position = '{config.position}'", "position = 'rotary'"
    yield config.qk_norm and not rms, "qk_norm and norm = 'layernorm'", "qk_norm = false"
    yield config.qk_norm and config.bias, "qk_norm and biases", "bias = false"


def to_gpt2(config: ModelConfig, weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Return config and weights of transformers' GPT-2: LayerNorm, learned positions, and biases."""
    bias = config.bias
    if config.position == "sinusoidal":
        config, weights = bake_sinusoids(config, weights)
    hf_weights = {
        rename_weight(name, OURS_TO_GPT2): weight.T if name.endswith(TRANSPOSED) else weight
        for name, weight in add_missing_weights(config, weights, bias=True).items()
    }
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
        "bias": bias,  # ignored by transformers, which always has biases; read by our import
        "dtype": "float32",
    }
    return hf_config, hf_weights


def to_neox(config: ModelConfig, weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Return config and weights of transformers' GPT-NeoX: LayerNorm, rotary positions, and biases."""
    filled = add_missing_weights(config, weights, bias=True)
    for name in [name for name in filled if ".attention.qkv." in name]:
        heads = filled[name].reshape(3, config.n_head, config.head_size, -1)  # (3, H, D, C), or 1 for C in biases
        filled[name] = heads.swapaxes(0, 1).reshape(filled[name].shape)
    hf_weights = {rename_weight(name, OURS_TO_NEOX): weight for name, weight in filled.items()}
    hf_config = {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "layer_norm_eps": EPSILON["layernorm"],
        "use_parallel_residual": False,
        "rotary_pct": 1.0,  # for transformers before 5
        "attention_bias": True,
        "hidden_dropout": config.dropout,
    }
    return common_config(config) | hf_config, hf_weights


def to_arcee(config: ModelConfig, weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Return config and weights of transformers' Arcee, or Apertus if queries and keys are normalized.

    Both have rotary positions and RMSNorm, whose gains are 1 here.
    """
    filled = add_missing_weights(config, weights, norm="layernorm", bias=False)
    names = OURS_TO_APERTUS if config.qk_norm else OURS_TO_ARCEE
    hf_weights = {rename_weight(name, names): weight for name, weight in split_qkv(config, filled).items()}
    hf_config: dict[str, Any] = {"rms_norm_eps": EPSILON["rmsnorm"], "num_key_value_heads": config.n_head}
    if config.qk_norm:
        hf_config |= {"model_type": "apertus", "architectures": ["ApertusForCausalLM"]}
    else:
        hf_config |= {"model_type": "arcee", "architectures": ["ArceeForCausalLM"], "mlp_bias": config.bias}
    return common_config(config) | hf_config, hf_weights


def common_config(config: ModelConfig) -> dict[str, Any]:
    """Return the settings that GPT-NeoX, Arcee and Apertus have in common."""
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
        "rope_theta": 10000.0,  # this and rope_scaling are for transformers before 5
        "rope_scaling": None,
        "dtype": "float32",
    }


def tokenizer_json(tokenizer: Tokenizer, data_dir: Path) -> dict[str, Any]:
    """Return a tokenizer with the same ids in the format of Hugging Face's tokenizers library.

    As here, "<|endoftext|>" in a text is ordinary text, because of `split_special_tokens` in tokenizer_config.json.
    Where the model was trained on records, the token before a record precedes each text.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    single_characters = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    end = {"id": tokenizer.end_of_text, "content": END_OF_TEXT, "special": True, "normalized": False,
           "single_word": False, "lstrip": False, "rstrip": False}  # fmt: skip
    begin_record = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [tokenizer.end_of_text], "tokens": [END_OF_TEXT]}},
    }
    has_characters = isinstance(tokenizer.base, CharTokenizer)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end] if tokenizer.end_of_text else [],
        "normalizer": None,
        "pre_tokenizer": single_characters if has_characters else byte_level,
        "post_processor": None if tokenizer.separator is None else begin_record,
        "decoder": {"type": "Fuse"} if has_characters else byte_level,
        "model": tokenizer_model(tokenizer.base, data_dir),
    }


def tokenizer_model(tokenizer: Tokenizer, data_dir: Path) -> dict[str, Any]:
    """Return the model of a tokenizer.json: characters with their ids, or bytes with their ids and BPE merges."""
    if isinstance(tokenizer, CharTokenizer):
        ids = {character: token for token, character in enumerate(tokenizer.characters)}
        return {"type": "WordLevel", "vocab": ids, "unk_token": UNKNOWN}
    if tokenizer.kind == "gpt2":
        ids = json.loads(fetch(GPT2_ENCODER, data_dir).read_bytes())
        return {"type": "BPE", "vocab": ids, "merges": read_merges(fetch(GPT2_MERGES, data_dir))}
    if isinstance(tokenizer, BPETokenizer):
        ids = {in_symbols(token): i for i, token in enumerate(tokenizer.tokens)} | {END_OF_TEXT: tokenizer.end_of_text}
        return {"type": "BPE", "vocab": ids, "merges": merges_in_symbols(tokenizer)}
    return {"type": "BPE", "vocab": {symbol: byte for byte, symbol in enumerate(bytes_to_unicode())}, "merges": []}


def tokenizer_config(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """Return the settings that transformers reads from tokenizer_config.json."""
    ends = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "split_special_tokens": True}
    records = {} if tokenizer.separator is None else {SEPARATOR_KEY: tokenizer.separator}
    return (
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": config.block_size,
            "clean_up_tokenization_spaces": False,
        }
        | (ends if tokenizer.end_of_text else {})
        | records
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as transformers does."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` at the end, and replaces a Hugging Face model there.

    Raises:
        UsageError: The folder exists and does not hold a Hugging Face model.
        UserError: The folder could not be written.
    """
    if folder.exists() and not ((folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()):
        raise UsageError(f"{folder} does not hold a Hugging Face model and is not replaced; choose another --out")
    with wrap_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as hidden:
            new, old = Path(hidden) / "new", Path(hidden) / "old"
            new.mkdir()
            yield new
            swap_dirs(folder, new, old)
