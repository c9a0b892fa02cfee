"""Fixtures and helpers: small texts, datasets, networks and settings, and ways to run the scripts."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy is imported: tiny networks gain nothing from more threads

import json
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import prepare
from glyphgpt.checkpoint import load_checkpoint
from glyphgpt.cli import parse
from glyphgpt.data.downloads import GPT2_ENCODER, GPT2_MERGES, fetch
from glyphgpt.errors import UserError
from glyphgpt.files import BEST, LAST
from glyphgpt.inference.numpy_gpt import NumpyGPT
from glyphgpt.settings import ModelConfig, PrepareSettings, TrainSettings
from glyphgpt.training.torch_state import model_arrays
from model import GPT, GPTConfig

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ROOT = Path(__file__).parent.parent

collect_ignore = [
    "gpu/pretended_gpu.py",
    "gpu/site",
]  # pytest imports modules for their doctests, and these change torch

# Child processes inherit ignored signals, for example SIGHUP under nohup, but not handlers. With a handler in place of
# SIG_IGN, the scripts under test start with the default handlers.
IGNORED_BY_PYTHON = {getattr(signal, name, None) for name in ("SIGPIPE", "SIGXFSZ")}
for number in signal.valid_signals() - IGNORED_BY_PYTHON:
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

NO_SKIPS = os.environ.get("GLYPHGPT_NO_SKIPS") == "1"
"""Whether skipped tests fail, except those that need a GPU. CI, which installs all packages, sets it."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skipped test into a failure if skips are not allowed."""
    report = yield
    if NO_SKIPS and report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("gpu"):
        fail_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn a skipped file into a failure if skips are not allowed."""
    report = yield
    if NO_SKIPS and report.skipped:
        fail_skipped(report)
    return report


def fail_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure that names its reason."""
    *_, reason = report.longrepr if isinstance(report.longrepr, tuple) else (report.longrepr,)
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: skips are not allowed (GLYPHGPT_NO_SKIPS=1). {reason}"


@pytest.fixture(autouse=True)
def restore_sigint() -> Iterator[None]:
    """Restore pytest's handler of Ctrl-C after each test; the scripts replace it."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU if there is none."""
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
"""All values of the network's switches."""

NETWORKS = [dict(zip(SWITCHES, values, strict=True)) for values in product(*SWITCHES.values())]
"""All combinations of the switches; in every seventh one, each pair of values occurs."""

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
"""Every switch set to another value than GPT-2's."""


def tiny_config(**changes: object) -> GPTConfig:
    """Return the config of a very small GPT-2 with some fields changed."""
    config = {
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
    return GPTConfig(**{**config, **changes})  # type: ignore[arg-type]


def tiny_model(seed: int = 0, **changes: object) -> GPT:
    """Return a very small model with initial weights, in evaluation mode."""
    torch.manual_seed(seed)
    return GPT(tiny_config(**changes)).eval()


def randomize(module: nn.Module, std: float = 0.3) -> None:
    """Give every parameter random values, so that no bias is 0, no gain is 1, and every weight matters."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)


def random_model(std: float = 0.3, **changes: object) -> GPT:
    """Return a very small model with random values for all parameters, in evaluation mode."""
    model = tiny_model(**changes)  # type: ignore[arg-type]
    randomize(model, std)
    return model


def decoder_of(model: GPT) -> NumpyGPT:
    """Return the NumPy model with the weights of a torch model."""
    return NumpyGPT(ModelConfig(**asdict(model.config)), model_arrays(model))


def some_text(characters: int, seed: int = 0) -> str:
    """Return a text with enough pattern to learn: a few phrases in random order."""
    rng = random.Random(seed)
    phrases = ["to be", "or not", "the king", "my lord,", "good night.\n", "exit", "Ophelia:", "why?"]
    text = ""
    while len(text) < characters:
        text += rng.choice(phrases) + " "
    return text[:characters]


def prepare_text(text: str, data_dir: Path, name: str = "small", **changes: object) -> Path:
    """Prepare a text as a user's file, and return the dataset's folder."""
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
    """Return a data folder with the dataset `small`, 6,000 characters of text."""
    folder = tmp_path_factory.mktemp("data")
    prepare_text(some_text(6000), folder)
    return folder


def tiny_settings(data_dir: Path, out_dir: Path, **changes: object) -> TrainSettings:
    """Return settings that train on the dataset `small` within a second."""
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
        "eval_tokens": 0,
        "sample_tokens": 10,
        "report": False,
        "log_every": 1,
        "warmup_steps": 2,
        "dtype": "float32",
        "device": "cpu",
    }
    return TrainSettings.model_validate({**settings, **changes})


def as_flags(settings: TrainSettings) -> list[str]:
    """Return settings as command-line flags."""
    return [f"--{key}={value}" for key, value in settings.model_dump(exclude_unset=True).items()]


def read_metrics(out_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def count_rows(out_dir: Path) -> int:
    """Return the number of rows in a run's metrics.jsonl so far."""
    path = out_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved_step(out_dir: Path, name: str = LAST) -> int:
    """Return the step of a run's checkpoint."""
    return load_checkpoint(out_dir / name).metadata.state.step


def same_tensors(one: Path, other: Path, name: str = LAST) -> bool:
    """Return whether the checkpoints of that name in two runs hold the same tensors, bit for bit."""
    first, second = load_file(one / name), load_file(other / name)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def assert_same_run(one: Path, other: Path) -> None:
    """Check that two runs have the same checkpoints, metrics and samples, bit for bit, except for times."""
    for name in (BEST, LAST):
        assert same_tensors(one, other, name)
        first, second = (load_checkpoint(folder / name).metadata for folder in (one, other))
        assert first.state.model_dump(exclude={"seconds"}) == second.state.model_dump(exclude={"seconds"})
        assert first.val_loss == second.val_loss
    assert rows_without_seconds(one) == rows_without_seconds(other)
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()


def rows_without_seconds(out_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl without times, which vary."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_metrics(out_dir)]


@pytest.fixture(scope="session")
def gpt2_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data folder that contains GPT-2's vocabulary."""
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "downloads").mkdir()
    for source in (GPT2_ENCODER, GPT2_MERGES):
        try:
            file = fetch(source, ROOT / "data")
        except UserError as error:
            pytest.skip(str(error))
        (folder / "downloads" / source.file).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Chrome]":
    """Start headless Chromium with a new profile for all tests of a file; skip them if it is not installed."""
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
        "no-sandbox",  # the sandbox does not work for root; all pages are our own
        "disable-dev-shm-usage",  # /dev/shm is small in containers
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        yield chrome


def page_json(path: Path) -> dict[str, Any]:
    """Return the data of an HTML page of ours."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of each file in a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def script(name: str, *words: str, text: str | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a script in its own process, and return its output and exit status."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *words],
        input=text,
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        timeout=240,
        check=False,
    )


@contextmanager
def torchrun(processes: int, *words: str, flags: tuple[str, ...] = ()) -> Iterator["subprocess.Popen[str]"]:
    """Start a script in several processes with torchrun, and terminate them at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *flags]
    process = subprocess.Popen(
        [*command, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun terminates its processes
            process.communicate()
