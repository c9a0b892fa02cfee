"""A summary of a model: shape, parameters and multiply-accumulates (MACs) of each layer, in the order of execution.

The real model runs with small sizes, each of which has a prime factor of its own, and hooks record its layers. The
factors of a number then tell which sizes it is a product of.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glyphgpt.settings import Network

if TYPE_CHECKING:
    from model import GPT

SHAPE_LETTERS = "B batch, T time, C channels, H heads, D = C / H head size, V vocabulary"
PROBE = {"B": 5, "T": 7, "H": 11, "D": 26, "V": 17, "R": 19}
"""The small sizes. D is even, as rotary positions need it; R is the rows of an n-gram table."""
BLOCK = "blocks.0."


@dataclass(frozen=True)
class LayerSummary:
    """A layer, or a step inside attention."""

    name: str
    shape: tuple[int, ...]
    """Shape of the output."""
    parameters: int
    macs: int
    """MACs of the forward pass over the whole batch; only matrix products count."""
    symbolic_shape: str
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
        network = self.network
        sizes = {
            "B": self.batch_size, "T": network.block_size, "H": network.n_head, "D": network.n_embd // network.n_head,
            "V": self.vocab_size, "R": network.ngram_rows,
        }  # fmt: skip
        layers = trace(network, sizes)
        inside = [number for number, layer in enumerate(layers) if layer.name.startswith(BLOCK)]
        first, last = inside[0], inside[-1] + 1
        layers = [replace(layer, name=layer.name.removeprefix(BLOCK)) for layer in layers]
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
    def training_flops(self) -> int:
        """Operations of a training step: two for each MAC of the forward and the backward pass."""
        return 6 * self.macs

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
            f"{self.training_flops / 1e9:,.2f} GFLOP for {tokens:,} tokens.",
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


def factors(number: int) -> tuple[dict[str, int], int]:
    """Return how often each size of the probe is a factor of a number, and the rest of the number.

    >>> factors(3 * PROBE["T"] * PROBE["T"])
    ({'B': 0, 'T': 2, 'H': 0, 'D': 0, 'V': 0, 'R': 0}, 3)
    """
    counts = dict.fromkeys(PROBE, 0)
    for letter, size in PROBE.items():
        while number and number % size == 0:
            number //= size
            counts[letter] += 1
    return counts, number


def symbol(number: int) -> str:
    """Return a size of the probe in letters.

    >>> symbol(4 * PROBE["H"] * PROBE["D"])
    '4C'
    """
    counts, rest = factors(number)
    letters = "".join(letter * count for letter, count in counts.items()).replace("HD", "C")
    return f"{rest if rest > 1 or not letters else ''}{letters}"


def resize(number: int, sizes: dict[str, int]) -> int:
    """Return a product of the probe's sizes with other sizes in their places."""
    counts, rest = factors(number)
    return rest * math.prod(sizes[letter] ** count for letter, count in counts.items())


def trace(network: Network, sizes: dict[str, int]) -> list[LayerSummary]:
    """Run a network with a single block and the probe's sizes; return its layers in the order of execution."""
    from model import GPT, GPTConfig  # noqa: PLC0415  (the package imports model.py only when it needs it)

    fields = {
        **network.model_dump(include=set(Network.model_fields)), "n_layer": 1, "n_head": PROBE["H"],
        "n_embd": PROBE["H"] * PROBE["D"], "block_size": PROBE["T"], "ngram_rows": PROBE["R"],
    }  # fmt: skip
    tracer = Tracer(sizes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = GPT(GPTConfig(vocab_size=PROBE["V"], **fields)).eval()
        for name, module in shown_modules(model):
            module.register_forward_pre_hook(partial(tracer.record_module, name))
        tokens = torch.zeros(PROBE["B"], PROBE["T"], dtype=torch.long)
        tracer.record("tokens", lambda: tokens)
        hidden = model.hidden(tokens)
        head = "head (tied to token_embedding)" if model.head is None else "head"
        tracer.record(head, lambda: model.logits(hidden), model.head, summed=hidden.shape[-1])
        tracer.record("loss", lambda: torch.zeros(()))
    return tracer.layers


def shown_modules(model: "GPT") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that the summary shows, with their names."""
    for name, module in model.named_modules():
        *parents, own_name = name.split(".")
        composite = ("ngram_embedding", "position", "attention")  # shown without their submodules
        leaf = not any(module.children()) and not isinstance(module, nn.Dropout)
        if (own_name in composite or leaf) and not set(composite) & set(parents):
            yield name, module


class Tracer:
    """Records the layers of a forward pass, with other sizes in place of the probe's."""

    def __init__(self, sizes: dict[str, int]) -> None:
        """Begin with no layers; `sizes` has the letters of PROBE."""
        self.sizes = sizes
        self.layers: list[LayerSummary] = []

    def record_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Record a module, as a forward pre-hook."""
        if not name.endswith("attention"):
            self.record(f"{name} ({type(module).__name__})", lambda: module.forward(*inputs), module)
            return
        attention: Any = module
        self.record(f"{name}.qkv (Linear)", lambda: attention.qkv(inputs[0]), attention.qkv)
        q, k, v = attention.project_qkv(inputs[0])
        self.record(f"{BLOCK}queries, keys, values", lambda: q)
        scores = self.record(f"{BLOCK}scores = q k^T / sqrt(D)", lambda: q @ k.mT, summed=PROBE["D"])
        weights = self.record(f"{BLOCK}weights = softmax(masked scores)", lambda: scores.softmax(-1))
        y = self.record(f"{BLOCK}outputs = weights v", lambda: weights @ v, summed=PROBE["T"])
        self.record(f"{name}.out (Linear)", lambda: attention.project_out(y), attention.out)

    def record(
        self, name: str, function: Callable[[], Tensor], module: nn.Module | None = None, *, summed: int = 0
    ) -> Tensor:
        """Call a function and return its output; record its shape, its MACs and the module's parameters.

        Args:
            summed: Number of products that are summed for each number of the output, for other modules than Linear.
        """
        output = function()
        if isinstance(module, nn.Linear):
            summed = module.in_features
        parameters = [parameter.numel() for parameter in module.parameters()] if module else []
        self.layers.append(
            LayerSummary(
                name,
                tuple(resize(size, self.sizes) for size in output.shape),
                sum(resize(number, self.sizes) for number in parameters),
                resize(output.numel() * summed, self.sizes),
                " ".join(map(symbol, output.shape)) or "1",
            )
        )
        return output
