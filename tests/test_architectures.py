# SPDX-License-Identifier: GPL-3.0-only
"""The models that people have, beside GPT-2: scaled rope, Qwen2, Mistral. transformers is the judge."""
import copy
import dataclasses
import json
import re

import pytest
import torch
from conftest import error, package, random_model, words

import export
import prepare
import train
import tokenizer as tokenizers
from formats import huggingface, readback
from formats.quantized import quantize
from model import GPT, GPTConfig, KVCache, scale_rope
from serving.engine import Engine, Request
from training import checkpoint as ckpt

transformers = package("transformers")
CHARACTERS = tokenizers.CharTokenizer("\n" + "".join(map(chr, range(32, 127))))  # 101 tokens

SMALL = dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
CASES = {  # model_type, and what its config.json has besides SMALL
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2, yarn": ("qwen2", dict(rope_parameters=dict(YARN, rope_theta=1e6))),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral, wide window": ("mistral", dict(sliding_window=64, head_dim=16)),
    "llama, llama3": ("llama", dict(rope_parameters=dict(LLAMA3, rope_theta=500000.0))),
    "llama, linear": ("llama", dict(rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=1e4))),
    "llama, yarn": ("llama", dict(rope_parameters=dict(YARN, rope_theta=1e4))),
    "llama, yarn of its own": ("llama", dict(rope_parameters=dict(
        YARN, rope_theta=100.0, beta_fast=4.0, beta_slow=0.5, attention_factor=1.3))),
    "llama, yarn, both at 0": ("llama", dict(rope_parameters=dict(YARN, rope_theta=1e4, original_max_position_embeddings=4))),
    "qwen3, yarn, below 0": ("qwen3", dict(head_dim=16, rope_parameters=dict(
        YARN, rope_theta=1e4, original_max_position_embeddings=1))),
    "qwen3, yarn": ("qwen3", dict(head_dim=16, rope_parameters=dict(YARN, rope_theta=1e6))),
    "llama, old names": ("llama", dict(rope_scaling=dict(type="linear", factor=4.0), rope_theta=500.0)),
}


def theirs_of(kind, change, folder):
    """A random model of transformers, which writes a folder. Its biases are random too."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **copy.deepcopy({**SMALL, **change}))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(folder)
    CHARACTERS.save(f"{folder}/tokenizer")
    return model


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_transformers(here, case):
    """In, with and without a cache, and out again: the same class, the same tensors bit for bit."""
    kind, change = CASES[case]
    theirs = theirs_of(kind, change, "a")
    model, tokenizer, run = ckpt.load_run("a")
    idx = torch.randint(101, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        due = theirs(idx).logits
        assert (model(idx) - due).abs().max() < 1e-4
        cache = KVCache(model.config, 2)
        parts = [model(part, cache=cache) for part in idx.split([30, 1, 1, 32], dim=1)]
        assert (torch.cat(parts, dim=1) - due).abs().max() < 1e-4
    huggingface.write("b", model, tokenizer, generation=run["generation"])
    a, b = huggingface.read_tensors("a"), huggingface.read_tensors("b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    again = transformers.AutoModelForCausalLM.from_pretrained("b").eval()
    name = type(theirs).__name__.replace("Mistral", "Llama")  # without a window, Mistral is one
    assert type(again).__name__ == name
    with torch.no_grad():
        assert (again(idx).logits - due).abs().max() < 1e-4
    assert ckpt.load_run("b")[0].config == model.config


@pytest.mark.parametrize("head_dim, theta, rope", [
    (128, 5e5, dict(LLAMA3, original_max_position_embeddings=8192)),  # Llama 3.1 8B
    (64, 5e5, dict(LLAMA3, factor=32.0, original_max_position_embeddings=8192)),  # Llama 3.2 1B
    (128, 1e6, dict(YARN, original_max_position_embeddings=32768)),  # Qwen2.5 and Qwen3
    (128, 1e4, dict(rope_type="linear", factor=2.5))])
def test_the_speeds_of_real_models(head_dim, theta, rope):
    """At position 100,000, a rounding of the speed would be a degree."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    shape = dict(head_dim=head_dim, hidden_size=4 * head_dim, num_attention_heads=4)
    due, size = ROPE_INIT_FUNCTIONS[rope["rope_type"]](
        transformers.LlamaConfig(**shape, max_position_embeddings=131_072, rope_parameters=dict(rope, rope_theta=theta)))
    config = huggingface.our_config(SMALL | shape | dict(model_type="llama", rope_parameters=dict(rope, rope_theta=theta)))
    speed = 1 / theta ** (torch.arange(head_dim // 2) / (head_dim // 2))
    scaled, factor = scale_rope(speed, config)
    assert torch.allclose(scaled, due, rtol=1.2e-7, atol=0) and factor == size
    assert (scaled != due).sum() <= (5 if rope["rope_type"] == "yarn" else 0) and (scaled < speed).sum() > 15


def test_the_scaling_changes_the_model():
    """(So that the test above could fail.) Each one gives other logits than none."""
    idx = torch.randint(100, (1, 24))
    plain = random_model(pos="rope")
    for scaling in ("linear,factor=2", "yarn,factor=4,original_max_position_embeddings=8",
                    "llama3,factor=8,low_freq_factor=1,high_freq_factor=4,original_max_position_embeddings=8"):
        scaled = GPT(dataclasses.replace(plain.config, rope_scaling=scaling)).eval()
        scaled.load_state_dict(plain.state_dict())
        assert (scaled(idx) - plain(idx)).abs().max() > 1e-3, scaling


@pytest.mark.parametrize("scaling, said", [
    ("dynamic,factor=2", "not one of none, linear, llama3, yarn"), ("linear", "factor is missing, unknown"),
    ("linear,factor=x", "factor is missing, unknown"), ("linear,factor=0", "factor is missing, unknown or out of range"),
    ("linear,factor=1e400", "factor is missing, unknown or out of range"), ("yarn,factor=2", "original_max_position_embeddings"),
    ("yarn,factor=2,original_max_position_embeddings=8,mscale=1", "mscale is missing, unknown"), ("", "not one of")])
def test_a_scaling_that_cannot_be(scaling, said):
    with pytest.raises(AssertionError, match=re.escape(said)):
        GPT(GPTConfig(pos="rope", rope_scaling=scaling))


def test_graphs(here):
    """ONNX, TorchScript and pt2 of a Qwen2 with scaled rope answer as the model does."""
    theirs_of(*CASES["qwen2, yarn"], "a")
    model, _, _ = ckpt.load_run("a")
    model.requires_grad_(False)
    questions, ours = export.ask(model, CHARACTERS, None)
    for name in ("onnx", "torchscript", "pt2"):
        path = str(here / export.FORMATS[name].file)
        export.FORMATS[name].write(path, model)
        _, what, passes = export.compare(model, questions, ours, readback.answer(path, questions))
        assert passes, f"{name}: {what}"


@pytest.mark.parametrize("lora", [0, 4])
def test_a_fine_tune_keeps_the_architecture(here, lora):
    theirs_of(*CASES["qwen2, yarn"], "a")
    (here / "text.txt").write_text(words(4000), encoding="utf-8")
    prepare.main(["text.txt", "--tokenizer=a"])
    assert train.main(["--init_from=a", "--dataset=text", "--max_iters=3", "--warmup_iters=1", "--device=cpu", "--batch_size=4",
                       "--block_size=32", "--compile=false", f"--lora_rank={lora}"]) == 0
    before, after = ckpt.load_run("a")[0], ckpt.load_run("out/text")[0]
    assert after.config == dataclasses.replace(before.config, block_size=32)
    huggingface.write("b", after, CHARACTERS)
    idx = torch.randint(101, (1, 32))
    with torch.no_grad():
        due = after(idx)
        assert (transformers.AutoModelForCausalLM.from_pretrained("b").eval()(idx).logits - due).abs().max() < 1e-4
        assert (before(idx) - due).abs().max() > 1e-4
    # The context of its training is what the scaling is about, however short the fine-tune's is.
    assert json.loads((here / "b/config.json").read_text())["rope_parameters"]["original_max_position_embeddings"] == 16


def edit(path, **change):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**values, **change}.items() if v != "DELETE"}))


def test_what_config_json_may_and_may_not_say(here):
    theirs_of("llama", {}, "a")
    config = here / "a/config.json"
    # The older name alone; both, where transformers takes the older; the length of the training outside, or nowhere.
    edit(config, rope_parameters="DELETE", rope_scaling=dict(type="linear", factor=2.0), rope_theta=500.0)
    assert ckpt.load_run("a")[0].config.rope_scaling == "linear,factor=2.0"
    assert ckpt.load_run("a")[0].config.rope_theta == 500.0
    edit(config, rope_parameters=dict(rope_type="default", rope_theta=7.0))
    assert ckpt.load_run("a")[0].config.rope_scaling == "linear,factor=2.0"
    edit(config, rope_scaling="DELETE", rope_parameters=dict(rope_type="yarn", factor=2.0))
    assert ckpt.load_run("a")[0].config.rope_scaling == "yarn,factor=2.0,original_max_position_embeddings=64"
    edit(config, original_max_position_embeddings=32)
    assert ckpt.load_run("a")[0].config.rope_scaling == "yarn,factor=2.0,original_max_position_embeddings=32"
    for rope, said in ((dict(rope_type="dynamic", factor=2.0), "dynamic"),
                       (dict(rope_type="longrope", long_factor=[1.0], short_factor=[1.0]), "longrope"),
                       (dict(rope_type="yarn", factor=2.0, mscale=1.0), "mscale"),
                       (dict(rope_type="linear", factor="2"), "factor='2'"),
                       (dict(rope_type="linear", factor=True), "factor=True"), (dict(rope_type=["yarn"]), "list"),
                       (dict(rope_type="linear", factor=2.0, partial_rotary_factor=0.5), "partial_rotary_factor=0.5")):
        edit(config, rope_parameters=rope)
        fact, fix = error(lambda _: ckpt.load_run("a"))
        assert said in fact, rope


def test_a_sliding_window(here, capsys):
    """Mistral 7B v0.1: 32,768 positions, a window of 4,096, so a context of that size, whose logits are right."""
    theirs = theirs_of("mistral", dict(sliding_window=16), "a")
    model, _, _ = ckpt.load_run("a")
    assert model.config.block_size == 16
    assert "note: the context is 16 tokens, the window that slides over 64 in a" in capsys.readouterr().err
    idx = torch.randint(101, (1, 16))
    with torch.no_grad():
        assert (model(idx) - theirs(idx).logits).abs().max() < 1e-4
    edit(here / "a/config.json", sliding_window="DELETE")  # the class has 4,096
    assert ckpt.load_run("a")[0].config.block_size == 64
    theirs_of("qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=0), "b")
    assert "use_sliding_window=True, but only False" in error(lambda _: ckpt.load_run("b"))[0]


def test_biases_of_queries_keys_and_values(here):
    """8 bits, the engine, greedy texts with a cache, and LoRA's merged weights all have them."""
    theirs = theirs_of("qwen2", {}, "a")
    model, tokenizer, _ = ckpt.load_run("a")
    assert model.transformer.h[0].attn.c_attn.bias.abs().max() > 0.1 and model.transformer.h[0].attn.c_proj.bias is None
    ids = tokenizer.encode("the cat sees")
    due = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None)[0, len(ids):]
    assert torch.cat(list(model.generate(torch.tensor([ids]), 20)), dim=1)[0].tolist() == due.tolist()
    idx = torch.randint(101, (2, 64))
    with torch.no_grad():
        exact, rounded = model(idx), quantize(copy.deepcopy(model))(idx)
    assert 0 < (exact - rounded).abs().max() < 0.3 * exact.abs().max()
    request = Request(ids=ids, max_tokens=20, temperature=0.0, ignore_eos=True)
    Engine(model, tokenizer, rows=2).complete([request])
    assert request.text == tokenizer.decode(due.tolist())
