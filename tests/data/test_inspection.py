"""The inspection of a text: its figures are those of a plain count, and its problems have places."""

import json
import resource
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import page_json, prepare_text, run_prepare, some_text
from glyphgpt.data.dataset import Found, Place, TextReport, read_meta
from glyphgpt.data.inspection import Inspector
from glyphgpt.files import REPORT


def inspect(text: str, size: int = 1000) -> TextReport:
    """Return the report on a text that is read in parts."""
    inspector = Inspector()
    for start in range(0, len(text), size):
        inspector.add(text[start : start + size], "a.txt")
    return inspector.report()


@given(st.text("ab1 é字\n", max_size=200), st.integers(1, 50))
def test_counts_are_those_of_the_text(text: str, size: int) -> None:
    report = inspect(text, size)
    counts = Counter(text)
    assert report.characters == report.examined == len(text)
    assert report.lines == text.count("\n") + (text != "" and not text.endswith("\n"))
    assert report.longest_line == max(map(len, text.split("\n")))
    kinds = {"a": "Latin letters", "b": "Latin letters", "é": "Latin letters", "1": "digits", "字": "CJK letters"}
    assert report.kinds == Counter(kinds.get(character, "white space") for character in text)
    assert report.rare == sum(count < 10 for count in counts.values())
    assert sorted(found.count for found in report.rarest) == sorted(counts.values())
    for found in report.rarest:
        assert found.count == counts[found.what]
        assert found.place.line == text[: text.index(found.what)].count("\n") + 1


def test_lines_end_with_their_file() -> None:
    inspector = Inspector()
    for file in ("a.txt", "b.txt"):
        inspector.add("a line without an end, as is usual", file)
    report = inspector.report()
    assert (report.longest_line, report.repeated) == (34, 0.5)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_repeated_lines_are_measured(size: int) -> None:
    lines = ["a line that is long enough", "short", "a line that is long enough", "short", "another long line, new"]
    text = "".join(f"{line}\n" for line in lines)
    assert inspect(text, size).repeated == pytest.approx(len(lines[0]) / len(text))


def found(text: str) -> list[Found]:
    """Return the problems of a text, which are the same however it is divided, except those of several characters."""
    problems = inspect(text).problems
    if "Ã" not in text and "\u0308" not in text:
        assert all(inspect(text, size).problems == problems for size in (1, 2, 7))
    return problems


def problem(what: str, count: int, line: int) -> Found:
    return Found(what=what, count=count, place=Place(file="a.txt", line=line))


def test_problems_have_a_count_and_the_place_of_the_first() -> None:
    assert found("one\ntwo\r\nthree\r\n") == [problem("\\r\\n", 2, 2)]
    assert found("one\rtwo\n") == [problem("\\r", 1, 1)]
    assert found("one\r\ntwo\n\nthree\rfour") == [problem("\\r\\n", 1, 1), problem("\\r", 1, 4)]
    assert found("\n\nu\u0308ber\nkönnen\n") == [problem("nfd", 1, 3)]
    assert found("soft\u00adhyphen\nzero\u200bwidth\u200b\n") == [problem("invisible", 3, 1)]
    assert found("plain\nÃ¼ber and “quotes”\n") == [problem("mojibake", 1, 2)]
    assert found("x" * 10_001 + "\n") == found("x" * 10_001) == [problem("long", 10_001, 1)]
    assert found("one\r") == [problem("\\r", 1, 1)]
    assert found("Ærøskøbing, Übermut, naïve, “Ärger” – 中文 и русский, São Tomé, À Â Ã\n") == []


@pytest.mark.parametrize("text", ["äöüß ÄÖÜ àéèç “quotes” – …", "Привет, как дела?", "π ≈ 3,14 °C €"])
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_text_in_the_wrong_encoding_is_recognized(text: str, encoding: str) -> None:
    assert found(text) == []
    wrong = text.encode().decode(encoding, errors="replace")
    assert [problem.what for problem in inspect(wrong).problems] == ["mojibake"]


def test_preparing_warns_of_problems_and_leaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"one line\r\n" + some_text(3000).encode() * 2)
    flags = [str(tmp_path / "a.txt"), f"--data_dir={tmp_path / 'data'}"]
    run_prepare(*flags)
    captured = capsys.readouterr()
    place = tmp_path / "a.txt"
    assert (
        f"warning: {place}:1: 1 x Windows line ends, \\r\\n: two characters instead of one; --newlines=lf"
        in captured.err
    )
    assert (
        "warning: 100% of the validation text also occurs in the training text, in runs of 50 characters"
        in captured.err
    )
    folder = tmp_path / "data/a"
    assert f"report: {folder / REPORT} (" in captured.out
    report = read_meta(folder).report
    assert report is not None
    assert report.leaked == 1.0
    page = page_json(folder / REPORT)
    assert (page["name"], len(page["findings"])) == ("a", 3), "repeated lines, too"
    run_prepare(*flags, "--overwrite", "--newlines=lf", "--report=False")
    assert capsys.readouterr().err == ""
    assert {path.name for path in folder.iterdir()} == {"meta.json", "train-00000.npy", "val-00000.npy"}
    assert json.loads((folder / "meta.json").read_text())["report"] is None


def test_the_report_keeps_few_shards_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        folder = prepare_text(some_text(6000), tmp_path, shard_tokens=10)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (folder / REPORT).exists()


def test_the_page_has_all_splits(tmp_path: Path) -> None:
    folder = prepare_text(some_text(6000), tmp_path, test_fraction=0.2)
    numbers = {name: value for name, value, _ in page_json(folder / REPORT)["highlights"]}
    assert numbers["Characters"] == "6,000"
    assert (numbers["Training text"], numbers["Validation text"], numbers["Test text"]) == ("4,200", "600", "1,200")


def test_a_clean_text_has_no_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(f"{number} is followed by {number + 1}" for number in range(3000, 5000))
    prepare_text(text, tmp_path)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "(2,000 lines; " in captured.out
