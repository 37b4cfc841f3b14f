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

from runtime.console import UserError, warn
from runtime.files import open_file, replace_file


class Log:
    """Writes log.jsonl and loss.svg.

    before: a resumed run keeps the rows before this step; the others were lost with the process, and come again.
    """

    def __init__(self, path, header, before=0):
        self.path = path
        self.rewrite(header, before)

    def rewrite(self, header, before=math.inf):
        """Write the file anew, with this header and the rows before that step, each step once."""
        rows = list(read_rows(self.path)) if before else []
        self.curve = []  # (step, loss, validation loss or None) of every row
        last = 0
        try:
            with replace_file(self.path, "w", encoding="utf-8") as file:
                file.write(json.dumps(header) + "\n")
                for row in rows:
                    if last < row["step"] < before:
                        file.write(json.dumps(row) + "\n")
                        self.add(row)
                        last = row["step"]
            self.file = open(self.path, "ab", buffering=1 << 20)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}", "make room; the same command continues",
                            code=1) from None

    def add(self, row):
        self.curve.append((row["step"], row["loss"], row.get("val_loss")))

    def write(self, row):
        """Add a row. Where the disk is full, it waits in the buffer of the file, which holds a megabyte."""
        self.add(row)
        try:
            self.file.write(json.dumps(row).encode() + b"\n")
            self.file.flush()
            if "val_loss" in row:
                with replace_file(os.path.join(os.path.dirname(self.path), "loss.svg"), "w", encoding="utf-8") as file:
                    file.write(loss_svg(self.curve))
        except OSError as error:
            warn(f"cannot write {self.path}: {error.strerror}; going on")


def read_rows(path):
    """The rows of a log.jsonl, one dict per logged step. What a kill left half-written is passed over."""
    with contextlib.suppress(OSError), open_file(path) as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError, OverflowError):
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


def progress_line(row, max_iters, peak_share):
    """The row of a step as a line; peak_share: the share of the machine's peak that one token per second takes.

    step 200/700 | loss 3.512 | lr 0.0028 | norm 0.41 | 11,300 tok/s, 39% of peak | 2m03s left
    """
    speed = row["tokens_per_second"]
    left = (max_iters - row["step"]) * row["train_seconds"] / row["step"]
    parts = [f"step {row['step']}/{max_iters}", f"loss {row['loss']:.3f}"]
    if "val_loss" in row:
        parts.append(f"validation {row['val_loss']:.4f} = {row['val_bpb']:.4f} bits per byte")
    parts += [f"lr {row['lr']:.2g}", f"norm {row['grad_norm']:.2f}",
              f"{speed:,.0f} tok/s, {speed * peak_share:.0%} of peak", f"{left // 60:.0f}m{left % 60:02.0f}s left"]
    return " | ".join(parts)


def loss_svg(curve, width=720, height=400):
    """The loss curve as an SVG picture. curve: (step, loss, validation loss or None) of every logged step."""
    last = curve[-1][0]
    training = [(step, loss) for step, loss, _ in curve[::math.ceil(len(curve) / 1000)]]  # nobody sees more points
    validation = [(step, loss) for step, _, loss in curve if loss is not None]
    losses = [loss for _, loss in training + validation]
    low, high = math.floor(min(losses) * 2) / 2, math.ceil(max(losses) * 2) / 2
    high = max(high, low + 0.5)

    def x(step):
        return f"{50 + (width - 70) * step / last:.1f}"

    def y(loss):
        return f"{20 + (height - 60) * (high - loss) / (high - low):.1f}"

    def line(points, style):
        places = " ".join(f"{x(step)},{y(loss)}" for step, loss in points)
        return f'<polyline points="{places}" fill="none" {style}/>'

    unit = max(0.5, 2.0 ** math.ceil(math.log2((high - low) / 10)))  # at most ten lines
    first = math.ceil(low / unit) * unit
    parts = ruling([first + i * unit for i in range(int((high - first) / unit) + 1)], y, width)
    for step in (last * i // 4 for i in range(5)):
        parts.append(f'<text x="{x(step)}" y="{height - 20}" text-anchor="middle">{step}</text>')
    parts += [line(training, 'stroke="#999"'), line(validation, 'stroke="#0969da" stroke-width="2"')]
    parts += [f'<circle cx="{x(step)}" cy="{y(loss)}" r="3" fill="#0969da"/>' for step, loss in validation]
    parts += [f'<text x="{width - 20}" y="34" text-anchor="end">loss in nats per token over steps: training grey, '
              'validation blue</text>']
    return svg(parts, width, height)


def ruling(values, y, width):
    """Horizontal lines of a picture, each with its value."""
    parts = []
    for value in values:
        parts += [f'<line x1="50" x2="{width - 20}" y1="{y(value)}" y2="{y(value)}" stroke="#ddd"/>',
                  f'<text x="42" y="{y(value)}" dy="4" text-anchor="end">{value:g}</text>']
    return parts


def svg(parts, width, height):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
            'font-size="12" fill="#444">\n<rect width="100%" height="100%" fill="white"/>\n'
            + "\n".join(parts) + "\n</svg>\n")
