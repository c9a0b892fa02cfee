"""Beam search, compared with slow exhaustive and uncached searches."""

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import MODERN, decoder_of, random_model
from glyphgpt.inference.beam_search import beam_search
from glyphgpt.inference.generate import Floats, Ids, LanguageModel, log_softmax
from glyphgpt.inference.torch_lm import TorchLM
from glyphgpt.runtime import init_runtime

END = 0


class Chain:
    """A language model whose next token depends only on the previous one, by a table of log-probabilities (V, V)."""

    def __init__(self, table: Floats) -> None:
        self.table = table

    class Cache:
        """The tokens of each row so far, so that wrongly ordered rows change the result."""

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


def search(model: Any, *prompts: list[int], beam: int, max_new_tokens: int = 10) -> list[list[int]]:
    hypotheses = beam_search(model, np.array(prompts), end=END, beam=beam, max_new_tokens=max_new_tokens)
    return [hypothesis.tolist() for hypothesis in hypotheses]


# After 1, token 2 is the most probable, but after 2 no token is probable. After 3, which is less probable, the end is
# certain.
GARDEN_PATH = chain([1, 0, 0, 0], [0, 0, 0.6, 0.4], [0.3, 0.35, 0.35, 0], [1, 0, 0, 0])


def test_beam_finds_a_better_hypothesis_than_greedy_decoding() -> None:
    assert search(GARDEN_PATH, [1], beam=1, max_new_tokens=3) == [[2, 1, 2]]
    assert search(GARDEN_PATH, [1], beam=2) == [[3]]


def test_max_new_tokens_limits_the_length() -> None:
    endless = chain([1, 0], [0, 1])
    assert search(endless, [1], beam=1, max_new_tokens=5) == [[1] * 5]
    assert search(endless, [1], beam=1, max_new_tokens=0) == [[]]


def test_immediate_end_gives_an_empty_result() -> None:
    assert search(chain([1, 0], [1, 0]), [1], beam=2) == [[]]


def tables(size: int = 4) -> st.SearchStrategy[Floats]:
    numbers = st.lists(
        st.integers(-5, 5), min_size=size * size, max_size=size * size
    )  # small integers, so that ties are exact
    return numbers.map(lambda values: np.array(values, float).reshape(size, size))


def score(table: Floats, prompt: list[int], hypothesis: list[int]) -> float:
    """Return the mean log-probability per token of a hypothesis that ends."""
    log_probs = log_softmax(table)
    return float(np.mean([log_probs[pair] for pair in pairwise([prompt[-1], *hypothesis, END])]))


@given(tables(), st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(1, 6))
def test_prompts_of_a_batch_are_independent(table: Floats, tokens: list[int], beam: int) -> None:
    batch = search(Chain(table), *([token] for token in tokens), beam=beam)
    assert batch == [search(Chain(table), [token], beam=beam)[0] for token in tokens]


@given(tables(), st.integers(0, 3))
def test_wide_beam_finds_the_best_hypothesis(table: Floats, first: int) -> None:
    [result] = search(Chain(table), [first], beam=64, max_new_tokens=3)
    finished = [list(tokens) for length in range(3) for tokens in product((1, 2, 3), repeat=length)]
    if result in finished:  # then no finished hypothesis of this length or shorter is better
        best = max(score(table, [first], other) for other in finished if len(other) <= len(result))
        assert score(table, [first], result) >= best - 1e-9


@given(tables(), st.integers(0, 3))
def test_beam_of_one_is_greedy_decoding(table: Floats, first: int) -> None:
    greedy: list[int] = []
    while len(greedy) < 10 and (token := int(table[([first, *greedy])[-1]].argmax())) != END:
        greedy.append(token)
    assert search(Chain(table), [first], beam=1) == [greedy]


def uncached_search(model: LanguageModel, prompt: list[int], beam: int, max_new_tokens: int) -> list[int]:
    """Search as `beam_search` does, but process the whole text again for every hypothesis instead of using a cache."""
    hypotheses: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(max_new_tokens):
        longer = []
        for tokens, total in hypotheses:
            if tokens[-1:] == [END]:
                longer.append((tokens, total))
                continue
            log_probs = log_softmax(model.next_logits(np.array([prompt + tokens]), model.new_cache(1)))[0]
            longer += [([*tokens, token], total + float(log_prob)) for token, log_prob in enumerate(log_probs)]
        hypotheses = sorted(longer, key=lambda hypothesis: -hypothesis[1] / len(hypothesis[0]))[:beam]
        if hypotheses[0][0][-1] == END:
            break
    best = hypotheses[0][0]
    return best[:-1] if best[-1:] == [END] else best


def test_cache_rows_follow_their_hypotheses() -> None:
    model = decoder_of(random_model(std=0.5, tie_embeddings=False))
    prompts = [[first, second] for first in range(11) for second in range(11)]
    expected = [uncached_search(model, prompt, 4, 6) for prompt in prompts]
    assert search(model, *prompts, beam=4, max_new_tokens=6) == expected


@pytest.mark.parametrize("network", [{"tie_embeddings": False}, MODERN], ids=["gpt2", "modern"])
def test_numpy_and_torch_models_find_the_same_hypotheses(network: dict[str, Any]) -> None:
    model = random_model(**network)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 1, 5]]
    with init_runtime("cpu", "float32") as runtime:
        by_torch = search(TorchLM(model, runtime), *prompts, beam=3, max_new_tokens=5)
    assert search(decoder_of(model), *prompts, beam=3, max_new_tokens=5) == by_torch
    assert len(set(map(tuple, by_torch))) > 1
