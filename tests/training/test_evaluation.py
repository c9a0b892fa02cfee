"""The loss over a split, against a loop over its tokens."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import prepare_text, some_text, tiny_model
from glyphgpt.data.batches import Windows
from glyphgpt.data.dataset import Split, load_dataset
from glyphgpt.runtime import Runtime
from glyphgpt.training.evaluation import Score, evaluate
from model import GPT

CPU = Runtime(torch.device("cpu"), torch.float32)


def opinionated(seed: int = 0) -> GPT:
    model = tiny_model(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def split(tokens: int, characters: int | None = None, *, shards: int = 1) -> Split:
    ids = np.random.default_rng(0).integers(11, size=tokens).astype(np.uint8)
    return Split(tuple(np.array_split(ids, shards)), characters or tokens)


def score(model: GPT, text: Split, *, batch_size: int = 4, max_tokens: int = 0) -> Score:
    windows = Windows(text, CPU.device)
    return evaluate(model, windows, CPU, block_size=8, batch_size=batch_size, max_tokens=max_tokens)


def by_token(model: GPT, ids: list[int]) -> float:
    """Mean loss: token i + 1 from those of its tile, 8 i // 8, up to i."""
    precise = GPT(model.config).double().eval()
    precise.load_state_dict(model.state_dict())
    losses = []
    for i in range(len(ids) - 1):
        logits = precise(torch.tensor([ids[i // 8 * 8 : i + 1]]))[0, -1].tolist()
        losses.append(math.log(sum(map(math.exp, logits))) - logits[ids[i + 1]])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("tokens", [2, 5, 8, 9, 10, 41, 44, 100])
def test_the_loss_is_that_of_a_loop(tokens: int) -> None:
    model, text = opinionated(), split(tokens)
    seen = score(model, text)
    wanted = by_token(model, text.slice(0, tokens).tolist())
    assert seen.loss == pytest.approx(wanted, abs=1e-5)
    assert seen.perplexity == pytest.approx(math.exp(wanted), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12, 100])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    model, text = opinionated(), split(100)
    assert score(model, text, batch_size=batch_size).loss == pytest.approx(
        score(model, text, batch_size=3).loss, abs=1e-6
    )


def test_the_number_is_the_same_every_time() -> None:
    model, text = opinionated(), split(100)
    assert score(model, text) == score(model, text) == score(model, split(100, shards=7))


@pytest.mark.parametrize("max_tokens", [2, 8, 9, 40, 57])
def test_max_tokens_takes_the_start(max_tokens: int) -> None:
    model, text = opinionated(), split(100)
    seen = score(model, text, max_tokens=max_tokens)
    assert seen.loss == pytest.approx(by_token(model, text.slice(0, max_tokens).tolist()), abs=1e-5)


def test_max_tokens_beyond_the_end_takes_all() -> None:
    model, text = opinionated(), split(100)
    assert score(model, text, max_tokens=1000) == score(model, text)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(training: bool) -> None:
    model = tiny_model(dropout=0.5).train(training)
    assert score(model, split(50)).loss == score(tiny_model(), split(50)).loss
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("characters", "tokens"), [(100, 100), (400, 100), (100, 128)])
def test_bits_per_character_count_characters(characters: int, tokens: int) -> None:
    seen = score(opinionated(), split(tokens, characters))
    assert seen.bits_per_character == pytest.approx(seen.loss / math.log(2) * tokens / characters)


def test_an_undecided_model_needs_log2_of_the_vocabulary() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.token_embedding.weight.zero_()
    seen = score(model, split(100))
    assert seen.loss == pytest.approx(math.log(11))
    assert seen.bits_per_character == pytest.approx(math.log2(11))
    assert seen.perplexity == pytest.approx(11)
    assert str(seen) == "loss 2.3979, 3.459 bits per character, perplexity 11.00"


def test_a_hopeless_loss_has_no_finite_perplexity() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.token_embedding.weight.mul_(1e6)
    seen = score(model, split(30))
    assert seen.loss > 700
    assert seen.perplexity == math.inf


def test_prepared_text_counts_its_own_characters(tmp_path: Path) -> None:
    text = some_text(500).replace("e", "é")
    dataset = load_dataset(prepare_text(text, tmp_path, tokenizer="byte"), tmp_path)
    model = tiny_model(vocab_size=256)
    seen = score(model, dataset.val)
    characters, tokens = dataset.val.characters, dataset.val.tokens
    assert tokens > characters
    assert seen.bits_per_character == pytest.approx(seen.loss / math.log(2) * tokens / characters)


@pytest.mark.parametrize("world_size", [2, 3, 20])
@pytest.mark.parametrize("tokens", [5, 9, 20, 97, 100])
def test_processes_share_the_tiles_and_call_the_model_equally_often(
    world_size: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = opinionated(), split(tokens)
    expected = score(model, text).loss
    totals, calls = [], [0] * world_size

    def keep(_: Runtime, total: float) -> list[float]:
        totals.append(total)
        return [total]

    monkeypatch.setattr(Runtime, "sum", keep)
    for rank in range(world_size):
        runtime = Runtime(torch.device("cpu"), torch.float32, rank, world_size)
        hook = model.register_forward_hook(lambda *_, rank=rank: calls.__setitem__(rank, calls[rank] + 1))
        evaluate(model, Windows(text, runtime.device), runtime, block_size=8, batch_size=1)
        hook.remove()
    assert sum(totals) / (tokens - 1) == pytest.approx(expected, abs=1e-6)
    assert len(set(calls)) == 1, "a sharded model waits in each call for all the others"
