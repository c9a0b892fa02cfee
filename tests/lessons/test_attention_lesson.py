"""attention.py computes what model.py computes, and each variant changes only what its description says."""

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
import attention_variants
import model as network
from attention_variants import MODEL_VARIANTS, ModelVariant, VariantSettings, VariantTrainer
from conftest import MODERN, ROOT, prepare_text, script, some_text, tiny_config, tiny_model, tiny_settings
from glyphgpt.data.dataset import load_dataset
from glyphgpt.errors import UserError
from glyphgpt.runtime import Runtime
from model import GPT, CausalSelfAttention, SinusoidalPosition, causal_attention

T, C, H, D = 7, 12, 3, 4
CONFIGS: dict[str, dict[str, Any]] = {"GPT-2": {}, "quick": MODERN}
CPU = Runtime(torch.device("cpu"), torch.float32)


def random_layer(seed: int = 0, C: int = C, H: int = H) -> lesson.Layer:
    query, key, value, out = np.random.default_rng(seed).standard_normal((4, C, C))
    return lesson.Layer(query, key, value, out, H)


def random_x(seed: int = 1, T: int = T, C: int = C) -> lesson.Array:
    return np.random.default_rng(seed).standard_normal((T, C))


# attention.py


def test_attention_equals_causal_attention_of_the_model() -> None:
    activations = lesson.attention(random_x(), random_layer())
    q, k, v = (torch.from_numpy(array)[None] for array in (activations.q, activations.k, activations.v))
    expected = causal_attention(q, k, v, dropout=0.0)[0].numpy()
    np.testing.assert_allclose(activations.mixed, expected, atol=1e-12, rtol=0)


def test_layer_output_equals_that_of_the_model() -> None:
    layer, x = random_layer(), random_x()
    model = CausalSelfAttention(tiny_config(n_embd=C, n_head=H, bias=False)).double()
    with torch.no_grad():
        model.qkv.weight.copy_(torch.from_numpy(np.concatenate((layer.query, layer.key, layer.value), axis=1).T))
        model.out.weight.copy_(torch.from_numpy(layer.out.T))
        expected = model(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(lesson.attention(x, layer).out, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", lesson.VARIANTS)
def test_weights_of_every_variant_sum_to_1_and_are_0_where_masked(name: str) -> None:
    variant = lesson.VARIANTS[name]
    weights = lesson.attention(random_x(), random_layer(), variant.score, variant.mask).weights
    assert weights.shape == (H, T, T)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-12)
    assert (weights[:, ~variant.mask(T)] == 0).all()
    assert (weights >= 0).all()


@pytest.mark.parametrize(
    ("mask", "allowed"),
    [
        (lesson.causal_mask, lambda t, s: s <= t),
        (lesson.anticausal_mask, lambda t, s: s >= t),
        (lesson.self_mask, lambda t, s: s == t),
        (lesson.no_mask, lambda t, s: t in range(T) and s in range(T)),
    ],
)
def test_masks_allow_the_documented_positions(mask: lesson.MaskFunction, allowed: Callable[[int, int], bool]) -> None:
    assert mask(T).tolist() == [[allowed(t, s) for s in range(T)] for t in range(T)]


@pytest.mark.parametrize(
    ("score", "formula"),
    [
        (lesson.dot_product, lambda dot: dot / math.sqrt(D)),
        (lesson.negated, lambda dot: -dot / math.sqrt(D)),
        (lesson.squared, lambda dot: dot**2 / D),
        (lesson.inverse, lambda dot: dot / math.sqrt(D) / (dot**2 / D + 0.01)),
        (lesson.unscaled, lambda dot: dot),
    ],
)
def test_score_functions_follow_their_formulas_on_arrays_and_tensors(
    score: lesson.ScoreFunction, formula: Callable[[float], float]
) -> None:
    q, k = np.random.default_rng(2).standard_normal((2, H, T, D))
    scores = score(q, k)
    for h, t, s in product(range(H), range(T), range(T)):
        dot = sum(float(q[h, t, d] * k[h, s, d]) for d in range(D))
        assert scores[h, t, s] == pytest.approx(formula(dot), rel=1e-9, abs=1e-9)
    tensors: Any = torch.from_numpy(q), torch.from_numpy(k)
    np.testing.assert_allclose(score(*tensors), scores, atol=1e-12)


def test_inverse_is_about_1_over_the_score_and_at_most_5() -> None:
    q, k = np.linspace(-30, 30, 1001)[:, None], np.ones((1, 1))  # D = 1
    scores = lesson.inverse(q, k)
    assert np.abs(scores).max() == pytest.approx(5, abs=0.2)
    far = np.abs(q) > 1
    np.testing.assert_allclose(scores[far], 1 / q[far], rtol=0.01)


@pytest.mark.parametrize("length", [1, 8])
def test_sinusoidal_positions_equal_those_of_the_model(length: int) -> None:
    expected = SinusoidalPosition(tiny_config(block_size=length, n_embd=16)).waves
    np.testing.assert_allclose(lesson.sinusoidal_positions(length, 16), expected.numpy(), atol=1e-6)


def test_without_positions_equal_characters_get_equal_weights() -> None:
    x = random_x()
    x[4] = x[1]
    weights = lesson.attention(x, random_layer()).weights
    np.testing.assert_allclose(weights[:, 5:, 1], weights[:, 5:, 4], rtol=1e-12)


def test_entropy_is_log2_of_the_number_of_equal_weights() -> None:
    assert lesson.entropy(np.array([0.25, 0.25, 0.25, 0.25, 0])) == pytest.approx(2)
    assert lesson.entropy(np.array([0.0, 1.0])) == 0


def test_format_weights_draws_blocks() -> None:
    lines = lesson.format_weights("abcde", np.array([0, 0.1, 0.2, 0.3, 0.4])).splitlines()
    assert lines[:3] == ["  abcde", "   ░▒▓█", "  largest: 40% 'e' at 4, 30% 'd' at 3, 20% 'c' at 2"]
    assert lines[3] == "  entropy: 1.85 bits, effectively 3.6 characters"


def test_the_lesson_prints_shapes_and_every_variant() -> None:
    finished = script("lessons/attention.py")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "T = 52 characters, C = 32 channels, H = 2 heads, D = C / H = 16, V = 17" in finished.stdout
    assert re.search(r"^scores .* H T T +2 x 52 x 52$", finished.stdout, re.MULTILINE)
    sections = {section.partition(":")[0]: section for section in finished.stdout.split("\n\n")}
    for name, variant in lesson.VARIANTS.items():
        assert sections[name].startswith(f"{name}: {variant.description}\n")
        assert "bits, effectively" in sections[name]
    assert "future: 0%" in sections["standard"]
    assert "future: 0%" not in sections["anticausal"]
    assert sections["anticausal"].splitlines()[2][: 2 + 30].strip() == ""  # no weight before "elle"


@pytest.mark.parametrize(
    ("arguments", "position"), [(["abc abc"], "'c' at position 6"), (["abc abc", "ab"], "'b' at position 5")]
)
def test_the_word_selects_the_position(arguments: list[str], position: str) -> None:
    finished = script("lessons/attention.py", *arguments, "--channels=6", "--heads=3")
    assert f"Attention weights of {position} (^)" in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "the sentence has 1 characters; choose one of 2 to 100"),
        (["a" * 101], "the sentence has 101 characters; choose one of 2 to 100"),
        (["a\nb"], "the sentence has unprintable characters; choose plain text on one line"),
        (["a b", "c"], "'c' is not in the sentence; choose a word that is"),
        (["--channels=7"], "--channels=7 is not an even number from 2 to 1024; sines and cosines come in pairs"),
        (["--channels=9998"], "--channels=9998 is not an even number from 2 to 1024; sines and cosines come in pairs"),
        (["--heads=5"], "--heads=5 does not divide 32 channels; choose a number that does"),
        (["--heads=0"], "--heads=0 does not divide 32 channels; choose a number that does"),
        (["--seed=-1"], "--seed=-1 is negative; choose 0 or more"),
    ],
)  # fmt: skip
def test_invalid_arguments_of_the_lesson_print_one_line(arguments: list[str], message: str) -> None:
    finished = script("lessons/attention.py", *arguments)
    assert (finished.returncode, finished.stdout, finished.stderr) == (2, "", f"error: {message}\n")


# attention_variants.py


def random_tokens(batch: int = 2, length: int = 8) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


def random_model(variant: ModelVariant | None, **config: Any) -> GPT:
    """Return a tiny model with all its parameters random, the same for every variant."""
    model = tiny_model(**config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    if variant:
        attention_variants.apply_variant(model, variant)
    return model


@pytest.mark.parametrize("config", CONFIGS)
def test_the_dot_product_variant_gives_the_logits_of_the_unchanged_model(config: str) -> None:
    unchanged, dot_product = (
        random_model(variant, **CONFIGS[config])(random_tokens()) for variant in (None, ModelVariant())
    )
    torch.testing.assert_close(dot_product, unchanged, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "name", [name for name in MODEL_VARIANTS if name not in ("unchanged", "dot_product", "learned", "sinusoidal")]
)
def test_every_variant_changes_the_logits(name: str) -> None:
    unchanged, changed = (random_model(variant, **MODERN)(random_tokens()) for variant in (None, MODEL_VARIANTS[name]))
    assert (unchanged - changed).abs().max() > 1e-3


def dependencies(variant: ModelVariant, layers: int = 1) -> Tensor:
    """Return whether the logits at a position (row) depend on the embedding at a position (column), (T, T)."""
    model = random_model(variant, position="rotary", n_layer=layers)
    embeddings: list[Tensor] = []

    def capture(_module: object, _inputs: object, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    model.token_embedding.register_forward_hook(capture)
    logits = model(random_tokens(1))
    gradients = [torch.autograd.grad(logits[0, t].square().sum(), embeddings[0], retain_graph=True) for t in range(8)]
    return torch.stack([gradient[0].abs().sum(-1) > 0 for (gradient,) in gradients])


@pytest.mark.parametrize("mask", [lesson.causal_mask, lesson.anticausal_mask, lesson.no_mask, lesson.self_mask])
@pytest.mark.parametrize("layers", [1, 3])
def test_logits_depend_only_on_positions_that_the_mask_allows(mask: lesson.MaskFunction, layers: int) -> None:
    assert dependencies(ModelVariant(mask=mask), layers).tolist() == mask(8).tolist()


def test_without_positions_one_layer_ignores_the_order_of_the_past() -> None:
    tokens = random_tokens(1)
    reversed_past = torch.cat((tokens[:, :7].flip(1), tokens[:, 7:]), dim=1)
    for position, equal in (("none", True), ("rotary", False)):
        model = random_model(ModelVariant(position=position), position="rotary", n_layer=1)  # type: ignore[arg-type]
        assert torch.allclose(model(tokens)[:, -1], model(reversed_past)[:, -1], atol=1e-5) is equal


@given(st.sampled_from(list(MODEL_VARIANTS)), st.sampled_from(list(attention_variants.CONFIGS)))
def test_a_variant_changes_only_the_position_setting(name: str, config: str) -> None:
    settings = VariantSettings(max_steps=3, data_dir="elsewhere")
    unchanged = attention_variants.make_train_settings(None, config, settings, "out")
    assert (unchanged.max_steps, unchanged.data_dir, unchanged.out_dir) == (3, "elsewhere", "out")
    assert unchanged.optimizer == "muon"
    assert unchanged.ngram == (4 if config == "quick" else 1)
    variant = MODEL_VARIANTS[name]
    position = "rotary" if variant is None or variant.position == "none" else variant.position
    changed = attention_variants.make_train_settings(variant, config, settings, "out")
    assert changed == unchanged.model_copy(update={"position": position})


def train_variant(variant: ModelVariant | None, data_dir: Path, out_dir: Path, **changes: Any) -> VariantTrainer:
    settings = tiny_settings(data_dir, out_dir, sample_tokens=0, position="rotary", **changes)
    trainer = VariantTrainer(settings, load_dataset(data_dir / "small", data_dir), CPU, variant)
    trainer.train()
    return trainer


def test_the_dot_product_variant_trains_like_the_unchanged_model(data_dir: Path, tmp_path: Path) -> None:
    unchanged = train_variant(None, data_dir, tmp_path / "unchanged")
    dot_product = train_variant(ModelVariant(), data_dir, tmp_path / "dot_product")
    assert dot_product.state.best_loss == pytest.approx(unchanged.state.best_loss, abs=1e-5)
    assert dot_product.generate_text() == unchanged.generate_text()
    assert len(dot_product.generate_text()) == attention_variants.SAMPLE_CHARACTERS


def test_without_a_mask_the_validation_loss_is_lower_and_the_generation_loss_higher(
    data_dir: Path, tmp_path: Path
) -> None:
    changes = {"max_steps": 120, "learning_rate": 1e-2, "n_embd": 32}
    causal, unmasked = (
        train_variant(ModelVariant(mask=mask), data_dir, tmp_path / mask.__name__, **changes)
        for mask in (lesson.causal_mask, lesson.no_mask)
    )
    assert unmasked.state.best_loss < causal.state.best_loss / 2
    assert unmasked.generation_loss() > causal.generation_loss() + 1


def test_the_program_prints_a_table_for_each_config(tmp_path: Path) -> None:
    prepare_text(some_text(3000), tmp_path / "data", name="shakespeare_char")
    finished = script("lessons/attention_variants.py", "--only=dot_product,anticausal", "--max_steps=2", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    rows = re.findall(r"^\| (\w+) \| \d\.\d{3} \| \d+\.\d\d \| `.{80}` \|$", finished.stdout, re.MULTILINE)
    assert rows == ["dot_product", "anticausal"] * 2
    other_lines = [line for line in finished.stdout.splitlines() if line and not line.startswith("|")]
    assert other_lines == [f"{config}:" for config in attention_variants.CONFIGS]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_readme_has_a_row_for_each_variant_real_names_and_the_printed_output() -> None:
    readme = (ROOT / "lessons" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\w+) \| \d\.\d{3} \|", readme, re.MULTILINE) == list(MODEL_VARIANTS) * 2
    table = readme[readme.index("in model.py |") :]
    names = [name for row in table.splitlines()[2:] for name in re.findall(r"`([\w.]+)`", row.split("|")[3])]
    assert len(names) > 10
    assert all(attrgetter(name)(network) for name in names)
    quoted = re.search(r"^standard: .*?future: \d+%$", readme, re.MULTILINE | re.DOTALL)
    assert quoted
    assert quoted.group() in re.sub(" +$", "", script("lessons/attention.py").stdout, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": "dot_product,cross"}, "^no variant is named 'cross'; choose from unchanged, dot_product, "),
        ({"data_dir": "missing"}, "^missing/shakespeare_char: no dataset here; prepare it first: python prepare.py"),
    ],
)
def test_invalid_settings_raise_a_user_error(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attention_variants.main(VariantSettings(**settings))  # type: ignore[arg-type]


def test_arguments_that_are_not_settings_print_one_line() -> None:
    finished = script("lessons/attention_variants.py", "squared")
    message = "error: unexpected argument 'squared'; choose variants with --only=NAME,...\n"
    assert (finished.returncode, finished.stdout, finished.stderr) == (2, "", message)
