"""Runs are never lost: not to another run, not to a full disk, not to a slip on the command line."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.numpy import save_file

import train
from conftest import (
    ROOT,
    as_flags,
    contents,
    prepare_text,
    read_metrics,
    same_tensors,
    script,
    some_text,
    tiny_settings,
)
from glyphgpt import checkpoint as checkpoints
from glyphgpt.errors import UsageError, UserError, exit_on_error
from glyphgpt.files import LOCK, NEW, READY
from glyphgpt.settings import TrainSettings

CHECKPOINTS = ("best.safetensors", "last.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert all(same_tensors(one, other, name) for name in CHECKPOINTS)


def one_error(settings: TrainSettings, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Train as the script does; return the exit status and the one line on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending, exit_on_error():
        train.main(settings)
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", said)
    return ending.value.code, said


@pytest.fixture(scope="module")
def straight(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps without a mishap."""
    out_dir = tmp_path_factory.mktemp("straight")
    train.main(tiny_settings(data_dir, out_dir))
    return out_dir


def test_a_run_that_is_there_is_refused_and_left_as_it_was(straight: Path, data_dir: Path) -> None:
    before = contents(straight)
    done = script("train.py", *as_flags(tiny_settings(data_dir, straight, seed=2, n_layer=1)))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {straight} already holds a run; add --resume to continue it, --overwrite to replace it, "
        "or --out_dir=ANOTHER\n"
    )
    assert contents(straight) == before


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_one_checkpoint_alone_is_a_run_too(name: str, straight: Path, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((straight / name).read_bytes())
    with pytest.raises(UsageError, match="already holds a run"):
        train.main(tiny_settings(data_dir, tmp_path))
    assert contents(tmp_path) == {name: (straight / name).read_bytes(), ".lock": b""}


def test_overwrite_replaces_the_run_and_nothing_else(straight: Path, data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path, n_layer=1, max_steps=50, seed=2))
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    train.main(tiny_settings(data_dir, tmp_path, overwrite=True))
    assert_same_run(straight, tmp_path)
    rows = [(path / "metrics.jsonl").read_bytes().count(b"\n") for path in (straight, tmp_path)]
    assert rows[0] == rows[1]
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_refused_settings_do_not_cost_the_run_that_was_to_be_replaced(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=2))
    before = contents(tmp_path)
    for changes in ({"block_size": 100_000}, {"device": "cuda:99"}, {"dataset": "none"}):
        with pytest.raises(UserError):
            train.main(tiny_settings(data_dir, tmp_path, overwrite=True, **changes))
    assert contents(tmp_path) == before


def fail_at(call: int, real: Callable[..., object]) -> Callable[..., object]:
    """Return the function, but for one call that finds the disk full."""
    calls = 0

    def sometimes(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    return sometimes


@pytest.mark.parametrize("save", [3, 4, 5, 6], ids=["best at 10", "last at 10", "best at 20", "last at 20"])
@pytest.mark.parametrize("culprit", ["save_file", "fsync"])
def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on_from_it(
    culprit: str, save: int, straight: Path, data_dir: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(data_dir, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        if culprit == "save_file":
            patch.setattr(checkpoints, "save_file", fail_at(save, save_file))
        else:  # once for the file and once for its folder
            patch.setattr(os, "fsync", fail_at(2 * save - 1, os.fsync))
        with pytest.raises(UserError, match=r"^.*could not be written: No space left on device; .*$") as failure:
            train.main(settings)
    assert failure.value.status == 1
    written = {name: checkpoints.load_checkpoint(tmp_path / name).metadata.state.step for name in CHECKPOINTS}
    before, now = (save - 3) // 2 * 10, (save - 1) // 2 * 10
    assert written == {"best.safetensors": now if save % 2 == 0 else before, "last.safetensors": before}
    assert [path.name for path in tmp_path.glob("*.unfinished")] == []
    train.main(settings.model_copy(update={"resume": True}))
    assert_same_run(straight, tmp_path)


def test_a_write_that_really_fails_leaves_the_checkpoint_before(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    settings = tiny_settings(data_dir, tmp_path, max_steps=10, schedule="constant")
    train.main(settings)
    before = (tmp_path / "last.safetensors").read_bytes()
    longer = settings.model_copy(update={"resume": True, "max_steps": 20})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 20_000, limits[1]))
    try:
        status, said = one_error(longer, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert f"{tmp_path / 'last.safetensors'}: could not be written: " in said
    assert (tmp_path / "last.safetensors").read_bytes() == before
    train.main(longer)
    train.main(tiny_settings(data_dir, tmp_path / "straight", schedule="constant"))
    assert_same_run(tmp_path / "straight", tmp_path)


def test_an_out_dir_that_cannot_be_one_is_one_line(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        status, said = one_error(tiny_settings(data_dir, out_dir), capsys)
        assert status == 1
        assert str(out_dir) in said
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_data_set_that_is_not_there_tells_how_to_prepare_it(tmp_path: Path) -> None:
    done = script("train.py", *as_flags(tiny_settings(tmp_path, tmp_path / "run", dataset="mine")))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*mine: no dataset here; .*python prepare\.py .*--name=mine.*\n", done.stderr)
    assert contents(tmp_path) == {}


def damage(folder: Path) -> dict[str, Callable[[], object]]:
    """Return ways to damage a data set."""
    shard, meta = folder / "train-00000.npy", folder / "meta.json"
    return {
        "flipped": lambda: shard.write_bytes(shard.read_bytes()[:-9] + b"\0" + shard.read_bytes()[-8:]),
        "cut": lambda: shard.write_bytes(shard.read_bytes()[:-9]),
        "missing": shard.unlink,
        "no JSON": lambda: meta.write_bytes(meta.read_bytes()[:-9]),
        "no counts": lambda: meta.write_text('{"format": 1}', encoding="utf-8"),
        "newer": lambda: meta.write_text('{"format": 99}', encoding="utf-8"),
    }


@pytest.mark.parametrize("kind", list(damage(Path())))
def test_a_damaged_data_set_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    folder = prepare_text(some_text(500), tmp_path)
    damage(folder)[kind]()
    with pytest.raises(UserError, match=rf"^{folder}.*(prepare the dataset again|update glyphgpt)$") as failure:
        train.main(tiny_settings(tmp_path, tmp_path / "run"))
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.device_count() > 99, reason="there are too many CUDA devices")
@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:0:0", ""])
def test_a_device_that_is_not_there_is_one_line(
    device: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = one_error(tiny_settings(data_dir, tmp_path / "run", device=device), capsys)
    assert status == 2
    assert said.startswith(f"error: device = '{device}' is not on this machine; available: auto, cpu")
    assert not (tmp_path / "run").exists()


def without_torch(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run train.py where torch cannot be imported, as a slip must be told before those seconds are spent."""
    program = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[:1] = ['train.py']; {program}", *words],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        check=False,
    )


def test_every_bad_setting_gets_its_line_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('n_layers = 3\nblock_size = "64"\n', encoding="utf-8")
    done = without_torch(str(tmp_path / "mine.toml"), "--n_head=0", "--dropout=1.5", "--max_iters=5", "--compile=maybe")
    assert (done.returncode, done.stdout) == (2, "")
    assert sorted(done.stderr.splitlines()) == [
        f"error: {tmp_path / 'mine.toml'}: 'block_size' must be a whole number, at least 1, at most 131072, not '64'",
        f"error: {tmp_path / 'mine.toml'}: unknown key 'n_layers'; did you mean 'n_layer'?",
        "error: command line: --compile must be 'auto' or true or false, not 'maybe'",
        "error: command line: --dropout must be a number, at least 0, below 1, not '1.5'",
        "error: command line: --n_head must be a whole number, at least 1, not '0'",
        "error: command line: unknown key --max_iters; nanoGPT's 'max_iters' is 'max_steps' here",
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--n_embd=10", "--n_head=3"], r"error: n_embd = 10 is not a multiple of n_head = 3\n"),
        (["--resume", "--overwrite"], r"error: resume and overwrite contradict each other; choose one\n"),
        (["nothing.toml"], r"error: nothing\.toml: cannot read this settings file: No such file or directory\n"),
        (["LICENSE"], r"error: LICENSE: not a TOML file: .*\n"),
        (["config/mine.py"], r"error: config/mine\.py: a Python config is never executed; .*config/mine\.toml.*\n"),
    ],
)
def test_settings_that_cannot_be_are_one_line_before_torch_is_loaded(flags: list[str], said: str) -> None:
    done = without_torch(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(said, done.stderr)


def test_a_nanogpt_config_is_not_executed(tmp_path: Path) -> None:
    config = tmp_path / "mine.py"
    config.write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\nn_layer = 3\n", encoding="utf-8")
    assert without_torch(str(config)).returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def broken(*_: object, **__: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize(
    "place",
    [
        "glyphgpt.training.run.Metrics",  # a tracker that cannot start
        "train.Trainer.make_forward",
        "train.evaluate",
        "train.Trainer.sample",
        "glyphgpt.checkpoint.save_file",
        "glyphgpt.checkpoint.fsync_file",
        "glyphgpt.training.run.Run.write_config",
        "glyphgpt.training.run.Metrics.write_held",
        "glyphgpt.files.finish_replacement",
    ],
)
def test_a_run_is_whole_until_another_one_takes_its_place(
    place: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.main(tiny_settings(data_dir, tmp_path, report=True, max_steps=2))
    before = contents(tmp_path)
    monkeypatch.setattr(place, broken)
    with pytest.raises((UserError, OSError)):
        train.main(tiny_settings(data_dir, tmp_path, overwrite=True, max_steps=1))
    monkeypatch.undo()
    assert {name: content for name, content in before.items() if name != LOCK}.items() <= contents(tmp_path).items()
    assert not (tmp_path / NEW).exists()
    train.main(tiny_settings(data_dir, tmp_path, resume=True, max_steps=3))
    told = [row["step"] for row in read_metrics(tmp_path)]
    assert told[-2:] == [3, 3]


def test_a_run_killed_while_it_takes_its_place_is_complete_afterwards(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill it before each of its renames in turn."""
    settings = tiny_settings(data_dir, tmp_path / "run", max_steps=2, overwrite=True)
    really, ended = Path.replace, False
    for at in range(100):
        train.main(tiny_settings(data_dir, tmp_path / "run", max_steps=4, report=True, overwrite=True, seed=7))
        calls = iter(range(at))

        def replace(path: Path, to: Path, calls: "Iterator[int]" = calls) -> Path:
            if path.parent.name == READY and next(calls, None) is None:
                raise KeyboardInterrupt
            return really(path, to)

        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, "replace", replace)
            train.main(settings)
            ended = True
        if ended:
            break
        train.main(settings.model_copy(update={"overwrite": False, "resume": True}))
        assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 2]
        assert (
            checkpoints.load_checkpoint(tmp_path / "run" / "best.safetensors").metadata.settings["seed"]
            == settings.seed
        )
        assert sorted(contents(tmp_path / "run")) == sorted(
            [LOCK, "best.safetensors", "config.toml", "last.safetensors", "metrics.jsonl", "samples.jsonl"]
        )
    assert at == 5, "files take their places one by one"
