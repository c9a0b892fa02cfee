"""The machine a script runs on: device, precision, compilation, processes, and requests to stop."""

import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from glyphgpt.errors import UsageError, UserError, warn

CPU_OPTIONS: dict[str, Any] = {
    "cpp.vec_isa_ok": True,  # spares ten seconds of trial programs, one for each set of vector instructions
    "cpp.use_decompose_tanh": True,  # by way of exp, in half the time
    "fallback_random": True,  # compiled random numbers are slow on CPUs
}
GLOO_SECONDS = 0.3
"""Gloo's threads outlive its process group and may still have to drop a tensor, for which they need Python: one that is
ending aborts them, and the process with them ("terminate called without an active exception")."""


@dataclass(frozen=True)
class Runtime:
    """Where the work happens, and which process of how many this one is."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which products are computed in `dtype`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum(self, *values: float) -> list[float]:
        """Add up numbers over all processes."""
        if self.world_size == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def init_runtime(device: str, dtype: str) -> Iterator[Runtime]:
    """Choose the device and precision, and join the other processes if torchrun started several.

    Raises:
        UsageError: the device is not there.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device)
    if chosen.type == "cuda":
        # torch wants an index here; under torchrun each process of this machine has a GPU of its own
        chosen = choose_device(f"cuda:{local_rank if world_size > 1 else chosen.index or 0}")
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    if chosen.type == "cpu":
        use_deterministic_algorithms()
    runtime = Runtime(chosen, choose_dtype(dtype, chosen), rank, world_size)
    if world_size == 1:
        yield runtime
        return
    gpu: dict[str, Any] = {"device_id": chosen} if chosen.type == "cuda" else {}
    try:
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=rendezvous_store(), rank=rank, world_size=world_size, **gpu)
        yield runtime
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise UserError("lost another process of this run, which ended or hangs; go on with --resume") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        failed = isinstance(sys.exc_info()[1], Exception)  # and is still to be told, before torchrun ends this one too
        if not gpu and not failed:
            time.sleep(GLOO_SECONDS)


def use_deterministic_algorithms() -> None:
    """Have compiled code sum in a fixed order: its backward pass of embeddings otherwise adds atomically, from threads.

    GPUs are left alone: there it takes slower kernels, and some operations have none.
    """
    torch.use_deterministic_algorithms(True)
    # nothing here reads memory that it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def torchrun_id() -> str:
    """Return a fingerprint of the torchrun that started this process, the same after restarts; empty if none did."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return hashlib.sha256(f"{run} {socket.gethostname()} {os.getppid()}".encode()).hexdigest()[:16] if run else ""


def rendezvous_store() -> Any:
    """Return where processes find each other: torchrun's store, which lasts over restarts.

    What processes of an earlier start left there is kept apart where all are on one machine. Between machines, which
    count their restarts differently, torchrun has to be told to make a new store each time:
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else ""
    return dist.PrefixStore(f"start {restarts}", store)  # type: ignore[attr-defined]


def choose_device(name: str) -> torch.device:
    """Return the device of that name, or for "auto" the fastest one here.

    Raises:
        UsageError: there is no such device.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    here = ["cpu"] + ["cuda"] * cuda + [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["mps"] * mps
    if name not in here:
        raise UsageError(f"device = '{name}' is not on this machine; here: auto, {', '.join(here)}")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of that name, or for "auto" the fastest that trains well on the device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":  # emulated, bfloat16 would be the slower one
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions cannot tell
        native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        return torch.bfloat16 if native else torch.float32
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def compile_or_eager(model: nn.Module, choice: bool | str, runtime: Runtime, example: tuple[Tensor, ...]) -> nn.Module:
    """Return the model compiled if that is asked for and works, else with one warning as it is.

    What is returned shares weights with `model`, which stays as it was, for evaluation: its shapes would be compiled
    anew. It is tried, forward and backward, on `example`; gradients are cleared again.
    """
    if choice is False or (choice == "auto" and runtime.device.type != "cuda"):
        return model
    compiled: Any = model
    try:
        compiled = torch.compile(model, options=CPU_OPTIONS if runtime.device.type == "cpu" else None)
        with runtime.autocast():
            compiled(*example).backward()
    except torch.OutOfMemoryError:  # no fault of the compiler's
        raise
    except Exception as error:  # whatever breaks inside the compiler, eager still trains
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if hasattr(model, "unshard"):  # other processes wait for this one in the middle of it
            raise UserError(f"torch.compile failed ({reason[0][:200]}); add --compile=False") from error
        warn(f"torch.compile failed ({reason[0][:200]}); going on without it, slower")
        compiled = model
    model.zero_grad(set_to_none=True)
    return compiled


class TorchLM:
    """A torch model as decoding sees it (`generate.LanguageModel`): ids in, logits out, both on the CPU."""

    def __init__(self, model: Any, runtime: Runtime) -> None:
        """Take a model in evaluation mode, on the runtime's device."""
        self.model, self.runtime = model, runtime

    def new_cache(self, batch: int) -> Any:  # noqa: ARG002
        """Return an empty cache."""
        return self.model.new_cache()

    @torch.inference_mode()
    def next_logits(self, tokens: NDArray[np.int64], cache: Any) -> NDArray[np.float32]:
        """Return the logits (B, V) of the token after these (B, T), and after those that the cache has seen."""
        with self.runtime.autocast():
            logits: Tensor = self.model.next_logits(torch.from_numpy(tokens).to(self.runtime.device), cache)
        return logits.float().cpu().numpy()


class StopRequest:
    """Remembers Ctrl-C, SIGTERM or SIGHUP, so that a loop can end at a good place; Ctrl-C then ends it at once."""

    def __init__(self) -> None:
        """Begin with no request."""
        self.signal: signal.Signals | None = None
        self.broken_pipe = False

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take the signals while in this context."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._take) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_on_broken_pipe(self) -> None:
        """Take the loss of who read the output, `head` say, as a request to stop, as a closed terminal is one."""
        self.broken_pipe = True
        self.signal = self.signal or getattr(signal, "SIGPIPE", signal.SIGTERM)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which schedulers and torchrun may both send
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping and saving after this step; Ctrl-C stops at once\n")  # print is not reentrant


@contextmanager
def oom_hint(settings_to_lower: str) -> Iterator[None]:
    """Turn running out of memory into one line that says which settings to lower.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            raise UserError(f"out of memory; lower {settings_to_lower}") from error
        raise
