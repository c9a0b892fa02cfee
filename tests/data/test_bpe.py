"""A BPE learned from a text: any text has the tokens of Hugging Face's tokenizers, and decodes to itself."""

import json
import signal
from collections.abc import Iterator
from hashlib import pbkdf2_hmac
from itertools import pairwise
from pathlib import Path
from threading import Event, Timer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st
from tokenizers import Tokenizer

from conftest import run_prepare, some_text
from glyphgpt.convert.to_huggingface import tokenizer_json
from glyphgpt.data.bpe import learn_bpe, run_interruptibly
from glyphgpt.data.dataset import load_dataset
from glyphgpt.data.tokenizers import BPETokenizer, decode, tokenizer_from_dict
from glyphgpt.errors import UsageError, UserError

TEXT = some_text(4000) + "é字🙂 " * 20
BPE = learn_bpe([TEXT], 300)
REFERENCE = Tokenizer.from_str(json.dumps(tokenizer_json(BPE, Path())))


@given(st.text() | st.lists(st.sampled_from(TEXT.split(" ")), max_size=20).map(" ".join))
@tries(deadline=None)
def test_texts_have_the_tokens_of_hugging_face_and_decode_to_themselves(text: str) -> None:
    tokens = BPE.encode(text)
    assert tokens.tolist() == REFERENCE.encode(text).ids
    assert decode(BPE, tokens) == text
    assert tokens.dtype == np.uint16


def test_the_tokens_are_bytes_then_merges_then_the_end_of_a_document() -> None:
    assert BPE.vocab_size == 300
    assert BPE.tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert BPE.end_of_text == 299
    assert len(BPE.encode(TEXT)) < len(TEXT.encode()) / 2
    for token, (first, second) in zip(BPE.tokens[256:], BPE.merges(), strict=True):
        assert first + second == token
        assert {first, second} <= set(BPE.tokens[: BPE.tokens.index(token)])


def test_the_tokenizer_is_restored_from_json() -> None:
    restored = tokenizer_from_dict(json.loads(json.dumps(BPE.to_dict())), Path())
    assert isinstance(restored, BPETokenizer)
    assert restored.tokens == BPE.tokens
    assert restored.to_dict() == BPE.to_dict()


@pytest.mark.parametrize(
    "tokens", [[], ["a"], [chr(b) for b in range(256)] + ["a"], [chr(b) for b in range(255)] + ["\u0100"], [1] * 256]
)
def test_damaged_vocabularies_are_refused(tokens: list[object]) -> None:
    with pytest.raises(UserError, match=r"a BPE vocabulary holds|unknown tokenizer"):
        tokenizer_from_dict({"kind": "bpe", "tokens": tokens}, Path())


def test_a_merge_without_its_parts_is_refused() -> None:
    tokenizer = BPETokenizer([bytes([byte]) for byte in range(256)] + [b"abcd"])
    with pytest.raises(UserError, match="no merges of a BPE vocabulary lead to b'abcd'"):
        tokenizer.merges()


def test_a_text_is_prepared_with_its_own_tokens(tmp_path: Path) -> None:
    for name, text in (("a", TEXT), ("b", some_text(2000, seed=1))):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    run_prepare(*files, "--tokenizer=bpe", "--vocab_size=290", f"--data_dir={tmp_path}", "--name=ab")
    dataset = load_dataset(tmp_path / "ab", tmp_path)
    assert dataset.meta.vocab_size == 290
    tokens = np.concatenate([split.slice(0, split.tokens) for split in (dataset.train, dataset.val)])
    (boundary,) = np.flatnonzero(tokens == 289)
    assert decode(dataset.tokenizer, tokens[:boundary]) == TEXT
    assert decode(dataset.tokenizer, tokens[boundary + 1 :]) == some_text(2000, seed=1)


def test_only_blocks_that_do_not_follow_each_other_are_separated(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {number} of the text\n" for number in range(2000)))
    flags = ["--tokenizer=bpe", "--vocab_size=300", "--split=blocks", f"--data_dir={tmp_path}"]
    run_prepare(str(tmp_path / "a.txt"), *flags)
    dataset = load_dataset(tmp_path / "a", tmp_path)
    for split in (dataset.train, dataset.val):
        tokens = split.slice(0, split.tokens)
        parts = np.split(tokens, np.flatnonzero(tokens == 299))
        assert len(parts) > 2
        texts = [decode(dataset.tokenizer, part[part != 299]) for part in parts]
        numbers = [[int(line.split()[1]) for line in text.splitlines()] for text in texts]
        for run in numbers:
            assert run == list(range(run[0], run[-1] + 1))
        for one, other in pairwise(numbers):
            assert other[0] > one[-1] + 1


def test_a_vocabulary_larger_than_the_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be " * 9)
    with pytest.raises(UsageError, match=r"^--vocab_size=9000: the text has too few repeated pairs .* or less$"):
        run_prepare(str(tmp_path / "a.txt"), "--tokenizer=bpe", "--vocab_size=9000", f"--data_dir={tmp_path}")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty\.txt: the text is empty; "):
        run_prepare(str(tmp_path / "empty.txt"), "--tokenizer=bpe", f"--data_dir={tmp_path}")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "empty.txt"}


def test_ctrl_c_does_not_wait_for_the_vocabulary() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    finished = Event()

    def work() -> None:
        try:
            pbkdf2_hmac("sha256", b"", b"", 5_000_000)  # seconds, in which Python's handlers do not run
        finally:
            finished.set()

    Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(work)
    assert not finished.is_set()


def test_errors_of_the_text_are_raised() -> None:
    def texts() -> Iterator[str]:
        yield "to be or not to be"
        raise UserError("not text")

    with pytest.raises(UserError, match=r"^not text$"):
        learn_bpe(texts(), 300)
