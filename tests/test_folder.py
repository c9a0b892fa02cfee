"""A run's folder: one training at a time, and files that are never there in part."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from conftest import as_flags, contents, script, tiny_settings
from glyphgpt.errors import Failure, UsageError
from glyphgpt.folder import LOCK, locked, write_whole


def test_a_folder_is_made_and_locked_for_others(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "run"
    with locked(folder, "x"):
        assert folder.is_dir()
        with pytest.raises(UsageError, match=rf"^{folder}: in use by another process; .*$"), locked(folder, "x"):
            pass
    with locked(folder, "x"):
        pass


def test_another_training_is_refused_and_touches_nothing(data_dir: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data_dir, tmp_path, max_steps=2)
    train.main(settings)
    with locked(tmp_path, "x"):
        before = contents(tmp_path)
        refusal = f"{tmp_path}: in use by another process; wait for its end, or use --out_dir=ANOTHER"
        done = script("train.py", *as_flags(settings), "--resume")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {refusal}")
        for changes in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(UsageError, match=f"^{refusal}"):
                train.main(settings.model_copy(update=changes))
        assert contents(tmp_path) == before


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    hold = "import os, sys; from pathlib import Path; from glyphgpt.folder import locked\n"
    hold += "with locked(Path(sys.argv[1]), 'x'): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", hold, str(tmp_path)], check=False)
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path, "x"):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(Failure, match=rf"^{tmp_path / 'file'}.*: could not be written: "),
        locked(tmp_path / "file", "x"),
    ):
        pass


@pytest.mark.parametrize("call", ["replace", "unlink"])
def test_a_file_is_written_whole_or_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_whole(tmp_path / "a", b"first")

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", fail)
    if call == "unlink":  # what is left then does no harm
        monkeypatch.setattr(os, "unlink", fail)
    with pytest.raises(Failure, match=rf"^{tmp_path / 'a'}: could not be written: No space left on device$"):
        write_whole(tmp_path / "a", b"second")
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"first"
    write_whole(tmp_path / "a", b"third")
    assert contents(tmp_path) == {"a": b"third"}
