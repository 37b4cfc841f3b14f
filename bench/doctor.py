# SPDX-License-Identifier: GPL-3.0-only
"""
Is this machine fit to train, and does the model on it do what it should? A checklist to paste into an issue.

    python -m bench doctor

[--] is not a failure. Returns 1 if a check fails.
"""
import itertools
import sys
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from model import GPT, GPTConfig, KVCache, PRESETS
from runtime import machine


@dataclass
class Settings:
    device: str = "auto"  # cpu, cuda, cuda:1, mps


def main(settings, _):
    device = machine.choose_device(settings.device)
    machine.set_up(device)
    dtype, why = machine.choose_dtype("auto", device)
    failed = []
    for name, good, found in itertools.chain(
            machine_checks(device, dtype, why),
            model_checks("gpt2", dict(bias=True), device, dtype),
            model_checks("modern", PRESETS["modern"], device, dtype)):
        mark = {True: "[ok]", False: "[FAIL]", None: "[--]"}[good]
        print(f"{mark:7}{name:20} {found}", flush=True)
        if good is False:
            failed.append(name)
    print(f"{len(failed)} failed", *failed, sep=", ")
    return 1 if failed else 0


# Both yield (name, True or False or None, what was found).


def machine_checks(device, dtype, why):
    has = machine.versions(device)
    recent = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
    yield ("versions", sys.version_info >= (3, 10) and recent,
           ", ".join(f"{name} {has[name]}" for name in ("commit", "python", "torch", "numpy", "system")))
    yield "device", True, f"{device} ({has['processor']}, {has['cpu_capability']}, {has['threads']} threads)"
    yield "dtype", True, f"{dtype}: {why}"
    free = machine.free_memory(device)
    yield "memory", free > 2e9, f"{free / 1e6:,.0f} MB free"
    try:
        x = torch.randn(64, 64, device=device, requires_grad=True)
        torch.compile(lambda x: F.gelu(x @ x).sum(), dynamic=False)(x).backward()
        yield "compile", True, "works"
    except Exception as error:  # no compiler, an old GPU, ...
        yield "compile", None, f"not available; training works without it: {str(error).strip().splitlines()[0][:120]}"


def model_checks(family, shape, device, dtype):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=128, **shape)).to(device)
    tokens = torch.randint(128, (4, 33), device=device)
    idx, targets = tokens[:, :-1], tokens[:, 1:]  # (4, 32) each

    # 1. A model learns one batch by heart.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        with machine.autocast(device, dtype):
            loss = model(idx, targets)
        loss.backward()
        optimizer.step()
    yield f"{family}: learns", loss.item() < 0.5, f"one batch, 60 steps: loss {loss:.3f}"

    # 2. The logits of a position do not depend on later tokens. (Training has a formula of attention of its own.)
    changed, leak = idx.clone(), 0.0
    changed[:, 20:] = (idx[:, 20:] + 1) % 128
    with torch.no_grad():
        for training in (True, False):
            whole = model.train(training)(idx)  # (4, 32, 128)
            leak = max(leak, (whole - model(changed))[:, :20].abs().max().item())
        # 3. Read in pieces, with a cache, a text has the same logits.
        cache = KVCache(model.config, 4, device=device)
        parts = torch.cat([model(part, cache=cache) for part in idx.split((7, 1, 1, 23), dim=1)], dim=1)
        off = ((whole - parts).abs().max() / whole.abs().max()).item()
    yield f"{family}: no leak", leak == 0, f"later tokens change earlier logits by {leak:.0e}"
    yield f"{family}: cache", off < 1e-4, f"logits with and without differ by {off:.0e} of the largest"
