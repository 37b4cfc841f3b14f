# SPDX-License-Identifier: GPL-3.0-only
"""
Evaluation: how good is a model? Several of them, side by side, with numbers that can be compared.

    python evaluate.py                                      # the newest run under out/: its held-out text and our tasks
    python evaluate.py out/small out/other SmolLM2-135M-Instruct --data=data/stdlib
    python evaluate.py out/small --data=notes.txt --stride=64 --tasks=none
    python evaluate.py SmolLM2-135M-Instruct --chat --tasks=gsm8k_test.jsonl --limit=100 --cot --votes=5
    python evaluate.py out/small --json=results.json --html=results.html
    torchrun --standalone --nproc_per_node=2 evaluate.py ...    # the same numbers, sooner where each has a GPU

Three questions, each with its own pitfalls:

1. How well does it predict text? (evaluation/perplexity.py) Bits per byte can be compared between all models; the
   context and the stride that they were measured with are stated.
2. How does it answer? (evaluation/grading.py) A few hundred questions give a mark that is off by some percent: every
   mark has its standard error, and two models are compared question by question, which is sharper than the two errors
   suggest.
3. How does it write? Its samples are kept, with how much they repeat themselves, beside the same of real text.

The tables are in evaluation/report.py, the page of --html is report.html.
"""
import errno
import gc
import itertools
import json
import math
import os
import shlex
import time
from dataclasses import asdict, dataclass, field

import torch

from evaluation import grading
from formats import huggingface
from runtime import machine
from evaluation import report
from training import checkpoint as ckpt
import tokenizer as tokenizers
from runtime.console import UserError, command_line, note, say, warn
from runtime.settings import check_limits, load
from dataset import Dataset, fold
from serving.engine import Engine, Request
from evaluation.perplexity import measure_text, read_text
from sample import ModelConfig, read_prompt

TASKS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "evaluation", "tasks")
BUNDLED = sorted(name[:-6] for name in os.listdir(TASKS) if name.endswith(".jsonl"))


@dataclass
class EvaluateConfig(ModelConfig):
    # text
    data: list[str] = field(default_factory=list)  # a,b: data/NAME (held-out side), files, or none; default: the run's
    text_field: str = "text"  # the field of a .jsonl line that holds the text
    megabytes: float = 0.0  # of each text only so much, from its beginning; 0: all
    block_size: int = 0  # the context, in tokens; 0: the whole context of the model
    stride: int = 0  # by how many tokens the context moves on; 0: block_size, as validation in training
    batch_size: int = 0  # windows at once; 0: about 4,096 tokens. Changes nothing but time and memory
    # questions
    tasks: list[str] = field(default_factory=list)  # a,b: names of evaluation/tasks, files, or none; default: all
    limit: int = 0  # at most so many questions of each; 0: all
    shots: int = 0  # examples before each question
    examples: str = ""  # the file to take the examples from; by default, those that follow the question in its own file
    cot: bool = False  # chain of thought: ask for the way to a number, and show it in the examples
    chat: bool = False  # ask in the chat format, where a model has one
    votes: int = 1  # write so many answers (temperature 0.8, top_k 50) and let them vote; 1: one, greedily
    max_new_tokens: int = 0  # the longest answer; 0: 256 for a number, 32 for words; half of the context at most
    # samples
    samples: int = 16  # texts to write and to measure; 0: none
    prompt: str = ""  # what they begin with, FILE:path reads it from a file; by default the end-of-text token
    # the results
    json: str = ""  # write everything to this file
    html: str = ""  # and a page to look at
    # how
    rows: int = 16  # texts that are written at the same time
    seed: int = 1337


LIMITS = {"limit block_size stride batch_size max_new_tokens samples": (0, 1e9), "megabytes": (0, 1e6),
          "shots": (0, 1000), "votes": (1, 1000), "rows": (1, 1024), "seed": (0, 2**62)}
SAMPLE_TOKENS = 128
LONGEST = {"number": 256, "words": 32, "choice": 0}  # an answer, in tokens


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def work(engine, requests, name):
    """Let the engine answer. It gets a few at a time, so that it need not look through thousands at every step."""
    tell, waiting = now_and_then(name), requests[::-1]
    while waiting or engine.waiting or engine.running:
        while waiting and len(engine.waiting) < engine.rows:
            engine.submit(waiting.pop())
        engine.step()
        tell(len(requests) - len(waiting) - len(engine.waiting) - len(engine.running), len(requests))
    if any(request.finish_reason == "error" for request in requests):
        raise UserError("its scores are not finite numbers", "--dtype=float32, or another checkpoint")


def ask(item, examples, seeds, settings, tokenizer, size, chat):
    """(the requests that an item takes, whether they were cut): one for each choice, or one for each seed.

    size: the context of the model. What does not fit is cut at its beginning, where the examples are. For a choice
    nothing is written: prompt_logprobs is the token from which on log-probabilities are wanted, the choice's first.
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
                raise UserError(f"{item.where}: a choice leaves no room for its prompt in the {size} tokens of the "
                                "context", "shorter choices")
    return asked, cut


def answer(engine, items, numbers, examples, settings, name, chat):
    """The answers to some of the items, by their numbers, each as the row of it in the report."""
    asked, rows = {}, {}
    for i in numbers:
        seeds = [fold("vote", settings.seed, i, n) for n in range(settings.votes)]
        asked[i] = ask(items[i], examples[i], seeds, settings, engine.tokenizer, engine.context, chat)
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
            # (of words the first line counts, and of a number what comes at the end)
            unfinished = sum(request.finish_reason == "length" for request in requests) * (item.kind == "number")
            rows[i] |= dict(texts=texts, unfinished=unfinished, longest=requests[0].max_tokens,
                            **grading.mark_text(item, texts))
    return rows


def run_task(engine, items, examples, settings, processes, name, chat=False):
    """Put the items to the model, and sum up: {kind, n, metrics, ..., items}. examples: those of each item.

    chat: in its chat format, not as a text.
    """
    started = time.perf_counter()
    try:
        mine = range(processes.rank, len(items), processes.world)
        rows = answer(engine, items, mine, examples, settings, name, chat)
    except UserError as error:  # maybe in one process of several: the others have to hear of it
        rows = {"error": (error.fact, error.fix)}
    rows = processes.gather(rows)
    if "error" in rows:
        raise UserError(*rows["error"])
    rows = [rows[i] for i in range(len(items))]
    groups = [row["group"] for row in rows]
    marks = {name: [row["marks"][name] for row in rows] for name in rows[0]["marks"]}
    result = dict(kind=items[0].kind, n=len(rows), chat=chat, cut=sum(row["cut"] for row in rows),
                  unfinished=sum(row.get("unfinished", 0) for row in rows), longest=rows[0].get("longest", 0),
                  metrics={name: grading.mean(values, groups) for name, values in marks.items()}, items=rows,
                  seconds=time.perf_counter() - started)
    if rows[0]["confidence"] is not None:
        result["calibration"], result["calibration_error"] = grading.calibration(
            [row["confidence"] for row in rows], next(iter(marks.values())))
    if items[0].kind == "choice":
        result["chance"] = sum(1 / len(item.choices) for item in items) / len(items)
    return result


def may_show(example, item):
    """Not the question itself, nor one on the same passage: its answer tells what is asked of such a text."""
    return example.prompt != item.prompt and not (item.group and example.group == item.group)


def read_tasks(settings):
    """{name: (items, the examples of each)} of --tasks, all checked before any model is loaded."""
    names, found = ",".join(settings.tasks or BUNDLED).split(","), {}
    if settings.examples and not settings.shots:
        raise UserError("--examples, but shots=0", "--shots=4")
    for name in [] if names == ["none"] else names:
        path = os.path.join(TASKS, f"{name}.jsonl") if name in BUNDLED else name
        if not os.path.isfile(path):
            raise UserError(f"there is no task {name!r}", f"--tasks=FILE, or none, or some of {','.join(BUNDLED)}")
        every, shots = grading.read_task(path), settings.shots
        items = every[:settings.limit or None]
        pool = grading.read_task(settings.examples) if settings.examples else every
        if pool[0].kind != items[0].kind:
            raise UserError(f"{settings.examples} has questions of the kind {pool[0].kind}, {name} of the kind "
                            f"{items[0].kind}", "examples of the same kind, and those tasks alone")
        few = []
        for i, item in enumerate(items):
            # Without a file of their own, the examples are the questions that follow, round the end of the file.
            others = pool if settings.examples else (every[(i + k) % len(every)] for k in range(1, len(every)))
            few.append(list(itertools.islice((other for other in others if may_show(other, item)), shots)))
            if len(few[i]) < shots:
                raise UserError(f"shots={shots}, but {settings.examples or path} has only {len(few[i])} examples for "
                                f"{item.where} (not itself, and none on its passage)", f"--shots={len(few[i])}")
        label = name if name in BUNDLED else os.path.splitext(os.path.basename(path))[0]
        if label in found:
            raise UserError(f"two tasks are called {label}", "each once, or in two commands")
        found[label] = items, few
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def measure_samples(engine, settings, name):
    """(the samples with their numbers, tokens per second of one text alone, the best of three)."""
    end = engine.tokenizer.special.get(tokenizers.END_OF_TEXT)
    ids = engine.tokenizer.encode(settings.prompt) or ([end] if end is not None else engine.tokenizer.encode("\n"))
    longest = min(SAMPLE_TOKENS, engine.context - len(ids))
    if longest < 1:
        raise UserError(f"the prompt of the samples has {len(ids)} tokens, the context is "
                        f"{engine.context}", "a shorter --prompt")
    requests = [Request(ids=ids, max_tokens=longest, ignore_eos=True, seed=fold("sample", settings.seed, i))
                for i in range(settings.samples)]
    work(engine, requests, name)
    rates = []
    for _ in range(3):  # whatever else the machine does can only slow it down
        alone = Request(ids=ids, max_tokens=longest, ignore_eos=True, temperature=0.0)
        work(engine, [alone], name)
        rates.append((alone.n - 1) / (time.monotonic() - alone.first))
    texts = [request.text for request in requests]
    return dict(**grading.variety(texts), prompt=settings.prompt, texts=texts), max(rates) or None


def real_text(text, samples):
    """The numbers of real text: of as many pieces as there are samples, each as long as one, as far as they fit."""
    words = grading.words_of("\n".join(text.documents))
    lengths = [min(len(grading.words_of(sample)), grading.SAMPLE_WORDS) for sample in samples]
    n = max(1, min(len(lengths), len(words) // max(1, *lengths)))
    pieces = [" ".join(words[start:start + length]) for start, length in
              zip(range(0, len(words), max(1, len(words) // n)), lengths[:n])]
    return dict(name=text.name, **grading.variety(pieces))


# ---------------------------------------------------------------------------------------------------------------------


def evaluate(run, row, settings, device, texts, tasks, processes, save):
    """Fill in the row of one model; what it cannot do (a character that it has no token for) is a warning.

    save: is called whenever there is something new.
    """
    name, dtype = row["model"], getattr(torch, settings.dtype)
    model, tokenizer, about = ckpt.load_run(run, settings.checkpoint, device, settings.quantize == "int8")
    dtype = torch.float32 if about["int8"] else dtype  # what is not in 8 bits
    row |= dict(path=about["path"], parameters=model.n_params(), context=model.config.block_size)

    def attempt(what, measure):
        try:
            found = measure()
        except UserError as error:
            warn(f"{name}: {what}: {error.fact} ({error.fix})")
            row["missing"][what], found = error.fact, None
        return found

    for text in texts:
        dataset = about["settings"].get("dataset")
        if dataset and text.name == os.path.join("data", dataset) and text.sha256 != about.get("data_sha256"):
            warn(f"{name} was trained on another {text.name} than there is now, and may know what is held out of it")
        with machine.autocast(device, dtype):
            found = attempt(text.name, lambda: measure_text(
                model, tokenizer, text, settings.block_size, settings.stride, settings.batch_size, processes,
                now_and_then(f"{name}: {text.name}: windows")))
        if found:
            row["texts"][text.name] = found
            say(f"{name}: {text.name}: {found['bits_per_byte']:.4f} bits per byte, {found['seconds']:.0f} s")
            if text is texts[0]:
                row |= {key: found[key] for key in ("bits_per_byte", "perplexity", "word_perplexity")}
        save()
    if not (settings.samples or tasks):
        return
    engine = Engine(model, tokenizer, rows=settings.rows, dtype=dtype)
    chat = settings.chat and about["chat"]
    if settings.chat and not chat:
        note(f"{name} has no chat format: it is asked as a text")
    if settings.samples:
        if processes.rank == 0:
            found = attempt("samples", lambda: measure_samples(engine, settings, f"{name}: samples"))
            if found:
                row["quality"], row["tokens_per_second"] = found
            save()
        processes.wait()  # so that the others do not take the processor from it
    for task, (items, examples) in tasks.items():
        found = attempt(task, lambda: run_task(engine, items, examples, settings, processes, f"{name}: {task}", chat))
        if found:
            row["tasks"][task] = found
            marks = ", ".join(f"{report.HEADINGS[metric]} {report.percent(mark)}"
                              for metric, mark in found["metrics"].items())
            say(f"{name}: {task}: {marks}; {found['n']} questions, {found['seconds']:.0f} s")
        save()


def save(results, settings, texts, started):
    """Bring the results up to date, and write them down."""
    quality = next((row["quality"] for row in results["models"] if row["quality"]), None)
    if texts and quality and "reference" not in results:
        results["reference"] = real_text(texts[0], quality["texts"])
    results |= dict(differences=grading.differences(results["models"]), seconds=time.perf_counter() - started)
    if settings.json:
        write(settings.json, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
    if settings.html:
        write(settings.html, report.page(results))


def now_and_then(name, seconds=20):
    """A function (done, total) that says how far the work is, but not more often than this."""
    told = time.monotonic()

    def tell(done, total):
        nonlocal told
        if time.monotonic() - told > seconds:
            told = time.monotonic()
            say(f"{name}: {done:,} of {total:,}")
    return tell


def names_of(runs):
    """A short name for each RUN: the last part of its folder, or all of it where that is not enough."""
    last = [os.path.basename(os.path.dirname(os.path.abspath(run)) if os.path.isfile(run) else os.path.abspath(run))
            for run in runs]
    return [name if last.count(name) == 1 else os.path.normpath(run) for name, run in zip(last, runs)]


def default_data(runs, settings):
    """What the first of the runs was trained on, if it is there."""
    for run in runs:
        if not huggingface.is_folder(run):
            dataset = ckpt.read_run(run, settings.checkpoint)[0]["settings"].get("dataset", "")
            folder = os.path.join("data", dataset)
            if dataset and os.path.exists(os.path.join(folder, "meta.json")) and not Dataset.open(folder).chat:
                return [folder]
    note("none of the runs names a text that is here: --data=FILE for bits per byte and perplexity")
    return []


def write(path, text=None):
    """Write a file, whole or not at all. Without a text: only see whether it could be written."""
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with open(path + ".part", "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text or "")
        os.unlink(path + ".part") if text is None else os.replace(path + ".part", path)
    except OSError as error:
        first = "make its folder" if isinstance(error, FileNotFoundError) else "make room"
        raise UserError(f"cannot write {path}: {error.strerror}", f"{first}, or another name", code=1) from None


def main(argv):
    settings, _, runs = load(EvaluateConfig, argv)
    check_limits(settings, LIMITS)
    started, processes = time.perf_counter(), machine.Processes()
    device = machine.choose_device(settings.device, processes)
    runs = runs or [ckpt.choose_run(runs, settings)]
    for run in runs:
        if not os.path.exists(run):
            raise UserError(f"there is no run {run}", "python train.py config/train_small.py trains one into out/small")
        if not huggingface.is_folder(run):
            ckpt.read_run(run, settings.checkpoint)  # better now than after an hour of work on another one
    if len(set(map(os.path.realpath, runs))) < len(runs):
        raise UserError("the same run is named twice", "each once")
    settings.prompt = read_prompt(settings.prompt)
    settings.dtype = str(machine.choose_dtype(settings.dtype, device)[0]).removeprefix("torch.")
    if settings.stride > settings.block_size > 0:
        raise UserError(f"stride={settings.stride} is more than block_size={settings.block_size}: some tokens would "
                        "be left out", f"--stride={settings.block_size}")
    tasks = read_tasks(settings)
    kinds = {items[0].kind for items, _ in tasks.values()}
    if settings.votes > 1 and kinds <= {"choice"} or settings.cot and "number" not in kinds:
        note("--votes is for questions that are answered in writing, --cot for those with a number: here are none")
    sources = settings.data or default_data(runs, settings)
    texts = [read_text(source, settings.megabytes, settings.text_field)
             for source in ",".join(sources).split(",") if source not in ("none", "")]
    for i, text in enumerate(texts):
        if text.name in [other.name for other in texts[:i]]:
            raise UserError(f"two texts are called {text.name}", "each once, or in two commands")
    if settings.json and settings.json == settings.html:
        raise UserError(f"--json and --html are both {settings.json}", "two names")
    if os.path.exists(settings.html) and os.path.samefile(settings.html, report.PAGE):
        raise UserError(f"--html={settings.html} is the page that the results are put into", "--html=results.html")
    for path in filter(None, (settings.json, settings.html) if processes.rank == 0 else ()):
        write(path)  # now, and not after an hour of work
    processes.join(device, "auto", 86400)
    machine.set_up(device, processes)

    results = dict(command=shlex.join(["python", "evaluate.py", *argv]), date=time.strftime("%Y-%m-%d"),
                   settings=asdict(settings), versions=machine.versions(device, processes.world), models=[],
                   texts={text.name: text.counts() for text in texts})
    first = processes.rank == 0
    try:
        for run, name in zip(runs, names_of(runs)):
            row = dict(model=name, parameters=None, bits_per_byte=None, perplexity=None, word_perplexity=None,
                       tokens_per_second=None, texts={}, tasks={}, quality=None, missing={})
            results["models"].append(row)
            evaluate(run, row, settings, device, texts, tasks, processes,
                     lambda: save(results, settings, texts, started) if first else None)
            gc.collect()  # the engine and its model name each other, and large ones should not wait for their end
    finally:  # what there is, is shown, whatever comes in between
        results["models"] = [row for row in results["models"] if row["parameters"]]
        if first and results["models"]:
            results |= dict(differences=grading.differences(results["models"]), seconds=time.perf_counter() - started)
            print(report.tables(results), flush=True)
    return 0


if __name__ == "__main__":
    command_line(main)
