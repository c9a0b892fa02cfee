"""Text to token ids and back: characters, UTF-8 bytes, or GPT-2's word pieces.

A tokenizer turns into plain data (`to_plain`) that travels in meta.json and in every checkpoint, and back
(`tokenizer_from_dict`).
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glyphgpt.errors import UserError

Tokens = NDArray[np.unsignedinteger[Any]]

UNICODE_SIZE = 0x110000  # code points


class Tokenizer(Protocol):
    """What every tokenizer can do."""

    kind: str
    vocab_size: int
    end_of_text: int | None
    """The token between documents, if there is one."""

    def encode(self, text: str) -> Tokens:
        """Turn text into ids, of the smallest unsigned type that holds the vocabulary."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of one token, which need not be whole characters."""
        ...

    def unknown_characters(self, text: str) -> list[str]:
        """List the different characters of a text that have no token."""
        ...

    def split_point(self, text: str) -> int:
        """Return a place, as late as possible, where a text can be cut so that its parts encode as the whole."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return all that `tokenizer_from_dict` needs, as JSON types."""
        ...


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the smallest unsigned type that holds the ids of a vocabulary."""
    return np.min_scalar_type(vocab_size - 1)


def code_points(text: str) -> NDArray[np.uint32]:
    """Return the Unicode code points of a text, lone surrogates included, shape (characters,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class CharTokenizer:
    """One token per character; ids follow the order of the code points, as nanoGPT's do.

    >>> tokenizer = CharTokenizer("ehlo")
    >>> tokenizer.encode("hello").tolist()
    [1, 0, 2, 2, 3]
    >>> decode(tokenizer, [1, 0, 2, 2, 3])
    'hello'
    """

    kind = "char"
    end_of_text: int | None = None

    def __init__(self, characters: str) -> None:
        """Take the characters of the vocabulary, each once, in the order of their code points."""
        if not characters or list(characters) != sorted(set(characters)):
            raise UserError("a character vocabulary holds each character once, sorted")
        if any("\ud800" <= character <= "\udfff" for character in characters):
            raise UserError("a character vocabulary holds no surrogates, which are no characters")
        self.characters = characters
        self.vocab_size = len(characters)
        known = code_points(characters)
        self._missing = self.vocab_size
        dtype = np.min_scalar_type(self._missing)  # one more than the ids: the mark of a missing character
        self._id_of = np.full(int(known.max()) + 2, self._missing, dtype=dtype)
        self._id_of[known] = np.arange(self.vocab_size)
        self._beyond = len(self._id_of) - 1  # the table's last entry stands for all characters after the last known
        self._id_of_byte = self._id_of[np.minimum(np.arange(256), self._beyond)].tobytes()

    @classmethod
    def learn(cls, texts: Iterable[str]) -> "CharTokenizer":
        """Collect the characters of texts that may come in pieces."""
        seen = np.zeros(UNICODE_SIZE, dtype=bool)
        seen_ascii = b""
        for text in texts:
            if text.isascii():  # most text is, and then bytes will do, many times as fast
                seen_ascii += bytes(set(text.encode("ascii").translate(None, delete=seen_ascii)))
            else:
                seen[code_points(text)] = True
        seen[list(seen_ascii)] = True
        return cls("".join(map(chr, np.flatnonzero(seen))))

    def encode(self, text: str) -> Tokens:
        """Turn text into ids.

        Raises:
            UserError: a character has no token.
        """
        ids = self._lookup(text)
        if ids.size and int(ids.max()) == self._missing:
            character = text[int(np.argmax(ids == self._missing))]
            raise UserError(f"the vocabulary has no character {character!r}")
        return ids.astype(token_dtype(self.vocab_size), copy=False)

    def _lookup(self, text: str) -> Tokens:
        if text.isascii() and self._id_of.itemsize == 1:
            return np.frombuffer(text.encode("ascii").translate(self._id_of_byte), dtype=np.uint8)
        return self._id_of[np.minimum(code_points(text), self._beyond)]

    def token_bytes(self, token: int) -> bytes:
        """Return a character's UTF-8 bytes."""
        return self.characters[token].encode()

    def unknown_characters(self, text: str) -> list[str]:
        """List the different characters of a text that have no token."""
        return sorted(set(text) - set(self.characters))

    def split_unknown(self, text: str) -> tuple[str, str]:
        """Return a text's characters that have a token, and those that have none, each in their order."""
        unknown = self._lookup(text) == self._missing
        if not unknown.any():
            return text, ""
        characters = code_points(text)
        known, others = (part.tobytes().decode("utf-32-le") for part in (characters[~unknown], characters[unknown]))
        return known, others

    def split_point(self, text: str) -> int:
        """Return the text's end: any place will do."""
        return len(text)

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the characters."""
        return {"kind": self.kind, "characters": self.characters}


class ByteTokenizer:
    """One token per UTF-8 byte: 256 tokens that spell anything."""

    kind = "byte"
    vocab_size = 256
    end_of_text: int | None = None

    def encode(self, text: str) -> Tokens:
        """Turn text into its bytes; bytes that the command line could not decode come back as they were."""
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)

    def token_bytes(self, token: int) -> bytes:
        """Return the byte itself."""
        return bytes([token])

    def unknown_characters(self, text: str) -> list[str]:  # noqa: ARG002
        """Return nothing: every character has bytes."""
        return []

    def split_point(self, text: str) -> int:
        """Return the text's end: any place will do."""
        return len(text)

    def to_dict(self) -> dict[str, Any]:
        """Return the kind."""
        return {"kind": self.kind}


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding of 50,257 tokens (Radford et al. 2019), by tiktoken."""

    kind = "gpt2"
    vocab_size = 50257
    end_of_text: int | None = 50256

    # GPT-2's pattern cuts between a visible character and white space that follows, whatever stands around.
    _CUT_REVERSED = re.compile(r"[ \n](?=\S)")

    def __init__(self, data_dir: Path) -> None:
        """Load the vocabulary, fetching it into `data_dir` where it is not there yet."""
        import tiktoken  # noqa: PLC0415  (only for those who use it)
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks  # noqa: PLC0415
        from tiktoken_ext.openai_public import r50k_pat_str  # noqa: PLC0415

        from glyphgpt.data.downloads import GPT2_ENCODER, GPT2_MERGES, fetch  # noqa: PLC0415

        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(fetch(GPT2_MERGES, data_dir)), encoder_json_file=str(fetch(GPT2_ENCODER, data_dir))
        )
        self._encoding = tiktoken.Encoding(
            name="gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": 50256},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> Tokens:
        """Turn text into ids; the end-of-text mark in it counts as ordinary text."""
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # bytes of a command line that are no text; tiktoken's slower way takes them
            ids = np.array(self._encoding.encode_ordinary(text))
        return ids.astype(np.uint16)

    def token_bytes(self, token: int) -> bytes:
        """Return a word piece's bytes."""
        return self._encoding.decode_single_token_bytes(token)

    def unknown_characters(self, text: str) -> list[str]:  # noqa: ARG002
        """Return nothing: every character has bytes, and every byte a token."""
        return []

    def split_point(self, text: str) -> int:
        """Return the last place between a visible character and a space or new line; 0 if there is none."""
        last = self._CUT_REVERSED.search(text[::-1])
        return len(text) - last.start() - 1 if last else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the kind."""
        return {"kind": self.kind}


def tokenizer_from_dict(plain: Any, data_dir: Path) -> Tokenizer:
    """Make a tokenizer from what `to_plain` gave.

    Raises:
        UserError: the data is not that of a tokenizer.
    """
    match plain:
        case {"kind": "char", "characters": str(characters)}:
            return CharTokenizer(characters)
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "gpt2"}:
            return GPT2Tokenizer(data_dir)
    raise UserError("this is not a tokenizer that this version knows")


def describe_characters(characters: Sequence[str], counts: Mapping[str, int] | None = None) -> str:
    """Name the first ten of some characters, with how often each was counted where that is known."""
    times = {character: f", {counts[character]:,} times" for character in characters} if counts else {}
    shown = ", ".join(f"{c!r} (U+{ord(c):04X}{times.get(c, '')})" for c in characters[:10])
    return f"{shown} and {len(characters) - 10:,} more" if len(characters) > 10 else shown


def encode_text(text: str, tokenizer: Tokenizer, *, skip: bool) -> Tokens:
    """Turn a user's text into ids for a model; what it has never seen is left out if `skip` is true.

    Raises:
        UserError: the text has characters that the model has never seen, and `skip` is false.
    """
    unknown = tokenizer.unknown_characters(text)
    if unknown and not skip:
        raise UserError(
            f"the model has never seen {describe_characters(unknown)}; change the text, or add --skip_unknown"
        )
    return tokenizer.encode(text.translate(dict.fromkeys(map(ord, unknown))))


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> Tokens:
    """Turn documents into ids, with the end-of-text token between them.

    Raises:
        UserError: a character has no token.
    """
    first, *others = documents
    parts = [tokenizer.encode(first)]
    for document in others:
        parts += [np.array([tokenizer.end_of_text], dtype=parts[0].dtype), tokenizer.encode(document)]
    return np.concatenate(parts) if others else parts[0]


def decode(tokenizer: Tokenizer, tokens: Sequence[int] | Tokens) -> str:
    """Turn ids into text; bytes that are no character show as U+FFFD."""
    return b"".join(tokenizer.token_bytes(int(token)) for token in tokens).decode("utf-8", "replace")


def start_token(tokenizer: Tokenizer) -> int:
    """Return what a text without a prompt starts from: a new line, or the first token where there is none."""
    return 0 if tokenizer.unknown_characters("\n") else int(tokenizer.encode("\n")[0])


class StreamDecoder:
    """Decodes token by token; a character comes out once its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begin a new text."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Return the text that this token completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def end(self) -> str:
        """Return what is left: an unfinished character as U+FFFD."""
        return self._decoder.decode(b"", final=True)
