"""The Python API gives what sample.py prints."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import glyphgpt
import train
from conftest import ROOT, prepare_text, script, some_text, tiny_settings
from glyphgpt.data.dataset import load_dataset
from glyphgpt.errors import UserError
from glyphgpt.inference.api import load


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a context of 16 tokens."""
    out_dir = tmp_path_factory.mktemp("runs") / "run"
    train.main(tiny_settings(data_dir, out_dir, max_steps=30, learning_rate=0.01))
    return out_dir


@pytest.fixture(scope="module")
def byte_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on bytes, some of which are parts of characters."""
    folder = tmp_path_factory.mktemp("bytes")
    prepare_text("était délicieuse\n" * 60, folder, tokenizer="byte")
    train.main(tiny_settings(folder, folder / "run", max_steps=30, learning_rate=0.01))
    return folder / "run"


def test_generate_returns_what_sample_prints_without_the_prompt(run: Path) -> None:
    flags = ["--prompt=the king", "--max_new_tokens=60", "--temperature=0.9", "--top_k=9", "--seed=3", "--stop=lord"]
    printed = script("sample.py", str(run), "--device=cpu", *flags).stdout
    model = load(run)
    sampling = {"max_new_tokens": 60, "temperature": 0.9, "top_k": 9, "seed": 3}
    assert printed == "the king" + model.generate("the king", stop="lord", **sampling) + "\n"  # type: ignore[arg-type]
    parts = list(model.stream("the king", stop=["lord", "zzz"], **sampling))  # type: ignore[arg-type]
    assert printed == "the king" + "".join(parts) + "\n"
    assert all(parts)
    assert load(run / "best.safetensors").generate(seed=5) == model.generate(seed=5)


def test_probabilities_are_those_of_the_next_token(run: Path, byte_run: Path) -> None:
    model = load(run)
    for text in ("", "the king", some_text(100)):  # also longer than the context
        probs = model.probabilities(text)
        assert sum(probs.values()) == pytest.approx(1)
        assert list(probs.values()) == sorted(probs.values(), reverse=True)
        assert len(probs) == model.checkpoint.config.vocab_size
        assert next(iter(probs)) == model.generate(text, temperature=0, max_new_tokens=1)
    probs = load(byte_run).probabilities("étai")
    assert len(probs) == 256
    assert next(iter(load(byte_run).probabilities("d"))) == r"\xc3"


def test_score_is_that_of_the_validation_split(run: Path, data_dir: Path) -> None:
    printed = script("sample.py", str(run), "--score=small", f"--data_dir={data_dir}", "--device=cpu").stdout
    dataset = load_dataset(data_dir / "small", data_dir)
    text = "".join(dataset.tokenizer.token_bytes(int(t)).decode() for t in dataset.val.slice(0, dataset.val.tokens))
    score = load(run).score(text)
    assert printed.endswith(f": {score}\n")
    assert "".join(part for part, _ in score.surprise) == text
    bits = [bits for _, bits in score.surprise]
    assert bits[0] == 0
    assert np.mean(bits[1:]) == pytest.approx(score.bits_per_character)
    assert score.loss == pytest.approx(score.bits_per_character * math.log(2))


def test_surprise_is_minus_the_logarithm_of_the_probability(run: Path) -> None:
    model, text = load(run), "the king, my lo"  # shorter than the context
    surprise = model.score(text).surprise
    for position in range(1, len(text)):
        expected = -math.log2(model.probabilities(text[:position])[text[position]])
        part, bits = surprise[position]
        assert part == text[position]
        assert bits == pytest.approx(expected, abs=1e-4)


def test_bytes_are_joined_to_characters(byte_run: Path) -> None:
    model = load(byte_run)
    score = model.score("été")
    assert [part for part, _ in score.surprise] == ["é", "t", "é"]
    assert score.eval_tokens == 4
    assert score.bits_per_character == pytest.approx(score.loss * 5 / 3 / math.log(2))
    assert sum(bits for _, bits in score.surprise) == pytest.approx(4 * score.loss / math.log(2))


def test_mistakes_raise_one_line(run: Path, tmp_path: Path) -> None:
    model = load(run)
    for call, message in (
        (lambda: glyphgpt.load(tmp_path / "nowhere"), "nowhere: no such run or checkpoint"),
        (lambda: model.generate("q"), r"the model has never seen 'q' \(U\+0071\); change the text, or leave them out"),
        (lambda: model.generate("a", temperature=-1), "sampling: 'temperature' must be a number, at least 0, not -1"),
        (lambda: model.generate("a", temp=1), "sampling: unknown key 'temp'"),  # type: ignore[call-arg]
        (lambda: model.score("a"), "1 tokens; a score needs at least 2"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_cpu_needs_no_torch(run: Path) -> None:
    code = f"""
import sys, glyphgpt
model = glyphgpt.load({str(run)!r})
model.generate("the", max_new_tokens=3), model.probabilities("a"), model.score("the king")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
