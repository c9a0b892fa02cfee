"""Attention by hand: one sentence through one attention layer, with every shape, and seven variants of that layer.

    python lessons/attention.py
    python lessons/attention.py "To be, or not to be, that is the question" question

Shape letters are those of model.py: T time (characters of the sentence), C channels, H heads, D head size (C / H),
V vocabulary (distinct characters). There is no batch dimension B. Embeddings and weight matrices are random and
untrained, so the attention weights have no meaning yet. The program shows the mechanism that training works with.

A score function maps queries and keys, (H, T, D) each, to scores (H, T, T). Row t holds the scores of the query at
position t, column s those of the key at position s. A mask (T, T) is True where position t may attend to position s.
Elsewhere the score becomes minus infinity, and the weight 0. The score functions also accept torch tensors, because
attention_variants.py trains the real model with them.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glyphgpt.errors import UsageError, exit_on_error

Array = NDArray[np.float64]
ScoreFunction = Callable[[Array, Array], Array]
MaskFunction = Callable[[int], NDArray[np.bool_]]

SENTENCE = "La pizza est sortie du four et elle était délicieuse"
WORD = "elle"
MAX_CHARACTERS = 100  # one row of the terminal
BLOCKS = " ░▒▓█"


def dot_product(q: Array, k: Array) -> Array:
    """Return q · k / √D, which is large where q and k point the same way. √D offsets the growth of sums with D."""
    return q / math.sqrt(q.shape[-1]) @ k.swapaxes(-2, -1)  # (H, T, D) @ (H, D, T) -> (H, T, T)


def negated(q: Array, k: Array) -> Array:
    """Return -q · k / √D, which is large where q and k point in opposite directions."""
    return -dot_product(q, k)


def squared(q: Array, k: Array) -> Array:
    """Return (q · k / √D)², which is large for equal and for opposite directions, and 0 at a right angle."""
    return dot_product(q, k) ** 2


def inverse(q: Array, k: Array) -> Array:
    """Return s / (s² + 0.01) for s = q · k / √D: about 1 / s far from 0, at most 5, and 0 at s = 0."""
    s = dot_product(q, k)
    return s / (s**2 + 0.01)


def unscaled(q: Array, k: Array) -> Array:
    """Return q · k, without the division by √D."""
    return q @ k.swapaxes(-2, -1)  # (H, T, D) @ (H, D, T) -> (H, T, T)


def causal_mask(T: int) -> NDArray[np.bool_]:
    """Let each position see itself and the past, s <= t: all that is known when the next character is predicted."""
    return np.tri(T, dtype=bool)


def anticausal_mask(T: int) -> NDArray[np.bool_]:
    """Let each position see itself and the future, s >= t."""
    return np.tri(T, dtype=bool).T


def no_mask(T: int) -> NDArray[np.bool_]:
    """Let each position see every position."""
    return np.ones((T, T), dtype=bool)


def self_mask(T: int) -> NDArray[np.bool_]:
    """Let each position see only itself, s = t: no attention to other characters."""
    return np.eye(T, dtype=bool)


def sinusoidal_positions(T: int, C: int) -> Array:
    """Return the position vectors (T, C) of Vaswani et al. 2017, section 3.5, for an even C.

    PE(t, 2i) = sin(t / 10000^(2i/C)) and PE(t, 2i+1) = cos(t / 10000^(2i/C)). Each pair of channels is a clock hand
    that turns with t. The first of the C / 2 hands is the fastest, the last the slowest.
    """
    t = np.arange(T)[:, None]  # (T, 1)
    i = np.arange(C // 2)  # (C / 2)
    angle = t / 10000 ** (2 * i / C)  # (T, C / 2)
    return np.stack((np.sin(angle), np.cos(angle)), axis=-1).reshape(T, C)  # (T, C / 2, 2) -> (T, C)


def softmax(scores: Array) -> Array:
    """Return exp(score) / Σ exp(score) of each row: weights of the same shape, from 0 to 1, that sum to 1."""
    exp = np.exp(scores - scores.max(axis=-1, keepdims=True))  # the maximum cancels out; no overflow
    return exp / exp.sum(axis=-1, keepdims=True)


class Layer(NamedTuple):
    """The parameters of an attention layer, which training would learn: four matrices (C, C), and H heads."""

    query: Array
    key: Array
    value: Array
    out: Array
    n_head: int


class Activations(NamedTuple):
    """Every array that an attention layer computes."""

    q: Array  # (H, T, D)
    k: Array  # (H, T, D)
    v: Array  # (H, T, D)
    scores: Array  # (H, T, T)
    weights: Array  # (H, T, T)
    mixed: Array  # (H, T, D)
    out: Array  # (T, C)


def attention(
    x: Array, layer: Layer, score: ScoreFunction = dot_product, mask: MaskFunction = causal_mask
) -> Activations:
    """Compute softmax(masked score(q, k)) v: each character of x (T, C) gathers values from the characters it sees."""
    T, C = x.shape

    def split_heads(y: Array) -> Array:
        return y.reshape(T, layer.n_head, C // layer.n_head).swapaxes(0, 1)  # (T, C) -> (T, H, D) -> (H, T, D)

    q = split_heads(x @ layer.query)  # what each character looks for: (T, C) @ (C, C) -> (T, C) -> (H, T, D)
    k = split_heads(x @ layer.key)  # what each character can be found by: (H, T, D)
    v = split_heads(x @ layer.value)  # what each character passes on: (H, T, D)
    scores = score(q, k)  # (H, T, T)
    weights = softmax(np.where(mask(T), scores, -np.inf))  # (H, T, T), each row sums to 1
    mixed = weights @ v  # weighted means of the values: (H, T, T) @ (H, T, D) -> (H, T, D)
    out = mixed.swapaxes(0, 1).reshape(T, C) @ layer.out  # (H, T, D) -> (T, H, D) -> (T, C), @ (C, C) -> (T, C)
    return Activations(q, k, v, scores, weights, mixed, out)


class Variant(NamedTuple):
    """A change to attention, and what it does."""

    description: str
    score: ScoreFunction = dot_product
    mask: MaskFunction = causal_mask
    positions: bool = True


VARIANTS = {
    "standard": Variant("scaled dot products and the causal mask, as in GPT"),
    "negated": Variant("large weights become small; training can undo this with a negated query matrix", negated),
    "squared": Variant("a key opposite to the query scores as high as one that matches it", squared),
    "inverse": Variant("a strong match scores lower than a weak one", inverse),
    "unscaled": Variant("scores are √D times as large, so fewer characters share the weight", unscaled),
    "no positions": Variant("equal characters get equal weights, wherever they are", positions=False),
    "anticausal": Variant("itself and the future; generation has no future to read", mask=anticausal_mask),
    "no mask": Variant("past and future; a model that sees the answer does not learn to predict it", mask=no_mask),
}


def entropy(weights: Array) -> float:
    """Return -Σ w log2 w in bits: 0 if one weight is 1, log2(n) if n weights are equal."""
    positive = weights[weights > 0]
    return float(-(positive * np.log2(positive)).sum())


def format_weights(sentence: str, weights: Array) -> str:
    """Return attention weights (T) drawn below their sentence; a full block is the largest weight."""
    blocks = "".join(BLOCKS[round(4 * fraction)] for fraction in weights / weights.max())
    largest = ", ".join(f"{weights[s]:.0%} {sentence[s]!r} at {s}" for s in np.argsort(-weights, kind="stable")[:3])
    bits = entropy(weights)
    summary = f"entropy: {bits:.2f} bits, effectively {2**bits:.1f} characters"
    return f"  {sentence}\n  {blocks}\n  largest: {largest}\n  {summary}"


def print_shapes(rows: list[tuple[str, str, NDArray[Any]]]) -> None:
    """Print a table of arrays: name, letters of the shape, and the shape."""
    for name, letters, array in rows:
        print(f"{name:38}{letters:8}{' x '.join(map(str, array.shape))}")


def print_lesson(sentence: str, t: int, C: int, H: int, seed: int) -> None:
    """Print the shape of every array, then the attention weights of position t under each variant."""
    rng = np.random.default_rng(seed)
    T, vocabulary = len(sentence), sorted(set(sentence))
    ids = np.array([vocabulary.index(character) for character in sentence])  # (T)
    embedding = rng.standard_normal((len(vocabulary), C))  # (V, C)
    x = embedding[ids] + sinusoidal_positions(T, C)  # (T, C)
    query, key, value, out = rng.standard_normal((4, C, C)) / math.sqrt(C)  # (C, C) each; 1 / √C preserves the scale
    layer = Layer(query, key, value, out, H)
    activations = attention(x, layer)

    print(f"T = {T} characters, C = {C} channels, H = {H} heads, D = C / H = {C // H}, V = {len(vocabulary)}\n")
    print_shapes([
        ("ids", "T", ids),
        ("embedding, one row for each id", "V C", embedding),
        ("x = embedding[ids] + positions", "T C", x),
        ("q, k, v = x times one matrix each", "H T D", activations.q),
        ("scores = q k^T / sqrt(D)", "H T T", activations.scores),
        ("weights = softmax(masked scores)", "H T T", activations.weights),
        ("mixed = weights v", "H T D", activations.mixed),
        ("out = joined heads times a matrix", "T C", activations.out),
    ])  # fmt: skip

    print(f"\nAttention weights of {sentence[t]!r} at position {t} (^), in the first of {H} heads:\n  {sentence}")
    print("  " + " " * t + "^")
    for name, variant in VARIANTS.items():
        variant_x = x if variant.positions else embedding[ids]  # (T, C)
        weights = attention(variant_x, layer, variant.score, variant.mask).weights  # (H, T, T)
        future = f"weight on the future: {weights[0, t, t + 1 :].sum():.0%}"
        print(f"\n{name}: {variant.description}\n{format_weights(sentence, weights[0, t])}; {future}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the sizes and the random matrices."""
    parser.add_argument("--channels", type=int, default=32, help="C, an even number (default %(default)s)")
    parser.add_argument("--heads", type=int, default=2, help="H, a divisor of C (default %(default)s)")
    parser.add_argument("--seed", type=int, default=3, help="seed of embeddings and matrices (default %(default)s)")


def check_options(options: argparse.Namespace, *sentences: str) -> None:
    """Check the sentences, and the options of `add_options`.

    Raises:
        UsageError: One of them is not suitable.
    """
    C, H = options.channels, options.heads
    for sentence in sentences:
        if not 2 <= len(sentence) <= MAX_CHARACTERS:
            raise UsageError(f"the sentence has {len(sentence)} characters; choose one of 2 to {MAX_CHARACTERS}")
        if not sentence.isprintable():
            raise UsageError("the sentence has unprintable characters; choose plain text on one line")
    if not 2 <= C <= 1024 or C % 2:
        raise UsageError(f"--channels={C} is not an even number from 2 to 1024; sines and cosines come in pairs")
    if H < 1 or C % H:
        raise UsageError(f"--heads={H} does not divide {C} channels; choose a number that does")
    if options.seed < 0:
        raise UsageError(f"--seed={options.seed} is negative; choose 0 or more")


def last_letter(word: str, sentence: str) -> int:
    """Return the position of a word's last letter.

    Raises:
        UsageError: The word is not in the sentence.
    """
    if word not in sentence:
        raise UsageError(f"{word!r} is not in the sentence; choose a word that is")
    return sentence.rindex(word) + len(word) - 1


def main() -> None:
    """Read and check the command line, then print the lesson."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentence", nargs="?", default=SENTENCE)
    parser.add_argument("word", nargs="?", help="shows the weights of its last letter (default: elle, or the end)")
    add_options(parser)
    options = parser.parse_args()
    sentence = options.sentence
    check_options(options, sentence)
    t = last_letter(options.word or (WORD if sentence == SENTENCE else sentence), sentence)
    print_lesson(sentence, t, options.channels, options.heads, options.seed)


if __name__ == "__main__":
    with exit_on_error():
        main()
