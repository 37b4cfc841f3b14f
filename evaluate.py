# SPDX-License-Identifier: GPL-3.0-only
"""
Evaluation: how good is a model, and which of two is better?

    python evaluate.py                                      # the newest run under out/: its validation text, our tasks
    python evaluate.py out/small out/other SmolLM2-135M-Instruct --data=data/stdlib --html=results.html
    python evaluate.py out/small --data=notes.txt --stride=64 --tasks=none
    python evaluate.py SmolLM2-135M-Instruct --chat --tasks=gsm8k_test.jsonl --limit=100 --cot --votes=5
    torchrun --standalone --nproc_per_node=2 evaluate.py ...    # the same numbers

1. How well does it predict text? Bits per byte compare all models (evaluation/perplexity.py).
2. How does it write? Samples are kept; how much they repeat themselves is compared with real text.
3. How does it answer? Scores have a standard error (evaluation/grading.py).
"""
import gc
import itertools
import json
import os
import shlex
import time
from dataclasses import asdict, dataclass, field
from typing import Literal

# (First, so that an interrupted or failing import is no traceback.)
from runtime.console import Progress, UserError, command_line, note, say, warn
import torch

import tokenizer as tokenizers
from dataset import Dataset, is_data, seed_for
from evaluation import grading, report
from evaluation.perplexity import measure_text, read_text
from formats import huggingface
from runtime import machine
from runtime.files import is_gguf, replace_file
from runtime.processes import Processes
from runtime.settings import check_limits, load, or_else
from sample import ModelConfig, read_prompt
from serving.engine import Engine, Request
from training import checkpoint as ckpt

TASKS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "evaluation", "tasks")
BUNDLED = sorted(name.removesuffix(".jsonl") for name in os.listdir(TASKS) if name.endswith(".jsonl"))


@dataclass
class EvaluateConfig(ModelConfig):
    # text
    data: list[str] = field(default_factory=list)  # a,b: data/NAME (validation split), files, none; default: the run's
    text_field: str = "text"  # the field of a .jsonl line
    megabytes: Literal["all"] | float = "all"  # only this much of each text
    stride: Literal["auto"] | int = "auto"  # tokens that the window advances; auto: block_size
    batch_size: Literal["auto"] | int = "auto"  # contexts at once; auto: about 4,096 tokens
    # questions
    tasks: list[str] = field(default_factory=list)  # a,b: names of evaluation/tasks, files, or none; default: all
    limit: Literal["all"] | int = "all"  # at most this many questions of each
    shots: int = 0  # examples before each question
    examples: str = ""  # file of the examples; default: the task's next questions
    cot: bool = False  # chain of thought: ask for the steps to a number and show them in examples
    chat: bool = False  # ask in the chat format, where a model has one
    votes: int = 1  # write this many answers (temperature 0.8, top_k 50) and let them vote; 1: one, greedily
    max_new_tokens: Literal["auto"] | int = "auto"  # of an answer; auto: 256 for a number, 32 for words
    # samples
    samples: int = 16  # texts to write and to measure; 0: none
    prompt: str = ""  # what they start with, or FILE:path; default: the end-of-text token
    # the results
    json: str = ""  # write everything to this file
    html: str = ""  # and a page for browsers
    # how
    rows: int = 16  # texts written at once
    seed: int = 1337  # for what is written with a temperature: votes and samples


LIMITS = {"limit block_size stride batch_size max_new_tokens": (1, 1e9), "samples": (0, 1e9), "megabytes": (1e-6, 1e6),
          "shots": (0, 1000), "votes": (1, 1000), "rows": (1, 1024), "seed": (0, 2**62)}
LONGEST = {"number": 256, "words": 32}  # an answer, in tokens


def read_tasks(settings):
    """{name: (items, the examples of each)} of --tasks."""
    tasks = {}
    for name in ",".join(settings.tasks or BUNDLED).split(","):
        if name == "none":
            continue
        path = os.path.join(TASKS, f"{name}.jsonl") if name in BUNDLED else name
        if not os.path.isfile(path):
            raise UserError(f"there is no task {name!r}", f"--tasks=FILE, or none, or some of {','.join(BUNDLED)}")
        items = grading.read_task(path)
        pool = grading.read_task(settings.examples) if settings.examples else []
        asked = items[:or_else(settings.limit, None)]
        examples = [choose_examples(item, pool or items[i:] + items[:i], settings.shots)
                    for i, item in enumerate(asked)]
        tasks[os.path.splitext(name)[0]] = asked, examples
    return tasks


def choose_examples(item, pool, shots):
    """The first of the pool on the same subject that are neither the question itself nor on the same passage."""
    others = (other for other in pool if other.intro == item.intro
              and other.prompt != item.prompt and (not item.group or other.group != item.group))
    examples = list(itertools.islice(others, shots))
    if len(examples) < shots:
        raise UserError(f"shots={shots}, but {item.where} has only {len(examples)} examples",
                        f"--shots={len(examples)}")
    return examples


def read_texts(settings, folders):
    """The texts of --data; by default, of the first folder that is here and holds no conversations."""
    sources = ",".join(settings.data).split(",")
    if not settings.data:
        here = [folder for folder in folders if is_data(folder)]
        sources = [folder for folder in here if not Dataset.open(folder).chat][:1]
        if not sources:
            note("the data of these runs are not here; for bits per byte: --data=FILE")
    sources = [source for source in sources if source != "none"]
    return [read_text(source, or_else(settings.megabytes, 0.0), settings.text_field) for source in sources]


def requests_for(item, examples, seeds, settings, engine, chat):
    """(requests for each choice, or for each seed; was a prompt cut at its beginning, to fit?)."""
    size, tokenizer = engine.context, engine.tokenizer
    if item.kind == "choice":
        requests, longest = [], 0
        for ids, n in grading.choice_ids(item, examples, tokenizer, chat):
            first = min(len(ids), size) - n  # the first token of the choice
            if first < 1:
                raise UserError(f"{item.where}: a choice fills the context of {size} tokens", "shorter choices")
            requests.append(Request(ids=ids[-size:], max_tokens=0, prompt_logprobs=first))
            longest = max(longest, len(ids))
        return requests, longest > size

    ids = grading.prompt_ids(item, examples, tokenizer, settings.cot, chat)
    new = min(or_else(settings.max_new_tokens, LONGEST[item.kind]), size // 2)
    capacity = size - new
    stop = [] if chat else ["\nQuestion:"]  # a text goes on with a question of its own
    temperature = 0.8 if len(seeds) > 1 else 0.0
    requests = [Request(ids=ids[-capacity:], max_tokens=new, temperature=temperature, seed=seed, stop=stop)
                for seed in seeds]
    return requests, len(ids) > capacity


def work(engine, requests):
    """Let the engine answer."""
    progress = Progress("writing", len(requests), unit="texts")
    engine.submit(*requests)
    while engine.waiting or engine.running:
        engine.step()
        progress.tell(len(requests) - len(engine.waiting))
    if any(request.finish_reason == "error" for request in requests):
        raise UserError("its logits are not finite numbers", "--dtype=float32, or another checkpoint")


def row_of(item, requests, cut, tokenizer):
    """A question and its answer, as a row of the report."""
    prompt = tokenizer.decode(requests[0].ids[:requests[0].prompt_logprobs])
    row = dict(where=item.where, group=item.group or item.where, right=item.right, cut=cut, prompt=prompt)
    if item.kind == "choice":
        logprobs = [sum(token.logprob for token in request.prompt_tokens) for request in requests]
        return row | dict(choices=item.choices, logprobs=logprobs, **grading.score_choice(item, logprobs))
    texts = [request.text for request in requests]
    return row | dict(texts=texts, **grading.score_text(item, texts))


def run_task(engine, items, examples, settings, processes, chat):
    """Ask all items, and sum up: {kind, chat, n, metrics, ..., items}. examples: those of each item."""
    # 1. Each process asks some of them.
    asked = {}
    try:
        for i in range(processes.rank, len(items), processes.world):
            seeds = [seed_for("vote", settings.seed, i, n) for n in range(settings.votes)]
            asked[i] = requests_for(items[i], examples[i], seeds, settings, engine, chat)
        work(engine, [request for requests, _ in asked.values() for request in requests])
        rows = {i: row_of(items[i], *found, engine.tokenizer) for i, found in asked.items()}
    except UserError as error:  # maybe in one process of several
        rows = {"error": (error.fact, error.fix)}

    # 2. All get all answers.
    rows = {i: row for part in processes.all_gather(rows) for i, row in part.items()}
    if "error" in rows:
        raise UserError(*rows["error"])
    rows = [rows[i] for i in range(len(items))]
    return dict(kind=items[0].kind, chat=chat, **grading.summary(rows), items=rows)


def measure_samples(engine, settings):
    """{"quality": the samples with their numbers, "tokens_per_second": of one text alone}."""
    tokenizer = engine.tokenizer
    end = tokenizer.special.get(tokenizers.END_OF_TEXT)
    nothing = tokenizer.encode("\n") if end is None else [end]
    ids = tokenizer.prompt(settings.prompt) or nothing
    longest = min(128, engine.context - len(ids))
    if longest < 1:
        raise UserError(f"--prompt fills the context of {engine.context} tokens: it has {len(ids)}", "shorten it")
    how = dict(ids=ids, max_tokens=longest, ignore_eos=True)
    requests = [Request(seed=seed_for("sample", settings.seed, i), **how) for i in range(settings.samples)]
    work(engine, requests)

    speeds = []
    for _ in range(3):  # whatever else the machine does can only slow it down
        alone = Request(temperature=0.0, **how)
        work(engine, [alone])
        speeds.append((alone.n - 1) / (time.monotonic() - alone.first))
    texts = [request.text for request in requests]
    quality = dict(**grading.variety(texts), prompt=settings.prompt, texts=texts)
    return dict(quality=quality, tokens_per_second=max(speeds) or None)


def real_text(text, samples):
    """The numbers of pieces of real text, as many as the samples and of their mean length."""
    words, n = grading.words_of("\n".join(text.documents)), len(samples["texts"])
    length = samples["words"] // n
    step = max(len(words) // n, length)
    pieces = [" ".join(words[i * step:i * step + length]) for i in range(n)]
    return dict(name=text.name, **grading.variety(pieces))


def data_of(checkpoint):
    """The folder of the data that a run was trained on."""
    return os.path.join("data", checkpoint["settings"].get("dataset") or "")


def evaluate(run, settings, device, texts, tasks, processes, results, save):
    """Append one model to the results."""
    # 1. The model
    name = os.path.normpath(run)
    model, tokenizer, about = ckpt.load_run(run, settings.checkpoint, device, settings.quantize == "int8",
                                           settings.block_size)
    dtype = torch.float32 if about["int8"] else getattr(torch, settings.dtype)
    row = dict(model=name, parameters=model.n_params(), texts={}, tasks={}, quality=None, tokens_per_second=None,
               missing={})
    results["models"].append(row)

    def attempt(found, what, measure, *args):
        """found[what] = measure(...). What a model cannot do, such as a character without a token, is a warning."""
        say(f"{name}: {what}")
        try:
            found[what] = measure(*args)
        except UserError as error:
            warn(f"{name}: {what}: {error.fact} ({error.fix})")
            row["missing"][what] = error.fact

    # 2. Text
    for text in texts:
        if text.name == data_of(about) and text.sha256 != about.get("data_sha256"):
            warn(f"{text.name} has changed since training: {name} may have seen its validation split")
        with machine.autocast(device, dtype):
            sizes = [or_else(size, 0) for size in (settings.block_size, settings.stride, settings.batch_size)]
            attempt(row["texts"], text.name, measure_text, model, tokenizer, text, *sizes, processes)
        save()
    if not (settings.samples or tasks):
        return

    # 3. Samples
    engine = Engine(model, tokenizer, rows=settings.rows, dtype=dtype)
    found = {}
    if settings.samples and processes.rank == 0:
        attempt(found, "samples", measure_samples, engine, settings)
    if found:
        row |= found["samples"]
        if texts and "reference" not in results:
            results["reference"] = real_text(texts[0], row["quality"])
    save()
    processes.barrier()  # or the others would slow it down

    # 4. Questions
    chat = settings.chat and about["chat"]
    for task, (items, examples) in tasks.items():
        attempt(row["tasks"], task, run_task, engine, items, examples, settings, processes, chat)
        save()


def write(path, text):
    try:
        with replace_file(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "another name, or free space", code=1) from None


def main(argv):
    # 1. What is asked for. Every run is read now, before an hour of work on another one.
    settings, _, runs = load(EvaluateConfig, argv)
    check_limits(settings, LIMITS)
    started, processes = time.perf_counter(), Processes()
    device = machine.choose_device(settings.device, processes)
    runs = runs or [ckpt.choose_run(runs, settings)]
    ours = [ckpt.read_run(run, settings.checkpoint)[0] for run in runs
            if not (huggingface.is_folder(run) or is_gguf(run))]
    settings.prompt = read_prompt(settings.prompt)
    settings.dtype = str(machine.choose_dtype(settings.dtype, device)[0]).removeprefix("torch.")
    tasks = read_tasks(settings)
    texts = read_texts(settings, map(data_of, ours))
    processes.join(device, "auto", 86400)
    machine.set_up(device, processes)

    # 2. The results, as --json writes them
    results = dict(command=shlex.join(["python", "evaluate.py", *argv]), date=time.strftime("%Y-%m-%d"),
                   settings=asdict(settings), versions=machine.versions(device, processes.world),
                   models=[], texts={text.name: text.counts() for text in texts})

    def save():
        if processes.rank != 0:
            return
        results["differences"] = grading.differences(results["models"])
        results["seconds"] = time.perf_counter() - started
        if settings.json:
            write(settings.json, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
        if settings.html:
            write(settings.html, report.page(results))

    # 3. One model after the other
    save()  # can the files be written?
    try:
        for run in runs:
            evaluate(run, settings, device, texts, tasks, processes, results, save)
            gc.collect()  # an engine and its model form a cycle
    finally:  # whatever happens
        if processes.rank == 0 and results["models"]:
            print(report.tables(results), flush=True)
    return 0


if __name__ == "__main__":
    command_line(main)
