# SPDX-License-Identifier: GPL-3.0-only
"""
Evaluation: how good is a model, and which of two is better?

    python evaluate.py                                      # the newest run under out/: its validation text, our tasks
    python evaluate.py out/small out/other SmolLM2-135M-Instruct --data=data/stdlib
    python evaluate.py out/small --data=notes.txt --stride=64 --tasks=none
    python evaluate.py SmolLM2-135M-Instruct --chat --tasks=gsm8k_test.jsonl --limit=100 --cot --votes=5
    python evaluate.py out/small --json=results.json --html=results.html
    torchrun --standalone --nproc_per_node=2 evaluate.py ...    # the same numbers, sooner where each has a GPU

Three questions, each with its own pitfalls:

1. How well does it predict text? (evaluation/perplexity.py) Bits per byte compare all models, with the same context.
2. How does it answer? (evaluation/grading.py) A score on a few hundred questions is off by some percent, so it has a
   standard error. Two models are compared question by question, which is sharper.
3. How does it write? Its samples are kept, with how much they repeat themselves, beside the same of real text.
"""
import gc
import itertools
import json
import math
import os
import shlex
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field

import torch

import tokenizer as tokenizers
from dataset import Dataset, fold
from evaluation import grading, report
from evaluation.perplexity import measure_text, read_text
from formats import huggingface
from runtime import machine
from runtime.console import UserError, command_line, note, say, warn
from runtime.files import replace_file
from runtime.processes import Processes
from runtime.settings import check_limits, load
from sample import ModelConfig, read_prompt
from serving.engine import Engine, Request
from training import checkpoint as ckpt

TASKS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "evaluation", "tasks")
BUNDLED = sorted(name.removesuffix(".jsonl") for name in os.listdir(TASKS) if name.endswith(".jsonl"))


@dataclass
class EvaluateConfig(ModelConfig):
    # text
    data: list[str] = field(default_factory=list)  # a,b: data/NAME (validation split), files, none; default: the run's
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
LONGEST = {"number": 256, "words": 32}  # an answer, in tokens


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def read_tasks(settings):
    """{name: (items, the examples of each)} of --tasks, all checked before any model is loaded."""
    if settings.examples and not settings.shots:
        raise UserError("--examples, but shots=0", "--shots=4")
    tasks, names = {}, ",".join(settings.tasks or BUNDLED).split(",")
    for name in [] if names == ["none"] else names:
        path = os.path.join(TASKS, f"{name}.jsonl") if name in BUNDLED else name
        if not os.path.isfile(path):
            raise UserError(f"there is no task {name!r}", f"--tasks=FILE, or none, or some of {','.join(BUNDLED)}")
        label = os.path.splitext(os.path.basename(path))[0]
        if label in tasks:
            raise UserError(f"two tasks are called {label}", "each once, or in two commands")
        items = grading.read_task(path)
        pool = grading.read_task(settings.examples) if settings.examples else items
        if pool[0].kind != items[0].kind:
            raise UserError(f"{settings.examples} has questions of the kind {pool[0].kind}, {name} of the kind "
                            f"{items[0].kind}", "examples of the same kind, and those tasks alone")
        asked = items[:settings.limit or None]
        tasks[label] = asked, [choose_examples(i, items, pool, settings.examples or path, settings.shots)
                               for i in range(len(asked))]
    return tasks


def choose_examples(i, items, pool, pool_path, shots):
    """The examples before question i: the first of their own file, or those that follow it, round the end of the file.

    Neither the question itself nor one on the same passage, whose answer tells what is asked of such a text.
    """
    item, start = items[i], i + 1 if pool is items else 0
    others = (pool[(start + k) % len(pool)] for k in range(len(pool)))
    allowed = (other for other in others
               if other.prompt != item.prompt and (not item.group or other.group != item.group))
    examples = list(itertools.islice(allowed, shots))
    if len(examples) < shots:
        raise UserError(f"shots={shots}, but {pool_path} has only {len(examples)} examples for {item.where} (not "
                        "itself, and none on its passage)", f"--shots={len(examples)}")
    return examples


def requests_for(item, examples, seeds, settings, engine, chat):
    """What the engine has to do: score each choice, or write an answer for each seed."""
    if item.kind == "choice":
        # prompt_logprobs: log-probabilities are wanted from this token on, the choice's first.
        return [Request(ids=ids, max_tokens=0, prompt_logprobs=len(ids) - n)
                for ids, n in grading.choice_ids(item, examples, engine.tokenizer, chat)]
    ids = grading.prompt_ids(item, examples, engine.tokenizer, settings.cot, chat)
    longest = min(settings.max_new_tokens or LONGEST[item.kind], engine.context // 2)
    stop = [] if chat else ["\nQuestion:"]  # a text goes on with a question of its own
    return [Request(ids=ids, max_tokens=longest, temperature=0.8 if len(seeds) > 1 else 0.0, seed=seed, stop=stop)
            for seed in seeds]


def cut_to_fit(requests, item, size):
    """Cut what does not fit into the context at its beginning, where the examples are. Was anything cut?"""
    cut = False
    for request in requests:
        over = max(0, len(request.ids) + request.max_tokens - size)
        request.ids, cut = request.ids[over:], cut or over > 0
        if item.kind == "choice":
            request.prompt_logprobs -= over
            if request.prompt_logprobs < 1:
                raise UserError(f"{item.where}: a choice leaves no room for its prompt in the {size} tokens of the "
                                "context", "shorter choices")
    return cut


def work(engine, requests, name):
    """Let the engine answer. It looks through those that wait at every step, so it gets a few at a time."""
    tell, waiting = now_and_then(name), deque(requests)
    while waiting or engine.waiting or engine.running:
        while waiting and len(engine.waiting) < engine.rows:
            engine.submit(waiting.popleft())
        engine.step()
        tell(len(requests) - len(waiting) - len(engine.waiting) - len(engine.running), len(requests))
    if any(request.finish_reason == "error" for request in requests):
        raise UserError("its scores are not finite numbers", "--dtype=float32, or another checkpoint")


def row_of(item, requests, cut, tokenizer):
    """A question and its answer, as a row of the report."""
    prompt = requests[0].ids[:requests[0].prompt_logprobs]
    row = dict(where=item.where, group=item.group or item.where, right=item.right, cut=cut,
               prompt=tokenizer.decode(prompt))
    if item.kind == "choice":
        logprobs = [math.fsum(token.logprob for token in request.prompt_tokens) for request in requests]
        return row | dict(choices=item.choices, logprobs=logprobs, **grading.score_choice(item, logprobs))
    texts, unfinished = [request.text for request in requests], 0
    if item.kind == "number":  # it stands at the end; of words the first line counts
        unfinished = sum(request.finish_reason == "length" for request in requests)
    return row | dict(texts=texts, unfinished=unfinished, longest=requests[0].max_tokens,
                      **grading.score_text(item, texts))


def run_task(engine, items, examples, settings, processes, name, chat=False):
    """Ask all items, and sum up: {kind, n, metrics, ..., items}. examples: those of each item.

    chat: in the model's chat format, not as a text.
    """
    # 1. Each process asks some of them
    started, asked = time.perf_counter(), {}
    try:
        for i in range(processes.rank, len(items), processes.world):
            seeds = [fold("vote", settings.seed, i, n) for n in range(settings.votes)]
            requests = requests_for(items[i], examples[i], seeds, settings, engine, chat)
            asked[i] = requests, cut_to_fit(requests, items[i], engine.context)
        work(engine, [request for requests, _ in asked.values() for request in requests], name)
        rows = {i: row_of(items[i], *found, engine.tokenizer) for i, found in asked.items()}
    except UserError as error:  # maybe in one process of several: the others have to hear of it
        rows = {"error": (error.fact, error.fix)}
    rows = {i: row for part in processes.all_gather(rows) for i, row in part.items()}
    if "error" in rows:
        raise UserError(*rows["error"])

    # 2. All sum up
    rows = [rows[i] for i in range(len(items))]
    groups = [row["group"] for row in rows]
    scores = {metric: [row["marks"][metric] for row in rows] for metric in rows[0]["marks"]}
    result = dict(kind=items[0].kind, n=len(rows), chat=chat, cut=sum(row["cut"] for row in rows),
                  unfinished=sum(row.get("unfinished", 0) for row in rows), longest=rows[0].get("longest", 0),
                  metrics={metric: grading.mean(values, groups) for metric, values in scores.items()}, items=rows,
                  seconds=time.perf_counter() - started)
    if rows[0]["confidence"] is not None:
        confidences = [row["confidence"] for row in rows]
        table, error = grading.calibration(confidences, next(iter(scores.values())))
        result |= dict(calibration=table, calibration_error=error)
    if items[0].kind == "choice":
        result["chance"] = sum(1 / len(item.choices) for item in items) / len(items)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def measure_samples(engine, settings, name):
    """(the samples with their numbers, tokens per second of one text alone, the best of three)."""
    tokenizer = engine.tokenizer
    ids, end = tokenizer.encode(settings.prompt), tokenizer.special.get(tokenizers.END_OF_TEXT)
    if not ids:
        ids = tokenizer.encode("\n") if end is None else [end]
    longest = min(SAMPLE_TOKENS, engine.context - len(ids))
    if longest < 1:
        raise UserError(f"the prompt of the samples has {len(ids)} tokens, the context is "
                        f"{engine.context}", "a shorter --prompt")
    requests = [Request(ids=ids, max_tokens=longest, ignore_eos=True, seed=fold("sample", settings.seed, i))
                for i in range(settings.samples)]
    work(engine, requests, name)
    speeds = []
    for _ in range(3):  # whatever else the machine does can only slow it down
        alone = Request(ids=ids, max_tokens=longest, ignore_eos=True, temperature=0.0)
        work(engine, [alone], name)
        speeds.append((alone.n - 1) / (time.monotonic() - alone.first))
    texts = [request.text for request in requests]
    return dict(**grading.variety(texts), prompt=settings.prompt, texts=texts), max(speeds) or None


def real_text(text, samples):
    """The numbers of real text: of pieces from all over it, as long as the samples, as far as they fit."""
    words = grading.words_of("\n".join(text.documents))
    lengths = [min(len(grading.words_of(sample)), grading.SAMPLE_WORDS) for sample in samples]
    apart = max(len(words) // len(lengths), *lengths)  # so that no two have the same words
    pieces = [" ".join(words[i * apart:i * apart + length]) for i, length in enumerate(lengths)]
    return dict(name=text.name, **grading.variety(pieces))


# ---------------------------------------------------------------------------------------------------------------------
# All of it


def evaluate(run, name, settings, device, texts, tasks, processes, models, save):
    """Append one model to `models`. What it cannot do (a character that it has no token for) is a warning.

    save: is called whenever there is something new.
    """
    # 1. The model
    model, tokenizer, about = ckpt.load_run(run, settings.checkpoint, device, settings.quantize == "int8")
    dtype = torch.float32 if about["int8"] else getattr(torch, settings.dtype)  # of what is not in 8 bits
    row = dict(model=name, path=about["path"], parameters=model.n_params(), context=model.config.block_size,
               bits_per_byte=None, perplexity=None, word_perplexity=None, tokens_per_second=None,
               texts={}, tasks={}, quality=None, missing={})
    models.append(row)

    def attempt(what, measure, *args):
        try:
            return measure(*args)
        except UserError as error:
            warn(f"{name}: {what}: {error.fact} ({error.fix})")
            row["missing"][what] = error.fact

    # 2. Text
    for text in texts:
        if text.name == data_of(about) and text.sha256 != about.get("data_sha256"):
            warn(f"{name} was trained on another {text.name} than there is now, and may know what is held out of it")
        with machine.autocast(device, dtype):
            found = attempt(text.name, measure_text, model, tokenizer, text, settings.block_size, settings.stride,
                            settings.batch_size, processes, now_and_then(f"{name}: {text.name}: windows"))
        if found:
            row["texts"][text.name] = found
            say(f"{name}: {text.name}: {found['bits_per_byte']:.4f} bits per byte, {found['seconds']:.0f} s")
            if text is texts[0]:
                row |= {key: found[key] for key in ("bits_per_byte", "perplexity", "word_perplexity")}
        save()
    if not (settings.samples or tasks):
        return

    # 3. Samples
    engine = Engine(model, tokenizer, rows=settings.rows, dtype=dtype)
    if settings.samples:
        if processes.rank == 0:
            found = attempt("samples", measure_samples, engine, settings, f"{name}: samples")
            if found:
                row["quality"], row["tokens_per_second"] = found
            save()
        processes.barrier()  # so that the others do not take the processor from it

    # 4. Questions
    chat = settings.chat and about["chat"]
    if settings.chat and not chat:
        note(f"{name} has no chat format: it is asked as a text")
    for task, (items, examples) in tasks.items():
        found = attempt(task, run_task, engine, items, examples, settings, processes, f"{name}: {task}", chat)
        if found:
            row["tasks"][task] = found
            scores = ", ".join(f"{report.HEADINGS[metric]} {report.percent(score)}"
                               for metric, score in found["metrics"].items())
            say(f"{name}: {task}: {scores}; {found['n']} questions, {found['seconds']:.0f} s")
        save()


def now_and_then(name, seconds=20):
    """A function (done, total) that says how far the work is, but not more often than this."""
    last = time.monotonic()

    def tell(done, total):
        nonlocal last
        if time.monotonic() - last > seconds:
            last = time.monotonic()
            say(f"{name}: {done:,} of {total:,}")
    return tell


def names_of(runs):
    """A short name for each RUN: that of its folder, or all of the path where two have the same."""
    folders = [os.path.dirname(run) if os.path.isfile(run) else run for run in map(os.path.abspath, runs)]
    names = list(map(os.path.basename, folders))
    return [name if names.count(name) == 1 else os.path.normpath(run) for name, run in zip(names, runs)]


def data_of(checkpoint):
    """The folder of the data that a run was trained on, "" if it does not say."""
    name = checkpoint["settings"].get("dataset")
    return os.path.join("data", name) if name else ""


def check_runs(runs, which):
    """Read every run, before an hour of work on another one. Returns the folders of data that they were trained on."""
    folders = []
    for run in runs:
        if not os.path.exists(run):
            raise UserError(f"there is no run {run}", "python train.py config/train_small.py trains one into out/small")
        if not huggingface.is_folder(run):
            folders.append(data_of(ckpt.read_run(run, which)[0]))
    if len(set(map(os.path.realpath, runs))) < len(runs):
        raise UserError("the same run is named twice", "each once")
    return folders


def read_texts(settings, folders):
    """The texts of --data, by default that of the first folder that is there and holds no conversations."""
    here = (folder for folder in folders if folder and os.path.exists(os.path.join(folder, "meta.json")))
    sources = settings.data or list(itertools.islice((one for one in here if not Dataset.open(one).chat), 1))
    if not sources:
        note("none of the runs names a text that is here: --data=FILE for bits per byte and perplexity")
    texts = [read_text(source, settings.megabytes, settings.text_field)
             for source in ",".join(sources).split(",") if source not in ("none", "")]
    for name, n in Counter(text.name for text in texts).items():
        if n > 1:
            raise UserError(f"two texts are called {name}", "each once, or in two commands")
    return texts


def write(path, text=None):
    """Write a file, whole or not at all. Without a text: only see whether it can be written."""
    try:
        if text is None:
            open(path, "a").close()
        else:
            with replace_file(path, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
    except OSError as error:
        first = "make its folder" if isinstance(error, FileNotFoundError) else "make room"
        raise UserError(f"cannot write {path}: {error.strerror}", f"{first}, or another name", code=1) from None


def check_outputs(settings):
    if settings.json and settings.json == settings.html:
        raise UserError(f"--json and --html are both {settings.json}", "two names")
    if os.path.exists(settings.html) and os.path.samefile(settings.html, report.PAGE):
        raise UserError(f"--html={settings.html} is the page that the results are put into", "--html=results.html")
    for path in filter(None, (settings.json, settings.html)):
        write(path)  # now, and not after an hour of work


def main(argv):
    # 1. Check all that is asked for, before anything is measured
    settings, _, runs = load(EvaluateConfig, argv)
    check_limits(settings, LIMITS)
    started, processes = time.perf_counter(), Processes()
    device = machine.choose_device(settings.device, processes)
    runs = runs or [ckpt.choose_run(runs, settings)]
    folders = check_runs(runs, settings.checkpoint)
    settings.prompt = read_prompt(settings.prompt)
    settings.dtype = str(machine.choose_dtype(settings.dtype, device)[0]).removeprefix("torch.")
    if settings.stride > settings.block_size > 0:
        raise UserError(f"stride={settings.stride} is more than block_size={settings.block_size}: some tokens would "
                        "be left out", f"--stride={settings.block_size}")
    tasks = read_tasks(settings)
    kinds = {items[0].kind for items, _ in tasks.values()}
    if settings.votes > 1 and kinds <= {"choice"} or settings.cot and "number" not in kinds:
        note("--votes is for questions that are answered in writing, --cot for those with a number: here are none")
    texts = read_texts(settings, folders)
    if processes.rank == 0:
        check_outputs(settings)
    processes.join(device, "auto", 86400)
    machine.set_up(device, processes)

    # 2. The results, as --json writes them
    results = dict(command=shlex.join(["python", "evaluate.py", *argv]), date=time.strftime("%Y-%m-%d"),
                   settings=asdict(settings), versions=machine.versions(device, processes.world),
                   models=[], texts={text.name: text.counts() for text in texts})

    def finish():
        """What depends on all models."""
        results["differences"] = grading.differences(results["models"])
        results["seconds"] = time.perf_counter() - started

    def save():
        if processes.rank != 0:
            return
        quality = next((row["quality"] for row in results["models"] if row["quality"]), None)
        if texts and quality and "reference" not in results:
            results["reference"] = real_text(texts[0], quality["texts"])
        finish()
        if settings.json:
            write(settings.json, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
        if settings.html:
            write(settings.html, report.page(results))

    # 3. One model after the other
    try:
        for run, name in zip(runs, names_of(runs)):
            evaluate(run, name, settings, device, texts, tasks, processes, results["models"], save)
            gc.collect()  # the engine and its model name each other, and large ones should not wait for their end
    finally:  # what there is, is shown, whatever comes in between
        if processes.rank == 0 and results["models"]:
            finish()
            print(report.tables(results), flush=True)
    return 0


if __name__ == "__main__":
    command_line(main)
