"""Rows of metrics and samples, and the optional trackers."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import train
from conftest import contents, read_metrics, tiny_settings
from glyphgpt.errors import UsageError, UserError
from glyphgpt.training.metrics import METRICS, SAMPLES, JsonlWriter, Metrics, check_trackers, overfitting, read_rows


def test_rows_are_written_immediately(tmp_path: Path) -> None:
    metrics = Metrics(tiny_settings(tmp_path, tmp_path))
    metrics.open(keep_steps=-1)
    metrics.write("val", 0, loss=2.5)
    assert read_metrics(tmp_path) == [{"kind": "val", "step": 0, "loss": 2.5}]
    metrics.write("train", 1, loss=1 / 3, learning_rate=1e-300)
    assert read_metrics(tmp_path)[1:] == [{"kind": "train", "step": 1, "loss": 1 / 3, "learning_rate": 1e-300}]
    metrics.write_sample(1, "to be\n")
    assert (tmp_path / SAMPLES).read_text() == '{"step": 1, "text": "to be\\n"}\n'
    metrics.close()
    assert {file.name for file in tmp_path.iterdir()} == {METRICS, SAMPLES}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_become_null(tmp_path: Path, number: float) -> None:
    file = JsonlWriter(tmp_path / METRICS, keep_steps=-1)
    file.write({"kind": "train", "step": 1, "grad_norm": number})
    file.close()
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 1, "grad_norm": None}]


VALID_ROWS = [
    b'{"kind": "val", "step": 0, "loss": 2.50}\n',
    b'{"kind":"train",  "step": 3, "note": "\xc3\xbc"}\n',
    b'{"kind": "train", "step": 5}\n',
]


@pytest.mark.parametrize(
    "after",
    [
        b"",
        b'{"kind": "val", "step": 6}\n{"kind": "train", "step": 7}\n',
        b'{"kind": "train", "step": 4, "lo',
        b'{"kind": "train", "step": 4}',
        b"\0\0\0\0",
        b"\xff\xfe\xfa",
        b"\n",
        b'[1]\n"step"\n{"kind": "train"}\n',
        b'{"kind": "train", "step": "4"}\n{"kind": "train", "step": null}\n',
    ],
    ids=[
        "nothing",
        "later rows",
        "partial row",
        "no line end",
        "zeros",
        "not UTF-8",
        "empty line",
        "no step",
        "bad step",
    ],
)
def test_reopening_keeps_complete_rows_up_to_the_step(tmp_path: Path, after: bytes) -> None:
    (tmp_path / METRICS).write_bytes(b"".join(VALID_ROWS) + after)
    file = JsonlWriter(tmp_path / METRICS, keep_steps=5)
    file.write({"kind": "train", "step": 6})
    file.close()
    assert (tmp_path / METRICS).read_bytes() == b"".join([*VALID_ROWS, b'{"kind": "train", "step": 6}\n'])
    assert [file.name for file in tmp_path.iterdir()] == [METRICS]


def test_new_run_drops_all_rows(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(b"".join(VALID_ROWS))
    JsonlWriter(tmp_path / METRICS, keep_steps=-1).close()
    assert (tmp_path / METRICS).read_bytes() == b""


def test_silent_process_writes_nothing(tmp_path: Path) -> None:
    metrics = Metrics(tiny_settings(tmp_path, tmp_path), silent=True)
    metrics.open(keep_steps=-1)
    metrics.write("val", 0, loss=2.5)
    metrics.write_sample(0, "to be")
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_reading_ignores_a_partial_last_row(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1, "text": "a\u2028b", "loss": NaN}\n{"step": 2}\n{"step": 3}', "utf-8")
    assert read_rows(tmp_path / METRICS, dict) == [{"step": 1, "text": "a\u2028b", "loss": None}, {"step": 2}]


@pytest.mark.parametrize("content", [b"\xff\n", b"{\n", b"\n", b"7\n", b"[" * 10**5 + b"\n"])
def test_invalid_rows_are_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / METRICS).write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl: not as train.py writes it$"):
        read_rows(tmp_path / METRICS, dict)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_missing_tracker_names_the_install_command(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError) as error:
        check_trackers(tiny_settings(tmp_path, tmp_path, **{package: True}))
    assert str(error.value) == f"{package} = true needs {package}: pip install {package}"
    check_trackers(tiny_settings(tmp_path, tmp_path))


def test_wandb_receives_settings_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(id="abc", log=lambda row, step: calls.append((step, row)), finish=lambda: calls.append("end"))

    def init(**options: Any) -> SimpleNamespace:
        calls.append((options["project"], options["name"], options["config"]["n_embd"]))
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    settings = tiny_settings(tmp_path, tmp_path / "my_run", wandb=True, wandb_project="project")
    (tmp_path / "my_run").mkdir()
    metrics = Metrics(settings)
    metrics.open(keep_steps=-1)
    metrics.write("val", 3, loss=1.5, perplexity=4.0)
    metrics.close()
    assert calls == [("project", "my_run", 16), (3, {"val/loss": 1.5, "val/perplexity": 4.0}), "end"]
    assert read_metrics(tmp_path / "my_run") == [{"kind": "val", "step": 3, "loss": 1.5, "perplexity": 4.0}]


def test_tensorboard_receives_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    metrics = Metrics(tiny_settings(tmp_path, tmp_path, tensorboard=True))
    metrics.open(keep_steps=-1)
    metrics.write("train", 1, loss=2.0)
    metrics.write("train", 2, loss=1.5)
    metrics.write("val", 2, loss=1.75)
    metrics.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("val/loss")] == [(2, 1.75)]


def test_tensorboard_receives_the_rows_of_new_resumed_and_overwriting_runs(data_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    runs: list[tuple[int, dict[str, object]]] = [(20, {}), (30, {"resume": True}), (10, {"overwrite": True})]
    for max_steps, mode in runs:
        train.main(tiny_settings(data_dir, tmp_path, tensorboard=True, max_steps=max_steps, **mode))
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        for kind in ("train", "val"):
            rows = [(row["step"], row["loss"]) for row in read_metrics(tmp_path) if row["kind"] == kind]
            shown = [(event.step, event.value) for event in events.Scalars(f"{kind}/loss")]
            assert shown == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in rows]


def fake_wandb(monkeypatch: pytest.MonkeyPatch, **run: Any) -> list[dict[str, Any]]:
    """Replace the package wandb; return the list to which the options of each started run are appended."""
    started: list[dict[str, Any]] = []

    def init(**options: Any) -> SimpleNamespace:
        started.append(options)
        return SimpleNamespace(**{"id": options["id"] or "new", "log": print, "finish": print, **run})

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return started


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("api_key not configured\nand more")


def test_tracker_that_cannot_start_is_an_error_before_any_file_changes(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=2))
    before = contents(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fail))
    for mode in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match=r"^Weights & Biases cannot start: api_key not configured; log in"):
            train.main(tiny_settings(data_dir, tmp_path, max_steps=4, wandb=True, **mode))
        assert contents(tmp_path) == before


def test_resumed_run_keeps_its_wandb_id(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = fake_wandb(monkeypatch)
    for steps, mode in ((2, {}), (4, {"resume": True}), (2, {"overwrite": True})):
        train.main(tiny_settings(data_dir, tmp_path, max_steps=steps, wandb=True, **mode))
    assert [(options["id"], options["resume"]) for options in started] == [
        (None, "allow"),
        ("new", "allow"),
        (None, "allow"),
    ]


@pytest.mark.parametrize("call", ["log", "finish"])
def test_tracker_that_fails_later_only_causes_a_warning(
    call: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_wandb(monkeypatch, **{call: fail})
    train.main(tiny_settings(data_dir, tmp_path, max_steps=2, wandb=True))
    assert capsys.readouterr().err.count("warning: WeightsAndBiases ") == 1
    assert read_metrics(tmp_path)[-1]["step"] == 2


@pytest.mark.parametrize(
    ("val", "train", "found"),
    [
        ((2.0, 1.5, 1.6), (2.0, 1.5, 1.2), True),
        ((2.0, 1.5, 1.505), (2.0, 1.5, 1.2), False),  # noise
        ((2.0, 1.5, 1.4), (2.0, 1.5, 1.2), False),
        ((2.0, 1.5, 1.6), (2.0, 1.5, 1.7), False),  # the run diverges
        ((), (2.0, 1.5, 1.2), False),
        ((2.0, 1.5, 1.6), (), False),
    ],
)
def test_overfitting_is_a_rising_validation_loss_beside_a_falling_training_loss(
    val: tuple[float, ...], train: tuple[float, ...], found: bool
) -> None:
    rows = [
        {"kind": kind, "step": step, "loss": loss}
        for kind, losses in (("train", train), ("val", val))
        for number, loss in enumerate(losses, start=1)
        for step in (range(number * 100 - 99, number * 100 + 1) if kind == "train" else [number * 100])
    ]
    notice = overfitting(rows)
    assert bool(notice) == found
    if found:
        assert (
            "since step 200 the validation loss rose from 1.500 to 1.600, while the training loss fell from" in notice
        )


def test_a_rise_within_two_standard_errors_is_not_overfitting() -> None:
    rows = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "val", "step": 1, "loss": 1.5}]
    rows += [{"kind": "train", "step": 9, "loss": 1.0}, {"kind": "val", "step": 9, "loss": 1.6, "standard_error": 0.06}]
    assert overfitting(rows) == ""
    rows[-1]["standard_error"] = 0.04
    assert overfitting(rows) != ""
