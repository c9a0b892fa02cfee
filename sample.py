"""Generate text from a trained model, score a text under it, or draw where it looks.

    python sample.py out/quick                                    the run's best model
    python sample.py out/quick --prompt="ROMEO:" --num_samples=3
    python sample.py best.safetensors --interactive               any checkpoint file; ask for prompts
    python sample.py out/quick --score=my.txt                     or --score=shakespeare_char, a prepared data set
    python sample.py out/quick --attention="To be, or not" --out=attention.html   where each character looks

A checkpoint carries its vocabulary (GPT-2's is fetched once), so one file is all that this needs. The context grows
to the model's block_size tokens; then its older half is let go of, and it grows again.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from glyphgpt.errors import UsageError, UserError, exit_on_error, start_script, warn

if __name__ == "__main__":  # while the rest is imported
    start_script()

import numpy as np

from glyphgpt.checkpoint import Checkpoint
from glyphgpt.cli import parse
from glyphgpt.data.dataset import META, Split, find_dataset, load_dataset
from glyphgpt.data.text import read_text
from glyphgpt.data.tokenizers import Tokenizer, Tokens, encode_text, start_token
from glyphgpt.inference.generate import LanguageModel, SamplingParams, TextStream, generate
from glyphgpt.inference.loading import language_model, open_checkpoint, torch_model
from glyphgpt.settings import SampleSettings

BROWSABLE = 10**7  # weights in a page, about 27 MB
USAGE = "python sample.py RUN | CHECKPOINT [--key=value ...]"


def main(settings: SampleSettings, place: str) -> None:
    """Load the checkpoint and do what the settings ask for."""
    checkpoint, tokenizer = open_checkpoint(place, Path(settings.data_dir))
    if settings.score:
        score(checkpoint, tokenizer, settings)
        return
    if settings.attention:
        draw_attention(checkpoint, tokenizer, settings)
        return
    with language_model(checkpoint, settings.device, settings.dtype, "num_samples") as model:
        sampler = Sampler(model, checkpoint.metadata.model["block_size"], tokenizer, settings)
        if settings.interactive:
            sampler.interact()
        else:
            sampler.show_samples()


def score(checkpoint: Checkpoint, tokenizer: Tokenizer, settings: SampleSettings) -> None:
    """Print the loss of a text, or of a data set's validation split, under the model."""
    from glyphgpt.data.batches import Windows  # noqa: PLC0415
    from glyphgpt.training.evaluation import evaluate  # noqa: PLC0415

    split, what = text_to_score(tokenizer, settings)
    with torch_model(checkpoint, settings.device, settings.dtype, "the load of the GPU, or use --device=cpu") as (
        model,
        runtime,
    ):
        windows = Windows(split, runtime.device)
        score = evaluate(model, windows, runtime, block_size=model.config.block_size, batch_size=16)
    print(f"{what}, {score}")


def text_to_score(tokenizer: Tokenizer, settings: SampleSettings) -> tuple[Split, str]:
    """Return the tokens that the settings name, and what to say of them.

    Raises:
        UserError: they are too few, or the model does not know them.
    """
    data_dir = Path(settings.data_dir)
    folder = Path(settings.score) if Path(settings.score).exists() else find_dataset(settings.score, data_dir)
    if (folder / META).is_file():
        dataset = load_dataset(folder, data_dir)
        if dataset.meta.tokenizer != tokenizer.to_dict():
            raise UserError(f"{folder}: its vocabulary is not the model's; score its text instead: --score=FILE")
        return dataset.val, f"{folder}: validation split: {dataset.val.tokens:,} tokens"
    text = read_text(settings.score)
    tokens = encode_text(text, tokenizer, skip=settings.skip_unknown)
    if len(tokens) < 2:
        raise UserError(f"{settings.score}: {len(tokens)} tokens; scoring a text needs at least 2")
    known = len(text) - sum(text.count(character) for character in tokenizer.unknown_characters(text))
    left_out = f" ({len(text) - known:,} unknown characters left out)" if known < len(text) else ""
    return Split((tokens,), known), f"{settings.score}: {len(tokens):,} tokens{left_out}"


def draw_attention(checkpoint: Checkpoint, tokenizer: Tokenizer, settings: SampleSettings) -> None:
    """Draw where each token of a text looks.

    Raises:
        UserError: the text is empty or too long, or the picture could not be drawn.
    """
    tokens, path = (
        encode_text(settings.attention, tokenizer, skip=settings.skip_unknown),
        Path(settings.out),
    )
    with torch_model(checkpoint, "cpu", "float32", "the length of the text") as (model, _):
        from glyphgpt.reports import attention_maps as attention  # noqa: PLC0415  (torch, only where it is used)

        if not 1 <= len(tokens) <= model.config.block_size:
            length = f"{len(tokens):,} {attention.UNITS[tokenizer.kind]}s"
            raise UserError(f"the text has {length}; this model sees 1 to {model.config.block_size:,} at once")
        numbers = model.config.n_layer * model.config.n_head * len(tokens) ** 2 // 2
        if numbers > BROWSABLE and path.suffix.lower() == ".html":
            warn(f"{numbers:,} weights make a page that browsers open slowly, if at all; a shorter text makes less")
        attention.write(attention.observe(model, tokenizer, tokens), path, str(checkpoint.path))
    print(f"{path}: drawn")


class Sampler:
    """A model with its tokenizer, and how to draw from it."""

    def __init__(self, model: LanguageModel, block_size: int, tokenizer: Tokenizer, settings: SampleSettings) -> None:
        """Take the model and what belongs to it."""
        self.model, self.block_size, self.tokenizer, self.settings = model, block_size, tokenizer, settings
        self.rule = SamplingParams(settings.temperature, settings.top_k, settings.top_p, settings.min_p)
        self.stops = list(map(unescape, settings.stop))
        for stop in self.stops:
            if unknown := tokenizer.unknown_characters(stop):
                warn(f"stop = {stop!r} never comes: the model has never seen {unknown[0]!r}")

    def show_samples(self) -> None:
        """Print samples: the first one as it is generated, the others after it."""
        prompt = self.prompt()
        tokens = self.encode(prompt)
        if not tokens.size:
            tokens = np.array([start_token(self.tokenizer)])
        streams = [TextStream(self.tokenizer, self.stops) for _ in range(self.settings.num_samples)]
        print(prompt, end="", flush=True)
        for drawn in self.generate(tokens, self.settings.seed):
            for number, (stream, token) in enumerate(zip(streams, drawn, strict=True)):
                text = stream.feed(token)
                if number == 0:
                    print(text, end="", flush=True)
            if all(stream.finished for stream in streams):
                break
        print(streams[0].end())
        for stream in streams[1:]:
            stream.end()
            print(f"{'-' * 20}\n{prompt}{stream.text}")

    def interact(self) -> None:
        """Ask for text and go on from all that was said before, again and again."""
        print("Type a text to go on from; Ctrl-C stops a reply, Ctrl-D ends.", file=sys.stderr)
        with suppress(ImportError, OSError):
            import readline  # noqa: F401, PLC0415  (line editing, where the system has it)
        history = np.array([start_token(self.tokenizer)])
        end_of_line = "" if self.tokenizer.unknown_characters("\n") else "\n"
        opening = self.prompt()
        for turn in range(sys.maxsize):
            try:
                line = (opening if opening else input("> ")) + end_of_line
                opening = ""
            except EOFError:
                print()
                return
            try:
                history = np.concatenate([history, self.encode(line)])
            except UserError as failure:
                warn(str(failure))
                continue
            history = np.concatenate([history, self.reply(history, self.settings.seed + turn)])

    def reply(self, history: Tokens, seed: int) -> Tokens:
        """Print one sample after the history, and return its tokens."""
        stream, tokens = TextStream(self.tokenizer, self.stops), []
        try:
            for (token,) in self.generate(history, seed):
                tokens.append(token)
                print(stream.feed(token), end="", flush=True)
                if stream.finished:
                    break
        except KeyboardInterrupt:
            pass
        print(stream.end())
        return np.array(tokens, dtype=np.int64)

    def generate(self, prompt: Tokens, seed: int) -> Iterator[list[int]]:
        """Yield the next token of every sample, in turn."""
        tokens = generate(
            self.model,
            prompt.astype(np.int64),
            block_size=self.block_size,
            num_samples=self.settings.num_samples,
            max_new_tokens=self.settings.max_new_tokens,
            rule=self.rule,
            seed=seed,
            use_cache=self.settings.cache,
        )
        return (drawn.tolist() for drawn in tokens)

    def encode(self, text: str) -> Tokens:
        """Turn text into ids, as the settings say."""
        return encode_text(text, self.tokenizer, skip=self.settings.skip_unknown)

    def prompt(self) -> str:
        """Return the prompt, from wherever the settings say."""
        if self.settings.prompt_file:
            return read_text(self.settings.prompt_file)
        return self.settings.prompt


def unescape(text: str) -> str:
    r"""Return a text with the escapes of new lines and tabs, which shells leave as they are, replaced.

    >>> unescape(r"one\ntwo\\three")
    'one\ntwo\\three'
    """
    return re.sub(r"\\([\\nrt])", lambda escape: {"n": "\n", "r": "\r", "t": "\t"}.get(escape[1], "\\"), text)


if __name__ == "__main__":
    with exit_on_error(broken_pipe_status=0):  # who has seen enough has it
        SETTINGS, WORDS = parse(SampleSettings, sys.argv[1:], USAGE, __doc__ or "", files=False)
        if len(WORDS) != 1:
            raise UsageError(f"name one run or checkpoint: {USAGE}")
        main(SETTINGS, WORDS[0])
