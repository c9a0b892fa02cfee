"""cross_attention.py computes what torch computes, and equals self-attention when both sentences are the same."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attention as lesson
import cross_attention
from conftest import script

RNG = np.random.default_rng(0)
S, T, C, H = 5, 7, 12, 3
QUERY, KEY, VALUE, OUT = RNG.standard_normal((4, C, C))
LAYER = lesson.Layer(QUERY, KEY, VALUE, OUT, H)


def test_the_output_is_that_of_torch() -> None:
    target, source = RNG.standard_normal((T, C)), RNG.standard_normal((S, C))
    found = cross_attention.cross_attention(target, source, LAYER)
    shapes = {name: array.shape for name, array in found._asdict().items()}
    D = C // H
    assert shapes == {
        "q": (H, T, D), "k": (H, S, D), "v": (H, S, D), "scores": (H, T, S), "weights": (H, T, S), "mixed": (H, T, D),
        "out": (T, C),
    }  # fmt: skip
    np.testing.assert_allclose(found.weights.sum(-1), 1)
    matrices = (torch.tensor(matrix.T) for matrix in (QUERY, KEY, VALUE))
    x = torch.tensor(target), torch.tensor(source), torch.tensor(source)
    q, k, v = (F.linear(y, w).view(len(y), H, D).transpose(0, 1) for y, w in zip(x, matrices, strict=True))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(T, C) @ torch.tensor(OUT)
    np.testing.assert_allclose(found.out, expected.numpy())


def test_a_sentence_that_attends_to_itself_is_unmasked_self_attention() -> None:
    x = RNG.standard_normal((T, C))
    expected = lesson.attention(x, LAYER, mask=lesson.no_mask)
    for name, array in cross_attention.cross_attention(x, x, LAYER)._asdict().items():
        np.testing.assert_allclose(array, getattr(expected, name))


def test_the_lesson_prints_shapes_and_weights() -> None:
    finished = script("lessons/cross_attention.py", "die Katze", "the cat", "the", "--channels=6", "--heads=3")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert re.search(r"^scores .* H T S +3 x 7 x 9$", finished.stdout, re.MULTILINE)
    assert "Attention weights of 'e' at position 2 (^) of the translation" in finished.stdout
    assert "  die Katze\n" in finished.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["die Katze", "the cat", "dog"], "error: 'dog' is not in the sentence; choose a word that is\n"),
        (["die Katze", "x"], "error: the sentence has 1 characters; choose one of 2 to 100\n"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    finished = script("lessons/cross_attention.py", *words)
    assert (finished.returncode, finished.stdout, finished.stderr) == (2, "", message)
