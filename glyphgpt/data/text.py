"""The texts that you name: files, folders, patterns and standard input, plain or packed, as documents.

A file is one document, or, if it holds records (JSON, CSV, Parquet), as many as it has of them. What is read is a
stream of lists of documents, cut anywhere: the last of a list and the first of the next are parts of the same document.
So ["a", "b"] and then ["c"] are the documents "a" and "bc".
"""

import codecs
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import SEEK_END, BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from glyphgpt.data.formats import (
    HEAD_BYTES,
    encoding_remedy,
    is_parquet,
    record_kind,
    refuse,
    unpacker,
    unpacking,
)
from glyphgpt.data.records import Documents, csv_rows, json_records, json_values, parquet_rows
from glyphgpt.data.sources import STANDARD_INPUT, FileFinder, find_files, is_stream, sanitize
from glyphgpt.errors import UsageError, UserError, warn, wrap_write_errors

CHUNK_BYTES = 1 << 18
BYTE_ORDER_MARK = "\ufeff"
HAS_BOM, HAS_NUL = "begin with a byte order mark", "hold NUL characters"
"""What is noticed of files."""
OnChunk = Callable[[bytes], object]
OnNotice = Callable[[str, str], object]


@dataclass(frozen=True)
class Text:
    """A text in one or more files, read in pieces so that its length does not matter."""

    paths: tuple[Path | None, ...]
    """None is standard input, which can be read only once."""
    names: tuple[str, ...]
    """The files' names as messages show them."""
    encoding: str = "utf-8"
    field: str = "text"
    """Of a record, which holds its text."""
    keep_documents: bool = False
    """Whether documents are kept apart; else all is one, and each record ends with a new line."""
    rereadable: bool = True
    """Whether it can be read again in another process."""
    flags: bool = True
    """Whether the user can name the encoding, so that messages may advise that."""

    def file_stats(self) -> list[tuple[int, int]]:
        """Return each file's size and the time of its last change: other stamps, another text."""
        return [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in self.paths if path)]

    def read(self, on_chunk: OnChunk, on_notice: OnNotice | None = None) -> Iterator[Documents]:
        """Yield the documents, one file after the other, and call `on_chunk` with all bytes of the files on the way.

        `on_notice` is called with MARKED or NUL and the name of a file of which that is so, and may be called again.

        Raises:
            UserError: bytes that are no text, or a damaged file; names the file and the place.
        """
        begun = False
        for path, name in zip(self.paths, self.names, strict=True):
            with ExitStack() as stack:
                file = Tee(stack.enter_context(open_binary(path, name)) if path else sys.stdin.buffer, on_chunk)
                records, lists = self._documents(file, path, name, stack)
                for number, documents in enumerate(lists):
                    if on_notice:
                        if number == 0 and not records and documents[0].startswith(BYTE_ORDER_MARK):
                            on_notice(HAS_BOM, name)
                        if any("\0" in document for document in documents):
                            on_notice(HAS_NUL, name)
                    if self.keep_documents:
                        new = records or number == 0
                        yield ["", *documents] if begun and new else documents
                    else:
                        yield ["".join(f"{record}\n" for record in documents)] if records else documents
                    begun = True

    def _documents(
        self, file: "Tee", path: Path | None, name: str, stack: ExitStack
    ) -> tuple[bool, Iterator[Documents]]:
        """Return whether a file holds records, and its documents."""
        head = file.peek(HEAD_BYTES)
        if is_parquet(head, name):
            random_access = (
                stack.enter_context(open_binary(path, name)) if path and path.is_file() else BytesIO(file.read())
            )
            return True, parquet_rows(random_access, name, self.field, file.read_up_to)
        unpack = unpacking(head, name)
        head, chunks = with_head(byte_chunks(cast(BinaryIO, file), name, unpack))
        refuse(head, name, unpack)
        pieces = decode_stream(chunks, name, self.encoding, encoding_remedy(head, name, unpack, flags=self.flags))
        match record_kind(name):
            case "jsonl":
                return True, json_records(strip_bom(pieces), name, self.field)
            case "json":
                return True, json_values(strip_bom(pieces), name, self.field)
            case "csv" | "tsv" as kind:
                return True, csv_rows(strip_bom(pieces), name, self.field, "," if kind == "csv" else "\t")
        return False, ([piece] for piece in pieces)


class Tee:
    """A file whose bytes go to a function too as they are read, and into which one may look ahead."""

    def __init__(self, file: BinaryIO, on_chunk: OnChunk) -> None:
        """Begin at the beginning of an open file."""
        self._file, self._on_chunk = file, on_chunk
        self._ahead = b""

    def read(self, size: int = -1) -> bytes:
        """Read up to so many bytes."""
        if size < 0:
            return self._pop(len(self._ahead)) + self._take(size)
        return self._pop(size) if self._ahead else self._take(size)

    def peek(self, size: int) -> bytes:
        """Return the next bytes, so many unless the file ends before, and leave them to be read."""
        while len(self._ahead) < size and (chunk := self._take(size - len(self._ahead))):
            self._ahead += chunk
        return self._ahead

    def read_up_to(self, fraction: float) -> None:
        """Read up to a fraction of the file: its bytes stand for those that were read elsewhere, scattered."""
        if self._file.seekable():
            at = self._file.tell()
            end = int(self._file.seek(0, SEEK_END) * fraction)
            self._file.seek(at)
            while chunk := self._take(min(CHUNK_BYTES, max(0, end - at))):
                at += len(chunk)

    def _pop(self, size: int) -> bytes:
        chunk, self._ahead = self._ahead[:size], self._ahead[size:]
        return chunk

    def _take(self, size: int) -> bytes:
        chunk = self._file.read(size)
        self._on_chunk(chunk)
        return chunk


def open_binary(path: Path, name: str) -> BinaryIO:
    """Open a file.

    Raises:
        UserError: it cannot be.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from error


def byte_chunks(file: BinaryIO, name: str, unpack: str) -> Iterator[bytes]:
    """Yield a file's bytes, unpacked as the command `unpack` would, if there is one.

    Raises:
        UserError: it cannot be unpacked.
    """
    reader, damage = unpacker(unpack, file) if unpack else (file, ())
    try:
        while chunk := reader.read(CHUNK_BYTES):
            yield chunk
    except damage as error:
        raise UserError(f"{name}: cannot be unpacked: {error}; get the file anew, or leave it out") from error


def with_head(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Return the first bytes of a stream, and the whole stream."""
    taken: list[bytes] = []
    for chunk in chunks:
        taken.append(chunk)
        if sum(map(len, taken)) >= HEAD_BYTES:
            break
    return b"".join(taken), chain(taken, chunks)


def decode_stream(chunks: Iterator[bytes], name: str, encoding: str, remedy: str) -> Iterator[str]:
    """Yield the text that bytes spell, in pieces that are not empty.

    Raises:
        UserError: they are no text of that encoding; says the `remedy`.
    """
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    read_bytes = 0
    for chunk in chain(chunks, [b""]):
        held_back = len(decoder.getstate()[0])  # of a character that the last chunk cut
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            place = read_bytes - held_back + error.start
            raise UserError(
                f"{name}: byte {error.object[error.start]:#04x} at offset {place:,} is not {encoding} text; {remedy}"
            ) from error
        except UnicodeError as error:  # of encodings that begin with a mark of their byte order
            raise UserError(f"{name}: is not {encoding} text: {error}; name its --encoding, utf-16-le say") from error
        if text:
            yield text
        read_bytes += len(chunk)


def strip_bom(pieces: Iterator[str]) -> Iterator[str]:
    """Yield pieces without a byte order mark at their beginning."""
    for piece in pieces:
        yield piece.removeprefix(BYTE_ORDER_MARK)
        break
    yield from pieces


def open_text(words: Sequence[str], scratch: Path, encoding: str = "utf-8", **form: Any) -> Text:
    """Make one text of files, folders (every file below them, sorted, hidden ones left out), patterns and -.

    Standard input and pipes are kept in the folder `scratch`, since they are read twice. `form` are other fields of
    Text.

    Raises:
        UsageError: a file is missing, or the encoding unknown.
    """
    if not is_charset(encoding):
        raise UsageError(
            f"--encoding must be a character set that Python knows, utf-8 or latin-1 say, not {encoding!r}"
        )
    files = found_files(words)
    paths, stays = list(files), True
    for number, path in enumerate(files):
        if path is None or is_stream(path):
            paths[number], stays = scratch / f"input-{number}", False
            with wrap_write_errors(scratch), (scratch / f"input-{number}").open("wb") as out, ExitStack() as stack:
                source = stack.enter_context(open_binary(path, sanitize(path))) if path else sys.stdin.buffer
                shutil.copyfileobj(source, out)
    return Text(tuple(paths), shown_names(files), encoding, rereadable=stays, **form)


def found_files(words: Sequence[str]) -> Sequence[Path | None]:
    """Return the files that words name, and warn of what is left out; None is standard input."""
    finder: FileFinder = find_files(words)
    if left_out := finder.left_out():
        warn(f"left out: {left_out}")
    return finder.files


def shown_names(files: Sequence[Path | None]) -> tuple[str, ...]:
    """Return the names of files as messages show them."""
    return tuple(sanitize(file) if file else STANDARD_INPUT for file in files)


def read_text(word: str) -> str:
    """Read a whole UTF-8 file, or - for standard input.

    Raises:
        UserError: it is missing, or no text.
    """
    files = found_files([word])
    text = Text(tuple(files), shown_names(files), flags=False)
    return "".join(chain.from_iterable(text.read(lambda _: None)))


def read_lines(word: str) -> list[str]:
    """Read a file's lines; any white space within one becomes a single space, and none stays around it.

    Raises:
        UserError: it is missing, or no text.
    """
    lines = read_text(word).split("\n")
    return [" ".join(line.split()) for line in (lines if lines[-1] else lines[:-1])]


def is_charset(encoding: str) -> bool:
    """Return whether Python knows a character set of that name; some of its codecs are something else."""
    try:
        "".encode(encoding)
    except (LookupError, UnicodeError, ValueError):
        return False
    others = {"idna", "punycode", "raw-unicode-escape", "unicode-escape", "utf-7"}
    return codecs.lookup(encoding).name.replace("_", "-") not in others
