# SPDX-License-Identifier: GPL-3.0-only
"""
The machine and the disk: which device and number type to use, and how a checkpoint is written and read.

    device = choose_device("auto"); dtype, why = choose_dtype("auto", device)
    save_checkpoint("out/small/ckpt_00001000.pt", {"model": model.state_dict(), "step": 1000, ...})
    model, tokenizer, checkpoint = load_run("out/small", device=device)

Two rules make a checkpoint something to rely on. A file bears its final name only when it is whole and on the disk, so
that whatever happens, the newest checkpoint is a good one. And it holds tensors and plain values only and is read with
weights_only=True, so that opening a stranger's file cannot run a stranger's code.
"""
import collections
import contextlib
import ctypes
import glob
import json
import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import time
import zipfile

import numpy
import torch

import tokenizer as tokenizers
from config import UserError, note, say, warn
from model import GPT, GPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# The machine


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


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path, state):
    """Write `state`: when this returns, the file is on the disk under its name; when it raises, nothing has changed."""
    part = path + ".part"
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the bytes are on the disk ...
        os.replace(part, path)  # ... before they get their name, which is one indivisible step ...
        with contextlib.suppress(PermissionError):  # (Windows cannot open a folder)
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)  # ... and the name is on the disk before anything older is deleted
            finally:
                os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        if isinstance(error, (OSError, RuntimeError)):  # torch's writer says RuntimeError where the disk is full
            raise UserError(f"cannot write {path}: {error}", "make room; the same command goes on from the checkpoint "
                            "before") from None
        raise


def load_checkpoint(path):
    """Read what save_checkpoint wrote, onto the CPU. Raises UserError for a file that is missing, damaged or unsafe."""
    try:
        with zipfile.ZipFile(path) as archive:  # that is what it is, and torch.load does not look at the checksums
            bad = archive.testzip()
        if bad:
            raise zipfile.BadZipFile(f"{bad} has another checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}", "give a run folder or a .pt file of one") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors and plain values; opening it could run code, so it is refused",
                        "use a checkpoint that was saved with plain values only") from None
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or no checkpoint: {error}", "use another one of the same run") from None
    needed = {"settings": dict, "model": dict, "step": int, "tokenizer_sha256": str, "source": list}
    if not isinstance(state, dict) or state.get("format") != 1 or not all(
            isinstance(state.get(name), kind) for name, kind in needed.items()):
        raise UserError(f"{path} is not a checkpoint of this project (no format 1)", "python train.py trains one")
    return state


def checkpoints(run):
    """The numbered checkpoints of a run folder, oldest first: by the number in the name, not by the clock."""
    return sorted(glob.glob(os.path.join(glob.escape(run), "ckpt_" + "[0-9]" * 8 + ".pt")))


def find_checkpoint(init_from, out_dir):
    """The newest readable checkpoint of this run, or None for a new one."""
    paths = checkpoints(out_dir)
    if paths and init_from == "scratch":
        raise UserError(f"init_from=scratch, but {out_dir} holds {os.path.basename(paths[-1])}",
                        f"--out_dir=out/ANOTHER, or delete {out_dir} yourself")
    if not paths and init_from == "resume":
        raise UserError(f"init_from=resume, but {out_dir} holds no checkpoint", "leave out --init_from: a new run")
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except UserError as error:
            if path == paths[0]:
                raise
            warn(f"{error.fact}; taking the one before")
    return None


def prune_checkpoints(run, keep=2):
    """Delete all numbered checkpoints but the last `keep` (two: a dying disk may cut one), and what a kill left."""
    for path in checkpoints(run)[:-keep] + glob.glob(os.path.join(glob.escape(run), "*.pt.part")):
        os.unlink(path)


def find_run(where="out"):
    """The run below `where` that was written last."""
    runs = {path: os.path.getmtime(path) for path in glob.glob(os.path.join(where, "**", "*.pt"), recursive=True)
            if os.path.basename(path).startswith(("best", "ckpt_"))}
    if not runs:
        raise UserError(f"there is no trained run below {where}/", "python train.py config/train_small.py")
    return os.path.dirname(max(runs, key=runs.get))


def choose_run(bare, settings):
    """The RUN that the command line means: a bare argument, --init_from, --out_dir, or the newest one below out/."""
    if len(bare) > 1:
        raise UserError(f"one RUN is enough, but there are {len(bare)}: {' '.join(bare)}", f"give one: {bare[0]}")
    init_from = "" if settings.init_from == "resume" else settings.init_from  # nanoGPT's word for --out_dir
    named = bare[0] if bare else init_from or settings.out_dir
    if named and not os.path.exists(named):
        raise UserError(f"there is no run {named}", "python train.py config/train_small.py trains one into out/small")
    return named or find_run()


def checkpoint_path(run, which="best"):
    """The checkpoint file of a RUN: a file as it is; of a folder the best one, or with which='last' the newest."""
    if os.path.isfile(run):
        return run
    best, numbered = os.path.join(run, "best.pt"), checkpoints(run)
    if which == "best" and os.path.exists(best):
        return best
    if numbered:
        return numbered[-1]
    raise UserError(f"there is no trained run in {run} (no best.pt, no ckpt_*.pt)",
                    "python train.py config/train_small.py trains one")


def load_run(run, which="best", device="cpu"):
    """(model in eval mode on `device`, its tokenizer, the rest of the checkpoint) of a RUN."""
    path = checkpoint_path(run, which)
    checkpoint = load_checkpoint(path)
    try:
        model = GPT(GPTConfig(**{name: checkpoint["settings"][name] for name in GPTConfig.__dataclass_fields__}))
    except (AssertionError, KeyError, TypeError) as error:
        raise UserError(f"{path} describes no model that can be built: {error}", "use another checkpoint") from None
    load_weights(model, checkpoint.pop("model"), path)
    tokenizer = tokenizers.load_from(os.path.dirname(path) or ".", checkpoint["tokenizer_sha256"])
    return model.to(device).eval(), tokenizer, checkpoint | {"path": path}


def load_weights(model, weights, path):
    """Copy weights into the model. Raises UserError that names the first tensor that is missing or misshapen."""
    for name, expected in model.state_dict().items():
        if name not in weights or weights[name].shape != expected.shape:
            has = f"{name} of shape {tuple(weights[name].shape)}" if name in weights else f"no {name}"
            raise UserError(f"{path} has {has}, but the model has {tuple(expected.shape)} there",
                            "use the settings that the checkpoint was trained with")
    model.load_state_dict(weights, strict=False)


# ---------------------------------------------------------------------------------------------------------------------
# A run while it is running


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


class Log:
    """log.jsonl: a header line that says what the numbers come from, then one row per logged step; and its picture.

    `curve` has (step, loss, validation loss or None) of every row. A log that continues one keeps its rows before
    step `before`: those from there on belong to updates that were lost with the process, and come again.
    """

    def __init__(self, path, header, before=0):
        self.path, self.curve = path, []
        self.rewrite(header, before)

    def rewrite(self, header, before=math.inf):
        rows, self.curve = self.read() if before else [], []
        with open(self.path + ".part", "w", encoding="utf-8") as file:
            file.write(json.dumps(header) + "\n")
            for row in rows:
                if row["step"] < before:
                    file.write(json.dumps(row) + "\n")
                    self.curve.append((row["step"], row["loss"], row.get("val_loss")))
        os.replace(self.path + ".part", self.path)

    def read(self):
        """The rows of the file, one at a time; half a line, which a kill may leave at the end, is none."""
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    row = parse_row(line)
                    if row:
                        yield row

    def write(self, row):
        self.curve.append((row["step"], row["loss"], row.get("val_loss")))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if "val_loss" in row:
            with open(os.path.join(os.path.dirname(self.path), "loss.svg"), "w", encoding="utf-8") as file:
                file.write(loss_svg(self.curve))


def parse_row(line):
    """A line of a log.jsonl as a row; an empty one for the header, for half a line, and for what is no row at all."""
    try:
        row = json.loads(line) if line.endswith("\n") else {}
        return row if isinstance(row["step"], int) and isinstance(row["loss"], float) else {}
    except (ValueError, KeyError, TypeError):
        return {}


def last_row(path):
    """The last row of a log.jsonl, or an empty one."""
    with contextlib.suppress(OSError, IndexError), open(path, encoding="utf-8", errors="replace") as file:
        return parse_row(collections.deque(file, maxlen=1)[0])
    return {}


def loss_svg(curve, width=720, height=400):
    """The loss curve as an SVG picture: grey the training loss, blue the validation loss, in nats per token.

    curve: (step, loss, validation loss or None) of every logged step.
    """
    last = curve[-1][0]
    training = [(step, loss) for step, loss, _ in curve[::math.ceil(len(curve) / 1000)]]  # more points nobody can see
    validation = [(step, loss) for step, _, loss in curve if loss is not None]
    seen = [loss for _, loss in training + validation]
    low, high = math.floor(min(seen) * 2) / 2, math.ceil(max(seen) * 2) / 2
    high = max(high, low + 0.5)

    def x(step):
        return f"{50 + (width - 70) * step / last:.1f}"

    def y(loss):
        return f"{20 + (height - 60) * (high - loss) / (high - low):.1f}"

    def line(points, style):
        return f'<polyline points="{" ".join(f"{x(s)},{y(v)}" for s, v in points)}" fill="none" {style}/>'

    parts = []
    unit = 0.5 if high - low < 5 else 1
    for value in (low + i * unit for i in range(int((high - low) / unit) + 1)):
        parts += [f'<line x1="50" x2="{width - 20}" y1="{y(value)}" y2="{y(value)}" stroke="#ddd"/>',
                  f'<text x="42" y="{y(value)}" dy="4" text-anchor="end">{value:g}</text>']
    parts += [f'<text x="{x(last * i // 4)}" y="{height - 20}" text-anchor="middle">{last * i // 4}</text>'
              for i in range(5)]
    parts += [line(training, 'stroke="#999"'), line(validation, 'stroke="#0969da" stroke-width="2"')]
    parts += [f'<circle cx="{x(step)}" cy="{y(loss)}" r="3" fill="#0969da"/>' for step, loss in validation]
    parts += [f'<text x="{width - 20}" y="34" text-anchor="end">loss in nats per token over updates: training grey, '
              'validation blue</text>']
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
            'font-size="12" fill="#444">\n<rect width="100%" height="100%" fill="white"/>\n'
            + "\n".join(parts) + "\n</svg>\n")
