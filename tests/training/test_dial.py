"""The dial chooses valid settings around the given ones, for the machine and the time, and runs keep to their time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from conftest import read_metrics, same_tensors, saved_step, tiny_settings
from glyphgpt.cli import parse
from glyphgpt.data.dataset import Dataset
from glyphgpt.errors import UsageError, UserError
from glyphgpt.files import CONFIG
from glyphgpt.runtime import Runtime
from glyphgpt.settings import TrainSettings
from glyphgpt.training import dial as dial_module
from glyphgpt.training.dial import (
    MANY_NGRAM_ROWS,
    MAX_EPOCHS,
    NGRAM_ROWS,
    TOLERANCE,
    WEIGHTS_PER_TOKEN,
    Costs,
    Dial,
    Pace,
    weights,
)
from glyphgpt.training.run import resume_after_restart

CPU = Runtime(torch.device("cpu"), torch.float32)
START_SECONDS = 2.0


@pytest.fixture(autouse=True)
def fixed_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the program two seconds ago."""
    monkeypatch.setattr(dial_module, "seconds_since_start", lambda: START_SECONDS)


def a_text(tokens: int, vocab_size: int = 65, record_size: int = 0) -> Dataset:
    ends = np.arange(0, tokens, record_size) if record_size else None
    val = SimpleNamespace(tokens=max(2, tokens // 9))
    tokenizer = SimpleNamespace(vocab_size=vocab_size, kind="char" if vocab_size < 10_000 else "gpt2")
    train = SimpleNamespace(tokens=tokens, record_ends=ends)
    return cast("Dataset", SimpleNamespace(train=train, val=val, tokenizer=tokenizer))


def machine(speed: float = 1.0, **factors: Callable[[TrainSettings], float]) -> Callable[[TrainSettings, float], Costs]:
    """Return a measurement of a machine, whose steps take as long as two cores of a Xeon take divided by `speed`."""

    def measure(settings: TrainSettings, _seconds: float) -> Costs:
        token_seconds = (5e-6 + weights(settings) * 3e-11) / speed
        for factor in factors.values():
            token_seconds *= factor(settings)
        return Costs(step=0.01 / speed + settings.tokens_per_step * token_seconds, eval_token=token_seconds / 4)

    return measure


def choose(
    minutes: float, tokens: int, measure: Callable[[TrainSettings, float], Costs] | None = None, **values: Any
) -> TrainSettings:
    settings = TrainSettings.model_validate({"minutes": minutes, **values})
    return Dial(settings, a_text(tokens, values.pop("vocab_size", 65)), CPU, measure or machine()).choose()


GIVEN: dict[str, st.SearchStrategy[Any]] = {
    "n_layer": st.integers(1, 8),
    "n_head": st.integers(1, 8),
    "n_embd": st.sampled_from([30, 64, 96, 250]),
    "block_size": st.integers(1, 300),
    "batch_size": st.integers(1, 64),
    "tie_embeddings": st.booleans(),
    "init": st.sampled_from(["gpt2", "zero"]),
    "optimizer": st.sampled_from(["adamw", "muon"]),
    "position": st.sampled_from(["learned", "sinusoidal", "rotary"]),
    "learning_rate": st.floats(1e-4, 0.1),
    "weight_decay": st.floats(0, 1),
    "eval_every": st.integers(1, 100),
    "eval_tokens": st.integers(0, 1000),
    "threads": st.integers(1, 4),
    "compile": st.booleans(),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
}


@given(
    minutes=st.floats(0.05, 600),
    tokens=st.integers(300, 10**9),
    vocab_size=st.integers(2, 60_000),
    speed=st.floats(0.1, 1000),
    given_values=st.fixed_dictionaries({}, optional=GIVEN),
)
def test_settings_are_valid_respect_the_given_ones_and_fit_into_the_time(
    *, minutes: float, tokens: int, vocab_size: int, speed: float, given_values: dict[str, Any]
) -> None:
    try:
        settings = TrainSettings.model_validate({"minutes": minutes, **given_values})
        measure = machine(speed)
        chosen = Dial(settings, a_text(tokens, vocab_size), CPU, measure).choose()
    except UsageError:  # only sizes that cannot go together
        assert {"n_head", "n_embd", "init", "tie_embeddings"} & given_values.keys()
        return
    assert {key: getattr(chosen, key) for key in given_values} == given_values
    assert TrainSettings.model_validate(chosen.model_dump()) == chosen
    assert list(chosen.conflicts()) == []
    assert chosen.block_size < tokens or "block_size" in given_values
    assert chosen.max_steps * chosen.tokens_per_step <= MAX_EPOCHS * tokens + chosen.tokens_per_step
    if chosen.max_steps > 1:
        assert START_SECONDS + chosen.max_steps * measure(chosen, 0).step <= minutes * 60


@given(minutes=st.floats(0.1, 100), factor=st.floats(1, 20), tokens=st.integers(10**4, 10**8))
def test_more_time_or_a_faster_machine_never_means_a_smaller_network(
    minutes: float, factor: float, tokens: int
) -> None:
    size = weights(choose(minutes, tokens))
    assert weights(choose(minutes * factor, tokens)) >= size
    assert weights(choose(minutes, tokens, machine(factor))) >= size


def test_a_small_text_is_read_a_few_times_and_a_large_one_once() -> None:
    small, large = choose(10, 20_000), choose(10, 10**9)
    assert small.max_steps * small.tokens_per_step == pytest.approx(MAX_EPOCHS * 20_000, rel=0.01)
    assert large.max_steps * large.tokens_per_step < 10**9
    assert small.weight_decay > large.weight_decay
    assert small.tokens_per_step < large.tokens_per_step
    assert weights(small) <= WEIGHTS_PER_TOKEN * 20_000 < weights(choose(10, 10**9, machine(10)))


@pytest.mark.parametrize(("record_size", "context"), [(0, 128), (20, 128), (200, 200), (256, 256), (300, 128)])
def test_context_holds_records_that_are_not_much_longer(record_size: int, context: int) -> None:
    settings, text = TrainSettings(minutes=0.2), a_text(10**6, record_size=record_size)
    assert Dial(settings, text, CPU, machine()).choose().block_size == context


def test_steps_on_a_small_text_are_as_small_as_the_time_allows() -> None:
    short, long = choose(0.12, 40_000), choose(1, 40_000)
    assert short.tokens_per_step > long.tokens_per_step
    for settings in (short, long):
        assert settings.max_steps * settings.tokens_per_step >= MAX_EPOCHS / 2 * 40_000


def test_the_learning_rate_falls_with_the_number_of_steps() -> None:
    short, long = choose(0.1, 10**8), choose(60, 10**8)
    assert short.max_steps < long.max_steps
    assert short.learning_rate > 2 * long.learning_rate


@pytest.mark.parametrize(
    ("tokens", "cost", "rows"), [(10**8, 1.05, MANY_NGRAM_ROWS), (10**8, 1.3, NGRAM_ROWS), (10**6, 1.05, NGRAM_ROWS)]
)
def test_ngram_tables_are_large_for_much_text_where_that_costs_little(tokens: int, cost: float, rows: int) -> None:
    measure = machine(100, rows=lambda settings: cost if settings.ngram_rows > NGRAM_ROWS else 1.0)
    assert choose(30, tokens, measure).ngram_rows == rows


@pytest.mark.parametrize("better", [1, 2])
def test_the_faster_number_of_threads_is_chosen(better: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    busy = machine(threads=lambda settings: 1.0 if (settings.threads or 2) == better else 3.0)
    assert choose(1, 10**6, busy).threads == better


@pytest.mark.parametrize(("factor", "dtype"), [(0.5, "float32"), (2.0, "bfloat16")])
def test_the_faster_precision_is_chosen(factor: float, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glyphgpt.runtime.choose_dtype", lambda *_: torch.bfloat16)
    emulated = machine(dtype=lambda settings: factor if settings.dtype == "float32" else 1.0)
    assert choose(1, 10**6, emulated).dtype == dtype


@pytest.mark.parametrize(("minutes", "factor", "compiled"), [(0.2, 0.5, False), (5, 0.5, True), (5, 1.1, False)])
def test_the_model_is_compiled_where_that_pays(
    minutes: float, factor: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/g++")
    measure = machine(compile=lambda settings: factor if settings.compile is True else 1.0)
    assert choose(minutes, 10**6, measure).compile is compiled


@pytest.mark.parametrize(("start", "compiled"), [(1.0, True), (3.3, False)])
def test_a_machine_that_starts_slowly_does_not_compile_in_a_short_run(
    start: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/g++")
    monkeypatch.setattr(dial_module, "seconds_since_start", lambda: start)
    measure = machine(compile=lambda settings: 0.6 if settings.compile is True else 1.0)
    assert choose(0.8, 10**6, measure).compile is compiled


def test_nothing_is_compiled_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert (
        choose(60, 10**6, machine(compile=lambda settings: 0.5 if settings.compile is True else 1.0)).compile is False
    )


def test_a_network_that_does_not_fit_into_memory_is_not_chosen() -> None:
    def measure(settings: TrainSettings, seconds: float) -> Costs:
        if settings.n_embd > 192:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return machine(100)(settings, seconds)

    assert choose(60, 10**9, machine(100)).n_embd > 192
    assert choose(60, 10**9, measure).n_embd == 192


def test_other_errors_of_a_measurement_are_raised() -> None:
    def measure(_settings: TrainSettings, _seconds: float) -> Costs:
        raise RuntimeError("some other error")

    with pytest.raises(RuntimeError, match="some other error"):
        choose(60, 10**9, measure)


def test_a_text_shorter_than_the_given_context_is_an_error(data_dir: Path, tmp_path: Path) -> None:
    settings = TrainSettings(minutes=1, dataset="small", data_dir=str(data_dir), out_dir=str(tmp_path), block_size=9999)
    with pytest.raises(UserError, match=r"training tokens do not fill a window .* lower block_size to at most"):
        train.main(settings)


def test_a_given_number_of_steps_is_kept() -> None:
    settings = TrainSettings(minutes=1, max_steps=7)
    dial = Dial(settings, a_text(10**6), CPU, machine())
    assert dial.choose().max_steps == 7
    assert dial.pace() is None


def step_times(early: float, late: float, change_at: float) -> Iterator[float]:
    """Yield the times at which steps end if they take `early` seconds, and `late` seconds from `change_at` on."""
    now = START_SECONDS
    while True:
        now += early if now < change_at else late
        yield now


@pytest.mark.parametrize("late", [0.02, 0.04, 0.05, 0.08, 0.2])
@pytest.mark.parametrize("change_at", [0, 10, 30])
def test_a_run_keeps_to_its_time_when_the_machine_changes(
    late: float, change_at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute is planned with steps of 0.05 seconds. Up to half of it, they may become four times as slow."""
    settings = TrainSettings(minutes=1, max_steps=1100, eval_every=1100)
    pace = Pace(CPU, settings, end=57.0, evaluation=0.5, most_steps=10**6)
    for step, now in enumerate(step_times(0.05, late, change_at), start=1):
        monkeypatch.setattr(dial_module, "seconds_since_start", lambda now=now: now)
        settings = pace.revise(step, settings)
        if step >= settings.max_steps:
            break
    assert settings.eval_every == settings.max_steps, "evaluated at the end only, as planned"
    assert 54 * (1 - TOLERANCE) < now < 60


def test_planned_evaluations_do_not_change_the_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 0.05 seconds, and each of five evaluations 3 seconds."""
    settings = TrainSettings(minutes=1, max_steps=800, eval_every=160)
    pace = Pace(CPU, settings, end=2 + 800 * 0.05 + 4 * 3, evaluation=3, most_steps=10**6)
    for step in range(1, 801):
        now = START_SECONDS + step * 0.05 + (step - 1) // 160 * 3
        monkeypatch.setattr(dial_module, "seconds_since_start", lambda now=now: now)
        assert pace.revise(step, settings) is settings, step


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--minutes=1 --resume", "minutes is for new runs; to train a run longer, use --resume with a larger"),
        ("--minutes=1 --eval_only", "minutes and eval_only contradict each other"),
        ("--minutes=0.01", "minutes = 0.01 is too short to start; use at least 0.05"),
        ("--minutes=-1", "--minutes must be a number, at least 0"),
    ],
)
def test_contradictions_are_usage_errors(flags: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(TrainSettings, flags.split(), "", "", files=True)


def test_a_timed_run_is_an_ordinary_run(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config.toml repeats it, to the last bit, and it resumes like any other."""
    monkeypatch.undo()
    flags = f"--minutes=60 --compile=False --dataset=small --data_dir={data_dir} --out_dir={tmp_path} "
    flags += "--n_layer=2 --n_embd=16 --block_size=16 --ngram_rows=100 --sample_tokens=0 --device=cpu --threads=1"
    settings, _ = parse(TrainSettings, flags.split(), "", "", files=True)
    train.main(settings)
    output = capsys.readouterr().out
    assert output.splitlines()[1].startswith("60 minutes for 5,400 tokens, vocabulary 25")
    assert f"steps:   {saved_step(tmp_path)} of" in output
    repeated, _ = parse(TrainSettings, [str(tmp_path / CONFIG), "--out_dir", f"{tmp_path}/again"], "", "", files=True)
    assert repeated.minutes == 0
    train.main(repeated)
    assert same_tensors(tmp_path, tmp_path / "again")
    losses = [row["loss"] for row in read_metrics(tmp_path) if row["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5


def test_a_timed_run_that_torchrun_restarts_keeps_its_settings(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    train.main(tiny_settings(data_dir, tmp_path, max_steps=3, learning_rate=0.007))
    again = TrainSettings(minutes=5, n_layer=2, out_dir=str(tmp_path), data_dir=str(data_dir))
    resumed = resume_after_restart(again, CPU)
    assert (resumed.minutes, resumed.resume) == (0, True)
    assert (resumed.max_steps, resumed.learning_rate, resumed.out_dir) == (3, 0.007, str(tmp_path))


@pytest.mark.parametrize(
    ("minutes", "tokens", "vocab_size", "hint"),
    [(1, 10**6, 65, True), (1, 10**8, 200, True), (600, 10**6, 65, False), (1, 2 * 10**5, 65, False),
     (1, 10**6, 3000, False), (1, 10**6, 50_257, False)],
)  # fmt: skip
def test_bpe_is_suggested_for_more_text_than_time(minutes: float, tokens: int, vocab_size: int, hint: bool) -> None:
    settings = TrainSettings.model_validate({"minutes": minutes})
    dial = Dial(settings, a_text(tokens, vocab_size), CPU, machine())
    dial.choose()
    assert ("--tokenizer=bpe" in dial.description()) == hint
