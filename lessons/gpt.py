"""A whole GPT by hand: the forward and backward pass of every layer, and the optimizer, in matrix products.

    python lessons/gpt.py             learns to count from 100 to 999, in half a minute on one core
    python lessons/gpt.py my.txt      learns your text, of a few thousand characters

After training, it continues 390 391 392 393 394 395 396 397 with 398 399 400 401 402 and so on.

The network is that of model.py in GPT-2's form, and its parameters have the same names and shapes.
tests/lessons/test_lessons.py compares logits, loss and every gradient with those of model.py. Shape letters are those
of model.py: B batch, T time, C channels, H heads, D = C / H head size, V vocabulary. K and J are the numbers of inputs
and outputs of a linear layer.

`dx` denotes ∂loss/∂x: how the loss changes with each number of x. It has the shape of x. The `forward` of a layer
stores what its `backward` needs. `backward` takes dy, the gradient of the layer's output, stores the gradients of the
layer's parameters in `grads`, and returns dx, the gradient of its input, for the layer before. Three rules give nearly
every gradient:

    y = x Wᵀ        dx = dy W and dW = dyᵀ x: the shapes allow no other product
    y = f(x)        dx = dy f'(x), element by element (the chain rule)
    x used twice    dx is the sum of the gradients of both uses; every token uses a bias, so db is a sum over tokens
"""

import argparse
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from glyphgpt.errors import UsageError, UserError, exit_on_error

Array = NDArray[np.float64]
Ids = NDArray[np.int64]
Arrays = dict[str, Array]

BATCH_SIZE = 16
EPSILON = 1e-5  # keeps layer norm from dividing by 0


def flatten(x: Array) -> Array:
    """Return x (B, T, C) as a matrix with one row for each token, (BT, C)."""
    return x.reshape(-1, x.shape[-1])


def softmax(x: Array) -> Array:
    """Return exp(x) / Σ exp(x) of each row of x (..., V): positive numbers that sum to 1."""
    e = np.exp(x - x.max(-1, keepdims=True))  # subtracting the maximum prevents overflow, and cancels out
    return e / e.sum(-1, keepdims=True)  # (..., V)


class Layer:
    """A layer with a weight and a bias, which are stored by name in `params`, and their gradients in `grads`."""

    def __init__(self, params: Arrays, grads: Arrays, name: str) -> None:
        self.params, self.grads, self.weight, self.bias = params, grads, f"{name}.weight", f"{name}.bias"


class Linear(Layer):
    """J weighted sums of K channels: y = x Wᵀ + b."""

    def forward(self, x: Array) -> Array:
        """Map (B, T, K) to (B, T, J)."""
        self.x = x  # (B, T, K)
        return x @ self.params[self.weight].T + self.params[self.bias]  # (B, T, K) @ (K, J) + (J,) = (B, T, J)

    def backward(self, dy: Array) -> Array:
        """Map (B, T, J) to (B, T, K)."""
        self.grads[self.weight] = flatten(dy).T @ flatten(self.x)  # dW = dyᵀ x: (J, BT) @ (BT, K) = (J, K)
        self.grads[self.bias] = flatten(dy).sum(0)  # db = Σ dy over all tokens: (J,)
        return dy @ self.params[self.weight]  # dx = dy W: (B, T, J) @ (J, K) = (B, T, K)


class LayerNorm(Layer):
    """Normalizes each token's channels to mean 0 and variance 1: y = x̂ w + b with x̂ = (x - μ) / σ."""

    def forward(self, x: Array) -> Array:
        """Map (B, T, C) to (B, T, C)."""
        centered = x - x.mean(-1, keepdims=True)  # x - μ: (B, T, C) - (B, T, 1)
        self.sigma = np.sqrt((centered**2).mean(-1, keepdims=True) + EPSILON)  # σ: (B, T, 1)
        self.x_hat = centered / self.sigma  # x̂: (B, T, C)
        return self.x_hat * self.params[self.weight] + self.params[self.bias]  # (B, T, C) * (C,) + (C,)

    def backward(self, dy: Array) -> Array:
        """Map (B, T, C) to (B, T, C)."""
        self.grads[self.weight] = flatten(dy * self.x_hat).sum(0)  # dw = Σ dy x̂ over all tokens: (C,)
        self.grads[self.bias] = flatten(dy).sum(0)  # db = Σ dy over all tokens: (C,)
        dx_hat = dy * self.params[self.weight]  # dx̂ = dy w: (B, T, C)
        # Shifting or scaling x leaves x̂ unchanged, so the loss has no slope in these two directions. The backward pass
        # subtracts the components of dx̂ along them: dx = (dx̂ - mean(dx̂) - x̂ mean(dx̂ x̂)) / σ
        shift, scale = dx_hat.mean(-1, keepdims=True), (dx_hat * self.x_hat).mean(-1, keepdims=True)  # (B, T, 1) each
        return (dx_hat - shift - self.x_hat * scale) / self.sigma  # (B, T, C)


class GELU:
    """A smooth gate that passes large x and blocks very negative x: y = x (1 + t) / 2 with t = tanh(c x (1 + a x²))."""

    a, c = 0.044715, math.sqrt(2 / math.pi)  # Hendrycks & Gimpel 2016

    def forward(self, x: Array) -> Array:
        """Map (B, T, 4C) to (B, T, 4C)."""
        self.x, self.t = x, np.tanh(self.c * x * (1 + self.a * x**2))  # (B, T, 4C) each
        return x * (1 + self.t) / 2  # (B, T, 4C)

    def backward(self, dy: Array) -> Array:
        """Map (B, T, 4C) to (B, T, 4C)."""
        slope = (1 - self.t**2) * self.c * (1 + 3 * self.a * self.x**2)  # t' = (1 - t²) c (1 + 3 a x²): (B, T, 4C)
        return dy * (1 + self.t + self.x * slope) / 2  # dx = dy (1 + t + x t') / 2: (B, T, 4C)


class Attention:
    """Causal self-attention: each token gathers values v from itself and the past where its query q matches a key k."""

    def __init__(self, params: Arrays, grads: Arrays, name: str, n_head: int) -> None:
        self.qkv, self.out = Linear(params, grads, f"{name}.qkv"), Linear(params, grads, f"{name}.out")
        self.n_head = n_head

    def forward(self, x: Array) -> Array:
        """Map (B, T, C) to (B, T, C)."""
        B, T, C = x.shape
        D = C // self.n_head
        qkv = self.qkv.forward(x).reshape(B, T, 3, self.n_head, D)  # (B, T, 3C) = (B, T, 3, H, D)
        self.q, self.k, self.v = q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # (3, B, H, T, D): (B, H, T, D) each
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(D)  # S = q kᵀ / √D: (B, H, T, D) @ (B, H, D, T) = (B, H, T, T)
        scores[..., np.triu(np.ones((T, T), bool), k=1)] = -np.inf  # the future is above the diagonal
        self.weights = softmax(scores)  # A = softmax(S), each row sums to 1: (B, H, T, T)
        mixed = self.weights @ v  # A v: (B, H, T, T) @ (B, H, T, D) = (B, H, T, D)
        return self.out.forward(mixed.swapaxes(1, 2).reshape(B, T, C))  # (B, T, H, D) = (B, T, C)

    def backward(self, dy: Array) -> Array:
        """Map (B, T, C) to (B, T, C)."""
        B, T, C = dy.shape
        D = C // self.n_head
        dmixed = self.out.backward(dy).reshape(B, T, self.n_head, D).swapaxes(1, 2)  # d(A v): (B, H, T, D)
        dv = self.weights.swapaxes(-1, -2) @ dmixed  # dv = Aᵀ d(A v): (B, H, T, T) @ (B, H, T, D) = (B, H, T, D)
        dweights = dmixed @ self.v.swapaxes(-1, -2)  # dA = d(A v) vᵀ: (B, H, T, D) @ (B, H, D, T) = (B, H, T, T)
        # Softmax: dS = A (dA - Σ dA A), (B, H, T, T). A row of A always sums to 1, so a constant added to a row of dA
        # must not matter; the subtracted mean, weighted by A, removes it. Where the mask made A 0, dS is 0 too.
        dscores = self.weights * (dweights - (dweights * self.weights).sum(-1, keepdims=True))
        dq = dscores @ self.k / math.sqrt(D)  # dq = dS k / √D: (B, H, T, T) @ (B, H, T, D) = (B, H, T, D)
        dk = dscores.swapaxes(-1, -2) @ self.q / math.sqrt(D)  # dk = dSᵀ q / √D: (B, H, T, D)
        dqkv = np.stack((dq, dk, dv)).transpose(1, 3, 0, 2, 4)  # (3, B, H, T, D) -> (B, T, 3, H, D)
        return self.qkv.backward(dqkv.reshape(B, T, 3 * C))  # (B, T, C)


class Block:
    """Attention, which mixes tokens, then an MLP on each token; both add to the residual stream x."""

    def __init__(self, params: Arrays, grads: Arrays, name: str, n_head: int) -> None:
        self.attention_norm = LayerNorm(params, grads, f"{name}.attention_norm")
        self.attention = Attention(params, grads, f"{name}.attention", n_head)
        self.mlp_norm = LayerNorm(params, grads, f"{name}.mlp_norm")
        self.up, self.down = Linear(params, grads, f"{name}.mlp.up"), Linear(params, grads, f"{name}.mlp.down")
        self.gelu = GELU()

    def forward(self, x: Array) -> Array:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.attention.forward(self.attention_norm.forward(x))  # (B, T, C)
        hidden = self.gelu.forward(self.up.forward(self.mlp_norm.forward(x)))  # (B, T, 4C)
        return x + self.down.forward(hidden)  # (B, T, C)

    def backward(self, dy: Array) -> Array:
        """Map (B, T, C) to (B, T, C). Each + of `forward` uses x twice, so the gradients of both uses add up."""
        dhidden = self.down.backward(dy)  # (B, T, 4C)
        dx = dy + self.mlp_norm.backward(self.up.backward(self.gelu.backward(dhidden)))  # (B, T, C)
        return dx + self.attention_norm.backward(self.attention.backward(dx))  # (B, T, C)


class GPT:
    """The network: tokens in, logits of the next token out, at every position."""

    def __init__(self, params: Arrays, n_layer: int, n_head: int) -> None:
        """Take parameters by name, from `init_params` or as float64 arrays from the state_dict of model.py."""
        self.params: Arrays = params
        self.grads: Arrays = {}
        self.blocks = [Block(self.params, self.grads, f"blocks.{layer}", n_head) for layer in range(n_layer)]
        self.norm = LayerNorm(self.params, self.grads, "norm")

    def forward(self, tokens: Ids) -> Array:
        """Map tokens (B, T) to logits (B, T, V)."""
        self.tokens = tokens  # (B, T)
        E = self.params["token_embedding.weight"]  # (V, C)
        P = self.params["position.embedding.weight"]  # (block_size, C)
        x = E[tokens] + P[: tokens.shape[1]]  # each token's row of E and its position's row of P: (B, T, C) + (T, C)
        for block in self.blocks:
            x = block.forward(x)  # (B, T, C)
        self.hidden = self.norm.forward(x)  # h: (B, T, C)
        return self.hidden @ E.T  # the dot product of h with each token's row: (B, T, C) @ (C, V) = (B, T, V)

    def backward(self, dlogits: Array) -> Arrays:
        """Return the gradient of every parameter, given that of the logits (B, T, V)."""
        E = self.params["token_embedding.weight"]  # (V, C)
        P = self.params["position.embedding.weight"]  # (block_size, C)
        dE = flatten(dlogits).T @ flatten(self.hidden)  # dE = dlogitsᵀ h: (V, BT) @ (BT, C) = (V, C)
        dx = self.norm.backward(dlogits @ E)  # dh = dlogits E: (B, T, V) @ (V, C) = (B, T, C)
        for block in reversed(self.blocks):
            dx = block.backward(dx)  # (B, T, C)
        np.add.at(dE, self.tokens, dx)  # the first use of E: each row adds up dx wherever its token occurs
        dP = np.zeros_like(P)  # positions from T on are unused: gradient 0
        dP[: dx.shape[1]] = dx.sum(0)  # every sequence uses the same rows of P: (T, C)
        self.grads["token_embedding.weight"], self.grads["position.embedding.weight"] = dE, dP
        return self.grads


def cross_entropy(logits: Array, targets: Ids) -> tuple[float, Array]:
    """Return the mean loss in nats per token, and its gradient (B, T, V), of logits (B, T, V) and targets (B, T)."""
    z, N = flatten(logits - logits.max(-1, keepdims=True)), targets.size  # (BT, V), and N = BT
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))  # ln p = z - ln Σ exp z, p = softmax(z): (BT, V)
    target_entries = np.arange(N), targets.ravel()  # row and column of each target
    loss = -log_p[target_entries].mean()  # loss = -Σ ln p[target] / N
    d = np.exp(log_p)  # p: (BT, V)
    d[target_entries] -= 1  # p - y, where y is 1 at the target and 0 elsewhere
    return float(loss), (d / N).reshape(logits.shape)  # dlogits = (p - y) / N: (B, T, V)


class AdamW:
    """Gradient descent on the running mean m of the gradients, divided by √v (Loshchilov & Hutter 2017).

    v is the running mean of the squared gradients, so each number of a parameter takes steps of about the same size.
    """

    def __init__(self, beta1: float = 0.9, beta2: float = 0.99, weight_decay: float = 0.1) -> None:
        """Set the decay rates β₁ and β₂ of the running means, and the weight decay λ of matrices."""
        self.beta1, self.beta2, self.weight_decay, self.steps = beta1, beta2, weight_decay, 0
        self.m: Arrays = {}
        self.v: Arrays = {}

    def update(self, params: Arrays, grads: Arrays, learning_rate: float) -> None:
        """Update every parameter with its gradient, in place of the old one in `params`."""
        self.steps += 1
        for name, w in params.items():  # m, v, g and w have the same shape
            g = grads[name]
            self.m[name] = self.beta1 * self.m.get(name, 0) + (1 - self.beta1) * g  # m ← β₁ m + (1 - β₁) g
            self.v[name] = self.beta2 * self.v.get(name, 0) + (1 - self.beta2) * g**2  # v ← β₂ v + (1 - β₂) g²
            m = self.m[name] / (1 - self.beta1**self.steps)  # corrects the bias of running means that began at 0
            v = self.v[name] / (1 - self.beta2**self.steps)
            decay = self.weight_decay if w.ndim >= 2 else 0  # λ applies to matrices and embeddings only
            params[name] = w - learning_rate * (m / (np.sqrt(v) + 1e-8) + decay * w)  # w ← w - η (m / √v + λ w)


def init_params(V: int, block_size: int, n_layer: int, C: int, rng: np.random.Generator) -> Arrays:
    """Return GPT-2's initial parameters: biases 0, gains of norms 1, other weights normal with standard deviation 0.02.

    The standard deviation is smaller, 0.02 / √(2 n_layer), for the layers that add to the residual stream.
    """
    shapes = {"token_embedding": (V, C), "position.embedding": (block_size, C), "norm": (C,)}
    for block in (f"blocks.{layer}" for layer in range(n_layer)):
        shapes |= {f"{block}.attention_norm": (C,), f"{block}.mlp_norm": (C,)}
        shapes |= {f"{block}.attention.qkv": (3 * C, C), f"{block}.attention.out": (C, C)}
        shapes |= {f"{block}.mlp.up": (4 * C, C), f"{block}.mlp.down": (C, 4 * C)}
    params = {}
    for name, shape in shapes.items():
        std = 0.02 / math.sqrt(2 * n_layer) if name.endswith(("out", "down")) else 0.02
        params[f"{name}.weight"] = np.ones(shape) if name.endswith("norm") else rng.normal(0, std, shape)
        if not name.endswith("embedding"):
            params[f"{name}.bias"] = np.zeros(shape[0])
    return params


def sample(model: GPT, tokens: list[int], count: int, block_size: int, rng: np.random.Generator) -> list[int]:
    """Return the tokens followed by `count` more, each drawn from the model's probabilities."""
    for _ in range(count):
        logits = model.forward(np.array([tokens[-block_size:]]))[0, -1]  # of the last position: (V,)
        tokens = [*tokens, int(rng.choice(len(logits), p=softmax(logits)))]
    return tokens


def main() -> None:
    """Read and check the command line, then train on the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="a text in UTF-8 (default: the numbers from 100 to 999)")
    for name, default in {"steps": 1200, "n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default {default})")
    parser.add_argument("--learning_rate", type=float, default=0.01, help="decays linearly to 0 (default 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and sample (default 0)")
    options = parser.parse_args()
    sizes = (options.steps, options.n_layer, options.n_head, options.n_embd, options.block_size)
    if min(sizes) < 1 or not 0 < options.learning_rate < math.inf or options.seed < 0:
        raise UsageError("steps, sizes and learning rate must be above 0, and the seed at least 0")
    if options.n_embd % options.n_head:
        raise UsageError("n_embd is not a multiple of n_head; every head has the same number of channels")
    train(read_text(options.file), options)


def read_text(file: Path | None) -> str:
    """Return the text to train on: that of the file, or the numbers from 100 to 999.

    Raises:
        UserError: The file is not text in UTF-8.
    """
    if file is None:
        return " ".join(map(str, range(100, 1000)))
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text in UTF-8; choose another file") from error


@np.errstate(over="ignore", invalid="ignore")  # the error below reports a diverging loss, without NumPy's warnings
def train(text: str, options: argparse.Namespace) -> None:
    """Train a GPT on the text, then print how it continues a random passage of the text.

    Raises:
        UsageError: The text is not longer than block_size.
        UserError: The loss diverges.
    """
    T, rng = options.block_size, np.random.default_rng(options.seed)
    if len(text) <= T:
        raise UsageError(f"the text has {len(text)} characters, not more than --block_size={T}; choose a smaller one")
    vocabulary = sorted(set(text))
    tokens = np.array([vocabulary.index(character) for character in text])  # (N,)
    params = init_params(len(vocabulary), T, options.n_layer, options.n_embd, rng)
    model, optimizer = GPT(params, options.n_layer, options.n_head), AdamW()
    n_params = sum(w.size for w in params.values())
    print(f"{len(text):,} characters, vocabulary of {len(vocabulary)}, {n_params:,} parameters")

    for step in tqdm(range(options.steps), unit="step", leave=False, disable=None):
        starts = rng.integers(0, len(tokens) - T, BATCH_SIZE)  # (B,)
        windows = tokens[starts[:, None] + np.arange(T + 1)]  # (B, 1) + (T + 1,): (B, T + 1)
        logits = model.forward(windows[:, :-1])  # (B, T, V)
        loss, dlogits = cross_entropy(logits, windows[:, 1:])  # the target of each token is the next token
        if not math.isfinite(loss):
            raise UserError(f"the loss became {loss} at step {step}; choose a smaller --learning_rate")
        optimizer.update(params, model.backward(dlogits), options.learning_rate * (1 - step / options.steps))
        if step % 100 == 0 or step == options.steps - 1:
            tqdm.write(f"step {step:4}: loss {loss:.3f} nats per character")

    start = int(rng.integers(0, len(tokens) - T))
    prompt = tokens[start : start + T].tolist()
    continuation = sample(model, prompt, 300, T, rng)[T:]
    print(f"prompt {text[start : start + T]!r}, continued:\n{''.join(vocabulary[token] for token in continuation)}")


if __name__ == "__main__":
    with exit_on_error():
        main()
