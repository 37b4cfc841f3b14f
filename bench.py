# SPDX-License-Identifier: GPL-3.0-only
"""
Measurements: every number in the README that is not a line of a training log comes from here.

    python bench.py syntax out/small    # how many of the functions that the model writes are Python?

Each prints what it measured on standard output, and on which machine.
"""
import ast
import platform
from dataclasses import dataclass
from typing import Literal

import torch

import machine
import runtime
import sample
import tokenizer as tokenizers
from config import UserError, check_limits, command_line, load, say


@dataclass
class BenchConfig:
    samples: int = 200  # functions to sample
    max_new_tokens: int = 200  # longest function, in tokens
    temperature: float = 0.8  # as in sample.py
    top_k: int = 50  # as in sample.py
    seed: int = 1337  # of the samples
    checkpoint: Literal["best", "last"] = "best"  # of a run folder
    device: str = "auto"  # cpu, cuda, cuda:1, mps


def syntax(settings, runs):
    """Share of sampled functions that Python can parse.

    The model continues "def" (without a space: in its vocabulary a space belongs to the word after it). A function
    ends where the next line begins at the left margin; one that does not end within max_new_tokens is left out of the
    count, and their number is printed.
    """
    check_limits(settings, {"samples max_new_tokens": (1, 1e6), "temperature": (0, 1e9)})
    device = machine.choose_device(settings.device)
    model, tokenizer, run = runtime.load_run(runs[0] if runs else runtime.find_run(), settings.checkpoint, device)
    end, prompt = tokenizer.special[tokenizers.END_OF_TEXT], "\n\n\ndef"
    idx = torch.tensor([tokenizer.encode(prompt)] * settings.samples, device=device)  # (samples, T)
    generator = torch.Generator().manual_seed(settings.seed)

    def pick(logits):
        logits = sample.filter_logits(logits.cpu(), settings.temperature, settings.top_k)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]

    rows = torch.cat(list(model.generate(idx, settings.max_new_tokens, pick)), dim=1).tolist()
    whole, good, example = 0, 0, ""
    for row in rows:
        ends = end in row
        text = "def" + tokenizer.decode(row[:row.index(end)] if ends else row)
        function = first_block(text, ends)
        if function is None:
            continue
        whole += 1
        if parses(function):
            good += 1
            example = function if 120 < len(function) < 600 and len(function) > len(example) else example
    if example:
        say(f"one of those that parse:\n\n{example}")
    share = f"{good} of {whole} finished functions parse ({good / whole:.0%})" if whole else "no function was finished"
    print(f"syntax: {run['path']}: {share}, Python {platform.python_version()}; {len(rows) - whole} of {len(rows)} "
          f"were not finished after {settings.max_new_tokens} tokens")


def first_block(text, ends):
    """The first top-level statement of a text with all its indented lines; None where the text stops before it ends."""
    lines = text.split("\n")
    for i, line in enumerate(lines[1:], 1):
        if line[:1].strip() and line[0] not in "#)]}":
            return "\n".join(lines[:i]).rstrip() + "\n"
    return text if ends else None


def parses(source):
    try:
        ast.parse(source)
        return True
    except (SyntaxError, ValueError):  # ValueError: a NUL byte
        return False


BENCHES = {"syntax": syntax}


def main(argv):
    settings, _, bare = load(BenchConfig, argv)
    if not bare or bare[0] not in BENCHES:
        raise UserError(f"there is no bench {bare[0]!r}" if bare else "no bench was named",
                        "python bench.py NAME, one of: " + ", ".join(BENCHES))
    BENCHES[bare[0]](settings, bare[1:])


if __name__ == "__main__":
    command_line(main)
