"""Weights and optimizer state between torch and checkpoints."""

import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import tiny_config, tiny_model
from glyphgpt.checkpoint import Arrays, Checkpoint, Metadata, TrainState, load_checkpoint, save_checkpoint
from glyphgpt.errors import UserError
from glyphgpt.files import LAST
from glyphgpt.training.optimizers import AdamW, Muon, Optimizer, set_learning_rate
from glyphgpt.training.torch_state import build_model, load_weights, model_arrays, optimizer_arrays, restore_optimizers
from model import GPT

METADATA = Metadata(
    model=asdict(tiny_config()), tokenizer={}, settings={}, data="", val_loss=None, state=TrainState(step=3), scaler={}
)
PATH = Path("run/last")
MISMATCH = r"^run/last: .*optimizer"


def train(model: GPT, optimizers: list[Optimizer], steps: range) -> None:
    for step in steps:
        tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(step))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        for optimizer in optimizers:
            optimizer.step(skip=torch.tensor(False))
        model.zero_grad()


def group(parameters: Iterable[nn.Parameter], weight_decay: float = 0.1) -> dict[str, Any]:
    return {"params": list(parameters), "weight_decay": weight_decay, "lr_scale": 1.0, "lr": 0.01}


def adamw(model: nn.Module) -> list[Optimizer]:
    return [AdamW([group(model.parameters())], (0.9, 0.99))]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [Muon([group(matrices)]), AdamW([group(vectors[:3], 0.0), group([]), group(vectors[3:])], (0.9, 0.99))]


def assert_same(arrays: Arrays, expected: Arrays) -> None:
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(arrays[name], array)


@pytest.mark.parametrize("make_optimizers", [adamw, muon_and_adamw])
def test_training_continues_bit_for_bit(
    tmp_path: Path, make_optimizers: Callable[[nn.Module], list[Optimizer]]
) -> None:
    uninterrupted = tiny_model(seed=1)
    train(uninterrupted, make_optimizers(uninterrupted), range(6))

    first = tiny_model(seed=1)
    optimizers = make_optimizers(first)
    train(first, optimizers, range(3))
    save_checkpoint(Checkpoint(METADATA, model_arrays(first), optimizer_arrays(first, optimizers)), tmp_path / LAST)

    second = tiny_model(seed=2)
    optimizers = make_optimizers(second)
    checkpoint = load_checkpoint(tmp_path / LAST)
    load_weights(second, checkpoint)
    restore_optimizers(second, optimizers, checkpoint)
    train(second, optimizers, range(3, 6))
    assert_same(model_arrays(second), model_arrays(uninterrupted))


def test_names_of_the_optimizer_state() -> None:
    model = tiny_model()
    (optimizer,) = adamw(model)
    assert optimizer_arrays(model, [optimizer]) == {}
    train(model, [optimizer], range(1))
    state = optimizer_arrays(model, [optimizer])
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert state.keys() == {f"AdamW.{name}.{key}" for name, _ in model.named_parameters() for key in keys}


def test_restoring_keeps_the_hyperparameters() -> None:
    model = tiny_model()
    saved = adamw(model)
    train(model, saved, range(1))
    checkpoint = Checkpoint(METADATA, model_arrays(model), optimizer_arrays(model, saved))
    optimizer = AdamW([group(model.parameters(), 0.25)], (0.5, 0.75))
    set_learning_rate([optimizer], 0.5)
    restore_optimizers(model, [optimizer], checkpoint)
    (restored,) = optimizer.param_groups
    assert (restored["lr"], restored["weight_decay"], optimizer.beta1, optimizer.beta2) == (0.5, 0.25, 0.5, 0.75)


def test_state_of_another_optimizer_is_rejected() -> None:
    model = tiny_model()
    optimizers = muon_and_adamw(model)
    train(model, optimizers, range(1))
    for state in (optimizer_arrays(model, optimizers), {}):
        with pytest.raises(UserError, match=MISMATCH):
            restore_optimizers(model, adamw(model), Checkpoint(METADATA, model_arrays(model), state, PATH))


@pytest.mark.parametrize("change", [lambda array: array.astype(np.float64), lambda array: array[None], np.int32])
def test_state_of_another_dtype_or_shape_is_rejected(change: Callable[[Any], Any]) -> None:
    model = tiny_model()
    optimizers = adamw(model)
    train(model, optimizers, range(1))
    state = optimizer_arrays(model, optimizers)
    name = next(name for name in state if name.endswith("exp_avg_sq"))
    state[name] = change(state[name])
    with pytest.raises(UserError, match=MISMATCH):
        restore_optimizers(model, adamw(model), Checkpoint(METADATA, model_arrays(model), state, PATH))


def test_gradient_scaler_continues_from_its_state(tmp_path: Path) -> None:
    first, second = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.amp.GradScaler("cpu")
    metadata = METADATA.model_copy(update={"scaler": first.state_dict()})
    save_checkpoint(Checkpoint(metadata, {}), tmp_path / LAST)
    second.load_state_dict(load_checkpoint(tmp_path / LAST).metadata.scaler)
    assert second.state_dict() == first.state_dict()

    model = nn.Linear(2, 1)
    (optimizer,) = adamw(model)
    second.scale(model(torch.ones(1, 2)).sum()).backward()
    second.unscale_(optimizer)  # type: ignore[arg-type]
    second.update()
    assert second.state_dict()["_growth_tracker"] == 1


def test_build_model_needs_only_the_checkpoint(tmp_path: Path) -> None:
    model = tiny_model(seed=5)
    save_checkpoint(Checkpoint(METADATA, model_arrays(model)), tmp_path / LAST)
    built = build_model(load_checkpoint(tmp_path / LAST))
    assert built.config == model.config
    assert_same(model_arrays(built), model_arrays(model))


@pytest.mark.parametrize(
    "change", [{"n_layer": 10**6}, {"ngram": 10**6}, {"block_size": 131_072, "position": "rotary"}], ids=str
)
def test_config_larger_than_the_weights_is_rejected_in_little_memory(change: dict[str, Any]) -> None:
    metadata = METADATA.model_copy(update={"model": {**METADATA.model, **change}})
    checkpoint = Checkpoint(metadata, model_arrays(tiny_model()), path=PATH)
    tracemalloc.start()
    with pytest.raises(UserError):
        build_model(checkpoint)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6  # bytes
