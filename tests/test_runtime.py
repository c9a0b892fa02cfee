"""Devices, precision, compilation, stop requests, and out-of-memory errors."""

import os
import re
import signal
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
    should_compile,
    with_compiled_parts,
)

CPU = Runtime(torch.device("cpu"), torch.float32)
needs_gpu = pytest.mark.gpu


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that simulates a machine with these devices."""

    def simulate(*, cuda: int = 0, mps: bool = False, bf16: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        )
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16}, raising=False)

    return simulate


@pytest.mark.parametrize(
    ("devices", "expected"),
    [({}, "cpu"), ({"cuda": 1}, "cuda"), ({"cuda": 2, "mps": True}, "cuda"), ({"mps": True}, "mps")],
    ids=str,
)
def test_auto_selects_the_fastest_device(machine: Callable[..., None], devices: dict[str, Any], expected: str) -> None:
    machine(**devices)
    assert choose_device("auto") == torch.device(expected)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1", "mps"])
def test_device_is_selected_by_name(machine: Callable[..., None], name: str) -> None:
    machine(cuda=2, mps=True)
    assert choose_device(name) == torch.device(name)


@pytest.mark.parametrize(("name", "expected"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_gpu_is_selected_by_index(name: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    selected: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    with init_runtime(name, "float32") as runtime:
        assert runtime.device == torch.device(expected)
    assert selected == [torch.device(expected)]


@pytest.mark.parametrize(
    ("devices", "name", "available"),
    [
        ({}, "cuda", "auto, cpu"),
        ({}, "gpu", "auto, cpu"),
        ({}, "", "auto, cpu"),
        ({"cuda": 2}, "cuda:2", "auto, cpu, cuda, cuda:0, cuda:1"),
        ({"mps": True}, "cuda", "auto, cpu, mps"),
    ],
    ids=str,
)
def test_missing_device_is_an_error_that_lists_the_others(
    machine: Callable[..., None], devices: dict[str, Any], name: str, available: str
) -> None:
    machine(**devices)
    with pytest.raises(UsageError) as caught:
        choose_device(name)
    assert str(caught.value).startswith(f"device = '{name}' is not on this machine; ")
    assert str(caught.value).endswith(f": {available}")


@pytest.mark.parametrize(
    ("device", "bf16", "expected"),
    [
        ("cpu", True, torch.bfloat16),
        ("cpu", False, torch.float32),
        ("mps", True, torch.float32),
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
    ],
)
def test_auto_selects_the_fastest_safe_dtype(
    machine: Callable[..., None], device: str, bf16: bool, expected: torch.dtype
) -> None:
    machine(cuda=1, bf16=bf16)
    assert choose_dtype("auto", torch.device(device)) == expected


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_is_selected_by_name(name: str) -> None:
    assert choose_dtype(name, torch.device("cpu")) == getattr(torch, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_products_in_the_dtype(dtype: torch.dtype) -> None:
    with Runtime(torch.device("cpu"), dtype).autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def test_runtime_without_torchrun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with init_runtime("cpu", "float32") as runtime:
        assert runtime == CPU
        assert runtime.is_main
        assert runtime.sum(1.5, 2.0) == [1.5, 2.0]
        runtime.barrier()
    assert not torch.distributed.is_initialized()


def test_a_process_without_a_gpu_and_without_torchrun_is_an_error(
    monkeypatch: pytest.MonkeyPatch, machine: Callable[..., None]
) -> None:
    machine(cuda=1)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="cuda:1"), init_runtime("auto", "auto"):
        pass


def example() -> tuple[Tensor, Tensor]:
    tokens = torch.arange(18).view(2, 9) % 11
    return tokens[:, :-1], tokens[:, 1:]


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("no C++ compiler found\nand a second line\nand a third")


class Compiled(nn.Module):
    """A substitute for a compiled model."""

    def __init__(self, model: nn.Module, **_: object) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        return self.model(*inputs)


class FailsWhenCalled(Compiled):
    def forward(self, *_: Any) -> None:
        fail()


class FailsBackward(Compiled):
    def forward(self, *inputs: Any) -> Any:
        output = super().forward(*inputs)
        output.register_hook(fail)
        return output


@pytest.mark.parametrize("compiler", [fail, FailsWhenCalled, FailsBackward])
def test_failed_compilation_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiler: Callable[..., Any]
) -> None:
    monkeypatch.setattr(torch, "compile", compiler)
    model = tiny_model()
    assert compile_or_eager(model, CPU, example()) is model
    assert re.fullmatch(r"warning: torch\.compile failed \(no C\+\+ compiler found\); .*\n", capsys.readouterr().err)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_error_without_a_message_is_named_by_its_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_silently(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch, "compile", fail_silently)
    compile_or_eager(tiny_model(), CPU, example())
    assert "failed (AssertionError)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choice", "device", "steps", "expected"),
    [
        (False, "cuda", 10_000, False),
        (True, "cpu", 1, True),
        ("auto", "cpu", 10_000, False),
        ("auto", "mps", 10_000, False),
        ("auto", "cuda", 10_000, True),
        ("auto", "cuda", 72, False),
    ],
)
def test_auto_compiles_long_runs_on_a_gpu(choice: bool | str, device: str, steps: int, expected: bool) -> None:
    assert should_compile(choice, Runtime(torch.device(device), torch.float32), steps) == expected


def test_the_compiled_model_shares_the_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", Compiled)
    model = tiny_model()
    assert isinstance(result := compile_or_eager(model, CPU, example()), Compiled)
    assert [id(p) for p in result.parameters()] == [id(p) for p in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert capsys.readouterr().err == ""


def test_a_model_with_compiled_parts_shares_weights_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def record(part: Any) -> Any:
        compiled.append(part)
        return Compiled(part) if isinstance(part, nn.Module) else part

    monkeypatch.setattr(torch, "compile", record)
    model = tiny_model()
    result: Any = with_compiled_parts(model)
    assert compiled == [*model.blocks, model.loss]
    assert not any(isinstance(module, Compiled) for module in model.modules())
    assert [id(p) for p in result.parameters()] == [id(p) for p in model.parameters()]
    assert torch.equal(result(*example()), model(*example()))


@pytest.fixture
def handlers() -> Iterator[Callable[[], bool]]:
    """Install signal handlers; return a function that returns whether they are still installed."""

    def handler(*_: object) -> None:
        pytest.fail("the signal was not handled")

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda: all(signal.getsignal(number) is handler for number in previous)
    for number, old in previous.items():
        signal.signal(number, old)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_request_records_the_signal(handlers: Callable[[], bool], number: signal.Signals) -> None:
    stop = StopRequest()
    with stop.listening() as listening:
        assert listening is stop
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.signal is number
    assert handlers()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_ctrl_c_raises_keyboard_interrupt(handlers: Callable[[], bool], first: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest().listening():
        signal.raise_signal(first)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
    assert handlers()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_sighup_is_a_stop_request_except_under_nohup() -> None:
    stop, before = StopRequest(), signal.getsignal(signal.SIGHUP)
    with stop.listening():
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal is signal.SIGHUP
    assert signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with (ignoring := StopRequest()).listening():
            signal.raise_signal(signal.SIGHUP)
        assert ignoring.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stop_request_does_not_need_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_to_write(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", fail_to_write)
    with (stop := StopRequest()).listening():
        signal.raise_signal(signal.SIGTERM)
    assert stop.signal is signal.SIGTERM


def allocate_too_much() -> None:
    torch.empty(1 << 55, dtype=torch.uint8)


def raise_error(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "allocate",
    [
        allocate_too_much,
        lambda: raise_error(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")),
        lambda: raise_error(MemoryError()),
        lambda: raise_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    ],
    ids=["real", "CPU", "Python", "CUDA"],
)
def test_out_of_memory_errors_name_settings_to_lower(allocate: Callable[[], None]) -> None:
    with (
        pytest.raises(UserError, match=r"^out of memory; lower batch_size or n_embd$"),
        oom_hint("batch_size or n_embd"),
    ):
        allocate()


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("allocate memory"), UsageError("wrong")])
def test_other_errors_are_not_changed(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, oom_hint("batch_size"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_bfloat16_is_close_to_float32(name: str) -> None:
    device = torch.device(name)
    model, tokens = tiny_model().to(device), example()[0].to(device)
    expected = model(tokens)
    with Runtime(device, torch.bfloat16).autocast():
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert 0 < (logits.float() - expected).norm() / expected.norm() < 0.02


@needs_gpu
@pytest.mark.skipif(os.name != "posix", reason="Triton exists for Linux only")
def test_compilation_on_a_gpu_does_not_change_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model().cuda()
    inputs, targets = (part.cuda() for part in example())
    compiled = compile_or_eager(model, Runtime(torch.device("cuda"), torch.float32), (inputs, targets))
    assert compiled is not model
    assert capsys.readouterr().err == ""
    assert compiled(inputs, targets).item() == pytest.approx(model(inputs, targets).item(), abs=1e-3)
