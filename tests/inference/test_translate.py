"""Translation: a model that learned a small dictionary, asked as a user would."""

from pathlib import Path
from typing import Any, cast

import pytest

import train
from conftest import prepare_text, script, tiny_settings
from glyphgpt.data.tokenizers import CharTokenizer
from glyphgpt.files import BEST
from glyphgpt.inference import beam_search as beam
from glyphgpt.inference.translate import Translator
from glyphgpt.settings import TranslateSettings

WORDS = {"rot": "red", "blau": "blue", "ein Hund": "a dog", "zwei Hunde": "two dogs", "ein Mann geht": "a man walks by"}
SOURCES = "".join(f"{german}\n" for german in WORDS)
TRANSLATIONS = "".join(f"{english}\n" for english in WORDS.values())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned WORDS, and files of sources and references beside it."""
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
    learning = {"max_steps": 200, "eval_every": 200, "batch_size": 16, "learning_rate": 0.01, "optimizer": "muon"}
    train.main(tiny_settings(folder, folder / "run", **network, **learning))
    (folder / "de.txt").write_text(SOURCES)
    (folder / "en.txt").write_text(TRANSLATIONS)
    return folder / "run"


def translate(*words: object) -> tuple[int, str, str]:
    done = script("glyphgpt/inference/translate.py", *map(str, words))
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("beam", [1, 4])
def test_what_was_learned_is_translated_line_by_line(run: Path, beam: int) -> None:
    assert translate(run, run.parent / "de.txt", f"--beam={beam}", "--batch_size=2") == (0, TRANSLATIONS, "")


def test_a_reference_tells_bleu(run: Path) -> None:
    pytest.importorskip("sacrebleu")
    status, out, told = translate(run / BEST, run.parent / "de.txt", f"--reference={run.parent / 'en.txt'}")
    assert (status, out) == (0, TRANSLATIONS)
    assert told.startswith("BLEU 100.0 (nrefs:1|case:mixed|")


def test_translations_go_into_a_file(run: Path, tmp_path: Path) -> None:
    assert translate(run, run.parent / "de.txt", f"--out={tmp_path / 'mine.txt'}") == (0, "", "")
    assert (tmp_path / "mine.txt").read_text() == TRANSLATIONS


def test_lines_are_kept_apart_whatever_white_space_they_have(run: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.txt").write_text(" rot \n\nein\u00a0Hund\tblau")
    status, out, told = translate(run, tmp_path / "odd.txt")
    assert (status, told) == (0, "")
    lines = out.split("\n")
    assert lines[:2] == ["red", ""]
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("rot\nçà\n", [], "line 2: the model has never seen 'à' (U+00E0), 'ç' (U+00E7); change the text, or add "),
        ("rot\n" + "blau" * 10, [], "line 2: 40 tokens leave no room in the model's context of 40; cut the line"),
        ("rot\n", ["--reference=EN"], "EN: 5 lines, but there are 1 to translate"),
        ("rot\n", ["--out=nowhere/mine.txt"], "--out=nowhere/mine.txt: there is no such folder; make it first"),
        ("rot\n", ["--beam=0"], "--beam must be a whole number, at least 1"),
        ("rot\n", ["--prompt=x"], "unknown key --prompt"),
    ],
)
def test_mistakes_get_a_line(run: Path, tmp_path: Path, text: str, flags: list[str], said: str) -> None:
    (tmp_path / "de.txt").write_text(text)
    references = str(run.parent / "en.txt")
    status, out, told = translate(run, tmp_path / "de.txt", *(flag.replace("EN", references) for flag in flags))
    assert status in (1, 2)
    assert out == ""
    assert said.replace("EN", references) in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_of_an_empty_file_there_is_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "de.txt").write_text("")
    assert translate(run, tmp_path / "de.txt") == (0, "", "")
    assert translate(run, tmp_path / "de.txt", f"--out={tmp_path / 'mine.txt'}") == (0, "", "")
    assert (tmp_path / "mine.txt").read_text() == ""


def test_a_model_of_lines_that_end_in_cr_lf_translates_without_cr(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = CharTokenizer.learn(["red\t\r\n"])
    monkeypatch.setattr(beam, "beam_search", lambda *_, **__: [tokenizer.encode("red\r")])
    translator = Translator(cast(Any, None), tokenizer, 40, TranslateSettings())
    assert translator.translate(["red"]) == ["red"]


def test_an_encoding_gets_advice_that_works(run: Path, tmp_path: Path) -> None:
    (tmp_path / "de.txt").write_bytes("rot\n".encode("utf-16"))
    status, out, told = translate(run, tmp_path / "de.txt")
    assert (status, out) == (1, "")
    assert told.endswith(f"convert it: iconv -f UTF-16 -t UTF-8 {tmp_path / 'de.txt'} > NEW\n")


def test_unknown_characters_can_be_left_out(run: Path, tmp_path: Path) -> None:
    (tmp_path / "de.txt").write_text("ç")
    assert translate(run, tmp_path / "de.txt", "--skip_unknown") == (0, "\n", "")


def test_a_model_without_tabs_is_refused(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path / "run", max_steps=0))
    (tmp_path / "de.txt").write_text("exit\n")
    status, _, told = translate(tmp_path / "run", tmp_path / "de.txt")
    assert (status, told.count("\n")) == (1, 1)
    assert "has never seen a tab" in told


def test_it_says_what_it_wants(run: Path) -> None:
    status, _, told = translate(run)
    assert status == 2
    assert told.startswith("error: name a run and a file: ")
