"""Turn any text into token shards that train.py reads.

    python prepare.py shakespeare_char                      a recipe: a TOML file in data/
    python prepare.py my.txt more/*.txt --name=mine         your own files
    python prepare.py folder/ --tokenizer=gpt2              every file in a folder
    python prepare.py 'wiki/*.jsonl.zst' --name=wiki        a pattern; packed files; records (JSON, CSV, Parquet)
    cat my.txt | python prepare.py - --name=mine            standard input
    python prepare.py my.txt --vocabulary=out/quick         with the tokenizer of a run, for train.py --init_from

The text is streamed, so it may be larger than memory. It is read twice: to count and check it, then to encode
it. The first part trains, the last (val_fraction) validates; decoding both gives back the very text. A preparation that
was interrupted continues where it stopped, once it is started again.
"""

import glyphgpt.startup  # first: answers --help and mistakes before the other imports

import codecs
import hashlib
import os
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glyphgpt.checkpoint import find_checkpoint, read_metadata
from glyphgpt.cli import ROOT, command, from_here
from glyphgpt.data.background import BackgroundWorker
from glyphgpt.data.dataset import FORMAT, META, DatasetMeta, ShardWriter, SourceMeta, read_meta, write_meta
from glyphgpt.data.recipes import QUICK, download_text, read_recipe
from glyphgpt.data.records import Documents
from glyphgpt.data.sources import is_stream, list_names, sanitize
from glyphgpt.data.staging import (
    PrepareProgress,
    clear_progress,
    dataset_dir,
    load_progress,
    save_progress,
    staging_dir,
    task_fingerprint,
)
from glyphgpt.data.text import HAS_BOM, HAS_NUL, Text, open_text
from glyphgpt.data.tokenizers import (
    CharTokenizer,
    Tokenizer,
    Tokens,
    describe_characters,
    encode_documents,
    tokenizer_from_dict,
)
from glyphgpt.errors import UsageError, UserError, warn
from glyphgpt.settings import PrepareSettings


def main(settings: PrepareSettings, *words: str) -> None:
    """Prepare a recipe, or the user's own text."""
    data_dir = Path(settings.data_dir)
    if not words:
        usage, known = glyphgpt.startup.USAGE["prepare.py"], recipe_names(data_dir)
        raise UsageError(f"name a recipe or a text: {usage}; recipes here: {known}")
    recipe_path = data_dir / f"{words[0]}.toml"
    if len(words) == 1 and recipe_path.is_file() and not Path(words[0]).is_file():
        prepare_recipe(recipe_path, settings)
    else:
        if len(words) == 1 and re.fullmatch(r"\w+", words[0]) and not Path(words[0]).exists():
            known = recipe_names(data_dir)
            raise UsageError(f"{words[0]}: no such file, folder or recipe; recipes in {data_dir}: {known}")
        prepare_files(words, settings)


def recipe_names(data_dir: Path) -> str:
    """List the recipes in the data folder."""
    return list_names(sorted(path.stem for path in data_dir.glob("*.toml")), shown=10) or "none"


def prepare_recipe(path: Path, settings: PrepareSettings) -> None:
    """Prepare a well-known text as its recipe says; a data set that is there already is left alone."""
    recipe, name = read_recipe(path), path.stem
    for key in ("name", "tokenizer", "val_fraction", "encoding", "text_field", "vocabulary", "skip_unknown"):
        if key in settings.model_fields_set:
            raise UsageError(f"--{key} goes with your own text; the recipe {path} decides it here")
    folder = Path(settings.data_dir) / name
    if folder.exists() and not settings.overwrite:
        meta = read_meta(folder)
        if (meta.source.sha256, meta.tokenizer["kind"]) == (recipe.text.sha256, recipe.tokenizer):
            print(f"{folder} is prepared already; next: {next_step(folder, recipe.config)}")
            return
    file = download_text(recipe, Path(settings.data_dir))
    print(f"{recipe.title}; licence: {recipe.licence}")
    text = Text((file,), (sanitize(file),), flags=False)
    chosen = settings.model_copy(update={"tokenizer": recipe.tokenizer, "val_fraction": recipe.val_fraction})
    with staging_dir(folder, overwrite=settings.overwrite, named=False) as scratch:
        meta = prepare(text, scratch, chosen, recipe=name)
    report(meta, folder, recipe.config)


def prepare_files(words: Sequence[str], settings: PrepareSettings) -> None:
    """Prepare the user's own text."""
    single = len(words) == 1 and not is_stream(words[0])
    folder = dataset_dir(settings.name or (Path(words[0]).stem if single else ""), Path(settings.data_dir))
    vocabulary = read_vocabulary(settings) if settings.vocabulary else None
    if vocabulary:
        settings = settings.model_copy(update={"tokenizer": vocabulary.kind})
    with staging_dir(folder, overwrite=settings.overwrite) as scratch:
        separate = settings.tokenizer == "gpt2"  # which has a token to stand between documents
        text = open_text(words, scratch.parent, settings.encoding, field=settings.text_field, keep_documents=separate)
        meta = prepare(text, scratch, settings, recipe="", vocabulary=vocabulary)
    report(meta, folder, QUICK)


def read_vocabulary(settings: PrepareSettings) -> Tokenizer:
    """Return the tokenizer of the run, checkpoint or dataset that the settings name.

    Raises:
        UsageError: the settings name another tokenizer.
        UserError: there is none.
    """
    data_dir = Path(settings.data_dir)
    path = Path(settings.vocabulary)
    if not path.exists():
        raise UsageError(f"--vocabulary={settings.vocabulary}: no such run, checkpoint or dataset")
    plain = read_meta(path).tokenizer if (path / META).is_file() else read_metadata(find_checkpoint(path)).tokenizer
    tokenizer = tokenizer_from_dict(plain, data_dir)
    if "tokenizer" in settings.model_fields_set and settings.tokenizer != tokenizer.kind:
        raise UsageError(
            f"--tokenizer={settings.tokenizer} contradicts --vocabulary={settings.vocabulary}, whose tokenizer is "
            f"{tokenizer.kind}; leave one of them out"
        )
    return tokenizer


def prepare(
    text: Text, folder: Path, settings: PrepareSettings, recipe: str, vocabulary: Tokenizer | None = None
) -> DatasetMeta:
    """Read a text twice and write its shards and meta.json into a folder; continue an interrupted preparation.

    Raises:
        UserError: the text cannot be read or is too short to split.
    """
    stamps = text.file_stats()
    total_bytes = sum(size for size, _ in stamps)
    kept = {"tokenizer", "val_fraction", "encoding", "text_field", "shard_tokens", "skip_unknown"}
    form = {**settings.model_dump(include=kept), "vocabulary": vocabulary.to_dict() if vocabulary else None}
    job = (
        task_fingerprint(paths=list(map(str, text.paths)), file_stats=stamps, form=form, recipe=recipe)
        if text.rereadable
        else ""
    )
    progress = load_progress(folder, job)
    if progress:
        finished = sum(map(len, progress.shards.values()))
        print(f"resuming an interrupted preparation; finished files: {finished}")
    else:
        progress = survey(text, settings, job, total_bytes, vocabulary)
    tokenizer = tokenizer_from_dict(progress.tokenizer, Path(settings.data_dir))
    train_characters = int(progress.characters * (1 - settings.val_fraction))
    lengths = {"train": train_characters, "val": progress.characters - train_characters}
    workers = ThreadPoolExecutor(settings.workers or (os.cpu_count() if settings.tokenizer == "gpt2" else 1))
    with bar("encoding", total_bytes) as reading, BackgroundWorker() as helper, workers:
        output = Output(folder, lengths, tokenizer.vocab_size, settings.shard_tokens, progress)
        stream = text.read(lambda chunk: reading.update(len(chunk)))
        if progress.skipped:
            stream = known_only(stream, tokenizer, Counter())
        pieces = cut(stream, lengths, tokenizer, progress)
        for piece, tokens in in_order(workers, lambda piece: encode_documents(tokenizer, piece.documents), pieces):
            helper.submit(output.write, piece, tokens)
        helper.wait()
    if output.unfinished or text.file_stats() != stamps:
        clear_progress(folder)
        raise UserError(f"{list_names(text.names)}: the text changed while it was read; try again")
    train, val = (output.writers[split].meta(characters) for split, characters in lengths.items())
    for purpose, split in (("training", train), ("validation", val)):
        if split.tokens < 2:
            clear_progress(folder)
            raise UserError(
                f"{list_names(text.names)}: too short: {progress.characters} characters leave too few tokens for "
                f"{purpose} ({split.tokens}, and predicting takes 2); use more text"
            )
    meta = DatasetMeta(
        format=FORMAT,
        recipe=recipe,
        tokenizer=tokenizer.to_dict(),
        vocab_size=tokenizer.vocab_size,
        val_fraction=settings.val_fraction,
        source=SourceMeta(names=list(text.names), bytes=total_bytes, sha256=progress.sha256),
        train=train,
        val=val,
    )
    write_meta(folder, meta)
    if progress.skipped:
        print(f"left out: {progress.skipped:,} characters that {settings.vocabulary} lacks")
    return meta


def bar(what: str, total_bytes: int) -> "tqdm[Any]":
    """Return a progress bar of the bytes read, which shows the time left."""
    return tqdm(total=total_bytes, unit="B", unit_scale=True, desc=what, disable=None)


def survey(
    text: Text, settings: PrepareSettings, job: str, total_bytes: int, vocabulary: Tokenizer | None
) -> PrepareProgress:
    """Read a text for the first time: how long it is, its checksum, and the tokenizer that it asks for.

    Raises:
        UserError: there is no text at all, or it has characters that the vocabulary lacks.
    """
    characters, digest = 0, hashlib.sha256()
    noticed: dict[str, dict[str, None]] = {HAS_BOM: {}, HAS_NUL: {}}  # names of files
    unknown: Counter[str] = Counter()
    with bar("counting", total_bytes) as reading, BackgroundWorker() as helper:

        def on_chunk(chunk: bytes) -> None:
            helper.submit(digest.update, chunk)
            reading.update(len(chunk))

        def pieces() -> Iterator[str]:
            nonlocal characters
            stream = text.read(on_chunk, lambda what, name: noticed[what].setdefault(name))
            for piece in chain.from_iterable(known_only(stream, vocabulary, unknown)):
                characters += len(piece)
                yield piece
            check_characters(text, characters, unknown, settings)

        if settings.tokenizer == "char" and not vocabulary:
            learned = CharTokenizer.learn(pieces())
            tokenizer, controls = learned.to_dict(), control_characters(learned.characters)
        else:
            deque(pieces(), maxlen=0)  # counted and checked, though nothing is learned from them
            tokenizer, controls = vocabulary.to_dict() if vocabulary else {"kind": settings.tokenizer}, []
        helper.wait()
    if marked := list(noticed[HAS_BOM]):
        remedy = f"; --encoding={unmarked(text.encoding)} leaves it out" if text.flags else ""
        warn(f"a byte order mark begins {list_names(marked)} and stays in the text{remedy}")
    if nul := list(noticed[HAS_NUL]):
        warn(f"NUL characters (U+0000) in {list_names(nul)}: is this text, and in the right encoding?")
    if controls:
        warn(f"control characters become part of the vocabulary: {list_names(controls, shown=10)}")
    return PrepareProgress(
        job=job, characters=characters, sha256=digest.hexdigest(), tokenizer=tokenizer, skipped=unknown.total()
    )


def known_only(stream: Iterator[Documents], tokenizer: Tokenizer | None, unknown: Counter[str]) -> Iterator[Documents]:
    """Leave characters that a tokenizer lacks out of a text, and count them in `unknown`."""
    if not isinstance(tokenizer, CharTokenizer):  # the others lack none
        yield from stream
        return
    for documents in stream:
        parts = [tokenizer.split_unknown(document) for document in documents]
        unknown.update("".join(others for _, others in parts))
        yield [known for known, _ in parts]


def check_characters(text: Text, characters: int, unknown: Counter[str], settings: PrepareSettings) -> None:
    """Make sure that a text has characters, and none that the vocabulary lacks.

    Raises:
        UserError: it has not, or has some that are not to be left out.
    """
    if unknown and not settings.skip_unknown:
        lacks = describe_characters([character for character, _ in unknown.most_common()], unknown)
        raise UserError(
            f"{list_names(text.names)}: {settings.vocabulary} lacks {lacks}; change the text, or leave them out: "
            "--skip_unknown"
        )
    if not characters:
        what = f"all of its characters are unknown to {settings.vocabulary}" if unknown else "the text is empty"
        raise UserError(f"{list_names(text.names)}: {what}; there is nothing to learn from")


def control_characters(characters: str) -> list[str]:
    """Name the control characters among some, but for NUL and those that lay out text."""
    controls = (c for c in characters if unicodedata.category(c) == "Cc" and c not in "\0\t\n\r")
    return [f"U+{ord(character):04X}" for character in controls]


def unmarked(encoding: str) -> str:
    """Return the encoding that is the same but for a byte order mark, which it takes off."""
    utf = re.match(r"utf-(?:16|32)", codecs.lookup(encoding).name)
    return utf[0] if utf else "utf-8-sig"


@dataclass(frozen=True)
class Piece:
    """A part of a split that encodes by itself: what stands around it makes no difference."""

    split: str
    start: int
    """Characters of the split before it."""
    documents: Documents
    ends: bool
    """Whether it is the split's last one."""


def cut(
    stream: Iterator[Documents], lengths: dict[str, int], tokenizer: Tokenizer, progress: PrepareProgress
) -> Iterator[Piece]:
    """Cut a text into pieces of splits of so many characters, from where an earlier run got to."""
    splits = list(lengths)
    split = progress.split or splits[0]
    start, skip = progress.start, progress.start + sum(lengths[name] for name in splits[: splits.index(split)])
    waiting = [""]
    for found in stream:
        if (size := characters_of(found)) < skip:
            skip -= size
            continue
        documents = take(found, skip)[1] if skip else found
        skip = 0
        waiting = [*waiting[:-1], waiting[-1] + documents[0], *documents[1:]]
        while (room := lengths[split] - start) <= characters_of(waiting):
            documents, waiting = take(waiting, room)
            yield Piece(split, start, documents, ends=True)
            if split == splits[-1]:
                return
            split, start = splits[splits.index(split) + 1], 0
        safe = characters_of(waiting[:-1]) + tokenizer.split_point(waiting[-1])
        if safe:
            documents, waiting = take(waiting, safe)
            yield Piece(split, start, documents, ends=False)
            start += safe


def characters_of(documents: Documents) -> int:
    """Count characters."""
    return sum(map(len, documents))


def take(documents: Documents, count: int) -> tuple[Documents, Documents]:
    """Cut documents after so many characters; a border between two of them at that very place goes with the rest.

    >>> take(["ab", "cde", "f"], 3)
    (['ab', 'c'], ['de', 'f'])
    >>> take(["ab", "cde", "f"], 2)
    (['ab'], ['', 'cde', 'f'])
    """
    number = 0
    while count > len(documents[number]):
        count -= len(documents[number])
        number += 1
    return [*documents[:number], documents[number][:count]], [documents[number][count:], *documents[number + 1 :]]


def in_order(
    workers: ThreadPoolExecutor, encode: Callable[[Piece], Tokens], pieces: Iterator[Piece]
) -> Iterator[tuple[Piece, Tokens]]:
    """Yield each piece with its tokens, encoded by threads some pieces ahead."""
    waiting: deque[tuple[Piece, Future[Tokens]]] = deque()
    for piece in pieces:
        waiting.append((piece, workers.submit(encode, piece)))
        if len(waiting) > 2 * (os.cpu_count() or 1):
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


class Output:
    """The shards of all splits; each finished file is noted down, so that it need not be made again."""

    def __init__(
        self, folder: Path, lengths: dict[str, int], vocab_size: int, shard_tokens: int, progress: PrepareProgress
    ) -> None:
        """Go on from where an earlier run got to, or begin."""
        self.folder, self.progress = folder, progress
        self.writers = {
            split: ShardWriter(folder, split, vocab_size, shard_tokens, progress.shards.get(split, ()))
            for split in lengths
        }
        self.seen = dict.fromkeys(lengths, 0)  # tokens, of this run and those before it
        splits = list(lengths)
        self.unfinished = set(splits[splits.index(progress.split) :] if progress.split else splits)
        if progress.split:
            self.seen[progress.split] = progress.tokens

    def write(self, piece: Piece, tokens: Tokens) -> None:
        """Append a piece's tokens, but for those that an earlier run wrote."""
        writer, before = self.writers[piece.split], self.seen[piece.split]
        finished = len(writer.shards)
        writer.write(tokens[writer.tokens - before :])
        self.seen[piece.split] += tokens.size
        if piece.ends:
            writer.finish()
            self.unfinished.remove(piece.split)
        if len(writer.shards) > finished and self.progress.job:
            shards = {split: writer.shards for split, writer in self.writers.items()}
            there = {"shards": shards, "split": piece.split, "start": piece.start, "tokens": before}
            save_progress(self.progress.model_copy(update=there), self.folder)


def report(meta: DatasetMeta, folder: Path, config: str) -> None:
    """Say what was made and what to run next."""
    tokens, characters = (
        meta.train.tokens + meta.val.tokens,
        meta.train.characters + meta.val.characters,
    )
    print(
        f"{folder}: {characters:,} characters, {tokens:,} tokens "
        f"({meta.train.tokens:,} to train, {meta.val.tokens:,} to validate)\n"
        f"vocabulary: {meta.vocab_size:,} ({meta.tokenizer['kind']}), {characters / tokens:.2f} characters per token\n"
        f"next: {next_step(folder, config)}"
    )


def next_step(folder: Path, config: str) -> str:
    """Return the command that trains on a dataset."""
    name = folder.name
    dataset = [] if name == "shakespeare_char" else [f"--dataset={name}", f"--out_dir=out/{name}"]
    place = [] if folder.parent == Path("data") else [f"--data_dir={folder.parent}"]
    return command("train.py", from_here(ROOT / config), *dataset, *place)


if __name__ == "__main__":
    glyphgpt.startup.run("prepare.py", main)
