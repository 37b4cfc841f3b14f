# SPDX-License-Identifier: GPL-3.0-only
"""
Runs that something happens to, and how to tell that they are the same in the end.

    run = Run(folder, "--max_iters=60", fault="die_at_call:replace,3")     # in a process of its own
    assert run.wait() == -9

A process that has imported PyTorch once forks for every run, so that one takes a second and not three. As a program,
for torchrun: `FAULT=die_at_step:1,17 torchrun ... tests/faults.py SETTINGS`. Both use one thread.
"""
import errno
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import socket
import sys
import time

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch._dynamo  # every optimizer imports it, which takes a second

from runtime import console
import dataset as datasets
from training import log
from runtime import machine, processes
import model
import prepare
from training import checkpoint as ckpt
import train

STEPS = 30
BENCH = f"""--dataset=words --n_layer=2 --n_head=2 --n_embd=64 --block_size=32 --batch_size=4
    --gradient_accumulation_steps=2 --dropout=0.1 --optimizer=muon --max_iters={STEPS} --warmup_iters=6
    --learning_rate=1e-2 --save_interval=5 --eval_interval=7 --log_interval=1 --compile=false --dtype=float32
    --device=cpu""".split()
TIMES = {"train_seconds", "wall_seconds", "tokens_per_second", "memory"}

# ----------------------------------------------------------------------------------------------------------------------
# Faults: each changes something in a process that is about to train


def calls(owner, name, act, nth=0):
    """Call act(real, *args) instead of owner.name(*args): always, or at call number nth (from 1) alone."""
    real, count = getattr(owner, name), [0]

    def changed(*args, **kw):
        count[0] += 1
        return act(real, *args, **kw) if nth in (0, count[0]) else real(*args, **kw)
    setattr(owner, name, changed)


def me():
    return int(os.environ.get("RANK", "0"))


def at_step(step, act, micro=None):
    """Act when the first micro-batch of step `step` (from 1) is read."""
    def watch(real, self, *args):
        if args[3] == step - 1 and not done:
            done.append(True)
            act()
        return real(self, *args)
    done = []
    calls(datasets.Dataset, "batch", watch)


def die():
    os._exit(9)


def die_before(what, nth):
    """kill -9 just before call number nth of os.fsync, os.replace or os.unlink."""
    calls(os, what, lambda real, *args, **kw: die(), int(nth))


def die_after(what, nth):
    def act(real, *args, **kw):
        real(*args, **kw)
        die()
    calls(os, what, act, int(nth))


class Cut:
    """A file that fails after so many bytes."""

    def __init__(self, file, left, fail):
        self.file, self.left, self.fail = file, left, fail

    def write(self, raw):
        raw = bytes(raw)
        self.file.write(raw[:self.left])
        self.left -= len(raw)
        if self.left < 0:
            self.file.flush()
            self.fail()
        return len(raw)

    def flush(self):
        self.file.flush()


def die_in_bytes(nth, size):
    """kill -9 when `size` bytes of save number nth have been written."""
    calls(torch, "save", lambda real, state, file: real(state, Cut(file, int(size), die)), int(nth))


def full():
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk(first, last, size=1000):
    """Saves number first to last meet a full disk after `size` bytes."""
    count = [0]

    def act(real, state, file):
        count[0] += 1
        return real(state, Cut(file, int(size), full) if int(first) <= count[0] <= int(last) else file)
    calls(torch, "save", act)


def nobody_listens(step):
    """Standard error is a pipe whose reader leaves at a step, as `| head` does."""
    read, write = os.pipe()
    os.dup2(write, sys.stderr.fileno())
    at_step(int(step), lambda: os.close(read))


def nobody_reads(step):
    """Standard error is a full pipe that nobody reads, from a step on."""
    def fill():
        read, write = os.pipe()
        os.set_blocking(write, False)
        while True:
            try:
                os.write(write, bytes(65536))
            except BlockingIOError:
                break
        os.set_blocking(write, True)
        os.dup2(write, sys.stderr.fileno())
        nobody_reads.pipe = read  # kept open
    at_step(int(step), fill)


def clock_is_set(step):
    """Somebody sets the clock of the machine a day forward at a step."""
    at_step(int(step), lambda: calls(time, "time", lambda real: real() + 86400))


def shell(step, command):
    at_step(int(step), lambda: os.system(command))


def full_log(first, last):
    """The log cannot be written at the steps number first to last."""
    def act(real, self, row):
        if int(first) <= row["step"] <= int(last):
            file, full = self.file.fileno(), os.open("/dev/full", os.O_WRONLY)
            kept = os.dup(file)
            os.dup2(full, file)
            real(self, row)
            os.dup2(kept, file)
        else:
            real(self, row)
    calls(log.Log, "write", act)


def signal_at_step(number, *steps):
    for step in map(int, steps):
        at_step(step, lambda: os.kill(os.getpid(), int(number)))


def ignore_hangup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def signal_in_validation(number, batch):
    calls(datasets.Dataset, "val_batch", lambda real, *args: (os.kill(os.getpid(), int(number)), real(*args))[1],
          int(batch))


def signals_in_save(number, nth, count):
    """Signals in the middle of save number nth, 50 ms apart."""
    def act(real, state, file):
        real(state, file)
        for _ in range(int(count)):
            os.kill(os.getpid(), int(number))
            time.sleep(0.05)
    calls(torch, "save", act, int(nth))


def default_int():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # (pytest may run in the background, where it is ignored)


def signal_while_opening(number):
    default_int()
    calls(ckpt, "find_checkpoint", lambda real, *args: (os.kill(os.getpid(), int(number)), real(*args))[1])


def bad_loss(step, value, rank=0):
    """The loss of a step is multiplied by a value such as nan."""
    if me() == int(rank):
        state = []
        at_step(int(step), lambda: state.append(1))
        calls(model.GPT, "loss", lambda real, *args: real(*args) * (float(value) if state else 1.0))


def overflow(step, name):
    """The gradients of the parameters whose name contains `name` are infinite in step number `step`."""
    state = []
    at_step(int(step), lambda: state.append(1))

    built = []
    calls(train.resume, "build_model", lambda real, settings: built.append(real(settings)) or built[-1])

    def act(real, self, optimizer):
        if state:
            for key, p in built[-1].named_parameters():
                if name in key:
                    p.grad.fill_(float("inf"))
            state.clear()
        return real(self, optimizer)
    calls(torch.amp.GradScaler, "unscale_", act)


def crash_in_validation():
    def act(real, *args):
        raise ZeroDivisionError("a bug in the validation")
    calls(datasets, "validation_sums", act)


def prepare_by(command):
    """In place of `python prepare.py stdlib`, a shell command."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # (pytest may run in the background, where it is ignored)

    def act(real, asked, **kw):
        return real(["sh", "-c", command] if asked[-1] == "stdlib" else asked, **kw)
    calls(train.subprocess, "run", act)


def keep_all():
    calls(ckpt, "prune_checkpoints", lambda real, *args: None)


def one_thread():
    calls(machine, "set_up", lambda real, *args: (real(*args), torch.set_num_threads(1)))


def another_thread():
    calls(machine, "set_up", lambda real, *args: (real(*args), torch.set_num_threads(torch.get_num_threads() + 1)))


def small_files(size):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))


def little_room():
    """The disk has 1 MB left."""
    calls(ckpt.shutil, "disk_usage", lambda real, path: real(path)._replace(free=1_000_000))


def little_memory(size):
    """The process may take `size` more bytes of address space."""
    import resource
    with open("/proc/self/statm", encoding="utf-8") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + int(size), now + int(size)))


def no_fcntl():
    sys.modules["fcntl"] = None


def peak_memory(path):
    """Write the most memory that the process has held when the first step begins, in bytes."""
    def note():
        with open(path, "w", encoding="utf-8") as file:
            file.write(str(machine.peak_memory("cpu")))
    at_step(1, note)
    at_step(2, note)


def die_at_step(rank, step, attempts=1):
    """The process `rank` dies at a step, in the first attempts of torchrun."""
    if me() == int(rank) and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) < int(attempts):
        at_step(int(step), lambda: os._exit(1))


def signal_rank(rank, number, step):
    if me() == int(rank):
        signal_at_step(number, step)


def no_memory(rank, step):
    def fail():
        raise MemoryError("no more memory")
    if me() == int(rank):
        at_step(int(step), fail)


def hang(rank, step):
    if me() == int(rank):
        at_step(int(step), lambda: time.sleep(1000))


def other_seed(rank):
    if me() == int(rank):
        calls(train.resume, "check_settings", lambda real, settings: (real(settings), setattr(settings, "seed", 4)))


def note_windows():
    """Write the positions of all windows that are read to windows.RANK."""
    def act(real, self, *args):
        found = real(self, *args)
        with open(f"windows.{me()}", "a", encoding="utf-8") as file:
            file.write(json.dumps([args[3], sorted(found.tolist())]) + "\n")
        return found
    calls(datasets.Dataset, "spans", act)


def wait_at_step(step, path):
    """The process waits at a step until there is a file of this name."""
    at_step(int(step), lambda: wait_for(lambda: os.path.exists(path), f"somebody writes {path}"))


def wait_for_a_signal(step):
    """The process writes the file waits.RANK at a step, and goes on when it gets a signal."""
    received = []
    calls(processes.StopSignal, "receive", lambda real, *args: (real(*args), received.append(True)))

    def wait():
        open(f"waits.{me()}", "x", encoding="utf-8").close()
        wait_for(lambda: received, "a signal")
    at_step(int(step), wait)


def apply(fault):
    for one in filter(None, fault.split(";")):
        name, _, arguments = one.partition(":")
        globals()[name](*filter(None, arguments.split(",")))


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def child(folder, argv, fault, env, script):
    os.chdir(folder)
    os.environ.update(env)
    sys.stdout = sys.stderr = open(f"said.{env.get('RANK', '0')}", "a", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    train.PROCESS_START = time.monotonic()  # (and not when the process began from which this one was forked)
    torch.set_num_threads(1)
    one_thread()
    calls(machine, "measure_peak", lambda real, *args: 1e11)  # (measuring it takes as long as ten steps)
    apply(fault)
    console.command_line(lambda _: {"train": train, "prepare": prepare}[script].main(argv))


@functools.cache
def context():
    """Where new processes come from: one that has imported everything, and does nothing else."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["faults"])
    multiprocessing.forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return forks


class Run:
    """One process that trains (or prepares) in `folder`; what it says is appended to the file said.0."""

    def __init__(self, folder, *argv, fault="", env=None, script="train", settings=BENCH):
        argv = [*(settings if script == "train" else ()), *argv]
        self.process = context().Process(target=child, args=(str(folder), argv, fault, env or {}, script))
        self.process.start()

    def wait(self, timeout=120):
        """The exit code; -9 for a process that was killed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"the run has not ended within {timeout} s")
        return self.process.exitcode

    def poll(self):
        """The exit code, or None while it runs."""
        return self.process.exitcode

    def kill(self):
        self.process.kill()
        return self.wait()


def wait_for(condition, what, process=None, seconds=60):
    """Wait until condition() holds, and return it. Fails where the process (a Run or Popen) ends before, or hangs."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        code = process.poll() if process else None
        if code is not None and not condition():
            raise AssertionError(f"{what}: the process ended with {code} before")
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.02)
    return found


def kill_at_random_moments(start, seconds, kills, seed):
    """Start a process again and again, and kill it after up to `seconds`. Yields its exit code, -9 if it was killed."""
    rng, killed = random.Random(seed), 0
    for _ in range(10 * kills):
        process = start()
        time.sleep(rng.uniform(0, seconds))
        code = process.kill()
        killed += code == -9
        yield code
        if killed == kills:
            return
    raise AssertionError(f"of {10 * kills} processes only {killed} were killed before they had ended")


def ranks(world, folder, *argv, **kw):
    """`world` processes that train together, started as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    return [Run(folder, *argv, env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)), **kw) for rank in range(world)]


def together(world, folder, *argv, **kw):
    """The exit codes of `world` processes that train together."""
    return [run.wait() for run in ranks(world, folder, *argv, **kw)]


def said(folder, rank=0):
    with open(os.path.join(folder, f"said.{rank}"), encoding="utf-8") as file:
        return file.read()


def digest(path):
    """A sha256 over all numbers of a checkpoint: weights and optimizer."""
    state, total = ckpt.load_checkpoint(path), hashlib.sha256()

    def add(name, value):
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{name}.{key}", value[key])
        elif isinstance(value, list):
            for i, item in enumerate(value):
                add(f"{name}.{i}", item)
        else:
            raw = value.contiguous().numpy().tobytes() if torch.is_tensor(value) else repr(value).encode()
            total.update(f"{name}={len(raw)}:".encode() + raw)
    add("", {key: state[key] for key in ("model", "optimizer", "scaler", "step")})
    return total.hexdigest()


def rows(run):
    """The log without what depends on the clock."""
    with open(os.path.join(run, "log.jsonl"), encoding="utf-8") as file:
        _, *lines = map(json.loads, file)
    return [{key: value for key, value in row.items() if key not in TIMES} for row in lines]


def outcome(run, steps=STEPS):
    """All that a run leaves: weights and optimizer, log, best checkpoint."""
    best = ckpt.load_checkpoint(os.path.join(run, "best.pt"))
    weights = hashlib.sha256(b"".join(w.numpy().tobytes() for w in best["model"].values())).hexdigest()
    return digest(os.path.join(run, f"ckpt_{steps:08d}.pt")), rows(run), (best["step"], best["val_loss"], weights)


def assert_same_run(a, b, step):
    """Weights, optimizer state and log of two runs are equal, bit for bit."""
    one, two = (ckpt.load_checkpoint(f"{run}/ckpt_{step:08d}.pt") for run in (a, b))
    assert one["model"].keys() == two["model"].keys() and not any("_orig_mod" in name for name in one["model"])
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    for x, y in zip(one["optimizer"], two["optimizer"], strict=True):
        assert x["param_groups"] == y["param_groups"] and x["state"].keys() == y["state"].keys() != set()
        for i in x["state"]:
            for key, value in x["state"][i].items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(y["state"][i][key]))
    assert rows(a) == rows(b)
    best = [ckpt.load_checkpoint(f"{run}/best.pt") for run in (a, b)]
    assert best[0]["step"] == best[1]["step"] and best[0]["val_loss"] == best[1]["val_loss"]


class Reference:
    """A folder with data/words, the outcome of an undisturbed run there, and the digest of the state at every step."""

    def __init__(self, folder, prepare_words):
        self.folder = folder
        prepare_words(folder)
        assert Run(folder, "--out_dir=out/all", "--save_interval=1", fault="keep_all").wait() == 0, said(folder)
        started = time.monotonic()
        assert Run(folder, "--out_dir=out/a").wait() == 0, said(folder)
        self.took = time.monotonic() - started
        self.states = {step: digest(folder / f"out/all/ckpt_{step:08d}.pt") for step in range(1, STEPS + 1)}
        self.due = outcome(folder / "out/a")
        assert self.due[0] == self.states[STEPS]
        assert [row["step"] for row in self.due[1]] == list(range(1, STEPS + 1))


class Lab:
    """A fresh folder with the data of a Reference. `finish` holds the run in it against the undisturbed one."""

    def __init__(self, reference, path):
        self.path, self.run = path, path / "out/words"
        self.reference, self.due, self.took = reference.folder, reference.due, reference.took
        self.states = reference.states
        os.symlink(reference.folder / "data", path / "data")

    def start(self, *argv, **kw):
        return Run(self.path, *argv, **kw)

    def said(self):
        return said(self.path)

    def check_files(self):
        """Whatever has happened: every checkpoint that bears its name is whole, and is what it should be."""
        paths = ckpt.checkpoints(str(self.run))
        for path in paths:
            assert digest(path) == self.states[int(path[-11:-3])], path
        return len(paths)

    def finish(self):
        assert self.start().wait() == 0, self.said()
        assert outcome(self.run) == self.due
        files = {name for name in os.listdir(self.run) if not name.startswith("ckpt_")}
        assert files == {"best.pt", "log.jsonl", "loss.svg", "tokenizer"} and self.check_files() == 2


if __name__ == "__main__":
    one_thread()
    apply(os.environ.get("FAULT", ""))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    console.command_line(train.main)
