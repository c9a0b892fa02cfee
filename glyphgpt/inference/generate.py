"""Generation: from logits to tokens to text, with a key/value cache, sampling parameters and stop strings."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glyphgpt.data.tokenizers import StreamDecoder, Tokenizer, decode, start_token

Ids = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]


class LanguageModel(ABC):
    """A model that predicts the next token."""

    @abstractmethod
    def new_cache(self, batch: int) -> Any:
        """Return an empty cache for `batch` sequences.

        Its `reorder(rows)` selects rows of the batch, and its `clear()` forgets all tokens.
        """

    @abstractmethod
    def next_logits(self, tokens: Ids, cache: Any) -> Floats:
        """Return the logits (B, V) of the token that follows tokens (B, T), which follow the cached ones."""

    def sample(self, token: Ids, cache: Any, params: "SamplingParams", uniforms: Floats) -> Iterator[Ids]:
        """Yield the tokens that follow one token of each sequence (B,), one for each row of random numbers (N, B)."""
        for uniform in uniforms:
            token = params.sample(self.next_logits(token[:, None], cache), uniform)
            yield token


NO_TEMPERATURE = 1e-6
"""A lower temperature is taken for 0, as dividing by it could overflow."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled. top_k, top_p and min_p filter the tokens in this order."""

    temperature: float = 1.0
    """Divides the logits; 0 picks the most probable token."""
    top_k: int = 0
    """Only the k most probable tokens; 0 allows all."""
    top_p: float = 1.0
    """Only the most probable tokens whose probabilities add up to this (Holtzman et al. 2019)."""
    min_p: float = 0.0
    """Only tokens at least this fraction as probable as the most probable one (Nguyen et al. 2024)."""

    def probs(self, logits: Floats) -> Floats:
        """Map logits (B, V) to unnormalized probabilities (B, V). The temperature must be above 0."""
        logits = logits.astype(np.float64)
        probs = np.exp((logits - logits.max(-1, keepdims=True)) / self.temperature)  # the maximum prevents overflow
        if 0 < self.top_k < logits.shape[-1]:
            kth = np.partition(probs, -self.top_k, axis=-1)[:, -self.top_k, None]  # (B, 1)
            probs = np.where(probs < kth, 0, probs)
        if self.top_p < 1:
            probs /= probs.sum(-1, keepdims=True)
            order = np.argsort(-probs, axis=-1, kind="stable")
            ordered = np.take_along_axis(probs, order, axis=-1)
            reached = ordered.cumsum(-1) - ordered >= self.top_p  # by the tokens before this one
            np.put_along_axis(probs, order, np.where(reached, 0, ordered), axis=-1)
        if self.min_p > 0:
            probs[probs < self.min_p * probs.max(-1, keepdims=True)] = 0
        return probs

    def sample(self, logits: Floats, uniform: Floats) -> Ids:
        """Return a token for each row of logits (B, V) and each random number (B,), 0 < number <= 1, shape (B,).

        It is the first token up to which the probabilities add up to the number.
        """
        if self.temperature < NO_TEMPERATURE:
            return logits.argmax(-1)
        sums = self.probs(logits).cumsum(-1)  # (B, V)
        return (sums < uniform[:, None] * sums[:, -1:]).sum(-1)


def log_softmax(logits: Floats) -> Floats:
    """Map logits (..., V) to log-probabilities, in float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def context_start(length: int, block_size: int) -> int:
    """Return where the context for the next token starts in a text of `length` tokens.

    The context grows to block_size tokens. The next token drops its older half, and it grows again. The start depends
    on the length alone, so it is the same with and without a cache, which is valid as long as the start stays.
    """
    if length <= block_size:
        return 0
    hop = block_size - block_size // 2
    return -(-(length - block_size) // hop) * hop


def generate(
    model: LanguageModel,
    prompt: Ids,
    *,
    block_size: int,
    num_samples: int,
    max_new_tokens: int,
    params: SamplingParams,
    seed: int,
    use_cache: bool = True,
) -> Iterator[Ids]:
    """Continue a prompt (T,) of at least one token, and yield the next token of every sample, (num_samples,), in turn.

    The same seed gives the same tokens with and without the cache, up to rounding.
    """
    rng = np.random.default_rng(seed)
    context, start, length = np.tile(prompt, (num_samples, 1)), 0, len(prompt)  # context is (B, T)
    cache, rows = model.new_cache(1), 1  # the prompt is read once for all samples
    while max_new_tokens > 0:
        before, start = start, context_start(length, block_size)
        context = context[:, start - before :]
        logits, rows = model.next_logits(context[:rows], cache), num_samples
        if len(logits) < num_samples:
            logits = logits.repeat(num_samples, axis=0)
            cache.reorder([0] * num_samples)
        count = min(max_new_tokens, start + block_size - length + 1) if use_cache else 1  # tokens from this start
        uniforms = 1 - rng.random((count, num_samples))
        first = params.sample(logits, uniforms[0])  # (B,)
        tokens = []
        for token in chain([first], model.sample(first, cache, params, uniforms[1:])):
            tokens.append(token)
            yield token
        context = np.column_stack((context, *tokens))
        length, max_new_tokens = length + count, max_new_tokens - count
        cache.clear()


def generate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    block_size: int,
    max_new_tokens: int,
    params: SamplingParams,
    seed: int,
    use_cache: bool = True,
) -> str:
    """Return one sample without a prompt as text."""
    tokens = generate(
        model, np.array([start_token(tokenizer)]), num_samples=1,
        block_size=block_size, max_new_tokens=max_new_tokens, params=params, seed=seed, use_cache=use_cache,
    )  # fmt: skip
    return decode(tokenizer, [int(token) for (token,) in tokens])


class TextStream:
    """The text of one sample while it is generated. It ends with its record, or before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        """Start an empty text."""
        self._decoder = StreamDecoder(tokenizer)
        self._end_of_record = tokenizer.end_of_record
        self._stops = [stop for stop in stops if stop]
        self._pending = ""  # may be the start of a stop string
        self.text = ""
        self.finished = False

    def feed(self, token: int) -> str:
        """Add a token, and return the text that is final now."""
        if token == self._end_of_record:
            return self.end()
        return "".join(map(self._feed_character, self._decoder.feed(token)))

    def end(self) -> str:
        """Finish the text, and return the part that was pending."""
        final = "".join(map(self._feed_character, self._decoder.end()))
        pending, self._pending = self._pending, ""
        self.text += pending
        self.finished = True
        return final + pending

    def _feed_character(self, character: str) -> str:
        """Add one character, so that the text ends at the same place however tokens divide it."""
        if self.finished:
            return ""
        self._pending += character
        found = [position for stop in self._stops if (position := self._pending.find(stop)) >= 0]
        if found:
            final, self._pending, self.finished = self._pending[: min(found)], "", True
        else:
            certain = len(self._pending) - max((overlap(self._pending, stop) for stop in self._stops), default=0)
            final, self._pending = self._pending[:certain], self._pending[certain:]
        self.text += final
        return final


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of a text that is a proper prefix of a stop string.

    >>> overlap("to be or", "organ")
    2
    """
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
