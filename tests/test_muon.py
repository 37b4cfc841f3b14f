# SPDX-License-Identifier: GPL-3.0-only
"""Muon against PyTorch's own, and against exact arithmetic."""
import torch

from training import muon


def test_it_equals_pytorchs_and_float32_does_the_same_without_bfloat16():
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((32, 96), (64, 16), (24, 24))]
    ours, theirs, exact = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(3))
    optimizers = [muon.Muon(ours, 0.01, 0.1), muon.Muon(exact, 0.01, 0.1, dtype=torch.float32),
                  torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    for _ in range(5):
        for a, b, c in zip(ours, theirs, exact):
            a.grad = torch.randn_like(a)
            b.grad, c.grad = a.grad.clone(), a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert all((a - c).norm() < 0.02 * (a - s).norm() for a, c, s in zip(ours, exact, start))
    spread = torch.linalg.svdvals(muon.orthogonal(torch.randn(40, 100)))
    assert 0.6 < spread.min() and spread.max() < 1.3
