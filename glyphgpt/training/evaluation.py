"""Evaluation: the loss on a validation split, over the same tokens every time, so that it is reproducible."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from glyphgpt.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from glyphgpt.cli import command
from glyphgpt.data.batches import Windows
from glyphgpt.data.dataset import Dataset
from glyphgpt.errors import UserError
from glyphgpt.inference.score import BAR_SECONDS, Score, make_score
from glyphgpt.runtime import Runtime
from glyphgpt.settings import TrainSettings
from glyphgpt.training.torch_state import build_model

EVAL_TIME = 0.05
"""Fraction of the training time for the evaluations during training, and again for the one at the end."""
EVAL_COST = 0.3
"""Time to evaluate a token, relative to the time to train on it."""
NEARLY_ALL = 0.8
"""Fraction of the blocks above which a sample is the whole split instead."""
MIN_BLOCKS = 10
"""Least number of blocks in a sample."""


def affordable_tokens(settings: TrainSettings, steps: int) -> int:
    """Return how many tokens can be evaluated in EVAL_TIME of the time of that many training steps."""
    least = MIN_BLOCKS * settings.block_size
    return max(least, int(steps * settings.tokens_per_step * EVAL_TIME / EVAL_COST))


def sample_tokens(settings: TrainSettings) -> int:
    """Return how many tokens each evaluation during training reads at most; 0 for the whole split."""
    if settings.eval_tokens != "auto":
        return settings.eval_tokens
    return affordable_tokens(settings, min(settings.eval_every, settings.max_steps))


def sample_blocks(blocks: int, count: int) -> NDArray[np.int64]:
    """Return a random sample of `count` of the numbers below `blocks`, sorted, and always the same."""
    sample = np.random.default_rng(0).choice(blocks, count, replace=False, shuffle=False)
    return np.sort(sample)


@torch.no_grad()
def evaluate(
    model: nn.Module, windows: Windows, runtime: Runtime, *, block_size: int, batch_size: int, max_tokens: int = 0
) -> Score:
    """Return the score on blocks of block_size tokens: all of them, or a sample.

    Consecutive blocks predict every token of the split but the first once. Processes share the blocks. Each calls the
    model equally often, as a sharded model requires.

    Args:
        batch_size: Batch size of training. Without gradients four times as many sequences fit, and are faster, except
            with a large vocabulary, whose logits take most of the memory.
        max_tokens: If above 0, read a sample of the blocks, at least two, with about this many tokens.
    """
    blocks, rest = divmod(windows.split.tokens - 1, block_size)
    count = min(blocks, max(2, max_tokens // block_size)) if max_tokens else blocks
    if count > NEARLY_ALL * blocks:
        count = blocks
    if count < blocks:
        rest = 0
    starts = sample_blocks(blocks, count) * block_size
    eval_batch_size = batch_size * (4 if windows.split.dtype.itemsize == 1 else 1)
    calls = math.ceil(count / (eval_batch_size * runtime.world_size))
    parts = np.array_split(starts[runtime.rank :: runtime.world_size], calls) if calls else []
    batches = [(part if part.size else starts[:1], block_size, part.size) for part in parts]
    if rest:
        batches.append((np.array([blocks * block_size]), rest, int(runtime.is_main)))
    was_training = model.training
    model.eval()
    total = squares = 0.0
    hidden = None if runtime.is_main else True  # None hides the bar where there is no terminal
    for batch_starts, length, counted in tqdm(
        batches, "evaluating", unit="batch", leave=False, delay=BAR_SECONDS, disable=hidden
    ):
        sequences = windows.read(batch_starts, length + 1)
        with runtime.autocast():
            logits = model(sequences[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten(), reduction="none")
        block_losses = losses.view(-1, length).sum(1, dtype=torch.float64)[:counted]
        total += block_losses.sum().item()
        squares += block_losses.square().sum().item() if length == block_size else 0.0
    model.train(was_training)
    total, squares = runtime.sum(total, squares)
    tokens = count * block_size + rest
    variance = max(0.0, squares - total**2 / count) / (count - 1) if count < blocks else 0.0  # of a block's loss
    standard_error = math.sqrt(variance / count * (1 - count / blocks)) / block_size if variance else 0.0
    return make_score(total / tokens, tokens, windows.split, standard_error)


def evaluate_best(settings: TrainSettings, dataset: Dataset, runtime: Runtime) -> Score:
    """Return the score of a run's best model, or of its last one if none has been evaluated, on the validation split.

    Raises:
        UserError: There is no model, or its vocabulary is not the dataset's.
    """
    best = load_checkpoint(find_checkpoint(Path(settings.out_dir)), with_optimizer=False)
    check_vocabulary(best, dataset)
    model = build_model(best).to(runtime.device)
    windows, block_size = Windows(dataset.val, runtime.device), model.config.block_size
    limit = 0 if settings.eval_tokens == "auto" else settings.eval_tokens
    return evaluate(model, windows, runtime, block_size=block_size, batch_size=settings.batch_size, max_tokens=limit)


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
