# SPDX-License-Identifier: GPL-3.0-only
"""
The log of a run: log.jsonl, one JSON object per line, and loss.svg, its picture.

    log = Log("out/small/log.jsonl", header)
    log.write(dict(step=1, loss=8.3, ...))

The first line, the header, says what the numbers come from: versions, machine, settings, data.
"""
import contextlib
import json
import math
import os

from runtime.console import UserError, duration, note, warn
from runtime.files import open_file, replace_file


class Log:
    """Writes log.jsonl and loss.svg. before: the rows before this step are kept; the others come again."""

    def __init__(self, path, header, before=0):
        self.path, self.picture = path, os.path.join(os.path.dirname(path), "loss.svg")
        self.wandb = None  # a run of Weights & Biases, which gets the same rows
        self.rewrite(header, before)

    def rewrite(self, header, before=math.inf):
        """Write the file anew, with this header and the rows before that step."""
        self.curve = []  # (step, loss, validation loss or None) of every row
        lines, last = [header], 0
        for row in read_rows(self.path):
            if last < row["step"] < before:
                lines.append(row)
                self.add(row)
                last = row["step"]
        try:
            with replace_file(self.path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            self.file = open(self.path, "ab", buffering=1 << 20)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}",
                            "free disk space and rerun to resume", code=1) from None

    def add(self, row):
        self.curve.append((row["step"], row["loss"], row.get("val_loss")))

    def mirror(self, project, name, settings):
        """Send every row to Weights & Biases too, if its package is installed."""
        try:
            import wandb
            self.wandb = wandb.init(project=project, name=name, config=settings)
        except ImportError:
            note("wandb is not installed; log.jsonl has the same numbers")

    def close(self):
        if self.wandb:
            self.wandb.finish()

    def write(self, row):
        """Add a row. Where the disk is full, it waits in the buffer of the file, which holds a megabyte."""
        self.add(row)
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        try:
            line = {name: value if value == value else None for name, value in row.items()}  # JSON has no nan
            self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()
            if "val_loss" in row:
                with replace_file(self.picture, "w", encoding="utf-8") as file:
                    file.write(loss_svg(self.curve))
        except OSError as error:
            warn(f"cannot write {self.path}: {error.strerror}; continuing")


def read_rows(path):
    """The rows of a log.jsonl, a dict per logged step. What a kill left half-written is passed over."""
    with contextlib.suppress(OSError), open_file(path) as file:
        for line in file:
            with contextlib.suppress(Exception):  # half a line, or a stranger's
                row = json.loads(line)
                numbers = [row["step"], row["loss"], row.get("val_loss", 0.0)]
                if row["step"] > 0 and all(map(math.isfinite, numbers)):
                    yield row


def read_header(path):
    """The first line of a log.jsonl; {} where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError), open_file(path) as file:
        header = json.loads(file.readline())
        if isinstance(header, dict) and isinstance(header.get("settings"), dict):
            return header
    return {}


def progress_line(row, max_iters, peak_share, seconds_left):
    """The row of a step as a line. peak_share: of the machine's peak, what one token per second takes.

    step 200/700 | loss 3.512 | lr 0.0028 | norm 0.41 | 11,300 tok/s, 39% of peak | 51 s, 2m03s left
    """
    speed = row["tokens_per_second"]
    end = f"/{max_iters}" if max_iters < math.inf else ""  # a --budget chooses it after some steps
    parts = [f"step {row['step']}{end}", f"loss {row['loss']:.3f}"]
    if "val_loss" in row:
        parts.append(f"validation {row['val_loss']:.4f} = {row['val_bpb']:.4f} bits per byte")
    parts += [f"lr {row['lr']:.2g}", f"norm {row['grad_norm']:.2f}"]
    parts.append(f"{speed:,.0f} tok/s, {speed * peak_share:.0%} of peak")
    time = duration(row["wall_seconds"])
    parts.append(f"{time}, {duration(seconds_left)} left" if end else time)
    return " | ".join(parts)


SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="720" height="400"
     font-family="sans-serif" font-size="12" fill="#444">
<rect width="100%" height="100%" fill="white"/>
<text x="700" y="34" text-anchor="end">nats per token over steps: training grey, validation blue</text>
"""


def loss_svg(curve):
    """The loss curve as an SVG picture. curve: as in Log."""
    every = math.ceil(len(curve) / 1000)  # nobody sees more points
    training = [(step, loss) for step, loss, _ in curve[::every]]
    validation = [(step, loss) for step, _, loss in curve if loss is not None]
    losses = [loss for _, loss in training + validation]
    last, low, high = curve[-1][0], min(losses), max(losses) + 0.1

    def x(step):
        return f"{50 + 650 * step / last:.1f}"

    def y(loss):
        return f"{20 + 340 * (high - loss) / (high - low):.1f}"

    parts = [SVG]
    for i in range(5):  # the axes
        step, loss = last * i // 4, low + (high - low) * i / 4
        parts += [f'<line x1="50" x2="700" y1="{y(loss)}" y2="{y(loss)}" stroke="#ddd"/>',
                  f'<text x="42" y="{y(loss)}" dy="4" text-anchor="end">{loss:.4g}</text>',
                  f'<text x="{x(step)}" y="380" text-anchor="middle">{step}</text>']
    for points, style in ((training, 'stroke="#999"'), (validation, 'stroke="#0969da" stroke-width="2"')):
        places = " ".join(f"{x(step)},{y(loss)}" for step, loss in points)
        parts.append(f'<polyline points="{places}" fill="none" {style}/>')
    parts += [f'<circle cx="{x(step)}" cy="{y(loss)}" r="3" fill="#0969da"/>' for step, loss in validation]
    return "\n".join(parts) + "\n</svg>\n"
