# SPDX-License-Identifier: GPL-3.0-only
"""<|endoftext|> alone on a line of a .txt separates documents; anywhere else it is text, and counted."""
import gzip
import random

import numpy as np
import pytest
from conftest import error, words

import dataset as datasets
from evaluation import perplexity
import prepare
from text import sources

MARK = "<|endoftext|>"
BITS = [MARK, MARK, MARK + "\n", "\n", "\r\n", " ", "a", "bc d", MARK[:5], f"\n{MARK}\n", f"\n{MARK}\r\n", MARK + "  \n",
        "x" * 130]


def read(path, **options):
    return ["".join(document.blocks()) for document in sources.documents([path], **options)]


def by_lines(text):
    """The documents of a text, line by line: what `text_documents` must find however it is cut."""
    found = [""]
    for line in text.split("\n"):
        if line.rstrip(" \t\r") == MARK and line.startswith(MARK):
            found.append("")
        else:
            found[-1] += line + "\n"
    found[-1] = found[-1][:-1]  # there was no line end behind the last line
    return [one for one in found if one.strip()]


def test_documents_of_any_text_cut_anywhere(here, monkeypatch):
    rng, several = random.Random(0), 0
    for _ in range(3000):
        text = "".join(rng.choice(BITS) for _ in range(rng.randrange(14)))
        (here / "a.txt").write_bytes(text.encode())
        monkeypatch.setattr(sources, "BLOCK_BYTES", rng.choice([1, 2, 3, 5, 8, 20, 1 << 20]))
        monkeypatch.setattr(sources, "LONG_LINE", rng.choice([100, 1 << 20]))
        due = by_lines(text)
        assert [one for one in read("a.txt") if one.strip()] == due, (text, sources.BLOCK_BYTES)
        several += len(due) > 1
    assert several > 300


@pytest.mark.parametrize("text, due", [
    (f"a\n{MARK}\nb\n", ["a\n", "b\n"]), (f"a\r\n{MARK}\r\nb\r\n", ["a\r\n", "b\r\n"]),
    (f"{MARK}\na\n{MARK}", ["a\n"]), (f"a\n{MARK}\n\n{MARK}\n \n{MARK}\nb", ["a\n", "b"]),
    (f"a {MARK}\n{MARK} b\n", [f"a {MARK}\n{MARK} b\n"]), (f"a\n{MARK}{MARK}\n", [f"a\n{MARK}{MARK}\n"]),
    ("\ufeff" + f"{MARK}\na", ["a"]), ("", [""]), (" \n", [""]),
    (f"{MARK}\n{MARK}\n", [""])])
def test_by_hand(here, text, due):
    (here / "a.txt").write_bytes(text.encode())
    assert read("a.txt") == due


def prepared(folder):
    return [np.fromfile(f"data/{folder}/{split}.bin", "<u2").tolist() for split in datasets.SPLITS]


def test_one_file_equals_as_many_files_as_documents(here, capsys):
    """Whole documents are for validation then; the number of threads and the size of a block change nothing."""
    texts = [words(60 + i, seed=i) + "\n" for i in range(300)]
    (here / "many").mkdir()
    for i, text in enumerate(texts):
        (here / f"many/{i:03}.txt").write_text(text)
    (here / "one.txt.gz").write_bytes(gzip.compress(f"{MARK}\n".join(texts).encode()))
    prepare.main(["many", "--tokenizer=char"])
    prepare.main(["one.txt.gz", "--tokenizer=char", "--num_proc=3"])
    said = capsys.readouterr().err
    assert said.count("300 documents, ") == 2 and "inside a text" not in said
    meta = datasets.read_meta("data/one")
    assert meta["val"]["documents"] > 3 and meta["val"]["documents"] + meta["train"]["documents"] == 300
    assert prepared("one") == prepared("many")
    # Prepared without the separator, it is other data.
    prepare.main(["one.txt.gz", "--tokenizer=char", "--separator="])
    said = capsys.readouterr().err
    assert "1 document, " in said and f"{MARK} occurs" not in said
    assert prepared("one") != prepared("many")


def test_inside_a_text_it_stays_text(here, capsys):
    (here / "a.txt").write_text(words(500) + f"a {MARK} b\n" * 3)
    (here / "b.jsonl").write_text('{"text": "the end: <|endoftext|>\\n<|endoftext|>\\nand then the next\\n"}\n')
    prepare.main(["a.txt", "b.jsonl", "--tokenizer=char"])
    said = capsys.readouterr().err
    assert f"warning: {MARK} occurs 5 times inside a text and stays text" in said and "2 documents, " in said
    data = datasets.Dataset.open("data/a")
    ids = [i for split in prepared("a") for i in split]
    text = data.load_tokenizer().decode([i for i in ids if i])
    assert text.count(MARK) == 5 and ids.count(0) == 4  # each document has a part in each split


def test_another_separator(here):
    (here / "a.txt").write_text("a\n***\nb ***\n***  \nc\n" + MARK + "\n")
    assert read("a.txt", separator="***") == ["a\n", "b ***\n", f"c\n{MARK}\n"]
    assert read("a.txt", separator="") == ["a\n***\nb ***\n***  \nc\n" + MARK + "\n"]
    (here / "a.md").write_text(f"a\n{MARK}\nb\n")
    assert read("a.md") == [f"a\n{MARK}\nb\n"]  # of a .txt only
    fact, fix = error(prepare.main, "a.txt", "--separator=a\nb")
    assert "has several lines" in fact and "ONE LINE" in fix


def test_a_document_that_is_skipped_or_damaged(here, capsys):
    """Those after it are found again in the next pass."""
    texts = [words(100, seed=i) + "\n" for i in range(4)]
    (here / "a.txt").write_text(f"{MARK}\n".join([texts[0], "short\n", texts[1], texts[0], texts[2]]))
    (here / "b.txt").write_bytes(texts[3].encode() + f"{MARK}\n".encode() + b"caf\xe9 \n")
    prepare.main(["a.txt", "b.txt", "--tokenizer=char", "--min_words=3"])
    said = capsys.readouterr().err
    assert "3 documents" in said and "1 exact duplicates, 1 with too few words" in said
    assert "left out: b.txt is not UTF-8: byte 0xe9" in said


def test_a_separated_text_is_evaluated_by_document(here):
    (here / "a.txt").write_text(f"{MARK}\n".join(["one\n", "two\n", "three\n"]))
    assert perplexity.read_text("a.txt").documents == ["one\n", "two\n", "three\n"]
    assert perplexity.read_text("a.txt", 6e-6).documents == ["one\n", "tw"]
