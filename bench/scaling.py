# SPDX-License-Identifier: GPL-3.0-only
"""
A scaling law on a laptop: six short runs predict a long one before it starts.

    python -m bench scaling --dataset=pytorch

Six models of different n_embd train for two minutes each. A law is fitted to their validations,

    bits per byte = E + ((A / N)^(a / b) + B / D)^b      (Kaplan 2020, arXiv 2001.08361, equation 1.5, and an E)

with N parameters that have read D tokens. A model that has read little is limited by that, however large it is: (B /
D)^b. One that has read enough is limited by its size: (A / N)^a. E, what no model can know, is set by hand, since runs
so short fit any. The law says which n_embd will be the best after thirty minutes, and how good. Only then does that
run start, and scaling.svg shows what was said and what came.

Windows have 32 tokens: with a longer context, a model learns at some moment to use much more of it (most likely it
forms induction heads, which copy; Olsson 2022, arXiv 2209.11895), a leap that no law of this form predicts. The
learning rate stays level after its warm-up, so that every moment of a run is the end of a shorter one, and a run gives
a curve to fit. The runs stay in out/scaling, and what is finished there is not trained again.
"""
import math
import os
from dataclasses import dataclass

import torch

import train
from bench.measure import TINY, project, table, train_ours
from model import GPT
from runtime.console import UserError, note, say
from runtime.settings import check_limits
from training.log import read_header, ruling, svg

SIZES = (64, 96, 128, 192, 256, 384)  # n_embd: 0.7 to 8 million parameters with a vocabulary of 4,096
LONGER = 15  # the long run takes so many times as long: 30 minutes
SKIPPED = 60  # steps of each run that are not fitted: three times the warm-up, which limits the loss so early
E = 0.7  # bits per byte, in windows of 32 tokens: fits what n_embd=256 reaches in 7 minutes on PyTorch's source

RATES = """--decay_lr=false --learning_rate=0.01 --muon_lr=0.0015 --compile=false --eval_iters=8 --save_interval=1000
    --always_save_checkpoint=false""".split()


@dataclass
class Settings:
    dataset: str = "stdlib"  # data/NAME
    minutes: float = 2.0  # of each short run
    tiny: bool = False  # two models of no size; only to see that it runs


@dataclass
class Run:
    n: int  # parameters
    operations: int  # of training, for a token
    rows: list  # of its log, those with a validation

    @property
    def last(self):
        return self.rows[-1]

    def points(self):
        """(tokens, bits per byte) of the validations that count."""
        return [(row["tokens"], row["val_bpb"]) for row in self.rows if row["step"] > SKIPPED]


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
    check_limits(settings, {"minutes": (0.5, 10_000)})
    minutes = 0.01 if settings.tiny else settings.minutes
    short = {}
    for n_embd in (32, 64) if settings.tiny else SIZES:
        # Some ten validations each; a step of a larger model takes longer.
        argv = [f"--budget={60 * minutes:.0f}s", f"--eval_interval={math.ceil(2500 * minutes / n_embd)}"]
        argv = ["--max_iters=70", "--eval_interval=3"] if settings.tiny else argv
        short[n_embd] = trained(f"{n_embd}", n_embd, settings, argv)
    curves = {n_embd: (run.n, run.points()) for n_embd, run in short.items()}
    law = fit(curves.values())

    # As many steps as fit into the long time; a twentieth of it is for the start and for validation.
    steps, tokens, predicted = {}, {}, {}
    for n_embd, run in short.items():
        steps[n_embd] = round(LONGER * 60 * minutes / 1.05 * run.last["step"] / run.last["train_seconds"])
        tokens[n_embd] = steps[n_embd] * run.last["tokens"] // run.last["step"]
        predicted[n_embd] = law.bits(run.n, tokens[n_embd])
    best = min(predicted, key=predicted.get)
    # How sure is that? As sure as the laws agree that leave out one of the runs, each in turn.
    laws = [fit([curve for n_embd, curve in curves.items() if n_embd != out]) for out in curves]
    others = [other.bits(short[best].n, tokens[best]) for other in laws]
    print(f"bits per byte = {law}\nafter {LONGER * minutes:g} minutes, {best} channels will be the best, with "
          f"{predicted[best]:.4f} bits per byte after {tokens[best]:,} tokens (without one of the runs, each in turn: "
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
    with open("scaling.svg", "w", encoding="utf-8") as file:
        file.write(picture(law, [*short.values(), long]))
    print("scaling.svg")


def trained(name, n_embd, settings, argv):
    """The run out/scaling/`name`: trained now, unless it is there already."""
    out = os.path.join("out", "scaling", name)
    path = os.path.join(out, "log.jsonl")
    if os.path.exists(path):
        note(f"{out} is there already")
    shape = [f"--n_embd={n_embd}", f"--n_head={max(1, n_embd // 64)}"]
    shape += TINY[-2:] if settings.tiny else ["--block_size=32", "--batch_size=96"]
    *_, rows = train_ours([project("config/train_small.py"), *RATES, *shape, *argv, f"--dataset={settings.dataset}"],
                          ".", out)
    model = GPT(train.TrainConfig(**read_header(path)["settings"]))
    run = Run(model.n_params(), model.flops_per_token(), [row for row in rows if "val_bpb" in row])
    say(f"{name}: {run.n:,} parameters, {run.last['tokens']:,} tokens, {run.last['val_bpb']:.4f} bits per byte")
    return run


def fit(curves):
    """The law that fits best. curves: for each run (n, [(d, bits per byte), ...]); all runs count the same.

    L-BFGS, as for Chinchilla (Hoffmann 2022, arXiv 2203.15556, 3.3), finds the smallest squared error relative to the
    bits. It works on the logarithms of the four numbers, which keeps them positive.
    """
    if any(not points for _, points in curves):
        raise UserError(f"a run has no validation after {SKIPPED} steps", "more --minutes")
    if min(bits for _, points in curves for _, bits in points) <= E:
        raise UserError(f"less than {E} bits per byte, which the law takes for the least there is", "another text")
    points = [(n, *point, len(points) ** -0.5) for n, points in curves for point in points]
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


def picture(law, runs, width=720, height=400):
    """Bits per byte over the operations that training has taken: dots are validations, lines the law."""
    dots, lines = [], []  # for each run, [(operations, bits per byte), ...]
    for run in runs:
        points = run.points()
        first, last = points[0][0], points[-1][0]
        places = [first * (last / first) ** (i / 50) for i in range(51)]
        dots.append([(run.operations * d, bits) for d, bits in points])
        lines.append([(run.operations * d, law.bits(run.n, d)) for d in places])
    operations, bits = zip(*(point for curve in dots + lines for point in curve))
    left, right = math.floor(math.log10(min(operations))), math.log10(max(operations))
    low, high = math.floor(10 * min(bits)) / 10, math.ceil(10 * max(bits)) / 10 + 0.1

    def x(operations):
        return f"{50 + (width - 100) * (math.log10(operations) - left) / (right - left):.1f}"

    def y(bits):
        return f"{20 + (height - 60) * (high - bits) / (high - low):.1f}"

    parts = ruling([low + i / 10 for i in range(round(10 * (high - low)) + 1)], y, width)
    for i in range(left, math.floor(right) + 1):
        parts.append(f'<text x="{x(10 ** i)}" y="{height - 20}" text-anchor="middle">1e{i}</text>')
    for run, points, line in zip(runs, dots, lines):
        color = "#0969da" if run is runs[-1] else "#999"
        path = " ".join(f"{x(at)},{y(bits)}" for at, bits in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}"/>')
        parts += [f'<circle cx="{x(at)}" cy="{y(bits)}" r="3" fill="{color}"/>' for at, bits in points]
        at, bits = points[0]
        parts.append(f'<text x="{x(at)}" y="{y(bits)}" dy="-8" text-anchor="middle">{run.n / 1e6:.1f}M</text>')
    parts.append(f'<text x="{width - 20}" y="34" text-anchor="end">bits per byte over operations of training; dots: '
                 'measured, lines: the law; grey: short runs, blue: the long one</text>')
    return svg(parts, width, height)
