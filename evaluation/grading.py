# SPDX-License-Identifier: GPL-3.0-only
"""
Grading: from a file of questions to prompts, and from answers to marks.

    items = read_task("evaluation/tasks/sentiment.jsonl")              # or the files of GSM8K and SQuAD as they are
    ids = prompt_ids(items[0], items[1:5], tokenizer)       # with four examples before it
    f1("in the garden", "The garden!"), number("... #### 1,234")

There are three kinds of questions, told apart by their fields, and each is asked and marked in its own way:

choice   {"prompt", "choices", "answer": 2}   which continuation is the likeliest? The model writes nothing: the
                                              probability of each choice is computed, and the highest one counts.
words    {"context", "question", "answers"}   the model writes; that is compared with each right answer, exactly
         {"prompt", "answers"}                and by the words that both share (F1). SQuAD's .json is of this kind.
number   {"question", "answer": "... #### N"} the model writes; the number after #### counts. GSM8K's layout.

A wrong row is an error that names its file, line and field: a question that is left out changes a mark.
"""
import math
import re
import string
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from runtime.console import UserError
from text.sources import check_text, kind_of, member, parse_json, read_json, records

LAYOUTS = ('a line is like {"prompt": "...", "choices": ["...", "..."], "answer": 0}, {"context": "...", "question": '
           '"...", "answers": ["..."]}, {"prompt": "...", "answers": ["..."]} or {"question": "...", "answer": '
           '"... #### 12"}')
FIELDS = [{"prompt", "choices", "answer"}, {"question", "answers"}, {"prompt", "answers"}, {"question", "answer"}]
MARKED = re.compile(r"####\s*(-?\$?-?[\d.,]*\d)")  # how GSM8K ends an answer
STEPS = "Let's think step by step."  # these words alone make models reason (Kojima 2022, arXiv 2205.11916)
SAMPLE_WORDS = 50  # of a sample that are counted
INSTRUCTIONS = {  # for a chat, which has to be told what is wanted; a text shows it by its form
    "choice": "",
    "words": "Answer the question with as few words as possible, taken from the text.\n\n",
    "number": "Solve the problem. At the end, write #### and the answer as a number.\n\n"}


@dataclass
class Item:
    """A question: how it is put in a text and in a chat, what an example shows as its answer, and what is right."""
    kind: str  # choice, words, number
    where: str  # its file and line
    prompt: str  # what a text says up to the answer
    question: str  # what a user says in a chat
    right: list[str]  # the right answers; of a choice, the right one
    choices: list[str]
    steps: str = ""  # the way to the answer, where the file has it
    group: str = ""  # questions on the same text are no independent ones: what they share

    def shown(self, cot):
        """The answer as an example shows it; cot: with the way to it."""
        if self.kind == "number":
            return (self.steps + "\n" if cot and self.steps else "") + f"#### {self.right[0]}"
        return self.right[0]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_task(path):
    """The items of a file, at least one. Raises UserError that names file, line and field of what is wrong."""
    if path.lower().endswith((".json", ".json.gz")):
        items = list(squad_items(path))
    else:
        items = [item_of(parse_json(line, f"{path}, line {n}", LAYOUTS), f"{path}, line {n}")
                 for n, line in enumerate(records(path, "\n"), 1) if line.strip()]
    if not items:
        raise UserError(f"{path} holds no question", LAYOUTS)
    if len({item.kind for item in items}) > 1:
        other = next(item for item in items if item.kind != items[0].kind)
        raise UserError(f"{other.where} is a question of the kind {other.kind}, those before it are of the kind "
                        f"{items[0].kind}", "one kind in a file, so that its marks mean one thing")
    return items


def item_of(row, where):
    """A line of a .jsonl as an Item, by its fields."""
    def text(field):
        value = check_text(row[field], where, field, LAYOUTS)
        if not value.strip():
            raise UserError(f"{where}: `{field}` is empty", LAYOUTS)
        return value

    def texts(field, least):
        if not isinstance(row[field], list) or len(row[field]) < least:
            raise UserError(f"{where}: `{field}` is not a list of {least} or more texts", LAYOUTS)
        return [check_text(value, where, f"{field}[{i}]", LAYOUTS) for i, value in enumerate(row[field])]

    fields = set(row) if isinstance(row, dict) else set()
    used = next((kind for kind in FIELDS if kind <= fields), None)
    if used is None:
        has = f"the fields {', '.join(sorted(fields))}" if fields else kind_of(row)
        raise UserError(f"{where}: no question, but {has}", LAYOUTS)
    used_too = {"context"} if "answers" in used else set()
    unused = (fields & {"context"}.union(*FIELDS)) - used - used_too
    if unused:
        raise UserError(f"{where}: `{min(unused)}` has no place beside {', '.join(sorted(used))}", LAYOUTS)
    if "choices" in used:
        choices, answer = texts("choices", 2), row["answer"]
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise UserError(f"{where}: `answer` is {answer!r}, not the number of a choice, 0 to {len(choices) - 1}",
                            LAYOUTS)
        if not all(choice and choice == choice.strip() for choice in choices) or len(set(choices)) < len(choices):
            raise UserError(f"{where}: `choices` has an empty one, one with spaces round it, or one twice", LAYOUTS)
        prompt = text("prompt")
        if prompt[-1].isspace():
            raise UserError(f"{where}: `prompt` ends with white space, and a space is put before each choice",
                            "end it with its last word")
        return Item("choice", where, prompt, prompt, [choices[answer]], choices)
    if "answers" in used:
        context = text("context").strip() + "\n\n" if "context" in fields else ""
        if "question" in used:
            return words_item(where, context, text("question"), texts("answers", 1))
        prompt = context + text("prompt")
        return Item("words", where, prompt, prompt, texts("answers", 1), [], group=context)
    question, (steps, mark, end) = text("question").strip(), text("answer").rpartition("####")
    if not MARKED.fullmatch(mark + end.rstrip()) or number(mark + end) is None:
        raise UserError(f"{where}: `answer` does not end with #### and a number", LAYOUTS)
    # GSM8K's <<3*4=12>> are for a calculator, and no part of the text.
    return Item("number", where, f"Question: {question}\nAnswer:", question, [end.strip()], [],
                re.sub(r"<<[^<>]*>>", "", steps).strip())


def words_item(where, context, question, answers):
    answers = [answer for answer in answers if normalize(answer)] or [""]  # as SQuAD's script does
    question = f"{context}Question: {question.strip()}"
    return Item("words", where, f"{question}\nAnswer:", question, answers, [], group=context)


def squad_items(path):
    """The questions of a file in SQuAD's layout (Rajpurkar 2016, arXiv 1606.05250), version 1.1 or 2.0.

    In 2.0, some have no answer in the text: the right one is then to say nothing."""
    fix = '{"data": [{"paragraphs": [{"context": "...", "qas": [{"question": "...", "answers": [{"text": "..."}]}]}]}]}'
    content = read_json(path, fix)

    def text(value, field, where):
        if not isinstance(value, dict) or field not in value:
            raise UserError(f"{where}: no field `{field}`", fix)
        return check_text(value[field], where, field, fix)

    for i, article in enumerate(member(content, "data", path, fix)):
        for j, paragraph in enumerate(member(article, "paragraphs", f"{path}, data[{i}]", fix)):
            where = f"{path}, data[{i}].paragraphs[{j}]"
            context = text(paragraph, "context", where).strip() + "\n\n"
            for k, qa in enumerate(member(paragraph, "qas", where, fix)):
                here = f"{where}.qas[{k}]"
                answers = [text(answer, "text", f"{here}.answers[{n}]")
                           for n, answer in enumerate(member(qa, "answers", here, fix))]
                if not answers and qa.get("is_impossible") is not True:
                    raise UserError(f"{here}: `answers` is empty", fix)
                yield words_item(here, context, text(qa, "question", here), answers or [""])


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def prompt_text(item, examples, cot=False):
    """The examples with their answers, then the question: a text that goes on with the answer."""
    return "\n\n".join([f"{example.prompt} {example.shown(cot)}" for example in examples] + [item.prompt])


def prompt_ids(item, examples, tokenizer, cot=False, chat=False):
    """The ids up to the answer: the examples with theirs, then the question; as a text, or in the chat format.

    cot: show the way to the answer in examples, and ask for it (chain of thought; Wei 2022, arXiv 2201.11903).
    """
    think = STEPS if cot and item.kind == "number" else ""
    if not chat:
        return tokenizer.encode(prompt_text(item, examples, cot) + (f" {think}" if think and not examples else ""))
    messages = []
    for asked in (*examples, item):
        content = (INSTRUCTIONS[item.kind] if not messages else "") + asked.question + (f"\n{think}" if think else "")
        messages += [dict(role="user", content=content), dict(role="assistant", content=asked.shown(cot))]
    return tokenizer.chat(messages[:-1])


def choice_ids(item, examples, tokenizer, chat=False):
    """For each choice, (the ids of prompt and choice, how many of them are the choice's).

    In a text, a space joins them. They are encoded as one, since a token may begin with this space; what is behind as
    many tokens as the prompt alone has belongs to the choice (as in lm-evaluation-harness).
    """
    before = prompt_ids(item, examples, tokenizer, chat=chat)
    for choice in item.choices:
        if chat:
            ids = before + tokenizer.encode(choice)
        else:
            ids = tokenizer.encode(f"{prompt_text(item, examples)} {choice}")
        yield ids, max(1, len(ids) - len(before))


def stops(chat):
    """Where an answer ends: in a text, where the model goes on with a question of its own."""
    return [] if chat else ["\nQuestion:"]


# ---------------------------------------------------------------------------------------------------------------------
# Marks


def normalize(text):
    """SQuAD's: lower case, without punctuation and without articles, one space between words."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer, right):
    """The harmonic mean of precision and recall of the words that both have: 0 to 1. SQuAD's own arithmetic.

    Where one is empty, it is 1 if both are (version 2.0; in 1.1 no right answer is)."""
    ours, theirs = normalize(answer).split(), normalize(right).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def number(text):
    """The number that an answer gives, None for none: the one after ####, else the last one. A Decimal: 18.00 is 18."""
    marked = MARKED.search(text)
    found = [marked[1]] if marked else re.findall(r"(?<!\d)-?\$?\d[\d,]*(?:\.\d+)?|-?\.\d+", text)
    try:
        return Decimal(found[-1].replace(",", "").replace("$", ""))
    except (IndexError, InvalidOperation):
        return None


def vote(answers):
    """(the answer that is given most often, its share of all); of equally many the first. None is no answer.

    Self-consistency: several ways of thinking that end in the same place are more likely right (Wang 2022, arXiv
    2203.11171), and how many do tells how sure to be.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return None, 0.0
    answer, n = counts.most_common(1)[0]
    return answer, n / len(answers)


def mark_text(item, texts):
    """Mark what was written, several texts by their vote: {marks: {metric: 0 to 1}, answer, confidence}.

    Of the metrics, here and everywhere, the first is the one that counts.
    """
    if item.kind == "number":
        answer, share = vote([number(text) for text in texts])
        marks = dict(accuracy=float(answer is not None and answer == number("#### " + item.right[0])),
                     format=sum(bool(MARKED.search(text)) for text in texts) / len(texts))
        answer = "" if answer is None else str(answer)
    else:
        lines = [text.strip().split("\n")[0] for text in texts]  # the first is the answer; what follows, talk
        chosen, share = vote([normalize(line) for line in lines])
        answer = next(line for line in lines if normalize(line) == chosen)  # as it was written
        marks = dict(f1=max(f1(answer, right) for right in item.right),
                     exact=max(float(normalize(answer) == normalize(right)) for right in item.right))
    return dict(marks=marks, answer=answer, confidence=share if len(texts) > 1 else None)


def mark_choice(item, logprobs):
    """Mark the likeliest choice, and the likeliest per byte, which is fair to long ones. logprobs: of each, in nats.

    Confidence: the probability of the likeliest among the choices.
    """
    per_byte = [logprob / len(choice.encode()) for logprob, choice in zip(logprobs, item.choices)]
    best, best_per_byte = (item.choices[scores.index(max(scores))] for scores in (logprobs, per_byte))
    return dict(marks=dict(accuracy=float(best == item.right[0]), per_byte=float(best_per_byte == item.right[0])),
                answer=best, confidence=1 / sum(math.exp(logprob - max(logprobs)) for logprob in logprobs))


def mean(values, groups=None):
    """{"value", "error"}: the mean of marks, and its standard error, None where all are of one group.

    groups: what each belongs to; by default they are all independent. Five questions on one text tell less than five on
    five, so what they are off by is added up before it is squared (Miller 2024, arXiv 2411.00640): with G groups of n
    marks in all, error^2 = G / (G - 1) sum_g (sum_{i in g} (mark_i - mean))^2 / n^2. Where each is alone, that is the
    usual variance / n.
    """
    value, off = math.fsum(values) / len(values), Counter()
    for group, v in zip(groups or range(len(values)), values):
        off[group] += v - value
    n = len(off)
    error = math.sqrt(math.fsum(d * d for d in off.values()) * n / (n - 1)) / len(values) if n > 1 else None
    return dict(value=value, error=error)


def differences(models):
    """Every model beside the first one, question by question: the mean difference and its standard error.

    What makes a question hard for both falls out of the difference, so that its error is smaller than that of two
    separate marks (Miller 2024, arXiv 2411.00640).
    """
    rows = []
    for other in models[1:]:
        for name, task in other["tasks"].items():
            if name in models[0]["tasks"]:
                metric, pairs = next(iter(task["metrics"])), list(zip(task["items"], models[0]["tasks"][name]["items"]))
                rows.append(dict(model=other["model"], task=name, metric=metric, **mean(
                    [ours["marks"][metric] - theirs["marks"][metric] for ours, theirs in pairs],
                    [ours["group"] for ours, _ in pairs])))
    return rows


def calibration(confidences, marks, bins=10):
    """(bins, the expected calibration error): is what is 80% sure right 80% of the time? (Guo 2017, arXiv 1706.04599)

    Items are put into bins by confidence; the error is the mean distance of confidence and mark, by items.
    """
    table = []
    for i in range(bins):
        here = [(c, m) for c, m in zip(confidences, marks) if min(int(c * bins), bins - 1) == i]
        if here:
            table.append(dict(n=len(here), confidence=sum(c for c, _ in here) / len(here),
                              accuracy=sum(m for _, m in here) / len(here)))
    return table, sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in table) / len(marks)


def words_of(text):
    """The words of a text for counting: letters and digits that stand together, and every other mark alone."""
    return re.findall(r"\w+|[^\w\s]", text)


def variety(texts, at_most=SAMPLE_WORDS):
    """How varied texts are, each cut after so many words: a share of something in more words would be another one.

    distinct_n: different n-grams among all (Li 2016, arXiv 1510.03055); repetition: 4-grams that stood in the same
    text before (Welleck 2019, arXiv 1908.04319). None where there are none.
    """
    texts = [words_of(text)[:at_most] for text in texts]

    def grams(n):
        return [[tuple(text[i:i + n]) for i in range(len(text) - n + 1)] for text in texts]

    def distinct(n):
        everything = sum(grams(n), [])
        return len(set(everything)) / len(everything) if everything else None

    fours = grams(4)
    total = sum(map(len, fours))
    return dict(words=sum(map(len, texts)), distinct_1=distinct(1), distinct_2=distinct(2),
                repetition=1 - sum(len(set(four)) for four in fours) / total if total else None)
