# SPDX-License-Identifier: GPL-3.0-only
"""
Training: one linear loop, from the settings to a trained model.

    python train.py config/train_small.py                        # a GPT that writes Python, in minutes on a laptop
    python train.py config/train_small.py --dataset=notes --out_dir=out/notes
    python train.py config/train_small.py --budget=10m           # as many steps as fit into ten minutes
    python train.py --help                                       # every setting with its meaning

The same command continues a run that was stopped (Ctrl-C saves first), and does nothing when the run is finished.
A run is a folder, out/NAME:

    ckpt_00000700.pt    weights, optimizer and settings after 700 updates; the last two are kept
    best.pt             the weights with the lowest validation loss: what sample.py reads
    log.jsonl           one line per logged step; loss.svg is its picture
    tokenizer/          a copy, so that a model never loses its vocabulary

On a CPU, a run is a pure function of its settings, its seed and the machine: the batch of a step is computed from
(seed, step), see prepare.py, and so are the dropout masks. That is why a resumed run has the same bits as one that was
never stopped. (A GPU adds in varying order; there it is the same up to rounding.)
"""
import time

PROCESS_START = time.time()  # before the imports, which take seconds: the clock of a run counts them

import math
import os
import shutil
import signal
import statistics
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch
from torch.nn import functional as F

import machine
import prepare
import runtime
import tokenizer as tokenizers
from config import UserError, command_line, load, note, say, warn
from log import Log, last_row
from model import GPT, GPTConfig, PRESETS
from muon import Muon


@dataclass
class TrainConfig(GPTConfig):
    preset: str = ""  # a shape by name, see PRESETS in model.py: gpt2, openllm-small, modern, ...; other settings win
    vocab_size: int = 0  # 0: as many as the tokenizer of the data has
    # data
    dataset: str = "stdlib"  # data/NAME, written by prepare.py
    batch_size: int = 12  # windows of a micro-batch; less where memory is short
    gradient_accumulation_steps: int = 1  # micro-batches of an update: a larger batch without more memory
    # the run
    out_dir: str = ""  # folder of the run; by default out/<dataset>
    init_from: str = "auto"  # auto: resume where there is a checkpoint; scratch; resume; or a RUN to take weights from
    max_iters: int = 2000  # updates of the weights
    budget: str = ""  # 90s, 5m or 1h: choose max_iters so that the whole command takes this long
    seed: int = 1337  # initial weights, order of the data and dropout
    eval_interval: int = 250  # updates between validations
    eval_iters: int = 0  # at most this many batches of the validation pass; 0: all held-out text
    eval_only: bool = False  # print the validation loss and end
    save_interval: int = 0  # updates between checkpoints; 0: eval_interval
    always_save_checkpoint: bool = True  # save at every validation too, whatever save_interval is
    log_interval: int = 1  # updates between log lines
    # the optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, AdamW for the rest
    learning_rate: float = 6e-4  # of AdamW, at its highest; smaller models tolerate a higher one
    muon_lr: float = 0.02  # of Muon, at its highest
    min_lr: float = 6e-5  # where the cosine ends; a tenth of learning_rate, or 0
    warmup_iters: int = 100  # updates in which the rate rises from 0
    lr_decay_iters: int = 0  # update at which the cosine ends; 0: max_iters
    decay_lr: bool = True  # false: stay at learning_rate after the warm-up
    weight_decay: float = 0.1  # pull of matrices towards 0
    beta1: float = 0.9  # AdamW: memory of the gradient, about 1 / (1 - beta1) updates
    beta2: float = 0.95  # AdamW: memory of its square
    grad_clip: float = 1.0  # longest gradient, the rest is scaled down; 0: no limit
    # the machine
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; weights stay float32
    compile: Literal["auto"] | bool = "auto"  # torch.compile: faster steps after some seconds of compiling
    backend: str = "auto"  # nanoGPT's setting, for several processes; without effect: there is one
    # logging elsewhere, as in nanoGPT; log.jsonl is always written
    wandb_log: bool = False  # also send the numbers to Weights & Biases, if its package is installed
    wandb_project: str = "owt"  # its project
    wandb_run_name: str = "gpt2"  # and its name for the run


def main(argv):
    settings, given, _ = load(TrainConfig, argv, presets=PRESETS, files=True)
    check_settings(settings)
    if not argv:
        note("these are the settings of GPT-2; python train.py config/train_small.py trains in minutes")
    settings.dataset = os.path.normpath(settings.dataset).removeprefix("data" + os.sep)
    out_dir = settings.out_dir = settings.out_dir or os.path.join("out", os.path.basename(settings.dataset))
    device = machine.choose_device(settings.device)
    machine.set_up(device)
    versions = machine.versions(device)

    # ------------------------------------------------------------------------------------------------------------------
    # 1) The data; what is built in is prepared here if it is missing.
    folder = os.path.join("data", settings.dataset)
    if not os.path.exists(folder) and settings.dataset in prepare.BUILT_IN:
        say(f"{folder} is missing; preparing it")
        prepare.prepare([settings.dataset], prepare.PrepareConfig(out=folder))
    data = prepare.Data.open(folder)
    tokenizers.load_from(folder, data.meta["tokenizer_sha256"])  # better to find it damaged now than at the end

    # ------------------------------------------------------------------------------------------------------------------
    # 2) Where to start: at a checkpoint of this run, at the weights of another one, or at random weights.
    resumed = runtime.find_checkpoint(settings.init_from, out_dir)
    start = None
    if resumed:
        continue_run(resumed, settings, given, data, versions)
        row = last_row(os.path.join(out_dir, "log.jsonl"))
        if resumed["step"] == row.get("step") == settings.max_iters and "val_loss" in row and not settings.eval_only:
            say(f"{out_dir} is finished: {row['step']} updates, validation loss {row['val_loss']:.4f}")
            say_next(out_dir, data)
            return 0
    elif settings.init_from not in ("auto", "scratch"):
        start = load_start(settings, given, data)
    data.check(settings.block_size)
    advise(settings, data)
    settings.vocab_size = settings.vocab_size or data.meta["vocab_size"]
    if settings.vocab_size < data.meta["vocab_size"]:
        raise UserError(f"vocab_size={settings.vocab_size}, but {folder} was written with a tokenizer of "
                        f"{data.meta['vocab_size']} tokens", "leave --vocab_size out")
    torch.manual_seed(settings.seed)  # the initial weights are the first thing drawn
    model = build_model(settings)
    if resumed or start:
        runtime.load_weights(model, (resumed or start).pop("model"), out_dir if resumed else settings.init_from)
    model.to(device).train()
    optimizers = make_optimizers(model, settings, device)

    # ------------------------------------------------------------------------------------------------------------------
    # 3) The machine. What `auto` chooses is written into the run and used again when it is resumed.
    if resumed:
        chosen = resumed["chosen"]
    else:
        dtype, why = machine.choose_dtype(settings.dtype, device)
        chosen = dict(dtype=str(dtype).removeprefix("torch."), why=why, compile=settings.compile)
    dtype = getattr(torch, chosen["dtype"])
    autocast = machine.autocast(device, dtype)
    scaling = dtype == torch.float16  # small gradients would round to 0 in float16, unless the loss is scaled up
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=scaling)
    peak = machine.measure_peak(device, dtype)
    tokens_per_step = settings.gradient_accumulation_steps * settings.batch_size * settings.block_size
    flops_per_token = model.flops_per_token()
    if chosen["compile"] == "auto":  # worth half a minute? Eager code reaches about 30% of the peak, compiled 40%
        seconds = settings.max_iters * tokens_per_step * flops_per_token / (0.3 * peak)
        seconds = seconds_of(settings.budget) if settings.budget else seconds
        chosen["compile"] = device != "mps" and seconds > 120
    say(f"data: {folder}, {data.meta['train']['tokens']:,} tokens of {', '.join(data.meta['source'])}")
    say(f"model: {model.n_params():,} parameters: {model.config.n_layer} layers, {model.config.n_embd} wide, context "
        f"{settings.block_size}, vocabulary {settings.vocab_size:,}")
    say(f"machine: {device}, {torch.get_num_threads()} threads, {chosen['dtype']} ({chosen['why']}), at most "
        f"{peak / 1e9:,.0f} GFLOP/s")

    def batch(step, micro):
        return data.batch(settings.block_size, settings.batch_size, settings.seed, step, micro,
                          settings.gradient_accumulation_steps)

    stop = machine.StopSignal()

    def loss_of(idx, targets):
        if stop.signal:  # here and nowhere else: before a micro-batch or a validation batch, never while weights move
            raise machine.Stopped
        with autocast:
            return model(idx.to(device), targets.to(device))

    def validate():
        model.eval()
        with torch.no_grad():
            loss = prepare.validation_loss(loss_of, data, settings.block_size, settings.batch_size, settings.eval_iters)
        model.train()
        return loss

    if chosen["compile"]:
        chosen["compile"] = machine.compile_model(model, settings.compile, lambda: loss_of(*batch(0, 0)))
    if settings.eval_only:
        loss = validate()
        say(f"validation loss {loss:.4f}, {data.bits_per_byte(loss):.4f} bits per byte")
        return 0

    # ------------------------------------------------------------------------------------------------------------------
    # 4) The run folder: a new one, or the state in which the last checkpoint left it.
    step, row, best_loss, train_seconds, wall_before, skipped, times = 0, None, math.inf, 0.0, 0.0, 0, []
    if resumed:
        step, row, best_loss = resumed["step"], resumed["row"], resumed["best_loss"]
        train_seconds, wall_before = row["train_seconds"], row["wall_seconds"]
        if os.path.exists(best := os.path.join(out_dir, "best.pt")):  # it may be newer than the checkpoint
            best_loss = min(best_loss, runtime.load_checkpoint(best)["val_loss"])
        for (optimizer, _), state in zip(optimizers, resumed.pop("optimizer")):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(resumed["scaler"])
        say(f"resumed {out_dir} after {step} of {settings.max_iters} updates")
    else:
        make_folder(out_dir)
        shutil.copytree(os.path.join(folder, "tokenizer"), os.path.join(out_dir, "tokenizer"), dirs_exist_ok=True)

    def header():
        return dict(versions=versions, chosen=chosen, settings=asdict(settings), data=data.meta)

    log = Log(os.path.join(out_dir, "log.jsonl"), header(), before=step)
    wandb = start_wandb(settings) if settings.wandb_log else None

    def wall_seconds():
        return wall_before + time.time() - PROCESS_START

    def save(name, **state):
        runtime.save_checkpoint(os.path.join(out_dir, name), dict(
            format=1, step=step, model=model.state_dict(), settings=asdict(settings), chosen=chosen,
            tokenizer_sha256=data.meta["tokenizer_sha256"], source=data.meta["source"],
            data_sha256=[data.meta[side]["sha256"] for side in ("train", "val")],
            versions=versions, **state))

    def save_run():
        """All that the next update depends on."""
        save(f"ckpt_{step:08d}.pt", row=row, best_loss=best_loss, scaler=scaler.state_dict(),
             optimizer=[optimizer.state_dict() for optimizer, _ in optimizers])
        runtime.prune_checkpoints(out_dir)

    # ------------------------------------------------------------------------------------------------------------------
    # 5) The loop. The weights move in one place only, so that at any other moment memory holds exactly the state after
    #    `step` updates: when a signal comes, half a step is thrown away and nothing is lost.
    stop.listen()
    try:
        while True:
            # a) What is due after `step` updates. A resumed run enters here: if it was killed between saving and
            #    validating, it validates now.
            last = step >= settings.max_iters
            if step > 0:
                if last or step % settings.eval_interval == 0:
                    row["val_loss"] = validate()
                    row["val_bpb"] = data.bits_per_byte(row["val_loss"])
                    if row["val_loss"] < best_loss:
                        best_loss = row["val_loss"]
                        save("best.pt", val_loss=best_loss, val_bpb=row["val_bpb"])
                if "val_loss" in row or step % settings.log_interval == 0:
                    row["wall_seconds"] = wall_seconds()
                    log.write(row)
                    say(progress_line(row, settings.max_iters, flops_per_token / peak))
                    if wandb:
                        wandb.log(row, step=step)
            if last:
                break
            if settings.budget and "max_iters" not in chosen and step >= max(1, min(10, settings.warmup_iters)):
                # The time of an update is known now. The warm-up is not over: until then the rate does not depend on
                # max_iters, so choosing it here changes nothing that has been done.
                left = seconds_of(settings.budget) - wall_seconds()
                settings.max_iters = step + steps_within(left, settings, data, statistics.median(times))
                chosen["max_iters"] = settings.max_iters
                log.rewrite(header())
                say(f"budget: enough for {settings.max_iters:,} updates; to repeat this run without the clock: "
                    f"--max_iters={settings.max_iters} --compile={str(chosen['compile']).lower()}")

            # b) One update: how far to move, in which direction, and the move.
            started = time.perf_counter()
            factor = learning_rate_factor(step, settings)
            for optimizer, highest in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = highest * factor
            loss = 0.0
            for micro in range(settings.gradient_accumulation_steps):
                torch.manual_seed(prepare.fold("dropout", settings.seed, step, micro))  # the same masks after a resume
                part = loss_of(*batch(step, micro)) / settings.gradient_accumulation_steps
                scaler.scale(part).backward()  # adds to the gradients of the micro-batches before: a mean over all
                loss += part.item()
            for optimizer, _ in optimizers:
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf).item()
            skipped = 0 if math.isfinite(norm) else skipped + 1
            if not math.isfinite(loss) or skipped > (MAX_SKIPPED if scaling else 0):
                raise UserError(f"at update {step + 1} the loss is {loss} and the gradient norm {norm} (learning rate "
                                f"{settings.learning_rate * factor:.2g}, {chosen['dtype']}); no weight was touched",
                                f"--learning_rate={settings.learning_rate / 3:.1g}, or --dtype=float32", code=3)
            if not skipped:  # else float16 has overflowed: the scaler halves its factor, this update does nothing
                for optimizer, _ in optimizers:
                    scaler.step(optimizer)
            scaler.update()
            for optimizer, _ in optimizers:
                optimizer.zero_grad(set_to_none=True)
            step += 1
            seconds = time.perf_counter() - started
            train_seconds += seconds
            times = times[-9:] + [seconds]
            row = dict(step=step, tokens=step * tokens_per_step,
                       epoch=step * tokens_per_step / data.meta["train"]["tokens"], train_seconds=train_seconds,
                       wall_seconds=wall_seconds(), loss=loss, lr=settings.learning_rate * factor,
                       grad_norm=-1.0 if skipped else norm,  # (JSON has no infinity)
                       tokens_per_second=tokens_per_step / seconds, memory=machine.peak_memory(device))

            # c) Save before validating, so that a crash there loses nothing.
            validates = step % settings.eval_interval == 0
            if step >= settings.max_iters or step % (settings.save_interval or settings.eval_interval) == 0 or (
                    settings.always_save_checkpoint and validates):
                save_run()
    except machine.Stopped:
        if step > 0:
            save_run()
        say(f"stopped by {signal.Signals(stop.signal).name} after {step} updates"
            + (f"; saved in {out_dir}. The same command continues." if step else ""))
        return 128 + stop.signal
    finally:
        stop.ignore()

    # ------------------------------------------------------------------------------------------------------------------
    # 6) The result.
    # Which Python it was that the model has read: losses can be compared on the same text only.
    corpus = next((f" ({source})" for source in data.meta["source"] if source.startswith("stdlib")), "")
    say(f"\nfinished: {step} updates in {train_seconds:.0f} s of training, {wall_seconds():.0f} s in all; validation "
        f"loss {row['val_loss']:.4f}, {row['val_bpb']:.4f} bits per byte{corpus}")
    model, tokenizer, best = runtime.load_run(out_dir, device=device)
    say(f"{best['path']}: validation loss {best['val_loss']:.4f} after {best['step']} updates; this is what sample.py "
        "reads, and what writes here:\n")
    print_sample(model, tokenizer, autocast, device)
    say_next(out_dir, data)
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# What the loop uses


def make_optimizers(model, settings, device):
    """[(optimizer, its highest learning rate)]. Weight decay pulls at matrices only, not at biases and norms.

    muon: for the matrices inside the blocks. Embeddings, whose rows are learned one by one, and vectors stay AdamW's.
    """
    def for_muon(name, p):
        return settings.optimizer == "muon" and p.dim() == 2 and ".h." in name

    inside = [p for name, p in model.named_parameters() if for_muon(name, p)]
    outside = [p for name, p in model.named_parameters() if not for_muon(name, p)]
    groups = [dict(params=[p for p in outside if p.dim() == 2], weight_decay=settings.weight_decay),
              dict(params=[p for p in outside if p.dim() == 1], weight_decay=0.0)]
    betas = settings.beta1, settings.beta2
    adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=not device.startswith("mps"))
    if not inside:
        return [(adamw, settings.learning_rate)]
    dtype = torch.bfloat16 if machine.has_bf16(device) else torch.float32
    return [(adamw, settings.learning_rate),
            (Muon(inside, settings.muon_lr, settings.weight_decay, dtype=dtype), settings.muon_lr)]


def steps_within(left, settings, data, step_seconds):
    """How many updates fit into `left` seconds, with their validations (forward alone: a third of the work)."""
    batch = settings.batch_size * settings.block_size
    batches = math.ceil(data.meta["val"]["tokens"] / batch)
    batches = min(batches, settings.eval_iters or batches)
    validation = batches / settings.gradient_accumulation_steps * step_seconds / 3
    left -= validation + 3  # the last validation, and the sample
    if left <= 0:
        raise UserError(f"budget={settings.budget} is too short: one validation and a sample need {-left:.0f} s more",
                        "a longer --budget, or a smaller model")
    return max(1, int(left / (step_seconds + validation / settings.eval_interval)))


def learning_rate_factor(step, settings):
    """The share of the highest rate for this step: up in a line, down in half a cosine, then level."""
    lowest = settings.min_lr / settings.learning_rate
    end = settings.lr_decay_iters or settings.max_iters
    if step < settings.warmup_iters:
        return (step + 1) / (settings.warmup_iters + 1)
    if not settings.decay_lr:
        return 1.0
    if step >= end:
        return lowest
    progress = (step - settings.warmup_iters) / (end - settings.warmup_iters)
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def progress_line(row, max_iters, token_share):
    """step 200/700 | loss 3.512 | lr 0.0028 | norm 0.41 | 11,300 tok/s, 39% of peak | 2m03s left"""
    left = (max_iters - row["step"]) * row["train_seconds"] / row["step"]
    validated = f"validation {row['val_loss']:.4f} = {row['val_bpb']:.4f} bits per byte | " if "val_loss" in row else ""
    return (f"step {row['step']}/{max_iters} | loss {row['loss']:.3f} | {validated}lr {row['lr']:.2g} | norm "
            f"{row['grad_norm']:.2f} | {row['tokens_per_second']:,.0f} tok/s, "
            f"{row['tokens_per_second'] * token_share:.0%} of peak | {left // 60:.0f}m{left % 60:02.0f}s left")


def print_sample(model, tokenizer, autocast, device, n=200):
    """What the model writes by itself, from the end-of-text token on; the text alone goes to standard output."""
    def pick(logits):
        return torch.multinomial(F.softmax(logits / 0.8, dim=-1), 1)[:, 0]
    model.eval()
    torch.manual_seed(0)
    ids, start = [], tokenizer.special[tokenizers.END_OF_TEXT]
    with autocast:
        for token in model.generate(torch.tensor([[start]], device=device), n, pick):
            if token.item() == start:
                break
            ids.append(token.item())
    print(tokenizer.decode(ids), flush=True)


def say_next(out_dir, data):
    prompt = " --prompt='def'" if any(source.startswith("stdlib") for source in data.meta["source"]) else ""
    say(f"\nnext: python sample.py {out_dir}{prompt}\n      python sample.py --help")


def start_wandb(settings):
    try:
        import wandb
    except ImportError:
        note("wandb is not installed; log.jsonl in the run folder has the same numbers")
        return None
    return wandb.init(project=settings.wandb_project, name=settings.wandb_run_name, config=asdict(settings))


# ----------------------------------------------------------------------------------------------------------------------
# Checks, each before any work is lost


def check_settings(settings):
    for name in ("batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval", "log_interval"):
        if not 1 <= getattr(settings, name) <= 10**9:
            raise UserError(f"{name}={getattr(settings, name)} is not between 1 and a billion", f"--{name}=10")
    for name in ("learning_rate", "muon_lr", "rope_theta", "norm_eps"):
        if not 0 < getattr(settings, name) < math.inf:
            raise UserError(f"{name}={getattr(settings, name)} is not above 0 and finite", f"--{name}=1e-3")
    if not 0 <= settings.seed < 2**62:
        raise UserError(f"seed={settings.seed} is not between 0 and 2^62", "--seed=1337")
    for name in ("weight_decay", "grad_clip", "warmup_iters", "lr_decay_iters", "min_lr", "eval_iters",
                 "save_interval"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise UserError(f"{name}={getattr(settings, name)} is negative or not finite", f"--{name}=0 or more")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)} is not in [0, 1)", f"--{name}=0.9")
    if settings.budget:
        seconds_of(settings.budget)
        settings.max_iters = max(settings.max_iters, 11)  # until it is known after ten
    if os.environ.get("WORLD_SIZE", "1") not in ("1", ""):
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but training with several processes is not there yet",
                        "python train.py, without torchrun")
    if settings.init_from.startswith("gpt2") and not os.path.exists(settings.init_from):
        raise UserError(f"init_from={settings.init_from} means OpenAI's weights, which this project neither has nor "
                        "downloads", "--init_from=scratch, or the path of a run or checkpoint")


def advise(settings, data):
    """What works, but may be regretted."""
    step = settings.gradient_accumulation_steps * settings.batch_size * settings.block_size
    epochs = settings.max_iters * step / data.meta["train"]["tokens"]
    if epochs > 20 and not settings.budget:
        warn(f"{settings.max_iters:,} updates read this text {epochs:,.0f} times, and may learn it by heart; "
             f"--max_iters={max(1, round(10 * settings.max_iters / epochs))} reads it 10 times")
    if settings.warmup_iters >= settings.max_iters and not settings.budget:
        warn(f"the learning rate rises for warmup_iters={settings.warmup_iters} updates, and there are only "
             f"{settings.max_iters}; --warmup_iters={settings.max_iters // 10}")


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


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
        with open(os.path.join(path, ".probe"), "wb"):  # better to fail now than at the first checkpoint
            pass
        os.unlink(os.path.join(path, ".probe"))
    except OSError as error:
        raise UserError(f"cannot write to out_dir={path}: {error.strerror}", "--out_dir=ANOTHER_FOLDER") from None


def build_model(settings):
    try:
        return GPT(settings)
    except AssertionError as error:  # the model states its contract as 'fact; remedy'
        fact, _, remedy = str(error).partition("; ")
        raise UserError(fact, remedy or "python train.py --help") from None
    except (RuntimeError, MemoryError, OverflowError, ValueError, TypeError) as error:
        raise UserError(f"a model of this shape cannot be made here: {str(error).splitlines()[0][:200]}",
                        "a smaller --n_embd, --n_layer, --n_inner or --vocab_size") from None


MAX_SKIPPED = 20  # updates in a row that float16 may overflow: the scaler needs some to find its factor
MAY_CHANGE = {"init_from", "max_iters", "budget", "eval_interval", "eval_iters", "eval_only", "save_interval",
              "always_save_checkpoint", "log_interval", "out_dir", "device", "backend", "wandb_log", "wandb_project",
              "wandb_run_name", "preset", "dataset"}  # (data and tokenizer are compared by their checksums)


def continue_run(resumed, settings, given, data, here):
    """A resumed run must be the run that was begun. Raises UserError with both values of whatever differs.

    Settings that were worked out when it began (the shape of a RUN that it started from, the vocabulary, the updates
    that a budget allows) are taken from there.
    """
    was = dict(resumed["settings"])
    if settings.init_from not in ("auto", "resume"):
        for field in fields(GPTConfig):
            if field.name not in given:
                setattr(settings, field.name, was[field.name])
    settings.vocab_size = settings.vocab_size or was["vocab_size"]
    if settings.budget != was["budget"]:
        resumed["chosen"].pop("max_iters", None)  # decided anew, or by max_iters
    settings.max_iters = resumed["chosen"].get("max_iters", settings.max_iters)
    if settings.budget and "max_iters" not in resumed["chosen"]:
        settings.max_iters = max(settings.max_iters, resumed["step"] + 1)
    now = asdict(settings)
    was["tokenizer"], now["tokenizer"] = resumed["tokenizer_sha256"][:12], data.meta["tokenizer_sha256"][:12]
    was["data"], now["data"] = (" ".join(sha[:12] for sha in shas) for shas in (
        resumed["data_sha256"], [data.meta[side]["sha256"] for side in ("train", "val")]))
    differ = [name for name in now if name not in MAY_CHANGE and now[name] != was.get(name)]
    if differ:
        begun, asked = (", ".join(f"{name}={side.get(name)}" for name in differ) for side in (was, now))
        raise UserError(f"{settings.out_dir} was begun with {begun}; now it is {asked}",
                        "repeat the command that began the run, or --out_dir=out/ANOTHER for a new one")
    if settings.max_iters < resumed["step"]:
        raise UserError(f"max_iters={settings.max_iters}, but {settings.out_dir} has {resumed['step']} updates already",
                        f"--max_iters={resumed['step']} or more")
    if settings.max_iters != was["max_iters"] and settings.decay_lr and not settings.lr_decay_iters:
        note(f"the learning rate now reaches its end at update {settings.max_iters}, not at {was['max_iters']}")
    changed = [f"{name} {resumed['versions'].get(name)} -> {here[name]}" for name in here
               if name != "commit" and here[name] != resumed["versions"].get(name)]
    if changed:
        warn(f"resumed elsewhere ({', '.join(changed)}): the run goes on, but not bit for bit as it would have")


def load_start(settings, given, data):
    """The checkpoint that init_from names; its shape becomes that of this run, where no other is asked for."""
    start = runtime.load_checkpoint(runtime.checkpoint_path(settings.init_from))
    if start["tokenizer_sha256"] != data.meta["tokenizer_sha256"]:
        raise UserError(f"{settings.init_from} was trained with another tokenizer ({start['tokenizer_sha256'][:12]}) "
                        f"than {data.folder} was written with ({data.meta['tokenizer_sha256'][:12]})",
                        f"python prepare.py YOUR_TEXT --out={data.folder} --tokenizer={settings.init_from}")
    for field in fields(GPTConfig):
        was, now = start["settings"][field.name], getattr(settings, field.name)
        if field.name in given and now != was and field.name != "dropout":
            raise UserError(f"{settings.init_from} has {field.name}={was}, but {field.name}={now} is asked for",
                            f"leave {field.name} out: the shape comes with the weights")
        if field.name not in given:
            setattr(settings, field.name, was)
    return start


if __name__ == "__main__":
    command_line(main)
