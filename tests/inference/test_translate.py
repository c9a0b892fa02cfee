"""Translation from the command line, with a model of a small dictionary."""

from pathlib import Path
from typing import Any, cast

import pytest

import train
from conftest import prepare_text, script, tiny_settings
from glyphgpt.data.tokenizers import CharTokenizer
from glyphgpt.files import BEST
from glyphgpt.inference.translate import Translator
from glyphgpt.settings import TranslateSettings

WORDS = {"rot": "red", "blau": "blue", "ein Hund": "a dog", "zwei Hunde": "two dogs", "ein Mann geht": "a man walks by"}
SOURCES = "".join(f"{german}\n" for german in WORDS)
TRANSLATIONS = "".join(f"{english}\n" for english in WORDS.values())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned WORDS, next to a file of sources and one of references."""
    folder = tmp_path_factory.mktemp("translate")
    prepare_text("".join(f"{german}\t{english}\n" for german, english in WORDS.items()) * 100, folder)
    network = {
        "n_embd": 32,
        "block_size": 40,
        "position": "sinusoidal",
        "ngram": 3,
        "ngram_rows": 97,
        "norm": "rmsnorm",
    }
    optimization = {"max_steps": 200, "eval_every": 200, "batch_size": 16, "learning_rate": 0.01, "optimizer": "muon"}
    train.main(tiny_settings(folder, folder / "run", **network, **optimization))
    (folder / "de.txt").write_text(SOURCES)
    (folder / "en.txt").write_text(TRANSLATIONS)
    return folder / "run"


def translate(*words: object) -> tuple[int, str, str]:
    done = script("glyphgpt/inference/translate.py", *map(str, words))
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("beam", [1, 4])
def test_the_learned_lines_are_translated(run: Path, beam: int) -> None:
    assert translate(run, run.parent / "de.txt", f"--beam={beam}", "--batch_size=2") == (0, TRANSLATIONS, "")


def test_a_reference_gives_the_bleu_score(run: Path) -> None:
    pytest.importorskip("sacrebleu")
    status, out, err = translate(run / BEST, run.parent / "de.txt", f"--reference={run.parent / 'en.txt'}")
    assert (status, out) == (0, TRANSLATIONS)
    assert err.startswith("BLEU 100.0 (nrefs:1|case:mixed|")


def test_translations_are_written_to_a_file(run: Path, tmp_path: Path) -> None:
    assert translate(run, run.parent / "de.txt", f"--out={tmp_path / 'mine.txt'}") == (0, "", "")
    assert (tmp_path / "mine.txt").read_text() == TRANSLATIONS


def test_white_space_within_lines_does_not_change_their_number(run: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.txt").write_text(" rot \n\nein\u00a0Hund\tblau")
    status, out, err = translate(run, tmp_path / "odd.txt")
    assert (status, err) == (0, "")
    lines = out.split("\n")
    assert lines[:2] == ["red", ""]
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (
            "rot\nçà\n",
            [],
            "line 2: the model has never seen 'à' (U+00E0), 'ç' (U+00E7); change the text, or leave them out",
        ),
        ("rot\n" + "blau" * 10, [], "line 2: 40 tokens leave no room in the model's context of 40; split the line"),
        ("rot\n", ["--reference=EN"], "EN: 5 lines, but there are 1 to translate"),
        ("rot\n", ["--out=nowhere/mine.txt"], "--out=nowhere/mine.txt: the folder does not exist; create it first"),
        ("rot\n", ["--beam=0"], "--beam must be a whole number, at least 1"),
        ("rot\n", ["--prompt=x"], "unknown key --prompt"),
    ],
)
def test_mistakes_are_one_line(run: Path, tmp_path: Path, text: str, flags: list[str], message: str) -> None:
    (tmp_path / "de.txt").write_text(text)
    references = str(run.parent / "en.txt")
    status, out, err = translate(run, tmp_path / "de.txt", *(flag.replace("EN", references) for flag in flags))
    assert status in (1, 2)
    assert out == ""
    assert message.replace("EN", references) in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_an_empty_file_has_an_empty_translation(run: Path, tmp_path: Path) -> None:
    (tmp_path / "de.txt").write_text("")
    assert translate(run, tmp_path / "de.txt") == (0, "", "")
    assert translate(run, tmp_path / "de.txt", f"--out={tmp_path / 'mine.txt'}") == (0, "", "")
    assert (tmp_path / "mine.txt").read_text() == ""


def test_the_carriage_return_of_a_line_end_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = CharTokenizer.learn(["red\t\r\n"])
    monkeypatch.setattr("glyphgpt.inference.translate.beam_search", lambda *_, **__: [tokenizer.encode("red\r")])
    translator = Translator(cast(Any, None), tokenizer, 40, TranslateSettings())
    assert translator.translate(["red"]) == ["red"]


def test_another_encoding_is_reported_with_a_remedy(run: Path, tmp_path: Path) -> None:
    (tmp_path / "de.txt").write_bytes("rot\n".encode("utf-16"))
    status, out, err = translate(run, tmp_path / "de.txt")
    assert (status, out) == (1, "")
    assert err.endswith(f"convert it: iconv -f UTF-16 -t UTF-8 {tmp_path / 'de.txt'} > NEW\n")


def test_unknown_characters_can_be_skipped(run: Path, tmp_path: Path) -> None:
    (tmp_path / "de.txt").write_text("ç")
    assert translate(run, tmp_path / "de.txt", "--skip_unknown") == (0, "\n", "")


def test_a_model_without_tabs_is_refused(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path / "run", max_steps=0))
    (tmp_path / "de.txt").write_text("exit\n")
    status, _, err = translate(tmp_path / "run", tmp_path / "de.txt")
    assert (status, err.count("\n")) == (1, 1)
    assert "vocabulary lacks the tab" in err


def test_missing_arguments_are_reported_with_the_usage(run: Path) -> None:
    status, _, err = translate(run)
    assert status == 2
    assert err.startswith("error: name a run and a file: ")
