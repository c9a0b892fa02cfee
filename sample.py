"""Generate text from a trained model, score a text under it, or show its attention.

    python sample.py out/quick                                    the run's best model
    python sample.py out/quick --prompt="ROMEO:" --num_samples=3
    python sample.py best.safetensors --interactive               any checkpoint file; ask for prompts
    python sample.py out/quick --score=my.txt                     or --score=shakespeare_char, a prepared dataset
    python sample.py out/quick --attention="To be, or not" --out=attention.html

A checkpoint contains its vocabulary (except GPT-2's, which is downloaded once), so one file is enough. The context
grows to the model's block_size tokens. Then its older half is dropped, and it grows again.
"""

import glyphgpt.startup  # first: handles --help and usage errors before the other imports

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from glyphgpt.checkpoint import Checkpoint
from glyphgpt.data.dataset import META, Split, find_dataset, load_dataset
from glyphgpt.data.text import read_text
from glyphgpt.data.tokenizers import Tokenizer, Tokens, encode_text, start_token
from glyphgpt.errors import UsageError, UserError, warn
from glyphgpt.files import write_atomic
from glyphgpt.inference.generate import LanguageModel, SamplingParams, TextStream, generate
from glyphgpt.inference.loading import language_model, open_checkpoint, torch_model
from glyphgpt.reports.model_page import write_model_page
from glyphgpt.settings import SampleSettings


def main(settings: SampleSettings, *words: str) -> None:
    """Load a checkpoint, then sample, score a text, or write attention weights, as the settings ask.

    Raises:
        UsageError: The command line does not name exactly one run or checkpoint.
    """
    if len(words) != 1:
        raise UsageError(f"name one run or checkpoint: {glyphgpt.startup.USAGE['sample.py']}")
    checkpoint, tokenizer = open_checkpoint(Path(words[0]), Path(settings.data_dir))
    if settings.score:
        print_score(checkpoint, tokenizer, settings)
        return
    if settings.attention:
        write_attention(checkpoint, tokenizer, settings)
        return
    with language_model(checkpoint, settings.device, settings.dtype, "num_samples") as model:
        sampler = Sampler(model, checkpoint.config.block_size, tokenizer, settings)
        if settings.interactive:
            sampler.interact()
        else:
            sampler.print_samples()


def print_score(checkpoint: Checkpoint, tokenizer: Tokenizer, settings: SampleSettings) -> None:
    """Print the model's loss on a text, or on a dataset's validation split."""
    from glyphgpt.data.batches import Windows  # noqa: PLC0415  (imports torch)
    from glyphgpt.training.evaluation import evaluate  # noqa: PLC0415

    split, description = load_split(tokenizer, settings)
    remedy = "the load of the GPU, or use --device=cpu"
    with torch_model(checkpoint, settings.device, settings.dtype, remedy) as (model, runtime):
        windows = Windows(split, runtime.device)
        score = evaluate(model, windows, runtime, block_size=checkpoint.config.block_size, batch_size=16)
    print(f"{description}, {score}")


def load_split(tokenizer: Tokenizer, settings: SampleSettings) -> tuple[Split, str]:
    """Return the tokens to score, and a description of them.

    Raises:
        UserError: There are too few tokens, or the vocabularies differ.
    """
    data_dir = Path(settings.data_dir)
    folder = Path(settings.score) if Path(settings.score).exists() else find_dataset(settings.score, data_dir)
    if (folder / META).is_file():
        dataset = load_dataset(folder, data_dir)
        if dataset.meta.tokenizer != tokenizer.to_dict():
            raise UserError(f"{folder}: its vocabulary differs from the model's; score its text: --score=FILE")
        return dataset.val, f"{folder}: validation split: {dataset.val.tokens:,} tokens"
    text = read_text(settings.score)
    tokens = encode_text(text, tokenizer, skip=settings.skip_unknown)
    if len(tokens) < 2:
        raise UserError(f"{settings.score}: {len(tokens)} tokens; a score needs at least 2")
    known = len(text) - sum(text.count(character) for character in tokenizer.unknown_characters(text))
    skipped = f" ({len(text) - known:,} unknown characters skipped)" if known < len(text) else ""
    return Split((tokens,), known), f"{settings.score}: {len(tokens):,} tokens{skipped}"


def write_attention(checkpoint: Checkpoint, tokenizer: Tokenizer, settings: SampleSettings) -> None:
    """Write the attention weights of a text: the model's page with this text, or a figure.

    Raises:
        UserError: The text is empty or too long, or the file could not be written.
    """
    tokens, path = encode_text(settings.attention, tokenizer, skip=settings.skip_unknown), Path(settings.out)
    if path.name.lower().endswith(".html"):
        title = checkpoint.path.absolute().parent.name
        write_model_page(path, checkpoint, tokenizer, title=title, text=settings.attention, view="attention")
    else:
        write_atomic(path, attention_figure(checkpoint, tokenizer, tokens))
    print(f"{path}: written")


def attention_figure(checkpoint: Checkpoint, tokenizer: Tokenizer, tokens: Tokens) -> bytes:
    """Return a PNG of the attention weights of tokens (T,).

    Raises:
        UserError: There are no tokens, or too many.
    """
    with torch_model(checkpoint, "cpu", "float32", "the length of the text") as (model, _):
        from glyphgpt.reports import attention_maps  # noqa: PLC0415  (imports torch)

        if not 1 <= len(tokens) <= checkpoint.config.block_size:
            length = f"{len(tokens):,} {attention_maps.UNITS[tokenizer.kind]}s"
            raise UserError(f"the text has {length}; this model's context is 1 to {checkpoint.config.block_size:,}")
        return attention_maps.render_png(attention_maps.compute_maps(model, tokenizer, tokens))


class Sampler:
    """A model, its tokenizer, and the settings of sampling."""

    def __init__(self, model: LanguageModel, block_size: int, tokenizer: Tokenizer, settings: SampleSettings) -> None:
        """Prepare to sample."""
        self.model, self.block_size, self.tokenizer, self.settings = model, block_size, tokenizer, settings
        self.params = SamplingParams(settings.temperature, settings.top_k, settings.top_p, settings.min_p)
        self.stops = list(map(unescape, settings.stop))
        for stop in self.stops:
            if unknown := tokenizer.unknown_characters(stop):
                warn(f"stop = {stop!r} cannot occur: {unknown[0]!r} is not in the model's vocabulary")

    def print_samples(self) -> None:
        """Print samples: the first one while it is generated, then the others."""
        prompt = self.prompt()
        tokens = self.encode(prompt)
        if not tokens.size:
            tokens = np.array([start_token(self.tokenizer)])
        streams = [TextStream(self.tokenizer, self.stops) for _ in range(self.settings.num_samples)]
        print(prompt, end="", flush=True)
        for new_tokens in self.generate(tokens, self.settings.seed):
            for number, (stream, token) in enumerate(zip(streams, new_tokens, strict=True)):
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
        """Ask for text in a loop, and continue the whole conversation each time."""
        print("Type a text to continue; Ctrl-C stops a reply, Ctrl-D ends.", file=sys.stderr)
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
            except UserError as error:
                warn(str(error))
                continue
            history = np.concatenate([history, self.reply(history, self.settings.seed + turn)])

    def reply(self, history: Tokens, seed: int) -> Tokens:
        """Print one sample that continues the history, and return its tokens."""
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
        """Yield lists with the next token of every sample."""
        tokens = generate(
            self.model,
            prompt.astype(np.int64),
            block_size=self.block_size,
            num_samples=self.settings.num_samples,
            max_new_tokens=self.settings.max_new_tokens,
            params=self.params,
            seed=seed,
            use_cache=self.settings.cache,
        )
        return (new_tokens.tolist() for new_tokens in tokens)

    def encode(self, text: str) -> Tokens:
        """Return the tokens of a text, without unknown characters if the settings say so."""
        return encode_text(text, self.tokenizer, skip=self.settings.skip_unknown)

    def prompt(self) -> str:
        """Return the prompt of the settings, from the file if they name one."""
        if self.settings.prompt_file:
            return read_text(self.settings.prompt_file)
        return self.settings.prompt


def unescape(text: str) -> str:
    r"""Replace the escapes \n, \r, \t and \\, which shells do not interpret.

    >>> unescape(r"one\ntwo\\three")
    'one\ntwo\\three'
    """
    return re.sub(r"\\([\\nrt])", lambda escape: {"n": "\n", "r": "\r", "t": "\t"}.get(escape[1], "\\"), text)


if __name__ == "__main__":
    glyphgpt.startup.run("sample.py", main, broken_pipe_status=0)  # `| head` is not an error
