# SPDX-License-Identifier: GPL-3.0-only
"""
Report: what evaluate.py has found, as tables for the terminal and as one page.

    print(tables(results))
    page(results)                                           # report.html with the results in it
"""
import json
import os

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report.html")
HEADINGS = {"accuracy": "right", "per_byte": "per byte", "f1": "F1", "exact": "exact", "format": "in format"}
TASK_NOTES = {
    "calibration_error": "calibration error {calibration_error:.2f} ({who})",
    "cut": "{cut} prompts cut at their beginning, to fit ({who})",
    "chat": "in the chat format ({who})"}


def cell(value, form):
    return "–" if value is None else format(value, form)


def large(number):
    return cell(number, ",.0f" if number and number >= 100 else ".2f")


def percent(score):
    """{"value", "error"} in percent: 61.0 ± 4.9"""
    if score is None:
        return "–"
    error = "" if score["error"] is None else f" ± {100 * score['error']:.1f}"
    return f"{100 * score['value']:.1f}{error}"


def variety(found):
    found = found or {}
    row = {"sample words": cell(found.get("words"), ",")}
    for name in ("distinct-1", "distinct-2", "repetition"):
        row[name] = cell(found.get(name.replace("-", "_")), ".2f")
    return row


def columns(results):
    """The models as rows {heading: cell} of two tables: what counts most, and the rest."""
    texts, models = results["texts"], results["models"]
    first, rest = [], []
    for model in models:
        row = {"model": model["model"], "parameters": f"{model['parameters']:,}"}
        more = {"model": model["model"]}
        for name in texts:
            found = model["texts"].get(name, {})
            where = f" on {name}" if len(texts) > 1 else ""
            row[f"bits per byte{where}"] = cell(found.get("bits_per_byte"), ".4f")
        if len(texts) == 1:
            row["perplexity per token"] = large(found.get("perplexity"))
            row["per word"] = large(found.get("word_perplexity"))
        row["tokens/s"] = large(model["tokens_per_second"])
        for name, task in every_task(results).items():
            found = model["tasks"].get(name, {}).get("metrics", {})
            for i, metric in enumerate(task["metrics"]):
                table = more if i else row
                table[f"{name}: {HEADINGS[metric]}"] = percent(found.get(metric))
        if any(model["quality"] for model in models):
            more |= variety(model["quality"])
        first.append(row)
        rest.append(more)
    if real := results.get("reference"):
        blank = dict.fromkeys(rest[0], "")
        rest.append(blank | {"model": f"({real['name']} itself)"} | variety(real))
    return first, rest


def every_task(results):
    """{name: the result of the first model that could do the task}"""
    return {name: task for model in reversed(results["models"]) for name, task in model["tasks"].items()}


def tables(results):
    """Everything as text."""
    first, rest = columns(results)
    parts = [table(first)]
    if len(rest[0]) > 1:
        parts.append(table(rest))
    parts.append("\n".join(notes(results)))
    if results["differences"]:
        heading = f"difference to {results['models'][0]['model']}"
        parts.append(table([{"model": row["model"], "task": row["task"], heading: percent(row)}
                            for row in results["differences"]]))
    return "\n\n".join(parts)


def table(rows):
    """Rows {heading: cell} as a Markdown table."""
    lines = [[cell.replace("|", "/") for cell in line] for line in (rows[0], *(row.values() for row in rows))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def notes(results):
    """How it was measured, in lines."""
    settings, versions = results["settings"], results["versions"]
    lines = [text_note(name, results) for name in results["texts"]]
    lines += [task_note(name, task, results["models"]) for name, task in every_task(results).items()]
    lines.append(f"shots={settings['shots']}, cot={settings['cot']}, votes={settings['votes']}; {settings['dtype']} on "
                 f"{versions['device']}, {versions['threads']} threads; {results['seconds'] / 60:.1f} minutes")
    for model in results["models"]:
        lines += [f"{model['model']}: {what}: {why}" for what, why in model["missing"].items()]
    return lines


def text_note(name, results):
    """How long a text is, and with which context it was read."""
    size = results["texts"][name]
    parts = [f"{name}: {size['bytes']:,} bytes, {size['words']:,} words, {size['documents']:,} documents"]
    found = [model["texts"][name] for model in results["models"] if name in model["texts"]]
    parts += sorted({f"context {row['block_size']}, stride {row['stride']}" for row in found})
    return "; ".join(parts)


def task_note(name, task, models):
    """What a score does not tell."""
    parts = [f"{name}: {task['n']} questions", "percent ± standard error"]
    if "chance" in task:
        parts.append(f"by chance {100 * task['chance']:.1f}")
    for key, form in TASK_NOTES.items():
        for model in models:
            found = model["tasks"].get(name, {})
            if found.get(key):
                parts.append(form.format(who=model["model"], **found))
    return "; ".join(parts)


def page(results):
    """report.html with the results in it, as JSON in ASCII. Without a "<", nothing in it can end its element."""
    shown = results | dict(headings=HEADINGS, tables=columns(results), notes=notes(results))
    data = json.dumps(shown, allow_nan=False).replace("<", "\\u003c")
    with open(PAGE, encoding="utf-8") as file:
        return file.read().replace(">null<", f">{data}<")
