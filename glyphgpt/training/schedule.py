"""The learning rate, as a pure function of the step."""

import math

from glyphgpt.checkpoint import TrainState
from glyphgpt.settings import Optimization


def learning_rate(state: TrainState, settings: Optimization) -> float:
    """Return the learning rate of the next update.

    The rate rises linearly over warmup_steps. Then it falls from learning_rate to min_lr, which it reaches after
    max_steps updates, along a cosine (Loshchilov & Hutter 2016) or a line; or it falls as the inverse square root of
    the step (Vaswani et al. 2017, section 5.3), or stays constant. Where max_steps has changed on the way, it falls in
    a line from its value at that step.
    """
    step, peak, low = state.step, settings.learning_rate, settings.min_lr
    if state.planned_at:
        done = (step - state.planned_at) / max(1, settings.max_steps - state.planned_at)
        return state.planned_rate + (low - state.planned_rate) * min(1.0, done)
    if step < settings.warmup_steps:
        return peak * (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return peak
    if settings.schedule == "inverse_sqrt":
        return max(low, peak * math.sqrt((settings.warmup_steps + 1) / (step + 1)))
    done = (step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps)
    fall = min(1.0, done) if settings.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * min(1.0, done))
    return peak + (low - peak) * fall
