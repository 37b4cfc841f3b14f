# SPDX-License-Identifier: GPL-3.0-only
"""
May this run begin, and may it be continued? And while it runs: what does an error mean?
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
from runtime.settings import check_limits, or_else, with_words
from training import checkpoint as ckpt
from training.log import read_header, read_rows
from training.muon import Muon

# ---------- The settings

LIMITS = {  # the smallest and the largest value
    "batch_size gradient_accumulation_steps eval_interval log_interval dist_timeout": (1, 1e9),
    "max_iters": (1, 99_999_999),  # the digits in the name of a checkpoint
    "learning_rate muon_lr": (1e-12, 1e12),
    "weight_decay warmup_iters min_lr": (0, 1e12),
    "eval_iters save_interval lr_decay_iters patience": (1, 1e12),
    "grad_clip": (1e-12, 1e12),
    "beta1 beta2": (0, 1 - 1e-9),
    "lora_rank": (0, 1e5),
    "lora_alpha": (1e-6, 1e6),
    "seed": (0, 2**62),
}


def check_settings(settings):
    check_limits(settings, LIMITS)
    if settings.budget:
        seconds_of(settings.budget)
    start = settings.init_from
    if start.startswith("gpt2") and not os.path.exists(start):
        raise UserError(f"init_from={start}: OpenAI's weights are not downloaded here", "--init_from=RUN")
    if settings.lora_rank and start in ("auto", "scratch") and not ckpt.checkpoints(settings.out_dir):
        raise UserError(f"lora_rank={settings.lora_rank} corrects weights, but init_from={start} has none",
                        "--init_from=RUN, or omit --lora_rank")


# What nanoGPT's train.py takes where a config file says nothing, and this one does not
NANOGPT = {"dataset": "openwebtext", "gradient_accumulation_steps": 40, "max_iters": 600_000,
           "warmup_iters": 2000, "lr_decay_iters": 600_000}


def note_defaults(settings, given):
    """A config file from elsewhere that names no dataset may have been written for nanoGPT's defaults."""
    ours = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "config")
    elsewhere = [path for path in given.values() if path.endswith(".py") and os.path.isfile(path)
                 and os.path.dirname(os.path.abspath(path)) != ours]
    if elsewhere and "dataset" not in given:
        names = [name for name in NANOGPT if name not in given]
        theirs = ", ".join(f"{name}={NANOGPT[name]}" for name in names)
        here = ", ".join(f"{name}={getattr(settings, name)}" for name in names)
        note(f"{elsewhere[0]} names no dataset: with nanoGPT it would mean {theirs}; here it means {here}")


def seconds_of(budget):
    """'90s', '5m', '1.5h' in seconds."""
    found = re.fullmatch(r"(\d+\.?\d*)([smh])", budget)
    if not found:
        raise UserError(f"budget={budget!r} is not a duration", "--budget=90s, --budget=5m or --budget=1h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def pieces(settings, world):
    """Into how many pieces a micro-batch is cut, so that all processes do as much."""
    micros, windows = settings.gradient_accumulation_steps, settings.batch_size
    cut = world // math.gcd(world, micros)
    if windows % cut == 0:
        return cut
    raise UserError(f"{micros} micro-batch{'es' * (micros != 1)} of batch_size={windows} windows cannot be shared by "
                    f"{world} processes", f"--nproc_per_node={math.gcd(world, micros * windows)}")


def check_data(settings, data):
    """Do the settings fit the data? `auto` becomes the vocab_size of the data."""
    block_size, tokens = settings.block_size, data.meta["vocab_size"]
    data.check(block_size)
    settings.vocab_size = or_else(settings.vocab_size, tokens)
    if settings.vocab_size < tokens:
        raise UserError(f"vocab_size={settings.vocab_size}, but the tokenizer of {data.folder} has {tokens}",
                        "omit --vocab_size")
    if data.chat:
        learned = data.chat_windows("train", block_size)[:, 2].sum()
        lost = 1 - learned / data.meta["train"]["trained"]
        if lost:
            warn(f"conversations longer than block_size={block_size} are cut, losing {lost:.1%} of the answers")
    steps = settings.max_iters
    windows = steps * settings.gradient_accumulation_steps * settings.batch_size
    epochs = data.epochs(windows, block_size)
    # prepare.py suggests 50 steps for the shortest texts. A budget has not chosen the steps yet.
    if epochs > 20 and steps > 50 and not settings.budget:
        warn(f"{steps:,} steps read this text {epochs:,.0f} times and may memorise it; "
             f"--max_iters={max(1, round(10 * steps / epochs))} reads it 10 times")


def build_model(settings):
    try:
        return GPT(settings)
    except AssertionError as error:  # the model states its contract as 'fact; fix'
        fact, _, fix = str(error).partition("; ")
        raise UserError(fact, fix or "python train.py --help") from None


# ---------- Where a run starts

GOES_ON = "auto", "resume"  # values of init_from that continue a run, wherever it began


# The settings that may differ when a run is continued, and why. With any other it would be another run.
NAMES = "preset dataset out_dir"
SHOWN = "wandb_log wandb_project wandb_run_name"
RATES = "learning_rate muon_lr min_lr"
BATCH = "batch_size gradient_accumulation_steps"
MAY_CHANGE = {
    NAMES: "names; the data are compared by their checksums",
    "max_iters budget patience": "when the run ends",
    "eval_interval eval_iters eval_only log_interval": "what is measured",
    "save_interval always_save_checkpoint": "what is saved",
    "device backend dist_timeout": "where it runs",
    SHOWN: "where it is shown",
    RATES: "if given on the command line; a note says so",
    BATCH: "if their product stays the same: a step reads the same windows",
    "init_from": "if it is auto or resume, which continue a run, wherever it began",
}


def settings_of_result(settings):
    """{name: value} of the settings in which the processes of a run must agree."""
    return {name: value for name, value in asdict(settings).items() if name not in f"{NAMES} {SHOWN}".split()}


def may_change(was, now, given):
    """The names in MAY_CHANGE, without those whose condition is not met."""
    names = set(" ".join(MAY_CHANGE).split())
    names -= {name for name in RATES.split() if not given.get(name, "").startswith("--")}
    if math.prod(was[name] for name in BATCH.split()) != math.prod(now[name] for name in BATCH.split()):
        names -= set(BATCH.split())
    if now["init_from"] not in GOES_ON:
        names.remove("init_from")
    return names


def total_steps(budget, max_iters, chosen):
    """At which step a run ends. With a budget that is chosen as soon as the time of a step is known; until then
    infinity."""
    return chosen.get("max_iters", math.inf) if budget else max_iters


def compare(was, now, may_differ, what, fix):
    """Raises UserError with both values of what differs against the rules."""
    differ = [name for name in now if now[name] != was.get(name) and name not in may_differ]
    if differ:
        before = ", ".join(f"{name}={was.get(name)}" for name in differ)
        after = ", ".join(f"{name}={now[name]}" for name in differ)
        raise UserError(f"{what} {before}, not {after}", fix)


def fingerprints(tokenizer, files):
    """What identifies the data, from the checksums."""
    return dict(tokenizer=tokenizer[:12], data=" ".join(sha256[:12] for sha256 in files))


def find_start(settings, given, data, versions):
    """Where a run starts: (resumed, start, base), each None where there is none.

    resumed: the newest checkpoint of this run. start: the checkpoint of another one, whose weights it
    takes, or LoRA corrects. base: where those are, and their sha256. The settings take over what comes
    with them: the shape of the model, the vocabulary.
    """
    resumed = ckpt.find_checkpoint(settings.init_from, settings.out_dir)
    start = base = None
    if resumed:
        continue_run(resumed, settings, given, data, versions)
        base = resumed.get("base")
        if base:
            start = ckpt.read_base(resumed, settings.out_dir)
    elif settings.init_from not in ("auto", "scratch"):
        start = load_start(settings, given, data)
        if settings.lora_rank:
            base = ckpt.name_base(settings.init_from, start)
    check_data(settings, data)
    return resumed, start, base


def continue_run(resumed, settings, given, data, here):
    """Take over what the run has worked out. Raises UserError where it would become another run."""
    out_dir, step, chosen = settings.out_dir, resumed["step"], resumed["chosen"]
    was = asdict(type(settings)()) | resumed["settings"]  # an older version may not have had them all
    was = with_words(type(settings), was)

    # 1) Worked out when the run began: the vocabulary, the shape of a RUN, the steps of a budget.
    names = {"vocab_size"}
    if settings.init_from not in GOES_ON:
        names = GPTConfig.__dataclass_fields__.keys()
    take_over(settings, was, names - given.keys())
    was_end = total_steps(was["budget"], was["max_iters"], chosen)
    if settings.budget != was["budget"]:
        chosen.pop("max_iters", None)  # chosen anew, or given
    end = total_steps(settings.budget, settings.max_iters, chosen)

    # 2) The settings and the data.
    was |= fingerprints(resumed["tokenizer_sha256"], resumed["data_sha256"])
    now = asdict(settings) | fingerprints(data.meta["tokenizer_sha256"], data.sha256())
    what = f"{out_dir} was started with"
    fix = "the same command with the same data, or --out_dir=out/ANOTHER for a new run"
    if was["dataset"] != now["dataset"] and was["data"] != now["data"]:
        what = f"{out_dir} holds a run on {was['dataset']}, not on {now['dataset']}: it was started with"
        fix = f"--out_dir={quote('out/' + os.path.basename(now['dataset']))} for a new run"
    compare(was, now, may_change(was, now, given), what, fix)
    if settings.eval_only:
        return
    if resumed.get("order") != data.ORDER and end > step:
        raise UserError(f"{out_dir} is from an older version, which read the data in a different order",
                        f"--init_from={quote(out_dir)} --out_dir=out/ANOTHER: a new run from its weights")

    # 3) The length and the learning rate.
    if end < step:
        raise UserError(f"max_iters={end}, but {out_dir} already has {step} steps",
                        f"--max_iters={step} or more")
    for name in RATES.split():
        if now[name] != was[name]:
            note(f"{name}={now[name]} from step {step} on; it was {was[name]}")
    if end not in (was_end, math.inf) and settings.decay_lr and settings.lr_decay_iters == "auto":
        note(f"the learning rate now decays until step {end}, not {was_end}")

    # 4) What changes the last bits.
    before = resumed["versions"] | dict(batch_size=was["batch_size"])
    after = here | dict(batch_size=settings.batch_size)
    changed = [f"{name} {value} -> {after.get(name)}" for name, value in before.items()
               if name != "commit" and after.get(name) != value]
    if changed:
        warn(f"resumed with changes ({', '.join(changed)}): the result will not match bit for bit")


def take_over(settings, was, names):
    for name in names:
        setattr(settings, name, was[name])


def is_gpt2(tokenizer):
    """Has it GPT-2's ids? nanoGPT's data name the encoding, ours hold a copy of it."""
    return tokenizer.kind in ("tiktoken", "gpt2") and tokenizer.name == "gpt2"


def load_start(settings, given, data):
    """The checkpoint of the RUN that init_from names. Its shape becomes ours; a context may be shorter."""
    run = settings.init_from
    start, tokenizer = ckpt.read_run(run)
    ckpt.check_whole(start)
    both_gpt2 = is_gpt2(tokenizer) and is_gpt2(data.load_tokenizer())
    differ = start["tokenizer_sha256"] != data.meta["tokenizer_sha256"] and not both_gpt2
    if differ and not tokenizer.special:
        raise UserError(f"{run} is a character model of nanoGPT, which has no end-of-text token",
                        "data with the same meta.pkl, or train a new one")
    if differ:
        same = tokenizer.name if tokenizer.kind == "tiktoken" else run
        text = "YOUR_CHATS --format=chat" if data.chat else "YOUR_TEXT"
        raise UserError(f"{run} and {data.folder} use different tokenizers",
                        f"python prepare.py {text} --out={quote(data.folder)} --tokenizer={quote(same)}")
    was, names = with_words(GPTConfig, start["settings"]), GPTConfig.__dataclass_fields__.keys()
    take_over(settings, was, names - given.keys())
    may_differ = {"dropout"}
    if settings.block_size < was["block_size"]:
        may_differ.add("block_size")
    now = {name: getattr(settings, name) for name in names}
    shape = " ".join(f"--{name}={was[name]}" for name in names if now[name] != was[name] and name not in may_differ)
    compare(was, now, may_differ, f"{run} has", f"{shape}: the shape comes with the weights")
    return start


def check_log(settings):
    """A run that was stopped before its first checkpoint begins again, and replaces its own log only."""
    path, now = os.path.join(settings.out_dir, "log.jsonl"), asdict(settings)
    if any(read_rows(path)):
        was = now | read_header(path).get("settings", {})
        was = with_words(type(settings), was)
        compare(was, now, may_change(was, now, {}) | {"init_from"}, f"{path} is the log of a run with",
                "--out_dir=out/ANOTHER")
        note(f"the run of {path} has no checkpoint: it restarts at step 0")


def how_it_ended(resumed, settings):
    """What to say of a run that is finished; "" where there is more to do."""
    path, step = os.path.join(settings.out_dir, "log.jsonl"), resumed["step"]
    rows = [row for row in read_rows(path) if "val_loss" in row]
    if settings.eval_only or not rows or rows[-1]["step"] != step:
        return ""
    best = min(rows, key=lambda row: row["val_loss"])
    end = ""
    if step != total_steps(settings.budget, settings.max_iters, resumed["chosen"]):
        if not is_stuck(settings, step - best["step"]):
            return ""
        end = f", ended by patience={settings.patience}"
    return f"{settings.out_dir} is finished: {step} steps{end}, validation loss {rows[-1]['val_loss']:.4f}"


def is_stuck(settings, steps):
    """Is the patience over? steps: since the lowest validation loss."""
    return steps >= or_else(settings.patience, math.inf) * settings.eval_interval


def load_optimizers(optimizers, scaler, checkpoint, run):
    """Restore the state of the optimizers and of the scaler, but for the rates, which the settings give.

    Raises UserError where a shape does not fit: a fused kernel does not check it.
    """
    found = dict(enumerate(checkpoint.pop("optimizer")))
    for i, optimizer in enumerate(optimizers):
        if i in found and not found[i]["state"]:  # so far, float16 has overflowed in every step
            continue
        like = {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for place, p in enumerate(parameters):
            if isinstance(optimizer, Muon):
                like[place] = dict(momentum_buffer=p)
            else:
                like[place] = dict(step=torch.zeros(()), exp_avg=p, exp_avg_sq=p)
        check_like(found, {i: dict(state=like)}, run, "the optimizers")
        found[i]["param_groups"] = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(found[i])
    check_like(checkpoint["scaler"], scaler.state_dict(), run, "the scaler")
    scaler.load_state_dict(checkpoint["scaler"])


# ---------- While it runs


def not_finite(run, loss, norm):
    """The error for a loss or gradient that is no number. Exit code 3."""
    good, fix = "none yet", again(run.settings)
    if paths := ckpt.checkpoints(run.settings.out_dir):
        good = paths[-1]
        fix = f"--init_from={quote(good)} {fix}"
    return UserError(f"at step {run.step + 1} the loss is {loss} and the gradient norm {norm}; "
                     f"last good checkpoint: {good}", f"{fix}, or --dtype=float32", code=3)


def again(settings):
    """What to type when the learning rate was too high."""
    return f"--out_dir={quote(settings.out_dir + '-2')} --learning_rate={settings.learning_rate / 3:.1g}"


def explain(error, settings, ranks):
    """The UserError for a failed allocation or a lost process; None for a bug."""
    windows, micros = settings.batch_size, settings.gradient_accumulation_steps
    if machine.is_out_of_memory(error):
        fix = "a smaller --block_size, or a smaller model"
        if windows > 1:
            n = windows if windows % 2 else 2
            fix = f"--batch_size={windows // n} --gradient_accumulation_steps={micros * n}: the same steps"
        return UserError(f"out of memory with micro-batches of batch_size={windows} windows of "
                         f"block_size={settings.block_size} tokens", fix, alone=True)
    if ranks.lost(error):
        reason = str(error).splitlines()[0]
        return UserError(f"process {ranks.rank} of {ranks.world} lost the others: {reason}",
                         f"rerun; if a process is slow, --dist_timeout={2 * settings.dist_timeout}")
    return None
