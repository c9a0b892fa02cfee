"""Evaluation: the loss on a validation split, over the same tokens every time, so that it is reproducible."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from glyphgpt.checkpoint import Checkpoint, load_checkpoint
from glyphgpt.cli import command
from glyphgpt.data.batches import Windows
from glyphgpt.data.dataset import Dataset
from glyphgpt.errors import UserError
from glyphgpt.files import BEST
from glyphgpt.runtime import Runtime
from glyphgpt.settings import TrainSettings
from glyphgpt.training.torch_state import build_model


@dataclass(frozen=True)
class Score:
    """A model's loss on a text, in three units."""

    loss: float
    """Nats per token."""
    bits_per_character: float
    perplexity: float
    """exp(loss), per token."""

    def __str__(self) -> str:
        """Return all three in one line."""
        return (
            f"loss {self.loss:.4f}, {self.bits_per_character:.3f} bits per character, perplexity {self.perplexity:.2f}"
        )


@torch.no_grad()
def evaluate(
    model: nn.Module, windows: Windows, runtime: Runtime, *, block_size: int, batch_size: int, max_tokens: int = 0
) -> Score:
    """Return the score on consecutive blocks of block_size tokens, which predict every token but the first once.

    Processes share the blocks. Each calls the model equally often, as a sharded model requires.

    Args:
        batch_size: Batch size of training. Without gradients four times as many sequences fit, and are faster, except
            with a large vocabulary, whose logits take most of the memory.
        max_tokens: If above 0, use only this many tokens from the start of the split.
    """
    tokens = min(windows.split.tokens, max_tokens or windows.split.tokens)
    blocks, rest = divmod(tokens - 1, block_size)
    starts = np.arange(blocks, dtype=np.int64) * block_size
    eval_batch_size = batch_size * (4 if windows.split.dtype.itemsize == 1 else 1)
    calls = math.ceil(blocks / (eval_batch_size * runtime.world_size))
    parts = np.array_split(starts[runtime.rank :: runtime.world_size], calls) if calls else []
    batches = [(part if part.size else starts[:1], block_size, part.size) for part in parts]
    if rest:
        batches.append((np.array([blocks * block_size]), rest, int(runtime.is_main)))
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
    perplexity = math.exp(loss) if loss < 700 else math.inf  # exp overflows above 709
    return Score(loss, loss * tokens_per_character / math.log(2), perplexity)


def evaluate_best(settings: TrainSettings, dataset: Dataset, runtime: Runtime) -> Score:
    """Return the score of a run's best model on the validation split.

    Raises:
        UserError: There is no such model, or its vocabulary is not the dataset's.
    """
    best = load_checkpoint(Path(settings.out_dir) / BEST, with_optimizer=False)
    check_vocabulary(best, dataset)
    model = build_model(best).to(runtime.device)
    windows, block_size = Windows(dataset.val, runtime.device), model.config.block_size
    return evaluate(
        model, windows, runtime, block_size=block_size, batch_size=settings.batch_size, max_tokens=settings.eval_tokens
    )


def check_vocabulary(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Check that a checkpoint and a dataset have the same tokenizer.

    Raises:
        UserError: The tokenizers differ.
    """
    if checkpoint.metadata.tokenizer != dataset.meta.tokenizer:
        raise UserError(
            f"{checkpoint.path} and {dataset.folder} have different vocabularies; use the dataset of that run, or "
            f"prepare yours for it: {command('prepare.py', 'FILE', '--name=NAME', f'--vocabulary={checkpoint.path}')}"
        )
