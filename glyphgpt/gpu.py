"""CUDA GPUs: copies that the host does not wait for, CUDA graphs, and the speed of known GPUs."""

import gc
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from glyphgpt.errors import warn
from glyphgpt.runtime import Runtime, is_out_of_memory

WARM_UP_CALLS = 3
"""Calls of a function before it is captured, in which libraries allocate their memory and choose their kernels."""
GRAPHED_SECONDS, TYPICAL_PEAK = 0.004, 1e14
"""Longest duration of a training step, at the GPU's peak, that is a CUDA graph, and the peak of an unknown GPU. In a
longer step the host has the time to start kernels one by one, and a graph would hold on to their memory."""
PEAK_FLOPS = {
    "B200": 2250e12, "H200 NVL": 836e12, "H200": 989e12, "H100 NVL": 836e12, "H100 PCIe": 756e12, "H100": 989e12,
    "A100": 312e12, "A10": 125e12, "A10G": 70e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip
"""Floating point operations per second of matrix products in 16 bits, accumulated in 32, without sparsity, by name
(NVIDIA's data sheets)."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device; a copy to a GPU does not wait for what the GPU still has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class HostCopy:
    """A copy of a tensor for the host, which a GPU makes when it has computed the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        """Ask for the copy, without waiting for it."""
        self._copy, self._event = tensor, None
        if tensor.device.type == "cuda":
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> list[Any]:
        """Return the values, after waiting for them if needed."""
        if self._event:
            self._event.synchronize()
        return self._copy.tolist()


class CudaGraph:
    """The kernels of a function of tensors, captured so that the host starts all of them at once.

    The first calls run the function itself. After that, the tensors must keep their shapes, and each call overwrites
    the result of the previous one. The function must not need the host: no waits, and no sizes that depend on values.
    """

    can_capture: ClassVar[bool] = True
    """False after a capture has failed, from which torch's allocator does not recover."""

    def __init__(self, *, enabled: bool) -> None:
        """Create an empty graph; it stays empty unless `enabled`."""
        self.enabled = enabled
        self.calls = 0
        self.graph: Any = None
        self.inputs: list[Tensor] = []
        self.result = torch.empty(0)

    def call(
        self, function: Callable[..., Tensor], *inputs: Tensor, on_failure: Callable[[], None] | None = None
    ) -> Tensor:
        """Return the result of a function for these tensors. It must be the same function at every call.

        `on_failure` undoes what the function has changed on the host, if it cannot be captured.
        """
        self.calls += 1
        if self.enabled and CudaGraph.can_capture and self.calls == WARM_UP_CALLS + 1:
            self.capture(function, inputs)
            if self.graph is None and on_failure:
                on_failure()
        if self.graph is None:
            return function(*inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.result

    def capture(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        """Capture the kernels of a call, without running them; warn if that fails."""
        self.inputs = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # a backward pass that is still alive would bring its own stream into the capture
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream()),  # to which it returns even if the capture fails
                torch.cuda.graph(graph, capture_error_mode="thread_local"),  # other threads may read data meanwhile
            ):
                self.result = function(*self.inputs)
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a failed capture is an error, too
            is_fatal = not isinstance(cause, Exception)  # such as Ctrl-C
            if is_fatal or (isinstance(cause, (MemoryError, RuntimeError)) and is_out_of_memory(cause)):
                raise cause from None
            CudaGraph.can_capture = False
            reason = str(cause).strip().splitlines() or [type(cause).__name__]
            warn(f"no CUDA graph ({reason[0][:200]}); continuing without it, which is slower")
        else:
            self.graph = graph


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Compute attention without cuDNN, which plans for each new length of a text, for up to half a second."""
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def peak_flops(runtime: Runtime) -> float:
    """Return the peak of all GPUs of a run in floating point operations per second, 0 if it is not known.

    It is known for 16-bit precisions of the GPUs in PEAK_FLOPS.
    """
    if runtime.device.type != "cuda" or runtime.dtype == torch.float32:
        return 0.0
    name = torch.cuda.get_device_name(runtime.device)
    known = (peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b(?! (?:D|Laptop|Ti)\b)", name))
    processes_per_gpu = max(1.0, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / torch.cuda.device_count())
    return runtime.world_size / processes_per_gpu * next(known, 0.0)


def graph_pays(runtime: Runtime, flops: float) -> bool:
    """Return whether a training step of so many operations is faster as a CUDA graph."""
    seconds = flops / (peak_flops(runtime) or TYPICAL_PEAK)
    return runtime.device.type == "cuda" and runtime.world_size == 1 and seconds <= GRAPHED_SECONDS
