# SPDX-License-Identifier: GPL-3.0-only
"""
Evaluation: how good is a model? Several of them, side by side, with numbers that can be compared.

    python evaluate.py                                      # the newest run under out/: its held-out text and tasks/
    python evaluate.py out/small out/other SmolLM2-135M-Instruct --data=data/stdlib
    python evaluate.py out/small --data=notes.txt --stride=64 --tasks=none
    python evaluate.py SmolLM2-135M-Instruct --chat --tasks=gsm8k_test.jsonl --limit=100 --cot --votes=5
    python evaluate.py out/small --json=results.json --html=results.html
    torchrun --standalone --nproc_per_node=2 evaluate.py ...    # the same numbers, sooner where each has a GPU

Three questions, each with its own pitfalls:

1. How well does it predict text? Perplexity depends on the tokenizer, on how much context a token has behind it, and on
   what was counted. Here every token but the first is predicted exactly once, in one pass; context and stride are
   stated; and the sum of all surprises, over all bytes of the text, is a number that tokenizers do not change.
2. How does it answer? A few hundred questions give a mark that is off by some percent: every mark has its standard
   error, and two models are compared question by question, which is sharper than the two errors suggest.
3. How does it write? Its samples are kept, with how much they repeat themselves, beside the same of real text.

How questions are put and marked is in grading.py, the page of --html in report.py.
"""
import json
import math
import os
import shlex
import time
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

import grading
import machine
import report
import runtime
import tokenizer as tokenizers
from config import UserError, check_limits, command_line, load, note, say, warn
from dataset import Dataset, fold
from engine import Engine, Request
from sources import documents

TASKS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tasks")
BUNDLED = sorted(name[:-6] for name in os.listdir(TASKS) if name.endswith(".jsonl"))


@dataclass
class EvaluateConfig:
    # text
    data: list[str] = field(default_factory=list)  # data/NAME (its held-out side), a file, or none; default: the run's
    megabytes: float = 0.0  # of each text only so much, from its beginning; 0: all
    block_size: int = 0  # the context, in tokens; 0: the whole context of the model
    stride: int = 0  # by how many tokens the context moves on; 0: block_size, as validation in training
    batch_size: int = 0  # windows at once; 0: about 4,096 tokens. Changes nothing but time and memory
    # questions
    tasks: list[str] = field(default_factory=list)  # a,b: names of tasks/, files, or none; by default all of tasks/
    limit: int = 0  # at most so many questions of each; 0: all
    shots: int = 0  # examples before each question
    examples: str = ""  # the file to take the examples from; by default, those that follow the question in its own file
    cot: bool = False  # chain of thought: ask for the way to a number, and show it in the examples
    chat: bool = False  # ask in the chat format, where a model has one
    votes: int = 1  # write so many answers (temperature and top_k as in sample.py) and let them vote; 1: one, greedy
    max_new_tokens: int = 0  # the longest answer; 0: 256 for a number, 32 for words
    # samples
    samples: int = 16  # texts to write and to measure; 0: none
    prompt: str = ""  # what they begin with; by default the end-of-text token
    # the results
    json: str = ""  # write everything to this file
    html: str = ""  # and a page to look at
    # how
    rows: int = 16  # texts that are written at the same time
    seed: int = 1337
    checkpoint: Literal["best", "last"] = "best"  # of a run folder: the lowest validation loss, or the newest
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # of matrix products


LIMITS = {"limit block_size stride batch_size max_new_tokens samples": (0, 1e9), "megabytes": (0, 1e6),
          "shots": (0, 1000), "votes": (1, 1000), "rows": (1, 1024), "seed": (0, 2**62)}
SAMPLE_TOKENS = 128
LONGEST = {"number": 256, "words": 32, "choice": 0}  # an answer, in tokens


# ---------------------------------------------------------------------------------------------------------------------
# 1. Text


@dataclass
class Text:
    """What is to be predicted. apart: an end-of-text token stands before the first document too, as prepare.py does."""
    name: str
    documents: list[str]
    apart: bool

    def counts(self):
        return dict(documents=len(self.documents), bytes=sum(len(text.encode()) for text in self.documents),
                    words=sum(len(text.split()) for text in self.documents))

    def ids(self, tokenizer):
        """All of it as one sequence. Nothing is put before a text; between documents stands the end-of-text token."""
        ids, end = [], tokenizer.special.get(tokenizers.END_OF_TEXT)
        for i, text in enumerate(self.documents):
            ids += [end] if end is not None and (i or self.apart) else []
            ids += tokenizer.encode(text)
        return torch.tensor(ids, dtype=torch.int64)


def read_text(source, megabytes=0.0):
    """A Text: the held-out side of data/NAME, or a file as prepare.py reads it; of it no more than so many megabytes.
    """
    folder = next((path for path in (source, os.path.join("data", source))
                   if os.path.exists(os.path.join(path, "meta.json"))), None)
    if folder:
        data = Dataset.open(folder)
        tokenizer, ids = data.check_tokenizer(), data.tokens("val", 0, data.meta["val"]["tokens"])
        borders = (ids == tokenizer.special[tokenizers.END_OF_TEXT]).nonzero()[0]
        texts = [tokenizer.decode(part[1:].tolist()) for part in np.split(ids, borders)[1:]]
    elif not os.path.exists(source):
        raise UserError(f"there is no text {source}", f"python prepare.py {source}, or --data=FILE.txt")
    else:
        texts = ["".join(document.blocks()) for document in documents([source])]
    if megabytes:
        texts, room = list(texts), int(megabytes * 1e6)
        for i, text in enumerate(texts):
            texts[i] = text.encode()[:max(room, 0)].decode(errors="ignore")  # (half a character at the end is left out)
            room -= len(text.encode())
        texts = [text for text in texts if text]
    return Text(folder or os.path.basename(os.path.normpath(source)), texts, apart=bool(folder))


@torch.inference_mode()
def total_loss(model, ids, block_size, stride, batch_size, processes):
    """The sum of -ln p over all tokens but the first, in nats: each is predicted once, in one pass. ids: (N,) int64.

    A window of block_size tokens moves on by `stride`. The first one predicts a token for each of its own; every other
    one only those `stride` that are new, which have at least block_size - stride tokens before them: a small stride is
    fairer to the model, and takes longer. Each window is summed up in float64, and the windows in the order of the
    text, so that it does not matter which process had which.
    """
    T, n = block_size, len(ids) - 1  # n tokens to predict
    count = 1 + math.ceil(max(0, n - T) / stride)
    sums, device = torch.zeros(count, dtype=torch.float64), model.lm_head.weight.device
    for i in list(range(0, count, batch_size))[processes.rank::processes.world]:
        B = min(batch_size, count - i)
        idx, targets = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), -1)
        for row in range(B):
            start = (i + row) * stride
            length = min(T, n - start)
            idx[row, :length], targets[row, :length] = ids[start:start + length], ids[start + 1:start + length + 1]
            targets[row, :T - stride if start else 0] = -1  # the window before has predicted them
        x = model.trunk(idx.to(device))  # (B, T, C)
        wanted = targets >= 0
        x, window, targets = x[wanted.to(device)], wanted.nonzero()[:, 0], targets[wanted].to(device)  # (scored, ...)
        step = max(1, (1 << 24) // model.config.vocab_size)  # scores for a large vocabulary fill the memory
        for j in range(0, len(targets), step):
            logits = model.logits(x[j:j + step]).float()  # (step, vocab_size)
            losses = F.cross_entropy(logits, targets[j:j + step], reduction="none")
            sums[i:i + B].index_add_(0, window[j:j + step], losses.double().cpu())
    return math.fsum(processes.sum(*sums.tolist()))


def measure_text(model, tokenizer, text, settings, processes):
    """The numbers of one model on one Text."""
    started, counts = time.perf_counter(), text.counts()
    context = model.config.block_size
    block_size = settings.block_size or context
    stride = settings.stride or block_size
    if block_size > context:
        raise UserError(f"block_size={block_size}, but its context is {context}", f"--block_size={context}")
    if stride > block_size:
        raise UserError(f"stride={stride} is more than block_size={block_size}: some tokens would be left out",
                        f"--stride={block_size}")
    ids = text.ids(tokenizer)
    if len(ids) < 2 or not counts["bytes"]:
        raise UserError(f"{text.name} has {len(ids)} tokens, and the first is not predicted; {counts['bytes']} bytes",
                        "a longer text")
    nats = total_loss(model, ids, block_size, stride, settings.batch_size or max(1, 4096 // block_size), processes)
    if not math.isfinite(nats):
        raise UserError("its loss is not a finite number", "--dtype=float32, or another checkpoint")
    return dict(bits_per_byte=nats / math.log(2) / counts["bytes"], perplexity=power(nats / (len(ids) - 1)),
                word_perplexity=power(nats / counts["words"]) if counts["words"] else None, tokens=len(ids), **counts,
                block_size=block_size, stride=stride, seconds=time.perf_counter() - started)


def power(x):
    """e to the x; None where that is more than a float can be (a word of a language without spaces is a sentence)."""
    return math.exp(x) if x < 709 else None


# ---------------------------------------------------------------------------------------------------------------------
# 2. Questions


def work(engine, requests, name):
    """Let the engine answer. It gets a few at a time, so that it need not look through thousands at every step."""
    told, waiting = time.monotonic(), requests[::-1]
    while waiting or engine.waiting or engine.running:
        while waiting and len(engine.waiting) < engine.rows:
            engine.submit(waiting.pop())
        engine.step()
        if time.monotonic() - told > 20:
            told = time.monotonic()
            say(f"{name}: {sum(bool(request.finish_reason) for request in requests)} of {len(requests)}")
    if any(request.finish_reason == "error" for request in requests):
        raise UserError("its scores are not finite numbers", "--dtype=float32, or another checkpoint")


def ask(item, examples, seeds, settings, tokenizer, size, chat):
    """(the requests that an item takes, whether they were cut): one for each choice, or one for each seed.

    size: the context of the model. What does not fit is cut at its beginning, where the examples are.
    """
    if item.kind == "choice":
        longest, parts = 0, grading.choice_ids(item, examples, tokenizer, chat)
        asked = [Request(ids=ids, max_tokens=0, prompt_logprobs=len(ids) - n) for ids, n in parts]
    else:
        longest = min(settings.max_new_tokens or LONGEST[item.kind], size // 2)
        ids = grading.prompt_ids(item, examples, tokenizer, settings.cot, chat)
        asked = [Request(ids=ids, max_tokens=longest, temperature=0.8 if len(seeds) > 1 else 0.0, seed=seed,
                         stop=grading.stops(chat)) for seed in seeds]
    cut = False
    for request in asked:
        over = max(0, len(request.ids) + longest - size)
        request.ids, cut = request.ids[over:], cut or over > 0
        if item.kind == "choice":
            request.prompt_logprobs -= over
            if request.prompt_logprobs < 1:
                raise UserError(f"{item.where}: a choice alone has more than the {size} tokens of its context",
                                "shorter choices")
    return asked, cut


def answer(engine, items, numbers, examples, settings, name, chat):
    """The answers to some of the items, by their numbers, each as the row of it in the report."""
    asked, rows = {}, {}
    for i in numbers:
        seeds = [fold("vote", settings.seed, i, n) for n in range(settings.votes)]
        asked[i] = ask(items[i], examples[i], seeds, settings, engine.tokenizer, engine.model.config.block_size, chat)
    work(engine, [request for requests, _ in asked.values() for request in requests], name)
    for i, (requests, cut) in asked.items():
        item = items[i]
        rows[i] = dict(where=item.where, group=item.group or item.where, right=item.right, cut=cut,
                       prompt=engine.tokenizer.decode(requests[0].ids[:requests[0].prompt_logprobs]))
        if item.kind == "choice":
            logprobs = [math.fsum(token.logprob for token in request.prompt_tokens) for request in requests]
            rows[i] |= dict(choices=item.choices, logprobs=logprobs, **grading.mark_choice(item, logprobs))
        else:
            texts = [request.text for request in requests]
            rows[i] |= dict(texts=texts, **grading.mark_text(item, texts))
    return rows


def run_task(engine, items, examples, settings, processes, name):
    """Put the items to the model, and sum up: {kind, n, metrics, ..., items}. examples: those of each item."""
    started = time.perf_counter()
    chat = settings.chat and bool(getattr(engine.tokenizer, "template", ""))
    try:
        mine = range(processes.rank, len(items), processes.world)
        rows = answer(engine, items, mine, examples, settings, name, chat)
    except UserError as error:  # maybe in one process of several: the others have to hear of it
        rows = {"error": error.fact}
    rows = processes.gather(rows)
    if "error" in rows:
        raise UserError(rows["error"], "the report has the rest")
    rows = [rows[i] for i in range(len(items))]
    groups = [row["group"] for row in rows]
    marks = {name: [row["marks"][name] for row in rows] for name in rows[0]["marks"]}
    result = dict(kind=items[0].kind, n=len(rows), chat=chat, cut=sum(row["cut"] for row in rows),
                  metrics={name: grading.mean(values, groups) for name, values in marks.items()}, items=rows,
                  seconds=time.perf_counter() - started)
    if rows[0]["confidence"] is not None:
        result["calibration"], result["calibration_error"] = grading.calibration(
            [row["confidence"] for row in rows], next(iter(marks.values())))
    if items[0].kind == "choice":
        result["chance"] = sum(1 / len(item.choices) for item in items) / len(items)
    return result


def read_tasks(settings):
    """{name: (items, the examples of each)} of --tasks, all checked before any model is loaded."""
    names = [name for names in settings.tasks or [",".join(BUNDLED)] for name in names.split(",") if name]
    found = {}
    for name in [] if names == ["none"] else names:
        path = os.path.join(TASKS, f"{name}.jsonl") if name in BUNDLED else name
        if not os.path.isfile(path):
            raise UserError(f"there is no task {name}", f"--tasks= a file, none, or some of {','.join(BUNDLED)}")
        every, shots = grading.read_task(path), settings.shots
        items = every[:settings.limit or None]
        pool = grading.read_task(settings.examples) if settings.examples else every
        if pool[0].kind != items[0].kind:
            raise UserError(f"{settings.examples} has questions of the kind {pool[0].kind}, {name} of the kind "
                            f"{items[0].kind}", "examples of the same kind, and those tasks alone")
        most = len(pool) if settings.examples else len(every) - 1
        if shots > most:
            raise UserError(f"shots={shots}, but {settings.examples or path} has {most} examples", f"--shots={most}")
        # Without a file of their own, the examples are the questions that follow, round the end of the file.
        few = [pool[:shots] if settings.examples else (every + every)[i + 1:i + 1 + shots] for i in range(len(items))]
        label = name if name in BUNDLED else os.path.splitext(os.path.basename(path))[0]
        if label in found:
            raise UserError(f"two tasks are called {label}", "each once, or in two commands")
        found[label] = items, few
    return found


def differences(models):
    """Every model beside the first one, question by question: the mean difference and its standard error.

    What makes a question hard for both falls out of the difference, so that its error is smaller than that of two
    separate marks (Miller 2024, arXiv 2411.00640).
    """
    rows = []
    for other in models[1:]:
        for name, task in other["tasks"].items():
            if name in models[0]["tasks"]:
                metric, pairs = next(iter(task["metrics"])), list(zip(task["items"], models[0]["tasks"][name]["items"]))
                rows.append(dict(model=other["model"], task=name, metric=metric, **grading.mean(
                    [ours["marks"][metric] - theirs["marks"][metric] for ours, theirs in pairs],
                    [ours["group"] for ours, _ in pairs])))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# 3. Samples


def measure_samples(engine, settings, name):
    """(the samples with their numbers, tokens per second of one text alone)."""
    end = engine.tokenizer.special.get(tokenizers.END_OF_TEXT)
    ids = engine.tokenizer.encode(settings.prompt) or ([end] if end is not None else engine.tokenizer.encode("\n"))
    longest = min(SAMPLE_TOKENS, engine.model.config.block_size - len(ids))
    if longest < 1:
        raise UserError(f"the prompt of the samples has {len(ids)} tokens, the context is "
                        f"{engine.model.config.block_size}", "a shorter --prompt")
    requests = [Request(ids=ids, max_tokens=longest, ignore_eos=True, seed=fold("sample", settings.seed, i))
                for i in range(settings.samples)]
    work(engine, requests, name)
    alone = Request(ids=ids, max_tokens=longest, ignore_eos=True, temperature=0.0)
    work(engine, [alone], name)
    rate = (alone.n - 1) / (time.monotonic() - alone.first) if alone.n > 1 else None
    texts = [request.text for request in requests]
    return dict(**grading.variety(texts), prompt=settings.prompt, texts=texts), rate


def stretches(text, n):
    """As many pieces of real text as there are samples, evenly from all of it, for comparison."""
    words = "\n".join(text.documents).split(" ")
    starts = [i * max(0, len(words) - 60) // n for i in range(n)]
    return [" ".join(words[start:start + 60]) for start in starts]


# ---------------------------------------------------------------------------------------------------------------------


def evaluate(run, name, settings, device, texts, tasks, processes):
    """The row of one model. What it cannot do (a character that it has no token for) is a warning, and left empty."""
    dtype, _ = machine.choose_dtype(settings.dtype, device)
    model, tokenizer, run = runtime.load_run(run, settings.checkpoint, device)
    row = dict(model=name, path=run["path"], parameters=model.n_params(), context=model.config.block_size,
               vocabulary=model.config.vocab_size, tokens_per_second=None, texts={}, tasks={}, quality=None, missing={})

    def attempt(what, measure):
        try:
            return measure()
        except UserError as error:
            warn(f"{name}: {what}: {error.fact}")
            row["missing"][what] = error.fact

    for text in texts:
        with machine.autocast(device, dtype):
            found = attempt(text.name, lambda: measure_text(model, tokenizer, text, settings, processes))
        if found:
            row["texts"][text.name] = found
            say(f"{name}: {text.name}: {found['bits_per_byte']:.4f} bits per byte, {found['seconds']:.0f} s")
    if texts and texts[0].name in row["texts"]:
        first = row["texts"][texts[0].name]
        row |= {key: first[key] for key in ("bits_per_byte", "perplexity", "word_perplexity")}
    if not (settings.samples or tasks):
        return row
    engine = Engine(model, tokenizer, rows=settings.rows, dtype=dtype)
    if settings.samples and processes.rank == 0:
        found = attempt("samples", lambda: measure_samples(engine, settings, f"{name}: samples"))
        if found:
            row["quality"], row["tokens_per_second"] = found
    for task, (items, examples) in tasks.items():
        found = attempt(task, lambda: run_task(engine, items, examples, settings, processes, f"{name}: {task}"))
        if found:
            row["tasks"][task] = found
            marks = ", ".join(f"{metric} {report.percent(mark)}" for metric, mark in found["metrics"].items())
            say(f"{name}: {task}: {marks}, {found['n']} questions, {found['seconds']:.0f} s"
                + (f"; {found['cut']} prompts were cut at their beginning, to fit" if found["cut"] else ""))
    return row


def names_of(runs):
    """A short name for each RUN: its last part, or all of it where that is not enough."""
    last = [os.path.basename(os.path.normpath(run)) for run in runs]
    return [name if last.count(name) == 1 else os.path.normpath(run) for name, run in zip(last, runs)]


def default_data(runs, settings):
    """What the first of the runs was trained on, if it is there."""
    for run in runs:
        if not os.path.exists(os.path.join(run, "config.json")):
            dataset = runtime.read_run(run, settings.checkpoint)[0]["settings"].get("dataset", "")
            if dataset and os.path.exists(os.path.join("data", dataset, "meta.json")):
                return [os.path.join("data", dataset)]
    note("none of the runs names a text that is here: --data=FILE for bits per byte and perplexity")
    return []


def write(path, text):
    try:
        with open(path + ".part", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(path + ".part", path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "make room, or another name", code=1) from None


def main(argv):
    settings, _, runs = load(EvaluateConfig, argv)
    check_limits(settings, LIMITS)
    started, processes = time.perf_counter(), machine.Processes()
    device = machine.choose_device(settings.device, processes)
    runs = runs or [runtime.find_run()]
    for run in runs:
        if not os.path.exists(run):
            raise UserError(f"there is no run {run}", "python train.py config/train_small.py trains one into out/small")
    if len(set(map(os.path.realpath, runs))) < len(runs):
        raise UserError("the same run is named twice", "each once")
    tasks = read_tasks(settings)
    sources = settings.data or default_data(runs, settings)
    texts = [read_text(source, settings.megabytes) for source in sources if source != "none"]
    for i, text in enumerate(texts):
        if text.name in [other.name for other in texts[:i]]:
            raise UserError(f"two texts are called {text.name}", "each once, or in two commands")
    processes.join(device, "auto", 1800)
    machine.set_up(device, processes)

    results = dict(command=shlex.join(["python", "evaluate.py", *argv]), date=time.strftime("%Y-%m-%d"),
                   settings=asdict(settings), versions=machine.versions(device, processes.world), models=[],
                   texts={text.name: text.counts() for text in texts})
    if texts and settings.samples:
        results["reference"] = dict(name=texts[0].name, **grading.variety(stretches(texts[0], settings.samples)))
    for run, name in zip(runs, names_of(runs)):
        results["models"].append(evaluate(run, name, settings, device, texts, tasks, processes))
        results |= dict(differences=differences(results["models"]), seconds=time.perf_counter() - started)
        if processes.rank == 0:  # after every model: a later one that fails takes nothing with it
            if settings.json:
                write(settings.json, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
            if settings.html:
                write(settings.html, report.page(results))
    if processes.rank == 0:
        print(report.tables(results), flush=True)
    return 0


if __name__ == "__main__":
    command_line(main)
