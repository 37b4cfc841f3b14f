# SPDX-License-Identifier: GPL-3.0-only
"""
Sampling: let a trained model write in the terminal.

    python sample.py                                # the newest run under out/; asks for prompts
    python sample.py out/small 'def read(path):' --max_new_tokens=200
    python sample.py --prompt=FILE:notes.txt --temperature=0 > text.txt
    echo 'ROMEO:' | python sample.py out/small      # what another program writes is the prompt
    python sample.py SmolLM2-135M-Instruct --chat   # a conversation; the model: a Hugging Face folder
    python sample.py out/small --prompts=prompts.txt > answers.jsonl    # one prompt per line, many at once

The text goes to standard output, everything else to standard error. Two steps lead
from logits to text:

1. From logits to a token: `candidates` drops what is too unlikely, `sample_tokens` samples from the rest.
2. From tokens to text: a token may be part of a character, or end with part of a stop string. TextStream
   holds both back.
"""
import codecs
import os
import re
import select
import sys
import time
from dataclasses import dataclass, field
from shlex import quote
from typing import Literal

# (First, so that an interrupted or failing import is no traceback.)
from runtime.console import UserError, command_line, counted, note, say, show
import torch

import tokenizer as tokenizers
from runtime import machine
from runtime.settings import check_limits, load
from text import pretrained
from training import checkpoint as ckpt


@dataclass
class RunConfig:
    # the model: a RUN as an argument, or by nanoGPT's options
    out_dir: str = ""  # the RUN; by default the newest under out/
    init_from: str = ""  # the same
    checkpoint: Literal["best", "last"] = "best"  # of a run: the lowest validation loss, or the newest
    block_size: Literal["auto"] | int = "auto"  # cut the context to this many tokens; auto: the model's own


@dataclass
class ModelConfig(RunConfig):
    # how it is computed
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # of matrix products
    quantize: Literal["none", "int8"] = "none"  # int8: matrices of 8-bit integers, for CPUs


@dataclass(eq=False)  # two equal requests of the engine are still two
class Sampling:
    # how tokens are chosen from their logits, and where a text ends
    temperature: float = 0.8  # 0: always the likeliest token; 1: as predicted; above: more random
    top_k: Literal["all"] | int = 50  # only the k likeliest tokens
    top_p: float = 1.0  # only the likeliest tokens that together have this probability
    min_p: float = 0.0  # only tokens with at least this share of the top probability
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and text get less likely
    presence_penalty: float = 0.0  # subtracted from the logit of every token written so far; OpenAI's
    frequency_penalty: float = 0.0  # the same, for each time a token was written
    stop: list[str] = field(default_factory=list)  # stop before this text; may be repeated; \n is a newline
    ignore_eos: bool = False  # continue past end-of-text tokens


@dataclass
class SampleConfig(Sampling, ModelConfig):
    prompt: str = ""  # the text to continue; FILE:path reads it from a file
    start: str = ""  # the same, by nanoGPT's name
    prompts: str = ""  # FILE: a prompt per line, or {"prompt"} or {"messages"} per row of a .jsonl or .json
    strict: bool = False  # stop at the first unreadable row of --prompts instead of skipping it
    num_samples: int = 1  # how many texts to write, one after the other
    max_new_tokens: int = 128  # longest text, in tokens
    chat: bool = False  # the prompt is a message to a chat model; in a terminal, a conversation
    seed: int | None = None  # the same seed gives the same text; none: a new one, which is printed
    compile: bool = False  # nanoGPT's; has no effect, since compiling takes longer than a text


# The ranges of settings, inclusive, here and in serving/api.py
RANGES = {
    "temperature": (0, 2),
    "top_k": (0, 10**6),
    "top_p": (1e-9, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "max_new_tokens": (1, 10**6),
    "seed": (0, 2**63 - 1),
}
ALL = "all", 0  # values of top_k; the server's clients send 0
MAX_STOPS, STOP_LENGTH = 16, 256  # stop strings, and characters of one


# ---------- 1. From logits to a token

def candidates(logits, settings):
    """Logits (B, V) -> (cdf, ids), (B, k) each: the tokens to choose from, and their cumulative distribution.

    The likeliest token always stays.
    """
    # 1. top_k: the k highest logits, in falling order. Sorting a whole vocabulary
    #    takes time, so not where nothing asks for it.
    V = logits.size(-1)
    k = V if settings.top_k in ALL else min(settings.top_k, V)
    ids = torch.arange(V).expand_as(logits)
    if k < V or settings.top_p < 1:
        logits, ids = logits.topk(k)  # (B, k) each
    logits, ids = logits.cpu(), ids.cpu()
    # 2. The temperature: below 1, differences grow, and the likely become likelier.
    #    With the best logit at 0, a low temperature cannot overflow.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    probs = (logits / settings.temperature).softmax(dim=-1)
    # 3. min_p: at least this share of the highest probability (arXiv 2407.01082).
    if settings.min_p > 0:
        probs = probs * (probs >= settings.min_p * probs.amax(dim=-1, keepdim=True))
    # 4. The cumulative distribution: in float32, rare tokens would get lost in the sum.
    cdf = probs.cumsum(dim=-1, dtype=torch.float64)
    # 5. top_p: the fewest tokens that reach this share (nucleus sampling, arXiv
    #    1904.09751). Where the cdf does not rise any more, no token is chosen.
    if settings.top_p < 1:
        cdf = cdf.minimum(cdf.gather(-1, find(cdf, settings.top_p)))
    return cdf, ids


def find(cdf, share):
    """Where (B, 1) the cdf (B, k) reaches a share of its total."""
    found = torch.searchsorted(cdf, share * cdf[:, -1:])
    # Nowhere, if a logit is not finite; an index must be valid all the same.
    return found.clamp(max=cdf.size(-1) - 1)


def is_greedy(settings):
    return settings.temperature < 1e-6 or settings.top_k == 1


def sample_tokens(logits, settings, generators):
    """A token for each row of logits (B, V) -> (B,) on the CPU; -1 for a row that is not finite.

    Each row has a generator, whose uniform number becomes a token by the inverse of
    the cdf. (torch.multinomial takes seven times as long for 32,768 tokens.)
    """
    # 1. Greedy: nothing is left to chance; of equals, the lowest id.
    if is_greedy(settings):
        best = logits.max(dim=-1)
        return torch.where(best.values.isfinite(), best.indices, -1).cpu()
    # 2. A uniform number picks a place on the cdf; a token is hit as often as it is
    #    probable.
    cdf, ids = candidates(logits, settings)
    uniform = [torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators]
    share = 1 - torch.stack(uniform)  # (B, 1), in (0, 1]: never on a token of probability 0
    tokens = ids.gather(-1, find(cdf, share))[:, 0]  # (B,)
    return torch.where(cdf[:, -1].isfinite(), tokens, -1)


class Sampler:
    """Chooses the tokens of one text: the `pick` of GPT.generate. bias: {id: what is added to its logit}."""

    def __init__(self, settings, prompt, seed, bias=None):
        self.settings, self.prompt, self.bias = settings, prompt, bias
        # A generator of its own: the same seed gives the same text, whatever else runs.
        self.generator = torch.Generator().manual_seed(seed)
        self.written = []
        penalties = settings.repetition_penalty, settings.presence_penalty, settings.frequency_penalty
        self.changes = bool(bias) or penalties != (1, 0, 0)
        # The engine samples the texts of a group together, but whole vocabularies one
        # by one: a row stays in the processor's cache, which halves the time.
        self.group = settings.temperature, settings.top_k, settings.top_p, settings.min_p
        if self.changes or (settings.top_k in ALL and not is_greedy(settings)):
            self.group = id(self)

    def change(self, logits):
        """Logits (1, V) with the penalties and the bias."""
        if not self.changes:
            return logits
        settings, repetition = self.settings, self.settings.repetition_penalty
        # 1. repetition: tokens of prompt and text become less likely (CTRL, arXiv
        #    1909.05858).
        counts = count(self.written, logits)
        used = count(self.prompt, logits) + counts > 0
        less = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(used, less, logits)
        # 2. presence and frequency, as OpenAI defines them: once, and for each time.
        logits = logits - settings.presence_penalty * (counts > 0) - settings.frequency_penalty * counts
        # 3. What the request adds to single tokens.
        if self.bias:
            logits[:, list(self.bias)] += torch.tensor(list(self.bias.values()), device=logits.device)
        return logits

    def __call__(self, logits):
        """Logits (1, V) -> a token (1,)."""
        token = sample_tokens(self.change(logits), self.settings, [self.generator])
        if token.item() < 0:
            raise UserError("the model returned logits that are not finite", "--device=cpu --dtype=float32")
        self.written.append(token.item())
        return token


def count(ids, logits):
    """How often each token of the logits (1, V) is in a list of ids: (V,)."""
    return torch.tensor(ids, dtype=torch.long).bincount(minlength=logits.size(-1)).to(logits.device)


# ---------- 2. From tokens to text

class TextStream:
    """Text of tokens as they come: what `push` and `finish` return, joined, is the whole text."""

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops = tokenizer, stops
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
        # 1. A stop string is complete: the text ends before the one that ended first,
        #    of those the longest.
        text = self.pending + new
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stops if stop in text]
        if ends:
            self.stopped, self.pending = True, ""
            _, start = min(ends)
            return text[:start]
        # 2. The end of the text may be the beginning of a stop string: that much is
        #    held back.
        beginnings = [n for stop in self.stops for n in range(min(len(stop), len(text) + 1))
                      if text.endswith(stop[:n])]
        certain = len(text) - max(beginnings, default=0)
        self.pending = text[certain:]
        return text[:certain]


# ---------- The terminal

def read_prompt(prompt):
    """The text of a prompt, which may be FILE:path. Raises UserError where it is not UTF-8."""
    try:
        if prompt.startswith("FILE:"):
            with open(prompt[5:], encoding="utf-8-sig", newline="") as file:
                return file.read()
        prompt.encode()
        return prompt
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read the prompt {prompt!r}: {getattr(error, 'strerror', 'it is not UTF-8')}",
                        "--prompt='some text', or --prompt=FILE:path of a UTF-8 text") from None


def fit(messages, tokenizer, capacity):
    """The ids of a conversation, at most `capacity`: the oldest questions and answers are removed from
    `messages`, but not a system message or the last question."""
    # A question and its answer go together, and the system message stays.
    oldest = int(messages[0]["role"] == "system")
    ids = tokenizer.chat(messages)
    while len(ids) > capacity and len(messages) > oldest + 1:
        del messages[oldest:oldest + 2]
        ids = tokenizer.chat(messages)
    return ids


def continuation(model, tokenizer, ids, settings, seed):
    """What follows the prompt `ids`, as it comes: (number of tokens so far, new text)."""
    # 1. Where the text ends.
    ends = set() if settings.ignore_eos else tokenizers.ends(tokenizer)
    stream = TextStream(tokenizer, settings.stop)
    # 2. Token by token.
    idx = torch.tensor([ids], device=model.lm_head.weight.device)  # (1, T)
    tokens = model.generate(idx, settings.max_new_tokens, Sampler(settings, ids, seed))
    for n, token in enumerate(tokens, start=1):
        if token.item() in ends:
            break
        yield n, stream.push(token.item())
        if stream.stopped:
            break
    yield n, stream.finish()


def write(model, tokenizer, ids, settings, seed):
    """Print the continuation of the prompt `ids` as it comes; returns it."""
    text, started = "", time.perf_counter()
    for n, new in continuation(model, tokenizer, ids, settings, seed):
        text += new
        show(new, end="")
    show("")
    say(f"[{counted(n, 'token')}, {n / (time.perf_counter() - started):.0f} per second, --seed={seed}]")
    return text


def prompt_ids(asked, tokenizer, settings, size, what="the prompt"):
    """The ids of a text, or of a list of messages, from which what does not fit into a context of `size`
    tokens is removed."""
    # 1. Messages. An answer must fit behind them, unless they end with one that is begun.
    if isinstance(asked, list) and asked[-1]["role"] == "assistant":
        ids = tokenizer.continued(asked)
    elif isinstance(asked, list):
        n = len(asked)
        ids = fit(asked, tokenizer, size - min(settings.max_new_tokens, size // 2))
        if len(asked) < n:
            note(f"{what} outgrows the context of {size:,} tokens: its oldest messages are forgotten")
    # 2. A text. Without one, begin as every document does; nanoGPT's 0 is a line end.
    else:
        ids = tokenizer.prompt(asked) or [tokenizer.special.get(tokenizers.END_OF_TEXT, 0)]
    # 3. The end of a prompt matters most.
    if len(ids) > size:
        note(f"{what} has {len(ids):,} tokens, the context {size}: the first {len(ids) - size:,} are ignored")
    return ids[-size:]


class Writer:
    """Answers prompts: each by its continuation or, with --chat, in one conversation."""

    def __init__(self, model, tokenizer, settings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.messages = []  # the conversation so far

    def answer(self, prompt):
        settings, tokenizer, size = self.settings, self.tokenizer, self.model.config.block_size
        # 1. The ids of the prompt.
        messages = [*self.messages, dict(role="user", content=prompt)]
        ids = prompt_ids(messages if settings.chat else prompt, tokenizer, settings, size)
        # 2. As many texts as asked for, each with the next seed.
        for _ in range(settings.num_samples):
            if not settings.chat:
                show(prompt, end="")
            text = write(self.model, tokenizer, ids, settings, settings.seed)
            settings.seed += 1
        self.messages = [*messages, dict(role="assistant", content=text)]


def ask(writer):
    """Answer what is typed, until Ctrl-D."""
    say("type a prompt; Ctrl-C interrupts, Ctrl-D quits")
    while True:
        try:
            prompt = read_prompt(input("> "))
            if prompt.strip() or not writer.settings.chat:
                writer.answer(prompt)
        except EOFError:
            return say()
        except UserError as error:
            say(f"error: {error.fact}")
        except KeyboardInterrupt:
            say("\n(stopped; Ctrl-D quits)")


def piped(chat):
    """The prompts that another program writes to standard input: all of it or, in a chat, each line.

    One that is empty where there is no text: a terminal, /dev/null, or nothing at all.
    """
    found = False
    try:
        if sys.stdin and not sys.stdin.isatty():
            # A program that has left a pipe open, and writes nothing, looks like one that will.
            if os.name == "posix" and not select.select([sys.stdin], [], [], 1)[0]:
                note("waiting for a prompt on standard input; --prompt= begins without one")
            for line in sys.stdin.buffer if chat else [sys.stdin.buffer.read()]:
                text = line.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")  # the line end of echo
                if text.strip() or not chat:
                    found = True
                    yield text
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8", "--prompt='some text', or iconv") from None
    except OSError:  # nohup leaves it open for writing only
        pass
    if not found:
        yield ""


def split_arguments(bare, given):
    """(RUNs, prompt) of the bare arguments: a RUN, a text to continue, or both. given: the prompt of an option."""
    *runs, last = bare or [""]
    looks_like_text = not os.path.exists(last) and (runs or re.search(r"[^\w./~-]", last))
    if not looks_like_text:
        return bare, given
    if given or len(bare) > 2:
        raise UserError(f"expected a RUN and a prompt, got {len(bare) + bool(given)} arguments",
                        f"quote the prompt: python sample.py {quote(' '.join(bare))}")
    return runs, last


def load_model(settings, runs):
    """(model, tokenizer, checkpoint) of the RUN that a ModelConfig and the bare arguments mean."""
    device = machine.choose_device(settings.device)
    run = ckpt.choose_run(runs, settings)
    return ckpt.load_run(run, settings.checkpoint, device, settings.quantize == "int8", settings.block_size)


def check_chat(run, tokenizer):
    path, fix = run["path"], pretrained.CHAT_FIX
    if tokenizers.END in tokenizer.special:
        folder = quote(path if os.path.isdir(path) else os.path.dirname(path) or ".")
        prepare = f"python prepare.py CHATS.jsonl --format=chat --tokenizer={folder}"
        fix = f"{prepare}, then train.py --init_from={folder}"
    if not run["chat"]:
        raise UserError(f"{path} has no chat format", fix)


def check_settings(settings):
    check_limits(settings, RANGES | {"num_samples block_size": (1, 1e9)})
    if len(settings.stop) > MAX_STOPS or not all(1 <= len(stop) <= STOP_LENGTH for stop in settings.stop):
        raise UserError(f"--stop: at most {MAX_STOPS} texts of 1 to {STOP_LENGTH} characters", "--stop='a text'")
    # A shell passes on "\n" as two characters.
    settings.stop = [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in settings.stop]
    if settings.compile:
        note("--compile has no effect on sampling")


def main(argv):
    # 1. Settings.
    settings, given, bare = load(SampleConfig, argv)
    if settings.prompt and settings.start:
        raise UserError("--start and --prompt are the same", "give one of them")
    runs, prompt = split_arguments(bare, settings.prompt or settings.start)
    check_settings(settings)
    if prompt and settings.prompts:
        raise UserError("there is a prompt beside --prompts", "give one of them")
    prompt = read_prompt(prompt)
    # 2. The model.
    model, tokenizer, run = load_model(settings, runs)
    source = run.get("kind", f"{run['step']} steps on {', '.join(run['source'])}")
    say(f"{run['path']}: {model.n_params():,} parameters, {source}{', 8-bit' * run['int8']}")
    if settings.chat:
        check_chat(run, tokenizer)
    dtype, _ = machine.choose_dtype(settings.dtype, str(model.lm_head.weight.device))
    machine.use_linear(model, dtype)
    # 3. The text.
    if settings.seed is None:
        settings.seed = int.from_bytes(os.urandom(4), "little")
    if settings.prompts:
        from serving import batch  # (which imports this file)
        return batch.answer_all(model, tokenizer, run, settings)
    writer = Writer(model, tokenizer, settings)
    if prompt or {"prompt", "start"} & set(given):
        writer.answer(prompt)
    elif sys.stdin and sys.stdin.isatty() and sys.stdout.isatty():
        ask(writer)
    else:
        for prompt in piped(settings.chat):
            writer.answer(prompt)


if __name__ == "__main__":
    command_line(main)
