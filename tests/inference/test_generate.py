"""Decoding: the cache, the sampling rules, and text that ends before a stop."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from conftest import MODERN, decoder_of, tiny_model
from glyphgpt.data.tokenizers import ByteTokenizer, CharTokenizer
from glyphgpt.inference.generate import Floats, Ids, LanguageModel, SamplingParams, TextStream, context_start, generate
from glyphgpt.inference.numpy_gpt import NumpyKVCache
from glyphgpt.runtime import Runtime, TorchLM
from model import GPT


class Watched:
    """A model that notes how many tokens it is given."""

    def __init__(self, model: GPT) -> None:
        self.model = decoder_of(model)
        self.seen: list[tuple[int, int]] = []

    def new_cache(self, batch: int) -> NumpyKVCache:
        return self.model.new_cache(batch)

    def next_logits(self, tokens: Ids, cache: NumpyKVCache) -> Floats:
        self.seen.append((cache.length, tokens.shape[1]))
        return self.model.next_logits(tokens, cache)


def sharp_model(**form: Any) -> GPT:
    """A model with strong opinions, so that a wrong context changes the draws."""
    model = tiny_model(**form)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def draws(
    model: GPT | LanguageModel,
    prompt: list[int],
    count: int,
    *,
    samples: int = 1,
    seed: int = 0,
    cache: bool = True,
    greedy: bool = False,
) -> list[list[int]]:
    tokens = generate(
        decoder_of(model) if isinstance(model, GPT) else model,
        np.array(prompt),
        block_size=8,
        num_samples=samples,
        max_new_tokens=count,
        params=SamplingParams(temperature=0 if greedy else 1),
        seed=seed,
        use_cache=cache,
    )
    return [list(sample) for sample in zip(*(drawn.tolist() for drawn in tokens), strict=True)]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("length", [3, 8, 20])
@pytest.mark.parametrize("form", [{}, {"position": "sinusoidal"}, {"position": "rotary"}, MODERN], ids=str)
def test_a_cache_changes_nothing(form: dict[str, Any], length: int, samples: int) -> None:
    model = sharp_model(**form)
    prompt = torch.randint(11, (length,)).tolist()
    cached = draws(model, prompt, 24, samples=samples)
    assert cached == draws(model, prompt, 24, samples=samples, cache=False)
    with_torch = TorchLM(model, Runtime(torch.device("cpu"), torch.float32))
    assert cached == draws(with_torch, prompt, 24, samples=samples)
    assert cached == draws(with_torch, prompt, 24, samples=samples, cache=False)
    assert len(cached) == samples and len(cached[0]) == 24
    assert len({tuple(sample) for sample in cached}) == samples


def test_every_token_is_drawn_from_the_tokens_in_its_context() -> None:
    model = sharp_model()
    text = [1, 2, 3]
    (sample,) = draws(model, text, 24, greedy=True)
    for token in sample:
        context = torch.tensor([text[context_start(len(text), 8) :]])
        assert token == model(context)[0, -1].argmax().item()
        text.append(token)


def test_with_a_cache_the_model_sees_each_token_once_until_the_context_moves() -> None:
    model = Watched(tiny_model())
    draws(model, [1, 2, 3], 15)
    assert model.seen[:6] == [(0, 3), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1)]
    assert model.seen[6:11] == [(0, 5), (5, 1), (6, 1), (7, 1), (0, 5)]


def test_seeds_decide_the_samples() -> None:
    model = sharp_model()
    assert draws(model, [1], 20, seed=5) == draws(model, [1], 20, seed=5)
    assert draws(model, [1], 20, seed=5) != draws(model, [1], 20, seed=6)


def test_no_new_tokens_are_no_tokens() -> None:
    assert draws(tiny_model(), [1], 0) == []


@given(st.integers(1, 70), st.integers(1, 300))
@settings(deadline=None, max_examples=200)
@example(1, 1)
@example(1, 2)
@example(2, 3)
def test_the_context_is_short_enough_never_goes_back_and_keeps_half(block_size: int, length: int) -> None:
    start, after = context_start(length, block_size), context_start(length + 1, block_size)
    assert 0 <= start <= after
    assert 1 <= length - start <= block_size
    assert length - start >= min(length, block_size / 2)
    assert start == 0 or length > block_size


def test_the_context_moves_seldom() -> None:
    starts = [context_start(length, 64) for length in range(1, 1000)]
    assert sum(a != b for a, b in pairwise(starts)) == math.ceil((999 - 64) / 32)


LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=12)


def by_hand(logits: list[float], rule: SamplingParams) -> list[float]:
    """The probabilities, rule after rule, in plain Python."""
    weights = [math.exp(logit / rule.temperature) for logit in logits]
    if rule.top_k:
        least = sorted(weights, reverse=True)[: rule.top_k][-1]
        weights = [weight if weight >= least else 0 for weight in weights]
    weights = [weight / sum(weights) for weight in weights]
    if rule.top_p < 1:
        together, kept = 0.0, [0.0] * len(weights)
        for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
            assume(abs(together - rule.top_p) > 1e-5)  # rounding decides
            if together < rule.top_p:
                kept[i] = weights[i]
            together += weights[i]
        weights = kept
    if rule.min_p:
        bound = rule.min_p * max(weights)
        assume(all(weight == 0 or weight == max(weights) or abs(weight / bound - 1) > 1e-5 for weight in weights))
        weights = [weight if weight >= bound else 0 for weight in weights]
    return [weight / sum(weights) for weight in weights]


RULES = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0, 50.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 12, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 0.1, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.1, 0.7, 1.0]),
)


@given(LOGITS, RULES)
@settings(deadline=None, max_examples=300)
@example([0.0, 0.0, 0.0, -1.0], SamplingParams(top_k=2))  # a tie at the last place
@example([1.0, 0.0, 0.0, -1.0], SamplingParams(top_p=0.5))
@example([1.0, 1.0, 0.0], SamplingParams(min_p=1.0))
def test_rules_equal_those_by_hand(logits: list[float], rule: SamplingParams) -> None:
    wanted = by_hand(logits, rule)
    (seen,) = rule.probs(np.array([logits, logits[::-1]]))[:1].tolist()
    shares = [weight / sum(seen) for weight in seen]
    # of tokens that are equally likely, top_p may take any
    assert sorted(shares) == pytest.approx(sorted(wanted), abs=1e-5)
    if len(set(logits)) == len(logits):
        assert shares == pytest.approx(wanted, abs=1e-5)


@given(LOGITS, RULES, st.integers(0, 1000))
@settings(deadline=None, max_examples=100)
def test_some_token_is_always_left(logits: list[float], rule: SamplingParams, seed: int) -> None:
    rows = np.array([logits] * 3) * 20
    allowed = rule.probs(rows)
    assert np.isfinite(allowed).all()
    drawn = rule.sample(rows, np.random.default_rng(seed))
    assert drawn.shape == (3,)
    assert (allowed[[0, 1, 2], drawn] > 0).all()


class Extreme:
    """A source of randomness that gives its smallest or its largest number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def standard_exponential(self, shape: tuple[int, ...]) -> Floats:
        return np.full(shape, self.number)


@pytest.mark.parametrize("number", [0.0, 1e-17, 50.0])
def test_tokens_without_a_chance_are_never_drawn(number: float) -> None:
    rows = np.array([[-np.inf, -30.0, 0.0, -np.inf]])
    assert SamplingParams().sample(rows, Extreme(number)).tolist() == [2]  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 1e-300])
def test_a_temperature_near_0_takes_the_likeliest(temperature: float) -> None:
    rows = np.array([[1.0, 50.0, -30.0], [-1.0, -2.0, -3.0]])
    drawn = SamplingParams(temperature=temperature).sample(rows, np.random.default_rng(0))
    assert drawn.tolist() == [1, 0]


def test_temperature_0_takes_the_likeliest() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 9))
    drawn = SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.5).sample(rows, np.random.default_rng(0))
    assert drawn.tolist() == [row.index(max(row)) for row in rows.tolist()]


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (SamplingParams(), [0.1, 0.2, 0.3, 0.4]),
        (SamplingParams(temperature=0.5), [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        (SamplingParams(top_k=2), [0, 0, 3 / 7, 4 / 7]),
        (SamplingParams(top_p=0.75), [0, 2 / 9, 3 / 9, 4 / 9]),
        (SamplingParams(min_p=0.6), [0, 0, 3 / 7, 4 / 7]),
        (SamplingParams(top_k=3, top_p=0.7, min_p=0.8), [0, 0, 0, 1]),
    ],
)
def test_draws_are_as_frequent_as_they_should_be(rule: SamplingParams, wanted: list[float]) -> None:
    count = 40_000
    rows = np.tile(np.log([0.1, 0.2, 0.3, 0.4]), (count, 1))
    drawn = rule.sample(rows, np.random.default_rng(0))
    found = np.bincount(drawn, minlength=4).tolist()
    expected = [count * share for share in wanted]
    assert all(n == 0 for n, e in zip(found, expected, strict=True) if e == 0)
    chi_square = sum((n - e) ** 2 / e for n, e in zip(found, expected, strict=True) if e)
    assert chi_square < 16.3  # exceeded once in a thousand seeds at 3 degrees of freedom


def streamed(text: str, stops: list[str]) -> tuple[TextStream, list[str]]:
    stream = TextStream(ByteTokenizer(), stops)
    pieces = [stream.feed(byte) for byte in text.encode()]
    return stream, [*pieces, stream.end()]


def cut(text: str, stops: list[str]) -> str:
    """The text before the first stop to be complete; of several at that moment, the one that begins first."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


SOME_TEXT = st.text("ab", max_size=14)


@given(SOME_TEXT, st.lists(st.text("ab", max_size=5), max_size=4))
@settings(deadline=None, max_examples=500)
@example("aab", ["ab"])
@example("xabc", ["abc", "b"])
@example("ababac", ["abac"])
@example("aaab", ["aab", "ab"])
def test_text_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    stream, pieces = streamed(text, stops)
    assert "".join(pieces) == stream.text == cut(text, stops)
    assert stream.finished
    assert stream.feed(97) == stream.end() == ""
    assert stream.text == cut(text, stops)


@given(st.text(max_size=20), st.lists(st.text(max_size=3), max_size=3))
@settings(deadline=None, max_examples=100)
def test_any_characters_stream(text: str, stops: list[str]) -> None:
    stream, pieces = streamed(text, stops)
    assert "".join(pieces) == stream.text == cut(text, stops)


def test_a_stop_is_known_at_once() -> None:
    stream = TextStream(CharTokenizer("\nABC"), ["\nA", ""])
    assert [stream.feed(token) for token in (1, 2, 0)] == ["A", "B", ""]
    assert not stream.finished
    assert [stream.feed(token) for token in (0, 2)] == ["\n", "\nB"]
    assert [stream.feed(token) for token in (0, 1)] == ["", ""]
    assert stream.finished
    assert stream.text == "AB\n\nB"


def test_without_stops_nothing_is_held_back() -> None:
    stream = TextStream(ByteTokenizer())
    assert [stream.feed(byte) for byte in b"to be"] == list("to be")
    assert stream.end() == ""


def test_a_character_comes_out_once_it_is_complete() -> None:
    _, pieces = streamed("é🙂", [])
    assert pieces == ["", "é", "", "", "", "🙂", ""]


def test_an_unfinished_character_shows_at_the_end() -> None:
    stream = TextStream(ByteTokenizer(), ["b"])
    assert [stream.feed(byte) for byte in (97, 0xF0, 0x9F)] == ["a", "", ""]
    assert stream.end() == "\ufffd"
    assert stream.text == "a\ufffd"


def test_a_stop_may_be_complete_at_the_end_only() -> None:
    stream = TextStream(ByteTokenizer(), ["\ufffd"])
    assert [stream.feed(byte) for byte in (97, 0xF0)] == ["a", ""]
    assert stream.end() == ""
    assert stream.text == "a"
