# SPDX-License-Identifier: GPL-3.0-only
"""Rows of tables and lists: .csv, .tsv, .parquet, .json; each read row by row, and the packed files that hold them."""
import bz2
import csv
import gzip
import json
import random
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import error, turns

from runtime.console import UserError
from text import chats, rows, sources
import dataset as datasets
import prepare
import tokenizer as tokenizers

TEXTS = ["plain", "a, comma", 'a "quote"', "two\nlines", "CRLF\r\nin it", " spaces ", "\u4e2d\u6587\U0001f642", "semi; colon\t"]


def read(path, field="text", skipped=rows.STRICT):
    return ["".join(document.blocks()) for document in sources.documents([path], field, skipped)]


def write_csv(path, header, lines, **options):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, **options).writerows([header, *lines])


@pytest.mark.parametrize("name, options", [
    ("a.csv", {}), ("a.CSV", dict(lineterminator="\n")), ("a.csv", dict(delimiter=";")), ("a.tsv", dict(delimiter="\t")),
    ("a.csv", dict(quoting=csv.QUOTE_ALL))])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_csv(here, name, options, block, monkeypatch):
    """Texts come back as they went in, line ends inside of them too."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", block)
    write_csv(name, ["id", "text", "body"], [[i, text, text * 2] for i, text in enumerate(TEXTS)], **options)
    assert read(name) == TEXTS and read(name, "body") == [text * 2 for text in TEXTS]


def test_csv_rows_that_are_wrong(here, capsys, monkeypatch):
    write_csv("a.csv", ["text", "id"], [["good", 1], ["bad"], ["good too", 2], ["bad", 3, 4], [], ["good three", 5]])
    prepare.main(["a.csv", "--tokenizer=char"])
    said = capsys.readouterr().err
    assert "left out: a.csv, line 3: 1 column, but the first line has 2" in said
    assert "left out: a.csv, line 5: 3 columns" in said and "3 documents" in said
    assert "a.csv, line 3" in error(prepare.main, "a.csv", "--tokenizer=char", "--strict", "--overwrite")[0]
    fact, fix = error(prepare.main, "a.csv", "--text_field=body")
    assert fact == "a.csv, line 2: no field `body`; found text, id" and fix.startswith("--text_field=text")
    (here / "b.csv").write_text('text\n"never closed\n')
    assert read("b.csv") == ["never closed\n\n"]
    (here / "c.csv").write_bytes(b"text,id\ra,1\rb,2\r")  # line ends of long ago
    assert "c.csv, line 1: not CSV: new-line character" in error(prepare.main, "c.csv")[0]
    monkeypatch.setattr(rows, "RECORD_CHARACTERS", 12)
    with pytest.raises(UserError, match="line 2: not CSV: field larger than field limit"):
        read("b.csv")


def test_the_column_of_a_text_can_be_given_as_fields(here):
    write_csv("a.csv", ["id", "body"], [[i, f"this is text {i}"] for i in range(9)])
    (folder, meta) = prepare.prepare(["a.csv"], prepare.PrepareConfig(fields="body", tokenizer="char"))
    assert meta["train"]["documents"] == 9 and folder == "data/a"


def test_a_vocabulary_from_a_column(here, capsys):
    write_csv("a.csv", ["id", "body"], [[i, f"this is text {i}"] for i in range(9)])
    options = ["--train", "--input=a.csv", "--tokenizer=char", "--out=data/mine"]
    assert error(tokenizers.main, *options)[1].startswith("--text_field=body")
    tokenizers.main([*options, "--text_field=body"])
    assert "next: python prepare.py a.csv --tokenizer=data/mine --text_field=body" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    assert "--separator=<|endoftext|> " in capsys.readouterr().out


def test_conversations_in_a_table(here):
    write_csv("a.csv", ["instruction", "context", "response"], [["a", "c", "b"], ["a", "", "d"]])
    found = [document.messages for document in chats.conversations(["a.csv"])]
    assert found == [turns("a\n\nc", "b"), turns("a", "d")]
    write_csv("b.csv", ["q", "reply"], [["a", "b"]])
    assert [document.messages for document in chats.conversations(["b.csv"], ["q", "reply"])] == [turns("a", "b")]


# ---------- Lists

def listed(text, block):
    """The rows of a .json list that comes in blocks of this size."""
    blocks = iter([text[i:i + block] for i in range(0, len(text), block)])
    return [row for _, row in rows.json_list("a.json", blocks, "fix")]


@pytest.mark.parametrize("block", [9, 50, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_as_it_comes(block, indent):
    rng = random.Random(block)

    def value(depth):
        kind = rng.randrange(7 if depth < 3 else 4)
        if kind > 4:
            return [value(depth + 1) for _ in range(rng.randrange(4))]
        if kind == 4:
            return {text: value(depth + 1) for text in rng.sample(TEXTS, 3)}
        return [rng.randrange(10**6), rng.random() * 1e9, rng.choice(TEXTS), None][kind]
    for n in (0, 1, 2, 30):
        content = [value(0) for _ in range(n)]
        assert listed(json.dumps(content, indent=indent), block) == content


@pytest.mark.parametrize("text, fact", [
    ('[{"a": 1}, {"a"]', "a.json, number 2: not JSON: Expecting ':' delimiter"), ("[1, 2,]", "number 3: not JSON"),
    ("[1, 2", "the list does not end after number 2"), ("[1, 2] 3", "the list does not end after number 2"),
    ("[1 2]", "the list does not end after number 1"), ('[1, "a', "number 2: not JSON: Unterminated string"),
    ("{}", "a.json is not a list of rows"), ("", "a.json is not a list of rows"), ("[" * 9000, "number 1: not JSON"),
    ("[1, " + "1" * 9000 + "]", "number 2: not JSON: Exceeds the limit")])
@pytest.mark.parametrize("block", [100, 1 << 20])
def test_a_list_that_is_damaged(text, fact, block):
    with pytest.raises(UserError) as caught:
        listed(text, block)
    assert fact in caught.value.fact


def test_the_memory_for_a_list_does_not_grow_with_it():
    row = json.dumps(dict(messages=turns("question " * 50, "answer " * 50)))

    def blocks(n):
        for i in range(n):
            yield ("," if i else "[") + ",".join([row] * 100)
        yield "]"

    def peak(n):
        tracemalloc.start()
        assert sum(1 for _ in rows.json_list("a.json", blocks(n), "")) == 100 * n
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size
    assert peak(60) < 3 * peak(3) < 3e6


def test_a_list_of_texts_and_lines_that_are_named_json(here):
    content = [dict(text=text) for text in TEXTS]
    (here / "a.json").write_text(json.dumps(content, indent=1))
    (here / "b.json").write_text("".join(json.dumps(row) + "\n" for row in content))
    (here / "c.json").write_text(json.dumps(dict(data=[dict(paragraphs=[dict(context="SQuAD's")])])))
    assert read("a.json") == read("b.json") == TEXTS and read("c.json") == ["SQuAD's"]
    rows_ = [dict(prompt="a", completion="b"), dict(prompt=7, completion="b"), dict(prompt="c", completion="d")]
    (here / "d.json").write_text(json.dumps(rows_))
    (here / "e.json").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    for name, where in (("d.json", "d.json, number 2"), ("e.json", "e.json, line 2")):
        skipped = rows.Skipped()
        found = [document.messages for document in chats.conversations([name], (), skipped)]
        assert found == [turns("a", "b"), turns("c", "d")] and skipped.shown[0].fact.startswith(where)


# ---------- Parquet, packed files, and what is told

def test_parquet(here):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -r requirements-dev.txt")
    from pyarrow import parquet
    parquet.write_table(pyarrow.table(dict(text=TEXTS, id=range(len(TEXTS)))), "a.parquet")
    assert read("a.parquet") == TEXTS
    (here / "a.parquet.gz").write_bytes(gzip.compress((here / "a.parquet").read_bytes()))
    assert read("a.parquet.gz") == TEXTS
    talks = [turns("a", "b"), turns("c", "d")]
    parquet.write_table(pyarrow.table(dict(messages=talks)), "b.parquet")
    assert [document.messages for document in chats.conversations(["b.parquet"])] == talks
    (here / "c.parquet").write_bytes((here / "a.parquet").read_bytes()[:-9])
    assert "cannot read c.parquet: " in error(prepare.main, "c.parquet")[0]
    assert "no field `body`; found text, id" in error(prepare.main, "a.parquet", "--text_field=body")[0]


def test_parquet_without_pyarrow(here, monkeypatch):
    (here / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fact, fix = error(prepare.main, "a.parquet")
    assert fact == ".parquet files need the package pyarrow" and fix == "pip install pyarrow"


def test_a_folder_of_tables_is_told_the_pattern(here):
    (here / "in").mkdir()
    for i in range(3):
        write_csv(f"in/{i}.csv", ["text"], [[f"the text is number {i}, here it is"]])
    fact, fix = error(prepare.main, "in")
    assert fact.startswith("in holds no .txt") and fix == "'in/**/*.csv'"
    assert error(prepare.main, "in/*")[1] == "'in/*.csv'" and error(prepare.main, "in/**/*")[1] == "'in/**/*.csv'"
    prepare.main(["in/**/*.csv", "--tokenizer=char"])
    assert datasets.read_meta("data/in")["train"]["documents"] == 3


@pytest.mark.parametrize("ending, pack", [(".gz", gzip.compress), (".BZ2", bz2.compress)])
def test_packed_files(here, ending, pack):
    (here / f"a.txt{ending}").write_bytes(pack(b"the text"))
    (here / f"b.json{ending}").write_bytes(pack(b'[{"text": "the row"}]'))
    (here / f"c.csv{ending}").write_bytes(pack(b"text\nthe cell\n"))
    (here / f"d{ending}").write_bytes(pack(b"the text")[:-5])
    assert read(f"a.txt{ending}") + read(f"b.json{ending}") + read(f"c.csv{ending}") == ["the text", "the row", "the cell"]
    assert f"cannot read d{ending}: " in error(prepare.main, f"d{ending}")[0]


def test_the_rest_of_a_file_is_not_lost_without_a_word(here):
    (here / "a.json").write_text('[{"text": "one"}, {"text": ')
    assert "a.json, number 2: not JSON" in error(prepare.main, "a.json")[0]


@pytest.mark.parametrize("name, content", [
    ("bad.jsonl", b'{"text": "caf\xe9"}'), ("bad.csv", b"text\ncaf\xe9"), ("bad.json", b'[{"text": "a'), ("bad.json", b"\xe9"),
    ("bad.json", b"{}"), ("bad.parquet", b"PAR1"), ("bad.jsonl.gz", b"\x1f\x8b")])
@pytest.mark.parametrize("form", ["text", "chat"])
def test_a_file_of_rows_that_cannot_be_read_is_left_out(here, capsys, name, content, form):
    """As a bad text is: named and counted, unless --strict, or there is nothing else."""
    if name == "bad.parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -r requirements-dev.txt")
    (here / name).write_bytes(content)
    rows_ = [dict(text=f"the text {i}", prompt=f"what {i}?", completion=f"that {i}") for i in range(20)]
    (here / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    options = ["--tokenizer=char", f"--format={form}", "--out=data/a"]
    for order in ([name, "a.jsonl"], ["a.jsonl", name]):
        prepare.main([*order, *options, "--overwrite"])
        said = capsys.readouterr().err
        assert name in said and "1 unreadable, 20 read; --strict stops at the first" in said
    assert name in error(prepare.main, "a.jsonl", name, *options, "--overwrite", "--strict")[0]
    assert name in error(prepare.main, name, *options)[0]


def test_the_rows_of_a_table_equal_those_of_lines(here):
    texts = [f"this is text number {i} of some\n" for i in range(250)]
    write_csv("a.csv", ["text"], [[text] for text in texts])
    (here / "b.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    for name in ("a.csv", "b.jsonl"):
        prepare.main([name, "--tokenizer=char"])
    for split in datasets.SPLITS:
        one, two = (np.fromfile(f"data/{name}/{split}.bin", "<u2") for name in "ab")
        assert one.tolist() == two.tolist() and len(one)
