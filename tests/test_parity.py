# SPDX-License-Identifier: GPL-3.0-only
"""The same numbers as others: transformers' models, plain float64 arithmetic, and nanoGPT where it is at hand."""
import os
import re

import pytest
import torch
from conftest import ROOT, error, prepare_words, script

from bench import __main__ as bench
from bench import parity as bench_parity
from formats import huggingface
from training import checkpoint as ckpt
from model import GPT

# ----------------------------------------------------------------------------------------------------------------------
# transformers

SMALL = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=40, rms_norm_eps=1e-4)
THEIRS = {
    "gpt2": ("GPT2", dict(vocab_size=100, n_positions=40, n_embd=32, n_layer=3, n_head=4, layer_norm_epsilon=1e-4)),
    "gpt2 with exact gelu": ("GPT2", dict(vocab_size=128, n_positions=40, n_embd=32, n_layer=2, n_head=2, n_inner=80,
                                          activation_function="gelu", tie_word_embeddings=False)),
    "llama": ("Llama", dict(SMALL, num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=500.0))),
    "llama with biases": ("Llama", dict(SMALL, attention_bias=True, mlp_bias=True)),
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
    ours = GPT(huggingface.our_config(config.to_dict())).eval()
    ckpt.load_weights(ours, huggingface.our_weights(theirs.state_dict(), ours.config, name), name)
    for T in (1, 7, 40):
        idx = torch.randint(100, (3, T))
        with torch.no_grad():
            expected, found = theirs(idx).logits, ours(idx)
        assert expected.std() > 0.3  # not all the same
        assert (expected - found).abs().max() < 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# Other training programs


def parity(capfd, *argv):
    assert bench.main(["parity", *argv]) == 0
    found = re.search(r"(\d+) steps, (\d+) of them clipped, .*; largest difference: loss ([\d.e-]+), gradient norm ([\d.e-]+)",
                      capfd.readouterr().out)
    assert int(found[2]) > 0 and float(found[3]) < 1e-4 and float(found[4]) < 1e-4
    return int(found[1])


@pytest.fixture
def data(here):
    prepare_words(here)


def test_training_equals_plain_float64_arithmetic(data, capfd):
    """plain.py: forward, AdamW, schedule, accumulation and clipping from their formulas alone."""
    assert parity(capfd, f"--peer={ROOT}/plain.py", "--dataset=words", "--steps=40") == 40


def test_training_equals_nanogpt(data, capfd):
    if "NANOGPT" not in os.environ:
        pytest.skip("the environment variable NANOGPT does not name a folder of nanoGPT")
    assert parity(capfd, f"--peer={os.environ['NANOGPT']}", "--dataset=words") == 200


def test_parity_notices_a_difference(data, capfd, monkeypatch):
    monkeypatch.setattr(bench_parity, "TOLERANCE", 1e-9)  # what float32 cannot keep against float64
    assert bench.main(["parity", f"--peer={ROOT}/plain.py", "--dataset=words", "--steps=3"]) == 1


def test_parity_needs_a_peer(data, capfd):
    for peer in ("--peer=nowhere", "--peer="):
        assert "is not a nanoGPT folder" in error(bench.main, "parity", peer)[0]
    assert "train.py failed" in error(bench.main, "parity", f"--peer={ROOT}/plain.py", "--dataset=none")[0]
    assert "there is no prepared data in data/none" in capfd.readouterr().err


def test_plain_learns_alone(tmp_path):
    """Without a prepared text it reads files of Python's library, learns, and writes."""
    out = script("plain.py", "--max_iters=20", "--log_interval=20", "--device=cpu", cwd=tmp_path).stdout
    first, last = map(float, re.findall(r"iter \d+: loss ([\d.]+), time", out))
    validation, guess = map(float, re.search(r"validation loss ([\d.]+) \(guessing: ([\d.]+)\)", out).groups())
    assert last < first and validation < guess and "plain.py ignores device" in out
    assert len(out.partition("    def ")[2]) > 250
