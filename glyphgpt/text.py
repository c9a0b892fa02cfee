"""The texts that you name: files, folders, patterns and standard input, plain or packed, as documents.

A file is one document, or, if it is JSON Lines or Parquet, as many as it has records. What is read is a stream of
lists of documents, cut anywhere: the last of a list and the first of the next are parts of the same document. So
["a", "b"] and then ["c"] are the documents "a" and "bc".
"""

import codecs
import glob
import gzip
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO, cast

from glyphgpt.errors import Failure, UsageError

CHUNK_BYTES = 1 << 18
STANDARD_INPUT = "standard input"
Documents = list[str]
OnChunk = Callable[[bytes], object]


@dataclass(frozen=True)
class Text:
    """A text in one or more files, read in pieces so that its length does not matter."""

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    """As the user knows the files."""
    encoding: str = "utf-8"
    field: str = "text"
    """Of a record, which holds its text."""
    separate: bool = False
    """Whether documents are told apart; else all is one, and each record ends with a new line."""

    @property
    def stays(self) -> bool:
        """Whether it can be read again in another process."""
        return STANDARD_INPUT not in self.names

    def stamps(self) -> list[tuple[int, int]]:
        """Return each file's size and the time of its last change: other stamps, another text."""
        return [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in self.paths)]

    def read(self, on_chunk: OnChunk) -> Iterator[Documents]:
        """Yield the documents, one file after the other, and call `on_chunk` with all bytes of the files on the way.

        Raises:
            Failure: bytes that are no text, or a damaged file; names the file and the place.
        """
        begun = False
        for path, name in zip(self.paths, self.names, strict=True):
            if is_parquet(path):
                lists = parquet_records(path, name, self.field, on_chunk)
            else:
                pieces = decoded(byte_chunks(path, name, on_chunk), name, self.encoding)
                lists = json_records(pieces, name, self.field) if is_json_lines(path) else one_document(pieces)
            for number, documents in enumerate(lists):
                if self.separate:
                    new = is_record_file(path) or number == 0
                    yield ["", *documents] if begun and new else documents
                else:
                    yield ["".join(f"{record}\n" for record in documents)] if is_record_file(path) else documents
                begun = True


def is_parquet(path: Path) -> bool:
    """Tell whether a file's name is that of a Parquet file."""
    return path.suffix.lower() == ".parquet"


def is_json_lines(path: Path) -> bool:
    """Tell whether a file's name is that of JSON Lines, packed or not."""
    plain = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path
    return plain.suffix.lower() in (".jsonl", ".ndjson")


def is_record_file(path: Path) -> bool:
    """Tell whether a file holds records, each a document of its own."""
    return is_parquet(path) or is_json_lines(path)


class Watched:
    """A file that tells of each chunk read from it."""

    def __init__(self, file: BinaryIO, on_chunk: OnChunk) -> None:
        """Stand before an open file."""
        self._file, self._on_chunk = file, on_chunk

    def read(self, size: int = -1) -> bytes:
        """Read up to so many bytes."""
        chunk = self._file.read(size)
        self._on_chunk(chunk)
        return chunk


def byte_chunks(path: Path, name: str, on_chunk: OnChunk) -> Iterator[bytes]:
    """Yield a file's bytes, unpacked if its name ends in .gz or .zst.

    Raises:
        Failure: it cannot be unpacked.
    """
    with path.open("rb") as file:
        watched, suffix = cast(BinaryIO, Watched(file, on_chunk)), path.suffix.lower()
        if suffix not in (".gz", ".zst"):
            while chunk := watched.read(CHUNK_BYTES):
                yield chunk
            return
        damage: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
        if suffix == ".gz":
            unpacked: Any = gzip.GzipFile(fileobj=watched)
        else:
            zstd = zstandard()
            any_window = {zstd.DecompressionParameter.window_log_max: 31}  # as --long=31 packs
            unpacked, damage = zstd.ZstdFile(watched, options=any_window), (EOFError, zstd.ZstdError)
        try:
            while chunk := unpacked.read(CHUNK_BYTES):
                yield chunk
        except damage as error:
            raise Failure(f"{name}: cannot be unpacked: {error}; get the file anew, or leave it out") from error


def zstandard() -> Any:
    """Return Python's own module for Zstandard, or for older Pythons the same from PyPI."""
    if sys.version_info >= (3, 14):
        from compression import zstd  # noqa: PLC0415  (only for those who use it)
    else:
        from backports import zstd  # noqa: PLC0415
    return zstd


def decoded(chunks: Iterator[bytes], name: str, encoding: str) -> Iterator[str]:
    """Yield the text that bytes spell, in pieces that are not empty.

    Raises:
        Failure: they are no text of that encoding.
    """
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    read_bytes = 0
    for chunk in chain(chunks, [b""]):
        held_back = len(decoder.getstate()[0])  # of a character that the last chunk cut
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            place = read_bytes - held_back + error.start
            raise Failure(
                f"{name}: byte {error.object[error.start]:#04x} at offset {place:,} is not "
                f"{encoding} text; convert the file, leave it out, or name its --encoding"
            ) from error
        except UnicodeError as error:  # of encodings that begin with a mark of their byte order
            raise Failure(f"{name}: is not {encoding} text: {error}; name its --encoding, utf-16-le say") from error
        if text:
            yield text
        read_bytes += len(chunk)


def one_document(pieces: Iterator[str]) -> Iterator[Documents]:
    """Yield the pieces of a single document."""
    return ([piece] for piece in pieces)


def json_records(pieces: Iterator[str], name: str, field: str) -> Iterator[Documents]:
    """Yield the texts of JSON Lines; blank lines are left out.

    Raises:
        Failure: a line is not a JSON object with such a field of text.
    """
    begun: list[str] = []  # parts of a line
    numbers = count(1)
    for piece in chain(pieces, ["\n"]):  # the last line may lack its end
        *lines, rest = piece.split("\n")
        if lines:
            lines[0] = "".join([*begun, lines[0]])
            begun = []
        begun.append(rest)
        numbered = zip(lines, numbers, strict=False)
        records = [json_text(line, f"{name}: line {number:,}", field) for line, number in numbered if line.strip()]
        if records:
            yield records


def json_text(line: str, place: str, field: str) -> str:
    """Return the field of a JSON object in a line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Failure(f"{place} is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise Failure(f"{place} is not a JSON object with a field '{field}'")
    if field not in record:
        raise Failure(f"{place} has no field '{field}'; {fields_hint(list(record))}")
    return checked(record[field], place, field)


def parquet_records(path: Path, name: str, field: str, on_chunk: OnChunk) -> Iterator[Documents]:
    """Yield the texts of a Parquet file.

    Raises:
        Failure: pyarrow is not installed, the file is damaged, or a row has no such field of text.
    """
    try:
        import pyarrow  # noqa: PLC0415  (large, and only for those who use it)
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise Failure(f"{name}: reading Parquet takes pyarrow: pip install 'glyphgpt[parquet]'") from error
    with path.open("rb") as raw:
        try:
            table, row = parquet.ParquetFile(path), 0
            if field not in table.schema_arrow.names:
                raise Failure(f"{name}: has no column '{field}'; {fields_hint(table.schema_arrow.names)}")
            for batch in table.iter_batches(batch_size=1000, columns=[field]):
                values = batch.column(0).to_pylist()
                records = [checked(v, f"{name}: row {row + i:,}", field) for i, v in enumerate(values, start=1)]
                row += len(records)
                # the very bytes that it read lie scattered; those up to the same share of the file stand for them
                read_up_to(raw, path.stat().st_size * row // table.metadata.num_rows, on_chunk)
                yield records
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise Failure(f"{name}: cannot be read: {reason}; get the file anew, or leave it out") from error
        read_up_to(raw, path.stat().st_size, on_chunk)


def read_up_to(file: BinaryIO, place: int, on_chunk: OnChunk) -> None:
    """Tell of the bytes from where a file is up to a place."""
    while chunk := file.read(min(CHUNK_BYTES, place - file.tell())):
        on_chunk(chunk)


def checked(value: object, place: str, field: str) -> str:
    """Return a record's text.

    Raises:
        Failure: it is none.
    """
    if not isinstance(value, str):
        raise Failure(f"{place}: '{field}' is not text but {json.dumps(value, default=str)[:50]}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Failure(f"{place}: '{field}' holds half a surrogate pair, which is no character") from error
    return value


def fields_hint(names: Sequence[str]) -> str:
    """Say which fields there are."""
    return f"name another: --text_field=..., of {', '.join(names[:10]) or 'none'}"


def open_text(words: Sequence[str], scratch: Path, encoding: str = "utf-8", **form: Any) -> Text:
    """Make one text of files, folders (every file below them, sorted, hidden ones left out), patterns and -.

    Standard input (-) is kept in the folder `scratch`, since it is read twice. `form` are other fields of Text.

    Raises:
        UsageError: a file is missing, or the encoding unknown.
    """
    if not is_charset(encoding):
        raise UsageError(
            f"--encoding must be a character set that Python knows, utf-8 or latin-1 say, not {encoding!r}"
        )
    if list(words).count("-") > 1:
        raise UsageError("standard input (-) can be read only once")
    paths: list[Path] = []
    names: list[str] = []
    for word in words:
        if word == "-":
            copy = scratch / "standard-input"
            with copy.open("wb") as out:
                shutil.copyfileobj(sys.stdin.buffer, out)
            found = [copy]
        else:
            found = list(files_named(word))
        paths += found
        names += [STANDARD_INPUT] if word == "-" else [str(path) for path in found]
    return Text(tuple(paths), tuple(names), encoding, **form)


def read_text(word: str) -> str:
    """Read a whole UTF-8 file, or - for standard input.

    Raises:
        Failure: it is missing, or no text.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return "".join(chain.from_iterable(open_text([word], Path(scratch)).read(lambda _: None)))


def read_lines(word: str) -> list[str]:
    """Read a file's lines; any white space within one becomes a single space, and none stays around it.

    Raises:
        Failure: it is missing, or no text.
    """
    lines = read_text(word).split("\n")
    return [" ".join(line.split()) for line in (lines if lines[-1] else lines[:-1])]


def is_charset(encoding: str) -> bool:
    """Tell whether Python knows a character set of that name; some of its codecs are something else."""
    try:
        "".encode(encoding)
    except (LookupError, UnicodeError, ValueError):
        return False
    others = {"idna", "punycode", "raw-unicode-escape", "unicode-escape", "utf-7"}
    return codecs.lookup(encoding).name.replace("_", "-") not in others


def files_named(word: str) -> Iterator[Path]:
    """Yield the files that a word of the command line names: itself, all below a folder, or all that fit a pattern."""
    path = Path(word)
    if path.is_dir():
        inside = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        found = sorted(p for p in inside if p.is_file())
        if not found:
            raise UsageError(f"{path}: this folder holds no files")
        yield from found
    elif path.exists():
        yield path
    elif fitting := sorted(glob.glob(word, recursive=True)):  # noqa: PTH207  (pathlib's takes no absolute patterns)
        yield from dict.fromkeys(file for name in fitting for file in files_named(name))  # each once
    else:
        raise UsageError(f"{path}: no such file or folder")
