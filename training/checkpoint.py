# SPDX-License-Identifier: GPL-3.0-only
"""
Checkpoints: written, found and read; and the folder of a run.

    save_checkpoint("out/small/ckpt_00001000.pt", {"model": model.state_dict(), "step": 1000, ...})
    checkpoint, tokenizer = read_run("out/small")  # or a .pt file, nanoGPT's too, or a Hugging Face folder
    model, tokenizer, checkpoint = load_run("out/small", device=device)

A file bears its final name only when it is whole and on the disk, so the newest checkpoint is a good one.
It holds tensors and plain values and is read with weights_only=True, so a stranger's file cannot run code.
"""
import contextlib
import difflib
import glob
import hashlib
import math
import os
import pickle
import re
import shutil
import zipfile
from shlex import quote

import torch

import tokenizer as tokenizers
from model import GPT, GPTConfig, outline
from runtime.console import UserError, note, origin, warn
from runtime.files import check_like, is_gguf, locked, replace_file
from runtime.settings import or_else
from training import lora

# ---------- Writing


def save_checkpoint(path, state):
    """When this returns, the file is on the disk under its name. When it raises, nothing has changed."""
    try:
        with replace_file(path) as file:
            torch.save(state, file)
        with contextlib.suppress(OSError):  # not every system can sync a folder
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)  # the name is on the disk before anything older is deleted
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # where the disk is full, torch's writer hides why
        if isinstance(error.__context__, OSError):
            error = error.__context__
        fix = "free disk space and rerun to resume"
        raise UserError(f"cannot write {path}: {error}", fix, code=1) from None


def checkpoints(run, end=".pt"):
    """The numbered checkpoints of a run folder, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(run), "ckpt_" + "[0-9]" * 8 + end)))


def prune_checkpoints(run):
    """Delete what a kill left half-written, and all but the last two: a dying disk may cut one."""
    for path in checkpoints(run)[:-2] + checkpoints(run, ".pt.part"):
        with contextlib.suppress(OSError):  # too many checkpoints are no reason to end a run
            os.unlink(path)


class RunFolder(contextlib.ExitStack):
    """The folder of a run, into which one process at a time may write."""

    def __init__(self, path, writes=True):
        super().__init__()
        self.path, self.writes = path, writes

    def claim(self):
        """Make and lock the folder. Raises UserError where it holds other files than those of a run."""
        from training.log import read_header  # sampling does without
        log = os.path.join(self.path, "log.jsonl")
        self.callback(remove_empty, self.path)
        try:
            os.makedirs(self.path, exist_ok=True)
            self.enter_context(locked(log))
        except OSError as error:
            fact = f"cannot write to out_dir={self.path}: {error.strerror}"
            raise UserError(fact, "--out_dir=out/ANOTHER") from None
        names = {name for name in os.listdir(self.path) if not name.startswith(".")} - {"log.jsonl.part"}
        begun = read_header(log) and "best.pt" not in names  # it was stopped before its first checkpoint
        if names and not begun and not checkpoints(self.path):
            raise UserError(f"out_dir={self.path} holds {min(names)}, but no run to continue",
                            "--out_dir=out/ANOTHER")

    def make_ready(self, step, needed):
        """Set aside the checkpoints after `step`, which could not be read. needed: bytes to be written."""
        for path in checkpoints(self.path):
            if os.path.basename(path) > f"ckpt_{step:08d}.pt":
                os.replace(path, path + ".damaged")
        free = shutil.disk_usage(self.path).free
        if free < needed:
            warn(f"the checkpoints need {needed / 1e6:,.0f} MB, but the disk has only {free / 1e6:,.0f} MB left")


def remove_empty(folder):  # an error before the first step leaves no folder
    with contextlib.suppress(OSError):
        os.removedirs(folder)


# ---------- Reading a file


def load_file(path):
    """The dict in a stranger's .pt file: plain values, and weights that take no more memory than the file."""
    from formats.nanogpt import refuse_others  # rarely needed
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}", "give a run folder or a .pt file of one")
    try:
        size = check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        refuse_others(state, path)
        weights = list(state.get("model", {}).values())
        if any(tensor.layout != torch.strided or tensor.device.type != "cpu" for tensor in weights):
            raise ValueError("a tensor is not of the plain kind")
        if sum(tensor.nbytes for tensor in weights) > 2 * size:  # tied weights have two names
            raise ValueError("its weights take more memory than the file")
        return state
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors and plain values: opening it could run code",
                        "use another checkpoint") from None
    except Exception as error:  # one flipped bit can mean anything to a reader
        what = str(error)[:200] or type(error).__name__
        raise UserError(f"{path} is damaged, or not a checkpoint: {what}", "use another checkpoint") from None


def check_archive(path):
    """The size of the file. Raises BadZipFile for a wrong checksum, or members larger than the file.

    torch.load checks neither, so both readers must see the same members: torch takes the place of the
    directory from the end of the file, Python expects it right in front of that end.
    """
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        members, file = archive.infolist(), archive.fp
        file.seek(archive.start_dir + 42)
        first = int.from_bytes(file.read(4), "little")  # where the first member is, as the directory has it
        file.seek(size - 42)
        end = file.read()
        moved = end.startswith(b"PK\6\7") and int.from_bytes(end[8:16], "little") != size - 98  # beyond 4 GB
        if archive.comment or moved or first != members[0].header_offset:
            raise zipfile.BadZipFile("its directory is not where it should be")
        if sum(member.file_size for member in members) > size:
            raise zipfile.BadZipFile("it would unpack to more than its size")
        if bad := archive.testzip():
            raise zipfile.BadZipFile(f"{bad} has a wrong checksum")
    return size


# What readers of a checkpoint rely on: examples of each type.
ALWAYS = dict(settings=dict(dataset=""), model={}, step=0, tokenizer_sha256="", source=[""])
SOMETIMES = dict(chat=False, int8=False, val_loss=0.0, val_bpb=0.0, base=dict(path="", sha256=""))


def load_checkpoint(path):
    """What save_checkpoint wrote. Raises UserError where it is missing, damaged or unsafe."""
    return check_checkpoint(load_file(path), path)


def check_checkpoint(state, path):
    """The checkpoint. Raises UserError where it is none, or its weights do not fit its settings."""
    if state.get("format") != 1:
        raise UserError(f"{path} is not a checkpoint of this project (no format 1)", "use another one")
    here = {name: like for name, like in SOMETIMES.items() if state.get(name) is not None}
    check_like(state, ALWAYS | here, path)
    if not state.get("base"):
        check_model(state["settings"], state["model"], path, state.get("int8"))
    return state


def check_model(settings, weights, path, int8=False):
    """Raises UserError where weights do not fit the model of the settings, before it takes memory."""
    from formats.quantized import quantize  # rarely needed
    try:
        model = outline(config_of(settings), len(weights))
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a valid model: {error}", "use another model") from None
    if int8:
        model = quantize(model)
    fitting(model, weights, path)


def config_of(settings):
    """The shape that the settings of a run describe. An older run may lack a switch: its default holds."""
    known = GPTConfig.__dataclass_fields__.keys() & settings.keys()
    return GPTConfig(**{name: settings[name] for name in known})


# ---------- Finding and reading a run


def find_checkpoint(init_from, out_dir):
    """The newest readable checkpoint of the run in out_dir, to continue it; None for a new one."""
    paths = checkpoints(out_dir)
    if paths and init_from == "scratch":
        raise UserError(f"init_from=scratch, but {out_dir} holds {os.path.basename(paths[-1])}",
                        f"--out_dir=out/ANOTHER, or rm -r {quote(out_dir)}")
    if not paths:
        if init_from == "resume":
            raise UserError(f"init_from=resume, but {out_dir} holds no checkpoint", "omit --init_from")
        return None
    for path in reversed(paths):
        try:
            state = load_checkpoint(path)
            if "optimizer" in state:
                return state
            warn(f"{path} has no optimizer (a renamed best.pt?)")
        except UserError as error:
            warn(error.fact)
    best = quote(os.path.join(out_dir, "best.pt"))
    raise UserError(f"{out_dir} has no readable checkpoint", f"--init_from={best} --out_dir=out/ANOTHER")


def best_of(out_dir):
    """(the validation loss of best.pt, its step); (infinity, 0) where it cannot be read."""
    path = os.path.join(out_dir, "best.pt")
    try:
        best = load_checkpoint(path)
        return best["val_loss"], best["step"]
    except (UserError, KeyError):
        if os.path.exists(path):
            warn(f"{path} cannot be used; the next validation replaces it")
        return math.inf, 0


def choose_run(bare, settings):
    """The RUN of a command line: the bare argument, --init_from, --out_dir, or the newest one below out/."""
    if len(bare) > 1:
        raise UserError(f"expected one RUN, got {len(bare)}: {' '.join(bare)}", f"give one: {quote(bare[0])}")
    init_from = "" if settings.init_from == "resume" else settings.init_from  # nanoGPT's word for --out_dir
    named = bare or [init_from or settings.out_dir or find_run()]
    return named[0]


# The model that comes with the code: what config/train_small.py trains, in 8 bits.
SMALL = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "pretrained", "small")


def find_run():
    """The run below out/ that was written last, or else the model that comes with the code."""
    if runs := runs_below("out"):
        return runs[0]
    if not os.path.isdir(SMALL):
        raise UserError("there is no trained run in out/", "python train.py config/train_small.py")
    note("there is no run in out/: using the small model that comes with the code; it writes Python")
    return os.path.relpath(SMALL)


def runs_below(folder):
    """The runs in a folder or deeper, the one that was written last first."""
    paths = [path for path in glob.glob(f"{glob.escape(folder)}/**/*.pt", recursive=True)
             if os.path.basename(path).startswith(("best", "ckpt_")) and os.path.isfile(path)]
    paths.sort(key=os.path.getmtime, reverse=True)
    return list(dict.fromkeys(map(os.path.dirname, paths)))


def no_model(run):
    """The error where a RUN has no model: what it is instead, or the nearest name."""
    name = os.path.basename(os.path.normpath(run))
    if os.path.exists(os.path.join(run, "train.bin")):
        return UserError(f"{run} is prepared data, not a run",
                         f"python train.py config/train_small.py --dataset={quote(name)} --out_dir=out/{quote(name)}")
    if os.path.exists(os.path.join(run, "adapter_config.json")):
        return UserError(f"{run} is an adapter of peft, without the model that it corrects",
                         "in Python: model.merge_and_unload().save_pretrained(FOLDER), and the tokenizer's, too")
    if os.path.isdir(run):
        fix = f"python train.py config/train_small.py --out_dir={quote(run)}"
        runs = runs_below(run) or runs_below("out")[:5]
        return UserError(f"there is no trained model in {run}", ", or ".join(runs) or fix)
    # Not there at all. An address like HuggingFaceTB/SmolLM2-135M is one of the Hugging Face hub.
    hub = re.fullmatch(r"(?!out/)[\w-]+/[\w.-]+", run)
    if hub and not os.path.isdir(os.path.dirname(run)):
        return UserError(f"there is no folder {run}", f"hf download {run} --local-dir {name}, then {name}")
    runs = runs_below("out")
    near = difflib.get_close_matches(run, runs, 1) or runs[:5]
    return UserError(f"there is no run {run}", ", or ".join(near) or "python train.py config/train_small.py")


def checkpoint_path(run, which="best"):
    """The file of a RUN: itself, or of a folder the best checkpoint, or with which="last" the newest."""
    if os.path.isfile(run):
        return run
    paths = [os.path.join(run, "ckpt.pt"), *checkpoints(run)]  # nanoGPT's, and ours
    if which == "best":
        paths.append(os.path.join(run, "best.pt"))
    for path in reversed(paths):
        if os.path.exists(path):
            return path
    raise no_model(run)


def read_run(run, which="best", depth=0):
    """(checkpoint, its tokenizer) of a RUN: a run or Hugging Face folder, a .gguf or .pt file, nanoGPT's too.

    The checkpoint also says its `path`, and in `chat` whether the model knows a chat format. LoRA's
    corrections are added to the weights. depth: how many LoRA runs correct this one.
    """
    from formats import gguf_reader, huggingface, nanogpt  # rarely needed

    # 1) Read it, whatever it is.
    if huggingface.is_folder(run):
        path = run
        checkpoint, tokenizer = huggingface.read(run)
    elif is_gguf(run):
        path = run
        checkpoint, tokenizer = gguf_reader.read(run)
    else:
        path = checkpoint_path(run, which)
        checkpoint = load_file(path)
        if "model_args" in checkpoint:
            checkpoint, tokenizer = nanogpt.convert(checkpoint, path)
            check_model(checkpoint["settings"], checkpoint["model"], path)
        else:
            check_checkpoint(checkpoint, path)
            tokenizer = tokenizers.load_from(os.path.dirname(path) or ".", checkpoint["tokenizer_sha256"])
    tokens, rows = tokenizer.vocab_size, checkpoint["settings"]["vocab_size"]
    if tokens > rows:
        raise UserError(f"{path}: the tokenizer beside it has {tokens:,} tokens, the model only {rows:,}",
                        "use a model with its own tokenizer")

    # 2) Complete it.
    if checkpoint.get("base"):
        merge_base(checkpoint, run, depth)
    template = os.path.join(path, "chat_template.jinja")  # export.py writes one where the model can chat
    chat = bool(checkpoint.get("chat") or tokenizer.template or os.path.exists(template))
    source = [origin(source) for source in checkpoint["source"]]  # an older one may name folders
    return checkpoint | dict(path=path, chat=chat, source=source), tokenizer


def load_run(run, which="best", device="cpu", int8=False, block_size="auto"):
    """(model in eval mode, its tokenizer, the rest of the checkpoint) of a RUN.

    int8: quantize it. block_size: cut the context to this many tokens.
    """
    from formats.quantized import quantize
    checkpoint, tokenizer = read_run(run, which)
    path, stored = checkpoint["path"], bool(checkpoint.get("int8"))  # an export may be in 8 bits
    try:
        config = config_of(checkpoint["settings"])
        config.block_size = min(config.block_size, or_else(block_size, config.block_size))
        model = GPT(config)
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"the model of {path} cannot be built here: {str(error).splitlines()[0]}",
                        "a machine with more memory") from None
    if stored:
        model = quantize(model)
    load_weights(model, checkpoint.pop("model"), path)
    if int8 and not stored:
        model = quantize(model)
    checkpoint["int8"] = int8 or stored
    return model.to(device).eval(), tokenizer, checkpoint


def check_whole(checkpoint):
    """Raises UserError where the weights have been rounded to 8 bits."""
    if checkpoint.get("int8"):
        raise UserError(f"{checkpoint['path']} has 8-bit weights, for inference only",
                        "use the run that it was made from")


# ---------- Weights, and what LoRA has of them


def trained_weights(model):
    """The state_dict that a checkpoint holds: of a model with LoRA, the corrections alone."""
    weights = model.state_dict()
    return lora.adapters(weights) or weights


def fitting(model, weights, path):
    """Those of the weights that the model takes. Raises UserError that names the first that does not fit."""
    ours, positions = trained_weights(model), "transformer.wpe.weight"
    found = {name: weights.get(name) for name in ours}
    if torch.is_tensor(found.get(positions)):
        found[positions] = found[positions][:model.config.block_size]  # of a longer context
    check_like(found, ours, path)
    if unknown := sorted(map(str, weights.keys() - model.state_dict().keys())):
        raise UserError(f"{path} has tensors unknown to its settings: {', '.join(unknown[:20])}",
                        "the settings of its training: is bias=True missing, for example?")
    return found


def load_weights(model, weights, path):
    model.load_state_dict(fitting(model, weights, path), strict=False)


def name_base(path, start):
    """What a LoRA run keeps of the weights that it corrects: their place, and their sha256."""
    digest = hashlib.sha256(str(start.get("base")).encode())
    weights = start.get("corrections", start["model"])  # (the last bits of their sum may differ)
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return dict(path=path, sha256=digest.hexdigest())


MOST_BASES = 4  # LoRA runs that correct LoRA runs


def read_base(checkpoint, run, depth=0):
    """The checkpoint that a LoRA run corrects. Raises UserError where it is not as it was."""
    path, problem = checkpoint["base"]["path"], ""
    if depth == MOST_BASES:  # maybe it corrects itself
        problem = f"itself a LoRA, and so on: more than {MOST_BASES} deep"
    elif not os.path.exists(path):
        problem = "which is missing"
    else:
        start, _ = read_run(path, depth=depth + 1)
        if name_base(path, start) != checkpoint["base"]:
            problem = "which has changed"
    if problem:
        raise UserError(f"{run} is a LoRA of {path}, {problem}",
                        f"restore the old {path}; export.py --format=hf makes a standalone model")
    check_model(checkpoint["settings"], start["model"], run)
    return start


def merge_base(checkpoint, run, depth):
    """Put the corrected weights into the checkpoint of a LoRA run, whose own become `corrections`."""
    settings, corrections = checkpoint["settings"], checkpoint["model"]
    base = read_base(checkpoint, run, depth)["model"]
    try:
        merged = lora.merge(base, corrections, settings["lora_rank"], settings["lora_alpha"])
    except (KeyError, ValueError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{run} holds LoRA corrections that do not fit: {type(error).__name__}: {error}",
                        "use another checkpoint") from None
    checkpoint.update(model=merged, corrections=corrections)
