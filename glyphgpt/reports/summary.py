"""A summary of a model: shape, parameters and multiply-accumulates (MACs) of each layer, in the order of execution.

The real model runs on torch's meta device, which computes shapes but no numbers. Hooks record its layers, and torch's
FLOP counter their operations.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from glyphgpt.settings import Network

if TYPE_CHECKING:
    from model import GPT

SHAPE_LETTERS = "B batch, T time, C channels, H heads, D = C / H head size, V vocabulary"
PROBE = {"B": 2, "T": 3, "H": 5, "D": 14, "C": 70, "V": 11}
"""Sizes whose multiples by 1, 3 and 4 are all different, so that each size in a shape identifies one letter."""
BLOCK = "blocks.0."


@dataclass(frozen=True)
class LayerSummary:
    """A layer, or a step inside attention."""

    name: str
    shape: tuple[int, ...]
    """Shape of the output."""
    parameters: int = 0
    macs: int = 0
    """MACs of the forward pass over the whole batch; only matrix products count."""
    symbolic_shape: str = ""
    """The shape in letters, as in "B T 4C"."""


@dataclass(frozen=True)
class ModelSummary:
    """A summary of the forward pass of a network over `batch_size` sequences of block_size tokens."""

    network: Network
    vocab_size: int
    batch_size: int

    @cached_property
    def sections(self) -> list[tuple[str, int, list[LayerSummary]]]:
        """The layers before, in and after the blocks: heading, how often the layers are repeated, layers."""
        small = {"block_size": PROBE["T"], "n_head": PROBE["H"], "n_embd": PROBE["C"], "ngram_rows": 1}
        probe = trace(self.network.model_copy(update=small), PROBE["V"], PROBE["B"])
        layers = [
            replace(layer, symbolic_shape=symbolic_shape(probed.shape), name=layer.name.removeprefix(BLOCK))
            for layer, probed in zip(trace(self.network, self.vocab_size, self.batch_size), probe, strict=True)
        ]
        inside = [number for number, layer in enumerate(probe) if layer.name.startswith(BLOCK)]
        first, last = inside[0], inside[-1] + 1
        return [
            ("before the blocks", 1, layers[:first]),
            (f"each of {self.network.n_layer} blocks", self.network.n_layer, layers[first:last]),
            ("after the blocks", 1, layers[last:]),
        ]

    def total(self, quantity: Callable[[LayerSummary], int]) -> int:
        """Return the sum of a quantity over all layers, those of the blocks as often as there are blocks."""
        return sum(repeats * sum(map(quantity, layers)) for _, repeats, layers in self.sections)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.total(lambda layer: layer.parameters)

    @property
    def macs(self) -> int:
        """MACs of the forward pass; the backward pass takes twice as many."""
        return self.total(lambda layer: layer.macs)

    @property
    def training_bytes(self) -> int:
        """Estimate of the memory for training in float32: weights, gradients, AdamW's two means, and activations.

        Every layer's output counts as kept for the backward pass, except those of shape T x T, which fused attention
        does not store.
        """
        kept = self.total(lambda layer: 0 if "T T" in layer.symbolic_shape else math.prod(layer.shape))
        return 4 * (4 * self.parameters + kept)

    def costs(self) -> list[str]:
        """Return the costs of a training step, one per line."""
        tokens = self.batch_size * self.network.block_size
        return [
            "A training step takes about three times the MACs of the forward pass, at two operations each: "
            f"{6 * self.macs / 1e9:,.2f} GFLOP for {tokens:,} tokens.",
            f"Training memory: about {self.training_bytes / 2**20:,.0f} MiB, if everything is kept in float32.",
        ]

    def table(self) -> str:
        """Return the summary as text, with totals."""
        lines = [SHAPE_LETTERS, "", f"{'layer':36}{'shape':10}{'in numbers':20}{'parameters':>13}{'MACs':>18}"]
        for heading, _, layers in self.sections:
            lines += [f"{heading}:", *map(table_row, layers)]
        lines += [f"{'total':66}{self.parameters:>13,}{self.macs:>18,}", "", *self.costs()]
        return "\n".join(lines)


def table_row(layer: LayerSummary) -> str:
    """Return a layer's row of the table."""
    numbers = " x ".join(map(str, layer.shape)) or "1"
    parameters, macs = (f"{number:,}" if number else "" for number in (layer.parameters, layer.macs))
    return f"  {layer.name:34}{layer.symbolic_shape:10}{numbers:20}{parameters:>13}{macs:>18}"


def symbolic_shape(shape: tuple[int, ...]) -> str:
    """Return a shape of the probe in letters.

    >>> symbolic_shape((2, 3, 280))
    'B T 4C'
    """
    letters = {size * factor: f"{factor}{letter}" for factor in (3, 4) for letter, size in PROBE.items()}
    letters |= {size: letter for letter, size in PROBE.items()} | {1: "1"}
    return " ".join(letters[size] for size in shape or (1,))


def trace(network: Network, vocab_size: int, batch_size: int) -> list[LayerSummary]:
    """Run a network with a single block on the meta device, and return its layers in the order of execution."""
    from model import GPT, GPTConfig  # noqa: PLC0415  (the package imports model.py only when it needs it)

    fields = {**network.model_dump(include=set(Network.model_fields)), "vocab_size": vocab_size, "n_layer": 1}
    layers: list[LayerSummary] = []
    with torch.device("meta"), torch.no_grad():
        model = GPT(GPTConfig(**fields)).eval()
        for name, module in shown_modules(model):
            module.register_forward_pre_hook(partial(record_module, layers, name))
        tokens = torch.zeros(batch_size, network.block_size, dtype=torch.long)
        record(layers, "tokens", lambda: tokens)
        hidden = model.hidden(tokens)
        head = "head (tied to token_embedding)" if model.head is None else "head"
        record(layers, head, lambda: model.logits(hidden), model.head)
        layers.append(LayerSummary("loss", ()))
    return layers


def shown_modules(model: "GPT") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that the summary shows, with their names."""
    for name, module in model.named_modules():
        *parents, own_name = name.split(".")
        composite = ("ngram_embedding", "position", "attention")  # shown without their submodules
        leaf = not any(module.children()) and not isinstance(module, nn.Dropout)
        if (own_name in composite or leaf) and not set(composite) & set(parents):
            yield name, module


def record_module(layers: list[LayerSummary], name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Append a module to the layers, as a forward pre-hook."""
    if not name.endswith("attention"):
        record(layers, f"{name} ({type(module).__name__})", lambda: module.forward(*inputs), module)
        return
    attention: Any = module
    record(layers, f"{name}.qkv (Linear)", lambda: attention.qkv(inputs[0]), attention.qkv)
    q, k, v = attention.project_qkv(inputs[0])
    record(layers, f"{BLOCK}queries, keys, values", lambda: q)
    scores = record(layers, f"{BLOCK}scores = q k^T / sqrt(D)", lambda: q @ k.mT)
    weights = record(layers, f"{BLOCK}weights = softmax(masked scores)", lambda: scores.softmax(-1))
    y = record(layers, f"{BLOCK}outputs = weights v", lambda: weights @ v)
    record(layers, f"{name}.out (Linear)", lambda: attention.project_out(y), attention.out)


def record(
    layers: list[LayerSummary], name: str, function: Callable[[], Tensor], module: nn.Module | None = None
) -> Tensor:
    """Call a function and return its output; append its shape, the MACs and the module's parameters to the layers."""
    with FlopCounterMode(display=False) as counter:
        output = function()
    parameters = sum(parameter.numel() for parameter in module.parameters()) if module else 0
    layers.append(LayerSummary(name, tuple(output.shape), parameters, counter.get_total_flops() // 2))
    return output
