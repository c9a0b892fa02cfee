"""Texts in files, folders, patterns and standard input, plain or compressed, read as streams of documents.

A plain file is one document. A record file (JSON, CSV, Parquet) has one document per record. A stream yields lists of
documents, and may split a document: the last document of a list continues with the first of the next list. For example,
["a", "b"] and ["c"] are the documents "a" and "bc".
"""

import codecs
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from io import SEEK_END, BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from glyphgpt.data.formats import (
    HEAD_BYTES,
    check_format,
    decompress_command,
    is_parquet,
    open_decompressor,
    record_format,
    suggest_encoding,
)
from glyphgpt.data.records import Documents, csv_rows, json_records, json_values, parquet_rows
from glyphgpt.data.sources import STANDARD_INPUT, find_files, is_stream
from glyphgpt.errors import UsageError, UserError, sanitize, warn, wrap_write_errors

CHUNK_BYTES = 1 << 18
BYTE_ORDER_MARK = "\ufeff"
NUL_WARNING = "NUL characters (U+0000); check that this is text in the right encoding"
OnChunk = Callable[[bytes], object]
OnWarning = Callable[[str, str], object]
OnText = Callable[[str, str], object]


@dataclass(frozen=True)
class Text:
    """The text of one or more files, which is read as a stream."""

    paths: tuple[Path | None, ...]
    """None is standard input, which can be read only once."""
    names: tuple[str, ...]
    """The names of the files in messages."""
    encoding: str = "utf-8"
    field: str = "text"
    """The field of a record that holds its text."""
    keep_documents: bool = False
    """Whether documents stay separate while they are read; otherwise they are joined."""
    separate_documents: bool = False
    """Whether documents stay separate in the dataset; otherwise a newline follows each record."""
    rereadable: bool = True
    """Whether the text can be read again by another run."""
    can_set_encoding: bool = True
    """Whether the script has the option --encoding, which error messages then suggest."""

    def file_stats(self) -> list[tuple[int, int]]:
        """Return the size and modification time of each file, which reveal changes."""
        return [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in self.paths if path)]

    def total_bytes(self) -> int:
        """Return the size of all files."""
        return sum(size for size, _ in self.file_stats())

    def read(
        self, on_chunk: OnChunk, on_warning: OnWarning | None = None, on_text: OnText | None = None
    ) -> Iterator[Documents]:
        """Yield the documents of all files, and pass all bytes of the files to `on_chunk`, in order.

        `on_warning` is called with a warning and the name of a file, perhaps repeatedly; `on_text` with each part of
        the text and the name of its file.

        Raises:
            UserError: A file is damaged or cannot be decoded; the message names the file and the position.
        """
        started = False
        for path, name in zip(self.paths, self.names, strict=True):
            with ExitStack() as stack:
                file = TeeReader(stack.enter_context(open_binary(path, name)), on_chunk)
                has_records, batches = self._read_file(file, path, name, stack)
                for index, documents in enumerate(batches):
                    if on_warning:
                        if index == 0 and not has_records and documents[0].startswith(BYTE_ORDER_MARK):
                            on_warning(self._bom_warning(), name)
                        if any("\0" in document for document in documents):
                            on_warning(NUL_WARNING, name)
                    lines = [f"{record}\n" for record in documents] if has_records else documents
                    if on_text:
                        on_text("".join(lines), name)
                    parts = documents if self.separate_documents else lines
                    if self.keep_documents:
                        starts_document = has_records or index == 0
                        yield ["", *parts] if started and starts_document else parts
                        started = True
                    else:
                        yield ["".join(parts)]

    def _bom_warning(self) -> str:
        utf = re.match(r"utf-(?:16|32)", codecs.lookup(self.encoding).name)
        remedy = f"; remove it with --encoding={utf[0] if utf else 'utf-8-sig'}" if self.can_set_encoding else ""
        return f"the byte order mark at the start is kept as text{remedy}"

    def _read_file(
        self, file: "TeeReader", path: Path | None, name: str, stack: ExitStack
    ) -> tuple[bool, Iterator[Documents]]:
        """Return whether a file has records, and lists of its documents."""
        head = file.peek(HEAD_BYTES)
        if is_parquet(head, name):
            seekable = stack.enter_context(open_binary(path, name)) if path and path.is_file() else BytesIO(file.read())
            return True, parquet_rows(seekable, name, self.field, file.read_up_to)
        decompress = decompress_command(head, name)
        head, chunks = peek_head(byte_chunks(cast(BinaryIO, file), name, decompress))
        check_format(head, name, decompress)
        remedy = suggest_encoding(head, name, decompress, can_set_encoding=self.can_set_encoding)
        strings = decode_stream(chunks, name, self.encoding, remedy)
        match record_format(name):
            case "jsonl":
                return True, json_records(strip_bom(strings), name, self.field)
            case "json":
                return True, json_values(strip_bom(strings), name, self.field)
            case "csv" | "tsv" as kind:
                return True, csv_rows(strip_bom(strings), name, self.field, "," if kind == "csv" else "\t")
        return False, ([string] for string in strings)


class TeeReader:
    """Reads a file, passes all bytes to a function as well, and can peek ahead."""

    def __init__(self, file: BinaryIO, on_chunk: OnChunk) -> None:
        """Start at the current position of an open file."""
        self._file, self._on_chunk = file, on_chunk
        self._peeked = b""

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, or the rest of the file."""
        if size < 0:
            return self._pop(len(self._peeked)) + self._read(size)
        return self._pop(size) if self._peeked else self._read(size)

    def peek(self, size: int) -> bytes:
        """Return the next `size` bytes, or fewer at the end of the file, without consuming them."""
        while len(self._peeked) < size and (chunk := self._read(size - len(self._peeked))):
            self._peeked += chunk
        return self._peeked

    def read_up_to(self, fraction: float) -> None:
        """Pass the bytes up to a fraction of the file to the function, because another reader has used them."""
        if self._file.seekable():
            position = self._file.tell()
            end = int(self._file.seek(0, SEEK_END) * fraction)
            self._file.seek(position)
            while chunk := self._read(min(CHUNK_BYTES, max(0, end - position))):
                position += len(chunk)

    def _pop(self, size: int) -> bytes:
        chunk, self._peeked = self._peeked[:size], self._peeked[size:]
        return chunk

    def _read(self, size: int) -> bytes:
        chunk = self._file.read(size)
        self._on_chunk(chunk)
        return chunk


def open_binary(path: Path | None, name: str) -> AbstractContextManager[BinaryIO]:
    """Open a file, or return standard input for None.

    Raises:
        UserError: The file cannot be opened.
    """
    try:
        return path.open("rb") if path else nullcontext(sys.stdin.buffer)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from error


def byte_chunks(file: BinaryIO, name: str, decompress: str) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed as the command `decompress` does unless it is empty.

    Raises:
        UserError: The file cannot be decompressed.
    """
    reader, damage = open_decompressor(decompress, file) if decompress else (file, ())
    try:
        while chunk := reader.read(CHUNK_BYTES):
            yield chunk
    except damage as error:
        raise UserError(f"{name}: cannot be decompressed: {error}; get the file again, or leave it out") from error


def peek_head(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Return the start of a stream, at least HEAD_BYTES if it is that long, and an iterator over the whole stream."""
    first: list[bytes] = []
    for chunk in chunks:
        first.append(chunk)
        if sum(map(len, first)) >= HEAD_BYTES:
            break
    return b"".join(first), chain(first, chunks)


def decode_stream(chunks: Iterator[bytes], name: str, encoding: str, remedy: str) -> Iterator[str]:
    """Yield the decoded text of a stream of bytes in strings that are not empty.

    Raises:
        UserError: The bytes are not text of this encoding; the message ends with `remedy`.
    """
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    offset = 0  # of the chunk
    for chunk in chain(chunks, [b""]):
        pending = len(decoder.getstate()[0])  # bytes of a character that began in the previous chunk
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            position = offset - pending + error.start
            raise UserError(
                f"{name}: byte {error.object[error.start]:#04x} at offset {position:,} is not {encoding} text; {remedy}"
            ) from error
        except UnicodeError as error:  # an encoding that requires a byte order mark
            raise UserError(f"{name}: is not {encoding} text: {error}; set --encoding, such as utf-16-le") from error
        if text:
            yield text
        offset += len(chunk)


def strip_bom(strings: Iterator[str]) -> Iterator[str]:
    """Yield the strings of a text without the byte order mark at its start."""
    for string in strings:
        yield string.removeprefix(BYTE_ORDER_MARK)
        break
    yield from strings


def open_text(words: Sequence[str], scratch: Path, encoding: str = "utf-8", **fields: Any) -> Text:
    """Return the text of files, folders (all files below them, sorted, except hidden ones), patterns and `-`.

    Standard input and pipes are copied to the folder `scratch`, because they can be read only once. `fields` are other
    fields of Text.

    Raises:
        UsageError: A file is missing, or the encoding is unknown.
    """
    if not is_text_encoding(encoding):
        raise UsageError(f"--encoding must be a text encoding that Python knows, such as latin-1, not {encoding!r}")
    files = list_files(words)
    paths, names, rereadable = list(files), display_names(files), True
    for number, path in enumerate(files):
        if path is None or is_stream(path):
            copy = scratch / f"input-{number}"
            with wrap_write_errors(scratch), copy.open("wb") as out, open_binary(path, names[number]) as stream:
                shutil.copyfileobj(stream, out)
            paths[number], rereadable = copy, False
    return Text(tuple(paths), names, encoding, rereadable=rereadable, **fields)


def list_files(words: Sequence[str]) -> Sequence[Path | None]:
    """Return the files that the words name, and warn about skipped ones; None is standard input."""
    finder = find_files(words)
    if skipped := finder.describe_skipped():
        warn(f"skipped: {skipped}")
    return finder.files


def display_names(files: Sequence[Path | None]) -> tuple[str, ...]:
    """Return the names of files for messages."""
    return tuple(sanitize(file) if file else STANDARD_INPUT for file in files)


def read_text(word: str) -> str:
    """Return the text of a UTF-8 file, or of standard input for `-`.

    Raises:
        UserError: The file is missing or is not text.
    """
    files = list_files([word])
    text = Text(tuple(files), display_names(files), can_set_encoding=False)
    return "".join(chain.from_iterable(text.read(lambda _: None)))


def read_documents(word: str) -> Iterator[Documents]:
    """Yield the documents of a UTF-8 file, a folder or a pattern, or of standard input for `-`, each by itself.

    Raises:
        UserError: A file is missing or is not text.
    """
    files = list_files([word])
    text = Text(
        tuple(files), display_names(files), keep_documents=True, separate_documents=True, can_set_encoding=False
    )
    return text.read(lambda _: None)


def read_lines(word: str) -> list[str]:
    """Return the lines of a file, stripped, with each run of white space replaced by a single space.

    Raises:
        UserError: The file is missing or is not text.
    """
    lines = read_text(word).split("\n")
    return [" ".join(line.split()) for line in (lines if lines[-1] else lines[:-1])]


def is_text_encoding(encoding: str) -> bool:
    """Return whether Python knows a character encoding of this name; some of its codecs are not for files of text."""
    try:
        "".encode(encoding)
    except (LookupError, UnicodeError, ValueError):
        return False
    excluded = {"idna", "punycode", "raw-unicode-escape", "unicode-escape", "utf-7"}
    return codecs.lookup(encoding).name.replace("_", "-") not in excluded
