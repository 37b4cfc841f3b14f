# SPDX-License-Identifier: GPL-3.0-only
"""
Chats: where conversations come from, for a model that is to answer and then to stop.

    python prepare.py chats.jsonl --format=chat
    python prepare.py stdlib --format=chat --tokenizer=out/small    # about Python's library

A line of a .jsonl or an element of a .json has one of these layouts. `system` beside it is the system message.

    messages                       [{"role": "user" or "assistant", "content": "..."}, ...]; or this list alone
    conversations, conversation    the same, or ShareGPT's [{"from": "human" or "gpt", "value": "..."}, ...]
    prompt, completion             texts, or lists of messages
    instruction, input, output     Alpaca's; input may be missing or empty
    instruction, context, response    Dolly's; the same for the context
    question, answer               GSM8K's; ASKED and ANSWERED have more

A message of the assistant with `weight` 0 is not learned. What it calls (`tool_calls`) and what the tools answer
(role `tool`) is written as the chat template of a Hugging Face model does it. A row that is wrong is left out,
counted and shown.
"""
import ast
import functools
import json
import re
from collections import Counter
from zlib import crc32

from runtime.console import UserError
from runtime.files import parse_json
from text.rows import STRICT, check, field
from text.sources import file_rows, files, in_memory, stdlib_documents

FIX = ('expected {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}; '
       'text/chats.py lists other layouts')
KINDS = (".jsonl",)  # of a folder
LISTS = "messages", "conversations", "conversation"
ROLES = dict(system="system", developer="system", user="user", human="user", assistant="assistant", gpt="assistant",
             chatgpt="assistant", bot="assistant", model="assistant", tool="tool", function="tool")
ASKED = "prompt", "instruction", "question", "query", "problem", "input"
ANSWERED = "completion", "output", "response", "solution", "answer"


def conversations(sources, fields=(), skipped=STRICT):
    """The conversations of all sources, as for sources.documents: each a Document with `messages`.

    fields: the names of a question and its answer, where a file has names of its own. skipped: collects rows
    that cannot be read.
    """
    for source in sources:
        for path in files(source, KINDS):
            chats = stdlib_chats() if path == "stdlib" else file_chats(path, fields, skipped)
            for where, messages, held_out in skipped.file(chats):
                text = "\n".join(said for message in messages for said in spoken(message))
                yield in_memory(where, text, held_out, messages)


def spoken(message):
    """The texts of a message: what is said, and what is called."""
    return [message["content"] or "", *map(json.dumps, message.get("tool_calls", []))]


def file_chats(path, fields=(), skipped=STRICT):
    """(where, messages, None) for each row of a file."""
    for where, row in file_rows(path, FIX, skipped):
        try:
            messages = read(row, where, fields)
        except UserError as error:
            skipped.add(error)
            continue
        yield where, messages, None


def read(row, where, fields=()):
    """The messages of a row."""
    def text(name):
        return field(row, name, str, where, FIX)

    if isinstance(row, list):
        row = dict(messages=row)
    check(row, "the row", dict, where, FIX)
    if fields:
        return dialogue([text(name) for name in fields])
    system = [dict(role="system", content=text(name)) for name in ("system", "system_prompt") if row.get(name)]
    for name in LISTS:  # first, since some files repeat a part of the messages as `prompt`
        if name in row:
            return system + read_list(row, name, where)
    asked, answered = (next((name for name in names if name in row), "") for names in (ASKED, ANSWERED))
    if not (asked and answered):
        raise UserError(f"{where}: no conversation fields; found {', '.join(row) or 'none'}", FIX)
    if isinstance(row[asked], list):
        return system + read_list(row, asked, where) + read_list(row, answered, where)
    more = [name for name in ("input", "context") if asked == "instruction" and row.get(name)]
    question = "\n\n".join(map(text, [asked, *more]))
    return system + dialogue([question, text(answered)])


def read_list(row, name, where):
    """The messages of a row with a list of them."""
    messages = []
    for i, message in enumerate(field(row, name, list, where, FIX)):
        here = f"{where}: {name}[{i}]"
        role_field, content_field = "role", "content"
        if isinstance(message, dict) and "from" in message:
            role_field, content_field = "from", "value"
        role = field(message, role_field, str, here, FIX)
        if role not in ROLES:
            raise UserError(f"{here}: `{role_field}` is {role[:40]!r}, not one of {', '.join(ROLES)}", FIX)
        said = dict(role=ROLES[role], content=None)
        if calls := tool_calls(message, here):
            said["tool_calls"] = calls
        if not calls or message.get(content_field) is not None:
            said["content"] = content_of(message, content_field, here)
        # The name of a user is not learned; that of a tool stands in some templates.
        if said["role"] == "tool":
            said |= texts_of(message, "name", "tool_call_id")
        if message.get("weight") not in (None, 0, 1):
            raise UserError(f"{here}: `weight` is {str(message['weight'])[:40]}, not 0 or 1", FIX)
        if message.get("weight") == 0:
            said["weight"] = 0
        messages.append(said)
    if not messages:
        raise UserError(f"{where}: `{name}` is empty", FIX)
    return messages


def content_of(message, name, here):
    """What a message says: a text, or OpenAI's list of parts that are texts."""
    if isinstance(message.get(name), list):
        return "".join(field(part, "text", str, f"{here}.{name}", FIX) for part in message[name])
    return field(message, name, str, here, FIX)


def texts_of(row, *names):
    return {name: row[name] for name in names if isinstance(row.get(name), str)}


def tool_calls(message, here):
    """What a message of the assistant calls, as chat templates want it: OpenAI's arguments are JSON in a text."""
    calls, found = message.get("tool_calls") or [], []
    if message.get("function_call"):  # OpenAI's older layout
        calls = [message["function_call"]]
    for call in check(calls, "tool_calls", list, here, FIX):
        function = check(call, "a call", dict, here, FIX).get("function", call)
        arguments = check(function, "function", dict, here, FIX).get("arguments") or {}
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{here}: arguments", FIX)
        function = dict(name=field(function, "name", str, here, FIX), arguments=arguments)
        found.append(dict(type="function", function=function) | texts_of(call, "id"))
    return found


def dialogue(texts):
    """The messages of a user and an assistant in turn."""
    return [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


# ---------- Questions about the standard library, answered from its source

FIRST = {"what": ["What does {name} do?", "What is {name} for?", "Explain {name}.", "Tell me about {name}."],
         "call": ["How do I call {name}?", "How is {name} called?", "What does a call of {name} look like?"],
         "where": ["Which module has {short}?", "Where do I find {short}?", "What do I import for {short}?"]}
THEN = {"what": ["And what does it do?", "What is it for?", "Explain it."],
        "call": ["And how do I call it?", "How is it called?", "What does a call of it look like?"]}
PLANS = ["what", "call", "where", "what call", "call what", "where what", "where call"]  # asked in turn
SENTENCE = re.compile(r"[A-Z].{8,198}?\.(?= [A-Z]|$)")  # short: a small model reads 256 tokens
DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
HARMLESS = {"staticmethod", "classmethod", "abstractmethod", "contextmanager"}  # these do not change a call


def stdlib_chats():
    """(name, messages, held_out): two about everything with a docstring, always the same."""
    for module, short, held_out, answers in library():
        name = f"{module}.{short}"
        plans = [plan for plan in PLANS if "what" in answers and answers.keys() >= set(plan.split())]
        start = crc32(name.encode())  # hash() changes from process to process
        for i in range(start, start + min(2, len(plans))):
            texts, phrases = [], FIRST
            for asked in plans[i % len(plans)].split():
                phrase = phrases[asked][crc32(f"{i} {asked}".encode()) % len(phrases[asked])]
                texts += [phrase.format(name=name, short=short), answers[asked]]
                phrases = THEN
            yield name, dialogue(texts), held_out


@functools.cache  # takes seconds, and prepare.py reads everything two or three times
def library():
    """[(module, name in it, held_out, {"what": ..., "call": ..., "where": ...})] of all public names."""
    found = []
    for document in stdlib_documents():
        module = re.sub(r"[/\\]", ".", document.name.removesuffix(".py")).removesuffix(".__init__")
        try:
            tree = ast.parse("".join(document.blocks()))
        except (SyntaxError, ValueError, RecursionError):
            continue  # a template, or for another Python
        if "._" not in "." + module:
            found += [(module, short, document.held_out, answers) for short, answers in inside(tree, module)]
    modules = Counter(short for _, short, _, _ in found)
    for module, short, _, answers in found:
        if "." not in short and modules[short] == 1:  # otherwise there is more than one answer
            answers["where"] = module + "."
    return found


def inside(parent, module, prefix=""):
    """(name, answers) for all functions and classes of a module or class, and inside these."""
    for node in parent.body:
        if isinstance(node, DEFINITIONS) and not node.name.startswith("_"):
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
    """How a function or class is called: "(text, width=70)". None where it is hard to say."""
    decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    if isinstance(node, ast.ClassDef):
        made = [child for child in node.body if getattr(child, "name", "") == "__init__"]
        return signature(made[0], True) if made and not decorators else None
    if decorators <= HARMLESS:
        if method and "staticmethod" not in decorators:
            del (node.args.posonlyargs or node.args.args)[:1]
        return f"({ast.unparse(node.args)})"
