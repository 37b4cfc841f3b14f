# SPDX-License-Identifier: GPL-3.0-only
"""The same numbers as others: transformers' models, plain float64 arithmetic, and nanoGPT where it is at hand."""
import os
import re

import pytest
import torch
from conftest import ROOT, error, prepare_words

import bench
import runtime
from model import GPT, GPTConfig

# ----------------------------------------------------------------------------------------------------------------------
# transformers

SMALL = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=40, rms_norm_eps=1e-4)
THEIRS = {
    "gpt2": ("GPT2", dict(vocab_size=100, n_positions=40, n_embd=32, n_layer=3, n_head=4, layer_norm_epsilon=1e-4)),
    "gpt2 with exact gelu": ("GPT2", dict(vocab_size=128, n_positions=40, n_embd=32, n_layer=2, n_head=2, n_inner=80,
                                          activation_function="gelu", tie_word_embeddings=False)),
    "llama": ("Llama", dict(SMALL, num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=500.0))),
    "llama, tied": ("Llama", dict(SMALL, num_key_value_heads=4, head_dim=16, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(SMALL, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)),
}


@pytest.mark.parametrize("name", THEIRS)
def test_logits_equal_transformers(name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind, shape = THEIRS[name]
    config = getattr(transformers, kind + "Config")(**shape)
    torch.manual_seed(1)
    theirs = getattr(transformers, kind + ("LMHeadModel" if kind == "GPT2" else "ForCausalLM"))(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # norms and biases too: the initial 1 and 0 would hide a mistake
            p.add_(torch.randn_like(p) * 0.2)
    ours = GPT(runtime.hugging_face_config(config.to_dict())).eval()
    runtime.load_hugging_face(ours, theirs.state_dict())
    for T in (1, 7, 40):
        idx = torch.randint(100, (3, T))
        with torch.no_grad():
            expected, found = theirs(idx).logits, ours(idx)
        assert expected.std() > 0.3  # not all the same
        assert (expected - found).abs().max() < 1e-4


def test_what_a_hugging_face_model_may_not_have():
    llama = dict(model_type="llama", vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                 num_attention_heads=4, max_position_embeddings=40, rms_norm_eps=1e-4)
    assert runtime.hugging_face_config(llama).n_inner == 48
    for change, fact in ((dict(model_type="bert"), "model_type=bert"),
                         (dict(attention_bias=True), "attention_bias=True"),
                         (dict(rope_parameters=dict(rope_type="yarn")), "rope_type=yarn"),
                         (dict(rope_scaling=dict(rope_type="llama3")), "rope_type=llama3")):
        assert fact in error(lambda _: runtime.hugging_face_config({**llama, **change}))[0]
    del llama["hidden_size"]
    assert "'hidden_size'" in error(lambda _: runtime.hugging_face_config(llama))[0]
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=64, pos="rope", norm="rmsnorm", mlp="swiglu"))
    assert "no tensor model.embed_tokens.weight" in error(lambda _: runtime.load_hugging_face(model, {}))[0]


# ----------------------------------------------------------------------------------------------------------------------
# Other training programs


def parity(capfd, *argv):
    assert bench.main(["parity", *argv]) == 0
    found = re.search(r"(\d+) updates, (\d+) of them clipped, .* loss ([\d.e-]+), of a gradient norm ([\d.e-]+)",
                      capfd.readouterr().out)
    assert int(found[2]) > 0 and float(found[3]) < 1e-4 and float(found[4]) < 1e-4
    return int(found[1])


@pytest.fixture
def data(here):
    prepare_words(here)


def test_training_equals_plain_float64_arithmetic(data, capfd):
    """tests/reference: forward, AdamW, schedule, accumulation and clipping from their formulas alone."""
    assert parity(capfd, f"--peer={ROOT}/tests/reference", "--dataset=words", "--steps=100") == 100


def test_training_equals_nanogpt(data, capfd):
    if "NANOGPT" not in os.environ:
        pytest.skip("the environment variable NANOGPT does not name a folder of nanoGPT")
    assert parity(capfd, f"--peer={os.environ['NANOGPT']}", "--dataset=words") == 200


def test_parity_notices_a_difference(data, capfd, monkeypatch):
    monkeypatch.setattr(bench, "TOLERANCE", 1e-9)  # what float32 cannot keep against float64
    assert bench.main(["parity", f"--peer={ROOT}/tests/reference", "--dataset=words", "--steps=10"]) == 1


def test_parity_needs_a_peer(data):
    for peer in ("--peer=nowhere", "--peer="):
        assert "has no train.py" in error(bench.main, "parity", peer)[0]
    assert "steps=3" in error(bench.main, "parity", f"--peer={ROOT}/tests/reference", "--steps=3")[0]
    fact, fix = error(bench.main, "parity", f"--peer={ROOT}/tests/reference", "--dataset=none")
    assert "our own run failed, error: there is no prepared data in data/none" in fact and "python prepare.py" in fix
