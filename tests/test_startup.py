"""The start of a script: help and mistakes before torch is imported, and the memory allocator."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from glyphgpt import startup

SCRIPTS = ["prepare.py", "train.py", "sample.py"]


def run_without_torch(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run a script in a process in which torch cannot be imported."""
    code = "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, encoding="utf-8", cwd=ROOT, check=False
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_does_not_need_torch(name: str) -> None:
    done = run_without_torch(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python {name} ")
    assert "--data_dir TEXT" in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_mistakes_are_reported_without_torch(name: str) -> None:
    done = run_without_torch(name, "--n_layers=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: command line: unknown key --n_layers; .*\n", done.stderr)


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('n_layers = 3\nblock_size = "64"\n', encoding="utf-8")
    words = ["--n_head=0", "--dropout=1.5", "--max_iters=5", "--compile=maybe"]
    done = run_without_torch("train.py", str(config), *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert sorted(done.stderr.splitlines()) == [
        f"error: {config}: 'block_size' must be a whole number, at least 1, at most 131072, not '64'",
        f"error: {config}: unknown key 'n_layers'; did you mean 'n_layer'?",
        "error: command line: --compile must be 'auto' or true or false, not 'maybe'",
        "error: command line: --dropout must be a number, at least 0, below 1, not '1.5'",
        "error: command line: --n_head must be a whole number, at least 1, not '0'",
        "error: command line: unknown key --max_iters; nanoGPT's 'max_iters' is 'max_steps' here",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n_embd=10", "--n_head=3"], r"error: n_embd = 10 is not a multiple of n_head = 3\n"),
        (["--resume", "--overwrite"], r"error: resume and overwrite contradict each other; choose one\n"),
        (["missing.toml"], r"error: missing\.toml: no such file of settings, nor folder of a run\n"),
        (
            ["LICENSE"],
            r"error: LICENSE: not a TOML file of settings: .*; .* prepare it first: python prepare\.py LICENSE\n",
        ),
        (["config/my.py"], r"error: config/my\.py: a Python config is never executed; .*config/my\.toml.*\n"),
    ],
)
def test_conflicts_and_bad_files_are_one_line(words: list[str], message: str) -> None:
    done = run_without_torch("train.py", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(message, done.stderr)


PAGE_FAULTS = """
import resource
from glyphgpt.startup import keep_freed_memory

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [b"x" * 2**22 for _ in range(50)]  # 4 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print([step() for _ in range(6)][-1])
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="only glibc returns freed memory this early")
def test_freed_memory_is_kept() -> None:
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], check=True, capture_output=True, text=True, cwd=ROOT)
    assert int(done.stdout) < 5000  # otherwise the last step requests all of its 51,200 pages again


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_keep_freed_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(ROOT / name), raising=False)
    monkeypatch.setattr(startup, "keep_freed_memory", lambda: calls.append("memory"))
    monkeypatch.setattr(startup, "exit_on_ctrl_c", lambda: calls.append("ctrl-c"))
    monkeypatch.setattr(startup, "parse_command_line", calls.append)
    startup.start()
    startup._parsed.clear()
    assert calls == ["ctrl-c", "memory", name]
