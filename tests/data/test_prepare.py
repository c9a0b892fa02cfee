"""prepare.py writes shards that decode to exactly the same text, or reports one line and changes nothing."""

from glyphgpt.startup import USAGE

import io
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import example, given
from hypothesis import settings as tries
from hypothesis import strategies as st
from pyarrow import parquet

import prepare
from conftest import ROOT, prepare_text, run_prepare, script, some_text
from glyphgpt.checkpoint import Checkpoint, Metadata, TrainState, save_checkpoint
from glyphgpt.data import text as texts
from glyphgpt.data.dataset import Dataset, ShardWriter, load_dataset, read_meta
from glyphgpt.data.scan import Scan
from glyphgpt.data.splitting import Segment, count_characters, split_text
from glyphgpt.data.staging import PrepareProgress
from glyphgpt.data.tokenizers import decode
from glyphgpt.errors import UsageError, UserError
from glyphgpt.files import BEST

TEXT = some_text(200)
NOT_UTF8 = "is not utf-8 text; set --encoding, convert the file, or leave it out"
NO_NAME = "the dataset needs a name of letters, digits, '_', '-' and '.'; add --name=NAME"
Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run prepare.py in this process, with `tmp_path` as its data folder, and without a report."""

    def run(*words: str | Path) -> None:
        run_prepare(*map(str, words), f"--data_dir={tmp_path / 'data'}", "--report=False")

    return run


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(data_dir: Path, name: str) -> Dataset:
    return load_dataset(data_dir / name, data_dir)


def splits(dataset: Dataset) -> tuple[str, str]:
    train, val = (decode(dataset.tokenizer, part.slice(0, part.tokens)) for part in (dataset.train, dataset.val))
    return train, val


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")} if folder.exists() else {}


def failure(run: Run, data_dir: Path, *words: str | Path, kind: type[UserError] = UserError) -> str:
    """Return the one-line error of a run that fails and leaves the data folder unchanged."""
    before = snapshot(data_dir)
    with pytest.raises(kind) as caught:
        run(*words)
    assert snapshot(data_dir) == before
    [line] = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
@tries(deadline=None, max_examples=60)
@given(text=st.text(min_size=4, max_size=40), chunk=st.integers(1, 7), shard_tokens=st.integers(1, 9))
@example(text="\ufeffé\r\n🙂\r\r\n\0🙂", chunk=1, shard_tokens=1)
@example(text="🙂🙂🙂🙂", chunk=3, shard_tokens=9)
def test_shards_decode_to_exactly_the_same_text(tokenizer: str, text: str, chunk: int, shard_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "CHUNK_BYTES", chunk)
        data_dir = Path(folder)
        prepare_text(text, data_dir, tokenizer=tokenizer, val_fraction=0.5, shard_tokens=shard_tokens)
        dataset = load(data_dir, "small")
        assert splits(dataset) == (text[: len(text) // 2], text[len(text) // 2 :])
        assert dataset.train.characters + dataset.val.characters == len(text)
        for split in (dataset.train, dataset.val):
            assert [s.size for s in split.shards[:-1]] == [shard_tokens] * (len(split.shards) - 1)
            assert 0 < split.shards[-1].size <= shard_tokens
        assert dataset.meta.source.sha256 == sha256(text.encode()).hexdigest()
        assert dataset.meta.source.bytes == len(text.encode())


@pytest.mark.parametrize(("chunk", "shard_tokens"), [(1, 100), (500, 7), (1 << 22, 10**8)])
def test_a_streamed_text_has_the_same_bpe_tokens_as_the_whole_text(
    gpt2_data_dir: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, shard_tokens: int
) -> None:
    monkeypatch.setattr(texts, "CHUNK_BYTES", chunk)
    rng = random.Random(chunk)
    words = [" ", "   ", "\n", "\n\n ", "\t", "it's", " we'll", "'", "2024", "é", "字", "🙂", "!?", "word", " word"]
    text = "".join(rng.choices(words, k=1500))
    prepare_text(text, gpt2_data_dir, f"chunk{chunk}", tokenizer="gpt2", shard_tokens=shard_tokens)
    dataset = load(gpt2_data_dir, f"chunk{chunk}")
    train_characters = int(len(text) * 0.9)
    for split, part in ((dataset.train, text[:train_characters]), (dataset.val, text[train_characters:])):
        assert split.slice(0, split.tokens).tolist() == dataset.tokenizer.encode(part).tolist()
        assert split.dtype == "uint16"


def test_streaming_keeps_little_text_in_memory(gpt2_data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "CHUNK_BYTES", 50)
    sizes: list[int] = []

    def recorded(*arguments: Any) -> Iterator[Segment]:
        for segment in split_text(*arguments):
            sizes.append(count_characters(segment.documents))
            yield segment

    monkeypatch.setattr(prepare, "split_text", recorded)
    prepare_text(some_text(6000), gpt2_data_dir, "streamed", tokenizer="gpt2")
    assert len(sizes) > 100
    assert max(sizes) < 200


def test_the_last_tenth_is_the_validation_split(tmp_path: Path) -> None:
    text = some_text(1005)
    prepare_text(text, tmp_path)
    assert splits(load(tmp_path, "small")) == (text[:904], text[904:])


def test_several_files_are_one_text_in_the_given_order(run: Run, tmp_path: Path) -> None:
    first, second = write(tmp_path / "z.txt", "\ufeffone\r\n" * 9), write(tmp_path / "a.txt", "two" * 9)
    run(first, second, "--name=both")
    dataset = load(tmp_path / "data", "both")
    assert "".join(splits(dataset)) == "\ufeffone\r\n" * 9 + "two" * 9
    assert dataset.meta.source.names == [str(first), str(second)]


def test_the_files_of_a_folder_are_sorted_and_hidden_ones_left_out(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    for name, text in {"b/2.txt": "two.", "a.txt": "zero.", "b/1.md": "one.", "c": "three." * 9}.items():
        write(folder / name, text)
    for name in (".hidden", "b/.hidden", ".git/config"):
        write(folder / name, b"\xff")
    run(folder)
    assert "".join(splits(load(tmp_path / "data", "texts"))) == "zero.one.two." + "three." * 9


def test_standard_input_is_read(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "typed\r\n" * 20 + "é"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii"))
    run("-", "--name=typed")
    dataset = load(tmp_path / "data", "typed")
    assert "".join(splits(dataset)) == text
    assert dataset.meta.source.names == ["standard input"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["typed"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig", "cp932"])
@pytest.mark.parametrize("chunk", [1, 3, 1 << 22])
def test_other_encodings_are_decoded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, chunk: int
) -> None:
    monkeypatch.setattr(texts, "CHUNK_BYTES", chunk)
    text = ("日本語\r\n" if encoding == "cp932" else "café\r\n") * 9
    run(write(tmp_path / "mine.txt", text.encode(encoding)), f"--encoding={encoding}")
    assert "".join(splits(load(tmp_path / "data", "mine"))) == text


def test_shards_of_any_size_hold_the_same_tokens(tmp_path: Path) -> None:
    large = load(prepare_text(TEXT, tmp_path, "large").parent, "large")
    small = load(prepare_text(TEXT, tmp_path, "small", shard_tokens=7).parent, "small")
    assert (len(large.train.shards), len(small.train.shards), len(small.val.shards)) == (1, 26, 3)
    for one, other in ((large.train, small.train), (large.val, small.val)):
        assert one.slice(0, one.tokens).tolist() == other.slice(0, other.tokens).tolist()


def test_the_summary_is_printed(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(write(tmp_path / "mine.txt", "é" * 1500 + "a" * 500), "--tokenizer=byte")
    assert capsys.readouterr().out == (
        f"{tmp_path / 'data' / 'mine'}: 2,000 characters, 3,500 tokens (3,300 to train, 200 to validate)\n"
        "vocabulary: 256 (byte), 0.57 characters per token\n"
        f"next: python train.py --dataset=mine --out_dir=out/mine --data_dir={tmp_path / 'data'} --minutes=1\n"
    )


@pytest.fixture(params=[1, 2, 3, 5, 1 << 22])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Set the number of bytes that are read at once."""
    monkeypatch.setattr(texts, "CHUNK_BYTES", request.param)
    return request.param


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "FILE: the text is empty; there is nothing to learn from"),
        (
            b"a",
            "FILE: too short: 1 characters give 0 of the 2 tokens that training needs; add text",
        ),
        (
            b"abcdefghij",
            "FILE: too short: 10 characters give 1 of the 2 tokens that validation needs; add text",
        ),
        (b"\x89PNG\r\n" * 9, f"FILE: byte 0x89 at offset 0 {NOT_UTF8}"),
        (b"caf\xe9 au lait" * 9, f"FILE: byte 0xe9 at offset 3 {NOT_UTF8}"),
        (b"a" * 1234 + b"\xff" + b"a" * 99, f"FILE: byte 0xff at offset 1,234 {NOT_UTF8}"),
        ("🙂🙂🙂".encode()[:-1], f"FILE: byte 0xf0 at offset 8 {NOT_UTF8}"),
        (b"ab\xe2\x82cd", f"FILE: byte 0xe2 at offset 2 {NOT_UTF8}"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("chunk_bytes")
def test_an_unsuitable_file_is_reported(run: Run, tmp_path: Path, content: bytes, message: str) -> None:
    file = write(tmp_path / "mine.txt", content)
    (tmp_path / "data").mkdir()
    assert failure(run, tmp_path / "data", file) == message.replace("FILE", str(file))


def test_the_offset_of_an_invalid_byte_is_relative_to_its_file(run: Run, tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.txt", TEXT), write(tmp_path / "bad.txt", b"ab\xff")
    (tmp_path / "data").mkdir()
    assert failure(run, tmp_path / "data", good, bad, "--name=both") == f"{bad}: byte 0xff at offset 2 {NOT_UTF8}"


BAD_ENCODING = "--encoding must be a text encoding that Python knows, such as latin-1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.txt"], "missing.txt: no such file or folder"),
        (["mine.txt", "missing.txt", "--name=x"], "missing.txt: no such file or folder"),
        (["missing"], "missing: no such file, folder or recipe; recipes in DATA: none"),
        (["hollow"], "hollow: no files in this folder"),
        (["mine.txt", "--encoding=utf-99"], f"{BAD_ENCODING}, not 'utf-99'"),
        (["mine.txt", "mine.txt"], NO_NAME),
        (["-"], NO_NAME),
        (["mine.txt", "--name=a/b"], NO_NAME),
        (["mine.txt", "--name=.."], NO_NAME),
        (["mine.txt", "--name=downloads"], "--name=downloads is reserved for downloaded files; choose another name"),
        (["mine.txt", "--tokenizr=byte"], "command line: unknown key --tokenizr; did you mean 'tokenizer'?"),
    ],
    ids=str,
)
def test_invalid_words_are_reported(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    write(tmp_path / "mine.txt", TEXT)
    for name in ("data", "hollow"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    error = failure(run, tmp_path / "data", *words, kind=UsageError)
    assert error == message.replace("DATA", str(tmp_path / "data"))


@pytest.mark.parametrize("encoding", ["rot13", "hex", "undefined", "unicode_escape", "utf-7", "punycode"])
def test_codecs_that_are_not_text_encodings_are_rejected(run: Run, tmp_path: Path, encoding: str) -> None:
    file = write(tmp_path / "mine.txt", TEXT)
    (tmp_path / "data").mkdir()
    error = failure(run, tmp_path / "data", file, f"--encoding={encoding}", kind=UsageError)
    assert error == f"{BAD_ENCODING}, not '{encoding}'"


def test_standard_input_can_be_named_only_once(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    error = failure(run, tmp_path / "data", "-", "-", "--name=x", kind=UsageError)
    assert error == "standard input (-) can be read only once"


def test_a_command_line_without_words_shows_the_usage(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "data" / "mine.toml", "")
    assert failure(run, tmp_path / "data", kind=UsageError) == (
        f"name a recipe or a text: {USAGE['prepare.py']}; recipes in {tmp_path / 'data'}: mine"
    )


def test_a_dataset_is_replaced_only_with_overwrite(run: Run, tmp_path: Path) -> None:
    first, second = write(tmp_path / "first.txt", TEXT), write(tmp_path / "second.txt", TEXT[::-1])
    folder = tmp_path / "data" / "mine"
    run(first, "--name=mine")
    assert failure(run, tmp_path / "data", second, "--name=mine") == (
        f"{folder} already contains a dataset; add --overwrite to replace it, or choose --name=ANOTHER"
    )
    run(second, "--name=mine", "--overwrite", "--shard_tokens=50")
    assert "".join(splits(load(tmp_path / "data", "mine"))) == TEXT[::-1]
    run(first, "--name=mine", "--overwrite")
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "train-00000.npy", "val-00000.npy"]
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_a_failed_replacement_keeps_the_old_dataset(run: Run, tmp_path: Path) -> None:
    run(write(tmp_path / "good.txt", TEXT), "--name=mine")
    failure(run, tmp_path / "data", write(tmp_path / "bad.txt", b"\xff"), "--name=mine", "--overwrite")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("method", ["write", "finish"])
def test_a_full_disk_leaves_the_data_folder_unchanged(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, overwrite: bool
) -> None:
    file = write(tmp_path / "mine.txt", TEXT)
    (tmp_path / "data").mkdir()
    if overwrite:
        run(file)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, method, fail)
    before = snapshot(tmp_path / "data")
    with pytest.raises(OSError, match="No space left"):
        run(file, "--overwrite")
    assert snapshot(tmp_path / "data") == before


def test_a_single_failed_write_is_raised(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "CHUNK_BYTES", 16)
    write_tokens, calls = ShardWriter.write, []

    def fail_first(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        write_tokens(*arguments)

    monkeypatch.setattr(ShardWriter, "write", fail_first)
    with pytest.raises(OSError, match="No space left"):
        run(write(tmp_path / "mine.txt", TEXT))


@pytest.mark.parametrize(
    "later", [TEXT + TEXT, TEXT[:-1], "", TEXT[::-1]], ids=["longer", "shorter", "empty", "same length"]
)
def test_a_text_that_changes_between_the_passes_is_reported(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    file = write(tmp_path / "mine.txt", TEXT)
    os.utime(file, (0, 0))  # since file systems round times
    read = Scan.read

    def read_and_change(*arguments: Any) -> PrepareProgress:
        progress = read(*arguments)
        file.write_text(later)
        return progress

    monkeypatch.setattr(Scan, "read", read_and_change)
    (tmp_path / "data").mkdir()
    assert failure(run, tmp_path / "data", file) == f"{file}: the text changed while it was read; try again"


RECIPE = """
title = "A text"
licence = "none"
tokenizer = "byte"
val_fraction = 0.25
[source]
file = "known.txt"
sha256 = "{sha256}"
url = "https://example.org/known.txt"
wheel = "none"
wheel_sha256 = "{sha256}"
wheel_members = []
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Write a recipe, `known`, whose file has already been downloaded."""
    write(tmp_path / "data" / "downloads" / "known.txt", TEXT)
    return write(tmp_path / "data" / "known.toml", RECIPE.format(sha256=sha256(TEXT.encode()).hexdigest()))


def test_a_recipe_sets_tokenizer_and_split(run: Run, tmp_path: Path, recipe: Path) -> None:
    run(recipe.stem)
    dataset = load(tmp_path / "data", "known")
    assert splits(dataset) == (TEXT[:150], TEXT[150:])
    assert (dataset.tokenizer.kind, dataset.meta.recipe, dataset.meta.val_fraction) == ("byte", "known", 0.25)


def test_a_recipe_sets_the_config_of_the_next_command(
    run: Run, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(f'config = "config/translate.toml"\n{recipe.read_text()}')
    for _ in range(2):  # before and after it is prepared
        run(recipe.stem)
        out = capsys.readouterr().out
        assert "next: python train.py config/translate.toml --dataset=known --out_dir=out/known" in out


def test_a_prepared_recipe_is_not_prepared_again(
    run: Run, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(recipe.stem)
    before = snapshot(tmp_path / "data")
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "data" / "known").iterdir())]
    capsys.readouterr()
    run(recipe.stem)
    assert capsys.readouterr().out == (
        f"{tmp_path / 'data' / 'known'} is already prepared; "
        f"next: python train.py --dataset=known --out_dir=out/known --data_dir={tmp_path / 'data'} --minutes=1\n"
    )
    assert snapshot(tmp_path / "data") == before
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "data" / "known").iterdir())] == times


def test_a_recipe_does_not_replace_another_dataset_of_the_same_name(run: Run, tmp_path: Path, recipe: Path) -> None:
    run(write(tmp_path / "mine.txt", TEXT[::-1]), "--name=known")
    assert "already contains a dataset" in failure(run, tmp_path / "data", recipe.stem)
    run(recipe.stem, "--overwrite")
    assert read_meta(tmp_path / "data" / "known").recipe == "known"


@pytest.mark.parametrize(
    "flag", ["--name=x", "--tokenizer=char", "--val_fraction=0.5", "--encoding=latin-1", "--vocabulary=x"]
)
def test_a_recipe_rejects_settings_for_user_texts(run: Run, tmp_path: Path, recipe: Path, flag: str) -> None:
    assert failure(run, tmp_path / "data", recipe.stem, flag, kind=UsageError) == (
        f"{flag.partition('=')[0]} is only for your own text; a recipe is always prepared as {recipe} says"
    )


def test_a_file_takes_precedence_over_a_recipe_of_the_same_name(
    run: Run, tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / recipe.stem, TEXT[::-1])
    run(recipe.stem)
    assert "".join(splits(load(tmp_path / "data", "known"))) == TEXT[::-1]


def test_the_script_reads_a_pipe_and_reports_an_error_in_one_line(tmp_path: Path) -> None:
    words = ("-", "--name=typed", f"--data_dir={tmp_path}")
    done = script("prepare.py", *words, text=TEXT)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "typed" / "meta.json").read_text())["source"]["bytes"] == len(TEXT)
    again = script("prepare.py", *words, text=TEXT)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == (
        f"error: {tmp_path / 'typed'} already contains a dataset; "
        "add --overwrite to replace it, or choose --name=ANOTHER\n"
    )


def test_file_names_may_be_invalid_utf8(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write(folder / os.fsdecode(b"na\xefve.txt"), TEXT)
    records = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": [TEXT]}), records)
    write(folder / os.fsdecode(b"\xff.parquet"), records.getvalue())
    (folder / "gone").symlink_to(os.fsdecode(b"\xff"))
    run(folder, "--name=mine", "--shard_tokens=50")
    names = [rf"{tmp_path}/caf\xe9/{name}" for name in (r"na\xefve.txt", r"\xff.parquet")]
    assert read_meta(tmp_path / "data" / "mine").source.names == names
    assert "".join(splits(load(tmp_path / "data", "mine"))) == f"{TEXT}{TEXT}\n"
    assert r"caf\xe9/gone)" in capsys.readouterr().err
    write(folder / "bad", b"\xff")
    assert failure(run, tmp_path / "data", folder, "--name=x").startswith(rf"{tmp_path}/caf\xe9/bad: byte 0xff")
    missing = tmp_path / os.fsdecode(b"\xe9.txt")
    assert failure(run, tmp_path / "data", missing, "--name=x") == rf"{tmp_path}/\xe9.txt: no such file or folder"


def test_named_pipes_are_read_like_standard_input(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('"piped"\n' * 9,))
    writer.start()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    run("/dev/stdin", pipe, write(tmp_path / "a.txt", "file"), "--name=mine")
    writer.join()
    assert "".join(splits(load(tmp_path / "data", "mine"))) == TEXT + "piped\n" * 9 + "file"
    assert read_meta(tmp_path / "data" / "mine").source.names == ["standard input", str(pipe), str(tmp_path / "a.txt")]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine"]
    for word in ("/dev/stdin", str(pipe)):
        assert failure(run, tmp_path / "data", word) == NO_NAME
    assert failure(run, tmp_path / "data", "-", "/dev/stdin", "--name=x") == "standard input (-) can be read only once"


def test_process_substitution_is_read(tmp_path: Path) -> None:
    command = (
        f"{shlex.quote(sys.executable)} {ROOT / 'prepare.py'} <(printf %s {'ab' * 50}) --name=x --data_dir={tmp_path}"
    )
    subprocess.run(["bash", "-c", command], check=True)
    assert "".join(splits(load(tmp_path, "x"))) == "ab" * 50


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_unusual_characters_are_reported_once(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: str
) -> None:
    folder = tmp_path / "texts"
    for number in range(9):
        write(folder / f"{number}.txt", f"\ufeffplain\t\r\n{number}")
    write(folder / "a.txt", "nul\0 \x1b[0m \x85\x7f\0")
    write(folder / "b.jsonl", b"\xef\xbb\xbf" + json.dumps("record\0").encode())
    run(folder, f"--tokenizer={tokenizer}", "--shard_tokens=9")
    bom, nul, *others = capsys.readouterr().err.splitlines()
    assert bom == (
        f"warning: {folder / '0.txt'}, {folder / '1.txt'}, {folder / '2.txt'} and 6 more: the byte order mark at the "
        "start is kept as text; remove it with --encoding=utf-8-sig"
    )
    assert nul == (
        f"warning: {folder / 'a.txt'}, {folder / 'b.jsonl'}: NUL characters (U+0000); check that this is text in the "
        "right encoding"
    )
    control = "warning: control characters become part of the vocabulary: U+001B, U+007F, U+0085"
    assert others == [control] * (tokenizer == "char")
    run(write(tmp_path / "plain.txt", "plain\ttext\r\n" * 9), f"--tokenizer={tokenizer}")
    run(write(tmp_path / "sig.txt", "\ufeffplain" * 9), "--encoding=utf-8-sig", "--tokenizer=byte")
    assert capsys.readouterr().err == ""


def test_the_suggested_encoding_removes_the_byte_order_mark(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "mine.txt", "\ufeffélan".encode("utf-16-le") * 9)
    run(file, "--encoding=utf-16-le")
    assert "remove it with --encoding=utf-16\n" in capsys.readouterr().err
    run(file, "--encoding=utf-16", "--overwrite")
    assert "".join(splits(load(tmp_path / "data", "mine"))).startswith("élan")
    assert capsys.readouterr().err == ""


def test_lists_of_names_have_a_bounded_length(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(1100):
        (tmp_path / "many" / f"{number:04}").parent.mkdir(exist_ok=True)
        (tmp_path / "many" / f"{number:04}").touch()
        (tmp_path / "data" / f"{number:04}.toml").touch()
    names = f"{tmp_path}/many/0000, {tmp_path}/many/0001, {tmp_path}/many/0002 and 1,097 more"
    folder = tmp_path / "many"
    assert failure(run, tmp_path / "data", folder) == f"{names}: the text is empty; there is nothing to learn from"
    write(folder / "0000", "a")
    assert failure(run, tmp_path / "data", folder).startswith(f"{names}: too short: 1 characters give 0 ")
    for words in ([], ["missing"]):
        assert failure(run, tmp_path / "data", *words).endswith(" 0007, 0008, 0009 and 1,090 more")
    assert len(failure(run, tmp_path / "data", folder, "--name=many", "--tokenizer=byte")) < 700


@pytest.mark.parametrize("target", ["nanogpt", "other files", "no meta", "file", "link"])
def test_only_a_dataset_is_replaced(run: Run, tmp_path: Path, target: str) -> None:
    file, folder = write(tmp_path / "mine.txt", TEXT), tmp_path / "data" / "mine"
    others = {
        "nanogpt": ["input.txt", "meta.pkl", "prepare.py", "train.bin"],
        "other files": ["notes.txt", "train-1.npy", "x-train-00000.npy"],
        "no meta": ["train-00000.npy"],
    }.get(target, [])
    if target == "other files":
        run(file)
    for name in others:
        write(folder / name, "precious")
    if target == "file":
        write(folder, "precious")
    if target == "link":
        folder.parent.mkdir()
        folder.symlink_to("nowhere")
    shown = ", ".join(others[:3]) + (" and 1 more" if others[3:] else "")
    reason = (
        f"contains other files ({shown}) and is never replaced" if others else "is not a folder and is never replaced"
    )
    for flags in ([], ["--overwrite"]):
        message = failure(run, tmp_path / "data", file, *flags)
        assert message == f"{folder} {reason}; choose another --name"
    run(file, "--name=another")


def test_a_dataset_with_a_report_and_an_empty_folder_are_replaced(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.txt", TEXT)
    run(file)
    write(tmp_path / "data" / "mine" / "report.html", "")
    run(file, "--overwrite")
    (tmp_path / "data" / "empty").mkdir()
    run(file, "--name=empty")


def test_an_error_about_a_recipes_folder_does_not_suggest_a_name(run: Run, tmp_path: Path, recipe: Path) -> None:
    write(tmp_path / "data" / "known" / "meta.json", "precious")
    write(tmp_path / "data" / "known" / "input.txt", "precious")
    assert "--name" not in failure(run, tmp_path / "data", recipe.stem, "--overwrite")


class Vocabularies:
    """A dataset of the letters "abcde", and a run and a checkpoint with the same tokenizer."""

    def __init__(self, run: Run, folder: Path) -> None:
        run(write(folder / "first.txt", "abcde\n" * 9))
        self.dataset = folder / "data" / "first"
        self.run = folder / "out"
        self.run.mkdir()
        self.checkpoint = self.run / BEST
        metadata = Metadata(
            model={},
            tokenizer=read_meta(self.dataset).tokenizer,
            settings={},
            data="",
            val_loss=None,
            state=TrainState(),
            scaler={},
        )
        save_checkpoint(Checkpoint(metadata, {"x": np.zeros(1, dtype=np.float32)}), self.checkpoint)


@pytest.fixture
def vocabularies(run: Run, tmp_path: Path) -> Vocabularies:
    return Vocabularies(run, tmp_path)


@pytest.mark.parametrize("kind", ["dataset", "run", "checkpoint"])
def test_a_vocabulary_is_reused(run: Run, tmp_path: Path, vocabularies: Vocabularies, kind: str) -> None:
    run(write(tmp_path / "mine.txt", "ab\n" * 20), f"--vocabulary={getattr(vocabularies, kind)}")
    dataset = load(tmp_path / "data", "mine")
    assert dataset.tokenizer.to_dict() == {"kind": "char", "characters": "\nabcde"}
    assert "".join(splits(dataset)) == "ab\n" * 20


def test_unknown_characters_are_reported_with_their_counts(
    run: Run, tmp_path: Path, vocabularies: Vocabularies
) -> None:
    vocabulary = f"--vocabulary={vocabularies.run}"
    file = write(tmp_path / "mine.txt", "abé" * 1500 + "zzx" + "ABCDEFGHIJ")
    assert failure(run, tmp_path / "data", file, vocabulary) == (
        f"{file}: {vocabularies.run} has no token for 'é' (U+00E9, 1,500 times), 'z' (U+007A, 2 times), "
        + ", ".join(f"'{c}' (U+{ord(c):04X}, 1 times)" for c in "xABCDEFG")
        + " and 3 more; change the text, or add --skip_unknown"
    )
    file = write(tmp_path / "none.txt", "xyz" * 9)
    assert failure(run, tmp_path / "data", file, vocabulary, "--skip_unknown") == (
        f"{file}: {vocabularies.run} has no token for any of its characters; there is nothing to learn from"
    )


@pytest.mark.usefixtures("chunk_bytes")
def test_unknown_characters_can_be_dropped(
    run: Run, tmp_path: Path, vocabularies: Vocabularies, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(random.Random(1).choices("abcde\nXé🙂\0", k=500))
    known = re.sub(r"[^abcde\n]", "", text)
    run(
        write(tmp_path / "mine.txt", text),
        f"--vocabulary={vocabularies.dataset}",
        "--skip_unknown",
        "--val_fraction=0.5",
        "--shard_tokens=9",
    )
    assert splits(load(tmp_path / "data", "mine")) == (known[: len(known) // 2], known[len(known) // 2 :])
    message = f"dropped {len(text) - len(known)} characters that are not in the vocabulary of {vocabularies.dataset}\n"
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocabulary=missing"], "--vocabulary=missing: no such run, checkpoint or dataset"),
        (["--vocabulary=DATASET", "--tokenizer=byte"], "--tokenizer=byte contradicts --vocabulary=DATASET, whose tok"),
        (["--skip_unknown"], "skip_unknown needs a vocabulary: --vocabulary=RUN"),
    ],
    ids=str,
)
def test_an_invalid_vocabulary_is_reported(
    run: Run, tmp_path: Path, vocabularies: Vocabularies, flags: list[str], message: str
) -> None:
    file = write(tmp_path / "mine.txt", "ab\n" * 20)
    flags = [flag.replace("DATASET", str(vocabularies.dataset)) for flag in flags]
    error = failure(run, tmp_path / "data", file, *flags, kind=UsageError)
    assert error.startswith(message.replace("DATASET", str(vocabularies.dataset)))


def test_a_vocabulary_may_match_the_named_tokenizer(run: Run, tmp_path: Path, vocabularies: Vocabularies) -> None:
    file = write(tmp_path / "mine.txt", "ab\n" * 20)
    run(file, f"--vocabulary={vocabularies.dataset}", "--tokenizer=char")
    run(file, "--name=bytes", "--tokenizer=byte")
    run(file, "--name=more", f"--vocabulary={tmp_path / 'data' / 'bytes'}")
    assert load(tmp_path / "data", "more").tokenizer.kind == "byte"
