"""The whole program on a CUDA GPU: train, resume, sample; skipped where there is none."""

from pathlib import Path

import pytest
import torch

import sample
import train
from conftest import read_metrics, tiny_settings
from glyphgpt import checkpoint as checkpoints
from glyphgpt.runtime import start
from glyphgpt.settings import SampleSettings

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_the_gpu_is_taken_under_each_of_its_names(device: str) -> None:
    with start(device, "auto") as runtime:
        assert runtime.device == torch.device("cuda:0")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_train_resume_and_sample(dtype: str, data_dir: Path, tmp_path: Path) -> None:
    form = {"position": "rotary", "norm": "rmsnorm", "qk_norm": True, "dropout": 0.1, "dtype": dtype}
    settings = {"device": "cuda", "compile": False, "learning_rate": 0.01, "max_steps": 40, **form}
    train.main(tiny_settings(data_dir, tmp_path, **settings))
    train.main(tiny_settings(data_dir, tmp_path, **{**settings, "max_steps": 60, "resume": True}))
    losses = [row["loss"] for row in read_metrics(tmp_path) if row["kind"] == "val"]
    assert losses[-1] < losses[0] - 0.5
    assert checkpoints.load(tmp_path / "last.safetensors").info.progress.step == 60
    sample.main(SampleSettings(device="cuda", num_samples=3, max_new_tokens=40), str(tmp_path))


def test_a_compiled_run_follows_an_eager_one(data_dir: Path, tmp_path: Path) -> None:
    for name in ("eager", "compiled"):
        settings = {"device": "cuda", "dtype": "float32", "compile": name == "compiled"}
        train.main(tiny_settings(data_dir, tmp_path / name, **settings))
    eager, compiled = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, abs=1e-2)
