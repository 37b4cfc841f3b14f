# SPDX-License-Identifier: GPL-3.0-only
"""
Report: what evaluate.py has found, as tables for the terminal and as one page to look at.

    print(tables(results))
    page(results)                                           # HTML in one file: nothing is loaded from anywhere
"""
import html
import itertools
import math
import re


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


# ---------------------------------------------------------------------------------------------------------------------
# The page

HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1b1e1f; --soft: #656c6e; --line: #e2e4df; --accent: #0a746b;
  --wrong: #a8321f; --tint: rgb(20 160 146 / .35); }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #121516; --ink: #e4e6e2; --soft: #969d9e;
  --line: #2a3031; --accent: #58c7b9; --wrong: #f0907f; } }
* { box-sizing: border-box; margin: 0; padding: 0; }
body { max-width: 66rem; margin: auto; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: .94rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; font-variant-numeric: tabular-nums;
  -webkit-text-size-adjust: 100%; overflow-wrap: anywhere; }
section { margin-top: 2.2rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h1 { font-size: 1.7rem; } h2 { font-size: 1.15rem; } h3 { font-size: 1em; } div > h3 { margin-top: 1.2rem; }
p, .soft { max-width: 46rem; color: var(--soft); } .soft { list-style: none; font-size: .88rem; margin-top: 1rem; }
.soft li { margin-top: .3rem; } hr { border: 0; border-top: 1px solid var(--line); margin: .4rem 0; }
code, .text { font: .82rem/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace; color: var(--ink);
  white-space: pre-wrap; } .text, .text li { unicode-bidi: plaintext; } .text li { margin: .8rem 0 0 2.5em; }
details { margin-top: .6rem; } summary { cursor: pointer; } summary:hover { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }

/* tables: a wide or long one scrolls in its box */
.box { overflow: auto; max-height: 85vh; margin-top: .8rem; } table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .35rem 1.2rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; } th:first-child { text-align: left; min-width: 8rem; }
thead th { position: sticky; top: 0; background: var(--paper); vertical-align: bottom; min-width: 7rem; }
tbody th { color: var(--soft); font-weight: 400; } tbody tr > * { vertical-align: top; }
.answers { table-layout: fixed; width: 100%; } .answers tr > * { text-align: left; white-space: normal; }
.answers th { width: 3rem; } .answers th + th { width: 16rem; } .answers th + th + th { width: 8rem; }
.answers th + th + th + th { width: auto; } .answers li { display: grid; grid-template-columns: 1.4em 2.8em 1fr; }
small, li span, td summary { font-size: .82rem; color: var(--soft); } small { display: block; } td details { margin: 0 }
.yes { color: var(--accent); } .no { color: var(--wrong); }

/* charts: letters have a rim, to be read where a line crosses them */
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .6rem 3rem; }
.squares { display: flex; flex-wrap: wrap; gap: 0 2rem; } .squares figure { width: 13rem; }
figure { break-inside: avoid; margin-top: 1rem; }
figcaption { color: var(--soft); font-size: .82rem; padding-bottom: .4rem; } figcaption > * { color: var(--ink); }
svg { display: block; width: 100%; overflow: visible; font-size: .75rem; } rect, circle { fill: var(--accent); }
svg text { fill: var(--ink); paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
svg .tick { fill: var(--soft); } svg line, path { stroke: var(--line); fill: none; }
svg .chance { stroke: var(--soft); stroke-dasharray: 3 3; } svg .error { stroke: var(--accent); stroke-width: 2px; }
.squares circle { fill: var(--tint); stroke: var(--accent); } .squares text { stroke: none; font-size: 6.5px; }
@media print { html { font-size: 11px; } .box { overflow: visible; max-height: none; }
  .answers { min-width: 0 !important; } tr { break-inside: avoid; } }
</style>
"""
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")  # have no place in HTML
ROW = 42  # height of a model in a chart, in pixels
TAIL = 300  # so many characters of a long prompt are shown at once
RIGHT = '<b class="yes" role="img" aria-label="right">✓</b>'
PARTLY = '<b role="img" aria-label="partly right">≈</b>'
WRONG = '<b class="no" role="img" aria-label="wrong">✗</b>'


def page(results):
    """Everything as one HTML page, with charts, samples and all answers. It loads nothing and runs nothing.

    What models and files say gets in through `text` alone. Should it get past that, the policy lets no script run.
    """
    rows = [row | more for row, more in itertools.zip_longest(*columns(results), fillvalue={})]
    tasks, models = every_task(results), results["models"]
    first, names = text(models[0]["model"]), text(", ".join(model["model"] for model in models))
    real, begin = results.get("reference"), results["settings"]["prompt"]
    parts = [
        section("Models", "Of marks, more is better; of bits per byte, perplexity and repetition, less.", [
            grid(["measure", *(row["model"] for row in rows)],
                 [[text(heading), *(text(row.get(heading, "")) for row in rows)] for heading in list(rows[0])[1:]],
                 "Models"),
            '<ul class="soft">', *(f"<li>{text(line)}</li>" for line in notes(results)), "</ul>\n"]),
        section("Text", "Bits per byte: less is better. All bars begin at 0 and have the same scale.",
                [bars(results, name) for name in results["texts"]], "charts"),
        section("Questions", "A dot is the mark, the line through it ± 1 standard error. Dashed: by chance.",
                [dots(results, name, task) for name, task in tasks.items()], "charts"),
        section("Confidence", "Is what a model is 80% sure of right 80% of the time? Then its dots lie on the diagonal."
                " The area of a dot is its share of the questions.", [diagrams(results, name) for name in tasks]),
        section(f"Compared with {first}", f"By how many percent a model is better than {first}, question by question, "
                "± standard error. Less than twice the error may well be chance.", differences(results)),
        section("Samples", f"They begin with {f'<code>{text(begin)}</code>' if begin else 'nothing'}."
                + (f" {text(real['name'])} itself: {numbers(real)}." if real else ""),
                [samples(model["model"], model["quality"]) for model in models if model["quality"]]),
        section("Answers", f"{RIGHT} right, {PARTLY} partly, {WRONG} wrong. Of choices, how probable each one was.",
                [answers(results, name, task) for name, task in tasks.items()])]
    versions = " · ".join(f"{key} {value}" for key, value in {"": results["date"], **results["versions"]}.items())
    return (f"{HEAD}<title>Evaluation: {names}</title>\n</head>\n<body>\n<header><h1>Evaluation</h1>\n<p>{names}</p>\n"
            f"<p><code>{text(results['command'])}</code></p></header>\n<main>\n{''.join(parts)}</main>\n"
            f'<footer class="soft">{text(versions)}</footer>\n</body>\n</html>\n')


def text(value):
    """Any text as HTML: escaped, control characters as signs that can be seen. It cannot become anything but text."""
    return html.escape(UNSEEN.sub(lambda c: chr(0x2400 + ord(c[0])) if c[0] < " " else "\ufffd", str(value)))


def section(title, explanation, body, layout="plain"):
    """A part of the page, all of it HTML; none where the body is empty."""
    return (f'<section>\n<h2>{title}</h2>\n<p>{explanation}</p>\n<div class="{layout}">\n{"".join(body)}</div>\n'
            "</section>\n" if any(body) else "")


def grid(heads, rows, label, kind=""):
    """A table in a box that scrolls, by keyboard too. rows: cells as HTML, the first of each is its heading."""
    heads = "".join(f'<th scope="col">{text(head)}</th>' for head in heads)
    lines = "".join(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
                    for first, *cells in rows)
    return (f'<div class="box" role="region" tabindex="0" aria-label="{text(label)}"><table {kind}>\n'
            f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}</tbody></table></div>\n")


def differences(results):
    """The differences to the first model: a task in each row, another model in each column."""
    found = {(row["task"], row["model"]): percent(row) for row in results["differences"]}
    others = [model["model"] for model in results["models"][1:]]
    rows = {row["task"]: f"{row['task']}: {HEADINGS[row['metric']]}" for row in results["differences"]}
    return grid(["task", *others], [[text(heading), *(found.get((task, other), "–") for other in others)]
                                    for task, heading in rows.items()], "Differences") if rows else ""


# Charts. Places are in percent of the width: on a phone, it is the same chart with letters of the same size.


def chart(title, about, rows, ticks, line=""):
    """A figure. rows: (model, its value as text, its SVG), one below the other; ticks: {%: label}; line: more SVG."""
    height, said = ROW * len(rows), f"{title}, {about}: " + "; ".join(f"{name} {value}" for name, value, _ in rows)
    marks = "".join(f'<line x1="{x}%" x2="{x}%" y2="{height}"/><text class="tick" x="{x}%" y="{height + 14}" '
                    f'text-anchor="middle">{label}</text>' for x, label in ticks.items()) + line
    for i, (name, value, mark) in enumerate(rows):
        name = name if len(name) <= 32 else "…" + name[-31:]
        marks += (f'<g transform="translate(0 {ROW * i})"><text y="14">{text(name)}</text>'
                  f'<text x="100%" y="14" text-anchor="end">{value}</text>{mark}</g>')
    return (f'<figure><figcaption><h3>{text(title)}</h3>{about}</figcaption>\n<svg role="img" height="{height + 20}" '
            f'aria-label="{text(said)}">{marks}</svg></figure>\n')


def bars(results, name):
    """The bits per byte of every model on a text."""
    every = [found["bits_per_byte"] for model in results["models"] for found in model["texts"].values()]
    most = max(every, default=0) or 1
    rows = []
    for model in results["models"]:
        bits = model["texts"][name]["bits_per_byte"] if name in model["texts"] else None
        rows.append((model["model"], "–", "") if bits is None else (
            model["model"], f"{bits:.4f}", f'<rect y="21" width="{100 * bits / most:.2f}%" height="9"/>'))
    return chart(name, "bits per byte", rows, {0: "0", 100: f"{most:.2f}"})


def dots(results, name, task):
    """The first mark of every model on a task, with a line of one error to both sides, up to the end of the scale."""
    metric, rows, chance = next(iter(task["metrics"])), [], ""
    about = f"{HEADINGS[metric]}, percent of {task['n']:,}"
    for model in results["models"]:
        mark, line = model["tasks"][name]["metrics"][metric] if name in model["tasks"] else None, ""
        if mark and mark["error"] is not None:
            low, high = max(0, mark["value"] - mark["error"]), min(1, mark["value"] + mark["error"])
            line = f'<line class="error" x1="{100 * low:.2f}%" x2="{100 * high:.2f}%" y1="26" y2="26"/>'
        rows.append((model["model"], percent(mark), f'{line}<circle cx="{100 * mark["value"]:.2f}%" cy="26" r="5"/>')
                    if mark else (model["model"], "–", ""))
    if "chance" in task:
        x = f"{100 * task['chance']:.2f}%"
        chance = f'<line class="chance" x1="{x}" x2="{x}" y2="{ROW * len(rows)}"/>'
        about += f"; by chance {100 * task['chance']:.1f}"
    return chart(name, about, rows, {x: x for x in (0, 25, 50, 75, 100)}, chance)


def diagrams(results, name):
    """Reliability diagrams, 100 by 100: how sure a model is, to the right, and how often it is right then, upwards."""
    figures = []
    for model in results["models"]:
        task = model["tasks"].get(name, {})
        if "calibration" not in task:
            continue
        right, said = HEADINGS[next(iter(task["metrics"]))], [f"calibration error {task['calibration_error']:.2f}"]
        parts = [f'<text class="tick" x="{x}" y="109" text-anchor="middle">{x}</text>'
                 f'<text class="tick" x="-4" y="{102.5 - x}" text-anchor="end">{x}</text>' for x in (0, 50, 100)]
        for row in task["calibration"]:
            x, y, r = 100 * row["confidence"], 100 * row["accuracy"], 10 * math.sqrt(row["n"] / task["n"])
            said.append(f"{x:.0f}% sure, {y:.0f}% {right}, {row['n']} questions")
            parts.append(f'<circle cx="{x:.2f}" cy="{100 - y:.2f}" r="{r:.2f}"><title>{said[-1]}</title></circle>')
        figures.append(
            f'<figure><svg role="img" viewBox="-18 -11 130 134" aria-label="{text(model["model"])}: {"; ".join(said)}">'
            f'<path d="M0 0H100V100H0ZM0 100 100 0"/><text class="tick" x="2" y="8">% {right}</text><text class="tick" '
            f'x="50" y="119" text-anchor="middle">% sure</text>{"".join(parts)}</svg>\n'
            f"<figcaption><h4>{text(model['model'])}</h4>{said[0]}</figcaption></figure>\n")
    return f'<h3>{text(name)}</h3>\n<div class="squares">{"".join(figures)}</div>\n' if figures else ""


# Words


def numbers(quality):
    return ", ".join(f"{name} {value}" for name, value in variety(quality).items())


def samples(name, quality):
    texts = "".join(f"<li>{text(sample)}</li>" for sample in quality["texts"])
    return (f"<details><summary><b>{text(name)}</b>: {len(quality['texts'])} samples; {numbers(quality)}</summary>\n"
            f'<ol class="text">{texts}</ol></details>\n')


def answers(results, name, task):
    """All questions of a task, with what every model answered, as a table that opens."""
    models, rows = {model["model"]: model["tasks"].get(name) for model in results["models"]}, []
    metric = next(iter(task["metrics"]))
    marks = ", ".join(f"{who} {percent(found['metrics'][metric]) if found else '–'}" for who, found in models.items())
    for i, item in enumerate(task["items"]):
        right = "<br>".join(f"<bdi>{text(right) or '(none)'}</bdi>" for right in dict.fromkeys(item["right"]))
        rows.append([f'<span title="{text(item["where"])}">{i + 1}</span>', prompt(item["prompt"]), right,
                     *(answer(found["items"][i], item) if found else "–" for found in models.values())])
    table = grid(["no.", "prompt", "right", *models], rows, f"Answers to {name}",
                 f'class="answers" style="min-width: {27 + 12 * len(models)}rem"')
    return (f"<details><summary><b>{text(name)}</b>: {task['n']:,} questions; {HEADINGS[metric]}: {text(marks)}"
            f"</summary>\n{table}</details>\n")


def prompt(words):
    """A prompt; of a long one, what is before its end has to be opened."""
    gone = (words.rfind(" ", 0, -TAIL) + 1 or len(words) - TAIL) if len(words) > TAIL + 100 else 0
    before = closed(f"{gone:,} characters before", text(words[:gone])) if gone else ""
    return f'{before}<div class="text">{text(words[gone:])}</div>'


def closed(title, words):
    return f'<details><summary>{title}</summary><div class="text">{words}</div></details>'


def answer(row, asked):
    """The cell of a model: its answer, whether it is right, how sure it was, and all that it wrote."""
    mark = next(iter(row["marks"].values()))
    sign = RIGHT if mark >= 1 else PARTLY if mark > 0 else WRONG
    more = [f"{HEADINGS[metric]} {mark:.2g}" for metric, mark in row["marks"].items() if metric != "accuracy"]
    if "choices" in row:  # confidence: the probability of the likeliest
        top, sure = max(row["logprobs"]), row["confidence"]
        lines = [f"{sign if choice == row['answer'] else '<b></b>'}<span>{sure * math.exp(logprob - top):.2f}"
                 f"</span><bdi>{text(choice)}</bdi>" for choice, logprob in zip(row["choices"], row["logprobs"])]
        cell = f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"
    else:
        cell = f"{sign} <bdi>{text(row['answer']) or '(nothing)'}</bdi>"
        more += [f"confidence {row['confidence']:.2f}"] if row["confidence"] is not None else []
    cell += f"<small>{', '.join(more)}</small>"
    if row["prompt"] != asked["prompt"]:  # another format, or cut to fit
        cell += closed("its own prompt", text(row["prompt"]))
    if written := [text(words) or "(nothing)" for words in row.get("texts", [])]:
        cell += closed(f"all {len(written)} votes" if len(written) > 1 else "all it wrote", "<hr>".join(written))
    return cell
