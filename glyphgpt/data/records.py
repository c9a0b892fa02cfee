"""Files of records, each of which holds a text: JSON, JSON Lines, CSV and Parquet, read as streams.

JSON is an array, or values one after the other; each value is a text, or an object with a field that holds it.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from typing import Any, BinaryIO

from glyphgpt.data.sources import list_names, sanitize
from glyphgpt.errors import UserError, optional_import

BATCH_CHARACTERS = 1 << 18
FIELDS_SHOWN = 10
LONGEST_FIELD = 2**31 - 1  # as much as csv takes on every system

Documents = list[str]
DECODER = json.JSONDecoder()
WHITE_SPACE = re.compile(r"[ \t\n\r]*")
LONGEST_LITERAL = len("-Infinity") + len("\\ud83d\\u")  # what a cut may leave in parts: a word, or an escaped character


def json_records(pieces: Iterator[str], name: str, field: str) -> Iterator[Documents]:
    """Yield the texts of JSON Lines; blank lines are left out.

    Raises:
        UserError: a line is not JSON, or holds no text.
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
        places = ((line, f"{name}: line {number:,}") for line, number in numbered if line.strip())
        records = [record_text(parsed(line, place), place, field) for line, place in places]
        if records:
            yield records


def parsed(line: str, place: str) -> object:
    """Return the JSON value of a line."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error})") from error


def json_values(pieces: Iterator[str], name: str, field: str) -> Iterator[Documents]:
    """Yield the texts of a JSON array, or of JSON values one after the other.

    Raises:
        UserError: the file is not JSON, or a value holds no text.
    """

    def texts() -> Iterator[str]:
        values = JsonStream(pieces).values()
        for number in count(1):
            place = f"{name}: record {number:,}"
            try:
                value = next(values)
            except StopIteration:
                return
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise UserError(f"{place} is not JSON ({reason})") from error
            yield record_text(value, place, field)

    return in_batches(texts())


class JsonStream:
    """A JSON text that comes in pieces; no more of it is kept than the value being read takes."""

    def __init__(self, pieces: Iterator[str]) -> None:
        """Begin before the first piece."""
        self._pieces = pieces
        self._text = ""
        self._at = 0

    def values(self) -> Iterator[object]:
        """Yield the values of an array, or those that follow one another.

        Raises:
            ValueError: the text is not JSON.
        """
        if self._next() != "[":
            while self._next():
                yield self._value()
            return
        self._at += 1
        if self._next() != "]":
            yield self._value()
            while self._next() == ",":
                self._at += 1
                yield self._value()
            if self._next() != "]":
                raise ValueError("Expecting ',' delimiter or the end of the array")
        self._at += 1
        if self._next():
            raise ValueError("more text after the array")

    def _next(self) -> str:
        """Return the next character that is no white space; empty at the end."""
        while True:
            space = WHITE_SPACE.match(self._text, self._at)
            assert space
            self._at = space.end()
            if self._at < len(self._text) or not self._grow():
                return self._text[self._at : self._at + 1]

    def _value(self) -> object:
        self._next()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos + LONGEST_LITERAL > len(self._text) or error.msg.startswith("Unterminated string")
                if not cut or not self._grow():
                    raise
                continue
            ends = isinstance(value, str | dict | list) or end < len(self._text)  # a number may go on
            if ends or not self._grow():
                self._at = end
                return value

    def _grow(self) -> bool:
        """Take twice as much text into view, so that a long value is not begun too often; return whether there was."""
        parts, missing = [self._text[self._at :]], max(len(self._text) - self._at, 1)
        for piece in self._pieces:
            parts.append(piece)
            missing -= len(piece)
            if missing <= 0:
                break
        self._text, self._at = "".join(parts), 0
        return len(parts) > 1


def csv_rows(pieces: Iterator[str], name: str, field: str, delimiter: str) -> Iterator[Documents]:
    """Yield the texts of a column of CSV, whose first line names the columns.

    Raises:
        UserError: there is no such column, or a row is damaged.
    """

    def texts() -> Iterator[str]:
        csv.field_size_limit(LONGEST_FIELD)
        reader = csv.reader(lines(pieces), delimiter=delimiter, strict=True)
        try:
            rows = filter(None, reader)  # blank lines are none
            header = next(rows, [field])
            if field not in header:
                raise UserError(f"{name}: has no column '{field}'; {fields_hint(header)}")
            column = header.index(field)
            for row in rows:
                if len(row) != len(header):
                    raise UserError(
                        f"{name}: line {reader.line_num:,}: {len(row)} columns, but the first line names "
                        f'{len(header)}; a text that holds a delimiter must stand in quotes: "..."'
                    )
                yield row[column]
        except csv.Error as error:
            raise UserError(
                f"{name}: line {reader.line_num:,}: {error}; a text that holds quotes must stand in quotes, and each "
                'of its own be doubled: "a ""quoted"" word"'
            ) from error

    return in_batches(texts())


def lines(pieces: Iterator[str]) -> Iterator[str]:
    r"""Yield lines with their ends, which are \n, \r or \r\n as in the text."""
    begun: list[str] = []
    for piece in pieces:
        begun.append(piece)
        if "\n" in piece or "\r" in piece:
            *whole, rest = io.StringIO("".join(begun), newline="")
            yield from whole
            begun = [rest]  # which may go on, even after a \r
    yield from io.StringIO("".join(begun), newline="")


def in_batches(records: Iterator[str]) -> Iterator[Documents]:
    """Yield records in lists of a bounded number of characters."""
    batch: Documents = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record) + 1
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def parquet_rows(file: BinaryIO, name: str, field: str, read_up_to: Callable[[float], object]) -> Iterator[Documents]:
    """Yield the texts of a Parquet file, and call `read_up_to` with the fraction of its rows that have been read.

    Raises:
        UserError: pyarrow is not installed, the file is damaged, or a row has no such field of text.
    """
    with optional_import("pyarrow", f"{name}: reading Parquet"):
        import pyarrow  # noqa: PLC0415  (large, and only for those who use it)
        from pyarrow import parquet  # noqa: PLC0415
    try:
        table, row = parquet.ParquetFile(file), 0
        if field not in table.schema_arrow.names:
            raise UserError(f"{name}: has no column '{sanitize(field)}'; {fields_hint(table.schema_arrow.names)}")
        for batch in table.iter_batches(batch_size=1000, columns=[field]):
            values = batch.column(0).to_pylist()
            records = [checked(v, f"{name}: row {row + i:,}", field) for i, v in enumerate(values, start=1)]
            row += len(records)
            read_up_to(row / table.metadata.num_rows)
            yield records
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: cannot be read: {reason}; get the file anew, or leave it out") from error
    read_up_to(1)


def record_text(value: object, place: str, field: str) -> str:
    """Return the text that a JSON value is, or that its field holds.

    Raises:
        UserError: there is none.
    """
    if isinstance(value, str):
        return without_halves(value, f"{place}: the text")
    if not isinstance(value, dict):
        raise UserError(f"{place} is neither text nor a JSON object with a field '{field}'")
    if field not in value:
        raise UserError(f"{place} has no field '{field}'; {fields_hint(list(value))}")
    return checked(value[field], place, field)


def checked(value: object, place: str, field: str) -> str:
    """Return a record's text.

    Raises:
        UserError: it is none.
    """
    if not isinstance(value, str):
        raise UserError(f"{place}: '{field}' is not text but {json.dumps(value, default=str)[:50]}")
    return without_halves(value, f"{place}: '{field}'")


def without_halves(text: str, place: str) -> str:
    """Return a text, having made sure that it is one.

    Raises:
        UserError: it holds half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place} holds half a surrogate pair, which is no character") from error
    return text


def fields_hint(names: Sequence[Any]) -> str:
    """Return a phrase that lists the fields there are, and how to choose another."""
    listed = list_names([str(name) for name in names], FIELDS_SHOWN) or "none"
    return f"there are: {listed}; prepare.py reads another with --text_field=NAME"
