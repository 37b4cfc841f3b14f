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

An export is a translation, and translations have mistakes: a transposed matrix, an epsilon, a length that was frozen
when the graph was recorded. So each file is written under another name, read back in a process that has nothing of this
project (readback.py), and compared with the model: the logits on real text, at lengths from 1 to the whole context and
for several texts at once, and the 64 likeliest tokens one after the other. Only then does it get its name. Exit code 1:
it differs by more than it may.

int8          int8/        a run folder with matrices of 8-bit integers, see model.quantize

This one is no translation: it is not the same model any more, so it is written when it is asked for, and what it costs
is said instead: bits per byte before and after.
"""
import contextlib
import copy
import hashlib
import io
import json
import logging
import os
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
import torch.nn as nn

import dataset as datasets
import huggingface
import machine
import runtime
import tokenizer as tokenizers
from config import UserError, command_line, load, note, say, warn
from model import KVCache, quantize
from perplexity import measure_text, read_text
from sources import LICENCES, origin

# By how much a logit may differ, since others add the same float32 numbers in another order: 1e-5 of the largest logit,
# or 1e-4 where that is more.
TOLERANCE, RELATIVE = 1e-4, 1e-5
HERE = os.path.dirname(os.path.abspath(__file__))
FILES = {"hf": "hf", "onnx": "model.onnx", "torchscript": "model.ts", "pt2": "model.pt2", "int8": "int8"}
PACKAGES = {"hf": ("transformers", "safetensors"), "onnx": ("onnx", "onnxscript", "onnxruntime")}


@dataclass
class ExportConfig:
    format: list[str] = field(default_factory=list)  # hf, onnx, torchscript, pt2, may be given several times; none: all
    # four of them. int8 only if asked for
    out: str = ""  # the folder to write into; exports/NAME of the run by default
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: as they came (graphs
    # keep weights of 16 bits as float32 numbers)
    # the model: a RUN (run folder, checkpoint file, Hugging Face folder), given bare or by one of nanoGPT's names
    out_dir: str = ""  # the RUN; by default the newest below out/
    init_from: str = ""  # the RUN as well
    checkpoint: Literal["best", "last"] = "best"  # of a run folder: the lowest validation loss, or the newest


# ---------------------------------------------------------------------------------------------------------------------
# The graphs: what the model does, recorded


class Logits(nn.Module):
    """input_ids (B, T) -> logits (B, T, vocab_size), and nothing else."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids)


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


class LogitsAndCache(nn.Module):
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
    traced = torch.jit.trace(Logits(model), torch.zeros(2, 8, dtype=torch.long), check_trace=False)
    whole = io.BytesIO()
    torch.jit.save(traced, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            if not entry.filename.endswith(".debug_pkl"):  # names of files and lines of code on this machine
                target.writestr(entry, source.read(entry))


def write_pt2(model, path):
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=model.config.block_size)
    program = torch.export.export(Logits(model), (torch.zeros(2, 8, dtype=torch.long),),
                                  dynamic_shapes=({0: batch, 1: length},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names of files and lines of code on this machine
    save_whole(torch.export.save, program, path)


def save_whole(save, what, path):
    """By way of the memory: on a full disk, torch's own writer ends the process."""
    buffer = io.BytesIO()
    save(what, buffer)
    with open(path, "wb") as file:
        file.write(buffer.getbuffer())


def write_int8(model, tokenizer, run, path):
    """A run folder, whose best.pt has 8-bit matrices. Returns the model that it holds."""
    tokenizer.save(os.path.join(path, "tokenizer"))
    model = quantize(copy.deepcopy(model))
    keep = "step", "source", "chat", "data_sha256", "versions"
    kept = {name: run[name] for name in keep if name in run}
    kept["settings"] = asdict(model.config) | dict(dataset=origin(run["settings"].get("dataset", "")))
    runtime.save_checkpoint(os.path.join(path, "best.pt"), kept | dict(
        format=1, int8=True, model=model.state_dict(),
        tokenizer_sha256=tokenizers.fingerprint(os.path.join(path, "tokenizer"))))
    return model


WRITE = {"onnx": write_onnx, "torchscript": write_torchscript, "pt2": write_pt2}


@contextlib.contextmanager
def quiet():
    """Without what torch says about itself while it records: deprecations, packages that are not there."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# ---------------------------------------------------------------------------------------------------------------------
# The proof


def real_text(run, tokenizer, n):
    """At least n token ids of real text: held-out data where they are here, else this file itself."""
    ids, dataset = [], run["settings"].get("dataset")
    if dataset:
        with contextlib.suppress(UserError):  # the data may be gone
            data = datasets.Dataset.open(os.path.join("data", dataset))
            if data.meta["tokenizer_sha256"] == run["tokenizer_sha256"]:
                ids = data.tokens("val", 0, min(n, data.meta["val"]["tokens"])).tolist()
    if not ids:
        with open(__file__, encoding="utf-8") as file:
            text = file.read()
        known = getattr(tokenizer, "characters", None)
        ids = tokenizer.encode("".join(c for c in text if known is None or c in known))
    ids = ids or [0]
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
    tokens = torch.cat(list(model.generate(prompt, n)), dim=1)[0]
    rate = speed(machine.use_linear(copy.deepcopy(model), torch.float32), prompt, n)
    questions = dict(batches=batches, positions=positions, prompt=prompt, n=n, lines=lines)
    return questions, dict(logits=logits, tokens=tokens, tokens_per_second=rate,
                           ids=[tokenizer.encode(line) for line in lines])


def speed(model, prompt, n):
    """Tokens per second, as sample.py writes them."""
    for _ in range(2):  # as in readback.py: the second time counts
        started = time.perf_counter()
        list(model.generate(prompt, n))
        rate = n / (time.perf_counter() - started)
    return rate


def prove(path, asked):
    """The answers of an export to the questions in the file `asked`, from a process that cannot import this project."""
    answered = asked + ".answers"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([sys.executable, "-I", os.path.join(HERE, "readback.py"), path, asked, answered],
                          capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{os.path.basename(path)} was written, but cannot be read back: {last[:300]}",
                        "make room if the disk is full; else python bench.py doctor, and report this", code=1)
    return runtime.load_file(answered)


def compare(model, questions, ours, theirs):
    """(the largest difference of a logit, the comparison in words, whether it passes)."""
    pairs = zip(ours["logits"], theirs["logits"])
    difference = torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()  # (of torch: a NaN stays one)
    allowed = max(TOLERANCE, RELATIVE * max(logits.abs().max().item() for logits in ours["logits"]))
    passes = difference <= allowed  # (a NaN is not)
    what, n = f"logits within {difference:.1e} ({allowed:.1e} is allowed)", questions["n"]
    differs = (ours["tokens"] != theirs["tokens"]).nonzero().flatten().tolist()
    if differs:
        at = differs[0]
        with torch.inference_mode():
            scores = model(torch.cat((questions["prompt"], ours["tokens"][None, :at]), dim=1))[0, -1]
        gap = (scores[ours["tokens"][at]] - scores[theirs["tokens"][at]]).item()
        what += f", greedy token {at + 1} of {n} is the first that differs, by {gap:.1e} in the logit"
        passes = passes and gap <= 2 * allowed  # else it is no tie
    else:
        what += f", the same {n} greedy tokens"
    if theirs["ids"] is not None:
        wrong = sum(a != b for a, b in zip(ours["ids"], theirs["ids"]))
        what += f", {f'other ids in {wrong}' if wrong else 'the same ids in all'} of {len(ours['ids']):,} lines of text"
        passes = passes and not wrong
    return difference, what, passes


def prove_int8(model, tokenizer, run, questions, ours, path):
    """Write a run folder of 8 bits, and see what is lost: (its row of the table, the comparison in words, does it hold
    what was written?)."""
    written = write_int8(model, tokenizer, run, path)
    started = time.perf_counter()
    found, known, _ = runtime.load_run(path)
    load = time.perf_counter() - started
    with torch.inference_mode():
        same = all(torch.equal(found(idx), written(idx)) for idx in questions["batches"])
        difference = max((found(idx)[:, at] - logits).abs().max().item() for idx, at, logits in
                         zip(questions["batches"], questions["positions"], ours["logits"]))
    rate, what = speed(found, questions["prompt"], questions["n"]), f"logits within {difference:.1e}"
    try:
        text = read_text(os.path.join("data", run["settings"].get("dataset") or "(no data set)"), megabytes=1)
        before, after = (measure_text(each, known, text)["bits_per_byte"] for each in (model, found))
        worse = after / before - 1
        what = (f"{before:.4f} bits per byte before, {after:.4f} after ({worse:+.2%}), on what {text.name} holds out; "
                f"{what}")
        if worse > 0.005:
            warn(f"in 8 bits, the model is {worse:.1%} worse")
    except UserError as error:
        note(f"bits per byte are not compared, {error.fact}: python evaluate.py with both folders and --data=FILE")
    what += f", {rate:,.0f} tokens/s instead of {ours['tokens_per_second']:,.0f}"
    return dict(size=size_of(path), load=load, rate=rate, difference=f"{difference:.1e}"), what, same


# ---------------------------------------------------------------------------------------------------------------------
# The model card


def licence(source):
    return next((text for name, text in LICENCES.items() if source.split()[:1] == [name]), "not known here")


USE = {  # of each file: how it is read
    "hf": """Hugging Face (`pip install torch transformers`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
inputs = tokenizer({prompt!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_length={length})[0]))
```

(It samples, with the temperature in generation_config.json; `do_sample=False` takes the likeliest tokens.) With OpenLLM
itself: `python sample.py FOLDER`, and `python train.py --init_from=FOLDER` to go on training.""",
    "model.onnx": """ONNX: `input_ids` (batch, length) and, per layer, `past_key_values.N.key` and `.value` (batch,
{c.n_kv_head}, past, {c.head_dim}), float32, of length 0 at first; `logits` come out, and `present.N.key` and `.value`,
which are the past of the next step. Past and length together are at most {c.block_size:,}. There is no mask for
padding: the texts of a batch have the same length.""",
    "model.ts": """TorchScript: `torch.jit.load("model.ts")(ids)` are the logits of all positions; ids (batch, length),
at most {c.block_size:,} tokens.""",
    "model.pt2": """torch.export: `torch.export.load("model.pt2").module()(ids)`, the same.""",
    "int8": """8 bits: a RUN of OpenLLM, `python sample.py FOLDER/int8`, also for serve.py and evaluate.py. It was
rounded, so it is not the same model any more; the difference is as large as the table says."""}


def model_card(name, model, run, dtype, rows, measured, prompt, folder="hf"):
    """README.md of an export: what this is, from what it was made, how good it is, and how to use it.

    folder: where hf is, seen from the card; rows: the files that it tells how to use.
    """
    c, settings = model.config, run["settings"]
    facts = {
        "shape": f"{c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads of {c.head_dim}"
                 + (f" ({c.n_kv_head} of keys and values)" if c.n_kv_head != c.n_head else "")
                 + f", MLP {c.n_inner}, context {c.block_size:,}, vocabulary {c.vocab_size:,}",
        "switches": f"pos={c.pos} norm={c.norm} mlp={c.mlp} qk_norm={c.qk_norm} bias={c.bias} "
                    f"tie_weights={c.tie_weights}",
        "parameters": f"{model.n_params():,}"}
    if os.path.isdir(run["path"]):
        facts["weights"] = f"{os.path.basename(os.path.abspath(run['path']))}, a Hugging Face model (its own licence)"
    else:
        facts["data"] = "; ".join(f"{source} (licence: {licence(source)})" for source in run["source"])
    if dtype != torch.float32:
        facts["numbers"] = str(dtype).removeprefix("torch.") + (
            "" if os.path.isdir(run["path"]) else ", rounded; the held-out loss was measured before that")
    if settings.get("init_from", "auto") not in ("auto", "scratch", "resume"):
        facts["started from"] = f"the weights of {os.path.basename(settings['init_from'].rstrip(os.sep))}"
    if "batch_size" in settings:
        tokens = run["step"] * settings["batch_size"] * settings["gradient_accumulation_steps"] * c.block_size
        facts["tokens seen"] = f"{tokens:,} in {run['step']:,} updates"
    if run["chat"]:
        facts["chat"] = "`tokenizer.apply_chat_template` makes a prompt of messages; `python sample.py FOLDER --chat`"
    if "val_loss" in run:
        facts["held-out loss"] = f"{run['val_loss']:.4f} nats per token, {run['val_bpb']:.4f} bits per byte"
    facts = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n" if "hf" in rows else ""
    threads = torch.get_num_threads()
    length = min(60, c.block_size)
    use = "\n\n".join(text.format(c=c, prompt=prompt, length=length, folder=folder)
                      for file, text in USE.items() if file in rows)
    return f"""{head}# {name}

| | |
|---|---|
{facts}

Each file was read back by the library that it is made for, without the program that wrote it, and compared with the
model on real text, in float32; the last column is the largest difference of a logit. (Times with {threads} threads, of
the machine that wrote it.)

{measured}

## Use

{use}
"""


def table(rows):
    """{file: what was measured} as Markdown."""
    lines = [f"| {file} | {row['size'] / 1e6:,.1f} MB | {row['load']:.2f} s | {row['rate']:,.0f} | "
             f"{row['difference']} |" for file, row in rows.items()]
    return "\n".join(["| format | size | load time | tokens/s | largest difference |", "|---|---|---|---|---|", *lines])


# ---------------------------------------------------------------------------------------------------------------------


def size_of(path):
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)


def choose_formats(settings, model, tokenizer):
    """The formats to write, after every check that needs no writing. Raises UserError."""
    asked = list(dict.fromkeys(name for entry in settings.format for name in entry.split(","))) or ["all"]
    for name in asked:
        if name not in (*FILES, "all"):
            raise UserError(f"there is no format {name!r}", f"--format={','.join(FILES)}, or all")
    formats = [name for name in FILES if name != "int8" or name in asked] if "all" in asked else asked
    missing = [package for name in formats for package in PACKAGES.get(name, ()) if not find_spec(package)]
    if missing:
        raise UserError(f"these exports need packages that are not installed: {', '.join(missing)}",
                        f"pip install {' '.join(missing)}; or --format=pt2, which needs none")
    holds = []
    for name in formats:
        try:
            check_format(name, model, tokenizer)
            holds.append(name)
        except UserError as error:
            if "all" not in asked:
                raise
            note(f"no {name}: {error.fact}")
    if not holds:
        raise UserError("no format can hold this model", "see the notes above")
    return holds


def check_format(name, model, tokenizer):
    """Raises UserError where this format cannot hold this model."""
    if name == "hf":
        huggingface.their_kind(model.config)
        huggingface.tokenizer_files(tokenizer, model.config.block_size)
    elif name != "int8" and model.config.block_size < 8:  # (int8 holds whatever a run holds)
        raise UserError(f"block_size={model.config.block_size} is too short to record a graph, which takes 8 tokens",
                        "--format=hf")
    elif name == "onnx" and 4 * sum(p.numel() for p in model.parameters()) > 2e9:
        raise UserError("an ONNX file cannot be larger than 2 GB, and this model is", "--format=hf or pt2")


def earlier(out, formats, weights):
    """The rows of export.json: what was exported to `out` before and stays. Raises UserError where that does not fit.

    Nothing is replaced that no export has written, and models are not mixed: the other formats must have these weights.
    """
    path = os.path.join(out, "export.json")
    before = huggingface.read_json(path, missing={})
    rows = before.get("rows") or {}
    for file in [FILES[name] for name in formats] + ["README.md"]:
        if os.path.lexists(os.path.join(out, file)) and not (file in rows or file == "README.md" and rows):
            raise UserError(f"{os.path.join(out, file)} is there, and no export has written it", "--out=ANOTHER_FOLDER")
    for name, written in (("hf", huggingface.WRITTEN | {"README.md"}), ("int8", {"best.pt", "tokenizer"})):
        others = set(os.listdir(os.path.join(out, name))) - written if os.path.isdir(os.path.join(out, name)) else ()
        if others and name in formats:
            raise UserError(f"{out}/{name} holds {min(others)}, which no export has written, and would be replaced",
                            "--out=ANOTHER_FOLDER")
    stays = {file: row for file, row in rows.items() if file not in [FILES[name] for name in formats]}
    if stays and before.get("weights") != weights:
        raise UserError(f"{out} holds exports of other weights: {', '.join(stays)}",
                        "--format=all, which replaces them; or --out=ANOTHER_FOLDER")
    return stays


def publish(new, target, aside):
    """Give a proven export its name. Of a folder, the one before is put aside first, and comes back if that fails."""
    if os.path.isdir(target):
        os.replace(target, aside)
    try:
        os.replace(new, target)
    except BaseException:
        if os.path.isdir(aside):
            os.replace(aside, target)
        raise


def fingerprint(model):
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().numpy())
    return digest.hexdigest()


def main(argv):
    settings, _, runs = load(ExportConfig, argv)
    named = runtime.choose_run(runs, settings)
    started = time.perf_counter()
    model, tokenizer, run = runtime.load_run(named, settings.checkpoint)
    run["load_seconds"] = time.perf_counter() - started
    runtime.check_whole(run)
    formats = choose_formats(settings, model, tokenizer)
    folder = os.path.abspath(run["path"] if os.path.isdir(run["path"]) else os.path.dirname(run["path"]))
    out = settings.out or os.path.join("exports", os.path.basename(folder))
    dtype = settings.dtype if settings.dtype != "auto" else run["dtype"] if os.path.isdir(run["path"]) else "float32"
    dtype = getattr(torch, dtype)
    model.requires_grad_(False)  # else what the graphs give would want gradients too
    with torch.no_grad():
        for name, p in model.named_parameters():  # as they will be in the files, and as they will be compared
            rounded = p.to(dtype).float()
            if not torch.isfinite(rounded).all():
                raise UserError(f"{name} has a weight of {p[~torch.isfinite(rounded)][0].item():g}, which is no number "
                                f"in {settings.dtype}", "--dtype=bfloat16 or float32; or another checkpoint")
            p.copy_(rounded)
    say(f"{run['path']}: {model.n_params():,} parameters, to {out}: {', '.join(formats)}")
    part = os.path.join(out, ".part")
    try:
        os.makedirs(out, exist_ok=True)
        with runtime.RunFolder(out):
            for name in ("hf", "int8"):  # killed while it was put aside?
                if os.path.isdir(os.path.join(part, "before-" + name)) and not os.path.exists(os.path.join(out, name)):
                    os.replace(os.path.join(part, "before-" + name), os.path.join(out, name))
            stays = earlier(out, formats, fingerprint(model))
            shutil.rmtree(part, ignore_errors=True)  # what a kill left
            os.makedirs(part)
            try:
                return export(model, tokenizer, run, formats, dtype, out, part, stays)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except ImportError as error:
        raise UserError(f"a package that exports need is broken: {error}", "install it anew, in a new environment") \
            from None
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}",
                        "make room, or --out=ANOTHER_FOLDER; the same command begins again", code=1) from None


def export(model, tokenizer, run, formats, dtype, out, part, stays):
    """Write each format into the folder `part`, prove it, and move it to `out`. Returns the exit code."""
    questions, ours = ask(model, run, tokenizer)
    native = dict(size=size_of(run["path"]), load=run["load_seconds"], rate=ours["tokens_per_second"], difference="")
    asked, rows, proven = os.path.join(part, "questions"), {}, []
    save_whole(torch.save, questions, asked)
    for name in formats:
        path = os.path.join(part, FILES[name])
        if name == "torchscript":
            note("PyTorch has deprecated TorchScript; pt2 is what comes after it")
        if name == "int8":
            rows[FILES[name]], what, passes = prove_int8(model, tokenizer, run, questions, ours, path)
            say(f"{name}: {what}")
            proven += [name] * passes
            continue
        if name == "hf":
            generation = run["generation"] if os.path.isdir(run["path"]) else None
            huggingface.write(path, model, tokenizer, dtype, generation, run["chat"])
        else:
            with quiet():
                WRITE[name](model, path)
        theirs = prove(path, asked)
        difference, what, passes = compare(model, questions, ours, theirs)
        say(f"{name}: {what}" + ("" if passes else ": not the same, so it is not kept"))
        if passes:
            proven.append(name)
            rows[FILES[name]] = dict(size=size_of(path), load=theirs["load_seconds"], rate=theirs["tokens_per_second"],
                                     difference=f"{difference:.1e}")
    if proven:
        rows |= stays
        measured = table({os.path.basename(run["path"]) + ", here": native} | rows)
        prompt = next((line[:min(40, model.config.block_size // 4)] for line in questions["lines"] if line.strip()), "")
        about = os.path.basename(os.path.abspath(out)), model, run, dtype
        card = model_card(*about, rows, measured, prompt)
        write_text(os.path.join(part, "README.md"), card)
        write_text(os.path.join(part, "export.json"), json.dumps(dict(weights=fingerprint(model), rows=rows), indent=1))
        os.replace(os.path.join(part, "export.json"), os.path.join(out, "export.json"))  # first: these names are ours
        for name in proven:
            if name == "hf":
                inner = model_card(*about, {"hf": rows["hf"]}, measured, prompt, folder=".")
                write_text(os.path.join(part, "hf", "README.md"), inner)
            publish(os.path.join(part, FILES[name]), os.path.join(out, FILES[name]),
                    os.path.join(part, "before-" + name))
        os.replace(os.path.join(part, "README.md"), os.path.join(out, "README.md"))
        print(measured)
        say(f"{out}: {', '.join(FILES[name] for name in proven)}, README.md")
    return 0 if proven == formats else 1


def write_text(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    command_line(main)
