"""train.py: steps, evaluation, checkpoints, metrics, reproducibility, and errors."""

import re
import signal
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import contents, prepare_text, read_metrics, same_tensors, saved_step, some_text, tiny_settings
from glyphgpt.checkpoint import TrainState, load_checkpoint
from glyphgpt.cli import parse
from glyphgpt.data.dataset import load_dataset
from glyphgpt.data.rows import WindowRows
from glyphgpt.errors import UserError, exit_on_error
from glyphgpt.files import BEST, LAST
from glyphgpt.inference.score import Score
from glyphgpt.runtime import Runtime
from glyphgpt.settings import TrainSettings
from glyphgpt.training.evaluation import evaluate_best
from glyphgpt.training.metrics import SAMPLES, read_rows
from glyphgpt.training.schedule import learning_rate
from model import GPT

CPU = Runtime(torch.device("cpu"), torch.float32)


def rows(out_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out_dir) if row["kind"] == kind]


def validation_losses(out_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(out_dir, "val")}


def last_tensors(out_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(out_dir / LAST)


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train 25 steps with an evaluation every 10 steps and after the last step."""
    out_dir = tmp_path_factory.mktemp("run")
    train.main(tiny_settings(data_dir, out_dir, max_steps=25, learning_rate=0.01, sample_tokens=30))
    return out_dir


@pytest.fixture(scope="module")
def diverging_run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with a learning rate that rises too high, so that the last evaluation is far from the best."""
    out_dir = tmp_path_factory.mktemp("diverging")
    train.main(tiny_settings(data_dir, out_dir, max_steps=60, learning_rate=3, warmup_steps=40, grad_clip=0))
    return out_dir


def test_run_does_max_steps_and_evaluates_and_saves_after_the_last(run: Path) -> None:
    last = load_checkpoint(run / LAST)
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 26))
    assert list(validation_losses(run)) == [10, 20, 25]
    assert last.metadata.state.step == 25
    assert last.metadata.val_loss == validation_losses(run)[25]


def test_loss_decreases(run: Path) -> None:
    training = [row["loss"] for row in rows(run, "train")]
    assert sum(training[-5:]) / 5 < sum(training[:5]) / 5 - 0.3
    assert validation_losses(run)[25] < training[0] - 0.3, "the first training loss is of the initial weights"
    assert validation_losses(run)[25] < validation_losses(run)[10]


def test_best_has_the_lowest_validation_loss_and_last_the_final_step(diverging_run: Path) -> None:
    losses = validation_losses(diverging_run)
    lowest = min(losses, key=losses.__getitem__)
    assert lowest < 60, "best and last must differ in this run"
    best = load_checkpoint(diverging_run / BEST)
    assert (best.metadata.state.step, best.metadata.val_loss, best.optimizer) == (lowest, losses[lowest], {})
    assert saved_step(diverging_run) == 60


def test_eval_only_prints_the_score_of_best_and_changes_nothing(
    diverging_run: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(diverging_run)
    best = min(rows(diverging_run, "val"), key=lambda row: row["loss"])
    for batch_size in (4, 1, 64):
        train.main(tiny_settings(data_dir, diverging_run, eval_only=True, batch_size=batch_size))
        shown = capsys.readouterr().out
        score = Score(**{field.name: best[field.name] for field in fields(Score)})
    assert shown.strip().endswith(f"best.safetensors: validation {score}")
    assert contents(diverging_run) == before


def test_eval_only_evaluates_last_where_there_is_no_best(
    run: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / LAST).write_bytes((run / LAST).read_bytes())
    before = contents(tmp_path)
    train.main(tiny_settings(data_dir, tmp_path, eval_only=True))
    shown = capsys.readouterr().out
    assert shown.startswith(f"{tmp_path / LAST}: validation loss {validation_losses(run)[25]:.4f}, ")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("mode", ["new", "no steps", "init_from", "resumed"])
def test_only_weights_that_may_be_the_last_or_are_trained_are_evaluated_before_the_first_step(
    mode: str, run: Path, data_dir: Path, tmp_path: Path
) -> None:
    if mode == "init_from":
        network = ("n_layer", "n_head", "n_embd", "block_size")
        values = tiny_settings(data_dir, tmp_path, max_steps=10, init_from=str(run)).model_dump(exclude_unset=True)
        train.main(TrainSettings.model_validate({key: values[key] for key in values if key not in network}))
    else:
        train.main(tiny_settings(data_dir, tmp_path, max_steps=10 if mode == "new" else 0))
    if mode == "resumed":
        train.main(tiny_settings(data_dir, tmp_path, max_steps=10, resume=True))
    steps = {"new": [10], "no steps": [0], "init_from": [0, 10], "resumed": [0, 10]}[mode]
    assert list(validation_losses(tmp_path)) == steps
    assert [row["step"] for row in read_rows(tmp_path / SAMPLES, dict)] == steps
    assert saved_step(tmp_path) == steps[-1]


def test_new_run_saves_only_last_before_the_first_step(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    step = train.Trainer.step

    def record_files(trainer: train.Trainer, batch: torch.Tensor) -> train.Update:
        files.append({path.name for path in tmp_path.glob("*.safetensors")})
        return step(trainer, batch)

    monkeypatch.setattr(train.Trainer, "step", record_files)
    train.main(tiny_settings(data_dir, tmp_path, max_steps=12))
    assert files == [{LAST}] * 10 + [{BEST, LAST}] * 2, "the first evaluation is after step 10"


SAMPLING: dict[str, Any] = {"eval_tokens": "auto", "max_steps": 60, "eval_every": 20}
"""A run whose evaluations read about a third of the validation split, and in whose time the whole split fits."""


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, [60]),
        ({"max_steps": 65}, [65]),
        ({"max_steps": 40}, []),  # the whole split takes more than 5% of the time
        ({"eval_every": 60}, []),  # the whole split has been read
        ({"eval_every": 47}, []),  # nearly all of it is affordable, so the whole split has been read
        ({"eval_tokens": 0}, []),
        ({"eval_tokens": 200}, []),
        ({"max_steps": 100, "patience": 2, "learning_rate": 1e-30, "min_lr": 0}, [60]),
    ],
    ids=str,
)
def test_best_model_is_evaluated_on_the_whole_split_at_the_end_if_there_is_time(
    changes: dict[str, Any],
    steps: list[int],
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = tiny_settings(data_dir, tmp_path, **{**SAMPLING, **changes})
    train.main(settings)
    lines = capsys.readouterr().out.splitlines()
    best = rows(tmp_path, "best")
    assert [row["step"] for row in best] == steps
    (end,) = (line for line in lines if "; best validation loss " in line)
    if not steps:
        assert end.endswith(f" {min(validation_losses(tmp_path).values()):.4f}")
        return
    assert read_metrics(tmp_path)[-1] == best[0], "it is the last row"
    assert {row["standard_error"] > 0 for row in rows(tmp_path, "val")} == {True}
    score = evaluate_best(settings, load_dataset(data_dir / "small", data_dir), CPU)
    assert (score.eval_tokens, score.standard_error) == (599, 0)
    assert Score(**{field.name: best[0][field.name] for field in fields(Score)}) == score
    assert f"the best model on the whole validation split: {score}" in lines
    assert end.endswith(f"; best validation loss {score.loss:.4f}")


def test_whole_split_is_read_with_the_best_model_where_that_is_not_the_last(data_dir: Path, tmp_path: Path) -> None:
    optimization = {"learning_rate": 3, "warmup_steps": 59, "grad_clip": 0}
    settings = tiny_settings(data_dir, tmp_path, **SAMPLING, **optimization)
    train.main(settings)
    (best,) = rows(tmp_path, "best")
    assert saved_step(tmp_path, BEST) < 60, "best and last must differ in this run"
    assert best["loss"] == evaluate_best(settings, load_dataset(data_dir / "small", data_dir), CPU).loss
    assert best["loss"] < validation_losses(tmp_path)[60] - 0.1
    last = load_checkpoint(tmp_path / LAST)
    train.main(settings.model_copy(update={"resume": True, "max_steps": 61}))
    assert [row["step"] for row in rows(tmp_path, "best")] == [60, 61], "a run that continues has a new end"
    assert last.metadata.state.best_loss == load_checkpoint(tmp_path / LAST).metadata.state.best_loss


def test_interrupted_run_does_not_read_the_whole_split(data_dir: Path, tmp_path: Path) -> None:
    class InterruptedTrainer(train.Trainer):
        def step(self, batch: torch.Tensor) -> train.Update:
            if self.state.step == 39:
                signal.raise_signal(signal.SIGTERM)
            return super().step(batch)

    settings = tiny_settings(data_dir, tmp_path, **SAMPLING)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "Trainer", InterruptedTrainer)
        train.main(settings)
    assert list(validation_losses(tmp_path)) == [20, 40]
    assert rows(tmp_path, "best") == []
    train.main(settings.model_copy(update={"resume": True}))
    assert [row["step"] for row in rows(tmp_path, "best")] == [60]


def test_evaluation_is_deterministic(diverging_run: Path, data_dir: Path) -> None:
    settings = tiny_settings(data_dir, diverging_run)
    dataset = load_dataset(data_dir / "small", data_dir)
    scores = [evaluate_best(settings, dataset, CPU) for _ in range(2)]
    assert scores[0] == scores[1]
    assert scores[0].loss == min(validation_losses(diverging_run).values())


def test_eval_only_needs_a_run_with_the_same_vocabulary(diverging_run: Path, tmp_path: Path) -> None:
    prepare_text(some_text(1000).upper(), tmp_path)
    with pytest.raises(UserError, match=r"missing: no such run or checkpoint"):
        train.main(tiny_settings(tmp_path, tmp_path / "missing", eval_only=True))
    with pytest.raises(UserError, match="have different vocabularies") as caught:
        train.main(tiny_settings(tmp_path, diverging_run, eval_only=True))
    assert str(diverging_run) in str(caught.value)
    assert str(tmp_path / "small") in str(caught.value)


def test_summary_prints_the_network_and_writes_nothing(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(tiny_settings(data_dir, tmp_path / "run", summary=True))
    shown = capsys.readouterr().out
    assert "4 x 16 x 16" in shown
    assert "6,880" in shown
    assert list(tmp_path.iterdir()) == []


def test_saved_config_reproduces_the_run(run: Path, tmp_path: Path) -> None:
    words = [str(run / "config.toml"), f"--out_dir={tmp_path}"]
    settings, _ = parse(TrainSettings, words, "", "", files=True)
    train.main(settings)
    assert same_tensors(run, tmp_path)
    assert same_tensors(run, tmp_path, BEST)
    assert validation_losses(run) == validation_losses(tmp_path)


def test_samples_do_not_change_training(data_dir: Path, tmp_path: Path) -> None:
    for dropout in (0.0, 0.2):
        for length in (0, 30):
            out_dir = tmp_path / f"{dropout}-{length}"
            train.main(tiny_settings(data_dir, out_dir, dropout=dropout, sample_tokens=length))
        assert same_tensors(tmp_path / f"{dropout}-0", tmp_path / f"{dropout}-30")


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_seed_determines_the_run(dropout: float, data_dir: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        torch.manual_seed(len(name))  # the caller's random state does not matter
        train.main(tiny_settings(data_dir, tmp_path / name, dropout=dropout, seed=seed, max_steps=5))
    assert same_tensors(tmp_path / "one", tmp_path / "again")
    assert not same_tensors(tmp_path / "one", tmp_path / "other")


def test_dropout_is_active_in_training_but_not_in_evaluation(data_dir: Path, tmp_path: Path) -> None:
    for dropout in (0.0, 0.2):
        for max_steps in (0, 3):  # without steps, the initial weights are evaluated
            out_dir = tmp_path / f"{dropout} {max_steps}"
            train.main(tiny_settings(data_dir, out_dir, dropout=dropout, max_steps=max_steps))
    assert validation_losses(tmp_path / "0.0 0")[0] == validation_losses(tmp_path / "0.2 0")[0]
    without, with_dropout = tmp_path / "0.0 3", tmp_path / "0.2 3"
    assert rows(without, "train")[0]["loss"] != rows(with_dropout, "train")[0]["loss"]


def test_dropout_differs_at_every_step(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same batch each time and almost constant weights, only dropout can change the loss."""
    settings = tiny_settings(data_dir, tmp_path, dropout=0.5, learning_rate=1e-12, min_lr=0, max_steps=5)
    same_batch = train.Trainer(settings, load_dataset(data_dir / "small", data_dir), CPU).next_batch()
    monkeypatch.setattr(train.Trainer, "next_batch", lambda _: same_batch)
    train.main(settings)
    assert len({round(row["loss"], 4) for row in rows(tmp_path, "train")}) == 5


@pytest.mark.parametrize("processes", [1, 2, 6])
def test_processes_divide_each_batch(processes: int, data_dir: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data_dir, tmp_path, gradient_accumulation_steps=3)
    dataset = load_dataset(data_dir / "small", data_dir)
    trainers = [
        train.Trainer(settings, dataset, Runtime(torch.device("cpu"), torch.float32, rank, processes))
        for rank in range(processes)
    ]
    batches = []
    for step in range(40):
        for trainer in trainers:
            trainer.state.step = step
            batches.append(trainer.next_batch())
    starts = WindowRows(dataset.train.tokens, 16, settings.seed).starts(0, 40 * 12)
    windows = np.stack([dataset.train.slice(start, start + 17) for start in starts.tolist()])
    assert torch.cat(batches).tolist() == windows.tolist()


def test_gradient_accumulation_equals_one_large_batch(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path / "large", batch_size=12, max_steps=8))
    train.main(tiny_settings(data_dir, tmp_path / "small", batch_size=4, gradient_accumulation_steps=3, max_steps=8))
    large, small = last_tensors(tmp_path / "large"), last_tensors(tmp_path / "small")
    for name in large:
        torch.testing.assert_close(small[name], large[name], rtol=0, atol=1e-5, msg=name)
    for one, other in zip(rows(tmp_path / "large", "train"), rows(tmp_path / "small", "train"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["tokens"] == other["tokens"]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9])
def test_uneven_micro_batches_have_the_gradients_of_the_whole_batch(
    batch_size: int, data_dir: Path, tmp_path: Path
) -> None:
    gradients, losses = [], []
    for size in (batch_size, 10):
        settings = tiny_settings(data_dir, tmp_path, batch_size=size)
        trainer = train.Trainer(settings, load_dataset(data_dir / "small", data_dir), CPU)
        trainer.forward = trainer.make_forward()
        batch = torch.randint(20, (10, 17), generator=torch.Generator().manual_seed(0))
        losses.append(trainer.backward(batch).item())
        gradients.append([parameter.grad for parameter in trainer.model.parameters()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-6)


def test_logged_learning_rates_follow_the_schedule(run: Path, data_dir: Path) -> None:
    settings = tiny_settings(data_dir, run, max_steps=25, learning_rate=0.01)
    rates = [row["learning_rate"] for row in rows(run, "train")]
    assert rates == [learning_rate(TrainState(step=step), settings) for step in range(25)]


def test_update_uses_the_scheduled_learning_rate(data_dir: Path, tmp_path: Path) -> None:
    """AdamW's first update moves a weight by the learning rate, or less if its gradient is tiny."""
    settings = tiny_settings(data_dir, tmp_path, max_steps=1, warmup_steps=9, weight_decay=0)
    initial = train.Trainer(settings, load_dataset(data_dir / "small", data_dir), CPU).model.state_dict()
    train.main(settings)
    change = last_tensors(tmp_path)["model.token_embedding.weight"] - initial["token_embedding.weight"]
    assert change.abs().max().item() == pytest.approx(settings.learning_rate / 10, rel=1e-2)


def test_grad_clip_limits_the_gradient_unless_it_is_0(data_dir: Path, tmp_path: Path) -> None:
    for limit in (0, 1e9, 0.01):
        train.main(tiny_settings(data_dir, tmp_path / str(limit), grad_clip=limit, max_steps=1))
    assert same_tensors(tmp_path / "0", tmp_path / str(1e9))
    assert not same_tensors(tmp_path / "0", tmp_path / "0.01")
    norm = rows(tmp_path / "0.01", "train")[0]["grad_norm"]
    assert norm == rows(tmp_path / "0", "train")[0]["grad_norm"] > 0.1
    name = "optimizer.AdamW.token_embedding.weight.exp_avg"
    unclipped, clipped = last_tensors(tmp_path / "0")[name], last_tensors(tmp_path / "0.01")[name]
    torch.testing.assert_close(clipped, unclipped * (0.01 / norm), rtol=1e-3, atol=1e-9)


def test_run_of_zero_steps_evaluates_and_saves(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=0))
    assert list(validation_losses(tmp_path)) == [0]
    assert rows(tmp_path, "train") == []
    assert (saved_step(tmp_path, BEST), saved_step(tmp_path, LAST)) == (0, 0)


def test_patience_stops_the_run_early(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny_settings(
        data_dir, tmp_path, patience=2, learning_rate=1.0, grad_clip=0, max_steps=500, eval_every=5
    )
    train.main(settings)
    losses = validation_losses(tmp_path)
    best = min(losses, key=losses.__getitem__)
    stopped = saved_step(tmp_path)
    assert stopped == best + 2 * 5 < 500
    assert list(losses)[-1] == stopped
    assert f"stopped early at step {stopped}: no better loss in 2 evaluations" in capsys.readouterr().out
    before = (tmp_path / LAST).read_bytes()
    train.main(settings.model_copy(update={"resume": True}))
    assert (tmp_path / LAST).read_bytes() == before


@pytest.mark.parametrize("eval_tokens", [0, "auto"])
def test_patience_ends_where_losses_improve_by_less_than_their_standard_error(
    eval_tokens: object, data_dir: Path, tmp_path: Path
) -> None:
    slow = {"learning_rate": 1e-5, "min_lr": 0, "warmup_steps": 0, "schedule": "constant"}
    train.main(tiny_settings(data_dir, tmp_path, patience=2, max_steps=60, eval_tokens=eval_tokens, **slow))
    losses = list(validation_losses(tmp_path).values())
    assert losses == sorted(losses, reverse=True), "every evaluation must be better than the one before"
    assert saved_step(tmp_path) == saved_step(tmp_path, BEST) == (30 if eval_tokens == "auto" else 60)


def test_metrics_have_the_documented_keys(run: Path) -> None:
    common = {"kind", "step", "loss", "tokens", "seconds"}
    for row in rows(run, "train"):
        assert row.keys() == common | {"grad_norm", "learning_rate"}
        assert row["tokens"] == row["step"] * 64
    for row in rows(run, "val"):
        assert row.keys() == common | {"standard_error", "bits_per_character", "perplexity", "eval_tokens"}
        assert row["perplexity"] == pytest.approx(2 ** row["bits_per_character"])
        assert row["perplexity"] == pytest.approx(2.718281828459045 ** row["loss"])


def test_log_every_sets_which_steps_are_logged(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path, log_every=6))
    assert [row["step"] for row in rows(tmp_path, "train")] == [6, 12, 18]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_values_that_are_not_finite_stop_training_before_the_update(
    fault: str, run: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(data_dir, tmp_path, max_steps=25, learning_rate=0.01, sample_tokens=30)
    backward = train.Trainer.backward

    def faulty_backward(trainer: train.Trainer, batch: torch.Tensor) -> torch.Tensor:
        loss = backward(trainer, batch)
        if trainer.state.step == 12:
            if fault == "loss":
                return torch.tensor(float("nan"))
            for parameter in trainer.model.parameters():
                parameter.grad = torch.full_like(parameter, torch.inf)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "backward", faulty_backward)
        with pytest.raises(
            UserError, match=r"step 13: .*not finite.*lower learning_rate or raise warmup_steps"
        ) as caught:
            train.main(settings)
    assert caught.value.status == 1
    assert "\n" not in str(caught.value)
    assert (saved_step(tmp_path, BEST), saved_step(tmp_path, LAST)) == (10, 10)
    train.main(settings.model_copy(update={"resume": True}))
    assert same_tensors(run, tmp_path)


@pytest.mark.parametrize("eval_every", [10, 1])
def test_diverged_run_can_be_resumed(eval_every: int, data_dir: Path, tmp_path: Path) -> None:
    diverging = tiny_settings(data_dir, tmp_path, learning_rate=1e30, grad_clip=0, eval_every=eval_every)
    with pytest.raises(UserError, match="learning_rate"):
        train.main(diverging)
    assert saved_step(tmp_path) == 0
    train.main(tiny_settings(data_dir, tmp_path, eval_every=eval_every, resume=True))
    initial_loss = rows(tmp_path, "train")[0]["loss"]
    assert validation_losses(tmp_path)[20] < initial_loss
    assert saved_step(tmp_path, BEST) > 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 80 GB"),
    ],
    ids=["cuda", "python", "cpu"],
)
def test_out_of_memory_error_names_settings_to_lower(
    error: Exception, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object) -> None:
        raise error

    monkeypatch.setattr(GPT, "forward", forward)
    with pytest.raises(UserError, match=r"^out of memory; lower batch_size .*block_size or n_embd$"):
        train.main(tiny_settings(data_dir, tmp_path))


def test_other_errors_are_not_reported_as_out_of_memory(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(GPT, "forward", forward)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train.main(tiny_settings(data_dir, tmp_path))


def test_bfloat16_trains_on_the_cpu(
    run: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=25, learning_rate=0.01, dtype="bfloat16"))
    assert "bfloat16" in capsys.readouterr().out
    assert validation_losses(tmp_path)[25] == pytest.approx(validation_losses(run)[25], abs=0.05)
    assert not same_tensors(run, tmp_path)
    assert {tensor.dtype for tensor in last_tensors(tmp_path).values()} == {torch.float32}


@pytest.mark.parametrize("moment", ["compile", "first call"])
def test_failed_compilation_falls_back_to_eager_with_one_warning(
    moment: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nand more lines")

    def compile_lazily(model: torch.nn.Module, **_: object) -> torch.nn.Module:
        wrapped = torch.nn.Sequential(model)
        wrapped.forward = fail  # type: ignore[method-assign]
        return wrapped

    monkeypatch.setattr(torch, "compile", fail if moment == "compile" else compile_lazily)
    train.main(tiny_settings(data_dir, tmp_path / "compiled", compile=True, max_steps=5))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: torch.compile failed (no C++ compiler); ")
    train.main(tiny_settings(data_dir, tmp_path / "eager", compile=False, max_steps=5))
    assert same_tensors(tmp_path / "compiled", tmp_path / "eager")


def test_compiled_model_is_saved_with_the_names_of_the_plain_model(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Compiled(torch.nn.Module):
        calls = 0

        def __init__(self, model: torch.nn.Module, **_: object) -> None:
            super().__init__()
            self._orig_mod = model

        def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
            Compiled.calls += 1
            return self._orig_mod(*arguments)

    train.main(tiny_settings(data_dir, tmp_path / "eager", max_steps=5))
    monkeypatch.setattr(torch, "compile", Compiled)
    train.main(tiny_settings(data_dir, tmp_path / "compiled", max_steps=5, compile=True))
    assert Compiled.calls == 1 + 5  # the test on an example, and five steps
    assert same_tensors(tmp_path / "compiled", tmp_path / "eager")


def test_training_on_bytes_of_many_scripts(tmp_path: Path) -> None:
    prepare_text("Grüße, мир, 世界, 🌍! " * 60, tmp_path, tokenizer="byte")
    train.main(tiny_settings(tmp_path, tmp_path / "run", learning_rate=0.01))
    assert load_file(tmp_path / "run" / BEST)["model.token_embedding.weight"].shape == (256, 16)
    train_losses, losses = rows(tmp_path / "run", "train"), rows(tmp_path / "run", "val")
    assert losses[-1]["loss"] < train_losses[0]["loss"] - 0.5
    assert losses[0]["bits_per_character"] > losses[0]["loss"] * 1.4427 * 1.3, "more than one byte per character"


def one_error(settings: TrainSettings, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Train as the script does; return the exit status and the only line on standard error."""
    with pytest.raises(SystemExit) as exit_info, exit_on_error():
        train.main(settings)
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", output.err)
    return exit_info.value.code, output.err


def test_missing_dataset_names_the_command_that_prepares_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, message = one_error(tiny_settings(tmp_path, tmp_path / "run", dataset="missing"), capsys)
    assert status == 1
    assert re.fullmatch(r"error: .*missing: no dataset here; .*python prepare\.py .*--name=missing.*\n", message)
    assert contents(tmp_path) == {}


def test_damaged_dataset_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = prepare_text(some_text(500), tmp_path) / "train-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    status, message = one_error(tiny_settings(tmp_path, tmp_path / "run"), capsys)
    assert status == 1
    assert re.fullmatch(rf"error: {shard}.*prepare the dataset again\n", message)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.device_count() > 99, reason="too many CUDA devices")
@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:0:0", ""])
def test_missing_device_is_rejected(
    device: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, message = one_error(tiny_settings(data_dir, tmp_path / "run", device=device), capsys)
    assert status == 2
    assert message.startswith(f"error: device = '{device}' is not on this machine; ")
    assert ": auto, cpu" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("sequences", "parts"), [(3, [3]), (12, [4, 4, 4]), (10, [2] * 5), (7, [1] * 7)])
def test_micro_batches_are_equal(sequences: int, parts: list[int]) -> None:
    trainer: Any = SimpleNamespace(settings=SimpleNamespace(batch_size=4))
    assert [len(part) for part in train.Trainer.micro_batches(trainer, torch.zeros(sequences, 9))] == parts


def test_the_pace_is_judged_after_every_step_and_may_end_the_run_earlier(data_dir: Path, tmp_path: Path) -> None:
    steps = []

    def revise(step: int, settings: TrainSettings) -> TrainSettings:
        steps.append(step)
        return settings.model_copy(update={"max_steps": 7}) if step == 5 else settings

    pace: Any = SimpleNamespace(revise=revise)
    settings = tiny_settings(data_dir, tmp_path)
    train.Trainer(settings, load_dataset(data_dir / "small", data_dir), CPU, None, pace).train()
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert saved_step(tmp_path) == 7
