# SPDX-License-Identifier: GPL-3.0-only
"""
The machine: which device and number type to use, what this machine can do, and when someone wants it back.

    device = choose_device("auto")
    dtype, why = choose_dtype("auto", device)
    peak = measure_peak(device, dtype)                      # the most floating-point operations per second
"""
import contextlib
import ctypes
import os
import platform
import signal
import subprocess
import sys
import time

import numpy
import torch

from config import UserError, note, say


def choose_device(asked="auto"):
    """'cpu', 'cuda', 'cuda:1' or 'mps'; auto takes the best there is. Raises UserError for what this machine lacks."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if asked == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
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


def set_up(device):
    """Once per process, before any work: settings of PyTorch and of the memory allocator."""
    if device == "cpu":
        # Compiled code adds the gradients of an embedding in whatever order the threads arrive, unless told not to;
        # with this, every run gives the same bits. The second line leaves out a debugging aid that fills new tensors.
        torch.use_deterministic_algorithms(True)
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
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


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


def versions(device):
    """What the numbers of a run depend on besides its settings."""
    commit = ""
    with contextlib.suppress(OSError):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                                cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip()
    cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    return dict(commit=commit or "unknown", python=platform.python_version(), torch=str(torch.__version__),
                numpy=numpy.__version__, system=platform.system(), device=device, processor=name,
                cpu_capability=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads())


def compile_model(model, asked, loss):
    """Have PyTorch compile the parts that take the time; loss() computes one, as a trial. Returns whether it works.

    All blocks run the same code, so compiling one compiles all, however many there are: half a minute for the first
    time on a machine, seconds from PyTorch's cache after that.
    """
    started = time.perf_counter()
    try:
        for block in model.transformer.h:
            block.compile(dynamic=False)
        model.loss = torch.compile(model.loss, dynamic=False)
        loss().backward()
        model.zero_grad(set_to_none=True)
        say(f"compiled in {time.perf_counter() - started:.0f} s")
        return True
    except Exception as error:  # no compiler, an old GPU, Windows: whatever it is, training can do without
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        if asked is True:
            raise UserError(f"compile=true, but torch.compile fails here: {reason}", "--compile=false") from None
        note(f"torch.compile fails here ({reason}); going on without it, slower")
        torch.compiler.set_stance("force_eager")
        model.zero_grad(set_to_none=True)
        return False


class Stopped(Exception):
    """Raised between two micro-batches or two validation batches when a signal asked for the end."""


class StopSignal:
    """Notes a SIGINT (Ctrl-C) or SIGTERM in `signal`, from listen to ignore; a second one ends the process at once."""

    def __init__(self):
        self.signal = 0

    def listen(self):
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def ignore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        say(f"\n{signal.Signals(number).name}: saving; once more to stop at once")
