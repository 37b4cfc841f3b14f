# SPDX-License-Identifier: GPL-3.0-only
"""
Training: one loop, from the settings to a trained model.

    python train.py config/train_small.py                        # a GPT that writes Python, in minutes on a laptop
    python train.py config/train_small.py --dataset=notes --out_dir=out/notes
    python train.py config/train_small.py --budget=10m           # as many steps as fit into ten minutes
    torchrun --standalone --nproc_per_node=2 train.py config/train_small.py     # two processes share every step
    python train.py --help                                       # every setting with its meaning

The same command continues a run that was stopped (Ctrl-C saves first), and does nothing when the run is finished.
A run is a folder, out/NAME:

    ckpt_00000700.pt    weights, optimizer and settings after 700 steps; the last two are kept
    best.pt             the weights with the lowest validation loss: what sample.py reads
    log.jsonl           one line per logged step; loss.svg is its picture
    tokenizer/          a copy, so that a model never loses its vocabulary

Read `train`, which is the whole run, then `train_step`, which is one step.

On a CPU a run is a pure function of its settings, its seed and the machine: the batch of a step is computed from
(seed, step), see dataset.py, and so are the dropout masks. So a run that was killed at any moment and resumed has the
same bits as one that was never stopped (docs/reliability.md has the proofs). A GPU adds in varying order, so there the
two are equal up to rounding.
"""
import time

PROCESS_START = time.monotonic()  # before the imports, which take seconds that a --budget has to include

import math
import os
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from shlex import join, quote
from typing import Literal

import torch
from torch.nn import functional as F

import dataset as datasets
import tokenizer as tokenizers
from model import GPT, GPTConfig, PRESETS
from runtime import machine
from runtime.console import UserError, command_line, note, say, show, warn
from runtime.files import locked
from runtime.processes import Processes, StopSignal, Stopped
from runtime.settings import load
from training import checkpoint as ckpt
from training import lora, resume
from training.log import Log, progress_line
from training.muon import Muon

MAX_SKIPPED = 20  # steps in a row that float16 may overflow: the scaler needs some to find its factor


@dataclass
class TrainConfig(GPTConfig):
    preset: str = ""  # a shape by name, see PRESETS in model.py: gpt2, openllm-small, modern, ...; other settings win
    vocab_size: int = 0  # 0: as many as the tokenizer of the data has
    # data
    dataset: str = "stdlib"  # data/NAME, written by prepare.py
    batch_size: int = 12  # windows of a micro-batch; less where memory is short
    gradient_accumulation_steps: int = 1  # micro-batches of a step, of all processes together
    # the run
    out_dir: str = ""  # folder of the run; by default out/<dataset>
    init_from: str = "auto"  # auto: resume where there is a checkpoint; scratch; resume; or a RUN to take weights from
    max_iters: int = 2000  # steps of the optimizer
    budget: str = ""  # 90s, 5m or 1h: choose max_iters so that the whole command takes this long
    seed: int = 1337  # initial weights, order of the data and dropout
    eval_interval: int = 250  # steps between validations
    eval_iters: int = 0  # at most this many batches of the validation split; 0: all of it
    eval_only: bool = False  # print the validation loss of the last checkpoint and end
    save_interval: int = 0  # steps between checkpoints; 0: eval_interval
    always_save_checkpoint: bool = True  # save at every validation too, whatever save_interval is
    log_interval: int = 1  # steps between log lines
    # the optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, AdamW for the rest
    learning_rate: float = 6e-4  # of AdamW, at its highest; smaller models tolerate a higher one
    muon_lr: float = 0.02  # of Muon, at its highest
    min_lr: float = 6e-5  # where the cosine ends; a tenth of learning_rate, or 0
    warmup_iters: int = 100  # steps in which the rate rises from 0
    lr_decay_iters: int = 0  # step at which the cosine ends; 0: max_iters
    decay_lr: bool = True  # false: stay at learning_rate after the warm-up
    weight_decay: float = 0.1  # pull of matrices towards 0
    beta1: float = 0.9  # AdamW: averages the gradient over about 1 / (1 - beta1) steps
    beta2: float = 0.95  # AdamW: and its square over 1 / (1 - beta2)
    grad_clip: float = 1.0  # a longer gradient is scaled down to this norm; 0: no limit
    # fine-tuning, which is init_from=RUN and the same loop
    patience: int = 0  # end after so many validations in a row without a lower loss; 0: never before max_iters
    lora_rank: int = 0  # train a correction of this rank to every matrix, not the weights (training/lora.py); 8 or 16
    lora_alpha: float = 16.0  # how much the correction counts: it is multiplied by lora_alpha / lora_rank
    # the machine
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; weights stay float32
    compile: Literal["auto"] | bool = "auto"  # torch.compile: faster steps after some seconds of compiling
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # how processes communicate: nccl between GPUs, else gloo
    dist_timeout: int = 600  # seconds after which a process that does not answer is given up
    # logging elsewhere, as in nanoGPT; log.jsonl is always written
    wandb_log: bool = False  # also send the numbers to Weights & Biases, if its package is installed
    wandb_project: str = "owt"  # its project
    wandb_run_name: str = "gpt2"  # and its name for the run


def main(argv):
    """Read the settings, acquire what must be released in the end (signal handlers, the run's folder), and train."""
    settings, given, _ = load(TrainConfig, argv, presets=PRESETS, files=True)
    if not argv:
        note("these are the settings of GPT-2; python train.py config/train_small.py trains in minutes")
    settings.dataset = os.path.normpath(settings.dataset).removeprefix("data" + os.sep)
    settings.out_dir = os.path.normpath(settings.out_dir or os.path.join("out", os.path.basename(settings.dataset)))
    resume.check_settings(settings)
    ranks = Processes()
    writes = ranks.rank == 0 and not settings.eval_only  # only one process writes into the folder of the run
    with StopSignal() as stop, ckpt.RunFolder(settings.out_dir, writes) as folder:
        try:
            return train(settings, given, ranks, stop, folder)
        except (RuntimeError, MemoryError) as error:
            raise resume.explain(error, settings, ranks) or error from None


def train(settings, given, ranks, stop, folder):
    """The whole run, from top to bottom. Returns the exit code."""
    out_dir = settings.out_dir
    device = machine.choose_device(settings.device, ranks)
    machine.set_up(device, ranks)
    versions = machine.versions(device, ranks.world)

    # 1) The data. Rank 0 prepares what is built in, while the others wait to be joined.
    data_dir = os.path.join("data", settings.dataset)
    if settings.dataset == "stdlib" and ranks.rank == 0 and not os.path.exists(data_dir):
        prepare_stdlib(data_dir)
    ranks.join(device, settings.backend, settings.dist_timeout)
    data = datasets.Dataset.open(data_dir)
    tokenizer = data.check_tokenizer()
    if folder.writes:
        folder.check_ours()

    # 2) Where to start: at a checkpoint of this run, at the weights of another one, or at random weights.
    resumed = ckpt.find_checkpoint(settings.init_from, out_dir)
    start = base = at = None
    origin = "random weights"
    if resumed:
        resume.continue_run(resumed, settings, given, data, versions)
        if ended := resume.how_it_ended(resumed, settings):
            say(ended)
            say_next(out_dir, data)
            return 0
        at = resumed["step"]
        origin = f"{out_dir} after {at} steps"
        base = resumed.get("base")  # of a LoRA run: where the weights are that it corrects
        start = ckpt.read_base(resumed, out_dir) if base else None
    elif settings.init_from not in ("auto", "scratch"):
        origin = settings.init_from
        start = resume.load_start(settings, given, data)
        base = ckpt.name_base(settings.init_from, start) if settings.lora_rank else None
    resume.check_data(settings, data)
    chat = data.chat or bool((resumed or start or {}).get("chat"))  # does the model know a chat format?
    ranks.check_same(dict(asdict(settings), data=data.sha256(), step=at, torch=versions["torch"]))
    torch.manual_seed(settings.seed)  # the initial weights are the first thing sampled
    model = resume.build_model(settings)
    if start:
        ckpt.load_weights(model, start.pop("model"), settings.init_from)
    if settings.lora_rank:
        lora.add(model, settings.lora_rank, settings.lora_alpha)
    if resumed:
        ckpt.load_weights(model, resumed.pop("model"), out_dir)
    model.to(device).train()
    if folder.writes:
        size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        folder.open(at, needed=10 * size)  # three checkpoints of weights and two averages each, and best.pt

    # 3) The machine. What `auto` chooses is written into the run, and used again when it is resumed.
    if resumed:
        chosen = resumed["chosen"]
    else:
        if folder.writes:
            resume.check_begun(settings)
        dtype, why = machine.choose_dtype(settings.dtype, device)
        chosen = ranks.broadcast(dict(dtype=str(dtype).removeprefix("torch."), why=why, compile=settings.compile))
    facts = dict(format=1, order=data.ORDER, tokenizer_sha256=data.meta["tokenizer_sha256"], source=data.meta["source"],
                 data_sha256=data.sha256(), versions=versions, chosen=chosen, chat=chat, base=base,
                 before=resumed.get("before") if resumed else None)
    run = Run(settings, facts, data, tokenizer, model, device, ranks, stop, folder)
    if chosen["compile"] == "auto":
        chosen["compile"] = is_worth_compiling(run)
    say_plan(run)
    if start and not resumed and not settings.eval_only:
        before = facts["before"] = run.validate()
        before["text"] = sample(run, model)
        say(f"before: validation loss {before['val_loss']:.4f}, {before['val_bpb']:.4f} bits per byte")
    if chosen["compile"]:
        required = settings.compile is True
        chosen["compile"] = machine.compile_model(model, required, lambda: run.loss(model, *run.batch(0, 0)))
    if settings.eval_only:
        found = run.validate()
        say(f"validation loss {found['val_loss']:.4f}, {found['val_bpb']:.4f} bits per byte: {origin}")
        return 0

    # 4) The state in which the last checkpoint left the run, and its folder.
    if resumed:
        run.restore(resumed)
        say(f"resumed {out_dir} after {run.step} of {settings.max_iters} steps")
    if folder.writes:
        run.open_log(resumed)
    run.wrapped = ranks.wrap(model)

    # 5) The loop. Weights change in train_step and nowhere else, so at any other moment memory holds exactly the state
    #    after `step` steps: when a signal comes, half a step is thrown away and nothing is lost.
    stop.listen()
    over = False
    try:
        while True:
            # a) What is due after a step. A resumed run enters here: one that was killed between saving and
            #    validating validates now.
            if run.step > 0:
                over = validate_and_log(run)
            if over:
                break
            if settings.budget and "max_iters" not in chosen:
                choose_max_iters(run)
            # b) One step.
            train_step(run)
            # c) Save before validating, so that a crash there loses nothing.
            save_if_due(run)
    except datasets.Changed as error:
        raise save_after_change(run, error) from None
    except Stopped:
        if folder.writes and run.step > 0:
            run.save_all()
        ranks.barrier()  # for the first rank, which is saving: torchrun kills it as soon as another one leaves
        say(f"stopped by {signal.Signals(stop.signal).name} after {run.step} steps"
            + (f"; saved in {out_dir}. The same command continues." if run.step else "")
            + (" (Without --init_from=scratch.)" if settings.init_from == "scratch" else ""))
        return 128 + stop.signal

    # 6) The result.
    if run.wandb:
        run.wandb.finish()
    if folder.writes:
        say_result(run)
        say_next(out_dir, data)
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# The run and its step


@dataclass
class Run:
    """A run in progress: what its steps read, and what they change."""
    settings: TrainConfig
    facts: dict  # what every checkpoint says; facts["chosen"]: what was left to choose
    data: datasets.Dataset
    tokenizer: object
    model: GPT
    device: str
    ranks: Processes
    stop: StopSignal
    folder: ckpt.RunFolder
    # what changes
    step: int = 0  # finished steps
    row: dict | None = None  # the last step in numbers: its line in the log
    best_loss: float = math.inf
    skipped: int = 0  # the last so many steps have overflowed (float16)
    train_seconds: float = 0.0  # in steps alone, of all processes that have continued the run
    wall_before: float = 0.0  # in all, of the processes before this one
    times: list = field(default_factory=list)  # of the last ten steps, in seconds
    log: Log | None = None  # (of the process that writes)
    wandb: object = None

    def __post_init__(self):
        settings, world = self.settings, self.ranks.world
        self.wrapped = self.model
        self.optimizers = make_optimizers(self.model, settings, self.device)
        self.dtype = getattr(torch, self.facts["chosen"]["dtype"])
        self.autocast = machine.autocast(self.device, self.dtype)
        self.peak = self.ranks.broadcast(machine.measure_peak(self.device, self.dtype))
        # In float16 small gradients would round to 0, unless the loss is scaled up.
        self.scaler = torch.amp.GradScaler(torch.device(self.device).type, enabled=self.dtype == torch.float16)
        # However many processes there are, a step reads the same windows. The ranks take its micro-batches in turn;
        # where these are too few for all, they are cut into smaller ones.
        cut = resume.pieces(settings, world)
        self.batch_size = settings.batch_size // cut
        self.micros = settings.gradient_accumulation_steps * cut
        self.mine = range(self.ranks.rank, self.micros, world)  # the micro-batches of this rank
        self.val_batches = self.data.n_val_batches(settings.block_size, self.batch_size, settings.eval_iters * cut)
        self.step_tokens = self.micros * self.batch_size * settings.block_size

    def batch(self, step, micro):
        """(idx, targets) of a micro-batch, each (B, T)."""
        return self.data.batch(self.settings.block_size, self.batch_size, self.settings.seed, step, micro, self.micros)

    def loss(self, model, idx, targets):
        with self.autocast:
            return model(idx.to(self.device), targets.to(self.device))

    def epochs(self, steps):
        return self.data.epochs(steps * self.micros * self.batch_size, self.settings.block_size)

    def wall_seconds(self):
        return self.wall_before + time.monotonic() - PROCESS_START

    def check_stop(self):
        """Called before every micro-batch and validation batch, and never while weights change.

        All ranks call it equally often, so that a signal to one of them stops all at the same place.
        """
        if number := self.ranks.all_reduce_max(self.stop.signal):
            self.stop.signal = number
            say(f"\n{signal.Signals(number).name}: saving" + "; once more to stop at once" * self.stop.twice_ends)
            raise Stopped

    def validate(self):
        """One pass over the validation split, shared by all ranks: its loss, also in bits per byte."""
        settings = self.settings
        self.model.eval()
        with torch.no_grad():
            total, count = datasets.validation_sums(
                lambda *batch: self.loss(self.model, *batch),
                lambda number: self.data.val_batch(number, settings.block_size, self.batch_size),
                self.val_batches, self.ranks, lambda number: self.check_stop())
        self.model.train()
        return dict(val_loss=total / count, val_bpb=self.data.bits_per_byte(total / count))

    def header(self):
        """The first line of the log."""
        return dict(versions=self.facts["versions"], chosen=self.facts["chosen"], settings=asdict(self.settings),
                    data=self.data.meta)

    def open_log(self, resumed):
        """Begin or continue what is in the folder besides checkpoints."""
        out_dir, unlogged = self.settings.out_dir, ""
        if resumed:
            self.best_loss = ckpt.best_loss_of(out_dir)  # (best.pt may be newer than the checkpoint)
            unlogged = resumed.get("unlogged", "")
        # The log comes first: by it, the folder counts as that of a run.
        self.log = Log(os.path.join(out_dir, "log.jsonl"), self.header(), self.step, unlogged)
        tokenizers.keep(self.tokenizer, out_dir, self.facts["tokenizer_sha256"])
        self.wandb = start_wandb(self.settings) if self.settings.wandb_log else None

    def restore(self, resumed):
        """Take over the state of a checkpoint, but for the weights, which the model has already."""
        self.step, self.row = resumed["step"], resumed["row"]
        self.train_seconds = self.row["train_seconds"]
        self.wall_before = self.row["wall_seconds"]
        optimizers = [optimizer for optimizer, _ in self.optimizers]
        resume.load_optimizers(optimizers, self.scaler, resumed, self.settings.out_dir)

    def save_all(self, must=True):
        """Save all that the next step depends on."""
        optimizers = [optimizer.state_dict() for optimizer, _ in self.optimizers]
        if self.save(f"ckpt_{self.step:08d}.pt", must, row=self.row, unlogged=self.log.unwritten, optimizer=optimizers,
                     scaler=self.scaler.state_dict()):
            ckpt.prune_checkpoints(self.settings.out_dir)

    def save(self, name, must, **state):
        """Save the weights, and `state`; returns whether it went well. must: else, a full disk is only a warning."""
        state |= dict(self.facts, step=self.step, model=ckpt.learned(self.model), settings=asdict(self.settings))
        try:
            ckpt.save_checkpoint(os.path.join(self.settings.out_dir, name), state)
        except UserError as error:
            if must:
                raise
            warn(f"{error.fact}; going on, and trying again with the next checkpoint")
            return False
        return True


def train_step(run):
    """One step: the gradient of all micro-batches, and a move of the weights against it."""
    settings, ranks, scaler = run.settings, run.ranks, run.scaler
    started = time.perf_counter()

    # 1) The data. Every target counts the same, whichever micro-batch and rank it is in: how many are there?
    batches = [run.batch(run.step, micro) for micro in run.mine]
    counts = [int((targets >= 0).sum()) for _, targets in batches]
    total = ranks.all_reduce_sum([sum(counts)])[0]
    mean_count = max(1, total) / ranks.world  # (backward averages over the ranks)

    # 2) The gradient.
    loss = 0.0
    for micro, count, (idx, targets) in zip(run.mine, counts, batches):
        run.check_stop()
        torch.manual_seed(datasets.fold("dropout", settings.seed, run.step, micro))  # the same masks after a resume
        with ranks.no_sync(run.wrapped, unless=micro == run.mine[-1]):
            part = run.loss(run.wrapped, idx, targets) * (count / mean_count)
            scaler.scale(part).backward()  # adds to the gradients of the micro-batches before
        loss += part.item()
    loss = ranks.all_reduce_sum([loss])[0] / ranks.world
    for optimizer, _ in run.optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), settings.grad_clip or math.inf).item()

    # 3) Is it a number? If float16 has overflowed, the scaler halves its factor, and this step moves nothing.
    run.skipped = 0 if math.isfinite(norm) else run.skipped + 1
    if not math.isfinite(loss) or run.skipped > (MAX_SKIPPED if scaler.is_enabled() else 0):
        raise resume.not_finite(run, loss, norm)

    # 4) The move.
    factor = learning_rate_factor(run.step, settings)
    if not run.skipped:
        for optimizer, peak_rate in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak_rate * factor
            scaler.step(optimizer)
    scaler.update()
    for optimizer, _ in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    run.step += 1

    # Everything after this is bookkeeping.
    seconds = time.perf_counter() - started
    run.train_seconds += seconds
    run.times = run.times[-9:] + [seconds]
    run.row = dict(step=run.step, tokens=run.step * run.step_tokens, epoch=run.epochs(run.step),
                   train_seconds=run.train_seconds, wall_seconds=run.wall_seconds(), loss=loss,
                   lr=settings.learning_rate * factor,
                   grad_norm=-1.0 if run.skipped else norm,  # (JSON has no infinity)
                   tokens_per_second=run.step_tokens / seconds, memory=machine.peak_memory(run.device))


def learning_rate_factor(step, settings):
    """The share of the peak learning rate for this step: up in a line, down in half a cosine, then level."""
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


def validate_and_log(run):
    """After a step: validate if it is time, keep the best weights, write a line of the log. Returns: is the run over?
    """
    settings, row, writes = run.settings, run.row, run.folder.writes
    peak = run.peak * run.ranks.world
    last = run.step >= settings.max_iters
    if last or run.step % settings.eval_interval == 0:
        found = run.validate()
        loss = found["val_loss"]
        if not math.isfinite(loss):
            raise UserError(f"the validation loss after {run.step} steps is {loss}", resume.again(settings), code=3)
        if writes and loss < run.best_loss and run.save("best.pt", must=last, **found):
            run.best_loss = loss
        row |= found
        row["since_best"] = run.ranks.broadcast(run.log.since_best(loss) if writes else None)
    if writes and ("val_loss" in row or run.step % settings.log_interval == 0):
        row["wall_seconds"] = run.wall_seconds()
        run.log.write(row)
        say(progress_line(row, settings.max_iters, run.model.flops_per_token() / peak))
        if run.wandb:
            run.wandb.log(row, step=run.step)
    stuck = 0 < settings.patience <= row.get("since_best", 0)
    if stuck and not last:
        say(f"patience={settings.patience}: {row['since_best']} validations brought no lower loss than "
            f"{run.best_loss:.4f}")
        if writes:
            run.save_all()
    return last or stuck


def save_if_due(run):
    """After a step: save if it is time, or if a validation is next."""
    settings = run.settings
    last = run.step >= settings.max_iters
    saves = last or run.step % (settings.save_interval or settings.eval_interval) == 0
    validates = run.step % settings.eval_interval == 0
    if saves or validates:
        run.data.check_unchanged(any_process=lambda changed: run.ranks.all_reduce_max(int(changed)))
    if validates and not saves:  # the first time in any case: best.pt alone would look like a run that was copied
        saves = settings.always_save_checkpoint or not ckpt.checkpoints(settings.out_dir)
    if saves and run.folder.writes:
        run.save_all(must=last)


def save_after_change(run, error):
    """The data have changed since the last validation or checkpoint: save, and return the error that says so."""
    if run.step == 0:
        return error
    if run.folder.writes:
        run.save_all()
    if not error.alone:
        run.ranks.barrier()
    return UserError(f"{error.fact}; the run is saved after {run.step} steps, the last of which may have read other "
                     "text", "bring the old data back, and the same command continues", alone=error.alone)


def choose_max_iters(run):
    """--budget: when the time of a step is known, choose how many steps fit into the time that is left.

    The warm-up is not over then. During it the learning rate does not depend on max_iters, so this changes nothing
    that has been done.
    """
    settings = run.settings
    if not run.times or run.step < max(1, min(10, settings.warmup_iters)):
        return
    left = resume.seconds_of(settings.budget) - run.wall_seconds()
    left, step_seconds = run.ranks.broadcast((left, statistics.median(run.times)))
    validation = run.val_batches / run.micros * step_seconds / 3  # the forward pass alone is a third of the work
    left -= validation + 3  # the last validation, and the sample
    if left <= 0:
        raise UserError(f"budget={settings.budget} is too short: one validation and a sample need {-left:.0f} s more",
                        "a longer --budget, or a smaller model")
    steps = max(1, int(left / (step_seconds + validation / settings.eval_interval)))
    chosen = run.facts["chosen"]
    settings.max_iters = chosen["max_iters"] = run.step + steps
    if run.log:
        run.log.rewrite(run.header())
    say(f"budget: enough for {settings.max_iters:,} steps = {run.epochs(settings.max_iters):.1f} epochs; to repeat "
        f"this run without the clock: --max_iters={settings.max_iters} "
        f"--compile={str(chosen['compile']).lower()}")


# ----------------------------------------------------------------------------------------------------------------------
# Before the loop


def prepare_stdlib(folder):
    """Run `python prepare.py stdlib`, as a user would. If several runs need it at once, one does, and the others wait.
    """
    command = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "prepare.py"), "stdlib"]
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        with locked(f"{folder} for train.py", wait=True):
            with locked(folder, wait=True):  # somebody's prepare.py may be writing it
                missing = not os.path.exists(folder)
            if missing:
                say(f"{folder} is missing; preparing it: {join(command)}")
                run_command(command)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}", "run in a folder where you may write") from None


def run_command(command):
    """Run a command to its end. A signal that ends this process, such as Ctrl-C, ends the command too."""
    with StopSignal() as stop:
        stop.listen()
        process = subprocess.Popen(command)
        while process.poll() is None and not stop.signal:
            time.sleep(0.05)
        if stop.signal:
            process.send_signal(stop.signal)
            process.wait()
            raise SystemExit(128 + stop.signal)
    if process.returncode:
        raise UserError(f"{join(command)} failed with exit code {process.returncode}", "see its own error above")


def make_optimizers(model, settings, device):
    """[(optimizer, its peak learning rate)]. Weight decay pulls at matrices only, not at biases and norms.

    muon: for the matrices inside the blocks. AdamW keeps the vectors, and the embeddings, whose rows are learned one
    by one.
    """
    inside, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            group = matrices if p.dim() == 2 else vectors
            if settings.optimizer == "muon" and p.dim() == 2 and ".h." in name:
                group = inside
            group.append(p)
    groups = [dict(params=matrices, weight_decay=settings.weight_decay), dict(params=vectors, weight_decay=0.0)]
    betas = settings.beta1, settings.beta2
    adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=not device.startswith("mps"))
    optimizers = [(adamw, settings.learning_rate)]
    if inside:
        dtype = torch.bfloat16 if machine.has_bf16(device) else torch.float32
        muon = Muon(inside, settings.muon_lr, settings.weight_decay, dtype=dtype)
        optimizers.append((muon, settings.muon_lr))
    return optimizers


def is_worth_compiling(run):
    """Compiling takes half a minute. Then code reaches 60% of the peak and not 45%, which pays after two minutes."""
    flops = run.settings.max_iters * run.step_tokens * run.model.flops_per_token()
    seconds = flops / (0.45 * run.peak * run.ranks.world)
    if run.settings.budget:
        seconds = resume.seconds_of(run.settings.budget)
    return run.device != "mps" and seconds > 120


def start_wandb(settings):
    try:
        import wandb
        return wandb.init(project=settings.wandb_project, name=settings.wandb_run_name, config=asdict(settings))
    except ImportError:
        note("wandb is not installed; log.jsonl in the run folder has the same numbers")


# ----------------------------------------------------------------------------------------------------------------------
# What a run prints


def say_plan(run):
    """What is about to be trained, on what, and with what."""
    settings, meta, chosen, world = run.settings, run.data.meta, run.facts["chosen"], run.ranks.world
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    weights = run.model.n_params() - trained * bool(settings.lora_rank)
    kind = "text,"
    if run.data.chat:
        kind = f"conversations, {meta['train']['trained']:,} tokens to learn in"
    say(f"data: {run.data.folder}, {kind} {meta['train']['tokens']:,} tokens of {', '.join(meta['source'])}")
    say(f"model: {weights:,} parameters: {settings.n_layer} layers, {run.model.config.n_embd} wide, context "
        f"{settings.block_size}, vocabulary {settings.vocab_size:,}")
    say(f"machine: {run.device}, {torch.get_num_threads()} threads, {chosen['dtype']} ({chosen['why']}), at most "
        f"{run.peak / 1e9:,.0f} GFLOP/s")
    shared = f", {len(run.mine)} for each of {world} processes" if world > 1 else ""
    length = f"{settings.max_iters:,} steps = {run.epochs(settings.max_iters):.1f} epochs"
    say(f"step: {run.step_tokens:,} tokens = {run.micros} micro-batches of {run.batch_size} x {settings.block_size}"
        f"{shared}; {settings.budget or length}")
    resume.say_memory(run)


def say_result(run):
    """How good the model is, what it writes, and what may be wrong with it."""
    settings, row, before = run.settings, run.row, run.facts["before"]
    # Losses can be compared on the same text only, and each version of Python has its own.
    corpus = next((f" ({source})" for source in run.data.meta["source"] if source.startswith("stdlib")), "")
    say(f"\nfinished: {run.step} steps = {run.epochs(run.step):.1f} epochs in {run.train_seconds:.0f} s of training, "
        f"{run.wall_seconds():.0f} s in all, {row['memory'] / 1e6:,.0f} MB at most; validation loss "
        f"{row['val_loss']:.4f}, {row['val_bpb']:.4f} bits per byte{corpus}")
    model, _, best = ckpt.load_run(settings.out_dir, device=run.device)
    best = dict(val_loss=row["val_loss"], val_bpb=row["val_bpb"]) | best
    say(f"{best['path']}: validation loss {best['val_loss']:.4f} after {best['step']} steps; this is what sample.py "
        "reads, and what writes here:\n")
    if before:
        say(f"--- before: {before['val_bpb']:.4f} bits per byte ---\n{before['text']}\n"
            f"--- after: {best['val_bpb']:.4f} bits per byte, {best['val_bpb'] / before['val_bpb'] - 1:+.1%} ---")
    show(sample(run, model, fresh=before is None))
    if before and best["val_loss"] >= before["val_loss"]:
        warn("nothing was gained, the held-out text was easier for it before: a lower --learning_rate, or more text")
    guessing = math.log(settings.vocab_size)  # the loss where every token is equally likely
    if row["val_loss"] > guessing + 0.5:  # (random weights, too, are a little worse than guessing)
        warn(f"the run has diverged: its validation loss of {row['val_loss']:,.2f} is worse than guessing, which costs "
             f"{guessing:.2f}; {resume.again(settings)}")


def sample(run, model, fresh=False):
    """What the model writes: an answer to the first validation question; how the validation text goes on after its
    first words; or, fresh, what comes after nothing but the end-of-text token."""
    def pick(logits):
        return torch.multinomial(F.softmax(logits / 0.8, dim=-1), 1)[:, 0]

    data, tokenizer, ids = run.data, run.tokenizer, []
    prompt, ends = data.prompt(model.config.block_size, nothing=fresh), tokenizers.ends(tokenizer)
    torch.manual_seed(0)
    model.eval()
    with run.autocast:
        for token in model.generate(torch.tensor([prompt], device=run.device), 200 if fresh else 100, pick):
            if token.item() in ends:
                break
            ids.append(token.item())
    model.train()
    return tokenizer.decode(prompt) + " -> " * data.chat + tokenizer.decode(ids)


def say_next(out_dir, data):
    prompt = ""
    if data.chat:
        prompt = " --chat"
    elif any(source.startswith("stdlib") for source in data.meta["source"]):
        prompt = " --prompt='def'"
    say(f"\nnext: python sample.py {quote(out_dir)}{prompt}\n      python sample.py --help")


if __name__ == "__main__":
    command_line(main)
