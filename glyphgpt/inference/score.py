"""Scores: how well a model predicts a text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tqdm import tqdm

from glyphgpt.data.dataset import Split
from glyphgpt.inference.generate import Floats, Ids, log_softmax

BATCH_LOGITS = 2**22
"""Logits computed at once, which bounds the memory."""
BAR_SECONDS = 1.0  # no progress bar for what takes less time


@dataclass(frozen=True)
class Score:
    """A model's loss on a text, in three units."""

    loss: float
    """Nats per token."""
    standard_error: float
    """Standard error of a sample's loss as an estimate of the whole split's; 0 if the whole split was read."""
    bits_per_character: float
    perplexity: float
    """exp(loss), per token."""
    eval_tokens: int
    """Number of tokens predicted."""

    def __str__(self) -> str:
        """Return all of it in one line."""
        error = f" ± {self.standard_error:.4f}" if self.standard_error else ""
        return (
            f"loss {self.loss:.4f}{error}, {self.bits_per_character:.3f} bits per character, perplexity "
            f"{self.perplexity:.2f} ({self.eval_tokens:,} tokens)"
        )


class Scorer(Protocol):
    """A model that predicts every token of a text."""

    def logits(self, tokens: Ids) -> Floats:
        """Return the logits (B, T, V) of the token that follows each of the tokens (B, T)."""
        ...


def make_score(loss: float, eval_tokens: int, split: Split, standard_error: float = 0.0) -> Score:
    """Return the score of a split from the loss, in nats per token, of `eval_tokens` of its tokens."""
    return Score(
        loss=loss,
        standard_error=standard_error,
        bits_per_character=loss * split.tokens / split.characters / math.log(2),
        perplexity=math.exp(loss) if loss < 700 else math.inf,  # exp overflows above 709
        eval_tokens=eval_tokens,
    )


def token_losses(model: Scorer, split: Split, *, block_size: int, vocab_size: int) -> Iterator[Floats]:
    """Yield the losses of all N tokens but the first, in nats, as arrays of N - 1 numbers together.

    The tokens are predicted in blocks of block_size, each without what precedes it, as in training.
    """
    batch = max(1, BATCH_LOGITS // (block_size * vocab_size))
    start, count = 0, split.tokens - 1
    with tqdm(total=count, unit="token", desc="scoring", leave=False, delay=BAR_SECONDS, disable=None) as progress:
        while start < count:
            T = min(block_size, count - start)
            B = min(batch, (count - start) // T)
            tokens = split.slice(start, start + B * T + 1).astype(np.int64)
            log_probs = log_softmax(model.logits(tokens[:-1].reshape(B, T)))  # (B, T, V)
            yield -np.take_along_axis(log_probs, tokens[1:].reshape(B, T, 1), axis=-1).ravel()
            start += B * T
            progress.update(B * T)
