# SPDX-License-Identifier: GPL-3.0-only
"""
The machine: which device and number type to use, how much it can do and hold, and several processes as one.

    device = choose_device("auto")
    dtype, why = choose_dtype("auto", device)
    peak = measure_peak(device, dtype)                      # the most floating-point operations per second
    processes = Processes()                                 # one, or as many as torchrun has started
"""
import contextlib
import ctypes
import datetime
import math
import os
import platform
import signal
import subprocess
import sys
import time
from functools import partial

import numpy
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

from runtime.console import UserError, note, say


def choose_device(asked="auto", processes=None):
    """'cpu', 'cuda', 'cuda:1' or 'mps'; auto takes the best there is. Raises UserError for what this machine lacks.

    Several processes get a GPU each, by their number on this machine.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    several = processes is not None and processes.world > 1
    if several and cuda and asked in ("auto", "cuda"):
        gpus = torch.cuda.device_count()
        if processes.local_world > gpus:
            raise UserError(f"{processes.local_world} processes, but this machine has {gpus} GPUs",
                            f"--nproc_per_node={gpus}")
        asked = f"cuda:{processes.local_rank}"
        torch.cuda.set_device(asked)
    if asked == "auto":
        return "cuda" if cuda else "mps" if mps and not several else "cpu"
    if asked.startswith("cuda") and not cuda:
        raise UserError(f"--device={asked}, but PyTorch {torch.__version__} sees no CUDA here",
                        "--device=auto, or install a CUDA build of PyTorch (pytorch.org/get-started)")
    if asked == "mps" and not mps:
        raise UserError(f"--device=mps, but PyTorch {torch.__version__} sees no Apple GPU here", "--device=auto")
    try:
        if asked.split(":")[0] in ("cpu", "cuda", "mps"):
            torch.zeros(1, device=asked)
            return asked
    except (RuntimeError, AssertionError):  # cuda:7 where there is one GPU
        pass
    raise UserError(f"there is no device {asked!r} here", "--device=auto, cpu, cuda, cuda:1 or mps")


def has_bf16(device):
    """Does the processor itself multiply in bfloat16? Emulated, it is slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    told_older = "AVX2" in os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()  # oneDNN can pretend, for measurements
    if device == "cpu" and not told_older:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def choose_dtype(asked, device):
    """(dtype, reason): bfloat16 where the hardware has it, float16 on older NVIDIA GPUs, else float32."""
    if asked != "auto":
        return getattr(torch, asked), "as asked"
    if has_bf16(device):
        return torch.bfloat16, "this processor multiplies in bfloat16"
    if device.startswith("cuda"):
        return torch.float16, "this GPU has no bfloat16"
    return torch.float32, "this processor has no bfloat16" if device == "cpu" else "the safe choice on this device"


def autocast(device, dtype):
    """The context in which matrix products run in `dtype`, while weights and sums stay in float32."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def linear(layer, x):
    """What nn.Linear does, in the type of its weights. In float32 on a CPU by oneDNN; PyTorch itself would take MKL.

    Measured for the matrices of openllm-small: for one row of the head, 512 x 32,000, oneDNN takes 2.2 ms instead of
    6.1; for one of 512 x 1,536, 41 us instead of 68; for sixteen of 512 x 2,048, 125 instead of 264. And it gives a row
    the same bits among 2 to 16 rows (MKL only among 4, 8 and 12 to 16).
    """
    x = x.to(layer.weight.dtype)
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return F.linear(x, layer.weight, layer.bias)


def use_linear(model, dtype):
    """Have the model's matrix products done by `linear`, with weights that are in `dtype` once and for all.

    The same numbers as autocast, which would convert all weights at every step.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            for name, tensor in list(layer.named_parameters()):
                if tensor.dtype != dtype:  # (a head that is tied to the embedding gets a matrix of its own)
                    setattr(layer, name, nn.Parameter(tensor.to(dtype), requires_grad=False))
            layer.forward = partial(linear, layer)
    return model


def set_up(device, processes=None):
    """Once per process, before any work: settings of PyTorch and of the memory allocator."""
    if device == "cpu":
        if processes is not None and processes.world > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(max(1, cores // processes.local_world))  # torchrun allows 1, however many there are
        # No operation may add numbers in whatever order the threads arrive: then every run gives the same bits. (As
        # torch.use_deterministic_algorithms(True), which also tells the compiler, and takes 1.5 s to import it: see
        # compile_model.) The second line leaves out a debugging aid that fills new tensors.
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        if hasattr(libc, "mallopt"):
            # glibc hands large blocks back to the system when they are freed, and gets them anew, zeroed page by page,
            # at every training step. Keeping them makes a step about a tenth faster.
            M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
            if libc.mallopt(M_MMAP_THRESHOLD, 1 << 30):  # (an old glibc refuses)
                libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    torch.set_float32_matmul_precision("high" if device.startswith("cuda") else "highest")  # TF32 on NVIDIA GPUs


def measure_peak(device, dtype):
    """The most that one large matrix product gets out of this machine, in floating-point operations per second."""
    n = 4096 if device.startswith("cuda") else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    times = []
    while len(times) < 8 and sum(times) < 1:  # (a type that the processor does not have takes seconds)
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def synchronize(device):
    """Wait for the GPU, which works behind the program's back, so that a clock reads the truth."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def peak_memory(device):
    """The most memory that this process has held, in bytes: of the GPU, or of the machine."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device):
    """Bytes that this process could still take: of the GPU, or of the machine; infinity where nothing tells."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    free = math.inf
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/meminfo", encoding="utf-8") as file:
            free = int(next(line for line in file if line.startswith("MemAvailable:")).split()[1]) * 1024
        cgroup = "/sys/fs/cgroup/memory."  # the limit of a container, "max" for none
        with open(cgroup + "stat", encoding="utf-8") as file:  # copies of files count as used, until others need it
            files = sum(int(line.split()[1]) for line in file if line.startswith("inactive_file "))
        with open(cgroup + "max", encoding="utf-8") as limit, open(cgroup + "current", encoding="utf-8") as used:
            free = min(free, int(limit.read()) - int(used.read()) + files)
    return free


def is_out_of_memory(error):
    """Did this exception come from an allocation that failed? (On a CPU, PyTorch has no class of its own for it.)"""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def versions(device, world=1):
    """What the numbers of a run depend on besides its settings."""
    commit = ""
    with contextlib.suppress(OSError):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                                cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip()
    cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    return dict(commit=commit or "unknown", python=platform.python_version(), torch=str(torch.__version__),
                numpy=numpy.__version__, system=platform.system(), device=device, processor=name,
                cpu_capability=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads(),
                processes=world)


def compile_model(model, asked, loss):
    """Have PyTorch compile the parts that take the time; loss() computes one, as a trial. Returns whether it works.

    All blocks run the same code, so compiling one compiles all, however many there are: half a minute for the first
    time on a machine, seconds from PyTorch's cache after that.
    """
    started = time.perf_counter()
    try:
        if next(model.parameters()).device.type == "cpu":
            torch.use_deterministic_algorithms(True)
        for block in model.transformer.h:
            block.compile(dynamic=False)
        model.chunk_loss = torch.compile(model.chunk_loss, dynamic=False)
        loss().backward()
        model.zero_grad(set_to_none=True)
        say(f"compiled in {time.perf_counter() - started:.0f} s")
        return True
    except Exception as error:  # no compiler, an old GPU, Windows: whatever it is, training can do without
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        if asked is True:
            raise UserError(f"compile=true, but torch.compile fails here: {reason}", "--compile=false") from None
        note(f"torch.compile fails here ({reason}); going on without it, slower")
        torch.compiler.set_stance("force_eager")
        model.zero_grad(set_to_none=True)
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Being stopped


class Stopped(Exception):
    """Raised between two micro-batches or two validation batches when a signal asked for the end."""


class StopSignal:
    """Keeps the number of a signal that asks for the end in `signal`, from listen on: SIGINT (Ctrl-C), SIGTERM, and
    SIGHUP (the terminal was closed). One that was ignored before, as SIGHUP is under nohup, stays ignored.

    A second signal ends the process at once. Not so under torchrun: a Ctrl-C reaches a process twice there, from the
    terminal and from torchrun, which kills after half a minute whatever hangs.
    """

    def __init__(self):
        self.signal, self.before = 0, {}
        self.twice_ends = "TORCHELASTIC_RUN_ID" not in os.environ

    def __enter__(self):
        return self

    def listen(self):
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # (Windows has no SIGHUP)
            if number and signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.receive)

    def receive(self, number, frame):
        """It may interrupt anything, a line that is being written too, so it says nothing itself."""
        self.signal = number
        if self.twice_ends:
            signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


class Processes:
    """The processes that train one model together, started by torchrun; or one alone, for which nothing here costs.

    torchrun tells each by environment variables who it is: number RANK of WORLD_SIZE in all, LOCAL_RANK of
    LOCAL_WORLD_SIZE on this machine. sum, highest, gather, first, compare and wait are conversations: every process
    has to call them, in the same order, a call waits for the others, and what it returns is the same in all.
    """

    def __init__(self):
        try:
            self.rank, self.world, self.local_rank = (int(os.environ.get(name) or default) for name, default in (
                ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
            self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or self.world)
        except ValueError as error:
            raise UserError(f"RANK, WORLD_SIZE or LOCAL_RANK is no number: {error}", "unset them, or use torchrun") \
                from None
        if not 0 <= self.rank < self.world:
            raise UserError(f"RANK={self.rank}, but WORLD_SIZE={self.world}", "unset both, or use torchrun")
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if self.world > 1 and missing:
            raise UserError(f"WORLD_SIZE={self.world}, but {missing[0]} is not set",
                            f"torchrun --standalone --nproc_per_node={self.world} train.py ..., or unset WORLD_SIZE")

    def join(self, device, backend, timeout):
        """Meet the others. timeout: seconds after which waiting for them, now or later, is an error.

        Gradients on a GPU travel by nccl, numbers on a CPU by gloo, which works everywhere.
        """
        if self.world == 1:
            return
        cuda = device.startswith("cuda")
        if backend == "nccl" and not cuda:
            note(f"backend=nccl works between GPUs, and the device is {device}: gloo instead")
            backend = "gloo"
        backend = "cpu:gloo,cuda:nccl" if backend in ("auto", "nccl") and cuda else "gloo"
        timeout = datetime.timedelta(seconds=timeout)
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(f"the processes cannot meet at {where}: {str(error).splitlines()[0]}",
                            "torchrun --standalone, which finds a free port, or another MASTER_PORT") from None
        # torchrun keeps this store when it starts everything again, and with it the addresses of processes that are
        # dead: without a part of its own for every attempt, gloo waits for them.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)

    def sum(self, *values):
        """The sums of numbers over all processes, in float64."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def highest(self, value):
        """The largest of the whole numbers that the processes have."""
        if self.world == 1:
            return value
        value = torch.tensor(value)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value.item()

    def gather(self, values):
        """The dicts {key: value} of all processes as one."""
        everyone = [values] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, values)
        return {key: value for values in everyone for key, value in values.items()}

    def first(self, value):
        """What the first process has: for whatever depends on a clock."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def compare(self, facts):
        """Raises UserError, in all of them, where a process has other facts {name: value} than the first one."""
        everyone = [facts] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, facts)
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise UserError(f"process {rank} has {name}={theirs.get(name)}, process 0 has {value}",
                                    "all machines need the same command, the same data/ and the same out/ (a shared "
                                    "disk, or copies)")

    def wait(self):
        """Return when all have come here."""
        self.sum(0)

    def wrap(self, model):
        """The model as it is called in training: several processes get the mean of their gradients in backward()."""
        if self.world == 1:
            return model
        return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def keep(self, wrapped, last):
        """The context of a micro-batch: only the last one sends its gradients, with those before it, to the others."""
        return contextlib.nullcontext() if self.world == 1 or last else wrapped.no_sync()

    def lost(self, error):
        """Does this exception mean that another process has ended, or did not answer in time?"""
        words = "gloo", "Connection closed by peer", "Connection reset", "Timed out", "NCCL", "Broken pipe"
        return self.world > 1 and (isinstance(error, dist.DistError) or any(word in str(error) for word in words))
