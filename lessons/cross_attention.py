"""Cross-attention by hand: each character of a translation attends to the sentence that it translates.

    python lessons/cross_attention.py
    python lessons/cross_attention.py "die Katze" "the cat" cat

This is how the decoder of "Attention is all you need" (Vaswani et al. 2017) reads what the encoder has computed: the
queries come from the translation, the keys and values from the source. Nothing is masked, because the whole source is
known before its translation begins. The models of this project have no encoder: they read the source, a tab and the
translation as one text, and the causal self-attention of attention.py does both.

Shape letters: S characters of the source, T of the translation, C channels, H heads, D head size (C / H). Embeddings
and weight matrices are random and untrained.
"""

import argparse
import math

import numpy as np

from attention import (
    Activations,
    Array,
    Layer,
    add_options,
    check_options,
    dot_product,
    format_weights,
    last_letter,
    print_shapes,
    sinusoidal_positions,
    softmax,
)
from glyphgpt.errors import exit_on_error

SOURCE, TRANSLATION, WORD = "La pizza est sortie du four", "The pizza came out of the oven", "pizza"


def cross_attention(target: Array, source: Array, layer: Layer) -> Activations:
    """Compute softmax(q k^T / √D) v with q from the target (T, C), and k and v from the source (S, C)."""
    C = target.shape[1]

    def split_heads(y: Array) -> Array:
        return y.reshape(len(y), layer.n_head, C // layer.n_head).swapaxes(0, 1)  # (N, C) -> (N, H, D) -> (H, N, D)

    q = split_heads(target @ layer.query)  # what each character of the translation looks for: (H, T, D)
    k = split_heads(source @ layer.key)  # what each character of the source can be found by: (H, S, D)
    v = split_heads(source @ layer.value)  # what each character of the source passes on: (H, S, D)
    scores = dot_product(q, k)  # (H, T, D) @ (H, D, S) -> (H, T, S)
    weights = softmax(scores)  # (H, T, S), each row sums to 1
    mixed = weights @ v  # (H, T, S) @ (H, S, D) -> (H, T, D)
    out = mixed.swapaxes(0, 1).reshape(target.shape) @ layer.out  # (H, T, D) -> (T, C), @ (C, C) -> (T, C)
    return Activations(q, k, v, scores, weights, mixed, out)


def embed(text: str, embedding: Array, vocabulary: list[str]) -> Array:
    """Return the embeddings and positions (N, C) of a text of N characters."""
    ids = [vocabulary.index(character) for character in text]  # (N)
    return np.asarray(embedding[ids] + sinusoidal_positions(len(text), embedding.shape[1]))


def print_lesson(source: str, translation: str, t: int, options: argparse.Namespace) -> None:
    """Print the shape of every array, then which characters of the source position t of the translation attends to."""
    C, H, rng = options.channels, options.heads, np.random.default_rng(options.seed)
    vocabulary = sorted({*source, *translation})
    embedding = rng.standard_normal((len(vocabulary), C))  # (V, C); the sentences share it
    x_source, x_target = (embed(text, embedding, vocabulary) for text in (source, translation))  # (S, C), (T, C)
    query, key, value, out = rng.standard_normal((4, C, C)) / math.sqrt(C)  # (C, C) each
    activations = cross_attention(x_target, x_source, Layer(query, key, value, out, H))

    print(f"S = {len(source)} characters of the source, T = {len(translation)} of the translation, ", end="")
    print(f"C = {C} channels, H = {H} heads, D = C / H = {C // H}\n")
    print_shapes([
        ("source", "S C", x_source),
        ("translation", "T C", x_target),
        ("q = translation times a matrix", "H T D", activations.q),
        ("k, v = source times one matrix each", "H S D", activations.k),
        ("scores = q k^T / sqrt(D)", "H T S", activations.scores),
        ("weights = softmax(scores)", "H T S", activations.weights),
        ("mixed = weights v", "H T D", activations.mixed),
        ("out = joined heads times a matrix", "T C", activations.out),
    ])  # fmt: skip
    print(
        f"\nAttention weights of {translation[t]!r} at position {t} (^) of the translation, in the first of {H} heads:"
    )
    print(f"  {translation}\n  {' ' * t}^\n{format_weights(source, activations.weights[0, t])}")


def main() -> None:
    """Read and check the command line, then print the lesson."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default=SOURCE)
    parser.add_argument("translation", nargs="?", default=TRANSLATION)
    parser.add_argument("word", nargs="?", help="of the translation; shows the weights of its last letter")
    add_options(parser)
    options = parser.parse_args()
    source, translation = options.source, options.translation
    check_options(options, source, translation)
    t = last_letter(options.word or (WORD if translation == TRANSLATION else translation), translation)
    print_lesson(source, translation, t, options)


if __name__ == "__main__":
    with exit_on_error():
        main()
