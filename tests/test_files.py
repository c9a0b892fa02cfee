"""Locks, atomic writes, and the replacement of several files together."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from conftest import ROOT, as_flags, contents, script, tiny_settings
from glyphgpt.errors import UsageError, UserError
from glyphgpt.files import LOCK, fsync_dir, locked, replace_files, write_atomic


def test_locked_creates_the_folder_and_excludes_others(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "run"
    with locked(folder, "x"):
        assert folder.is_dir()
        with pytest.raises(UsageError, match=rf"^{folder}: in use by another process; .*$"), locked(folder, "x"):
            pass
    with locked(folder, "x"):
        pass


def test_second_training_in_a_folder_is_rejected_and_changes_nothing(data_dir: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data_dir, tmp_path, max_steps=2)
    train.main(settings)
    with locked(tmp_path, "x"):
        before = contents(tmp_path)
        message = f"{tmp_path}: in use by another process; wait until it ends, or use --out_dir=ANOTHER"
        done = script("train.py", *as_flags(settings), "--resume")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {message}")
        for changes in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(UsageError, match=f"^{message}"):
                train.main(settings.model_copy(update=changes))
        assert contents(tmp_path) == before


def test_lock_is_released_when_its_process_is_killed(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from glyphgpt.files import locked\n"
    code += "with locked(Path(sys.argv[1]), 'x'): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path, "x"):
        pass


def test_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=rf"^{tmp_path / 'file'}.*: could not be written: "),
        locked(tmp_path / "file", "x"),
    ):
        pass


@pytest.mark.parametrize("call", ["replace", "unlink"])
def test_failed_write_keeps_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_atomic(tmp_path / "a", b"first")

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", fail)
    if call == "unlink":  # a leftover temporary file does no harm
        monkeypatch.setattr(os, "unlink", fail)
    with pytest.raises(
        UserError, match=rf"^{tmp_path / 'a'}: could not be written: No space left on device; the previous file"
    ):
        write_atomic(tmp_path / "a", b"second")
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"first"
    write_atomic(tmp_path / "a", b"third")
    assert contents(tmp_path) == {"a": b"third"}


LOCK_WITHOUT_FLOCK = """
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


def test_locked_works_on_a_file_system_without_flock(tmp_path: Path) -> None:
    def lock() -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", LOCK_WITHOUT_FLOCK, str(tmp_path)]
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
    assert lock().communicate() == ("locked\n", ""), "a killed process holds no lock"


class FailingCall:
    """A system call that always fails, as on a file system that does not support it."""

    def __init__(self, error: int) -> None:
        self.error, self.calls = error, 0

    def __call__(self, *_: object, **__: object) -> None:
        self.calls += 1
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize(
    ("call", "error"),
    [("chmod", errno.EPERM), ("fsync", errno.EINVAL), ("fsync", errno.ENOTSUP)],
)
def test_unsupported_system_calls_do_not_stop_training(
    call: str, error: int, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = FailingCall(error)
    monkeypatch.setattr(os, call, failing)
    train.main(tiny_settings(data_dir, tmp_path, max_steps=2))
    assert failing.calls
    train.main(tiny_settings(data_dir, tmp_path, max_steps=3, resume=True))


def test_fsync_dir_ignores_folders_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", FailingCall(errno.EACCES))
    fsync_dir(tmp_path)


def test_failed_flush_is_an_error(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", FailingCall(errno.EIO))
    with pytest.raises(UserError, match="could not be written: Input/output error"):
        train.main(tiny_settings(data_dir, tmp_path, max_steps=2))


def test_replace_files_replaces_all_at_the_end_and_keeps_others(tmp_path: Path) -> None:
    for name in ("a", "old page", "notes"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    with replace_files(tmp_path, stale=("old page", "no such page")) as new:
        (new / "a").write_text("new", encoding="utf-8")
        (new / "b").write_text("new", encoding="utf-8")
        assert contents(tmp_path) == {"a": b"a", "old page": b"old page", "notes": b"notes"}
    assert contents(tmp_path) == {"a": b"new", "b": b"new", "notes": b"notes"}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
