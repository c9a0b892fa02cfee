"""Between torch and checkpoints: weights and optimizer state as arrays by name, and back."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from glyphgpt.checkpoint import Arrays, Checkpoint
from glyphgpt.decoder import check_form
from glyphgpt.errors import Failure
from glyphgpt.optim import Optimizer

M = TypeVar("M", bound=nn.Module)


def model_arrays(model: nn.Module) -> Arrays:
    """Return the weights by name. On a CPU they are not copied."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model.

    Raises:
        Failure: names or shapes differ.
    """
    try:
        model.load_state_dict({name: torch.from_numpy(array) for name, array in checkpoint.model.items()})
    except (RuntimeError, TypeError) as error:  # numpy has types of which torch knows nothing
        raise Failure(f"{checkpoint.path}: its config and its weights do not belong together") from error


def make_model(checkpoint: Checkpoint, model_class: type[M], config_class: type[Any]) -> M:
    """Return a checkpoint's model with its weights, on the CPU.

    Raises:
        Failure: config and weights do not belong together, or the weights are no numbers.
    """
    checkpoint.check_weights()
    try:
        form = check_form(checkpoint.info.model, checkpoint.model)
    except ValueError as error:  # pydantic's errors are ValueErrors too
        raise Failure(f"{checkpoint.path}: its config and its weights do not belong together") from error
    model = model_class(config_class(**form.model_dump()))
    load_weights(model, checkpoint)
    return model


def optimizer_arrays(model: nn.Module, optimizers: list[Optimizer]) -> Arrays:
    """Return the optimizers' state as KIND.PARAMETER.KEY; nothing before the first step. On a CPU it is not copied."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{type(optimizer).__name__}.{names[parameter]}.{key}": value.cpu().numpy()
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizers(model: nn.Module, optimizers: list[Optimizer], checkpoint: Checkpoint) -> None:
    """Load the optimizers' state; learning rates and the like stay those of the settings.

    Raises:
        Failure: the state is of another model or optimizer.
    """
    if checkpoint.info.progress.step == 0:
        return
    other = Failure(f"{checkpoint.path}: its optimizer state is of another model or optimizer; start a new run")
    device = next(model.parameters()).device
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    unused = dict(checkpoint.optimizer)
    for optimizer in optimizers:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            state = optimizer.new_state(parameter)
            for key, value in state.items():
                array = unused.pop(f"{type(optimizer).__name__}.{names[parameter]}.{key}", None)
                if array is None or array.shape != value.shape or array.dtype != value.cpu().numpy().dtype:
                    raise other
                state[key] = torch.tensor(array, device=device)  # a copy, which the optimizer may change
            optimizer.state[parameter] = state
    if unused:
        raise other
