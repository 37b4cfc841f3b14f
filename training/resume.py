# SPDX-License-Identifier: GPL-3.0-only
"""
May this run begin, and may it be continued?

Before a run: do the settings fit each other, the data, the checkpoint and the processes? During it: what does an error
mean? Whatever is wrong is a UserError with the numbers and with what to type, before any work is lost.
"""
import math
import os
from dataclasses import asdict, fields
from shlex import quote

import torch

from model import GPT, GPTConfig
from runtime import machine
from runtime.console import UserError, note, say, warn
from runtime.files import check_like
from runtime.settings import check_limits
from training import checkpoint as ckpt
from training.log import last_row, read_header
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
    """Raises UserError for settings that no run can have."""
    check_limits(settings, LIMITS)
    if settings.budget:
        seconds_of(settings.budget)
        settings.max_iters = max(settings.max_iters, 11)  # until it is chosen, after ten steps
    if settings.init_from.startswith("gpt2") and not os.path.exists(settings.init_from):
        raise UserError(f"init_from={settings.init_from}: OpenAI's weights are not downloaded here",
                        "--init_from=scratch, or the path of a run or checkpoint")
    if settings.lora_rank and settings.init_from in ("auto", "scratch") and not ckpt.checkpoints(settings.out_dir):
        raise UserError(f"lora_rank={settings.lora_rank} corrects weights, but init_from={settings.init_from} has none",
                        "--init_from=RUN (a run or a Hugging Face folder), or leave --lora_rank out")


def seconds_of(budget):
    """'90s', '5m', '1.5h' in seconds."""
    try:
        seconds = float(budget[:-1]) * {"s": 1, "m": 60, "h": 3600}[budget[-1:]]
        if 0 < seconds < 1e9:
            return seconds
    except (KeyError, ValueError):
        pass
    raise UserError(f"budget={budget!r} is not a time", "--budget=90s, --budget=5m or --budget=1h")


def pieces(settings, world):
    """Into how many pieces a micro-batch is cut, so that all processes get the same share of a step."""
    micros, windows = settings.gradient_accumulation_steps, settings.batch_size
    cut = world // math.gcd(world, micros)
    if windows % cut:
        fewer, more = math.gcd(world, micros * windows), windows + cut - windows % cut
        raise UserError(f"{micros} micro-batches of batch_size={windows} windows cannot be shared by {world} processes",
                        f"--nproc_per_node={fewer}, or for a new run --batch_size={more}")
    return cut


def check_data(settings, data):
    """Do the settings fit the data? Sets vocab_size to that of the data; warns of what may be regretted."""
    data.check(settings.block_size)
    tokens = data.meta["vocab_size"]
    settings.vocab_size = settings.vocab_size or tokens
    if settings.vocab_size < tokens:
        raise UserError(f"vocab_size={settings.vocab_size}, but {data.folder} was written with a tokenizer of "
                        f"{tokens} tokens", "leave --vocab_size out")
    if data.chat:
        lost = 1 - data.layout("train", settings.block_size)[:, 2].sum() / data.meta["train"]["trained"]
        if lost:
            warn(f"conversations that are longer than block_size={settings.block_size} are cut: {lost:.1%} of what the "
                 "assistant says is not learned")
    if settings.budget:  # the number of steps is not known yet
        return
    steps, windows = settings.max_iters, settings.gradient_accumulation_steps * settings.batch_size
    epochs = data.epochs(steps * windows, settings.block_size)
    if epochs > 20:
        warn(f"{steps:,} steps read this text {epochs:,.0f} times, and may learn it by heart; "
             f"--max_iters={max(1, round(10 * steps / epochs))} reads it 10 times")
    if settings.warmup_iters >= steps:
        warn(f"the learning rate rises for warmup_iters={settings.warmup_iters} steps, and there are only {steps}; "
             f"--warmup_iters={steps // 10}")


def build_model(settings):
    try:
        return GPT(settings)
    except AssertionError as error:  # the model states its contract as 'fact; fix'
        fact, _, fix = str(error).partition("; ")
        raise UserError(fact, fix or "python train.py --help") from None
    except (RuntimeError, MemoryError, OverflowError, ValueError, TypeError) as error:
        raise UserError(f"a model of this shape cannot be made here: {str(error).splitlines()[0][:200]}",
                        "a smaller --n_embd, --n_layer, --n_inner or --vocab_size") from None


def say_memory(run):
    """About what training will take and what there is, before it is too late."""
    settings, model = run.settings, run.model
    parts = model.training_memory(run.batch_size, run.dtype.itemsize, 4 if settings.optimizer == "muon" else 8)
    needed, free = sum(parts.values()), machine.free_memory(run.device)
    sharing = run.ranks.local_world if run.device == "cpu" else 1  # processes that take it from the same memory
    sizes = " + ".join(f"{what} {size / 1e6:,.0f}" for what, size in parts.items())
    each = f" for each of {sharing} processes" if sharing > 1 else ""
    rest = f", {free / 1e6:,.0f} MB are free" if free < math.inf else ""
    say(f"memory: about {sizes} = {needed / 1e6:,.0f} MB{each}{rest}")
    if needed * sharing > free:
        warn("this may not fit; half the --batch_size with twice the --gradient_accumulation_steps does the same "
             "steps with less")
    if settings.lora_rank:
        weights = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(f"lora: {trained:,} numbers are trained in place of {weights - trained:,} weights "
            f"({trained / weights:.1%})")


# ---------------------------------------------------------------------------------------------------------------------
# Where a run starts

# What may be another when a run is continued. (The data are compared by their checksums.)
MAY_CHANGE = {"preset", "dataset", "out_dir",  # names
              "max_iters", "budget", "patience",  # when it ends
              "eval_interval", "eval_iters", "eval_only", "log_interval",  # what is measured
              "save_interval", "always_save_checkpoint",  # what is saved
              "device", "backend", "dist_timeout",  # where it runs
              "wandb_log", "wandb_project", "wandb_run_name"}


def check_same(was, now, what, fix):
    """Raises UserError with both values of whatever differs although it may not."""
    differ = [name for name in now if name not in MAY_CHANGE and now[name] != was.get(name)]
    if differ:
        before = ", ".join(f"{name}={was.get(name)}" for name in differ)
        after = ", ".join(f"{name}={now[name]}" for name in differ)
        raise UserError(f"{what} {before}; now it is {after}", fix)


def fingerprints(tokenizer, files):
    return dict(tokenizer=tokenizer[:12], data=" ".join(sha256[:12] for sha256 in files))


def continue_run(resumed, settings, given, data, here):
    """Check that this is the run that was begun. Raises UserError with both values of whatever differs.

    Settings that were worked out when it began are taken over: the shape of a RUN that it started from, the vocabulary,
    the steps that a budget allows.
    """
    was = asdict(type(settings)()) | resumed["settings"]  # (an older version may not have had them all)
    take_over(was, resumed, settings, given)
    now = asdict(settings)

    # 1) The settings. Cut into other micro-batches, a step reads the same windows.
    batch = "batch_size", "gradient_accumulation_steps"
    if math.prod(was[name] for name in batch) == math.prod(now[name] for name in batch):
        if was["batch_size"] != now["batch_size"]:
            part = ", and --eval_iters counts these" if now["eval_iters"] else ""
            warn(f"micro-batches of {now['batch_size']} windows instead of {was['batch_size']}: the run goes on with "
                 f"the same data, but not bit for bit{part}")
        was |= {name: now[name] for name in batch}
    if settings.init_from in ("auto", "resume"):
        now["init_from"] = was["init_from"]
    check_same(was, now, f"{settings.out_dir} was begun with",
               "repeat the command that began the run, or --out_dir=out/ANOTHER for a new one")

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
        warn(f"resumed elsewhere ({', '.join(changed)}): the run goes on, but not bit for bit as it would have")


def take_over(was, resumed, settings, given):
    """Set what was worked out when the run began."""
    if settings.init_from not in ("auto", "resume"):
        for field in fields(GPTConfig):
            if field.name not in given:
                setattr(settings, field.name, was[field.name])
    settings.vocab_size = settings.vocab_size or was["vocab_size"]
    if settings.budget != was["budget"]:
        resumed["chosen"].pop("max_iters", None)  # chosen anew, or given
    if "max_iters" in resumed["chosen"]:
        settings.max_iters = resumed["chosen"]["max_iters"]
    elif settings.budget:
        settings.max_iters = max(settings.max_iters, resumed["step"] + 2)  # one step measures the time


def how_it_ended(resumed, settings):
    """What to say of a run that is finished; nothing where there is more to do."""
    row, step = last_row(os.path.join(settings.out_dir, "log.jsonl")), resumed["step"]
    at_end = step == settings.max_iters
    stuck = 0 < settings.patience <= row.get("since_best", 0)
    if settings.eval_only or row.get("step") != step or "val_loss" not in row or not (at_end or stuck):
        return ""
    early = "" if at_end else f", ended by patience={settings.patience}"
    return f"{settings.out_dir} is finished: {step} steps{early}, validation loss {row['val_loss']:.4f}"


def check_begun(settings):
    """A run that was stopped before its first checkpoint begins again and replaces its log. Raises UserError where that
    belongs to a run with other settings."""
    path = os.path.join(settings.out_dir, "log.jsonl")
    if not last_row(path):
        return
    now = asdict(settings)
    was = read_header(path).get("settings", {}) | dict(init_from=settings.init_from)
    check_same(was, now, f"{settings.out_dir} holds the log of a run with", "--out_dir=out/ANOTHER")
    note(f"{settings.out_dir} holds the log of a run, but no checkpoint: the run begins again at step 0")


def load_start(settings, given, data):
    """The checkpoint of the RUN that init_from names. Its shape becomes that of this run; the context may be cut."""
    start, tokenizer = ckpt.read_run(settings.init_from)
    ckpt.check_whole(start)
    if not tokenizer.special:
        raise UserError(f"{settings.init_from} is a character model of nanoGPT, which has no end-of-text token: it "
                        "cannot be trained here", "sample.py and export.py read it; or train a new one")
    its_sha256, data_sha256 = start["tokenizer_sha256"], data.meta["tokenizer_sha256"]
    if its_sha256 != data_sha256:
        same = tokenizer.name if tokenizer.kind == "tiktoken" else settings.init_from
        text = "YOUR_CHATS --format=chat" if data.chat else "YOUR_TEXT"
        raise UserError(f"{settings.init_from} was trained with another tokenizer ({its_sha256[:12]}) than "
                        f"{data.folder} was written with ({data_sha256[:12]})",
                        f"python prepare.py {text} --out={quote(data.folder)} --tokenizer={quote(same)}")
    for name in (field.name for field in fields(GPTConfig)):
        was, now = start["settings"][name], getattr(settings, name)
        if name not in given:
            setattr(settings, name, was)
        elif name == "block_size" and now < was:
            note(f"the context is cut from {was:,} tokens to {now:,}: what is trained here reads no more")
        elif now != was and name != "dropout":
            raise UserError(f"{settings.init_from} has {name}={was}, but {name}={now} is asked for",
                            f"--{name}={was}: the shape comes with the weights")
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


def not_finite(run, loss, norm):
    """The error for a loss or gradient that is no number, before any weight was changed. Exit code 3."""
    settings, dtype = run.settings, run.facts["chosen"]["dtype"]
    good = ckpt.checkpoints(settings.out_dir)[-1:]
    start = f"--init_from={quote(good[0])} " if good else ""
    return UserError(f"at step {run.step + 1} the loss is {loss} and the gradient norm {norm} (learning rate "
                     f"{settings.learning_rate:.2g}, {dtype}); no weight was changed; last good checkpoint: "
                     f"{good[0] if good else 'none yet'}",
                     f"{start}{again(settings)}, or --dtype=float32", code=3)


def again(settings):
    """What to type when the learning rate was too high."""
    return f"--out_dir={quote(settings.out_dir + '-2')} --learning_rate={settings.learning_rate / 3:.1g}"


def explain(error, settings, ranks):
    """The UserError for a failed allocation or a lost process; None for what is a bug."""
    windows, micros = settings.batch_size, settings.gradient_accumulation_steps
    if machine.is_out_of_memory(error):
        fix = "a smaller --block_size, or a smaller model"
        if windows > 1:
            cut = next(n for n in range(2, windows + 1) if windows % n == 0)
            fix = (f"--batch_size={windows // cut} --gradient_accumulation_steps={micros * cut}: the same steps with "
                   "less memory, a little slower")
        return UserError(f"out of memory with micro-batches of batch_size={windows} windows of block_size="
                         f"{settings.block_size} tokens: {str(error).strip().splitlines()[0][:200]}", fix, alone=True)
    if ranks.lost(error):
        why = str(error).splitlines()[0].partition(". This is typically")[0].rpartition("] ")[2]
        return UserError(f"process {ranks.rank} of {ranks.world} lost the others: {why}",
                         "see the error of the one that ended first; the same command continues from the last "
                         f"checkpoint. If one was only slow: --dist_timeout={2 * settings.dist_timeout}")
    return None
