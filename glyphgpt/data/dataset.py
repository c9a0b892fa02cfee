"""Datasets on disk: token shards data/<name>/{train,val,test}-NNNNN.npy and meta.json; few have a test split.

A shard is a one-dimensional .npy array of the smallest unsigned dtype that holds the vocabulary. meta.json holds the
format number, the tokenizer, the counts, and the SHA-256 of each shard, which is verified before the shard is used.
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
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from glyphgpt.cli import ROOT, command, is_path
from glyphgpt.data.background import BackgroundWorker
from glyphgpt.data.sources import list_names
from glyphgpt.data.tokenizers import Tokenizer, Tokens, token_dtype, tokenizer_from_dict
from glyphgpt.errors import UserError, format_os_error, wrap_write_errors
from glyphgpt.files import META, file_sha256

FORMAT = 1
CHUNK_TOKENS = 1 << 24  # read at once
OPEN_SHARDS = 64  # the most shards open at once, since systems limit a process to a few hundred open files

FileIdentity = tuple[int, int, int, int]


class _StrictModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_StrictModel):
    """One shard file."""

    file: Annotated[str, Field(pattern=r"^(train|val|test)-\d{5,}\.npy$")]
    tokens: Annotated[int, Field(ge=0)]
    sha256: str


class SplitMeta(_StrictModel):
    """The counts and the shards of a split."""

    tokens: Annotated[int, Field(ge=0)]
    characters: Annotated[int, Field(ge=0)]
    sha256: str
    """Checksum of the token bytes of all shards without their headers; it does not depend on the shard size."""
    shards: list[Shard]


class SourceMeta(_StrictModel):
    """The text that a dataset was made from."""

    names: list[str]
    bytes: int
    sha256: str


class Place(_StrictModel):
    """A place in a text."""

    file: str
    line: int

    def __str__(self) -> str:
        """Return the place as compilers print it."""
        return f"{self.file}:{self.line}"


class Found(_StrictModel):
    """Something that occurs in a text: what it is, how often, and where first."""

    what: str
    count: int
    place: Place


class TextReport(_StrictModel):
    """The results of an inspection."""

    characters: int
    lines: int
    kinds: dict[str, int]
    """Numbers of characters: letters by their script, digits, and so on; the most frequent first."""
    rare: int
    """Number of different characters that occur less than FEW times (glyphgpt/data/inspection.py)."""
    rarest: list[Found]
    """The rarest characters, the rarest first."""
    examined: int
    """Number of characters in which problems, and repeated and long lines were looked for."""
    problems: list[Found]
    """What may disturb training: line ends, forms of characters, long lines."""
    longest_line: int
    """Characters of the longest line."""
    repeated: float
    """Fraction of the characters that are in lines which occurred before, except short ones."""
    leaked: float = 0.0
    """Fraction of the validation text that occurs in the training text, in runs of 50 or more characters or in whole
    records."""


class DatasetMeta(_StrictModel):
    """The content of meta.json."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    recipe: str
    tokenizer: dict[str, Any]
    vocab_size: Annotated[int, Field(ge=1)]
    val_fraction: float
    source: SourceMeta
    train: SplitMeta
    val: SplitMeta
    test: SplitMeta | None = None
    report: TextReport | None = None

    @property
    def fingerprint(self) -> str:
        """Return a checksum of the tokenizer and of all tokens for training and validation in their order."""
        facts = [self.tokenizer, self.train.sha256, self.val.sha256]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class ShardWriter:
    """Writes the tokens of a split as shards of `shard_tokens` tokens each; the last shard may hold fewer."""

    def __init__(
        self, folder: Path, split: str, vocab_size: int, shard_tokens: int, shards: Iterable[Shard] = ()
    ) -> None:
        """Start a split in an existing folder, or continue it after the finished `shards`."""
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.dtype = token_dtype(vocab_size)
        self.shards = list(shards)
        self._file: BinaryIO | None = None
        self._count = 0  # tokens in the open file
        self._file_digest = hashlib.sha256()  # valid only if the file becomes full
        self._split_digest = hashlib.sha256()
        self._hasher = BackgroundWorker()
        for shard in self.shards:
            self._split_digest.update(np.lib.format.open_memmap(folder / shard.file, mode="r").data)

    def write(self, tokens: Tokens) -> None:
        """Append tokens, shape (n,)."""
        while tokens.size:
            file = self._file or self._open_shard()
            part = tokens[: self.shard_tokens - self._count]
            data = np.ascontiguousarray(part, dtype=self.dtype).data
            self._hasher.submit(self._file_digest.update, data)
            self._hasher.submit(self._split_digest.update, data)
            with wrap_write_errors(self._path):
                file.write(data)
            self._count += part.size
            tokens = tokens[part.size :]
            if self._count == self.shard_tokens:
                self._close_shard(file)

    def finish(self) -> None:
        """Close the last shard."""
        if self._file:
            self._close_shard(self._file)
        self._hasher.flush()
        self._hasher.close()

    def meta(self, characters: int) -> SplitMeta:
        """Return the split's entry in meta.json; `characters` is the length of its text."""
        sha256 = self._split_digest.hexdigest()
        return SplitMeta(tokens=self.tokens, characters=characters, sha256=sha256, shards=self.shards)

    @property
    def tokens(self) -> int:
        """The number of tokens written so far."""
        return sum(shard.tokens for shard in self.shards) + (self._count if self._file else 0)

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.shards):05d}.npy"

    def _open_shard(self) -> BinaryIO:
        self._count = 0
        header = self._header(self.shard_tokens)
        self._file_digest = hashlib.sha256(header)
        with wrap_write_errors(self._path):
            self._file = self._path.open("wb")
            self._file.write(header)
        return self._file

    def _header(self, tokens: int) -> bytes:
        """Return the .npy header of an array; NumPy pads it, so that the header of a shorter array is as long."""
        header = BytesIO()
        descr = np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": (tokens,)})
        return header.getvalue()

    def _close_shard(self, file: BinaryIO) -> None:
        is_full = self._count == self.shard_tokens
        with wrap_write_errors(self._path):
            if not is_full:
                file.seek(0)
                file.write(self._header(self._count))
            file.close()
        self._file = None
        self._hasher.flush()
        digest = self._file_digest.hexdigest() if is_full else file_sha256(self._path)
        self.shards.append(Shard(file=self._path.name, tokens=self._count, sha256=digest))


@dataclass(frozen=True)
class ShardFile:
    """A verified shard on disk, which is mapped into memory when it is read; its slices are arrays."""

    path: Path
    identity: FileIdentity
    size: int
    dtype: np.dtype[Any]

    def __getitem__(self, index: slice) -> Tokens:
        return map_shard(self.path, self.identity)[index]


@lru_cache(maxsize=OPEN_SHARDS)
def map_shard(path: Path, identity: FileIdentity) -> Tokens:
    """Map a shard into memory.

    Raises:
        UserError: The file is not the one with this identity, or it cannot be read.
    """
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")  # never unpickles
        is_same = file_identity(path) == identity
    except OSError as error:
        raise UserError(format_os_error(error)) from error
    if not is_same:
        raise UserError(f"{path}: changed while it was in use; start again to use the new data")
    return tokens.view(np.ndarray)  # slicing a plain array is much faster than slicing a memmap


def file_identity(path: Path) -> FileIdentity:
    """Return values that change when a file is replaced or written."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class Split:
    """The tokens of a split."""

    shards: tuple[Tokens | ShardFile, ...]
    characters: int
    end_of_record: int | None = None
    """The token before and after each record, in a text of records."""

    @cached_property
    def shard_ends(self) -> list[int]:
        """The end of each shard, in tokens from the start of the split."""
        return list(accumulate(shard.size for shard in self.shards))

    @property
    def tokens(self) -> int:
        """The number of tokens in all shards."""
        return self.shard_ends[-1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the tokens."""
        return self.shards[0].dtype

    @cached_property
    def record_ends(self) -> NDArray[np.int64] | None:
        """The positions of end_of_record; None where there are no records."""
        if self.end_of_record is None:
            return None
        starts = range(0, self.tokens, CHUNK_TOKENS)
        parts = (np.flatnonzero(self.slice(start, start + CHUNK_TOKENS) == self.end_of_record) for start in starts)
        return np.concatenate([part + start for part, start in zip(parts, starts, strict=True)])

    def slice(self, start: int, stop: int) -> Tokens:
        """Return the tokens from `start` up to `stop`, shape (stop - start,), across shards."""
        index = bisect_right(self.shard_ends, start)
        if index < len(self.shards) and stop <= self.shard_ends[index]:
            return self._slice_shard(index, start, stop)
        tokens = np.empty(max(0, min(stop, self.tokens) - start), dtype=self.dtype)
        filled = 0
        while filled < tokens.size:  # one shard at a time, which keeps few files open
            part = self._slice_shard(index, start + filled, stop)
            tokens[filled : filled + part.size] = part
            filled, index = filled + part.size, index + 1
        return tokens

    def _slice_shard(self, index: int, start: int, stop: int) -> Tokens:
        """Return the tokens from `start`, which is in the shard, up to `stop` or the end of the shard."""
        shard_start = self.shard_ends[index] - self.shards[index].size
        return self.shards[index][start - shard_start : stop - shard_start]


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset whose shards have been verified."""

    folder: Path
    meta: DatasetMeta
    tokenizer: Tokenizer
    train: Split
    val: Split
    test: Split | None = None


def read_meta(folder: Path) -> DatasetMeta:
    """Read the meta.json of a dataset.

    Raises:
        UserError: The file is missing, damaged, or of a newer format.
    """
    path = folder / META
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        flags = [] if folder.parent == Path("data") else [f"--data_dir={folder.parent}"]
        own = command("prepare.py", "FILE", f"--name={folder.name}", *flags)
        names = [path.parent.name for path in sorted(folder.parent.glob(f"*/{META}"))]
        found = f"; datasets in {folder.parent}: {list_names(names)}" if names else ""
        is_recipe = is_path(str(ROOT / "data" / f"{folder.name}.toml"))
        prepare = f"{command('prepare.py', folder.name, *flags)} (a recipe)" if is_recipe else own
        raise UserError(f"{folder}: no dataset here; prepare it first: {prepare}{found}") from error
    except OSError as error:
        raise UserError(format_os_error(error)) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); prepare the dataset again") from error
    if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT:
        raise UserError(f"{path}: written by a newer glyphgpt (format {data['format']}); update glyphgpt")
    try:
        return DatasetMeta.model_validate(data)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path}: damaged at '{key}'; prepare the dataset again") from error


def find_dataset(name: str, data_dir: Path) -> Path:
    """Return the folder of a dataset, given its name in `data_dir` or its path."""
    inside, path = data_dir / name, Path(name)
    return inside if (inside / META).is_file() or path.parent == Path() else path


def load_dataset(folder: Path, data_dir: Path) -> Dataset:
    """Open a dataset and verify every shard against meta.json.

    Raises:
        UserError: The dataset is missing, damaged, or of a newer format.
    """
    meta = read_meta(folder)
    tokenizer = tokenizer_from_dict(meta.tokenizer, data_dir)
    if tokenizer.vocab_size != meta.vocab_size:
        raise UserError(f"{folder / META}: vocab_size does not match the tokenizer; prepare the dataset again")
    train, val, test = (
        _load_split(folder, split, meta.vocab_size, tokenizer.end_of_record) if split else None
        for split in (meta.train, meta.val, meta.test)
    )
    assert train
    assert val
    return Dataset(folder, meta, tokenizer, train, val, test)


def _load_split(folder: Path, split: SplitMeta, vocab_size: int, end_of_record: int | None) -> Split:
    shards = tuple(_load_shard(folder / shard.file, shard, vocab_size) for shard in split.shards)
    if sum(shard.size for shard in shards) != split.tokens or split.tokens < 2 or split.characters < 1:
        raise UserError(f"{folder / META}: the token counts do not match the shards; prepare the dataset again")
    loaded = Split(shards, split.characters, end_of_record)
    if end_of_record is not None and {int(loaded.slice(i, i + 1)[0]) for i in (0, split.tokens - 1)} != {end_of_record}:
        raise UserError(f"{folder / META}: the records are damaged; prepare the dataset again")
    return loaded


def _load_shard(path: Path, shard: Shard, vocab_size: int) -> ShardFile:
    try:
        identity, is_intact = file_identity(path), file_sha256(path) == shard.sha256
        tokens = map_shard(path, identity) if is_intact else None
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; prepare the dataset again") from error
    except OSError as error:
        raise UserError(format_os_error(error)) from error
    except UserError:
        raise
    except Exception as error:  # NumPy may raise anything for a malicious header
        raise UserError(f"{path}: damaged ({error}); prepare the dataset again") from error
    if tokens is None:
        raise UserError(f"{path}: damaged, its checksum does not match; prepare the dataset again")
    is_expected = tokens.ndim == 1 and tokens.dtype == token_dtype(vocab_size) and tokens.size == shard.tokens
    if not is_expected or (tokens.size and int(tokens.max()) >= vocab_size):
        raise UserError(f"{path}: does not match {META}; prepare the dataset again")
    return ShardFile(path, identity, tokens.size, tokens.dtype)


def write_meta(folder: Path, meta: DatasetMeta) -> None:
    """Write meta.json into the folder of the shards."""
    text = json.dumps(meta.model_dump(), ensure_ascii=False, indent=1)
    with wrap_write_errors(folder / META):
        (folder / META).write_text(text + "\n", encoding="utf-8")
