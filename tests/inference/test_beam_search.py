"""Beam search, against what can be worked out by hand."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import MODERN, decoder_of, tiny_model
from glyphgpt.inference.beam_search import beam_search, log_softmax
from glyphgpt.inference.generate import Floats, Ids, LanguageModel
from glyphgpt.runtime import TorchLM, init_runtime

END = 0


class Chain:
    """A model whose next token depends on the last one only, by a table of log-probabilities (V, V)."""

    def __init__(self, table: Floats) -> None:
        self.table = table

    class Cache:
        """Checks that rows move with their ways: remembers the tokens that each row has seen."""

        def __init__(self, batch: int) -> None:
            self.seen = np.empty((batch, 0), np.int64)

        def reorder(self, rows: list[int]) -> None:
            self.seen = self.seen[rows]

    def new_cache(self, batch: int) -> Any:
        return self.Cache(batch)

    def next_logits(self, tokens: Ids, cache: Any) -> Floats:
        cache.seen = np.concatenate((cache.seen, tokens), axis=1)
        return self.table[cache.seen[:, -1]]


def chain(*rows: list[float]) -> Chain:
    with np.errstate(divide="ignore"):
        return Chain(np.log(np.array(rows)))


def ways(model: Any, *prompts: list[int], beam: int, most: int = 10) -> list[list[int]]:
    found = beam_search(model, np.array(prompts), end=END, beam=beam, max_new_tokens=most)
    return [way.tolist() for way in found]


# From 1, the likeliest token is 2, after which nothing is likely; 3 is less likely, and then the end is certain.
GARDEN_PATH = chain([1, 0, 0, 0], [0, 0, 0.6, 0.4], [0.3, 0.35, 0.35, 0], [1, 0, 0, 0])


def test_greedy_takes_the_likeliest_token_and_a_beam_looks_further() -> None:
    assert ways(GARDEN_PATH, [1], beam=1, most=3) == [[2, 1, 2]]
    assert ways(GARDEN_PATH, [1], beam=2) == [[3]]


def test_what_is_not_ended_is_cut() -> None:
    endless = chain([1, 0], [0, 1])
    assert ways(endless, [1], beam=1, most=5) == [[1] * 5]
    assert ways(endless, [1], beam=1, most=0) == [[]]


def test_an_end_at_once_leaves_nothing() -> None:
    assert ways(chain([1, 0], [1, 0]), [1], beam=2) == [[]]


def tables(size: int = 4) -> st.SearchStrategy[Floats]:
    numbers = st.lists(st.integers(-5, 5), min_size=size * size, max_size=size * size)  # whose ties are exact
    return numbers.map(lambda values: np.array(values, float).reshape(size, size))


def score(table: Floats, prompt: list[int], way: list[int]) -> float:
    """Mean log-probability per token of a way with its end."""
    path = [prompt[-1], *way, END]
    chances = log_softmax(table)
    return float(np.mean([chances[one, other] for one, other in pairwise(path)]))


@given(tables(), st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(1, 6))
def test_prompts_do_not_disturb_each_other(table: Floats, firsts: list[int], beam: int) -> None:
    together = ways(Chain(table), *([first] for first in firsts), beam=beam)
    assert together == [ways(Chain(table), [first], beam=beam)[0] for first in firsts]


@given(tables(), st.integers(0, 3))
def test_a_beam_of_all_ways_finds_the_best_of_them(table: Floats, first: int) -> None:
    [found] = ways(Chain(table), [first], beam=64, most=3)
    two = [[one, other] for one in (1, 2, 3) for other in (1, 2, 3)]
    ended = [way for way in [[], [1], [2], [3], *two] if way == found]
    if ended:  # no way of the same length or shorter that ended would have been better
        best = max(score(table, [first], way) for way in [[], [1], [2], [3], *two] if len(way) <= len(found))
        assert score(table, [first], found) >= best - 1e-9


@given(tables(), st.integers(0, 3))
def test_a_beam_of_one_is_greedy(table: Floats, first: int) -> None:
    greedy: list[int] = []
    while len(greedy) < 10 and (token := int(table[([first, *greedy])[-1]].argmax())) != END:
        greedy.append(token)
    assert ways(Chain(table), [first], beam=1) == [greedy]


def by_hand(model: LanguageModel, prompt: list[int], beam: int, most: int) -> list[int]:
    """Search with the whole text read anew for every way, so that no cache can be mixed up."""
    kept: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(most):
        longer = []
        for way, total in kept:
            if way[-1:] == [END]:
                longer.append((way, total))
                continue
            chances = log_softmax(model.next_logits(np.array([prompt + way]), model.new_cache(1)))[0]
            longer += [([*way, token], total + float(chance)) for token, chance in enumerate(chances)]
        kept = sorted(longer, key=lambda found: -found[1] / len(found[0]))[:beam]
        if kept[0][0][-1] == END:
            break
    best = kept[0][0]
    return best[:-1] if best[-1:] == [END] else best


def test_caches_follow_their_ways() -> None:
    model = tiny_model(tie_embeddings=False)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    prompts = [[first, second] for first in range(11) for second in range(11)]
    decoder = decoder_of(model)
    assert ways(decoder, *prompts, beam=4, most=6) == [by_hand(decoder, prompt, 4, 6) for prompt in prompts]


def test_decoder_and_torch_find_the_same_ways() -> None:
    for form in ({"tie_embeddings": False}, MODERN):
        model = tiny_model(**form)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 1, 5]]
        with init_runtime("cpu", "float32") as runtime:
            by_torch = ways(TorchLM(model, runtime), *prompts, beam=3, most=5)
        assert ways(decoder_of(model), *prompts, beam=3, most=5) == by_torch
        assert len({tuple(way) for way in by_torch}) > 1
