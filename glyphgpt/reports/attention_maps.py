"""Attention maps: the attention weights of a text in every layer and head, as a PNG for papers.

The weights are the model's own, softmax(q k^T / sqrt(D)) of "Attention is all you need" (Vaswani et al. 2017), computed
from the actual inputs of every attention module. They show which tokens a head reads, not why the model predicts what
it predicts (Jain & Wallace 2019, "Attention is not explanation").

Shape letters as in model.py; L layers.
"""

import io
import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glyphgpt.data.tokenizers import Tokenizer, Tokens, token_text
from glyphgpt.errors import UserError, optional_import

UNITS = {"char": "character", "byte": "byte", "bpe": "token", "gpt2": "token"}
"""The name of a token, by the kind of the tokenizer."""
MAX_INCHES = 20.0  # largest width or height of all panels of a PNG together
WHITESPACE_SYMBOLS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})


@dataclass(frozen=True)
class AttentionMaps:
    """The attention weights of a text of T tokens."""

    unit: str
    """The name of a token, as in `UNITS`."""
    tokens: list[str]
    weights: Tensor
    """(L, H, T, T): a row for each query, a column for each key."""


def compute_maps(model: nn.Module, tokenizer: Tokenizer, tokens: Tokens) -> AttentionMaps:
    """Return the attention maps of tokens (T,), at most block_size, under a GPT of model.py in evaluation mode.

    Raises:
        UserError: The weights are not finite.
    """
    weights = attention_weights(model, torch.from_numpy(tokens.astype("int64")))
    if not weights.isfinite().all():
        raise UserError("the model's numbers overflow; use another checkpoint")
    texts = [token_text(tokenizer.token_bytes(int(token))) for token in tokens]
    return AttentionMaps(UNITS[tokenizer.kind], texts, weights)


def attention_weights(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the attention weights (L, H, T, T) of tokens (T,)."""
    weights: list[Tensor] = []
    mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()

    def record_weights(attention: Any, inputs: tuple[Tensor, ...]) -> None:
        q, k, _ = attention.project_qkv(inputs[0])  # (1, H, T, D) each
        scores = q @ k.mT / math.sqrt(q.size(-1))
        weights.append(scores.where(mask, -torch.inf).softmax(-1).squeeze(0))

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(".attention"):
                hooks.enter_context(module.register_forward_pre_hook(record_weights))
        model(tokens[None])
    return torch.stack(weights)


def render_png(maps: AttentionMaps) -> bytes:
    """Return a PNG with a panel for each layer and head: queries downwards, keys to the right.

    Raises:
        UserError: matplotlib is not installed.
    """
    with optional_import("matplotlib", "a PNG, unlike .html,"):
        import matplotlib  # noqa: F401, PLC0415  (optional, and slow to import)
        from matplotlib.colors import PowerNorm  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415

    layers, heads, length, _ = maps.weights.shape
    inches = min(max(0.14 * length, 1.8), MAX_INCHES / max(layers, heads))  # side of a panel
    figure = Figure(figsize=(1.06 * inches * heads + 1, (inches + 0.25) * layers + 0.6), layout="constrained")
    panels = figure.subplots(layers, heads, squeeze=False)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for (layer, head), axes in np.ndenumerate(panels):
        weights = maps.weights[layer, head].masked_fill(future, torch.nan).numpy()
        image = axes.imshow(weights, cmap="magma_r", norm=PowerNorm(0.5, 0, 1))  # makes small weights visible
        axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.tick_params(length=0)
    positions, labels, fontsize = axis_labels(maps.tokens, inches)
    style = {"fontsize": fontsize, "family": "monospace", "parse_math": False}
    for axes in panels[-1]:
        axes.set_xticks(positions, labels, rotation=90 if max(map(len, labels)) > 1 else 0, **style)
        axes.set_xlabel(f"key ({maps.unit})")
    for axes in panels[:, 0]:
        axes.set_yticks(positions, labels, **style)
        axes.set_ylabel(f"query ({maps.unit})")
    colorbar: dict[str, Any] = {"fraction": 0.05, "shrink": 0.6, "aspect": 30, "ticks": [0, 0.01, 0.1, 0.25, 0.5, 1]}
    figure.colorbar(image, ax=panels, label="attention weight", **colorbar)
    png = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # about characters that the font lacks; they appear as boxes
        figure.savefig(png, format="png", dpi=200)
    return png.getvalue()


def axis_labels(tokens: Sequence[str], inches: float) -> tuple[Sequence[int], list[str], float]:
    """Return the positions, texts and font size, in points, of the labels along an axis that is `inches` long.

    The labels are the tokens, or about ten position numbers if the tokens would be too small to read.
    """
    length = len(tokens)
    fontsize = min(9, 0.8 * 72 * inches / length)
    if fontsize >= 4:
        return range(length), [token.translate(WHITESPACE_SYMBOLS) for token in tokens], fontsize
    step = math.ceil(length / 10)
    positions = range(step - 1, length, step)
    return positions, [str(position + 1) for position in positions], 8
