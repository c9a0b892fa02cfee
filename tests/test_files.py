"""A run's folder: one training at a time, and files that are never there in part."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from conftest import ROOT, as_flags, contents, script, tiny_settings
from glyphgpt.errors import UsageError, UserError
from glyphgpt.files import LOCK, fsync_dir, locked, replace_files, write_atomic


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
        refusal = f"{tmp_path}: in use by another process; wait until it ends, or use --out_dir=ANOTHER"
        done = script("train.py", *as_flags(settings), "--resume")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {refusal}")
        for changes in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(UsageError, match=f"^{refusal}"):
                train.main(settings.model_copy(update=changes))
        assert contents(tmp_path) == before


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    hold = "import os, sys; from pathlib import Path; from glyphgpt.files import locked\n"
    hold += "with locked(Path(sys.argv[1]), 'x'): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", hold, str(tmp_path)], check=False)
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path, "x"):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=rf"^{tmp_path / 'file'}.*: could not be written: "),
        locked(tmp_path / "file", "x"),
    ):
        pass


@pytest.mark.parametrize("call", ["replace", "unlink"])
def test_a_file_is_written_whole_or_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_atomic(tmp_path / "a", b"first")

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", fail)
    if call == "unlink":  # what is left then does no harm
        monkeypatch.setattr(os, "unlink", fail)
    with pytest.raises(
        UserError, match=rf"^{tmp_path / 'a'}: could not be written: No space left on device; the previous file"
    ):
        write_atomic(tmp_path / "a", b"second")
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"first"
    write_atomic(tmp_path / "a", b"third")
    assert contents(tmp_path) == {"a": b"third"}


LOCK_ONCE_MORE = """
import errno, fcntl, sys
from pathlib import Path
from glyphgpt.errors import exit_on_error
from glyphgpt.files import locked

def no_flock(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")

fcntl.flock = no_flock
with exit_on_error(), locked(Path(sys.argv[1]), "another"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_file_system_without_flock_is_locked_another_way(tmp_path: Path) -> None:
    def lock() -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", LOCK_ONCE_MORE, str(tmp_path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, **pipes, text=True, cwd=ROOT)  # type: ignore[call-overload]

    first = lock()
    assert first.stdout
    assert first.stdout.readline() == "locked\n"
    assert (
        lock().communicate()[1] == f"error: {tmp_path}: in use by another process; wait until it ends, or use another\n"
    )
    first.kill()
    first.communicate()
    assert lock().communicate() == ("locked\n", ""), "a process that was killed holds no lock"


class Refusal:
    """Has a call of the system fail, as file systems without it do."""

    def __init__(self, really: Callable[..., Any], error: int) -> None:
        self.really, self.error, self.calls = really, error, 0

    def __call__(self, *_: object, **__: object) -> None:
        self.calls += 1
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize(
    ("call", "error"),
    [("chmod", errno.EPERM), ("fsync", errno.EINVAL), ("fsync", errno.ENOTSUP)],
)
def test_what_a_file_system_lacks_does_not_stop_the_work(
    call: str, error: int, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = Refusal(getattr(os, call), error)
    monkeypatch.setattr(os, call, refusal)
    train.main(tiny_settings(data_dir, tmp_path, max_steps=2))
    assert refusal.calls
    train.main(tiny_settings(data_dir, tmp_path, max_steps=3, resume=True))


def test_a_folder_that_cannot_be_opened_is_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", Refusal(os.open, errno.EACCES))
    fsync_dir(tmp_path)


def test_data_that_could_not_be_written_to_the_disk_is_a_failure(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", Refusal(os.fsync, errno.EIO))
    with pytest.raises(UserError, match="could not be written: Input/output error"):
        train.main(tiny_settings(data_dir, tmp_path, max_steps=2))


def test_new_files_take_their_places_together_and_others_stay(tmp_path: Path) -> None:
    for name in ("a", "old page", "notes"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    with replace_files(tmp_path, stale=("old page", "no such page")) as new:
        (new / "a").write_text("new", encoding="utf-8")
        (new / "b").write_text("new", encoding="utf-8")
        assert contents(tmp_path) == {"a": b"a", "old page": b"old page", "notes": b"notes"}
    assert contents(tmp_path) == {"a": b"new", "b": b"new", "notes": b"notes"}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
