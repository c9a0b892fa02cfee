"""Turn any text into token shards that train.py reads.

    python prepare.py shakespeare_char                      a recipe: a TOML file in data/
    python prepare.py my.txt more/*.txt --name=mine         your own files
    python prepare.py folder/ --tokenizer=gpt2              every file in a folder
    python prepare.py 'wiki/*.jsonl.zst' --name=wiki        a pattern; packed files; records
    cat my.txt | python prepare.py - --name=mine            standard input

The text is streamed, so it may be larger than memory. It is read twice: to count and check it, then to encode
it. The first part trains, the last (val_fraction) validates; decoding both gives back the very text. What is broken
off goes on where it stopped, once it is started again.
"""

import hashlib
import os
import re
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from glyphgpt.errors import Failure, UsageError, plain_errors, start_script, warn

if __name__ == "__main__":  # while the rest is imported
    start_script()

from tqdm import tqdm

from glyphgpt.commandline import parse
from glyphgpt.corpus import QUICK, read_recipe, text_file
from glyphgpt.helper import Helper
from glyphgpt.memory import keep_freed_memory
from glyphgpt.settings import PrepareSettings
from glyphgpt.shards import FORMAT, Meta, ShardWriter, SourceMeta, read_meta, write_dataset
from glyphgpt.text import Documents, Text, open_text
from glyphgpt.tokenizer import CharTokenizer, Tokenizer, Tokens, encode_documents, from_plain
from glyphgpt.unfinished import Progress, earlier, forget, job_name, keep, place_of, workshop

USAGE = "python prepare.py RECIPE | FILE ... | FOLDER ... | -  [--key=value ...]"


def main() -> None:
    """Prepare a recipe, or the user's own text."""
    settings, words = parse(PrepareSettings, sys.argv[1:], USAGE, __doc__ or "", files=False)
    keep_freed_memory()
    data_dir = Path(settings.data_dir)
    if not words:
        raise UsageError(f"name a recipe or a text: {USAGE}; recipes here: {', '.join(recipe_names(data_dir))}")
    recipe_path = data_dir / f"{words[0]}.toml"
    if len(words) == 1 and recipe_path.is_file() and not Path(words[0]).is_file():
        prepare_recipe(recipe_path, settings)
    else:
        if len(words) == 1 and re.fullmatch(r"\w+", words[0]) and not Path(words[0]).exists():
            known = ", ".join(recipe_names(data_dir))
            raise UsageError(f"{words[0]}: no such file, folder or recipe; recipes in {data_dir}: {known}")
        prepare_files(words, settings)


def recipe_names(data_dir: Path) -> list[str]:
    """List the recipes in the data folder."""
    return sorted(path.stem for path in data_dir.glob("*.toml")) or ["none"]


def prepare_recipe(path: Path, settings: PrepareSettings) -> None:
    """Prepare a well-known text as its recipe says; a data set that is there already is left alone."""
    recipe, name = read_recipe(path), path.stem
    for key in ("name", "tokenizer", "val_fraction", "encoding", "text_field"):
        if key in settings.model_fields_set:
            raise UsageError(f"--{key} goes with your own text; the recipe {path} decides it here")
    folder = Path(settings.data_dir) / name
    if folder.exists() and not settings.overwrite:
        meta = read_meta(folder)
        if (meta.source.sha256, meta.tokenizer["kind"]) == (recipe.text.sha256, recipe.tokenizer):
            print(f"{folder} is prepared already; next: {next_step(folder, recipe.config)}")
            return
    file = text_file(recipe, Path(settings.data_dir))
    print(f"{recipe.title}; licence: {recipe.licence}")
    text = Text((file,), (str(file),))
    chosen = settings.model_copy(update={"tokenizer": recipe.tokenizer, "val_fraction": recipe.val_fraction})
    with workshop(folder, overwrite=settings.overwrite) as scratch:
        meta = prepare(text, scratch, chosen, recipe=name)
    report(meta, folder, recipe.config)


def prepare_files(words: list[str], settings: PrepareSettings) -> None:
    """Prepare the user's own text."""
    name = settings.name or (Path(words[0]).stem if len(words) == 1 and words[0] != "-" else "")
    folder = place_of(name, Path(settings.data_dir))
    with workshop(folder, overwrite=settings.overwrite) as scratch:
        separate = settings.tokenizer == "gpt2"  # which has a token to stand between documents
        text = open_text(words, scratch.parent, settings.encoding, field=settings.text_field, separate=separate)
        meta = prepare(text, scratch, settings, recipe="")
    report(meta, folder, QUICK)


def prepare(text: Text, folder: Path, settings: PrepareSettings, recipe: str) -> Meta:
    """Read a text twice and write its shards and meta.json into a folder; go on where an earlier run was broken off.

    Raises:
        Failure: the text cannot be read or is too short to split.
    """
    stamps = text.stamps()
    total_bytes = sum(size for size, _ in stamps)
    form = settings.model_dump(include={"tokenizer", "val_fraction", "encoding", "text_field", "shard_tokens"})
    job = job_name(names=text.names, stamps=stamps, form=form, recipe=recipe) if text.stays else ""
    progress = earlier(folder, job)
    if progress:
        finished = sum(map(len, progress.shards.values()))
        print(f"going on where this was broken off; finished files: {finished}")
    else:
        progress = survey(text, settings, job, total_bytes)
    tokenizer = from_plain(progress.tokenizer, Path(settings.data_dir))
    train_characters = int(progress.characters * (1 - settings.val_fraction))
    lengths = {"train": train_characters, "val": progress.characters - train_characters}
    workers = ThreadPoolExecutor(settings.workers or (os.cpu_count() if settings.tokenizer == "gpt2" else 1))
    with bar("encoding", total_bytes) as reading, Helper() as helper, workers:
        output = Output(folder, lengths, tokenizer.vocab_size, settings.shard_tokens, progress)
        pieces = cut(text.read(lambda chunk: reading.update(len(chunk))), lengths, tokenizer, progress)
        for piece, tokens in in_order(workers, lambda piece: encode_documents(tokenizer, piece.documents), pieces):
            helper.do(output.write, piece, tokens)
        helper.wait()
    if output.unfinished or text.stamps() != stamps:
        forget(folder)
        raise Failure(f"{', '.join(text.names)}: the text changed while it was read; try again")
    train, val = (output.writers[split].meta(characters) for split, characters in lengths.items())
    for name, split in (("training", train), ("validation", val)):
        if split.tokens < 2:
            forget(folder)
            raise Failure(
                f"{', '.join(text.names)}: too short: {progress.characters} characters leave too few tokens for {name} "
                f"({split.tokens}, and predicting takes 2); use more text"
            )
    meta = Meta(
        format=FORMAT,
        recipe=recipe,
        tokenizer=tokenizer.to_plain(),
        vocab_size=tokenizer.vocab_size,
        val_fraction=settings.val_fraction,
        source=SourceMeta(names=list(text.names), bytes=total_bytes, sha256=progress.sha256),
        train=train,
        val=val,
    )
    write_dataset(folder, meta)
    return meta


def bar(what: str, total_bytes: int) -> "tqdm[Any]":
    """Return a progress bar of the bytes read, which shows the time left."""
    return tqdm(total=total_bytes, unit="B", unit_scale=True, desc=what, disable=None)


def survey(text: Text, settings: PrepareSettings, job: str, total_bytes: int) -> Progress:
    """Read a text for the first time: how long it is, its checksum, and the tokenizer that it asks for.

    Raises:
        Failure: there is no text at all.
    """
    characters, digest = 0, hashlib.sha256()
    with bar("counting", total_bytes) as reading, Helper() as helper:

        def on_chunk(chunk: bytes) -> None:
            helper.do(digest.update, chunk)
            reading.update(len(chunk))

        def pieces() -> Iterator[str]:
            nonlocal characters
            for piece in chain.from_iterable(text.read(on_chunk)):
                if characters == 0 and piece.startswith("\ufeff"):
                    warn("the text begins with a byte order mark; --encoding=utf-8-sig leaves it out")
                characters += len(piece)
                yield piece
            if not characters:
                raise Failure("the text is empty; there is nothing to learn from")

        if settings.tokenizer == "char":
            tokenizer = CharTokenizer.learn(pieces()).to_plain()
        else:
            deque(pieces(), maxlen=0)  # counted and checked, though nothing is learned from them
            tokenizer = {"kind": settings.tokenizer}
        helper.wait()
    return Progress(job=job, characters=characters, sha256=digest.hexdigest(), tokenizer=tokenizer)


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
    stream: Iterator[Documents], lengths: dict[str, int], tokenizer: Tokenizer, progress: Progress
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
        self, folder: Path, lengths: dict[str, int], vocab_size: int, shard_tokens: int, progress: Progress
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
            keep(self.progress.model_copy(update=there), self.folder)


def report(meta: Meta, folder: Path, config: str) -> None:
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
    """Return the command that trains on a data set."""
    name = folder.name
    dataset = "" if name == "shakespeare_char" else f" --dataset={name} --out_dir=out/{name}"
    place = "" if folder.parent == Path("data") else f" --data_dir={shlex.quote(str(folder.parent))}"
    return f"python train.py {shlex.quote(config)}{dataset}{place}"


if __name__ == "__main__":
    with plain_errors():
        main()
