# SPDX-License-Identifier: GPL-3.0-only
"""
Export: the model for other people's programs, each file proven before it is announced.

    python export.py                                        # the newest run under out/, in all formats
    python export.py out/small --format=hf                  # exports/small/hf/, for transformers, CTranslate2, ...
    python export.py out/small --format=onnx --out=exports/mine
    python export.py SmolLM2-135M --format=hf --dtype=bfloat16
    python export.py out/small --format=int8                # a smaller and faster RUN, for sample.py and serve.py

hf            hf/          Hugging Face: GPT2LMHeadModel, LlamaForCausalLM or Qwen3ForCausalLM, with its tokenizer
onnx          model.onnx   one graph with a cache of keys and values, in the naming of the optimum tools
torchscript   model.ts     ids to logits, for PyTorch without Python (deprecated by PyTorch)
pt2           model.pt2    ids to logits, torch.export's format, which comes after TorchScript
int8          int8/        only if asked for: a run folder with rounded weights, which is not the same model any more

An export is a translation, and translations have mistakes: a transposed matrix, an epsilon, a length that was frozen
when the graph was recorded. So each file is written into OUT/.part, read back in a process that has nothing of this
project (formats/readback.py), and compared with the model: the logits on real text, at several lengths and for several
texts at once, and the 64 likeliest tokens one after the other. Only then does it get its place. Exit code 1: one of
them differs by more than it may. A crash costs a minute: the same command begins again.
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
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Literal

import torch

import dataset as datasets
from formats import huggingface
from runtime import machine
from training import checkpoint as ckpt
import tokenizer as tokenizers
from runtime.files import check_like
from runtime.console import UserError, command_line, note, say
from runtime.settings import load
from sample import RunConfig
from model import KVCache, quantize
from evaluation.perplexity import measure_text, read_text
from text.sources import LICENCES, origin

# How far a logit may be off, since others add float32 numbers in another order; RELATIVE is that to the largest logit.
TOLERANCE, RELATIVE = 1e-4, 1e-5
FILES = {"hf": "hf", "onnx": "model.onnx", "torchscript": "model.ts", "pt2": "model.pt2", "int8": "int8"}
PACKAGES = {"hf": ("transformers", "safetensors"), "onnx": ("onnx", "onnxscript", "onnxruntime")}


@dataclass
class ExportConfig(RunConfig):
    format: list[str] = field(default_factory=list)  # hf,onnx,torchscript,pt2,int8; default: all but int8
    out: str = ""  # the folder to write into; exports/NAME of the run by default
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: as they came (graphs
    # keep weights of 16 bits as float32 numbers)


# ---------------------------------------------------------------------------------------------------------------------
# The graphs: what the model does, recorded


class GrowingCache(KVCache):
    """A KVCache for a graph: nothing is written in place, keys and values are joined to new, longer ones.

    A graph records what was done with one example, so what depends on a length must not be an `if`: the mask is always
    spelled out, also for a past of 0.
    """

    def __init__(self, past):
        self.past, self.present, self.length = past, [], past[0].size(2)

    def extend(self, layer, k, v):
        k, v = (torch.cat((self.past[2 * layer + i], new), dim=2) for i, new in enumerate((k, v)))
        self.present += [k, v]
        return k, v

    def mask(self, T):
        keys = self.present[-1].size(2)
        return torch.ones(T, keys, dtype=torch.bool).tril(self.length)


class LogitsAndCache(torch.nn.Module):
    """input_ids (B, T) and, for each layer, keys and values (B, n_kv_head, past, head_dim) -> the logits and the same
    with past + T positions."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, *past):
        cache = GrowingCache(past)
        logits = self.model(input_ids, cache=cache)
        return logits, *cache.present


def write_onnx(model, path):
    config, B, T, past = model.config, 2, 3, 4  # an example; 0 and 1 would be taken for constants
    names = [f"{layer}.{what}" for layer in range(config.n_layer) for what in ("key", "value")]
    batch, length, before = (torch.export.Dim(name) for name in ("batch", "length", "past"))
    example = [torch.zeros(B, config.n_kv_head, past, config.head_dim) for _ in names]
    program = torch.onnx.export(
        LogitsAndCache(model), (torch.zeros(B, T, dtype=torch.long), *example), dynamo=True, verbose=False,
        input_names=["input_ids", *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        dynamic_shapes=({0: batch, 1: length}, tuple({0: batch, 2: before} for _ in names)), external_data=False)
    for node in program.model.graph:
        node.metadata_props.clear()  # names of files and lines of code on this machine
    program.save(path, external_data=False)


def write_torchscript(model, path):
    traced = torch.jit.trace(model, torch.zeros(2, 8, dtype=torch.long), check_trace=False)
    whole = io.BytesIO()
    torch.jit.save(traced, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            if not entry.filename.endswith(".debug_pkl"):  # names of files and lines of code on this machine
                target.writestr(entry, source.read(entry))


def write_pt2(model, path):
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=model.config.block_size)
    program = torch.export.export(model, (torch.zeros(2, 8, dtype=torch.long),),
                                  dynamic_shapes=({0: batch, 1: length},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names of files and lines of code on this machine
    whole = io.BytesIO()  # on a full disk, torch's own writer ends the process
    torch.export.save(program, whole)
    pathlib.Path(path).write_bytes(whole.getbuffer())


WRITE = {"onnx": write_onnx, "torchscript": write_torchscript, "pt2": write_pt2}


@contextlib.contextmanager
def quiet():
    """Without what torch says about itself while it records: deprecations, packages that are not there."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


# ---------------------------------------------------------------------------------------------------------------------
# The proof


def real_text(run, tokenizer, n):
    """At least n token ids of real text: held-out data where they are here, else this file itself."""
    ids = []
    with contextlib.suppress(UserError):  # the data may be gone
        data = datasets.Dataset.open(os.path.join("data", run["settings"].get("dataset", "")))
        if data.meta["tokenizer_sha256"] == run["tokenizer_sha256"]:
            ids = data.tokens("val", 0, min(n, data.meta["val"]["tokens"])).tolist()
    if not ids:
        text = pathlib.Path(__file__).read_text(encoding="utf-8")
        known = getattr(tokenizer, "characters", None)
        ids = tokenizer.encode("".join(c for c in text if known is None or c in known)) or [0]
    return ids * (n // len(ids) + 1)


def ask(model, run, tokenizer):
    """The questions that every format has to answer, and the model's own answers: two dicts, see readback.answer."""
    size, vocab_size = model.config.block_size, model.config.vocab_size
    most = max(1, int(2e9 / (4 * vocab_size)))  # tokens whose logits take 2 GB
    lengths = sorted({1, min(7, size), min(size, most)})
    if most < size:
        note(f"compared up to {most:,} tokens: the logits of a context of {size:,} would take more than 2 GB")
    ids = real_text(run, tokenizer, max(4 * lengths[-1], 20_000))
    batches = [torch.tensor(ids[:B * T]).view(B, T) for T in lengths for B in (1, 3) if B * T <= most]
    positions = [torch.linspace(0, idx.size(1) - 1, min(idx.size(1), 256)).long() for idx in batches]
    n = min(64, max(1, size - 8))
    prompt = torch.tensor([ids[:max(1, min(32, size - n))]])
    lines = tokenizer.decode(ids[:20_000]).split("\n")
    lines = [line for line in lines if not any(name in line for name in tokenizer.special)]  # which text never becomes
    with torch.inference_mode():
        logits = [model(idx)[:, at] for idx, at in zip(batches, positions)]
    rate = speed(machine.use_linear(copy.deepcopy(model), torch.float32), prompt, n)
    questions = dict(batches=batches, positions=positions, prompt=prompt, n=n, lines=lines)
    return questions, dict(logits=logits, ids=[tokenizer.encode(line) for line in lines], tokens_per_second=rate)


def speed(model, prompt, n):
    """Tokens per second, as sample.py writes them."""
    for _ in range(2):  # as in formats/readback.py: the second time counts
        started = time.perf_counter()
        list(model.generate(prompt, n))
        rate = n / (time.perf_counter() - started)
    return rate


def prove(path, asked):
    """The answers of an export to the questions in the file `asked`, from a process that cannot import this project."""
    answered = asked + ".answers"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-I", pathlib.Path(__file__).parent / "formats/readback.py", path, asked, answered]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2][:300] or f"exit code {done.returncode}"
        raise UserError(f"{os.path.basename(path)} was written, but cannot be read back: {said}",
                        "make room if the disk is full; else python -m bench doctor, and report this", code=1)
    return ckpt.load_file(answered)


def compare(model, questions, ours, theirs):
    """(the largest difference of a logit, the comparison in words, whether it passes)."""
    pairs = zip(ours["logits"], theirs["logits"])
    difference = torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()  # (of torch: a NaN stays one)
    allowed = max(TOLERANCE, RELATIVE * max(logits.abs().max().item() for logits in ours["logits"]))
    prompt, tokens, n = questions["prompt"], theirs["tokens"], questions["n"]
    with torch.inference_mode():
        scores = model(torch.cat((prompt, tokens[None, :-1]), dim=1))[0, -n:]
    gap = (scores.amax(dim=1) - scores[range(n), tokens]).max().item()  # 0: each is the likeliest after those before
    passes = difference <= allowed and gap <= 2 * allowed  # (a NaN is not; a small gap is a tie)
    what = f"logits within {difference:.1e} ({allowed:.1e} is allowed), " + (
        f"greedy tokens up to {gap:.1e} below the likeliest" if gap else f"the same {n} greedy tokens")
    if theirs["ids"] is not None:
        wrong = sum(a != b for a, b in zip(ours["ids"], theirs["ids"]))
        what += f", {f'other ids in {wrong}' if wrong else 'the same ids in all'} of {len(ours['ids']):,} lines of text"
        passes = passes and not wrong
    return difference, what, passes


def export_int8(model, tokenizer, run, questions, ours, path):
    """Write a run folder of 8 bits, and read it: (its row, what is lost in words, does it hold what was written?)."""
    written = quantize(copy.deepcopy(model))
    tokenizer.save(os.path.join(path, "tokenizer"))
    kept = {name: run[name] for name in ("step", "source", "chat", "data_sha256", "versions") if name in run}
    kept["settings"] = asdict(model.config) | dict(dataset=origin(run["settings"].get("dataset", "")))
    ckpt.save_checkpoint(os.path.join(path, "best.pt"), kept | dict(
        format=1, int8=True, model=written.state_dict(),
        tokenizer_sha256=tokenizers.fingerprint(os.path.join(path, "tokenizer"))))
    started = time.perf_counter()
    found, known, _ = ckpt.load_run(path)
    load = time.perf_counter() - started
    with torch.inference_mode():
        same = all(torch.equal(found(idx), written(idx)) for idx in questions["batches"])
        difference = max((found(idx)[:, at] - logits).abs().max().item() for idx, at, logits in
                         zip(questions["batches"], questions["positions"], ours["logits"]))
    rate = speed(found, questions["prompt"], questions["n"])
    what = f"logits within {difference:.1e}, {rate:,.0f} tokens/s instead of {ours['tokens_per_second']:,.0f}"
    try:
        text = read_text(os.path.join("data", run["settings"].get("dataset") or "(no data set)"), megabytes=1)
        before, after = (measure_text(each, known, text)["bits_per_byte"] for each in (model, found))
        what = (f"{before:.4f} bits per byte before, {after:.4f} after ({after / before - 1:+.2%}), on what "
                f"{text.name} holds out; {what}")
    except UserError as error:
        note(f"bits per byte are not compared, {error.fact}: python evaluate.py with both folders and --data=FILE")
    return table_row("int8", path, load, rate, f"{difference:.1e}"), what, same


# ---------------------------------------------------------------------------------------------------------------------
# The model card

HEAD = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"  # for the Hugging Face Hub
USE = {  # of each file: how it is read
    "hf": """Hugging Face (`pip install torch transformers`):

```python
from transformers import pipeline
print(pipeline("text-generation", "{folder}")({prompt!r}, max_length={length})[0]["generated_text"])
```

It samples, as generation_config.json says; `do_sample=False` takes the likeliest tokens. In OpenLLM the folder is a
RUN, for `python sample.py FOLDER` or `python train.py --init_from=FOLDER`.""",
    "model.onnx": """ONNX: in go `input_ids` (batch, length) and, per layer, `past_key_values.N.key` and `.value`
(batch, n_kv_head, past, head_dim), float32, of length 0 at first. Out come `logits`, and `present.N.key` and `.value`,
the past of the next step. Past and length together are at most block_size. There is no mask for padding.""",
    "model.ts": '`torch.jit.load("model.ts")(ids)`: logits of ids (batch, length). PyTorch has deprecated TorchScript.',
    "model.pt2": '`torch.export.load("model.pt2").module()(ids)`: the same, of at most block_size tokens.',
    "int8": "8 bits: a RUN with rounded weights, for `python sample.py FOLDER/int8`, serve.py and evaluate.py."}


def model_card(name, model, run, dtype, prompt, rows, folder="hf"):
    """README.md of an export. rows: of the table, by file. folder: where hf is, seen from this README.md."""
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
    if "val_loss" in run:
        facts["loss"] = f"validation: {run['val_loss']:.4f} nats per token, {run['val_bpb']:.4f} bits per byte"
    if run["chat"]:
        facts["chat"] = "`tokenizer.apply_chat_template` makes a prompt of messages; `python sample.py FOLDER --chat`"
    facts = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    use = "\n\n".join(text.format(prompt=prompt, length=min(60, config["block_size"]), folder=folder)
                      for file, text in USE.items() if file in rows)
    return f"""# {name}

| | |
|---|---|
{facts}

Each file was read back by the library that it is made for, without the program that wrote it, and compared with the
model on real text, in float32. The last column is the largest difference of a logit. (The validation loss was measured
before any rounding. A row stays until its format is exported again.)

{table(rows)}

## Use

{use}
"""


def table(rows):
    return "\n".join(["| format | size | load time | tokens/s | largest difference |", "|---|---|---|---|---|",
                      *rows.values()])


def table_row(file, path, load, rate, difference):
    size = sum(found.stat().st_size for found in below(path) if found.is_file())
    return f"| {file} | {size / 1e6:,.1f} MB | {load:.2f} s | {rate:,.0f} | {difference} |"


# ---------------------------------------------------------------------------------------------------------------------


def choose_formats(settings, model, tokenizer):
    """The formats to write, after every check that needs no writing. Raises UserError."""
    asked = {name for entry in settings.format for name in entry.split(",")} or {"all"}
    for name in asked.difference(FILES, ["all"]):
        raise UserError(f"there is no format {name!r}", f"--format={','.join(FILES)}, or all")
    formats = [name for name in FILES if name in asked or "all" in asked and name != "int8"]
    missing = [package for name in formats for package in PACKAGES.get(name, ()) if not find_spec(package)]
    if missing:
        raise UserError(f"these exports need packages that are not installed: {', '.join(missing)}",
                        f"pip install {' '.join(missing)}; or --format=pt2, which needs none")
    size = model.config.block_size
    for name in list(formats):
        try:
            if name == "hf":
                huggingface.their_kind(model.config)
                huggingface.tokenizer_files(tokenizer, size)
            elif name != "int8" and size < 8:  # (int8 holds whatever a run holds)
                raise UserError(f"block_size={size} is too short to record a graph (8 tokens)", "--format=hf")
            elif name == "onnx" and 4 * sum(p.numel() for p in model.parameters()) > 2e9:
                raise UserError("an ONNX file cannot be larger than 2 GB, and this model is", "--format=hf or pt2")
        except UserError as error:
            if "all" not in asked:
                raise
            note(f"no {name}: {error.fact}")
            formats.remove(name)
    if not formats:
        raise UserError("no format can hold this model", "see the notes above")
    return formats


def earlier(out, formats):
    """The dict in export.json: the rows of the table, and the names of all that exports wrote into `out`.

    Raises UserError where this export would replace anything else.
    """
    path = os.path.join(out, "export.json")
    before = huggingface.read_json(path, missing=dict(rows={}, written=[]))
    check_like(before, dict(rows={}, written=[""]), path)
    for file in [*(FILES[name] for name in formats), "README.md"]:
        for found in below(out, file):
            if str(found.relative_to(out)) not in before["written"]:
                raise UserError(f"{found} is there, and no export has written it", "--out=ANOTHER_FOLDER")
    return before


def below(*path):
    """A file, or a folder and all that is in it."""
    path = pathlib.Path(*path)
    return [found for found in (path, *path.rglob("*")) if os.path.lexists(found)]


def main(argv):
    settings, _, runs = load(ExportConfig, argv)
    named = ckpt.choose_run(runs, settings)
    started = time.perf_counter()
    model, tokenizer, run = ckpt.load_run(named, settings.checkpoint)
    run["load_seconds"] = time.perf_counter() - started
    ckpt.check_whole(run)
    formats = choose_formats(settings, model, tokenizer)
    folder = os.path.abspath(named if os.path.isdir(named) else os.path.dirname(named))
    out = settings.out or os.path.join("exports", os.path.basename(folder))
    exports = earlier(out, formats)
    own = run["dtype"] if os.path.isdir(run["path"]) else "float32"
    dtype = own if settings.dtype == "auto" else settings.dtype
    model.requires_grad_(False)  # else what the graphs give would want gradients too
    for name, p in model.named_parameters():  # as they will be in the files, and as they will be compared
        rounded = p.to(getattr(torch, dtype))
        if not rounded.isfinite().all():
            raise UserError(f"{name} has a weight of {p.abs().max():g}, which is no number in {dtype}",
                            "--dtype=bfloat16 or float32; or another checkpoint")
        p.copy_(rounded)
    weights = hashlib.sha256(b"".join(hashlib.sha256(p.numpy()).digest() for p in model.parameters())).hexdigest()
    stay = exports["rows"].keys() - {FILES[name] for name in formats}
    if stay and exports.get("weights") != weights:
        raise UserError(f"{out} holds exports of other weights: {', '.join(sorted(stay))}",
                        "--format=all, which replaces them; or --out=ANOTHER_FOLDER")
    exports["weights"] = weights
    say(f"{run['path']}: {model.n_params():,} parameters, to {out}: {', '.join(formats)}")
    part = os.path.join(out, ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)  # what a kill left
        os.makedirs(part)
        return export(model, tokenizer, run, formats, dtype, out, part, exports)
    except ImportError as error:
        raise UserError(f"a package that exports need is broken: {error}", "install it again, in a new environment") \
            from None
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}",
                        "make room, or --out=ANOTHER_FOLDER; the same command begins again", code=1) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def export(model, tokenizer, run, formats, dtype, out, part, exports):
    """Write each format into the folder `part`, prove it, and move it to `out`. Returns the exit code."""
    questions, ours = ask(model, run, tokenizer)
    native = os.path.basename(run["path"]) + ", here"
    rows = {native: table_row(native, run["path"], run["load_seconds"], ours["tokens_per_second"], "")}
    prompt = next((line[:min(40, model.config.block_size // 4)] for line in questions["lines"] if line.strip()), "")
    about = os.path.basename(os.path.abspath(out)), model, run, dtype, prompt
    asked, code = os.path.join(part, "questions"), 0
    ckpt.save_checkpoint(asked, questions)
    for name in formats:
        file = FILES[name]
        path, target = os.path.join(part, file), os.path.join(out, file)
        if name == "int8":
            row, what, passes = export_int8(model, tokenizer, run, questions, ours, path)
        else:
            if name == "hf":
                generation = run["generation"] if os.path.isdir(run["path"]) else None
                huggingface.write(path, model, tokenizer, getattr(torch, dtype), generation, run["chat"])
            else:
                with quiet():
                    WRITE[name](model, path)
            theirs = prove(path, asked)
            difference, what, passes = compare(model, questions, ours, theirs)
            row = table_row(file, path, theirs["load_seconds"], theirs["tokens_per_second"], f"{difference:.1e}")
        say(f"{name}: {what}" + ("" if passes else ": not the same, so it is not kept"))
        if not passes:
            code = 1
            continue
        if name == "hf":
            write_text(part, os.path.join(path, "README.md"), HEAD + model_card(*about, rows | {file: row}, folder="."))
        exports["rows"][file] = row
        names = [str(found.relative_to(part)) for found in below(path)]
        exports["written"] = sorted({"README.md", *exports["written"], *names})
        write_text(part, os.path.join(out, "export.json"), json.dumps(exports, indent=1))  # first: these names are ours
        if os.path.isdir(target):
            shutil.rmtree(target)
        os.replace(path, target)
        write_text(part, os.path.join(out, "README.md"), model_card(*about, rows | exports["rows"]))
    print(table(rows | exports["rows"]))
    return code


def write_text(part, path, text):
    new = pathlib.Path(part, "text")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


if __name__ == "__main__":
    command_line(main)
