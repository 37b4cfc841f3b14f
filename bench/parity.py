# SPDX-License-Identifier: GPL-3.0-only
"""
Does training here match nanoGPT's? The same weights and batches, every loss and every gradient norm.

    python -m bench parity --peer=../nanoGPT --dataset=shakespeare_char
    python -m bench parity --peer=plain.py          # in plain float64 arithmetic

nanoGPT's own train.py runs, with our initial weights and batches, in float32. This
includes warm-up, cosine, accumulation, clipping and weight decay. Returns 1 if a number
differs by more than TOLERANCE.
"""
import contextlib
import io
import multiprocessing
import os
import runpy
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

import train
from bench.measure import copy_peer, start_from, train_ours
from dataset import Dataset
from model import GPT
from training.log import read_header

# At three times this rate a difference in the last bit grows tenfold in ten steps.
RECIPE = """--n_layer=3 --n_head=4 --n_embd=64 --block_size=64 --batch_size=4 --gradient_accumulation_steps=3
    --bias=False --dropout=0.0 --learning_rate=1e-3 --min_lr=1e-4 --weight_decay=0.1 --beta1=0.9 --beta2=0.95
    --grad_clip=1.0 --device=cpu --dtype=float32 --compile=False --log_interval=1 --eval_iters=1""".split()
TOLERANCE = 1e-4


@dataclass
class Settings:
    peer: str = ""  # folder of nanoGPT, or plain.py
    dataset: str = "shakespeare_char"  # data/NAME
    steps: int = 200


def main(settings, _):
    steps = settings.steps
    recipe = [*RECIPE, f"--lr_decay_iters={steps}", f"--warmup_iters={steps // 10}"]
    with tempfile.TemporaryDirectory() as folder:
        peer, ours = os.path.join(folder, "peer"), os.path.join(folder, "ours")
        copy_peer(settings.peer, peer)

        # 1. Our run.
        *_, rows = train_ours([*recipe, f"--max_iters={steps}", f"--eval_interval={steps}", "--mlp=gelu_exact",
                               f"--dataset={settings.dataset}"], ".", ours)
        config = train.TrainConfig(**read_header(os.path.join(ours, "log.jsonl"))["settings"])

        # 2. Its initial weights and its batches.
        torch.manual_seed(config.seed)
        model = GPT(config)
        data = Dataset.open(os.path.join("data", settings.dataset))
        micros = config.gradient_accumulation_steps
        starts = [data.spans(config.block_size, config.batch_size, config.seed, step, micro, micros)[:, 0]
                  for step in range(steps + 1) for micro in range(micros)]  # (B,) each

        # 3. Their run. (nanoGPT counts its steps from 0 and includes the last.)
        os.makedirs(os.path.join(peer, "data"))
        os.symlink(os.path.abspath(data.folder), os.path.join(peer, "data", "parity"))
        argv = [*recipe, f"--max_iters={steps - 1}", "--eval_interval=1000000000", "--dataset=parity", "--out_dir=out"]
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            losses, norms = process.submit(run_peer, peer, argv, model, starts).result()

    # 4. The differences. The loss of a step is the mean of its micro-batches.
    losses = np.array(losses).reshape(steps, micros).mean(axis=1)
    our_norms = np.array([row["grad_norm"] for row in rows])
    loss_off = np.abs(losses - [row["loss"] for row in rows]).max()
    norm_off = np.abs(our_norms - norms).max()
    print(f"parity: {steps} steps, {(our_norms > config.grad_clip).sum()} of them clipped, loss {losses[0]:.4f} -> "
          f"{losses[-1]:.4f}; largest difference: loss {loss_off:.1e}, gradient norm {norm_off:.1e}")
    return int(max(loss_off, norm_off) > TOLERANCE)


def run_peer(folder, argv, ours, starts):
    """Run the peer's train.py with our weights and batches, in a process of its own. Returns (losses, norms)."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.modules.pop("model", None)  # ours
    import model as peer
    losses, norms, plan = [], [], iter(starts)
    clipper = sys.modules.get("plain", torch.nn.utils)  # plain.py has a clipping of its own
    init, forward, clip = peer.GPT.__init__, peer.GPT.forward, clipper.clip_grad_norm_

    def start_from_ours(model, config):
        config.vocab_size = ours.config.vocab_size
        init(model, config)
        start_from(model, ours)

    def note_loss(model, idx, targets=None):
        result = forward(model, idx, targets)
        if torch.is_grad_enabled():
            losses.append(result[1].item())
        return result

    def note_norm(*args, **kw):
        norms.append(clip(*args, **kw))
        return norms[-1]

    def planned(high, size):  # validation may have any batch
        return torch.from_numpy(next(plan)) if torch.is_grad_enabled() else torch.zeros(size, dtype=torch.int64)

    peer.GPT.__init__, peer.GPT.forward = start_from_ours, note_loss
    clipper.clip_grad_norm_, torch.randint = note_norm, planned
    sys.argv = ["train.py", *argv]
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path("train.py")
    return losses, list(map(float, norms))
