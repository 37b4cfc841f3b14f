# SPDX-License-Identifier: GPL-3.0-only
"""
How fast does openllm-small write a text, here and in other programs?

    python -m bench generate --peer=../nanoGPT --prompt=8 --new_tokens=504

All have the same random weights: the content of a text does not change the time. transformers is included if installed,
nanoGPT with --peer.
"""
import contextlib
import copy
import os
import runpy
import statistics
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from timeit import timeit

import torch

from bench.measure import copy_peer, ratio, spread, start_from, table, take_turns
from bench.serve import load_model
from formats import huggingface
from formats.quantized import quantize
from model import GPT, GPTConfig
from runtime import machine
from runtime.console import UserError, note
from sample import Sampler, Sampling

CHOICE = dict(temperature=0.8, top_k=40)


@dataclass
class Settings:
    peer: str = ""  # folder of nanoGPT
    prompt: int = 32  # tokens to read
    new_tokens: int = 64  # tokens to write, with top_k 40 and temperature 0.8
    repeats: int = 3  # rounds
    tiny: bool = False  # a tiny model, to see that it runs


@torch.inference_mode()
def main(settings, _):
    model, _, _ = load_model("", "cpu")
    if settings.tiny:
        model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=512, vocab_size=512)).eval()
    c, new = model.config, settings.new_tokens
    if settings.prompt + new > c.block_size:
        raise UserError(f"prompt={settings.prompt} and new_tokens={new} exceed the context of {c.block_size}",
                        "a smaller --new_tokens")
    prompt = [i * 1009 % c.vocab_size for i in range(settings.prompt)]

    # 1. The contestants: {name: function that writes once}.
    writers = {"int8": ours(quantize(copy.deepcopy(model)), prompt, new),
               "float32": ours(machine.use_linear(copy.deepcopy(model), torch.float32), prompt, new)}
    if find_spec("transformers"):
        writers["transformers, float32"] = transformers(model, prompt, new)
    else:
        note("transformers is left out: pip install transformers")
    for write in writers.values():
        write()  # the first time, kernels are chosen
    if settings.peer:
        writers["nanoGPT, float32"] = nanogpt(model, prompt, new, settings.peer)
    else:
        note("nanoGPT is left out: --peer=FOLDER")
    seconds = take_turns({name: lambda _, write=write: timeit(write, number=1) for name, write in writers.items()},
                         settings.repeats)

    # 2. Their rates
    print(f"{len(prompt)} tokens, then {new} more; {torch.get_num_threads()} threads; {settings.repeats} rounds: "
          "median (lowest to highest)")
    table("| | tokens/s | seconds | int8: times as fast |",
          [[name, spread([new / one for one in took], 0), f"{statistics.median(took):.2f}",
            ratio(took, seconds["int8"])] for name, took in seconds.items()])


def ours(model, prompt, new):
    """GPT.generate."""
    return lambda: list(model.generate(torch.tensor([prompt]), new, Sampler(Sampling(**CHOICE), prompt, 0)))


def transformers(model, prompt, new):
    """generate() of transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel  # optional
    facts = huggingface.their_config(model.config, "float32", {})
    del facts["dtype"]
    theirs = GPT2LMHeadModel(GPT2Config(**facts)).eval()
    theirs.load_state_dict(huggingface.their_weights(model), strict=False)  # a tied head is not among them
    theirs.generation_config.eos_token_id = None  # nothing ends before its time
    return lambda: theirs.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=True, pad_token_id=0, **CHOICE)


def nanogpt(model, prompt, new, peer):
    """generate() of nanoGPT, which has no cache: it reads the whole text again for every token."""
    with tempfile.TemporaryDirectory() as folder:
        copy_peer(peer, folder)
        sys.path.insert(0, folder)
        theirs = runpy.run_path(os.path.join(folder, "model.py"))
        sys.path.remove(folder)
    c = model.config
    with contextlib.redirect_stdout(None):
        gpt = theirs["GPT"](theirs["GPTConfig"](c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, bias=c.bias))
    start_from(gpt, model)
    return lambda: gpt.generate(torch.tensor([prompt]), new, **CHOICE)
