# SPDX-License-Identifier: GPL-3.0-only
"""
How fast is the server, and what does it add to the bare engine?

    python -m bench serve --repeats=5
    python -m bench serve out/small --requests=8        # a RUN in place of openllm-small with random weights

The clients are in this process, the server is a process of its own; both share this machine. In each round, in turn:
GPT.generate, which writes one text; the engine in a loop, with 1, 4 and 16 requests at a time; and as many clients of
the server, which ask again as soon as they have their answer, for whole answers and for streams. All are greedy, as
GPT.generate is: sampling comes on top, for all alike. Part of what a stream costs is the work of the clients.
"""
import contextlib
import http.client
import json
import multiprocessing
import random
import re
import statistics
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

import tokenizer as tokenizers
from bench.measure import ratio, spread, table, take_turns
from model import GPT, GPTConfig, PRESETS
from runtime import machine
from runtime.console import UserError
from serve import ServeConfig, Server
from serving.engine import Engine, Request
from training import checkpoint as ckpt

CLIENTS = (1, 4, 16)


@dataclass
class Settings:
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # of matrix products
    prompt: int = 32  # tokens of a prompt
    new_tokens: int = 64  # tokens of an answer
    requests: int = 4  # of each client, one after the other
    repeats: int = 3  # rounds


def load_model(path, device):
    """(model, tokenizer, checkpoint) of a RUN; by default, openllm-small with random weights, which writes nonsense."""
    if path:
        return ckpt.load_run(path, device=device)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**PRESETS["openllm-small"])).to(device).eval()
    characters = "".join(map(chr, range(32, 32 + model.config.vocab_size)))
    return model, tokenizers.CharTokenizer(characters, special=()), {"path": "openllm-small/random"}


def main(settings, runs):
    path, new = runs[0] if runs else "", settings.new_tokens
    device = machine.choose_device(settings.device)
    dtype, _ = machine.choose_dtype(settings.dtype, device)
    model, tokenizer, _ = load_model(path, device)
    engine = Engine(load_model(path, device)[0], tokenizer, dtype=dtype)
    rng = random.Random(0)

    def bodies(n, **more):
        """Requests, each with a prompt of its own."""
        prompts = [rng.choices(range(model.config.vocab_size), k=settings.prompt) for _ in range(n * settings.requests)]
        return [dict(prompt=prompt, max_tokens=new, ignore_eos=True, temperature=0, **more) for prompt in prompts]

    def generate(_):
        started = time.perf_counter()
        with machine.autocast(device, dtype):
            for body in bodies(1):
                list(model.generate(torch.tensor([body["prompt"]], device=device), new))
        return settings.requests * new / (time.perf_counter() - started)

    with serving(path, device, settings.dtype) as port:
        contestants = {"generate": generate}
        for n in CLIENTS:
            contestants["engine", n] = lambda _, n=n: run_engine(engine, n, bodies(n))
            contestants["whole", n] = lambda _, n=n: ask(port, n, bodies(n, stream=False))
            contestants["stream", n] = lambda _, n=n: ask(port, n, bodies(n, stream=True))
        for name in ("generate", ("engine", 1), ("stream", 1)):
            contestants[name](0)  # the first of each is slower
        found = take_turns(contestants, settings.repeats)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            memory = re.search(r"^openllm_resident_memory_bytes (\d+)$", answer.read().decode(), re.M)[1]

    print(f"{path or 'openllm-small, random weights'}, {dtype}, {device}: prompts of {settings.prompt} tokens, {new} "
          f"new ones, {settings.requests} requests per client, {settings.repeats} rounds; median (lowest to highest)")
    print(f"GPT.generate: {spread(found['generate'], 0)} tokens/s; the server holds {int(memory) / 1e6:,.0f} MB")
    rows = []
    one, _ = zip(*found["stream", 1])
    for n in CLIENTS:
        engine = found["engine", n]
        whole, _ = zip(*found["whole", n])
        rate, firsts = zip(*found["stream", n])
        middle = statistics.median(rate)
        first = sorted(1000 * seconds for times in firsts for seconds in times)
        rows.append([n, f"{middle / new:.1f}", spread(rate, 0), f"{middle / n:,.0f}", ratio(rate, found["generate"]),
                     ratio(rate, one), ratio(rate, engine), ratio(whole, engine),
                     f"{first[len(first) // 2]:.0f} ms", f"{first[int(len(first) * 0.99)]:.0f} ms"])
    table("| clients | requests/s | tokens/s | of each | of GPT.generate | of one client | of the bare engine "
          "| the same, whole answers | first token, p50 | p99 |", rows)


@contextlib.contextmanager
def serving(*arguments):
    """The port of a server in a process of its own."""
    pipe, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=run_server, args=(other, *arguments), daemon=True)
    process.start()
    yield pipe.recv()
    pipe.send("stop")
    process.join()


def run_server(pipe, path, device, dtype):
    server = Server(ServeConfig(port=0, device=device, dtype=dtype), lambda: load_model(path, device))
    server.start()
    while server.state == "loading":
        time.sleep(0.05)
    pipe.send(server.port)
    with contextlib.suppress(EOFError):  # the bench has ended
        pipe.recv()
    server.stop()


def run_engine(engine, n, bodies):
    """Tokens per second of the engine alone, with n requests at a time: a new one as soon as one is done."""
    waiting = [Request(ids=body.pop("prompt"), **body) for body in bodies]
    tokens, running = sum(request.max_tokens for request in waiting), []
    started = time.perf_counter()
    while waiting or running:
        room = n - len(running)
        engine.submit(*waiting[:room])
        running += waiting[:room]
        del waiting[:room]
        engine.step()
        running = [request for request in running if not request.finish_reason]
    return tokens / (time.perf_counter() - started)


def ask(port, n, bodies):
    """n clients share these requests, one at a time each. Returns (tokens per second, seconds until first tokens)."""
    waiting, firsts, tokens = iter(bodies), [], []

    def client():
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for body in waiting:
            asked = time.perf_counter()
            connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.readline()  # the first event of a stream
            firsts.append(time.perf_counter() - asked)
            text += answer.read()
            if answer.status != 200:
                raise UserError(f"the server failed: {text[:100]!r}", "see what it wrote above")
            tokens.append(int(re.findall(rb'"completion_tokens": (\d+)', text)[-1]))
        connection.close()

    started = time.perf_counter()
    with ThreadPoolExecutor(n) as threads:
        for done in [threads.submit(client) for _ in range(n)]:
            done.result()
    return sum(tokens) / (time.perf_counter() - started), firsts
