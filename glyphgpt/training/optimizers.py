"""The optimizers, AdamW and Muon, and their parameter groups."""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from glyphgpt.settings import Optimization
from glyphgpt.training.distributed import full, gather, local, scatter

NGRAM_LR_SCALE = 4.0
"""Factor of the learning rate of n-gram tables, whose rows get few gradients."""


class Optimizer(ABC):
    """Base class of the optimizers: parameter groups, and a state for each parameter.

    It replaces torch.optim.Optimizer, whose constructor imports torch's compiler and adds two seconds to every start.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """Set the parameter groups: dicts with params, weight_decay and lr_scale."""
        self.param_groups = [{"lr": 0.0, **group} for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @abstractmethod
    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter before its first update."""

    @abstractmethod
    def update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any], skip: Tensor) -> None:
        """Update parameters by their gradients, and their state; change nothing if `skip` is true."""

    @torch.no_grad()
    def step(self, skip: Tensor) -> None:
        """Update every parameter that has a gradient; change nothing if `skip`, a boolean on the device, is true.

        The host does not read `skip`, for which it would have to wait until the device has computed it.
        """
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if parameter not in self.state:
                    self.state[parameter] = self.new_state(parameter)
            if parameters:
                self.update(parameters, [parameter.grad for parameter in parameters], group, skip)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017), by torch's fused kernel."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        """Set the parameter groups, and the decay rates of the means of gradients and squared gradients."""
        super().__init__(groups)
        self.beta1, self.beta2 = betas

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return zero means and step 0."""
        step = torch.zeros((), device=parameter.device)
        return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}

    def update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any], skip: Tensor) -> None:
        """Update parameters by their gradients, and their state; change nothing if `skip` is true."""
        states = [self.state[parameter] for parameter in parameters]
        means, squares, steps = ([local(state[key]) for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        adamw(
            list(map(local, parameters)), list(map(local, gradients)), means, squares, [], steps, fused=True,
            amsgrad=False, beta1=self.beta1, beta2=self.beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=1e-8, maximize=False, found_inf=skip.float(),
        )  # fmt: skip


class Muon(Optimizer):
    """Momentum with orthogonalized updates, for matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    Updates are scaled to the usual size of AdamW's, so that both share one learning rate and weight decay (Liu et al.
    2025, "Muon is scalable for LLM training"). Unlike torch.optim.Muon, it orthogonalizes all matrices of one shape,
    or transposed of that shape, together, which is faster for small ones.
    """

    def __init__(
        self, groups: list[dict[str, Any]], dtype: torch.dtype = torch.float32, momentum: float = 0.95
    ) -> None:
        """Set the parameter groups, and the dtype in which updates are orthogonalized."""
        super().__init__(groups)
        self.dtype, self.momentum = dtype, momentum

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return zero momentum."""
        return {"momentum": torch.zeros_like(parameter)}

    def update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any], skip: Tensor) -> None:
        """Update matrices by their gradients, and their momentum; change nothing if `skip` is true."""
        means = [local(self.state[parameter]["momentum"]) for parameter in parameters]
        gradients = [mean.where(skip, local(grad)) for mean, grad in zip(means, gradients, strict=True)]
        torch._foreach_lerp_(means, gradients, 1 - self.momentum)
        ahead = torch._foreach_lerp(gradients, means, self.momentum)  # Nesterov momentum
        lr = torch.where(skip, 0.0, group["lr"])
        torch._foreach_mul_(list(map(local, parameters)), 1 - lr * group["weight_decay"])
        by_shape = defaultdict(list)
        for parameter, direction in zip(parameters, ahead, strict=True):
            full = gather(direction, parameter)
            wide = full.mT if full.size(0) > full.size(1) else full
            by_shape[wide.shape].append((parameter, wide))
        for shape, pairs in by_shape.items():
            updates = orthogonalize(torch.stack([wide for _, wide in pairs]), self.dtype)
            updates *= -lr * 0.2 * math.sqrt(shape[1])
            parts = [
                scatter(update if parameter.shape == shape else update.mT, parameter)
                for update, (parameter, _) in zip(updates, pairs, strict=True)
            ]
            torch._foreach_add_([local(parameter) for parameter, _ in pairs], parts)


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return matrices (B, M, N), M <= N, with nearly the same singular vectors, and singular values near 1.

    Computed in `dtype` by five Newton-Schulz iterations with Jordan's coefficients.
    """
    x = matrices.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.to(matrices.dtype)


def set_learning_rate(optimizers: Iterable[Optimizer], rate: float | Tensor) -> None:
    """Set the learning rate, a number or a scalar on the device, of every parameter group, times its lr_scale."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]


def make_optimizers(model: nn.Module, settings: Optimization, dtype: torch.dtype = torch.float32) -> list[Optimizer]:
    """Return the optimizers that together update every parameter: AdamW, and Muon for matrices if the settings say so.

    Weight decay applies to matrices and embeddings, not to biases and the gains of norms. `dtype` is Muon's precision.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {name for name, p in parameters.items() if p.dim() >= 2}
    tables = {name for name in matrices if name.startswith("ngram_embedding.")}
    muon = {name for name in matrices if name.startswith("blocks.") and settings.optimizer == "muon"}

    def group_of(names: set[str], weight_decay: float, lr_scale: float = 1.0) -> dict[str, Any]:
        chosen = [parameter for name, parameter in parameters.items() if name in names]
        return {"params": chosen, "weight_decay": weight_decay, "lr_scale": lr_scale}

    groups = [
        group_of(matrices - tables - muon, settings.weight_decay),
        group_of(parameters.keys() - matrices, 0.0),
        group_of(tables, settings.ngram_weight_decay, NGRAM_LR_SCALE),
    ]
    optimizers: list[Optimizer] = [AdamW(groups, (settings.beta1, settings.beta2))]
    return [*optimizers, Muon([group_of(muon, settings.weight_decay)], dtype)] if muon else optimizers


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients down to a norm of at most `limit`, or not at all if it is 0; return the norm before scaling."""
    norm = full(nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None))
    if limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
