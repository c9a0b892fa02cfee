"""The runtime of a script: device, precision, compilation, processes, and requests to stop."""

import copy
import ctypes
import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glyphgpt.errors import UsageError, UserError, warn

CPU_OPTIONS: dict[str, Any] = {
    "cpp.vec_isa_ok": True,  # skips ten seconds of test compilations, one for each vector instruction set
    "cpp.use_decompose_tanh": True,  # computes tanh from exp, in half the time
    "fallback_random": True,  # compiled random numbers are slow on CPUs
    "deterministic": True,  # choices that do not depend on timings
}
COMPILED_STEPS = 500
"""Steps of a run from which on its compilation pays on a GPU."""
GLOO_SECONDS = 0.3
"""Pause before the process exits. Gloo's threads outlive the process group and may still have to release a tensor. If
Python is shutting down by then, they abort the process ("terminate called without an active exception")."""


@dataclass(frozen=True)
class Runtime:
    """Device and precision of the computation, and the rank of this process among all processes of the run."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def configured(self, dtype: str, threads: int) -> "Runtime":
        """Return this runtime with another precision, after setting the number of threads of the process."""
        if threads:
            torch.set_num_threads(threads)
        return replace(self, dtype=choose_dtype(dtype, self.device))

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which matrix products are computed in `dtype`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum(self, *values: float) -> list[float]:
        """Return the sum of each value over all processes."""
        if self.world_size == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.sum_(totals)
        return totals.tolist()

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def mean(self, value: float) -> float:
        """Return the mean of a value over all processes."""
        return self.sum(value)[0] / self.world_size

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def init_runtime(device: str, dtype: str) -> Iterator[Runtime]:
    """Select the device and precision, and join the other processes if torchrun started several.

    Raises:
        UsageError: The device does not exist.
        UserError: Another process of the run was lost.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    chosen, shares_gpu = choose_device(device), False
    if chosen.type == "cuda":
        # set_device needs an index; under torchrun each process of a machine has its own GPU, if there are enough
        gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        shares_gpu = processes > gpus
        own = local_rank % gpus if shares_gpu else local_rank
        chosen = choose_device(f"cuda:{own if world_size > 1 else chosen.index or 0}")
        if shares_gpu and local_rank == 0:
            warn(f"{processes} processes share {gpus} GPU(s) and exchange gradients through the CPU, which is slow")
        select_gpu(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 for the remaining float32 products
    if chosen.type == "cpu":
        use_deterministic_algorithms()
        keep_freed_memory()
    runtime = Runtime(chosen, choose_dtype(dtype, chosen), rank, world_size)
    if world_size == 1:
        yield runtime
        return
    uses_nccl = chosen.type == "cuda" and not shares_gpu  # it refuses two processes on a GPU
    gpu: dict[str, Any] = {"device_id": chosen} if uses_nccl else {}
    try:
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=rendezvous_store(), rank=rank, world_size=world_size, **gpu)
        yield runtime
    except RuntimeError as error:
        if (isinstance(error, dist.DistError) or "gloo" in str(error)) and not is_out_of_memory(error):
            raise UserError("lost another process of this run, which ended or hangs; continue with --resume") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        failed = isinstance(sys.exc_info()[1], Exception)  # no pause, or torchrun may end this process before it prints
        if not gpu and not failed:
            time.sleep(GLOO_SECONDS)


def select_gpu(device: torch.device) -> None:
    """Make a GPU the current one.

    Raises:
        UserError: The GPU has no free memory.
    """
    try:
        torch.cuda.set_device(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{device} has no free memory: other processes use it (nvidia-smi lists them); end them, or choose another "
            "--device"
        ) from error


def use_deterministic_algorithms() -> None:
    """Make compiled code on a CPU sum in a fixed order; its embedding backward otherwise adds atomically from threads.

    Not for GPUs, where deterministic kernels are slower or missing.
    """
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms would import the compiler, for a second
    # filling costs time, and nothing here reads uninitialized memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Let malloc reuse the memory of freed tensors; it otherwise returns large blocks to the system at every step.

    Only glibc has these options (`man mallopt`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        m_trim_threshold, m_mmap_threshold, largest = -1, -3, 2**31 - 1
        mallopt(m_trim_threshold, largest)
        mallopt(m_mmap_threshold, largest)


def torchrun_id() -> str:
    """Return a fingerprint of the torchrun job of this process, the same after restarts; "" without torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return hashlib.sha256(f"{run} {socket.gethostname()} {os.getppid()}".encode()).hexdigest()[:16] if run else ""


def rendezvous_store() -> Any:
    """Return the store through which processes find each other.

    torchrun keeps one store over all restarts. On one machine, a prefix separates the entries of each restart. Several
    machines count their restarts differently, so there torchrun must create a new store each time, with
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else ""
    return dist.PrefixStore(f"start {restarts}", store)  # type: ignore[attr-defined]


def choose_device(name: str) -> torch.device:
    """Return the device of that name, or for "auto" the fastest one available.

    Raises:
        UsageError: There is no such device.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    available = ["cpu"] + ["cuda"] * cuda + [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["mps"] * mps
    if name not in available:
        raise UsageError(f"device = '{name}' is not on this machine; available: auto, {', '.join(available)}")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of that name, or for "auto" the fastest one that trains well on the device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":  # emulated bfloat16 is slower than float32
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older versions
        native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        return torch.bfloat16 if native else torch.float32
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def should_compile(choice: bool | str, runtime: Runtime, steps: int) -> bool:
    """Return whether to compile a run of so many steps; "auto" does so on a GPU if the steps gain what it costs."""
    if choice == "auto":
        return runtime.device.type == "cuda" and steps >= COMPILED_STEPS
    return bool(choice)


def compile_or_eager(model: nn.Module, runtime: Runtime, example: tuple[Tensor, ...]) -> nn.Module:
    """Return the compiled model, which shares its weights with `model`, or this with a warning if that fails.

    `model` stays uncompiled for evaluation, whose shapes would have to be compiled again. On a GPU the parts of the
    model are compiled, which takes a third of the time; on a CPU the whole, whose steps are faster by a fifth.

    A forward and backward pass on `example` tests it; the gradients are cleared afterwards.

    Raises:
        UserError: The compilation of a sharded model failed.
    """
    compiled: Any = model
    is_sharded = hasattr(model, "unshard")  # its parts do not work without the whole
    try:
        if runtime.device.type == "cpu":
            compiled = torch.compile(model, options=CPU_OPTIONS)
        else:
            compiled = torch.compile(model) if is_sharded else with_compiled_parts(model)
        with runtime.autocast():
            compiled(*example).backward()
    except Exception as error:  # training works without the compiler, whatever fails in it
        if isinstance(error, (MemoryError, RuntimeError)) and is_out_of_memory(error):
            raise  # compilation did not cause it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if is_sharded:  # other processes wait inside the same pass
            raise UserError(f"torch.compile failed ({reason[0][:200]}); add --compile=False") from error
        warn(f"torch.compile failed ({reason[0][:200]}); training without it, which is slower")
        compiled = model
    model.zero_grad(set_to_none=True)
    return compiled


def with_compiled_parts(model: Any) -> nn.Module:
    """Return a model for training that shares all weights and modules with `model`, but compiles its blocks and loss.

    The blocks are compiled once for all of them, and each exchanges its gradients with other processes as soon as it
    has computed them.
    """
    compiled = copy.copy(model)
    blocks: Any = [torch.compile(block) for block in model.blocks]
    compiled._modules = {**model._modules, "blocks": nn.ModuleList(blocks)}
    compiled.loss = torch.compile(model.loss)
    return compiled


class StopRequest:
    """A flag that Ctrl-C, SIGTERM and SIGHUP set, so that a loop can finish its step; another Ctrl-C exits at once."""

    def __init__(self) -> None:
        """Create a flag that is not set."""
        self.signal: signal.Signals | None = None
        self.broken_pipe = False

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle the signals in this context."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def stop_on_broken_pipe(self) -> None:
        """Request a stop because nobody reads the output any more, as when the terminal is closed."""
        self.broken_pipe = True
        self.signal = self.signal or getattr(signal, "SIGPIPE", signal.SIGTERM)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers and torchrun may both send it
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping and saving after this step; Ctrl-C exits at once\n")  # print is not reentrant


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Return whether memory ran out; torch, CUDA and its libraries have errors of their own for that."""
    signs = ("out of memory", "allocate memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in signs)


@contextmanager
def oom_hint(settings_to_lower: str) -> Iterator[None]:
    """Turn an out-of-memory error into one line that says which settings to lower.

    Raises:
        UserError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise UserError(f"out of memory; lower {settings_to_lower}") from error
        raise
