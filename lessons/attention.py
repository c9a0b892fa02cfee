"""Attention by hand: one sentence through one layer, every shape shown, and what happens if you change it.

    python lessons/attention.py
    python lessons/attention.py "To be, or not to be, that is the question" question

Shape letters as in model.py: T time (characters of the sentence), C channels, H heads, D head size (C / H), V
vocabulary (different characters). There is no batch B. Embeddings and matrices are random, from a seed: nobody has
trained them, so who looks at whom has no meaning yet. What you see is the mechanism that training has to work with.

A score makes a number for each pair, (H, T, T), of queries and keys, (H, T, D) each: row t asks, column s answers. A
mask (T, T) is True where t may look at s; elsewhere the score becomes minus infinity, and the weight 0. The scores take
torch's tensors too: what_ifs.py trains the real model with them.
"""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glyphgpt.errors import UsageError, exit_on_error

Floats = NDArray[np.float64]
Score = Callable[[Floats, Floats], Floats]
Mask = Callable[[int], NDArray[np.bool_]]

SENTENCE = "La pizza est sortie du four et elle était délicieuse"
WORD = "elle"
LONGEST = 100  # characters: a row of the terminal
BLOCKS = " ░▒▓█"


def dot(q: Floats, k: Floats) -> Floats:
    """Score q · k / √D: high where both point the same way. Sums of D products grow with √D; the root undoes that."""
    return q / math.sqrt(q.shape[-1]) @ k.swapaxes(-2, -1)  # (H, T, D) @ (H, D, T) -> (H, T, T)


def negated(q: Floats, k: Floats) -> Floats:
    """Score -q · k / √D: high where they point opposite ways."""
    return -dot(q, k)


def squared(q: Floats, k: Floats) -> Floats:
    """Score (q · k / √D)²: the same way or opposite ways, no matter; the lowest is a right angle."""
    return dot(q, k) ** 2


def inverse(q: Floats, k: Floats) -> Floats:
    """Score 1 / s of s = q · k / √D, as s / (s² + 0.01): the same far from 0, at most 5, and 0 at s = 0 itself."""
    s = dot(q, k)
    return s / (s**2 + 0.01)


def unscaled(q: Floats, k: Floats) -> Floats:
    """Score q · k, without the root."""
    return q @ k.swapaxes(-2, -1)


def causal(T: int) -> NDArray[np.bool_]:
    """Itself and the past, s <= t: what there is when the next character is to be guessed."""
    return np.tri(T, dtype=bool)


def other_half(T: int) -> NDArray[np.bool_]:
    """Itself and the future, s >= t."""
    return np.tri(T, dtype=bool).T


def no_mask(T: int) -> NDArray[np.bool_]:
    """All."""
    return np.ones((T, T), dtype=bool)


def itself(T: int) -> NDArray[np.bool_]:
    """Nobody else, s = t: no attention at all."""
    return np.eye(T, dtype=bool)


def positions(T: int, C: int) -> Floats:
    """Return the waves of Vaswani et al. 2017, section 3.5, (T, C); C is even.

    PE(t, 2i) = sin(t / 10000^(2i/C)) and PE(t, 2i+1) = cos(t / 10000^(2i/C)): a clock with C / 2 hands, the first one
    fast, the last one slow.
    """
    t = np.arange(T)[:, None]  # (T, 1)
    i = np.arange(C // 2)  # (C / 2)
    angle = t / 10000 ** (2 * i / C)  # (T, C / 2)
    return np.stack((np.sin(angle), np.cos(angle)), axis=-1).reshape(T, C)  # (T, C / 2, 2) -> (T, C)


def softmax(scores: Floats) -> Floats:
    """Return exp(score) / the row's sum of exp(score): weights above 0 that sum to 1; the same shape."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))  # the shift cancels out, and nothing overflows
    return powers / powers.sum(axis=-1, keepdims=True)


class Layer(NamedTuple):
    """What training would learn, (C, C) each, and the number of heads H."""

    query: Floats
    key: Floats
    value: Floats
    out: Floats
    heads: int


class Steps(NamedTuple):
    """All that attention computes on its way."""

    q: Floats  # (H, T, D)
    k: Floats  # (H, T, D)
    v: Floats  # (H, T, D)
    scores: Floats  # (H, T, T)
    weights: Floats  # (H, T, T)
    mixed: Floats  # (H, T, D)
    out: Floats  # (T, C)


def attention(x: Floats, layer: Layer, score: Score = dot, mask: Mask = causal) -> Steps:
    """Let each character of x (T, C) gather from the others: softmax(score(q, k), masked) v."""
    T, C = x.shape

    def heads(y: Floats) -> Floats:
        return y.reshape(T, layer.heads, C // layer.heads).swapaxes(0, 1)  # (T, C) -> (T, H, D) -> (H, T, D)

    q = heads(x @ layer.query)  # what it asks for
    k = heads(x @ layer.key)  # what it answers to
    v = heads(x @ layer.value)  # what it hands over
    scores = score(q, k)  # (H, T, T)
    weights = softmax(np.where(mask(T), scores, -np.inf))  # (H, T, T), each row sums to 1
    mixed = weights @ v  # (H, T, T) @ (H, T, D) -> (H, T, D): means of values
    out = mixed.swapaxes(0, 1).reshape(T, C) @ layer.out  # (H, T, D) -> (T, H, D) -> (T, C)
    return Steps(q, k, v, scores, weights, mixed, out)


class WhatIf(NamedTuple):
    """A change, and what to look for."""

    says: str
    score: Score = dot
    mask: Mask = causal
    positions: bool = True


WHAT_IFS = {
    "as in GPT": WhatIf("scores are dot products over √D; itself and the past"),
    "negated": WhatIf("who got most gets least; training can turn every query round, and all is as before", negated),
    "squared": WhatIf("opposite counts as alike: no way left to say 'not you'", squared),
    "inverse": WhatIf("a perfect match gets less than a faint one", inverse),
    "unscaled": WhatIf("scores √D times as far apart: the weight gathers on fewer", unscaled),
    "no positions": WhatIf("equal letters get equal weights, wherever they stand", positions=False),
    "other half": WhatIf("itself and the future: in training, the answers; in writing, nothing", mask=other_half),
    "no mask": WhatIf("past and future: fine for reading, but who sees the answer never learns to guess", mask=no_mask),
}


def entropy(weights: Floats) -> float:
    """Return -Σ w log2 w in bits: 0 if all weight is on one, log2(n) if n share it evenly."""
    some = weights[weights > 0]
    return float(-(some * np.log2(some)).sum())


def picture(sentence: str, at: int, weights: Floats) -> str:
    """Show how the character at place `at` looks at the sentence: weights (T), the greatest a full block."""
    heat = "".join(BLOCKS[round(4 * share)] for share in weights / weights.max())
    strongest = ", ".join(f"{sentence[s]!r} at {s} {weights[s]:.0%}" for s in np.argsort(-weights, kind="stable")[:3])
    bits = entropy(weights)
    figures = f"{bits:.2f} bits: as if at {2**bits:.1f} characters; {weights[at + 1 :].sum():.0%} on the future"
    return f"  {sentence}\n  {heat}\n  most: {strongest}\n  {figures}"


def lesson(sentence: str, at: int, C: int, H: int, seed: int) -> None:
    """Print the way of a sentence through attention, then each what-if as the character at place `at` sees it."""
    random = np.random.default_rng(seed)
    T, characters = len(sentence), sorted(set(sentence))
    ids = np.array([characters.index(character) for character in sentence])  # (T)
    embedding = random.standard_normal((len(characters), C))  # (V, C)
    x = embedding[ids] + positions(T, C)  # (T, C)
    query, key, value, out = random.standard_normal((4, C, C)) / math.sqrt(C)  # (C, C) each: keeps sizes as they are
    layer = Layer(query, key, value, out, H)
    steps = attention(x, layer)

    print(f"T = {T} characters, C = {C} channels, H = {H} heads, D = C / H = {C // H}, V = {len(characters)}\n")
    for name, letters, array in (
        ("ids", "T", ids),
        ("embedding, a row for each id", "V C", embedding),
        ("x = embedding[ids] + positions", "T C", x),
        ("q, k, v = x times a matrix each", "H T D", steps.q),
        ("scores = q k^T / sqrt(D)", "H T T", steps.scores),
        ("weights = softmax of the past", "H T T", steps.weights),
        ("mixed = weights v", "H T D", steps.mixed),
        ("out = heads side by side, a matrix", "T C", steps.out),
    ):
        print(f"{name:38}{letters:8}{' x '.join(map(str, array.shape))}")

    print(f"\nHow {sentence[at]!r} at place {at} (^) looks at the others, in the first of {H} heads:\n  {sentence}")
    print("  " + " " * at + "^")
    for name, what_if in WHAT_IFS.items():
        seen = x if what_if.positions else embedding[ids]
        weights = attention(seen, layer, what_if.score, what_if.mask).weights  # (H, T, T)
        print(f"\n{name}: {what_if.says}\n{picture(sentence, at, weights[0, at])}")


def main() -> None:
    """Read the command line, check it, and give the lesson."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentence", nargs="?", default=SENTENCE)
    parser.add_argument("word", nargs="?", help="whose last letter looks (default: the sentence's end)")
    parser.add_argument("--channels", type=int, default=32, help="C, even (%(default)s)")
    parser.add_argument("--heads", type=int, default=2, help="H, divides C (%(default)s)")
    parser.add_argument("--seed", type=int, default=3, help="of embeddings and matrices (%(default)s)")
    given = parser.parse_args()
    sentence, C, H = given.sentence, given.channels, given.heads
    word = given.word or (WORD if sentence == SENTENCE else sentence)
    if not 2 <= len(sentence) <= LONGEST:
        raise UsageError(f"the sentence has {len(sentence)} characters; take 2 to {LONGEST}")
    if not sentence.isprintable():
        raise UsageError("the sentence has characters that a terminal does not show; take plain text, one line")
    if word not in sentence:
        raise UsageError(f"{word!r} is not in the sentence; name a word of it")
    if not 2 <= C <= 1024 or C % 2:
        raise UsageError(f"--channels={C}: sines and cosines come in pairs; take an even number from 2 to 1024")
    if H < 1 or C % H:
        raise UsageError(f"--heads={H} does not divide {C} channels; take a number that does")
    if given.seed < 0:
        raise UsageError(f"--seed={given.seed}: take 0 or more")
    lesson(sentence, sentence.rindex(word) + len(word) - 1, C, H, given.seed)


if __name__ == "__main__":
    with exit_on_error():
        main()
