"""Changes to a text that the user asked for are the same however the text is divided into parts."""

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as tries
from hypothesis import strategies as st

from conftest import prepare_text, run_prepare
from glyphgpt.data.cleaning import Cleaner, replace_unknown
from glyphgpt.data.dataset import load_dataset
from glyphgpt.data.tokenizers import CharacterCounts, CharTokenizer, decode
from glyphgpt.errors import UsageError
from glyphgpt.settings import PrepareSettings

LINES = ["a short line", "a line of more than twenty characters", "another line of more than twenty characters", ""]
PASSAGES = [
    "a passage of more than fifty characters, which is repeated\nin two lines",
    "short",
    "one\nmore passage" * 5,
]


def in_parts(documents: list[str], size: int) -> Iterator[list[str]]:
    """Yield documents as a stream in which each part has at most `size` characters of one document."""
    for number, document in enumerate(documents):
        parts = [document[start : start + size] for start in range(0, len(document), size)] or [""]
        yield ["", parts[0]] if number else [parts[0]]
        yield from ([part] for part in parts[1:])


def joined(stream: Iterator[list[str]]) -> list[str]:
    """Return the documents of a stream."""
    documents = [""]
    for first, *others in stream:
        documents = [*documents[:-1], documents[-1] + first, *others]
    return documents


def cleaned(documents: list[str], size: int, **values: Any) -> list[str]:
    """Return documents cleaned in parts of `size` characters."""
    return joined(Cleaner(PrepareSettings.model_validate(values)).clean(in_parts(documents, size)))


DOCUMENTS = st.lists(st.text("ab\r\n", max_size=20), min_size=1, max_size=3)


@given(DOCUMENTS, st.integers(1, 9))
@example(["a\r", "\nb"], 1)
def test_line_ends_become_newlines_within_each_document(documents: list[str], size: int) -> None:
    expected = ["\n".join(document.replace("\r\n", "\r").split("\r")) for document in documents]
    assert cleaned(documents, size, newlines="lf") == expected
    assert cleaned(documents, size) == documents


@given(st.lists(st.text("aoe\u0308\u0301\u0327\u1112\u1161\u11ab\u09c7\u09be가 ", max_size=20), min_size=1, max_size=3),
       st.integers(1, 9))  # fmt: skip
def test_composed_characters_are_those_of_the_whole_document(documents: list[str], size: int) -> None:
    expected = [unicodedata.normalize("NFC", document) for document in documents]
    assert cleaned(documents, size, normalize="nfc") == expected


@given(st.lists(st.sampled_from(LINES), max_size=12), st.integers(1, 99))
def test_repeated_lines_are_dropped(lines: list[str], size: int) -> None:
    kept = [line for number, line in enumerate(lines) if len(line) < 20 or line not in lines[:number]]
    text = "".join(f"{line}\n" for line in lines)
    assert cleaned([text], size, deduplicate="lines") == ["".join(f"{line}\n" for line in kept)]


@given(
    st.lists(st.tuples(st.sampled_from(PASSAGES), st.integers(2, 4)), max_size=12), st.integers(1, 99),
    st.sampled_from(["\n", "\r\n"]),
)  # fmt: skip
def test_repeated_passages_are_dropped(passages: list[tuple[str, int]], size: int, line_end: str) -> None:
    texts = [text for text, _ in passages]
    kept = [
        text + line_end * count
        for number, (text, count) in enumerate(passages)
        if len(text) < 50 or text not in texts[:number]
    ]
    whole = "".join(text + line_end * count for text, count in passages)
    assert cleaned([whole], size, deduplicate="passages") == ["".join(kept)]


def test_the_last_passage_may_have_no_empty_line_after_it() -> None:
    passage = "a passage of more than fifty characters, which is repeated"
    for end in ("", "\n", "\r\n"):
        assert cleaned([f"{passage}\n\nother\n\n{passage}{end}"], 7, deduplicate="passages") == [
            f"{passage}\n\nother\n\n"
        ]


@given(st.text("abcdé", max_size=30), st.integers(1, 5))
@tries(max_examples=50)
def test_rare_characters_become_one_symbol(text: str, min_count: int) -> None:
    counts = CharacterCounts(min_count)
    for part in in_parts([text], 4):
        counts.add(part[0])
    expected = "".join(c if text.count(c) >= min_count else "\ufffd" for c in text)
    assert counts.sorted() == "".join(sorted(set(expected)))
    if text:
        assert joined(replace_unknown(in_parts([text], 4), CharTokenizer(counts.sorted()))) == [expected]


def test_a_dataset_has_the_text_that_was_asked_for(tmp_path: Path) -> None:
    text = (
        "".join(f"line {number} with a u\u0308ber rare 字\r\n" for number in range(3)) + "the same long line\r\n" * 90
    )
    folder = prepare_text(text, tmp_path, newlines="lf", normalize="nfc", min_count=4)
    dataset = load_dataset(folder, tmp_path)
    tokens = np.concatenate([split.slice(0, split.tokens) for split in (dataset.train, dataset.val)])
    rare = text.replace("u\u0308", "ü").replace("\r\n", "\n")
    expected = "".join(character if rare.count(character) >= 4 else "\ufffd" for character in rare)
    assert decode(dataset.tokenizer, tokens) == expected
    assert dataset.meta.train.characters + dataset.meta.val.characters == len(expected)


@pytest.mark.parametrize("flags", [["--tokenizer=byte"], ["--tokenizer=gpt2"]])
def test_rare_characters_need_a_vocabulary_of_characters(flags: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^min_count is for a vocabulary that is learned from the text"):
        run_prepare("a.txt", "--min_count=3", *flags)
