"""Scores: how well a model predicts a text."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
from tqdm import tqdm

from glyphgpt.data.dataset import Split
from glyphgpt.data.records import Documents
from glyphgpt.data.rows import evaluation_blocks
from glyphgpt.data.splitting import read_records
from glyphgpt.data.tokenizers import Tokenizer, encode_text
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


def encode_split(documents: Iterable[Documents], tokenizer: Tokenizer, *, skip: bool) -> tuple[Split, int]:
    """Return a user's text as a split, and the number of its unknown characters, which are left out if `skip` is true.

    Raises:
        UserError: The text has unknown characters and `skip` is false.
    """
    if tokenizer.separator is None:
        records = ["".join(chain.from_iterable(documents))]
    else:
        stream = read_records(iter(documents), tokenizer.separator)
        records = [record for _, *others in stream for record in others]
    text = "".join(records)
    encode_text("".join(tokenizer.unknown_characters(text)), tokenizer, skip=skip)  # checks them
    known = [part for record in records if (part := tokenizer.split_unknown(record)[0])]
    characters = sum(map(len, known))
    if tokenizer.separator is None:
        return Split((tokenizer.encode("".join(known)),), characters), len(text) - characters
    tokens = tokenizer.encode_documents(["", *known, ""] if known else [""])
    return Split((tokens,), characters + len(known), tokenizer.end_of_record), len(text) - characters


def token_losses(model: Scorer, split: Split, *, block_size: int, vocab_size: int) -> Iterator[Floats]:
    """Yield the losses of all N tokens but the first, in nats, as arrays of N - 1 numbers together.

    The tokens are predicted in the blocks of an evaluation, each without what precedes it, as in training.
    """
    starts, sizes = evaluation_blocks(split, block_size)
    batch = max(1, BATCH_LOGITS // (int(sizes.max()) * vocab_size))
    with tqdm(
        total=split.tokens - 1, unit="token", desc="scoring", leave=False, delay=BAR_SECONDS, disable=None
    ) as progress:
        for first in range(0, len(starts), batch):
            block_starts, block_sizes = starts[first : first + batch], sizes[first : first + batch]
            T, total = int(block_sizes.max()), int(block_sizes.sum())
            text = split.slice(int(block_starts[0]), int(block_starts[0]) + total + 1).astype(np.int64)
            # Blocks that are shorter than the longest one are filled with what follows, and its losses are left out.
            index = np.minimum(block_starts[:, None] - block_starts[0] + np.arange(T), total - 1)  # (B, T)
            log_probs = log_softmax(model.logits(text[index]))  # (B, T, V)
            losses = -np.take_along_axis(log_probs, text[index + 1][:, :, None], axis=-1)[:, :, 0]
            yield losses[np.arange(T) < block_sizes[:, None]]
            progress.update(total)
