"""File formats, recognized by a file's first bytes and its name.

Files compressed with gzip or Zstandard are decompressed while they are read. Other containers are rejected with a
command that converts them to text.
"""

import gzip
import re
import sys
import zlib
from pathlib import PurePath
from typing import Any, BinaryIO

from glyphgpt.data.sources import STANDARD_INPUT, shell_word
from glyphgpt.errors import UserError

HEAD_BYTES = 512  # enough to identify every format
GZIP = b"\x1f\x8b\x08"
ZSTD = b"\x28\xb5\x2f\xfd"
PARQUET = b"PAR1\x15"  # with the first byte of the first page
BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""The longer marks come first, because a shorter one can be their prefix."""
RECORD_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"}

EXTRACT = "extract it and prepare the folder: mkdir texts && "
UNSUPPORTED = (
    (rb"(?=[^\0]{0,261}\0).{257}ustar", "a tar archive", EXTRACT + "tar -xf {file} -C texts"),
    (rb"PK(?:\x03\x04|\x05\x06)", "a zip archive", EXTRACT + "unzip {file} -d texts"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", EXTRACT + "7z x {file} -otexts"),
    (rb"Rar!\x1a\x07", "a RAR archive", EXTRACT + "unrar x {file} texts/"),
    (rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", "compressed with bzip2", "decompress it: bzip2 -dc {file} > NEW"),
    (rb"\xfd7zXZ\0", "compressed with xz", "decompress it: xz -dc {file} > NEW"),
    (re.escape(GZIP), "compressed twice", "decompress it once: {decompress} {file} > NEW.gz"),
    (re.escape(ZSTD), "compressed twice", "decompress it once: {decompress} {file} > NEW.zst"),
    (re.escape(PARQUET), "compressed Parquet", "decompress it: {decompress} {file} > NEW.parquet"),
    (rb"%PDF-\d", "a PDF document", "convert it: pdftotext {file} NEW.txt"),
    (rb"SQLite format 3\0", "an SQLite database", "export its text: sqlite3 {file} 'SELECT text FROM TABLE' > NEW.txt"),
    (rb"\x89PNG\r\n\x1a\n", "a PNG image", "leave it out"),
)
"""Unsupported formats: a pattern of the first decompressed bytes, a description, and a remedy."""


def check_format(head: bytes, name: str, decompress: str) -> None:
    """Check that a file is not of an unsupported format.

    `head` holds its first bytes, decompressed by the command `decompress` if that is not empty.

    Raises:
        UserError: The format is unsupported; the message names it and a remedy.
    """
    for pattern, description, remedy in UNSUPPORTED:
        if re.match(pattern, head, re.DOTALL):
            command = remedy.format(file=shell_file(name), decompress=decompress)
            raise UserError(f"{name}: {description}, not plain text; {command}")


def shell_file(name: str) -> str:
    """Return a file's name as a shell word, or FILE for standard input and pipes."""
    return "FILE" if name == STANDARD_INPUT or name.startswith("/dev/") else shell_word(name)


def decompress_command(head: bytes, name: str) -> str:
    """Return the command that decompresses a file, or ""; the first bytes take precedence over the name."""
    suffix = PurePath(name).suffix.lower()
    if head.startswith(GZIP) or (suffix == ".gz" and not head.startswith(ZSTD)):
        return "gzip -dc"
    return "zstd -dc" if head.startswith(ZSTD) or suffix == ".zst" else ""


def open_decompressor(command: str, file: BinaryIO) -> tuple[Any, tuple[type[Exception], ...]]:
    """Return a reader that decompresses a file as `command` does, and the exceptions that it raises for damage."""
    if command == "gzip -dc":
        return gzip.GzipFile(fileobj=file), (EOFError, gzip.BadGzipFile, zlib.error)
    zstd = import_zstd()
    any_window = {zstd.DecompressionParameter.window_log_max: 31}  # reads the output of zstd --long=31
    return zstd.ZstdFile(file, options=any_window), (EOFError, zstd.ZstdError)


def import_zstd() -> Any:
    """Import and return Python's module for Zstandard, or its backport from PyPI before Python 3.14."""
    if sys.version_info >= (3, 14):
        from compression import zstd  # noqa: PLC0415  (only compressed files need it)
    else:
        from backports import zstd  # noqa: PLC0415
    return zstd


def is_parquet(head: bytes, name: str) -> bool:
    """Return whether a file is Parquet."""
    return head.startswith(PARQUET) or PurePath(name).suffix.lower() == ".parquet"


def record_format(name: str) -> str:
    """Return the format of a file's text records by its name: "jsonl", "json", "csv", "tsv", or "" for plain text."""
    path = PurePath(name)
    uncompressed = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path
    return RECORD_FORMATS.get(uncompressed.suffix.lower(), "")


def suggest_encoding(head: bytes, name: str, decompress: str, *, can_set_encoding: bool) -> str:
    """Return a remedy for a file that cannot be decoded; `head` holds its first bytes.

    `decompress` is as for `check_format`; `can_set_encoding` is whether the script has the option --encoding.
    """
    marked = next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "")
    if can_set_encoding:
        return f"add --encoding={marked}" if marked else "set --encoding, convert the file, or leave it out"
    iconv, file = f"iconv -f {marked.upper() or 'LATIN1'} -t UTF-8", shell_file(name)
    command = f"{decompress} {file} | {iconv} > NEW" if decompress else f"{iconv} {file} > NEW"
    return f"convert it{'' if marked else ', for example from Latin-1'}: {command}"
