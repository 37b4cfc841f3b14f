# SPDX-License-Identifier: GPL-3.0-only
"""
The log of a run: log.jsonl, one JSON object a line, and its picture, loss.svg.

    log = Log("out/small/log.jsonl", header)
    log.write(dict(step=1, loss=8.3, ...))

The first line says what the numbers come from: versions, machine, settings, data. Each other line is an update.
"""
import collections
import contextlib
import json
import math
import os


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
