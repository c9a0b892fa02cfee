"""The network of model.py in NumPy, for decoding on a CPU.

A small network decodes one token at a time. At that size, calling torch takes several times as long as the arithmetic,
and importing it takes longer than most samples; a NumPy call takes a microsecond. Weights are float32 and stored as
(inputs, outputs). tests/inference/test_numpy_gpt.py compares the logits with model.py's for every switch. The shape
letters are those of model.py.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glyphgpt.checkpoint import Arrays
from glyphgpt.inference.generate import LanguageModel
from glyphgpt.settings import ModelConfig

Array = NDArray[np.floating[Any]]
EPSILON = {"layernorm": 1e-5, "rmsnorm": 1e-6}


class NumpyKVCache:
    """Keys and values of every layer for the tokens seen so far, and the last few tokens."""

    def __init__(self, config: ModelConfig, batch: int) -> None:
        """Create an empty cache with room for block_size tokens."""
        shape = (config.n_layer, batch, 2, config.n_head, config.block_size, config.head_size)
        self.keys_values = np.empty(shape, np.float32)  # (layers, B, 2, H, block_size, D)
        self.last_tokens = np.empty((batch, 0), np.int64)
        self.length = 0

    def clear(self) -> None:
        """Forget all tokens."""
        self.last_tokens = self.last_tokens[:, :0]
        self.length = 0

    def reorder(self, rows: list[int]) -> None:
        """Replace the batch by these rows of it, in this order; a row may be repeated or left out."""
        seen = self.keys_values[..., : self.length, :]
        if len(rows) == seen.shape[1]:
            moved = [target for target, row in enumerate(rows) if target != row]
            seen[:, moved] = seen[:, [rows[target] for target in moved]]
        else:
            self.keys_values = np.empty((len(seen), len(rows), *self.keys_values.shape[2:]), np.float32)
            self.keys_values[..., : self.length, :] = seen[:, rows]
        self.last_tokens = self.last_tokens[rows]


class NumpyGPT(LanguageModel):
    """A network for decoding, built from the config and the weights of a checkpoint."""

    def __init__(self, config: ModelConfig, weights: Arrays) -> None:
        """Prepare the weights for decoding. They must match the config, which `Checkpoint.config` checks."""
        self.config = config
        self.lookback = config.ngram - 1 + config.token_shift
        self.embedding = weights["token_embedding.weight"]
        self.tables = [weights[f"ngram_embedding.tables.{i}.weight"] for i in range(config.ngram - 1)]
        self.mix = weights.get("token_shift.mix")
        self.average = np.full((config.n_embd, 1), 1 / config.n_embd, np.float32)
        self.positions = weights.get("position.embedding.weight")
        self.blocks = [Block(config, weights, f"blocks.{layer}.") for layer in range(config.n_layer)]
        self.head = Linear(config, weights, "token_embedding." if config.tie_embeddings else "head.", norm="norm.")

    def new_cache(self, batch: int) -> NumpyKVCache:
        """Return an empty cache for `batch` sequences."""
        return NumpyKVCache(self.config, batch)

    def next_logits(self, tokens: NDArray[np.int64], cache: NumpyKVCache) -> Array:
        """Return the logits (B, V) of the token that follows tokens (B, T), which follow the cached ones."""
        return self._logits(tokens, cache, slice(tokens.shape[1] - 1, None, tokens.shape[1]))

    def logits(self, tokens: NDArray[np.int64]) -> Array:
        """Return the logits (B, T, V) of the token that follows each of the tokens (B, T)."""
        return self._logits(tokens, self.new_cache(len(tokens)), slice(None)).reshape(*tokens.shape, -1)

    def _logits(self, tokens: NDArray[np.int64], cache: NumpyKVCache, keep: slice) -> Array:
        """Return the logits after the rows `keep` of tokens (B T): all, or the last token of each sequence."""
        start, T = cache.length, tokens.shape[1]
        S = start + T
        x = self._embed(tokens, cache).reshape(-1, self.config.n_embd)  # (B T, C)
        rotation = position_waves(start, S, self.config.head_size) if self.config.position == "rotary" else None
        mask = np.triu(np.full((T, S), -np.inf, np.float32), start + 1) if T > 1 else None
        for block, keys_values in zip(self.blocks, cache.keys_values[:, :, :, :, :S], strict=True):
            rows = keep if block is self.blocks[-1] else slice(None)
            x = x[rows] + block.attention(x, rows, keys_values, rotation, mask)
            x += block.mlp(x)
        cache.length = S
        return self.head(x)

    def _embed(self, tokens: NDArray[np.int64], cache: NumpyKVCache) -> Array:
        """Map tokens (B, T) to the input of the first block, (B, T, C), centered if the norms are LayerNorms."""
        T, start = tokens.shape[1], cache.length
        if self.lookback:
            tokens = np.concatenate((cache.last_tokens, tokens), axis=1)
            cache.last_tokens = tokens[:, -self.lookback :]
        x = self.embedding[tokens]
        if self.tables:
            x = rms_norm(x + self._ngrams(tokens))
        if self.mix is not None:
            x[:, 1:] += self.mix * x[:, :-1].copy()
        x = x[:, -T:]
        if self.positions is not None:
            x = x + self.positions[start : start + T]
        elif self.config.position == "sinusoidal":
            x = x * self.config.embedding_scale + sinusoids(start, start + T, self.config.n_embd)
        if self.config.norm == "layernorm":
            x = x - x @ self.average
        return x

    def _ngrams(self, tokens: NDArray[np.int64]) -> Array:
        """Return the sum of the n-gram tables' vectors for tokens (B, T), (B, T, C)."""
        key = tokens + 1  # as in model.py
        total: Array = np.zeros(1, np.float32)
        for back, table in enumerate(self.tables, start=1):
            earlier = np.zeros_like(key)
            earlier[:, back:] = tokens[:, : max(0, tokens.shape[1] - back)] + 1
            key = key * 1_000_003 + earlier
            total = total + table[key % self.config.ngram_rows]
        return total


class Block:
    """The weights of one block."""

    def __init__(self, config: ModelConfig, weights: Arrays, prefix: str) -> None:
        """Select the weights whose names start with `prefix`."""
        self.qk_norm = config.qk_norm
        self.qk_scale = config.head_size**-0.25  # of queries and of keys, so that scores are divided by √D
        self.qkv = Linear(config, weights, f"{prefix}attention.qkv.", norm=f"{prefix}attention_norm.")
        if not config.qk_norm:
            self.qkv.scale(np.repeat(np.array([self.qk_scale, self.qk_scale, 1], np.float32), config.n_embd))
        self.out = Linear(config, weights, f"{prefix}attention.out.", centered=True)
        self.up = Linear(config, weights, f"{prefix}mlp.up.", norm=f"{prefix}mlp_norm.")
        self.down = Linear(config, weights, f"{prefix}mlp.down.", centered=True)
        self.activation = {"relu2": relu2, "gelu": gelu, "gelu_erf": gelu_erf}[config.activation]

    def attention(
        self, x: Array, keep: slice, keys_values: Array, rotation: tuple[Array, Array] | None, mask: Array | None
    ) -> Array:
        """Return the output of attention for the rows `keep` of x (B T, C): all, or the last token of each sequence.

        The keys and values of all rows are written to the last T positions of keys_values (B, 2, H, S, D).
        """
        B, _, H, _, D = keys_values.shape
        T = len(x) // B
        qkv = self.qkv(x).reshape(B, T, 3, H, D).transpose(0, 2, 3, 1, 4)  # (B, 3, H, T, D)
        if self.qk_norm:
            qkv[:, :2] = rms_norm(qkv[:, :2], scale=self.qk_scale)
        if rotation:
            qkv[:, :2] = rotate(qkv[:, :2], *rotation)
        keys_values[:, :, :, -T:] = qkv[:, 1:]
        scores = qkv[:, 0, :, keep] @ keys_values[:, 0].swapaxes(2, 3)  # (B, H, T or 1, S)
        if mask is not None:
            scores += mask[keep]
        return self.out((softmax(scores) @ keys_values[:, 1]).swapaxes(1, 2).reshape(-1, H * D))

    def mlp(self, x: Array) -> Array:
        """Return the output of the MLP for x (N, C)."""
        return self.down(self.activation(self.up(x)))


class Linear:
    """A linear layer, with the gain and bias of the norm before it folded into its own weights.

    In a network with LayerNorms, the outputs that are added to the residual stream are centered. The stream then always
    has a mean of 0, and a LayerNorm reduces to the division by the root mean square.
    """

    def __init__(
        self, config: ModelConfig, weights: Arrays, prefix: str, *, norm: str = "", centered: bool = False
    ) -> None:
        """Select the weights whose names start with `prefix` and `norm`, and transpose them, which is faster."""
        matrix, bias = weights[f"{prefix}weight"], weights.get(f"{prefix}bias")
        gain, shift = weights.get(f"{norm}weight"), weights.get(f"{norm}bias")
        if shift is not None:
            bias = matrix @ shift if bias is None else bias + matrix @ shift
        if gain is not None:
            matrix = matrix * gain
        if centered and config.norm == "layernorm":
            matrix = matrix - matrix.mean(0)
            bias = None if bias is None else bias - bias.mean()
        self.weight, self.bias = np.ascontiguousarray(matrix.T), bias
        self.epsilon = EPSILON[config.norm] if norm else None

    def __call__(self, x: Array) -> Array:
        """Map (N, inputs) to (N, outputs)."""
        if self.epsilon is not None:
            x = rms_norm(x, self.epsilon)
        y = x.dot(self.weight)  # for a single row faster than @
        return y if self.bias is None else y + self.bias

    def scale(self, factors: Array) -> None:
        """Multiply each output by its factor, (outputs,), from now on."""
        self.weight = self.weight * factors
        self.bias = None if self.bias is None else self.bias * factors


def position_waves(start: int, stop: int, channels: int) -> tuple[Array, Array]:
    """Return cosine and sine of t / 10000^(2i / channels) for positions start <= t < stop, (T, channels / 2) each."""
    frequency = 10000.0 ** (-2 * np.arange(channels // 2) / channels)
    angle = np.outer(np.arange(start, stop), frequency)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def sinusoids(start: int, stop: int, channels: int) -> Array:
    """Return the sinusoidal position encodings of positions start <= t < stop, (T, channels)."""
    cos, sin = position_waves(start, stop, channels)
    return np.stack((sin, cos), axis=-1).reshape(stop - start, channels)


def rms_norm(x: Array, epsilon: float = EPSILON["rmsnorm"], scale: float = 1.0) -> Array:
    """Divide by the root mean square over the last axis, and multiply by a scale."""
    C = x.shape[-1]
    if x.size == C:  # for a single vector, the usual case, a scalar computation is fastest
        return x * (scale / math.sqrt(np.vdot(x, x) / C + epsilon))
    return x / np.sqrt(np.add.reduce(x * x, axis=-1, keepdims=True) * (scale**-2 / C) + scale**-2 * epsilon)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate pairs of channels of x (..., T, D) by angles whose cosine and sine are (T, D / 2)."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, first * sin + second * cos), axis=-1)


def relu2(x: Array) -> Array:
    """Return max(0, x)²."""
    x = np.maximum(x, 0)
    return x * x


def gelu(x: Array) -> Array:
    """Return GELU in GPT-2's approximation, x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³))) / 2, with few temporaries."""
    y = x * x
    y *= 0.044715 * math.sqrt(2 / math.pi)
    y += math.sqrt(2 / math.pi)
    y *= x
    np.tanh(y, out=y)
    y += 1
    y *= x
    y *= 0.5
    return y


def gelu_erf(x: Array) -> Array:
    """Return exact GELU, x (1 + erf(x / sqrt(2))) / 2, with erf to 1.5e-7 (Abramowitz & Stegun 1964, 7.1.26)."""
    z = np.abs(x) * math.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * z)
    factors = (-1.453152027, 1.421413741, -0.284496736, 0.254829592)
    y = np.full_like(x, 1.061405429)
    for factor in factors:
        y = y * t + factor
    erf = np.copysign(1 - y * t * np.exp(-z * z), x)
    return x * (1 + erf) * 0.5


def softmax(x: Array) -> Array:
    """Return the softmax over the last axis, computed in place."""
    x -= np.maximum.reduce(x, axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x @ np.ones((x.shape[-1], 1), np.float32)  # for few rows faster than a sum
    return x
