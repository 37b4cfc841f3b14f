# SPDX-License-Identifier: GPL-3.0-only
"""The page and the tables of evaluate.py: everything is there, in the right place, and nothing of it is ever code."""
import base64
import hashlib
import json
import math
import pathlib
import re

import pytest

from evaluation import grading
from evaluation import report

HOSTILE = ("</td></script><script>alert(1)</script><img src=x onerror='alert(2)'>\" onmouseover=\"alert(3) &amp; "
           "\0\x1b\ud800")


def questions(kind, n, **changed):
    """n rows as those of evaluate.run_task, in one of the three kinds; every third one is wrong."""
    rows = []
    for i in range(n):
        if kind == "choice":
            choices, logprobs = [f"good {i}", f"bad {i}"], [-2.0, -1.5 if i % 3 == 0 else -4.0]
            item = grading.Item(kind, f"t.jsonl, line {i + 1}", f"prompt {i}", "", choices[:1], choices)
            row = dict(choices=choices, logprobs=logprobs, **grading.score_choice(item, logprobs))
        else:
            right = ["42"] if kind == "number" else [f"a red hat {i}"]
            item = grading.Item(kind, f"t.jsonl, line {i + 1}", f"prompt {i}", "", right, [])
            texts = ["so it is 41" if kind == "number" else f"red {i}" if i % 2 else ""] if i % 3 == 0 else [right[0]]
            row = dict(texts=texts, **grading.score_text(item, texts))
        rows.append(dict(where=item.where, group=item.where, prompt=item.prompt, right=item.right, **row) | changed)
    return rows


def task(kind, rows):
    """What evaluate.run_task makes of its rows."""
    marks = {name: [row["marks"][name] for row in rows] for name in rows[0]["marks"]}
    metrics = {name: grading.mean(values, range(len(rows))) for name, values in marks.items()}
    found = dict(kind=kind, n=len(rows), metrics=metrics, cut=0, chat=False, items=rows, seconds=1.0)
    if rows[0]["confidence"] is not None:
        found["calibration"], found["calibration_error"] = grading.calibration(
            [row["confidence"] for row in rows], [row["marks"][next(iter(metrics))] for row in rows])
    return found | (dict(chance=0.5) if kind == "choice" else {})


def model(name, bits=None, tasks=None, samples=(), missing=None):
    """What evaluate.evaluate finds out about a model. bits: {text: bits per byte}."""
    texts = {text: dict(bits_per_byte=value, perplexity=20.5, word_perplexity=None, tokens=300, documents=2, bytes=1000,
                        words=170, block_size=64, stride=32, seconds=1.0) for text, value in (bits or {}).items()}
    quality = dict(**grading.variety(samples), prompt="", texts=list(samples)) if samples else None
    return dict(model=name, path=f"out/{name}", parameters=12345, texts=texts,
                tokens_per_second=31.25 if samples else None, tasks=tasks or {}, quality=quality, missing=missing or {})


def results(*models, texts=(), prompt="", reference=None):
    settings = dict(shots=0, cot=False, votes=1, dtype="float32", prompt=prompt)
    versions = dict(commit="c2756cc", python="3.11.7", torch="2.13.0", device="cpu", threads=2, processes=1)
    found = dict(command="python evaluate.py", date="2026-01-02",
                 versions=versions, settings=settings, models=list(models), seconds=90.0,
                 texts={text: dict(documents=2, bytes=1000, words=170) for text in texts})
    found["differences"] = grading.differences(found["models"])
    return found | (dict(reference=reference) if reference else {})


def three():
    """Three models, two texts, a task of each kind; the last model lacks a text, the samples and a task."""
    shared = questions("choice", 12)
    better = [row | dict(marks=dict(accuracy=1.0, per_byte=0.0)) for row in shared]
    tasks = {"pick": task("choice", shared), "read": task("words", questions("words", 12)),
             "sums": task("number", questions("number", 1))}
    return results(
        model("alpha", {"a.txt": 2.0, "b.txt": 1.0}, tasks, ["one two one two one two", "\n  x\ty\n"]),
        model("beta", {"a.txt": 1.5, "b.txt": 0.25}, tasks | {"pick": task("choice", better)}, ["red green blue sky"]),
        model("gamma", {"a.txt": 1.0}, {"pick": tasks["pick"] | dict(chat=True), "read": tasks["read"] | dict(cut=7)},
              missing={"b.txt": "no token for \u00fc", "sums": "scores are not finite", "samples": "long prompt"}),
        texts=("a.txt", "b.txt"), prompt="Once\nupon",
        reference=dict(name="a.txt", words=9, distinct_1=0.5, distinct_2=0.8, repetition=None))


def hostile():
    def poison(rows):
        return [row | dict(where=HOSTILE, prompt=HOSTILE * 8, right=[HOSTILE], answer=HOSTILE)
                | (dict(texts=[HOSTILE, ""]) if "texts" in row else dict(choices=[HOSTILE, "x"])) for row in rows]
    bad = model(HOSTILE, {HOSTILE: 1.0}, {HOSTILE: task("choice", poison(questions("choice", 4))),
                                          "w" + HOSTILE: task("words", poison(questions("words", 4)))}, [HOSTILE] * 2,
                {"samples": HOSTILE})
    found = results(bad, bad | dict(model="b" + HOSTILE), texts=(HOSTILE,), prompt=HOSTILE,
                    reference=dict(name=HOSTILE, words=9, distinct_1=0.5, distinct_2=0.8, repetition=0.1))
    return found | dict(command=HOSTILE, versions=found["versions"] | dict(commit=HOSTILE))


EVERY = {
    "three": three,
    "hostile": hostile,
    "one, all": lambda: results(model("m", {"a.txt": 1.0}, {"pick": task("choice", questions("choice", 5))}, ["x y"]),
                                texts=("a.txt",)),
    "texts alone": lambda: results(model("m", {"a.txt": 1.0}), texts=("a.txt",)),
    "tasks alone": lambda: results(model("m", tasks={"sums": task("number", questions("number", 1))})),
    "nothing": lambda: results(model("m")),
    "everything is missing": lambda: results(model("m", missing={"a.txt": "?", "pick": "!", "samples": "."}),
                                             texts=("a.txt",))}


# What the tests of the page say in JavaScript; a row is that of a model in a chart: its name, its value, its marks.
HELPERS = """
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const texts = (selector, root) => all(selector, root).map((element) => element.textContent);
const section = (title) => all("section").find((part) => part.querySelector("h2").textContent === title);
const cells = (title) => all("tr", section(title)).map((row) => [...row.children].map((cell) => cell.textContent));
const attributes = (element) => Object.fromEntries([...element.attributes].map(({name, value}) => [name, value]));
const rows = (figure) => all("g", figure).map((row) => ({name: row.children[0].textContent,
  value: row.children[1].textContent,
  marks: [...row.children].slice(2).map((mark) => [mark.localName, attributes(mark)])}));
return """


@pytest.fixture
def show(browser, tmp_path):
    """show(results) opens their page, and gives what evaluates JavaScript there. The console must stay empty."""
    def show(found):
        path = tmp_path / "report.html"
        path.write_text(report.page(found), encoding="utf-8")
        browser.get(path.as_uri())
        return lambda expression: browser.execute_script(HELPERS + expression)

    yield show
    assert browser.get_log("browser") == []


def share(place):
    assert place.endswith("%")
    return float(place[:-1]) / 100


# ---------------------------------------------------------------------------------------------------------------------


def test_tables_and_notes():
    found = three()
    said = report.tables(found)
    lines = said.split("\n")
    rows = report.measures(found)
    assert rows[0] == ["measure", "alpha", "beta", "gamma", "(a.txt itself)"]
    for row, line in zip(rows, [lines[0], *lines[2:]]):
        assert [cell.strip() for cell in line[2:-2].split(" | ")] == row
    assert {len(line) for line in lines[:1 + len(rows)]} == {len(lines[0])}  # below each other
    notes = report.notes(found)
    assert all(line in lines for line in notes)
    assert notes == [
        "a.txt: 1,000 bytes, 170 words, 2 documents; context 64, stride 32",
        "b.txt: 1,000 bytes, 170 words, 2 documents; context 64, stride 32",
        *notes[2:5],
        "shots=0, cot=False, votes=1; float32 on cpu, 2 threads; 1.5 minutes",
        "gamma: b.txt: no token for \u00fc", "gamma: sums: scores are not finite", "gamma: samples: long prompt"]
    assert notes[2] == "pick: 12 questions; percent \u00b1 standard error; chance: 50.0"
    assert notes[3] == "read: 12 questions; percent \u00b1 standard error"
    assert "| gamma | pick | 0.0 \u00b1 0.0 " in said


def test_the_results_in_the_page_are_whole_and_cannot_end_their_element():
    found = hostile()
    source = report.page(found)
    data = re.search('<script type="application/json" id="results">([^<]*)</script>', source)[1]
    assert data.isascii() and json.loads(data).items() >= json.loads(json.dumps(found)).items()
    assert source.replace(data, "null") == pathlib.Path(report.PAGE).read_text(encoding="utf-8")


def test_the_policy_knows_the_script():
    source = report.page(three())
    script = re.search("<script>(.*?)</script>", source, re.S)[1].encode()
    due = base64.b64encode(hashlib.sha256(script).digest()).decode()
    assert f"script-src 'sha256-{due}'" in source


# ---------------------------------------------------------------------------------------------------------------------
# The page in a browser


PARTS = {
    "three": ["Models", "Text", "Questions", "Confidence", "Compared with alpha", "Samples", "Answers"],
    "one, all": ["Models", "Text", "Questions", "Confidence", "Samples", "Answers"],
    "texts alone": ["Models", "Text"],
    "tasks alone": ["Models", "Questions", "Answers"],  # one answer each has no confidence
    "nothing": ["Models"],
    "everything is missing": ["Models", "Text"]}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_not_there_has_no_part(show, name):
    get = show(EVERY[name]())
    assert get("texts('h2')") == PARTS[name]
    assert not re.search("null|undefined|NaN|Infinity", get("document.documentElement.outerHTML.split('<script')[0]"))


def test_a_page_without_results_says_how_to_get_them(show, browser):
    browser.get(pathlib.Path(report.PAGE).as_uri())
    assert "evaluate.py --html=FILE" in browser.execute_script(HELPERS + "texts('header')")[0]


def test_hostile_text_stays_text(show):
    seen = HOSTILE.replace("\0", "\u2400").replace("\x1b", "\u241b").replace("\ud800", "\ufffd")
    get = show(hostile())
    assert get("document.title") == f"Evaluation: {seen}, b{seen}"
    assert get("texts('header p')") == [f"{seen}, b{seen}", seen] and seen in get("texts('footer')")[0]
    # In every part, as a heading, a name, a sample, a prompt, an answer, and in the words for those who do not see.
    for part in get("texts('section')"):
        assert seen in part
    assert get("texts('.answers tr:first-child th')")[:5] == ["no.", "prompt", "correct", seen, "b" + seen]
    assert get("texts('ol li')") == [seen] * 4 and seen in get("document.querySelector('svg').ariaLabel")
    assert get("all('[title]').map((span) => span.title)") == [seen] * 8
    # Nothing of it has become an element or an attribute that does something, and nothing was asked for.
    assert get("all('img, iframe, object, a, form, base, style, script').map((e) => e.localName)") == [
        "style", "script", "script"]
    assert get("all('*').flatMap((e) => e.getAttributeNames()).filter((name) => /^on|^src/.test(name))") == []
    assert get("performance.getEntriesByType('resource').map(({name}) => name)") == []


def test_the_table_of_models(show):
    found = three()
    get = show(found)
    none = "\u2013"
    assert get("cells('Models')") == [
        ["measure", "alpha", "beta", "gamma", "(a.txt itself)"],
        ["parameters", *["12,345"] * 3, none],
        ["bits per byte on a.txt", "2.0000", "1.5000", "1.0000", none],
        ["perplexity per token on a.txt", *["20.5"] * 3, none],
        ["perplexity per word on a.txt", *[none] * 4],
        ["bits per byte on b.txt", "1.0000", "0.2500", none, none],
        ["perplexity per token on b.txt", *["20.5"] * 2, none, none],
        ["perplexity per word on b.txt", *[none] * 4],
        ["tokens/s", "31.25", "31.25", none, none],
        ["pick: accuracy", "66.7 \u00b1 14.2", "100.0 \u00b1 0.0", "66.7 \u00b1 14.2", none],
        ["pick: per byte", "66.7 \u00b1 14.2", "0.0 \u00b1 0.0", "66.7 \u00b1 14.2", none],
        ["pick: calibration error", "0.29", "0.21", "0.29", none],
        ["pick: in the chat format", "False", "False", "True", none],
        ["read: F1", *["80.0 \u00b1 11.0"] * 3, none],
        ["read: exact", *["66.7 \u00b1 14.2"] * 3, none],
        ["read: prompts truncated on the left", "0", "0", "7", none],
        ["sums: accuracy", *["0.0"] * 2, none, none],
        ["sums: in format", *["0.0"] * 2, none, none],
        ["sample words", "8", "4", none, "9"],
        ["distinct-1", "0.50", "1.00", none, "0.50"],
        ["distinct-2", "0.50", "1.00", none, "0.80"],
        ["repetition", "0.33", "0.00", none, none]]
    assert get("texts('section:first-child li')") == report.notes(found)


def test_bars_are_as_long_as_their_values(show):
    get = show(three())
    a, b = get("all('figure', section('Text')).map(rows)")
    lengths = [{row["name"]: share(row["marks"][0][1]["width"]) if row["marks"] else None for row in rows}
               for rows in (a, b)]
    assert lengths == [dict(alpha=1.0, beta=0.75, gamma=0.5), dict(alpha=0.5, beta=0.125, gamma=None)]  # one scale
    assert [row["value"] for row in b] == ["1.0000", "0.2500", "\u2013"]
    assert get("document.querySelector('svg').ariaLabel") == (
        "a.txt, bits per byte: alpha 2.0000; beta 1.5000; gamma 1.0000")


def test_dots_have_lines_of_one_error_to_each_side(show):
    """One question alone has no error, and what was not asked has no dot. A line ends where the scale ends."""
    found = three()
    for row, value in zip(found["models"], (0.1, 0.9)):
        row["tasks"]["read"] = row["tasks"]["read"] | dict(metrics=dict(f1=dict(value=value, error=0.3)))
    get = show(found)
    pick, read, sums = get("all('figure', section('Questions')).map(rows)")
    for rows, name in ((pick, "pick"), (read, "read")):
        for row, found_row in zip(rows, found["models"], strict=True):
            mark, marks = next(iter(found_row["tasks"][name]["metrics"].values())), dict(row["marks"])
            assert row["name"] == found_row["model"]
            assert share(marks["circle"]["cx"]) == pytest.approx(mark["value"])
            if mark["error"]:
                ends = [max(0, mark["value"] - mark["error"]), min(1, mark["value"] + mark["error"])]
                assert [share(marks["line"][x]) for x in ("x1", "x2")] == pytest.approx(ends)
                assert marks["line"]["y1"] == marks["line"]["y2"] == marks["circle"]["cy"]
    assert [[tag for tag, _ in row["marks"]] for row in sums] == [["circle"], ["circle"], []]
    [chance] = get("all('.chance').map(attributes)")
    assert chance["x1"] == chance["x2"] == "50%"
    assert get("texts('figcaption', section('Questions'))") == [
        "pickaccuracy in percent, of 12 questions; chance: 50.0", "readF1 in percent, of 12 questions",
        "sumsaccuracy in percent, of 1 questions"]


def test_reliability_diagrams(show):
    found = three()
    get = show(found)
    assert get("texts('h3', section('Confidence'))") == ["pick"]
    figures = get("all('figure', section('Confidence')).map((figure) => [figure.querySelector('h4').textContent, "
                  "figure.querySelector('figcaption').textContent, all('circle', figure).map((dot) => "
                  "[...['cx', 'cy', 'r'].map((name) => +dot.getAttribute(name)), dot.textContent])])")
    for row, (name, caption, dots) in zip(found["models"], figures, strict=True):
        expected = row["tasks"]["pick"]
        assert name == row["model"] and f"calibration error {expected['calibration_error']:.2f}" in caption
        assert len(expected["calibration"]) > 1
        for at, (x, y, r, said) in zip(expected["calibration"], dots, strict=True):
            assert (x, 100 - y) == pytest.approx((100 * at["confidence"], 100 * at["accuracy"]))
            assert r ** 2 == pytest.approx(100 * at["n"] / 12) and f"{at['n']} questions" in said


def test_differences_and_samples(show):
    get = show(three())
    assert get("cells('Compared with alpha')") == [
        ["task", "beta", "gamma"], ["pick: accuracy", "33.3 \u00b1 14.2", "0.0 \u00b1 0.0"],
        ["read: F1", "0.0 \u00b1 0.0", "0.0 \u00b1 0.0"], ["sums: accuracy", "0.0", "\u2013"]]
    assert get("texts('summary', section('Samples'))") == ["alpha: 2 samples", "beta: 1 samples"]
    assert get("texts('li', section('Samples'))") == ["one two one two one two", "\n  x\ty\n", "red green blue sky"]
    assert get("texts('p', section('Samples'))") == ["Prompt: Once\nupon."]


def test_answers(show):
    found = three()
    get = show(found)
    boxes = get("all('section > div > details:has(.answers)').map((box) => [box.querySelector('summary').textContent, "
                "all('tbody tr', box).map((row) => [...row.children].map((cell) => [cell.textContent, "
                "all('b', cell).map((sign) => sign.textContent + (sign.ariaLabel ?? '')), "
                "all('li', cell).map((line) => [...line.children].map((part) => part.textContent)), "
                "texts('bdi', cell), texts('.text', cell)]))])")
    assert [summary.split(":")[0] for summary, _ in boxes] == ["pick", "read", "sums"]
    assert "12 questions; accuracy: alpha 66.7 \u00b1 14.2, beta 100.0 \u00b1 0.0, gamma" in boxes[0][0]
    for name, rows in zip(("pick", "read", "sums"), (rows for _, rows in boxes)):
        for i, (row, item) in enumerate(zip(rows, found["models"][0]["tasks"][name]["items"], strict=True)):
            number, prompt, right, *cells = row
            assert (number[0], prompt[4], right[3]) == (str(i + 1), [item["prompt"]], item["right"])
            for who, (said, signs, choices, answer, written) in zip(found["models"], cells, strict=True):
                if name not in who["tasks"]:
                    assert said == "\u2013"
                    continue
                theirs = who["tasks"][name]["items"][i]
                mark = next(iter(theirs["marks"].values()))
                due = "\u2713right" if mark == 1 else "\u2717wrong" if mark == 0 else "\u2248partly right"
                assert [sign for sign in signs if sign] == [due]
                if name == "pick":
                    odds = [math.exp(logprob) for logprob in theirs["logprobs"]]
                    assert [line[1:] for line in choices] == [
                        [f"{odd / sum(odds):.2f}", choice] for odd, choice in zip(odds, theirs["choices"])]
                    assert [line[2] for line in choices if line[0]] == [theirs["answer"]]
                else:
                    assert answer == [theirs["answer"] or "(nothing)"]
                    assert written == [theirs["texts"][0] or "(nothing)"]
    assert "F1 0.8, exact 0" in get("texts('small')") and "in format 0" in get("texts('small')")


def test_votes_and_prompts(show):
    """Long prompts are cut only for the eye; another prompt of another model and all votes can be opened."""
    long = "".join(f"word{i} " for i in range(400)) + "end."
    rows = questions("words", 2, prompt=long, texts=["x", "", "<y>"], confidence=2 / 3)
    others = [row | dict(prompt="x" * 401) for row in rows]
    get = show(results(model("m", tasks={"read": task("words", rows), "more": task("words", others)}),
                       model("n", tasks={"read": task("words", others)})))
    cells = get("all('.answers').map((table) => [...table.querySelector('tbody tr').children].map((cell) => "
                "[texts('summary', cell), texts('.text', cell), texts('small', cell)]))")
    _, (summary, (before, end), _), _, ours, theirs = cells[0]
    assert before + end == long and end.startswith("word") and 290 <= len(end) <= 300
    assert summary == [f"{len(before):,} earlier characters"]
    assert ours == [["all 3 votes"], ["x", "(nothing)", "<y>"], ["F1 0, exact 0, confidence 0.67"]]
    assert theirs[:2] == [["its own prompt", "all 3 votes"], ["x" * 401, "x", "(nothing)", "<y>"]]
    assert cells[1][1][:2] == [["101 earlier characters"], ["x" * 101, "x" * 300]]  # without a space


@pytest.mark.parametrize("name", ["three", "hostile"])
def test_on_a_phone_and_in_the_dark(show, browser, name):
    """The tables scroll in their boxes. A chart is as wide as its place, and a dot is where it is said to be."""
    get = show(EVERY[name]())
    colour, light = "getComputedStyle(document.body).backgroundColor", None
    try:
        for width, scheme in ((1280, "light"), (360, "dark")):
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                    dict(width=width, height=800, deviceScaleFactor=1, mobile=width == 360))
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia",
                                    {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
            assert get(colour) != light
            light = get(colour)
            for opened in ("false", "true"):
                get(f"all('details').forEach((box) => {{ box.open = {opened}; }})")
                assert get("all('td, ol').every((element) => element.checkVisibility())") == (opened == "true")
                assert get("document.documentElement.scrollWidth") <= width
            assert get("""all('.charts svg').every((svg) => {
              const box = svg.getBoundingClientRect();
              return box.width > 250 && all('circle', svg).every((dot) => {
                const at = dot.getBoundingClientRect();
                const due = box.x + box.width * parseFloat(dot.getAttribute('cx')) / 100;
                return Math.abs(at.x + at.width / 2 - due) < 1;
              })})""")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
