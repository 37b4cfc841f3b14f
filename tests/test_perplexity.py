# SPDX-License-Identifier: GPL-3.0-only
"""Perplexity: the loss of a text by arithmetic of its own, in float64, and by transformers."""
import copy
import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import package, random_model, words
from evaluations import CHARACTERS, QUICK, evaluated, other

from evaluation import perplexity
from runtime.processes import Processes
from training import checkpoint as ckpt
import tokenizer as tokenizers

ONE = Processes()


@torch.no_grad()
def surprises(model, ids, T):
    """{(start, t): -ln p of token t after the tokens from start on}, in float64, for windows of T tokens."""
    model, table = copy.deepcopy(model).double(), {}
    for start in range(len(ids) - 1):
        rows = -model(ids[None, start:start + T])[0].log_softmax(-1)
        table |= {(start, start + 1 + j): rows[j, t].item() for j, t in enumerate(ids[start + 1:start + 1 + T])}
    return table


@pytest.mark.parametrize("T", [24, 7])
def test_the_sum_is_that_of_the_windows_one_by_one(T):
    model, ids = random_model(), torch.randint(100, (70,), generator=torch.Generator().manual_seed(1))
    table = surprises(model, ids, T)
    for n in (2, 3, T - 1, T, T + 1, T + 2, 2 * T - 1, 2 * T, 2 * T + 1, 2 * T + 2, 63, 70):
        for stride in sorted({1, 2, T // 2, T - 1, T}):
            windows = {t: max(0, math.ceil((t - T) / stride)) for t in range(1, n)}  # the first one in which t is
            due = math.fsum(table[window * stride, t] for t, window in windows.items())
            found = perplexity.total_loss(model, ids[:n], T, stride, 1 + n % 5, ONE)
            assert found == pytest.approx(due, rel=2e-6), (n, stride)


class Uniform:
    """A model to which 50 tokens are equally likely, and which notes behind which ones it was asked for scores."""
    config, lm_head = random_model(vocab_size=50).config, torch.nn.Linear(1, 1)

    def __init__(self):
        self.seen = []

    def trunk(self, idx):
        return idx[:, :, None]

    def logits(self, x):
        self.seen += x.flatten().tolist()
        return torch.zeros(len(x), 50)


def test_every_token_but_the_first_is_predicted_exactly_once():
    for n in (2, 3, 23, 24, 25, 26, 47, 48, 49, 50, 70):
        for stride in range(1, 25):
            model = Uniform()
            found = perplexity.total_loss(model, torch.arange(n) % 50, 24, stride, 1 + n % 4, ONE)
            assert Counter(model.seen) == Counter(t % 50 for t in range(n - 1)), (n, stride)
            assert found == pytest.approx((n - 1) * math.log(50), rel=1e-7)


def test_a_large_vocabulary_in_parts_and_batches_of_any_size():
    sizes, model, ids = [], random_model(), torch.randint(100, (500,))
    due = perplexity.total_loss(model, ids, 24, 7, 1, ONE)
    for batch_size in (2, 3, 70, 1000):
        assert perplexity.total_loss(model, ids, 24, 7, batch_size, ONE) == pytest.approx(due, rel=1e-6)
    large = SimpleNamespace(config=SimpleNamespace(vocab_size=1 << 22), lm_head=model.lm_head, trunk=model.trunk,
                            logits=lambda x: sizes.append(len(x)) or model.logits(x))
    assert perplexity.total_loss(large, ids, 24, 7, 4, ONE) == pytest.approx(due, rel=1e-6)
    assert set(sizes) <= {1, 2, 3, 4} and sum(sizes) == 499  # scores of at most 2**24 tokens at a time


@pytest.mark.parametrize("family", ["gpt2", "llama", "modern"])
def test_the_loss_is_that_of_transformers(here, family):
    transformers = package("transformers")
    other("a", family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained("a", dtype=torch.float32).eval()
    (here / "t.txt").write_text(words(250) + "\u00e9\u4e2d", encoding="utf-8")
    ids = torch.tensor([CHARACTERS.encode(words(250) + "\u00e9\u4e2d")])
    for T, stride in ((48, 48), (48, 9), (20, 7)):
        nats, done, start = 0.0, 0, 0
        while done < 251:  # the last token that is predicted is number 251
            with torch.no_grad():
                rows = theirs(ids[:, start:start + T]).logits[0].double().log_softmax(-1)
            for t in range(done + 1, min(start + T, 251) + 1):
                nats, done = nats - rows[t - 1 - start, ids[0, t]].item(), t
            start += stride
        found = evaluated("a", "--data=t.txt", f"--block_size={T}", f"--stride={stride}", *QUICK)
        row = found["models"][0]["texts"]["t.txt"]
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / 255, rel=1e-5)  # 2 and 3 bytes at the end
        assert row["perplexity"] == pytest.approx(math.exp(nats / 251), rel=1e-4)


def test_the_held_out_text_has_the_loss_that_training_logged(place):
    with open("out/words/log.jsonl", encoding="utf-8") as file:
        best = min((row for row in map(json.loads, file) if "val_loss" in row), key=lambda row: row["val_loss"])
    for argv in ([], ["out/words"], ["out/words/best.pt", "--data=words"], ["--data=data/words", "--batch_size=1"]):
        found = evaluated(*argv, *QUICK)
        row, counts = found["models"][0]["texts"]["data/words"], found["texts"]["data/words"]
        assert math.log(row["perplexity"]) == pytest.approx(best["val_loss"], rel=1e-4)
        assert row["bits_per_byte"] == pytest.approx(best["val_bpb"], rel=1e-4)
        assert math.log(row["word_perplexity"]) * counts["words"] == pytest.approx(best["val_loss"] * 1019, rel=1e-4)
        assert counts == dict(documents=1, bytes=1019, words=len(words(20_000)[-1019:].split()))


def test_a_text_of_one_file_by_hand(place):
    """Nothing stands before it, its first token is not predicted, and all of its bytes count."""
    (place / "t.txt").write_text("the", encoding="utf-8")
    model, tokenizer, _ = ckpt.load_run("out/words")
    t, h, e = tokenizer.encode("the")
    with torch.no_grad():
        nats = -sum(model(torch.tensor([before]))[0, -1].log_softmax(-1)[then].item()
                    for before, then in (([t], h), ([t, h], e)))
    row = evaluated("out/words", "--data=t.txt", *QUICK)["models"][0]["texts"]["t.txt"]
    assert [row[name] for name in ("tokens", "documents", "bytes", "words")] == [3, 1, 3, 1]
    assert [row[name] for name in ("bits_per_byte", "perplexity", "word_perplexity")] == pytest.approx(
        [nats / math.log(2) / 3, math.exp(nats / 2), math.exp(nats)], rel=1e-5)


def test_documents_are_set_apart(here):
    model = other("a")
    (here / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a b", "\u00e9", "\u4e2d c")))
    ids = [*CHARACTERS.encode("a b"), 0, *CHARACTERS.encode("\u00e9"), 0, *CHARACTERS.encode("\u4e2d c")]
    assert perplexity.read_text("t.jsonl").ids(CHARACTERS).tolist() == ids
    nats = sum(surprises(model, torch.tensor(ids), 48)[0, t] for t in range(1, len(ids)))
    row = evaluated("a", "--data=t.jsonl", *QUICK)["models"][0]["texts"]["t.jsonl"]
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / 10, rel=1e-5)
    assert [row[name] for name in ("tokens", "documents", "bytes", "words")] == [9, 3, 10, 5]
    for size, due in ((2, "a "), (4, "a b|"), (5, "a b|\u00e9"), (7, "a b|\u00e9|"), (8, "a b|\u00e9|\u4e2d")):
        assert perplexity.read_text("t.jsonl", size / 1e6).documents == due.split("|")  # no half of a character
    unmarked = tokenizers.CharTokenizer(CHARACTERS.characters, special=())  # nanoGPT's have no end-of-text
    assert perplexity.read_text("t.jsonl").ids(unmarked).tolist() == unmarked.encode("a b\u00e9\u4e2d c")
