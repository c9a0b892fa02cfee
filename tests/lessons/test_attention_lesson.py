"""The lesson on attention computes as the model does, and its what-ifs change what they say and nothing else."""

import math
import re
from collections.abc import Callable
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attention as lesson
import model as network
import what_ifs
from conftest import MODERN, ROOT, prepare_text, script, some_text, tiny_config, tiny_model, tiny_settings
from glyphgpt.data.dataset import load_dataset
from glyphgpt.errors import UserError
from glyphgpt.runtime import Runtime
from model import GPT, CausalSelfAttention, SinusoidalPosition, causal_attention
from what_ifs import WHAT_IFS, WhatIf, WhatIfSettings, WhatIfTrainer

T, C, H, D = 7, 12, 3, 4
FORMS: dict[str, dict[str, Any]] = {"GPT-2": {}, "quick": MODERN}
CPU = Runtime(torch.device("cpu"), torch.float32)


def some_layer(seed: int = 0, C: int = C, H: int = H) -> lesson.Layer:
    query, key, value, out = np.random.default_rng(seed).standard_normal((4, C, C))
    return lesson.Layer(query, key, value, out, H)


def some_x(seed: int = 1, T: int = T, C: int = C) -> lesson.Floats:
    return np.random.default_rng(seed).standard_normal((T, C))


# attention.py


def test_attention_is_that_of_the_model() -> None:
    steps = lesson.attention(some_x(), some_layer())
    q, k, v = (torch.from_numpy(array)[None] for array in (steps.q, steps.k, steps.v))
    np.testing.assert_allclose(steps.mixed, causal_attention(q, k, v, dropout=0.0)[0].numpy(), atol=1e-12, rtol=0)


def test_heads_and_back_are_those_of_the_model() -> None:
    layer, x = some_layer(), some_x()
    model = CausalSelfAttention(tiny_config(n_embd=C, n_head=H, bias=False)).double()
    with torch.no_grad():
        model.qkv.weight.copy_(torch.from_numpy(np.concatenate((layer.query, layer.key, layer.value), axis=1).T))
        model.out.weight.copy_(torch.from_numpy(layer.out.T))
        theirs = model(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(lesson.attention(x, layer).out, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", lesson.WHAT_IFS)
def test_weights_of_every_what_if_sum_to_1_and_keep_to_the_mask(name: str) -> None:
    what_if = lesson.WHAT_IFS[name]
    weights = lesson.attention(some_x(), some_layer(), what_if.score, what_if.mask).weights
    assert weights.shape == (H, T, T)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-12)
    assert (weights[:, ~what_if.mask(T)] == 0).all()
    assert (weights >= 0).all()


@pytest.mark.parametrize(
    ("mask", "may"),
    [
        (lesson.causal, lambda t, s: s <= t),
        (lesson.other_half, lambda t, s: s >= t),
        (lesson.itself, lambda t, s: s == t),
        (lesson.no_mask, lambda t, s: t in range(T) and s in range(T)),
    ],
)
def test_masks_let_through_what_they_say(mask: lesson.Mask, may: Callable[[int, int], bool]) -> None:
    assert mask(T).tolist() == [[may(t, s) for s in range(T)] for t in range(T)]


@pytest.mark.parametrize(
    ("score", "formula"),
    [
        (lesson.dot, lambda dot: dot / math.sqrt(D)),
        (lesson.negated, lambda dot: -dot / math.sqrt(D)),
        (lesson.squared, lambda dot: dot**2 / D),
        (lesson.inverse, lambda dot: dot / math.sqrt(D) / (dot**2 / D + 0.01)),
        (lesson.unscaled, lambda dot: dot),
    ],
)
def test_scores_follow_their_formulas_on_arrays_and_tensors(
    score: lesson.Score, formula: Callable[[float], float]
) -> None:
    q, k = np.random.default_rng(2).standard_normal((2, H, T, D))
    scores = score(q, k)
    for h, t, s in product(range(H), range(T), range(T)):
        dot = sum(float(q[h, t, d] * k[h, s, d]) for d in range(D))
        assert scores[h, t, s] == pytest.approx(formula(dot), rel=1e-9, abs=1e-9)
    tensors: Any = torch.from_numpy(q), torch.from_numpy(k)
    np.testing.assert_allclose(score(*tensors), scores, atol=1e-12)


def test_inverse_is_nearly_1_over_the_score_and_never_above_5() -> None:
    q, k = np.linspace(-30, 30, 1001)[:, None], np.ones((1, 1))  # D = 1
    scores = lesson.inverse(q, k)
    assert np.abs(scores).max() == pytest.approx(5, abs=0.2)
    far = np.abs(q) > 1
    np.testing.assert_allclose(scores[far], 1 / q[far], rtol=0.01)


@pytest.mark.parametrize("length", [1, 8])
def test_positions_are_the_models_waves(length: int) -> None:
    theirs = SinusoidalPosition(tiny_config(block_size=length, n_embd=16)).waves
    np.testing.assert_allclose(lesson.positions(length, 16), theirs.numpy(), atol=1e-6)


def test_without_positions_equal_letters_get_equal_weights() -> None:
    x = some_x()
    x[4] = x[1]
    weights = lesson.attention(x, some_layer()).weights
    np.testing.assert_allclose(weights[:, 5:, 1], weights[:, 5:, 4], rtol=1e-12)


def test_entropy_counts_those_who_share() -> None:
    assert lesson.entropy(np.array([0.25, 0.25, 0.25, 0.25, 0])) == pytest.approx(2)
    assert lesson.entropy(np.array([0.0, 1.0])) == 0


def test_the_picture_goes_from_blank_to_full_and_counts_the_future() -> None:
    row = lesson.picture("abcde", 2, np.array([0, 0.1, 0.2, 0.3, 0.4])).splitlines()
    assert row[:3] == ["  abcde", "   ░▒▓█", "  most: 'e' at 4 40%, 'd' at 3 30%, 'c' at 2 20%"]
    assert row[3] == "  1.85 bits: as if at 3.6 characters; 70% on the future"


def test_the_lesson_shows_shapes_and_every_what_if() -> None:
    done = script("lessons/attention.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert "T = 52 characters, C = 32 channels, H = 2 heads, D = C / H = 16, V = 17" in done.stdout
    assert re.search(r"^scores .* H T T +2 x 52 x 52$", done.stdout, re.MULTILINE)
    blocks = done.stdout.split("\n\n")
    for name, what_if in lesson.WHAT_IFS.items():
        [block] = [block for block in blocks if block.startswith(f"{name}: {what_if.says}\n")]
        assert "bits: as if at" in block
    figures = {block.partition(":")[0]: block for block in blocks}
    assert "; 0% on the future" in figures["as in GPT"]
    assert "; 0% on the future" not in figures["other half"]
    assert figures["other half"].splitlines()[2][: 2 + 30].strip() == ""  # before 'elle', nothing


@pytest.mark.parametrize(("words", "at"), [(["abc abc"], "'c' at place 6"), (["abc abc", "ab"], "'b' at place 5")])
def test_the_word_chooses_who_looks(words: list[str], at: str) -> None:
    assert f"How {at} (^)" in script("lessons/attention.py", *words, "--channels=6", "--heads=3").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a"], "the sentence has 1 characters; take 2 to 100"),
        (["a" * 101], "the sentence has 101 characters; take 2 to 100"),
        (["a\nb"], "the sentence has characters that a terminal does not show; take plain text, one line"),
        (["a b", "c"], "'c' is not in the sentence; name a word of it"),
        (["--channels=7"], "--channels=7: sines and cosines come in pairs; take an even number from 2 to 1024"),
        (["--channels=9998"], "--channels=9998: sines and cosines come in pairs; take an even number from 2 to 1024"),
        (["--heads=5"], "--heads=5 does not divide 32 channels; take a number that does"),
        (["--heads=0"], "--heads=0 does not divide 32 channels; take a number that does"),
        (["--seed=-1"], "--seed=-1: take 0 or more"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(words: list[str], said: str) -> None:
    done = script("lessons/attention.py", *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {said}\n")


# what_ifs.py


def some_tokens(batch: int = 2, length: int = 8) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


def shaken(what_if: WhatIf | None, **form: Any) -> GPT:
    """Return a tiny model with random weights everywhere, the same for every what-if."""
    model = tiny_model(**form)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    if what_if:
        what_ifs.change(model, what_if)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_written_out_the_dot_product_gives_the_plain_models_logits(form: str) -> None:
    plain, dot = (shaken(what_if, **FORMS[form])(some_tokens()) for what_if in (None, WhatIf()))
    torch.testing.assert_close(dot, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in WHAT_IFS if name not in ("plain", "dot", "learned", "sinusoidal")])
def test_every_change_changes_something(name: str) -> None:
    plain, other = (shaken(what_if, **MODERN)(some_tokens()) for what_if in (None, WHAT_IFS[name]))
    assert (plain - other).abs().max() > 1e-3


def influence(what_if: WhatIf, layers: int = 1) -> Tensor:
    """Return which token's embedding (column) can change which place's logits (row), (T, T)."""
    model = shaken(what_if, position="rotary", n_layer=layers)
    embeddings: list[Tensor] = []

    def catch(_module: object, _inputs: object, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    model.token_embedding.register_forward_hook(catch)
    logits = model(some_tokens(1))
    gradients = [torch.autograd.grad(logits[0, t].square().sum(), embeddings[0], retain_graph=True) for t in range(8)]
    return torch.stack([gradient[0].abs().sum(-1) > 0 for (gradient,) in gradients])


@pytest.mark.parametrize("mask", [lesson.causal, lesson.other_half, lesson.no_mask, lesson.itself])
@pytest.mark.parametrize("layers", [1, 3])
def test_nothing_gets_around_a_mask(mask: lesson.Mask, layers: int) -> None:
    assert influence(WhatIf(mask=mask), layers).tolist() == mask(8).tolist()


def test_without_positions_the_order_of_the_past_does_not_matter_to_one_layer() -> None:
    tokens = some_tokens(1)
    turned = torch.cat((tokens[:, :7].flip(1), tokens[:, 7:]), dim=1)
    for position, same in (("none", True), ("rotary", False)):
        model = shaken(WhatIf(position=position), position="rotary", n_layer=1)  # type: ignore[arg-type]
        assert torch.allclose(model(tokens)[:, -1], model(turned)[:, -1], atol=1e-5) is same


@given(st.sampled_from(list(WHAT_IFS)), st.sampled_from(list(what_ifs.FORMS)))
def test_settings_are_those_of_quick_but_for_what_is_said(name: str, form: str) -> None:
    given = WhatIfSettings(max_steps=3, data_dir="elsewhere")
    plain = what_ifs.settings_of(None, form, given, "there")
    assert (plain.max_steps, plain.data_dir, plain.out_dir, plain.optimizer) == (3, "elsewhere", "there", "muon")
    assert plain.ngram == (4 if form == "quick" else 1)
    what_if = WHAT_IFS[name]
    position = "rotary" if what_if is None or what_if.position == "none" else what_if.position
    assert what_ifs.settings_of(what_if, form, given, "there") == plain.model_copy(update={"position": position})


def trained(what_if: WhatIf | None, data_dir: Path, out_dir: Path, **changes: Any) -> WhatIfTrainer:
    settings = tiny_settings(data_dir, out_dir, sample_tokens=0, position="rotary", **changes)
    trainer = WhatIfTrainer(settings, load_dataset(data_dir / "small", data_dir), CPU, what_if)
    trainer.train()
    return trainer


def test_the_dot_product_trains_as_the_plain_model(data_dir: Path, tmp_path: Path) -> None:
    plain, dot = (trained(what_if, data_dir, tmp_path / str(n)) for n, what_if in enumerate((None, WhatIf())))
    assert dot.state.best_loss == pytest.approx(plain.state.best_loss, abs=1e-5)
    assert dot.write() == plain.write()
    assert len(dot.write()) == what_ifs.CHARACTERS


def test_seeing_the_future_pays_in_training_only(data_dir: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 120, "learning_rate": 1e-2, "n_embd": 32}
    honest, seer = (
        trained(WhatIf(mask=mask), data_dir, tmp_path / mask.__name__, **changes)
        for mask in (lesson.causal, lesson.no_mask)
    )
    assert seer.state.best_loss < honest.state.best_loss / 2
    assert seer.loss_in_writing() > honest.loss_in_writing() + 1


def test_the_program_prints_a_table_for_each_form(tmp_path: Path) -> None:
    prepare_text(some_text(3000), tmp_path / "data", name="shakespeare_char")
    done = script("lessons/what_ifs.py", "--only=dot,other_half", "--max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (dot|other_half) \| \d\.\d{3} \| \d+\.\d\d \| `.{80}` \|$", done.stdout, re.MULTILINE)
    assert rows == ["dot", "other_half"] * 2
    assert re.findall(r"^(.*):$", done.stdout, re.MULTILINE) == list(what_ifs.FORMS)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_page_has_a_row_for_each_what_if_and_names_what_is_there() -> None:
    page = (ROOT / "lessons" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\w+) \| \d\.\d{3} \|", page, re.MULTILINE) == list(WHAT_IFS) * 2
    table = page[page.index("in model.py |") :]
    names = [name for row in table.splitlines()[2:] for name in re.findall(r"`([\w.]+)`", row.split("|")[3])]
    assert len(names) > 10
    assert all(attrgetter(name)(network) for name in names)
    shown = re.search(r"^as in GPT: .*?future$", page, re.MULTILINE | re.DOTALL)
    assert shown
    assert shown.group() in re.sub(" +$", "", script("lessons/attention.py").stdout, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"only": "dot,cross"}, "^there is no what-if 'cross'; here: plain, dot, "),
        ({"data_dir": "missing"}, "^missing/shakespeare_char: no dataset here; prepare it first: python prepare.py"),
    ],
)
def test_settings_that_will_not_do_are_told(settings: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        what_ifs.main(WhatIfSettings(**settings))  # type: ignore[arg-type]


def test_plain_words_get_one_line() -> None:
    done = script("lessons/what_ifs.py", "squared")
    said = "error: what is 'squared'? choose what-ifs with --only=NAME,...\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
