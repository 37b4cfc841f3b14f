# SPDX-License-Identifier: GPL-3.0-only
"""
What does each idea buy? config/train_small.py with one switch changed at a time, and the same number of steps.

    python -m bench ablation --steps=150
"""
import statistics
import tempfile
from dataclasses import dataclass

import torch

from bench.measure import ROOT, TINY, table, take_turns, train_ours

SWITCHES = {
    "the recipe": [],
    "learned positions instead of rope": ["--pos=learned"],
    "layernorm instead of rmsnorm": ["--norm=layernorm"],
    "gelu instead of swiglu": ["--mlp=gelu"],
    "without qk_norm": ["--qk_norm=false"],
    "tied weights": ["--tie_weights=true"],
    "adamw instead of muon": ["--optimizer=adamw"],
    "adamw at a rate of its own": ["--optimizer=adamw", "--learning_rate=0.003"],
    "float32 instead of bfloat16": ["--dtype=float32"],
}


@dataclass
class Settings:
    dataset: str = "stdlib"  # data/NAME
    steps: int = 200
    repeats: int = 3  # seeds
    tiny: bool = False  # tiny models and one switch, to see that it runs


def main(settings, _):
    switches = list(SWITCHES.items())
    if settings.tiny:
        switches = switches[:2]

    def run(switch, i):
        argv = [ROOT / "config/train_small.py", f"--dataset={settings.dataset}", f"--seed={1337 + i}",
                "--compile=false", f"--max_iters={settings.steps}", f"--eval_interval={settings.steps}", *switch]
        if settings.tiny:
            argv += TINY
        with tempfile.TemporaryDirectory() as folder:
            *_, rows = train_ours(argv, ".", folder)
        return rows[-1]["val_bpb"], rows[-1]["train_seconds"]

    found = take_turns({name: lambda i, switch=switch: run(switch, i) for name, switch in switches}, settings.repeats)
    print(f"{settings.steps} steps, {settings.repeats} seeds, not compiled, {torch.get_num_threads()} threads")
    recipe = statistics.mean(bits for bits, _ in found["the recipe"])
    rows = []
    for name, results in found.items():
        bits, seconds = zip(*results)
        mean = statistics.mean(bits)
        rows.append([name, f"{mean:.4f}", f"{min(bits):.4f} to {max(bits):.4f}", f"{mean - recipe:+.4f}",
                     f"{statistics.median(seconds):.0f}"])
    table("| | bits per byte, mean | lowest to highest | against the recipe | seconds of training |", rows)
