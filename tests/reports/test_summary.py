"""The model summary agrees with the network that PyTorch runs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import NETWORKS, tiny_config
from glyphgpt.reports.summary import LayerSummary, ModelSummary
from glyphgpt.settings import Network
from model import GPT

SHAPE = {"ngram_rows": 50, "n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 10}
V, B = 13, 4


def summary(**changes: Any) -> ModelSummary:
    return ModelSummary(Network(**{**SHAPE, **changes}), vocab_size=V, batch_size=B)


def layers(**changes: Any) -> dict[str, LayerSummary]:
    """Return the layers of a summary by the first word of their names."""
    return {
        layer.name.split(" ")[0].rstrip(","): layer
        for _, _, section in summary(**changes).sections
        for layer in section
    }


@pytest.mark.parametrize("network", NETWORKS[::7], ids=lambda network: "-".join(map(str, network.values())))
def test_totals_are_those_of_the_whole_network(network: dict[str, Any]) -> None:
    """The summary measures single layers and one block for all; this test measures the whole network on the CPU."""
    model = GPT(tiny_config(vocab_size=V, **{**SHAPE, **network}))
    assert summary(**network).parameters == sum(parameter.numel() for parameter in model.parameters())

    tokens = torch.zeros(B, 10, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens)
    assert summary(**network).macs == counter.get_total_flops() // 2


@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_those_of_the_modules_outputs(tied: bool) -> None:
    model = GPT(tiny_config(vocab_size=V, **SHAPE, tie_embeddings=tied))
    outputs: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():

        def record_shape(_module: nn.Module, _inputs: object, output: Tensor, name: str = name) -> None:
            outputs[name.removeprefix("blocks.1.")] = tuple(output.shape)

        module.register_forward_hook(record_shape)
    model(torch.zeros(B, 10, dtype=torch.long))
    outputs["head"] = outputs[""]
    summarized = layers(tie_embeddings=tied)
    names = {"token_embedding", "position", "attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.up"}
    for name in names | {"mlp.activation", "mlp.down", "norm", "head"}:
        assert summarized[name].shape == outputs[name]


def test_shapes_inside_attention() -> None:
    summarized = layers()
    for name, letters, shape in (
        ("queries", "B H T D", (4, 2, 10, 8)),
        ("scores", "B H T T", (4, 2, 10, 10)),
        ("weights", "B H T T", (4, 2, 10, 10)),
        ("outputs", "B H T D", (4, 2, 10, 8)),
    ):
        assert (summarized[name].symbolic_shape, summarized[name].shape) == (letters, shape)


def test_letters_do_not_depend_on_the_sizes() -> None:
    """The letters are right even where sizes are equal, as B = T = C = V = 16 here."""
    equal = ModelSummary(Network(block_size=16, n_embd=16, n_head=1), vocab_size=16, batch_size=16)
    letters = [layer.symbolic_shape for _, _, section in equal.sections for layer in section]
    assert letters == [layer.symbolic_shape for _, _, section in summary().sections for layer in section]
    assert {"B T", "B T C", "B T 3C", "B H T D", "B H T T", "B T 4C", "B T V", "1"} == set(letters)


def test_the_table_shows_every_layer_and_the_totals() -> None:
    model_summary = summary()
    table = model_summary.table()
    for _, _, section in model_summary.sections:
        for layer in section:
            line = next(line for line in table.splitlines() if line.strip().startswith(layer.name))
            assert f" {layer.symbolic_shape} " in line
            assert " x ".join(map(str, layer.shape)) in line
    (total,) = (line for line in table.splitlines() if line.startswith("total"))
    assert total.split()[1:] == [f"{model_summary.parameters:,}", f"{model_summary.macs:,}"]
    assert "each of 3 blocks" in table


def test_a_training_step_takes_three_forward_passes() -> None:
    model_summary = summary(n_embd=512)
    gigaflops = 2 * 3 * model_summary.macs / 1e9
    assert gigaflops > 1
    assert f"{gigaflops:,.2f} GFLOP for 40 tokens" in model_summary.table()


def test_training_memory_grows_with_weights_and_batch() -> None:
    model_summary = summary()
    larger = ModelSummary(model_summary.network, vocab_size=V, batch_size=2 * B)
    fixed = 16 * model_summary.parameters  # weights, gradients and two means, 4 bytes each
    assert larger.training_bytes - fixed == pytest.approx(2 * (model_summary.training_bytes - fixed), rel=0.01)
    hidden_layers = 3 * B * 10 * 4 * 16  # of the MLPs of 3 blocks
    assert model_summary.training_bytes > fixed + 4 * hidden_layers
