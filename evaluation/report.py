# SPDX-License-Identifier: GPL-3.0-only
"""
Report: what evaluate.py has found, as tables for the terminal and as one page.

    print(tables(results))
    page(results)                                           # report.html with the results in it
"""
import json
import os

from runtime.console import counted

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report.html")
HEADINGS = {"accuracy": "accuracy", "per_byte": "per byte", "f1": "F1", "exact": "exact", "format": "in format"}
# What else there is to know of a task, and of samples: {key: (heading, format)}
ASIDES = {"calibration_error": ("calibration error", ".2f"), "cut": ("prompts truncated on the left", ","),
          "chat": ("in the chat format", "")}
SAMPLES = {"words": ("sample words", ","), "distinct_1": ("distinct-1", ".2f"), "distinct_2": ("distinct-2", ".2f"),
           "repetition": ("repetition", ".2f")}


def find(found, *keys):
    """found[key][key]..., or None."""
    for key in keys:
        found = (found or {}).get(key)
    return found


def cell(value, form=""):
    """A value as text; a score, {"value", "error"}, in percent: 61.0 ± 4.9"""
    if value is None:
        return "–"
    if not isinstance(value, dict):
        return format(value, form)
    percent = f"{100 * value['value']:.1f}"
    if value["error"] is not None:
        percent += f" ± {100 * value['error']:.1f}"
    return percent


def every_task(results):
    """{name: the result of the first model that could do the task}"""
    return {name: task for model in reversed(results["models"]) for name, task in model["tasks"].items()}


def measures(results):
    """Rows of cells, a measure each; the first has the names of the models and, beside samples, of real text."""
    models = list(results["models"])
    if real := results.get("reference"):
        models.append(dict(model=f"({real['name']} itself)", quality=real))
    rows = [["measure", *(model["model"] for model in models)]]

    def add(measure, form, *keys):
        rows.append([measure, *(cell(find(model, *keys), form) for model in models)])

    add("parameters", ",", "parameters")
    for name in results["texts"]:
        on = f" on {name}" if len(results["texts"]) > 1 else ""
        add(f"bits per byte{on}", ".4f", "texts", name, "bits_per_byte")
        add(f"perplexity per token{on}", ",.5g", "texts", name, "perplexity")
        add(f"perplexity per word{on}", ",.5g", "texts", name, "word_perplexity")
    add("tokens/s", ",.5g", "tokens_per_second")
    for name, task in every_task(results).items():
        for metric in task["metrics"]:
            add(f"{name}: {HEADINGS[metric]}", "", "tasks", name, "metrics", metric)
        for key, (heading, form) in ASIDES.items():
            if any(find(model, "tasks", name, key) for model in models):
                add(f"{name}: {heading}", form, "tasks", name, key)
    if any(model["quality"] for model in models):
        for key, (heading, form) in SAMPLES.items():
            add(heading, form, "quality", key)
    return rows


def notes(results):
    """How it was measured, in lines."""
    lines, settings, versions = [], results["settings"], results["versions"]
    for name, size in results["texts"].items():
        found = [model["texts"][name] for model in results["models"] if name in model["texts"]]
        contexts = sorted({f"; context {row['block_size']}, stride {row['stride']}" for row in found})
        lines.append(f"{name}: {size['bytes']:,} bytes, {counted(size['words'], 'word')}, "
                     f"{counted(size['documents'], 'document')}{''.join(contexts)}")
    for name, task in every_task(results).items():
        chance = f"; chance: {100 * task['chance']:.1f}" if "chance" in task else ""
        lines.append(f"{name}: {counted(task['n'], 'question')}; percent ± standard error{chance}")
    lines.append(f"shots={settings['shots']}, cot={settings['cot']}, votes={settings['votes']}; {settings['dtype']} on "
                 f"{versions['device']}, {counted(versions['threads'], 'thread')}; "
                 f"{results['seconds'] / 60:.1f} minutes")
    for model in results["models"]:
        lines += [f"{model['model']}: {what}: {why}" for what, why in model["missing"].items()]
    return lines


def tables(results):
    """Everything as text."""
    parts = [table(measures(results)), "\n".join(notes(results))]
    if results["differences"]:
        heading = ["model", "task", f"difference from {results['models'][0]['model']}"]
        rows = [[row["model"], row["task"], cell(row)] for row in results["differences"]]
        parts.append(table([heading, *rows]))
    return "\n\n".join(parts)


def table(rows):
    """Rows of cells as a Markdown table."""
    rows = [[cell.replace("|", "/") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def page(results):
    """report.html with the results in it, as JSON in ASCII. Without a "<", nothing in it can end its element."""
    shown = results | dict(headings=HEADINGS, measures=measures(results), notes=notes(results))
    data = json.dumps(shown, allow_nan=False).replace("<", "\\u003c")
    with open(PAGE, encoding="utf-8") as file:
        return file.read().replace(">null<", f">{data}<")
