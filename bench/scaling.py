"""Estimate memory and time of a step for GPT-2's sizes on 1 to 64 GPUs, on paper, and check the parts of it here.

    python bench/scaling.py            the tables of docs/scaling.md
    python bench/scaling.py --check    what can be counted on a CPU beside what the formulas say

The formulas and what they leave out are explained in docs/scaling.md. Sizes are in bytes, times in seconds.
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
SEQUENCES = 512  # of an update, whatever the number of GPUs
AT_ONCE = 8  # sequences that go through a GPU together

GPU_MEMORY = 80e9
GPU_FLOPS = 0.4 * 989e12  # an H100's bfloat16 products, of which 40% are assumed to be reached
INSIDE, OUTSIDE = 300e9, 40e9  # bytes a second and GPU, each way: NVLink's 450 and a network's 50, not quite reached
GPUS_PER_MACHINE = 8

BLOCK_BYTES = 36  # of activations kept for each token, layer and channel; 4 of them are the block's input
LOGITS_BYTES = 12  # for each token and entry of the vocabulary, at the worst moment


@dataclass(frozen=True)
class Shape:
    """A network of GPT-2's form, without biases. Its parameters and operations are those of the real model."""

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
        (layers,) = (layers for _, repeats, layers in self.summary.sections if repeats > 1)
        return sum(layer.parameters for layer in layers)

    @property
    def outside(self) -> int:
        """Parameters outside the blocks."""
        return self.parameters - self.layers * self.block

    @property
    def parameters(self) -> int:
        """Parameters in all."""
        return self.summary.parameters

    @property
    def flops(self) -> float:
        """Operations for a token, forward and backward; fused attention skips the masked half of its products."""
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
class Way:
    """How the GPUs work together."""

    title: str
    sharded: bool = False
    recompute: bool = False

    def memory(self, shape: Shape, gpus: int) -> float:
        """Bytes on each GPU at the worst moment."""
        weights = shape.parameters
        total = 12.0 * weights / (gpus if self.sharded else 1)  # weights, and AdamW's two means
        if self.sharded and gpus > 1:
            total += 4 * weights / gpus + 2 * 2 * shape.block + 4 * shape.outside  # two blocks gathered, and the rest
            if SEQUENCES // gpus > AT_ONCE:
                total += 4 * weights  # gradients that wait for the last batch
        else:
            total += 4 * weights + 2 * weights  # gradients, and bfloat16 copies
        tokens = AT_ONCE * shape.context
        kept = 4 * shape.layers + BLOCK_BYTES if self.recompute else BLOCK_BYTES * shape.layers
        return total + tokens * (kept * shape.channels + LOGITS_BYTES * shape.vocabulary)

    def compute_seconds(self, shape: Shape, gpus: int) -> float:
        """Seconds of products for an update."""
        again = (4 / 3) if self.recompute else 1
        return SEQUENCES * shape.context / gpus * shape.flops * again / GPU_FLOPS

    def exchanged(self, shape: Shape, gpus: int) -> float:
        """Bytes that each GPU sends for an update, by rings."""
        others = (gpus - 1) / gpus
        if not self.sharded:
            return 2 * 4 * shape.parameters * others
        batches = max(1, SEQUENCES // gpus // AT_ONCE)
        gathered = 2 * (2 * shape.layers * shape.block) + 4 * shape.outside
        return (batches * gathered + 4 * shape.parameters) * others

    def exchange_seconds(self, shape: Shape, gpus: int) -> float:
        """Seconds of exchange for an update, were nothing else done meanwhile."""
        return self.exchanged(shape, gpus) / (INSIDE if gpus <= GPUS_PER_MACHINE else OUTSIDE)


WAYS = (
    Way("`--parallel=ddp`"),
    Way("`--parallel=fsdp`", sharded=True),
    Way("`--parallel=fsdp --activation_checkpointing`", sharded=True, recompute=True),
)


def tables() -> str:
    """Return the tables of docs/scaling.md."""
    return "\n".join(line for way in WAYS for line in [*rows(way), ""]).rstrip() + "\n"


def rows(way: Way) -> Iterator[str]:
    """Yield the lines of one way's table."""
    yield f"{way.title}: GB on each GPU, and seconds for an update (computing; exchanging, if nothing overlapped)"
    yield ""
    yield f"| model | {' | '.join(f'{gpus} GPU' + 's' * (gpus > 1) for gpus in GPUS)} |"
    yield "|---" * (len(GPUS) + 1) + "|"
    for shape in SHAPES:
        cells = []
        for gpus in GPUS:
            memory = way.memory(shape, gpus)
            size = f"{memory / 1e9:.0f} GB" + (" (too much)" if memory > GPU_MEMORY else "")
            cells.append(f"{size}, {way.compute_seconds(shape, gpus):.2f}; {way.exchange_seconds(shape, gpus):.2f}")
        yield f"| {shape.name} | {' | '.join(cells)} |"


def build(shape: Shape) -> GPT:
    """Return the network of a shape."""
    return GPT(GPTConfig(vocab_size=shape.vocabulary, **shape.network.model_dump()))


def check() -> None:
    """Measure activations, memory and exchanged bytes, and print them beside the estimates."""
    print("| what | estimate | measured |\n|---|---|---|")
    small = SHAPES[0]
    for recompute, per in ((False, BLOCK_BYTES), (True, 4)):
        kept = [kept_bytes(replace(small, layers=layers), recompute=recompute) for layers in (2, 3)]
        title = "with" if recompute else "without"
        seen = (kept[1] - kept[0]) / small.context / small.channels
        print(f"| bytes kept a token, layer and channel, {title} checkpointing | {per} | {seen:.1f} |")
    for kind in ("ddp", "fsdp"):
        for processes in (2, 4):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            done = subprocess.run([*command, __file__, f"--worker={kind}"], capture_output=True, text=True, check=True)
            print(done.stdout, end="")


def kept_bytes(shape: Shape, *, recompute: bool) -> int:
    """Count the bytes that one sequence's forward pass keeps for the backward pass, weights and their copies apart."""
    model, kept = build(shape), {}
    if recompute:
        checkpoint_activations(model)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        of_a_sequence = shape.context in tensor.shape and not isinstance(tensor, torch.nn.Parameter)
        if of_a_sequence:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.zeros(1, shape.context, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens)
    del loss
    return sum(kept.values())


def worker(kind: str) -> None:
    """Train a small network among several processes; print its memory and what it exchanges, beside the formulas'."""
    shape, way = Shape("small", 4, 64, 2, 1000, 64), Way(kind, sharded=kind == "fsdp")
    with init_runtime("cpu", "float32") as runtime:
        model = build(shape)
        if way.sharded:
            shard_model(model, runtime)
        forward = model if way.sharded else replicate_model(model, runtime)
        [adamw] = make_optimizers(model, TrainSettings())
        tokens = torch.zeros(2, shape.context, dtype=torch.long)

        def step() -> None:
            for number in range(2):
                with gradient_sync(forward, now=number == 1):
                    forward(tokens, tokens).backward()
            adamw.step()
            model.zero_grad()

        step()
        with torch.profiler.profile(record_shapes=True) as profile:
            step()
        held = [*model.parameters(), *(value for state in adamw.state.values() for value in state.values())]
        bytes_held = sum(local(tensor).nbytes for tensor in held if tensor.dim())
        expected = 12 * shape.parameters / (runtime.world_size if way.sharded else 1)
        if runtime.is_main:
            title = f"{kind}, {runtime.world_size} processes"
            print(f"| bytes of weights and AdamW's means, {title} | {expected:,.0f} | {bytes_held:,} |")
            elements = exchanged_elements(profile, runtime.world_size)
            # float32 on a CPU, and each block gathered anew for each of the two batches' backward passes
            paper = 2 * shape.parameters
            if way.sharded:
                paper = 2 * (2 * shape.layers * shape.block + shape.outside) + shape.parameters
            print(f"| numbers gathered and reduced for two batches, {title} | {paper:,} | {elements:,} |")


def exchanged_elements(profile: Any, processes: int) -> int:
    """Count the numbers of a model that collective operations brought to a process; an all-reduce brings each twice.

    gloo has no reduce-scatter, and reduces all to give each its part: that counts as one.
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
    parser.add_argument("--check", action="store_true", help="count what can be counted on a CPU")
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
