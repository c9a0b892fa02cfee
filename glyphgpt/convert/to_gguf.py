"""Export to GGUF, the file format of llama.cpp (https://github.com/ggml-org/llama.cpp) and of programs built on it.

llama.cpp has a fixed set of architectures, each with one norm, one activation and so on. A network is exported as the
architecture that computes the same function, or refused. `tests/convert/test_gguf.py` compares llama.cpp's
probabilities with ours.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from glyphgpt.checkpoint import Arrays
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
from glyphgpt.data.downloads import GPT2_MERGES, fetch
from glyphgpt.data.tokenizers import END_OF_TEXT, BPETokenizer, Tokenizer
from glyphgpt.errors import UserError, optional_import, shorten, warn
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
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention.out": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
"""Names of modules here and in GGUF."""

END = "[end]"
"""Added to a vocabulary without an end-of-text token; otherwise llama.cpp uses another token as one."""
NO_MERGE = "À À"
"""The merge of a vocabulary without merges, because llama.cpp needs at least one. UTF-8 never contains these bytes."""


def export_gguf(path: Path, settings: ConvertSettings) -> str:
    """Export a checkpoint, or a run's best one, to a GGUF file of float32 weights; return a message for the user.

    Raises:
        UserError: The checkpoint cannot be read, no architecture of llama.cpp computes its network, or the file
            cannot be written.
    """
    with optional_import("gguf", "writing GGUF"):
        from gguf import GGUFWriter  # noqa: PLC0415  (optional)
    out = output_path(settings, "model.gguf")
    data_dir = Path(settings.data_dir)
    checkpoint, tokenizer = open_checkpoint(path, data_dir)
    config = checkpoint.config
    architecture = find_architecture(config, checkpoint.path)
    if config.activation == "gelu_erf":
        warn("llama.cpp has only the tanh approximation of GELU; probabilities will differ by about 0.1%")
    tensors = gguf_tensors(config, checkpoint.model, add_end=tokenizer.end_of_text is None)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as unfinished:
        writer = GGUFWriter(unfinished, architecture)
        writer.add_name(shorten(checkpoint.path.resolve().parent.name))
        add_network(writer, config, architecture)
        add_tokenizer(writer, tokenizer, data_dir)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return (
        f"{out}: for llama.cpp, as {architecture}; the context is {config.block_size:,} tokens; run it: "
        f"llama-completion -no-cnv -m {out} -p PROMPT -n TOKENS"
    )


def find_architecture(config: ModelConfig, path: Path) -> str:
    """Return llama.cpp's name of the architecture that computes the same function as a network.

    Raises:
        UserError: There is none. The message names the settings to change.
    """
    allowed: dict[str, tuple[Any, ...]] = {"ngram": (1,), "token_shift": (False,)}
    if config.norm == "layernorm":
        architecture = "gptneox" if config.position == "rotary" else "gpt2"
        allowed |= {"activation": ("gelu", "gelu_erf"), "qk_norm": (False,)}
    else:
        architecture = "apertus" if config.qk_norm else "arcee"
        allowed |= {"position": ("rotary",), "activation": ("relu2",), "bias": (False,)}
    changes = [  # lower case, as in TOML
        f"{key} = {values[0]!r}".lower() for key, values in allowed.items() if getattr(config, key) not in values
    ]
    if changes:
        raise UserError(
            f"{path}: llama.cpp has no such network; with norm = {config.norm!r} it needs {', '.join(changes)}"
        )
    return architecture


def gguf_tensors(config: ModelConfig, weights: Arrays, *, add_end: bool) -> Arrays:
    """Return the weights with llama.cpp's names and layout; with `add_end`, for one more token, END."""
    if config.position == "rotary":  # some of these architectures need a head
        weights = {"head.weight": weights["token_embedding.weight"], **weights}
    if config.position == "sinusoidal":
        config, weights = bake_sinusoids(config, weights)
    # llama.cpp needs the gains of every norm, and all biases if the norm is LayerNorm.
    weights = add_missing_weights(config, weights, bias=config.norm == "layernorm", norm="layernorm")
    if add_end:  # its logit is the mean of all logits, which is never the highest
        for name in weights.keys() & {"token_embedding.weight", "head.weight"}:
            weights[name] = np.vstack((weights[name], weights[name].mean(0)))
    if config.norm == "rmsnorm":
        weights = split_qkv(config, weights)
        if not config.qk_norm:  # arcee rotates channels 2i and 2i + 1 as a pair, not i and i + D/2
            for name in [f"blocks.{layer}.attention.{part}.weight" for layer in range(config.n_layer) for part in "qk"]:
                pairs = weights[name].reshape(config.n_head, 2, -1, config.n_embd)  # (H, 2, D / 2, C)
                weights[name] = pairs.swapaxes(1, 2).reshape(weights[name].shape)
    return {rename_weight(name, OURS_TO_GGUF): np.ascontiguousarray(w, np.float32) for name, w in weights.items()}


def add_network(writer: Any, config: ModelConfig, architecture: str) -> None:
    """Add the network's config to a GGUF file."""
    writer.add_file_type(0)  # all weights are float32
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
        writer.add_rope_dimension_count(config.head_size)
        writer.add_rope_freq_base(10000.0)
    if architecture == "gptneox":
        writer.add_parallel_residual(False)
    if architecture == "apertus":
        # The activation is xIELU: softplus(p) x² + beta x above 0; below, every term has a factor softplus(n) or beta.
        # With softplus(p) = 1, softplus(n) = 0 and beta = 0 it is ReLU squared.
        writer.add_xielu_alpha_p([math.log(math.e - 1)] * config.n_layer)
        writer.add_xielu_alpha_n([-1000.0] * config.n_layer)
        writer.add_xielu_beta([0.0] * config.n_layer)
        writer.add_xielu_eps([-1e-6] * config.n_layer)


def add_tokenizer(writer: Any, tokenizer: Tokenizer, data_dir: Path) -> None:
    """Add the vocabulary to a GGUF file, as a byte-level BPE like GPT-2's, with the same ids.

    For a character vocabulary, merges join the bytes of each character from left to right. No merge joins bytes of two
    characters, because none starts with a later byte of a character.

    llama.cpp encodes text to the same ids, with two exceptions: it skips unknown characters, as --skip_unknown does,
    and it reads <|endoftext|> in a prompt as the token that separates documents, where there is one. It adds no token
    before or after a text, except the one before a record. END is never sampled, because the file tells llama.cpp to
    suppress it. Older versions ignore that, and need --ignore-eos.
    """
    base = tokenizer.base
    tokens = [in_symbols(base.token_bytes(token)) for token in range(base.vocab_size)]
    if base.kind == "gpt2":
        merges = read_merges(fetch(GPT2_MERGES, data_dir))
    elif isinstance(base, BPETokenizer):
        merges = merges_in_symbols(base) or [NO_MERGE]
    else:
        pairs = (f"{token[:end]} {token[end]}" for token in tokens for end in range(1, len(token)))
        merges = list(dict.fromkeys(pairs)) or [NO_MERGE]
    if base.end_of_text is None:
        tokens.append(END_OF_TEXT if tokenizer.end_of_text else END)
    end = tokenizer.end_of_text or len(tokens) - 1
    if tokenizer.end_of_text is None:
        writer.add_array("tokenizer.ggml.suppress_tokens", [end])
    types = [1] * len(tokens)  # normal
    types[end] = 3 if tokenizer.end_of_text else 5  # control, which prompts may contain, or unused
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(tokenizer.separator is not None)
    writer.add_add_eos_token(False)
