"""Translate a file line by line with a model of lines like "German, tab, English", and score the result.

    python -m glyphgpt.inference.translate out/multi30k_de_en german.txt                       prints the translations
    python -m glyphgpt.inference.translate out/multi30k_de_en german.txt --reference=english.txt   and tells their BLEU
    python -m glyphgpt.inference.translate out/multi30k_de_en german.txt --out=mine.txt --beam=1   greedy, into a file

Any task will do whose training text is a line each: what is given, a tab, what is wanted. prepare.py multi30k_de_en
makes such a text, config/translate.toml trains on it.
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from glyphgpt.cli import parse
from glyphgpt.data.text import read_lines
from glyphgpt.data.tokenizers import Tokenizer, decode, encode_text
from glyphgpt.errors import UsageError, UserError, exit_on_error, optional_import
from glyphgpt.files import write_atomic
from glyphgpt.inference import beam_search as beam
from glyphgpt.inference.generate import Ids, LanguageModel
from glyphgpt.inference.loading import language_model, open_checkpoint
from glyphgpt.settings import TranslateSettings

MARKS = 2  # tokens around a source: the end of the line before it, and a tab
USAGE = "python -m glyphgpt.inference.translate RUN | CHECKPOINT FILE [--key=value ...]"


def main() -> None:
    """Translate the file that the command line names."""
    settings, words = parse(TranslateSettings, sys.argv[1:], USAGE, __doc__ or "", files=False)
    if len(words) != 2:
        raise UsageError(f"name a run and a file: {USAGE}")
    checkpoint, tokenizer = open_checkpoint(Path(words[0]), Path(settings.data_dir))
    sources = read_lines(words[1])
    if settings.out and not Path(settings.out).absolute().parent.is_dir():
        raise UsageError(f"--out={settings.out}: there is no such folder; make it first")
    references = read_references(settings.reference, len(sources)) if settings.reference else []
    with language_model(checkpoint, settings.device, settings.dtype, "batch_size or beam") as model:
        translator = Translator(model, tokenizer, checkpoint.config.block_size, settings)
        translations = translator.translate(sources)
    text = "".join(f"{line}\n" for line in translations)
    if settings.out:
        write_atomic(Path(settings.out), text.encode())
    else:
        sys.stdout.write(text)
    if references:
        print(bleu(translations, references), file=sys.stderr)


class Translator:
    """A model that goes on with a source and a tab, up to the end of the line."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, block_size: int, settings: TranslateSettings
    ) -> None:
        """Take the model and what belongs to it.

        Raises:
            UserError: it knows no tabs or no ends of lines.
        """
        if tokenizer.unknown_characters("\t\n"):
            raise UserError("this model has never seen a tab; train on lines of a source, a tab and its translation")
        self.model, self.tokenizer, self.block_size, self.settings = model, tokenizer, block_size, settings
        self.end = int(tokenizer.encode("\n")[0])

    def translate(self, sources: Sequence[str]) -> list[str]:
        """Translate each line; of nothing there is no translation.

        Raises:
            UserError: a line has characters that the model has never seen, or is too long for it.
        """
        prompts = [self.prompt(number, line) for number, line in enumerate(sources, start=1)]
        translations = [""] * len(sources)
        with tqdm(total=len(sources), unit="line", desc="translating", disable=None) as bar:
            for numbers in self.batches(prompts):
                if len(prompts[numbers[0]]) > MARKS:
                    found = self.go_on(np.stack([prompts[number] for number in numbers]))
                    for number, translation in zip(numbers, found, strict=True):
                        translations[number] = translation
                bar.update(len(numbers))
        return translations

    def prompt(self, number: int, line: str) -> Ids:
        """Return the tokens of a source, between the end of the line before it and a tab.

        Raises:
            UserError: it has characters that the model has never seen, or leaves no room for a translation.
        """
        try:
            source = encode_text(line, self.tokenizer, skip=self.settings.skip_unknown)
        except UserError as failure:
            raise UserError(f"line {number}: {failure}") from failure
        prompt = np.concatenate((self.tokenizer.encode("\n"), source, self.tokenizer.encode("\t"))).astype(np.int64)
        if len(prompt) >= self.block_size:
            raise UserError(
                f"line {number}: {len(source):,} tokens leave no room in the model's context of {self.block_size:,}; "
                "cut the line into several"
            )
        return prompt

    def batches(self, prompts: Sequence[Ids]) -> Iterator[list[int]]:
        """Yield numbers of prompts of one length, at most batch_size at a time."""
        in_order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        for _, group in groupby(in_order, key=lambda number: len(prompts[number])):
            numbers = list(group)
            for start in range(0, len(numbers), self.settings.batch_size):
                yield numbers[start : start + self.settings.batch_size]

    def go_on(self, prompts: Ids) -> list[str]:
        """Translate prompts (B, T), as far as the model's context reaches."""
        room = self.block_size - prompts.shape[1]
        ways = beam.beam_search(self.model, prompts, end=self.end, beam=self.settings.beam, max_new_tokens=room)
        return [decode(self.tokenizer, way.tolist()).removesuffix("\r") for way in ways]  # where lines end in \r\n


def read_references(word: str, lines: int) -> list[str]:
    """Read right translations, and see that scoring is possible.

    Raises:
        UserError: they are not as many as the lines to translate, or sacrebleu is not installed.
    """
    references = read_lines(word)
    if len(references) != lines:
        raise UserError(f"{word}: {len(references):,} lines, but there are {lines:,} to translate")
    with optional_import("sacrebleu", "scoring"):
        import sacrebleu  # noqa: F401, PLC0415  (optional)
    return references


def bleu(translations: Sequence[str], references: Sequence[str]) -> str:
    """Tell the BLEU of translations, with the signature that says how it was counted (Post 2018)."""
    from sacrebleu.metrics.bleu import BLEU  # noqa: PLC0415  (optional)

    metric = BLEU()
    score = metric.corpus_score(translations, [references])
    return f"BLEU {score.score:.1f} ({metric.get_signature()})"


if __name__ == "__main__":
    with exit_on_error():
        main()
