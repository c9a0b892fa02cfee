"""Generation: the cache, the sampling parameters, and text that ends before a stop string."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from conftest import MODERN, decoder_of, random_model, tiny_model
from glyphgpt.data.tokenizers import ByteTokenizer, CharTokenizer
from glyphgpt.inference.generate import Floats, Ids, LanguageModel, SamplingParams, TextStream, context_start, generate
from glyphgpt.inference.torch_lm import TorchLM, cast_weights, draw
from glyphgpt.runtime import Runtime
from model import GPT

CPU = Runtime(torch.device("cpu"), torch.float32)


class RecordingModel(LanguageModel):
    """A language model that records the cached length and the tokens of each call, and the logits it returns."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.calls: list[tuple[int, list[list[int]]]] = []
        self.logits: list[Floats] = []

    def new_cache(self, batch: int) -> Any:
        return self.model.new_cache(batch)

    def next_logits(self, tokens: Ids, cache: Any) -> Floats:
        self.calls.append((int(getattr(cache, "kv", cache).length), tokens.tolist()))
        self.logits.append(self.model.next_logits(tokens, cache))
        return self.logits[-1]


class RepeatedPrefill(LanguageModel):
    """A language model that processes a prompt of one row `rows` times, as one batch."""

    def __init__(self, model: LanguageModel, rows: int) -> None:
        self.model, self.rows = model, rows

    def new_cache(self, batch: int) -> Any:  # noqa: ARG002
        return self.model.new_cache(self.rows)

    def next_logits(self, tokens: Ids, cache: Any) -> Floats:
        return self.model.next_logits(np.tile(tokens, (self.rows // len(tokens), 1)), cache)


def confident_model(**network: Any) -> GPT:
    """Return a model whose predictions are so far from uniform that a wrong context changes the samples."""
    return random_model(std=0.5, **network)


def sample(
    model: GPT | LanguageModel,
    prompt: list[int],
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    seed: int = 0,
    use_cache: bool = True,
    greedy: bool = False,
) -> list[list[int]]:
    """Return the new tokens of each sample."""
    steps = generate(
        decoder_of(model) if isinstance(model, GPT) else model,
        np.array(prompt),
        block_size=8,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        params=SamplingParams(temperature=0 if greedy else 1),
        seed=seed,
        use_cache=use_cache,
    )
    return np.array(list(steps), np.int64).T.tolist()


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("length", [3, 8, 20])
@pytest.mark.parametrize("network", [{}, {"position": "sinusoidal"}, {"position": "rotary"}, MODERN], ids=str)
def test_samples_do_not_depend_on_the_cache_or_the_library(
    network: dict[str, Any], length: int, num_samples: int
) -> None:
    model = confident_model(**network)
    prompt = torch.randint(11, (length,)).tolist()
    samples = sample(model, prompt, 24, num_samples=num_samples)
    assert samples == sample(model, prompt, 24, num_samples=num_samples, use_cache=False)
    torch_model = TorchLM(model, CPU)
    assert samples == sample(torch_model, prompt, 24, num_samples=num_samples)
    assert samples == sample(torch_model, prompt, 24, num_samples=num_samples, use_cache=False)
    assert [len(tokens) for tokens in samples] == [24] * num_samples
    assert len(set(map(tuple, samples))) == num_samples


@pytest.mark.parametrize("network", [{}, MODERN], ids=["gpt2", "modern"])
def test_converted_weights_give_the_logits_of_autocast(network: dict[str, Any]) -> None:
    model = confident_model(**network)
    lm, tokens = TorchLM(model, Runtime(torch.device("cpu"), torch.bfloat16)), np.array([[1, 2, 3], [4, 5, 6]])
    before = lm.logits(tokens)
    cast_weights(model, torch.bfloat16)
    assert {name for name, weight in model.named_parameters() if weight.dtype == torch.bfloat16} > {"head.weight"}
    np.testing.assert_array_equal(lm.logits(tokens), before)


def test_tokens_follow_from_their_context() -> None:
    model = confident_model()
    text = [1, 2, 3]
    (tokens,) = sample(model, text, 24, greedy=True)
    for token in tokens:
        context = torch.tensor([text[context_start(len(text), 8) :]])
        assert token == model(context)[0, -1].argmax().item()
        text.append(token)


def test_cache_is_used_until_the_context_moves() -> None:
    model = RecordingModel(decoder_of(tiny_model()))
    sample(model, [1, 2, 3], 15)
    lengths = [(cached, len(tokens[0])) for cached, tokens in model.calls]
    assert lengths[:6] == [(0, 3), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1)]
    assert lengths[6:11] == [(0, 5), (5, 1), (6, 1), (7, 1), (0, 5)]


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompt_is_processed_once_for_all_samples(use_cache: bool) -> None:
    model = RecordingModel(decoder_of(tiny_model()))
    samples = sample(model, [1, 2, 3], 9, num_samples=4, use_cache=use_cache)
    first, *later = model.calls
    assert first == (0, [[1, 2, 3]])
    assert all(len(tokens) == 4 for _, tokens in later)
    assert later[0] == ((3, [row[:1] for row in samples]) if use_cache else (0, [[1, 2, 3, row[0]] for row in samples]))


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("network", [{}, MODERN], ids=["gpt2", "modern"])
def test_prefill_of_one_row_equals_prefill_of_every_row(network: dict[str, Any], library: str) -> None:
    gpt = confident_model(**network)
    model: LanguageModel = decoder_of(gpt) if library == "numpy" else TorchLM(gpt, CPU)
    one, every = RecordingModel(model), RecordingModel(RepeatedPrefill(model, rows=5))
    prompt = [1, 2, 3]
    assert sample(one, prompt, 20, num_samples=5) == sample(every, prompt, 20, num_samples=5)
    assert [len(logits) for logits in one.logits] == [1] + [5] * 19
    for logits, expected in zip(one.logits, every.logits, strict=True):
        np.testing.assert_allclose(np.broadcast_to(logits, expected.shape), expected, atol=3e-5)


def test_seed_determines_the_samples() -> None:
    model = confident_model()
    assert sample(model, [1], 20, seed=5) == sample(model, [1], 20, seed=5)
    assert sample(model, [1], 20, seed=5) != sample(model, [1], 20, seed=6)


def test_zero_new_tokens() -> None:
    assert sample(tiny_model(), [1], 0) == []


@given(st.integers(1, 70), st.integers(1, 300))
@settings(deadline=None, max_examples=200)
@example(1, 1)
@example(1, 2)
@example(2, 3)
def test_context_fits_block_size_keeps_half_and_never_moves_back(block_size: int, length: int) -> None:
    start, next_start = context_start(length, block_size), context_start(length + 1, block_size)
    assert 0 <= start <= next_start
    assert 1 <= length - start <= block_size
    assert length - start >= min(length, block_size / 2)
    assert start == 0 or length > block_size


def test_context_moves_once_per_half_block() -> None:
    starts = [context_start(length, 64) for length in range(1, 1000)]
    assert sum(a != b for a, b in pairwise(starts)) == math.ceil((999 - 64) / 32)


LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=12)


def plain_probs(logits: list[float], params: SamplingParams) -> list[float]:
    """Return the normalized probabilities, computed in plain Python."""
    weights = [math.exp(logit / params.temperature) for logit in logits]
    if params.top_k:
        kth = sorted(weights, reverse=True)[: params.top_k][-1]
        weights = [weight if weight >= kth else 0 for weight in weights]
    weights = [weight / sum(weights) for weight in weights]
    if params.top_p < 1:
        total, kept = 0.0, [0.0] * len(weights)
        for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
            assume(abs(total - params.top_p) > 1e-5)  # otherwise rounding decides
            if total < params.top_p:
                kept[i] = weights[i]
            total += weights[i]
        weights = kept
    if params.min_p:
        bound = params.min_p * max(weights)
        assume(all(weight == 0 or weight == max(weights) or abs(weight / bound - 1) > 1e-5 for weight in weights))
        weights = [weight if weight >= bound else 0 for weight in weights]
    return [weight / sum(weights) for weight in weights]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0, 50.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 12, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 0.1, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.1, 0.7, 1.0]),
)


@given(LOGITS, PARAMS)
@settings(deadline=None, max_examples=300)
@example([0.0, 0.0, 0.0, -1.0], SamplingParams(top_k=2))  # a tie for the last place
@example([1.0, 0.0, 0.0, -1.0], SamplingParams(top_p=0.5))
@example([1.0, 1.0, 0.0], SamplingParams(min_p=1.0))
def test_probs_equal_those_of_plain_python(logits: list[float], params: SamplingParams) -> None:
    expected = plain_probs(logits, params)
    probs = params.probs(np.array([logits, logits[::-1]]))[0]
    probs /= probs.sum()
    # of equally probable tokens, top_p may keep any
    assert sorted(probs.tolist()) == pytest.approx(sorted(expected), abs=1e-5)
    if len(set(logits)) == len(logits):
        assert probs.tolist() == pytest.approx(expected, abs=1e-5)


def uniform(count: int, seed: int = 0) -> Floats:
    """Return random numbers above 0, and at most 1."""
    return 1 - np.random.default_rng(seed).random(count)


def sample_by(library: str, logits: Floats, numbers: Floats, params: SamplingParams) -> list[int]:
    """Return the tokens that NumPy or torch samples."""
    if library == "numpy":
        return list(params.sample(logits, numbers))
    return draw(torch.from_numpy(logits), torch.from_numpy(numbers), params).tolist()


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=12, unique=True), PARAMS, st.integers(0, 1000))
@settings(deadline=None, max_examples=200)
def test_torch_samples_the_tokens_of_numpy(logits: list[float], params: SamplingParams, seed: int) -> None:
    rows = np.array([logits, logits[::-1]] * 20)
    assert sample_by("torch", rows, uniform(40, seed), params) == sample_by("numpy", rows, uniform(40, seed), params)


@given(LOGITS, PARAMS, st.integers(0, 1000))
@settings(deadline=None, max_examples=100)
def test_some_token_always_remains(logits: list[float], params: SamplingParams, seed: int) -> None:
    rows = np.array([logits] * 3) * 20
    probs = params.probs(rows)
    assert np.isfinite(probs).all()
    tokens = params.sample(rows, uniform(3, seed))
    assert tokens.shape == (3,)
    assert (probs[[0, 1, 2], tokens] > 0).all()


@pytest.mark.parametrize("number", [2.0**-53, 0.5, 1.0])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_tokens_of_probability_0_are_never_sampled(library: str, number: float) -> None:
    rows = np.array([[-np.inf, -80.0, 0.0, -80.0, -np.inf]])
    assert sample_by(library, rows, np.array([number]), SamplingParams()) == [2]


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 1e-300])
def test_temperature_near_0_samples_the_most_probable_token(temperature: float) -> None:
    rows = np.array([[1.0, 50.0, -30.0], [-1.0, -2.0, -3.0]])
    tokens = SamplingParams(temperature=temperature).sample(rows, uniform(2))
    assert tokens.tolist() == [1, 0]


def test_temperature_0_samples_the_most_probable_token() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 9))
    tokens = SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.5).sample(rows, uniform(50))
    assert tokens.tolist() == [row.index(max(row)) for row in rows.tolist()]


@pytest.mark.parametrize(
    ("params", "probs"),
    [
        (SamplingParams(), [0.1, 0.2, 0.3, 0.4]),
        (SamplingParams(temperature=0.5), [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        (SamplingParams(top_k=2), [0, 0, 3 / 7, 4 / 7]),
        (SamplingParams(top_p=0.75), [0, 2 / 9, 3 / 9, 4 / 9]),
        (SamplingParams(min_p=0.6), [0, 0, 3 / 7, 4 / 7]),
        (SamplingParams(top_k=3, top_p=0.7, min_p=0.8), [0, 0, 0, 1]),
    ],
)
def test_samples_have_the_expected_frequencies(params: SamplingParams, probs: list[float]) -> None:
    count = 40_000
    rows = np.tile(np.log([0.1, 0.2, 0.3, 0.4]), (count, 1))
    tokens = params.sample(rows, uniform(count))
    counts = np.bincount(tokens, minlength=4).tolist()
    expected = [count * prob for prob in probs]
    assert all(n == 0 for n, e in zip(counts, expected, strict=True) if e == 0)
    chi_square = sum((n - e) ** 2 / e for n, e in zip(counts, expected, strict=True) if e)
    assert chi_square < 16.3  # exceeded by one seed in a thousand, with 3 degrees of freedom


def stream_bytes(text: str, stops: list[str]) -> tuple[TextStream, list[str]]:
    """Feed a text byte by byte; return the stream and the text that each call returned."""
    stream = TextStream(ByteTokenizer(), stops)
    pieces = [stream.feed(byte) for byte in text.encode()]
    return stream, [*pieces, stream.end()]


def text_before_stop(text: str, stops: list[str]) -> str:
    """Return the text before the stop that is complete first, or the longest of several that end together."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


SOME_TEXT = st.text("ab", max_size=14)


@given(SOME_TEXT, st.lists(st.text("ab", max_size=5), max_size=4))
@settings(deadline=None, max_examples=500)
@example("aab", ["ab"])
@example("xabc", ["abc", "b"])
@example("ababac", ["abac"])
@example("aaab", ["aab", "ab"])
def test_text_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    stream, pieces = stream_bytes(text, stops)
    assert "".join(pieces) == stream.text == text_before_stop(text, stops)
    assert stream.finished
    assert stream.feed(97) == stream.end() == ""
    assert stream.text == text_before_stop(text, stops)


@given(st.text(max_size=20), st.lists(st.text(max_size=3), max_size=3))
@settings(deadline=None, max_examples=100)
def test_any_text_can_be_streamed(text: str, stops: list[str]) -> None:
    stream, pieces = stream_bytes(text, stops)
    assert "".join(pieces) == stream.text == text_before_stop(text, stops)


def test_stop_ends_the_text_with_its_last_character() -> None:
    stream = TextStream(CharTokenizer("\nABC"), ["\nA", ""])
    assert [stream.feed(token) for token in (1, 2, 0)] == ["A", "B", ""]
    assert not stream.finished
    assert [stream.feed(token) for token in (0, 2)] == ["\n", "\nB"]
    assert [stream.feed(token) for token in (0, 1)] == ["", ""]
    assert stream.finished
    assert stream.text == "AB\n\nB"


def test_without_stops_nothing_is_pending() -> None:
    stream = TextStream(ByteTokenizer())
    assert [stream.feed(byte) for byte in b"to be"] == list("to be")
    assert stream.end() == ""


def test_characters_are_returned_once_complete() -> None:
    _, pieces = stream_bytes("é🙂", [])
    assert pieces == ["", "é", "", "", "", "🙂", ""]


def test_partial_character_becomes_a_replacement_character_at_the_end() -> None:
    stream = TextStream(ByteTokenizer(), ["b"])
    assert [stream.feed(byte) for byte in (97, 0xF0, 0x9F)] == ["a", "", ""]
    assert stream.end() == "\ufffd"
    assert stream.text == "a\ufffd"


def test_stop_may_be_completed_by_the_end() -> None:
    stream = TextStream(ByteTokenizer(), ["\ufffd"])
    assert [stream.feed(byte) for byte in (97, 0xF0)] == ["a", ""]
    assert stream.end() == ""
    assert stream.text == "a"
