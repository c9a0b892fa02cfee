"""Splits: each document or block is in one of them, drawn by seed from all parts of the text."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st
from test_cleaning import in_parts

from conftest import prepare_text, run_prepare, some_text
from glyphgpt.data.dataset import Dataset, load_dataset
from glyphgpt.data.splitting import Draw, assign_documents, number_blocks
from glyphgpt.data.tokenizers import decode
from glyphgpt.errors import UsageError, UserError


def texts(dataset: Dataset) -> dict[str, str]:
    """Return the text of each split."""
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    return {name: decode(dataset.tokenizer, split.slice(0, split.tokens)) for name, split in splits.items() if split}


@given(st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=30), st.integers(1, 4), st.integers(0, 9))
def test_documents_are_assigned_whole_in_their_order(documents: list[str], size: int, seed: int) -> None:
    draw = Draw(0.3, 0.2, seed)
    found: dict[str, list[str]] = {"train": [""], "val": [""], "test": [""]}
    for split, (first, *others) in assign_documents(in_parts(documents, size), draw):
        found[split][-1] += first
        found[split] += others
    expected: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for number, document in enumerate(documents):
        expected[draw.splits(number, number + 1)[0]].append(document)
    assert {split: list(filter(None, parts)) for split, parts in found.items()} == expected


@given(st.lists(st.text("ab\n", max_size=60), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 10))
def test_blocks_end_with_lines_and_hold_the_whole_text(documents: list[str], part: int, size: int) -> None:
    blocks: list[str] = []
    for number, parts in number_blocks(in_parts(documents, part), size):
        blocks += [""] * (number + 1 - len(blocks))
        blocks[number] += "".join(parts)
    assert "".join(blocks) == "".join(documents)
    for block in blocks[:-1]:
        assert size <= len(block) <= 2 * size
        assert len(block) == 2 * size or block.index("\n", size - 1) == len(block) - 1
    assert not blocks or len(blocks[-1]) <= 2 * size


@given(st.floats(0.01, 0.5), st.floats(0, 0.3), st.integers(0, 100))
@tries(max_examples=30, deadline=None)
def test_each_split_gets_its_share_from_all_parts(val_fraction: float, test_fraction: float, seed: int) -> None:
    draw = Draw(val_fraction, test_fraction, seed)
    splits = draw.splits(0, 2000).tolist()
    for name, fraction in (("val", val_fraction), ("test", test_fraction)):
        for part in (splits[:1000], splits[1000:]):
            assert part.count(name) / 1000 == pytest.approx(fraction, abs=0.02)


@given(st.floats(1e-300, 0.5), st.floats(0, 0.3), st.integers(0, 9), st.integers(0, 2**40), st.integers(1, 3000))
def test_a_split_does_not_depend_on_where_reading_began(
    val_fraction: float, test_fraction: float, seed: int, first: int, count: int
) -> None:
    draw, middle = Draw(val_fraction, test_fraction, seed), first + count // 3
    parts = [*draw.splits(first, middle), *draw.splits(middle, first + count)]
    assert draw.splits(first, first + count).tolist() == parts


def test_another_seed_draws_others() -> None:
    one, other = (Draw(0.1, 0, seed).splits(0, 100).tolist() for seed in (1, 2))
    assert one != other


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_blocks_of_a_text_become_its_splits(tokenizer: str, tmp_path: Path) -> None:
    lines = [f"{number}: {some_text(40, seed=number)!r}\n" for number in range(2000)]
    folder = prepare_text("".join(lines), tmp_path, split="blocks", test_fraction=0.1, tokenizer=tokenizer)
    found = {name: text.splitlines(keepends=True) for name, text in texts(load_dataset(folder, tmp_path)).items()}
    assert sorted(line for split in found.values() for line in split) == sorted(lines)
    for name in ("val", "test"):
        numbers = [int(line.partition(":")[0]) for line in found[name]]
        assert numbers == sorted(numbers)
        assert len(numbers) == pytest.approx(200, abs=40)
        assert min(numbers) < 500
        assert max(numbers) > 1500


def test_records_and_files_become_splits_whole(tmp_path: Path) -> None:
    records = [f"record {number}, {some_text(30, seed=number)!r}" for number in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run_prepare(str(tmp_path / "a.jsonl"), f"--data_dir={tmp_path}", "--split=documents", "--val_fraction=0.2")
    found = texts(load_dataset(tmp_path / "a", tmp_path))
    assert sorted(f"{found['train']}{found['val']}".splitlines()) == sorted(records)
    assert len(found["val"].splitlines()) == pytest.approx(40, abs=1)


def test_another_text_validates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("a", "to be or not to be"), ("b", "ÄÖÜ to be")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    run_prepare(str(tmp_path / "a.txt"), f"--val={tmp_path / 'b.txt'}", f"--data_dir={tmp_path}")
    dataset = load_dataset(tmp_path / "a", tmp_path)
    assert texts(dataset) == {"train": "to be or not to be", "val": "ÄÖÜ to be"}
    assert dataset.meta.source.names == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert "3 characters of the validation text do not occur in the training text" in capsys.readouterr().err


@pytest.mark.parametrize("empty", ["a", "b"])
def test_an_empty_text_beside_another_is_refused(empty: str, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("" if name == empty else "to be or not to be")
    with pytest.raises(UserError, match=rf"{empty}\.txt: the text is empty$"):
        run_prepare(str(tmp_path / "a.txt"), f"--val={tmp_path / 'b.txt'}", f"--data_dir={tmp_path / 'data'}")


def test_the_end_of_the_text_is_the_test_split(tmp_path: Path) -> None:
    folder = prepare_text("a" * 700 + "b" * 200 + "c" * 100, tmp_path, val_fraction=0.2, test_fraction=0.1)
    assert texts(load_dataset(folder, tmp_path)) == {"train": "a" * 700, "val": "b" * 200, "test": "c" * 100}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val_fraction=0.6", "--test_fraction=0.5"], r"^val_fraction and test_fraction leave no text to train on"),
        (["--val=b.txt", "--split=blocks"], r"^val names the validation text; leave out split"),
        (["--val=b.txt", "--test_fraction=0.1"], r"^val names the validation text; leave out split"),
    ],
)
def test_contradictions_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_prepare("a.txt", *flags)


def test_a_split_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(some_text(3000))
    with pytest.raises(UserError, match=r"a\.txt: --split=documents leaves no text for the \w+ split; use a larger"):
        run_prepare(str(tmp_path / "a.txt"), f"--data_dir={tmp_path}", "--split=documents")
    assert not (tmp_path / "a").exists()
