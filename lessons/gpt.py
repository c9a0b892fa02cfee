"""A whole GPT by hand: every layer forward and backward, and the optimizer, with matrix products alone.

    python lessons/gpt.py             learns to count from 100 to 999 in half a minute, on one core
    python lessons/gpt.py my.txt      learns a text of yours, of a few thousand characters

After 390 391 392 393 394 395 396 397 it writes 398 399 400 401 402 and so on.
The network is model.py's in GPT-2's form, and its parameters have the same names and shapes.
tests/lessons/test_lessons.py compares logits, loss and every gradient with those of model.py. Shape letters are
model.py's: B batch, T time, C channels, H heads, D = C / H head size, V vocabulary; K and J are the inputs and outputs
of a layer.

How to read it. `dx` stands for ∂loss/∂x: how the loss changes with each number of x, so it has x's shape. Each layer
has a `forward`, which keeps what the way back needs, and a `backward`, which is given dy, leaves the gradients of its
parameters in `g`, and returns dx to the layer before. Three rules are nearly all of it:

    y = x Wᵀ        dx = dy W and dW = dyᵀ x: the shapes leave no other choice
    y = f(x)        dx = dy f'(x), number by number
    x used twice    the gradients of both uses add up; a bias is used by every token, so db is a sum over all
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
EPSILON = 1e-5  # of layer norm: nothing is divided by 0


def rows(x: Array) -> Array:
    """Put the tokens of all sequences below each other: (B, T, C) becomes (BT, C)."""
    return x.reshape(-1, x.shape[-1])


def softmax(x: Array) -> Array:
    """Make numbers (..., V) positive, and each row's sum 1."""
    e = np.exp(x - x.max(-1, keepdims=True))  # the largest becomes 1: nothing overflows
    return e / e.sum(-1, keepdims=True)  # (..., V)


class Layer:
    """A weight and a bias, by their names in `p`, the parameters, and in `g`, their gradients."""

    def __init__(self, p: Arrays, g: Arrays, name: str) -> None:
        self.p, self.g, self.weight, self.bias = p, g, f"{name}.weight", f"{name}.bias"


class Linear(Layer):
    """J weighted sums of K channels: y = x Wᵀ + b."""

    def forward(self, x: Array) -> Array:
        """Map (B, T, K) to (B, T, J)."""
        self.x = x  # (B, T, K)
        return x @ self.p[self.weight].T + self.p[self.bias]  # (B, T, K) @ (K, J) + (J,) = (B, T, J)

    def backward(self, dy: Array) -> Array:
        """Map (B, T, J) to (B, T, K)."""
        self.g[self.weight] = rows(dy).T @ rows(self.x)  # dW = dyᵀ x: (J, BT) @ (BT, K) = (J, K)
        self.g[self.bias] = rows(dy).sum(0)  # db = Σ dy over all tokens: (J,)
        return dy @ self.p[self.weight]  # dx = dy W: (B, T, J) @ (J, K) = (B, T, K)


class LayerNorm(Layer):
    """Each token's channels brought to mean 0 and variance 1, then a gain and a bias: y = x̂ w + b, x̂ = (x - μ) / σ."""

    def forward(self, x: Array) -> Array:
        """Map (B, T, C) to (B, T, C)."""
        centred = x - x.mean(-1, keepdims=True)  # x - μ: (B, T, C) - (B, T, 1)
        self.sigma = np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)  # σ: (B, T, 1)
        self.normal = centred / self.sigma  # x̂: (B, T, C)
        return self.normal * self.p[self.weight] + self.p[self.bias]  # (B, T, C) * (C,) + (C,)

    def backward(self, dy: Array) -> Array:
        """Map (B, T, C) to (B, T, C)."""
        self.g[self.weight] = rows(dy * self.normal).sum(0)  # dw = Σ dy x̂ over all tokens: (C,)
        self.g[self.bias] = rows(dy).sum(0)  # db = Σ dy: (C,)
        d = dy * self.p[self.weight]  # dx̂ = dy w: (B, T, C)
        # x̂ stays as it is when x is shifted or stretched, so the loss has no slope in those two directions: what dx̂
        # has of them, a mean and a share of x̂, is taken away. dx = (dx̂ - mean(dx̂) - x̂ mean(dx̂ x̂)) / σ
        shift, stretch = d.mean(-1, keepdims=True), (d * self.normal).mean(-1, keepdims=True)  # (B, T, 1) each
        return (d - shift - self.normal * stretch) / self.sigma  # (B, T, C)


class GELU:
    """A gate that lets large numbers through and holds small ones back: y = x (1 + t) / 2, t = tanh(c x (1 + a x²))."""

    a, c = 0.044715, math.sqrt(2 / math.pi)  # Hendrycks & Gimpel 2016

    def forward(self, x: Array) -> Array:
        """Map (B, T, 4C) to (B, T, 4C)."""
        self.x, self.t = x, np.tanh(self.c * x * (1 + self.a * x**2))  # (B, T, 4C) each
        return x * (1 + self.t) / 2  # (B, T, 4C)

    def backward(self, dy: Array) -> Array:
        """Map (B, T, 4C) to (B, T, 4C)."""
        dt = (1 - self.t**2) * self.c * (1 + 3 * self.a * self.x**2)  # t' = (1 - t²) c (1 + 3 a x²): (B, T, 4C)
        return dy * (1 + self.t + self.x * dt) / 2  # dx = dy (1 + t + x t') / 2: (B, T, 4C)


class Attention:
    """Each token gathers values v from itself and the tokens before it, as its query q matches their keys k."""

    def __init__(self, p: Arrays, g: Arrays, name: str, n_head: int) -> None:
        self.qkv, self.out, self.n_head = Linear(p, g, f"{name}.qkv"), Linear(p, g, f"{name}.out"), n_head

    def forward(self, x: Array) -> Array:
        """Map (B, T, C) to (B, T, C)."""
        B, T, C = x.shape
        D = C // self.n_head
        qkv = self.qkv.forward(x).reshape(B, T, 3, self.n_head, D)  # (B, T, 3C) = (B, T, 3, H, D)
        self.q, self.k, self.v = q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # (3, B, H, T, D): (B, H, T, D) each
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(D)  # S = q kᵀ / √D: (B, H, T, D) @ (B, H, D, T) = (B, H, T, T)
        scores[..., np.triu(np.ones((T, T), bool), k=1)] = -np.inf  # above the diagonal lies the future
        self.weights = softmax(scores)  # A = softmax(S), each row sums to 1: (B, H, T, T)
        mixed = self.weights @ v  # A v: (B, H, T, T) @ (B, H, T, D) = (B, H, T, D)
        return self.out.forward(mixed.swapaxes(1, 2).reshape(B, T, C))  # (B, T, H, D) = (B, T, C)

    def backward(self, dy: Array) -> Array:
        """Map (B, T, C) to (B, T, C)."""
        B, T, C = dy.shape
        D = C // self.n_head
        d = self.out.backward(dy).reshape(B, T, self.n_head, D).swapaxes(1, 2)  # d(A v): (B, H, T, D)
        dv = self.weights.swapaxes(-1, -2) @ d  # dv = Aᵀ d: (B, H, T, T) @ (B, H, T, D) = (B, H, T, D)
        da = d @ self.v.swapaxes(-1, -2)  # dA = d vᵀ: (B, H, T, D) @ (B, H, D, T) = (B, H, T, T)
        # A row sums to 1, so only what differs from the row's mean (weighed by A) counts; where A is 0, dS is 0 too.
        ds = self.weights * (da - (da * self.weights).sum(-1, keepdims=True))  # dS = A (dA - Σ dA A): (B, H, T, T)
        dq = ds @ self.k / math.sqrt(D)  # dq = dS k / √D: (B, H, T, T) @ (B, H, T, D) = (B, H, T, D)
        dk = ds.swapaxes(-1, -2) @ self.q / math.sqrt(D)  # dk = dSᵀ q / √D: (B, H, T, D)
        dqkv = np.stack((dq, dk, dv)).transpose(1, 3, 0, 2, 4)  # (3, B, H, T, D) turned to (B, T, 3, H, D)
        return self.qkv.backward(dqkv.reshape(B, T, 3 * C))  # (B, T, C)


class Block:
    """Attention between tokens, then an MLP on each, both added to the residual stream x."""

    def __init__(self, p: Arrays, g: Arrays, name: str, n_head: int) -> None:
        self.attention_norm = LayerNorm(p, g, f"{name}.attention_norm")
        self.attention = Attention(p, g, f"{name}.attention", n_head)
        self.mlp_norm = LayerNorm(p, g, f"{name}.mlp_norm")
        self.up, self.gelu, self.down = Linear(p, g, f"{name}.mlp.up"), GELU(), Linear(p, g, f"{name}.mlp.down")

    def forward(self, x: Array) -> Array:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.attention.forward(self.attention_norm.forward(x))  # (B, T, C)
        hidden = self.gelu.forward(self.up.forward(self.mlp_norm.forward(x)))  # (B, T, 4C)
        return x + self.down.forward(hidden)  # (B, T, C)

    def backward(self, dy: Array) -> Array:
        """Map (B, T, C) to (B, T, C); x is used twice at each +, so its gradients add up."""
        dhidden = self.down.backward(dy)  # (B, T, 4C)
        dx = dy + self.mlp_norm.backward(self.up.backward(self.gelu.backward(dhidden)))  # (B, T, C)
        return dx + self.attention_norm.backward(self.attention.backward(dx))  # (B, T, C)


class GPT:
    """Tokens in, a number for each possible next token out, at every place."""

    def __init__(self, parameters: Arrays, n_layer: int, n_head: int) -> None:
        """Take parameters by name, as `new_parameters` makes them, or as float64 arrays of model.py's state_dict."""
        self.p: Arrays = parameters
        self.g: Arrays = {}
        self.blocks = [Block(self.p, self.g, f"blocks.{layer}", n_head) for layer in range(n_layer)]
        self.norm = LayerNorm(self.p, self.g, "norm")

    def forward(self, tokens: Ids) -> Array:
        """Map tokens (B, T) to logits (B, T, V)."""
        self.tokens = tokens  # (B, T)
        E, P = self.p["token_embedding.weight"], self.p["position.embedding.weight"]  # (V, C) and (block_size, C)
        x = E[tokens] + P[: tokens.shape[1]]  # a row for each token and one for its place: (B, T, C) + (T, C)
        for block in self.blocks:
            x = block.forward(x)  # (B, T, C)
        self.hidden = self.norm.forward(x)  # h: (B, T, C)
        return self.hidden @ E.T  # how much h is like each token: (B, T, C) @ (C, V) = (B, T, V)

    def backward(self, dlogits: Array) -> Arrays:
        """Return the gradient of every parameter, given that of the logits (B, T, V)."""
        E, P = self.p["token_embedding.weight"], self.p["position.embedding.weight"]  # (V, C) and (block_size, C)
        dE, dP = rows(dlogits).T @ rows(self.hidden), np.zeros_like(P)  # dE = dlogitsᵀ h: (V, BT) @ (BT, C) = (V, C)
        dx = self.norm.backward(dlogits @ E)  # dh = dlogits E: (B, T, V) @ (V, C) = (B, T, C)
        for block in reversed(self.blocks):
            dx = block.backward(dx)  # (B, T, C)
        np.add.at(dE, self.tokens, dx)  # E's second use: each row gathers dx from wherever its token stands
        dP[: dx.shape[1]] = dx.sum(0)  # a place is used by every sequence: (T, C)
        self.g["token_embedding.weight"], self.g["position.embedding.weight"] = dE, dP
        return self.g


def cross_entropy(logits: Array, targets: Ids) -> tuple[float, Array]:
    """Return the mean loss in nats per token, and its gradient (B, T, V), of logits (B, T, V) and targets (B, T)."""
    z, N = rows(logits - logits.max(-1, keepdims=True)), targets.size  # (BT, V), and N = BT
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))  # ln p = z - ln Σ exp z, p = softmax(z): (BT, V)
    right = np.arange(N), targets.ravel()  # where each row's target stands
    loss = -log_p[right].mean()  # loss = -Σ ln p[target] / N
    d = np.exp(log_p)  # p: (BT, V)
    d[right] -= 1  # p - y, where y is 1 at the target and 0 elsewhere
    return float(loss), (d / N).reshape(logits.shape)  # dlogits = (p - y) / N: (B, T, V)


class AdamW:
    """Steps against the mean gradient m, each number's divided by its usual size √v (Loshchilov & Hutter 2017)."""

    def __init__(self, beta1: float = 0.9, beta2: float = 0.99, weight_decay: float = 0.1) -> None:
        """Say how fast the means of gradients and of their squares forget, and how fast matrices shrink."""
        self.beta1, self.beta2, self.weight_decay, self.steps = beta1, beta2, weight_decay, 0
        self.m: Arrays = {}
        self.v: Arrays = {}

    def update(self, p: Arrays, g: Arrays, rate: float) -> None:
        """Change the parameters p by their gradients g."""
        self.steps += 1
        for name, w in p.items():  # w, and all that belongs to it, has any one shape
            self.m[name] = self.beta1 * self.m.get(name, 0) + (1 - self.beta1) * g[name]  # m ← β₁ m + (1 - β₁) g
            self.v[name] = self.beta2 * self.v.get(name, 0) + (1 - self.beta2) * g[name] ** 2  # v ← β₂ v + (1 - β₂) g²
            m = self.m[name] / (1 - self.beta1**self.steps)  # the means began at 0; this makes up for it
            v = self.v[name] / (1 - self.beta2**self.steps)
            decay = self.weight_decay if w.ndim >= 2 else 0  # λ, of matrices and embeddings only
            p[name] = w - rate * (m / (np.sqrt(v) + 1e-8) + decay * w)  # w ← w - η (m / √v + λ w)


def new_parameters(V: int, block_size: int, n_layer: int, C: int, random: np.random.Generator) -> Arrays:
    """Return weights as GPT-2 begins: normal of 0.02, smaller where blocks write to the residual stream."""
    shapes = {"token_embedding": (V, C), "position.embedding": (block_size, C), "norm": (C,)}
    for block in (f"blocks.{layer}" for layer in range(n_layer)):
        shapes |= {f"{block}.attention_norm": (C,), f"{block}.mlp_norm": (C,)}
        shapes |= {f"{block}.attention.qkv": (3 * C, C), f"{block}.attention.out": (C, C)}
        shapes |= {f"{block}.mlp.up": (4 * C, C), f"{block}.mlp.down": (C, 4 * C)}
    p = {}
    for name, shape in shapes.items():
        std = 0.02 / math.sqrt(2 * n_layer) if name.endswith(("out", "down")) else 0.02
        p[f"{name}.weight"] = np.ones(shape) if name.endswith("norm") else random.normal(0, std, shape)
        if not name.endswith("embedding"):
            p[f"{name}.bias"] = np.zeros(shape[0])
    return p


def sample(model: GPT, tokens: list[int], count: int, block_size: int, random: np.random.Generator) -> list[int]:
    """Go on from some tokens: `count` more, each drawn as likely as the model holds it to be."""
    for _ in range(count):
        logits = model.forward(np.array([tokens[-block_size:]]))[0, -1]  # of the last place: (V,)
        tokens = [*tokens, int(random.choice(len(logits), p=softmax(logits)))]
    return tokens


def main() -> None:
    """Learn a text, and write more of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="a text in UTF-8 (default: the numbers from 100 to 999)")
    for name, default in {"steps": 1200, "n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default {default})")
    parser.add_argument("--learning_rate", type=float, default=0.01, help="at the start; it falls to 0 (default 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, batches and sample (default 0)")
    options = parser.parse_args()
    sizes = (options.steps, options.n_layer, options.n_head, options.n_embd, options.block_size)
    if min(sizes) < 1 or not 0 < options.learning_rate < math.inf or options.seed < 0:
        raise UsageError("steps, sizes and learning rate must be above 0, the seed at least 0")
    if options.n_embd % options.n_head:
        raise UsageError("n_embd must be a multiple of n_head: each head gets as many channels")
    train(read(options.file), options)


def read(file: Path | None) -> str:
    """Return the text to learn.

    Raises:
        UserError: the file is no text.
    """
    if file is None:
        return " ".join(map(str, range(100, 1000)))
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text in UTF-8; name another") from error


@np.errstate(over="ignore", invalid="ignore")  # lest NumPy warn of a loss that grows beyond all bounds: we tell of it
def train(text: str, options: argparse.Namespace) -> None:
    """Learn a text, and show how the model goes on from the middle of it.

    Raises:
        UsageError: the text is shorter than block_size and the token after it.
        UserError: the loss grew beyond all bounds.
    """
    T, random = options.block_size, np.random.default_rng(options.seed)
    if len(text) <= T:
        raise UsageError(f"the text has {len(text)} characters; it takes more than --block_size={T}")
    characters = sorted(set(text))  # the vocabulary
    tokens = np.array([characters.index(character) for character in text])  # (N,)
    parameters = new_parameters(len(characters), T, options.n_layer, options.n_embd, random)
    model, optimizer = GPT(parameters, options.n_layer, options.n_head), AdamW()
    size = sum(w.size for w in parameters.values())
    print(f"{len(text):,} characters, {len(characters)} different ones; {size:,} parameters")

    for step in tqdm(range(options.steps), unit="step", leave=False, disable=None):
        starts = random.integers(0, len(tokens) - T, BATCH_SIZE)  # (B,)
        windows = tokens[starts[:, None] + np.arange(T + 1)]  # (B, 1) + (T + 1,): (B, T + 1)
        logits = model.forward(windows[:, :-1])  # (B, T, V)
        loss, dlogits = cross_entropy(logits, windows[:, 1:])  # each token's target is the next one
        if not math.isfinite(loss):
            raise UserError(f"the loss became {loss} at step {step}; try a smaller --learning_rate")
        optimizer.update(parameters, model.backward(dlogits), options.learning_rate * (1 - step / options.steps))
        if step % 100 == 0 or step == options.steps - 1:
            tqdm.write(f"step {step:4}: loss {loss:.3f} nats per character")

    start = int(random.integers(0, len(tokens) - T))
    prompt = tokens[start : start + T].tolist()
    written = sample(model, prompt, 300, T, random)[T:]
    print(f"after {text[start : start + T]!r} it writes:\n{''.join(characters[token] for token in written)}")


if __name__ == "__main__":
    with exit_on_error():
        main()
