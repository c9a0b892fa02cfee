"""The network of model.py once more, in numpy: what a CPU decodes with.

For small networks and a token at a time, calling torch costs several times what the arithmetic does, and importing it
takes longer than most samples. Here a call costs a microsecond, and numpy is there at once. Weights are float32 and
laid out as (inputs, outputs). `tests/inference/test_numpy_gpt.py` holds it to model.py's logits in every form. Shape
letters are those of model.py.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from glyphgpt.settings import Network, Size

Array = NDArray[np.floating[Any]]
EPSILON = {"layernorm": 1e-5, "rmsnorm": 1e-6}


class Form(Network):
    """A network's config, as checkpoints hold it."""

    model_config = ConfigDict(strict=True)

    vocab_size: Size

    @property
    def small_embeddings(self) -> bool:
        """Whether embeddings begin far below a size of 1, as in model.py."""
        return self.init == "gpt2" and self.ngram == 1


class NumpyKVCache:
    """Keys and values of every layer for the tokens seen so far, and the last few tokens."""

    def __init__(self, form: Form, batch: int) -> None:
        """Begin empty, with room for block_size tokens."""
        shape = (form.n_layer, batch, 2, form.n_head, form.block_size, form.n_embd // form.n_head)
        self.memory = np.empty(shape, np.float32)  # (L, B, 2, H, S, D)
        self.last_tokens = np.empty((batch, 0), np.int64)
        self.length = 0

    def reorder(self, rows: list[int]) -> None:
        """Go on with these rows of the batch, in this order; a row may come several times."""
        seen = self.memory[..., : self.length, :]
        if len(rows) == seen.shape[1]:
            moved = [place for place, row in enumerate(rows) if place != row]
            seen[:, moved] = seen[:, [rows[place] for place in moved]]
        else:
            self.memory = np.empty((len(seen), len(rows), *self.memory.shape[2:]), np.float32)
            self.memory[..., : self.length, :] = seen[:, rows]
        self.last_tokens = self.last_tokens[rows]


class NumpyGPT:
    """A network that decodes, from a config and weights by name as a checkpoint holds them."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Array]) -> None:
        """Lay the weights out for decoding.

        Raises:
            ValueError: config and weights do not belong together.
        """
        self.form = form = check_form(config, weights)
        self.lookback = form.ngram - 1 + form.token_shift
        self.embedding = weights["token_embedding.weight"]
        self.tables = [weights[f"ngram_embedding.tables.{i}.weight"] for i in range(form.ngram - 1)]
        self.share = weights.get("token_shift.share")
        self.average = np.full((form.n_embd, 1), 1 / form.n_embd, np.float32)
        self.positions = weights.get("position.embedding.weight")
        turned = form.n_embd if form.position == "sinusoidal" else form.n_embd // form.n_head  # channels
        self.frequencies = 10000.0 ** (-2 * np.arange(turned // 2) / turned)
        self.blocks = [Block(form, weights, f"blocks.{layer}.") for layer in range(form.n_layer)]
        self.head = Linear(form, weights, "token_embedding." if form.tie_embeddings else "head.", norm="norm.")

    def new_cache(self, batch: int) -> NumpyKVCache:
        """Return an empty cache for so many samples."""
        return NumpyKVCache(self.form, batch)

    def next_logits(self, tokens: NDArray[np.int64], cache: NumpyKVCache) -> Array:
        """Return the logits (B, V) of the token after these (B, T), and after those that the cache has seen."""
        start, T = cache.length, tokens.shape[1]
        S = start + T
        x = self._embed(tokens, cache).reshape(-1, self.form.n_embd)  # (B T, C)
        rotation = self._waves(start, S) if self.form.position == "rotary" else None
        future = np.triu(np.full((T, S), -np.inf, np.float32), start + 1) if T > 1 else None
        for block, memory in zip(self.blocks, cache.memory[:, :, :, :, :S], strict=True):
            every = T if block is self.blocks[-1] else 1  # in the end, only the last of T tokens counts
            x = x[every - 1 :: every] + block.attend(x, every, memory, rotation, future)
            x += block.mlp(x)
        cache.length = S
        return self.head(x)

    def _embed(self, tokens: NDArray[np.int64], cache: NumpyKVCache) -> Array:
        """Map tokens (B, T) to the residual stream's beginning (B, T, C), with a mean of 0 if norms want that."""
        T, start = tokens.shape[1], cache.length
        if self.lookback:
            tokens = np.concatenate((cache.last_tokens, tokens), axis=1)
            cache.last_tokens = tokens[:, -self.lookback :]
        x = self.embedding[tokens]
        if self.tables:
            x = rms_norm(x + self._ngrams(tokens))
        if self.share is not None:
            x[:, 1:] += self.share * x[:, :-1].copy()
        x = x[:, -T:]
        if self.positions is not None:
            x = x + self.positions[start : start + T]
        elif self.form.position == "sinusoidal":
            waves = np.stack(self._waves(start, start + T)[::-1], axis=-1)  # (T, C / 2, 2)
            x = x * (math.sqrt(self.form.n_embd) if self.form.small_embeddings else 1) + waves.reshape(T, -1)
        if self.form.norm == "layernorm":
            x = x - x @ self.average
        return x

    def _waves(self, start: int, stop: int) -> tuple[Array, Array]:
        """Return cosine and sine of t x frequency for t from `start` up to `stop`, (stop - start, frequencies) each."""
        angle = np.outer(np.arange(start, stop), self.frequencies)
        return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    def _ngrams(self, tokens: NDArray[np.int64]) -> Array:
        """Sum up the tables' vectors for tokens (B, T), (B, T, C)."""
        key = tokens + 1
        total: Array = np.zeros(1, np.float32)
        for back, table in enumerate(self.tables, start=1):
            earlier = np.zeros_like(key)
            earlier[:, back:] = tokens[:, : max(0, tokens.shape[1] - back)] + 1
            key = key * 1_000_003 + earlier
            total = total + table[key % self.form.ngram_rows]
        return total


class Block:
    """One block's weights."""

    def __init__(self, form: Form, weights: dict[str, Array], prefix: str) -> None:
        """Pick them by name."""
        self.qk_norm = form.qk_norm
        self.qk_scale = (form.n_embd // form.n_head) ** -0.25  # of queries and keys, so that scores are divided by √D
        self.qkv = Linear(form, weights, f"{prefix}attention.qkv.", norm=f"{prefix}attention_norm.")
        if not form.qk_norm:
            self.qkv.scale(np.repeat(np.array([self.qk_scale, self.qk_scale, 1], np.float32), form.n_embd))
        self.out = Linear(form, weights, f"{prefix}attention.out.", to_stream=True)
        self.up = Linear(form, weights, f"{prefix}mlp.up.", norm=f"{prefix}mlp_norm.")
        self.down = Linear(form, weights, f"{prefix}mlp.down.", to_stream=True)
        self.activation = {"relu2": relu2, "gelu": gelu, "gelu_erf": gelu_erf}[form.activation]

    def attend(
        self, x: Array, every: int, memory: Array, rotation: tuple[Array, Array] | None, future: Array | None
    ) -> Array:
        """Return what attention adds to each `every`-th of x (B T, C); `every` is 1 or T.

        Keys and values of all of x take the last places of memory (B, 2, H, S, D).
        """
        B, _, H, _, D = memory.shape
        T = len(x) // B
        heads = self.qkv(x).reshape(B, T, 3, H, D).transpose(0, 2, 3, 1, 4)  # (B, 3, H, T, D)
        if self.qk_norm:
            heads[:, :2] = rms_norm(heads[:, :2], scale=self.qk_scale)
        if rotation:
            heads[:, :2] = rotate(heads[:, :2], *rotation)
        memory[:, :, :, -T:] = heads[:, 1:]
        scores = heads[:, 0, :, every - 1 :: every] @ memory[:, 0].swapaxes(2, 3)  # (B, H, T / every, S)
        if future is not None:
            scores += future[every - 1 :: every]
        return self.out((softmax(scores) @ memory[:, 1]).swapaxes(1, 2).reshape(-1, H * D))

    def mlp(self, x: Array) -> Array:
        """Return what the MLP adds to x (N, C)."""
        return self.down(self.activation(self.up(x)))


class Linear:
    """A matrix and perhaps a bias, after a norm if one is named, whose gain and bias they take in.

    Where norms are LayerNorms, what writes to the residual stream is centred: the stream then has a mean of 0, as every
    LayerNorm would make it, and all that is left of these is the division by the root mean square.
    """

    def __init__(
        self, form: Form, weights: dict[str, Array], prefix: str, *, norm: str = "", to_stream: bool = False
    ) -> None:
        """Pick them by name; the matrix is turned to (inputs, outputs), the faster layout."""
        matrix, bias = weights[f"{prefix}weight"], weights.get(f"{prefix}bias")
        gain, shift = weights.get(f"{norm}weight"), weights.get(f"{norm}bias")
        if shift is not None:
            bias = matrix @ shift if bias is None else bias + matrix @ shift
        if gain is not None:
            matrix = matrix * gain
        if to_stream and form.norm == "layernorm":
            matrix = matrix - matrix.mean(0)
            bias = None if bias is None else bias - bias.mean()
        self.weight, self.bias = np.ascontiguousarray(matrix.T), bias
        self.epsilon = EPSILON[form.norm] if norm else None

    def __call__(self, x: Array) -> Array:
        """Map (N, inputs) to (N, outputs)."""
        if self.epsilon is not None:
            x = rms_norm(x, self.epsilon)
        y = x.dot(self.weight)  # for a single row faster than @
        return y if self.bias is None else y + self.bias

    def scale(self, factors: Array) -> None:
        """Multiply each output by a factor of its own, (outputs,), from now on."""
        self.weight = self.weight * factors
        self.bias = None if self.bias is None else self.bias * factors


def rms_norm(x: Array, epsilon: float = EPSILON["rmsnorm"], scale: float = 1.0) -> Array:
    """Divide by the root mean square over the last axis, and multiply by a scale."""
    C = x.shape[-1]
    if x.size == C:  # a single vector, the usual case, is fastest as a number
        return x * (scale / math.sqrt(np.vdot(x, x) / C + epsilon))
    return x / np.sqrt(np.add.reduce(x * x, axis=-1, keepdims=True) * (scale**-2 / C) + scale**-2 * epsilon)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate pairs of channels of x (..., T, D) by angles (T, D / 2)."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, first * sin + second * cos), axis=-1)


def relu2(x: Array) -> Array:
    """max(0, x)²."""
    x = np.maximum(x, 0)
    return x * x


def gelu(x: Array) -> Array:
    """GELU in GPT-2's form, x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³))) / 2; few arrays are made on the way."""
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
    """GELU as it is defined, x (1 + erf(x / sqrt(2))) / 2, with erf to 1.5e-7 (Abramowitz & Stegun 1964, 7.1.26)."""
    z = np.abs(x) * math.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * z)
    factors = (-1.453152027, 1.421413741, -0.284496736, 0.254829592)
    y = np.full_like(x, 1.061405429)
    for factor in factors:
        y = y * t + factor
    erf = np.copysign(1 - y * t * np.exp(-z * z), x)
    return x * (1 + erf) * 0.5


def softmax(x: Array) -> Array:
    """Softmax over the last axis, in place."""
    x -= np.maximum.reduce(x, axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x @ np.ones((x.shape[-1], 1), np.float32)  # for few rows faster than adding up
    return x


def check_form(config: dict[str, Any], weights: dict[str, Array]) -> Form:
    """Return the form of a config, once weights are known to be those of it.

    It may come from a stranger: nothing is done in proportion to its numbers before weights have vouched for them.

    Raises:
        ValueError: config and weights do not belong together.
    """
    form = Form.model_validate(config)
    if form.model_fields_set != Form.model_fields.keys():
        raise ValueError("some of the config is missing")
    if form.n_embd % form.n_head or (form.position == "rotary" and form.n_embd // form.n_head % 2):
        raise ValueError("n_embd cannot be shared evenly by the heads")
    if form.position == "sinusoidal" and form.n_embd % 2:
        raise ValueError("an odd n_embd has no pairs for waves")
    shapes = {name: weight.shape for name, weight in weights.items()}
    if max(form.n_layer, form.ngram) > len(weights) or shapes != expected_shapes(form):
        raise ValueError("the weights are not those of the config")
    if not all(weight.dtype == np.float32 for weight in weights.values()):
        raise ValueError("the weights are not float32")
    return form


def expected_shapes(form: Form) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a form, by name."""
    C, V = form.n_embd, form.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (V, C)}
    shapes |= {f"ngram_embedding.tables.{i}.weight": (form.ngram_rows, C) for i in range(form.ngram - 1)}
    shapes |= {"token_shift.share": (C,)} if form.token_shift else {}
    shapes |= {"position.embedding.weight": (form.block_size, C)} if form.position == "learned" else {}
    shapes |= {} if form.tie_embeddings else {"head.weight": (V, C)}
    norms = ["norm"]
    for layer in range(form.n_layer):
        linear = {"attention.qkv": (3 * C, C), "attention.out": (C, C), "mlp.up": (4 * C, C), "mlp.down": (C, 4 * C)}
        for name, shape in linear.items():
            shapes[f"blocks.{layer}.{name}.weight"] = shape
            shapes |= {f"blocks.{layer}.{name}.bias": shape[:1]} if form.bias else {}
        norms += [f"blocks.{layer}.attention_norm", f"blocks.{layer}.mlp_norm"]
    if form.norm == "layernorm":
        shapes |= {f"{norm}.weight": (C,) for norm in norms}
        shapes |= {f"{norm}.bias": (C,) for norm in norms} if form.bias else {}
    return shapes
