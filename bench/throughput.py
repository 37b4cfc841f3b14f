# SPDX-License-Identifier: GPL-3.0-only
"""
How fast is a training step, and how much memory does it take? nanoGPT's train.py and ours.

    python -m bench throughput --peer=../nanoGPT --steps=11

nanoGPT runs in float32, ours compiled and in the dtype that it chooses. The first steps, which compile, are left out.
"Of the peak" is the share of this machine's speed in a large matrix product of the same dtype.
"""
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.measure import TINY, measure, prepare_for_both, ratio, spread, table, take_turns, train_ours
from runtime.settings import check_limits

SMALL = "--n_layer=6 --n_head=8 --n_embd=512 --bias=True"  # openllm-small
NARROW = "--n_layer=6 --n_head=6 --n_embd=384 --bias=False"
SHAPES = {  # name: (shape, batch_size, block_size, vocab_size)
    "openllm-small, 4 x 512": (SMALL, 4, 512, 32000),
    "6 x 6 x 384, 16 x 256": (NARROW, 16, 256, 65),
    "openllm-small, 12 x 1024": (SMALL, 12, 1024, 32000),  # for the memory: a step takes half a minute, so one round
}
COMMON = """--gradient_accumulation_steps=1 --dropout=0.0 --log_interval=1 --eval_iters=1 --eval_interval=1000000
    --dataset=chars --device=cpu"""
SKIPPED = 5  # steps


@dataclass
class Settings:
    peer: str = ""  # folder of nanoGPT
    steps: int = 200
    repeats: int = 3  # rounds
    tiny: bool = False  # a tiny model, not compiled, to see that it runs


def main(settings, _):
    check_limits(settings, {"steps": (SKIPPED + 1, 100_000)})
    shapes = {"tiny": (" ".join(TINY), 2, 16, 100)} if settings.tiny else SHAPES
    print(f"{torch.get_num_threads()} threads, {settings.repeats} rounds of {settings.steps} steps: median (lowest to "
          "highest)")
    table("| shape | nanoGPT, tokens/s | ours | times as fast | of the peak | memory: nanoGPT | ours |",
          (compare(name, *shape, settings) for name, shape in shapes.items()))


def compare(name, shape, batch_size, block_size, vocab_size, settings):
    argv = f"{shape} {COMMON} --batch_size={batch_size} --block_size={block_size} --max_iters={settings.steps}".split()
    rounds = 1 if block_size == 1024 else settings.repeats
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "random.txt")  # what it says does not change how long it takes
        text.write_bytes(np.random.default_rng(0).integers(40, 100, 200_000, dtype=np.uint8))
        peer, _ = prepare_for_both(settings.peer, str(text), folder, vocab_size)

        def theirs(i):
            _, memory, printed = measure(["train.py", *argv, "--compile=False", f"--out_dir=out{i}"], peer)
            times = re.findall(r"iter \d+: loss .* time ([\d.]+)ms", printed)
            return 1000 * batch_size * block_size / middle(times), memory

        def ours(i):
            compiled = f"--compile={not settings.tiny}"
            _, memory, printed, rows = train_ours([*argv, compiled, f"--vocab_size={vocab_size}"], folder, f"out{i}")
            rates = [row["tokens_per_second"] for row in rows]
            return middle(rates), memory, middle(re.findall(r"(\d+)% of peak", printed))

        found = take_turns({"nanoGPT": theirs, "ours": ours}, rounds)
    their_rates, their_memory = zip(*found["nanoGPT"])
    our_rates, our_memory, shares = zip(*found["ours"])
    return [name, spread(their_rates, 0), spread(our_rates, 0), ratio(our_rates, their_rates), spread(shares, 0) + "%",
            f"{max(their_memory) / 1e6:,.0f} MB", f"{max(our_memory) / 1e6:,.0f} MB"]


def middle(values):
    return median(map(float, values[SKIPPED:]))
