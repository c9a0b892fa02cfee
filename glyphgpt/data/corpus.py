"""A text and its division into splits, read as streams of documents (glyphgpt/data/text.py)."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from glyphgpt.data.cleaning import Cleaner
from glyphgpt.data.records import Documents
from glyphgpt.data.sources import list_names
from glyphgpt.data.splitting import (
    Draw,
    assign_blocks,
    assign_documents,
    block_size,
    number_blocks,
    read_records,
)
from glyphgpt.data.text import OnChunk, OnText, OnWarning, Text
from glyphgpt.errors import UserError
from glyphgpt.settings import PrepareSettings


class Corpus:
    """The user's text, with a text for validation of its own if there is one."""

    def __init__(
        self, text: Text, settings: PrepareSettings, val: Text | None = None, separator: str | None = None
    ) -> None:
        """Combine the texts. `separator` is that of the records, if these are texts of records (Tokenizer)."""
        self.texts = {"train": text} | ({"val": val} if val else {})
        self.settings, self.separator = settings, separator
        self.names = tuple(name for text in self.texts.values() for name in text.names)
        self.rereadable = all(text.rereadable for text in self.texts.values())

    @property
    def paths(self) -> list[Path | None]:
        """The paths of all files."""
        return [path for text in self.texts.values() for path in text.paths]

    def file_stats(self) -> list[tuple[int, int]]:
        """Return the size and modification time of each file."""
        return [stat for text in self.texts.values() for stat in text.file_stats()]

    def total_bytes(self) -> int:
        """Return the size of all files."""
        return sum(size for size, _ in self.file_stats())

    @cached_property
    def passes(self) -> int:
        """How often `read_splits` reads the files."""
        splits = 2 + (self.settings.test_fraction > 0)
        return splits if self.draws_splits else 1

    def read(
        self, on_chunk: OnChunk, on_warning: OnWarning | None = None, on_text: OnText | None = None
    ) -> Iterator[tuple[str, Documents]]:
        """Yield the documents with their split. Where the splits follow each other in one text, this is "train".

        The functions are those of Text.read.
        """
        cleaner = Cleaner(self.settings)
        seen = set[int]() if self.settings.deduplicate == "records" else None
        for split, text in self.texts.items():
            stream = cleaner.clean(text.read(on_chunk, on_warning, on_text))
            if self.separator is not None:
                stream = read_records(stream, self.separator, seen)
            for part, documents in self._assign(stream, split):
                yield part, documents if text.separate_documents else ["".join(documents)]

    @property
    def draws_splits(self) -> bool:
        """Whether parts of the text are drawn at random for the splits, which then do not follow each other."""
        return self.settings.split != "tail" or (self.separator is not None and len(self.texts) == 1)

    def _assign(self, stream: Iterator[Documents], split: str) -> Iterator[tuple[str, Documents]]:
        """Yield the documents of a stream with their split."""
        settings = self.settings
        draw = Draw(settings.val_fraction, settings.test_fraction, settings.seed)
        if not self.draws_splits:
            yield from ((split, documents) for documents in stream)
        elif self.separator is not None:
            yield from assign_documents(stream, draw, first=-1)  # the stream begins with an empty document
        elif settings.split == "blocks":
            size = block_size(self.total_bytes(), min(settings.val_fraction, settings.test_fraction or 1))
            yield from assign_blocks(number_blocks(stream, size), draw)
        else:
            yield from assign_documents(stream, draw)

    def sizes(self, counts: dict[str, int]) -> dict[str, int]:
        """Return the characters of each split, in their order, from those of the documents that `read` yields.

        Raises:
            UserError: A split has no text.
        """
        settings, names = self.settings, ["train", "val", *["test"] * (self.settings.test_fraction > 0)]
        if len(self.texts) > 1:
            for name, text in self.texts.items():
                if not counts.get(name):
                    raise UserError(f"{list_names(text.names)}: the text is empty")
        if len(self.texts) == 1 and not self.draws_splits:
            total = sum(counts.values())
            ends = [1 - settings.val_fraction - settings.test_fraction, 1 - settings.test_fraction, 1]
            before = [0, *(int(total * end) for end in ends)]
            return {name: before[i + 1] - before[i] for i, name in enumerate(names)}
        for name in names:
            if not counts.get(name):
                raise UserError(f"{list_names(self.names)}: {self._without_split(name)}")
        return {name: counts[name] for name in names}

    def _without_split(self, name: str) -> str:
        """Return the problem and the remedy where the random draw leaves a split without text."""
        if self.separator is not None:
            where = f"between {self.separator!r}" if self.separator else "one for each document"
            line_ends = ", or --newlines=lf if its line ends are \\r\\n" if "\n" in self.separator[1:] else ""
            return f"too few records ({where}) for the {name} split; divide the text otherwise, or add text{line_ends}"
        others = "--split=blocks or tail" if self.settings.split == "documents" else "--split=tail"
        return f"--split={self.settings.split} leaves no text for the {name} split; use a larger fraction, or {others}"

    def read_splits(self, splits: list[str], on_chunk: OnChunk) -> Iterator[Documents]:
        """Yield all documents, one split after the other."""
        for wanted in splits if self.passes > 1 else [""]:
            for split, documents in self.read(on_chunk):
                if wanted in ("", split):
                    yield documents
