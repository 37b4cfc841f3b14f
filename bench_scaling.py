# SPDX-License-Identifier: GPL-3.0-only
"""
A scaling law on a laptop: six short runs predict a long one before it starts. Called as `python bench.py scaling`.

Six models of different width train for two minutes each. A law with five numbers is fitted to all their validations,

    bits per byte = E + A / N^a + B / D^b                       (Hoffmann 2022, arXiv 2203.15556, equation 10)

with N parameters that have read D tokens: E is what no model can know about the text, A / N^a what a model of this size
cannot hold, B / D^b what it has not read yet. The law says which of the widths will be the best after thirty minutes, and
how good. Only then does that run start; the picture, scaling.svg, shows what was said and what came.

The learning rate stays level after its warm-up. So every moment of a run is the end of a shorter one, and a run gives a
curve to fit instead of a point. (A rate that falls to 0 ends lower; but where it is half-way down, nothing ends.)
The runs stay in out/scaling; what is finished there is not trained again.
"""
import math
import os
from dataclasses import dataclass

import torch

import train
from bench_train import TINY, ours, project
from config import check_limits, say
from log import read_header, read_rows, ruling, svg
from model import GPT

WIDTHS = (64, 128, 192, 256, 384, 512)  # 0.7 to 13.6 million parameters with a vocabulary of 4,096
LONGER = 15  # how many times as many updates the long run makes: 30 minutes after 2
SKIPPED = 0.2  # of each short run: so early, the warm-up is what limits the loss, and no power of N or D
UNIT = 1e6  # N and D are counted in millions, so that A and B are numbers of everyday size


@dataclass
class Law:
    E: float
    A: float
    a: float
    B: float
    b: float

    def bits(self, n, d):
        return self.E + self.A / (n / UNIT) ** self.a + self.B / (d / UNIT) ** self.b

    def __str__(self):
        return f"{self.E:.3f} + {self.A:.3f} / (N / 10^6)^{self.a:.2f} + {self.B:.3f} / (D / 10^6)^{self.b:.2f}"


def fit(curves):
    """The law that fits best. curves: for each run (N, [(D, bits per byte), ...]); all runs count the same.

    With a and b given, E, A and B are a matter of linear least squares; so all pairs of a and b are tried.
    """
    n, d, bits, weight = torch.tensor([(n, *point, len(points) ** -0.5) for n, points in curves for point in points],
                                      dtype=torch.float64).T  # (P,) each
    grid = torch.arange(0.05, 1.5, 0.01, dtype=torch.float64)
    a, b = (x.flatten() for x in torch.meshgrid(grid, grid, indexing="ij"))  # (G,) each
    terms = torch.stack((torch.ones(len(a), len(n), dtype=torch.float64),
                         (n / UNIT) ** -a[:, None], (d / UNIT) ** -b[:, None]), dim=-1)  # (G, P, 3)
    relative = (weight / bits)[:, None]
    wanted = (bits[:, None] * relative).expand(len(a), -1, -1)  # (G, P, 1)
    found = torch.linalg.lstsq(terms * relative, wanted).solution  # (G, 3, 1)
    error = ((terms @ found)[..., 0] - bits).mul(relative[:, 0]).square().sum(dim=1)  # (G,)
    error[(found < 0).any(dim=1)[:, 0]] = math.inf  # nothing is known better for being larger or having read more
    best = int(error.argmin())
    E, A, B = found[best, :, 0].tolist()
    return Law(E, A, a[best].item(), B, b[best].item())


def trained(width, name, dataset, argv, tiny):
    """Train a model of this width, or find it trained. Returns (parameters, operations a token, rows with val_bpb)."""
    out = os.path.join("out", "scaling", name)
    shape = [f"--n_embd={width}", f"--n_head={max(1, width // 64)}", *(TINY[-2:] if tiny else [])]
    ours([project("config/train_small.py"), f"--dataset={dataset}", *shape, "--decay_lr=false",
          "--learning_rate=0.01", "--muon_lr=0.0015", "--compile=false", "--eval_iters=24", "--save_interval=1000",
          "--always_save_checkpoint=false", *argv], ".", out)
    path = os.path.join(out, "log.jsonl")
    model = GPT(train.TrainConfig(**read_header(path)["settings"]))
    rows = [row for row in read_rows(path) if "val_bpb" in row]
    say(f"{model.n_params():,} parameters: {rows[-1]['val_bpb']:.4f} bits per byte after {rows[-1]['tokens']:,} tokens, "
        f"{rows[-1]['wall_seconds']:.0f} s")
    return model.n_params(), model.flops_per_token(), rows


def scaling(settings, _):
    check_limits(settings, {"minutes": (0.5, 10_000)})
    dataset, tiny, short = settings.dataset or "stdlib", settings.tiny, {}
    minutes = 0.01 if tiny else settings.minutes
    for width in (32, 64) if tiny else WIDTHS:
        # about ten validations in each run: an update of a wide model takes longer
        length = ["--max_iters=12", "--eval_interval=1"] if tiny else [
            f"--budget={60 * minutes:.0f}s", f"--eval_interval={math.ceil(2500 * minutes / width)}"]
        short[width] = trained(width, f"{width}", dataset, length, tiny)

    curves = {width: (n, [(row["tokens"], row["val_bpb"]) for row in rows
                          if row["tokens"] > SKIPPED * rows[-1]["tokens"]])
              for width, (n, _, rows) in short.items()}
    law = fit(curves.values())
    updates = {width: round(LONGER * 60 * minutes / 1.05 * rows[-1]["step"] / rows[-1]["train_seconds"])
               for width, (_, _, rows) in short.items()}  # a twentieth is for the start and for validation
    tokens = {width: updates[width] * rows[-1]["tokens"] // rows[-1]["step"] for width, (_, _, rows) in short.items()}
    said = {width: law.bits(n, tokens[width]) for width, (n, _, _) in short.items()}
    best = min(said, key=said.get)
    # How sure is that? As sure as the laws agree that leave out one of the runs, each in turn.
    others = sorted(fit([curve for width, curve in curves.items() if width != out]).bits(short[best][0], tokens[best])
                    for out in curves)
    print(f"bits per byte = {law}\nafter {LONGER * minutes:g} minutes, {best} channels will be the best, with "
          f"{said[best]:.4f} bits per byte after {tokens[best]:,} tokens (without one of the runs, each in turn: "
          f"{others[0]:.4f} to {others[-1]:.4f})", flush=True)

    long = trained(best, f"{best}-long", dataset, [
        f"--max_iters={updates[best]}", f"--eval_interval={math.ceil(updates[best] / 20)}"], tiny)
    print("| channels | parameters | tokens | seconds | bits per byte | the law says | off |\n|---" + "|---" * 6 + "|")
    for name, (n, _, rows) in [*short.items(), (f"{best}, the long run", long)]:
        last, value = rows[-1], law.bits(n, rows[-1]["tokens"])
        print(f"| {name} | {n:,} | {last['tokens']:,} | {last['wall_seconds']:.0f} | {last['val_bpb']:.4f} | {value:.4f} "
              f"| {value / last['val_bpb'] - 1:+.2%} |")
    with open("scaling.svg", "w", encoding="utf-8") as file:
        file.write(picture(law, list(short.values()), long))
    print("scaling.svg")


def picture(law, short, long, width=720, height=400):
    """Bits per byte over the operations that training has taken: dots are validations, lines the law."""
    dots = [(flops * row["tokens"], row["val_bpb"]) for _, flops, rows in [*short, long] for row in rows]
    left, right = math.floor(math.log10(min(dots)[0])), math.log10(max(dots)[0])
    bits = sorted(value for _, value in dots)
    low, high = math.floor(5 * bits[0]) / 5, math.ceil(5 * bits[-1]) / 5

    def x(operations):
        return 50 + (width - 100) * (math.log10(operations) - left) / (right - left)

    def y(value):
        return 20 + (height - 60) * (high - value) / (high - low)

    parts = ruling([low + i * 0.2 for i in range(round((high - low) / 0.2) + 1)], y, width)
    parts += [f'<text x="{x(10 ** i):.1f}" y="{height - 20}" text-anchor="middle">10<tspan dy="-5" font-size="9">{i}'
              f'</tspan></text>' for i in range(left, math.floor(right) + 1)]
    for n, flops, rows in [*short, long]:
        first, last, color = rows[-1]["tokens"] * SKIPPED, rows[-1]["tokens"], '#999'
        if rows is long[2]:
            first, color = last / LONGER, "#0969da"
        points = ((flops * d, law.bits(n, d)) for d in (first * (last / first) ** (i / 50) for i in range(51)))
        parts += [f'<polyline points="{" ".join(f"{x(c):.1f},{y(b):.1f}" for c, b in points)}" fill="none" '
                  f'stroke="{color}"/>',
                  f'<text x="{x(flops * last) + 6:.1f}" y="{y(rows[-1]["val_bpb"]):.1f}" dy="4">{n / 1e6:.1f}M</text>']
        parts += [f'<circle cx="{x(flops * row["tokens"]):.1f}" cy="{y(row["val_bpb"]):.1f}" r="3" fill="{color}"/>'
                  for row in rows]
    parts += [f'<text x="{width - 20}" y="34" text-anchor="end">bits per byte over operations of training: dots are '
              'measured, lines the law; grey the short runs, blue the long one</text>']
    return svg(parts, width, height)
