"""The scripts on pretended CUDA GPUs: what they compute, what makes them wait, and what they say without memory."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pretended_runs import Result, run

from conftest import MODERN, as_flags, read_metrics, tiny_settings

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="a C++ compiler builds the pretended GPU")

SHORT = ["--max_new_tokens=60"]
"""The context has 16 tokens, and is renewed six times."""
ON_GPU: dict[str, Any] = {"device": "cuda", "compile": False}


def train(
    data_dir: Path,
    folder: Path,
    name: str = "run",
    *,
    gpus: int = 2,
    processes: int = 1,
    oom: Any = None,
    **changes: Any,
) -> Result:
    """Train on pretended GPUs, in folder / name."""
    settings = tiny_settings(data_dir, folder / name, **{**ON_GPU, **changes})
    return run(folder, "train.py", *as_flags(settings), gpus=gpus, processes=processes, oom=oom)


def losses(folder: Path, name: str = "run") -> list[float]:
    """Return the losses of a run."""
    return [row["loss"] for row in read_metrics(folder / name)]


@pytest.mark.parametrize(
    ("dtype", "tolerance", "network"),
    [("float32", 1e-4, {}), ("bfloat16", 0.02, {**MODERN, "optimizer": "muon"}), ("float16", 0.01, MODERN)],
    ids=["float32", "bfloat16", "float16"],
)
def test_a_run_has_the_losses_of_a_cpu(
    dtype: str, tolerance: float, network: dict[str, Any], data_dir: Path, tmp_path: Path
) -> None:
    for name in ("cuda", "cpu"):
        chosen = dtype if name == "cuda" else "float32"
        result = train(data_dir, tmp_path, name, learning_rate=0.01, device=name, dtype=chosen, **network)
        assert result.status == 0, result.output
    assert losses(tmp_path, "cuda") == pytest.approx(losses(tmp_path, "cpu"), abs=tolerance)
    shows_utilization = ["mfu" in row for row in read_metrics(tmp_path / "cuda") if row["kind"] == "train"]
    assert all(shows_utilization[1:]) == (dtype != "float32")


def test_a_resumed_run_has_the_losses_of_one_that_was_not_interrupted(data_dir: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dropout": 0.1, "learning_rate": 0.01, "min_lr": 0.01}
    for name, steps in (("whole", 20), ("resumed", 10)):
        assert train(data_dir, tmp_path, name, max_steps=steps, **settings).status == 0
    assert train(data_dir, tmp_path, "resumed", max_steps=20, resume=True, **settings).status == 0
    assert losses(tmp_path, "resumed") == losses(tmp_path, "whole")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(parallel: str, data_dir: Path, tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        result = train(data_dir, tmp_path, name, processes=processes, parallel=parallel)
        assert result.status == 0, result.output
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), abs=1e-4)


def test_two_processes_share_a_gpu(data_dir: Path, tmp_path: Path) -> None:
    result = train(data_dir, tmp_path, gpus=1, processes=2)
    assert result.status == 0
    assert result.output.startswith("warning: 2 processes share 1 GPU(s) and exchange gradients through the CPU")


def costs_per_step(data_dir: Path, folder: Path, **changes: Any) -> tuple[float, Counter[str]]:
    """Return how many kernels and graphs the host starts in a training step, and where it waits."""
    few, many = (
        train(data_dir, folder, f"{steps}", max_steps=steps, eval_every=100, sample_tokens=0, **changes)
        for steps in (10, 20)
    )
    assert few.status == many.status == 0, many.output
    waits = Counter({kind: (count - few.waits[kind]) / 10 for kind, count in many.waits.items()})
    return (many.kernels - few.kernels) / 10, +waits


@pytest.mark.parametrize(("dtype", "optimizer"), [("bfloat16", "muon"), ("float16", "adamw")])
def test_a_training_step_is_a_graph_and_waits_for_nothing(
    dtype: str, optimizer: str, data_dir: Path, tmp_path: Path
) -> None:
    network = {"dtype": dtype, "optimizer": optimizer, "dropout": 0.1, "grad_clip": 1.0}
    launches, waits = costs_per_step(data_dir, tmp_path, **network)
    assert launches < 10  # copies of the batch and the learning rate, the graph, a copy of the loss
    assert waits == Counter()


def test_a_training_step_whose_activations_are_recomputed_waits_for_nothing(data_dir: Path, tmp_path: Path) -> None:
    _, waits = costs_per_step(data_dir, tmp_path, activation_checkpointing=True)
    assert waits == Counter()


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    result = train(data_dir, folder, learning_rate=0.01, **MODERN)
    assert result.status == 0, result.output
    return folder / "run"


@pytest.mark.parametrize("flags", [[], ["--cache=False"], ["--num_samples=3"], ["--top_k=5", "--top_p=0.9"]], ids=str)
def test_samples_are_those_of_a_cpu(flags: list[str], trained: Path, tmp_path: Path) -> None:
    on_gpu, on_cpu = (
        run(tmp_path / device, "sample.py", str(trained), f"--device={device}", "--dtype=float32", *SHORT, *flags)
        for device in ("cuda", "cpu")
    )
    assert on_gpu.status == on_cpu.status == 0, on_gpu.output
    assert on_gpu.output == on_cpu.output


@pytest.mark.parametrize("flags", [["--score=small:val"]], ids=str)
def test_scores_are_those_of_a_cpu(flags: list[str], trained: Path, data_dir: Path, tmp_path: Path) -> None:
    on_gpu, on_cpu = (
        run(tmp_path / device, "sample.py", str(trained), f"--device={device}", f"--data_dir={data_dir}", *flags)
        for device in ("cuda", "cpu")
    )
    assert on_gpu.status == on_cpu.status == 0, on_gpu.output
    assert on_gpu.output == on_cpu.output


def test_the_tests_for_gpus_pass(tmp_path: Path) -> None:
    result = run(
        tmp_path, "pytest", "-q", "tests/test_gpu.py", "-k", "beam or names or draws or (bfloat16 and not True)"
    )
    assert result.status == 0, result.output
    assert " passed" in result.output
    assert "failed" not in result.output


@pytest.mark.parametrize(
    "oom",
    [("torch", "_to_copy", 0), ("torch", "mm", 40), ("driver", "softmax", 3), ("cublas", "mm", 0),
     ("cudnn", "bmm", 2), ("torch", "_fused_adamw_", 1)],
    ids=str,
)  # fmt: skip
def test_training_that_runs_out_of_memory_says_so_in_one_line(oom: Any, data_dir: Path, tmp_path: Path) -> None:
    result = train(data_dir, tmp_path, oom=oom)
    assert result.status == 1
    assert result.output.splitlines()[-1].startswith("error: out of memory; lower batch_size")
    assert "Traceback" not in result.output


def test_nccl_that_runs_out_of_memory_is_one_line(data_dir: Path, tmp_path: Path) -> None:
    result = train(data_dir, tmp_path, processes=2, oom=("nccl", "allreduce", 3))
    assert result.status == 1
    assert "error: out of memory; lower batch_size" in result.output
    assert "Traceback" not in result.output


def test_a_gpu_without_free_memory_is_one_line(data_dir: Path, trained: Path, tmp_path: Path) -> None:
    oom = ("driver", "set_device", 0)
    training, sampling = (
        train(data_dir, tmp_path, oom=oom),
        run(tmp_path, "sample.py", str(trained), "--device=cuda", oom=oom),
    )
    for result in (training, sampling):
        assert result.status == 1
        assert result.output.startswith("error: cuda:0 has no free memory: other processes use it")
        assert result.output.count("\n") == 1


def test_sampling_that_runs_out_of_memory_says_so_in_one_line(trained: Path, tmp_path: Path) -> None:
    result = run(tmp_path, "sample.py", str(trained), "--device=cuda", oom=("driver", "mm", 2))
    assert result.status == 1
    assert result.output.splitlines()[-1].startswith("error: out of memory; lower num_samples")
    assert "Traceback" not in result.output


def test_decoding_waits_twice_for_a_new_context_and_not_for_a_token(trained: Path, tmp_path: Path) -> None:
    few, many = (
        run(tmp_path, "sample.py", str(trained), "--device=cuda", "--num_samples=1", f"--max_new_tokens={tokens}")
        for tokens in (40, 80)
    )
    assert few.status == many.status == 0
    assert many.waits.total() - few.waits.total() == 2 * 5
    # 7 of 8 steps are a graph; the others begin a new context, with all kernels of the network
    assert (many.kernels - few.kernels) / 40 < 30
