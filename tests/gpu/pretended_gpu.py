"""CUDA GPUs that are only pretended, to test the CUDA path without one.

A tensor on such a GPU says `cuda:0` and carries CUDA's dispatch keys, so that autocast, the gradient scaler, device
checks, DDP and FSDP2 are torch's own; a CPU tensor inside it computes. What CUDA refuses is refused: tensors of two
devices in one operation, and waits or new sizes while a graph is captured. Kernels are counted, and whatever makes the
host wait for the GPU, by place. Not real: speed, memory, streams, random numbers, and the choice of attention kernels.
"""

# ruff: noqa: E402
# mypy: disable-error-code="assignment, no-untyped-call, override"

import contextlib
import ctypes
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from guard import build_guard

ctypes.CDLL(str(build_guard()))  # before torch looks for GPUs

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

# before other modules use it: a wrapped tensor cannot be an inference tensor
torch.inference_mode = lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext()  # type: ignore

ROOT = Path(__file__).resolve().parents[2]
ATEN = torch.ops.aten
VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided",
    "expand", "is_same_size", "lift_fresh", "new_empty", "new_empty_strided", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsafe_split", "unsqueeze", "view",
}  # fmt: skip
"""Operations that start no kernel."""
READS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "_unique2"}
"""Operations whose result the host needs at once."""
INDEXING = {"_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_"}
COPIES = {"_copy_from", "_to_copy", "copy_", "set_"}

OUT_OF_MEMORY: dict[str, Callable[[], Exception]] = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ..."),
    "driver": lambda: getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory\nCUDA kernel ..."),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "nccl": lambda: torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
        "Cuda failure 2 'out of memory'"
    ),
}
"""The errors that tell that a GPU's memory ran out, by who raises them."""


@dataclass
class State:
    """What happened, and what shall happen."""

    kernels: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    """What made the host wait, and where."""
    oom: tuple[str, str, int] | None = None
    """The error to raise (OUT_OF_MEMORY), a part of the name of an operation, and after how many of these."""
    current: int = 0
    """The index of the current device."""
    tape: "list[tuple[Any, Any, Any, Any]] | None" = None
    """The operations of the graph that is being captured."""
    pinned: set[int] = field(default_factory=set)
    """The addresses of pinned memory."""


STATE = State()


def wait(kind: str) -> None:
    """Count what makes the host wait for the GPU."""
    if STATE.tape is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({kind})")
    STATE.waits[f"{kind} in {caller()}"] += 1


def caller() -> str:
    """Return the innermost function of the project that is being called, without the tests."""
    frame: Any = sys._getframe(1)
    while frame:
        file = frame.f_code.co_filename
        if file.startswith(f"{ROOT}/") and not file.startswith((f"{ROOT}/.venv/", f"{ROOT}/tests/")):
            return f"{file.removeprefix(f'{ROOT}/')}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def count_kernel(name: str) -> None:
    """Count a kernel, or run out of memory if it is time for it."""
    if name in VIEWS:
        return
    STATE.kernels += 1
    if STATE.oom and STATE.oom[1] in name:
        error, operation, left = STATE.oom
        STATE.oom = (error, operation, left - 1) if left else None
        if not left:
            raise OUT_OF_MEMORY[error]()


class PretendedTensor(torch.Tensor):
    """A tensor that says it is on a GPU; `host` holds its values."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor, device: torch.device) -> "PretendedTensor":
        """Wrap a CPU tensor."""
        tensor: PretendedTensor = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=device,
        )  # fmt: skip
        tensor.host = host
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"PretendedTensor({self.host!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(function, args, kwargs or {})

    def tolist(self) -> Any:
        """Return the values as numbers; torch would read them without an operation."""
        wait("tolist")
        return self.host.detach().tolist()

    def numpy(self, **_: Any) -> Any:
        """Refuse, as CUDA does."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def __getitem__(self, key: Any) -> Tensor:
        """Index; a list is copied to the GPU, which waits."""
        if any(isinstance(part, list) for part in (key if isinstance(key, tuple) else (key,))):
            wait("index by a list")
        return super().__getitem__(key)

    def is_pinned(self, *_: Any) -> bool:
        """Return False: only the host's memory is pinned."""
        return False

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["host"], self.device

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], device: torch.device, *_: Any) -> "PretendedTensor":
        return PretendedTensor(parts["host"], device)


class PretendedMode(TorchDispatchMode):
    """Sends operations that create tensors on a GPU to `dispatch`, too."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # its own dispatch arrives at the tensors in it
        if kwargs.get("pin_memory") and not on_gpu(kwargs.get("device")):
            return pin(function(*args, **{**kwargs, "pin_memory": False}))
        if on_gpu(kwargs.get("device")) or any(is_pretended(leaf) for leaf in tree_leaves((args, kwargs))):
            return dispatch(function, args, kwargs)
        return function(*args, **kwargs)


def is_pretended(value: Any) -> bool:
    """Return whether a value is a tensor on a GPU."""
    return isinstance(value, PretendedTensor)


def on_gpu(device: Any) -> bool:
    """Return whether a device is a GPU."""
    return device is not None and torch.device(device).type == "cuda"


def host_of(value: Any) -> Any:
    """Return the CPU tensor inside a tensor on a GPU, and any other value itself."""
    return value.host if is_pretended(value) else value


def pin(tensor: Tensor) -> Tensor:
    """Note that the memory of a CPU tensor is pinned."""
    STATE.pinned.add(tensor.untyped_storage().data_ptr())
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    """Return whether the memory of a CPU tensor is pinned."""
    return tensor.untyped_storage().data_ptr() in STATE.pinned


def dispatch(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation of which some tensors, or the result, are on a GPU."""
    name = function._schema.name.split("::")[1]
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    on_gpus = [tensor for tensor in tensors if is_pretended(tensor)]
    check_devices(name, function, args, tensors)
    target = kwargs.get("device")
    if target is None:
        device = on_gpus[0].device if on_gpus else None
    else:
        device = torch.device("cuda", torch.device(target).index or STATE.current) if on_gpu(target) else None
    count_kernel(name)
    count_waits(name, args, kwargs, device)
    if STATE.tape is not None and function._schema.is_mutable:  # it happens when the graph is replayed
        result = args[0] if function._schema.returns else None
    else:
        result = run(function, args, kwargs, device)
    if STATE.tape is not None:
        STATE.tape.append((function, args, kwargs, result))
    return result


def run(function: Any, args: Any, kwargs: dict[str, Any], device: torch.device | None) -> Any:
    """Run an operation on the CPU tensors, and return its result on a device; None is the CPU."""
    options = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if on_gpu(options.get("device")):
        options["device"] = torch.device("cpu")
    outer = {id(leaf.host): leaf for leaf in tree_leaves((args, kwargs)) if is_pretended(leaf)}
    result = compute(function, args, options)
    if function is ATEN.copy_.default:
        return args[0]
    if function is ATEN._to_copy.default and result is host_of(args[0]):
        result = result.clone()

    def wrap(value: Any) -> Any:
        if id(value) in outer:
            return outer[id(value)]
        return PretendedTensor(value, device) if isinstance(value, Tensor) and device else value

    if function._schema.name.startswith("c10d::"):
        return tree_map(lambda value: outer.get(id(value), value), result)
    wrapped = tree_map(wrap, result)
    if device and outer:
        with contextlib.suppress(Exception):  # operations without an annotation of what they alias
            return return_and_correct_aliasing(function, args, kwargs, wrapped)
    return wrapped


def compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the result of an operation on the CPU tensors."""
    args, kwargs = tree_map(host_of, args), tree_map(host_of, kwargs)
    if function in (ATEN._softmax.default, ATEN._log_softmax.default) and args[2]:  # from half precision to float32
        args = (args[0].float(), args[1], False)
    return function(*args, **kwargs)


def check_devices(name: str, function: Any, args: Any, tensors: list[Tensor]) -> None:
    """Refuse tensors of two devices in one operation, except copies, indices on the CPU, and scalars."""
    if name in COPIES or not any(map(is_pretended, tensors)):
        return
    if name in INDEXING:
        indexed, indices = args[0], [index for index in args[1] if index is not None]
        if is_pretended(indexed) and not all(map(is_pretended, indices)):
            wait("index on the CPU")
        tensors = [indexed, *filter(is_pretended, indices)]
    devices = {tensor.device for tensor in tensors if tensor.dim() or is_pretended(tensor)}
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two, {found} ({function})"
        )


def count_waits(name: str, args: Any, kwargs: dict[str, Any], device: torch.device | None) -> None:
    """Count the wait if an operation needs one: a result for the host, or a copy from or to pageable memory."""
    if name in READS and any(map(is_pretended, tree_leaves(args))):
        wait(name)
    if name == "_to_copy":
        source, non_blocking = args[0], kwargs.get("non_blocking")
        between, pinned = is_pretended(source) != (device is not None), not is_pretended(source) and is_pinned(source)
        if between and not (non_blocking and pinned):
            wait("copy to the GPU" if device else "copy to the CPU")
    if name == "copy_" and is_pretended(args[0]) != is_pretended(args[1]):
        non_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if not (non_blocking and is_pinned(args[1] if is_pretended(args[0]) else args[0])):
            wait("copy between the GPU and the CPU")


class PretendedGraph:
    """A CUDA graph: the operations that were run while it was captured, which `replay` runs again."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.tape: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        """Run the operations again, into the tensors that they returned."""
        for function, args, kwargs, results in self.tape:
            again = compute(function, args, without_device(kwargs))
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=False):
                if is_pretended(old) and old.host.data_ptr() != new.data_ptr():
                    old.host.copy_(new)
        STATE.kernels += 1


def without_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments for the CPU."""
    return {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}


@contextlib.contextmanager
def capture(graph: PretendedGraph, **_: Any) -> Iterator[None]:
    """Capture the operations of this context, which draws no random numbers until it is replayed."""
    STATE.tape, random_state = graph.tape, torch.get_rng_state()
    try:
        yield
    finally:
        STATE.tape = None
        torch.set_rng_state(random_state)


class PretendedStream:
    """A stream; all of them are the same."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", STATE.current)
        self.stream_id = self.device_index = 0
        self.device_type = 1

    def synchronize(self) -> None:
        """Wait for the GPU."""
        wait("Stream.synchronize")

    def wait_stream(self, *_: Any) -> None:
        """Do nothing: operations run in their order."""

    wait_event = wait_stream

    def record_event(self, event: Any = None) -> Any:
        """Return an event."""
        return event or PretendedEvent()

    def query(self) -> bool:
        """Return True: everything is done."""
        return True

    def __enter__(self) -> "PretendedStream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class PretendedEvent:
    """An event. Waiting for one that was recorded before other kernels leaves the GPU work to do."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.kernels = 0

    def record(self, *_: Any) -> None:
        """Note how many kernels were started before it."""
        self.kernels = STATE.kernels

    def synchronize(self) -> None:
        """Wait for the event."""
        if self.kernels == STATE.kernels:
            wait("Event.synchronize")

    def wait(self, *_: Any) -> None:
        """Do nothing: operations run in their order."""

    def query(self) -> bool:
        """Return True: everything is done."""
        return True

    def elapsed_time(self, _: Any) -> float:
        """Return some milliseconds."""
        return 1.0


def pretend(gpus: int) -> None:
    """Make torch believe that this machine has some GPUs, for the rest of this process."""
    torch.set_num_threads(1)
    properties = SimpleNamespace(
        name="Pretended H100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132
    )

    def set_device(device: Any) -> None:
        if STATE.oom and STATE.oom[1] == "set_device":
            raise OUT_OF_MEMORY[STATE.oom[0]]()
        STATE.current = device if isinstance(device, int) else torch.device(device).index or 0

    cuda: Any = torch.cuda
    replaced: dict[str, Any] = {
        "is_available": lambda: gpus > 0,
        "device_count": lambda: gpus,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "set_device": set_device,
        "current_device": lambda: STATE.current,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: wait("synchronize"),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: None,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "manual_seed": lambda _: None,  # random numbers are those of the CPU
        "manual_seed_all": lambda _: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "device": lambda _: contextlib.nullcontext(),
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": PretendedStream,
        "default_stream": PretendedStream,
        "Stream": PretendedStream,
        "Event": PretendedEvent,
        "CUDAGraph": PretendedGraph,
        "graph": capture,
    }
    for name, value in replaced.items():
        setattr(cuda, name, value)
    everywhere: Any = torch
    everywhere.Stream, everywhere.Event = PretendedStream, PretendedEvent
    everywhere.Tensor.pin_memory = lambda self, *_: pin(self.clone())
    everywhere.Tensor.record_stream = lambda *_: None
    create = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        created = create(data, *args, **kwargs)
        return created if device is None else created.to(device)

    everywhere.tensor = tensor
    pretend_moving()
    if "WORLD_SIZE" in os.environ:
        pretend_distributed()
        pretend_sharding()
    PretendedMode().__enter__()


def pretend_distributed() -> None:
    """Let processes on pretended GPUs exchange tensors with gloo."""
    distributed: Any = torch.distributed
    start = distributed.init_process_group

    def init_process_group(backend: str, **kwargs: Any) -> None:
        assert (backend == "nccl") == ("device_id" in kwargs)
        kwargs.pop("device_id", None)
        start("gloo", **kwargs)

    distributed.init_process_group = init_process_group
    distributed.distributed_c10d.init_process_group = init_process_group
    distributed.Logger.set_runtime_stats_and_log = lambda _: None  # it has no timer for CUDA in a CPU build


def pretend_moving() -> None:
    """Move modules to a pretended GPU, and back, by swapping their parameters."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    data: Any = torch._C.TensorBase.data

    def set_data(self: Tensor, value: Tensor) -> None:
        if is_pretended(value) and not is_pretended(self):
            is_parameter = isinstance(self, torch.nn.Parameter)
            torch.utils.swap_tensors(self, torch.nn.Parameter(value, self.requires_grad) if is_parameter else value)
        else:
            data.__set__(self, value)

    every: Any = torch.Tensor
    every.data = property(data.__get__, set_data)


def pretend_sharding() -> None:
    """Keep FSDP from releasing memory that a pretended tensor does not have."""
    import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp  # noqa: PLC0415  (takes a second)

    module: Any = fsdp
    for name in ("alloc_storage", "free_storage", "unsafe_free_storage"):
        if hasattr(module, name):
            setattr(module, name, lambda _: None)
