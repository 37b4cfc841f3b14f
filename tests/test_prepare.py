# SPDX-License-Identifier: GPL-3.0-only
"""Data: what is written, how it is split, how it is read back, and what people get wrong."""
import gzip
import hashlib
import json
import random
import shlex
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT, error, talks, turns, words, write_talks

import dataset as datasets
from runtime import files
import prepare
import tokenizer as tokenizers


def read(folder, side):
    """The text of one side, document by document, from the files alone."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    tokenizer = tokenizers.load_from(folder / "tokenizer")
    ids = np.memmap(folder / f"{side}.bin", dtype=np.uint16, mode="r")  # as nanoGPT reads it
    assert len(ids) == meta[side]["tokens"] and ids[0] == meta["special"]["<|endoftext|>"]
    ends = [*np.flatnonzero(ids == meta["special"]["<|endoftext|>"]), len(ids)]
    texts = [tokenizer.decode(ids[a + 1:b].tolist()) for a, b in zip(ends, ends[1:])]
    assert len(texts) == meta[side]["documents"] and sum(len(t.encode()) for t in texts) == meta[side]["bytes"]
    return texts


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_one_text_is_cut_near_its_end_at_a_line_border(here, kind):
    text = words(20_000)
    (here / "my.txt").write_text(text, encoding="utf-8", newline="")
    prepare.main(["my.txt", f"--tokenizer={kind}", "--vocab_size=300", "--val_fraction=0.1"])
    (train,), (val,) = read(here / "data/my", "train"), read(here / "data/my", "val")
    assert train + val == text and train.endswith("\n") and 0.09 < len(val) / len(text) < 0.16


@pytest.mark.parametrize("at, cut", [(849, 900), (850, 851), (880, 881), (899, 900), (900, 900)])
def test_a_line_end_is_taken_if_it_is_near(here, at, cut):
    """1,000 characters, 100 of them for validation: the last line end of the 50 before these, else none."""
    (here / "a.txt").write_text("ab" * (at // 2) + "c" * (at % 2) + "\n" + "d" * (999 - at))
    prepare.main(["a.txt", "--tokenizer=char", "--val_fraction=0.1"])
    assert len(read(here / "data/a", "train")[0]) == cut


def test_the_vocabulary_has_not_seen_the_validation_split(here):
    """A character that stands there alone has no token of its own."""
    (here / "a.txt").write_text(words(20_000) + "\u0436" * 500, encoding="utf-8")
    prepare.main(["a.txt", "--vocab_size=330"])
    tokenizer = tokenizers.load_from("data/a")
    assert read(here / "data/a", "val")[0].endswith("\u0436" * 500)
    assert "\u0436" not in read(here / "data/a", "train")[0] and len(tokenizer.encode("\u0436")) == 2
    prepare.main(["a.txt", "--tokenizer=char"])  # which needs every character
    assert len(tokenizers.load_from("data/a").encode("\u0436")) == 1


def test_from_200_documents_on_whole_ones_are_held_out(here):
    for n in (199, 200):
        (here / f"{n}.jsonl").write_text("".join(json.dumps({"text": f"{i} {words(50)}"}) + "\n" for i in range(n)))
        plan = prepare.make_plan([f"{n}.jsonl"], prepare.PrepareConfig())
        assert set(plan.split_of.tolist()) == ({prepare.CUT} if n < 200 else {prepare.TRAIN, prepare.VAL})


def test_kinds_of_files_and_folders(here, capsys):
    (here / "in/deep").mkdir(parents=True)
    (here / "in/a.txt").write_bytes("\ufeff".encode() + b"one\r\n" * 40)  # a byte order mark is not text, CRLF is
    (here / "in/b.md").write_text("# two\n" * 40)
    (here / "in/deep/c.py").write_text("three = 3\n" * 40)
    rows = [{"text": f"row {i} \u4e2d\n" * 9, "id": i} for i in range(5)]
    (here / "in/d.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    with gzip.open(here / "in/e.txt.gz", "wt", encoding="utf-8") as file:
        file.write("zipped\n" * 40)
    (here / "in/copy.txt").write_text("# two\n" * 40)  # an exact duplicate of b.md
    (here / "in/empty.txt").write_text("")
    (here / "in/skip.bin").write_bytes(b"\xff\xfe")
    prepare.main(["in", "--tokenizer=char"])
    texts = [a + b for a, b in zip(read(here / "data/in", "train"), read(here / "data/in", "val"))]
    assert sorted(texts) == sorted(["one\r\n" * 40, "# two\n" * 40,
                                    "three = 3\n" * 40, "zipped\n" * 40, *(f"row {i} \u4e2d\n" * 9 for i in range(5))])
    said = capsys.readouterr().err
    assert "9 documents" in said and "1 exact duplicates" in said and "1 empty" in said
    prepare.main(["in/*.md", "in/deep/c.py", "--out=data/some", "--tokenizer=char"])
    assert len(read(here / "data/some", "train")) == 2


def test_many_documents_are_split_whole_and_by_their_text(here):
    rows = [f"document {i}: {words(50, seed=i)}" for i in range(400)]
    (here / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (here / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in reversed(rows)))
    for name in "ab":
        prepare.main([f"{name}.jsonl", "--tokenizer=char"])
    train, val = read(here / "data/a", "train"), read(here / "data/a", "val")
    assert sorted(train + val) == sorted(rows) and 5 < len(val) < 45
    assert set(val) == set(read(here / "data/b", "val"))  # wherever a document stands, it falls on the same side
    prepare.main(["a.jsonl", "--tokenizer=char", "--val_fraction=0.000001"])
    assert len(read(here / "data/a", "val")) == 1  # never empty


def test_from_300_characters_up(here, capsys):
    (here / "tiny.txt").write_text(words(300))
    prepare.main(["tiny.txt"])
    data = datasets.Dataset.open("data/tiny")
    said = capsys.readouterr().err
    assert "next: python train.py config/train_small.py --dataset=tiny --out_dir=out/tiny --block_size=" in said
    data.check(int(said.split("--block_size=")[1].split()[0]))
    assert data.meta["vocab_size"] < 500 and "--max_iters=50 " in said


def test_preparing_again_replaces_and_an_interruption_leaves_the_old_data(here, monkeypatch):
    (here / "a.txt").write_text(words(1000))
    prepare.main(["a.txt", "--tokenizer=char"])
    before = (here / "data/a/train.bin").read_bytes()
    (here / "a.txt").write_text(words(3000))
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "sealed", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.main(["a.txt", "--tokenizer=char"])
    assert (here / "data/a/train.bin").read_bytes() == before
    prepare.main(["a.txt", "--tokenizer=char"])
    assert len((here / "data/a/train.bin").read_bytes()) > len(before)
    assert not (here / "data/a.part").exists()


@pytest.mark.parametrize("argv, held", [
    (["b.txt"], "text from a.jsonl"), (["a.jsonl", "b.txt"], "text from a.jsonl"), (["stdlib"], "text from a.jsonl"),
    (["a.jsonl", "--format=chat"], "text from a.jsonl"), (["a.jsonl"], "data with no readable meta.json")])
def test_other_data_are_replaced_with_overwrite_alone(here, capsys, argv, held):
    (here / "a.jsonl").write_text(json.dumps(dict(text=words(900), prompt="a", completion="b")) + "\n")
    (here / "b.txt").write_text(words(1000, seed=1))
    prepare.main(["a.jsonl", "--tokenizer=char", "--out=data/x"])
    if "readable" in held:
        (here / "data/x/meta.json").unlink()  # as nanoGPT's own data are
    before = {path.name: path.read_bytes() for path in (here / "data/x").glob("*.*")}
    fact, fix = error(prepare.main, *argv, "--tokenizer=char", "--out=data/x")
    assert f"data/x holds {held}" in fact and " from " + ", ".join(a for a in argv if "--" not in a) + " would" in fact
    assert fix.startswith("--overwrite, or --out=") and "reading" not in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in (here / "data/x").glob("*.*")}
    if "--format=chat" not in argv and "stdlib" not in argv:  # (too few, and too many)
        prepare.main([*argv, "--tokenizer=char", "--out=data/x", "--overwrite"])
        assert before != {path.name: path.read_bytes() for path in (here / "data/x").glob("*.*")}


@pytest.mark.parametrize("first, again", [
    ("stdlib of Python 3.10.1", "stdlib"), ("pytorch 2.13.0+cpu", "pytorch"), ("notes.txt", "./notes.txt"),
    ("letters", "letters/"), ("https://h/a.txt (sha256 " + "0f" * 32 + ")", "https://h/a.txt")])
def test_the_same_data_again(first, again):
    assert prepare.contents([first], False) == prepare.contents([again], False) != prepare.contents([again], True)


def test_texts_of_the_same_name_from_two_folders_are_two_texts(here, capsys):
    for folder in "ab":
        (here / folder).mkdir()
        (here / folder / "notes.txt").write_text(folder * 3000)
    prepare.main([f"{here}/a/notes.txt", "--tokenizer=char"])
    prepare.main([f"{here}/a/notes.txt", "--tokenizer=char"])
    fact, fix = error(prepare.main, f"{here}/b/notes.txt", "--tokenizer=char")
    assert "data/notes holds text from notes.txt (folder " in fact and "--overwrite" in fix
    (here / "a/more.txt").write_text("a" * 3001)
    prepare.main([f"{here}/a", "--tokenizer=char"])  # whose report names documents
    for name in ("notes", "a"):
        assert "more.txt" in (meta := (here / f"data/{name}/meta.json").read_text()) or name == "notes"
        assert str(here) not in meta


def test_a_file_that_is_named_like_a_lock_is_left_alone(here):
    (here / "poetry.txt").write_text(words(3000))
    for name in ("poetry.lock", "poetry.part.txt"):
        (here / name).write_text("mine")
    prepare.main(["poetry.txt", "--tokenizer=char", "--out=poetry"])
    assert (here / "poetry.lock").read_text() == "mine" and not list(here.glob(".*lock"))


def test_what_is_replaced_is_said_before_the_work(here, monkeypatch, capsys):
    (here / "a.txt").write_text(words(1000))
    prepare.main(["a.txt", "--tokenizer=char"])
    assert "replacing" not in capsys.readouterr().err
    monkeypatch.setattr(prepare, "make_plan", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare.main(["./a.txt", "--vocab_size=300"])
    assert "note: replacing data/a, which holds text from a.txt" in capsys.readouterr().err


def test_a_tokenizer_can_be_taken_from_other_data(here):
    (here / "a.txt").write_text(words(3000))
    (here / "b.txt").write_text(words(1000, seed=1))
    prepare.main(["a.txt", "--vocab_size=300"])
    prepare.main(["b.txt", "--tokenizer=data/a"])
    a, b = (json.loads((here / f"data/{n}/meta.json").read_text()) for n in "ab")
    assert a["tokenizer_sha256"] == b["tokenizer_sha256"]
    assert "c" in error(prepare.main, "b.txt", f"--tokenizer={here}")[0]


@pytest.mark.parametrize("tokenizer, times", [("char", 2), ("data/other", 2), ("bpe", 3)])
def test_how_often_the_text_is_read(here, monkeypatch, tokenizer, times):
    (here / "a.md").write_text(words(3000))
    prepare.main(["a.md", "--vocab_size=300", "--out=data/other"])
    document, = prepare.documents(["a.md"])
    blocks, opened = document.blocks, []
    document.blocks = lambda: opened.append(1) or blocks()
    monkeypatch.setattr(prepare, "documents", lambda *_: [document])
    prepare.main(["a.md", f"--tokenizer={tokenizer}", "--vocab_size=300"])
    assert len(opened) == times


# ---------------------------------------------------------------------------------------------------------------------


def test_what_people_get_wrong(here):
    """What is wrong with a text stands in test_sources.py."""
    (here / "latin.txt").write_bytes(b"caf\xe9 " * 5)
    assert "iconv" in error(prepare.main, "latin.txt")[1]
    assert "nowhere.txt does not exist" in error(prepare.main, "nowhere.txt")[0]
    (here / "folder").mkdir()
    assert "folder holds no .txt" in error(prepare.main, "folder")[0]
    assert "no text was given" in error(prepare.main)[0]
    (here / "good.txt").write_text(words(1000))
    assert "val_fraction=1.5" in error(prepare.main, "good.txt", "--val_fraction=1.5")[0]
    assert ". is not prepared data: it holds " in error(prepare.main, "good.txt", "--out=.")[0]
    assert "good.txt is not prepared data: it is a file" in error(prepare.main, "good.txt", "--out=good.txt")[0]
    assert "'gpt5'" in error(prepare.main, "good.txt", "--tokenizer=gpt5")[0]
    (here / "b.txt").write_text(words(500))
    prepare.main(["b.txt", "--tokenizer=char", "--out=other"])
    (here / "c.txt").write_text("123" * 50)
    assert "'1' (U+0031) is not among the" in error(prepare.main, "c.txt", "--tokenizer=other")[0]
    assert not list(here.glob("data/*"))  # an error leaves nothing behind


def test_nothing_that_is_not_ours_is_deleted(here):
    (here / "a.txt").write_text(words(1000))
    for precious in ("data/a.part/mine", "data/a.old/mine", "data/a/tokenizer/mine.py"):
        (here / precious).parent.mkdir(parents=True, exist_ok=True)
        (here / precious).write_text("precious")
        assert "is not prepared data: it holds mine" in error(prepare.main, "a.txt", "--tokenizer=char")[0]
        assert (here / precious).read_text() == "precious"
        (here / precious).unlink()
    prepare.main(["a.txt", "--tokenizer=char"])


def test_texts_that_hold_nothing_to_learn_a_vocabulary_from(here):
    for name, fact in (("blank.md", "nothing to learn a vocabulary from"), ("blank.txt", "no text is left; dropped: 1 empty")):
        (here / name).write_text("\n" * 5000)
        assert fact in error(prepare.main, name, "--vocab_size=300")[0]
    (here / "a.txt").write_text(words(1000))
    assert "vocab_size=1000000000000000019884624838656" in error(prepare.main, "a.txt", "--vocab_size=1e30")[0]
    (here / "deep.jsonl").write_text('{"text": ' + "[" * 200_000 + "\n")
    assert "deep.jsonl, line 1: unreadable" in error(prepare.main, "deep.jsonl")[0]


@pytest.mark.parametrize("kind", ["char", "bpe", "unigram"])
def test_the_number_of_threads_changes_nothing(here, kind, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 5000)
    rows = [words(random.Random(i).randrange(10, 4000), seed=i) for i in range(250)]
    (here / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    made = []
    for threads in (1, 2, 5):
        prepare.main(["a.jsonl", f"--tokenizer={kind}", "--vocab_size=330", f"--num_proc={threads}"])
        made.append({path.name: path.read_bytes() for path in (here / "data/a").rglob("*") if path.is_file()})
    assert made[0] == made[1] == made[2] and len(made[0]) >= 5


@pytest.mark.parametrize("setting", ["--min_words=-1", "--num_proc=-1", "--character_coverage=0",
                                     "--character_coverage=1.1", "--val_fraction=0"])
def test_settings_out_of_range(here, setting):
    (here / "a.txt").write_text(words(1000))
    assert setting[2:].split("=")[0] in error(prepare.main, "a.txt", setting)[0]


def peak_memory(*command):
    """The most memory that a script takes, in bytes. A small process starts it: Linux counts the memory of who does."""
    measure = """import os, subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss * 1024)
sys.exit(status != 0)"""
    return int(subprocess.run([sys.executable, "-c", measure, *command], capture_output=True, check=True).stdout)


def test_memory_does_not_grow_with_the_text(here):
    """24 MB of short documents, and 24 MB in one: less than 60 MB beyond what a small text takes."""
    line = words(400).replace("\n", " ")
    with open("a.jsonl", "w", encoding="utf-8") as file:
        for i in range(60_000):
            file.write(json.dumps({"text": f"{i} {line}"}) + "\n")
    with open("b.txt", "w", encoding="utf-8") as file:
        for i in range(60_000):
            file.write(f"{i} {line}\n")
    (here / "c.txt").write_text(words(3000))
    peaks = [peak_memory(ROOT / "prepare.py", name, "--tokenizer=char", "--num_proc=1")
             for name in ("a.jsonl", "b.txt", "c.txt")]
    assert max(peaks) < peaks[2] + 60e6, peaks


def test_names_and_quoting(here, capsys):
    """A dot in a name is part of it, and what is printed can be pasted."""
    for name in ("book.en.txt", "book.es.txt.gz", "my notes (2).txt"):
        with (gzip.open if name.endswith("gz") else open)(here / name, "wt", encoding="utf-8") as file:
            file.write(words(3000))
        prepare.main([name, "--tokenizer=char"])
    assert sorted(p.name for p in (here / "data").iterdir()) == ["book.en", "book.es", "my notes (2)"]
    said = capsys.readouterr().err
    assert "'--dataset=my notes (2)' '--out_dir=out/my notes (2)'" in said


def test_what_can_be_pasted_is_quoted(here):
    """Names come from others: of files, and of fields in their data."""
    name = "my $(notes); x.txt"
    (here / name).write_bytes(b"caf\xe9 " * 5)
    assert name in shlex.split(error(prepare.main, name)[1].split(" > ")[0])
    (here / "a.jsonl").write_text(json.dumps({"x; touch y": "text"}))
    assert shlex.split(error(prepare.main, "a.jsonl")[1])[0] == "--text_field=x; touch y"
    assert name in shlex.split(error(lambda _: datasets.Dataset.open(f"data/{name}"))[1].partition(", then")[0])
    other = "no $(such); data"
    assert f"--out=data/{other}" in shlex.split(error(lambda _: datasets.Dataset.open(f"data/{other}"))[1])


def test_another_field(here):
    (here / "a.jsonl").write_text(json.dumps({"question": words(600), "id": 3}) + "\n")
    fact, fix = error(prepare.main, "a.jsonl", "--tokenizer=char")
    assert "no field `text`; found question, id" in fact and fix.startswith("--text_field=question or prepare.py --format=chat")
    prepare.main(["a.jsonl", "--tokenizer=char", fix.split()[0]])
    assert "".join(read(here / "data/a", "train") + read(here / "data/a", "val")) == words(600)


def test_a_text_beside_one_with_sides_of_its_own_is_cut(here):
    (here / "a.txt").write_text(words(1000))
    plan = prepare.make_plan(["stdlib", "a.txt"], prepare.PrepareConfig())
    assert plan.split_of[-1] == prepare.CUT and {prepare.TRAIN, prepare.VAL} <= set(plan.split_of[:-1].tolist())


def test_settings_without_effect_are_named(here, capsys):
    (here / "a.txt").write_text(words(1000))
    prepare.main(["a.txt", "--tokenizer=char", "--vocab_size=100"])
    assert "--vocab_size has no effect here: this vocabulary has" in capsys.readouterr().err


def test_folders_that_only_look_like_ours(here):
    """Names alone do not make a folder ours: a model's tokenizer.json, a folder named like a file."""
    (here / "a.txt").write_text(words(1000))
    for precious in ("hf/tokenizer.json", "o/train.bin/photo.jpg", "p/tokenizer/tokenizer/thesis.doc"):
        (here / precious).parent.mkdir(parents=True)
        (here / precious).write_text("precious")
        out = precious.split("/")[0]
        assert "is not prepared data: it holds " in error(prepare.main, "a.txt", f"--out={out}", "--tokenizer=char")[0]
        assert (here / precious).read_text() == "precious"


def test_two_into_one_folder(here, capsys):
    (here / "a.txt").write_text(words(1000))
    prepare.main(["a.txt", "--tokenizer=char"])
    with files.locked("data/a"):
        assert "another process is writing data/a" in error(prepare.main, "a.txt", "--tokenizer=char")[0]
        assert "reading" not in capsys.readouterr().err.split("next: ")[1]  # it is said at once
    assert [p.name for p in (here / "data").iterdir()] == ["a"]


def test_who_needs_the_same_data_waits_for_the_one_that_writes_them(here, monkeypatch):
    """All that come meanwhile find them ready; where the first one fails, the next one writes them."""
    (here / "a.txt").write_text(words(1000))
    write, started, go, wrote = prepare.write, threading.Event(), threading.Event(), []

    def slow_write(*args):
        started.set()
        assert go.wait(60)
        wrote.append(args)
        if len(wrote) == 1:
            raise OSError(5, "Input/output error")
        return write(*args)
    monkeypatch.setattr(prepare, "write", slow_write)
    with ThreadPoolExecutor(4) as pool:
        def need():
            settings = prepare.PrepareConfig(tokenizer="char")
            return pool.submit(prepare.prepare, ["a.txt"], settings)
        first = need()
        assert started.wait(60)
        others = [need() for _ in range(3)]
        go.set()
        with pytest.raises(prepare.UserError, match="Input/output error"):
            first.result(60)
        made = [other.result(60) for other in others]
    assert len(wrote) == 2 and made[0] == made[1] == made[2] and made[0][1] == datasets.read_meta("data/a")
    assert [p.name for p in (here / "data").iterdir()] == ["a"]


def test_a_text_that_changes_while_it_is_read(here, monkeypatch):
    (here / "a.jsonl").write_text("".join(json.dumps({"text": words(100, seed=i)}) + "\n" for i in range(9)))
    learn = prepare.learn_tokenizer
    for change in (lambda rows: rows[:-1], lambda rows: [rows[0][:-4] + '"}\n', *rows[1:]]):
        def learn_and_change(*args):
            made = learn(*args)
            rows = (here / "a.jsonl").read_text().splitlines(keepends=True)
            (here / "a.jsonl").write_text("".join(change(rows)))
            return made
        monkeypatch.setattr(prepare, "learn_tokenizer", learn_and_change)
        assert "while " in error(prepare.main, "a.jsonl", "--tokenizer=char")[0]
    assert not list(here.glob("data/*"))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_space_that_is_rare_comes_back(here, kind):
    """It has a piece of its own, whatever the coverage, and wherever it first occurs."""
    (here / "zh.txt").write_text("\u4e2d\u6587\u5b57\n" * 9000 + "a b", encoding="utf-8")
    prepare.main(["zh.txt", f"--tokenizer={kind}", "--character_coverage=0.9995", "--vocab_size=300"])
    assert "".join(read(here / "data/zh", "train") + read(here / "data/zh", "val")).endswith("a b")
    prepare.main(["--inspect", "data/zh"])


# ---------------------------------------------------------------------------------------------------------------------
# Conversations

CHAT = ["--format=chat", "--tokenizer=char"]


def read_chats(folder, side):
    """[(ids, mask)] of each conversation, from the files alone, which are held against meta.json."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    raw = (folder / f"{side}.mask.bin").read_bytes()
    ids, mask, end = np.fromfile(folder / f"{side}.bin", np.uint16), np.frombuffer(raw, np.uint8), meta["special"]
    due, tokenizer, borders = meta[side], tokenizers.load_from(folder / "tokenizer"), ids == end["<|endoftext|>"]
    assert meta["chat"] is True and len(ids) == len(mask) == due["tokens"] and set(mask.tolist()) == {0, 1}
    assert due["mask_sha256"] == hashlib.sha256(raw).hexdigest() and due["trained"] == mask.sum()
    assert due["trained_bytes"] == sum(len(tokenizer.token_bytes(i)) for i in ids[mask == 1].tolist())
    assert borders[0] and borders.sum() == due["documents"] and not mask[borders].any()
    at = np.flatnonzero(borders)[1:]
    return [(a[1:].tolist(), b[1:].tolist()) for a, b in zip(np.split(ids, at), np.split(mask, at))]


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("n", [2, 12, 230])
def test_conversations_are_held_out_whole(here, n, kind):
    """However few there are; and the mask is what the tokenizer says."""
    write_talks("talk.jsonl", talks(n))
    prepare.main(["talk.jsonl", "--format=chat", f"--tokenizer={kind}", "--vocab_size=320", "--num_proc=2"])
    tokenizer = tokenizers.load_from(here / "data/talk-chat/tokenizer")
    sides = [read_chats(here / "data/talk-chat", side) for side in ("train", "val")]
    assert sorted(sides[0] + sides[1]) == sorted(tokenizer.conversation(messages) for messages in talks(n))
    assert 1 <= len(sides[1]) <= max(1, n // 10)
    meta = json.loads((here / "data/talk-chat/meta.json").read_text())
    said = sum(len(message["content"]) for messages in talks(n) for message in messages)
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == said + sum(len(messages) - 1 for messages in talks(n))


def test_one_conversation_beside_those_with_sides_of_their_own(here, monkeypatch):
    """Neither cut nor on both sides."""
    mine = [dict(role="user", content="and you?"), dict(role="assistant", content="I am here.")]
    rows = [prepare.chats.in_memory(f"{i}", f"{i}", side, mine) for i, side in enumerate([True, False, None])]
    monkeypatch.setattr(prepare.chats, "conversations", lambda *_: iter(rows))
    plan = prepare.make_plan([], prepare.PrepareConfig(format="chat"))
    assert plan.split_of.tolist() == [prepare.VAL, prepare.TRAIN, prepare.TRAIN]


def test_an_example_shows_what_is_learned(here, capsys):
    write_talks("talk.jsonl", [turns("silent"), turns("a", "", "b", "c", system="be kind"), *talks(5)])
    prepare.main(["talk.jsonl", *CHAT, "--val_fraction=0.0001"])
    due = ("<|system|>be kind<|end|><|user|>a<|end|><|assistant|><|end|><|user|>b<|end|><|assistant|>\u27e6c<|end|>"
           "\u27e7\n")
    assert f"an example:\n{due}(learned: the text between \u27e6 and \u27e7)\n" in capsys.readouterr().err
    prepare.main(["--inspect", "data/talk-chat"])
    shown, data = capsys.readouterr(), datasets.Dataset.open("data/talk-chat")
    assert f"; loss on {data.meta['train']['trained']} tokens" in shown.err and "\u27e6" in shown.out


def test_conversations_without_an_answer_stay(here):
    rows = talks(40)
    rows[3:3], rows[9:9] = [turns("a cat")], [turns("the man", "")]
    write_talks("talk.jsonl", rows)
    prepare.main(["talk.jsonl", *CHAT])
    meta = json.loads((here / "data/talk-chat/meta.json").read_text())
    sides = [read_chats(here / "data/talk-chat", side) for side in ("train", "val")]
    silent = [mask for _, mask in sides[0] + sides[1] if not any(mask)]
    assert len(silent) == 2 and meta["train"]["documents"] + meta["val"]["documents"] == 42


def test_what_people_get_wrong_with_conversations(here):
    write_talks("talk.jsonl", talks(20))
    prepare.main(["talk.jsonl", *CHAT, "--out=base"])
    write_talks("bad.jsonl", [*talks(2), turns("a cat", "Zebra"), *talks(3, seed=1)])
    fact, fix = error(prepare.main, "bad.jsonl", "--format=chat", "--tokenizer=base", "--strict")
    assert fact.startswith("bad.jsonl, line 3: the character 'Z' (U+005A)") and "--tokenizer=bpe" in fix
    (here / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 7}\n')
    assert "rows.jsonl, line 2" in error(prepare.main, "rows.jsonl", *CHAT, "--strict")[0]
    for argv in (["shakespeare"], ["talk.jsonl", "squad"]):
        fact, fix = error(prepare.main, *argv, *CHAT)
        assert f"{argv[-1]} is text, not conversations" in fact and "--format=chat" in fix
    write_talks("one.jsonl", talks(1) * 2)
    for kind in ("char", "bpe"):
        argv = ["one.jsonl", "--format=chat", f"--tokenizer={kind}"]
        assert "too little text for two splits: 65 bytes" in error(prepare.main, *argv)[0]
    for texts in (["a"], ["a", ""]), (["a", ""], ["b", "c"]):
        write_talks("two.jsonl", [turns(*one) for one in texts])
        fact, _ = error(prepare.main, "two.jsonl", *CHAT)
        assert "the assistant says nothing in any of the 1 conversations of the " in fact
    assert "'chats' is not text or chat" in error(prepare.main, "talk.jsonl", "--format=chats")[0]
    assert not list(here.glob("data/*"))


def test_the_number_of_threads_changes_no_mask(here, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 1000)
    write_talks("talk.jsonl", talks(150))
    made = []
    for threads in (1, 3):
        prepare.main(["talk.jsonl", *CHAT, f"--num_proc={threads}"])
        made.append({path.name: path.read_bytes() for path in (here / "data/talk-chat").rglob("*") if path.is_file()})
    assert made[0] == made[1] and {"train.mask.bin", "val.mask.bin"} < made[0].keys()


def test_texts_have_no_masks(here):
    (here / "a.txt").write_text(words(1000))
    prepare.main(["a.txt", "--tokenizer=char"])
    meta = json.loads((here / "data/a/meta.json").read_text())
    assert "chat" not in meta and "trained" not in meta["train"] and not list(here.rglob("*.mask.bin"))
    write_talks("a.jsonl", talks(9))
    prepare.main(["a.jsonl", *CHAT, "--out=data/a", "--overwrite"])  # in its place
    assert len(list(here.rglob("*.mask.bin"))) == 2
    prepare.main(["a.txt", "--tokenizer=char", "--overwrite"])
    assert not list(here.rglob("*.mask.bin"))


def test_the_same_words_from_other_people_are_another_conversation(here):
    rows = [turns("a", "b\nc"), turns("a\nb", "c"), turns("a", "b", "c"), turns("a", "b\nc"), turns("x", "y")]
    write_talks("talk.jsonl", rows)
    prepare.main(["talk.jsonl", *CHAT])
    meta = json.loads((here / "data/talk-chat/meta.json").read_text())
    assert meta["report"][0].startswith("4 conversations, ") and "1 exact duplicates" in meta["report"][0]
