# SPDX-License-Identifier: GPL-3.0-only
"""
How fast is a text written? Called as `python -m bench generate [RUN] [--peer=../nanoGPT]`.

Everyone has the same weights (openllm-small with random ones, unless a RUN of the GPT-2 family is given: what a text
says does not change how long it takes) and the same task: `prompt` tokens, then `new_tokens` more, drawn from the 40
likeliest at temperature 0.8. They take turns, so that a machine that is slow for a minute is slow for all; what counts
are the ratios of a round, and their spread. A peer that is not installed is left out. At last a profile of each of
ours: where does the time of a token go?
"""
import contextlib
import copy
import os
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec

import torch
from torch.profiler import ProfilerActivity, profile

from formats import huggingface
from runtime import machine
from training import checkpoint as ckpt
from bench.serve import load_model
from bench.learning import spread
from runtime.console import UserError, note, say
from runtime.settings import check_limits
from serving.engine import Engine, Request
from model import GPT, GPTConfig, quantize
from sample import Sampler, Sampling

CHOICE = dict(temperature=0.8, top_k=40)
MANY = 8  # requests at once
KINDS = {  # operations of PyTorch by what they are for; the rest is norms, roundings and other small things
    "matrices": ("fbgemm", "_linear_pointwise", "addmm", "aten::mm", "aten::linear", "aten::bmm"),
    "attention": ("scaled_dot_product",),
    "choosing a token": ("aten::topk", "aten::argmax", "aten::cumsum", "aten::_softmax", "aten::searchsorted")}


def ours(model, prompt, new):
    """Seconds that GPT.generate takes."""
    started = time.perf_counter()
    list(model.generate(torch.tensor([prompt]), new, Sampler(Sampling(**CHOICE), prompt, 0)))
    return time.perf_counter() - started


def engine_of(engine, n, prompt, new):
    """Seconds that the engine takes for n requests at once."""
    for slot in engine.slots:
        slot.cached = []  # or it would not read what it has read before
    requests = [Request(ids=prompt[i:] + prompt[:i], max_tokens=new, seed=i, ignore_eos=True, **CHOICE)
                for i in range(n)]
    started = time.perf_counter()
    engine.complete(requests)
    return time.perf_counter() - started


def transformers(model, prompt, new):
    """generate() of Hugging Face's transformers, in float32, with the same weights. None where it is not installed."""
    if not find_spec("transformers"):
        return note("transformers is not installed and left out: pip install transformers")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import GPT2Config, GPT2LMHeadModel
    facts = huggingface.their_config(model.config, "float32", {})
    theirs = GPT2LMHeadModel(GPT2Config(**{name: value for name, value in facts.items() if name != "dtype"})).eval()
    lacks = theirs.load_state_dict(huggingface.their_weights(model), strict=False).missing_keys
    assert all(name == "lm_head.weight" for name in lacks), lacks  # (which is tied)
    theirs.generation_config.eos_token_id = None  # nothing ends before its time

    @torch.inference_mode()
    def run():
        started = time.perf_counter()
        theirs.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=True, pad_token_id=0, **CHOICE)
        return time.perf_counter() - started
    return run


def nanogpt(model, prompt, new, peer):
    """generate() of nanoGPT. It has no cache of keys and values, so it reads the whole text again for every token."""
    if not os.path.isfile(os.path.join(peer, "model.py")):
        return note(f"--peer={peer!r} is no folder of nanoGPT, which is left out")
    sys.path.insert(0, os.path.abspath(peer))
    mine = sys.modules.pop("model")
    import model as theirs
    sys.path.pop(0)
    sys.modules["model"], c = mine, model.config
    with contextlib.redirect_stdout(None):
        gpt = theirs.GPT(theirs.GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, 0.0, c.bias))
    weights = {name: tensor[:c.vocab_size] if "wte" in name or "lm_head" in name else tensor
               for name, tensor in model.state_dict().items()}
    gpt.load_state_dict(weights, strict=False)

    @torch.inference_mode()
    def run():
        started = time.perf_counter()
        gpt.eval().generate(torch.tensor([prompt]), new, **CHOICE)
        return time.perf_counter() - started
    return run


def llama_cpp(model, prompt, new, folder):
    """llama.cpp, with the same weights in its own 8 bits (Q8_0: a scale for every 32 of them)."""
    if not find_spec("llama_cpp") or not find_spec("gguf"):
        return note("llama.cpp is not installed and left out: pip install llama-cpp-python gguf (it takes 10 minutes)")
    import gguf
    from llama_cpp import Llama
    c, path, kind = model.config, os.path.join(folder, "model.gguf"), gguf.GGMLQuantizationType.Q8_0
    file = gguf.GGUFWriter(path, "gpt2")
    for add, value in ((file.add_context_length, c.block_size), (file.add_embedding_length, c.n_embd),
                       (file.add_feed_forward_length, c.n_inner), (file.add_block_count, c.n_layer),
                       (file.add_head_count, c.n_head), (file.add_layer_norm_eps, c.norm_eps),
                       (file.add_tokenizer_model, "gpt2"), (file.add_token_merges, ["t 1"]),
                       (file.add_token_list, [f"t{i}" for i in range(c.vocab_size)])):
        add(value)
    names = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"}
    for i in range(c.n_layer):
        for ours, theirs in (("ln_1", "attn_norm"), ("attn.c_attn", "attn_qkv"), ("attn.c_proj", "attn_output"),
                             ("ln_2", "ffn_norm"), ("mlp.c_fc", "ffn_up"), ("mlp.c_proj", "ffn_down")):
            names[f"transformer.h.{i}.{ours}"] = f"blk.{i}.{theirs}"
    for ours, theirs in names.items():
        layer = model.get_submodule(ours)
        for part, tensor in layer.named_parameters():
            array = tensor.detach()[:c.vocab_size if "wte" in ours else None].numpy()
            if part == "weight" and array.ndim == 2 and "wpe" not in ours:
                file.add_tensor(f"{theirs}.{part}", gguf.quants.quantize(array, kind), raw_dtype=kind)
            else:
                file.add_tensor(f"{theirs}.{part}", array)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    threads = torch.get_num_threads()
    llama = Llama(path, n_ctx=c.block_size, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run():
        started = time.perf_counter()
        for _ in zip(range(new), llama.generate(prompt, temp=0.8, top_k=40, top_p=1.0, min_p=0.0, repeat_penalty=1.0)):
            pass
        return time.perf_counter() - started
    return run


def where(run, new):
    """Where the time of run() goes: shares of it in words."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        seconds = run()
    spent = dict.fromkeys([*KINDS, "small operations"], 0.0)
    for event in found.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)),
                    "small operations")
        spent[kind] += event.self_cpu_time_total / 1e6
    spent["Python"] = max(0.0, seconds - sum(spent.values()))
    return f"{1000 * seconds / new:.2f} ms: " + ", ".join(f"{kind} {s / seconds:.0%}" for kind, s in spent.items())


def generate(settings, runs):
    check_limits(settings, {"repeats prompt": (1, 1e6), "new_tokens": (2, 1e6)})
    model, tokenizer, run = load_model(runs[0] if runs else "", "cpu")
    ckpt.check_whole(run)
    if settings.tiny:
        model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=512)).eval()
    c, new = model.config, settings.new_tokens
    if (c.pos, c.norm, c.mlp) != ("learned", "layernorm", "gelu"):
        raise UserError("this bench compares with other programs, which have GPT-2's layout only", "leave the RUN out")
    if settings.prompt + 2 > c.block_size:
        raise UserError(f"prompt={settings.prompt} leaves no room in a context of {c.block_size}", "--prompt=8")
    prompt = [i * 1009 % c.vocab_size for i in range(settings.prompt)]
    new = min(new, c.block_size - len(prompt))
    fast = machine.use_linear(copy.deepcopy(model), torch.float32)
    half = machine.use_linear(copy.deepcopy(model), torch.bfloat16)
    int8 = quantize(copy.deepcopy(model))
    engines = {"int8": Engine(int8, tokenizer, rows=MANY),
               "float32": Engine(copy.deepcopy(model), tokenizer, rows=MANY)}
    mine = {"float32": lambda: ours(fast, prompt, new), "int8": lambda: ours(int8, prompt, new)}
    if machine.has_bf16("cpu"):
        mine["bfloat16"] = lambda: ours(half, prompt, new)
    racers = mine | {f"{kind}, {n} at once": lambda kind=kind, n=n: engine_of(engines[kind], n, prompt, new)
                     for kind in engines for n in (1, MANY)}
    racers |= {"transformers, float32": transformers(model, prompt, new),
               "nanoGPT, float32": nanogpt(model, prompt, new, settings.peer)}
    folder = tempfile.TemporaryDirectory()
    racers["llama.cpp, Q8_0"] = None if settings.tiny else llama_cpp(model, prompt, new, folder.name)
    racers = {name: run for name, run in racers.items() if run}
    rates = {name: [] for name in racers}
    for name, run in racers.items():
        if "nanoGPT" not in name:  # (which takes a minute)
            run()  # the first time, kernels are chosen
    for i in range(settings.repeats):
        for name, run in racers.items():
            many = MANY if name.endswith(f"{MANY} at once") else 1
            rates[name].append(many * new / run())
        say(f"round {i + 1} of {settings.repeats}")

    print(f"{c.n_layer} layers, {c.n_embd} wide, vocabulary {c.vocab_size:,}; {len(prompt)} tokens, then {new} more; "
          f"{settings.repeats} rounds: median (lowest to highest); {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}")
    print("| | tokens/s | seconds |\n|---|---|---|")
    for name, values in rates.items():
        many = MANY if name.endswith(f"{MANY} at once") else 1
        print(f"| {name} | {spread(values, 0)} | {many * new / statistics.median(values):.2f} |")
    pairs = [("int8", "transformers, float32"), ("int8", "nanoGPT, float32"), ("float32", "transformers, float32"),
             ("int8", "llama.cpp, Q8_0"), ("int8", "float32"), (f"int8, {MANY} at once", "int8, 1 at once"),
             (f"float32, {MANY} at once", "float32, 1 at once")]
    print("\n| | times as fast as |  |\n|---|---|---|")
    for a, b in pairs:
        if a in rates and b in rates:
            print(f"| {a} | {b} | {spread([x / y for x, y in zip(rates[a], rates[b])])} |")
    print("\nwhere the time of a token goes (the profiler adds some):")
    for name in [*mine, f"int8, {MANY} at once"]:
        print(f"{name}: {where(racers[name], new)}")
