"""Turn any text into token shards that train.py reads.

    python prepare.py shakespeare_char                      a recipe: a TOML file in data/
    python prepare.py my.txt more/*.txt --name=mine         your own files
    python prepare.py folder/ --tokenizer=gpt2              every file in a folder
    cat my.txt | python prepare.py - --name=mine            standard input

The text is streamed, so it may be larger than memory. It is read twice: to count and check it, then to encode
it. The first part trains, the last (val_fraction) validates; decoding both gives back the very text.
"""

import hashlib
import itertools
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glyphgpt.commandline import parse
from glyphgpt.corpus import Text, fetch, open_text, read_recipe
from glyphgpt.errors import Failure, UsageError, plain_errors, warn
from glyphgpt.settings import PrepareSettings
from glyphgpt.shards import FORMAT, META, Meta, ShardWriter, SourceMeta, SplitMeta, read_meta, write_dataset
from glyphgpt.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer

USAGE = "python prepare.py RECIPE | FILE ... | FOLDER ... | -  [--key=value ...]"


def main() -> None:
    """Prepare a recipe, or the user's own text."""
    settings, words = parse(PrepareSettings, sys.argv[1:], USAGE, __doc__ or "", files=False)
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
    for key in ("name", "tokenizer", "val_fraction", "encoding"):
        if key in settings.model_fields_set:
            raise UsageError(f"--{key} goes with your own text; the recipe {path} decides it here")
    folder = Path(settings.data_dir) / name
    if folder.exists() and not settings.overwrite:
        meta = read_meta(folder)
        if (meta.source.sha256, meta.tokenizer["kind"]) == (recipe.source.sha256, recipe.tokenizer):
            print(f"{folder} is prepared already; next: {next_step(folder)}")
            return
    file = fetch(recipe.source, Path(settings.data_dir))
    print(f"{recipe.title}; licence: {recipe.licence}")
    text = Text((file,), "utf-8", (str(file),))
    chosen = settings.model_copy(update={"tokenizer": recipe.tokenizer, "val_fraction": recipe.val_fraction})
    with new_folder(folder, overwrite=settings.overwrite) as scratch:
        meta = prepare(text, scratch, chosen, recipe=name)
    report(meta, folder)


def prepare_files(words: list[str], settings: PrepareSettings) -> None:
    """Prepare the user's own text."""
    name = settings.name or (Path(words[0]).stem if len(words) == 1 and words[0] != "-" else "")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError("give the data set a name of letters, digits, '_', '-' and '.': --name=NAME")
    if name == "downloads":
        raise UsageError("--name=downloads is taken by fetched files; choose another")
    folder = Path(settings.data_dir) / name
    with new_folder(folder, overwrite=settings.overwrite) as scratch:
        text = open_text(words, settings.encoding, scratch.parent)
        meta = prepare(text, scratch, settings, recipe="")
    report(meta, folder)


@contextmanager
def new_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a scratch folder that becomes `folder` at the end, whole; a failure leaves nothing behind."""
    if folder.exists():
        if not overwrite:
            raise Failure(f"{folder} holds a data set already; add --overwrite to replace it, or --name=ANOTHER")
        if not (folder / META).exists():
            raise Failure(f"{folder} is no data set, so it is not replaced; choose another --name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        scratch = Path(temporary) / "new"
        scratch.mkdir()
        yield scratch
        old = Path(temporary) / "old"
        if folder.exists():
            folder.rename(old)
        try:
            scratch.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


def prepare(text: Text, folder: Path, settings: PrepareSettings, recipe: str) -> Meta:
    """Read a text twice and write its shards and meta.json into a folder.

    Raises:
        Failure: the text cannot be read or is too short to split.
    """
    stamps = text.stamps()
    total_bytes = sum(size for size, _ in stamps)
    with tqdm(total=2 * total_bytes, unit="B", unit_scale=True, desc="counting", disable=None) as bar:
        survey = Survey(text, settings, bar)
        bar.set_description("encoding")
        train_characters = int(survey.characters * (1 - settings.val_fraction))
        lengths = {"train": train_characters, "val": survey.characters - train_characters}
        encoders = [
            SplitEncoder(folder, *length, survey.tokenizer, settings.shard_tokens) for length in lengths.items()
        ]
        rest = ""
        for piece in text.read(lambda chunk: bar.update(len(chunk))):
            rest = encoders[1].feed(encoders[0].feed(piece))
        train, val = (encoder.close() for encoder in encoders)
    if rest or train.characters + val.characters != survey.characters or text.stamps() != stamps:
        raise Failure(f"{', '.join(text.names)}: the text changed while it was read; try again")
    for name, split in (("training", train), ("validation", val)):
        if split.tokens < 2:
            raise Failure(
                f"{', '.join(text.names)}: too short: {survey.characters} characters leave too few tokens for {name} "
                f"({split.tokens}, and predicting takes 2); use more text"
            )
    meta = Meta(
        format=FORMAT,
        recipe=recipe,
        tokenizer=survey.tokenizer.to_plain(),
        vocab_size=survey.tokenizer.vocab_size,
        val_fraction=settings.val_fraction,
        source=SourceMeta(names=list(text.names), bytes=total_bytes, sha256=survey.sha256),
        train=train,
        val=val,
    )
    write_dataset(folder, meta)
    return meta


class Survey:
    """The first reading: how long the text is, its checksum, and the tokenizer that it asks for."""

    def __init__(self, text: Text, settings: PrepareSettings, bar: "tqdm[Any]") -> None:
        """Read the whole text."""
        self.characters = 0
        digest, helper = hashlib.sha256(), Helper()

        def on_chunk(chunk: bytes) -> None:
            helper.do(digest.update, chunk)
            bar.update(len(chunk))

        def pieces() -> Iterator[str]:
            for piece in text.read(on_chunk):
                if self.characters == 0 and piece.startswith("\ufeff"):
                    warn("the text begins with a byte order mark; --encoding=utf-8-sig leaves it out")
                self.characters += len(piece)
                yield piece

        self.tokenizer = make_tokenizer(settings, pieces())
        helper.wait()
        self.sha256 = digest.hexdigest()


class Helper:
    """A thread that hashes or writes while the next piece is being read: in order, one piece behind at most."""

    def __init__(self) -> None:
        """Begin with nothing to do."""
        self._thread = ThreadPoolExecutor(1)
        self._work: Future[object] | None = None

    def do(self, work: Callable[..., object], *arguments: object) -> None:
        """Do something once what went before is done, and raise what that raised."""
        self.wait()
        self._work = self._thread.submit(work, *arguments)

    def wait(self) -> None:
        """Wait for the work, and raise what it raised."""
        if self._work:
            self._work.result()


def make_tokenizer(settings: PrepareSettings, pieces: Iterator[str]) -> Tokenizer:
    """Return the tokenizer that the settings name, having read all pieces of the text.

    Raises:
        Failure: there is no text at all.
    """
    first = next(pieces, "")
    if not first:
        raise Failure("the text is empty; there is nothing to learn from")
    if settings.tokenizer == "char":
        return CharTokenizer.learn(itertools.chain([first], pieces))
    for _ in pieces:  # counted and checked, though nothing is learned from them
        pass
    return ByteTokenizer() if settings.tokenizer == "byte" else GPT2Tokenizer(Path(settings.data_dir))


class SplitEncoder:
    """The second reading, for one split: encodes pieces as they come, and cuts only where it makes no difference."""

    def __init__(self, folder: Path, split: str, characters: int, tokenizer: Tokenizer, shard_tokens: int) -> None:
        """Begin a split of so many characters."""
        self.characters, self.missing = characters, characters
        self.tokenizer = tokenizer
        self.writer = ShardWriter(folder, split, tokenizer.vocab_size, shard_tokens)
        self.helper = Helper()
        self.pending = ""

    def feed(self, piece: str) -> str:
        """Take what the split still lacks from the next piece of the text, and return the rest."""
        own, rest = piece[: self.missing], piece[self.missing :]
        if own:
            self.missing -= len(own)
            self.pending += own
            cut = self.tokenizer.split_point(self.pending) if self.missing else len(self.pending)
            self.helper.do(self.writer.write, self.tokenizer.encode(self.pending[:cut]))
            self.pending = self.pending[cut:]
            if not self.missing:
                self.helper.do(self.writer.finish)  # hashes the last file, while the next split is encoded
        return rest

    def close(self) -> SplitMeta:
        """Wait for the files, and tell what was written."""
        self.helper.wait()
        return self.writer.meta(self.characters - self.missing)


def report(meta: Meta, folder: Path) -> None:
    """Say what was made and what to run next."""
    tokens, characters = (
        meta.train.tokens + meta.val.tokens,
        meta.train.characters + meta.val.characters,
    )
    print(
        f"{folder}: {characters:,} characters, {tokens:,} tokens "
        f"({meta.train.tokens:,} to train, {meta.val.tokens:,} to validate)\n"
        f"vocabulary: {meta.vocab_size:,} ({meta.tokenizer['kind']}), {characters / tokens:.2f} characters per token\n"
        f"next: {next_step(folder)}"
    )


def next_step(folder: Path) -> str:
    """Return the command that trains on a data set."""
    name = folder.name
    dataset = "" if name == "shakespeare_char" else f" --dataset={name} --out_dir=out/{name}"
    place = "" if folder.parent == Path("data") else f" --data_dir={shlex.quote(str(folder.parent))}"
    return f"python train.py config/quick.toml{dataset}{place}"


if __name__ == "__main__":
    with plain_errors():
        main()
