# SPDX-License-Identifier: GPL-3.0-only
"""Chats: the rows that are conversations, what is said about those that are not, and the questions of our own."""
import gzip
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, error

from text import chats
from text import sources
from runtime.console import UserError

HELLO = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Good morning."}]


def read(*paths):
    return [document.messages for document in chats.conversations(paths)]


def wrong(path):
    """(fact, fix) of the error that reading this raises."""
    return error(lambda argv: read(*argv), path)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("row, said", [
    (dict(messages=HELLO), None),
    (dict(prompt="Hello!", messages=HELLO, prompt_id="7"), None),  # UltraChat
    (dict(messages=[{"role": "system", "content": "Be kind."}, *HELLO]), "system Be kind."),
    (dict(messages=HELLO[:1]), "user Hello!"),  # nothing to learn from, which prepare.py says
    ({"conversations": [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Good morning."}]}, None),
    ({"conversations": [{"from": "system", "value": "Be kind."}]}, "system Be kind."),
    (dict(prompt="Hello!", completion="Good morning."), None),
    (dict(instruction="Hello!", output="Good morning."), None),
    (dict(instruction="Hello!", input="", output="Good morning.", text="..."), None),
    (dict(instruction="Hello!", input=None, output="Good morning."), None),
    (dict(instruction="Add.", input="1, 2", output="3"), "user Add.\n\n1, 2"),
    (dict(question="Hello!", answer="Good morning."), None),
    (dict(prompt="", completion=""), "user "),
])
def test_rows(here, row, said):
    (here / "a.jsonl").write_text(lines([row]))
    (here / "a.json").write_text(json.dumps([row]))
    (messages,), again = read("a.jsonl"), read("a.json")
    assert again == [messages]
    if said is None:
        assert messages == HELLO
    else:
        assert " ".join(messages[0].values()) == said


def test_documents(here):
    """A conversation is a document: it has a name, and its text is what is said in it."""
    rows = dict(messages=HELLO), dict(prompt="a", completion="b")
    (here / "a.jsonl").write_text("\n" + lines(rows[:1]) + " \r\n" + lines(rows[1:]))
    first, second = chats.conversations(["a.jsonl"])
    assert (first.name, "".join(first.blocks()), first.held_out) == ("a.jsonl, line 2", "Hello!\nGood morning.", None)
    assert (second.name, "".join(second.blocks())) == ("a.jsonl, line 4", "a\nb")
    (here / "a.json").write_text(json.dumps([dict(messages=HELLO)] * 2))
    assert [document.name for document in chats.conversations(["a.json"])] == ["a.json, number 1", "a.json, number 2"]


def test_files(here):
    """Files, .gz of these, folders and patterns, as paths or as sources.fetch returns them, in their order."""
    rows = [dict(prompt=str(i), completion="yes") for i in range(4)]
    (here / "sub").mkdir()
    (here / "a.jsonl").write_text("\ufeff" + lines(rows[:1]), encoding="utf-8")
    (here / "sub/b.jsonl.gz").write_bytes(gzip.compress(lines(rows[1:2]).encode()))
    (here / "sub/c.json.gz").write_bytes(gzip.compress(json.dumps(rows[2:3]).encode()))
    (here / "sub/d.jsonl").write_text(lines(rows[3:]))
    (here / "sub/notes.txt").write_text("no conversation")

    def prompts(*paths):
        return "".join(messages[0]["content"] for messages in read(*paths))
    assert prompts("sub/c.json.gz", "a.jsonl", "sub/b.jsonl.gz") == "201"
    assert prompts("sub") == "13" and prompts(".") == "013"  # of a folder, only .jsonl
    assert prompts("sub/*") == "13" and prompts("sub/*.json*") == "123"
    assert prompts(*sources.fetch(["a.jsonl", "sub"], kinds=chats.KINDS)[0]) == "013"
    (here / "empty.jsonl").write_text("\n")
    assert prompts("empty.jsonl") == ""


def messages(**last):
    """A row, the second message of which is not what it should be."""
    return json.dumps(dict(messages=[HELLO[0], last]))


WRONG = [
    ('{"prompt": "a"', ": not JSON: Expecting ',' delimiter at column 15"),
    ("[" * 200_000, ": unreadable"),
    ("[]", ": `messages` is empty"),
    ('"text"', ": `the row` is not an object but str"),
    ("null", ": `the row` is not an object but null"),
    ("{}", ": no conversation fields; found none"),
    ('{"text": "a", "id": 1}', ": no conversation fields; found text, id"),
    ('{"prompt": "a", "chosen": "b"}', ": no conversation fields; found prompt, chosen"),
    ('{"completion": "b"}', ": no conversation fields; found completion"),
    ('{"instruction": "a", "input": "b"}', ": no conversation fields; found instruction, input"),
    ('{"messages": "a"}', ": `messages` is not a list but str"),
    ('{"messages": null, "prompt": "a", "completion": "b"}', ": `messages` is not a list but null"),
    ('{"messages": {}}', ": `messages` is not a list but dict"),
    ('{"messages": []}', ": `messages` is empty"),
    ('{"messages": ["a"]}', ": messages[0]: no field `role`; found str"),
    (messages(), ": messages[1]: no field `role`; found none"),
    (messages(content="a"), ": messages[1]: no field `role`; found content"),
    (messages(role="user", text="a"), ": messages[1]: no field `content`; found role, text"),
    (messages(role=1, content="a"), ": messages[1]: `role` is not a text but int"),
    (messages(role=["user"], content="a"), ": messages[1]: `role` is not a text but list"),
    (messages(role="User", content="a"), ": messages[1]: `role` is 'User', not one of system, developer, user"),
    (messages(role="assistant", content=None), ": messages[1]: `content` is not a text but null"),
    (messages(role="user", content=["a"]), ": messages[1].content: no field `text`; found str"),
    (messages(role="user", content="\ud800"), ": messages[1]: `content` has half a character, '\\ud800'"),
    ('{"conversations": []}', ": `conversations` is empty"),
    ('{"conversations": [{"text": "a"}]}', ": conversations[0]: no field `role`; found text"),
    ('{"conversations": [{"from": "human"}]}', ": conversations[0]: no field `value`; found from"),
    ('{"prompt": ["a"], "completion": "b"}', ": prompt[0]: no field `role`; found str"),
    ('{"prompt": "a", "completion": null}', ": `completion` is not a text but null"),
    ('{"instruction": "a", "input": 1, "output": "b"}', ": `input` is not a text but int"),
    ('{"instruction": "a", "input": "\\udc00", "output": "b"}', ": `input` has half a character"),
    ('{"instruction": 1, "output": "b"}', ": `instruction` is not a text but int"),
    ('{"question": "a", "answer": 7}', ": `answer` is not a text but int"),
]


@pytest.mark.parametrize("row, fact", WRONG, ids=range(len(WRONG)))
def test_wrong_rows(here, row, fact):
    (here / "a.jsonl").write_text(lines([dict(messages=HELLO)]) + "\n" + row + "\n")
    found, fix = wrong("a.jsonl")
    assert found.startswith("a.jsonl, line 3" + fact) and '{"messages": [{"role": "user", ' in fix
    if "JSON" not in fact and "read" not in fact:  # with these, it is the file that cannot be read
        (here / "a.json").write_text(f"[{json.dumps(dict(messages=HELLO))}, {row}]")
        assert wrong("a.json")[0] == found.replace("a.jsonl, line 3", "a.json, number 2")


@pytest.mark.parametrize("content, fact", [
    ("", "a.json is not a list"), ('[{"prompt": "a",\n}]', "a.json, number 1: not JSON: Expecting property name"),
    ('{"data": []}', "a.json is not a list of rows"), ("null", "a.json is not a list of rows"),
])
def test_wrong_lists(here, content, fact):
    (here / "a.json").write_text(content)
    found, fix = wrong("a.json")
    assert found.startswith(fact) and 'expected {"messages": [{"role": "user"' in fix


def test_wrong_sources(here):
    for name in ("notes.txt", "page.md", "code.py", "README", "notes.txt.gz"):
        (here / name).write_text("text")
        fact, fix = wrong(name)
        assert fact == f"{name} is not a supported kind of file (.jsonl, .json, .csv, .tsv, .parquet, or .gz of these)"
        assert fix == ("rename plain text to .txt" if name == "README" else "leave out --format=chat")
    for name in ("nothing", "nothing.jsonl", "*.jsonl"):
        fact, fix = wrong(name)
        assert fact == f"{name} " + ("matches no .jsonl, .json file (or .gz of these)" if "*" in name else "does not exist")
        assert "one of: stdlib" in fix
    assert wrong(".")[0] == ". holds no .jsonl file (or .gz of these)"
    assert wrong("*.json")[0] == "*.json matches no .jsonl, .json file (or .gz of these)"
    (here / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "completion": "a"}')
    assert wrong("latin.jsonl")[0] == "latin.jsonl is not UTF-8: byte 0xe9 at offset 15"


# ---------------------------------------------------------------------------------------------------------------------
# Questions about the standard library

@pytest.fixture(scope="module")
def made():
    return list(chats.conversations(["stdlib"]))


def test_made_sizes_and_roles(made):
    assert 5_000 < len(made) < 12_000
    assert len({"".join(document.blocks()) for document in made}) > 0.99 * len(made)
    lengths = Counter(len(document.messages) for document in made)
    assert set(lengths) == {2, 4} and min(lengths.values()) > 0.3 * len(made)
    for document in made:
        assert [m["role"] for m in document.messages] == ["user", "assistant"] * (len(document.messages) // 2)
        texts = [m["content"] for m in document.messages]
        assert all(text.strip() == text and 0 < len(text) and "\n" not in text for text in texts)
        assert "".join(document.blocks()) == "\n".join(texts)
        assert sum(len(text.encode()) for text in texts) < 600
        assert not any(part.startswith("_") for part in document.name.split("."))


def test_made_phrases(made):
    """Every phrasing is used, about as often as the others of its kind; a second question has no name in it."""
    first = Counter(d.messages[0]["content"].replace(d.name, "{name}").replace(d.name.split(".")[-1], "{short}")
                    for d in made)
    then = Counter(d.messages[2]["content"] for d in made if len(d.messages) > 2)
    for phrases, found in ((chats.FIRST, first), (chats.THEN, then)):
        for kind, several in phrases.items():
            counts = [found[phrase] for phrase in several]
            assert len(counts) >= 3 and min(counts) > 0.5 * max(counts), (kind, counts)
    assert set(then) == {phrase for several in chats.THEN.values() for phrase in several}


AGAIN = """
from text import chats, sources
modules = [module for module in sources.stdlib_documents() if module.held_out]
chats.stdlib_documents = lambda: modules
for document in chats.conversations(["stdlib"]):
    print(document.name, document.held_out, document.messages)
"""


def test_made_again():
    """The same in every process, whatever hashes its strings have."""
    said = []
    for seed in "17":
        done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, cwd=ROOT,
                              env={**os.environ, "PYTHONHASHSEED": seed})
        said.append(done.stdout)
        assert done.stdout.count("\n") > 200, done.stderr
    assert said[0] == said[1]


def test_made_held_out(made):
    """What is said about the modules that are held out is held out, and nothing else."""
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") + "." for name in sources.HELD_OUT]
    for document in made:
        assert document.held_out == document.name.startswith(tuple(modules)), document.name
    assert 0.03 < sum(document.held_out for document in made) / len(made) < 0.12
    assert {"textwrap.dedent", "heapq.heappush"} < {document.name for document in made if document.held_out}


def test_made_answers(made):
    """What is said about a few functions is right, whatever was asked about them."""
    right = {"textwrap.dedent": ("Remove any common leading whitespace from every line in `text`.",
                                 "textwrap.dedent(text)", "textwrap."),
             "heapq.heappush": ("Push item onto heap, maintaining the heap invariant.",
                                "heapq.heappush(heap, item)", "heapq."),
             "random.Random.choice": ("Choose a random element from a non-empty sequence.",
                                      "random.Random.choice(seq)", None)}
    for name, (what, call, where) in right.items():
        module, short = name.split(".", 1)
        answers, = (answers for *found, _, answers in chats.library() if found == [module, short])
        assert (answers["what"], answers["call"], answers.get("where")) == (what, call, where)
        about = [document.messages for document in made if document.name == name]
        assert len(about) == 2
        for messages in about:
            for question, answer in zip(messages[::2], messages[1::2], strict=True):
                kind, = [kind for phrases in (chats.FIRST, chats.THEN) for kind, several in phrases.items()
                         if question["content"] in [phrase.format(name=name, short=short) for phrase in several]]
                assert answer["content"] == answers[kind]


def test_made_from_what(monkeypatch):
    """What is taken from a source, and what is not."""
    texts = {"a.py": '''
def one(x, *, y=1) -> int:
    """Do one thing. Then
    another.

    More about it."""
def same(): "Is in two modules."
def small(): "say it in small letters."
def short(): "Do it."
def long(): "L%s."
def bare(): pass
def _hidden(): "Nobody asks about this one."
async def wait(seconds): "Wait for a\\n  while."
@changed
def decorated(x): "Nobody knows how to call this."
class Box(dict):
    """Hold things, e.g. e.g."""
    def __init__(self, size=3): "Make a box of this size."
    def put(self, thing): "Put a thing in."
    @staticmethod
    def join(a, b): "Join two boxes into one."
    @classmethod
    def empty(cls, /): "Make a box with nothing in it."
    @property
    def size(self): "How much there is in it."
    def all(*things): "Take all of the things."
    class Lid: "Close the box."
    class _Lid:
        def close(self): "Nobody asks about this one."
''' % ("x" * 200), "b/__init__.py": 'def same(): "Is in two modules."', "b/_c.py": 'def d(): "Do something hidden."',
             "bad.py": "def {{ name }}(): pass", "nul.py": "\0"}
    monkeypatch.setattr(chats, "stdlib_documents", lambda: [sources.in_memory(name, text, name == "a.py")
                                                           for name, text in texts.items()])
    monkeypatch.setattr(chats, "library", chats.library.__wrapped__)
    found = {(module, short): answers for module, short, _, answers in chats.library()}
    assert found.pop(("b", "same")) == dict(what="Is in two modules.", call="b.same()")
    assert {module for module, _ in found} == {"a"}
    assert {short: tuple(answers.get(kind) for kind in ("what", "call", "where"))
            for (_, short), answers in found.items()} == {
        "one": ("Do one thing.", "a.one(x, *, y=1)", "a."),
        "same": ("Is in two modules.", "a.same()", None),
        "small": (None, "a.small()", "a."), "short": (None, "a.short()", "a."), "long": (None, "a.long()", "a."),
        "bare": (None, "a.bare()", "a."),
        "wait": ("Wait for a while.", "a.wait(seconds)", "a."),
        "decorated": ("Nobody knows how to call this.", None, "a."),
        "Box": ("Hold things, e.g. e.g.", "a.Box(size=3)", "a."),
        "Box.put": ("Put a thing in.", "a.Box.put(thing)", None),
        "Box.join": ("Join two boxes into one.", "a.Box.join(a, b)", None),
        "Box.empty": ("Make a box with nothing in it.", "a.Box.empty()", None),
        "Box.size": ("How much there is in it.", None, None),
        "Box.all": ("Take all of the things.", "a.Box.all(*things)", None),
        "Box.Lid": ("Close the box.", None, None)}
    counts = Counter((document.name, document.held_out) for document in chats.conversations(["stdlib"]))
    assert counts["a.one", True] == 2 and counts["b.same", False] == 2 and counts["a.Box.size", True] == 1
    assert not {name for name, _ in counts} & {"a.small", "a.short", "a.long", "a.bare"}


def test_a_system_message_beside_the_others(here):
    rows = [{"system": "be kind", "prompt": "a", "completion": "b"}, {"system": "", "prompt": "a", "completion": "c"},
            {"system": "be rude", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    (here / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    roles = [[said["role"] for said in document.messages] for document in chats.conversations(["a.jsonl"])]
    assert roles == [["system", "user", "assistant"], ["user", "assistant"], ["system", "user", "assistant"]]
    (here / "b.jsonl").write_text(json.dumps({"system": 7, "prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(UserError, match="`system` is not a text but int"):
        list(chats.conversations(["b.jsonl"]))
