# SPDX-License-Identifier: GPL-3.0-only
"""Leaks: planted duplicates and leaks are found, and the fast arrays count what a plain loop counts."""
import json
import random

import numpy as np
from conftest import error, words

import dataset as datasets
from text import leaks
import prepare
from text.leaks import Characters, characters, hashed, overlap, repeated_runs, slices


END, UINT16 = 0, np.dtype(np.uint16)


def test_hashes_of_runs_are_those_of_a_plain_loop(here, monkeypatch):
    monkeypatch.setattr(leaks, "SLICE", 100)
    ids = np.random.default_rng(0).integers(0, 3, 1234).astype(np.uint16)  # three tokens: many runs of 8 are equal
    ids.tofile("ids")
    ids[:7].tofile("few")
    for k in (8, 64):
        runs = [tuple(ids[i:i + k].tolist()) for i in range(len(ids) - k + 1)]
        hashes = np.concatenate([hashed(part, k) for part in slices("ids", ids.dtype, k)]).tolist()
        assert len(hashes) == len(runs) and len(set(hashes)) == len(set(runs)) == len(set(zip(runs, hashes)))
        assert hashes == hashed(ids, k).tolist()
    swapped = [hashed(np.roll(np.arange(8, dtype=np.uint32), n), 8).item() for n in range(8)]
    assert len(set(swapped)) == 8  # the order counts
    assert not len(hashed(ids[:7], 8)) and [part.tolist() for part in slices("few", ids.dtype, 8)] == [ids[:7].tolist()]


def test_repeated_runs_are_those_of_a_plain_loop(here, monkeypatch):
    """Documents of all lengths, from none on; runs that cross from one to the next do not count, whatever the slice."""
    rng, k = np.random.default_rng(0), 8

    def split(n):
        return [rng.integers(1, 4, rng.integers(0, 60)).tolist() for _ in range(n)]

    def runs(document):
        return [tuple(document[i:i + k]) for i in range(len(document) - k + 1)]

    train, val = split(30), [*split(40), [1]]
    known = {run for document in train for run in runs(document)}
    due = [(sum(run in known for run in runs(document)), len(runs(document))) for document in val]
    assert 0 < sum(n for n, _ in due) < sum(n for _, n in due)
    for name, documents in (("train", train), ("val", val), ("few", [[1] * (k - 1)])):
        np.array([i for document in documents for i in [END, *document]], np.uint16).tofile(name)
    for size in (*range(30, 90), 1 << 18):
        monkeypatch.setattr(leaks, "SLICE", size)
        assert list(zip(*repeated_runs("train", "val", UINT16, END, k))) == due
    assert [n.tolist() for n in repeated_runs("train", "few", UINT16, END, k)] == [[0], [0]]


def test_planted_duplicates_and_leaks(here, capsys):
    """2,000 documents of random words; 60 are exact copies, 30 stand in both splits, in part or whole."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 9))) for _ in range(3000)]
    documents = [" ".join(rng.choices(vocabulary, k=rng.randrange(80, 200))) for _ in range(2000)]
    validation = [i for i, text in enumerate(documents) if prepare_side(text) == prepare.VAL]
    training = [i for i in range(2000) if i not in validation]
    leaked = {}
    for n, i in enumerate(rng.sample(validation, 30)):  # a training document takes over a part, or all, of another
        leaked[i] = documents[i][:int(len(documents[i]) * (0.2, 0.6, 1.0)[n % 3])]
        while True:  # appended to one that stays in the training split
            target = rng.choice(training)
            changed = documents[target] + "; " + leaked[i]
            if prepare_side(changed) == prepare.TRAIN:
                documents[target] = changed
                training.remove(target)
                break
    copies = rng.sample(documents, 60)
    (here / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in documents + copies))
    plan = prepare.make_plan(["a.jsonl"], prepare.PrepareConfig())
    assert plan.dropped == "60 exact duplicates" and (plan.split_of[2000:] == prepare.SKIP).all()  # the later ones: precision and recall 1

    prepare.main(["a.jsonl", "--tokenizer=char", "--num_proc=2"])
    said = capsys.readouterr().err
    assert "dropped: 60 exact duplicates" in said and "highest: a.jsonl, line " in said
    assert f"overlap: 30 of {len(validation)} validation documents repeat at least one run of 64 tokens" in said
    k, end = 64, datasets.read_meta("data/a")["special"]["<|endoftext|>"]
    repeated, total = repeated_runs("data/a/train.bin", "data/a/val.bin", UINT16, end, k)
    assert total.tolist() == [len(documents[i]) - k + 1 for i in validation]
    # Precision 1, recall 1, and how much: the runs of the passage.
    assert repeated.tolist() == [max(len(leaked.get(i, "")) - k + 1, 0) for i in validation]


def prepare_side(text):
    import hashlib
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return prepare.VAL if number / 2**64 < 0.05 else prepare.TRAIN


def test_where_there_is_too_much_an_even_sample_is_looked_up(here, monkeypatch):
    monkeypatch.setattr(leaks, "SAMPLE", 1000)
    val = np.random.default_rng(0).integers(1, 100, (50, 1000), dtype=np.uint16)
    val[:, 0] = END
    val[:25].tofile("train.bin")
    val.tofile("val.bin")
    repeated, total = repeated_runs("train.bin", "val.bin", UINT16, END, 16, 51)
    assert 850 < total.sum() < 1150 and total.min() > 0
    assert (repeated == np.where(np.arange(50) < 25, total, 0)).all()
    counts = dict(train=dict(tokens=25_000, bytes=125_000), val=dict(tokens=50_000))
    lines = overlap(".", UINT16, counts, END, [f"document {i}" for i in range(50)])
    assert f"16 tokens from the training split ({repeated.sum() / total.sum():.2%} of all" in lines[0]
    assert "1 in 51 was checked)" in lines[0]
    assert lines[1].startswith("highest: document 0 (100.0%), document 1 (")


def test_characters():
    seen = Characters()
    for text in ("abc\u00e9 \u4e2d\u6587\0\x1b\u202e\ufffd\n\t\r \ue000", "d\u00e9j\u00e0\x1b".encode().decode("cp1252")):
        seen.add(text)
    seen.count()
    assert characters(seen.counts) == [
        "23 characters, 20 different; not ASCII: \u00c3 2, \u00a9 1, \u00e9 1, \u4e2d 1, \u6587 1",
        "control and other odd characters: U+001B 2, U+0000 1, U+00A0 1, U+202E 1, U+E000 1, U+FFFD 1"]
    french = Characters()
    french.add("\u00c9t\u00e9 \u00e0 l\u2019h\u00f4tel \u00ab fa\u00e7ade \u00bb \u2014 na\u00efve \u00c0 \u00c2ge")
    french.count()
    assert "odd" not in "".join(characters(french.counts))


def test_the_report_is_printed_and_kept(here, capsys):
    (here / "a.txt").write_text(words(3000) + "\0 caf\u00c3\u00a9\n" + words(3000), encoding="utf-8")
    prepare.main(["a.txt", "--tokenizer=char"])
    said = capsys.readouterr().err
    for line in ("1 document, 6,010 bytes; dropped: nothing", "median size 6,010 bytes, longest 6,010",
                 "not ASCII: \u00a9 1, \u00c3 1", "odd characters: U+0000 1", "overlap: 1 of 1 validation documents",
                 "bytes per token"):
        assert line in said, line
    meta = json.loads((here / "data/a/meta.json").read_text())
    assert all(line in said for line in meta["report"])


def test_min_words(here, capsys):
    rows = ["one two three", "one two", "\u4e2d\u6587\u5b57", "...", words(300)]
    (here / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    prepare.main(["a.jsonl", "--tokenizer=char", "--min_words=3"])
    assert "3 documents" in (said := capsys.readouterr().err) and "dropped: 2 with too few words" in said
    fact, fix = error(prepare.main, "a.jsonl", "--tokenizer=char", "--min_words=1000")
    assert "5 with too few words" in fact and "--min_words" in fix
