# SPDX-License-Identifier: GPL-3.0-only
"""
Checkpoints: how one is written, found and read, and who may write into the folder of a run.

    save_checkpoint("out/small/ckpt_00001000.pt", {"model": model.state_dict(), "step": 1000, ...})
    checkpoint, tokenizer = read_run("out/small")           # or a .pt file, nanoGPT's too, or a Hugging Face folder
    model, tokenizer, checkpoint = load_run("out/small", device=device)

Two rules make a checkpoint something to rely on. A file bears its final name only when it is whole and on the disk, so
that whatever happens, the newest checkpoint is a good one. And it holds tensors and plain values only and is read with
weights_only=True, so that opening a stranger's file cannot run a stranger's code.
"""
import contextlib
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
from runtime.console import UserError, origin, warn
from runtime.files import check_like, foreign, locked, replace_file
from training import lora

# ----------------------------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(path, state):
    """Write `state`: when this returns, the file is on the disk under its name; when it raises, nothing has changed."""
    try:
        with replace_file(path) as file:
            torch.save(state, file)
        with contextlib.suppress(OSError):  # (Windows cannot open a folder, and not every file system can sync one)
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)  # the name is on the disk before anything older is deleted
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # where the disk is full, torch's writer hides why
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"cannot write {path}: {cause}",
                        "make room; the same command goes on from the checkpoint before", code=1) from None


def checkpoints(run):
    """The numbered checkpoints of a run folder, oldest first: by the number in the name, not by the clock."""
    return sorted(glob.glob(os.path.join(glob.escape(run), "ckpt_" + "[0-9]" * 8 + ".pt")))


def prune_checkpoints(run, keep=2):
    """Delete all numbered checkpoints but the last `keep` (two: a dying disk may cut one)."""
    for path in checkpoints(run)[:-keep]:
        with contextlib.suppress(OSError):  # too many checkpoints are no reason to end a run
            os.unlink(path)


# What train.py writes into the folder of a run; while a file is being written, it ends in .part.
RUN_FILES = r"(ckpt_\d{8}\.pt|best\.pt|log\.jsonl|loss\.svg|tokenizer)(\.part|\.damaged)?(/.*)?"


class RunFolder:
    """The folder of a run, and the right to write into it, which one process at a time has: a lock, which the system
    takes back when the process ends, however it ends."""

    def __init__(self, path, writes=True):
        self.path, self.writes, self.lock = path, writes, None

    def __enter__(self):
        if self.writes and os.path.isdir(self.path):
            with contextlib.suppress(OSError):  # `open` says so, where there is something to write
                self.take()
        return self

    def __exit__(self, *_):
        if self.lock is not None:
            self.lock.close()

    def take(self):
        lock = contextlib.ExitStack()
        try:
            lock.enter_context(locked(os.path.join(self.path, "run")))
        except UserError:
            raise UserError(f"another process is at work in {self.path}",
                            "wait for it or stop it; or give this one a folder of its own") from None
        self.lock = lock

    def check_ours(self):
        """Raises UserError where a run can neither be continued nor begun: a run never writes among other files.

        It begins in a folder that is new, empty, or holds what a run leaves that was stopped before its first
        checkpoint: a log, and perhaps a tokenizer. (Hidden files are ignored.)
        """
        from training.log import read_header  # (sampling does without)
        if checkpoints(self.path):
            return
        if os.path.lexists(os.path.join(self.path, "best.pt")):
            raise UserError(f"{self.path} holds best.pt, but no checkpoint (ckpt_*.pt) to continue its run from",
                            f"--out_dir=out/ANOTHER, and --init_from={quote(self.path)} to start from best.pt")
        begun = read_header(os.path.join(self.path, "log.jsonl"))
        ours = RUN_FILES if begun else r"log\.jsonl\.part"
        other = foreign(self.path, re.compile(rf"\..*|{ours}").fullmatch)
        if other:
            raise UserError(f"out_dir={self.path} holds {other}, and no run that could continue there",
                            "--out_dir=out/ANOTHER")

    def open(self, step, needed):
        """Make the folder, and delete what a kill left half-written; before the first step.

        step: where the run continues, None for a new one. needed: bytes that it will take here.
        """
        try:
            os.makedirs(self.path, exist_ok=True)
            if self.lock is None:
                self.take()
            for name in filter(re.compile(r"(ckpt_\d{8}|best)\.pt\.part").fullmatch, os.listdir(self.path)):
                os.unlink(os.path.join(self.path, name))
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise UserError(f"cannot write to out_dir={self.path}: {error.strerror}",
                            "--out_dir=ANOTHER_FOLDER") from None
        for path in checkpoints(self.path):
            if step is None:
                raise UserError(f"another process has just begun a run in {self.path}", "--out_dir=out/ANOTHER")
            if os.path.basename(path) > f"ckpt_{step:08d}.pt":  # it was passed over; else the run would go on there
                os.replace(path, path + ".damaged")
        if free < needed:
            warn(f"the checkpoints will take {needed / 1e6:,.0f} MB in {self.path}, and the disk has {free / 1e6:,.0f} "
                 "MB left")


# ----------------------------------------------------------------------------------------------------------------------
# Reading a file


def load_file(path):
    """The dict in a .pt file, of this project or another: plain values, and tensors that take no more than the file."""
    try:
        if not os.path.isfile(path):  # (a pipe would make us wait)
            raise FileNotFoundError
        size = os.path.getsize(path)
        with zipfile.ZipFile(path) as archive:  # that is what it is, and torch.load does not look at the checksums
            check_directory(archive, size)
            bad = archive.testzip()
        if bad:
            raise zipfile.BadZipFile(f"{bad} has another checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_size(state, size)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}", "give a run folder or a .pt file of one") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors and plain values; opening it could run code, so it is refused",
                        "use a checkpoint that was saved with plain values only") from None
    except Exception as error:  # one flipped bit can mean anything to a reader
        what = str(error)[:200] or type(error).__name__
        raise UserError(f"{path} is damaged, or not a checkpoint: {what}",
                        "give a run folder such as out/small, or another checkpoint of the same run") from None
    return state if isinstance(state, dict) else {}


def check_directory(archive, size):
    """Raises BadZipFile where the members take more than the file, or where torch could see others than Python does:
    Python looks for the directory in front of the end of the file, torch where that end says that it is."""
    members, file = archive.infolist(), archive.fp
    file.seek(archive.start_dir + 42)
    first = int.from_bytes(file.read(4), "little")  # where the first member is, as the directory has it
    file.seek(size - 42)
    end = file.read()
    moved = end.startswith(b"PK\6\7") and int.from_bytes(end[8:16], "little") != size - 98  # in a file beyond 4 GB
    if archive.comment or moved or first != members[0].header_offset:
        raise zipfile.BadZipFile("its directory is not where it should be")
    if sum(member.file_size for member in members) > size:
        raise zipfile.BadZipFile("it would unpack to more than it is")


def check_size(state, size):
    """Raises ValueError where what was read from `size` bytes takes more: tensors of which the file holds a part only,
    values that hold each other many times, numbers that are too long to print."""
    values, memory = [state], 0
    for value in values:  # which grows
        if isinstance(value, dict):
            values += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            values += value
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_neg():
                raise ValueError("a tensor is not of the plain kind")
            memory += value.nbytes
            if value.nbytes > value.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {tuple(value.shape)} repeats its numbers")
        elif isinstance(value, int) and abs(value) >= 1 << 63:
            raise ValueError("a number has more than 64 bits")
        if len(values) > size or memory > 2 * size:  # twice: tied weights are one tensor with two names
            raise ValueError("its values would take more memory than the file")


# What is in a checkpoint: for every part a value of the same type, of a list one item.
ALWAYS = dict(settings={}, model={}, step=0, tokenizer_sha256="", source=[""])
SOMETIMES = dict(
    chat=False, int8=False, val_loss=0.0, val_bpb=0.0, order="", data_sha256=[""], versions={}, unlogged="",
    optimizer=[dict(state={})], scaler={}, chosen=dict(dtype="", why=""),
    row=dict(dict.fromkeys(("loss", "lr", "grad_norm", "tokens_per_second", "train_seconds", "wall_seconds"), 0.0),
             step=0, memory=0),
    before=dict(val_loss=0.0, val_bpb=0.0, text=""), base=dict(path="", sha256=""))
CHOSEN = dict(dtype="float32", compile=False)  # where a file does not say
SETTINGS = dict(dataset="", init_from="", batch_size=0, gradient_accumulation_steps=0, max_iters=0, lora_rank=0,
                lora_alpha=0.0)


def load_checkpoint(path):
    """Read what save_checkpoint wrote, onto the CPU. Raises UserError for a file that is missing, damaged or unsafe."""
    return check_checkpoint(load_file(path), path)


def check_checkpoint(state, path):
    """The checkpoint, if it is one of this project, and its parts are of the right types and belong together."""
    if state.get("format") != 1:
        raise UserError(f"{path} is not a checkpoint of this project (no format 1)", "python train.py trains one")
    check_like(state, ALWAYS, path)
    settings, chosen = state["settings"], state.get("chosen", CHOSEN)
    there = {name for name, value in state.items() if value is not None or name not in ("base", "before")}
    check_like(state, {name: like for name, like in SOMETIMES.items() if name in there}, path)
    for part in settings, chosen:
        check_like(part, {name: like for name, like in SETTINGS.items() if name in part}, path)
    row, before = state.get("row", {}), state.get("before") or {}
    plain = [*settings.values(), *state.get("versions", {}).values()]
    if not (all(isinstance(value, (int, float, str, type(None))) for value in plain)
            and all(isinstance(value, (int, float)) and math.isfinite(value) for value in row.values())
            and chosen["dtype"] in ("float32", "bfloat16", "float16")
            and isinstance(chosen.get("compile"), (bool, str))
            and 0 < row.get("step", 1) and row.get("step", 0) <= state["step"] <= 99_999_999
            and before.get("val_bpb", 1) > 0):
        raise UserError(f"{path} has settings or numbers that no run writes", "use another checkpoint")
    if not state.get("base"):
        check_model(settings, state["model"], path, state.get("int8"))
    return state


def check_model(settings, weights, path, int8=False):
    """Raises UserError where weights are not those of the model that the settings describe; before it is built."""
    from formats.quantized import quantize  # late: few models have 8 bits
    try:
        model = outline(config_of(settings), len(weights))
    except (AssertionError, KeyError) as error:
        raise UserError(f"{path} describes no model that can be built here: {error}", "use another model") from None
    fitting(quantize(model) if int8 else model, weights, path)


def config_of(settings):
    return GPTConfig(**{name: settings[name] for name in GPTConfig.__dataclass_fields__})


# ----------------------------------------------------------------------------------------------------------------------
# Finding and reading a run


def find_checkpoint(init_from, out_dir):
    """The newest readable checkpoint of the run in out_dir, to continue it; None for a new one."""
    paths = checkpoints(out_dir)
    if paths and init_from == "scratch":
        raise UserError(f"init_from=scratch, but {out_dir} holds {os.path.basename(paths[-1])}",
                        f"--out_dir=out/ANOTHER, or rm -r {quote(out_dir)}")
    if not paths and init_from == "resume":
        raise UserError(f"init_from=resume, but {out_dir} holds no checkpoint", "leave out --init_from: a new run")
    for path in reversed(paths):
        try:
            state = load_checkpoint(path)
            missing = {"optimizer", "scaler", "row", "chosen", "versions", "data_sha256"} - state.keys()
            if not missing:
                return state
            fact = f"{path} has no {min(missing)}: a run cannot go on from it (a renamed best.pt?)"
        except UserError as error:
            fact = error.fact
        if path != paths[0]:
            warn(f"{fact}; taking the one before")
    if paths:
        best = quote(os.path.join(out_dir, "best.pt"))
        raise UserError(f"{fact}, and no checkpoint before it is whole",
                        f"start a new run from the best weights: --init_from={best} --out_dir=out/ANOTHER")
    return None


def best_loss_of(out_dir):
    """The validation loss of best.pt; infinity where there is none, or none that can be read."""
    path = os.path.join(out_dir, "best.pt")
    if not os.path.exists(path):
        return math.inf
    try:
        return load_checkpoint(path)["val_loss"]
    except (UserError, KeyError) as error:
        warn(f"{path} cannot be used ({getattr(error, 'fact', 'no val_loss')}); the next validation writes another")
        os.replace(path, path + ".damaged")
        return math.inf


def choose_run(bare, settings):
    """The RUN that the command line means: a bare argument, --init_from, --out_dir, or the newest one below out/."""
    if len(bare) > 1:
        raise UserError(f"expected one RUN, got {len(bare)}: {' '.join(bare)}", f"give one: {quote(bare[0])}")
    init_from = "" if settings.init_from == "resume" else settings.init_from  # nanoGPT's word for --out_dir
    named = bare[0] if bare else init_from or settings.out_dir
    if named and not os.path.exists(named):
        raise UserError(f"there is no run {named}", "python train.py config/train_small.py trains one into out/small")
    return named or find_run()


def find_run(where="out"):
    """The run below `where` that was written last."""
    paths = [path for path in glob.glob(os.path.join(where, "**", "*.pt"), recursive=True)
             if os.path.basename(path).startswith(("best", "ckpt_")) and os.path.isfile(path)]
    if not paths:
        raise UserError(f"there is no trained run below {where}/", "python train.py config/train_small.py")
    return os.path.dirname(max(paths, key=os.path.getmtime))


def checkpoint_path(run, which="best"):
    """The checkpoint file of a RUN: a file as it is; of a folder the best one, or with which="last" the newest."""
    if os.path.isfile(run):
        return run
    best, nanogpt = os.path.join(run, "best.pt"), os.path.join(run, "ckpt.pt")
    if which == "best" and os.path.exists(best):
        return best
    found = [path for path in (nanogpt, *checkpoints(run)) if os.path.exists(path)]
    if not found:
        raise UserError(f"there is no trained model in {run} (no best.pt, no ckpt_*.pt, no config.json of a Hugging "
                        "Face model)", f"python train.py config/train_small.py --out_dir={quote(run)}")
    return found[-1]


def read_run(run, which="best", depth=0):
    """(checkpoint, its tokenizer) of a RUN: a run folder, a .pt file, nanoGPT's too, or a Hugging Face folder.

    Whatever it was, it comes as a checkpoint of this project, with `path` added, and `chat`: has the model learned a
    chat format? The weights are those of the model that `settings` describe, and the tokenizer has no id beyond its
    vocabulary. depth: how many LoRA runs correct this one.
    """
    from formats import huggingface, nanogpt  # (a script that is imported does not need them yet)
    if huggingface.is_folder(run):
        path, (checkpoint, tokenizer) = run, huggingface.read(run)
        if tokenizer.kind in tokenizers.LEARNED:  # export.py gives these a template only where the model can chat
            chat = os.path.exists(os.path.join(run, "chat_template.jinja"))
        else:
            chat = bool(tokenizer.template)
    else:
        path = checkpoint_path(run, which)
        checkpoint = load_file(path)
        if "model_args" in checkpoint:
            checkpoint, tokenizer = nanogpt.convert(checkpoint, path)
            check_model(checkpoint["settings"], checkpoint["model"], path)
        else:
            check_checkpoint(checkpoint, path)
            tokenizer = tokenizers.load_from(os.path.dirname(path) or ".", checkpoint["tokenizer_sha256"])
        chat = bool(checkpoint.get("chat") or tokenizer.template)
    if checkpoint.get("base"):
        merge_base(checkpoint, run, depth)
    checkpoint["source"] = [origin(source) for source in checkpoint["source"]]  # (an older one may hold more)
    vocab_size = checkpoint["settings"]["vocab_size"]
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{path}: the tokenizer beside it has {tokenizer.vocab_size:,} tokens, the model only "
                        f"{vocab_size:,}", "take both from their source again, from one model")
    return checkpoint | {"path": path, "chat": chat}, tokenizer


def load_run(run, which="best", device="cpu", int8=False):
    """(model in eval mode on `device`, its tokenizer, the rest of the checkpoint) of a RUN.

    int8: with matrices of 8-bit integers, see formats/quantized.py; an export of that kind has them anyway.
    """
    from formats.quantized import quantize
    checkpoint, tokenizer = read_run(run, which)
    path, stored = checkpoint["path"], bool(checkpoint.get("int8"))
    try:
        model = GPT(config_of(checkpoint["settings"]))
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"the model of {path} cannot be built here: {str(error).splitlines()[0][:200]}",
                        "a machine with more memory, or another model") from None
    if stored:
        model = quantize(model)
    load_weights(model, checkpoint.pop("model"), path)
    if int8 and not stored:
        model = quantize(model)
    checkpoint["int8"] = int8 or stored
    return model.to(device).eval(), tokenizer, checkpoint


def check_whole(checkpoint):
    """Raises UserError where the weights have been rounded to 8 bits, and more is asked of them."""
    if checkpoint.get("int8"):
        raise UserError(f"{checkpoint['path']} has weights of 8 bits, for reading and writing text",
                        "take the run that it was made from")


# ----------------------------------------------------------------------------------------------------------------------
# Weights, and what LoRA has of them


def learned(model):
    """The weights that a checkpoint holds, a state_dict: of a model with LoRA, the corrections alone."""
    weights = model.state_dict()
    return lora.adapters(weights) or weights


def fitting(model, weights, path):
    """Of loaded weights, those that the model takes. Raises UserError that names the first that is not as it should be.

    A context may be cut: the learned positions beyond it are left out.
    """
    ours, positions = learned(model), "transformer.wpe.weight"
    found = {name: weights.get(name) for name in ours}
    if isinstance(found.get(positions), torch.Tensor) and found[positions].dim() == 2:
        found[positions] = found[positions][:model.config.block_size]
    check_like(found, ours, path)
    return found


def load_weights(model, weights, path):
    """Copy weights into the model."""
    model.load_state_dict(fitting(model, weights, path), strict=False)


def name_base(path, start):
    """What a LoRA run writes down about the weights that it corrects: their place, and their sha256."""
    digest = hashlib.sha256(str(start.get("base")).encode())
    for name, tensor in sorted(start.get("corrections", start["model"]).items()):  # (a sum may differ in its last bits)
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return dict(path=path, sha256=digest.hexdigest())


def read_base(checkpoint, run, depth=0):
    """The checkpoint that a LoRA run corrects. Raises UserError where it is not there, or not as it was."""
    path = checkpoint["base"]["path"]
    if not os.path.exists(path):
        raise UserError(f"{run} holds corrections (LoRA) to the weights of {path}, which is not there",
                        f"bring {path} back, or go to the folder where {run} was trained: the path counts from there; "
                        f"python export.py {quote(run)} --format=hf makes a model that needs no other")
    if depth > 3:  # a run that corrects itself has no end of them
        raise UserError(f"{run} holds corrections (LoRA) to corrections to corrections, and so on: more than 4",
                        "export.py --format=hf makes a model of one that needs no other")
    start, _ = read_run(path, depth=depth + 1)
    check_whole(start)
    if name_base(path, start) != checkpoint["base"]:
        raise UserError(f"{run} holds corrections (LoRA) to the weights that {path} had; now it has others",
                        f"bring the old ones back to {path}")
    check_model(checkpoint["settings"], start["model"], run)
    return start


def merge_base(checkpoint, run, depth):
    """Put the corrected weights into the checkpoint of a LoRA run; the corrections stay in it as `corrections`."""
    settings, corrections = checkpoint["settings"], checkpoint["model"]
    base = read_base(checkpoint, run, depth)["model"]
    try:
        merged = lora.merge(base, corrections, settings["lora_rank"], settings["lora_alpha"])
    except (KeyError, ValueError, RuntimeError, ZeroDivisionError, AttributeError) as error:
        raise UserError(f"{run} holds corrections (LoRA) that do not fit: {type(error).__name__}: {error}",
                        "use another checkpoint of the same run") from None
    checkpoint.update(model=merged, corrections=corrections)
