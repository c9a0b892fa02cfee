"""The loss over a split equals that of a loop over its tokens."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import prepare_text, some_text, tiny_model
from glyphgpt.data.batches import Reader
from glyphgpt.data.dataset import Split, load_dataset
from glyphgpt.data.rows import evaluation_blocks
from glyphgpt.inference.score import Score
from glyphgpt.runtime import Runtime
from glyphgpt.settings import TrainSettings
from glyphgpt.training.evaluation import EVAL_COST, affordable_tokens, evaluate, sample_blocks, sample_tokens
from model import GPT

CPU = Runtime(torch.device("cpu"), torch.float32)


def confident_model() -> GPT:
    """Return a model whose predictions are far from uniform."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def split(tokens: int, characters: int | None = None, *, shards: int = 1) -> Split:
    ids = np.random.default_rng(0).integers(11, size=tokens).astype(np.uint8)
    return Split(tuple(np.array_split(ids, shards)), characters or tokens)


def score(model: GPT, text: Split, *, batch_size: int = 4, max_tokens: int = 0) -> Score:
    reader = Reader(text, CPU.device)
    return evaluate(model, reader, CPU, block_size=8, batch_size=batch_size, max_tokens=max_tokens)


def loss_by_token(model: GPT, ids: list[int]) -> float:
    """Return the mean loss of predicting token i + 1 from the tokens of its tile of 8 up to token i."""
    precise = GPT(model.config).double().eval()
    precise.load_state_dict(model.state_dict())
    losses = []
    for i in range(len(ids) - 1):
        logits = precise(torch.tensor([ids[i // 8 * 8 : i + 1]]))[0, -1].tolist()
        losses.append(math.log(sum(map(math.exp, logits))) - logits[ids[i + 1]])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("tokens", [2, 5, 8, 9, 10, 41, 44, 100])
def test_loss_equals_that_of_a_loop(tokens: int) -> None:
    model, text = confident_model(), split(tokens)
    result = score(model, text)
    expected = loss_by_token(model, text.slice(0, tokens).tolist())
    assert result.loss == pytest.approx(expected, abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12, 100])
def test_batch_size_does_not_change_the_loss(batch_size: int) -> None:
    model, text = confident_model(), split(100)
    assert score(model, text, batch_size=batch_size).loss == pytest.approx(
        score(model, text, batch_size=3).loss, abs=1e-6
    )


def test_score_is_deterministic_and_independent_of_shards() -> None:
    model, text = confident_model(), split(100)
    assert score(model, text) == score(model, text) == score(model, split(100, shards=7))


@pytest.mark.parametrize("is_records", [False, True])
@pytest.mark.parametrize(("max_tokens", "blocks"), [(1, 2), (8, 2), (24, 3), (57, 7), (79, 10)])
def test_a_sample_is_some_blocks_of_the_split(max_tokens: int, blocks: int, is_records: bool) -> None:
    model, text = confident_model(), split(100)
    if is_records:
        ids = text.slice(0, 100) % 10
        ids[[0, 5, 8, 10, 20, 29, 33, 40, 60, 70, 80, 99]] = 10
        text = Split((ids,), 100, end_of_record=10)
    starts, sizes = evaluation_blocks(text, 8)
    blocks = min(len(sizes), max(2, int(max_tokens / sizes.mean()))) if is_records else blocks
    result = score(model, text, max_tokens=max_tokens)
    chosen = sample_blocks(len(sizes), blocks)
    losses = np.array([
        loss_by_token(model, text.slice(start, start + size + 1).tolist()) * size
        for start, size in zip(starts[chosen], sizes[chosen], strict=True)
    ])  # fmt: skip
    chosen_sizes = sizes[chosen]
    mean = losses.sum() / chosen_sizes.sum()
    assert result.eval_tokens == chosen_sizes.sum()
    assert result.loss == pytest.approx(mean, abs=1e-5)
    error = np.sqrt(((losses - mean * chosen_sizes) ** 2).sum() / (blocks - 1) / blocks * (1 - blocks / len(sizes)))
    assert result.standard_error == pytest.approx(error / chosen_sizes.mean(), rel=1e-3)
    assert f"± {result.standard_error:.4f}" in str(result)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_each_record_is_evaluated_by_itself(batch_size: int) -> None:
    model = confident_model()
    records = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2], [3, 3, 3, 3]]
    ids = [10, *(token for record in records for token in [*record, 10])]
    text = Split((np.array(ids, np.uint8),), 15, end_of_record=10)
    total = sum(loss_by_token(model, [10, *record, 10]) * (len(record) + 1) for record in records)
    assert score(model, text, batch_size=batch_size).loss == pytest.approx(total / (len(ids) - 1), abs=1e-5)


@pytest.mark.parametrize("max_tokens", [0, 85, 95, 96, 1000])
def test_the_whole_split_has_no_standard_error(max_tokens: int) -> None:
    """It is also read where a sample would be more than 80% of it."""
    model, text = confident_model(), split(100)
    result = score(model, text, max_tokens=max_tokens)
    assert result == score(model, text)
    assert (result.standard_error, result.eval_tokens) == (0, 99)
    assert "±" not in str(result)


@given(blocks=st.integers(1, 10**6), data=st.data())
def test_sampled_blocks_are_distinct_and_always_the_same(blocks: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, min(blocks, 1000)))
    sample = sample_blocks(blocks, count)
    assert len(set(sample)) == count
    assert 0 <= sample.min() <= sample.max() < blocks
    assert (sample == sample_blocks(blocks, count)).all()


def test_samples_come_from_the_whole_split() -> None:
    counts = np.histogram(sample_blocks(10**6, 1000), bins=4, range=(0, 10**6))[0]
    assert counts.min() > 200


def test_a_sample_is_within_its_error_of_the_whole_split() -> None:
    model, text = confident_model(), split(20_000)
    whole, errors = score(model, text, batch_size=100).loss, []
    for max_tokens in range(800, 8000, 800):
        sample = score(model, text, batch_size=100, max_tokens=max_tokens)
        errors.append((sample.loss - whole) / sample.standard_error)
    assert 0.2 < np.std(errors) < 2


@pytest.mark.parametrize("eval_every", [10, 100, 10**6])
def test_automatic_evaluations_take_a_tenth_of_the_time_at_most(eval_every: int) -> None:
    settings = TrainSettings(batch_size=16, block_size=64, max_steps=1000, eval_every=eval_every)
    evaluations = max(1, 1000 // eval_every)
    sampled, final = sample_tokens(settings) * evaluations, affordable_tokens(settings, 1000)
    assert (sampled + final) * EVAL_COST <= 0.1 * 1000 * settings.tokens_per_step
    assert sample_tokens(settings.model_copy(update={"eval_tokens": 777})) == 777


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_restored(training: bool) -> None:
    model = tiny_model(dropout=0.5).train(training)
    assert score(model, split(50)).loss == score(tiny_model(), split(50)).loss
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("characters", "tokens"), [(100, 100), (400, 100), (100, 128)])
def test_bits_per_character_are_normalized_by_characters(characters: int, tokens: int) -> None:
    result = score(confident_model(), split(tokens, characters))
    assert result.bits_per_character == pytest.approx(result.loss / math.log(2) * tokens / characters)


def test_score_of_uniform_predictions() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.token_embedding.weight.zero_()
    result = score(model, split(100))
    assert result.loss == pytest.approx(math.log(11))
    assert result.bits_per_character == pytest.approx(math.log2(11))
    assert result.perplexity == pytest.approx(11)
    assert str(result) == "loss 2.3979, 3.459 bits per character, perplexity 11.00 (99 tokens)"


def test_huge_loss_has_infinite_perplexity() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.token_embedding.weight.mul_(1e6)
    result = score(model, split(30))
    assert result.loss > 700
    assert result.perplexity == math.inf


def test_datasets_count_characters_not_tokens(tmp_path: Path) -> None:
    text = some_text(500).replace("e", "é")
    dataset = load_dataset(prepare_text(text, tmp_path, tokenizer="byte"), tmp_path)
    model = tiny_model(vocab_size=256)
    result = score(model, dataset.val)
    characters, tokens = dataset.val.characters, dataset.val.tokens
    assert tokens > characters
    assert result.bits_per_character == pytest.approx(result.loss / math.log(2) * tokens / characters)


@pytest.mark.parametrize("world_size", [2, 3, 20])
@pytest.mark.parametrize("tokens", [5, 9, 20, 97, 100])
def test_processes_divide_the_tiles_and_call_the_model_equally_often(
    world_size: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = confident_model(), split(tokens)
    expected = score(model, text).loss
    totals, calls = [], [0] * world_size

    def record(_: Runtime, total: float, *others: float) -> list[float]:
        totals.append(total)
        return [total, *others]

    monkeypatch.setattr(Runtime, "sum", record)
    for rank in range(world_size):
        runtime = Runtime(torch.device("cpu"), torch.float32, rank, world_size)
        hook = model.register_forward_hook(lambda *_, rank=rank: calls.__setitem__(rank, calls[rank] + 1))
        evaluate(model, Reader(text, runtime.device), runtime, block_size=8, batch_size=1)
        hook.remove()
    assert sum(totals) / (tokens - 1) == pytest.approx(expected, abs=1e-6)
    assert len(set(calls)) == 1, "with a sharded model, every call waits for all processes"
