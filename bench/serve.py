# SPDX-License-Identifier: GPL-3.0-only
"""
How fast is the server? Called as `python -m bench serve [RUN]`.

The clients are in this process, the server is a process of its own; both share this machine. In each round, one after
the other: GPT.generate, which knows one text; the engine without a server, asked as by 1, 4 and 16 clients; and as many
clients that stream, each asking again as soon as it has its answer. The model is openllm-small with random weights,
unless a RUN is given: what a text says does not change how long it takes. All are greedy, as GPT.generate is: drawing
comes on top, for all alike. What streaming costs is partly the clients' own work, who read every piece as it comes; so
the last comparison is also made with whole answers.
"""
import contextlib
import itertools
import json
import multiprocessing
import random
import re
import selectors
import socket
import statistics
import time
import urllib.request
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import torch

from runtime import machine
from training import checkpoint as ckpt
from runtime.console import UserError, say
from runtime.settings import check_limits
from serving.engine import Engine, Request
from model import GPT, GPTConfig, PRESETS
from serve import ServeConfig, Server

CLIENTS = (1, 4, 16)


class Numbers:
    """A tokenizer for a model that has learned nothing: a token is its number."""

    kind, special, vocab_size = "numbers", {}, PRESETS["openllm-small"]["vocab_size"]

    def token_bytes(self, i):
        return b" %d" % i


def load_model(run, device):
    if run:
        return ckpt.load_run(run, device=device)
    torch.manual_seed(0)
    return GPT(GPTConfig(**PRESETS["openllm-small"])).to(device).eval(), Numbers(), {"path": "openllm-small/random"}


def run_server(pipe, run, device, dtype):
    """In a process of its own: a server on a free port, which it tells, until it is told to stop."""
    server = Server(ServeConfig(port=0, device=device, dtype=dtype), lambda: load_model(run, device))
    server.start()
    while server.state == "loading":
        time.sleep(0.05)
    pipe.send(server.port)
    with contextlib.suppress(EOFError):  # (the other side has ended, one way or the other)
        pipe.recv()
    server.stop()


def clients(port, n, requests, body_of):
    """n clients with `requests` requests each. Returns (requests per second, tokens per second, first-token times).

    One thread plays all of them, and looks at no more of an answer than it must: it runs on the processor that is
    measured.
    """
    selector, started, firsts, tokens, asked = selectors.DefaultSelector(), time.perf_counter(), [], 0, 0

    def ask(connection, client):
        nonlocal asked
        body = json.dumps(body_of(asked)).encode()
        asked += 1
        client.asked, client.answer, client.first = time.perf_counter(), b"", None
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n%b" % (len(body), body))

    for _ in range(n):
        connection = socket.create_connection(("127.0.0.1", port))
        ask(connection, selector.register(connection, selectors.EVENT_READ, SimpleNamespace()).data)
    while len(firsts) < n * requests:
        for key, _ in selector.select():
            connection, client = key.fileobj, key.data
            data = connection.recv(1 << 16)
            client.answer += data
            if not data or not client.answer.startswith(b"HTTP/1.1 200"):
                raise UserError(f"the server failed: {client.answer[:100]!r}", "see what it wrote above")
            if client.first is None and b"data: " in client.answer:
                client.first = time.perf_counter() - client.asked
            if is_whole(client.answer):
                firsts.append(client.first)
                tokens += int(client.answer.rpartition(b'"completion_tokens": ')[2].partition(b",")[0])
                if asked < n * requests:
                    ask(connection, client)
    seconds = time.perf_counter() - started
    for key in list(selector.get_map().values()):
        key.fileobj.close()
    return len(firsts) / seconds, tokens / seconds, firsts


def is_whole(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    return len(body) == int(length[1]) if length else body.endswith(b"0\r\n\r\n")


def memory_of(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return int(re.search(rb"^openllm_resident_memory_bytes (\d+)$", answer.read(), re.M)[1])


def serve(settings, runs):
    check_limits(settings, {"requests repeats prompt new_tokens": (1, 1e6)})
    device, run, new = machine.choose_device(settings.device), runs[0] if runs else "", settings.new_tokens
    dtype, _ = machine.choose_dtype(settings.dtype, device)
    model, tokenizer, _ = load_model(run, device)
    pipe, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=run_server, args=(other, run, device, settings.dtype),
                                                           daemon=True)
    process.start()
    engine = Engine(load_model(run, device)[0], tokenizer, dtype=dtype)
    port, rng = pipe.recv(), random.Random(0)
    prompts = [[rng.randrange(model.config.vocab_size) for _ in range(settings.prompt)] for _ in range(1000)]

    def body(i, stream=True):
        return dict(prompt=prompts[i % 1000], max_tokens=new, ignore_eos=True, stream=stream, temperature=0)

    def generate():
        started = time.perf_counter()
        with machine.autocast(device, dtype):
            list(model.generate(torch.tensor(prompts[:1], device=device), new))
        return new / (time.perf_counter() - started)

    def bare(n):
        """n clients of a server that costs nothing: who is told of an end in one step asks again during the next."""
        requests = (Request(ids=prompts[i % 1000], max_tokens=new, ignore_eos=True, temperature=0)
                    for i in range(n * settings.requests))
        started, live, told = time.perf_counter(), list(itertools.islice(requests, n)), 0
        engine.submit(*live)
        while live:
            engine.step()
            asking, told = told, sum(bool(request.finish_reason) for request in live)
            live = [request for request in live if not request.finish_reason]
            if not live:  # the engine is at rest: who was told just now is not late either
                asking, told = asking + told, 0
            more = list(itertools.islice(requests, asking))
            engine.submit(*more)
            live += more
        return n * settings.requests * new / (time.perf_counter() - started)

    generate(), bare(1), clients(port, 1, 1, body)  # the first of each is slower
    alone, engines, wholes, rates, tokens, firsts = [], *(defaultdict(list) for _ in range(5))  # by number of clients
    for i in range(settings.repeats):
        alone.append(statistics.median(generate() for _ in range(settings.requests)))
        for n in CLIENTS:
            engines[n].append(bare(n))
            wholes[n].append(clients(port, n, settings.requests, partial(body, stream=False))[1])
            rate, speed, first = clients(port, n, settings.requests, body)
            rates[n].append(rate)
            tokens[n].append(speed)
            firsts[n] += first
        say(f"round {i + 1} of {settings.repeats}")
    memory = memory_of(port)
    pipe.send(None)
    process.join()

    def middle(values):
        return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"

    def ratios(above, below):
        values = [a / b for a, b in zip(above, below)]
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    print(f"{run or 'openllm-small, random weights'}, {dtype}, {device}: prompts of {settings.prompt} tokens, {new} "
          f"new ones, {settings.requests} requests per client, {settings.repeats} rounds; median (lowest to highest)")
    print(f"GPT.generate: {middle(alone)} tokens/s; the server holds {memory / 1e6:,.0f} MB")
    print("| clients | requests/s | tokens/s | of each | of GPT.generate | of one client | of the bare engine "
          "| the same, whole answers | first token, p50 | p99 |\n|---" + "|---" * 9 + "|")
    for n in CLIENTS:
        first = [1000 * seconds for seconds in sorted(firsts[n])]
        cells = (n, f"{statistics.median(rates[n]):.1f}", middle(tokens[n]), f"{statistics.median(tokens[n]) / n:,.0f}",
                 ratios(tokens[n], alone), ratios(tokens[n], tokens[1]), ratios(tokens[n], engines[n]),
                 ratios(wholes[n], engines[n]), f"{first[len(first) // 2]:.0f} ms",
                 f"{first[int(len(first) * 0.99)]:.0f} ms")
        print("| " + " | ".join(map(str, cells)) + " |")
