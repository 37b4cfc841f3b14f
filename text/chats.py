# SPDX-License-Identifier: GPL-3.0-only
"""
Chats: where conversations come from, for a model that is to answer and to stop when it has answered.

    python prepare.py chats.jsonl --format=chat
    python prepare.py stdlib --format=chat --tokenizer=out/small  # about Python's library

Every line of a .jsonl file is one of these, or every element of the list in a .json. A field `system` beside them is
what the system says first; what else there is, is ignored:

    messages                       [{"role": "system", "user" or "assistant", "content": "..."}, ...]
    conversations                  the same in ShareGPT's words: [{"from": "system", "human" or "gpt", "value": "..."}]
    prompt, completion
    instruction, input, output     Alpaca's; input may be missing or empty
    question, answer               GSM8K's

A wrong row is an error that names its file, line and field: nobody would miss a conversation that was left out.
"""
import ast
import functools
import re
from collections import Counter
from zlib import crc32

from runtime.console import UserError
from text.sources import check_text, files, in_memory, kind, kind_of, parse_json, read_json, records, stdlib_documents

FIX = ('a row is like {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
       '{"conversations": [{"from": "human", "value": "..."}, ...]}, '
       '{"prompt": "...", "completion": "..."}, {"instruction": "...", "input": "...", "output": "..."} or '
       '{"question": "...", "answer": "..."}; mend it or delete it')
KINDS = (".jsonl",)  # of a folder; a .json there may be anything
LISTS = {"messages": ("role", "content", dict(system="system", user="user", assistant="assistant")),
         "conversations": ("from", "value", dict(system="system", human="user", gpt="assistant"))}
PAIRS = [("prompt", "completion"), ("instruction", "output"), ("question", "answer")]


def conversations(sources):
    """The conversations of all sources (as for sources.documents), each a Document with `messages`, in a fixed order.

    Its text is what is said, a line end between the messages. Raises UserError for what is no conversation.
    """
    for source in sources:
        for name, path in files(source, KINDS):
            for where, messages, held_out in stdlib_chats() if name == "stdlib" else file_chats(path):
                yield in_memory(where, "\n".join(message["content"] for message in messages), held_out, messages)


# ---------------------------------------------------------------------------------------------------------------------
# Files

def file_chats(path):
    """(where, messages, None) for each row of a file."""
    for where, row in rows(path):
        yield where, read(row, where), None


def rows(path):
    if kind(path) == ".jsonl":
        for number, line in enumerate(records(path, "\n"), 1):
            if line.strip():
                yield (where := f"{path}, line {number}"), parse_json(line, where, FIX)
        return
    content = read_json(path, FIX)
    if not isinstance(content, list):
        raise UserError(f"{path}: not a list of rows but {kind_of(content)}", FIX)
    yield from ((f"{path}, number {number}", row) for number, row in enumerate(content, 1))


def read(row, where):
    """The messages of a row, with our names for the roles."""
    def fail(fact):
        raise UserError(f"{where}: {fact}", FIX)
    if not isinstance(row, dict):
        fail(f"not an object but {kind_of(row)}")
    system = check_text(row.get("system") or "", where, "system", FIX)
    first = [dict(role="system", content=system)] if system else []
    for field in LISTS:  # before a `prompt`, which repeats a part of the messages in some files
        if field in row:
            return first + read_list(row[field], where, field, fail)
    for asked, answered in PAIRS:
        if asked in row and answered in row:
            texts = [check_text(row[name], where, name, FIX) for name in (asked, answered)]
            if asked == "instruction" and row.get("input") not in (None, ""):
                texts[0] += "\n\n" + check_text(row["input"], where, "input", FIX)
            return first + dialogue(texts)
    fail(f"no fields of a conversation, but {', '.join(row) or 'none'}")


def read_list(messages, where, field, fail):
    if not isinstance(messages, list) or not messages:
        fail(f"`{field}` is not a list but {kind_of(messages)}" if messages != [] else f"`{field}` is empty")
    role, content, roles = LISTS[field]
    found = []
    for i, message in enumerate(messages):
        here = f"{field}[{i}]"
        if not isinstance(message, dict):
            fail(f"`{here}` is not an object but {kind_of(message)}")
        for name in (role, content):
            if name not in message:
                fail(f"no field `{here}.{name}`, but {', '.join(message) or 'none'}")
            check_text(message[name], where, f"{here}.{name}", FIX)
        if message.get("tool_calls") or message.get("weight", 1) != 1:
            fail(f"`{here}` has tool_calls or a weight, which cannot be learned here")
        if message[role] not in roles:
            fail(f"`{here}.{role}` is {message[role][:40]!r}, none of {', '.join(roles)}")
        found.append(dict(role=roles[message[role]], content=message[content]))
    return found


def dialogue(texts):
    """The messages of a user and an assistant in turn."""
    return [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


# ---------------------------------------------------------------------------------------------------------------------
# Questions about the standard library, and the answers that its source gives

FIRST = {"what": ["What does {name} do?", "What is {name} for?", "Explain {name}.", "Tell me about {name}."],
         "call": ["How do I call {name}?", "How is {name} called?", "What does a call of {name} look like?"],
         "where": ["Which module has {short}?", "Where do I find {short}?", "What do I import for {short}?"]}
THEN = {"what": ["And what does it do?", "What is it for?", "Explain it."],
        "call": ["And how do I call it?", "How is it called?", "What does a call of it look like?"]}
PLANS = ["what", "call", "where", "what call", "call what", "where what", "where call"]  # what is asked, in turn
SENTENCE = re.compile(r"[A-Z].{8,198}?\.(?= [A-Z]|$)")  # short: a small model reads 256 tokens
HARMLESS = {"staticmethod", "classmethod", "abstractmethod", "contextmanager"}  # these leave a call as it is written


def stdlib_chats():
    """(name, messages, held_out): two about everything that says what it does, each time the same."""
    for module, short, held_out, answers in library():
        name = f"{module}.{short}"
        plans = [plan for plan in PLANS if "what" in answers and answers.keys() >= set(plan.split())]
        start = crc32(name.encode())  # chance that is the same everywhere; hash() changes from process to process
        for i in range(start, start + min(2, len(plans))):
            texts, phrases = [], FIRST
            for asked in plans[i % len(plans)].split():
                phrase = phrases[asked][crc32(f"{i} {asked}".encode()) % len(phrases[asked])]
                texts += [phrase.format(name=name, short=short), answers[asked]]
                phrases = THEN
            yield name, dialogue(texts), held_out


@functools.cache  # prepare.py reads everything two or three times, and this takes seconds
def library():
    """[(module, name in it, held_out, {"what": ..., "call": ..., "where": ...})]: all that has a public name."""
    found = []
    for document in stdlib_documents():
        module = re.sub(r"[/\\]", ".", document.name.removesuffix(".py")).removesuffix(".__init__")
        try:
            tree = ast.parse("".join(document.blocks()))
        except (SyntaxError, ValueError, RecursionError):
            continue  # not a module: a template, or something for another Python
        if "._" not in "." + module:
            found += [(module, short, document.held_out, answers) for short, answers in inside(tree, module)]
    modules = Counter(short for _, short, _, _ in found)
    for module, short, _, answers in found:
        if "." not in short and modules[short] == 1:  # otherwise there is more than one answer
            answers["where"] = module + "."
    return found


def inside(parent, module, prefix=""):
    """(name, answers) for all that a module or class defines: functions, classes, and what is in these."""
    for node in parent.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            short, answers = prefix + node.name, {}
            paragraph = (ast.get_docstring(node) or "").split("\n\n")[0].split()
            if sentence := SENTENCE.match(" ".join(paragraph)):
                answers["what"] = sentence[0]
            if arguments := signature(node, isinstance(parent, ast.ClassDef)):
                answers["call"] = f"{module}.{short}{arguments}"
            yield short, answers
            if isinstance(node, ast.ClassDef):
                yield from inside(node, module, short + ".")


def signature(node, method):
    """How a function is called, or a class that has an __init__: "(text, width=70)", no self. None: hard to say."""
    decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    if isinstance(node, ast.ClassDef):
        made = [child for child in node.body if getattr(child, "name", "") == "__init__"]
        return signature(made[0], True) if made and not decorators else None
    if decorators <= HARMLESS:
        if method and "staticmethod" not in decorators:
            del (node.args.posonlyargs or node.args.args)[:1]
        return f"({ast.unparse(node.args)})"
