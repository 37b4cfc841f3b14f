# SPDX-License-Identifier: GPL-3.0-only
"""
Checkpoints: how one is written, found and read, and who may write into the folder of a run.

    save_checkpoint("out/small/ckpt_00001000.pt", {"model": model.state_dict(), "step": 1000, ...})
    checkpoint, tokenizer = read_run("out/small")  # or a .pt file, nanoGPT's too, or a Hugging Face folder
    model, tokenizer, checkpoint = load_run("out/small", device=device)

A file bears its final name only when it is whole and on the disk, so that the newest checkpoint is a good one. It holds
tensors and plain values only and is read with weights_only=True, so that a stranger's file cannot run code.
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
        with contextlib.suppress(OSError):  # Windows cannot open a folder, and not every file system can sync one
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)  # the name is on the disk before anything older is deleted
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # where the disk is full, torch's writer hides why
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"cannot write {path}: {cause}",
                        "make room; the same command continues", code=1) from None


def checkpoints(run):
    """The numbered checkpoints of a run folder, oldest first: by the number in the name, not by the clock."""
    return sorted(glob.glob(os.path.join(glob.escape(run), "ckpt_" + "[0-9]" * 8 + ".pt")))


def prune_checkpoints(run):
    """Delete all numbered checkpoints but the last two: a dying disk may cut one."""
    for path in checkpoints(run)[:-2]:
        with contextlib.suppress(OSError):  # too many checkpoints are no reason to end a run
            os.unlink(path)


MOST_BASES = 4  # LoRA runs that correct LoRA runs
# What a run leaves that was stopped before its first checkpoint; while a file is being written, it ends in .part.
RUN_FILES = r"(ckpt_\d{8}\.pt|log\.jsonl|loss\.svg|tokenizer)(\.part|\.damaged)?(/.*)?"


class RunFolder(contextlib.ExitStack):
    """The folder of a run, into which one process at a time may write. The lock ends with the process."""

    def __init__(self, path, writes=True):
        super().__init__()
        self.path, self.writes, self.taken = path, writes, False

    def take(self):
        if not self.taken:
            self.enter_context(locked(os.path.join(self.path, "log.jsonl")))
            self.taken = True

    def check_ours(self):
        """Raises UserError where a run can neither be continued nor begun: it never writes among other files.

        It begins in a folder that is new, empty, or holds RUN_FILES. Hidden files are ignored.
        """
        from training.log import read_header  # sampling does without
        if os.path.isdir(self.path):
            with contextlib.suppress(OSError):  # `open` says so
                self.take()
        if checkpoints(self.path):
            return
        begun = read_header(os.path.join(self.path, "log.jsonl"))
        ours = RUN_FILES if begun else r"log\.jsonl\.part"
        other = foreign(self.path, re.compile(rf"\..*|{ours}").fullmatch)
        if other:
            raise UserError(f"out_dir={self.path} holds {other}, and no run that could continue there",
                            "--out_dir=out/ANOTHER")

    def open(self, step, needed):
        """Make the folder, and delete what a kill left half-written.

        step: where the run continues, None for a new one. needed: bytes that it will take here.
        """
        try:
            os.makedirs(self.path, exist_ok=True)
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
            warn(f"the checkpoints will take {needed / 1e6:,.0f} MB, and {self.path} has {free / 1e6:,.0f} MB left")


# ----------------------------------------------------------------------------------------------------------------------
# Reading a file


def load_file(path):
    """The dict in a .pt file: plain values, and weights that take no more than the file."""
    if not os.path.isfile(path):  # a pipe would make us wait
        raise UserError(f"there is no checkpoint {path}", "give a run folder or a .pt file of one")
    try:
        size = check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights = list(state.get("model", {}).values())
        if any(tensor.layout != torch.strided or tensor.device.type != "cpu" for tensor in weights):
            raise ValueError("a tensor is not of the plain kind")
        if sum(tensor.nbytes for tensor in weights) > 2 * size:  # twice: tied weights are one tensor with two names
            raise ValueError("its weights take more memory than the file")
        return state
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors and plain values: opening it could run code",
                        "use another checkpoint") from None
    except Exception as error:  # one flipped bit can mean anything to a reader
        what = str(error)[:200] or type(error).__name__
        raise UserError(f"{path} is damaged, or not a checkpoint: {what}", "use another checkpoint") from None


def check_archive(path):
    """The size of the file. Raises BadZipFile, where torch.load would not, for a wrong checksum, and for members that
    take more than the file.

    Both must see the same members: torch looks for the directory where the end of the file says that it is, Python in
    front of that end.
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
            raise zipfile.BadZipFile("it would unpack to more than it is")
        if bad := archive.testzip():
            raise zipfile.BadZipFile(f"{bad} has another checksum")
    return size


# What readers of a checkpoint rely on: values of the same type, of a list one item.
ALWAYS = dict(settings=dict(dataset=""), model={}, step=0, tokenizer_sha256="", source=[""])
SOMETIMES = dict(chat=False, int8=False, val_loss=0.0, val_bpb=0.0, base=dict(path="", sha256=""))


def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU. Raises UserError where it is missing, damaged or unsafe."""
    return check_checkpoint(load_file(path), path)


def check_checkpoint(state, path):
    """The checkpoint. Raises UserError where it is none of this project, or its parts are not of the right types."""
    if state.get("format") != 1:
        raise UserError(f"{path} is not a checkpoint of this project (no format 1)", "python train.py trains one")
    check_like(state, ALWAYS, path)
    check_like(state, {name: like for name, like in SOMETIMES.items() if state.get(name) is not None}, path)
    if not state.get("base"):
        check_model(state["settings"], state["model"], path, state.get("int8"))
    return state


def check_model(settings, weights, path, int8=False):
    """Raises UserError where weights do not fit the model that the settings describe; before it is built."""
    from formats.quantized import quantize  # late: few models have 8 bits
    try:
        model = outline(config_of(settings), len(weights))
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"{path} describes no model: {error}", "use another model") from None
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
            if "optimizer" in state:
                return state
            warn(f"{path} has no optimizer (a renamed best.pt?)")
        except UserError as error:
            warn(error.fact)
    if paths:
        best = quote(os.path.join(out_dir, "best.pt"))
        raise UserError(f"no checkpoint in {out_dir} is whole", f"--init_from={best} --out_dir=out/ANOTHER")
    return None


def best_of(out_dir):
    """(the validation loss of best.pt, its step); (infinity, 0) where there is none, or none that can be read."""
    path = os.path.join(out_dir, "best.pt")
    try:
        best = load_checkpoint(path)
        return best["val_loss"], best["step"]
    except (UserError, KeyError):
        if os.path.exists(path):
            warn(f"{path} cannot be used; the next validation writes another")
        return math.inf, 0


def choose_run(bare, settings):
    """The RUN of a command line: a bare argument, --init_from, --out_dir, or the newest one below out/."""
    if len(bare) > 1:
        raise UserError(f"expected one RUN, got {len(bare)}: {' '.join(bare)}", f"give one: {quote(bare[0])}")
    init_from = "" if settings.init_from == "resume" else settings.init_from  # nanoGPT's word for --out_dir
    named = bare[0] if bare else init_from or settings.out_dir
    if named and not os.path.exists(named):
        raise UserError(f"there is no run {named}", "python train.py config/train_small.py trains one into out/small")
    return named or find_run()


def find_run():
    """The run below out/ that was written last."""
    paths = [path for path in glob.glob("out/**/*.pt", recursive=True)
             if os.path.basename(path).startswith(("best", "ckpt_")) and os.path.isfile(path)]
    if not paths:
        raise UserError("there is no trained run below out/", "python train.py config/train_small.py")
    return os.path.dirname(max(paths, key=os.path.getmtime))


def checkpoint_path(run, which="best"):
    """The file of a RUN: itself, or of a folder the best checkpoint, or with which="last" the newest."""
    if os.path.isfile(run):
        return run
    found = [os.path.join(run, "ckpt.pt"), *checkpoints(run)]  # nanoGPT's, and ours
    if which == "best":
        found.append(os.path.join(run, "best.pt"))
    found = list(filter(os.path.exists, found))
    if not found:
        raise UserError(f"there is no trained model in {run}",
                        f"python train.py config/train_small.py --out_dir={quote(run)}")
    return found[-1]


def read_run(run, which="best", depth=0):
    """(checkpoint, its tokenizer) of a RUN: a run folder, a .pt file, nanoGPT's too, or a Hugging Face folder.

    It comes as a checkpoint of this project, with `path`, and `chat`: has the model learned a chat format? The weights
    fit the settings, and LoRA's corrections are added to them. depth: how many LoRA runs correct this one.
    """
    from formats import huggingface, nanogpt  # not needed where a script is only imported
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
    checkpoint["source"] = [origin(source) for source in checkpoint["source"]]  # an older one may name folders
    vocab_size = checkpoint["settings"]["vocab_size"]
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{path}: the tokenizer beside it has {tokenizer.vocab_size:,} tokens, the model only "
                        f"{vocab_size:,}", "take both from one model")
    return checkpoint | {"path": path, "chat": chat}, tokenizer


def load_run(run, which="best", device="cpu", int8=False):
    """(model in eval mode on `device`, its tokenizer, the rest of the checkpoint) of a RUN.

    int8: with matrices of 8-bit integers (formats/quantized.py); an export of that kind has them anyway.
    """
    from formats.quantized import quantize
    checkpoint, tokenizer = read_run(run, which)
    path, stored = checkpoint["path"], bool(checkpoint.get("int8"))
    try:
        model = GPT(config_of(checkpoint["settings"]))
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
    """Of loaded weights, those that the model takes, without positions beyond its context.

    Raises UserError that names the first that does not fit.
    """
    ours, positions = learned(model), "transformer.wpe.weight"
    found = {name: weights.get(name) for name in ours}
    if isinstance(found.get(positions), torch.Tensor) and found[positions].dim() == 2:
        found[positions] = found[positions][:model.config.block_size]
    check_like(found, ours, path)
    return found


def load_weights(model, weights, path):
    model.load_state_dict(fitting(model, weights, path), strict=False)


def name_base(path, start):
    """What a LoRA run keeps of the weights that it corrects: their place, and their sha256."""
    digest = hashlib.sha256(str(start.get("base")).encode())
    for name, tensor in sorted(start.get("corrections", start["model"]).items()):  # a sum may differ in its last bits
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return dict(path=path, sha256=digest.hexdigest())


def read_base(checkpoint, run, depth=0):
    """The checkpoint that a LoRA run corrects. Raises UserError where it is not as it was."""
    path = checkpoint["base"]["path"]
    if depth == MOST_BASES:  # maybe it corrects itself
        raise UserError(f"{run} corrects (LoRA) a run that corrects another, and so on: more than {MOST_BASES}",
                        "export.py --format=hf makes a model of one of them that needs no other")
    if not os.path.exists(path):
        raise UserError(f"{run} holds corrections (LoRA) to the weights of {path}, which is not there",
                        f"bring {path} back; then export.py --format=hf makes a model that needs no other")
    start, _ = read_run(path, depth=depth + 1)
    check_whole(start)
    if name_base(path, start) != checkpoint["base"]:
        raise UserError(f"{run} holds corrections (LoRA) to the weights that {path} had; now it has others",
                        f"bring the old ones back to {path}")
    check_model(checkpoint["settings"], start["model"], run)
    return start


def merge_base(checkpoint, run, depth):
    """Put the corrected weights into the checkpoint of a LoRA run, whose own become `corrections`."""
    settings, corrections = checkpoint["settings"], checkpoint["model"]
    base = read_base(checkpoint, run, depth)["model"]
    try:
        merged = lora.merge(base, corrections, settings["lora_rank"], settings["lora_alpha"])
    except (KeyError, ValueError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{run} holds corrections (LoRA) that do not fit: {type(error).__name__}: {error}",
                        "use another checkpoint") from None
    checkpoint.update(model=merged, corrections=corrections)
