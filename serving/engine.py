# SPDX-License-Identifier: GPL-3.0-only
"""
The engine: many requests at once, one model.

    engine = Engine(model, tokenizer, rows=16)
    requests = [Request(ids=tokenizer.encode("def "), max_tokens=64, seed=i) for i in range(100)]
    engine.complete(requests)      # a server calls submit instead, and lets run() work in a thread
    print(requests[0].text, requests[0].finish_reason)

Decoding is bound by memory: each token reads every weight, and sixteen texts can share that reading. The
engine has slots, each with a row of the KV cache, that requests take and return at any time (continuous
batching; Orca, Yu 2022). A step:

1. admit: cancelled and late requests leave, waiting ones take the free slots;
2. decode: every slot that is writing gets its next token, all in one batch;
3. prefill: at most CHUNK prompt tokens are read, so that a long prompt hardly delays the others.

A text does not depend on its neighbours (batch invariance): prompts are read alone, always cut at the same
places; attention works on each row alone; each request has its own random numbers; and the matrix products of
decoding have only batch sizes that give the same bits.
"""
import contextlib
import queue
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn

import tokenizer as tokenizers
from model import KVCache, attend_from_one
from runtime import machine
from runtime.console import UserError, note, print_error
from sample import Sampler, Sampling, TextStream, sample_tokens

CHUNK = 128  # prompt tokens that are read in one step
EVENTS = 100  # a second, of all streams: waking a thread for every token would cost a tenth of the speed
REFERENCE = 16  # the batch size whose bits count, however many rows an engine has


class Token(NamedTuple):
    """A token and its natural log-probability before temperature and filters."""
    id: int
    logprob: float | None  # None for the first of a text
    top: list  # the likeliest ones, [(id, logprob), ...]


class Event(NamedTuple):
    """What came since the last event of a request."""
    request: "Request"
    text: str
    tokens: list
    finish_reason: str  # of the last event: stop, length, timeout, cancelled or error


@dataclass(eq=False)
class Request(Sampling):
    """What is asked, and the answer so far."""
    ids: list[int] = field(default_factory=list)  # the prompt
    max_tokens: int = 128  # 0: only score the prompt
    seed: int = 0
    logit_bias: dict = field(default_factory=dict)  # {id: what to add to its logit}
    logprobs: int | None = None  # keep the log-probability of each token, and of this many of the likeliest
    prompt_logprobs: int | None = None  # and those of the prompt, from this token on
    deadline: float = float("inf")  # of time.monotonic()
    streams: bool = False  # send events as it goes, and not only at the end
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    cancelled: bool = False  # may be set by anyone at any time
    # the answer
    text: str = ""  # (what it begins with, such as an echo of the prompt, may be given)
    tokens: list[Token] = field(default_factory=list)
    prompt_tokens: list[Token] = field(default_factory=list)  # with prompt_logprobs
    end: list[Token] = field(default_factory=list)  # the end-of-text token, if that ended the text
    n: int = 0  # tokens that were computed, with the end-of-text token
    finish_reason: str = ""
    submitted: float = 0.0  # time.monotonic()
    first: float | None = None  # time of the first token
    sent: tuple = 0, 0  # characters and tokens that were in events
    sent_at: float = 0.0

    def send(self, finish_reason=""):
        """Put what is new into an event; with a reason, the last one."""
        self.finish_reason = finish_reason
        characters, n = self.sent
        tokens = self.prompt_tokens + self.tokens
        self.sent = len(self.text), len(tokens)
        self.sent_at = time.monotonic()
        event = Event(self, self.text[characters:], tokens[n:], finish_reason)
        if event.text or event.tokens or finish_reason:
            self.events.put(event)


class Slot:
    """A row of the cache, and the state of the request that has it."""

    def __init__(self, cache):
        self.cache = cache
        self.cached = []  # prompt ids whose keys and values are in the row, also after the request

    def start(self, request, tokenizer):
        self.request = request
        self.sampler = Sampler(request, request.ids, request.seed, request.logit_bias)
        self.stream = TextStream(tokenizer, request.stop)
        self.read = 0  # prompt tokens that are in the cache
        self.last = None  # the last token, which is not in the cache yet


class Rows:
    """Rows of a KVCache as one cache, for a batch of one new token each. Each row attends to its own past."""

    def __init__(self, memory, caches):
        self.memory, self.caches = memory, caches
        self.length = max(cache.length for cache in caches)  # for GPT.trunk
        places = [(cache.number, cache.length) for cache in caches]
        # (B,) each: which row of the memory, and where in it the new token goes
        self.numbers, self.ends = torch.tensor(places, device=memory.k.device).unbind(1)
        self.keys, self.values = self.views(memory.k, places), self.views(memory.v, places)

    def views(self, whole, places):
        """[layer][row]: (1, n_kv_head, length + 1, head_dim), whose last place is for the new token."""
        # All layers at once: one by one would take a twentieth of a step.
        return list(zip(*(whole[:, i:i + 1, :, :length + 1].unbind(0) for i, length in places)))

    def positions(self, T):
        return self.ends[:, None]  # (B, 1)

    def attend(self, layer, q, k, v):
        for whole, new in zip(self.memory.layers[layer], (k, v)):
            whole[self.numbers, :, self.ends] = new[:, :, 0]  # (B, n_kv_head, head_dim)
        rows = zip(q.split(1), self.keys[layer], self.values[layer])
        return torch.cat([attend_from_one(*row) for row in rows])  # (B, n_head, 1, head_dim)

    def advance(self, T):
        for cache in self.caches:
            cache.advance(T)


# ---------- The same bits whatever the batch size


@torch.inference_mode()
def batch_invariant_sizes(model, rows):
    """The batch sizes, up to `rows` or REFERENCE, in which a row gets the bits of a batch of REFERENCE.

    Tries the whole model with random tokens, and each shape of a matrix with numbers that cancel: their sum
    is rounding error alone, and shows the order of additions. [1] where even the place in a batch matters.
    """
    rows = max(rows, REFERENCE)
    config, device, generator = model.config, model.lm_head.weight.device, torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (rows, 1), generator=generator).to(device)

    def logits(tokens):
        memory = KVCache(config, len(tokens), 1, device, model.dtype())
        return model.logits(model.trunk(tokens, Rows(memory, [memory.row(i) for i in range(len(tokens))])))

    trials = [(logits, tokens)]
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    for layer in {(layer.weight.shape, layer.bias is None): layer for layer in layers}.values():
        N, K = layer.weight.shape
        half = K // 2
        again = torch.randperm(half, generator=generator)
        w, x = torch.randn(N, K, generator=generator), torch.randn(rows, K, generator=generator)
        w[:, half:2 * half] = w[:, again]
        x[:, half:2 * half] = -x[:, again]
        x[:, 2 * half:] = 0  # of an odd K
        w, x = w.to(layer.weight), x.to(layer.weight)
        bias = None if layer.bias is None else 1e-6 * torch.randn(N, generator=generator).to(w)
        trials.append((partial(machine.linear, SimpleNamespace(weight=w, bias=bias)), x))

    sizes = list(range(1, rows + 1))
    for compute, x in trials:
        if not torch.equal(compute(x.flip(0)).flip(0), compute(x)):
            return [1]
        wanted = compute(x[:REFERENCE])
        sizes = [n for n in sizes if torch.equal(compute(x[:n])[:REFERENCE], wanted[:n])]
    return sizes


class Engine:
    """Requests on the rows of one model, which it changes. context: cut the model's own to this many tokens.

    Raises UserError where there is too little memory.
    """

    def __init__(self, model, tokenizer, rows=16, max_queue=float("inf"), dtype=torch.float32, context=0):
        self.model = machine.use_linear(model, dtype)
        self.device = model.lm_head.weight.device
        self.tokenizer, self.ends = tokenizer, tokenizers.ends(tokenizer)
        self.fit_into_memory(rows, context)
        self.capacity = self.rows + max_queue  # requests that may run and wait at once
        self.batch_sizes = batch_invariant_sizes(model, self.rows)
        self.memory = KVCache(model.config, self.rows + 1, self.context, self.device, model.dtype())
        self.slots = [Slot(self.memory.row(i)) for i in range(self.rows)]
        self.spare = self.memory.row(self.rows)  # only fills up batches
        self.free = deque(self.slots)
        self.waiting, self.running = deque(), {}  # requests, {request: slot}
        self.stopping = False
        self.changed = threading.Condition()  # guards `waiting` and `stopping`
        self.failures = 0  # in a row
        self.steps = self.cancelled = self.prompt_tokens = self.completion_tokens = 0  # for /metrics

    def fit_into_memory(self, rows, context):
        """Keys and values may take half of the free memory: first the rows are reduced, then the context."""
        c = self.model.config
        size = 2 * c.n_layer * c.n_kv_head * c.head_dim * self.model.dtype().itemsize  # of a token, in bytes
        budget = int(min(machine.free_memory(str(self.device)) / 2, 1e15) // size)  # tokens
        wanted = min(context or c.block_size, c.block_size)
        self.context = min(wanted, budget // 2)  # at least one row, and the spare one
        self.rows = max(1, min(rows, budget // wanted - 1))
        least = min(wanted, CHUNK)
        why = f"half of the free memory holds {budget:,} tokens"
        if self.context < least:
            fact = f"too little memory for a context of {least} tokens: {why}"
            raise UserError(fact, "use a smaller model")
        if self.rows < rows or self.context < wanted:
            note(f"{self.rows} rows of {self.context:,} tokens instead of {rows} of {wanted:,}: {why}")

    # For any thread

    def submit(self, *requests):
        """Queue the requests, all or none; their ids must be below the model's vocab_size.

        Raises ValueError where one does not fit into the context, queue.Full where the queue is full.
        """
        for request in requests:
            n, new = len(request.ids), request.max_tokens
            if not n or n + max(1, new) - 1 > self.context:  # the last token of an answer is never read
                raise ValueError(f"{n} + {new} tokens do not fit into {self.context}")
        with self.changed:
            asked = len(self.waiting) + len(self.running) + len(requests)
            if asked > self.capacity or self.stopping:
                raise queue.Full
            for request in requests:
                request.submitted = time.monotonic()
                self.waiting.append(request)
            self.changed.notify()

    def end(self):
        """Make run() return."""
        with self.changed:
            self.stopping = True
            self.changed.notify()

    # For the thread that computes

    def complete(self, requests):
        self.submit(*requests)
        while self.waiting or self.running:
            self.step()
        return requests

    def run(self):
        """Work until `end`. Raises where the model fails three times in a row, or once on a GPU, which
        computes nothing after an error."""
        while not self.stopping:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.running or self.stopping)
            try:
                self.step()
            except Exception:
                print_error(traceback.format_exc())
                self.failures += 1
                if self.failures == 3 or self.device.type == "cuda":
                    self.end()
                    self.end_requests("error")
                    raise
        self.end_requests("cancelled")

    @torch.inference_mode()
    def step(self):
        # 1. Admit
        self.end_requests()
        while self.free and self.waiting:
            slot = self.free.popleft()
            with self.changed:
                request = self.waiting.popleft()
                slot.start(request, self.tokenizer)
                self.running[request] = slot

        # 2. Decode
        writing = [slot for slot in self.running.values() if slot.last is not None]
        for i in range(0, len(writing), self.batch_sizes[-1]):
            batch = writing[i:i + self.batch_sizes[-1]]
            with self.or_fail(batch):
                self.decode(batch)

        # 3. Prefill, the oldest first
        left = CHUNK
        for slot in [slot for slot in self.running.values() if slot.read < len(slot.request.ids)]:
            if not left:
                break
            with self.or_fail([slot]):
                if slot.read == 0:  # not sooner: an older slot may be reading the same
                    self.reuse_prefix(slot)
                part = slot.request.ids[slot.read:slot.read + CHUNK]
                if len(part) > left:
                    break
                self.read(slot, part)
                left -= len(part)
        self.steps += 1

    def end_requests(self, reason=""):
        """End those that are cancelled or late; with a reason, all."""
        with self.changed:
            for request in [*self.waiting, *self.running]:
                if request.cancelled:
                    self.finish(request, "cancelled")
                elif time.monotonic() > request.deadline:
                    self.finish(request, "timeout")
                elif reason:
                    self.finish(request, reason)

    @contextlib.contextmanager
    def or_fail(self, slots):
        """An error ends the requests of these slots only."""
        try:
            yield
        except Exception:
            for slot in slots:
                self.finish(slot.request, "error")
            raise
        self.failures = 0

    def decode(self, slots):
        size = next(size for size in self.batch_sizes if size >= len(slots))
        fill = size - len(slots)
        ids = [[slot.last] for slot in slots] + [[0]] * fill
        caches = [slot.cache for slot in slots] + [self.spare] * fill
        x = self.model.trunk(torch.tensor(ids, device=self.device), Rows(self.memory, caches))  # (size, 1, C)
        self.spare.length = 0
        self.choose(slots, self.model.logits(x)[:len(slots), 0].float())

    def reuse_prefix(self, slot):
        """Copy the beginning of a prompt from a slot that has read the same: whole CHUNKs, which have
        the bits that reading would give."""
        ids = slot.request.ids
        most = len(ids) - 1  # the last is read: it predicts the first token
        if slot.request.prompt_logprobs is not None:
            most = min(most, slot.request.prompt_logprobs - 1)

        def shared(other):
            n = 0
            while n + CHUNK <= most and ids[n:n + CHUNK] == other.cached[n:n + CHUNK]:
                n += CHUNK
            return n

        source = max(self.slots, key=shared)
        n = shared(source)
        slot.cached = []  # until all of it is there
        slot.cache.k[..., :n, :] = source.cache.k[..., :n, :]
        slot.cache.v[..., :n, :] = source.cache.v[..., :n, :]
        slot.cache.length = slot.read = n
        slot.cached = ids[:n]
        self.prompt_tokens += n

    def read(self, slot, part):
        """Read the next part of a prompt; after the last, choose the first token."""
        request, start = slot.request, slot.read
        x = self.model.trunk(torch.tensor([part], device=self.device), slot.cache)  # (1, T, C)
        slot.read += len(part)
        slot.cached = request.ids[:slot.read]
        self.prompt_tokens += len(part)
        if request.prompt_logprobs is not None:
            skip = min(len(part), max(0, request.prompt_logprobs - start - 1))  # tokens that nobody asks for
            following = request.ids[start + skip + 1:slot.read + 1]
            logits = self.model.logits(x[0, skip:skip + len(following)]).float()  # (T, vocab_size)
            if not torch.isfinite(logits.sum()):
                return self.finish(request, "error")
            if request.prompt_logprobs == start == 0:
                request.prompt_tokens.append(Token(request.ids[0], None, []))
            request.prompt_tokens += score(logits, following, request.logprobs or 0)
        if slot.read == len(request.ids):
            if request.max_tokens == 0:
                self.finish(request, "length")
            else:
                self.choose([slot], self.model.logits(x[:, -1]).float())

    def choose(self, slots, logits):
        """The next token of each slot, by its row of logits (B, vocab_size)."""
        for i, (slot, token) in enumerate(zip(slots, self.sample(slots, logits))):
            if token < 0:
                print_error("the model returned logits that are not finite")
                self.finish(slot.request, "error")
            else:
                self.take(slot, token, logits[i:i + 1])

    def sample(self, slots, logits):
        groups, tokens = {}, [0] * len(slots)
        for i, slot in enumerate(slots):
            groups.setdefault(slot.sampler.group, []).append(i)
        for rows in groups.values():
            samplers = [slots[i].sampler for i in rows]
            part = logits if len(groups) == 1 else logits[rows]
            part = samplers[0].change(part)  # where that changes something, it is alone in its group
            found = sample_tokens(part, samplers[0].settings, [sampler.generator for sampler in samplers])
            for i, token in zip(rows, found.tolist()):
                tokens[i] = token
        return tokens

    def take(self, slot, token, logits):
        request = slot.request
        ended = token in self.ends and not request.ignore_eos
        if not ended:
            request.text += slot.stream.push(token)
        if request.logprobs is not None:
            tokens = request.end if ended else request.tokens
            tokens += score(logits, [token], request.logprobs)
        now = time.monotonic()
        request.first = request.first or now
        request.n += 1
        self.completion_tokens += 1
        slot.sampler.written.append(token)
        slot.last = token
        if ended or slot.stream.stopped:
            self.finish(request, "stop")
        elif request.n == request.max_tokens:
            self.finish(request, "length")
        elif request.streams and now - request.sent_at > len(self.running) / EVENTS:
            request.send()

    def finish(self, request, reason):
        if request.finish_reason:  # it has ended already
            return
        slot = self.running.pop(request, None)
        if slot:
            slot.cache.length = 0
            self.free.append(slot)
            request.text += slot.stream.finish()
            if slot.stream.stopped and reason == "length":  # the last bytes completed a stop string
                reason = "stop"
        else:
            self.waiting.remove(request)
        self.cancelled += reason == "cancelled"
        request.send(reason)


def score(logits, ids, top):
    """The Tokens of ids. logits: (T, vocab_size), where those at t predict ids[t]."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs[torch.arange(len(ids)), torch.tensor(ids, dtype=torch.int64)].tolist()
    best = logprobs.topk(min(top, logprobs.size(-1)))
    alternatives = zip(best.indices.tolist(), best.values.tolist())
    return [Token(i, p, list(zip(*others))) for i, p, others in zip(ids, chosen, alternatives)]
