"""Measure the generation speed of one sequence, and its upper bound from the matrix-vector products alone.

    python bench/decode_speed.py out/quick

Prints characters per second of generate(), the median of five samples of a thousand characters. The upper bound is the
speed of the matrix-vector products of each token, called one after the other. It contains the memory bandwidth and the
call overhead that any decoder pays if it makes one call for each product.
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
from glyphgpt.inference.torch_lm import TorchLM

CHARACTERS = 1000


def main() -> None:
    """Measure and print both speeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run, or a checkpoint")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    checkpoint, _ = open_checkpoint(options.run, Path("data"))
    with language_model(checkpoint, options.device, "auto", "num_samples") as model:
        block_size = checkpoint.metadata.model["block_size"]
        speed = CHARACTERS / measure_seconds(lambda: generate_characters(model, block_size))
        products = numpy_products(model) if isinstance(model, NumpyGPT) else torch_products(model)
        bound = CHARACTERS / measure_seconds(products)
    print(f"characters per second, and the upper bound from matrix products alone: {speed:.0f} {bound:.0f}")


def measure_seconds(function: Callable[[], None]) -> float:
    """Return the median time of five calls, after one warm-up call."""
    function()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return median(times)


def generate_characters(model: LanguageModel, block_size: int) -> None:
    """Generate from one token, and read every new token as a caller does."""
    params = SamplingParams(temperature=0.8)
    prompt = np.zeros(1, dtype=np.int64)
    for token in generate(
        model, prompt, num_samples=1, block_size=block_size, max_new_tokens=CHARACTERS, params=params, seed=0
    ):
        token.tolist()


def numpy_products(model: NumpyGPT) -> Callable[[], None]:
    """Return a function that computes the matrix-vector products of all tokens of a sample, in NumPy."""
    matrices = [layer.weight for block in model.blocks for layer in vars(block).values() if isinstance(layer, Linear)]
    pairs = [(np.ones((1, len(matrix)), np.float32), matrix) for matrix in [*matrices, model.head.weight]]

    def multiply() -> None:
        for _ in range(CHARACTERS):
            for vector, matrix in pairs:
                vector @ matrix

    return multiply


def torch_products(model: LanguageModel) -> Callable[[], None]:
    """Return a function that computes the matrix-vector products of all tokens of a sample, in torch."""
    assert isinstance(model, TorchLM)
    network, dtype = model.model, model.runtime.dtype
    weights = [layer.weight.to(dtype) for layer in network.modules() if isinstance(layer, nn.Linear)]
    weights += [network.token_embedding.weight.to(dtype)] * (network.head is None)
    pairs = [(torch.ones(1, weight.size(1), device=weight.device, dtype=dtype), weight) for weight in weights]

    @torch.inference_mode()
    def multiply() -> None:
        for _ in range(CHARACTERS):
            for vector, weight in pairs:
                F.linear(vector, weight)
        if model.runtime.device.type == "cuda":
            torch.cuda.synchronize()

    return multiply


if __name__ == "__main__":
    main()
