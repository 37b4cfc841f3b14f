# SPDX-License-Identifier: GPL-3.0-only
"""
Measurements: the numbers in the README that name a `python -m bench` command. Older ones are in docs/measurements.md.

    python -m bench parity --peer=../nanoGPT    # the same losses and gradients as nanoGPT, update by update?
    python -m bench doctor              # is this machine fit to train? A checklist to paste into an issue
    python -m bench serve               # how fast is the server with 1, 4 and 16 clients? (bench/serve.py)
    python -m bench loss shakespeare.txt --peer=../nanoGPT     # how soon has a model learned? (bench/learning.py, as
    python -m bench throughput --peer=../nanoGPT        # the next two) How fast is an update?
    python -m bench ablation            # what does each idea of the model buy?
    python -m bench scaling             # how good will a long run be? Six short ones say it (bench/scaling.py)
    python -m bench generate --peer=../nanoGPT --prompt=8 --new_tokens=504     # and a text? (bench/generate.py)

Each prints what it measured on standard output, and on which machine.
"""
import json
import math
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

import dataset as datasets
from runtime import machine
import train
from bench.generate import generate
from bench.scaling import scaling
from bench.serve import serve
from bench.learning import ablation, loss, throughput
from runtime.console import UserError, command_line
from runtime.settings import check_limits, load
from model import GPT, GPTConfig, KVCache, PRESETS


@dataclass
class BenchConfig:
    seed: int = 1337  # ablation: of the first run
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # serve: of matrix products
    prompt: int = 32  # serve, generate: tokens of a prompt
    new_tokens: int = 64  # serve, generate: tokens of an answer
    requests: int = 4  # serve: requests of each client, one after the other
    peer: str = ""  # parity, loss, throughput, generate: folder of nanoGPT
    dataset: str = ""  # data/NAME; parity: shakespeare_char, doctor: stdlib where it is there
    steps: int = 200  # parity, throughput, ablation: updates
    compiled: bool = False  # loss: nanoGPT with --compile=True as well
    minutes: float = 2.0  # scaling: of each short run
    tiny: bool = False  # loss and all below it: models of no size; only to see that it runs
    repeats: int = 3  # rounds; ablation: seeds


# ---------------------------------------------------------------------------------------------------------------------
# Parity

# (At three times this rate training is chaotic: a difference in the last bit grows tenfold in ten updates.)
PARITY = """--n_layer=3 --n_head=4 --n_embd=64 --block_size=64 --batch_size=4 --gradient_accumulation_steps=3
    --bias=False --dropout=0.0 --learning_rate=1e-3 --min_lr=1e-4 --weight_decay=0.1 --beta1=0.9 --beta2=0.95
    --grad_clip=1.0 --device=cpu --dtype=float32 --compile=False""".split()
TOLERANCE = 1e-4


def parity(settings, _):
    """Does training here do what it does in nanoGPT? The same weights and batches, two programs, every loss and norm.

    nanoGPT's own train.py runs unchanged: around it, its model starts from our weights, its random numbers are the
    positions of our batches, and its losses and gradient norms are written down. Warm-up, cosine, accumulation,
    clipping and the decay of the matrices alone are in it; float32, without dropout.
    """
    check_limits(settings, {"steps": (10, 100_000)})
    check_peer(settings.peer, "train.py", "model.py")
    dataset = settings.dataset or "shakespeare_char"
    with tempfile.TemporaryDirectory() as folder:
        argv = [*PARITY, f"--max_iters={settings.steps}", f"--lr_decay_iters={settings.steps}",
                f"--warmup_iters={settings.steps // 10}"]
        ours = os.path.join(folder, "ours")
        command = [sys.executable, train.__file__, *argv, "--mlp=gelu_exact", "--log_interval=1", "--eval_iters=1",
                   f"--eval_interval={settings.steps}", f"--dataset={dataset}", f"--out_dir={ours}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            fact, fix = done.stderr.strip().splitlines()[-2:]  # the two lines of an error
            raise UserError(f"our own run failed, {fact}", fix.removeprefix("fix: "))
        with open(os.path.join(ours, "log.jsonl"), encoding="utf-8") as file:
            header, *rows = map(json.loads, file)
        run = train.TrainConfig(**header["settings"])
        torch.manual_seed(run.seed)
        weights = GPT(run).state_dict()
        for name in ("transformer.wte.weight", "lm_head.weight"):
            weights[name] = weights[name][:run.vocab_size].clone()  # without our padding
        data = datasets.Dataset.open(os.path.join("data", dataset))
        micros = run.gradient_accumulation_steps
        starts = [data.spans(run.block_size, run.batch_size, run.seed, step, micro, micros)[:, 0]
                  for step in range(settings.steps + 1) for micro in range(micros)]

        os.makedirs(os.path.join(folder, "data"))
        for path in [os.path.join(settings.peer, name) for name in os.listdir(settings.peer) if name.endswith(".py")]:
            os.symlink(os.path.abspath(path), os.path.join(folder, os.path.basename(path)))
        os.symlink(os.path.abspath(data.folder), os.path.join(folder, "data", "parity"))
        theirs = [*argv, f"--max_iters={settings.steps - 1}",  # (nanoGPT counts from 0 and includes the last)
                  "--eval_iters=1", "--eval_interval=1000000000", "--dataset=parity", "--out_dir=theirs"]
        process = multiprocessing.get_context("spawn").Process(
            target=run_peer, args=(folder, theirs, weights, starts, run.vocab_size))
        process.start()
        process.join()
        if process.exitcode:
            raise UserError(f"the training of {settings.peer} failed with exit code {process.exitcode}, see above",
                            "use nanoGPT as it is on GitHub")
        with open(os.path.join(folder, "peer.json"), encoding="utf-8") as file:
            found = json.load(file)
    losses = [sum(found["losses"][i:i + micros]) / micros for i in range(0, len(found["losses"]), micros)]
    if not len(rows) == len(losses) == len(found["norms"]) == settings.steps:
        raise UserError(f"{len(rows)}, {len(losses)} and {len(found['norms'])} updates instead of {settings.steps}",
                        "use nanoGPT as it is on GitHub")
    loss = max(abs(row["loss"] - other) for row, other in zip(rows, losses))
    norm = max(abs(row["grad_norm"] - other) for row, other in zip(rows, found["norms"]))
    clipped = sum(row["grad_norm"] > run.grad_clip for row in rows)
    print(f"parity: {settings.steps} updates, {clipped} of them clipped, loss {losses[0]:.4f} -> {losses[-1]:.4f}: "
          f"largest difference of a loss {loss:.1e}, of a gradient norm {norm:.1e} (tolerance {TOLERANCE:.0e})")
    return 0 if max(loss, norm) <= TOLERANCE else 1


def run_peer(folder, argv, weights, starts, vocab_size):
    """In a process of its own: run the peer's train.py with our weights and batches; its numbers go to peer.json."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.modules.pop("model", None)  # there is one of ours, too
    import model as peer
    started, losses, norms, plan = [], [], [], iter(starts)
    init, forward, clip = peer.GPT.__init__, peer.GPT.forward, torch.nn.utils.clip_grad_norm_

    def start_from_ours(self, config):
        config.vocab_size = vocab_size
        init(self, config)
        lacks = [name for name in self.load_state_dict(weights, strict=False).missing_keys if "weight" in name]
        if lacks:
            sys.exit(f"the peer's model has {lacks[0]}, ours has not")
        started.append(self)

    def note_loss(self, idx, targets=None):
        result = forward(self, idx, targets)
        if self.training:
            losses.append(result[1].item())
        return result

    def note_norm(*args, **kw):
        norms.append(clip(*args, **kw))
        return norms[-1]

    def planned(high, size):  # in evaluation, which draws from the same numbers, any batch will do
        return torch.from_numpy(next(plan)) if started[-1].training else torch.zeros(size, dtype=torch.int64)

    peer.GPT.__init__, peer.GPT.forward = start_from_ours, note_loss
    torch.nn.utils.clip_grad_norm_, torch.randint = note_norm, planned
    sys.argv = ["train.py", *argv]
    with open(os.devnull, "w", encoding="utf-8") as quiet:
        sys.stdout = quiet
        runpy.run_path("train.py")
    sys.stdout = sys.__stdout__
    with open("peer.json", "w", encoding="utf-8") as file:
        json.dump(dict(losses=losses, norms=[float(norm) for norm in norms]), file)


# ---------------------------------------------------------------------------------------------------------------------
# Doctor


def doctor(settings, _):
    """The state of this machine and of the code on it, as a checklist. Returns 1 where a check fails."""
    started, failed = time.perf_counter(), []

    def check(name, good, found):
        """One line; good: True, False, or None for what is not a fault."""
        print(f"[{'ok' if good else '--' if good is None else 'FAIL'}]".ljust(7) + f"{name:20} {found}", flush=True)
        if good is False:
            failed.append(name)

    device = machine.choose_device(settings.device)
    machine.set_up(device)
    dtype, why = machine.choose_dtype("auto", device)
    has = machine.versions(device)
    recent = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
    check("versions", sys.version_info >= (3, 11) and recent, ", ".join(
        f"{name} {has[name]}" for name in ("commit", "python", "torch", "numpy", "system")))
    check("device", True, f"{device} ({has['processor']}, {has['cpu_capability']}, {has['threads']} threads)")
    check("dtype", True, f"{dtype}: {why}; {machine.measure_peak(device, dtype) / 1e9:,.0f} GFLOP/s, in float32 "
          f"{machine.measure_peak(device, torch.float32) / 1e9:,.0f}")
    check("memory", machine.free_memory(device) > 2e9, f"{machine.free_memory(device) / 1e6:,.0f} MB free")
    check("compile", *compile_probe(device))
    for family, shape in (("gpt2", dict(bias=True)), ("modern", PRESETS["modern"])):
        torch.manual_seed(0)
        config = GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=128, **shape)
        model = GPT(config).to(device)
        idx = torch.randint(128, (4, 33), device=device)
        idx, targets = idx[:, :-1], idx[:, 1:]
        with machine.autocast(device, dtype):
            loss = model(idx, targets)
        loss.backward()
        check(f"{family}: start", abs(loss.item() - math.log(128)) < 0.1, f"loss {loss.item():.3f}, ln(vocabulary) is "
              f"{math.log(128):.3f}")
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        check(f"{family}: gradients", not without, f"every parameter has one but {without}" if without else
              f"every one of {len(list(model.parameters()))} parameters has one")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            with machine.autocast(device, dtype):
                loss = model(idx, targets)
            loss.backward()
            optimizer.step()
        check(f"{family}: learns", loss.item() < 0.5, f"one batch, 60 updates: loss {loss.item():.3f}")
        with torch.no_grad():
            changed, leak = idx.clone(), 0.0
            changed[:, 20:] = (idx[:, 20:] + 1) % 128
            for training in (True, False):  # attention by its formula, and by PyTorch's own function
                whole = model.train(training)(idx)
                leak = max(leak, (whole - model(changed))[:, :20].abs().max().item())
            check(f"{family}: no leak", leak == 0, f"later tokens move earlier scores by {leak:.0e}")
            cache = KVCache(model.config, 4, device=device)
            parts = torch.cat([model(part, cache=cache) for part in idx.split((7, 1, 1, 23), dim=1)], dim=1)
            off = (whole - parts).abs().max().item() / whole.abs().max().item()
            check(f"{family}: cache", off < 1e-4, f"scores with and without differ by {off:.0e} of the largest")
    dataset = settings.dataset or "stdlib"
    if os.path.exists(os.path.join("data", dataset)) or settings.dataset:
        leaked = datasets.Dataset.open(os.path.join("data", dataset)).meta["leaked"]
        check("validation text", leaked < 0.5, f"{leaked:.1%} of the validation split of data/{dataset} is "
              "repeated from its training split (below 50% is well)")
    else:
        check("validation text", None, f"data/{dataset} is not there: python prepare.py {dataset}")
    print(f"{len(failed)} failed{': ' + ', '.join(failed) if failed else ''} ({time.perf_counter() - started:.0f} s)")
    return 1 if failed else 0


def compile_probe(device):
    """(True or None, what happened): does torch.compile work here, forward and backward?"""
    started = time.perf_counter()
    try:
        x = torch.randn(64, 64, device=device, requires_grad=True)
        torch.compile(lambda x: F.gelu(x @ x).sum(), dynamic=False)(x).backward()
        return True, f"works, {time.perf_counter() - started:.0f} s for a small function"
    except Exception as error:
        return None, f"not here, training does without: {str(error).strip().splitlines()[0][:120]}"


def check_peer(peer, *names):
    for name in names:
        if not peer or not os.path.isfile(os.path.join(peer, name)):
            raise UserError(f"--peer={peer!r} is not a folder of nanoGPT: it has no {name}",
                            "git clone https://github.com/karpathy/nanoGPT, and --peer=nanoGPT")


BENCHES = {bench.__name__: bench for bench in (
    parity, doctor, serve, generate, loss, throughput, ablation, scaling)}


def main(argv):
    settings, _, bare = load(BenchConfig, argv)
    if not bare or bare[0] not in BENCHES:
        raise UserError(f"there is no bench {bare[0]!r}" if bare else "no bench was named",
                        "python -m bench NAME, one of: " + ", ".join(BENCHES))
    return BENCHES[bare[0]](settings, bare[1:])


if __name__ == "__main__":
    command_line(main)
