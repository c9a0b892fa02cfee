"""Texts as documents: files, folders and patterns, packed files, and files of records."""

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st
from pyarrow import parquet

from glyphgpt import text as texts
from glyphgpt.errors import Failure, UsageError
from glyphgpt.formats import zstandard
from glyphgpt.records import Documents, json_records
from glyphgpt.sources import find_files
from glyphgpt.text import Text, open_text

LINES = ["one", "zwei\ndrei", "", "\u2028quatre 🙂 \0"]


def joined(stream: Iterator[Documents]) -> Documents:
    """Put documents together that came in pieces."""
    documents = [""]
    for found in stream:
        documents = [*documents[:-1], documents[-1] + found[0], *found[1:]]
    return documents


def read(*paths: Path, **form: Any) -> Documents:
    text = Text(paths, tuple(map(str, paths)), **form)
    seen = bytearray()
    documents = joined(text.read(seen.extend))
    assert seen == b"".join(path.read_bytes() for path in paths), "all bytes are told of, in their order"
    return documents


def json_lines(records: list[str], field: str = "text") -> str:
    return "".join(json.dumps({"id": 1, field: record}) + "\n" for record in records)


def write_records(path: Path, records: list[str]) -> Path:
    """Write records in the form that the file's name tells of."""
    match path.suffixes:
        case [".jsonl"]:
            path.write_text(json_lines(records), encoding="utf-8")
        case [".ndjson", ".gz"]:
            path.write_bytes(gzip.compress(json_lines(records).encode()))
        case [".jsonl", ".zst"]:
            path.write_bytes(zstandard().compress(json_lines(records).encode()))
        case [".parquet"]:
            table = pyarrow.table({"id": [0] * len(records), "text": records})
            parquet.write_table(table, path, row_group_size=2)
    return path


@pytest.fixture(params=[1, 3, 1 << 18])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Read files in pieces of so many bytes."""
    monkeypatch.setattr(texts, "CHUNK_BYTES", request.param)
    return request.param


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.gz", "a.jsonl.zst", "a.parquet"])
def test_each_record_is_a_document(tmp_path: Path, name: str) -> None:
    path = write_records(tmp_path / name, LINES)
    assert read(path, separate=True) == LINES
    assert read(path) == ["".join(line + "\n" for line in LINES)]


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, lambda data: zstandard().compress(data)])
def test_a_packed_file_is_the_text_in_it(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    suffix = {b"x": ""}.get(pack(b"x")[:1], ".gz" if pack(b"x").startswith(b"\x1f\x8b") else ".zst")
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(pack("élan 🙂\r\n".encode()) + pack(b"second part"))
    assert read(path) == ["élan 🙂\r\nsecond part"]


def test_files_are_documents_of_their_own_where_documents_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("1.txt", "2.txt", "3.txt")]
    for path, content in zip(paths, ["first", "", "third"], strict=True):
        path.write_text(content)
    records = write_records(tmp_path / "4.jsonl", ["fourth", "fifth"])
    assert read(*paths, records, paths[0], separate=True) == ["first", "third", "fourth", "fifth", "first"]
    assert read(*paths, records, paths[0]) == ["firstthirdfourth\nfifth\nfirst"]


@tries(deadline=None, max_examples=100)
@given(st.lists(st.text(st.characters(codec="utf-8"))), st.integers(1, 9), st.booleans())
def test_json_lines_come_in_any_pieces(records: list[str], size: int, last_line_ends: bool) -> None:
    text = json_lines(records)[: None if last_line_ends else -1]
    pieces = (text[i : i + size] for i in range(0, len(text), size))
    assert list(chain.from_iterable(json_records(pieces, "name", "text"))) == records


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": ', "line 3 is not JSON ("),
        ("[" * 100_000, "line 3 is not JSON ("),
        ("[1]", "line 3 is neither text nor a JSON object with a field 'text'"),
        ('{"body": "x", "id": 1}', "line 3 has no field 'text'; there are: body, id; prepare.py reads another with --text_field=NAME"),
        ('{"text": null}', "line 3: 'text' is not text but null"),
        ('{"text": ["a", "b"]}', """line 3: 'text' is not text but ["a", "b"]"""),
        ('{"text": "\\ud83d"}', "line 3: 'text' holds half a surrogate pair, which is no character"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines(["a"]) + "\n" + line + "\n")
    with pytest.raises(Failure) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert "\n" not in str(caught.value)


def test_another_field_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines(LINES, "body"), encoding="utf-8")
    assert read(path, field="body", separate=True) == LINES


def test_columns_that_will_not_do_are_named(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.parquet", LINES)
    for field, said in (("body", "has no column 'body'; there are: id, text; prepare.py reads another with --text_field=NAME"),):
        with pytest.raises(Failure, match=f"^{path}: {said}$"):
            read(path, field=field)
    with pytest.raises(Failure, match=f"^{path}: row 1: 'id' is not text but 0$"):
        read(path, field="id")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(Failure, match=f"^{path}: row 2: 'text' is not text but null$"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.ndjson.gz", "a.parquet"])
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str) -> None:
    path = write_records(tmp_path / name, LINES * 100)
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:-3], whole[:middle], b"\x00" * (middle - 9) + whole[middle - 9 :], b"", whole[:5]):
        path.write_bytes(damaged)
        if damaged == b"" and name.endswith(".gz"):
            continue  # an empty file is gzip of nothing
        with pytest.raises(Failure, match=f"^{path}: cannot be ") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_records(tmp_path / "a.parquet", LINES)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(Failure, match=r"a.parquet: reading Parquet needs pyarrow: pip install pyarrow$"):
        read(path)


def test_patterns_name_the_files_that_fit_sorted(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "deep/er/d.txt", "[x].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(word: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in find_files([str(tmp_path / word)]).files if path]

    assert found("*.txt") == ["[x].txt", "a.txt", "b.txt"]
    assert found("**/*.txt") == ["[x].txt", "a.txt", "b.txt", "deep/er/d.txt"]
    assert found("[x].txt") == ["[x].txt"], "a file of that very name goes before"
    assert found("d*") == ["deep/er/d.txt"], "a folder that fits is read whole"
    assert found("**") == ["[x].txt", "a.txt", "b.txt", "c.md", "deep/er/d.txt"], "each file once"
    with pytest.raises(UsageError, match="no such file or folder"):
        found("*.rst")


def test_an_encoding_without_its_mark_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16-le"))
    with pytest.raises(Failure, match=r"a\.txt: is not utf-16 text: .*name its --encoding"):
        read(tmp_path / "a.txt", encoding="utf-16")


def test_a_file_packed_with_a_large_window_is_read(tmp_path: Path) -> None:
    zstd = zstandard()
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 28})
    (tmp_path / "a.zst").write_bytes(packer.compress(b"te") + packer.compress(b"xt") + packer.flush())
    assert read(tmp_path / "a.zst") == ["text"]


def test_a_pattern_makes_one_text(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    assert joined(open_text([str(tmp_path / "*.txt")], tmp_path).read(lambda _: None)) == ["ab"]
