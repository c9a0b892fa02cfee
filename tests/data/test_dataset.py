"""Datasets on disk: written tokens can be read back, and all damage is detected."""

import errno
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as tries
from hypothesis import strategies as st

from conftest import prepare_text, some_text
from glyphgpt.data import dataset
from glyphgpt.data.dataset import OPEN_SHARDS, Dataset, ShardWriter, Split, load_dataset, map_shard, read_meta
from glyphgpt.errors import UserError
from glyphgpt.files import META, file_sha256

SHARD = "train-00001.npy"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Prepare a dataset of several shards."""
    return prepare_text(some_text(300), tmp_path, shard_tokens=100)


def load(folder: Path) -> Dataset:
    return load_dataset(folder, folder.parent)


def edit(folder: Path, *keys: str | int, value: Any) -> None:
    """Set the value in meta.json that nested keys lead to."""
    data = inside = json.loads((folder / META).read_text(encoding="utf-8"))
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    (folder / META).write_text(json.dumps(data), encoding="utf-8")


def forge(folder: Path, content: bytes) -> None:
    """Replace a shard and its checksum."""
    (folder / SHARD).write_bytes(content)
    edit(folder, "train", "shards", 1, "sha256", value=file_sha256(folder / SHARD))


def as_npy(array: "np.ndarray[Any, Any]") -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def as_npz(array: "np.ndarray[Any, Any]") -> bytes:
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


def npy_of_header(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(117) + b"\n" + bytes(100)


def test_an_intact_dataset_loads(folder: Path) -> None:
    dataset = load(folder)
    assert [shard.size for shard in dataset.train.shards] == [100, 100, 70]
    assert dataset.train.slice(0, 270).tolist() == dataset.tokenizer.encode(some_text(300)[:270]).tolist()


def truncated_file(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1])


def longer_file(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes() + b"\0")


def missing_file(folder: Path) -> None:
    (folder / SHARD).unlink()


def shard_of_another_dataset(folder: Path) -> None:
    other = prepare_text(some_text(300, seed=1), folder.parent, "other", shard_tokens=100)
    (folder / SHARD).write_bytes((other / SHARD).read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated_file, "damaged, its checksum does not match; prepare the dataset again"),
        (longer_file, "damaged, its checksum does not match; prepare the dataset again"),
        (shard_of_another_dataset, "damaged, its checksum does not match; prepare the dataset again"),
        (missing_file, "missing; prepare the dataset again"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_shard_is_named_in_the_error(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder / SHARD}: {message}")


def test_shards_in_another_order_are_detected(folder: Path) -> None:
    first, second = folder / "train-00000.npy", folder / SHARD
    first_content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(first_content)
    with pytest.raises(UserError, match="its checksum does not match"):
        load(folder)


@pytest.mark.parametrize("offset", [0, 6, 9, 20, 127, 128, 150, -1])
@pytest.mark.parametrize("name", [SHARD, "val-00000.npy"])
def test_a_flipped_bit_is_detected(folder: Path, name: str, offset: int) -> None:
    content = bytearray((folder / name).read_bytes())
    content[offset] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match="its checksum does not match"):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"not an array",
        as_npy(np.full(100, 99, dtype=np.uint8)),
        as_npy(np.zeros(99, dtype=np.uint8)),
        as_npy(np.zeros(100, dtype=np.uint16)),
        as_npy(np.zeros(100, dtype=np.int8)),
        as_npy(np.zeros((10, 10), dtype=np.uint8)),
        as_npy(np.zeros(100, dtype=np.uint8))[:-1],
        as_npy(np.array({"a": 1}, dtype=object)),
        as_npz(np.zeros(100, dtype=np.uint8)),
        npy_of_header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-100,)}"),
        npy_of_header(b"{'descr': '|u1', 'fortran_order': False, 'shape': ("),
        npy_of_header(b"{[]: 1}"),
    ],
    ids=[
        "empty",
        "magic only",
        "text",
        "ids outside the vocabulary",
        "too few",
        "wider dtype",
        "signed",
        "two dimensions",
        "truncated",
        "objects",
        "archive",
        "negative shape",
        "open parenthesis",
        "invalid header",
    ],
)
def test_a_wrong_shard_with_a_valid_checksum_is_detected(folder: Path, content: bytes) -> None:
    forge(folder, content)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder / SHARD}: ")


class Exploit:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["array of objects", "plain pickle"])
def test_a_shard_is_never_unpickled(folder: Path, tmp_path: Path, kind: str) -> None:
    created = tmp_path / "created"
    exploit = Exploit(created)
    content = as_npy(np.array([exploit], dtype=object)) if kind == "array of objects" else pickle.dumps(exploit)
    forge(folder, content)
    with pytest.raises(UserError):
        load(folder)
    assert not created.exists()
    np.load(folder / SHARD, allow_pickle=True)
    assert created.exists(), "the exploit works"


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["format"], 0),
        (["format"], "1"),
        (["format"], None),
        (["vocab_size"], 99),
        (["vocab_size"], 0),
        (["vocab_size"], 12.0),
        (["tokenizer"], {}),
        (["tokenizer"], "char"),
        (["tokenizer"], {"kind": "byte"}),
        (["tokenizer", "characters"], "abc"),
        (["tokenizer", "characters"], "cba"),
        (["tokenizer", "kind"], "word"),
        (["train"], []),
        (["train", "tokens"], 271),
        (["train", "tokens"], -1),
        (["train", "tokens"], "270"),
        (["train", "characters"], 0),
        (["val", "characters"], -1),
        (["train", "shards"], []),
        (["train", "shards", 1, "tokens"], 99),
        (["train", "shards", 1, "sha256"], "0" * 64),
        (["train", "shards", 1, "sha256"], 0),
        (["train", "shards", 1, "file"], "val-00000.npy"),
        (["train", "shards", 1, "file"], "../other/train-00001.npy"),
        (["train", "shards", 1, "file"], "train-00009.npy"),
        (["source", "bytes"], None),
        (["extra"], 1),
    ],
    ids=str,
)
def test_a_wrong_value_in_meta_json_is_detected(folder: Path, keys: list[str | int], value: Any) -> None:
    edit(folder, *keys, value=value)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["format", "recipe", "tokenizer", "vocab_size", "source", "train", "val"])
def test_a_missing_key_in_meta_json_is_detected(folder: Path, key: str) -> None:
    data = json.loads((folder / META).read_text(encoding="utf-8"))
    del data[key]
    (folder / META).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder / META}: damaged")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 100_000, b"9" * 5000], ids=len)
def test_invalid_content_in_meta_json_is_detected(folder: Path, content: bytes) -> None:
    (folder / META).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder / META}: damaged")


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_truncated_meta_json_is_detected(folder: Path, fraction: float) -> None:
    content = (folder / META).read_bytes()
    (folder / META).write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(UserError, match="damaged"):
        load(folder)


def test_a_newer_format_is_rejected(folder: Path) -> None:
    edit(folder, "format", value=2)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(caught.value) == f"{folder / META}: written by a newer glyphgpt (format 2); update glyphgpt"


def test_a_missing_dataset_is_reported_with_the_command_that_prepares_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path / "mine")
    assert str(caught.value) == (
        f"{tmp_path / 'mine'}: no dataset here; prepare it first: python prepare.py FILE --name=mine "
        f"--data_dir={tmp_path}"
    )
    with pytest.raises(UserError, match="no dataset here"):
        load(tmp_path / ("9" * 252))  # a name that is too long with .toml
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / META).touch()
    with pytest.raises(UserError) as caught:
        load(tmp_path / "shakespeare_char")
    assert str(caught.value) == (
        f"{tmp_path / 'shakespeare_char'}: no dataset here; prepare it first: python prepare.py shakespeare_char "
        f"--data_dir={tmp_path} (a recipe); datasets in {tmp_path}: other"
    )


@tries(deadline=None, max_examples=200)
@given(data=st.data(), sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_a_slice_may_span_several_shards(data: st.DataObject, sizes: list[int]) -> None:
    total = sum(sizes)
    tokens = np.arange(total, dtype=np.uint8)
    split = Split(tuple(np.split(tokens, np.cumsum(sizes)[:-1])), characters=total)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    assert split.tokens == total
    assert split.slice(start, stop).tolist() == tokens[start:stop].tolist()
    assert split.slice(start, stop).dtype == np.uint8


@tries(deadline=None, max_examples=60)
@given(
    parts=st.lists(st.lists(st.integers(0, 299), max_size=7), max_size=6),
    vocab_size=st.sampled_from([300, 70_000]),
    shard_tokens=st.integers(1, 8),
)
@example(parts=[[1, 2], [3, 4, 5, 6]], vocab_size=300, shard_tokens=3)
def test_written_tokens_can_be_read_back(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], vocab_size: int, shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, "train", vocab_size, shard_tokens)
    for part in parts:
        writer.write(np.array(part, dtype=np.uint16))
    writer.finish()
    meta = writer.meta(characters=5)
    arrays = [np.load(folder / shard.file) for shard in meta.shards]
    tokens = [token for part in parts for token in part]
    assert [int(token) for array in arrays for token in array] == tokens
    assert {array.dtype for array in arrays} <= {np.dtype(np.uint16 if vocab_size == 300 else np.uint32)}
    assert [shard.tokens for shard in meta.shards] == [array.size for array in arrays]
    assert len(arrays) == -(-len(tokens) // shard_tokens)
    assert (meta.tokens, meta.characters) == (len(tokens), 5)


def test_the_fingerprint_identifies_tokenizer_and_tokens(tmp_path: Path) -> None:
    text = some_text(300)

    def fingerprint(name: str, text: str, **changes: Any) -> str:
        return read_meta(prepare_text(text, tmp_path, name, **changes)).fingerprint

    same = fingerprint("one", text)
    assert fingerprint("two", text) == same
    others = [
        fingerprint("last", text[:-1] + "t"),
        fingerprint("swapped", text[1] + text[0] + text[2:]),
        fingerprint("renamed", text.replace("k", "K")),
        fingerprint("other_split", text, val_fraction=0.2),
        fingerprint("bytes", text, tokenizer="byte"),
    ]
    assert len({same, *others}) == 6
    assert fingerprint("more_shards", text, shard_tokens=37) == same


def test_many_shards_need_few_open_files(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    text = some_text(3000)
    folder = prepare_text(text, tmp_path, shard_tokens=5, tokenizer="byte")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + OPEN_SHARDS + 10, hard))
    try:
        dataset = load(folder)
        assert len(dataset.train.shards) == 540
        windows = [dataset.train.slice(start, start + 64).tobytes() for start in range(0, 2600, 13)]
        assert dataset.train.slice(0, 2700).tobytes() == text[:2700].encode()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert windows == [text[start : start + 64].encode() for start in range(0, 2600, 13)]


def test_a_shard_that_changed_after_it_was_verified_is_not_read(folder: Path) -> None:
    dataset = load(folder)
    map_shard.cache_clear()
    (folder / SHARD).touch()
    with pytest.raises(
        UserError, match=rf"^{folder / SHARD}: changed while it was in use; start again to use the new data$"
    ):
        dataset.train.slice(90, 150)


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_a_system_error_is_not_reported_as_damage(folder: Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(dataset, "file_sha256", fail)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(caught.value) == f"{folder / 'train-00000.npy'}: {os.strerror(error)}"
