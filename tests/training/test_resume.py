"""Resuming is exact: whatever ended a run, it goes on to the very bits of one that was never stopped."""

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
    contents,
    prepare_text,
    read_metrics,
    same_tensors,
    some_text,
    tiny_settings,
)
from glyphgpt import checkpoint as checkpoints
from glyphgpt.cli import parse
from glyphgpt.errors import UsageError, UserError
from glyphgpt.settings import TrainSettings

LEFTOVERS = ("best.safetensors.unfinished", "last.safetensors.unfinished", "metrics.jsonl.unfinished")


def rows(out_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics without what differs from day to day."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_metrics(out_dir)]


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("best.safetensors", "last.safetensors"):
        assert same_tensors(one, other, name)
        infos = [checkpoints.load_checkpoint(folder / name).metadata for folder in (one, other)]
        progress = [info.state.model_dump(exclude={"seconds"}) for info in infos]
        assert progress[0] == progress[1]
        assert infos[0].val_loss == infos[1].val_loss
    assert rows(one) == rows(other)
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()


def train_until(settings: TrainSettings, step: int, number: signal.Signals) -> int | str | None:
    """Train, send this process a signal within the update that leads to `step`, and return the exit status."""

    class Stopped(train.Trainer):
        def backward(self, batch: torch.Tensor) -> float:
            if self.state.step == step - 1:
                signal.raise_signal(number)
            return super().backward(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Trainer", Stopped)
        with pytest.raises(SystemExit) as ending:
            train.main(settings)
    return ending.value.code


def resumed(settings: TrainSettings, **changes: object) -> TrainSettings:
    return settings.model_copy(update={"resume": True, **changes})


@pytest.fixture(scope="module")
def straight(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 steps without a stop."""
    out_dir = tmp_path_factory.mktemp("straight")
    train.main(dropout_settings(data_dir, out_dir))
    assert checkpoints.load_checkpoint(out_dir / "best.safetensors").metadata.state.step < 40, (
        "best is not simply the last"
    )
    return out_dir


def dropout_settings(data_dir: Path, out_dir: Path, **changes: object) -> TrainSettings:
    """Settings of a restless run: dropout, and a learning rate so high that the loss goes up again."""
    form = {"dropout": 0.1, "learning_rate": 3, "warmup_steps": 30, "schedule": "constant", "grad_clip": 0}
    return tiny_settings(data_dir, out_dir, max_steps=40, **form, **changes)


@pytest.mark.parametrize(
    "stops",
    [[(17, signal.SIGTERM)], [(17, signal.SIGINT)], [(1, signal.SIGTERM), (20, signal.SIGINT), (39, signal.SIGTERM)]],
    ids=["SIGTERM", "SIGINT", "three times"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    stops: list[tuple[int, signal.Signals]],
    straight: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = dropout_settings(data_dir, tmp_path, save_every=7)
    for step, number in stops:
        assert train_until(settings, step, number) == 128 + number
        assert checkpoints.load_checkpoint(tmp_path / "last.safetensors").metadata.state.step == step
        told = (
            f"interrupted at step {step} of 40 by {number.name}, saved; resume it: python train.py --resume {tmp_path}"
        )
        assert told in capsys.readouterr().out
        settings = resumed(settings)
    train.main(settings)
    assert_same_run(straight, tmp_path)


def test_every_part_of_the_newer_form_goes_on_to_the_same_bits(data_dir: Path, tmp_path: Path) -> None:
    form = {**MODERN, "optimizer": "muon", "learning_rate": 0.01, "dropout": 0.1, "dtype": "bfloat16", "max_steps": 24}
    straight, stopped = (tiny_settings(data_dir, tmp_path / name, **form) for name in ("straight", "stopped"))
    train.main(straight)
    assert train_until(stopped, 7, signal.SIGTERM) == 128 + signal.SIGTERM
    train.main(resumed(stopped))
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_a_signal_at_the_last_step_lets_the_run_end_as_usual(
    straight: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(train.Trainer):
        def backward(self, batch: torch.Tensor) -> float:
            if self.state.step == 39:
                signal.raise_signal(signal.SIGTERM)
            return super().backward(batch)

    monkeypatch.setattr(train, "Trainer", Stopped)
    train.main(dropout_settings(data_dir, tmp_path))
    assert_same_run(straight, tmp_path)


def test_signals_are_handled_as_before_once_training_is_over(data_dir: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train_until(tiny_settings(data_dir, tmp_path), 3, signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_a_killed_run_left_behind_does_no_harm(straight: Path, data_dir: Path, tmp_path: Path) -> None:
    settings = dropout_settings(data_dir, tmp_path)
    train_until(settings, 17, signal.SIGTERM)
    for name in LEFTOVERS:
        (tmp_path / name).write_bytes(b"half a ")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 18, "loss": 1.0}\n{"kind": "train", "st')
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 20, "text": "to be"}\n{"step": 30, "te')
    train.main(resumed(settings))
    assert_same_run(straight, tmp_path)
    assert not (tmp_path / "last.safetensors.unfinished").exists()


def test_a_run_killed_right_after_its_checkpoint_lacks_no_row_and_no_sample(
    straight: Path, data_dir: Path, tmp_path: Path
) -> None:
    class Killed(train.Trainer):
        def save(self, *what: Any, **how: Any) -> None:
            super().save(*what, **how)
            if self.state.step == 20:
                raise KeyboardInterrupt

    settings = dropout_settings(data_dir, tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "Trainer", Killed)
        train.main(settings)
    train.main(resumed(settings))
    assert_same_run(straight, tmp_path)


def start(settings: TrainSettings) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(ROOT / "train.py"), *as_flags(settings)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", cwd=ROOT, env=environment
    )


def rows_written(out_dir: Path) -> int:
    path = out_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def end_after(
    rows_more: int, process: "subprocess.Popen[str]", out_dir: Path, number: signal.Signals
) -> tuple[str, str]:
    """Send a signal at a random moment once metrics.jsonl has grown; return the output."""
    wanted, deadline = rows_written(out_dir) + rows_more, time.monotonic() + 120
    while rows_written(out_dir) < wanted:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not get anywhere"
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(number)
    return process.communicate(timeout=60)


def test_killed_and_signalled_processes_go_on_to_the_same_bits(data_dir: Path, tmp_path: Path) -> None:
    form = {"max_steps": 300, "eval_every": 100, "dropout": 0.1, "learning_rate": 0.01}
    train.main(tiny_settings(data_dir, tmp_path / "straight", **form))
    out_dir = tmp_path / "run"
    settings = tiny_settings(data_dir, out_dir, **form, save_every=1)
    reached = 0
    for number in (signal.SIGKILL, signal.SIGINT):
        process = start(settings)
        out, err = end_after(20, process, out_dir, number)
        step = checkpoints.load_checkpoint(out_dir / "last.safetensors").metadata.state.step
        assert reached < step < 300, "the run went on, and was ended before its end"
        assert "Traceback" not in err
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 128 + number
            assert f"interrupted at step {step} of 300 by {number.name}, saved; resume it: python train.py " in out
        reached, settings = step, resumed(settings)
    train.main(resumed(settings, save_every=0))
    assert_same_run(tmp_path / "straight", out_dir)


def test_resume_with_nothing_there_says_so(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^.*: no run to resume here; leave --resume out to start a new one$"):
        train.main(tiny_settings(data_dir, tmp_path / "nothing", resume=True))
    assert not (tmp_path / "nothing").exists()


def test_a_damaged_checkpoint_is_refused(data_dir: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data_dir, tmp_path, max_steps=2)
    train.main(settings)
    last = tmp_path / "last.safetensors"
    whole = bytearray(last.read_bytes())
    whole[-100] ^= 1
    last.write_bytes(whole)
    with pytest.raises(UserError, match=r"^.*last\.safetensors: damaged.*$"):
        train.main(resumed(settings))
    assert last.read_bytes() == whole


def test_a_run_that_is_done_is_left_alone_and_told_how_to_train_longer(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(data_dir, tmp_path)
    train.main(settings)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train.main(resumed(settings))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    told = f"continue training: python train.py --resume {tmp_path} --max_steps=40"
    assert told in capsys.readouterr().out


def test_a_longer_run_is_the_same_as_one_that_was_long_from_the_start(
    straight: Path, data_dir: Path, tmp_path: Path
) -> None:
    settings = dropout_settings(data_dir, tmp_path)
    train.main(settings.model_copy(update={"max_steps": 20}))
    train.main(resumed(settings))
    assert_same_run(straight, tmp_path)


def test_another_shape_is_refused_naming_both(data_dir: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data_dir, tmp_path)
    train_until(settings, 3, signal.SIGTERM)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name, value, said in [
        ("n_layer", 3, "n_layer is 2 there, but 3 in the settings"),
        ("norm", "rmsnorm", "norm is layernorm there, but rmsnorm in the settings"),
        ("block_size", 8, "block_size is 16 there, but 8 in the settings"),
    ]:
        with pytest.raises(UserError, match=rf"^.*last\.safetensors: {said}$"):
            train.main(resumed(settings, **{name: value}))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_dropout_and_batch_size_may_change(data_dir: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data_dir, tmp_path)
    train_until(settings, 3, signal.SIGTERM)
    train.main(resumed(settings, dropout=0.3, batch_size=2))
    assert checkpoints.load_checkpoint(tmp_path / "last.safetensors").metadata.state.step == 20


def test_another_vocabulary_is_refused_naming_both(tmp_path: Path) -> None:
    prepare_text(some_text(2000), tmp_path)
    settings = tiny_settings(tmp_path, tmp_path / "run", max_steps=2)
    train.main(settings)
    prepare_text(some_text(2000).replace("k", "q"), tmp_path, name="other")
    with pytest.raises(UserError, match=r"^.*vocabular.*$") as failure:
        train.main(resumed(settings, dataset="other"))
    assert str(tmp_path / "run" / "last.safetensors") in str(failure.value)
    assert str(tmp_path / "other") in str(failure.value)


def test_a_changed_text_of_the_same_vocabulary_gets_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_text(some_text(2000), tmp_path)
    settings = tiny_settings(tmp_path, tmp_path / "run")
    train_until(settings, 5, signal.SIGTERM)
    prepare_text(some_text(2000, seed=1), tmp_path, overwrite=True)
    capsys.readouterr()
    train.main(resumed(settings))
    assert "warning: " in (said := capsys.readouterr().err)
    assert f"{tmp_path / 'small'} has changed since the run began" in said
    assert checkpoints.load_checkpoint(tmp_path / "run" / "last.safetensors").metadata.state.step == 20


def test_settings_that_change_what_comes_are_told(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=3))
    train.main(tiny_settings(data_dir, tmp_path, max_steps=4, resume=True))
    assert "settings changed" not in capsys.readouterr().err
    train.main(tiny_settings(data_dir, tmp_path, max_steps=5, seed=7, dropout=0.2, resume=True))
    said = capsys.readouterr().err
    assert "warning: settings have changed since the run began: " in said
    assert "seed 1337 -> 7" in said
    assert "dropout 0.0 -> 0.2" in said


def test_a_run_may_go_on_in_another_precision(data_dir: Path, tmp_path: Path) -> None:
    for steps, dtype in ((2, "float32"), (4, "float16"), (6, "bfloat16")):
        train.main(tiny_settings(data_dir, tmp_path, max_steps=steps, dtype=dtype, resume=steps > 2))
    assert checkpoints.load_checkpoint(tmp_path / "last.safetensors").metadata.state.step == 6


def test_a_run_goes_on_by_itself_only_under_the_torchrun_that_began_it(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.main(tiny_settings(data_dir, tmp_path / "broken", max_steps=10))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    for _ in range(2):  # a restart after a refusal is refused as well
        with pytest.raises(UsageError, match="already holds a run"):
            train.main(tiny_settings(data_dir, tmp_path / "broken"))
    train.main(tiny_settings(data_dir, tmp_path / "broken", max_steps=10, overwrite=True))
    train.main(tiny_settings(data_dir, tmp_path / "broken", overwrite=True))
    assert read_metrics(tmp_path / "broken")[-1]["step"] == 20
    assert [row["step"] for row in read_metrics(tmp_path / "broken") if row["kind"] == "val"] == [0, 10, 20]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    with pytest.raises(UsageError, match="already holds a run"):
        train.main(tiny_settings(data_dir, tmp_path / "broken"))


def parsed(*words: str) -> TrainSettings:
    """The settings that train.py reads from a command line."""
    return parse(TrainSettings, words, "", "", files=True)[0]


def bits(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its lock."""
    return {name: content for name, content in contents(folder).items() if name != ".lock"}


@pytest.fixture
def project(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with data/small and out/one, a run of 4 steps that was given relative paths."""
    shutil.copytree(data_dir / "small", tmp_path / "project" / "data" / "small")
    monkeypatch.chdir(tmp_path / "project")
    train.main(tiny_settings(Path("data"), Path("out/one"), max_steps=4))
    return tmp_path / "project"


def steps(folder: Path) -> int:
    return checkpoints.load_checkpoint(folder / "last.safetensors").metadata.state.step


@pytest.mark.parametrize("words", [["{}/config.toml", "--resume"], ["--resume", "{}"], ["{}", "--resume=true"]])
def test_a_copied_run_is_resumed_in_its_own_folder(project: Path, words: list[str]) -> None:
    shutil.copytree(project / "out/one", project / "out/copy")
    before = bits(project / "out/one")
    train.main(parsed(*(word.format("out/copy") for word in words), "--max_steps=6"))
    assert (steps(project / "out/copy"), bits(project / "out/one")) == (6, before)


def test_a_moved_run_is_resumed_where_it_is_from_any_directory(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "out/one").rename(project.parent / "moved")
    monkeypatch.chdir(project.parent / "moved")
    train.main(parsed("config.toml", "--resume", "--max_steps=6"))
    assert steps(project.parent / "moved") == 6
    assert not (project / "out/one").exists()


def test_a_run_that_moved_with_its_data_is_resumed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project.rename(project.parent / "renamed")
    monkeypatch.chdir("/")
    train.main(parsed("--resume", str(project.parent / "renamed/out/one"), "--max_steps=6"))
    assert steps(project.parent / "renamed/out/one") == 6
    assert not project.exists()


def test_the_config_of_a_copied_run_never_means_the_original(project: Path) -> None:
    shutil.copytree(project / "out/one", project / "out/copy")
    before = bits(project / "out/one")
    train.main(parsed("out/copy/config.toml", "--overwrite", "--max_steps=2"))
    assert (steps(project / "out/copy"), bits(project / "out/one")) == (2, before)
    (project / "out/alone").mkdir()
    shutil.copy("out/one/config.toml", "out/alone")
    with pytest.raises(UserError, match=r"^out/alone: no run to resume here"):
        train.main(parsed("out/alone/config.toml", "--resume"))


def test_a_config_file_of_the_users_own_keeps_its_out_dir(project: Path) -> None:
    (project / "config.toml").write_text('out_dir = "out/mine"\n', encoding="utf-8")
    (project / "model.safetensors").touch()  # no checkpoint of ours
    assert parsed("config.toml").out_dir == "out/mine"
    assert parsed("out/one/config.toml", "--resume", "--out_dir=out/other").out_dir == "out/other"


def test_a_dataset_may_be_named_by_its_path(project: Path) -> None:
    for place in ("data/small", "data/small/", str(project / "data/small"), "./data/small"):
        train.main(tiny_settings(Path("data"), Path("out/two"), dataset=place, max_steps=1, overwrite=True))
    train.main(parsed("--resume", "out/two", "--max_steps=2"))
    assert steps(project / "out/two") == 2


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_compiled_run_on_several_threads_is_exact_too(data_dir: Path, tmp_path: Path) -> None:
    """Compiled backward passes of embeddings add atomically by default: runs part within a few steps."""
    form = {**MODERN, "n_layer": 1, "n_embd": 32, "block_size": 64, "batch_size": 32, "dtype": "auto", "compile": True}
    schedule = {"schedule": "constant", "learning_rate": 0.01}  # which does not depend on where the run ends
    for name, steps in (("straight", 16), ("broken", 6), ("broken", 16)):
        settings = tiny_settings(data_dir, tmp_path / name, **form, **schedule, max_steps=steps)
        train.main(resumed(settings) if (tmp_path / name).exists() else settings)
    for name in ("best.safetensors", "last.safetensors"):
        assert same_tensors(tmp_path / "straight", tmp_path / "broken", name)
    assert rows(tmp_path / "straight")[-1] == rows(tmp_path / "broken")[-1]
