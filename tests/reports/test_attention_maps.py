"""Where a model looks: the numbers are its own, and every way to draw them holds them."""

import base64
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sample
import train
from conftest import MODERN, prepare_text, tiny_model, tiny_settings
from glyphgpt.cli import parse
from glyphgpt.data.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer
from glyphgpt.errors import UsageError, UserError
from glyphgpt.reports import attention_maps as attention
from glyphgpt.reports.attention_maps import Attention, attention_weights, observe, page, png, spelled, word_lengths
from glyphgpt.settings import SampleSettings
from model import GPT, CausalSelfAttention

HOSTILE = "</script><b>$x_1$ {data} 😀 שלום é\n\t\0\u202e</SCRIPT>"
FORMS: dict[str, dict[str, Any]] = {
    "GPT-2's": {},
    "modern": MODERN,
    "rotary": {"position": "rotary"},
    "sinusoidal": {"position": "sinusoidal"},
    "large": {"n_layer": 3, "n_head": 4},
    "beyond what is written out": {"block_size": 300},
}


def random_model(**form: Any) -> GPT:
    """A network none of whose matrices is zero or small, so that it looks at some places more than at others."""
    model = tiny_model(**form)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def read(text: str, tokenizer: Tokenizer) -> Attention:
    tokens = tokenizer.encode(text)
    return observe(random_model(vocab_size=tokenizer.vocab_size, block_size=len(tokens)), tokenizer, tokens)


def read_characters(text: str) -> Attention:
    return read(text, CharTokenizer("".join(sorted(set(text)))))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_weights_and_probabilities_are_the_models_own(form: dict[str, Any]) -> None:
    model = random_model(**form)
    tokens = torch.arange(model.config.block_size) % model.config.vocab_size
    seen: list[tuple[CausalSelfAttention, torch.Tensor, torch.Tensor]] = []
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs[0], output)))
    weights, probabilities = attention_weights(model, tokens)
    assert weights.shape == (model.config.n_layer, model.config.n_head, len(tokens), len(tokens))
    assert not weights.triu(1).any(), "nothing ahead is seen"
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert len(seen) == len(weights)
    for layer, (module, x, output) in zip(weights, seen, strict=True):
        _, _, v = module.project_qkv(x)
        torch.testing.assert_close(module.project_out(layer @ v), output)
    torch.testing.assert_close(probabilities, model(tokens[None])[0].softmax(-1))
    assert len(seen) == 2 * len(weights)
    assert not any(module._forward_pre_hooks for module in model.modules()), "the model is left as it was"


def test_words_are_runs_of_letters_of_space_and_of_signs() -> None:
    text = "Est-elle\n  délicieuse ?"
    lengths = word_lengths([character.encode() for character in text])
    ends = np.cumsum(lengths)
    words = [text[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    assert words == ["Est", "-", "elle", "\n  ", "délicieuse", " ", "?"]
    assert word_lengths([bytes([byte]) for byte in "é è".encode()]) == [2, 1, 2]
    assert word_lengths([b"La", b" pizza", b"\n", b" ", b" \xc3", b"\xa9", b"t", b"\xc3"]) == [1, 1, 2, 3, 1]


@given(st.lists(st.binary(min_size=1, max_size=4) | st.text(min_size=1, max_size=3).map(str.encode), min_size=1))
def test_every_token_is_in_one_word(pieces: list[bytes]) -> None:
    lengths = word_lengths(pieces)
    assert min(lengths) >= 1
    assert sum(lengths) == len(pieces)


def test_tokens_that_are_no_characters_show_as_they_are(gpt2_data_dir: Path) -> None:
    assert spelled(b" \xc3") == r" \xc3"
    assert read("dé", ByteTokenizer()).tokens == ["d", r"\xc3", r"\xa9"]
    assert read("dé", ByteTokenizer()).unit == "byte"
    pieces = read("La pizza, 😀", GPT2Tokenizer(gpt2_data_dir))
    assert pieces.tokens[:4] == ["La", " pizza", ",", r" \xf0\x9f\x98"]
    assert pieces.unit == "token"


def test_the_likeliest_tokens_come_with_the_one_that_came() -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    model = random_model(vocab_size=26, block_size=26)
    tokens = torch.arange(26)
    chances = read_characters(text).chances
    probabilities = model(tokens[None])[0].softmax(-1)
    assert {len(row) for row in chances} == {10, 11}, "some come that are not among the ten"
    assert len(chances[-1]) == 10
    for place, row in enumerate(chances):
        shown = [text.index(token) for token, _ in row]
        assert shown[:10] == probabilities[place].argsort(descending=True)[:10].tolist()
        assert place == 25 or place + 1 in shown
        assert [chance for _, chance in row] == pytest.approx(probabilities[place, shown].tolist(), abs=1e-5)
    assert [len(row) for row in read_characters("abcabc").chances] == [3] * 6, "a vocabulary may be small"


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def test_numbers_that_overflow_are_one_line() -> None:
    model = random_model()
    with torch.no_grad():
        model.token_embedding.weight.fill_(1e38)
    tokenizer = CharTokenizer("abcdefghijk")
    with pytest.raises(UserError, match=r"^the model's numbers overflow; there is nothing to draw$"):
        observe(model, tokenizer, tokenizer.encode("abc"))


def test_the_page_holds_the_weights() -> None:
    read = read_characters(HOSTILE)
    data = data_of(page(read, "run"))
    layers, heads, places, _ = read.weights.shape
    packed = np.frombuffer(base64.b64decode(data["weights"]), "<u2").reshape(layers, heads, -1)
    weights = np.zeros(read.weights.shape)
    weights[:, :, *np.tril_indices(places)] = packed / 65535
    np.testing.assert_allclose(weights, read.weights, atol=1 / 65535)
    assert (data["layers"], data["heads"], data["unit"]) == (layers, heads, "character")
    assert sum(data["words"]) == places


def test_no_text_breaks_out_of_the_page() -> None:
    plain, hostile = page(read_characters("abc"), "run"), page(read_characters(HOSTILE), HOSTILE)
    assert hostile.count("<") == plain.count("<")
    data = data_of(hostile)
    assert "".join(data["tokens"]) == data["title"] == HOSTILE


def test_a_long_text_is_a_few_megabytes() -> None:
    weights = torch.rand(6, 6, 256, 256).softmax(-1)
    read = Attention("character", ["a"] * 256, [256], weights, [[("a", 0.1)] * 11] * 256)
    assert len(page(read, "run")) < 4e6


def size_of(picture: bytes) -> tuple[int, int]:
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", picture[16:24])
    return width, height


def test_a_png_has_a_panel_for_each_layer_and_head(
    recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, tall = (torch.ones(*shape, 12, 12).tril().softmax(-1) for shape in ((2, 4), (4, 2)))
    tokens, chances = list("To be, or no"), [[("a", 1.0)]]
    width, height = size_of(png(Attention("character", tokens, [12], wide, chances)))
    assert width > 1.3 * height
    width, height = size_of(png(Attention("character", tokens, [12], tall, chances)))
    assert height > 1.3 * width
    assert max(size_of(png(read_characters(HOSTILE + "a long text " * 30)))) < 6000
    monkeypatch.setattr(attention, "LARGEST", 1.0)
    assert max(size_of(png(read_characters("crowdedly")))) < 1000
    assert not recwarn.list


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the data set `small`, whose model sees 16 characters."""
    out_dir = tmp_path_factory.mktemp("run")
    train.main(tiny_settings(data_dir, out_dir, max_steps=2))
    return out_dir


def draw(run: Path, picture: Path, text: str, **changes: object) -> None:
    settings = {"attention": text, "out": str(picture), **changes}
    sample.main(SampleSettings.model_validate(settings), str(run))


def test_sampling_draws_and_says_where(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("attention.html", "attention.png"):
        (tmp_path / name).write_text("older", encoding="utf-8")
        capsys.readouterr()
        draw(run, tmp_path / name, "the king")
        assert capsys.readouterr().out == f"{tmp_path / name}: drawn\n"
    size_of((tmp_path / "attention.png").read_bytes())
    data = data_of((tmp_path / "attention.html").read_text(encoding="utf-8"))
    assert data["tokens"] == list("the king")
    assert data["title"] == str(run / "best.safetensors")
    draw(run, tmp_path / ".HTML", "the qking", skip_unknown=True)
    assert data_of((tmp_path / ".HTML").read_text(encoding="utf-8"))["tokens"] == list("the king")


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ("to be or not to b", {}, r"^the text has 17 characters; this model sees 1 to 16 at once$"),
        ("qq", {"skip_unknown": True}, r"^the text has 0 characters; this model sees 1 to 16 at once$"),
        ("the qking", {}, r"^the model has never seen 'q' \(U\+0071\); .*$"),
    ],
)
def test_a_text_that_cannot_be_drawn_is_one_line(
    text: str, changes: dict[str, str], said: str, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        draw(run, tmp_path / "a.html", text, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^.*nowhere.a\.html: could not be written: No such file or directory$"):
        draw(run, tmp_path / "nowhere" / "a.html", "the king")


def test_a_png_without_matplotlib_is_one_line_and_a_page_needs_none(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"^a PNG, unlike \.html, needs matplotlib: pip install matplotlib$"):
        draw(run, tmp_path / "a.png", "the king")
    draw(run, tmp_path / "a.html", "the king")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_bytes_are_looked_at_one_by_one(tmp_path: Path) -> None:
    prepare_text("était délicieuse\n" * 60, tmp_path, tokenizer="byte")
    train.main(tiny_settings(tmp_path, tmp_path / "run", max_steps=1))
    draw(tmp_path / "run", tmp_path / "a.html", "é😀")
    tokens = data_of((tmp_path / "a.html").read_text(encoding="utf-8"))["tokens"]
    assert tokens == [r"\xc3", r"\xa9", r"\xf0", r"\x9f", r"\x98", r"\x80"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--attention=a"], "attention needs a file to write: --out=attention.html, or attention.png"),
        (["--out=a.html"], 'out is for attention: --attention="TEXT"'),
        (["--attention=", "--out=a.html"], 'out is for attention: --attention="TEXT"'),
        (["--attention=a", "--out=a.pdf"], "out = 'a.pdf' must end in .html or .png"),
        (["--attention=a", "--out=a.png", "--score=b"], "attention and score contradict each other; choose one"),
        (
            ["--attention=a", "--out=a.png", "--interactive"],
            "attention and interactive contradict each other; choose one",
        ),
    ],
)
def test_settings_that_do_not_go_together(flags: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        parse(SampleSettings, flags, "", "", files=False)
