# SPDX-License-Identifier: GPL-3.0-only
"""
May this run begin, and may it be continued?

Do the settings fit each other, the data, the checkpoint and the processes? And while it runs, what does an error mean?
"""
import math
import os
import re
from dataclasses import asdict
from shlex import quote

import torch

from model import GPT, GPTConfig
from runtime import machine
from runtime.console import UserError, note, warn
from runtime.files import check_like
from runtime.settings import check_limits
from training import checkpoint as ckpt
from training.log import read_header, read_rows
from training.muon import Muon

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
        settings.max_iters = max(settings.max_iters, 11)  # until it is chosen, after ten steps
    if settings.init_from.startswith("gpt2") and not os.path.exists(settings.init_from):
        raise UserError(f"init_from={settings.init_from}: OpenAI's weights are not downloaded here",
                        "--init_from=scratch, or a RUN")
    if settings.lora_rank and settings.init_from in ("auto", "scratch") and not ckpt.checkpoints(settings.out_dir):
        raise UserError(f"lora_rank={settings.lora_rank} corrects weights, but init_from={settings.init_from} has none",
                        "--init_from=RUN, or leave --lora_rank out")


def seconds_of(budget):
    """'90s', '5m', '1.5h' in seconds."""
    found = re.fullmatch(r"(\d+\.?\d*)([smh])", budget)
    if not found:
        raise UserError(f"budget={budget!r} is not a time", "--budget=90s, --budget=5m or --budget=1h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def pieces(settings, world):
    """Into how many pieces a micro-batch is cut, so that all processes get as much of a step."""
    micros, windows = settings.gradient_accumulation_steps, settings.batch_size
    cut = world // math.gcd(world, micros)
    if windows % cut:
        raise UserError(f"{micros} micro-batches of batch_size={windows} windows cannot be shared by {world} processes",
                        f"--nproc_per_node={math.gcd(world, micros * windows)}")
    return cut


def check_data(settings, data):
    """Do the settings fit the data? Sets vocab_size to that of the data."""
    data.check(settings.block_size)
    tokens = data.meta["vocab_size"]
    settings.vocab_size = settings.vocab_size or tokens
    if settings.vocab_size < tokens:
        raise UserError(f"vocab_size={settings.vocab_size}, but {data.folder} was written with a tokenizer of "
                        f"{tokens} tokens", "leave --vocab_size out")
    if data.chat:
        lost = 1 - data.layout("train", settings.block_size)[:, 2].sum() / data.meta["train"]["trained"]
        if lost:
            warn(f"conversations longer than block_size={settings.block_size} are cut: {lost:.1%} of the answers is "
                 "not learned")
    if settings.budget:  # the number of steps is not known yet
        return
    steps, windows = settings.max_iters, settings.gradient_accumulation_steps * settings.batch_size
    epochs = data.epochs(steps * windows, settings.block_size)
    if epochs > 20:
        warn(f"{steps:,} steps read this text {epochs:,.0f} times, and may learn it by heart; "
             f"--max_iters={max(1, round(10 * steps / epochs))} reads it 10 times")


def build_model(settings):
    try:
        return GPT(settings)
    except AssertionError as error:  # the model states its contract as 'fact; fix'
        fact, _, fix = str(error).partition("; ")
        raise UserError(fact, fix or "python train.py --help") from None


# ---------------------------------------------------------------------------------------------------------------------
# Where a run starts

# What may differ when a run is continued. (The data are compared by their checksums.)
MAY_CHANGE = {"preset", "dataset", "out_dir",  # names
              "max_iters", "budget", "patience",  # when it ends
              "eval_interval", "eval_iters", "eval_only", "log_interval",  # what is measured
              "save_interval", "always_save_checkpoint",  # what is saved
              "device", "backend", "dist_timeout",  # where it runs
              "wandb_log", "wandb_project", "wandb_run_name"}


def check_same(was, now, what, fix):
    """Raises UserError with both values of what may not differ."""
    differ = [name for name in now if name not in MAY_CHANGE and now[name] != was.get(name)]
    if differ:
        before = ", ".join(f"{name}={was.get(name)}" for name in differ)
        after = ", ".join(f"{name}={now[name]}" for name in differ)
        raise UserError(f"{what} {before}; now it is {after}", fix)


def fingerprints(tokenizer, files):
    return dict(tokenizer=tokenizer[:12], data=" ".join(sha256[:12] for sha256 in files))


def continue_run(resumed, settings, given, data, here):
    """Raises UserError with both values of what may not differ from the run that was begun."""
    was = asdict(type(settings)()) | resumed["settings"]  # (an older version may not have had them all)
    take_over(was, resumed, settings, given)
    now = asdict(settings)

    # 1) The settings. Cut into other micro-batches, a step reads the same windows.
    batch = "batch_size", "gradient_accumulation_steps"
    if math.prod(was[name] for name in batch) == math.prod(now[name] for name in batch):
        if was["batch_size"] != now["batch_size"]:
            warn(f"micro-batches of {now['batch_size']} windows instead of {was['batch_size']}: the same data, but not "
                 "bit for bit")
        was |= {name: now[name] for name in batch}
    if settings.init_from in ("auto", "resume"):
        now["init_from"] = was["init_from"]
    check_same(was, now, f"{settings.out_dir} was begun with",
               "the same command again, or --out_dir=out/ANOTHER for a new run")

    # 2) The data.
    check_same(fingerprints(resumed["tokenizer_sha256"], resumed["data_sha256"]),
               fingerprints(data.meta["tokenizer_sha256"], data.sha256()),
               f"{data.folder} no longer holds the data that {settings.out_dir} was begun with:",
               f"prepare {', '.join(resumed['source'])} as it was, or --out_dir=out/ANOTHER for a new run")

    if settings.eval_only:
        return
    if resumed.get("order") != data.ORDER and settings.max_iters > resumed["step"]:
        raise UserError(f"{settings.out_dir} was begun by an older version, which read the data in another order",
                        f"--init_from={quote(settings.out_dir)} --out_dir=out/ANOTHER: a new run from its weights")

    # 3) The length.
    if settings.max_iters < resumed["step"]:
        raise UserError(f"max_iters={settings.max_iters}, but {settings.out_dir} has {resumed['step']} steps already",
                        f"--max_iters={resumed['step']} or more")
    if settings.max_iters != was["max_iters"] and settings.decay_lr and not settings.lr_decay_iters:
        note(f"the learning rate now reaches its end at step {settings.max_iters}, not at {was['max_iters']}")

    # 4) The machine and its software.
    changed = [f"{name} {version} -> {here.get(name)}" for name, version in resumed["versions"].items()
               if name != "commit" and here.get(name) != version]
    if changed:
        warn(f"resumed elsewhere ({', '.join(changed)}): the run goes on, but not bit for bit")


def take_over(was, resumed, settings, given):
    """Set what was worked out when the run began: the shape of a RUN, the vocabulary, the steps of a budget."""
    if settings.init_from not in ("auto", "resume"):
        for name in GPTConfig.__dataclass_fields__.keys() - given:
            setattr(settings, name, was[name])
    settings.vocab_size = settings.vocab_size or was["vocab_size"]
    if settings.budget != was["budget"]:
        resumed["chosen"].pop("max_iters", None)  # chosen anew, or given
    if "max_iters" in resumed["chosen"]:
        settings.max_iters = resumed["chosen"]["max_iters"]
    elif settings.budget:
        settings.max_iters = max(settings.max_iters, resumed["step"] + 2)  # one step measures the time


def how_it_ended(resumed, settings):
    """What to say of a run that is finished; "" where there is more to do."""
    rows = [row for row in read_rows(os.path.join(settings.out_dir, "log.jsonl")) if "val_loss" in row]
    step, at_end = resumed["step"], resumed["step"] == settings.max_iters
    if settings.eval_only or not rows or rows[-1]["step"] != step:
        return ""
    best = min(rows, key=lambda row: row["val_loss"])
    if not (at_end or is_stuck(settings, step - best["step"])):
        return ""
    early = "" if at_end else f", ended by patience={settings.patience}"
    return f"{settings.out_dir} is finished: {step} steps{early}, validation loss {rows[-1]['val_loss']:.4f}"


def is_stuck(settings, steps):
    """Has the lowest validation loss been so many steps ago that the patience is over?"""
    return 0 < settings.patience * settings.eval_interval <= steps


def check_begun(settings):
    """A run that was stopped before its first checkpoint begins again, and replaces its log. Raises UserError where the
    log is that of a run with other settings."""
    path = os.path.join(settings.out_dir, "log.jsonl")
    if any(read_rows(path)):
        was = read_header(path).get("settings", {}) | dict(init_from=settings.init_from)
        check_same(was, asdict(settings), f"{settings.out_dir} holds the log of a run with", "--out_dir=out/ANOTHER")
        note(f"{settings.out_dir} holds the log of a run, but no checkpoint: the run begins again at step 0")


def load_start(settings, given, data):
    """The checkpoint of the RUN that init_from names. Its shape becomes ours, maybe with a shorter context."""
    start, tokenizer = ckpt.read_run(settings.init_from)
    ckpt.check_whole(start)
    if not tokenizer.special:
        raise UserError(f"{settings.init_from} is a character model of nanoGPT, which has no end-of-text token",
                        "train a new one")
    if start["tokenizer_sha256"] != data.meta["tokenizer_sha256"]:
        same = tokenizer.name if tokenizer.kind == "tiktoken" else settings.init_from
        text = "YOUR_CHATS --format=chat" if data.chat else "YOUR_TEXT"
        raise UserError(f"{settings.init_from} was trained with another tokenizer than {data.folder} was written with",
                        f"python prepare.py {text} --out={quote(data.folder)} --tokenizer={quote(same)}")
    for name in GPTConfig.__dataclass_fields__:
        was, now = start["settings"][name], getattr(settings, name)
        if name not in given:
            setattr(settings, name, was)
        elif now != was and name != "dropout" and not (name == "block_size" and now < was):
            raise UserError(f"{settings.init_from} has {name}={was}, but {name}={now} is asked for",
                            f"--{name}={was}: the shape comes with the weights")
    return start


def load_optimizers(optimizers, scaler, checkpoint, run):
    """Restore the state of the optimizers and of the scaler. Raises UserError where it does not fit: a fused kernel
    believes its shapes. The rates come from the settings, not from the file.
    """
    found = dict(enumerate(checkpoint.pop("optimizer")))
    for i, optimizer in enumerate(optimizers):
        if i in found and not found[i]["state"]:  # so far, float16 has overflowed in every step
            continue
        like = {}
        for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            adamw = dict(step=torch.zeros(()), exp_avg=p, exp_avg_sq=p)
            like[number] = dict(momentum_buffer=p) if isinstance(optimizer, Muon) else adamw
        check_like(found, {i: dict(state=like)}, run, "the optimizers")
        optimizer.load_state_dict(dict(found[i], param_groups=optimizer.state_dict()["param_groups"]))
    check_like(checkpoint["scaler"], scaler.state_dict(), run, "the scaler")
    scaler.load_state_dict(checkpoint["scaler"])


# ---------------------------------------------------------------------------------------------------------------------
# While it runs


def not_finite(run, loss, norm):
    """The error for a loss or gradient that is no number. Exit code 3."""
    settings = run.settings
    good = ckpt.checkpoints(settings.out_dir)[-1:]
    start = f"--init_from={quote(good[0])} " if good else ""
    return UserError(f"at step {run.step + 1} the loss is {loss} and the gradient norm {norm}; no weight was changed; "
                     f"last good checkpoint: {good[0] if good else 'none yet'}",
                     f"{start}{again(settings)}, or --dtype=float32", code=3)


def again(settings):
    """What to type when the learning rate was too high."""
    return f"--out_dir={quote(settings.out_dir + '-2')} --learning_rate={settings.learning_rate / 3:.1g}"


def explain(error, settings, ranks):
    """The UserError for a failed allocation or a lost process; None for a bug."""
    windows, micros = settings.batch_size, settings.gradient_accumulation_steps
    if machine.is_out_of_memory(error):
        fix = "a smaller --block_size, or a smaller model"
        if windows > 1:
            cut = windows if windows % 2 else 2
            fix = f"--batch_size={windows // cut} --gradient_accumulation_steps={micros * cut}: the same steps"
        return UserError(f"out of memory with micro-batches of batch_size={windows} windows of block_size="
                         f"{settings.block_size} tokens", fix, alone=True)
    if ranks.lost(error):
        return UserError(f"process {ranks.rank} of {ranks.world} lost the others: {str(error).splitlines()[0]}",
                         f"the same command continues; if one is slow: --dist_timeout={2 * settings.dist_timeout}")
    return None
