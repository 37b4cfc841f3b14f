# SPDX-License-Identifier: GPL-3.0-only
"""
Sampling: let a trained model write in the terminal.

    python sample.py                                        # the newest run under out/; asks for prompts in a terminal
    python sample.py out/small --prompt='def read(path):' --max_new_tokens=200
    python sample.py --prompt=FILE:notes.txt --temperature=0 > text.txt
    python sample.py out/chat --chat                        # a conversation with a model that was tuned to answer
    python sample.py SmolLM2-135M-Instruct --chat           # a Hugging Face folder

The text goes to standard output, everything else to standard error. Two steps lead from a model's logits to text:

1. From logits to a token: filter_logits drops what is too unlikely, sample_tokens samples one of the rest.
2. From tokens to text: a token may be a part of a character. TextStream gives out whole characters, and no part of a
   stop string.
"""
import codecs
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from shlex import quote
from typing import Literal

import torch

import tokenizer as tokenizers
from runtime import machine
from runtime.console import UserError, command_line, note, say, show
from runtime.settings import check_limits, load
from text import pretrained
from training import checkpoint as ckpt


@dataclass
class RunConfig:
    # the model: a RUN (run folder, checkpoint file, Hugging Face folder), given bare or by one of nanoGPT's names
    out_dir: str = ""  # the RUN; by default the newest below out/
    init_from: str = ""  # the same
    checkpoint: Literal["best", "last"] = "best"  # of a run folder: the lowest validation loss, or the newest


@dataclass
class ModelConfig(RunConfig):
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # of matrix products
    quantize: Literal["none", "int8"] = "none"  # int8: matrices of 8-bit integers, the rest in float32; for CPUs


@dataclass(eq=False)  # two equal requests of the engine are still two
class Sampling:
    # how tokens are chosen from their logits, and where a text ends
    temperature: float = 0.8  # 0: always the likeliest token; 1: as the model thinks; above: wilder
    top_k: int = 50  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together have this probability
    min_p: float = 0.0  # only tokens with this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and text get less likely
    presence_penalty: float = 0.0  # subtracted from the logit of every token of the text; OpenAI's
    frequency_penalty: float = 0.0  # the same, for each time that it was written
    stop: list[str] = field(default_factory=list)  # end before this text; may be repeated; \n is a line end
    ignore_eos: bool = False  # go on after the end-of-text token


@dataclass
class SampleConfig(Sampling, ModelConfig):
    prompt: str = ""  # the text to continue; FILE:path reads it from a file
    start: str = ""  # the same, by nanoGPT's name
    num_samples: int = 1  # how many texts to write, one after the other
    max_new_tokens: int = 128  # longest text, in tokens
    chat: bool = False  # the prompt is a message to a chat model; in a terminal, a conversation
    seed: int | None = None  # the same seed gives the same text; none: a new one, which is printed


# The ranges of settings, inclusive, here and in serving/api.py.
RANGES = {
    "temperature": (0, 2), "top_k": (0, 10**6), "top_p": (1e-9, 1), "min_p": (0, 1), "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "max_new_tokens": (1, 10**6), "seed": (0, 2**63 - 1)}
MAX_STOPS, STOP_LENGTH = 4, 256  # stop strings, and characters of one


# ----------------------------------------------------------------------------------------------------------------------
# 1. From logits to a token


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Logits (..., V) -> logits whose softmax is the distribution to sample from; -inf for what is left out.

    In this order: temperature divides the logits; top_k keeps the k highest; min_p keeps what has at least min_p times
    the highest probability (arXiv 2407.01082); top_p keeps the smallest set that has at least this probability
    (nucleus sampling, arXiv 1904.09751). The likeliest token always stays.
    """
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # the best at 0: no overflow
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if min_p > 0:
        probs = logits.softmax(dim=-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -torch.inf)
    if top_p < 1:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        above = probs.cumsum(dim=-1) - probs  # the probability of all that is likelier; 0 for the best
        drop = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, (above >= top_p) & (above > 0))
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def penalize(logits, prompt, written, repetition=1.0, presence=0.0, frequency=0.0, bias=None):
    """Make used tokens less likely. logits: (1, V); prompt, written: ids; bias: {id: added to its logit}.

    repetition divides positive logits and multiplies negative ones (CTRL, arXiv 1909.05858). presence is subtracted for
    written tokens, frequency for each time (OpenAI's API).
    """
    if repetition != 1.0 and (prompt or written):
        ids = torch.tensor(sorted({*prompt, *written}), device=logits.device)
        used = logits[:, ids]
        logits = logits.index_copy(1, ids, torch.where(used > 0, used / repetition, used * repetition))
    added = dict(bias or {})
    if presence or frequency:
        for i, n in Counter(written).items():
            added[i] = added.get(i, 0.0) - (presence + frequency * n)
    if added:
        ids = torch.tensor(list(added), device=logits.device)
        amounts = torch.tensor([list(added.values())], dtype=torch.float32, device=logits.device)  # (1, number of ids)
        logits = logits.index_add(1, ids, amounts)
    return logits


def is_greedy(settings):
    return settings.temperature < 1e-6 or settings.top_k == 1


def sample_tokens(logits, settings, generators):
    """A token for each row of logits (B, V) -> (B,) on the CPU; -1 for a row that is not finite.

    A row does not depend on the others: it has its own generator, whose uniform number becomes a token by the inverse
    of the cumulative distribution (cdf). (torch.multinomial takes seven times as long for 32,768 tokens.)
    """
    if is_greedy(settings):  # of equals the lowest id
        best = logits.max(dim=-1)
        return torch.where(best.values.isfinite(), best.indices, -1).cpu()
    ids = None
    if 0 < settings.top_k < logits.size(-1):  # what follows takes k numbers, not V
        best = logits.topk(settings.top_k)
        logits, ids = best.values, best.indices.cpu()  # (B, k)
    kept = filter_logits(logits.cpu(), settings.temperature, 0, settings.top_p, settings.min_p)
    cdf = kept.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)  # in float32, rare tokens get lost
    uniform = torch.stack([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
    # No point in (0, total] falls on a token of probability 0.
    total = cdf[:, -1:]  # (B, 1); 1 but for rounding, or nan where a logit is not finite
    tokens = torch.searchsorted(cdf, (1 - uniform) * total)  # (B, 1)
    if ids is not None:
        tokens = ids.gather(-1, tokens.clamp(max=ids.size(-1) - 1))
    return torch.where(total.isfinite(), tokens, -1)[:, 0]


class Sampler:
    """Chooses the tokens of one text: the `pick` of GPT.generate. settings: a Sampling; prompt, bias: of penalize."""

    def __init__(self, settings, prompt, seed, bias=None):
        self.settings, self.prompt, self.bias = settings, prompt, bias
        self.generator = torch.Generator().manual_seed(seed)
        self.written = []
        self.penalties = settings.repetition_penalty, settings.presence_penalty, settings.frequency_penalty
        # The engine samples the texts of a group together. (Whole vocabularies one by one take half the time, since a
        # row stays in the processor's cache.)
        self.group = settings.temperature, settings.top_k, settings.top_p, settings.min_p
        if self.penalties != (1, 0, 0) or bias or not (settings.top_k or is_greedy(settings)):
            self.group = id(self)

    def change(self, logits):
        return penalize(logits, self.prompt, self.written, *self.penalties, self.bias)

    def __call__(self, logits):
        """Logits (1, V) -> a token (1,)."""
        token = sample_tokens(self.change(logits), self.settings, [self.generator])
        if token.item() < 0:
            raise UserError("the model returned logits that are not finite", "--device=cpu --dtype=float32")
        self.written.append(token.item())
        return token


# ----------------------------------------------------------------------------------------------------------------------
# 2. From tokens to text


class TextStream:
    """Makes text of tokens as they come: what push and finish return, joined, is the whole text."""

    def __init__(self, tokenizer, stops=()):
        self.tokenizer = tokenizer
        self.stops = stops
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps half a character for later
        self.pending = ""  # text that may be the beginning of a stop string
        self.stopped = False  # a stop string has come

    def push(self, token):
        return self.add(self.decoder.decode(self.tokenizer.token_bytes(token)))

    def finish(self):
        """The rest of the text; half a character becomes U+FFFD."""
        text = self.add(self.decoder.decode(b"", final=True)) + self.pending
        self.pending = ""
        return text

    def add(self, new):
        if self.stopped:
            return ""
        text = self.pending + new
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stops if stop in text]
        if ends:  # the stop that is complete first, and of those the longest
            self.stopped = True
            self.pending = ""
            return text[:min(ends)[1]]
        beginnings = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        certain = len(text) - max(beginnings, default=0)
        self.pending = text[certain:]
        return text[:certain]


# ----------------------------------------------------------------------------------------------------------------------
# The terminal


def read_prompt(prompt):
    try:
        if prompt.startswith("FILE:"):
            with open(prompt[5:], encoding="utf-8", newline="") as file:
                return file.read()
        prompt.encode()  # fails where it came as other bytes than UTF-8
        return prompt
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read the prompt {prompt}: {getattr(error, 'strerror', 'it is not UTF-8')}",
                        "--prompt='some text', or --prompt=FILE:path of a UTF-8 text") from None


def fit(messages, tokenizer, capacity):
    """The ids of a conversation. Where there are more than `capacity`, the oldest questions and answers are removed
    from `messages`, but not a system message or the last question."""
    oldest = int(messages[0]["role"] == "system")
    ids = tokenizer.chat(messages)
    while len(ids) > capacity and len(messages) > oldest + 1:
        del messages[oldest:oldest + 2]
        ids = tokenizer.chat(messages)
    return ids


def write(model, tokenizer, ids, settings, seed):
    """Print the continuation of the prompt `ids` as it comes; (the text, the number of tokens)."""
    size, ends = model.config.block_size, tokenizers.ends(tokenizer)
    if len(ids) > size:
        note(f"the prompt has {len(ids):,} tokens, the context {size}: the first {len(ids) - size:,} are ignored")
        ids = ids[-size:]
    stops = [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in settings.stop]
    stream, text, n = TextStream(tokenizer, stops), "", 0
    idx = torch.tensor([ids], device=model.lm_head.weight.device)  # (1, T)
    for token in model.generate(idx, settings.max_new_tokens, Sampler(settings, ids, seed)):
        n += 1
        if token.item() in ends and not settings.ignore_eos:
            break
        new = stream.push(token.item())
        text += new
        show(new, end="")
        if stream.stopped:
            break
    rest = stream.finish()
    show(rest)
    return text + rest, n


class Writer:
    """Answers prompts: each by its continuation or, with --chat, in one conversation."""

    def __init__(self, model, tokenizer, settings, seed):
        self.model, self.tokenizer, self.settings, self.seed = model, tokenizer, settings, seed
        self.messages = []  # the conversation so far
        self.forgets = False

    def begin(self, prompt):
        """Print the prompt; its ids. An empty one begins as every document does."""
        show(prompt, end="")
        start = self.tokenizer.special.get(tokenizers.END_OF_TEXT)
        return self.tokenizer.encode(prompt) or ([start] if start is not None else self.tokenizer.encode("\n"))

    def answer(self, prompt):
        messages = [*self.messages, dict(role="user", content=prompt)]
        size = self.model.config.block_size
        for _ in range(self.settings.num_samples):
            if self.settings.chat:
                ids = fit(messages, self.tokenizer, size - min(self.settings.max_new_tokens, size // 2))
            else:
                ids = self.begin(prompt)
            started = time.perf_counter()
            text, n = write(self.model, self.tokenizer, ids, self.settings, self.seed)
            say(f"[{n} tokens, {n / (time.perf_counter() - started):.0f} per second, --seed={self.seed}]")
            self.seed += 1
        if len(messages) <= len(self.messages) and not self.forgets:
            note(f"the conversation outgrows the context of {size:,} tokens: the oldest messages are forgotten")
            self.forgets = True
        self.messages = [*messages, dict(role="assistant", content=text)]


def ask(writer):
    """Answer what is typed, until Ctrl-D."""
    say("type a prompt; Ctrl-C stops a text, Ctrl-D ends")
    while True:
        try:
            prompt = input("> ")
            prompt.encode()
            if prompt.strip() or not writer.settings.chat:
                writer.answer(prompt)
        except EOFError:
            return say()
        except UnicodeError:
            say("error: a prompt has to be UTF-8")
        except UserError as error:
            say(f"error: {error.fact}")
        except KeyboardInterrupt:
            say("\n(stopped; Ctrl-D ends)")


def load_model(settings, runs):
    """(model, tokenizer, checkpoint) of the RUN that a ModelConfig and the bare arguments mean."""
    device = machine.choose_device(settings.device)
    run = ckpt.choose_run(runs, settings)
    return ckpt.load_run(run, settings.checkpoint, device, settings.quantize == "int8")


def check_chat(run, tokenizer):
    path = run["path"]
    folder = quote(path if os.path.isdir(path) else os.path.dirname(path) or ".")
    fix = pretrained.CHAT_FIX
    if tokenizers.END in tokenizer.special:
        fix = f"python prepare.py CHATS.jsonl --format=chat --tokenizer={folder}, then train.py --init_from={folder}"
    if not run["chat"]:
        raise UserError(f"{path} has no chat format", fix)


def main(argv):
    settings, _, runs = load(SampleConfig, argv)
    check_limits(settings, RANGES | {"num_samples": (1, 1e9)})
    if len(settings.stop) > MAX_STOPS or not all(1 <= len(stop) <= STOP_LENGTH for stop in settings.stop):
        raise UserError(f"stop may be {MAX_STOPS} texts of 1 to {STOP_LENGTH} characters", "--stop='some text'")
    prompt = read_prompt(settings.prompt or settings.start)
    model, tokenizer, run = load_model(settings, runs)
    source = f"{run['step']} updates on {', '.join(run['source'])}"
    if os.path.isdir(run["path"]):
        source = "a Hugging Face model"
    say(f"{run['path']}: {model.n_params():,} parameters, {source}{', in 8 bits' if run['int8'] else ''}")
    if settings.chat:
        check_chat(run, tokenizer)
    dtype, _ = machine.choose_dtype(settings.dtype, str(model.lm_head.weight.device))
    machine.use_linear(model, dtype)
    seed = settings.seed if settings.seed is not None else int.from_bytes(os.urandom(4), "little")
    writer = Writer(model, tokenizer, settings, seed)
    if prompt or not (sys.stdin.isatty() and sys.stdout.isatty()):
        writer.answer(prompt)
    else:
        ask(writer)


if __name__ == "__main__":
    command_line(main)
