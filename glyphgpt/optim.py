"""Parameter groups, optimizers, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from glyphgpt.settings import Optimization


def learning_rate(step: int, settings: Optimization) -> float:
    """Return the learning rate of an update; `step` counts the updates before it.

    It rises linearly over warmup_steps, then falls from learning_rate to min_lr, which it reaches after
    max_steps updates, along a cosine (Loshchilov & Hutter 2016) or a line; or it stays.
    """
    peak, low = settings.learning_rate, settings.min_lr
    if step < settings.warmup_steps:
        return peak * (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return peak
    done = (step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps)
    fall = min(1.0, done) if settings.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * min(1.0, done))
    return peak + (low - peak) * fall


def set_learning_rate(optimizers: Iterable[Optimizer], rate: float) -> None:
    """Give every parameter group this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def make_optimizers(model: nn.Module, settings: Optimization) -> list[Optimizer]:
    """Return the optimizers that together update every parameter: AdamW (Loshchilov & Hutter 2017).

    Weight decay acts on matrices and embeddings only, not on biases and the gains of norms.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return [AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True)]


def clip_gradients(model: nn.Module, limit: float) -> torch.Tensor:
    """Scale gradients down to at most this norm (0: leave them), and return the norm they had."""
    if limit:
        return nn.utils.clip_grad_norm_(model.parameters(), limit)
    return nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
