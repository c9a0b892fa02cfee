"""A walk through the network on paper: every stage's shape, parameters and multiply-adds."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from glyphgpt.settings import Network

LETTERS = "B batch, T time, C channels, H heads, D = C / H head size, V vocabulary"


@dataclass(frozen=True)
class LayerSummary:
    """One step of the forward pass."""

    name: str
    letters: str
    """Shape of what comes out, as in "B T 4C"."""
    parameters: int = 0
    multiply_adds: int = 0
    """Of matrix products, forward, for the whole batch."""


@dataclass(frozen=True)
class ModelSummary:
    """The forward pass of a network over batch_size sequences of block_size tokens."""

    network: Network
    vocab_size: int
    batch_size: int

    def before_blocks(self) -> list[LayerSummary]:
        """From token ids to the residual stream."""
        net, V = self.network, self.vocab_size
        T, C = net.block_size, net.n_embd
        ngrams = [
            LayerSummary(f"ngram_embedding of 2 to {net.ngram} tokens", "B T C", (net.ngram - 1) * net.ngram_rows * C)
        ]
        return [
            LayerSummary("tokens", "B T"),
            LayerSummary("token_embedding", "B T C", V * C),
            *(ngrams if net.ngram > 1 else []),
            *([LayerSummary("token_shift", "B T C", C)] if net.token_shift else []),
            LayerSummary(f"position ({net.position})", "B T C", T * C if net.position == "learned" else 0),
        ]

    def block(self) -> list[LayerSummary]:
        """One block: attention, then MLP."""
        net, B = self.network, self.batch_size
        T, C, H = net.block_size, net.n_embd, net.n_head
        D = C // H
        return [
            self._norm("attention_norm"),
            self._linear("qkv", "B T 3C", C, 3 * C),
            LayerSummary("queries, keys, values", "B H T D"),
            LayerSummary("scores = q k^T / sqrt(D)", "B H T T", 0, B * H * T * T * D),
            LayerSummary("weights = softmax of the past", "B H T T"),
            LayerSummary("mixed = weights v", "B H T D", 0, B * H * T * T * D),
            self._linear("out, added to the stream", "B T C", C, C),
            self._norm("mlp_norm"),
            self._linear("up", "B T 4C", C, 4 * C),
            LayerSummary(f"activation ({net.activation})", "B T 4C"),
            self._linear("down, added to the stream", "B T C", 4 * C, C),
        ]

    def after_blocks(self) -> list[LayerSummary]:
        """From the residual stream to the loss."""
        net, V = self.network, self.vocab_size
        C, tokens = net.n_embd, self.batch_size * net.block_size
        tied = net.tie_embeddings
        return [
            self._norm("norm"),
            LayerSummary(
                "head (the embedding again)" if tied else "head", "B T V", 0 if tied else V * C, tokens * V * C
            ),
            LayerSummary("loss", "1"),
        ]

    def _norm(self, name: str) -> LayerSummary:
        net = self.network
        vectors = 0 if net.norm == "rmsnorm" else 2 if net.bias else 1
        return LayerSummary(f"{name} ({net.norm})", "B T C", vectors * net.n_embd)

    def _linear(self, name: str, letters: str, inputs: int, outputs: int) -> LayerSummary:
        tokens = self.batch_size * self.network.block_size
        biases = outputs if self.network.bias else 0
        return LayerSummary(name, letters, inputs * outputs + biases, tokens * inputs * outputs)

    def stages(self) -> Iterator[LayerSummary]:
        """Yield every stage, the blocks' as often as there are blocks."""
        yield from self.before_blocks()
        for _ in range(self.network.n_layer):
            yield from self.block()
        yield from self.after_blocks()

    @property
    def parameters(self) -> int:
        """Parameters of the network."""
        return sum(stage.parameters for stage in self.stages())

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of a forward pass; backward takes twice as many again."""
        return sum(stage.multiply_adds for stage in self.stages())

    @property
    def training_bytes(self) -> int:
        """Estimate of the memory to train: weights, gradients, AdamW's two means, and activations, in float32.

        Every stage's output is taken to be kept for the backward pass, but for the T x T ones, which fused
        attention never writes down.
        """
        kept = sum(math.prod(self.sizes(stage)) for stage in self.stages() if "T T" not in stage.letters)
        return 4 * (4 * self.parameters + kept)

    def sizes(self, stage: LayerSummary) -> list[int]:
        """Put numbers to a stage's letters: "B T 4C" becomes [12, 64, 512]."""
        net = self.network
        number = {
            "B": self.batch_size,
            "T": net.block_size,
            "C": net.n_embd,
            "H": net.n_head,
            "D": net.n_embd // net.n_head,
            "V": self.vocab_size,
            "1": 1,
        }
        return [int(word[:-1] or 1) * number[word[-1]] for word in stage.letters.split()]

    def table(self) -> str:
        """Lay the walk out for a reader, with totals."""
        lines = [
            LETTERS,
            "",
            f"{'stage':34}{'shape':10}{'in numbers':20}{'parameters':>13}{'multiply-adds':>18}",
            *(self._row(stage, "") for stage in self.before_blocks()),
            f"each of {self.network.n_layer} blocks:",
            *(self._row(stage, "  ") for stage in self.block()),
            *(self._row(stage, "") for stage in self.after_blocks()),
            f"{'all together':64}{self.parameters:>13,}{self.multiply_adds:>18,}",
            "",
            *self.costs(),
        ]
        return "\n".join(lines)

    def costs(self) -> list[str]:
        """Say what training takes, a line each."""
        tokens = self.batch_size * self.network.block_size
        return [
            f"A training step takes about three times the forward pass's multiply-adds, and each counts as two "
            f"operations: {6 * self.multiply_adds / 1e9:,.2f} GFLOP for {tokens:,} tokens.",
            f"Memory to train: about {self.training_bytes / 2**20:,.0f} MiB, if all is kept in float32.",
        ]

    def _row(self, stage: LayerSummary, indent: str) -> str:
        numbers = " x ".join(map(str, self.sizes(stage)))
        parameters, multiply_adds = (f"{n:,}" if n else "" for n in (stage.parameters, stage.multiply_adds))
        return f"{indent + stage.name:34}{stage.letters:10}{numbers:20}{parameters:>13}{multiply_adds:>18}"
