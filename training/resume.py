# SPDX-License-Identifier: GPL-3.0-only
"""
What can be wrong with a training run: everything that train.py checks, and the words in which it says so.

Before the run: are the settings possible, do they fit the data, the checkpoint, the memory and the processes? While
it runs: the loss is no number, the memory is full, a process is lost. Each is a UserError with the numbers and with
what to type, and comes before any work is lost. train.py can be read without this file.
"""
import math
import os
from dataclasses import asdict, fields
from shlex import quote

import torch

from runtime import machine
from training import checkpoint as ckpt
from runtime.console import UserError, note, say, warn
from runtime.files import check_like
from runtime.settings import check_limits
from training.log import last_row, read_header
from training.muon import Muon
from model import GPT, GPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# The settings

LIMITS = {  # the smallest and the largest value
    "batch_size gradient_accumulation_steps eval_interval log_interval dist_timeout": (1, 1e9),
    "max_iters": (1, 99_999_999),  # the digits in the name of a checkpoint
    "learning_rate muon_lr": (1e-12, 1e12),
    "weight_decay grad_clip warmup_iters lr_decay_iters min_lr eval_iters save_interval": (0, 1e12),
    "beta1 beta2": (0, 1 - 1e-9),
    "patience": (0, 1e9), "lora_rank": (0, 1e5), "lora_alpha": (1e-6, 1e6),
    "seed": (0, 2**62),
}


def check_settings(settings):
    check_limits(settings, LIMITS)
    if settings.budget:
        seconds_of(settings.budget)
        settings.max_iters = max(settings.max_iters, 11)  # until it is known after ten
    if settings.init_from.startswith("gpt2") and not os.path.exists(settings.init_from):
        raise UserError(f"init_from={settings.init_from} means OpenAI's weights, which this project neither has nor "
                        "downloads", "--init_from=scratch, or the path of a run or checkpoint")


def seconds_of(budget):
    """'90s', '5m', '1.5h' in seconds."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(budget[-1:])
    try:
        seconds = float(budget[:-1]) * unit
        if 0 < seconds < 1e9:
            return seconds
    except (TypeError, ValueError):
        pass
    raise UserError(f"budget={budget!r} is not a time", "--budget=90s, --budget=5m or --budget=1h")


def pieces(settings, world):
    """Into how many pieces a micro-batch is cut, so that all processes get the same share of an update."""
    micros, windows = settings.gradient_accumulation_steps, settings.batch_size
    cut = world // math.gcd(world, micros)
    if windows % cut:
        fewer = next(n for n in range(world - 1, 0, -1) if windows % (n // math.gcd(n, micros)) == 0)
        raise UserError(f"{micros} micro-batches of batch_size={windows} windows cannot be shared by {world} processes",
                        f"--nproc_per_node={fewer}, or for a new run --batch_size={windows + cut - windows % cut}")
    return cut


def advise(settings, data):
    """What works, but may be regretted."""
    step = settings.gradient_accumulation_steps * settings.batch_size * settings.block_size
    epochs = data.epochs(settings.max_iters * step / settings.block_size, settings.block_size)
    if epochs > 20 and not settings.budget:
        warn(f"{settings.max_iters:,} updates read this text {epochs:,.0f} times, and may learn it by heart; "
             f"--max_iters={max(1, round(10 * settings.max_iters / epochs))} reads it 10 times")
    if data.chat:
        lost = 1 - data.layout("train", settings.block_size)[:, 2].sum() / data.meta["train"]["trained"]
        if lost:
            warn(f"conversations that are longer than block_size={settings.block_size} are cut: {lost:.1%} of what the "
                 "assistant says is not learned")
    if settings.warmup_iters >= settings.max_iters and not settings.budget:
        warn(f"the learning rate rises for warmup_iters={settings.warmup_iters} updates, and there are only "
             f"{settings.max_iters}; --warmup_iters={settings.max_iters // 10}")


def build_model(settings):
    try:
        return GPT(settings)
    except AssertionError as error:  # the model states its contract as 'fact; remedy'
        fact, _, remedy = str(error).partition("; ")
        raise UserError(fact, remedy or "python train.py --help") from None
    except (RuntimeError, MemoryError, OverflowError, ValueError, TypeError) as error:
        raise UserError(f"a model of this shape cannot be made here: {str(error).splitlines()[0][:200]}",
                        "a smaller --n_embd, --n_layer, --n_inner or --vocab_size") from None


def say_memory(model, batch_size, dtype, device, settings, processes):
    """About what training will take and what there is, before it is too late."""
    parts = model.training_memory(batch_size, dtype.itemsize, 4 if settings.optimizer == "muon" else 8)
    needed, free = sum(parts.values()), machine.free_memory(device)
    sizes = " + ".join(f"{what} {size / 1e6:,.0f}" for what, size in parts.items())
    sharing = processes.local_world if device == "cpu" else 1  # processes that take it from the same memory
    say(f"memory: about {sizes} = {needed / 1e6:,.0f} MB" + (f" for each of {sharing} processes" if sharing > 1 else "")
        + (f", {free / 1e6:,.0f} MB are free" if free < math.inf else ""))
    if needed * sharing > free:
        warn("this may not fit; half the --batch_size with twice the --gradient_accumulation_steps does the same "
             "updates with less")


def say_lora(model, settings, arithmetic):
    """What it saves. arithmetic: of a token, as a share of what it takes where all weights are trained."""
    size = 12 if settings.optimizer == "adamw" else 8  # bytes per weight: a gradient, and one average or two
    weights, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or not only) for only in (0, 1))
    say(f"lora: {trained:,} numbers are trained in place of {weights - trained:,} weights ({trained / weights:.1%}): "
        f"gradients and optimizer take {trained * size / 1e6:,.0f} MB instead of "
        f"{(weights - trained) * size / 1e6:,.0f}, a token {arithmetic:.0%} of the arithmetic")


# ---------------------------------------------------------------------------------------------------------------------
# Where a run starts

def differences(was, now):
    """The settings that differ although they have to stay as they were."""
    return [name for name in now if name not in MAY_CHANGE and now[name] != was.get(name)]


def show(settings, names):
    return ", ".join(f"{name}={settings.get(name)}" for name in names)


def begun_before(settings):
    """The header of the log that a run left here which was stopped before its first checkpoint; {} without any.

    It is begun anew, which replaces its log. Raises UserError where that belongs to a run with other settings.
    """
    path = os.path.join(settings.out_dir, "log.jsonl")
    header, now = read_header(path), asdict(settings)
    was = header.get("settings", {})
    if last_row(path):
        if differ := differences(was, now):
            raise UserError(f"{settings.out_dir} holds the log of a run with {show(was, differ)}; now it is "
                            f"{show(now, differ)}", "--out_dir=out/ANOTHER")
        note(f"{settings.out_dir} holds the log of a run, but no checkpoint: the run begins again at step 0")
    return header


MAY_CHANGE = {"init_from", "max_iters", "budget", "eval_interval", "eval_iters", "eval_only", "save_interval",
              "always_save_checkpoint", "log_interval", "patience", "out_dir", "device", "backend", "dist_timeout",
              "wandb_log", "wandb_project", "wandb_run_name", "preset", "dataset"}  # (data are compared by checksums)


def continue_run(resumed, settings, given, data, here):
    """A resumed run must be the run that was begun. Raises UserError with both values of whatever differs.

    Settings that were worked out when it began (the shape of a RUN that it started from, the vocabulary, the updates
    that a budget allows) are taken from there.
    """
    was = asdict(type(settings)()) | resumed["settings"]  # (an older version may not have had them all)
    if settings.init_from not in ("auto", "resume"):
        for field in fields(GPTConfig):
            if field.name not in given:
                setattr(settings, field.name, was[field.name])
    settings.vocab_size = settings.vocab_size or was["vocab_size"]
    if settings.budget != was.get("budget"):
        resumed["chosen"].pop("max_iters", None)  # decided anew, or by max_iters
    settings.max_iters = resumed["chosen"].get("max_iters", settings.max_iters)
    if settings.budget and "max_iters" not in resumed["chosen"]:
        settings.max_iters = max(settings.max_iters, resumed["step"] + 2)  # after one update, there is a time to go by
    now = asdict(settings)
    if windows(was) == windows(now):  # cut into other micro-batches, an update reads the same
        if was["batch_size"] != now["batch_size"]:
            part = ", and --eval_iters counts these" if now["eval_iters"] else ""
            warn(f"micro-batches of {now['batch_size']} windows instead of {was['batch_size']}: the run goes on with "
                 f"the same data, but not bit for bit{part}")
        for name in ("batch_size", "gradient_accumulation_steps"):
            was[name] = now[name]
    was["tokenizer"], now["tokenizer"] = resumed["tokenizer_sha256"][:12], data.meta["tokenizer_sha256"][:12]
    was["data"], now["data"] = (" ".join(sha[:12] for sha in shas) for shas in (
        resumed["data_sha256"], data.sha256()))
    differ = differences(was, now)
    if settings.init_from not in ("auto", "resume", was["init_from"]):
        differ.append("init_from")
    if differ and set(differ) <= {"tokenizer", "data"}:
        raise UserError(f"{data.folder} no longer holds the data that {settings.out_dir} was begun with "
                        f"({show(was, differ)}; now {show(now, differ)})",
                        f"prepare {', '.join(resumed['source'])} as it was, or --out_dir=out/ANOTHER for a new run")
    if differ:
        raise UserError(f"{settings.out_dir} was begun with {show(was, differ)}; now it is {show(now, differ)}",
                        "repeat the command that began the run, or --out_dir=out/ANOTHER for a new one")
    if settings.eval_only:
        return
    if resumed.get("order") != data.ORDER and settings.max_iters > resumed["step"]:
        raise UserError(f"{settings.out_dir} was begun by an older version, which read the data in another order",
                        f"--init_from={quote(settings.out_dir)} --out_dir=out/ANOTHER: a new run from its weights")
    if settings.max_iters < resumed["step"]:
        raise UserError(f"max_iters={settings.max_iters}, but {settings.out_dir} has {resumed['step']} updates already",
                        f"--max_iters={resumed['step']} or more")
    if settings.max_iters != was["max_iters"] and settings.decay_lr and not settings.lr_decay_iters:
        note(f"the learning rate now reaches its end at update {settings.max_iters}, not at {was['max_iters']}")
    changed = [f"{name} {resumed['versions'][name]} -> {here.get(name)}" for name in resumed["versions"]
               if name != "commit" and here.get(name) != resumed["versions"][name]]
    if changed:
        warn(f"resumed elsewhere ({', '.join(changed)}): the run goes on, but not bit for bit as it would have")


def windows(settings):
    """Windows of text that an update reads."""
    return settings["batch_size"] * settings["gradient_accumulation_steps"]


def load_start(settings, given, data):
    """The checkpoint of the RUN that init_from names; its shape becomes that of this run. Its context may be cut."""
    start, tokenizer = ckpt.read_run(settings.init_from)
    ckpt.check_whole(start)
    if not tokenizer.special:
        raise UserError(f"{settings.init_from} is a character model of nanoGPT, which has no end-of-text token: "
                        "no data prepared here have its ids", "sample.py and export.py read it; or train a new one")
    if start["tokenizer_sha256"] != data.meta["tokenizer_sha256"]:
        same = tokenizer.name if tokenizer.kind == "tiktoken" else settings.init_from
        raise UserError(f"{settings.init_from} was trained with another tokenizer ({start['tokenizer_sha256'][:12]}) "
                        f"than {data.folder} was written with ({data.meta['tokenizer_sha256'][:12]})",
                        f"python prepare.py {'YOUR_CHATS --format=chat' if data.chat else 'YOUR_TEXT'} "
                        f"--out={quote(data.folder)} --tokenizer={quote(same)}")
    was = start["settings"]
    for field in fields(GPTConfig):
        name, now = field.name, getattr(settings, field.name)
        cut = name == "block_size" and now < was[name]
        if name in given and now != was[name] and name != "dropout" and not cut:
            raise UserError(f"{settings.init_from} has {name}={was[name]}, but {name}={now} is asked for",
                            f"--{name}={was[name]}: the shape comes with the weights")
        if name not in given:
            setattr(settings, name, was[name])
        if cut and name in given:
            note(f"the context is cut from {was[name]:,} tokens to {now:,}: what is trained here reads no more")
    return start


def load_optimizers(optimizers, scaler, checkpoint, run):
    """Give the optimizers and the scaler of the loss their state. Raises UserError where it does not fit.

    What an optimizer is told (its rates, the kernel that it uses) does not come from the file, but from the settings.
    """
    found = dict(enumerate(checkpoint.pop("optimizer")))
    for i, optimizer in enumerate(optimizers):
        if isinstance(optimizer, Muon):
            names, step = ["momentum_buffer"], {}
        else:
            names, step = ["exp_avg", "exp_avg_sq"], dict(step=torch.zeros(()))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        due = {number: step | dict.fromkeys(names, p) for number, p in enumerate(parameters)}
        if i in found and not found[i]["state"]:  # so far, float16 has overflowed in every step
            continue
        check_like(found, {i: dict(state=due)}, run, "the optimizers")
        state = {}
        for number, names in due.items():
            state[number] = {name: found[i]["state"][number][name].contiguous() for name in names}
        optimizer.load_state_dict(dict(state=state, param_groups=optimizer.state_dict()["param_groups"]))
    check_like(checkpoint["scaler"], scaler.state_dict(), run, "the scaler")
    scaler.load_state_dict(checkpoint["scaler"])


# ---------------------------------------------------------------------------------------------------------------------
# While it runs


def not_finite(update, loss, norm, settings, chosen):
    """The error for a loss or gradient that is no number, before any weight was touched. Exit code 3."""
    good = ckpt.checkpoints(settings.out_dir)[-1:]
    again = f"--init_from={quote(good[0])} " if good else ""
    again += f"--out_dir={quote(settings.out_dir + '-2')} "
    return UserError(f"at update {update} the loss is {loss} and the gradient norm {norm} (learning rate "
                     f"{settings.learning_rate:.2g}, {chosen['dtype']}); no weight was touched, and the same command "
                     f"comes to the same place; last good checkpoint: {good[0] if good else 'none yet'}",
                     f"{again}--learning_rate={settings.learning_rate / 3:.1g}, or --dtype=float32", code=3)


def explain(error, settings, processes):
    """What a failed allocation or a lost process means to the user: a UserError; None for what is a bug."""
    windows, micros = settings.batch_size, settings.gradient_accumulation_steps
    if machine.is_out_of_memory(error):
        cut = next((n for n in range(2, windows + 1) if windows % n == 0), 0)
        fix = (f"--batch_size={windows // cut} --gradient_accumulation_steps={micros * cut}: the same updates with "
               "less memory, a little slower" if cut else "a smaller --block_size, or a smaller model")
        return UserError(f"out of memory with micro-batches of batch_size={windows} windows of block_size="
                         f"{settings.block_size} tokens: {str(error).strip().splitlines()[0][:200]}", fix, alone=True)
    if processes.lost(error):
        why = str(error).splitlines()[0].partition(". This is typically")[0].rpartition("] ")[2]
        return UserError(f"process {processes.rank} of {processes.world} lost the others: {why}",
                         "see what the one that ended first has said; the same command continues from the last "
                         f"checkpoint. Where one was only slow: --dist_timeout={2 * settings.dist_timeout}")
    return None
