"""Decoding with the torch model. On a GPU, a step for one token of each sequence is a CUDA graph.

Without a graph, the host starts each of the hundreds of small kernels of a step, which takes longer than to run them.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from glyphgpt.gpu import CudaGraph, HostCopy, to_device, without_cudnn_attention
from glyphgpt.inference.generate import NO_TEMPERATURE, Floats, Ids, LanguageModel, SamplingParams
from glyphgpt.runtime import Runtime


class TorchLM(LanguageModel):
    """A torch model that decodes: tokens in, logits or tokens out, all of them NumPy arrays."""

    def __init__(self, model: Any, runtime: Runtime) -> None:
        """Wrap a model in evaluation mode on the runtime's device."""
        self.model, self.runtime = model, runtime

    def new_cache(self, batch: int) -> "TorchCache":
        """Return an empty cache for `batch` sequences."""
        return TorchCache(self, batch)

    @torch.inference_mode()
    def next_logits(self, tokens: Ids, cache: "TorchCache") -> NDArray[np.float32]:
        """Return the logits (B, V) of the token that follows tokens (B, T), which follow the cached ones."""
        return cache.next_logits(self.to_device(tokens)).cpu().numpy()

    @torch.inference_mode()
    def logits(self, tokens: Ids) -> NDArray[np.float32]:
        """Return the logits (B, T, V) of the token that follows each of the tokens (B, T)."""
        with self.runtime.autocast(), without_cudnn_attention():
            logits: Tensor = self.model(self.to_device(tokens))
        return logits.float().cpu().numpy()

    def sample(self, token: Ids, cache: "TorchCache", params: SamplingParams, uniforms: Floats) -> Iterator[Ids]:
        """Yield the tokens that follow one token of each sequence (B,), one for each row of random numbers (N, B).

        On a GPU the tokens are drawn on the device; the host reads each of them while the next one is computed.
        """
        if not (cache.is_graphed and uniforms.size):
            yield from super().sample(token, cache, params, uniforms)
            return
        last, numbers, copies = self.to_device(token), self.to_device(uniforms), deque[HostCopy]()
        for number in numbers:
            last = cache.sample(last, number, params)
            copies.append(HostCopy(last))
            if len(copies) > 1:
                yield np.array(copies.popleft().read())
        for copy in copies:
            yield np.array(copy.read())

    def to_device(self, array: NDArray[Any]) -> Tensor:
        """Return an array as a tensor on the device."""
        return to_device(torch.from_numpy(array), self.runtime.device)


class TorchCache:
    """The keys and values of the tokens seen so far, and the CUDA graphs that add a token to them."""

    def __init__(self, lm: TorchLM, batch: int) -> None:
        """Create an empty cache for `batch` sequences."""
        self.model, self.runtime = lm.model, lm.runtime
        on_gpu = self.runtime.device.type == "cuda"
        self.kv = lm.model.new_cache(batch, self.runtime.dtype if on_gpu else torch.float32)
        self.is_graphed = on_gpu and self.runtime.world_size == 1  # a sharded model gathers its weights at each step
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Have the step captured anew, as the cache has moved."""
        self.graph = CudaGraph(enabled=self.is_graphed)
        self.sampling_graph = CudaGraph(enabled=self.is_graphed)

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
            self.forget_graphs()

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, V), float32, of the token that follows tokens (B, T), which follow the cached ones."""
        return self.step(tokens) if tokens.size(1) > 1 else self.graph.call(self.step, tokens)

    @torch.inference_mode()
    def sample(self, token: Tensor, number: Tensor, params: SamplingParams) -> Tensor:
        """Add one token of each sequence (B,); return the next one, drawn with a random number for each (B,).

        `params` must be the same at every call.
        """

        def step_and_draw(token: Tensor, number: Tensor) -> Tensor:
            return draw(self.step(token[:, None]), number, params)

        return self.sampling_graph.call(step_and_draw, token, number)

    def step(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, V), float32, of the token that follows tokens (B, T), and add these to the cache."""
        with self.runtime.autocast(), without_cudnn_attention():
            logits: Tensor = self.model.next_logits(tokens, self.kv)
        return logits.float()


def draw(logits: Tensor, uniform: Tensor, params: SamplingParams) -> Tensor:
    """Return a token for each row of logits (B, V) and each random number (B,), shape (B,).

    Up to rounding, it is that of `SamplingParams.sample`.
    """
    if params.temperature < NO_TEMPERATURE:
        return logits.argmax(-1)
    sums = filtered_probs(logits.double(), params).cumsum(-1)  # (B, V)
    return (sums < uniform[:, None] * sums[:, -1:]).sum(-1)


def filtered_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Map logits (B, V) to unnormalized probabilities (B, V), as `SamplingParams.probs` does."""
    probs = ((logits - logits.amax(-1, keepdim=True)) / params.temperature).exp()
    if 0 < params.top_k < logits.size(-1):
        probs = probs.where(probs >= probs.topk(params.top_k).values[:, -1:], 0)
    if params.top_p < 1:
        probs = probs / probs.sum(-1, keepdim=True)
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        reached = ordered.cumsum(-1) - ordered >= params.top_p  # by the tokens before this one
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.where(~reached, 0))
    if params.min_p > 0:
        probs = probs.where(probs >= params.min_p * probs.amax(-1, keepdim=True), 0)
    return probs


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Convert the weights of a model's matrix products to a dtype, which autocast would otherwise do at each token.

    A head that shares the token embedding's weights gets its own, as embeddings stay as they are.
    """
    if model.head is None and dtype != torch.float32:
        vocab_size, channels = model.token_embedding.weight.shape
        model.head = nn.Linear(channels, vocab_size, bias=False, device="meta")
        model.head.weight = nn.Parameter(model.token_embedding.weight.to(dtype, copy=True))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
