"""What a file's first bytes and its name say about its format.

gzip and Zstandard are unpacked on the way. Other containers are refused, with a command that makes text of them.
"""

import gzip
import re
import sys
import zlib
from pathlib import PurePath
from typing import Any, BinaryIO

from glyphgpt.data.sources import STANDARD_INPUT, shell_word
from glyphgpt.errors import UserError

HEAD_BYTES = 512
GZIP = b"\x1f\x8b\x08"
ZSTD = b"\x28\xb5\x2f\xfd"
PARQUET = b"PAR1\x15"  # with the first byte of what follows
MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Byte order marks, the longer before those that begin alike."""
TEXT_RECORDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"}

INTO_FOLDER = "unpack it and prepare the folder: mkdir texts && "
REFUSED = (
    (rb"(?=[^\0]{0,261}\0).{257}ustar", "a tar archive", INTO_FOLDER + "tar -xf {file} -C texts"),
    (rb"PK(?:\x03\x04|\x05\x06)", "a zip archive", INTO_FOLDER + "unzip {file} -d texts"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", INTO_FOLDER + "7z x {file} -otexts"),
    (rb"Rar!\x1a\x07", "a RAR archive", INTO_FOLDER + "unrar x {file} texts/"),
    (rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", "packed with bzip2", "unpack it: bzip2 -dc {file} > NEW"),
    (rb"\xfd7zXZ\0", "packed with xz", "unpack it: xz -dc {file} > NEW"),
    (re.escape(GZIP), "packed twice", "unpack it once: {unpack} {file} > NEW.gz"),
    (re.escape(ZSTD), "packed twice", "unpack it once: {unpack} {file} > NEW.zst"),
    (re.escape(PARQUET), "packed Parquet", "unpack it: {unpack} {file} > NEW.parquet"),
    (rb"%PDF-\d", "a PDF document", "convert it: pdftotext {file} NEW.txt"),
    (rb"SQLite format 3\0", "an SQLite database", "export its text: sqlite3 {file} 'SELECT text FROM TABLE' > NEW.txt"),
    (rb"\x89PNG\r\n\x1a\n", "a PNG picture", "leave it out"),
)
"""Of each format that is not read: a pattern of the first bytes, once unpacked, what it is, and what to do."""


def refuse(head: bytes, name: str, unpack: str) -> None:
    """Refuse a file whose first bytes are those of a container; `unpack` is the command that made these bytes, if any.

    Raises:
        UserError: it is one; names the format and what to do.
    """
    for pattern, what, remedy in REFUSED:
        if re.match(pattern, head, re.DOTALL):
            raise UserError(f"{name}: {what}, not plain text; {remedy.format(file=file_word(name), unpack=unpack)}")


def file_word(name: str) -> str:
    """Return a file's name as a command takes it; what came through a pipe has none."""
    return "FILE" if name == STANDARD_INPUT or name.startswith("/dev/") else shell_word(name)


def unpacking(head: bytes, name: str) -> str:
    """Return the command that unpacks a file, as is done on the way; its first bytes count before its name."""
    suffix = PurePath(name).suffix.lower()
    if head.startswith(GZIP) or (suffix == ".gz" and not head.startswith(ZSTD)):
        return "gzip -dc"
    return "zstd -dc" if head.startswith(ZSTD) or suffix == ".zst" else ""


def unpacker(command: str, file: BinaryIO) -> tuple[Any, tuple[type[Exception], ...]]:
    """Return a reader of what a file packs, and the errors of its damage."""
    if command == "gzip -dc":
        return gzip.GzipFile(fileobj=file), (EOFError, gzip.BadGzipFile, zlib.error)
    zstd = zstandard()
    any_window = {zstd.DecompressionParameter.window_log_max: 31}  # as --long=31 packs
    return zstd.ZstdFile(file, options=any_window), (EOFError, zstd.ZstdError)


def zstandard() -> Any:
    """Return Python's own module for Zstandard, or for older Pythons the same from PyPI."""
    if sys.version_info >= (3, 14):
        from compression import zstd  # noqa: PLC0415  (only for those who use it)
    else:
        from backports import zstd  # noqa: PLC0415
    return zstd


def is_parquet(head: bytes, name: str) -> bool:
    """Return whether a file is Parquet."""
    return head.startswith(PARQUET) or PurePath(name).suffix.lower() == ".parquet"


def record_kind(name: str) -> str:
    """Return which records of text a file's name promises, "jsonl", "json", "csv" or "tsv"; "" for plain text."""
    path = PurePath(name)
    plain = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path
    return TEXT_RECORDS.get(plain.suffix.lower(), "")


def encoding_remedy(head: bytes, name: str, unpack: str, *, flags: bool) -> str:
    """Return what to do with a file, beginning with these bytes, that is not text of the encoding.

    `flags` is whether the script has --encoding; `unpack` the command that unpacks the file, if any.
    """
    marked = next((encoding for mark, encoding in MARKS.items() if head.startswith(mark)), "")
    if flags:
        return f"add --encoding={marked}" if marked else "convert the file, leave it out, or name its --encoding"
    convert = f"iconv -f {marked.upper() or 'LATIN1'} -t UTF-8"
    command = f"{unpack} {file_word(name)} | {convert} > NEW" if unpack else f"{convert} {file_word(name)} > NEW"
    return f"convert it{'' if marked else ', from Latin-1 for example'}: {command}"
