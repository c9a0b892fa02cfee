"""How several processes train one model: each holds all of it (DDP), or each holds a shard of every weight (FSDP2).

Either way each computes the gradients of its share of the batch, and updates with their mean over all processes. A
sharded tensor is a DTensor: it has the shape of the full one, and each process holds some of its rows. torch's module
for these takes most of a second to import, so it is asked for only where there are such tensors.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from glyphgpt.runtime import Runtime


def replicate_model(model: nn.Module, runtime: Runtime) -> nn.Module:
    """Wrap a model, which every process has, so that its gradients are averaged (DDP, Li et al. 2020)."""
    devices = [runtime.device] if runtime.device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has a new name for it, which 2.9 does not know
        return DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
        )  # buffers never change


def shard_model(model: Any, runtime: Runtime) -> None:
    """Shard a model's weights, in place; each block's come together just before they are used.

    FSDP2 (Zhao et al. 2023, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html): weights, gradients
    and optimizer state take 1/N of the memory. Between GPUs, blocks travel in the precision in which they compute, half
    the bytes in bfloat16; gradients are averaged in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import (  # noqa: PLC0415
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=runtime.dtype if runtime.device.type == "cuda" else None,  # a CPU's LayerNorm wants float32
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast decides, as it does without processes
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "next_logits")


def checkpoint_activations(model: Any) -> None:
    """Have each block's activations computed anew for the backward pass, not kept (Chen et al. 2016), in place."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@contextmanager
def gradient_sync(model: Any, *, now: bool) -> Iterator[None]:
    """Have backward passes in this context exchange gradients between processes, or only add them up for later."""
    if hasattr(model, "set_requires_gradient_sync"):  # a sharded model
        model.set_requires_gradient_sync(now)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not now else nullcontext():
        yield


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether each process holds only some rows of this tensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """Return what this process holds of a tensor; it shares memory with it."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full(tensor: Any) -> Tensor:
    """Return all of a tensor. Every process must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def scatter(complete: Tensor, like: Any) -> Tensor:
    """Return what this process would hold of a complete tensor that is sharded as another one is."""
    if not is_sharded(like):
        return complete
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415

    return distribute_tensor(complete, like.device_mesh, like.placements, src_data_rank=None).to_local()


def gather(held: Tensor, like: Any) -> Tensor:
    """Return the complete tensor of which each process holds what it holds of another. Every process must ask."""
    if not is_sharded(like):
        return held
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    sizes = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(held, like.device_mesh, like.placements, **sizes).full_tensor()
