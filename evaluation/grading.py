# SPDX-License-Identifier: GPL-3.0-only
"""
Grading: from a file of questions to prompts, and from answers to scores.

    items = read_task("evaluation/tasks/sentiment.jsonl")   # or the files of MMLU, GSM8K, SQuAD, ... as they are
    ids = prompt_ids(items[0], items[1:5], tokenizer)       # with four examples before it
    f1("in the garden", "The garden!"), number("... #### 1,234")

The fields of a row tell which of three kinds of question it is:

choice   {"prompt", "choices", "answer": 2}   The answer is the most probable choice. Nothing is written.
         The layouts of CHOICES                MMLU, HellaSwag, ARC, asked as lm-evaluation-harness asks them.
words    {"context", "question", "answers"}   The first line that the model writes is compared with each right answer,
         {"prompt", "answers"}                exactly and by shared words (F1). SQuAD's kind.
number   {"question", "answer": "... #### N"} The number after #### counts. GSM8K's kind.

The first wrong row is an error: a question left out changes the score.
"""
import math
import re
import string
from collections import Counter
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation

import numpy as np

from runtime.console import UserError, counted, note
from text.rows import SQUAD, check, field, squad
from text.sources import file_rows, layout

FIX = ('expected {"prompt": "...", "choices": ["...", "..."], "answer": 0}, {"question": "...", "answers": '
       '["..."]} or {"question": "...", "answer": "... #### 12"}')
MARKED = re.compile(r"####\s*(-?\$?-?[\d.,]*\d)")  # how GSM8K ends an answer
NUMBER = re.compile(r"(?<!\d)-?\$?\d[\d,]*(?:\.\d+)?|-?\.\d+")
STEPS = "Let's think step by step."  # Kojima 2022, arXiv 2205.11916
INSTRUCTIONS = {  # for a chat; a text shows by its form what is wanted
    "choice": "",
    "words": "Answer the question with as few words as possible, taken from the text.\n\n",
    "number": "Solve the problem. At the end, write #### and the answer as a number.\n\n"}


@dataclass
class Item:
    """A question and its right answers."""
    kind: str  # choice, words, number
    where: str  # its file and line
    prompt: str  # what a text says up to the answer
    question: str  # what a user says in a chat
    right: list[str]
    choices: list[str]
    steps: str = ""  # the way to the answer, up to the number
    group: str = ""  # the text that it is about
    intro: str = ""  # what stands before the first example: the subject
    twins: bool = False  # are two of its choices equal?

    def shown(self, cot):
        """The answer in an example; cot: with the way to it."""
        if self.kind != "number":
            return self.right[0]
        return (self.steps if cot else "") + "#### " + self.right[0]


def read_task(path):
    """The items of a file, all of one kind."""
    found = squad_rows(path) if layout(path) == "object" else file_rows(path, FIX)
    items = [item_of(row, where) for where, row in found]
    if twins := sum(item.twins for item in items):
        note(f"{path}: two choices are equal in {counted(twins, 'question')}")
    kinds = {item.kind for item in items}
    if len(kinds) != 1:
        raise UserError(f"{path} holds {len(items)} questions of {len(kinds)} kinds", f"use one kind; {FIX}")
    return items


def squad_rows(path):
    """(where, row) for every question of a file in SQuAD's layout. In version 2.0, some have no answer."""
    for where, context, paragraph in squad(path):
        for i, qa in enumerate(field(paragraph, "qas", list, where, SQUAD)):
            here = f"{where}.qas[{i}]"
            question = field(qa, "question", str, here, SQUAD)
            answers = [field(answer, "text", str, here, SQUAD) for answer in field(qa, "answers", list, here, SQUAD)]
            yield here, dict(context=context, question=question, answers=answers)


# ---------- The layouts of well-known sets, asked as lm-evaluation-harness asks them

def text_of(row, name, where):
    """The text in a field, which must not be empty."""
    text = field(row, name, str, where, FIX)
    if not text.strip():
        raise UserError(f"{where}: `{name}` is empty", FIX)
    return text


def texts_of(row, name, where):
    values = field(row, name, list, where, FIX)
    return [check(text, f"{name}[{i}]", str, where, FIX) for i, text in enumerate(values)]


def lettered(row, where):
    """MMLU: the question shows the choices, and their letters are compared."""
    choices, subject, intro = texts_of(row, "choices", where), row.get("subject"), ""
    letters = list(string.ascii_uppercase[:len(choices)])
    prompt = "\n".join([text_of(row, "question", where).strip(), *map("{}. {}".format, letters, choices), "Answer:"])
    if subject and isinstance(subject, str):
        intro = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    return dict(prompt=prompt, choices=letters, answer="answer", labels=letters, intro=intro, shown=choices)


def endings(row, where):
    """HellaSwag: which sentence comes next? Its brackets are what is left of WikiHow's pages."""
    def cleaned(text):
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    activity, begun, going_on = (field(row, name, str, where, FIX) for name in ("activity_label", "ctx_a", "ctx_b"))
    prompt = cleaned(f"{activity}: {begun} {going_on.capitalize()}")
    return dict(prompt=prompt, choices=list(map(cleaned, texts_of(row, "endings", where))), answer="label")


def labelled(row, where):
    """ARC: each choice has a label, "A" or "1". In AI2's own files, the question holds the choices."""
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):
        listed = field(question, "choices", list, where, FIX)
        choices = {name: [field(one, name, str, where, FIX) for one in listed] for name in ("text", "label")}
        row = question | dict(question=question.get("stem"))
    prompt = f"Question: {text_of(row, 'question', where).strip()}\nAnswer:"
    return dict(prompt=prompt, choices=texts_of(choices, "text", where), answer="answerKey",
                labels=texts_of(choices, "label", where))


def own(row, where):
    """Ours: the answer is the number of a choice, counted from 0."""
    return dict(prompt=text_of(row, "prompt", where), choices=texts_of(row, "choices", where), answer="answer")


# The fields that tell a set, and how its rows are asked.
CHOICES = {"question choices answer": lettered, "ctx_a endings label": endings, "question answerKey": labelled,
           "choices": own}


def choice_item(row, where, prompt, choices, answer, labels=(), intro="", shown=()):
    """An Item whose right choice the field `answer` names: by its number from 0, or by its label."""
    numbers = {str(i): i for i in range(len(choices))} | {label: i for i, label in enumerate(labels)}
    named = str(field(row, answer, object, where, FIX)).strip()
    if named not in numbers:
        raise UserError(f"{where}: `{answer}` is {named[:40]!r}, which names no choice: {', '.join(numbers)}", FIX)
    prompt, choices = prompt.rstrip(), [choice.strip() for choice in choices]  # a space is put before each choice
    twins = len(set(shown or choices)) < len(choices)
    return Item("choice", where, prompt, prompt, [choices[numbers[named]]], choices, intro=intro, twins=twins)


def item_of(row, where):
    """A row as an Item of the kind that its fields say."""
    fields = row if isinstance(row, dict) else {}

    # 1. A choice
    for names, asked in CHOICES.items():
        if fields.keys() >= set(names.split()):
            return choice_item(row, where, **asked(row, where))

    # 2. Words
    if "answers" in fields:
        if isinstance(row["answers"], dict):  # SQuAD's as a table has them
            row = row | dict(answers=texts_of(row["answers"], "text", where))
        context = check(row.get("context") or "", "context", str, where, FIX).strip()
        before = f"{context}\n\n" if context else ""
        right = [answer for answer in texts_of(row, "answers", where) if normalize(answer)] or row["answers"] or [""]
        if "prompt" in fields:
            question = prompt = before + text_of(row, "prompt", where)
        else:
            question = before + "Question: " + text_of(row, "question", where).strip()
            prompt = question + "\nAnswer:"
        return Item("words", where, prompt, question, right, [], group=context)

    # 3. A number
    question = text_of(row, "question", where).strip()
    steps, mark, end = field(row, "answer", str, where, FIX).rpartition("####")
    if not MARKED.fullmatch(mark + end.rstrip()):
        raise UserError(f"{where}: `answer` does not end with #### and a number", FIX)
    steps = re.sub(r"<<[^<>]*>>", "", steps).lstrip()  # GSM8K's <<3*4=12>> are for a calculator
    return Item("number", where, f"Question: {question}\nAnswer:", question, [end.strip()], [], steps)


def prompt_ids(item, examples, tokenizer, cot=False, chat=False):
    """The ids of the examples with their answers and of the question, as a text or in the chat format.

    cot: with the way to a number (Wei 2022, arXiv 2201.11903).
    """
    cot = cot and item.kind == "number"
    if not chat:
        parts = [f"{example.prompt} {example.shown(cot)}" for example in examples]
        text = item.intro + "\n\n".join([*parts, item.prompt])
        if cot and not examples:
            text += f" {STEPS}"
        return tokenizer.encode(text)
    messages = []
    for one in (*examples, item):
        question = f"{one.question}\n{STEPS}" if cot else one.question
        messages.append(dict(role="user", content=question))
        messages.append(dict(role="assistant", content=one.shown(cot)))
    messages[0]["content"] = item.intro + INSTRUCTIONS[item.kind] + messages[0]["content"]
    return tokenizer.chat(messages[:-1])


def choice_ids(item, examples, tokenizer, chat=False):
    """For each choice, (the ids of prompt and choice, how many of them are the choice's).

    In a text, both are encoded together, since a token may begin with the space between them. The choice's are those
    beyond as many as the prompt alone has, as in lm-evaluation-harness.
    """
    before = prompt_ids(item, examples, tokenizer, chat=chat)
    for choice in item.choices:
        if chat:
            ids = before + tokenizer.encode(choice)
        else:
            ids = prompt_ids(replace(item, prompt=f"{item.prompt} {choice}"), examples, tokenizer)
        yield ids, max(1, len(ids) - len(before))


def normalize(text):
    """As SQuAD does it: no capitals, punctuation, articles or extra spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer, right):
    """The harmonic mean of precision and recall of the shared words."""
    ours, theirs = normalize(answer).split(), normalize(right).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def number(text):
    """The number after ####, else the last one, or None. As a Decimal: 18.00 is 18."""
    marked = MARKED.search(text)
    found = [marked[1]] if marked else NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "").replace("$", ""))
    except (IndexError, InvalidOperation):
        return None


def vote(answers):
    """(the most frequent answer that is not None, its share of all).

    Self-consistency: what several ways of thinking lead to is more likely right (Wang 2022, arXiv 2203.11171).
    """
    counts = Counter(answer for answer in answers if answer is not None)
    [(answer, n)] = counts.most_common(1) or [(None, 0)]
    return answer, n / len(answers)


def score_text(item, texts):
    """Score the texts by their vote. The first of the `marks` counts most."""
    if item.kind == "number":
        answer, share = vote([number(text) for text in texts])
        right = answer is not None and answer == number("#### " + item.right[0])
        in_format = np.mean([bool(MARKED.search(text)) for text in texts])
        scores = dict(accuracy=float(right), format=float(in_format))
        answer = "" if answer is None else str(answer)
    else:
        lines = [text.strip().split("\n")[0] for text in texts]
        chosen, share = vote([normalize(line) for line in lines])
        answer = next(line for line in lines if normalize(line) == chosen)  # as it was written
        scores = dict(f1=max(f1(answer, right) for right in item.right),
                      exact=float(chosen in map(normalize, item.right)))
    return dict(marks=scores, answer=answer, confidence=share if len(texts) > 1 else None)


def score_choice(item, logprobs):
    """Score the likeliest choice, and the likeliest per byte, which is fair to long ones."""
    per_byte = [logprob / max(1, len(choice.encode())) for logprob, choice in zip(logprobs, item.choices)]
    best, best_per_byte = (item.choices[np.argmax(values)] for values in (logprobs, per_byte))
    scores = dict(accuracy=float(best == item.right[0]), per_byte=float(best_per_byte == item.right[0]))
    confidence = 1 / np.exp(np.array(logprobs) - max(logprobs)).sum()  # the softmax of the highest
    return dict(marks=scores, answer=best, confidence=float(confidence))


def summary(rows):
    """What the rows of a task come to."""
    groups = [row["group"] for row in rows]
    scores = {metric: [row["marks"][metric] for row in rows] for metric in rows[0]["marks"]}
    found = dict(n=len(rows), cut=sum(row["cut"] for row in rows),
                 metrics={metric: mean(values, groups) for metric, values in scores.items()})
    if rows[0]["confidence"] is not None:
        confidences = [row["confidence"] for row in rows]
        table, error = calibration(confidences, next(iter(scores.values())))
        found |= dict(calibration=table, calibration_error=error)
    if "choices" in rows[0]:
        found["chance"] = float(np.mean([1 / len(row["choices"]) for row in rows]))
    return found


def mean(values, groups):
    """{"value", "error"}: the mean of scores, and its standard error, None where all are of one group.

    groups: what each belongs to. Five questions on one text tell less than five on five. With G groups of n scores in
    all, error^2 = G / (G - 1) sum_g (sum_{i in g} (score_i - mean))^2 / n^2 (Miller 2024, arXiv 2411.00640).
    """
    scores = np.array(values, dtype=float)
    group_of = np.unique(list(groups), return_inverse=True)[1]
    deviations = np.bincount(group_of, scores - scores.mean())  # (G,)
    G, error = len(deviations), None
    if G > 1:
        error = math.sqrt(G / (G - 1) * (deviations ** 2).sum()) / len(scores)
    return dict(value=float(scores.mean()), error=error)


def differences(models):
    """Every model beside the first one, question by question: the mean difference and its standard error.

    A question that is hard for both adds nothing, so the error is smaller than theirs (Miller 2024).
    """
    rows = []
    for model in models[1:]:
        for name, task in model["tasks"].items():
            if first := models[0]["tasks"].get(name):
                metric = next(iter(task["metrics"]))
                pairs = zip(task["items"], first["items"])
                differ = [row["marks"][metric] - other["marks"][metric] for row, other in pairs]
                groups = [row["group"] for row in task["items"]]
                rows.append(dict(model=model["model"], task=name, metric=metric, **mean(differ, groups)))
    return rows


def calibration(confidences, scores):
    """(10 bins, expected calibration error): is what is 80% sure right 80% of the time? (Guo 2017, arXiv 1706.04599)"""
    confidences, scores = np.array(confidences), np.array(scores)
    bin_of = np.minimum(confidences * 10, 9).astype(int)
    table = []
    for i in np.unique(bin_of):
        here = bin_of == i
        table.append(dict(n=int(here.sum()), confidence=float(confidences[here].mean()),
                          accuracy=float(scores[here].mean())))
    return table, sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in table) / len(scores)


def words_of(text):
    """The words of a text, and its signs as words of one character."""
    return re.findall(r"\w+|[^\w\s]", text)


def variety(texts):
    """How varied the first 50 words of texts are: the shares below depend on the length.

    distinct_n: different n-grams among all (Li 2016, arXiv 1510.03055); repetition: 4-grams that stood in the same
    text before (Welleck 2019, arXiv 1908.04319).
    """
    texts = [words_of(text)[:50] for text in texts]

    def distinct(n, apart=False):
        """The share of different n-grams among all. apart: the same ones in two texts are different."""
        grams = [(i * apart, *words[j:j + n]) for i, words in enumerate(texts) for j in range(len(words) - n + 1)]
        return len(set(grams)) / len(grams) if grams else None

    new = distinct(4, apart=True)
    return dict(words=sum(map(len, texts)), distinct_1=distinct(1), distinct_2=distinct(2),
                repetition=None if new is None else 1 - new)
