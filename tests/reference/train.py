# SPDX-License-Identifier: GPL-3.0-only
"""Training in plain float64 operations, in nanoGPT's manner: settings as globals, overridden by --name=value.

AdamW, the schedule, accumulation and clipping are written out from their formulas (Loshchilov and Hutter 2019, arXiv
1711.05101), without an optimizer class.
"""
import ast
import math
import os
import pickle
import sys
import time

import numpy
import torch
from model import GPT, GPTConfig

out_dir, vocab_size = "", 1 << 16
dataset, batch_size, block_size, gradient_accumulation_steps = "", 0, 0, 0
n_layer, n_head, n_embd, max_iters, eval_iters = 0, 0, 0, 0, 0
learning_rate, min_lr, warmup_iters, lr_decay_iters = 0.0, 0.0, 0, 0
weight_decay, beta1, beta2, grad_clip = 0.0, 0.0, 0.0, 0.0
for name, value in (argument[2:].split("=") for argument in sys.argv[1:]):
    globals()[name] = value if name in ("dataset", "dtype", "device", "out_dir") else ast.literal_eval(value)


def get_batch():
    data = numpy.memmap(os.path.join("data", dataset, "train.bin"), dtype=numpy.uint16, mode="r")
    starts = torch.randint(len(data) - block_size, (batch_size,))
    rows = torch.tensor(numpy.stack([data[i:i + block_size + 1] for i in starts]).astype(numpy.int64))
    return rows[:, :-1], rows[:, 1:]


if os.path.exists(os.path.join("data", dataset, "meta.pkl")):
    with open(os.path.join("data", dataset, "meta.pkl"), "rb") as file:
        vocab_size = pickle.load(file)["vocab_size"]
model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd))
batch = get_batch()
model.eval()
for _ in range(2 * eval_iters):  # as nanoGPT does before its first step: validation draws from the same numbers
    model.forward(*get_batch())
model.train()
first, second = ({name: torch.zeros_like(w) for name, w in model.weights.items()} for _ in range(2))
for step in range(max_iters + 1):
    started = time.perf_counter()
    if step < warmup_iters:
        lr = learning_rate * (step + 1) / (warmup_iters + 1)
    else:
        progress = (step - warmup_iters) / max(1, lr_decay_iters - warmup_iters)
        lr = min_lr + (learning_rate - min_lr) * (1 + math.cos(math.pi * progress)) / 2
    for _ in range(gradient_accumulation_steps):
        loss = model.forward(*batch)[1] / gradient_accumulation_steps
        batch = get_batch()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.weights.values(), grad_clip)
    with torch.no_grad():
        for name, w in model.weights.items():
            first[name] = beta1 * first[name] + (1 - beta1) * w.grad
            second[name] = beta2 * second[name] + (1 - beta2) * w.grad ** 2
            mean, square = first[name] / (1 - beta1 ** (step + 1)), second[name] / (1 - beta2 ** (step + 1))
            decay = weight_decay if w.dim() == 2 else 0.0
            w -= lr * (decay * w + mean / (square.sqrt() + 1e-8))
            w.grad = None
    print(f"iter {step}: loss {loss.item() * gradient_accumulation_steps:.4f}, "
          f"time {1000 * (time.perf_counter() - started):.2f}ms")

if out_dir:
    os.makedirs(out_dir, exist_ok=True)
    args = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size, bias=False,
                dropout=0.0)
    torch.save(dict(model=model.state_dict(), model_args=args, iter_num=max_iters, config=dict(dataset=dataset)),
               os.path.join(out_dir, "ckpt.pt"))
