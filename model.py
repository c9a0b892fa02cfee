"""The whole GPT in one file.

Shape letters: B batch, T time (tokens in the window), C channels (n_embd), H heads, D head size (C / H), V vocabulary,
S keys (the T tokens, and those in the cache before them).

With the defaults of train.py the network is GPT-2 (Radford et al. 2019, https://github.com/openai/gpt-2): learned
positions, blocks of pre-LayerNorm attention and a GELU MLP on a residual stream, and an output head tied to the token
embedding. The switches of `GPTConfig` select small modules in the constructors, so that `forward` has no branches for
them. bench/LOG.md records what some of them cost and gain.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXPLICIT_ATTENTION = 256  # longest context, in tokens, for which a CPU computes attention without the fused kernel
RMS_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape and the switches of the network. The settings of train.py explain each field and hold its default."""

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
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(f"rotary positions need an even head size, not {self.head_size}")
        if self.position == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"sinusoidal positions need an even n_embd, not {self.n_embd}")

    @property
    def head_size(self) -> int:
        """D, the channels of one head."""
        return self.n_embd // self.n_head

    @property
    def lookback(self) -> int:
        """Number of earlier tokens that an embedding depends on."""
        return self.ngram - 1 + self.token_shift

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings before sinusoids are added (Vaswani et al. 2017, section 3.4).

        GPT-2's initial embeddings are much smaller than the sinusoids, which would drown them. With init = "zero" or
        n-gram embeddings, which are normalized, both have the same size.
        """
        return math.sqrt(self.n_embd) if self.init == "gpt2" and self.ngram == 1 else 1.0


class KVCache:
    """The keys and values of the tokens seen so far, so that they are not computed again.

    Its tensors have room for block_size tokens, and keep their sizes and places in memory, as a CUDA graph requires.
    """

    def __init__(self, config: GPTConfig, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Create an empty cache for `batch` sequences."""
        shape = (config.n_layer, batch, config.n_head, config.block_size, config.head_size)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.places = torch.arange(config.block_size, device=device)  # (S,)
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        """Number of tokens seen so far."""
        self.last_tokens = torch.full((batch, config.lookback), -1, device=device)
        """The last tokens, on which the embeddings of the next ones depend; -1 before the first one."""

    def clear(self) -> None:
        """Forget all tokens."""
        self.length.zero_()
        self.last_tokens.fill_(-1)

    def reorder(self, rows: Tensor) -> None:
        """Replace the batch by these rows of it, in this order; a row may be repeated or left out."""
        chosen = self.keys[:, rows], self.values[:, rows], self.last_tokens[rows]
        if len(rows) == len(self.last_tokens):
            for old, new in zip((self.keys, self.values, self.last_tokens), chosen, strict=True):
                old.copy_(new)
        else:
            self.keys, self.values, self.last_tokens = chosen

    def layers(self, T: int) -> list["LayerCache"]:
        """Return the part of each layer, which is about to see T more tokens."""
        positions = self.length + self.places[:T]
        mask = self.places <= positions[:, None]
        pairs = zip(self.keys, self.values, strict=True)
        return [LayerCache(keys, values, positions, mask) for keys, values in pairs]


@dataclass(frozen=True)
class LayerCache:
    """The part of a KVCache that belongs to one layer."""

    keys: Tensor
    """(B, H, S, D), where S is block_size."""
    values: Tensor
    positions: Tensor
    """The positions of the new tokens, (T,)."""
    mask: Tensor
    """Which keys each of the new tokens attends to, (T, S)."""

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of the new tokens, (B, H, T, D); return all of them, (B, H, S, D)."""
        self.keys.index_copy_(2, self.positions, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.positions, values.to(self.values.dtype))
        return self.keys, self.values


class NGramEmbedding(nn.Module):
    """Embeddings of the last 2, 3, ..., ngram tokens together, from one hashed table for each length.

    These are the hash n-gram embeddings of the Byte Latent Transformer (Pagnoni et al. 2024, section 3.2.1): they cost
    memory but hardly any computation. Positions before the window count as a token of their own.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.rows = config.ngram_rows
        self.tables = nn.ModuleList(nn.Embedding(config.ngram_rows, config.n_embd) for _ in range(config.ngram - 1))

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Add the n-gram embeddings of tokens (B, T) to their embeddings x (B, T, C), and normalize the sum."""
        key = tokens + 1  # 0 is for positions before the window
        for back, table in enumerate(self.tables, start=1):
            earlier = F.pad(tokens + 1, (back, 0))[:, : tokens.size(1)]
            key = key * 1_000_003 + earlier  # a rolling hash (Karp & Rabin 1987); overflow is harmless
            x = x + table(key % self.rows)
        return F.rms_norm(x, x.shape[-1:], eps=RMS_EPSILON)


class TokenShift(nn.Module):
    """Add a learned fraction of the previous token's embedding, one for each channel (RWKV, Peng et al. 2023)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C); the first token has no predecessor."""
        return x + self.mix.to(x.dtype) * F.pad(x, (0, 0, 1, 0))[:, : x.size(1)]


class LearnedPosition(nn.Module):
    """Add a learned vector for each position in the window, as GPT-2 does."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.block_size, config.n_embd)

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """Add positions (T,), or the first T, to embeddings x (B, T, C)."""
        return x + select(self.embedding.weight, positions, x.size(1))


class SinusoidalPosition(nn.Module):
    """Add fixed sinusoids, as in "Attention is all you need" (Vaswani et al. 2017, section 3.5).

    PE(t, 2i) = sin(t / 10000^(2i/C)) and PE(t, 2i+1) = cos(t / 10000^(2i/C)).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        cos, sin = position_waves(config.block_size, config.n_embd)  # (T, C / 2) each
        self.scale = config.embedding_scale
        self.register_buffer("waves", torch.stack((sin, cos), dim=-1).flatten(1), persistent=False)  # (T, C)

    waves: Tensor

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """Add positions (T,), or the first T, to scaled embeddings x (B, T, C)."""
        return x * self.scale + select(self.waves, positions, x.size(1))


class NoPosition(nn.Module):
    """Return the embeddings unchanged: rotary positions act on queries and keys instead."""

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:  # noqa: ARG002
        """Return x (B, T, C)."""
        return x


class Rotary(nn.Module):
    """Rotate queries and keys by their positions, so that scores depend on distances (RoFormer, Su et al. 2021)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        cos, sin = position_waves(config.block_size, config.head_size)  # (T, D / 2) each
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    cos: Tensor
    sin: Tensor

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """Rotate x (B, T, ..., D) by positions (T,), or the first T. Channels i and i + D/2 form a pair."""
        T, between = x.size(1), (1,) * (x.dim() - 3)
        tables = (select(table, positions, T).to(x.dtype) for table in (self.cos, self.sin))
        cos, sin = (table.view(T, *between, -1) for table in tables)  # (T, 1, ..., D / 2)
        first, second = x.chunk(2, dim=-1)  # (B, T, ..., D / 2) each
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class NoRotation(nn.Module):
    """Return queries and keys unchanged: their positions are part of the embeddings."""

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:  # noqa: ARG002
        """Return x."""
        return x


def select(table: Tensor, positions: Tensor | None, T: int) -> Tensor:
    """Return the rows of a table at positions (T,), or its first T rows."""
    return table[:T] if positions is None else table[positions]


def position_waves(length: int, channels: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of t / 10000^(2i / channels) for position t and pair i, (length, channels / 2) each.

    torch.polar computes them because, with MKL, the first call of torch.cos in a process is sometimes less exact, and a
    resumed run would then not have the same bits.
    """
    pair = torch.arange(channels // 2, dtype=torch.float64)
    frequency = 10000.0 ** (-2 * pair / channels)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    waves = torch.polar(torch.ones_like(angle), angle)  # e^(i angle)
    return waves.real.float(), waves.imag.float()


class ReLUSquared(nn.Module):
    """max(0, x)², the activation of Primer (So et al. 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        return F.relu(x).square()


class RMSNorm(nn.Module):
    """Divide by the root mean square (Zhang & Sennrich 2019). It has no gain; a matrix that follows can learn one."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        return F.rms_norm(x, x.shape[-1:], eps=RMS_EPSILON)


def make_position(config: GPTConfig) -> nn.Module:
    """Return the module that adds positions to embeddings."""
    if config.position == "learned":
        return LearnedPosition(config)
    return SinusoidalPosition(config) if config.position == "sinusoidal" else NoPosition()


def make_norm(config: GPTConfig) -> nn.Module:
    """Return the normalization over channels."""
    if config.norm == "rmsnorm":
        return RMSNorm()
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def make_activation(config: GPTConfig) -> nn.Module:
    """Return the activation of the MLP."""
    if config.activation == "relu2":
        return ReLUSquared()
    return nn.GELU(approximate="tanh" if config.activation == "gelu" else "none")


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which each token attends to itself and to the tokens before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.qk_norm = RMSNorm() if config.qk_norm else nn.Identity()
        self.rotary = Rotary(config) if config.position == "rotary" else NoRotation()
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C). A cache holds the tokens before these, and is updated with these."""
        q, k, v = self.project_qkv(x, cache.positions if cache else None)  # (B, H, T, D) each
        if cache:
            y = masked_attention(q, *cache.update(k, v), cache.mask)
        else:
            y = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        return self.project_out(y)

    def project_qkv(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values, (B, H, T, D) each, of x (B, T, C) at positions (T,), or the first T."""
        B, T, C = x.shape
        qk, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).split((2, 1), dim=2)  # (B, T, 2, H, D)
        q, k = self.rotary(self.qk_norm(qk), positions).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.squeeze(2).transpose(1, 2)

    def project_out(self, y: Tensor) -> Tensor:
        """Concatenate the heads' outputs (B, H, T, D) and project them to (B, T, C)."""
        return self.residual_dropout(self.out(y.transpose(1, 2).flatten(2)))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, (B, H, T, D), where each token sees itself and the tokens before it.

    On a CPU, explicit products are faster for short contexts than torch's fused attention, whose backward pass there
    computes many tiny products.
    """
    T = q.size(2)
    if q.device.type == "cpu" and T <= EXPLICIT_ATTENTION:
        return explicit_attention(q, k, v, causal_mask(T, q.device), dropout)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, (B, H, T, D), where the T tokens see the S keys that a mask (T, S) allows.

    A single query is computed by explicit products: for these, GPUs have no fused kernel that is faster.
    """
    q = q.to(k.dtype)
    if q.size(2) == 1:
        return explicit_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, mask)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float = 0.0) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, (B, H, T, D), for the keys that a mask (T, S) allows."""
    scores = q / math.sqrt(q.size(-1)) @ k.mT  # (B, H, T, S)
    return F.dropout(scores.where(mask, -torch.inf).softmax(-1), dropout) @ v


def causal_mask(T: int, device: torch.device) -> Tensor:
    """Return a mask (T, T) that is True where a token may attend: to itself and the tokens before it."""
    positions = torch.arange(T, device=device)
    return positions <= positions[:, None]


class MLP(nn.Module):
    """Process each token on its own: project up to 4C channels, apply the activation, and project down to C."""

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
    """Attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.attention(self.attention_norm(x), cache)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A decoder-only transformer: it maps tokens to a distribution over the next token, at every position."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.label_smoothing = 0.0  # of the training loss
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.ngram_embedding = NGramEmbedding(config) if config.ngram > 1 else None
        self.token_shift = TokenShift(config) if config.token_shift else None
        self.position = make_position(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.init == "gpt2":
            self._init_gpt2()
        else:
            self._init_zero()

    def _init_gpt2(self) -> None:
        """Draw matrices from a normal distribution of std 0.02, less for writes to the residual stream; zero biases."""
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def _init_zero(self) -> None:
        """Zero the matrices that write to the residual stream or the logits, except the token embedding.

        Each block starts as the identity. Zhang et al. 2019 (Fixup) and Yang et al. 2022 (muP, appendix D.2) found that
        this trains well.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("token_embedding"):
                nn.init.normal_(parameter)
            elif name.endswith(("qkv.weight", "up.weight")):
                nn.init.normal_(parameter, std=0.5 / math.sqrt(self.config.n_embd))
            elif parameter.dim() >= 2 or name.endswith("bias"):
                nn.init.zeros_(parameter)

    def new_cache(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> KVCache:
        """Return an empty cache of keys and values of this dtype for `next_logits`."""
        return KVCache(self.config, batch, dtype, self.token_embedding.weight.device)

    def embed(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Map tokens (B, T), which follow those in the cache, to embeddings (B, T, C)."""
        T = tokens.size(1)
        if cache and self.config.lookback:
            tokens = torch.cat((cache.last_tokens, tokens), dim=1)
            cache.last_tokens.copy_(tokens[:, -self.config.lookback :])
        x = self.token_embedding(tokens.clamp(min=0) if cache else tokens)
        if self.ngram_embedding:
            x = self.ngram_embedding(tokens, x)
        if cache:
            x = x.where(tokens[..., None] >= 0, 0.0)  # there is nothing before the first token
        if self.token_shift:
            x = self.token_shift(x)
        return x[:, -T:]

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Map tokens (B, T) to the normalized output of the last block, (B, T, C)."""
        layers = cache.layers(tokens.size(1)) if cache else [None] * len(self.blocks)
        x = self.dropout(self.position(self.embed(tokens, cache), layers[0].positions if layers[0] else None))
        device = x.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
            x = x.bfloat16()  # half the memory to read and write; float16 could overflow
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, layer)
        if cache:
            cache.length += tokens.size(1)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map (..., C) to logits (..., V)."""
        weight = self.token_embedding.weight if self.head is None else self.head.weight
        if hidden.is_cuda and hidden.dim() == 3:  # tensor cores want many rows in multiples of 64
            weight = F.pad(weight, (0, 0, 0, -self.config.vocab_size % 64))
        return F.linear(hidden, weight)[..., : self.config.vocab_size]

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V) of tokens (B, T), T <= block_size.

        With targets (B, T), return the loss instead.
        """
        hidden = self.hidden(tokens)
        return self.logits(hidden) if targets is None else self.loss(hidden, targets)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of targets (B, T), given hidden (B, T, C), in nats per token, a scalar.

        Targets of -1 do not count. In training mode, label smoothing (Szegedy et al. 2016) gives `label_smoothing` of
        the target's probability to all tokens alike.
        """
        smoothing = self.label_smoothing if self.training else 0.0
        logits = self.logits(hidden).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, label_smoothing=smoothing)

    def next_logits(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the logits (B, V) of the token that follows tokens (B, T).

        With a cache, `tokens` are only the new ones; together with the cached ones they are at most block_size.
        """
        return self.logits(self.hidden(tokens, cache)[:, -1])
