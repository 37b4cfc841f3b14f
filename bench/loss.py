# SPDX-License-Identifier: GPL-3.0-only
"""
How long does nanoGPT's recipe for tiny Shakespeare take, and how long do we take to the same loss?

    python -m bench loss shakespeare.txt --peer=../nanoGPT --compiled=true

Times are of whole processes. Both losses are over the whole validation split, in windows of 64.
"""
import os
import shutil
import tempfile
from dataclasses import dataclass

import torch

from bench.measure import ROOT, TINY, measure, prepare_for_both, ratio, spread, table, take_turns, train_ours
from dataset import validation_sums
from runtime.processes import Processes
from training import checkpoint as ckpt

# nanoGPT's own recipe for a CPU, from its README
SHAKESPEARE = """--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12
    --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 --eval_interval=250
    --learning_rate=1e-3 --min_lr=1e-4 --beta2=0.99 --warmup_iters=100 --gradient_accumulation_steps=1
    --always_save_checkpoint=False --dataset=chars""".split()


@dataclass
class Settings:
    peer: str = ""  # folder of nanoGPT
    compiled: bool = False  # also nanoGPT with --compile=True
    repeats: int = 3  # rounds
    tiny: bool = False  # tiny models, to see that it runs


def main(settings, sources):
    short = [*TINY, "--max_iters=20", "--eval_interval=10"] if settings.tiny else []
    with tempfile.TemporaryDirectory() as folder:
        source = sources[0] if sources else "shakespeare"
        peer, data = prepare_for_both(settings.peer, source, folder)

        def ours(i):
            out = os.path.join(folder, f"out{i}")
            recipe = [ROOT / "config/train_shakespeare_char.py", "--dataset=chars", *short]
            seconds, *_ = train_ours(recipe, folder, out)
            return seconds, validation_loss(out, data)

        def theirs(i, *more):
            out = os.path.join(peer, f"out{i}")
            seconds, *_ = measure(["train.py", *SHAKESPEARE, *short, *more, f"--out_dir={out}"], peer)
            shutil.copy(os.path.join(data.folder, "meta.pkl"), out)  # what its ids mean
            return seconds, validation_loss(os.path.join(out, "ckpt.pt"), data)

        contestants = {"nanoGPT": theirs, "ours": ours}
        if settings.compiled:
            contestants["nanoGPT, --compile=True"] = lambda i: theirs(i, "--compile=True")
        found = take_turns(contestants, settings.repeats)

    print(f"{settings.repeats} rounds, {torch.get_num_threads()} threads")
    base, _ = zip(*found["nanoGPT"])
    rows = []
    for name, results in found.items():
        seconds, losses = zip(*results)
        rows.append([name, spread(seconds, 1), f"{max(losses):.4f}", ratio(base, seconds)])
    table("| | seconds | loss | times as fast as nanoGPT |", rows)


@torch.no_grad()
def validation_loss(run, data):
    """Nats per character over the validation split."""
    model, _, _ = ckpt.load_run(run)
    size = min(64, model.config.block_size)
    nats, count = validation_sums(model, lambda number: data.val_batch(number, size, 64),
                                  data.n_val_batches(size, 64), Processes())
    return nats / count
