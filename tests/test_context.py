# SPDX-License-Identifier: GPL-3.0-only
"""The context: --block_size cuts it in every script, and only the tokens that are there cost something."""
import json

import pytest
import torch
from conftest import error, random_model, words

import evaluate
import export
import sample
import serve
import tokenizer as tokenizers
from evaluation import perplexity
from formats import huggingface
from model import GPT, KVCache
from runtime import machine
from training import checkpoint as ckpt

CHARACTERS = tokenizers.CharTokenizer("\n" + "".join(map(chr, range(32, 127))))  # 101 tokens
SHAPES = {"gpt2": dict(bias=True), "llama": dict(pos="rope", norm="rmsnorm", mlp="swiglu", n_kv_head=2)}


def folder_of(path, family="llama", block_size=64):
    model = random_model(vocab_size=101, block_size=block_size, **SHAPES[family])
    huggingface.write(str(path), model, CHARACTERS)
    return model


@pytest.mark.parametrize("family", SHAPES)
def test_the_same_logits_in_a_shorter_context(here, family):
    model = folder_of("a", family)
    cut, _, _ = ckpt.load_run("a", block_size=16)
    assert cut.config.block_size == 16 and ckpt.load_run("a", block_size=1000)[0].config.block_size == 64
    idx = torch.randint(101, (2, 16))
    assert torch.equal(cut(idx), model(idx))
    with pytest.raises(AssertionError, match="17 tokens do not fit into block_size=16"):
        cut(torch.randint(101, (1, 17)))
    sizes = [tensor.size(0) for tensor in (*cut.buffers(), *cut.parameters())]
    assert 64 not in sizes or family == "llama"  # its positions are cut, too
    if family == "llama":
        assert cut.rope_cos.size(0) == 16


@pytest.mark.parametrize("family", SHAPES)
def test_every_script_cuts_it(here, capsys, family):
    folder_of("a", family)
    # sample.py: a prompt of 40 tokens is cut to the last 16.
    sample.main(["a", "--prompt=" + "x" * 40, "--block_size=16", "--max_new_tokens=3", "--temperature=0"])
    assert "the prompt has 40 tokens, the context 16: the first 24 are ignored" in capsys.readouterr().err
    # serve.py
    settings = serve.ServeConfig(device="cpu", block_size=16)
    served = serve.Served(settings, *sample.load_model(settings, ["a"]))
    assert served.context == served.info["context"] == served.engine.memory.k.size(3) == 16
    # evaluate.py: the number of a text that is read in windows of 16
    (here / "text.txt").write_text(words(100))
    evaluate.main(["a", "--data=text.txt", "--block_size=16", "--tasks=none", "--samples=0", "--json=out.json",
                   "--device=cpu"])
    found = json.loads((here / "out.json").read_text())["models"][0]["texts"]["text.txt"]
    text = perplexity.read_text("text.txt")
    due = perplexity.measure_text(ckpt.load_run("a")[0], CHARACTERS, text, block_size=16)
    assert found["block_size"] == 16 and found["bits_per_byte"] == pytest.approx(due["bits_per_byte"], rel=1e-6)
    # export.py
    assert export.main(["a", "--format=hf", "--block_size=16", "--out=b"]) == 0
    config = json.loads((here / "b/hf/config.json").read_text())
    assert config[{"gpt2": "n_positions", "llama": "max_position_embeddings"}[family]] == 16
    assert ckpt.load_run("b/hf")[0].config.block_size == 16
    for script in (sample, serve, evaluate, export):
        assert "block_size=-1 is out of range" in error(script.main, "a", "--block_size=-1")[0]


def test_a_folder_of_262144_positions(here, capsys, monkeypatch):
    """It is read and sampled from, and served and evaluated with what fits; both say so."""
    folder_of("a", block_size=262_144)
    monkeypatch.setattr(machine, "free_memory", lambda device: 32e6)
    sizes = []
    monkeypatch.setattr(KVCache, "__init__", spy(KVCache.__init__, sizes))
    sample.main(["a", "--prompt=the cat", "--max_new_tokens=5", "--temperature=0"])
    assert sizes == [12] and "[5 tokens" in capsys.readouterr().err  # 7 of the prompt, and 5
    settings = serve.ServeConfig(device="cpu")
    served = serve.Served(settings, *sample.load_model(settings, ["a"]))
    token = 2 * 2 * 2 * 8 * 4  # bytes: keys and values, layers, heads, channels, of a float
    assert served.context == sizes[-1] == int(16e6 // token) // 2 and served.engine.rows == 1
    assert "1 rows of 31,250 tokens instead of 16 of 262,144: half of the free memory" in capsys.readouterr().err

    (here / "text.txt").write_text(words(90))
    read = []
    monkeypatch.setattr(GPT, "trunk", spy(GPT.trunk, read, lambda model, idx, *_: idx.numel()))
    evaluate.main(["a", "--data=text.txt", "--tasks=none", "--samples=0", "--device=cpu"])
    assert read == [89]  # of 90 tokens, not of a whole context
    said = capsys.readouterr().err
    assert "block_size=" in said and "instead of 262,144: half of the free memory holds no more" in said


def test_the_last_window_of_a_text_is_as_long_as_it_is(here, monkeypatch):
    """And the sum is what one token after the other gives."""
    model, read = random_model(vocab_size=101, block_size=32), []
    text = perplexity.Text("a text", [words(70)])
    due = perplexity.measure_text(model, CHARACTERS, text, block_size=32, batch_size=1)
    monkeypatch.setattr(GPT, "trunk", spy(GPT.trunk, read, lambda model, idx, *_: idx.size(1)))
    found = perplexity.measure_text(model, CHARACTERS, text, block_size=32, batch_size=1)
    assert read == [32, 32, 5] and found == due
    ids = torch.tensor([CHARACTERS.encode(text.documents[0])])
    nats = 0.0
    for start in range(0, 69, 32):
        part = ids[:, start:start + 33]
        nats += model(part[:, :-1], part[:, 1:]).item() * (part.size(1) - 1)
    assert found["bits_per_byte"] == pytest.approx(nats / 0.6931471805599453 / 70, rel=1e-5)


def spy(function, seen, what=lambda cache, config, batch_size, capacity=None, *_: capacity):
    """A function that notes something of its arguments, and does as before."""
    def noted(*args, **kw):
        seen.append(what(*args))
        return function(*args, **kw)
    return noted
