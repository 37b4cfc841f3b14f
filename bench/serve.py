# SPDX-License-Identifier: GPL-3.0-only
"""
How fast is the server with 1, 4 and 16 clients, beside GPT.generate, which writes one text?

    python -m bench serve --repeats=5
    python -m bench serve out/small --requests=8        # a RUN in place of openllm-small with random weights

The clients are threads of this process, the server is a process of its own on the same machine. All texts are greedy.
"""
import http.client
import json
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch

from bench.measure import ratio, spread, table, take_turns
from model import GPT, GPTConfig, PRESETS
from runtime import machine
from runtime.console import UserError
from serve import ServeConfig, Server
from training import checkpoint as ckpt

CLIENTS = (1, 4, 16)
PROMPT = 32  # tokens
NEW = 64  # tokens of an answer


@dataclass
class Settings:
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # of matrix products
    requests: int = 4  # of each client, one after the other
    repeats: int = 3  # rounds


def main(settings, runs):
    path = runs[0] if runs else ""
    device = machine.choose_device("auto")
    dtype, _ = machine.choose_dtype(settings.dtype, device)
    model, _, _ = load_model(path, device)

    # 1. The contestants
    def prompts(n):
        return torch.randint(model.config.vocab_size, (n * settings.requests, PROMPT)).tolist()

    def generate(_):
        started = time.perf_counter()
        with machine.autocast(device, dtype):
            for prompt in prompts(1):
                list(model.generate(torch.tensor([prompt], device=device), NEW))
        return settings.requests * NEW / (time.perf_counter() - started)

    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    arguments = queue, path, device, settings.dtype
    spawn.Process(target=run_server, args=arguments, daemon=True).start()  # it ends with this process
    port = queue.get()  # when the model is loaded
    contestants = {n: lambda _, n=n: ask(port, n, prompts(n)) for n in CLIENTS}
    generate(0)  # the first of each is slower
    ask(port, 1, prompts(1))
    found = take_turns({"generate": generate, **contestants}, settings.repeats)

    # 2. Their rates
    base = found.pop("generate")
    print(f"{path or 'openllm-small, random weights'}, {dtype}, {device}: prompts of {PROMPT} tokens, {NEW} new ones, "
          f"{settings.requests} requests per client, {settings.repeats} rounds: median (lowest to highest)\n"
          f"GPT.generate: {spread(base, 0)} tokens/s")
    rows = []
    for n, results in found.items():
        rates, firsts = zip(*results)
        p50, p99 = 1000 * np.percentile(np.concatenate(firsts), [50, 99])
        rows.append([n, spread(rates, 0), ratio(rates, base), f"{p50:.0f} ms", f"{p99:.0f} ms"])
    table("| clients | tokens/s | times GPT.generate | first token, p50 | p99 |", rows)


def load_model(path, device):
    """(model, tokenizer, checkpoint) of a RUN; by default openllm-small with random weights."""
    if path:
        return ckpt.load_run(path, device=device)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**PRESETS["openllm-small"])).to(device).eval()
    tokenizer = SimpleNamespace(kind="none", vocab_size=model.config.vocab_size, special={}, settings={}, stops=(),
                                token_bytes=lambda i: b"x")
    return model, tokenizer, {}


def run_server(queue, path, device, dtype):
    server = Server(ServeConfig(port=0, device=device, dtype=dtype), lambda: load_model(path, device))
    server.start()
    while server.state == "loading":
        time.sleep(0.05)
    queue.put(server.port)
    server.web_thread.join()


def ask(port, n, prompts):
    """n clients share the prompts, one at a time each. Returns (tokens per second, [seconds to a first token])."""
    waiting, firsts = iter(prompts), []

    def client(_):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for prompt in waiting:
            body = dict(prompt=prompt, max_tokens=NEW, ignore_eos=True, temperature=0, stream=True)
            asked = time.perf_counter()
            connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.readline()  # the first event
            firsts.append(time.perf_counter() - asked)
            text += answer.read()
            if f'"completion_tokens": {NEW}'.encode() not in text:
                raise UserError(f"the server failed: {text[:100]!r}", "see what it wrote above")
        connection.close()

    started = time.perf_counter()
    with ThreadPoolExecutor(n) as threads:
        list(threads.map(client, range(n)))
    return len(prompts) * NEW / (time.perf_counter() - started), firsts
