"""Tokenizers for characters, UTF-8 bytes, and BPE tokens: GPT-2's, or those learned from a text.

meta.json and every checkpoint hold a tokenizer as JSON types: `to_dict` makes them, `tokenizer_from_dict` reads them.
"""

import codecs
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glyphgpt.errors import UserError

Tokens = NDArray[np.unsignedinteger[Any]]

UNICODE_SIZE = 0x110000  # code points
END_OF_TEXT = "<|endoftext|>"
REPLACEMENT = "\ufffd"
"""The character that replaces rare ones."""


class Tokenizer(ABC):
    """The interface of tokenizers; its default methods assume that any text has tokens and can be split anywhere."""

    kind: str
    vocab_size: int
    end_of_text: int | None = None
    """The token that separates documents, if there is one."""
    separator: str | None = None
    """What separates records in a text of records, or "" if each document is a record; None for other texts."""

    @property
    def base(self) -> "Tokenizer":
        """The tokenizer of the text within records: this one, unless it is one of records."""
        return self

    @property
    def end_of_record(self) -> int | None:
        """The token before and after each record, in a text of records."""
        return None if self.separator is None else self.end_of_text

    @abstractmethod
    def encode(self, text: str) -> Tokens:
        """Return the ids of a text in the smallest unsigned dtype that holds the vocabulary."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token; they may be part of a character."""

    def decode_bytes(self, tokens: Tokens) -> bytes:
        """Return the UTF-8 bytes of tokens (N,)."""
        return b"".join(map(self.token_bytes, tokens.tolist()))

    def unknown_characters(self, text: str) -> list[str]:  # noqa: ARG002
        """Return the distinct characters of a text that have no token, sorted."""
        return []

    def split_unknown(self, text: str) -> tuple[str, str]:
        """Return the characters of a text that have a token, and those that have none, both in their order."""
        return text, ""

    def split_point(self, text: str) -> int:
        """Return an index, as late as possible, at which a text can be split without changing its tokens, or 0."""
        return len(text)

    def encode_documents(self, documents: Sequence[str]) -> Tokens:
        """Return the ids of documents, separated by the end-of-text token.

        Raises:
            UserError: A character has no token.
        """
        first, *others = documents
        parts = [self.encode(first)]
        for document in others:
            parts += [np.array([self.end_of_text], dtype=parts[0].dtype), self.encode(document)]
        return np.concatenate(parts) if others else parts[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the tokenizer as JSON types, for `tokenizer_from_dict`."""
        return {"kind": self.kind}


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the smallest unsigned dtype that holds the ids of a vocabulary."""
    return np.min_scalar_type(vocab_size - 1)


def code_points(text: str) -> NDArray[np.uint32]:
    """Return the Unicode code points of a text, including lone surrogates, shape (characters,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class CharacterSet:
    """Collects the distinct characters of texts."""

    def __init__(self) -> None:
        self._seen = np.zeros(UNICODE_SIZE, dtype=bool)  # by code point
        self._seen_ascii = b""

    def add(self, text: str) -> None:
        """Add the characters of a text."""
        if text.isascii():  # the common case, and many times as fast
            self._seen_ascii += bytes(set(text.encode("ascii").translate(None, delete=self._seen_ascii)))
        else:
            self._seen[code_points(text)] = True

    def sorted(self) -> str:
        """Return the characters in the order of their code points."""
        self._seen[list(self._seen_ascii)] = True
        return "".join(map(chr, np.flatnonzero(self._seen)))


class CharacterCounts:
    """Counts the characters of texts."""

    def __init__(self, min_count: int = 1) -> None:
        self.min_count = min_count
        self.counts = np.zeros(UNICODE_SIZE, dtype=np.int64)  # by code point

    def add(self, text: str) -> list[int]:
        """Add the characters of a text; return the code points of those that did not occur before."""
        counts = count_bytes(text.encode()) if text.isascii() else np.bincount(code_points(text))
        new = np.flatnonzero((counts > 0) & (self.counts[: len(counts)] == 0))
        self.counts[: len(counts)] += counts
        return [int(point) for point in new]

    def sorted(self) -> str:
        """Return the characters that occur min_count times, and REPLACEMENT if there are others, by code point."""
        frequent = self.counts >= self.min_count
        frequent[ord(REPLACEMENT)] |= bool((self.counts[~frequent] > 0).any())
        return "".join(map(chr, np.flatnonzero(frequent)))


def count_bytes(data: bytes) -> NDArray[np.int64]:
    """Return how often each byte occurs, shape (256,). Of many bytes, pairs are counted, which takes half the time."""
    if len(data) < 1 << 16:
        return np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    pairs = np.bincount(np.frombuffer(data, np.uint16, len(data) // 2), minlength=1 << 16).reshape(256, 256)
    counts: NDArray[np.int64] = pairs.sum(0) + pairs.sum(1)
    counts[list(data[len(data) // 2 * 2 :])] += 1
    return counts


class CharTokenizer(Tokenizer):
    """One token per character; ids follow the order of the code points, as in nanoGPT.

    >>> tokenizer = CharTokenizer("ehlo")
    >>> tokenizer.encode("hello").tolist()
    [1, 0, 2, 2, 3]
    >>> decode(tokenizer, [1, 0, 2, 2, 3])
    'hello'
    """

    kind = "char"

    def __init__(self, characters: str) -> None:
        """Create a tokenizer; raise UserError unless the characters are distinct, sorted, and not surrogates."""
        if not characters or list(characters) != sorted(set(characters)):
            raise UserError("a character vocabulary holds each character once, sorted")
        if any("\ud800" <= character <= "\udfff" for character in characters):
            raise UserError("a character vocabulary holds no surrogates, which are not characters")
        self.characters = characters
        self.vocab_size = len(characters)
        self._known = set(characters)
        self._points = known = code_points(characters)
        self._unknown_id = self.vocab_size
        dtype = np.min_scalar_type(self._unknown_id)
        # The table's last entry serves all code points beyond the last known one.
        self._ids = np.full(int(known.max()) + 2, self._unknown_id, dtype=dtype)
        self._ids[known] = np.arange(self.vocab_size)
        self._last_index = len(self._ids) - 1
        self._byte_table = self._ids[np.minimum(np.arange(256), self._last_index)].tobytes()

    @classmethod
    def learn(cls, texts: Iterable[str]) -> "CharTokenizer":
        """Create a tokenizer for all characters of the texts."""
        found = CharacterSet()
        for text in texts:
            found.add(text)
        return cls(found.sorted())

    def encode(self, text: str) -> Tokens:
        """Return the ids of a text.

        Raises:
            UserError: A character has no token.
        """
        ids = self._lookup(text)
        if ids.size and int(ids.max()) == self._unknown_id:
            character = text[int(np.argmax(ids == self._unknown_id))]
            raise UserError(f"the vocabulary has no character {character!r}")
        return ids.astype(token_dtype(self.vocab_size), copy=False)

    def _lookup(self, text: str) -> Tokens:
        """Return the ids of a text, with `_unknown_id` for characters that have no token."""
        if text.isascii() and self._ids.itemsize == 1:
            return np.frombuffer(text.encode("ascii").translate(self._byte_table), dtype=np.uint8)
        return self._ids[np.minimum(code_points(text), self._last_index)]

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a character."""
        return self.characters[token].encode()

    def decode_bytes(self, tokens: Tokens) -> bytes:
        """Return the UTF-8 bytes of characters."""
        return self._points[tokens].tobytes().decode("utf-32-le").encode()

    def unknown_characters(self, text: str) -> list[str]:
        """Return the distinct characters of a text that have no token, sorted."""
        return sorted(set(text) - self._known)

    def split_unknown(self, text: str) -> tuple[str, str]:
        """Return the characters of a text that have a token, and those that have none, both in their order."""
        is_unknown = self._lookup(text) == self._unknown_id
        if not is_unknown.any():
            return text, ""
        points = code_points(text)
        known, unknown = (part.tobytes().decode("utf-32-le") for part in (points[~is_unknown], points[is_unknown]))
        return known, unknown

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the characters."""
        return {"kind": self.kind, "characters": self.characters}


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte: 256 tokens that encode any text."""

    kind = "byte"
    vocab_size = 256

    def encode(self, text: str) -> Tokens:
        """Return the bytes of a text; a surrogate from an undecodable command-line byte becomes that byte again."""
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)

    def token_bytes(self, token: int) -> bytes:
        """Return the byte itself."""
        return bytes([token])

    def decode_bytes(self, tokens: Tokens) -> bytes:
        """Return the bytes themselves."""
        return tokens.astype(np.uint8).tobytes()


class BPETokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al. 2016) of UTF-8 bytes within GPT-2's words, computed by tiktoken.

    Of two neighbors that can be merged, those that make the token with the lowest id come first.
    """

    kind = "bpe"
    end_of_text: int

    # GPT-2's pattern always splits a text between a visible character and a space or newline after it. The expression
    # is for the reversed text, in which the last such place comes first.
    _REVERSED_SPLIT = re.compile(r"[ \n](?=\S)")

    def __init__(self, tokens: Sequence[bytes]) -> None:
        """Create a tokenizer with these tokens, by id, and one more, which separates documents.

        Raises:
            UserError: The tokens are not distinct, or a byte is not among them.
        """
        import tiktoken  # noqa: PLC0415  (only these tokenizers need it)
        from tiktoken_ext.openai_public import r50k_pat_str  # noqa: PLC0415

        ranks = {token: rank for rank, token in enumerate(tokens)}
        if len(ranks) < len(tokens) or not all(bytes([byte]) in ranks for byte in range(256)):
            raise UserError("a BPE vocabulary holds each token once, and all bytes among them")
        self.tokens = list(tokens)
        self.vocab_size = len(tokens) + 1
        self.end_of_text = len(tokens)
        self._encoding = tiktoken.Encoding(
            name=self.kind,
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> Tokens:
        """Return the ids of a text; "<|endoftext|>" in it is ordinary text."""
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # lone surrogates, from invalid command-line bytes; encode_ordinary accepts them
            ids = np.array(self._encoding.encode_ordinary(text))
        return ids.astype(token_dtype(self.vocab_size))

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a BPE token."""
        return self._encoding.decode_single_token_bytes(token)

    def decode_bytes(self, tokens: Tokens) -> bytes:
        """Return the bytes of BPE tokens."""
        return self._encoding.decode_bytes(tokens.tolist())

    def split_point(self, text: str) -> int:
        """Return the last index between a visible character and a space or newline; 0 if there is none."""
        last = self._REVERSED_SPLIT.search(text[::-1])
        return len(text) - last.start() - 1 if last else 0

    def merges(self) -> list[tuple[bytes, bytes]]:
        """Return the pairs of tokens that are merged, in their order."""
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        return [split_token(token, ranks) for token in self.tokens if len(token) > 1]

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the tokens, each character standing for a byte."""
        return {"kind": self.kind, "tokens": [token.decode("latin-1") for token in self.tokens]}


def split_token(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens that are merged to a token.

    Raises:
        UserError: The merges do not lead to the token.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], ranks[token]) for i in range(len(parts) - 1)]
        first = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[first] >= ranks[token]:
            raise UserError(f"no merges of a BPE vocabulary lead to {token!r}")
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's byte-pair encoding (BPE) of 50,257 tokens (Radford et al. 2019)."""

    kind = "gpt2"
    vocab_size = 50257

    def __init__(self, data_dir: Path) -> None:
        """Load the vocabulary, and download it into `data_dir` if it is missing there."""
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks  # noqa: PLC0415

        from glyphgpt.data.downloads import GPT2_ENCODER, GPT2_MERGES, fetch  # noqa: PLC0415

        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(fetch(GPT2_MERGES, data_dir)), encoder_json_file=str(fetch(GPT2_ENCODER, data_dir))
        )
        super().__init__(sorted(ranks, key=ranks.__getitem__))

    def to_dict(self) -> dict[str, Any]:
        """Return the kind; the vocabulary is downloaded."""
        return {"kind": self.kind}


class RecordTokenizer(Tokenizer):
    r"""A tokenizer for records, with a token before and after each: that of the base, or one more.

    >>> tokenizer = RecordTokenizer(CharTokenizer("aemnov"), separator="\n")
    >>> tokenizer.encode_documents(["", "emma", "ava", ""]).tolist()
    [6, 1, 2, 2, 0, 6, 0, 5, 0, 6]
    >>> decode(tokenizer, [0, 5, 0, 6, 1])
    'ava\ne'
    """

    end_of_text: int

    def __init__(self, base: Tokenizer, separator: str) -> None:
        """Add records to a tokenizer; `separator` is what separates them in a text, or "" if nothing does."""
        self._base, self.kind, self.separator = base, base.kind, separator
        self.end_of_text = base.vocab_size if base.end_of_text is None else base.end_of_text
        self.vocab_size = max(base.vocab_size, self.end_of_text + 1)
        self._points: NDArray[np.uint32] | None = None  # of the tokens, where each is a character
        if isinstance(base, CharTokenizer) and len(separator) == 1:
            self._points = code_points(base.characters + separator)

    @property
    def base(self) -> Tokenizer:
        """The tokenizer of the text within records."""
        return self._base

    def encode(self, text: str) -> Tokens:
        """Return the ids of a record, or of a part of one, without the tokens before and after it."""
        return self._base.encode(text).astype(token_dtype(self.vocab_size), copy=False)

    def encode_documents(self, documents: Sequence[str]) -> Tokens:
        """Return the ids of documents, separated by the end-of-text token."""
        if not isinstance(self._base, CharTokenizer):
            return super().encode_documents(documents)
        # For short records, this is many times as fast as encoding each.
        ends = np.cumsum([len(document) for document in documents[:-1]], dtype=np.int64)
        return np.insert(self.encode("".join(documents)), ends, self.end_of_text)

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token; those of the separator between records."""
        return (self.separator or END_OF_TEXT).encode() if token == self.end_of_text else self._base.token_bytes(token)

    def decode_bytes(self, tokens: Tokens) -> bytes:
        """Return the UTF-8 bytes of tokens (N,)."""
        if self._points is not None:  # many times as fast
            return self._points[tokens].tobytes().decode("utf-32-le").encode()
        first, *others = np.split(tokens, np.flatnonzero(tokens == self.end_of_text))
        parts = [self._base.decode_bytes(part) for part in (first, *(part[1:] for part in others))]
        return self.token_bytes(self.end_of_text).join(parts)

    def unknown_characters(self, text: str) -> list[str]:
        """Return the distinct characters of a text that have no token, sorted."""
        return self._base.unknown_characters(text)

    def split_unknown(self, text: str) -> tuple[str, str]:
        """Return the characters of a text that have a token, and those that have none, both in their order."""
        return self._base.split_unknown(text)

    def split_point(self, text: str) -> int:
        """Return an index, as late as possible, at which a text can be split without changing its tokens, or 0."""
        return self._base.split_point(text)

    def to_dict(self) -> dict[str, Any]:
        """Return what the base does, and the separator."""
        return self._base.to_dict() | {"separator": self.separator}


def tokenizer_from_dict(data: Any, data_dir: Path) -> Tokenizer:
    """Restore a tokenizer from the result of its `to_dict`.

    Raises:
        UserError: The data does not describe a tokenizer.
    """
    match data:
        case {"separator": str(separator), **base}:
            return RecordTokenizer(tokenizer_from_dict(base, data_dir), separator)
        case {"kind": "char", "characters": str(characters)}:
            return CharTokenizer(characters)
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "gpt2"}:
            return GPT2Tokenizer(data_dir)
        case {"kind": "bpe", "tokens": [*tokens]} if all(isinstance(t, str) and t and max(t) <= "\xff" for t in tokens):
            return BPETokenizer([token.encode("latin-1") for token in tokens])
    raise UserError("unknown tokenizer: the file is damaged or was written by a newer glyphgpt")


@lru_cache(maxsize=1)
def bytes_to_unicode() -> str:
    """Return the 256 characters that represent bytes in GPT-2's vocabulary.

    A byte that is printable in Latin-1 represents itself. The others are numbered from U+0100
    (https://github.com/openai/gpt-2/blob/master/src/encoder.py).

    >>> "".join(bytes_to_unicode()[byte] for byte in b"a b")
    'aĠb'
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0x100)} - {0xAD}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


def describe_characters(characters: Sequence[str], counts: Mapping[str, int] | None = None) -> str:
    """Return the first ten characters with their code points and, if given, counts, and the number of the others."""
    times = {character: f", {counts[character]:,} times" for character in characters} if counts else {}
    shown = ", ".join(f"{c!r} (U+{ord(c):04X}{times.get(c, '')})" for c in characters[:10])
    return f"{shown} and {len(characters) - 10:,} more" if len(characters) > 10 else shown


def control_characters(characters: str) -> list[str]:
    """Return the code points of control characters, except NUL, tab, newline and carriage return."""
    return [f"U+{ord(c):04X}" for c in characters if unicodedata.category(c) == "Cc" and c not in "\0\t\n\r"]


def encode_text(text: str, tokenizer: Tokenizer, *, skip: bool) -> Tokens:
    """Return the ids of a user's text, without its unknown characters if `skip` is true.

    Raises:
        UserError: The text has unknown characters and `skip` is false.
    """
    unknown = tokenizer.unknown_characters(text)
    if unknown and not skip:
        raise UserError(
            f"the model has never seen {describe_characters(unknown)}; change the text, or leave them out with "
            "--skip_unknown (in Python skip_unknown=True)"
        )
    return tokenizer.encode(text.translate(dict.fromkeys(map(ord, unknown))))


def encode_prompt(text: str, tokenizer: Tokenizer, *, skip: bool) -> NDArray[np.int64]:
    """Return the ids of a text to continue, int64. The start token precedes a record, and is an empty text.

    Raises:
        UserError: The text has unknown characters and `skip` is false.
    """
    tokens = encode_text(text, tokenizer, skip=skip).astype(np.int64)
    has_start = tokens.size and tokenizer.separator is None
    return tokens if has_start else np.concatenate(([start_token(tokenizer)], tokens))


def drop_unknown(stream: Iterator[list[str]], tokenizer: Tokenizer, dropped: Counter[str]) -> Iterator[list[str]]:
    """Yield lists of texts without the characters that have no token, and count these in `dropped`."""
    for texts in stream:
        parts = [tokenizer.split_unknown(text) for text in texts]
        dropped.update("".join(unknown for _, unknown in parts))
        first, *others = (known for known, _ in parts)
        yield [first, *(others if tokenizer.separator is None else filter(None, others))]  # without empty records


def decode(tokenizer: Tokenizer, tokens: Sequence[int] | Tokens) -> str:
    """Return the text of tokens; invalid UTF-8 becomes U+FFFD."""
    return tokenizer.decode_bytes(np.asarray(tokens)).decode("utf-8", "replace")


def token_text(token_bytes: bytes) -> str:
    r"""Return a token's text; bytes that are not a whole character are escaped, as in \xc3."""
    return token_bytes.decode("utf-8", "backslashreplace")


def start_token(tokenizer: Tokenizer) -> int:
    """Return the token that a sample without a prompt starts from.

    It is the token before a record in a text of records, else the newline, or the first token if there is none.
    """
    if tokenizer.end_of_record is not None:
        return tokenizer.end_of_record
    return 0 if tokenizer.unknown_characters("\n") else int(tokenizer.encode("\n")[0])


class StreamDecoder:
    """Decodes tokens one by one, and returns each character once its last byte has arrived."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Return the text that the token completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def end(self) -> str:
        """Return the rest: an incomplete character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)
