# SPDX-License-Identifier: GPL-3.0-only
"""
Training: one linear loop, from the settings to a trained model.

    python train.py config/train_small.py                        # a GPT that writes Python, in minutes on a laptop
    python train.py config/train_small.py --dataset=notes --out_dir=out/notes
    python train.py config/train_small.py --budget=10m           # as many steps as fit into ten minutes
    torchrun --standalone --nproc_per_node=2 train.py config/train_small.py     # two processes share every update
    python train.py --help                                       # every setting with its meaning

The same command continues a run that was stopped (Ctrl-C saves first), and does nothing when the run is finished.
A run is a folder, out/NAME:

    ckpt_00000700.pt    weights, optimizer and settings after 700 updates; the last two are kept
    best.pt             the weights with the lowest validation loss: what sample.py reads
    log.jsonl           one line per logged step; loss.svg is its picture
    tokenizer/          a copy, so that a model never loses its vocabulary

On a CPU, a run is a pure function of its settings, its seed and the machine: the batch of a step is computed from
(seed, step), see dataset.py, and so are the dropout masks. That is why a run that was killed at any moment, and
resumed, has the same bits as one that was never stopped (docs/reliability.md has the proofs). A GPU adds in varying
order; there it is the same up to rounding.
"""
import time

PROCESS_START = time.monotonic()  # before the imports, which take seconds: the clock of a run counts them

import math
import os
import signal
import statistics
from dataclasses import asdict, dataclass
from shlex import quote
from typing import Literal

import torch
from torch.nn import functional as F

from training import resume
import dataset as datasets
from training import lora
from runtime import machine
import prepare
from training import checkpoint as ckpt
import tokenizer as tokenizers
from runtime.console import UserError, command_line, note, say, show, warn
from runtime.settings import load
from training.log import Log, last_row, progress_line
from model import GPTConfig, PRESETS
from training.muon import Muon


MAX_SKIPPED = 20  # updates in a row that float16 may overflow: the scaler needs some to find its factor


@dataclass
class TrainConfig(GPTConfig):
    preset: str = ""  # a shape by name, see PRESETS in model.py: gpt2, openllm-small, modern, ...; other settings win
    vocab_size: int = 0  # 0: as many as the tokenizer of the data has
    # data
    dataset: str = "stdlib"  # data/NAME, written by prepare.py
    batch_size: int = 12  # windows of a micro-batch; less where memory is short
    gradient_accumulation_steps: int = 1  # micro-batches of an update, of all processes together
    # the run
    out_dir: str = ""  # folder of the run; by default out/<dataset>
    init_from: str = "auto"  # auto: resume where there is a checkpoint; scratch; resume; or a RUN to take weights from
    max_iters: int = 2000  # updates of the weights
    budget: str = ""  # 90s, 5m or 1h: choose max_iters so that the whole command takes this long
    seed: int = 1337  # initial weights, order of the data and dropout
    eval_interval: int = 250  # updates between validations
    eval_iters: int = 0  # at most this many batches of the validation pass; 0: all held-out text
    eval_only: bool = False  # print the validation loss of the last checkpoint and end
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
    # fine-tuning, which is init_from=RUN and the same loop
    patience: int = 0  # end after so many validations in a row without a lower loss; 0: never before max_iters
    lora_rank: int = 0  # train a correction of this rank to every matrix, not the weights (training/lora.py); 8 or 16
    lora_alpha: float = 16.0  # how much the correction counts: it is multiplied by lora_alpha / lora_rank
    # the machine
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; weights stay float32
    compile: Literal["auto"] | bool = "auto"  # torch.compile: faster steps after some seconds of compiling
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # how several processes talk: nccl between GPUs, else gloo
    dist_timeout: int = 600  # seconds without an answer after which a process gives the others up
    # logging elsewhere, as in nanoGPT; log.jsonl is always written
    wandb_log: bool = False  # also send the numbers to Weights & Biases, if its package is installed
    wandb_project: str = "owt"  # its project
    wandb_run_name: str = "gpt2"  # and its name for the run


def main(argv):
    """Read the settings, take hold of what must be let go whatever happens, and train."""
    settings, given, _ = load(TrainConfig, argv, presets=PRESETS, files=True)
    resume.check_settings(settings)
    if not argv:
        note("these are the settings of GPT-2; python train.py config/train_small.py trains in minutes")
    settings.dataset = os.path.normpath(settings.dataset).removeprefix("data" + os.sep)
    settings.out_dir = os.path.normpath(settings.out_dir or os.path.join("out", os.path.basename(settings.dataset)))
    processes = machine.Processes()
    writes = processes.rank == 0 and not settings.eval_only  # one process writes into the folder of the run
    with machine.StopSignal() as stop, ckpt.RunFolder(settings.out_dir, writes) as folder:
        try:
            return train(settings, given, processes, stop, folder)
        except (RuntimeError, MemoryError) as error:
            reason = resume.explain(error, settings, processes)
            if reason is None:
                raise
            raise reason from None


def train(settings, given, processes, stop, folder):
    """The whole run, from top to bottom. Returns the exit code."""
    out_dir = settings.out_dir
    device = machine.choose_device(settings.device, processes)
    machine.set_up(device, processes)
    versions = machine.versions(device, processes.world)

    if settings.lora_rank and settings.init_from in ("auto", "scratch") and not ckpt.checkpoints(out_dir):
        raise UserError(f"lora_rank={settings.lora_rank} corrects weights, but init_from={settings.init_from} has none",
                        "--init_from=RUN (a run or a Hugging Face folder), or leave --lora_rank out")

    # ------------------------------------------------------------------------------------------------------------------
    # 1) The data; what is built in is prepared here if it is missing: by one process of all, while the others wait.
    data_dir = os.path.join("data", settings.dataset)
    if not os.path.exists(data_dir) and settings.dataset == "stdlib" and processes.rank == 0:
        say(f"{data_dir} is missing; preparing it")
        prepare.prepare([settings.dataset], prepare.PrepareConfig(out=data_dir))
    processes.join(device, settings.backend, settings.dist_timeout)
    data = datasets.Dataset.open(data_dir)
    tokenizer = data.check_tokenizer()
    if folder.writes:
        folder.check_ours()

    # ------------------------------------------------------------------------------------------------------------------
    # 2) Where to start: at a checkpoint of this run, at the weights of another one, or at random weights.
    resumed = ckpt.find_checkpoint(settings.init_from, out_dir)
    start = base = None
    if resumed:
        resume.continue_run(resumed, settings, given, data, versions)
        row = last_row(os.path.join(out_dir, "log.jsonl"))
        if resumed["step"] == row.get("step") and "val_loss" in row and not settings.eval_only and (
                row["step"] == settings.max_iters or 0 < settings.patience <= row.get("since_best", 0)):
            early = f", ended by patience={settings.patience}" if row["step"] < settings.max_iters else ""
            say(f"{out_dir} is finished: {row['step']} updates{early}, validation loss {row['val_loss']:.4f}")
            say_next(out_dir, data)
            return 0
        base = resumed.get("base")  # of a LoRA run: where the weights are that it corrects
        start = ckpt.read_base(resumed, out_dir) if base else None
    elif settings.init_from not in ("auto", "scratch"):
        start = resume.load_start(settings, given, data)
        base = ckpt.name_base(settings.init_from, start) if settings.lora_rank else None
    data.check(settings.block_size)
    resume.advise(settings, data)
    settings.vocab_size = settings.vocab_size or data.meta["vocab_size"]
    if settings.vocab_size < data.meta["vocab_size"]:
        raise UserError(f"vocab_size={settings.vocab_size}, but {data_dir} was written with a tokenizer of "
                        f"{data.meta['vocab_size']} tokens", "leave --vocab_size out")
    chat = data.chat or bool((resumed or start or {}).get("chat"))  # does the model know a chat format?
    data_sha256 = data.sha256()
    at = resumed["step"] if resumed else None  # finished updates; None: a new run
    processes.compare(dict(asdict(settings), data=data_sha256, updates=at, torch=versions["torch"]))
    torch.manual_seed(settings.seed)  # the initial weights are the first thing drawn
    model = resume.build_model(settings)
    if start:
        ckpt.load_weights(model, start.pop("model"), settings.init_from)
    weights, whole = model.n_params(), model.flops_per_token()  # of a token, where all weights are trained
    if settings.lora_rank:
        lora.add(model, settings.lora_rank, settings.lora_alpha)
    if resumed:
        ckpt.load_weights(model, resumed.pop("model"), out_dir)
    model.to(device).train()
    optimizers = make_optimizers(model, settings, device)
    if folder.writes:
        size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        folder.open(at, needed=10 * size)  # three checkpoints of weights and two averages each, and best.pt

    # ------------------------------------------------------------------------------------------------------------------
    # 3) The machine. What `auto` chooses is written into the run and used again when it is resumed.
    if resumed:
        chosen = resumed["chosen"]
    else:
        dtype, why = machine.choose_dtype(settings.dtype, device)
        chosen = dict(dtype=str(dtype).removeprefix("torch."), why=why, compile=settings.compile)
        begun = resume.begun_before(settings) if folder.writes else {}
        chosen = processes.first(begun["chosen"] if begun.get("settings") == asdict(settings) else chosen)
    dtype = getattr(torch, chosen["dtype"])
    autocast = machine.autocast(device, dtype)
    scaling = dtype == torch.float16  # small gradients would round to 0 in float16, unless the loss is scaled up
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=scaling)
    peak = processes.first(machine.measure_peak(device, dtype))
    # However many processes there are, an update reads the same windows. The processes take its micro-batches in turn;
    # where these are too few to go round, they are cut into smaller ones.
    cut = resume.pieces(settings, processes.world)
    batch_size, micros = settings.batch_size // cut, settings.gradient_accumulation_steps * cut
    mine = range(processes.rank, micros, processes.world)
    val_batches = data.n_val_batches(settings.block_size, batch_size, settings.eval_iters * cut)
    tokens_per_step = micros * batch_size * settings.block_size
    flops_per_token = model.flops_per_token()

    def epochs(updates):
        return data.epochs(updates * micros * batch_size, settings.block_size)

    if chosen["compile"] == "auto":  # worth half a minute? Eager code reaches about 45% of the peak, compiled 60%
        seconds = settings.max_iters * tokens_per_step * flops_per_token / (0.45 * peak * processes.world)
        seconds = resume.seconds_of(settings.budget) if settings.budget else seconds
        chosen["compile"] = device != "mps" and seconds > 120
    kind = f"conversations, {data.meta['train']['trained']:,} tokens to learn in" if data.chat else "text,"
    say(f"data: {data_dir}, {kind} {data.meta['train']['tokens']:,} tokens of {', '.join(data.meta['source'])}")
    say(f"model: {weights:,} parameters: {model.config.n_layer} layers, {model.config.n_embd} wide, context "
        f"{settings.block_size}, vocabulary {settings.vocab_size:,}")
    say(f"machine: {device}, {torch.get_num_threads()} threads, {chosen['dtype']} ({chosen['why']}), at most "
        f"{peak / 1e9:,.0f} GFLOP/s")
    say(f"update: {tokens_per_step:,} tokens = {micros} micro-batches of {batch_size} x {settings.block_size}"
        + (f", {len(mine)} for each of {processes.world} processes" if processes.world > 1 else "")
        + ("" if settings.budget else f"; {settings.max_iters:,} updates = {epochs(settings.max_iters):.1f} epochs"))
    resume.say_memory(model, batch_size, dtype, device, settings, processes)
    if settings.lora_rank:
        resume.say_lora(model, settings, flops_per_token / whole)

    def batch(step, micro):
        return data.batch(settings.block_size, batch_size, settings.seed, step, micro, micros)

    def loss_of(model, idx, targets):
        with autocast:
            return model(idx.to(device), targets.to(device))

    def check_stop():
        """Here and nowhere else: before a micro-batch or a validation batch, never while weights move.

        All processes come here equally often, so that a signal to one of them ends all at the same place.
        """
        if number := processes.highest(stop.signal):
            stop.signal = number
            say(f"\n{signal.Signals(number).name}: saving" + "; once more to stop at once" * stop.twice_ends)
            raise machine.Stopped

    def validate():
        model.eval()
        with torch.no_grad():
            total, count = processes.sum(*datasets.validation_sums(
                lambda *batch: loss_of(model, *batch), data, settings.block_size, batch_size, val_batches, check_stop,
                processes.rank, processes.world))
        model.train()
        return total / count

    before = resumed.get("before") if resumed else None
    if start and not resumed and not settings.eval_only:  # so that it can be seen what fine-tuning does
        loss = validate()
        text = sample(model, data, tokenizer, autocast, device)
        before = dict(val_loss=loss, val_bpb=data.bits_per_byte(loss), text=text)
        say(f"before: validation loss {loss:.4f}, {before['val_bpb']:.4f} bits per byte")
    if chosen["compile"]:
        chosen["compile"] = machine.compile_model(model, settings.compile, lambda: loss_of(model, *batch(0, 0)))
    if settings.eval_only:
        loss = validate()
        what = f"{out_dir} after {at} updates" if resumed else settings.init_from if start else "random weights"
        say(f"validation loss {loss:.4f}, {data.bits_per_byte(loss):.4f} bits per byte: {what}")
        return 0

    # ------------------------------------------------------------------------------------------------------------------
    # 4) The run folder: a new one, or the state in which the last checkpoint left it. The first process writes it.
    step, row, best_loss, train_seconds, wall_before, skipped, times = 0, None, math.inf, 0.0, 0.0, 0, []
    if resumed:
        step, row = resumed["step"], resumed["row"]
        train_seconds, wall_before = row["train_seconds"], row["wall_seconds"]
        ckpt.load_optimizers([optimizer for optimizer, _ in optimizers], scaler, resumed, out_dir)
        say(f"resumed {out_dir} after {step} of {settings.max_iters} updates")

    def header():
        return dict(versions=versions, chosen=chosen, settings=asdict(settings), data=data.meta)

    def wall_seconds():
        return wall_before + time.monotonic() - PROCESS_START

    def save(name, **state):
        ckpt.save_checkpoint(os.path.join(out_dir, name), dict(
            format=1, step=step, model=ckpt.learned(model), settings=asdict(settings), chosen=chosen,
            tokenizer_sha256=data.meta["tokenizer_sha256"], source=data.meta["source"], data_sha256=data_sha256,
            versions=versions, chat=chat, base=base, before=before, **state))

    def save_run():
        """All that the next update depends on."""
        save(f"ckpt_{step:08d}.pt", row=row, unlogged=log.unwritten, scaler=scaler.state_dict(),
             optimizer=[optimizer.state_dict() for optimizer, _ in optimizers])
        ckpt.prune_checkpoints(out_dir)

    log = wandb = None
    if folder.writes:
        if resumed:
            best_loss = ckpt.best_loss_of(out_dir)  # it may be newer than the checkpoint
        # First the log, by which the folder counts as that of a run.
        log = Log(os.path.join(out_dir, "log.jsonl"), header(), step, resumed.get("unlogged", "") if resumed else "")
        tokenizers.keep(tokenizer, out_dir, data.meta["tokenizer_sha256"])
        wandb = start_wandb(settings) if settings.wandb_log else None
    wrapped = processes.wrap(model)

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
                    if not math.isfinite(row["val_loss"]):
                        lower = f"--learning_rate={settings.learning_rate / 3:.1g}"
                        raise UserError(f"the validation loss after {step} steps is {row['val_loss']}",
                                        f"--out_dir={quote(out_dir + '-2')} {lower}", code=3)
                    if folder.writes and row["val_loss"] < best_loss and saved(last, save, "best.pt", **{
                            name: row[name] for name in ("val_loss", "val_bpb")}):
                        best_loss = row["val_loss"]
                    row["since_best"] = processes.first(log.since_best(row["val_loss"]) if log else None)
                if folder.writes and ("val_loss" in row or step % settings.log_interval == 0):
                    row["wall_seconds"] = wall_seconds()
                    log.write(row)
                    say(progress_line(row, settings.max_iters, flops_per_token / (peak * processes.world)))
                    if wandb:
                        wandb.log(row, step=step)
            stuck = step > 0 and 0 < settings.patience <= row.get("since_best", 0)
            if stuck and not last:
                say(f"patience={settings.patience}: {row['since_best']} validations brought no lower loss than "
                    f"{best_loss:.4f}")
                if folder.writes:
                    save_run()
            if last or stuck:
                break
            measured = step >= max(1, min(10, settings.warmup_iters)) and times
            if settings.budget and "max_iters" not in chosen and measured:
                # The time of an update is known now. The warm-up is not over: until then the rate does not depend on
                # max_iters, so choosing it here changes nothing that has been done.
                left, took = processes.first((resume.seconds_of(settings.budget) - wall_seconds(),
                                              statistics.median(times)))
                settings.max_iters = chosen["max_iters"] = step + steps_within(
                    left, settings, val_batches / micros, took)
                if folder.writes:
                    log.rewrite(header())
                say(f"budget: enough for {settings.max_iters:,} updates = {epochs(settings.max_iters):.1f} epochs; to "
                    f"repeat this run without the clock: --max_iters={settings.max_iters} "
                    f"--compile={str(chosen['compile']).lower()}")

            # b) One update: in which direction, how far, and the move.
            #    Every target counts the same, whichever micro-batch and process it is in: their number is known first.
            started = time.perf_counter()
            loss, batches = 0.0, [batch(step, micro) for micro in mine]
            counts = [int((targets >= 0).sum()) for _, targets in batches]
            mean_count = max(1, processes.sum(sum(counts))[0]) / processes.world  # (backward averages over processes)
            for micro, count, (idx, targets) in zip(mine, counts, batches):
                check_stop()
                torch.manual_seed(datasets.fold("dropout", settings.seed, step, micro))  # the same masks after a resume
                with processes.keep(wrapped, last=micro == mine[-1]):
                    part = loss_of(wrapped, idx, targets) * (count / mean_count)
                    scaler.scale(part).backward()  # adds to the gradients of the micro-batches before: a mean over all
                loss += part.item()
            loss = processes.sum(loss)[0] / processes.world
            for optimizer, _ in optimizers:
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf).item()
            skipped = 0 if math.isfinite(norm) else skipped + 1
            if not math.isfinite(loss) or skipped > (MAX_SKIPPED if scaling else 0):
                raise resume.not_finite(step + 1, loss, norm, settings, chosen)
            factor = learning_rate_factor(step, settings)
            if not skipped:  # else float16 has overflowed: the scaler halves its factor, this update does nothing
                for optimizer, highest in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = highest * factor
                    scaler.step(optimizer)
            scaler.update()
            for optimizer, _ in optimizers:
                optimizer.zero_grad(set_to_none=True)
            step += 1
            seconds = time.perf_counter() - started
            train_seconds += seconds
            times = times[-9:] + [seconds]
            row = dict(step=step, tokens=step * tokens_per_step, epoch=epochs(step), train_seconds=train_seconds,
                       wall_seconds=wall_seconds(), loss=loss, lr=settings.learning_rate * factor,
                       grad_norm=-1.0 if skipped else norm,  # (JSON has no infinity)
                       tokens_per_second=tokens_per_step / seconds, memory=machine.peak_memory(device))

            # c) Save before validating, so that a crash there loses nothing.
            #    (The first validation saves in any case: best.pt alone would look like a run that was copied.)
            validates = step % settings.eval_interval == 0
            last = step >= settings.max_iters
            saves = last or step % (settings.save_interval or settings.eval_interval) == 0
            if validates or saves:
                data.check_unchanged(any_process=lambda changed: processes.highest(int(changed)))
            if folder.writes and (saves or validates and (
                    settings.always_save_checkpoint or not ckpt.checkpoints(out_dir))):
                saved(last, save_run)
    except datasets.Changed as error:
        if step == 0:
            raise
        if folder.writes:
            save_run()
        if not error.alone:
            processes.wait()
        raise UserError(f"{error.fact}; the run is saved after {step} steps, and those since the last validation or "
                        "checkpoint may have read other text", "bring the old data back, and the same command "
                        f"continues; or --init_from={quote(out_dir)} --out_dir=out/ANOTHER",
                        alone=error.alone) from None
    except machine.Stopped:
        if folder.writes and step > 0:
            save_run()
        processes.wait()  # for the first, which is saving: torchrun would kill it as soon as another one leaves
        say(f"stopped by {signal.Signals(stop.signal).name} after {step} updates"
            + (f"; saved in {out_dir}. The same command continues." if step else "")
            + (" (Without --init_from=scratch.)" if settings.init_from == "scratch" else ""))
        return 128 + stop.signal

    if wandb:
        wandb.finish()

    # ------------------------------------------------------------------------------------------------------------------
    # 6) The result.
    if not folder.writes:
        return 0
    # Which Python it was that the model has read: losses can be compared on the same text only.
    corpus = next((f" ({source})" for source in data.meta["source"] if source.startswith("stdlib")), "")
    say(f"\nfinished: {step} updates = {epochs(step):.1f} epochs in {train_seconds:.0f} s of training, "
        f"{wall_seconds():.0f} s in all, {row['memory'] / 1e6:,.0f} MB at most; validation loss {row['val_loss']:.4f}, "
        f"{row['val_bpb']:.4f} bits per byte{corpus}")
    model, _, best = ckpt.load_run(out_dir, device=device)
    best = dict(val_loss=row["val_loss"], val_bpb=row["val_bpb"]) | best
    say(f"{best['path']}: validation loss {best['val_loss']:.4f} after {best['step']} updates; this is what sample.py "
        "reads, and what writes here:\n")
    if before:
        say(f"--- before: {before['val_bpb']:.4f} bits per byte ---\n{before['text']}\n"
            f"--- after: {best['val_bpb']:.4f} bits per byte, {best['val_bpb'] / before['val_bpb'] - 1:+.1%} ---")
    show(sample(model, data, tokenizer, autocast, device, fresh=before is None))
    if before and best["val_loss"] >= before["val_loss"]:
        warn("nothing was gained, the held-out text was easier for it before: a lower --learning_rate, or more text")
    guessing = math.log(settings.vocab_size)  # the loss where every token is equally likely
    if row["val_loss"] > guessing + 0.5:  # (random weights cost a little more than guessing, too)
        warn(f"the run has diverged: its validation loss of {row['val_loss']:,.2f} is worse than guessing, which costs "
             f"{guessing:.2f}; --learning_rate={settings.learning_rate / 3:.1g}, with another --out_dir")
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

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = [p for name, p in trained if for_muon(name, p)]
    outside = [p for name, p in trained if not for_muon(name, p)]
    groups = [dict(params=[p for p in outside if p.dim() == 2], weight_decay=settings.weight_decay),
              dict(params=[p for p in outside if p.dim() == 1], weight_decay=0.0)]
    betas = settings.beta1, settings.beta2
    adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=not device.startswith("mps"))
    if not inside:
        return [(adamw, settings.learning_rate)]
    dtype = torch.bfloat16 if machine.has_bf16(device) else torch.float32
    return [(adamw, settings.learning_rate),
            (Muon(inside, settings.muon_lr, settings.weight_decay, dtype=dtype), settings.muon_lr)]


def steps_within(left, settings, size, step_seconds):
    """How many updates fit into `left` seconds, with their validations. size: of a validation, in updates' data."""
    validation = size * step_seconds / 3  # the forward pass alone is a third of the work
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


def saved(must, save, *args, **kw):
    """Save, and return whether it went well. A full disk ends a run only at its end: until then, there is a next time.
    """
    try:
        save(*args, **kw)
        return True
    except UserError as error:
        if must:
            raise
        warn(f"{error.fact}; going on, and trying again with the next checkpoint")
        return False


def sample(model, data, tokenizer, autocast, device, fresh=False):
    """What the model writes: an answer to the first held-out question; of a text, how the held-out side goes on after
    its first words, or, fresh, what comes after nothing but the end-of-text token."""
    def pick(logits):
        return torch.multinomial(F.softmax(logits / 0.8, dim=-1), 1)[:, 0]
    ids = []
    prompt, ends = data.prompt(model.config.block_size, nothing=fresh), tokenizers.ends(tokenizer)
    torch.manual_seed(0)
    model.eval()
    with autocast:
        for token in model.generate(torch.tensor([prompt], device=device), 200 if fresh else 100, pick):
            if token.item() in ends:
                break
            ids.append(token.item())
    model.train()
    return tokenizer.decode(prompt) + (" -> " if data.chat else "") + tokenizer.decode(ids)


def say_next(out_dir, data):
    stdlib = any(source.startswith("stdlib") for source in data.meta["source"])
    prompt = " --chat" if data.chat else " --prompt='def'" if stdlib else ""
    say(f"\nnext: python sample.py {quote(out_dir)}{prompt}\n      python sample.py --help")


def start_wandb(settings):
    try:
        import wandb
    except ImportError:
        note("wandb is not installed; log.jsonl in the run folder has the same numbers")
        return None
    return wandb.init(project=settings.wandb_project, name=settings.wandb_run_name, config=asdict(settings))


if __name__ == "__main__":
    command_line(main)
