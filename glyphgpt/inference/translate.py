"""Translate a file line by line with a model of lines like "German, tab, English", and compute the BLEU score.

    python -m glyphgpt.inference.translate out/multi30k_de_en german.txt                           prints translations
    python -m glyphgpt.inference.translate out/multi30k_de_en german.txt --reference=english.txt   and their BLEU score
    python -m glyphgpt.inference.translate out/multi30k_de_en german.txt --out=mine.txt --beam=1   greedy, to a file

Any task works whose training text has one line per example: the input, a tab, the output. prepare.py --records=lines
makes such a dataset, as does prepare.py multi30k_de_en, and config/translate.toml trains on it.
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from glyphgpt.cli import parse
from glyphgpt.data.text import read_lines
from glyphgpt.data.tokenizers import Tokenizer, decode, encode_text, start_token
from glyphgpt.errors import UsageError, UserError, exit_on_error, optional_import
from glyphgpt.files import write_atomic
from glyphgpt.inference.api import open_model
from glyphgpt.inference.beam_search import beam_search
from glyphgpt.inference.generate import Ids, LanguageModel
from glyphgpt.settings import TranslateSettings

DELIMITERS = 2  # tokens of a prompt besides its source: a line end before, a tab after
USAGE = "python -m glyphgpt.inference.translate RUN | CHECKPOINT FILE [--key=value ...]"


def main() -> None:
    """Translate the file that the command line names."""
    settings, words = parse(TranslateSettings, sys.argv[1:], USAGE, __doc__ or "", files=False)
    if len(words) != 2:
        raise UsageError(f"name a run and a file: {USAGE}")
    with open_model(
        words[0], device=settings.device, dtype=settings.dtype, data_dir=settings.data_dir,
        remedy="batch_size or beam",
    ) as model:  # fmt: skip
        sources = read_lines(words[1])
        if settings.out and not Path(settings.out).absolute().parent.is_dir():
            raise UsageError(f"--out={settings.out}: the folder does not exist; create it first")
        references = read_references(settings.reference, len(sources)) if settings.reference else []
        translations = Translator(model.model, model.tokenizer, model.block_size, settings).translate(sources)
    text = "".join(f"{line}\n" for line in translations)
    if settings.out:
        write_atomic(Path(settings.out), text.encode())
    else:
        sys.stdout.write(text)
    if references:
        print(bleu_score(translations, references), file=sys.stderr)


class Translator:
    """A model that continues a source line and a tab up to the next line end."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, block_size: int, settings: TranslateSettings
    ) -> None:
        """Prepare to translate.

        Raises:
            UserError: The vocabulary lacks the tab or the line end.
        """
        has_records = tokenizer.separator is not None
        if tokenizer.unknown_characters("\t" if has_records else "\t\n"):
            raise UserError(
                "the model's vocabulary lacks the tab or the line end; train on lines of source, tab, translation"
            )
        self.model, self.tokenizer, self.block_size, self.settings = model, tokenizer, block_size, settings
        self.end = start_token(tokenizer)
        """The token before and after each line."""

    def translate(self, sources: Sequence[str]) -> list[str]:
        """Return the translation of each line; that of an empty line is empty.

        Raises:
            UserError: A line has unknown characters, or is too long for the model's context.
        """
        prompts = [self.encode_prompt(line, number) for number, line in enumerate(sources, start=1)]
        translations = [""] * len(sources)
        with tqdm(total=len(sources), unit="line", desc="translating", disable=None) as progress:
            for indices in self.batches(prompts):
                if len(prompts[indices[0]]) > DELIMITERS:
                    batch = self.translate_batch(np.stack([prompts[index] for index in indices]))
                    for index, translation in zip(indices, batch, strict=True):
                        translations[index] = translation
                progress.update(len(indices))
        return translations

    def encode_prompt(self, line: str, number: int) -> Ids:
        """Return the tokens of a line end, a source line and a tab; errors name the line's number.

        Raises:
            UserError: The line has unknown characters, or leaves no context for a translation.
        """
        try:
            source = encode_text(line, self.tokenizer, skip=self.settings.skip_unknown)
        except UserError as error:
            raise UserError(f"line {number}: {error}") from error
        prompt = np.concatenate(([self.end], source, self.tokenizer.encode("\t"))).astype(np.int64)
        if len(prompt) >= self.block_size:
            raise UserError(
                f"line {number}: {len(source):,} tokens leave no room in the model's context of {self.block_size:,}; "
                "split the line"
            )
        return prompt

    def batches(self, prompts: Sequence[Ids]) -> Iterator[list[int]]:
        """Yield the indices of prompts of equal length, at most batch_size at a time."""

        def length(index: int) -> int:
            return len(prompts[index])

        for _, group in groupby(sorted(range(len(prompts)), key=length), key=length):
            indices = list(group)
            for start in range(0, len(indices), self.settings.batch_size):
                yield indices[start : start + self.settings.batch_size]

    def translate_batch(self, prompts: Ids) -> list[str]:
        """Return the translations of prompts (B, T), cut off where the model's context ends."""
        max_new_tokens = self.block_size - prompts.shape[1]
        outputs = beam_search(self.model, prompts, end=self.end, beam=self.settings.beam, max_new_tokens=max_new_tokens)
        return [decode(self.tokenizer, output.tolist()).removesuffix("\r") for output in outputs]  # of \r\n


def read_references(path: str, count: int) -> list[str]:
    """Read the reference translations of `count` lines, and check that sacrebleu is installed.

    Raises:
        UserError: The number of lines is not `count`, or sacrebleu is not installed.
    """
    references = read_lines(path)
    if len(references) != count:
        raise UserError(f"{path}: {len(references):,} lines, but there are {count:,} to translate")
    with optional_import("sacrebleu", "--reference"):
        import sacrebleu  # noqa: F401, PLC0415  (optional)
    return references


def bleu_score(translations: Sequence[str], references: Sequence[str]) -> str:
    """Return the BLEU score, and sacrebleu's signature, which identifies how it was computed (Post 2018)."""
    from sacrebleu.metrics.bleu import BLEU  # noqa: PLC0415  (optional)

    metric = BLEU()
    score = metric.corpus_score(translations, [references])
    return f"BLEU {score.score:.1f} ({metric.get_signature()})"


if __name__ == "__main__":
    with exit_on_error():
        main()
