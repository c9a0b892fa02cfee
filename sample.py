"""Generate text from a trained model, or score a text under it.

    python sample.py out/quick                                    the run's best model
    python sample.py out/quick --prompt="ROMEO:" --num_samples=3
    python sample.py best.safetensors --interactive               any checkpoint file; ask for prompts
    python sample.py out/quick --score=my.txt

A checkpoint carries its vocabulary (GPT-2's is fetched once), so one file is all that this needs. The context grows
to the model's block_size tokens; then its older half is let go of, and it grows again.
"""

import sys

from glyphgpt.commandline import parse
from glyphgpt.errors import Failure, UsageError, plain_errors, warn
from glyphgpt.settings import SampleSettings

USAGE = "python sample.py RUN | CHECKPOINT [--key=value ...]"

if __name__ == "__main__":  # before torch, whose import takes seconds: help and mistakes answer at once
    with plain_errors():
        SETTINGS, WORDS = parse(SampleSettings, sys.argv[1:], USAGE, __doc__ or "", files=False)
        if len(WORDS) != 1:
            raise UsageError(f"name one run or checkpoint: {USAGE}")

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from glyphgpt import checkpoint as checkpoints
from glyphgpt import runtime as runtimes
from glyphgpt.batches import Windows
from glyphgpt.corpus import open_text
from glyphgpt.evaluate import evaluate
from glyphgpt.generate import SamplingRule, TextStream, generate
from glyphgpt.runtime import Runtime
from glyphgpt.shards import Split
from glyphgpt.tokenizer import Tokenizer, Tokens, first_token, from_plain
from model import GPT, GPTConfig


def main(settings: SampleSettings, place: str) -> None:
    """Load the checkpoint and do what the settings ask for."""
    checkpoint = checkpoints.load(checkpoints.find(Path(place)), with_optimizer=False)
    tokenizer = from_plain(checkpoint.info.tokenizer, Path(settings.data_dir))
    with (
        runtimes.start(settings.device, settings.dtype) as runtime,
        runtimes.memory_hint("num_samples, or use --device=cpu"),
    ):
        model = checkpoint.make_model(GPT, GPTConfig).to(runtime.device).eval()
        sampler = Sampler(model, tokenizer, settings, runtime)
        if settings.score:
            sampler.score()
        elif settings.interactive:
            sampler.interact()
        else:
            sampler.show_samples()


class Sampler:
    """A model with its tokenizer, and how to draw from it."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, settings: SampleSettings, runtime: Runtime) -> None:
        """Take the model in evaluation mode."""
        self.model, self.tokenizer, self.settings, self.runtime = model, tokenizer, settings, runtime
        self.rule = SamplingRule(settings.temperature, settings.top_k, settings.top_p, settings.min_p)

    def show_samples(self) -> None:
        """Print samples: the first one as it is generated, the others after it."""
        prompt = self.prompt()
        tokens = self.encode(prompt)
        if not tokens.size:
            tokens = np.array([first_token(self.tokenizer)])
        streams = [TextStream(self.tokenizer, self.settings.stop) for _ in range(self.settings.num_samples)]
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
        with suppress(ImportError):
            import readline  # noqa: F401, PLC0415  (line editing, where the system has it)
        history = np.array([first_token(self.tokenizer)])
        end_of_line = "" if self.tokenizer.unknown("\n") else "\n"
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
            except Failure as failure:
                warn(str(failure))
                continue
            history = np.concatenate([history, self.reply(history, self.settings.seed + turn)])

    def reply(self, history: Tokens, seed: int) -> Tokens:
        """Print one sample after the history, and return its tokens."""
        stream, tokens = TextStream(self.tokenizer, self.settings.stop), []
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

    def score(self) -> None:
        """Print the loss of a text under the model."""
        text = self.read_file(self.settings.score)
        tokens = self.encode(text)
        if len(tokens) < 2:
            raise Failure(f"{self.settings.score}: {len(tokens)} tokens; scoring a text needs at least 2")
        known = len(text) - sum(text.count(character) for character in self.tokenizer.unknown(text))
        score = evaluate(
            self.model,
            Windows(Split((tokens,), known), self.runtime.device),
            self.runtime,
            block_size=self.model.config.block_size,
            batch_size=16,
        )
        left_out = f" ({len(text) - known:,} unknown characters left out)" if known < len(text) else ""
        print(f"{self.settings.score}: {len(tokens):,} tokens{left_out}, {score}")

    def generate(self, prompt: Tokens, seed: int) -> Iterator[list[int]]:
        """Yield the next token of every sample, in turn."""
        with self.runtime.autocast():
            for drawn in generate(
                self.model,
                torch.tensor(prompt.astype(np.int64), device=self.runtime.device),
                block_size=self.model.config.block_size,
                num_samples=self.settings.num_samples,
                max_new_tokens=self.settings.max_new_tokens,
                rule=self.rule,
                seed=seed,
                use_cache=self.settings.cache,
            ):
                yield drawn.tolist()

    def encode(self, text: str) -> Tokens:
        """Turn text into ids, unknown characters left out if the settings say so.

        Raises:
            Failure: the text has characters that the model has never seen.
        """
        unknown = self.tokenizer.unknown(text)
        if unknown and self.settings.unknown == "error":
            shown = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in unknown[:10])
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            raise Failure(f"the model has never seen {shown}{more}; change the text, or add --unknown=skip")
        return self.tokenizer.encode(text.translate(dict.fromkeys(map(ord, unknown))))

    def prompt(self) -> str:
        """Return the prompt, from wherever the settings say."""
        if self.settings.prompt_file:
            return self.read_file(self.settings.prompt_file)
        return self.settings.prompt

    def read_file(self, name: str) -> str:
        """Read a whole UTF-8 file, or - for standard input."""
        with tempfile.TemporaryDirectory() as scratch:
            return "".join(open_text([name], "utf-8", Path(scratch)).read(lambda _: None))


if __name__ == "__main__":
    with plain_errors():
        main(SETTINGS, WORDS[0])
