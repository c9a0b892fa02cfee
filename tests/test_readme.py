"""The README's commands work, and the page of settings tells what the code declares."""

import importlib.util
import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import sample
import train
from conftest import ROOT, run_prepare, some_text
from glyphgpt.cli import parse
from glyphgpt.convert.__main__ import KINDS
from glyphgpt.settings import (
    ConvertSettings,
    PlotSettings,
    ReportSettings,
    SampleSettings,
    Settings,
    TrainSettings,
    TranslateSettings,
)

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
RECIPES = ["shakespeare_char", "multi30k_de_en"]
FEW = ["--max_new_tokens=3", "--device=cpu", "--skip_unknown"]  # the small text lacks some letters
SMALL = [
    "--max_steps=1",
    "--eval_tokens=100",
    "--sample_tokens=5",
    "--batch_size=1",
    "--device=cpu",
    "--compile=False",
    "--plot=False",
]


def own_commands() -> list[list[str]]:
    """The README's calls of the three scripts, in order, without the python before them, but on folders of others."""
    scripts = {"prepare.py", "train.py", "sample.py"}
    calls = [words[1:] for words in COMMANDS if words[:1] == ["python"] and words[1] in scripts]
    return [words for words in calls if "--init_from=FOLDER" not in words]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a fresh clone is, with a small text in place of the recipes', already prepared."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "my.txt").write_text(some_text(5000), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    for recipe in RECIPES:
        run(["prepare.py", "my.txt", f"--name={recipe}"], monkeypatch)
    return tmp_path


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script in this process, as its command line would; training takes one step only."""
    name, *rest = words
    if name == "prepare.py":
        run_prepare(*rest)
    elif name == "train.py":
        settings, _ = parse(TrainSettings, [*rest, *SMALL], "", "", files=True)
        train.main(settings)
    else:
        chosen, (place,) = parse(SampleSettings, [*rest, *FEW], "", "", files=False)
        sample.main(chosen, place)


def test_every_command_in_the_readme_runs(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [words for words in own_commands() if words[1] not in RECIPES]
    assert len(commands) >= 12
    for words in commands:
        run(words, monkeypatch)
    assert (checkout / "out/mine/best.safetensors").is_file()


def test_torchrun_and_make_commands_are_real() -> None:
    longer = [shlex.split(line) for line in re.findall(r"^  (train\.py [^\n$]*)", README, re.MULTILINE)]
    several = [words[words.index("train.py") :] for words in [*COMMANDS, *longer] if "train.py" in words]
    several = [words for words in several if "config/gpt2.toml" in words]
    assert len(several) == 3
    for words in several:
        parse(TrainSettings, words[1:], "", "", files=True)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {words[1] for words in COMMANDS if words[:1] == ["make"]}
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_conversions_are_real() -> None:
    conversions = [words[3:] for words in COMMANDS if words[:3] == ["python", "-m", "glyphgpt.convert"]]
    assert {kind for kind, *_ in conversions} == KINDS.keys()
    for _, _, *flags in conversions:
        parse(ConvertSettings, flags, "", "", files=False)


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        ("reports.plot", PlotSettings),
        ("reports.run_report", ReportSettings),
        ("inference.translate", TranslateSettings),
    ],
)
def test_commands_of_modules_are_real(module: str, settings: type[Settings]) -> None:
    commands = [words[3:] for words in COMMANDS if words[:3] == ["python", "-m", f"glyphgpt.{module}"]]
    assert commands
    for words in commands:
        assert parse(settings, words, "", "", files=False)[1]


def test_benchmarks_take_the_flags_that_the_readme_gives() -> None:
    benchmarks = [words for words in COMMANDS if words[:1] == ["python"] and words[1].startswith("bench/")]
    assert benchmarks
    for _, file, *flags in benchmarks:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert all(f'add_argument("{flag.partition("=")[0]}"' in source for flag in flags)


def test_make_demo_and_the_plain_commands_are_the_same() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in ("prepare.py shakespeare_char", "train.py config/quick.toml", "sample.py out/quick --num_samples=3"):
        assert line in makefile
        assert line in README


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_page_of_settings_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_settings", ROOT / "docs/make_settings.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == module.page()


def test_readme_names_real_settings_only() -> None:
    table = README[README.index("| setting |") : README.index("[docs/settings.md]")]
    cells = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    names = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert names
    assert names <= set(TrainSettings.model_fields)
