"""Several processes that train one model: each holds a full copy (DDP), or a shard of every weight (FSDP2).

Each process computes the gradients of its part of the batch and updates with the mean over all processes. A sharded
tensor is a DTensor: it has the full shape, but each process holds only some of its rows. torch's module for DTensors
takes most of a second to import, so it is imported only where there are sharded tensors.
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
    """Wrap a model that every process holds, so that its gradients are averaged (DDP, Li et al. 2020)."""
    devices = [runtime.device] if runtime.device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames an argument that 2.9 needs
        return DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
        )  # the buffers are constant


def shard_model(model: Any, runtime: Runtime) -> None:
    """Shard a model's weights in place; those of a block are gathered just before it runs.

    FSDP2 (Zhao et al. 2023, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html): weights, gradients
    and optimizer state take 1/N of the memory. GPUs exchange weights in the dtype of the computation, which in bfloat16
    halves the bytes; gradients are averaged in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import (  # noqa: PLC0415
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=runtime.dtype if runtime.device.type == "cuda" else None,  # LayerNorm on a CPU needs float32
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast casts them, as in a single process
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "next_logits")


def checkpoint_activations(model: Any) -> None:
    """Make each block recompute its activations in the backward pass instead of keeping them (Chen et al. 2016)."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@contextmanager
def gradient_sync(model: Any, *, now: bool) -> Iterator[None]:
    """If `now`, backward passes in this context exchange gradients; otherwise they only accumulate them."""
    if hasattr(model, "set_requires_gradient_sync"):  # a sharded model
        model.set_requires_gradient_sync(now)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not now else nullcontext():
        yield


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each process holds only some rows of a tensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """Return the part of a tensor that this process holds, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full(tensor: Any) -> Tensor:
    """Return the full tensor. Every process must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def scatter(tensor: Tensor, like: Any) -> Tensor:
    """Return this process's part of a full tensor that is to be sharded like another one."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()


def gather(part: Tensor, like: Any) -> Tensor:
    """Return the full tensor from the processes' parts, sharded like another one. Every process must call this."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    sizes = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(part, like.device_mesh, like.placements, **sizes).full_tensor()
