# SPDX-License-Identifier: GPL-3.0-only
"""
Export: the model for other programs, each file verified before it is kept.

    python export.py                            # the newest run under out/, in all formats but int8
    python export.py out/small --format=hf      # exports/small/hf/
    python export.py SmolLM2-135M --format=onnx,pt2 --out=exports/mine --dtype=bfloat16

hf            hf/          for transformers: GPT2LMHeadModel, LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM
onnx          model.onnx   a graph with a key-value cache, named as in the optimum tools
torchscript   model.ts     ids to logits, for PyTorch without Python (deprecated by PyTorch)
pt2           model.pt2    ids to logits, torch.export's format
int8          int8/        a RUN with rounded weights, smaller and faster, for sample.py and serve.py
gguf          model.gguf   for llama.cpp, Ollama and LM Studio; --quantize=q8_0 for 8 bits

Each file is written into OUT/.part, read back by a process without this project's code
(formats/readback.py), and compared with the model on real text. Only then is it moved into place.
Exit code 1: a format exceeds its tolerance.
"""
import contextlib
import copy
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

# (First, so that an interrupted or failing import is no traceback.)
from runtime.console import UserError, command_line, note, origin, say
import torch
from torch.nn import functional as F

import tokenizer as tokenizers
from evaluation.perplexity import measure_text, read_text
from formats import gguf, huggingface
from formats.quantized import quantize
from model import KVCache
from runtime.files import check_like, is_gguf, replace_file
from runtime.settings import check_limits, load
from sample import RunConfig
from text.sources import LICENCES
from training import checkpoint as ckpt

# How far a logit may be off, since others add in another order
TOLERANCE = 1e-4
RELATIVE = 1e-5  # to the largest logit
LONGEST = 8192  # tokens of a context in the proof: time and memory of some formats grow with its square


@dataclass
class ExportConfig(RunConfig):
    format: str = "hf,onnx,torchscript,pt2"  # some of these, int8 or gguf
    out: str = ""  # output folder; by default exports/NAME of the run
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: unchanged
    quantize: Literal["none", "q8_0", "q4_1"] = "none"  # for gguf: 8 or 4 bits per weight


# ---------- The formats, without the paths of this machine that recorders add


def write_hf(path, model, tokenizer, run, dtype):
    huggingface.write(path, model, tokenizer, getattr(torch, dtype), run.get("generation"), run["chat"])


def write_gguf(path, model, tokenizer, run, dtype):
    gguf.write(str(path), model, tokenizer, dtype, run["chat"])


class GrowingCache(KVCache):
    """A KVCache for a recorder of graphs: no `if` on a length, nothing in place.

    attention_mask: (B, past + T), 0 on padding. position_ids: (B, T).
    """

    def __init__(self, past, attention_mask, position_ids):
        self.past = past
        self.present = []
        self.length = past[0].size(2)
        self.position_ids = position_ids
        # Padding is seen by nobody but itself, since a softmax over nothing
        # would be NaN.
        T = position_ids.size(1)
        column = torch.arange(self.length + T)
        row = self.length + torch.arange(T)[:, None]  # the column of each new token
        real = attention_mask[:, None, None, :] != 0  # (B, 1, 1, past + T)
        self.mask = (column < row) & real | (column == row)  # (B, 1, T, past + T)

    def positions(self, T):
        return self.position_ids

    def attend(self, layer, q, k, v):
        k = torch.cat((self.past[2 * layer], k), dim=2)  # (B, n_kv_head, past + T, head_dim)
        v = torch.cat((self.past[2 * layer + 1], v), dim=2)
        self.present += [k, v]
        shared = k.size(1) != q.size(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=shared)


class LogitsAndCache(torch.nn.Module):
    """Ids, mask and positions, keys and values of each layer -> logits, keys and values with T positions more."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, *past):
        cache = GrowingCache(past, attention_mask, position_ids)
        logits = self.model(input_ids, cache=cache)
        return logits, *cache.present


def write_onnx(path, model, *_):
    config = model.config
    if 4 * model.n_params() > 2e9:
        raise UserError("an ONNX file cannot be larger than 2 GB, and this model is", "--format=hf or pt2")
    names = [f"{layer}.{what}" for layer in range(config.n_layer) for what in ("key", "value")]
    B, T, past = 2, 3, 4  # an example; 0 and 1 would be taken for constants
    ids = torch.zeros(B, T, dtype=torch.long)
    positions = ids.clone()  # (the same tensor twice would be the same input)
    mask = torch.ones(B, past + T, dtype=torch.long)
    cache = [torch.zeros(B, config.n_kv_head, past, config.head_dim) for _ in names]
    batch = torch.export.Dim("batch")
    length, before = [torch.export.Dim(name, max=config.block_size) for name in ("length", "past")]
    program = torch.onnx.export(
        LogitsAndCache(model), (ids, mask, positions, *cache), dynamo=True, verbose=False, external_data=False,
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: torch.export.Dim.AUTO}, {0: batch, 1: length},
                        tuple({0: batch, 2: before} for _ in names)))
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
    Path(path).write_bytes(whole.getbuffer())


def write_int8(path, model, tokenizer, run, dtype):
    tokenizer.save(os.path.join(path, "tokenizer"))
    kept = {name: run[name] for name in ("step", "source", "chat", "data_sha256") if name in run}
    ckpt.save_checkpoint(os.path.join(path, "best.pt"), dict(
        kept, format=1, int8=True, model=quantize(copy.deepcopy(model)).state_dict(),
        settings=asdict(model.config) | dict(dataset=origin(run["settings"].get("dataset", ""))),
        tokenizer_sha256=tokenizers.fingerprint(tokenizer)))


class Format(NamedTuple):
    file: str  # or folder
    write: Callable  # (path, model, tokenizer, run, dtype); gguf's may be quantized
    packages: tuple  # that it needs
    use: str  # for the model card


FORMATS = {
    "hf": Format("hf", write_hf, ("transformers",), """
`pip install torch transformers`, and in Python:

```python
from transformers import pipeline
print(pipeline("text-generation", "hf")({prompt!r}, max_length={length})[0]["generated_text"])
```

In OpenLLM it is a RUN: `python sample.py FOLDER`."""),
    "onnx": Format("model.onnx", write_onnx, ("onnx", "onnxscript", "onnxruntime"), """
`input_ids` and `position_ids` (batch, length), `attention_mask` (batch, past + length), 0 on padding,
`past_key_values.N.key` and `.value` (batch, n_kv_head, past, head_dim), of length 0 at first
-> `logits` and `present.N.key` and `.value`, the next past"""),
    "torchscript": Format("model.ts", write_torchscript, (), '`torch.jit.load("model.ts")(ids)`: the logits'),
    "pt2": Format("model.pt2", write_pt2, (), '`torch.export.load("model.pt2").module()(ids)`: the logits'),
    "gguf": Format("model.gguf", write_gguf, ("gguf", "transformers", "accelerate"), """
for llama.cpp (`llama-cli -m model.gguf`), LM Studio, and Ollama: `echo "FROM ./model.gguf" > Modelfile`, then
`ollama create mine -f Modelfile` and `ollama run mine`"""),
    "int8": Format("int8", write_int8, (), "a RUN for OpenLLM: `python sample.py FOLDER/int8`"),
}


# ---------- The proof


def ask(model, tokenizer, text):
    """The questions to a format, see readback.answer, and the model's own answers: two dicts."""
    # 1. Ids of the text; without one, of this file.
    size = model.config.block_size
    text = "\n".join(text.documents) if text else Path(__file__).read_text("utf-8")
    known = getattr(tokenizer, "characters", text)
    ids = tokenizer.encode("".join(c for c in text[:100_000] if c in known)) or [0]
    ids *= 1 + 4 * size // len(ids)

    # 2. Batches of 1 and 3 contexts of 1, 7 and all tokens, as far as their logits take 2 GB at most.
    most = max(1, int(2e9 / (4 * model.config.vocab_size)))
    lengths = sorted({1, min(7, size), min(size, most, LONGEST)})
    batches = [torch.tensor(ids[:B * T]).view(B, T) for T in lengths for B in (1, 3) if B * T <= most]
    positions = [torch.linspace(0, idx.size(1) - 1, min(idx.size(1), 256)).long() for idx in batches]

    # 3. A prompt, and lines without special tokens, which text never becomes here.
    n = min(64, max(1, size - 8))
    prompt = torch.tensor([ids[:min(32, size - n)]])
    lines = tokenizer.decode(ids[:20_000]).split("\n")
    lines = [line for line in lines if not any(name in line for name in tokenizer.special)]

    questions = dict(batches=batches, positions=positions, prompt=prompt, n=n, lines=lines)
    return questions, dict(logits=logits_of(model, questions), ids=[tokenizer.encode(line) for line in lines])


@torch.inference_mode()
def logits_of(model, questions):
    return [model(idx)[:, at] for idx, at in zip(questions["batches"], questions["positions"])]


def largest_difference(a, b):
    return torch.stack([(x - y).abs().max() for x, y in zip(a, b)]).max().item()  # torch's max keeps a NaN


def prove(path):
    """The answers of an export to the questions beside it, by a process that cannot import this project."""
    answers = path.with_name("answers")
    readback = Path(__file__).parent / "formats/readback.py"
    done = subprocess.run([sys.executable, "-I", readback, path, path.with_name("questions"), answers],
                          capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise UserError(f"{path.name} cannot be read back: {said}",
                        "if the disk is full, free space; else report it", code=1)
    return ckpt.load_file(answers)


def compare(model, questions, ours, theirs):
    """(the largest difference of a logit, the result in words, whether it passes)."""
    # 1. Logits. A NaN does not pass.
    difference = largest_difference(ours["logits"], theirs["logits"])
    largest = max(logits.abs().max().item() for logits in ours["logits"])
    allowed = max(TOLERANCE, RELATIVE * largest)
    what = f"logits within {difference:.1e} (allowed: {allowed:.1e})"

    # 2. How far is each of their tokens below the likeliest after those before? Ties are allowed.
    prompt, tokens, n = questions["prompt"], theirs["tokens"], questions["n"]
    with torch.inference_mode():
        logits = model(torch.cat((prompt, tokens[None, :-1]), dim=1))[0, -n:]  # (n, vocab_size)
    gap = (logits.amax(dim=1) - logits[range(n), tokens]).max().item()
    what += f", {n} greedy tokens within {gap:.1e} of the likeliest"
    passes = difference <= allowed and gap <= 2 * allowed

    # 3. Text to ids, where the format has a tokenizer.
    if theirs["ids"] is not None:
        same = sum(a == b for a, b in zip(ours["ids"], theirs["ids"]))
        what += f", the same ids in {same:,} of {len(ours['ids']):,} lines"
        passes = passes and same == len(ours["ids"])
    return difference, what, passes


def compare_int8(path, model, text, questions, ours):
    """The same for an int8 run, which passes where it holds what was written."""
    found, tokenizer, _ = ckpt.load_run(str(path))
    logits = logits_of(found, questions)
    passes = largest_difference(logits_of(quantize(copy.deepcopy(model)), questions), logits) == 0
    difference = largest_difference(ours["logits"], logits)
    what = f"logits within {difference:.1e}"
    if text:
        before = measure_text(model, tokenizer, text)["bits_per_byte"]
        after = measure_text(found, tokenizer, text)["bits_per_byte"]
        what = (f"{before:.4f} bits per byte before, {after:.4f} after ({after / before - 1:+.2%}), "
                f"on the validation split of {text.name}; {what}")
    return difference, what, passes


# ---------- The model card

# What the Hugging Face Hub reads of a card
HUB = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"


def model_card(name, model, run, dtype, questions, rows):
    """README.md of an export. rows: of the table, by file."""
    shape = " ".join(f"{key}={value}" for key, value in asdict(model.config).items())
    lines = [f"# {name}", "", f"- parameters: {model.n_params():,}, {dtype}", f"- architecture: {shape}"]
    for source in run["source"]:
        licence = LICENCES.get(source.split(" ")[0], "unknown")
        lines.append(f"- source: {source} (licence: {licence})")
    if "val_loss" in run:  # before any rounding
        loss = f"{run['val_loss']:.4f} nats per token, {run['val_bpb']:.4f} bits per byte"
        lines.append(f"- validation: {loss}")
    if run["chat"]:
        lines.append("- chat: `tokenizer.apply_chat_template`, or `python sample.py FOLDER --chat`")
    lines += ["", "Each file was read back and compared with the model on real text.", "", table(rows)]
    length = min(60, model.config.block_size)
    prompt = next((line[:min(40, length // 4)] for line in questions["lines"] if line.strip()), "")
    for each in FORMATS.values():
        if each.file in rows:
            lines += ["", f"{each.file}:", each.use.format(prompt=prompt, length=length)]
    return "\n".join([*lines, ""])


def table(rows):
    return "\n".join(["| format | size | largest logit difference |", "|---|---|---|", *rows.values()])


# ---------- The program


def check_formats(formats, quantize):
    """Raises UserError where a format is unknown, lacks a package, or cannot be quantized."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise UserError(f"there is no format {unknown[0]!r}", f"--format={','.join(FORMATS)}")
    if quantize != "none" and formats != ["gguf"]:
        raise UserError(f"--quantize={quantize} is only for GGUF files", f"--format=gguf --quantize={quantize}")
    missing = [package for name in formats for package in FORMATS[name].packages if not find_spec(package)]
    if missing:
        raise UserError(f"these exports need packages that are not installed: {', '.join(missing)}",
                        f"pip install {' '.join(missing)}; or --format=pt2, which needs none")


def earlier_rows(out):
    """The rows of the table in `out`, by file. Raises UserError for a folder that is not an export's."""
    path = out / "export.json"
    if path.exists():
        earlier = huggingface.read_dict(str(path))
        check_like(earlier, dict(rows={}), path)
        return earlier["rows"]
    if out.is_dir() and set(os.listdir(out)) - {".part"}:
        raise UserError(f"{out} has files that export.py did not write", "--out=ANOTHER_FOLDER")
    return {}


def round_weights(model, dtype):
    """Round the weights to what the files will hold."""
    model.requires_grad_(False)  # else what the graphs give would want gradients too
    for name, p in model.named_parameters():
        rounded = p.to(getattr(torch, dtype))
        if not rounded.isfinite().all():
            raise UserError(f"{name} has a weight of {p.abs().max():g}, which {dtype} cannot hold",
                            "--dtype=bfloat16 or float32; or another checkpoint")
        p.copy_(rounded)


def validation_text(run):
    """A Text of 1 MB of the run's own data; None where they are not here."""
    dataset = run["settings"].get("dataset")
    with contextlib.suppress(UserError):
        return read_text(os.path.join("data", dataset), megabytes=1) if dataset else None


def main(argv):
    settings, _, runs = load(ExportConfig, argv)
    check_limits(settings, {"block_size": (1, 1e9)})
    formats = settings.format.split(",")

    # 1. Everything that can be refused before something is written.
    named = ckpt.choose_run(runs, settings)
    check_formats(formats, settings.quantize)
    model, tokenizer, run = ckpt.load_run(named, settings.checkpoint, block_size=settings.block_size)
    ckpt.check_whole(run)
    folder = Path(named).absolute()
    name = folder.parent.name if folder.is_file() else folder.name
    if is_gguf(named):
        name = folder.stem
    out = Path(settings.out or f"exports/{name}")
    rows = earlier_rows(out)
    dtype = run.get("dtype", "float32") if settings.dtype == "auto" else settings.dtype
    round_weights(model, dtype)
    if settings.quantize != "none":
        dtype = settings.quantize
        gguf.round_weights(model, dtype)

    # 2. Each format is written into `part`, proven, and moved to `out`.
    say(f"{run['path']}: {model.n_params():,} parameters, to {out}: {', '.join(formats)}")
    logging.disable(logging.WARNING)  # torch tells what it lacks
    warnings.simplefilter("ignore")
    part = out / ".part"
    code = 0
    try:
        shutil.rmtree(part, ignore_errors=True)  # what a kill left
        part.mkdir(parents=True)
        text = validation_text(run)
        questions, ours = ask(model, tokenizer, text)
        ckpt.save_checkpoint(str(part / "questions"), questions)
        about = out.absolute().name, model, run, dtype, questions
        for name in formats:
            path = part / FORMATS[name].file
            # On a terminal, the result overwrites this line.
            say(f"{name}: writing and comparing", end="\r" if sys.stderr.isatty() else "\n")
            try:
                FORMATS[name].write(path, model, tokenizer, run, dtype)
            except UserError as error:
                if len(formats) == 1:
                    raise
                note(f"skipped {name}: {error.fact}")
                continue
            if name == "int8":
                difference, what, passes = compare_int8(path, model, text, questions, ours)
            else:
                difference, what, passes = compare(model, questions, ours, prove(path))
            say(f"{name}: {what}")
            if passes:
                keep(path, out, rows, difference, about)
            else:
                say(f"{name} differs too much and is not kept")
                code = 1
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}",
                        "free space, or --out=ANOTHER_FOLDER", code=1) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(table(rows))
    return code


def keep(path, out, rows, difference, about):
    """Move a proven export into `out`, with its row of the table, and write the model cards."""
    name = path.name
    target = out / name
    size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file()) / 1e6
    rows[name] = f"| {name} | {size:,.1f} MB | {difference:.1e} |"
    if name == "hf":
        card = HUB + model_card(*about, {name: rows[name]})
        write_text(path / "README.md", card.replace('"hf"', '"."'))
    write_text(out / "export.json", json.dumps(dict(rows=rows), indent=1))
    if target.is_dir():
        shutil.rmtree(target)
    path.replace(target)
    write_text(out / "README.md", model_card(*about, rows))


def write_text(path, text):
    with replace_file(str(path), "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    command_line(main)
