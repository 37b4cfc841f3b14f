# SPDX-License-Identifier: GPL-3.0-only
"""
The log of a run: log.jsonl, one JSON object a line, and its picture, loss.svg.

    log = Log("out/small/log.jsonl", header)
    log.write(dict(step=1, loss=8.3, ...))

The first line says what the numbers come from: versions, machine, settings, data. Each other line is an update.
"""
import collections
import contextlib
import itertools
import json
import math
import os

from runtime.files import new_file, open_file
from runtime.console import UserError, warn


class Log:
    """log.jsonl: a header line that says what the numbers come from, then one row per logged step; and its picture.

    `curve` has (step, loss, validation loss or None) of every row. A log that continues one keeps its rows before
    step `before`: those from there on belong to updates that were lost with the process, and come again. `unwritten`
    has rows that a full disk held back; the checkpoint carries them, so that a kill does not lose them.
    """

    def __init__(self, path, header, before=0, unwritten=""):
        self.path, self.curve, self.unwritten = path, [], unwritten
        self.rewrite(header, before)

    def rewrite(self, header, before=math.inf):
        rows, self.curve, last = read_rows(self.path, self.unwritten) if before else [], [], 0
        try:
            with new_file(self.path + ".part", "x", encoding="utf-8") as file:
                file.write(json.dumps(header) + "\n")
                for row in rows:
                    if last < row["step"] < before:
                        file.write(json.dumps(row) + "\n")
                        self.curve.append((row["step"], row["loss"], row.get("val_loss")))
                        last = row["step"]
            os.replace(self.path + ".part", self.path)
            self.unwritten = ""
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}", "make room; the same command continues",
                            code=1) from None

    def since_best(self, loss):
        """How many validations have passed since the one with the lowest loss; the last of them has this loss."""
        losses = [validation for _, _, validation in self.curve if validation is not None] + [loss]
        return len(losses) - 1 - losses.index(min(losses))

    def write(self, row):
        """Add a row. Where the disk is full, it waits in memory for the next: the run is worth more than its log."""
        self.curve.append((row["step"], row["loss"], row.get("val_loss")))
        self.unwritten += json.dumps(row) + "\n"
        try:
            size = os.path.getsize(self.path)
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(self.unwritten)
            except OSError:
                os.truncate(self.path, size)  # half a line would look like a whole one with the next behind it
                raise
            self.unwritten = ""
            if "val_loss" in row:
                picture = os.path.join(os.path.dirname(self.path), "loss.svg")
                with new_file(picture + ".part", "x", encoding="utf-8") as file:
                    file.write(loss_svg(self.curve))
                os.replace(picture + ".part", picture)
        except OSError as error:
            warn(f"cannot write {self.path}: {error.strerror}; going on")


def read_rows(path, unwritten=""):
    """The rows of a log.jsonl, one at a time; half a line, which a kill may leave at the end, is none."""
    if os.path.exists(path):
        with open_file(path, mode="r", encoding="utf-8", errors="replace") as file:
            for line in itertools.chain(file, unwritten.splitlines(keepends=True)):
                row = parse_row(line)
                if row:
                    yield row


def parse_row(line):
    """A line of a log.jsonl as a row; an empty one for the header, for half a line, and for what is no row at all."""
    try:
        row = json.loads(line) if line.endswith("\n") else {}
        numbers = [row["loss"], row.get("val_loss", 0.0)]
        finite = all(isinstance(number, float) and abs(number) < 1e39 for number in numbers)
        return row if finite and isinstance(row["step"], int) and row["step"] > 0 else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def read_header(path):
    """The first line of a log.jsonl; an empty one where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError), open_file(path) as file:
        header = json.loads(file.readline())
        return header if isinstance(header, dict) and isinstance(header.get("settings"), dict) else {}
    return {}


def last_row(path):
    """The last row of a log.jsonl, or an empty one."""
    with contextlib.suppress(OSError, IndexError), open_file(path) as file:
        return parse_row(collections.deque(file, maxlen=1)[0].decode(errors="replace"))
    return {}


def progress_line(row, max_iters, token_share):
    """The row of an update as a line; token_share: the share of the machine's peak that a token per second takes.

    step 200/700 | loss 3.512 | lr 0.0028 | norm 0.41 | 11,300 tok/s, 39% of peak | 2m03s left"""
    left = (max_iters - row["step"]) * row["train_seconds"] / row["step"]
    validated = f"validation {row['val_loss']:.4f} = {row['val_bpb']:.4f} bits per byte | " if "val_loss" in row else ""
    return (f"step {row['step']}/{max_iters} | loss {row['loss']:.3f} | {validated}lr {row['lr']:.2g} | norm "
            f"{row['grad_norm']:.2f} | {row['tokens_per_second']:,.0f} tok/s, "
            f"{row['tokens_per_second'] * token_share:.0%} of peak | {left // 60:.0f}m{left % 60:02.0f}s left")


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

    power = 10.0 ** math.floor(math.log10((high - low) / 10))
    unit = max(0.5, next(n * power for n in (1, 2, 5, 10) if 10 * n * power >= high - low))  # at most ten lines
    first = math.ceil(low / unit) * unit
    parts = ruling([first + i * unit for i in range(int((high - first) / unit) + 1)], y, width)
    parts += [f'<text x="{x(last * i // 4)}" y="{height - 20}" text-anchor="middle">{last * i // 4}</text>'
              for i in range(5)]
    parts += [line(training, 'stroke="#999"'), line(validation, 'stroke="#0969da" stroke-width="2"')]
    parts += [f'<circle cx="{x(step)}" cy="{y(loss)}" r="3" fill="#0969da"/>' for step, loss in validation]
    parts += [f'<text x="{width - 20}" y="34" text-anchor="end">loss in nats per token over updates: training grey, '
              'validation blue</text>']
    return svg(parts, width, height)


def ruling(values, y, width):
    """Level lines of a picture, each with its value."""
    return [part for value in values for part in (
        f'<line x1="50" x2="{width - 20}" y1="{y(value)}" y2="{y(value)}" stroke="#ddd"/>',
        f'<text x="42" y="{y(value)}" dy="4" text-anchor="end">{value:g}</text>')]


def svg(parts, width, height):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
            'font-size="12" fill="#444">\n<rect width="100%" height="100%" fill="white"/>\n'
            + "\n".join(parts) + "\n</svg>\n")
