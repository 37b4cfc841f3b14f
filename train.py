# SPDX-License-Identifier: GPL-3.0-only
"""
Training: one loop, from the settings to a trained model.

    python train.py config/train_small.py                        # a GPT that writes Python, in minutes on a laptop
    python train.py config/train_small.py --dataset=notes --out_dir=out/notes
    python train.py config/train_small.py --budget=10m           # as many steps as fit in ten minutes
    torchrun --standalone --nproc_per_node=2 train.py config/train_small.py     # two processes share every step

Run the same command again to resume a stopped run (Ctrl-C saves first). A run
is a folder, out/NAME:

    ckpt_00000700.pt    weights, optimizer and settings after 700 steps; the two newest are kept
    best.pt             the weights with the lowest validation loss: what sample.py reads
    log.jsonl           one line per logged step; loss.svg is its picture
    tokenizer/          a copy

Read `main`, then `train` (the whole run) and `train_step` (one step).

Each step's batch and dropout masks depend only on (seed, step). So a CPU run that is
killed at any moment and resumed ends with the same weights, bit for bit, as one that
never stopped (proofs in docs/reliability.md). A GPU adds in varying order, so there the
two agree up to rounding.
"""
import time

PROCESS_START = time.monotonic()  # a --budget includes the seconds of the imports

import math
import os
import signal
import statistics
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from typing import Literal

# (First, so that an interrupted or failing import is no traceback.)
from runtime.console import Progress, UserError, command_line, counted, duration, note, say, show, warn
import torch
from torch.nn import functional as F

import dataset as datasets
import tokenizer as tokenizers
from model import GPT, GPTConfig, PRESETS
from runtime import machine
from runtime.processes import Processes, StopSignal, Stopped
from runtime.settings import load, or_else
from training import checkpoint as ckpt
from training import lora, memory, resume
from training.log import Log, progress_line
from training.muon import Muon

SAMPLE_SECONDS = 3  # for the text at the end of a run
REFRESH_SECONDS = 2  # between two lines of the log, a line moves on a terminal
LONG_SECONDS = 2 * 86400  # a run that takes longer is begun only after a question
MAX_SKIPPED = 20  # at most this many steps in a row may be skipped because float16 overflowed


@dataclass
class TrainConfig(GPTConfig):
    # the model; GPTConfig, in model.py, has the rest of its settings
    preset: str = ""  # a model from PRESETS in model.py: gpt2, openllm-small, modern, ...; other settings override it
    vocab_size: Literal["auto"] | int = "auto"  # auto: the size of the data's tokenizer
    # data
    dataset: str = "stdlib"  # data/NAME, written by prepare.py
    batch_size: int = 12  # windows per micro-batch; use fewer if memory is short
    gradient_accumulation_steps: int = 1  # micro-batches per step, over all processes
    # the run
    out_dir: str = ""  # folder of the run; by default out/<dataset>
    init_from: str = "auto"  # auto: resume if there is a checkpoint; scratch; resume; or a RUN to take weights from
    max_iters: int = 2000  # steps of the optimizer
    budget: str = ""  # 90s, 5m or 1h: choose max_iters so that the whole command takes this long
    seed: int = 1337  # initial weights, order of the data and dropout
    eval_interval: int = 250  # steps between validations
    eval_iters: Literal["all"] | int = "all"  # at most this many batches of the validation split
    eval_only: bool = False  # print the last checkpoint's validation loss and exit
    save_interval: Literal["auto"] | int = "auto"  # steps between checkpoints; auto: eval_interval
    always_save_checkpoint: bool = True  # save at every validation too, whatever save_interval is
    log_interval: int = 1  # steps between log lines
    # the optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the blocks' matrices, AdamW for the rest
    learning_rate: float = 6e-4  # AdamW's peak learning rate; smaller models tolerate more
    muon_lr: float = 0.02  # Muon's peak learning rate
    min_lr: float = 6e-5  # final rate, often a tenth of the peak or 0; muon_lr falls in proportion
    warmup_iters: int = 100  # steps in which the rate rises from 0
    lr_decay_iters: Literal["auto"] | int = "auto"  # step at which the cosine ends; auto: max_iters
    decay_lr: bool = True  # false: stay at learning_rate from the first step, without a warm-up
    weight_decay: float = 0.1  # how strongly matrices are pulled towards 0
    beta1: float = 0.9  # AdamW: averages the gradient over about 1 / (1 - beta1) steps
    beta2: float = 0.95  # AdamW: the same for the squared gradient
    grad_clip: Literal["none"] | float = 1.0  # scale down gradients whose norm exceeds this
    # fine-tuning: the same loop, with init_from=RUN
    patience: Literal["none"] | int = "none"  # stop after this many validations with no lower loss
    lora_rank: int = 0  # train corrections of this rank (8, say) instead of the weights (training/lora.py)
    lora_alpha: float = 16.0  # the corrections are multiplied by lora_alpha / lora_rank
    # the machine
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; weights stay float32
    compile: Literal["auto"] | bool = "auto"  # torch.compile: faster steps after some seconds of compiling
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # how processes communicate: nccl between GPUs, else gloo
    dist_timeout: int = 600  # seconds without an answer before a process counts as lost
    # Weights & Biases, as in nanoGPT, besides log.jsonl
    wandb_log: bool = False  # if its package is installed
    wandb_project: str = "owt"
    wandb_run_name: str = "gpt2"


def main(argv):
    """Read the settings, and train."""
    # 1) Settings: the defaults above, then config files and --name=value from
    #    left to right. given: {name: the file, preset or --option that set
    #    it}, for those that are not a default.
    settings, given, _ = load(TrainConfig, argv, presets=PRESETS, files=True)
    if not argv:
        note("the defaults are GPT-2's; for a run of minutes: python train.py config/train_small.py")
    resume.note_defaults(settings, given)
    # 2) `data/notes` and `notes` are the same data; without an out_dir, the
    #    run is named after its data.
    settings.dataset = os.path.normpath(settings.dataset).removeprefix("data" + os.sep)
    default = os.path.join("out", os.path.basename(settings.dataset))
    settings.out_dir = os.path.normpath(settings.out_dir or default)
    resume.check_settings(settings)  # (changes nothing; raises UserError if they are impossible)
    # 3) One process writes; torchrun starts the others with another rank. (`train`
    #    locks the folder; this unlocks it.)
    ranks = Processes()
    writes = ranks.rank == 0 and not settings.eval_only
    with ckpt.RunFolder(settings.out_dir, writes) as folder:
        try:
            # 4) An allocation that failed, or a process that was lost, is
            #    explained; anything else is a bug.
            return train(settings, given, ranks, folder)
        except (RuntimeError, MemoryError) as error:
            explained = resume.explain(error, settings, ranks)
            raise explained or error from None


def train(settings, given, ranks, folder):
    """The whole run. Returns the exit code."""
    # 1) The machine.
    device = machine.choose_device(settings.device, ranks)
    machine.set_up(device, ranks)
    versions = machine.versions(device, ranks.world)

    # 2) The data. If the built-in set is missing, rank 0 prepares it, while the
    #    others wait in `join`.
    data_dir = os.path.join("data", settings.dataset)
    if settings.dataset == "stdlib" and ranks.rank == 0 and not os.path.exists(data_dir):
        prepare_stdlib()
    ranks.join(device, settings.backend, settings.dist_timeout)
    # (A config file may put the time into it.)
    out_dir = settings.out_dir = ranks.broadcast(settings.out_dir)
    data = datasets.Dataset.open(data_dir)
    tokenizer = data.load_tokenizer()
    if folder.writes:
        folder.claim()

    # 3) The start. resumed: a checkpoint of this run; parent: one of another
    #    run, whose weights are taken; base: of LoRA, the path and checksum of
    #    the parent. Each may be None; a resumed LoRA run has all three. The
    #    shape of the model is set in `settings` here; after this, they do not
    #    change.
    resumed, parent, base = resume.find_start(settings, given, data, versions)
    if resumed and (ended := resume.how_it_ended(resumed, settings)):
        say(ended)
        say_next(out_dir, data)
        return 0
    if not resumed and folder.writes:
        # A log without a checkpoint may only be replaced by the same run.
        resume.check_log(settings)
    step = resumed["step"] if resumed else None
    same = dict(data=data.sha256(), step=step, torch=versions["torch"])
    ranks.check_same(resume.settings_of_result(settings) | same)
    model = make_model(settings, parent, resumed, tokenizer if data.chat else None)
    model = model.to(device).train()
    if folder.writes:
        size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        # Checkpoints that cannot be read are set aside. Is there enough space
        # on the disk? For 3 (the third is written before the oldest goes) of
        # weights and 2 moments each, and best.pt.
        folder.make_ready(step, needed=10 * size)

    # 4) The run. What `auto` chooses is written into every checkpoint, and
    #    used again on resume.
    if resumed:
        chosen = resumed["chosen"]
    else:
        dtype, why = machine.choose_dtype(settings.dtype, device)
        chosen = dict(dtype=str(dtype).removeprefix("torch."), why=why, compile=settings.compile)
        chosen = ranks.broadcast(chosen)
    chat = data.chat or bool((resumed or parent or {}).get("chat"))  # does the model know a chat format?
    # Of fine-tuning: the loss and a text before its first step (set below).
    before = resumed.get("before") if resumed else None
    facts = dict(format=1, order=data.ORDER, source=data.meta["source"], data_sha256=data.sha256(),
                 tokenizer_sha256=data.meta["tokenizer_sha256"], versions=versions, chosen=chosen,
                 chat=chat, base=base, before=before)
    run = Run(settings, facts, data, tokenizer, model, device, ranks, folder)
    if chosen["compile"] == "auto":
        chosen["compile"] = is_worth_compiling(run)
    say_plan(run)
    if not resumed and not settings.eval_only:
        ask_if_long(run)
    if resumed:
        run.restore(resumed)
    # Fine-tuning shows what it has changed: the loss before the first step,
    # and a text.
    if settings.eval_only or (parent and not resumed):
        found = run.validate()
        say(f"validation loss {found['val_loss']:.4f}, {found['val_bpb']:.4f} bits per byte")
        if settings.eval_only:
            return 0
        facts["before"] = dict(found, text=sample(run, model))
    # Compiling comes after that: the shapes of a sample would be compiled one
    # by one.
    if chosen["compile"]:
        required = settings.compile is True
        chosen["compile"] = machine.compile_model(
            model, required, lambda: run.loss(model, *run.batch(0, 0)))
    # After a resume, a --budget can become steps at once: the time of a step
    # is in the checkpoint, and that of compiling has just been spent.
    if resumed:
        choose_max_iters(run)
    if folder.writes:
        run.open_outputs(resumed)
    run.wrapped = ranks.wrap(model)

    # 5) The loop. Weights change at the end of train_step and nowhere else:
    #    when a signal comes, the unfinished step is discarded, and memory
    #    holds exactly the state after `step` steps.
    run.stop.listen()
    try:
        if resumed:
            # A kill may have come between saving a step and validating it.
            # (The log has dropped the line of this step, if it had one.)
            validate_and_log(run)
        while not run.over():
            train_step(run)
            choose_max_iters(run)
            save_if_due(run)  # before validating, where a crash would lose the step
            validate_and_log(run)
    except (datasets.Changed, Stopped) as reason:
        return interrupted(run, reason)

    # 6) The result.
    if folder.writes:
        run.log.close()
        say_result(run)
        say_next(out_dir, data)
    return 0


# ---------- The run and its step


@dataclass
class Run:
    """A run in progress: what its steps read, and what they change."""
    settings: TrainConfig
    facts: dict  # what every checkpoint says; facts["chosen"]: what `auto` chose
    data: datasets.Dataset
    tokenizer: object
    model: GPT
    device: str
    ranks: Processes
    folder: ckpt.RunFolder
    stop: StopSignal = field(default_factory=StopSignal)
    # what changes
    step: int = 0  # finished steps
    max_iters: float = math.inf  # the last step; infinity until --budget has chosen it
    row: dict | None = None  # the last step in numbers: its line in the log
    best_loss: float = math.inf  # of best.pt
    best_step: int = 0
    stuck: bool = False  # the patience has run out
    shown: float = 0.0  # time.monotonic() when a line was shown last
    skipped: int = 0  # how many steps in a row have overflowed (float16)
    train_seconds: float = 0.0  # in steps alone
    wall_before: float = 0.0  # before the last resume
    times: list = field(default_factory=list)  # of the last ten steps, in seconds
    validation_seconds: float = 0.0  # of the last validation
    log: Log | None = None  # of rank 0

    def __post_init__(self):
        # 1) Length, optimizers, dtype.
        settings, world, chosen = self.settings, self.ranks.world, self.facts["chosen"]
        self.max_iters = resume.total_steps(settings.budget, settings.max_iters, chosen)
        self.wrapped = self.model  # or DistributedDataParallel around it
        self.optimizers = make_optimizers(self.model, settings, self.device)
        self.dtype = getattr(torch, chosen["dtype"])
        self.autocast = machine.autocast(self.device, self.dtype)
        # FLOP/s of matrix products.
        self.peak = self.ranks.broadcast(machine.measure_peak(self.device, self.dtype))
        # In float16, small gradients would round to 0 if the loss were not
        # scaled up.
        kind, needed = torch.device(self.device).type, self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(kind, enabled=needed)
        # 2) A step reads the same windows on any number of ranks. Ranks take
        #    turns with the micro-batches; if these do not divide evenly, each
        #    is cut into pieces, so that all ranks have equally many.
        pieces = resume.pieces(settings, world)
        self.batch_size = settings.batch_size // pieces
        self.micros = settings.gradient_accumulation_steps * pieces
        self.my_micros = range(self.ranks.rank, self.micros, world)  # of this rank
        # `or_else` gives 0 for the word "all", and n_val_batches takes 0 for
        # all.
        most = or_else(settings.eval_iters, 0) * pieces
        self.val_batches = self.data.n_val_batches(settings.block_size, self.batch_size, most)
        self.step_tokens = self.micros * self.batch_size * settings.block_size

    def last(self):
        return self.step >= self.max_iters

    def over(self):
        return self.last() or self.stuck

    def validation_due(self):
        return self.last() or self.step % self.settings.eval_interval == 0

    def batch(self, step, micro):
        """(idx, targets) of a micro-batch, each (B, T)."""
        settings = self.settings
        return self.data.batch(
            settings.block_size, self.batch_size, settings.seed, step, micro, self.micros)

    def loss(self, model, idx, targets):
        with self.autocast:
            return model(idx.to(self.device), targets.to(self.device))

    def epochs(self, steps):
        return self.data.epochs(steps * self.micros * self.batch_size, self.settings.block_size)

    def wall_seconds(self):
        return self.wall_before + time.monotonic() - PROCESS_START

    def seconds_left(self):
        """Until the end: the steps, at the pace of the last ones, and the validations."""
        steps = self.max_iters - self.step
        validations = steps / self.settings.eval_interval
        return steps * statistics.median(self.times) + validations * self.validation_seconds

    def check_stop(self):
        """Before each micro-batch and validation batch: raise Stopped in all ranks if one got a signal."""
        if received := self.ranks.all_reduce_max(self.stop.signal):
            self.stop.signal = received
            # (Under torchrun a second signal ends nothing: it sends each
            # Ctrl-C twice.)
            again = "; repeat to stop at once" if self.stop.second_ends else ""
            say(f"\n{signal.Signals(received).name}: saving{again}")
            raise Stopped

    def validate(self):
        """One pass over the validation split: its loss, also in bits per byte."""
        def batch(i):
            return self.data.val_batch(i, self.settings.block_size, self.batch_size)

        def before_each(i):
            self.check_stop()
            progress.tell(i)

        started = time.perf_counter()
        progress = Progress("validating", self.val_batches, unit="batches")
        self.model.eval()
        with torch.no_grad():
            nats, count = datasets.validation_sums(
                lambda idx, targets: self.loss(self.model, idx, targets), batch, self.val_batches,
                self.ranks, before_each)
        self.model.train()
        self.validation_seconds = time.perf_counter() - started
        return dict(val_loss=nats / count, val_bpb=self.data.bits_per_byte(nats / count))

    def settings_to_write(self):
        """The settings, with the number of steps that a --budget has chosen."""
        settings = asdict(self.settings)
        if self.max_iters < math.inf:
            settings["max_iters"] = self.max_iters
        return settings

    def header(self):
        """The first line of the log."""
        return dict(versions=self.facts["versions"], chosen=self.facts["chosen"],
                    settings=self.settings_to_write(), data=self.data.meta)

    def open_outputs(self, resumed):
        """Begin or continue what is in the folder besides checkpoints."""
        settings, out_dir = self.settings, self.settings.out_dir
        if resumed:
            # best.pt may be newer than the checkpoint.
            self.best_loss, self.best_step = ckpt.best_of(out_dir)
        # The log comes first: it marks the folder as that of a run.
        self.log = Log(os.path.join(out_dir, "log.jsonl"), self.header(), self.step)
        tokenizers.keep(self.tokenizer, out_dir, self.facts["tokenizer_sha256"])
        if settings.wandb_log:
            self.log.mirror(settings.wandb_project, settings.wandb_run_name, asdict(settings))

    def restore(self, resumed):
        """Take over the state of a checkpoint, but for the weights."""
        self.step, self.row = resumed["step"], resumed["row"]
        self.train_seconds = self.row["train_seconds"]
        self.wall_before = self.row["wall_seconds"]
        self.times = [self.train_seconds / self.step]
        end = f" of {self.max_iters}" if self.max_iters < math.inf else ""
        say(f"resumed {self.settings.out_dir} after {self.step}{end} steps")
        optimizers = [optimizer for optimizer, _ in self.optimizers]
        resume.load_optimizers(optimizers, self.scaler, resumed, self.settings.out_dir)

    def record(self, loss, norm, lr, seconds):
        """The step that was just made, as a row of the log."""
        self.train_seconds += seconds
        self.times = self.times[-9:] + [seconds]
        self.row = dict(
            step=self.step, tokens=self.step * self.step_tokens, epoch=self.epochs(self.step),
            train_seconds=self.train_seconds, wall_seconds=self.wall_seconds(), loss=loss, lr=lr,
            grad_norm=-1.0 if self.skipped else norm,  # JSON has no infinity
            tokens_per_second=self.step_tokens / seconds, memory=machine.peak_memory(self.device))

    def save_all(self, must=True):
        """Save what a resume needs."""
        optimizers = [optimizer.state_dict() for optimizer, _ in self.optimizers]
        name = f"ckpt_{self.step:08d}.pt"
        saved = self.save(name, must, row=self.row, optimizer=optimizers,
                          scaler=self.scaler.state_dict())
        if saved:
            ckpt.prune_checkpoints(self.settings.out_dir)

    def save(self, name, must, **state):
        """Save the weights and `state`. Returns whether it went well.

        must: a failure is an error, not a warning.
        """
        state |= dict(self.facts, step=self.step, model=ckpt.trained_weights(self.model),
                      settings=self.settings_to_write())
        try:
            ckpt.save_checkpoint(os.path.join(self.settings.out_dir, name), state)
        except UserError as error:
            if must:
                raise
            warn(f"{error.fact}; will retry at the next checkpoint")
            return False
        return True


def train_step(run):
    """The gradient of a batch, and a move of the weights against it."""
    settings, scaler = run.settings, run.scaler
    started = time.perf_counter()

    # 1) The gradient. Now and then a batch has a huge one; scaled down, it
    #    cannot ruin the weights.
    loss = accumulate_gradient(run)
    for optimizer, _ in run.optimizers:
        scaler.unscale_(optimizer)
    longest = or_else(settings.grad_clip, math.inf)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), longest).item()

    # 2) Is it a number? Where float16 has overflowed, the scaler halves its
    #    factor, and no weight moves.
    run.skipped = 0 if math.isfinite(norm) else run.skipped + 1
    allowed = MAX_SKIPPED if scaler.is_enabled() else 0
    if not math.isfinite(loss) or run.skipped > allowed:
        raise resume.not_finite(run, loss, norm)

    # 3) The weights move. All optimizers follow one schedule, each with its
    #    own peak.
    factor = learning_rate_factor(run.step, settings, run.max_iters)
    for optimizer, peak_rate in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * factor
        # (The scaler would skip only the optimizer whose gradients overflowed.)
        if not run.skipped:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)  # frees the memory, and saves a pass over it
    scaler.update()
    run.step += 1

    # 4) The step in numbers.
    run.record(loss, norm, settings.learning_rate * factor, time.perf_counter() - started)


def accumulate_gradient(run):
    """Add up the gradients of all micro-batches, in p.grad. Returns the loss of the step.

    A sum over micro-batches is what one large batch would give, and takes the
    memory of a small one.
    """
    # 1) The data. Every target counts the same, whichever micro-batch and
    #    rank it is in.
    ranks = run.ranks
    batches = [run.batch(run.step, micro) for micro in run.my_micros]
    counts = [int((targets >= 0).sum()) for _, targets in batches]
    total = max(1, ranks.all_reduce_sum([sum(counts)])[0])

    # 2) Forward and backward.
    loss = 0.0
    for micro, count, (idx, targets) in zip(run.my_micros, counts, batches):
        run.check_stop()
        # The same dropout masks after a resume.
        torch.manual_seed(datasets.seed_for("dropout", run.settings.seed, run.step, micro))
        # Ranks exchange gradients once, with the last micro-batch. They get
        # the mean where a sum is due, hence the factor `world`.
        with ranks.no_sync(run.wrapped, unless=micro == run.my_micros[-1]):
            part = run.loss(run.wrapped, idx, targets) * (ranks.world * count / total)
            run.scaler.scale(part).backward()
        loss += part.item()
    return ranks.all_reduce_sum([loss])[0] / ranks.world  # without that factor


def learning_rate_factor(step, settings, max_iters):
    """The share of the peak learning rate: up in a line, down in half a cosine, then constant."""
    if not settings.decay_lr:
        return 1.0
    # 1) Up: the first gradients, of random weights, are large and erratic.
    if step < settings.warmup_iters:
        return (step + 1) / (settings.warmup_iters + 1)
    # 2) Down: smaller and smaller steps settle into a minimum (arXiv
    #    1608.03983).
    lowest = settings.min_lr / settings.learning_rate
    end = or_else(settings.lr_decay_iters, max_iters)
    if step >= end:
        return lowest
    progress = (step - settings.warmup_iters) / (end - settings.warmup_iters)  # from 0 to 1
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def choose_max_iters(run):
    """--budget: how many steps fit into the time left, once the time of a step is known.

    It is known after at most ten steps, in the warm-up if there is one, while
    the learning rate does not depend on max_iters.
    """
    settings, chosen = run.settings, run.facts["chosen"]
    if run.max_iters < math.inf or run.step < max(1, min(10, settings.warmup_iters)):
        return
    # 1) The time, without the last validation and the sample. A forward pass
    #    is a third of a step.
    left = resume.seconds_of(settings.budget) - run.wall_seconds()
    left, step_seconds = run.ranks.broadcast((left, statistics.median(run.times)))
    validation = run.val_batches / run.micros * step_seconds / 3
    left -= validation + SAMPLE_SECONDS
    if left <= 0:
        raise UserError(
            f"budget={settings.budget} is {-left:.0f} s too short for one validation and a sample",
            "a longer --budget, or a smaller model")
    # 2) The steps, each with its share of the validations.
    steps = max(1, int(left / (step_seconds + validation / settings.eval_interval)))
    run.max_iters = run.step + steps
    chosen["max_iters"] = run.max_iters
    if run.log:
        run.log.rewrite(run.header())
    say(f"budget: enough for {run.epochs(run.max_iters):.1f} epochs; to repeat this run without a budget: "
        f"--max_iters={run.max_iters} --compile={str(chosen['compile']).lower()}")


def save_if_due(run):
    """Save if it is time, or if a validation is next."""
    settings = run.settings
    # 1) When.
    saves = run.last() or run.step % or_else(settings.save_interval, settings.eval_interval) == 0
    # 2) Are the files of the data still those that were opened?
    if saves or run.validation_due():
        run.data.check_unchanged(run.ranks)
    # 3) Before a validation too, with always_save_checkpoint; without it only
    #    while there is no checkpoint yet, since a run cannot be continued
    #    from best.pt alone.
    if run.validation_due() and not saves:
        saves = settings.always_save_checkpoint or not ckpt.checkpoints(settings.out_dir)
    if saves and run.folder.writes:
        run.save_all(must=run.last())


def validate_and_log(run):
    """Validate if it is time, keep the best weights, and write the line of the step."""
    settings, row, writes = run.settings, run.row, run.folder.writes
    # 1) The validation loss.
    if run.validation_due():
        row |= run.validate()
        loss = row["val_loss"]
        if not math.isfinite(loss):
            raise UserError(f"the validation loss after {run.step} steps is {loss}",
                            resume.again(settings), code=3)
        # best.pt is saved only beside a checkpoint: a run cannot be continued
        # from best.pt alone.
        if writes and loss < run.best_loss and ckpt.checkpoints(settings.out_dir):
            if run.save("best.pt", must=run.last(), val_loss=loss, val_bpb=row["val_bpb"]):
                run.best_loss, run.best_step = loss, run.step
        run.stuck = run.ranks.broadcast(resume.is_stuck(settings, run.step - run.best_step))
    # 2) The line.
    if writes and ("val_loss" in row or run.step % settings.log_interval == 0):
        row["wall_seconds"] = run.wall_seconds()
        run.log.write(row)
        # The FLOP/s of one token per second, as a share of the machine's peak:
        # progress_line multiplies it by the tokens per second. (Beside other
        # programs the peak was measured too low.)
        flops = run.model.flops_per_token() / run.ranks.world
        run.peak = max(run.peak, row["tokens_per_second"] * flops)
        share = flops / run.peak
        say(progress_line(row, run.max_iters, share, run.seconds_left()))
        run.shown = time.monotonic()
    elif writes and sys.stderr.isatty() and time.monotonic() > run.shown + REFRESH_SECONDS:
        say(f"step {run.step}, loss {row['loss']:.3f}", end="\r")
        run.shown = time.monotonic()
    # 3) The end before max_iters.
    if run.stuck and not run.last():
        say(f"stopping early (patience={settings.patience}): lowest loss {run.best_loss:.4f}")
        if writes:
            run.save_all()


def interrupted(run, reason):
    """Save what was learned. Returns the exit code of a signal; raises UserError for changed data."""
    if run.folder.writes and run.step > 0:
        run.save_all()
    # A signal: Ctrl-C, or a machine that is wanted for something else.
    if isinstance(reason, Stopped):
        # torchrun kills rank 0, which is saving, as soon as another one leaves.
        run.ranks.barrier()
        saved = f"; saved in {run.settings.out_dir}. Rerun to resume." if run.step else ""
        say(f"stopped by {signal.Signals(run.stop.signal).name} after {run.step} steps{saved}")
        return 128 + run.stop.signal
    # Somebody has prepared the data anew.
    if run.step == 0:
        raise reason
    if not reason.alone:
        run.ranks.barrier()
    raise UserError(f"{reason.fact}; the run is saved at step {run.step}",
                    "restore the old data and rerun to resume", alone=reason.alone) from None


# ---------- Before the loop


def make_model(settings, parent, resumed, tokenizer):
    """The GPT with its weights: random, of another run, with LoRA's corrections, of a checkpoint.

    tokenizer: of conversations, or None.
    """
    torch.manual_seed(settings.seed)
    model = resume.build_model(settings)
    if parent:
        ckpt.load_weights(model, parent.pop("model"), settings.init_from)
    if parent and tokenizer and not parent.get("chat") and not settings.lora_rank:
        init_markers(model, tokenizer)
    if settings.lora_rank:
        lora.add(model, settings.lora_rank, settings.lora_alpha)
    if resumed:
        ckpt.load_weights(model, resumed.pop("model"), settings.out_dir)
    return model


@torch.no_grad()
def init_markers(model, tokenizer):
    """Let a model that has read no conversations begin with the markers of a chat as likely as end-of-text.

    No text has them, so every step of the pretraining pushed their logits down. A few dozen conversations
    cannot pull them up again: the model answers, and does not stop.
    """
    rows, special = model.lm_head.weight, tokenizer.special
    if special.keys() >= set(tokenizers.SPECIAL):
        for name in tokenizers.SPECIAL:
            rows[special[name]] = rows[special[tokenizers.END_OF_TEXT]]


def prepare_stdlib():
    """Run `python prepare.py stdlib`, as a user would. A signal that ends this process ends it too."""
    # 1) The command, wherever this file is and whatever Python runs it.
    here = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, os.path.join(here, "prepare.py"), "stdlib"]
    say(f"data/stdlib is missing; preparing it: {shlex.join(command)}")
    # 2) subprocess.run kills the command when an exception passes, here the
    #    SystemExit of a SIGTERM.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    code = subprocess.run(command).returncode
    signal.signal(signal.SIGTERM, before)
    if code:
        raise UserError("prepare.py stdlib failed", "see its error above")


def make_optimizers(model, settings, device):
    """[(optimizer, its peak learning rate)]. Weight decay pulls at matrices only.

    muon: for the matrices inside the blocks. AdamW keeps the vectors, and the
    embeddings, whose rows are single tokens rather than a map from vectors to
    vectors.
    """
    # 1) Which parameter belongs where?
    inside, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() != 2:
            vectors.append(p)
        elif settings.optimizer == "muon" and ".h." in name:
            inside.append(p)
        else:
            matrices.append(p)
    # 2) AdamW, fused into one kernel for all tensors, but not on mps.
    groups = [dict(params=matrices, weight_decay=settings.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    betas = settings.beta1, settings.beta2
    adamw = torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=betas, fused=not device.startswith("mps"))
    optimizers = [(adamw, settings.learning_rate)]
    # 3) Muon, which multiplies matrices, in bfloat16 where that is fast.
    if inside:
        dtype = torch.bfloat16 if machine.has_bf16(device) else torch.float32
        muon = Muon(inside, settings.muon_lr, settings.weight_decay, dtype=dtype)
        optimizers.append((muon, settings.muon_lr))
    return optimizers


def expected_seconds(run):
    """How long the training will take, roughly: uncompiled code reaches about 45% of the peak."""
    if run.settings.budget:
        return resume.seconds_of(run.settings.budget)
    flops = run.max_iters * run.step_tokens * run.model.flops_per_token()
    return flops / (0.45 * run.peak * run.ranks.world)


def is_worth_compiling(run):
    """Compiling takes half a minute and saves a quarter of a step: it pays after two minutes."""
    return run.device != "mps" and expected_seconds(run) > 120


def ask_if_long(run):
    """A run of days may be a mistake: on a terminal, ask. Raises UserError for a no."""
    seconds = expected_seconds(run)
    if seconds < LONG_SECONDS:
        return
    warn(f"this will take about {duration(seconds)} on this machine")
    if run.ranks.world == 1 and sys.stdin.isatty() and sys.stderr.isatty():
        say("continue? [y/N]", end=" ")
        if not input().strip().lower().startswith("y"):
            raise UserError("cancelled", "python train.py config/train_small.py takes minutes; or set --budget=1h")


# ---------- What a run prints


def say_plan(run):
    settings, meta, chosen, world = run.settings, run.data.meta, run.facts["chosen"], run.ranks.world
    sources = ", ".join(meta["source"])
    what = "text,"
    if run.data.chat:
        what = f"conversations, loss on {meta['train']['trained']:,} of"
    say(f"data: {run.data.folder}, {what} {meta['train']['tokens']:,} tokens from {sources}")
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    part = f", {trained:,} of them trained (LoRA)" if settings.lora_rank else ""
    say(f"model: {run.model.n_params():,} parameters{part}: {counted(settings.n_layer, 'layer')}, "
        f"n_embd {settings.n_embd}, context {settings.block_size}, vocabulary {settings.vocab_size:,}")
    say(f"machine: {run.device}, {counted(torch.get_num_threads(), 'thread')}, {chosen['dtype']} "
        f"({chosen['why']}), peak {run.peak / 1e9:,.0f} GFLOP/s")
    shared = f", {len(run.my_micros)} for each of {world} processes" if world > 1 else ""
    length = f"as many steps as fit in {settings.budget}"
    if run.max_iters < math.inf:
        length = (f"{run.max_iters:,} steps = {run.epochs(run.max_iters):.1f} epochs, about "
                  f"{duration(expected_seconds(run))}")
    say(f"step: {run.step_tokens:,} tokens = {run.micros} micro-batch{'es' * (run.micros != 1)} of {run.batch_size} x "
        f"{settings.block_size}{shared}; {length}")
    memory.say_memory(run)


def say_result(run):
    settings, row, before = run.settings, run.row, run.facts["before"]
    say(f"\nfinished: {run.step} steps = {run.epochs(run.step):.1f} epochs in {run.train_seconds:.0f} s of "
        f"training, {run.wall_seconds():.0f} s in all, peak memory {row['memory'] / 1e6:,.0f} MB; "
        f"validation loss {row['val_loss']:.4f}, {row['val_bpb']:.4f} bits per byte")
    say(f"loss curve: {os.path.join(settings.out_dir, 'loss.svg')}")
    model, _, best = ckpt.load_run(settings.out_dir, device=run.device)
    say(f"{best['path']}: validation loss {best['val_loss']:.4f} after {best['step']} steps; a sample:\n")
    if before:
        change = best["val_bpb"] / before["val_bpb"] - 1
        say(f"--- before: {before['val_bpb']:.4f} bits per byte ---\n{before['text']}\n"
            f"--- after: {best['val_bpb']:.4f} bits per byte, {change:+.1%} ---")
    show(sample(run, model))
    guessing = math.log(settings.vocab_size)  # the loss where every token is equally likely
    # Random weights, too, are a little worse than guessing.
    if row["val_loss"] > guessing + 0.5:
        if row["loss"] < guessing / 2:
            warn(f"the model memorised the text: use {best['path']}, fewer steps, or more text")
        else:
            warn(f"the run has diverged, worse than guessing ({guessing:.2f}); {resume.again(settings)}")


def sample(run, model):
    """A text by the model: what follows the first words, or question, of the validation split."""
    def pick(logits):
        return torch.multinomial(F.softmax(logits / 0.8, dim=-1), 1)[:, 0]

    # The prompt and the seed are always the same, so that texts of different
    # runs can be compared.
    tokenizer, ids = run.tokenizer, []
    prompt, ends = run.data.prompt(model.config.block_size), tokenizers.ends(tokenizer)
    torch.manual_seed(0)
    model.eval()
    with run.autocast:
        for token in model.generate(torch.tensor([prompt], device=run.device), 100, pick):
            if token.item() in ends:
                break
            ids.append(token.item())
    model.train()
    between = " -> " if run.data.chat else ""
    try:
        return tokenizer.decode(prompt) + between + tokenizer.decode(ids)
    except UserError as error:  # GPT-2's vocabulary is not here
        return f"(no text: {error.fact}; fix: {error.fix})"


def say_next(out_dir, data):
    say(f"\nnext: python sample.py {shlex.quote(out_dir)}" + " --chat" * data.chat)


if __name__ == "__main__":
    command_line(main)
