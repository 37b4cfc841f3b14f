# SPDX-License-Identifier: GPL-3.0-only
"""
How fast is a text written, by us and by others, and where does the time go?

    python -m bench generate --peer=../nanoGPT --prompt=8 --new_tokens=504
    python -m bench generate out/mine           # a RUN with GPT-2's layout, in place of openllm-small

All contestants have the same weights (random ones, unless a RUN is given: what a text says does not change how long it
takes) and the same task: to read `prompt` tokens and write `new_tokens` more, sampled from the 40 most likely at
temperature 0.8. They take turns; a peer that is not installed is left out. At the end, a profile of ours.
"""
import contextlib
import copy
import itertools
import os
import runpy
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure import copy_peer, peer_weights, ratio, spread, start_from, table, take_turns
from bench.serve import load_model
from formats import huggingface
from formats.quantized import quantize
from model import GPT, GPTConfig
from runtime import machine
from runtime.console import UserError, note
from sample import Sampler, Sampling
from serving.engine import Engine, Request
from training import checkpoint as ckpt

CHOICE = dict(temperature=0.8, top_k=40)
MANY = 8  # requests at once
PAIRS = [  # whose ratios are printed
    ("int8", "transformers, float32"), ("int8", "nanoGPT, float32"), ("float32", "transformers, float32"),
    ("int8", "llama.cpp, Q8_0"), ("int8", "float32"), (f"int8, {MANY} at once", "int8, 1 at once"),
    (f"float32, {MANY} at once", "float32, 1 at once")]
KINDS = {  # operations of PyTorch by what they are for; the rest is norms, roundings and other small things
    "matrices": ("fbgemm", "_linear_pointwise", "addmm", "aten::mm", "aten::linear", "aten::bmm"),
    "attention": ("scaled_dot_product",),
    "choosing a token": ("aten::topk", "aten::argmax", "aten::cumsum", "aten::_softmax", "aten::searchsorted")}


@dataclass
class Settings:
    peer: str = ""  # folder of nanoGPT
    prompt: int = 32  # tokens of the prompt
    new_tokens: int = 64  # tokens of the answer
    repeats: int = 3  # rounds
    tiny: bool = False  # a model of no size, without llama.cpp; only to see that it runs


def main(settings, runs):
    model, tokenizer, checkpoint = load_model(runs[0] if runs else "", "cpu")
    ckpt.check_whole(checkpoint)
    if settings.tiny:
        model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=512)).eval()
    c = model.config
    if (c.pos, c.norm, c.mlp) != ("learned", "layernorm", "gelu"):
        raise UserError("this bench compares with other programs, which have GPT-2's layout only", "leave the RUN out")
    if settings.prompt + 2 > c.block_size:
        raise UserError(f"prompt={settings.prompt} leaves no room in a context of {c.block_size}", "--prompt=8")
    prompt = [i * 1009 % c.vocab_size for i in range(settings.prompt)]
    new = min(settings.new_tokens, c.block_size - len(prompt))

    # 1. Everybody, as {name: function that writes once}.
    writers = ours(model, tokenizer, prompt, new)
    mine = list(writers)
    with tempfile.TemporaryDirectory() as folder:
        writers["transformers, float32"] = transformers(model, prompt, new)
        writers["llama.cpp, Q8_0"] = None if settings.tiny else llama_cpp(model, prompt, new, folder)
        writers = {name: write for name, write in writers.items() if write}
        for write in writers.values():
            write()  # the first time, kernels are chosen
        if write := nanogpt(model, prompt, new, settings.peer, folder):  # the first time would take a minute
            writers["nanoGPT, float32"] = write
        seconds = take_turns({name: lambda _, write=write: seconds_of(write) for name, write in writers.items()},
                             settings.repeats)

    # 2. Their rates and the ratios.
    texts = {name: MANY if name.endswith(f"{MANY} at once") else 1 for name in writers}
    rates = {name: [texts[name] * new / took for took in seconds[name]] for name in writers}
    print(f"{c.n_layer} layers, n_embd {c.n_embd}, vocabulary {c.vocab_size:,}; {len(prompt)} tokens, then {new} more; "
          f"{settings.repeats} rounds: median (lowest to highest); {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}")
    table("| | tokens/s | seconds |",
          [[name, spread(rates[name], 0), f"{statistics.median(seconds[name]):.2f}"] for name in writers])
    print()
    table("| | times as fast as | |", [[a, b, ratio(rates[a], rates[b])] for a, b in PAIRS if {a, b} <= set(rates)])

    # 3. A profile.
    print("\nwhere the time of a token goes (the profiler adds some):")
    for name in mine:
        if "at once" not in name or name == f"int8, {MANY} at once":
            print(f"{name}: {time_shares(writers[name], new)}")


def seconds_of(write):
    started = time.perf_counter()
    write()
    return time.perf_counter() - started


def ours(model, tokenizer, prompt, new):
    """GPT.generate in every dtype, and the engine with one request and with several."""
    int8 = quantize(copy.deepcopy(model))
    models = {"float32": machine.use_linear(copy.deepcopy(model), torch.float32), "int8": int8}
    if machine.has_bf16("cpu"):
        models["bfloat16"] = machine.use_linear(copy.deepcopy(model), torch.bfloat16)
    engines = {"int8": Engine(int8, tokenizer, rows=MANY),
               "float32": Engine(copy.deepcopy(model), tokenizer, rows=MANY)}

    def alone(model):
        list(model.generate(torch.tensor([prompt]), new, Sampler(Sampling(**CHOICE), prompt, 0)))

    def in_engine(engine, n):
        for slot in engine.slots:
            slot.cached = []  # or it would not read what it has read before
        engine.complete([Request(ids=prompt[i:] + prompt[:i], max_tokens=new, seed=i, ignore_eos=True, **CHOICE)
                         for i in range(n)])

    writers = {dtype: lambda model=model: alone(model) for dtype, model in models.items()}
    for dtype, engine in engines.items():
        for n in (1, MANY):
            writers[f"{dtype}, {n} at once"] = lambda engine=engine, n=n: in_engine(engine, n)
    return writers


def transformers(model, prompt, new):
    """generate() of Hugging Face's transformers, in float32. None where it is not installed."""
    if not find_spec("transformers"):
        return note("transformers is not installed and left out: pip install transformers")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import GPT2Config, GPT2LMHeadModel
    facts = huggingface.their_config(model.config, "float32", {})
    del facts["dtype"]
    theirs = GPT2LMHeadModel(GPT2Config(**facts)).eval()
    lacks = theirs.load_state_dict(huggingface.their_weights(model), strict=False).missing_keys
    assert set(lacks) <= {"lm_head.weight"}, lacks  # (which is tied)
    theirs.generation_config.eos_token_id = None  # nothing ends before its time
    return torch.inference_mode()(lambda: theirs.generate(
        torch.tensor([prompt]), max_new_tokens=new, do_sample=True, pad_token_id=0, **CHOICE))


def nanogpt(model, prompt, new, peer, folder):
    """generate() of nanoGPT. It has no cache of keys and values, so it reads the whole text again for every token."""
    try:
        copy_peer(peer, folder)
    except UserError as error:
        return note(f"nanoGPT is left out: {error.fact}")
    sys.path.insert(0, folder)
    theirs, c = runpy.run_path(os.path.join(folder, "model.py")), model.config
    sys.path.remove(folder)
    with contextlib.redirect_stdout(None):
        gpt = theirs["GPT"](theirs["GPTConfig"](
            block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
            bias=c.bias))
    start_from(gpt, peer_weights(model))
    return torch.inference_mode()(lambda: gpt.generate(torch.tensor([prompt]), new, **CHOICE))


def llama_cpp(model, prompt, new, folder):
    """llama.cpp, with its own 8 bits (Q8_0: a scale for every 32 weights)."""
    if not find_spec("llama_cpp") or not find_spec("gguf"):
        return note("llama.cpp is not installed and left out: pip install llama-cpp-python gguf (it takes 10 minutes)")
    from llama_cpp import Llama
    path, threads = os.path.join(folder, "model.gguf"), torch.get_num_threads()
    write_gguf(model, path)
    llama = Llama(path, n_ctx=model.config.block_size, n_threads=threads, n_threads_batch=threads, verbose=False)

    def write():
        tokens = llama.generate(prompt, temp=0.8, top_k=40, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
        list(itertools.islice(tokens, new))
    return write


def write_gguf(model, path):
    """The model in llama.cpp's file format, its matrices in Q8_0; its tokens are named t0, t1, ..."""
    import gguf
    c, kind = model.config, gguf.GGMLQuantizationType.Q8_0
    file = gguf.GGUFWriter(path, "gpt2")
    file.add_context_length(c.block_size)
    file.add_embedding_length(c.n_embd)
    file.add_feed_forward_length(c.n_inner)
    file.add_block_count(c.n_layer)
    file.add_head_count(c.n_head)
    file.add_layer_norm_eps(c.norm_eps)
    file.add_tokenizer_model("gpt2")
    file.add_token_merges(["t 1"])
    file.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, c.n_layer)
    for name, tensor in peer_weights(model).items():
        if name == "lm_head.weight" and c.tie_weights:
            continue
        theirs, array = names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy()
        if tensor.dim() == 2 and "wpe" not in name:
            file.add_tensor(theirs, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            file.add_tensor(theirs, array)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def time_shares(write, new):
    """Where the time of write() goes, in words."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        seconds = seconds_of(write)
    spent = dict.fromkeys([*KINDS, "small operations"], 0.0)
    for event in found.key_averages():
        kinds = [kind for kind, names in KINDS.items() if any(name in event.key for name in names)]
        spent[(kinds or ["small operations"])[0]] += event.self_cpu_time_total / 1e6
    spent["Python"] = max(0.0, seconds - sum(spent.values()))
    shares = ", ".join(f"{kind} {part / seconds:.0%}" for kind, part in spent.items())
    return f"{1000 * seconds / new:.2f} ms: {shares}"
