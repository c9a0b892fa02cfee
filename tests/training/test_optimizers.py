"""Learning rates, parameter groups, AdamW and clipping."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import tiny_model
from glyphgpt.settings import Optimization
from glyphgpt.training.optimizers import Muon, clip_gradients, make_optimizers, orthogonalize, set_learning_rate
from glyphgpt.training.schedule import learning_rate

SCHEDULES = ["cosine", "linear", "constant"]


def schedule(kind: str, **changes: float) -> Optimization:
    form = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_steps": 10, "max_steps": 110}
    return Optimization.model_validate({"schedule": kind, **form, **changes})


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_rate_rises_in_a_line(kind: str) -> None:
    rates = [learning_rate(step, schedule(kind)) for step in range(11)]
    assert rates == pytest.approx([(step + 1) / 11 for step in range(11)])


@pytest.mark.parametrize(
    ("kind", "quarter", "half", "last", "end"),
    [
        ("cosine", 0.1 + 0.45 * (1 + math.sqrt(0.5)), 0.55, 0.1 + 0.45 * (1 - math.cos(math.pi / 100)), 0.1),
        ("linear", 0.775, 0.55, 0.109, 0.1),
        ("constant", 1, 1, 1, 1),
    ],
)
def test_the_rate_falls_as_the_schedule_says(kind: str, quarter: float, half: float, last: float, end: float) -> None:
    rates = [learning_rate(step, schedule(kind)) for step in (10, 35, 60, 109, 110, 10**6)]
    assert rates == pytest.approx([1, quarter, half, last, end, end])


@pytest.mark.parametrize("kind", SCHEDULES)
def test_without_warm_up_the_first_rate_is_the_highest(kind: str) -> None:
    assert learning_rate(0, schedule(kind, warmup_steps=0)) == 1


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("max_steps", [0, 3, 10])
def test_a_warm_up_longer_than_the_run_only_rises(kind: str, max_steps: int) -> None:
    rates = [learning_rate(step, schedule(kind, max_steps=max_steps)) for step in range(11)]
    assert rates == pytest.approx([(step + 1) / 11 for step in range(11)])
    after = learning_rate(50, schedule(kind, max_steps=max_steps))
    assert after == pytest.approx(1 if kind == "constant" else 0.1)


@given(
    kind=st.sampled_from(SCHEDULES),
    warmup_steps=st.integers(0, 50),
    max_steps=st.integers(0, 200),
    peak=st.floats(1e-6, 10),
    share=st.floats(0, 1),
    step=st.integers(0, 300),
)
@settings(deadline=None, max_examples=200)
def test_rates_rise_then_fall_within_bounds(
    *, kind: str, warmup_steps: int, max_steps: int, peak: float, share: float, step: int
) -> None:
    low = peak * share
    form = schedule(kind, warmup_steps=warmup_steps, max_steps=max_steps, learning_rate=peak, min_lr=low)
    here, after = learning_rate(step, form), learning_rate(step + 1, form)
    slack = 1e-12 * peak
    assert 0 <= here <= peak + slack
    if step < warmup_steps:
        assert here < after
    else:
        assert low - slack <= after <= here + slack


def test_only_matrices_decay_and_every_parameter_is_updated_once() -> None:
    model = tiny_model(n_layer=1, tie_embeddings=False, ngram=2)
    (optimizer,) = make_optimizers(model, Optimization(weight_decay=0.3, ngram_weight_decay=0.7))
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: dict[float, list[str]] = {0.3: [], 0.7: [], 0.0: []}
    for group in optimizer.param_groups:
        groups[group["weight_decay"]] += [name_of[id(p)] for p in group["params"]]
    assert sorted(groups[0.3] + groups[0.7] + groups[0.0]) == sorted(name_of.values())
    assert groups[0.7] == ["ngram_embedding.tables.0.weight"]
    assert set(groups[0.3]) == {
        "token_embedding.weight",
        "position.embedding.weight",
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.out.weight",
        "blocks.0.mlp.up.weight",
        "blocks.0.mlp.down.weight",
        "head.weight",
    }


def test_frozen_parameters_are_left_out() -> None:
    model = tiny_model()
    model.token_embedding.weight.requires_grad_(False)
    (optimizer,) = make_optimizers(model, Optimization())
    taken = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert id(model.token_embedding.weight) not in taken
    assert len(taken) == len(list(model.parameters())) - 1


def test_updates_are_adamw_as_published() -> None:
    settings = Optimization(weight_decay=0.2, beta1=0.8, beta2=0.95, learning_rate=0.5)
    model = nn.Linear(3, 2).double()
    (optimizer,) = make_optimizers(model, settings)
    set_learning_rate([optimizer], 0.03)
    wanted = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mean = {name: torch.zeros_like(value) for name, value in wanted.items()}
    square = {name: torch.zeros_like(value) for name, value in wanted.items()}
    for t in (1, 2, 3):
        for name, parameter in model.named_parameters():
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient
            mean[name] = 0.8 * mean[name] + 0.2 * gradient
            square[name] = 0.95 * square[name] + 0.05 * gradient**2
            decay = 0.2 if name == "weight" else 0.0
            step = (mean[name] / (1 - 0.8**t)) / ((square[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            wanted[name] = wanted[name] - 0.03 * (step + decay * wanted[name])
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], atol=1e-13, rtol=0)


def test_the_rate_is_set_everywhere_and_tables_learn_faster() -> None:
    model = tiny_model(n_layer=1, ngram=3)
    optimizers = make_optimizers(model, Optimization(optimizer="muon"))
    set_learning_rate(optimizers, 0.7)
    tables = {id(p) for p in model.ngram_embedding.parameters()}  # type: ignore[union-attr]
    rates = {
        id(p): group["lr"] for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    assert rates == {id(p): 2.8 if id(p) in tables else 0.7 for p in model.parameters()}


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    model = tiny_model(n_layer=1, ngram=3, tie_embeddings=False)
    adamw, muon = make_optimizers(model, Optimization(optimizer="muon"))
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = [
        [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]] for optimizer in (adamw, muon)
    ]
    assert sorted(taken[0] + taken[1]) == sorted(name_of.values())
    assert taken[1] == [f"blocks.0.{part}.weight" for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")]


def test_muon_updates_as_that_of_torch() -> None:
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 8), (8, 32), (24, 8), (8, 32)]
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = [matrix.detach().clone().requires_grad_() for matrix in ours]
    optimizers: list[Muon | torch.optim.Muon] = [
        Muon([{"params": ours, "weight_decay": 0.2, "lr": 0.1}], momentum=0.9),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=3e-3, rtol=0)  # both are rounded to bfloat16 on the way
        assert (one - other).norm() < 0.01 * one.norm()


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 8), (1, 8, 40)], ids=str)
def test_orthogonal_keeps_singular_vectors_and_brings_values_near_one(
    shape: tuple[int, ...], dtype: torch.dtype, slack: float
) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    seen = u.mT @ orthogonalize(matrices, dtype) @ vt.mT  # diagonal, if the singular vectors are kept
    values = seen.diagonal(dim1=-2, dim2=-1)
    assert (seen - torch.diag_embed(values)).abs().max() < slack
    large = s > 0.05 * s.norm(dim=-1, keepdim=True)  # five iterations do not lift the smallest all the way
    assert values[large].min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize(("limit", "after"), [(0.0, 13.0), (20.0, 13.0), (13.0, 13.0), (2.0, 2.0)])
def test_clipping_tells_the_norm_before_and_never_raises_it(limit: float, after: float) -> None:
    model = nn.Linear(2, 1)
    gradients = [torch.tensor([[3.0, 4.0]]), torch.tensor([12.0])]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    assert clip_gradients(list(model.parameters()), limit) == pytest.approx(13)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient * (after / 13))


def test_a_limit_of_0_leaves_gradients_bit_for_bit() -> None:
    model = nn.Linear(50, 50)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e6
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    clip_gradients(list(model.parameters()), 0.0)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True) if p.grad is not None)
