"""The whole GPT in one file.

Shape letters, used at every reshape: B batch, T time (tokens in the window), C channels (n_embd), H heads,
D head size (C / H), V vocabulary, S time of the keys (T, and before it what a cache holds).

The form is GPT-2's (Radford et al. 2019, https://github.com/openai/gpt-2): learned positions, blocks of
pre-LayerNorm attention and GELU MLP on a residual stream, a head tied to the token embedding. The switches of
`GPTConfig` choose small modules once, in the constructors; `forward` knows nothing of them. What some
of them cost and gain in time and loss is in bench/LOG.md.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXPLICIT_ATTENTION = 256  # tokens of context, at most
RMS_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The network's shape and form. Defaults live with the settings of train.py, which explain each field."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool
    position: Literal["learned", "sinusoidal", "rotary"]
    norm: Literal["layernorm", "rmsnorm"]
    activation: Literal["gelu", "gelu_erf", "relu2"]
    qk_norm: bool
    tie_embeddings: bool
    ngram: int
    ngram_rows: int
    token_shift: bool
    init: Literal["gpt2", "zero"]

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd, self.ngram, self.ngram_rows)
        if min(sizes) < 1:
            raise ValueError("every size must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")

    @property
    def head_size(self) -> int:
        """D, the channels of one head."""
        return self.n_embd // self.n_head

    @property
    def small_embeddings(self) -> bool:
        """Whether embeddings begin far below a size of 1, as GPT-2's do; n-grams' are normalised."""
        return self.init == "gpt2" and self.ngram == 1


class LayerKVCache:
    """Keys and values of one layer for the tokens seen so far, each (B, H, S, D)."""

    def __init__(self, block_size: int) -> None:
        """Begin empty; there is room for `block_size` tokens."""
        self.block_size = block_size
        self.length = 0
        self.keys: Tensor
        self.values: Tensor

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values (B, H, T, D) of T more tokens; return all so far, (B, H, S, D)."""
        if self.length == 0:
            B, H, _, D = keys.shape
            dtype = torch.float32 if keys.device.type == "cpu" else keys.dtype  # the fastest for one query
            self.keys = keys.new_empty(B, H, self.block_size, D, dtype=dtype)
            self.values = values.new_empty(B, H, self.block_size, D, dtype=dtype)
        start, self.length = self.length, self.length + keys.size(2)
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reorder(self, rows: list[int]) -> None:
        """Go on with these rows of the batch, in this order; a row may come several times."""
        keys, values = self.keys[rows, :, : self.length], self.values[rows, :, : self.length]
        self.length = 0
        self.append(keys, values)


class KVCache:
    """What a model remembers of the tokens it has seen, to go on without reading them again."""

    def __init__(self, config: GPTConfig) -> None:
        """Begin empty; there is room for block_size tokens."""
        self.layers = [LayerKVCache(config.block_size) for _ in range(config.n_layer)]
        self.last_tokens: Tensor | None = None
        """The last tokens, (B, up to ngram), as far as embeddings look back."""

    @property
    def length(self) -> int:
        """How many tokens have been seen."""
        return self.layers[0].length

    def reorder(self, rows: list[int]) -> None:
        """Go on with these rows of the batch, in this order; a row may come several times."""
        for layer in self.layers:
            layer.reorder(rows)
        self.last_tokens = None if self.last_tokens is None else self.last_tokens[rows]


class NGramEmbedding(nn.Module):
    """Vectors for the last 2, 3, ... ngram tokens taken together, from one hashed table for each number.

    The Byte Latent Transformer's hash n-gram embeddings (Pagnoni et al. 2024, section 3.2.1): memory that costs
    hardly any computation. Tokens before the window count as one more token, of its own.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.rows = config.ngram_rows
        self.tables = nn.ModuleList(nn.Embedding(config.ngram_rows, config.n_embd) for _ in range(config.ngram - 1))

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Add to the embeddings x (B, T, C) of tokens (B, T), and normalise the sum."""
        key = tokens + 1  # 0 stands before the window
        for back, table in enumerate(self.tables, start=1):
            earlier = F.pad(tokens + 1, (back, 0))[:, : tokens.size(1)]
            key = key * 1_000_003 + earlier  # a rolling hash (Karp & Rabin 1987); overflow does no harm
            x = x + table(key % self.rows)
        return F.rms_norm(x, x.shape[-1:], eps=RMS_EPSILON)


class TokenShift(nn.Module):
    """Adds to each token's vector a learned share, channel by channel, of the one before (RWKV, Peng et al. 2023)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C); nothing comes before the first token."""
        return x + self.share.to(x.dtype) * F.pad(x, (0, 0, 1, 0))[:, : x.size(1)]


class LearnedPosition(nn.Module):
    """Adds a learned vector for each place in the window, as GPT-2 does."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.block_size, config.n_embd)

    def forward(self, x: Tensor, start: int) -> Tensor:
        """Add positions start, start + 1, ... to embeddings x (B, T, C)."""
        return x + self.embedding.weight[start : start + x.size(1)]


class SinusoidalPosition(nn.Module):
    """Adds fixed waves, "Attention is all you need" (Vaswani et al. 2017, section 3.5).

    PE(t, 2i) = sin(t / 10000^(2i/C)) and PE(t, 2i+1) = cos(t / 10000^(2i/C)). As in section 3.4, embeddings that
    begin small are scaled by the square root of C, lest the waves drown them; others have the waves' size already.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        cos, sin = position_waves(config.block_size, config.n_embd)  # (T, C / 2) each
        waves = torch.stack((sin, cos), dim=-1)  # (T, C / 2, 2)
        self.scale = math.sqrt(config.n_embd) if config.small_embeddings else 1.0
        self.register_buffer("waves", waves.flatten(1), persistent=False)  # (T, C)

    waves: Tensor

    def forward(self, x: Tensor, start: int) -> Tensor:
        """Add positions start, start + 1, ... to embeddings x (B, T, C)."""
        return x * self.scale + self.waves[start : start + x.size(1)]


class NoPosition(nn.Module):
    """Leaves embeddings as they are: rotary positions act on queries and keys instead."""

    def forward(self, x: Tensor, start: int) -> Tensor:  # noqa: ARG002
        """Return x (B, T, C)."""
        return x


class Rotary(nn.Module):
    """Rotates queries and keys by their position (RoFormer, Su et al. 2021), so that scores see distances."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        cos, sin = position_waves(config.block_size, config.head_size)  # (T, D / 2) each
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    cos: Tensor
    sin: Tensor

    def forward(self, x: Tensor, start: int) -> Tensor:
        """Rotate x (B, T, ..., D), whose first token stands at `start`; channels i and i + D/2 form a pair."""
        shape = (x.size(1), *(1,) * (x.dim() - 3), -1)  # (T, 1, ..., D / 2)
        cos, sin = (table[start : start + x.size(1)].to(x.dtype).view(shape) for table in (self.cos, self.sin))
        first, second = x.chunk(2, dim=-1)  # (B, T, ..., D / 2) each
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class NoRotation(nn.Module):
    """Leaves queries and keys as they are: their positions came with the embeddings."""

    def forward(self, x: Tensor, start: int) -> Tensor:  # noqa: ARG002
        """Return x."""
        return x


def position_waves(length: int, channels: int) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine of t / 10000^(2i / channels) for position t and pair i, (length, channels / 2) each.

    They come from torch.polar: the first call of torch.cos in a process is less exact now and then, where MKL computes
    it, and a resumed run would not get the same bits.
    """
    pair = torch.arange(channels // 2, dtype=torch.float64)
    frequency = 10000.0 ** (-2 * pair / channels)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    waves = torch.polar(torch.ones_like(angle), angle)  # e^(i angle)
    return waves.real.float(), waves.imag.float()


class ReLUSquared(nn.Module):
    """max(0, x)², the activation that Primer found (So et al. 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        return F.relu(x).square()


class RMSNorm(nn.Module):
    """Division by the root mean square (Zhang & Sennrich 2019), without a gain: the matrices after it can learn it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        return F.rms_norm(x, x.shape[-1:], eps=RMS_EPSILON)


def make_position(config: GPTConfig) -> nn.Module:
    """Return what tells embeddings their positions."""
    if config.position == "learned":
        return LearnedPosition(config)
    return SinusoidalPosition(config) if config.position == "sinusoidal" else NoPosition()


def make_norm(config: GPTConfig) -> nn.Module:
    """Return the normalisation over channels that the config names."""
    if config.norm == "rmsnorm":
        return RMSNorm()
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def make_activation(config: GPTConfig) -> nn.Module:
    """Return the MLP's non-linearity."""
    if config.activation == "relu2":
        return ReLUSquared()
    return nn.GELU(approximate="tanh" if config.activation == "gelu" else "none")


class CausalSelfAttention(nn.Module):
    """Each token gathers values from itself and the tokens before it, in H heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.qk_norm = RMSNorm() if config.qk_norm else nn.Identity()
        self.rotary = Rotary(config) if config.position == "rotary" else NoRotation()
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: LayerKVCache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C); a cache holds the tokens before these, and takes these in."""
        q, k, v = self.project_qkv(x, cache.length if cache else 0)  # (B, H, T, D) each
        if cache:
            k, v = cache.append(k, v)  # (B, H, S, D) each
        return self.project_out(causal_attention(q.to(k.dtype), k, v, self.dropout if self.training else 0.0))

    def project_qkv(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (B, H, T, D) each, of x (B, T, C), whose first token stands at `start`."""
        B, T, C = x.shape
        qk, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).split((2, 1), dim=2)  # (B, T, 2, H, D)
        q, k = self.rotary(self.qk_norm(qk), start).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.squeeze(2).transpose(1, 2)

    def project_out(self, mixed: Tensor) -> Tensor:
        """Map what the heads gathered, (B, H, T, D), back to (B, T, C)."""
        return self.residual_dropout(self.out(mixed.transpose(1, 2).flatten(2)))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, (B, H, T, D), where the last query sees all S keys, the one before S - 1 ...

    On a CPU, short contexts are faster written out than in torch's fused attention, whose backward pass there
    makes many tiny products.
    """
    T, S, D = q.size(2), k.size(2), q.size(3)
    if q.device.type == "cpu" and 1 < T <= EXPLICIT_ATTENTION and T == S:
        scores = q / math.sqrt(D) @ k.mT  # (B, H, T, S)
        weights = scores.where(causal_mask(T, S, q.device), -torch.inf).softmax(-1)
        return F.dropout(weights, dropout) @ v
    mask = causal_mask(T, S, q.device) if 1 < T < S else None
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=1 < T == S)


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """Return True where the last T of S tokens may look: at themselves and before, shape (T, S)."""
    places = torch.arange(S, device=device)
    return places <= places[S - T :, None]


class MLP(nn.Module):
    """Each token on its own: up to 4C channels, a non-linearity, and down again."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = make_activation(config)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.dropout(self.down(self.activation(self.up(x))))


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: LayerKVCache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.attention(self.attention_norm(x), cache)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Tokens in, a distribution over the next token out, at every place."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.ngram_embedding = NGramEmbedding(config) if config.ngram > 1 else None
        self.token_shift = TokenShift(config) if config.token_shift else None
        self.position = make_position(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lookback = config.ngram - 1 + config.token_shift
        if config.init == "gpt2":
            self._initialize_as_gpt2()
        else:
            self._initialize_with_zeros()

    def _initialize_as_gpt2(self) -> None:
        """Normal of 0.02, smaller where blocks write to the residual stream; biases zero."""
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def _initialize_with_zeros(self) -> None:
        """Zero for all that writes to the residual stream or the logits, so that the network starts as its embedding.

        Zhang et al. 2019 (Fixup) and Yang et al. 2022 (muP, appendix D.2) found this to train well.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("token_embedding"):
                nn.init.normal_(parameter)
            elif name.endswith(("qkv.weight", "up.weight")):
                nn.init.normal_(parameter, std=0.5 / math.sqrt(self.config.n_embd))
            elif parameter.dim() >= 2 or name.endswith("bias"):
                nn.init.zeros_(parameter)

    def new_cache(self) -> KVCache:
        """Return an empty cache for `next_logits`."""
        return KVCache(self.config)

    def embed(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Map tokens (B, T), after those that a cache has seen, to the residual stream's beginning (B, T, C)."""
        T = tokens.size(1)
        if cache and self.lookback:
            seen = tokens if cache.last_tokens is None else torch.cat((cache.last_tokens, tokens), dim=1)
            tokens, cache.last_tokens = seen, seen[:, -self.lookback :]
        x = self.token_embedding(tokens)
        if self.ngram_embedding:
            x = self.ngram_embedding(tokens, x)
        if self.token_shift:
            x = self.token_shift(x)
        return x[:, -T:]

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Run the blocks: tokens (B, T) to the normalised residual stream (B, T, C)."""
        x = self.dropout(self.position(self.embed(tokens, cache), cache.length if cache else 0))
        for layer, block in enumerate(self.blocks):
            x = block(x, cache.layers[layer] if cache else None)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map (..., C) to unnormalised log-probabilities (..., V)."""
        return F.linear(hidden, self.token_embedding.weight if self.head is None else self.head.weight)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V), or with targets (B, T) the mean loss in nats per token, a scalar.

        T is at most block_size.
        """
        logits = self.logits(self.hidden(tokens))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def next_logits(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the logits (B, V) of the token after these (B, T).

        With a cache, `tokens` are only those that it has not seen yet; together they are at most block_size.
        """
        return self.logits(self.hidden(tokens, cache)[:, -1])
