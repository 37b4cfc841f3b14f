# SPDX-License-Identifier: GPL-3.0-only
"""
A scaling law on a laptop: six short runs predict a long one before it starts.

    python -m bench scaling --dataset=pytorch

Six models of different n_embd train for two minutes each. A law is fitted to their validations,

    bits per byte = E + ((A / N)^(a / b) + B / D)^b      (Kaplan 2020, arXiv 2001.08361, equation 1.5, and an E)

with N parameters that have read D tokens. A model that has read little is limited by that, however large it is: (B /
D)^b. One that has read enough is limited by its size: (A / N)^a. E stands for what no model can know. Runs so short
cannot tell it (whatever it is, A, a, B and b adapt), so it is set by hand. The law says which n_embd will be the best
after thirty minutes, and how good it will be. Only then does that run start. The picture is scaling.svg.

The text is read in windows of 32 tokens. With a longer context, a model learns at some moment to use much more of what
it has read (most likely it forms induction heads, which copy; Olsson 2022, arXiv 2209.11895), and its loss falls in a
leap that no law of this form predicts.

The learning rate stays level after its warm-up, lower than the recipe's, which falls to 0. So every moment of a run is
the end of a shorter one, and a run gives a curve to fit. (A rate that falls ends lower, but gives a single point.)
The runs stay in out/scaling, and what is finished there is not trained again.
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

WIDTHS = (64, 96, 128, 192, 256, 384)  # n_embd: 0.7 to 8 million parameters with a vocabulary of 4,096
LONGER = 15  # the long run takes so many times as long: 30 minutes
SKIPPED = 60  # steps of each run that are not fitted: three times the warm-up, which limits the loss so early
E = 0.7  # bits per byte, in windows of 32 tokens: fits what n_embd=256 reaches in 7 minutes on PyTorch's source


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
    def tokens(self):
        return self.rows[-1]["tokens"]

    @property
    def bits(self):
        return self.rows[-1]["val_bpb"]

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


def run(settings, _):
    check_limits(settings, {"minutes": (0.5, 10_000)})
    dataset, tiny = settings.dataset, settings.tiny
    minutes = 0.01 if tiny else settings.minutes
    short = {}
    for width in (32, 64) if tiny else WIDTHS:  # some ten validations each; a step of a wide model takes longer
        argv = [f"--budget={60 * minutes:.0f}s", f"--eval_interval={math.ceil(2500 * minutes / width)}"]
        argv = ["--max_iters=70", "--eval_interval=3"] if tiny else argv
        short[width] = trained(f"{width}", width, dataset, argv, tiny)
    curves = {width: (run.n, run.points()) for width, run in short.items()}
    law = fit(curves.values())

    # As many steps as fit into the long time; a twentieth of it is for the start and for validation.
    steps, predicted = {}, {}
    for width, run in short.items():
        last = run.rows[-1]
        steps[width] = round(LONGER * 60 * minutes / 1.05 * last["step"] / last["train_seconds"])
        predicted[width] = law.bits(run.n, steps[width] * run.tokens / last["step"])
    best = min(predicted, key=predicted.get)
    tokens = steps[best] * short[best].tokens // short[best].rows[-1]["step"]
    # How sure is that? As sure as the laws agree that leave out one of the runs, each in turn.
    laws = [fit([curve for width, curve in curves.items() if width != out]) for out in curves]
    others = [other.bits(short[best].n, tokens) for other in laws]
    print(f"bits per byte = {law}\nafter {LONGER * minutes:g} minutes, {best} channels will be the best, with "
          f"{predicted[best]:.4f} bits per byte after {tokens:,} tokens (without one of the runs, each in turn: "
          f"{min(others):.4f} to {max(others):.4f})", flush=True)

    long = trained(f"{best}-long", best, dataset, [
        f"--max_iters={steps[best]}", f"--eval_interval={math.ceil(steps[best] / 20)}"], tiny)
    rows = []
    for name, run in [*short.items(), (f"{best}, the long run", long)]:
        said = law.bits(run.n, run.tokens)
        rows.append([name, f"{run.n:,}", f"{run.tokens:,}", f"{run.rows[-1]['wall_seconds']:.0f}", f"{run.bits:.4f}",
                     f"{said:.4f}", f"{said / run.bits - 1:+.2%}"])
    table("| channels | parameters | tokens | seconds | bits per byte | the law says | off |", rows)
    with open("scaling.svg", "w", encoding="utf-8") as file:
        file.write(picture(law, list(short.values()), long))
    print("scaling.svg")


def trained(name, width, dataset, argv, tiny):
    """The run out/scaling/`name`: trained now, unless it is there already."""
    out = os.path.join("out", "scaling", name)
    path = os.path.join(out, "log.jsonl")
    if os.path.exists(path):
        note(f"{out} is there already")
    window = TINY[-2:] if tiny else ["--block_size=32", "--batch_size=96"]
    *_, rows = train_ours(
        [project("config/train_small.py"), f"--dataset={dataset}", f"--n_embd={width}", f"--n_head={max(1, width // 64)}",
         *window, *argv, "--decay_lr=false", "--learning_rate=0.01", "--muon_lr=0.0015", "--compile=false",
         "--eval_iters=8", "--save_interval=1000", "--always_save_checkpoint=false"], ".", out)
    model = GPT(train.TrainConfig(**read_header(path)["settings"]))
    run = Run(model.n_params(), model.flops_per_token(), [row for row in rows if "val_bpb" in row])
    say(f"{name}: {run.n:,} parameters, {run.tokens:,} tokens, {run.bits:.4f} bits per byte")
    return run


def fit(curves):
    """The law that fits best. curves: for each run (n, [(d, bits per byte), ...]); all runs count the same.

    (bits - E)^(1 / b) is a sum of two terms, so that with b and r = a / b given, what stands before them is a matter of
    linear least squares; all pairs of b and r are tried.
    """
    if any(not points for _, points in curves):
        raise UserError(f"a run has no validation after {SKIPPED} updates", "more --minutes")
    if min(bits for _, points in curves for _, bits in points) <= E:
        raise UserError(f"less than {E} bits per byte, which the law takes for the least there is", "another text")
    points = [(n, *point, len(points) ** -0.5) for n, points in curves for point in points]
    n, d, bits, weight = torch.tensor(points, dtype=torch.float64).T  # (P,) each
    n, d = n / 1e6, d / 1e6  # (numbers of everyday size)
    # All pairs of b and r as columns of a grid.
    b = torch.arange(0.05, 1, 0.005, dtype=torch.float64)
    r = torch.arange(0.1, 4, 0.05, dtype=torch.float64)
    b, r = torch.cartesian_prod(b, r).T[..., None]  # (G, 1) each
    wanted = (bits - E) ** (1 / b)  # (G, P)
    # Not the error of `wanted` is to be small but that of the bits, relatively: d bits / bits = scale d wanted.
    scale = weight * b * (bits - E) / bits / wanted
    terms = torch.stack((n ** -r, (1 / d).expand_as(wanted)), dim=-1)  # (G, P, 2)
    found = torch.linalg.lstsq(terms * scale[..., None], (wanted * scale)[..., None]).solution  # (G, 2, 1)
    found = found.clamp(min=0)  # nothing knows less for being larger or having read more
    law = E + (terms @ found)[..., 0] ** b  # (G, P)
    best = ((law / bits - 1) * weight).square().sum(dim=1).argmin()
    by_size, by_reading = found[best, :, 0].tolist()
    b, r = b[best].item(), r[best].item()
    return Law(1e6 * by_size ** (1 / r), r * b, 1e6 * by_reading, b)


def picture(law, short, long, width=720, height=400):
    """Bits per byte over the operations that training has taken: dots are validations, lines the law."""
    runs = [*short, long]
    dots, lines = [], []  # for each run, [(operations, bits per byte), ...]
    for run in runs:
        points = run.points()
        first, last = points[0][0], points[-1][0]
        places = [first * (last / first) ** (i / 50) for i in range(51)]
        dots.append([(run.operations * d, bits) for d, bits in points])
        lines.append([(run.operations * d, law.bits(run.n, d)) for d in places])
    everything = [point for curve in dots + lines for point in curve]
    operations, heights = zip(*everything)
    left, right = math.floor(math.log10(min(operations))), math.log10(max(operations))
    low, high = math.floor(10 * min(heights)), math.ceil(10 * max(heights)) + 1  # in tenths of a bit

    def x(operations):
        return f"{50 + (width - 100) * (math.log10(operations) - left) / (right - left):.1f}"

    def y(bits):
        return f"{20 + (height - 60) * (high - 10 * bits) / (high - low):.1f}"

    parts = ruling([i / 10 for i in range(low, high + 1)], y, width)
    for i in range(left, math.floor(right) + 1):
        parts.append(f'<text x="{x(10 ** i)}" y="{height - 20}" text-anchor="middle">10<tspan dy="-5" font-size="9">{i}'
                     '</tspan></text>')
    for run, points, line in zip(runs, dots, lines):
        color = "#0969da" if run is long else "#999"
        path = " ".join(f"{x(at)},{y(bits)}" for at, bits in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}"/>')
        parts += [f'<circle cx="{x(at)}" cy="{y(bits)}" r="3" fill="{color}"/>' for at, bits in points]
        at, bits = points[-1] if run is long else points[0]
        place = 'dx="6" dy="4"' if run is long else 'dy="-8" text-anchor="middle"'
        parts.append(f'<text x="{x(at)}" y="{y(bits)}" {place}>{run.n / 1e6:.1f}M</text>')
    parts.append(f'<text x="{width - 20}" y="34" text-anchor="end">bits per byte over operations of training; dots: '
                 'measured, lines: the law; grey: short runs, blue: the long one</text>')
    return svg(parts, width, height)
