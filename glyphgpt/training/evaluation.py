"""Evaluation: the loss on a validation split, over the same tokens every time, so that it is reproducible."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from glyphgpt.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from glyphgpt.cli import command
from glyphgpt.data.batches import PADDING, Reader, inputs_and_targets
from glyphgpt.data.dataset import Dataset
from glyphgpt.data.rows import Ints, Row, evaluation_blocks
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
    model: nn.Module, reader: Reader, runtime: Runtime, *, block_size: int, batch_size: int, max_tokens: int = 0
) -> Score:
    """Return the score on blocks of up to block_size tokens (`evaluation_blocks`): all of them, or a sample.

    Processes share the blocks. Each calls the model equally often, as a sharded model requires.

    Args:
        batch_size: Batch size of training. Without gradients four times as many sequences fit, and are faster, except
            with a large vocabulary, whose logits take most of the memory.
        max_tokens: If above 0, read a sample of the blocks, at least two, with about this many tokens.
    """
    starts, sizes = evaluation_blocks(reader.split, block_size)
    blocks, count = len(sizes), sample_size(sizes, max_tokens)
    if count < blocks:
        chosen = sample_blocks(blocks, count)
        starts, sizes = starts[chosen], sizes[chosen]
    order = np.argsort(-sizes, kind="stable")  # blocks of similar sizes together, as the others are padded
    starts, sizes = starts[order], sizes[order]
    batch_tokens = block_size * batch_size * (4 if reader.split.dtype.itemsize == 1 else 1)
    was_training = model.training
    model.eval()
    sums = np.zeros(count)  # of each block's losses, in the blocks that this process evaluates
    hidden = None if runtime.is_main else True  # None hides the bar where there is no terminal
    for first, last in tqdm(
        batch_limits(sizes, batch_tokens * runtime.world_size),
        "evaluating", unit="batch", leave=False, delay=BAR_SECONDS, disable=hidden,
    ):  # fmt: skip
        own = np.arange(first + runtime.rank, last, runtime.world_size)
        read = own if own.size else [first]
        length = int(sizes[first])
        rows: list[Row] = [[range(starts[i], starts[i] + sizes[i] + 1)] for i in read]
        inputs, targets = inputs_and_targets(reader.read(rows, length + 1))
        with runtime.autocast():
            logits = model(inputs)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=PADDING, reduction="none"
        )
        sums[own] = losses.view(-1, length).sum(1, dtype=torch.float64)[: own.size].cpu()
    model.train(was_training)
    total, squares, products = runtime.sum(float(sums.sum()), float(sums @ sums), float(sums @ sizes))
    tokens = int(sizes.sum())
    loss = total / tokens
    error = 0.0
    if count < blocks:  # of a ratio of two sums over a sample (Cochran 1977, section 6.3)
        variance = max(0.0, squares - 2 * loss * products + loss**2 * float(sizes @ sizes)) / (count - 1)
        error = math.sqrt(variance / count * (1 - count / blocks)) / (tokens / count)
    return make_score(loss, tokens, reader.split, error)


def sample_size(sizes: Ints, max_tokens: int) -> int:
    """Return how many of the blocks of these sizes to evaluate, so that they have about `max_tokens` tokens."""
    blocks = len(sizes)
    count = min(blocks, max(2, int(max_tokens / sizes.mean()))) if max_tokens else blocks
    return blocks if count > NEARLY_ALL * blocks else count


def batch_limits(sizes: Ints, tokens: int) -> list[tuple[int, int]]:
    """Return the first block of each batch and the one after its last; a batch has about `tokens` tokens.

    Args:
        sizes: The sizes of the blocks, the largest first. Each block of a batch is padded to the first one's size.
    """
    limits, first = [], 0
    while first < len(sizes):
        last = min(len(sizes), first + max(1, tokens // int(sizes[first])))
        limits.append((first, last))
        first = last
    return limits


def evaluate_best(settings: TrainSettings, dataset: Dataset, runtime: Runtime) -> Score:
    """Return the score of a run's best model, or of its last one if none has been evaluated, on the validation split.

    Raises:
        UserError: There is no model, or its vocabulary is not the dataset's.
    """
    best = load_checkpoint(find_checkpoint(Path(settings.out_dir)), with_optimizer=False)
    check_vocabulary(best, dataset)
    model = build_model(best).to(runtime.device)
    reader, block_size = Reader(dataset.val, runtime.device), model.config.block_size
    limit = 0 if settings.eval_tokens == "auto" else settings.eval_tokens
    return evaluate(model, reader, runtime, block_size=block_size, batch_size=settings.batch_size, max_tokens=limit)


def token_ids(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return what determines the ids of a tokenizer; records do not change those of BPE tokens."""
    has_end = tokenizer.get("kind") in ("bpe", "gpt2")
    return {key: value for key, value in tokenizer.items() if not (has_end and key == "separator")}


def check_vocabulary(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Check that a checkpoint and a dataset have the same tokenizer.

    Raises:
        UserError: The tokenizers differ.
    """
    if token_ids(checkpoint.metadata.tokenizer) != token_ids(dataset.meta.tokenizer):
        raise UserError(
            f"{checkpoint.path} and {dataset.folder} have different vocabularies; use the dataset of that run, or "
            f"prepare yours for it: {command('prepare.py', 'FILE', '--name=NAME', f'--vocabulary={checkpoint.path}')}"
        )
