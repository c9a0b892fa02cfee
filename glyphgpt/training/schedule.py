"""The learning rate, as a pure function of the step."""

import math

from glyphgpt.settings import Optimization


def learning_rate(step: int, settings: Optimization) -> float:
    """Return the learning rate of the update that follows `step` updates.

    The rate rises linearly over warmup_steps. Then it falls from learning_rate to min_lr, which it reaches after
    max_steps updates, along a cosine (Loshchilov & Hutter 2016) or a line, or it stays constant.
    """
    peak, low = settings.learning_rate, settings.min_lr
    if step < settings.warmup_steps:
        return peak * (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return peak
    done = (step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps)
    fall = min(1.0, done) if settings.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * min(1.0, done))
    return peak + (low - peak) * fall
