"""The network, compared with Hugging Face's GPT-2 and with formulas in plain Python; causality, cache and training."""

import cmath
import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import MODERN, NETWORKS, random_model, randomize, tiny_config, tiny_model
from model import GPT, CausalSelfAttention, Rotary, SinusoidalPosition

POSITIONS = ["learned", "sinusoidal", "rotary"]


def some_tokens(batch: int, length: int, vocab_size: int = 11, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_logits_equal_those_of_hugging_face_gpt2(length: int) -> None:
    transformers = pytest.importorskip("transformers")
    model = random_model()
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    theirs = transformers.GPT2LMHeadModel(config).eval()

    pairs: list[tuple[str, nn.Module]] = [
        ("wte", model.token_embedding),
        ("wpe", model.position.get_submodule("embedding")),
        ("ln_f", model.norm),
    ]
    for i, block in enumerate(model.blocks):
        pairs += [
            (f"h.{i}.{their}", block.get_submodule(our))
            for their, our in [
                ("ln_1", "attention_norm"),
                ("attn.c_attn", "attention.qkv"),
                ("attn.c_proj", "attention.out"),
                ("ln_2", "mlp_norm"),
                ("mlp.c_fc", "mlp.up"),
                ("mlp.c_proj", "mlp.down"),
            ]
        ]
    weights = {
        f"transformer.{their}.{name}": value.t() if isinstance(our, nn.Linear) else value
        for their, our in pairs
        for name, value in our.state_dict().items()
    }
    loaded = theirs.load_state_dict(weights, strict=False)
    assert not loaded.unexpected_keys and set(loaded.missing_keys) <= {"lm_head.weight"}

    tokens = some_tokens(3, length)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("network", [{"position": position} for position in POSITIONS] + [MODERN], ids=str)
def test_logits_depend_on_no_later_token(network: dict[str, Any]) -> None:
    model = random_model(**network)
    embeddings: list[Tensor] = []

    def detach(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    model.token_embedding.register_forward_hook(detach)
    logits = model(some_tokens(1, 8))
    for t in range(8):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embeddings[0], retain_graph=True)
        influence = gradient[0].abs().sum(-1)
        assert (influence[: t + 1] > 0).all()
        assert (influence[t + 1 :] == 0).all()


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize(
    ("network", "scale"),
    [({}, 4), ({"tie_embeddings": False}, 4), ({"ngram": 2}, 1), ({"tie_embeddings": False, "init": "zero"}, 1)],
)
def test_sinusoidal_positions_equal_the_formula(start: int, network: dict[str, Any], scale: float) -> None:
    C = 16
    x = torch.randn(2, 3, C)
    result = SinusoidalPosition(tiny_config(position="sinusoidal", **network))(x, torch.arange(start, start + 3))
    for b, i, c in product(range(2), range(3), range(C)):
        angle = (start + i) / 10000 ** (2 * (c // 2) / C)
        wave = math.cos(angle) if c % 2 else math.sin(angle)
        assert result[b, i, c].item() == pytest.approx(x[b, i, c].item() * scale + wave, abs=1e-5)


def test_learned_positions_are_rows_of_a_table() -> None:
    position = tiny_model().position
    table = position.get_parameter("embedding.weight")
    x = torch.randn(2, 3, 16)
    assert torch.equal(position(x, torch.tensor([4, 5, 6])), x + table[4:7])
    assert torch.equal(position(x, None), x + table[:3])


def rotate(vector: Tensor, position: int) -> Tensor:
    rotary = Rotary(tiny_config(position="rotary", block_size=40))
    return rotary(vector.view(1, 1, -1), torch.tensor([position])).flatten()


def test_rotary_rotates_pairs_like_complex_numbers() -> None:
    x = torch.randn(8)
    for position in (0, 1, 13, 39):
        result = rotate(x, position)
        for i in range(4):
            expected = complex(x[i], x[i + 4]) * cmath.exp(1j * position / 10000 ** (2 * i / 8))
            assert complex(result[i], result[i + 4]) == pytest.approx(expected, abs=1e-5)


def test_rotary_scores_depend_only_on_distances() -> None:
    q, k = torch.randn(2, 8)
    for m, n in [(0, 0), (3, 1), (20, 2), (7, 30)]:
        score, shifted = rotate(q, m) @ rotate(k, n), rotate(q, m + 5) @ rotate(k, n + 5)
        torch.testing.assert_close(score, shifted, atol=1e-5, rtol=0)
    assert abs(rotate(q, 3) @ rotate(k, 1) - rotate(q, 9) @ rotate(k, 1)) > 1e-3


def test_attention_equals_plain_loops() -> None:
    B, T, C, H, D = 2, 5, 16, 2, 8
    attention = CausalSelfAttention(tiny_config()).double().eval()
    randomize(attention)
    x = torch.randn(B, T, C, dtype=torch.float64)
    weights, biases = attention.qkv.weight.tolist(), attention.qkv.bias.tolist()
    mixed = torch.zeros_like(x)
    for b in range(B):
        qkv = [
            [
                sum(w * n for w, n in zip(row, token, strict=True)) + bias
                for row, bias in zip(weights, biases, strict=True)
            ]
            for token in x[b].tolist()
        ]
        for h, t in product(range(H), range(T)):
            q, k, v = ([token[part * C + h * D : part * C + (h + 1) * D] for token in qkv] for part in range(3))
            scores = [
                math.exp(sum(a * c for a, c in zip(q[t], k[s], strict=True)) / math.sqrt(D)) for s in range(t + 1)
            ]
            for d in range(D):
                mixed[b, t, h * D + d] = sum(score * v[s][d] for s, score in enumerate(scores)) / sum(scores)
    expected = mixed @ attention.out.weight.T + attention.out.bias
    torch.testing.assert_close(attention(x), expected, atol=1e-12, rtol=0)


def test_ngram_embedding_equals_the_formula() -> None:
    model = random_model(ngram=4, ngram_rows=50)
    embedding = model.ngram_embedding
    assert embedding is not None
    tokens = some_tokens(2, 7)
    for b, t in product(range(2), range(7)):
        expected = model.token_embedding.weight[tokens[b, t]].clone()
        for n, table in zip((2, 3, 4), embedding.tables, strict=True):
            key = 0
            for back in range(n):
                key = key * 1_000_003 + (int(tokens[b, t - back]) + 1 if back <= t else 0)
            key = (key + 2**63) % 2**64 - 2**63  # overflow of signed 64-bit integers
            expected += table.get_parameter("weight")[key % 50]
        torch.testing.assert_close(model.embed(tokens)[b, t], rms(expected), atol=1e-5, rtol=1e-4)


def test_ngram_keys_may_overflow() -> None:
    model = tiny_model(vocab_size=50257, ngram=6, ngram_rows=1000)
    assert model(some_tokens(2, 8, vocab_size=50257)).isfinite().all()


def test_token_shift_adds_a_fraction_of_the_previous_embedding() -> None:
    model = random_model(token_shift=True)
    assert model.token_shift is not None
    x = model.token_embedding(some_tokens(2, 7))
    shifted = model.embed(some_tokens(2, 7))
    assert torch.equal(shifted[:, 0], x[:, 0])
    torch.testing.assert_close(shifted[:, 1:], x[:, 1:] + model.token_shift.mix * x[:, :-1])


def rms(values: Tensor) -> Tensor:
    return values / values.square().mean(-1, keepdim=True).sqrt()


def test_rmsnorm_relu2_and_qk_norm_equal_their_formulas() -> None:
    model = random_model(norm="rmsnorm", activation="relu2", qk_norm=True, bias=False)
    x = torch.randn(2, 5, 16)
    block = model.blocks[0]
    norm, mlp = block.get_submodule("mlp_norm"), block.get_submodule("mlp")
    up, down = mlp.get_parameter("up.weight"), mlp.get_parameter("down.weight")
    torch.testing.assert_close(norm(x), rms(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mlp(x), (x @ up.T).clamp(min=0) ** 2 @ down.T, atol=1e-4, rtol=1e-4)

    attention = block.get_submodule("attention")
    assert isinstance(attention, CausalSelfAttention)
    q, k, v = (x @ attention.qkv.weight.T).view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    q, k = rms(q), rms(k)
    later = torch.ones(5, 5).triu(1).bool()
    weights = (q @ k.mT / math.sqrt(8)).masked_fill(later, -torch.inf).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).reshape(2, 5, 16)
    torch.testing.assert_close(attention(x), mixed @ attention.out.weight.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("network", [{}, MODERN], ids=["gpt2", "modern"])
def test_model_memorizes_one_batch(network: dict[str, Any]) -> None:
    model = tiny_model(n_embd=32, **network).train()
    tokens = some_tokens(4, 9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(300):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        if loss.item() < 0.1:
            return
    pytest.fail(f"the loss is still {loss.item()}")


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: "-".join(map(str, network.values())))
def test_initial_loss_is_uniform_and_every_parameter_has_a_gradient(network: dict[str, Any]) -> None:
    model = tiny_model(**network).train()
    tokens = some_tokens(4, 9)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx(math.log(11), abs=0.15)
    loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_all_weights_of_zero_init_are_trained() -> None:
    model = tiny_model(**MODERN).train()
    tokens = some_tokens(4, 9)
    assert not model(tokens[:, :-1]).any()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):  # first the head, then the outputs to the residual stream, then all others
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_initial_weights_have_the_documented_distribution() -> None:
    model = tiny_model(vocab_size=90, block_size=64, n_embd=64, n_layer=3, tie_embeddings=False, qk_norm=True)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("out.weight", "down.weight"))
            std = 0.02 / math.sqrt(2 * 3) if residual else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.06), name
            assert parameter.mean().item() == pytest.approx(0, abs=0.1 * std), name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


def test_dropout_is_active_only_in_training() -> None:
    tokens = some_tokens(2, 8)
    model, plain = tiny_model(dropout=0.5), tiny_model()
    assert torch.equal(model(tokens), plain(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(plain.train()(tokens), plain(tokens))


@pytest.mark.parametrize("name", ["dropout", "blocks.0.attention.residual_dropout", "blocks.1.mlp.dropout"])
def test_each_dropout_module_is_used(name: str) -> None:
    model = tiny_model()
    dropout = model.get_submodule(name).train()
    assert isinstance(dropout, nn.Dropout)
    dropout.p = 0.5
    tokens = some_tokens(2, 8)
    assert not torch.equal(model(tokens), model(tokens))


def test_dropout_applies_to_attention_weights() -> None:
    attention = CausalSelfAttention(tiny_config(dropout=0.5)).train()
    attention.residual_dropout.p = 0.0
    x = torch.randn(2, 8, 16)
    assert not torch.equal(attention(x), attention(x))


def test_loss_is_the_mean_cross_entropy() -> None:
    model = random_model()
    tokens = some_tokens(3, 8)
    logits, targets = model(tokens[:, :-1]).double().flatten(0, 1).tolist(), tokens[:, 1:].flatten().tolist()
    losses = [math.log(sum(map(math.exp, row))) - row[target] for row, target in zip(logits, targets, strict=True)]
    assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
def test_state_dict_holds_only_parameters(position: str) -> None:
    tied = tiny_model(position=position)
    untied = tiny_model(position=position, tie_embeddings=False)
    assert set(tied.state_dict()) == {name for name, _ in tied.named_parameters()}
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"head.weight"}


@pytest.mark.parametrize("chunks", [[8], [3, 5], [4, 2, 1, 1], [1] * 8], ids=str)
@pytest.mark.parametrize("network", [{"position": position} for position in POSITIONS] + [MODERN], ids=str)
def test_cache_does_not_change_the_logits(network: dict[str, Any], chunks: list[int]) -> None:
    model = random_model(**network)
    tokens = some_tokens(3, 8)
    ends = [0, *torch.tensor(chunks).cumsum(0).tolist()]
    cache = model.new_cache(3)
    with torch.no_grad():
        for start, end in pairwise(ends):
            cached = model.next_logits(tokens[:, start:end], cache)
            torch.testing.assert_close(cached, model.next_logits(tokens[:, :end]), atol=1e-5, rtol=0)
            torch.testing.assert_close(cached, model(tokens[:, :end])[:, -1], atol=1e-5, rtol=0)


def test_seed_determines_the_weights() -> None:
    def weights(model: GPT) -> Tensor:
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(weights(tiny_model(seed=3)), weights(tiny_model(seed=3)))
    assert not torch.equal(weights(tiny_model(seed=3)), weights(tiny_model(seed=4)))


def test_label_smoothing_moves_probability_to_all_tokens_in_training_only() -> None:
    model = random_model()
    tokens = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
    plain = model(tokens, tokens)
    model.label_smoothing = 0.1
    assert model(tokens, tokens) == plain
    log_probs = model(tokens).log_softmax(-1)
    expected = 0.9 * plain - 0.1 * log_probs.mean()
    torch.testing.assert_close(model.train()(tokens, tokens), expected)
