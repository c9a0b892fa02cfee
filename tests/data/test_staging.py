"""An interrupted preparation resumes, and its result equals that of an uninterrupted one."""

import io
import os
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from test_text import json_lines

from conftest import contents, prepare_text, run_prepare, script, some_text
from glyphgpt.data import text as texts
from glyphgpt.data.dataset import ShardWriter
from glyphgpt.data.staging import PROGRESS, ResumableWriter, staging_dir
from glyphgpt.errors import UsageError, UserError
from glyphgpt.files import META, REPORT, locked


class Preparation:
    """Prepares a text in a data folder, in this process."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.data_dir, self.file = patch, folder / "data", folder / "mine.txt"
        self.hidden = self.data_dir / ".mine.unfinished"
        patch.setattr(texts, "CHUNK_BYTES", 30)
        self.file.write_text(some_text(700) + "é🙂" * 20 + some_text(300, seed=1), encoding="utf-8")

    def run(self, *words: str, name: str = "mine") -> dict[str, bytes]:
        """Prepare the text, and return the content of the dataset's files."""
        flags = [f"--data_dir={self.data_dir}", f"--name={name}"]
        run_prepare(str(self.file), *words, *flags)
        return self.files(name)

    def files(self, name: str = "mine") -> dict[str, bytes]:
        """Return the content of a dataset's files, except the report, which has the dataset's name."""
        files = contents(self.data_dir / name)
        del files[REPORT]
        return files

    def interrupt(self, segments: int, *words: str) -> None:
        """Prepare the text, but raise KeyboardInterrupt after `segments` segments have been written."""
        write, calls = ResumableWriter.write, []

        def interrupted_write(*arguments: Any) -> None:
            calls.append(arguments)
            if len(calls) > segments:
                raise KeyboardInterrupt
            write(*arguments)

        with self.patch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ResumableWriter, "write", interrupted_write)
            self.run(*words)


@pytest.fixture
def preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Preparation:
    return Preparation(tmp_path, monkeypatch)


@pytest.mark.parametrize("shard_tokens", [7, 64, 450])
@pytest.mark.parametrize("kind", ["char", "byte", "gpt2", "records", "skip", "options"])
def test_a_preparation_interrupted_several_times_gives_the_same_bytes(
    preparation: Preparation, gpt2_data_dir: Path, kind: str, shard_tokens: int
) -> None:
    if kind == "records":
        preparation.file = preparation.file.with_suffix(".jsonl")
        preparation.file.write_text(json_lines(["", *some_text(900).splitlines(), "", ""]), encoding="utf-8")
    shutil.copytree(gpt2_data_dir / "downloads", preparation.data_dir / "downloads")
    words = [f"--shard_tokens={shard_tokens}", f"--tokenizer={'gpt2' if kind == 'records' else kind}"]
    if kind == "skip":
        prepare_text("abcdefgh \n" * 9, preparation.data_dir, "few")
        words[1:] = [f"--vocabulary={preparation.data_dir / 'few'}", "--skip_unknown"]
    if kind == "options":
        words[1:] = ["--split=blocks", "--test_fraction=0.2", "--min_count=3", "--deduplicate=lines", "--newlines=lf"]
    expected = preparation.run(*words, name="uninterrupted")
    rng = random.Random(shard_tokens)
    for _ in range(3):
        preparation.interrupt(rng.randint(1, 8), *words)
    assert preparation.run(*words) == expected
    assert not preparation.hidden.exists()


def test_finished_shards_are_not_written_again(preparation: Preparation, capsys: pytest.CaptureFixture[str]) -> None:
    preparation.interrupt(10, "--shard_tokens=50")
    finished = sorted(preparation.hidden.glob("new/train-*.npy"))[:3]
    times = [path.stat().st_mtime_ns for path in finished]
    warning = f"finished shards are kept in {preparation.hidden}; run the same command again to resume"
    assert warning in capsys.readouterr().err
    preparation.run("--shard_tokens=50")
    assert "resuming an interrupted preparation; finished shards: 6\n" in capsys.readouterr().out
    assert [(preparation.data_dir / "mine" / path.name).stat().st_mtime_ns for path in finished] == times


def test_files_with_names_that_are_not_utf8_resume(
    preparation: Preparation, capsys: pytest.CaptureFixture[str]
) -> None:
    preparation.file = preparation.file.rename(preparation.file.with_name(os.fsdecode(b"caf\xe9.txt")))
    preparation.interrupt(10, "--shard_tokens=50")
    resumed = preparation.run("--shard_tokens=50")
    assert "resuming an interrupted preparation; finished shards: 6\n" in capsys.readouterr().out
    assert resumed == preparation.run("--shard_tokens=50", name="uninterrupted")


def test_a_resumed_preparation_reports_dropped_characters(
    preparation: Preparation, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_text("abcdefgh \n" * 9, preparation.data_dir, "few")
    words = ["--shard_tokens=20", f"--vocabulary={preparation.data_dir / 'few'}", "--skip_unknown"]
    preparation.interrupt(12, *words)
    capsys.readouterr()
    preparation.run(*words)
    out = capsys.readouterr().out
    text = preparation.file.read_text(encoding="utf-8")
    assert "resuming an interrupted preparation" in out
    dropped = len(re.sub(r"[abcdefgh \n]", "", text))
    assert f"dropped {dropped} characters that are not in the vocabulary of {preparation.data_dir / 'few'}\n" in out


@pytest.mark.parametrize("change", ["text", "settings", "vocabulary", "damage", "missing shard", "invalid progress"])
def test_a_changed_or_damaged_preparation_starts_again(
    preparation: Preparation, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    words = ["--shard_tokens=50"]
    preparation.interrupt(10, *words)
    new = preparation.hidden / "new"
    match change:
        case "text":
            preparation.file.write_text(some_text(500, seed=2))
        case "settings":
            words.append("--tokenizer=byte")
        case "vocabulary":
            preparation.run(name="same")
            words.append(f"--vocabulary={preparation.data_dir / 'same'}")
        case "damage":
            (new / "train-00001.npy").write_bytes((new / "train-00000.npy").read_bytes())
        case "missing shard":
            (new / "train-00001.npy").unlink()
        case "invalid progress":
            (new / PROGRESS).write_text("{}")
    result = preparation.run(*words)
    assert "resuming" not in capsys.readouterr().out
    assert result == preparation.run(*words, name="uninterrupted")


def test_nothing_is_kept_without_a_finished_shard(preparation: Preparation) -> None:
    preparation.interrupt(3)
    assert list(preparation.data_dir.iterdir()) == []


def test_the_old_dataset_stays_until_the_new_one_is_complete(preparation: Preparation) -> None:
    before = preparation.run()
    preparation.interrupt(10, "--shard_tokens=50", "--overwrite")
    assert preparation.files() == before
    assert preparation.run("--shard_tokens=50", "--overwrite") != before
    assert [path.name for path in preparation.data_dir.iterdir()] == ["mine"]


@pytest.mark.parametrize("killed", ["between the renames", "while deleting the old dataset"])
def test_a_kill_while_datasets_are_swapped_loses_nothing(preparation: Preparation, killed: str) -> None:
    before = preparation.run()
    preparation.hidden.mkdir()
    shutil.copytree(preparation.data_dir / "mine", preparation.hidden / "old")
    if killed == "between the renames":
        shutil.rmtree(preparation.data_dir / "mine")
    (preparation.file.parent / "bad.txt").write_bytes(b"\xff")
    good, preparation.file = preparation.file, preparation.file.parent / "bad.txt"
    with pytest.raises(UserError):
        preparation.run()
    assert preparation.files() == before
    preparation.file = good
    assert preparation.run("--overwrite", "--tokenizer=byte") != before
    assert [path.name for path in preparation.data_dir.iterdir()] == ["mine"]


def test_an_interrupt_between_the_renames_restores_the_old_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "mine", Path.rename
    folder.mkdir()
    (folder / META).write_text("old")

    def interrupted_rename(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted_rename)
    with pytest.raises(KeyboardInterrupt), staging_dir(folder, overwrite=True):
        pass
    assert contents(folder) == {META: b"old"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failed_write_leaves_no_gap_after_resuming(preparation: Preparation, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = preparation.run("--shard_tokens=64", name="uninterrupted")
    write, calls = ShardWriter.write, []

    def flaky_write(writer: ShardWriter, tokens: Any) -> None:
        calls.append(tokens)
        if len(calls) == 5:
            write(writer, tokens[:3])
            raise UserError("no space left")
        write(writer, tokens)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space left"):
        patch.setattr(ShardWriter, "write", flaky_write)
        preparation.run("--shard_tokens=64")
    assert preparation.run("--shard_tokens=64") == expected


def test_a_full_disk_keeps_finished_shards(preparation: Preparation, monkeypatch: pytest.MonkeyPatch) -> None:
    open_shard = ShardWriter._open_shard

    def failing_open(writer: ShardWriter) -> Any:
        if len(writer.shards) == 4:
            raise UserError("no space left")
        return open_shard(writer)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space left"):
        patch.setattr(ShardWriter, "_open_shard", failing_open)
        preparation.run("--shard_tokens=50")
    assert (preparation.hidden / "new" / PROGRESS).exists()
    preparation.run("--shard_tokens=50")
    assert [path.name for path in preparation.data_dir.iterdir()] == ["mine"]


def test_nothing_is_kept_of_standard_input(tmp_path: Path) -> None:
    """Standard input cannot be read again, so its preparation cannot resume."""
    words = ("-", "--name=mine", "--shard_tokens=50", "--val_fraction=0.001", f"--data_dir={tmp_path}")
    done = script("prepare.py", *words, text=some_text(500))
    assert (done.returncode, done.stdout) == (1, "")
    assert "too short" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_kept_of_an_interrupted_pipe(preparation: Preparation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(preparation.file.read_bytes())))
    preparation.file = Path("-")
    preparation.interrupt(10, "--shard_tokens=50")
    assert list(preparation.data_dir.iterdir()) == []


def test_only_one_process_prepares_a_dataset(preparation: Preparation) -> None:
    with (
        locked(preparation.hidden, "--name=ANOTHER"),
        pytest.raises(UsageError, match=r"in use by another process; wait until it ends, or use --name=ANOTHER$"),
    ):
        preparation.run()
    preparation.run()
