"""Between torch and checkpoints: weights and optimizer state as arrays by name, and back.

A model may be sharded over processes (`glyphgpt/training/distributed.py`); its checkpoints are as those of any other.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from glyphgpt.checkpoint import Arrays, Checkpoint
from glyphgpt.errors import UserError
from glyphgpt.inference.numpy_gpt import check_form
from glyphgpt.training.distributed import full, local, scatter
from glyphgpt.training.optimizers import Optimizer

M = TypeVar("M", bound=nn.Module)


def model_arrays(model: nn.Module, *, keep: bool = True) -> Arrays:
    """Return the weights by name, or nothing if they are not to be kept. On a CPU they are not copied.

    Every process must ask for those of a sharded model, even if it does not keep them.
    """
    return _arrays(model.state_dict().items(), keep=keep)


def _arrays(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> Arrays:
    complete = ((name, full(tensor)) for name, tensor in tensors)
    return {name: tensor.cpu().numpy() for name, tensor in complete if keep}


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model.

    Raises:
        UserError: names or shapes differ.
    """
    other = UserError(f"{checkpoint.path}: its config and its weights do not belong together")
    weights = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if shapes != {name: array.shape for name, array in checkpoint.model.items()}:
        raise other
    try:
        for name, tensor in weights.items():
            local(tensor).copy_(scatter(torch.from_numpy(checkpoint.model[name]), tensor))
    except TypeError as error:  # numpy has types of which torch knows nothing
        raise other from error


def build_model(checkpoint: Checkpoint, model_class: type[M], config_class: type[Any]) -> M:
    """Return a checkpoint's model with its weights, on the CPU.

    Raises:
        UserError: config and weights do not belong together, or the weights are no numbers.
    """
    checkpoint.check_weights()
    try:
        form = check_form(checkpoint.metadata.model, checkpoint.model)
    except ValueError as error:  # pydantic's errors are ValueErrors too
        raise UserError(f"{checkpoint.path}: its config and its weights do not belong together") from error
    model = model_class(config_class(**form.model_dump()))
    load_weights(model, checkpoint)
    return model


def optimizer_arrays(model: nn.Module, optimizers: list[Optimizer], *, keep: bool = True) -> Arrays:
    """Return the optimizers' state as KIND.PARAMETER.KEY; nothing before the first step. On a CPU it is not copied.

    Every process must ask for that of a sharded model, even if it does not keep it.
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
    """Return each parameter's name. A sharded model's `named_parameters` may be full ones, for a while."""
    return {parameter: name for name, parameter in model.state_dict(keep_vars=True).items()}


def restore_optimizers(model: nn.Module, optimizers: list[Optimizer], checkpoint: Checkpoint) -> None:
    """Load the optimizers' state; learning rates and the like stay those of the settings.

    Raises:
        UserError: the state is of another model or optimizer.
    """
    if checkpoint.metadata.state.step == 0:
        return
    other = UserError(f"{checkpoint.path}: its optimizer state is of another model or optimizer; start a new run")
    names = _names(model)
    unused = dict(checkpoint.optimizer)
    for optimizer in optimizers:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            state = optimizer.new_state(parameter)
            for key, value in state.items():
                array = unused.pop(f"{type(optimizer).__name__}.{names[parameter]}.{key}", None)
                if array is None or array.shape != value.shape or array.dtype != np.float32:
                    raise other
                local(value).copy_(scatter(torch.from_numpy(array), value))
            optimizer.state[parameter] = state
    if unused:
        raise other
