# SPDX-License-Identifier: GPL-3.0-only
"""The page and the tables of evaluate.py: everything is there, in the right place, and nothing of it is ever code."""
import math
import re
import shutil
from html.parser import HTMLParser

import pytest

import grading
import report

VOID = {"meta", "link", "br", "hr"}
HOSTILE = ("</td></script><script>alert(1)</script><img src=x onerror='alert(2)'>\" onmouseover=\"alert(3) &amp; "
           "\0\x1b\ud800")


class Node:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children = tag, dict(attributes), parent, []

    def __getitem__(self, name):
        return self.attributes[name]

    def get(self, name):
        return self.attributes.get(name)

    def all(self, tag, kind=None):
        """Every such tag in it, of the class `kind`."""
        nodes = [child for child in self.children if isinstance(child, Node)]
        return [found for node in nodes for found in
                [node] * (node.tag == tag and (kind is None or node.get("class") == kind)) + node.all(tag, kind)]

    def one(self, tag, kind=None):
        found = self.all(tag, kind)
        assert len(found) == 1, (tag, kind, found)
        return found[0]

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Tree(HTMLParser):
    """A page as a tree. Every tag must be closed by its own end, and no attribute be there twice."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.root = self.at = Node("", {}, None)
        self.feed(source)
        self.close()
        assert self.at is self.root, f"<{self.at.tag}> is not closed"

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), (tag, attributes)
        node = Node(tag, attributes, self.at)
        self.at.children.append(node)
        if tag not in VOID:
            self.at = node

    def handle_startendtag(self, tag, attributes):
        assert tag in ("line", "circle", "rect", "path"), f"<{tag}/> is only for SVG"
        self.at.children.append(Node(tag, attributes, self.at))

    def handle_endtag(self, tag):
        assert tag == self.at.tag, f"</{tag}> ends <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.children.append(data)


def questions(kind, n, **changed):
    """n rows as those of evaluate.run_task, in one of the three kinds; every third one is wrong."""
    rows = []
    for i in range(n):
        if kind == "choice":
            choices, logprobs = [f"good {i}", f"bad {i}"], [-2.0, -1.5 if i % 3 == 0 else -4.0]
            item = grading.Item(kind, f"t.jsonl, line {i + 1}", f"prompt {i}", "", choices[:1], choices)
            row = dict(choices=choices, logprobs=logprobs, **grading.mark_choice(item, logprobs))
        else:
            right = ["42"] if kind == "number" else [f"a red hat {i}"]
            item = grading.Item(kind, f"t.jsonl, line {i + 1}", f"prompt {i}", "", right, [])
            texts = ["so it is 41" if kind == "number" else f"red {i}" if i % 2 else ""] if i % 3 == 0 else [right[0]]
            row = dict(texts=texts, **grading.mark_text(item, texts))
        rows.append(dict(where=item.where, group=item.where, prompt=item.prompt, right=item.right, **row) | changed)
    return rows


def task(kind, rows):
    """What evaluate.run_task makes of its rows."""
    metrics = {name: grading.mean([row["marks"][name] for row in rows]) for name in rows[0]["marks"]}
    found = dict(kind=kind, n=len(rows), metrics=metrics, cut=0, unfinished=0, longest=0, chat=False, items=rows,
                 seconds=1.0)
    if rows[0]["confidence"] is not None:
        found["calibration"], found["calibration_error"] = grading.calibration(
            [row["confidence"] for row in rows], [row["marks"][next(iter(metrics))] for row in rows])
    return found | (dict(chance=0.5) if kind == "choice" else {})


def model(name, bits=None, tasks=None, samples=(), missing=None):
    """What evaluate.evaluate finds out about a model. bits: {text: bits per byte}."""
    texts = {text: dict(bits_per_byte=value, perplexity=20.5, word_perplexity=None, tokens=300, documents=2, bytes=1000,
                        words=170, block_size=64, stride=32, seconds=1.0) for text, value in (bits or {}).items()}
    quality = dict(**grading.variety(samples), prompt="", texts=list(samples)) if samples else None
    return dict(model=name, path=f"out/{name}", parameters=12345, context=64, vocabulary=100, texts=texts,
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


@pytest.fixture(params=EVERY)
def made(request):
    return EVERY[request.param]()


def section(page, title):
    return next(part for part in page.all("section") if part.one("h2").text == title)


def marks_of(figure, tag):
    """{model: the marks of this tag in its row of a chart}"""
    return {row.all("text")[0].text: row.all(tag) for row in figure.all("g")}


def share(place):
    assert place.endswith("%")
    return float(place[:-1]) / 100


# ---------------------------------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_alone(made):
    source = report.page(made)
    page = Tree(source).root
    source.encode("utf-8")  # no half characters
    assert source.startswith("<!DOCTYPE html>") and page.one("html")["lang"] == "en"
    assert page.one("head").one("title").text == "Evaluation: " + page.one("header").all("p")[0].text
    assert len(page.all("h1")) == len(page.all("main")) == 1
    assert {node["content"] for node in page.all("meta") if node.get("http-equiv")} == {
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:"}
    # Nothing comes from elsewhere and nothing runs.
    assert not any(page.all(tag) for tag in ("script", "img", "iframe", "object", "a", "form", "base", "foreignobject"))
    assert [node["href"] for node in page.all("link")] == ["data:,"]
    assert not re.search(r"url\(|@import|https?:", page.one("style").text)
    every = [node for tag in set(re.findall(r"<([a-z0-9]+)", source)) for node in page.all(tag)]
    assert not any(name.startswith("on") or name == "src" for node in every for name in node.attributes)
    # Tables have headings, charts have words.
    for table in page.all("table"):
        heads = table.one("thead").all("th")
        assert heads and all(head["scope"] == "col" for head in heads)
        for row in table.one("tbody").all("tr"):
            assert row.all("th")[0]["scope"] == "row" and len(row.all("th")) + len(row.all("td")) == len(heads)
        assert table.parent["class"] == "box" and table.parent["tabindex"] == "0" and table.parent["aria-label"]
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in page.all("svg"))
    levels = [int(tag[1]) for tag in re.findall(r"<(h\d)>", source)]
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))  # no level is left out
    assert "None" not in page.text and "nan" not in page.one("main").text


def test_what_is_not_there_has_no_part():
    def titles(name):
        return [part.one("h2").text for part in Tree(report.page(EVERY[name]())).root.all("section")]
    assert titles("three") == ["Models", "Text", "Questions", "Confidence", "Compared with alpha", "Samples", "Answers"]
    assert titles("one, all") == ["Models", "Text", "Questions", "Confidence", "Samples", "Answers"]
    assert titles("texts alone") == ["Models", "Text"]
    assert titles("tasks alone") == ["Models", "Questions", "Answers"]  # one answer each has no confidence
    assert titles("nothing") == ["Models"]
    assert titles("everything is missing") == ["Models", "Text"]


def test_hostile_text_stays_text():
    seen = HOSTILE.replace("\0", "\u2400").replace("\x1b", "\u241b").replace("\ud800", "\ufffd")
    source = report.page(hostile())
    page = Tree(source).root
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f]", source) and source.count("<script") == 0
    assert seen in page.one("head").one("title").text and seen in page.one("footer").text
    assert [line.text for line in page.one("header").all("p")] == [f"{seen}, b{seen}", seen]
    # In every part, as a heading, a name, a sample, a prompt, an answer, and in the words for those who do not see.
    for part in page.all("section"):
        assert seen in part.text, part.one("h2").text
    for box in page.all("details"):
        assert seen in box.text or box.one("summary").text == "32 characters before"
    assert any(seen in chart["aria-label"] for chart in page.all("svg"))
    assert [span["title"] for span in page.all("span") if span.get("title")] == [seen] * 8
    names = [head.text for head in page.all("table", "answers")[0].one("thead").all("th")]
    assert names == ["no.", "prompt", "right", seen, "b" + seen]
    assert page.all("ol")[0].all("li")[0].text == seen


def test_the_table_of_models():
    found = three()
    rows = [[cell.text for cell in row.children if isinstance(cell, Node)]
            for row in section(Tree(report.page(found)).root, "Models").all("tr")]
    assert rows == [
        ["measure", "alpha", "beta", "gamma", "(a.txt itself)"],
        ["parameters", *["12,345"] * 3, ""],
        ["bits per byte on a.txt", "2.0000", "1.5000", "1.0000", ""],
        ["bits per byte on b.txt", "1.0000", "0.2500", "\u2013", ""],
        ["tokens/s", "31.25", "31.25", "\u2013", ""],
        ["pick: right", "66.7 \u00b1 14.2", "100.0 \u00b1 0.0", "66.7 \u00b1 14.2", ""],
        ["read: F1", *["80.0 \u00b1 11.0"] * 3, ""],
        ["sums: right", *["0.0"] * 2, "\u2013", ""],
        ["pick: per byte", "66.7 \u00b1 14.2", "0.0 \u00b1 0.0", "66.7 \u00b1 14.2", ""],
        ["read: exact", *["66.7 \u00b1 14.2"] * 3, ""],
        ["sums: in format", *["0.0"] * 2, "\u2013", ""],
        ["sample words", "8", "4", "\u2013", "9"],
        ["distinct-1", "0.50", "1.00", "\u2013", "0.50"],
        ["distinct-2", "0.50", "1.00", "\u2013", "0.80"],
        ["repetition", "0.33", "0.00", "\u2013", "\u2013"]]


def test_tables_and_notes():
    found = three()
    said = report.tables(found)
    lines = said.split("\n")
    first, rest = report.columns(found)
    assert len(first) == 3 and len(rest) == 4
    for start, rows in ((0, first), (6, rest)):
        for row, line in zip([dict.fromkeys(rows[0]), *rows], [lines[start], *lines[start + 2:]]):
            cells = [cell.strip() for cell in line[2:-2].split(" | ")]
            assert cells == [heading if cell is None else cell for heading, cell in row.items()]
        assert {len(line) for line in lines[start:start + 2 + len(rows)]} == {len(lines[start])}  # below each other
    page = Tree(report.page(found)).root
    notes = [line.text for line in section(page, "Models").all("li")]
    assert all(line in lines for line in notes)
    assert notes == [
        "a.txt: 1,000 bytes, 170 words, 2 documents; context 64, stride 32",
        "b.txt: 1,000 bytes, 170 words, 2 documents; context 64, stride 32",
        *notes[2:5],
        "float32 on cpu, 2 threads, torch 2.13.0, Python 3.11.7; tokens/s: one text alone, the best of three; 1.5 "
        "minutes in all",
        "gamma: b.txt: no token for \u00fc", "gamma: sums: scores are not finite", "gamma: samples: long prompt"]
    assert re.sub(r"0\.\d\d ", "", notes[2]) == (
        "pick: 12 questions, no examples; percent \u00b1 standard error; by chance 50.0; "
        "calibration error (alpha), (beta), (gamma); in the chat format: gamma")
    assert notes[3].endswith("standard error; prompts cut at their beginning, to fit: 7 (gamma)")
    assert "| gamma | pick | 0.0 \u00b1 0.0 " in said and "python evaluate.py" in page.one("header").text


def test_bars_are_as_long_as_their_values():
    a, b = section(Tree(report.page(three())).root, "Text").all("figure")
    lengths = [{name: share(bars[0]["width"]) if bars else None for name, bars in marks_of(figure, "rect").items()}
               for figure in (a, b)]
    assert lengths == [dict(alpha=1.0, beta=0.75, gamma=0.5), dict(alpha=0.5, beta=0.125, gamma=None)]  # one scale
    assert [row.all("text")[1].text for row in b.all("g")] == ["1.0000", "0.2500", "\u2013"]
    assert a.one("svg")["aria-label"] == "a.txt, bits per byte: alpha 2.0000; beta 1.5000; gamma 1.0000"
    assert {tick["x"]: tick.text for tick in a.all("text", "tick")} == {"0%": "0", "100%": "2.00"}


def test_dots_have_lines_of_one_error_to_each_side():
    found = three()
    pick, read, sums = section(Tree(report.page(found)).root, "Questions").all("figure")
    for figure, name in ((pick, "pick"), (read, "read")):
        lines = marks_of(figure, "line")
        for row, (who, [dot]) in zip(found["models"], marks_of(figure, "circle").items()):
            mark = next(iter(row["tasks"][name]["metrics"].values()))
            [line] = lines[who]
            assert row["model"] == who and share(dot["cx"]) == pytest.approx(mark["value"], abs=1e-4)
            assert share(line["x2"]) - share(line["x1"]) == pytest.approx(2 * mark["error"], abs=2e-4)
            assert share(line["x2"]) + share(line["x1"]) == pytest.approx(2 * mark["value"], abs=2e-4)
            assert line["y1"] == line["y2"] == dot["cy"] and line["class"] == "error"
    assert pick.one("line", "chance")["x1"] == pick.one("line", "chance")["x2"] == "50.00%"
    assert "by chance 50.0" in pick.one("figcaption").text and not read.all("line", "chance")
    # One question alone has no error, and what was not asked has no dot.
    assert not sums.all("line", "error") and {who: len(dot) for who, dot in marks_of(sums, "circle").items()} == dict(
        alpha=1, beta=1, gamma=0)
    rows = [int(re.search(r"translate\(0 (\d+)\)", row["transform"])[1]) for row in pick.all("g")]
    assert rows == [0, report.ROW, 2 * report.ROW] and int(pick.one("svg")["height"]) >= 3 * report.ROW


def test_a_line_ends_where_the_scale_ends():
    """Questions in groups of different sizes may have an error that is larger than the mark."""
    found = results(model("m", tasks={"pick": task("choice", questions("choice", 6))}))
    for value, error, ends in ((0.1, 0.3, (0, 0.4)), (0.9, 0.3, (0.6, 1))):
        found["models"][0]["tasks"]["pick"]["metrics"]["accuracy"] = dict(value=value, error=error)
        line = section(Tree(report.page(found)).root, "Questions").one("line", "error")
        assert (share(line["x1"]), share(line["x2"])) == pytest.approx(ends)


def test_reliability_diagrams():
    found = three()
    part = section(Tree(report.page(found)).root, "Confidence")
    assert [heading.text for heading in part.all("h3")] == ["pick"]
    assert [figure.one("h4").text for figure in part.all("figure")] == ["alpha", "beta", "gamma"]
    for row, figure in zip(found["models"], part.all("figure")):
        expected, dots = row["tasks"]["pick"], figure.all("circle")
        assert len(dots) == len(expected["calibration"]) > 1
        for at, dot in zip(expected["calibration"], dots):
            assert float(dot["cx"]) == pytest.approx(100 * at["confidence"], abs=0.01)
            assert 100 - float(dot["cy"]) == pytest.approx(100 * at["accuracy"], abs=0.01)
            assert math.pi * float(dot["r"]) ** 2 == pytest.approx(math.pi * 100 * at["n"] / 12, rel=0.01)
            said = dot.one("title").text
            assert f"{at['n']} questions" in said and said in figure.one("svg")["aria-label"]
        assert f"calibration error {expected['calibration_error']:.2f}" in figure.one("figcaption").text
        assert "M0 100 100 0" in figure.one("path")["d"]  # the diagonal, from below to above


def test_differences():
    part = section(Tree(report.page(three())).root, "Compared with alpha")
    rows = [[cell.text for cell in row.children if isinstance(cell, Node)] for row in part.all("tr")]
    assert rows == [["task", "beta", "gamma"], ["pick: right", "33.3 \u00b1 14.2", "0.0 \u00b1 0.0"],
                    ["read: F1", "0.0 \u00b1 0.0", "0.0 \u00b1 0.0"], ["sums: right", "0.0", "\u2013"]]


def test_samples():
    part = section(Tree(report.page(three())).root, "Samples")
    assert [box.one("summary").text for box in part.all("details")] == [
        "alpha: 2 samples; sample words 8, distinct-1 0.50, distinct-2 0.50, repetition 0.33",
        "beta: 1 samples; sample words 4, distinct-1 1.00, distinct-2 1.00, repetition 0.00"]
    assert [[sample.text for sample in box.all("li")] for box in part.all("details")] == [
        ["one two one two one two", "\n  x\ty\n"], ["red green blue sky"]]  # (not <pre>: it drops the first line end)
    assert part.one("code").text == "Once\nupon"
    assert "a.txt itself: sample words 9, distinct-1 0.50" in part.one("p").text
    assert not [box for box in part.all("details") if "open" in box.attributes]


def test_answers():
    found = three()
    part = section(Tree(report.page(found)).root, "Answers")
    boxes = [box for box in part.all("details") if box.parent.tag == "div"]
    assert [box.all("summary")[0].text.split(":")[0] for box in boxes] == ["pick", "read", "sums"]
    assert "12 questions; right: alpha 66.7 \u00b1 14.2, beta 100.0 \u00b1 0.0, gamma" in boxes[0].one("summary").text
    for box, name in zip(boxes, ("pick", "read", "sums")):
        rows = box.one("tbody").all("tr")
        for i, (row, item) in enumerate(zip(rows, found["models"][0]["tasks"][name]["items"], strict=True)):
            number, (prompt, right, *cells) = row.one("th"), [cell for cell in row.all("td")]
            assert number.text == str(i + 1) and number.one("span")["title"] == f"t.jsonl, line {i + 1}"
            assert prompt.text == item["prompt"] and right.text == item["right"][0]
            for who, cell in zip(found["models"], cells, strict=True):
                if name not in who["tasks"]:
                    assert cell.text == "\u2013"
                    continue
                theirs = who["tasks"][name]["items"][i]
                mark = next(iter(theirs["marks"].values()))
                sign = next(node for node in cell.all("b") if node.text)
                assert (sign.text, sign["aria-label"]) == (("\u2713", "right") if mark == 1 else ("\u2717", "wrong")
                                                           if mark == 0 else ("\u2248", "partly right"))
                if name == "pick":
                    lines = [[node.text for node in line.children] for line in cell.all("li")]
                    odds = [math.exp(logprob) for logprob in theirs["logprobs"]]
                    assert [line[2] for line in lines] == theirs["choices"]
                    assert [line[1] for line in lines] == [f"{odd / sum(odds):.2f}" for odd in odds]
                    assert [line[2] for line in lines if line[0]] == [theirs["answer"]]
                else:
                    assert cell.one("bdi").text == (theirs["answer"] or "(nothing)")
                    [written] = cell.all("div", "text")
                    assert written.text == (theirs["texts"][0] or "(nothing)")
    assert "F1 0.8, exact 0" in boxes[1].text and "in format 0" in boxes[2].text


def test_votes_and_prompts():
    """Long prompts are cut only for the eye; another prompt of another model and all votes can be opened."""
    long = "".join(f"word{i} " for i in range(400)) + "end."
    rows = questions("words", 2, prompt=long, texts=["x", "", "<y>"], confidence=2 / 3)
    found = results(model("m", tasks={"read": task("words", rows)}),
                    model("n", tasks={"read": task("words", [row | dict(prompt="x" * 1000) for row in rows])}))
    first = section(Tree(report.page(found)).root, "Answers").one("tbody").all("tr")[0]
    prompt, _, ours, theirs = first.all("td")
    shut, end = prompt.one("details").one("div"), prompt.all("div")[-1]
    assert shut.text + end.text == long and end.text.startswith("word")
    assert report.TAIL <= len(end.text) < report.TAIL + 10
    assert prompt.one("summary").text == f"{len(shut.text):,} characters before"
    assert [box.one("summary").text for box in ours.all("details")] == ["all 3 votes"]
    assert ours.one("div").text == "x(nothing)<y>" and len(ours.one("div").all("hr")) == 2
    assert "confidence 0.67" in ours.one("small").text
    assert [box.one("summary").text for box in theirs.all("details")] == ["its own prompt", "all 3 votes"]
    assert theirs.all("div")[0].text == "x" * 1000
    for words in ("x" * 1000, "x" * 401, "x" * 400, ""):  # without a space, and where it is not worth a click
        cell = Tree(report.prompt(words)).root
        assert "".join(box.text for box in cell.all("div")) == words
        assert len(cell.all("details")) == (len(words) > 400)


def test_a_thousand_questions_are_a_few_megabytes():
    rows = questions("choice", 1000, prompt="A question of some length. " * 10)
    found = results(*(model(f"m{i}", tasks={"pick": task("choice", rows)}) for i in range(3)))
    assert len(report.page(found).encode()) < 3e6


def test_in_a_browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the package selenium is not installed")
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        for name in ("three", "hostile"):
            path = tmp_path / f"{name}.html"
            path.write_text(report.page(EVERY[name]()), encoding="utf-8")
            for width in (360, 1280):
                browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                        dict(width=width, height=800, deviceScaleFactor=1, mobile=width == 360))
                browser.get(path.as_uri())
                wide = "return document.documentElement.scrollWidth"
                assert browser.execute_script(wide) <= width
                shown = "return [...document.querySelectorAll('td, ol.text')].filter((e) => e.checkVisibility()).length"
                before = browser.execute_script(shown)
                for box in browser.find_elements("css selector", "section > div > details > summary"):
                    box.click()
                assert browser.execute_script(shown) > before + 30
                assert browser.execute_script(wide) <= width  # the tables scroll in their boxes
                # A chart is as wide as its place, and what is drawn is where it is said to be.
                assert browser.execute_script("""return [...document.querySelectorAll('.charts svg')].every((svg) => {
                  const box = svg.getBoundingClientRect();
                  return box.width > 250 && [...svg.querySelectorAll('circle')].every((dot) => {
                    const at = dot.getBoundingClientRect();
                    const due = box.x + box.width * parseFloat(dot.getAttribute('cx')) / 100;
                    return Math.abs(at.x + at.width / 2 - due) < 1;
                  })})""")
        assert browser.get_log("browser") == []
    finally:
        browser.quit()
