"""Measure one stream of text from a checkpoint, and what its matrix products alone would allow.

    python bench/decode_speed.py out/quick

Prints characters per second of generate(), the median of five times a thousand characters, and how many there would be
if a token took no more than its matrix-vector products, called one after the other: the limit that the memory's
bandwidth and the overhead of calls set for anything that calls torch once per product.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from glyphgpt.inference.generate import LanguageModel, SamplingParams, generate
from glyphgpt.inference.loading import language_model, open_checkpoint
from glyphgpt.inference.numpy_gpt import Linear, NumpyGPT
from glyphgpt.runtime import TorchLM

CHARACTERS = 1000


def main() -> None:
    """Measure, and print both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder or a checkpoint")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    checkpoint, _ = open_checkpoint(options.run, Path("data"))
    with language_model(checkpoint, options.device, "auto", "num_samples") as model:
        block_size = checkpoint.metadata.model["block_size"]
        speed = CHARACTERS / seconds(lambda: stream(model, block_size))
        products = CHARACTERS / seconds(
            products_in_numpy(model) if isinstance(model, NumpyGPT) else products_in_torch(model)
        )
    print(f"characters per second, and at most, from matrix products alone: {speed:.0f} {products:.0f}")


def seconds(work: Callable[[], None]) -> float:
    """Return the median time of five calls, after one to warm up."""
    work()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times)


def stream(model: LanguageModel, block_size: int) -> None:
    """Generate text from one token on, handing each token over."""
    rule = SamplingParams(temperature=0.8)
    prompt = np.zeros(1, dtype=np.int64)
    for token in generate(
        model, prompt, num_samples=1, block_size=block_size, max_new_tokens=CHARACTERS, params=rule, seed=0
    ):
        token.tolist()


def products_in_numpy(model: NumpyGPT) -> Callable[[], None]:
    """Return a function that does a token's matrix-vector products, as often as the stream does."""
    matrices = [layer.weight for block in model.blocks for layer in vars(block).values() if isinstance(layer, Linear)]
    pairs = [(np.ones((1, len(matrix)), np.float32), matrix) for matrix in [*matrices, model.head.weight]]

    def work() -> None:
        for _ in range(CHARACTERS):
            for vector, matrix in pairs:
                vector @ matrix

    return work


def products_in_torch(model: LanguageModel) -> Callable[[], None]:
    """Return the same for a torch model on its device."""
    assert isinstance(model, TorchLM)
    network, dtype = model.model, model.runtime.dtype
    weights = [layer.weight.to(dtype) for layer in network.modules() if isinstance(layer, nn.Linear)]
    weights += [network.token_embedding.weight.to(dtype)] * (network.head is None)
    pairs = [(torch.ones(1, weight.size(1), device=weight.device, dtype=dtype), weight) for weight in weights]

    @torch.inference_mode()
    def work() -> None:
        for _ in range(CHARACTERS):
            for vector, weight in pairs:
                F.linear(vector, weight)
        if model.runtime.device.type == "cuda":
            torch.cuda.synchronize()

    return work


if __name__ == "__main__":
    main()
