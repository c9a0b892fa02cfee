"""Token shards on disk: data/<name>/{train,val}-NNNNN.npy and meta.json.

A shard is a one-dimensional .npy array of the smallest unsigned type that holds the vocabulary. meta.json
holds the format's number, the tokenizer, counts, and a SHA-256 for each shard; nothing is used unverified.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from glyphgpt.cli import command
from glyphgpt.data.background import BackgroundWorker
from glyphgpt.data.tokenizers import Tokenizer, Tokens, token_dtype, tokenizer_from_dict
from glyphgpt.errors import UserError, format_os_error, wrap_write_errors
from glyphgpt.files import file_sha256

FORMAT = 1
META = "meta.json"
OPEN_SHARDS = 64
"""Shards open at once, at most: systems allow a process a few hundred files."""

FileIdentity = tuple[int, int, int, int]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_Plain):
    """One file of tokens."""

    file: Annotated[str, Field(pattern=r"^(train|val)-\d{5,}\.npy$")]
    tokens: Annotated[int, Field(ge=0)]
    sha256: str


class SplitMeta(_Plain):
    """One split's counts and files."""

    tokens: Annotated[int, Field(ge=0)]
    characters: Annotated[int, Field(ge=0)]
    sha256: str
    """Of the tokens, as their bytes stand in the shards, however they are cut into these."""
    shards: list[Shard]


class SourceMeta(_Plain):
    """The text that a data set was made from."""

    names: list[str]
    bytes: int
    sha256: str


class DatasetMeta(_Plain):
    """What meta.json holds."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    recipe: str
    tokenizer: dict[str, Any]
    vocab_size: Annotated[int, Field(ge=1)]
    val_fraction: float
    source: SourceMeta
    train: SplitMeta
    val: SplitMeta

    @property
    def fingerprint(self) -> str:
        """Return a name for the very tokens, in their order."""
        facts = [self.tokenizer, self.train.sha256, self.val.sha256]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class ShardWriter:
    """Writes a stream of tokens as shards of at most `shard_tokens` each."""

    def __init__(
        self, folder: Path, split: str, vocab_size: int, shard_tokens: int, shards: Iterable[Shard] = ()
    ) -> None:
        """Begin a split, or go on after finished `shards`; `folder` exists."""
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.dtype = token_dtype(vocab_size)
        self.shards = list(shards)
        self._file: BinaryIO | None = None
        self._count = 0  # tokens in the file
        self._digest = hashlib.sha256()  # of the file, should it become full
        self._all = hashlib.sha256()  # of the tokens
        self._hasher = BackgroundWorker()
        for shard in self.shards:
            self._all.update(np.lib.format.open_memmap(folder / shard.file, mode="r").data)

    def write(self, tokens: Tokens) -> None:
        """Append tokens, shape (n,)."""
        while tokens.size:
            file = self._file or self._begin()
            part = tokens[: self.shard_tokens - self._count]
            data = np.ascontiguousarray(part, dtype=self.dtype).data
            self._hasher.submit(self._digest.update, data)
            self._hasher.submit(self._all.update, data)
            with wrap_write_errors(self._path):
                file.write(data)
            self._count += part.size
            tokens = tokens[part.size :]
            if self._count == self.shard_tokens:
                self._end(file)

    def finish(self) -> None:
        """Finish the last file, if it was begun."""
        if self._file:
            self._end(self._file)
        self._hasher.wait()
        self._hasher.close()

    def meta(self, characters: int) -> SplitMeta:
        """Tell what the finished files hold, which came from so many characters."""
        return SplitMeta(tokens=self.tokens, characters=characters, sha256=self._all.hexdigest(), shards=self.shards)

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return sum(shard.tokens for shard in self.shards) + (self._count if self._file else 0)

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.shards):05d}.npy"

    def _begin(self) -> BinaryIO:
        self._count = 0
        header = self._header(self.shard_tokens)
        self._digest = hashlib.sha256(header)
        with wrap_write_errors(self._path):
            self._file = self._path.open("wb")
            self._file.write(header)
        return self._file

    def _header(self, tokens: int) -> bytes:
        """Return the .npy header of so many tokens; it is as long for fewer, so it can be written over."""
        header = BytesIO()
        kind = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(header, {**kind, "shape": (tokens,)})
        return header.getvalue()

    def _end(self, file: BinaryIO) -> None:
        full = self._count == self.shard_tokens
        with wrap_write_errors(self._path):
            if not full:
                file.seek(0)
                file.write(self._header(self._count))
            file.close()
        self._file = None
        self._hasher.wait()
        digest = self._digest.hexdigest() if full else file_sha256(self._path)
        self.shards.append(Shard(file=self._path.name, tokens=self._count, sha256=digest))


@dataclass(frozen=True)
class ShardFile:
    """The tokens of a shard on disk, mapped into memory while they are read: a slice of it is an array."""

    path: Path
    stat: FileIdentity
    size: int
    dtype: np.dtype[Any]

    def __getitem__(self, place: slice) -> Tokens:
        return map_shard(self.path, self.stat)[place]


@lru_cache(maxsize=OPEN_SHARDS)
def map_shard(path: Path, stat: FileIdentity) -> Tokens:
    """Map a shard into memory, if it still is the file that was verified.

    Raises:
        UserError: it is not, or cannot be read.
    """
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")  # never unpickles
        unchanged = file_identity(path) == stat
    except OSError as error:
        raise UserError(format_os_error(error)) from error
    if not unchanged:
        raise UserError(f"{path}: changed since it was opened; start again, on the new data")
    return tokens.view(np.ndarray)  # whose slices, unlike a memmap's, cost next to nothing


def file_identity(path: Path) -> FileIdentity:
    """Return what changes when a file is replaced or written to."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class Split:
    """One split's tokens."""

    shards: tuple[Tokens | ShardFile, ...]
    characters: int

    @cached_property
    def ends(self) -> list[int]:
        """Where each shard ends, in tokens from the split's beginning."""
        return list(accumulate(shard.size for shard in self.shards))

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return self.ends[-1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the ids."""
        return self.shards[0].dtype

    def slice(self, start: int, stop: int) -> Tokens:
        """Return the tokens from `start` up to `stop`, shape (stop - start,), across shards."""
        number = bisect_right(self.ends, start)
        if number < len(self.shards) and stop <= self.ends[number]:
            return self._part(number, start, stop)
        tokens = np.empty(max(0, min(stop, self.tokens) - start), dtype=self.dtype)
        done = 0
        while done < tokens.size:  # copied one by one, so that few files are open at once
            part = self._part(number, start + done, stop)
            tokens[done : done + part.size] = part
            done, number = done + part.size, number + 1
        return tokens

    def _part(self, number: int, start: int, stop: int) -> Tokens:
        """Return those of the tokens from `start` up to `stop` that are in a shard, which reaches `start`."""
        begin = self.ends[number] - self.shards[number].size
        return self.shards[number][start - begin : stop - begin]


@dataclass(frozen=True)
class Dataset:
    """A prepared data set, verified."""

    folder: Path
    meta: DatasetMeta
    tokenizer: Tokenizer
    train: Split
    val: Split


def read_meta(folder: Path) -> DatasetMeta:
    """Read a data set's meta.json.

    Raises:
        UserError: it is missing or not one of this format.
    """
    path = folder / META
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        where = [] if folder.parent == Path("data") else [f"--data_dir={folder.parent}"]
        recipe = command("prepare.py", folder.name, *where)
        own = command("prepare.py", "FILE", f"--name={folder.name}", *where)
        raise UserError(f"{folder}: no dataset here; prepare it first: {recipe} (a recipe) or {own}") from error
    except OSError as error:
        raise UserError(format_os_error(error)) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); prepare the dataset again") from error
    if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT:
        raise UserError(f"{path}: written by a newer glyphgpt (format {data['format']}); update glyphgpt")
    try:
        return DatasetMeta.model_validate(data)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path}: damaged at '{place}'; prepare the dataset again") from error


def find_dataset(name: str, data_dir: Path) -> Path:
    """Return the folder of a dataset that is named as one in `data_dir`, or by its path."""
    inside, path = data_dir / name, Path(name)
    return inside if (inside / META).is_file() or path.parent == Path() else path


def load_dataset(folder: Path, data_dir: Path) -> Dataset:
    """Open a data set, every shard checked against meta.json.

    Raises:
        UserError: it is missing, damaged, or not of this format.
    """
    meta = read_meta(folder)
    tokenizer = tokenizer_from_dict(meta.tokenizer, data_dir)
    if tokenizer.vocab_size != meta.vocab_size:
        raise UserError(f"{folder / META}: tokenizer and vocab_size disagree; prepare the dataset again")
    train, val = (_load_split(folder, split, meta.vocab_size) for split in (meta.train, meta.val))
    return Dataset(folder, meta, tokenizer, train, val)


def _load_split(folder: Path, split: SplitMeta, vocab_size: int) -> Split:
    shards = tuple(_load_shard(folder / shard.file, shard, vocab_size) for shard in split.shards)
    if sum(shard.size for shard in shards) != split.tokens or split.tokens < 2 or split.characters < 1:
        raise UserError(f"{folder / META}: the counts of tokens disagree; prepare the dataset again")
    return Split(shards, split.characters)


def _load_shard(path: Path, shard: Shard, vocab_size: int) -> ShardFile:
    try:
        stat, intact = file_identity(path), file_sha256(path) == shard.sha256
        tokens = map_shard(path, stat) if intact else None
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing; prepare the dataset again") from error
    except OSError as error:
        raise UserError(format_os_error(error)) from error
    except UserError:
        raise
    except Exception as error:  # a crafted header can make numpy raise anything
        raise UserError(f"{path}: damaged ({error}); prepare the dataset again") from error
    if tokens is None:
        raise UserError(f"{path}: damaged, its checksum is another; prepare the dataset again")
    fits = tokens.ndim == 1 and tokens.dtype == token_dtype(vocab_size) and tokens.size == shard.tokens
    if not fits or (tokens.size and int(tokens.max()) >= vocab_size):
        raise UserError(f"{path}: does not hold what {META} tells; prepare the dataset again")
    return ShardFile(path, stat, tokens.size, tokens.dtype)


def write_meta(folder: Path, meta: DatasetMeta) -> None:
    """Write meta.json into a folder that holds the shards."""
    text = json.dumps(meta.model_dump(), ensure_ascii=False, indent=1)
    with wrap_write_errors(folder / META):
        (folder / META).write_text(text + "\n", encoding="utf-8")
