"""Weights and optimizer state: from torch to arrays by name, for checkpoints, and back.

A model may be sharded over processes (`glyphgpt/training/distributed.py`); its checkpoints do not depend on that.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from glyphgpt.checkpoint import Arrays, Checkpoint
from glyphgpt.errors import UserError
from glyphgpt.training.distributed import full, local, scatter
from glyphgpt.training.optimizers import Optimizer

if TYPE_CHECKING:
    from model import GPT


def model_arrays(model: nn.Module, *, keep: bool = True) -> Arrays:
    """Return the weights by name, or nothing if `keep` is false. On a CPU the arrays share memory with the model.

    All processes of a sharded model must call it, even those that do not keep the result.
    """
    return _arrays(model.state_dict().items(), keep=keep)


def _arrays(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> Arrays:
    gathered = ((name, full(tensor)) for name, tensor in tensors)
    return {name: tensor.cpu().numpy() for name, tensor in gathered if keep}


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model of the same config."""
    for name, tensor in model.state_dict().items():
        local(tensor).copy_(scatter(torch.from_numpy(checkpoint.model[name]), tensor))


def build_model(checkpoint: Checkpoint) -> "GPT":
    """Return a checkpoint's model with its weights, on the CPU.

    Raises:
        UserError: The config and the weights do not belong together, or some weights are not finite.
    """
    from model import GPT, GPTConfig  # noqa: PLC0415  (the package imports model.py only inside functions)

    model = GPT(GPTConfig(**checkpoint.config.model_dump()))
    load_weights(model, checkpoint)
    return model


def optimizer_arrays(model: nn.Module, optimizers: list[Optimizer], *, keep: bool = True) -> Arrays:
    """Return the optimizers' state by names OPTIMIZER.PARAMETER.KEY; it is empty before the first step.

    On a CPU the arrays share memory with the state. All processes of a sharded model must call it, even those that do
    not keep the result.
    """
    names = _names(model)
    tensors = (
        (f"{type(optimizer).__name__}.{names[parameter]}.{key}", value)
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    )
    return _arrays(tensors, keep=keep)


def _names(model: nn.Module) -> dict[Tensor, str]:
    """Return each parameter's name. While FSDP has gathered weights, `named_parameters` yields other tensors."""
    return {parameter: name for name, parameter in model.state_dict(keep_vars=True).items()}


def restore_optimizers(model: nn.Module, optimizers: list[Optimizer], checkpoint: Checkpoint) -> None:
    """Load the optimizers' state. Learning rates and other hyperparameters stay those of the settings.

    Raises:
        UserError: The state belongs to another model or optimizer.
    """
    if checkpoint.metadata.state.step == 0:
        return
    mismatch = UserError(f"{checkpoint.path}: its optimizer state is of another model or optimizer; start a new run")
    names = _names(model)
    unused = dict(checkpoint.optimizer)
    for optimizer in optimizers:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            state = optimizer.new_state(parameter)
            for key, value in state.items():
                array = unused.pop(f"{type(optimizer).__name__}.{names[parameter]}.{key}", None)
                if array is None or array.shape != value.shape or array.dtype != np.float32:
                    raise mismatch
                local(value).copy_(scatter(torch.from_numpy(array), value))
            optimizer.state[parameter] = state
    if unused:
        raise mismatch
