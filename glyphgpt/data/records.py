"""Record files (JSON, JSON Lines, CSV and Parquet), read as streams of the texts that their records hold.

A JSON file is an array, or a sequence of values. Each value is a string, or an object with a field for the text.
The readers yield lists of documents. Except for Parquet, they get a file's text in consecutive chunks.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from typing import Any, BinaryIO

from glyphgpt.data.sources import list_names
from glyphgpt.errors import UserError, optional_import, sanitize

BATCH_CHARACTERS = 1 << 18
FIELDS_SHOWN = 10
MAX_CSV_FIELD = 2**31 - 1  # the most that the csv module accepts on every system
PARQUET_ROWS = 1000  # read at once

Documents = list[str]
JSON_DECODER = json.JSONDecoder()
WHITE_SPACE = re.compile(r"[ \t\n\r]*")
MAX_LITERAL = len("-Infinity") + len("\\ud83d\\u")  # a chunk may end within a literal or escape of up to this length


def json_records(chunks: Iterator[str], name: str, field: str) -> Iterator[Documents]:
    """Yield the texts of JSON Lines; blank lines are ignored.

    Raises:
        UserError: A line is not JSON, or has no text.
    """
    line_parts: list[str] = []
    numbers = count(1)
    for chunk in chain(chunks, ["\n"]):  # the last line may lack a newline
        *lines, rest = chunk.split("\n")
        if lines:
            lines[0] = "".join([*line_parts, lines[0]])
            line_parts = []
        line_parts.append(rest)
        numbered = zip(lines, numbers, strict=False)
        located = ((line, f"{name}: line {number:,}") for line, number in numbered if line.strip())
        if records := [record_text(parse_json(line, location), location, field) for line, location in located]:
            yield records


def parse_json(line: str, location: str) -> object:
    """Return the JSON value of a line; raise UserError if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location} is not JSON ({error})") from error


def json_values(chunks: Iterator[str], name: str, field: str) -> Iterator[Documents]:
    """Yield the texts of a JSON array, or of a sequence of JSON values.

    Raises:
        UserError: The file is not JSON, or a value has no text.
    """

    def texts() -> Iterator[str]:
        values = JsonStream(chunks).values()
        for number in count(1):
            location = f"{name}: record {number:,}"
            try:
                value = next(values)
            except StopIteration:
                return
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise UserError(f"{location} is not JSON ({reason})") from error
            yield record_text(value, location, field)

    return batch_records(texts())


class JsonStream:
    """Parses JSON that arrives in chunks; memory holds little more than the current value."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks = chunks
        self._buffer = ""
        self._position = 0

    def values(self) -> Iterator[object]:
        """Yield the elements of an array, or each value of a sequence.

        Raises:
            ValueError: The text is not JSON.
        """
        if self._peek() != "[":
            while self._peek():
                yield self._parse_value()
            return
        self._position += 1
        if self._peek() != "]":
            yield self._parse_value()
            while self._peek() == ",":
                self._position += 1
                yield self._parse_value()
            if self._peek() != "]":
                raise ValueError("Expecting ',' delimiter or the end of the array")
        self._position += 1
        if self._peek():
            raise ValueError("more text after the array")

    def _peek(self) -> str:
        """Skip white space, and return the next character without consuming it, or "" at the end."""
        while True:
            space = WHITE_SPACE.match(self._buffer, self._position)
            assert space
            self._position = space.end()
            if self._position < len(self._buffer) or not self._read_more():
                return self._buffer[self._position : self._position + 1]

    def _parse_value(self) -> object:
        self._peek()
        while True:
            try:
                value, end = JSON_DECODER.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                may_be_cut = error.pos + MAX_LITERAL > len(self._buffer) or error.msg.startswith("Unterminated string")
                if not may_be_cut or not self._read_more():
                    raise
                continue
            is_complete = isinstance(value, str | dict | list) or end < len(self._buffer)  # a number may continue
            if is_complete or not self._read_more():
                self._position = end
                return value

    def _read_more(self) -> bool:
        """Double the unread part of the buffer, so that a long value is parsed few times; return False at the end."""
        parts, missing = [self._buffer[self._position :]], max(len(self._buffer) - self._position, 1)
        for chunk in self._chunks:
            parts.append(chunk)
            missing -= len(chunk)
            if missing <= 0:
                break
        self._buffer, self._position = "".join(parts), 0
        return len(parts) > 1


def csv_rows(chunks: Iterator[str], name: str, field: str, delimiter: str) -> Iterator[Documents]:
    """Yield the texts of a CSV column; the first line names the columns.

    Raises:
        UserError: The column is missing, or a row is damaged.
    """

    def texts() -> Iterator[str]:
        csv.field_size_limit(MAX_CSV_FIELD)
        reader = csv.reader(split_lines(chunks), delimiter=delimiter, strict=True)
        try:
            rows = filter(None, reader)  # without blank lines
            header = next(rows, [field])
            if field not in header:
                raise UserError(f"{name}: has no column '{sanitize(field)}' {describe_fields(header)}")
            column = header.index(field)
            for row in rows:
                if len(row) != len(header):
                    raise UserError(
                        f"{name}: line {reader.line_num:,}: {len(row)} columns, but the first line names "
                        f'{len(header)}; put a text that contains a delimiter in quotes: "..."'
                    )
                yield row[column]
        except csv.Error as error:
            raise UserError(
                f"{name}: line {reader.line_num:,}: {error}; put a text that contains quotes in quotes, and double "
                'the quotes in it: "a ""quoted"" word"'
            ) from error

    return batch_records(texts())


def split_lines(chunks: Iterator[str]) -> Iterator[str]:
    r"""Yield lines with their ends, which are \n, \r or \r\n as in the text."""
    parts: list[str] = []
    for chunk in chunks:
        parts.append(chunk)
        if "\n" in chunk or "\r" in chunk:
            *lines, rest = io.StringIO("".join(parts), newline="")
            yield from lines
            parts = [rest]  # it may be incomplete even if it ends with \r
    yield from io.StringIO("".join(parts), newline="")


def batch_records(records: Iterator[str]) -> Iterator[Documents]:
    """Yield records in lists of about BATCH_CHARACTERS characters."""
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


def parquet_rows(file: BinaryIO, name: str, field: str, on_progress: Callable[[float], object]) -> Iterator[Documents]:
    """Yield the texts of a Parquet column, and call `on_progress` with the fraction of the rows that have been read.

    Raises:
        UserError: pyarrow is not installed, the file is damaged, the column is missing, or a row has no text.
    """
    with optional_import("pyarrow", f"{name}: reading Parquet"):
        import pyarrow  # noqa: PLC0415  (large, and only Parquet files need it)
        from pyarrow import parquet  # noqa: PLC0415
    try:
        table, rows_read = parquet.ParquetFile(file), 0
        if field not in table.schema_arrow.names:
            raise UserError(f"{name}: has no column '{sanitize(field)}' {describe_fields(table.schema_arrow.names)}")
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
            values = enumerate(batch.column(0).to_pylist(), start=rows_read + 1)
            records = [field_text(value, f"{name}: row {row:,}", field) for row, value in values]
            rows_read += len(records)
            on_progress(rows_read / table.metadata.num_rows)
            yield records
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: cannot be read: {reason}; get the file again, or leave it out") from error
    on_progress(1)


def record_text(value: object, location: str, field: str) -> str:
    """Return the text of a JSON value: the string itself, or the field of an object.

    Raises:
        UserError: The value has no text.
    """
    if isinstance(value, str):
        return check_surrogates(value, f"{location}: the text")
    if not isinstance(value, dict):
        raise UserError(f"{location} is neither text nor a JSON object with a field '{sanitize(field)}'")
    if field not in value:
        raise UserError(f"{location} has no field '{sanitize(field)}' {describe_fields(list(value))}")
    return field_text(value[field], location, field)


def field_text(value: object, location: str, field: str) -> str:
    """Return a field's value if it is text.

    Raises:
        UserError: The value is not text, or it has a lone surrogate.
    """
    if not isinstance(value, str):
        raise UserError(f"{location}: '{sanitize(field)}' is not text but {json.dumps(value, default=str)[:50]}")
    return check_surrogates(value, f"{location}: '{field}'")


def check_surrogates(text: str, location: str) -> str:
    """Return a text if it has no lone surrogates, which JSON's escapes allow.

    Raises:
        UserError: The text has a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{sanitize(location)} contains half a surrogate pair, which is not a character") from error
    return text


def describe_fields(names: Sequence[Any]) -> str:
    """Return the end of the message about a missing field: the fields that exist, and how to choose another."""
    fields = list_names([str(name) for name in names], FIELDS_SHOWN) or "none"
    return f"(it has: {fields}); prepare.py reads another with --text_field=NAME"
