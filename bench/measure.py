# SPDX-License-Identifier: GPL-3.0-only
"""
What the benches share.

    found = take_turns({"nanoGPT": run_theirs, "ours": run_ours}, repeats=3)    # {name: [result of each round]}
    table("| tokens/s | times as fast |", [[spread(found["ours"]), ratio(found["ours"], found["nanoGPT"])]])

A machine that is slow for a minute has to be slow for all contestants alike. So they take turns, and what counts is
the spread of the ratios within a round.
"""
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import dataset as datasets
from runtime.console import UserError, say
from training.log import read_rows

ROOT = Path(__file__).resolve().parent.parent
TINY = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2".split()  # to see that a bench runs


def measure(command, folder="."):
    """Run a Python program in `folder`. Returns (seconds, bytes of memory at its peak, what it printed)."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        _, process.returncode, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        output.seek(0)
        printed = output.read()
    if process.returncode:
        say(printed[-2000:])
        raise UserError(f"{os.path.basename(command[0])} failed", "see its output above")
    return seconds, usage.ru_maxrss * 1024, printed


def train_ours(argv, folder, out):
    """Run our train.py in `folder`. Returns what measure does, and the rows of its log."""
    measured = measure([ROOT / "train.py", *argv, "--device=cpu", f"--out_dir={out}"], folder)
    return *measured, list(read_rows(os.path.join(folder, out, "log.jsonl")))


def take_turns(contestants, repeats):
    """Run all once a round: {name: function of the number of the round} -> {name: [its results]}."""
    found = {name: [] for name in contestants}
    for i in range(repeats):
        for name, run in contestants.items():
            found[name].append(run(i))
        say(f"round {i + 1} of {repeats}")
    return found


def spread(values, digits=2):
    """The median, and in parentheses the lowest and the highest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def ratio(above, below):
    """The spread of the quotients of two contestants, round by round."""
    return spread([a / b for a, b in zip(above, below)])


def table(header, rows):
    """Print a Markdown table. header: "| a | b |"."""
    print(header + "\n|" + "---|" * (header.count("|") - 1))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def copy_peer(peer, folder):
    """Copy the programs of nanoGPT into `folder`; of plain.py, a train.py and a model.py that import it."""
    os.makedirs(folder, exist_ok=True)
    if peer.endswith("plain.py"):
        shutil.copy(peer, folder)
        Path(folder, "train.py").write_text("import plain; model = plain.main()\n", encoding="utf-8")
        Path(folder, "model.py").write_text("from plain import *\n", encoding="utf-8")
        return
    files = list(Path(peer).glob("*.py"))
    names = {file.name for file in files}
    if "train.py" not in names or "tokenizer.py" in names:  # a clone of this project has both
        raise UserError(f"--peer={peer!r} is not a nanoGPT folder",
                        "git clone https://github.com/karpathy/nanoGPT, and --peer=nanoGPT")
    for file in files:
        shutil.copy(file, folder)


def prepare_for_both(peer, source, folder, vocab_size=0):
    """Copy nanoGPT to `folder`/peer, and prepare a text by characters as `folder`/data/chars, for both programs.

    vocab_size: of nanoGPT's model, if not that of the text. Returns (nanoGPT's folder, Dataset).
    """
    theirs, path = os.path.join(folder, "peer"), os.path.join(folder, "data", "chars")
    copy_peer(peer, theirs)
    if os.path.exists(source):  # else it is the name of a download
        source = os.path.abspath(source)
    measure([ROOT / "prepare.py", source, f"--out={path}", "--tokenizer=char", "--val_fraction=0.1"], folder)
    data = datasets.Dataset.open(path)
    vocab_size = vocab_size or data.meta["vocab_size"]
    with open(os.path.join(path, "meta.pkl"), "wb") as file:
        pickle.dump(dict(vocab_size=vocab_size, itos={i: chr(i + 32) for i in range(vocab_size)}), file)
    os.symlink(os.path.join(folder, "data"), os.path.join(theirs, "data"))
    return theirs, data


@torch.no_grad()
def start_from(theirs, ours):
    """Give the weights of our GPT, without the padding of its vocabulary, to nanoGPT's model or that of plain.py."""
    weights = ours.state_dict()
    tensors = theirs.weights if hasattr(theirs, "weights") else dict(theirs.named_parameters())
    for name, tensor in tensors.items():
        tensor.copy_(weights[name][:len(tensor)])
