"""The first reading of a text: count and check its characters, hash its bytes, and choose the tokenizer."""

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from glyphgpt.data.background import BackgroundWorker
from glyphgpt.data.bpe import learn_bpe
from glyphgpt.data.corpus import Corpus
from glyphgpt.data.inspection import Inspector
from glyphgpt.data.records import Documents
from glyphgpt.data.sources import list_names
from glyphgpt.data.staging import PrepareProgress
from glyphgpt.data.tokenizers import (
    REPLACEMENT,
    CharacterCounts,
    CharacterSet,
    CharTokenizer,
    Tokenizer,
    control_characters,
    describe_characters,
)
from glyphgpt.errors import UsageError, UserError, warn
from glyphgpt.settings import PrepareSettings


def progress_bar(label: str, text: Corpus, passes: int = 1) -> "tqdm[Any]":
    """Return a progress bar of the bytes of a text; it is shown only on a terminal."""
    return tqdm(total=text.total_bytes() * passes, unit="B", unit_scale=True, desc=label, disable=None)


class Scan:
    """What the first reading of a text finds out."""

    def __init__(self, text: Corpus, settings: PrepareSettings, vocabulary: Tokenizer | None) -> None:
        """Prepare to read a text, which gets the tokenizer `vocabulary` if there is one."""
        self.text, self.settings, self.vocabulary = text, settings, vocabulary
        self.learns_characters = settings.tokenizer == "char" and not vocabulary
        self.learned = CharacterCounts(settings.min_count) if settings.min_count > 1 else CharacterSet()
        self.trained = CharacterSet()
        """Characters of the training text, where the validation text is another one."""
        self.characters = Counter[str]()
        """Number of characters of each split."""
        self.unknown = Counter[str]()
        self.inspector = Inspector()
        self.warnings: defaultdict[str, dict[str, None]] = defaultdict(dict)
        """Warnings, and the names of their files in order."""

    def read(self, fingerprint: str) -> PrepareProgress:
        """Read the text, and return what its preparation needs to know. `fingerprint` is that of the preparation.

        Raises:
            UserError: The text is empty, or has characters that are not in the vocabulary.
            UsageError: The text is too short for a vocabulary of this size.
        """
        digest, settings = hashlib.sha256(), self.settings
        with progress_bar("counting", self.text) as bar, BackgroundWorker() as hasher:

            def on_chunk(chunk: bytes) -> None:
                hasher.submit(digest.update, chunk)
                bar.update(len(chunk))

            parts = self.known_parts(
                self.text.read(
                    on_chunk,
                    lambda warning, name: self.warnings[warning].setdefault(name),
                    self.inspector.add if settings.report else None,
                )
            )
            if settings.tokenizer == "bpe" and not self.vocabulary:
                self.vocabulary = learn_bpe(parts, settings.vocab_size)
            else:
                deque(parts, maxlen=0)
            hasher.flush()
        self.check_characters()
        self.check_vocab_size()
        for warning, names in self.warnings.items():
            warn(f"{list_names(list(names))}: {warning}")
        separator = {} if self.text.separator is None else {"separator": self.text.separator}
        return PrepareProgress(
            fingerprint=fingerprint,
            characters=self.text.sizes(self.characters),
            sha256=digest.hexdigest(),
            tokenizer=self.tokenizer() | separator,
            dropped=self.unknown.total(),
            report=self.inspector.report() if settings.report else None,
        )

    def known_parts(self, stream: Iterator[tuple[str, Documents]]) -> Iterator[str]:
        """Yield the parts of a text without the characters that have no token, and count what they consist of."""
        for split, documents in stream:
            # Together, short records are counted many times as fast.
            for part in documents if self.settings.tokenizer == "bpe" else ["".join(documents)]:
                known, unknown = self.vocabulary.split_unknown(part) if self.vocabulary else (part, "")
                self.unknown.update(unknown)
                self.characters[split] += len(known)
                if self.learns_characters:
                    self.learned.add(known)
                    if self.settings.val and split == "train":
                        self.trained.add(known)
                yield known

    def tokenizer(self) -> dict[str, Any]:
        """Return the tokenizer of the text as JSON types; warn of characters that are hard to learn."""
        if not self.learns_characters:
            return self.vocabulary.to_dict() if self.vocabulary else {"kind": self.settings.tokenizer}
        characters = self.learned.sorted()
        if self.settings.val and (unseen := sorted(set(characters) - set(self.trained.sorted()) - {REPLACEMENT})):
            warn(
                f"{self.settings.val}: {len(unseen):,} characters of the validation text do not occur in the training "
                f"text, so no model can predict them: {describe_characters(unseen)}"
            )
        if controls := control_characters(characters):
            warn(f"control characters become part of the vocabulary: {list_names(controls, length=10)}")
        return CharTokenizer(characters).to_dict()

    def check_characters(self) -> None:
        """Check that a text has known characters, and no unknown ones unless --skip_unknown is set.

        Raises:
            UserError: The text has no known characters, or has unknown ones.
        """
        names, vocabulary = list_names(self.text.names), self.settings.vocabulary
        if self.unknown and not self.settings.skip_unknown:
            found = describe_characters([character for character, _ in self.unknown.most_common()], self.unknown)
            raise UserError(f"{names}: {vocabulary} has no token for {found}; change the text, or add --skip_unknown")
        if not self.characters.total():
            problem = f"{vocabulary} has no token for any of its characters" if self.unknown else "the text is empty"
            raise UserError(f"{names}: {problem}; there is nothing to learn from")

    def check_vocab_size(self) -> None:
        """Check that as many BPE tokens were learned as the settings ask for.

        Raises:
            UsageError: The text is too short for so many.
        """
        settings, learned = self.settings, self.vocabulary
        is_learned = settings.tokenizer == "bpe" and not settings.vocabulary
        if is_learned and learned and learned.vocab_size < settings.vocab_size:
            raise UsageError(
                f"--vocab_size={settings.vocab_size}: the text has too few repeated pairs for so many tokens; "
                f"use --vocab_size={learned.vocab_size} or less"
            )
