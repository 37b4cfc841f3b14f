# SPDX-License-Identifier: GPL-3.0-only
"""
The machine: which device and dtype to use, how fast it is, and how much it holds.

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


def choose_device(asked, ranks=None):
    """'cpu', 'cuda', 'cuda:1' or 'mps'; auto takes the best. Each of several processes (ranks) gets a GPU."""
    several = ranks is not None and ranks.world > 1
    if asked == "auto":
        asked = "cpu"
        if torch.cuda.is_available():
            asked = "cuda"
        elif torch.backends.mps.is_available() and not several:
            asked = "mps"
    if several and asked == "cuda":
        gpus = torch.cuda.device_count()
        if ranks.local_world > gpus:
            fact = f"{ranks.local_world} processes, but this machine has {gpus} GPUs"
            raise UserError(fact, f"--nproc_per_node={gpus}")
        asked = f"cuda:{ranks.local_rank}"
        torch.cuda.set_device(asked)
    try:
        torch.zeros(1, device=asked)
    except (RuntimeError, AssertionError):  # no CUDA, or cuda:7 where there is one GPU
        raise UserError(f"--device={asked}, but PyTorch {torch.__version__} sees no {asked!r} here",
                        "--device=auto; for cuda, a CUDA build of PyTorch (pytorch.org)") from None
    return asked


def has_bf16(device):
    """Does the hardware multiply in bfloat16? Where it is emulated, float32 is faster."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    pretends = "AVX2" in os.environ.get("ONEDNN_MAX_CPU_ISA", "")  # to be an older processor
    if device != "cpu" or pretends:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_dtype(asked, device):
    """(dtype, reason)."""
    if asked != "auto":
        return getattr(torch, asked), "as asked"
    if has_bf16(device):
        return torch.bfloat16, "this processor supports bfloat16"
    if device.startswith("cuda"):
        return torch.float16, "this GPU has no bfloat16"
    return torch.float32, f"this {device} has no bfloat16"


def autocast(device, dtype):
    """The context in which matrix products run in `dtype`; weights and sums stay float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype)


def linear(layer, x):
    """nn.Linear in the dtype of its weights; float32 on a CPU by oneDNN, where PyTorch would use MKL.

    One row times 512 x 32,000 takes 2.2 ms, in MKL 6.1, and has the same bits in any batch of 2 to 16.
    """
    x = x.to(layer.weight.dtype)
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return F.linear(x, layer.weight, layer.bias)


def use_linear(model, dtype):
    """Let `linear` do the matrix products, with weights converted to `dtype` once, not always."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            for name, tensor in list(layer.named_parameters()):
                if tensor.dtype != dtype:  # (a head that is tied to the embedding gets a matrix of its own)
                    setattr(layer, name, nn.Parameter(tensor.to(dtype), requires_grad=False))
            layer.forward = partial(linear, layer)
    return model


def set_up(device, ranks=None):
    """Settings of PyTorch and of the memory allocator, once per process."""
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32
    if device != "cpu":
        return
    if ranks is not None and ranks.world > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // ranks.local_world))  # torchrun sets 1, however many there are
    # No operation may add numbers in the order in which threads arrive. This is use_deterministic_algorithms
    # without its 1.5 s of imports; for the compiler, see compile_model. The second line ends a debugging aid.
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        # Else glibc returns large blocks to the system at every step, and gets them back zeroed: 10% longer.
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        if libc.mallopt(M_MMAP_THRESHOLD, 1 << 30):  # (an old glibc refuses)
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def measure_peak(device, dtype):
    """Floating-point operations per second of a large matrix product, the best of up to 8."""
    n = 4096 if device.startswith("cuda") else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    times = []
    while len(times) < 8 and sum(times) < 1:  # (a dtype that the processor lacks takes seconds)
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def peak_memory(device):
    """The most bytes that this process has used so far, of the GPU or of the machine."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device):
    """Bytes that this process could still allocate, on the GPU or on the machine; infinity if unknown."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]

    def read(path, name=""):  # the number behind a name in a file of the kernel
        with open(path, encoding="utf-8") as file:
            text = file.read()
        return int(text[text.index(name) + len(name):].split()[0])

    free, cgroup = math.inf, "/sys/fs/cgroup/memory."  # a container has a limit of its own, "max" for none
    with contextlib.suppress(OSError, ValueError, IndexError):
        free = read("/proc/meminfo", "MemAvailable:") * 1024
        cached = read(cgroup + "stat", "inactive_file ")  # counts as used, but makes room when needed
        free = min(free, read(cgroup + "max") - read(cgroup + "current") + cached)
    return free


def is_out_of_memory(error):
    """Did an allocation fail? (On a CPU, PyTorch has no class for it.)"""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def versions(device, world=1):
    """What the numbers depend on besides the settings."""
    here, commit = os.path.dirname(os.path.abspath(__file__)), ""
    with contextlib.suppress(OSError):
        command = ["git", "-C", here, "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    processor = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return dict(commit=commit or "unknown", python=platform.python_version(), torch=str(torch.__version__),
                numpy=numpy.__version__, system=platform.system(), device=device, processor=processor,
                cpu_capability=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads(),
                processes=world)


def compile_model(model, required, loss):
    """Let torch.compile speed up the blocks and the loss. Returns whether it works; loss() is the trial.

    All blocks run the same code, so compiling one compiles all: half a minute, or seconds from the cache.
    required: where it fails, that is an error.
    """
    started = time.perf_counter()
    say("compiling: about half a minute, or seconds if cached")
    try:
        if next(model.parameters()).device.type == "cpu":
            torch.use_deterministic_algorithms(True)
        for block in model.transformer.h:
            block.compile(dynamic=False)
        model.chunk_loss = torch.compile(model.chunk_loss, dynamic=False)
        loss().backward()
        say(f"compiled in {time.perf_counter() - started:.0f} s")
        return True
    except Exception as error:  # no compiler, an old GPU, Windows
        if is_out_of_memory(error):
            raise
        first_line = str(error).strip().partition("\n")[0]
        fact = f"torch.compile fails here: {first_line[:200]}"
        if "C++ compiler" in first_line:
            fact = "torch.compile needs a C++ compiler, such as g++"
        if required:
            raise UserError(fact, "--compile=false") from None
        note(f"{fact}; continuing without it")
        torch.compiler.set_stance("force_eager")
        return False
    finally:
        model.zero_grad(set_to_none=True)
