"""Attention maps: the weights are the model's own, and the page and the PNG show them."""

import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sample
import train
from conftest import MODERN, page_json, tiny_model, tiny_settings
from glyphgpt.cli import parse
from glyphgpt.data.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, token_text
from glyphgpt.errors import UsageError, UserError
from glyphgpt.reports import attention_maps
from glyphgpt.reports.attention_maps import (
    AttentionMaps,
    attention_weights,
    compute_maps,
    render_png,
)
from glyphgpt.settings import SampleSettings
from model import EXPLICIT_ATTENTION, GPT, CausalSelfAttention

HOSTILE = "</script><b>$x_1$ {data} 😀 שלום é\n\t\0\u202e</SCRIPT>"
NETWORKS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "modern": MODERN,
    "rotary": {"position": "rotary"},
    "sinusoidal": {"position": "sinusoidal"},
    "large": {"n_layer": 3, "n_head": 4},
    "fused attention": {"block_size": EXPLICIT_ATTENTION + 44},
}


def random_model(**network: Any) -> GPT:
    """Return a model with large weights, so that its attention is far from uniform."""
    model = tiny_model(**network)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def maps_of(text: str, tokenizer: Tokenizer | None = None) -> AttentionMaps:
    """Return the attention maps of a text under a random model; by default its tokens are characters."""
    tokenizer = tokenizer or CharTokenizer("".join(sorted(set(text))))
    tokens = tokenizer.encode(text)
    return compute_maps(random_model(vocab_size=tokenizer.vocab_size, block_size=len(tokens)), tokenizer, tokens)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_weights_are_the_models_own(network: dict[str, Any]) -> None:
    model = random_model(**network)
    tokens = torch.arange(model.config.block_size) % model.config.vocab_size
    calls: list[tuple[CausalSelfAttention, torch.Tensor, torch.Tensor]] = []
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.register_forward_hook(lambda module, inputs, output: calls.append((module, inputs[0], output)))
    weights = attention_weights(model, tokens)
    assert weights.shape == (model.config.n_layer, model.config.n_head, len(tokens), len(tokens))
    assert not weights.triu(1).any(), "no token attends to later ones"
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert len(calls) == len(weights)
    for layer, (module, x, output) in zip(weights, calls, strict=True):
        _, _, v = module.project_qkv(x)
        torch.testing.assert_close(module.project_out(layer @ v), output)
    assert not any(module._forward_pre_hooks for module in model.modules()), "the hooks are removed"


def test_bytes_that_are_not_a_character_are_escaped(gpt2_data_dir: Path) -> None:
    assert token_text(b" \xc3") == r" \xc3"
    assert maps_of("dé", ByteTokenizer()).tokens == ["d", r"\xc3", r"\xa9"]
    assert maps_of("dé", ByteTokenizer()).unit == "byte"
    maps = maps_of("La pizza, 😀", GPT2Tokenizer(gpt2_data_dir))
    assert maps.tokens[:4] == ["La", " pizza", ",", r" \xf0\x9f\x98"]
    assert maps.unit == "token"


def test_overflow_is_reported() -> None:
    model = random_model()
    with torch.no_grad():
        model.token_embedding.weight.fill_(1e38)
    tokenizer = CharTokenizer("abcdefghijk")
    with pytest.raises(UserError, match=r"^the model's numbers overflow; use another checkpoint$"):
        compute_maps(model, tokenizer, tokenizer.encode("abc"))


def png_size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_a_png_has_a_panel_for_each_layer_and_head(
    recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, tall = (torch.ones(*shape, 12, 12).tril().softmax(-1) for shape in ((2, 4), (4, 2)))
    tokens = list("To be, or no")
    width, height = png_size(render_png(AttentionMaps("character", tokens, wide)))
    assert width > 1.3 * height
    width, height = png_size(render_png(AttentionMaps("character", tokens, tall)))
    assert height > 1.3 * width
    assert max(png_size(render_png(maps_of(HOSTILE + "a long text " * 30)))) < 6000
    monkeypatch.setattr(attention_maps, "MAX_INCHES", 1.0)
    assert max(png_size(render_png(maps_of("crowdedly")))) < 1000
    assert not recwarn.list


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the dataset `small`, with block_size = 16."""
    out_dir = tmp_path_factory.mktemp("run")
    train.main(tiny_settings(data_dir, out_dir, max_steps=2))
    return out_dir


def write_attention(run: Path, path: Path, text: str, **changes: object) -> None:
    settings = {"attention": text, "out": str(path), **changes}
    sample.main(SampleSettings.model_validate(settings), str(run))


def test_sample_writes_a_file_and_prints_its_path(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("attention.html", "attention.png"):
        (tmp_path / name).write_text("older", encoding="utf-8")
        capsys.readouterr()
        write_attention(run, tmp_path / name, "the king")
        assert capsys.readouterr().out == f"{tmp_path / name}: written\n"
    png_size((tmp_path / "attention.png").read_bytes())
    data = page_json(tmp_path / "attention.html")
    assert (data["text"], data["view"], data["title"]) == ("the king", "attention", run.name)
    write_attention(run, tmp_path / ".HTML", "the qking, longer than the context", skip_unknown=True)
    assert page_json(tmp_path / ".HTML")["text"] == "the qking, longer than the context"


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("to be or not to b", {}, r"^the text has 17 characters; this model's context is 1 to 16$"),
        ("qq", {"skip_unknown": True}, r"^the text has 0 characters; this model's context is 1 to 16$"),
        ("the qking", {}, r"^the model has never seen 'q' \(U\+0071\); .*$"),
    ],
)
def test_unsuitable_texts_are_refused(
    text: str, changes: dict[str, str], message: str, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        write_attention(run, tmp_path / "a.png", text, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_reported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^.*nowhere.a\.html: could not be written: No such file or directory$"):
        write_attention(run, tmp_path / "nowhere" / "a.html", "the king")


def test_only_a_png_needs_matplotlib(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"^a PNG, unlike \.html, needs matplotlib: pip install matplotlib$"):
        write_attention(run, tmp_path / "a.png", "the king")
    write_attention(run, tmp_path / "a.html", "the king")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


@pytest.mark.parametrize(
    ("flags", "message"),
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
def test_conflicting_settings_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        parse(SampleSettings, flags, "", "", files=False)
