"""Pictures of attention: where each token looks, in every layer and head, as a page for a browser or as a PNG.

The weights are the model's own, softmax(q k^T / sqrt(D)) of "Attention is all you need" (Vaswani et al. 2017), computed
from what each block's attention really gets. They tell where a head reads; not why the model says what it says (Jain &
Wallace 2019, "Attention is not explanation").
"""

import base64
import io
import math
import unicodedata
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glyphgpt.data.tokenizers import Tokenizer, Tokens
from glyphgpt.errors import UserError, optional_import
from glyphgpt.files import write_atomic
from glyphgpt.reports.templates import render

UNITS = {"char": "character", "byte": "byte", "gpt2": "token"}
"""What a tokenizer's tokens are called."""
LIKELIEST = 10  # tokens shown of those that may come next
FULL = 2**16 - 1  # how the page's whole numbers write a weight of 1
LARGEST = 20.0  # a PNG's panels side by side, in inches
MARKS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})

Chances = list[tuple[str, float]]


@dataclass(frozen=True)
class Attention:
    """What a model made of a text of T tokens."""

    unit: str
    """What a token is called."""
    tokens: list[str]
    words: list[int]
    """Of how many tokens each word consists."""
    weights: Tensor
    """Who looks where, (L, H, T, T)."""
    chances: list[Chances]
    """After each token, the likeliest ones, and then that which did come, if it is none of these."""


def observe(model: nn.Module, tokenizer: Tokenizer, tokens: Tokens) -> Attention:
    """Have a model read tokens (T,), at most block_size, and watch it.

    Raises:
        UserError: the model's numbers overflow.
    """
    weights, probabilities = attention_weights(model, torch.from_numpy(tokens.astype("int64")))
    if not (weights.isfinite().all() and probabilities.isfinite().all()):
        raise UserError("the model's numbers overflow; there is nothing to draw")
    pieces = [tokenizer.token_bytes(int(token)) for token in tokens]
    chances = [
        likeliest(tokenizer, row, follower)
        for row, follower in zip(probabilities, [*tokens.tolist()[1:], None], strict=True)
    ]
    shown = [spelled(piece) for piece in pieces]
    return Attention(UNITS[tokenizer.kind], shown, word_lengths(pieces), weights, chances)


def attention_weights(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return where tokens (T,) look, (L, H, T, T), and the probabilities of what comes after each, (T, V).

    The model is a GPT of model.py in evaluation mode. A row of weights is who looks, a column where to.
    """
    weights: list[Tensor] = []

    def watch(attention: Any, arguments: tuple[Tensor, ...]) -> None:
        q, k, _ = attention.project_qkv(arguments[0])  # (1, H, T, D) each
        scores = q @ k.mT / math.sqrt(q.size(-1))
        ahead = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights.append(scores.masked_fill(ahead, -torch.inf).softmax(-1).squeeze(0))

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(".attention"):
                hooks.enter_context(module.register_forward_pre_hook(watch))
        probabilities = model(tokens[None]).squeeze(0).softmax(-1)
    return torch.stack(weights), probabilities


def likeliest(tokenizer: Tokenizer, probabilities: Tensor, follower: int | None) -> Chances:
    """Return the likeliest tokens under probabilities (V,), and then the one that came, if it is none of these."""
    chosen = probabilities.topk(min(LIKELIEST, len(probabilities))).indices.tolist()
    if follower is not None and follower not in chosen:
        chosen.append(follower)
    return [(spelled(tokenizer.token_bytes(token)), round(float(probabilities[token]), 5)) for token in chosen]


def spelled(piece: bytes) -> str:
    r"""Return a token's text; bytes that are no whole character as in \xc3."""
    return piece.decode("utf-8", "backslashreplace")


def word_lengths(pieces: Sequence[bytes]) -> list[int]:
    """Return of how many tokens each word consists, white space and signs between words being words too.

    A token belongs to the word that it begins in, after its own white space: GPT-2's pieces begin with a space.
    """
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    runs = ["".join(run) for _, run in groupby(text, sort_of_character)]
    word_of_byte = [word for word, run in enumerate(runs) for _ in run.encode("utf-8", "surrogateescape")]
    starts = accumulate((len(piece) for piece in pieces[:-1]), initial=0)
    indents = [len(piece) - len(piece.lstrip() or piece) for piece in pieces]
    words = [word_of_byte[start + indent] for start, indent in zip(starts, indents, strict=True)]
    return [len(list(tokens)) for _, tokens in groupby(words)]


def sort_of_character(character: str) -> str:
    """Tell white space, what words are made of (letters, marks and numbers), and signs apart."""
    if character.isspace():
        return "space"
    return "word" if unicodedata.category(character)[0] in "LMN" else "sign"


def write(attention: Attention, path: Path, title: str) -> None:
    """Write a page if the path ends in .html, else a PNG.

    Raises:
        UserError: it could not be written, or matplotlib, which draws a PNG, is not installed.
    """
    write_atomic(path, page(attention, title).encode() if path.name.lower().endswith(".html") else png(attention))


def page(attention: Attention, title: str) -> str:
    """Return a page for a browser that holds all it needs."""
    layers, heads, places, _ = attention.weights.shape
    data = {
        "title": title,
        "unit": attention.unit,
        "tokens": attention.tokens,
        "words": attention.words,
        "layers": layers,
        "heads": heads,
        "weights": packed(attention.weights[:, :, *torch.tril_indices(places, places)]),
        "chances": attention.chances,
    }
    return render("attention.html", data)


def packed(weights: Tensor) -> str:
    """Write weights as 16 bits each, the smaller byte first, in base64."""
    return base64.b64encode((weights * FULL).round().int().numpy().astype("<u2").tobytes()).decode()


def png(attention: Attention) -> bytes:
    """Draw a panel for each layer and head: who looks downwards, where to rightwards.

    Raises:
        UserError: matplotlib is not installed.
    """
    with optional_import("matplotlib", "a PNG, unlike .html,"):
        import matplotlib  # noqa: F401, PLC0415  (optional, and slow to import)
        from matplotlib.colors import PowerNorm  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415

    layers, heads, places, _ = attention.weights.shape
    side = min(max(0.14 * places, 1.8), LARGEST / max(layers, heads))  # of a panel, in inches
    figure = Figure(figsize=(1.06 * side * heads + 1, (side + 0.25) * layers + 0.6), layout="constrained")
    panels = figure.subplots(layers, heads, squeeze=False)
    ahead = torch.ones(places, places, dtype=torch.bool).triu(1)
    for layer, row in enumerate(panels):
        for head, axes in enumerate(row):
            weights = attention.weights[layer, head].masked_fill(ahead, torch.nan).numpy()
            image = axes.imshow(weights, cmap="magma_r", norm=PowerNorm(0.5, 0, 1))  # small weights show too
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
            axes.set(xticks=[], yticks=[])
            axes.tick_params(length=0)
    labels = [token.translate(MARKS) for token in attention.tokens]
    ticks, fontsize = range(places), min(9, 0.8 * 72 * side / places)
    if fontsize < 4:  # points, too small to read: about ten places get their numbers instead
        step = math.ceil(places / 10)
        ticks, fontsize = range(step - 1, places, step), 8
        labels = [str(place + 1) for place in ticks]
    style = {"fontsize": fontsize, "family": "monospace", "parse_math": False}
    for axes in panels[-1]:
        axes.set_xticks(ticks, labels, rotation=90 if max(map(len, labels)) > 1 else 0, **style)
        axes.set_xlabel("looks at")
    for axes in panels[:, 0]:
        axes.set_yticks(ticks, labels, **style)
        axes.set_ylabel(attention.unit)
    bar: dict[str, Any] = {"fraction": 0.05, "shrink": 0.6, "aspect": 30, "ticks": [0, 0.01, 0.1, 0.25, 0.5, 1]}
    figure.colorbar(image, ax=panels, label="weight", **bar)
    picture = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of characters that its font lacks, which show as boxes
        figure.savefig(picture, format="png", dpi=200)
    return picture.getvalue()
