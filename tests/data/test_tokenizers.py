"""Tokenizers: encoded text decodes to the same text, and ids equal those of nanoGPT and GPT-2."""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as tries
from hypothesis import strategies as st

from conftest import ROOT, some_text
from glyphgpt.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    StreamDecoder,
    Tokenizer,
    count_bytes,
    decode,
    start_token,
    token_dtype,
    tokenizer_from_dict,
)
from glyphgpt.errors import UserError

SHAKESPEARE = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase
LAST_CHARACTER = "\U0010ffff"

SPACES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\x1f", "\x85", "\xa0", "\u2003", "\u2028", "\u200b"]
WORDS = ["'", "'s", "'ll", "’", "S", "word", "12", "٣", "é", "e\u0301", "!?", "_", "\0", "字", "🙂", "<|endoftext|>"]
SPACED_TEXT = st.lists(st.sampled_from(SPACES + WORDS), max_size=60).map("".join)


@pytest.fixture(scope="session")
def gpt2() -> GPT2Tokenizer:
    try:
        return GPT2Tokenizer(ROOT / "data")
    except UserError as failure:
        pytest.skip(str(failure))


@tries(deadline=None, max_examples=100)
@given(texts=st.lists(st.text(), min_size=1).filter(any))
@example(texts=["\0", "", LAST_CHARACTER])
def test_char_tokens_decode_to_the_text(texts: list[str]) -> None:
    text = "".join(texts)
    tokenizer = CharTokenizer.learn(texts)
    assert tokenizer.characters == "".join(sorted(set(text)))
    assert tokenizer.unknown_characters(text) == []
    ids = tokenizer.encode(text)
    assert ids.shape == (len(text),)
    assert ids.dtype == token_dtype(tokenizer.vocab_size)
    assert decode(tokenizer, ids) == text


@tries(deadline=None, max_examples=100)
@given(vocabulary=st.text(min_size=1), text=st.text())
@example(vocabulary="ab\n", text="a🙂b\nc\0")
@example(vocabulary="é", text="é" * 300)
def test_split_unknown_separates_known_and_unknown_characters(vocabulary: str, text: str) -> None:
    known, unknown = CharTokenizer.learn([vocabulary]).split_unknown(text)
    assert known == "".join(character for character in text if character in vocabulary)
    assert unknown == "".join(character for character in text if character not in vocabulary)


@tries(deadline=None, max_examples=100)
@given(text=st.text())
def test_byte_tokens_decode_to_the_text(text: str) -> None:
    ids = ByteTokenizer().encode(text)
    assert ids.tolist() == list(text.encode())
    assert decode(ByteTokenizer(), ids) == text


@tries(deadline=None, max_examples=150)
@given(text=st.one_of(st.text(), SPACED_TEXT))
def test_bpe_tokens_decode_to_the_text(gpt2: GPT2Tokenizer, text: str) -> None:
    ids = gpt2.encode(text)
    assert ids.dtype == np.uint16
    assert decode(gpt2, ids) == text


@pytest.mark.parametrize("byte", [0xE9, 0xFF])
def test_undecodable_bytes_of_the_command_line_keep_their_values(byte: int) -> None:
    assert ByteTokenizer().encode(bytes([97, byte]).decode("utf-8", "surrogateescape")).tolist() == [97, byte]


def test_char_ids_equal_those_of_nanogpt() -> None:
    tokenizer = CharTokenizer.learn([SHAKESPEARE[::-1]])
    assert tokenizer.vocab_size == 65
    assert tokenizer.encode("\n !3AZaz").tolist() == [0, 1, 2, 9, 13, 38, 39, 64]
    assert tokenizer.encode(SHAKESPEARE).tolist() == list(range(65))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        ("hello", [31373]),
        ("  \n", [220, 220, 198]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
        ("It's 2024", [1026, 338, 48609]),
        ("", []),
    ],
)
def test_bpe_ids_equal_those_of_gpt2(gpt2: GPT2Tokenizer, text: str, ids: list[int]) -> None:
    assert gpt2.encode(text).tolist() == ids


def test_undecodable_bytes_of_the_command_line_have_bpe_tokens(gpt2: GPT2Tokenizer) -> None:
    assert decode(gpt2, gpt2.encode("caf\udce9 x")) == "caf\ufffd x"


def test_the_end_of_text_token_has_its_id(gpt2: GPT2Tokenizer) -> None:
    assert gpt2.token_bytes(50256) == b"<|endoftext|>"
    assert gpt2.vocab_size == 50257


@pytest.mark.parametrize("size", [1, 255, 256, 257, 65536, 65537])
def test_ids_have_the_smallest_dtype(size: int) -> None:
    first = 0xE000  # above the surrogates
    characters = "".join(map(chr, range(first, first + size)))
    tokenizer = CharTokenizer(characters)
    ids = tokenizer.encode(characters)
    assert ids.dtype == (np.uint8 if size <= 256 else np.uint16 if size <= 65536 else np.uint32)
    assert ids.tolist() == list(range(size))
    assert tokenizer.unknown_characters(chr(first + size)) == [chr(first + size)]
    with pytest.raises(UserError):
        tokenizer.encode(chr(first + size))


@pytest.mark.parametrize("unknown", ["\0", "b", "d", "é", "\uffff", "🙂", LAST_CHARACTER])
def test_an_unknown_character_is_named_in_the_error(unknown: str) -> None:
    tokenizer = CharTokenizer("ace")
    with pytest.raises(UserError) as caught:
        tokenizer.encode(f"ace{unknown}ace")
    assert str(caught.value) == f"the vocabulary has no character {unknown!r}"


def test_unknown_characters_are_distinct_and_sorted() -> None:
    tokenizer = CharTokenizer("ace")
    assert tokenizer.unknown_characters("abcabc\n🙂") == ["\n", "b", "🙂"]
    assert tokenizer.encode("").tolist() == []


def test_byte_and_bpe_tokens_encode_any_character(gpt2: GPT2Tokenizer) -> None:
    assert ByteTokenizer().unknown_characters("abc\n🙂\0") == gpt2.unknown_characters("abc\n🙂\0") == []


@tries(deadline=None, max_examples=300)
@given(text=SPACED_TEXT)
def test_a_text_encodes_to_the_same_bpe_tokens_when_split(gpt2: GPT2Tokenizer, text: str) -> None:
    for whole in (text, text + "x" * 600):
        index = gpt2.split_point(whole)
        assert [*gpt2.encode(whole[:index]), *gpt2.encode(whole[index:])] == gpt2.encode(whole).tolist()


@tries(deadline=None, max_examples=100)
@given(text=SPACED_TEXT)
def test_the_split_point_is_the_last_one(gpt2: GPT2Tokenizer, text: str) -> None:
    points = [index for index in range(1, len(text)) if not text[index - 1].isspace() and text[index] in " \n"]
    assert gpt2.split_point(text) == max(points, default=0)


@pytest.mark.parametrize("before", ["", "ab  cd"])
@pytest.mark.parametrize("after", [0, 600, 1100, 20000])
def test_the_split_point_is_found_at_any_distance_from_the_end(gpt2: GPT2Tokenizer, before: str, after: int) -> None:
    assert gpt2.split_point(before + "x" * after) == (2 if before else 0)


@pytest.mark.parametrize("tokenizer", [CharTokenizer("\n ab"), ByteTokenizer()], ids=["char", "byte"])
def test_char_and_byte_texts_can_be_split_anywhere(tokenizer: Tokenizer) -> None:
    assert tokenizer.split_point("ab \nb") == len("ab \nb")


@tries(deadline=None, max_examples=200)
@given(data=st.one_of(st.binary(), st.text().map(str.encode)))
@example(data="é🙂".encode()[:-1])
def test_streaming_bytes_decodes_like_decoding_them_at_once(data: bytes) -> None:
    stream = StreamDecoder(ByteTokenizer())
    assert "".join(map(stream.feed, data)) + stream.end() == decode(ByteTokenizer(), list(data))


def test_the_stream_decoder_returns_a_character_at_its_last_byte() -> None:
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.feed(byte) for byte in "aé🙂".encode()] == ["a", "", "é", "", "", "", "🙂"]
    assert stream.end() == ""


@tries(deadline=None, max_examples=50)
@given(text=st.text(min_size=1))
def test_streaming_bpe_and_char_tokens_decodes_to_the_text(gpt2: GPT2Tokenizer, text: str) -> None:
    tokenizer: Tokenizer
    for tokenizer in (gpt2, CharTokenizer.learn([text])):
        stream = StreamDecoder(tokenizer)
        assert "".join(stream.feed(int(token)) for token in tokenizer.encode(text)) + stream.end() == text


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer("\0\n a\x7fé\u2028字🙂" + LAST_CHARACTER), ByteTokenizer()], ids=["char", "byte"]
)
def test_a_tokenizer_can_be_restored_from_its_dict(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = json.loads(json.dumps(tokenizer.to_dict()))
    restored = tokenizer_from_dict(data, tmp_path)
    assert type(restored) is type(tokenizer)
    assert restored.to_dict() == tokenizer.to_dict()
    assert restored.vocab_size == tokenizer.vocab_size
    assert restored.encode("\n🙂a").tolist() == tokenizer.encode("\n🙂a").tolist()


def test_the_gpt2_tokenizer_can_be_restored_from_its_dict(gpt2: GPT2Tokenizer) -> None:
    restored = tokenizer_from_dict(gpt2.to_dict(), ROOT / "data")
    text = some_text(300)
    assert restored.encode(text).tolist() == gpt2.encode(text).tolist()


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "char",
        {},
        {"kind": "word"},
        {"kind": ["byte"]},
        {"kind": "char"},
        {"kind": "char", "characters": ""},
        {"kind": "char", "characters": ["a", "b"]},
        {"kind": "char", "characters": "ba"},
        {"kind": "char", "characters": "aab"},
    ],
    ids=repr,
)
def test_invalid_tokenizer_data_is_rejected(tmp_path: Path, data: Any) -> None:
    with pytest.raises(UserError):
        tokenizer_from_dict(data, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_sample_without_a_prompt_starts_from_a_newline() -> None:
    assert start_token(CharTokenizer(SHAKESPEARE)) == 0
    assert start_token(CharTokenizer("\t\nab")) == 1
    assert start_token(CharTokenizer("ab")) == 0
    assert start_token(ByteTokenizer()) == 10


@pytest.mark.parametrize("characters", ["", "ba", "aab", "a\ud800", "\udfffz"])
def test_invalid_characters_are_rejected(characters: str) -> None:
    with pytest.raises(UserError, match="a character vocabulary holds"):
        tokenizer_from_dict({"kind": "char", "characters": characters}, Path())


@pytest.mark.parametrize("length", [0, 5, (1 << 16) + 1])
def test_bytes_are_counted(length: int) -> None:
    data = np.random.default_rng(0).integers(97, 123, length, dtype=np.uint8)
    assert count_bytes(data.tobytes()).tolist() == [int((data == byte).sum()) for byte in range(256)]
