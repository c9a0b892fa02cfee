"""Reading texts as documents: files, folders, patterns, compressed files, and record files."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st
from pyarrow import parquet

from glyphgpt.data import text as texts
from glyphgpt.data.formats import import_zstd
from glyphgpt.data.records import Documents, csv_rows, json_records, json_values
from glyphgpt.data.sources import find_files, list_names, shell_word
from glyphgpt.data.text import TeeReader, Text, open_text, read_text
from glyphgpt.errors import UsageError, UserError, sanitize

LINES = ["one", "zwei\ndrei", "", "\u2028quatre 🙂 \0"]


def joined(stream: Iterator[Documents]) -> Documents:
    """Return the documents of a stream."""
    documents = [""]
    for first, *others in stream:
        documents = [*documents[:-1], documents[-1] + first, *others]
    return documents


def read(*paths: Path, **fields: Any) -> Documents:
    text = Text(paths, tuple(map(str, paths)), **fields)
    seen = bytearray()
    documents = joined(text.read(seen.extend))
    assert seen == b"".join(path.read_bytes() for path in paths), "on_chunk receives all bytes in their order"
    return documents


def json_lines(records: list[str], field: str = "text") -> str:
    return "".join(json.dumps({"id": 1, field: record}) + "\n" for record in records)


def write_records(path: Path, records: list[str]) -> Path:
    """Write records in the format of the file's suffix."""
    match path.suffixes:
        case [".jsonl"]:
            path.write_text(json_lines(records), encoding="utf-8")
        case [".ndjson", ".gz"]:
            path.write_bytes(gzip.compress(json_lines(records).encode()))
        case [".jsonl", ".zst"]:
            path.write_bytes(import_zstd().compress(json_lines(records).encode()))
        case [".parquet"]:
            table = pyarrow.table({"id": [0] * len(records), "text": records})
            parquet.write_table(table, path, row_group_size=2)
    return path


@pytest.fixture(params=[1, 3, 1 << 18])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Set the number of bytes that are read at once."""
    monkeypatch.setattr(texts, "CHUNK_BYTES", request.param)
    return request.param


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.gz", "a.jsonl.zst", "a.parquet"])
def test_each_record_is_a_document(tmp_path: Path, name: str) -> None:
    path = write_records(tmp_path / name, LINES)
    assert read(path, keep_documents=True, separate_documents=True) == LINES
    assert read(path) == ["".join(line + "\n" for line in LINES)]


COMPRESSORS: list[Callable[[bytes], bytes]] = [bytes, gzip.compress, lambda data: import_zstd().compress(data)]


def suffix_of(compress: Callable[[bytes], bytes]) -> str:
    return {b"x": "", b"\x1f": ".gz", b"\x28": ".zst"}[compress(b"x")[:1]]


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("compress", COMPRESSORS)
def test_a_compressed_file_is_decompressed(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    for path in (tmp_path / f"text.txt{suffix_of(compress)}", tmp_path / "text"):
        path.write_bytes(compress("élan 🙂\r\n".encode()) + compress(b"second part"))
        assert read(path) == ["élan 🙂\r\nsecond part"]


def test_each_file_is_a_document_if_documents_are_kept(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("1.txt", "2.txt", "3.txt")]
    for path, content in zip(paths, ["first", "", "third"], strict=True):
        path.write_text(content)
    records = write_records(tmp_path / "4.jsonl", ["fourth", "fifth"])
    assert read(*paths, records, paths[0], keep_documents=True, separate_documents=True) == [
        "first",
        "third",
        "fourth",
        "fifth",
        "first",
    ]
    assert read(*paths, records, paths[0]) == ["firstthirdfourth\nfifth\nfirst"]


@tries(deadline=None, max_examples=100)
@given(st.lists(st.text(st.characters(codec="utf-8"))), st.integers(1, 9), st.booleans())
def test_json_lines_may_arrive_in_chunks_of_any_size(records: list[str], size: int, has_last_newline: bool) -> None:
    text = json_lines(records)[: None if has_last_newline else -1]
    chunks = (text[i : i + size] for i in range(0, len(text), size))
    assert list(chain.from_iterable(json_records(chunks, "name", "text"))) == records


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 3 is not JSON ("),
        ("[" * 100_000, "line 3 is not JSON ("),
        ("[1]", "line 3 is neither text nor a JSON object with a field 'text'"),
        (
            '{"body": "x", "id": 1}',
            "line 3 has no field 'text' (it has: body, id); prepare.py reads another with --text_field=NAME",
        ),
        ('{"text": null}', "line 3: 'text' is not text but null"),
        ('{"text": ["a", "b"]}', """line 3: 'text' is not text but ["a", "b"]"""),
        ('{"text": "\\ud83d"}', "line 3: 'text' contains half a surrogate pair, which is not a character"),
    ],
)
def test_an_invalid_line_is_named_in_the_error(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines(["a"]) + "\n" + line + "\n")
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_another_field_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines(LINES, "body"), encoding="utf-8")
    assert read(path, field="body", keep_documents=True, separate_documents=True) == LINES


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id,text\n1,a\n"),
        ("a.json", "[{}]"),
        ("a.json", "[1]"),
        ("a.jsonl", '{"a\\nb": 1}\n'),
        ("a.jsonl", '{"a\\nb": "\\ud83d"}\n'),
    ],
)
def test_errors_about_a_field_are_one_line(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"'a\\nb'") as caught:
        read(tmp_path / name, field="a\nb")
    assert "\n" not in str(caught.value)


def test_an_invalid_parquet_column_is_named_in_the_error(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.parquet", LINES)
    with pytest.raises(UserError, match=rf"^{path}: has no column 'body' \(it has: id, text\); prepare.py "):
        read(path, field="body")
    with pytest.raises(UserError, match=f"^{path}: row 1: 'id' is not text but 0$"):
        read(path, field="id")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(UserError, match=f"^{path}: row 2: 'text' is not text but null$"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.ndjson.gz", "a.parquet"])
def test_a_damaged_file_is_reported_in_one_line(tmp_path: Path, name: str) -> None:
    path = write_records(tmp_path / name, LINES * 100)
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:-3], whole[:middle], b"\x00" * (middle - 9) + whole[middle - 9 :], b"", whole[:5]):
        path.write_bytes(damaged)
        if damaged == b"" and name.endswith(".gz"):
            continue  # an empty file is valid gzip
        with pytest.raises(UserError, match=f"^{path}: cannot be ") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_missing_pyarrow_is_named_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_records(tmp_path / "a.parquet", LINES)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a.parquet: reading Parquet needs pyarrow: pip install pyarrow$"):
        read(path)


def test_patterns_find_matching_files_sorted(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "deep/er/d.txt", "[x].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def inside(word: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in found(tmp_path / word) if path]

    assert inside("*.txt") == ["[x].txt", "a.txt", "b.txt"]
    assert inside("**/*.txt") == ["[x].txt", "a.txt", "b.txt", "deep/er/d.txt"]
    assert inside("[x].txt") == ["[x].txt"], "a file of this name takes precedence"
    assert inside("d*") == ["deep/er/d.txt"], "all files of a matching folder"
    assert inside("**") == ["[x].txt", "a.txt", "b.txt", "c.md", "deep/er/d.txt"], "each file once"
    with pytest.raises(UsageError, match="no such file or folder"):
        inside("*.rst")


def test_a_missing_byte_order_mark_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"a\.txt: is not utf-16 text: .*; set --encoding, such as utf-16-le$"):
        read(tmp_path / "a.txt", encoding="utf-16")


def test_zstd_with_a_large_window_is_decompressed(tmp_path: Path) -> None:
    zstd = import_zstd()
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 28})
    (tmp_path / "a.zst").write_bytes(compressor.compress(b"te") + compressor.compress(b"xt") + compressor.flush())
    assert read(tmp_path / "a.zst") == ["text"]


def test_the_files_of_a_pattern_are_one_text(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    assert joined(open_text([str(tmp_path / "*.txt")], tmp_path).read(lambda _: None)) == ["ab"]


def found(*words: str | Path) -> list[Path | None]:
    return find_files(list(map(str, words))).files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of texts with links to a file and folders in it, to itself, and to a folder outside."""
    folder = tmp_path / "d"
    for name in ("a/2.txt", "a.txt", "b/1.txt", ".hidden.txt", "b/.git/x.txt", "../outside/in/3.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "0-link.txt").symlink_to("a.txt")
    (folder / "0-folder").symlink_to("b")
    (folder / "c").symlink_to("../outside")
    (folder / "self").symlink_to(".")
    (tmp_path / "outside" / "up").symlink_to("../d")
    return folder


def test_each_file_is_found_once_however_it_is_named(tree: Path) -> None:
    files = [tree / name for name in ("a/2.txt", "a.txt", "b/1.txt", "c/in/3.txt")]
    assert found(tree) == files
    assert found(tree / "**/*.txt") == files
    assert found(tree / "**") == files
    assert found(tree / "*") == files
    assert found(tree, tree / "**/*.txt", tree / "a.txt", tree / "self/b") == files
    assert found(*files) == files
    assert found(tree / "a.txt", tree) == [files[1], files[0], *files[2:]]


def test_skipped_files_are_counted_in_one_line(tree: Path) -> None:
    for number in range(5000):
        (tree / f"gone{number:04}.txt").symlink_to("nowhere")
    finder = find_files([str(tree), str(tree / "a.txt")])
    assert finder.describe_skipped() == (
        f"5 duplicates ({tree / '0-folder'}, {tree / 'self'}, {tree / 'c' / 'up'} and 2 more), "
        f"5,000 broken links ({tree / 'gone0000.txt'}, {tree / 'gone0001.txt'}, {tree / 'gone0002.txt'} "
        "and 4,997 more)"
    )


def test_broken_links_are_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "gone").symlink_to("nowhere")
    for word, target in (("gone", "nowhere"), ("loop", "loop")):
        with pytest.raises(UsageError, match=f"{word}: broken link to {target}$"):
            found(tmp_path / word)
    for word, place in (("go*", "match this pattern"), ("d", "in this folder"), ("**/gone", "match this pattern")):
        with pytest.raises(UsageError, match=f": no files {place}; skipped: [12] broken link") as caught:
            found(tmp_path / word)
        assert "\n" not in str(caught.value)


def test_special_files_in_folders_are_skipped(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.txt").write_text("a")
    finder = find_files([str(tmp_path)])
    assert finder.files == [tmp_path / "a.txt"]
    assert finder.describe_skipped() == f"1 special file ({tmp_path / 'pipe'})"
    assert found(tmp_path / "pipe") == [tmp_path / "pipe"]


def test_sanitized_names_are_one_line_that_bash_understands(tmp_path: Path) -> None:
    for raw in (b"caf\xe9.txt", b"new\nline '\xff", "\u2028\xa0é🙂 x".encode(), b"-n"):
        path = tmp_path / os.fsdecode(raw)
        path.write_text("text")
        assert sanitize(path).isprintable()
        for name in (path, sanitize(path)):
            done = subprocess.run(["bash", "-c", f"cat {shell_word(name)}"], stdout=subprocess.PIPE, check=True)
            assert done.stdout == b"text"
    assert sanitize("\ud83d") == "\\ud83d"
    assert len(list_names(["x" * 9999] * 9999)) < 1000


@pytest.mark.parametrize("compress", COMPRESSORS, ids=["plain", "gzip", "zstd"])
@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"id": [1.5, -2e9], "text": line} for line in LINES], indent=1),
        json.dumps(LINES),
        json.dumps(LINES, ensure_ascii=False) + "\n",
        json_lines(LINES),
        "\n".join(map(json.dumps, LINES)),
    ],
    ids=["objects", "strings", "unescaped", "JSON Lines", "lines of strings"],
)
def test_each_json_value_is_a_document(tmp_path: Path, content: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a.json{suffix_of(compress)}"
    path.write_bytes(compress(b"\xef\xbb\xbf" + content.encode()))
    assert read(path, keep_documents=True, separate_documents=True) == LINES
    assert read(path) == ["".join(line + "\n" for line in LINES)]


@pytest.mark.usefixtures("chunk_bytes")
def test_json_lines_may_be_strings(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    assert read(tmp_path / "a.jsonl", keep_documents=True, separate_documents=True) == LINES


@pytest.mark.parametrize("compress", COMPRESSORS, ids=["plain", "gzip", "zstd"])
@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize(("suffix", "dialect"), [(".csv", "excel"), (".tsv", "excel-tab"), (".CSV", "unix")])
def test_each_csv_row_is_a_document(
    tmp_path: Path, suffix: str, dialect: str, compress: Callable[[bytes], bytes]
) -> None:
    table, records = io.StringIO(newline=""), [*LINES, 'with "quotes", commas\tand\r\nlines']
    csv.writer(table, dialect).writerows([["text", "id"], *([record, 1] for record in records)])
    path = tmp_path / f"a{suffix}{suffix_of(compress)}"
    path.write_bytes(compress(b"\xef\xbb\xbf" + table.getvalue().encode()))
    assert read(path, keep_documents=True, separate_documents=True) == records


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"}, {"text"', "record 2 is not JSON ("),
        ("a.json", '["a" "b"]', "record 2 is not JSON (Expecting ',' delimiter or the end of the array)"),
        ("a.json", '["a"] "b"', "record 2 is not JSON (more text after the array)"),
        ("a.json", '["a", 1]', "record 2 is neither text nor a JSON object with a field 'text'"),
        ("a.json", '{"\\ud83d": 1}', "record 1 has no field 'text' (it has: \\ud83d); prepare.py reads another "),
        ("a.json", "[" * 100_000, "record 1 is not JSON ("),
        ("a.csv", "id,body\n1,a\n", "has no column 'text' (it has: id, body); prepare.py reads another "),
        ("a.csv", "id,text\n1,a\n2,b,c\n", "line 3: 3 columns, but the first line names 2; "),
        ("a.csv", 'text\n"a\n', "line 2: unexpected end of data; "),
        ("a.tsv", 'text\n"a" b\n', "line 2: '\t' expected after '\"'; "),
    ],
)
def test_an_invalid_record_is_named_in_the_error(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_records_are_read_with_bounded_memory(name: str) -> None:
    record = {"a.json": '{"text": "%s"},', "a.jsonl": '{"text": "%s"}\n', "a.csv": '"%s"\n'}[name] % ("word " * 200)
    start, end = {"a.json": ("[", '"the end"]'), "a.jsonl": ("", '"the end"'), "a.csv": ("text\n", "the end\n")}[name]
    chunks = chain([start], (record * 20 for _ in range(1500)), [end])
    readers: dict[str, Any] = {
        "a.json": json_values,
        "a.jsonl": json_records,
        "a.csv": partial(csv_rows, delimiter=","),
    }
    tracemalloc.start()
    count = sum(map(len, readers[name](chunks, name, "text")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1500 * 20 + 1
    assert peak < 5_000_000  # of 30 million characters


def write_tar(path: Path, mode: Literal["w", "w:gz"]) -> None:
    with tarfile.open(path, mode) as archive:
        archive.add(__file__, "x.txt")


CONTAINERS: dict[str, Callable[[Path], object]] = {
    "a.tar": lambda path: write_tar(path, "w"),
    "a.tar.gz": lambda path: write_tar(path, "w:gz"),
    "a.zip": lambda path: zipfile.ZipFile(path, "w").writestr("x.txt", "text"),
    "a.docx": lambda path: zipfile.ZipFile(path, "w").writestr("word/document.xml", "text"),
    "a.bz2": lambda path: path.write_bytes(bz2.compress(b"text")),
    "a.xz": lambda path: path.write_bytes(lzma.compress(b"text")),
    "a.gz": lambda path: path.write_bytes(gzip.compress(gzip.compress(b"text"))),
    "a.zst": lambda path: path.write_bytes(import_zstd().compress(gzip.compress(b"text"))),
    "a.7z": lambda path: path.write_bytes(b"7z\xbc\xaf\x27\x1c\0\4"),
    "a.rar": lambda path: path.write_bytes(b"Rar!\x1a\x07\x01\0"),
    "a.pdf": lambda path: path.write_bytes(b"%PDF-1.7\n%\xe2\xe3\n"),
    "a.db": lambda path: sqlite3.connect(path).execute("create table t (text)"),
    "a.png": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0"),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.usefixtures("chunk_bytes")
def test_containers_are_rejected_by_their_first_bytes(tmp_path: Path, name: str, encoding: str) -> None:
    CONTAINERS[name](tmp_path / name)
    for path in (tmp_path / name, tmp_path / "my own.txt"):
        path.write_bytes((tmp_path / name).read_bytes())
        with pytest.raises(UserError, match=r": (a|an|compressed) [^;]*, not plain text; [^;]*$") as caught:
            read(path, encoding=encoding)
        command = re.search(r": ((?:bzip2|xz|gzip|zstd|mkdir) .*)", str(caught.value))
        for program in ("zstd", "unzip", "7z", "unrar"):
            if command and program in command[1] and not shutil.which(program):
                command = None
        if command and name not in ("a.7z", "a.rar"):
            assert subprocess.run(["bash", "-ec", command[1]], cwd=tmp_path, check=False).returncode == 0
            assert any(tmp_path.glob("NEW*")) or any((tmp_path / "texts").iterdir())
            shutil.rmtree(tmp_path / "texts", ignore_errors=True)
            for new in tmp_path.glob("NEW*"):
                new.unlink()


def test_text_that_resembles_a_signature_is_read(tmp_path: Path) -> None:
    for number, content in enumerate((b"x" * 257 + b"ustard", b"PKware", b"PAR1 text", b"BZh9 chess", b"%PDF-files")):
        (tmp_path / f"{number}.txt").write_bytes(content)
        assert read(tmp_path / f"{number}.txt") == [content.decode()]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("encoding", "source"), [("utf-16", "UTF-16"), ("utf-32", "UTF-32"), ("latin-1", "LATIN1")])
def test_iconv_is_suggested_if_there_is_no_encoding_option(
    tmp_path: Path, encoding: str, source: str, compressed: bool
) -> None:
    path = tmp_path / "my own.txt"
    content = "élan ça\n".encode(encoding)
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(UserError, match="is not utf-8 text; convert it") as caught:
        read_text(str(path))
    assert "--encoding" not in str(caught.value)
    command = str(caught.value).rpartition(": ")[2]
    iconv = f"iconv -f {source} -t UTF-8"
    assert command == (f"gzip -dc '{path}' | {iconv} > NEW" if compressed else f"{iconv} '{path}' > NEW")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert read_text(str(tmp_path / "NEW")) == "élan ça\n"


def test_the_encoding_of_a_byte_order_mark_is_suggested(tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-32"):
        (tmp_path / "a.txt").write_bytes("élan".encode(encoding))
        with pytest.raises(UserError, match=rf"byte 0xff at offset 0 is not utf-8 text; add --encoding={encoding}$"):
            read(tmp_path / "a.txt")
        assert read(tmp_path / "a.txt", encoding=encoding) == ["élan"]


def test_read_text_needs_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    (tmp_path / "a.txt").write_text("text")
    assert read_text(str(tmp_path / "a.txt")) == "text"
    for word in ("-", "/dev/stdin"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress("é".encode()))))
        assert read_text(word) == "é"


def test_read_text_reads_a_pipe_once(tmp_path: Path) -> None:
    records = write_records(tmp_path / "a.parquet", LINES).read_bytes()
    for content, text in ((b"text\r\n", "text\r\n"), (records, "".join(line + "\n" for line in LINES))):
        pipe = tmp_path / f"pipe{len(content)}"
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        assert read_text(str(pipe)) == text
        writer.join()


def test_a_file_that_cannot_be_opened_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a\n.txt").write_text("text")

    def deny(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(UserError, match=r"a\\n\.txt: Permission denied$"):
        read_text(str(tmp_path / "a\n.txt"))


def test_read_up_to_passes_on_the_bytes_up_to_a_fraction() -> None:
    seen = bytearray()
    content = bytes(range(250)) * 4
    file = TeeReader(io.BytesIO(content), seen.extend)
    file.peek(512)
    for fraction, expected in ((0.1, 512), (0.6, 600), (1, 1000)):
        file.read_up_to(fraction)
        assert seen == content[:expected]
