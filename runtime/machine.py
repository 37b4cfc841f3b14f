# SPDX-License-Identifier: GPL-3.0-only
"""
The machine: which device and dtype to use, how much it can compute and hold.

    device = choose_device("auto")
    dtype, why = choose_dtype("auto", device)
    peak = measure_peak(device, dtype)                      # floating-point operations per second, at most
"""
import contextlib
import ctypes
import math
import os
import platform
import subprocess
import sys
import time
from functools import partial

import numpy
import torch
import torch.nn as nn
from torch.nn import functional as F

from runtime.console import UserError, note, say


def choose_device(asked="auto", ranks=None):
    """'cpu', 'cuda', 'cuda:1' or 'mps'; auto takes the best there is. Raises UserError for what this machine lacks.

    Several processes (ranks, see processes.py) get a GPU each, by their number on this machine.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    several = ranks is not None and ranks.world > 1
    if several and cuda and asked in ("auto", "cuda"):
        gpus = torch.cuda.device_count()
        if ranks.local_world > gpus:
            raise UserError(f"{ranks.local_world} processes, but this machine has {gpus} GPUs",
                            f"--nproc_per_node={gpus}")
        asked = f"cuda:{ranks.local_rank}"
        torch.cuda.set_device(asked)
    if asked == "auto" and cuda:
        return "cuda"
    if asked == "auto":
        return "mps" if mps and not several else "cpu"
    if asked.split(":")[0] in ("cpu", "cuda", "mps"):
        with contextlib.suppress(RuntimeError, AssertionError):  # no CUDA, or cuda:7 where there is one GPU
            torch.zeros(1, device=asked)
            return asked
    raise UserError(f"--device={asked}, but PyTorch {torch.__version__} sees no {asked!r} here",
                    "--device=auto, cpu, cuda, cuda:1 or mps; for cuda, a CUDA build of PyTorch "
                    "(pytorch.org/get-started)")


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
    """The context in which matrix products run in `dtype`, while weights and sums stay float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype)


def linear(layer, x):
    """What nn.Linear does, in the dtype of its weights. In float32 on a CPU by oneDNN; PyTorch itself would use MKL.

    Measured with the matrices of openllm-small: one row times the head, 512 x 32,000, takes 2.2 ms in oneDNN and 6.1 in
    MKL; one row times 512 x 1,536, 41 us and 68; sixteen rows times 512 x 2,048, 125 us and 264. And with oneDNN a row
    has the same bits in a batch of 2 to 16 (with MKL only in batches of 4, 8 and 12 to 16).
    """
    x = x.to(layer.weight.dtype)
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return F.linear(x, layer.weight, layer.bias)


def use_linear(model, dtype):
    """Let `linear` do the model's matrix products, with weights converted to `dtype` once and for all.

    Autocast gives the same numbers, but converts all weights at every step.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            for name, tensor in list(layer.named_parameters()):
                if tensor.dtype != dtype:  # (a head that is tied to the embedding gets a matrix of its own)
                    setattr(layer, name, nn.Parameter(tensor.to(dtype), requires_grad=False))
            layer.forward = partial(linear, layer)
    return model


def set_up(device, ranks=None):
    """Once per process, before any work: settings of PyTorch and of the memory allocator."""
    torch.set_float32_matmul_precision("high" if device.startswith("cuda") else "highest")  # TF32 on NVIDIA GPUs
    if device != "cpu":
        return
    if ranks is not None and ranks.world > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // ranks.local_world))  # torchrun sets 1, however many cores there are
    # Every run must give the same bits, so no operation may add numbers in the order in which threads arrive. (This
    # does what torch.use_deterministic_algorithms(True) does, but for the compiler: see compile_model. That one takes
    # 1.5 s of imports.) The second line turns off a debugging aid that fills new tensors.
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        # glibc returns large freed blocks to the system, and gets them back zeroed page by page, at every training
        # step. Keeping them makes a step about 10% faster.
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        if libc.mallopt(M_MMAP_THRESHOLD, 1 << 30):  # (an old glibc refuses)
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def measure_peak(device, dtype):
    """The speed of one large matrix product, the best of up to 8, in floating-point operations per second."""
    def synchronize():  # a GPU works asynchronously: wait for it, so that the clock measures its work
        if device != "cpu":
            torch.accelerator.synchronize(device)

    n = 4096 if device.startswith("cuda") else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    times = []
    while len(times) < 8 and sum(times) < 1:  # (a dtype that the processor lacks takes seconds)
        synchronize()
        start = time.perf_counter()
        a @ a
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def peak_memory(device):
    """The most memory that this process has used so far, in bytes: of the GPU, or of the machine."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device):
    """Bytes that this process could still allocate: on the GPU, or on the machine; infinity where nothing says."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]

    def read(path, name=""):  # the number behind a name in a file of the kernel
        with open(path, encoding="utf-8") as file:
            text = file.read()
        return int(text[text.index(name) + len(name):].split()[0])

    free, cgroup = math.inf, "/sys/fs/cgroup/memory."  # a container has a limit of its own, "max" for none
    with contextlib.suppress(OSError, ValueError, IndexError):
        free = read("/proc/meminfo", "MemAvailable:") * 1024
        cached = read(cgroup + "stat", "inactive_file ")  # cached files count as used, but make room when needed
        free = min(free, read(cgroup + "max") - read(cgroup + "current") + cached)
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
    if device.startswith("cuda"):
        processor = torch.cuda.get_device_name(device)
    else:
        processor = platform.processor() or platform.machine()
    return dict(commit=commit or "unknown", python=platform.python_version(), torch=str(torch.__version__),
                numpy=numpy.__version__, system=platform.system(), device=device, processor=processor,
                cpu_capability=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads(),
                processes=world)


def compile_model(model, required, loss):
    """Let torch.compile speed up the blocks and the loss. Returns whether it works; loss() is the trial.

    All blocks run the same code, so compiling one compiles all, however many there are: half a minute for the first
    time on a machine, seconds from PyTorch's cache after that. required: a failure is an error.
    """
    started = time.perf_counter()
    try:
        if next(model.parameters()).device.type == "cpu":
            torch.use_deterministic_algorithms(True)
        for block in model.transformer.h:
            block.compile(dynamic=False)
        model.chunk_loss = torch.compile(model.chunk_loss, dynamic=False)
        loss().backward()
        say(f"compiled in {time.perf_counter() - started:.0f} s")
        return True
    except Exception as error:  # no compiler, an old GPU, Windows: training works without
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        if required:
            raise UserError(f"compile=true, but torch.compile fails here: {reason}", "--compile=false") from None
        note(f"torch.compile fails here ({reason}); going on without it, slower")
        torch.compiler.set_stance("force_eager")
        return False
    finally:
        model.zero_grad(set_to_none=True)
