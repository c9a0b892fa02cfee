"""Two processes that share each batch do what one does alone, and go on with each other's runs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import MODERN, ROOT, as_flags, read_metrics, tiny_settings
from glyphgpt import checkpoint as checkpoints
from glyphgpt.settings import TrainSettings

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without processes")


def torchrun(settings: TrainSettings) -> "subprocess.CompletedProcess[str]":
    """Train with two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, str(ROOT / "train.py"), *as_flags(settings)],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )


def losses(out_dir: Path) -> dict[tuple[str, int], float]:
    return {(row["kind"], row["step"]): row["loss"] for row in read_metrics(out_dir)}


def assert_close_runs(one: Path, other: Path) -> None:
    for name in ("best.safetensors", "last.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-5, msg=f"{name}: {key}")
    assert losses(one) == pytest.approx(losses(other), abs=1e-5)
    steps = [checkpoints.load(folder / "last.safetensors").info.progress.step for folder in (one, other)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("form", [{}, {**MODERN, "optimizer": "muon"}], ids=["gpt2", "modern"])
def test_two_processes_follow_one_and_one_goes_on_with_their_run(
    form: dict[str, Any], data_dir: Path, tmp_path: Path
) -> None:
    def settings(name: str, steps: int) -> TrainSettings:
        return tiny_settings(data_dir, tmp_path / name, max_steps=steps, eval_every=5, schedule="constant", **form)

    train.main(settings("one", 10))
    done = torchrun(settings("two", 10))
    assert done.returncode == 0, done.stderr
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    assert done.stdout.count("step 0: validation") == 1, "one process speaks for both"
    assert "float32, 2 processes; 64 tokens a step" in done.stdout

    train.main(settings("longer", 20))
    train.main(settings("two", 20).model_copy(update={"resume": True}))
    assert_close_runs(tmp_path / "longer", tmp_path / "two")


def test_two_processes_accumulate_uneven_shares_and_go_on_with_a_run_of_one(data_dir: Path, tmp_path: Path) -> None:
    """12 sequences are 6 for each process, 4 and 2 at a time."""

    def settings(name: str, steps: int, **changes: object) -> TrainSettings:
        form = {"gradient_accumulation_steps": 3, "eval_every": 5, "schedule": "constant", **changes}
        return tiny_settings(data_dir, tmp_path / name, max_steps=steps, **form)

    train.main(settings("straight", 20))
    train.main(settings("resumed", 10))
    done = torchrun(settings("resumed", 20, resume=True))
    assert done.returncode == 0, done.stderr
    assert_close_runs(tmp_path / "straight", tmp_path / "resumed")


def test_a_batch_that_cannot_be_shared_evenly_is_refused(data_dir: Path, tmp_path: Path) -> None:
    done = torchrun(tiny_settings(data_dir, tmp_path / "run", batch_size=3))
    assert done.returncode != 0
    assert (
        "error: 2 processes cannot share 3 sequences evenly; change batch_size or gradient_accumulation_steps "
        "so that their product is a multiple of 2"
    ) in done.stderr
    assert not (tmp_path / "run").exists()
