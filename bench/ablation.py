# SPDX-License-Identifier: GPL-3.0-only
"""
What does each idea buy? config/train_small.py with one switch changed at a time, and the same number of steps.

    python -m bench ablation --steps=150
"""
import os
import statistics
import tempfile
from dataclasses import dataclass

import torch

from bench.measure import ROOT, TINY, table, take_turns, train_ours

RECIPE = "config/train_small.py"
SWITCHES = {
    RECIPE: [],
    "learned positions instead of rope": ["--pos=learned"],
    "layernorm instead of rmsnorm": ["--norm=layernorm"],
    "gelu instead of swiglu": ["--mlp=gelu"],
    "without qk_norm": ["--qk_norm=false"],
    "one matrix for both ends": ["--tie_weights=true"],
    "adamw instead of muon": ["--optimizer=adamw"],
    "adamw at a rate of its own": ["--optimizer=adamw", "--learning_rate=0.003"],
    "float32 instead of bfloat16": ["--dtype=float32"],
}


@dataclass
class Settings:
    dataset: str = "stdlib"  # data/NAME
    steps: int = 200
    repeats: int = 3  # seeds
    tiny: bool = False  # models of no size and one switch, to see that it runs


def main(settings, _):
    steps, names = settings.steps, list(SWITCHES)
    if settings.tiny:
        names = names[:2]
    with tempfile.TemporaryDirectory() as folder:
        def run_switch(name, i):
            argv = [ROOT / RECIPE, f"--dataset={settings.dataset}", f"--seed={1337 + i}", "--compile=false",
                    f"--max_iters={steps}", f"--eval_interval={steps}", *SWITCHES[name]]
            argv += TINY if settings.tiny else []
            *_, rows = train_ours(argv, ".", os.path.join(folder, f"{names.index(name)}-{i}"))
            return rows[-1]["val_bpb"], rows[-1]["train_seconds"]

        found = take_turns({name: lambda i, name=name: run_switch(name, i) for name in names}, settings.repeats)
    print(f"{steps} steps, {settings.repeats} seeds, not compiled, {torch.get_num_threads()} threads")
    recipe = statistics.mean(bits for bits, _ in found[RECIPE])
    rows = []
    for name, results in found.items():
        bits, seconds = zip(*results)
        mean = statistics.mean(bits)
        rows.append([name, f"{mean:.4f}", f"{min(bits):.4f} to {max(bits):.4f}", f"{mean - recipe:+.4f}",
                     f"{statistics.median(seconds):.0f}"])
    table("| | bits per byte, mean | lowest to highest | against the recipe | seconds of training |", rows)
