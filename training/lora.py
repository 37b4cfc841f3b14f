# SPDX-License-Identifier: GPL-3.0-only
"""
LoRA: fine-tuning that keeps the weights and learns a small correction to each (Hu 2021, arXiv 2106.09685).

    python train.py config/finetune_lora.py --init_from=SmolLM2-135M-Instruct --dataset=mine --lora_rank=8

A matrix W of n x m numbers is corrected by a product B A of two thin ones, n x r and r x m: with r = 8, one
or two percent of the numbers. A fine-tune changes W by nearly so low a rank, so little is lost. It saves
memory: gradients and the optimizer's averages, three numbers for each that is trained, are needed for A and B
alone. It also saves nearly a third of the arithmetic, since no gradient of W is computed. A checkpoint holds
A and B and says where W is. Its reader adds the product to W once: a merged model is as fast as any.
"""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F


class LoRALinear(nn.Linear):
    """A linear layer whose weight stays as it is: y = x W^T + bias + alpha / rank (x A^T) B^T.

    alpha: how much the correction counts, divided by the rank because a sum over more of them is larger.
    """

    def __init__(self, linear, rank, alpha):
        nn.Module.__init__(self)  # (nn.Linear's would initialize a weight)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))  # 0: it starts as the model was
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.lora_A, -bound, bound)

    def forward(self, x):
        correction = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + correction * self.scale


def add(model, rank, alpha):
    """Give every linear layer of the blocks a correction, and let only these be trained."""
    model.requires_grad_(False)
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, LoRALinear(linear, rank, alpha))


def adapters(weights):
    """Of a state_dict, what LoRA has learned: {name: tensor}."""
    return {name: tensor for name, tensor in weights.items() if name.endswith((".lora_A", ".lora_B"))}


def merge(weights, corrections, rank, alpha):
    """A new dict of the weights {name: tensor} with the corrections added: W + alpha / rank B A.

    Raises KeyError, ValueError or RuntimeError where they do not fit.
    """
    merged = dict(weights)
    layers = {name[:-len("lora_A")] for name in adapters(corrections)}
    if not layers:
        raise ValueError("there are none")
    for layer in layers:
        A, B = corrections[layer + "lora_A"], corrections[layer + "lora_B"]
        W = weights[layer + "weight"]
        n, m = W.shape
        if A.shape != (rank, m) or B.shape != (n, rank):  # (before the product takes memory)
            raise ValueError(f"{layer}lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)}, but rank {rank}")
        merged[layer + "weight"] = W + alpha / rank * (B @ A)
    return merged
