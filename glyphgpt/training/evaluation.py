"""The loss over a whole split: the same number every time."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from glyphgpt.data.batches import Windows
from glyphgpt.runtime import Runtime


@dataclass(frozen=True)
class Score:
    """A model's loss on a text, in three units."""

    loss: float
    """Nats per token."""
    bits_per_character: float
    perplexity: float
    """Of a token: exp(loss)."""

    def __str__(self) -> str:
        """Tell all three."""
        return (
            f"loss {self.loss:.4f}, {self.bits_per_character:.3f} bits per character, perplexity {self.perplexity:.2f}"
        )


@torch.no_grad()
def evaluate(
    model: nn.Module, windows: Windows, runtime: Runtime, *, block_size: int, batch_size: int, max_tokens: int = 0
) -> Score:
    """Score a split tile by tile, block_size tokens each; every token but the very first is predicted once.

    `batch_size` is that of training: four times as much fits without gradients, and is faster, but not where the
    vocabulary is large, whose logits take most of the memory. `max_tokens` above 0 takes so many tokens from the
    split's start only. Processes share the tiles; each calls the model equally often, as a sharded one needs.
    """
    tokens = min(windows.split.tokens, max_tokens or windows.split.tokens)
    tiles, rest = divmod(tokens - 1, block_size)
    starts = np.arange(tiles, dtype=np.int64) * block_size
    at_once = batch_size * (4 if windows.split.dtype.itemsize == 1 else 1)
    calls = math.ceil(tiles / (at_once * runtime.world_size))
    parts = np.array_split(starts[runtime.rank :: runtime.world_size], calls) if calls else []
    batches = [(part if part.size else starts[:1], block_size, part.size) for part in parts]
    if rest:
        batches.append((np.array([tiles * block_size]), rest, int(runtime.is_main)))
    was_training = model.training
    model.eval()
    total = 0.0
    for batch_starts, length, counted in batches:
        sequences = windows.read(batch_starts, length + 1)
        with runtime.autocast():
            loss = model(sequences[:, :-1], sequences[:, 1:])
        total += loss.item() * counted * length
    model.train(was_training)
    (total,) = runtime.sum(total)
    loss = total / (tokens - 1)
    tokens_per_character = windows.split.tokens / windows.split.characters
    perplexity = math.exp(loss) if loss < 700 else math.inf  # a float holds no more
    return Score(loss, loss * tokens_per_character / math.log(2), perplexity)
