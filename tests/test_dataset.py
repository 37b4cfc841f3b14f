# SPDX-License-Identifier: GPL-3.0-only
"""The reader: every token once, the same batch for the same step, and damage that is named."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import error, talks, words, write_talks

import dataset as datasets
import prepare
from runtime.processes import Processes


@pytest.fixture
def data(here):
    (here / "a.txt").write_text(words(5000))
    prepare.main(["a.txt", "--tokenizer=char"])
    return datasets.Dataset.open("data/a")


def test_the_order_of_an_epoch_is_one_permutation_for_its_seed_and_number():
    """Another NumPy that gives another order would break every run that is resumed: these are written down."""
    assert datasets.shuffled(8, 1337, 0).tolist() == [5, 3, 2, 6, 4, 7, 0, 1]
    for n in (1, 2, 17, 1000):
        orders = [datasets.shuffled(n, seed, epoch).tolist() for seed in (0, 2**62) for epoch in range(3)]
        assert all(sorted(order) == list(range(n)) for order in orders)
        assert n < 17 or len(set(map(tuple, orders))) == 6
        assert datasets.shuffled(n, 0, 0).tolist() == orders[0]  # after others, as before them


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
    total, count = sums(data, 16, 3, lambda idx, targets: math.log(V))
    loss = total / count
    assert loss == pytest.approx(math.log(V)) and count == n - 1
    assert data.bits_per_byte(loss) == pytest.approx((n - 1) * math.log2(V) / data.meta["val"]["bytes"])
    assert data.n_val_batches(16, 3, at_most=2) == 2 < batches and data.n_val_batches(16, 3, at_most=99) == batches
    # Shared by three processes: all come by equally often, and their sums are the whole, to the last bit.
    parts, visits = [], []
    for rank in range(3):
        processes = SimpleNamespace(rank=rank, world=3, all_reduce_sum=lambda values: parts.append(values) or values)
        sums(data, 16, 3, lambda idx, targets: float(idx.float().mean()), processes, lambda _: visits.append(rank))
    *nats, count = map(sum, zip(*parts))
    assert (math.fsum(nats), count) == sums(data, 16, 3, lambda idx, targets: float(idx.float().mean()))
    assert parts[0] != parts[1] and visits.count(0) == visits.count(1) == visits.count(2) == math.ceil(batches / 3)


def sums(data, T, B, loss_of, processes=Processes(), before_each=lambda _: None):
    """Those of the whole validation split."""
    return datasets.validation_sums(loss_of, lambda number: data.val_batch(number, T, B), data.n_val_batches(T, B),
                                    processes, before_each)


def test_damaged_data(here, monkeypatch):
    (here / "a.txt").write_text(words(3000))
    prepare.main(["a.txt", "--tokenizer=char"])
    data = datasets.Dataset.open("data/a")
    fact, fix = error(lambda _: data.check(400))
    tokens = data.meta["val"]["tokens"]
    assert f"val.bin has {tokens} tokens, but block_size=400 needs at least 401" in fact
    assert fix.startswith("--block_size=") and int(fix.split("=")[1].split(",")[0]) < tokens
    path = here / "data/a/train.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    assert f"{len(raw) - 1:,} bytes" in error(lambda _: datasets.Dataset.open("data/a"))[0]
    ids = np.frombuffer(raw, np.uint16).copy()
    ids[:] = 999
    path.write_bytes(ids.tobytes())
    assert "train.bin has the checksum" in error(lambda _: datasets.Dataset.open("data/a"))[0]
    monkeypatch.setattr(datasets, "HASHED_BYTES", 0)  # as for a file that is too large to be hashed every time
    assert "has token 999 in a vocabulary of 25" in error(lambda _: datasets.Dataset.open("data/a").batch(8, 2, 0, 0))[0]
    assert "prepare.py" in error(lambda _: datasets.Dataset.open("data/none"))[1]
    (here / "data/a/meta.json").write_text("{")
    assert "meta.json: not JSON" in error(lambda _: datasets.Dataset.open("data/a"))[0]


def test_windows_of_conversations_that_fill_the_split_exactly():
    """20 tokens in 2 windows of 10: no token is left over, by which a text would be shifted."""
    found = {("train", 10): np.array([[1, 10, 3], [11, 20, 3]])}
    data = datasets.Dataset("data/x", dict(chat=True, train=dict(tokens=20)), {}, [], found)
    assert sorted(data.spans(10, 2, seed=0, step=0).tolist()) == [[1, 10], [11, 20]]


@pytest.mark.parametrize("change", [
    dict(format=2), dict(dtype="float16"), dict(dtype=3), dict(vocab_size="97"), dict(train=[]), dict(source=3),
    dict(val=dict(tokens=5, bytes=0, sha256="")), dict(tokenizer_sha256=None), dict(chat=True), []])
def test_a_meta_json_that_was_edited_is_refused(here, change):
    (here / "a.txt").write_text(words(1000))
    prepare.main(["a.txt", "--tokenizer=char"])
    path = here / "data/a/meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change if change else change))
    assert "data/a/meta.json" in error(lambda _: datasets.Dataset.open("data/a"))[0]


# ---------------------------------------------------------------------------------------------------------------------
# --inspect

@pytest.fixture
def prepared(here):
    rows = [f"row {i}: {words(60, seed=i)}" for i in range(30)]
    (here / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    prepare.main(["a.jsonl", "--vocab_size=330"])
    return here / "data/a"


def test_inspect_shows_counts_the_report_and_a_border(prepared, capsys):
    capsys.readouterr()
    prepare.main(["--inspect", "data/a"])
    out = capsys.readouterr()
    meta = json.loads((prepared / "meta.json").read_text())
    assert out.out.count("--- <|endoftext|> ---") >= 1 and "row " in out.out
    assert all(line in out.err for line in meta["report"]) and "uint16, all checksums match" in out.err
    assert f"train.bin: {meta['train']['tokens']:,} tokens of 30 documents" in out.err


@pytest.mark.parametrize("damage, named", [
    ("bit", "has the checksum"), ("short", "bytes, but meta.json says"), ("id", "has the checksum"),
    ("tokenizer", "is not the expected tokenizer"), ("gone", "has 0 bytes"), ("meta", "meta.json: not JSON"),
    ("model", "is not the expected tokenizer")])
@pytest.mark.parametrize("large", [False, True])
def test_inspect_finds_every_damage(prepared, monkeypatch, damage, named, large):
    if large:  # too large to be hashed whenever it is opened
        monkeypatch.setattr(datasets, "HASHED_BYTES", 0)
    path = prepared / "train.bin"
    raw = bytearray(path.read_bytes())
    if damage in ("bit", "id"):
        raw[1000:1002] = (60_000).to_bytes(2, "little") if damage == "id" else bytes([raw[1000] ^ 1, raw[1001]])
        path.write_bytes(raw)
    elif damage == "short":
        path.write_bytes(raw[:-2])
    elif damage == "tokenizer":
        config = prepared / "tokenizer/config.json"
        config.write_text(config.read_text().replace("bpe", "unigram"))
    elif damage == "gone":
        path.unlink()
    elif damage == "meta":
        (prepared / "meta.json").write_text("{")
    else:
        (prepared / "tokenizer/tokenizer.model").write_bytes(b"")
    assert named in error(prepare.main, "--inspect", "data/a")[0]


def test_inspect_wants_a_folder(here):
    assert "--inspect takes one folder" in error(prepare.main, "--inspect")[0]
    assert "no prepared data in nowhere" in error(prepare.main, "--inspect", "nowhere")[0]


# ---------------------------------------------------------------------------------------------------------------------
# Conversations

@pytest.fixture
def chat(here):
    """Sixty conversations of 12 to 120 tokens."""
    write_talks("talk.jsonl", talks(60))
    prepare.main(["talk.jsonl", "--format=chat", "--tokenizer=char", "--val_fraction=0.2", "--out=data/talk"])
    return datasets.Dataset.open("data/talk")


def conversations(data, side):
    """[(where it begins, where it ends)], and the mask of the side, from the files alone."""
    ids = np.fromfile(f"{data.folder}/{side}.bin", np.uint16)
    borders = [*np.flatnonzero(ids == data.meta["special"]["<|endoftext|>"]).tolist(), len(ids)]
    return [(a + 1, b) for a, b in zip(borders, borders[1:])], np.fromfile(f"{data.folder}/{side}.mask.bin", np.uint8)


@pytest.mark.parametrize("T", [40, 64, 200, 5000])
def test_a_window_is_whole_conversations_or_a_part_of_one(chat, T):
    found, mask = conversations(chat, "train")
    first, past = zip(*found)
    spans = chat.chat_windows("train", T)
    for start, end, n in spans.tolist():
        i, j = first.index(start), np.searchsorted(past, end, side="right")
        assert end == past[j - 1] or (end - start == T + 1 and j == i)  # whole ones, or the beginning of a long one
        assert j == len(past) or past[j] - start > T + 1  # no more would have fitted
        assert n == mask[start + 1:end].sum() > 0
    assert (spans[1:, 0] >= spans[:-1, 1]).all() and len(spans) > 1 or T == 5000
    assert chat.epochs(3 * len(spans), T) == 3 and chat.n_windows(T) == len(spans)


@pytest.mark.parametrize("T", [40, 64, 5000])
def test_an_epoch_teaches_every_answer_once_and_nothing_else(chat, T):
    found, mask = conversations(chat, "train")
    ids, due = np.fromfile("data/talk/train.bin", np.uint16), np.zeros(len(mask), int)
    for start, end in found:
        due[start:min(end, start + T + 1)] = mask[start:min(end, start + T + 1)]  # a long one is cut
    n = chat.n_windows(T)
    for epoch in range(2):
        seen = np.zeros(len(mask), int)
        for step in range(epoch * n, epoch * n + n):
            (start, end), = chat.spans(T, 1, 7, step).tolist()
            (idx,), (targets,) = (rows.numpy() for rows in chat.batch(T, 1, 7, step))
            assert np.array_equal(idx[:end - start - 1], ids[start:end - 1]) and not idx[end - start - 1:].any()
            at = np.flatnonzero(targets >= 0)
            assert np.array_equal(targets[at], ids[start + 1 + at])
            seen[start + 1 + at] += 1
        assert np.array_equal(seen, due) and due.sum() > 300
    # The same of the held-out side, which is read in its order.
    found, mask = conversations(chat, "val")
    ids = np.fromfile("data/talk/val.bin", np.uint16)
    due = [ids[i] for start, end in found for i in range(start, min(end, start + T + 1)) if mask[i]]
    batches = [chat.val_batch(i, T, 3)[1] for i in range(chat.n_val_batches(T, 3))]
    assert torch.cat(batches).flatten()[torch.cat(batches).flatten() >= 0].tolist() == due
    count = sums(chat, T, 3, lambda *_: 1.0)[1]
    assert count == len(due) and (T < 5000 or count == chat.meta["val"]["trained"])


def test_windows_of_conversations_are_the_same_after_a_resume(chat):
    due = [chat.batch(64, 4, 7, step) for step in range(9)]
    again = datasets.Dataset.open("data/talk")
    again.val_batch(0, 32, 2), again.batch(200, 4, 7, 3)
    for step in (8, 5):
        assert all(torch.equal(a, b) for a, b in zip(due[step], again.batch(64, 4, 7, step)))
    parts = [again.batch(64, 1, 7, 5, micro, micros=4) for micro in range(4)]
    assert all(torch.equal(torch.cat(part), whole) for part, whole in zip(zip(*parts), due[5]))


def test_bits_per_byte_of_conversations_are_those_of_the_answers(chat):
    text = "".join(m["content"] for messages in talks(60) for m in messages if m["role"] == "assistant")
    assert sum(chat.meta[side]["trained_bytes"] for side in ("train", "val")) == len(text)
    val = chat.meta["val"]
    assert chat.bits_per_byte(math.log(2)) == pytest.approx(val["trained"] / val["trained_bytes"])


def test_a_prompt_ends_where_the_assistant_answers(chat):
    tokenizer = chat.load_tokenizer()
    start, _ = conversations(chat, "val")[0][0]
    ids = chat.prompt(64)
    assert ids == chat.read_ids("val", start, len(ids)).tolist() and ids[-1] == tokenizer.special["<|assistant|>"]
    assert len(ids) == 2 + len(tokenizer.decode(ids)) + 1


def test_a_context_that_cuts_all_answers_is_refused(chat):
    chat.check(40)
    fact, fix = error(lambda _: chat.check(8))
    assert "block_size=8 is too small: no window of data/talk/train.bin reaches an answer" in fact
    assert fix == "a larger --block_size"


@pytest.mark.parametrize("damage, named", [
    ("bit", "has the checksum"), ("move", "has the checksum"), ("short", "bytes, but meta.json says"),
    ("gone", "has 0 bytes")])
@pytest.mark.parametrize("large", [False, True])
def test_inspect_finds_a_damaged_mask(chat, here, monkeypatch, damage, named, large):
    if large:  # too large to be hashed whenever it is opened
        monkeypatch.setattr(datasets, "HASHED_BYTES", 0)
    path = here / "data/talk/train.mask.bin"
    raw = bytearray(path.read_bytes())
    if damage == "bit":
        raw[100] ^= 1
    elif damage == "move":  # another token is learned: no count tells
        a, b = raw.index(1), raw.index(0, raw.index(1))
        raw[a], raw[b + 2] = 0, 1
    elif damage == "short":
        raw.pop()
    path.write_bytes(raw)
    if damage == "gone":
        path.unlink()
    assert named in error(prepare.main, "--inspect", "data/talk")[0]


@pytest.mark.parametrize("change", [dict(trained=0), dict(trained_bytes="9"), dict(mask_sha256=None)])
def test_counts_of_a_mask_that_were_edited_are_refused(chat, here, change):
    path = here / "data/talk/meta.json"
    meta = json.loads(path.read_text())
    meta["val"] |= change
    path.write_text(json.dumps(meta))
    assert "data/talk/meta.json" in error(lambda _: datasets.Dataset.open("data/talk"))[0]
