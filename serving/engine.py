# SPDX-License-Identifier: GPL-3.0-only
"""
The engine: many requests at once, one model.

    engine = Engine(model, tokenizer, rows=16)
    requests = [Request(ids=tokenizer.encode("def "), max_tokens=64, seed=i) for i in range(100)]
    engine.complete(requests)                   # here and now; a server calls submit and lets run() work in a thread
    print(requests[0].text, requests[0].finish_reason)

To make one token, a processor reads every weight of the model once, and spends its time on the reading. For sixteen
texts it can read them once as well: that is why a server puts requests together. Texts begin and end at different
times, so the engine has a fixed number of rows, each with its own cache of keys and values; a request takes a free row,
and gives it back when it ends (continuous batching; Orca, Yu 2022). One step of the engine:

1. requests that were cancelled or are late leave, waiting ones take the free rows;
2. decode: every row that is writing gets its next token, all in one batch through the model;
3. prefill: a bounded number of prompt tokens is read, so that a long prompt holds the writers up for a moment only.
   What a row still holds of a prompt that begins alike, of now or of an earlier request, is copied.

Whatever a request gets does not depend on its neighbours (batch invariance): prompts are read alone, in parts that are
cut at the same places every time; attention works on each row alone; every row has its own random numbers. What is left
are the matrix products of step 2, where the same row may get other last bits among 3 rows than among 5, since another
kernel adds in another order. So the engine finds out at its start which numbers of rows give the same bits, and uses no
others: see `steady`.

A prompt and its answer have to fit into the context together; `submit` refuses what does not.
"""
import contextlib
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

from runtime import machine
import tokenizer as tokenizers
from runtime.console import UserError, note, print_error
from model import KVCache, look_back
from sample import Sampling, TextStream, chances, is_greedy, make_pick

CHUNK = 128  # prompt tokens that are read in one step
EVENTS = 100  # a second, for all streams together: waking a thread for every token would cost a tenth of all tokens
STANDARD = 16  # the number of rows whose bits are the right ones: whatever an engine's own number, texts are the same


class Token(NamedTuple):
    """A token and what the model thought of it, before temperature and filters: natural logarithms of probabilities."""
    id: int
    logprob: float | None  # None for the first of a text, which nothing predicts
    top: list  # the likeliest ones, [(id, logprob), ...]


class Event(NamedTuple):
    """News of a request: what came since the last event; finish_reason stands in the last one alone.

    stop: an end-of-text token or a stop string; length: max_tokens; timeout: the deadline; cancelled; error.
    """
    request: "Request"
    text: str
    tokens: list
    finish_reason: str


@dataclass(eq=False)  # (two requests are never the same, whatever they ask for)
class Request(Sampling):
    """What is asked, what was answered, and, while it has a row, where the engine is with it."""
    ids: list[int] = field(default_factory=list)  # the prompt
    max_tokens: int = 128  # 0: only score the prompt
    seed: int = 0
    logit_bias: dict = field(default_factory=dict)  # {id: what to add to its score}
    logprobs: int | None = None  # keep each token with its log-probability, and so many of the likeliest
    prompt_logprobs: int | None = None  # those of the prompt, too, from this token on
    deadline: float = float("inf")  # of time.monotonic()
    streams: bool = False  # events as it goes, and not just one at the end
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    cancelled: bool = False  # may be set by anyone at any time
    # the answer
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt_tokens: list[Token] = field(default_factory=list)  # with prompt_logprobs
    n: int = 0  # tokens that were computed, an end-of-text token included
    finish_reason: str = ""
    submitted: float = 0.0  # time.monotonic()
    first: float | None = None  # when its first token was there
    # the engine's own, from the moment on in which it gets a row
    cache: KVCache | None = None
    read: int = 0  # prompt tokens that are in the cache
    next: int | None = None  # the last token, which is not in the cache yet
    pick: Callable | None = None
    stream: TextStream | None = None
    new_text: str = ""  # of which no event has told
    new_tokens: list[Token] = field(default_factory=list)
    told: float = 0.0  # when the last event did


class Rows:
    """Rows of a cache as one, for a batch of one new token each: every row attends to its own past.

    memory: the cache; caches: those of its rows that take part, see KVCache.row.
    """

    def __init__(self, memory, caches):
        self.memory, self.caches = memory, caches
        self.length = max(cache.length for cache in caches)  # (which GPT.trunk checks)
        places = [(cache.number, cache.length) for cache in caches]
        # (B,) each: which row of the memory, and where in it the new token goes
        self.numbers, self.ends = torch.tensor(places, device=memory.k.device).unbind(1)
        # keys[layer][row]: (1, n_kv_head, length + 1, head_dim), a part of the memory, whose last place is still empty.
        # (Made here for all layers: done layer by layer and row by row, it would take a twentieth of a step.)
        self.keys, self.values = (list(zip(*(whole[:, i:i + 1, :, :length + 1].unbind(0) for i, length in places)))
                                  for whole in (memory.k, memory.v))

    def positions(self, T):
        return self.ends[:, None]  # (B, 1)

    def attend(self, layer, q, k, v):
        for whole, new in zip(self.memory.layers[layer], (k, v)):
            whole[self.numbers, :, self.ends] = new[:, :, 0]  # (B, n_kv_head, head_dim)
        rows = zip(q.split(1), self.keys[layer], self.values[layer])
        return torch.cat([look_back(*row) for row in rows])  # (B, n_head, 1, head_dim)

    def advance(self, T):
        for cache in self.caches:
            cache.advance(T)


# ---------------------------------------------------------------------------------------------------------------------
# The same bits whatever the number of rows


@torch.inference_mode()
def steady(model, rows):
    """The numbers of rows, up to `rows` or STANDARD, among which a row gets the same bits as among STANDARD ones.

    Each shape of a matrix is tried on its own, with numbers that cancel: half of them are the negative of the other
    half, shuffled, so that what is left of a sum is nothing but its rounding, and tells the order in which it was added
    up. (Ordinary numbers hide it: rounded to bfloat16, the results of two orders are nearly always the same.) Then the
    whole model, with random tokens. [1] where even the place in a batch matters: then rows are computed one by one.
    """
    rows = max(rows, STANDARD)
    config, device, generator = model.config, model.lm_head.weight.device, torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (rows, 1), generator=generator).to(device)

    def scores(tokens):
        memory = KVCache(config, len(tokens), 1, device, model.dtype())
        return model.logits(model.trunk(tokens, Rows(memory, [memory.row(i) for i in range(len(tokens))])))

    trials = [(scores, tokens)]
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    for layer in {(layer.weight.shape, layer.bias is None): layer for layer in layers}.values():
        N, K = layer.weight.shape
        shuffled = torch.randperm(K // 2, generator=generator)
        w, x = torch.randn(N, K // 2, generator=generator), torch.randn(rows, K // 2, generator=generator)
        w, x = torch.cat((w, w[:, shuffled]), dim=1), torch.cat((x, -x[:, shuffled]), dim=1)
        w, x = (F.pad(tensor, (0, K % 2)).to(layer.weight) for tensor in (w, x))  # (N, K), (rows, K)
        bias = None if layer.bias is None else 1e-6 * torch.randn(N, generator=generator).to(w)
        trials.append((partial(machine.linear, SimpleNamespace(weight=w, bias=bias)), x))

    counts = set(range(1, rows + 1))
    for compute, x in trials:
        if not torch.equal(compute(x.flip(0)).flip(0), compute(x)):
            return [1]
        wanted = compute(x[:STANDARD])
        counts = {n for n in counts if torch.equal(compute(x[:n])[:STANDARD], wanted[:n])}
    return sorted(counts)


# ---------------------------------------------------------------------------------------------------------------------


class Engine:
    """Requests on the rows of one model, which is the engine's from here on.

    context: cut the model's own to so many tokens. Any thread may submit, end, and set Request.cancelled. step, run and
    complete are for one alone. Raises UserError where there is too little memory.
    """

    def __init__(self, model, tokenizer, rows=16, max_queue=float("inf"), dtype=torch.float32, context=0):
        self.model, self.tokenizer, self.ends = machine.use_linear(model, dtype), tokenizer, tokenizers.ends(tokenizer)
        self.device, self.max_queue, c = model.lm_head.weight.device, max_queue, model.config
        # Keys and values may take half of the free memory: first there are fewer rows, then the context is cut.
        size = 2 * c.n_layer * c.n_kv_head * c.head_dim * model.dtype().itemsize  # of a token, in bytes
        fit = int(min(machine.free_memory(str(self.device)) / 2, 1e15) // size)  # tokens
        wanted = min(context or c.block_size, c.block_size)
        self.context = min(wanted, fit // 2)  # at least one row, and one more that fills up batches
        self.rows = max(1, min(rows, fit // wanted - 1))
        why = f"a token can take {size:,} bytes, and all tokens half of the free memory, {fit * size / 1e6:,.0f} MB"
        if self.context < min(wanted, CHUNK):
            raise UserError(f"there is no memory for a context of {min(wanted, CHUNK)} tokens: {why}",
                            "end other programs, or take a smaller model")
        if self.rows < rows:
            note(f"rows={self.rows} instead of {rows}: {why}")
        if self.context < wanted:
            note(f"context {wanted:,} cut to {self.context:,} tokens: {why}")
        rows = self.rows
        self.counts = steady(model, rows)
        try:
            self.memory = KVCache(model.config, rows + 1, self.context, self.device, model.dtype())
        except (MemoryError, RuntimeError) as error:
            raise UserError(f"{rows} rows of {self.context:,} tokens do not fit into memory: {error}",
                            f"--rows={(rows + 1) // 2} --block_size={self.context // 2}") from None
        *each, self.spare = (self.memory.row(i) for i in range(rows + 1))  # one that only fills up a batch
        self.free = deque(each)
        self.held = {row: [] for row in self.free}  # the ids of a prompt whose keys and values are still in a row
        self.waiting, self.running, self.news = deque(), [], threading.Condition()
        self.failures = 0  # in a row
        self.steps = self.n_cancelled = self.prompt_tokens = self.completion_tokens = 0  # for whoever watches
        self.stopping = False

    def submit(self, *requests):
        """Queue the requests, all or none. Raises ValueError where one cannot fit, queue.Full where there is no room.
        """
        size, vocab_size = self.context, self.model.config.vocab_size
        for request in requests:
            # The last token of an answer is never read, so one fits behind a full context. (serving/api.py allows it
            # for scoring alone: to a user, prompt and answer fit or they do not.)
            if not request.ids or len(request.ids) + max(1, request.max_tokens) > size + 1:
                raise ValueError(f"{len(request.ids)} + {request.max_tokens} tokens do not fit into {size}")
            if not all(0 <= i < vocab_size for i in (*request.ids, *request.logit_bias)):
                raise ValueError(f"an id that is none of the {vocab_size} that the model knows")
        with self.news:
            if len(self.waiting) + len(self.running) + len(requests) > self.rows + self.max_queue or self.stopping:
                raise queue.Full
            for request in requests:
                request.submitted = time.monotonic()
                self.waiting.append(request)
            self.news.notify()

    def complete(self, requests):
        """Submit the requests and work until all are done."""
        self.submit(*requests)
        while self.waiting or self.running:
            self.step()
        return requests

    def run(self):
        """Work until `end`; what is left then is cancelled. Raises where the model fails three times in a row (on a GPU
        at the first: after an error it does nothing more)."""
        while not self.stopping:
            with self.news:
                self.news.wait_for(lambda: self.waiting or self.running or self.stopping)
            try:
                self.step()
            except Exception:
                print_error(traceback.format_exc())
                self.failures += 1
                if self.failures == 3 or self.device.type == "cuda":
                    self.stop("error")
                    raise
        self.stop("cancelled")

    def end(self):
        """Have run() return. For any thread."""
        with self.news:
            self.stopping = True
            self.news.notify()

    def stop(self, reason):
        """End every request; none is accepted any more."""
        with self.news:
            self.stopping = True
            left = [*self.running, *self.waiting]
        for request in left:
            self.finish(request, reason)

    @torch.inference_mode()
    def step(self):
        # 1. Who leaves, who comes?
        now = time.monotonic()
        with self.news:
            everyone = [*self.running, *self.waiting]
        for request in everyone:
            if request.cancelled or now > request.deadline:
                self.finish(request, "cancelled" if request.cancelled else "timeout")
        while self.free and self.waiting:
            with self.news:
                request = self.waiting.popleft()
            request.cache, request.stream = self.free.popleft(), TextStream(self.tokenizer, request.stop)
            self.running.append(request)
            request.pick = make_pick(request, request.ids, request.seed, request.logit_bias)

        # 2. Decode: a token for every row that is writing.
        writing = [request for request in self.running if request.next is not None]
        for i in range(0, len(writing), self.counts[-1]):
            batch = writing[i:i + self.counts[-1]]
            with self.or_fail(batch):
                self.write(batch)

        # 3. Prefill: some of the prompts, the oldest first.
        room = CHUNK
        for request in [request for request in self.running if request.read < len(request.ids)]:
            if not room:
                break
            with self.or_fail([request]):
                if request.read == 0:  # (not sooner: a row before this one may be reading the same)
                    self.recall(request)
                part = request.ids[request.read:request.read + CHUNK]
                if len(part) > room:
                    break
                self.read(request, part)
                room -= len(part)
        self.steps += 1

    @contextlib.contextmanager
    def or_fail(self, requests):
        """What goes wrong here ends these requests and no others."""
        try:
            yield
        except Exception:
            for request in requests:
                self.finish(request, "error")
            raise
        self.failures = 0

    def write(self, requests):
        """The next token of each request, from the one before it."""
        n = next(count for count in self.counts if count >= len(requests))
        fill = n - len(requests)  # rows that only make the number right
        ids = [request.next for request in requests] + [0] * fill
        caches = [request.cache for request in requests] + [self.spare] * fill
        x = self.model.trunk(torch.tensor(ids, device=self.device)[:, None], Rows(self.memory, caches))  # (n, 1, C)
        self.spare.length = 0  # (it was advanced for every row that it filled up)
        logits = self.model.logits(x)[:, 0].float()  # (n, vocab_size)
        alike, known = {}, {}  # rows that ask for the same choice among the top_k get their `chances` together
        for i, request in enumerate(requests):
            if 0 < request.top_k < logits.size(1) and not is_greedy(request):
                alike.setdefault((request.temperature, request.top_k, request.top_p, request.min_p), []).append(i)
        best = {k: [x.cpu() for x in logits.topk(k)] for k in {top_k for _, top_k, _, _ in alike}}  # (n, k) each
        for (_, top_k, _, _), rows in alike.items():
            scores, ids = (x[rows] for x in best[top_k])
            line, _ = chances(scores, requests[rows[0]])
            known.update(zip(rows, zip(line.split(1), ids.split(1))))  # (1, k) each
        for i, request in enumerate(requests):
            self.choose(request, logits[i:i + 1], known.get(i))

    def recall(self, request):
        """Copy the beginning of a prompt from a row that has read the same: the same examples, the chat so far.

        Only parts that would be read as one: then their bits are those that reading would give.
        """
        ids, last = request.ids, len(request.ids) - 1  # the last token has to be read: it gives the first new one
        last = last if request.prompt_logprobs is None else min(last, request.prompt_logprobs - 1)

        def shared(held):
            n = 0
            while n + CHUNK <= last and ids[n:n + CHUNK] == held[n:n + CHUNK]:
                n += CHUNK
            return n

        n, row = 0, request.cache
        for other, held in self.held.items():
            if shared(held) > n:
                n, row = shared(held), other
        self.held[request.cache] = []  # until all of it is there
        for new, old in ((request.cache.k, row.k), (request.cache.v, row.v)):
            new[..., :n, :] = old[..., :n, :]
        request.cache.length = request.read = n
        self.held[request.cache] = ids[:n]
        self.prompt_tokens += n

    def read(self, request, part):
        """The next part of a prompt; behind its end, the first token."""
        x = self.model.trunk(torch.tensor([part], device=self.device), request.cache)  # (1, T, C)
        request.read += len(part)
        self.held[request.cache] = request.ids[:request.read]
        self.prompt_tokens += len(part)
        if request.prompt_logprobs is not None:
            before = request.read - len(part)
            skip = min(len(part), max(0, request.prompt_logprobs - before - 1))  # nobody asks what followed these
            known = request.ids[before + skip + 1:request.read + 1]  # what came next is in the prompt
            logits = self.model.logits(x[0, skip:skip + len(known)]).float()  # (T, vocab_size)
            if not torch.isfinite(logits.sum()):
                return self.finish(request, "error")
            request.prompt_tokens += [Token(request.ids[0], None, [])] if request.prompt_logprobs + before == 0 else []
            request.prompt_tokens += score(logits, known, request.logprobs or 0)
        if request.read == len(request.ids):
            if request.max_tokens == 0:
                self.finish(request, "length")
            else:
                self.choose(request, self.model.logits(x[:, -1]).float())

    def choose(self, request, logits, known=None):
        """One token from scores (1, vocab_size), and what follows from it. known: their `chances`, if there are any."""
        try:
            token = request.pick(logits, known).item()
            ended = token in self.ends and not request.ignore_eos
            text = "" if ended else request.stream.push(token)
            new = [] if ended or request.logprobs is None else score(logits, [token], request.logprobs)
        except Exception as error:  # scores that are not finite: this request's alone
            print_error(f"a request failed: {getattr(error, 'fact', error)}")
            return self.finish(request, "error")
        request.first = request.first or time.monotonic()
        request.n += 1
        self.completion_tokens += 1
        if ended:
            return self.finish(request, "stop")
        request.next = token
        self.add(request, text, new)
        if request.stream.stopped or request.n == request.max_tokens:
            self.finish(request, "stop" if request.stream.stopped else "length")
        elif request.streams and time.monotonic() - request.told > len(self.running) / EVENTS:
            self.tell(request)

    def add(self, request, text, tokens=()):
        """Text and tokens of an answer that were not there before."""
        request.text += text
        request.tokens += tokens
        request.new_text += text
        request.new_tokens += tokens

    def finish(self, request, reason):
        """The last event of a request; its row is free again."""
        if request.finish_reason:
            return
        if request in self.running:
            self.running.remove(request)
            request.cache.length = 0
            self.free.append(request.cache)
            self.add(request, request.stream.finish())
            if request.stream.stopped and reason == "length":  # (the stop string was complete with the last bytes)
                reason = "stop"
        else:
            with self.news:
                if request in self.waiting:
                    self.waiting.remove(request)
        self.n_cancelled += reason == "cancelled"
        request.finish_reason = reason
        self.tell(request, reason)

    def tell(self, request, reason=""):
        """An event with what is new."""
        if request.new_text or request.new_tokens or reason:
            request.events.put(Event(request, request.new_text, request.new_tokens, reason))
            request.new_text, request.new_tokens, request.told = "", [], time.monotonic()


def score(logits, ids, top):
    """Tokens with their log-probabilities. logits: (T, vocab_size), of which those at t predict ids[t]; ids: T ids."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs[torch.arange(len(ids)), torch.tensor(ids, dtype=torch.int64)].tolist()
    best = logprobs.topk(min(top, logprobs.size(-1)))
    return [Token(i, p, list(zip(also, their))) for i, p, also, their in
            zip(ids, chosen, best.indices.tolist(), best.values.tolist())]
