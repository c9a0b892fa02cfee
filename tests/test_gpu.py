"""What is special to CUDA GPUs; and, skipped without one, training, sampling and beam search on it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sample
import train
from conftest import MODERN, ROOT, as_flags, decoder_of, random_model, read_metrics, saved_step, tiny_settings, torchrun
from glyphgpt.gpu import CudaGraph, graph_pays, peak_flops
from glyphgpt.inference.beam_search import beam_search
from glyphgpt.inference.generate import SamplingParams
from glyphgpt.inference.torch_lm import TorchLM, draw
from glyphgpt.runtime import Runtime, init_runtime
from glyphgpt.settings import SampleSettings, TrainSettings


def replace_capture(monkeypatch: pytest.MonkeyPatch, capture: Any) -> None:
    """Let CudaGraph use `capture` in place of torch.cuda.graph, without a GPU."""
    monkeypatch.setattr(CudaGraph, "can_capture", True)
    for name, value in (("CUDAGraph", object), ("current_stream", nullcontext), ("stream", nullcontext)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "graph", capture)


def test_a_function_that_cannot_be_captured_runs_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    replace_capture(monkeypatch, refuse)
    graph = CudaGraph(enabled=True)
    failures: list[int] = []
    numbers = [
        graph.call(torch.square, torch.tensor(number), on_failure=lambda: failures.append(graph.calls)).item()
        for number in range(6)
    ]
    assert numbers == [0, 1, 4, 9, 16, 25]
    assert failures == [4]
    assert not CudaGraph.can_capture
    assert capsys.readouterr().err == (
        "warning: no CUDA graph (CUDA error: operation not permitted when stream is capturing); continuing without it, "
        "which is slower\n"
    )


@pytest.mark.parametrize("cause", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()], ids=repr)
def test_a_capture_that_runs_out_of_memory_or_is_interrupted_ends_the_program(
    cause: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def broken_capture(*_: Any, **__: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def fail(_: torch.Tensor) -> torch.Tensor:
        if graph.calls > 3:
            raise cause
        return torch.zeros(1)

    replace_capture(monkeypatch, broken_capture)
    graph = CudaGraph(enabled=True)
    with pytest.raises(type(cause)):
        for _ in range(4):
            graph.call(fail, torch.zeros(1))


@pytest.mark.parametrize(
    ("name", "dtype", "processes", "tera_flops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 1, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 1, 756),
        ("NVIDIA A100-SXM4-40GB", torch.bfloat16, 8, 8 * 312),
        ("NVIDIA A10", torch.bfloat16, 1, 125),
        ("NVIDIA L40S", torch.float16, 1, 362),
        ("Tesla T4", torch.float16, 1, 65),
        ("NVIDIA H100 80GB HBM3", torch.float32, 1, 0),
        ("NVIDIA H1000", torch.bfloat16, 1, 0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, 1, 0),
    ],
)
def test_the_peak_of_a_gpu_follows_from_its_name(
    name: str, dtype: torch.dtype, processes: int, tera_flops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: processes)
    assert peak_flops(Runtime(torch.device("cuda"), dtype, 0, processes)) == tera_flops * 1e12


def test_processes_that_share_a_gpu_have_its_peak_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert peak_flops(Runtime(torch.device("cuda"), torch.bfloat16, 0, 2)) == 312e12


@pytest.mark.parametrize(
    ("device", "processes", "flops", "expected"),
    [("cuda", 1, 3.9e12, True), ("cuda", 1, 4e12, False), ("cuda", 2, 1e9, False), ("cpu", 1, 1e9, False)],
)
def test_short_steps_of_a_single_gpu_become_graphs(
    device: str, processes: int, flops: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: processes)
    assert graph_pays(Runtime(torch.device(device), torch.bfloat16, 0, processes), flops) == expected


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "compiled"), [("float32", False), ("bfloat16", False), ("bfloat16", True), ("float16", False)]
)
def test_steps_in_graphs_have_the_losses_of_others(
    dtype: str, compiled: bool, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"device": "cuda", "dtype": dtype, "compile": compiled, "optimizer": "muon", "dropout": 0.1, **MODERN}
    monkeypatch.setattr(CudaGraph, "can_capture", True)
    for name in ("graph", "none"):
        train.main(tiny_settings(data_dir, tmp_path / name, max_steps=30, **settings))
        assert CudaGraph.can_capture == (name == "graph")  # otherwise a capture has failed
        CudaGraph.can_capture = False
    graph, none = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("graph", "none"))
    assert graph == pytest.approx(none, abs=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(0.8, top_k=50, top_p=0.9, min_p=0.01)], ids=["all", "filtered"]
)
def test_a_gpu_draws_the_tokens_of_numpy(params: SamplingParams) -> None:
    generator = np.random.default_rng(0)
    logits, numbers = generator.normal(0, 3, (200, 50_257)).astype(np.float32), 1 - generator.random(200)
    drawn = draw(torch.from_numpy(logits).cuda(), torch.from_numpy(numbers).cuda(), params)
    assert drawn.tolist() == params.sample(logits, numbers).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_gpu_is_selected_by_each_of_its_names(device: str) -> None:
    with init_runtime(device, "auto") as runtime:
        assert runtime.device == torch.device("cuda:0")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_train_resume_and_sample(dtype: str, data_dir: Path, tmp_path: Path) -> None:
    network = {"position": "rotary", "norm": "rmsnorm", "qk_norm": True, "dropout": 0.1}
    settings = {"device": "cuda", "dtype": dtype, "compile": False, "learning_rate": 0.01, "max_steps": 40, **network}
    train.main(tiny_settings(data_dir, tmp_path, **settings))
    train.main(tiny_settings(data_dir, tmp_path, **{**settings, "max_steps": 60, "resume": True}))
    initial, *_, last = (row["loss"] for row in read_metrics(tmp_path))  # a training loss, and a validation loss
    assert last < initial - 0.5
    assert saved_step(tmp_path) == 60
    sample.main(SampleSettings(device="cuda", num_samples=3, max_new_tokens=40), str(tmp_path))
    assert CudaGraph.can_capture


@pytest.mark.gpu
def test_beam_search_finds_the_same_hypotheses_as_on_the_cpu() -> None:
    model = random_model(**MODERN)
    prompts = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    with init_runtime("cuda", "float32") as runtime:
        on_gpu = TorchLM(model.to(runtime.device), runtime)
        by_torch = beam_search(on_gpu, prompts, end=0, beam=3, max_new_tokens=5)
    by_numpy = beam_search(decoder_of(model.cpu()), prompts, end=0, beam=3, max_new_tokens=5)
    assert [tokens.tolist() for tokens in by_torch] == [tokens.tolist() for tokens in by_numpy]


@pytest.mark.gpu
def test_compiled_run_has_the_losses_of_an_eager_one(data_dir: Path, tmp_path: Path) -> None:
    for name in ("eager", "compiled"):
        settings = {"device": "cuda", "dtype": "float32", "compile": name == "compiled"}
        train.main(tiny_settings(data_dir, tmp_path / name, **settings))
    eager, compiled = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, abs=1e-2)


@pytest.mark.gpu
def test_activation_checkpointing_saves_memory_and_keeps_the_losses(data_dir: Path, tmp_path: Path) -> None:
    peaks = []
    for recompute in (False, True):
        torch.cuda.reset_peak_memory_stats()
        network = {"n_layer": 12, "batch_size": 64, "dropout": 0.1, "activation_checkpointing": recompute}
        settings = {"device": "cuda", "dtype": "float32", "compile": False, **network}
        train.main(tiny_settings(data_dir, tmp_path / str(recompute), **settings))
        peaks.append(torch.cuda.max_memory_allocated())
    stored, recomputed = ([row["loss"] for row in read_metrics(tmp_path / str(name))] for name in (False, True))
    assert recomputed == pytest.approx(stored, abs=1e-5)
    assert peaks[1] < peaks[0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_gpus_have_the_losses_of_one(parallel: str, data_dir: Path, tmp_path: Path) -> None:
    def settings(name: str) -> TrainSettings:
        return tiny_settings(
            data_dir, tmp_path / name, device="cuda", dtype="bfloat16", compile=False, parallel=parallel
        )

    train.main(settings("one"))
    with torchrun(2, str(ROOT / "train.py"), *as_flags(settings("two"))) as process:
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    one, two = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-2)
