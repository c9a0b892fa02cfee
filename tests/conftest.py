"""Small texts, data sets and settings that the tests share."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import prepare
from glyphgpt.cli import parse
from glyphgpt.data.downloads import GPT2_ENCODER, GPT2_MERGES, fetch
from glyphgpt.errors import UserError
from glyphgpt.inference.numpy_gpt import NumpyGPT
from glyphgpt.settings import ModelConfig, PrepareSettings, TrainSettings
from glyphgpt.training.torch_state import model_arrays
from model import GPT, GPTConfig

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # tiny networks gain nothing from more, and suites may run side by side


# A child process inherits ignored signals, but no handlers. Under nohup, or in the background of a script, the suite
# still ignores SIGHUP or SIGINT, and the programs that it tests start with the system's defaults.
IGNORED_BY_PYTHON = {getattr(signal, name, None) for name in ("SIGPIPE", "SIGXFSZ")}
for number in signal.valid_signals() - IGNORED_BY_PYTHON:
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

NO_SKIPS = os.environ.get("GLYPHGPT_NO_SKIPS") == "1"
"""Whether a skipped test fails, but for those that need a GPU: CI installs what all others need."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a skipped test where none may be."""
    report = yield
    if NO_SKIPS and report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("gpu"):
        refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fail a skipped file of tests where none may be."""
    report = yield
    if NO_SKIPS and report.skipped:
        refuse_skip(report)
    return report


def refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure that names its reason."""
    *_, reason = report.longrepr if isinstance(report.longrepr, tuple) else (report.longrepr,)
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: no test may be skipped here (GLYPHGPT_NO_SKIPS=1). {reason}"


@pytest.fixture(autouse=True)
def ctrl_c_as_before() -> Iterator[None]:
    """Give Ctrl-C back to pytest after each test: scripts let go of it at their end."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


SWITCHES: dict[str, list[Any]] = {
    "position": ["learned", "sinusoidal", "rotary"],
    "norm": ["layernorm", "rmsnorm"],
    "activation": ["gelu", "gelu_erf", "relu2"],
    "qk_norm": [False, True],
    "tie_embeddings": [True, False],
    "bias": [True, False],
    "ngram": [1, 4],
    "token_shift": [False, True],
}
"""Every value of the network's switches."""

MODERN: dict[str, Any] = {
    "position": "rotary",
    "norm": "rmsnorm",
    "activation": "relu2",
    "qk_norm": True,
    "bias": False,
    "tie_embeddings": False,
    "ngram": 3,
    "ngram_rows": 50,
    "token_shift": True,
    "init": "zero",
}
"""Every switch away from GPT-2's form."""


def tiny_config(**changes: object) -> GPTConfig:
    """A network small enough for any test: GPT-2's form unless changed."""
    form = {
        "vocab_size": 11,
        "block_size": 8,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "dropout": 0.0,
        "bias": True,
        "position": "learned",
        "norm": "layernorm",
        "activation": "gelu",
        "qk_norm": False,
        "tie_embeddings": True,
        "ngram": 1,
        "ngram_rows": 50,
        "token_shift": False,
        "init": "gpt2",
    }
    return GPTConfig(**{**form, **changes})  # type: ignore[arg-type]


def tiny_model(seed: int = 0, **changes: object) -> GPT:
    """Such a network with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return GPT(tiny_config(**changes)).eval()


def decoder_of(model: GPT) -> NumpyGPT:
    """Return what a CPU decodes with, with a model's weights."""
    return NumpyGPT(ModelConfig(**asdict(model.config)), model_arrays(model))


def some_text(characters: int, seed: int = 0) -> str:
    """Text with enough pattern to learn: a few words in random order."""
    chosen = random.Random(seed)
    words = ["to be", "or not", "the king", "my lord,", "good night.\n", "exit", "Ophelia:", "why?"]
    text = ""
    while len(text) < characters:
        text += chosen.choice(words) + " "
    return text[:characters]


def prepare_text(text: str, data_dir: Path, name: str = "small", **changes: object) -> Path:
    """Prepare a text as a user's file, and return the data set's folder."""
    file = data_dir / f"{name}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())
    settings = {"name": name, "data_dir": str(data_dir), **changes}
    prepare.prepare_files([str(file)], PrepareSettings.model_validate(settings))
    return data_dir / name


def run_prepare(*words: str) -> None:
    """Run prepare.py in this process, with the words of its command line."""
    settings, plain = parse(PrepareSettings, words, "", "", files=False)
    prepare.main(settings, *plain)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a small data set, `small`: 6,000 characters."""
    folder = tmp_path_factory.mktemp("data")
    prepare_text(some_text(6000), folder)
    return folder


def tiny_settings(data_dir: Path, out_dir: Path, **changes: object) -> TrainSettings:
    """Settings of a run of seconds on the data set `small`."""
    settings = {
        "dataset": "small",
        "data_dir": str(data_dir),
        "out_dir": str(out_dir),
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "block_size": 16,
        "batch_size": 4,
        "max_steps": 20,
        "eval_every": 10,
        "eval_tokens": 200,
        "sample_tokens": 10,
        "plot": False,
        "report": False,
        "log_every": 1,
        "warmup_steps": 2,
        "dtype": "float32",
        "device": "cpu",
    }
    return TrainSettings.model_validate({**settings, **changes})


def as_flags(settings: TrainSettings) -> list[str]:
    """Write settings as command-line flags."""
    return [f"--{key}={value}" for key, value in settings.model_dump(exclude_unset=True).items()]


def read_metrics(out_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def same_tensors(one: Path, other: Path, name: str = "last.safetensors") -> bool:
    """Whether the checkpoints of that name in two runs hold the same tensors, bit for bit."""
    first, second = load_file(one / name), load_file(other / name)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="session")
def gpt2_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a data folder with GPT-2's vocabulary in it."""
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "downloads").mkdir()
    for source in (GPT2_ENCODER, GPT2_MERGES):
        try:
            found = fetch(source, ROOT / "data")
        except UserError as failure:
            pytest.skip(str(failure))
        (folder / "downloads" / source.file).write_bytes(found.read_bytes())
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Chrome]":
    """Chromium without a window, with a profile of its own, for all tests of a file; skip where it is missing."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("Chromium with its driver is not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
        "no-sandbox",  # root cannot have one; all pages are our own
        "disable-dev-shm-usage",  # it is small in containers
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        yield chrome


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def script(name: str, *words: str, text: str | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does, and return its output and exit status."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *words],
        input=text,
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )


@contextmanager
def torchrun(processes: int, *words: str, flags: tuple[str, ...] = ()) -> Iterator["subprocess.Popen[str]"]:
    """Start several processes of a script, which are gone at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *flags]
    process = subprocess.Popen(
        [*command, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # which it hands on
            process.communicate()
