"""Errors are one line each and an exit status; closed and broken streams are handled."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, as_flags, read_metrics, saved_step, tiny_settings
from glyphgpt.errors import UsageError, UserError, exit_on_error, format_os_error, optional_import, print_error, warn


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("no such thing"), 1, "error: no such thing\n"),
        (UserError("first\nsecond"), 1, "error: first\nerror: second\n"),
        (UsageError("a: wrong\nb: wrong too"), 2, "error: a: wrong\nerror: b: wrong too\n"),
        (UsageError("wörd 中 🙂"), 2, "error: wörd 中 🙂\n"),
        (KeyboardInterrupt(), 130, ""),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), 1, "error: a.txt: No such file\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device\n"),
        (OSError("something odd"), 1, "error: something odd\n"),
        (MemoryError(), 1, "error: out of memory; use a smaller model, batch or text\n"),
    ],
    ids=repr,
)
def test_errors_become_lines_and_an_exit_status(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, message: str
) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_error():
        print("output", end="")
        raise error
    assert caught.value.code == status
    assert capsys.readouterr() == ("output", message)


def test_system_exit_keeps_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_error():
        raise SystemExit(7)
    assert caught.value.code == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [ZeroDivisionError(), AssertionError("bug")], ids=repr)
def test_other_exceptions_propagate(capsys: pytest.CaptureFixture[str], error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, exit_on_error():
        raise error
    assert caught.value is error
    assert capsys.readouterr().err == ""


def test_exit_on_error_does_nothing_without_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with exit_on_error():
        print("fine")
    assert capsys.readouterr() == ("fine\n", "")


def test_print_error_and_warn_write_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_error(UsageError("one\ntwo")) == 2
    warn("careful")
    assert capsys.readouterr() == ("", "error: one\nerror: two\nwarning: careful\n")


def test_os_error_is_one_line() -> None:
    try:
        (ROOT / "nowhere" / "x").read_text()
    except OSError as error:
        assert format_os_error(error) == f"{ROOT / 'nowhere' / 'x'}: No such file or directory"


def run(code: str, *, close_output: bool = False, encoding: str = "utf-8") -> tuple[int, str]:
    """Run code inside exit_on_error in a new process; return its exit status and standard error."""
    lines = "\n".join(f"    {line}" for line in code.splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", f"from glyphgpt.errors import *\nwith exit_on_error():\n{lines}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": ""},
    )
    assert process.stdout and process.stderr
    if close_output:
        process.stdout.close()
    else:
        process.stdout.read()
    errors = process.stderr.read().decode()
    return process.wait(), errors


@pytest.mark.parametrize("text", ["'x'", "'x' * 10**6", "'x', flush=True"])
def test_broken_pipe_ends_the_script_with_sigpipe_status(text: str) -> None:
    assert run(f"print({text})", close_output=True) == (141, "")


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [("raise UserError('disk on fire')", 1, "error: disk on fire\n"), ("raise SystemExit(7)", 7, "")],
)
def test_error_is_printed_after_a_broken_pipe(code: str, status: int, message: str) -> None:
    assert run(f"print('x', end='')\n{code}", close_output=True) == (status, message)


def run_after(code: str, before: str = "") -> tuple[int, str]:
    """Run code after an exit_on_error block in a new process; return its exit status and standard error."""
    imports = "import atexit, signal\nfrom glyphgpt.errors import *\ndef ctrl_c(): signal.raise_signal(2)"
    code = f"{imports}\n{before}\nwith exit_on_error():\n    pass\n{code}"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, encoding="utf-8", cwd=ROOT, check=False)
    return done.returncode, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="exit statuses of signals exist on POSIX only")
@pytest.mark.parametrize(
    ("code", "before", "status"),
    [
        ("ctrl_c()", "", -2),
        ("atexit.register(ctrl_c)", "", -2),
        ("with exit_on_error():\n    ctrl_c()", "", 130),
        ("ctrl_c()", "signal.signal(signal.SIGINT, signal.SIG_IGN)", 0),
    ],
    ids=["outside", "at exit", "in another block", "ignored in a background job"],
)
def test_ctrl_c_leaves_no_traceback(code: str, before: str, status: int) -> None:
    assert run_after(code, before) == (status, "")


def test_any_character_can_be_printed_on_any_console() -> None:
    assert run("print('中🙂\\ud800')\nwarn('中\\ud800')", encoding="ascii") == (0, "warning: 中\\ud800\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
@pytest.mark.parametrize("words", [["--help"], ["shakespeare_char", "--name=x"]], ids=["help", "error"])
def test_unwritable_output_is_one_line(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / "prepare.py"), *words],
            stdout=full, stderr=subprocess.PIPE, encoding="utf-8", cwd=ROOT, check=False,
        )  # fmt: skip
    assert done.returncode == (1 if words == ["--help"] else 2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="closes file descriptors")
@pytest.mark.parametrize("descriptors", [(0, 1, 2)])
def test_scripts_work_with_closed_streams(descriptors: tuple[int, ...], data_dir: Path, tmp_path: Path) -> None:
    """Daemons and some schedulers start processes with closed streams, as <&- >&- 2>&- does in a shell."""

    def close_streams() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    flags = as_flags(tiny_settings(data_dir, tmp_path / "run", max_steps=2))
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question", encoding="utf-8")
    for words in (
        ["prepare.py", str(tmp_path / "a.txt"), f"--data_dir={tmp_path}"],
        ["train.py", *flags],
        ["sample.py", str(tmp_path / "run"), "--max_new_tokens=5", "--device=cpu"],
        ["sample.py", str(tmp_path / "run"), "--interactive", "--device=cpu"],
        ["train.py", "--help"],
    ):
        if words[-2:] != ["--interactive", "--device=cpu"] or 0 in descriptors:
            done = subprocess.run(
                [sys.executable, str(ROOT / words[0]), *words[1:]], preexec_fn=close_streams, cwd=ROOT, check=False,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert (done.returncode, "Traceback" in done.stderr) == (0, False), (words, done.stderr)
    assert (tmp_path / "a" / "meta.json").exists()
    assert saved_step(tmp_path / "run") == 2


def test_files_never_get_the_descriptor_of_a_closed_stream() -> None:
    code = "import os; from glyphgpt.errors import *; open_standard_streams(); print(os.open('/dev/null', 0) > 2)"
    command = ["bash", "-c", f'"{sys.executable}" -c "{code}" 2>&- <&-']
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout == "True\n"


def test_training_saves_and_stops_after_a_broken_pipe(data_dir: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data_dir, tmp_path, max_steps=3000, eval_every=10, save_every=0)
    command = [sys.executable, str(ROOT / "train.py"), *as_flags(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141
    assert read_metrics(tmp_path)[-1]["step"] == saved_step(tmp_path) > 0


def test_thread_limit_is_one_line() -> None:
    message = "error: the system allows no more threads or processes; raise its limit (ulimit -u)\n"
    assert run('raise RuntimeError("can\'t start new thread")') == (1, message)
    assert "Traceback" in run('raise RuntimeError("another error")')[1]


@pytest.mark.parametrize("error", [ImportError("bad binary"), ValueError("numpy.dtype size changed"), OSError("libx")])
def test_broken_package_is_not_reported_as_missing(error: Exception) -> None:
    with (
        pytest.raises(UsageError, match=rf"^it needs pyarrow, which is installed but .*\({error}\); reinstall it"),
        optional_import("pyarrow", "it"),
    ):
        raise error


def test_package_with_a_missing_dependency_is_not_reported_as_missing() -> None:
    reason = r"^it needs wandb, which is installed but .*\(No module named 'xxhash'\)"
    with pytest.raises(UsageError, match=reason), optional_import("wandb", "it"):
        raise ModuleNotFoundError("No module named 'xxhash'", name="xxhash")
