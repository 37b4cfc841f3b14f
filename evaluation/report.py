# SPDX-License-Identifier: GPL-3.0-only
"""
Report: what evaluate.py has found, as tables for the terminal and as one page to look at.

    print(tables(results))
    page(results)                                           # report.html with the results in it
"""
import json
import os

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report.html")


def percent(mark):
    """{"value", "error"} in percent: 61.0 ± 4.9"""
    error = "" if mark["error"] is None else f" ± {100 * mark['error']:.1f}"
    return f"{100 * mark['value']:.1f}{error}"


def columns(results):
    """The models as rows {heading: cell}, in two tables: what counts first, and the rest, with real text beside it."""
    texts, tasks = results["texts"], every_task(results)
    first, rest = [], []
    for model in results["models"]:
        row, more = {"model": model["model"], "parameters": f"{model['parameters']:,}"}, {"model": model["model"]}
        for name in texts:
            found, on = model["texts"].get(name), f" on {name}" if len(texts) > 1 else ""
            row[f"bits per byte{on}"] = f"{found['bits_per_byte']:.4f}" if found else "–"
            if len(texts) == 1:
                row["perplexity per token"] = large(found and found["perplexity"])
                row["per word"] = large(found and found["word_perplexity"])
        row["tokens/s"] = large(model["tokens_per_second"])
        for name, task in tasks.items():
            found = model["tasks"].get(name)
            for i, metric in enumerate(task["metrics"]):
                cell = percent(found["metrics"][metric]) if found else "–"
                (more if i else row)[f"{name}: {HEADINGS[metric]}"] = cell
        if any(model["quality"] for model in results["models"]):
            more |= variety(model["quality"])
        first.append(row)
        rest.append(more)
    if "reference" in results and "distinct-2" in rest[0]:
        blank = dict.fromkeys(rest[0], "") | {"model": f"({results['reference']['name']} itself)"}
        rest.append(blank | variety(results["reference"]))
    return first, rest


def every_task(results):
    """{name: what the first model that could do the task has of it}"""
    return {name: task for model in reversed(results["models"]) for name, task in model["tasks"].items()}


HEADINGS = {"accuracy": "right", "per_byte": "per byte", "f1": "F1", "exact": "exact", "format": "in format"}


def variety(found):
    return {"sample words": f"{found['words']:,}" if found else "–", "distinct-1": share(found, "distinct_1"),
            "distinct-2": share(found, "distinct_2"), "repetition": share(found, "repetition")}


def share(found, key):
    return f"{found[key]:.2f}" if found and found[key] is not None else "–"


def large(number):
    """A number of any size in four digits or so."""
    if number is None:
        return "–"
    return f"{number:.2f}" if number < 100 else f"{number:,.0f}" if number < 1e6 else f"{number:.1e}"


def tables(results):
    """Everything as text: the table of models, what it was measured on, and the differences to the first model."""
    first, rest = columns(results)
    parts = [table(first), *([table(rest)] if len(rest[0]) > 1 else []), "\n".join(notes(results))]
    if results["differences"]:
        first = results["models"][0]["model"]
        rows = [{"model": row["model"], "task": row["task"], f"difference to {first}": percent(row)}
                for row in results["differences"]]
        parts += [table(rows)]
    return "\n\n".join(parts)


def notes(results):
    """What the numbers of the table mean, in lines."""
    settings, versions, lines = results["settings"], results["versions"], []
    for name, counts in results["texts"].items():
        windows = {(found["block_size"], found["stride"]): [] for model in results["models"]
                   if (found := model["texts"].get(name))}
        for model in results["models"]:
            if found := model["texts"].get(name):
                windows[found["block_size"], found["stride"]].append(model["model"])
        how = "; ".join(f"context {size}, stride {stride}" + (f": {', '.join(who)}" if len(windows) > 1 else "")
                        for (size, stride), who in windows.items())
        lines.append(f"{name}: {counts['bytes']:,} bytes, {counts['words']:,} words, "
                     f"{count(counts['documents'], 'document')}; {how or 'read by no model'}")
    for name, task in every_task(results).items():
        shots = count(settings["shots"], "example") if settings["shots"] else "no examples"
        steps = ", step by step" if settings["cot"] and task["kind"] == "number" else ""
        votes = f", {settings['votes']} votes" if settings["votes"] > 1 and task["kind"] != "choice" else ""
        has = {model["model"]: model["tasks"][name] for model in results["models"] if name in model["tasks"]}
        also = {
            "by chance": [f"{100 * task['chance']:.1f}"] if "chance" in task else [],
            "calibration error": [f"{found['calibration_error']:.2f} ({who})" for who, found in has.items()
                                  if "calibration_error" in found],
            "prompts cut at their beginning, to fit:": [f"{found['cut']} ({who})" for who, found in has.items()
                                                        if found["cut"]],
            "answers that did not end within their limit:": [
                f"{found['unfinished']} at {found['longest']} tokens ({who})" for who, found in has.items()
                if found["unfinished"]],
            "in the chat format:": [who for who, found in has.items() if found["chat"]]}
        lines.append(f"{name}: {task['n']} questions, {shots}{steps}{votes}; percent ± standard error"
                     + "".join(f"; {what} {', '.join(those)}" for what, those in also.items() if those))
    lines.append(f"{settings['dtype']} on {versions['device']}, {versions['threads']} threads, torch "
                 f"{versions['torch']}, Python {versions['python']}; tokens/s: one text alone, the best of three; "
                 f"{results['seconds'] / 60:.1f} minutes in all")
    return lines + [f"{model['model']}: {what}: {why}"
                    for model in results["models"] for what, why in model["missing"].items()]


def count(n, thing):
    return f"{n:,} {thing}" + "s" * (n != 1)


def table(rows):
    """Rows {heading: cell} as a Markdown table."""
    lines = [list(rows[0]), *([row[heading] for heading in rows[0]] for row in rows)]
    lines = [[cell.replace("|", "/") for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def page(results):
    """report.html with the results in it, as JSON in ASCII. Without a "<", nothing in it can end its element."""
    shown = results | dict(headings=HEADINGS, tables=columns(results), notes=notes(results))
    data = json.dumps(shown, allow_nan=False).replace("<", "\\u003c")
    with open(PAGE, encoding="utf-8") as file:
        return file.read().replace(">null<", f">{data}<")
