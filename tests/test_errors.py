"""One clear line and an exit status."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from glyphgpt.errors import Failure, UsageError, describe, plain_errors, report, warn


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (Failure("no such thing"), 1, "error: no such thing\n"),
        (Failure("first\nsecond"), 1, "error: first\nerror: second\n"),
        (UsageError("a: wrong\nb: wrong too"), 2, "error: a: wrong\nerror: b: wrong too\n"),
        (UsageError("wörd 中 🙂"), 2, "error: wörd 中 🙂\n"),
        (KeyboardInterrupt(), 130, ""),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), 1, "error: a.txt: No such file\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device\n"),
        (OSError("something odd"), 1, "error: something odd\n"),
        (MemoryError(), 1, "error: out of memory; make something smaller\n"),
    ],
    ids=repr,
)
def test_errors_become_lines_and_a_status(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, words: str
) -> None:
    with pytest.raises(SystemExit) as caught, plain_errors():
        print("so far", end="")
        raise error
    assert caught.value.code == status
    assert capsys.readouterr() == ("so far", words)


def test_an_exit_keeps_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, plain_errors():
        raise SystemExit(7)
    assert caught.value.code == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [ZeroDivisionError(), AssertionError("bug")], ids=repr)
def test_bugs_pass(capsys: pytest.CaptureFixture[str], error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, plain_errors():
        raise error
    assert caught.value is error
    assert capsys.readouterr().err == ""


def test_without_errors_nothing_happens(capsys: pytest.CaptureFixture[str]) -> None:
    with plain_errors():
        print("fine")
    assert capsys.readouterr() == ("fine\n", "")


def test_report_and_warn_write_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(UsageError("one\ntwo")) == 2
    warn("careful")
    assert capsys.readouterr() == ("", "error: one\nerror: two\nwarning: careful\n")


def test_an_os_error_is_one_line() -> None:
    try:
        (ROOT / "nowhere" / "x").read_text()
    except OSError as error:
        assert describe(error) == f"{ROOT / 'nowhere' / 'x'}: No such file or directory"


def run(code: str, *, close_output: bool = False, encoding: str = "utf-8") -> tuple[int, str]:
    """Run lines inside plain_errors in a process of their own; return its status and standard error."""
    lines = "\n".join(f"    {line}" for line in code.splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", f"from glyphgpt.errors import *\nwith plain_errors():\n{lines}"],
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
def test_a_reader_that_has_seen_enough_ends_the_script_as_in_other_programs(text: str) -> None:
    assert run(f"print({text})", close_output=True) == (141, "")


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [("raise Failure('disk on fire')", 1, "error: disk on fire\n"), ("raise SystemExit(7)", 7, "")],
)
def test_the_end_is_told_even_when_nobody_reads_the_output(code: str, status: int, words: str) -> None:
    assert run(f"print('x', end='')\n{code}", close_output=True) == (status, words)


def lines_after(lines: str, start: str = "") -> tuple[int, str]:
    """Run lines after what plain_errors ended in, in a process of their own; return its status and standard error."""
    begin = "import atexit, signal\nfrom glyphgpt.errors import *\ndef ctrl_c(): signal.raise_signal(2)"
    code = f"{begin}\n{start}\nwith plain_errors():\n    pass\n{lines}"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, encoding="utf-8", cwd=ROOT, check=False)
    return done.returncode, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="statuses of signals are POSIX's")
@pytest.mark.parametrize(
    ("lines", "start", "status"),
    [
        ("ctrl_c()", "", -2),
        ("atexit.register(ctrl_c)", "", -2),
        ("with plain_errors():\n    ctrl_c()", "", 130),
        ("ctrl_c()", "signal.signal(signal.SIGINT, signal.SIG_IGN)", 0),
    ],
    ids=["while importing", "while clearing up", "in the next part", "of a background job"],
)
def test_ctrl_c_leaves_no_traceback(lines: str, start: str, status: int) -> None:
    assert lines_after(lines, start) == (status, "")


def test_any_character_can_be_shown_on_any_console() -> None:
    assert run("print('中🙂\\ud800')\nwarn('中\\ud800')", encoding="ascii") == (0, "warning: 中\\ud800\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
@pytest.mark.parametrize("words", [["--help"], ["shakespeare_char", "--name=x"]], ids=["help", "refusal"])
def test_output_that_cannot_be_written_is_one_line(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / "prepare.py"), *words],
            stdout=full, stderr=subprocess.PIPE, encoding="utf-8", cwd=ROOT, check=False,
        )  # fmt: skip
    assert done.returncode == (1 if words == ["--help"] else 2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
