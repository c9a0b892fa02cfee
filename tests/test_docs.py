"""Every command in the documentation works, every link has a target, and every setting and message exists."""

import ast
import doctest
import io
import re
import runpy
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from conftest import ROOT, some_text
from glyphgpt.cli import parse
from glyphgpt.convert.__main__ import KINDS
from glyphgpt.settings import (
    ConvertSettings,
    PlotSettings,
    PrepareSettings,
    ReportSettings,
    SampleSettings,
    Settings,
    TrainSettings,
    TranslateSettings,
)

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for folder in (".", "docs", "bench", "lessons")
    for path in sorted((ROOT / folder).glob("*.md"))
}
COMMAND_PAGES = [name for name in PAGES if name in ("README.md", "CONTRIBUTING.md") or name.startswith("docs/")]

SCRIPTS: dict[str, type[Settings]] = {
    "prepare.py": PrepareSettings,
    "train.py": TrainSettings,
    "sample.py": SampleSettings,
    "glyphgpt/convert/__main__.py": ConvertSettings,
    "glyphgpt/inference/translate.py": TranslateSettings,
    "glyphgpt/reports/plot.py": PlotSettings,
    "glyphgpt/reports/run_report.py": ReportSettings,
}
SMALL = {  # flags that make a command of a page short, added to its own
    "train.py": "--max_steps=1 --eval_tokens=100 --sample_tokens=5 --batch_size=1 --device=cpu --compile=False",
    "sample.py": "--max_new_tokens=3 --device=cpu --skip_unknown",  # the small text lacks some letters
}
ABSENT = re.compile(r"config/gpt2\.toml|tokenizer=gpt2|init_from=gpt2|^gpt2$|nanoGPT/")
"""Words of commands that are parsed, not run: they need a GPU, a download, or a checkout of nanoGPT."""
OTHER_PROGRAMS = {"cat", "export", "git", "head", "hf", "llama-completion", "python3", ".", "[", "first=$(scontrol"}
OTHER_FLAGS = {"constraint", "editable", "extra-index-url", "system-site-packages", "signal", "help"}
"""Flags of pip, venv and sbatch, and one of all our scripts."""


def shell_blocks(page: str) -> str:
    """Return the lines of a page's shell blocks, continued lines joined."""
    text = PAGES[page].read_text(encoding="utf-8")
    return "".join(re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")


def inline_code(page: str) -> list[str]:
    """Return the inline code of a page."""
    text = re.sub(r"^```.*?^```", "", PAGES[page].read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


def commands(page: str) -> Iterator[list[str]]:
    """Yield each command of a page as a list of words, without the variables that it sets."""
    inline = [code for code in inline_code(page) if code.startswith(("python ", "torchrun ", "make ", "pip "))]
    for line in [*shell_blocks(page).splitlines(), *inline]:
        words = shlex.split(line, comments=True)
        for joins, part in groupby(words, {"|", "&&"}.__contains__):
            command = list(part)
            while command and re.match(r"[A-Za-z_]+=(?!\$\()", command[0]):
                del command[0]
            if command and not joins:
                yield command


def script_of(words: list[str]) -> tuple[str, list[str]]:
    """Return the file that a python command runs, and its arguments."""
    _, name, *rest = words
    if name != "-m":
        return name, rest
    path = rest[0].replace(".", "/")
    return (f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py"), rest[1:]


def is_recipe(name: str, rest: list[str]) -> bool:
    return name == "prepare.py" and (ROOT / "data" / f"{rest[0]}.toml").is_file()


def check(words: list[str]) -> None:
    """Check a command with the parser that reads it when it runs."""
    program, *rest = words
    if program == "python":
        check_script(*script_of(words))
    elif program in ("torchrun", "srun"):
        options = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
        check_script(options.training_script, [word for word in options.training_script_args if word[0] != "$"])
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in rest), words
    elif program == "pip":
        extras = re.findall(r"\[(\w+)\]", " ".join(rest))
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras), words
    elif program == "bash":
        assert (ROOT / rest[0]).is_file(), words
    else:
        assert program in OTHER_PROGRAMS, f"neither run nor parsed: {shlex.join(words)}"


def check_script(name: str, rest: list[str]) -> None:
    """Parse the command line of one of our scripts, or of a benchmark, whose flags are looked up in its source."""
    if name in SCRIPTS:
        _, plain = parse(SCRIPTS[name], rest, "", "", files=name == "train.py")
        assert name != "glyphgpt/convert/__main__.py" or plain[0] in KINDS
    elif name == "-c":
        ast.parse(rest[0])
    elif name == "pytest.py":
        assert all((ROOT / word).exists() for word in rest if not word.startswith("-"))
    else:
        source = (ROOT / name).read_text(encoding="utf-8")
        flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
        assert all(f'add_argument("{flag}"' in source for flag in flags), (name, rest)


def run(name: str, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script in this process, as its command line would."""
    quick = [re.sub(r"^--minutes=.*", "--minutes=0.1", word) for word in rest]
    monkeypatch.setattr(sys, "argv", [name, *quick, *SMALL.get(name, "").split()])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"to be or not to be\nthe king, my lord\n")))
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, on_ctrl_c)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `make demo` leaves it, with a small text in place of the recipes', and with texts of a user."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(ROOT / "config", folder / "config")
    (folder / "books").mkdir()
    pairs = [(f"the king {number}", f"good night {number}") for number in range(500)]
    for file, text in {
        "my.txt": some_text(5000),
        "books/one.txt": some_text(2000),
        "books/two.txt": some_text(3000),
        "talks.jsonl": '{"body": "good night, my lord"}\n' * 20,
        "pairs.txt": "".join(f"{source}\t{target}\n" for source, target in pairs),
        "names.txt": "\n".join(some_text(3000).split()),
        "poems.txt": some_text(3000).replace("\n", "\n\n"),
        "german.txt": "the king 1\nking 2\n",
        "english.txt": "good night 1\ngood night 2\n",
    }.items():
        (folder / file).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        run("prepare.py", ["my.txt", "--name=shakespeare_char"], monkeypatch)
        run("prepare.py", ["pairs.txt", "--name=multi30k_de_en"], monkeypatch)
        run("train.py", ["config/quick.toml"], monkeypatch)
    return folder


@pytest.mark.parametrize("page", COMMAND_PAGES)
def test_every_command_runs_or_parses(page: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(demo, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if page == "README.md":  # which trains the run that all other pages begin with
        shutil.rmtree("out")
    for words in commands(page):
        check(words)
        name, rest = script_of(words) if words[0] == "python" else ("", [])
        if name in SCRIPTS and not is_recipe(name, rest) and not any(map(ABSENT.search, rest)):
            run(name, rest, monkeypatch)


def test_the_python_examples_print_what_they_show(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    page = str(PAGES["docs/python.md"])
    failed, tried = doctest.testfile(page, module_relative=False, optionflags=doctest.ELLIPSIS)
    assert failed == 0
    assert tried > 5


def test_the_pages_show_every_script_and_conversion() -> None:
    python = [words for page in COMMAND_PAGES for words in commands(page) if words[0] == "python"]
    assert SCRIPTS.keys() <= {script_of(words)[0] for words in python}
    assert {words[3] for words in python if words[2:3] == ["glyphgpt.convert"]} == KINDS.keys()


@pytest.mark.parametrize(
    "line", ["python train.py --batchsize=3", "torchrun --nodes=2 train.py", "make cake", "cake", "pip install .[cake]"]
)
def test_wrong_commands_are_found(line: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        check(shlex.split(line))


def test_flags_in_the_text_are_real() -> None:
    known = {field for settings in SCRIPTS.values() for field in settings.model_fields} | OTHER_FLAGS
    known |= {name.lstrip("-") for action in get_args_parser()._actions for name in action.option_strings}
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("[bl]e*/*.py"))
    known |= set(re.findall(r'add_argument\("--([\w-]+)"', sources))
    for page in COMMAND_PAGES:
        flags = {flag for code in inline_code(page) for flag in re.findall(r"(?<!\S)--(\w[\w-]*)", code)}
        assert flags <= known, (page, flags - known)


def test_make_demo_and_the_plain_commands_are_the_same() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in ("prepare.py shakespeare_char", "train.py config/quick.toml", "sample.py out/quick --num_samples=3"):
        assert line in makefile
        assert line in README


def anchors(page: Path) -> set[str]:
    """Return the names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_have_targets(page: str) -> None:
    path = PAGES[page]
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(README.splitlines()) <= 150
    for page in PAGES:
        assert page.startswith("bench/") or page == "README.md" or f"]({page})" in README, page


def test_the_page_of_settings_is_up_to_date() -> None:
    module = runpy.run_path(str(ROOT / "docs/make_settings.py"))
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == module["page"]()


def test_quoted_messages_are_real() -> None:
    page = PAGES["docs/troubleshooting.md"].read_text(encoding="utf-8")
    quotes = re.findall(r'^(?:###|-) "(.*?)"', page, re.MULTILINE)
    sources = "".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("glyphgpt/**/*.py")])
    assert len(quotes) > 10
    assert [quote for quote in quotes if quote.replace("utf-8", "{encoding}") not in sources] == []


def test_tables_name_real_settings() -> None:
    training, nanogpt = (PAGES[f"docs/{name}.md"].read_text(encoding="utf-8") for name in ("training", "from-nanogpt"))
    table = training[training.index("| setting |") :].partition("\n\n")[0]
    cells = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    names = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    paragraph = nanogpt[nanogpt.index("These settings keep") :].partition("\n\n")[0]
    names |= set(re.findall(r"`(\w+)`", paragraph))
    assert len(names) > 30
    assert names <= TrainSettings.model_fields.keys() | SampleSettings.model_fields.keys()
