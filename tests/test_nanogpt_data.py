# SPDX-License-Identifier: GPL-3.0-only
"""Data that nanoGPT's own prepare.py wrote trains as it is: with a meta.pkl, or without one in GPT-2's ids."""
import json
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, byte_encoding, error, nanogpt, random_model, words

import dataset as datasets
import evaluate
import prepare
import sample
import tokenizer as tokenizers
import train
from evaluation import perplexity
from formats import tokenizer_json
from runtime.console import UserError
from text import pretrained
from training import checkpoint as ckpt

TEXT = words(9000) + "O \u00c4\n"


def write(folder, train_ids, val_ids, characters=None):
    """What nanoGPT's data/shakespeare_char/prepare.py, or data/openwebtext/prepare.py, leaves."""
    os.makedirs(folder)
    for split, ids in (("train", train_ids), ("val", val_ids)):
        np.array(ids, dtype=np.uint16).tofile(f"{folder}/{split}.bin")
    if characters:
        meta = dict(vocab_size=len(characters), itos=dict(enumerate(characters)),
                    stoi={one: i for i, one in enumerate(characters)})
        with open(f"{folder}/meta.pkl", "wb") as file:
            pickle.dump(meta, file)
    for name in ("prepare.py", "readme.md", "input.txt"):
        with open(f"{folder}/{name}", "w", encoding="utf-8") as file:
            file.write("raise SystemExit('never run')")
    return {name: open(f"{folder}/{name}", "rb").read() for name in sorted(os.listdir(folder))}


def characters_of(folder="data/shakespeare_char"):
    characters = sorted(set(TEXT))
    ids, cut = [characters.index(one) for one in TEXT], int(len(TEXT) * 0.9)
    return write(folder, ids[:cut], ids[cut:], characters)


@pytest.mark.parametrize("dataset", ["shakespeare_char", "data/shakespeare_char"])
def test_characters_train_and_decode(here, capsys, dataset):
    before = characters_of()
    assert train.main([f"--dataset={dataset}", "--max_iters=20", "--warmup_iters=2", *TINY]) == 0
    said = capsys.readouterr().err
    assert "8,103 tokens from shakespeare_char" in said
    # Nothing is written where nanoGPT wrote.
    assert before == {name: open(f"data/shakespeare_char/{name}", "rb").read()
                      for name in sorted(os.listdir("data/shakespeare_char"))}
    # The run has its tokenizer: it speaks without the data.
    shutil.rmtree("data")
    model, tokenizer, run = ckpt.load_run("out/shakespeare_char")
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT and model.config.vocab_size == len(set(TEXT))
    assert run["val_loss"] < math.log(len(set(TEXT)))
    sample.main(["out/shakespeare_char", "--prompt=the cat", "--max_new_tokens=20", "--seed=1", "--device=cpu"])
    out = capsys.readouterr().out
    assert out.startswith("the cat") and set(out.strip()) <= set(TEXT) and len(out) >= 20


def test_bits_per_byte_and_the_text_of_the_validation_split(here):
    """The last characters have two bytes; evaluate.py finds the number of the training."""
    characters_of()
    data = datasets.Dataset.open("data/shakespeare_char")
    val = TEXT[int(len(TEXT) * 0.9):]
    assert (data.meta["val"]["tokens"], data.meta["val"]["bytes"]) == (len(val), len(val) + 1)
    assert data.bits_per_byte(1.0) == pytest.approx((len(val) - 1) / (len(val) + 1) / math.log(2))
    assert perplexity.read_text("shakespeare_char").documents == [val]
    assert data.load_tokenizer().decode(data.prompt(8)) == val[:5]
    train.main(["--dataset=shakespeare_char", "--max_iters=10", "--warmup_iters=2", *TINY])
    best = ckpt.load_checkpoint("out/shakespeare_char/best.pt")
    evaluate.main(["out/shakespeare_char", "--tasks=none", "--samples=0", "--json=found.json", "--stride=32"])
    text, = json.loads((here / "found.json").read_text())["models"][0]["texts"].values()
    assert text["bits_per_byte"] == pytest.approx(best["val_bpb"], abs=1e-5)


def test_a_run_on_it_goes_on_and_notices_other_data(here, capsys):
    characters_of()
    options = ["--dataset=shakespeare_char", "--warmup_iters=2", *TINY]
    train.main([*options, "--max_iters=10"])
    train.main([*options, "--max_iters=20"])
    assert "resumed out/shakespeare_char after 10 of 20 steps" in capsys.readouterr().err
    ids = np.fromfile("data/shakespeare_char/train.bin", np.uint16)
    np.roll(ids, 1).tofile("data/shakespeare_char/train.bin")
    assert "data" in error(train.main, *options, "--max_iters=30")[0]


def test_a_checkpoint_of_nanogpt_is_trained_further_on_its_own_data(here, capsys):
    characters = sorted(set(TEXT))
    characters_of()
    nanogpt(here, len(characters))
    shutil.move("out", "nano")
    start = ["--init_from=nano", "--dataset=shakespeare_char", "--out_dir=out/more", "--max_iters=10"]
    options = [one for one in TINY if not one.startswith(("--n_", "--block"))]
    assert train.main([*start, *options, "--warmup_iters=2"]) == 0
    assert "before:" in capsys.readouterr().err


def gpt2_ids(texts):
    """Each document and end-of-text behind it, as data/openwebtext/prepare.py does it."""
    return [i for text in texts for i in [*text.encode(), 50256]]


def gpt2_of_bytes(name):
    """A vocabulary of GPT-2's size and name, whose tokens are bytes."""
    assert name == "gpt2"
    files = byte_encoding({"<|endoftext|>": 50256}).files
    about = json.loads(files["encoding.json"]) | dict(name="gpt2")
    return pretrained.TiktokenTokenizer(files | {"encoding.json": json.dumps(about).encode()})


@pytest.fixture
def vocabulary(monkeypatch):
    monkeypatch.setattr(pretrained, "from_tiktoken", gpt2_of_bytes)


def test_without_a_meta_the_ids_are_gpt2s(here, vocabulary, monkeypatch, capsys):
    texts = [words(90 + i, seed=i) for i in range(30)]
    before = write("data/openwebtext", gpt2_ids(texts[:25]), gpt2_ids(texts[25:]))
    data = datasets.Dataset.open("data/openwebtext")
    assert data.meta["vocab_size"] == 50257 and data.meta["val"]["bytes"] == sum(map(len, texts[25:]))
    assert perplexity.read_text("openwebtext").documents == texts[25:]
    assert train.main(["--dataset=openwebtext", "--max_iters=3", "--warmup_iters=1", *TINY]) == 0
    assert before.keys() == set(os.listdir("data/openwebtext"))
    prepare.main(["--inspect", "data/openwebtext"])
    assert "<|endoftext|>" in capsys.readouterr().out
    _, tokenizer, _ = ckpt.load_run("out/openwebtext")
    assert tokenizer.decode(gpt2_ids(["the cat"])[:-1]) == "the cat"
    # The run has a copy of the vocabulary, and needs no network for it.
    monkeypatch.setattr(pretrained, "from_tiktoken", None)
    sample.main(["out/openwebtext", "--prompt=the cat", "--max_new_tokens=3", "--device=cpu"])
    assert capsys.readouterr().out.startswith("the cat")


def test_without_a_network_ids_train_and_texts_say_what_is_missing(here, monkeypatch, capsys):
    """With one again, the run goes on where it was, and speaks."""
    def no_network(name):
        raise UserError("tiktoken cannot fetch the vocabulary gpt2: no network", "TIKTOKEN_CACHE_DIR=...")
    texts = [words(90 + i, seed=i) for i in range(30)]
    write("data/openwebtext", gpt2_ids(texts[:25]), gpt2_ids(texts[25:]))
    options = ["--dataset=openwebtext", "--warmup_iters=1", *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "from_tiktoken", no_network)
        assert train.main([*options, "--max_iters=3"]) == 0
        out, said = capsys.readouterr()
        assert "warning: tiktoken cannot fetch the vocabulary gpt2: no network; the ids in data/openwebtext can be" in said
        assert "(no text: tiktoken cannot fetch" in out
        fact, fix = error(sample.main, "out/openwebtext", "--prompt=the cat", "--device=cpu")
        assert fact == "tiktoken cannot fetch the vocabulary gpt2: no network" and fix == "TIKTOKEN_CACHE_DIR=..."
    row = json.loads((here / "out/openwebtext/log.jsonl").read_text().splitlines()[-1])
    assert row["val_bpb"] is None and row["val_loss"] < 11
    monkeypatch.setattr(pretrained, "from_tiktoken", gpt2_of_bytes)
    assert train.main([*options, "--max_iters=5"]) == 0
    assert "resumed out/openwebtext after 3 of 5 steps" in capsys.readouterr().err
    sample.main(["out/openwebtext", "--prompt=the cat", "--max_new_tokens=3", "--device=cpu"])
    assert capsys.readouterr().out.startswith("the cat")


def test_what_can_be_wrong(here, vocabulary):
    write("data/other", [60000] * 99, [60000] * 99)
    fact, fix = error(train.main, "--dataset=other", *TINY)
    assert fact == "data/other has token 60000 in a vocabulary of 50257 (val.bin)"
    assert fix == "prepare data/other again, or restore all of its files"
    write("data/short", [1] * 9, [1] * 9)
    assert "data/short/train.bin has 9 tokens, but block_size=32 needs" in error(train.main, "--dataset=short", *TINY)[0]
    (here / "data/short/val.bin").write_bytes(b"")
    assert "data/short/val.bin has 0 tokens" in error(lambda _: datasets.Dataset.open("data/short").check(4))[0]

    class Code:
        def __reduce__(self):
            return os.mkdir, ("hacked",)
    for content in (pickle.dumps(Code()), b"", b"\x80\x04", pickle.dumps(dict(itos={0: "ab"})), pickle.dumps([])):
        (here / "data/short/meta.pkl").write_bytes(content)
        assert "meta.pkl cannot be used" in error(train.main, "--dataset=short", *TINY)[0]
    assert not os.path.exists("hacked")


def test_it_is_never_replaced_nor_taken_for_a_vocabulary_with_an_end(here):
    characters_of()
    (here / "shakespeare_char.txt").write_text(TEXT)
    before = sorted(os.listdir("data/shakespeare_char"))
    for extra in ([], ["--overwrite"]):
        fact, _ = error(prepare.main, "shakespeare_char.txt", "--tokenizer=char", *extra)
        assert fact == "data/shakespeare_char is not prepared data: it holds input.txt"
    fact, fix = error(prepare.main, "shakespeare_char.txt", "--tokenizer=data/shakespeare_char", "--out=data/b")
    assert "no end-of-text token" in fact and fix == "--tokenizer=char"
    assert before == sorted(os.listdir("data/shakespeare_char"))
    assert tokenizers.get("data/shakespeare_char").encode("O") == [sorted(set(TEXT)).index("O")]


def test_a_very_large_file_is_known_by_its_size_and_its_beginning(here, monkeypatch):
    monkeypatch.setattr(datasets, "HASHED_BYTES", 100)
    found = set()
    for i, content in enumerate(([1] * 90, [2] + [1] * 89, [1] * 45 + [2] + [1] * 44, [1] * 91)):
        write(f"data/{i}", content, [1] * 9)
        found.add(datasets.Dataset.open(f"data/{i}").meta["train"]["sha256"])
    assert len(found) == 4


def test_what_is_shown_of_it(here, vocabulary, capsys):
    """There are no checksums; the ids of both splits are read."""
    characters_of()
    prepare.main(["--inspect", "data/shakespeare_char"])
    out, said = capsys.readouterr()
    assert out.startswith(TEXT[:100]) and "<|endoftext|>" not in out
    assert "all ids exist" in said and "checksum" not in said
    write("data/other", [60000] * 99, [1] * 99)
    fact, _ = error(prepare.main, "--inspect", "data/other")
    assert fact == "data/other has token 60000 in a vocabulary of 50257 (train.bin)"
    fact, fix = error(prepare.main, "data/shakespeare_char", "--overwrite")
    assert fact == "data/shakespeare_char is prepared already"
    assert fix == "python train.py --dataset=data/shakespeare_char"


def test_a_model_does_not_care_who_wrote_its_batches(here):
    """The batches are the windows of the file: checked against the ids as nanoGPT's train.py would slice them."""
    characters_of()
    data = datasets.Dataset.open("data/shakespeare_char")
    ids = np.fromfile("data/shakespeare_char/train.bin", np.uint16).astype(np.int64)
    idx, targets = data.batch(32, 4, seed=1, step=0)
    for row, target in zip(idx.numpy(), targets.numpy()):
        at = [i for i in range(len(ids) - 32) if (ids[i:i + 32] == row).all() and (ids[i + 1:i + 33] == target).all()]
        assert at
    assert torch.isfinite(random_model(vocab_size=data.meta["vocab_size"], block_size=32)(idx, targets))


def test_a_run_on_gpt2s_ids_goes_on_from_ours_and_leaves_for_others(here, vocabulary, capsys):
    """Data that prepare.py encoded by gpt2 have the same ids: fine-tuning takes one for the other."""
    (here / "mine.txt").write_text(words(3000))
    write("data/openwebtext", gpt2_ids([words(900)]), gpt2_ids([words(300, seed=1)]))
    assert train.main(["--dataset=openwebtext", "--max_iters=2", "--warmup_iters=1", *TINY]) == 0
    prepare.main(["mine.txt", "--tokenizer=gpt2"])
    assert datasets.read_meta("data/mine")["vocab_size"] == 50257
    options = [one for one in TINY if not one.startswith(("--n_", "--block"))]
    assert train.main(["--dataset=mine", "--init_from=out/openwebtext", "--out_dir=out/more", "--max_iters=2",
                       "--warmup_iters=1", *options]) == 0
    assert "before:" in capsys.readouterr().err
    _, tokenizer, _ = ckpt.load_run("out/openwebtext")
    files = tokenizer_json.tokenizer_files(tokenizer, 32)
    assert json.loads(files["tokenizer.json"])["added_tokens"][0]["id"] == 50256
