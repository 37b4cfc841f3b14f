# SPDX-License-Identifier: GPL-3.0-only
"""
Runs on the disk: how a checkpoint is written, found and read, and who may write it.

    save_checkpoint("out/small/ckpt_00001000.pt", {"model": model.state_dict(), "step": 1000, ...})
    model, tokenizer, checkpoint = load_run("out/small", device=device)

Two rules make a checkpoint something to rely on. A file bears its final name only when it is whole and on the disk, so
that whatever happens, the newest checkpoint is a good one. And it holds tensors and plain values only and is read with
weights_only=True, so that opening a stranger's file cannot run a stranger's code.
"""
import contextlib
import glob
import math
import os
import pickle
import shutil
import struct
import zipfile
import zlib

import torch

import tokenizer as tokenizers
from config import UserError, note, warn
from model import GPT, GPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path, state):
    """Write `state`: when this returns, the file is on the disk under its name; when it raises, nothing has changed."""
    part = path + ".part"
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the bytes are on the disk ...
        os.replace(part, path)  # ... before they get their name, which is one indivisible step ...
        with contextlib.suppress(OSError):  # (Windows cannot open a folder, and not every file system can do this)
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)  # ... and the name is on the disk before anything older is deleted
            finally:
                os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        if isinstance(error, (OSError, RuntimeError)):  # where the disk is full, torch's writer hides why
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise UserError(f"cannot write {path}: {cause}", "make room; the same command goes on from the checkpoint "
                            "before", code=1) from None
        raise


def load_checkpoint(path):
    """Read what save_checkpoint wrote, onto the CPU. Raises UserError for a file that is missing, damaged or unsafe."""
    try:
        with zipfile.ZipFile(path) as archive:  # that is what it is, and torch.load does not look at the checksums
            bad = archive.testzip()
        if bad:
            raise zipfile.BadZipFile(f"{bad} has another checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}", "give a run folder or a .pt file of one") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors and plain values; opening it could run code, so it is refused",
                        "use a checkpoint that was saved with plain values only") from None
    except (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, OSError, ValueError, LookupError,
            AttributeError, TypeError) as error:  # one flipped bit can mean anything to a reader
        raise UserError(f"{path} is damaged or no checkpoint: {error}", "use another one of the same run") from None
    needed = {"settings": dict, "model": dict, "step": int, "tokenizer_sha256": str, "source": list}
    if not isinstance(state, dict) or state.get("format") != 1 or not all(
            isinstance(state.get(name), kind) for name, kind in needed.items()):
        raise UserError(f"{path} is not a checkpoint of this project (no format 1)", "python train.py trains one")
    return state


def checkpoints(run):
    """The numbered checkpoints of a run folder, oldest first: by the number in the name, not by the clock."""
    return sorted(glob.glob(os.path.join(glob.escape(run), "ckpt_" + "[0-9]" * 8 + ".pt")))


def find_checkpoint(init_from, out_dir):
    """The newest readable checkpoint of this run, or None for a new one."""
    paths = checkpoints(out_dir)
    if paths and init_from == "scratch":
        raise UserError(f"init_from=scratch, but {out_dir} holds {os.path.basename(paths[-1])}",
                        f"--out_dir=out/ANOTHER, or delete {out_dir} yourself")
    if not paths and init_from == "resume":
        raise UserError(f"init_from=resume, but {out_dir} holds no checkpoint", "leave out --init_from: a new run")
    for path in reversed(paths):
        try:
            state = load_checkpoint(path)
            missing = [name for name in ("optimizer", "scaler", "row", "chosen", "versions", "data_sha256")
                       if name not in state]
            if missing:
                raise UserError(f"{path} has no {missing[0]}: a run cannot go on from it (a renamed best.pt?)", "")
            return state
        except UserError as error:
            if path == paths[0]:
                best = os.path.join(out_dir, "best.pt")
                raise UserError(f"{error.fact}, and no checkpoint before it is whole",
                                f"start a new run from the best weights: --init_from={best} --out_dir=out/ANOTHER") \
                    from None
            warn(f"{error.fact}; taking the one before")
    return None


def best_loss_of(out_dir):
    """The validation loss of best.pt; infinity where there is none, or none that can be read."""
    path = os.path.join(out_dir, "best.pt")
    if os.path.exists(path):
        try:
            return load_checkpoint(path)["val_loss"]
        except (UserError, KeyError) as error:
            warn(f"{path} cannot be used ({getattr(error, 'fact', 'no val_loss')}); the next validation writes another")
            os.replace(path, path + ".damaged")
    return math.inf


def prune_checkpoints(run, keep=2):
    """Delete all numbered checkpoints but the last `keep` (two: a dying disk may cut one)."""
    for path in checkpoints(run)[:-keep]:
        with contextlib.suppress(OSError):  # too many checkpoints are no reason to end a run
            os.unlink(path)


class RunFolder:
    """The folder of a run, and the right to write into it, which one process at a time has.

    The right is a lock on the folder: the system takes it back when the process ends, however it ends.
    """

    def __init__(self, path, writes=True):
        self.path, self.writes, self.lock = path, writes, None

    def __enter__(self):
        if self.writes and os.path.isdir(self.path):
            self.take()
        return self

    def __exit__(self, *_):
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def take(self):
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self.lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {self.path}",
                            "wait for it or stop it; --out_dir=out/ANOTHER for a run of its own") from None
        except OSError as error:
            note(f"{self.path} cannot be locked ({error.strerror}): do not train in it twice at the same time")

    def open(self, step, needed):
        """Make the folder, see that it can be written, and clear away what a kill left; before the first update.

        step: where the run goes on, None for a new one. needed: bytes that it will take here.
        """
        try:
            os.makedirs(self.path, exist_ok=True)
            if self.lock is None:
                self.take()
            with open(os.path.join(self.path, ".probe"), "wb"):
                pass
            os.unlink(os.path.join(self.path, ".probe"))
            for path in filter(os.path.isfile, glob.glob(os.path.join(glob.escape(self.path), "*.part"))):
                os.unlink(path)
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise UserError(f"cannot write to out_dir={self.path}: {error.strerror}", "--out_dir=ANOTHER_FOLDER") \
                from None
        if step is None and checkpoints(self.path):
            raise UserError(f"another process has just begun a run in {self.path}", "--out_dir=out/ANOTHER")
        for path in checkpoints(self.path):
            if step is not None and os.path.basename(path) > f"ckpt_{step:08d}.pt":  # else the run would go on there
                os.replace(path, path + ".damaged")
        if free < needed:
            warn(f"the checkpoints will take {needed / 1e6:,.0f} MB in {self.path}, and the disk has {free / 1e6:,.0f} "
                 "MB left")


def find_run(where="out"):
    """The run below `where` that was written last."""
    runs = {path: os.path.getmtime(path) for path in glob.glob(os.path.join(where, "**", "*.pt"), recursive=True)
            if os.path.basename(path).startswith(("best", "ckpt_"))}
    if not runs:
        raise UserError(f"there is no trained run below {where}/", "python train.py config/train_small.py")
    return os.path.dirname(max(runs, key=runs.get))


def choose_run(bare, settings):
    """The RUN that the command line means: a bare argument, --init_from, --out_dir, or the newest one below out/."""
    if len(bare) > 1:
        raise UserError(f"one RUN is enough, but there are {len(bare)}: {' '.join(bare)}", f"give one: {bare[0]}")
    init_from = "" if settings.init_from == "resume" else settings.init_from  # nanoGPT's word for --out_dir
    named = bare[0] if bare else init_from or settings.out_dir
    if named and not os.path.exists(named):
        raise UserError(f"there is no run {named}", "python train.py config/train_small.py trains one into out/small")
    return named or find_run()


def checkpoint_path(run, which="best"):
    """The checkpoint file of a RUN: a file as it is; of a folder the best one, or with which='last' the newest."""
    if os.path.isfile(run):
        return run
    best, numbered = os.path.join(run, "best.pt"), checkpoints(run)
    if which == "best" and os.path.exists(best):
        return best
    if numbered:
        return numbered[-1]
    raise UserError(f"there is no trained run in {run} (no best.pt, no ckpt_*.pt)",
                    f"python train.py config/train_small.py --out_dir={run}")


def load_run(run, which="best", device="cpu"):
    """(model in eval mode on `device`, its tokenizer, the rest of the checkpoint) of a RUN."""
    path = checkpoint_path(run, which)
    checkpoint = load_checkpoint(path)
    try:
        model = GPT(GPTConfig(**{name: checkpoint["settings"][name] for name in GPTConfig.__dataclass_fields__}))
    except (AssertionError, KeyError, TypeError) as error:
        raise UserError(f"{path} describes no model that can be built: {error}", "use another checkpoint") from None
    load_weights(model, checkpoint.pop("model"), path)
    tokenizer = tokenizers.load_from(os.path.dirname(path) or ".", checkpoint["tokenizer_sha256"])
    return model.to(device).eval(), tokenizer, checkpoint | {"path": path}


def load_weights(model, weights, path):
    """Copy weights into the model. Raises UserError that names the first tensor that is missing or misshapen."""
    for name, expected in model.state_dict().items():
        if name not in weights or weights[name].shape != expected.shape:
            has = f"{name} of shape {tuple(weights[name].shape)}" if name in weights else f"no {name}"
            raise UserError(f"{path} has {has}, but the model has {tuple(expected.shape)} there",
                            "use the settings that the checkpoint was trained with")
    model.load_state_dict(weights, strict=False)


def load_optimizers(optimizers, states, run):
    """Give each optimizer its state. Raises UserError where they do not fit."""
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"the optimizer state in the checkpoint of {run} does not fit: {error}",
                        f"delete that checkpoint, or start anew: --init_from={run}/best.pt --out_dir={run}-2") from None


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face: the same models under other names


def hugging_face_config(theirs):
    """The GPTConfig for a Hugging Face config.json (a dict): gpt2, llama or qwen3. Raises UserError for all else."""
    kind = theirs.get("model_type")
    try:
        if kind == "gpt2":
            refuse(theirs, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
            mlp = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}[theirs["activation_function"]]
            return GPTConfig(
                block_size=theirs["n_positions"], vocab_size=theirs["vocab_size"], n_layer=theirs["n_layer"],
                n_head=theirs["n_head"], n_embd=theirs["n_embd"], n_inner=theirs.get("n_inner") or 0, mlp=mlp,
                bias=True, tie_weights=theirs.get("tie_word_embeddings", True), norm_eps=theirs["layer_norm_epsilon"])
        if kind in ("llama", "qwen3"):
            rope = theirs.get("rope_parameters") or {}  # (transformers 4 had rope_theta and rope_scaling instead)
            refuse(theirs, hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False)
            refuse({**rope, **(theirs.get("rope_scaling") or {})}, rope_type="default")
            return GPTConfig(
                block_size=theirs["max_position_embeddings"], vocab_size=theirs["vocab_size"],
                n_layer=theirs["num_hidden_layers"], n_head=theirs["num_attention_heads"],
                n_kv_head=theirs.get("num_key_value_heads") or 0, n_embd=theirs["hidden_size"],
                head_dim=theirs.get("head_dim") or (128 if kind == "qwen3" else 0), n_inner=theirs["intermediate_size"],
                pos="rope", norm="rmsnorm", mlp="swiglu", qk_norm=kind == "qwen3",
                tie_weights=theirs.get("tie_word_embeddings", False), norm_eps=theirs["rms_norm_eps"],
                rope_theta=float(rope.get("rope_theta") or theirs.get("rope_theta") or 10000.0))
    except KeyError as error:
        raise UserError(f"this {kind} config.json lacks or has an unknown {error}", "use another model") from None
    raise UserError(f"model_type={kind} is none of gpt2, llama and qwen3", "use a model of one of these")


def refuse(theirs, **only):
    """Raises UserError where a setting has another value than the only one that this model has; missing is fine."""
    for name, value in only.items():
        if theirs.get(name, value) != value:
            raise UserError(f"{name}={theirs[name]} is not supported, only {value}", "use another model")


LLAMA_NAMES = {  # ours: theirs; what stands in a block follows "transformer.h.3." here and "model.layers.3." there
    "transformer.wte.weight": ["model.embed_tokens.weight"],
    "transformer.ln_f.weight": ["model.norm.weight"],
    "lm_head.weight": ["lm_head.weight"],
    "ln_1.weight": ["input_layernorm.weight"],
    "attn.c_attn.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "attn.q_norm.weight": ["self_attn.q_norm.weight"],
    "attn.k_norm.weight": ["self_attn.k_norm.weight"],
    "attn.c_proj.weight": ["self_attn.o_proj.weight"],
    "ln_2.weight": ["post_attention_layernorm.weight"],
    "mlp.c_fc.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.c_proj.weight": ["mlp.down_proj.weight"],
}


def hugging_face_names(name, config):
    """(their tensors that stand one above the other in our tensor `name`, whether theirs are transposed).

    GPT-2's names are ours, but its linear layers are transposed: (in, out), as in the TensorFlow original. Llama and
    Qwen3 keep apart what is one product here: q, k and v, and the gate and the value of the MLP.
    """
    if config.pos == "learned":
        return [name], name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    if not name.startswith("transformer.h."):
        return LLAMA_NAMES[name], False
    layer, tail = name.removeprefix("transformer.h.").split(".", 1)
    return [f"model.layers.{layer}.{theirs}" for theirs in LLAMA_NAMES[tail]], False


def load_hugging_face(model, theirs):
    """Copy the tensors {name: tensor} of a Hugging Face model into ours. Raises UserError for the first one missing."""
    weights = {}
    for name, ours in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_weights:
            name = "transformer.wte.weight"
        parts, transposed = hugging_face_names(name, model.config)
        missing = [part for part in parts if part not in theirs]
        if missing:
            raise UserError(f"the model has no tensor {missing[0]}", "use a complete one")
        value = torch.cat([theirs[part].T if transposed else theirs[part] for part in parts]).to(ours.dtype)
        if name in ("transformer.wte.weight", "lm_head.weight"):  # our padding of the vocabulary
            value = torch.cat((value, value.new_zeros(ours.size(0) - value.size(0), value.size(1))))
        weights[name] = value
    if model.config.tie_weights:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    load_weights(model, weights, "the model")
