"""The walk on paper, against the network that PyTorch runs."""

import re
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import SWITCHES, tiny_config
from glyphgpt.reports.summary import ModelSummary
from glyphgpt.settings import Network
from model import GPT

SHAPE = {"ngram_rows": 50, "n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 10}
V, B = 13, 4


def walk(**changes: Any) -> ModelSummary:
    return ModelSummary(Network(**{**SHAPE, **changes}), vocab_size=V, batch_size=B)


def real(**changes: Any) -> GPT:
    return GPT(tiny_config(vocab_size=V, **{**SHAPE, **changes}))


@pytest.mark.parametrize("values", list(product(*SWITCHES.values())), ids=lambda values: "-".join(map(str, values)))
def test_parameters_and_multiply_adds_are_those_of_the_network(values: tuple[object, ...]) -> None:
    form = dict(zip(SWITCHES, values, strict=True))
    model = real(**form)
    assert walk(**form).parameters == sum(parameter.numel() for parameter in model.parameters())

    tokens = torch.zeros(B, 10, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens)
    assert walk(**form).multiply_adds == counter.get_total_flops() // 2


@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_those_that_the_modules_put_out(tied: bool) -> None:
    model = real(tie_embeddings=tied)
    seen: dict[str, list[int]] = {}
    for name, module in model.named_modules():

        def remember(_module: nn.Module, _inputs: object, output: Tensor, name: str = name) -> None:
            seen[name] = list(output.shape)

        module.register_forward_hook(remember)
    model(torch.zeros(B, 10, dtype=torch.long))
    seen["head"] = seen[""]

    paper = walk(tie_embeddings=tied)
    for stages, prefix, parts in [
        (paper.before_blocks(), "", {"token_embedding", "position"}),
        (paper.block(), "blocks.1.", {"attention_norm", "qkv", "out", "mlp_norm", "up", "activation", "down"}),
        (paper.after_blocks(), "", {"norm", "head"}),
    ]:
        folders = {"qkv": "attention.", "out": "attention.", "up": "mlp.", "activation": "mlp.", "down": "mlp."}
        shapes = {re.split(r"\W", stage.name)[0]: paper.sizes(stage) for stage in stages}
        assert {part: shapes[part] for part in parts} == {
            part: seen[prefix + folders.get(part, "") + part] for part in parts
        }


def test_shapes_inside_attention() -> None:
    shapes = {stage.letters: walk().sizes(stage) for stage in walk().block()}
    assert shapes["B H T D"] == [4, 2, 10, 8]
    assert shapes["B H T T"] == [4, 2, 10, 10]


def test_the_table_shows_every_stage_and_the_totals() -> None:
    paper = walk()
    table = paper.table()
    for stage in (*paper.before_blocks(), *paper.block(), *paper.after_blocks()):
        row = next(line for line in table.splitlines() if line.strip().startswith(stage.name))
        assert " x ".join(map(str, paper.sizes(stage))) in row
    (totals,) = (line for line in table.splitlines() if line.startswith("all together"))
    assert totals.split()[2:] == [f"{paper.parameters:,}", f"{paper.multiply_adds:,}"]
    assert "each of 3 blocks" in table


def test_the_table_counts_forward_and_backward() -> None:
    paper = walk(n_embd=512)
    gigaflops = 2 * 3 * paper.multiply_adds / 1e9
    assert gigaflops > 1
    assert f"{gigaflops:,.2f} GFLOP for 40 tokens" in paper.table()


def test_memory_grows_with_weights_and_batch() -> None:
    paper = walk()
    larger = ModelSummary(paper.network, vocab_size=V, batch_size=2 * B)
    fixed = 16 * paper.parameters  # weights, gradients and two means, 4 bytes each
    assert larger.training_bytes - fixed == pytest.approx(2 * (paper.training_bytes - fixed), rel=0.01)
    assert paper.training_bytes > fixed
