"""A preparation that was broken off goes on where it stopped, and ends as if nothing had been."""

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

import prepare
from conftest import contents, prepare_text, run_prepare, script, some_text
from glyphgpt.data import text as texts
from glyphgpt.data.dataset import META, ShardWriter
from glyphgpt.data.staging import PROGRESS, staging_dir
from glyphgpt.errors import UsageError, UserError
from glyphgpt.files import locked


class Job:
    """A text, and a data folder to prepare it in, in this process."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.data_dir, self.file = patch, folder / "data", folder / "mine.txt"
        self.hidden = self.data_dir / ".mine.unfinished"
        patch.setattr(texts, "CHUNK_BYTES", 30)
        self.file.write_text(some_text(700) + "é🙂" * 20 + some_text(300, seed=1), encoding="utf-8")

    def run(self, *words: str, name: str = "mine") -> dict[str, bytes]:
        """Prepare, and return the data set's files."""
        flags = [f"--data_dir={self.data_dir}", f"--name={name}"]
        run_prepare(str(self.file), *words, *flags)
        return contents(self.data_dir / name)

    def break_off(self, pieces: int, *words: str) -> None:
        """Prepare until so many pieces are written, and then be interrupted."""
        write, calls = prepare.Output.write, []

        def interrupted(*arguments: Any) -> None:
            calls.append(arguments)
            if len(calls) > pieces:
                raise KeyboardInterrupt
            write(*arguments)

        with self.patch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(prepare.Output, "write", interrupted)
            self.run(*words)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch)


@pytest.mark.parametrize("shard_tokens", [7, 64, 450])
@pytest.mark.parametrize("form", ["char", "byte", "gpt2", "records", "skip"])
def test_a_broken_run_goes_on_and_ends_with_the_same_bytes(
    job: Job, gpt2_data_dir: Path, form: str, shard_tokens: int
) -> None:
    if form == "records":
        job.file = job.file.with_suffix(".jsonl")
        job.file.write_text(json_lines(["", *some_text(900).splitlines(), "", ""]), encoding="utf-8")
    shutil.copytree(gpt2_data_dir / "downloads", job.data_dir / "downloads")
    words = [f"--shard_tokens={shard_tokens}", f"--tokenizer={'gpt2' if form == 'records' else form}"]
    if form == "skip":
        prepare_text("abcdefgh \n" * 9, job.data_dir, "few")
        words[1:] = [f"--vocabulary={job.data_dir / 'few'}", "--skip_unknown"]
    straight = job.run(*words, name="straight")
    chosen = random.Random(shard_tokens)
    for _ in range(3):
        job.break_off(chosen.randint(1, 8), *words)
    assert job.run(*words) == straight
    assert not job.hidden.exists()


def test_what_is_finished_is_not_made_again(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.break_off(10, "--shard_tokens=50")
    finished = sorted(job.hidden.glob("new/train-*.npy"))[:3]
    times = [path.stat().st_mtime_ns for path in finished]
    assert f"kept in {job.hidden}; the same command continues from there" in capsys.readouterr().err
    job.run("--shard_tokens=50")
    assert "resuming an interrupted preparation; finished files: 6\n" in capsys.readouterr().out
    assert [(job.data_dir / "mine" / path.name).stat().st_mtime_ns for path in finished] == times


def test_files_of_names_that_are_not_utf8_are_continued(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.file = job.file.rename(job.file.with_name(os.fsdecode(b"caf\xe9.txt")))
    job.break_off(10, "--shard_tokens=50")
    resumed = job.run("--shard_tokens=50")
    assert "resuming an interrupted preparation; finished files: 6\n" in capsys.readouterr().out
    assert resumed == job.run("--shard_tokens=50", name="straight")


def test_what_was_left_out_is_reported_after_an_interruption(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_text("abcdefgh \n" * 9, job.data_dir, "few")
    words = ["--shard_tokens=20", f"--vocabulary={job.data_dir / 'few'}", "--skip_unknown"]
    job.break_off(12, *words)
    capsys.readouterr()
    job.run(*words)
    out = capsys.readouterr().out
    text = job.file.read_text(encoding="utf-8")
    assert "resuming an interrupted preparation" in out
    left_out = len(re.sub(r"[abcdefgh \n]", "", text))
    assert f"left out: {left_out} characters that {job.data_dir / 'few'} lacks\n" in out


@pytest.mark.parametrize("other", ["text", "settings", "vocabulary", "damage", "missing", "notes"])
def test_another_job_or_a_damaged_one_begins_anew(job: Job, capsys: pytest.CaptureFixture[str], other: str) -> None:
    words = ["--shard_tokens=50"]
    job.break_off(10, *words)
    new = job.hidden / "new"
    match other:
        case "text":
            job.file.write_text(some_text(500, seed=2))
        case "settings":
            words.append("--tokenizer=byte")
        case "vocabulary":
            job.run(name="same")
            words.append(f"--vocabulary={job.data_dir / 'same'}")
        case "damage":
            (new / "train-00001.npy").write_bytes((new / "train-00000.npy").read_bytes())
        case "missing":
            (new / "train-00001.npy").unlink()
        case "notes":
            (new / PROGRESS).write_text("{}")
    after = job.run(*words)
    assert "going on" not in capsys.readouterr().out
    assert after == job.run(*words, name="straight")


def test_nothing_is_kept_of_what_has_no_finished_file(job: Job) -> None:
    job.break_off(3)
    assert list(job.data_dir.iterdir()) == []


def test_the_old_data_set_stays_until_the_new_one_is_whole(job: Job) -> None:
    before = job.run()
    job.break_off(10, "--shard_tokens=50", "--overwrite")
    assert contents(job.data_dir / "mine") == before
    assert job.run("--shard_tokens=50", "--overwrite") != before
    assert [path.name for path in job.data_dir.iterdir()] == ["mine"]


@pytest.mark.parametrize("killed", ["between the renames", "while the old one was deleted"])
def test_a_kill_while_one_is_changed_for_the_other_loses_nothing(job: Job, killed: str) -> None:
    before = job.run()
    job.hidden.mkdir()
    shutil.copytree(job.data_dir / "mine", job.hidden / "old")
    if killed == "between the renames":
        shutil.rmtree(job.data_dir / "mine")
    (job.file.parent / "bad.txt").write_bytes(b"\xff")
    good, job.file = job.file, job.file.parent / "bad.txt"
    with pytest.raises(UserError):
        job.run()
    assert contents(job.data_dir / "mine") == before
    job.file = good
    assert job.run("--overwrite", "--tokenizer=byte") != before
    assert [path.name for path in job.data_dir.iterdir()] == ["mine"]


def test_an_interruption_between_the_renames_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "mine", Path.rename
    folder.mkdir()
    (folder / META).write_text("old")

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staging_dir(folder, overwrite=True):
        pass
    assert contents(folder) == {META: b"old"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_write_that_fails_once_leaves_no_gap(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = job.run("--shard_tokens=64", name="straight")
    write, calls = ShardWriter.write, []

    def flaky(writer: ShardWriter, tokens: Any) -> None:
        calls.append(tokens)
        if len(calls) == 5:
            write(writer, tokens[:3])
            raise UserError("no space left, for a moment")
        write(writer, tokens)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space left"):
        patch.setattr(ShardWriter, "write", flaky)
        job.run("--shard_tokens=64")
    assert job.run("--shard_tokens=64") == straight


def test_a_full_disk_keeps_what_is_done(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = ShardWriter._begin

    def full(writer: ShardWriter) -> Any:
        if len(writer.shards) == 4:
            raise UserError("no space left")
        return begin(writer)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space left"):
        patch.setattr(ShardWriter, "_begin", full)
        job.run("--shard_tokens=50")
    assert (job.hidden / "new" / PROGRESS).exists()
    job.run("--shard_tokens=50")
    assert [path.name for path in job.data_dir.iterdir()] == ["mine"]


def test_of_standard_input_nothing_is_kept(tmp_path: Path) -> None:
    """What could be gone on with has gone."""
    words = ("-", "--name=mine", "--shard_tokens=50", "--val_fraction=0.001", f"--data_dir={tmp_path}")
    done = script("prepare.py", *words, text=some_text(500))
    assert (done.returncode, done.stdout) == (1, "")
    assert "too short" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_of_an_interrupted_pipe_nothing_is_kept(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(job.file.read_bytes())))
    job.file = Path("-")
    job.break_off(10, "--shard_tokens=50")
    assert list(job.data_dir.iterdir()) == []


def test_two_at_once_are_one_too_many(job: Job) -> None:
    with (
        locked(job.hidden, "--name=ANOTHER"),
        pytest.raises(UsageError, match=r"in use by another process; wait for its end, or use --name=ANOTHER$"),
    ):
        job.run()
    job.run()
