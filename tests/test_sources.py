# SPDX-License-Identifier: GPL-3.0-only
"""Sources: which documents there are, and what is said about files that are not what they should be."""
import gzip
import json
import os
import re

import pytest
import torch
from conftest import error, words

from text import chats
from evaluation import grading
import prepare
from runtime import files
from text import rows
from text import sources
import tokenizer as tokenizers


def read(*paths):
    return ["".join(document.blocks()) for document in sources.documents(paths)]


def test_stdlib():
    documents = list(sources.documents(["stdlib"]))
    held = [d for d in documents if d.held_out]
    assert 300 < len(documents) < 700 and 18 < len(held) < 30
    size = sum(len(b.encode()) for d in documents for b in d.blocks())
    assert 5e6 < size < 12e6
    assert 0.03 < sum(len(b.encode()) for d in held for b in d.blocks()) / size < 0.09
    names = {d.name for d in documents}
    assert "textwrap.py" in names and not any("test" in n.split("/") or n.startswith("idlelib") for n in names)


def test_pytorch():
    documents = list(sources.documents(["pytorch"]))
    texts = {d.name: "".join(d.blocks()) for d in documents if d.name in ("torch/nn/functional.py", "torch/optim/adamw.py")}
    assert len(documents) > 1500 and not any("testing" in d.name.split("/") for d in documents)
    assert "def linear_cross_entropy(" in texts["torch/nn/functional.py"] and "class AdamW(" in texts["torch/optim/adamw.py"]
    assert sources.with_version("pytorch") == f"pytorch {torch.__version__}"


def test_large_files_are_read_in_blocks(here, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 100)
    text = words(5000) + "\u4e2d\u6587\U0001f600" * 500 + "x" * 1000  # characters cut by a block, lines longer than one
    (here / "a.txt").write_text(text, encoding="utf-8", newline="")
    assert "".join(sources.text_blocks(sources.decoded("a.txt"))) == text
    (here / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "b"}))
    assert ["".join(d.blocks()) for d in sources.documents(["a.jsonl"])] == [text, "b"]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_a_seam_changes_no_token(monkeypatch, kind):
    """A text cut where text/sources.py cuts it is encoded as the whole is."""
    text = "".join(f"{words(300, seed=i)}  \n\t{i} caf\u00e9,  naive\u0308! \u4e2d\u6587\n\n" for i in range(300))
    tokenizer = tokenizers.train(kind, [text], 400)
    monkeypatch.setattr(tokenizers, "PARTS", re.compile(".+", re.DOTALL))  # the whole as one
    whole, rest, ids = tokenizer.encode(text), text, []
    while rest:
        end = sources.seam(rest[:5000]) if len(rest) > 5000 else len(rest)
        ids, rest = ids + tokenizer.encode(rest[:end]), rest[end:]
    assert ids == whole
    monkeypatch.setattr(tokenizers, "PARTS", re.compile(tokenizers.PARTS.pattern.replace("2000", "10"), re.DOTALL))
    assert tokenizer.encode(text) == whole


def test_seams():
    assert sources.seam("one two three") == len("one two")
    assert sources.seam("one two  3\n") == len("one")  # not before a second space, nor before a digit
    assert sources.seam("\u4e2d\u6587\n\u4e2d\u6587") == 3  # no spaces: after a line
    assert sources.seam("\u4e2d\u6587") == 2 and sources.seam(" a") == 2 and sources.seam("a ") == 2


def test_squad_and_stories(here):
    paragraph = {"context": " one \n", "qas": [{"question": "?", "answers": [{"text": "one", "answer_start": 1}]}]}
    (here / "a.json").write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": [paragraph] * 2}]}))
    assert read("a.json") == ["one", "one"]
    with gzip.open("a.json.gz", "wb") as file:
        file.write((here / "a.json").read_bytes())
    assert read("a.json.gz") == ["one", "one"]
    (here / "TinyStories-valid.txt").write_text("a\n<|endoftext|>\nb\n<|endoftext|>")
    stories = list(sources.documents(["TinyStories-valid.txt"]))
    assert ["".join(s.blocks()) for s in stories] == ["a\n", "b\n"] and all(s.held_out for s in stories)
    (here / "sub").mkdir()
    (here / "sub/a.json").write_text("{}")  # a folder may hold any .json: only one that is named is read
    (here / "sub/a.txt").write_text("text")
    assert read("sub") == ["text"]


# ---------------------------------------------------------------------------------------------------------------------
# Fifty inputs that are wrong, and what is said about each

GOOD = b'{"text": "good"}\n'
SQUAD = '{"data": [{"paragraphs": [{"context": "good"}, %s]}]}'
ZIPPED = gzip.compress(words(9000).encode())
WRONG = [
    ("empty.txt", b"", "no text is left; dropped: 1 empty"),
    ("bom.txt", b"\xef\xbb\xbf", "no text is left; dropped: 1 empty"),
    ("latin.txt", b"caf\xe9 " * 5, "latin.txt is not UTF-8: byte 0xe9 at offset 3"),
    ("cp1252.md", b"a \x93quote\x94", "cp1252.md is not UTF-8: byte 0x93 at offset 2"),
    ("utf16.txt", "some text".encode("utf-16-le"), "utf16.txt is not UTF-8 text: 9 of its first 18 bytes are NUL"),
    ("utf32.txt", "some text".encode("utf-32-le"), "utf32.txt is not UTF-8 text"),
    ("image.txt", b"\x89PNG\r\n" + bytes(94), "image.txt is not UTF-8 text: 94 of its first 100 bytes are NUL"),
    ("late.txt", b"x" * 3_000_000 + b"\xff", "late.txt is not UTF-8: byte 0xff at offset 3000000"),
    ("cut.txt", "caf\u00e9".encode()[:-1], "cut.txt is not UTF-8: byte 0xc3 at offset 3"),
    ("surrogate.py", b"s = '\xed\xa0\x80'", "surrogate.py is not UTF-8: byte 0xed at offset 5"),
    ("overlong.txt", b"\xc0\xaf", "overlong.txt is not UTF-8: byte 0xc0 at offset 0"),
    ("one.txt", b"a", "too little text for two splits: 1 byte"),
    ("notes.docx", b"PK", "notes.docx is not a supported kind of file"),
    ("data.csv", b"a,b", "no text is left"),
    ("noending", b"text", "noending is not a supported kind of file"),
    ("page.html", b"<html>", "page.html is not a supported kind of file"),
    ("not.txt.gz", b"not gzip at all", "cannot read not.txt.gz: Not a gzipped file"),
    ("cut.txt.gz", ZIPPED[:-99], "cannot read cut.txt.gz"),
    ("bad.txt.gz", ZIPPED[:99] + b"\0\xff" * 9 + ZIPPED[117:], "cannot read bad.txt.gz"),
    ("crc.txt.gz", ZIPPED[:-8] + bytes(8), "cannot read crc.txt.gz: CRC check failed"),
    ("empty.jsonl", b"\n\n", "no text is left; dropped: nothing"),
    ("open.jsonl", GOOD + b'{"text": "a"\n', "open.jsonl, line 2: not JSON: Expecting ',' delimiter at column 13"),
    ("words.jsonl", b"good\n", "words.jsonl, line 1: not JSON"),
    ("quotes.jsonl", b"{'text': 'a'}\n", "quotes.jsonl, line 1: not JSON"),
    ("two.jsonl", b'{"text": "a"} {"text": "b"}', "two.jsonl, line 1: not JSON: Extra data at column 15"),
    ("list.jsonl", b"[1]\n", "list.jsonl, line 1: no field `text`; found list"),
    ("text.jsonl", b'"text"\n', "text.jsonl, line 1: no field `text`; found str"),
    ("number.jsonl", b"17\n", "number.jsonl, line 1: no field `text`; found int"),
    ("null.jsonl", b"null\n", "null.jsonl, line 1: no field `text`; found null"),
    ("name.jsonl", GOOD + b'\n{"content": "a", "id": 1}', "name.jsonl, line 3: no field `text`; found content, id"),
    ("int.jsonl", b'{"text": 3}', "int.jsonl, line 1: `text` is not a text but int"),
    ("none.jsonl", b'{"text": null}', "none.jsonl, line 1: `text` is not a text but null"),
    ("parts.jsonl", b'{"text": ["a"]}', "parts.jsonl, line 1: `text` is not a text but list"),
    ("half.jsonl", b'{"text": "\\ud800"}', "half.jsonl, line 1: `text` has half a character, '\\ud800'"),
    ("deep.jsonl", b'{"text": ' + b"[" * 200_000, "deep.jsonl, line 1: unreadable"),
    ("digits.jsonl", b'{"text": ' + b"1" * 9000 + b"}", "digits.jsonl, line 1: unreadable"),
    ("latin.jsonl", b'{"text": "caf\xe9"}', "latin.jsonl is not UTF-8: byte 0xe9 at offset 13"),
    ("pretty.jsonl", b'{\n  "text": "a"\n}\n', "pretty.jsonl, line 1: not JSON"),
    ("empty.json", b"", "empty.json: not JSON"),
    ("broken.json", b'{"data": [\n{"paragraphs": [}]}', "broken.json: not JSON: Expecting value at line 2, column 17"),
    ("list.json", b"[]", "no text is left"),
    ("other.json", b'{"rows": []}', "other.json: no field `data`; found rows"),
    ("data.json", b'{"data": {"a": 1}}', "data.json: `data` is not a list but dict"),
    ("article.json", b'{"data": [{"title": "a"}]}', "article.json, data[0]: no field `paragraphs`; found title"),
    ("paragraph.json", (SQUAD % '{"qas": []}').encode(), "paragraph.json, data[0].paragraphs[1]: no field `context`"),
    ("string.json", (SQUAD % '"a"').encode(), "string.json, data[0].paragraphs[1]: no field `context`"),
    ("context.json", (SQUAD % '{"context": 1}').encode(), "paragraphs[1]: `context` is not a text but int"),
    ("half.json", (SQUAD % '{"context": "\\udc00"}').encode(), "paragraphs[1]: `context` has half a character"),
    ("none.json", b'{"data": []}', "no text is left; dropped: nothing"),
    ("deep.json", b"[" * 200_000, "deep.json, number 1: not JSON"),
]


@pytest.mark.parametrize("name, content, message", WRONG, ids=[name for name, _, _ in WRONG])
def test_wrong(here, name, content, message):
    (here / name).write_bytes(content)
    fact, fix = error(prepare.main, name, "--tokenizer=char", "--strict")
    assert message in fact and fix and "\n" not in fact + fix
    assert not list(here.glob("data/*"))  # nothing is left behind


def test_what_is_too_long_to_hold(here, monkeypatch):
    monkeypatch.setattr(rows, "RECORD_CHARACTERS", 1000)
    monkeypatch.setattr(files, "JSON_BYTES", 1000)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 500)
    (here / "a.jsonl").write_bytes(GOOD + b'{"text": "' + b"a" * 3000 + b'"}')
    assert "a.jsonl, line 2 has more than" in error(prepare.main, "a.jsonl")[0]
    (here / "a.json").write_bytes(b" " * 2000)
    assert "and an object is read whole" in error(prepare.main, "a.json")[0]


@pytest.mark.parametrize("follow", [False, True])
def test_links_below_a_folder(here, capsys, follow):
    """They may lead anywhere: they are left out and counted, unless --follow_links; then also round in circles."""
    for path in ("in/a.txt", "in/deep/b.txt", "other/c.txt", "d.txt"):
        (here / path).parent.mkdir(exist_ok=True, parents=True)
        (here / path).write_text(path)
    links = {"in/d.txt": "d.txt", "in/other": "other", "in/loop": "in", "in/again": "in", "in/gone.txt": "nowhere",
             "in/0": "in/deep", "named": "in"}
    for link, target in links.items():
        (here / link).symlink_to(here / target)
    (here / "in/zero.txt").symlink_to("/dev/zero")
    os.mkfifo("in/pipe.txt")
    found, _ = sources.fetch(["named", "d.txt"], follow_links=follow)
    said = capsys.readouterr().err
    assert found[-1] == "d.txt" and ("skipped 7 links in named" in said) is not follow
    due = ["d.txt", "in/a.txt", "in/deep/b.txt"] + ["d.txt", "other/c.txt"] * follow
    assert sorted(read(*found)) == sorted(due) and not capsys.readouterr().err
    (here / "in/a.txt").unlink()
    (here / "in/a.txt").symlink_to(here / "d.txt")
    assert read("in/a.txt") == ["d.txt"]  # named on the command line
    (here / "in/other-loop").symlink_to(here / "in")
    for pattern in ("in/**/*.txt", f"{here}/in/**/*.txt"):  # (with glob, two loops would be 2^40 paths)
        assert read(pattern) == ["in/deep/b.txt"]


@pytest.mark.parametrize("read", [
    lambda path: list(sources.documents([path])), lambda path: list(chats.conversations([path])), grading.read_task,
    lambda path: prepare.main([path])])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_a_pipe_is_not_waited_for(here, read, name):
    os.mkfifo(name)
    assert f"cannot read {name}: it is a folder, a pipe or a device" in error(lambda _: read(name))[0]


def test_capitals_and_addresses_that_are_none(here):
    (here / "A.TXT.GZ").write_bytes(gzip.compress(b"text"))
    assert read("A.TXT.GZ") == ["text"]
    assert ": not a valid URL" in error(prepare.main, "http://[x/a.txt")[0]


@pytest.mark.parametrize("name, text", [("a.json", "[%s]"), ("a.jsonl", '{"text": "a", "messages": [%s]}')])
@pytest.mark.parametrize("values", ["[]," * 500, '{},' * 500, "1," * 1000, '{"a":1},' * 350])
def test_what_is_small_in_a_file_and_large_in_memory(here, monkeypatch, name, text, values):
    monkeypatch.setattr(files, "JSON_VALUES", 1000)
    (here / name).write_text(text % values)
    for argv in ([name], [name, "--format=chat"]):
        assert "too many values: more than 1,000" in error(prepare.main, *argv)[0]
    (here / name).write_text(text % ('"' + "a" * 5000 + '"'))  # a long text is only long
    assert "too many values" not in error(prepare.main, name)[0]
