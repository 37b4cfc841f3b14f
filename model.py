# SPDX-License-Identifier: GPL-3.0-only
"""
What is a GPT? The model in one file, from token ids to the loss.

    model = GPT(GPTConfig(n_layer=6, n_head=8, n_embd=512, vocab_size=32000))
    loss = model(idx, targets)                      # training: mean cross-entropy, in nats
    logits = model(idx)                             # (B, T, vocab_size)
    for token in model.generate(idx, n=100): ...    # one column of ids (B, 1) at a time

At every position a GPT predicts the next token. In each block, attention lets
a position read from the positions before it, and the MLP processes what was
read. Both add to the residual stream: one vector per position, which runs
through the network from bottom to top.

GPTConfig covers GPT-2, Llama and Qwen3. Read as far as the end of class GPT.
After it come the KV cache, what makes training fast on a CPU, and the checks
of the settings.

B, T, C in the comments: batch, time (positions) and channels (n_embd).
"""
import copy
import math
import re
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass
class GPTConfig:
    # the shape of the model; parameters grow with n_layer * n_embd^2
    block_size: int = 1024  # context: the most tokens that the model can read at once
    vocab_size: int = 50257  # number of distinct tokens
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads per block; a head_dim of 64 or 128 is usual
    n_kv_head: Literal["auto"] | int = "auto"  # key and value heads, each shared by several query heads; auto: n_head
    n_embd: int = 768  # channels of the residual stream
    head_dim: Literal["auto"] | int = "auto"  # channels of one head; auto: n_embd / n_head
    n_inner: Literal["auto"] | int = "auto"  # channels inside the MLP; auto: 4 n_embd, with swiglu 8/3 n_embd
    # the family
    pos: Literal["learned", "rope"] = "learned"  # a vector per position, or rotated queries and keys
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # rmsnorm: cheaper, as good
    mlp: Literal["gelu", "gelu_exact", "swiglu"] = "gelu"  # gelu: GPT-2's tanh form
    qk_norm: bool = False  # RMSNorm on queries and keys: stable at higher learning rates
    bias: bool = False  # in linear and norm layers; true in GPT-2, false is a bit better and faster
    tie_weights: bool = True  # one matrix for token embeddings and logits
    dropout: float = 0.0  # share of activations set to 0 in training; 0.1 or more for many epochs
    qkv_bias: bool = False  # biases of queries, keys and values alone: Qwen2
    rope_theta: float = 10000.0  # rope: larger rotates channels more slowly, for long contexts
    rope_scaling: str = "none"  # rope beyond the context of training, such as linear,factor=2; see `scale_rope`
    norm_eps: float = 1e-5  # epsilon inside the norm's square root


# The modules below get a config in which `resolve`, at the end of this file,
# has put a number in place of every "auto".


class RMSNorm(nn.Module):
    """x divided by the root of the mean of its squares, times a weight (arXiv 1910.07467)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        # In float32: squares of bfloat16 numbers are too coarse.
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale * self.weight).type_as(x)


def make_norm(config, dim):
    # Norms keep what each layer reads at the same scale; without them, deep
    # networks do not train.
    if config.norm == "rmsnorm":
        return RMSNorm(dim, config.norm_eps)
    return nn.LayerNorm(dim, eps=config.norm_eps, bias=config.bias)


def rotary_table(config):
    """Cosine and sine of every angle that rope needs: two tensors (block_size, head_dim / 2)."""
    half = config.head_dim // 2
    # From 1 radian per position for the first pair of channels, 0 and half (see
    # `rotate`), to about 1 / rope_theta for the last.
    speed = 1 / config.rope_theta ** (torch.arange(half) / half)
    speed, size = scale_rope(speed, config)
    angle = torch.arange(config.block_size)[:, None] * speed  # (block_size, head_dim / 2)
    return size * angle.cos(), size * angle.sin()


def scale_rope(speed, config):
    """(speed, size) of rotations for a context longer than in training (`old`).

    Slowed down by a factor, long distances get angles that the model has seen:
    linear (Chen 2023, arXiv 2306.15595). But fast pairs of channels tell
    neighbours apart, and have seen every angle. So yarn (Peng 2023, arXiv
    2309.00071) and llama3 (arXiv 2407.21783) keep their speed, slow down the
    pairs that hardly complete a turn, and mix in between.
    """
    kind, by = read_rope_scaling(config)
    if kind == "none":
        return speed, 1.0
    half = len(speed)
    size = 1.0
    old = by.get("original_max_position_embeddings")
    # The share of its speed that each pair keeps: from 1 to 0, linear in ...
    if kind == "linear":
        keep = torch.zeros(half)
    elif kind == "llama3":  # ... its turns within the old context
        low, high = by["low_freq_factor"], by["high_freq_factor"]
        keep = (old * speed / (2 * math.pi) - low) / (high - low)
    else:  # ... its number, between the pairs that turn beta_fast and beta_slow times
        def number(turns):
            return half * math.log(old / (2 * math.pi * turns)) / math.log(config.rope_theta)

        first = max(math.floor(number(by["beta_fast"])), 0)
        last = min(math.ceil(number(by["beta_slow"])), 2 * half - 1)
        last += 0.001 * (last == first)
        keep = (last - torch.arange(half)) / (last - first)
        # Among more positions, attention is less sharp: larger q and k make
        # up for it.
        size = by["attention_factor"] or 0.1 * math.log(max(1, by["factor"])) + 1
    keep = keep.clamp(0, 1)
    return speed * keep + speed / by["factor"] * (1 - keep), size


def rotate(x, cos, sin):
    """Rotate channels i and i + head_dim / 2 by an angle per position (Su 2021, arXiv 2104.09864).

    Positions enter the product of a rotated query and a rotated key only
    through the distance between them. x: (B, heads, T, head_dim); cos, sin:
    (1, T, head_dim / 2), or (B, 1, 1, head_dim / 2) where rows differ in
    position.
    """
    first, second = x.chunk(2, dim=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    return torch.cat(turned, dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal self-attention: softmax(q k^T / sqrt(head_dim)) v (Vaswani 2017, arXiv 1706.03762).

    Each position averages the values of all positions up to its own, weighted
    by how well their keys match its query. Groups of query heads may share
    keys and values, which makes the KV cache smaller (Ainslie 2023, arXiv
    2305.13245).
    """

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer  # its number, for the cache
        self.dropout = config.dropout
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.head_dim
        self.shared = config.n_kv_head < config.n_head  # do heads share keys and values?
        q_width = config.n_head * config.head_dim
        kv_width = config.n_kv_head * config.head_dim
        # q, k and v in one matrix product, which is faster than three.
        self.c_attn = nn.Linear(config.n_embd, q_width + 2 * kv_width, bias=config.bias or config.qkv_bias)
        self.c_proj = nn.Linear(q_width, config.n_embd, bias=config.bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x, rotation=None, cache=None):
        B, T, _ = x.shape
        # 1. Queries, keys and values, with the heads next to the batch.
        heads = self.c_attn(x).view(B, T, -1, self.head_dim)  # (B, T, n_head + 2 n_kv_head, head_dim)
        heads = heads.transpose(1, 2)  # (B, n_head + 2 n_kv_head, T, head_dim)
        q, k, v = heads.split_with_sizes((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        # 2. Each query averages the values whose keys it matches. With a
        #    cache, that includes the keys and values of earlier calls.
        if cache is None:
            y = causal_attention(q, k, v, self.dropout, self.training, self.shared)
        else:
            y = cache.attend(self.layer, q, k, v)  # (B, n_head, T, head_dim), either way
        # 3. The heads side by side again, mixed by one more matrix.
        y = y.transpose(1, 2).flatten(2)  # (B, T, n_head * head_dim)
        y = self.c_proj(y)  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them, for each position: (B, T, C) -> (B, T, C).

    For swiglu (Shazeer 2020, arXiv 2002.05202), c_fc holds the gate and what
    it multiplies side by side.
    """

    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        self.dropout = config.dropout
        parts = 2 if self.kind == "swiglu" else 1
        self.c_fc = nn.Linear(config.n_embd, parts * config.n_inner, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, n_inner), for swiglu (B, T, 2 n_inner)
        if self.kind == "swiglu":
            gate, x = x.chunk(2, dim=-1)  # (B, T, n_inner) each
            x = F.silu(gate) * x
        elif self.kind == "gelu":
            x = gelu(x, self.training)  # (in training, a faster form)
        else:
            x = F.gelu(x)  # gelu_exact: with erf, not tanh
        x = self.c_proj(x)  # (B, T, C)
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Attention, then an MLP: (B, T, C) -> (B, T, C). Each reads a normalized copy of the stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, rotation=None, cache=None):
        # Adding, not replacing: the gradient passes through every block
        # unchanged (He 2015, arXiv 1512.03385).
        x = x + self.attn(self.ln_1(x), rotation, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """The whole model, with GPT-2's names: wte and wpe embed tokens and positions, h are the blocks."""

    def __init__(self, config):
        super().__init__()
        self.config = config = resolve(config)
        # A multiple of 64 rows is faster; `logits` and `loss` leave the
        # padding out.
        padded = round_up(config.vocab_size, 64)
        parts = dict(wte=nn.Embedding(padded, config.n_embd))
        if config.pos == "learned":
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        parts["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        parts["ln_f"] = make_norm(config, config.n_embd)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, padded, bias=False)
        if config.tie_weights:
            # The vector that means a token also predicts it (Press 2016, arXiv
            # 1608.05859).
            self.lm_head.weight = self.transformer.wte.weight
        if config.pos == "rope":
            # Computed, not learned: not part of a checkpoint.
            cos, sin = rotary_table(config)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        # An attribute, so that machine.compile_model can put a compiled one
        # in its place.
        self.chunk_loss = chunk_loss
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initial values: small, so that the first prediction is nearly uniform.

        The first loss is about ln vocab_size; one far above is a bug.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 1:
                # The weights of norm layers.
                p.fill_(1.0)
            elif name.endswith("c_proj.weight"):
                # 2 n_layer of these add to the residual stream. Divided by
                # the root of their number, it ends with the same variance,
                # whatever n_layer is.
                p.normal_(std=0.02 / (2 * self.config.n_layer) ** 0.5)
            else:
                p.normal_(std=0.02)

    def forward(self, idx, targets=None, cache=None):
        """idx: (B, T) token ids. targets: (B, T) ids, -1 where nothing is to be learned.

        With targets, the mean cross-entropy in nats per target; without, the
        logits (B, T, vocab_size).
        """
        x = self.trunk(idx, cache)  # (B, T, C)
        # The loss belongs in here: DistributedDataParallel sees what
        # `forward` does, and nothing else.
        if targets is None:
            return self.logits(x)
        return self.loss(x, targets)

    def trunk(self, idx, cache=None):
        """Token ids (B, T), after those in the cache -> the residual stream after the last block (B, T, C)."""
        T = idx.size(1)
        past = 0 if cache is None else cache.length
        assert past + T <= self.config.block_size, \
            f"{past + T} tokens do not fit into block_size={self.config.block_size}; cut the text"
        # An index of the positions: a slice; in the server, where rows have
        # different lengths and T is 1, a tensor (B, 1).
        at = slice(0, T) if cache is None else cache.positions(T)
        # 1. The vectors of the tokens, and where they are.
        x = self.transformer.wte(idx)  # (B, T, C)
        rotation = None
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[at]  # (T, C), or (B, 1, C)
        else:
            # With an axis for the heads: (1, T, head_dim / 2) each, in the
            # server (B, 1, 1, head_dim / 2).
            rotation = self.rope_cos[at].unsqueeze(-3), self.rope_sin[at].unsqueeze(-3)
        # Activations are dropped at random, so that none is relied on alone
        # (Srivastava 2014).
        x = F.dropout(x, self.config.dropout, self.training)
        # 2. The blocks.
        for block in self.transformer.h:
            x = block(x, rotation, cache)
        if cache is not None:
            cache.advance(T)
        return x

    def logits(self, x):
        """The residual stream (..., C) -> logits of the true vocabulary (..., vocab_size)."""
        return self.lm_head(self.transformer.ln_f(x))[..., :self.config.vocab_size]

    def loss(self, x, targets):
        """Stream (B, T, C), targets (B, T) -> mean cross-entropy in nats; 0 if all are -1."""
        weight = self.lm_head.weight  # (padded vocabulary, C)
        assert weight.is_floating_point(), "8-bit weights (formats/quantized.py) cannot be trained"
        if not torch.is_grad_enabled():
            # CrossEntropy computes the gradient of all that requires one,
            # even under no_grad, as in a validation.
            weight = weight.detach()
        # Not float16: the gradient of a frequent token, a sum over thousands of
        # positions, can overflow.
        dtype = torch.float32 if self.dtype() == torch.float16 else self.dtype()
        x = self.transformer.ln_f(x).flatten(0, 1)  # (N, C), where N = B T
        with torch.autocast(x.device.type, enabled=False):  # it would choose the dtype again
            total = CrossEntropy.apply(
                x, weight, targets.flatten(), self.config.vocab_size, dtype, self.chunk_loss)
        return total / (targets >= 0).sum().clamp(min=1)

    @torch.inference_mode()
    def generate(self, idx, n, pick=None):
        """Continue idx (B, T) by n tokens; yields them one by one, as columns of ids (B, 1).

        pick: (B, vocab_size) float32 logits -> (B,) ids; by default the
        likeliest. sample.py has one with temperature, top_k and more.
        """
        pick = pick or argmax
        size = self.config.block_size
        # Capacity for the prompt and the new tokens, at most for a whole
        # context.
        capacity = min(size, idx.size(1) + n)
        cache = KVCache(self.config, idx.size(0), capacity, idx.device, self.dtype())
        # The model reads the prompt once, then one new token at a time.
        idx = idx[:, -size:]
        unread = idx
        for _ in range(n):
            if cache.length + unread.size(1) > size:
                # The context is full: read its second half again, into an
                # empty cache.
                unread = idx[:, -(size // 2):]
                cache.length = 0
            x = self.trunk(unread, cache)[:, -1]  # (B, C), of the last position
            unread = pick(self.logits(x).float()).to(idx.device)[:, None]  # (B, 1)
            idx = torch.cat((idx, unread), dim=1)[:, -size:]
            yield unread

    def dtype(self):
        """The dtype of matrix products: autocast's where it is on, else that of the weights."""
        weight = self.lm_head.weight
        if torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype if weight.is_floating_point() else torch.float32

    def n_params(self):
        """Number of parameters: tied weights once, without the padding of the vocabulary."""
        rows = self.lm_head.weight.size(0) - self.config.vocab_size  # of padding
        matrices = 1 if self.config.tie_weights else 2
        padding = matrices * rows * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self, T=None):
        """Operations of training, per token of a context of T (PaLM, arXiv 2204.02311, appendix B).

        A weight of a matrix costs 2 operations forward, a multiplication and
        an addition. Backward costs 2 for the gradient of its input, and 2 for
        its own, which a frozen weight does without: 6 in all, or 4. Attention
        adds 12 n_head head_dim T per layer: by convention, the masked half
        counts too.
        """
        c = self.config
        attention = 12 * c.n_layer * c.n_head * c.head_dim * (T or c.block_size)
        blocks = [p for p in self.transformer.h.parameters() if p.dim() == 2]
        matrices = [(p.numel(), p.requires_grad) for p in blocks]
        matrices.append((c.vocab_size * c.n_embd, self.lm_head.weight.requires_grad))
        return attention + sum(n * (6 if trained else 4) for n, trained in matrices)


def argmax(logits):
    """The likeliest token of each row: (B, vocab_size) -> (B,)."""
    return logits.argmax(dim=-1)


# OpenAI's models of 2019, ours, and the layout of Qwen3 for any size; the
# number is n_params().
GPT2 = dict(block_size=1024, vocab_size=50257, bias=True)
OPENLLM = dict(vocab_size=32000, bias=True)
PRESETS = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, **GPT2),  # 124,439,808
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, **GPT2),  # 354,823,168
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, **GPT2),  # 774,030,080
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, **GPT2),  # 1,557,611,200
    "openllm-small": dict(n_layer=6, n_head=8, n_embd=512, block_size=1024, **OPENLLM),  # 35,823,616
    "openllm-medium": dict(n_layer=12, n_head=12, n_embd=768, block_size=2048, **OPENLLM),  # 111,204,864
    "openllm-large": dict(n_layer=24, n_head=16, n_embd=1024, block_size=2048, **OPENLLM),  # 337,176,576
    "modern": dict(pos="rope", norm="rmsnorm", mlp="swiglu", qk_norm=True, bias=False),
}


# ---------- The KV cache


class KVCache:
    """Keys and values of the tokens read so far: (n_layer, B, n_kv_head, capacity, head_dim) each.

    For the next token, those before it need not be computed again:
    their keys and values are all that attention reads of them. A cache of
    another kind, such as the server's, has these four:

        length                  how many positions it holds
        positions(T)            an index for those of T new tokens
        attend(layer, q, k, v)  called by each layer with the new tokens
        advance(T)              called once all layers have attended
    """

    def __init__(self, config, batch_size, capacity=None, device=None, dtype=None):
        capacity = capacity or config.block_size
        shape = (config.n_layer, batch_size, config.n_kv_head, capacity, config.head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.layers = list(zip(self.k, self.v))  # views, made once
        self.length = 0

    def row(self, i):
        """Row i as a cache in the same memory, with a length of its own."""
        # The server gives each request a row; rows are filled to different
        # lengths.
        row = copy.copy(self)
        row.number = i  # for the server
        row.k = self.k[:, i:i + 1]
        row.v = self.v[:, i:i + 1]
        row.layers = list(zip(row.k, row.v))
        return row

    def positions(self, T):
        return slice(self.length, self.length + T)

    def attend(self, layer, q, k, v):
        """Attention of T new tokens to the past and themselves: (B, n_head, T, head_dim), like q.

        k, v: (B, n_kv_head, T, head_dim).
        """
        k, v = self.extend(layer, k, v)  # (B, n_kv_head, past + T, head_dim)
        T = q.size(2)
        shared = k.size(1) != q.size(1)
        # 1. Nothing before: scores (T, T), masked as in training.
        if self.length == 0:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        # 2. One new token: it sees all, and no mask is needed.
        if T == 1:
            return attend_from_one(q, k, v)
        # 3. Several after a past: new token i sees everything up to column
        #    past + i.
        mask = torch.ones(T, k.size(2), dtype=torch.bool, device=q.device)
        mask = mask.tril(self.length)  # (T, past + T)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared)

    def extend(self, layer, k, v):
        """Write k, v (B, n_kv_head, T, head_dim) after the past. Returns past and new together."""
        end = self.length + k.size(2)
        assert end <= self.k.size(3), f"{end} positions do not fit into a cache of {self.k.size(3)}"
        keys, values = self.layers[layer]  # (B, n_kv_head, capacity, head_dim)
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, T):
        self.length += T


def attend_from_one(q, k, v):
    """Attention of one token, q (B, n_head, 1, head_dim), to k and v (B, n_kv_head, T, head_dim)."""
    if k.size(1) == q.size(1):
        return F.scaled_dot_product_attention(q, k, v)
    # Query heads that share a key head are passed as if they were several
    # tokens of one head. enable_gqa would copy the keys: 3.6 times as slow in
    # bfloat16.
    B, n_kv_head, _, head_dim = k.shape
    grouped = q.reshape(B, n_kv_head, -1, head_dim)  # (B, n_kv_head, n_head / n_kv_head, head_dim)
    return F.scaled_dot_product_attention(grouped, k, v).reshape(q.shape)


# ---------- Faster training on CPUs

# B n_head T^2. Beyond, attention_by_formula is slower: its scores no longer
# fit into the caches of the processor, and take much memory.
MOST_SCORES = 1 << 25


def causal_attention(q, k, v, dropout, training, shared):
    """Attention without a cache: (B, n_head, T, head_dim), like q. shared: k, v have fewer heads.

    PyTorch's kernel holds no (T, T) scores. But for training in bfloat16 on a
    CPU, the formula is twice as fast. (In float32 it is no slower, so the
    dtype is not asked.)
    """
    B, n_head, T, _ = q.shape
    if not training:
        dropout = 0.0
    if training and q.device.type == "cpu" and B * n_head * T * T <= MOST_SCORES:
        return attention_by_formula(q, k, v, dropout)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=shared)


def attention_by_formula(q, k, v, dropout=0.0):
    """Causal attention, step by step. q: (B, n_head, T, head_dim); k, v: n_kv_head heads."""
    # 1. Shared heads are copied, one for each query head.
    if k.size(1) < q.size(1):
        copies = q.size(1) // k.size(1)
        k = k.repeat_interleave(copies, dim=1)
        v = v.repeat_interleave(copies, dim=1)
    # 2. A mask to add: -inf where j > i.
    T = q.size(2)
    future = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device)
    future = future.triu(1)  # 0 where j <= i
    # 3. Scaling q is cheaper than scaling the scores: head_dim products per
    #    position, not T.
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # (B, n_head, T, T)
    weights = (scores + future).softmax(dim=-1)
    return F.dropout(weights, dropout) @ v  # (B, n_head, T, head_dim)


def gelu(x, training):
    """GPT-2's GELU: x / 2 (1 + tanh(u)), where u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    if training and x.device.type == "cpu" and torch.compiler.is_compiling():
        # 1 + tanh(u) = 2 sigmoid(2 u): in a compiled kernel, exp takes half
        # the time of tanh.
        return x * torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate="tanh")


# ---------- The loss in chunks

CHUNK_LOGITS = 1 << 24  # logits of a chunk: 67 MB in float32, and some copies


class CrossEntropy(torch.autograd.Function):
    """The sum of -ln p over the targets other than -1, without the logits of all tokens at once.

    With a large vocabulary they take more memory than the model. But their
    gradient is known at once: softmax(logits), minus 1 at the target. So
    forward also computes the gradients, chunk by chunk, and backward only
    scales them (in place, so it can run only once). torch.nn.functional.linear_cross_entropy does the same,
    but is slower on CPUs and less exact: docs/lab-notes.md.

    x: (N, C); weight: (V, C), of which the first vocab_size rows are tokens;
    targets: (N,).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, dtype, chunk_loss):
        # 1. The weights in the dtype of the product, and memory for the
        #    gradients that are asked for.
        w = weight[:vocab_size].to(dtype)
        x_grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        w_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = x.new_zeros((), dtype=torch.float32)
        # 2. Chunks of equal size (the last may be smaller), since code is
        #    compiled for one size.
        chunks = math.ceil(len(x) * vocab_size / CHUNK_LOGITS)
        size = math.ceil(len(x) / chunks)
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            part = x[rows].to(dtype)
            # The logits exist only here: the next chunk takes their memory.
            loss, grad = chunk_loss(F.linear(part, w), targets[rows])  # grad: (chunk, vocab_size)
            total += loss
            if x_grad is not None:
                x_grad[rows] = grad @ w
            if w_grad is not None:
                w_grad[:vocab_size] += grad.T @ part
        # 3. What backward needs.
        ctx.grads = x_grad, w_grad
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x_grad, w_grad = ctx.grads
        ctx.grads = None  # they are large
        if x_grad is not None:
            x_grad.mul_(grad_output)
        if w_grad is not None:
            w_grad.mul_(grad_output)
        return x_grad, w_grad, None, None, None, None


def chunk_loss(logits, targets):
    """Logits (N, vocab_size), targets (N,) -> (sum of -ln p, its gradient (N, vocab_size))."""
    logprobs = logits.float().log_softmax(dim=-1)  # a sum over the vocabulary needs float32
    # 1. The loss: of each row, the logprob of its target.
    learned = targets >= 0
    at = targets.clamp(min=0)[:, None]
    loss = -(logprobs.gather(1, at)[:, 0] * learned).sum()
    # 2. The gradient: probabilities (overwriting their logarithms), minus 1
    #    at the target.
    grad = logprobs.exp_()
    grad.scatter_add_(1, at, torch.full_like(at, -1, dtype=grad.dtype))
    return loss, grad.mul_(learned[:, None]).to(logits.dtype)


# ---------- Can this shape exist?

# A message is a statement, or "statement; what to type": "dropout=2 is not in
# [0, 1); --dropout=0.1". resume.build_model makes a UserError of both.

AUTO = "auto", 0  # older checkpoints have the 0
LARGEST = 1 << 24  # the largest n_embd, n_layer, ...: a product of two stays far below 2^63


# The numbers of each rope_scaling, by their names in Hugging Face's config.json;
# None: it has to be given. An attention_factor of 0 is computed.
ROPE_SCALING = {
    "none": {},
    "linear": dict(factor=None),
    "llama3": dict.fromkeys(
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    "yarn": dict(factor=None, original_max_position_embeddings=None, beta_fast=32.0, beta_slow=1.0,
                 attention_factor=0.0),
}


def read_rope_scaling(config):
    """The kind and the numbers of a rope_scaling: ("linear", {"factor": 2.0}) of linear,factor=2."""
    text = config.rope_scaling
    kind, *given = text.split(",")
    assert kind in ROPE_SCALING, f"rope_scaling={text} is not one of {', '.join(ROPE_SCALING)}"
    numbers = ROPE_SCALING[kind] | dict(pair.partition("=")[::2] for pair in given)
    for name, value in numbers.items():
        known = name in ROPE_SCALING[kind] and re.fullmatch(r"\d+(\.\d+)?(e[+-]?\d+)?", str(value))
        numbers[name] = float(value) if known else -1
        smallest = 0 if name == "attention_factor" else 1e-6
        assert smallest <= numbers[name] < 1e12, (
            f"rope_scaling={text}: {name} is missing, unknown or out of range; "
            f"{kind} has {', '.join(ROPE_SCALING[kind])}")
    assert kind != "yarn" or config.rope_theta > 1, f"rope_scaling={text} needs a rope_theta above 1"
    return kind, numbers


def round_up(n, multiple):
    return math.ceil(n / multiple) * multiple


def resolve(config):
    """A copy with numbers in place of "auto". Asserts that the shape can exist."""
    # 1. Types and ranges. A TrainConfig, which inherits from GPTConfig, may
    #    be given too.
    c = GPTConfig(**{field.name: getattr(config, field.name) for field in fields(GPTConfig)})
    for field in fields(GPTConfig):
        check_field(field, getattr(c, field.name))
    for name in ("rope_theta", "norm_eps"):
        value = getattr(c, name)
        assert 0 < value < 1e12, f"{name}={value} must be above 0 and below 1e12"
    assert 0 <= c.dropout < 1, f"dropout={c.dropout} is not in [0, 1); --dropout=0.1"
    read_rope_scaling(c)
    # 2. The heads.
    if c.head_dim in AUTO:
        next_embd = round_up(c.n_embd, c.n_head)
        assert next_embd == c.n_embd, (
            f"n_embd={c.n_embd} is not a multiple of n_head={c.n_head}; --n_embd={next_embd}")
        c.head_dim = c.n_embd // c.n_head
    assert c.pos != "rope" or c.head_dim % 2 == 0, (
        f"rope rotates channel pairs, but head_dim={c.head_dim} is odd; --head_dim={c.head_dim + 1}")
    # With a head_dim of its own, n_head * head_dim (of the queries) and
    # block_size * head_dim (of rope's table) can be huge: at most 2^30 here.
    for name in ("n_head", "block_size"):
        value = getattr(c, name)
        assert value * c.head_dim <= 64 * LARGEST, (
            f"{name}={value:,} is too large for head_dim={c.head_dim:,}")
    if c.n_kv_head in AUTO:
        c.n_kv_head = c.n_head
    assert c.n_head % c.n_kv_head == 0, (
        f"n_head={c.n_head} is not a multiple of n_kv_head={c.n_kv_head}; --n_kv_head={c.n_head} or 1")
    # 3. The MLP: three matrices of 8/3 n_embd have as many weights as two of
    #    4 n_embd. A multiple of 64 is faster.
    if c.n_inner in AUTO:
        c.n_inner = round_up(8 * c.n_embd / 3, 64) if c.mlp == "swiglu" else 4 * c.n_embd
    return c


def check_field(field, value):
    """Asserts that a value has the type of its field, and is one of its choices or in its range."""
    name, kind, choices = field.name, type(field.default), get_args(field.type)
    if field.default == "auto":
        kind, choices = int, ()  # (get_args has found the types of a union, not choices)
        if value in AUTO:
            return
    whole_as_float = kind is float and type(value) is int
    assert type(value) is kind or whole_as_float, f"{name}={value!r} is not of type {kind.__name__}"
    assert not choices or value in choices, f"{name}={value} is not one of {', '.join(choices)}"
    if kind is int:
        # A number from a stranger's file must not make PyTorch try to allocate
        # petabytes.
        assert 1 <= value <= LARGEST, f"{name}={value:,} is out of range; --{name}=1 to {LARGEST}"


def outline(config, tensors):
    """A GPT whose weights take no memory. tensors: how many a checkpoint holds, which bounds n_layer."""
    config = resolve(config)
    # A layer takes time to build, even without weights.
    assert config.n_layer <= tensors, (
        f"n_layer={config.n_layer:,}, but there are only {tensors:,} tensors")
    with torch.device("meta"):
        return GPT(config)


if __name__ == "__main__":
    print("model.py only defines a GPT; to train one: python train.py config/train_small.py")
