# SPDX-License-Identifier: GPL-3.0-only
"""
The model: a GPT in one file, from the attention to the loss.

    model = GPT(GPTConfig(n_layer=6, n_head=8, n_embd=512, vocab_size=32000))
    loss = model(idx, targets)                      # training: the mean cross-entropy, in nats per token
    logits = model(idx)                             # (B, T, vocab_size)
    for token in model.generate(idx, n=100): ...    # (B, 1) at a time, with a cache of keys and values

A GPT reads token ids and predicts, at every position, the token that comes next. Each of its layers does two things:
attention lets a position read from the positions before it, the MLP processes what was read. Both add their result
to a stream of vectors that runs through the network from bottom to top, the residual stream.

Two families share this code, and GPTConfig says in one place where they differ: GPT-2 (learned positions, LayerNorm,
GELU) and the layout of Llama and Qwen3 (rotary positions, RMSNorm, SwiGLU). The parts come first, then GPT; to see the
whole before its parts, begin at class GPT.

B, T, C in the comments: batch, time (positions) and channels (n_embd).
"""
import copy
import functools
import math
import warnings
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass
class GPTConfig:
    # the shape of the model; parameters grow with n_layer * n_embd^2
    block_size: int = 1024  # context: the most tokens that the model can look back on
    vocab_size: int = 50257  # number of distinct tokens
    n_layer: int = 12  # blocks, one above the other
    n_head: int = 12  # attention heads of a block; head_dim of 64 or 128 is usual
    n_kv_head: int = 0  # heads of keys and values, shared by groups of query heads; 0: n_head (no sharing)
    n_embd: int = 768  # channels of the residual stream
    head_dim: int = 0  # channels of one head; 0: n_embd / n_head
    n_inner: int = 0  # width of the MLP; 0: 4 n_embd, for swiglu 8/3 n_embd rounded up to a multiple of 64
    # the family
    pos: Literal["learned", "rope"] = "learned"  # positions: a learned vector each, or a rotation of queries and keys
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # rmsnorm leaves out the mean: cheaper, as good
    mlp: Literal["gelu", "gelu_exact", "swiglu"] = "gelu"  # gelu is GPT-2's tanh form; swiglu multiplies by a gate
    qk_norm: bool = False  # RMSNorm on queries and keys: keeps attention scores bounded, so stable at higher rates
    bias: bool = False  # biases in the linear and norm layers: true in GPT-2; false is a bit better and faster
    tie_weights: bool = True  # one matrix for reading tokens and for predicting them
    dropout: float = 0.0  # share of activations set to 0 in training: 0 for one pass over the data, 0.1+ for many
    rope_theta: float = 10000.0  # rope: the slowest rotation takes about 2 pi rope_theta positions for a turn
    norm_eps: float = 1e-5  # added to the variance before the root


GPT2 = dict(block_size=1024, vocab_size=50257, bias=True)  # OpenAI, 2019
OPENLLM = dict(vocab_size=32000, bias=True)
PRESETS = {  # the number behind each is n_params()
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, **GPT2),  # 124,439,808
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, **GPT2),  # 354,823,168
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, **GPT2),  # 774,030,080
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, **GPT2),  # 1,557,611,200
    "openllm-small": dict(n_layer=6, n_head=8, n_embd=512, block_size=1024, **OPENLLM),  # 35,823,616
    "openllm-medium": dict(n_layer=12, n_head=12, n_embd=768, block_size=2048, **OPENLLM),  # 111,204,864
    "openllm-large": dict(n_layer=24, n_head=16, n_embd=1024, block_size=2048, **OPENLLM),  # 337,176,576
    "modern": dict(pos="rope", norm="rmsnorm", mlp="swiglu", qk_norm=True, bias=False),  # Qwen3's layout, any size
}


LARGEST = 1 << 24  # of the numbers in a shape: beyond any model there is, and no product of a few of them overflows


def round_up(n, multiple):
    """The smallest multiple that is at least n: matrix kernels like round sizes."""
    return math.ceil(n / multiple) * multiple


def resolve(config):
    """A copy of the config with every 0 that means "derive it" filled in. Asserts that the shape can exist at all."""
    c = GPTConfig(**{name: getattr(config, name) for name in GPTConfig.__dataclass_fields__})
    for field in fields(GPTConfig):
        name, value, kind, choices = field.name, getattr(c, field.name), type(field.default), get_args(field.type)
        assert type(value) is kind or (kind is float and type(value) is int), f"{name}={value!r} is no {kind.__name__}"
        assert not choices or value in choices, f"{name}={value} is none of {', '.join(choices)}"
        if kind is int:
            least = 0 if name in ("n_kv_head", "head_dim", "n_inner") else 1
            assert value >= least, f"{name}={value:,} is too small; --{name}={least} or more"
            assert value <= LARGEST, f"a model with {name}={value:,} cannot be made here; a smaller --{name}"
    for name in ("rope_theta", "norm_eps"):
        assert 0 < getattr(c, name) < 1e12, f"{name}={getattr(c, name)} is out of range: above 0, below 1e12"
    assert c.head_dim or c.n_embd % c.n_head == 0, (
        f"n_embd={c.n_embd} is not a multiple of n_head={c.n_head}; --n_embd={round_up(c.n_embd, c.n_head)}")
    c.n_kv_head = c.n_kv_head or c.n_head
    assert c.n_head % c.n_kv_head == 0, (
        f"n_head={c.n_head} is not a multiple of n_kv_head={c.n_kv_head}; --n_kv_head={c.n_head} or 1")
    c.head_dim = c.head_dim or c.n_embd // c.n_head
    assert c.n_head * c.head_dim <= LARGEST, f"n_head={c.n_head:,} heads of head_dim={c.head_dim:,} cannot be made here"
    assert c.block_size * c.head_dim <= 64 * LARGEST, (  # numbers in the tables of rope: 4 GB
        f"a context of block_size={c.block_size:,} cannot be made here with head_dim={c.head_dim:,}")
    assert c.pos != "rope" or c.head_dim % 2 == 0, (
        f"rope turns pairs of channels, and head_dim={c.head_dim} is odd; --head_dim={c.head_dim + 1}")
    c.n_inner = c.n_inner or (round_up(8 * c.n_embd / 3, 64) if c.mlp == "swiglu" else 4 * c.n_embd)
    assert 0 <= c.dropout < 1, f"dropout={c.dropout} is not in [0, 1); --dropout=0.1"
    return c


def outline(config, tensors):
    """A GPT of this shape whose weights take no memory. Asserts that so many tensors can be enough for its layers."""
    config = resolve(config)
    assert config.n_layer <= tensors, f"n_layer={config.n_layer:,}, but there are only {tensors:,} tensors"
    with torch.device("meta"):
        return GPT(config)


class RMSNorm(nn.Module):
    """x divided by its root mean square, times a learned weight (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)  # float32: squares of bf16 are coarse
        return (x.float() * scale * self.weight).type_as(x)


def make_norm(config, dim):
    if config.norm == "rmsnorm":
        return RMSNorm(dim, config.norm_eps)
    return nn.LayerNorm(dim, eps=config.norm_eps, bias=config.bias)


def rotary_table(config):
    """Cosine and sine of every angle that rope needs: two tensors (block_size, head_dim / 2)."""
    half = config.head_dim // 2
    speed = 1 / config.rope_theta ** (torch.arange(half) / half)  # turns ever more slowly: 1 down to ~1 / rope_theta
    angle = torch.arange(config.block_size)[:, None] * speed  # (block_size, head_dim / 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn channel i with channel i + head_dim / 2 by the angle of the position (Su 2021, arXiv 2104.09864).

    The product of a rotated query and a rotated key depends on the distance of their positions alone, which is how
    the model knows order without a vector per position. x: (B, heads, T, head_dim); cos, sin: (1, T, head_dim / 2).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


def look_back(q, k, v):
    """Attention of one token to all before it, and itself. q: (B, n_head, 1, head_dim); k, v: n_kv_head heads."""
    if k.size(1) == q.size(1):
        return F.scaled_dot_product_attention(q, k, v)
    # Heads that share keys ask like several tokens, (B, n_kv_head, n_head / n_kv_head, head_dim). Otherwise each would
    # get a copy of the keys, 3.6 times as slow in bfloat16.
    return F.scaled_dot_product_attention(q.reshape(*k.shape[:2], -1, k.size(3)), k, v).reshape(q.shape)


class KVCache:
    """Keys and values of the tokens read so far, so that a new token computes its own row of attention and no more.

    Sized once for `capacity` positions, so that nothing is allocated or copied as the text grows. `length` counts the
    positions that hold something: every layer writes after it, and GPT.trunk advances it once all layers have written.
    Memory: 2 * n_layer * batch_size * capacity * n_kv_head * head_dim numbers, which a CPU takes as they are filled.
    """

    def __init__(self, config, batch_size, capacity=None, device=None, dtype=None):
        shape = (config.n_layer, batch_size, config.n_kv_head, capacity or config.block_size, config.head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.layers = list(zip(self.k, self.v))  # views of the same memory, made once
        self.length = 0

    def row(self, i):
        """Row i as a cache of its own, in the same memory and with a length of its own."""
        row = copy.copy(self)
        row.number, row.k, row.v = i, self.k[:, i:i + 1], self.v[:, i:i + 1]
        row.layers = list(zip(row.k, row.v))
        return row

    def positions(self, T):
        """Where in the text T new tokens stand: an index into tables by position; engine.Rows has one for each row."""
        return slice(self.length, self.length + T)

    def attend(self, layer, q, k, v):
        """Attention of T new tokens to the past and themselves. q: (B, n_head, T, head_dim); k, v: n_kv_head heads."""
        k, v = self.extend(layer, k, v)  # (B, n_kv_head, past + T, head_dim)
        mask = self.mask(q.size(2))  # (T, past + T)
        if mask is None and self.length > 0:
            return look_back(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and self.length == 0,
                                              enable_gqa=k.size(1) != q.size(1))  # (B, n_head, T, head_dim)

    def extend(self, layer, k, v):
        """Write k, v (B, n_kv_head, T, head_dim) after the past. Returns past and new together."""
        end = self.length + k.size(2)
        assert end <= self.k.size(3), f"{end} positions do not fit into a cache of {self.k.size(3)}; give a larger one"
        keys, values = self.layers[layer]  # (B, n_kv_head, capacity, head_dim)
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def mask(self, T):
        """Which keys each of T new queries may see, (T, past + T); None where the attention finds that out by itself.

        It does without a past, where query i sees keys 0..i; and one new token sees everything. Several new tokens
        after a past need it spelled out: row i of tril(past) is true up to column past + i.
        """
        if self.length == 0 or T == 1:
            return None
        return torch.ones(T, self.length + T, dtype=torch.bool, device=self.k.device).tril(self.length)

    def advance(self, T):
        """All layers have written T new positions."""
        self.length += T


MOST_SCORES = 1 << 25  # B n_head T^2 of a layer: beyond it, their memory costs more than the formula's speed brings


def attention(q, k, v, dropout=0.0):
    """Causal attention by its formula. q: (B, n_head, T, head_dim); k, v: n_kv_head heads.

    scaled_dot_product_attention is the same, and never holds all the scores at once. Trained on a CPU in bfloat16,
    it takes twice as long, though: 54 instead of 28 ms forward and backward for 4 x 8 heads of 64 and 512 tokens. (In
    float32 it takes as long, and is done alike, so that there is one way to train.)
    """
    if k.size(1) < q.size(1):  # a copy of keys and values for every head that shares them
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    later = torch.full((q.size(2), q.size(2)), -torch.inf, dtype=q.dtype, device=q.device).triu(1)  # 0 where j <= i
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # (B, n_head, T, T)
    return F.dropout((scores + later).softmax(dim=-1), dropout) @ v  # (B, n_head, T, head_dim)


class Attention(nn.Module):
    """Causal self-attention (Vaswani 2017, arXiv 1706.03762), with grouped queries (Ainslie 2023, arXiv 2305.13245).

    Every position asks with a query, every position before it (and itself) answers with a key, and the values of the
    best matches are averaged: softmax(q k^T / sqrt(head_dim)) v. The division keeps the scores near variance 1 whatever
    head_dim is, so that the softmax is neither flat nor picks one key alone. Several heads look for several things.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        width, kv_width = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.c_attn = nn.Linear(config.n_embd, width + 2 * kv_width, bias=config.bias)  # q, k, v in one product
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim, config.norm_eps), RMSNorm(self.head_dim, config.norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x, rotation=None, cache=None):
        B, T, _ = x.shape
        # Heads go next to the batch, so that each head is a matrix product of its own.
        heads = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head + 2 n_kv_head, T, head_dim)
        q, k, v = heads.split_with_sizes((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)

        if cache is None and self.training and x.device.type == "cpu" and B * self.n_head * T * T <= MOST_SCORES:
            y = attention(q, k, v, self.dropout)  # (B, n_head, T, head_dim)
        elif cache is None:
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0,
                enable_gqa=self.n_kv_head != self.n_head)  # (B, n_head, T, head_dim)
        else:
            y = cache.attend(self.layer, q, k, v)  # (B, n_head, T, head_dim)
        y = y.transpose(1, 2).flatten(2)  # the heads side by side again: (B, T, n_head * head_dim)
        y = self.c_proj(y)
        return F.dropout(y, self.dropout) if self.training else y


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them, applied to each position separately.

    gelu is GPT-2's; swiglu multiplies by silu(gate) instead (Shazeer 2020, arXiv 2002.05202): c_fc then holds the gate
    and the value side by side.
    """

    def __init__(self, config):
        super().__init__()
        self.kind, self.dropout = config.mlp, config.dropout
        self.c_fc = nn.Linear(config.n_embd, config.n_inner * (2 if self.kind == "swiglu" else 1), bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, n_inner), for swiglu (B, T, 2 n_inner)
        if self.kind == "swiglu":
            gate, x = x.chunk(2, dim=-1)  # (B, T, n_inner) each
            x = F.silu(gate) * x
        elif self.kind == "gelu" and self.training and x.device.type == "cpu" and torch.compiler.is_compiling():
            # The same, by 1 + tanh(u) = 2 sigmoid(2 u): in a compiled kernel, exp takes half the time of tanh.
            x = x * torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x))
        else:
            x = F.gelu(x, approximate="tanh" if self.kind == "gelu" else "none")
        x = self.c_proj(x)
        return F.dropout(x, self.dropout) if self.training else x


class Int8Linear(nn.Module):
    """A linear layer of 8-bit integers, for a model that is done with training. x (B, ..., K) -> (B, ..., N).

    Who writes a text token by token waits for the weights to come from memory, so that a quarter of the bytes is up to
    four times the speed. Row n of the matrix is integers up to 127 times a scale of its own, which fits its largest
    weight; and so is every row of x, as it comes: integers up to 127 times top / 127, if its largest number is `top`:

        y[n] = top / 127 scale[n] (sum over k of round(127 x[k] / top) weight[n, k]) + bias[n]

    The sum, where the work is, is one of integers: exact, so that no row depends on which others it is computed with.
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        weight = weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127  # (N,)
        self.weight = nn.Parameter((weight / scale[:, None]).round().to(torch.int8), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("scale", scale)
        self.compute = None  # made when it is first needed, and again when the weights are others or elsewhere

    def forward(self, x):
        if self.compute is None:
            self.compute = int8_linear(self.weight, self.scale, self.bias)
        return self.compute(x)

    def _apply(self, *args, **kw):  # what .to() and .cuda() call
        self.compute = None
        return super()._apply(*args, **kw)

    def _load_from_state_dict(self, *args):
        self.compute = None
        super()._load_from_state_dict(*args)

    def __getstate__(self):  # what copy and pickle ask for
        return self.__dict__ | {"compute": None}


class Int8Embedding(nn.Module):
    """The same for an embedding: idx (B, T) -> its rows (B, T, C) in float32."""

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight
        self.register_buffer("scale", linear.scale)

    def forward(self, idx):
        return F.embedding(idx, self.weight).float() * F.embedding(idx, self.scale[:, None])


def int8_linear(weight, scale, bias):
    """The function x -> y of an Int8Linear, with the weights laid out as its kernel reads them. For one thread."""
    product = int8_product(weight)

    def compute(x):
        x = x.float()
        top = x.abs().amax(dim=-1, keepdim=True)  # (B, ..., 1)
        y = product(x, top).mul_(scale)
        return y.mul_(top) if bias is None else torch.addcmul(bias, y, top)
    return compute


def int8_product(weight):
    """A function that rounds x / top, between -1 and 1, to 8 bits and multiplies it by weight (N, K), integers.

    x: (B, ..., K); top: (B, ..., 1)

    The kernel is FBGEMM's, which came with PyTorch's first quantization and is faster, at one row and at sixteen, than
    all that came after it. It rounds x by itself, to 256 steps from the lowest to the highest number in the whole of
    it. So that no row changes another's rounding, each gets two numbers more, the ends of the range, and the matrix
    gets two columns of zeros.
    """
    end = int8_top() if weight.device.type == "cpu" else None
    if end is None:  # another processor, a GPU, or a PyTorch without it: the same weights, and x in steps of 1 / 127
        return lambda x, top: F.linear((x / top * 127).nan_to_num_(0.0).round(), weight.float()) / 127
    padded, ends, zeros = F.pad(weight, (0, 2)), torch.tensor([-1.0, end]), torch.zeros(len(weight))
    shape, sums = weight.new_zeros(1, 1).expand(padded.shape), padded.sum(dim=1, dtype=torch.int32)
    kernel = torch.fbgemm_pack_quantized_matrix(padded)

    @functools.lru_cache(maxsize=4)
    def room(*rows):
        """Memory for x, with the ends of the range behind it; (rows, K + 2) and its first K columns."""
        with torch.inference_mode(False):
            whole = torch.cat((torch.zeros(*rows, weight.size(1)), ends.expand(*rows, 2)), dim=-1)
            return whole, whole[..., :-2]

    def product(x, top):
        # Token after token uses the same memory. (Not those of a long prompt: they would take megabytes per matrix.)
        whole, scaled = (room if top.numel() <= 64 else room.__wrapped__)(*x.shape[:-1])
        torch.div(x, top, out=scaled)
        whole.nan_to_num_(0.0)  # 0 / 0; and what was no number: then `top` is none either, and y will show it
        # x, the matrix (of which its shape is looked at), packed, sums of its rows, its scale, its zero point, bias
        return torch.fbgemm_linear_int8_weight_fp32_activation(whole, shape, kernel, sums, 1.0, 0, zeros)
    return product


@functools.cache
def int8_top():
    """The upper end of the kernel's range: 1, 3, or None where there is no such kernel.

    Without special instructions (VNNI), processors add two products in 16 bits: 2 x 127 x 255 is too much for them, and
    they take 32,767 without a word. In a range from -1 to 3, a 1 is step 128 and not step 255: 2 x 127 x 128 just fits.
    """
    K, most = 64, torch.full((1, 66), 127, dtype=torch.int8)
    most[:, K:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch has announced for years that it will remove these functions
        for top in (1.0, 3.0):
            x, sums = torch.tensor([[1.0] * K + [-1.0, top]]), torch.tensor([K * 127], dtype=torch.int32)
            try:
                kernel = torch.fbgemm_pack_quantized_matrix(most)
                y = torch.fbgemm_linear_int8_weight_fp32_activation(x, most, kernel, sums, 1.0, 0, torch.zeros(1))
            except (AttributeError, RuntimeError):
                return None
            if abs(y.item() / (K * 127) - 1) < 0.01:
                return top


def quantize(model):
    """Turn the matrices of a trained GPT into 8-bit integers, in place; vectors and learned positions stay. Returns it.

    A tied head stays tied: the row that predicts a token is, with its one scale, also the row that reads it.
    """
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, Int8Linear(layer.weight, layer.bias))
    tied = model.config.tie_weights
    model.transformer.wte = Int8Embedding(model.lm_head if tied else Int8Linear(model.transformer.wte.weight))
    return model


class Block(nn.Module):
    """One layer. The norms stand before attention and MLP, so that the residual stream itself is never rescaled."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, rotation=None, cache=None):
        x = x + self.attn(self.ln_1(x), rotation, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


CHUNK_SCORES = 1 << 24  # scores of a chunk: 67 MB in float32, and some copies


class CrossEntropy(torch.autograd.Function):
    """The sum of -ln p over the targets other than -1, without ever holding the scores of all tokens.

    N tokens have N vocab_size scores, of a large vocabulary more than all the rest of the model together; their
    softmax and their gradient take as much again. But the gradient by the scores is known at once, softmax(scores)
    minus 1 at the target. So a chunk of tokens gets its scores, which yield a part of the loss and of both gradients,
    and are forgotten: forward computes the gradients, and backward, once, does nothing but scale them.

    x: (N, C); weight: (V, C), of which the first vocab_size rows are tokens; targets: (N,).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, dtype, chunk_of):
        w, x_grad, w_grad = weight[:vocab_size].to(dtype), None, None
        if ctx.needs_input_grad[0]:
            x_grad = torch.empty_like(x)
        if ctx.needs_input_grad[1]:
            w_grad = torch.zeros_like(weight)
        total = x.new_zeros((), dtype=torch.float32)
        chunks = max(1, math.ceil(len(x) * vocab_size / CHUNK_SCORES))
        size = max(1, math.ceil(len(x) / chunks))  # as equal as can be
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            part = x[rows].to(dtype)
            loss, grad = chunk_of(F.linear(part, w), targets[rows])  # grad: (chunk, vocab_size)
            total += loss
            if x_grad is not None:
                x_grad[rows] = grad @ w
            if w_grad is not None:
                w_grad[:vocab_size] += grad.T @ part
        ctx.grads = x_grad, w_grad
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, above):
        assert ctx.grads is not None, "this loss goes backward once only"
        grads, ctx.grads = ctx.grads, None  # (they are large: nobody else shall hold them)
        return *(grad if grad is None else grad.mul_(above) for grad in grads), None, None, None, None


def chunk_loss(scores, targets):
    """(sum of -ln p of the targets (N,) other than -1, its gradient by the scores (N, vocab_size))."""
    logprobs = scores.float().log_softmax(dim=-1)  # the sum of exp over the vocabulary needs float32
    wanted, at = targets >= 0, targets.clamp(min=0)[:, None]
    loss = -(logprobs.gather(1, at)[:, 0] * wanted).sum()
    grad = logprobs.exp_()  # the probabilities, in the same memory
    grad.scatter_add_(1, at, torch.full_like(at, -1, dtype=grad.dtype))
    return loss, grad.mul_(wanted[:, None]).to(scores.dtype)


def argmax(logits):
    """The likeliest token of each row: (B, vocab_size) -> (B,)."""
    return logits.argmax(dim=-1)


class GPT(nn.Module):
    """The whole model.

    Parameter names are GPT-2's: wte token embedding, wpe position embedding, h the blocks, ln_f the last norm; c_attn,
    c_proj and c_fc are linear layers (c for convolution: GPT-2 wrote them as such, of width 1).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config = resolve(config)
        padded = round_up(config.vocab_size, 64)  # `logits` cuts the padding off again
        parts = dict(wte=nn.Embedding(padded, config.n_embd))
        if config.pos == "learned":
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        parts["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        parts["ln_f"] = make_norm(config, config.n_embd)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, padded, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        if config.pos == "rope":  # computed, not learned: not part of a checkpoint
            for name, table in zip(("rope_cos", "rope_sin"), rotary_table(config)):
                self.register_buffer(name, table, persistent=False)
        self.chunk_loss = chunk_loss  # (which machine.compile_model compiles)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Every initial value, with its reason (GPT-2's rules); what PyTorch's layers draw is overwritten.

        Linear and embedding weights: normal with standard deviation 0.02, small enough that the first prediction is
        nearly uniform (loss ~ ln vocab_size), whatever the width between 256 and 2048. Biases: 0. Norm weights: 1.
        The two layers of a block that write into the residual stream: 0.02 / sqrt(2 n_layer), since 2 n_layer such
        terms add up, and their sum should be as large at the top as if there were one.
        """
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith("c_proj.weight"):
                p.normal_(std=0.02 / (2 * self.config.n_layer) ** 0.5)
            else:
                p.normal_(std=0.02)

    def trunk(self, idx, cache=None):
        """Token ids (B, T) -> the residual stream above the last block (B, T, C). A cache: idx comes after its past."""
        T, past = idx.size(1), cache.length if cache is not None else 0
        assert past + T <= self.config.block_size, \
            f"{past + T} tokens do not fit into block_size={self.config.block_size}; cut the text"
        at = cache.positions(T) if cache is not None else slice(0, T)
        x = self.transformer.wte(idx)  # (B, T, C)
        rotation = None
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[at]  # (T, C), the same for every row, or (B, 1, C)
        else:  # one axis more, for the heads: (1, T, head_dim / 2) each, or (B, 1, 1, head_dim / 2)
            rotation = self.rope_cos[at].unsqueeze(-3), self.rope_sin[at].unsqueeze(-3)
        x = F.dropout(x, self.config.dropout) if self.training else x
        for block in self.transformer.h:
            x = block(x, rotation, cache)
        if cache is not None:
            cache.advance(T)
        return x

    def logits(self, x):
        """The residual stream (..., C) -> a score for each token of the true vocabulary (..., vocab_size)."""
        return self.lm_head(self.transformer.ln_f(x))[..., :self.config.vocab_size]

    def loss(self, x, targets):
        """Stream (B, T, C), targets (B, T) -> mean cross-entropy in nats over the targets other than -1; of none, 0."""
        assert self.lm_head.weight.is_floating_point(), "8-bit weights cannot be trained; ask the model for logits"
        x = self.transformer.ln_f(x).flatten(0, 1)  # (N, C)
        weight = self.lm_head.weight if torch.is_grad_enabled() else self.lm_head.weight.detach()
        # (A sum over thousands of tokens, as the gradient of a token's row is, can be too large for float16.)
        dtype = torch.float32 if self.dtype() == torch.float16 else self.dtype()
        with torch.autocast(x.device.type, enabled=False):  # the type is chosen already
            total = CrossEntropy.apply(x, weight, targets.flatten(), self.config.vocab_size, dtype, self.chunk_loss)
        return total / (targets >= 0).sum().clamp(min=1)

    def forward(self, idx, targets=None, cache=None):
        """idx: (B, T) token ids. targets: (B, T) ids, -1 where nothing is to be learned.

        With targets, the mean cross-entropy in nats per target; without, the logits (B, T, vocab_size).
        """
        x = self.trunk(idx, cache)  # (B, T, C)
        return self.logits(x) if targets is None else self.loss(x, targets)

    @torch.inference_mode()
    def generate(self, idx, n, pick=argmax):
        """Continue idx (B, T) by n tokens; yields a (B, 1) column of ids at a time, for whoever prints as it comes.

        pick: (B, vocab_size) float32 logits -> (B,) ids; argmax is greedy, sample.py has the rest.
        When the context is full, the model forgets the older half of it and reads the younger half again: a fixed
        amount of work for block_size / 2 tokens, and the text can go on for ever.
        """
        size, device = self.config.block_size, idx.device
        cache = KVCache(self.config, idx.size(0), min(size, idx.size(1) + n), device, self.dtype())
        new = idx = idx[:, -size:]
        for _ in range(n):
            if cache.length + new.size(1) > size:
                new, cache.length = idx[:, -(size // 2):], 0
            x = self.trunk(new, cache)[:, -1]  # (B, C): only the last position predicts something new
            new = pick(self.logits(x).float()).to(idx.device)[:, None]  # (B, 1)
            idx = torch.cat((idx, new), dim=1)[:, -size:]
            yield new

    def dtype(self):
        """The type in which attention computes: autocast's where it is on, else that of the weights."""
        device = self.lm_head.weight.device.type
        weights = self.lm_head.weight.dtype
        weights = weights if weights.is_floating_point else torch.float32  # (integers are for storage)
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights

    def n_params(self):
        """Number of parameters: tied weights once, padding of the vocabulary left out."""
        tied = self.config.tie_weights
        padding = (1 if tied else 2) * (self.lm_head.weight.size(0) - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for name, p in self.named_parameters() if not (tied and "lm_head" in name)) - padding

    def flops_per_token(self, T=None):
        """Floating-point operations that training spends on a token of a context of T (PaLM, arXiv 2204.02311, B).

        Each weight of a matrix product costs a multiplication and an addition forward and twice that backward: 6.
        A weight that is not trained needs no gradient: 4. Attention adds, per layer, q k^T and the average of v over T
        positions: 12 n_head head_dim T (counted full, as is the custom, although the causal half would do). Reading an
        embedding costs nothing.
        """
        c = self.config
        matrices = [(p.numel(), p.requires_grad) for p in self.transformer.h.parameters() if p.dim() == 2]
        matrices.append((c.vocab_size * c.n_embd, self.lm_head.weight.requires_grad))
        attention = 12 * c.n_layer * c.n_head * c.head_dim * (T or c.block_size)
        return sum(n * (6 if trained else 4) for n, trained in matrices) + attention

    def training_memory(self, batch_size, width, optimizer_bytes):
        """About how many bytes training takes, by what for, where nothing is compiled (compiled code keeps less).

        batch_size: windows of a micro-batch; width: bytes of a number in matrix products; optimizer_bytes: per weight.
        Activations are what the backward pass needs of the forward pass: per token and layer, the inputs of the norms
        in float32, and the inputs and outputs of the matrix products and of attention. For the last step, the scores
        over the vocabulary are there several times: as they come, in float32, as probabilities, and their gradient; but
        of a chunk alone. (Where attention is done by its formula, its probabilities are kept as well.)
        """
        c, weights = self.config, sum(p.numel() for p in self.parameters())
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        q, k = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        norms = 2 * c.n_embd * (4 + width) + (8 * c.n_embd if c.norm == "rmsnorm" else 0)
        attention = width * (3 * q + 2 * k) + (width * (q + k) if c.pos == "rope" else 0) + (12 * (q + k) * c.qk_norm)
        mlp = width * c.n_inner * (4 if c.mlp == "swiglu" else 2)
        tokens, T = batch_size * c.block_size, c.block_size
        attention += width * c.n_head * T if tokens * c.n_head * T <= MOST_SCORES else 0
        copies = weights * width if width < 4 else 0  # of the weights, in the type of the products
        return dict(weights=weights * 4, gradients=trained * 4, optimizer=trained * optimizer_bytes, activations=(
            copies + tokens * c.n_layer * (norms + attention + mlp)), scores=(
            min(tokens * c.vocab_size, CHUNK_SCORES) * (2 * width + 12)))
