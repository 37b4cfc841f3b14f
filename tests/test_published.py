# SPDX-License-Identifier: GPL-3.0-only
"""Questions as well-known sets publish them, asked as lm-evaluation-harness asks them."""
import json
import math

import pytest
from conftest import error
from evaluations import evaluated, other
from evaluations import task as task_of

import evaluate
from evaluation import grading


class Plain:
    """Prompts as text, so that they can be compared by eye."""
    @staticmethod
    def encode(text):
        return text

    @staticmethod
    def chat(messages):
        return [(message["role"], message["content"]) for message in messages]


MMLU = dict(question="What is 1 + 1? ", subject="abstract_algebra", choices=["0", "1", "2", "3"], answer=2)
MMLU_TEXT = ("The following are multiple choice questions (with answers) about abstract algebra.\n\n"
             "What is 1 + 1?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:")
HELLASWAG = dict(ind=24, activity_label="Roof shingle removal", ctx_a="A man is sitting on a roof.", ctx_b="he",
                 ctx="A man is sitting on a roof. he", split="val", split_type="indomain", label="3",
                 endings=["is using wrap.", "is ripping [step] tiles off.", "holds a cube.", "starts pulling up roofing."],
                 source_id="activitynet~v_-JhWjGDPHMY")
ARC = dict(id="Mercury_7175875", question="Which is a gas? ", answerKey="C",
           choices=dict(text=["iron", "wood", "air", "ice"], label=["A", "B", "C", "D"]))
AI2 = dict(id="x", answerKey="C", question=dict(stem="Which is a gas?", choices=[
    dict(text=text, label=label) for text, label in zip(["iron", "wood", "air", "ice"], "ABCD")]))
ARC_TEXT = "Question: Which is a gas?\nAnswer:"
GAS = ["iron", "wood", "air", "ice"]


@pytest.mark.parametrize("row, prompt, choices, right", [
    (MMLU, MMLU_TEXT, list("ABCD"), "C"), (dict(MMLU, answer="C"), MMLU_TEXT, list("ABCD"), "C"),
    (dict(MMLU, answer="2"), MMLU_TEXT, list("ABCD"), "C"),
    ({**MMLU, "subject": None}, MMLU_TEXT.partition("\n\n")[2], list("ABCD"), "C"),
    (HELLASWAG, "Roof shingle removal: A man is sitting on a roof. He",
     ["is using wrap.", "is ripping tiles off.", "holds a cube.", "starts pulling up roofing."], "starts pulling up roofing."),
    (dict(HELLASWAG, label=0), "Roof shingle removal: A man is sitting on a roof. He", None, "is using wrap."),
    (dict(activity_label="Arts", ctx_a="[header] How to sing [title] Breathe. [step] In.", ctx_b="", label="0",
          endings=["a [title] b", "c"]), "Arts: How to sing. Breathe. In.", ["a. b", "c"], "a. b"),  # (WikiHow's part)
    (ARC, ARC_TEXT, GAS, "air"), (AI2, ARC_TEXT, GAS, "air"),
    (dict(ARC, answerKey="1", choices=dict(text=GAS, label=list("1234"))), ARC_TEXT, GAS, "iron"),
    (dict(ARC, answerKey="4", choices=dict(text=GAS, label=list("1234"))), ARC_TEXT, GAS, "ice"),
])
def test_a_row(here, row, prompt, choices, right):
    (here / "t.jsonl").write_text(json.dumps(row) + "\n")
    (here / "t.json").write_text(json.dumps([row]))
    for name in ("t.jsonl", "t.json"):
        item, = grading.read_task(name)
        assert item.kind == "choice" and item.right == [right]
        assert grading.prompt_ids(item, [], Plain) == prompt
        assert choices is None or item.choices == choices
        asked = [ids for ids, _ in grading.choice_ids(item, [], Plain)]
        assert asked == [f"{prompt} {choice}" for choice in item.choices]


def test_examples_of_the_same_subject_behind_one_line_about_it(here):
    rows = [dict(MMLU, question=f"{subject} {i}?", subject=subject) for i in range(3) for subject in ("law", "art")]
    (here / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = grading.read_task("dev.jsonl")
    examples = evaluate.choose_examples(items[3], items, 2)
    assert [example.prompt[:6] for example in examples] == ["art 0?", "art 2?"]
    shown = "\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:"
    about = "The following are multiple choice questions (with answers) about art.\n\n"
    assert grading.prompt_ids(items[3], examples, Plain) == (
        f"{about}art 0?{shown} C\n\nart 2?{shown} C\n\nart 1?{shown}")
    assert grading.prompt_ids(items[3], examples[:1], Plain, chat=True) == [
        ("user", f"{about}art 0?{shown}"), ("assistant", "C"), ("user", f"art 1?{shown}")]
    assert "has only 2 examples" in error(lambda _: evaluate.choose_examples(items[3], items, 3))[0]


def test_equal_choices_are_counted(here, capsys):
    rows = [MMLU, dict(MMLU, choices=["1", "2", "2", "3"]), dict(MMLU, choices=["1", "2", "2", "1"])]
    (here / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = grading.read_task("t.jsonl")
    assert "t.jsonl: two choices are equal in 2 questions" in capsys.readouterr().err
    assert [item.twins for item in items] == [False, True, True]
    # The letter that is named is right, its twin is not.
    assert [grading.score_choice(items[1], [math.log(p) for p in probs])["marks"]["accuracy"]
            for probs in ([0.1, 0.5, 0.3, 0.1], [0.1, 0.3, 0.5, 0.1])] == [0, 1]
    (here / "own.jsonl").write_text(json.dumps(dict(prompt="p", choices=["a", "a ", "b"], answer=0)) + "\n")
    assert grading.read_task("own.jsonl")[0].twins and "equal in 1 question" in capsys.readouterr().err


@pytest.mark.parametrize("row, fact", [
    (dict(HELLASWAG, label=""), "`label` is '', which names no choice: 0, 1, 2, 3"),  # its test split
    (dict(MMLU, answer="E"), "`answer` is 'E', which names no choice: 0, 1, 2, 3, A, B, C, D"),
    (dict(MMLU, answer=4), "`answer` is '4'"), (dict(MMLU, answer=-1), "`answer` is '-1'"),
    (dict(MMLU, answer=None), "`answer` is 'None'"), (dict(MMLU, answer=[1]), "`answer` is '[1]'"),
    (dict(MMLU, choices=["a", 1]), "`choices[1]` is not a"), (dict(MMLU, question=" "), "`question` is empty"),
    (dict(ARC, answerKey="E"), "`answerKey` is 'E'"), (dict(ARC, choices=dict(text=GAS)), "no field `label`; found text"),
    (dict(ARC, choices="x"), "no field `text`; found str"), (dict(AI2, question=dict(stem="a")), "no field `choices`"),
    (dict(AI2, question=dict(stem="a", choices=[dict(text="a")])), "no field `label`"),
    (dict(HELLASWAG, ctx_b=None), "`ctx_b` is not a"),
    (dict(MMLU, choices=[]), "`answer` is '2', which names no choice")])
def test_a_wrong_row_is_named(here, row, fact):
    (here / "t.jsonl").write_text(json.dumps(MMLU) + "\n" + json.dumps(row) + "\n")
    found, fix = error(lambda _: grading.read_task("t.jsonl"))
    assert found.startswith("t.jsonl, line 2: ") and fact in found and fix


def test_squad_as_a_table_has_it(here):
    row = dict(id="5", title="Air", context="Air is a gas.", question="What is air?",
               answers=dict(text=["a gas", "gas"], answer_start=[7, 9]))
    (here / "t.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(dict(row, answers=dict(text=[], answer_start=[]))) + "\n")
    one, two = grading.read_task("t.jsonl")
    assert (one.kind, one.right, one.prompt) == ("words", ["a gas", "gas"], "Air is a gas.\n\nQuestion: What is air?\nAnswer:")
    assert two.right == [""]


def test_a_model_is_evaluated_on_them(here):
    """From the file to the table: a random model, which has a token for each character."""
    other("folder")
    rows = [dict(HELLASWAG, ctx_a="A man", label=str(i % 2), endings=["sits.", "is on a roof."]) for i in range(4)]
    task, = evaluated("folder", task_of("swag.jsonl", *rows), "--data=none", "--samples=0")["models"][0]["tasks"].values()
    assert task["n"] == 4 and task["metrics"]["accuracy"]["value"] == 0.5 and task["chance"] == 0.5
