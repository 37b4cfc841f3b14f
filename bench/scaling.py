# SPDX-License-Identifier: GPL-3.0-only
"""
A scaling law on a laptop: six short runs predict a long one before it starts.

    python -m bench scaling --dataset=pytorch

Six models of different n_embd train for two minutes each. A law is fitted to their validations,

    bits per byte = E + ((A / N)^a + B / D)^b      (Kaplan 2020, arXiv 2001.08361, equation 1.5, and an E)

for N parameters and D tokens. E, the irreducible loss, is set by hand, since such short runs fit any. The law predicts
which n_embd is best after thirty minutes, and how good it is. Then that run starts. Runs finished in out/scaling are
not repeated.

Windows have 32 tokens: with more, a model learns at some moment to copy from its context (induction heads, Olsson
2022, arXiv 2209.11895), a leap that no law predicts. The learning rate stays level after its warm-up (min_lr is
learning_rate), so that every moment of a run is the end of a shorter one.
"""
import math
import os
from dataclasses import dataclass

import numpy as np

import train
from bench.measure import ROOT, TINY, table, train_ours
from model import GPT
from runtime.console import UserError
from training.log import read_header

SIZES = (64, 96, 128, 192, 256, 384)  # n_embd: 0.7 to 8 million parameters with a vocabulary of 4,096
LONGER = 15  # times as long, the long run: 30 minutes
SKIPPED = 60  # steps of each run that are not fitted: three times the warm-up
E = 0.7  # bits per byte: fits what n_embd=256 reaches in 7 minutes on PyTorch's source

RECIPE = [ROOT / "config/train_small.py", *"""--learning_rate=0.01 --min_lr=0.01 --muon_lr=0.0015 --compile=false
    --eval_iters=8 --save_interval=1000 --always_save_checkpoint=false --block_size=32 --batch_size=96""".split()]


@dataclass
class Settings:
    dataset: str = "stdlib"  # data/NAME
    minutes: float = 2.0  # of each short run
    tiny: bool = False  # two tiny models, to see that it runs


def main(settings, _):
    # 1. The short runs, with some ten validations each; a step of a larger model takes longer.
    minutes, runs = settings.minutes, {}
    for n_embd in (32, 64) if settings.tiny else SIZES:
        argv = [f"--budget={60 * minutes:.0f}s", f"--eval_interval={math.ceil(2500 * minutes / n_embd)}"]
        runs[n_embd] = trained(str(n_embd), n_embd, settings, argv)
    law = fit(runs.values())

    # 2. What each size would reach in the long time, of which a twentieth is not training.
    plans = []  # (bits per byte, n_embd, steps, tokens)
    for n_embd, (n, rows) in runs.items():
        last = rows[-1]
        steps = round(LONGER * 60 * minutes / 1.05 * last["step"] / last["train_seconds"])
        tokens = steps * last["tokens"] // last["step"]
        plans.append((bits(law, n, tokens), n_embd, steps, tokens))
    predicted, best, steps, tokens = min(plans)
    A, a, B, b = law
    print(f"bits per byte = {E} + (({A:.3g} / N)^{a:.2f} + {B:.3g} / D)^{b:.2f}\nafter {LONGER * minutes:g} minutes, "
          f"{best} channels will be the best, with {predicted:.4f} bits per byte after {tokens:,} tokens", flush=True)

    # 3. The long run
    argv = [f"--max_iters={steps}", f"--eval_interval={math.ceil(steps / 20)}"]
    runs[f"{best}, the long run"] = trained(f"{best}-long", best, settings, argv)
    lines = []
    for name, (n, rows) in runs.items():
        last = rows[-1]
        said = bits(law, n, last["tokens"])
        lines.append([name, f"{n:,}", f"{last['tokens']:,}", f"{last['wall_seconds']:.0f}", f"{last['val_bpb']:.4f}",
                      f"{said:.4f}", f"{said / last['val_bpb'] - 1:+.2%}"])
    table("| channels | parameters | tokens | seconds | bits per byte | predicted | error |", lines)


def trained(name, n_embd, settings, argv):
    """(number of parameters, rows with a validation) of the run out/scaling/`name`, trained now or before."""
    out = os.path.join("out", "scaling", name)
    shape = [f"--n_embd={n_embd}", f"--n_head={max(1, n_embd // 64)}", f"--dataset={settings.dataset}"]
    if settings.tiny:
        argv = [*TINY[-2:], "--max_iters=70", "--eval_interval=3"]
    *_, rows = train_ours([*RECIPE, *shape, *argv], ".", out)
    config = train.TrainConfig(**read_header(os.path.join(out, "log.jsonl"))["settings"])
    return GPT(config).n_params(), [row for row in rows if "val_bpb" in row]


def bits(law, n, d):
    """Bits per byte of n parameters after d tokens."""
    A, a, B, b = law
    return E + ((A / n) ** a + B / d) ** b


def fit(runs):
    """The law (A, a, B, b) with the smallest squared relative error. All runs count the same.

    Given a and b, (bits - E)^(1/b) = A^a N^-a + B / D is linear in A^a and B: least squares. All a and b are tried.
    """
    points = []
    for n, rows in runs:
        rows = [row for row in rows if row["step"] > SKIPPED]
        if not rows:
            raise UserError(f"a run has no validation after {SKIPPED} steps", "more --minutes")
        points += [(n, row["tokens"], row["val_bpb"], len(rows) ** -0.5) for row in rows]
    n, d, found, weight = np.array(points).T  # (P,) each
    beyond = np.maximum(found - E, 0.01)

    laws = []
    for b in np.arange(0.05, 1, 0.01):
        target = beyond ** (1 / b)
        scale = weight * b * beyond / target / found  # from an error here to the relative one of bits per byte
        for a in np.arange(0.1, 2, 0.02):
            terms = np.stack([n ** -a, 1 / d], axis=1)  # (P, 2)
            factors = np.linalg.lstsq(terms * scale[:, None], target * scale)[0]
            power, B = np.maximum(factors, 1e-99)
            law = power ** (1 / a), a, B, b
            error = (weight * (bits(law, n, d) / found - 1)) ** 2
            laws.append((error.sum(), law))
    return min(laws)[1]
