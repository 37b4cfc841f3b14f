# SPDX-License-Identifier: GPL-3.0-only
"""
A scaling law on a laptop: six short runs predict a long one before it starts.

    python -m bench scaling --dataset=pytorch

Six models of different n_embd train for two minutes each. A law is fitted to their validations,

    bits per byte = E + ((A / N)^(a / b) + B / D)^b      (Kaplan 2020, arXiv 2001.08361, equation 1.5, and an E)

with N parameters that have read D tokens. E, what no model can know, is set by hand, since runs so short fit any. The
law says which n_embd is best after thirty minutes, and how good. Then that run starts.

Windows have 32 tokens: with more, a model learns at some moment to copy from its context (induction heads, Olsson
2022, arXiv 2209.11895), a leap that no law of this form predicts. The learning rate stays level after its warm-up, so
that every moment of a run is the end of a shorter one. A run that is finished in out/scaling is not trained again.
"""
import math
import os
from dataclasses import dataclass

import torch

import train
from bench.measure import ROOT, TINY, table, train_ours
from model import GPT
from runtime.console import UserError
from training.log import read_header

SIZES = (64, 96, 128, 192, 256, 384)  # n_embd: 0.7 to 8 million parameters with a vocabulary of 4,096
LONGER = 15  # times as long, the long run: 30 minutes
SKIPPED = 60  # steps of each run that are not fitted: three times the warm-up
E = 0.7  # bits per byte: fits what n_embd=256 reaches in 7 minutes on PyTorch's source

RATES = """--decay_lr=false --learning_rate=0.01 --muon_lr=0.0015 --compile=false --eval_iters=8 --save_interval=1000
    --always_save_checkpoint=false""".split()


@dataclass
class Settings:
    dataset: str = "stdlib"  # data/NAME
    minutes: float = 2.0  # of each short run
    tiny: bool = False  # two models of no size, to see that it runs


@dataclass
class Run:
    n: int  # parameters
    rows: list  # of its log, those with a validation

    @property
    def last(self):
        return self.rows[-1]


@dataclass
class Law:
    A: float
    a: float
    B: float
    b: float

    def bits(self, n, d):
        """Bits per byte of n parameters after d tokens."""
        return E + ((self.A / n) ** (self.a / self.b) + self.B / d) ** self.b

    def __str__(self):
        return f"{E} + (({self.A:.3g} / N)^{self.a / self.b:.2f} + {self.B:.3g} / D)^{self.b:.2f}"


def main(settings, _):
    minutes = 0.01 if settings.tiny else settings.minutes
    short = {}
    for n_embd in (32, 64) if settings.tiny else SIZES:
        # Some ten validations each; a step of a larger model takes longer.
        argv = [f"--budget={60 * minutes:.0f}s", f"--eval_interval={math.ceil(2500 * minutes / n_embd)}"]
        if settings.tiny:
            argv = ["--max_iters=70", "--eval_interval=3"]
        short[n_embd] = trained(str(n_embd), n_embd, settings, argv)
    law = fit(short.values())

    # What each n_embd would reach in the long time, of which a twentieth is not training.
    steps, tokens, predicted = {}, {}, {}
    for n_embd, run in short.items():
        steps[n_embd] = round(LONGER * 60 * minutes / 1.05 * run.last["step"] / run.last["train_seconds"])
        tokens[n_embd] = steps[n_embd] * run.last["tokens"] // run.last["step"]
        predicted[n_embd] = law.bits(run.n, tokens[n_embd])
    best = min(predicted, key=predicted.get)
    # How far do the laws agree that leave out one of the runs?
    laws = [fit([run for run in short.values() if run is not out]) for out in short.values()]
    others = [other.bits(short[best].n, tokens[best]) for other in laws]
    print(f"bits per byte = {law}\nafter {LONGER * minutes:g} minutes, {best} channels will be the best, with "
          f"{predicted[best]:.4f} bits per byte after {tokens[best]:,} tokens (without one of the runs: "
          f"{min(others):.4f} to {max(others):.4f})", flush=True)

    argv = [f"--max_iters={steps[best]}", f"--eval_interval={math.ceil(steps[best] / 20)}"]
    long = trained(f"{best}-long", best, settings, argv)
    rows = []
    for name, run in [*short.items(), (f"{best}, the long run", long)]:
        read, bits = run.last["tokens"], run.last["val_bpb"]
        said = law.bits(run.n, read)
        rows.append([name, f"{run.n:,}", f"{read:,}", f"{run.last['wall_seconds']:.0f}", f"{bits:.4f}", f"{said:.4f}",
                     f"{said / bits - 1:+.2%}"])
    table("| channels | parameters | tokens | seconds | bits per byte | the law says | off |", rows)


def trained(name, n_embd, settings, argv):
    """The run out/scaling/`name`: trained now, unless it is there already."""
    out = os.path.join("out", "scaling", name)
    shape = [f"--n_embd={n_embd}", f"--n_head={max(1, n_embd // 64)}"]
    shape += TINY[-2:] if settings.tiny else ["--block_size=32", "--batch_size=96"]
    *_, rows = train_ours([ROOT / "config/train_small.py", *RATES, *shape, *argv, f"--dataset={settings.dataset}"],
                          ".", out)
    model = GPT(train.TrainConfig(**read_header(os.path.join(out, "log.jsonl"))["settings"]))
    return Run(model.n_params(), [row for row in rows if "val_bpb" in row])


def fit(runs):
    """The law with the smallest squared relative error. All runs count the same.

    Found by L-BFGS, as for Chinchilla (Hoffmann 2022, arXiv 2203.15556, 3.3), on the logarithms of the four numbers,
    which keeps them positive.
    """
    points = []
    for run in runs:
        rows = [row for row in run.rows if row["step"] > SKIPPED]
        if not rows:
            raise UserError(f"a run has no validation after {SKIPPED} steps", "more --minutes")
        points += [(run.n, row["tokens"], row["val_bpb"], len(rows) ** -0.5) for row in rows]
    n, d, bits, weight = torch.tensor(points, dtype=torch.float64).T  # (P,) each
    logs = torch.tensor([1e6, 0.2, 1e6, 0.25], dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.LBFGS([logs], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-15,
                                  line_search_fn="strong_wolfe")

    def error():
        optimizer.zero_grad()
        # In hundredths of a percent: a sum near 1e-12 would look finished to the optimizer.
        off = 1e4 * (Law(*logs.exp()).bits(n, d) / bits - 1)  # (P,)
        found = (off * weight).square().sum()
        found.backward()
        return found

    optimizer.step(error)
    return Law(*logs.exp().tolist())
