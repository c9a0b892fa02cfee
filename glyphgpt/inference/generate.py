"""Decoding: from logits to tokens to text, with a key/value cache, sampling rules and stops."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glyphgpt.data.tokenizers import StreamDecoder, Tokenizer

Ids = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]


class LanguageModel(Protocol):
    """What decoding needs of a model."""

    def new_cache(self, batch: int) -> Any:
        """Return an empty cache for so many samples."""
        ...

    def next_logits(self, tokens: Ids, cache: Any) -> Floats:
        """Return the logits (B, V) of the token after these (B, T), and after those that the cache has seen."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn: each rule narrows the choice that the ones before it left."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 allows all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability (Holtzman et al. 2019)."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest (Nguyen et al. 2024)."""

    def probs(self, logits: Floats) -> Floats:
        """Turn logits (B, V) into what the probabilities are in proportion to, (B, V); the temperature is above 0."""
        logits = logits.astype(np.float64)
        probs = np.exp((logits - logits.max(-1, keepdims=True)) / self.temperature)  # nothing overflows
        if 0 < self.top_k < logits.shape[-1]:
            least = np.partition(probs, -self.top_k, axis=-1)[:, -self.top_k, None]  # (B, 1)
            probs = np.where(probs < least, 0, probs)
        if self.top_p < 1:
            probs /= probs.sum(-1, keepdims=True)
            order = np.argsort(-probs, axis=-1, kind="stable")
            ordered = np.take_along_axis(probs, order, axis=-1)
            reached = ordered.cumsum(-1) - ordered >= self.top_p  # before this token
            np.put_along_axis(probs, order, np.where(reached, 0, ordered), axis=-1)
        if self.min_p > 0:
            probs[probs < self.min_p * probs.max(-1, keepdims=True)] = 0
        return probs

    def sample(self, logits: Floats, random: np.random.Generator) -> Ids:
        """Draw a token for each row of logits (B, V); shape (B,).

        The tokens run a race: each takes an exponential time, at a speed in proportion to its chance, and the first
        wins (Maddison et al. 2014, the Gumbel-max trick, in another form).
        """
        if self.temperature < 1e-6:  # the limit, long before numbers overflow
            return logits.argmax(-1)
        times = random.standard_exponential(logits.shape) + 1e-300  # above 0, that who has no chance does not win
        return (self.probs(logits) / times).argmax(-1)


def context_start(length: int, block_size: int) -> int:
    """Return where the context of the next token starts in a text of `length` tokens.

    It grows to block_size tokens; when one more is needed, its older half is let go of, and it grows again.
    Being a function of the length alone, the rule is the same with and without a cache, which lives as long
    as the start stays.
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
    rule: SamplingParams,
    seed: int,
    use_cache: bool = True,
) -> Iterator[Ids]:
    """Go on from a prompt (T,), T at least 1, and yield the next token of every sample, (num_samples,), in turn.

    The same seed gives the same tokens with and without cache, up to rounding.
    """
    random = np.random.default_rng(seed)
    length, start = len(prompt), context_start(len(prompt), block_size)
    context = [np.full(num_samples, token) for token in prompt[start:]]  # (B,) each
    cache, unseen = model.new_cache(num_samples), np.stack(context, axis=1)  # (B, T)
    for _ in range(max_new_tokens):
        token = rule.sample(model.next_logits(unseen, cache), random)  # (B,)
        yield token
        length += 1
        before, start = start, context_start(length, block_size)
        context = [*context[start - before :], token]
        if use_cache and start == before:
            unseen = token[:, None]
        else:
            cache, unseen = model.new_cache(num_samples), np.stack(context, axis=1)


class TextStream:
    """One sample's text as it grows, ended before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        """Begin an empty text."""
        self._decoder = StreamDecoder(tokenizer)
        self._stops = [stop for stop in stops if stop]
        self._held = ""  # may turn out to be the beginning of a stop
        self.text = ""
        self.finished = False

    def feed(self, token: int) -> str:
        """Take a token, and return the text that is certain now."""
        return "".join(map(self._take, self._decoder.feed(token)))

    def end(self) -> str:
        """Return what was still held back."""
        sure = "".join(map(self._take, self._decoder.end()))
        rest, self._held = self._held, ""
        self.text += rest
        self.finished = True
        return sure + rest

    def _take(self, character: str) -> str:
        """Take one character, so that the same text ends at the same place however its tokens cut it."""
        if self.finished:
            return ""
        self._held += character
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            sure, self._held, self.finished = self._held[: min(places)], "", True
        else:
            keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
            sure, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += sure
        return sure


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that begins a stop string.

    >>> overlap("to be or", "organ")
    2
    """
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
