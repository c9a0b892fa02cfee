"""Resuming is exact: a run has the same bits as an uninterrupted one, however it was interrupted, moved or copied."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from conftest import (
    MODERN,
    ROOT,
    as_flags,
    assert_same_run,
    contents,
    count_rows,
    rows_without_seconds,
    same_tensors,
    saved_step,
    tiny_settings,
)
from glyphgpt.cli import parse
from glyphgpt.errors import UserError
from glyphgpt.files import BEST, LAST, LOCK
from glyphgpt.settings import TrainSettings


def train_with_signal(settings: TrainSettings, step: int, number: signal.Signals) -> int | str | None:
    """Train, send this process a signal within the update that leads to `step`, and return the exit status."""

    class SignalledTrainer(train.Trainer):
        def backward(self, batch: torch.Tensor) -> torch.Tensor:
            if self.state.step == step - 1:
                signal.raise_signal(number)
            return super().backward(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Trainer", SignalledTrainer)
        try:
            train.main(settings)
        except SystemExit as error:
            return error.code
    return 0


def resuming(settings: TrainSettings, **changes: object) -> TrainSettings:
    """Return settings that resume the run."""
    return settings.model_copy(update={"resume": True, **changes})


@pytest.fixture(scope="module")
def uninterrupted(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train 40 steps without interruption."""
    out_dir = tmp_path_factory.mktemp("uninterrupted")
    train.main(noisy_settings(data_dir, out_dir))
    assert saved_step(out_dir, BEST) < 40, "best and last must differ"
    return out_dir


def noisy_settings(data_dir: Path, out_dir: Path, **changes: object) -> TrainSettings:
    """Return settings with dropout, and with a learning rate so high that the loss increases again."""
    optimization = {"dropout": 0.1, "learning_rate": 3, "warmup_steps": 30, "schedule": "constant", "grad_clip": 0}
    return tiny_settings(data_dir, out_dir, max_steps=40, **optimization, **changes)


@pytest.mark.parametrize(
    "signals",
    [[(17, signal.SIGTERM)], [(17, signal.SIGINT)], [(1, signal.SIGTERM), (20, signal.SIGINT), (39, signal.SIGTERM)]],
    ids=["SIGTERM", "SIGINT", "three times"],
)
def test_interrupted_run_resumes_exactly(
    signals: list[tuple[int, signal.Signals]],
    uninterrupted: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = noisy_settings(data_dir, tmp_path, save_every=7)
    for step, number in signals:
        assert train_with_signal(settings, step, number) == 128 + number
        assert saved_step(tmp_path) == step
        assert f"interrupted at step {step} of 40 by {number.name}, saved; " in capsys.readouterr().out
        settings = resuming(settings)
    train.main(settings)
    assert_same_run(uninterrupted, tmp_path)


def test_modern_network_with_muon_resumes_exactly(data_dir: Path, tmp_path: Path) -> None:
    changes = {"optimizer": "muon", "learning_rate": 0.01, "dropout": 0.1, "dtype": "bfloat16", "max_steps": 24}
    uninterrupted, interrupted = (
        tiny_settings(data_dir, tmp_path / name, **MODERN, **changes) for name in ("uninterrupted", "interrupted")
    )
    train.main(uninterrupted)
    assert train_with_signal(interrupted, 7, signal.SIGTERM) == 128 + signal.SIGTERM
    train.main(resuming(interrupted))
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "interrupted")


def test_signal_at_the_last_step_does_not_interrupt_the_run(
    uninterrupted: Path, data_dir: Path, tmp_path: Path
) -> None:
    assert train_with_signal(noisy_settings(data_dir, tmp_path), 40, signal.SIGTERM) == 0
    assert_same_run(uninterrupted, tmp_path)


def test_signal_at_an_early_stop_does_not_interrupt_the_run(data_dir: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        data_dir, tmp_path, patience=1, learning_rate=1.0, grad_clip=0, max_steps=500, eval_every=5
    )
    train.main(settings)
    end = saved_step(tmp_path)
    assert end < 500
    assert train_with_signal(settings.model_copy(update={"overwrite": True}), end, signal.SIGTERM) == 0
    assert saved_step(tmp_path) == end


def test_signal_handlers_are_restored_after_training(data_dir: Path, tmp_path: Path) -> None:
    previous = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert train_with_signal(tiny_settings(data_dir, tmp_path), 3, signal.SIGTERM) == 128 + signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == previous


def test_leftovers_of_a_killed_run_do_not_matter(uninterrupted: Path, data_dir: Path, tmp_path: Path) -> None:
    settings = noisy_settings(data_dir, tmp_path)
    train_with_signal(settings, 17, signal.SIGTERM)
    for name in (BEST, LAST, "metrics.jsonl"):
        (tmp_path / f"{name}.unfinished").write_bytes(b"partial ")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 18, "loss": 1.0}\n{"kind": "train", "st')
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 20, "text": "to be"}\n{"step": 30, "te')
    train.main(resuming(settings))
    assert_same_run(uninterrupted, tmp_path)
    assert not (tmp_path / f"{LAST}.unfinished").exists()


def test_run_killed_right_after_saving_has_all_rows_and_samples(
    uninterrupted: Path, data_dir: Path, tmp_path: Path
) -> None:
    class KilledTrainer(train.Trainer):
        def save(self, *args: Any, **kwargs: Any) -> None:
            super().save(*args, **kwargs)
            if self.state.step == 20:
                raise KeyboardInterrupt

    settings = noisy_settings(data_dir, tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "Trainer", KilledTrainer)
        train.main(settings)
    train.main(resuming(settings))
    assert_same_run(uninterrupted, tmp_path)


def start_training(settings: TrainSettings) -> "subprocess.Popen[str]":
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(ROOT / "train.py"), *as_flags(settings)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", cwd=ROOT, env=env
    )


def signal_after(rows: int, process: "subprocess.Popen[str]", out_dir: Path, number: signal.Signals) -> tuple[str, str]:
    """Send a signal at a random moment after `rows` more rows of metrics; return standard output and error."""
    target, deadline = count_rows(out_dir) + rows, time.monotonic() + 120
    while count_rows(out_dir) < target:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "training makes no progress"
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(number)
    return process.communicate(timeout=60)


def test_killed_process_resumes_exactly(data_dir: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 300, "eval_every": 100, "dropout": 0.1, "learning_rate": 0.01}
    train.main(tiny_settings(data_dir, tmp_path / "uninterrupted", **changes))
    out_dir = tmp_path / "run"
    settings = tiny_settings(data_dir, out_dir, **changes, save_every=1)
    previous_step = 0
    for number in (signal.SIGKILL, signal.SIGINT):
        process = start_training(settings)
        out, err = signal_after(20, process, out_dir, number)
        step = saved_step(out_dir)
        assert previous_step < step < 300, "the run must make progress and be interrupted"
        assert "Traceback" not in err
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 128 + number
            assert f"interrupted at step {step} of 300 by {number.name}, saved; resume it: python train.py " in out
        previous_step, settings = step, resuming(settings)
    train.main(resuming(settings, save_every=0))
    assert_same_run(tmp_path / "uninterrupted", out_dir)


def test_extended_run_equals_one_that_was_longer_from_the_start(
    uninterrupted: Path, data_dir: Path, tmp_path: Path
) -> None:
    settings = noisy_settings(data_dir, tmp_path)
    train.main(settings.model_copy(update={"max_steps": 20}))
    train.main(resuming(settings))
    assert_same_run(uninterrupted, tmp_path)


def parse_settings(*words: str) -> TrainSettings:
    """Return the settings that train.py reads from a command line."""
    return parse(TrainSettings, words, "", "", files=True)[0]


def run_contents(folder: Path) -> dict[str, bytes]:
    """Return the content of each file of a run except its lock."""
    return {name: content for name, content in contents(folder).items() if name != LOCK}


@pytest.fixture
def project(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a working directory with data/small and out/one, a run of 4 steps whose settings have relative paths."""
    shutil.copytree(data_dir / "small", tmp_path / "project" / "data" / "small")
    monkeypatch.chdir(tmp_path / "project")
    train.main(tiny_settings(Path("data"), Path("out/one"), max_steps=4))
    return tmp_path / "project"


@pytest.mark.parametrize("words", [["{}/config.toml", "--resume"], ["--resume", "{}"], ["{}", "--resume=true"]])
def test_copied_run_resumes_in_its_own_folder(project: Path, words: list[str]) -> None:
    shutil.copytree(project / "out/one", project / "out/copy")
    before = run_contents(project / "out/one")
    train.main(parse_settings(*(word.format("out/copy") for word in words), "--max_steps=6"))
    assert (saved_step(project / "out/copy"), run_contents(project / "out/one")) == (6, before)


def test_moved_run_resumes_in_its_new_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "out/one").rename(project.parent / "moved")
    monkeypatch.chdir(project.parent / "moved")
    train.main(parse_settings("config.toml", "--resume", "--max_steps=6"))
    assert saved_step(project.parent / "moved") == 6
    assert not (project / "out/one").exists()


def test_run_moved_with_its_data_resumes(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project.rename(project.parent / "renamed")
    monkeypatch.chdir("/")
    train.main(parse_settings("--resume", str(project.parent / "renamed/out/one"), "--max_steps=6"))
    assert saved_step(project.parent / "renamed/out/one") == 6
    assert not project.exists()


def test_config_of_a_copied_run_does_not_change_the_original(project: Path) -> None:
    shutil.copytree(project / "out/one", project / "out/copy")
    before = run_contents(project / "out/one")
    train.main(parse_settings("out/copy/config.toml", "--overwrite", "--max_steps=2"))
    assert (saved_step(project / "out/copy"), run_contents(project / "out/one")) == (2, before)
    (project / "out/config only").mkdir()
    shutil.copy("out/one/config.toml", "out/config only")
    with pytest.raises(UserError, match=r"^out/config only: no run to resume here"):
        train.main(parse_settings("out/config only/config.toml", "--resume"))


def test_config_outside_a_run_keeps_its_out_dir(project: Path) -> None:
    (project / "config.toml").write_text('out_dir = "out/named"\n', encoding="utf-8")
    (project / "model.safetensors").touch()  # not a checkpoint of glyphgpt
    assert parse_settings("config.toml").out_dir == "out/named"
    assert parse_settings("out/one/config.toml", "--resume", "--out_dir=out/other").out_dir == "out/other"


def test_dataset_may_be_a_path(project: Path) -> None:
    for dataset in ("data/small", "data/small/", str(project / "data/small"), "./data/small"):
        train.main(tiny_settings(Path("data"), Path("out/two"), dataset=dataset, max_steps=1, overwrite=True))
    train.main(parse_settings("--resume", "out/two", "--max_steps=2"))
    assert saved_step(project / "out/two") == 2


@pytest.fixture
def two_threads() -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(previous)


@pytest.mark.usefixtures("two_threads")
def test_compiled_run_on_two_threads_resumes_exactly(data_dir: Path, tmp_path: Path) -> None:
    """By default, compiled backward passes of embeddings add atomically, and runs differ after a few steps."""
    network = {**MODERN, "n_layer": 1, "n_embd": 32, "block_size": 64}
    schedule = {"schedule": "constant", "learning_rate": 0.01}  # independent of max_steps
    hardware = {"batch_size": 32, "dtype": "auto", "compile": True}
    for name, steps in (("uninterrupted", 16), ("resumed", 6), ("resumed", 16)):
        settings = tiny_settings(data_dir, tmp_path / name, **network, **schedule, **hardware, max_steps=steps)
        train.main(resuming(settings) if (tmp_path / name).exists() else settings)
    for name in (BEST, LAST):
        assert same_tensors(tmp_path / "uninterrupted", tmp_path / "resumed", name)
    assert rows_without_seconds(tmp_path / "uninterrupted")[-1] == rows_without_seconds(tmp_path / "resumed")[-1]
