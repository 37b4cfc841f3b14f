# SPDX-License-Identifier: GPL-3.0-only
"""
How fast does a model learn? Whole programs, as a user runs them.

    python -m bench loss shakespeare.txt --peer=../nanoGPT      # how long until nanoGPT's loss on tiny Shakespeare?
    python -m bench throughput --peer=../nanoGPT                # tokens per second and memory, three shapes
    python -m bench ablation                                    # what does each idea of the model buy?

The programs take turns, so that a machine that is slow for a minute is slow for both; what counts are the ratios.
"""
import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

import dataset as datasets
from training import checkpoint as ckpt
from runtime.console import UserError, say
from runtime.machine import Processes
from runtime.settings import check_limits

# nanoGPT's own recipe for tiny Shakespeare on a CPU, from its README
SHAKESPEARE = """--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12
    --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 --eval_interval=250
    --learning_rate=1e-3 --min_lr=1e-4 --beta2=0.99 --warmup_iters=100 --gradient_accumulation_steps=1
    --always_save_checkpoint=False""".split()
TINY = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2".split()
SMALL = "--n_layer=6 --n_head=8 --n_embd=512 --bias=True".split()  # openllm-small
SHAPES = {  # by name: settings of both programs; the vocabulary; how often it is measured, if not as often as asked
    "openllm-small, 4 x 512": ([*SMALL, "--block_size=512", "--batch_size=4"], 32000, None),
    "6 x 6 x 384, 16 x 256": (["--n_layer=6", "--n_head=6", "--n_embd=384", "--block_size=256", "--batch_size=16",
                               "--bias=False"], 65, None),
    # its own context and the batch that is the default of train.py, for the memory: an update takes half a minute
    "openllm-small, 12 x 1024": ([*SMALL, "--block_size=1024", "--batch_size=12"], 32000, 1)}
SWITCHES = {  # what is changed: the recipe stays otherwise what it is
    "config/train_small.py": [], "learned positions instead of rope": ["--pos=learned"],
    "layernorm instead of rmsnorm": ["--norm=layernorm"], "gelu instead of swiglu": ["--mlp=gelu"],
    "without qk_norm": ["--qk_norm=false"], "one matrix for both ends": ["--tie_weights=true"],
    "adamw instead of muon": ["--optimizer=adamw"], "adamw at a rate of its own":
    ["--optimizer=adamw", "--learning_rate=0.003"], "float32 instead of bfloat16": ["--dtype=float32"]}


def project(name):
    """The path of a file of this project."""
    return os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), name)


def run(command, folder):
    """Run a program in `folder`. Returns (seconds, bytes of memory at its peak, what it printed)."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=printed, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        took = time.perf_counter() - started
        process.returncode = status
        printed.seek(0)
        text = printed.read()
    if status:
        raise UserError(f"{' '.join(command[:2])} failed: {' '.join(text.strip().splitlines()[-2:])}", "see above")
    return took, usage.ru_maxrss * 1024, text


def ours(argv, folder, out):
    """Run train.py. Returns (seconds, bytes, rows of its log, what it printed)."""
    took, memory, text = run([project("train.py"), *argv, "--device=cpu", f"--out_dir={out}"], folder)
    with open(os.path.join(folder, out, "log.jsonl"), encoding="utf-8") as file:
        return took, memory, [json.loads(line) for line in file][1:], text


def peer_folder(folder, peer, name, tokens, vocab_size):
    """nanoGPT's own files in `folder`, and beside them the data of {train, val: ids} under the name `name`."""
    for file in ("train.py", "model.py", "configurator.py"):
        if os.path.isfile(os.path.join(peer, file)):
            shutil.copy(os.path.join(peer, file), folder)
        elif not peer or file == "train.py":
            raise UserError(f"--peer={peer!r} is not a folder of nanoGPT: it has no {file}",
                            "git clone https://github.com/karpathy/nanoGPT, and --peer=nanoGPT")
    os.makedirs(os.path.join(folder, "data", name))
    for side, ids in tokens.items():
        ids.astype(np.uint16).tofile(os.path.join(folder, "data", name, f"{side}.bin"))
    with open(os.path.join(folder, "data", name, "meta.pkl"), "wb") as file:
        pickle.dump(dict(vocab_size=vocab_size, itos={i: chr(32 + i) for i in range(vocab_size)}), file)


def spread(values, digits=2):
    values = sorted(values)
    return f"{statistics.median(values):,.{digits}f} ({values[0]:,.{digits}f} to {values[-1]:,.{digits}f})"


def loss(settings, sources):
    """How long does nanoGPT take for its recipe on tiny Shakespeare, how long do we for a loss that is as low?

    Both are scored by the same code: one pass over all held-out characters, in windows of 64. Both are measured from
    the start of the process to its end, with compiling, validation and saving; ours prints a sample, too.
    """
    check_limits(settings, {"repeats": (1, 100)})
    with tempfile.TemporaryDirectory() as folder:
        source = sources[0] if sources else "shakespeare"
        source = os.path.abspath(source) if os.path.exists(source) else source
        ready = os.path.join(folder, "data", "shakespeare_char")
        run([project("prepare.py"), source, f"--out={ready}", "--tokenizer=char", "--val_fraction=0.1"], folder)
        data = datasets.Dataset.open(ready)
        first = min(data.tokens("train", 1, data.meta["train"]["tokens"] - 1).tolist())  # special tokens come before
        tokens = {side: data.tokens(side, 1, data.meta[side]["tokens"] - 1) - first for side in ("train", "val")}
        theirs = os.path.join(folder, "theirs")
        os.makedirs(theirs)
        peer_folder(theirs, settings.peer, "chars", tokens, data.meta["vocab_size"] - first)
        rows = {"nanoGPT": [], "ours": []}
        if settings.compiled:
            rows["nanoGPT, --compile=True"] = []
        short = [*TINY, "--max_iters=20"] if settings.tiny else []
        for i in range(settings.repeats):
            for name in rows:
                out = f"out{i}"
                if name == "ours":
                    took, *_ = ours([project("config/train_shakespeare_char.py"), *short], folder, out)
                    path = os.path.join(folder, out)
                else:
                    more = ["--compile=True"] if "True" in name else []
                    more += [*short, "--dataset=chars", f"--out_dir={out}"]
                    took, _, _ = run(["train.py", *SHAKESPEARE, *more], theirs)
                    path = os.path.join(theirs, out, "ckpt.pt")
                    shutil.copy(os.path.join(theirs, "data", "chars", "meta.pkl"), os.path.dirname(path))
                model, _, _ = ckpt.load_run(path)
                rows[name].append((took, full_loss(model, data, 0 if name == "ours" else first)))
                say(f"{name}: {took:.1f} s, loss {rows[name][-1][1]:.4f}")
        parameters = model.n_params()
    print(f"tiny Shakespeare, {settings.repeats} rounds, {torch.get_num_threads()} threads: seconds of the whole "
          "process, loss of a pass over all that is held out, in windows of 64")
    print("| | seconds | loss | times as fast as nanoGPT |\n|---|---|---|---|")
    for name, found in rows.items():
        ratios = [theirs / took for (theirs, _), (took, _) in zip(rows["nanoGPT"], found)]
        print(f"| {name} | {spread([took for took, _ in found], 1)} | {max(loss for _, loss in found):.4f} | "
              f"{spread(ratios)} |")
    lower = max(loss for _, loss in rows["ours"]) <= min(loss for _, loss in rows["nanoGPT"])
    return 0 if lower or settings.tiny else 1


@torch.no_grad()
def full_loss(model, data, first):
    """Nats per character over all that is held out, each predicted once. first: what our ids are larger by."""
    size = min(64, model.config.block_size)

    def loss_of(idx, targets):
        return model((idx - first).clamp(min=0), torch.where(targets < first, -1, targets - first))
    total, count = datasets.validation_sums(loss_of, lambda number: data.val_batch(number, size, 64),
                                            data.n_val_batches(size, 64), Processes())
    return total / count


def throughput(settings, _):
    """Tokens per second and memory of the two train.py, each as it comes: nanoGPT's in float32 on a CPU, ours as it
    chooses. The times of the first updates are left out; so is the time that compiling takes."""
    check_limits(settings, {"repeats": (1, 100), "steps": (6, 100_000)})
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {settings.repeats} rounds, the median of "
          f"{settings.steps - 5} updates in each: median (lowest to highest)")
    print("| shape | nanoGPT, tokens/s | ours | times as fast | of the peak | memory: nanoGPT | ours | share |")
    print("|---" * 8 + "|")
    for shape, (argv, vocab_size, rounds) in ({"tiny": (TINY, 65, None)} if settings.tiny else SHAPES).items():
        rounds = rounds or settings.repeats
        with tempfile.TemporaryDirectory() as folder:
            ids = np.random.default_rng(0).integers(0, 60, 200_000)
            theirs = os.path.join(folder, "theirs")
            os.makedirs(theirs)
            peer_folder(theirs, settings.peer, "random", dict(train=ids, val=ids), vocab_size)
            with open(os.path.join(folder, "random.txt"), "w", encoding="utf-8") as file:
                file.write("".join(chr(40 + i) for i in ids))
            run([project("prepare.py"), "random.txt", "--out=data/random", "--tokenizer=char"], folder)
            argv = [*argv, f"--max_iters={settings.steps}", "--log_interval=1", "--eval_iters=1", "--dropout=0.0",
                    "--eval_interval=1000000", "--dataset=random", "--gradient_accumulation_steps=1"]
            size = [int(value.partition("=")[2]) for value in argv if value.startswith(("--block", "--batch"))]
            rates, memories, shares = {"nanoGPT": [], "ours": []}, {"nanoGPT": [], "ours": []}, []
            for i in range(rounds):
                _, memory, text = run(["train.py", *argv, "--device=cpu", "--compile=False", f"--out_dir=out{i}"],
                                      theirs)
                times = [float(ms) / 1000 for ms in re.findall(r"iter \d+: loss .* time ([\d.]+)ms", text)][5:]
                rates["nanoGPT"].append(size[0] * size[1] / statistics.median(times))
                memories["nanoGPT"].append(memory)
                compiled = ["--compile=false" if settings.tiny else "--compile=true"]
                _, memory, log, text = ours([*argv, *compiled, f"--vocab_size={vocab_size}"], folder, f"out{i}")
                rates["ours"].append(statistics.median(row["tokens_per_second"] for row in log[5:]))
                memories["ours"].append(memory)
                shares.append(statistics.median(map(int, re.findall(r"(\d+)% of peak", text)[5:])))
                say(f"{shape}: round {i + 1} of {rounds}")
            ratios = [b / a for a, b in zip(*rates.values())]
            megabytes = [max(values) / 1e6 for values in memories.values()]
            print(f"| {shape} | {spread(rates['nanoGPT'], 0)} | {spread(rates['ours'], 0)} | {spread(ratios)} | "
                  f"{spread(shares, 0)}% | {megabytes[0]:,.0f} MB | {megabytes[1]:,.0f} MB | "
                  f"{megabytes[1] / megabytes[0]:.0%} |", flush=True)


def ablation(settings, _):
    """What does each idea buy? config/train_small.py with one switch changed at a time, and the same number of updates.

    The learning rates were tuned for the recipe as it is, so that a switch may lose a little by that alone.
    """
    check_limits(settings, {"repeats": (1, 100), "steps": (1, 100_000)})
    dataset = settings.dataset or "stdlib"
    say(f"{len(SWITCHES)} settings, {settings.repeats} seeds, {settings.steps} updates")
    switches = dict(list(SWITCHES.items())[:2]) if settings.tiny else SWITCHES
    found = {name: [] for name in switches}
    with tempfile.TemporaryDirectory() as folder:
        if os.path.exists("data"):
            os.symlink(os.path.abspath("data"), os.path.join(folder, "data"))
        for seed in range(settings.seed, settings.seed + settings.repeats):
            for name, switch in switches.items():
                _, _, log, _ = ours([project("config/train_small.py"), f"--dataset={dataset}", f"--seed={seed}",
                                  f"--max_iters={settings.steps}", f"--eval_interval={settings.steps}",
                                  "--compile=false", *switch, *(TINY if settings.tiny else [])], folder,
                                 f"{list(switches).index(name)}-{seed}")
                found[name].append((log[-1]["val_bpb"], log[-1]["train_seconds"]))
                say(f"{name}, seed {seed}: {found[name][-1][0]:.4f} bits per byte, {found[name][-1][1]:.0f} s")
    base = statistics.mean(bpb for bpb, _ in found["config/train_small.py"])
    print(f"data/{dataset}, {settings.steps} updates, {settings.repeats} seeds, not compiled, "
          f"{torch.get_num_threads()} threads")
    print("| | bits per byte, mean | lowest to highest | against the recipe | seconds of training |")
    print("|---" * 5 + "|")
    for name, rows in found.items():
        bits = [bpb for bpb, _ in rows]
        print(f"| {name} | {statistics.mean(bits):.4f} | {min(bits):.4f} to {max(bits):.4f} | "
              f"{statistics.mean(bits) - base:+.4f} | {statistics.median(seconds for _, seconds in rows):.0f} |")
