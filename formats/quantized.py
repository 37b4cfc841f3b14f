# SPDX-License-Identifier: GPL-3.0-only
"""
8 bits: a trained model whose matrices are integers, for CPUs.

    model = quantize(model)     # in place; it generates text as before, but is not trained any further

Decoding one token at a time is bound by memory, so a quarter of the bytes is up to four times the speed.
Row n of a matrix becomes integers up to 127 and a scale that fits its largest weight. So does every row of
x, when it comes: `top` is its largest number, and

    y[n] = top / 127 scale[n] (sum over k of round(127 x[k] / top) weight[n, k]) + bias[n]

The sum of integers is exact: a row does not depend on the rows that are computed with it.
"""
import functools
import warnings

import torch
import torch.nn as nn
from torch.nn import functional as F

warnings.filterwarnings("ignore", "fbgemm_.* is deprecated")  # it has been for years

def quantize(model):
    """Turn the matrices of a trained GPT into 8-bit integers, in place. Returns it.

    A tied head stays tied: one row of integers, with one scale, reads a token and predicts it.
    """
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, Int8Linear(layer.weight, layer.bias))
    tied = model.config.tie_weights
    model.transformer.wte = Int8Embedding(model.lm_head if tied else Int8Linear(model.transformer.wte.weight))
    return model


class Int8Linear(nn.Module):
    """A linear layer of 8-bit integers: x (B, ..., K) -> y (B, ..., N) in float32."""

    def __init__(self, weight, bias=None):
        super().__init__()
        weight = weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127  # (N,)
        self.weight = nn.Parameter((weight / scale[:, None]).round().to(torch.int8), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("scale", scale)
        self.compute = None  # made when first needed, and again when the weights are others or elsewhere

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
    """The function x -> y of an Int8Linear: a closure, since looking up a module's tensors takes time."""
    product = int8_product(weight)

    def compute(x):
        x = x.float()
        top = x.abs().amax(dim=-1, keepdim=True)  # (B, ..., 1)
        y = product(x, top).mul_(scale)
        return y.mul_(top) if bias is None else torch.addcmul(bias, y, top)
    return compute


def int8_product(weight):
    """A function (x, top) -> x / top, rounded to 8 bits, times the integers of weight (N, K).

    x: (B, ..., K); top: (B, ..., 1), so that x / top is between -1 and 1.

    FBGEMM's kernel is the fastest of PyTorch's (times: docs/lab-notes.md). It rounds x to 256 steps between
    the lowest and the highest number of all rows. To fix this range, each row of x gets its two ends as two
    more numbers, and the matrix two columns of zeros.
    """
    end = int8_top() if weight.device.type == "cpu" else None
    if end is None:  # a GPU, or no such kernel: the same weights, and x in steps of 1 / 127
        return lambda x, top: F.linear((x / top * 127).nan_to_num_(0.0).round(), weight.float()) / 127
    packed = pack(F.pad(weight, (0, 2)))  # (N, K + 2)
    ends = torch.tensor([-1.0, end])

    @torch.inference_mode(False)
    def buffer(*rows):
        """Memory for x and the ends of the range, (rows, K + 2), and a view of its first K columns."""
        whole = torch.cat((torch.zeros(*rows, weight.size(1)), ends.expand(*rows, 2)), dim=-1)
        return whole, whole[..., :-2]
    kept = functools.lru_cache(maxsize=4)(buffer)

    def product(x, top):
        # Decoding reuses its memory. A long prompt would keep megabytes for each matrix.
        whole, scaled = (kept if top.numel() <= 64 else buffer)(*x.shape[:-1])
        torch.div(x, top, out=scaled)
        whole.nan_to_num_(0.0)  # 0 / 0; where x had a NaN, top is one as well, and so is y
        return torch.fbgemm_linear_int8_weight_fp32_activation(whole, *packed)
    return product


def pack(weight):
    """Integers (N, K) as the kernel's arguments: shape, matrix, sums of rows, scale, zero point, bias."""
    kernel = torch.fbgemm_pack_quantized_matrix(weight)
    shape = weight.new_zeros(1, 1).expand(weight.shape)  # of this argument, the kernel reads only the shape
    return shape, kernel, weight.sum(dim=1, dtype=torch.int32), 1.0, 0, torch.zeros(len(weight))


@functools.cache
def int8_top():
    """The upper end of the kernel's range: 1, 3, or None where there is no such kernel.

    Processors without VNNI add two products in 16 bits, and 2 x 127 x 255 saturates without an error. In a
    range from -1 to 3, a 1 is step 128 and not step 255, which fits.
    """
    weight = torch.tensor([[127] * 64 + [0, 0]], dtype=torch.int8)
    for top in (1.0, 3.0):
        x = torch.tensor([[1.0] * 64 + [-1.0, top]])
        try:
            y = torch.fbgemm_linear_int8_weight_fp32_activation(x, *pack(weight))
        except (AttributeError, RuntimeError):
            return None
        if abs(y.item() / (64 * 127) - 1) < 0.01:
            return top
