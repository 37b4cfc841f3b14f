# SPDX-License-Identifier: GPL-3.0-only
"""
Muon: an optimizer for matrices, which learns in fewer steps than AdamW.

    optimizer = Muon(matrices, lr=0.003, weight_decay=0.1)      # train.py --optimizer=muon

A few directions dominate the gradient of a matrix: most of a plain step goes along them, and the rest of the
space hardly learns. Muon (Jordan 2024, kellerjordan.github.io/posts/muon) moves the weights in all directions
alike: from the singular value decomposition U S V^T of the momentum it takes U V^T.
"""
import math

import torch


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal.

    params: matrices; q, k and v in one count as one. lr: a step moves a weight by about 0.2 lr (root mean
    square), as AdamW does. dtype: of the products. In bfloat16 it equals torch.optim.Muon (match_rms_adamw)
    bit for bit. That one has no other dtype, and where bfloat16 is emulated, a training step took 3.3 s
    instead of 0.5 s (config/train_small.py with AVX2 alone).
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95, dtype=torch.bfloat16):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"])  # Nesterov: the average after this step
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # The root mean square of an orthogonal matrix is 1 / sqrt(larger side), of AdamW's steps 0.2.
                p.add_(orthogonal(ahead.to(self.dtype)), alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonal(x, steps=5):
    """Roughly U V^T of the matrix x = U S V^T, by products alone (Newton and Schulz).

    Each step applies the odd polynomial a s + b s^3 + c s^5 to every singular value s, without knowing it.
    These coefficients (Jordan's) bring any s between 0 and 1 quickly to about 0.7 to 1.2: good enough.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.size(0) <= x.size(1)
    x = x if wide else x.T  # the square products below are then of the shorter side
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T
