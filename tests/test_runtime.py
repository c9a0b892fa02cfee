"""Devices, precision, compilation, requests to stop, and running out of memory."""

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_model
from glyphgpt.errors import UsageError, UserError
from glyphgpt.runtime import (
    Runtime,
    StopRequest,
    choose_device,
    choose_dtype,
    compile_or_eager,
    init_runtime,
    oom_hint,
)

CPU = Runtime(torch.device("cpu"), torch.float32)
needs_gpu = pytest.mark.gpu


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend to be a machine with these devices."""

    def pretend(*, cuda: int = 0, mps: bool = False, bf16: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        )
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16}, raising=False)

    return pretend


PAGE_FAULTS = """
import resource
import torch
from glyphgpt.runtime import init_runtime

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(2**20) for _ in range(50)]  # 4 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with init_runtime("cpu", "float32"):
    print([step() for _ in range(6)][-1])
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="only glibc gives memory back so soon")
def test_memory_is_kept_from_one_step_to_the_next() -> None:
    faults = subprocess.run([sys.executable, "-c", PAGE_FAULTS], check=True, capture_output=True, text=True).stdout
    assert int(faults) < 5000  # else all of its 51,200 pages


@pytest.mark.parametrize(
    ("here", "chosen"),
    [({}, "cpu"), ({"cuda": 1}, "cuda"), ({"cuda": 2, "mps": True}, "cuda"), ({"mps": True}, "mps")],
    ids=str,
)
def test_auto_is_the_fastest_device_here(machine: Callable[..., None], here: dict[str, Any], chosen: str) -> None:
    machine(**here)
    assert choose_device("auto") == torch.device(chosen)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1", "mps"])
def test_a_device_is_chosen_by_name(machine: Callable[..., None], name: str) -> None:
    machine(cuda=2, mps=True)
    assert choose_device(name) == torch.device(name)


@pytest.mark.parametrize(
    ("here", "name", "listed"),
    [
        ({}, "cuda", "auto, cpu"),
        ({}, "gpu", "auto, cpu"),
        ({}, "", "auto, cpu"),
        ({"cuda": 2}, "cuda:2", "auto, cpu, cuda, cuda:0, cuda:1"),
        ({"mps": True}, "cuda", "auto, cpu, mps"),
    ],
    ids=str,
)
def test_a_device_that_is_not_here_is_refused(
    machine: Callable[..., None], here: dict[str, Any], name: str, listed: str
) -> None:
    machine(**here)
    with pytest.raises(UsageError) as caught:
        choose_device(name)
    assert str(caught.value) == f"device = '{name}' is not on this machine; available: {listed}"


@pytest.mark.parametrize(
    ("device", "bf16", "chosen"),
    [
        ("cpu", True, torch.bfloat16),
        ("cpu", False, torch.float32),
        ("mps", True, torch.float32),
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
    ],
)
def test_auto_is_the_fastest_safe_precision(
    machine: Callable[..., None], device: str, bf16: bool, chosen: torch.dtype
) -> None:
    machine(cuda=1, bf16=bf16)
    assert choose_dtype("auto", torch.device(device)) == chosen


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_precision_is_chosen_by_name(name: str) -> None:
    assert choose_dtype(name, torch.device("cpu")) == getattr(torch, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_have_the_precision(dtype: torch.dtype) -> None:
    with Runtime(torch.device("cpu"), dtype).autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def test_start_on_a_cpu_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with init_runtime("cpu", "float32") as runtime:
        assert runtime == CPU
        assert runtime.is_main
        assert runtime.sum(1.5, 2.0) == [1.5, 2.0]
        runtime.barrier()
    assert not torch.distributed.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, machine: Callable[..., None]) -> None:
    machine(cuda=1)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="cuda:1"), init_runtime("auto", "auto"):
        pass


def example() -> tuple[Tensor, Tensor]:
    tokens = torch.arange(18).view(2, 9) % 11
    return tokens[:, :-1], tokens[:, 1:]


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("no C++ compiler found\nand a second line\nand a third")


class Wrapped(nn.Module):
    """Stands for a compiled model."""

    def __init__(self, model: nn.Module, **_: object) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        return self.model(*inputs)


class BrokenWhenCalled(Wrapped):
    def forward(self, *_: Any) -> None:
        broken()


class BrokenBackward(Wrapped):
    def forward(self, *inputs: Any) -> Any:
        output = super().forward(*inputs)
        output.register_hook(broken)
        return output


@pytest.mark.parametrize("compiler", [broken, BrokenWhenCalled, BrokenBackward])
def test_a_compiler_that_fails_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiler: Callable[..., Any]
) -> None:
    monkeypatch.setattr(torch, "compile", compiler)
    model = tiny_model()
    assert compile_or_eager(model, True, CPU, example()) is model
    assert capsys.readouterr().err == (
        "warning: torch.compile failed (no C++ compiler found); training without it, which is slower\n"
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_failure_without_words_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: nn.Module, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch, "compile", fail)
    compile_or_eager(tiny_model(), True, CPU, example())
    assert "failed (AssertionError)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choice", "device", "compiled"),
    [
        (False, "cpu", False),
        (False, "cuda", False),
        ("auto", "cpu", False),
        ("auto", "mps", False),
        (True, "cpu", True),
    ],
)
def test_compilation_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    choice: bool | str,
    device: str,
    compiled: bool,
) -> None:
    monkeypatch.setattr(torch, "compile", Wrapped)
    model = tiny_model()
    seen = compile_or_eager(model, choice, Runtime(torch.device(device), torch.float32), example())
    assert isinstance(seen, Wrapped) == compiled
    assert [id(p) for p in seen.parameters()] == [id(p) for p in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert capsys.readouterr().err == ""


@pytest.fixture
def handlers() -> Iterator[Callable[[], bool]]:
    """Install handlers, and tell whether they still stand."""

    def handler(*_: object) -> None:
        pytest.fail("the signal passed by")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda: all(signal.getsignal(number) is handler for number in before)
    for number, old in before.items():
        signal.signal(number, old)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_is_remembered(handlers: Callable[[], bool], number: signal.Signals) -> None:
    stop = StopRequest()
    with stop.listening() as listening:
        assert listening is stop
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.signal is number
    assert handlers()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_at_once(handlers: Callable[[], bool], first: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest().listening():
        signal.raise_signal(first)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
    assert handlers()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system's terminals close without a signal")
def test_a_closed_terminal_is_a_request_to_stop_but_not_under_nohup() -> None:
    stop, before = StopRequest(), signal.getsignal(signal.SIGHUP)
    with stop.listening():
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal is signal.SIGHUP
    assert signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with (unmoved := StopRequest()).listening():
            signal.raise_signal(signal.SIGHUP)
        assert unmoved.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_request_to_stop_needs_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", gone)
    with (stop := StopRequest()).listening():
        signal.raise_signal(signal.SIGTERM)
    assert stop.signal is signal.SIGTERM


def allocate_too_much() -> None:
    torch.empty(1 << 55, dtype=torch.uint8)


def raise_it(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "use",
    [
        allocate_too_much,
        lambda: raise_it(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")),
        lambda: raise_it(MemoryError()),
        lambda: raise_it(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    ],
    ids=["real", "CPU", "Python", "CUDA"],
)
def test_running_out_of_memory_says_what_to_lower(use: Callable[[], None]) -> None:
    with (
        pytest.raises(UserError, match=r"^out of memory; lower batch_size or n_embd$"),
        oom_hint("batch_size or n_embd"),
    ):
        use()


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("allocate memory"), UsageError("wrong")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, oom_hint("batch_size"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_bf16_is_close_to_float32(name: str) -> None:
    device = torch.device(name)
    model, tokens = tiny_model().to(device), example()[0].to(device)
    exact = model(tokens)
    with Runtime(device, torch.bfloat16).autocast():
        rough = model(tokens)
    assert rough.dtype == torch.bfloat16
    assert 0 < (rough.float() - exact).norm() / exact.norm() < 0.02


@needs_gpu
@pytest.mark.skipif(os.name != "posix", reason="Triton is for Linux")
def test_compilation_on_a_gpu_keeps_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model().cuda()
    inputs, targets = (part.cuda() for part in example())
    compiled = compile_or_eager(model, "auto", Runtime(torch.device("cuda"), torch.float32), (inputs, targets))
    assert compiled is not model
    assert capsys.readouterr().err == ""
    assert compiled(inputs, targets).item() == pytest.approx(model(inputs, targets).item(), abs=1e-3)


@pytest.mark.parametrize(("name", "expected"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_gpu_is_chosen_by_its_number(name: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    with init_runtime(name, "float32") as runtime:
        assert runtime.device == torch.device(expected)
    assert chosen == [torch.device(expected)]
