"""Decoding with the torch model. On a GPU, a step for one token of each sequence is a CUDA graph.

Without a graph, the host starts each of the hundreds of small kernels of a step, which takes longer than to run them.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glyphgpt.gpu import to_device, without_cudnn_attention
from glyphgpt.runtime import Runtime

WARM_UP_STEPS = 2
"""Steps before the one that is captured, in which libraries allocate their memory."""


class TorchLM:
    """A torch model as a `LanguageModel` for generation: tokens in, logits out, both NumPy arrays."""

    def __init__(self, model: Any, runtime: Runtime) -> None:
        """Wrap a model in evaluation mode on the runtime's device."""
        self.model, self.runtime = model, runtime

    def new_cache(self, batch: int) -> "TorchCache":
        """Return an empty cache for `batch` sequences."""
        return TorchCache(self, batch)

    @torch.inference_mode()
    def next_logits(self, tokens: NDArray[np.int64], cache: "TorchCache") -> NDArray[np.float32]:
        """Return the logits (B, V) of the token that follows tokens (B, T), which follow the cached ones."""
        return cache.next_logits(to_device(torch.from_numpy(tokens), self.runtime.device)).cpu().numpy()

    @torch.inference_mode()
    def logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits (B, T, V) of the token that follows each of the tokens (B, T)."""
        with self.runtime.autocast(), without_cudnn_attention():
            logits: Tensor = self.model(to_device(torch.from_numpy(tokens), self.runtime.device))
        return logits.float().cpu().numpy()


class TorchCache:
    """The keys and values of the tokens seen so far, and the CUDA graph that adds a token to them."""

    def __init__(self, lm: TorchLM, batch: int) -> None:
        """Create an empty cache for `batch` sequences."""
        self.model, self.runtime = lm.model, lm.runtime
        on_gpu = self.runtime.device.type == "cuda"
        self.kv = lm.model.new_cache(batch, self.runtime.dtype if on_gpu else torch.float32)
        self.can_capture = on_gpu and self.runtime.world_size == 1  # a sharded model gathers its weights at each step
        self.tokens = self.logits = torch.empty(0)  # what the graph reads, and what it writes
        self.forget_graph()

    def forget_graph(self) -> None:
        """Have the step captured anew, as the cache has moved."""
        self.graph: Any = None
        self.steps = 0  # with the present tensors

    @torch.inference_mode()
    def clear(self) -> None:
        """Forget all tokens."""
        self.kv.clear()

    @torch.inference_mode()
    def reorder(self, rows: list[int]) -> None:
        """Replace the batch by these rows of it, in this order; a row may be repeated or left out."""
        before = self.kv.keys
        self.kv.reorder(to_device(torch.tensor(rows), self.runtime.device))
        if self.kv.keys is not before:
            self.forget_graph()

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, V), float32, of the token that follows tokens (B, T), which follow the cached ones."""
        if tokens.size(1) > 1 or not self.can_capture:
            return self.step(tokens)
        self.steps += 1
        if self.steps <= WARM_UP_STEPS:
            return self.step(tokens)
        if self.graph is None:
            self.tokens, self.graph = tokens.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.step(self.tokens)
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits

    def step(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, V), float32, of the token that follows tokens (B, T), and add these to the cache."""
        with self.runtime.autocast(), without_cudnn_attention():
            logits: Tensor = self.model.next_logits(tokens, self.kv)
        return logits.float()
