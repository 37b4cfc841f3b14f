# SPDX-License-Identifier: GPL-3.0-only
"""
Sampling: let a trained model write, in the terminal.

    python sample.py                                        # the newest run under out/; asks for prompts in a terminal
    python sample.py out/small --prompt='def read(path):' --max_new_tokens=200
    python sample.py --prompt=FILE:notes.txt --temperature=0 > text.txt
    python sample.py out/chat --chat                        # a conversation with a model that was tuned to answer
    python sample.py SmolLM2-135M-Instruct --chat           # a Hugging Face folder

The text goes to standard output as it is written, everything else to standard error. A model gives a score to every
token of its vocabulary, and there are two steps from there to text, which make up this file:

1. From scores to a token: filter_logits takes away what is too unlikely; one of the rest is drawn by its probability.
2. From tokens to text: a token is bytes, and maybe only a part of a character; TextStream gives out whole characters,
   and nothing that may yet turn out to be the beginning of a stop string.
"""
import codecs
import math
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from shlex import quote
from typing import Literal

import torch

from text import pretrained
from runtime import machine
from training import checkpoint as ckpt
import tokenizer as tokenizers
from runtime.console import UserError, command_line, note, say, show
from runtime.settings import check_limits, load


@dataclass(eq=False)  # (compared as objects: serving/engine.py tells requests apart that ask for the same)
class Sampling:
    # how tokens are chosen from their scores, and where a text ends
    temperature: float = 0.8  # 0: always the likeliest token; 1: as the model thinks; above: wilder
    top_k: int = 50  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together have this probability
    min_p: float = 0.0  # only tokens with at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1: tokens that were used, in the prompt too, get less likely
    presence_penalty: float = 0.0  # taken from the score of every token that was written already; OpenAI's
    frequency_penalty: float = 0.0  # the same, once for each time that it was written
    stop: list[str] = field(default_factory=list)  # end before this text, may be given several times; \n is a line end
    ignore_eos: bool = False  # go on after the end-of-text token


@dataclass
class SampleConfig(Sampling):
    prompt: str = ""  # the text to continue, as it stands; FILE:path reads it from a file
    start: str = ""  # the same, by nanoGPT's name
    num_samples: int = 1  # how many texts to write, one after the other
    max_new_tokens: int = 128  # longest text, in tokens
    chat: bool = False  # the prompt is a message to a chat model, in its format; in a terminal, a conversation
    seed: int | None = None  # the same seed gives the same text; none: a new one, which is printed
    # the model: a RUN (run folder, checkpoint file, Hugging Face folder), given bare or by one of nanoGPT's names
    out_dir: str = ""  # the RUN; by default the newest below out/
    init_from: str = ""  # the RUN as well
    checkpoint: Literal["best", "last"] = "best"  # of a run folder: the lowest validation loss, or the newest
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # of matrix products
    quantize: Literal["none", "int8"] = "none"  # int8: matrices of 8-bit integers, the rest in float32; for CPUs


# ----------------------------------------------------------------------------------------------------------------------
# 1. From scores to a token


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Scores (..., V) -> scores whose softmax is the distribution to draw from; -inf for what is left out.

    In this order: temperature divides the scores; top_k keeps the k highest (and what equals the last of them); min_p
    keeps what has at least min_p times the highest probability (arXiv 2407.01082); top_p keeps the smallest set that
    has at least this probability together (nucleus sampling, arXiv 1904.09751). The likeliest token always stays;
    temperature 0 keeps it alone.
    """
    if temperature < 1e-6:  # the limit of ever smaller ones, which float32 could not divide by
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # the best at 0: nothing can overflow
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if min_p > 0:
        probs = logits.softmax(dim=-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -torch.inf)
    if top_p < 1:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        above = probs.cumsum(dim=-1) - probs  # the probability of all that is likelier
        # order[j] is the token of rank j; nothing is above the likeliest
        drop = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, (above >= top_p) & (above > 0))
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def penalize(logits, prompt, written, repetition=1.0, presence=0.0, frequency=0.0):
    """Make tokens that were used less likely. logits: (..., V); prompt, written: ids.

    repetition divides the scores above 0 of whatever is in prompt or text, and multiplies the others (CTRL, arXiv
    1909.05858). presence is taken from the score of what was written, frequency for each time (OpenAI's API).
    """
    if repetition != 1.0 and (prompt or written):
        ids = torch.tensor(sorted({*prompt, *written}), device=logits.device)
        scores = logits[..., ids]
        logits = logits.index_copy(-1, ids, torch.where(scores > 0, scores / repetition, scores * repetition))
    if (presence or frequency) and written:
        counts = Counter(written)
        ids = torch.tensor(list(counts), device=logits.device)
        less = torch.tensor([presence + frequency * n for n in counts.values()], device=logits.device)
        logits = logits.index_add(-1, ids, -less.expand(*logits.shape[:-1], -1))
    return logits


def lay(logits):
    """Lay the probabilities of all tokens side by side on a line: scores (B, V) -> where each of them ends, (B, V).

    (In float64, since 50,000 additions in float32 would lose the rare.)
    """
    return logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)


def draw(line, generator):
    """One token of each row (B, V) by its probability: the one on which a random point of the line falls, (B,).

    A point in (0, length], with a length that is 1 but for rounding, and the first token whose end is not before it: a
    token of probability 0 has no length, so it is never met.
    """
    point = (1 - torch.rand(line.size(0), 1, dtype=torch.float64, generator=generator)) * line[:, -1:]
    return torch.searchsorted(line, point)[:, 0]


def is_greedy(settings):
    """Is the choice always the likeliest token?"""
    return settings.temperature < 1e-6 or settings.top_k == 1


def chances(logits, settings):
    """What a token of each row is drawn from: the line of its probabilities, and the ids of the tokens on it.

    logits: (B, V). With top_k, (B, top_k) of both, and all that follows is done with so few; else (B, V), and None for
    ids that are in their order.
    """
    ids, top_k = None, settings.top_k
    if 0 < top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    return lay(filter_logits(logits, settings.temperature, 0, settings.top_p, settings.min_p)), ids


def make_pick(settings, prompt, seed, bias=None):
    """The `pick` of GPT.generate for one text: it has its own random numbers and remembers what was written.

    settings: a Sampling. bias: {id: what to add to its score}. pick also takes `known`: the `chances` of
    these scores, if somebody has computed them already, as the engine does for many texts at once. (They are of no use
    where penalties or a bias change the scores.)
    """
    generator, written = torch.Generator().manual_seed(seed), []
    changes = settings.repetition_penalty != 1 or settings.presence_penalty or settings.frequency_penalty or bias

    def pick(logits, known=None):
        logits = logits.cpu() if known is None or changes else logits
        if changes:
            known = None
            logits = penalize(logits, prompt, written, settings.repetition_penalty, settings.presence_penalty,
                              settings.frequency_penalty)
        if bias:
            logits = logits.index_add(-1, torch.tensor(list(bias)), torch.tensor([[*bias.values()]]).float())
        line, ids = (None, None) if is_greedy(settings) else known or chances(logits, settings)
        if not math.isfinite(logits.amax() if line is None else line[0, -1]):  # (nan and inf are among the likeliest)
            raise UserError("the model returned scores that are not finite", "--device=cpu --dtype=float32")
        token = logits.argmax(dim=-1) if line is None else draw(line, generator)  # (1,); greedy: of equals the lowest
        token = token if ids is None else ids[0, token]
        written.append(token.item())
        return token
    return pick


# ----------------------------------------------------------------------------------------------------------------------
# 2. From tokens to text


class TextStream:
    """Puts text together from tokens as they come. What push and finish return, joined, is the text of the whole."""

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps half a character for later
        self.held = ""  # text that may be the beginning of a stop string
        self.stopped = False  # a stop string has come: what follows is not part of the text

    def push(self, token):
        """The text that is certain now that `token` has come; often the token's own, sometimes none."""
        return self.give(self.decoder.decode(self.tokenizer.token_bytes(token)))

    def finish(self):
        """The rest, when no more tokens come; half a character becomes U+FFFD."""
        text = self.give(self.decoder.decode(b"", final=True)) + self.held
        self.held = ""
        return text

    def give(self, new):
        if self.stopped:
            return ""
        text = self.held + new
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stops if stop in text]
        if found:  # of several the one that is complete first, however the text came in tokens; then the longest
            self.stopped, self.held = True, ""
            return text[:min(found)[1]]
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - keep:]
        return text[:len(text) - keep]


# ----------------------------------------------------------------------------------------------------------------------
# The terminal


def write(model, tokenizer, ids, settings, seed):
    """Print the continuation of the prompt `ids` as it comes. Returns (the text, the number of tokens)."""
    size, ends = model.config.block_size, tokenizers.ends(tokenizer)
    if len(ids) > size:
        note(f"the prompt has {len(ids):,} tokens, the context is {size}; the first {len(ids) - size:,} are ignored")
        ids = ids[-size:]
    stream, n = TextStream(tokenizer, [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in settings.stop]), 0
    text = []

    def write_on(new, end=""):
        text.append(new)
        show(new, end)

    idx = torch.tensor([ids], device=model.lm_head.weight.device)
    for token in model.generate(idx, settings.max_new_tokens, make_pick(settings, ids, seed)):
        n += 1
        if token.item() in ends and not settings.ignore_eos:
            break
        write_on(stream.push(token.item()))
        if stream.stopped:
            break
    write_on(stream.finish(), end="\n")
    return "".join(text), n


def begin(prompt, tokenizer):
    """Print the prompt; the ids that the model goes on from: nothing goes before a prompt."""
    show(prompt, end="")
    nothing = tokenizer.special.get(tokenizers.END_OF_TEXT)  # what stands before every document
    return tokenizer.encode(prompt) or ([nothing] if nothing is not None else tokenizer.encode("\n"))


def fit(messages, tokenizer, room):
    """The ids of a conversation, in at most `room` tokens if that is possible: its oldest questions and answers are
    taken out of `messages`, whole ones. A system message stays, and the last question."""
    first, ids = int(messages[0]["role"] == "system"), tokenizer.chat(messages)
    while len(ids) > room and len(messages) > first + 1:
        del messages[first:first + 2]
        ids = tokenizer.chat(messages)
    return ids


LIMITS = {"num_samples max_new_tokens": (1, 1e9), "top_k": (0, 1e9), "temperature": (0, 1e9), "top_p": (1e-9, 1),
          "min_p": (0, 1), "repetition_penalty": (0.01, 100), "presence_penalty frequency_penalty": (-100, 100),
          "seed": (0, 2**62)}


def read_prompt(prompt):
    if not prompt.startswith("FILE:"):
        if not prompt.isascii() and prompt != prompt.encode(errors="replace").decode():
            raise UserError(f"the prompt {prompt!r} is not UTF-8", "--prompt=FILE:path of a UTF-8 text")
        return prompt
    try:
        with open(prompt[5:], encoding="utf-8", newline="") as file:  # a file, or a pipe that ends
            text = file.read(10_000_001)
        if len(text) > 10_000_000:
            raise ValueError("it has more than 10,000,000 characters")
        return text
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the prompt from {prompt[5:]}: {getattr(error, 'strerror', None) or error}",
                        "--prompt='some text', or --prompt=FILE:path of a UTF-8 text") from None


def main(argv):
    settings, _, runs = load(SampleConfig, argv)
    check_limits(settings, LIMITS)
    prompt = read_prompt(settings.prompt or settings.start)
    device = machine.choose_device(settings.device)
    named, int8 = ckpt.choose_run(runs, settings), settings.quantize == "int8"
    model, tokenizer, run = ckpt.load_run(named, settings.checkpoint, device, int8)
    say(f"{run['path']}: {model.n_params():,} parameters, " + (
        "a Hugging Face model" if os.path.isdir(run["path"]) else
        f"{run['step']} updates on {', '.join(run['source'])}") + (", in 8 bits" if run["int8"] else ""))
    seed = settings.seed if settings.seed is not None else int.from_bytes(os.urandom(4), "little")
    machine.use_linear(model, machine.choose_dtype(settings.dtype, device)[0])

    said, outgrown, size = [], False, model.config.block_size  # said: the conversation so far, with --chat
    if settings.chat and not run["chat"]:
        folder = run["path"] if os.path.isdir(run["path"]) else os.path.dirname(run["path"]) or "."
        prepare_first = (f"python prepare.py YOUR_CHATS.jsonl --format=chat --tokenizer={quote(folder)}, then "
                         f"train.py with --init_from={quote(folder)}")
        raise UserError(f"{run['path']} has no chat format",
                        prepare_first if tokenizers.END in tokenizer.special else pretrained.CHAT_FIX)

    def answer(prompt, seed):
        nonlocal outgrown
        messages = [*said, dict(role="user", content=prompt)]
        for i in range(settings.num_samples):
            ids = fit(messages, tokenizer, size - min(settings.max_new_tokens, size // 2)) if settings.chat else \
                begin(prompt, tokenizer)
            if len(messages) <= len(said) and not outgrown:
                note(f"the conversation outgrows the context of {size:,} tokens: the model forgets the oldest messages")
                outgrown = True
            started = time.perf_counter()
            text, n = write(model, tokenizer, ids, settings, seed + i)
            say(f"[{n} tokens, {n / (time.perf_counter() - started):.0f} per second, --seed={seed + i}]")
        said[:] = [*messages, dict(role="assistant", content=text)]

    if prompt or not (sys.stdin.isatty() and sys.stdout.isatty()):
        answer(prompt, seed)
        return
    say("type a prompt; Ctrl-C stops a text, Ctrl-D ends")
    while True:
        try:
            prompt = input("> ")
            prompt.encode()  # (in some locales, what is not UTF-8 comes as half a character)
        except EOFError:
            say()
            return
        except UnicodeError:
            say("error: a prompt has to be UTF-8")
            continue
        if settings.chat and not prompt.strip():
            continue
        try:
            answer(prompt, seed)
        except UserError as error:
            say(f"error: {error.fact}")  # one bad prompt need not end the conversation
        except KeyboardInterrupt:
            say("\n(stopped; Ctrl-D ends)")
        seed += settings.num_samples


if __name__ == "__main__":
    command_line(main)
