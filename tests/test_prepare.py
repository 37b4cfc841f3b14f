# SPDX-License-Identifier: GPL-3.0-only
"""Data: what is written, how it is split, how it is read back, and what people get wrong."""
import gzip
import json
import math

import numpy as np
import pytest
import torch
from conftest import error, words

import prepare
import tokenizer as tokenizers


def read(folder, side):
    """The text of one side, document by document, from the files alone."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    tokenizer = tokenizers.load(folder / "tokenizer")
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
    data = prepare.Data.open("data/tiny")
    said = capsys.readouterr().err
    assert "next: python train.py config/train_small.py --dataset=tiny --out_dir=out/tiny --block_size=" in said
    data.check(int(said.split("--block_size=")[1].split()[0]))
    assert data.meta["vocab_size"] < 500 and "--max_iters=50 " in said


def test_stdlib():
    documents = list(prepare.documents(["stdlib"]))
    held = [d for d in documents if d.held_out]
    assert 300 < len(documents) < 700 and 18 < len(held) < 30
    size = sum(len(b.encode()) for d in documents for b in d.blocks())
    assert 5e6 < size < 12e6
    assert 0.03 < sum(len(b.encode()) for d in held for b in d.blocks()) / size < 0.09
    names = {d.name for d in documents}
    assert "textwrap.py" in names and not any("test" in n.split("/") or n.startswith("idlelib") for n in names)


def test_preparing_again_replaces_and_an_interruption_leaves_the_old_data(here, monkeypatch):
    (here / "a.txt").write_text(words(1000))
    prepare.main(["a.txt", "--tokenizer=char"])
    before = (here / "data/a/train.bin").read_bytes()
    (here / "a.txt").write_text(words(3000))
    with monkeypatch.context() as patch:
        patch.setattr(prepare.BinWriter, "close", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.main(["a.txt", "--tokenizer=char"])
    assert (here / "data/a/train.bin").read_bytes() == before
    prepare.main(["a.txt", "--tokenizer=char"])
    assert len((here / "data/a/train.bin").read_bytes()) > len(before)
    assert not (here / "data/a.part").exists()


def test_a_tokenizer_can_be_taken_from_other_data(here):
    (here / "a.txt").write_text(words(3000))
    (here / "b.txt").write_text(words(1000, seed=1))
    prepare.main(["a.txt", "--vocab_size=300"])
    prepare.main(["b.txt", "--tokenizer=data/a"])
    a, b = (json.loads((here / f"data/{n}/meta.json").read_text()) for n in "ab")
    assert a["tokenizer_sha256"] == b["tokenizer_sha256"]
    assert "c" in error(prepare.main, "b.txt", f"--tokenizer={here}")[0]


def test_large_files_are_read_in_blocks(here, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 100)
    text = words(5000) + "\u4e2d\u6587\U0001f600" * 500 + "x" * 1000  # characters cut by a block, lines longer than one
    (here / "a.txt").write_text(text, encoding="utf-8", newline="")
    assert "".join(prepare.text_blocks("a.txt")) == text
    (here / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "b"}))
    assert ["".join(d.blocks()) for d in prepare.documents(["a.jsonl"])] == [text, "b"]
    prepare.main(["a.txt", "--tokenizer=char"])
    assert "".join(read(here / "data/a", "train") + read(here / "data/a", "val")) == text


# ---------------------------------------------------------------------------------------------------------------------


def test_what_people_get_wrong(here):
    (here / "empty.txt").write_text("")
    assert "has no text (1 empty" in error(prepare.main, "empty.txt")[0]
    (here / "latin.txt").write_bytes(b"caf\xe9 " * 5)
    fact, fix = error(prepare.main, "latin.txt")
    assert "0xe9 at offset 3" in fact and "iconv" in fix
    (here / "late.txt").write_bytes(b"x" * 3_000_000 + b"\xff")
    assert "0xff at offset 3000000" in error(prepare.main, "late.txt")[0]
    (here / "cut.txt").write_bytes("caf\u00e9".encode()[:-1])
    assert "0xc3 at offset 3" in error(prepare.main, "cut.txt")[0]
    (here / "image.txt").write_bytes(b"\x89PNG" + bytes(96))
    assert "96 of its first 100 bytes are NUL" in error(prepare.main, "image.txt")[0]
    (here / "notes.docx").write_bytes(b"PK")
    assert ".txt" in error(prepare.main, "notes.docx")[0]
    assert "nowhere.txt does not exist" in error(prepare.main, "nowhere.txt")[0]
    (here / "folder").mkdir()
    assert "folder holds no .txt" in error(prepare.main, "folder")[0]
    (here / "broken.txt.gz").write_bytes(b"not gzip at all")
    assert "cannot read broken.txt.gz" in error(prepare.main, "broken.txt.gz")[0]
    zipped = bytearray(gzip.compress(words(9000).encode()))
    for name, raw in (("cut", zipped[:-99]), ("bad", zipped[:99] + b"\0\xff" * 9 + zipped[117:])):
        (here / f"{name}.txt.gz").write_bytes(raw)
        assert f"cannot read {name}.txt.gz" in error(prepare.main, f"{name}.txt.gz")[0]
    assert "no text was named" in error(prepare.main)[0]
    (here / "good.txt").write_text(words(1000))
    assert "val_fraction=1.5" in error(prepare.main, "good.txt", "--val_fraction=1.5")[0]
    assert "holds something other than prepared data" in error(prepare.main, "good.txt", "--out=.")[0]
    assert "a file of this name" in error(prepare.main, "good.txt", "--out=good.txt")[0]
    assert "'gpt5'" in error(prepare.main, "good.txt", "--tokenizer=gpt5")[0]
    (here / "a.txt").write_text("a")
    assert "1 bytes of text are too few" in error(prepare.main, "a.txt", "--tokenizer=char")[0]
    (here / "b.txt").write_text(words(500))
    prepare.main(["b.txt", "--tokenizer=char", "--out=other"])
    (here / "c.txt").write_text("123" * 50)
    assert "'1' (U+0031) is not among the" in error(prepare.main, "c.txt", "--tokenizer=other")[0]
    assert not list(here.glob("data/*"))  # an error leaves nothing behind


@pytest.mark.parametrize("line, reason", [
    ('{"text": "a"', "not JSON: "), ("[1]", "no field `text`, but list"),
    ('{"texts": "a"}', "no field `text`, but texts"), ('{"text": 3}', "not a text but int"),
    ('{"text": null}', "NoneType"), ('{"text": "\\ud800"}', "half a character, \\ud800"),
    ('"text"', "but str")])
def test_a_bad_line_is_named(here, line, reason):
    (here / "a.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    fact, fix = error(prepare.main, "a.jsonl")
    assert "a.jsonl, line 3: " in fact and reason in fact and '{"text": "..."}' in fix


def test_damaged_data(here, monkeypatch):
    (here / "a.txt").write_text(words(3000))
    prepare.main(["a.txt", "--tokenizer=char"])
    data = prepare.Data.open("data/a")
    fact, fix = error(lambda _: data.check(400))
    tokens = data.meta["val"]["tokens"]
    assert f"val.bin has {tokens} tokens, but block_size=400 needs at least 401" in fact
    assert fix.startswith("--block_size=") and int(fix.split("=")[1].split(",")[0]) < tokens
    path = here / "data/a/train.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    assert f"{len(raw) - 1:,} bytes" in error(lambda _: prepare.Data.open("data/a"))[0]
    ids = np.frombuffer(raw, np.uint16).copy()
    ids[:] = 999
    path.write_bytes(ids.tobytes())
    assert "train.bin has the checksum" in error(lambda _: prepare.Data.open("data/a"))[0]
    monkeypatch.setattr(prepare, "HASHED_BYTES", 0)  # as for a file that is too large to be hashed every time
    assert "has the token 999" in error(lambda _: prepare.Data.open("data/a").batch(8, 2, 0, 0))[0]
    assert "prepare.py" in error(lambda _: prepare.Data.open("data/none"))[1]
    (here / "data/a/meta.json").write_text("{")
    assert "meta.json cannot be read" in error(lambda _: prepare.Data.open("data/a"))[0]


def test_nothing_that_is_not_ours_is_deleted(here):
    (here / "a.txt").write_text(words(1000))
    for precious in ("data/a.part/mine", "data/a.old/mine", "data/a/tokenizer/mine.py"):
        (here / precious).parent.mkdir(parents=True, exist_ok=True)
        (here / precious).write_text("precious")
        assert "something other than prepared data: mine" in error(prepare.main, "a.txt", "--tokenizer=char")[0]
        assert (here / precious).read_text() == "precious"
        (here / precious).unlink()
    prepare.main(["a.txt", "--tokenizer=char"])


@pytest.mark.parametrize("change", [
    dict(format=2), dict(dtype="float16"), dict(dtype=3), dict(vocab_size="97"), dict(train=[]), dict(source=3),
    dict(val=dict(tokens=5, bytes=0, sha256="")), dict(tokenizer_sha256=None)])
def test_a_meta_json_that_was_edited_is_refused(here, change):
    (here / "a.txt").write_text(words(1000))
    prepare.main(["a.txt", "--tokenizer=char"])
    path = here / "data/a/meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "data/a/meta.json cannot be read" in error(lambda _: prepare.Data.open("data/a"))[0]


def test_texts_that_hold_nothing_to_learn_a_vocabulary_from(here):
    (here / "blank.txt").write_text("\n" * 5000)
    assert "characters of text" in error(prepare.main, "blank.txt", "--vocab_size=300")[0]
    (here / "a.txt").write_text(words(1000))
    assert "vocab_size=1000000000000000019884624838656" in error(prepare.main, "a.txt", "--vocab_size=1e30")[0]
    (here / "deep.jsonl").write_text('{"text": ' + "[" * 200_000 + "\n")
    assert "deep.jsonl, line 1: not to be read" in error(prepare.main, "deep.jsonl")[0]


def test_ids_that_do_not_fit_are_never_written(here):
    writer = prepare.BinWriter("x.bin", np.dtype("<u2"), 1 << 16)
    with pytest.raises(ValueError, match="70000"):
        writer.write([70000], True, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The reader


@pytest.fixture
def data(here):
    (here / "a.txt").write_text(words(5000))
    prepare.main(["a.txt", "--tokenizer=char"])
    return prepare.Data.open("data/a")


def test_shuffled_is_a_permutation_that_looks_random():
    for n in (1, 2, 3, 4, 5, 17, 100, 1000, 4097):
        for key in range(3):
            assert sorted(prepare.shuffled(np.arange(n), n, key).tolist()) == list(range(n))
    first = [prepare.shuffled(np.arange(8), 1000, key) for key in range(2000)]
    counts = np.bincount(np.concatenate(first) // 50, minlength=20)  # 16,000 numbers in 20 bins of 800
    assert ((counts - 800) ** 2 / 800).sum() < 60  # chi-square, 19 degrees of freedom: 43.8 in 1 of 1,000
    jumps = np.array([row[1:] - row[:-1] for row in first])
    line = np.concatenate(first)
    assert abs(np.corrcoef(line[:-1], line[1:])[0, 1]) < 0.03 and (abs(jumps) > 100).mean() > 0.75
    big = prepare.shuffled(np.arange(1000), 10**12, 7)  # no list of a billion numbers anywhere
    assert len(set(big.tolist())) == 1000 and 0 <= big.min() and big.max() < 10**12 and big.max() > 9 * 10**11


def test_an_epoch_visits_every_window_once(data):
    tokens, T, B = data.meta["train"]["tokens"], 16, 3
    data.meta["vocab_size"] = 1 << 16
    np.arange(tokens, dtype=np.uint16).tofile("data/a/train.bin")  # the token at position i is i
    n = tokens // T - 1
    rows = [row for step in range(-(-2 * n // B)) for row in zip(*data.batch(T, B, 7, step))]
    firsts = []
    for idx, targets in rows:
        assert torch.equal(targets, idx + 1) and torch.equal(idx, torch.arange(idx[0], idx[0] + T))
        firsts.append(idx[0].item())
    for epoch in (firsts[:n], firsts[n:2 * n]):
        assert sorted(epoch) == list(range(min(epoch), min(epoch) + n * T, T)) and epoch != sorted(epoch)
    assert firsts[:n] != firsts[n:2 * n]


def test_a_batch_depends_on_seed_and_step_alone(data):
    a = data.batch(16, 4, 7, 5)
    data.batch(16, 4, 7, 9)
    assert all(torch.equal(x, y) for x, y in zip(a, data.batch(16, 4, 7, 5)))
    assert not torch.equal(a[0], data.batch(16, 4, 8, 5)[0]) and not torch.equal(a[0], data.batch(16, 4, 7, 6)[0])
    parts = [data.batch(16, 2, 7, 5, micro, micros=2)[0] for micro in range(2)]  # the same step in two micro-batches
    assert torch.equal(torch.cat(parts), a[0])


def test_smallest_possible_data(data):
    tokens = data.meta["train"]["tokens"]
    idx, targets = data.batch(tokens - 1, 2, 0, 0)  # one window and nothing to spare
    assert idx.shape == (2, tokens - 1) and torch.equal(idx[0], idx[1])


def test_validation_sees_every_token_once(data):
    n = data.meta["val"]["tokens"]
    for T, B in ((16, 3), (7, 2), (n - 1, 1)):
        batches = [data.val_batch(i, T, B) for i in range(data.n_val_batches(T, B))]
        assert all(idx.shape == targets.shape == (B, T) for idx, targets in batches)
        whole = np.fromfile("data/a/val.bin", np.uint16)
        seen = torch.cat([targets.flatten() for _, targets in batches])
        assert torch.equal(seen[seen >= 0], torch.from_numpy(whole[1:].astype(np.int64)))
    # A model that gives every token of a uniform guess costs log2(V) bits each, whatever the batches are.
    V = data.meta["vocab_size"]
    batches = data.n_val_batches(16, 3)
    total, count = prepare.validation_sums(lambda idx, targets: math.log(V), data, 16, 3, batches)
    loss = total / count
    assert loss == pytest.approx(math.log(V)) and count == n - 1
    assert data.bits_per_byte(loss) == pytest.approx((n - 1) * math.log2(V) / data.meta["val"]["bytes"])
    assert data.n_val_batches(16, 3, at_most=2) == 2 < batches and data.n_val_batches(16, 3, at_most=99) == batches
    # Shared by three processes: all come by equally often, and their sums are the whole.
    parts, visits = [], []
    for rank in range(3):
        parts.append(prepare.validation_sums(lambda idx, targets: float(idx.float().mean()), data, 16, 3, batches,
                                             lambda: visits.append(rank), rank, 3))
    alone = prepare.validation_sums(lambda idx, targets: float(idx.float().mean()), data, 16, 3, batches)
    assert [sum(column) for column in zip(*parts)] == pytest.approx(alone) and parts[0] != parts[1]
    assert visits.count(0) == visits.count(1) == visits.count(2) == math.ceil(batches / 3)
