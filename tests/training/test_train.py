"""What train.py promises: steps, checkpoints, metrics, reproducible numbers, and clear ends."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import contents, prepare_text, read_metrics, same_tensors, some_text, tiny_settings
from glyphgpt import checkpoint as checkpoints
from glyphgpt.cli import parse
from glyphgpt.data.batches import window_starts
from glyphgpt.data.dataset import load_dataset
from glyphgpt.errors import UserError
from glyphgpt.runtime import Runtime
from glyphgpt.settings import TrainSettings
from glyphgpt.training.evaluation import Score, evaluate_best
from model import GPT

CPU = Runtime(torch.device("cpu"), torch.float32)


def rows(out_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out_dir) if row["kind"] == kind]


def validation_losses(out_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(out_dir, "val")}


def last_tensors(out_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(out_dir / "last.safetensors")


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 steps with an evaluation every 10: the last step is no multiple of that."""
    out_dir = tmp_path_factory.mktemp("run")
    train.main(tiny_settings(data_dir, out_dir, max_steps=25, learning_rate=0.01, sample_tokens=30))
    return out_dir


@pytest.fixture(scope="module")
def restless(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose last evaluation is far from its best, as its learning rate rises too high."""
    out_dir = tmp_path_factory.mktemp("restless")
    train.main(tiny_settings(data_dir, out_dir, max_steps=60, learning_rate=3, warmup_steps=40, grad_clip=0))
    return out_dir


def test_a_run_does_exactly_max_steps_and_evaluates_and_saves_the_last(run: Path) -> None:
    last = checkpoints.load_checkpoint(run / "last.safetensors")
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 26))
    assert list(validation_losses(run)) == [0, 10, 20, 25]
    assert last.metadata.state.step == 25
    assert last.metadata.val_loss == validation_losses(run)[25]


def test_the_loss_goes_down(run: Path) -> None:
    training = [row["loss"] for row in rows(run, "train")]
    assert sum(training[-5:]) / 5 < sum(training[:5]) / 5 - 0.3
    assert validation_losses(run)[25] < validation_losses(run)[0] - 0.3


def test_best_holds_the_lowest_validation_loss_and_last_the_final_step(restless: Path) -> None:
    losses = validation_losses(restless)
    lowest = min(losses, key=losses.__getitem__)
    assert lowest < 60, "the run must be one in which best and last differ"
    best = checkpoints.load_checkpoint(restless / "best.safetensors")
    assert (best.metadata.state.step, best.metadata.val_loss, best.optimizer) == (lowest, losses[lowest], {})
    assert checkpoints.load_checkpoint(restless / "last.safetensors").metadata.state.step == 60


def test_eval_only_tells_the_loss_of_best_and_changes_nothing(
    restless: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(restless)
    best = min(rows(restless, "val"), key=lambda row: row["loss"])
    for batch_size in (4, 1, 64):
        train.main(tiny_settings(data_dir, restless, eval_only=True, batch_size=batch_size))
        shown = capsys.readouterr().out
        score = Score(best["loss"], best["bits_per_character"], best["perplexity"])
    assert shown.strip().endswith(f"best.safetensors: validation {score}")
    assert contents(restless) == before


def test_the_validation_loss_is_the_same_number_every_time(restless: Path, data_dir: Path) -> None:
    settings = tiny_settings(data_dir, restless)
    dataset = load_dataset(data_dir / "small", data_dir)
    scores = [evaluate_best(settings, dataset, CPU) for _ in range(2)]
    assert scores[0] == scores[1]
    assert scores[0].loss == min(validation_losses(restless).values())


def test_eval_only_without_a_run_or_with_another_vocabulary_says_so(restless: Path, tmp_path: Path) -> None:
    prepare_text(some_text(1000).upper(), tmp_path)
    with pytest.raises(UserError, match=r"best\.safetensors: no such checkpoint"):
        train.main(tiny_settings(tmp_path, tmp_path / "nothing", eval_only=True))
    with pytest.raises(UserError, match="have different vocabularies") as failure:
        train.main(tiny_settings(tmp_path, restless, eval_only=True))
    assert str(restless) in str(failure.value)
    assert str(tmp_path / "small") in str(failure.value)


def test_summary_shows_the_network_and_writes_nothing(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(tiny_settings(data_dir, tmp_path / "run", summary=True))
    shown = capsys.readouterr().out
    assert "4 x 16 x 16" in shown
    assert "6,880" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_run_says_first_what_it_means(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=0, gradient_accumulation_steps=3))
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"{tmp_path}: 6,880 parameters on cpu, float32; 192 tokens a step, 0 steps")


def test_the_saved_config_reproduces_the_run(run: Path, tmp_path: Path) -> None:
    words = [str(run / "config.toml"), f"--out_dir={tmp_path}"]
    settings, _ = parse(TrainSettings, words, "", "", files=True)
    train.main(settings)
    assert same_tensors(run, tmp_path)
    assert same_tensors(run, tmp_path, "best.safetensors")
    assert validation_losses(run) == validation_losses(tmp_path)


def test_showing_samples_does_not_change_training(data_dir: Path, tmp_path: Path) -> None:
    for dropout in (0.0, 0.2):
        for length in (0, 30):
            out_dir = tmp_path / f"{dropout}-{length}"
            train.main(tiny_settings(data_dir, out_dir, dropout=dropout, sample_tokens=length))
        assert same_tensors(tmp_path / f"{dropout}-0", tmp_path / f"{dropout}-30")


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_seed_decides_a_run(dropout: float, data_dir: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        torch.manual_seed(len(name))  # the caller's random state has no say
        train.main(tiny_settings(data_dir, tmp_path / name, dropout=dropout, seed=seed, max_steps=5))
    assert same_tensors(tmp_path / "one", tmp_path / "again")
    assert not same_tensors(tmp_path / "one", tmp_path / "other")


def test_dropout_acts_while_training_and_not_at_evaluation(data_dir: Path, tmp_path: Path) -> None:
    for dropout in (0.0, 0.2):
        train.main(tiny_settings(data_dir, tmp_path / str(dropout), dropout=dropout, max_steps=3))
    without, with_it = tmp_path / "0.0", tmp_path / "0.2"
    assert validation_losses(without)[0] == validation_losses(with_it)[0]
    assert rows(without, "train")[0]["loss"] != rows(with_it, "train")[0]["loss"]


def test_dropout_is_another_at_every_step(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batch over and over, under weights that hardly move: only dropout can change the loss."""
    settings = tiny_settings(data_dir, tmp_path, dropout=0.5, learning_rate=1e-12, min_lr=0, max_steps=5)
    same_batch = train.Trainer(settings, load_dataset(data_dir / "small", data_dir), CPU).next_batch()
    monkeypatch.setattr(train.Trainer, "next_batch", lambda _: same_batch)
    train.main(settings)
    assert len({round(row["loss"], 4) for row in rows(tmp_path, "train")}) == 5


@pytest.mark.parametrize("processes", [1, 2, 6])
def test_steps_walk_through_the_text_and_processes_share_each(processes: int, data_dir: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data_dir, tmp_path, gradient_accumulation_steps=3)
    dataset = load_dataset(data_dir / "small", data_dir)
    trainers = [
        train.Trainer(settings, dataset, Runtime(torch.device("cpu"), torch.float32, rank, processes))
        for rank in range(processes)
    ]
    seen = []
    for step in range(40):
        for trainer in trainers:
            trainer.state.step = step
            seen.append(trainer.next_batch())
    starts = window_starts(dataset.train.tokens, 16, settings.seed, first=0, count=40 * 12)
    assert torch.equal(torch.cat(seen), trainers[0].train_windows.read(starts, 17))


def test_accumulated_batches_equal_one_large_batch(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path / "large", batch_size=12, max_steps=8))
    train.main(tiny_settings(data_dir, tmp_path / "small", batch_size=4, gradient_accumulation_steps=3, max_steps=8))
    large, small = last_tensors(tmp_path / "large"), last_tensors(tmp_path / "small")
    for name in large:
        torch.testing.assert_close(small[name], large[name], rtol=0, atol=1e-5, msg=name)
    for one, other in zip(rows(tmp_path / "large", "train"), rows(tmp_path / "small", "train"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["tokens"] == other["tokens"]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9])
def test_a_share_in_uneven_parts_has_the_gradients_of_the_whole(
    batch_size: int, data_dir: Path, tmp_path: Path
) -> None:
    gradients, losses = [], []
    for size in (batch_size, 10):
        settings = tiny_settings(data_dir, tmp_path, batch_size=size)
        trainer = train.Trainer(settings, load_dataset(data_dir / "small", data_dir), CPU)
        trainer.forward = trainer.make_forward()
        sequences = trainer.train_windows.read(torch.arange(10).numpy() * 31, 17)
        losses.append(trainer.backward(sequences))
        gradients.append([parameter.grad for parameter in trainer.model.parameters()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", {1: 1 / 3, 2: 2 / 3, 3: 1, 12: 1, 22: 1}),
        ("linear", {1: 1 / 3, 2: 2 / 3, 3: 1, 13: 0.55, 22: 0.145}),
        ("cosine", {1: 1 / 3, 2: 2 / 3, 3: 1, 13: 0.55, 22: 0.10554}),
    ],
)
def test_the_learning_rate_follows_the_schedule(
    schedule: str, rates: dict[int, float], data_dir: Path, tmp_path: Path
) -> None:
    train.main(
        tiny_settings(
            data_dir, tmp_path, schedule=schedule, learning_rate=0.01, min_lr=0.001, max_steps=22, eval_every=22
        )
    )
    used = {row["step"]: row["learning_rate"] for row in rows(tmp_path, "train")}
    assert {step: used[step] for step in rates} == pytest.approx(
        {step: 0.01 * share for step, share in rates.items()}, rel=1e-4
    )


def test_the_scheduled_learning_rate_is_the_one_applied(data_dir: Path, tmp_path: Path) -> None:
    """AdamW's first update moves a weight by the learning rate, or less where the gradient is next to nothing."""
    settings = tiny_settings(data_dir, tmp_path, max_steps=1, warmup_steps=9, weight_decay=0)
    untrained = train.Trainer(settings, load_dataset(data_dir / "small", data_dir), CPU).model.state_dict()
    train.main(settings)
    moved = last_tensors(tmp_path)["model.token_embedding.weight"] - untrained["token_embedding.weight"]
    assert moved.abs().max().item() == pytest.approx(settings.learning_rate / 10, rel=1e-2)


def test_grad_clip_limits_the_gradient_and_0_leaves_it_alone(data_dir: Path, tmp_path: Path) -> None:
    for limit in (0, 1e9, 0.01):
        train.main(tiny_settings(data_dir, tmp_path / str(limit), grad_clip=limit, max_steps=1))
    assert same_tensors(tmp_path / "0", tmp_path / str(1e9))
    assert not same_tensors(tmp_path / "0", tmp_path / "0.01")
    norm = rows(tmp_path / "0.01", "train")[0]["grad_norm"]
    assert norm == rows(tmp_path / "0", "train")[0]["grad_norm"] > 0.1
    name = "optimizer.AdamW.token_embedding.weight.exp_avg"
    unclipped, clipped = last_tensors(tmp_path / "0")[name], last_tensors(tmp_path / "0.01")[name]
    torch.testing.assert_close(clipped, unclipped * (0.01 / norm), rtol=1e-3, atol=1e-9)


def test_no_steps_at_all_still_evaluates_and_saves(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=0))
    assert list(validation_losses(tmp_path)) == [0]
    assert rows(tmp_path, "train") == []
    for name in ("best.safetensors", "last.safetensors"):
        assert checkpoints.load_checkpoint(tmp_path / name).metadata.state.step == 0


def test_patience_stops_early_and_says_so(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny_settings(
        data_dir, tmp_path, patience=2, learning_rate=1.0, grad_clip=0, max_steps=500, eval_every=5
    )
    train.main(settings)
    losses = validation_losses(tmp_path)
    best = min(losses, key=losses.__getitem__)
    stopped = checkpoints.load_checkpoint(tmp_path / "last.safetensors").metadata.state.step
    assert stopped == best + 2 * 5 < 500
    assert list(losses)[-1] == stopped
    assert f"stopped early at step {stopped}: no better loss in 2 evaluations" in capsys.readouterr().out
    before = (tmp_path / "last.safetensors").read_bytes()
    train.main(settings.model_copy(update={"resume": True}))
    assert (tmp_path / "last.safetensors").read_bytes() == before


def test_metrics_have_the_documented_keys(run: Path) -> None:
    both = {"kind", "step", "loss", "tokens", "seconds"}
    for row in rows(run, "train"):
        assert row.keys() == both | {"grad_norm", "learning_rate"}
        assert row["tokens"] == row["step"] * 64
    for row in rows(run, "val"):
        assert row.keys() == both | {"bits_per_character", "perplexity"}
        assert row["perplexity"] == pytest.approx(2 ** row["bits_per_character"])
        assert row["perplexity"] == pytest.approx(2.718281828459045 ** row["loss"])


def test_log_every_thins_out_the_training_rows(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path, log_every=6))
    assert [row["step"] for row in rows(tmp_path, "train")] == [6, 12, 18]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_before_the_update(
    fault: str, run: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(data_dir, tmp_path, max_steps=25, learning_rate=0.01, sample_tokens=30)
    healthy = train.Trainer.backward

    def gradients(trainer: train.Trainer, sequences: torch.Tensor) -> float:
        loss = healthy(trainer, sequences)
        if trainer.state.step == 12:
            if fault == "loss":
                return float("nan")
            for parameter in trainer.model.parameters():
                parameter.grad = torch.full_like(parameter, torch.inf)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "backward", gradients)
        with pytest.raises(
            UserError, match=r"step 13: .*not finite.*lower learning_rate or raise warmup_steps"
        ) as failure:
            train.main(settings)
    assert failure.value.status == 1
    assert "\n" not in str(failure.value)
    assert checkpoints.load_checkpoint(tmp_path / "last.safetensors").metadata.state.step == 10
    assert checkpoints.load_checkpoint(tmp_path / "best.safetensors").metadata.state.step == 10
    train.main(settings.model_copy(update={"resume": True}))
    assert same_tensors(run, tmp_path)


@pytest.mark.parametrize("eval_every", [10, 1])
def test_a_run_that_explodes_keeps_checkpoints_to_go_on_from(eval_every: int, data_dir: Path, tmp_path: Path) -> None:
    explosive = tiny_settings(data_dir, tmp_path, learning_rate=1e30, grad_clip=0, eval_every=eval_every)
    with pytest.raises(UserError, match="learning_rate"):
        train.main(explosive)
    train.main(tiny_settings(data_dir, tmp_path, eval_every=eval_every, resume=True))
    assert validation_losses(tmp_path)[20] < validation_losses(tmp_path)[0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 80 GB"),
    ],
    ids=["cuda", "python", "cpu"],
)
def test_running_out_of_memory_names_settings_to_lower(
    error: Exception, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object) -> None:
        raise error

    monkeypatch.setattr(GPT, "forward", forward)
    with pytest.raises(UserError, match=r"^out of memory; lower batch_size .*block_size or n_embd$"):
        train.main(tiny_settings(data_dir, tmp_path))


def test_other_errors_are_not_taken_for_a_lack_of_memory(
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
def test_compilation_that_fails_falls_back_to_eager_with_one_warning(
    moment: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nand a long story")

    def compile_to_failure(model: torch.nn.Module, **_: object) -> torch.nn.Module:
        wrapped = torch.nn.Sequential(model)
        wrapped.forward = fail  # type: ignore[method-assign]
        return wrapped

    monkeypatch.setattr(torch, "compile", fail if moment == "compile" else compile_to_failure)
    train.main(tiny_settings(data_dir, tmp_path / "compiled", compile=True, max_steps=5))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: torch.compile failed (no C++ compiler); training without it, which is slower"]
    train.main(tiny_settings(data_dir, tmp_path / "eager", compile=False, max_steps=5))
    assert same_tensors(tmp_path / "compiled", tmp_path / "eager")


def test_a_compiled_model_is_trained_and_saved_under_plain_names(
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
    assert Compiled.calls == 1 + 5  # the trial, and five steps
    assert same_tensors(tmp_path / "compiled", tmp_path / "eager")


def test_a_text_shorter_than_a_window_is_refused_with_advice_that_works(tmp_path: Path) -> None:
    prepare_text(some_text(200), tmp_path)
    with pytest.raises(UserError, match=r"180 training tokens .* lower block_size to at most 179"):
        train.main(tiny_settings(tmp_path, tmp_path / "run", block_size=180))
    train.main(tiny_settings(tmp_path, tmp_path / "run", block_size=179, max_steps=2))
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == [1, 2]


def test_a_short_validation_text_gets_a_warning_and_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_text(some_text(200), tmp_path)
    train.main(tiny_settings(tmp_path, tmp_path / "run", block_size=20))
    assert "warning: the validation split has only 20 tokens" in capsys.readouterr().err
    train.main(tiny_settings(tmp_path, tmp_path / "longer", block_size=19))
    assert "warning" not in capsys.readouterr().err
    assert validation_losses(tmp_path / "run").keys() == {0, 10, 20}


def test_bytes_of_many_scripts_train_too(tmp_path: Path) -> None:
    prepare_text("Grüße, мир, 世界, 🌍! " * 60, tmp_path, tokenizer="byte")
    train.main(tiny_settings(tmp_path, tmp_path / "run", learning_rate=0.01))
    assert load_file(tmp_path / "run" / "best.safetensors")["model.token_embedding.weight"].shape == (256, 16)
    losses = rows(tmp_path / "run", "val")
    assert losses[-1]["loss"] < losses[0]["loss"] - 0.5
    assert losses[0]["bits_per_character"] > losses[0]["loss"] * 1.4427 * 1.3, "more than one byte a character"
