# SPDX-License-Identifier: GPL-3.0-only
"""Grading: marks by their definitions, prompts word for word, and what is said about wrong questions."""
import ast
import gzip
import itertools
import json
import operator
import random
import re
from collections import Counter
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from conftest import ROOT, data_file, error, nasty

import evaluate
from evaluation import grading
from evaluation.grading import Item, number, vote


class Plain:
    """A tokenizer that shows what it was given."""
    template = "x"
    encode = decode = staticmethod(lambda text: text)
    chat = staticmethod(lambda messages: [(message["role"], message["content"]) for message in messages])


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Words


def words_by_definition(text):
    """SQuAD's words: lower case; ASCII's signs are dropped; a, an and the that stand alone become a space."""
    text = "".join(c for c in text.lower() if c.isalnum() or not "!" <= c <= "~")
    runs = ("".join(run) for _, run in itertools.groupby(text, str.isalnum))
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def marks_by_definition(answer, rights):
    """(F1, exact match), each the best over the right answers."""
    f1, exact, ours = [], [], words_by_definition(answer)
    for theirs in map(words_by_definition, rights):
        left = list(theirs)
        shared = sum(1 for word in ours if word in left and not left.remove(word))
        precision, recall = shared / max(1, len(ours)), shared / max(1, len(theirs))
        f1.append(2 * precision * recall / (precision + recall) if shared else float(not ours and not theirs))
        exact.append(float(ours == theirs))
    return max(f1), max(exact)


def check_marks(items):
    """Hold the marks of all kinds of answers against their definition; how many of these were wrong, partly right, right."""
    rng, seen, everything = random.Random(0), Counter(), [item.right[0] for item in items]
    for item in items:
        right, other = item.right[0], rng.choice(everything)
        start = item.group.index(right)
        near = item.group[max(0, start - rng.randrange(20)):start + len(right) + rng.randrange(20)]
        shuffled = " ".join(rng.sample(right.split(" "), right.count(" ") + 1))
        item.right = [right, other] if rng.random() < 0.3 else [right]
        for answer in (other, right[:len(right) // 2], f"{right} {other}", f"The {right.upper()}!", near,
                       f"an {shuffled},", f"{right} {right}", right.replace(" ", " the "), ""):
            found = grading.score_text(item, [answer])["marks"]
            f1, exact = marks_by_definition(answer.strip().split("\n")[0], item.right)
            assert found["f1"] == pytest.approx(f1, abs=1e-12) and found["exact"] == exact, (answer, item.right)
            seen["wrong" if not f1 else "right" if exact else "partly"] += 1
    return seen


def test_f1_and_exact_match_are_squads():
    seen = check_marks(grading.read_task(str(ROOT / "evaluation/tasks/reading.jsonl")))
    assert seen.total() == 60 * 9 and min(seen.values()) > 100, seen


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "es", "de", "zh"])
def test_f1_and_exact_match_are_squads_in_four_languages(language):
    items = grading.read_task(str(data_file(f"xquad/xquad.{language}.json")))
    assert len(items) == 1190 and len({item.group for item in items}) == 240
    assert min(check_marks(items).values()) > 1000


@pytest.mark.parametrize("answer, right, due", [
    ("the cat sat", "a cat", 2 / 3), ("cat cat", "cat", 2 / 3), ("York, New", "New York City", 0.8), ("", "", 1),
    ("", "x", 0), ("the", "An", 1), ("Ebba's", "ebbas", 1), ("one two", "three", 0), ("theatre", "atre", 0),
    ("a.b c", "ab c", 1), ("l\u2019a b", "l\u2019 b", 1), ("1,234", "1234", 1), ("b b c", "b c c", 2 / 3)])
def test_f1_by_hand(answer, right, due):
    assert grading.f1(answer, right) == grading.f1(right, answer) == pytest.approx(due)


def test_the_first_line_is_the_answer_and_the_best_right_one_counts():
    item = Item("words", "", "", "", ["a dog", "the old man"], [])
    assert grading.score_text(item, ["\n The old man.\nQuestion: who?"]) == dict(
        marks=dict(f1=1.0, exact=1.0), answer="The old man.", confidence=None)
    voted = grading.score_text(item, ["cat", "A dog", "Dog!", "cat dog"])
    assert voted == dict(marks=dict(f1=1.0, exact=1.0), answer="A dog", confidence=0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and votes


def check_answers(path, n):
    """The number at the end of every answer is found, and counts as right in whatever way it is written."""
    items, rows = grading.read_task(str(path)), list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
    assert len(items) == len(rows) == n
    for item, row in zip(items, rows):
        due = Decimal(row["answer"].split("#### ")[1].replace(",", ""))
        assert number(row["answer"]) == due
        marked = grading.score_text(item, [row["answer"], f"It is ${due:,}.", f"{due + 1}"])
        assert marked["marks"] == {"accuracy": 1.0, "format": 1 / 3} and marked["confidence"] == 2 / 3
        assert "<<" not in item.steps and "####" not in item.steps and row["answer"].startswith(item.steps[:3])


def test_every_answer_of_our_own_sums():
    check_answers(ROOT / "evaluation/tasks/reasoning.jsonl", 60)


@pytest.mark.slow
@pytest.mark.parametrize("split, n", [("train", 7473), ("test", 1319)])
def test_every_answer_of_gsm8k(split, n):
    check_answers(data_file(f"gsm8k/gsm8k_{split}.jsonl"), n)


@pytest.mark.parametrize("text, due", [
    ("$1,234.50", "1234.50"), ("####18", 18), ("#### $18", 18), ("The answer is 7.", 7), ("-3", -3), ("", None),
    ("####", None), ("#### -", None), ("1,2,3", 123), ("####  -5.", -5), ("1 then 2 #### 3\nor #### 5", 3),
    ("18.00", 18), ("3 to 12", 12), ("#### 1.2.3", None), (".5", "0.5"), ("9" * 9999,) * 2, ("#### 2,000", 2000),
    ("10-5", 5), ("so 20 - 5 = -3", -3), ("#### -$5", -5), ("is $-7", -7), ("is -$8.50", "-8.5")])
def test_numbers_by_hand(text, due):
    assert number(text) == (None if due is None else Decimal(due))


def test_no_text_makes_the_search_for_a_number_fail():
    item = Item("number", "", "", "", ["1"], [])
    for text in nasty(2000):
        for made in (text, "####" + text, f"-{text}.1,{text}"):
            assert number(made) is None or isinstance(number(made), Decimal)
            assert grading.score_text(item, [made])["marks"]["accuracy"] in (0, 1)


def test_votes():
    assert vote(["b", "a", "a", "b"]) == ("b", 0.5) and vote([None, 3, 3, None, None]) == (3, 0.4)
    assert vote([None, None]) == (None, 0.0) and vote([2]) == (2, 1.0)
    assert vote([Decimal("18"), 1, Decimal("18.00")])[1] == 2 / 3
    item = Item("number", "", "", "", ["18"], [])
    assert grading.score_text(item, ["x", "y"]) == dict(marks=dict(accuracy=0.0, format=0.0), answer="", confidence=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Errors, calibration, variety


def test_standard_errors():
    rng = np.random.default_rng(0)
    marks, groups = rng.random(40), rng.integers(0, 9, 40)
    assert grading.mean(list(marks), range(40)) == pytest.approx(dict(value=marks.mean(), error=marks.std(ddof=1) / 40**0.5))
    off = marks - marks.mean()  # the sum of all products within a group, two by two
    square = sum(off[i] * off[j] for i in range(40) for j in range(40) if groups[i] == groups[j])
    due = (square * 9 / 8) ** 0.5 / 40
    assert grading.mean(list(marks), groups.tolist()) == pytest.approx(dict(value=marks.mean(), error=due))
    assert due != pytest.approx(marks.std(ddof=1) / 40**0.5, rel=0.02)
    twice = grading.mean([0, 0, 1, 1, 1, 1], "aabbcc")["error"]  # copies of a question tell nothing new
    assert twice == pytest.approx(grading.mean([0, 1, 1], "abc")["error"])
    assert grading.mean([0.5], ["a"]) == grading.mean([0, 1], ["a", "a"]) == dict(value=0.5, error=None)


def test_calibration():
    table, off = grading.calibration([0.95, 0.97, 0.55, 0.55, 1.0], [1, 0, 1, 1, 1])
    assert off == pytest.approx(2 / 5 * 0.45 + 3 / 5 * (2.92 / 3 - 2 / 3))
    assert [row["n"] for row in table] == [2, 3] and table[0] == pytest.approx(dict(n=2, confidence=0.55, accuracy=1))
    rng = np.random.default_rng(0)
    sure = rng.random(20_000)
    assert grading.calibration(sure, rng.random(20_000) < sure)[1] < 0.015
    assert grading.calibration(sure, rng.random(20_000) < sure**2)[1] == pytest.approx(1 / 6, abs=0.015)
    assert len(grading.calibration([0.0, *sure], [0, *sure])[0]) == 10


def test_variety():
    def measured(*texts):
        return list(grading.variety(list(texts)).values())
    assert measured("a b c d a b c d") == pytest.approx([8, 4 / 8, 4 / 7, 1 / 5])  # (abcd bcda cdab dabc abcd)
    assert measured("a b c d", "a b c d") == pytest.approx([8, 4 / 8, 3 / 6, 0])  # another text repeats nothing
    assert measured("x x x x x x") == pytest.approx([6, 1 / 6, 1 / 5, 2 / 3])
    assert measured("don't, no") == pytest.approx([5, 1, 1, 0])  # don ' t , no
    assert measured("a b c", "x") == [4, 1, 1, None] and measured("a", "b") == [2, 1, None, None]
    assert measured("", "  ") == [0, None, None, None]
    assert measured("a " * 49 + "b c d e") == measured("a " * 49 + "b") == pytest.approx([50, 2 / 50, 2 / 49, 45 / 47])


# ---------------------------------------------------------------------------------------------------------------------
# Files

CHOICE = {"prompt": "p", "choices": ["a", "b"], "answer": 1}
READ = {"context": "c", "question": "q", "answers": ["a"]}
SUM = {"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 2"}
QA = {"question": "q", "answers": [{"text": "a"}]}


def squad(*qas, **paragraph):
    return json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [QA, *qas], **paragraph}]}]})


WRONG = [
    ('{"prompt": "p"', "line 2: not JSON"), ("[1]", "line 2: no field `question`; found list"), ("null", "null"),
    ('"text"', "line 2: no field `question`; found str"), ("{}", "line 2: no field `question`; found none"),
    ("1" * 9000, "line 2: unreadable"),
    *((CHOICE, change, part) for change, part in [
        ({"answer": ...}, "no field `answer`; found prompt, choices"), ({"choices": ...}, "no field `question`; found prompt, answer"),
        ({"prompt": ...}, "no field `prompt`; found choices, answer"), ({"choices": "ab"}, "`choices` is not a list but str"),
        ({"choices": []}, "`answer` is '1', which names no choice"), ({"choices": ["a", 1]}, "`choices[1]` is not a text but"),
        ({"answer": 2}, "`answer` is '2', which names no choice: 0, 1"), ({"answer": -1}, "`answer` is '-1'"),
        ({"answer": 1.0}, "`answer` is '1.0'"), ({"answer": True}, "`answer` is 'True'"),
        ({"answer": None}, "`answer` is 'None'"), ({"prompt": 5}, "`prompt` is not a text but int"),
        ({"prompt": " \n"}, "`prompt` is empty"), ({"prompt": "\ud800"}, "`prompt` has half a character, '\\ud800'"),
        ({"choices": ["a", "\udc00b"]}, "`choices[1]` has half a character")]),
    *((READ, change, part) for change, part in [
        ({"answers": "a"}, "`answers` is not a list but str"), ({"answers": [["a"]]}, "`answers[0]` is not a text but"),
        ({"context": 7}, "`context` is not a text but int"), ({"question": {}}, "`question` is not a text but"),
        ({"question": ...}, "no field `question`; found context, answers"),
        ({"answers": ["a", "\ud83d"]}, "`answers[1]` has half a character")]),
    *((SUM, change, part) for change, part in [
        ({"answer": "12"}, "`answer` does not end with ####"), ({"answer": "#### none"}, "`answer` does not end with"),
        ({"answer": "1 ####"}, "`answer` does not end with ####"), ({"answer": "#### 6 apples"}, "does not end with"),
        ({"answer": 12}, "`answer` is not a text but int"),
        ({"question": []}, "`question` is not a text but list")]),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong[-1])
def test_a_wrong_row_is_named(here, wrong):
    good, change, part = wrong if len(wrong) == 3 else (CHOICE, None, wrong[1])
    row = wrong[0] if change is None else json.dumps({k: v for k, v in {**good, **change}.items() if v is not ...})
    (here / "t.jsonl").write_text(json.dumps(good) + "\n" + row)
    fact, fix = error(lambda _: grading.read_task("t.jsonl"))
    assert fact.startswith("t.jsonl, line 2: ") and part in fact and fix and "\n" not in fact + fix


@pytest.mark.parametrize("content, part", [
    ("", "t.json: not JSON"), ("[]", "t.json holds 0 questions"), ('{"data": {}}', "`data` is not a list"),
    ('{"data": [{"title": "x"}]}', "t.json, data[0]: no field `paragraphs`; found"), ('{"data": []}', "holds 0 questions"),
    ('{"data": ["x"]}', "data[0]: no field `paragraphs`; found str"), (squad(context=1), "`context` is not a text but"),
    (squad(qas={}), "paragraphs[0]: `qas` is not a list but dict"), ("[" * 200_000, "t.json, number 1: not JSON"),
    ('{"data": [{"paragraphs": [{"qas": []}]}]}', "data[0].paragraphs[0]: no field `context`"),
    ('{"data": [{"paragraphs": [{"context": "c"}]}]}', "data[0].paragraphs[0]: no field `qas`"),
    (squad({"question": "q"}), "qas[1]: no field `answers`"), (squad({"answers": QA["answers"]}), "field `question`"),
    (squad("q"), "paragraphs[0].qas[1]: no field `question`; found str"), (squad({**QA, "question": 1}), "`question` is"),
    (squad({**QA, "answers": "a"}), "not a list but str"), (squad({**QA, "answers": [1]}), "no field"),
    (squad({**QA, "answers": [{}]}), "qas[1]: no field `text`"),
    (squad({**QA, "answers": [{"text": 3}]}), "qas[1]: `text` is not a text but int"),
    (squad({**QA, "question": "\ud800"}), "qas[1]: `question` has half a character")])
def test_a_wrong_file_of_squad_is_named(here, content, part):
    (here / "t.json").write_text(content)
    fact, fix = error(lambda _: grading.read_task("t.json"))
    assert "t.json" in fact and part in fact and fix and "\n" not in fact + fix


def test_files_that_are_right(here):
    for name, opened in (("t.jsonl", open), ("t.JSONL.gz", gzip.open)):
        with opened(name, "wb") as file:
            file.write(b"\r\n" + json.dumps({**CHOICE, "id": 7}).encode() + b"\r\n \r\n" + json.dumps(CHOICE).encode())
        one, two = grading.read_task(name)
        assert (one.kind, one.prompt, one.choices, one.right) == ("choice", "p", ["a", "b"], ["b"])
        assert [one.where, two.where] == [f"{name}, line 2", f"{name}, line 4"]
    with gzip.open("t.json.gz", "wb") as file:
        file.write(squad({"question": " why? ", "answers": [], "is_impossible": True}).encode())
    one, two = grading.read_task("t.json.gz")
    assert (two.kind, two.right, two.group, two.prompt) == ("words", [""], "c", "c\n\nQuestion: why?\nAnswer:")
    for content in ("", "\n \n"):
        (here / "t.jsonl").write_text(content)
        assert error(lambda _: grading.read_task("t.jsonl"))[0] == "t.jsonl holds 0 questions of 0 kinds"
    fact, _ = error(lambda _: grading.read_task(written(here / "t.jsonl", READ, READ, SUM, CHOICE)))
    assert fact.endswith("t.jsonl holds 4 questions of 3 kinds")
    one, two, three = grading.read_task(written(here / "t.jsonl", {**READ, "answers": []}, {**READ, "context": None},
                                                {"question": "q", "answers": ["the"]}))
    assert (one.right, two.group, two.prompt, three.right) == ([""], "", "Question: q\nAnswer:", ["the"])
    item, = grading.read_task(written(here / "t.jsonl", {"prompt": "p ", "choices": ["a", " b"], "answer": 1}))
    assert (item.prompt, item.choices, item.right) == ("p", ["a", "b"], ["b"])  # one space is put between them


# ---------------------------------------------------------------------------------------------------------------------
# Prompts

STEPS = "Let's think step by step."
PROMPTS = {  # what a file says, and the text that is made of it: without examples, with two, with two and the way
    "choice": ([CHOICE] * 3, "p", "p b\n\np b\n\np", "p b\n\np b\n\np"),
    "words": ([READ, {"prompt": "w:", "answers": ["x", "y"]}, {"context": "c", "prompt": "z", "answers": ["a"]}],
              "c\n\nQuestion: q\nAnswer:", "w: x\n\nc\n\nz a\n\nc\n\nQuestion: q\nAnswer:",
              "w: x\n\nc\n\nz a\n\nc\n\nQuestion: q\nAnswer:"),
    "number": ([SUM] * 3, "Question: q\nAnswer:", "Question: q\nAnswer: #### 2\n\n" * 2 + "Question: q\nAnswer:",
               "Question: q\nAnswer: 1+1=2\n#### 2\n\n" * 2 + "Question: q\nAnswer:"),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_as_text(here, kind):
    rows, alone, two, steps = PROMPTS[kind]
    item, *examples = grading.read_task(written(here / "t.jsonl", *rows))
    assert item.kind == kind and grading.prompt_ids(item, [], Plain) == alone
    assert grading.prompt_ids(item, examples, Plain) == two
    assert grading.prompt_ids(item, examples, Plain, cot=True) == steps
    assert grading.prompt_ids(item, [], Plain, cot=True) == alone + (f" {STEPS}" if kind == "number" else "")
    if kind == "choice":
        assert list(grading.choice_ids(item, examples, Plain)) == [(f"{two} {choice}", 2) for choice in "ab"]


def test_prompts_as_a_chat(here):
    item, example = grading.read_task(written(here / "t.jsonl", {**SUM, "question": "last"}, SUM))
    told = grading.INSTRUCTIONS["number"]
    assert "####" in told and grading.prompt_ids(item, [], Plain, chat=True) == [("user", told + "last")]
    assert grading.prompt_ids(item, [example], Plain, chat=True) == [
        ("user", told + "q"), ("assistant", "#### 2"), ("user", "last")]
    assert grading.prompt_ids(item, [example], Plain, cot=True, chat=True) == [
        ("user", f"{told}q\n{STEPS}"), ("assistant", "1+1=2\n#### 2"), ("user", f"last\n{STEPS}")]
    item, = grading.read_task(written(here / "t.jsonl", READ))
    told = grading.INSTRUCTIONS["words"]
    assert grading.prompt_ids(item, [], Plain, cot=True, chat=True) == [("user", told + "c\n\nQuestion: q")]


# ---------------------------------------------------------------------------------------------------------------------
# The sets that come with it


def calculated(text):
    """The value of an arithmetic expression, exactly; nothing else is understood."""
    known = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node):
        if isinstance(node, ast.BinOp):
            return known[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant) and type(node.value) in (int, float), text
        return Fraction(str(node.value))
    return value(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize("name, n, kind, fields", [
    ("completion", 100, "choice", "prompt choices answer"), ("sentiment", 100, "choice", "prompt choices answer"),
    ("reading", 60, "words", "context question answers"), ("reasoning", 60, "number", "question answer")])
def test_the_sets_that_come_with_it(name, n, kind, fields):
    path = ROOT / f"evaluation/tasks/{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    rows, items = list(map(json.loads, lines)), grading.read_task(str(path))
    assert len(rows) == len(items) == n and all(item.kind == kind for item in items)
    assert all([*row] == fields.split() for row in rows) and name in evaluate.BUNDLED
    asked = [row.get("prompt") or row["question"] for row in rows]
    assert len(set(asked)) == n and all(text == text.strip() for text in asked)
    if kind == "choice":
        ways, keys = len(rows[0]["choices"]), Counter(row["answer"] for row in rows)
        assert all(len(row["choices"]) == ways for row in rows) and set(keys.values()) == {n // ways}
        lengths = [([len(choice) for choice in row["choices"]], row["answer"]) for row in rows]
        for extreme in (max, min):  # to take the longest, or the shortest, is about as good as chance
            right = sum((these[key] == extreme(these)) / these.count(extreme(these)) for these, key in lengths)
            assert abs(right / n - 1 / ways) < 0.1
    if kind == "words":
        assert all(answer in row["context"] and answer for row in rows for answer in row["answers"])
        assert set(Counter(row["context"] for row in rows).values()) == {3}
    if kind == "number":
        for row in rows:
            steps = re.findall(r"<<([^<>=]+)=([^<>]+)>>", row["answer"])
            assert 1 <= len(steps) <= 4 and row["answer"].count("<<") == len(steps)
            assert all(calculated(expression) == Fraction(result) for expression, result in steps), row
            assert Fraction(steps[-1][1]) == Fraction(str(number(row["answer"]))) and "\n#### " in row["answer"]
