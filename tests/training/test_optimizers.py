"""Parameter groups, AdamW, Muon and gradient clipping."""

import pytest
import torch
from torch import nn

from conftest import MODERN, tiny_model
from glyphgpt.settings import Optimization
from glyphgpt.training.optimizers import Muon, clip_gradients, make_optimizers, orthogonalize, set_learning_rate
from glyphgpt.training.torch_state import model_arrays, optimizer_arrays

NEVER = torch.tensor(False)


def test_only_matrices_decay_and_every_parameter_has_one_group() -> None:
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


def test_frozen_parameters_have_no_group() -> None:
    model = tiny_model()
    model.token_embedding.weight.requires_grad_(False)
    (optimizer,) = make_optimizers(model, Optimization())
    updated = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert id(model.token_embedding.weight) not in updated
    assert len(updated) == len(list(model.parameters())) - 1


def test_adamw_updates_equal_the_formulas() -> None:
    settings = Optimization(weight_decay=0.2, beta1=0.8, beta2=0.95, learning_rate=0.5)
    model = nn.Linear(3, 2).double()
    (optimizer,) = make_optimizers(model, settings)
    set_learning_rate([optimizer], 0.03)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mean = {name: torch.zeros_like(value) for name, value in expected.items()}
    square = {name: torch.zeros_like(value) for name, value in expected.items()}
    for t in (1, 2, 3):
        for name, parameter in model.named_parameters():
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient
            mean[name] = 0.8 * mean[name] + 0.2 * gradient
            square[name] = 0.95 * square[name] + 0.05 * gradient**2
            decay = 0.2 if name == "weight" else 0.0
            step = (mean[name] / (1 - 0.8**t)) / ((square[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            expected[name] = expected[name] - 0.03 * (step + decay * expected[name])
        optimizer.step(skip=NEVER)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-13, rtol=0)


def test_set_learning_rate_scales_the_rate_of_ngram_tables() -> None:
    model = tiny_model(n_layer=1, ngram=3)
    optimizers = make_optimizers(model, Optimization(optimizer="muon"))
    set_learning_rate(optimizers, 0.7)
    tables = {id(p) for p in model.ngram_embedding.parameters()}  # type: ignore[union-attr]
    rates = {
        id(p): group["lr"] for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    assert rates == {id(p): 2.8 if id(p) in tables else 0.7 for p in model.parameters()}


def test_muon_updates_the_matrices_of_the_blocks() -> None:
    model = tiny_model(n_layer=1, ngram=3, tie_embeddings=False)
    adamw, muon = make_optimizers(model, Optimization(optimizer="muon"))
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    updated = [
        [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]] for optimizer in (adamw, muon)
    ]
    assert sorted(updated[0] + updated[1]) == sorted(name_of.values())
    assert updated[1] == [
        f"blocks.0.{part}.weight" for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    ]


def test_muon_updates_equal_those_of_torch() -> None:
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 8), (8, 32), (24, 8), (32, 8)]
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = [matrix.detach().clone().requires_grad_() for matrix in ours]
    optimizer = Muon([{"params": ours, "weight_decay": 0.2, "lr": 0.1}], momentum=0.9)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step(skip=NEVER)
        reference.step()  # type: ignore[no-untyped-call]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=3e-3, rtol=0)  # torch computes in bfloat16
        assert (one - other).norm() < 0.01 * one.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40)], ids=str)
def test_orthogonalize_keeps_singular_vectors_and_moves_values_near_one(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ orthogonalize(matrices, dtype) @ vt.mT  # diagonal if the singular vectors are kept
    values = rotated.diagonal(dim1=-2, dim2=-1)
    assert (rotated - torch.diag_embed(values)).abs().max() < tolerance
    large = s > 0.05 * s.norm(dim=-1, keepdim=True)  # five iterations are too few for the smallest
    assert values[large].min() > 0.6
    assert values.max() < 1.3


def test_skipped_updates_change_nothing() -> None:
    model = tiny_model(**MODERN)
    optimizers = make_optimizers(model, Optimization(optimizer="muon", weight_decay=0.1))
    set_learning_rate(optimizers, 0.1)

    def update(gradient: float, *, skip: bool) -> dict[str, torch.Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        for optimizer in optimizers:
            optimizer.step(skip=torch.tensor(skip))
        arrays = optimizer_arrays(model, optimizers, keep=True) | model_arrays(model)
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    before, after = update(1.0, skip=False), update(float("nan"), skip=True)
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert torch.equal(values, after[name]), name
    assert not torch.equal(update(1.0, skip=False)["token_embedding.weight"], before["token_embedding.weight"])


@pytest.mark.parametrize(("limit", "after"), [(0.0, 13.0), (20.0, 13.0), (13.0, 13.0), (2.0, 2.0)])
def test_clipping_returns_the_norm_before_and_never_raises_it(limit: float, after: float) -> None:
    model = nn.Linear(2, 1)
    gradients = [torch.tensor([[3.0, 4.0]]), torch.tensor([12.0])]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    assert clip_gradients(list(model.parameters()), limit) == pytest.approx(13)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient * (after / 13))


def test_clipping_with_limit_0_changes_nothing() -> None:
    model = nn.Linear(50, 50)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e6
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    clip_gradients(list(model.parameters()), 0.0)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True) if p.grad is not None)
