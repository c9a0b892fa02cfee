"""Decoding: from logits to tokens to text, with a key/value cache, sampling rules and stops."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from glyphgpt.tokenizer import StreamDecoder, Tokenizer


class LanguageModel(Protocol):
    """What decoding needs of a model."""

    def new_cache(self) -> Any:
        """Return an empty cache."""
        ...

    def next_logits(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """Return the logits (B, V) of the token after these (B, T), and after those that the cache has seen."""
        ...


@dataclass(frozen=True)
class SamplingRule:
    """How a token is drawn: each rule narrows the choice that the ones before it left."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 allows all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability (Holtzman et al. 2019)."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest (Nguyen et al. 2024)."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits (B, V) into the probabilities to draw from, (B, V); the temperature is above 0."""
        logits = logits.float()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # so that nothing overflows
        if 0 < self.top_k < logits.size(-1):
            least = logits.topk(self.top_k).values[:, -1:]  # (B, 1)
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, place = probabilities.sort(-1, descending=True)
            reached = ordered.cumsum(-1) - ordered >= self.top_p  # before this token
            probabilities = probabilities.masked_fill(reached.scatter(-1, place, reached), 0)
        if self.min_p > 0:
            likeliest = probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < self.min_p * likeliest, 0)
        return probabilities

    def draw(self, logits: Tensor, random: torch.Generator) -> Tensor:
        """Draw a token for each row of logits (B, V); shape (B, 1)."""
        if self.temperature < 1e-6:  # the limit, long before float32 could not divide
            return logits.argmax(-1, keepdim=True)
        return torch.multinomial(self.probabilities(logits), 1, generator=random)


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


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    *,
    block_size: int,
    num_samples: int,
    max_new_tokens: int,
    rule: SamplingRule,
    seed: int,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Go on from a prompt (T,), T at least 1, and yield the next token of every sample, (num_samples,), in turn.

    The model is in evaluation mode. In float32, the same seed gives the same tokens with and without cache.
    """
    random = torch.Generator(prompt.device).manual_seed(seed)
    length, start = len(prompt), context_start(len(prompt), block_size)
    context = prompt[start:].repeat(num_samples, 1)  # (B, T)
    cache, unseen = model.new_cache() if use_cache else None, context
    for _ in range(max_new_tokens):
        token = rule.draw(model.next_logits(unseen, cache), random)  # (B, 1)
        yield token[:, 0]
        length += 1
        before, start = start, context_start(length, block_size)
        context = torch.cat((context, token), dim=1)[:, start - before :]
        if use_cache and start == before:
            unseen = token
        else:
            cache, unseen = model.new_cache() if use_cache else None, context


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
