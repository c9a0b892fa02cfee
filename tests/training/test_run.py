"""A run's folder is never lost or mixed with another run, and a run resumes only with a network and data that fit."""

import errno
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.numpy import save_file

import train
from conftest import (
    as_flags,
    assert_same_run,
    contents,
    prepare_text,
    read_metrics,
    saved_step,
    script,
    some_text,
    tiny_settings,
)
from glyphgpt.checkpoint import TrainState, load_checkpoint
from glyphgpt.errors import UsageError, UserError
from glyphgpt.files import BEST, CONFIG, LAST, LOCK, NEW, PLOT, READY
from glyphgpt.reports.plot import write_plot
from glyphgpt.runtime import Runtime
from glyphgpt.training.metrics import METRICS, SAMPLES
from glyphgpt.training.run import Run, outcome

CPU = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def uninterrupted(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train 20 steps without interruption."""
    out_dir = tmp_path_factory.mktemp("uninterrupted")
    train.main(tiny_settings(data_dir, out_dir))
    return out_dir


# Starting a run in a folder


def test_existing_run_is_not_replaced(uninterrupted: Path, data_dir: Path) -> None:
    before = contents(uninterrupted)
    done = script("train.py", *as_flags(tiny_settings(data_dir, uninterrupted, seed=2, n_layer=1)))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {uninterrupted} already holds a run; continue it: python train.py --resume {uninterrupted}; or add "
        "--overwrite to replace it, or --out_dir=ANOTHER\n"
    )
    assert contents(uninterrupted) == before


def test_a_folder_with_a_run_is_refused_before_the_machine_is_measured(
    uninterrupted: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with pytest.raises(UsageError, match="already holds a run"):
        train.main(tiny_settings(data_dir, uninterrupted, minutes=1.0))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mode", [{}, {"overwrite": True}], ids=str)
def test_a_run_does_not_mix_with_a_dataset(mode: dict[str, bool], data_dir: Path) -> None:
    before = contents(data_dir / "small")
    with pytest.raises(UsageError, match=r"small is a dataset; choose another --out_dir$"):
        train.main(tiny_settings(data_dir, data_dir / "small", **mode))
    assert contents(data_dir / "small") == before


def test_the_utilization_is_the_median_of_the_last_updates(data_dir: Path, tmp_path: Path) -> None:
    settings, runtime = tiny_settings(data_dir, tmp_path, log_every=10**9), Runtime(torch.device("cpu"), torch.float32)
    run = Run(settings, runtime, seconds_at_peak=0.5)
    assert run.utilization() == {}
    run.times.extend([0.0, 100.0, 101.0, 103.0, 105.0])
    assert run.utilization() == {"mfu": 0.25}
    run.times.extend([*range(200, 300), *range(300, 405, 5)])  # 20 updates of 5 seconds after 100 of one
    assert run.utilization() == {"mfu": 0.1}
    assert Run(settings, runtime).utilization() == {}


def test_a_run_says_where_it_resumes(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=2))
    assert "resumed after" not in capsys.readouterr().out
    train.main(tiny_settings(data_dir, tmp_path, max_steps=3, resume=True))
    assert "\nresumed after step 2 of 3\n" in capsys.readouterr().out


def test_a_run_is_not_resumed_with_fewer_steps_than_it_has_done(uninterrupted: Path, data_dir: Path) -> None:
    before = contents(uninterrupted)
    with pytest.raises(UsageError, match=r"has done 20 steps already; max_steps must be at least 20, not 19$"):
        train.main(tiny_settings(data_dir, uninterrupted, resume=True, max_steps=19))
    assert contents(uninterrupted) == before


@pytest.mark.parametrize("name", [BEST, LAST])
def test_single_checkpoint_counts_as_a_run(name: str, uninterrupted: Path, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    with pytest.raises(UsageError, match="already holds a run"):
        train.main(tiny_settings(data_dir, tmp_path))
    assert contents(tmp_path) == {name: (uninterrupted / name).read_bytes(), LOCK: b""}


def test_overwrite_replaces_only_the_run(uninterrupted: Path, data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path, n_layer=1, max_steps=50, seed=2))
    (tmp_path / "notes.txt").write_text("notes", encoding="utf-8")
    train.main(tiny_settings(data_dir, tmp_path, overwrite=True))
    assert_same_run(uninterrupted, tmp_path)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "notes"


def test_rejected_settings_keep_the_run_to_be_overwritten(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=2))
    before = contents(tmp_path)
    for changes in ({"block_size": 100_000}, {"device": "cuda:99"}, {"dataset": "none"}):
        with pytest.raises(UserError):
            train.main(tiny_settings(data_dir, tmp_path, overwrite=True, **changes))
    assert contents(tmp_path) == before


def test_out_dir_that_cannot_be_created_is_an_error(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text", encoding="utf-8")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=rf"^{out_dir}: could not be written: [^\n]*$"):
            train.main(tiny_settings(data_dir, out_dir))
    assert contents(tmp_path) == {"file": b"text"}


def test_split_shorter_than_a_window_is_rejected_with_the_largest_block_size(tmp_path: Path) -> None:
    prepare_text(some_text(200), tmp_path)
    with pytest.raises(UserError, match=r"180 training tokens .* lower block_size to at most 179"):
        train.main(tiny_settings(tmp_path, tmp_path / "run", block_size=180))
    train.main(tiny_settings(tmp_path, tmp_path / "run", block_size=179, max_steps=2))
    assert saved_step(tmp_path / "run") == 2


def test_short_validation_split_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_text(some_text(200), tmp_path)
    train.main(tiny_settings(tmp_path, tmp_path / "run", block_size=20))
    assert "warning: the validation split has only 20 tokens" in capsys.readouterr().err
    assert saved_step(tmp_path / "run") == 20
    train.main(tiny_settings(tmp_path, tmp_path / "shorter", block_size=19))
    assert "warning" not in capsys.readouterr().err


# Failures while saving


def fail_at(call: int, function: Callable[..., object]) -> Callable[..., object]:
    """Return the function with one failing call, which finds the disk full."""
    calls = 0

    def fail_once(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments)

    return fail_once


SAVED = {2: {LAST: 0}, 3: {BEST: 10, LAST: 0}, 4: {BEST: 10, LAST: 10}, 5: {BEST: 20, LAST: 10}}
"""The steps of a run's checkpoints before each save but the first, which is of last.safetensors at step 0."""


@pytest.mark.parametrize("save", SAVED, ids=["best at 10", "last at 10", "best at 20", "last at 20"])
@pytest.mark.parametrize("function", ["save_file", "fsync"])
def test_run_resumes_from_the_previous_checkpoint_after_a_full_disk(
    function: str, save: int, uninterrupted: Path, data_dir: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(data_dir, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        if function == "save_file":
            patch.setattr("glyphgpt.checkpoint.save_file", fail_at(save, save_file))
        else:  # each save calls it for the file and for its folder
            patch.setattr(os, "fsync", fail_at(2 * save - 1, os.fsync))
        with pytest.raises(UserError, match=r"could not be written: No space left on device") as caught:
            train.main(settings)
    assert caught.value.status == 1
    steps = {name: saved_step(tmp_path, name) for name in (BEST, LAST) if (tmp_path / name).exists()}
    assert steps == SAVED[save]
    failed = BEST if save % 2 == 0 else LAST
    assert str(caught.value).endswith("; the previous file is unchanged") == (failed in steps)
    assert list(tmp_path.glob("*.unfinished")) == []
    train.main(settings.model_copy(update={"resume": True}))
    assert_same_run(uninterrupted, tmp_path)


def test_full_disk_stops_a_new_run_before_its_first_step(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glyphgpt.checkpoint.save_file", fail_at(1, save_file))
    monkeypatch.setattr(train.Trainer, "step", lambda *_: pytest.fail("a step was done"))
    with pytest.raises(UserError, match=rf"^{tmp_path}.*{LAST}: could not be written: No space left on device$"):
        train.main(tiny_settings(data_dir, tmp_path))
    assert contents(tmp_path) == {LOCK: b""}


def test_partial_write_keeps_the_previous_checkpoint(data_dir: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    settings = tiny_settings(data_dir, tmp_path / "run", max_steps=10, schedule="constant")
    train.main(settings)
    last = tmp_path / "run" / LAST
    before = last.read_bytes()
    longer = settings.model_copy(update={"resume": True, "max_steps": 20})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"^{last}: could not be written: [^\n]*$"):
            train.main(longer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert last.read_bytes() == before
    train.main(longer)
    train.main(tiny_settings(data_dir, tmp_path / "uninterrupted", schedule="constant"))
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "run")


def fail(*_: object, **__: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


FUNCTIONS_BEFORE_REPLACEMENT = [
    "glyphgpt.training.run.Metrics",  # a tracker that cannot start
    "train.Trainer.make_forward",
    "glyphgpt.checkpoint.save_file",
    "glyphgpt.checkpoint.fsync_file",
    "glyphgpt.training.run.Run.write_config",
    "glyphgpt.training.run.Metrics.write_held",
    "glyphgpt.files.finish_replacement",
]


@pytest.mark.parametrize(
    ("max_steps", "function"),
    [(1, name) for name in FUNCTIONS_BEFORE_REPLACEMENT]
    + [(0, name) for name in (*FUNCTIONS_BEFORE_REPLACEMENT, "train.evaluate", "train.Trainer.sample")],
)
def test_run_stays_complete_if_overwriting_fails(
    max_steps: int, function: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of no steps evaluates before its first save, and others after it."""
    train.main(tiny_settings(data_dir, tmp_path, report=True, max_steps=2))
    before = contents(tmp_path)
    monkeypatch.setattr(function, fail)
    with pytest.raises((UserError, OSError)):
        train.main(tiny_settings(data_dir, tmp_path, overwrite=True, max_steps=max_steps))
    monkeypatch.undo()
    assert {name: content for name, content in before.items() if name != LOCK}.items() <= contents(tmp_path).items()
    assert not (tmp_path / NEW).exists()
    train.main(tiny_settings(data_dir, tmp_path, resume=True, max_steps=3))
    assert [row["step"] for row in read_metrics(tmp_path)][-2:] == [3, 3]


def interrupted_in(folder: str, remaining: Iterator[int], function: Callable[..., object]) -> Callable[..., object]:
    """Return a method of Path that raises KeyboardInterrupt in a folder of that name once `remaining` is exhausted."""

    def interrupted(path: Path, *arguments: object, **options: object) -> object:
        if path.parent.name == folder and next(remaining, None) is None:
            raise KeyboardInterrupt
        return function(path, *arguments, **options)

    return interrupted


def test_first_save_of_a_run_deletes_the_best_model_of_the_one_it_replaces(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the earlier run is left that could be taken for the new one's."""
    train.main(tiny_settings(data_dir, tmp_path, report=True, max_steps=4, seed=7))
    write_plot([tmp_path], tmp_path / PLOT)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(errno.EIO)):
        patch.setattr(train.Trainer, "step", fail)
        train.main(tiny_settings(data_dir, tmp_path, overwrite=True, max_steps=2))
    assert contents(tmp_path).keys() == {LOCK, CONFIG, LAST, METRICS, SAMPLES}
    assert (saved_step(tmp_path), read_metrics(tmp_path)) == (0, [])
    train.main(tiny_settings(data_dir, tmp_path, resume=True, max_steps=2))
    train.main(tiny_settings(data_dir, tmp_path / "straight", max_steps=2))
    assert_same_run(tmp_path / "straight", tmp_path)


def test_run_killed_during_replacement_is_completed(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupt the replacement before each of its renames and deletions in turn."""
    settings = tiny_settings(data_dir, tmp_path, max_steps=2, overwrite=True)
    finished = False
    for changes in range(100):
        train.main(tiny_settings(data_dir, tmp_path, max_steps=4, report=True, overwrite=True, seed=7))
        remaining = iter(range(changes))
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            for name in ("replace", "unlink"):
                patch.setattr(Path, name, interrupted_in(READY, remaining, getattr(Path, name)))
            train.main(settings)
            finished = True
        if finished:
            break
        train.main(settings.model_copy(update={"overwrite": False, "resume": True}))
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 2]
        assert load_checkpoint(tmp_path / BEST).metadata.settings["seed"] == settings.seed
        assert contents(tmp_path).keys() == {LOCK, BEST, CONFIG, LAST, "metrics.jsonl", "samples.jsonl"}
    assert changes == 4 + 3, "one rename for each new file, and one mark for each file to delete"


# Checks before resuming


def test_resume_without_a_run_is_an_error(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^.*: no run to resume here; leave --resume out to start a new one$"):
        train.main(tiny_settings(data_dir, tmp_path / "missing", resume=True))
    assert not (tmp_path / "missing").exists()


def test_damaged_checkpoint_is_not_resumed(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=2))
    content = bytearray((tmp_path / LAST).read_bytes())
    content[-100] ^= 1
    (tmp_path / LAST).write_bytes(content)
    with pytest.raises(UserError, match=r"^.*last\.safetensors: damaged.*$"):
        train.main(tiny_settings(data_dir, tmp_path, max_steps=4, resume=True))
    assert (tmp_path / LAST).read_bytes() == content


@pytest.mark.parametrize(
    ("name", "saved", "value"), [("n_layer", 2, 3), ("norm", "layernorm", "rmsnorm"), ("block_size", 16, 8)]
)
def test_other_network_is_rejected(name: str, saved: object, value: object, data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=2))
    before = contents(tmp_path)
    with pytest.raises(
        UserError,
        match=rf"last\.safetensors: {name} is {saved} there, but {value} in the settings; resume the run with its own "
        rf"settings: python train\.py --resume {re.escape(str(tmp_path))}$",
    ):
        train.main(tiny_settings(data_dir, tmp_path, resume=True, **{name: value}))
    assert contents(tmp_path) == before


def test_other_vocabulary_is_rejected(tmp_path: Path) -> None:
    prepare_text(some_text(2000), tmp_path)
    train.main(tiny_settings(tmp_path, tmp_path / "run", max_steps=2))
    prepare_text(some_text(2000).replace("k", "q"), tmp_path, name="other")
    with pytest.raises(UserError, match=r"^.*vocabular.*$") as caught:
        train.main(tiny_settings(tmp_path, tmp_path / "run", max_steps=4, resume=True, dataset="other"))
    assert str(tmp_path / "run" / LAST) in str(caught.value)
    assert str(tmp_path / "other") in str(caught.value)


def test_changed_text_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_text(some_text(2000), tmp_path)
    train.main(tiny_settings(tmp_path, tmp_path / "run", max_steps=5))
    prepare_text(some_text(2000, seed=1), tmp_path, overwrite=True)
    capsys.readouterr()
    train.main(tiny_settings(tmp_path, tmp_path / "run", resume=True))
    assert f"warning: {tmp_path / 'small'} has changed since the run began" in capsys.readouterr().err
    assert saved_step(tmp_path / "run") == 20


def test_changed_settings_are_a_warning(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=3))
    train.main(tiny_settings(data_dir, tmp_path, max_steps=4, resume=True))
    assert "warning" not in capsys.readouterr().err
    train.main(tiny_settings(data_dir, tmp_path, max_steps=5, seed=7, dropout=0.2, batch_size=2, resume=True))
    warning = capsys.readouterr().err
    assert warning.startswith("warning: settings have changed since the run began: ")
    for change in ("seed 1337 -> 7", "dropout 0.0 -> 0.2", "batch_size 4 -> 2"):
        assert change in warning
    assert saved_step(tmp_path) == 5


def test_dtype_may_change(data_dir: Path, tmp_path: Path) -> None:
    for steps, dtype in ((2, "float32"), (4, "float16"), (6, "bfloat16")):
        train.main(tiny_settings(data_dir, tmp_path, max_steps=steps, dtype=dtype, resume=steps > 2))
    assert saved_step(tmp_path) == 6


def test_finished_run_is_not_changed(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path))
    before = contents(tmp_path)
    train.main(tiny_settings(data_dir, tmp_path, resume=True))
    assert contents(tmp_path) == before


def test_run_that_has_reached_its_new_end_is_evaluated(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was interrupted before its first evaluation can be resumed with so few steps that none is left."""
    settings = tiny_settings(data_dir, tmp_path, save_every=1, report=True)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        patch.setattr(train.Trainer, "next_batch", fail_at(3, train.Trainer.next_batch))
        train.main(settings)
    assert (saved_step(tmp_path), (tmp_path / BEST).exists()) == (2, False)
    capsys.readouterr()
    train.main(settings.model_copy(update={"resume": True, "max_steps": 2}))
    (row,) = (row for row in read_metrics(tmp_path) if row["kind"] == "val")
    assert (row["step"], saved_step(tmp_path, BEST), saved_step(tmp_path)) == (2, 2, 2)
    output = capsys.readouterr()
    assert f"all 2 steps done; best validation loss {row['loss']:.4f}\n" in output.out
    assert output.err == ""


def test_only_the_torchrun_job_of_a_run_resumes_it_without_a_flag(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=10))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    for _ in range(2):  # torchrun restarts a job that failed; the restart fails as well
        with pytest.raises(UsageError, match="already holds a run"):
            train.main(tiny_settings(data_dir, tmp_path))
    train.main(tiny_settings(data_dir, tmp_path, max_steps=10, overwrite=True))
    train.main(tiny_settings(data_dir, tmp_path, overwrite=True))
    assert [row["step"] for row in read_metrics(tmp_path) if row["kind"] == "val"] == [10, 20]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    with pytest.raises(UsageError, match="already holds a run"):
        train.main(tiny_settings(data_dir, tmp_path))


# Messages


def test_first_line_describes_the_run(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=0, gradient_accumulation_steps=3))
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"{tmp_path}: 6,880 parameters on cpu, float32; 192 tokens a step, 0 steps")


@pytest.mark.parametrize(
    ("max_steps", "state", "text", "flag"),
    [
        (2000, TrainState(step=2000), "all 2,000 steps done", " --max_steps=4000"),
        (0, TrainState(), "all 0 steps done", " --max_steps=1000"),
        (
            2000,
            TrainState(step=1500, evaluations_since_improvement=3),
            "stopped early at step 1,500: no better loss in 3 evaluations",
            " --patience=0",
        ),
        (2000, TrainState(step=1500, evaluations_since_improvement=2), "interrupted at step 1,500 of 2,000", ""),
    ],
)
def test_outcome(max_steps: int, state: TrainState, text: str, flag: str, tmp_path: Path) -> None:
    result = outcome(tiny_settings(tmp_path, tmp_path, max_steps=max_steps, patience=3), state, tmp_path)
    assert (result.text, result.resume) == (text, f"python train.py --resume {tmp_path}{flag}")


def test_last_lines_of_a_finished_and_of_an_interrupted_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tiny_settings(tmp_path, tmp_path, max_steps=20), CPU)
    (tmp_path / METRICS).write_text('{"kind": "val", "step": 20, "loss": 1.5, "tokens": 0, "seconds": 0}\n')
    run.log_end(TrainState(step=20, best_loss=1.5), None)
    end, sample, resume = capsys.readouterr().out.splitlines()
    assert end == "all 20 steps done; best validation loss 1.5000"
    assert sample.endswith(f": python sample.py {tmp_path}")
    assert resume.endswith(f": python train.py --resume {tmp_path} --max_steps=40")
    run.whole_split_loss = 1.4
    run.log_end(TrainState(step=20, best_loss=1.5), None)
    assert capsys.readouterr().out.splitlines()[0] == "all 20 steps done; best validation loss 1.4000"
    (tmp_path / METRICS).write_text("damaged\n")
    run.log_end(TrainState(step=20, best_loss=1.5), None)
    assert len(capsys.readouterr().out.splitlines()) == 3
    run.log_end(TrainState(step=7), signal.SIGTERM)
    assert (
        capsys.readouterr().out
        == f"interrupted at step 7 of 20 by SIGTERM, saved; resume it: python train.py --resume {tmp_path}\n"
    )
