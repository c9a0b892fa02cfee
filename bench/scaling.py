"""Estimate the memory and time of an update for GPT-2's sizes on 1 to 64 GPUs, and check the formulas on a CPU.

    python bench/scaling.py            print the tables of docs/scaling.md
    python bench/scaling.py --check    measure what a CPU can measure, and print it beside the estimates

docs/scaling.md explains the formulas and what they leave out. Sizes are in bytes, times in seconds.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from glyphgpt.reports.summary import LayerSummary, ModelSummary
from glyphgpt.runtime import init_runtime
from glyphgpt.settings import Network, TrainSettings
from glyphgpt.training.distributed import checkpoint_activations, gradient_sync, local, replicate_model, shard_model
from glyphgpt.training.optimizers import make_optimizers
from model import GPT, GPTConfig

GPUS = (1, 2, 4, 8, 16, 32, 64)
SEQUENCES = 512  # in an update, for any number of GPUs
BATCH_SIZE = 8  # sequences that a GPU processes at once

GPU_MEMORY = 80e9
GPU_FLOPS = 0.4 * 989e12  # operations per second: 40% of the bfloat16 peak of an H100
NVLINK, NETWORK = 300e9, 40e9  # bytes per second, GPU and direction; the peaks are 450e9 and 50e9
GPUS_PER_MACHINE = 8

INPUT_BYTES = 2  # of the input of a block, per token and channel
BLOCK_BYTES = 32  # of all activations that a block keeps for its backward pass, per token and channel
LOGITS_BYTES = 12  # per token and entry of the vocabulary, at the peak


@dataclass(frozen=True)
class Shape:
    """The shape of a GPT-2 without biases. The model summary counts its parameters and operations."""

    name: str
    layers: int
    channels: int
    heads: int
    vocabulary: int = 50257
    context: int = 1024

    @property
    def network(self) -> Network:
        """The settings of the network."""
        return Network(n_layer=self.layers, n_head=self.heads, n_embd=self.channels, block_size=self.context)

    @cached_property
    def summary(self) -> ModelSummary:
        """The summary of one sequence's forward pass."""
        return ModelSummary(self.network, self.vocabulary, batch_size=1)

    @property
    def block(self) -> int:
        """Parameters of a block."""
        _, (_, _, layers), _ = self.summary.sections
        return sum(layer.parameters for layer in layers)

    @property
    def outside(self) -> int:
        """Parameters outside the blocks."""
        return self.parameters - self.layers * self.block

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.summary.parameters

    @property
    def flops(self) -> float:
        """Operations per token, forward and backward; fused attention skips the masked half of its products."""
        attention = self.summary.total(lambda layer: layer.macs if is_attention(layer) else 0)
        return 6 * (self.summary.macs - attention / 2) / self.context


def is_attention(layer: LayerSummary) -> bool:
    """Return whether a layer is one of attention's two products, which have no parameters."""
    return bool(layer.macs) and not layer.parameters and "H" in layer.symbolic_shape


SHAPES = (
    Shape("124M", 12, 768, 12),
    Shape("354M", 24, 1024, 16),
    Shape("774M", 36, 1280, 20),
    Shape("1.56B", 48, 1600, 25),
)


@dataclass(frozen=True)
class Strategy:
    """A way to train one model on several GPUs."""

    title: str
    sharded: bool = False
    recompute: bool = False

    def memory(self, shape: Shape, gpus: int) -> float:
        """Return the peak memory of each GPU in bytes."""
        weights = shape.parameters
        total = 12.0 * weights / (gpus if self.sharded else 1)  # weights and AdamW's two moments
        if self.sharded and gpus > 1:
            total += 4 * weights / gpus + 2 * 2 * shape.block + 4 * shape.outside  # two gathered blocks, and the rest
            if SEQUENCES // gpus > BATCH_SIZE:
                total += 4 * weights  # full gradients until the last batch
        else:
            total += 4 * weights + 2 * weights  # gradients, and bfloat16 copies
        tokens = BATCH_SIZE * shape.context
        kept = INPUT_BYTES * shape.layers + BLOCK_BYTES if self.recompute else BLOCK_BYTES * shape.layers
        return total + tokens * (kept * shape.channels + LOGITS_BYTES * shape.vocabulary)

    def compute_seconds(self, shape: Shape, gpus: int) -> float:
        """Return the seconds of computation for an update."""
        factor = (4 / 3) if self.recompute else 1
        return SEQUENCES * shape.context / gpus * shape.flops * factor / GPU_FLOPS

    def exchanged_bytes(self, shape: Shape, gpus: int) -> float:
        """Return the bytes that each GPU sends for an update, in ring collectives."""
        ring = (gpus - 1) / gpus  # the fraction of the data that a GPU sends
        if not self.sharded:
            return 2 * 4 * shape.parameters * ring
        batches = max(1, SEQUENCES // gpus // BATCH_SIZE)
        gathered = 2 * (2 * shape.layers * shape.block) + 4 * shape.outside
        return (batches * gathered + 4 * shape.parameters) * ring

    def exchange_seconds(self, shape: Shape, gpus: int) -> float:
        """Return the seconds of communication for an update, without overlap."""
        return self.exchanged_bytes(shape, gpus) / (NVLINK if gpus <= GPUS_PER_MACHINE else NETWORK)


STRATEGIES = (
    Strategy("`--parallel=ddp`"),
    Strategy("`--parallel=fsdp`", sharded=True),
    Strategy("`--parallel=fsdp --activation_checkpointing`", sharded=True, recompute=True),
)


def tables() -> str:
    """Return the tables of docs/scaling.md."""
    return "\n".join(line for strategy in STRATEGIES for line in [*table(strategy), ""]).rstrip() + "\n"


def table(strategy: Strategy) -> Iterator[str]:
    """Yield the lines of the table of a strategy."""
    yield f"{strategy.title}: GB on each GPU, and seconds for an update (computing; exchanging, if nothing overlapped)"
    yield ""
    yield f"| model | {' | '.join(f'{gpus} GPU' + 's' * (gpus > 1) for gpus in GPUS)} |"
    yield "|---" * (len(GPUS) + 1) + "|"
    for shape in SHAPES:
        cells = []
        for gpus in GPUS:
            memory = strategy.memory(shape, gpus)
            size = f"{memory / 1e9:.0f} GB" + (" (too much)" if memory > GPU_MEMORY else "")
            seconds = f"{strategy.compute_seconds(shape, gpus):.2f}; {strategy.exchange_seconds(shape, gpus):.2f}"
            cells.append(f"{size}, {seconds}")
        yield f"| {shape.name} | {' | '.join(cells)} |"


def build_model(shape: Shape) -> GPT:
    """Return a model of the shape."""
    return GPT(GPTConfig(vocab_size=shape.vocabulary, **shape.network.model_dump()))


def check() -> None:
    """Measure activations, memory and exchanged bytes, and print them beside the estimates."""
    print("| quantity | estimate | measured |\n|---|---|---|")
    small = SHAPES[0]
    for recompute, expected in ((False, BLOCK_BYTES), (True, INPUT_BYTES)):
        kept = [kept_bytes(replace(small, layers=layers), recompute=recompute) for layers in (2, 3)]
        title = "with" if recompute else "without"
        measured = (kept[1] - kept[0]) / small.context / small.channels
        print(f"| bytes kept per token, layer and channel, {title} checkpointing | {expected} | {measured:.1f} |")
    for kind in ("ddp", "fsdp"):
        for processes in (2, 4):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            done = subprocess.run([*command, __file__, f"--worker={kind}"], capture_output=True, text=True, check=True)
            print(done.stdout, end="")


def kept_bytes(shape: Shape, *, recompute: bool) -> int:
    """Return the bytes of activations that the forward pass of one sequence keeps for the backward pass."""
    model, kept = build_model(shape), {}
    if recompute:
        checkpoint_activations(model)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        is_activation = shape.context in tensor.shape and not isinstance(tensor, torch.nn.Parameter)
        if is_activation:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.zeros(1, shape.context, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens)
    del loss
    return sum(kept.values())


def worker(kind: str) -> None:
    """Train a small model in this process and others; print its memory and communication beside the estimates."""
    shape, sharded = Shape("small", 4, 64, 2, 1000, 64), kind == "fsdp"
    with init_runtime("cpu", "float32") as runtime:
        model = build_model(shape)
        if sharded:
            shard_model(model, runtime)
        forward = model if sharded else replicate_model(model, runtime)
        [adamw] = make_optimizers(model, TrainSettings())
        tokens = torch.zeros(2, shape.context, dtype=torch.long)

        def step() -> None:
            for number in range(2):
                with gradient_sync(forward, now=number == 1):
                    forward(tokens, tokens).backward()
            adamw.step(skip=torch.tensor(False))
            model.zero_grad()

        step()
        with torch.profiler.profile(record_shapes=True) as profile:
            step()
        held = [*model.parameters(), *(value for state in adamw.state.values() for value in state.values())]
        bytes_held = sum(local(tensor).nbytes for tensor in held if tensor.dim())
        expected_bytes = 12 * shape.parameters / (runtime.world_size if sharded else 1)
        if runtime.is_main:
            title = f"{kind}, {runtime.world_size} processes"
            print(f"| bytes of weights and AdamW's moments, {title} | {expected_bytes:,.0f} | {bytes_held:,} |")
            elements = exchanged_elements(profile, runtime.world_size)
            expected = 2 * shape.parameters
            if sharded:
                # each of the two batches gathers every block twice and the other weights once
                expected = 2 * (2 * shape.layers * shape.block + shape.outside) + shape.parameters
            print(f"| elements gathered and reduced for two batches, {title} | {expected:,} | {elements:,} |")


def exchanged_elements(profile: Any, processes: int) -> int:
    """Return the number of elements that collective operations exchanged.

    An all-reduce counts as two exchanges, except with fsdp: gloo has no reduce-scatter, which an all-reduce replaces.
    """
    elements = {"gloo:all_gather": 0, "gloo:all_reduce": 0}
    for event in profile.events():
        if event.name in elements:
            elements[event.name] += event.input_shapes[0][0]
    gathered = elements["gloo:all_gather"] * processes
    return gathered + elements["gloo:all_reduce"] * (1 if gathered else 2)


def main() -> None:
    """Print the tables, or check the formulas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure on a CPU, and print the estimates beside it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
    elif options.check:
        check()
    else:
        print(tables(), end="")


if __name__ == "__main__":
    main()
