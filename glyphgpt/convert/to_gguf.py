"""To llama.cpp (https://github.com/ggml-org/llama.cpp): a model as a GGUF file, which it and many others run.

llama.cpp knows kinds of networks by name, each with one norm, one activation and so on; the nearest kind computes the
very same, or there is none. `tests/convert/test_gguf.py` holds llama.cpp's probabilities to ours.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from glyphgpt.checkpoint import Arrays
from glyphgpt.cli import printable
from glyphgpt.convert.exporting import add_missing_weights, bake_sinusoids, byte_symbols, rename_weights
from glyphgpt.convert.nanogpt import new_file
from glyphgpt.data.downloads import GPT2_MERGES, fetch
from glyphgpt.data.tokenizers import Tokenizer
from glyphgpt.errors import UserError, optional_import, warn
from glyphgpt.files import atomic_path
from glyphgpt.inference.loading import open_checkpoint
from glyphgpt.inference.numpy_gpt import EPSILON
from glyphgpt.settings import ConvertSettings, ModelConfig

OURS_TO_GGUF = {
    "blocks": "blk",
    "token_embedding": "token_embd",
    "position.embedding": "position_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "attention.qkv": "attn_qkv",
    "attention.out": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
"""llama.cpp's names of our modules."""

END = "[end]"
"""Stands at the end of a vocabulary that has no token for the end of a text, as llama.cpp takes another for it then."""
NO_MERGE = "À À"
"""Of bytes that UTF-8 does not have, for vocabularies without merges: llama.cpp asks for one at least."""


def model(path: Path, settings: ConvertSettings) -> str:
    """Turn a checkpoint, or a run's best, into a GGUF file of float32 weights; return what to say.

    Raises:
        UserError: it is no checkpoint, llama.cpp has no such network, or the file cannot be written.
    """
    with optional_import("gguf", "writing GGUF"):
        from gguf import GGUFWriter  # noqa: PLC0415  (optional)
    out = new_file(settings.out, "--out=model.gguf", settings)
    data_dir = Path(settings.data_dir)
    checkpoint, tokenizer = open_checkpoint(path, data_dir)
    config = checkpoint.config
    kind = kind_of(config, checkpoint.path)
    if config.activation == "gelu_erf":
        warn("llama.cpp has GELU by way of tanh only; probabilities will differ by about one in a thousand")
    tensors = convert_weights(config, checkpoint.model, end=tokenizer.end_of_text is None)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as unfinished:
        writer = GGUFWriter(unfinished, kind)
        writer.add_name(printable(checkpoint.path.resolve().parent.name))
        describe_network(writer, config, kind)
        describe_tokenizer(writer, tokenizer, data_dir)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return (
        f"{out}: for llama.cpp, as {kind}; prompt and text fit {config.block_size:,} tokens; run it: "
        f"llama-completion -no-cnv -m {out} -p PROMPT -n TOKENS"
    )


def kind_of(config: ModelConfig, path: Path) -> str:
    """Return llama.cpp's name of the kind of network that computes the same.

    Raises:
        UserError: it has none; the line tells what would have to be set otherwise.
    """
    wanted: dict[str, tuple[Any, ...]] = {"ngram": (1,), "token_shift": (False,)}
    if config.norm == "layernorm":
        kind = "gptneox" if config.position == "rotary" else "gpt2"
        wanted |= {"activation": ("gelu", "gelu_erf"), "qk_norm": (False,)}
    else:
        kind = "apertus" if config.qk_norm else "arcee"
        wanted |= {"position": ("rotary",), "activation": ("relu2",), "bias": (False,)}
    others = [f"{key} = {plain(values[0])}" for key, values in wanted.items() if getattr(config, key) not in values]
    if others:
        raise UserError(
            f"{path}: llama.cpp has no such network; with norm = {config.norm!r} it takes {', '.join(others)}"
        )
    return kind


def plain(value: Any) -> str:
    """Write a setting's value as TOML does."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def convert_weights(config: ModelConfig, weights: Arrays, *, end: bool) -> Arrays:
    """Return the weights in llama.cpp's names; with one more token if `end`."""
    if config.position == "rotary":  # not all of these kinds can be without a head
        weights = {"head.weight": weights["token_embedding.weight"], **weights}
    if config.position == "sinusoidal":
        config, weights = bake_sinusoids(config, weights)
    # What llama.cpp expects and the form lacks: biases where there are LayerNorms, else gains.
    weights = add_missing_weights(config, weights, bias=config.norm == "layernorm", norm="layernorm")
    if end:  # its logit is the mean of all, which is never the highest
        for name in ("token_embedding.weight", "head.weight"):
            if name in weights:
                weights[name] = np.vstack((weights[name], weights[name].mean(0)))
    theirs = rename_weights(weights, OURS_TO_GGUF)
    if config.norm == "rmsnorm":
        for layer in range(config.n_layer):
            theirs |= split_attention(config, f"blk.{layer}.attn_", theirs.pop(f"blk.{layer}.attn_qkv.weight"))
    return {name: np.ascontiguousarray(weight, np.float32) for name, weight in theirs.items()}


def split_attention(config: ModelConfig, prefix: str, qkv: Any) -> Arrays:
    """Return what arcee and apertus want in place of the one matrix of queries, keys and values, (3C, C)."""
    q, k, v = np.split(qkv, 3)
    if config.qk_norm:
        ones = np.ones(config.n_embd // config.n_head)
        gains = {f"{prefix}q_norm.weight": ones, f"{prefix}k_norm.weight": ones}
    else:  # arcee rotates neighbours, 2i and 2i + 1, where the others pair i and i + D/2 as we do
        q, k = (each.reshape(config.n_head, 2, -1, config.n_embd).swapaxes(1, 2).reshape(each.shape) for each in (q, k))
        gains = {}
    return {f"{prefix}q.weight": q, f"{prefix}k.weight": k, f"{prefix}v.weight": v, **gains}


def describe_network(writer: Any, config: ModelConfig, kind: str) -> None:
    """Write what llama.cpp has to know of the network."""
    writer.add_file_type(0)  # float32 throughout
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    if config.norm == "layernorm":
        writer.add_layer_norm_eps(EPSILON[config.norm])
    else:
        writer.add_layer_norm_rms_eps(EPSILON[config.norm])
    if config.position == "rotary":
        writer.add_rope_dimension_count(config.n_embd // config.n_head)
        writer.add_rope_freq_base(10000.0)
    if kind == "gptneox":
        writer.add_parallel_residual(False)
    if kind == "apertus":  # xIELU: softplus(p) x² + beta x above 0, and below what softplus(n) and beta are factors of
        writer.add_xielu_alpha_p([math.log(math.e - 1)] * config.n_layer)  # whose softplus is 1
        writer.add_xielu_alpha_n([-1000.0] * config.n_layer)
        writer.add_xielu_beta([0.0] * config.n_layer)
        writer.add_xielu_eps([-1e-6] * config.n_layer)


def describe_tokenizer(writer: Any, tokenizer: Tokenizer, data_dir: Path) -> None:
    """Write the vocabulary as byte-pair encoding of GPT-2's kind, with the same ids.

    A character of several bytes is merged from its bytes from left to right; no merge crosses characters, as none
    begins with a byte from within one. Text encodes as with us, but that characters without a token are left out, as
    --skip_unknown does it, and that <|endoftext|> in a prompt is GPT-2's token of that name. Nothing is put before or
    after a text. END is never drawn: llama.cpp is told so, and older ones, which do not listen, take --ignore-eos.
    """
    letters = byte_symbols()
    tokens = ["".join(map(letters.__getitem__, tokenizer.token_bytes(token))) for token in range(tokenizer.vocab_size)]
    if tokenizer.kind == "gpt2":
        merges = fetch(GPT2_MERGES, data_dir).read_text(encoding="utf-8").splitlines()[1:]
    else:
        pairs = (f"{token[:place]} {token[place]}" for token in tokens for place in range(1, len(token)))
        merges = list(dict.fromkeys(pairs)) or [NO_MERGE]
    end = tokenizer.end_of_text
    if end is None:
        end = len(tokens)
        tokens.append(END)
        writer.add_array("tokenizer.ggml.suppress_tokens", [end])
    types = [1] * len(tokens)  # ordinary
    types[end] = 3 if tokenizer.end_of_text else 5  # found in a prompt, or not
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
