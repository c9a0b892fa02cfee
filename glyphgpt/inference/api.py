"""The Python API: a trained model that continues, predicts and scores text. `load` returns one.

sample.py prints what these functions return.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import numpy as np

from glyphgpt.checkpoint import Checkpoint
from glyphgpt.cli import resolve
from glyphgpt.data.dataset import Split
from glyphgpt.data.tokenizers import END_OF_TEXT, StreamDecoder, Tokenizer, Tokens, encode_prompt, token_text
from glyphgpt.errors import UserError
from glyphgpt.inference.generate import (
    Floats,
    LanguageModel,
    SamplingParams,
    TextStream,
    context_start,
    generate,
    log_softmax,
)
from glyphgpt.inference.loading import language_model, open_checkpoint
from glyphgpt.inference.score import Score, encode_split, make_score, token_losses
from glyphgpt.settings import SampleSettings

if TYPE_CHECKING:
    from glyphgpt.inference.numpy_gpt import NumpyGPT
    from glyphgpt.inference.torch_lm import TorchLM


class Sampling(TypedDict, total=False):
    """How text is generated: the settings of sample.py with these names, which explain them and hold their defaults."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop: str | Sequence[str]
    seed: int
    skip_unknown: bool


@dataclass(frozen=True)
class TextScore(Score):
    """A model's loss on a text, in three units, and its surprise at each part of the text."""

    surprise: list[tuple[str, float]]
    """The text in parts, one for each token or, where tokens are parts of characters, for each character, with the
    bits of each: -log2 of its probability. The first token, which nothing precedes, has 0."""


class Model:
    """A trained model, ready to write and to read."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, model: "NumpyGPT | TorchLM") -> None:
        """Combine the parts; `load` loads them from a file."""
        self.checkpoint, self.tokenizer, self.model = checkpoint, tokenizer, model
        self.block_size = checkpoint.config.block_size
        self.has_records = tokenizer.separator is not None
        """Whether the model was trained on records: each text that it writes is one."""
        self.resources = ExitStack()  # open as long as the model lives

    def generate(self, prompt: str = "", **sampling: Unpack[Sampling]) -> str:
        """Return a continuation of the prompt, without the prompt.

        Raises:
            UserError: The prompt has characters that the model does not know, or a value is not valid.
        """
        return "".join(self.stream(prompt, **sampling))

    def stream(self, prompt: str = "", **sampling: Unpack[Sampling]) -> Iterator[str]:
        """Yield the parts of a continuation of the prompt while it is generated; see `generate`."""
        stop = sampling.get("stop", ())
        values = {**sampling, "stop": (stop,) if isinstance(stop, str) else tuple(stop)}
        settings = resolve(SampleSettings, [("sampling", values)])
        return (text for (text,) in self.samples(prompt, settings) if text)

    def samples(self, prompt: str, settings: SampleSettings) -> Iterator[list[str]]:
        """Yield what has been added to each of num_samples continuations of the prompt, after each token.

        Raises:
            UserError: The prompt has characters that the model does not know.
        """
        streams = [TextStream(self.tokenizer, settings.stop) for _ in range(settings.num_samples)]
        params = SamplingParams(settings.temperature, settings.top_k, settings.top_p, settings.min_p)
        for tokens in generate(
            self.model, encode_prompt(prompt, self.tokenizer, skip=settings.skip_unknown), block_size=self.block_size,
            num_samples=settings.num_samples, max_new_tokens=settings.max_new_tokens, params=params,
            seed=settings.seed, use_cache=settings.cache,
        ):  # fmt: skip
            yield [stream.feed(int(token)) for stream, token in zip(streams, tokens, strict=True)]
            if all(stream.finished for stream in streams):
                break
        yield [stream.end() for stream in streams]

    def probabilities(self, text: str = "", *, skip_unknown: bool = False) -> dict[str, float]:
        r"""Return the probability of each token to follow the text, the most probable first.

        Bytes that are not a whole character are escaped, as in \xc3. The end of a record is "<|endoftext|>".

        Raises:
            UserError: The text has characters that the model does not know.
        """
        tokens = encode_prompt(text, self.tokenizer, skip=skip_unknown)
        context = tokens[None, context_start(len(tokens), self.block_size) :]
        model: LanguageModel = self.model
        probs = np.exp(log_softmax(model.next_logits(context, model.new_cache(1)))[0])
        return {self.token_name(int(i)): float(probs[i]) for i in np.argsort(-probs)}

    def token_name(self, token: int) -> str:
        """Return the text of a token."""
        is_end = token == self.tokenizer.end_of_text
        return END_OF_TEXT if is_end else token_text(self.tokenizer.token_bytes(token))

    def score(self, text: str, *, skip_unknown: bool = False) -> TextScore:
        """Return how well the model predicts a text, or the records of a text if it was trained on records.

        Raises:
            UserError: The text has characters that the model does not know, or less than two tokens.
        """
        split, _ = encode_split([[text]], self.tokenizer, skip=skip_unknown)
        parts = split_tokens(split.slice(0, split.tokens), self.tokenizer)
        losses = np.concatenate(([0.0], *self.token_losses(split)))
        ends = np.cumsum([count for _, count in parts]) - 1
        bits = np.diff(losses.cumsum()[ends] / np.log(2), prepend=0.0)
        surprise = [(part, float(b)) for (part, _), b in zip(parts, bits, strict=True)]
        score = make_score(float(losses.sum()) / (len(losses) - 1), len(losses) - 1, split)
        return TextScore(**vars(score), surprise=surprise)

    def score_split(self, split: Split) -> Score:
        """Return how well the model predicts a text that has been encoded.

        Raises:
            UserError: It has less than two tokens.
        """
        total = sum(float(losses.sum()) for losses in self.token_losses(split))
        return make_score(total / (split.tokens - 1), split.tokens - 1, split)

    def token_losses(self, split: Split) -> Iterator[Floats]:
        """Yield the losses of all tokens but the first, in nats.

        Raises:
            UserError: There are less than two tokens.
        """
        if split.tokens < 2:
            raise UserError(f"{split.tokens} tokens; a score needs at least 2")
        return token_losses(self.model, split, block_size=self.block_size, vocab_size=self.checkpoint.config.vocab_size)


def split_tokens(tokens: Tokens, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """Return the text of tokens (N,) in the smallest parts that are whole characters, and how many tokens each has."""
    decoder, parts, count = StreamDecoder(tokenizer), [], 0
    for token in tokens:
        count += 1
        if text := decoder.feed(int(token)):
            parts.append((text, count))
            count = 0
    if rest := decoder.end():
        parts.append((rest, count))
    return parts


@contextmanager
def open_model(
    path: Path | str, *, device: str, dtype: str, data_dir: Path | str, remedy: str, tokens: int | None = None
) -> Iterator[Model]:
    """Yield the model of a run or checkpoint.

    Args:
        path, device, dtype, data_dir: As for `load`.
        remedy: What to lower when memory runs out.
        tokens: How many tokens to generate, if that is known, for the choice of the device.

    Raises:
        UserError: There is no checkpoint, it is damaged, or memory ran out.
    """
    checkpoint, tokenizer = open_checkpoint(Path(path), Path(data_dir))
    with language_model(checkpoint, device, dtype, remedy, tokens) as model:
        yield Model(checkpoint, tokenizer, model)


def load(path: Path | str, *, device: str = "cpu", dtype: str = "auto", data_dir: Path | str = "data") -> Model:
    """Load a trained model. On a CPU this does not import torch.

    Args:
        path: A run's folder, whose best model is loaded, or a checkpoint file.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto" for a CUDA GPU if there is one and otherwise the CPU.
        dtype: Precision of matrix products on a GPU; a CPU computes in float32.
        data_dir: Folder for GPT-2's vocabulary, for models that use it.

    Raises:
        UserError: There is no checkpoint, it is damaged, or there is no such device.
    """
    resources = ExitStack()
    model = resources.enter_context(
        open_model(path, device=device, dtype=dtype, data_dir=data_dir, remedy="max_new_tokens")
    )
    model.resources = resources
    return model
