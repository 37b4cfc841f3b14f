# SPDX-License-Identifier: GPL-3.0-only
"""Forensics: planted duplicates and leaks are found, and the fast arrays count what a plain loop counts."""
import json
import random
import re

import numpy as np
import pytest
from conftest import error, words

import forensics
import prepare
from forensics import BORDER, GRAM, Census, Leaks, Words


def plain_words(text):
    """The same words, the obvious way: letters and digits in a row; Chinese characters one by one."""
    return [w.lower() for w in re.findall("[\u4e00-\u9fff]|(?:(?![\u4e00-\u9fff])[^\\W_])+", text)]


def learned(*texts):
    census, table = Census(), Words()
    for text in texts:
        table.learn(census.add(text))
    return census, table


MIXED = "Don't stop; the CAT, 42 caf\u00e9s!  \u4e2d\u6587abc\u5b57 _x_ \U0001f600\n" * 40 + words(3000)


@pytest.mark.parametrize("slice_", [1 << 16, 64])
def test_words_and_grams_are_those_of_a_plain_loop(monkeypatch, slice_):
    monkeypatch.setattr(forensics, "SLICE", slice_)
    _, table = learned(MIXED, "one two three", MIXED.upper())
    due = plain_words(MIXED)
    assert table.count(MIXED) == len(due)
    grams, plain = table.grams(MIXED), [tuple(due[i:i + GRAM]) for i in range(len(due) - GRAM + 1)]
    assert len(grams) == len(plain) and len(np.unique(grams)) == len(set(plain))
    numbers = dict(zip(plain, grams.tolist()))
    assert all(numbers[gram] == number for gram, number in zip(plain, grams.tolist()))  # same words, same number
    assert len(table.grams("one two " * 6)) == 0 and len(table.grams("one two " * 6 + "three")) == 1
    assert (table.grams(words(500).upper()) == table.grams(words(500).replace(" ", ",  "))).all()


def test_no_gram_crosses_from_one_document_to_the_next():
    a, b = "a b c d e f g h i j k l m n", "o p q r s t u v w x y z a b"
    _, table = learned(a, b)
    apart = set(table.grams(a).tolist()) | set(table.grams(b).tolist())
    joined = set(table.grams(a + BORDER + b).tolist())
    assert apart < joined and len(joined - apart) == GRAM  # those with the border in them
    assert not set(table.grams(a + " " + b).tolist()) & (joined - apart)


def test_planted_duplicates_and_leaks(here, capsys):
    """2,000 documents of random words; 60 are exact copies, 30 held-out ones share a passage with the training side."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 9))) for _ in range(3000)]

    def passage(n):
        return rng.choices(vocabulary, k=n)

    documents = [passage(rng.randrange(80, 200)) for _ in range(2000)]
    text = lambda document: " ".join(document)
    held_out = {i for i, d in enumerate(documents) if prepare_side(text(d)) == prepare.VAL}
    training = [i for i in range(2000) if i not in held_out]
    leaked, planted = {}, rng.sample(sorted(held_out), 30)
    for n, i in enumerate(planted):  # a training document takes over a part, or all, of a held-out one
        share = (0.2, 0.6, 1.0)[n % 3]
        part = documents[i][:int(len(documents[i]) * share)]
        while True:  # appended, in other case and with other signs, to one that stays on the training side
            target = rng.choice(training)
            changed = documents[target] + [w.upper() + "," for w in part]
            if prepare_side(text(changed)) == prepare.TRAIN:
                documents[target], leaked[i] = changed, share
                training.remove(target)
                break
    rows = [text(d) for d in documents]
    copies = rng.sample(rows, 60)
    (here / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows + copies))
    prepare.main(["a.jsonl", "--tokenizer=char"])
    assert "dropped: 60 exact duplicates" in capsys.readouterr().err

    settings = prepare.PrepareConfig(tokenizer="char")
    plan = prepare.make_plan(["a.jsonl"], settings)
    assert plan.duplicates == 60 and (plan.fate[2000:] == prepare.SKIP).all()  # the later ones: precision and recall 1
    tokenizer, leaks = prepare.learn_tokenizer(["a.jsonl"], plan, settings)
    texts = prepare.split_texts(["a.jsonl"], plan, settings)
    prepare.encode(texts, plan, tokenizer, leaks, np.dtype("<u2"), ".", prepare.PrepareConfig(num_proc=2))
    found = {int(name.rsplit(" ", 1)[1]) - 1: share for share, name, _ in leaks.shares() if share > 0}
    assert set(found) == set(leaked)  # precision 1, recall 1
    for i, share in leaked.items():  # and how much: grams of a passage, of all grams of its document
        n = len(documents[i])
        assert found[i] == pytest.approx((int(n * share) - GRAM + 1) / (n - GRAM + 1), abs=0.01)
    assert f"leaks: 30 of {len(held_out)} held-out documents share 13 words" in " ".join(leaks.report()[0])


def prepare_side(text):
    import hashlib
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return prepare.VAL if number / 2**64 < 0.05 else prepare.TRAIN


def test_where_there_is_too_much_an_even_sample_is_looked_for(monkeypatch):
    monkeypatch.setattr(forensics, "KEPT", 1000)
    rng, leaks = np.random.default_rng(0), Leaks()
    grams = rng.integers(0, 1 << 64, 50_000, dtype=np.uint64)
    for i in range(50):
        leaks.hold(f"document {i}", grams[i * 1000:(i + 1) * 1000])
    leaks.freeze()
    assert 400 < len(leaks.keys) <= 1000 and leaks.limit <= 1 << 58
    leaks.look(grams[:25_000])
    lines, whole = leaks.report()
    assert whole == pytest.approx(0.5, abs=0.08) and "(looked for 1 in " in lines[0]
    shares = dict((name, share) for share, name, _ in leaks.shares())
    assert all(share == (int(name.split()[1]) < 25) for name, share in shares.items())


def test_a_long_document_is_one_document():
    leaks = Leaks()
    for part in (1, 2):
        leaks.hold("long", np.arange(part * 100, part * 100 + 50, dtype=np.uint64))
    leaks.hold("short", np.zeros(0, np.uint64))
    leaks.freeze()
    leaks.look(np.arange(100, 150, dtype=np.uint64))
    assert leaks.shares() == [(0.5, "long", 100)] and leaks.report()[1] == 0.5


def test_census():
    census, _ = learned("abc\u00e9 \u4e2d\u6587\0\x1b\u202e\ufffd\n\t\r \ue000",
                        "d\u00e9j\u00e0".encode().decode("cp1252"))
    for size in (0, 1, 700, 800, 5000):
        census.add_length(size)
    report = "\n".join(census.report())
    assert "documents by bytes: 1: 2, 512: 2, 4k: 1" in report
    assert "letters: Latin 80.00%, Cjk 20.00%" in report, report
    assert "odd characters: 5 (U+0000 1, U+001B 1, U+202E 1, U+E000 1, U+FFFD 1)" in report
    assert "mojibake: 2 places" in report and "'\u00c3\u00a9' for '\u00e9'" in report
    french = "\u00c9t\u00e9 \u00e0 l\u2019h\u00f4tel \u00ab fa\u00e7ade \u00bb \u2014 na\u00efve \u00c0 \u00c2ge"
    clean, _ = learned(french)
    assert clean.mojibake == 0 and "odd" not in "".join(clean.report())


def test_the_report_is_printed_and_kept(here, capsys):
    (here / "a.txt").write_text(words(3000) + "\0 caf\u00c3\u00a9\n" + words(3000), encoding="utf-8")
    prepare.main(["a.txt", "--tokenizer=char"])
    said = capsys.readouterr().err
    for line in ("1 documents, 6,010 bytes; dropped: nothing", "documents by bytes: 4k: 1",
                 "odd characters: 1 (U+0000 1)", "mojibake: 1 places", "leaks: 1 of 1 held-out documents",
                 "bytes per token"):
        assert line in said, line
    meta = json.loads((here / "data/a/meta.json").read_text())
    assert all(line in said for line in meta["report"]) and 0 < meta["leaked"] <= 1


def test_min_words(here, capsys):
    rows = ["one two three", "one two", "\u4e2d\u6587\u5b57", "...", words(300)]
    (here / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    prepare.main(["a.jsonl", "--tokenizer=char", "--min_words=3"])
    assert "3 documents" in (said := capsys.readouterr().err) and "dropped: 2 with too few words" in said
    fact, fix = error(prepare.main, "a.jsonl", "--tokenizer=char", "--min_words=1000")
    assert "5 with fewer than 1000 words" in fact and "--min_words" in fix
