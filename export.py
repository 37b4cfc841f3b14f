# SPDX-License-Identifier: GPL-3.0-only
"""
Export: the model for other people's programs, each file proven before it is announced.

    python export.py                            # the newest run under out/, in all formats but int8
    python export.py out/small --format=hf      # exports/small/hf/
    python export.py SmolLM2-135M --format=onnx,pt2 --out=exports/mine --dtype=bfloat16

hf            hf/          for transformers: GPT2LMHeadModel, LlamaForCausalLM or Qwen3ForCausalLM, with its tokenizer
onnx          model.onnx   one graph with a cache of keys and values, in the naming of the optimum tools
torchscript   model.ts     ids to logits, for PyTorch without Python (deprecated by PyTorch)
pt2           model.pt2    ids to logits, torch.export's format, which comes after TorchScript
int8          int8/        a RUN with rounded weights, smaller and faster, for sample.py and serve.py

An export is a translation, and translations have mistakes: a transposed matrix, another epsilon, a length
that was frozen when the graph was recorded. So each file is written into OUT/.part, read back in a process
that has nothing of this project (formats/readback.py), and compared with the model: logits on real text, at
several lengths and batch sizes, and 64 greedy tokens. Only then is it moved to its place. Exit code 1: a
format differs by more than it may.
"""
import contextlib
import copy
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F

import tokenizer as tokenizers
from evaluation.perplexity import measure_text, read_text
from formats import huggingface, tokenizer_json
from formats.quantized import quantize
from model import KVCache
from runtime import machine
from runtime.console import UserError, command_line, note, origin, say
from runtime.files import check_like, replace_file
from runtime.settings import load
from sample import RunConfig
from text.sources import LICENCES
from training import checkpoint as ckpt

# How far a logit may be off, since others add float32 numbers in another order; RELATIVE is that to the largest logit.
TOLERANCE, RELATIVE = 1e-4, 1e-5


@dataclass
class ExportConfig(RunConfig):
    format: list[str] = field(default_factory=list)  # hf,onnx,torchscript,pt2,int8; default: all but int8
    out: str = ""  # the folder to write into; exports/NAME of the run by default
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: as they came (graphs
    # keep weights of 16 bits as float32 numbers)


# ---------- The formats. Each writer leaves out what recorders add: names of files and lines of code on this machine.


def write_hf(path, model, tokenizer, run, dtype):
    huggingface.write(path, model, tokenizer, getattr(torch, dtype), run.get("generation"), run["chat"])


class GrowingCache(KVCache):
    """A KVCache for a graph: keys and values are joined to new, longer ones, and nothing is written in place.

    A graph is recorded from one example. So no `if` may depend on a length, and there is always a mask.
    """

    def __init__(self, past):
        self.past = past
        self.present = []
        self.length = past[0].size(2)

    def attend(self, layer, q, k, v):
        k = torch.cat((self.past[2 * layer], k), dim=2)  # (B, n_kv_head, past + T, head_dim)
        v = torch.cat((self.past[2 * layer + 1], v), dim=2)
        self.present += [k, v]
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(self.length)  # (T, past + T)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.size(1) != q.size(1))


class LogitsAndCache(torch.nn.Module):
    """input_ids (B, T), and keys and values of each layer -> logits, and keys and values with T positions more."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, *past):
        cache = GrowingCache(past)
        logits = self.model(input_ids, cache=cache)
        return logits, *cache.present


def write_onnx(path, model, *_):
    config = model.config
    names = [f"{layer}.{what}" for layer in range(config.n_layer) for what in ("key", "value")]
    B, T, past = 2, 3, 4  # an example; 0 and 1 would be taken for constants
    example = [torch.zeros(B, config.n_kv_head, past, config.head_dim) for _ in names]
    batch, length, before = (torch.export.Dim(name) for name in ("batch", "length", "past"))
    program = torch.onnx.export(
        LogitsAndCache(model), (torch.zeros(B, T, dtype=torch.long), *example), dynamo=True, verbose=False,
        input_names=["input_ids", *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        dynamic_shapes=({0: batch, 1: length}, tuple({0: batch, 2: before} for _ in names)), external_data=False)
    for node in program.model.graph:
        node.metadata_props.clear()
    program.save(path, external_data=False)


def write_torchscript(path, model, *_):
    traced = torch.jit.trace(model, torch.zeros(2, 8, dtype=torch.long), check_trace=False)
    whole = io.BytesIO()
    torch.jit.save(traced, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                target.writestr(entry, source.read(entry))


def write_pt2(path, model, *_):
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=model.config.block_size)
    example = (torch.zeros(2, 8, dtype=torch.long),)
    program = torch.export.export(model, example, dynamic_shapes=({0: batch, 1: length},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    whole = io.BytesIO()  # on a full disk, torch's own writer ends the process
    torch.export.save(program, whole)
    pathlib.Path(path).write_bytes(whole.getbuffer())


def write_int8(path, model, tokenizer, run, dtype):
    """A run folder of 8 bits."""
    tokenizer.save(os.path.join(path, "tokenizer"))
    kept = {name: run[name] for name in ("step", "source", "chat", "data_sha256", "versions") if name in run}
    ckpt.save_checkpoint(os.path.join(path, "best.pt"), kept | dict(
        format=1, int8=True, model=quantize(copy.deepcopy(model)).state_dict(),
        settings=asdict(model.config) | dict(dataset=origin(run["settings"].get("dataset", ""))),
        tokenizer_sha256=tokenizers.fingerprint(tokenizer)))


class Format(NamedTuple):
    file: str  # or folder
    write: Callable  # (path, model, tokenizer, run, dtype)
    packages: tuple  # that writing it and reading it back need
    use: str  # for the model card: how it is read


FORMATS = {
    "hf": Format("hf", write_hf, ("transformers", "safetensors"), """`pip install torch transformers`, and in Python:

```python
from transformers import pipeline
print(pipeline("text-generation", "{folder}")({prompt!r}, max_length={length})[0]["generated_text"])
```

In OpenLLM it is a RUN: `python sample.py FOLDER`."""),
    "onnx": Format("model.onnx", write_onnx, ("onnx", "onnxscript", "onnxruntime"), """`input_ids` (batch, length) and
`past_key_values.N.key` and `.value` (batch, n_kv_head, past, head_dim), float32, of length 0 at first -> `logits`, and
`present.N.key` and `.value`, the next past. There is no mask for padding."""),
    "torchscript": Format("model.ts", write_torchscript, (), '`torch.jit.load("model.ts")(ids)`: the logits'),
    "pt2": Format("model.pt2", write_pt2, (), '`torch.export.load("model.pt2").module()(ids)`: the logits'),
    "int8": Format("int8", write_int8, (), "a RUN with rounded weights: `python sample.py FOLDER/int8`"),
}


@contextlib.contextmanager
def quiet():
    """Without what torch says about itself while it records: deprecations, packages that are not there."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


# ---------- The proof


def validation_text(run):
    """A megabyte of the validation split of the run's data, a Text; None where the data are not here."""
    try:
        return read_text(os.path.join("data", run["settings"].get("dataset") or "(no data set)"), megabytes=1)
    except UserError:
        return None


def ask(model, tokenizer, text):
    """What every format has to answer, and the model's own answers: two dicts, see readback.answer.

    text: real text; None: this file itself.
    """
    # 1. The logits of batches: contexts of 1, 7 and all tokens, of one text and of three.
    size = model.config.block_size
    most = max(1, int(2e9 / (4 * model.config.vocab_size)))  # tokens whose logits take 2 GB
    if most < size:
        note(f"compared up to {most:,} tokens: the logits of a context of {size:,} would take more than 2 GB")
    lengths = sorted({1, min(7, size), min(size, most)})
    text = "\n".join(text.documents) if text else pathlib.Path(__file__).read_text(encoding="utf-8")
    known = getattr(tokenizer, "characters", text)
    ids = tokenizer.encode("".join(c for c in text[:100_000] if c in known)) or [0]
    ids *= 1 + 4 * size // len(ids)
    batches = [torch.tensor(ids[:B * T]).view(B, T) for T in lengths for B in (1, 3) if B * T <= most]
    positions = [torch.linspace(0, idx.size(1) - 1, min(idx.size(1), 256)).long() for idx in batches]

    # 2. Greedy tokens, and the ids of lines (without special tokens, which text never becomes here).
    n = min(64, max(1, size - 8))
    prompt = torch.tensor([ids[:max(1, min(32, size - n))]])
    lines = tokenizer.decode(ids[:20_000]).split("\n")
    lines = [line for line in lines if not any(name in line for name in tokenizer.special)]

    questions = dict(batches=batches, positions=positions, prompt=prompt, n=n, lines=lines)
    fast = machine.use_linear(copy.deepcopy(model), torch.float32)
    return questions, dict(logits=logits_of(model, questions), ids=[tokenizer.encode(line) for line in lines],
                           tokens_per_second=speed(fast, prompt, n))


@torch.inference_mode()
def logits_of(model, questions):
    return [model(idx)[:, at] for idx, at in zip(questions["batches"], questions["positions"])]


def largest_difference(a, b):
    return torch.stack([(x - y).abs().max() for x, y in zip(a, b)]).max().item()  # (of torch: a NaN stays one)


def speed(model, prompt, n):
    """Tokens per second, as sample.py generates them."""
    list(model.generate(prompt, n))  # as in formats/readback.py: the second time counts
    started = time.perf_counter()
    list(model.generate(prompt, n))
    return n / (time.perf_counter() - started)


def prove(path, asked):
    """The answers of an export to the questions in the file `asked`, from a process that cannot import this project."""
    answered = asked + ".answers"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-I", pathlib.Path(__file__).parent / "formats/readback.py", path, asked, answered]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2][:300] or f"exit code {done.returncode}"
        raise UserError(f"{os.path.basename(path)} was written, but cannot be read back: {said}",
                        "make room if the disk is full; else report this", code=1)
    return ckpt.load_file(answered)


def compare(model, questions, ours, theirs):
    """(the largest difference of a logit, the comparison in words, whether it passes)."""
    difference = largest_difference(ours["logits"], theirs["logits"])
    allowed = max(TOLERANCE, RELATIVE * max(logits.abs().max().item() for logits in ours["logits"]))
    what = f"logits within {difference:.1e} ({allowed:.1e} is allowed)"
    passes = difference <= allowed  # (a NaN is not)

    # Their tokens, one after the other: how far is each below the likeliest after those before? (There can be ties.)
    prompt, tokens, n = questions["prompt"], theirs["tokens"], questions["n"]
    with torch.inference_mode():
        logits = model(torch.cat((prompt, tokens[None, :-1]), dim=1))[0, -n:]  # (n, vocab_size)
    gap = (logits.amax(dim=1) - logits[range(n), tokens]).max().item()
    what += f", greedy tokens up to {gap:.1e} below the likeliest" if gap else f", the same {n} greedy tokens"
    passes = passes and gap <= 2 * allowed

    if theirs["ids"] is not None:
        wrong = sum(a != b for a, b in zip(ours["ids"], theirs["ids"]))
        found = f"other ids in {wrong}" if wrong else "the same ids in all"
        what += f", {found} of {len(ours['ids']):,} lines of text"
        passes = passes and not wrong
    return difference, what, passes


def prove_int8(path, model, text, questions, ours):
    """(answers, the largest difference of a logit, what is lost in words, does the run hold what was written?)."""
    started = time.perf_counter()
    found, tokenizer, _ = ckpt.load_run(path)
    answers = dict(load_seconds=time.perf_counter() - started, logits=logits_of(found, questions))
    answers["tokens_per_second"] = rate = speed(found, questions["prompt"], questions["n"])
    passes = largest_difference(logits_of(quantize(copy.deepcopy(model)), questions), answers["logits"]) == 0
    difference = largest_difference(ours["logits"], answers["logits"])
    what = f"logits within {difference:.1e}, {rate:,.0f} tokens/s instead of {ours['tokens_per_second']:,.0f}"
    if text is None:
        note("bits per byte are not compared without the data: python evaluate.py with both folders and --data=FILE")
    else:
        before, after = (measure_text(each, tokenizer, text)["bits_per_byte"] for each in (model, found))
        what = (f"{before:.4f} bits per byte before, {after:.4f} after ({after / before - 1:+.2%}), on what "
                f"{text.name} holds out; {what}")
    return answers, difference, what, passes


# ---------- The model card

HEAD = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"  # for the Hugging Face Hub


def model_card(name, model, run, dtype, prompt, rows, folder="hf"):
    """README.md of an export. rows: of the table, by file; folder: where hf is, seen from here."""
    config, settings = asdict(model.config), run["settings"]
    licences = [LICENCES.get(source.split(" ")[0], "not known here") for source in run["source"]]
    sources = [f"{source} (licence: {licence})" for source, licence in zip(run["source"], licences)]
    facts = {"parameters": f"{model.n_params():,}, {dtype}", "source": "; ".join(sources),
             "architecture": " ".join(f"{key}={value}" for key, value in config.items())}
    if settings.get("init_from", "auto") not in ("auto", "scratch", "resume"):
        facts["started from"] = f"the weights of {os.path.basename(settings['init_from'].rstrip(os.sep))}"
    if "batch_size" in settings:
        tokens = run["step"] * settings["batch_size"] * settings["gradient_accumulation_steps"] * config["block_size"]
        facts["tokens seen"] = f"{tokens:,} in {run['step']:,} updates"
    if "val_loss" in run:  # (measured before any rounding)
        facts["loss"] = f"validation: {run['val_loss']:.4f} nats per token, {run['val_bpb']:.4f} bits per byte"
    if run["chat"]:
        facts["chat"] = "`tokenizer.apply_chat_template` makes a prompt of messages; `python sample.py FOLDER --chat`"
    facts = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    length = min(60, config["block_size"])
    use = "\n\n".join(f"{each.file}: " + each.use.format(prompt=prompt, length=length, folder=folder)
                      for each in FORMATS.values() if each.file in rows)
    return f"""# {name}

| | |
|---|---|
{facts}

Each file was read back by the library that it is made for, and compared with the model on real text, in float32. The
last column is the largest difference of a logit.

{table(rows)}

{use}
"""


def table(rows):
    head = "| format | size | load time | tokens/s | largest difference |\n|---|---|---|---|---|"
    return "\n".join([head, *rows.values()])


def table_row(file, path, answers, difference):
    files = [found for found in (pathlib.Path(path), *pathlib.Path(path).rglob("*")) if found.is_file()]
    size = sum(found.stat().st_size for found in files) / 1e6
    load_seconds, rate = answers["load_seconds"], answers["tokens_per_second"]
    return f"| {file} | {size:,.1f} MB | {load_seconds:.2f} s | {rate:,.0f} | {difference} |"


# ---------- The program


def choose_formats(settings, model, tokenizer):
    """The formats to write, after every check that needs no writing. Raises UserError."""
    asked = {name for entry in settings.format for name in entry.split(",")} or {"all"}
    for name in asked.difference(FORMATS, ["all"]):
        raise UserError(f"there is no format {name!r}", f"--format={','.join(FORMATS)}, or all")
    formats = [name for name in FORMATS if name in asked or "all" in asked and name != "int8"]
    missing = [package for name in formats for package in FORMATS[name].packages if not find_spec(package)]
    if missing:
        raise UserError(f"these exports need packages that are not installed: {', '.join(missing)}",
                        f"pip install {' '.join(missing)}; or --format=pt2, which needs none")
    for name in list(formats):
        try:
            check_format(name, model, tokenizer)
        except UserError as error:
            if "all" not in asked:
                raise
            note(f"no {name}: {error.fact}")
            formats.remove(name)
    if not formats:
        raise UserError("no format can hold this model", "see the notes above")
    return formats


def check_format(name, model, tokenizer):
    """Raises UserError where a format cannot hold this model."""
    size = model.config.block_size
    if name == "hf":
        huggingface.their_kind(model.config)
        tokenizer_json.tokenizer_files(tokenizer, size)
    elif name != "int8" and size < 8:
        raise UserError(f"block_size={size} is too short to record a graph (8 tokens)", "--format=hf")
    elif name == "onnx" and 4 * sum(p.numel() for p in model.parameters()) > 2e9:
        raise UserError("an ONNX file cannot be larger than 2 GB, and this model is", "--format=hf or pt2")


def earlier(out, files):
    """What export.json in `out` says: the rows of the table, and a hash of the weights.

    Raises UserError where one of the files is there, but not in export.json: no export has written it.
    """
    path = os.path.join(out, "export.json")
    before, ours = dict(rows={}), []
    if os.path.lexists(path):
        before = huggingface.read_dict(path)
        check_like(before, dict(rows={}), path)
        ours = [*before["rows"], "README.md"]
    for file in [*files, "README.md"]:
        found = os.path.join(out, file)
        if file not in ours and os.path.lexists(found):
            raise UserError(f"{found} is there, and no export has written it", "--out=ANOTHER_FOLDER")
    return before


def round_weights(model, dtype):
    """Round the weights to what the files will hold, and be compared with. Returns their hash."""
    model.requires_grad_(False)  # else what the graphs give would want gradients too
    whole = hashlib.sha256()
    for name, p in model.named_parameters():
        rounded = p.to(getattr(torch, dtype))
        if not rounded.isfinite().all():
            raise UserError(f"{name} has a weight of {p.abs().max():g}, which is no number in {dtype}",
                            "--dtype=bfloat16 or float32; or another checkpoint")
        p.copy_(rounded)
        whole.update(hashlib.sha256(p.numpy()).digest())
    return whole.hexdigest()


def main(argv):
    settings, _, runs = load(ExportConfig, argv)
    named = ckpt.choose_run(runs, settings)

    # 1. Everything that can be refused before something is written.
    started = time.perf_counter()
    model, tokenizer, run = ckpt.load_run(named, settings.checkpoint)
    run["load_seconds"] = time.perf_counter() - started
    ckpt.check_whole(run)
    formats = choose_formats(settings, model, tokenizer)
    files = [FORMATS[name].file for name in formats]
    folder = os.path.abspath(named if os.path.isdir(named) else os.path.dirname(named))
    out = settings.out or os.path.join("exports", os.path.basename(folder))
    exports = earlier(out, files)
    dtype = run.get("dtype", "float32") if settings.dtype == "auto" else settings.dtype
    weights = round_weights(model, dtype)
    stay = exports["rows"].keys() - set(files)
    if stay and exports.get("weights") != weights:
        raise UserError(f"{out} holds exports of other weights: {', '.join(sorted(stay))}",
                        "--format=all, which replaces them; or --out=ANOTHER_FOLDER")
    exports["weights"] = weights

    # 2. The exports.
    say(f"{run['path']}: {model.n_params():,} parameters, to {out}: {', '.join(formats)}")
    part = os.path.join(out, ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)  # what a kill left
        os.makedirs(part)
        return export(model, tokenizer, run, formats, dtype, out, part, exports)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}",
                        "make room, or --out=ANOTHER_FOLDER; the same command begins again", code=1) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def export(model, tokenizer, run, formats, dtype, out, part, exports):
    """Write each format into the folder `part`, prove it, and move it to `out`. Returns the exit code."""
    text = validation_text(run)
    questions, ours = ask(model, tokenizer, text)
    asked = os.path.join(part, "questions")
    ckpt.save_checkpoint(asked, questions)
    native = os.path.basename(run["path"]) + ", here"
    rows = {native: table_row(native, run["path"], run | ours, "")}
    prompt = next((line[:min(40, model.config.block_size // 4)] for line in questions["lines"] if line.strip()), "")
    about = os.path.basename(os.path.abspath(out)), model, run, dtype, prompt
    code = 0
    for name in formats:
        file = FORMATS[name].file
        path, target = os.path.join(part, file), os.path.join(out, file)
        with quiet():
            FORMATS[name].write(path, model, tokenizer, run, dtype)
        if name == "int8":
            theirs, difference, what, passes = prove_int8(path, model, text, questions, ours)
        else:
            theirs = prove(path, asked)
            difference, what, passes = compare(model, questions, ours, theirs)
        if not passes:
            say(f"{name}: {what}: not the same, so it is not kept")
            code = 1
            continue
        say(f"{name}: {what}")
        row = table_row(file, path, theirs, f"{difference:.1e}")
        exports["rows"][file] = row
        if name == "hf":
            write_text(os.path.join(path, "README.md"), HEAD + model_card(*about, rows | {file: row}, folder="."))
        write_text(os.path.join(out, "export.json"), json.dumps(exports, indent=1))
        if os.path.isdir(target):
            shutil.rmtree(target)
        os.replace(path, target)
        write_text(os.path.join(out, "README.md"), model_card(*about, rows | exports["rows"]))
    print(table(rows | exports["rows"]))
    return code


def write_text(path, text):
    with replace_file(path, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    command_line(main)
