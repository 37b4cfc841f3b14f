# SPDX-License-Identifier: GPL-3.0-only
"""
The log of a run: log.jsonl, one JSON object per line, and loss.svg, its picture.

    log = Log("out/small/log.jsonl", header)
    log.write(dict(step=1, loss=8.3, ...))

The first line, the header, says what the numbers come from: versions, machine, settings, data. Every other line is a
logged step.
"""
import collections
import contextlib
import itertools
import json
import math
import os

from runtime.console import UserError, warn
from runtime.files import open_file, replace_file


class Log:
    """Writes log.jsonl and loss.svg.

    before: a resumed run keeps the rows before this step; those from there on were lost with the process, and come
        again.
    unwritten: rows that a full disk held back. A checkpoint carries them, so that a kill does not lose them.
    """

    def __init__(self, path, header, before=0, unwritten=""):
        self.path, self.unwritten = path, unwritten
        self.curve = []  # (step, loss, validation loss or None) of every row
        self.rewrite(header, before)

    def rewrite(self, header, before=math.inf):
        """Write the file anew, with this header and the rows before that step, each step once."""
        rows = list(read_rows(self.path, self.unwritten)) if before else []
        self.curve = []
        try:
            with replace_file(self.path, "w", encoding="utf-8") as file:
                file.write(json.dumps(header) + "\n")
                last = 0
                for row in rows:
                    if last < row["step"] < before:
                        file.write(json.dumps(row) + "\n")
                        self.add(row)
                        last = row["step"]
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}", "make room; the same command continues",
                            code=1) from None
        self.unwritten = ""

    def add(self, row):
        self.curve.append((row["step"], row["loss"], row.get("val_loss")))

    def since_best(self, loss):
        """How many validations have passed since the one with the lowest loss; the last of them has this loss."""
        losses = [validation for _, _, validation in self.curve if validation is not None] + [loss]
        return len(losses) - 1 - losses.index(min(losses))

    def write(self, row):
        """Add a row. If the disk is full, keep it for the next time: a run is worth more than its log."""
        self.add(row)
        self.unwritten += json.dumps(row) + "\n"
        try:
            size = os.path.getsize(self.path)
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(self.unwritten)
            except OSError:
                os.truncate(self.path, size)  # half a line, which the next one would be appended to
                raise
            self.unwritten = ""
            if "val_loss" in row:
                with replace_file(os.path.join(os.path.dirname(self.path), "loss.svg"), "w", encoding="utf-8") as file:
                    file.write(loss_svg(self.curve))
        except OSError as error:
            warn(f"cannot write {self.path}: {error.strerror}; going on")


def read_rows(path, unwritten=""):
    """The rows of a log.jsonl, one at a time. An unfinished last line (after a kill) is skipped."""
    if os.path.exists(path):
        with open_file(path, mode="r", encoding="utf-8", errors="replace") as file:
            for line in itertools.chain(file, unwritten.splitlines()):
                if row := parse_row(line):
                    yield row


def parse_row(line):
    """A line of a log.jsonl as a row; {} for the header, half a line, and anything else that is no row."""
    try:
        row = json.loads(line)
        numbers = [row["step"], row["loss"], row.get("val_loss", 0.0)]
        return row if row["step"] > 0 and all(map(math.isfinite, numbers)) else {}
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return {}


def read_header(path):
    """The first line of a log.jsonl; {} where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError), open_file(path) as file:
        header = json.loads(file.readline())
        if isinstance(header, dict) and isinstance(header.get("settings"), dict):
            return header
    return {}


def last_row(path):
    """The last row of a log.jsonl, or {}."""
    rows = collections.deque(read_rows(path), maxlen=1)
    return rows[0] if rows else {}


def progress_line(row, max_iters, peak_share):
    """The row of a step as a line; peak_share: what share of the machine's peak one token per second is.

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
    """The loss curve as an SVG picture: grey the training loss, blue the validation loss, in nats per token.

    curve: (step, loss, validation loss or None) of every logged step.
    """
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

    power = 10.0 ** math.floor(math.log10((high - low) / 10))
    unit = next(n * power for n in (1, 2, 5, 10) if 10 * n * power >= high - low)  # at most ten lines
    unit = max(0.5, unit)
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
