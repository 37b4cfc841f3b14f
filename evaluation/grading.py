# SPDX-License-Identifier: GPL-3.0-only
"""
Grading: from a file of questions to prompts, and from answers to scores.

    items = read_task("evaluation/tasks/sentiment.jsonl")   # or the files of GSM8K and SQuAD as they are
    ids = prompt_ids(items[0], items[1:5], tokenizer)       # with four examples before it
    f1("in the garden", "The garden!"), number("... #### 1,234")

There are three kinds of questions, told apart by their fields:

choice   {"prompt", "choices", "answer": 2}   The model writes nothing: its answer is the most probable choice.
words    {"context", "question", "answers"}   It writes, and its first line is compared with each right answer, exactly
         {"prompt", "answers"}                and by the words that both share (F1). SQuAD's .json is of this kind.
number   {"question", "answer": "... #### N"} It writes, and the number after #### counts. GSM8K's layout.

The first wrong row is an error: a question that is left out changes the score.
"""
import math
import re
import string
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

import numpy as np

from runtime.console import UserError
from text.rows import SQUAD, check, field, json_lines, kind_of, squad
from text.sources import decoded, kind

LAYOUTS = ('a line is like {"prompt": "...", "choices": ["...", "..."], "answer": 0}, {"context": "...", "question": '
           '"...", "answers": ["..."]}, {"prompt": "...", "answers": ["..."]} or {"question": "...", "answer": '
           '"... #### 12"}')
FIELDS = [{"prompt", "choices", "answer"}, {"question", "answers"}, {"prompt", "answers"}, {"question", "answer"}]
MARKED = re.compile(r"####\s*(-?\$?-?[\d.,]*\d)")  # how GSM8K ends an answer
NUMBER = re.compile(r"(?<!\d)-?\$?\d[\d,]*(?:\.\d+)?|-?\.\d+")
STEPS = "Let's think step by step."  # these words alone make models reason (Kojima 2022, arXiv 2205.11916)
SAMPLE_WORDS = 50  # of a sample that are counted
INSTRUCTIONS = {  # for a chat, which has to be told what is wanted; a text shows it by its form
    "choice": "",
    "words": "Answer the question with as few words as possible, taken from the text.\n\n",
    "number": "Solve the problem. At the end, write #### and the answer as a number.\n\n"}


@dataclass
class Item:
    """A question, in the words of a text and of a chat, and its right answers."""
    kind: str  # choice, words, number
    where: str  # its file and line
    prompt: str  # what a text says up to the answer
    question: str  # what a user says in a chat
    right: list[str]  # the right answers; of a choice, the right one
    choices: list[str]
    steps: str = ""  # the way to the answer, where the file has it
    group: str = ""  # the text that it is about: questions on the same text are not independent

    def shown(self, cot):
        """The answer as an example shows it; cot: with the way to it."""
        if self.kind != "number":
            return self.right[0]
        steps = self.steps + "\n" if cot and self.steps else ""
        return f"{steps}#### {self.right[0]}"


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_task(path):
    """The items of a file, at least one and all of one kind."""
    if kind(path) == ".json":
        items = list(squad_items(path))
    else:
        items = [item_of(row, where) for where, row in json_lines(path, decoded(path), LAYOUTS)]
    if not items:
        raise UserError(f"{path} holds no question", LAYOUTS)
    for item in items:
        if item.kind != items[0].kind:
            raise UserError(f"{item.where} is a question of the kind {item.kind}, those before it are of the kind "
                            f"{items[0].kind}", "one kind in a file, so that its score means one thing")
    return items


def item_of(row, where):
    """A row as an Item of the kind that its fields say."""
    fields = set(row) if isinstance(row, dict) else set()
    layout = next((layout for layout in FIELDS if layout <= fields), None)
    if layout is None:
        has = f"the fields {', '.join(sorted(fields))}" if fields else kind_of(row)
        raise UserError(f"{where}: no question, but {has}", LAYOUTS)
    unused = fields & {"context"}.union(*FIELDS) - layout
    if "answers" in layout:
        unused.discard("context")
    if unused:
        raise UserError(f"{where}: `{min(unused)}` has no place beside {', '.join(sorted(layout))}", LAYOUTS)
    if "choices" in layout:
        return choice_item(row, where)
    return words_item(row, where) if "answers" in layout else number_item(row, where)


def filled(row, name, where):
    """A field that is a text and not empty."""
    value = field(row, name, str, where, LAYOUTS)
    if not value.strip():
        raise UserError(f"{where}: `{name}` is empty", LAYOUTS)
    return value


def texts(row, name, least, where):
    """A field that is a list of so many texts or more."""
    values = row[name]
    if not isinstance(values, list) or len(values) < least:
        raise UserError(f"{where}: `{name}` is not a list of {least} or more texts", LAYOUTS)
    return [check(value, f"{name}[{i}]", str, where, LAYOUTS) for i, value in enumerate(values)]


def choice_item(row, where):
    choices, answer, prompt = texts(row, "choices", 2, where), row["answer"], filled(row, "prompt", where)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(f"{where}: `answer` is {answer!r}, not the number of a choice, 0 to {len(choices) - 1}",
                        LAYOUTS)
    different = {choice.strip() for choice in choices} - {""}
    if different != set(choices) or len(different) < len(choices):
        raise UserError(f"{where}: `choices` has an empty one, one with spaces round it, or one twice", LAYOUTS)
    if prompt[-1].isspace():
        raise UserError(f"{where}: `prompt` ends with white space, and a space is put before each choice",
                        "end it with its last word")
    return Item("choice", where, prompt, prompt, [choices[answer]], choices)


def words_item(row, where):
    context = filled(row, "context", where).strip() + "\n\n" if "context" in row else ""
    answers = texts(row, "answers", 1, where)
    if "question" in row:
        return question_item(context, filled(row, "question", where), answers, where)
    prompt = context + filled(row, "prompt", where)
    return Item("words", where, prompt, prompt, answers, [], group=context)


def question_item(context, question, answers, where):
    answers = [answer for answer in answers if normalize(answer)] or [""]  # as SQuAD's script does
    question = f"{context}Question: {question.strip()}"
    return Item("words", where, f"{question}\nAnswer:", question, answers, [], group=context)


def number_item(row, where):
    question = filled(row, "question", where).strip()
    steps, mark, end = filled(row, "answer", where).rpartition("####")
    if not MARKED.fullmatch(mark + end.rstrip()) or number(mark + end) is None:
        raise UserError(f"{where}: `answer` does not end with #### and a number", LAYOUTS)
    steps = re.sub(r"<<[^<>]*>>", "", steps).strip()  # GSM8K's <<3*4=12>> are for a calculator
    return Item("number", where, f"Question: {question}\nAnswer:", question, [end.strip()], [], steps)


def squad_items(path):
    """The questions of a file in SQuAD's layout. In version 2.0, to some of them the right answer is nothing."""
    for where, context, paragraph in squad(path):
        for k, qa in enumerate(field(paragraph, "qas", list, where, SQUAD)):
            here = f"{where}.qas[{k}]"
            answers = [field(answer, "text", str, f"{here}.answers[{n}]", SQUAD)
                       for n, answer in enumerate(field(qa, "answers", list, here, SQUAD))]
            if not answers and qa.get("is_impossible") is not True:
                raise UserError(f"{here}: `answers` is empty", SQUAD)
            yield question_item(f"{context}\n\n", field(qa, "question", str, here, SQUAD), answers, here)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def prompt_text(item, examples, cot=False):
    """The examples with their answers, then the question."""
    shown = [f"{example.prompt} {example.shown(cot)}" for example in examples]
    return "\n\n".join([*shown, item.prompt])


def prompt_ids(item, examples, tokenizer, cot=False, chat=False):
    """The ids of that, as a text or in the chat format.

    cot: show the way to the answer in examples, and ask for it (chain of thought; Wei 2022, arXiv 2201.11903).
    """
    think = STEPS if cot and item.kind == "number" else ""
    if not chat:
        text = prompt_text(item, examples, cot)
        return tokenizer.encode(f"{text} {think}" if think and not examples else text)
    messages, before = [], INSTRUCTIONS[item.kind]
    for one in (*examples, item):
        question = f"{one.question}\n{think}" if think else one.question
        messages.append(dict(role="user", content=before + question))
        messages.append(dict(role="assistant", content=one.shown(cot)))
        before = ""
    return tokenizer.chat(messages[:-1])


def choice_ids(item, examples, tokenizer, chat=False):
    """For each choice, (the ids of prompt and choice, how many of them are the choice's).

    In a text, a space joins them. Both are encoded together, since a token may begin with this space; the choice's
    tokens are those behind as many as the prompt alone has (as in lm-evaluation-harness).
    """
    before = prompt_ids(item, examples, tokenizer, chat=chat)
    for choice in item.choices:
        together = f"{prompt_text(item, examples)} {choice}"
        ids = before + tokenizer.encode(choice) if chat else tokenizer.encode(together)
        yield ids, max(1, len(ids) - len(before))


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def normalize(text):
    """SQuAD's: lower case, without punctuation and without articles, one space between words."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer, right):
    """The harmonic mean of precision and recall of the words that both have: 0 to 1. Of nothing and nothing it is 1."""
    ours, theirs = normalize(answer).split(), normalize(right).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def number(text):
    """The number that an answer gives, None for none: the one after ####, else the last one. A Decimal: 18.00 is 18."""
    marked = MARKED.search(text)
    found = [marked[1]] if marked else NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "").replace("$", ""))
    except (IndexError, InvalidOperation):
        return None


def vote(answers):
    """(the most frequent answer, its share of all); of equally frequent ones the first. None is no answer.

    Self-consistency: several ways of thinking that end in the same place are more likely right (Wang 2022, arXiv
    2203.11171), and their share says how sure to be.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    answer, n = counts.most_common(1)[0] if counts else (None, 0)
    return answer, n / len(answers)


def score_text(item, texts):
    """Score what was written, several texts by their vote. The first of the `marks` is the one that counts most."""
    if item.kind == "number":
        answer, share = vote([number(text) for text in texts])
        right = answer is not None and answer == number("#### " + item.right[0])
        in_format = sum(bool(MARKED.search(text)) for text in texts) / len(texts)
        scores = dict(accuracy=float(right), format=in_format)
        answer = "" if answer is None else str(answer)
    else:
        lines = [text.strip().split("\n")[0] for text in texts]  # the first is the answer; what follows, talk
        chosen, share = vote([normalize(line) for line in lines])
        answer = next(line for line in lines if normalize(line) == chosen)  # as it was written
        scores = dict(f1=max(f1(answer, right) for right in item.right),
                      exact=float(chosen in map(normalize, item.right)))
    return dict(marks=scores, answer=answer, confidence=share if len(texts) > 1 else None)


def score_choice(item, logprobs):
    """Score the likeliest choice, and the likeliest per byte, which is fair to long ones. logprobs: in nats."""
    per_byte = [logprob / len(choice.encode()) for logprob, choice in zip(logprobs, item.choices)]
    highest = max(logprobs)
    best = item.choices[logprobs.index(highest)]
    best_per_byte = item.choices[per_byte.index(max(per_byte))]
    scores = dict(accuracy=float(best == item.right[0]), per_byte=float(best_per_byte == item.right[0]))
    confidence = 1 / sum(math.exp(logprob - highest) for logprob in logprobs)  # the softmax of the highest
    return dict(marks=scores, answer=best, confidence=confidence)


# ---------------------------------------------------------------------------------------------------------------------
# What the scores of many questions say


def mean(values, groups=None):
    """{"value", "error"}: the mean of scores, and its standard error, None where all are of one group.

    groups: what each belongs to; by default all are independent. Five questions on one text tell less than five on
    five, so their deviations are added up before they are squared (Miller 2024, arXiv 2411.00640): with G groups of n
    scores in all, error^2 = G / (G - 1) sum_g (sum_{i in g} (score_i - mean))^2 / n^2.
    """
    scores = np.array(values, dtype=float)
    group_of = np.unique(list(groups or range(len(scores))), return_inverse=True)[1]
    deviations = np.bincount(group_of, scores - scores.mean())  # (G,)
    G, error = len(deviations), None
    if G > 1:
        error = math.sqrt(G / (G - 1) * (deviations ** 2).sum()) / len(scores)
    return dict(value=float(scores.mean()), error=error)


def differences(models):
    """Every model beside the first one, question by question: the mean difference and its standard error.

    What makes a question hard for both falls out of the difference, so its error is smaller (Miller 2024).
    """
    rows = []
    for model in models[1:]:
        for name, task in model["tasks"].items():
            if name not in models[0]["tasks"]:
                continue
            metric, others = next(iter(task["metrics"])), models[0]["tasks"][name]["items"]
            differ = [row["marks"][metric] - other["marks"][metric] for row, other in zip(task["items"], others)]
            groups = [row["group"] for row in task["items"]]
            rows.append(dict(model=model["model"], task=name, metric=metric, **mean(differ, groups)))
    return rows


def calibration(confidences, scores, bins=10):
    """(bins, the expected calibration error): is what is 80% sure right 80% of the time? (Guo 2017, arXiv 1706.04599)
    """
    confidences, scores = np.array(confidences), np.array(scores)
    bin_of = np.minimum((confidences * bins).astype(int), bins - 1)
    table = []
    for i in np.unique(bin_of):
        here = bin_of == i
        table.append(dict(n=int(here.sum()), confidence=float(confidences[here].mean()),
                          accuracy=float(scores[here].mean())))
    return table, sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in table) / len(scores)


def words_of(text):
    """The words of a text for counting: letters and digits that stand together, and every other sign alone."""
    return re.findall(r"\w+|[^\w\s]", text)


def variety(texts):
    """How varied texts are, each cut after 50 words: the shares below fall as a text gets longer.

    distinct_n: different n-grams among all (Li 2016, arXiv 1510.03055); repetition: 4-grams that stood in the same
    text before (Welleck 2019, arXiv 1908.04319). None where there are none.
    """
    texts = [words_of(text)[:SAMPLE_WORDS] for text in texts]

    def grams(n):
        """The n-grams of each text."""
        return [list(zip(*(words[i:] for i in range(n)))) for words in texts]

    def distinct(groups):
        """The share of different n-grams within the groups."""
        total = sum(map(len, groups))
        return sum(len(set(group)) for group in groups) / total if total else None

    in_one_text = distinct(grams(4))
    return dict(words=sum(map(len, texts)), distinct_1=distinct([sum(grams(1), [])]),
                distinct_2=distinct([sum(grams(2), [])]), repetition=None if in_one_text is None else 1 - in_one_text)
