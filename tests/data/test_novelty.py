"""Novelty: copied runs are found exactly, wherever the long text is divided."""

from collections.abc import Iterator
from difflib import SequenceMatcher

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as tries
from hypothesis import strategies as st

from conftest import some_text
from glyphgpt.data import novelty
from glyphgpt.data.dataset import Split
from glyphgpt.data.novelty import Hashes, Points, copied_fraction, find_copied, read_points
from glyphgpt.data.tokenizers import ByteTokenizer, CharTokenizer, code_points


def in_parts(text: str, size: int) -> Iterator[Points]:
    for start in range(0, len(text), size):
        yield code_points(text[start : start + size])


def brute_force(text: str, long_text: str, length: int) -> float:
    """Return the fraction of a text in runs of at least `length` that stand in the long text."""
    covered = set()
    for start in range(len(text) - length + 1):
        if text[start : start + length] in long_text:
            covered |= set(range(start, start + length))
    return len(covered) / max(1, len(text))


@given(
    st.lists(st.text("ab", max_size=12), max_size=4), st.text("ab", max_size=60), st.integers(1, 20),
    st.sampled_from([(1, 2, 3), (2, 5, 8), (3, 4, 30)]),
)  # fmt: skip
@example([], "", 1, (1, 2, 3))
@example(["", "a"], "b", 1, (1, 2, 3))
@tries(deadline=None)
def test_copied_runs_are_those_of_a_search_of_every_run(
    texts: list[str], long_text: str, part: int, lengths: tuple[int, int, int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(novelty, "LENGTHS", lengths)
        (copied,) = find_copied([texts], in_parts(long_text, part))
    characters = sum(map(len, texts))
    assert copied.characters == characters
    for length in lengths:
        covered = sum(len(text) * brute_force(text, long_text, length) for text in texts)
        assert copied.fractions[length] == pytest.approx(covered / max(1, characters))
        assert copied_fraction(texts, length, in_parts(long_text, part)) == copied.fractions[length]
    longest = max(
        (SequenceMatcher(None, text, long_text, autojunk=False).find_longest_match().size for text in texts), default=0
    )
    assert len(copied.longest) == longest
    if longest:
        assert long_text[copied.place :].startswith(copied.longest)
        assert any(copied.longest in text for text in texts)


def test_a_long_run_is_found_in_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(novelty, "CHUNK_TOKENS", 1000)
    rng = np.random.default_rng(0)
    long_text = "".join(rng.choice(list("abcdefgh é字"), 50_000))
    text = "Q" + long_text[20_990:21_733] + "Q" + long_text[:30] + "Q"
    for tokenizer in (CharTokenizer("".join(sorted(set(long_text)))), ByteTokenizer()):
        tokens = tokenizer.encode(long_text)
        split = Split((tokens,), len(long_text))
        (copied,) = find_copied([[text]], read_points(split, tokenizer, ""))
        assert (len(copied.longest), copied.place) == (743, 20_990)
        assert copied.fractions == {20: (743 + 30) / 776, 50: 743 / 776, 100: 743 / 776}


def test_windows_with_the_same_hash_are_equal() -> None:
    text = some_text(20_000)
    for length in (1, 2, 3, 20, 100):
        hashes = Hashes(code_points(text)).windows(length)
        windows = [text[start : start + length] for start in range(len(hashes))]
        assert len(hashes) == len(text) - length + 1
        assert len(set(hashes.tolist())) == len(set(windows)) == len(set(zip(hashes.tolist(), windows, strict=True)))
    assert Hashes(code_points("abc")).windows(4).size == 0
