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

import torch
from torch import nn
from torch.nn import functional as F

from glyphgpt import checkpoint as checkpoints
from glyphgpt import runtime as runtimes
from glyphgpt.generate import SamplingRule, generate
from model import GPT, GPTConfig

CHARACTERS = 1000


def main() -> None:
    """Measure, and print both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder or a checkpoint")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    checkpoint = checkpoints.load(checkpoints.find(options.run), with_optimizer=False)
    with runtimes.start(options.device, options.dtype) as runtime:
        model = checkpoint.make_model(GPT, GPTConfig).to(runtime.device, runtime.dtype).eval()
        speed = CHARACTERS / seconds(lambda: stream(model, runtime.device))
        products = CHARACTERS / seconds(lambda: bare_products(model))
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


def stream(model: GPT, device: torch.device) -> None:
    """Generate text from one token on, handing each token over."""
    prompt = torch.zeros(1, dtype=torch.long, device=device)
    tokens = generate(
        model, prompt, num_samples=1, block_size=model.config.block_size, max_new_tokens=CHARACTERS,
        rule=SamplingRule(temperature=0.8), seed=0,
    )  # fmt: skip
    for token in tokens:
        token.tolist()


@torch.inference_mode()
def bare_products(model: GPT) -> None:
    """Do a token's matrix-vector products, as often as the stream does."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    weights += [model.token_embedding.weight] * (model.head is None)
    vectors = [torch.randn(1, weight.size(1), device=weight.device, dtype=weight.dtype) for weight in weights]
    for _ in range(CHARACTERS):
        for vector, weight in zip(vectors, weights, strict=True):
            F.linear(vector, weight)
    if weights[0].device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
